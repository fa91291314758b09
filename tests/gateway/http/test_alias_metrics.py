"""Metrics of aliases, read back by Prometheus' own parser."""

from __future__ import annotations

from datetime import UTC, datetime

from prometheus_client.parser import text_string_to_metric_families

from inferway_gateway.core.catalog import AliasRecord, AliasSpec, Shadow
from inferway_gateway.core.routing import Router
from inferway_gateway.http.alias_metrics import MAX_TARGETS, AliasMetrics
from inferway_gateway.http.metrics import Metrics


def record(model: str, spec: AliasSpec, alias: str = "stable") -> AliasRecord:
    return AliasRecord(model, alias, spec, None, 1, datetime(2026, 3, 1, tzinfo=UTC), "k")


def shown(metrics: Metrics, *, hidden: str = "") -> dict[tuple[str, ...], float]:
    text, _ = metrics.render("", lambda name: name != hidden)
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        if family.name.startswith(("inferway_alias", "inferway_shadow")):
            for sample in family.samples:
                labels = [sample.labels[n] for n in ("model", "alias", "version", "outcome") if n in sample.labels]
                key = (sample.name.removeprefix("inferway_"), *labels)
                assert key not in found
                found[key] = sample.value
    return found


def made(router: Router) -> Metrics:
    metrics = Metrics(list)
    metrics.add(AliasMetrics(router.aliases))
    return metrics


def test_what_was_counted_of_an_alias_is_shown() -> None:
    router = Router()
    router.update([record("churn", AliasSpec({3: 95, 4: 5}, shadow=Shadow(5)))])
    plan = router.plans["churn"]
    canary = plan.routes[4].stats
    canary.requests, canary.fallbacks = 7, 2
    for code in ("model_failed", "model_failed", "worker_crashed", "invalid_tensor"):
        canary.failed(code)
    copies = plan.shadow_stats
    copies.compared, copies.differing, copies.failed, copies.dropped, copies.largest_difference = 9, 8, 7, 6, 0.5
    plan.count_roll_back()
    found = shown(made(router))
    stable = ("churn", "stable")
    assert found["alias_weight", "churn", "stable", "4"] == 5
    assert found["alias_requests_total", *stable, "4"] == 7
    assert found["alias_errors_total", *stable, "4"] == 3
    assert found["alias_fallbacks_total", *stable, "4"] == 2
    assert found["alias_requests_total", *stable, "3"] == 0
    counts = [found["shadow_copies_total", *stable, "5", o] for o in ("compared", "differing", "failed", "dropped")]
    assert counts == [9, 8, 7, 6]
    assert found["shadow_largest_difference", *stable, "5"] == 0.5
    assert found["alias_rollbacks_total", *stable] == 1


def test_targets_beyond_the_bound_are_added_up_and_the_others_keep_their_labels() -> None:
    router = Router()
    records = [record(f"m{i:03}", AliasSpec({1: 100}, shadow=Shadow(2))) for i in range(2 * MAX_TARGETS)]
    router.update(records[MAX_TARGETS:])
    metrics = made(router)
    first = shown(metrics)
    router.update(records)
    for plan in router.aliases():
        plan.routes[1].stats.requests = 2
        plan.shadow_stats.largest_difference = 3
    found = shown(metrics)
    assert {key for key in first if key[0] == "alias_weight"} <= found.keys()
    own = [key for key in found if key[0] == "alias_requests_total"]
    assert len(own) <= MAX_TARGETS + 1
    assert sum(found[key] for key in own) == 2 * 2 * MAX_TARGETS
    assert found["alias_requests_total", "other", "", ""] > 0
    assert found["shadow_largest_difference", "other", "", ""] == 3
    assert len(found) < 6 * MAX_TARGETS + 20


def test_models_that_somebody_does_not_see_are_left_out_and_change_nobodys_labels() -> None:
    router = Router()
    router.update([record("a", AliasSpec({1: 100})), record("b", AliasSpec({1: 100}))])
    metrics = made(router)
    assert {key[1] for key in shown(metrics, hidden="a")} == {"b"}
    assert {key[1] for key in shown(metrics)} == {"a", "b"}
