"""An engine in a process of its own: the same answers, and its death is nobody else's."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from inferway_gateway.backends.footprint import MemoryWatch
from inferway_gateway.backends.language.backend import weigh_language
from inferway_gateway.backends.language.generator import Generator
from inferway_gateway.backends.language.process import ProcessLink
from inferway_gateway.backends.text.isolated import IsolatedTokenizer
from inferway_gateway.backends.worker import breaker
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.errors import (
    ModelExecutionError,
    ModelFailingError,
    ModelLoadError,
    ModelNotReadyError,
    WorkerCrashedError,
)
from inferway_gateway.core.generation import Constraint, GenerationParameterError, Sampling
from inferway_gateway.core.model_config import GenerationOptions, ModelConfig

from .conftest import OpenModel, ask, folder_of, until

MIB = 1 << 20
PROMPT = (5, 17, 40)


def link_of(generator: Generator) -> ProcessLink:
    link = generator._link
    assert isinstance(link, ProcessLink)
    return link


def lives(pid: int | None) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_answers_are_those_of_an_engine_in_the_gateway(open_isolated: OpenModel, tiny: Generator) -> None:
    isolated = (await open_isolated()).generator
    for members in (
        {},
        {"logprobs": 2},
        {"sampling": Sampling(temperature=1.0, seed=7, logit_bias={5: 1.5})},
        {"stop": ("att",)},
        {"constraint": Constraint("choice", '["yes", "no"]')},
    ):
        here, there = await ask(tiny, **members), await ask(isolated, **members)
        assert (there.tokens, there.text, there.logprobs) == (here.tokens, here.text, here.logprobs)
        assert (there.last.finish_reason, there.last.usage) == (here.last.finish_reason, here.last.usage)
    with pytest.raises(GenerationParameterError) as caught:
        await ask(isolated, constraint=Constraint("regex", "(a"))
    assert caught.value.param == "guided_regex"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL], ids=["crash", "kill"])
async def test_a_process_that_dies_ends_its_streams_and_is_started_again(
    open_isolated: OpenModel, tiny: Generator, number: int
) -> None:
    events: list[str] = []
    executor = await open_isolated(events=events)
    generator, expected = executor.generator, await ask(tiny)
    first = link_of(generator).pid
    assert first is not None
    streams = [asyncio.create_task(ask(generator, max_tokens=1900, ignore_end=True)) for _ in range(3)]
    elsewhere = asyncio.create_task(ask(tiny, max_tokens=500, ignore_end=True))
    await until(lambda: generator.stats.running == 3)
    os.kill(first, number)
    for outcome in await asyncio.gather(*streams, return_exceptions=True):
        assert isinstance(outcome, WorkerCrashedError)
    assert executor.problem() is not None
    with pytest.raises(ModelNotReadyError):
        await ask(generator, (1, 2))
    assert len((await elsewhere).tokens) == 500
    await until(lambda: executor.problem() is None)
    assert link_of(generator).pid != first
    assert (await ask(generator)).tokens == expected.tokens
    assert events == ["worker_crashed"]


@pytest.mark.slow
async def test_a_process_that_dies_again_and_again_is_left_alone_for_a_while(
    open_isolated: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "OPEN_S", 1.5)
    events: list[str] = []
    executor = await open_isolated(events=events)
    generator, link = executor.generator, link_of(executor.generator)
    expected = await ask(generator, PROMPT)

    async def kill() -> None:
        await until(lambda: link.pid is not None)
        assert link.pid is not None
        os.kill(link.pid, signal.SIGKILL)
        await until(lambda: link.pid is None)

    for _ in range(3):
        assert link.stats.breaker == "closed"
        await kill()
    await until(lambda: link.stats.breaker == "open")
    with pytest.raises(ModelFailingError) as caught:
        await ask(generator, PROMPT)
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= 1.5
    assert "held back" in (executor.problem() or "")
    assert link.pid is None  # nor is it started meanwhile

    await until(lambda: executor.problem() is None)
    assert link.stats.breaker == "half_open"
    trial = asyncio.create_task(ask(generator, PROMPT, max_tokens=1900, ignore_end=True))
    await until(lambda: generator.stats.running == 1)
    with pytest.raises(ModelFailingError):
        await ask(generator, PROMPT)  # one at a time
    await kill()
    assert isinstance((await asyncio.gather(trial, return_exceptions=True))[0], WorkerCrashedError)
    await until(lambda: link.stats.breaker == "open")

    await until(lambda: executor.problem() is None)
    left = asyncio.create_task(ask(generator, PROMPT, max_tokens=1900, ignore_end=True))
    await until(lambda: generator.stats.running == 1)
    left.cancel()
    await asyncio.wait((left,))
    assert (await ask(generator, PROMPT)).tokens == expected.tokens  # who leaves makes room for the next trial
    assert link.stats.breaker == "closed"
    both = await asyncio.gather(ask(generator, PROMPT), ask(generator, PROMPT))
    assert [whole.tokens for whole in both] == [expected.tokens] * 2
    assert [event for event in events if event != "worker_crashed"] == [
        "breaker_opened",
        "breaker_opened",
        "breaker_closed",
    ]
    assert events.count("worker_crashed") == link.stats.crashes == 4
    assert link.stats.processes == 1
    assert link.resident_bytes > 1 << 20


async def test_a_process_ends_with_its_model(open_isolated: OpenModel) -> None:
    executor = await open_isolated()
    pid = link_of(executor.generator).pid
    assert lives(pid)
    going_on = asyncio.create_task(ask(executor.generator, max_tokens=1900, ignore_end=True))
    await until(lambda: executor.generator.stats.running == 1)
    await executor.close()
    assert not lives(pid)
    with pytest.raises(Exception, match="unloaded"):
        await going_on


async def test_a_stream_that_is_left_frees_its_slot_in_the_process(open_isolated: OpenModel) -> None:
    generator = (await open_isolated()).generator
    stream = asyncio.create_task(ask(generator, max_tokens=1900, ignore_end=True))
    await until(lambda: generator.stats.running == 1)
    stream.cancel()
    await asyncio.wait((stream,))
    await until(lambda: generator.stats.freed_after_steps.count == 1)
    assert sum(generator.stats.freed_after_steps.counts[:3]) == 1
    assert generator.stats.kv_bytes < 1900 * 256


async def test_what_the_process_refuses_is_told(open_isolated: OpenModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folder_of("tiny-llm"), folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["head_size"] = 32
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"expected \[batch, 2, tokens, 32\]"):
        await open_isolated(folder)


async def test_a_tokenizer_without_end_keeps_nobody_waiting_but_its_own_callers(
    open_isolated: OpenModel, tmp_path: Path
) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(folder_of("tiny-llm"), folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "a+a+a+b"}, "behavior": "Isolated", "invert": False
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document))
    generator = (await open_isolated(folder)).generator
    generator._tokenizer._limit_s = 0.5
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    turning = asyncio.create_task(turn())
    with pytest.raises(ModelExecutionError, match="longer than"):
        await generator.encode("a" * 1900)
    turning.cancel()
    assert turns > 100
    assert await generator.encode("x") != []


async def test_the_footprint_is_of_all_its_processes_with_keys_and_values_at_their_most(
    open_isolated: OpenModel,
) -> None:
    """What the budget counts: the engine, its tokenizer's processes, and the memory that answers fill later."""
    small, large = await open_isolated(kv_cache_bytes=8 * MIB), await open_isolated(kv_cache_bytes=72 * MIB)
    footprint, more = small.footprint(), large.footprint()
    assert footprint is not None
    assert more is not None
    beside = IsolatedTokenizer((folder_of("tiny-llm") / "tokenizer.json").read_bytes(), "generator").footprint()
    assert beside is not None
    pid = link_of(small.generator).pid
    with MemoryWatch(pid) as watch:
        assert footprint.resident_bytes > watch.read().proportional + beside.resident_bytes / 2
    assert footprint.peak_bytes > footprint.resident_bytes + 8 * MIB
    assert 40 * MIB < more.peak_bytes - footprint.peak_bytes < 90 * MIB


def test_keys_and_values_are_counted_before_the_first_load() -> None:
    folder = folder_of("tiny-llm")
    said = ModelConfig(generation=GenerationOptions(kv_cache_bytes=123 * MIB))
    assert weigh_language(Artifact("m", 1, folder / "genai_config.json", said)) == 123 * MIB
    assert weigh_language(Artifact("m", 1, folder / "genai_config.json", ModelConfig())) > MIB
