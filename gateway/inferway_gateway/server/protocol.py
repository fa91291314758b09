"""HTTP/1.1 on one connection: uvicorn's place in the server, with what an edge has to refuse and what it has to bound.

uvicorn makes one protocol object a connection and calls the application with ASGI; this class fits into that place
(``Config(http=...)``). It does not inherit from ``HttpToolsProtocol``: nothing of it would remain. What is different:

- **Bounds.** Headers are counted while they arrive (16 KiB, 100 fields), also before the parser has seen their end;
  headers, bodies and answers have deadlines; bodies, chunks and pipelined requests have limits; see ``policy``.
- **One meaning.** What two readers of HTTP could read differently is refused with 400 and the connection is closed: not
  exactly one Host, a repeated header of ``_ONCE``, Content-Length beside Transfer-Encoding, folded lines and whatever
  llhttp refuses in its strict mode. Errors have the contract's JSON body. They wait for earlier pipelined answers.
- **Whole bodies.** An application gets its body in one ``http.request`` message. A small one is complete when the
  application starts; a larger one is received straight into its final memory (no copy in user space) and handed over as
  a ``memoryview``. The application is started before a large body has arrived, so that it may refuse it, and nothing of
  such a body is read before it asks.
- **Leaving.** A caller that closes its side while its request is at work counts as gone, as with most servers: ASGI's
  ``http.disconnect`` and the extension ``inferway.disconnect`` tell. An answer that is written anyway is sent.
- **Speed.** No timer, no ``asyncio.Event`` and, for ``fast`` requests, no task per request; head and body leave in one
  system call instead of two.

One request and its answer are an ``Exchange``. A connection has at most one that is ``active`` (the application works
on it) and one that is ``receiving`` (its body is not complete); both may be the same. Others wait in ``queue``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import urllib.parse
from asyncio import _enter_task, _leave_task  # the documented way for foreign tasks, "Extending asyncio"
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, cast

import httptools
import numpy as np
from uvicorn.protocols.utils import get_local_addr, get_remote_addr

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent, HTTPScope

    from .edge import Edge

logger = logging.getLogger("inferway.edge")

DISCONNECT_EXTENSION: Final = "inferway.disconnect"
"""Name of the ASGI extension that tells when a caller goes away. Its value takes a callback without arguments and gives
a function that takes it back."""

FIELDS: Final = "inferway.headers"
"""Key of the scope with the request's headers as a dict, lower-case name to its last value. Only here: others have the
list alone."""

_ONCE: Final = frozenset(
    {
        b"host",
        b"authorization",
        b"x-api-key",
        b"content-type",
        b"content-length",
        b"content-encoding",
        b"transfer-encoding",
        b"expect",
        b"inference-header-content-length",
        b"inferway-timeout-ms",
        b"idempotency-key",
        b"x-request-id",
    }
)
"""Headers that a request may have only once: two readers may take different ones of several."""
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_HOSTS_REMEMBERED: Final = 1024
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_METHODS: Final = {name.encode(): name for name in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")}
_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}
_FIELD_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NAMES_REMEMBERED: Final = 256
_labels: dict[bytes, bytes] = {}
"""Checked names of response headers to the bytes that stand before their values."""
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding", b"connection"})

_JOIN_BELOW_BYTES: Final = 64 * 1024
"""Head and body up to this size are joined: copying them is cheaper than an output vector."""
_SINK_FROM_BYTES: Final = 128 * 1024
"""What must have arrived of a body before memory for all of it is taken. Memory that large is backed by the system in
pages of up to 2 MiB as it is written, so that a caller cannot take more than 16 times what it has sent."""
_UNREAD_LIMIT_BYTES: Final = 256 * 1024
"""A connection whose application answers without reading lives on if no more than this of the body is missing."""
_ALIGNMENT: Final = 64
_CHUNK_OVERHEAD_BYTES: Final = 64
"""Bytes of framing (size, extensions, line ends) that a chunk may have, on average, besides one allowance of the
header limit for the trailers."""
_NOTHING: Final = object()
_CHUNKED: Final = -1
_UNTIL_CLOSE: Final = -2
_NO_BODY: Final = -3
_CONTENT_LENGTH: Final = b"\r\ncontent-length: "


class _Refusal(Exception):
    """A request that the edge answers itself; raised inside the parser's callbacks."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class EdgeProtocol(asyncio.Protocol):
    """One connection. Made by uvicorn for each one that is accepted, with ``edge`` bound by ``serve``."""

    __slots__ = (
        "active",
        "app_state",
        "body_since",
        "boundary",
        "client",
        "closing",
        "deadline",
        "deaf",
        "edge",
        "eof",
        "extensions",
        "gone",
        "headers",
        "held",
        "leave_callbacks",
        "limit",
        "loop",
        "parser",
        "queue",
        "raw_left",
        "receiving",
        "refusal",
        "server",
        "source",
        "transport",
        "unparsed",
        "url",
        "write_paused",
        "writers",
    )

    def __init__(
        self,
        config: object,
        server_state: object,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        edge: Edge,
    ) -> None:
        self.edge = edge
        self.app_state = app_state
        self.loop = _loop or asyncio.get_running_loop()
        self.parser = httptools.HttpRequestParser(self)
        self.limit = edge.limits.header_bytes
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.server: tuple[str, int | None] | None = None
        self.client: tuple[str, int] | None = None
        self.source: str | None = None
        self.extensions: dict[str, Any] = {DISCONNECT_EXTENSION: self.on_leave}

        # What arrives.
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.boundary = True  # nothing of a further request has been seen
        self.unparsed = 0  # bytes of a header whose end has not been seen
        self.receiving: Exchange | None = None
        self.raw_left = -1  # bytes of a body that bypass the parser; -1: none do
        self.held = b""  # read, and not to be parsed before the queue is empty
        self.deaf = False  # what arrives is thrown away
        self.body_since = 0.0

        # What leaves.
        self.active: Exchange | None = None
        self.queue: deque[Exchange] = deque()
        self.refusal: tuple[int, bytes] | None = None
        self.write_paused = False
        self.writers: list[asyncio.Future[None]] = []
        self.leave_callbacks: list[Callable[[], None]] = []
        self.deadline = float("inf")
        self.eof = False  # the peer will send no more
        self.closing = False  # we will send no more
        self.gone = False  # the connection is lost

    # --- the transport's calls -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.server = get_local_addr(self.transport)
        self.client = get_remote_addr(self.transport)
        edge = self.edge
        self.deadline = edge.first_deadline(edge.limits.header_timeout_s)
        if not edge.opened(self):
            self.refuse(
                503,
                "queue_full",
                f"expected fewer than {edge.limits.connections} connections at work, got one more",
                linger=False,
            )

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        size = len(data)
        if self.unparsed + size <= self.limit and self.raw_left < 0 and not self.queue and not self.held:
            # Nearly every read: too short to hold a header that is too long.
            self.boundary = False
            if not self._feed(data):
                return
            if not self.boundary:
                self._incomplete(size)
            elif self.unparsed:
                self.unparsed = 0
        else:
            self._pieces(data)

    def eof_received(self) -> bool:
        if self.closing:
            return False
        self.eof = True
        active = self.active
        if self.receiving is not None or not self.boundary:
            self._left()
            self.refuse(400, "malformed_request", "expected a whole request, got the end of the connection")
            return not self.closing
        if active is None and not self.queue:
            return False
        self._left()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = self.deaf = self.closing = True
        self.deadline = float("inf")
        if self.receiving is not None:
            self.edge.holds(-self.receiving.held)
            self.receiving = None
        self.edge.closed(self)
        if not self.eof:
            self._left()
        self.queue.clear()
        self.held = b""
        self._wake_writers()
        # Bound methods of ours are in both: without them the connection is freed at once, not by the collector.
        self.extensions = {}
        self.parser = cast(httptools.HttpRequestParser, None)

    def pause_writing(self) -> None:
        self.write_paused = True
        self.deadline = min(self.deadline, self._flushed_by())

    def resume_writing(self) -> None:
        self.write_paused = False
        self._wake_writers()
        if self.closing:
            return
        if self.active is not None:
            if self.receiving is None:
                self.deadline = float("inf")
        elif self.queue:
            self.loop.call_soon(self._next)
        elif self.receiving is None and self.boundary:
            self._rest()

    # --- reading ---------------------------------------------------------------------------------------------------

    def _feed(self, data: bytes | memoryview) -> bool:
        """Have the parser read; False: nothing is left to do about these bytes."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrade(memoryview(data)[upgrade.args[0] :])
            return False
        except httptools.HttpParserError as error:
            self._unreadable(error)
            return False
        return True

    def _pieces(self, data: bytes) -> None:
        """Feed what may be too long for a header, so that no header gets longer than the limit unnoticed."""
        view = memoryview(data)
        while len(view) and not self.deaf:
            if self.held or self.queue:
                # Somebody pipelines faster than we answer.
                self.held += view
                self.transport.pause_reading()
                return
            if self.raw_left >= 0:
                piece = view[: self.raw_left]
                self.raw_left -= len(piece)
                self.on_body(bytes(piece))
                if not self.raw_left:
                    self._raw_complete()
                else:
                    self._incomplete(len(piece))
            else:
                receiving = self.receiving
                step = self.limit
                if receiving is not None and receiving.length > 0:
                    step = max(step, receiving.length - receiving.received)
                self.boundary = False
                piece = view[:step]
                if self._feed(piece):
                    if not self.boundary:
                        self._incomplete(len(piece))
                    else:
                        self.unparsed = 0
            view = view[len(piece) :]

    def _incomplete(self, size: int) -> None:
        """After ``size`` bytes that did not end with a request's end: begin what need not wait for it, keep bounds."""
        exchange = self.receiving
        edge = self.edge
        if self.deaf:
            return
        if exchange is None:
            if not self.unparsed and self.active is None:
                self.deadline = min(self.deadline, edge.first_deadline(edge.limits.header_timeout_s))
            self.unparsed += size
            if self.unparsed > self.limit or len(self.headers) > edge.limits.header_count:
                self._refuse_headers()
            return
        self.unparsed = 0
        if exchange.length < 0:
            exchange.fed += size
            overhead = exchange.fed - exchange.received - _CHUNK_OVERHEAD_BYTES * exchange.chunks
            if overhead > 2 * self.limit or len(self.headers) > edge.limits.header_count:
                self.refuse(400, "malformed_request", "expected chunks of a body, got more framing than body")
                return
        if not exchange.late:
            exchange.late = True
            self.deadline = float("inf")
            if self.active is None and not self.queue:
                self._start(exchange)
            elif self.active is not exchange:
                self.queue.append(exchange)
        if not self.deaf and not exchange.complete:
            self._flow(exchange)

    def _flow(self, exchange: Exchange) -> None:
        """Decide how the rest of an incomplete body comes in: not yet, in pieces, or straight into its memory."""
        if exchange.finished:
            self.transport.resume_reading()
        elif not exchange.wanted:
            self.transport.pause_reading()
        elif exchange.length - exchange.received >= self.limit and exchange.received >= _SINK_FROM_BYTES:
            _Sink(self, exchange).begin()
        else:
            self.transport.resume_reading()

    def _upgrade(self, rest: memoryview) -> None:
        """Go on with HTTP/1.1 after a request that offered something else, as RFC 9110, section 7.8 allows.

        llhttp believes that the connection is no longer HTTP and sees no body; so a fresh parser takes over and the
        body is cut off here.
        """
        exchange = self.receiving
        if self.deaf or exchange is None:
            return
        self.parser = httptools.HttpRequestParser(self)
        self.unparsed = 0
        if exchange.length > 0:
            self.raw_left = exchange.length
            if not len(rest):
                self._incomplete(0)
        else:
            self._complete(exchange)
        if len(rest):
            self.data_received(bytes(rest))

    def _raw_complete(self) -> None:
        exchange = self.receiving
        self.raw_left = -1
        self.unparsed = 0
        self.boundary = True
        if exchange is not None:
            self._complete(exchange)

    # --- the parser's calls ----------------------------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        self.boundary = False
        self.url = self.url + url if self.url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip()))

    def on_headers_complete(self) -> None:
        if self.deaf:
            return
        edge = self.edge
        headers = self.headers
        url = self.url
        self.headers = []
        self.url = b""
        fields = dict(headers)
        if len(fields) != len(headers):
            _check_repeated(headers)
        if len(headers) > edge.limits.header_count:
            raise self._headers_refusal()
        parser = self.parser
        version = "1.1"
        connection = fields.get(b"connection")
        keep_alive = parser.should_keep_alive()
        if connection is not None or not keep_alive:
            # Without the header, llhttp keeps alive what is HTTP/1.1 and nothing else; asking costs 0.3 µs.
            version = parser.get_http_version()
            if version not in ("1.1", "1.0"):
                raise _Refusal(400, "malformed_request", f"expected HTTP/1.1 or HTTP/1.0, got HTTP/{version}")
        host = fields.get(b"host")
        if host not in edge.good_hosts:
            self._check_host(host, version)
        length = 0
        declared = fields.get(b"content-length")
        if declared is not None:
            length = int(declared)
        elif b"transfer-encoding" in fields:
            self._check_coding(fields[b"transfer-encoding"], version)
            length = -1
        raw_path, _, query = url.partition(b"?")
        if raw_path[:1] != b"/" or b"#" in url:
            raw_path, query = _target(url)
        path = raw_path.decode("ascii")
        if "%" in path:
            path = urllib.parse.unquote(path)
        method = parser.get_method()
        name = _METHODS.get(method)
        if name is None:
            name = method.decode("ascii")
            if name == "CONNECT":
                raise _Refusal(501, "unsupported", "expected a request for this server, got CONNECT")
        scope: HTTPScope = {
            "type": "http",
            "asgi": _ASGI,  # type: ignore[typeddict-item]  # the version is a Literal there
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": "http",
            "root_path": "",
            "headers": headers,
            "state": self.app_state.copy(),
            "method": name,
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "extensions": self.extensions,
            FIELDS: fields,
        }
        exchange = Exchange(self, scope, length, keep_alive)
        if version == "1.0":
            exchange.old = True
        if b"expect" in fields and version == "1.1" and fields[b"expect"].lower() == b"100-continue":
            exchange.expects = True
        head = fields.get(b"inference-header-content-length")
        if head is not None and head.isdigit() and len(head) < 10:
            exchange.align_at = int(head)
        if b"upgrade" in fields and parser.should_upgrade():
            if length < 0:
                raise _Refusal(501, "unsupported", "expected no Upgrade on a chunked request")
            exchange.upgrade = True
        if len(self.queue) >= edge.limits.pipelined:
            raise _Refusal(
                400, "malformed_request", f"expected at most {edge.limits.pipelined} pipelined requests, got more"
            )
        self.receiving = exchange

    def on_body(self, body: bytes) -> None:
        exchange = self.receiving
        if exchange is None or self.deaf:
            return
        exchange.received += len(body)
        if exchange.finished:
            return
        if exchange.received == len(body):
            exchange.body = body
        else:
            self._more_body(exchange, body)
        if exchange.length < 0 and exchange.received > self.edge.limits.body_bytes:
            raise _Refusal(
                413,
                "payload_too_large",
                f"expected a body of at most {self.edge.limits.body_bytes} bytes, got more",
            )

    def on_chunk_header(self) -> None:
        exchange = self.receiving
        if exchange is not None:
            exchange.chunks += 1
            if exchange.chunks > self.edge.limits.chunk_count:
                raise _Refusal(
                    400, "malformed_request", f"expected at most {self.edge.limits.chunk_count} chunks, got more"
                )

    def on_message_complete(self) -> None:
        exchange = self.receiving
        if exchange is None or exchange.upgrade:
            return
        if self.headers:
            self.headers = []  # trailers: nobody checked them, so nobody gets them
        self._complete(exchange)

    def _more_body(self, exchange: Exchange, body: bytes) -> None:
        if exchange.parts is None:
            exchange.parts = [cast(bytes, exchange.body)]
            exchange.hold(exchange.received - len(body))
        exchange.parts.append(body)
        exchange.hold(len(body))

    # --- requests --------------------------------------------------------------------------------------------------

    def _complete(self, exchange: Exchange) -> None:
        """The whole request is here."""
        self.receiving = None
        self.boundary = True
        exchange.complete = True
        if exchange.late:
            exchange.gather()
            if exchange.finished:
                if self.active is exchange:
                    self._done(exchange)
            elif self.active is exchange:
                self.deadline = float("inf")
                exchange.wake()
        elif self.active is None and not self.queue and not self.write_paused:
            self._start(exchange)
        else:
            self.queue.append(exchange)

    def _start(self, exchange: Exchange) -> None:
        """Call the application."""
        edge = self.edge
        self.active = exchange
        if exchange.complete:
            self.deadline = float("inf")
        work = exchange.run(edge.app)
        fast = edge.fast
        loop = self.loop
        task: asyncio.Task[None]
        if fast is None or not fast(exchange.scope):
            task = loop.create_task(work)
        else:
            context = copy_context()
            _enter_task(loop, exchange)  # type: ignore[arg-type]  # a stand-in, see Edge
            try:
                awaited = context.run(work.send, None)
            except StopIteration:
                return
            finally:
                _leave_task(loop, exchange)  # type: ignore[arg-type]
            task = asyncio.Task(_Begun(work, awaited), loop=loop, context=context)
        exchange.task = task
        edge.tasks.add(task)
        task.add_done_callback(edge.tasks.discard)

    def _next(self) -> None:
        """Begin the next request of the queue, or go on reading."""
        if self.active is not None or self.gone or self.write_paused:
            return
        if self.queue:
            self._start(self.queue.popleft())
        elif self.refusal is not None:
            self._write_refusal(*self.refusal)
        elif self.held:
            held, self.held = self.held, b""
            self.transport.resume_reading()
            self.data_received(held)

    def _done(self, exchange: Exchange) -> None:
        """An answer is complete, or its application is done; what comes next?"""
        if self.active is not exchange or self.closing:
            return
        if not exchange.keep_alive:
            if exchange.ours or not exchange.complete:
                self._close_gently()
            else:
                self._close()
            return
        if not exchange.complete:
            self._expect_body()
            self._flow(exchange)  # the rest of the body is thrown away, then it goes on
            return
        self.active = None
        if self.queue or self.held or self.refusal is not None:
            self.loop.call_soon(self._next)
        elif self.eof:
            self._close()
        elif self.receiving is None:
            if self.boundary:
                self._rest()
            else:
                self.deadline = self.edge.first_deadline(self.edge.limits.header_timeout_s)

    def _rest(self) -> None:
        """Idle: wait for the next request."""
        if not self.write_paused:  # else the peer has yet to take its answer, and has its time for that
            edge = self.edge
            self.deadline = edge.now + edge.limits.keep_alive_s

    def _expect_body(self) -> None:
        """From now on it is the peer who keeps us waiting for the body."""
        edge = self.edge
        self.body_since = edge.now
        self.deadline = edge.now + edge.limits.body_timeout_s

    # --- refusing and closing --------------------------------------------------------------------------------------

    def _unreadable(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
        if self.deaf:
            return  # what follows a request that closes its connection
        if isinstance(cause, _Refusal):
            self.refuse(cause.status, cause.code, cause.message)
        elif cause is not None:
            logger.error("reading a request failed unexpectedly", exc_info=cause)
            self.refuse(500, "internal", "internal error while reading the request")
        else:
            last = self.queue[-1] if self.queue else self.active
            if last is not None and not last.keep_alive:
                return
            self.refuse(400, "malformed_request", f"expected an HTTP/1.1 request, got: {error}")

    def _headers_refusal(self) -> _Refusal:
        limits = self.edge.limits
        return _Refusal(
            431,
            "headers_too_large",
            f"expected at most {limits.header_count} headers in at most {limits.header_bytes} bytes, got more",
        )

    def _refuse_headers(self) -> None:
        refusal = self._headers_refusal()
        self.refuse(refusal.status, refusal.code, refusal.message)

    def refuse(self, status: int, code: str, message: str, *, linger: bool = True) -> None:
        """Answer in the application's place, after the answers that come before, and close the connection."""
        if self.closing or self.refusal is not None:
            return
        self.deaf = True
        refused = self.edge.stats.refused
        refused[code] = refused.get(code, 0) + 1
        receiving = self.receiving
        request_id = _request_id(receiving)
        logger.info("refused a request with %d: %s", status, message, extra={"request_id": request_id, "code": code})
        answer = _error(status, code, message, request_id)
        if receiving is not None:
            self.edge.holds(-receiving.held)
            receiving.held = 0
            self.receiving = None
            if receiving is self.active:
                started, receiving.finished = receiving.started, True
                receiving.wake()
                if started:
                    self.abort()  # in the middle of an answer there is nothing left to say
                    return
                self.active = None
            elif receiving in self.queue:
                self.queue.remove(receiving)
        if self.active is not None or self.queue:
            self.refusal = (status, answer)
            self.transport.resume_reading()
        else:
            self._write_refusal(status, answer, linger)

    def _write_refusal(self, status: int, answer: bytes, linger: bool = True) -> None:
        self.edge.stats.requests += 1
        self.transport.write(self.edge.heads.get(status, b"") or self.edge.head(status))
        self.transport.write(answer)
        if linger and not self.eof:
            self._close_gently()
        else:
            self._close()

    def _close_gently(self) -> None:
        """Say that nothing more comes, and hear the peer out for a while. See ``EdgeLimits.linger_s``."""
        self.deaf = self.closing = True
        if self.eof or self.transport.is_closing():
            self._close()
            return
        self.transport.resume_reading()
        self.transport.write_eof()
        self.deadline = self._flushed_by() + self.edge.limits.linger_s

    def _close(self) -> None:
        """Close once everything is sent; cut after a while if the peer does not take it."""
        self.deaf = self.closing = True
        self.deadline = self._flushed_by()
        self.transport.close()

    def _flushed_by(self) -> float:
        """Until when the peer has to have taken what is written."""
        limits = self.edge.limits
        buffered = self.transport.get_write_buffer_size()
        if not buffered:
            return self.edge.now
        return self.edge.now + limits.body_timeout_s + buffered / limits.body_min_bytes_per_s

    def abort(self) -> None:
        self.deaf = self.closing = True
        self.transport.abort()

    # --- deadlines, caps, the end ----------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return (self.active is not None and not self.active.finished) or bool(self.queue)

    @property
    def idle(self) -> bool:
        return self.active is None and self.receiving is None and self.boundary and not self.queue

    def waiting_since(self) -> float | None:
        """Since when the connection waits for its peer; None while it is the peer that waits for us."""
        limits = self.edge.limits
        if self.closing:
            return None
        if self.receiving is not None:
            return self.body_since if self.active is self.receiving and self.receiving.wanted else None
        if self.active is not None or self.queue:
            return None
        return self.deadline - (limits.keep_alive_s if self.boundary else limits.header_timeout_s)

    def evict(self) -> None:
        if self.idle:
            self._close()
        else:
            self.refuse(
                408, "request_timeout", "expected the whole request sooner: others wait for this place", linger=False
            )

    def hurry(self, grace_end: float) -> None:
        """The server drains: a connection that rests has until ``grace_end``."""
        if self.idle:
            self.deadline = min(self.deadline, grace_end)

    def expire(self, now: float) -> None:
        """The deadline has passed."""
        limits = self.edge.limits
        expired = self.edge.stats.expired
        if self.closing:
            self.abort()
            return
        if self.write_paused:
            reason = "send"
            self.abort()
        elif self.receiving is not None:
            granted = limits.body_timeout_s + self.receiving.received / limits.body_min_bytes_per_s
            if self.body_since + granted > now:
                self.deadline = self.body_since + granted
                return
            reason = "body"
            self.refuse(
                408,
                "request_timeout",
                f"expected the body within {limits.body_timeout_s:g} s and at {limits.body_min_bytes_per_s} bytes/s "
                f"after that, got {self.receiving.received} bytes",
            )
        elif self.active is not None or self.queue:
            self.deadline = float("inf")
            return
        elif not self.boundary:
            reason = "header"
            self.refuse(408, "request_timeout", f"expected the headers within {limits.header_timeout_s:g} s")
        else:
            reason = "idle"
            self._close()
        expired[reason] = expired.get(reason, 0) + 1

    def on_leave(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback`` called when the caller goes away; returns the function that takes it back."""
        if self.eof or self.gone:
            self.loop.call_soon(callback)
            return lambda: None
        callbacks = self.leave_callbacks
        callbacks.append(callback)

        def withdraw() -> None:
            if callback in callbacks:
                callbacks.remove(callback)

        return withdraw

    def _left(self) -> None:
        """The caller went away: nobody waits for what is at work."""
        active = self.active
        if active is not None and not active.finished:
            self.edge.stats.disconnected += 1
        self.queue.clear()
        callbacks, self.leave_callbacks = self.leave_callbacks, []
        for callback in callbacks:
            callback()
        if active is not None:
            active.wake()

    def _wake_writers(self) -> None:
        writers, self.writers = self.writers, []
        for writer in writers:
            if not writer.done():
                writer.set_result(None)

    def _check_host(self, host: bytes | None, version: str) -> None:
        if host is None:
            if version == "1.1":
                raise _Refusal(400, "malformed_request", "expected exactly one Host header, got none")
            return
        if not _HOST.fullmatch(host):
            raise _Refusal(400, "malformed_request", "expected Host as a name or address and an optional port")
        good = self.edge.good_hosts
        if len(good) >= _HOSTS_REMEMBERED:
            good.clear()
        good.add(host)

    def _check_coding(self, coding: bytes, version: str) -> None:
        if version == "1.0":
            raise _Refusal(400, "malformed_request", "expected no Transfer-Encoding in HTTP/1.0")
        if coding.lower() != b"chunked":
            raise _Refusal(501, "unsupported", "expected Transfer-Encoding chunked, got another coding")


class Exchange:
    """One request and its answer; ``receive`` and ``send`` are what the application is given."""

    # Defaults live in the class: most requests never touch them, and an instance costs what its __init__ assigns.
    task: asyncio.Task[None] | None = None
    # The request.
    received = 0
    body: bytes | memoryview = b""
    parts: list[bytes] | None = None
    complete = False
    late = False  # the body was not complete at once
    wanted = False  # the application asked for the body
    delivered = False
    expects = False  # the peer waits for 100 Continue
    upgrade = False  # it offered another protocol, and the parser stopped at its headers
    held = 0  # bytes counted in Edge.incomplete_bytes
    fed = 0  # bytes of a chunked body with its framing
    chunks = 0
    align_at = 0  # position in the body that should be aligned in memory
    old = False  # HTTP/1.0
    waiters: list[asyncio.Future[None]] | None = None
    # The answer.
    status = 0
    response_headers: Iterable[tuple[bytes, bytes]] = ()
    started = False
    finished = False
    left = 0  # bytes that Content-Length still promises, or one of the three below
    ours = False  # it is we who want to close the connection

    def __init__(self, connection: EdgeProtocol, scope: HTTPScope, length: int, keep_alive: bool) -> None:
        self.connection = connection
        self.scope = scope
        self.length = length  # declared, -1 for a chunked body
        self.keep_alive = keep_alive

    # --- the application's side ------------------------------------------------------------------------------------

    async def run(self, app: Any) -> None:
        """Call the application and make sure that the caller gets an end."""
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            self._fail(503, "shutting_down", "the gateway shuts down and could not wait for this request any longer")
        except Exception as error:
            connection = self.connection
            if connection.gone or connection.eof:
                # A caller that leaves is no defect: Starlette raises ClientDisconnect when it sees that.
                if not isinstance(error, OSError) and type(error).__name__ != "ClientDisconnect":
                    logger.warning("a request failed after its caller had gone: %s", type(error).__name__)
                self._fail(500, "internal", "")
            else:
                request_id = _request_id(self)
                logger.error("the application failed", exc_info=error, extra={"request_id": request_id})
                self._fail(500, "internal", "internal error; the gateway's log has the details", request_id)
        else:
            if not self.finished:
                self._unfinished()

    def _unfinished(self) -> None:
        connection = self.connection
        if not (connection.gone or connection.eof):
            logger.error("the application returned without a complete answer")
        self._fail(500, "internal", "internal error: no answer was made")

    def _fail(self, status: int, code: str, message: str, request_id: str = "") -> None:
        connection = self.connection
        if self.finished:
            return
        self.finished = True
        if connection.closing or connection.active is not self:
            return
        if self.started or connection.eof:
            connection.abort() if self.started else connection._close()
            return
        connection.deaf = True
        connection._write_refusal(status, _error(status, code, message, request_id or _request_id(self)))

    async def receive(self) -> ASGIReceiveEvent:
        connection = self.connection
        if not self.delivered:
            if not self.complete:
                await self._wait_for_body()
            if self.complete and not self.finished and not connection.gone:
                self.delivered = True
                body, self.body = self.body, b""
                return {"type": "http.request", "body": cast(bytes, body), "more_body": False}
        while not (self.finished or connection.eof or connection.gone):
            await self._wait()
        return {"type": "http.disconnect"}

    async def send(self, message: ASGISendEvent) -> None:
        connection = self.connection
        if connection.write_paused:
            await self._writable()
        if self.finished or connection.closing:
            return  # nobody is left to read it
        if message["type"] == "http.response.body":
            body: bytes | memoryview = message.get("body", b"")
            if type(body) is not bytes:
                body = memoryview(body).cast("B")
            size = len(body)
            more = message.get("more_body", False)
            transport = connection.transport
            if not self.started:
                if not self.status:
                    raise RuntimeError("expected http.response.start, got http.response.body")
                head = self._head(size, more)
                if self.left >= 0:
                    self._spend(size, more)
                self.started = True
                if self.left == _CHUNKED:
                    transport.write(head)
                    self._write_chunk(body, more)
                elif self.left == _NO_BODY or not size:
                    transport.write(head)
                elif size < _JOIN_BELOW_BYTES:
                    transport.write(head + body)
                else:
                    transport.writelines((head, body))
            elif self.left == _CHUNKED:
                self._write_chunk(body, more)
            elif self.left != _NO_BODY:
                if self.left >= 0:
                    self._spend(size, more)
                transport.write(body)
            if not more:
                self.finished = True
                if self.waiters is not None:
                    self.wake()
                connection.edge.stats.requests += 1
                connection._done(self)
        elif message["type"] == "http.response.start":
            if self.status:
                raise RuntimeError("expected http.response.body, got a second http.response.start")
            self.status = message["status"]
            self.response_headers = message.get("headers", ())
        else:
            raise RuntimeError(f"expected an http.response message, got {message['type']!r}")

    def _head(self, size: int, more: bool) -> bytes:
        """The head of the answer, and with it how its body is framed and whether the connection lives on."""
        connection = self.connection
        edge = connection.edge
        status = self.status
        parts = [edge.heads.get(status) or edge.head(status)]
        declared = -1
        count = 0
        for name, value in self.response_headers:
            label = _labels.get(name)
            if label is None:
                if name == b"content-length":
                    label = _CONTENT_LENGTH
                    declared = int(value)
                else:
                    label = _label(name)
                    lowered = name.lower()
                    if lowered == b"content-length":
                        declared = int(value)
                    elif lowered == b"transfer-encoding":
                        continue  # framing is ours
                    elif lowered == b"connection":
                        if b"close" in [token.strip() for token in value.lower().split(b",")]:
                            self.keep_alive = False
                            self.ours = True
                        continue
            parts.append(label)
            parts.append(value)
            count += 1
        if status in (204, 304) or self.scope["method"] == "HEAD":
            self.left = _NO_BODY
        elif declared >= 0:
            self.left = declared
        elif not more:
            self.left = size
            parts.append(b"\r\ncontent-length: %d" % size)
            count += 1
        elif self.old:
            self.left = _UNTIL_CLOSE
            self.keep_alive = False
        else:
            self.left = _CHUNKED
            parts.append(b"\r\ntransfer-encoding: chunked")
            count += 1
        if not self.complete and (self.expects or self.length < 0 or self.length - self.received > _UNREAD_LIMIT_BYTES):
            # The rest of the body is not worth its reading, or may never come: no request can follow it safely.
            self.keep_alive = False
            self.ours = True
        if edge.draining or connection.eof:
            self.keep_alive = False
            self.ours = True
        if not self.keep_alive:
            parts.append(b"\r\nconnection: close")
            count += 1
        elif self.old:
            parts.append(b"\r\nconnection: keep-alive")
            count += 1
        parts.append(b"\r\n\r\n")
        head = b"".join(parts)
        # Status line and date, one line a header, the empty one: any further line end was smuggled in by a value.
        if head.count(b"\n") != count + 3 or head.count(b"\r") != count + 3 or b"\0" in head:
            raise RuntimeError("expected response headers without line ends or NUL")
        return head

    def _write_chunk(self, body: bytes | memoryview, more: bool) -> None:
        parts: list[bytes | memoryview] = [b"%x\r\n" % len(body), body, b"\r\n"] if len(body) else []
        if not more:
            parts.append(b"0\r\n\r\n")
        if parts:
            self.connection.transport.writelines(parts)

    def _spend(self, size: int, more: bool) -> None:
        """Hold the application to its Content-Length: a peer would take the rest for the next answer."""
        left = self.left - size
        if left < 0 or (left and not more):
            raise RuntimeError(f"expected a body as long as Content-Length says, got one that differs by {-left} bytes")
        self.left = left

    async def _writable(self) -> None:
        connection = self.connection
        while connection.write_paused and not connection.gone:
            writer = connection.loop.create_future()
            connection.writers.append(writer)
            await writer

    # --- the connection's side -------------------------------------------------------------------------------------

    async def _wait_for_body(self) -> None:
        connection = self.connection
        limit = connection.edge.limits.body_bytes
        if self.length > limit:
            connection.refuse(413, "payload_too_large", f"expected a body of at most {limit} bytes, got {self.length}")
            return
        if not self.wanted:
            self.wanted = True
            connection._expect_body()
            if self.expects and not connection.closing:
                self.expects = False
                connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if connection.receiving is self and not connection.deaf:
                connection._flow(self)
        while not (self.complete or self.finished or connection.eof or connection.gone):
            await self._wait()

    async def _wait(self) -> None:
        waiter = self.connection.loop.create_future()
        if self.waiters is None:
            self.waiters = []
        self.waiters.append(waiter)
        await waiter

    def wake(self) -> None:
        waiters, self.waiters = self.waiters, None
        if waiters is not None:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def hold(self, size: int) -> None:
        self.held += size
        self.connection.edge.holds(size)

    def gather(self) -> None:
        """Put the parts of the body together."""
        if self.held:
            self.connection.edge.holds(-self.held)
            self.held = 0
        parts, self.parts = self.parts, None
        if self.finished:
            self.body = b""
        elif parts is not None:
            self.body = b"".join(parts)

    # --- the stand-in for a task that a fast request has until it first waits ---------------------------------------

    def cancel(self, msg: Any = None) -> bool:
        return self.task is not None and self.task.cancel(msg)

    def cancelling(self) -> int:
        return 0 if self.task is None else self.task.cancelling()

    def uncancel(self) -> int:
        return 0 if self.task is None else self.task.uncancel()

    def done(self) -> bool:
        return self.finished

    def get_name(self) -> str:
        return "inferway-request"


class _Begun(Coroutine[Any, Any, None]):
    """A coroutine that was begun outside a task, for a task to go on with.

    ``awaited`` is what it waited for when it was left; the task is given that first.
    """

    __slots__ = ("awaited", "work")

    def __init__(self, work: Coroutine[Any, Any, None], awaited: object) -> None:
        self.work = work
        self.awaited = awaited

    def send(self, value: Any) -> Any:
        awaited = self.awaited
        if awaited is not _NOTHING:
            self.awaited = _NOTHING
            return awaited
        return self.work.send(value)

    def throw(self, *error: Any) -> Any:
        self.awaited = _NOTHING
        return self.work.throw(*error)

    def close(self) -> None:
        self.work.close()

    def __await__(self) -> Any:  # pragma: no cover - asked for by the abstract class; a task calls send and throw
        return self.work.__await__()


class _Sink(asyncio.BufferedProtocol):
    """Takes a connection's place while the rest of a long body is received straight into its memory.

    The parser cannot skip bytes, so a fresh one reads what follows the body.
    """

    def __init__(self, connection: EdgeProtocol, exchange: Exchange) -> None:
        self._connection = connection
        self._exchange = exchange
        length = exchange.length
        memory = np.empty(length + _ALIGNMENT, np.uint8)
        # The first binary tensor begins after the JSON header. Where it is aligned, the runtime can use it in place.
        start = -(memory.ctypes.data + exchange.align_at) % _ALIGNMENT
        self._body = memory[start : start + length].data.cast("B")

    def begin(self) -> None:
        connection, exchange, body = self._connection, self._exchange, self._body
        at = 0
        for part in exchange.parts or (cast(bytes, exchange.body),):
            body[at : at + len(part)] = part
            at += len(part)
        exchange.parts = None
        exchange.body = b""
        transport = connection.transport
        transport.pause_reading()
        transport.set_protocol(self)
        transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._body[self._exchange.received :]

    def buffer_updated(self, nbytes: int) -> None:
        connection, exchange = self._connection, self._exchange
        exchange.received += nbytes
        if not exchange.finished:
            exchange.hold(nbytes)
        if exchange.received == exchange.length:
            self._end()
            if connection.receiving is exchange:
                connection.parser = httptools.HttpRequestParser(connection)
                exchange.body = self._body
                connection._raw_complete()
        elif connection.deaf:
            self._end()

    def _end(self) -> None:
        transport = self._connection.transport
        if not transport.is_closing():
            transport.pause_reading()
            transport.set_protocol(self._connection)
            transport.resume_reading()

    def eof_received(self) -> bool:
        self._connection.transport.set_protocol(self._connection)
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()


def _check_repeated(headers: list[tuple[bytes, bytes]]) -> None:
    seen: set[bytes] = set()
    for name, _ in headers:
        if name in _ONCE:
            if name in seen:
                raise _Refusal(400, "malformed_request", f"expected one {name.decode()} header, got several")
            seen.add(name)


def _target(url: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request target that does not begin with a slash, or has a fragment."""
    if b"#" in url:
        raise _Refusal(400, "malformed_request", "expected a request target without a fragment")
    if url == b"*":
        return url, b""
    try:
        parsed = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError:
        parsed = None
    if parsed is None or parsed.schema is None or parsed.host is None:
        # An authority alone is CONNECT's, which is refused by name a few lines later.
        return url, b""
    return parsed.path or b"/", parsed.query or b""


def _label(name: bytes) -> bytes:
    """What stands before the value of a response header."""
    lowered = name.lower()
    if not _FIELD_NAME.fullmatch(lowered):
        raise RuntimeError("expected the name of a response header to be a token")
    label = b"\r\n" + lowered + b": "
    if lowered not in _FRAMING and len(_labels) < _NAMES_REMEMBERED:
        _labels[name] = label
    return label


def _request_id(exchange: Exchange | None) -> str:
    if exchange is not None:
        for name, value in exchange.scope["headers"]:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                return value.decode("ascii")
    return secrets.token_hex(12)


def _error(status: int, code: str, message: str, request_id: str) -> bytes:
    """What follows the date of an answer that the edge makes itself."""
    body = json.dumps({"error": message, "code": code, "request_id": request_id}, separators=(",", ":")).encode()
    retry = status in (408, 503)
    return b"".join(
        (
            b"\r\ncontent-type: application/json\r\ncontent-length: %d" % len(body),
            b"\r\nx-request-id: ",
            request_id.encode("ascii"),
            b"\r\nx-should-retry: true" if retry else b"\r\nx-should-retry: false",
            b"\r\nretry-after: 1" if status == 503 else b"",
            b"\r\nx-content-type-options: nosniff\r\ncache-control: no-store\r\nconnection: close\r\n\r\n",
            body,
        )
    )
