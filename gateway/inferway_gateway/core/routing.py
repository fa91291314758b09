"""Which version answers a request: names, aliases, weights, stickiness, fallback, shadow. Pure: no I/O, no clock.

A target is what stands in a path: ``churn`` or ``churn@canary``. The router holds one compiled ``Plan`` for each alias,
under the target that names it; the plan of ``stable`` also stands under the bare name. A model without aliases is in
no table, so that for it a request pays for one look-up that finds nothing.

**Shares.** Without stickiness a request takes the next point of an additive recurrence, ``x + phi * 2**64`` modulo
``2**64``, and the target into whose part of the circle it falls. Its points lie as evenly as any: after n requests each
target has had its share but for a few requests (the discrepancy is of order log(n) / n), where random draws would be
off by the square root of n. The steps go on where they were when an alias changes.

**Stickiness.** Every target draws an exponential waiting time with its weight as the rate, from a keyed hash of who
asks, and the shortest wins (weighted rendezvous hashing). So a target's share is its weight, and when weights change a
caller leaves a target only for one whose weight grew more in proportion: whoever was in a canary of 5 % is in it at
10 %, and with two targets nobody moves who need not. With three and more no rule without memory has the fewest moves
for every change; this one moves a few more than that, and never between two targets that changed alike.

**Fallback.** The next version of the chain is asked where the chosen one failed for a reason of its own
(``FALLBACK_CODES``). Not for ``queue_full``, which is load that another version should not get on top of its own, nor
for ``deadline_exceeded``, after which there is no time left.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Final

from .catalog import DEFAULT_ALIAS, AliasRecord, AliasSpec, Guard, Shadow
from .errors import AliasNotFoundError, InvalidParameterError, VersionNotFoundError

ALIAS_PATTERN: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
MAX_TARGETS: Final = 16
"""Versions that an alias may name as targets, and as fallbacks: each is a hash of a sticky request."""
HEADER_PREFIX: Final = "header:"
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
"""A header's name. Source: RFC 9110, section 5.6.2 (``token``)."""
_SUM_TOLERANCE: Final = 1e-6
_MOST_VERSION: Final = 10**18

FALLBACK_CODES: Final = frozenset(
    {
        "model_not_ready", "model_failing", "worker_crashed", "upstream_failed", "model_failed", "run_too_large",
        "memory_exceeded",
    }
)  # fmt: skip
"""Failures after which the next version of the chain is asked. ``model_failed`` and ``run_too_large`` are among them:
the request had passed every check of the signature, so an answer of an older version is better than none. A request of
which the processes of two versions died goes no further."""
FAULT_CODES: Final = FALLBACK_CODES | {"internal", "deadline_exceeded"}
"""Failures that count against a version. A deadline may have been the caller's own and short, but then it is so for
every target alike, and they are only ever compared with each other."""

_CIRCLE: Final = 1 << 64
_MASK: Final = _CIRCLE - 1
_TARGET_STEP: Final = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio."""
_SHADOW_STEP: Final = 0x6A09E667F3BCC909
"""2**64 times the square root of 2, less its whole part: rationally independent of the other step, so that a share of
the requests is a share of each target's."""


def parse_target(target: str) -> tuple[str, str | None]:
    """A target's model and alias; the alias is None where it names none. What has no valid alias is all model."""
    model, separator, alias = target.partition("@")
    if separator and ALIAS_PATTERN.fullmatch(alias):
        return model, alias
    return target, None


def bare_name(target: str) -> str:
    """The model that a target names, which is what keys' patterns are held against."""
    return target.partition("@")[0]


# ---------------------------------------------------------------------------------------------------- what is asked


def check_alias_name(alias: str) -> None:
    """Raises ``InvalidParameterError`` where an alias cannot have that name."""
    if ALIAS_PATTERN.fullmatch(alias) is None:
        raise InvalidParameterError(
            "expected an alias of lower-case letters, digits and '-' that begins with a letter, 63 characters at most, "
            f"got '{alias[:80]}'"
        )


