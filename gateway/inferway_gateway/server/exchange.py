"""One request and its answer: what an application's ``receive`` and ``send`` do."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Coroutine, Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent, HTTPScope

    from .protocol import EdgeProtocol

logger = logging.getLogger("inferway.edge")

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_FIELD_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NAMES_REMEMBERED: Final = 256
_labels: dict[bytes, bytes] = {}
"""Checked names of response headers to the bytes that stand before their values."""
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding", b"connection"})
_CONTENT_LENGTH: Final = b"\r\ncontent-length: "
_JOIN_BELOW_BYTES: Final = 64 * 1024
"""Head and body up to this size are joined: copying them is cheaper than an output vector."""
_BYTES_UP_TO: Final = 128 * 1024
"""Bodies that came in several parts are given as ``bytes`` up to this size, for applications that expect them; longer
ones as a ``memoryview``: copying those would take longer than everything else."""
_UNREAD_LIMIT_BYTES: Final = 256 * 1024
"""A connection whose application answers without reading lives on if no more than this of the body is missing."""
STREAM_AHEAD_BYTES: Final = 256 * 1024
"""What is read of a streamed body before the application asks for it."""
_CHUNKED: Final = -1
_UNTIL_CLOSE: Final = -2
_NO_BODY: Final = -3
_NOTHING: Final = object()


class Exchange:
    """One request and its answer; ``receive`` and ``send`` are what the application is given."""

    # Defaults live in the class: most requests never touch them, and an instance costs what its __init__ assigns.
    task: asyncio.Task[None] | None = None
    # The request.
    received = 0
    body: bytes | memoryview = b""
    parts: bytearray | None = None  # of a body that came in several reads
    complete = False
    late = False  # the body was not complete at once
    wanted = False  # the application asked for the body
    sunk = False  # the rest of the body goes straight into its memory
    delivered = False
    expects = False  # the peer waits for 100 Continue
    upgrade = False  # it offered another protocol, and the parser stopped at its headers
    held = 0  # bytes counted in Edge.incomplete_bytes
    fed = 0  # bytes of a chunked body with its framing
    chunks = 0
    align_at = 0  # position in the body that should be aligned in memory
    old = False  # HTTP/1.0
    plain = True  # neither HTTP/1.0 nor HEAD
    too_long = False  # more was declared than the limit allows
    limit = 0  # bytes of the body, where they are other than everybody's
    streamed = False  # the application takes the body in pieces
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
                name = request_id(self)
                logger.error("the application failed", exc_info=error, extra={"request_id": name})
                self._fail(500, "internal", "internal error; the gateway's log has the details", name)
        else:
            if not self.finished:
                self._unfinished()

    def _unfinished(self) -> None:
        connection = self.connection
        if not (connection.gone or connection.eof):
            logger.error("the application returned without a complete answer")
        self._fail(500, "internal", "internal error: no answer was made")

    def _fail(self, status: int, code: str, message: str, name: str = "") -> None:
        connection = self.connection
        if self.finished:
            return
        self.finished = True
        if connection.closing or connection.active is not self:
            return
        if self.started or connection.eof:
            connection.abort() if self.started else connection.close()
            return
        connection.deaf = True
        connection.write_refusal(
            status, error_answer(status, code, message, name or request_id(self), self.scope["path"])
        )

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

    async def receive_too_much(self) -> ASGIReceiveEvent:
        """Stands in for ``receive`` where the declared body is beyond the limit: whoever asks for it refuses it."""
        connection = self.connection
        if not self.finished:
            limit = self.limit or connection.edge.limits.body_bytes
            words = f"expected a body of at most {limit} bytes, got {self.length}"
            connection.refuse(413, "payload_too_large", words, exchange=self)
        return {"type": "http.disconnect"}

    def respond(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Give the whole answer, in place of ``receive`` and ``send``."""
        connection = self.connection
        self.status = status
        self.response_headers = headers
        if connection.unsent:
            connection.flush()
        try:
            self._begin(body, len(body), False)
        except Exception:
            self.status = 0  # the application may still answer
            raise
        self.delivered = True
        self.body = b""
        self._end()

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
            if connection.unsent:
                connection.flush()
            if not self.started:
                if not self.status:
                    raise RuntimeError("expected http.response.start, got http.response.body")
                self._begin(body, size, more)
            elif self.left == _CHUNKED:
                self._write_chunk(body, more)
            elif self.left != _NO_BODY:
                if self.left >= 0:
                    self._spend(size, more)
                connection.transport.write(body)
            if not more:
                self._end()
        elif message["type"] == "http.response.start":
            if self.status:
                raise RuntimeError("expected http.response.body, got a second http.response.start")
            self.status = message["status"]
            self.response_headers = message.get("headers", ())
        else:
            raise RuntimeError(f"expected an http.response message, got {message['type']!r}")

    def _begin(self, body: bytes | memoryview, size: int, more: bool) -> None:
        """Write the head, and the first or only piece of the body."""
        connection = self.connection
        transport = connection.transport
        head = self._head(size, more)
        if 0 < self.left == size < _JOIN_BELOW_BYTES and not more:
            # Nearly every answer: small, and whole.
            self.started = True
            if self.keep_alive:
                connection.edge.write(connection, head + body)
            else:
                transport.write(head + body)
            return
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

    def _end(self) -> None:
        """The answer is complete."""
        connection = self.connection
        self.finished = True
        if self.waiters is not None:
            self.wake()
        connection.edge.stats.requests += 1
        connection.done(self)

    def _head(self, size: int, more: bool) -> bytes:
        """The head of the answer, and with it how its body is framed and whether the connection lives on."""
        connection = self.connection
        edge = connection.edge
        status = self.status
        plain = self.plain and self.keep_alive and self.complete and not edge.draining and not connection.eof
        names: tuple[bytes, ...] = ()
        if plain and self.response_headers:
            # An application's answers mostly have the same headers: one formatting then does what the loop below does.
            names, values = zip(*self.response_headers, strict=True)
            template = edge.templates.get((status, names))
            if template is not None:
                self.left = int(values[template[1]])
                return _checked(template[0] % values, len(values))
        parts = [edge.heads.get(status) or edge.head(status)]
        declared = -1
        at = -1
        count = 0
        for name, value in self.response_headers:
            label = _labels.get(name)
            if label is None:
                if name == b"content-length":
                    label = _CONTENT_LENGTH
                    declared = int(value)
                    at = count
                else:
                    label = _label(name)
                    lowered = name.lower()
                    if lowered == b"content-length":
                        declared = int(value)
                    elif lowered == b"transfer-encoding":
                        continue  # framing is ours
                    elif lowered == b"connection":
                        if b"close" in [token.strip() for token in value.lower().split(b",")]:
                            self.keep_alive = plain = False
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
        if plain and at >= 0 and count == len(names) and self.left >= 0:
            edge.remember(status, names, b"".join(_template(parts)), at)
        return _checked(b"".join(parts), count)

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
        if not self.wanted:
            self.wanted = True
            connection.expect_body()
            self._invite()
            if connection.receiving is self and not connection.deaf:
                connection.flow(self)
        while not (self.complete or self.finished or connection.eof or connection.gone):
            await self._wait()

    def _invite(self) -> None:
        """Say that the body is welcome, to a caller who waits for that."""
        connection = self.connection
        if self.expects and not connection.closing:
            self.expects = False
            connection.flush()
            connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

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
        """Count bytes of the incomplete body. This may end the request, where others need the memory."""
        if not self.finished:
            self.held += size
            self.connection.edge.holds(size)

    def gather(self) -> None:
        """Put the parts of a body together, and stop to count it as incomplete."""
        self.connection.edge.holds(-self.held)
        self.held = 0
        parts, self.parts = self.parts, None
        if self.finished:
            self.body = b""
        elif parts is not None:
            self.body = bytes(parts) if len(parts) <= _BYTES_UP_TO else memoryview(parts)

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


