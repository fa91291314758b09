from __future__ import annotations

import pytest

from inferway_gateway.backends.remote.budget import RetryBudget


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_retries_stay_near_their_share_of_the_requests() -> None:
    budget = RetryBudget(0.1, 0.0, Clock())
    retries = 0
    for _ in range(1000):
        budget.deposit()
        retries += budget.withdraw()
    assert 95 <= retries <= 101


def test_a_few_a_second_are_allowed_besides() -> None:
    clock = Clock()
    budget = RetryBudget(0.0, 1.0, clock)
    assert budget.withdraw()
    assert not budget.withdraw()
    clock.now += 2.5
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]


def test_quiet_times_save_up_only_so_much() -> None:
    clock = Clock()
    budget = RetryBudget(0.1, 1.0, clock)
    clock.now += 3600
    for _ in range(10_000):
        budget.deposit()
    assert sum(budget.withdraw() for _ in range(100)) == 10


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_without_floor_and_share_there_is_none(ratio: float) -> None:
    budget = RetryBudget(ratio, 0.0, Clock())
    assert budget.withdraw() == (ratio > 0)
    assert not budget.withdraw()
