"""Who holds how much memory, and who leaves: nothing but bookkeeping, on a clock of the test's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from inferway_gateway.core.budget import Key, MemoryBudget, machine_bytes
from inferway_gateway.core.errors import MemoryExceededError

LIMIT = 100


@dataclass
class Version:
    """A loaded version as the budget sees it."""

    requests: int = 0
    in_flight: bool = False


@dataclass
class Scene:
    now: float = 0.0
    versions: dict[Key, Version] = field(default_factory=dict)
    budget: MemoryBudget = field(init=False)

    def __post_init__(self) -> None:
        self.budget = MemoryBudget(LIMIT, clock=lambda: self.now)

    def load(self, name: str, nbytes: int, *, pinned: bool = False) -> list[Key]:
        """Reserve and load; returns who left for it, who is gone then."""
        key = (name, 1)
        left = self.budget.reserve(key, nbytes, pinned=pinned)
        assert left is not None
        for other in left:
            self.budget.release(other)
        self.loaded(key, nbytes, pinned=pinned)
        return left

    def loaded(self, key: Key, nbytes: int, *, pinned: bool = False) -> list[Key]:
        version = self.versions[key] = Version()
        return self.budget.loaded(
            key, nbytes, pinned=pinned, busy=lambda: version.in_flight, activity=lambda: version.requests
        )

    def use(self, name: str) -> None:
        self.now += 1
        self.versions[name, 1].requests += 1
        self.budget.observe()


def test_the_least_recently_used_leaves() -> None:
    scene = Scene()
    for name in "abc":
        scene.load(name, 30)
    for name in "bac":
        scene.use(name)
    assert scene.load("d", 30) == [("b", 1)]
    assert scene.budget.evictions == 1
    assert scene.budget.loads == 4


def test_no_more_leave_than_must() -> None:
    scene = Scene()
    scene.load("small", 10)
    scene.load("large", 80)
    scene.use("small")
    scene.use("large")
    assert scene.load("new", 90) == [("large", 1)]


def test_what_is_pinned_or_busy_stays() -> None:
    scene = Scene()
    scene.load("pinned", 40, pinned=True)
    scene.load("busy", 40)
    scene.versions["busy", 1].in_flight = True
    assert scene.budget.reserve(("new", 1), 30) is None
    assert scene.budget.used_bytes == 80
    scene.versions["busy", 1].in_flight = False
    assert scene.budget.reserve(("new", 1), 30) == [("busy", 1)]


def test_a_load_under_way_is_counted_before_it_happens() -> None:
    scene = Scene()
    assert scene.budget.reserve(("a", 1), 60) == []
    assert scene.budget.reserve(("b", 1), 60) is None
    scene.budget.release(("a", 1))
    assert scene.budget.reserve(("b", 1), 60) == []


def test_who_leaves_is_counted_until_he_is_gone_and_not_chosen_again() -> None:
    scene = Scene()
    scene.load("old", 80)
    assert scene.budget.reserve(("new", 1), 60) == [("old", 1)]
    assert scene.budget.used_bytes == 140
    assert scene.budget.committed_bytes == 60
    assert scene.budget.reserve(("other", 1), 60) is None
    assert scene.budget.reserve(("old", 1), 10) is None  # it has to be gone before it can come back
    scene.budget.release(("old", 1))
    assert scene.budget.used_bytes == 60


def test_a_load_ahead_makes_nobody_leave() -> None:
    scene = Scene()
    scene.load("a", 80)
    assert scene.budget.reserve(("b", 1), 30, evict=False) is None
    assert scene.budget.reserve(("b", 1), 20, evict=False) == []


def test_the_spared_do_not_leave() -> None:
    scene = Scene()
    scene.load("a", 60)
    assert scene.budget.reserve(("b", 1), 60, spare=lambda key: key == ("a", 1)) is None
    assert scene.budget.reserve(("b", 1), 60) == [("a", 1)]


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    scene = Scene()
    with pytest.raises(MemoryExceededError, match=r"needs 101 bytes of memory \(estimated\), .* 100 bytes"):
        scene.budget.check(("big", 1), 101, how="estimated")
    scene.budget.check(("big", 1), 100, how="estimated")
    scene.load("pinned", 40, pinned=True)
    with pytest.raises(MemoryExceededError, match=r"needs 61 bytes .*pinned versions leave 60 of the 100 bytes"):
        scene.budget.check(("big", 1), 61, how="measured")
    scene.budget.check(("pinned", 1), 100, how="measured")  # its own share is not in its way


def test_a_version_that_holds_more_than_reserved_makes_others_leave_but_not_itself() -> None:
    scene = Scene()
    scene.load("a", 40)
    assert scene.budget.reserve(("b", 1), 40) == []
    assert scene.loaded(("b", 1), 70) == [("a", 1)]


def test_trimming_brings_the_sum_back_as_far_as_it_can() -> None:
    scene = Scene()
    scene.load("a", 50)
    scene.load("b", 50)
    scene.versions["a", 1].in_flight = True
    scene.budget.resize(("a", 1), 90)
    assert scene.budget.trim() == [("b", 1)]
    scene.budget.resize(("a", 1), 120)
    assert scene.budget.trim() == []
    scene.versions["a", 1].in_flight = False
    assert scene.budget.trim() == [("a", 1)]


def test_a_budget_of_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one byte, got 0"):
        MemoryBudget(0)


class BudgetMachine(RuleBasedStateMachine):
    """Any mix of loads, requests, ends and departures."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        self.used_at: dict[Key, float] = {}
        self.leaving: set[Key] = set()
        self.pinned: set[Key] = set()

    names = st.sampled_from("abcdef")

    def idle(self) -> list[Key]:
        return [
            key
            for key, version in self.scene.versions.items()
            if key not in self.leaving and key not in self.pinned and not version.in_flight
        ]

    @rule(name=names, nbytes=st.integers(1, 120), pinned=st.booleans())
    def load(self, name: str, nbytes: int, pinned: bool) -> None:
        key = (name, 1)
        budget = self.scene.budget
        idle = self.idle()
        before = budget.committed_bytes
        held = {other: holding.nbytes for other in idle if (holding := budget.holding(other)) is not None}
        known = budget.holding(key) is not None
        left = budget.reserve(key, nbytes, pinned=pinned)
        if left is None:
            assert known or before - sum(held.values()) + nbytes > LIMIT, "there was room, or could have been"
            assert budget.committed_bytes == before
            return
        assert set(left) <= set(idle), "somebody left who was pinned, busy, leaving or loading"
        if left:
            stayed = [other for other in idle if other not in left]
            newest = max(self.used_at[other] for other in left)
            freed = before + nbytes - sum(held[other] for other in left)
            for other in stayed:
                if self.used_at[other] < newest:
                    assert freed <= LIMIT
            assert all(freed + held[other] > LIMIT for other in left), "one left who need not have"
        self.leaving |= set(left)
        self.scene.now += 1
        more = self.scene.loaded(key, nbytes, pinned=pinned)
        assert not more
        self.used_at[key] = self.scene.now
        if pinned:
            self.pinned.add(key)

    @rule(name=names)
    def use(self, name: str) -> None:
        if (name, 1) in self.scene.versions and (name, 1) not in self.leaving:
            self.scene.use(name)
            self.used_at[name, 1] = self.scene.now

    @rule(name=names, in_flight=st.booleans())
    def work(self, name: str, in_flight: bool) -> None:
        version = self.scene.versions.get((name, 1))
        if version is not None:
            version.in_flight = in_flight

    @rule()
    def go(self) -> None:
        for key in self.leaving:
            self.scene.budget.release(key)
            del self.scene.versions[key]
            del self.used_at[key]
            self.pinned.discard(key)
        self.leaving = set()

    @rule(name=names)
    def unload(self, name: str) -> None:
        key = (name, 1)
        if key in self.scene.versions:
            self.scene.budget.mark_leaving(key)
            self.leaving.add(key)

    @invariant()
    def what_stays_is_within_the_limit(self) -> None:
        assert 0 <= self.scene.budget.committed_bytes <= LIMIT
        assert self.scene.budget.committed_bytes <= self.scene.budget.used_bytes


TestBudgetMachine = BudgetMachine.TestCase


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "4096", "memory.max": "9999"}, 4096),
        ("0::/a", {"a/memory.max": "max"}, None),
        ("5:cpu,memory:/x", {"memory/x/memory.limit_in_bytes": "8192"}, 8192),
        ("3:cpu:/x", {"memory/x/memory.limit_in_bytes": "8192"}, None),
        ("nonsense", {}, None),
    ],
    ids=["nested", "unlimited", "version 1", "other controller", "nonsense"],
)
def test_the_memory_of_a_control_group_counts(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int | None
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    whole = machine_bytes(tmp_path / "nowhere")
    assert whole > 1 << 20
    assert machine_bytes(tmp_path) == (whole if expected is None else expected)
