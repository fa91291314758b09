from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from batching_fakes import (
    BAD,
    FALLING,
    FLAT,
    RISING,
    STUCK,
    RowModel,
    VirtualRunners,
    expected,
    profile,
    request,
    row_signature,
    rows_of,
    virtually,
)
from inferway_gateway.core import batcher as batcher_module
from inferway_gateway.core.backend import RunHandle
from inferway_gateway.core.batcher import Answer, Batcher, InferenceRequest
from inferway_gateway.core.errors import (
    DeadlineExceededError,
    InternalError,
    ModelExecutionError,
    QueueFullError,
    ShuttingDownError,
)
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig, PaddingAxis, QueuePolicy, SessionOptions
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.tensors import Arrays, Signature, TensorSpec

PADDING = (PaddingAxis({"x": 1}, {"same": 1}, max_waste=0.9),)


class Case:
    """A batcher over a model in numpy, on runners of virtual time."""

    def __init__(
        self,
        policy: BatchPolicy | None = None,
        model: RowModel | None = None,
        *,
        threads: int = 1,
        cost: Callable[[int, int], float] = lambda rows, length: 1.0,
        run_timeout_s: float = 100.0,
        instances: int | None = None,
        **options: Any,
    ) -> None:
        self.model = model or RowModel(profile=profile(RISING))
        self.stats = ModelStats()
        self.runners = VirtualRunners(threads, cost, **options)
        self.batcher = self.another(self.model, policy, run_timeout_s, instances, self.stats)
        self.loop = asyncio.get_running_loop()
        self.tasks: list[asyncio.Task[Answer]] = []

    def another(
        self,
        model: RowModel,
        policy: BatchPolicy | None = None,
        run_timeout_s: float = 100.0,
        instances: int | None = None,
        stats: ModelStats | None = None,
    ) -> Batcher:
        config = ModelConfig(batching=policy or BatchPolicy(), instances=instances)
        return Batcher(model, config, stats or ModelStats(), self.runners, run_timeout_s=run_timeout_s)

    def ask(
        self, x: NDArray[Any], *outputs: str, batcher: Batcher | None = None, **options: Any
    ) -> asyncio.Task[Answer]:
        task = self.loop.create_task((batcher or self.batcher).infer(request(x, *outputs, **options)))
        self.tasks.append(task)
        return task

    async def turn(self, times: int = 6) -> None:
        """Let everything happen that can happen at this moment."""
        for _ in range(times):
            await asyncio.sleep(0)

    @property
    def runs(self) -> list[int]:
        return [ran.rows for ran in self.model.runs]

    def assert_quiet(self) -> None:
        """Nothing waits, nothing runs, nothing is counted as either."""
        batcher, stats = self.batcher, self.stats
        assert (stats.queued_requests, stats.queued_rows, stats.queued_bytes, stats.running) == (0, 0, 0, 0)
        assert (batcher._queue.requests, batcher._queue.rows, batcher._queue.nbytes) == (0, 0, 0)
        assert not batcher._jobs
        assert not batcher._waiters
        assert not batcher._again
        assert self.model.at_once == 0


@asynccontextmanager
async def case(*args: Any, **options: Any) -> AsyncIterator[Case]:
    async with asyncio.timeout(100_000):
        made = Case(*args, **options)
        async with made.runners:
            try:
                yield made
            finally:
                for task in made.tasks:
                    if not task.done():
                        task.cancel()
                await asyncio.gather(*made.tasks, return_exceptions=True)
                assert await made.batcher.close()
                made.assert_quiet()


def on_virtual_time(test: Callable[[], Any]) -> Callable[[], None]:
    """A test whose body is a coroutine on an event loop that does not wait."""

    def run() -> None:
        virtually(test)

    run.__name__ = test.__name__
    return run


def noting(order: list[int], value: int) -> Callable[[object], None]:
    return lambda _: order.append(value)


def same(value: float, rows: int = 1, length: int = 3) -> list[list[float]]:
    found: list[list[float]] = expected(rows_of(value, rows, length), "same").tolist()
    return found


# ---- rows, not requests


@on_virtual_time
async def test_requests_that_wait_run_together_and_each_has_its_own_rows() -> None:
    async with case() as c:
        first = c.ask(rows_of(1))
        await c.turn()
        others = [c.ask(rows_of(value, rows=2)) for value in (2, 3, 4)]
        answers = await asyncio.gather(first, *others)
        assert c.runs == [1, 6]
        assert [a.outputs[0].tolist() for a in answers] == [same(1), same(2, 2), same(3, 2), same(4, 2)]
        assert [a.batch_rows for a in answers] == [1, 6, 6, 6]
        assert answers[1].queue_s == pytest.approx(1.0)
        assert answers[1].run_s == pytest.approx(1.0)


@on_virtual_time
async def test_requests_of_one_turn_of_the_loop_leave_together_where_company_pays() -> None:
    async with case(threads=2) as c:
        await asyncio.gather(*(c.ask(rows_of(value)) for value in range(5)))
        assert c.runs == [5]
    async with case(model=RowModel(profile=profile(FLAT)), threads=2) as c:
        await asyncio.gather(*(c.ask(rows_of(value)) for value in range(5)))
        assert c.runs == [1] * 5


