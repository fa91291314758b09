"""The asynchronous half of `_transport`: httpx over aiohttp, one pool for each event loop.

Plain httpx slows down with the number of requests in flight (its pool looks at all of them for each: 128 in flight cost
10 ms of CPU each, measured in November 2026), so the default transport is that of ``httpx-aiohttp``. Its own way of
handling a request costs as much as aiohttp's whole request does; `LeanAiohttpTransport` keeps its set-up and closes the
gap. A caller's own ``httpx.AsyncClient`` or ``httpx2.AsyncClient`` is used whole instead.

**Loops.** Connections belong to the event loop they were made on. A client that outlives its loop (``asyncio.run``
twice, Jupyter, one loop for each thread) gets a pool for each. Who closes the pool of a loop that ends, where nobody
called ``close``? An asynchronous generator that waits in every loop: ``asyncio.run`` closes those before the loop, and
dropping the last reference to one closes it on its own loop, from whatever thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, cast

import aiohttp
import httpx
import yarl
from aiohttp.abc import AbstractStreamWriter
from httpx_aiohttp import AiohttpTransport
from multidict import CIMultiDict

from ._core import HeaderList, OpenReply, Plan, Reply, Stream
from ._deadlines import Deadlines
from ._errors import APIConnectionError, APIError, ClientClosedError
from ._options import Timeout
from ._transport import (
    KEEPALIVE_S,
    LAST_BYTES_S,
    AsyncHTTPClient,
    BodyReader,
    check_announced,
    ended_early,
    environment_proxy,
    foreign_timeout,
    forget_at_fork,
    httpx_timeouts,
    joined,
    pieces,
    read_before,
    timed_out,
    tls_context,
    too_long,
    translated,
)


class AsyncPieces(httpx.AsyncByteStream, aiohttp.payload.Payload):
    """A body of several buffers, sent without being joined; it can be sent any number of times."""

    _autoclose = True

    def __init__(self, buffers: tuple[Any, ...]) -> None:
        super().__init__(buffers, content_type="application/octet-stream")
        self._buffers = buffers
        self._size = sum(len(memoryview(buffer)) for buffer in buffers)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return b"".join(self._buffers).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        for piece in pieces(self._buffers):
            await writer.write(piece)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in pieces(self._buffers):
            yield piece


class AsyncStream(httpx.AsyncByteStream, aiohttp.payload.Payload):
    """A body that is read while it is sent; where reading waits for a disk, in a thread."""

    _autoclose = True

    def __init__(self, body: Stream) -> None:
        super().__init__(body, content_type="application/octet-stream")
        self._body = body
        self._size = body.size

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("a body of this length is not decoded")

    async def write(self, writer: AbstractStreamWriter) -> None:
        async for piece in self:
            # aiohttp's limits begin when the body is sent, so that a server which takes no more would hold it for ever.
            try:
                async with asyncio.timeout(self._body.stall_s):
                    await writer.write(piece)
                    await writer.drain()
            except TimeoutError as error:
                raise aiohttp.ServerTimeoutError("the body is not taken") from error

    async def __aiter__(self) -> AsyncIterator[Any]:
        pieces = self._body.read()
        while True:
            piece = await asyncio.to_thread(next, pieces, None) if self._body.blocking else next(pieces, None)
            if piece is None:
                return
            yield piece
            self._body.sent(len(piece))


def _streamed(body: tuple[Any, ...] | Stream) -> AsyncPieces | AsyncStream:
    return AsyncStream(body) if isinstance(body, Stream) else AsyncPieces(body)


class _Answer(httpx.AsyncByteStream):
    __slots__ = ("_response",)

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        content = self._response.content
        while piece := await content.readany():
            yield piece

    async def read_into(self, reader: BodyReader) -> None:
        """What ``async for`` over the stream does, without a generator."""
        content = self._response.content
        while piece := await content.readany():
            reader.add(piece)

    async def aclose(self) -> None:
        self.release()

    def release(self) -> None:
        # Gives a connection whose answer was read back to the pool and closes any other; never waits.
        self._response.release()


class LeanRequest(httpx.Request):
    """An ``httpx.Request`` that is made up when somebody looks at it.

    Its constructor copies headers into ``httpx.Headers`` one by one, which is most of what it costs, while aiohttp
    wants pairs of text. So the base class's constructor runs when an attribute is asked for that is not set here.
    """

    def __init__(
        self,
        method: str,
        url: httpx.URL,
        target: yarl.URL,
        pairs: HeaderList,
        body: bytes | AsyncPieces | AsyncStream,
        extensions: dict[str, Any],
    ) -> None:
        self.method = method
        self.url = url
        self.target = target
        self.pairs = pairs
        self.body = body
        self.extensions = extensions

    def __getattr__(self, name: str) -> Any:
        if "stream" in self.__dict__:
            raise AttributeError(name)
        stream = httpx.ByteStream(self.body) if isinstance(self.body, bytes) else self.body
        super().__init__(self.method, self.url, headers=self.pairs, stream=stream, extensions=self.extensions)
        return getattr(self, name)


class LeanResponse(httpx.Response):
    """An ``httpx.Response`` that is made up when somebody looks at it, for the same reason as `LeanRequest`."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.status_code = answer.status
        self.raw_headers = answer.raw_headers
        self.answer = _Answer(answer)

    def __getattr__(self, name: str) -> Any:
        if "headers" in self.__dict__:
            raise AttributeError(name)
        super().__init__(self.status_code, headers=self.raw_headers, stream=self.answer)
        return getattr(self, name)


