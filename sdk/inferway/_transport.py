"""Sends through httpx; with `_transport_aio`, the one place where errors of httpx and its engines become ours.

By default a request goes to an httpx transport without an ``httpx.Client`` around it: redirects, cookies,
authentication flows and header merging are a third of a small call's time, and none of them is wanted here (a redirect
would carry the key along). A caller's own ``httpx.Client`` or ``httpx2.Client`` is used whole instead, with everything
it is set up for.

**Time.** httpx limits each single read, so that a server which sends one byte now and then keeps a caller for ever. The
time limits handed to httpx are therefore `TimeLeft` numbers, which httpcore passes through to the network stream; ours
asks them for what is left before each read and write.

**Forks.** A child process must not use its parent's sockets. `forget_at_fork` makes a child drop them without a word on
the wire: the parent's connections stay as they are, and the child opens its own.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Protocol, cast, runtime_checkable
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx

from ._core import HeaderList, OpenReply, Plan, Reply, Stream
from ._errors import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APITimeoutError,
    ClientClosedError,
    ConfigurationError,
)

KEEPALIVE_S: Final = 30.0
LAST_BYTES_S: Final = 1.0
"""How long the end of a body may take after the last event of a stream."""
PIECE_BYTES: Final = 1024 * 1024
"""Longer bodies are sent in pieces of this size: each is copied on its way into the socket, and none of them is large.
16 MiB there and back took 52 ms in pieces of 256 KiB, 30 ms with 1 MiB, 38 ms in one (loopback, November 2026)."""


@runtime_checkable
class SyncHTTPClient(Protocol):
    """What the SDK needs of a caller's own client; ``httpx.Client`` and ``httpx2.Client`` have it."""

    def build_request(self, method: str, url: Any, /, *, content: Any, headers: Any, timeout: Any) -> Any: ...

    def send(self, request: Any, /, *, stream: bool, follow_redirects: bool) -> Any: ...

    def close(self) -> None: ...


@runtime_checkable
class AsyncHTTPClient(Protocol):
    """What the SDK needs of a caller's own client; ``httpx.AsyncClient`` and ``httpx2.AsyncClient`` have it."""

    def build_request(self, method: str, url: Any, /, *, content: Any, headers: Any, timeout: Any) -> Any: ...

    async def send(self, request: Any, /, *, stream: bool, follow_redirects: bool) -> Any: ...

    async def aclose(self) -> None: ...


