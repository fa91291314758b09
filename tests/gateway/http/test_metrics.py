"""What ``/metrics`` shows: read back by Prometheus' own parsers."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from inferway_gateway.core.stats import ModelStats
from inferway_gateway.http.metrics import Metrics
from inferway_gateway.server.policy import EdgeStats

Sample = tuple[str, frozenset[tuple[str, str]]]


def samples(metrics: Metrics, accept: str = "") -> dict[Sample, float]:
    body, content_type = metrics.render(accept)
    parse: Any = parse_openmetrics if "openmetrics" in content_type else parse_text
    found: dict[Sample, float] = {}
    for family in parse(body.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(found: dict[Sample, float], name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def busy_stats() -> ModelStats:
    stats = ModelStats()
    stats.ran(8, 0.001, 0.004, 0.002)
    for _ in range(4):
        stats.answered(2, 0.003, 0.001, 0.004, 0.002)
        stats.finished(0.0101, None)
    stats.stages["parse"].observe(0.0002)
    stats.finished(0.5, "queue_full")
    stats.queued_requests, stats.queued_rows, stats.queued_bytes, stats.running = 3, 30, 3000, 1
    stats.dropped_cancelled = 5
    return stats


def test_what_was_counted_is_shown() -> None:
    edge = EdgeStats(open=7, accepted=9, evicted=1, disconnected=2, cancelled=3)
    edge.refused["headers_too_large"] = 4
    edge.expired["body"] = 6
    edge.lag.observe(0.004)
    metrics = Metrics(lambda: [("m", 3, busy_stats(), True)], edge)
    metrics.http_request("/v2/models/{model}/infer", 200)
    metrics.http_request("/v2/models/{model}/infer", 200)
    metrics.http_request("/v2/models/{model}/infer", 401)
    metrics.http_request("/v2", 403)
    metrics.http_request(None, 404)
    for accept in ("", "text/plain", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"):
        found = samples(metrics, accept)
        of = {"model": "m", "version": "3"}
        assert value(found, "inferway_model_ready", **of) == 1
        assert value(found, "inferway_inferences_total", **of) == 8
        assert value(found, "inferway_executions_total", **of) == 1
        assert value(found, "inferway_requests_succeeded_total", **of) == 4
        assert value(found, "inferway_request_failures_total", **of, code="queue_full") == 1
        assert value(found, "inferway_requests_cancelled_total", **of) == 5
        assert value(found, "inferway_queue_requests", **of) == 3
        assert value(found, "inferway_queue_rows", **of) == 30
        assert value(found, "inferway_queue_bytes", **of) == 3000
        assert value(found, "inferway_runs_in_progress", **of) == 1
        assert value(found, "inferway_request_duration_seconds_count", **of) == 5
        assert value(found, "inferway_request_duration_seconds_sum", **of) == pytest.approx(0.5404)
        assert value(found, "inferway_request_duration_seconds_bucket", **of, le="0.01") == 0
        assert value(found, "inferway_request_duration_seconds_bucket", **of, le="0.025") == 4
        assert value(found, "inferway_request_duration_seconds_bucket", **of, le="+Inf") == 5
        assert value(found, "inferway_batch_rows_bucket", **of, le="4.0") == 0
        assert value(found, "inferway_batch_rows_bucket", **of, le="8.0") == 1
        for stage, total in {"parse": 0.0002, "queue": 0.012, "assemble": 0.012, "run": 0.016, "serialise": 0}.items():
            assert value(found, "inferway_stage_duration_seconds_sum", **of, stage=stage) == pytest.approx(total)
        assert value(found, "inferway_http_requests_total", route="/v2/models/{model}/infer", status="2xx") == 2
        assert value(found, "inferway_http_requests_total", route="/v2/models/{model}/infer", status="4xx") == 1
        assert value(found, "inferway_http_requests_total", route="none", status="4xx") == 1
        assert value(found, "inferway_auth_failures_total", code="unauthenticated") == 1
        assert value(found, "inferway_auth_failures_total", code="permission_denied") == 1
        assert value(found, "inferway_connections") == 7
        assert value(found, "inferway_connections_accepted_total") == 9
        assert value(found, "inferway_connections_evicted_total") == 1
        assert value(found, "inferway_callers_gone_total") == 2
        assert value(found, "inferway_requests_cut_total") == 3
        assert value(found, "inferway_edge_refusals_total", code="headers_too_large") == 4
        assert value(found, "inferway_connections_expired_total", phase="body") == 6
        assert value(found, "inferway_event_loop_lag_seconds_bucket", le="0.0025") == 0
        assert value(found, "inferway_event_loop_lag_seconds_bucket", le="0.005") == 1
        assert any(name == "inferway_build_info" and dict(labels)["version"] for name, labels in found)
        assert value(found, "process_open_fds") > 0
        assert value(found, "process_resident_memory_bytes") > 1_000_000


def test_tritons_names_show_the_same() -> None:
    found = samples(Metrics(lambda: [("m", 3, busy_stats(), True)]))
    of = {"model": "m", "version": "3"}
    assert value(found, "nv_inference_request_success", **of) == 4
    assert value(found, "nv_inference_request_failure", **of, reason="queue_full") == 1
    assert value(found, "nv_inference_count", **of) == 8
    assert value(found, "nv_inference_exec_count", **of) == 1
    assert value(found, "nv_inference_request_duration_us", **of) == 40_400
    assert value(found, "nv_inference_queue_duration_us", **of) == 12_000
    assert value(found, "nv_inference_compute_input_duration_us", **of) == 4_000
    assert value(found, "nv_inference_compute_infer_duration_us", **of) == 16_000
    assert value(found, "nv_inference_compute_output_duration_us", **of) == 8_000
    assert value(found, "nv_inference_pending_request_count", **of) == 3


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/html, application/json", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        (
            "application/openmetrics-text; version=9; x=y, */*",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
        ("text/plain;version=nonsense;escaping=\xff", "text/plain; version=0.0.4; charset=utf-8"),
    ],
)
def test_the_form_is_agreed_on(accept: str, content_type: str) -> None:
    body, got = Metrics(list).render(accept)
    assert got == content_type
    assert body.endswith(b"# EOF\n") == ("openmetrics" in got)


def test_two_instances_do_not_share_anything() -> None:
    one, two = Metrics(list), Metrics(list)
    one.http_request("/v2", 200)
    assert value(samples(one), "inferway_http_requests_total", route="/v2", status="2xx") == 1
    assert not [name for name, _ in samples(two) if name == "inferway_http_requests_total"]


def test_a_hundred_thousand_odd_requests_and_many_models_stay_within_the_bound_and_quick() -> None:
    held = [(f"model-{i}", 1, busy_stats(), i % 2 == 0) for i in range(200)]
    for _, _, stats, _ in held:
        for code in ("a", "b", "c"):
            stats.failures[code] = 1
    metrics = Metrics(lambda: held, EdgeStats())
    for i in range(100_000):
        metrics.http_request(f"/made/up/{i}", 200 + i % 400)
    found = samples(metrics)
    assert len(found) <= 2000
    routes = {dict(labels)["route"] for name, labels in found if name == "inferway_http_requests_total"}
    assert len(routes) <= 65
    assert sum(v for (name, _), v in found.items() if name == "inferway_http_requests_total") == 100_000
    best = min(timed(lambda: metrics.render("application/openmetrics-text")) for _ in range(5))
    assert best <= (0.05 if sys.gettrace() is None else 0.5)  # measuring coverage triples it


def timed(call: Any) -> float:
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def test_models_beyond_the_bound_are_added_up_and_the_others_keep_their_labels() -> None:
    held = {name: busy_stats() for name in ("a", "b", "c", "d")}
    metrics = Metrics(lambda: [(name, 1, stats, name != "d") for name, stats in held.items()], max_series=1)

    def shown() -> dict[str, float]:
        return {
            dict(labels)["model"]: v
            for (name, labels), v in samples(metrics).items()
            if name == "inferway_inferences_total"
        }

    assert shown() == {"a": 8, "other": 24}
    found = samples(metrics)
    other = {"model": "other", "version": ""}
    assert value(found, "inferway_model_ready", **other) == 0
    assert value(found, "inferway_request_duration_seconds_count", **other) == 15
    assert value(found, "inferway_request_failures_total", **other, code="queue_full") == 3
    assert value(found, "inferway_queue_bytes", **other) == 9000
    # A newcomer that sorts first does not take the place of one that has labels; a freed place is taken.
    held = {"0": busy_stats(), **held}
    assert shown() == {"a": 8, "other": 32}
    del held["a"]
    assert shown() == {"0": 8, "other": 24}


def test_models_that_somebody_does_not_see_are_not_even_in_the_sum_of_the_others() -> None:
    held = {name: busy_stats() for name in ("a", "b", "c", "d")}
    metrics = Metrics(lambda: [(name, 1, stats, True) for name, stats in held.items()], max_series=1)
    assert samples(metrics)
    shown = parse_text(metrics.render("", lambda name: name in ("b", "c"))[0].decode())
    rows = [s for f in shown for s in f.samples if s.name == "inferway_inferences_total"]
    assert [(s.labels["model"], s.value) for s in rows] == [("other", 16)]


def test_an_odd_status_makes_no_series_of_its_own() -> None:
    metrics = Metrics(list)
    for status in (0, 42, 999, 1000):
        metrics.http_request("/v2", status)
    assert value(samples(metrics), "inferway_http_requests_total", route="/v2", status="5xx") == 4


def test_model_names_are_escaped() -> None:
    found = samples(Metrics(lambda: [('we"ird\\\n', 1, ModelStats(), True)]))
    assert value(found, "inferway_model_ready", model='we"ird\\\n', version="1") == 1
