"""The routes of keys, below ``/api/v1/keys``. What they do is in ``KeyService``; who may is bound to the routes."""

from __future__ import annotations

import re
from typing import Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from inferway_contract import models as contract
from inferway_contract.names import IDEMPOTENCY_KEY, KEY_LIST_DEFAULT_LIMIT, KEY_LIST_MAX_LIMIT

from ..core.errors import InvalidParameterError, KeyNotFoundError, MalformedRequestError
from ..core.keys import KeyService, Principal
from . import key_bodies
from .bodies import inflate, read_body
from .codec import load_json

BODY_LIMIT_BYTES: Final = 64 * 1024
"""More than the longest body that is valid here."""
_LIMIT: Final = re.compile(r"[0-9]{1,3}")


async def create_key(request: Request) -> Response:
    """Make a key; the answer is the only place that ever shows it."""
    body = key_bodies.read(contract.KeyCreate, await json_object(request))
    new = await _keys(request).create(
        name=body.name,
        scopes=body.scopes,
        models=body.models,
        environment=body.environment,
        expires_in_s=key_bodies.lifetime(body),
        created_by=_caller(request),
        idempotency_key=request.headers.get(IDEMPOTENCY_KEY),
    )
    return _json(key_bodies.created(new), 201)


async def list_keys(request: Request) -> Response:
    limit = request.query_params.get("limit", str(KEY_LIST_DEFAULT_LIMIT))
    if not _LIMIT.fullmatch(limit) or not 1 <= int(limit) <= KEY_LIST_MAX_LIMIT:
        raise InvalidParameterError(f"expected 'limit' to be a whole number from 1 to {KEY_LIST_MAX_LIMIT}")
    records, cursor = await _keys(request).page(limit=int(limit), cursor=request.query_params.get("cursor"))
    return _json(contract.KeyList(data=[key_bodies.record(record) for record in records], next_cursor=cursor))


async def get_self(request: Request) -> Response:
    caller = _caller(request)
    if caller is None:
        raise KeyNotFoundError("expected a key to ask about: the gateway runs without authentication")
    return _json(key_bodies.record(await _keys(request).get(caller)))


async def get_key(request: Request) -> Response:
    return _json(key_bodies.record(await _keys(request).get(request.path_params["key_id"])))


async def revoke_key(request: Request) -> Response:
    """End a key at once. Again is as good as once."""
    record = await _keys(request).revoke(request.path_params["key_id"], by=_caller(request))
    return _json(key_bodies.record(record))


async def rotate_key(request: Request) -> Response:
    """Put a new key in a key's place; the answer is the only place that ever shows it."""
    body = key_bodies.read(contract.KeyRotate, await json_object(request))
    new = await _keys(request).rotate(request.path_params["key_id"], overlap_s=body.overlap_s, by=_caller(request))
    return _json(key_bodies.rotated(new), 201)


def _keys(request: Request) -> KeyService:
    keys: KeyService = request.scope["state"]["keys"]
    return keys


def _caller(request: Request) -> str | None:
    """The id of the key that asks; None without authentication."""
    principal: Principal = request.scope["principal"]
    return principal.key_id or None


async def json_object(request: Request, limit_bytes: int = BODY_LIMIT_BYTES) -> dict[str, Any]:
    """The request's JSON object; an empty body is an empty one."""
    length = request.headers.get("content-length")
    body = await read_body(request.receive, None if length is None else int(length), limit_bytes)
    encoding = request.headers.get("content-encoding")
    if encoding is not None:
        body = await inflate(body, encoding.encode("latin-1"), limit_bytes)
    value = load_json(body, limit_bytes) if len(body) else {}
    if type(value) is not dict:
        raise MalformedRequestError("expected a JSON object as the body")
    return value


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")
