"""Conversations to prompts: chat templates, rendered where they can do no harm, and text that stays text.

**Time and memory.** A template runs in a process of its own (``template_child``) that is ended when a second is over.
At most one process at a time works on one template, so that one that loops holds up nobody's but its own callers.

**Text stays text.** A name such as ``<|im_end|>`` in a message must not become that token: the model would take what
follows for another's words. So such names are taken out before the template is rendered, marks that nobody can guess
stand for them, and in the prompt each is encoded as the plain characters it is.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from ...core.errors import InvalidParameterError, ShuttingDownError
from ...core.generation import TextGenerator

RENDER_LIMIT_S: Final = 1.0
TEXT_LIMIT_CHARACTERS: Final = 8 * 1024 * 1024
PROCESSES: Final = 3
_START_LIMIT_S: Final = 30.0
_PROGRAM: Final = Path(__file__).with_name("template_child.py")
_MARK: Final = "\ue000"
_MARK_END: Final = "\ue001"


class _Child:
    """A process that renders. Used by one thread at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Without our environment, where secrets may be; -P: nothing is imported from the working directory.
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", str(_PROGRAM), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={"LC_ALL": "C.UTF-8"},
            )
        self._line = ours
        try:
            self._read(1, time.monotonic() + _START_LIMIT_S)
        except (OSError, EOFError):
            self.end()
            raise

    def ask(self, message: bytes, limit_s: float) -> dict[str, Any]:
        """Raises ``TimeoutError`` where the time is over and ``EOFError`` or ``OSError`` where the process ended."""
        deadline = time.monotonic() + limit_s
        self._line.settimeout(limit_s)
        self._line.sendall(len(message).to_bytes(4, "big") + message)
        length = int.from_bytes(self._read(4, deadline), "big")
        answer: dict[str, Any] = json.loads(self._read(length, deadline))
        return answer

    def _read(self, size: int, deadline: float) -> bytes:
        got = bytearray()
        while len(got) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._line.settimeout(left)
            piece = self._line.recv(min(size - len(got), 1 << 20))
            if not piece:
                raise EOFError
            got += piece
        return bytes(got)

    def end(self) -> None:
        self._line.close()
        self._process.kill()
        self._process.wait()


class TemplateRenderer:
    """Renders chat templates. Close it in the end; processes are started when they are needed first.

    Args:
        limit_s: time that one rendering may take.
    """

    def __init__(self, limit_s: float = RENDER_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._threads = ThreadPoolExecutor(PROCESSES, "inferway-template")
        self._idle: SimpleQueue[_Child | None] = SimpleQueue()
        for _ in range(PROCESSES):
            self._idle.put(None)
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._closed = False

    async def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text of a template.

        Raises:
            InvalidParameterError: it refuses the messages, fails, or takes too much time or memory.
            ShuttingDownError: this was closed.
        """
        message = json.dumps({"source": source, "variables": variables, "limit": TEXT_LIMIT_CHARACTERS}).encode()
        lock, users = self._locks.get(source) or (asyncio.Lock(), 0)
        self._locks[source] = lock, users + 1
        try:
            async with lock:
                if self._closed:
                    raise ShuttingDownError("the gateway shuts down")
                answer = await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, message)
        finally:
            users = self._locks[source][1] - 1
            if users:
                self._locks[source] = lock, users
            else:
                del self._locks[source]
        error = answer.get("error")
        if error is not None:
            words = (
                f"the chat template refuses the messages: {error}" if answer["said"] else f"the chat template: {error}"
            )
            raise InvalidParameterError(f"messages: {words}", "messages")
        text: str = answer["text"]
        return text

    def _ask(self, message: bytes) -> dict[str, Any]:
        child = self._idle.get()
        try:
            if child is None:
                child = _Child()
            return child.ask(message, self._limit_s)
        except TimeoutError:
            _end(child)
            child = None
            return {"error": f"it did not end within {self._limit_s:g} s", "said": False}
        except (OSError, EOFError, ValueError):
            _end(child)
            child = None
            return {"error": "its process ended before it did", "said": False}
        finally:
            self._idle.put(child)

    async def close(self) -> None:
        """End the processes; what is being rendered ends within its limit."""
        self._closed = True
        await asyncio.to_thread(self._threads.shutdown)
        while not self._idle.empty():
            _end(self._idle.get())


def _end(child: _Child | None) -> None:
    if child is not None:
        with suppress(OSError):
            child.end()


class Guarded:
    """Keeps names of special tokens in a caller's text from becoming those tokens.

    Args:
        names: of the special tokens.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._pattern = _alternation(tuple(sorted(names, key=len, reverse=True)))
        self._nonce = secrets.token_hex(8)
        self._taken: list[str] = []

    def text(self, text: str) -> str:
        """The text with marks in place of such names. Marks of an attacker's making stay text as well."""
        text = text.replace(_MARK, "\ufffd") if _MARK in text else text
        if self._pattern is None:
            return text
        return self._pattern.sub(self._take, text)

    def value(self, value: Any) -> Any:
        """The same for every text in parsed JSON, names of members too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(name): self.value(member) for name, member in value.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return value

    def _take(self, match: re.Match[str]) -> str:
        self._taken.append(match[0])
        return f"{_MARK}{self._nonce}{len(self._taken) - 1}{_MARK_END}"

    async def encode(self, generator: TextGenerator, prompt: str) -> list[int]:
        """Token ids of a rendered prompt, in which only the template's own special tokens are such."""
        if not self._taken:
            return await generator.encode(prompt)
        parts = re.split(f"{_MARK}{self._nonce}([0-9]+){_MARK_END}", prompt)
        # All at once, and each name once: there may be a hundred thousand of them.
        names = sorted(set(self._taken))
        plain = dict(zip(names, await generator.encode_all(names, special=False), strict=True))
        own = await generator.encode_all(parts[::2])
        tokens = own[0]
        for mark, ids in zip(parts[1::2], own[1:], strict=True):
            tokens += plain[self._taken[int(mark)]]
            tokens += ids
        return tokens


@lru_cache(64)
def _alternation(names: Sequence[str]) -> re.Pattern[str] | None:
    named = [re.escape(name) for name in names if name]
    return re.compile("|".join(named)) if named else None
