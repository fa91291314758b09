"""The process in which the tokenizer of a deployed model does its work. Run as a program.

The first question is ``{"kind": …}``, a zero byte and the content of ``tokenizer.json``; its answer has what the
gateway has to know of the tokenizer, or ``error``. Each further one is ``{"texts": […], "special": …}``, answered with
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
from inferway_gateway.backends.text.tokenizer import (
    LoadedTokenizer,
    MarkingTokenizer,
    TokenizerError,
)
from inferway_gateway.core.errors import ModelExecutionError

MEMORY_BYTES: Final = 2 << 30
"""Beyond what the process has with its tokenizer. A million tokens take some 350 MiB."""


def opened(kind: str, content: bytes) -> tuple[Any, dict[str, Any]]:
    if kind == "generator":
        marking = MarkingTokenizer(content)
        return marking.encode, {"begin": list(marking.begin)}
    loaded = LoadedTokenizer(content)
    facts = {
        "vocabulary": loaded.vocabulary,
        "single": asdict(loaded.single),
        "pair": None if loaded.pair is None else asdict(loaded.pair),
    }
    return lambda texts, special: loaded.encode(texts), facts


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as stream:
        asked = programs.questions(stream)
        head, _, content = next(asked).partition(b"\0")
        try:
            encode, facts = opened(orjson.loads(head)["kind"], content)
        except TokenizerError as error:
            programs.answer(stream, orjson.dumps({"error": str(error)}))
            return
        del content
        programs.confine(MEMORY_BYTES)
        programs.answer(stream, orjson.dumps(facts))
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
