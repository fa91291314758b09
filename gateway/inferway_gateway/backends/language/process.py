"""An engine in a process of its own, as the gateway holds it: opened, spoken to, and started again when it dies.

What it was writing when it died is lost, and those who waited for it are told. It is started again at once, then after
0.1 s and twice as long each time, up to 5 s, until an answer has come to its end; meanwhile requests are told to come
again.

Nobody knows which of the answers in it killed it, so each death counts against the model, and so does a start that
fails. Some of them in a short time open the breaker: then the process is not even started for a while, since loading a
model is work, and requests are told when to come again. After that one request is let in at a time, until one has come
to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ...core.catalog import Footprint
from ...core.errors import ModelFailingError, ModelLoadError, ModelNotReadyError
from ...core.model_config import GenerationOptions
from ...core.stats import WorkerStats
from ..footprint import MemoryWatch
from ..worker import messages
from ..worker.breaker import Breaker
from ..worker.forks import Fork, ForkError, ForkServer
from ..worker.process import read_status
from . import frames
from .generator import Generator
from .orders import Failure, Order, Piece, read_report, write_order

_log = logging.getLogger(__name__)

_FIRST_BACK_OFF_S: Final = 0.1
_MAX_BACK_OFF_S: Final = 5.0
_END_LIMIT_S: Final = 2.0
_TRIAL_S: Final = 1.0
"""When to come again while another request is on trial."""
_SAID: Final = 500


@dataclass(frozen=True, slots=True)
class Plan:
    """How a process opens its model.

    Attributes:
        options: with ``kv_cache_bytes`` said.
        threads: inside one run.
        breaker_failures: see ``Breaker``; 0 never opens it.
    """

    title: str
    folder: Path
    options: GenerationOptions
    threads: int
    address_space_bytes: int
    load_timeout_s: float = 300.0
    confine: bool = True
    breaker_failures: int = 3


@dataclass(slots=True, eq=False)
class _Process:
    fork: Fork
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    answer: dict[str, Any]
    footprint: Footprint | None

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.fork.pidfd, signal.SIGKILL)

    async def ended(self) -> int:
        """Let go of it; gives its exit code."""
        self.writer.close()
        try:
            async with asyncio.timeout(_END_LIMIT_S):
                return await asyncio.wrap_future(self.fork.ended)
        except TimeoutError:
            self.kill()
            return await asyncio.wrap_future(self.fork.ended)
        finally:
            os.close(self.fork.pidfd)


class ProcessLink:
    """Implements ``Link``.

    Args:
        on_event: told, in words, whenever the process ended by itself, and when the breaker opens and closes.
    """

    def __init__(self, forks: ForkServer, plan: Plan, on_event: Callable[[str, str], None]) -> None:
        self._forks = forks
        self._plan = plan
        self._on_event = on_event
        self.stats = WorkerStats()
        self._breaker = Breaker(plan.breaker_failures)
        self._trial: int | None = None
        """The one request that was let in since the breaker has been half open."""
        self._process: _Process | None = None
        self._generator: Generator | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None else self._process.fork.pid

    @property
    def resident_bytes(self) -> int:
        """Memory that the process has for itself, now."""
        return 0 if self._process is None else read_status(self._process.fork.pid).get("RssAnon", 0)

    async def open(self) -> tuple[int, Footprint | None]:
        """Start it; gives the tokens of its context, and its memory where that is known.

        Raises:
            ModelLoadError: it did not start, refused its model, died of it, or took too long.
        """
        self._process = await self._start()
        self.stats.processes = 1
        self.stats.layers = dict.fromkeys(self._process.answer.get("layers", ()), True)
        return int(self._process.answer["context_length"]), self._process.footprint

    def attend(self, generator: Generator) -> None:
        """From now on the generator hears what the process says, and of its end."""
        self._generator = generator
        self._task = asyncio.create_task(self._supervise(), name="inferway-language")

    # -- Link ----------------------------------------------------------------------------------------------------------

    def problem(self) -> str | None:
        if self._breaker.retry_after_s(time.monotonic()) > 0:
            return "the process that writes its answers ended too often and is held back"
        return None if self._process is not None else "the process that writes its answers starts again"

    def submit(self, order: Order) -> None:
        now = time.monotonic()
        state = self._breaker.state(now)
        if state == "open" or (state == "half_open" and self._trial is not None):
            raise ModelFailingError(
                "the process that writes the answers ended too often and is held back",
                retry_after_s=max(self._breaker.retry_after_s(now), _TRIAL_S),
            )
        if self._process is None:
            raise ModelNotReadyError("the process that writes the answers starts again", retry_after_s=1.0)
        if state == "half_open":
            self._trial = order.number
        self._process.writer.write(frames.pack(frames.ORDER + write_order(order)))

    def cancel(self, number: int) -> None:
        if number == self._trial:
            self._trial = None
        if self._process is not None:
            self._process.writer.write(frames.pack(frames.CANCEL + frames.NUMBER.pack(number)))

    async def close(self) -> None:
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        process, self._process = self._process, None
        self.stats.processes = 0
        if process is not None:
            await process.ended()
        if self._generator is not None:
            self._generator.end()

    # -- the process ---------------------------------------------------------------------------------------------------

    async def _start(self) -> _Process:
        plan = self._plan
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                fork, memory = await asyncio.to_thread(self._spawn, theirs)
        except BaseException:
            ours.close()
            raise
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        process = _Process(fork, reader, writer, {}, None)
        try:
            order = {
                "options": asdict(plan.options),
                "threads": plan.threads,
                "address_space_bytes": plan.address_space_bytes,
                "confine": plan.confine,
            }
            writer.write(frames.pack(json.dumps(order).encode()))
            try:
                async with asyncio.timeout(plan.load_timeout_s):
                    answer = json.loads(await frames.read(reader))
            except TimeoutError:
                raise ModelLoadError(f"loading took longer than {plan.load_timeout_s:g} s") from None
            except asyncio.IncompleteReadError:
                raise ModelLoadError("the process that loaded it died") from None
            if not isinstance(answer, dict) or not isinstance(answer.get("context_length"), int):
                said = answer.get("error") if isinstance(answer, dict) else None
                raise ModelLoadError(messages.clean_text(str(said).encode())[:_SAID])
            process.answer = answer
            process.footprint = _footprint(memory, plan.options.kv_cache_bytes or 0)
        except BaseException:
            process.kill()
            await asyncio.shield(process.ended())
            raise
        finally:
            if memory is not None:
                memory.close()
        return process

    def _spawn(self, stream: socket.socket) -> tuple[Fork, MemoryWatch | None]:
        ours, theirs = messages.socket_pair()
        with ours, theirs:
            try:
                fork = self._forks.spawn(self._plan.title, theirs)
                memory = None
                with contextlib.suppress(OSError):
                    memory = MemoryWatch(fork.pid)  # now: once it is locked in, nobody may look
                folder = os.open(self._plan.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    messages.send_fds(ours, bytes((messages.SPEAK,)), [stream.fileno(), folder])
                finally:
                    os.close(folder)
            except ForkError as error:
                raise ModelLoadError(str(error)) from None
            except OSError as error:
                raise ModelLoadError(error.strerror or "the process could not be spoken to") from None
        return fork, memory

    async def _supervise(self) -> None:
        failures = 0
        while True:
            process = self._process
            assert process is not None
            served = False
            why = "it ended"
            try:
                served = await self._listen(process)
            except ValueError as error:
                why = f"it said what no engine says: {error}"
                process.kill()
            except OSError as error:
                why = error.strerror or "its socket broke"
                process.kill()
            self._process = self._trial = None
            self.stats.processes = 0
            assert self._generator is not None
            self._generator.lose()
            code = await process.ended()
            self.stats.crashes += 1
            failures = 0 if served else failures
            detail = f"{why}, {'signal' if code < 0 else 'exit code'} {abs(code)}"
            _log.error("%s: %s; it is started again", self._plan.title, detail)
            self._on_event("worker_crashed", detail)
            self._failed(f"its process ended too often, at last: {detail}")
            while self._process is None:
                back_off_s = min(_FIRST_BACK_OFF_S * 2 ** (failures - 1), _MAX_BACK_OFF_S) if failures else 0.0
                await asyncio.sleep(max(back_off_s, self._breaker.retry_after_s(time.monotonic())))
                failures += 1
                self.stats.restarts += 1
                try:
                    self._process = await self._start()
                    self.stats.processes = 1
                    self.stats.breaker = self._breaker.state(time.monotonic())
                except ModelLoadError as error:
                    _log.error("%s could not be started again: %s", self._plan.title, error.message)
                    self._failed(f"its process did not start again: {error.message}")

    def _failed(self, why: str) -> None:
        now = time.monotonic()
        if self._breaker.failed(now):
            wait_s = self._breaker.retry_after_s(now)
            _log.error("%s: %s; the breaker is open for %.1f s", self._plan.title, why, wait_s)
            self._on_event("breaker_opened", why)
        self.stats.breaker = self._breaker.state(now)

    def _heard(self, piece: Piece | Failure) -> bool:
        """Look at what became of a request; whether its answer came to its end."""
        ended = isinstance(piece, Piece) and piece.finish is not None
        if piece.number == self._trial and (ended or isinstance(piece, Failure)):
            self._trial = None
        if ended and self._breaker.succeeded(time.monotonic()):
            self.stats.breaker = "closed"
            _log.info("%s: an answer was complete, the breaker closed", self._plan.title)
            self._on_event("breaker_closed", "an answer was complete")
        return ended

    async def _listen(self, process: _Process) -> bool:
        """Pass on what it says until it is gone; whether any answer came to its end.

        Raises:
            ValueError: it said what no engine says.
        """
        generator = self._generator
        assert generator is not None
        served = False
        while True:
            try:
                raw = await frames.read(process.reader)
            except asyncio.IncompleteReadError:
                return served
            report = read_report(raw, generator.vocabulary_size)
            for piece in report.pieces:
                served = self._heard(piece) or served
            generator.take(report)


def _footprint(memory: MemoryWatch | None, kv_bytes: int) -> Footprint | None:
    if memory is None:
        return None
    try:
        use = memory.read()
    except OSError:
        return None
    return Footprint(use.proportional, use.proportional + use.peak - use.resident + kv_bytes)
