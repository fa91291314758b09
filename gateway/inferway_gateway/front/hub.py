"""The owner's end of the lines to the fronts: requests come in, go to the executors that all fronts share, and back.

A request is looked at with the registry in hand: the version that it was read for must be the very one that answers now
(the same object, not the same number), else nothing is run and the front is told of the one that is. So a hot swap
makes no error and no answer that is half of one version and half of another.

Only this gateway's own fronts are listened to: the sockets lie in a directory that nobody else may enter, the kernel
says who connects (``SO_PEERCRED``), and the first frame holds a token that was made for this start.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..core.batcher import Answer, Asker, InferenceRequest
from ..core.errors import (
    GatewayError,
    InternalError,
    ModelNotReadyError,
    NotFoundError,
    PermissionDeniedError,
    ShuttingDownError,
)
from ..core.keys import Authenticator
from ..core.registry import Registry
from ..core.routing import Router
from ..core.served import ServedVersion
from ..http.metrics import Metrics
from ..http.problems import render
from ..server.policy import EdgeStats
from .frames import Channel, FrameError, Kind, pack, unpack_arrays
from .wire import (
    add_alias_stats,
    add_edge_stats,
    add_model_stats,
    aliases_to_json,
    describe_error,
    signature_to_json,
)

logger = logging.getLogger("inferway.fronts")

FRONT_HEADER: Final = b"inferway-front"
"""Of requests that a front passes on: the token, and the address that the request came from."""
_SYNC_LIMIT_S: Final = 1.0
"""How long an answer may wait for the fronts to take over what it changed; one that hangs must not hold it for ever."""
_WATCH_S: Final = 0.05
"""How often aliases are looked at that nobody changed through this process."""
_PULSE_S: Final = 1.0
"""How often each front is asked for a sign of life."""
HUNG_AFTER_S: Final = 10.0
"""A front that has given none for so long is stopped, or caught in a loop: its callers wait for nothing."""
_GREETING_LIMIT_S: Final = 5.0
_UNIX_CREDENTIALS: Final = struct.Struct("3i")


class _Runs(Protocol):
    """A task that answers a request."""

    def cancel(self) -> bool: ...


@dataclass(slots=True)
class _Held:
    """What the gateway is made of, as far as the fronts need it."""

    registry: Registry
    router: Router
    metrics: Metrics
    edge_stats: EdgeStats


class Hub:
    """Takes the lines of the fronts. Made before the gateway opens, opened by its lifespan.

    Args:
        directory: of the sockets; mode 0700.
    """

    def __init__(self, directory: Path) -> None:
        self.line_path: Final = directory / "line"
        self.http_path: Final = directory / "http"
        self.token: Final = secrets.token_urlsafe(32)
        self.fronts: set[Front] = set()
        self.restarts = 0
        """Fronts that were begun anew after they had ended without being told to."""
        self.on_hung: Callable[[int], None] = lambda pid: None
        """Called with the process id of a front that gives no sign of life any more."""
        self._held: _Held | None = None
        self._generations: dict[int, ServedVersion] = {}
        self._numbers = itertools.count(1)
        self._syncs = itertools.count(1)
        self._changed_keys: set[str] = set()
        self._aliases: list[tuple[str, str, int]] = []
        """What every front has been told of."""
        self._arrivals = asyncio.Condition()
        self._syncing = asyncio.Lock()

    # --- life ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def opened(
        self,
        *,
        registry: Registry,
        router: Router,
        metrics: Metrics,
        edge_stats: EdgeStats,
        authenticator: Authenticator | None,
    ) -> AsyncIterator[None]:
        """Listen for fronts while the gateway is open.

        Args:
            edge_stats: what the edges of all fronts count is added up here.
            authenticator: fronts forget the keys that it forgets.
        """
        self._held = _Held(registry, router, metrics, edge_stats)
        metrics.add(_Processes(self))
        if authenticator is not None:
            authenticator.on_forget = self._key_changed
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: Front(self), str(self.line_path))
        self.line_path.chmod(0o600)
        watch = asyncio.create_task(self._watch(), name="inferway-fronts")
        try:
            yield
        finally:
            watch.cancel()
            server.close()
            for front in list(self.fronts):
                front.close()
            await asyncio.wait((watch,))

    async def wait_for(self, pids: Callable[[], Iterable[int]]) -> None:
        """Wait until every one of these processes is connected."""
        async with self._arrivals:
            await self._arrivals.wait_for(lambda: set(pids()) <= {front.pid for front in self.fronts})

    async def _watch(self) -> None:
        clock = asyncio.get_running_loop().time
        felt = clock()
        while True:
            await asyncio.sleep(_WATCH_S)
            self._forget_unloaded()
            now = clock()
            if now - felt >= _PULSE_S:
                # Where this process itself stood still, nobody could answer it.
                held_up_s, felt = now - felt - _PULSE_S, now
                for front in list(self.fronts):
                    if front.silent_s(now, held_up_s) > HUNG_AFTER_S:
                        logger.error("front process %d gives no sign of life for %g s", front.pid, HUNG_AFTER_S)
                        self.fronts.discard(front)  # nobody waits for it from here on
                        self.on_hung(front.pid)
                    else:
                        front.feel_pulse(next(self._syncs) & 0xFFFFFFFF)
            if self._outdated():
                await self.synchronise()

    # --- what the fronts are told ----------------------------------------------------------------------------------

    @property
    def held(self) -> _Held:
        if self._held is None:
            raise ShuttingDownError("the gateway is not open")
        return self._held

    def _outdated(self) -> bool:
        """Whether there is something that the fronts do not know."""
        return bool(self._changed_keys) or self._aliases != self._present()

    async def synchronise(self, *, report: bool = False) -> None:
        """Have every front know the aliases as they are, and no key that was changed.

        Args:
            report: also have them report what they counted up to now.
        """
        # One at a time: what another call has sent off is only known when that is done.
        async with self._syncing:
            if not (self._outdated() or report) or not self.fronts:
                return
            text = self.aliases()
            self._aliases = self._present()
            keys, self._changed_keys = sorted(self._changed_keys), set()
            number = next(self._syncs) & 0xFFFFFFFF
            frame = pack(Kind.SYNC, number, {"aliases": True, "keys": keys}, text=text)
            done = [front.sync(number, frame) for front in self.fronts]
            _, late = await asyncio.wait(done, timeout=_SYNC_LIMIT_S)
            for future in late:
                future.cancel()
                logger.warning("a front process did not take over a change within %g s", _SYNC_LIMIT_S)

    def _key_changed(self, key_id: str) -> None:
        self._changed_keys.add(key_id)

    def aliases(self) -> bytes:
        """All aliases, for a front to know."""
        return aliases_to_json(plan.record for plan in self.held.router.aliases())

    def _present(self) -> list[tuple[str, str, int]]:
        return [(plan.model, plan.alias, plan.record.revision) for plan in self.held.router.aliases()]

    # --- versions --------------------------------------------------------------------------------------------------

    def number_of(self, served: ServedVersion) -> int:
        """What fronts call a version as it is loaded now."""
        for number, known in self._generations.items():
            if known is served:
                return number
        number = next(self._numbers)
        self._generations[number] = served
        return number

    def _forget_unloaded(self) -> None:
        """Let go of versions that are not loaded any more; whoever still asks for one is told to ask anew."""
        loaded = set(map(id, self.held.registry.served()))
        self._generations = {n: s for n, s in self._generations.items() if id(s) in loaded}

    def numbered(self, number: int) -> ServedVersion | None:
        return self._generations.get(number)

    # --- the application, as the fronts see it -----------------------------------------------------------------------

    def application(self, app: ASGIApp) -> ASGIApp:
        """The gateway's application for requests that fronts pass on.

        What has changed is told when every front knows it, and counters are read when every front has reported: so
        whoever asks through one front finds what was done through another.
        """

        async def passed_on(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            try:
                self._unwrap(scope)
            except PermissionDeniedError as error:
                status, headers, body = render(error, scope["path"], "front")
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return
            if scope["method"] == "GET" and _reads_counters(scope["path"]):
                await self.synchronise(report=True)

            async def synchronised(message: Message) -> None:
                # Also before an answer that only tells: of a deployment that has ended, say.
                if message["type"] == "http.response.start":
                    await self.synchronise()
                await send(message)

            await app(scope, receive, synchronised)

        return passed_on

    def _unwrap(self, scope: MutableMapping[str, Any]) -> None:
        """Take the front's own header off. Raises ``PermissionDeniedError`` where it is not one of ours."""
        given = b""
        headers = []
        for name, value in scope["headers"]:
            if name == FRONT_HEADER:
                given = value
            else:
                headers.append((name, value))
        token, _, address = given.partition(b" ")
        if not hmac.compare_digest(token, self.token.encode()):
            raise PermissionDeniedError("expected a request that a front process of this gateway passed on")
        scope["headers"] = headers
        scope["client"] = (address.decode("latin-1"), 0) if address else None


