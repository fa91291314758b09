"""The retry budget."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from inferway import RetryPolicy
from inferway._budget import RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_tenth_of_the_calls_may_be_retries() -> None:
    budget = RetryBudget(RetryPolicy(budget_ratio=0.1, budget_floor_per_s=0), Clock())
    assert [budget.withdraw() for _ in range(2)] == [True, False], "one to begin with"
    for _ in range(25):
        budget.deposit()
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]


def test_some_retries_a_second_are_always_there() -> None:
    clock = Clock()
    budget = RetryBudget(RetryPolicy(budget_ratio=0, budget_floor_per_s=2), clock)
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]
    clock.now = 1.0
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]
    clock.now = 1000.0
    assert [budget.withdraw() for _ in range(21)] == [True] * 20 + [False], "no more than ten seconds' worth is saved"


def test_a_budget_of_nothing_allows_nothing() -> None:
    budget = RetryBudget(RetryPolicy(budget_ratio=0, budget_floor_per_s=0), Clock())
    budget.deposit()
    assert not budget.withdraw()


@given(st.lists(st.sampled_from(["call", "retry", "second"]), max_size=400))
def test_retries_never_exceed_share_and_floor(events: list[str]) -> None:
    clock = Clock()
    policy = RetryPolicy(budget_ratio=0.1, budget_floor_per_s=1)
    budget = RetryBudget(policy, clock)
    calls = allowed = 0
    for event in events:
        if event == "call":
            calls += 1
            budget.deposit()
        elif event == "second":
            clock.now += 1
        elif budget.withdraw():
            allowed += 1
    assert allowed <= 0.1 * calls + clock.now + 1 + 1e-9


def test_a_forked_child_gets_a_lock_that_nobody_holds() -> None:
    budget = RetryBudget(RetryPolicy(), Clock())
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with budget._lock:
            holding.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(10)
    budget.forget()
    assert budget.withdraw()
    release.set()
    thread.join()
