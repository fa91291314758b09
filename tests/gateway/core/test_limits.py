"""How many requests a key may make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway_gateway.core.errors import RateLimitedError
from inferway_gateway.core.limits import _SWEPT, RateLimits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def counted(limits: RateLimits, key: str = "a") -> int:
    """Requests that are let through at once."""
    count = 0
    while True:
        try:
            limits.take(key)
        except RateLimitedError:
            return count
        count += 1


def test_ten_seconds_worth_may_come_at_once_and_each_key_has_its_own() -> None:
    limits = RateLimits(60, Clock())
    assert counted(limits, "a") == 10
    assert counted(limits, "b") == 10


def test_the_wait_that_is_told_is_enough_and_no_longer_than_needed() -> None:
    clock = Clock()
    limits = RateLimits(60, clock)
    counted(limits)
    with pytest.raises(
        RateLimitedError, match=r"at most 60 requests a minute with this key; try again in 1\.0 s"
    ) as caught:
        limits.take("a")
    wait = caught.value.retry_after_s
    assert wait is not None
    clock.now += wait - 0.01
    with pytest.raises(RateLimitedError):
        limits.take("a")
    clock.now += 0.01
    assert counted(limits) == 1


def test_less_than_one_in_ten_seconds_is_still_one() -> None:
    clock = Clock()
    limits = RateLimits(2, clock)
    assert counted(limits) == 1
    clock.now += 30
    assert counted(limits) == 1


@given(st.floats(0.5, 10_000), st.lists(st.floats(0, 20), max_size=60))
def test_no_stretch_of_time_has_more_than_its_share_and_what_was_saved_up(
    per_minute: float, waits: list[float]
) -> None:
    clock = Clock()
    limits = RateLimits(per_minute, clock)
    burst = max(1.0, per_minute / 6)
    passed: list[float] = []
    for wait in waits:
        clock.now += wait
        for _ in range(3):
            try:
                limits.take("a")
            except RateLimitedError:
                break
            passed.append(clock.now)
    for first, begin in enumerate(passed):
        for last in range(first, len(passed)):
            share = (passed[last] - begin) * per_minute / 60
            assert last - first + 1 <= share + burst + 1e-3


@given(st.floats(0.5, 10_000), st.integers(1, 200))
def test_who_keeps_to_the_rate_is_never_refused(per_minute: float, count: int) -> None:
    clock = Clock()
    limits = RateLimits(per_minute, clock)
    for _ in range(count):
        limits.take("a")
        clock.now += 60 / per_minute


def test_keys_that_came_once_are_forgotten() -> None:
    clock = Clock()
    limits = RateLimits(60, clock)
    for number in range(_SWEPT):
        limits.take(str(number))
    clock.now += 60
    limits.take("late")
    assert len(limits) == 1


@pytest.mark.parametrize("per_minute", [0, -1.0])
def test_no_rate_is_none(per_minute: float) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        RateLimits(per_minute)
