"""Tokens to text: nothing is lost, nothing is broken, and stop strings do not show."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway_gateway.backends.language.text import Vocabulary, Writer

from .conftest import folder_of


def byte_vocabulary() -> Vocabulary:
    """One token for each byte, and a special one."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)}
    added = [{"id": 256, "content": "<|end|>", "special": True}, {"id": 257, "content": "<tool>", "special": False}]
    tokenizer: dict[str, Any] = {"model": {"vocab": words}, "decoder": {"type": "ByteFallback"}, "added_tokens": added}
    return Vocabulary.of(tokenizer, 260)


BYTES = byte_vocabulary()


def pieces(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    writer = Writer(BYTES, stops)
    found = []
    for byte in text.encode():
        found.append(writer.push(byte))
        if writer.stopped:
            return found, True
    found.append(writer.finish())
    return found, writer.stopped


@given(st.text(max_size=40))
def test_pieces_are_whole_characters_and_make_the_text(text: str) -> None:
    found, _ = pieces(text)
    assert "".join(found) == text
    assert "\ufffd" not in "".join(found) or "\ufffd" in text


@given(st.text("ab€", max_size=30), st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string_and_no_piece_has_any_of_it(text: str, stops: list[str]) -> None:
    found, stopped = pieces(text, tuple(stops))
    shown = "".join(found)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert stopped == any(stop in text for stop in stops)
    if not stopped:
        assert shown == text
    else:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)


def test_half_a_stop_string_is_kept_back_until_it_is_known_to_be_none() -> None:
    writer = Writer(BYTES, ("STOP",))
    assert [writer.push(byte) for byte in b"aSTOx"] == ["a", "", "", "", "STOx"]


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    writer = Writer(BYTES, ())
    assert [writer.push(byte) for byte in "é".encode()[:1]] == [""]
    assert writer.finish() == "\ufffd"


def test_special_tokens_are_no_text_but_have_names() -> None:
    assert BYTES.decode([65, 256, 257]) == "A<tool>"
    assert BYTES.name(256) == ("<|end|>", b"<|end|>")
    assert BYTES.name(65) == ("A", b"A")


@pytest.mark.parametrize("text", ["2019 is a year", "Grüße, 世界! 🎉🏳️‍🌈", "  spaces\n\ttabs", "½ ² ٣"])
def test_byte_level_tokens_decode_to_what_was_encoded(text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    raw = (folder_of("tiny-llm") / "tokenizer.json").read_text()
    vocabulary = Vocabulary.of(json.loads(raw), 49152)
    ids = tokenizers.Tokenizer.from_str(raw).encode(text).ids
    assert vocabulary.decode(ids) == text


def test_a_vocabulary_is_the_same_after_it_was_packed() -> None:
    own = byte_vocabulary()
    other = Vocabulary.unpacked(own.packed(), own.size, own.names)
    assert (other.bytes, other.names, other.special) == (own.bytes, own.names, own.special)
    for raw in (b"", own.packed()[:-1], own.packed() + b"x", b"\xff" * len(own.packed())):
        with pytest.raises(ValueError, match="no packed"):
            Vocabulary.unpacked(raw, own.size, own.names)
    with pytest.raises(ValueError, match="no packed"):
        Vocabulary.unpacked(own.packed(), own.size, {own.size: "<a>"})
