"""Automatic roll back, on virtual time: counters in, verdicts out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferway_gateway.core.catalog import AliasRecord, AliasSpec, Guard
from inferway_gateway.core.guard import LOOK_S, Slot, TrafficWatch, Verdict, roll_back, watch_traffic
from inferway_gateway.core.routing import Router, TargetStats
from inferway_gateway.core.stats import REQUEST_BOUNDS, Histogram, ModelStats
from inferway_gateway.store.catalog import SqlCatalog, open_catalog
from inferway_gateway.store.database import open_keys

GUARD = Guard(window_s=60, min_requests=50, max_error_rate=0.02, max_p95_ratio=2)
CANARY = AliasSpec({3: 95, 4: 5}, guard=GUARD)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Traffic:
    """An alias with traffic that the test makes up, second by second."""

    def __init__(self, spec: AliasSpec = CANARY, *, previous: AliasSpec | None = None, by: str = "somebody") -> None:
        self.router = Router(lambda: 0)
        self.now = 1000.0
        self.wall = NOON
        self.loaded: dict[int, ModelStats] = {version: ModelStats() for version in spec.weights}
        self.record = AliasRecord("churn", "stable", spec, previous, 1, NOON, by)
        self.router.update([self.record])
        self.watch = TrafficWatch(self.router, lambda _, v: self.loaded.get(v), now=lambda: self.wall)
        assert self.watch.look(self.now) == []

    def target(self, version: int) -> TargetStats:
        return self.router.plans["churn"].routes[version].stats

    def requests(
        self, version: int, count: int, *, failed: int = 0, code: str = "model_failed", ms: float = 5.0
    ) -> None:
        """Count requests as the edge does."""
        stats, target = self.loaded.get(version), self.target(version)
        target.requests += count
        for i in range(count):
            wrong = code if i < failed else None
            if stats is not None:
                stats.finished(ms / 1e3, wrong)
            if wrong is not None:
                target.failed(wrong)

    def change(self, spec: AliasSpec) -> None:
        self.record = replace(self.record, spec=spec, revision=self.record.revision + 1)
        self.router.update([self.record])

    def second(self) -> Verdict | None:
        self.now += LOOK_S
        verdicts = self.watch.look(self.now)
        assert len(verdicts) <= 1
        return verdicts[0] if verdicts else None

    def first_verdict(self, seconds: int, each: Callable[[int], None]) -> tuple[int, Verdict] | None:
        for second in range(seconds):
            each(second)
            verdict = self.second()
            if verdict is not None:
                return second, verdict
        return None


def test_a_canary_that_fails_more_goes_back_to_no_traffic_and_the_event_says_why_in_numbers() -> None:
    traffic = Traffic()

    def each(_: int) -> None:
        traffic.requests(3, 95, failed=1)
        traffic.requests(4, 5, failed=1)

    found = traffic.first_verdict(60, each)
    assert found is not None
    second, verdict = found
    assert second == 11, "50 requests take ten seconds, and two seconds are left out of account"
    assert verdict.reason == "error_rate"
    assert verdict.spec.weights == {3: 100, 4: 0}
    assert verdict.spec == replace(CANARY, weights=verdict.spec.weights)
    assert verdict.detail == {
        "version": 4,
        "against": 3,
        "reason": "error_rate",
        "window_s": 60,
        "requests": 60,
        "errors": 12,
        "error_rate": 0.2,
        "p95_ms": verdict.detail["p95_ms"],
        "baseline_requests": 1140,
        "baseline_errors": 12,
        "baseline_error_rate": 0.0105,
        "baseline_p95_ms": verdict.detail["baseline_p95_ms"],
        "max_error_rate": 0.02,
        "max_p95_ratio": 2,
        "text": "version 4 failed 12 of 60 requests, version 3 12 of 1140; at most 0.02 more of all was allowed",
    }


def test_a_canary_that_is_slow_goes_back() -> None:
    traffic = Traffic()

    def each(_: int) -> None:
        traffic.requests(3, 95, ms=5)
        traffic.requests(4, 5, ms=13)

    found = traffic.first_verdict(60, each)
    assert found is not None
    assert found[1].reason == "p95"
    assert 11 < found[1].detail["p95_ms"] < 16
    assert 4 < found[1].detail["baseline_p95_ms"] < 6.1


@pytest.mark.parametrize(
    ("stable", "canary"),
    [
        ({"ms": 5}, {"ms": 7}),
        ({"ms": 0.1}, {"ms": 0.5}),
        ({"failed": 2}, {"failed": 2}),
        ({}, {"failed": 5, "code": "invalid_tensor"}),
        ({}, {"failed": 5, "code": "queue_full"}),
        ({}, {"failed": 5, "code": "cancelled"}),
        ({"ms": 50}, {"ms": 5}),
    ],
    ids=[
        "a little slower",
        "by less than one notices",
        "both fail",
        "callers' errors",
        "load",
        "callers left",
        "faster",
    ],
)
def test_a_canary_that_is_not_worse_stays(stable: dict[str, object], canary: dict[str, object]) -> None:
    traffic = Traffic()

    def each(_: int) -> None:
        traffic.requests(3, 10, **stable)  # type: ignore[arg-type]  # any of its options
        traffic.requests(4, 10, **canary)  # type: ignore[arg-type]

    assert traffic.first_verdict(120, each) is None


@pytest.mark.parametrize("failed", [60, 2000])
@pytest.mark.parametrize("straddles", [False, True])
def test_one_bad_second_does_nothing(failed: int, straddles: bool) -> None:
    traffic = Traffic()

    def each(second: int) -> None:
        traffic.requests(3, 20)
        traffic.requests(4, 20, ms=5)
        if second == 30 or (straddles and second == 31):
            traffic.requests(4, failed, failed=failed, ms=500)

    assert traffic.first_verdict(120, each) is None


def test_two_bad_seconds_apart_from_each_other_count() -> None:
    traffic = Traffic()

    def each(second: int) -> None:
        traffic.requests(3, 20)
        traffic.requests(4, 20, failed=20 if second in (30, 35, 40) else 0)

    found = traffic.first_verdict(120, each)
    assert found is not None
    assert found[0] in (35, 40)


def test_few_requests_prove_nothing() -> None:
    traffic = Traffic()

    def each(second: int) -> None:
        traffic.requests(3, 100)
        if second % 2:
            traffic.requests(4, 1, failed=1)

    assert traffic.first_verdict(120, each) is None


def test_without_traffic_on_the_largest_target_there_is_nothing_to_compare_with() -> None:
    traffic = Traffic()
    assert traffic.first_verdict(60, lambda _: traffic.requests(4, 20, failed=10)) is None


def test_what_was_long_ago_is_forgotten() -> None:
    traffic = Traffic()

    def each(second: int) -> None:
        traffic.requests(3, 20)
        # Worse than the bound over all seconds, and not over any sixty of them.
        traffic.requests(4, 20, failed=4 if second % 25 == 0 else 0)

    assert traffic.first_verdict(300, each) is None


def test_a_change_of_the_alias_begins_anew() -> None:
    traffic = Traffic()

    def each(_: int) -> None:
        traffic.requests(3, 50)
        traffic.requests(4, 5, failed=5)

    assert traffic.first_verdict(10, each) is None
    traffic.change(AliasSpec({3: 90, 4: 10}, guard=GUARD))
    assert traffic.second() is None
    assert traffic.first_verdict(11, each) is None
    assert traffic.first_verdict(3, each) is not None


def test_a_version_that_is_loaded_anew_begins_with_new_statistics() -> None:
    traffic = Traffic()
    for _ in range(20):
        traffic.requests(3, 20)
        traffic.requests(4, 20)
        assert traffic.second() is None
    traffic.loaded[4] = ModelStats()
    traffic.requests(4, 10, ms=7)
    assert traffic.second() is None
    p95_s = traffic.watch.p95_s("churn", "stable", 4)
    assert p95_s is not None
    assert 0.004 < p95_s < 0.008


def test_a_version_that_leaves_memory_and_comes_back_is_not_judged_by_its_past() -> None:
    traffic = Traffic()
    stats = traffic.loaded[4]
    for _ in range(100):
        stats.finished(0.5, None)
    traffic.change(CANARY)
    del traffic.loaded[4]
    assert traffic.second() is None
    traffic.loaded[4] = stats
    assert traffic.second() is None
    assert traffic.watch.p95_s("churn", "stable", 4) is None
    traffic.requests(4, 10, ms=7)
    del traffic.loaded[4]
    assert traffic.second() is None
    traffic.loaded[4] = stats
    assert traffic.second() is None
    p95_s = traffic.watch.p95_s("churn", "stable", 4)
    assert p95_s is not None
    assert 0.005 < p95_s < 0.009


def test_without_a_guard_nobody_judges_and_latencies_are_shown() -> None:
    traffic = Traffic(AliasSpec({3: 95, 4: 5}))

    def each(_: int) -> None:
        traffic.requests(3, 50)
        traffic.requests(4, 50, failed=50, ms=100)

    assert traffic.first_verdict(60, each) is None
    p95_s = traffic.watch.p95_s("churn", "stable", 4)
    assert p95_s is not None
    assert 0.08 < p95_s < 0.125
    assert traffic.watch.p95_s("churn", "stable", 9) is None
    assert traffic.watch.p95_s("churn", "other", 4) is None


@pytest.mark.parametrize("guard", [None, GUARD])
def test_an_open_breaker_takes_a_canary_back_at_once(guard: Guard | None) -> None:
    traffic = Traffic(AliasSpec({3: 95, 4: 5}, guard=guard))
    traffic.requests(3, 10)
    del traffic.loaded[4]
    traffic.requests(4, 1, failed=1, code="model_failing")
    verdict = traffic.second()
    assert verdict is not None
    assert verdict.reason == "breaker_open"
    assert verdict.spec.weights == {3: 100, 4: 0}
    assert "version 4 failed so often" in verdict.detail["text"]
    assert traffic.second() is None


def test_an_open_breaker_of_what_all_traffic_goes_to_undoes_the_last_change() -> None:
    before = AliasSpec({3: 100})
    traffic = Traffic(AliasSpec({4: 100}), previous=before)
    traffic.requests(4, 1, failed=1, code="model_failing")
    verdict = traffic.second()
    assert verdict is not None
    assert verdict.spec == before
    assert verdict.detail["version"] == 4


@pytest.mark.parametrize(
    ("previous", "by", "later"),
    [
        (None, "somebody", timedelta(0)),
        (AliasSpec({3: 100}), "gateway", timedelta(0)),
        (AliasSpec({3: 100}), "somebody", timedelta(hours=2)),
        (AliasSpec({3: 10, 4: 90}), "somebody", timedelta(0)),
    ],
    ids=["nothing before", "done by itself", "long ago", "the same version"],
)
def test_it_is_not_undone_where_that_would_not_help(previous: AliasSpec | None, by: str, later: timedelta) -> None:
    traffic = Traffic(AliasSpec({4: 100}), previous=previous, by=by)
    traffic.wall += later
    traffic.requests(4, 1, failed=1, code="model_failing")
    assert traffic.second() is None


def test_an_alias_that_is_gone_is_not_watched_any_more() -> None:
    traffic = Traffic()
    traffic.requests(4, 50)
    traffic.second()
    assert traffic.watch.p95_s("churn", "stable", 4) is not None
    traffic.router.update([])
    assert traffic.second() is None
    assert traffic.watch.p95_s("churn", "stable", 4) is None


@settings(deadline=None)
@given(values=st.lists(st.floats(1e-5, 60), min_size=1, max_size=300))
def test_the_percentile_is_off_by_no_more_than_its_bucket(values: list[float]) -> None:
    histogram = Histogram(REQUEST_BOUNDS)
    for value in values:
        histogram.observe(value)
    slot = Slot(latency={i: count for i, count in enumerate(histogram.counts) if count})
    found = slot.p95_s()
    assert found is not None
    exact = float(np.quantile(values, 0.95, method="inverted_cdf"))
    assert exact / 1.26 <= found <= exact * 1.26


# ------------------------------------------------------------------ writing it down


@asynccontextmanager
async def catalog(tmp_path: Path) -> AsyncIterator[SqlCatalog]:
    url = f"sqlite:///{tmp_path / 'inferway.db'}"
    async with (
        open_keys(database_url=url, state_dir=tmp_path, pepper=None, ttl_s=4),
        open_catalog(database_url=url) as opened,
    ):
        yield opened


async def test_of_two_gateways_that_see_the_same_one_rolls_back(tmp_path: Path) -> None:
    async with catalog(tmp_path) as store:
        record = await store.set_alias("churn", "stable", CANARY, by="k", checked=True)
        verdicts, routers = [], []
        for _ in range(2):
            traffic = Traffic()
            traffic.record = record
            traffic.router.update([record])
            traffic.second()
            traffic.requests(4, 1, failed=1, code="model_failing")
            verdict = traffic.second()
            assert verdict is not None
            verdicts.append(verdict)
            routers.append(traffic.router)
        done = [await roll_back(v, store, r) for v, r in zip(verdicts, routers, strict=True)]
        assert done == [True, False]
        assert routers[0].plans["churn"].rolled_back == 1
        assert routers[0].plans["churn"].record.spec.weights == {3: 100, 4: 0}
        events = await store.events("churn")
        assert [(e.kind, e.version, e.by) for e in events] == [
            ("auto_rolled_back", 4, "gateway"),
            ("alias_set", None, "k"),
        ]
        assert events[0].detail["reason"] == "breaker_open"
        again = await store.alias("churn", "stable")
        assert again.previous == CANARY


async def test_a_change_by_somebody_in_the_meantime_wins(tmp_path: Path) -> None:
    async with catalog(tmp_path) as store:
        record = await store.set_alias("churn", "stable", CANARY, by="k", checked=True)
        verdict = Verdict(record, 4, "p95", AliasSpec({3: 100, 4: 0}), {"version": 4, "text": ""})
        await store.set_alias("churn", "stable", AliasSpec({4: 100}), by="k", checked=True)
        router = Router()
        router.update([record])
        assert not await roll_back(verdict, store, router)
        assert (await store.alias("churn", "stable")).spec == AliasSpec({4: 100})


async def test_the_watch_goes_on_after_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = asyncio.Queue[float]()
    broken = [True]

    class Watch(TrafficWatch):
        def look(self, moment: float) -> list[Verdict]:
            looks.put_nowait(moment)
            if broken.pop() if broken else False:
                raise RuntimeError("a defect")
            return super().look(moment)

    monkeypatch.setattr("inferway_gateway.core.guard.LOOK_S", 0.001)
    router = Router()
    async with catalog(tmp_path) as store:
        work = asyncio.create_task(watch_traffic(Watch(router, lambda *_: None), store, router))
        async with asyncio.timeout(10):
            assert await looks.get() < await looks.get()
        work.cancel()
        await asyncio.wait([work])
        assert work.cancelled()
