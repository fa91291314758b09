"""Copies of requests: which are run, what is compared, and that nobody waits for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inferway_gateway.core.batcher import Answer, InferenceRequest
from inferway_gateway.core.catalog import AliasRecord, AliasSpec, Shadow
from inferway_gateway.core.errors import ModelExecutionError, ModelNotReadyError
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig
from inferway_gateway.core.routing import Plan, Router
from inferway_gateway.core.shadow import QUEUED, RUNS, Shadows, compare
from inferway_gateway.core.tensors import Signature, TensorSpec

ROW = np.arange(4, dtype=np.float32).reshape(1, 4)


@dataclass
class Doubler:
    """An executor that doubles ``x``, adds an error to it, and can be made to wait or to fail."""

    error: float = 0.0
    shape: tuple[int, ...] = (-1, 4)
    fails: Exception | None = None
    gate: asyncio.Event | None = None
    config: ModelConfig = field(default_factory=ModelConfig)
    seen: list[InferenceRequest] = field(default_factory=list)
    running: int = 0
    most: int = 0

    @property
    def batcher(self) -> Any:
        return self

    @property
    def signature(self) -> Signature:
        return Signature((TensorSpec("x", "FP32", self.shape),), (TensorSpec("y", "FP32", self.shape),), True)

    async def infer(self, request: InferenceRequest) -> Answer:
        self.seen.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.fails is not None:
                raise self.fails
            y = request.inputs["x"] * np.float32(2) + np.float32(self.error)
            return Answer([y for _ in request.outputs], 0, 0, 0, 0, 1)
        finally:
            self.running -= 1


def plan(shadow: Shadow) -> Plan:
    router = Router(lambda: 0)
    spec = AliasSpec({1: 100}, shadow=shadow)
    router.update([AliasRecord("churn", "stable", spec, None, 1, datetime(2026, 3, 1, tzinfo=UTC), "k")])
    return router.plans["churn"]


def request(x: NDArray[Any] = ROW) -> InferenceRequest:
    return InferenceRequest({"x": x}, ("y",), len(x), x.nbytes)


def shadows(version: Doubler, **options: Any) -> Shadows:
    async def find(model: str, number: int, deadline: float) -> Doubler:
        assert (model, number) == ("churn", 2)
        assert deadline > asyncio.get_running_loop().time()
        return version

    return Shadows(find, **options)


async def test_answers_are_compared_and_their_largest_difference_kept() -> None:
    alias = plan(Shadow(2, rtol=0, atol=0.1))
    version = Doubler(error=0.0625)
    async with shadows(version) as running:
        running.offer(alias, 1, request(), [ROW * 2])
        await running.idle()
        version.error = 0.5
        running.offer(alias, 1, request(), [ROW * 2])
        await running.idle()
        version.error = 0
        running.offer(alias, 1, request(), [ROW * 2])
        await running.idle()
    stats = alias.shadow_stats
    assert (stats.compared, stats.differing, stats.failed, stats.dropped) == (3, 1, 0, 0)
    assert stats.largest_difference == 0.5


async def test_a_copy_runs_at_the_last_level_of_the_shadows_priorities() -> None:
    version = Doubler(config=ModelConfig(batching=BatchPolicy(priority_levels=3, default_priority=1)))
    async with shadows(version) as running:
        running.offer(plan(Shadow(2)), 1, request(), [ROW * 2])
        await running.idle()
    assert [r.priority for r in version.seen] == [3]


async def test_a_share_of_the_requests_is_copied() -> None:
    alias = plan(Shadow(2, share=0.25))
    version = Doubler()
    async with shadows(version) as running:
        for _ in range(100):
            running.offer(alias, 1, request(), [ROW * 2])
            await running.idle()
    assert 23 <= alias.shadow_stats.compared <= 27


async def test_what_the_shadow_itself_answered_is_not_copied_to_it() -> None:
    alias = plan(Shadow(2))
    async with shadows(Doubler()) as running:
        running.offer(alias, 2, request(), [ROW * 2])
        await running.idle()
    assert alias.shadow_stats.compared == 0


@pytest.mark.parametrize(
    "version",
    [Doubler(fails=ModelExecutionError("no")), Doubler(fails=ZeroDivisionError()), Doubler(shape=(-1, 5))],
    ids=["the model failed", "a defect", "another signature"],
)
async def test_a_copy_that_fails_is_counted_and_the_next_one_runs(version: Doubler) -> None:
    alias = plan(Shadow(2))
    async with shadows(version) as running:
        for _ in range(3):
            running.offer(alias, 1, request(), [ROW * 2])
        await running.idle()
    stats = alias.shadow_stats
    assert (stats.compared, stats.failed) == (0, 3)


async def test_a_version_that_cannot_be_loaded_is_a_failure() -> None:
    async def find(model: str, number: int, deadline: float) -> Doubler:
        raise ModelNotReadyError("not now")

    alias = plan(Shadow(2))
    async with Shadows(find) as running:
        running.offer(alias, 1, request(), [ROW * 2])
        await running.idle()
    assert alias.shadow_stats.failed == 1


async def test_few_run_at_once_and_what_finds_no_place_is_dropped_and_counted() -> None:
    alias = plan(Shadow(2))
    version = Doubler(gate=asyncio.Event())
    offered = QUEUED + RUNS + 5
    async with shadows(version) as running:
        for _ in range(offered):
            running.offer(alias, 1, request(), [ROW * 2])
        assert alias.shadow_stats.dropped == offered - QUEUED
        assert version.gate is not None
        version.gate.set()
        await running.idle()
    assert version.most <= RUNS
    assert alias.shadow_stats.compared == QUEUED


async def test_the_bytes_that_copies_hold_are_bounded_and_given_back() -> None:
    alias = plan(Shadow(2))
    version = Doubler(gate=asyncio.Event())
    async with shadows(version, held_bytes=3 * 2 * ROW.nbytes) as running:
        for _ in range(5):
            running.offer(alias, 1, request(), [ROW * 2])
        assert alias.shadow_stats.dropped == 2
        assert version.gate is not None
        version.gate.set()
        await running.idle()
        running.offer(alias, 1, request(), [ROW * 2])
        await running.idle()
    assert alias.shadow_stats.compared == 4


async def test_the_end_waits_for_no_copy() -> None:
    version = Doubler(gate=asyncio.Event())
    async with asyncio.timeout(10), shadows(version) as running:
        running.offer(plan(Shadow(2)), 1, request(), [ROW * 2])
        while not version.running:
            await asyncio.sleep(0)
    assert version.running == 0


# ------------------------------------------------------------------ comparing


def one(
    datatype: str, got: NDArray[Any], given: NDArray[Any], rtol: float = 0.0, atol: float = 0.0
) -> tuple[bool, float]:
    return compare([datatype], [got], [given], rtol, atol)


NAN, INF = np.float32(np.nan), np.float32(np.inf)


@pytest.mark.parametrize(
    ("got", "given", "alike", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], True, 0.0),
        ([1.0, 2.5], [1.0, 2.0], False, 0.5),
        ([NAN, 1.0], [NAN, 1.0], True, 0.0),
        ([NAN, 1.0], [1.0, 1.0], False, 0.0),
        ([1.0, 1.5], [NAN, 1.0], False, 0.5),
        ([INF, 1.0], [INF, 1.0], True, 0.0),
        ([INF, 1.0], [-INF, 1.0], False, 0.0),
        ([INF, 1.0], [1.0, 1.0], False, 0.0),
        ([], [], True, 0.0),
    ],
)
def test_numbers_that_are_none_are_like_themselves(
    got: list[float], given: list[float], alike: bool, difference: float
) -> None:
    assert one("FP32", np.array(got, np.float32), np.array(given, np.float32)) == (alike, difference)


def test_the_tolerance_is_measured_by_what_was_given() -> None:
    hundred, ten = np.array([100.0]), np.array([110.0])
    assert one("FP64", ten, hundred, rtol=0.1)[0]
    assert not one("FP64", hundred, ten, rtol=0.09)[0]
    assert one("FP64", hundred, ten, atol=10)[0]


@pytest.mark.parametrize(
    ("datatype", "dtype"), [("UINT8", np.uint8), ("INT8", np.int8), ("INT64", np.int64), ("BOOL", np.bool_)]
)
def test_whole_numbers_do_not_wrap_round(datatype: str, dtype: Any) -> None:
    low, high = np.array([0], dtype), np.array([100], dtype)
    alike, difference = one(datatype, low, high)
    assert not alike
    assert difference == float(high[0])


def test_bfloat16_is_compared_by_value_and_not_by_its_bits() -> None:
    one_, next_ = np.array([0x3F80], np.uint16), np.array([0x3F81], np.uint16)
    assert one("BF16", next_, one_) == (False, 2**-7)
    assert one("BF16", next_, one_, rtol=0.01) == (True, 2**-7)


def test_strings_are_alike_when_they_are_equal() -> None:
    left, right = np.array(["a", "bé"], object), np.array(["a", "b"], object)
    assert one("BYTES", left, left.copy()) == (True, 0.0)
    assert one("BYTES", left, right, rtol=1, atol=1) == (False, 0.0)


def test_another_dtype_or_shape_differs_whatever_the_numbers() -> None:
    x = np.zeros((1, 4), np.float32)
    assert one("FP32", x.astype(np.float64), x, 1, 1) == (False, 0.0)
    assert one("FP32", x.reshape(4, 1), x, 1, 1) == (False, 0.0)


def test_all_outputs_count_and_long_ones_in_every_piece() -> None:
    long = np.zeros((1 << 20) + 3, np.float32)
    other = long.copy()
    other[-1] = 4
    assert compare(["FP32", "FP32"], [long, long], [long, long], 0, 0) == (True, 0.0)
    assert compare(["FP32", "FP32"], [long, other], [long, long], 0, 0) == (False, 4.0)
    assert compare(["FP64"], [np.array([1e308])], [np.array([-1e308])], 0, 0) == (False, np.finfo(np.float64).max)
