from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from batching_fakes import RISING, RowModel, expected, profile, request, row_signature, rows_of
from inferway_gateway.core import runners as runners_module
from inferway_gateway.core.batcher import Answer, Batcher
from inferway_gateway.core.errors import ModelExecutionError
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig, PaddingAxis
from inferway_gateway.core.runners import Job, RunnerPool, Source, usable_cpus
from inferway_gateway.core.stats import ModelStats


class Task:
    """One job: what it does, and where it was done."""

    def __init__(self, source: Tasks, work: Callable[[], None]) -> None:
        self.source: Source = source
        self.direct = False
        self._work = work
        self.thread = ""
        self.finished = asyncio.Event()

    def begin(self) -> bool:
        return False

    def execute(self) -> None:
        self.thread = threading.current_thread().name
        self._work()

    def finish(self) -> None:
        self.finished.set()


class Tasks:
    """A source of jobs that records what the pool tells it."""

    def __init__(self, pool: RunnerPool, instances: int = 100) -> None:
        self.pool = pool
        self.waiting: list[Task] = []
        self.running = 0
        self.most_running = 0
        self.instances = instances
        self.refreshed = 0
        self.errors: list[Exception] = []
        self.order: list[Task] = []

    def add(self, work: Callable[[], None] = lambda: None) -> Task:
        task = Task(self, work)
        with self.pool.lock:
            self.waiting.append(task)
            self.pool.offer(self)
        return task

    def take(self, now: float) -> Job | None:
        if not self.waiting or self.running >= self.instances:
            return None
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        task = self.waiting.pop(0)
        self.order.append(task)
        return task

    def completed(self, job: Job) -> bool:
        self.running -= 1
        return bool(self.waiting)

    def refresh(self) -> None:
        self.refreshed += 1

    def fail(self, error: Exception) -> None:
        self.errors.append(error)


async def soon(wait: Awaitable[object]) -> None:
    async with asyncio.timeout(20):
        await wait


async def test_jobs_run_on_threads_of_the_pool_and_are_answered_on_the_loop() -> None:
    async with RunnerPool(2) as pool:
        source = Tasks(pool)
        tasks = [source.add() for _ in range(50)]
        for task in tasks:
            await soon(task.finished.wait())
        assert {task.thread for task in tasks} <= {"inferway-runner-0", "inferway-runner-1"}
        assert source.refreshed >= 1
        assert not pool._running
    assert not any(thread.name.startswith("inferway-runner") for thread in threading.enumerate())


async def test_no_more_jobs_run_at_once_than_there_are_threads_and_instances() -> None:
    async with RunnerPool(3) as pool:
        both = threading.Barrier(2, timeout=20)
        source = Tasks(pool, instances=2)
        tasks = [source.add(lambda: (both.wait(), None)[1]) for _ in range(20)]
        for task in tasks:
            await soon(task.finished.wait())
        assert source.most_running == 2
        wide = Tasks(pool)
        three = threading.Barrier(3, timeout=20)
        tasks = [wide.add(lambda: (three.wait(), None)[1]) for _ in range(30)]
        for task in tasks:
            await soon(task.finished.wait())
        assert wide.most_running == 3


async def test_a_thread_takes_the_next_job_itself_and_the_loop_is_told_once() -> None:
    async with RunnerPool(1) as pool:
        told: list[Callable[[], None]] = []
        passed_on = pool._tell
        all_done = threading.Event()

        def tell(callback: Callable[[], None]) -> None:
            told.append(callback)
            passed_on(callback)

        pool._tell = tell  # type: ignore[method-assign]
        source = Tasks(pool)
        tasks = [source.add() for _ in range(9)]
        last = source.add(all_done.set)
        # The loop stands still here; ten jobs follow each other all the same.
        assert all_done.wait(20)
        await soon(last.finished.wait())
        assert all(task.finished.is_set() for task in tasks)
        assert len(told) <= 3, "once for all that ended before the loop looked, and once for the last"


