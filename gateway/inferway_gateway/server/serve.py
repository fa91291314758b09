"""From an ASGI application to a listening process, and to its end without losing a request.

The theory of the end. A client keeps a connection and may send its next request at any moment, also in the one in which
we close it; and the kernel takes connections for us that we have not seen. A request is lost when we close something
that already holds it. So nothing is closed that may: each connection learns with its next answer that it is the last
one (``Connection: close``), and is closed after it; connections that have no next request are closed as a server closes
idle ones at any time, after a grace; and before the listener closes, the kernel is told to take no more connections and
those it has taken are served. Stock uvicorn 0.54 loses the next request of every busy connection (64 of 64).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import resource
import select
import signal
import socket
import stat
import struct
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import uvicorn
import uvloop

from .edge import AtOnce, Edge, Streamed
from .policy import DrainPolicy, EdgeLimits, EdgeStats
from .protocol import EdgeProtocol

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, HTTPScope

logger = logging.getLogger("inferway.server")

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_BACKLOG: Final = 2048
_FORCED_SHUTDOWN_S: Final = 1.0
_SPARE_FILES: Final = 256
"""Open files besides connections: libraries, models, database."""
_SETTLE_S: Final = 0.1
"""For handshakes under way to end: some round trips. Found by a client on loopback in one of 200 drains without it."""
_SO_ATTACH_FILTER: Final = 26  # Linux, asm-generic/socket.h; not in Python's socket module
_SO_DETACH_FILTER: Final = 27
_DROP_SYN: Final = (
    # Classic BPF, (code, jump if true, jump if false, operand); a TCP socket's filter sees packets from the TCP header.
    (0x30, 0, 0, 13),  # load the byte with the flags
    (0x45, 0, 1, 0x02),  # is SYN set?
    (0x06, 0, 0, 0),  # yes: keep nothing of it
    (0x06, 0, 0, 0xFFFFFFFF),  # no: keep all
)


class EdgeServer(uvicorn.Server):
    """uvicorn's start-up and lifespan, with our connections and our end.

    Args:
        app, limits, stats, fast, at_once, streamed: see ``Edge``.
        drain: see ``DrainPolicy``.
        on_drain: called once, when the end begins.
        sockets: bound sockets to listen on.
        own_sockets: they belong to this process alone, so it may stop the kernel's accepting before it closes them.
        before_drain: awaited when the end has begun and before anything closes; told whether it was SIGINT that began
            it. A second signal ends the waiting.
        ready: called with the first socket's port (0 for a Unix socket) once connections are taken.
    """

    def __init__(
        self,
        app: ASGI3Application,
        *,
        limits: EdgeLimits,
        drain: DrainPolicy,
        on_drain: Callable[[], None],
        sockets: Sequence[socket.socket],
        own_sockets: bool = True,
        stats: EdgeStats | None = None,
        fast: Callable[[HTTPScope], bool] | None = None,
        at_once: AtOnce | None = None,
        streamed: Streamed | None = None,
        before_drain: Callable[[bool], Awaitable[None]] | None = None,
        ready: Callable[[int], None] | None = None,
    ) -> None:
        self.edge = Edge(app, limits, stats if stats is not None else EdgeStats(), fast, at_once, streamed)
        config = uvicorn.Config(
            app,
            # uvicorn calls what it is given; that it is annotated as a class or a name is narrower than its use.
            http=cast(Any, partial(EdgeProtocol, edge=self.edge)),
            ws="none",
            lifespan="on",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=_BACKLOG,
        )
        super().__init__(config)
        self._drain = drain
        self._on_drain = on_drain
        self._sockets = list(sockets)
        self._own_sockets = own_sockets
        self._before_drain = before_drain
        self._ready = ready
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()
        self._interactive = False
        self._draining = False
        self._ended = False

    async def run_until_stopped(self) -> None:
        """Start, serve until ``stop`` or a signal, drain.

        Cancelling it ends everything at once, as a second signal does.

        Raises:
            SystemExit: the application's lifespan did not start; its log says why.
        """
        try:
            await self.serve(self._sockets)
        except asyncio.CancelledError:
            self._forced.set()
            if self.started and not self._ended:
                await self.shutdown()
            raise

    def stop(self, *, interactive: bool = False) -> None:
        """Begin to drain; the second call ends everything at once."""
        if not self._stopping.is_set():
            self._interactive = interactive
            self.should_exit = True
            self._stopping.set()
        else:
            self._forced.set()

    # --- what uvicorn's Server calls -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT on the loop. Unlike uvicorn this does not raise them again after the end: a process
        that was told to stop and did has not failed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled, number)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _signalled(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            logger.warning("got %s again: ending at once", number.name)
        else:
            logger.info("got %s: draining", number.name)
        self.stop(interactive=number is signal.SIGINT)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.edge.start(asyncio.get_running_loop())
        await super().startup(sockets=sockets)
        if self.started and self._ready is not None:
            name = self._sockets[0].getsockname()
            self._ready(name[1] if isinstance(name, tuple) else 0)

    async def main_loop(self) -> None:
        await self._stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        policy = self._drain
        edge = self.edge
        if not self._draining:
            self._draining = True
            self._on_drain()
            if self._before_drain is not None:
                await self._unless_forced(self._before_drain(self._interactive))
        edge.drain(policy.interactive_grace_s if self._interactive else policy.idle_grace_s)
        if not self._interactive:
            await self._unless_forced(asyncio.sleep(policy.delay_s))
        await self._unless_forced(self._close_listeners())
        if not await self._unless_forced(edge.emptied(), policy.timeout_s):
            count = await edge.cut()
            if count:
                logger.warning("ended %d requests that were still at work", count)
        for server in self.servers:
            server.close()
        edge.stop()
        self._ended = True
        if self._forced.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), _FORCED_SHUTDOWN_S)
        else:
            await self.lifespan.shutdown()

    async def _unless_forced(self, work: Any, timeout_s: float | None = None) -> bool:
        """Do ``work`` until it is done, its time is over or everything is to end at once; True: it is done."""
        task = asyncio.ensure_future(work)
        forced = asyncio.ensure_future(self._forced.wait())
        try:
            await asyncio.wait((task, forced), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            return task.done() and task.exception() is None
        finally:
            for waiting in (task, forced):
                waiting.cancel()
            await asyncio.wait((task, forced))

    async def _close_listeners(self) -> None:
        """Take no new connections; serve those that the kernel has taken."""
        if self._own_sockets:
            for listener in self._sockets:
                _take_no_more(listener)
            if any(listener.family != socket.AF_UNIX for listener in self._sockets):
                await asyncio.sleep(_SETTLE_S)
            # No event tells that none is left; the loop itself takes them meanwhile.
            while select.select(self._sockets, [], [], 0)[0]:  # noqa: ASYNC110
                await asyncio.sleep(0)
        for server in self.servers:
            server.close()


async def serve(
    app: ASGI3Application,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    uds: str | Path | None = None,
    limits: EdgeLimits | None = None,
    drain: DrainPolicy | None = None,
    on_drain: Callable[[], None] = lambda: None,
    sockets: Sequence[socket.socket] | None = None,
    own_sockets: bool | None = None,
    before_drain: Callable[[bool], Awaitable[None]] | None = None,
    control: Callable[[EdgeServer], None] | None = None,
    alongside: contextlib.AbstractAsyncContextManager[Any] | None = None,
    ready: Callable[[int], None] | None = None,
    stats: EdgeStats | None = None,
    fast: Callable[[HTTPScope], bool] | None = None,
    at_once: AtOnce | None = None,
    streamed: Streamed | None = None,
) -> None:
    """Serve an ASGI application until SIGTERM or SIGINT, then drain. Runs on any loop; ``run`` brings uvloop.

    Args:
        host, port: TCP address; every address of a name is bound; port 0 takes a free one.
        uds: path of a Unix socket to listen on instead; one that nobody listens on any more is replaced.
        limits, drain: by default ``EdgeLimits()`` and ``DrainPolicy()``.
        on_drain: called when the end begins, for readiness to turn false.
        sockets: bound sockets to listen on instead; they are closed in the end, and may be shared with other processes.
        own_sockets: nobody else takes connections from them; by default so for those that were bound here.
        before_drain: see ``EdgeServer``.
        control: given the server before it starts, for somebody who wants to stop it.
        alongside: entered before the server starts, left after it has ended.
        ready: called with the port once connections are taken; 0 for a Unix socket.
        stats: what the edge counts is counted here.
        fast, at_once, streamed: which requests may begin without a task, be answered at once, and have long bodies, see
            ``Edge``.
    Raises:
        OSError: the address cannot be bound; nothing was started.
        SystemExit: the application's lifespan failed to start.
    """
    own = sockets is None
    alone = own if own_sockets is None else own_sockets
    bound = list(sockets) if sockets is not None else [bind_unix(uds)] if uds is not None else bind(host, port)
    try:
        server = EdgeServer(
            app,
            limits=limits or EdgeLimits(),
            drain=drain or DrainPolicy(),
            on_drain=on_drain,
            sockets=bound,
            own_sockets=alone,
            stats=stats,
            fast=fast,
            at_once=at_once,
            streamed=streamed,
            before_drain=before_drain,
            ready=ready,
        )
        if control is not None:
            control(server)
        async with alongside if alongside is not None else contextlib.nullcontext():
            await server.run_until_stopped()
    finally:
        for listener in bound:
            listener.close()
        if own and uds is not None:
            _remove(uds)


def run(app: ASGI3Application, *, ready: Callable[[int], None] | None = None, **options: Any) -> None:
    """``serve`` on uvloop, blocking; same arguments, same errors.

    Raises the limit on open files to what the connections need, as far as the hard limit allows. What is alive at the
    first request lives as long as the process, so it is taken out of the garbage collector's sight: full collections
    would else stop the loop for tens of milliseconds.
    """
    limits = options.get("limits") or EdgeLimits()
    _allow_files(limits.connections + _SPARE_FILES)

    def started(port: int) -> None:
        gc.collect()
        gc.freeze()
        if ready is not None:
            ready(port)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(app, ready=started, **options))


def bind(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Sockets bound to every address of ``host``, on one port.

    Args:
        shared: further sockets of this user may be bound to the same port, among which the kernel spreads connections.
    Raises:
        OSError: the name is unknown or an address is in use.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            listener = socket.socket(family, socket.SOCK_STREAM)
            bound.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and len(bound) > 1:
                address = (address[0], bound[0].getsockname()[1], *address[2:])
            listener.bind(address)
            # At once, or another process that binds the same port meanwhile is found out too late to say it well.
            listener.listen(_BACKLOG)
            listener.setblocking(False)
    except OSError:
        for listener in bound:
            listener.close()
        raise
    return bound


def bind_unix(path: str | Path) -> socket.socket:
    """A Unix socket bound to ``path``, which the owner and the group may use.

    Raises:
        OSError: somebody listens there already, or the path is something else than a socket.
    """
    path = Path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise FileExistsError(f"expected a Unix socket or nothing at {path}, found another file")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise OSError(f"somebody listens on {path} already")
            path.unlink()
        listener.bind(str(path))
        path.chmod(0o660)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _take_no_more(listener: socket.socket) -> None:
    """Have the kernel take no more connections for a listening socket, while those it has taken stay.

    TCP on Linux: a socket filter drops each SYN, so that a connecting peer repeats it after a second and then meets the
    closed port, or the next process on it. What belongs to handshakes under way passes: a peer whose last packet of it
    was dropped would think itself connected. Elsewhere the moment between the last accept and the close remains.
    """
    if listener.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            Path(listener.getsockname()).unlink()
    elif sys.platform == "linux":
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _DROP_SYN))
        with contextlib.suppress(OSError):
            listener.setsockopt(
                socket.SOL_SOCKET,
                _SO_ATTACH_FILTER,
                struct.pack("HL", len(_DROP_SYN), ctypes.addressof(program)),
            )


def take_again(listener: socket.socket) -> None:
    """Undo what a server that ended did to a listening socket which it shared with this process."""
    if sys.platform == "linux" and listener.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # ENOENT: nothing was done to it
            listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _allow_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        if limit < wanted:
            logger.warning("expected to be allowed %d open files, got %d: fewer connections can be open", wanted, limit)


def _remove(path: str | Path) -> None:
    Path(path).unlink(missing_ok=True)