class StreamedExchange(Exchange):
    """A request whose body the application takes in pieces as they come, and no faster than it takes them.

    Up to some 256 KiB are read ahead; then nothing more is read, and the peer has to wait. The time for which it does
    is not counted in its deadline.
    """

    streamed = True
    asked = False  # at least once
    answered_at = 0.0  # when the application was given a piece last, on the edge's clock

    @property
    def full(self) -> bool:
        """Whether nothing more is to be read for now. Also while the application waits: it is told only after all that
        the loop has at hand was read, which may be megabytes."""
        return not self.asked or len(self.parts or self.body) >= STREAM_AHEAD_BYTES

    async def receive(self) -> ASGIReceiveEvent:
        connection = self.connection
        if not self.delivered:
            if not (self.complete or self.parts or self.body):
                await self._wait_for_piece()
            piece = self._take()
            if self.complete or len(piece):
                self.delivered = self.complete
                if not self.complete and connection.receiving is self and not connection.deaf:
                    connection.flow(self)
                return {"type": "http.request", "body": cast(bytes, piece), "more_body": not self.complete}
        while not (self.finished or connection.eof or connection.gone):
            await self._wait()
        return {"type": "http.disconnect"}

    async def _wait_for_piece(self) -> None:
        connection = self.connection
        self.wanted = True
        if not self.asked:
            self.asked = True
            connection.expect_body()
            self._invite()
        else:
            connection.expect_more(connection.edge.now - self.answered_at)
        if connection.receiving is self and not connection.deaf:
            connection.flow(self)
        while not (self.parts or self.body or self.complete or self.finished or connection.eof or connection.gone):
            await self._wait()
        self.wanted = False
        self.answered_at = connection.edge.now
        if connection.receiving is self and not connection.closing:
            connection.deadline = float("inf")  # it is the peer who waits for us

    def _take(self) -> bytes | bytearray | memoryview:
        """What is here; also after the peer has gone, for it may be of use."""
        if self.held:
            self.connection.edge.holds(-self.held)
            self.held = 0
        parts, self.parts = self.parts, None
        body, self.body = self.body, b""
        return body if parts is None else parts