@on_virtual_time
async def test_thirty_two_rows_at_most_eight_a_run_make_four_runs_and_one_answer() -> None:
    # MLServer's batcher counts requests: it hands such a model all the rows of up to eight of them.
    async with case(model=RowModel(row_signature(max_rows=8), profile(RISING)), threads=2) as c:
        x = np.arange(32 * 3, dtype=float).reshape(32, 3)
        tasks = [c.ask(x + i, "total", "same") for i in range(4)]
        answers = await asyncio.gather(*tasks)
        assert c.runs == [8] * 16
        assert c.model.most_at_once == 1  # the fake's runs take no time of their own; the pool's do
        for i, answer in enumerate(answers):
            np.testing.assert_array_equal(answer.outputs[0], expected(x + i, "total"))
            np.testing.assert_array_equal(answer.outputs[1], expected(x + i, "same"))
            assert answer.batch_rows == 8
        assert c.stats.inference_count == 4 * 32
        assert c.stats.execution_count == 16


@on_virtual_time
async def test_a_large_request_without_a_bound_is_cut_by_what_a_run_costs() -> None:
    cheap = RowModel(profile=profile({1: 0.01, 8: 0.08, 64: 0.64}))
    async with case(model=cheap) as c:
        answer = await c.ask(np.ones((100, 3)))
        assert answer.outputs[0].shape == (100, 3)
        assert max(c.runs) <= 16
        assert sum(c.runs) == 100
    tiny = RowModel(profile=profile({1: 1e-6, 64: 2e-6}))
    async with case(model=tiny) as c:
        await c.ask(np.ones((5000, 3)))
        assert c.runs == [5000], "5000 rows of a microsecond each hold nobody up"
    unknown = RowModel(profile=profile())
    async with case(model=unknown) as c:
        await c.ask(np.ones((1000, 3)))
        assert c.runs == [250] * 4


@on_virtual_time
async def test_a_request_is_not_cut_where_rows_depend_on_their_mates() -> None:
    async with case(model=RowModel(profile=profile(FLAT, exactness="inexact", batchable=False))) as c:
        await c.ask(np.ones((5000, 3)))
        assert c.runs == [5000]
        assert not c.batcher.batching
        assert not c.batcher.row_exact


@on_virtual_time
async def test_an_operator_may_vouch_for_batching_and_forbid_it() -> None:
    dependent = RowModel(profile=profile(RISING, exactness="inexact", batchable=False))
    async with case(BatchPolicy(enabled=True), dependent) as c:
        await asyncio.gather(*(c.ask(rows_of(value)) for value in range(4)))
        assert c.runs == [4]
    async with case(BatchPolicy(enabled=False)) as c:
        await asyncio.gather(*(c.ask(rows_of(value)) for value in range(4)))
        assert c.runs == [1] * 4


@on_virtual_time
async def test_a_model_without_a_batch_axis_runs_each_request_as_it_is() -> None:
    signature = Signature((TensorSpec("x", "FP64", (-1, -1)),), (TensorSpec("same", "FP64", (-1, -1)),))
    async with case(model=RowModel(signature, profile(exactness="unbatched", batchable=False))) as c:
        requests = [InferenceRequest({"x": rows_of(i, i, 2)}, ("same",), 1, 8) for i in (1, 2, 3)]
        answers = await asyncio.gather(*(c.batcher.infer(r) for r in requests))
        assert c.runs == [1, 2, 3]
        assert c.batcher.row_exact
        assert [len(a.outputs[0]) for a in answers] == [1, 2, 3]


@on_virtual_time
async def test_flat_and_falling_models_are_never_slower_than_unbatched() -> None:
    for curve, seconds in ((FLAT, lambda rows, length: float(rows)), (FALLING, lambda rows, length: rows**1.15)):
        async with case(model=RowModel(profile=profile(curve)), cost=seconds) as c:
            started = c.loop.time()
            await asyncio.gather(*(c.ask(rows_of(value)) for value in range(300)))
            assert c.loop.time() - started <= 300 * 1.01


# ---- lone rows, no rows, requested outputs, lengths


@on_virtual_time
async def test_a_lone_row_is_padded_where_its_bits_need_company() -> None:
    async with case(model=RowModel(profile=profile(RISING, exactness="padded"))) as c:
        answer = await c.ask(rows_of(5))
        assert c.runs == [2]
        assert answer.outputs[0].tolist() == same(5)
        assert answer.batch_rows == 1
        assert c.batcher.row_exact
        assert c.stats.inference_count == 1
    for curve in (FLAT, FALLING):  # company would cost as much again
        async with case(model=RowModel(profile=profile(curve, exactness="padded"))) as c:
            await c.ask(rows_of(5))
            assert c.runs == [1]
            assert not c.batcher.row_exact
        async with case(BatchPolicy(row_exact=True), RowModel(profile=profile(curve, exactness="padded"))) as c:
            await c.ask(rows_of(5))
            assert c.runs == [2]
            assert c.batcher.row_exact
    # A model that is not batched is measured with one row alone: what two would cost is not known, nor wanted.
    async with case(BatchPolicy(enabled=False), RowModel(profile=profile({1: 1.0}, exactness="padded"))) as c:
        await c.ask(rows_of(5))
        assert c.runs == [1]
        assert not c.batcher.row_exact
    async with case(BatchPolicy(row_exact=False), RowModel(profile=profile(RISING, exactness="padded"))) as c:
        await c.ask(rows_of(5))
        assert c.runs == [1]
        assert not c.batcher.row_exact


@on_virtual_time
async def test_a_request_for_no_rows_is_answered_with_none() -> None:
    async with case(model=RowModel(row_signature(length=3), profile(RISING))) as c:
        answer = await c.ask(np.empty((0, 3)), "total", "same")
        assert [a.shape for a in answer.outputs] == [(0, 1), (0, 3)]
        assert c.runs == [], "the shapes are known without a run"
    async with case() as c:
        answer = await c.ask(np.empty((0, 7)), "total", "same")
        assert [a.shape for a in answer.outputs] == [(0, 1), (0, 7)]
        assert [a.dtype for a in answer.outputs] == [np.float64, np.float64]
        assert c.runs == [1]
        assert c.stats.inference_count == 0