class _Processes:
    """What there is to say of the fronts themselves; what they count is added to the gateway's own counts."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.sees: Callable[[str], bool] = lambda _: True

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("inferway_fronts", "Front processes that are connected.", len(self._hub.fronts))
        yield CounterMetricFamily(
            "inferway_front_restarts", "Front processes that were begun in place of one that died.", self._hub.restarts
        )


class Front(Channel):
    """The line to one front."""

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self.pid = 0
        self._hub = hub
        self._tasks: dict[int, _Runs] = {}
        self._syncing: dict[int, asyncio.Future[None]] = {}
        self._open = 0
        self._greeting: asyncio.TimerHandle | None = None
        self._alive_at = 0.0
        self._pulse: int | None = None
        """The question for a sign of life that has no answer yet."""

    # --- for the hub -----------------------------------------------------------------------------------------------

    def sync(self, number: int, frame: list[Any]) -> asyncio.Future[None]:
        """Send a ``SYNC``; done when the front has taken it over, or is gone."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._syncing[number] = future
        self.write(frame)
        future.add_done_callback(lambda _: self._syncing.pop(number, None))
        return future

    def feel_pulse(self, number: int) -> None:
        """Ask for a sign of life, unless one that was asked for has not come yet."""
        if self._pulse is None:
            self._pulse = number
            self.write(pack(Kind.SYNC, number, {"aliases": False, "keys": []}))

    def silent_s(self, now: float, held_up_s: float) -> float:
        """How long nothing was heard of it although it was asked.

        Args:
            held_up_s: for so long this process could not hear anything lately.
        """
        if self._pulse is None:
            self._alive_at = now
        self._alive_at += held_up_s
        return now - self._alive_at

    # --- the connection --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer: socket.socket = transport.get_extra_info("socket")
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UNIX_CREDENTIALS.size)
        pid, uid, _ = _UNIX_CREDENTIALS.unpack(raw)
        if uid != os.geteuid():
            logger.warning("refused a connection of user %d to the socket of the fronts", uid)
            self.close()
            return
        self._peer_pid = pid
        self._greeting = asyncio.get_running_loop().call_later(_GREETING_LIMIT_S, self.close)

    def lost(self) -> None:
        if self._greeting is not None:
            self._greeting.cancel()
        for task in list(self._tasks.values()):
            task.cancel()
        for future in list(self._syncing.values()):
            if not future.done():
                future.set_result(None)
        if self.pid:
            self._hub.fronts.discard(self)
            self._hub.held.edge_stats.open -= self._open

    def frame(self, kind: int, number: int, meta: dict[str, Any], data: memoryview) -> None:
        self._pulse = None
        if not self.pid:
            self._greet(kind, meta)
        elif kind == Kind.INFER:
            self._infer(number, meta, data)
        elif kind == Kind.CANCEL:
            task = self._tasks.get(number)
            if task is not None:
                task.cancel()
        elif kind == Kind.FIND:
            self._launch(number, self._find(number, meta))
        elif kind == Kind.REPORT:
            self._count(meta)
        elif kind == Kind.DONE:
            future = self._syncing.get(number)
            if future is not None and not future.done():
                future.set_result(None)
        else:
            raise FrameError(f"expected a front's question, got a frame of kind {kind}")

    def _greet(self, kind: int, meta: dict[str, Any]) -> None:
        token = meta.get("token")
        if kind != Kind.HELLO or type(token) is not str or not hmac.compare_digest(token, self._hub.token):
            logger.warning("refused a connection without the token to the socket of the fronts")
            self.close()
            return
        assert self._greeting is not None
        self._greeting.cancel()
        self.pid = self._peer_pid
        text = self._hub.aliases()
        self.write(pack(Kind.WELCOME, 0, {"aliases": True, "keys": []}, text=text))
        self._hub.fronts.add(self)
        self._launch(0, self._arrived())

    async def _arrived(self) -> None:
        async with self._hub._arrivals:
            self._hub._arrivals.notify_all()

    # --- requests --------------------------------------------------------------------------------------------------

    def _launch(self, number: int, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None) if self._tasks.get(number) is task else None)

    def _infer(self, number: int, meta: dict[str, Any], data: memoryview) -> None:
        """Answer at once where the run is short, else in a task."""
        hub = self._hub
        try:
            served = hub.numbered(meta["gen"])
            if served is None:
                raise ModelNotReadyError("the version that the request was read for is not loaded any more")
            current = hub.held.registry.get(served.name, None if meta["name"] else served.version)
            if current is not served:
                self.write(self._described(Kind.MOVED, number, current, by_name=meta["name"]))
                return
            arrays = unpack_arrays(meta, data)
            outputs = meta["outputs"]
            request = InferenceRequest(
                dict(zip(meta["inputs"], arrays, strict=True)),
                served.batcher.signature.output_names if outputs is None else tuple(outputs),
                meta["rows"],
                meta["nbytes"],
                meta["priority"],
                meta["deadline"],
                meta["queue_timeout_s"],
                origin=tuple((name, value) for name, value in meta["origin"]),
                asker=_asker(meta["asker"]),
            )
            answer = served.batcher.run_inline(request)
        except (ModelNotReadyError, NotFoundError) as error:
            # The front asks anew, which also loads what can be loaded.
            self.write(pack(Kind.ERROR, number, {**describe_error(_gone(error)), "stale": True}))
        except GatewayError as error:
            self.write(pack(Kind.ERROR, number, describe_error(error)))
        else:
            if answer is not None:
                self.write(_answer(number, answer))
            else:
                self._launch(number, self._run(number, served, request, by_name=meta["name"]))

    async def _run(self, number: int, served: ServedVersion, request: InferenceRequest, *, by_name: bool) -> None:
        try:
            frame = _answer(number, await served.batcher.infer(request))
        except ShuttingDownError as error:
            frame = self._successor(number, served, error, by_name=by_name)
        except GatewayError as error:
            frame = pack(Kind.ERROR, number, describe_error(error))
        except Exception:
            logger.exception("a request of a front failed unexpectedly")
            frame = pack(
                Kind.ERROR, number, describe_error(InternalError("internal error; the gateway's log has more"))
            )
        if self.congested:
            await self.writable()
        self.write(frame)

    def _successor(self, number: int, served: ServedVersion, error: ShuttingDownError, *, by_name: bool) -> list[Any]:
        """What a front is told whose version was retired while its request waited."""
        try:
            current = self._hub.held.registry.get(served.name, None if by_name else served.version)
        except GatewayError:
            return pack(Kind.ERROR, number, {**describe_error(error), "stale": True})
        if current is served:
            return pack(Kind.ERROR, number, describe_error(error))
        return self._described(Kind.MOVED, number, current, by_name=by_name)

    async def _find(self, number: int, meta: dict[str, Any]) -> None:
        name, version = meta["model"], meta["version"]
        try:
            served = await self._hub.held.registry.acquire(name, version, deadline=meta["deadline"])
            frame = self._described(Kind.VERSION, number, served, by_name=version is None)
        except GatewayError as error:
            frame = pack(Kind.ERROR, number, describe_error(error))
        except Exception:
            logger.exception("a front's question for a version failed unexpectedly")
            frame = pack(
                Kind.ERROR, number, describe_error(InternalError("internal error; the gateway's log has more"))
            )
        self.write(frame)

    def _described(self, kind: Kind, number: int, served: ServedVersion, *, by_name: bool) -> list[Any]:
        meta = {
            "gen": self._hub.number_of(served),
            "model": served.name,
            "version": served.version,
            "by_name": by_name,
            "row_exact": served.batcher.row_exact,
            "priority_levels": served.config.batching.priority_levels,
        }
        return pack(kind, number, meta, text=signature_to_json(served.batcher.signature))

    def _count(self, meta: dict[str, Any]) -> None:
        """Add a front's counts to the gateway's."""
        held = self._hub.held
        for number, taken in meta["models"].items():
            served = self._hub.numbered(int(number))
            if served is not None:
                for one in taken:
                    add_model_stats(served.stats, one)
        add_alias_stats(held.router, meta["aliases"])
        for route, status, count in meta["requests"]:
            held.metrics.http_requests(route, status, count)
        add_edge_stats(held.edge_stats, meta["edge"], meta["edge"]["open"] - self._open)
        self._open = meta["edge"]["open"]


def _asker(said: Any) -> Asker | None:
    if said is None:
        return None
    key_id, fields = said
    return Asker(key_id, {name.encode(): value.encode("latin-1") for name, value in fields.items()})


def _gone(error: GatewayError) -> GatewayError:
    """What has the front's route look for a successor."""
    return ShuttingDownError(error.message)


def _answer(number: int, answer: Answer) -> list[Any]:
    meta = {
        "times": (answer.queue_s, answer.assemble_s, answer.run_s, answer.split_s),
        "rows": answer.batch_rows,
        "attempts": answer.upstream_attempts,
    }
    return pack(Kind.ANSWER, number, meta, answer.outputs)


def _reads_counters(path: str) -> bool:
    return path == "/metrics" or path.endswith("/stats") or path.startswith("/api/v1/models")
