"""Programs of ours that do somebody else's work in processes of their own, and are asked over a socket.

Questions and answers are frames of bytes, one answer to each question; the program ends when the socket closes. Whoever
waits too long ends it, which is what these processes are for: a thread cannot be ended.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from .footprint import MemoryUse, MemoryWatch
from .language import frames

START_LIMIT_S: Final = 30.0
CPU_LIMIT_S: Final = 60


class Program:
    """A running program. Used by one thread at a time.

    Args:
        module: run with the socket's number as its argument; it calls ``questions``.
    Raises:
        OSError: the system has no room for a process.
    """

    def __init__(self, module: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Without our environment, where secrets may be; -P: nothing is imported from the working directory.
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what is printed of a panic may hold a caller's text
                pass_fds=(theirs.fileno(),),
                env={
                    "PYTHONPATH": str(Path(__file__).parents[2]),
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "LC_ALL": "C.UTF-8",
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "RAYON_NUM_THREADS": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                    "MALLOC_ARENA_MAX": "1",
                },
            )
        self._line = ours

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def memory(self) -> MemoryUse | None:
        """What the process takes now; None where it is gone, or the system does not tell."""
        with suppress(OSError), MemoryWatch(self._process.pid) as watch:
            return watch.read()
        return None

    def ask(self, *message: bytes, limit_s: float) -> bytes:
        """Send a question, in parts that become one, and wait for its answer.

        Raises:
            TimeoutError: there was none within the time.
            EOFError, OSError: the process has ended.
        """
        deadline = time.monotonic() + limit_s
        self._line.settimeout(limit_s)
        self._line.sendall(frames.pack(b"".join(message)))
        (length,) = frames.LENGTH.unpack(self._read(frames.LENGTH.size, deadline))
        if length > frames.MAX_FRAME_BYTES:
            raise EOFError("an answer beyond measure")
        return self._read(length, deadline)

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
        """End the process. Idempotent."""
        self._line.close()
        self._process.kill()
        self._process.wait()


def questions(stream: socket.socket) -> Iterator[bytes]:
    """In the program: what it is asked, until the gateway is gone.

    Each question has a processor's time, after which the kernel ends the program: a gateway that was killed cannot.
    """
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    while (asked := frames.receive(stream)) is not None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        granted = int(usage.ru_utime + usage.ru_stime) + CPU_LIMIT_S
        resource.setrlimit(resource.RLIMIT_CPU, (granted, most))
        yield asked


def answer(stream: socket.socket, body: bytes) -> None:
    stream.sendall(frames.pack(body))


def confine(memory_bytes: int) -> None:
    """In the program: take from the process what its work does not need, free memory first.

    Args:
        memory_bytes: of address space, beyond what the process has now.
    """
    gc.collect()
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # what was read may have been many times larger than what is left of it
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
