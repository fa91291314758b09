"""The connections to an upstream: httpx over aiohttp.

Plain httpx slows down with the number of requests in flight (its pool looks at all of them for each: 128 in flight cost
10 ms of CPU each, measured in November 2026), so the transport is that of ``httpx-aiohttp``, with a session of our own:
one that keeps no cookies, reads no environment, follows nothing and sends nothing again by itself.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence

import aiohttp
import httpx
from aiohttp.abc import AbstractStreamWriter
from httpx_aiohttp import AiohttpTransport

from ...core.upstream import UpstreamSpec

KEEPALIVE_S = 4.0
"""Shorter than what servers allow (uvicorn closes after five seconds), so that few requests meet a closed one."""
_PIECE_BYTES = 1 << 20

Buffer = bytes | bytearray | memoryview


class Pieces(httpx.AsyncByteStream, aiohttp.payload.Payload):
    """A body of several buffers, sent without being joined; it can be sent any number of times."""

    _autoclose = True

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        super().__init__(buffers, content_type="application/octet-stream")
        self._buffers = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        self._size = sum(map(len, self._buffers))

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return b"".join(self._buffers).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        for buffer in self._buffers:
            # In pieces, or a connection that broke would be noticed only after all of it was queued.
            for start in range(0, len(buffer), _PIECE_BYTES):
                await writer.write(buffer[start : start + _PIECE_BYTES])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for buffer in self._buffers:
            yield bytes(buffer)


class _Body(httpx.AsyncByteStream):
    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        content = self._answer.content
        while piece := await content.readany():
            yield piece

    async def aclose(self) -> None:
        # Gives a connection whose answer was read to its end back, and closes any other.
        self._answer.release()


class UpstreamTransport(AiohttpTransport):
    """``httpx_aiohttp.AiohttpTransport`` that lets aiohttp's own errors pass.

    The base class calls an answer that broke off a connect timeout, and which of the two it was decides here what is
    told of an endpoint.
    """

    def __init__(self, spec: UpstreamSpec, context: ssl.SSLContext) -> None:
        super().__init__(verify=context, trust_env=False)
        self._pool_size = spec.pool_size
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=spec.connect_timeout_s)
        self.session = self.get_client()

    def get_client(self) -> aiohttp.ClientSession:
        """A session on the running loop."""
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._pool_size, keepalive_timeout=KEEPALIVE_S, ssl=self.ssl_context, ttl_dns_cache=10
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None),
        )
        # aiohttp would send a GET again by itself when a kept connection breaks: a call that nobody counts and that no
        # budget covers. It has no public switch for this; its own test client does the same.
        session._retry_connection = False
        return session

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; the answer's body is not read yet. Raises aiohttp's errors."""
        stream = request.stream
        answer = await self.session.request(
            request.method,
            str(request.url),
            headers=request.headers.multi_items(),
            data=stream if isinstance(stream, Pieces) else None,
            allow_redirects=False,
            timeout=self._timeout,
        )
        return httpx.Response(answer.status, headers=answer.raw_headers, stream=_Body(answer), request=request)

    async def aclose(self) -> None:
        await self.session.close()


def tls_context(spec: UpstreamSpec) -> ssl.SSLContext:
    """Verifies certificates and names, always.

    Raises:
        OSError: ``ca_file`` cannot be read, or holds no certificate (``ssl.SSLError``).
    """
    return ssl.create_default_context(cafile=spec.ca_file)
