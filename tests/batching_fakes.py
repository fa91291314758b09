"""What the batching tests share: a model in numpy that behaves, runners on virtual time, an event loop without waiting.

``RowModel`` stands for a session where a test needs to decide how long a run takes, when it ends, or which rows it
refuses. What real sessions do is tested on real ones.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from looptime._internal.loops import LoopTimeEventLoop
from numpy.typing import NDArray

from inferway_gateway.core.backend import CostPoint, Profile, RowExactness, RunHandle
from inferway_gateway.core.batcher import BatchRun, InferenceRequest
from inferway_gateway.core.errors import DeadlineExceededError, ModelExecutionError
from inferway_gateway.core.runners import Job, RunnerPool
from inferway_gateway.core.tensors import Arrays, Signature, TensorSpec

T = TypeVar("T")

BAD = -1.0
"""A row that holds this value makes the run fail."""
STUCK = -2.0
"""A row that holds this value makes the run last until it is ended."""


class VirtualLoop(LoopTimeEventLoop, asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer."""


def virtually(work: Callable[[], Awaitable[T]]) -> T:
    """Run ``work`` on virtual time."""

    async def main() -> T:
        return await work()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def row_signature(*, max_rows: int = 0, length: int = -1, optional_bias: bool = False) -> Signature:
    inputs = [TensorSpec("x", "FP64", (-1, length))]
    if optional_bias:
        inputs.append(TensorSpec("bias", "FP64", (-1, 1), optional=True))
    outputs = (
        TensorSpec("same", "FP64", (-1, length)),
        TensorSpec("total", "FP64", (-1, 1)),
        TensorSpec("first", "FP64", (-1, 1)),
    )
    return Signature(tuple(inputs), outputs, True, max_rows)


def expected(x: NDArray[Any], name: str, bias: NDArray[Any] | None = None) -> NDArray[Any]:
    """What the model says to rows that run alone and without padding."""
    base: NDArray[Any] = x if bias is None else x + bias
    if name == "same":
        return base * 2.0 + 1.0
    if name == "total":
        # Whole numbers below 2**53: the sum is exact in any order, padding with zeros included.
        return x @ np.ones((x.shape[1], 1))
    return base[:, :1]


@dataclass
class Ran:
    rows: int
    length: int
    outputs: tuple[str, ...]
    x: NDArray[Any]


@dataclass
class RowModel:
    """``same`` = 2(x + bias) + 1, ``total`` = the sum of x along a row, ``first`` = the first of x + bias.

    Attributes:
        fragile_rows: a run of more rows fails, as one that cannot get its memory does.
        gate: when set, a run waits for it, on its own thread.
    """

    signature: Signature = field(default_factory=row_signature)
    profile: Profile = field(default_factory=lambda: Profile("exact", True, 0, (CostPoint(1, 1.0), CostPoint(64, 2.0))))
    fragile_rows: int = 0
    gate: threading.Event | None = None
    runs: list[Ran] = field(default_factory=list)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    at_once: int = 0
    most_at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None = None) -> list[NDArray[Any]]:
        x = inputs["x"]
        with self._lock:
            self.runs.append(Ran(len(x), x.shape[1], tuple(outputs), x.copy()))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.entered.release()
        try:
            if self.gate is not None:
                if handle is not None:
                    handle.bind(self.gate.set)
                assert self.gate.wait(20), "nobody opened the gate"
                if handle is not None and handle.terminated:
                    raise DeadlineExceededError("ended")
            if (x == BAD).any():
                raise ModelExecutionError("a row was refused")
            if self.fragile_rows and len(x) > self.fragile_rows:
                raise ModelExecutionError("too many rows for the memory there is")
            return [np.ascontiguousarray(expected(x, name, inputs.get("bias"))) for name in outputs]
        finally:
            if handle is not None:
                handle.bind(None)
            with self._lock:
                self.at_once -= 1

    def close(self) -> None: ...


def profile(
    cost: dict[int, float] | None = None, *, exactness: RowExactness = "exact", batchable: bool = True, inline: int = 0,
    row_elements: int = 0,
) -> Profile:  # fmt: skip
    points = tuple(CostPoint(n, s) for n, s in (cost or {}).items())
    return Profile(exactness, batchable, inline, points, row_elements)


RISING = {1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2, 16: 1.4, 32: 1.8, 64: 2.6}
FLAT = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}
FALLING = {1: 1.0, 2: 2.3, 4: 5.0, 8: 11.0, 16: 25.0}


def rows_of(value: float, rows: int = 1, length: int = 3) -> NDArray[Any]:
    return np.full((rows, length), value)


def request(x: NDArray[Any], *outputs: str, bias: NDArray[Any] | None = None, **options: Any) -> InferenceRequest:
    inputs = {"x": x} if bias is None else {"x": x, "bias": bias}
    return InferenceRequest(inputs, outputs or ("same",), len(x), x.nbytes, **options)


class VirtualRunners(RunnerPool):
    """Runners whose runs take virtual time: ``cost`` seconds for a batch, forever where a row is stuck.

    The pool's own decisions, which source is next and how many runs go on, are the real ones.
    """

    def __init__(self, threads: int, cost: Callable[[int, int], float], **options: Any) -> None:
        super().__init__(threads, clock=asyncio.get_running_loop().time, **options)
        self._cost = cost
        self.hop_s = 0.0
        """What it takes a job to get to its thread."""
        self.timeline: list[tuple[float, float, int]] = []
        """Begin, end, rows of each run."""

    def _hand_over(self, job: Job) -> None:
        self._begin(job)

    def _begin(self, job: Job) -> None:
        asyncio.get_running_loop().call_later(self.hop_s, self._execute, job)

    def _execute(self, job: Job) -> None:
        assert isinstance(job, BatchRun)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        job.execute()
        stuck = any((part.inputs["x"] == STUCK).any() for part in job.parts)
        length = max((part.inputs["x"].shape[1] for part in job.parts), default=0)
        seconds = self._cost(job.rows, length) if job.parts else 0.0
        ending: asyncio.TimerHandle | None = None

        def end() -> None:
            job.handle.bind(None)
            if job.handle.terminated:
                job.error, job.results, job.physical_rows = DeadlineExceededError("ended"), [], 0
            job.run_s = job.work_s = loop.time() - begun
            self.timeline.append((begun, loop.time(), job.rows))
            self._ended_virtually(job)

        def stop() -> None:
            job.handle.bind(None)
            if ending is not None:
                ending.cancel()
            loop.call_soon(end)

        if not stuck:
            ending = loop.call_later(seconds, end)
        job.handle.bind(stop)

    def _ended_virtually(self, job: Job) -> None:
        with self.lock:
            following = self._complete(job, self.clock())
            tell = not self._told
            self._told = True
        if tell:
            asyncio.get_running_loop().call_soon(self._collect)
        if following is not None:
            self._begin(following)
