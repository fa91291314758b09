"""Text models of the mock gateway, through the real SDK."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import inferway
from inferway import StreamInterruptedError
from inferway.testing import MockGateway
from scripted import Side

CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


@pytest.fixture
def gateway() -> MockGateway:
    made = MockGateway()

    @made.chat("echo")
    def echo(messages: list[dict[str, Any]]) -> str:
        return f"You said: {messages[-1]['content']}"

    @made.chat("pieces")
    def pieces(messages: list[dict[str, Any]]) -> Iterator[str]:
        yield "one "
        yield "two"

    @made.chat("breaks")
    def breaks(messages: list[dict[str, Any]]) -> Iterator[str]:
        yield "one "
        raise RuntimeError("out of words")

    @made.chat("fails")
    def fails(messages: list[dict[str, Any]]) -> str:
        raise RuntimeError("no words")

    @made.chat("tools")
    def tools(messages: list[dict[str, Any]]) -> dict[str, Any]:
        return {"content": None, "tool_calls": [CALL]}

    @made.embeddings("lengths")
    def lengths(texts: list[str]) -> list[list[float]]:
        return [[len(text), 1.0, 2.0] for text in texts]

    @made.embeddings("flat")
    def flat(texts: list[str]) -> list[float]:
        return [1.0 for _ in texts]

    return made


def made_by(side: Side, gateway: MockGateway) -> Any:
    return gateway.client() if side.kind == "sync" else gateway.async_client()


async def test_a_chat_is_answered_whole_and_in_pieces(side: Side, gateway: MockGateway) -> None:
    client = made_by(side, gateway)
    found = await side(lambda: client.chat.create("Hi", model="echo", temperature=0))
    assert (found.text, found.finish_reason) == ("You said: Hi", "stop")
    assert gateway.calls[-1].body["temperature"] == 0
    assert gateway.calls[-1].model == "echo"
    stream = await side(lambda: client.chat.create("Hi", model="pieces@stable", stream=True))
    assert await side.all(stream.text_stream) == ["one ", "two"]
    assert stream.snapshot.usage.completion_tokens == 2
    cut = await side(lambda: client.chat.create("Hi", model="echo", max_tokens=2))
    assert (cut.text, cut.finish_reason) == ("You said: ", "length")
    await side(client.close)


async def test_a_completion_is_answered_by_the_same_function(side: Side, gateway: MockGateway) -> None:
    client = made_by(side, gateway)
    found = await side(lambda: client.completions.create("Hi", model="echo"))
    assert found.text == "You said: Hi"
    stream = await side(lambda: client.completions.create("Hi", model="pieces", stream=True))
    assert (await side(stream.get_final)).text == "one two"
    await side(client.close)


async def test_tool_calls_come_through(side: Side, gateway: MockGateway) -> None:
    client = made_by(side, gateway)
    found = await side(lambda: client.chat.create("Hi", model="tools"))
    stream = await side(lambda: client.chat.create("Hi", model="tools", stream=True))
    for answer in (found, await side(stream.get_final)):
        assert [call.name for call in answer.tool_calls] == ["clock"]
        assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")
    await side(client.close)


async def test_streams_break_as_a_test_wants(side: Side, gateway: MockGateway) -> None:
    client = made_by(side, gateway)
    gateway.cut_stream(pieces=1)
    stream = await side(lambda: client.chat.create("Hi", model="pieces", stream=True))
    with pytest.raises(StreamInterruptedError) as caught:
        await side(stream.get_final)
    assert caught.value.partial.text == "one "
    stream = await side(lambda: client.chat.create("Hi", model="breaks", stream=True))
    with pytest.raises(StreamInterruptedError, match="out of words") as caught:
        await side(stream.get_final)
    assert (caught.value.code, caught.value.partial.text) == ("model_failed", "one ")
    await side(client.close)


@pytest.mark.parametrize(
    ("model", "messages", "error", "words"),
    [
        ("fails", "Hi", inferway.ModelFailedError, "no words"),
        ("breaks", "Hi", inferway.ModelFailedError, "out of words"),
        ("absent", "Hi", inferway.ModelNotFoundError, "absent"),
        ("echo", [], inferway.BadRequestError, "at least one"),
    ],
)
async def test_errors_are_those_of_a_gateway(
    side: Side, gateway: MockGateway, model: str, messages: Any, error: type[inferway.APIStatusError], words: str
) -> None:
    client = made_by(side, gateway)
    with pytest.raises(error, match=words) as caught:
        await side(lambda: client.chat.create(messages, model=model))
    if error is inferway.BadRequestError:
        assert caught.value.param == "messages"
    gateway.fail(code="queue_full")
    assert (await side(lambda: client.chat.create("Hi", model="echo"))).text == "You said: Hi"
    await side(client.close)


async def test_texts_become_vectors(side: Side, gateway: MockGateway) -> None:
    client = made_by(side, gateway)
    vectors = await side(lambda: client.embed(["a", "bcd"], model="lengths", dimensions=2))
    assert np.array_equal(vectors, np.array([[1, 1], [3, 1]], np.float32))
    with pytest.raises(inferway.ModelFailedError, match="expected"):
        await side(lambda: client.embed(["a"], model="flat"))
    with pytest.raises(inferway.NotFoundError):
        await side(lambda: client.rerank("q", ["a"], model="lengths"))
    await side(client.close)
