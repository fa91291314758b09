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


def test_quiet_times_save_up_the_share_of_the_last_seconds_requests() -> None:
    clock = Clock()
    budget = RetryBudget(0.1, 0.0, clock)
    for _ in range(100_000):
        budget.deposit()
        clock.now += 0.01
    assert 99 <= sum(budget.withdraw() for _ in range(200)) <= 100, "a tenth of ten seconds' requests"


def test_what_was_saved_up_is_forgotten_when_requests_become_few() -> None:
    clock = Clock()
    budget = RetryBudget(0.1, 0.0, clock)
    for _ in range(10_000):
        budget.deposit()
    clock.now += 60
    assert sum(budget.withdraw() for _ in range(200)) == 2, "of 10,000 requests 25 count after six times ten seconds"


def test_one_retry_is_always_saved_up() -> None:
    clock = Clock()
    budget = RetryBudget(0.1, 0.0, clock)
    for _ in range(50):
        budget.deposit()
        clock.now += 60
    assert [budget.withdraw(), budget.withdraw()] == [True, False]


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_without_floor_and_share_there_is_none(ratio: float) -> None:
    budget = RetryBudget(ratio, 0.0, Clock())
    assert budget.withdraw() == (ratio > 0)
    assert not budget.withdraw()
