"""What a body's ``model`` means: a model, an alias or a version, perhaps an adapter, and who answers for it.

Aliases share their traffic and have their fallbacks here as they do for tensors (``http/infer.py``): the next version
is asked where the chosen one failed by its own fault, as long as nothing of an answer was sent.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, TypeVar

from numpy.typing import NDArray
from starlette.types import Scope

from ...core.errors import (
    CancelledByCallerError,
    DeadlineExceededError,
    GatewayError,
    InvalidParameterError,
    MalformedRequestError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotFoundError,
)
from ...core.keys import Principal
from ...core.registry import Registry
from ...core.routing import FALLBACK_CODES, Route, Router, bare_name
from ...core.served import ServedVersion
from ...core.shadow import Ask, Shadows
from ..routing import header_fields

_Answer = TypeVar("_Answer")
_VERSIONS: Final = "/versions/"
_HURRIED_LOAD_S: Final = 2.0
"""How long a request waits for a version to be loaded, where its alias has fallbacks."""
_ROUTE: Final = "inferway.route"
"""Where the scope keeps which of an alias' targets a request got."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What stands as ``model`` in a body.

    Attributes:
        text: as it was written.
        target: a name, or ``NAME@ALIAS``.
        version: where one is named.
        adapter: after a colon.
    """

    text: str
    target: str
    version: int | None = None
    adapter: str | None = None


def parse_reference(text: str) -> Reference:
    """Take ``NAME[@ALIAS][/versions/N][:ADAPTER]`` apart. What is none of these is a name that no model has."""
    head, colon, adapter = text.partition(":")
    target, separator, number = head.partition(_VERSIONS)
    version = int(number) if separator and number.isascii() and number.isdigit() and len(number) <= 10 else None
    return Reference(text, head if version is None else target, version, adapter if colon else None)


def unknown(reference: Reference) -> ModelNotFoundError:
    """For a model that there is not, and in the same words for one that the key may not see."""
    return ModelNotFoundError(
        f"there is no model '{reference.text[:160]}'; GET /v1/models lists those that this key may use"
    )


def check_adapter(reference: Reference, adapters: Collection[str]) -> None:
    """Raises ``ModelNotFoundError`` where the adapter that is asked for is none of a model's own."""
    if reference.adapter is not None and reference.adapter not in adapters:
        there = f"it has {', '.join(sorted(adapters))}" if adapters else "it has none"
        raise ModelNotFoundError(f"'{reference.target[:160]}' has no adapter '{reference.adapter[:160]}', {there}")


def granted_s(scope: Scope, started: float) -> float:
    """Seconds that the caller still grants; infinite where it says nothing.

    Raises:
        InvalidParameterError: ``Inferway-Timeout-Ms`` is no number.
        DeadlineExceededError: the time has passed.
    """
    value = header_fields(scope).get(b"inferway-timeout-ms")
    if value is None:
        return math.inf
    if not (value.isdigit() and len(value) <= 12):
        raise InvalidParameterError(
            f"expected Inferway-Timeout-Ms as a whole number of milliseconds, got '{value[:40].decode('latin-1')}'"
        )
    left = int(value) / 1e3 - (perf_counter() - started)
    if left <= 0:
        raise DeadlineExceededError("the time granted by Inferway-Timeout-Ms passed before the run")
    return left


async def answered(
    scope: Scope,
    reference: Reference,
    attempt: Callable[[ServedVersion], Awaitable[_Answer]],
    *,
    started: float,
) -> _Answer:
    """Have a model version do something for a request, and its alias' fallbacks where that one cannot.

    Args:
        attempt: comes back when the answer is certain to be one: as a whole, or with its first piece. Then no other
            version is asked any more. It is called once for each version that is tried.
        started: when the request came, on ``perf_counter``.
    Returns:
        What ``attempt`` gave. The version that did is in the response's headers, and what failed is counted.
    Raises:
        ModelNotFoundError, AliasNotFoundError, VersionNotFoundError: there is none such, or none that the key may see.
        GatewayError: of the version that was chosen.
    """
    state = scope["state"]
    principal: Principal = scope["principal"]
    router: Router = state["router"]
    registry: Registry = state["registry"]
    if not principal.sees(bare_name(reference.target)):
        raise unknown(reference)
    route = router.resolve(reference.target, reference.version, principal.key_id, header_fields(scope))
    if route is None:
        try:
            served = await _loaded(scope, registry, reference.target, reference.version, started)
        except ModelNotFoundError:
            raise unknown(reference) from None
        try:
            answer = await attempt(served)
        except GatewayError as error:
            served.stats.finished(perf_counter() - started, error.code)
            name_version(scope, served)
            raise
        name_version(scope, served)
        return answer
    return await _by_alias(scope, registry, route, attempt, started)


