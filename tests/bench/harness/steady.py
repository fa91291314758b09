"""Requests at a fixed rate, from a process of its own: ``python -m harness.steady PORT RATE < request > answers``.

One thread, plain sockets, one request written beforehand: some 0.1 ms of processor time for each, so that the rate is
that of the clock and not of a client which shares the processors with the server. A request is sent when its time has
come, whether or not those before it were answered, on a connection that is idle. It ends when stdin does, and
writes one JSON object:

``answers``: lists of [sent, answered, status, version, first number of the first output or None], on CLOCK_MONOTONIC;
``broken``: connections that ended with a request on them; ``late``: requests that were sent 50 ms after their time or
later; ``left_out``: those for which no connection was idle.
"""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harness.processes import BenchError

CONNECTIONS: Final = 200
_LATE_S: Final = 0.05
_LAST_WAIT_S: Final = 30.0


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    sent_at: float = 0.0
    received: bytearray = field(default_factory=bytearray)


class Steady:
    """The process, as the benchmark holds it; ``with`` ends it."""

    def __init__(self, port: int, path: str, headers: Mapping[str, str], body: bytes, rate: int) -> None:
        lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        request = "\r\n".join([*lines, "", ""]).encode() + body
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.steady", str(port), str(rate), str(len(request))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        assert self._process.stdin is not None
        self._process.stdin.write(request)
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """Send no more; gives what came of all, see the module."""
        written, _ = self._process.communicate(timeout=2 * _LAST_WAIT_S)
        if self._process.returncode:
            raise BenchError(f"the load generator ended with {self._process.returncode}")
        found: dict[str, Any] = json.loads(written)
        return found

    def __enter__(self) -> Steady:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class _Load:
    def __init__(self, port: int, rate: int, request: bytes) -> None:
        self._port = port
        self._rate = rate
        self._request = request
        self._selector = selectors.DefaultSelector()
        self._idle: deque[_Connection] = deque()
        self._busy = 0
        self.answers: list[tuple[float, float, int, int, float | None]] = []
        self.broken = self.late = self.left_out = 0

    def run(self, ended: threading.Event) -> None:
        for _ in range(CONNECTIONS):
            self._connect()
        due = time.monotonic()
        while not ended.is_set():
            self._read(max(due - time.monotonic(), 0))
            now = time.monotonic()
            while due <= now:
                self._send(now, due)
                due += 1 / self._rate
        until = time.monotonic() + _LAST_WAIT_S
        while self._busy and time.monotonic() < until:
            self._read(0.1)
        self.broken += self._busy

    def _connect(self) -> None:
        made = socket.create_connection(("127.0.0.1", self._port))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setblocking(False)
        connection = _Connection(made)
        self._selector.register(made, selectors.EVENT_READ, connection)
        self._idle.append(connection)

    def _send(self, now: float, due: float) -> None:
        if not self._idle:
            self.left_out += 1
            return
        connection = self._idle.pop()
        self.late += now - due >= _LATE_S
        connection.sent_at = time.monotonic()
        connection.socket.send(self._request)  # smaller than any socket's buffer, and its buffer is empty
        self._busy += 1

    def _read(self, wait_s: float) -> None:
        for key, _ in self._selector.select(wait_s):
            connection: _Connection = key.data
            try:
                data = connection.socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                self._end(connection)
                continue
            connection.received += data
            self._take(connection)

    def _end(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection in self._idle:
            self._idle.remove(connection)
        else:
            self._busy -= 1
            self.broken += 1
        self._connect()

    def _take(self, connection: _Connection) -> None:
        head, found, body = bytes(connection.received).partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if len(body) < int(headers.get("content-length", 0)):
            return
        status = int(first.split(" ")[1])
        number = float(json.loads(body)["outputs"][0]["data"][0]) if status == 200 else None
        version = int(headers.get("inferway-model-version", 0))
        self.answers.append((connection.sent_at, time.monotonic(), status, version, number))
        connection.received.clear()
        self._busy -= 1
        self._idle.append(connection)


def main() -> None:
    port, rate, length = map(int, sys.argv[1:])
    load = _Load(port, rate, sys.stdin.buffer.read(length))
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    load.run(ended)
    json.dump(
        {"answers": load.answers, "broken": load.broken, "late": load.late, "left_out": load.left_out}, sys.stdout
    )


if __name__ == "__main__":
    main()
