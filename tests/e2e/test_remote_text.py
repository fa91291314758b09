"""A language model on another gateway, asked through this one: OpenAI's package and our client, whole and in pieces."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from inferway import BadRequestError, ChatCompletion, Inferway, StreamInterruptedError
from live import LiveGateway, run_gateway

MADE = Path(__file__).parents[2] / ".cache" / "inferway-models"
LIMIT_S = 60.0
LONG: dict[str, Any] = {"max_tokens": 1500, "temperature": 0, "extra_body": {"ignore_eos": True}}
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
SHORT: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    },
}


@dataclass
class Pair:
    """A gateway, and the one behind it that has the models."""

    front: LiveGateway
    back: LiveGateway
    client: Inferway
    openai: openai.OpenAI


def write_remote(repository: Path, name: str, text: str, version: int = 1) -> None:
    folder = repository / name / str(version)
    folder.mkdir(parents=True)
    (folder / "remote.toml").write_text(text)


@contextmanager
def run_pair(root: Path, model: str) -> Iterator[Pair]:
    if not (MADE / model).is_dir():
        pytest.skip(f"examples/models/make_models.py --only {model} makes the model")
    shutil.copytree(MADE / model, root / "back" / "small" / "1")
    (root / "front").mkdir()
    with run_gateway(root / "back", root / "back-state") as back:
        secret = root / "secret"
        secret.write_text(back.make_key("infer", models=["small"]))
        secret.chmod(0o600)
        (root / "upstreams.toml").write_text(
            f'[[upstreams]]\nname = "llm"\nprotocol = "openai"\nendpoints = [{{ url = "{back.url}/v1" }}]\n'
            'secret = { file = "secret" }\ntimeout_s = 60\n'
        )
        toml = 'upstream = "llm"\nmodel = "small"\noperation = "chat"\n'
        write_remote(root / "front", "far", toml)
        write_remote(root / "front", "short", toml + "[parameters]\nmax_tokens = 2\ntemperature = 0\n")
        write_remote(root / "front", "gone", toml.replace("small", "missing"))
        with run_gateway(root / "front", root / "state", "--upstreams", str(root / "upstreams.toml")) as front:
            key = front.make_key("infer", "read")
            with (
                Inferway(front.url, api_key=key) as client,
                openai.OpenAI(base_url=f"{front.url}/v1", api_key=key, max_retries=0) as theirs,
            ):
                yield Pair(front, back, client, theirs)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with run_pair(tmp_path_factory.mktemp("pair"), "smollm2") as running:
        yield running


def metric(gateway: LiveGateway, name: str, model: str) -> float:
    status, text, _ = gateway.call("GET", "/metrics")
    assert status == 200
    found = re.search(rf'^inferway_generation_{name}(?:_total)?{{model="{model}",version="1"}} (\S+)$', str(text), re.M)
    assert found is not None, name
    return float(found[1])


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def tokens(usage: Any) -> tuple[int, int, int]:
    """What an answer took; how much of it was still remembered there differs from one call to the next."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def test_both_clients_get_what_the_other_gateway_says(pair: Pair) -> None:
    with openai.OpenAI(base_url=f"{pair.back.url}/v1", api_key=pair.back.admin_key) as direct:
        near = direct.chat.completions.create(model="small", messages=HELLO, **SHORT)
    raw = pair.openai.chat.completions.with_raw_response.create(model="far", messages=HELLO, **SHORT)
    far = raw.parse()
    assert far.choices[0].message == near.choices[0].message
    assert (far.model, far.choices[0].finish_reason) == ("far", near.choices[0].finish_reason)
    assert tokens(far.usage) == tokens(near.usage)
    assert raw.headers["inferway-upstream-attempts"] == "1"
    assert raw.headers["inferway-model-version"] == "1"
    ours = pair.client.chat.create("Say hello.", model="far", **SHORT)
    assert ours.text == near.choices[0].message.content
    assert ours.model == "far"


