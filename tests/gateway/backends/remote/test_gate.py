from __future__ import annotations

import asyncio
import math

import pytest

from inferway_gateway.backends.remote.gate import Gate
from inferway_gateway.core.errors import DeadlineExceededError, QueueFullError, ShuttingDownError


class Case:
    def __init__(self, in_flight: int = 1, queued: int = 10) -> None:
        self.gate = Gate(in_flight, queued)
        self.entered: list[str] = []
        self.go: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, name: str, priority: int = 0, until: float = math.inf) -> asyncio.Task[None]:
        self.go[name] = asyncio.Event()

        async def run() -> None:
            async with self.gate.place(priority, until):
                self.entered.append(name)
                await self.go[name].wait()

        task = self.tasks[name] = asyncio.create_task(run())
        await asyncio.sleep(0)
        return task

    async def finish(self, name: str) -> None:
        self.go[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)


async def test_places_go_by_priority_and_then_by_arrival() -> None:
    case = Case()
    for name, priority in (("first", 0), ("late", 0), ("later", 0), ("second", 2), ("urgent", 1)):
        await case.start(name, priority)
    for name in ("first", "urgent", "second", "late", "later"):
        await case.finish(name)
    assert case.entered == ["first", "urgent", "second", "late", "later"]


async def test_no_more_than_that_are_in_at_once() -> None:
    case = Case(in_flight=2)
    for name in "abc":
        await case.start(name)
    assert case.entered == ["a", "b"]
    assert case.gate.waiting == 1
    await case.finish("a")
    assert case.entered == ["a", "b", "c"]


async def test_too_many_that_wait_are_refused() -> None:
    case = Case(queued=1)
    await case.start("in")
    await case.start("waits")
    with pytest.raises(QueueFullError):
        await (await case.start("refused"))
    await case.finish("in")
    await case.finish("waits")


async def test_who_is_cancelled_while_it_waits_takes_no_place() -> None:
    case = Case()
    await case.start("in")
    gone = await case.start("gone")
    await case.start("next")
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await case.finish("in")
    assert case.entered == ["in", "next"]
    await case.finish("next")


async def test_a_place_given_to_who_is_cancelled_at_that_moment_is_given_on() -> None:
    case = Case()
    await case.start("in")
    gone = await case.start("gone")
    await case.start("next")
    case.go["in"].set()
    case.tasks["in"].add_done_callback(lambda _: gone.cancel())
    await case.tasks["in"]
    async with asyncio.timeout(5):
        while "next" not in case.entered:
            await asyncio.sleep(0)
    await case.finish("next")
    assert gone.cancelled() or case.entered[1] == "gone"
    await case.start("after")
    assert case.entered[-1] == "after"
    await case.finish("after")


async def test_who_waits_too_long_is_sent_away_and_the_next_one_gets_the_place() -> None:
    case = Case()
    await case.start("in")
    late = await case.start("late", until=asyncio.get_running_loop().time() + 0.01)
    with pytest.raises(DeadlineExceededError):
        await late
    await case.finish("in")
    await case.start("next")
    assert case.entered == ["in", "next"]
    await case.finish("next")


async def test_those_that_gave_up_are_not_kept() -> None:
    case = Case(queued=10_000)
    await case.start("in")
    for i in range(1000):
        task = await case.start(f"gone-{i}")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert case.gate.waiting == 0
    assert len(case.gate._waiting) < 100
    await case.finish("in")


async def test_a_closed_gate_sends_everybody_away() -> None:
    case = Case()
    await case.start("in")
    waits = await case.start("waits")
    case.gate.close()
    with pytest.raises(ShuttingDownError):
        await waits
    with pytest.raises(ShuttingDownError):
        await (await case.start("new"))
    await case.finish("in")
