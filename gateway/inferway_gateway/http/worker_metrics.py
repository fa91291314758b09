"""Metrics of the processes that models run in. Bounded: so many loaded versions, and no process by its number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..core.stats import WorkerStats

MAX_VERSIONS: Final = 128
_STATES: Final = ("closed", "half_open", "open")


class Workers(Protocol):
    """The processes of one model version."""

    stats: WorkerStats

    @property
    def resident_bytes(self) -> int: ...


class WorkerMetrics(Collector):
    """
    Args:
        workers: gives name, version and processes of each loaded version that has some.
        missing: in words, which layers of the sandbox this system does not have.
    """

    def __init__(self, workers: Callable[[], Iterable[tuple[str, int, Workers]]], missing: tuple[str, ...]) -> None:
        self._workers = workers
        self._missing = missing
        self.sees: Callable[[str], bool] = lambda _: True
        """Tells of a model's name whether it exists for whoever asks."""

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "inferway_sandbox_incomplete",
            "Layers of the workers' sandbox that this system does not have, or not wholly.",
            value=len(self._missing),
        )
        labels = ("model", "version")
        counts = [
            CounterMetricFamily(f"inferway_worker_{name}", text, labels=labels)
            for name, text in (
                ("restarts", "Worker processes that were started again, or were tried to."),
                ("crashes", "Worker processes that ended by themselves."),
                ("kills", "Worker processes that were killed because a run did not end."),
                ("recycled", "Worker processes that were replaced because they had grown."),
            )
        ]
        alive = GaugeMetricFamily("inferway_worker_processes", "Worker processes that serve.", labels=labels)
        memory = GaugeMetricFamily(
            "inferway_worker_resident_bytes", "Memory that the worker processes have for themselves.", labels=labels
        )
        breaker = GaugeMetricFamily(
            "inferway_worker_breaker", "State of the circuit breaker: 0 closed, 1 half open, 2 open.", labels=labels
        )
        layers = GaugeMetricFamily(
            "inferway_worker_sandbox_layer", "1 where the layer holds for the worker.", labels=(*labels, "layer")
        )
        seen = 0
        for name, version, workers in self._workers():
            if seen == MAX_VERSIONS or not self.sees(name):
                continue
            seen += 1
            which = (name, str(version))
            stats = workers.stats
            for family, value in zip(counts, (stats.restarts, stats.crashes, stats.kills, stats.recycled), strict=True):
                family.add_metric(which, value)
            alive.add_metric(which, stats.processes)
            memory.add_metric(which, workers.resident_bytes)
            breaker.add_metric(which, _STATES.index(stats.breaker))
            for layer, holds in stats.layers.items():
                layers.add_metric((*which, layer), float(holds))
        if seen:
            yield from (*counts, alive, memory, breaker, layers)
