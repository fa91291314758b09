"""The rule of each mode, on one event loop and without Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway.train.compression import Packed
from inferway.train.job import OptimizerSpec, Vector
from inferway.train.optimizers import make_optimizer
from inferway.train.parameter_server_shard import Mode, Pulled, Shard

SGD = OptimizerSpec("sgd", 0.5)


def ones(value: float = 1.0) -> Packed:
    return Packed(np.full(3, value, np.float32))


async def begun(mode: Mode, *, staleness: int = 0, workers: int = 2, step: int = 0) -> Shard:
    shard = Shard(SGD, mode, staleness, workers)
    await shard.begin(np.zeros(3, np.float32), {}, step)
    return shard


def push(shard: Shard, worker: int, step: int, *, value: float = 1.0, version: int = 0) -> asyncio.Task[Pulled | None]:
    call = shard.exchange(worker, step, ones(value), 0.5, version, 1.0, step + 1)
    return asyncio.get_running_loop().create_task(call)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def values(pulled: Pulled | None) -> list[float]:
    assert pulled is not None
    assert pulled.parameters is not None
    return [float(v) for v in pulled.parameters]


async def test_in_sync_an_answer_waits_for_the_gradients_of_all() -> None:
    shard = await begun("sync")
    first = push(shard, 1, 0, value=4.0)
    await settle()
    assert not first.done()
    second = push(shard, 0, 0, value=2.0)
    # 0.5 · 2 + 0.5 · 4 = 3, times the learning rate.
    assert values(await first) == values(await second) == [-1.5] * 3


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
async def test_in_sync_the_sum_is_the_same_to_the_bit_in_whichever_order_they_come(order: tuple[int, ...]) -> None:
    gradients = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    weights = [0.2, 0.5, 0.3]
    expected = np.zeros(1000, np.float32)
    total = np.zeros(1000, np.float32)
    for gradient, weight in zip(gradients, weights, strict=True):
        total += gradient * np.float32(weight)
    make_optimizer(SGD, 1000).step(expected, total)
    shard = Shard(SGD, "sync", 0, 3)
    await shard.begin(np.zeros(1000, np.float32), {}, 0)
    calls = [shard.exchange(w, 0, Packed(gradients[w]), weights[w], 0, 0.0, 1) for w in order]
    for pulled in await asyncio.gather(*calls):
        assert pulled is not None
        assert pulled.parameters is not None
        assert pulled.parameters.tobytes() == expected.tobytes()


async def test_a_push_that_comes_again_is_not_taken_again() -> None:
    shard = await begun("async", workers=1)
    assert values(await push(shard, 0, 0)) == [-0.5] * 3
    assert values(await push(shard, 0, 0)) == [-0.5] * 3
    facts = await shard.facts()
    assert (facts.pushes, facts.duplicates) == (1, 1)


async def test_a_push_that_overtook_the_one_before_waits_for_it() -> None:
    shard = await begun("async", workers=1)
    late = push(shard, 0, 1)
    await settle()
    assert not late.done()
    await push(shard, 0, 0)
    assert values(await late) == [-1.0] * 3


async def test_in_async_nobody_waits() -> None:
    shard = await begun("async")
    for step in range(5):
        await asyncio.wait_for(push(shard, 0, step), 5)
    await push(shard, 1, 0)
    facts = await shard.facts()
    assert facts.max_staleness == 4
    assert facts.max_missed == 5
    assert facts.sum_missed == sum(range(5)) + 5


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_in_ssp_a_worker_gets_as_far_ahead_as_the_bound_and_no_further(staleness: int) -> None:
    shard = await begun("ssp", staleness=staleness)
    for step in range(staleness):
        await asyncio.wait_for(push(shard, 0, step), 5)
    # This answer is for a step that is further ahead of the other worker's than is allowed.
    held = push(shard, 0, staleness)
    await settle()
    assert not held.done()
    await asyncio.wait_for(push(shard, 1, 0), 5)
    await asyncio.wait_for(held, 5)
    assert (await shard.facts()).max_staleness == staleness


async def test_an_answer_that_nobody_wants_is_not_waited_for() -> None:
    shard = await begun("sync")
    assert await shard.exchange(0, 0, ones(), 0.5, 0, 1.0, None) is None


async def test_a_worker_without_rows_counts_as_one_that_pushed() -> None:
    shard = await begun("sync")
    first = push(shard, 0, 0, value=2.0)
    second = await shard.exchange(1, 0, None, 0.0, 0, 0.0, 1)
    assert values(await first) == values(second) == [-0.5] * 3
    stale = await begun("ssp", staleness=1)
    await stale.exchange(0, 0, None, 0.0, 0, 0.0, None)
    assert values(await stale.pull()) == [0.0] * 3
    assert (await stale.progress())[0] == 0


async def test_what_is_begun_again_goes_on_to_the_bit() -> None:
    adam = OptimizerSpec("adam", 0.1)
    rng = np.random.default_rng(1)
    gradients = [Packed(rng.normal(size=50).astype(np.float32)) for _ in range(6)]

    async def steps(shard: Shard, first: int, last: int) -> Vector:
        for step in range(first, last):
            await shard.exchange(0, step, gradients[step], 1.0, step, 0.0, None)
        return (await shard.snapshot())[0].copy()

    through = Shard(adam, "sync", 0, 1)
    await through.begin(np.zeros(50, np.float32), {}, 0)
    expected = await steps(through, 0, 6)
    before = Shard(adam, "sync", 0, 1)
    await before.begin(np.zeros(50, np.float32), {}, 0)
    await steps(before, 0, 3)
    parameters, optimizer = await before.snapshot()
    after = Shard(adam, "sync", 0, 1)
    await after.begin(parameters, optimizer, 3)
    assert (await steps(after, 3, 6)).tobytes() == expected.tobytes()


@given(data=st.data(), staleness=st.integers(0, 4), workers=st.integers(2, 4), overlap=st.booleans())
async def test_no_order_of_pushes_breaks_the_bound_or_stops_anybody(
    data: Any, staleness: int, workers: int, overlap: bool
) -> None:
    steps, ahead = 8, 2 if overlap and staleness else 1
    shard = await begun("ssp", staleness=staleness, workers=workers)
    done = [0] * workers
    answers: dict[tuple[int, int], asyncio.Task[Pulled | None]] = {}
    seen = 0
    while min(done) < steps:
        # A worker may take its next step when the answer that is meant for it has come.
        able = [
            w for w in range(workers) if done[w] < steps and (done[w] < ahead or answers[w, done[w] - ahead].done())
        ]
        assert able, "everybody waits for somebody"
        worker = data.draw(st.sampled_from(able))
        step = done[worker]
        seen = max(seen, step - min(done))
        use = step + ahead if step + ahead < steps else None
        call = shard.exchange(worker, step, ones(), 1.0, 0, 0.0, use)
        answers[worker, step] = asyncio.get_running_loop().create_task(call)
        done[worker] += 1
        await settle()
    await asyncio.gather(*answers.values())
    assert seen <= staleness
    assert (await shard.facts()).max_staleness == seen