@on_virtual_time
async def test_each_request_gets_the_outputs_it_asked_for_in_its_order() -> None:
    # MLServer's batcher drops requested outputs; running all outputs for everybody would cost everybody.
    async with case() as c:
        first = c.ask(rows_of(0))
        await c.turn()
        answers = await asyncio.gather(
            c.ask(rows_of(1), "total", "same"), c.ask(rows_of(2), "same"), c.ask(rows_of(3), "total"), first
        )
        assert c.model.runs[1].outputs == ("same", "total"), "the union, and not 'first', which nobody wanted"
        assert answers[0].outputs[0].tolist() == [[3.0]]
        assert answers[0].outputs[1].tolist() == same(1)
        assert [len(a.outputs) for a in answers[1:3]] == [1, 1]
        assert answers[2].outputs[0].tolist() == [[9.0]]


@on_virtual_time
async def test_variable_lengths_without_declared_padding_run_with_their_equals() -> None:
    async with case() as c:
        await asyncio.gather(*(c.ask(rows_of(value, length=value)) for value in (3, 4, 3, 4, 5)))
        assert sorted(c.runs) == [1, 2, 2]


@on_virtual_time
async def test_declared_lengths_are_padded_and_outputs_cut_back() -> None:
    async with case(BatchPolicy(padding=PADDING)) as c:
        assert not c.batcher.row_exact, "a longer mate may change bits"
        answers = await asyncio.gather(*(c.ask(rows_of(n, length=n), "same", "total") for n in (3, 4, 5)))
        assert c.runs == [3]
        assert c.model.runs[0].length == 5
        for n, answer in zip((3, 4, 5), answers, strict=True):
            assert answer.outputs[0].tolist() == same(n, length=n)
            assert answer.outputs[1].tolist() == [[float(n * n)]]


# ---- priorities, timeouts, bounds


@on_virtual_time
async def test_priority_one_overtakes_what_waits() -> None:
    async with case(BatchPolicy(priority_levels=2), RowModel(row_signature(max_rows=1), profile(RISING))) as c:
        order: list[int] = []
        for value, priority in ((0, 2), (1, 2), (2, 2), (3, 1)):
            task = c.ask(rows_of(value), priority=priority)
            task.add_done_callback(noting(order, value))
            await c.turn()
        await asyncio.gather(*c.tasks)
        await c.turn()
        assert order == [0, 3, 1, 2]


@on_virtual_time
async def test_a_deadline_is_kept_while_waiting_and_while_running() -> None:
    async with case(cost=lambda rows, length: 10.0) as c:
        running = c.ask(rows_of(1), deadline=c.loop.time() + 5.0)
        await c.turn()
        waiting = c.ask(rows_of(2), deadline=c.loop.time() + 3.0)
        patient = c.ask(rows_of(3))
        with pytest.raises(DeadlineExceededError, match="waited"):
            await waiting
        assert c.loop.time() == pytest.approx(3.0, abs=0.01)
        with pytest.raises(DeadlineExceededError, match="ran"):
            await running
        assert c.loop.time() == pytest.approx(5.0, abs=0.01)
        await patient
        assert c.loop.time() == pytest.approx(15.0, abs=0.01), "a run that nobody wants is ended at once"
        assert c.runs == [1, 1]
        with pytest.raises(DeadlineExceededError):
            await c.ask(rows_of(4), deadline=c.loop.time())


@on_virtual_time
async def test_a_mates_deadline_does_not_end_a_run_that_others_want() -> None:
    async with case(cost=lambda rows, length: 10.0) as c:
        hurried = c.ask(rows_of(1), deadline=c.loop.time() + 2.0)
        patient = c.ask(rows_of(2))
        with pytest.raises(DeadlineExceededError):
            await hurried
        assert (await patient).outputs[0].tolist() == same(2)
        assert c.loop.time() == pytest.approx(10.0, abs=0.01)
        assert c.runs == [2]


@on_virtual_time
async def test_the_queue_timeout_binds_until_the_run_begins() -> None:
    async with case(cost=lambda rows, length: 10.0) as c:
        runs = c.ask(rows_of(1), queue_timeout_s=1.0)
        await c.turn()
        waits = c.ask(rows_of(2), queue_timeout_s=1.0)
        with pytest.raises(DeadlineExceededError, match="queue timeout"):
            await waits
        assert c.loop.time() == pytest.approx(1.0, abs=0.01)
        assert (await runs).outputs[0].tolist() == same(1)


@on_virtual_time
async def test_an_overdue_request_may_be_delayed_instead_of_refused() -> None:
    policy = BatchPolicy(queue=QueuePolicy(default_timeout_s=1.0, timeout_action="delay"))
    async with case(policy, RowModel(row_signature(max_rows=1), profile(RISING)), cost=lambda r, n: 0.8) as c:
        order: list[int] = []

        def ask(value: int, **options: Any) -> asyncio.Task[Answer]:
            task = c.ask(rows_of(value), **options)
            task.add_done_callback(noting(order, value))
            return task

        for value in range(3):
            ask(value)
        limited = ask(3, deadline=c.loop.time() + 2.0)
        await asyncio.sleep(1.5)
        ask(4)
        await asyncio.gather(*c.tasks, return_exceptions=True)
        assert isinstance(limited.exception(), DeadlineExceededError)
        assert order == [0, 1, 3, 4, 2], "2 overstayed and went behind 4; 3 waited on until its own deadline"


