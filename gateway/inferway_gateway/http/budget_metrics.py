"""Metrics of the memory that deployed models share. They name no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..core.budget import MemoryBudget


class BudgetMetrics(Collector):
    """
    Args:
        budget: what deployed models hold, and who left.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.sees: Callable[[str], bool] = lambda _: True
        """Has no effect: nothing here is about one model."""

    def collect(self) -> Iterator[Metric]:
        budget = self._budget
        yield GaugeMetricFamily(
            "inferway_memory_budget_bytes", "Memory that deployed models may hold together.", budget.limit_bytes
        )
        yield GaugeMetricFamily(
            "inferway_memory_used_bytes",
            "Memory that deployed models hold, as measured or estimated, loads under way included.",
            budget.used_bytes,
        )
        yield GaugeMetricFamily(
            "inferway_memory_pinned_bytes", "Memory of those that never leave to make room.", budget.pinned_bytes
        )
        yield CounterMetricFamily("inferway_model_loads", "Deployed versions that were loaded.", budget.loads)
        yield CounterMetricFamily(
            "inferway_model_evictions", "Deployed versions that left memory to make room.", budget.evictions
        )