def split_base_url(base_url: str) -> tuple[str, str]:
    """A base URL in its one form, and the ``Host`` header that goes with it.

    Raises:
        ConfigurationError: it is no http or https URL, or holds a user name, a query or a fragment.
    """
    text = base_url.strip().rstrip("/")
    try:
        parts = urlsplit(text)
        url = httpx.URL(text)
    except (ValueError, httpx.InvalidURL) as error:
        raise ConfigurationError(f"base_url cannot be read: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"base_url expects http://HOST:PORT or https://HOST, got {_without_user(text)!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigurationError("base_url must hold no user name, query or fragment; the key goes into api_key")
    return text, url.netloc.decode("ascii")


def _without_user(text: str) -> str:
    return text.rsplit("@", 1)[-1]


def environment_proxy(base_url: str) -> str | None:
    """The proxy that the environment names for a URL: ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``.

    Asked once for each client, because a client has one base URL.
    """
    parts = urlsplit(base_url)
    proxies = getproxies()
    found = proxies.get(parts.scheme) or proxies.get("all")
    if not found or proxy_bypass(parts.netloc):
        return None
    return found if "://" in found else f"http://{found}"


def tls_context(base_url: str) -> ssl.SSLContext:
    """httpx's own context for https. Reading the CA bundle takes near 100 ms, which plain http need not wait for: its
    context verifies all the same and trusts nobody."""
    if base_url.startswith("https:"):
        return httpx.create_ssl_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class TimeLeft(float):
    """Seconds that are left now, and that know how many are left later.

    A plain number to everybody else, so that any httpx transport takes it.
    """

    __slots__ = ("at", "clock", "most")

    at: float
    clock: Callable[[], float]
    most: float

    def __new__(cls, seconds: float, at: float, clock: Callable[[], float], most: float) -> TimeLeft:
        made = super().__new__(cls, seconds)
        made.at = at
        made.clock = clock
        made.most = most
        return made

    def left(self) -> float:
        """Seconds for the next operation; more than 0, since 0 would mean not to wait at all."""
        return max(0.001, min(self.most, self.at - self.clock()))

    def __reduce__(self) -> tuple[Any, ...]:
        return (float, (float(self),))


def httpx_timeouts(plan: Plan, left: float | None) -> dict[str, float | None]:
    """What is left of a call's time as httpx's four limits."""
    limits = plan.timeout
    connect, read = limits.connect, limits.read
    body = plan.call.body
    write = body.stall_s if isinstance(body, Stream) else read
    if left is None:
        return {"connect": connect, "read": read, "write": write, "pool": None}
    at = cast(float, plan.deadline)
    clock = plan.clock.monotonic
    whole = TimeLeft(left, at, clock, left)
    part = whole if read is None or read >= left else TimeLeft(read, at, clock, read)
    return {
        "connect": left if connect is None or connect >= left else connect,
        "read": part,
        "write": part
        if write == read
        else whole
        if write is None or write >= left
        else TimeLeft(write, at, clock, write),
        "pool": left,
    }


# --- foreign errors ----------------------------------------------------------------------------------------------

# httpcore, httpx and httpx2 call their errors the same, so that one table by name serves all three.
_TIMEOUTS: Final = {
    "ConnectTimeout": ("could not connect to {url} in time", False),
    "PoolTimeout": ("no connection to {url} became free in time: every one of the pool is in use", False),
    "ReadTimeout": ("{url} did not answer in time", True),
    "WriteTimeout": ("{url} did not take the request in time", True),
    "TimeoutException": ("{url} did not answer in time", True),
}
_FAILURES: Final = {
    "ConnectError": ("could not connect to {url}", False),
    "ProxyError": ("the proxy did not connect to {url}", False),
    "ReadError": ("the connection to {url} broke before the answer was complete", True),
    "WriteError": ("the connection to {url} broke while the request was sent", True),
    "CloseError": ("the connection to {url} broke", True),
    "RemoteProtocolError": ("{url} closed the connection early or did not answer in HTTP", True),
    "NetworkError": ("the connection to {url} broke", True),
    "ProtocolError": ("{url} does not answer in HTTP", True),
    "TransportError": ("the request to {url} failed", True),
}
_MISUSES: Final = {
    "LocalProtocolError": "the request to {url} cannot be sent",
    "UnsupportedProtocol": "{url} cannot be reached with this http_client",
    "InvalidURL": "{url} cannot be reached with this http_client",
}


def translated(error: Exception, plan: Plan) -> APIError | None:
    """Our error for one of httpx, httpx2 or httpcore; None where it is somebody else's."""
    url = plan.config.base_url
    for family in type(error).__mro__:
        if family.__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            continue
        name = family.__name__
        if name in _TIMEOUTS:
            return timed_out(*_TIMEOUTS[name], plan)
        detail = plan.hide(str(error))
        if name in _FAILURES:
            text, sent = _FAILURES[name]
            message = text.format(url=url) + (f": {detail}" if detail else "")
            return APIConnectionError(message, sent=sent, retryable=True)
        if name in _MISUSES:
            return APIConnectionError(f"{_MISUSES[name].format(url=url)}: {detail}", sent=False)
        if name == "DecodingError":
            return APIResponseValidationError(f"the answer of {url} cannot be read: {detail}")
    return None


def timed_out(text: str, sent: bool, plan: Plan) -> APITimeoutError:
    """A timeout with the limits of the call in its message."""
    limits = plan.timeout
    granted = [f"{name} {value:g} s" for name, value in (("total", limits.total), ("connect", limits.connect),
               ("read", limits.read)) if value is not None]  # fmt: skip
    message = f"{text.format(url=plan.config.base_url)} (timeout: {', '.join(granted)})"
    return APITimeoutError(message, sent=sent, retryable=True)


def too_long(plan: Plan) -> APIResponseValidationError:
    """The answer is longer than the caller accepts."""
    return APIResponseValidationError(
        f"the answer to {plan.call.method} {plan.call.path} is longer than max_response_bytes, {plan.max_bytes}"
    )


def ended_early(plan: Plan) -> APIConnectionError:
    """A stream had no bytes at all."""
    return APIConnectionError(f"{plan.config.base_url} ended the stream before it began", sent=True, retryable=True)


def check_announced(reply: Reply, plan: Plan) -> None:
    """Refuse an answer whose announced length is too long before a byte of its body is read."""
    value = reply.header(b"content-length")
    if value is not None and value.isdigit() and (len(value) > 18 or int(value) > plan.max_bytes):
        raise too_long(plan)


class BodyReader:
    """Collects the pieces of an answer's body, never more than the caller accepts.

    A body of several pieces is received into one bytearray, of which tensors become writable views. Its memory is taken
    as bytes come in, not on the word of a header.
    """

    __slots__ = ("_buffer", "_first", "_plan")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._first = b""
        self._buffer: bytearray | None = None

    def add(self, piece: bytes) -> None:
        if self._buffer is not None:
            self._buffer += piece
            if len(self._buffer) > self._plan.max_bytes:
                raise too_long(self._plan)
        elif not self._first:
            if len(piece) > self._plan.max_bytes:
                raise too_long(self._plan)
            self._first = piece
        else:
            self._buffer = bytearray(self._first)
            self.add(piece)

    def body(self) -> bytes | bytearray:
        return self._first if self._buffer is None else self._buffer


# --- forks -------------------------------------------------------------------------------------------------------

_forgetful: weakref.WeakSet[Forgets] = weakref.WeakSet()


class Forgets(Protocol):
    """Something with connections that a forked child must not use."""

    def forget(self) -> None:
        """Drop every connection without closing it on the wire, and every lock that a dead thread may hold."""


def _forget_all() -> None:
    with warnings.catch_warnings():
        # The parent closes these sockets properly; here their numbers are only given up.
        warnings.simplefilter("ignore", ResourceWarning)
        for forgetful in list(_forgetful):
            forgetful.forget()


def forget_at_fork(forgetful: Forgets) -> None:
    """Have ``forgetful.forget()`` called in every child process that is forked from now on."""
    _forgetful.add(forgetful)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


# --- the default transport ---------------------------------------------------------------------------------------


class _Stream(httpcore.NetworkStream):
    """A network stream that asks `TimeLeft` limits what is left, and sends long buffers in pieces."""

    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, timeout.left() if type(timeout) is TimeLeft else timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, timeout.left() if type(timeout) is TimeLeft else timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Network(httpcore.NetworkBackend):
    """Connects as httpcore does."""

    def __init__(self) -> None:
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.connect_tcp(host, port, timeout, local_address, socket_options))


