from __future__ import annotations

from inferway_gateway.core.stats import Histogram
from inferway_gateway.core.upstream import EndpointStats, UpstreamStats
from inferway_gateway.http.elsewhere_metrics import MAX_ENDPOINTS, MAX_STEPS, MAX_UPSTREAMS, Elsewhere
from inferway_gateway.http.metrics import Metrics


def shown(elsewhere: Elsewhere, *hidden: str) -> list[str]:
    metrics = Metrics(lambda: ())
    metrics.add(elsewhere)
    text, _ = metrics.render("", lambda name: name not in hidden)
    lines = text.decode().splitlines()
    return [line for line in lines if line.startswith(("inferway_upstream_", "inferway_pipeline_"))]


def test_what_an_upstream_did_is_shown_without_its_address() -> None:
    endpoint = EndpointStats("10.0.0.7:8000", outstanding=2, healthy=False, open_breakers=1)
    endpoint.outcomes["broken"] = 5
    upstream = UpstreamStats("up", [endpoint], requests=9, retries=3, budget_exhausted=1, probes_failed=4)
    lines = shown(Elsewhere(lambda: [upstream], lambda: ()))
    labels = 'endpoint="0",upstream="up"'
    for line in (
        'inferway_upstream_requests_total{upstream="up"} 9.0',
        'inferway_upstream_retries_total{upstream="up"} 3.0',
        'inferway_upstream_retries_refused_total{upstream="up"} 1.0',
        'inferway_upstream_probes_failed_total{upstream="up"} 4.0',
        'inferway_upstream_calls_total{endpoint="0",outcome="broken",upstream="up"} 5.0',
        f"inferway_upstream_outstanding{{{labels}}} 2.0",
        f"inferway_upstream_up{{{labels}}} 0.0",
        f"inferway_upstream_breakers_open{{{labels}}} 1.0",
    ):
        assert line in lines
    assert "10.0.0.7" not in "".join(lines)


def test_a_pipelines_steps_are_shown_to_those_who_see_it() -> None:
    seconds = {"one": Histogram()}
    seconds["one"].observe(0.25)
    elsewhere = Elsewhere(lambda: (), lambda: [("mine", 3, seconds)])
    assert 'inferway_pipeline_step_seconds_sum{model="mine",step="one",version="3"} 0.25' in shown(elsewhere)
    assert shown(elsewhere, "mine") == []


def test_series_are_bounded() -> None:
    many = [UpstreamStats(f"up{i}", [EndpointStats(str(j)) for j in range(64)]) for i in range(300)]
    steps = {f"s{i}": Histogram() for i in range(64)}
    lines = shown(Elsewhere(lambda: many, lambda: [(f"m{i}", 1, steps) for i in range(100)]))
    assert sum(line.startswith("inferway_upstream_up{") for line in lines) == MAX_UPSTREAMS * MAX_ENDPOINTS
    assert sum(line.startswith("inferway_pipeline_step_seconds_sum{") for line in lines) == MAX_STEPS
