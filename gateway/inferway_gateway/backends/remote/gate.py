"""How many requests of one version are under way, and how many wait for that, in which order."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ...core.errors import DeadlineExceededError, QueueFullError, ShuttingDownError


class _Waiter:
    __slots__ = ("future", "given_up")

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future = future
        self.given_up = False


class Gate:
    """Lets ``in_flight`` requests through at once and ``queued`` wait: by priority, and among equals as they came.

    A place that comes free is handed to the next one, so that nobody who comes later overtakes who waits.
    """

    def __init__(self, in_flight: int, queued: int) -> None:
        self._free = in_flight
        self._room = queued
        self._serial = 0
        self._waiting: list[tuple[int, int, _Waiter]] = []
        self._alive = 0
        self._closed = False

    @property
    def waiting(self) -> int:
        return self._alive

    @asynccontextmanager
    async def place(self, priority: int, until: float) -> AsyncIterator[None]:
        """Hold one of the places.

        Args:
            priority: 1 is first, 0 comes after all that say one.
            until: moment on the loop's clock after which waiting is of no use.
        Raises:
            QueueFullError: too many wait already.
            DeadlineExceededError: ``until`` passed.
            ShuttingDownError: the gate was closed.
        """
        await self._enter(priority, until)
        try:
            yield
        finally:
            self._hand_on()

    def close(self) -> None:
        """Let nobody in any more, and send away those that wait."""
        self._closed = True
        for _, _, waiter in self._waiting:
            if not waiter.future.done():
                waiter.future.set_exception(_closed())
        self._waiting.clear()

    async def _enter(self, priority: int, until: float) -> None:
        if self._closed:
            raise _closed()
        if self._free > 0:  # then nobody waits: a place that comes free goes to whoever does
            self._free -= 1
            return
        if self._alive >= self._room:
            raise QueueFullError(f"the model's queue is full: {self._alive} requests wait already", retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future())
        self._serial += 1
        heapq.heappush(self._waiting, (priority or 1 << 62, self._serial, waiter))
        self._alive += 1
        timer = None if math.isinf(until) else loop.call_at(until, _expire, waiter.future)
        try:
            await waiter.future
        except BaseException:
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                self._hand_on()  # a place was given to somebody who was cancelled at the same moment
            raise
        finally:
            waiter.given_up = True
            self._alive -= 1
            if timer is not None:
                timer.cancel()
            if len(self._waiting) > 2 * self._alive + 64:
                self._waiting = [entry for entry in self._waiting if not entry[2].given_up]
                heapq.heapify(self._waiting)

    def _hand_on(self) -> None:
        while self._waiting:
            _, _, waiter = heapq.heappop(self._waiting)
            if not waiter.given_up and not waiter.future.done():
                waiter.future.set_result(None)
                return
        self._free += 1


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(DeadlineExceededError("the request's time was over before it could be sent on"))


def _closed() -> ShuttingDownError:
    return ShuttingDownError("the model version is being taken out of service")
