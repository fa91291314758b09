"""Shadow traffic: copies of requests, run on another version after their answer is given, and compared with it.

Nothing here is waited for by a caller. A copy takes a place in a short queue, or is dropped and counted where that is
full, in number or in bytes; a few tasks take them out one by one and put them to the shadow's own executor, at the last
level of its priorities. So shadows get what is left over: at most ``RUNS`` runs at once in the whole gateway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from .batcher import InferenceRequest
from .catalog import Shadow
from .errors import GatewayError
from .execution import Executor
from .model_config import ModelConfig
from .routing import Plan, ShadowStats

logger = logging.getLogger("inferway.shadow")

RUNS: Final = 2
"""Copies that run at once, over all models."""
QUEUED: Final = 64
"""Copies that wait at most."""
HELD_BYTES: Final = 64 * 1024 * 1024
"""Bytes of inputs and outputs that waiting and running copies keep in memory at most."""
TIMEOUT_S: Final = 30.0
"""How long a copy may take, a load of the shadow's version included."""
_OFF_LOOP_ELEMENTS: Final = 1 << 13
_PIECE_ELEMENTS: Final = 1 << 20
"""Elements that are compared at once: what bounds the memory that it takes."""


class Shown(Protocol):
    """A loaded model version, as far as a copy needs it."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def batcher(self) -> Executor: ...


Find = Callable[[str, int, float], Awaitable[Shown]]
"""Model, version and a deadline on the loop's clock to the version, loaded if need be; raises ``GatewayError``."""


Ask = Callable[[Any, float], Awaitable[tuple[Sequence[str], Sequence[NDArray[Any]]]]]
"""The shadow's version, as ``Find`` gave it, and the deadline to datatypes and outputs; raises ``GatewayError``."""


@dataclass(slots=True)
class _Copy:
    model: str
    shadow: Shadow
    stats: ShadowStats
    ask: Ask
    given: Sequence[NDArray[Any]]
    nbytes: int


class Shadows:
    """Runs copies of requests. Open it with ``async with``, on the running loop.

    Args:
        find: gives a version.
        held_bytes: see ``HELD_BYTES``.
    """

    def __init__(self, find: Find, *, held_bytes: int = HELD_BYTES) -> None:
        self._find = find
        self._limit_bytes = held_bytes
        self._held_bytes = 0
        self._queue: asyncio.Queue[_Copy] = asyncio.Queue(QUEUED)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Shadows:
        self._tasks = [asyncio.create_task(self._work(), name=f"inferway-shadow-{i}") for i in range(RUNS)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def offer(self, plan: Plan, answered: int, request: InferenceRequest, given: Sequence[NDArray[Any]]) -> None:
        """Copy a request that was answered, where it is the sample's turn. Never waits and never raises.

        Args:
            plan: the alias, which has a shadow.
            answered: the version that answered.
            request: what was asked; its arrays are read later and must not change.
            given: the outputs that were answered with; the same holds for them.
        """
        self.offer_asked(plan, answered, partial(_put, request), given, request.nbytes)

    def offer_asked(self, plan: Plan, answered: int, ask: Ask, given: Sequence[NDArray[Any]], nbytes: int) -> None:
        """``offer`` for a request that is put to a version in another way than as tensors.

        Args:
            nbytes: of the request, which ``ask`` holds.
        """
        shadow = plan.shadow
        if shadow is None or shadow.version == answered or not plan.samples_shadow():
            return
        stats = plan.shadow_stats
        nbytes += sum(array.nbytes for array in given)
        if self._queue.full() or self._held_bytes + nbytes > self._limit_bytes:
            stats.dropped += 1
            return
        self._held_bytes += nbytes
        self._queue.put_nowait(_Copy(plan.model, shadow, stats, ask, given, nbytes))

    async def idle(self) -> None:
        """Wait until every copy that was taken is done with."""
        await self._queue.join()

    async def _work(self) -> None:
        while True:
            copy = await self._queue.get()
            try:
                await self._run(copy)
            except GatewayError as error:
                copy.stats.failed += 1
                logger.debug("the shadow of '%s', version %d: %s", copy.model, copy.shadow.version, error.message)
            except Exception:
                copy.stats.failed += 1
                logger.exception("the shadow of '%s', version %d, failed unexpectedly", copy.model, copy.shadow.version)
            finally:
                self._held_bytes -= copy.nbytes
                self._queue.task_done()
            del copy  # the next one may be long in coming

    async def _run(self, copy: _Copy) -> None:
        deadline = asyncio.get_running_loop().time() + TIMEOUT_S
        served = await self._find(copy.model, copy.shadow.version, deadline)
        datatypes, got = await copy.ask(served, deadline)
        shadow = copy.shadow
        arguments = (datatypes, got, copy.given, shadow.rtol, shadow.atol)
        if sum(array.size for array in copy.given) > _OFF_LOOP_ELEMENTS:
            alike, difference = await asyncio.to_thread(compare, *arguments)
        else:
            alike, difference = compare(*arguments)
        stats = copy.stats
        stats.compared += 1
        stats.differing += not alike
        stats.largest_difference = max(stats.largest_difference, difference)


async def _put(asked: InferenceRequest, served: Shown, deadline: float) -> tuple[Sequence[str], Sequence[NDArray[Any]]]:
    executor = served.batcher
    signature = executor.signature
    datatypes = [signature.output(name).datatype for name in asked.outputs]
    request = InferenceRequest(
        asked.inputs,
        asked.outputs,
        signature.check(asked.inputs),
        asked.nbytes,
        priority=served.config.batching.priority_levels,
        deadline=deadline,
    )
    answer = await executor.infer(request)
    return datatypes, answer.outputs


def compare(
    datatypes: Sequence[str],
    got: Sequence[NDArray[Any]],
    given: Sequence[NDArray[Any]],
    rtol: float,
    atol: float,
) -> tuple[bool, float]:
    """Hold outputs against those that were given.

    Two numbers differ where ``|got - given| > atol + rtol * |given|``; NaN is like NaN, an infinity like itself.
    Strings, and tensors of another dtype or shape, are alike only when they are equal.

    Args:
        datatypes: of the outputs, as the wire has them.
        got, given: one array per output.
    Returns:
        Whether all are alike, and the largest finite absolute difference of two numbers.
    """
    alike = True
    largest = 0.0
    for datatype, left, right in zip(datatypes, got, given, strict=True):
        if left.dtype != right.dtype or left.shape != right.shape:
            alike = False
        elif datatype == "BYTES":
            alike = alike and bool(np.array_equal(left, right))
        else:
            flat_left, flat_right = left.reshape(-1), right.reshape(-1)
            for at in range(0, flat_left.size, _PIECE_ELEMENTS):
                a = _numbers(datatype, flat_left[at : at + _PIECE_ELEMENTS])
                b = _numbers(datatype, flat_right[at : at + _PIECE_ELEMENTS])
                finite = np.isfinite(a) & np.isfinite(b)
                with np.errstate(over="ignore", invalid="ignore"):
                    alike = bool(np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True).all()) and alike
                    if finite.any():
                        largest = max(largest, float(np.abs(a - b)[finite].max()))
    return alike, largest if np.isfinite(largest) else float(np.finfo(np.float64).max)


def _numbers(datatype: str, values: NDArray[Any]) -> NDArray[np.float64]:
    """As FP64, in which no difference of two values overflows or wraps round; BF16 comes as its bits."""
    if datatype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)
