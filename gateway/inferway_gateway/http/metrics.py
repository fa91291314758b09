"""Prometheus metrics: the counters that the core and the edge keep anyway, rendered when somebody asks.

Nothing here runs on the hot path but one dictionary update per request. Series are bounded: model labels only ever come
from versions that the registry holds, never from a request, and when these are more than fit into ``max_series`` the
later ones share the labels ``model="other"``. Durations of the core's fine buckets are added up into fewer ones.

Beside our own names stand those of Triton (``nv_inference_...``) with its labels and units, so that dashboards made for
it go on working. They have no ``_total``, which is why their type is given as unknown.
"""

from __future__ import annotations

import platform
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Protocol, cast

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from .. import __version__
from ..core.stats import STAGES, Duration, Histogram, ModelStats
from ..server.policy import EdgeStats

Models = Callable[[], Iterable[tuple[str, int, ModelStats, bool]]]

OTHER: Final = "other"
_REQUEST_BOUNDS: Final = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
STAGE_BOUNDS: Final = (2.5e-5, 1e-4, 2.5e-4, 1e-3, 2.5e-3, 1e-2, 5e-2, 0.25, 1.0, 10.0)
_ROWS_BOUNDS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_LAG_BOUNDS: Final = (1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0)
_ROUTES: Final = 64
"""More route templates than there are; a bound, should somebody pass paths by mistake."""
_FAILURE_CODES: Final = 12
"""Series kept for failure codes of one model, when its share of ``max_series`` is counted."""
_SERIES_PER_MODEL: Final = (
    len(_REQUEST_BOUNDS) + 3 + len(STAGES) * (len(STAGE_BOUNDS) + 3) + len(_ROWS_BOUNDS) + 3 + 2 * _FAILURE_CODES + 20
)
_SERIES_BESIDES: Final = 300
"""Process, edge and HTTP series."""
_LABELS: Final = ("model", "version")

OPENMETRICS: Final = "application/openmetrics-text"


class Filtered(Protocol):
    """A collector that leaves out the models that do not exist for whoever asks."""

    sees: Callable[[str], bool]

    def collect(self) -> Iterable[Metric]: ...


