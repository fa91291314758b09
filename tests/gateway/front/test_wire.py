"""Values cross the line between the processes whole."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

import pytest

from inferway_gateway.core import errors
from inferway_gateway.core.catalog import AliasRecord, AliasSpec, Guard, Shadow
from inferway_gateway.core.errors import GatewayError, InternalError, QueueFullError, UpstreamError
from inferway_gateway.core.routing import Router
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.tensors import Signature, TensorSpec
from inferway_gateway.front import wire
from inferway_gateway.server.policy import EdgeStats

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, GatewayError) and kind is not GatewayError
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_of_the_core_arrives_as_the_class_it_was(kind: type[GatewayError]) -> None:
    arrived = wire.make_error(wire.describe_error(kind("expected this, got that")))
    assert type(arrived) is kind
    assert str(arrived) == arrived.message == "expected this, got that"
    assert (arrived.code, arrived.retryable) == (kind.code, kind.retryable)


def test_an_error_keeps_its_facts() -> None:
    full = wire.make_error(wire.describe_error(QueueFullError("full", retry_after_s=2.5)))
    assert full.retry_after_s == 2.5
    upstream = UpstreamError("gone")
    upstream.upstream_attempts = 3
    assert wire.make_error(wire.describe_error(upstream)).upstream_attempts == 3


def test_an_error_of_a_class_that_is_not_known_keeps_its_code() -> None:
    known = wire.make_error({"class": "Nobody", "code": "queue_full", "facts": {"message": "m", "retry_after_s": None}})
    assert type(known) is QueueFullError
    assert type(wire.make_error({"class": "Nobody", "code": "none", "facts": {}})) is InternalError


def test_a_signature_arrives_as_it_was() -> None:
    signature = Signature(
        (TensorSpec("x", "FP32", (-1, 4), axes=("batch", None)), TensorSpec("s", "BYTES", (-1,), optional=True)),
        (TensorSpec("y", "BF16", (-1, 2), labels=("a", "ö")),),
        batched=True,
        max_rows=8,
    )
    assert wire.signature_from_json(wire.signature_to_json(signature)) == signature


def record(alias: str = "stable", **spec: Any) -> AliasRecord:
    weights = spec.pop("weights", {3: 95.0, 4: 5.0})
    return AliasRecord("churn", alias, AliasSpec(weights, **spec), None, 1, datetime(2026, 1, 2, tzinfo=UTC), "key")


@pytest.mark.parametrize(
    "given",
    [
        record(),
        record(sticky="header:X-User", fallback=(2, 1), shadow=Shadow(4, 0.5), guard=Guard(max_p95_ratio=3.0)),
        AliasRecord("churn", "a", AliasSpec({1: 100.0}), AliasSpec({2: 100.0}, shadow=Shadow(1)), 9,
                    datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC), "gateway"),
    ],
    ids=["plain", "full", "previous"],
)  # fmt: skip
def test_an_alias_arrives_as_it_was(given: AliasRecord) -> None:
    assert wire.aliases_from_json(wire.aliases_to_json([given])) == [given]


def test_the_counts_of_a_model_add_up_and_are_told_once() -> None:
    whole, front, owner = ModelStats(), ModelStats(), ModelStats()
    for stats in (whole, front):
        for seconds, code in ((0.1, None), (0.002, "queue_full"), (3.0, None)):
            stats.finished(seconds, code)
            stats.stages["parse"].observe(seconds)
            stats.stages["serialise"].observe(seconds / 2)
    taken = wire.take_model_stats(front)
    assert taken is not None
    wire.add_model_stats(owner, taken)
    for name in ("success", "fail", "failures"):
        assert getattr(owner, name) == getattr(whole, name)
    for one, other in ((owner.request, whole.request), *((owner.stages[s], whole.stages[s]) for s in whole.stages)):
        assert (one.counts, one.sum) == (other.counts, other.sum)
    assert owner.last_inference_ms == front.last_inference_ms
    assert wire.take_model_stats(ModelStats()) is None


def test_the_counts_of_aliases_go_where_they_belong_and_are_told_once() -> None:
    front, owner = Router(itertools.count().__next__), Router(itertools.count().__next__)
    for router in (front, owner):
        router.update([record(shadow=Shadow(4))])
    route = front.resolve("churn", None, "key", {})
    assert route is not None
    route.stats.requests += 2
    route.stats.failed("model_failed")
    route.stats.fallbacks += 1
    route.plan.shadow_stats.compared += 3
    route.plan.shadow_stats.largest_difference = 0.5
    for _ in range(2):
        wire.add_alias_stats(owner, wire.take_alias_stats(front))
    plan = owner.plan("churn", "stable")
    assert plan is not None
    stats = plan.routes[route.version].stats
    assert (stats.requests, stats.failures, stats.fallbacks) == (2, {"model_failed": 1}, 1)
    assert (plan.shadow_stats.compared, plan.shadow_stats.largest_difference) == (3, 0.5)
    wire.add_alias_stats(Router(), [{"model": "gone", "alias": "stable"}])


def test_the_counts_of_an_edge_are_told_once() -> None:
    front, owner = EdgeStats(), EdgeStats(accepted=10)
    tally = wire.EdgeTally(front)
    front.accepted, front.open, front.refused["malformed_request"] = 3, 2, 1
    front.lag.observe(0.01)
    taken = tally.take()
    wire.add_edge_stats(owner, taken, taken["open"])
    taken = tally.take()
    wire.add_edge_stats(owner, taken, 0)
    assert (owner.accepted, owner.open, owner.refused, owner.lag.count) == (13, 2, {"malformed_request": 1}, 1)
