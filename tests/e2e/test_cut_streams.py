"""Streams whose other end dies: the process of the model, or the whole gateway. No cut answer looks whole."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from inferway import APIConnectionError, ChatCompletion, Inferway, StreamInterruptedError
from live import LiveGateway, run_gateway
from scripted import Side

MADE = Path(__file__).parents[2] / ".cache" / "inferway-models"
WAIT_S = 30.0
OWN = f"own-{os.getpid()}"
"""No other test's process has this name."""
LONG: dict[str, Any] = {"max_tokens": 1900, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveGateway]:
    """A gateway with one language model of the folder, which it runs itself."""
    shutil.copytree(MADE / "tiny-llm", tmp_path / "models" / "placed")
    with run_gateway(tmp_path / "models", tmp_path / "state") as running:
        yield running


@pytest.fixture(params=["sync", "async"])
async def side(request: pytest.FixtureRequest) -> AsyncIterator[Side]:
    made = Side(request.param)
    yield made
    await made.end()


def process_of(model: str) -> int:
    """The process in which the deployed model runs, by what ``ps`` shows of it."""
    title = f"inferway language {model}/1".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cmdline").read_bytes().startswith(title):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended
    [pid] = found
    return pid


async def first_text(side: Side, stream: Any) -> str:
    """Read until there is some text."""
    while not stream.snapshot.text:
        await side(lambda: next(stream) if side.kind == "sync" else anext(stream))
    text: str = stream.snapshot.text
    return text


async def test_a_model_whose_process_dies_ends_its_streams_typed_and_no_others(server: LiveGateway, side: Side) -> None:
    client = side.client(server.url, api_key=server.admin_key)
    # In a process of its own; with a format that nobody has to approve of; and slow enough to be there to be killed.
    with Inferway(server.url, api_key=server.admin_key) as deployer:
        deployer.models.deploy(
            MADE / "smollm2", name=OWN, config={"generation": {"template": "chatml"}}, progress=False
        )
    stream = await side(lambda: client.chat.create("Hi", model=OWN, stream=True, **LONG))
    other = await side(lambda: client.chat.create("Hi", model="placed", stream=True, **{**LONG, "max_tokens": 300}))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.admin_key, max_retries=0) as theirs:
        chunks = iter(theirs.completions.create(model=OWN, prompt="Hi", stream=True, **LONG))
        next(chunks)
        begun = await first_text(side, stream)
        os.kill(process_of(OWN), signal.SIGKILL)
        with pytest.raises(openai.APIError) as told:
            list(chunks)
    assert told.value.code == "worker_crashed"
    with pytest.raises(StreamInterruptedError) as caught:
        await side(stream.get_final)
    error = caught.value
    assert error.code == "worker_crashed"
    assert error.request_id
    partial = error.partial
    assert isinstance(partial, ChatCompletion)
    assert partial.text.startswith(begun)
    assert (partial.finish_reason, partial.model, partial.usage) == (None, OWN, None)
    assert (await side(other.get_final)).usage.completion_tokens == 300
    # It is started again by itself; nobody has to do anything.
    end = time.monotonic() + WAIT_S
    while True:
        try:
            answer = await side(lambda: client.chat.create("Hi", model=OWN, max_tokens=2, temperature=0))
            break
        except APIConnectionError:
            raise
        except Exception:
            assert time.monotonic() < end
    assert answer.usage.completion_tokens == 2


async def test_a_gateway_that_dies_cuts_streams_and_what_had_come_is_kept(server: LiveGateway, side: Side) -> None:
    client = side.client(server.url, api_key=server.admin_key)
    stream = await side(lambda: client.chat.create("Hi", model="placed", stream=True, **LONG))
    begun = await first_text(side, stream)
    server.process.kill()
    with pytest.raises(StreamInterruptedError) as caught:
        await side(stream.get_final)
    assert isinstance(caught.value.__cause__, APIConnectionError)
    assert caught.value.partial.text.startswith(begun)
    assert caught.value.partial.finish_reason is None
    assert stream.closed
