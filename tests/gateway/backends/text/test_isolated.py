"""Tokenizers in processes of their own: the same tokens, and nothing that a file does gets out."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest

import text_models
from inferway_gateway.backends.language.text import Vocabulary
from inferway_gateway.backends.programs import CPU_LIMIT_S
from inferway_gateway.backends.text.isolated import IsolatedTokenizer
from inferway_gateway.backends.text.tokenizer import LoadedTokenizer, MarkingTokenizer, TokenizerError
from inferway_gateway.core.errors import ModelExecutionError
from text_models import as_bytes

ENDLESS = {"type": "Split", "pattern": {"Regex": "w+w+w+b"}, "behavior": "Isolated", "invert": False}
"""Allowed by every look at it, and takes minutes for two thousand letters."""
MIB = 1 << 20
GROWING = {"type": "Replace", "pattern": {"String": "w"}, "content": "w" * 16}


def isolated(limit_s: float = 20.0, **changes: Any) -> IsolatedTokenizer:
    return IsolatedTokenizer(as_bytes(text_models.tokenizer(**changes)), limit_s=limit_s)


@pytest.fixture(scope="module")
def tokenizer() -> IsolatedTokenizer:
    return isolated()


def test_it_gives_what_one_in_the_gateway_gives(tokenizer: IsolatedTokenizer) -> None:
    own = LoadedTokenizer(as_bytes(text_models.tokenizer()))
    texts = ["W1 w2", "", "nothing w95", "w3 " * 5000]
    assert tokenizer.encode(texts) == own.encode(texts)
    assert tokenizer.encode([]) == []
    assert (tokenizer.vocabulary, tokenizer.single, tokenizer.pair) == (own.vocabulary, own.single, own.pair)


def test_for_a_generator_names_become_tokens_only_where_they_may() -> None:
    content = as_bytes(text_models.tokenizer())
    own, process = MarkingTokenizer(content), IsolatedTokenizer(content, "generator")
    for special in (True, False):
        assert process.encode(["w1[SEP]w2"], special) == own.encode(["w1[SEP]w2"], special)
    assert own.encode(["w1[SEP]w2"], True) != own.encode(["w1[SEP]w2"], False)
    assert process.begin == own.begin


def test_its_processes_have_a_footprint(tokenizer: IsolatedTokenizer) -> None:
    """Of one at work, and at the most of both."""
    footprint = tokenizer.footprint()
    assert footprint is not None
    assert 10 * MIB < footprint.resident_bytes < 200 * MIB
    assert footprint.peak_bytes >= 2 * footprint.resident_bytes


def test_calls_one_after_the_other_share_one_process() -> None:
    tokenizer = isolated()
    first = tokenizer._idle.get()
    tokenizer._idle.put(first)
    assert first is not None
    for _ in range(3):
        tokenizer.encode(["w1"])
    assert {tokenizer._idle.get(), tokenizer._idle.get()} == {first, None}
    first.end()


def test_several_threads_may_use_it(tokenizer: IsolatedTokenizer) -> None:
    found: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: found.append(tokenizer.encode(["w1 w2"] * 50))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[[5, 6]] * 50] * 6


def test_a_text_without_end_ends_with_its_process_and_the_next_one_is_answered() -> None:
    tokenizer = isolated(0.5, pre_tokenizer=ENDLESS)
    with pytest.raises(ModelExecutionError, match=r"longer than 0\.5 s"):
        tokenizer.encode(["w" * 3000])
    assert tokenizer.encode(["nothing"]) == [[1]]


def test_a_text_that_takes_all_memory_ends_its_process_alone(tokenizer: IsolatedTokenizer) -> None:
    growing = isolated(normalizer=GROWING)
    with pytest.raises(ModelExecutionError, match=r"ended|longer|failed"):
        growing.encode(["w" * 8_000_000])
    assert growing.encode(["nothing"]) == [[1]]
    assert tokenizer.encode(["w1"]) == [[5]]


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"null", b'{"model": 5}', b"\xff"], ids=range(6))
@pytest.mark.parametrize("kind", ["encoder", "generator"])
def test_what_is_no_tokenizer_is_refused_in_words(kind: Any, content: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        IsolatedTokenizer(content, kind)


def test_its_processes_end_with_it() -> None:
    tokenizer = isolated()
    child = tokenizer._idle.get()
    tokenizer._idle.put(child)
    assert child is not None
    assert not child.ended
    del tokenizer
    gc.collect()
    assert child.ended


def test_a_generators_vocabulary_comes_from_its_process() -> None:
    document = text_models.tokenizer()
    tokenizer = IsolatedTokenizer(as_bytes(document), "generator", 200)
    vocabulary = Vocabulary.unpacked(tokenizer.packed[0], 200, tokenizer.packed[1])
    own = Vocabulary.of(document, 200)
    assert (vocabulary.bytes, vocabulary.names) == (own.bytes, own.names)
    many = [{**document["added_tokens"][0], "id": i, "content": f"<{i}>"} for i in range(20_001)]
    with pytest.raises(TokenizerError, match="more than 20000 special tokens"):
        IsolatedTokenizer(as_bytes({**document, "added_tokens": many}), "generator", 50_000)


def test_a_process_that_nobody_waits_for_any_more_is_ended_by_the_kernel(tokenizer: IsolatedTokenizer) -> None:
    tokenizer.encode(["w1"])
    child = tokenizer._idle.get()
    tokenizer._idle.put(child)
    assert child is not None
    limits = Path(f"/proc/{child._process.pid}/limits").read_text().splitlines()
    granted = next(line.split()[3] for line in limits if line.startswith("Max cpu time"))
    assert CPU_LIMIT_S <= int(granted) <= CPU_LIMIT_S + 30
