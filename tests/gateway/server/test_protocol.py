"""Requests and answers over real sockets: bodies, framing of answers, order, leaving, and what applications may do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferway_gateway.server.exchange import Exchange
from inferway_gateway.server.protocol import DISCONNECT_EXTENSION, FIELDS, EdgeProtocol
from raw_edge import WAIT_S, Client, RunningEdge, echo, running

HOST = b"Host: gateway\r\n"
GET = b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n"


def post(body: bytes, headers: bytes = b"", path: bytes = b"/x") -> bytes:
    return b"POST %s HTTP/1.1\r\n" % path + HOST + b"Content-Length: %d\r\n" % len(body) + headers + b"\r\n" + body


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def part(body: Any = b"", *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def always(_: Any) -> bool:
    return True


@contextlib.contextmanager
def served(app: Any, **options: Any) -> Iterator[tuple[RunningEdge, Client]]:
    with running(app, **options) as edge, edge.client() as client:
        yield edge, client


@pytest.fixture(params=["task", "fast"])
def mode(request: pytest.FixtureRequest) -> Callable[[Any], bool] | None:
    return always if request.param == "fast" else None


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 16_000, 70_000, 131_072, 300_000, 3_000_001])
@pytest.mark.parametrize("way", ["declared", "chunked", "declared-in-pieces"])
def test_a_body_arrives_whole_whatever_its_size_and_the_next_request_follows(
    edge: RunningEdge, size: int, way: str
) -> None:
    body = bytes(hashlib.shake_128(b"x").digest(size))
    with edge.client() as client:
        for _ in range(2):
            if way == "chunked":
                chunks = b"".join(
                    b"%x\r\n" % len(body[i : i + 50_000]) + body[i : i + 50_000] + b"\r\n"
                    for i in range(0, size, 50_000)
                )
                data = b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
            else:
                data = post(body)
            # A second thread sends: the answer may begin to come before the last byte has left.
            sender = threading.Thread(target=client.send, args=(data,), kwargs={"bytewise": way.endswith("pieces")})
            sender.start()
            answer = client.read()
            sender.join(WAIT_S)
            assert (answer.status, answer.body == body) == (200, True)


@pytest.mark.parametrize("uvloop_loop", [True, False], ids=["uvloop", "asyncio"])
def test_a_long_body_is_one_aligned_message_in_its_own_memory(uvloop_loop: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = memoryview(message["body"])
        address = np.frombuffer(body, "u1").ctypes.data
        await send(start())
        words = f"{len(body)} {message['more_body']} {(address + 100) % 64} {type(message['body']).__name__}"
        await send(part(words.encode()))

    with served(app, uvloop_loop=uvloop_loop) as (_, client):
        client.send(post(b"x" * 1_000_000, b"Inference-Header-Content-Length: 100\r\n"))
        assert client.read().body == b"1000000 False 0 memoryview"
        client.send(post(b"short"))
        assert client.read().body.startswith(b"5 False")


def test_a_small_body_is_complete_when_the_application_starts(mode: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        # It would have to wait for anything that has not arrived; a coroutine that waits cannot be sent through once.
        try:
            receive().send(None)
        except StopIteration as done:
            await send(part(done.value["body"]))

    with served(app, fast=mode) as (_, client):
        client.send(post(b"all here"))
        assert client.read().body == b"all here"


def test_an_application_may_refuse_a_large_body_before_it_arrives(mode: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(401, (b"content-length", b"2")))
        await send(part(b"no"))

    with served(app, fast=mode) as (edge, client):
        client.send(b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 100000000\r\n\r\n" + b"x" * 100_000)
        answer = client.read()
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        assert client.ended
        edge.until(lambda: not edge.server.edge.incomplete_bytes)


def test_a_connection_lives_on_when_little_of_an_unread_body_is_missing(mode: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(part(scope["path"].encode()))

    with served(app, fast=mode) as (_, client):
        first = post(b"x" * 50_000, path=b"/one")
        client.send(first[:20_000])
        assert client.read().body == b"/one"
        client.send(first[20_000:] + post(b"", path=b"/two"))
        assert client.read().body == b"/two"


def test_nothing_of_a_large_body_is_read_before_the_application_asks() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await echo(scope, receive, send)

    body = b"x" * 8_000_000
    with served(app) as (edge, client):
        sender = threading.Thread(target=client.send, args=(post(body),))
        sender.start()
        edge.until(lambda: len(edge.calls) == 1)
        connection = next(iter(edge.server.edge.connections))
        assert connection.receiving is not None
        assert connection.receiving.received < 1_000_000
        assert not connection.transport.is_reading()
        edge.loop.call_soon_threadsafe(go.set)
        assert client.read().body == body
        sender.join(WAIT_S)


def test_a_body_beyond_the_limit_is_refused(mode: Any) -> None:
    from inferway_gateway.server.policy import EdgeLimits

    with running(echo, EdgeLimits(body_bytes=1000), fast=mode) as edge:
        for data in (
            post(b"x" * 1001),
            b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999\r\n\r\n",
            b"POST /x HTTP/1.1\r\n"
            + HOST
            + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n"
            + b"x" * 1001
            + b"\r\n0\r\n\r\n",
            b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nffffff\r\n" + b"x" * 1001,
        ):
            with edge.client() as client:
                client.send(data)
                answer = client.read()
                assert (answer.status, answer.json["code"]) == (413, "payload_too_large")
                assert client.ended
        with edge.client() as client:
            client.send(post(b"x" * 1000))
            assert client.read().status == 200


def test_100_continue_is_sent_when_the_body_is_asked_for(edge: RunningEdge) -> None:
    with edge.client() as client:
        whole = post(b"body", b"Expect: 100-continue\r\n")
        client.send(whole[:-4])
        assert client.read().status == 100
        client.send(whole[-4:])
        assert client.read().body == b"body"
        client.send(GET)
        assert client.read().status == 200


def test_without_100_continue_the_connection_ends_with_the_answer(mode: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(403))
        await send(part(b"no"))

    with served(app, fast=mode) as (_, client):
        client.send(post(b"body", b"Expect: 100-continue\r\n")[:-4])
        answer = client.read()
        assert (answer.status, answer.headers["connection"]) == (403, "close")
        assert client.ended


# --- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_has_date_and_no_server_header(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(GET)
        answer = client.read()
        assert answer.head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.headers["date"].endswith(" GMT")
        assert "server" not in answer.headers


@pytest.mark.parametrize(
    ("messages", "body", "framing"),
    [
        ([start(), part(b"ab")], b"ab", "content-length"),
        ([start(), part(b"a", more=True), part(b"b")], b"ab", "transfer-encoding"),
        (
            [start(), part(b"a", more=True), part(b"", more=True), part(b"b", more=True), part()],
            b"ab",
            "transfer-encoding",
        ),
        ([start(200, (b"content-length", b"2")), part(b"a", more=True), part(b"b")], b"ab", "content-length"),
        ([start(200, (b"Content-Length", b"2")), part(b"ab")], b"ab", "content-length"),
        ([start(200, (b"transfer-encoding", b"chunked")), part(b"ab", more=True), part()], b"ab", "transfer-encoding"),
        ([start(), part(bytearray(b"ab"))], b"ab", "content-length"),
        ([start(), part(memoryview(b"ab"))], b"ab", "content-length"),
        ([start(), part(memoryview(b"abcdefgh").cast("d"))], b"abcdefgh", "content-length"),
        ([start(), part(b"x" * 200_000)], b"x" * 200_000, "content-length"),
        (
            [start(), part(memoryview(b"x" * 200_000), more=True), part(b"y")],
            b"x" * 200_000 + b"y",
            "transfer-encoding",
        ),
        ([start(), part()], b"", "content-length"),
        ([{"type": "http.response.start", "status": 200}, {"type": "http.response.body"}], b"", "content-length"),
        ([start(299), part(b"ab")], b"ab", "content-length"),
        ([start(204), part()], b"", None),
        ([start(304), part()], b"", None),
    ],
)
def test_answers_are_framed_so_that_the_next_one_can_follow(
    mode: Any, messages: list[Any], body: bytes, framing: str | None
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(dict(message))

    with served(app, fast=mode) as (_, client):
        for _ in range(2):
            client.send(GET)
            answer = client.read()
            assert answer.body == body
            assert {"content-length", "transfer-encoding"} & answer.headers.keys() == ({framing} if framing else set())


def test_answers_with_the_same_headers_differ_in_their_values(mode: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        value = scope["query_string"]
        body = b"x" * len(value)
        names = [
            (b"x-100%", value),
            (b"content-length", b"%d" % len(body)),
            (b"set-cookie", value + b"%b"),
            (b"a", b""),
        ]
        await send(start(200, *names))
        await send(part(body))

    with served(app, fast=mode) as (_, client):
        for value in ("one", "%b%d", "three", "", "%", "fifth"):
            client.send(f"GET /?{value} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
            answer = client.read()
            expected = {"x-100%": value, "content-length": str(len(value)), "set-cookie": value + "%b", "a": ""}
            assert {name: answer.headers[name] for name in expected} == expected
            assert list(answer.headers) == ["date", *expected]
            client.send(f"HEAD /?{value} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
            assert client.read(head_only=True).headers == answer.headers
        client.send(GET.replace(b"/x", b"/?last").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert client.read().headers["connection"] == "close"
        assert client.ended


def test_a_value_that_breaks_the_line_is_found_in_a_known_answer_too(
    mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(200, (b"content-length", b"1"), (b"x", (await receive())["body"])))
        await send(part(b"y"))

    for attack in (b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b"):
        with served(app, fast=mode) as (_, client):
            for _ in range(3):
                client.send(post(b"fine"))
                assert client.read().headers["x"] == "fine"
            client.send(post(attack))
            assert client.read().status == 500
            assert client.ended
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 4


def test_a_length_that_is_wrong_is_found_in_a_known_answer_too(mode: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(200, (b"content-length", b"3")))
        await send(part((await receive())["body"]))

    for wrong in (b"", b"ab", b"abcd"):
        with served(app, fast=mode) as (_, client):
            client.send(post(b"abc") * 3)
            for _ in range(3):
                assert client.read().body == b"abc"
            client.send(post(wrong))
            assert client.read().status == 500
            assert client.ended


def test_an_answer_at_once_that_cannot_be_sent_leaves_the_request_to_the_application(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def at_once(scope: Any, body: Any) -> Any:
        if body == b"defect":
            raise ValueError("some defect")
        if body == b"no":
            return None
        return (
            200,
            [(b"content-length", b"%d" % len(body)), (b"x", bytes(body))],
            b"at once" if body == b"1234567" else body,
        )

    with running(echo, at_once=at_once) as edge:
        for body, answer in {
            b"yes": b"yes",
            b"1234567": b"at once",
            b"no": b"no",
            b"a\nb": b"a\nb",
            b"defect": b"defect",
        }.items():
            with edge.client() as client:
                client.send(post(body) + post(b"next"))
                assert client.read().body == answer
                assert client.read().body == b"next"
        assert len(edge.calls) == 3
    assert "some defect" in caplog.text
    assert "line ends" in caplog.text


def test_head_gets_the_head_alone(mode: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(200, (b"content-length", b"3")))
        await send(part(b"abc"))

    with served(app, fast=mode) as (_, client):
        for _ in range(2):
            client.send(b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n")
            answer = client.read(head_only=True)
            assert answer.headers["content-length"] == "3"
        client.send(GET)
        assert client.read().body == b"abc"


def test_http_1_0_gets_what_it_can_read(mode: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        if scope["path"] == "/stream":
            await send(part(b"a", more=True))
        await send(part(b"b"))

    with running(app, fast=mode) as edge:
        with edge.client() as client:
            client.send(b"GET /stream HTTP/1.0\r\n\r\n")
            answer = client.read()
            assert answer.body == b"ab"
            assert answer.headers.keys() == {"date", "connection"}
        with edge.client() as client:
            client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert client.read().headers["connection"] == "keep-alive"
            client.send(b"GET / HTTP/1.0\r\n\r\n")
            assert client.read().headers["connection"] == "close"
            assert client.ended


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([start(200, (b"x", b"a\r\nb: c"))], "line ends"),
        ([start(200, (b"x", b"a\nb"))], "line ends"),
        ([start(200, (b"x", b"a\rb"))], "line ends"),
        ([start(200, (b"x", b"a\0b"))], "line ends"),
        ([start(200, (b"a b", b"c"))], "token"),
        ([start(200, (b"a:", b"c"))], "token"),
        ([start(200, (b"", b"c"))], "token"),
        ([start(200, (b"content-length", b"1"))], "Content-Length"),
        ([start(200, (b"content-length", b"5"))], "Content-Length"),
        ([], "http.response.start"),
        ([start(), start()], "second"),
        ([{"type": "http.response.trailers"}], "http.response.trailers"),
    ],
)
def test_an_application_that_breaks_the_rules_gets_an_error_and_the_caller_a_500(
    mode: Any, messages: list[Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in [*messages, part(b"abc")]:
            await send(message)

    with served(app, fast=mode) as (_, client):
        client.send(GET)
        answer = client.read()
        assert (answer.status, answer.json["code"]) == (500, "internal")
        assert client.ended
    assert words in caplog.text


def test_what_fails_in_the_middle_of_an_answer_cuts_the_connection(mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(200, (b"content-length", b"5")))
        await send(part(b"ab", more=True))
        raise ValueError("some defect")

    with served(app, fast=mode) as (_, client):
        client.send(GET)
        with contextlib.suppress(ConnectionResetError), pytest.raises(AssertionError, match="ended early"):
            client.read()
    assert "some defect" in caplog.text


@pytest.mark.parametrize("when", ["before", "started", "never"])
def test_a_failing_application_is_logged_once_and_answered(
    mode: Any, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if when == "before":
            raise ValueError("some defect")
        if when == "started":
            await send(start())
            raise ValueError("some defect")

    with served(app, fast=mode) as (_, client):
        client.send(GET + GET)
        answer = client.read()
        assert (answer.status, answer.json["code"]) == (500, "internal")
        assert "some defect" not in answer.body.decode()
        assert client.ended
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert (errors[0].exc_info is not None) == (when != "never")


def test_a_defect_in_the_choice_of_fast_requests_only_costs_speed(caplog: pytest.LogCaptureFixture) -> None:
    def choose(_: Any) -> bool:
        raise ValueError("some defect")

    with served(echo, fast=choose) as (_, client):
        client.send(post(b"x"))
        assert client.read().body == b"x"
    assert "some defect" in caplog.text


def test_a_broken_chunk_on_a_connection_that_would_close_is_refused_all_the_same(mode: Any) -> None:
    with served(echo, fast=mode) as (edge, client):
        client.send(
            b"POST /x HTTP/1.1\r\n" + HOST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
        )
        edge.until(lambda: len(edge.calls) == 1)
        client.send(b"zz\r\n")
        answer = client.read()
        assert (answer.status, answer.json["code"]) == (400, "malformed_request")
        assert client.ended


# --- order -----------------------------------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(edge: RunningEdge) -> None:
    bodies = [b"%d" % i for i in range(40)]
    with edge.client() as client:
        client.send(b"".join(map(post, bodies)))
        assert [client.read().body for _ in bodies] == bodies


def test_pipelined_requests_wait_for_a_slow_one() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await go.wait()
        await send(start())
        await send(part(scope["path"].encode()))

    # The fast ones behind it could be answered at once.
    with served(app, fast=always) as (edge, client):
        client.send(post(b"", path=b"/slow") + post(b"", path=b"/a") + post(b"x" * 100_000, path=b"/b"))
        edge.until(lambda: len(edge.calls) == 1)
        client.send(post(b"", path=b"/c"))
        edge.loop.call_soon_threadsafe(go.set)
        assert [client.read().body for _ in range(4)] == [b"/slow", b"/a", b"/b", b"/c"]


def test_more_pipelined_requests_than_fit_into_the_queue_are_all_answered() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        await echo(scope, receive, send)

    # Padding lets some 160 of them into one read.
    bodies = [b"%04d" % i for i in range(2000)]
    with served(app) as (_, client):
        sender = threading.Thread(
            target=client.send, args=(b"".join(post(b, b"P: " + b"p" * 40 + b"\r\n") for b in bodies),)
        )
        sender.start()
        assert [client.read().body for _ in bodies] == bodies
        sender.join(WAIT_S)


def test_answers_that_a_crowd_gets_in_a_row_are_whole_and_in_order(edge: RunningEdge) -> None:
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(edge.client()) for _ in range(12)]
        large = b"x" * 200_000
        for turn in range(3):
            bodies = [b"%d" % turn, b"", large, b"after", b"last"]
            for client in crowd:
                threading.Thread(target=client.send, args=(b"".join(map(post, bodies)),)).start()
            for client in crowd:
                assert [client.read().body for _ in bodies] == bodies
        # What ends a connection comes after the answer that was put off, whatever it is.
        endings = [b"nonsense\r\n\r\n", post(b"2", b"Connection: close\r\n"), b""]
        for i, client in enumerate(crowd):
            client.send(post(b"1") + endings[i % 3])
        for i, client in enumerate(crowd):
            assert client.read().body == b"1"
            if i % 3 == 0:
                assert client.read().status == 400
            elif i % 3 == 1:
                assert client.read().body == b"2"
            else:
                client.socket.shutdown(socket.SHUT_WR)
            assert client.ended


def test_nothing_follows_an_answer_that_closes(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(post(b"1", b"Connection: close\r\n") + post(b"2"))
        answer = client.read()
        assert (answer.body, answer.headers["connection"]) == (b"1", "close")
        assert client.ended


# --- leaving ---------------------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def reset(client: Client) -> None:
    """Close so that the peer gets RST, as from a process that was killed with data unread."""
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()


async def patient(scope: Any, receive: Any, send: Any) -> None:
    """Reads its body and waits for the caller to leave; then fails as Starlette does."""

    class ClientDisconnect(Exception):
        pass

    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    if scope["path"] == "/streaming":
        await send(start())
        while True:
            await send(part(b"x" * 65_536, more=True))
            await asyncio.sleep(0)
            if scope["extensions"][DISCONNECT_EXTENSION].__self__.closing:
                return
    message = await receive()
    assert message == {"type": "http.disconnect"}
    raise ClientDisconnect


@pytest.mark.parametrize("leave", [reset, Client.__exit__], ids=["reset", "close"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POS",
        b"POST /x HTTP/1.1\r\nHost: a\r\n",
        post(b"x" * 100)[:-50],
        post(b"x" * 100_000)[:-50],
        post(b"x" * 500_000)[:-50],
        b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        post(b"x"),
        post(b"x") + GET + GET[:-5],
        post(b"x", path=b"/streaming"),
    ],
    ids=["nothing", "method", "headers", "body", "long-body", "sink", "chunk", "waiting", "pipelined", "answer"],
)
def test_a_caller_may_leave_at_any_time_without_a_trace(
    mode: Any, data: bytes, leave: Callable[[Client], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with running(patient, fast=mode) as edge:
        client = edge.client()
        client.send(data)
        if b"\r\n\r\n" in data:
            edge.until(lambda: len(edge.calls) > 0)
            if b"streaming" in data:
                client.read(head_only=True)
        else:
            edge.until(lambda: edge.stats.accepted == 1)
        leave(client)
        edge.until(lambda: edge.stats.open == 0 and not edge.server.edge.tasks)
        assert edge.server.edge.incomplete_bytes == 0
        assert edge.stats.disconnected == (1 if edge.calls else 0)
    assert caplog.text == ""


def test_a_caller_that_leaves_is_told_to_those_who_registered() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        left = asyncio.Event()
        register = scope["extensions"][DISCONNECT_EXTENSION]
        withdrawn = register(lambda: edge.seen.append("withdrawn"))
        register(left.set)
        withdrawn()
        withdrawn()
        edge.seen.append("registered")
        await left.wait()
        late = asyncio.Event()
        register(late.set)
        await late.wait()
        edge.seen.append("left")

    with running(app, fast=always) as edge:
        client = edge.client()
        client.send(GET)
        edge.until(lambda: edge.seen == ["registered"])
        client.socket.close()
        edge.until(lambda: edge.seen == ["registered", "left"])


@pytest.mark.parametrize("behind", [GET * 2000, post(b"x" * 500_000)[:-1]], ids=["requests", "body"])
@pytest.mark.parametrize("leave", [reset, Client.__exit__], ids=["reset", "close"])
def test_a_caller_that_leaves_while_nothing_is_read_from_it_is_noticed(
    mode: Any, behind: bytes, leave: Callable[[Client], None]
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        left = asyncio.Event()
        scope["extensions"][DISCONNECT_EXTENSION](left.set)
        await left.wait()
        edge.seen.append("left")

    with running(app, fast=mode) as edge:
        client = edge.client()
        client.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.socket.sendall(post(b"first") + behind)
        edge.until(lambda: edge.server.edge.paused)
        leave(client)
        edge.until(lambda: edge.seen == ["left"])
        edge.until(lambda: edge.stats.open == 0 and not edge.server.edge.paused)
        assert edge.server.edge.incomplete_bytes == 0
        assert len(edge.calls) == 1


def test_callbacks_of_one_request_do_not_outlive_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        withdraw = scope["extensions"][DISCONNECT_EXTENSION](lambda: edge.seen.append("called"))
        withdraw()
        await echo(scope, receive, send)

    with running(app) as edge:
        with edge.client() as client:
            client.send(GET)
            client.read()
        edge.until(lambda: edge.stats.open == 0)
        assert edge.seen == []


def test_a_caller_that_closes_its_side_after_a_request_still_gets_an_answer_that_is_made(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(post(b"last"))
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read().body == b"last"
        assert client.ended


def test_a_caller_that_closes_its_side_counts_as_gone_while_it_waits() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        await send(start())
        await send(part(b"made all the same"))

    with served(app) as (edge, client):
        client.send(post(b"x"))
        edge.until(lambda: len(edge.calls) == 1)
        client.socket.shutdown(socket.SHUT_WR)
        answer = client.read()
        assert (answer.body, answer.headers["connection"]) == (b"made all the same", "close")
        assert client.ended
        assert edge.stats.disconnected == 1


@pytest.mark.parametrize("data", [b"PO", b"POST / HTTP/1.1\r\n", post(b"abc")[:-1], post(b"x" * 400_000)[:-1]])
def test_half_a_request_before_the_end_is_told_so(edge: RunningEdge, data: bytes) -> None:
    with edge.client() as client:
        client.send(data)
        client.socket.shutdown(socket.SHUT_WR)
        answer = client.read()
        assert (answer.status, answer.json["code"]) == (400, "malformed_request")
        assert client.ended


def test_an_idle_caller_that_closes_gets_nothing(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(GET)
        client.read()
        client.socket.shutdown(socket.SHUT_WR)
        assert client.ended


def test_a_connection_is_freed_when_it_is_lost_without_the_garbage_collector(mode: Any) -> None:
    def live() -> int:
        return sum(issubclass(type(thing), EdgeProtocol | Exchange) for thing in gc.get_objects())

    with running(echo, fast=mode) as edge:
        gc.collect()
        before = live()
        gc.disable()
        try:
            with edge.client() as client:
                client.send(post(b"x") + post(b"y" * 300_000) + GET)
                for _ in range(3):
                    client.read()
            edge.until(lambda: edge.stats.open == 0)
            edge.until(lambda: live() <= before)
        finally:
            gc.enable()


@pytest.mark.parametrize("seed", range(3))
def test_callers_that_leave_at_random_leave_nothing_behind(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    chance = random.Random(seed)
    data = post(b"x" * 10) + b"POST /y HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    data += post(b"z" * 200_000)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        if chance.random() < 0.5:
            await asyncio.sleep(chance.random() / 1000)
        if message["type"] == "http.request":
            await send(start())
            await send(part(message["body"]))
            await receive()  # until the caller leaves

    with running(app, fast=lambda scope: scope["path"] == "/y") as edge:
        files = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(200):
            client = edge.client()
            client.send(data[: chance.randrange(len(data))] if chance.random() < 0.5 else data[: chance.randrange(400)])
            if chance.random() < 0.3:
                client.socket.shutdown(socket.SHUT_WR)
            if chance.random() < 0.5:
                reset(client)
            else:
                client.socket.close()
        edge.until(lambda: edge.stats.accepted == 200 and edge.stats.open == 0 and not edge.server.edge.tasks)
        assert edge.server.edge.incomplete_bytes == 0
        assert len(list(Path("/proc/self/fd").iterdir())) <= files
        with edge.client() as client:
            client.send(post(b"still there", b"Connection: close\r\n"))
            assert client.read().body == b"still there"
    assert caplog.text == ""


# --- the scope -------------------------------------------------------------------------------------------------------


def test_the_scope_is_asgis() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        edge.seen.append(scope)
        await send(start())
        await send(part())

    with running(app) as edge, edge.client() as client:
        client.send(b"GET /a%20b/%C3%A4?c=%20d HTTP/1.1\r\nHost: gateway\r\nX-A: 1\r\nx-a: 2\r\n\r\n")
        client.read()
        scope = edge.seen[0]
        assert scope["type"] == "http"
        assert scope["asgi"] == {"version": "3.0", "spec_version": "2.3"}
        assert scope["http_version"] == "1.1"
        assert scope["scheme"] == "http"
        assert scope["method"] == "GET"
        assert scope["path"] == "/a b/ä"
        assert scope["raw_path"] == b"/a%20b/%C3%A4"
        assert scope["query_string"] == b"c=%20d"
        assert scope["root_path"] == ""
        assert scope["headers"] == [(b"host", b"gateway"), (b"x-a", b"1"), (b"x-a", b"2")]
        assert scope[FIELDS] == {b"host": b"gateway", b"x-a": b"2"}
        assert scope["client"] == client.socket.getsockname()
        assert scope["server"] == client.socket.getpeername()
        assert scope["state"] == {}


# --- without a task --------------------------------------------------------------------------------------------------


def test_a_fast_request_can_wait_after_all_and_be_timed_out_and_cancelled() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        before = asyncio.current_task()
        assert before is not None
        try:
            async with asyncio.timeout(0.01):  # entered before there is a task, left with one
                await asyncio.Event().wait()
        except TimeoutError:
            edge.seen.append("timed out")
        task = asyncio.current_task()
        assert isinstance(task, asyncio.Task)
        asyncio.get_running_loop().call_soon(before.cancel)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert before.cancelling() == task.cancelling() == 1
            assert before.uncancel() == 0
        async with asyncio.TaskGroup() as group:
            child = group.create_task(asyncio.sleep(0, "child"))
        edge.seen.append(child.result())
        await echo(scope, receive, send)

    with running(app, fast=always) as edge, edge.client() as client:
        client.send(post(b"x"))
        assert client.read().body == b"x"
        assert edge.seen == ["timed out", "child"]


def test_a_fast_request_may_be_cancelled_right_after_it_first_waits() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            edge.seen.append("cancelled")
            raise

    with running(app, fast=always) as edge, edge.client() as client:
        client.send(post(b"x"))
        answer = client.read()
        assert (answer.status, answer.json["code"]) == (503, "shutting_down")
        assert edge.seen == ["cancelled"]


def test_context_variables_of_one_fast_request_are_not_the_next_ones() -> None:
    from contextvars import ContextVar

    variable: ContextVar[str] = ContextVar("variable", default="unset")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found = variable.get()
        token = variable.set(scope["path"])
        if scope["path"] == "/wait":
            await asyncio.sleep(0)
        assert variable.get() == scope["path"]
        variable.reset(token)  # fails where the context has changed
        variable.set("left behind")
        await send(start())
        await send(part(found.encode()))

    with served(app, fast=always) as (_, client):
        for path in (b"/a", b"/wait", b"/b"):
            client.send(post(b"", path=path))
            assert client.read().body == b"unset"


def test_a_slow_reader_pauses_the_application(mode: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        for i in range(80):
            await send(part(b"x" * 100_000, more=True))
            edge.seen.append(i)
        await send(part())

    with running(app, fast=mode) as edge, edge.client() as client:
        client.send(GET)
        edge.until(lambda: len(edge.seen) > 0 and next(iter(edge.server.edge.connections)).write_paused)
        assert len(edge.seen) < 75
        assert client.read().body == b"x" * 8_000_000


def test_a_background_task_after_the_answer_does_not_hold_up_the_next_request() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await echo(scope, receive, send)
        if scope["path"] == "/background":
            await go.wait()
            await send(part(b"too late: nobody may get this"))
            edge.seen.append((await receive())["type"])

    with running(app) as edge, edge.client() as client:
        client.send(post(b"1", path=b"/background"))
        assert client.read().body == b"1"
        client.send(post(b"2"))
        assert client.read().body == b"2"
        edge.loop.call_soon_threadsafe(go.set)
        edge.until(lambda: edge.seen == ["http.disconnect"])
        client.send(post(b"3"))
        assert client.read().body == b"3"