def check_spec(model: str, spec: AliasSpec, versions: Collection[int] | None = None) -> None:
    """Hold what an alias is to be against what it can be.

    Args:
        versions: those that the model has; None leaves that out.
    Raises:
        InvalidParameterError: says which member is wrong and what to write instead.
        VersionNotFoundError: a version that it names does not exist.
    """
    _check_weights(spec.weights)
    _check_sticky(spec.sticky)
    if spec.shadow is not None:
        _check_shadow(spec.shadow, spec.weights)
    _check_fallback(spec.fallback, spec.weights)
    if spec.guard is not None:
        _check_guard(spec.guard)
    if versions is None:
        return
    named = {*spec.weights, *spec.fallback} | ({spec.shadow.version} if spec.shadow is not None else set())
    missing = sorted(named.difference(versions))
    if missing:
        have = ", ".join(map(str, sorted(versions)[-10:])) or "none"
        raise VersionNotFoundError(
            f"'{model}' has no version {missing[0]}, the alias can name {have}; deploy version {missing[0]} first"
        )


def _check_weights(weights: Mapping[int, float]) -> None:
    if not weights:
        raise InvalidParameterError("expected 'weights' to name at least one version, such as {\"3\": 100}")
    if len(weights) > MAX_TARGETS:
        raise InvalidParameterError(f"expected at most {MAX_TARGETS} versions in 'weights', got {len(weights)}")
    for version, weight in weights.items():
        _check_version("weights", version)
        if not math.isfinite(weight) or weight < 0:
            raise InvalidParameterError(
                f"expected the weight of version {version} to be a share in percent from 0 to 100, got {weight:g}"
            )
    total = math.fsum(weights.values())
    if abs(total - 100) > _SUM_TOLERANCE:
        raise InvalidParameterError(
            f"expected 'weights' to sum to 100 percent, got {total:g}: "
            + ("raise" if total < 100 else "lower")
            + f" one of them by {abs(100 - total):g}"
        )


def _check_sticky(sticky: str) -> None:
    if sticky in ("none", "key"):
        return
    name = sticky[len(HEADER_PREFIX) :]
    if not sticky.startswith(HEADER_PREFIX) or _TOKEN.fullmatch(name) is None:
        raise InvalidParameterError(
            "expected 'sticky' to be 'none', 'key' or 'header:NAME' with the name of a request header, such as "
            f"'header:X-User', got '{sticky[:80]}'"
        )
    if name.lower() in ("authorization", "x-api-key", "cookie"):
        raise InvalidParameterError("expected 'sticky' to name no header that holds a secret; 'key' goes by API key")


def _check_shadow(shadow: Shadow, weights: Mapping[int, float]) -> None:
    _check_version("shadow.version", shadow.version)
    if not 0 <= shadow.share <= 1:
        raise InvalidParameterError(
            f"expected 'shadow.share' to be a part of the requests, 0 to 1, got {shadow.share:g}"
        )
    for name, value in (("rtol", shadow.rtol), ("atol", shadow.atol)):
        if not (math.isfinite(value) and value >= 0):
            raise InvalidParameterError(f"expected 'shadow.{name}' to be a number from 0, got {value:g}")
    if weights.get(shadow.version) == 100:
        raise InvalidParameterError(
            f"expected 'shadow' to name another version than {shadow.version}, which answers every request itself"
        )


def _check_fallback(fallback: tuple[int, ...], weights: Mapping[int, float]) -> None:
    if len(fallback) > MAX_TARGETS:
        raise InvalidParameterError(f"expected at most {MAX_TARGETS} versions in 'fallback', got {len(fallback)}")
    for version in fallback:
        _check_version("fallback", version)
        if fallback.count(version) > 1:
            raise InvalidParameterError(f"expected each version once in 'fallback', got {version} twice")
    if set(fallback) & {v for v, w in weights.items() if w > 0} and len([w for w in weights.values() if w > 0]) == 1:
        only = next(v for v, w in weights.items() if w > 0)
        raise InvalidParameterError(
            f"expected 'fallback' to name other versions than {only}, for which it is to stand in"
        )


