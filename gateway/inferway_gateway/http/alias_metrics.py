"""Metrics of aliases: how their traffic is shared out, how their targets do, and what became of copies for shadows.

Series are bounded: the first ``MAX_TARGETS`` targets have labels of their own and keep them while they are there; what
is counted of the others is added up under ``model="other"``. Labels are the names of aliases, which only keys that may
deploy can make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..core.routing import Plan, ShadowStats
from .metrics import OTHER

MAX_TARGETS: Final = 64
_LABELS: Final = ("model", "alias", "version")
_OUTCOMES: Final = ("compared", "differing", "failed", "dropped")


class AliasMetrics(Collector):
    """
    Args:
        plans: gives the aliases that there are.
    """

    def __init__(self, plans: Callable[[], Iterable[Plan]]) -> None:
        self._plans = plans
        self._known: dict[tuple[str, str, str], None] = {}
        self.sees: Callable[[str], bool] = lambda _: True
        """Tells of a model's name whether it exists for whoever asks."""

    def collect(self) -> Iterator[Metric]:
        plans = list(self._plans())
        held = {(p.model, p.alias, str(v)) for p in plans for v in (*p.routes, *_shadow_version(p))}
        self._known = {key: None for key in self._known if key in held}

        def labels(plan: Plan, version: int) -> tuple[str, str, str]:
            key = (plan.model, plan.alias, str(version))
            if key not in self._known and len(self._known) < MAX_TARGETS:
                self._known[key] = None
            return key if key in self._known else (OTHER, "", "")

        weights: dict[tuple[str, ...], float] = {}
        requests: dict[tuple[str, ...], float] = {}
        errors: dict[tuple[str, ...], float] = {}
        fallbacks: dict[tuple[str, ...], float] = {}
        copies: dict[tuple[str, ...], float] = {}
        differences: dict[tuple[str, ...], float] = {}
        rolled_back: dict[tuple[str, ...], float] = {}
        for plan in plans:
            seen = self.sees(plan.model)
            for version, route in plan.routes.items():
                key = labels(plan, version)  # whoever asks first must not decide who has labels
                if not seen:
                    continue
                if key[0] != OTHER:
                    weights[key] = plan.record.spec.weights[version]
                _add(requests, key, route.stats.requests)
                _add(errors, key, route.stats.errors)
                _add(fallbacks, key, route.stats.fallbacks)
            for version in _shadow_version(plan):
                key = labels(plan, version)
                if not seen:
                    continue
                for outcome, count in zip(_OUTCOMES, _counts(plan.shadow_stats), strict=True):
                    _add(copies, (*key, outcome), count)
                differences[key] = max(differences.get(key, 0.0), plan.shadow_stats.largest_difference)
            if seen:
                key = labels(plan, plan.main)
                _add(rolled_back, key[:2], plan.rolled_back)

        yield _family(GaugeMetricFamily, "inferway_alias_weight", "Share of an alias' traffic, percent.", weights)
        yield _family(
            CounterMetricFamily, "inferway_alias_requests", "Requests that an alias gave a version.", requests
        )
        yield _family(
            CounterMetricFamily, "inferway_alias_errors", "Those of them that it failed by its own fault.", errors
        )
        yield _family(
            CounterMetricFamily, "inferway_alias_fallbacks", "Those of these that another version answered.", fallbacks
        )
        yield _family(
            CounterMetricFamily,
            "inferway_shadow_copies",
            "Copies of requests for an alias' shadow: compared, of these differing, failed, dropped.",
            copies,
            (*_LABELS, "outcome"),
        )
        yield _family(
            GaugeMetricFamily,
            "inferway_shadow_largest_difference",
            "The largest absolute difference of a shadow's numbers from those that were answered.",
            differences,
        )
        yield _family(
            CounterMetricFamily,
            "inferway_alias_rollbacks",
            "Changes of an alias that this gateway took back by itself.",
            rolled_back,
            ("model", "alias"),
        )


def _shadow_version(plan: Plan) -> tuple[int, ...]:
    return () if plan.shadow is None else (plan.shadow.version,)


def _counts(stats: ShadowStats) -> tuple[int, int, int, int]:
    return stats.compared, stats.differing, stats.failed, stats.dropped


def _add(sums: dict[tuple[str, ...], float], key: tuple[str, ...], value: float) -> None:
    sums[key] = sums.get(key, 0) + value


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    values: dict[tuple[str, ...], float],
    labels: tuple[str, ...] = _LABELS,
) -> Metric:
    family = kind(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