async def _by_alias(
    scope: Scope,
    registry: Registry,
    route: Route,
    attempt: Callable[[ServedVersion], Awaitable[_Answer]],
    started: float,
) -> _Answer:
    scope[_ROUTE] = route
    stats = route.stats
    stats.requests += 1
    failure: GatewayError | None = None
    chosen: ServedVersion | None = None
    crashes = 0
    since = started
    chain = (route.version, *route.fallback)
    for version in chain:
        served: ServedVersion | None = None
        try:
            hurry = _HURRIED_LOAD_S if version != chain[-1] else math.inf
            served = await _target(scope, registry, route, version, started, hurry)
            answer = await attempt(served)
        except GatewayError as error:
            now = perf_counter()
            if served is not None and not (failure is not None and isinstance(error, MalformedRequestError)):
                served.stats.finished(now - since, error.code)
            if failure is None:
                failure, chosen = error, served
                stats.failed(error.code)
                if error.code not in FALLBACK_CODES:
                    break
            elif isinstance(error, CancelledByCallerError):
                raise
            crashes += error.code == "worker_crashed"
            if crashes > 1 or error.code == "deadline_exceeded":
                break
            since = now
        else:
            name_version(scope, served)
            if failure is not None:
                stats.fallbacks += 1
                if served.version != route.version:
                    scope["response_headers"] = (
                        *scope["response_headers"],
                        (b"inferway-fallback", b"%d" % route.version),
                    )
            return answer
    assert failure is not None  # the loop has run at least once
    if chosen is not None:
        name_version(scope, chosen)
    raise failure


def failed_late(scope: Scope, served: ServedVersion, code: str) -> None:
    """Count a failure after an answer began, which no fallback can take over any more, against the alias' target."""
    route: Route | None = scope.get(_ROUTE)
    if route is not None and route.version == served.version:
        route.stats.failed(code)


def copied(scope: Scope, served: ServedVersion, ask: Ask, given: NDArray[Any], nbytes: int) -> None:
    """Have the alias' shadow asked the same, where it has one and it is the sample's turn.

    Args:
        served: the version that answered.
        ask: puts the request to the shadow's version.
        given: FP32, what was answered.
        nbytes: of the request.
    """
    route: Route | None = scope.get(_ROUTE)
    if route is not None and route.plan.shadow is not None:
        shadows: Shadows = scope["state"]["shadows"]
        shadows.offer_asked(route.plan, served.version, ask, [given], nbytes)


def name_version(scope: Scope, served: ServedVersion) -> None:
    """Say in the answer which version it is of."""
    scope["response_headers"] = (
        *scope["response_headers"],
        (b"inferway-model-version", b"%d" % served.version),
    )


async def _target(
    scope: Scope, registry: Registry, route: Route, version: int, started: float, hurry: float
) -> ServedVersion:
    """A version that an alias names, loaded; that it is gone is not the caller's error."""
    try:
        return await _loaded(scope, registry, route.model, version, started, hurry)
    except NotFoundError:
        raise ModelNotReadyError(
            f"Request for unready model: '{route.model}@{route.alias}' names version {version}, which is not here"
        ) from None


async def _loaded(
    scope: Scope, registry: Registry, name: str, version: int | None, started: float, hurry: float = math.inf
) -> ServedVersion:
    """A model version; one that is not in memory is loaded, within the caller's time and ``hurry`` seconds."""
    try:
        return registry.get(name, version)
    except ModelNotReadyError:
        left = granted_s(scope, started)
        wait = min(left, hurry)
        deadline = None if wait == math.inf else asyncio.get_running_loop().time() + wait
        try:
            return await registry.acquire(name, version, deadline=deadline)
        except DeadlineExceededError:
            if left <= hurry:
                raise
            raise ModelNotReadyError(
                f"Request for unready model: '{name}' version {version} was not loaded within {hurry:g} s"
            ) from None
