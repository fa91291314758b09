"""A real edge on a real socket: uvloop in a thread, raw sockets against it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvloop

from inferway_gateway.server.policy import DrainPolicy, EdgeLimits, EdgeStats
from inferway_gateway.server.serve import EdgeServer, bind

WAIT_S = 10.0
"""Longer than anything here takes; a test that hangs fails after it."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    head: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One raw connection."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=WAIT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes, *, bytewise: bool = False) -> None:
        """Send everything; a peer that closes before the end is no error, its answer is what a test looks at."""
        try:
            if not bytewise:
                self.socket.sendall(data)
                return
            step = max(1, len(data) // 2000)  # more packets than that show nothing new
            for i in range(0, len(data), step):
                self.socket.sendall(data[i : i + step])
        except (BrokenPipeError, ConnectionResetError):
            pass

    def read(self, *, head_only: bool = False) -> Answer:
        """The next answer; AssertionError where the connection ends before it does."""
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, _, value = line.partition(": ")
            assert name not in headers, f"{name} twice"
            headers[name] = value
        status = int(lines[0].split(" ")[1])
        if head_only or status in (100, 204, 304):
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = self._chunks()
        elif "content-length" in headers:
            body = self._exactly(int(headers["content-length"]))
        else:
            body = self.rest()
        return Answer(status, headers, body, head)

    def rest(self) -> bytes:
        """Everything until the peer ends."""
        parts = [self.buffer]
        self.buffer = b""
        while part := self.socket.recv(1 << 20):
            parts.append(part)
        return b"".join(parts)

    @property
    def ended(self) -> bool:
        """The peer has closed its side and sent nothing before that."""
        try:
            return self.rest() == b""
        except ConnectionResetError:
            return True

    def _chunks(self) -> bytes:
        body = b""
        while True:
            while b"\r\n" not in self.buffer:
                self._more()
            size, _, self.buffer = self.buffer.partition(b"\r\n")
            piece = self._exactly(int(size, 16) + 2)
            assert piece.endswith(b"\r\n")
            if piece == b"\r\n":
                return body
            body += piece[:-2]

    def _exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self._more()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def _more(self) -> None:
        part = self.socket.recv(1 << 20)
        assert part, f"the connection ended early, after {self.buffer[:200]!r}"
        self.buffer += part


@dataclass
class RunningEdge:
    """An edge that serves in a thread of its own.

    ``calls`` are the requests that reached the application, as method and path. ``seen`` is for applications to tell
    tests what they saw.
    """

    port: int
    server: EdgeServer
    stats: EdgeStats
    loop: asyncio.AbstractEventLoop
    calls: list[tuple[str, str]] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)

    def client(self) -> Client:
        return Client(("127.0.0.1", self.port))

    def until(self, condition: Callable[[], object]) -> None:
        """Wait on the server's loop until ``condition`` holds; it is asked in that thread."""

        async def wait() -> None:
            async with asyncio.timeout(WAIT_S):
                while not condition():
                    await asyncio.sleep(0.001)

        asyncio.run_coroutine_threadsafe(wait(), self.loop).result(WAIT_S + 1)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Give the body back."""
    message = await receive()
    if message["type"] == "http.disconnect":
        return
    body = message["body"]
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def with_lifespan(app: Any) -> Any:
    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        await app(scope, receive, send)

    return wrapped


@contextmanager
def running(
    app: Any = echo,
    limits: EdgeLimits | None = None,
    *,
    fast: Callable[[Any], bool] | None = None,
    at_once: Callable[[Any, Any], Any] | None = None,
    streamed: Callable[[Any], int | None] | None = None,
    uvloop_loop: bool = True,
) -> Iterator[RunningEdge]:
    """Serve ``app`` until the block ends."""
    ready = threading.Event()
    found: list[RunningEdge] = []
    stats = EdgeStats()

    async def recorded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            found[0].calls.append((scope["method"], scope["path"]))
        await with_lifespan(app)(scope, receive, send)

    async def main() -> None:
        def started(port: int) -> None:
            found.append(RunningEdge(port, server, stats, asyncio.get_running_loop()))
            ready.set()

        sockets = bind("127.0.0.1", 0)
        server = EdgeServer(
            recorded,
            limits=limits or EdgeLimits(),
            drain=DrainPolicy(delay_s=0, idle_grace_s=0, timeout_s=5, interactive_grace_s=0),
            on_drain=lambda: None,
            sockets=sockets,
            stats=stats,
            fast=fast,
            at_once=at_once,
            streamed=streamed,
            ready=started,
        )
        await server.run_until_stopped()

    def serve() -> None:
        factory = uvloop.new_event_loop if uvloop_loop else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(WAIT_S)
    edge = found[0]
    try:
        yield edge
    finally:
        edge.loop.call_soon_threadsafe(edge.server.stop)
        edge.loop.call_soon_threadsafe(edge.server.stop)  # at once: tests leave connections open
        thread.join(WAIT_S)
        assert not thread.is_alive()
