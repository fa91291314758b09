"""Load: wrk for throughput and latency, one plain socket for single answers.

wrk is a C program that needs 4 to 6 µs of processor time for a small request, so that on a small machine the server and
not the client is what is measured. It keeps ``connections`` requests in flight and sends the next when one is answered.
"""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.processes import BenchError, Server, cpu_s

LUA = Path(__file__).with_name("load.lua")


@dataclass(frozen=True, slots=True)
class Job:
    """What is sent: one method and path, and one or several bodies in turn, each with headers of its own if need be."""

    path: str
    bodies: Sequence[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    own_headers: Sequence[Mapping[str, str]] = ()
    method: str = "POST"

    def headers_of(self, index: int) -> dict[str, str]:
        return {**self.headers, **(self.own_headers[index] if self.own_headers else {})}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One window. Latencies in µs as the client saw them; ``cpu_us`` of the server's processes for each request."""

    requests: int
    duration_s: float
    per_s: float
    cpu_us: float
    client_cpu_us: float
    cores: float
    p50_us: float
    p99_us: float
    max_us: float


def require_wrk() -> None:
    if shutil.which("wrk") is None:
        raise BenchError("wrk is not installed; on Debian: apt-get install wrk")


def wrk(server: Server, job: Job, *, connections: int, seconds: float, threads: int = 1) -> Measurement:
    """Run wrk against ``server`` for ``seconds`` (whole seconds, at least 1).

    Raises:
        BenchError: any answer had a status of 400 and more, or any connection failed: the window counts for nothing.
    """
    with tempfile.TemporaryDirectory(prefix="inferway-bench-") as folder:
        description = _describe(job, Path(folder))
        command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        command += ["--latency", "-s", str(LUA), f"http://127.0.0.1:{server.port}", "--", str(description)]
        own_before, before = _children_s(), cpu_s(server.pid)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after, own_after = cpu_s(server.pid), _children_s()
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise BenchError(f"wrk failed against {server.name}: {done.stdout}{done.stderr}")
    seen = json.loads(lines[-1])
    failures = {name: seen[name] for name in ("bad_status", "connect", "read", "write", "timeout") if seen[name]}
    if failures or not seen["requests"]:
        raise BenchError(
            f"{server.name}: {failures or 'no answer'} in {seen['requests']} requests; "
            f"its log ends:\n{server.log_tail()}"
        )
    requests, duration_s = seen["requests"], seen["duration_us"] / 1e6
    return Measurement(
        requests=requests,
        duration_s=duration_s,
        per_s=requests / duration_s,
        cpu_us=(after - before) / requests * 1e6,
        client_cpu_us=(own_after - own_before) / requests * 1e6,
        cores=(after - before) / duration_s,
        p50_us=seen["p50_us"],
        p99_us=seen["p99_us"],
        max_us=seen["max_us"],
    )


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _describe(job: Job, folder: Path) -> Path:
    names = []
    for index, body in enumerate(job.bodies):
        file = folder / f"body-{index}"
        file.write_bytes(body)
        names.append(_quote(str(file)))
    own = ", ".join(_lua_table(headers) for headers in job.own_headers)
    text = (
        f"return {{method = {_quote(job.method)}, path = {_quote(job.path)}, headers = {_lua_table(job.headers)}, "
        f"bodies = {{{', '.join(names)}}}, own_headers = {{{own}}}}}\n"
    )
    description = folder / "job.lua"
    description.write_text(text)
    return description


def _lua_table(values: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"[{_quote(key)}] = {_quote(value)}" for key, value in values.items()) + "}"


def _quote(text: str) -> str:
    return json.dumps(text)  # for printable ASCII a JSON string is a Lua string


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """One keep-alive connection that sends prepared bytes and reads answers that have a Content-Length.

    It exists because a general HTTP client costs more than the servers measured here: a round trip costs it about
    10 µs, and a large body is received into one buffer that is made before.
    """

    def __init__(self, port: int, timeout_s: float = 60.0) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._room = bytearray(1 << 16)

    def close(self) -> None:
        self._socket.close()

    @staticmethod
    def prepare(job: Job, index: int = 0) -> bytes:
        """Head and body of request ``index`` of ``job``."""
        body = job.bodies[index] if job.bodies else b""
        lines = [f"{job.method} {job.path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in job.headers_of(index).items()]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def exchange(self, request: bytes) -> memoryview:
        """Send and wait for the whole answer; a view of it, head included, valid until the next call."""
        self._socket.sendall(request)
        have = 0
        while True:
            got = self._socket.recv_into(memoryview(self._room)[have:])
            if not got:
                raise BenchError(f"the server closed the connection after {have} bytes of an answer")
            have += got
            end = self._room.find(b"\r\n\r\n", 0, have)
            if end >= 0:
                break
        total = end + 4 + _content_length(bytes(self._room[:end]))
        if total > len(self._room):
            grown = bytearray(total)
            grown[:have] = memoryview(self._room)[:have]
            self._room = grown
        view = memoryview(self._room)
        while have < total:
            got = self._socket.recv_into(view[have:total])
            if not got:
                raise BenchError(f"the server closed the connection after {have} of {total} bytes")
            have += got
        return view[:total]

    def ask(self, job: Job, index: int = 0) -> Reply:
        """The answer in parts, for checking it."""
        return self.parse(bytes(self.exchange(self.prepare(job, index))))

    @staticmethod
    def parse(answer: bytes) -> Reply:
        head, _, body = answer.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Reply(int(status.split()[1]), headers, body)


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    if head.split(None, 2)[1] in (b"204", b"304"):
        return 0
    raise BenchError(f"an answer without Content-Length: {head[:200]!r}")


def ask(server: Server, job: Job, index: int = 0) -> Reply:
    connection = Connection(server.port)
    try:
        return connection.ask(job, index)
    finally:
        connection.close()
