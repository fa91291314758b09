"""Dynamic batching, the asynchronous half: queue, hand-over to a runner, answers to waiters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from .backend import Session
from .model_config import ModelConfig
from .runners import RunnerPool
from .stats import ModelStats


@dataclass(slots=True)
class InferenceRequest:
    """One request for one model version, checked against the signature before.

    Attributes:
        inputs: input name to array, as ``Signature.check`` accepted them.
        outputs: resolved names of the outputs asked for, in the caller's order, never empty.
        rows: what ``Signature.check`` returned.
        nbytes: payload bytes of the inputs, counted against the queue's bound.
        priority: 1 is first; 0 takes the model's default.
        deadline: moment on the monotonic clock after which nobody wants the answer.
        queue_timeout_s: how long the request may wait before its run begins (the protocol's ``timeout``).
    """

    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...]
    rows: int
    nbytes: int
    priority: int = 0
    deadline: float | None = None
    queue_timeout_s: float | None = None


@dataclass(slots=True)
class Answer:
    """The outputs of one request and where its time went.

    Attributes:
        outputs: in the order of ``request.outputs``; axis 0 holds the request's own rows; C-contiguous.
        queue_s: from submission to the start of assembling; assemble_s: stacking and padding; run_s: inside the
            session; split_s: cutting the outputs apart. For a request that took several runs these are sums.
        batch_rows: rows of the run it shared, its own included; the largest of several.
    """

    outputs: list[NDArray[Any]]
    queue_s: float
    assemble_s: float
    run_s: float
    split_s: float
    batch_rows: int


class Batcher:
    """Puts the requests to one model version together and runs them."""

    def __init__(
        self,
        session: Session,
        config: ModelConfig,
        stats: ModelStats,
        runners: RunnerPool,
        *,
        run_timeout_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None: ...

    def run_inline(self, request: InferenceRequest) -> Answer | None:
        """Run at once on the event loop where that is cheaper than a hop; None: await ``infer`` instead."""
        raise NotImplementedError

    async def infer(self, request: InferenceRequest) -> Answer:
        """Queue, batch, run and split. Raises the errors of ``core.errors``; safe to cancel at any time."""
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> int:
        """Take no new work and wait for what there is; returns how many requests were given up on."""
        raise NotImplementedError

    async def close(self) -> bool:
        """Drain at once and wait for the runs to end. True: no run is left, the session may be closed."""
        raise NotImplementedError
