"""Bodies of requests under ``/v1``: tolerant of what is not known, exact about what is wrong.

An unknown member is ignored and an explicit null is as good as absent, for clients send both. What is wrong is told
with its place in OpenAI's way of writing it, such as ``messages[2].content``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope

from ...core.errors import InvalidParameterError, MalformedRequestError
from ..bodies import inflate, read_body
from ..codec import load_json
from ..routing import header_fields

_Body = TypeVar("_Body", bound=BaseModel)
_OFF_LOOP_BYTES: Final = 64 * 1024
"""Longer bodies are parsed on a thread: a megabyte of messages takes milliseconds."""
_SHOWN_CHARACTERS: Final = 64


async def read(scope: Scope, receive: Receive, body: type[_Body]) -> _Body:
    """The request's body. Raises as ``read_members``."""
    return (await read_members(scope, receive, body))[0]


async def read_members(scope: Scope, receive: Receive, body: type[_Body]) -> tuple[_Body, dict[str, Any]]:
    """The request's body, and its members as they came, the unknown ones among them.

    Raises:
        InvalidParameterError: a member is wrong; ``param`` says which one, and no value is told.
        MalformedRequestError: it is no JSON object.
        PayloadTooLargeError, UnsupportedEncodingError, CancelledByCallerError
    """
    fields = header_fields(scope)
    settings = scope["state"]["settings"]
    declared = fields.get(b"content-length")
    limit: int = settings.json_limit_bytes
    raw = await read_body(receive, None if declared is None else int(declared), limit)
    encoding = fields.get(b"content-encoding")
    if encoding is not None:
        raw = await inflate(raw, encoding, limit)
    if len(raw) > _OFF_LOOP_BYTES:
        return await asyncio.to_thread(_parse, bytes(raw), limit, body)
    return _parse(bytes(raw), limit, body)


def _parse(raw: bytes, limit: int, body: type[_Body]) -> tuple[_Body, dict[str, Any]]:
    value = load_json(raw, limit) if raw else {}
    if type(value) is not dict:
        raise MalformedRequestError("expected a JSON object as the body")
    return checked(body, value), value


def checked(body: type[_Body], value: Mapping[str, Any]) -> _Body:
    """A body of the contract from parsed JSON; ``InvalidParameterError`` names the first member that is wrong."""
    try:
        return body.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    except RecursionError:
        raise MalformedRequestError("expected JSON that is not nested as deeply") from None
    param = place(problem["loc"], value)
    message = problem["msg"].removeprefix("Value error, ")
    raise InvalidParameterError(f"{param or 'body'}: {message[:1].lower()}{message[1:]}", param or None)


def place(location: Sequence[int | str], value: Any) -> str:
    """A place in a body, such as ``messages[2].content``.

    Args:
        location: as pydantic tells it, where names of a union's members stand among those of the body.
        value: the body, which tells the two apart.
    """
    text = ""
    last = len(location) - 1
    for index, part in enumerate(location):
        if isinstance(part, int):
            if isinstance(value, list):
                text += f"[{part}]"
                value = value[part] if part < len(value) else None
        elif isinstance(value, Mapping) and (part in value or index == last) and part != "[key]":
            text += f".{part}" if text else part
            value = value.get(part)
    return text[:_SHOWN_CHARACTERS]
