"""Core values as a front and the owner send them to each other: errors, versions, aliases, statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any, Final

import orjson

from ..core import errors
from ..core.catalog import AliasRecord, AliasSpec, Guard, Shadow
from ..core.errors import GatewayError, InternalError
from ..core.routing import Router
from ..core.stats import Duration, Histogram, ModelStats
from ..core.tensors import Signature, TensorSpec
from ..server.policy import EdgeStats

_DURATIONS: Final = ("success", "fail")
_STAGES: Final = ("parse", "serialise")
"""What is counted where a request's bytes are read and written; the rest is counted where its batch is."""
_EDGE_COUNTERS: Final = ("accepted", "requests", "evicted", "disconnected", "cancelled")


# --- errors ------------------------------------------------------------------------------------------------------


def _family(kind: type[GatewayError]) -> Iterable[type[GatewayError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)


def describe_error(error: GatewayError) -> dict[str, Any]:
    """What there is to know of an error: its class, its message, and the plain facts that it carries."""
    facts = {k: v for k, v in vars(error).items() if v is None or isinstance(v, bool | int | float | str)}
    return {"class": type(error).__name__, "code": error.code, "facts": facts}


def make_error(described: Mapping[str, Any]) -> GatewayError:
    """The error that ``describe_error`` was given; of a class that is not of the core, the nearest with its code."""
    kinds = list(_family(GatewayError))
    named = [k for k in kinds if k.__name__ == described["class"] and k.code == described["code"]]
    coded = [k for k in kinds if k.code == described["code"] and k.__module__ == errors.__name__]
    kind = (named or coded or [InternalError])[0]
    error = kind.__new__(kind)
    facts = described["facts"]
    Exception.__init__(error, facts.get("message", ""))
    for name, value in facts.items():
        setattr(error, name, value)
    return error


# --- signatures --------------------------------------------------------------------------------------------------


def signature_to_json(signature: Signature) -> bytes:
    specs = [
        [[s.name, s.datatype, s.shape, s.optional, s.labels, s.axes] for s in side]
        for side in (signature.inputs, signature.outputs)
    ]
    return orjson.dumps([*specs, signature.batched, signature.max_rows])


def signature_from_json(text: bytes | memoryview) -> Signature:
    inputs, outputs, batched, max_rows = orjson.loads(text)
    return Signature(tuple(map(_spec, inputs)), tuple(map(_spec, outputs)), batched, max_rows)


def _spec(values: list[Any]) -> TensorSpec:
    name, datatype, shape, optional, labels, axes = values
    return TensorSpec(name, datatype, tuple(shape), optional, tuple(labels), tuple(axes))


# --- aliases -----------------------------------------------------------------------------------------------------


def aliases_to_json(records: Iterable[AliasRecord]) -> bytes:
    return orjson.dumps([asdict(record) for record in records], option=orjson.OPT_NON_STR_KEYS)


def aliases_from_json(text: bytes | memoryview) -> list[AliasRecord]:
    return [
        AliasRecord(
            **{
                **record,
                "spec": _target(record["spec"]),
                "previous": None if record["previous"] is None else _target(record["previous"]),
                "updated_at": datetime.fromisoformat(record["updated_at"]),
            }
        )
        for record in orjson.loads(text)
    ]


def _target(spec: Mapping[str, Any]) -> AliasSpec:
    return AliasSpec(
        weights={int(version): weight for version, weight in spec["weights"].items()},
        sticky=spec["sticky"],
        shadow=None if spec["shadow"] is None else Shadow(**spec["shadow"]),
        fallback=tuple(spec["fallback"]),
        guard=None if spec["guard"] is None else Guard(**spec["guard"]),
    )


# --- statistics --------------------------------------------------------------------------------------------------


def take_model_stats(stats: ModelStats) -> dict[str, Any] | None:
    """What was counted at the edge, as JSON has it; None where nothing was."""
    if not stats.request.count:
        return None
    return {
        "request": _histogram(stats.request),
        **{name: _histogram(stats.stages[name]) for name in _STAGES},
        **{name: [getattr(stats, name).count, getattr(stats, name).ns] for name in _DURATIONS},
        "failures": stats.failures,
        "last": stats.last_inference_ms,
    }


def add_model_stats(stats: ModelStats, taken: Mapping[str, Any]) -> None:
    """Add what ``take_model_stats`` gave elsewhere."""
    _add_histogram(stats.request, taken["request"])
    for name in _STAGES:
        _add_histogram(stats.stages[name], taken[name])
    for name in _DURATIONS:
        duration: Duration = getattr(stats, name)
        duration.count += taken[name][0]
        duration.ns += taken[name][1]
    for code, count in taken["failures"].items():
        stats.failures[code] = stats.failures.get(code, 0) + count
    stats.last_inference_ms = max(stats.last_inference_ms, taken["last"])


def take_alias_stats(router: Router) -> list[dict[str, Any]]:
    """What was counted of each alias since the last call, which begins anew with this one."""
    taken = []
    for plan in router.aliases():
        targets = {}
        for version, route in plan.routes.items():
            stats = route.stats
            if stats.requests or stats.failures or stats.fallbacks:
                targets[str(version)] = [stats.requests, dict(stats.failures), stats.fallbacks]
                stats.requests = stats.fallbacks = 0
                stats.failures.clear()
        shadow = plan.shadow_stats
        copies = [shadow.compared, shadow.differing, shadow.failed, shadow.dropped]
        if targets or any(copies):
            entry = {"model": plan.model, "alias": plan.alias, "targets": targets, "copies": copies}
            taken.append({**entry, "difference": shadow.largest_difference})
            shadow.compared = shadow.differing = shadow.failed = shadow.dropped = 0
    return taken


def add_alias_stats(router: Router, taken: Iterable[Mapping[str, Any]]) -> None:
    """Add what ``take_alias_stats`` gave elsewhere; what became of an alias or target that is gone is forgotten."""
    for entry in taken:
        plan = router.plan(entry["model"], entry["alias"])
        if plan is None:
            continue
        for version, (requests, failures, fallbacks) in entry["targets"].items():
            route = plan.routes.get(int(version))
            if route is not None:
                route.stats.requests += requests
                route.stats.fallbacks += fallbacks
                for code, count in failures.items():
                    route.stats.failures[code] = route.stats.failures.get(code, 0) + count
        shadow = plan.shadow_stats
        compared, differing, failed, dropped = entry["copies"]
        shadow.compared += compared
        shadow.differing += differing
        shadow.failed += failed
        shadow.dropped += dropped
        shadow.largest_difference = max(shadow.largest_difference, entry["difference"])


class EdgeTally:
    """What an edge counted since it was looked at last."""

    def __init__(self, stats: EdgeStats) -> None:
        self._stats = stats
        self._seen: dict[str, Any] = self._now()

    def _now(self) -> dict[str, Any]:
        stats = self._stats
        return {
            "counters": [getattr(stats, name) for name in _EDGE_COUNTERS],
            "refused": dict(stats.refused),
            "expired": dict(stats.expired),
            "lag": _histogram(stats.lag),
        }

    def take(self) -> dict[str, Any]:
        """The differences, and the connections that are open now."""
        seen, now = self._seen, self._now()
        self._seen = now
        return {
            "open": self._stats.open,
            "counters": [a - b for a, b in zip(now["counters"], seen["counters"], strict=True)],
            "refused": {k: v - seen["refused"].get(k, 0) for k, v in now["refused"].items()},
            "expired": {k: v - seen["expired"].get(k, 0) for k, v in now["expired"].items()},
            "lag": [
                [a - b for a, b in zip(now["lag"][0], seen["lag"][0], strict=True)],
                now["lag"][1] - seen["lag"][1],
            ],
        }


def add_edge_stats(stats: EdgeStats, taken: Mapping[str, Any], opened: int) -> None:
    """Add what ``EdgeTally.take`` gave elsewhere.

    Args:
        opened: how many connections are open there more than before.
    """
    stats.open += opened
    for name, count in zip(_EDGE_COUNTERS, taken["counters"], strict=True):
        setattr(stats, name, getattr(stats, name) + count)
    for mine, theirs in ((stats.refused, taken["refused"]), (stats.expired, taken["expired"])):
        for code, count in theirs.items():
            if count:
                mine[code] = mine.get(code, 0) + count
    _add_histogram(stats.lag, taken["lag"])


def _histogram(histogram: Histogram) -> list[Any]:
    return [list(histogram.counts), histogram.sum]


def _add_histogram(histogram: Histogram, taken: list[Any]) -> None:
    counts, total = taken
    histogram.counts = [a + b for a, b in zip(histogram.counts, counts, strict=True)]
    histogram.sum += total
