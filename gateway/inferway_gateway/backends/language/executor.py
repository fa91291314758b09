"""A language model as a model of tensors: a text in, its continuation out."""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from ...core.batcher import Answer, InferenceRequest
from ...core.catalog import Footprint
from ...core.errors import InvalidTensorError
from ...core.generation import GenerationParameterError, GenerationRequest, Sampling
from ...core.inflight import InFlight
from ...core.stats import ModelStats
from ...core.tensors import Signature, TensorSpec
from .generator import Generator
from .process import ProcessLink

SIGNATURE: Final = Signature(
    (
        TensorSpec("text_input", "BYTES", (1,)),
        TensorSpec("max_tokens", "INT64", (1,), optional=True),
        TensorSpec("temperature", "FP32", (1,), optional=True),
    ),
    (TensorSpec("text_output", "BYTES", (1,)),),
)


class LanguageExecutor:
    """Implements ``core.execution.Executor`` and ``Speaker``.

    Args:
        footprint: what the model takes, measured or worked out; None where nothing is known.
        workers: the process that writes the answers, where it is one of its own.
    """

    inline: Final = False
    row_exact: Final = True

    def __init__(
        self,
        generator: Generator,
        stats: ModelStats,
        footprint: Footprint | None = None,
        *,
        workers: ProcessLink | None = None,
    ) -> None:
        self.generator: Final = generator
        self.workers: Final = workers
        self.signature: Final = SIGNATURE
        self._stats = stats
        self._footprint = footprint
        self._in_flight = InFlight()

    def footprint(self) -> Footprint | None:
        return self._footprint

    def problem(self) -> str | None:
        """Why requests cannot be answered now, in words; None where they can."""
        return self.generator.problem()

    def run_inline(self, request: InferenceRequest) -> Answer | None:
        return None

    async def infer(self, request: InferenceRequest) -> Answer:
        """Continue the text, with special tokens in it taken as such.

        Raises:
            InvalidTensorError: the text is empty, or a value is out of range.
            GatewayError: as ``Generator.generate``.
        """
        return await self._in_flight.run(self._answer(request))

    async def _answer(self, request: InferenceRequest) -> Answer:
        started = time.perf_counter()
        generator = self.generator
        defaults = generator.defaults
        sampling, max_tokens = defaults.sampling, None
        if "temperature" in request.inputs:
            sampling = Sampling(float(request.inputs["temperature"][0]), sampling.top_p, sampling.top_k, sampling.min_p)
        if "max_tokens" in request.inputs:
            max_tokens = int(request.inputs["max_tokens"][0])
        try:
            prompt = await generator.encode(str(request.inputs["text_input"][0]))
            encoded = time.perf_counter()
            wanted = GenerationRequest(
                (*generator.begin, *prompt), max_tokens, sampling, priority=request.priority, deadline=request.deadline
            )
            parts = [delta.text async for delta in generator.generate(wanted)]
        except GenerationParameterError as error:
            name = {"max_tokens": "max_tokens", "temperature": "temperature"}.get(error.param or "", "text_input")
            raise InvalidTensorError(f"input '{name}': {error.message}") from None
        ran = time.perf_counter()
        output = np.array(["".join(parts)], object)
        self._stats.ran(1, encoded - started, ran - encoded, 0.0)
        self._stats.answered(1, 0.0, encoded - started, ran - encoded, 0.0)
        return Answer([output for _ in request.outputs], 0.0, encoded - started, ran - encoded, 0.0, 1)

    async def drain(self, timeout_s: float) -> int:
        until = time.monotonic() + timeout_s
        given_up = await self._in_flight.drain(timeout_s)
        return given_up + await self.generator.drain(max(until - time.monotonic(), 0.0))

    async def close(self) -> bool:
        ended = await self._in_flight.close()
        await self.generator.close()
        return ended
