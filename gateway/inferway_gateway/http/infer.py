"""The inference route: bytes in, one call of the core, bytes out.

Everything on this path is counted in microseconds, since a small model runs in six of them: headers are read once, no
object is built that is not needed, and a run that is short enough happens right here on the event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from time import perf_counter
from typing import Final

from starlette.types import Receive, Scope, Send

from ..core.batcher import Answer, Asker, InferenceRequest
from ..core.errors import (
    CancelledByCallerError,
    DeadlineExceededError,
    GatewayError,
    InvalidParameterError,
    MalformedRequestError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotFoundError,
    ShuttingDownError,
)
from ..core.execution import Executor
from ..core.keys import Principal
from ..core.registry import Registry
from ..core.routing import FALLBACK_CODES, Plan, Route, Router, bare_name
from ..core.served import ServedVersion
from .bodies import Body, accepted_encoding, deflate, inflate, read_body
from .codec import DecodedRequest, SignatureCodec
from .routing import Fields, header_fields

DISCONNECT_EXTENSION: Final = "inferway.disconnect"
"""Name of the ASGI extension by which our own server tells that a caller went away: a callable that takes a callback
and returns the one that takes it back. Other servers tell it through ``receive``."""

_JOIN_BELOW_BYTES: Final = 64 * 1024
_AT_ONCE_BYTES: Final = 32 * 1024
"""Bodies up to this size are read, run and answered in one go; reading longer ones takes longer than a run may."""
_SHORT_MS: Final = tuple(b"%.3f" % (us / 1e3) for us in range(4096))
"""Durations of up to 4 ms as ``Server-Timing`` writes them, by microsecond. Writing a float is five times as dear."""
_JSON: Final = (b"content-type", b"application/json")
_BINARY: Final = (b"content-type", b"application/octet-stream")
_MODEL_VERSION: Final = b"inferway-model-version"
_HURRIED_LOAD_S: Final = 2.0
"""How long a request waits for a version to be loaded, where its alias has fallbacks; the load goes on without it."""
_ROUTE: Final = "inferway.route"
_BEGUN: Final = "inferway.begun"
"""A request whose run goes on already, with the version that runs it."""
"""Where the scope keeps which of an alias' targets a request got, from the short way to the long one."""


async def infer(
    scope: Scope, receive: Receive, send: Send, *, name: str, version: int | None, principal: Principal, started: float
) -> int:
    """Answer one inference request.

    Args:
        name, version: from the path.
        principal: who asks; already allowed to infer.
        started: when the request came, on ``perf_counter``.
    Returns:
        The number of bytes of the answer's body.
    Raises:
        GatewayError: nothing was sent yet. What the model version counts is counted.
    """
    state = scope["state"]
    router: Router = state["router"]
    if name in router.plans or "@" in name:
        if not principal.sees(bare_name(name)):
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        route: Route | None = scope.get(_ROUTE)
        if route is None:
            route = router.resolve(name, version, principal.key_id, header_fields(scope))
        if route is not None:
            return await _infer_by_alias(scope, receive, send, route, started)
    elif not principal.sees(name):
        raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
    served: ServedVersion
    try:
        served = state["registry"].get(name, version)
    except ModelNotReadyError:
        served = await _loaded(scope, name, version, started)
    try:
        return await _infer(scope, receive, send, served, version, started, started, None)
    except GatewayError as error:
        served.stats.finished(perf_counter() - started, error.code)
        _name_version(scope, served)
        raise


