"""TOML that came through the API: read in bounded memory."""

from __future__ import annotations

import pytest

from inferway_gateway.store.elsewhere import parse_pipeline, parse_remote
from inferway_gateway.store.model_options import parse_options
from inferway_gateway.store.toml_text import MAX_DOTS, parse_toml
from inferway_gateway.store.triton_config import ConfigError

BOMB = "\n[a]\nb" + ".b" * 40_000 + " = 1\n"
"""Parsed, it takes gigabytes."""


@pytest.mark.parametrize("parse", [parse_toml, parse_options, parse_pipeline, parse_remote])
def test_a_key_of_very_many_parts_is_not_parsed(parse: object) -> None:
    assert callable(parse)
    with pytest.raises(ConfigError, match="line 3 has more than 64 dots"):
        parse(BOMB)


def test_what_people_write_is_read() -> None:
    assert parse_toml("[a.b]\nc = [1.5, 2.5]\nd.e = 'x.y'\r\n") == {"a": {"b": {"c": [1.5, 2.5], "d": {"e": "x.y"}}}}
    assert parse_toml("x = '" + "." * MAX_DOTS + "'") == {"x": "." * MAX_DOTS}


@pytest.mark.parametrize("text", [pytest.param("a = ", id="half"), pytest.param("a = " + "[" * 100_000, id="nested")])
def test_what_is_no_toml_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="not TOML"):
        parse_toml(text)
