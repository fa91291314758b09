"""``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

from time import perf_counter
from typing import NoReturn

from starlette.requests import Request
from starlette.responses import Response

from inferway_contract import models as contract

from ...core.errors import InvalidParameterError
from ...core.served import ServedVersion
from .reading import read
from .targets import answered, parse_reference


async def chat_completions(request: Request) -> Response:
    body = await read(request.scope, request.receive, contract.ChatCompletionRequest)
    return await _by_generator(request, body.model)


async def completions(request: Request) -> Response:
    body = await read(request.scope, request.receive, contract.CompletionRequest)
    return await _by_generator(request, body.model)


async def _by_generator(request: Request, model: str) -> Response:
    started = perf_counter()

    async def attempt(served: ServedVersion) -> NoReturn:
        raise InvalidParameterError(f"expected a model that generates text, '{served.name}' does not", "model")

    return await answered(request.scope, parse_reference(model), attempt, started=started)
