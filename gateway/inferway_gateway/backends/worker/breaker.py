"""Circuit breaker of one model version: after several failures in a short time it is left alone for a while. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, Literal

BreakerState = Literal["closed", "open", "half_open"]

WINDOW_S: Final = 60.0
OPEN_S: Final = 5.0
MAX_OPEN_S: Final = 60.0


@dataclass(slots=True)
class Breaker:
    """Counts failures that are the model's own.

    Attributes:
        limit: so many failures within ``WINDOW_S`` open it; 0: it never opens.

    Open, it lets nothing through for ``OPEN_S`` seconds, and for twice as long each further time, up to ``MAX_OPEN_S``.
    Then it is half open: what succeeds closes it, what fails opens it again at once.
    """

    limit: int
    _failures: deque[float] = field(default_factory=deque)
    _open_until: float = 0.0
    _open_s: float = 0.0

    def state(self, now: float) -> BreakerState:
        if not self._open_s:
            return "closed"
        return "open" if now < self._open_until else "half_open"

    def retry_after_s(self, now: float) -> float:
        """Seconds until something is let through again; 0 where it is."""
        return max(self._open_until - now, 0.0) if self._open_s else 0.0

    def failed(self, now: float) -> bool:
        """Count a failure; True: this one opened the breaker."""
        if not self.limit:
            return False
        state = self.state(now)
        if state == "open":
            return False
        failures = self._failures
        failures.append(now)
        while failures[0] <= now - WINDOW_S:
            failures.popleft()
        if state == "closed" and len(failures) < self.limit:
            return False
        self._open_s = min(self._open_s * 2, MAX_OPEN_S) if self._open_s else OPEN_S
        self._open_until = now + self._open_s
        return True

    def succeeded(self, now: float) -> bool:
        """Something worked; True: that closed the breaker. What was begun before it opened does not count."""
        if self.state(now) != "half_open":
            return False
        self._open_s = self._open_until = 0.0
        self._failures.clear()
        return True
