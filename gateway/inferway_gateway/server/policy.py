"""What the edge allows, how it ends, and what it counts: plain values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.stats import Histogram


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """Limits of the HTTP edge. Sizes are bytes, times are seconds. None of them can be switched off.

    Deadlines are looked at every ``tick_s``, so one may be up to twice that late and is never early.
    """

    header_bytes: int = 16 * 1024
    """The request line and the headers together; 431 beyond it. Trailers of a chunked body count alike."""
    header_count: int = 100
    """Headers of one request; 431 beyond it."""
    header_timeout_s: float = 10.0
    """From the first byte of a request, or from the connection for its first one, to the end of its headers; 408."""
    body_bytes: int = 128 * 1024 * 1024
    """A request body as it comes over the wire; 413 beyond it."""
    body_timeout_s: float = 30.0
    """For a body to arrive, and for an answer to be taken off our hands, besides the time that
    ``body_min_bytes_per_s`` grants for what has moved already; 408, or a cut connection where an answer is stuck."""
    body_min_bytes_per_s: int = 64 * 1024
    """The average rate that a body must keep up once ``body_timeout_s`` is used up."""
    chunk_count: int = 65_536
    """Chunks of one chunked body; 400 beyond it. Each costs some 60 bytes and a call."""
    incomplete_bytes: int = 1024 * 1024 * 1024
    """Bytes of bodies that are still arriving, all connections together. Beyond it the oldest ones give way."""
    connections: int = 4096
    """Open connections of the process. Beyond it the oldest incomplete request, else the longest idle connection
    gives way; where all are at work the newcomer gets 503."""
    connections_per_source: int = 256
    """The same for one client address. Loopback and Unix sockets are exempt: behind a proxy on this machine everybody
    comes from there."""
    keep_alive_s: float = 75.0
    """How long a connection may be idle. Longer than the pools of the usual clients keep one, so that it is they who
    close it and no request runs into a closing connection."""
    linger_s: float = 5.0
    """How long a connection that we close goes on reading and throwing away what the peer is still sending. Without it
    the kernel answers those bytes with a reset, and the peer loses the answer that says why."""
    tick_s: float = 0.25
    """How often deadlines are looked at."""


@dataclass(frozen=True, slots=True)
class DrainPolicy:
    """How a server ends that got SIGTERM. Times are seconds.

    1. ``on_drain`` is called, so that readiness turns false. New connections are still taken, every answer says
       ``Connection: close``.
    2. After ``delay_s`` the listener closes, without losing a connection that the kernel has taken already.
    3. Connections that were idle all along close when ``idle_grace_s`` is over, counted from the signal: before that
       their next request is answered like any other.
    4. Requests at work have ``timeout_s`` after step 2; what is left then is cancelled and counted.

    SIGINT, somebody at a terminal, skips ``delay_s`` and grants idle connections ``interactive_grace_s``. A second
    signal ends everything at once.
    """

    delay_s: float = 5.0
    idle_grace_s: float = 5.0
    timeout_s: float = 20.0
    interactive_grace_s: float = 0.25


@dataclass(slots=True)
class EdgeStats:
    """What the edge counts, written on the event loop only. ``open`` is a gauge."""

    open: int = 0
    """Connections now."""
    accepted: int = 0
    """Connections ever."""
    requests: int = 0
    """Answers completed, whoever wrote them."""
    refused: dict[str, int] = field(default_factory=dict)
    """Requests that the edge answered itself, by contract code."""
    expired: dict[str, int] = field(default_factory=dict)
    """Connections that a deadline ended, by what they were doing: header, body, send, idle."""
    evicted: int = 0
    """Connections that gave way to others at a limit."""
    disconnected: int = 0
    """Callers that went away before their answer was complete."""
    cancelled: int = 0
    """Requests that the drain's time limit cut off."""
    lag: Histogram = field(default_factory=Histogram)
    """How late the event loop ran the edge's timer, in seconds, one observation a tick."""