def _check_guard(guard: Guard) -> None:
    for name, value, least, most in (
        ("window_s", guard.window_s, 2, 86_400),
        ("min_requests", guard.min_requests, 1, 1_000_000),
        ("max_error_rate", guard.max_error_rate, 0, 1),
        ("max_p95_ratio", guard.max_p95_ratio, 1, 1000),
    ):
        if not (math.isfinite(value) and least <= value <= most):
            raise InvalidParameterError(f"expected 'guard.{name}' to be from {least} to {most}, got {value:g}")


def _check_version(where: str, version: int) -> None:
    if not 1 <= version < _MOST_VERSION:
        raise InvalidParameterError(f"expected '{where}' to name versions as whole numbers from 1, got {version}")


# ---------------------------------------------------------------------------------------------------- what is done


@dataclass(slots=True)
class TargetStats:
    """What was counted of one version under one alias, since the gateway began. Lives on through changes of the alias.

    Attributes:
        requests: for which it was chosen.
        failures: how many of them it failed, by contract code; whatever answered in the end.
        fallbacks: how many of them another version answered.
    """

    requests: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    fallbacks: int = 0

    @property
    def errors(self) -> int:
        """Failures that are the version's own fault."""
        return sum(count for code, count in self.failures.items() if code in FAULT_CODES)

    def failed(self, code: str) -> None:
        self.failures[code] = self.failures.get(code, 0) + 1


