"""The SDK's chats and vectors against a real gateway with a real, if senseless, language model."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

import inferway
from inferway import ContentDelta, Finish, Inferway, StreamInterruptedError, Timeout, UsageReport
from live import LiveGateway, run_gateway
from scripted import Side

MADE = Path(__file__).parents[2] / ".cache" / "inferway-models"
WAIT_S = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("text")
    for name in ("tiny-llm", "minilm"):
        if not (MADE / name).is_dir():
            pytest.skip(f"examples/models/make_models.py --only {name} makes the model")
        version = root / "models" / name / "1"
        version.mkdir(parents=True)
        for file in (MADE / name).iterdir():
            (version / file.name).hardlink_to(file)
    (root / "models" / "tiny-llm" / "inferway.toml").write_text("[generation]\nmax_sequences = 2\n")
    with run_gateway(root / "models", root / "state") as running:
        yield running


@pytest.fixture(scope="module")
def key(server: LiveGateway) -> str:
    return server.make_key("infer", "read")


@pytest.fixture(params=["sync", "async"])
async def side(request: pytest.FixtureRequest) -> AsyncIterator[Side]:
    made = Side(request.param)
    yield made
    await made.end()


def running(server: LiveGateway) -> float:
    """Answers that are being written, as the gateway counts them."""
    _, text, _ = server.call("GET", "/metrics")
    found = re.findall(r"^inferway_generation_running\{[^}]*\} (\S+)$", str(text), re.MULTILINE)
    assert found, text
    return sum(map(float, found))


def until(condition: Any) -> None:
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


async def test_an_answer_is_the_same_whole_and_streamed(server: LiveGateway, key: str, side: Side) -> None:
    client = side.client(server.url, api_key=key)
    asked: dict[str, Any] = {"model": "tiny-llm", "temperature": 0, "max_tokens": 12}
    whole = await side(lambda: client.chat.create("Hi", **asked))
    stream = await side(lambda: client.chat.create("Hi", stream=True, **asked))
    events = await side.all(stream)
    assert "".join(event.text for event in events if isinstance(event, ContentDelta)) == whole.text
    assert [type(event) for event in events[-2:]] == [Finish, UsageReport]
    final = stream.snapshot
    assert (final.finish_reason, final.usage.completion_tokens) == ("length", 12)
    assert (whole.finish_reason, whole.usage.completion_tokens) == ("length", 12)
    assert final.usage.prompt_tokens == whole.usage.prompt_tokens > 0


async def test_a_seed_repeats_an_answer(server: LiveGateway, key: str, side: Side) -> None:
    client = side.client(server.url, api_key=key)
    asked: dict[str, Any] = {"model": "tiny-llm", "seed": 7, "temperature": 1, "max_tokens": 9}
    answers = [await side(lambda: client.completions.create("One", **asked)) for _ in range(2)]
    assert answers[0].text == answers[1].text != ""


def test_leaving_a_stream_frees_its_place(server: LiveGateway, key: str) -> None:
    with Inferway(server.url, api_key=key, timeout=Timeout(total=WAIT_S)) as client:
        streams = [
            client.completions.create(
                "On and on", model="tiny-llm", stream=True, max_tokens=1900, extra_body={"ignore_eos": True}
            )
            for _ in range(2)
        ]
        for stream in streams:
            next(stream)
        assert running(server) == 2
        for stream in streams:
            stream.close()
        until(lambda: running(server) == 0)
        assert client.chat.create("Hi", model="tiny-llm", max_tokens=2).finish_reason == "length"


def test_the_time_that_is_over_keeps_what_had_come(server: LiveGateway, key: str) -> None:
    with Inferway(server.url, api_key=key) as client:
        stream = client.completions.create(
            "On and on", model="tiny-llm", stream=True, max_tokens=1900, timeout=0.6, extra_body={"ignore_eos": True}
        )
        with pytest.raises(StreamInterruptedError) as caught:
            stream.get_final()
        assert caught.value.partial.text
        assert caught.value.partial.finish_reason is None
    until(lambda: running(server) == 0)


def test_what_was_generated_is_counted_under_the_names_that_operators_look_for(tmp_path: Path) -> None:
    shutil.copytree(MADE / "tiny-llm", tmp_path / "models" / "tiny-llm")
    prompt = "Once upon a time there was a model that was counted, token by token, from its first to its last."
    more = {"ignore_eos": True}
    with run_gateway(tmp_path / "models", tmp_path / "state") as server:
        with Inferway(server.url, api_key=server.admin_key) as client:
            asked: dict[str, Any] = {"model": "tiny-llm", "temperature": 0, "extra_body": more}
            answers = [client.completions.create(prompt, max_tokens=count, **asked) for count in (5, 7)]
            usages = [answer.usage for answer in answers]
            stream = client.completions.create(prompt, max_tokens=1900, stream=True, **asked)
            next(stream)
            stream.close()
        until(lambda: running(server) == 0)
        _, text, _ = server.call("GET", "/metrics")
    found = {
        (sample.name.removeprefix("inferway_generation_"), sample.labels.get("reason")): sample.value
        for family in text_string_to_metric_families(str(text))
        for sample in family.samples
        if sample.name.startswith("inferway_generation_") and not sample.name.endswith(("_bucket", "_created"))
    }
    assert all(usages)
    prompts = sum(usage.prompt_tokens for usage in usages if usage)
    cached = sum(usage.cached_tokens for usage in usages if usage)
    assert found["requests_total", None] == 3
    assert found["prompt_tokens_total", None] == prompts * 3 / 2
    assert 12 < found["completion_tokens_total", None] <= 12 + 1900
    assert found["cached_tokens_total", None] >= cached > 0
    assert found["prefix_hits_total", None] >= 1
    assert (found["finished_total", "length"], found["finished_total", "stop"]) == (2, 0)
    assert (found["running", None], found["waiting", None], found["cancelled_total", None]) == (0, 0, 1)
    assert 0 < found["kv_bytes", None] <= found["kv_limit_bytes", None]
    assert found["first_token_seconds_count", None] == 3
    assert 0 < found["first_token_seconds_sum", None] < WAIT_S
    assert 0 < found["token_seconds_count", None] <= found["completion_tokens_total", None] - 3
    assert found["freed_after_steps_count", None] == 1
    assert found["freed_after_steps_sum", None] <= 2


class Point(BaseModel):
    x: int
    label: str


async def test_even_a_senseless_model_writes_what_the_schema_says(server: LiveGateway, key: str, side: Side) -> None:
    client = side.client(server.url, api_key=key)
    letters = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema = {**letters, "additionalProperties": False}
    answer = await side(
        lambda: client.chat.create("Hi", model="tiny-llm", response_format=schema, temperature=0, max_tokens=60)
    )
    assert answer.parsed["a"] in ("x", "y")
    with pytest.raises(inferway.APIResponseValidationError, match="cut at max_tokens"):
        _ = (await side(lambda: client.chat.create("Hi", model="tiny-llm", response_format=Point, max_tokens=3))).parsed


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"n": 10_000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["x"] * 5000}, "stop"),
    ],
    ids=["temperature", "messages", "role", "n", "max_tokens", "stop"],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_names_the_member(
    server: LiveGateway, key: str, side: Side, arguments: dict[str, Any], param: str, stream: bool
) -> None:
    client = side.client(server.url, api_key=key)
    with pytest.raises(inferway.BadRequestError) as caught:
        await side(lambda: client.chat.create(**{"messages": "Hi", "model": "tiny-llm", "stream": stream, **arguments}))
    assert caught.value.param == param
    assert caught.value.attempts == 1


def test_texts_become_vectors_from_many_threads(server: LiveGateway, key: str) -> None:
    texts = [f"Sentence number {number} " + "and more " * (number % 7) for number in range(60)]
    with Inferway(server.url, api_key=key) as client:
        whole = client.embed(texts, model="minilm")
        with ThreadPoolExecutor(4) as threads:
            parts = list(threads.map(lambda text: client.embed(text, model="minilm")[0], texts))
        np.testing.assert_allclose(whole, np.stack(parts), atol=1e-5)
        ranking = client.rerank(texts[3], texts, model="minilm", top_n=1)
        assert ranking.results[0].index == 3


def test_the_terminal_command_answers_and_its_interruption_frees_the_place(server: LiveGateway, key: str) -> None:
    command = [sys.executable, "-m", "inferway_gateway", "chat", "tiny-llm", "Hi", "--url", server.url]
    environment = {"INFERWAY_API_KEY": key, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, "--max-tokens", "5"], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert re.search(r"\[5 tokens, \d+ tokens/s", done.stderr)
    with subprocess.Popen([*command, "--max-tokens", "1900"], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read(1)
        reader = threading.Thread(target=process.stdout.read, daemon=True)
        reader.start()
        process.send_signal(2)
        assert process.wait(WAIT_S) in (0, 130)
        reader.join(WAIT_S)
    until(lambda: running(server) == 0)
