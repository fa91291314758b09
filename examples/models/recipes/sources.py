"""Where weights come from: packages that are installed, never a download."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_dir(module: str) -> Path:
    """The directory of an installed package, found without importing it (some would import PyTorch).

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {module!r} is not installed; see requirements.txt beside make_models.py")
    return Path(next(iter(spec.submodule_search_locations)))
