"""``/v1/embeddings``, ``/v1/rerank`` and ``/v1/classify``."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, Final, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from inferway_contract import models as contract

from ...core.batcher import Asker
from ...core.encoding import Call, Encoded, Text, TextEncoder, string_encoder, string_spec
from ...core.errors import InvalidParameterError
from ...core.generation import Ranking
from ...core.served import ServedVersion
from ..callers import while_there
from ..infer import origin_of
from ..routing import header_fields
from .reading import read
from .targets import answered, check_adapter, copied, granted_s, parse_reference
from .tracing import Span, code_of

_TEXT_BYTES: Final = 8
"""What a character or a token of a text is taken to keep in memory."""
_Result = TypeVar("_Result", Encoded, Ranking)
_OFF_LOOP_NUMBERS: Final = 16_384
"""Answers of more numbers are written on a thread; so many take about a millisecond as JSON."""


async def embeddings(request: Request) -> Response:
    started = perf_counter()
    body = await read(request.scope, request.receive, contract.EmbeddingsRequest)
    inputs = _inputs(body.input)

    def work(encoder: TextEncoder, call: Call) -> Coroutine[Any, Any, Encoded]:
        return encoder.embed(
            inputs, dimensions=body.dimensions, kind=body.input_type, call=call, param=_name(body.input)
        )

    span = Span("embeddings", body, header_fields(request.scope))
    try:
        served, encoded = await _by_encoder(request, body.model, "embeddings", work, inputs, started)
    except BaseException as error:
        span.end(code_of(error))
        raise
    span.end(None, _usage(encoded.tokens), version=served.version, model=served.name)
    packed = body.encoding_format == "base64"

    def write() -> bytes:
        rows = np.ascontiguousarray(encoded.values, "<f4")
        vectors = (base64.b64encode(row).decode() for row in rows) if packed else iter(rows)
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        return _json(object="list", data=data, model=body.model, usage=_usage(encoded.tokens))

    return await _answer(write, encoded.values.size)


async def rerank(request: Request) -> Response:
    started = perf_counter()
    body = await read(request.scope, request.receive, contract.RerankRequest)
    documents = [d if isinstance(d, str) else d.text for d in body.documents]

    def work(encoder: TextEncoder, call: Call) -> Coroutine[Any, Any, Ranking]:
        return encoder.rerank(body.query, documents, call=call)

    _, ranking = await _by_encoder(request, body.model, "a ranking", work, (body.query, *documents), started)
    # By falling score, and where two are equal as they came.
    order = sorted(range(len(documents)), key=lambda index: -ranking.scores[index])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": ranking.scores[i]} for i in order]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": documents[result["index"]]}

    def write() -> bytes:
        return _json(
            id=_id(request),
            object="list",
            model=body.model,
            method=ranking.method,
            results=results,
            usage=_usage(ranking.tokens),
        )

    returned = sum(map(len, documents)) if body.return_documents else 0
    return await _answer(write, len(results) + returned // 16)


async def classify(request: Request) -> Response:
    started = perf_counter()
    body = await read(request.scope, request.receive, contract.ClassifyRequest)
    inputs = _inputs(body.input)
    labels: tuple[str, ...] = ()

    def work(encoder: TextEncoder, call: Call) -> Coroutine[Any, Any, Encoded]:
        nonlocal labels
        labels = encoder.spec.labels
        return encoder.classify(inputs, activation=body.activation, call=call, param=_name(body.input))

    _, encoded = await _by_encoder(request, body.model, "classes", work, inputs, started)

    def write() -> bytes:
        order = np.argsort(-encoded.values, axis=1, kind="stable")[:, : body.top_k]
        data = []
        for index, (row, best) in enumerate(zip(encoded.values.tolist(), order.tolist(), strict=True)):
            scores = [{"label": labels[i], "score": row[i]} for i in best]
            data.append({"object": "classification", "index": index, **scores[0], "scores": scores})
        return _json(id=_id(request), object="list", model=body.model, data=data, usage=_usage(encoded.tokens))

    return await _answer(write, encoded.values.size)


async def _by_encoder(
    request: Request,
    model: str,
    what: str,
    work: Callable[[TextEncoder, Call], Coroutine[Any, Any, _Result]],
    texts: Sequence[Text],
    started: float,
) -> tuple[ServedVersion, _Result]:
    """What an encoder says, and which one it was.

    Args:
        texts: all that the request is about.
    """
    scope = request.scope
    reference = parse_reference(model)
    fields = header_fields(scope)
    told = Call(None, origin_of(scope, fields), Asker(scope["principal"].key_id, fields))

    def able(served: ServedVersion) -> TextEncoder:
        encoder = encoder_of(served)
        if encoder is None:
            raise InvalidParameterError(f"expected a model that gives {what}, '{served.name}' does not", "model")
        return encoder

    async def again(served: ServedVersion, deadline: float) -> tuple[Sequence[str], Sequence[NDArray[Any]]]:
        return ("FP32",), (_numbers(await work(able(served), replace(told, deadline=deadline))),)

    async def attempt(served: ServedVersion) -> tuple[ServedVersion, _Result]:
        encoder = able(served)
        check_adapter(reference, ())
        left = granted_s(scope, started)
        deadline = None if left == math.inf else asyncio.get_running_loop().time() + left
        result = await while_there(scope, request.receive, work(encoder, replace(told, deadline=deadline)))
        served.stats.finished(perf_counter() - started, None)
        return served, result

    served, result = await answered(scope, reference, attempt, started=started)
    copied(scope, served, again, _numbers(result), _TEXT_BYTES * sum(map(len, texts)))
    return served, result


def _numbers(result: Encoded | Ranking) -> NDArray[np.float32]:
    """What an encoder's answer is made of, for comparison."""
    return np.asarray(result.values if isinstance(result, Encoded) else result.scores, np.float32)


def encoder_of(served: ServedVersion) -> TextEncoder | None:
    """The text encoder that a model version is; None where it is none."""
    if isinstance(served.text, TextEncoder):
        if served.text.vocabulary_size is not None or string_spec(served.batcher.signature) == served.text.spec:
            return served.text
        served.text = None  # a remote model became another one
    if served.text is None:
        served.text = string_encoder(served.batcher)
        return served.text
    return None


def _inputs(given: Any) -> Sequence[Text]:
    """One text, several, token ids or lists of those, as the contract took them, as one sequence."""
    several = isinstance(given, list) and not isinstance(given[0], int)
    inputs: Sequence[Text] = given if several else [given]
    return inputs


def _name(given: Any) -> Callable[[int], str]:
    if isinstance(given, list) and not isinstance(given[0], int):
        return lambda index: f"input[{index}]"
    return lambda _: "input"


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _id(request: Request) -> str:
    identity: bytes = request.scope["request_id"]
    return identity.decode()


def _json(**members: Any) -> bytes:
    return orjson.dumps(members, option=orjson.OPT_SERIALIZE_NUMPY)


async def _answer(write: Callable[[], bytes], numbers: int) -> Response:
    content = await asyncio.to_thread(write) if numbers > _OFF_LOOP_NUMBERS else write()
    return Response(content, media_type="application/json")
