"""Slow, greedy and numerous callers: each bound holds, and good callers do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from inferway_gateway.server.edge import Edge, _source
from inferway_gateway.server.policy import EdgeLimits, EdgeStats
from raw_edge import WAIT_S, Client, RunningEdge, echo, running

HOST = b"Host: gateway\r\n"
GET = b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n"
QUICK = EdgeLimits(
    header_timeout_s=0.2, body_timeout_s=0.2, body_min_bytes_per_s=1 << 20, keep_alive_s=0.3, linger_s=0.2, tick_s=0.02
)
SLACK_S = 0.6
"""Deadlines here are tenths of seconds and the machine is shared."""


def post(body: bytes) -> bytes:
    return b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.fixture(scope="module", params=[True, False], ids=["uvloop", "asyncio"])
def quick(request: pytest.FixtureRequest) -> Iterator[RunningEdge]:
    with running(echo, QUICK, uvloop_loop=request.param) as edge:
        yield edge


@contextlib.contextmanager
def dripping(client: Client, data: bytes) -> Iterator[None]:
    """Send ``data`` over and over, a byte every few milliseconds, until the block ends or the peer closes."""
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while True:
                for i in range(len(data)):
                    if stop.wait(0.005):
                        return
                    client.socket.sendall(data[i : i + 1])

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(WAIT_S)


# --- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "drip", "phase"),
    [
        (b"", b"\r\n", "header"),
        (b"P", b"OST /xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "header"),
        (b"GET /x HTTP/1.1\r\n", b"A: b\r\n", "header"),
        (GET, b"GET /yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy", "header"),
        (post(b"x" * 100_000)[:-50_000], b"x", "body"),
        (post(b"x" * 900_000)[:-50_000], b"x", "body"),
        (b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", "body"),
        (b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a", "body"),
        (b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: ", b"b", "body"),
    ],
    ids=["line-ends", "target", "headers", "second", "body", "sink", "chunks", "extension", "trailer"],
)
def test_who_drips_is_told_and_closed_at_the_deadline(
    quick: RunningEdge, before: bytes, drip: bytes, phase: str
) -> None:
    expired = quick.stats.expired.get(phase, 0)
    begun = time.monotonic()
    with quick.client() as client:
        client.send(before)
        with dripping(client, drip):
            if before == GET:
                assert client.read().status == 200
            answer = client.read()
            took = time.monotonic() - begun
            assert (answer.status, answer.json["code"]) == (408, "request_timeout")
            assert answer.headers["x-should-retry"] == "true"
            # 850,000 bytes that did arrive earn their sender most of another second.
            earned = 0.85 if len(before) > 800_000 else 0.1
            assert 0.2 <= took <= 0.2 + earned + SLACK_S
            assert client.ended
    assert quick.stats.expired[phase] == expired + 1


def test_a_body_that_keeps_its_rate_may_take_longer_than_the_timeout() -> None:
    limits = EdgeLimits(body_timeout_s=0.2, body_min_bytes_per_s=50_000, tick_s=0.02)
    with running(echo, limits) as edge, edge.client() as client:
        body = b"x" * 60_000
        begun = time.monotonic()
        client.send(post(body)[: -len(body)])
        for i in range(0, len(body), 1000):
            client.send(body[i : i + 1000])
            threading.Event().wait(0.008)
        assert client.read().body == body
        assert time.monotonic() - begun > 2 * limits.body_timeout_s


def test_a_connection_that_says_nothing_is_closed_without_a_word(quick: RunningEdge) -> None:
    begun = time.monotonic()
    with quick.client() as client:
        assert client.ended
    assert 0.2 <= time.monotonic() - begun <= 0.2 + SLACK_S


def test_an_idle_connection_is_closed_after_the_keep_alive(quick: RunningEdge) -> None:
    with quick.client() as client:
        client.send(GET)
        client.read()
        begun = time.monotonic()
        assert client.ended
        assert 0.25 <= time.monotonic() - begun <= 0.3 + SLACK_S


def test_requests_in_time_keep_a_connection_alive(quick: RunningEdge) -> None:
    with quick.client() as client:
        begun = time.monotonic()
        while time.monotonic() - begun < 0.6:
            client.send(GET)
            assert client.read().status == 200
            threading.Event().wait(0.02)


def test_a_request_at_work_has_no_deadline_here() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await echo(scope, receive, send)

    with running(app, QUICK) as edge, edge.client() as one, edge.client() as two:
        one.send(post(b"whole"))
        two.send(post(b"x" * 300_000))  # whose body nobody has asked for yet
        edge.until(lambda: len(edge.calls) == 2)
        threading.Event().wait(0.6)
        edge.loop.call_soon_threadsafe(go.set)
        assert one.read().body == b"whole"
        assert two.read().body == b"x" * 300_000


@pytest.mark.parametrize("size", [3_000, 60_000_000])
def test_who_does_not_read_the_answer_is_cut(size: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size})

    limits = EdgeLimits(body_timeout_s=0.2, body_min_bytes_per_s=1 << 30, linger_s=0.1, keep_alive_s=0.2, tick_s=0.02)
    with running(app, limits) as edge, edge.client() as client:
        # Small answers fill the buffers when there are many of them, large ones alone.
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        count = 60_000_000 // size
        sender = threading.Thread(target=client.send, args=(GET * min(count, 20_000),))
        sender.start()
        edge.until(lambda: edge.stats.accepted == 1 and edge.stats.open == 0)
        assert edge.stats.expired == {"send": 1}
        client.socket.close()
        sender.join(WAIT_S)


def test_answers_nobody_reads_do_not_pile_up() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 30_000})

    for fast in (None, lambda _: True):
        with running(app, fast=fast) as edge, edge.client() as client:
            sender = threading.Thread(target=client.send, args=(GET * 1_000,))
            sender.start()
            edge.until(lambda: any(c.write_paused for c in edge.server.edge.connections))
            connection = next(iter(edge.server.edge.connections))
            seen = -1
            while seen != len(edge.calls):
                seen = len(edge.calls)
                threading.Event().wait(0.05)
            assert connection.transport.get_write_buffer_size() < 1_000_000
            assert len(connection.queue) <= 4096 // len(GET)
            for _ in range(1_000):  # and all of them come when somebody does
                assert client.read().status == 200
            sender.join(WAIT_S)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_flood_of_pipelined_requests_does_not_keep_the_loop_from_others() -> None:
    with running(echo, fast=lambda _: True) as edge, edge.client() as flood, edge.client() as good:
        answered: list[int] = []  # between one turn of the loop and the next
        stop = False

        async def watch() -> None:
            before = edge.stats.requests
            while not stop:
                await asyncio.sleep(0)
                now = edge.stats.requests
                answered.append(now - before)
                before = now

        watching = asyncio.run_coroutine_threadsafe(watch(), edge.loop)
        reader = threading.Thread(target=lambda: [flood.read() for _ in range(20_000)])
        reader.start()
        flood.send(GET * 20_000)
        for _ in range(20):
            good.send(post(b"good"))
            assert good.read().body == b"good"
        reader.join(WAIT_S)
        assert not reader.is_alive()
        stop = True
        watching.result(WAIT_S)
        assert sum(answered) == 20_020
        # A read of the socket holds up to 256 KB, more than six thousand of them; 4 KB are answered at one go.
        assert max(answered) <= 2 * (4096 // len(GET) + 1)


def test_too_many_chunks_are_refused() -> None:
    head = b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    with running(echo, EdgeLimits(chunk_count=100)) as edge:
        with edge.client() as client:
            client.send(head + b"1\r\nx\r\n" * 99 + b"0\r\n\r\n")
            assert client.read().body == b"x" * 99
        with edge.client() as client:
            client.send(head + b"1\r\nx\r\n" * 101)
            answer = client.read()
            assert answer.status == 400
            assert "100 chunks" in answer.json["error"]
            assert client.ended


def test_at_the_cap_incomplete_requests_give_way_to_newcomers() -> None:
    with running(echo, EdgeLimits(connections=20)) as edge, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(edge.client()) for _ in range(20)]
        for client in slow:
            client.send(b"POST /x HTTP/1.1\r\n")
        edge.until(lambda: edge.stats.open == 20)
        for _ in range(30):
            with edge.client() as good:
                good.send(post(b"good"))
                assert good.read().body == b"good"
        assert edge.stats.evicted >= 1
        told = [client for client in slow if select.select([client.socket], [], [], 0)[0]]
        assert len(told) == edge.stats.evicted
        assert {client.read().status for client in told} == {408}


def test_at_the_cap_idle_connections_give_way_before_nobody_does() -> None:
    with running(echo, EdgeLimits(connections=4)) as edge, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(edge.client()) for _ in range(4)]
        for client in idle:
            client.send(GET)
            client.read()
        with edge.client() as good:
            good.send(GET)
            assert good.read().status == 200
        assert edge.stats.evicted == 1
        assert idle[0].ended


def test_where_all_are_at_work_the_newcomer_is_told_to_come_again() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await echo(scope, receive, send)

    with running(app, EdgeLimits(connections=4)) as edge, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(edge.client()) for _ in range(4)]
        for client in busy:
            client.send(post(b"busy"))
        edge.until(lambda: len(edge.calls) == 4)
        with edge.client() as late:
            answer = late.read()
            assert (answer.status, answer.json["code"]) == (503, "queue_full")
            assert answer.headers["retry-after"] == "1"
            assert late.ended
        edge.loop.call_soon_threadsafe(go.set)
        assert [client.read().body for client in busy] == [b"busy"] * 4


@pytest.mark.parametrize(
    ("client", "source"),
    [
        (("127.0.0.1", 1), None),
        (("127.9.9.9", 1), None),
        (("::1", 1), None),
        (("::ffff:127.0.0.1", 1), None),
        (None, None),
        (("192.0.2.7", 1), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 1), "2001:0db8:0001:0002"),
        (("2001:db8:1:2::9", 1), "2001:0db8:0001:0002"),
        (("fe80::1%eth0", 1), "fe80:0000:0000:0000"),
        (("testclient", 1), "testclient"),
    ],
)
def test_connections_are_counted_by_what_one_caller_has(client: tuple[str, int] | None, source: str | None) -> None:
    assert _source(client) == source


def test_one_source_may_not_have_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    # Everybody in this test comes from loopback, which is exempt; so it is taken for another address.
    monkeypatch.setattr("inferway_gateway.server.edge._source", lambda client: "192.0.2.7")
    with running(echo, EdgeLimits(connections_per_source=3)) as edge, contextlib.ExitStack() as stack:
        first = [stack.enter_context(edge.client()) for _ in range(3)]
        for client in first:
            client.send(GET)
            client.read()
        fourth = stack.enter_context(edge.client())
        fourth.send(GET)
        assert fourth.read().status == 200
        assert first[0].ended
        assert edge.stats.open == 3
        for client in (*first, fourth):
            client.socket.close()
        edge.until(lambda: edge.stats.open == 0)
        assert edge.server.edge._sources == {}


def holds_more_than(edge: RunningEdge, count: int) -> bool:
    return edge.server.edge.incomplete_bytes > count


def test_incomplete_bodies_share_a_bound_and_the_oldest_gives_way() -> None:
    with running(echo, EdgeLimits(incomplete_bytes=1_000_000)) as edge, contextlib.ExitStack() as stack:
        senders = [stack.enter_context(edge.client()) for _ in range(3)]
        for number, client in enumerate(senders):
            client.send(post(b"x" * 500_000)[:-100])
            if number < 2:
                edge.until(partial(holds_more_than, edge, (number + 1) * 300_000))
        assert senders[0].read().status == 408
        senders[2].send(b"x" * 100)
        assert senders[2].read().body == b"x" * 500_000
        edge.until(lambda: edge.server.edge.incomplete_bytes < 600_000)
        for client in senders:
            client.socket.close()
        edge.until(lambda: edge.server.edge.incomplete_bytes == 0)


def test_connections_that_are_only_heard_out_give_way_too() -> None:
    with running(echo, EdgeLimits(connections=4)) as edge, contextlib.ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(edge.client())
            client.send(b"GARBAGE\r\n\r\n")
            assert client.read().status == 400
        assert edge.stats.open == 4
        with edge.client() as good:
            good.send(GET)
            assert good.read().status == 200


def test_a_body_sent_byte_by_byte_costs_no_more_than_its_size() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/x":
            await go.wait()
        await echo(scope, receive, send)

    with running(app) as edge, edge.client() as client:
        client.send(post(b"x" * 30_000)[:-1], bytewise=True)
        edge.until(lambda: len(edge.calls) == 1)
        (connection,) = edge.server.edge.connections
        exchange = connection.receiving
        assert exchange is not None
        assert sys.getsizeof(exchange.parts) + sys.getsizeof(exchange.body) < 100_000
        edge.loop.call_soon_threadsafe(go.set)
        client.send(b"x")
        assert client.read().body == b"x" * 30_000


# --- many ------------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_five_hundred_endless_headers_cost_little_memory_and_are_refused() -> None:
    with running(echo, EdgeLimits(connections=1000)) as edge, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(edge.client()) for _ in range(500)]
        piece = b"GET /x HTTP/1.1\r\n" + HOST + b"A: " + b"v" * 15_000
        for client in clients[:50]:
            client.send(piece)
        edge.until(lambda: edge.stats.open == 500)
        before = resident_bytes()
        for client in clients:
            client.send(piece)
        for client in clients:
            client.send(b"v" * 16_000)
        refused = [client.read().status for client in clients]
        assert refused == [431] * 500
        assert resident_bytes() - before < 16 * 1024 * 1024


def test_a_declared_length_costs_no_memory_before_it_is_sent() -> None:
    with running(echo) as edge, contextlib.ExitStack() as stack:
        before = resident_bytes()
        for _ in range(100):
            client = stack.enter_context(edge.client())
            client.send(b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 134217728\r\n\r\n" + b"x" * 200_000)
        edge.until(lambda: edge.server.edge.incomplete_bytes == 100 * 200_000)
        # Twenty megabytes were sent, and thirteen gigabytes promised.
        assert resident_bytes() - before < 300 * 1024 * 1024


def test_two_hundred_drippers_do_not_hurt_a_good_caller() -> None:
    with running(echo, QUICK) as edge, contextlib.ExitStack() as stack:
        drippers = [stack.enter_context(edge.client()) for _ in range(200)]
        for number, client in enumerate(drippers):
            client.send(b"GET /x HTTP/1.1\r\nA: " if number % 2 else post(b"x" * 1000)[:-500])
        for _ in range(200):
            with edge.client() as good:
                good.send(post(b"good"))
                assert good.read().body == b"good"
        assert [client.read().status for client in drippers] == [408] * 200
        edge.until(lambda: edge.stats.open == 0)


# --- the clock -------------------------------------------------------------------------------------------------------


async def test_the_clock_survives_a_connection_that_fails() -> None:
    class Broken:
        deadline = 0.0
        aborted = False

        def expire(self, now: float) -> None:
            self.deadline = float("inf")
            raise RuntimeError("some defect")

        def abort(self) -> None:
            self.aborted = True

    edge = Edge(echo, EdgeLimits(tick_s=0.01), EdgeStats())
    broken: Any = Broken()
    edge.connections.add(broken)
    edge.start(asyncio.get_running_loop())
    try:
        first = edge.now
        async with asyncio.timeout(WAIT_S):
            while edge.now <= first:
                await asyncio.sleep(0)
        assert broken.aborted
        assert edge.stats.lag.count >= 2
    finally:
        edge.stop()
        edge.stop()