@on_virtual_time
async def test_a_full_queue_is_an_answer_that_says_when_to_come_back() -> None:
    async with case(BatchPolicy(max_queue_rows=4), RowModel(row_signature(max_rows=2), profile(RISING))) as c:
        tasks = [c.ask(rows_of(value)) for value in range(1)]
        await c.turn()
        tasks += [c.ask(rows_of(value)) for value in range(4)]
        await c.turn()
        with pytest.raises(QueueFullError) as refused:
            await c.ask(rows_of(9))
        assert refused.value.retry_after_s == pytest.approx(4 / 2 * 1.05, rel=0.2)
        await asyncio.gather(*tasks)
        assert (await c.ask(rows_of(9))).outputs[0].tolist() == same(9)
    async with case(BatchPolicy(max_queue_rows=1), RowModel(profile=profile())) as c:
        c.ask(rows_of(1))
        await c.turn()
        c.ask(rows_of(2))
        await c.turn()
        with pytest.raises(QueueFullError) as refused:
            await c.ask(rows_of(3))
        assert refused.value.retry_after_s == 1.0, "nothing is known of the model's speed"


@on_virtual_time
async def test_answers_leave_in_order_of_arrival_where_that_is_promised() -> None:
    policy = BatchPolicy(preserve_order=True)
    model = RowModel(row_signature(max_rows=1), profile(RISING))
    slow_first = iter([9.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    async with case(policy, model, threads=2, cost=lambda rows, length: next(slow_first)) as c:
        order: list[int] = []
        for value in range(6):
            task = c.ask(rows_of(BAD if value == 4 else value), deadline=c.loop.time() + 7.0 if value == 5 else None)
            task.add_done_callback(noting(order, value))
            await c.turn()
        c.tasks[2].cancel()
        results = await asyncio.gather(*c.tasks, return_exceptions=True)
        assert order == [2, 5, 0, 1, 3, 4], "2 left by itself, 5 was kept to its deadline, the others to their order"
        assert isinstance(results[4], ModelExecutionError)
        assert isinstance(results[5], DeadlineExceededError)


# ---- members that fail or vanish


@on_virtual_time
async def test_cancelling_one_of_four_strands_nobody() -> None:
    # MLServer's batcher left two of the other three pending for ever.
    for moment in (0, 1, 2, 3, 4, 8):
        async with case() as c:
            tasks = [c.ask(rows_of(value)) for value in range(4)]
            await c.turn(moment)
            tasks[1].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[1], asyncio.CancelledError)
            for value in (0, 2, 3):
                answer = results[value]
                assert isinstance(answer, Answer)
                assert answer.outputs[0].tolist() == same(value)


@on_virtual_time
async def test_a_caller_that_went_away_is_dropped_before_the_run() -> None:
    async with case() as c:
        c.ask(rows_of(0))
        await c.turn()
        tasks = [c.ask(rows_of(value)) for value in (1, 2, 3)]
        await c.turn()
        assert c.stats.queued_rows == 3
        tasks[0].cancel()
        await c.turn()
        assert c.stats.queued_rows == 2
        await asyncio.gather(*c.tasks, return_exceptions=True)
        assert c.runs == [1, 2]
        assert c.stats.dropped_cancelled == 1


@on_virtual_time
async def test_a_caller_that_went_away_after_its_batch_was_formed_is_dropped_too() -> None:
    for leaving in (1, 2):
        async with case() as c:
            c.runners.hop_s = 0.5
            tasks = [c.ask(rows_of(value)) for value in (1, 2)]
            await c.turn()
            assert c.stats.running == 1
            assert c.runs == [], "handed over, and not begun"
            for task in tasks[:leaving]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(2)
            assert c.runs == [1] * (2 - leaving)
            assert c.stats.dropped_cancelled == leaving
            assert c.stats.execution_count == 2 - leaving


@on_virtual_time
async def test_a_run_whose_callers_all_went_away_is_ended() -> None:
    async with case(cost=lambda rows, length: 1000.0) as c:
        tasks = [c.ask(rows_of(value)) for value in (1, 2)]
        await c.turn()
        assert c.stats.running == 1
        tasks[0].cancel()
        await c.turn()
        assert c.stats.running == 1
        tasks[1].cancel()
        await c.turn(10)
        assert c.stats.running == 0
        assert c.loop.time() == 0.0
        assert c.stats.dropped_cancelled == 0, "they had begun"


@on_virtual_time
async def test_one_bad_row_costs_its_neighbours_time_and_nothing_else() -> None:
    # LitServe fails everybody in the batch.
    async with case() as c:
        values: list[float] = [1, 2, BAD, 4, 5, 6, 7, 8]
        results = await asyncio.gather(*(c.ask(rows_of(v)) for v in values), return_exceptions=True)
        assert isinstance(results[2], ModelExecutionError)
        for i in (0, 1, 3, 4, 5, 6, 7):
            answer = results[i]
            assert isinstance(answer, Answer)
            assert answer.outputs[0].tolist() == same(values[i])
            assert answer.queue_s == pytest.approx(0.0), "waiting ends when the first run begins"
        assert c.runs[0] == 8
        assert len(c.runs) <= 1 + 2 * 3
        assert c.stats.execution_count == len(c.runs)
        assert c.stats.inference_count == 7


@on_virtual_time
async def test_a_batch_of_nothing_but_bad_rows_is_bounded_work() -> None:
    async with case() as c:
        results = await asyncio.gather(*(c.ask(rows_of(BAD)) for _ in range(16)), return_exceptions=True)
        assert all(isinstance(r, ModelExecutionError) for r in results)
        assert len(c.runs) == 31


@on_virtual_time
async def test_a_batch_too_large_for_its_memory_succeeds_in_halves() -> None:
    async with case(model=RowModel(profile=profile(RISING), fragile_rows=3)) as c:
        answers = await asyncio.gather(*(c.ask(rows_of(value)) for value in range(8)))
        assert [a.outputs[0].tolist() for a in answers] == [same(value) for value in range(8)]


@on_virtual_time
async def test_a_bad_row_in_a_large_request_fails_that_request_once_and_drops_the_rest_of_it() -> None:
    async with case(model=RowModel(row_signature(max_rows=2), profile(RISING))) as c:
        x = np.ones((20, 3))
        x[1, 0] = BAD
        with pytest.raises(ModelExecutionError):
            await c.ask(x)
        assert len(c.runs) <= 2, "the nine other parts were not run"


@on_virtual_time
async def test_a_run_over_its_time_is_ended_and_only_the_stuck_request_fails() -> None:
    async with case(run_timeout_s=5.0) as c:
        values: list[float] = [1, STUCK, 3, 4]
        results = await asyncio.gather(*(c.ask(rows_of(v)) for v in values), return_exceptions=True)
        assert isinstance(results[1], DeadlineExceededError)
        assert "5 s" in results[1].message
        for i in (0, 2, 3):
            assert isinstance(results[i], Answer)
        assert c.runs == [4, 2, 2, 1, 1]
        assert c.loop.time() == pytest.approx(5 + 5 + 1 + 5 + 1, abs=0.1)


@on_virtual_time
async def test_a_models_own_run_timeout_overrides_the_gateways() -> None:
    async with case(run_timeout_s=5.0) as c:
        config = ModelConfig(run_timeout_s=0.5)
        own = Batcher(c.model, config, ModelStats(), c.runners, run_timeout_s=5.0)
        with pytest.raises(DeadlineExceededError, match=r"0\.5 s"):
            await c.ask(rows_of(STUCK), batcher=own)
        assert await own.close()


@on_virtual_time
async def test_rows_that_the_model_lost_are_an_error() -> None:
    class Losing(RowModel):
        def run(self, inputs: Arrays, outputs: Any, handle: RunHandle | None = None) -> list[NDArray[Any]]:
            return [a[:1] for a in super().run(inputs, outputs, handle)]

    async with case(model=Losing(profile=profile(RISING))) as c:
        results = await asyncio.gather(
            *(c.ask(rows_of(v, rows)) for v, rows in ((1, 1), (2, 2))), return_exceptions=True
        )
        assert isinstance(results[0], Answer), "alone it has all of its row"
        assert isinstance(results[1], ModelExecutionError)
        assert "'same' of the model should have 2 rows, got 1" in results[1].message


@on_virtual_time
async def test_outputs_whose_shape_depends_on_the_rows_cannot_be_put_together_again() -> None:
    class Unique(RowModel):
        def run(self, inputs: Arrays, outputs: Any, handle: RunHandle | None = None) -> list[NDArray[Any]]:
            super().run(inputs, outputs, handle)
            x = inputs["x"]
            return [np.zeros((len(x), len(np.unique(x)))) for _ in outputs]

    async with case(model=Unique(row_signature(max_rows=2), profile(RISING))) as c:
        x = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 2.0], [3.0, 4.0]])
        with pytest.raises(ModelExecutionError, match="cannot be put together"):
            await c.ask(x)


