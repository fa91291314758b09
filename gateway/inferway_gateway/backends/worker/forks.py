"""The gateway's side of the fork server: started, asked for workers, and started again when it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from . import messages

_log = logging.getLogger(__name__)

START_LIMIT_S: Final = 30.0
"""Importing numpy and ONNX Runtime takes 0.1 s, or seconds from a cold disk."""
_ANSWER_LIMIT_S: Final = 10.0
"""A fork takes milliseconds. A server that does not say in this time that it forked is stopped or stuck."""
_RESTART_S: Final = (0.0, 0.1, 0.5, 1.0, 5.0)
_MODULE: Final = "inferway_gateway.backends.worker.forkserver"


class ForkError(Exception):
    """No worker could be started."""


class WorkerEndedError(ForkError):
    """The worker that something was asked of is gone."""


@dataclass(slots=True)
class Fork:
    """A process that was forked.

    Attributes:
        pid: for reading /proc; signals go through ``pidfd``, which never means another process.
        ended: its exit code, negative for a signal, once it is known.
    """

    pid: int
    pidfd: int
    ended: Future[int] = field(default_factory=Future)


class ForkServer:
    """Starts worker processes. Safe to use from any thread.

    The server is started when it is first needed: a gateway without workers does not pay for one. One thread of the
    gateway starts it, reads what it says and starts it again when it has ended, with its workers. It is always the same
    thread, because the kernel tells the server of the death of the thread that started it, not of the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._asked: dict[int, Future[Fork]] = {}
        self._forks: dict[int, Fork] = {}
        self._serial = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = False
        """The server that there is has said something."""
        self._closed = threading.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="inferway-forks", daemon=True)
        self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server and every worker. Idempotent."""
        self._closed.set()
        with self._lock:
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join()

    def spawn(self, title: str, control: socket.socket) -> Fork:
        """Fork a worker.

        Args:
            title: what ``ps`` shows of it.
            control: the worker's end of its control socket; the caller closes its own copy.
        Raises:
            ForkError: the system has no room for a process, or the server does not answer.
        """
        answer: Future[Fork] = Future()
        with self._lock:
            if not self._started and not self._closed.is_set():
                self._started = True
                self._thread.start()
        if not self._up.wait(START_LIMIT_S):
            raise ForkError("the fork server does not start")
        with self._lock:
            self._serial = number = (self._serial + 1) & 0xFFFFFFFF
            self._asked[number] = answer
            message = messages.SERVER_MESSAGE.pack(messages.SPAWN, number, 0) + title.encode()[:256]
            try:
                if self._socket is None:
                    raise OSError
                messages.send_fds(self._socket, message, [control.fileno()])
            except OSError:
                del self._asked[number]
                raise ForkError("the fork server has just ended") from None
        try:
            # The first one is waited for while it imports everything.
            return answer.result(_ANSWER_LIMIT_S if self._answers else START_LIMIT_S)
        except TimeoutError:
            self._replace()
            raise ForkError("the fork server does not answer") from None
        finally:
            with self._lock:
                self._asked.pop(number, None)

    def _replace(self) -> None:
        """End a server that hangs. Its workers end with it, and are started again by whoever has them."""
        with self._lock:
            process = self._process
            if process is not None and process.poll() is None:
                _log.error("the fork server of the workers does not answer; it is killed")
                process.kill()

    # -- on the thread -------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        failures = 0
        while not self._closed.is_set():
            try:
                ours, theirs = messages.socket_pair()
            except OSError as error:
                _log.error("the fork server of the workers cannot be started: %s", error.strerror)
                self._closed.wait(_RESTART_S[min(failures, len(_RESTART_S) - 1)])
                failures = max(failures + 1, 1)
                continue
            with ours:
                process = self._start(theirs)
                if process is not None:
                    with self._lock:
                        self._socket = ours
                        self._process = process
                        self._answers = False
                        if self._closed.is_set():
                            ours.shutdown(socket.SHUT_RDWR)
                    self._up.set()
                    if self._listen(ours):
                        failures = 0
                    self._up.clear()
                    with self._lock:
                        self._socket = self._process = None
            if process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                process.kill()
                process.wait()
            self._all_ended()
            if not self._closed.is_set():
                code = "at once" if process is None else f"with {process.returncode}"
                _log.error("the fork server of the workers ended %s; it is started again", code)
                self._closed.wait(_RESTART_S[min(failures, len(_RESTART_S) - 1)])
                failures += 1

    def _start(self, theirs: socket.socket) -> subprocess.Popen[bytes] | None:
        # Nothing of the gateway's environment: it may hold secrets, and a model runs in a copy of this process.
        root = Path(__file__).parents[3]
        environment = {
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LC_CTYPE": "C.UTF-8",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "4",
            "ORT_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-P", "-s", "-m", _MODULE, str(theirs.fileno()), str(os.getpid())]
        try:
            return subprocess.Popen(  # noqa: S603 - the same interpreter, nothing of it from outside
                command,
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError:
            _log.exception("the fork server of the workers cannot be started")
            return None
        finally:
            theirs.close()

    def _listen(self, ours: socket.socket) -> bool:
        """Read until the server is gone; returns whether it ever did anything."""
        served = False
        while True:
            try:
                message, fds, _ = messages.receive_some(ours)
            except OSError:
                return served
            if not message:
                return served
            served = True
            kind, number, value = messages.SERVER_MESSAGE.unpack(message)
            with self._lock:
                self._answers = True
                answer = self._asked.pop(number, None)
                ended = self._forks.pop(number, None) if kind == messages.ENDED else None
                if kind == messages.SPAWNED and fds:
                    fork = Fork(value, fds[0])
                    self._forks[number] = fork
            if ended is not None:
                ended.ended.set_result(value)
            elif kind == messages.FAILED and answer is not None:
                answer.set_exception(ForkError(f"no process can be started: {os.strerror(value)}"))
            elif kind == messages.SPAWNED and not fds:
                # The worker ends with its control socket, which whoever asked for it closes now.
                if answer is not None:
                    answer.set_exception(ForkError("the gateway has no file descriptor left"))
            elif kind == messages.SPAWNED and answer is not None:
                answer.set_result(fork)
            elif kind == messages.SPAWNED:
                os.close(fds[0])  # whoever asked has given up; the worker ends with its control socket

    def _all_ended(self) -> None:
        """The workers ended with their server."""
        with self._lock:
            asked, self._asked = list(self._asked.values()), {}
            forks, self._forks = list(self._forks.values()), {}
        for answer in asked:
            answer.set_exception(ForkError("the fork server has just ended"))
        for fork in forks:
            fork.ended.set_result(-9)
