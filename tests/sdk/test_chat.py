"""Chats and completions: what goes over the wire, what comes back, and how a stream ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, Field

import inferway
from inferway import (
    ChatCompletion,
    ChatMessage,
    ContentDelta,
    Finish,
    RetryPolicy,
    StreamInterruptedError,
    Timeout,
    ToolCallDelta,
    Usage,
    UsageReport,
)
from scripted import Answer, ScriptedServer, Seen, Side, as_error, as_json

NO_WAIT = RetryPolicy(base_delay_s=0, max_delay_s=0)
HEAD = {"id": "chat-1", "object": "chat.completion.chunk", "created": 7, "model": "smol"}


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    choices = (
        [] if delta is None and finish is None else [{"index": index, "delta": delta or {}, "finish_reason": finish}]
    )
    return event({**HEAD, "choices": choices, **more})


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
HELLO = [
    chunk({"role": "assistant", "content": ""}),
    b": keep-alive\n\n",
    chunk({"content": "Hel"}),
    chunk({"content": "lo"}),
    chunk({}, "stop"),
    chunk(usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}),
    DONE,
]
ANSWER = {
    "id": "chat-1",
    "object": "chat.completion",
    "created": 7,
    "model": "smol",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    },
    "system_fingerprint": "x",
}


def streaming(*pieces: bytes, chunked: bool = True, ended: bool = True) -> Answer:
    """A stream of events that ends in order, or with a cut connection."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Request-Id: from-gateway\r\n"
    if not chunked:
        return Answer(raw=head + b"Connection: close\r\n\r\n" + b"".join(pieces))
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return Answer(raw=head + b"Transfer-Encoding: chunked\r\n\r\n" + body + (b"0\r\n\r\n" if ended else b""))


def kept(*pieces: bytes) -> Answer:
    """A stream of events of known length, after which the connection can serve again."""
    return Answer(200, b"".join(pieces), {"Content-Type": "text/event-stream; charset=utf-8"})


async def opened(side: Side, client: Any, **arguments: Any) -> Any:
    return await side(lambda: client.chat.create("Hi", model="smol", stream=True, **arguments))


async def test_an_answer_is_typed_and_keeps_what_it_does_not_know(server: ScriptedServer, side: Side) -> None:
    server.script = [as_json(ANSWER)]
    client = side.client(server.url)
    found = await side(lambda: client.chat.create("Hi", model="smol", temperature=0, max_tokens=5, seed=None))
    assert isinstance(found, ChatCompletion)
    assert (found.text, found.finish_reason, found.model, found.id, found.created) == (
        "Hello",
        "stop",
        "smol",
        "chat-1",
        7,
    )
    assert found.usage == Usage(3, 2, 5, 1)
    assert found.raw["system_fingerprint"] == "x"
    assert found.parsed is None
    assert server.seen[0].path == "/v1/chat/completions"
    assert server.seen[0].json == {
        "model": "smol",
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0,
        "max_tokens": 5,
    }
    assert pickle.loads(pickle.dumps(found)) == found


async def test_a_conversation_goes_on_with_the_message_of_an_answer(server: ScriptedServer, side: Side) -> None:
    server.script = [as_json(ANSWER), as_json(ANSWER)]
    client = side.client(server.url)
    first = await side(lambda: client.chat.create("Hi", model="smol"))
    messages = [{"role": "user", "content": "Hi"}, first.message, {"role": "user", "content": "And?"}]
    await side(lambda: client.chat.create(messages, model="smol", extra_body={"guess": 1}))
    assert server.seen[1].json["messages"][1] == {"role": "assistant", "content": "Hello"}
    assert server.seen[1].json["guess"] == 1


