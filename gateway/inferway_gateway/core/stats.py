"""Counters as plain values. Written on the event loop only; read there too, so none needs a lock."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

STAGES: Final = ("parse", "queue", "assemble", "run", "serialise")
"""Stages of one inference request, in order. queue: submitted to taken; assemble: stacking, padding and splitting."""

SECONDS_BOUNDS: Final = (
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3,
    1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
REQUEST_BOUNDS: Final = tuple(
    sorted(
        {float(f"{m}e{e}") for e in range(-5, 2) for m in (1, 1.2, 1.5, 1.8, 2.1, 2.5, 3, 3.5, 4.2, 5, 6, 7.2, 8.5)}
        | set(SECONDS_BOUNDS)
    )
)
"""Of whole requests: neighbours are at most 1.25 times each other, so that percentiles of two versions compare."""
ROWS_BOUNDS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


class Histogram:
    """Counts per bucket, their sum and number. ``counts[i]`` are observations in ``(bounds[i-1], bounds[i]]``."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...] = SECONDS_BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(slots=True)
class Duration:
    """How often something happened and how long it took in all, as the statistics extension wants it."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float, times: int = 1) -> None:
        self.count += times
        self.ns += int(seconds * 1e9)


@dataclass(slots=True)
class BatchStat:
    """Runs of one batch size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class ModelStats:
    """All that is counted of one model version.

    ``batches`` keys are rows per run. ``failures`` keys are contract codes. ``queued_*`` are gauges that the batcher
    keeps; the rest only grows.
    """

    inference_count: int = 0
    """Rows answered."""
    execution_count: int = 0
    """Runs."""
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, BatchStat] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    stages: dict[str, Histogram] = field(default_factory=lambda: {stage: Histogram() for stage in STAGES})
    request: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS))
    batch_rows: Histogram = field(default_factory=lambda: Histogram(ROWS_BOUNDS))
    queued_requests: int = 0
    queued_rows: int = 0
    queued_bytes: int = 0
    running: int = 0
    dropped_cancelled: int = 0
    """Requests whose caller had gone before their run."""

    def ran(self, rows: int, assemble_s: float, run_s: float, split_s: float) -> None:
        """Count one run of ``rows`` rows. Called by the batcher, once a run."""
        self.execution_count += 1
        self.batch_rows.observe(rows)
        stat = self.batches.get(rows)
        if stat is None:
            stat = self.batches[rows] = BatchStat()
        stat.compute_input.add(assemble_s)
        stat.compute_infer.add(run_s)
        stat.compute_output.add(split_s)

    def answered(self, rows: int, queue_s: float, assemble_s: float, run_s: float, split_s: float) -> None:
        """Count one request that the batcher answered with outputs. Called by the batcher, once a request."""
        self.inference_count += rows
        self.queue.add(queue_s)
        self.compute_input.add(assemble_s)
        self.compute_infer.add(run_s)
        self.compute_output.add(split_s)
        stages = self.stages
        stages["queue"].observe(queue_s)
        stages["assemble"].observe(assemble_s + split_s)
        stages["run"].observe(run_s)

    def ran_alone(self, rows: int, assemble_s: float, run_s: float) -> None:
        """``ran`` and ``answered`` for a request that neither queued nor shared its run, at half their cost."""
        self.execution_count += 1
        self.inference_count += rows
        self.batch_rows.observe(rows)
        stat = self.batches.get(rows)
        if stat is None:
            stat = self.batches[rows] = BatchStat()
        run_ns = int(run_s * 1e9)
        for infer in (stat.compute_infer, self.compute_infer):
            infer.count += 1
            infer.ns += run_ns
        for zero in (self.queue, self.compute_output, stat.compute_output):
            zero.count += 1
        if assemble_s:
            stat.compute_input.add(assemble_s)
            self.compute_input.add(assemble_s)
        else:
            stat.compute_input.count += 1
            self.compute_input.count += 1
        stages = self.stages
        stages["queue"].counts[0] += 1
        stages["run"].observe(run_s)
        if assemble_s:
            stages["assemble"].observe(assemble_s)
        else:
            stages["assemble"].counts[0] += 1

    def finished(self, total_s: float, code: str | None) -> None:
        """Count one request as its answer leaves. ``code`` is None for success. Called at the edge, once a request."""
        self.request.observe(total_s)
        self.last_inference_ms = int(time.time() * 1000)
        if code is None:
            self.success.add(total_s)
        else:
            self.fail.add(total_s)
            self.failures[code] = self.failures.get(code, 0) + 1


@dataclass(slots=True)
class WorkerStats:
    """What became of the worker processes of one model version. Written on any thread: each is a count of rare things.

    Attributes:
        processes: alive and open.
        restarts: attempts to start one again.
        crashes: that ended by themselves.
        kills: that were killed because a run did not end.
        recycled: that were replaced because they had grown.
        breaker: closed, open or half_open.
        layers: of the sandbox, to whether the kernel has them.
    """

    processes: int = 0
    restarts: int = 0
    crashes: int = 0
    kills: int = 0
    recycled: int = 0
    breaker: str = "closed"
    layers: dict[str, bool] = field(default_factory=dict)
