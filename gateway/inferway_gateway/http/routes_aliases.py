"""The routes of aliases, below ``/api/v1/models/{model}/aliases``: where they point, and what their versions did."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from inferway_contract import models as contract
from inferway_contract.names import DEPLOY_BODY_LIMIT_BYTES

from ..core.catalog import AliasRecord, AliasSpec, Catalog, Guard, Shadow
from ..core.errors import (
    AliasNotFoundError,
    ConflictError,
    InvalidParameterError,
    ModelNotFoundError,
    StoreUnavailableError,
    VersionNotFoundError,
)
from ..core.guard import TrafficWatch
from ..core.registry import Registry
from ..core.routing import Router, TargetStats, check_alias_name, check_spec
from . import key_bodies
from .routes_keys import json_object

ANONYMOUS: Final = "anonymous"
"""Whose name stands in an event, where the gateway asks nobody for a key."""


async def list_aliases(request: Request) -> Response:
    model = request.path_params["model"]
    snapshot = await _catalog(request).snapshot()
    found = [record for record in snapshot.aliases if record.model == model]
    if not found and not any(record.model == model for record in snapshot.versions):
        _registry(request).versions(model)  # raises where the folder does not have it either
    return _json(contract.AliasList(aliases=[alias_body(request.scope["state"], record) for record in found]))


async def get_alias(request: Request) -> Response:
    model, alias = _names(request)
    try:
        record = await _catalog(request).alias(model, alias)
    except AliasNotFoundError:
        _registry(request).versions(model)  # raises where it is the model that does not exist
        raise
    return _json(alias_body(request.scope["state"], record))


async def set_alias(request: Request) -> Response:
    """Point an alias; make it where it is new."""
    model, alias = _names(request)
    body = key_bodies.read(contract.AliasPut, await json_object(request, DEPLOY_BODY_LIMIT_BYTES))
    spec = _spec(body)
    catalog = _catalog(request)
    try:
        check_spec(model, spec)
        record = await catalog.set_alias(
            model, alias, spec, by=caller(request), expected_revision=body.expected_revision
        )
    except VersionNotFoundError:
        check_spec(model, spec, await _versions(request))
        raise
    except ModelNotFoundError:
        # None of the catalog's, so perhaps the folder's, of which the catalog knows nothing.
        check_spec(model, spec, await _versions(request))
        record = await catalog.set_alias(
            model, alias, spec, by=caller(request), expected_revision=body.expected_revision, checked=True
        )
    _router(request).put(record)
    return _json(alias_body(request.scope["state"], record))


async def delete_alias(request: Request) -> Response:
    """Delete an alias; its versions stay."""
    model, alias = _names(request)
    try:
        await _catalog(request).delete_alias(model, alias, by=caller(request))
    except AliasNotFoundError:
        _registry(request).versions(model)
        raise
    _router(request).forget(model, alias)
    return Response(status_code=204)


async def roll_back(request: Request) -> Response:
    """Swap an alias with what it was before; again is back."""
    model, alias = _names(request)
    catalog = _catalog(request)
    try:
        record = await catalog.alias(model, alias)
    except AliasNotFoundError:
        _registry(request).versions(model)
        raise
    previous = record.previous
    if previous is None:
        raise ConflictError(
            f"expected an alias that was changed before, '{alias}' of '{model}' never was anything else"
        )
    how: dict[str, Any] = {"by": caller(request), "kind": "rolled_back", "expected_revision": record.revision}
    try:
        try:
            record = await catalog.set_alias(model, alias, previous, **how)
        except ModelNotFoundError:
            check_spec(model, previous, await _versions(request))
            record = await catalog.set_alias(model, alias, previous, **how, checked=True)
    except VersionNotFoundError:
        raise ConflictError(
            f"expected what '{alias}' was before its last change to be there still, "
            "a version that it named is deleted; point the alias at one that there is"
        ) from None
    _router(request).put(record)
    return _json(alias_body(request.scope["state"], record))


def alias_body(state: Any, record: AliasRecord) -> contract.Alias:
    """An alias as the contract has it, with what this gateway counted of it.

    Args:
        state: the lifespan's.
    """
    router: Router = state["router"]
    watch: TrafficWatch = state["watch"]
    plan = router.plan(record.model, record.alias)
    spec = record.spec
    shown: dict[str, dict[str, Any]] = {}
    versions = {*spec.weights} | ({spec.shadow.version} if spec.shadow is not None else set())
    for version in sorted(versions):
        target = plan.routes.get(version) if plan is not None else None
        stats = target.stats if target is not None else TargetStats()
        p95_s = watch.p95_s(record.model, record.alias, version)
        traffic: dict[str, Any] = {
            "requests": stats.requests,
            "errors": stats.errors,
            "fallbacks": stats.fallbacks,
            "p95_ms": None if p95_s is None else round(p95_s * 1e3, 3),
            "compared": 0,
            "differed": 0,
            "failed": 0,
            "dropped": 0,
            "largest_difference": 0.0,
        }
        if plan is not None and plan.shadow is not None and plan.shadow.version == version:
            copies = plan.shadow_stats
            traffic |= {
                "compared": copies.compared,
                "differed": copies.differing,
                "failed": copies.failed,
                "dropped": copies.dropped,
                "largest_difference": copies.largest_difference,
            }
        shown[str(version)] = traffic
    return contract.Alias.model_validate(
        {
            **_target(spec),
            "model": record.model,
            "alias": record.alias,
            "previous": None if record.previous is None else _target(record.previous),
            "revision": record.revision,
            "updated_at": record.updated_at,
            "updated_by": record.updated_by,
            "traffic": shown,
        }
    )


def caller(request: Request) -> str:
    """Whose name stands in an event that this request makes."""
    return request.scope["principal"].key_id or ANONYMOUS


def _target(spec: AliasSpec) -> dict[str, Any]:
    shadow, guard = spec.shadow, spec.guard
    return {
        "weights": {str(version): weight for version, weight in sorted(spec.weights.items())},
        "sticky": spec.sticky,
        "shadow": None
        if shadow is None
        else {"version": shadow.version, "share": shadow.share, "rtol": shadow.rtol, "atol": shadow.atol},
        "fallback": list(spec.fallback),
        "guard": None
        if guard is None
        else {
            "window_s": guard.window_s,
            "min_requests": guard.min_requests,
            "max_error_rate": guard.max_error_rate,
            "max_p95_ratio": guard.max_p95_ratio,
        },
    }


def _spec(body: contract.AliasPut) -> AliasSpec:
    if (body.version is None) == (body.weights is None):
        raise InvalidParameterError(
            "expected either 'version', which gets all the traffic, or 'weights', got "
            + ("neither" if body.version is None else "both")
        )
    weights = (
        {body.version: 100.0} if body.version is not None else {int(v): w for v, w in (body.weights or {}).items()}
    )
    shadow, guard = body.shadow, body.guard
    return AliasSpec(
        weights=weights,
        sticky=body.sticky,
        shadow=None if shadow is None else Shadow(shadow.version, shadow.share, shadow.rtol, shadow.atol),
        fallback=tuple(body.fallback),
        guard=None
        if guard is None
        else Guard(guard.window_s, guard.min_requests, guard.max_error_rate, guard.max_p95_ratio),
    )


async def _versions(request: Request) -> set[int]:
    """The versions that a model has, loaded or not.

    Raises:
        ModelNotFoundError: there is no such model.
    """
    model = request.path_params["model"]
    registry = _registry(request)
    registry.versions(model)
    versions = {int(entry.version) for entry in registry.index() if entry.name == model and entry.version}
    try:
        snapshot = await _catalog(request).snapshot()
    except StoreUnavailableError:
        return versions
    return versions | {record.version for record in snapshot.versions if record.model == model}


def _names(request: Request) -> tuple[str, str]:
    model, alias = request.path_params["model"], request.path_params["alias"]
    check_alias_name(alias)
    return model, alias


def _catalog(request: Request) -> Catalog:
    catalog: Catalog = request.scope["state"]["catalog"]
    return catalog


def _registry(request: Request) -> Registry:
    registry: Registry = request.scope["state"]["registry"]
    return registry


def _router(request: Request) -> Router:
    router: Router = request.scope["state"]["router"]
    return router


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")
