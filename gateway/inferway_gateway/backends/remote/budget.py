"""How many retries an upstream gets: a share of its requests, and a few a second besides where its operator says so."""

from __future__ import annotations

import math
from collections.abc import Callable

MEMORY_S = 10.0
"""How long a request counts towards what may be saved up, as the time constant of an exponential decay."""


class RetryBudget:
    """A token bucket that every request fills a little and every retry empties by one.

    When everything fails, retries multiply the load of an upstream at the very moment when it can bear it least. With
    a budget the extra load stays near ``ratio``, however many attempts a single request may have.

    What quiet times save up is the share of the last seconds' requests, at least one retry. A fixed number would be
    little for an upstream of 1,000 requests a second and far too much for one of a single request: ten retries saved up
    are a third more calls in a trouble of thirty seconds.

    Args:
        ratio: of the requests, 0 to 1.
        floor_per_s: further retries a second.
        clock: seconds, monotonic.

    Source: token buckets of Finagle's RetryBudget, whose deposits expire after ten seconds; "Site Reliability
    Engineering" (Google, 2016), chapter 21.
    """

    __slots__ = ("_clock", "_floor_per_s", "_ratio", "_recent", "_since", "_tokens")

    def __init__(self, ratio: float, floor_per_s: float, clock: Callable[[], float]) -> None:
        self._ratio = ratio
        self._floor_per_s = floor_per_s
        self._recent = 0.0
        """Requests, each counted less the longer it was ago."""
        self._tokens = 1.0 if ratio or floor_per_s else 0.0
        self._clock = clock
        self._since = clock()

    def deposit(self) -> None:
        """Count one request."""
        self._pass()
        self._recent += 1.0
        self._add(self._ratio)

    def withdraw(self) -> bool:
        """Take one retry out; False where none is left, and then nothing was taken."""
        self._pass()
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _pass(self) -> None:
        """Take in the time since the last call."""
        now = self._clock()
        passed, self._since = now - self._since, now
        self._recent *= math.exp(-passed / MEMORY_S)
        self._add(passed * self._floor_per_s)

    def _add(self, tokens: float) -> None:
        most = max(1.0, self._ratio * self._recent, 3.0 * self._floor_per_s)
        self._tokens = min(most, self._tokens + tokens)
