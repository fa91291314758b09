"""The metrics of the memory budget."""

from __future__ import annotations

from inferway_gateway.core.budget import MemoryBudget
from inferway_gateway.http.budget_metrics import BudgetMetrics


def test_they_tell_what_is_held_pinned_and_left() -> None:
    budget = MemoryBudget(100)
    shown = BudgetMetrics(budget)

    def values() -> dict[str, float]:
        return {sample.name: sample.value for family in shown.collect() for sample in family.samples}

    assert budget.reserve(("a", 1), 60, pinned=True) == []
    assert budget.reserve(("b", 1), 30) == []
    budget.loaded(("b", 1), 30, pinned=False, busy=lambda: False, activity=lambda: 0)
    assert budget.reserve(("c", 1), 40) == [("b", 1)]
    assert values() == {
        "inferway_memory_budget_bytes": 100,
        "inferway_memory_used_bytes": 130,
        "inferway_memory_pinned_bytes": 60,
        "inferway_model_loads_total": 1,
        "inferway_model_evictions_total": 1,
    }
