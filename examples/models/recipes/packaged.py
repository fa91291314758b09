"""ONNX files that other packages ship, copied: magika, silero-vad and rapidocr, as far as they are installed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any, Final

from .graph import open_session
from .sources import package_dir

# Package, files inside it, licence.
SHIPPED: Final = (
    ("magika", "models/*/*", "Apache-2.0"),
    ("silero_vad", "data/silero_vad_16k_op15.onnx", "MIT"),
    ("silero_vad", "data/silero_vad.onnx", "MIT"),
    ("rapidocr", "models/*.onnx", "Apache-2.0"),
)


def make(out: Path) -> dict[str, Any]:
    found = {}
    for module, pattern, licence in SHIPPED:
        if importlib.util.find_spec(module) is None:
            continue
        for file in sorted(package_dir(module).glob(pattern)):
            if file.is_file():
                (out / module).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, out / module / file.name)
                found[f"{module}/{file.name}"] = licence
    if not found:
        raise SystemExit("install magika, silero-vad and rapidocr with --no-deps first")
    return {"license": found}


def check(out: Path) -> None:
    for file in out.rglob("*.onnx"):
        open_session(file)
