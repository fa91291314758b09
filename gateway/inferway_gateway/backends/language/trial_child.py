"""The process in which grammars are tried. Run as a program, with the socket's number as its argument.

A grammar is a program of a caller's, and its compiler recurses and allocates as the grammar says: one of a page made it
overrun its stack, another one take 36 s and 4 GB (llguidance 1.7, 23 November 2026). So it first does its work here,
with little memory and little stack, and whoever waits for it ends the process when the time is over.

The first question has the tokenizer, and is answered with ``{}``; then each is a constraint and its answer, with
``error`` where it cannot be used.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from typing import Any, Final

from inferway_gateway.backends import programs
from inferway_gateway.backends.language.constraints import Grammars
from inferway_gateway.core.errors import GatewayError
from inferway_gateway.core.generation import Constraint

MEMORY_BYTES: Final = 256 << 20
"""Beyond what the process has with its tokenizer."""
STACK_BYTES: Final = 2 << 20
"""A quarter of what the engine's threads have: what fits here, fits there."""


def respond(grammars: Grammars, asked: dict[str, Any]) -> dict[str, Any]:
    """What comes of compiling a constraint: nothing, or why it cannot be used."""
    try:
        grammars.compile(Constraint(asked["kind"], asked["text"]))
    except GatewayError as error:
        return {"error": error.message}
    except MemoryError:
        return {"error": "the grammar takes too much memory"}
    return {}


def serve(stream: socket.socket) -> None:
    asked = programs.questions(stream)
    model = json.loads(next(asked))
    grammars = Grammars(model["tokenizer"], model["ends"], model["size"])
    ready = respond(grammars, {"kind": "json_object", "text": ""})
    programs.confine(MEMORY_BYTES)
    programs.answer(stream, json.dumps(ready).encode())
    for question in asked:
        programs.answer(stream, json.dumps(respond(grammars, json.loads(question))).encode())


def main() -> None:
    threading.stack_size(STACK_BYTES)
    with socket.socket(fileno=int(sys.argv[1])) as stream:
        thread = threading.Thread(target=serve, args=(stream,))
        thread.start()
        thread.join()


if __name__ == "__main__":
    main()
