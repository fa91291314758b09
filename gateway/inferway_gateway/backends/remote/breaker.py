"""When an endpoint is left alone: a circuit breaker, and the time that it asked for itself.

    closed     requests go; ``failures`` of them in a row that fail open it
    open       none goes, for a while that grows with each opening
    half-open  one goes; its success closes the breaker, its failure opens it for longer

A failure is what tells of the endpoint: no connection, no answer in time, 502, 503, 504 or an answer that is none. An
error of the model, such as 500, is not: else one caller with a poisonous input could take the endpoint from the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


class Breaker:
    """Tells whether a request may go to one endpoint.

    Args:
        failures: consecutive ones that open it.
        open_s, max_open_s: how long it stays open at first and at most.
        jitter: gives a number in [0, 1) that spreads trials of many gateways.
        clock: seconds, monotonic.
    """

    __slots__ = ("_clock", "_failures", "_in_a_row", "_jitter", "_max_open_s", "_open_s", "_opened", "_trial", "_until")

    def __init__(
        self, failures: int, open_s: float, max_open_s: float, jitter: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self._failures = failures
        self._open_s = open_s
        self._max_open_s = max_open_s
        self._jitter = jitter
        self._clock = clock
        self._in_a_row = 0
        self._opened = 0
        """How often it has opened since it was last closed; 0: it is closed."""
        self._until = 0.0
        self._trial = False

    @property
    def state(self) -> BreakerState:
        if not self._opened:
            return "closed"
        return "half_open" if self._clock() >= self._until else "open"

    @property
    def allows(self) -> bool:
        """Whether a request may go now. Ask ``begin`` before it does."""
        return not self._opened or (not self._trial and self._clock() >= self._until)

    def wait_s(self) -> float:
        """Seconds until a request may go as far as time decides; 0 where one may, or a trial is under way."""
        return max(0.0, self._until - self._clock()) if self._opened else 0.0

    def begin(self) -> None:
        """A request goes."""
        if self._opened:
            self._trial = True

    def succeed(self) -> None:
        self._in_a_row = self._opened = 0
        self._trial = False

    def fail(self) -> None:
        self._in_a_row += 1
        if self._opened and not self._trial:
            return  # one that went before it opened tells nothing new
        if self._trial or self._in_a_row >= self._failures:
            self._trial = False
            length = min(self._max_open_s, self._open_s * 2.0 ** min(self._opened, 32))
            self._opened += 1
            self._until = self._clock() + length * (0.75 + 0.5 * self._jitter())

    def leave(self) -> None:
        """A request ended that tells nothing, such as one whose caller went away: another may be the trial."""
        self._trial = False
