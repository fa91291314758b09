"""Chat and completions of models on other servers, on our own server: bodies, streams, errors, leaving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from generating import WAIT_S, events, serving
from inferway_contract import models as contract
from inferway_gateway.core.catalog import AliasRecord, AliasSpec
from inferway_gateway.core.errors import GatewayError, InvalidParameterError, UpstreamError
from inferway_gateway.core.generation import GenerationStats, Usage
from inferway_gateway.core.relay import RelayPiece, RelayRequest
from inferway_gateway.core.routing import Router
from inferway_gateway.http.openai import chat
from inferway_gateway.http.openai.relay import MOST_ANSWERS

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COUNTS = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0}}
TOLD = RelayPiece((), Usage(3, 2), COUNTS)


class FakeRelay:
    """Gives the pieces it was made with; an error among them is raised in its turn."""

    task = "generate"

    def __init__(self, *pieces: RelayPiece | GatewayError, gate: asyncio.Event | None = None) -> None:
        self.pieces: Sequence[RelayPiece | GatewayError] = pieces
        self.gate = gate
        self.stats = GenerationStats()
        self.asked: list[RelayRequest] = []
        self.waiting = asyncio.Event()
        self.left = asyncio.Event()

    async def ask(self, request: RelayRequest) -> AsyncGenerator[RelayPiece]:
        self.asked.append(request)
        over = False
        try:
            if self.gate is not None:
                self.waiting.set()
                await self.gate.wait()
            for piece in self.pieces:
                if isinstance(piece, GatewayError):
                    raise piece
                yield piece
            over = True
        finally:
            if not over:
                self.left.set()


def delta(content: str, index: int = 0, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": {"content": content}, "logprobs": None, "finish_reason": reason}


def whole(content: str, index: int = 0) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": "stop"}


async def test_a_whole_answer_bears_the_name_that_was_asked_for() -> None:
    relay = FakeRelay(RelayPiece([whole("Hello")], Usage(3, 2), COUNTS, attempts=2))
    async with serving({"m": relay}) as client:
        response = await client.post(CHAT, json=HELLO)
    assert response.status_code == 200
    assert response.headers["inferway-upstream-attempts"] == "2"
    answer = contract.ChatCompletion.model_validate(response.json())
    assert (answer.model, answer.choices[0].message.content) == ("m", "Hello")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    assert answer.id.startswith("chatcmpl-")


async def test_an_answer_without_usage_tells_none() -> None:
    async with serving({"m": FakeRelay(RelayPiece([whole("Hello")]))}) as client:
        answer = (await client.post(CHAT, json=HELLO)).json()
        asked = {**HELLO, "stream_options": {"include_usage": True}}
        streamed = await events(client, CHAT, asked)
    assert "usage" not in answer
    assert contract.ChatCompletion.model_validate(answer).usage is None
    assert all(one["usage"] is None for one in streamed[:-1])


async def test_each_choice_has_events_of_its_own_and_names_its_role_once() -> None:
    first = RelayPiece([delta("a"), delta("x", 1)])
    relay = FakeRelay(first, RelayPiece([delta("b", 0, "stop"), delta("y", 1, "length")]), TOLD)
    async with serving({"m": relay}) as client:
        got = await events(client, CHAT, {**HELLO, "n": 2})
        told = await events(client, CHAT, {**HELLO, "n": 2, "stream_options": {"include_usage": True}})
    assert got[-1] == told[-1] == "[DONE]"
    chunks = [contract.ChatCompletionChunk.model_validate(one) for one in got[:-1]]
    assert [(c.choices[0].index, c.choices[0].delta.content) for c in chunks] == [
        (0, "a"),
        (1, "x"),
        (0, "b"),
        (1, "y"),
    ]
    assert [c.choices[0].delta.role for c in chunks] == ["assistant", "assistant", None, None]
    assert [c.choices[0].finish_reason for c in chunks] == [None, None, "stop", "length"]
    assert len({c.id for c in chunks}) == 1
    assert told[-2]["choices"] == []
    assert told[-2]["usage"] == COUNTS
    assert "usage" not in got[0]


async def test_completions_are_told_in_their_own_shape() -> None:
    piece = {"index": 1, "text": "b", "logprobs": None, "finish_reason": "stop"}
    relay = FakeRelay(RelayPiece([piece], Usage(3, 2), COUNTS))
    body = {"model": "m", "prompt": ["x", "y"], "suffix": "s", "best_of": 2}
    async with serving({"m": relay}) as client:
        answer = contract.Completion.model_validate((await client.post(PLAIN, json=body)).json())
        got = await events(client, PLAIN, body)
        many = await client.post(PLAIN, json={"model": "m", "prompt": ["x"] * (MOST_ANSWERS + 1)})
    assert answer.choices[0].text == "b"
    assert got[0]["object"] == "text_completion"
    assert got[0]["choices"] == [piece]
    assert [asked.answers for asked in relay.asked] == [2, 2]
    assert relay.asked[0].body["suffix"] == "s"
    assert many.status_code == 400
    assert many.json()["error"]["param"] == "prompt"


async def test_a_request_arrives_as_it_was_written() -> None:
    relay = FakeRelay(RelayPiece([whole("ok")]))
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,", "detail": "low"}}
    body = {**HELLO, "messages": [{"role": "user", "content": [part]}], "priority": 3, "n": 2, "mine": {"a": [1]}}
    async with serving({"m": relay}) as client:
        response = await client.post(CHAT, json=body, headers={"Inferway-Timeout-Ms": "5000", "X-Request-Id": "r7"})
    assert response.status_code == 200
    [asked] = relay.asked
    assert asked.body == body
    assert (asked.operation, asked.answers, asked.stream, asked.priority) == ("chat", 2, False, 3)
    assert asked.deadline is not None
    assert 0 < asked.deadline - asyncio.get_running_loop().time() <= 5
    assert ("X-Request-Id", "r7") in asked.origin


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_refusal_is_not_blamed_on_another_member(stream: bool) -> None:
    relay = FakeRelay(InvalidParameterError("upstream 'up' refused the request: no"))
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}
    async with serving({"m": relay}) as client:
        response = await client.post(CHAT, json={**HELLO, "stream": stream, "response_format": form})
    assert response.status_code == 400
    assert response.json()["error"]["param"] is None
    assert response.json()["error"]["message"] == "upstream 'up' refused the request: no"
    assert relay.left.is_set()


def failure(attempts: int) -> UpstreamError:
    error = UpstreamError("upstream 'up' broke off")
    error.upstream_attempts = attempts
    return error


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_failure_before_the_first_piece_has_a_status_and_its_attempts(stream: bool) -> None:
    async with serving({"m": FakeRelay(failure(3))}) as client:
        response = await client.post(CHAT, json={**HELLO, "stream": stream})
    assert response.status_code == 502
    assert response.headers["inferway-upstream-attempts"] == "3"
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["type"] == "server_error"


async def test_a_failure_after_it_is_an_event_without_an_end() -> None:
    async with serving({"m": FakeRelay(RelayPiece([delta("a")]), failure(1))}) as client:
        got = await events(client, CHAT, HELLO)
    assert got[0]["choices"][0]["delta"]["content"] == "a"
    assert got[-1]["error"]["code"] == "upstream_failed"
    assert got[-1]["request_id"]


async def test_a_fallback_takes_over_before_the_first_piece_alone() -> None:
    router = Router(lambda: 1)
    spec = AliasSpec({1: 100.0}, fallback=(2,))
    router.put(AliasRecord("m", "stable", spec, None, 1, datetime.now(UTC), "k"))
    bad = FakeRelay(failure(2))
    good = FakeRelay(RelayPiece([delta("b", 0, "stop")]))
    async with serving({"m": {1: bad, 2: good}}, router=router) as client:
        got = await events(client, CHAT, HELLO)
        bad.pieces = (RelayPiece([delta("a")]), failure(1))
        late = await events(client, CHAT, HELLO)
    assert got[0]["choices"][0]["delta"]["content"] == "b"
    assert [one["error"]["code"] for one in late if "error" in one] == ["upstream_failed"]
    assert len(good.asked) == 1


async def test_a_stream_begins_without_a_piece_that_lets_itself_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "FIRST_PIECE_S", 0.01)
    monkeypatch.setattr(chat, "KEEP_ALIVE_S", 0.01)
    gate = asyncio.Event()
    relay = FakeRelay(RelayPiece([delta("a", 0, "stop")]), gate=gate)
    async with serving({"m": relay}) as client, client.stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
        assert response.status_code == 200
        assert "inferway-upstream-attempts" not in response.headers
        lines = response.aiter_lines()
        assert await anext(lines) == ": keep-alive"
        gate.set()
        rest = [line async for line in lines if line.startswith("data")]
    assert '"role":"assistant","content":"a"' in rest[0]
    assert rest[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_caller_who_leaves_ends_the_call(stream: bool) -> None:
    relay = FakeRelay(RelayPiece([delta("a")]), gate=asyncio.Event())
    async with serving({"m": relay}) as client:
        task = asyncio.create_task(client.post(CHAT, json={**HELLO, "stream": stream}))
        async with asyncio.timeout(WAIT_S):
            await relay.waiting.wait()
            task.cancel()
            await relay.left.wait()
        await asyncio.wait((task,))


async def test_it_has_no_adapters_and_says_that_it_writes_texts() -> None:
    async with serving({"m": FakeRelay()}) as client:
        adapter = await client.post(CHAT, json={**HELLO, "model": "m:mine"})
        listed = (await client.get("/v1/models/m")).json()
    assert adapter.status_code == 404
    assert (listed["task"], listed["max_model_len"]) == ("generate", None)
