"""The process in which the tokenizer of a deployed model does its work. Run as a program.

The first question is ``{"kind": …, "size": …}``, a zero byte and the content of ``tokenizer.json``; its answer has what
the gateway has to know of the tokenizer, or ``error``, and after a zero byte the packed vocabulary of a model of that
size, for a generator and where it is not 0. Each further one is ``{"texts": […], "special": …}``, answered with
the ``lengths`` of the texts' token ids, a zero byte, and the ids as little-endian 32-bit numbers.
"""

from __future__ import annotations

import socket
import sys
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import orjson

from inferway_gateway.backends import programs
from inferway_gateway.backends.language.text import Vocabulary
from inferway_gateway.backends.text.tokenizer import (
    LoadedTokenizer,
    MarkingTokenizer,
    TokenizerError,
)
from inferway_gateway.core.errors import ModelExecutionError

MEMORY_BYTES: Final = 2 << 30
"""Beyond what the process has with its tokenizer. A million tokens take some 350 MiB."""

MAX_SPECIAL_TOKENS: Final = 20_000
"""What callers write is searched for the names of all of them. The most in use are some thousands."""


def opened(kind: str, size: int, content: bytes) -> tuple[Any, dict[str, Any], bytes]:
    if kind == "generator":
        marking = MarkingTokenizer(content)
        facts: dict[str, Any] = {"begin": list(marking.begin)}
        if not size:
            return marking.encode, facts, b""
        try:
            vocabulary = Vocabulary.of(orjson.loads(content), size)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise TokenizerError(f"tokenizer.json has the wrong shape: {type(error).__name__}") from None
        if len(vocabulary.names) > MAX_SPECIAL_TOKENS:
            raise TokenizerError(f"tokenizer.json has more than {MAX_SPECIAL_TOKENS} special tokens")
        facts["names"] = list(vocabulary.names.items())
        return marking.encode, facts, vocabulary.packed()
    loaded = LoadedTokenizer(content)
    facts = {
        "vocabulary": loaded.vocabulary,
        "single": asdict(loaded.single),
        "pair": None if loaded.pair is None else asdict(loaded.pair),
    }
    return lambda texts, special: loaded.encode(texts), facts, b""


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as stream:
        asked = programs.questions(stream)
        head, _, content = next(asked).partition(b"\0")
        order = orjson.loads(head)
        try:
            encode, facts, packed = opened(order["kind"], order["size"], content)
        except TokenizerError as error:
            programs.answer(stream, orjson.dumps({"error": str(error)}))
            return
        programs.answer(stream, orjson.dumps(facts) + b"\0" + packed)
        del content, packed
        programs.confine(MEMORY_BYTES)
        for question in asked:
            said = orjson.loads(question)
            try:
                found = encode(said["texts"], said["special"])
                ids = np.fromiter((token for one in found for token in one), "<i4", sum(map(len, found)))
            except (ModelExecutionError, OverflowError):
                programs.answer(stream, orjson.dumps({"error": True}))
                continue
            lengths = orjson.dumps({"lengths": [len(one) for one in found]})
            programs.answer(stream, lengths + b"\0" + ids.tobytes())


if __name__ == "__main__":
    main()