class Metrics:
    """What ``GET /metrics`` answers.

    Args:
        models: gives name, version, statistics and readiness of each model version that is held now.
        edge: the HTTP edge's counters, where the gateway runs behind it.
        max_series: the most series rendered. Versions beyond it are added up under ``model="other"``.
    """

    def __init__(self, models: Models, edge: EdgeStats | None = None, *, max_series: int = 2000) -> None:
        self._requests: dict[tuple[str | None, int], int] = {}
        self._routes: set[str | None] = set()
        self._registry = CollectorRegistry()
        self._registry.register(_Service(self._requests, edge))
        self._models = _Models(models, max(1, (max_series - _SERIES_BESIDES) // _SERIES_PER_MODEL))
        self._registry.register(self._models)
        self._filtered: list[Filtered] = [self._models]
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def add(self, collector: Filtered) -> None:
        """Render what another collector has, too."""
        self._registry.register(cast(Collector, collector))
        self._filtered.append(collector)

    def http_request(self, route: str | None, status: int) -> None:
        """Count one answer.

        Args:
            route: the template, such as ``/v2/models/{model}``; None where no route matched.
        """
        key = (route, status)
        try:
            self._requests[key] += 1
        except KeyError:
            self._first(route, status)

    def http_requests(self, route: str | None, status: int, count: int) -> None:
        """Count answers that another process gave."""
        if count > 0:
            self.http_request(route, status)
            known = (route, status) if (route, status) in self._requests else (OTHER, status)
            self._requests[known] = self._requests.get(known, 0) + count - 1

    def _first(self, route: str | None, status: int) -> None:
        if route not in self._routes:
            if len(self._routes) >= _ROUTES:
                route = OTHER
            self._routes.add(route)
        if not 100 <= status <= 599:
            status = 599
        key = (route, status)
        self._requests[key] = self._requests.get(key, 0) + 1

    def render(self, accept: str, sees: Callable[[str], bool] = lambda _: True) -> tuple[bytes, str]:
        """All metrics and their content type.

        Args:
            accept: the request's Accept header; OpenMetrics 1.0 where it names that, else Prometheus text 0.0.4.
            sees: tells of a model's name whether it exists for whoever asks. Models that do not are left out.
        """
        for collector in self._filtered:
            collector.sees = sees
        if any(part.partition(";")[0].strip().lower() == OPENMETRICS for part in accept.split(",")):
            rendered: bytes = openmetrics.generate_latest(self._registry)  # type: ignore[no-untyped-call]  # has no types
            return rendered, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4


class _Service(Collector):
    """The gateway as a whole."""

    def __init__(self, requests: dict[tuple[str | None, int], int], edge: EdgeStats | None) -> None:
        self._requests = requests
        self._edge = edge
        self._build = {"version": __version__, "python": platform.python_version()}
        with suppress(PackageNotFoundError):
            self._build["onnxruntime"] = version("onnxruntime")

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("inferway_build", "Versions that this gateway was built from.", self._build)
        by_class: dict[tuple[str, str], int] = {}
        refusals: dict[str, int] = {"unauthenticated": 0, "permission_denied": 0}
        for (route, status), count in self._requests.copy().items():
            key = (route or "none", f"{status // 100}xx")
            by_class[key] = by_class.get(key, 0) + count
            if status == 401:
                refusals["unauthenticated"] += count
            elif status == 403:
                refusals["permission_denied"] += count
        http = CounterMetricFamily(
            "inferway_http_requests", "Answers by route template and class of status.", labels=("route", "status")
        )
        for (route_name, status_class), count in sorted(by_class.items()):
            http.add_metric((route_name, status_class), count)
        yield http
        auth = CounterMetricFamily(
            "inferway_auth_failures", "Requests without a good key, or with one that lacks the scope.", labels=("code",)
        )
        for code, count in refusals.items():
            auth.add_metric((code,), count)
        yield auth
        if self._edge is not None:
            yield from self._edge_metrics(self._edge)

    def _edge_metrics(self, edge: EdgeStats) -> Iterator[Metric]:
        yield GaugeMetricFamily("inferway_connections", "Open connections.", edge.open)
        yield CounterMetricFamily("inferway_connections_accepted", "Connections taken.", edge.accepted)
        yield CounterMetricFamily(
            "inferway_connections_evicted", "Connections that gave way to others at a limit.", edge.evicted
        )
        yield CounterMetricFamily(
            "inferway_callers_gone", "Callers that left before their answer was complete.", edge.disconnected
        )
        yield CounterMetricFamily(
            "inferway_requests_cut", "Requests that a shutdown did not wait for any longer.", edge.cancelled
        )
        refused = CounterMetricFamily(
            "inferway_edge_refusals", "Requests refused before they reached a route.", labels=("code",)
        )
        for code, count in sorted(edge.refused.items()):
            refused.add_metric((code,), count)
        yield refused
        expired = CounterMetricFamily(
            "inferway_connections_expired", "Connections that a deadline ended, by what it was for.", labels=("phase",)
        )
        for phase, count in sorted(edge.expired.items()):
            expired.add_metric((phase,), count)
        yield expired
        lag = HistogramMetricFamily(
            "inferway_event_loop_lag_seconds", "How late the event loop was, looked at four times a second."
        )
        lag.add_metric((), buckets(edge.lag, _LAG_BOUNDS), edge.lag.sum)
        yield lag


class _Models(Collector):
    """The model versions, the first ``room`` of them each for itself."""

    def __init__(self, models: Models, room: int) -> None:
        self._models = models
        self._room = room
        self._known: dict[tuple[str, int], None] = {}
        self.sees: Callable[[str], bool] = lambda _: True

    def _groups(self) -> list[tuple[tuple[str, str], ModelStats, bool]]:
        """Labels, statistics and readiness of what is shown; who has labels of its own keeps them while it is held."""
        held = {(name, number): (stats, ready) for name, number, stats, ready in self._models()}
        self._known = {key: None for key in self._known if key in held}
        others: list[ModelStats] = []
        other_ready = True
        for key, (stats, ready) in held.items():
            if key not in self._known:
                if len(self._known) < self._room:
                    self._known[key] = None
                elif self.sees(key[0]):
                    others.append(stats)
                    other_ready = other_ready and ready
        groups = [((name, str(number)), *held[name, number]) for name, number in self._known if self.sees(name)]
        if others:
            groups.append(((OTHER, ""), _sum(others), other_ready))
        return groups

    def collect(self) -> Iterator[Metric]:
        groups = self._groups()

        def counter(name: str, text: str, value: Callable[[ModelStats], float]) -> Metric:
            family = CounterMetricFamily(name, text, labels=_LABELS)
            for labels, stats, _ in groups:
                family.add_metric(labels, value(stats))
            return family

        def gauge(name: str, text: str, value: Callable[[ModelStats], float]) -> Metric:
            family = GaugeMetricFamily(name, text, labels=_LABELS)
            for labels, stats, _ in groups:
                family.add_metric(labels, value(stats))
            return family

        def triton(name: str, text: str, value: Callable[[ModelStats], float]) -> Metric:
            family = UnknownMetricFamily(name, text, labels=_LABELS)
            for labels, stats, _ in groups:
                family.add_metric(labels, value(stats))
            return family

        ready = GaugeMetricFamily("inferway_model_ready", "1 where the version answers.", labels=_LABELS)
        for labels, _, is_ready in groups:
            ready.add_metric(labels, float(is_ready))
        yield ready
        request = HistogramMetricFamily(
            "inferway_request_duration_seconds", "From a request's headers to its whole answer.", labels=_LABELS
        )
        stage = HistogramMetricFamily(
            "inferway_stage_duration_seconds", "Time of a request in one stage.", labels=(*_LABELS, "stage")
        )
        rows = HistogramMetricFamily("inferway_batch_rows", "Rows of a run.", labels=_LABELS)
        for labels, stats, _ in groups:
            request.add_metric(labels, buckets(stats.request, _REQUEST_BOUNDS), stats.request.sum)
            for name in STAGES:
                histogram = stats.stages[name]
                stage.add_metric((*labels, name), buckets(histogram, STAGE_BOUNDS), histogram.sum)
            rows.add_metric(labels, buckets(stats.batch_rows, _ROWS_BOUNDS), stats.batch_rows.sum)
        yield request
        yield stage
        yield rows
        yield counter("inferway_inferences", "Rows answered.", lambda s: s.inference_count)
        yield counter("inferway_executions", "Runs.", lambda s: s.execution_count)
        yield counter("inferway_requests_succeeded", "Requests answered with outputs.", lambda s: s.success.count)
        failures = CounterMetricFamily(
            "inferway_request_failures", "Requests answered with an error, by code.", labels=(*_LABELS, "code")
        )
        reasons = UnknownMetricFamily(
            "nv_inference_request_failure", "Failed requests, as Triton counts them.", labels=(*_LABELS, "reason")
        )
        for labels, stats, _ in groups:
            for code, count in sorted(stats.failures.items()):
                failures.add_metric((*labels, code), count)
                reasons.add_metric((*labels, code), count)
        yield failures
        yield counter(
            "inferway_requests_cancelled",
            "Requests dropped because their caller had gone.",
            lambda s: s.dropped_cancelled,
        )
        yield gauge("inferway_queue_requests", "Requests that wait for a run.", lambda s: s.queued_requests)
        yield gauge("inferway_queue_rows", "Rows that wait for a run.", lambda s: s.queued_rows)
        yield gauge("inferway_queue_bytes", "Input bytes that wait for a run.", lambda s: s.queued_bytes)
        yield gauge("inferway_runs_in_progress", "Runs going on.", lambda s: s.running)

        yield triton("nv_inference_request_success", "Successful requests.", lambda s: s.success.count)
        yield reasons
        yield triton("nv_inference_count", "Rows answered.", lambda s: s.inference_count)
        yield triton("nv_inference_exec_count", "Runs.", lambda s: s.execution_count)
        yield triton("nv_inference_request_duration_us", "Time in requests.", lambda s: s.success.ns // 1000)
        yield triton("nv_inference_queue_duration_us", "Time in the queue.", lambda s: s.queue.ns // 1000)
        yield triton(
            "nv_inference_compute_input_duration_us", "Time before runs.", lambda s: s.compute_input.ns // 1000
        )
        yield triton("nv_inference_compute_infer_duration_us", "Time in runs.", lambda s: s.compute_infer.ns // 1000)
        yield triton(
            "nv_inference_compute_output_duration_us", "Time after runs.", lambda s: s.compute_output.ns // 1000
        )
        yield triton("nv_inference_pending_request_count", "Requests that wait.", lambda s: s.queued_requests)


def buckets(histogram: Histogram, bounds: tuple[float, ...]) -> list[tuple[str, float]]:
    """Cumulative counts at ``bounds``, which are some of the histogram's own."""
    counts = histogram.counts
    buckets: list[tuple[str, float]] = []
    total = 0
    at = 0
    for bound in bounds:
        # counts[i] are those in (bounds[i-1], bounds[i]], so everything up to the bound's own index is below it.
        end = bisect_right(histogram.bounds, bound)
        total += sum(counts[at:end])
        at = end
        buckets.append((repr(bound), total))
    buckets.append(("+Inf", total + sum(counts[at:])))
    return buckets


def _sum(many: list[ModelStats]) -> ModelStats:
    """The statistics of several model versions as one."""
    total = ModelStats()
    for stats in many:
        for name in ("inference_count", "execution_count", "queued_requests", "queued_rows", "queued_bytes", "running"):
            setattr(total, name, getattr(total, name) + getattr(stats, name))
        total.dropped_cancelled += stats.dropped_cancelled
        for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
            mine: Duration = getattr(total, name)
            theirs: Duration = getattr(stats, name)
            mine.count += theirs.count
            mine.ns += theirs.ns
        for code, count in stats.failures.items():
            total.failures[code] = total.failures.get(code, 0) + count
        for mine_h, theirs_h in (
            (total.request, stats.request),
            (total.batch_rows, stats.batch_rows),
            *((total.stages[stage], stats.stages[stage]) for stage in STAGES),
        ):
            mine_h.counts = [a + b for a, b in zip(mine_h.counts, theirs_h.counts, strict=True)]
            mine_h.sum += theirs_h.sum
    return total
