"""Calling other people's exporters without their noise, and without what they leave behind.

They print to standard output, warn, log at their own levels, write files beside the caller's, and draw random numbers.
None of that is the caller's business: `undisturbed` holds it all back, and puts the process's random state back.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

_NOISY: Final = ("absl", "keras", "onnx_ir", "onnxmltools", "onnxscript", "skl2onnx", "tensorflow", "tf2onnx", "torch")
"""Top names of loggers."""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Nothing printed, warned, logged, or left in the working directory; random states as they were before."""
    loggers = [
        logging.getLogger(name)
        for name in {*_NOISY, *logging.root.manager.loggerDict}
        if name.partition(".")[0] in _NOISY
    ]
    levels = [logger.level for logger in loggers]
    python, legacy = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    seed = torch.get_rng_state() if torch is not None else None
    hidden = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(legacy)
        if torch is not None and seed is not None:
            torch.set_rng_state(seed)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards, and is the working directory until then: some exporters write into it."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="inferway-") as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)
