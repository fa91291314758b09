"""The fronts as processes: how they are started, kept, and told to end without losing a request.

The owner binds a listening socket for each front, all to the same port, and keeps it: a front inherits its own. So the
connections that the kernel has taken for a front which crashes wait for the one that is begun in its place, and are not
reset. A front learns everything from its standard input, where nobody else can read, and ends with its owner.

The end goes from the outside in: fronts drain as a gateway does, and only when they are gone does the owner, which
still answers what they pass on, close its own sockets and its models.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, cast

from pydantic import SecretStr

from ..http.application import GatewayApplication
from ..http.routes_blobs import is_upload
from ..server.policy import DrainPolicy, EdgeLimits, EdgeStats
from ..server.serve import EdgeServer, bind, run, take_again
from ..settings import Settings
from .hub import Hub

logger = logging.getLogger("inferway.fronts")

_START_LIMIT_S: Final = 60.0
_END_MARGIN_S: Final = 5.0
"""Beyond what the drain of a front may take by its settings, before it is killed."""
_BACK_OFF_S: Final = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
_STABLE_S: Final = 30.0
"""A front that lived as long is begun anew at once."""


class FrontsError(Exception):
    """The fronts could not be started; the message is for the operator."""


def settings_to_json(settings: Settings) -> dict[str, Any]:
    """Every setting, secrets included, as ``Settings`` takes it."""
    values: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        elif isinstance(value, Path):
            value = str(value)
        if value is not None:
            values[name] = value
    return values


class Fronts:
    """Keeps the front processes running. ``async with`` kills what is left of them in the end.

    Args:
        listeners: for each front the sockets that it listens on.
    """

    def __init__(self, hub: Hub, settings: Settings, listeners: list[list[socket.socket]]) -> None:
        self._hub = hub
        self._settings = settings
        self._listeners = listeners
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._beginning: asyncio.Task[None] | None = None
        self._early = asyncio.Event()
        """A front ended before all of them had begun."""
        self._stopping = False
        hub.on_hung = self._kill

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    async def __aenter__(self) -> Fronts:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        if self._beginning is not None:
            self._beginning.cancel()
            await asyncio.wait((self._beginning,))
        self._signal(signal.SIGKILL)
        if self._keepers:
            await asyncio.wait(self._keepers)

    def begin(self, done: Callable[[str | None], None]) -> None:
        """Start them all; ``done`` is called once each listens, with None, or with why they cannot be started."""

        async def start() -> None:
            try:
                await self._start()
            except FrontsError as error:
                done(str(error))
            else:
                done(None)

        self._beginning = asyncio.create_task(start(), name="inferway-fronts")

    async def _start(self) -> None:
        for index in range(len(self._listeners)):
            self._processes[index] = await self._spawn(index)
        self._keepers = [
            asyncio.create_task(self._keep(index), name=f"inferway-front-{index}")
            for index in range(len(self._listeners))
        ]
        arrived = asyncio.create_task(self._hub.wait_for(lambda: self.pids))
        failed = asyncio.create_task(self._early.wait())
        try:
            done, _ = await asyncio.wait((arrived, failed), timeout=_START_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (arrived, failed):
                task.cancel()
        if failed in done:
            raise FrontsError("a front process ended while it started; the log says why")
        if arrived not in done:
            raise FrontsError(f"the front processes did not start within {_START_LIMIT_S:g} s")

    async def drain(self, interactive: bool) -> None:
        """Have them end as a gateway ends, and wait until they have."""
        self._stopping = True
        self._signal(signal.SIGINT if interactive else signal.SIGTERM)
        if not self._keepers:
            return
        limit = self._settings.drain_delay_s + self._settings.drain_timeout_s + _END_MARGIN_S
        _, late = await asyncio.wait(self._keepers, timeout=limit)
        if late:
            logger.warning("killing %d front processes that did not end within %g s", len(late), limit)
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                process.send_signal(number)

    def _kill(self, pid: int) -> None:
        """End a front that does not answer; whoever waits for it hears of that from the kernel."""
        for process in self._processes.values():
            if process.pid == pid and process.returncode is None:
                process.kill()

    async def _keep(self, index: int) -> None:
        """Begin a front anew whenever it ends by itself."""
        loop = asyncio.get_running_loop()
        attempts = 0
        while True:
            begun = loop.time()
            status = await self._processes[index].wait()
            if self._stopping:
                return
            attempts = 0 if loop.time() - begun > _STABLE_S else min(attempts + 1, len(_BACK_OFF_S) - 1)
            if self._beginning is not None and not self._beginning.done():
                self._early.set()
                return
            self._hub.restarts += 1
            logger.error("front process %d ended with status %d; beginning another", index, status)
            await asyncio.sleep(_BACK_OFF_S[attempts])
            if self._stopping:
                return
            self._processes[index] = await self._spawn(index)

    async def _spawn(self, index: int) -> asyncio.subprocess.Process:
        listeners = self._listeners[index]
        for listener in listeners:
            take_again(listener)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "inferway_gateway.front",
            stdin=asyncio.subprocess.PIPE,
            pass_fds=[listener.fileno() for listener in listeners],
            start_new_session=True,  # Ctrl+C at a terminal is for the owner, who passes it on in its order
        )
        config = {
            "settings": settings_to_json(self._settings),
            "listeners": [listener.fileno() for listener in listeners],
            "line": str(self._hub.line_path),
            "http": str(self._hub.http_path),
            "token": self._hub.token,
            "owner": os.getpid(),
        }
        assert process.stdin is not None
        process.stdin.write(json.dumps(config, default=str).encode())
        process.stdin.close()
        return process


def edge_limits(settings: Settings, *, share: int = 1) -> EdgeLimits:
    """The limits of one listening process.

    Args:
        share: how many of them share the connections.
    """
    return EdgeLimits(
        header_bytes=settings.header_limit_bytes,
        header_count=settings.header_limit_count,
        header_timeout_s=settings.header_timeout_s,
        body_bytes=settings.body_limit_bytes,
        body_timeout_s=settings.body_timeout_s,
        body_min_bytes_per_s=settings.body_min_rate,
        connections=-(-settings.max_connections // share),
        keep_alive_s=settings.keep_alive_s,
    )


def longest_body(settings: Settings) -> Callable[[Mapping[str, Any]], int | None]:
    """Which requests may have bodies beyond the limit, and how long; see ``Edge``."""
    return lambda scope: settings.upload_limit_bytes if is_upload(scope) else None


def run_fronts(make: Callable[[Hub], GatewayApplication], settings: Settings, *, ready: Callable[[int], None]) -> None:
    """Serve with ``settings.workers`` fronts until SIGTERM or SIGINT, then drain.

    Args:
        make: the gateway's application, which opens the hub that it is given.
        ready: called with the port once every front takes connections.
    Raises:
        OSError: the address cannot be bound.
        FrontsError: the fronts did not start.
        SystemExit: the application's lifespan did not start.
    """
    listeners: list[list[socket.socket]] = []
    with tempfile.TemporaryDirectory(prefix="inferway-") as name:
        try:
            port = settings.port
            for _ in range(settings.workers):
                listeners.append(bind(settings.host, port, shared=True))
                port = listeners[0][0].getsockname()[1]
            _serve(make, settings, Path(name), listeners, lambda: ready(port))
        finally:
            for listener in [one for group in listeners for one in group]:
                listener.close()


def _serve(
    make: Callable[[Hub], GatewayApplication],
    settings: Settings,
    directory: Path,
    listeners: list[list[socket.socket]],
    ready: Callable[[], None],
) -> None:
    hub = Hub(directory)
    fronts = Fronts(hub, settings, listeners)
    app = make(hub)
    servers: list[EdgeServer] = []
    problems: list[str] = []

    def begun(problem: str | None) -> None:
        if problem is None:
            ready()
            return
        problems.append(problem)
        for _ in range(2):  # the second time it does not wait for anybody
            servers[0].stop()

    wide = edge_limits(settings)
    run(
        cast(Any, hub.application(app)),
        uds=hub.http_path,
        # A front has looked at everything that comes here; its header is one more.
        limits=EdgeLimits(
            header_bytes=wide.header_bytes + 1024,
            header_count=wide.header_count + 4,
            header_timeout_s=wide.header_timeout_s,
            body_bytes=wide.body_bytes,
            body_timeout_s=wide.body_timeout_s,
            body_min_bytes_per_s=wide.body_min_bytes_per_s,
            connections=max(wide.connections, 4096),
            keep_alive_s=wide.keep_alive_s,
        ),
        drain=DrainPolicy(delay_s=0.0, idle_grace_s=0.0, timeout_s=settings.drain_timeout_s, interactive_grace_s=0.0),
        on_drain=app.begin_drain,
        before_drain=fronts.drain,
        control=servers.append,
        alongside=fronts,
        stats=EdgeStats(),
        streamed=longest_body(settings),
        ready=lambda _: fronts.begin(begun),
    )
    if problems:
        raise FrontsError(problems[0])
