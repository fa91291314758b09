"""How many retries an upstream gets: a share of its requests, and a few a second besides."""

from __future__ import annotations

from collections.abc import Callable


class RetryBudget:
    """A token bucket that every request fills a little and every retry empties by one.

    When everything fails, retries multiply the load of an upstream at the very moment when it can bear it least. With
    a budget the extra load stays near ``ratio``, however many attempts a single request may have.

    Args:
        ratio: of the requests, 0 to 1.
        floor_per_s: further retries a second.
        clock: seconds, monotonic.

    Source: token buckets of Finagle's RetryBudget; "Site Reliability Engineering" (Google, 2016), chapter 21.
    """

    __slots__ = ("_cap", "_clock", "_floor_per_s", "_ratio", "_since", "_tokens")

    def __init__(self, ratio: float, floor_per_s: float, clock: Callable[[], float]) -> None:
        self._ratio = ratio
        self._floor_per_s = floor_per_s
        # What quiet times may save up: the retries of a hundred requests, or of three seconds.
        self._cap = max(100.0 * ratio, 3.0 * floor_per_s)
        self._tokens = min(1.0, self._cap)
        self._clock = clock
        self._since = clock()

    def deposit(self) -> None:
        """Count one request."""
        self._tokens = min(self._cap, self._tokens + self._ratio)

    def withdraw(self) -> bool:
        """Take one retry out; False where none is left, and then nothing was taken."""
        now = self._clock()
        self._tokens = min(self._cap, self._tokens + (now - self._since) * self._floor_per_s)
        self._since = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