@on_virtual_time
async def test_an_exception_that_is_no_gateway_error_is_the_models_failure() -> None:
    class Broken(RowModel):
        def run(self, inputs: Arrays, outputs: Any, handle: RunHandle | None = None) -> list[NDArray[Any]]:
            raise OSError("/secret/path")

    async with case(model=Broken(profile=profile(RISING, inline=100))) as c:
        with pytest.raises(ModelExecutionError, match="OSError") as failed:
            await c.ask(rows_of(1))
        assert "secret" not in failed.value.message
        with pytest.raises(ModelExecutionError, match="OSError"):
            c.batcher.run_inline(request(rows_of(1)))


@on_virtual_time
async def test_a_defect_of_the_queue_answers_everybody_and_takes_the_model_out() -> None:
    async with case() as c:
        first = c.ask(rows_of(1))
        await c.turn()
        second = c.ask(rows_of(2))
        await c.turn()

        def defect(now: float) -> None:
            raise RuntimeError("defect")

        c.batcher._queue.take = defect  # type: ignore[method-assign]  # a defect cannot be had otherwise
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(results[0], Answer)
        assert isinstance(results[1], InternalError)
        assert not c.batcher.ready
        with pytest.raises(ShuttingDownError):
            await c.ask(rows_of(3))


@on_virtual_time
async def test_outputs_that_cannot_be_taken_apart_are_the_gateways_error_and_fail_alone() -> None:
    async with case(BatchPolicy(padding=PADDING)) as c:
        split = c.batcher._layout.split

        def defect(outputs: Any, names: Any, parts: list[Any], target: Any) -> Any:
            if any(part.rows == 3 for part in parts):
                raise RuntimeError("defect")
            return split(outputs, names, parts, target)

        c.batcher._layout.split = defect  # type: ignore[method-assign, assignment]
        results = await asyncio.gather(*(c.ask(rows_of(1, rows)) for rows in (1, 2, 3, 4)), return_exceptions=True)
        assert isinstance(results[2], InternalError)
        assert "defect" not in results[2].message
        assert [type(r) for r in results].count(Answer) == 3


@on_virtual_time
async def test_a_thousand_answered_deadlines_do_not_pile_up() -> None:
    async with case(cost=lambda rows, length: 0.001) as c:
        for value in range(1000):
            await c.ask(rows_of(value), deadline=c.loop.time() + 1000)
        c.tasks.clear()
        assert len(c.batcher._expiries) <= 70