class Begun(Coroutine[Any, Any, None]):
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


def _checked(head: bytes, count: int) -> bytes:
    """``head``, if it has ``count`` headers: a further line end would have been smuggled in by a value."""
    # Besides the headers there are the status line, the date and the empty line.
    if head.count(b"\n") != count + 3 or head.count(b"\r") != count + 3 or b"\0" in head:
        raise RuntimeError("expected response headers without line ends or NUL")
    return head


def _template(parts: list[bytes]) -> Iterator[bytes]:
    """The parts of a head with places for the values, which are every second part after the first."""
    for i, part in enumerate(parts[:-1]):
        yield b"%b" if i and i % 2 == 0 else part.replace(b"%", b"%%")
    yield parts[-1]


def _label(name: bytes) -> bytes:
    """What stands before the value of a response header."""
    lowered = name.lower()
    if not _FIELD_NAME.fullmatch(lowered):
        raise RuntimeError("expected the name of a response header to be a token")
    label = b"\r\n" + lowered + b": "
    if lowered not in _FRAMING and len(_labels) < _NAMES_REMEMBERED:
        _labels[name] = label
    return label


def request_id(exchange: Exchange | None) -> str:
    if exchange is not None:
        for name, value in exchange.scope["headers"]:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                return value.decode("ascii")
    return secrets.token_hex(12)


def error_answer(status: int, code: str, message: str, name: str, path: str = "") -> bytes:
    """What follows the date of an answer that the edge makes itself.

    Args:
        path: of the request, where it was read as far as that: OpenAI's clients find a message only in their own form.
    """
    members: dict[str, object] = {"error": message, "code": code, "request_id": name}
    if path.startswith("/v1/"):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        members |= {
            "error": {"message": message, "type": kind, "param": None, "code": code},
            "type": f"urn:inferway:error:{code}",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": message,
        }
    body = json.dumps(members, separators=(",", ":")).encode()
    retry = status in (408, 503)
    return b"".join(
        (
            b"\r\ncontent-type: application/json\r\ncontent-length: %d" % len(body),
            b"\r\nx-request-id: ",
            name.encode("ascii"),
            b"\r\nx-should-retry: true" if retry else b"\r\nx-should-retry: false",
            b"\r\nretry-after: 1" if status == 503 else b"",
            b"\r\nx-content-type-options: nosniff\r\ncache-control: no-store\r\nconnection: close\r\n\r\n",
            body,
        )
    )
