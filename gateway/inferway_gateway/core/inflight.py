"""The requests that an executor has under way, each in a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from .errors import ShuttingDownError

CLOSE_LIMIT_S: Final = 5.0
_Result = TypeVar("_Result")


class InFlight:
    """Runs requests in tasks, so that they can be waited for and ended, and so that timeouts work in them: until it
    first waits, a request that comes over HTTP has no task of its own."""

    __slots__ = ("_tasks", "draining")

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.draining = False

    async def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Await ``work``. Being cancelled cancels it, and waits for its end.

        Raises:
            ShuttingDownError: no new work is taken, or ``work`` was given up on.
        """
        if self.draining:
            work.close()
            raise ShuttingDownError("the model version is being taken out of service")
        task = asyncio.create_task(work)
        self._tasks.add(task)
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.exception()  # seen, and of no interest to anybody
            raise
        finally:
            self._tasks.discard(task)
        if task.cancelled():
            raise ShuttingDownError("the model version was taken out of service")
        return task.result()

    async def drain(self, timeout_s: float) -> int:
        """Take no new work and wait for what there is; what is left after ``timeout_s`` seconds is ended.

        Returns:
            How many requests were given up on.
        """
        self.draining = True
        if not self._tasks:
            return 0
        _, late = await asyncio.wait(set(self._tasks), timeout=timeout_s)
        for task in late:
            task.cancel()
        return len(late)

    async def close(self) -> bool:
        """Drain at once; True: nothing runs any more."""
        await self.drain(0)
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=CLOSE_LIMIT_S)
        return not self._tasks
