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
  such a body is read before it asks. Where ``Edge.streamed`` says so, it gets the body in pieces instead, and may get
  a longer one.
- **Leaving.** A caller that closes its side while its request is at work counts as gone, as with most servers: ASGI's
  ``http.disconnect`` and the extension ``inferway.disconnect`` tell. An answer that is written anyway is sent.
- **Speed.** No timer, no ``asyncio.Event`` and, for ``fast`` requests, no task per request; head and body leave in one
  system call instead of two.

One request and its answer are an ``Exchange``. A connection has at most one that is ``active`` (the application works
on it) and one that is ``receiving`` (its body is not complete); both may be the same. Others wait in ``queue``.
"""

from __future__ import annotations

import asyncio
import logging
import re
import select
import urllib.parse
from asyncio import _enter_task, _leave_task  # the documented way for foreign tasks, "Extending asyncio"
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, cast

import httptools
from uvicorn.protocols.utils import get_local_addr, get_remote_addr

from .exchange import Begun, Exchange, StreamedExchange, error_answer, request_id
from .sink import Sink

if TYPE_CHECKING:
    from uvicorn._types import HTTPScope

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
        b"upload-offset",
        b"upload-length",
    }
)
"""Headers that a request may have only once: two readers may take different ones of several."""
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_HOSTS_REMEMBERED: Final = 1024
_METHODS: Final = {name.encode(): name for name in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")}
_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}

_SINK_FROM_BYTES: Final = 128 * 1024
"""What must have arrived of a body before memory for all of it is taken. Memory that large is backed by the system in
pages of up to 2 MiB as it is written, so that a caller cannot take more than 16 times what it has sent."""
_SLICE_BYTES: Final = 4096
"""What is parsed at once where headers are expected. It bounds the requests that wait behind one another on a
connection: the parser cannot be stopped between two requests, and a parsed one takes some 2 KiB, a raw one 27 bytes."""
_DRAIN_LINGER_S: Final = 1.0
"""A server that ends hears nobody out for longer than this."""
_STREAMED_CHUNK_BYTES: Final = 1024
"""How long the chunks of a streamed body, which takes no memory, must be on average where they are many."""
_CHUNK_OVERHEAD_BYTES: Final = 64
"""Bytes of framing (size, extensions, line ends) that a chunk may have, on average, besides one allowance of the
header limit for the trailers."""


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
        "crossed",
        "deadline",
        "deaf",
        "edge",
        "eof",
        "extensions",
        "gone",
        "headers",
        "held",
        "last_target",
        "last_url",
        "leave_callbacks",
        "limit",
        "loop",
        "number",
        "parser",
        "queue",
        "raw_left",
        "receiving",
        "refusal",
        "server",
        "slice",
        "source",
        "transport",
        "unparsed",
        "unsent",
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
        self.unsent = b""
        self.limit = edge.limits.header_bytes
        self.slice = min(self.limit, _SLICE_BYTES)
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.server: tuple[str, int | None] | None = None
        self.client: tuple[str, int] | None = None
        self.source: str | None = None
        self.number = 0
        self.extensions: dict[str, Any] = {DISCONNECT_EXTENSION: self.on_leave}

        # What arrives.
        self.last_url = b""  # most callers ask for the same thing again
        self.last_target = ("", b"", b"")
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.boundary = True  # nothing of a further request has been seen
        self.crossed = False  # one was seen in the same bytes as the end of its forerunner
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
        if size <= self.slice and not self.unparsed and self.raw_left < 0 and not self.queue and not self.held:
            # Nearly every read: too short for a header that is too long, and for many requests at once.
            self.boundary = False
            if not self._feed(data):
                return
            if not self.boundary:
                self._incomplete(size)
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
            self.receiving.held = 0
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
        elif self.queue or self.held or self.refusal is not None:
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
        """Feed in slices, so that no header gets longer than the limit unnoticed and not too many requests wait."""
        view = memoryview(data)
        stats = self.edge.stats
        answered = stats.requests
        while len(view) and not self.deaf:
            if self.held or self.queue or stats.requests != answered:
                # Somebody pipelines faster than we answer, or would keep the loop from everybody else.
                self.held += view
                self._pause()
                if self.active is None:
                    self.loop.call_soon(self._next)
                return
            if self.raw_left >= 0:
                piece = view[: self.raw_left]
                self.raw_left -= len(piece)
                self.on_body(bytes(piece))
                if not self.raw_left:
                    self.raw_complete()
                else:
                    self._incomplete(len(piece), last=len(piece) == len(view))
            else:
                receiving = self.receiving
                step = self.slice
                if receiving is not None:
                    step = receiving.length - receiving.received if receiving.length > 0 else self.limit
                elif self.unparsed:
                    step = min(step, self.limit - self.unparsed)
                    if step <= 0:
                        self._refuse_headers()
                        return
                self.boundary = False
                piece = view[:step]
                if self._feed(piece):
                    if not self.boundary:
                        self._incomplete(len(piece), last=len(piece) == len(view))
                    else:
                        self.unparsed = 0
            view = view[len(piece) :]

    def _incomplete(self, size: int, *, last: bool = True) -> None:
        """After ``size`` bytes that did not end with a request's end: keep bounds, begin what need not wait for it.

        Args:
            last: no more bytes are at hand.
        """
        exchange = self.receiving
        edge = self.edge
        if self.deaf:
            return
        if exchange is None:
            if not self.unparsed and self.active is None:
                self.deadline = min(self.deadline, edge.first_deadline(edge.limits.header_timeout_s))
            if self.crossed:
                # The bytes of an earlier request's end are in these, and how many is not known: count what was read.
                self.crossed = False
                self.unparsed = max(1, _size(self.url, self.headers))
            else:
                self.unparsed += size
            if self.unparsed > self.limit or len(self.headers) > edge.limits.header_count:
                self._refuse_headers()
            return
        self.unparsed = 0
        if exchange.length < 0:
            exchange.fed += size
            overhead = exchange.fed - exchange.received - _CHUNK_OVERHEAD_BYTES * exchange.chunks
            if overhead > self.limit or len(self.headers) > edge.limits.header_count:
                self.refuse(400, "malformed_request", "expected chunks of a body, got more framing than body")
                return
        if not last:
            return
        if not exchange.late:
            exchange.late = True
            if self.active is None and not self.queue and not self.write_paused:
                self._start(exchange)
            else:
                self.queue.append(exchange)
        if self.active is exchange and not self.deaf and not exchange.complete:
            self.flow(exchange)

    def flow(self, exchange: Exchange) -> None:
        """Decide how the rest of an incomplete body comes in: not yet, in pieces, or straight into its memory."""
        if exchange.finished:
            self._resume()
        elif isinstance(exchange, StreamedExchange):
            self._pause() if exchange.full else self._resume()
        elif not exchange.wanted:
            self._pause()
        elif exchange.sunk:
            pass
        elif exchange.length - exchange.received >= self.limit and exchange.received >= _SINK_FROM_BYTES:
            exchange.sunk = True
            self._resume()
            Sink(self, exchange).begin()
        else:
            self._resume()

    def _pause(self) -> None:
        self.transport.pause_reading()
        self.edge.paused.add(self)

    def _resume(self) -> None:
        self.transport.resume_reading()
        self.edge.paused.discard(self)

    def look(self) -> None:
        """Find out whether the caller has left while nothing is read, for then nobody tells."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        if self.closing or not poll.poll(0):
            return
        self.edge.paused.discard(self)
        self.eof = self.deaf = True
        self.held = b""
        if self.receiving is not None:
            self.edge.holds(-self.receiving.held)
            self.receiving.held = 0
            self.receiving = None
        self._left()
        if self.active is None or self.active.finished:
            self.close()

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

    def raw_complete(self) -> None:
        exchange = self.receiving
        self.raw_left = -1
        self.unparsed = 0
        self.boundary = True
        if exchange is not None:
            self._complete(exchange)

    # --- the parser's calls ----------------------------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        if self.boundary:
            self.boundary = False
            self.crossed = True
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
        if len(headers) > edge.limits.header_count or (self.unparsed and _size(url, headers) > self.limit):
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
        if url != self.last_url:
            self.last_target = _target(url)
            self.last_url = url
        path, raw_path, query = self.last_target
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
        limit = None
        if name == "PUT" and edge.streamed is not None:
            limit = edge.streamed(scope)
        if limit is None:
            exchange = Exchange(self, scope, length, keep_alive)
            limit = edge.limits.body_bytes
        else:
            exchange = StreamedExchange(self, scope, length, keep_alive)
            exchange.limit = limit
        if version == "1.0":
            exchange.old = True
            exchange.plain = False
        if name == "HEAD":
            exchange.plain = False
        if length > limit:
            exchange.receive = exchange.receive_too_much  # type: ignore[method-assign]  # no other request pays for it
            exchange.too_long = True
        if length < 0:
            exchange.fed = -_size(url, headers)  # these bytes come in with the body's, and are none of it
        if b"expect" in fields and version == "1.1" and fields[b"expect"].lower() == b"100-continue":
            exchange.expects = True
        head = fields.get(b"inference-header-content-length")
        if head is not None and head.isdigit() and len(head) < 10:
            exchange.align_at = int(head)
        if b"upgrade" in fields and parser.should_upgrade():
            if length < 0:
                raise _Refusal(501, "unsupported", "expected no Upgrade on a chunked request")
            exchange.upgrade = True
        self.receiving = exchange

    def on_body(self, body: bytes) -> None:
        exchange = self.receiving
        if exchange is None or self.deaf:
            return
        exchange.received += len(body)
        if exchange.finished:
            return
        if exchange.received == len(body) or (exchange.streamed and not (exchange.body or exchange.parts)):
            exchange.body = body
        else:
            self._more_body(exchange, body)
        if exchange.length < 0 and exchange.received > (limit := exchange.limit or self.edge.limits.body_bytes):
            raise _Refusal(413, "payload_too_large", f"expected a body of at most {limit} bytes, got more")
        if exchange.streamed:
            exchange.wake()

    def on_chunk_header(self) -> None:
        exchange = self.receiving
        if exchange is not None:
            exchange.chunks += 1
            allowed = self.edge.limits.chunk_count
            if exchange.streamed:
                allowed += exchange.received // _STREAMED_CHUNK_BYTES
            if exchange.chunks > allowed:
                raise _Refusal(400, "malformed_request", f"expected at most {allowed} chunks, got more")

    def on_message_complete(self) -> None:
        exchange = self.receiving
        if exchange is None or exchange.upgrade:
            return
        if self.headers:
            self.headers = []  # trailers: nobody checked them, so nobody gets them
        self._complete(exchange)

    def _more_body(self, exchange: Exchange, body: bytes) -> None:
        # One growing buffer: a list of parts would cost fifty times the bytes of a caller that sends them one by one.
        parts = exchange.parts
        if parts is None:
            parts = exchange.parts = bytearray(exchange.body)
            exchange.hold(len(parts))
        parts += body
        exchange.hold(len(body))

    # --- requests --------------------------------------------------------------------------------------------------

    def _complete(self, exchange: Exchange) -> None:
        """The whole request is here."""
        self.receiving = None
        self.boundary = True
        exchange.complete = True
        if exchange.held:
            exchange.gather()
        if exchange.late:
            self._resume()
            if exchange.finished:
                if self.active is exchange:
                    self.done(exchange)
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
        self.deadline = float("inf")  # a body that is still to come gets one when it is asked for
        loop = self.loop
        at_once = edge.at_once is not None and exchange.complete and not self.write_paused
        if at_once and not exchange.too_long and self._answered_at_once(exchange):
            return
        fast = edge.fast
        try:
            in_task = fast is None or not fast(exchange.scope)
        except Exception:
            logger.exception("telling whether a request is fast failed")
            in_task = True
        task: asyncio.Task[None]
        if in_task:
            task = loop.create_task(exchange.run(edge.app))
        else:
            work = exchange.run(edge.app)
            context = copy_context()
            _enter_task(loop, exchange)  # type: ignore[arg-type]  # a stand-in, see Edge
            try:
                awaited = context.run(work.send, None)
            except StopIteration:
                return
            finally:
                _leave_task(loop, exchange)  # type: ignore[arg-type]
            task = asyncio.Task(Begun(work, awaited), loop=loop, context=context)
        exchange.task = task
        edge.tasks.add(task)
        task.add_done_callback(edge.tasks.discard)

    def _answered_at_once(self, exchange: Exchange) -> bool:
        """Let the application answer at once, where it offers that and can."""
        assert self.edge.at_once is not None
        try:
            answer = self.edge.at_once(exchange.scope, exchange.body)
            if answer is None:
                return False
            exchange.respond(*answer)
        except Exception as error:
            if exchange.started:
                logger.exception("an answer that was given at once could not be sent")
                self.abort()
                return True
            logger.error("answering at once failed", exc_info=error)
            return False
        return True

    def _next(self) -> None:
        """Begin the next request of the queue, or go on reading."""
        if self.closing or self.write_paused:
            return
        if self.active is None:
            if self.queue:
                self._start(self.queue.popleft())
            elif self.refusal is not None:
                self.write_refusal(*self.refusal)
        if self.held and not self.queue and (self.active is None or self.active is self.receiving):
            held, self.held = self.held, b""
            self._resume()
            self.data_received(held)
        elif self.eof and self.active is None and not self.queue:
            self.close()  # the caller left between an answer and the next request of the queue, which went with it

    def done(self, exchange: Exchange) -> None:
        """An answer is complete, or its application is done; what comes next?"""
        if self.active is not exchange or self.closing:
            return
        if exchange.held:
            exchange.gather()  # nobody will ask for it
        if not exchange.keep_alive:
            if exchange.ours or not exchange.complete:
                self._close_gently()
            else:
                self.close()
            return
        if not exchange.complete:
            self.expect_body()
            self.flow(exchange)  # the rest of the body is thrown away, then it goes on
            return
        self.active = None
        if self.queue or self.held or self.refusal is not None:
            self.loop.call_soon(self._next)
        elif self.receiving is None:
            if self.boundary:
                if not self.eof and not self.write_paused:
                    self.deadline = self.edge.idle_until  # as _rest does
                else:
                    self._rest()
            else:
                self.deadline = self.edge.first_deadline(self.edge.limits.header_timeout_s)

    def _rest(self) -> None:
        """Idle: wait for the next request."""
        if self.eof:
            self.close()
        elif not self.write_paused:  # else the peer has yet to take its answer, and has its time for that
            self.deadline = self.edge.idle_until

    def expect_body(self) -> None:
        """From now on it is the peer who keeps us waiting for the body."""
        edge = self.edge
        self.body_since = edge.now
        self.deadline = edge.now + edge.limits.body_timeout_s

    def expect_more(self, ours_s: float) -> None:
        """The same again, after ``ours_s`` seconds in which it was we who kept the peer waiting."""
        receiving = self.receiving
        if receiving is not None:
            limits = self.edge.limits
            self.body_since += ours_s
            self.deadline = self.body_since + limits.body_timeout_s + receiving.received / limits.body_min_bytes_per_s

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
            if last is not None and last is not self.receiving and not last.keep_alive:
                self.deaf = True
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

    def refuse(
        self, status: int, code: str, message: str, *, exchange: Exchange | None = None, linger: bool = True
    ) -> None:
        """Answer in the application's place, after the answers that come before, and close the connection.

        Args:
            exchange: the request that is refused, by default the one that is arriving.
            linger: hear the peer out, see ``EdgeLimits.linger_s``.
        """
        if self.closing or self.refusal is not None:
            return
        self.deaf = True
        refused = self.edge.stats.refused
        refused[code] = refused.get(code, 0) + 1
        if exchange is None:
            exchange = self.receiving
        if self.receiving is not None:
            self.edge.holds(-self.receiving.held)
            self.receiving.held = 0
            self.receiving = None
        name = request_id(exchange)
        logger.info("refused a request with %d: %s", status, message, extra={"request_id": name, "code": code})
        answer = error_answer(status, code, message, name, "" if exchange is None else exchange.scope["path"])
        if exchange is not None:
            exchange.finished = True
            exchange.wake()
            if exchange is self.active:
                if exchange.started:
                    self.abort()  # in the middle of an answer there is nothing left to say
                    return
                self.active = None
            elif exchange in self.queue:
                self.queue.remove(exchange)
        if self.active is not None or self.queue:
            self.refusal = (status, answer)
            self._resume()
        else:
            self.write_refusal(status, answer, linger)

    def write_refusal(self, status: int, answer: bytes, linger: bool = True) -> None:
        self.edge.stats.requests += 1
        self.flush()
        self.transport.write(self.edge.heads.get(status, b"") or self.edge.head(status))
        self.transport.write(answer)
        if linger and not self.eof:
            self._close_gently()
        else:
            self.close()

    def _close_gently(self) -> None:
        """Say that nothing more comes, and hear the peer out for a while. See ``EdgeLimits.linger_s``."""
        self.flush()
        self.deaf = self.closing = True
        if self.eof or self.transport.is_closing():
            self.close()
            return
        self._resume()
        self.transport.write_eof()
        linger = self.edge.limits.linger_s
        self.deadline = self._flushed_by() + (min(linger, _DRAIN_LINGER_S) if self.edge.draining else linger)

    def close(self) -> None:
        """Close once everything is sent; cut after a while if the peer does not take it."""
        self.flush()
        self.deaf = self.closing = True
        self.deadline = self._flushed_by()
        self.transport.close()

    def _flushed_by(self) -> float:
        """Until when the peer has to have taken what is written."""
        limits = self.edge.limits
        buffered = self.transport.get_write_buffer_size() + len(self.unsent)
        if not buffered:
            return self.edge.now
        return self.edge.now + limits.body_timeout_s + buffered / limits.body_min_bytes_per_s

    def flush(self) -> None:
        """Write the answer that ``Edge.write`` has put off. Whatever else is done to the transport comes after it."""
        unsent, self.unsent = self.unsent, b""
        if unsent and not self.gone:
            self.transport.write(unsent)

    def abort(self) -> None:
        self.flush()
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
            return self.deadline - limits.linger_s
        if self.receiving is not None:
            return self.body_since if self.active is self.receiving and self.receiving.wanted else None
        if self.active is not None or self.queue:
            return None
        return self.deadline - (limits.keep_alive_s if self.boundary else limits.header_timeout_s)

    def evict(self) -> None:
        """Give way to others."""
        if self.closing:
            self.abort()
        elif self.idle:
            self.close()
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
        receiving = self.receiving
        if self.closing:
            self.abort()
        elif self.write_paused:
            self._count("send")
            self.abort()
        elif receiving is not None:
            granted = limits.body_timeout_s + receiving.received / limits.body_min_bytes_per_s
            if self.body_since + granted > now:
                self.deadline = self.body_since + granted
                return
            self._count("body")
            self.refuse(
                408,
                "request_timeout",
                f"expected the body within {limits.body_timeout_s:g} s and at {limits.body_min_bytes_per_s} bytes/s "
                f"after that, got {receiving.received} bytes",
            )
        elif self.active is not None or self.queue:
            self.deadline = float("inf")
        elif not self.boundary:
            self._count("header")
            self.refuse(408, "request_timeout", f"expected the headers within {limits.header_timeout_s:g} s")
        else:
            self._count("idle")
            self.close()

    def _count(self, phase: str) -> None:
        expired = self.edge.stats.expired
        expired[phase] = expired.get(phase, 0) + 1

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


