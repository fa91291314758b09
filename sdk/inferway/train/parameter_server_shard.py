"""A part of the parameters and of the optimiser's state: the actor that workers push to and pull from.

It runs on one event loop, so that everything between two awaits is one piece. A worker's push and the pull of what it
computes with next are one call, `Shard.exchange`: the rule of the mode is when that call answers.

With c_w for the steps that worker w has pushed, and t for the step (from 0) that the answer is to be computed with:

    sync    when all have pushed step t − 1; their gradients, weighted by rows, are one step of the optimiser
    ssp     when min_w c_w ≥ t − staleness; every push is a step of the optimiser at once
    async   at once, likewise

Source of the bound: Ho et al. 2013, "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server".
Staleness is counted when a push comes in, from the clocks alone and apart from the waiting, so that it would show a
bound that does not hold.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .compression import Packed
from .job import OptimizerSpec, Vector
from .optimizers import make_optimizer

Mode: TypeAlias = Literal["sync", "async", "ssp"]

PUBLISHED_BYTES: Final = 1 << 20
"""From this size on parameters are put into the object store once for all workers, instead of copied into each answer.
Below it the extra call for the object costs more than the copy."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """Parameters on their way to a worker: themselves, or a reference to them.

    Attributes:
        version: steps of the optimiser that are in them.
    """

    version: int
    parameters: Vector | None
    reference: Any = None


@dataclass(slots=True)
class ShardFacts:
    """What a shard saw.

    Attributes:
        pushes: that were taken.
        duplicates: that were not, because they had been taken before.
        max_staleness: most steps that a worker was ahead of the slowest when it pushed.
        max_missed: most steps of the optimiser between a pull and the push that was computed with it.
        sum_missed: over all pushes.
    """

    pushes: int = 0
    duplicates: int = 0
    max_staleness: int = 0
    max_missed: int = 0
    sum_missed: int = 0


@dataclass(slots=True)
class _Sum:
    """The gradients of a synchronous step, added in the order of the workers: in any other they differ by rounding."""

    waiting: dict[int, tuple[Packed | None, float]] = field(default_factory=dict)
    next: int = 0


class Shard:
    """Parameters ``start`` to ``start + size`` of a model.

    Args:
        mode, staleness: the rule, see above; staleness in steps.
        workers: how many push to it.
    """

    def __init__(self, spec: OptimizerSpec, mode: Mode, staleness: int, workers: int) -> None:
        self._spec = spec
        self._mode = mode
        self._staleness = staleness
        self._workers = workers

    async def begin(self, parameters: Vector, optimizer: Mapping[str, NDArray[Any]], step: int) -> tuple[int, str]:
        """Start from a state in which all workers have pushed ``step`` steps. Gives process and host."""
        self._parameters: Vector = parameters.copy()
        self._optimizer = make_optimizer(self._spec, len(parameters))
        if optimizer:
            self._optimizer.load_state(optimizer)
        self._clocks = [step] * self._workers
        self._version = step
        self._total = np.empty_like(self._parameters)
        self._sum = _Sum()
        self._changed = asyncio.Event()
        self._published: tuple[int, Any] = (-1, None)
        self._losses: dict[int, float] = {}
        self._facts = ShardFacts()
        return os.getpid(), socket.gethostname()

    async def exchange(
        self, worker: int, step: int, gradient: Packed | None, weight: float, version: int, loss: float, use: int | None
    ) -> Pulled | None:
        """Take a worker's gradient, and answer with the parameters for its next step.

        Args:
            step: which of the worker's steps it is of, from 0 over all epochs. One that was taken before is not taken
                again, so a push may be repeated.
            gradient: of this shard's part; None: the worker had no rows.
            weight: its share of the step's rows, in sync.
            version: of the parameters that it was computed with.
            use: the step that the answer is for; None: the worker wants none, and gets None at once.
        """
        # Ray may start a worker's calls in another order than they were made.
        while step > self._clocks[worker]:
            await self._changed.wait()
        if step < self._clocks[worker]:
            self._facts.duplicates += 1
        else:
            self._observe(worker, step, version)
            self._losses[worker] = loss
            self._clocks[worker] = step + 1
            if self._mode == "sync":
                self._add(worker, gradient, weight)
            elif gradient is not None:
                self._apply(gradient)
            self._wake()
        if use is None:
            return None
        while not self._may_compute(use):
            await self._changed.wait()
        return self._pulled()

    async def pull(self) -> Pulled:
        """The parameters as they are."""
        return self._pulled()

    async def snapshot(self) -> tuple[Vector, dict[str, NDArray[Any]]]:
        """Parameters and the optimiser's state; asked for only when no worker is in a step."""
        return self._parameters, self._optimizer.state()

    async def progress(self) -> tuple[int, float]:
        """Steps that all workers have pushed, and the mean of the last loss of each."""
        return min(self._clocks), float(np.mean(list(self._losses.values()))) if self._losses else float("nan")

    async def facts(self) -> ShardFacts:
        """What was seen since this was asked last."""
        facts, self._facts = self._facts, ShardFacts()
        return facts

    def _observe(self, worker: int, step: int, version: int) -> None:
        missed = self._version - version
        facts = self._facts
        facts.pushes += 1
        facts.max_staleness = max(facts.max_staleness, step - min(self._clocks))
        facts.max_missed = max(facts.max_missed, missed)
        facts.sum_missed += missed

    def _may_compute(self, step: int) -> bool:
        if self._mode == "sync":
            return self._version >= step
        return self._mode == "async" or min(self._clocks) >= step - self._staleness

    def _add(self, worker: int, gradient: Packed | None, weight: float) -> None:
        self._sum.waiting[worker] = (gradient, weight)
        while self._sum.next in self._sum.waiting:
            if self._sum.next == 0:
                self._total.fill(0.0)
            taken, share = self._sum.waiting.pop(self._sum.next)
            if taken is not None:
                taken.add_to(self._total, share)
            self._sum.next += 1
        if self._sum.next == self._workers:
            self._sum = _Sum()
            self._optimizer.step(self._parameters, self._total)
            self._version += 1

    def _apply(self, gradient: Packed) -> None:
        self._optimizer.step(self._parameters, gradient.whole(self._total))
        self._version += 1

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _pulled(self) -> Pulled:
        if self._parameters.nbytes < PUBLISHED_BYTES:
            # A copy: the answer is serialised later, and the next push may come before.
            return Pulled(self._version, self._parameters.copy())
        if self._published[0] != self._version:
            import ray

            self._published = (self._version, ray.put(self._parameters))
        return Pulled(self._version, None, self._published[1])
