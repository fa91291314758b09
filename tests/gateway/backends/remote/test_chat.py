"""Chats and completions of OpenAI-compatible servers: what goes there, what comes back, and servers that lie."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any

import pytest

from inferway_gateway.backends.remote import RemoteBackend
from inferway_gateway.backends.remote.executor import RemoteExecutor
from inferway_gateway.core.errors import (
    ContextLengthError,
    DeadlineExceededError,
    GatewayError,
    InvalidParameterError,
    MalformedRequestError,
    ModelFailingError,
    QueueFullError,
    ShuttingDownError,
    UpstreamError,
)
from inferway_gateway.core.relay import RelayPiece, RelayRequest
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.upstream import EndpointSpec, RemoteSpec, Secret, UpstreamSpec
from scripted import Answer, ScriptedServer, as_json

LIMIT_S = 20.0
SECRET = "very-secret-value"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


class Up:
    """A version whose model is on scripted servers."""

    def __init__(self, executor: RemoteExecutor, servers: list[ScriptedServer], backend: RemoteBackend) -> None:
        assert executor.relay is not None
        self.executor = executor
        self.relay = executor.relay
        self.servers = servers
        self.backend = backend

    async def ask(self, stream: bool = True, into: list[RelayPiece] | None = None, **members: Any) -> list[RelayPiece]:
        got: list[RelayPiece] = [] if into is None else into
        request = RelayRequest("chat", {**HELLO, **members.pop("body", {})}, stream=stream, **members)
        async with asyncio.timeout(LIMIT_S), aclosing(self.relay.ask(request)) as pieces:
            async for piece in pieces:
                got.append(piece)
        return got

    @property
    def calls(self) -> int:
        return sum(len(server.seen) for server in self.servers)

    def outcomes(self) -> dict[str, int]:
        """How calls ended, over all endpoints, those that never happened left out."""
        counted: dict[str, int] = {}
        for endpoint in self.backend.stats()[0].endpoints:
            assert endpoint.outstanding == 0
            for name, count in endpoint.outcomes.items():
                if count:
                    counted[name] = counted.get(name, 0) + count
        return counted


Open = Callable[..., Any]


@pytest.fixture
async def up(servers: Callable[[int], list[ScriptedServer]]) -> AsyncIterator[Open]:
    """Opens an ``Up``; keyword arguments are members of ``UpstreamSpec``, ``remote`` those of ``RemoteSpec``."""
    async with AsyncExitStack() as stack:

        async def open_(count: int = 1, remote: Any = None, **options: Any) -> Up:
            made = servers(count)
            spec = UpstreamSpec(
                "up",
                "openai",
                tuple(EndpointSpec(f"{server.url}/v1", f"127.0.0.1:{server.port}") for server in made),
                secret=Secret(SECRET),
                timeout_s=5.0,
            )
            backend = await stack.enter_async_context(RemoteBackend([replace(spec, **options)]))
            of = RemoteSpec("up", "theirs", **{"operation": "chat", **(remote or {})})
            executor = await backend.open("mine", 1, of, ModelStats())
            stack.push_async_callback(executor.close)
            return Up(executor, made, backend)

        yield open_


def chunk(content: str | None = None, reason: str | None = None, **members: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "x", "model": "theirs", "choices": [choice], **members}


def sse(*events: object, end: bool = True) -> bytes:
    body = b"".join(b"data: %b\n\n" % (e if isinstance(e, bytes) else json.dumps(e).encode()) for e in events)
    return body + (b"data: [DONE]\n\n" if end else b"")


def stream_of(body: bytes, **members: Any) -> Answer:
    return Answer(200, body, {"Content-Type": "text/event-stream", **members.pop("headers", {})}, **members)


def cut(body: bytes, declared: int | None = None) -> Answer:
    """A stream whose connection ends after ``body``, chunked and without the last chunk, or with another length."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    if declared is None:
        return Answer(raw=head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(body), body))
    return Answer(raw=head + b"Content-Length: %d\r\n\r\n%b" % (declared, body))


