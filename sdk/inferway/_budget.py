"""How many retries a client may make: a share of its calls, and a few a second besides."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ._options import RetryPolicy


class RetryBudget:
    """A token bucket that every call fills a little and every retry empties by one.

    When everything fails, a client without a budget multiplies its load by its number of attempts at the very moment
    when the gateway can bear it least. With it the extra load stays near ``ratio``, whatever the policy says.

    `deposit` is on the path of every call and takes no lock: two threads may lose one of their two deposits, which
    makes the budget a little stricter and nothing else. `withdraw` is exact.

    Source: token buckets of Finagle's RetryBudget; "Site Reliability Engineering" (Google, 2016), chapter 21.
    """

    __slots__ = ("__weakref__", "_cap", "_clock", "_floor_per_s", "_lock", "_ratio", "_since", "_tokens")

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._ratio = policy.budget_ratio
        self._floor_per_s = policy.budget_floor_per_s
        # Ten seconds' worth may be saved up. A new client starts with one second's worth, or it could never retry.
        self._cap = max(10.0 * self._floor_per_s, 100.0 * self._ratio)
        self._tokens = max(1.0, self._floor_per_s) if self._cap > 0 else 0.0
        self._clock = clock
        self._since = clock()
        self._lock = threading.Lock()

    def deposit(self) -> None:
        """Count one call."""
        if self._tokens < self._cap:
            self._tokens += self._ratio

    def withdraw(self) -> bool:
        """Take one retry out; False when there is none left, and then nothing was taken."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._cap, self._tokens + (now - self._since) * self._floor_per_s)
            self._since = now
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            return True

    def forget(self) -> None:
        """In a forked child: the lock may be held by a thread that is not there."""
        self._lock = threading.Lock()
