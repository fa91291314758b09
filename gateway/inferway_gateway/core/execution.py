"""What answers the requests for one model version: a batcher, a remote server or a pipeline."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from .batcher import Answer, InferenceRequest
from .generation import TextGenerator
from .relay import Relaying, TextRelay
from .tensors import Signature


class Executor(Protocol):
    """Takes checked requests for one model version and answers them. Lives on the event loop."""

    @property
    def signature(self) -> Signature: ...

    @property
    def inline(self) -> bool:
        """Whether ``run_inline`` may answer at all."""
        ...

    @property
    def row_exact(self) -> bool:
        """Whether a row's result has the same bits whatever ran with it."""
        ...

    def run_inline(self, request: InferenceRequest) -> Answer | None:
        """Answer at once on the event loop where that is cheaper than a hop; None: await ``infer``."""
        ...

    async def infer(self, request: InferenceRequest) -> Answer:
        """Answer a request. Cancelling is safe at any time.

        Raises:
            GatewayError: a queue is full, a deadline passed, the model or its server failed, or the version drains.
        """
        ...

    async def drain(self, timeout_s: float) -> int:
        """Take no new work, wait for what there is; returns how many requests were given up on."""
        ...

    async def close(self) -> bool:
        """Drain at once and end. True: nothing runs any more and what stands behind it may be closed."""
        ...


@runtime_checkable
class Dependent(Protocol):
    """An executor that may be unable to answer although it is loaded, for it leans on other models or servers."""

    def problem(self) -> str | None:
        """Why requests cannot be answered now, in words; None where they can."""
        ...


@runtime_checkable
class Speaker(Protocol):
    """An executor that has a language model behind it."""

    @property
    def generator(self) -> TextGenerator: ...


def speaking(executor: Executor) -> TextGenerator | TextRelay | None:
    """What of an executor writes texts under ``/v1``; None where nothing does."""
    if isinstance(executor, Speaker):
        return executor.generator
    return executor.relay if isinstance(executor, Relaying) else None