@dataclass(slots=True)
class ShadowStats:
    """What became of the copies for one alias' shadow.

    Attributes:
        compared: copies whose outputs were compared; differing: of these, how many were not alike.
        failed: copies that the shadow did not answer, or that did not fit its signature.
        dropped: copies that were not run, for others were under way.
        largest_difference: the largest absolute difference of two numbers that was seen.
    """

    compared: int = 0
    differing: int = 0
    failed: int = 0
    dropped: int = 0
    largest_difference: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One target of an alias, as a request gets it. Made once, when the alias changes.

    Attributes:
        version: the one that was chosen.
        fallback: what answers in its place, in order.
    """

    plan: Plan = field(repr=False)
    model: str
    alias: str
    version: int
    fallback: tuple[int, ...]
    stats: TargetStats


class _Steps:
    """A point that goes round a circle of ``2**64`` in steps of irrational length."""

    __slots__ = ("at",)

    def __init__(self, at: int) -> None:
        self.at = at


@dataclass(slots=True)
class _Kept:
    """What an alias keeps when it changes."""

    steps: _Steps
    shadow_steps: _Steps
    targets: dict[int, TargetStats] = field(default_factory=dict)
    shadow: ShadowStats = field(default_factory=ShadowStats)
    rolled_back: int = 0


class Plan:
    """One alias, compiled: ``choose`` says which target a request gets."""

    __slots__ = (
        "_cuts",
        "_kept",
        "_keyed",
        "_order",
        "_shadow_cut",
        "_sole",
        "_steps",
        "_sticky",
        "alias",
        "header",
        "main",
        "model",
        "record",
        "routes",
        "shadow",
    )

    def __init__(self, record: AliasRecord, kept: _Kept) -> None:
        spec = record.spec
        self.record: Final = record
        self.model: Final = record.model
        self.alias: Final = record.alias
        self._kept = kept
        for version in spec.weights:
            kept.targets.setdefault(version, TargetStats())
        for version in [v for v in kept.targets if v not in spec.weights]:
            del kept.targets[version]
        self.routes: Final = {
            version: Route(
                self,
                record.model,
                record.alias,
                version,
                tuple(v for v in spec.fallback if v != version),
                kept.targets[version],
            )
            for version in sorted(spec.weights)
        }
        self.main: Final = min(spec.weights, key=lambda version: (-spec.weights[version], version))
        """The version with the largest weight; of several the lowest."""
        live = {v: w for v, w in sorted(spec.weights.items()) if w > 0}
        self._sole = self.routes[self.main] if len(live) == 1 else None
        self._order = [self.routes[v] for v in live]
        total = math.fsum(live.values())
        ends = [math.fsum(list(live.values())[: i + 1]) / total for i in range(len(live))]
        self._cuts = [min(_MASK, int(end * _CIRCLE)) for end in ends[:-1]]
        self._steps = kept.steps
        self._sticky = spec.sticky != "none"
        self.header: Final = (
            spec.sticky[len(HEADER_PREFIX) :].lower().encode("ascii") if spec.sticky.startswith(HEADER_PREFIX) else None
        )
        self._keyed = [(_salt(record, v), w, self.routes[v]) for v, w in live.items()]
        self.shadow: Final = spec.shadow if spec.shadow is not None and spec.shadow.share > 0 else None
        self._shadow_cut = 0 if self.shadow is None else int(self.shadow.share * _CIRCLE)

    def choose(self, key_id: str, fields: Mapping[bytes, bytes]) -> Route:
        """The target of one request.

        Args:
            key_id: of the key that asks; empty where there is none, whose requests then each go for themselves.
            fields: the request's headers, names in lower case.
        """
        if self._sole is not None:
            return self._sole
        if self._sticky:
            value = None if self.header is None else fields.get(self.header)
            if value:  # an empty one tells nobody from anybody
                return self._of(b"header:" + value)
            if key_id:
                return self._of(b"key:" + key_id.encode())
        steps = self._steps
        steps.at = at = (steps.at + _TARGET_STEP) & _MASK
        return self._order[bisect_right(self._cuts, at)]

    def samples_shadow(self) -> bool:
        """Whether the next request is to be copied to the shadow. Only asked where there is one."""
        steps = self._kept.shadow_steps
        steps.at = (steps.at + _SHADOW_STEP) & _MASK
        return steps.at < self._shadow_cut

    @property
    def shadow_stats(self) -> ShadowStats:
        return self._kept.shadow

    @property
    def rolled_back(self) -> int:
        """How often this gateway took a target of the alias back by itself."""
        return self._kept.rolled_back

    def count_roll_back(self) -> None:
        self._kept.rolled_back += 1

    def _of(self, identity: bytes) -> Route:
        best = self._order[0]
        shortest = math.inf
        for salt, weight, route in self._keyed:
            drawn = int.from_bytes(blake2b(identity, digest_size=8, key=salt).digest(), "little")
            wait = -math.log((drawn + 1) / _CIRCLE) / weight
            if wait < shortest:
                best, shortest = route, wait
        return best


def _salt(record: AliasRecord, version: int) -> bytes:
    return blake2b(f"{record.model}@{record.alias}/{version}".encode(), digest_size=32).digest()


class Router:
    """The plans of all aliases. Belongs to the event loop.

    Args:
        seed: 64 random bits, where an alias' steps begin.
    """

    def __init__(self, seed: Callable[[], int] = lambda: random.getrandbits(64)) -> None:
        self.plans: dict[str, Plan] = {}
        """Target to plan, for the hot path: bare names that have ``stable``, and ``name@alias``."""
        self._records: dict[tuple[str, str], AliasRecord] = {}
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._fresh: dict[tuple[str, str], int] = {}
        """Aliases that were written or deleted here since the last ``update``, with their revision then."""
        self._seed = seed
        self.headers: frozenset[bytes] = frozenset()
        """Headers by which aliases are sticky, in lower case."""

    def resolve(self, target: str, version: int | None, key_id: str, fields: Mapping[bytes, bytes]) -> Route | None:
        """Which version a request gets.

        Args:
            target: of the path: ``churn`` or ``churn@canary``.
            version: of the path, None where it names none.
            key_id, fields: as ``Plan.choose`` takes them.
        Returns:
            None: no alias has a say, and the registry knows which version a model of that name answers with.
        Raises:
            AliasNotFoundError: the target names an alias that does not exist.
            VersionNotFoundError: both an alias and a version are named, and an alias has no versions.
        """
        plan = self._plan(target, version)
        return None if plan is None else plan.choose(key_id, fields)

    def locate(self, target: str, version: int | None) -> tuple[str, int | None]:
        """The model and version that a target stands for, where not one request but the model is asked about: of an
        alias with several targets the one with the largest weight. Raises what ``resolve`` does."""
        plan = self._plan(target, version)
        return (target, version) if plan is None else (plan.model, plan.main)

    def _plan(self, target: str, version: int | None) -> Plan | None:
        if version is None:
            plan = self.plans.get(target)
            if plan is not None:
                return plan
        model, alias = parse_target(target)
        if alias is None:
            return None
        if version is not None:
            raise VersionNotFoundError(
                f"expected an alias or a version, got both '@{alias}' and version {version}; leave one out"
            )
        raise AliasNotFoundError(f"'{model}' has no alias '{alias}'")

    def record(self, model: str, alias: str) -> AliasRecord | None:
        """What an alias is; None where there is none such."""
        return self._records.get((model, alias))

    def plan(self, model: str, alias: str) -> Plan | None:
        return self.plans.get(f"{model}@{alias}")

    def aliases(self, model: str | None = None) -> list[Plan]:
        """The plans of one model's aliases, or of all, by model and alias."""
        return [self.plans[f"{m}@{a}"] for m, a in sorted(self._records) if model is None or m == model]

    def update(self, aliases: Iterable[AliasRecord]) -> None:
        """Take over all aliases, as the catalog has them. Those that are not among them are gone.

        What ``put`` and ``forget`` have done since the last call stays where the catalog was read before it; the change
        raised the catalog's revision, so another call follows.
        """
        found = {(record.model, record.alias): record for record in aliases}
        fresh, self._fresh = self._fresh, {}
        for key in [known for known in self._records if known not in found and known not in fresh]:
            self._drop(*key)
        for key, record in found.items():
            if key not in fresh or record.revision > fresh[key]:
                self._install(record)
        self._look_at_headers()

    def put(self, record: AliasRecord) -> None:
        """Take over one alias that this gateway has just written."""
        key = (record.model, record.alias)
        known = self._records.get(key)
        if known is None or known.revision <= record.revision:
            self._install(record)
            self._fresh[key] = record.revision
            self._look_at_headers()

    def forget(self, model: str, alias: str) -> None:
        """An alias does not exist any more: this gateway has just deleted it."""
        known = self._records.get((model, alias))
        if known is not None:
            self._drop(model, alias)
            self._fresh[model, alias] = known.revision
            self._look_at_headers()

    def _look_at_headers(self) -> None:
        self.headers = frozenset(plan.header for plan in self.plans.values() if plan.header is not None)

    def _install(self, record: AliasRecord) -> None:
        key = (record.model, record.alias)
        if self._records.get(key) == record:
            return
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _Kept(_Steps(self._seed()), _Steps(self._seed()))
        plan = Plan(record, kept)
        self._records[key] = record
        self.plans[f"{record.model}@{record.alias}"] = plan
        if record.alias == DEFAULT_ALIAS:
            self.plans[record.model] = plan

    def _drop(self, model: str, alias: str) -> None:
        self._records.pop((model, alias), None)
        self._kept.pop((model, alias), None)
        self.plans.pop(f"{model}@{alias}", None)
        if alias == DEFAULT_ALIAS:
            self.plans.pop(model, None)


def without(spec: AliasSpec, version: int) -> AliasSpec:
    """An alias with one target at 0 %, whose share the one with the largest weight gets."""
    weights = dict(spec.weights)
    freed = weights[version]
    weights[version] = 0.0
    main = min(weights, key=lambda v: (-weights[v], v))
    weights[main] += freed
    return replace(spec, weights=weights)