class PooledTransport(httpx.BaseTransport):
    """An httpx transport over httpcore's connection pool whose time limits cover a whole answer, see `TimeLeft`.

    ``httpx.HTTPTransport`` takes no network backend, which is where that is done. Everything else is as there.
    """

    def __init__(self, base_url: str, max_connections: int) -> None:
        limits: dict[str, Any] = {
            "max_connections": max_connections,
            "max_keepalive_connections": max_connections,
            "keepalive_expiry": KEEPALIVE_S,
            "network_backend": _Network(),
        }
        proxy = environment_proxy(base_url)
        self._pool: httpcore.ConnectionPool
        if proxy is None:
            self._pool = httpcore.ConnectionPool(ssl_context=tls_context(base_url), **limits)
        else:
            named = httpx.Proxy(proxy)
            if named.url.scheme not in ("http", "https"):
                raise ConfigurationError(
                    f"the environment names a {named.url.scheme} proxy; pass an http_client for it"
                )
            self._pool = httpcore.HTTPProxy(
                proxy_url=str(named.url), proxy_auth=named.raw_auth, ssl_context=tls_context(base_url), **limits
            )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; the answer's body is not read yet. Raises httpcore's errors, named like httpx's."""
        url = request.url
        extensions: Any = request.extensions
        answer = self._pool.handle_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=cast(httpx.SyncByteStream, request.stream),
                extensions=extensions,
            )
        )
        return httpx.Response(
            status_code=answer.status,
            headers=answer.headers,
            stream=_Answer(cast(Iterable[bytes], answer.stream)),
            extensions=cast(Any, answer).extensions,
        )

    def close(self) -> None:
        self._pool.close()


