"""Long bodies that an application takes in pieces."""

from __future__ import annotations

import asyncio
import hashlib
import random
import select
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from inferway_gateway.server.policy import EdgeLimits
from raw_edge import WAIT_S, Client, RunningEdge, running

LIMIT = 64 * 1024 * 1024
CONTENT = random.Random(1).randbytes(3_000_001)


def streamed(scope: Any) -> int | None:
    return LIMIT if scope["path"].startswith("/blobs/") else None


class Taker:
    """An application that takes bodies in pieces and answers with their digest and how many pieces there were.

    Attributes:
        gate: awaited before each piece, where there is one.
        pieces: lengths of those that came.
        left: how requests ended whose callers went away.
    """

    def __init__(self) -> None:
        self.gate: asyncio.Event | None = None
        self.pieces: list[int] = []
        self.left: list[int] = []
        self.waiting = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        found = hashlib.sha256()
        size = 0
        more = scope["path"] != "/blobs/unread"
        while more:
            if self.gate is not None:
                self.waiting.set()
                await self.gate.wait()
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.append(size)
                return
            found.update(message["body"])
            size += len(message["body"])
            self.pieces.append(len(message["body"]))
            more = message["more_body"]
        body = b"%d %s" % (size, found.hexdigest().encode())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def taker() -> Taker:
    return Taker()


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def edge(request: pytest.FixtureRequest, taker: Taker) -> Iterator[RunningEdge]:
    limits = EdgeLimits(body_bytes=1_000_000, body_timeout_s=0.5, body_min_bytes_per_s=10_000_000, tick_s=0.02)
    with running(taker, limits, streamed=streamed, uvloop_loop=request.param) as edge:
        yield edge


def head(path: str = "/blobs/x", *fields: str, method: str = "PUT") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *fields, "", ""]).encode()


def chunks(content: bytes, size: int) -> bytes:
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def expected(content: bytes) -> bytes:
    return b"%d %s" % (len(content), hashlib.sha256(content).hexdigest().encode())


@pytest.mark.parametrize("size", [0, 1, 100_000, 3_000_001])
def test_come_in_pieces_and_in_order(edge: RunningEdge, taker: Taker, size: int) -> None:
    content = CONTENT[:size]
    with edge.client() as client:
        for _ in range(2):  # the connection lives on
            client.send(head("/blobs/x", f"Content-Length: {size}") + content)
            assert client.read().body == expected(content)
            client.send(head("/blobs/x", "Transfer-Encoding: chunked") + chunks(content, 50_000))
            assert client.read().body == expected(content)
    assert max(taker.pieces) <= 1024 * 1024
    assert edge.server.edge.incomplete_bytes == 0


def test_a_body_byte_by_byte_is_the_same(edge: RunningEdge) -> None:
    content = CONTENT[:1500]
    with edge.client() as client:
        client.send(head("/blobs/x", f"Content-Length: {len(content)}") + content, bytewise=True)
        assert client.read().body == expected(content)
        client.send(head("/blobs/x", "Transfer-Encoding: chunked") + chunks(content, 7), bytewise=True)
        assert client.read().body == expected(content)


def test_the_next_request_on_the_connection_is_answered(edge: RunningEdge) -> None:
    with edge.client() as client:
        first = head("/blobs/x", f"Content-Length: {len(CONTENT)}") + CONTENT
        client.send(first + head("/y", "Content-Length: 3") + b"abc")
        assert client.read().body == expected(CONTENT)
        assert client.read().body == expected(b"abc")


def test_other_routes_keep_their_limit(edge: RunningEdge) -> None:
    for path, method in (("/other", "PUT"), ("/blobs/x", "POST")):
        with edge.client() as client:
            client.send(head(path, "Content-Length: 1000001", method=method))
            assert client.read().status == 413