def infer_now(
    scope: Scope, body: Body, *, name: str, version: int | None, principal: Principal, started: float
) -> tuple[list[tuple[bytes, bytes]], bytes] | None:
    """``infer`` for a request that is here as a whole and whose run is short enough to happen on the event loop.

    Without coroutines, which half of the requests' own steps were. What is out of the ordinary takes the other way.

    Returns:
        Headers and body of the answer; None where ``infer`` has to be asked. Then nothing has been done, or a run was
        begun whose answer ``infer`` waits for.
    Raises:
        GatewayError: nothing is counted yet, ``infer`` would raise the same.
    """
    fields = header_fields(scope)
    if b"accept-encoding" in fields or b"content-encoding" in fields:
        return None
    state = scope["state"]
    plan: Plan | None = state["router"].plans.get(name)
    if plan is None or version is not None:
        if not principal.sees(name):
            return None
        route = None
        served: ServedVersion = state["registry"].get(name, version)
    else:
        if not principal.sees(plan.model):
            return None
        # What was drawn counts, whichever way the request goes on: else each version's share would depend on how.
        route = scope[_ROUTE] = plan.choose(principal.key_id, fields)
        served = state["registry"].get(route.model, route.version)
    codec: SignatureCodec | None = served.wire
    batcher = served.batcher
    if codec is None or not batcher.inline or len(body) > _AT_ONCE_BYTES:
        return None
    head = fields.get(b"inference-header-content-length")
    request = codec.decode(body, None if head is None else _header_length(head), state["settings"].json_limit_bytes)
    request.rows = codec.signature.check(request.inputs)
    timeout = fields.get(b"inferway-timeout-ms")
    if timeout is not None:
        request.deadline = asyncio.get_running_loop().time() + _timeout_s(timeout)
    parsed = perf_counter()
    answer = batcher.run_inline(request)
    if answer is None:
        if request.begun is not None:
            scope[_BEGUN] = request, served
        return None
    ran = perf_counter()
    parts, json_length = codec.encode(request, answer.outputs)
    whole = bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
    out = [_JSON]
    if json_length is not None:
        out = [_BINARY, (b"inference-header-content-length", b"%d" % json_length)]
    _account(scope, served, answer, out, len(whole), started, started, parsed, ran)
    if route is not None:
        route.stats.requests += 1
        if route.plan.shadow is not None:
            state["shadows"].offer(route.plan, route.version, request, answer.outputs)
    return out, whole


async def _infer_by_alias(scope: Scope, receive: Receive, send: Send, route: Route, started: float) -> int:
    """``infer`` on the version that an alias chose, and on its fallbacks where that one fails by its own fault.

    A fallback takes the request as its own signature reads it; one that it does not fit is passed over. What fails last
    does not matter: the answer tells of the version that was chosen.
    """
    stats = route.stats
    stats.requests += 1
    arrived: tuple[Body, float] | None = None
    failure: GatewayError | None = None
    crashes = 0
    since = started
    chain = (route.version, *route.fallback)
    for version in chain:
        served: ServedVersion | None = None
        try:
            # Where others can stand in, a load is not waited for long.
            hurry = _HURRIED_LOAD_S if version != chain[-1] else math.inf
            served = await _target(scope, route, version, started, hurry)
            if arrived is None:
                arrived = await _arrived(scope, receive, header_fields(scope))
            size = await _infer(scope, receive, send, served, version, started, since, arrived, route)
        except GatewayError as error:
            now = perf_counter()
            misfit = arrived is None or isinstance(error, MalformedRequestError)
            if served is not None and not (failure is not None and misfit):
                served.stats.finished(now - since, error.code)
            if failure is None:
                failure = error
                stats.failed(error.code)
                if served is not None:
                    _name_version(scope, served)
                if error.code not in FALLBACK_CODES:
                    raise
            elif served is not None and arrived is None:
                raise  # there is no request that anybody could answer
            elif isinstance(error, CancelledByCallerError):
                raise
            crashes += error.code == "worker_crashed"
            if crashes > 1 or error.code == "deadline_exceeded":
                break
            since = now
        else:
            if failure is not None:
                stats.fallbacks += 1
            return size
    assert failure is not None  # the loop has run at least once
    raise failure


async def _target(scope: Scope, route: Route, version: int, started: float, hurry: float) -> ServedVersion:
    """A version that an alias names, loaded; that it is gone is not the caller's error."""
    try:
        return await _loaded(scope, route.model, version, started, hurry)
    except NotFoundError:
        raise ModelNotReadyError(
            f"Request for unready model: '{route.model}@{route.alias}' names version {version}, which is not here"
        ) from None


async def _loaded(
    scope: Scope, name: str, version: int | None, started: float, hurry: float = math.inf
) -> ServedVersion:
    """A model version; one that is not in memory is loaded, within the caller's time and ``hurry`` seconds."""
    registry: Registry = scope["state"]["registry"]
    try:
        return registry.get(name, version)
    except ModelNotReadyError:
        timeout = header_fields(scope).get(b"inferway-timeout-ms")
        left = math.inf if timeout is None else _timeout_s(timeout) - (perf_counter() - started)
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


