from __future__ import annotations

import pytest

from inferway_gateway.backends.worker.breaker import MAX_OPEN_S, OPEN_S, WINDOW_S, Breaker


def test_it_opens_with_the_last_of_so_many_failures_within_the_window() -> None:
    breaker = Breaker(3)
    assert [breaker.failed(at) for at in (0.0, 10.0)] == [False, False]
    assert breaker.state(10.0) == "closed"
    assert breaker.failed(WINDOW_S - 0.1)
    assert breaker.state(WINDOW_S) == "open"
    assert breaker.retry_after_s(WINDOW_S - 0.1) == pytest.approx(OPEN_S)


def test_failures_that_are_far_apart_do_not_open_it() -> None:
    breaker = Breaker(3)
    assert not any(breaker.failed(at * WINDOW_S / 2) for at in range(100))


def test_half_open_a_success_closes_it_and_a_failure_opens_it_for_twice_as_long() -> None:
    breaker = Breaker(1)
    now, waits = 0.0, []
    for _ in range(6):
        assert breaker.failed(now)
        waits.append(breaker.retry_after_s(now))
        assert not breaker.failed(now)  # what was under way when it opened
        assert not breaker.succeeded(now)
        now += waits[-1]
        assert breaker.state(now) == "half_open"
    assert waits == [min(OPEN_S * 2**n, MAX_OPEN_S) for n in range(6)]
    assert breaker.succeeded(now)
    assert breaker.state(now) == "closed"
    assert breaker.failed(now)
    assert breaker.retry_after_s(now) == OPEN_S


def test_a_limit_of_nothing_never_opens_it() -> None:
    breaker = Breaker(0)
    assert not any(breaker.failed(0.0) for _ in range(100))
    assert breaker.state(0.0) == "closed"