class _Answer(httpx.SyncByteStream):
    def __init__(self, stream: Iterable[bytes]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()


class Pieces(httpx.SyncByteStream):
    """A body of several buffers, or one that is read meanwhile; it can be sent any number of times."""

    def __init__(self, body: tuple[Any, ...] | Stream) -> None:
        self.body = body

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body) if isinstance(self.body, Stream) else pieces(self.body)


def pieces(buffers: Sequence[Any]) -> Iterator[bytes]:
    """Views of at most `PIECE_BYTES`, which httpcore and aiohttp take like bytes."""
    for buffer in buffers:
        view = memoryview(buffer)
        for start in range(0, len(view), PIECE_BYTES):
            yield cast(bytes, view[start : start + PIECE_BYTES])


def read_before(response: Any) -> list[bytes] | None:
    """The body of an answer that a hook of the caller's own client, or a mock, has read already; else None.

    httpx undid its Content-Encoding then, so that the header is taken away.
    """
    if not response.is_closed:
        return None
    response.headers.pop("content-encoding", None)
    return [response.content]


def joined(body: bytes | tuple[Any, ...]) -> bytes:
    """A body for a caller's own client, which may want to read it as bytes."""
    return body if isinstance(body, bytes) else b"".join(body)


class Incoming:
    """The body of an answer, piece by piece, while it comes in. Not for several threads at once."""

    def __init__(self, plan: Plan, response: httpx.Response, stream: Iterator[bytes], limit: float | None) -> None:
        self._plan = plan
        self._response = response
        self._stream = stream
        self._limit = limit
        self._first: bytes | None = None
        self._count = 0

    def begin(self) -> None:
        """Wait for the first piece. Raises APIConnectionError where none comes."""
        self._first = self.read()
        if not self._first:
            raise ended_early(self._plan)

    def read(self) -> bytes:
        """The next piece; empty at the end.

        Raises:
            APIError: the connection broke, the time is over, or the body is too long.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        plan = self._plan
        try:
            piece = next(self._stream, b"")
        except Exception as error:
            ours = translated(error, plan)
            if ours is None:
                raise
            raise ours from error
        self._count += len(piece)
        if self._count > plan.max_bytes:
            raise too_long(plan)
        if plan.deadline is not None and plan.clock.monotonic() > plan.deadline:
            raise timed_out("{url} did not finish its answer in time", True, plan)
        return piece

    def finish(self) -> None:
        """Read what ends the body, so that the connection can serve again, and close; never waits long for it."""
        try:
            if type(self._limit) is TimeLeft:
                self._limit.most = min(self._limit.most, LAST_BYTES_S)
                self.read()
        except APIError:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection, unless the body was read to its end. Closing twice is closing once."""
        self._response.close()