GOOD = stream_of(sse(chunk("He"), chunk("llo"), chunk(None, "stop"), {"choices": [], "usage": USAGE}))
WHOLE: dict[str, Any] = {
    "id": "x", "model": "theirs", "usage": USAGE,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
}  # fmt: skip


def text_of(pieces: list[RelayPiece]) -> str:
    return "".join(c["delta"].get("content", "") for piece in pieces for c in piece.choices)


async def test_pieces_come_as_they_are_sent_and_the_connection_is_used_again(up: Open) -> None:
    made = await up()
    made.servers[0].script = [GOOD, GOOD]
    for _ in range(2):
        pieces = await made.ask()
        assert text_of(pieces) == "Hello"
        assert [c["finish_reason"] for piece in pieces for c in piece.choices] == [None, None, "stop"]
        assert pieces[-1].counts is not None
        assert pieces[-1].counts["total_tokens"] == 5
        assert {piece.attempts for piece in pieces} == {1}
    assert made.servers[0].connections == 1
    assert made.outcomes() == {"ok": 2}
    stats = made.relay.stats
    assert (stats.requests, stats.prompt_tokens, stats.completion_tokens) == (2, 6, 4)
    assert (stats.finished["stop"], stats.first_token.count, stats.running, stats.waiting) == (2, 2, 0, 0)