# ---- runs at once, fairness, draining


@on_virtual_time
async def test_instances_bound_the_runs_of_one_model() -> None:
    model = RowModel(row_signature(max_rows=1), profile(RISING))
    async with case(model=model, threads=4, instances=2) as c:
        await asyncio.gather(*(c.ask(rows_of(value)) for value in range(8)))
        assert c.loop.time() == pytest.approx(4.0)
        for begun, _, _ in c.runners.timeline:
            assert sum(b <= begun < e for b, e, _ in c.runners.timeline) <= 2


@on_virtual_time
async def test_a_busy_model_does_not_keep_another_waiting() -> None:
    model = RowModel(row_signature(max_rows=1), profile(RISING))
    async with case(model=model, cost=lambda rows, length: 0.1) as c:
        other = c.another(RowModel(profile=profile(RISING)))
        for value in range(50):
            c.ask(rows_of(value))
        await c.turn()
        answer = await c.ask(rows_of(1), batcher=other)
        assert answer.queue_s == pytest.approx(0.1, abs=0.01), "after the one run that had begun"
        assert await other.close()


@on_virtual_time
async def test_runs_of_seconds_do_not_starve_other_models() -> None:
    model = RowModel(row_signature(max_rows=1), profile(RISING))
    async with case(model=model, threads=2, cost=lambda rows, length: 0.01 if length == 3 else 60.0) as c:
        other = c.another(RowModel(row_signature(max_rows=1), profile(RISING)))
        for value in range(10):
            c.ask(rows_of(value, length=9))
        await c.turn()
        await asyncio.sleep(0.5)
        started = c.loop.time()
        await asyncio.gather(*(c.ask(rows_of(1), batcher=other) for _ in range(20)))
        assert c.loop.time() - started < 0.5 + 20 * 0.01 + 0.01
        running = c.stats.running
        assert running == 2, "the slow model itself got no more than its threads"
        assert await other.close()


@on_virtual_time
async def test_making_up_for_slow_runs_has_a_bound() -> None:
    async with case(threads=1, cost=lambda rows, length: 60.0, extra_threads=2) as c:
        batchers = [c.another(RowModel(profile=profile(RISING))) for _ in range(6)]
        for each in batchers:
            c.ask(rows_of(1), batcher=each)
        await asyncio.sleep(30)
        assert len(c.runners._running) == 3
        await asyncio.gather(*c.tasks)
        for each in batchers:
            assert await each.close()


@on_virtual_time
async def test_a_request_that_waits_for_company_leaves_though_the_timer_is_early() -> None:
    """Between two looks at the clock a moment passes: what is not due at the first is due at the second."""
    async with case() as c:
        policy = BatchPolicy(max_queue_delay_s=5.0)
        late = Batcher(
            c.model,
            ModelConfig(batching=policy),
            c.stats,
            c.runners,
            run_timeout_s=100.0,
            clock=lambda: c.runners.clock() + 1e-4,
        )
        async with asyncio.timeout(7.0):  # and nobody else comes
            answer = await c.ask(rows_of(1), batcher=late)
        assert answer.batch_rows == 1
        assert answer.queue_s == pytest.approx(5.0, abs=0.01)
        assert await late.close()


@on_virtual_time
async def test_what_is_due_and_has_no_runner_is_not_looked_at_all_the_time() -> None:
    async with case(BatchPolicy(max_queue_delay_s=5.0), cost=lambda rows, length: 60.0) as c:
        c.ask(rows_of(1))
        await asyncio.sleep(5.5)
        assert c.runs == [1]
        second = c.ask(rows_of(2))
        await asyncio.sleep(10)
        assert c.batcher._queue.requests == 1
        assert c.batcher._timer_at > c.loop.time() + 50, "the end of the run looks"
        await second
        assert c.loop.time() == pytest.approx(125.0, abs=0.1)


@on_virtual_time
async def test_draining_takes_nothing_new_and_finishes_what_there_is() -> None:
    async with case(BatchPolicy(max_queue_delay_s=500.0)) as c:
        tasks = [c.ask(rows_of(value)) for value in range(3)]
        await c.turn()
        assert c.runs == []
        draining = asyncio.ensure_future(c.batcher.drain(50.0))
        await c.turn()
        with pytest.raises(ShuttingDownError):
            await c.ask(rows_of(9))
        assert await draining == 0
        assert c.runs == [3], "a batch that waited for company left at once"
        assert all(task.done() for task in tasks)


@on_virtual_time
async def test_draining_gives_up_after_its_time_and_says_on_how_many() -> None:
    model = RowModel(row_signature(max_rows=1), profile(RISING))
    async with case(model=model, cost=lambda rows, length: 1000.0) as c:
        tasks = [c.ask(rows_of(value)) for value in range(3)]
        await c.turn()
        assert await c.batcher.drain(5.0) == 3
        assert c.loop.time() == pytest.approx(5.0, abs=0.01)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, ShuttingDownError) for r in results)
        assert await c.batcher.close()
        assert c.loop.time() == pytest.approx(5.0, abs=0.01), "the run that nobody wanted was ended"


@on_virtual_time
async def test_closing_says_when_a_run_does_not_end() -> None:
    class Deaf(VirtualRunners):
        def _execute(self, job: Any) -> None:
            super()._execute(job)
            job.handle.bind(None)

    async with case(cost=lambda rows, length: 100.0) as c:
        c.runners.__class__ = Deaf
        c.ask(rows_of(1))
        await c.turn()
        assert not await c.batcher.close()
        assert c.loop.time() == pytest.approx(batcher_module.CLOSE_LIMIT_S, abs=0.01)
        await asyncio.sleep(100)


