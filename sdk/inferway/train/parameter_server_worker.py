"""A worker of a parameter server: the actor that computes gradients with the framework and exchanges them.

A step is: compute, push to every shard, take over each shard's answer as it comes. With overlap a step's exchange runs
while the next step computes, with the parameters of the exchange before; the step that the answer is for is said with
it, so the bound of ssp holds all the same.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .compression import Compression, Compressor
from .job import Arrays, Replica, Vector
from .parameter_server_shard import Pulled
from .plan import Plan
from .replica import check_finite

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a worker could not go on.

    Attributes:
        lost: another actor is gone, which is no fault of this one.
        error: what was raised, pickled; None where that could not be.
        text: the same for people, with its traceback.
    """

    lost: bool
    step: int
    error: bytes | None
    text: str


@dataclass(frozen=True, slots=True)
class Segment:
    """What a worker did between two meetings with the driver.

    Attributes:
        losses: of its steps, ``(steps,)``, FP64; 0 where it had no rows.
        weights: its share of each step's rows, ``(steps,)``.
    """

    losses: NDArray[np.float64]
    weights: NDArray[np.float64]
    bytes_pushed: int
    bytes_pulled: int
    compute_s: float
    exchange_s: float


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told once.

    Attributes:
        overlap: whether an exchange may run while the next step computes.
        inputs, targets: references to the training rows.
    """

    index: int
    plan: Plan
    overlap: bool
    inputs: Mapping[str, Any]
    targets: Any
    compression: Compression
    fraction: float


class Worker:
    """One worker. Every public method gives a `Failure` instead of raising."""

    def make(self, replica: Callable[[], Replica], assignment: Assignment) -> tuple[int, str, int] | Failure:
        """Make the model. Gives process, host and the size of the model."""
        import ray

        def work() -> tuple[int, str, int]:
            self._replica = replica()
            self._told = assignment
            self._inputs: Arrays = {name: ray.get(reference) for name, reference in assignment.inputs.items()}
            self._targets: NDArray[Any] = ray.get(assignment.targets)
            size = self._replica.size
            self._gradient = np.zeros(size, np.float32)
            self._compressor = Compressor(assignment.compression, size, fraction=assignment.fraction)
            self._step = 0
            return os.getpid(), socket.gethostname(), size

        self._step = 0
        return _guarded(self, work)

    def first(self) -> tuple[Vector, dict[str, NDArray[Any]]] | Failure:
        """Parameters and state that the model was made with."""

        def work() -> tuple[Vector, dict[str, NDArray[Any]]]:
            parameters = np.empty(self._replica.size, np.float32)
            self._replica.read(parameters)
            return parameters, self._replica.state()

        return _guarded(self, work)

    def begin(
        self, shards: Sequence[Any], borders: Sequence[int], state: Mapping[str, NDArray[Any]], residual: Vector
    ) -> Failure | None:
        """Start, or start again, from a checkpoint's state of this worker."""

        def work() -> None:
            self._shards = list(shards)
            self._borders = list(borders)
            self._replica.load_state(state)
            if len(residual):
                self._compressor.residual[:] = residual

        return _guarded(self, work)

    def run(self, first: int, last: int) -> Segment | Failure:
        """Take the steps ``first`` to ``last - 1``, counted from 0 over all epochs."""
        return _guarded(self, lambda: self._run(first, last))

    def snapshot(self) -> tuple[dict[str, NDArray[Any]], Vector] | Failure:
        """State of the model, and what compression has not sent."""
        return _guarded(self, lambda: (self._replica.state(), self._compressor.residual))

    def evaluate(
        self, rows: tuple[Mapping[str, Any], Any], batch_size: int, state: Mapping[str, NDArray[Any]]
    ) -> dict[str, float] | Failure:
        """Metrics over rows, given by reference, with the servers' parameters and a state that is not this worker's."""
        import ray

        inputs, targets = rows

        def work() -> dict[str, float]:
            own = self._replica.state()
            self._take([shard.pull.remote() for shard in self._shards])
            self._replica.load_state(state)
            arrays = {name: ray.get(reference) for name, reference in inputs.items()}
            found = self._replica.evaluate(arrays, ray.get(targets), batch_size=batch_size)
            self._replica.load_state(own)
            return found

        return _guarded(self, work)

    def _run(self, first: int, last: int) -> Segment:
        losses, weights = np.zeros(last - first), np.zeros(last - first)
        pushed = pulled = 0
        compute_s = exchange_s = 0.0
        told = self._told
        at = time.perf_counter()
        version, count = self._take([shard.pull.remote() for shard in self._shards])
        pulled += count
        pending: list[Any] = []
        for step in range(first, last):
            self._step = step
            began = time.perf_counter()
            exchange_s += began - at
            epoch, of_epoch = divmod(step, told.plan.steps)
            part = told.plan.part(epoch, of_epoch, told.index)
            loss = 0.0
            if len(part.rows):
                seed = told.plan.noise(epoch, of_epoch, told.index)
                inputs = {name: array[part.rows] for name, array in self._inputs.items()}
                loss = self._replica.gradient(inputs, self._targets[part.rows], self._gradient, seed=seed)
                check_finite(loss, self._gradient, step=step + 1, worker=told.index)
            losses[step - first], weights[step - first] = loss, part.weight
            at = time.perf_counter()
            compute_s += at - began
            use = step + (2 if told.overlap else 1)
            # Arguments are serialised in the call, so that the buffer is free again after it.
            sent = []
            for shard, low, high in zip(self._shards, self._borders, self._borders[1:], strict=False):
                packed = self._compressor.pack(self._gradient[low:high], low) if len(part.rows) else None
                pushed += packed.nbytes if packed else 0
                wanted = use if use < last else None
                sent.append(shard.exchange.remote(told.index, step, packed, part.weight, version, loss, wanted))
            if told.overlap:
                sent, pending = pending, sent
            if sent and step + 1 < last:
                version, count = self._take(sent)
                pulled += count
            elif sent:
                pending += sent
        self._settle(pending)
        exchange_s += time.perf_counter() - at
        return Segment(losses, weights, pushed, pulled, compute_s, exchange_s)

    def _take(self, answers: Sequence[Any]) -> tuple[int, int]:
        """Take over what the shards answer, each as it comes. Gives the oldest version among them, and their bytes."""
        import ray

        places = dict(zip(answers, self._borders, strict=False))
        left = list(answers)
        version, count = None, 0
        while left:
            ready, left = ray.wait(left, num_returns=1)
            pulled: Pulled = ray.get(ready[0])
            parameters: Vector = ray.get(pulled.reference) if pulled.parameters is None else pulled.parameters
            self._replica.load(parameters, places[ready[0]])
            version = pulled.version if version is None else min(version, pulled.version)
            count += parameters.nbytes
        return version or 0, count

    def _settle(self, answers: Sequence[Any]) -> None:
        import ray

        ray.get(list(answers))


def _guarded(worker: Worker, work: Callable[[], _Answer]) -> _Answer | Failure:
    from ray import cloudpickle
    from ray.exceptions import RayError, RayTaskError

    try:
        return work()
    except Exception as error:
        step = worker._step
        lost = isinstance(error, RayError) and not isinstance(error, RayTaskError)
        try:
            pickled = None if lost else cloudpickle.dumps(error)
        except Exception:  # whatever the user's error holds
            pickled = None
        return Failure(lost, step, pickled, traceback.format_exc())