def _target(url: httpx.URL) -> yarl.URL:
    """A URL for aiohttp, which would otherwise undo quotes of a path that it finds needless."""
    return yarl.URL(str(url), encoded=True)


class LeanAiohttpTransport(AiohttpTransport):
    """`httpx_aiohttp.AiohttpTransport` with a session of our own and less work for each request.

    Against its base class it hands headers over without going through ``httpx.Headers`` one by one, keeps
    ``ClientTimeout`` objects, reads the answer in the pieces in which it came, and lets aiohttp's own errors pass,
    because the base class calls an answer that broke off a connect timeout. CPU of one small binary request, 128 in
    flight, on a 2-core x86 machine (November 2026): 72 µs bare aiohttp, 140 µs through the base class, 73 µs here.
    """

    def __init__(self, base_url: str, max_connections: int) -> None:
        proxy = environment_proxy(base_url)
        super().__init__(
            verify=tls_context(base_url),
            limits=httpx.Limits(max_connections=max_connections, keepalive_expiry=KEEPALIVE_S),
            proxy=None if proxy is None else httpx.Proxy(proxy),
        )
        self._proxy: dict[str, Any] = {}
        if self.proxy is not None:
            self._proxy = {"proxy": str(self.proxy.url), "proxy_headers": dict(self.proxy.headers)}
            if self.proxy.auth is not None:
                # aiohttp turns this into Proxy-Authorization, on the request itself where there is no tunnel.
                self._proxy["proxy_headers"]["Authorization"] = aiohttp.encode_basic_auth(*self.proxy.auth)
        self._limits: dict[tuple[Any, Any], aiohttp.ClientTimeout] = {}
        self.session = self.get_client()
        self.deadlines = Deadlines(asyncio.get_running_loop())

    def get_client(self) -> aiohttp.ClientSession:
        """A session on the running loop that keeps no cookies and leaves answers as they come.

        It adds ``Accept: */*``, as aiohttp does; telling it not to costs more than the header.
        """
        connector = aiohttp.TCPConnector(
            limit=self.limits.max_connections or 0,
            keepalive_timeout=self.limits.keepalive_expiry,
            ssl=self.ssl_context,
        )
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),
        )
        # aiohttp would send a GET again by itself when a kept connection breaks: an attempt that nobody counts and that
        # no budget covers. It has no public switch for this; its own test client does the same.
        session._retry_connection = False  # pyright: ignore[reportPrivateUsage]
        return session

    async def handle_async_request(self, request: httpx.Request) -> LeanResponse:
        """Send one request; the answer's body is not read yet. Raises aiohttp's errors."""
        limits = cast(dict[str, Any], request.extensions.get("timeout") or {})
        key = (limits.get("connect"), limits.get("read"))
        timeout = self._limits.get(key)
        if timeout is None:
            if len(self._limits) >= 64:
                self._limits.clear()
            timeout = self._limits[key] = aiohttp.ClientTimeout(total=None, sock_connect=key[0], sock_read=key[1])
        if type(request) is LeanRequest:
            target, pairs, body = request.target, request.pairs, request.body
        else:
            target, pairs, body = _target(request.url), request.headers.multi_items(), await request.aread()
        answer = await self.session.request(
            request.method,
            target,
            headers=CIMultiDict(pairs),
            data=body or None,
            allow_redirects=False,
            timeout=timeout,
            **self._proxy,
        )
        return LeanResponse(answer)

    async def aclose(self) -> None:
        await self.session.close()

    def discard(self) -> None:
        """Let go of the connections of a loop that was closed before them, without a word to anybody."""
        connector = self.session.connector
        self.session.detach()
        if connector is not None:
            # On a closed loop this only marks the connector as closed, so that its finalizer stays quiet.
            for _ in connector.close().__await__():
                pass


