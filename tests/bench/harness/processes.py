"""Server processes under measurement: start, wait until they answer, count their processor time and memory, stop.

Processor time is that of the whole process tree, from ``/proc/PID/stat``: a server that moves its work to child
processes pays for them here. It counts in ticks of 10 ms, so a window of a second and more is exact to 1 %.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A benchmark cannot be run or its result must not be used; the message says why."""


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tree(pid: int) -> list[int]:
    """``pid`` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields is not None:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        waiting.extend(children.get(one, []))
    return found


def cpu_s(pid: int) -> float:
    """User and system seconds of ``pid`` and its descendants, those that ended and were waited for included."""
    ticks = 0
    for one in tree(pid):
        fields = _stat(one)
        if fields is not None:
            # utime, stime, cutime, cstime: fields 14 to 17 of proc(5), counted here behind the command name.
            ticks += sum(int(value) for value in fields[11:15])
    return ticks / TICKS_PER_S


def memory_bytes(pid: int, field_name: str = "VmRSS") -> int:
    """``VmRSS`` or its high-water mark ``VmHWM``, summed over the process tree."""
    total = 0
    for one in tree(pid):
        try:
            for line in Path(f"/proc/{one}/status").read_text().splitlines():
                if line.startswith(field_name + ":"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def reset_high_water(pid: int) -> None:
    """Let ``VmHWM`` of every process of the tree start again from the present ``VmRSS``."""
    for one in tree(pid):
        Path(f"/proc/{one}/clear_refs").write_text("5")


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Command:
    """How a server is started.

    Attributes:
        argv: the command line; ``{port}`` in an argument or a value of ``env`` is replaced.
        env: added to this process's environment.
        note: its configuration in words, printed with the results.
    """

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/"
    start_limit_s: float = 90.0
    note: str = ""


@dataclass(slots=True)
class Server:
    """A running server: ``port`` on loopback, ``pid`` of its first process, ``log`` with all it printed."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def running(name: str, command: Command, log_dir: Path) -> Iterator[Server]:
    """Start the server, wait until ``ready_path`` answers with a status below 500, stop all of it at the end.

    Raises:
        BenchError: it ended or did not answer within ``start_limit_s``; the message has the end of its log.
    """
    port = free_port()
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"{name.replace(' ', '-').replace('/', '-')}.log"

    def fill(text: str) -> str:
        return text.replace("{port}", str(port)).replace("{port1}", str(port1)).replace("{port2}", str(port2))

    port1, port2 = free_port(), free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [fill(part) for part in command.argv],
            cwd=command.cwd,
            env={**os.environ, **{key: fill(value) for key, value in command.env.items()}},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that every process of the server can be ended by its group
        )
    server = Server(name, port, process, log)
    try:
        _wait_ready(server, command)
        yield server
    finally:
        _stop(process)


def _wait_ready(server: Server, command: Command) -> None:
    limit = time.monotonic() + command.start_limit_s
    while True:
        if server.process.poll() is not None:
            raise BenchError(f"{server.name} ended with {server.process.returncode} at its start:\n{server.log_tail()}")
        if _answers(server.port, command.ready_path):
            return
        if time.monotonic() > limit:
            raise BenchError(f"{server.name} did not answer in {command.start_limit_s:.0f} s:\n{server.log_tail()}")
        time.sleep(0.1)


def _answers(port: int, path: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            head = connection.recv(64)
    except OSError:
        return False
    return head.startswith(b"HTTP/1.1 ") and head[9:10] in b"234"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's process group: ask first, then insist."""
    for number, patience_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        limit = time.monotonic() + patience_s
        with suppress(ProcessLookupError):  # the group is gone
            os.killpg(process.pid, number)
            while time.monotonic() < limit:
                process.poll()  # a leader that nobody waits for keeps its group
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            continue
        return
    raise BenchError(f"process group {process.pid} does not end")