async def test_a_stream_gives_events_text_and_the_whole_answer(server: ScriptedServer, side: Side) -> None:
    server.script = [streaming(*HELLO), streaming(*HELLO), streaming(*HELLO)]
    client = side.client(server.url)
    stream = await opened(side, client)
    assert await side.all(stream) == [
        ContentDelta("Hel"), ContentDelta("lo"), Finish("stop"), UsageReport(Usage(3, 2, 5)),
    ]  # fmt: skip
    assert stream.closed
    assert stream.snapshot.text == "Hello"
    assert stream.request_id == "from-gateway"
    stream = await opened(side, client)
    assert await side.all(stream.text_stream) == ["Hel", "lo"]
    stream = await opened(side, client)
    final = await side(stream.get_final)
    assert (final.text, final.finish_reason, final.usage, final.model) == ("Hello", "stop", Usage(3, 2, 5), "smol")
    assert server.seen[0].json["stream"] is True
    assert server.seen[0].json["stream_options"] == {"include_usage": True}
    assert server.seen[0].headers["accept"].startswith("text/event-stream")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
async def test_pieces_of_any_size_give_the_same_events(server: ScriptedServer, side: Side, size: int) -> None:
    body = b"".join([chunk({"content": "naïve 😀 "}), chunk({"content": "日本"}), chunk({}, "stop"), DONE])
    server.script = [streaming(*(body[start : start + size] for start in range(0, len(body), size)))]
    stream = await opened(side, side.client(server.url))
    assert (await side(stream.get_final)).text == "naïve 😀 日本"


async def test_the_connection_of_a_read_stream_serves_again(server: ScriptedServer, side: Side) -> None:
    server.script = [kept(*HELLO), kept(*HELLO), as_json(ANSWER)]
    client = side.client(server.url)
    for _ in range(2):
        stream = await opened(side, client)
        await side(stream.get_final)
    await side(lambda: client.chat.create("Hi", model="smol"))
    assert server.connections == 1


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_stream_without_done_is_whole_when_it_finished(
    server: ScriptedServer, side: Side, chunked: bool
) -> None:
    server.script = [streaming(chunk({"content": "Hello"}), chunk({}, "length"), chunked=chunked)]
    final = await side((await opened(side, side.client(server.url))).get_final)
    assert (final.text, final.finish_reason, final.usage) == ("Hello", "length", None)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (streaming(chunk({"content": "Hel"}), ended=False), "broke|closed"),
        (streaming(chunk({"content": "Hel"})), "before the answer was complete"),
        (streaming(chunk({"content": "Hel"}), chunked=False), "before the answer was complete"),
        (streaming(chunk({"content": "Hel"}), b"data: {not json}\n\n"), "cannot be read: expected JSON"),
        (streaming(chunk({"content": "Hel"}), b"data: [1]\n\n"), "expected a JSON object as an event, got list"),
        (streaming(chunk({"content": "Hel"}), event({"choices": [7]})), "'choices' to be a list of objects"),
        (
            streaming(chunk({"content": "Hel"}), event({"choices": [{"delta": {"content": 7}}]})),
            "'content' to be a text",
        ),
        (streaming(chunk({"content": "Hel"}), b"data: " + b"[" * 100_000 + b"\n\n"), "nested too deep|expected JSON"),
    ],
    ids=["cut", "ended", "ended without a length", "no JSON", "no object", "no choice", "no text", "deep"],
)
async def test_a_cut_stream_never_looks_whole_and_keeps_what_had_come(
    server: ScriptedServer, side: Side, answer: Answer, words: str
) -> None:
    server.script = [answer]
    client = side.client(server.url, retry=NO_WAIT)
    stream = await opened(side, client)
    texts: list[str] = []

    async def read() -> None:
        if side.kind == "async":
            async for text in stream.text_stream:
                texts.append(text)
        else:
            for text in stream.text_stream:
                texts.append(text)

    with pytest.raises(StreamInterruptedError, match=words) as caught:
        await read()
    assert texts == ["Hel"]
    assert caught.value.partial.text == "Hel"
    assert caught.value.partial.finish_reason is None
    assert isinstance(caught.value.__cause__, inferway.APIError)
    assert caught.value.request_id == "from-gateway"
    assert not caught.value.retryable
    assert len(server.seen) == 1
    assert stream.closed
    with pytest.raises(StreamInterruptedError):
        await side(stream.get_final)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.partial.text == "Hel"


