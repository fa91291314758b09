"""The contract file itself, wherever this package was put. Reads one file of the package and never the network.

Needs PyYAML, which is part of the gateway's installation and not of the SDK's; nothing else in this package does.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml


def read_text() -> str:
    """The text of `inferway.yaml`.

    An installed package carries it beside its modules; in a source tree it lies one folder up.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    packaged = resources.files(__package__) / "inferway.yaml"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).resolve().parents[1] / "inferway.yaml").read_text(encoding="utf-8")


def load() -> dict[str, Any]:
    """The contract as plain values, parsed anew at each call, so that a caller may change what it gets."""
    # libyaml's loader takes half the time of the one in Python (50 ms, 113 ms); not every platform's wheel has it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document: dict[str, Any] = yaml.load(read_text(), Loader=loader)  # noqa: S506 - both loaders are the safe kind
    return document