def test_a_stream_is_the_same_answer_in_pieces(pair: Pair) -> None:
    whole = pair.client.chat.create("Say hello.", model="far", **SHORT)
    stream = pair.openai.chat.completions.create(
        model="far", messages=HELLO, stream=True, stream_options={"include_usage": True}, **SHORT
    )
    assert stream.response.headers["inferway-upstream-attempts"] == "1"
    chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {"far"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.finish_reason
    assert tokens(chunks[-1].usage) == tokens(whole.usage)
    unasked = list(pair.openai.chat.completions.create(model="far", messages=HELLO, stream=True, **SHORT))
    assert all(chunk.usage is None and chunk.choices for chunk in unasked)
    with pair.client.chat.create("Say hello.", model="far", stream=True, **SHORT) as ours:
        final = ours.get_final()
    assert (final.text, final.model, tokens(final.usage)) == (whole.text, "far", tokens(whole.usage))


def test_completions_are_sent_on_as_well(pair: Pair) -> None:
    whole = pair.openai.completions.create(model="far", prompt=["One, two,", "A, b,"], n=2, max_tokens=3, seed=1)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    one = pair.client.completions.create("One, two,", model="far", max_tokens=3, temperature=0)
    pieces = pair.openai.completions.create(model="far", prompt="One, two,", max_tokens=3, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == one.text


def test_tools_and_schemas_are_heeded_there(pair: Pair) -> None:
    call: dict[str, Any] = {"messages": HELLO, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 60}
    whole = pair.openai.chat.completions.create(model="far", temperature=0, **call)
    [made] = whole.choices[0].message.tool_calls or []
    assert made.type == "function"
    assert made.function.name == "weather"
    assert set(json.loads(made.function.arguments)) == {"city"}
    assert whole.choices[0].finish_reason == "tool_calls"
    with pair.client.chat.create(
        HELLO, model="far", stream=True, tools=[WEATHER["function"]], tool_choice="required", max_tokens=60
    ) as stream:
        final = stream.get_final()
    assert [tool.name for tool in final.tool_calls] == ["weather"]

    class Fruit(pydantic.BaseModel):
        colour: str = pydantic.Field(max_length=8)
        ripe: bool

    answer = pair.client.chat.create("A fruit?", model="far", response_format=Fruit, max_tokens=60, temperature=0)
    assert isinstance(answer.parsed, Fruit)


def test_the_packages_parameters_hold_where_the_caller_says_nothing(pair: Pair) -> None:
    usage = pair.client.chat.create("Say hello.", model="short").usage
    assert usage is not None
    assert usage.completion_tokens == 2
    longer = pair.openai.chat.completions.create(model="short", messages=HELLO, max_completion_tokens=4)
    assert longer.usage is not None
    assert longer.usage.completion_tokens == 4


def test_what_the_other_gateway_refuses_is_told_in_its_words_without_its_address(pair: Pair) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        pair.openai.chat.completions.create(model="far", messages=HELLO, max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"
    assert "upstream 'llm' refused the request: " in caught.value.message
    assert pair.back.url.removeprefix("http://") not in str(caught.value.body)
    assert caught.value.response.headers["inferway-upstream-attempts"] == "1"
    assert caught.value.response.headers["x-should-retry"] == "false"
    image: list[Any] = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}
    ]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            pair.openai.chat.completions.create(model="far", messages=image, stream=stream)
        assert caught.value.param == "messages[0].content[0]"
        assert "the model reads text alone" in caught.value.message
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="does not have the model") as failed:
            pair.openai.chat.completions.create(model="gone", messages=HELLO, stream=stream)
        assert (failed.value.status_code, failed.value.code) == (502, "upstream_failed")
    with pytest.raises(BadRequestError, match="gives embeddings"):
        pair.client.embed("x", model="far")
    with pytest.raises(openai.NotFoundError):
        pair.openai.chat.completions.create(model="far:adapter", messages=HELLO)


def test_it_is_listed_as_a_model_that_writes_texts(pair: Pair) -> None:
    listed = {model.id: model for model in pair.openai.models.list()}
    assert listed["far"].model_dump()["task"] == "generate"


def test_a_caller_who_leaves_frees_the_place_on_the_other_gateway(pair: Pair) -> None:
    before = metric(pair.back, "cancelled", "small")
    stream = pair.openai.chat.completions.create(model="far", messages=HELLO, stream=True, **LONG)
    next(iter(stream))
    assert metric(pair.back, "running", "small") == metric(pair.front, "running", "far") == 1
    stream.close()
    until(lambda: metric(pair.back, "running", "small") == metric(pair.front, "running", "far") == 0)
    assert metric(pair.back, "cancelled", "small") == before + 1
    assert metric(pair.front, "cancelled", "far") == 1
    hurried = pair.openai.with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        hurried.chat.completions.create(model="far", messages=HELLO, **LONG)
    until(lambda: metric(pair.back, "cancelled", "small") == before + 2)
    until(lambda: metric(pair.back, "running", "small") == 0)


def test_the_callers_deadline_ends_a_stream_on_both(pair: Pair) -> None:
    headers = {"Inferway-Timeout-Ms": "1500"}
    stream = pair.openai.chat.completions.create(
        model="far", messages=HELLO, stream=True, extra_headers=headers, **LONG
    )
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "deadline_exceeded"
    until(lambda: metric(pair.back, "running", "small") == 0)


def test_what_was_said_and_how_soon_is_counted(pair: Pair) -> None:
    before = {name: metric(pair.front, name, "far") for name in ("prompt_tokens", "completion_tokens", "requests")}
    first = metric(pair.front, "first_token_seconds_count", "far")
    usage = pair.client.chat.create("Say hello.", model="far", **SHORT).usage
    assert usage is not None
    with pair.client.chat.create("Say hello.", model="far", stream=True, **SHORT) as stream:
        stream.get_final()
    after = {name: metric(pair.front, name, "far") - count for name, count in before.items()}
    assert after["completion_tokens"] == 2 * usage.completion_tokens
    assert after["prompt_tokens"] == 2 * usage.prompt_tokens
    assert after["requests"] == 2
    assert metric(pair.front, "first_token_seconds_count", "far") == first + 1


def test_a_gateway_that_dies_ends_its_streams_typed(tmp_path: Path) -> None:
    with run_pair(tmp_path, "smollm2") as pair:
        chunks = iter(pair.openai.chat.completions.create(model="far", messages=HELLO, stream=True, **LONG))
        with pair.client.chat.create("Say hello.", model="far", stream=True, **LONG) as stream:
            while not stream.snapshot.text:
                next(stream)
            next(chunks)
            pair.back.process.kill()
            with pytest.raises(StreamInterruptedError) as caught:
                stream.get_final()
        with pytest.raises(openai.APIError) as told:
            list(chunks)
        assert told.value.code == caught.value.code == "upstream_failed"
        assert "broke off before its answer was complete" in told.value.message
        assert caught.value.request_id
        assert isinstance(caught.value.partial, ChatCompletion)
        assert caught.value.partial.text
        for stream_too in (False, True):
            with pytest.raises(openai.InternalServerError, match="could not be connected to") as failed:
                pair.openai.chat.completions.create(model="far", messages=HELLO, stream=stream_too)
            assert failed.value.response.headers["x-should-retry"] == "false"
            assert int(failed.value.response.headers["inferway-upstream-attempts"]) >= 1
            assert pair.back.url.removeprefix("http://") not in failed.value.message
        assert metric(pair.front, "running", "far") == 0
