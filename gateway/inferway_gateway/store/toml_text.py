"""Reading TOML that may have come through the API."""

from __future__ import annotations

import tomllib
from typing import Any, Final

from .triton_config import ConfigError

MAX_DOTS: Final = 64
"""In one line. The standard library's parser keeps every beginning of a dotted key: 200,000 parts take 20 GiB."""


def parse_toml(text: str) -> dict[str, Any]:
    """The members of a TOML file. Raises ``ConfigError``."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MAX_DOTS:
            raise ConfigError(f"line {number} has more than {MAX_DOTS} dots; write tables, and one value a line")
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"not TOML: {error}") from None
