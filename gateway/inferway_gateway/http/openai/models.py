"""``/v1/models``: the names that requests may have as their ``model``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from inferway_contract import models as contract

from ...core.catalog import DEFAULT_ALIAS
from ...core.errors import GatewayError, ModelNotFoundError
from ...core.keys import Principal
from ...core.registry import Registry
from ...core.routing import Router, bare_name
from ...core.served import ServedVersion
from .targets import Reference, check_adapter, parse_reference, unknown

OWNER: Final = "inferway"


async def list_models(request: Request) -> Response:
    """Every model that the key sees, its adapters, and its aliases.

    The alias that the bare name stands for anyway is left out: whoever has one model is to find one name, and programs
    that offer what is listed here would show each model twice. It can be asked for all the same.
    """
    listed = contract.OpenAIModelList(data=list(_names(request.scope["state"], request.scope["principal"])))
    return Response(listed.model_dump_json(), media_type="application/json")


async def get_model(request: Request) -> Response:
    """One of these names, or a version of a model by its number."""
    state = request.scope["state"]
    principal: Principal = request.scope["principal"]
    reference = parse_reference(request.path_params["id"])
    if not principal.sees(bare_name(reference.target)):
        raise unknown(reference)
    router: Router = state["router"]
    registry: Registry = state["registry"]
    name, version = router.locate(reference.target, reference.version)
    try:
        if version is None:
            registry.versions(name)
        else:
            registry.state(name, version)
    except ModelNotFoundError:
        raise unknown(reference) from None
    served = _served(registry, name, version)
    check_adapter(reference, _adapters(served))
    return Response(_described(state, reference, served).model_dump_json(), media_type="application/json")


def _names(state: Any, principal: Principal) -> Iterator[contract.OpenAIModel]:
    router: Router = state["router"]
    registry: Registry = state["registry"]
    for name in registry.names():
        if not principal.sees(name):
            continue
        aliases = (plan.alias for plan in router.aliases(name) if plan.alias != DEFAULT_ALIAS)
        for target in (name, *(f"{name}@{alias}" for alias in aliases)):
            model, version = router.locate(target, None)
            served = _served(registry, model, version)
            yield _described(state, Reference(target, target), served)
            for adapter in _adapters(served):
                yield _described(state, Reference(f"{target}:{adapter}", target, None, adapter), served)


def _served(registry: Registry, name: str, version: int | None) -> ServedVersion | None:
    try:
        return registry.get(name, version)
    except GatewayError:
        return None  # it is not loaded, and exists all the same


def _adapters(served: ServedVersion | None) -> tuple[str, ...]:
    return () if served is None else tuple(getattr(served.text, "adapters", ()))


def _described(state: Any, reference: Reference, served: ServedVersion | None) -> contract.OpenAIModel:
    text = None if served is None else served.text
    return contract.OpenAIModel(
        id=reference.text,
        created=state["started_at"],
        owned_by=OWNER,
        task="generate" if hasattr(text, "generate") else getattr(text, "task", None),
        max_model_len=getattr(text, "context_length", None),
        parent=reference.target if reference.adapter is not None else None,
    )