class SyncSender:
    """The connections of a synchronous client and of every copy that ``with_options`` makes of it.

    Safe to use from several threads. Closing it twice is closing it once.
    """

    def __init__(self, base_url: str, http_client: SyncHTTPClient | None, max_connections: int) -> None:
        self._base_url = base_url
        self._max_connections = max_connections
        self._client = http_client
        self._closed = False
        self._urls: dict[str, httpx.URL] = {}
        self._lock = threading.Lock()
        self._transport: PooledTransport | None = None
        # Closes connections when the sender is dropped or the program ends. A finalizer and not ``__del__``: in a cycle
        # of garbage sockets may be finalized before the sender, and they complain.
        self._open: list[PooledTransport] = []
        weakref.finalize(self, _close, self._open)
        forget_at_fork(self)

    def send(self, plan: Plan, headers: HeaderList, left: float | None) -> Reply:
        """Make one attempt and read the answer to its end.

        Raises:
            APIError: no complete answer came, or it was too long.
            ClientClosedError: `close` was called before.
        """
        if self._closed:
            raise ClientClosedError("the client is closed; make a new one")
        try:
            response, stream = self._begin(plan, headers, httpx_timeouts(plan, left))
            try:
                reply = Reply(response.status_code, response.headers.raw)
                check_announced(reply, plan)
                reader = BodyReader(plan)
                for piece in stream:
                    reader.add(piece)
                    if plan.deadline is not None and plan.clock.monotonic() > plan.deadline:
                        raise timed_out("{url} did not finish its answer in time", True, plan)
            finally:
                response.close()
        except APIError:
            raise
        except Exception as error:
            ours = translated(error, plan)
            if ours is None:
                raise
            raise ours from error
        reply.body = reader.body()
        return reply

    def open(self, plan: Plan, headers: HeaderList, left: float | None) -> OpenReply[Incoming]:
        """Make one attempt and read the answer up to the first piece of its body, or to its end where it is no stream.

        Raises:
            APIError: no answer came, or none of its body.
            ClientClosedError: `close` was called before.
        """
        if self._closed:
            raise ClientClosedError("the client is closed; make a new one")
        timeouts = httpx_timeouts(plan, left)
        try:
            response, stream = self._begin(plan, headers, timeouts)
            try:
                reply: OpenReply[Incoming] = OpenReply(response.status_code, response.headers.raw)
                incoming = Incoming(plan, response, iter(stream), timeouts["read"])
                if reply.streams:
                    incoming.begin()
                    reply.pieces = incoming
                    return reply
                check_announced(reply, plan)
                reader = BodyReader(plan)
                while piece := incoming.read():
                    reader.add(piece)
                reply.body = reader.body()
                response.close()
            except BaseException:
                response.close()
                raise
        except APIError:
            raise
        except Exception as error:
            ours = translated(error, plan)
            if ours is None:
                raise
            raise ours from error
        return reply

    def _begin(
        self, plan: Plan, headers: HeaderList, timeouts: dict[str, float | None]
    ) -> tuple[httpx.Response, Iterable[bytes]]:
        """Send a request; the answer's body is not read yet. Raises errors of httpx and its like."""
        call = plan.call
        if self._client is not None:
            request = self._client.build_request(
                call.method,
                self._base_url + call.path,
                content=iter(call.body) if isinstance(call.body, Stream) else joined(call.body),
                headers=headers,
                timeout=foreign_timeout(self._client, timeouts),
            )
            response = self._client.send(request, stream=True, follow_redirects=False)
            read = read_before(response)
            return response, response.stream if read is None else read
        body = call.body
        response = (self._transport or self._opened()).handle_request(
            httpx.Request(
                call.method,
                self._url(call.path),
                headers=headers,
                stream=httpx.ByteStream(body) if isinstance(body, bytes) else Pieces(body),
                extensions={"timeout": timeouts},
            )
        )
        return response, cast(_Answer, response.stream)

    def _url(self, path: str) -> httpx.URL:
        url = self._urls.get(path)
        if url is None:
            if len(self._urls) >= 1024:
                self._urls.clear()
            url = self._urls[path] = httpx.URL(self._base_url + path)
        return url

    def _opened(self) -> PooledTransport:
        with self._lock:
            if self._transport is None:
                self._transport = PooledTransport(self._base_url, self._max_connections)
                self._open.append(self._transport)
            return self._transport

    def forget(self) -> None:
        self._lock = threading.Lock()
        self._transport = None
        self._open.clear()

    def close(self) -> None:
        """Close every connection; a caller's own client is closed too."""
        self._closed = True
        self._transport = None
        _close(self._open)
        if self._client is not None:
            self._client.close()


def _close(transports: list[PooledTransport]) -> None:
    # At the end of a program anything may be gone, and nobody is left to tell.
    with contextlib.suppress(Exception):
        while transports:
            transports.pop().close()


def foreign_timeout(client: object, timeouts: dict[str, float | None]) -> Any:
    """The limits as the ``Timeout`` of the family that a caller's client belongs to."""
    other = sys.modules.get("httpx2")
    family: Any = httpx
    if other is not None and isinstance(client, other.Client | other.AsyncClient):
        family = other
    return family.Timeout(**timeouts)
