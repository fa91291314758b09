"""Automatic roll back: how the targets of an alias do against each other, and which of them goes back to no traffic.

Once a second every alias' counters are read; nothing is done on the way of a request but what is counted anyway. What
was added since the last look makes a slot, and the slots of the last ``window_s`` seconds are what is judged. Requests
and errors are those that came by the alias; latencies are the version's, whichever way its requests came.

A lesser target is compared with the one of the largest weight, once both had ``min_requests``. It must be beyond a
bound over the whole window **and** over the window without any two neighbouring slots: so a single bad second, which
may lie across two slots, does nothing, however bad. An open circuit breaker needs no such proof, for it is one.

Where the largest target's breaker opens, the alias goes back to what it was before, if it was changed by somebody not
long ago; not if the gateway itself was the last to change it, which would swap to and fro.

Of several gateways on one database each judges by its own traffic, and the first to write wins: the alias has moved on
from the revision that the others expect.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Final, Literal, NoReturn

from .catalog import AliasRecord, AliasSpec, Catalog, Guard
from .errors import ConflictError, GatewayError, ModelNotFoundError
from .routing import Plan, Router, TargetStats, without
from .stats import REQUEST_BOUNDS, ModelStats

logger = logging.getLogger("inferway.guard")

LOOK_S: Final = 1.0
SLOTS: Final = 60
"""Slots of a window at most; longer windows have longer slots."""
DEFAULT_WINDOW_S: Final = 60.0
"""Window of an alias without a guard, whose latencies are only shown."""
SMALLEST_DIFFERENCE_S: Final = 5e-4
"""Latencies that are closer than this are alike, whatever their ratio: a busy neighbour makes as much."""
RECENT: Final = timedelta(hours=1)
"""How long after a change the breaker of the largest target undoes it."""
BY: Final = "gateway"
"""Whose name stands in the event."""

Reason = Literal["error_rate", "p95", "breaker_open"]


@dataclass(slots=True)
class Slot:
    """What was added in a short while. ``latency`` is bucket of ``REQUEST_BOUNDS`` to count."""

    requests: int = 0
    errors: int = 0
    latency: dict[int, int] = field(default_factory=dict)

    def add(self, other: Slot) -> None:
        self.requests += other.requests
        self.errors += other.errors
        for bucket, count in other.latency.items():
            self.latency[bucket] = self.latency.get(bucket, 0) + count

    def take(self, other: Slot) -> None:
        """The opposite of ``add``."""
        self.requests -= other.requests
        self.errors -= other.errors
        for bucket, count in other.latency.items():
            self.latency[bucket] -= count

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    @property
    def timed(self) -> int:
        return sum(self.latency.values())

    def p95_s(self) -> float | None:
        """95th percentile of latency in seconds, between the bounds of its bucket by rank; None without any."""
        timed = self.timed
        if not timed:
            return None
        rank = 0.95 * timed
        below = 0
        for bucket in sorted(self.latency):
            count = self.latency[bucket]
            if count and below + count >= rank:
                low = REQUEST_BOUNDS[bucket - 1] if bucket else 0.0
                high = REQUEST_BOUNDS[bucket] if bucket < len(REQUEST_BOUNDS) else low
                return low + (high - low) * (rank - below) / count
            below += count
        return REQUEST_BOUNDS[-1]


@dataclass(slots=True)
class _Seen:
    """Counters at the last look."""

    requests: int = 0
    errors: int = 0
    failing: int = 0
    finished: int = 0
    latency: Sequence[int] = ()


class Window:
    """One target's last seconds, in slots."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._slot_s = max(LOOK_S, window_s / SLOTS)
        self._slots: deque[tuple[float, Slot]] = deque()
        self._seen: _Seen | None = None

    def look(self, now: float, target: TargetStats, stats: ModelStats | None) -> bool:
        """Take in what was added since the last look. Returns whether the version's breaker refused a request."""
        # Not loaded: what was seen of it stays, for its statistics go on when it is loaded again.
        latency = self._seen.latency if self._seen is not None else ()
        finished = 0 if stats is None else stats.success.count + stats.fail.count
        if stats is not None and (self._seen is None or not latency or finished != self._seen.finished):
            latency = tuple(stats.request.counts)  # most of many versions have done nothing since the last look
        at = _Seen(target.requests, target.errors, target.failures.get("model_failing", 0), finished, latency)
        seen, self._seen = self._seen, at
        while self._slots and self._slots[0][0] <= now - self._window_s:
            self._slots.popleft()
        if seen is None:  # what was counted before this alias was as it is now is no evidence
            return False
        before = seen.latency or latency  # seen for the first time: what it did before is no evidence either
        added = Slot(at.requests - seen.requests, at.errors - seen.errors)
        if latency is not before:
            if any(a < b for a, b in zip(latency, before, strict=True)):
                before = (0,) * len(latency)  # another loaded version, whose statistics began anew
            added.latency = {i: a - b for i, (a, b) in enumerate(zip(latency, before, strict=True)) if a > b}
        if self._slots and now - self._slots[-1][0] < self._slot_s - LOOK_S / 2:
            self._slots[-1][1].add(added)
        else:
            self._slots.append((now, added))
        return at.failing > seen.failing

    def total(self) -> Slot:
        """All slots together."""
        total = Slot()
        for _, slot in self._slots:
            total.add(slot)
        return total

    def totals_without_two(self) -> Iterator[Slot]:
        """All slots together but for two neighbours, for each pair of them."""
        slots = [slot for _, slot in self._slots]
        total = self.total()
        for pair in pairwise(slots):
            rest = Slot(total.requests, total.errors, dict(total.latency))
            for slot in pair:
                rest.take(slot)
            yield rest
        if len(slots) < 2:
            yield Slot()


