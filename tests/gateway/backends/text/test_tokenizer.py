"""What a tokenizer.json may be, and what it must not do to the gateway."""

from __future__ import annotations

import base64
import sys
from typing import Any

import pytest

import text_models
from inferway_gateway.backends.text.tokenizer import (
    MAX_BYTES,
    LoadedTokenizer,
    TokenizerError,
    check_pattern,
    load_tokenizer,
)
from inferway_gateway.core.encoding import Template
from inferway_gateway.core.errors import ModelExecutionError
from text_models import as_bytes


def loaded(**changes: Any) -> LoadedTokenizer:
    return LoadedTokenizer(as_bytes(text_models.tokenizer(**changes)))


def test_texts_become_ids_without_the_special_tokens() -> None:
    assert loaded().encode(["W1 w2", "", "nothing w95"]) == [[5, 6], [], [1, 99]]


def test_the_special_tokens_around_one_text_and_two_are_learnt() -> None:
    tokenizer = loaded()
    assert tokenizer.vocabulary == 100
    assert tokenizer.single == Template((2,), (), (3,), (0, 0, 0, 0, 0))
    assert tokenizer.pair == Template((2,), (3,), (3,), (0, 0, 0, 1, 1))


def test_a_tokenizer_without_special_tokens_has_none() -> None:
    assert loaded(post_processor=None).single == Template()


def test_what_the_file_says_of_padding_and_cutting_is_not_done() -> None:
    padding = {
        "strategy": {"Fixed": 100_000_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    cutting = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    assert loaded(padding=padding, truncation=cutting).encode(["w1 w2 w3"]) == [[5, 6, 7]]


def vocabulary(**members: Any) -> dict[str, Any]:
    return {**text_models.tokenizer()["model"], **members}


def word_piece(longest: int) -> dict[str, Any]:
    return vocabulary(
        type="WordPiece", continuing_subword_prefix="##", max_input_chars_per_word=longest, unk_token="[UNK]"
    )


def precompiled(mapped: bytes) -> dict[str, Any]:
    table = (4).to_bytes(4, "little") + b"\0\0\0\0" + mapped + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


DOUBLING = {"type": "Replace", "pattern": {"String": "w"}, "content": "ww"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"type": "Magic", "vocab": {"a": 0}}}, "expected a model of type"),
        ({"model": vocabulary(vocab={})}, "vocabulary of 1 to"),
        ({"model": vocabulary(vocab={"a" * 1001: 0})}, "more than 1000 characters"),
        ({"model": vocabulary(vocab={"a": 2**40})}, "cannot be used"),
        ({"model": word_piece(10**9)}, "max_input_chars_per_word"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}}, "dropout"),
        ({"normalizer": {"type": "Shell"}}, "normalizer 'Shell' is not known"),
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLING] * 5}}, "more than 16 times"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 40}}, "more than 32 steps"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}}, "pattern of Replace"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""}}, "repeats a group"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 100}}, "Prepend"),
        ({"normalizer": precompiled(b"x" * 65)}, "maps to more than 64 bytes"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "not base64"),
        ({"pre_tokenizer": {"type": "Jieba"}}, "pre-tokenizer 'Jieba' is not known"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [{}] * 65}}, "more than 64 parts"),
        ({"added_tokens": [{"content": ""}]}, "added token"),
        ({"model": {"type": "WordLevel", "vocab": {"only": 0}, "unk_token": "?"}, "post_processor": None},
         "tokenizer.json"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else None,
)  # fmt: skip
def test_what_would_hurt_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        loaded(**changes)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"model": 1}', b"[" * 100_000, b"\xff"], ids=repr)
def test_what_is_no_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        LoadedTokenizer(content)


def test_a_file_that_is_too_long_is_not_read(tmp_path: Any) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(TokenizerError, match="longer than"):
        load_tokenizer(path)


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, O200K, r"\d", r"[0-9]{3}", r" {2,}", r"\s+$"], ids=str)
def test_patterns_of_well_known_tokenizers_are_taken(pattern: str) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|aa)*b", "(?:x{2,}){3,}y", "a*a*a*a*b", r"(a)\1", "(a|b*c*)(d*e*)", "x" * 2001, "a**", 7],
    ids=lambda p: str(p)[:20],
)
def test_patterns_that_may_take_for_ever_are_refused(pattern: Any) -> None:
    with pytest.raises(TokenizerError, match="regular expression"):
        check_pattern(pattern)


def test_a_failure_of_the_library_is_an_error_of_the_model() -> None:
    # A vocabulary without a token for the unknown: the library fails at the first unknown word.
    words = {"a": 0, "the": 1}
    tokenizer = loaded(
        model={"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}, post_processor=None, added_tokens=[]
    )
    assert tokenizer.encode(["a the"]) == [[0, 1]]
    with pytest.raises(ModelExecutionError, match="tokenizer failed"):
        tokenizer.encode(["unheard of"])


def test_a_gateway_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"pip install 'inferway\[language\]'"):
        loaded()