def aiohttp_translated(error: Exception, plan: Plan) -> APIError | None:
    """Our error for one of aiohttp's; None where it is somebody else's."""
    url = plan.config.base_url
    detail = plan.hide(str(error))
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return timed_out("could not connect to {url} in time", False, plan)
    if isinstance(error, aiohttp.ServerTimeoutError):
        return timed_out("{url} did not answer in time", True, plan)
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ClientConnectorCertificateError):
        return APIConnectionError(f"could not connect to {url}: {detail}", sent=False, retryable=True)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return APIConnectionError(f"the proxy did not connect to {url}: {detail}", sent=False, retryable=True)
    if isinstance(error, aiohttp.InvalidURL):
        return APIConnectionError(f"{url} cannot be reached: {detail}", sent=False)
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError):
        message = f"the connection to {url} broke before the answer was complete: {detail}"
        return APIConnectionError(message, retryable=True)
    if isinstance(error, aiohttp.ClientError):
        return APIConnectionError(f"{url} did not answer in HTTP: {detail}", retryable=True)
    return None


class AsyncIncoming:
    """The body of an answer, piece by piece, while it comes in. Not for several tasks at once.

    Attributes:
        release: closes at once, for where nothing can be awaited; None where that cannot be done.
    """

    def __init__(
        self,
        plan: Plan,
        stream: AsyncIterator[bytes],
        close: Callable[[], Awaitable[None]],
        release: Callable[[], None] | None = None,
    ) -> None:
        self._plan = plan
        self._stream = stream
        self._close = close
        self.release = release
        self._first: bytes | None = None
        self._count = 0

    async def begin(self) -> None:
        """Wait for the first piece. Raises APIConnectionError where none comes."""
        self._first = await self.read()
        if not self._first:
            raise ended_early(self._plan)

    async def read(self, at_most_s: float | None = None) -> bytes:
        """The next piece; empty at the end.

        Raises:
            APIError: the connection broke, the time is over, or the body is too long.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        plan = self._plan
        left = plan.left()
        if left is None or (at_most_s is not None and at_most_s < left):
            left = at_most_s
        limit = asyncio.timeout(left)
        try:
            async with limit:
                piece = await anext(self._stream, b"")
        except Exception as error:
            if limit.expired() and isinstance(error, TimeoutError):
                raise timed_out("{url} did not finish its answer in time", True, plan) from error
            ours = aiohttp_translated(error, plan) or translated(error, plan)
            if ours is None:
                raise
            raise ours from error
        self._count += len(piece)
        if self._count > plan.max_bytes:
            raise too_long(plan)
        return piece

    async def finish(self) -> None:
        """Read what ends the body, so that the connection can serve again, and close; never waits long for it."""
        try:
            await self.read(LAST_BYTES_S)
        except APIError:
            pass
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection, unless the body was read to its end. Closing twice is closing once."""
        await self._close()