# ---- inline


@on_virtual_time
async def test_short_runs_happen_inline_and_nothing_else_does() -> None:
    model = RowModel(row_signature(max_rows=4), profile(RISING, inline=9))
    async with case(model=model) as c:
        inline = c.batcher.run_inline
        answer = inline(request(rows_of(2), "total", "same"))
        assert answer is not None
        assert [a.tolist() for a in answer.outputs] == [[[6.0]], same(2)]
        assert answer.batch_rows == 1
        assert inline(request(rows_of(2, rows=3))) is not None, "nine elements"
        assert inline(request(rows_of(2, length=10))) is None, "too many elements"
        assert inline(request(rows_of(2, rows=5, length=1))) is None, "more rows than a run may take"
        assert inline(request(np.empty((0, 3)))) is None, "no rows"
        assert inline(request(rows_of(2), deadline=c.loop.time())) is None, "too late"
        assert inline(request(rows_of(2), deadline=c.loop.time() + 1)) is not None
        assert c.stats.execution_count == 3
        assert c.stats.inference_count == 5
        with pytest.raises(ModelExecutionError):
            inline(request(rows_of(BAD)))
        c.ask(rows_of(1, length=10))
        await c.turn()
        assert inline(request(rows_of(2))) is None, "as many runs as there are instances go on"
        c.ask(rows_of(1, length=10))
        await c.turn()
        assert inline(request(rows_of(2))) is None, "others wait before it"
        await asyncio.gather(*c.tasks)
        assert inline(request(rows_of(2))) is not None
        await c.batcher.drain(1)
        assert inline(request(rows_of(2))) is None


@on_virtual_time
async def test_a_lone_row_is_padded_inline_too() -> None:
    async with case(model=RowModel(profile=profile(RISING, exactness="padded", inline=100))) as c:
        answer = c.batcher.run_inline(request(rows_of(4)))
        assert answer is not None
        assert answer.outputs[0].tolist() == same(4)
        assert c.runs == [2]
        c.batcher.run_inline(request(rows_of(4, rows=2)))
        assert c.runs == [2, 2]


