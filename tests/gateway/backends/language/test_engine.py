"""Answers in company: who joins, leaves, is cancelled or is broken changes nothing of what others get."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from inferway_gateway.backends.language.backend import LocalLink
from inferway_gateway.backends.language.generator import Generator
from inferway_gateway.core.errors import (
    DeadlineExceededError,
    GatewayError,
    InternalError,
    ModelExecutionError,
    QueueFullError,
    ShuttingDownError,
)
from inferway_gateway.core.generation import (
    Constraint,
    ContextLengthError,
    GenerationParameterError,
    GenerationRequest,
    Sampling,
)

from .conftest import GREEDY, PROMPT, OpenModel, Whole, ask, read, until

PROMPTS = [
    "The capital of France is",
    "One two three",
    "def main():",
    "x",
    "Once upon a time there was",
    "2019 and 2020",
]


@pytest.mark.parametrize("model", ["tiny-llm", "smollm2"])
async def test_greedy_answers_are_the_same_alone_and_in_company(open_language: OpenModel, model: str) -> None:
    generator = await open_language(model)
    lengths = [5 + 3 * index for index in range(len(PROMPTS))]
    alone = [
        await ask(generator, prompt, length, key_id=str(length))
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]

    async def joining(index: int) -> Whole:
        # Each joins when the one before it has had some tokens, so that they leave in another order than they came.
        for _ in range(index):
            await asyncio.sleep(0.003)
        return await ask(generator, PROMPTS[index], lengths[index], key_id=f"company {index}")

    async def leaving(index: int) -> None:
        ids = tuple(await generator.encode(PROMPTS[-index]))
        await read(generator.generate(GenerationRequest(ids, 40, GREEDY)), index + 1)

    for _ in range(2):
        together = await asyncio.gather(*map(joining, range(len(PROMPTS))), *map(leaving, range(1, 4)))
        assert [whole.tokens for whole in together if whole is not None] == [whole.tokens for whole in alone]


async def test_logits_are_the_same_bits_alone_and_in_company(tiny: Generator) -> None:
    alone = await ask(tiny, max_tokens=8, logprobs=3, key_id="a")
    company = await asyncio.gather(
        ask(tiny, max_tokens=8, logprobs=3, key_id="b"), *(ask(tiny, prompt, 9) for prompt in PROMPTS)
    )
    assert company[0].logprobs == alone.logprobs


async def test_a_long_prompt_is_read_in_pieces_with_the_same_result(open_language: OpenModel) -> None:
    tiny = await open_language()
    rng = np.random.default_rng(3)
    for length in (257, 513, 600):  # the first two would leave one token to the last piece
        prompt = tuple(int(token) for token in rng.integers(3, 40_000, length))
        whole = await ask(tiny, prompt, 6, logprobs=0, key_id=f"one {length}")
        again = await ask(tiny, prompt, 6, logprobs=0, key_id=f"another {length}")
        assert whole.logprobs == again.logprobs
        assert again.last.usage is not None
        assert again.last.usage.cached_tokens == 0


async def test_a_known_prefix_is_not_read_again_and_changes_nothing(tiny: Generator) -> None:
    rng = np.random.default_rng(4)
    system = tuple(int(token) for token in rng.integers(3, 40_000, 300))
    questions = [(*system, *range(10 + n, 20 + n)) for n in range(3)]
    fresh = [await ask(tiny, prompt, 8, logprobs=0, key_id=f"key {n}") for n, prompt in enumerate(questions)]
    known = [await ask(tiny, prompt, 8, logprobs=0, key_id="key 0") for prompt in questions]
    assert [whole.logprobs for whole in known] == [whole.logprobs for whole in fresh]
    cached = [whole.last.usage.cached_tokens for whole in known if whole.last.usage is not None]
    # The first is known as a whole: its last two tokens are read all the same.
    assert cached == [308, 300, 300]
    assert tiny.stats.prefix_hits == 3


async def test_what_one_key_asked_is_not_known_to_another(tiny: Generator) -> None:
    prompt = tuple(range(100, 200))
    for key in ("a", "b"):
        whole = await ask(tiny, prompt, 2, key_id=key)
        assert whole.last.usage is not None
        assert whole.last.usage.cached_tokens == 0


async def test_a_stream_that_is_left_frees_its_slot_within_two_steps(tiny: Generator) -> None:
    ids = tuple(await tiny.encode(PROMPT))
    going_on = asyncio.create_task(ask(tiny, "One two", 400))
    for _ in range(10):
        await read(tiny.generate(GenerationRequest(ids, 1000, GREEDY, ignore_end=True)), 3)
    await until(lambda: tiny.stats.freed_after_steps.count == 10)
    assert sum(tiny.stats.freed_after_steps.counts[:3]) == 10  # 0, 1 or 2 steps
    assert tiny.stats.cancelled == 10
    await going_on
    assert tiny.stats.running == 0


async def test_a_prompt_that_is_left_is_not_read_to_its_end(open_language: OpenModel) -> None:
    smol = await open_language("smollm2")
    rng = np.random.default_rng(5)
    prompt = tuple(int(token) for token in rng.integers(3, 40_000, 4000))
    stream = smol.generate(GenerationRequest(prompt, 4, GREEDY))
    waiting = asyncio.ensure_future(anext(stream))
    await until(lambda: smol.stats.requests == 1)
    started = time.monotonic()
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    await until(lambda: smol.busy == 0)
    assert (await ask(smol, "One", 2)).tokens
    assert time.monotonic() - started < 8  # reading it takes longer than that
    assert smol.stats.kv_bytes < 4000 * 46_080


async def test_requests_beyond_the_memory_wait_for_their_turn(open_language: OpenModel) -> None:
    # 256 bytes x 2 layers a token: room for two answers of 100 tokens.
    tiny = await open_language(kv_cache_bytes=512 * 220)
    answers = await asyncio.gather(*(ask(tiny, PROMPT, 100, ignore_end=True, key_id=str(n)) for n in range(6)))
    assert {len(whole.tokens) for whole in answers} == {100}
    assert len({whole.tokens for whole in answers}) == 1


async def test_there_are_never_more_answers_than_places_however_they_come_and_go(open_language: OpenModel) -> None:
    tiny = await open_language(max_sequences=3)
    jobs = [(tuple(range(5, 6 + size)), length) for size in (0, 1, 30, 260) for length in (1, 2, 17)]
    alone = [(await ask(tiny, prompt, length, ignore_end=True, key_id="alone")).tokens for prompt, length in jobs]

    async def coming(number: int) -> None:
        for turn in range(len(jobs)):
            index = (5 * turn + number) % len(jobs)
            prompt, length = jobs[index]
            if turn % 3 == 2:
                await read(tiny.generate(GenerationRequest(prompt, 50, GREEDY, ignore_end=True)), 2)
            else:
                whole = await ask(tiny, prompt, length, ignore_end=True, key_id=str(number))
                assert whole.tokens == alone[index]
            assert tiny.stats.running <= 3

    await asyncio.gather(*map(coming, range(8)))
    await until(lambda: tiny.stats.running == 0)
    assert tiny.problem() is None


async def test_a_defect_of_the_engine_is_told_to_everybody(tiny: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    going_on = asyncio.create_task(ask(tiny, PROMPT, 1900, ignore_end=True))
    await until(lambda: tiny.stats.running == 1)
    link = tiny._link
    assert isinstance(link, LocalLink)
    assert link._engine is not None
    monkeypatch.setattr(link._engine, "_leave", lambda gone: 1 / 0)
    with pytest.raises(InternalError):
        await going_on
    await until(lambda: tiny.problem() is not None)


async def test_who_waits_too_long_is_refused_and_nobody_else(open_language: OpenModel) -> None:
    tiny = await open_language(max_sequences=1, wait_s=0.05)
    first = asyncio.create_task(ask(tiny, PROMPT, 1500, ignore_end=True))
    await until(lambda: tiny.stats.running == 1)
    with pytest.raises(QueueFullError, match="within"):
        await ask(tiny, "One", 2)
    assert len((await first).tokens) == 1500


async def test_a_full_queue_refuses_at_once(open_language: OpenModel) -> None:
    tiny = await open_language(max_sequences=1, max_waiting=1)
    busy = [asyncio.create_task(ask(tiny, PROMPT, 1000, ignore_end=True)) for _ in range(2)]
    await until(lambda: tiny.stats.running == 1 and tiny.stats.waiting == 1)
    with pytest.raises(QueueFullError):
        await ask(tiny, "One", 2)
    for task in busy:
        task.cancel()
    await asyncio.wait(busy)


async def test_a_key_that_fills_the_queue_does_not_keep_another_out(open_language: OpenModel) -> None:
    tiny = await open_language(max_sequences=1, max_waiting=4)
    many = [asyncio.create_task(ask(tiny, PROMPT, 200, ignore_end=True, key_id="greedy")) for _ in range(5)]
    await until(lambda: tiny.stats.running == 1 and tiny.stats.waiting == 4)
    modest = [asyncio.create_task(ask(tiny, PROMPT, 2, key_id="modest")) for _ in range(2)]
    with pytest.raises(QueueFullError):  # it would have more than the other
        await asyncio.gather(*(ask(tiny, PROMPT, 2, key_id="modest") for _ in range(3)))
    assert [len((await task).tokens) for task in modest] == [2, 2]
    found = await asyncio.gather(*many, return_exceptions=True)
    assert [isinstance(one, QueueFullError) for one in found] == [False, False, False, True, True]


async def test_a_key_with_many_requests_does_not_keep_another_waiting(open_language: OpenModel) -> None:
    tiny = await open_language(max_sequences=2)
    order: list[str] = []

    async def one(key: str) -> None:
        await ask(tiny, PROMPT, 60, ignore_end=True, key_id=key)
        order.append(key)

    many = [asyncio.create_task(one("greedy")) for _ in range(12)]
    await until(lambda: tiny.stats.waiting >= 8)
    modest = [asyncio.create_task(one("modest")) for _ in range(2)]
    await asyncio.gather(*many, *modest)
    assert order.index("modest") <= 4
    assert order[:8].count("modest") == 2


async def test_a_higher_priority_comes_first(open_language: OpenModel) -> None:
    tiny = await open_language(max_sequences=1)
    order: list[int] = []

    async def one(priority: int) -> None:
        await ask(tiny, PROMPT, 100, ignore_end=True, priority=priority)
        order.append(priority)

    first = asyncio.create_task(one(5))
    await until(lambda: tiny.stats.running == 1)
    others = [asyncio.create_task(one(priority)) for priority in (0, 3, 1, 2)]
    await asyncio.gather(first, *others)
    assert order == [5, 1, 2, 3, 0]


async def test_a_deadline_ends_an_answer_and_no_other(tiny: Generator) -> None:
    other = asyncio.create_task(ask(tiny, PROMPT, 300, ignore_end=True))
    with pytest.raises(DeadlineExceededError):
        await ask(tiny, "One", 1900, ignore_end=True, deadline=time.monotonic() + 0.05)
    assert len((await other).tokens) == 300


async def test_a_deadline_ends_a_piece_of_a_prompt_that_is_being_read(
    tiny: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tiny._link
    assert isinstance(link, LocalLink)
    assert link._engine is not None
    ended = threading.Event()

    def read(arrays: Any, tokens: Any, known: int, adapter: str | None, stop: Any) -> Any:
        while not stop.terminate:
            time.sleep(0.001)
        ended.set()
        raise DeadlineExceededError("reading the prompt was ended")

    with monkeypatch.context() as patch:
        patch.setattr(link._engine._runtime, "read", read)
        with pytest.raises(DeadlineExceededError):
            await ask(tiny, PROMPT, 4, deadline=time.monotonic() + 0.2)
        await until(ended.is_set)
    assert tiny.busy == 0
    assert len((await ask(tiny, PROMPT, 4, ignore_end=True)).tokens) == 4
    await until(lambda: tiny.stats.running == 0)


async def test_broken_requests_fail_alone(tiny: Generator) -> None:
    expected = await ask(tiny, PROMPT, 60)
    going_on = [asyncio.create_task(ask(tiny, PROMPT, 60, key_id=str(n))) for n in range(3)]
    broken = [
        ask(tiny, (1, 2), sampling=Sampling(temperature=float("nan"))),
        ask(tiny, (1, 2), sampling=Sampling(top_p=-1)),
        ask(tiny, (1, 2), sampling=Sampling(repetition_penalty=0)),
        ask(tiny, (1, 2), sampling=Sampling(logit_bias={60_000: 1.0})),
        ask(tiny, (1, 2), sampling=Sampling(logit_bias={1: float("inf")})),
        ask(tiny, (1, 60_000)),
        ask(tiny, (1, -1)),
        ask(tiny, ()),
        ask(tiny, tuple(range(2048))),
        ask(tiny, (1, 2), 4000),
        ask(tiny, (1, 2), 0),
        ask(tiny, (1, 2), stop=("",)),
        ask(tiny, (1, 2), logprobs=1000),
        ask(tiny, (1, 2), adapter="none"),
        ask(tiny, (1, 2), constraint=Constraint("regex", "(a")),
    ]
    outcomes = await asyncio.gather(*broken, return_exceptions=True)
    assert all(isinstance(outcome, GatewayError) for outcome in outcomes)
    assert all(getattr(outcome, "param", None) for outcome in outcomes)
    for task in going_on:
        assert (await task).tokens == expected.tokens


async def test_unloading_tells_those_who_are_served(open_language: OpenModel) -> None:
    tiny = await open_language()
    going_on = asyncio.create_task(ask(tiny, PROMPT, 1900, ignore_end=True))
    await until(lambda: tiny.stats.running == 1)
    await tiny.close()
    with pytest.raises(ShuttingDownError):
        await going_on
    with pytest.raises(ShuttingDownError):
        await ask(tiny)


async def test_adapters_and_none_go_into_one_batch(open_language: OpenModel) -> None:
    lora = await open_language("smollm2-lora")
    assert lora.adapters == ("adapter_a", "adapter_b")
    names = (None, "adapter_a", "adapter_b")
    alone = [await ask(lora, max_tokens=6, adapter=name, logprobs=0) for name in names]
    together = await asyncio.gather(*(ask(lora, max_tokens=6, adapter=name, logprobs=0, key_id="b") for name in names))
    assert [whole.logprobs for whole in together] == [whole.logprobs for whole in alone]
    assert len({whole.logprobs for whole in alone}) == 3


async def test_a_text_far_beyond_the_context_is_not_even_encoded(tiny: Generator) -> None:
    with pytest.raises(ContextLengthError) as caught:
        await tiny.encode("a" * ((1 << 20) + 1))
    assert caught.value.param == "prompt"
    assert "2048" in caught.value.message
    assert "1048577" in caught.value.message


async def test_half_a_surrogate_pair_is_refused_by_its_field(tiny: Generator) -> None:
    with pytest.raises(GenerationParameterError) as caught:
        await tiny.encode("\ud800")
    assert caught.value.param == "prompt"


async def test_a_long_text_is_encoded_while_others_go_on(tiny: Generator) -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    turning = asyncio.create_task(turn())
    assert len(await tiny.encode("word " * 200_000)) == 200_001
    turning.cancel()
    assert turns > 100


@pytest.mark.parametrize("endless", ["read", "write"])
async def test_a_run_without_end_is_ended_and_its_places_are_free(
    tiny: Generator, monkeypatch: pytest.MonkeyPatch, endless: str
) -> None:
    link = tiny._link
    assert isinstance(link, LocalLink)
    engine = link._engine
    assert engine is not None
    own = getattr(engine._runtime, endless)
    ended = []

    def without_end(*members: Any) -> Any:
        stop = members[-1]
        while not stop.terminate:
            time.sleep(0.01)
        ended.append(stop)
        raise ModelExecutionError("it was ended")

    monkeypatch.setattr(engine, "_run_limit_s", 0.1)
    monkeypatch.setattr(engine._runtime, endless, without_end)
    with pytest.raises(ModelExecutionError, match="was ended"):
        await ask(tiny, PROMPT, 5)
    assert ended
    monkeypatch.setattr(engine._runtime, endless, own)
    assert len((await ask(tiny, PROMPT, 5)).tokens) == 5
    await until(lambda: tiny.stats.running == 0)
