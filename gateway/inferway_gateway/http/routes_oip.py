"""The routes of the Open Inference Protocol v2, and its repository, configuration and statistics extensions."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from .. import __version__
from ..core.backend import IsolatedSession
from ..core.errors import MalformedRequestError, ModelNotReadyError, UnsupportedOperationError, VersionNotFoundError
from ..core.keys import Principal
from ..core.registry import Registry
from ..core.routing import Router
from ..core.served import ServedVersion
from ..core.stats import Duration, ModelStats
from ..core.tensors import TensorSpec
from ..store.repository import describe_config
from .bodies import inflate, read_body
from .codec import OFF_LOOP_JSON_BYTES, load_json
from .problems import NotReadyError

EXTENSIONS: Final = (
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)


def json_response(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


async def live(_: Request) -> Response:
    return json_response({"live": True})


async def ready(request: Request) -> Response:
    if not _registry(request).ready:
        raise NotReadyError(
            "expected a gateway whose models are all ready, this one starts, drains or misses some",
            {"live": True, "ready": False},
        )
    return json_response({"live": True, "ready": True})


async def server_metadata(request: Request) -> Response:
    name = request.scope["state"]["settings"].server_name
    return json_response({"name": name, "version": __version__, "extensions": EXTENSIONS})


async def metrics(request: Request) -> Response:
    sees = _principal(request).sees
    body, content_type = request.scope["state"]["metrics"].render(request.headers.get("accept", ""), sees)
    return Response(body, media_type=content_type)


async def model_names(request: Request) -> Response:
    principal = _principal(request)
    return json_response({"models": [n for n in _registry(request).names() if principal.sees(n)]})


async def model_metadata(request: Request) -> Response:
    served = await _loaded(request)
    signature, profile = served.batcher.signature, served.profile
    return json_response(
        {
            "name": served.name,
            "versions": [str(v) for v in _registry(request).versions(served.name)],
            "platform": served.config.platform,
            "inputs": [_tensor(s) for s in signature.inputs],
            "outputs": [_tensor(s) for s in signature.outputs],
            "properties": {
                "row_exact": "true" if served.batcher.row_exact else "false",
                "row_exactness": profile.row_exactness,
                "batching": "true" if profile.batchable else "false",
                "max_batch_size": str(signature.max_rows),
                "version": str(served.version),
            },
        }
    )


async def model_ready(request: Request) -> Response:
    name = request.path_params["model"]
    try:
        served = _served(request)
    except ModelNotReadyError as error:
        raise NotReadyError(error.message, {"name": name, "ready": False}) from error
    problem = served.problem()
    if problem is not None:
        raise NotReadyError(
            f"Request for unready model: '{served.name}' version {served.version}, {problem}",
            {"name": name, "ready": False},
        )
    return json_response({"name": served.name, "ready": True})


async def model_config(request: Request) -> Response:
    served = await _loaded(request)
    profile = served.profile
    document = describe_config(served.config, served.batcher.signature, served.name)
    document["inferway"] = {
        "version": str(served.version),
        "row_exactness": profile.row_exactness,
        "batching": profile.batchable,
        "isolation": "worker" if isinstance(served.session, IsolatedSession) else "inprocess",
        "inline_max_elements": profile.inline_max_elements,
        "execution_providers": profile.execution_providers,
        "load_seconds": round(profile.load_s, 4),
        "cost": [{"rows": p.rows, "seconds": p.seconds} for p in profile.cost],
        "trial": [
            {"options": t.options, "rows": t.rows, "seconds": t.seconds, "chosen": t.chosen, "note": t.note}
            for t in profile.trial
        ],
        "note": profile.note,
    }
    return json_response(document)


async def model_stats(request: Request) -> Response:
    return json_response({"model_stats": [_stats(_served(request))]})


async def all_stats(request: Request) -> Response:
    principal = _principal(request)
    return json_response({"model_stats": [_stats(s) for s in _registry(request).served() if principal.sees(s.name)]})


async def repository_index(request: Request) -> Response:
    wanted = await _json_object(request)
    only_ready = wanted.get("ready", False)
    if type(only_ready) is not bool:
        raise MalformedRequestError("Invalid value for 'ready': expected a boolean")
    principal = _principal(request)
    return json_response(
        [
            {"name": e.name, "version": e.version, "state": e.state, "reason": e.reason}
            for e in _registry(request).index()
            if principal.sees(e.name) and (not only_ready or e.state == "READY")
        ]
    )


async def repository_load(request: Request) -> Response:
    parameters = _parameters(await _json_object(request))
    files = [key for key in parameters if key.startswith("file:")]
    if files:
        raise UnsupportedOperationError("expected the model's files in the repository, not in the request")
    unknown = sorted(parameters.keys() - {"config"})
    if unknown:
        raise MalformedRequestError(f"expected 'config' as the only load parameter, got '{unknown[0][:64]}'")
    config = None
    if "config" in parameters:
        text = parameters["config"]
        if type(text) is not str:
            raise MalformedRequestError("expected 'config' to be a string that holds a model configuration in JSON")
        config = load_json(text.encode("utf-8", "surrogatepass"), request.scope["state"]["settings"].json_limit_bytes)
        if type(config) is not dict:
            raise MalformedRequestError("expected 'config' to hold a JSON object")
    name = request.path_params["model"]
    await _registry(request).load(name, config)
    return json_response({"name": name, "load": True})


async def repository_unload(request: Request) -> Response:
    parameters = _parameters(await _json_object(request))
    dependents = parameters.get("unload_dependents", False)
    if type(dependents) is not bool:
        raise MalformedRequestError("Invalid value for 'unload_dependents': expected a boolean")
    name = request.path_params["model"]
    await _registry(request).unload(name)
    return json_response({"name": name, "unload": True})


async def named_repository(_: Request) -> Response:
    raise UnsupportedOperationError("'repository_name' specification is not supported: this gateway has one repository")


def _registry(request: Request) -> Registry:
    registry: Registry = request.scope["state"]["registry"]
    return registry


def _principal(request: Request) -> Principal:
    principal: Principal = request.scope["principal"]
    return principal


def _served(request: Request) -> ServedVersion:
    """The version that the path names, by alias or number."""
    return _registry(request).get(*_named(request))


async def _loaded(request: Request) -> ServedVersion:
    """The same, which is loaded if need be: who asks what a model takes is about to call it."""
    return await _registry(request).acquire(*_named(request))


def _named(request: Request) -> tuple[str, int | None]:
    router: Router = request.scope["state"]["router"]
    return router.locate(request.path_params["model"], parse_version(request.path_params.get("version")))


def parse_version(text: str | None) -> int | None:
    """The version of a path; ``VersionNotFoundError`` where it is no number that a version could have."""
    if text is None:
        return None
    if text.isascii() and text.isdigit() and len(text) <= 19:
        return int(text)
    raise VersionNotFoundError(f"expected a version as a whole number, got '{text[:40]}'")


async def _json_object(request: Request) -> dict[str, Any]:
    """The request's JSON object; an empty body is an empty one."""
    settings = request.scope["state"]["settings"]
    length = request.headers.get("content-length")
    body = await read_body(request.receive, None if length is None else int(length), settings.json_limit_bytes)
    encoding = request.headers.get("content-encoding")
    if encoding is not None:
        body = await inflate(body, encoding.encode("latin-1"), settings.json_limit_bytes)
    if not len(body):
        return {}
    if len(body) > OFF_LOOP_JSON_BYTES:
        value = await asyncio.to_thread(load_json, body, settings.json_limit_bytes)
    else:
        value = load_json(body, settings.json_limit_bytes)
    if type(value) is not dict:
        raise MalformedRequestError("expected a JSON object or an empty body")
    return value


def _parameters(body: dict[str, Any]) -> dict[str, Any]:
    parameters = body.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict:
        raise MalformedRequestError("expected 'parameters' to be an object")
    return parameters


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    tensor: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}
    if spec.optional:
        tensor["optional"] = True
    return tensor


def _stats(served: ServedVersion) -> dict[str, Any]:
    stats: ModelStats = served.stats
    return {
        "name": served.name,
        "version": str(served.version),
        "last_inference": stats.last_inference_ms,
        "inference_count": stats.inference_count,
        "execution_count": stats.execution_count,
        "inference_stats": {
            "success": _duration(stats.success),
            "fail": _duration(stats.fail),
            "queue": _duration(stats.queue),
            "compute_input": _duration(stats.compute_input),
            "compute_infer": _duration(stats.compute_infer),
            "compute_output": _duration(stats.compute_output),
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(batch.compute_input),
                "compute_infer": _duration(batch.compute_infer),
                "compute_output": _duration(batch.compute_output),
            }
            for rows, batch in sorted(stats.batches.items())
        ],
        "memory_usage": [],
    }


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}