async def test_an_error_inside_a_stream_is_told_with_its_code(server: ScriptedServer, side: Side) -> None:
    error = {"error": {"message": "the worker died", "type": "x", "param": "messages[0]", "code": "worker_crashed"}}
    server.script = [streaming(chunk({"content": "Hel"}), event(error), chunk({"content": "never"}))]
    stream = await opened(side, side.client(server.url))
    with pytest.raises(StreamInterruptedError, match="the worker died") as caught:
        await side(stream.get_final)
    assert (caught.value.code, caught.value.param) == ("worker_crashed", "messages[0]")
    assert caught.value.partial.text == "Hel"


@pytest.mark.parametrize(
    "failure",
    [
        Answer(raw=b""),
        Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"),
        streaming(),
        as_error(503, "queue_full"),
    ],
    ids=["no answer", "head only", "empty", "full"],
)
async def test_what_fails_before_the_first_byte_is_tried_again(
    server: ScriptedServer, side: Side, failure: Answer
) -> None:
    server.script = [failure, streaming(*HELLO)]
    stream = await opened(side, side.client(server.url, retry=NO_WAIT))
    assert (await side(stream.get_final)).text == "Hello"
    assert len(server.seen) == 2
    assert {seen.headers["idempotency-key"] for seen in server.seen} == {server.seen[0].headers["idempotency-key"]}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_refused_request_names_the_member(server: ScriptedServer, side: Side, stream: bool) -> None:
    body = {
        "error": {"message": "expected 0 to 2", "type": "invalid_request_error", "param": "temperature",
                  "code": "invalid_parameter"},
        "type": "urn:inferway:error:invalid_parameter", "code": "invalid_parameter", "status": 400,
    }  # fmt: skip
    server.script = [as_json(body, 400)]
    client = side.client(server.url)
    with pytest.raises(inferway.BadRequestError, match="expected 0 to 2") as caught:
        await side(lambda: client.chat.create("Hi", model="smol", temperature=9, stream=stream))
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_parameter")
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "answer",
    [as_json(ANSWER), Answer(200, b"x", {"Content-Type": "text/event-stream", "Content-Encoding": "gzip"})],
    ids=["JSON", "packed"],
)
async def test_an_answer_that_is_no_stream_is_refused(server: ScriptedServer, side: Side, answer: Answer) -> None:
    server.script = [answer]
    client = side.client(server.url)
    with pytest.raises(inferway.APIResponseValidationError, match=r"stream of events|Content-Encoding"):
        await opened(side, client)


@pytest.mark.parametrize(
    "limits",
    [Timeout(total=0.3), Timeout(total=None, read=0.2), Timeout(total=60, read=0.2)],
    ids=["total", "chunk", "chunk within a total"],
)
async def test_silence_and_the_end_of_the_time_cut_a_stream(
    server: ScriptedServer, side: Side, limits: Timeout
) -> None:
    server.script = [
        Answer(200, chunk({"content": "Hel"}), {"Content-Type": "text/event-stream", "Content-Length": "100000"})
    ]
    stream = await opened(side, side.client(server.url), timeout=limits)
    with pytest.raises(StreamInterruptedError, match="in time") as caught:
        await side(stream.get_final)
    assert isinstance(caught.value.__cause__, inferway.APITimeoutError)
    assert caught.value.partial.text == "Hel"


async def test_a_dripping_server_is_ended_by_the_total_time(server: ScriptedServer, side: Side) -> None:
    server.script = [Answer(headers={"Content-Type": "text/event-stream"}, drip=b": still here\n\n")]
    stream = await opened(side, side.client(server.url), timeout=0.4)
    with pytest.raises(StreamInterruptedError, match="in time"):
        await side(stream.get_final)


async def test_a_stream_is_no_longer_than_the_caller_accepts(server: ScriptedServer, side: Side) -> None:
    server.script = [Answer(headers={"Content-Type": "text/event-stream"}, drip=b": " + b"x" * 5000 + b"\n\n")]
    stream = await opened(side, side.client(server.url), max_response_bytes=50_000)
    with pytest.raises(StreamInterruptedError, match="max_response_bytes, 50000"):
        await side(stream.get_final)


