"""One worker process as the gateway holds it: opened, given lanes, measured, limited, ended."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from ...core.catalog import Footprint
from ...core.errors import ModelLoadError
from ...core.tensors import Signature
from ..footprint import MemoryWatch
from . import messages
from .arena import Arena
from .description import REPORT_BYTES, Order, Report, write_order
from .forks import ForkError, ForkServer, WorkerEndedError
from .lane import Lane
from .report import read_report

_log = logging.getLogger(__name__)

CLOSE_LIMIT_S: Final = 1.0
SPARE_BYTES: Final = 512 << 20
"""What a warm worker may map beyond twice its peak: runs of other shapes, arenas, the stacks of its threads."""


class WorkerProcess:
    """A worker from its fork to its end.

    Args:
        title: for ``ps``.
        on_end: called once, on any thread, when the process is gone, with what is known of why.
    Raises:
        ForkError: there is none.
    """

    def __init__(self, forks: ForkServer, title: str, on_end: Callable[[WorkerProcess], None]) -> None:
        ours, theirs = messages.socket_pair()
        try:
            self._fork = forks.spawn(title, theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._control = ours
        self._lock = threading.Lock()
        self._lanes: list[Lane] = []
        self._fd_closed = False
        self.why = ""
        """Why it was killed, where the gateway did that."""
        self.warm_bytes = 0
        """Memory of its own once it was warm."""
        self.retired = False
        """Another one has its place; it ends with its last user."""
        self.users = 0
        """Runs that hold one of its lanes; guarded by the session's lock."""
        # Now, for once it is locked in only root may look.
        self._memory: MemoryWatch | None = None
        self._memory_lock = threading.Lock()
        with contextlib.suppress(OSError):
            self._memory = MemoryWatch(self.pid)
        self._fork.ended.add_done_callback(lambda _: on_end(self))

    @property
    def pid(self) -> int:
        return self._fork.pid

    @property
    def gone(self) -> bool:
        return self._fork.ended.done()

    def cause(self) -> str:
        """Why it ended, in words, once that is known."""
        if self.why:
            return self.why
        try:
            code = self._fork.ended.result(CLOSE_LIMIT_S)
        except TimeoutError:
            return "it closed its socket"
        if code >= 0:
            return f"exit code {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    @property
    def crashed(self) -> bool:
        """It ended by itself. False for one that is there, and one that the gateway, its operator or the system
        killed: nobody but others sends SIGKILL and SIGTERM."""
        return not self.why and self.gone and self._fork.ended.result() not in (-signal.SIGKILL, -signal.SIGTERM)

    def open(self, order: Order, fds: Sequence[int], limit_s: float) -> Report:
        """Have it open a model; blocks.

        Args:
            fds: the model's file or directory, then ``order.files``.
            limit_s: how long that may take.
        Raises:
            ModelLoadError: it refused the model, died of it or took too long.
        """
        raw = write_order(order)
        if len(raw) > REPORT_BYTES:
            raise ModelLoadError("its configuration is larger than 4 MiB")
        paper = Arena.create(REPORT_BYTES)
        try:
            paper.memory[: len(raw)] = np.frombuffer(raw, np.uint8)
            try:
                message = messages.NUMBER_MESSAGE.pack(messages.LOAD, len(raw))
                messages.send_fds(self._control, message, [paper.fd, *fds])
                answer = self._answer(limit_s)
            except OSError:
                answer = b""
            if not answer:
                raise ModelLoadError(f"the process that loaded it died: {self.cause()}")
            kind = answer[0]
            if kind == messages.LOADED and len(answer) == messages.NUMBER_MESSAGE.size:
                size = messages.NUMBER_MESSAGE.unpack(answer)[1]
                if size <= paper.size:
                    return read_report(paper.memory[:size].tobytes())
            if kind == messages.ERROR and len(answer) > 2:
                raise ModelLoadError(messages.clean_text(answer[2:]))
            raise ModelLoadError("the process that loaded it gave no proper answer")
        except ModelLoadError:
            self.kill("it could not load its model")
            raise
        finally:
            paper.forget_fd()

    def _answer(self, limit_s: float) -> bytes:
        """The next message over the control socket.

        Raises:
            ModelLoadError: it does not come in time.
        """
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if not poll.poll(limit_s * 1e3):
            raise ModelLoadError(f"loading took longer than the {limit_s:g} s that it may take")
        return self._control.recv(messages.CONTROL_BYTES)

    def warm_up(self, limit_s: float) -> Footprint | None:
        """Let it run its largest batch, and read what memory that takes; None where it cannot be measured."""
        with self._memory_lock:
            if self._memory is not None:
                self._memory.reset_peak()  # trying options took memory that serving does not
        try:
            self._control.send(messages.NUMBER_MESSAGE.pack(messages.WARM, 0))
            if not self._answer(limit_s):
                return None
        except (OSError, ModelLoadError):
            return None
        return self.measure()

    def measure(self) -> Footprint | None:
        """Its proportional set size now, and the most that it was."""
        with self._memory_lock, contextlib.suppress(OSError):
            if self._memory is not None:
                use = self._memory.read()
                self.warm_bytes = use.anonymous
                return Footprint(use.proportional, use.proportional + use.peak - use.resident)
        return None

    def limit(self, peak_bytes: int) -> None:
        """Bound what it may map from now on: what it has, its peak once more, and ``SPARE_BYTES``."""
        size = read_status(self.pid).get("VmSize", 0)
        if not size:
            return
        bound = size + 2 * peak_bytes + SPARE_BYTES
        with contextlib.suppress(OSError, ValueError):
            _, hard = resource.prlimit(self.pid, resource.RLIMIT_AS)
            if hard != resource.RLIM_INFINITY:
                bound = min(bound, hard)
            resource.prlimit(self.pid, resource.RLIMIT_AS, (bound, bound))

    @property
    def own_bytes(self) -> int:
        """Memory that is neither shared with the fork server nor with the gateway; 0 where it is gone."""
        return read_status(self.pid).get("RssAnon", 0)

    def add_lane(
        self,
        signature: Signature,
        *,
        on_loop: bool,
        stop: Callable[[Lane, int], None],
        lost: Callable[[str], None],
        answer_limit_bytes: int,
    ) -> Lane:
        """Another lane.

        Raises:
            ForkError: the worker is gone, or no descriptor is left.
        """
        try:
            ours, theirs = messages.socket_pair()
        except OSError as error:
            raise ForkError(error.strerror) from error
        with self._lock:
            number = len(self._lanes)
            lane = Lane(
                number,
                self,
                ours,
                signature,
                on_loop=on_loop,
                stop=stop,
                lost=lost,
                answer_limit_bytes=answer_limit_bytes,
            )
            try:
                message = messages.NUMBER_MESSAGE.pack(messages.LANE, number)
                messages.send_fds(self._control, message, [theirs.fileno()])
            except OSError as error:
                lane.close()
                if isinstance(error, ConnectionError):
                    raise WorkerEndedError("the worker has just ended") from error
                raise ForkError(f"the worker cannot be told of a lane: {error.strerror}") from error
            finally:
                theirs.close()
            self._lanes.append(lane)
        return lane

    def terminate(self, lane: Lane, run: int) -> None:
        """Ask it to end a run between two nodes. From any thread."""
        message = messages.TERMINATE_MESSAGE.pack(messages.TERMINATE, lane.number, run)
        with contextlib.suppress(OSError):
            self._control.send(message, socket.MSG_DONTWAIT)

    def kill(self, why: str) -> None:
        """End it now, with SIGKILL. From any thread."""
        with self._lock:
            self.why = self.why or why
            if not self._fd_closed:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._fork.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """End it and let go of everything; waits a second for it to go by itself. Idempotent."""
        with self._lock:
            lanes, self._lanes = self._lanes, []
            closed, self._fd_closed = self._fd_closed, True
        for lane in lanes:
            if lane.since is None:  # whose run is being answered right now is closed by who answers it
                lane.close()
        if closed:
            return
        with self._memory_lock:
            if self._memory is not None:
                self._memory.close()
                self._memory = None
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        try:
            self._fork.ended.result(CLOSE_LIMIT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fork.pidfd, signal.SIGKILL)
        os.close(self._fork.pidfd)


def read_status(pid: int) -> dict[str, int]:
    """Memory figures of /proc/PID/status in bytes; empty where the process is gone."""
    found: dict[str, int] = {}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value[:-3]) << 10
    return found