async def _arrived(scope: Scope, receive: Receive, headers: Fields) -> tuple[Body, float]:
    """The request's body, decompressed, and when it was here, on ``perf_counter``."""
    head = headers.get(b"inference-header-content-length")
    declared = headers.get(b"content-length")
    limit = scope["state"]["settings"].body_limit_bytes
    body = await read_body(
        receive, None if declared is None else int(declared), limit, 0 if head is None else _header_length(head)
    )
    received = perf_counter()
    encoding = headers.get(b"content-encoding")
    if encoding is not None:
        body = await inflate(body, encoding, limit)
    return body, received


async def _infer(
    scope: Scope,
    receive: Receive,
    send: Send,
    served: ServedVersion,
    version: int | None,
    started: float,
    since: float,
    arrived: tuple[Body, float] | None,
    route: Route | None = None,
) -> int:
    """Run a request on one version and send the answer.

    Args:
        version: as it was asked for.
        started: when the request came; since: when this version's turn came, which is later for a fallback.
        arrived: the body and when it was here; None reads it.
        route: by which alias it came, where it did.
    """
    headers = header_fields(scope)
    settings = scope["state"]["settings"]
    head = headers.get(b"inference-header-content-length")
    header_length = None if head is None else _header_length(head)
    body, received = arrived or await _arrived(scope, receive, headers)
    codec: SignatureCodec | None = served.wire
    if codec is None or codec.signature is not served.batcher.signature:  # a remote model may become another one
        codec = served.wire = SignatureCodec(served.name, str(served.version), served.batcher.signature)
    request: DecodedRequest
    begun = scope.pop(_BEGUN, None)
    if begun is not None and begun[1] is served:
        request = begun[0]
    elif codec.decodes_long(len(body), header_length):
        request = await asyncio.to_thread(codec.decode, body, header_length, settings.json_limit_bytes)
    else:
        request = codec.decode(body, header_length, settings.json_limit_bytes)
    request.rows = codec.signature.check(request.inputs)
    timeout = headers.get(b"inferway-timeout-ms")
    if timeout is not None:
        # Counted from the moment the request came: reading its body is part of what the caller waits for.
        left = _timeout_s(timeout) - (perf_counter() - started)
        if left <= 0:
            raise DeadlineExceededError("the time granted by Inferway-Timeout-Ms passed before the run")
        request.deadline = asyncio.get_running_loop().time() + left
    parsed = perf_counter()
    batcher = served.batcher
    try:
        answer = None if request.begun is not None else batcher.run_inline(request)
        if answer is None:
            request.origin = origin_of(scope, headers)
            request.asker = Asker(scope["principal"].key_id, headers)
            answer = await _queued(scope, receive, batcher, request)
    except ShuttingDownError:
        # A reload retired this version while the body arrived or was read, and its successor is in place already. A
        # model that is gone for good is told of in the registry's words.
        successor = await _loaded(scope, served.name, version, started)
        if successor is served:
            raise
        return await _infer(scope, receive, send, successor, version, started, since, (body, received), route)
    ran = perf_counter()
    if codec.encodes_long(request, answer.outputs):
        parts, json_length = await asyncio.to_thread(codec.encode, request, answer.outputs)
    else:
        parts, json_length = codec.encode(request, answer.outputs)
    size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
    out = [_JSON if json_length is None else _BINARY]
    accept = headers.get(b"accept-encoding")
    if accept is not None:
        coding = accepted_encoding(accept, size, binary=json_length is not None)
        if coding is not None:
            packed = await deflate(parts, coding)
            parts, size = [packed], len(packed)
            out.append((b"content-encoding", coding))
        out.append((b"vary", b"accept-encoding"))
    if json_length is not None:
        out.append((b"inference-header-content-length", b"%d" % json_length))
    if route is not None and route.version != served.version:
        out.append((b"inferway-fallback", b"%d" % route.version))
        # What the failed version said of itself goes with its error, which nobody gets to see.
        scope["response_headers"] = tuple(h for h in scope["response_headers"] if h[0] != _MODEL_VERSION)
    _account(scope, served, answer, out, size, since, max(received, since), parsed, ran)
    if answer.upstream_attempts:
        out.append((b"inferway-upstream-attempts", b"%d" % answer.upstream_attempts))
    if scope["response_headers"]:
        out += scope["response_headers"]
    await send({"type": "http.response.start", "status": 200, "headers": out})
    if len(parts) == 1:
        await send({"type": "http.response.body", "body": parts[0]})
    elif size <= _JOIN_BELOW_BYTES:
        await send({"type": "http.response.body", "body": b"".join(parts)})
    else:
        for part in parts[:-1]:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": parts[-1]})
    if route is not None and route.plan.shadow is not None:
        scope["state"]["shadows"].offer(route.plan, served.version, request, answer.outputs)
    return size


