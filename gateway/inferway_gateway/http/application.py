"""The ASGI application: request ids, errors, metrics and access log around Starlette's router.

Inference goes past the router: its path is matched by hand, which saves some 15 µs of a request that may take 40. The
route stands in the routing table all the same, and a test holds that both ways lead to the same answer. Paths without
parameters are looked up, since the router holds a path against one route after the other: some 25 µs where there are
as many as here.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match
from starlette.types import Message, Receive, Scope, Send

from ..core.errors import (
    CancelledByCallerError,
    GatewayError,
    InternalError,
    MalformedRequestError,
    NotFoundError,
)
from ..server.policy import EdgeStats
from .bodies import Body
from .infer import infer, infer_now
from .key_bodies import deprecation
from .problems import STATUSES, Headers, render
from .routes_oip import parse_version
from .routing import INFER_SCOPES, ApiRoute, Fields, MethodNotAllowedError, authorise, header_fields, known_principal

logger = logging.getLogger("inferway.http")

_INFER_ROUTE: Final = "/v2/models/{model}/infer"
_INFER_VERSION_ROUTE: Final = "/v2/models/{model}/versions/{version}/infer"
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_SECURITY_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)


async def infer_endpoint(scope: Scope, receive: Receive, send: Send) -> None:
    """The inference route when it is reached through the router."""
    parameters = scope["path_params"]
    await infer(
        scope,
        receive,
        send,
        name=parameters["model"],
        version=parse_version(parameters.get("version")),
        principal=scope["principal"],
        started=perf_counter(),
    )


class InferRoute(ApiRoute):
    """A route whose endpoint is an ASGI application: it writes its answer itself."""

    def __init__(self, path: str) -> None:
        super().__init__(path, infer_endpoint, "POST", scopes=INFER_SCOPES)
        self.app = infer_endpoint


class GatewayApplication(Starlette):
    """Starlette with the gateway's outermost layer.

    Every answer carries ``X-Request-Id``; every failure is a ``GatewayError`` by the time it leaves, in the shape that
    its path family promises; what is no ``GatewayError`` is logged with its traceback and answered as ``internal``.
    """

    def __init__(self, routes: Sequence[BaseRoute], lifespan: Any) -> None:
        super().__init__(routes=routes, lifespan=lifespan)
        self.router.redirect_slashes = False
        self._fixed = _fixed_paths(routes)
        self._prefix = secrets.token_hex(6).encode()
        self._count = itertools.count(1)
        self.edge_stats = EdgeStats()
        """Counted by the server that runs this application, where that is ours."""
        self.begin_drain: Callable[[], None] = lambda: None
        """Turns readiness false; to be called when the end begins."""
        self.guard: Callable[[Fields], None] | None = None
        """Looks at the headers of every request before anything else does, where there is no authentication."""
        self.startup_problem: str | None = None
        """Why the lifespan did not start, in words for the operator; None where it did, or where it is a defect."""

    def answer_at_once(self, scope: Scope, body: Body) -> tuple[int, Headers, bytes] | None:
        """Answer a request that is here as a whole, before any task or coroutine is made for it.

        For our own server, as ``Edge.at_once``. Only short runs for a key that was checked lately are answered.

        Returns:
            Status, headers and body; None where the application has to be called. Then nothing has been done.
        """
        started = perf_counter()
        target = infer_target(scope["path"]) if scope["method"] == "POST" else None
        state = scope["state"]
        if (
            target is None
            or self.guard is not None
            or state["access_log"] is not None
            or state["rate_limits"] is not None
        ):
            return None
        fields = header_fields(scope)
        name, version = target
        try:
            principal = known_principal(state["authenticator"], fields, INFER_SCOPES)
            if principal is None or principal.rotated_at is not None:
                return None
            scope["request_id"] = self._request_id(fields)
            found = infer_now(
                scope,
                body,
                name=name,
                version=None if version is None else parse_version(version),
                principal=principal,
                started=started,
            )
        except GatewayError:
            return None  # the application comes to the same end, and tells of it
        if found is None:
            return None
        state["metrics"].http_request(_INFER_ROUTE if version is None else _INFER_VERSION_ROUTE, 200)
        return 200, *found

    def _request_id(self, fields: Fields) -> bytes:
        """The caller's request id where it can do no harm in a log, else a new one."""
        given = fields.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return b"%s-%x" % (self._prefix, next(self._count))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._lifespan(scope, receive, send)
            return
        started = perf_counter()
        fields = header_fields(scope)
        request_id = self._request_id(fields)
        scope["app"] = self
        scope["request_id"] = request_id
        scope["response_headers"] = ()
        status = 200
        size = 0
        route = None
        answer = None
        try:
            if self.guard is not None:
                self.guard(fields)
            target = infer_target(scope["path"]) if scope["method"] == "POST" else None
            if target is not None:
                name, version = target
                route = _INFER_ROUTE if version is None else _INFER_VERSION_ROUTE
                authenticator = scope["state"]["authenticator"]
                principal = known_principal(authenticator, fields, INFER_SCOPES)
                if principal is None:
                    principal = await authorise(authenticator, fields, INFER_SCOPES)
                    assert principal is not None  # only a public route has none
                scope["principal"] = principal
                if principal.rotated_at is not None:
                    scope["response_headers"] = deprecation(principal)
                rate_limits = scope["state"]["rate_limits"]
                if rate_limits is not None:
                    rate_limits.take(principal.key_id)
                size = await infer(
                    scope,
                    receive,
                    send,
                    name=name,
                    version=None if version is None else parse_version(version),
                    principal=principal,
                    started=started,
                )
            else:
                answer = _Answer(scope, send)
                try:
                    fixed = self._fixed.get((scope["method"], scope["path"]))
                    if fixed is None or scope.get("root_path"):
                        await self.router(scope, receive, answer.send)
                    else:
                        scope["path_params"] = {}
                        await fixed.handle(scope, receive, answer.send)
                finally:
                    found = scope.get("route")
                    route = found.path if found is not None else None
                    status, size = answer.status, answer.size
        except Exception as error:  # the last resort of every request: nothing may leave without an answer
            problem = _as_gateway_error(error, scope)
            if answer is not None and answer.begun:
                logger.exception("request %s failed after its answer began", request_id.decode())
                raise
            status = STATUSES[problem.code]
            if not isinstance(problem, CancelledByCallerError):
                size = await self._answer(scope, send, problem)
        state = scope["state"]
        state["metrics"].http_request(route, status)
        access_log = state["access_log"]
        if access_log is not None:
            access_log(scope, route, status, size, perf_counter() - started)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without_traceback(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and self.startup_problem is not None:
                message["message"] = ""
            await send(message)

        scope["app"] = self
        await self.router(scope, receive, without_traceback)

    async def _answer(self, scope: Scope, send: Send, problem: GatewayError) -> int:
        route = scope.get("route")
        status, headers, body = render(
            problem,
            scope["path"],
            scope["request_id"].decode(),
            basic=route is not None and getattr(route, "basic", False),
        )
        headers += _SECURITY_HEADERS
        headers += scope["response_headers"]
        if isinstance(problem, MethodNotAllowedError):
            headers.append((b"allow", problem.allowed.encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return len(body)


class _Answer:
    """What a route sends, with what every answer carries added, and what the log wants to know of it."""

    __slots__ = ("_scope", "_send", "begun", "size", "status")

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self.begun = False
        self.status = 200
        self.size = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self.status = message["status"]
            headers = message.setdefault("headers", [])
            headers.append((b"x-request-id", self._scope["request_id"]))
            headers += _SECURITY_HEADERS
            headers += self._scope["response_headers"]
        else:
            self.size += len(message.get("body", b""))
        await self._send(message)


def _fixed_paths(routes: Sequence[BaseRoute]) -> dict[tuple[str, str], ApiRoute]:
    """Method and path of each route without parameters that the router would choose for them."""
    found: dict[tuple[str, str], ApiRoute] = {}
    for route in routes:
        if not isinstance(route, ApiRoute) or route.param_convertors:
            continue
        for method in route.methods:
            scope: Scope = {"type": "http", "method": method, "path": route.path}
            if next(other for other in routes if other.matches(scope)[0] is Match.FULL) is route:
                found[method, route.path] = route
    return found


def is_inference(scope: Mapping[str, Any]) -> bool:
    """Whether a request is for the inference route, whose answer may be there before it first has to wait."""
    path: str = scope["path"]
    return scope["method"] == "POST" and path.endswith("/infer")


def infer_target(path: str) -> tuple[str, str | None] | None:
    """Name and version, as they stand in an inference path; None where the path is another."""
    if path[:11] != "/v2/models/" or path[-6:] != "/infer":
        return None
    middle = path[11:-6]
    if "/" not in middle:
        return (middle, None) if middle else None
    name, separator, version = middle.partition("/versions/")
    if not separator or not name or "/" in name or not version or "/" in version:
        return None
    return name, version


def _nothing_at(scope: Mapping[str, Any]) -> str:
    """Why there is nothing at a path, for those who have set up a client of OpenAI's API and gave it a wrong address,
    or ask for what only OpenAI has."""
    path: str = scope["path"]
    known = [route.path for route in scope["app"].routes if route.path.startswith("/v1/")]
    for found, hint in ((f"/v1{path}", "the base URL ends in /v1"), (path[3:], "the base URL has /v1 once")):
        if found in known:
            return f"Not Found: there is {found}; {hint}"
    if not path.startswith("/v1/"):
        return "Not Found"
    there = sorted({route.removeprefix("/v1/") for route in known if "{" not in route})
    return f"Not Found: below /v1 there are {', '.join(there)}"


def _as_gateway_error(error: Exception, scope: Mapping[str, Any]) -> GatewayError:
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return NotFoundError(_nothing_at(scope))
        return MalformedRequestError(str(error.detail))
    logger.error(
        "request %s failed unexpectedly",
        scope["request_id"].decode(),
        exc_info=(type(error), error, error.__traceback__),
    )
    return InternalError("internal error; the gateway's log has the details under this request id")
