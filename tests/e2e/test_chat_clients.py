"""Chat through clients that are not ours, to a real model: `openai`, both halves of it, and `langchain-openai`.

The model is a small one of random weights: its words mean nothing, and what holds them to a form is told by their form.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel, SecretStr

from inferway_contract import models as contract
from live import LiveGateway, run_gateway

MODELS = Path(__file__).parents[2] / ".cache" / "inferway-models"
MODEL = "tiny-llm"
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Forecast(BaseModel):
    """What the weather will be."""

    city: Literal["Bern", "Rome"]
    sunny: bool


@pytest.fixture(scope="module", params=["one process", "two fronts"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("chat")
    shutil.copytree(MODELS / MODEL, root / "models" / MODEL)
    options = () if request.param == "one process" else ("--workers", "2")
    with run_gateway(root / "models", root / "state", *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> Iterator[openai.OpenAI]:
    key = gateway.make_key("infer")
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def test_a_chat_is_answered_and_the_same_seed_answers_the_same(client: openai.OpenAI) -> None:
    def ask() -> Any:
        return client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=8, seed=7)

    answer = ask()
    [choice] = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert ask().choices[0].message.content == choice.message.content


def test_a_stream_says_the_same_as_the_whole(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks: list[ChatCompletionChunk] = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24


def test_the_stream_helper_puts_the_pieces_together(client: openai.OpenAI) -> None:
    choices = {"guided_choice": ["yes, it is", "no, it is not"]}
    with client.chat.completions.stream(model=MODEL, messages=HELLO, n=2, seed=3, extra_body=choices) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert [choice.finish_reason for choice in final.choices] == ["stop", "stop"]
    assert {choice.message.content for choice in final.choices} <= set(choices["guided_choice"])


def test_completions_logprobs_and_stop_strings(client: openai.OpenAI) -> None:
    one = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=10, temperature=0, logprobs=2)
    text = one.choices[0].text
    logprobs = one.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == text
    cut = text[len(text) // 2 : len(text) // 2 + 3]
    two = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=10, temperature=0, stop=[cut])
    assert two.choices[0].text == text[: text.index(cut)]
    assert two.choices[0].finish_reason == "stop"


def test_an_answer_keeps_to_a_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Forecast, max_tokens=60)
    assert answer.choices[0].message.parsed is not None
    assert answer.choices[0].message.parsed.city in ("Bern", "Rome")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_demanded_call_is_well_formed_also_as_a_stream(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": HELLO, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 200,
        "temperature": 0, "parallel_tool_calls": False,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.tool_calls is not None
    [call] = whole.message.tool_calls
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather"
    assert arguments["city"] in ("Bern", "Rome")
    assert 1 <= arguments["days"] <= 9
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0].message.tool_calls
    assert final is not None
    assert json.loads(final[0].function.arguments) == arguments
    # The result goes back, as every agent does it.
    followed = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=followed, max_tokens=4, tools=[WEATHER])
    assert answer.choices[0].finish_reason == "length"


def test_models_are_listed_for_whom_they_are(gateway: LiveGateway, client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "inferway"
    assert client.models.retrieve(f"{MODEL}/versions/1").id == f"{MODEL}/versions/1"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/where/else")
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.make_key("infer", models=["other"])) as stranger:
        assert list(stranger.models.list()) == []
        with pytest.raises(openai.NotFoundError):
            stranger.chat.completions.create(model=MODEL, messages=HELLO)


def test_errors_are_the_classes_that_they_are(gateway: LiveGateway, client: openai.OpenAI) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "unauthenticated"
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.make_key("read"), max_retries=0) as reader,
        pytest.raises(openai.PermissionDeniedError),
    ):
        reader.chat.completions.create(model=MODEL, messages=HELLO)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=9)
    assert (bad.value.code, bad.value.param, bad.value.type) == (
        "invalid_parameter", "temperature", "invalid_request_error",
    )  # fmt: skip
    assert bad.value.request_id
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "word " * 200_000}], stream=stream
            )
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
        assert "2048" in long.value.message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}},
                                                 "required": ["a"]}}}}}}, "response_format.json_schema.schema"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
        ({"extra_body": {"guided_grammar": "start: nothing"}}, "guided_grammar"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ],
    ids=["schema", "endless schema", "regex", "grammar", "token"],
)  # fmt: skip
def test_what_the_model_refuses_names_the_member(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=30, **change)
    assert bad.value.param == param, bad.value.message


def test_leaving_a_stream_frees_its_place(gateway: LiveGateway, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 20
    while sample(gateway, "inferway_generation_cancelled_total") < 1 or sample(gateway, "inferway_generation_running"):
        assert time.monotonic() < end
        time.sleep(0.02)


def sample(gateway: LiveGateway, name: str) -> float:
    """One metric of the model."""
    _, text, _ = gateway.call("GET", "/metrics")
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def test_the_asynchronous_half_chats_and_streams(gateway: LiveGateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.make_key("infer")) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4, temperature=0)
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=4, temperature=0, stream=True
        )
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
        assert text == answer.choices[0].message.content
        sure = {"guided_choice": ["yes"]}
        async with client.chat.completions.stream(model=MODEL, messages=HELLO, extra_body=sure) as helper:
            assert [event.type async for event in helper][-1] == "content.done"
        assert [m.id async for m in client.models.list()] == [MODEL]


def test_langchain_chats_streams_and_extracts(gateway: LiveGateway) -> None:
    model = ChatOpenAI(
        model=MODEL, base_url=f"{gateway.url}/v1", api_key=SecretStr(gateway.make_key("infer")), max_retries=0,
        temperature=0, max_completion_tokens=120,
    )  # fmt: skip
    short = model.bind(max_completion_tokens=6)
    answer = short.invoke("Say hello.")
    assert answer.response_metadata["finish_reason"] == "length"
    assert "".join(str(chunk.content) for chunk in short.stream("Say hello.")) == answer.content
    methods: tuple[Literal["function_calling", "json_schema"], ...] = ("function_calling", "json_schema")
    for method in methods:
        found = model.with_structured_output(Forecast, method=method).invoke("Sunny in Rome?")
        assert isinstance(found, Forecast)


def test_an_answer_is_as_the_contract_describes_it(gateway: LiveGateway) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 3}
    status, answer, headers = gateway.call("POST", "/v1/chat/completions", body)
    assert status == 200
    contract.ChatCompletion.model_validate(answer)
    assert headers["Inferway-Model-Version"] == "1"


def test_a_stream_ends_whole_when_the_gateway_is_told_to_end(tmp_path: Path) -> None:
    shutil.copytree(MODELS / MODEL, tmp_path / "models" / MODEL)
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with run_gateway(
        tmp_path / "models", tmp_path / "state", environment={"INFERWAY_DRAIN_TIMEOUT_S": "30"}
    ) as running:
        headers = {"Authorization": f"Bearer {running.make_key('infer')}"}
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as got:
            lines = got.iter_lines()
            first = next(lines)
            running.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert running.process.wait(30) == 0
    assert '"role":"assistant"' in first
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
