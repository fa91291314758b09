"""What a caller may set, for a client or for one call: time limits, retries, headers, hooks.

Standard library only, and cheap to import: every other module of the SDK stands on this one.
"""

from __future__ import annotations

import enum
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    from ._errors import APIError


class NotGiven(enum.Enum):
    """The type of `NOT_GIVEN`. An enum of one member, because type checkers narrow those with ``is``."""

    NOT_GIVEN = "NOT_GIVEN"

    def __bool__(self) -> Literal[False]:
        return False

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN: Final = NotGiven.NOT_GIVEN
"""Stands for an argument that was left out where None has a meaning of its own, such as "no time limit"."""


def _check_seconds(name: str, value: float | None, *, zero: bool = False) -> None:
    """Refuse what is no length of time; a bool is a mistake for a number here, though Python counts it as one."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} expects seconds as a number or None, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} expects a positive, finite number of seconds, got {value!r}")


@dataclass(frozen=True, slots=True)
class Timeout:
    """Time limits of one call, in seconds. None is no limit.

    Attributes:
        total: from the call to its result: every attempt, every delay between attempts, waiting for a connection and
            reading the answer. What is left of it travels with each attempt as ``Inferway-Timeout-Ms``, and the gateway
            stops working on a request whose time has passed.
        connect: establishing one connection, TLS included; never more than what is left of ``total``.
        read: silence between two reads of an answer; never more than what is left of ``total``.
    """

    total: float | None = 60.0
    connect: float | None = 5.0
    read: float | None = None

    def __post_init__(self) -> None:
        _check_seconds("Timeout.total", self.total)
        _check_seconds("Timeout.connect", self.connect)
        _check_seconds("Timeout.read", self.read)

    @classmethod
    def of(cls, value: float | Timeout | None) -> Timeout:
        """A plain number is ``total``; None is no limit at all, on connecting neither."""
        if isinstance(value, Timeout):
            return value
        if value is None:
            return _NO_LIMIT
        _check_seconds("timeout", value)
        return cls(total=float(value))


_NO_LIMIT: Final = Timeout(total=None, connect=None, read=None)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Which failures are tried again, after how long, and how often.

    Tried again are: connections that could not be made; connections that broke before the answer was complete, where
    repeating the call does no harm; and the statuses below. The gateway's word comes first: ``X-Should-Retry`` on an
    answer decides over this table, and a 504 with that header is the caller's own deadline, which no retry brings back.

    A delay is drawn evenly from 0 to ``min(max_delay_s, base_delay_s * 2**n)`` (full jitter) before retry n = 0, 1, …;
    ``Retry-After`` sets the least delay. When it asks for more than ``max_retry_after_s``, or when a delay would end
    after the call's total time, the error is raised at once instead of sleeping.

    Attributes:
        attempts: how often one call is sent at most; 1 is no retry.
        base_delay_s, max_delay_s: bounds of the jitter, in seconds.
        max_retry_after_s: the longest ``Retry-After`` that is waited for, in seconds.
        statuses: HTTP statuses that are tried again where the answer has no ``X-Should-Retry``.
        budget_ratio, budget_floor_per_s: all calls of a client together may spend this share of their number on
            retries, and besides this many retries a second, so that a gateway in trouble is not buried by retries.

    Source: full jitter, Brooker, "Exponential Backoff And Jitter" (AWS, 2015); retry budgets, "Site Reliability
    Engineering" (Google, 2016), chapter 21, and Finagle's RetryBudget.
    """

    attempts: int = 3
    base_delay_s: float = 0.5
    max_delay_s: float = 8.0
    max_retry_after_s: float = 30.0
    statuses: frozenset[int] = frozenset({408, 429, 502, 503, 504})
    budget_ratio: float = 0.1
    budget_floor_per_s: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise ValueError(f"RetryPolicy.attempts expects a whole number of at least 1, got {self.attempts!r}")
        for name in ("base_delay_s", "max_delay_s", "max_retry_after_s", "budget_ratio", "budget_floor_per_s"):
            _check_seconds(f"RetryPolicy.{name}", getattr(self, name), zero=True)
        object.__setattr__(self, "statuses", frozenset(self.statuses))


NO_RETRY: Final = RetryPolicy(attempts=1)


class RequestOptions(TypedDict, total=False):
    """Options that every method of the SDK takes as keyword arguments, for this one call.

    Keys:
        timeout: seconds for the whole call, a `Timeout`, or None for no limit.
        retry: a `RetryPolicy`, or None to send once.
        headers: added to the client's own headers; a name that is there already is replaced.
        idempotency_key: sent with every attempt of a POST instead of a random one; at most 255 visible characters.
        request_id: sent as ``X-Request-Id`` and found again in the gateway's log; ``[A-Za-z0-9._:-]``, at most 128.
        max_response_bytes: a longer answer is refused with `APIResponseValidationError`.
    """

    timeout: float | Timeout | None
    retry: RetryPolicy | None
    headers: Mapping[str, str]
    idempotency_key: str
    request_id: str
    max_response_bytes: int


OPTION_NAMES: Final = frozenset(RequestOptions.__annotations__)


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """An attempt is about to be sent. Headers that hold secrets are masked.

    Attributes:
        attempt: 1 for the first.
        body_bytes: length of the body.
        timeout_s: what is left of the call's time, in seconds; None without a limit.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    body_bytes: int
    attempt: int
    request_id: str
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class ResponseEvent:
    """An attempt was answered, with whatever status. ``elapsed_s`` is that attempt's own time, in seconds."""

    request: RequestEvent
    status_code: int
    headers: Mapping[str, str]
    body_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class RetryEvent:
    """An attempt failed with ``error`` and is repeated after ``delay_s`` seconds. ``attempt`` is the failed one."""

    error: APIError
    attempt: int
    delay_s: float


MoreHeaders: TypeAlias = Mapping[str, str] | None
RequestHook: TypeAlias = Callable[[RequestEvent], MoreHeaders | Awaitable[MoreHeaders]]
ResponseHook: TypeAlias = Callable[[ResponseEvent], Awaitable[None] | None]
RetryHook: TypeAlias = Callable[[RetryEvent], Awaitable[None] | None]


async def _sleep(seconds: float) -> None:
    import asyncio

    await asyncio.sleep(seconds)


@dataclass(frozen=True, slots=True)
class Clock:
    """Where the SDK takes time and chance from, so that tests need not wait.

    Attributes:
        monotonic: seconds that never run backwards; deadlines are counted on it.
        wall: seconds since the epoch, to read a ``Retry-After`` that is a date.
        sleep, sleep_async: wait that many seconds.
        uniform: a random number between two bounds.
    """

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    sleep_async: Callable[[float], Awaitable[None]] = field(default=_sleep)
    # The module's function, not an instance of Random: only that one is reseeded in a forked child.
    uniform: Callable[[float, float], float] = random.uniform


SYSTEM_CLOCK: Final = Clock()