def origin_of(scope: Scope, headers: Fields) -> tuple[tuple[str, str], ...]:
    """What a server elsewhere may know of the request: which it is, how often it came, and through how many gateways;
    nothing of who sends it."""
    attempt, hops = headers.get(b"inferway-attempt", b""), headers.get(b"inferway-hops", b"")
    came = int(hops) if hops.isdigit() and len(hops) <= 2 else 0
    known = (("X-Request-Id", scope["request_id"].decode()), ("Inferway-Hops", str(came + 1)))
    return (*known, ("Inferway-Attempt", attempt.decode())) if attempt.isdigit() and len(attempt) <= 4 else known


def _name_version(scope: Scope, served: ServedVersion) -> None:
    """Have an error say which version it comes from."""
    scope["response_headers"] = (*scope["response_headers"], (_MODEL_VERSION, b"%d" % served.version))


def _account(
    scope: Scope,
    served: ServedVersion,
    answer: Answer,
    out: list[tuple[bytes, bytes]],
    size: int,
    started: float,
    received: float,
    parsed: float,
    ran: float,
) -> None:
    """Count an answer that is about to be sent, and say in its headers where its time went."""
    encoded = perf_counter()
    stages = served.stats.stages
    stages["parse"].observe(parsed - received)
    stages["serialise"].observe(encoded - ran)
    served.stats.finished(encoded - started, None)
    out += (
        (b"content-length", b"%d" % size),
        (b"x-request-id", scope["request_id"]),
        served.wire.version_header,
        (
            b"server-timing",
            b"parse;dur=%b, queue;dur=%b, assemble;dur=%b, run;dur=%b, serialise;dur=%b"
            % (
                _ms(parsed - received),
                _ms(answer.queue_s),
                _ms(answer.assemble_s + answer.split_s),
                _ms(answer.run_s),
                _ms(encoded - ran),
            ),
        ),
    )


async def _queued(scope: Scope, receive: Receive, batcher: Executor, request: InferenceRequest) -> Answer:
    """Wait for a batched run, and give the place up when the caller goes away."""
    register: Callable[[Callable[[], None]], Callable[[], None]] | None
    register = (scope.get("extensions") or {}).get(DISCONNECT_EXTENSION)
    if register is None:
        return await _watched(receive, batcher, request)
    task = asyncio.current_task()
    assert task is not None  # an ASGI application always runs in a task, or in our server's stand-in for one
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    unregister = register(leave)
    try:
        return await batcher.infer(request)
    except asyncio.CancelledError:
        if not gone or task.uncancel():
            raise
        raise CancelledByCallerError("the caller went away before its answer was there") from None
    finally:
        unregister()


async def _watched(receive: Receive, batcher: Executor, request: InferenceRequest) -> Answer:
    """The same under a server that tells of a disconnect only to those who wait for it."""
    work = asyncio.ensure_future(batcher.infer(request))
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            await asyncio.wait((work,))
        if work.cancelled():
            raise CancelledByCallerError("the caller went away before its answer was there")
        return work.result()
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.wait((work, watch))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _ms(seconds: float) -> bytes:
    microseconds = int(seconds * 1e6)
    return _SHORT_MS[microseconds] if 0 <= microseconds < 4096 else b"%.3f" % (seconds * 1e3)


def _header_length(value: bytes) -> int:
    if value.isdigit() and len(value) <= 10:
        length = int(value)
        if length < 2**31:
            return length
    raise MalformedRequestError(
        "expected Inference-Header-Content-Length as a number of bytes below 2147483648, "
        f"got '{value[:40].decode('latin-1')}'"
    )


def _timeout_s(value: bytes) -> float:
    if value.isdigit() and len(value) <= 12:
        return int(value) / 1e3
    raise InvalidParameterError(
        f"expected Inferway-Timeout-Ms as a whole number of milliseconds, got '{value[:40].decode('latin-1')}'"
    )