async def test_the_source_that_used_the_threads_least_is_next() -> None:
    now = 0.0

    def clock() -> float:
        return now

    async with RunnerPool(1, clock=clock) as pool:
        order: list[str] = []
        started, release = threading.Event(), threading.Event()

        def hold() -> None:
            started.set()
            assert release.wait(20)

        def take(name: str, seconds: float) -> Callable[[], None]:
            def work() -> None:
                nonlocal now
                order.append(name)
                now += seconds

            return work

        gate, slow, quick = Tasks(pool), Tasks(pool), Tasks(pool)
        gate.add(hold)
        assert started.wait(20)
        tasks = [slow.add(take("slow", 0.4)) for _ in range(3)] + [quick.add(take("quick", 0.1)) for _ in range(8)]
        release.set()
        for task in tasks:
            await soon(task.finished.wait())
        first_half = order[: order.index("slow", order.index("slow") + 1)]
        assert first_half.count("quick") in (4, 5), "four quick runs for a slow one"
        assert order.count("quick") == 8


async def test_a_defect_of_a_source_is_told_to_it_and_the_thread_serves_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Tasks):
        def take(self, now: float) -> Job | None:
            raise RuntimeError("take")

    class BrokenAfter(Tasks):
        def completed(self, job: Job) -> bool:
            raise RuntimeError("completed")

    class Unanswerable(Task):
        def finish(self) -> None:
            super().finish()
            raise RuntimeError("finish")

    async with RunnerPool(1) as pool:
        broken, after, healthy = Broken(pool), BrokenAfter(pool), Tasks(pool)
        broken.add()
        await soon(after.add().finished.wait())
        odd = Unanswerable(healthy, lambda: None)
        with pool.lock:
            healthy.waiting.append(odd)
            pool.offer(healthy)
        await soon(odd.finished.wait())
        await soon(healthy.add().finished.wait())
        assert [str(e) for e in broken.errors] == ["take"]
        assert [str(e) for e in after.errors] == ["completed"]
    assert [r.message for r in caplog.records] == ["answering a run failed"]


async def test_closing_waits_for_runs_and_leaves_behind_what_does_not_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runners_module, "_CLOSE_LIMIT_S", 0.05)
    release, started = threading.Event(), threading.Event()

    def stuck() -> None:
        started.set()
        release.wait(20)

    with caplog.at_level(logging.ERROR):
        async with RunnerPool(1) as pool:
            source = Tasks(pool)
            source.add(stuck)
            source.add()
            assert started.wait(20)
    assert [r.message for r in caplog.records] == ["1 runs did not end in 0.05 s and are left behind"]
    assert pool._members[0].daemon
    release.set()
    pool._members[0].join(20)
    with pool.lock:
        pool.offer(source)
    assert len(source.waiting) == 1, "a closed pool takes nothing"


async def test_as_many_threads_as_processors_unless_said_otherwise() -> None:
    assert RunnerPool().threads == usable_cpus() >= 1
    assert RunnerPool(7).threads == 7


# ---- the batcher on real threads


async def gather_soon(*waits: Awaitable[Answer]) -> list[Answer | BaseException]:
    async with asyncio.timeout(30):
        return await asyncio.gather(*waits, return_exceptions=True)


async def test_thousands_of_requests_over_real_threads_have_their_own_rows() -> None:
    model = RowModel(row_signature(max_rows=16), profile(RISING))
    stats = ModelStats()
    async with RunnerPool(3) as pool:
        batcher = Batcher(model, ModelConfig(), stats, pool, run_timeout_s=20)
        gone = 0

        async def caller(number: int) -> None:
            nonlocal gone
            for turn in range(40):
                x = rows_of(number * 100 + turn, rows=1 + (number + turn) % 40)
                task = asyncio.ensure_future(batcher.infer(request(x, "same", "total")))
                if (number + turn) % 11 == 0:
                    await asyncio.sleep(0)
                    task.cancel()
                try:
                    answer = await task
                except asyncio.CancelledError:
                    gone += 1
                    continue
                np.testing.assert_array_equal(answer.outputs[0], expected(x, "same"))
                np.testing.assert_array_equal(answer.outputs[1], expected(x, "total"))

        async with asyncio.timeout(60), asyncio.TaskGroup() as callers:
            for number in range(50):
                callers.create_task(caller(number))
        assert gone > 0
        assert stats.queue.count == 50 * 40 - gone
        assert await batcher.drain(10) == 0
        assert await batcher.close()
        assert (stats.queued_requests, stats.queued_rows, stats.queued_bytes, stats.running) == (0, 0, 0, 0)


