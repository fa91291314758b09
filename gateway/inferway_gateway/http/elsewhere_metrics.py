"""Metrics of what answers through others: upstreams and pipelines.

Series are bounded: upstreams and their endpoints are the operator's, pipelines and steps those that are loaded, the
first so many of them. An endpoint is called by its place in the operator's file, because whoever may read metrics need
not know addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ..core.stats import Histogram
from ..core.upstream import UpstreamStats
from .metrics import STAGE_BOUNDS, buckets

MAX_UPSTREAMS = 64
MAX_ENDPOINTS = 16
MAX_STEPS = 64

Pipelines = Callable[[], Iterable[tuple[str, int, Mapping[str, Histogram]]]]


class Elsewhere(Collector):
    """
    Args:
        upstreams: gives what is counted of each upstream.
        pipelines: gives name, version and the seconds of each step of each loaded pipeline.
    """

    def __init__(self, upstreams: Callable[[], Iterable[UpstreamStats]], pipelines: Pipelines) -> None:
        self._upstreams = upstreams
        self._pipelines = pipelines
        self.sees: Callable[[str], bool] = lambda _: True
        """Tells of a model's name whether it exists for whoever asks."""

    def collect(self) -> Iterator[Metric]:
        upstreams = list(self._upstreams())[:MAX_UPSTREAMS]
        if upstreams:
            yield from _upstream_metrics(upstreams)
        steps = HistogramMetricFamily(
            "inferway_pipeline_step_seconds",
            "Time of a pipeline's step, the queue of its model included.",
            labels=("model", "version", "step"),
        )
        room = MAX_STEPS
        for name, version, seconds in self._pipelines():
            for step, histogram in seconds.items():
                if room and self.sees(name):
                    room -= 1
                    steps.add_metric((name, str(version), step), buckets(histogram, STAGE_BOUNDS), histogram.sum)
        if room < MAX_STEPS:
            yield steps


def _upstream_metrics(upstreams: list[UpstreamStats]) -> Iterator[Metric]:
    by_upstream: list[tuple[str, str, Callable[[UpstreamStats], int]]] = [
        ("inferway_upstream_requests", "Requests that led to a call of the upstream.", lambda u: u.requests),
        ("inferway_upstream_retries", "Calls that were made again at another endpoint.", lambda u: u.retries),
        (
            "inferway_upstream_retries_refused",
            "Failures that were not tried again because the retry budget was spent.",
            lambda u: u.budget_exhausted,
        ),
        ("inferway_upstream_probes_failed", "Health probes without a good answer.", lambda u: u.probes_failed),
    ]
    for metric, text, value in by_upstream:
        family = CounterMetricFamily(metric, text, labels=("upstream",))
        for upstream in upstreams:
            family.add_metric((upstream.name,), value(upstream))
        yield family
    labels = ("upstream", "endpoint")
    calls = CounterMetricFamily(
        "inferway_upstream_calls", "Calls of an endpoint, by how they ended.", labels=(*labels, "outcome")
    )
    outstanding = GaugeMetricFamily("inferway_upstream_outstanding", "Calls under way.", labels=labels)
    up = GaugeMetricFamily("inferway_upstream_up", "1 where the endpoint answers its health probe.", labels=labels)
    breakers = GaugeMetricFamily(
        "inferway_upstream_breakers_open", "Model versions that leave the endpoint alone for now.", labels=labels
    )
    for upstream in upstreams:
        for place, endpoint in enumerate(upstream.endpoints[:MAX_ENDPOINTS]):
            which = (upstream.name, str(place))
            for outcome, count in endpoint.outcomes.items():
                calls.add_metric((*which, outcome), count)
            outstanding.add_metric(which, endpoint.outstanding)
            up.add_metric(which, float(endpoint.healthy))
            breakers.add_metric(which, endpoint.open_breakers)
    yield from (calls, outstanding, up, breakers)