def test_a_declared_length_beyond_the_limit_is_refused_before_the_body(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(head("/blobs/x", f"Content-Length: {LIMIT + 1}", "Expect: 100-continue"))
        answer = client.read()
        assert answer.status == 413
        assert str(LIMIT) in answer.json["error"]


def test_a_chunked_body_ends_at_the_limit(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(head("/blobs/x", "Transfer-Encoding: chunked"))
        piece = b"100000\r\n" + bytes(0x100000) + b"\r\n"
        for _ in range(LIMIT // 0x100000 + 1):
            client.send(piece)
        assert client.read().status == 413


def test_a_welcome_is_said_once(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(head("/blobs/x", "Content-Length: 300000", "Expect: 100-continue"))
        assert client.read().status == 100
        client.send(CONTENT[:300_000])
        assert client.read().body == expected(CONTENT[:300_000])


def fill(client: Client, content: bytes) -> int:
    """Send until the peer takes no more; returns how many bytes it took."""
    client.socket.setblocking(False)
    sent = 0
    while sent < len(content):
        _, writable, _ = select.select([], [client.socket], [], 0.3)
        if not writable:
            break
        sent += client.socket.send(content[sent : sent + 1_000_000])
    client.socket.settimeout(WAIT_S)
    return sent


def test_a_peer_waits_for_an_application_that_is_slow_and_does_not_pay_for_it(edge: RunningEdge, taker: Taker) -> None:
    """Nothing is read ahead but a little, and the deadline does not run meanwhile: it is half a second here."""
    content = CONTENT * 20

    async def gate() -> asyncio.Event:
        taker.gate = asyncio.Event()
        taker.gate.set()
        return taker.gate

    event = asyncio.run_coroutine_threadsafe(gate(), edge.loop).result(WAIT_S)
    with edge.client() as client:
        client.send(head("/blobs/x", f"Content-Length: {len(content)}") + content[:200_000])
        edge.until(lambda: sum(taker.pieces) == 200_000)
        edge.loop.call_soon_threadsafe(event.clear)
        client.send(content[200_000:200_001])  # takes it out of its wait for this piece
        edge.until(lambda: sum(taker.pieces) == 200_001)
        sent = fill(client, content[200_001:])
        assert sent < 20_000_000, "what the kernel holds, and no more"
        assert edge.server.edge.incomplete_bytes <= 2 * 1024 * 1024
        end = edge.server.edge.now + 1.0  # twice the body's deadline
        edge.until(lambda: edge.server.edge.now > end)
        edge.loop.call_soon_threadsafe(event.set)
        client.send(content[200_001 + sent :])
        assert client.read().body == expected(content)


def test_a_peer_that_is_slow_itself_is_ended_and_what_it_sent_was_given(edge: RunningEdge, taker: Taker) -> None:
    with edge.client() as client:
        client.send(head("/blobs/x", "Content-Length: 3000001") + CONTENT[:1000])
        assert client.read().status == 408
    edge.until(lambda: taker.left == [1000])


@pytest.mark.parametrize("sent", [0, 1000, 2_000_000])
@pytest.mark.parametrize("how", ["closes", "shuts"])
def test_a_caller_that_leaves_has_given_what_it_sent(edge: RunningEdge, taker: Taker, sent: int, how: str) -> None:
    client = edge.client()
    client.send(head("/blobs/x", "Content-Length: 3000001") + CONTENT[:sent])
    edge.until(lambda: sum(taker.pieces) == sent and len(edge.calls) == 1)
    if how == "closes":
        client.socket.close()
    else:
        client.socket.shutdown(1)
    edge.until(lambda: taker.left == [sent])
    client.socket.close()
    edge.until(lambda: edge.server.edge.incomplete_bytes == 0 and not edge.server.edge.connections)


def test_an_answer_before_the_body_closes_the_connection_behind_it(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(head("/blobs/unread", f"Content-Length: {len(CONTENT)}") + CONTENT[:100_000])
        answer = client.read()
        assert answer.body == expected(b"")
        assert answer.headers["connection"] == "close"


def test_many_small_chunks_are_refused_when_they_are_too_many(taker: Taker) -> None:
    limits = EdgeLimits(chunk_count=100)
    with running(taker, limits, streamed=streamed) as edge:
        with edge.client() as client:
            client.send(head("/blobs/x", "Transfer-Encoding: chunked") + chunks(CONTENT, 2000))
            assert client.read().body == expected(CONTENT), "1,500 chunks, and long enough ones"
        with edge.client() as client:
            client.send(head("/blobs/x", "Transfer-Encoding: chunked") + chunks(CONTENT[:20_000], 50))
            assert client.read().status == 400


def test_a_choice_that_is_not_made_changes_nothing(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(head("/other", "Content-Length: 900000") + CONTENT[:900_000])
        assert client.read().body == expected(CONTENT[:900_000])