class Clockwork:
    """Stands for ``time.perf_counter``; a run takes what is wound up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.run_s = 1e-5
        monkeypatch.setattr("inferway_gateway.core.batcher.time.perf_counter", self)

    def __call__(self) -> float:
        self.now += self.run_s
        return self.now


def test_a_model_whose_inline_runs_are_slow_leaves_the_loop_for_good(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clockwork(monkeypatch)

    async def body() -> None:
        model = RowModel(profile=profile(RISING, inline=100))
        async with case(model=model) as c:
            for _ in range(4):
                clock.run_s = 1e-3
                assert c.batcher.run_inline(request(rows_of(1))) is not None
                clock.run_s = 1e-5
                for _ in range(200):
                    assert c.batcher.run_inline(request(rows_of(1))) is not None
            clock.run_s = 1e-3
            for _ in range(5):
                assert c.batcher.run_inline(request(rows_of(1))) is not None
            clock.run_s = 1e-5
            assert c.batcher.run_inline(request(rows_of(1))) is None
            assert (await c.ask(rows_of(1))).outputs[0].tolist() == same(1)

    with caplog.at_level(logging.WARNING):
        virtually(body)
    assert [r.message for r in caplog.records] == [
        "a model: runs were measured short and are not, the last took 1000 µs; they leave the event loop for good"
    ]


def test_an_operator_who_asked_for_inline_runs_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clockwork(monkeypatch)
    clock.run_s = 1e-3

    async def body() -> None:
        async with case() as c:
            config = ModelConfig(session=SessionOptions(inline=True))
            model = RowModel(profile=profile(RISING, inline=100))
            trusted = Batcher(model, config, ModelStats(), c.runners, run_timeout_s=1)
            for _ in range(20):
                assert trusted.run_inline(request(rows_of(1))) is not None
            await trusted.close()

    virtually(body)


# ---- everything at once


class Simulation:
    """Arrivals of every kind over some virtual seconds, and what must be true of all of them."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.threads = draw.randint(1, 3)
        self.instances = draw.choice((None, 1, 2))
        max_rows = draw.choice((0, 1, 3, 8))
        levels = draw.choice((0, 0, 3))
        padding = draw.choice(
            (
                (),
                PADDING,
                (PaddingAxis({"x": 1}, {"same": 1}, max_waste=draw.random()),),
                (PaddingAxis({"x": 1}, {"same": 1}, buckets=(2, 4, 8)),),
            )
        )
        self.policy = BatchPolicy(
            enabled=draw.choice((None, None, True, False)),
            preferred_rows=draw.choice(((), (), (2,), (4, 8))),
            max_queue_delay_s=draw.choice((0.0, 0.0, 0.3)),
            max_queue_rows=draw.choice((4096, 4096, 12)),
            max_queue_bytes=draw.choice((10**9, 10**9, 600)),
            priority_levels=levels,
            queue=QueuePolicy(
                default_timeout_s=draw.choice((None, None, 2.0)),
                timeout_action=draw.choice(("reject", "delay")),
                max_queue_requests=draw.choice((0, 0, 6)),
            ),
            preserve_order=draw.random() < 0.25,
            padding=padding,
        )
        self.model = RowModel(
            row_signature(max_rows=max_rows, optional_bias=True),
            profile(
                draw.choice((RISING, FLAT, FALLING, {})),
                exactness=draw.choice(("exact", "padded", "inexact")),
                row_elements=draw.choice((0, 3)),
            ),
            fragile_rows=draw.choice((0, 0, 0, 5)),
        )
        self.max_rows = max_rows
        self.base, self.slope = draw.choice(((0.1, 0.0), (0.01, 0.05), (0.0, 0.2), (0.001, 0.3)))
        self.run_timeout_s = draw.choice((1000.0, 3.0))
        self.trouble = draw.random() < 0.5
        self.impatience = draw.random() < 0.5
        self.outcomes: list[str] = []

    def cost(self, rows: int, length: int) -> float:
        return self.base + self.slope * rows * length / 4

    async def caller(self, batcher: Batcher, number: int) -> None:
        draw = self.draw
        loop = asyncio.get_running_loop()
        await asyncio.sleep(draw.choice((0.0, 0.0, draw.random(), draw.random() * 5)))
        rows, length = draw.choice((1, 1, 1, 2, 3, draw.randint(0, 20))), draw.choice((3, 3, draw.randint(1, 8)))
        if self.model.fragile_rows:
            rows = min(rows, self.model.fragile_rows)
        x = np.arange(rows * length, dtype=float).reshape(rows, length) + 1000.0 * number
        bias = np.full((rows, 1), float(number)) if draw.random() < 0.2 else None
        outputs = draw.choice((("same",), ("total", "same"), ("first",), ("same", "total", "first")))
        bad = stuck = False
        if self.trouble and rows and draw.random() < 0.15:
            x[draw.randrange(rows), 0] = BAD
            bad = True
        elif self.trouble and rows and self.run_timeout_s < 1000 and draw.random() < 0.05:
            x[draw.randrange(rows), 0] = STUCK
            stuck = True
        deadline = queue_timeout_s = cancel_at = None
        if self.impatience:
            deadline = loop.time() + draw.random() * 4 if draw.random() < 0.3 else None
            queue_timeout_s = draw.random() * 2 if draw.random() < 0.2 else None
            cancel_at = loop.time() + draw.random() * 3 if draw.random() < 0.3 else None
        wanted = request(
            x, *outputs, bias=bias, priority=draw.randint(0, 4), deadline=deadline, queue_timeout_s=queue_timeout_s
        )
        task = loop.create_task(batcher.infer(wanted))
        if cancel_at is not None:
            loop.call_at(cancel_at, task.cancel)
        try:
            answer = await task
        except asyncio.CancelledError:
            assert cancel_at is not None, "nobody asked for that"
            self.outcomes.append("cancelled")
        except ModelExecutionError:
            assert bad, "a good request failed with the model's error"
            self.outcomes.append("failed")
        except DeadlineExceededError:
            timed = self.policy.queue.default_timeout_s is not None and self.policy.queue.timeout_action == "reject"
            asked = queue_timeout_s is not None and self.policy.queue.timeout_action == "reject"
            long = self.cost(max(rows, 2), 8) >= self.run_timeout_s
            assert stuck or long or deadline is not None or timed or asked, "a patient request ran out of time"
            self.outcomes.append("late")
        except QueueFullError:
            self.outcomes.append("full")
        else:
            assert not bad
            assert not stuck
            assert deadline is None or loop.time() <= deadline + 0.01
            assert len(answer.outputs) == len(outputs)
            for name, array in zip(outputs, answer.outputs, strict=True):
                np.testing.assert_array_equal(array, expected(x, name, bias))
            self.outcomes.append("answered")

    async def run(self) -> None:
        async with asyncio.timeout(1_000_000):
            stats = ModelStats()
            runners = VirtualRunners(self.threads, self.cost)
            config = ModelConfig(batching=self.policy, instances=self.instances)
            async with runners:
                batcher = Batcher(self.model, config, stats, runners, run_timeout_s=self.run_timeout_s)
                count = self.draw.randint(1, 40)
                async with asyncio.TaskGroup() as callers:
                    for number in range(1, count + 1):
                        callers.create_task(self.caller(batcher, number))
                assert len(self.outcomes) == count
                # What callers left behind, a run that had begun, ends by itself or is ended.
                assert await batcher.drain(0) == 0
                assert await batcher.close()
                self.check(batcher, stats, runners)
            assert len(asyncio.all_tasks()) == 1

    def check(self, batcher: Batcher, stats: ModelStats, runners: VirtualRunners) -> None:
        assert (stats.queued_requests, stats.queued_rows, stats.queued_bytes, stats.running) == (0, 0, 0, 0)
        queue = batcher._queue
        assert (queue.requests, queue.rows, queue.nbytes) == (0, 0, 0)
        assert all(level.requests == 0 and not level.groups for level in queue._levels)
        assert not batcher._jobs
        assert not batcher._waiters
        assert not any(batcher._unsent.values())
        assert not runners._running
        assert stats.queue.count == self.outcomes.count("answered")
        assert stats.execution_count == len(self.model.runs)
        assert stats.dropped_cancelled <= self.outcomes.count("cancelled")
        most = max((ran.rows for ran in self.model.runs), default=0)
        assert not self.max_rows or most <= max(self.max_rows, 2 if batcher._pad_lone else 1)
        at_once = self.instances or self.threads
        for begun, _, _ in runners.timeline:
            assert sum(b <= begun < e for b, e, _ in runners.timeline) <= min(at_once, self.threads)


def simulate(seed: int) -> None:
    simulation = Simulation(seed)
    try:
        virtually(simulation.run)
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


@pytest.mark.parametrize("block", range(12))
def test_every_live_waiter_is_answered_exactly_once_with_its_own_rows(block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        simulate(seed)


@settings(max_examples=50, deadline=None)
@given(st.integers(10_000, 10_000_000))
def test_every_live_waiter_is_answered_whatever_the_seed(seed: int) -> None:
    simulate(seed)
