"""How many requests a key may make: a token bucket for each.

A bucket holds what ten seconds allow and is filled evenly, so that a caller who keeps to the rate never meets the
limit, one who sends a minute's worth at once does, and an idle one has saved up no more than that.

Source: the leaky bucket as a meter, ITU-T I.371, annex A (the generic cell rate algorithm).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from .errors import RateLimitedError

_BURST_S: Final = 10.0
_SWEPT: Final = 4096
"""Buckets at which the full ones are forgotten: they say nothing that a new one would not."""


class RateLimits:
    """Counts requests by key. Lives on one event loop.

    Args:
        per_minute: requests of one key in a minute, more than 0; may be a fraction, such as one process' share.
        clock: in seconds, monotonic.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        if per_minute <= 0:
            raise ValueError(f"expected more than 0 requests in a minute, got {per_minute}")
        self._per_minute = per_minute
        self._interval_s = 60.0 / per_minute
        self._burst_s = max(_BURST_S, self._interval_s)
        self._clock = clock
        # For each key the moment at which its bucket will be full.
        self._full_at: dict[str, float] = {}

    def take(self, key_id: str) -> None:
        """Count a request.

        Raises:
            RateLimitedError: it is one too many, and was not counted; ``retry_after_s`` says when it would not be.
        """
        now = self._clock()
        full_at = max(self._full_at.get(key_id, now), now) + self._interval_s
        # Moments are sums of intervals: the last bit of them is no reason to refuse.
        early = full_at - now - self._burst_s
        if early > 1e-6:
            raise RateLimitedError(
                f"expected at most {self._per_minute:g} requests a minute with this key; try again in {early:.1f} s",
                retry_after_s=early,
            )
        if len(self._full_at) >= _SWEPT and key_id not in self._full_at:
            self._full_at = {key: moment for key, moment in self._full_at.items() if moment > now}
        self._full_at[key_id] = full_at

    def __len__(self) -> int:
        """Keys that are remembered."""
        return len(self._full_at)
