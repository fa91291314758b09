"""``/v1/embeddings``, ``/v1/rerank`` and ``/v1/classify``."""

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


async def embeddings(request: Request) -> Response:
    body = await read(request.scope, request.receive, contract.EmbeddingsRequest)
    return await _by_encoder(request, body.model, "embeddings")


async def rerank(request: Request) -> Response:
    body = await read(request.scope, request.receive, contract.RerankRequest)
    return await _by_encoder(request, body.model, "a ranking")


async def classify(request: Request) -> Response:
    body = await read(request.scope, request.receive, contract.ClassifyRequest)
    return await _by_encoder(request, body.model, "classes")


async def _by_encoder(request: Request, model: str, what: str) -> Response:
    started = perf_counter()

    async def attempt(served: ServedVersion) -> NoReturn:
        raise InvalidParameterError(f"expected a model that gives {what}, '{served.name}' does not", "model")

    return await answered(request.scope, parse_reference(model), attempt, started=started)