class LongServer:
    """Begins a stream, and tells when the client has gone."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        first = chunk({"content": "Hel"})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 100000\r\n\r\n" + first)
        with contextlib.suppress(ConnectionError):
            await reader.read(1)
        self.gone.set()
        writer.close()


async def leave_by_close(client: Any, asynchronous: bool) -> None:
    if asynchronous:
        stream = await client.chat.create("Hi", model="smol", stream=True)
        await stream.close()
        await stream.close()
        with pytest.raises(StreamInterruptedError, match="was closed before"):
            await stream.get_final()
    else:
        stream = client.chat.create("Hi", model="smol", stream=True)
        stream.close()
        stream.close()
        with pytest.raises(StreamInterruptedError, match="was closed before"):
            stream.get_final()


async def leave_by_block(client: Any, asynchronous: bool) -> None:
    if asynchronous:
        async with await client.chat.create("Hi", model="smol", stream=True) as stream:
            assert (await anext(stream)).text == "Hel"
    else:
        with client.chat.create("Hi", model="smol", stream=True) as stream:
            assert next(stream).text == "Hel"


async def leave_by_dropping(client: Any, asynchronous: bool) -> None:
    if asynchronous:
        stream = await client.chat.create("Hi", model="smol", stream=True)
    else:
        stream = client.chat.create("Hi", model="smol", stream=True)
    del stream
    gc.collect()


@pytest.mark.parametrize("leave", [leave_by_close, leave_by_block, leave_by_dropping])
async def test_leaving_a_stream_closes_its_connection(side: Side, leave: Callable[[Any, bool], Any]) -> None:
    long = LongServer()
    async with await asyncio.start_server(long, "127.0.0.1", 0) as listener:
        client = side.client(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        if side.kind == "async":
            await leave(client, True)
        else:
            await asyncio.to_thread(lambda: asyncio.run(leave(client, False)))
        await asyncio.wait_for(long.gone.wait(), 10)


async def test_cancelling_whoever_reads_closes_the_connection() -> None:
    long = LongServer()
    async with await asyncio.start_server(long, "127.0.0.1", 0) as listener:
        client = inferway.AsyncInferway(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        async with client:
            stream = await client.chat.create("Hi", model="smol", stream=True)
            reading = asyncio.create_task(stream.get_final())
            while stream.snapshot.text != "Hel":
                await asyncio.sleep(0.001)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert stream.closed
            await asyncio.wait_for(long.gone.wait(), 10)
            assert stream.snapshot.text == "Hel"


async def test_a_callers_own_client_streams_too(server: ScriptedServer, side: Side) -> None:
    server.script = [streaming(*HELLO), as_error(400, "invalid_parameter"), streaming(chunk({"content": "Hel"}))]
    own = httpx.Client() if side.kind == "sync" else httpx.AsyncClient()
    client = side.client(server.url, http_client=own)
    assert (await side((await opened(side, client)).get_final)).text == "Hello"
    with pytest.raises(inferway.BadRequestError):
        await opened(side, client)
    stream = await opened(side, client)
    with pytest.raises(StreamInterruptedError):
        await side(stream.get_final)


async def test_hooks_and_raw_responses_see_a_stream(server: ScriptedServer, side: Side) -> None:
    server.script = [streaming(*HELLO), as_json(ANSWER)]
    seen: list[Any] = []
    client = side.client(server.url, on_response=seen.append)
    raw = await side(lambda: client.with_raw_response.chat.create("Hi", model="smol", stream=True))
    assert raw.headers["content-type"] == "text/event-stream"
    assert (await side(raw.parse().get_final)).text == "Hello"
    raw = await side(lambda: client.with_raw_response.chat.create("Hi", model="smol"))
    assert raw.parse().text == "Hello"
    assert [answered.status_code for answered in seen] == [200, 200]


async def test_a_hook_that_fails_leaves_no_stream_open(side: Side) -> None:
    def fail(_: Any) -> None:
        raise ValueError("made to fail")

    long = LongServer()
    async with await asyncio.start_server(long, "127.0.0.1", 0) as listener:
        client = side.client(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", on_response=fail)
        begin = partial(client.chat.create, "Hi", model="smol", stream=True)
        with pytest.raises(ValueError, match="made to fail"):
            await (begin() if side.kind == "async" else asyncio.to_thread(begin))
        await asyncio.wait_for(long.gone.wait(), 10)


# --- tools and formats -------------------------------------------------------------------------------------------


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int | None = None


class Weather(BaseModel):
    """Tell the weather of a place."""

    place: str = Field(description="a town")


def said(content: str | None, finish: str = "stop", **message: Any) -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return as_json({**ANSWER, "choices": [choice]})


@pytest.mark.parametrize(
    ("wanted", "content", "parsed"),
    [
        (Person, '{"name": "Ada", "age": 36}', Person(name="Ada", age=36)),
        (list[int], "[1, 2]", [1, 2]),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a": 1}', {"a": 1}),
        ("json", '{"b": []}', {"b": []}),
        ({"type": "json_object"}, '{"b": []}', {"b": []}),
        ("text", "plain", None),
    ],
    ids=["model", "list", "schema", "json", "wire", "text"],
)
async def test_a_format_is_sent_and_the_answer_read_by_it(
    server: ScriptedServer, side: Side, wanted: Any, content: str, parsed: Any
) -> None:
    streamed = streaming(chunk({"content": content[:3]}), chunk({"content": content[3:]}), chunk({}, "stop"), DONE)
    server.script = [said(content), streamed]
    client = side.client(server.url)
    found = await side(lambda: client.chat.create("Who?", model="smol", response_format=wanted))
    assert found.parsed == parsed
    final = await side((await opened(side, client, response_format=wanted)).get_final)
    assert final.parsed == parsed


async def test_a_pydantic_model_becomes_a_closed_schema(server: ScriptedServer, side: Side) -> None:
    server.script = [said('{"name": "A')]
    client = side.client(server.url)
    found = await side(lambda: client.chat.create("Who?", model="smol", response_format=Person))
    sent = server.seen[0].json["response_format"]
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["name"] == "Person"
    assert sent["json_schema"]["schema"]["additionalProperties"] is False
    assert sent["json_schema"]["schema"]["required"] == ["name"]
    with pytest.raises(inferway.APIResponseValidationError, match="not of the form"):
        _ = found.parsed


async def test_an_answer_that_was_cut_says_so_when_it_is_read(server: ScriptedServer, side: Side) -> None:
    server.script = [said('{"name": "A', "length")]
    client = side.client(server.url)
    found = await side(lambda: client.chat.create("Who?", model="smol", response_format="json"))
    with pytest.raises(inferway.APIResponseValidationError, match="cut at max_tokens"):
        _ = found.parsed


TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "Weather", "arguments": '{"place": "Oslo"}'}}


async def test_tools_are_models_or_mappings_and_their_calls_are_typed(server: ScriptedServer, side: Side) -> None:
    plain = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    clock = {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    server.script = [said(None, "tool_calls", tool_calls=[TOOL_CALL, clock])]
    client = side.client(server.url)
    found = await side(lambda: client.chat.create("Oslo?", model="smol", tools=[Weather, plain], tool_choice=Weather))
    sent = server.seen[0].json
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["Weather", "clock"]
    assert sent["tools"][0]["function"]["description"] == "Tell the weather of a place."
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "Weather"}}
    assert [call.parsed for call in found.tool_calls] == [Weather(place="Oslo"), {}]
    assert (found.text, found.finish_reason, found.parsed) == ("", "tool_calls", None)
    assert found.message.to_dict()["tool_calls"][0] == TOOL_CALL


async def test_tool_calls_come_in_pieces(server: ScriptedServer, side: Side) -> None:
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "Weather", "arguments": ""}}
    server.script = [
        streaming(
            chunk({"role": "assistant", "content": None, "tool_calls": [first]}),
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"place": '}}]}),
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]}),
            chunk({}, "tool_calls"),
            DONE,
        )
    ]
    stream = await opened(side, side.client(server.url), tools=[Weather])
    events = await side.all(stream)
    assert events == [
        ToolCallDelta(0, "call_1", "Weather", ""),
        ToolCallDelta(0, "call_1", "Weather", '{"place": '),
        ToolCallDelta(0, "call_1", "Weather", '"Oslo"}'),
        Finish("tool_calls"),
    ]
    assert stream.snapshot.tool_calls[0].parsed == Weather(place="Oslo")
    assert stream.snapshot.message.content is None


async def test_several_answers_in_one_stream_are_kept_apart(server: ScriptedServer, side: Side) -> None:
    server.script = [
        streaming(
            chunk({"content": "a"}), chunk({"content": "x"}, index=1), chunk({}, "stop"),
            chunk({"content": "y"}, index=1), chunk({}, "length", index=1), DONE,
        )
    ]  # fmt: skip
    stream = await opened(side, side.client(server.url), n=2)
    assert Finish("length", 1) in await side.all(stream)
    assert [choice.message.content for choice in stream.snapshot.choices] == ["a", "xy"]


async def test_logprobs_are_kept(server: ScriptedServer, side: Side) -> None:
    told = {"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}
    choice = {**ANSWER["choices"][0], "logprobs": {"content": [told]}}  # type: ignore[index]
    server.script = [as_json({**ANSWER, "choices": [choice]})]
    client = side.client(server.url)
    found = await side(lambda: client.chat.create("Hi", model="smol", logprobs=True, top_logprobs=0))
    assert found.choices[0].logprobs == (told,)


# --- completions -------------------------------------------------------------------------------------------------


async def test_a_completion_goes_on_with_a_text(server: ScriptedServer, side: Side) -> None:
    whole = {**ANSWER, "choices": [{"index": 0, "text": " world", "finish_reason": "stop"}]}
    pieces = [
        event({**HEAD, "choices": [{"index": 0, "text": text, "finish_reason": None}]}) for text in (" wor", "ld")
    ]
    end = event({**HEAD, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
    server.script = [as_json(whole), streaming(*pieces, end, DONE)]
    client = side.client(server.url)
    found = await side(lambda: client.completions.create("Hello", model="smol", echo=False, stop=("\n",)))
    assert (found.text, found.finish_reason, found.usage) == (" world", "stop", Usage(3, 2, 5, 1))
    assert server.seen[0].json == {"model": "smol", "prompt": "Hello", "echo": False, "stop": ["\n"]}
    stream = await side(lambda: client.completions.create([1, 2], model="smol", stream=True))
    assert await side.all(stream.text_stream) == [" wor", "ld"]
    assert (stream.snapshot.text, stream.snapshot.finish_reason) == (" world", "stop")


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": ""}, inferway.ConfigurationError, "model's name"),
        ({"messages": {"role": "user"}}, inferway.InvalidInputError, "list of messages or a text, got dict"),
        ({"messages": ["Hi"]}, inferway.InvalidInputError, r"messages\[0\] expects a mapping"),
        ({"messages": [{"role": "user", "content": {1}}]}, inferway.InvalidInputError, "cannot be written as JSON"),
        ({"response_format": "xml"}, inferway.ConfigurationError, "response_format expects"),
        ({"response_format": threading.Lock}, inferway.ConfigurationError, "no JSON schema|response_format"),
        ({"tools": ["clock"]}, inferway.ConfigurationError, "a tool is"),
        ({"tool_choice": 3}, inferway.ConfigurationError, "tool_choice expects"),
        ({"temprature": 1}, TypeError, "unexpected keyword argument: temprature"),
    ],
)
async def test_what_cannot_be_sent_is_refused_before_it_is(
    server: ScriptedServer, side: Side, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    client = side.client(server.url)
    with pytest.raises(error, match=words):
        await side(lambda: client.chat.create(**{"messages": "Hi", "model": "smol", **arguments}))
    assert server.seen == []


@pytest.mark.parametrize(
    "body",
    [[], {"choices": None}, {"choices": [{"message": None}]}, {"choices": [{"message": {"content": 3}}]},
     {"choices": [], "usage": 3}],
    ids=["list", "no choices", "no message", "no text", "no usage"],
)  # fmt: skip
async def test_an_answer_of_another_form_is_refused(server: ScriptedServer, side: Side, body: Any) -> None:
    server.script = [as_json(body)]
    client = side.client(server.url)
    with pytest.raises(inferway.APIResponseValidationError):
        await side(lambda: client.chat.create("Hi", model="smol"))


def test_messages_are_plain_values() -> None:
    assert ChatMessage("user", "Hi").to_dict() == {"role": "user", "content": "Hi"}
    assert Seen("POST", "/", {}, b"{}").json == {}
