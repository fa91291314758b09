"""What a front process answers: inference by itself with the owner's executors, everything else by passing it on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from ..core.errors import CancelledByCallerError, GatewayError
from ..core.keys import Authenticator
from ..core.limits import RateLimits
from ..core.routing import Router
from ..core.served import ServedVersion
from ..core.shadow import Shadows
from ..core.stats import ModelStats
from ..http.application import GatewayApplication, infer_target
from ..http.logs import access_log
from ..http.routing import header_fields, refuse_foreign_pages
from ..settings import Settings
from ..store.database import open_keys
from .link import Link, RemoteExecutor, connect
from .proxy import OwnerProxy
from .wire import EdgeTally, take_alias_stats, take_model_stats

logger = logging.getLogger("inferway.fronts")

_REPORT_S: Final = 0.1
"""How often what was counted is told to the owner."""
_GREETING_LIMIT_S: Final = 10.0


class FrontMetrics:
    """Counts answers until they are reported; stands where the gateway's metrics stand."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str | None, int], int] = {}

    def http_request(self, route: str | None, status: int) -> None:
        key = (route, status)
        self._requests[key] = self._requests.get(key, 0) + 1

    def take(self) -> list[tuple[str | None, int, int]]:
        """What was counted since the last call."""
        taken, self._requests = self._requests, {}
        return [(route, status, count) for (route, status), count in taken.items()]


class FrontApplication(GatewayApplication):
    """The gateway's application with inference alone; every other request goes to the owner."""

    def __init__(self, lifespan: Any) -> None:
        super().__init__((), lifespan)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"] == "POST" and infer_target(scope["path"]) is not None):
            await super().__call__(scope, receive, send)
            return
        # The owner looks at the key, counts and logs.
        try:
            await scope["state"]["proxy"](scope, receive, send)
        except CancelledByCallerError:
            pass
        except GatewayError as problem:
            scope["request_id"] = self._request_id(header_fields(scope))
            scope["response_headers"] = ()
            await self._answer(scope, send, problem)


def create_front(
    settings: Settings, *, line: Path, http: Path, token: str, on_lost: Callable[[], None]
) -> FrontApplication:
    """A front as an ASGI application. Nothing is opened before its lifespan begins.

    Args:
        line, http: the owner's sockets.
        token: what the owner knows its fronts by.
        on_lost: called when the owner is gone.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            pepper = settings.key_pepper
            keys = await stack.enter_async_context(
                open_keys(
                    database_url=settings.database(),
                    state_dir=settings.state_dir,
                    pepper=pepper.get_secret_value() if pepper is not None else None,
                    ttl_s=settings.key_cache_ttl_s,
                )
            )
            authenticator: Authenticator = keys.authenticator
            router, metrics, edge = Router(), FrontMetrics(), EdgeTally(app.edge_stats)

            def counted() -> dict[str, Any]:
                return {
                    "models": _take_models(link),
                    "aliases": take_alias_stats(router),
                    "requests": metrics.take(),
                    "edge": edge.take(),
                }

            link = await connect(
                line, lambda: Link(router, forget_key=authenticator.forget, report=counted, on_lost=on_lost)
            )
            stack.callback(link.end)
            async with asyncio.timeout(_GREETING_LIMIT_S):
                await link.greet(token)
            proxy = await stack.enter_async_context(OwnerProxy(http, token))

            async def find(name: str, version: int, deadline: float) -> ServedVersion:
                return await link.registry.acquire(name, version, deadline=deadline)

            shadows = await stack.enter_async_context(Shadows(find))
            reporting = asyncio.create_task(_report(link), name="inferway-report")
            stack.push_async_callback(_end, reporting)
            yield {
                "settings": settings,
                "registry": link.registry,
                "router": router,
                "shadows": shadows,
                "proxy": proxy,
                "authenticator": authenticator if settings.auth else None,
                "rate_limits": (
                    RateLimits(settings.requests_per_minute / settings.workers)
                    if settings.requests_per_minute
                    else None
                ),
                "metrics": metrics,
                "access_log": access_log() if settings.access_log else None,
            }

    app = FrontApplication(lifespan)
    if not settings.auth:
        app.guard = partial(refuse_foreign_pages, any_host=settings.insecure)
    return app


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))


async def _report(link: Link) -> None:
    while True:
        await asyncio.sleep(_REPORT_S)
        link.report()


def _take_models(link: Link) -> dict[str, Any]:
    """What was counted of each version, by the owner's number; it begins anew with this."""
    models: dict[str, Any] = {}
    served = link.registry.served()
    retired, link.retired = link.retired, []
    for version in (*served, *retired):
        taken = take_model_stats(version.stats)
        if taken is not None and isinstance(version.batcher, RemoteExecutor):
            version.stats = ModelStats()
            # A version that was found both by its number and by its model's name is there twice.
            models.setdefault(str(version.batcher.generation), []).append(taken)
    return models
