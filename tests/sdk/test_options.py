"""Options and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest

from inferway import NOT_GIVEN, Clock, RetryPolicy, Timeout
from inferway._options import OPTION_NAMES


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["total", "connect", "read"])
def test_a_time_limit_is_a_positive_finite_number(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Timeout.{name} expects a positive"):
        Timeout(**{name: value})


@pytest.mark.parametrize("value", ["5", True, [1]])
def test_a_time_limit_is_no_other_kind_of_value(value: Any) -> None:
    with pytest.raises(TypeError, match="seconds"):
        Timeout(total=value)
    with pytest.raises(TypeError, match="seconds"):
        Timeout.of(value)


def test_a_plain_number_is_the_total_and_none_is_no_limit_at_all() -> None:
    assert Timeout.of(3) == Timeout(total=3.0)
    assert Timeout.of(None) == Timeout(total=None, connect=None, read=None)
    limits = Timeout(read=2)
    assert Timeout.of(limits) is limits


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"attempts": 1.5},
        {"attempts": True},
        {"base_delay_s": -1},
        {"max_delay_s": math.inf},
        {"max_retry_after_s": math.nan},
        {"budget_ratio": -0.1},
    ],
)
def test_a_retry_policy_refuses_what_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="RetryPolicy"):
        RetryPolicy(**wrong)


def test_statuses_may_be_given_as_any_collection() -> None:
    statuses: Any = [500]
    assert RetryPolicy(statuses=statuses).statuses == frozenset({500})


def test_not_given_is_false_and_says_its_name() -> None:
    assert not NOT_GIVEN
    assert repr(NOT_GIVEN) == "NOT_GIVEN"


def test_the_options_of_a_call_are_these() -> None:
    assert sorted(OPTION_NAMES) == [
        "headers",
        "idempotency_key",
        "max_response_bytes",
        "request_id",
        "retry",
        "timeout",
    ]


async def test_the_system_clock_sleeps_in_both_ways() -> None:
    clock = Clock()
    clock.sleep(0)
    await clock.sleep_async(0)
    assert clock.monotonic() <= clock.monotonic()
    assert 1 <= clock.uniform(1, 2) <= 2
