"""What the connections of one process share: limits, the coarse clock, the caps, and whether the server drains.

Deadlines cost nothing per request here. A connection only notes the moment at which it becomes too slow; one timer for
all of them looks every ``tick_s`` which of these moments have passed. (A timer per request, which uvicorn sets and
cancels for the keep-alive, costs 1.5 µs on uvloop.) For the same reason ``now`` is read once a tick. It is then set one
tick ahead, so that a deadline counted from it may be late by up to two ticks and is never early.
"""

from __future__ import annotations

import asyncio
import heapq
import ipaddress
import logging
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from .policy import EdgeLimits, EdgeStats

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, HTTPScope

    from .protocol import EdgeProtocol

logger = logging.getLogger("inferway.edge")

Streamed = Callable[["HTTPScope"], int | None]
AtOnce = Callable[[Any, bytes | memoryview], tuple[int, list[tuple[bytes, bytes]], bytes] | None]

_CROWD: Final = 4
"""Connections from which on answers are written in a row."""
_TEMPLATES: Final = 256
_EVICT_AT_ONCE: Final = 16
"""Connections that give way together at the cap: looking for them takes some 0.5 ms with 4096, too much for each."""


class Edge:
    """Shared state of all connections of one server.

    Args:
        app: the ASGI 3 application.
        limits, stats: see ``policy``.
        fast: tells for a request's scope whether it may begin in the very callback that received it, without a task of
            its own until it first has to wait. Until then ``asyncio.current_task()`` gives a stand-in that can be
            cancelled and used by ``asyncio.timeout``; anyio's cancel scopes must not be open across the first wait.
        at_once: may answer a request whose body is complete, in the callback that received it, with status, headers and
            body. None, or an exception, has the application called as usual.
        streamed: tells for the scope of a PUT how many bytes its body may have, where the application takes it in
            pieces; None where it is like any other.
    """

    def __init__(
        self,
        app: ASGI3Application,
        limits: EdgeLimits,
        stats: EdgeStats,
        fast: Callable[[HTTPScope], bool] | None = None,
        at_once: AtOnce | None = None,
        streamed: Streamed | None = None,
    ) -> None:
        self.app = app
        self.limits = limits
        self.stats = stats
        self.fast = fast
        self.at_once = at_once
        self.streamed = streamed
        self.connections: set[EdgeProtocol] = set()
        self.paused: set[EdgeProtocol] = set()
        """Connections that nothing is read from at present."""
        self.tasks: set[asyncio.Task[None]] = set()
        self.incomplete_bytes = 0
        self.draining = False
        self.now = 0.0
        self.idle_until = 0.0
        """Until when a connection that becomes idle now may be so."""
        self.good_hosts: set[bytes] = set()
        self.heads: dict[int, bytes] = {}
        """Status to the first lines of an answer, with the date; emptied once a second."""
        self.templates: dict[tuple[int, tuple[bytes, ...]], tuple[bytes, int]] = {}
        """Status and header names to the head they make, and which of the headers is Content-Length. Emptied alike."""
        self._date = b""
        self._date_at = -1.0
        self._sources: dict[str, int] = {}
        self._grace_end = float("inf")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._empty: asyncio.Event | None = None
        self._unsent: list[EdgeProtocol] = []

    # --- answers ---------------------------------------------------------------------------------------------------

    def write(self, connection: EdgeProtocol, answer: bytes) -> None:
        """Write a complete small answer, together with those of the other connections that are ready now.

        A write wakes the process on the other end. Where the next answer follows in some 40 µs, that process has fallen
        asleep again by then, and waking it costs more than writing. So answers are put off until every request that
        has arrived is worked off, and go out in a row: with 64 connections 53 instead of 68 µs of CPU a request
        (wrk, 2 virtual cores, November 2026). A few connections gain nothing and get theirs at once.
        """
        if len(self.connections) < _CROWD:
            connection.transport.write(answer)
            return
        if not self._unsent:
            connection.loop.call_soon(self._flush)
        connection.unsent = answer
        self._unsent.append(connection)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        for connection in unsent:
            connection.flush()

    # --- the clock -------------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to keep time. Call before the first connection."""
        self._loop = loop
        self._empty = asyncio.Event()
        self._due = loop.time()
        self._tick()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        assert self._loop is not None
        now = self._loop.time()
        self.stats.lag.observe(max(0.0, now - self._due))
        self.now = now + self.limits.tick_s
        self.idle_until = self.first_deadline(self.limits.keep_alive_s)
        if now - self._date_at >= 1.0:
            self._date_at = now
            self._date = formatdate(usegmt=True).encode("ascii")
            self.heads.clear()
            self.templates.clear()
        for connection in list(self.paused):
            connection.look()
        late = [connection for connection in self.connections if connection.deadline <= now]
        for connection in late:
            try:
                connection.expire(now)
            except Exception:  # the clock must go on whatever one connection does
                logger.exception("ending a connection failed")
                connection.abort()
        self._due = now + self.limits.tick_s
        self._timer = self._loop.call_at(self._due, self._tick)

    def head(self, status: int) -> bytes:
        """Status line and date, without the last line end; remembered until the date changes."""
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = ""
        head = self.heads[status] = b"HTTP/1.1 %d %s\r\ndate: %s" % (status, phrase.encode("ascii"), self._date)
        return head

    def remember(self, status: int, names: tuple[bytes, ...], template: bytes, at: int) -> None:
        """Keep the template of a head for a second."""
        if len(self.templates) < _TEMPLATES:
            self.templates[status, names] = (template, at)

    # --- connections -----------------------------------------------------------------------------------------------

    def opened(self, connection: EdgeProtocol) -> bool:
        """Count a new connection; False: there is no room for it."""
        stats, limits = self.stats, self.limits
        stats.accepted += 1
        connection.number = stats.accepted
        room = True
        if len(self.connections) >= limits.connections:
            room = self._evict(self.connections, _EVICT_AT_ONCE)
        source = connection.source = _source(connection.client)
        if source is not None:
            mine = self._sources.get(source, 0)
            self._sources[source] = mine + 1
            if mine >= limits.connections_per_source:
                room = self._evict([c for c in self.connections if c.source == source], 1)
        self.connections.add(connection)
        stats.open = len(self.connections)
        return room

    def closed(self, connection: EdgeProtocol) -> None:
        self.connections.discard(connection)
        self.paused.discard(connection)
        self.stats.open = len(self.connections)
        source = connection.source
        if source is not None:
            left = self._sources[source] - 1
            if left:
                self._sources[source] = left
            else:
                del self._sources[source]
        if self.draining and not self.connections and self._empty is not None:
            self._empty.set()

    def first_deadline(self, timeout_s: float) -> float:
        """Until when a connection without a request may live on."""
        return min(self.now + timeout_s, self._grace_end)

    def holds(self, change: int) -> None:
        """Count bytes of incomplete bodies; at the limit the oldest ones give way."""
        self.incomplete_bytes += change
        if change > 0 and self.incomplete_bytes > self.limits.incomplete_bytes:
            self._evict([c for c in self.connections if c.receiving is not None], 1)

    def _evict(self, among: set[EdgeProtocol] | list[EdgeProtocol], count: int) -> bool:
        """End those that have waited longest for their own peer: incomplete requests first, idle ones then."""
        waiting: list[tuple[bool, float, int, EdgeProtocol]] = []
        for connection in among:
            since = connection.waiting_since()
            if since is not None:
                waiting.append((connection.idle, since, connection.number, connection))
        for _, _, _, connection in heapq.nsmallest(min(count, max(1, len(waiting) // 8)), waiting):
            self.stats.evicted += 1
            connection.evict()
        return bool(waiting)

    # --- the end ---------------------------------------------------------------------------------------------------

    def drain(self, idle_grace_s: float) -> None:
        """From now on every answer closes its connection; idle ones have ``idle_grace_s`` left for one more request."""
        assert self._loop is not None
        self.draining = True
        self._grace_end = self._loop.time() + idle_grace_s
        self.idle_until = self.first_deadline(self.limits.keep_alive_s)
        for connection in self.connections:
            connection.hurry(self._grace_end)
        if not self.connections and self._empty is not None:
            self._empty.set()

    async def emptied(self) -> None:
        """Wait until the draining edge has neither connections nor requests at work."""
        assert self._empty is not None
        while self.connections or self.tasks:
            if self.connections:
                self._empty.clear()
                await self._empty.wait()
            if self.tasks:
                await asyncio.wait(self.tasks)

    async def cut(self) -> int:
        """Cancel what is still at work and close every connection at once; returns how many requests that ended."""
        count = sum(1 for connection in self.connections if connection.busy)
        tasks = set(self.tasks)
        self.stats.cancelled += max(count, len(tasks))
        for task in tasks:
            task.cancel("the server ends")
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        for connection in list(self.connections):
            connection.abort()
        return max(count, len(tasks))


def _source(client: tuple[str, int] | None) -> str | None:
    """What a connection is counted under: its address, of IPv6 the /64 that one host has; None for exempt ones."""
    if client is None:
        return None
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return client[0]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return None if address.is_loopback else address.exploded[:19]
        address = address.ipv4_mapped
    return None if address.is_loopback else str(address)
