"""Which version answers: shares, stickiness, names, and what an alias may be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferway_gateway.core.catalog import AliasRecord, AliasSpec, Guard, Shadow
from inferway_gateway.core.errors import AliasNotFoundError, InvalidParameterError, VersionNotFoundError
from inferway_gateway.core.routing import (
    MAX_TARGETS,
    Router,
    TargetStats,
    bare_name,
    check_alias_name,
    check_spec,
    parse_target,
    without,
)

NOBODY: Mapping[bytes, bytes] = {}
CALLERS = [f"key{i}" for i in range(2000)]


def record(spec: AliasSpec, *, model: str = "churn", alias: str = "stable", revision: int = 1) -> AliasRecord:
    return AliasRecord(model, alias, spec, None, revision, datetime(2026, 3, 1, tzinfo=UTC), "somebody")


def router(spec: AliasSpec, *, seed: int = 0) -> Router:
    made = Router(lambda: seed)
    made.update([record(spec)])
    return made


def version_for(routes: Router, key_id: str = "", fields: Mapping[bytes, bytes] = NOBODY) -> int:
    route = routes.resolve("churn", None, key_id, fields)
    assert route is not None
    return route.version


def versions_of_callers(weights: Mapping[int, float], *, sticky: str = "key") -> dict[str, int]:
    routes = router(AliasSpec(weights, sticky=sticky))
    return {caller: version_for(routes, caller) for caller in CALLERS}


@st.composite
def some_weights(draw: st.DrawFn, least: int = 1) -> dict[int, float]:
    versions = draw(st.lists(st.integers(1, 1000), min_size=least, max_size=6, unique=True))
    parts = [draw(st.integers(0, 1000)) for _ in versions]
    parts[0] += 1
    return {version: 100 * part / sum(parts) for version, part in zip(versions, parts, strict=True)}


# ------------------------------------------------------------------ shares


@settings(deadline=None)
@given(weights=some_weights(), seed=st.integers(0, 2**64 - 1))
def test_each_target_has_had_its_share_after_any_number_of_requests(weights: dict[int, float], seed: int) -> None:
    routes = router(AliasSpec(weights), seed=seed)
    counts: Counter[int] = Counter()
    for n in range(1, 1001):
        counts[version_for(routes)] += 1
        if n in (10, 100, 1000):
            for version, weight in weights.items():
                # The discrepancy of the golden ratio's sequence is below 3 + log(n), over n.
                assert abs(counts[version] - n * weight / 100) <= 3 + math.log(n)


def test_shares_go_on_where_they_were_when_an_alias_changes() -> None:
    routes = router(AliasSpec({1: 90, 2: 10}))
    counts: Counter[int] = Counter()
    for n in range(1, 1001):
        routes.update([record(AliasSpec({1: 90, 2: 10}, fallback=(n % 7 + 3,)), revision=n + 1)])
        counts[version_for(routes)] += 1
    assert abs(counts[2] - 100) <= 10


def test_a_target_of_no_weight_gets_nothing_and_keeps_its_place() -> None:
    routes = router(AliasSpec({1: 100, 2: 0}))
    assert {version_for(routes) for _ in range(200)} == {1}
    plan = routes.plan("churn", "stable")
    assert plan is not None
    assert sorted(plan.routes) == [1, 2]


@settings(deadline=None)
@given(share=st.floats(0.01, 1), weights=some_weights(least=2), seed=st.integers(0, 2**64 - 1))
def test_the_shadow_gets_its_share_of_every_targets_requests(
    share: float, weights: dict[int, float], seed: int
) -> None:
    routes = router(AliasSpec(weights, shadow=Shadow(1001, share)), seed=seed)
    plan = routes.plan("churn", "stable")
    assert plan is not None
    seen: Counter[int] = Counter()
    copied: Counter[int] = Counter()
    for _ in range(2000):
        version = plan.choose("", NOBODY).version
        seen[version] += 1
        copied[version] += plan.samples_shadow()
    assert abs(sum(copied.values()) - 2000 * share) <= 12
    for version, count in seen.items():
        assert abs(copied[version] - count * share) <= 60


# ------------------------------------------------------------------ stickiness


@settings(deadline=None)
@given(weights=some_weights())
def test_a_caller_keeps_its_version_and_versions_have_their_shares_of_callers(weights: dict[int, float]) -> None:
    first, again = versions_of_callers(weights), versions_of_callers(weights)
    assert first == again
    counts = Counter(first.values())
    for version, weight in weights.items():
        expected = len(CALLERS) * weight / 100
        assert abs(counts[version] - expected) <= 5 * math.sqrt(expected + 1)


@pytest.mark.parametrize(("before", "after"), [(5, 10), (10, 50), (50, 100), (1, 99)])
def test_a_growing_canary_keeps_whom_it_has_and_takes_no_more_than_it_must(before: float, after: float) -> None:
    small, large = (versions_of_callers({3: 100 - w, 4: w}) for w in (before, after))
    assert {c for c, v in small.items() if v == 4} <= {c for c, v in large.items() if v == 4}
    moved = sum(small[c] != large[c] for c in CALLERS) / len(CALLERS)
    assert abs(moved - (after - before) / 100) < 0.04


@settings(deadline=None)
@given(before=some_weights(least=2), data=st.data())
def test_callers_only_move_to_a_version_that_grew_more_in_proportion(
    before: dict[int, float], data: st.DataObject
) -> None:
    parts = {version: data.draw(st.integers(0, 1000)) for version in before}
    parts[min(parts)] += 1
    after = {version: 100 * part / sum(parts.values()) for version, part in parts.items()}
    old, new = versions_of_callers(before), versions_of_callers(after)
    for caller in CALLERS:
        left, found = old[caller], new[caller]
        if left != found:
            assert after[found] * before[left] > after[left] * before[found] * (1 - 1e-9)


def test_a_removed_target_gives_its_callers_away_and_leaves_the_others_where_they_are() -> None:
    old, new = versions_of_callers({1: 60, 2: 30, 3: 10}), versions_of_callers({1: 60 / 0.9, 2: 30 / 0.9})
    assert all(new[caller] == version for caller, version in old.items() if version != 3)


def test_aliases_do_not_give_the_same_callers_to_their_canaries() -> None:
    routes = Router(lambda: 0)
    spec = AliasSpec({1: 90, 2: 10}, sticky="key")
    routes.update([record(spec), record(spec, alias="other"), record(spec, model="fraud")])
    chosen = [
        {c for c in CALLERS if (r := routes.resolve(target, None, c, NOBODY)) is not None and r.version == 2}
        for target in ("churn", "churn@other", "fraud")
    ]
    for one in range(3):
        for other in range(one):
            assert len(chosen[one] & chosen[other]) < 60  # a tenth of a tenth of 2000 by chance, give or take


def test_a_header_decides_where_it_is_there_and_the_key_where_it_is_not() -> None:
    routes = router(AliasSpec({1: 50, 2: 50}, sticky="header:X-User"))
    by_user = {user: version_for(routes, "a", {b"x-user": user}) for user in (b"%d" % i for i in range(64))}
    assert set(by_user.values()) == {1, 2}
    for key in ("b", ""):
        assert {user: version_for(routes, key, {b"x-user": user}) for user in by_user} == by_user
    by_key = {key: version_for(routes, key) for key in CALLERS[:64]}
    assert set(by_key.values()) == {1, 2}
    assert {key: version_for(routes, key, {b"x-user": b""}) for key in by_key} == by_key
    assert {key: version_for(routes, key) for key in by_key} == by_key


def test_the_headers_that_aliases_look_at_are_known() -> None:
    routes = router(AliasSpec({1: 50, 2: 50}, sticky="header:X-User"))
    assert routes.headers == {b"x-user"}
    (plan,) = routes.aliases()
    routes.put(replace(plan.record, spec=AliasSpec({1: 100}), revision=plan.record.revision + 1))
    assert routes.headers == frozenset()
    routes.put(replace(plan.record, revision=plan.record.revision + 2))
    routes.forget(plan.model, plan.alias)
    assert routes.headers == frozenset()


def test_a_value_of_a_header_is_not_taken_for_a_key_of_that_name() -> None:
    routes = router(AliasSpec({1: 50, 2: 50}, sticky="header:X-User"))
    pairs = [(version_for(routes, k), version_for(routes, "", {b"x-user": k.encode()})) for k in CALLERS[:200]]
    assert 50 < sum(a == b for a, b in pairs) < 150


def test_callers_without_a_key_are_not_one_caller() -> None:
    routes = router(AliasSpec({1: 50, 2: 50}, sticky="key"))
    counts = Counter(version_for(routes) for _ in range(100))
    assert abs(counts[1] - 50) <= 5


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("target", "model", "alias"),
    [
        ("churn", "churn", None),
        ("churn@canary", "churn", "canary"),
        ("churn@a-1", "churn", "a-1"),
        ("churn@Canary", "churn@Canary", None),
        ("churn@", "churn@", None),
        ("churn@a@b", "churn@a@b", None),
        ("churn@" + "a" * 64, "churn@" + "a" * 64, None),
    ],
)
def test_a_target_names_a_model_and_perhaps_an_alias(target: str, model: str, alias: str | None) -> None:
    assert parse_target(target) == (model, alias)
    assert bare_name(target) == "churn"


def test_a_bare_name_means_stable_where_the_model_has_it() -> None:
    routes = Router()
    routes.update([record(AliasSpec({3: 100})), record(AliasSpec({4: 100}), alias="canary")])
    assert routes.locate("churn", None) == ("churn", 3)
    assert routes.locate("churn@stable", None) == ("churn", 3)
    assert routes.locate("churn@canary", None) == ("churn", 4)
    assert routes.locate("churn", 7) == ("churn", 7)
    assert routes.resolve("churn", 7, "", NOBODY) is None
    assert routes.resolve("fraud", None, "", NOBODY) is None
    routes.update([record(AliasSpec({4: 100}), alias="canary")])
    assert routes.resolve("churn", None, "", NOBODY) is None
    assert routes.locate("churn@canary", None) == ("churn", 4)


def test_an_alias_that_does_not_exist_is_not_found_and_has_no_versions_below_it() -> None:
    routes = router(AliasSpec({3: 100}))
    with pytest.raises(AliasNotFoundError, match="'churn' has no alias 'canary'"):
        routes.resolve("churn@canary", None, "", NOBODY)
    with pytest.raises(VersionNotFoundError, match="leave one out"):
        routes.locate("churn@stable", 3)


def test_an_alias_of_several_targets_is_described_by_its_largest() -> None:
    assert router(AliasSpec({3: 40, 4: 60})).locate("churn", None) == ("churn", 4)
    assert router(AliasSpec({4: 50, 3: 50})).locate("churn", None) == ("churn", 3)


def test_a_fallback_never_is_the_version_that_it_stands_in_for() -> None:
    plan = router(AliasSpec({3: 50, 4: 50}, fallback=(3, 2))).plan("churn", "stable")
    assert plan is not None
    assert {version: route.fallback for version, route in plan.routes.items()} == {3: (2,), 4: (3, 2)}


# ------------------------------------------------------------------ following the catalog


def test_a_snapshot_that_was_read_before_a_change_does_not_undo_it() -> None:
    routes = Router()
    old, new = record(AliasSpec({1: 100}), revision=1), record(AliasSpec({2: 100}), revision=2)
    routes.update([old])
    routes.put(new)
    routes.update([old])
    assert routes.locate("churn", None) == ("churn", 2)
    routes.update([new])
    routes.forget("churn", "stable")
    routes.update([new])
    assert routes.record("churn", "stable") is None
    routes.put(record(AliasSpec({3: 100}), alias="canary", revision=3))
    routes.update([])
    assert routes.locate("churn@canary", None) == ("churn", 3)


def test_what_the_catalog_says_next_is_what_counts() -> None:
    routes = Router()
    routes.put(record(AliasSpec({2: 100}), revision=9))
    routes.update([])
    routes.update([record(AliasSpec({1: 100}), revision=4)])
    assert routes.locate("churn", None) == ("churn", 1)
    routes.update([])
    assert routes.resolve("churn", None, "", NOBODY) is None


def test_an_older_write_that_returns_later_does_not_win() -> None:
    routes = Router()
    routes.put(record(AliasSpec({2: 100}), revision=9))
    routes.put(record(AliasSpec({1: 100}), revision=8))
    assert routes.locate("churn", None) == ("churn", 2)


def test_what_was_counted_of_a_target_lives_through_a_change_and_not_through_its_end() -> None:
    routes = router(AliasSpec({1: 50, 2: 50}))
    before = routes.plans["churn"].routes[1].stats
    before.requests = 7
    routes.update([record(AliasSpec({1: 90, 3: 10}), revision=2)])
    assert routes.plans["churn"].routes[1].stats is before
    routes.update([record(AliasSpec({3: 100}), revision=3)])
    routes.update([record(AliasSpec({1: 100}), revision=4)])
    assert routes.plans["churn"].routes[1].stats.requests == 0


def test_only_failures_of_the_versions_own_are_errors() -> None:
    stats = TargetStats()
    for code in (
        "model_failed",
        "worker_crashed",
        "deadline_exceeded",
        "internal",
        "invalid_tensor",
        "cancelled",
        "queue_full",
    ):
        stats.failed(code)
    assert stats.errors == 4


@settings(deadline=None)
@given(weights=some_weights(least=2))
def test_what_a_target_loses_the_largest_gets(weights: dict[int, float]) -> None:
    main = min(weights, key=lambda v: (-weights[v], v))
    lesser = next(v for v in weights if v != main)
    spec = without(AliasSpec(weights, sticky="key"), lesser)
    assert spec.weights[lesser] == 0
    assert spec.weights[main] == pytest.approx(weights[main] + weights[lesser])
    check_spec("churn", spec, set(weights))


# ------------------------------------------------------------------ what an alias may be


@settings(deadline=None)
@given(weights=some_weights())
def test_weights_that_sum_to_a_hundred_are_taken(weights: dict[int, float]) -> None:
    check_spec("churn", AliasSpec(weights), set(weights))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (AliasSpec({}), "at least one version"),
        (AliasSpec(dict.fromkeys(range(1, MAX_TARGETS + 2), 100 / (MAX_TARGETS + 1))), "at most 16 versions"),
        (AliasSpec({1: 95, 2: 4}), "sum to 100 percent, got 99: raise one of them by 1"),
        (AliasSpec({1: 95, 2: 6}), "got 101: lower one of them by 1"),
        (AliasSpec({1: 101, 2: -1}), "weight of version 2 to be a share"),
        (AliasSpec({1: math.nan}), "weight of version 1 to be a share"),
        (AliasSpec({1: math.inf}), "weight of version 1 to be a share"),
        (AliasSpec({0: 100}), "whole numbers from 1, got 0"),
        (AliasSpec({1: 100}, sticky="user"), "'none', 'key' or 'header:NAME'"),
        (AliasSpec({1: 100}, sticky="header:"), "'none', 'key' or 'header:NAME'"),
        (AliasSpec({1: 100}, sticky="header:X User"), "'none', 'key' or 'header:NAME'"),
        (AliasSpec({1: 100}, sticky="header:Authorization"), "holds a secret"),
        (AliasSpec({1: 100}, shadow=Shadow(2, 1.5)), "'shadow.share'"),
        (AliasSpec({1: 100}, shadow=Shadow(2, math.nan)), "'shadow.share'"),
        (AliasSpec({1: 100}, shadow=Shadow(2, 1, -1.0)), "'shadow.rtol'"),
        (AliasSpec({1: 100}, shadow=Shadow(2, 1, 0, math.inf)), "'shadow.atol'"),
        (AliasSpec({1: 100}, shadow=Shadow(1)), "another version than 1"),
        (AliasSpec({1: 100}, fallback=(2, 2)), "each version once"),
        (AliasSpec({1: 100, 2: 0}, fallback=(1,)), "other versions than 1"),
        (AliasSpec({1: 100}, fallback=(-1,)), "whole numbers from 1"),
        (AliasSpec({1: 100}, guard=Guard(window_s=1)), "'guard.window_s' to be from 2 to 86400, got 1"),
        (AliasSpec({1: 100}, guard=Guard(min_requests=0)), "'guard.min_requests'"),
        (AliasSpec({1: 100}, guard=Guard(max_error_rate=1.1)), "'guard.max_error_rate'"),
        (AliasSpec({1: 100}, guard=Guard(max_p95_ratio=math.nan)), "'guard.max_p95_ratio'"),
    ],
)
def test_what_an_alias_cannot_be_is_refused_in_words_that_help(spec: AliasSpec, says: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        check_spec("churn", spec, {1, 2})
    assert says in caught.value.message


@pytest.mark.parametrize(
    "spec", [AliasSpec({9: 100}), AliasSpec({1: 100}, shadow=Shadow(9)), AliasSpec({1: 100}, fallback=(9,))]
)
def test_a_version_that_does_not_exist_is_named_with_those_that_do(spec: AliasSpec) -> None:
    with pytest.raises(VersionNotFoundError, match="no version 9, the alias can name 1, 2; deploy version 9 first"):
        check_spec("churn", spec, {1, 2})
    check_spec("churn", spec)


@pytest.mark.parametrize("name", ["", "Stable", "1st", "a" * 64, "a_b", "stable "])
def test_an_alias_has_a_name_that_fits_a_path(name: str) -> None:
    check_alias_name("stable")
    with pytest.raises(InvalidParameterError):
        check_alias_name(name)
