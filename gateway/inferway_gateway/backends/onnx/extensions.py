"""Operators of onnxruntime-extensions: tokenisers, image decoding, text.

They are native code of a package that the operator of the gateway installed, and are registered only for models that
the operator named. The library's path comes from where the package lies, never from anything that a model says.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

from ...core.errors import ModelLoadError

PACKAGE = "onnxruntime_extensions"


@functools.cache
def library() -> Path:
    """The package's compiled library, found without importing the package.

    Raises:
        ModelLoadError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        for path in sorted(Path(folder).glob("_extensions_pydll*")):
            return path
    raise ModelLoadError(
        "onnxruntime-extensions is not installed where the gateway runs: ask its operator for "
        "pip install 'inferway[extensions]'"
    )


@functools.cache
def load() -> ctypes.CDLL:
    """Map the library for good. A process that locks itself in does this first, for nothing can be mapped later.

    Raises:
        ModelLoadError: the package is not installed, or does not fit this system.
    """
    try:
        return ctypes.CDLL(str(library()))
    except OSError:
        raise ModelLoadError("onnxruntime-extensions is installed and cannot be loaded: install it again") from None


def register(options: Any) -> None:
    """Let sessions with these options use the operators.

    Raises:
        ModelLoadError: as ``load``.
    """
    load()
    options.register_custom_ops_library(str(library()))
