"""Which failures are tried again, after how long, within which budget. The loop is tenacity's, the rules are here.

The first attempt is made outside of this module, which is imported, and tenacity with it, when an attempt has failed: a
call that succeeds at once pays nothing for the machinery. The loop therefore starts with that failure as the outcome of
its attempt 1.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import cast

import tenacity

from ._budget import RetryBudget
from ._core import Plan, Reply, refuse_awaitable
from ._errors import APIConnectionError, APIError, APIStatusError, DeadlineExceededError
from ._options import RetryEvent

_REFUSED_BEFORE_WORK = frozenset({408, 429, 503})
"""Statuses that say that nothing was done, so that even a call that must not happen twice may be sent again."""


def may_retry(error: BaseException, plan: Plan) -> bool:
    """Whether the policy tries this failure again at all, time and budget aside."""
    if isinstance(error, APIStatusError):
        if not error.retryable or isinstance(error, DeadlineExceededError):
            return False
        if error.retry_after is not None and error.retry_after > plan.retry.max_retry_after_s:
            error.add_note(
                f"not tried again: Retry-After is {error.retry_after:g} s, more than "
                f"RetryPolicy.max_retry_after_s, {plan.retry.max_retry_after_s:g} s"
            )
            return False
        told = "x-should-retry" in error.headers
        return told or plan.call.repeatable or error.status_code in _REFUSED_BEFORE_WORK
    if isinstance(error, APIConnectionError):
        return error.retryable and (plan.call.repeatable or not error.sent)
    return False


def delay_s(error: BaseException, attempt: int, plan: Plan) -> float:
    """Seconds to wait after the failure of attempt number ``attempt``, which counts from 1.

    Full jitter; after a ``Retry-After`` the jitter comes on top of it, or all clients that were turned away together
    would be back together.
    """
    policy = plan.retry
    # The exponent is bounded because two to the power of a large policy would not fit a float.
    bound = min(policy.max_delay_s, policy.base_delay_s * 2.0 ** min(attempt - 1, 64))
    asked = error.retry_after if isinstance(error, APIError) else None
    if asked is not None:
        return asked + plan.clock.uniform(0.0, min(bound, policy.base_delay_s))
    return plan.clock.uniform(0.0, bound)


class _Rules:
    """The three questions that tenacity asks after each attempt, answered for one call."""

    def __init__(self, plan: Plan, budget: RetryBudget) -> None:
        self.plan = plan
        self.budget = budget

    def retry(self, state: tenacity.RetryCallState) -> bool:
        error = _error(state)
        return error is not None and may_retry(error, self.plan)

    def wait(self, state: tenacity.RetryCallState) -> float:
        return delay_s(cast(BaseException, _error(state)), state.attempt_number, self.plan)

    def stop(self, state: tenacity.RetryCallState) -> bool:
        # Asked after `wait`, so that the delay is known; the budget is asked last, because asking takes from it.
        error = cast(BaseException, _error(state))
        if state.attempt_number >= self.plan.retry.attempts:
            return True
        left = self.plan.left()
        if left is not None and state.upcoming_sleep >= left:
            error.add_note(f"not tried again: the next attempt would begin in {state.upcoming_sleep:.3g} s, when the "
                           f"call's time is over")  # fmt: skip
            return True
        if not self.budget.withdraw():
            error.add_note("not tried again: the client's retry budget is spent, see RetryPolicy.budget_ratio")
            return True
        return False

    def event(self, state: tenacity.RetryCallState) -> RetryEvent:
        return RetryEvent(cast(APIError, _error(state)), state.attempt_number, state.upcoming_sleep)


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


def retried(first: APIError, plan: Plan, budget: RetryBudget, attempt: Callable[[], Reply]) -> Reply:
    """Go on after the failure ``first``: the reply of a later attempt, or the last failure."""
    rules = _Rules(plan, budget)
    hook = plan.config.on_retry

    def before_sleep(state: tenacity.RetryCallState) -> None:
        if hook is not None:
            refuse_awaitable(hook(rules.event(state)), "on_retry")

    def again() -> Reply:
        if loop.statistics["attempt_number"] == 1:
            raise first
        return attempt()

    loop = tenacity.Retrying(
        sleep=plan.clock.sleep,
        retry=rules.retry,
        wait=rules.wait,
        stop=rules.stop,
        before_sleep=before_sleep,
        reraise=True,
    )
    return loop(again)


async def retried_async(
    first: APIError, plan: Plan, budget: RetryBudget, attempt: Callable[[], Awaitable[Reply]]
) -> Reply:
    """`retried` for the asynchronous client."""
    rules = _Rules(plan, budget)
    hook = plan.config.on_retry

    async def before_sleep(state: tenacity.RetryCallState) -> None:
        if hook is not None:
            pending = hook(rules.event(state))
            if isawaitable(pending):
                await pending

    async def again() -> Reply:
        if loop.statistics["attempt_number"] == 1:
            raise first
        return await attempt()

    loop = tenacity.AsyncRetrying(
        sleep=plan.clock.sleep_async,
        retry=rules.retry,
        wait=rules.wait,
        stop=rules.stop,
        before_sleep=before_sleep,
        reraise=True,
    )
    return await loop(again)