@dataclass(frozen=True, slots=True)
class Verdict:
    """A change of an alias that ought to be made.

    Attributes:
        version: the one that did badly.
        spec: what the alias is to be.
        detail: why, in numbers, for the event.
    """

    record: AliasRecord
    version: int
    reason: Reason
    spec: AliasSpec
    detail: Mapping[str, Any]


def judge(guard: Guard, lesser: Window, largest: Window) -> tuple[Reason, dict[str, Any]] | None:
    """Whether a lesser target is worse than the largest beyond its guard's bounds; why, and the numbers."""
    mine, base = lesser.total(), largest.total()
    for reason, worse in _TESTS:
        if worse(guard, mine, base) and all(worse(guard, rest, base) for rest in lesser.totals_without_two()):
            return reason, _numbers(guard, mine, base)
    return None


def _fails_more(guard: Guard, mine: Slot, base: Slot) -> bool:
    if mine.requests < guard.min_requests or base.requests < guard.min_requests:
        return False
    return mine.error_rate - base.error_rate > guard.max_error_rate


def _is_slower(guard: Guard, mine: Slot, base: Slot) -> bool:
    if mine.timed < guard.min_requests or base.timed < guard.min_requests:
        return False
    mine_s, base_s = mine.p95_s(), base.p95_s()
    if mine_s is None or base_s is None:
        return False
    return mine_s > guard.max_p95_ratio * base_s and mine_s - base_s > SMALLEST_DIFFERENCE_S


_TESTS: Final[tuple[tuple[Reason, Callable[[Guard, Slot, Slot], bool]], ...]] = (
    ("error_rate", _fails_more),
    ("p95", _is_slower),
)


def _numbers(guard: Guard, mine: Slot, base: Slot) -> dict[str, Any]:
    return {
        "window_s": guard.window_s,
        "requests": mine.requests,
        "errors": mine.errors,
        "error_rate": round(mine.error_rate, 4),
        "p95_ms": _ms(mine),
        "baseline_requests": base.requests,
        "baseline_errors": base.errors,
        "baseline_error_rate": round(base.error_rate, 4),
        "baseline_p95_ms": _ms(base),
        "max_error_rate": guard.max_error_rate,
        "max_p95_ratio": guard.max_p95_ratio,
    }


def _ms(slot: Slot) -> float | None:
    p95 = slot.p95_s()
    return None if p95 is None else round(p95 * 1e3, 3)


