"""The batcher over a session whose runs happen in other processes and can end them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from batching_fakes import RISING, RowModel, profile, request, rows_of
from inferway_gateway.core.backend import Done, IsolatedSession, RunHandle
from inferway_gateway.core.batcher import CROWD, Answer, Batcher
from inferway_gateway.core.errors import GatewayError, ModelExecutionError, ModelFailingError, WorkerCrashedError
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.tensors import Arrays

DEADLY = -3.0
"""A row that holds this value ends the process, and with it whatever else runs there."""


@dataclass
class Mortal(RowModel):
    """A ``RowModel`` in one process that can die. On the loop it answers at the loop's next turn."""

    lanes: int = 2
    capacity: int = 2
    begin_max_bytes: int = 1 << 16
    quick_max_elements: int = 0
    refused: GatewayError | None = None
    convicted: int = 0
    begun: int = 0
    waited: int = 0
    """Runs that the loop waited for."""
    slow: bool = False
    """Such runs are not over when they have been waited for."""
    lives: int = 0
    """How often a process ended."""
    watcher: Callable[[], None] | None = None

    def refusal(self) -> GatewayError | None:
        return self.refused

    def convict(self) -> None:
        self.convicted += 1

    def watch(self, changed: Callable[[], None] | None) -> None:
        self.watcher = changed

    def run(self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None = None) -> list[NDArray[Any]]:
        lives = self.lives
        found = super().run(inputs, outputs, handle)
        if (inputs["x"] == DEADLY).any():
            self.lives += 1
            raise WorkerCrashedError("it died")
        if self.lives != lives:
            raise WorkerCrashedError("it died beside another")
        return found

    def begin(
        self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle, done: Done, *, wait: bool = False
    ) -> bool:
        if not self.capacity:
            return False
        self.begun += 1
        inputs = {name: array.copy() for name, array in inputs.items()}

        def later() -> None:
            try:
                done(self.run(inputs, outputs, handle))
            except GatewayError as error:
                done(error)

        self.waited += wait
        if wait and not self.slow:
            later()
        else:
            asyncio.get_running_loop().call_soon(later)
        return True


async def all_of(batcher: Batcher, values: Sequence[float]) -> list[Answer | BaseException]:
    async with asyncio.timeout(20):
        asked = [batcher.infer(request(rows_of(value))) for value in values]
        return await asyncio.gather(*asked, return_exceptions=True)


def batcher_over(session: Mortal, pool: RunnerPool) -> Batcher:
    config = ModelConfig(batching=BatchPolicy(preferred_rows=(8,)))
    return Batcher(session, config, ModelStats(), pool, run_timeout_s=20.0)


def mortal(**changes: Any) -> Mortal:
    return Mortal(profile=profile(RISING), **changes)


def test_the_fake_is_what_it_stands_for() -> None:
    assert isinstance(mortal(), IsolatedSession)
    assert not isinstance(RowModel(), IsolatedSession)


@pytest.mark.parametrize("bound", [1 << 16, 0], ids=["begun on the loop", "run on a thread"])
async def test_the_one_that_kills_is_told_and_its_mates_are_answered(bound: int) -> None:
    session = mortal(begin_max_bytes=bound)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        found = await all_of(batcher, [1.0, 2.0, DEADLY, 4.0])
        assert await batcher.close()
    guilty = found.pop(2)
    assert isinstance(guilty, WorkerCrashedError)
    assert "twice" in guilty.message
    for value, answer in zip((1.0, 2.0, 4.0), found, strict=True):
        assert isinstance(answer, Answer)
        assert np.array_equal(answer.outputs[0], rows_of(value) * 2 + 1)
    assert session.convicted == 1
    assert (session.begun > 0) is (bound > 0)
    again = [run.rows for run in session.runs if run.rows == 1]
    assert len(again) >= 4  # each once more, alone


async def test_nothing_runs_beside_a_suspect() -> None:
    session = mortal(begin_max_bytes=0)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        found = await all_of(batcher, [DEADLY, *range(40), DEADLY])
        assert await batcher.close()
    assert sum(isinstance(answer, WorkerCrashedError) for answer in found) == 2
    assert sum(isinstance(answer, Answer) for answer in found) == 40
    assert session.convicted == 2


async def test_what_fails_without_ending_its_process_is_cut_in_two_as_everywhere() -> None:
    session = mortal()
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        found = await all_of(batcher, [1.0, 2.0, -1.0, 4.0])
        assert await batcher.close()
    assert isinstance(found.pop(2), ModelExecutionError)
    assert all(isinstance(answer, Answer) for answer in found)
    assert session.convicted == 0


async def test_requests_wait_for_a_process_that_starts_again() -> None:
    session = mortal(capacity=0)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        waiting = asyncio.ensure_future(all_of(batcher, [1.0, 2.0]))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not session.runs
        session.capacity = 2
        assert session.watcher is not None
        threading.Thread(target=session.watcher).start()
        assert all(isinstance(answer, Answer) for answer in await waiting)
        assert await batcher.close()
    assert session.watcher is None


async def test_who_waits_is_told_when_the_session_is_left_alone_and_who_comes_then_at_once() -> None:
    session = mortal(capacity=0)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        waiting = asyncio.ensure_future(all_of(batcher, [1.0, 2.0]))
        for _ in range(5):
            await asyncio.sleep(0)
        session.refused = ModelFailingError("it is held back", retry_after_s=5.0)
        assert session.watcher is not None
        session.watcher()
        assert all(isinstance(answer, ModelFailingError) for answer in await waiting)
        (late,) = await all_of(batcher, [3.0])
        assert late is session.refused
        assert await batcher.close()
    assert not session.runs