def _size(url: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    """Bytes that a request's head took at least, without the white space that may be left out."""
    return len("GET  HTTP/1.1\r\n\r\n") + len(url) + sum(len(name) + len(value) + 3 for name, value in headers)


def _check_repeated(headers: list[tuple[bytes, bytes]]) -> None:
    seen: set[bytes] = set()
    for name, _ in headers:
        if name in _ONCE:
            if name in seen:
                raise _Refusal(400, "malformed_request", f"expected one {name.decode()} header, got several")
            seen.add(name)


def _target(url: bytes) -> tuple[str, bytes, bytes]:
    """Path, its bytes and the query of a request target."""
    if b"#" in url:
        raise _Refusal(400, "malformed_request", "expected a request target without a fragment")
    raw_path, _, query = url.partition(b"?")
    if raw_path[:1] != b"/" and url != b"*":
        try:
            parsed = httptools.parse_url(url)
        except httptools.HttpParserInvalidURLError:
            parsed = None
        if parsed is not None and parsed.schema is not None and parsed.host is not None:
            raw_path, query = parsed.path or b"/", parsed.query or b""
        # Else it is an authority alone, for CONNECT, which is refused by name a few lines later.
    path = raw_path.decode("ascii")
    return urllib.parse.unquote(path) if "%" in path else path, raw_path, query