async def test_what_is_known_goes_there_and_nothing_else(up: Open) -> None:
    made = await up(remote={"parameters": {"temperature": 0.5, "max_tokens": 7, "store": True}})
    made.servers[0].script = [GOOD, as_json(WHOLE)]
    body = {
        "model": "mine", "max_completion_tokens": 9, "top_p": None, "priority": 3, "models": ["other"], "seed": 1,
        "api_base": "http://169.254.169.254", "reasoning_effort": "low", "stream_options": {"include_usage": False},
    }  # fmt: skip
    await made.ask(body=body, origin=(("X-Request-Id", "r1"),), deadline=asyncio.get_running_loop().time() + 9)
    await made.ask(False)
    first, second = made.servers[0].seen
    assert first.path == "/v1/chat/completions"
    assert first.json == {
        **HELLO, "model": "theirs", "temperature": 0.5, "store": True, "max_completion_tokens": 9, "seed": 1,
        "reasoning_effort": "low", "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert first.headers["authorization"] == f"Bearer {SECRET}"
    assert first.headers["x-request-id"] == "r1"
    assert 0 < int(first.headers["inferway-timeout-ms"]) <= 9000
    assert second.json["max_tokens"] == 7
    assert second.json["stream"] is False
    assert "inferway-timeout-ms" not in second.headers


async def test_a_request_that_cannot_be_written_again_is_refused(up: Open) -> None:
    made = await up()
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    for value in (deep, "\ud800"):
        with pytest.raises(MalformedRequestError):
            await made.ask(body={"user": value})
    assert made.calls == 0


DELTAS: dict[str, Any] = {
    "role-first": [{"role": "assistant", "content": ""}, {"content": "Hello"}],
    "nulls": [{"role": "assistant", "content": None, "tool_calls": None}, {"content": "Hello", "refusal": None}],
    "no-delta": [None, {"content": "Hello"}],
    "thoughts": [{"reasoning_content": "hm"}, {"content": "Hello"}],
}


@pytest.mark.parametrize("name", DELTAS)
async def test_ways_of_writing_deltas(up: Open, name: str) -> None:
    made = await up()
    sent = [{"choices": [{"index": 0, "delta": delta}]} for delta in DELTAS[name]]
    made.servers[0].script = [stream_of(sse(*sent, chunk(None, "stop")))]
    pieces = await made.ask()
    assert text_of(pieces) == "Hello"
    told = [c["delta"] for piece in pieces for c in piece.choices]
    assert ({"reasoning_content": "hm"} in told) == (name == "thoughts")


async def test_lines_end_in_every_way_and_anywhere(up: Open) -> None:
    body = b"\xef\xbb\xbf: hello\r\n\r\nevent: x\rdata: " + json.dumps(chunk("He")).encode() + b"\r\r"
    body += b'data:{"choices":[{"index":0,\r\ndata:"delta":{"content":"llo"},"finish_reason":"stop"}]}\r\n\r\nid: 1\n\n'
    made = await up()
    made.servers[0].script = [stream_of(body)]  # and no [DONE], which some do not send
    assert text_of(await made.ask()) == "Hello"
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    made.servers[0].script = [Answer(raw=head + pieces)]
    assert text_of(await made.ask()) == "Hello"


async def test_calls_of_tools_come_in_pieces_and_whole(up: Open) -> None:
    made = await up()
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    sent = [{"tool_calls": [first]}, {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]}]
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in sent]
    message = {
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    whole = {**WHOLE, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    made.servers[0].script = [stream_of(sse(*events, chunk(None, "tool_calls"))), as_json(whole)]
    told = [call for p in await made.ask() for c in p.choices for call in c["delta"].get("tool_calls", [])]
    assert told == [first, {"index": 0, "function": {"arguments": '{"a":1}'}}]
    [answer] = await made.ask(False)
    assert answer.choices[0]["message"] == {"role": "assistant", "refusal": None, **message}


WRONG: dict[str, Any] = {
    "no-json": sse(b"<html>"),
    "no-object": sse([1]),
    "no-choices": sse({"id": "x"}),
    "choices-of-no-kind": sse({"choices": {}}),
    "index-out-of-range": sse({"choices": [{"index": 5, "delta": {"content": "x"}}]}),
    "no-index": sse({"choices": [{"delta": {"content": "x"}}]}),
    "too-many-choices": sse({"choices": [{"index": 0, "delta": {}}] * 2}),
    "content-of-no-kind": sse({"choices": [{"index": 0, "delta": {"content": ["x"]}}]}),
    "delta-of-no-kind": sse({"choices": [{"index": 0, "delta": "x"}]}),
    "reason-of-no-kind": sse({"choices": [{"index": 0, "delta": {}, "finish_reason": 1}]}),
    "calls-of-no-kind": sse({"choices": [{"index": 0, "delta": {"tool_calls": [1]}}]}),
    "index-of-a-call": sse({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": -1, "function": {}}]}}]}),
    "deep": sse(b'{"choices":[{"index":0,"delta":{"x":' + b"[" * 300 + b"]" * 300 + b"}}]}"),
    "not-utf-8": sse(b'{"choices":[{"index":0,"delta":{"content":"\xff"}}]}'),
    "done-at-once": sse(),
    "nothing": b"",
    "a-long-line": b"data: " + b"x" * (2 << 20),
    "a-long-name": b"x" * (2 << 20),
    "a-long-event": b"data: xxxxxxxxxxxxxxxx\n" * 100_000,
}


@pytest.mark.parametrize("begun", [False, True], ids=["at-once", "after-a-piece"])
@pytest.mark.parametrize("name", WRONG)
async def test_what_is_no_stream_of_chunks_is_an_error_of_the_upstream(up: Open, name: str, begun: bool) -> None:
    made = await up(attempts=1)
    made.servers[0].script = [stream_of((sse(chunk("a"), end=False) if begun else b"") + WRONG[name])]
    got: list[RelayPiece] = []
    with pytest.raises(UpstreamError) as caught:
        await made.ask(into=got)
    assert text_of(got) == ("a" if begun else "")
    assert caught.value.upstream_attempts == 1
    assert "127.0.0.1" not in caught.value.message
    assert sum(made.outcomes().values()) == 1
    assert "ok" not in made.outcomes()
    made.servers[0].script = [GOOD]
    assert text_of(await made.ask()) == "Hello"  # and nobody else is disturbed


@pytest.mark.parametrize(
    "answer",
    [
        as_json(WHOLE),
        Answer(200, b"<html>", {"Content-Type": "text/html"}),
        stream_of(sse(chunk("x", "stop")), headers={"Content-Encoding": "gzip"}),
        Answer(302, b"", {"Location": "http://169.254.169.254/"}),
        Answer(raw=b"SSH-2.0-OpenSSH\r\n"),
    ],
    ids=["json", "html", "compressed", "redirect", "ssh"],
)
async def test_an_answer_of_another_kind_is_an_error(up: Open, answer: Answer) -> None:
    made = await up(attempts=1)
    made.servers[0].script = [answer]
    with pytest.raises(UpstreamError):
        await made.ask()
    assert made.calls == 1


@pytest.mark.parametrize("declared", [None, 10_000], ids=["chunked", "length"])
async def test_a_stream_that_breaks_off_is_tried_again_before_its_first_piece_alone(
    up: Open, declared: int | None
) -> None:
    made = await up(2)
    role = sse({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}, end=False)
    for server in made.servers:
        server.otherwise = lambda _: GOOD
    made.servers[0].script = [cut(role, declared)]
    made.servers[1].script = [cut(role, declared)]
    with pytest.raises(UpstreamError, match="broke off before its answer was complete"):
        await made.ask()
    assert made.calls == 2
    begun = sse(chunk("a"), end=False)
    made.servers[0].script = [cut(begun, declared)]
    made.servers[1].script = [cut(begun, declared)]
    with pytest.raises(UpstreamError, match="in the middle of its answer"):
        await made.ask()
    assert made.calls == 3
    assert made.outcomes() == {"broken": 3}


async def test_a_failure_before_the_first_piece_is_tried_again_elsewhere(up: Open) -> None:
    made = await up(2, retry_ratio=1.0, breaker_open_s=60.0, breaker_max_open_s=60.0)
    made.servers[0].otherwise = lambda _: cut(b": wait\n\n")
    made.servers[1].otherwise = lambda _: GOOD
    attempts = []

    async def ask() -> None:
        pieces = await made.ask()
        assert text_of(pieces) == "Hello"
        attempts.append(pieces[0].attempts)

    while len(made.servers[0].seen) < 5:  # which of the two is asked first is drawn
        assert len(attempts) < 500
        await ask()
    assert attempts.count(2) == 5
    for _ in range(12):
        await ask()
    assert len(made.servers[0].seen) == 5  # after five failures in a row the endpoint is left alone
    assert set(attempts) == {1, 2}
    assert made.outcomes() == {"ok": len(attempts), "broken": 5}


async def test_an_endpoint_whose_streams_break_is_left_alone(up: Open) -> None:
    made = await up(breaker_failures=3, breaker_open_s=60.0, breaker_max_open_s=60.0)
    made.servers[0].otherwise = lambda _: cut(sse(chunk("a"), end=False))
    for _ in range(3):
        with pytest.raises(UpstreamError):
            await made.ask()
    with pytest.raises(ModelFailingError) as caught:
        await made.ask()
    assert caught.value.retry_after_s is not None
    assert made.calls == 3


SILENT: dict[str, Answer] = {
    "never": Answer(hang=True),
    "comments": stream_of(b"", drip=b": keep-alive\n\n"),
    "a-byte-at-a-time": stream_of(b"data: ", drip=b"x"),
    "empty-pieces": stream_of(b"", drip=sse({"choices": [{"index": 0, "delta": {}}]}, end=False)),
    "after-a-piece": stream_of(sse(chunk("a"), end=False), drip=b": keep-alive\n\n"),
}


@pytest.mark.parametrize("name", SILENT)
async def test_an_upstream_that_says_nothing_does_not_hold_its_caller(up: Open, name: str) -> None:
    made = await up(timeout_s=0.3, attempts=1)
    made.servers[0].script = [SILENT[name]]
    with pytest.raises(UpstreamError, match=r"did not answer within 0\.3 s|sent nothing of its answer for 0\.3"):
        await made.ask()
    assert made.outcomes() == {"timeout": 1}
    made.servers[0].script = [GOOD]
    assert text_of(await made.ask()) == "Hello"


@pytest.mark.parametrize("name", SILENT)
async def test_the_callers_deadline_ends_it_earlier(up: Open, name: str) -> None:
    made = await up()
    made.servers[0].script = [SILENT[name]]
    with pytest.raises(DeadlineExceededError):
        await made.ask(deadline=asyncio.get_running_loop().time() + 0.3)
    assert made.outcomes() == {"timeout": 1}


async def test_a_line_without_an_end_takes_no_memory(up: Open) -> None:
    made = await up()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made.servers[0].script = [stream_of(sse(chunk("a"), end=False) + b"data: ", drip=b"x" * (1 << 20))]
    with pytest.raises(UpstreamError, match="an event that is too long"):
        await made.ask()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


async def test_an_endless_answer_ends_at_the_upstreams_limit(up: Open) -> None:
    made = await up(max_response_bytes=10_000)
    made.servers[0].script = [stream_of(b"", drip=sse(chunk("aaaa"), end=False) * 20)]
    with pytest.raises(UpstreamError, match="more than 10000 bytes"):
        await made.ask()


async def test_whoever_leaves_closes_the_connection_and_gives_the_place_back(up: Open) -> None:
    made = await up(max_in_flight=1, max_queued=1)
    made.servers[0].script = [stream_of(sse(chunk("a"), end=False), drip=b": wait\n"), GOOD]
    first = made.relay.ask(RelayRequest("chat", HELLO, stream=True))
    assert text_of([await anext(first)]) == "a"
    waiting = asyncio.create_task(made.ask())
    async with asyncio.timeout(LIMIT_S):
        while not made.relay.stats.waiting:
            await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await made.ask()
    await first.aclose()
    assert text_of(await waiting) == "Hello"
    assert made.relay.stats.cancelled == 1
    assert made.outcomes() == {"cancelled": 1, "ok": 1}
    assert made.servers[0].connections == 2


async def test_whoever_leaves_before_anything_came_closes_the_connection(up: Open) -> None:
    made = await up()
    made.servers[0].script = [Answer(hang=True)]
    task = asyncio.create_task(made.ask(False))
    assert await asyncio.to_thread(made.servers[0].hanging.wait, LIMIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(made.servers[0].closed.wait, LIMIT_S)
    assert made.outcomes() == {"cancelled": 1}


async def test_a_version_that_is_taken_out_of_service_ends_its_streams(up: Open) -> None:
    made = await up()
    made.servers[0].script = [stream_of(sse(chunk("a"), end=False), drip=b": wait\n")]
    async with asyncio.timeout(LIMIT_S), aclosing(made.relay.ask(RelayRequest("chat", HELLO, stream=True))) as pieces:
        await anext(pieces)
        assert await made.executor.drain(0.01) == 1
        with pytest.raises(ShuttingDownError):
            await anext(pieces)
    with pytest.raises(ShuttingDownError):
        await made.ask()
    assert await made.executor.close()


def refused(message: Any, status: int = 400, **members: Any) -> Answer:
    return as_json({"error": {"message": message, **members}}, status)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_refusal_is_told_in_clean_words(up: Open, stream: bool) -> None:
    made = await up()
    server = made.servers[0]
    server.script = [
        refused(f"key {SECRET} at {server.url}/v1 (10.1.2.3:80), 127.0.0.1:{server.port}: sk-abcdefgh1234 no\n<b>"),
        refused("too long", code="context_length_exceeded", param="messages"),
        refused("no", param="a b; drop"),
        Answer(422, b"not json"),
        refused(["x"]),
    ]
    expected: list[tuple[type[GatewayError], str | None]] = [
        (InvalidParameterError, None), (ContextLengthError, "messages"), (InvalidParameterError, None),
        (InvalidParameterError, None), (InvalidParameterError, None),
    ]  # fmt: skip
    messages = []
    for kind, param in expected:
        with pytest.raises(InvalidParameterError) as caught:
            await made.ask(stream)
        assert type(caught.value) is kind
        assert caught.value.param == param
        assert caught.value.upstream_attempts == 1
        messages.append(caught.value.message)
    for hidden in (SECRET, "127.0.0.1", "10.1.2.3", str(server.port), "abcdefgh", "\n"):
        assert hidden not in messages[0]
    assert messages[1] == "upstream 'up' refused the request: too long"
    assert messages[3:] == [f"upstream 'up' refused the request: status {status}" for status in (422, 400)]
    assert made.outcomes() == {"refused": 5}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (refused(SECRET, 401), UpstreamError, "does not let the gateway in"),
        (refused(SECRET, 403), UpstreamError, "does not let the gateway in"),
        (refused(SECRET, 404), UpstreamError, "does not have the model"),
        (refused(SECRET, 429), UpstreamError, "answered with status 429"),
        (refused(SECRET, 500), UpstreamError, "answered with status 500"),
        (refused(SECRET, 504), DeadlineExceededError, "did not finish in time"),
    ],
    ids=["401", "403", "404", "429", "500", "504"],
)
async def test_other_failures_are_told_without_the_upstreams_words(
    up: Open, answer: Answer, kind: type[GatewayError], words: str, stream: bool
) -> None:
    made = await up(attempts=1)
    made.servers[0].script = [answer]
    with pytest.raises(kind, match=words) as caught:
        await made.ask(stream)
    assert SECRET not in caught.value.message


@pytest.mark.parametrize("begun", [False, True], ids=["at-once", "after-a-piece"])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": SECRET, "type": "server_error"}, UpstreamError),
        (SECRET, UpstreamError),
        ({"message": "slow", "code": "deadline_exceeded"}, DeadlineExceededError),
        ({"message": f"bad {SECRET}", "type": "invalid_request_error", "param": "n"}, InvalidParameterError),
    ],
    ids=["server", "text", "deadline", "request"],
)
async def test_an_error_within_a_stream_is_one_here(
    up: Open, error: Any, kind: type[GatewayError], begun: bool
) -> None:
    made = await up()
    made.servers[0].script = [stream_of(sse(*([chunk("a")] if begun else []), {"error": error}))]
    with pytest.raises(kind) as caught:
        await made.ask()
    assert type(caught.value) is kind
    assert SECRET not in caught.value.message
    assert made.calls == 1


WRONG_WHOLE: dict[str, Any] = {
    "no-json": b"<",
    "no-choices": {"choices": []},
    "no-message": {"choices": [{"index": 0, "finish_reason": "stop"}]},
    "no-reason": {"choices": [{"index": 0, "message": {"content": "x"}}]},
    "twice": {"choices": [WHOLE["choices"][0]] * 2},
    "call-without-a-name": {
        "choices": [{"index": 0, "message": {"tool_calls": [{"function": {}}]}, "finish_reason": "stop"}]
    },
}


@pytest.mark.parametrize("name", WRONG_WHOLE)
async def test_a_wrong_whole_answer_is_an_error_of_the_upstream(up: Open, name: str) -> None:
    made = await up()
    body = WRONG_WHOLE[name]
    made.servers[0].script = [Answer(200, body if isinstance(body, bytes) else json.dumps(body).encode())]
    with pytest.raises(UpstreamError) as caught:
        await made.ask(False)
    assert caught.value.upstream_attempts == 1
    assert made.calls == 1


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": -1, "completion_tokens": 1}, {"prompt_tokens": "1"}])
async def test_usage_that_is_none_is_not_told(up: Open, usage: Any) -> None:
    made = await up()
    made.servers[0].script = [as_json({**WHOLE, "usage": usage}), stream_of(sse(chunk("a", "stop", usage=usage)))]
    assert [piece.counts for piece in await made.ask(False)] == [None]
    assert [piece.counts for piece in await made.ask()] == [None]
    assert made.relay.stats.completion_tokens == 0


async def test_usage_in_every_chunk_counts_once(up: Open) -> None:
    made = await up()
    made.servers[0].script = [
        stream_of(sse(chunk("a", usage=USAGE), chunk("b", usage=USAGE), chunk(None, "stop", usage=USAGE)))
    ]
    assert sum(piece.usage is not None for piece in await made.ask()) == 1
    assert made.relay.stats.completion_tokens == 2


async def test_completions_go_to_their_own_path(up: Open) -> None:
    made = await up()
    event = {
        "choices": [
            {"index": 1, "text": "b", "finish_reason": "stop"},
            {"index": 0, "text": "a", "finish_reason": "length"},
        ]
    }
    made.servers[0].script = [stream_of(sse(event)), as_json({**event, "usage": USAGE}), refused("no", 404)]
    for stream in (True, False):
        request = RelayRequest("completions", {"prompt": ["x", "y"], "messages": 1}, answers=2, stream=stream)
        [piece, *_] = [piece async for piece in made.relay.ask(request)]
        assert sorted((c["index"], c["text"]) for c in piece.choices) == [(0, "a"), (1, "b")]
    assert made.servers[0].seen[0].path == "/v1/completions"
    assert made.servers[0].seen[1].json == {"prompt": ["x", "y"], "model": "theirs", "stream": False}
    with pytest.raises(InvalidParameterError, match="requests of this kind") as caught:
        [_ async for _ in made.relay.ask(RelayRequest("completions", {"prompt": "x"}))]
    assert caught.value.param == "model"
    assert made.relay.stats.finished == {"stop": 2, "length": 2}


async def test_a_slow_reader_holds_its_upstream_and_no_memory(up: Open) -> None:
    made = await up(timeout_s=0.2)
    made.servers[0].script = [stream_of(sse(*[chunk("a")] * 400, chunk(None, "stop")))]
    got = []
    async with asyncio.timeout(LIMIT_S), aclosing(made.relay.ask(RelayRequest("chat", HELLO, stream=True))) as pieces:
        got.append(await anext(pieces))
        async with asyncio.timeout(LIMIT_S):
            started = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() < started + 0.5:
                await asyncio.sleep(0.01)
        got += [piece async for piece in pieces]
    assert text_of(got) == "a" * 400


async def test_embeddings_are_no_relay(up: Open, servers: Callable[[int], list[ScriptedServer]]) -> None:
    [server] = servers(1)
    spec = UpstreamSpec("up", "openai", (EndpointSpec(server.url, "x"),))
    async with RemoteBackend([spec]) as backend:
        executor = await backend.open("mine", 1, RemoteSpec("up", "m", operation="embeddings"), ModelStats())
        assert executor.relay is None
        await executor.close()


async def test_retries_of_chats_keep_to_their_share(up: Open) -> None:
    made = await up(3, breaker_failures=10_000)
    for server in made.servers:
        server.otherwise = lambda seen: refused("busy", 503) if seen.json["stream"] else cut(b"")
    attempts = 0
    for index in range(100):
        with pytest.raises(UpstreamError) as caught:
            await made.ask(index % 2 == 0)
        attempts += caught.value.upstream_attempts
    # An attempt on a connection that the server has just closed is one that it does not see.
    assert made.calls <= attempts
    assert 100 < attempts <= 112  # a tenth more, and the one that may be saved up


async def test_words_that_only_look_like_secrets_are_told(up: Open) -> None:
    made = await up()
    made.servers[0].script = [refused("Unknown key response_formats; the key provided is wrong (sk-proj-12345678)")]
    with pytest.raises(
        InvalidParameterError, match=r"Unknown key response_formats; the key provided is wrong \(\*\*\*\)"
    ):
        await made.ask()
