"""Grammars tried in a process of their own before an engine sees them.

An engine shares its process with other answers, often with the gateway itself, and a grammar can take its compiler's
stack, memory and time. What ends the process of ``trial_child``, or is not compiled there within its time, is refused;
only the rest is compiled again, in milliseconds, where it is used.

A model has one such process, from its first grammar on. A key has one grammar in line at a time, so that somebody's
many slow ones keep nobody else waiting for more than one of them; and what came of a grammar is remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import logging
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ...core.errors import ModelExecutionError, ShuttingDownError, UnsupportedOperationError
from ...core.generation import Constraint, GenerationParameterError
from . import frames
from .constraints import MAX_TEXT_BYTES, PARAMS

_log = logging.getLogger(__name__)

LIMIT_S: Final = 2.0
"""For one grammar. Those that people write take some milliseconds."""
_START_LIMIT_S: Final = 30.0
_REMEMBERED: Final = 512
_MODULE: Final = "inferway_gateway.backends.language.trial_child"


class _Child:
    """The process. Used by one thread at a time."""

    def __init__(self, model: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Without our environment, where secrets may be; -P: nothing is imported from the working directory.
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what is printed of a panic may hold a caller's text
                pass_fds=(theirs.fileno(),),
                env={
                    "PYTHONPATH": str(Path(__file__).parents[3]),
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "LC_ALL": "C.UTF-8",
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "RAYON_NUM_THREADS": "1",
                    "MALLOC_ARENA_MAX": "1",
                },
            )
        self._line = ours
        try:
            answer = self.ask(model, _START_LIMIT_S)
        except BaseException:
            self.end()
            raise
        if "error" in answer:
            self.end()
            raise EOFError(answer["error"])

    def ask(self, message: bytes, limit_s: float) -> dict[str, Any]:
        """Raises ``TimeoutError`` where the time is over and ``EOFError`` or ``OSError`` where the process ended."""
        deadline = time.monotonic() + limit_s
        self._line.settimeout(limit_s)
        self._line.sendall(frames.pack(message))
        (length,) = frames.LENGTH.unpack(self._read(frames.LENGTH.size, deadline))
        answer: dict[str, Any] = json.loads(self._read(min(length, 1 << 16), deadline))
        return answer

    def _read(self, size: int, deadline: float) -> bytes:
        got = bytearray()
        while len(got) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._line.settimeout(left)
            piece = self._line.recv(size - len(got))
            if not piece:
                raise EOFError
            got += piece
        return bytes(got)

    def end(self) -> None:
        self._line.close()
        self._process.kill()
        self._process.wait()


class GrammarTrial:
    """Tries grammars for one model. Close it in the end.

    Args:
        tokenizer, ends, size: as ``Grammars``.
    """

    def __init__(self, tokenizer: str, ends: Sequence[int], size: int, limit_s: float = LIMIT_S) -> None:
        self._model = (tokenizer, list(ends), size)
        self._limit_s = limit_s
        self._threads = ThreadPoolExecutor(1, "inferway-trial")
        self._child: _Child | None = None
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._closed = False

    async def check(self, constraint: Constraint, key_id: str) -> None:
        """Come back when the constraint can be compiled.

        Raises:
            GenerationParameterError: it cannot be used, or takes too much time or memory.
            UnsupportedOperationError: the gateway lacks llguidance.
            ModelExecutionError: there is no process to try it in.
            ShuttingDownError: this was closed.
        """
        param = PARAMS[constraint.kind]
        try:
            text = constraint.text.encode()
        except UnicodeEncodeError:
            raise GenerationParameterError("expected text, got half a surrogate pair", param) from None
        if len(text) > MAX_TEXT_BYTES:
            raise GenerationParameterError(f"a grammar may have at most {MAX_TEXT_BYTES} bytes", param)
        if importlib.util.find_spec("llguidance") is None:
            raise UnsupportedOperationError(
                "this gateway cannot hold answers to a grammar: it lacks the package llguidance"
            )
        digest = hashlib.sha256(constraint.kind.encode() + b"\0" + text).digest()
        turn, users = self._turns.get(key_id) or (asyncio.Lock(), 0)
        self._turns[key_id] = turn, users + 1
        try:
            async with turn:
                if digest not in self._known:
                    if self._closed:
                        raise ShuttingDownError("the model is being unloaded")
                    message = json.dumps({"kind": constraint.kind, "text": constraint.text}).encode()
                    work = self._threads.submit(self._try, message)
                    self._known[digest] = await asyncio.wrap_future(work)
                    if len(self._known) > _REMEMBERED:
                        self._known.popitem(last=False)
                problem = self._known[digest]
        except GenerationParameterError as error:
            raise GenerationParameterError(error.message, param) from None
        finally:
            users = self._turns[key_id][1] - 1
            if users:
                self._turns[key_id] = turn, users
            else:
                del self._turns[key_id]
        if problem is not None:
            raise GenerationParameterError(problem, param)

    def _try(self, message: bytes) -> str | None:
        """Why it cannot be used, in words; None where it can. On the thread."""
        if self._child is None:
            tokenizer, ends, size = self._model
            model = json.dumps({"tokenizer": tokenizer, "ends": ends, "size": size}).encode()
            try:
                self._child = _Child(model)
            except (OSError, EOFError, ValueError) as error:
                _log.error("the process that tries grammars does not start: %s", type(error).__name__)
                raise ModelExecutionError("answers of this model cannot be held to a grammar now") from None
        try:
            problem = self._child.ask(message, self._limit_s).get("error")
            return None if problem is None else str(problem)
        except TimeoutError:
            self._end()
            # Raised, and so not remembered: a busy machine may have been the reason.
            raise GenerationParameterError(f"the grammar was not compiled within {self._limit_s:g} s") from None
        except (OSError, EOFError, ValueError):
            self._end()
            return "the grammar takes too much memory"

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with suppress(OSError):
                child.end()

    async def close(self) -> None:
        """End the process; what is being tried ends within its limit. Idempotent."""
        self._closed = True
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self._end()