async def test_large_requests_leave_the_loop_to_others() -> None:
    session = mortal(begin_max_bytes=64)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        answer = await batcher.infer(request(rows_of(1.0, rows=4)))
        assert await batcher.close()
    assert len(answer.outputs[0]) == 4
    assert not session.begun


def ask_at_once(batcher: Batcher, value: float) -> Answer | None:
    return batcher.run_inline(request(rows_of(value)))


async def alone_again(batcher: Batcher) -> None:
    """Have the batcher see so many requests one after the other that it takes the next for alone."""
    for _ in range(CROWD):
        await asyncio.sleep(0)  # a turn of the loop
        await batcher.infer(request(rows_of(0.0)))
    await asyncio.sleep(0)


async def test_the_loop_waits_for_a_short_run_of_the_only_request() -> None:
    session = mortal(quick_max_elements=12)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        assert batcher.inline
        for value in (1.0, 2.0):
            answer = ask_at_once(batcher, value)
            assert answer is not None
            assert np.array_equal(answer.outputs[0], rows_of(value) * 2 + 1)
            await asyncio.sleep(0)
        assert batcher.run_inline(request(rows_of(1.0, rows=5))) is None, "more elements than are quick"
        assert batcher.in_flight == 0
        assert await batcher.close()
    assert session.waited == session.begun == 2


async def test_requests_that_come_together_are_not_waited_for_until_they_come_apart_again() -> None:
    session = mortal(quick_max_elements=12)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        assert ask_at_once(batcher, 1.0) is not None
        assert ask_at_once(batcher, 2.0) is None, "in the same turn of the loop as the one before"
        assert not batcher.inline
        found = await all_of(batcher, [float(value) for value in range(8)])
        assert all(isinstance(answer, Answer) for answer in found)
        assert session.waited == 1
        await alone_again(batcher)
        assert batcher.inline
        assert ask_at_once(batcher, 3.0) is not None
        assert await batcher.close()
    assert session.waited == 2
    assert max(run.rows for run in session.runs) > 1, "what came together ran together"


async def test_a_run_that_is_not_over_in_time_is_answered_by_the_same_run() -> None:
    session = mortal(quick_max_elements=12, slow=True)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        asked = request(rows_of(4.0))
        assert batcher.run_inline(asked) is None
        assert batcher.in_flight == 1
        assert not batcher.inline or ask_at_once(batcher, 1.0) is None, "there is company"
        answer = await batcher.infer(asked)
        assert np.array_equal(answer.outputs[0], rows_of(4.0) * 2 + 1)
        assert batcher.in_flight == 0
        assert await batcher.close()
    assert len(session.runs) == 1


async def test_who_goes_away_while_such_a_run_goes_on_leaves_nothing_behind() -> None:
    session = mortal(quick_max_elements=12, slow=True)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        asked = request(rows_of(4.0))
        assert batcher.run_inline(asked) is None
        waiting = asyncio.ensure_future(batcher.infer(asked))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert batcher.in_flight == 0
        assert await batcher.close()


@pytest.mark.parametrize("slow", [False, True], ids=["at once", "later"])
async def test_a_request_that_was_waited_for_and_kills_is_tried_again_alone_and_told(slow: bool) -> None:
    session = mortal(quick_max_elements=12, slow=slow)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        asked = request(rows_of(DEADLY))
        assert batcher.run_inline(asked) is None
        with pytest.raises(WorkerCrashedError, match="twice"):
            await batcher.infer(asked)
        await alone_again(batcher)
        assert await batcher.close()
    assert session.convicted == 1
    assert session.lives == 2


async def test_what_the_model_refuses_while_it_is_waited_for_is_said_at_once() -> None:
    session = mortal(quick_max_elements=12)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        with pytest.raises(ModelExecutionError, match="refused"):
            ask_at_once(batcher, -1.0)
        assert batcher.in_flight == 0
        assert await batcher.close()


async def test_a_model_that_drains_or_is_held_back_is_not_waited_for() -> None:
    session = mortal(quick_max_elements=12)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        session.refused = ModelFailingError("it is held back", retry_after_s=5.0)
        assert ask_at_once(batcher, 1.0) is None
        session.refused = None
        await batcher.drain(0)
        assert ask_at_once(batcher, 1.0) is None
        assert await batcher.close()
    assert not session.waited


async def test_a_process_whose_runs_are_not_as_short_as_it_says_is_not_waited_for_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    session = mortal(quick_max_elements=12)
    run = session.run

    def slowly(inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None = None) -> list[NDArray[Any]]:
        nonlocal now
        now += 0.001
        return run(inputs, outputs, handle)

    monkeypatch.setattr(session, "run", slowly)
    monkeypatch.setattr("inferway_gateway.core.batcher.time.perf_counter", lambda: now)
    async with RunnerPool(2) as pool:
        batcher = batcher_over(session, pool)
        asked = 0
        while batcher.inline and asked < 1000:
            asked += 1
            assert ask_at_once(batcher, 1.0) is not None
            await asyncio.sleep(0)
        assert asked < 100
        assert await batcher.close()