async def _several(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def _alive(transport: LeanAiohttpTransport) -> AsyncGenerator[None, None]:
    """Waits in its loop for as long as the pool may be used; closing it closes the pool."""
    try:
        yield
    finally:
        await transport.aclose()


_Pool: TypeAlias = tuple[LeanAiohttpTransport, AsyncGenerator[None, None]]
"""A transport and the generator that keeps it alive."""

_abandoned: list[object] = []
"""Pools that a forked child found: finalizing them would touch the event loop's epoll, which the parent still uses."""


class AsyncSender:
    """The connections of an asynchronous client and of every copy that ``with_options`` makes of it.

    May be used from several event loops, also at the same time in several threads. Closing it twice is closing it once.
    """

    def __init__(self, base_url: str, http_client: AsyncHTTPClient | None, max_connections: int) -> None:
        self._base_url = base_url
        self._max_connections = max_connections
        self._client = http_client
        self._closed = False
        self._urls: dict[str, tuple[httpx.URL, yarl.URL]] = {}
        self._pools: dict[asyncio.AbstractEventLoop, _Pool] = {}
        weakref.finalize(self, _discard_closed, self._pools)
        # The pool that was used last, with its loop: one object, so that threads cannot see half of a change.
        self._last: tuple[asyncio.AbstractEventLoop | None, LeanAiohttpTransport | None] = (None, None)
        self._limits: tuple[Timeout | None, dict[str, Any]] = (None, {})
        forget_at_fork(self)

    async def send(self, plan: Plan, headers: HeaderList, left: float | None) -> Reply:
        """Make one attempt and read the answer to its end.

        A cancelled caller's connection is closed, so that the gateway learns that nobody waits any more.

        Raises:
            APIError: no complete answer came, or it was too long.
            ClientClosedError: `aclose` was called before.
        """
        if self._closed:
            raise ClientClosedError("the client is closed; make a new one")
        if self._client is not None:
            return await self._through_client(self._client, plan, headers, left)
        loop, transport = self._last
        if transport is None or loop is not asyncio.get_running_loop():
            transport = await self._here()
        call = plan.call
        body = call.body
        deadline = None if left is None else transport.deadlines.begin(left)
        try:
            response = await transport.handle_async_request(
                LeanRequest(
                    call.method,
                    *(self._urls.get(call.path) or self._url(call.path)),
                    headers,
                    body if isinstance(body, bytes) else _streamed(body),
                    self._extensions(plan.timeout),
                )
            )
            answer = response.answer
            try:
                reply = Reply(response.status_code, response.raw_headers)
                check_announced(reply, plan)
                reader = BodyReader(plan)
                await answer.read_into(reader)
            finally:
                answer.release()
            reply.body = reader.body()
            return reply
        except asyncio.CancelledError as error:
            if deadline is not None and transport.deadlines.end(deadline):
                raise timed_out("{url} did not answer in time", True, plan) from error
            raise
        except APIError:
            raise
        except Exception as error:
            ours = aiohttp_translated(error, plan)
            if ours is None:
                raise
            raise ours from error
        finally:
            if deadline is not None:
                transport.deadlines.end(deadline)

    async def _through_client(
        self, client: AsyncHTTPClient, plan: Plan, headers: HeaderList, left: float | None
    ) -> Reply:
        limit = asyncio.timeout(left)
        try:
            async with limit:
                body = plan.call.body
                request = client.build_request(
                    plan.call.method,
                    self._base_url + plan.call.path,
                    content=aiter(AsyncStream(body)) if isinstance(body, Stream) else joined(body),
                    headers=headers,
                    timeout=foreign_timeout(client, httpx_timeouts(plan, left)),
                )
                response = await client.send(request, stream=True, follow_redirects=False)
                try:
                    read = read_before(response)
                    reply = Reply(response.status_code, response.headers.raw)
                    check_announced(reply, plan)
                    reader = BodyReader(plan)
                    if read is not None:
                        reader.add(read[0])
                    else:
                        async for piece in response.stream:
                            reader.add(piece)
                finally:
                    await response.aclose()
        except APIError:
            raise
        except Exception as error:
            if limit.expired() and isinstance(error, TimeoutError):
                raise timed_out("{url} did not answer in time", True, plan) from error
            ours = aiohttp_translated(error, plan) or translated(error, plan)
            if ours is None:
                raise
            raise ours from error
        reply.body = reader.body()
        return reply

    async def open(self, plan: Plan, headers: HeaderList, left: float | None) -> OpenReply[AsyncIncoming]:
        """Make one attempt and read the answer up to the first piece of its body, or to its end where it is no stream.

        A cancelled caller's connection is closed.

        Raises:
            APIError: no answer came, or none of its body.
            ClientClosedError: `aclose` was called before.
        """
        if self._closed:
            raise ClientClosedError("the client is closed; make a new one")
        limit = asyncio.timeout(left)
        try:
            async with limit:
                incoming, reply = await self._begin(plan, headers, left)
                try:
                    if reply.streams:
                        await incoming.begin()
                        reply.pieces = incoming
                        return reply
                    check_announced(reply, plan)
                    reader = BodyReader(plan)
                    while piece := await incoming.read():
                        reader.add(piece)
                    reply.body = reader.body()
                    await incoming.close()
                except BaseException:
                    await incoming.close()
                    raise
        except APIError:
            raise
        except Exception as error:
            if limit.expired() and isinstance(error, TimeoutError):
                raise timed_out("{url} did not answer in time", True, plan) from error
            ours = aiohttp_translated(error, plan) or translated(error, plan)
            if ours is None:
                raise
            raise ours from error
        return reply

    async def _begin(
        self, plan: Plan, headers: HeaderList, left: float | None
    ) -> tuple[AsyncIncoming, OpenReply[AsyncIncoming]]:
        """Send a request; the answer's body is not read yet. Raises errors of aiohttp, httpx and their like."""
        call = plan.call
        reply: OpenReply[AsyncIncoming]
        if self._client is not None:
            request = self._client.build_request(
                call.method,
                self._base_url + call.path,
                content=joined(cast(Any, call.body)),
                headers=headers,
                timeout=foreign_timeout(self._client, httpx_timeouts(plan, left)),
            )
            response = await self._client.send(request, stream=True, follow_redirects=False)
            reply = OpenReply(response.status_code, response.headers.raw)
            read = read_before(response)
            stream = response.stream if read is None else _several(read)
            return AsyncIncoming(plan, aiter(stream), response.aclose), reply
        transport = await self._here()
        body = cast("bytes | tuple[Any, ...]", call.body)
        answered = await transport.handle_async_request(
            LeanRequest(
                call.method,
                *(self._urls.get(call.path) or self._url(call.path)),
                headers,
                body if isinstance(body, bytes) else _streamed(body),
                self._extensions(plan.timeout),
            )
        )
        reply = OpenReply(answered.status_code, answered.raw_headers)
        return AsyncIncoming(plan, aiter(answered.answer), answered.answer.aclose, answered.answer.release), reply

    def _extensions(self, timeout: Timeout) -> dict[str, Any]:
        """httpx's limits without the total, which `Deadlines` watches; one object while they stay the same."""
        known, extensions = self._limits
        if known is not timeout:
            limits = {"connect": timeout.connect, "read": timeout.read, "write": None, "pool": None}
            extensions = {"timeout": limits}
            self._limits = (timeout, extensions)
        return extensions

    def _url(self, path: str) -> tuple[httpx.URL, yarl.URL]:
        if len(self._urls) >= 1024:
            self._urls.clear()
        url = httpx.URL(self._base_url + path)
        found = self._urls[path] = (url, _target(url))
        return found

    async def _here(self) -> LeanAiohttpTransport:
        """The pool of the running loop, made where there is none; pools of loops that were closed are let go."""
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            for other in [other for other in self._pools if other.is_closed()]:
                _discard(self._pools.pop(other)[0])
            transport = LeanAiohttpTransport(self._base_url, self._max_connections)
            guard = _alive(transport)
            # Entered before anything is awaited that could let another task in: two pools for one loop would leak one.
            self._pools[loop] = pool = (transport, guard)
            await anext(guard)
        self._last = (loop, pool[0])
        return pool[0]

    def forget(self) -> None:
        if self._pools:
            _abandoned.append((dict(self._pools), self._last))
        self._pools.clear()
        self._last = (None, None)

    async def aclose(self) -> None:
        """Close the running loop's pool now; those of other loops close on their own loops soon after."""
        self._closed = True
        pools = dict(self._pools)
        self._pools.clear()
        self._last = (None, None)
        here = pools.pop(asyncio.get_running_loop(), None)
        for loop, (transport, _) in pools.items():
            if loop.is_closed():
                _discard(transport)
        pools.clear()
        if here is not None:
            await here[1].aclose()
        if self._client is not None:
            await self._client.aclose()


def _discard_closed(pools: dict[asyncio.AbstractEventLoop, _Pool]) -> None:
    """When a sender is dropped: pools of loops that are closed. Those of others close as their guards are dropped."""
    # At the end of a program anything may be gone, and nobody is left to tell.
    with contextlib.suppress(Exception):
        for loop, (transport, _) in pools.items():
            if loop.is_closed():
                _discard(transport)
        pools.clear()


def _discard(transport: LeanAiohttpTransport) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        transport.discard()