async def test_a_run_is_formed_from_what_waits_when_the_thread_is_free() -> None:
    gate = threading.Event()
    model = RowModel(profile=profile(RISING), gate=gate)
    async with RunnerPool(1) as pool:
        batcher = Batcher(model, ModelConfig(), ModelStats(), pool, run_timeout_s=20)
        first = asyncio.ensure_future(batcher.infer(request(rows_of(0))))
        await asyncio.to_thread(model.entered.acquire)
        waiting = [asyncio.ensure_future(batcher.infer(request(rows_of(n)))) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        gate.set()
        await gather_soon(first, *waiting)
        assert [ran.rows for ran in model.runs] == [1, 3]
        await batcher.close()


async def test_a_run_on_a_real_thread_is_ended_when_its_caller_goes_away() -> None:
    model = RowModel(profile=profile(RISING), gate=threading.Event())
    async with RunnerPool(1) as pool:
        batcher = Batcher(model, ModelConfig(), ModelStats(), pool, run_timeout_s=100)
        task = asyncio.ensure_future(batcher.infer(request(rows_of(0))))
        await asyncio.to_thread(model.entered.acquire)
        task.cancel()
        await gather_soon(task)
        async with asyncio.timeout(20):
            assert await batcher.close()


async def test_a_bad_row_among_real_threads_fails_alone() -> None:
    model = RowModel(profile=profile(RISING))
    async with RunnerPool(2) as pool:
        batcher = Batcher(model, ModelConfig(), ModelStats(), pool, run_timeout_s=20)
        values = [-1.0 if n % 7 == 3 else float(n) for n in range(64)]
        results = await gather_soon(*(batcher.infer(request(rows_of(v))) for v in values))
        for value, result in zip(values, results, strict=True):
            if value < 0:
                assert isinstance(result, ModelExecutionError)
            else:
                assert isinstance(result, Answer)
                np.testing.assert_array_equal(result.outputs[0], expected(rows_of(value), "same"))
        await batcher.close()


async def test_arrays_are_let_go_when_their_request_is_answered() -> None:
    async with RunnerPool(2) as pool:
        policy = BatchPolicy(padding=(PaddingAxis({"x": 1}, {"same": 1}, max_waste=0.9),))
        model = RowModel(row_signature(max_rows=8), profile(RISING))
        batcher = Batcher(model, ModelConfig(batching=policy), ModelStats(), pool, run_timeout_s=20)
        alive: list[weakref.ref[Any]] = []

        async def one(number: int) -> None:
            x = rows_of(number, rows=1 + number % 12, length=1 + number % 7)
            deadline = asyncio.get_running_loop().time() + 1000
            answer = await batcher.infer(request(x, deadline=deadline))
            alive.extend((weakref.ref(x), *map(weakref.ref, answer.outputs)))

        async with asyncio.timeout(30):
            await asyncio.gather(*(one(number) for number in range(50)))
            # A queue that is not empty keeps what was taken out of turn a while, without what was large about it.
            model.gate, model.entered = threading.Event(), threading.Semaphore(0)
            waiting = [asyncio.ensure_future(one(number)) for number in range(8)]
            await asyncio.to_thread(model.entered.acquire)
            model.runs.clear()
            gc.collect()
            assert len(alive) == 100
            assert not any(ref() is not None for ref in alive)
            model.gate.set()
            await asyncio.gather(*waiting)
        assert len(batcher._expiries) <= 100
        await batcher.close()
