from __future__ import annotations

from inferway_gateway.backends.remote.breaker import Breaker


class Case:
    def __init__(self, failures: int = 3) -> None:
        self.now = 0.0
        self.breaker = Breaker(failures, 1.0, 4.0, lambda: 0.5, lambda: self.now)

    def state(self) -> str:
        return self.breaker.state

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.breaker.begin()
            self.breaker.fail()


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    case = Case()
    case.fail(2)
    case.breaker.succeed()
    case.fail(2)
    assert case.state() == "closed"
    case.fail()
    assert case.state() == "open"
    assert not case.breaker.allows
    assert case.breaker.wait_s() == 1.0


def test_half_open_it_lets_one_request_through() -> None:
    case = Case()
    case.fail(3)
    case.now = 1.0
    assert case.state() == "half_open"
    assert case.breaker.allows
    case.breaker.begin()
    assert not case.breaker.allows
    case.breaker.succeed()
    assert case.state() == "closed"
    case.fail(2)
    assert case.state() == "closed", "what was before it closed still counts"


def test_each_trial_that_fails_opens_it_for_longer_up_to_a_bound() -> None:
    case = Case()
    case.fail(3)
    waits = []
    for _ in range(4):
        waits.append(case.breaker.wait_s())
        case.now += waits[-1]
        case.fail()
    assert waits == [1.0, 2.0, 4.0, 4.0]


def test_requests_that_went_before_it_opened_tell_nothing_new() -> None:
    case = Case()
    case.fail(3)
    case.breaker.fail()
    assert case.breaker.wait_s() == 1.0


def test_a_trial_that_tells_nothing_makes_room_for_another() -> None:
    case = Case()
    case.fail(3)
    case.now = 1.0
    case.breaker.begin()
    case.breaker.leave()
    assert case.breaker.allows
