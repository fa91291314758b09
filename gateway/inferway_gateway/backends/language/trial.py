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
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from ...core.errors import ModelExecutionError, ShuttingDownError, UnsupportedOperationError
from ...core.generation import Constraint, GenerationParameterError
from ..programs import START_LIMIT_S, Program
from .constraints import MAX_TEXT_BYTES, PARAMS

_log = logging.getLogger(__name__)

LIMIT_S: Final = 2.0
"""For one grammar. Those that people write take some milliseconds."""
_REMEMBERED: Final = 512
_MODULE: Final = "inferway_gateway.backends.language.trial_child"


class GrammarTrial:
    """Tries grammars for one model. Close it in the end.

    Args:
        tokenizer, ends, size: as ``Grammars``.
    """

    def __init__(self, tokenizer: str, ends: Sequence[int], size: int, limit_s: float = LIMIT_S) -> None:
        self._model = (tokenizer, list(ends), size)
        self._limit_s = limit_s
        self._threads = ThreadPoolExecutor(1, "inferway-trial")
        self._child: Program | None = None
        self._unfit: str | None = None
        """Why no grammar at all can be used with the model, once that is known."""
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._closed = False

    async def check(self, constraint: Constraint, key_id: str) -> None:
        """Come back when the constraint can be compiled.

        Raises:
            GenerationParameterError: it cannot be used, or takes too much time or memory.
            UnsupportedOperationError: the gateway lacks llguidance, or that cannot read the model's tokenizer.
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
        if self._unfit is not None:
            raise UnsupportedOperationError(self._unfit)
        if self._child is None:
            self._child = self._started()
        try:
            problem = json.loads(self._child.ask(message, limit_s=self._limit_s)).get("error")
            return None if problem is None else str(problem)
        except TimeoutError:
            self._end()
            # Raised, and so not remembered: a busy machine may have been the reason.
            raise GenerationParameterError(f"the grammar was not compiled within {self._limit_s:g} s") from None
        except (OSError, EOFError, ValueError):
            self._end()
            return "the grammar takes too much memory"

    def _started(self) -> Program:
        tokenizer, ends, size = self._model
        model = json.dumps({"tokenizer": tokenizer, "ends": ends, "size": size}).encode()
        problem: object = "it ended"
        try:
            child = Program(_MODULE)
            try:
                problem = json.loads(child.ask(model, limit_s=START_LIMIT_S)).get("error")
                if problem is None:
                    return child
            except (TimeoutError, OSError, EOFError, ValueError):
                child.end()
            else:
                child.end()
                self._unfit = str(problem)
                raise UnsupportedOperationError(self._unfit)
        except OSError as error:
            problem = error.strerror
        _log.error("the process that tries grammars does not start: %s", str(problem)[:200])
        raise ModelExecutionError("answers of this model cannot be held to a grammar now")

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