class TrafficWatch:
    """Watches the targets of every alias.

    Args:
        router: has the aliases and what was counted of their targets.
        stats: statistics of a version that is loaded; None where it is not.
        now: the wall clock, in UTC, which changes of aliases are dated by.
    """

    def __init__(
        self,
        router: Router,
        stats: Callable[[str, int], ModelStats | None],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._router = router
        self._stats = stats
        self._now = now
        self._watched: dict[tuple[str, str], tuple[int, dict[int, Window]]] = {}

    def p95_s(self, model: str, alias: str, version: int) -> float | None:
        """95th percentile of latency in seconds over the alias' window; None where there were no requests."""
        watched = self._watched.get((model, alias))
        window = None if watched is None else watched[1].get(version)
        return None if window is None else window.total().p95_s()

    def look(self, moment: float) -> list[Verdict]:
        """Read all counters, and judge.

        Args:
            moment: on a monotonic clock, about ``LOOK_S`` after the last one.
        """
        plans = self._router.aliases()
        present = {(plan.model, plan.alias) for plan in plans}
        for key in [key for key in self._watched if key not in present]:
            del self._watched[key]
        verdicts = []
        for plan in plans:
            verdict = self._look_at(plan, moment)
            if verdict is not None:
                verdicts.append(verdict)
        return verdicts

    def _look_at(self, plan: Plan, moment: float) -> Verdict | None:
        record, key = plan.record, (plan.model, plan.alias)
        guard = record.spec.guard
        revision, windows = self._watched.get(key, (-1, {}))
        if revision != record.revision:
            window_s = DEFAULT_WINDOW_S if guard is None else guard.window_s
            windows = {version: Window(window_s) for version in plan.routes}
            self._watched[key] = (record.revision, windows)
        broken = [
            version
            for version, window in windows.items()
            if window.look(moment, plan.routes[version].stats, self._stats(plan.model, version))
        ]
        weights = record.spec.weights
        for version in windows:
            if version == plan.main or not weights[version]:
                continue
            if version in broken:
                return _lowered(plan, version, "breaker_open", _breaker_numbers(windows[version], windows[plan.main]))
            found = None if guard is None else judge(guard, windows[version], windows[plan.main])
            if found is not None:
                return _lowered(plan, version, *found)
        if plan.main in broken:
            return self._undone(plan, windows[plan.main])
        return None

    def _undone(self, plan: Plan, window: Window) -> Verdict | None:
        record = plan.record
        previous = record.previous
        if (
            previous is None
            or record.updated_by == BY
            or previous.weights.get(plan.main, 0) > 0
            or self._now() - record.updated_at > RECENT
        ):
            return None
        detail = {"version": plan.main, "reason": "breaker_open", **_breaker_numbers(window, window)}
        detail["text"] = (
            f"version {plan.main} failed so often that its circuit breaker opened; '{plan.alias}' is again what it was"
        )
        return Verdict(record, plan.main, "breaker_open", previous, detail)


def _breaker_numbers(mine: Window, base: Window) -> dict[str, Any]:
    total, other = mine.total(), base.total()
    return {"requests": total.requests, "errors": total.errors, "baseline_requests": other.requests}


def _lowered(plan: Plan, version: int, reason: Reason, numbers: Mapping[str, Any]) -> Verdict:
    texts = {
        "error_rate": "version {version} failed {errors} of {requests} requests, version {against} "
        "{baseline_errors} of {baseline_requests}; at most {max_error_rate:g} more of all was allowed",
        "p95": "version {version} took {p95_ms:g} ms at the 95th percentile, version {against} {baseline_p95_ms:g} ms; "
        "at most {max_p95_ratio:g} times as long was allowed",
        "breaker_open": "version {version} failed so often that its circuit breaker opened",
    }
    detail: dict[str, Any] = {"version": version, "against": plan.main, "reason": reason, **numbers}
    detail["text"] = texts[reason].format_map(detail)
    return Verdict(plan.record, version, reason, without(plan.record.spec, version), detail)


async def roll_back(verdict: Verdict, catalog: Catalog, router: Router) -> bool:
    """Write a verdict down, and follow it here.

    Returns:
        Whether it was this gateway that did it; others, and people, may have changed the alias first.
    """
    record = verdict.record
    try:
        written = await set_alias(
            catalog,
            record.model,
            record.alias,
            verdict.spec,
            by=BY,
            kind="auto_rolled_back",
            expected_revision=record.revision,
            detail=verdict.detail,
        )
    except ConflictError:
        return False
    except GatewayError as error:
        logger.error("'%s@%s' could not be rolled back: %s", record.model, record.alias, error.message)
        return False
    router.put(written)
    plan = router.plan(record.model, record.alias)
    if plan is not None:
        plan.count_roll_back()
    logger.warning("'%s@%s' was rolled back: %s", record.model, record.alias, verdict.detail["text"])
    return True


async def set_alias(catalog: Catalog, model: str, alias: str, spec: AliasSpec, **how: Any) -> AliasRecord:
    """``Catalog.set_alias``, also for a model of the folder, of which the catalog knows no version."""
    try:
        return await catalog.set_alias(model, alias, spec, **how)
    except ModelNotFoundError:
        return await catalog.set_alias(model, alias, spec, **how, checked=True)


async def watch_traffic(watch: TrafficWatch, catalog: Catalog, router: Router) -> NoReturn:
    """Look once a second, and roll back what does badly. Runs until it is cancelled."""
    clock = asyncio.get_running_loop().time
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            for verdict in watch.look(clock()):
                await roll_back(verdict, catalog, router)
        except Exception:  # a defect here must not end the watch over all other aliases
            logger.exception("watching the traffic failed")
