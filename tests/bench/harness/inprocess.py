"""The gateway's backend and batcher in this process, without HTTP: what batching costs by itself."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import uvloop
from harness.workloads import Workload

from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.batcher import Batcher, InferenceRequest
from inferway_gateway.core.model_config import ModelConfig
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.store.model_options import apply_options, parse_options


class Inside:
    """A batcher over a session of its own, driven on one event loop that rests between the windows."""

    def __init__(self, workload: Workload, loop: asyncio.Runner, batcher: Batcher, stats: ModelStats) -> None:
        self._workload, self._loop, self._batcher, self._stats = workload, loop, batcher, stats

    def rows_per_s(self, in_flight: int, seconds: float) -> Mapping[str, float]:
        """Keep ``in_flight`` single-row requests waiting for ``seconds``."""
        return self._loop.run(self._window(in_flight, seconds))

    async def _window(self, in_flight: int, seconds: float) -> Mapping[str, float]:
        feeds = self._workload.feeds
        sizes = [sum(array.nbytes for array in feed.values()) for feed in feeds]
        taken = answered = 0
        runs, rows, used = self._stats.execution_count, self._stats.inference_count, time.process_time()
        started = time.perf_counter()
        limit = started + seconds

        async def caller() -> None:
            nonlocal taken, answered
            while time.perf_counter() < limit:
                index = taken % len(feeds)
                taken += 1
                request = InferenceRequest(feeds[index], self._workload.outputs, 1, sizes[index])
                # As a request handler does: at once where the run is short, through the queue else.
                if self._batcher.run_inline(request) is None:
                    await self._batcher.infer(request)
                answered += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(caller())
        elapsed = time.perf_counter() - started
        runs, rows = self._stats.execution_count - runs, self._stats.inference_count - rows
        return {
            "rows": answered / elapsed,
            "cpu_us": (time.process_time() - used) / max(1, answered) * 1e6,
            "batch": rows / max(1, runs),
        }


@contextmanager
def batcher(workload: Workload) -> Iterator[Inside]:
    """Open the model as the gateway does, with the first of the workload's options."""
    text = next(iter(workload.options.values()))
    config = apply_options(ModelConfig(), parse_options(text))
    cpus = len(os.sched_getaffinity(0))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        session = OnnxBackend(("CPUExecutionProvider",), cpus=cpus).open(
            Artifact(workload.name, 1, workload.model, config)
        )
        stats = ModelStats()

        async def open_batcher() -> tuple[RunnerPool, Batcher]:
            runners = await RunnerPool(cpus).__aenter__()
            return runners, Batcher(session, config, stats, runners, run_timeout_s=60.0)

        runners, made = loop.run(open_batcher())
        try:
            yield Inside(workload, loop, made, stats)
        finally:
            loop.run(made.close())
            loop.run(runners.__aexit__(None, None, None))
            session.close()
