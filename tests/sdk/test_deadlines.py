"""Deadlines of many calls behind one timer, on virtual time."""

from __future__ import annotations

import asyncio

import pytest

from inferway._deadlines import Deadlines

pytestmark = pytest.mark.looptime


async def call(deadlines: Deadlines, seconds: float, work_s: float) -> str:
    """Works under a deadline as the transport does."""
    entry = deadlines.begin(seconds)
    try:
        await asyncio.sleep(work_s)
    except asyncio.CancelledError:
        if deadlines.end(entry):
            return "late"
        raise
    finally:
        deadlines.end(entry)
    return "done"


async def test_work_that_is_done_in_time_is_left_alone() -> None:
    deadlines = Deadlines(asyncio.get_running_loop())
    assert await call(deadlines, 5, 1) == "done"
    assert deadlines._entries == set()
    await asyncio.sleep(10)
    assert deadlines._timer is None, "a timer that has nothing to watch ends"


async def test_each_call_ends_at_its_own_time() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    ended: list[tuple[float, str]] = []
    started = loop.time()

    async def one(seconds: float, work_s: float) -> None:
        found = await call(deadlines, seconds, work_s)
        ended.append((round(loop.time() - started, 3), found))

    await asyncio.gather(one(5, 100), one(1, 100), one(3, 2), one(3, 100), one(7, 6))
    assert ended == [(1, "late"), (2, "done"), (3, "late"), (5, "late"), (6, "done")]


async def test_many_calls_need_few_timers() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    made = 0
    real = loop.call_at

    def counting(when: float, callback: object, *args: object, **kwargs: object) -> asyncio.TimerHandle:
        nonlocal made
        if callback == deadlines._wake:
            made += 1
        return real(when, callback, *args, **kwargs)  # type: ignore[arg-type]

    loop.call_at = counting  # type: ignore[method-assign]
    for _ in range(100):
        await asyncio.gather(*(call(deadlines, 60, 0.01) for _ in range(20)))
    assert made == 1


async def test_a_callers_own_cancellation_passes_through() -> None:
    deadlines = Deadlines(asyncio.get_running_loop())
    task = asyncio.create_task(call(deadlines, 5, 100))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert deadlines._entries == set()


async def test_a_cancellation_at_the_same_moment_is_not_swallowed() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    task = asyncio.create_task(call(deadlines, 5, 100))
    await asyncio.sleep(0)
    loop.call_at(loop.time() + 5, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_deadline_within_a_timeout_ends_alone() -> None:
    deadlines = Deadlines(asyncio.get_running_loop())
    async with asyncio.timeout(10):
        assert await call(deadlines, 5, 100) == "late"
        assert await call(deadlines, 1, 0.5) == "done"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3):
            await call(deadlines, 5, 100)


async def test_an_error_of_the_work_takes_the_cancellation_back() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)

    async def stubborn() -> str:
        entry = deadlines.begin(1)
        try:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError as error:
                raise ValueError("something else") from error
        finally:
            deadlines.end(entry)
        return "never"

    async def outer() -> str:
        with pytest.raises(ValueError, match="something else"):
            await stubborn()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(1)
        return "went on"

    assert await asyncio.create_task(outer()) == "went on"


def test_a_deadline_needs_a_task() -> None:
    loop = asyncio.new_event_loop()
    try:
        failed: list[BaseException] = []

        def callback() -> None:
            try:
                Deadlines(loop).begin(1)
            except RuntimeError as error:
                failed.append(error)
            loop.stop()

        loop.call_soon(callback)
        loop.run_forever()
        assert len(failed) == 1
    finally:
        loop.close()
