"""Requests that a front does not answer itself, passed on to the owner as they are.

Bodies are streamed both ways and never held: an upload may be larger than memory. A caller that goes away ends the
request to the owner too, so that an upload keeps what came and a long poll ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import httpcore
from starlette.types import Message, Receive, Scope, Send

from ..core.errors import CancelledByCallerError, GatewayError, ShuttingDownError
from .hub import FRONT_HEADER

_HOP_BY_HOP: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect")
)
"""Headers that are about one connection (RFC 9110, section 7.6.1); what is expected was answered by the edge."""
_IDLE_S: Final = 20.0
"""Shorter than the owner keeps an idle connection, so that no request runs into one that closes."""
_CONNECTIONS: Final = 1024


class _CallerGoneError(Exception):
    """Breaks the request to the owner off in the middle of its body."""


class OwnerProxy:
    """Passes requests on. Open it with ``async with``.

    Args:
        path: the owner's Unix socket.
        token: what the owner knows its fronts by.
    """

    def __init__(self, path: Path, token: str) -> None:
        self._token = token.encode()
        self._pool = httpcore.AsyncConnectionPool(
            uds=str(path), max_connections=_CONNECTIONS, keepalive_expiry=_IDLE_S, http1=True, http2=False
        )

    async def __aenter__(self) -> OwnerProxy:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with the owner's answer.

        Raises:
            ShuttingDownError: the owner does not answer; nothing was sent yet.
            CancelledByCallerError: the caller went away.
        """
        first = await receive()
        if first["type"] == "http.disconnect":
            raise CancelledByCallerError("the caller went away while its request was read")
        body = _Body(first, receive)
        answering = asyncio.ensure_future(self._exchange(scope, body, send))
        leaving = asyncio.ensure_future(body.left())
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()
                await asyncio.wait((answering,))
                if answering.cancelled():
                    raise CancelledByCallerError("the caller went away before its answer was there")
            answering.result()
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.wait((answering, leaving))

    async def _exchange(self, scope: Scope, body: _Body, send: Send) -> None:
        begun = False
        try:
            async with self._pool.stream(
                scope["method"].encode("ascii"),
                httpcore.URL(scheme=b"http", host=b"owner", target=_target(scope)),
                headers=self._headers(scope, body),
                content=body.pieces() if body.expected else None,
                extensions={"timeout": {"connect": 5.0, "pool": 5.0}},
            ) as answer:
                begun = True
                headers = [(n.lower(), v) for n, v in answer.headers if n.lower() not in _HOP_BY_HOP | {b"date"}]
                await send({"type": "http.response.start", "status": answer.status, "headers": headers})
                async for piece in answer.aiter_stream():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except _CallerGoneError:
            raise CancelledByCallerError("the caller went away while its request was read") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            if begun:
                raise
            failure: GatewayError = ShuttingDownError("the process that holds the models does not answer")
            raise failure from error

    def _headers(self, scope: Scope, body: _Body) -> list[tuple[bytes, bytes]]:
        named = {
            token.strip().lower()
            for name, value in scope["headers"]
            if name == b"connection"
            for token in value.split(b",")
        }
        headers = [
            (name, value)
            for name, value in scope["headers"]
            if name not in _HOP_BY_HOP and name not in named and name != FRONT_HEADER
        ]
        client = scope.get("client")
        headers.append((FRONT_HEADER, self._token + (b" " + client[0].encode("latin-1") if client else b"")))
        if all(name != b"host" for name, _ in headers):
            headers.append((b"host", b"localhost"))
        if body.expected and all(name != b"content-length" for name, _ in headers):
            headers.append((b"transfer-encoding", b"chunked"))
        return headers


class _Body:
    """A request's body as it comes, and whether its caller is still there."""

    def __init__(self, first: Message, receive: Receive) -> None:
        self._first = first
        self._receive = receive
        self._read = asyncio.Event()
        self.expected = bool(first.get("body")) or first.get("more_body", False)
        if not self.expected:
            self._read.set()

    async def pieces(self) -> AsyncIterator[bytes]:
        message = self._first
        while True:
            if message["type"] == "http.disconnect":
                raise _CallerGoneError
            piece = message.get("body", b"")
            if piece:
                yield bytes(piece)
            if not message.get("more_body", False):
                self._read.set()
                return
            message = await self._receive()

    async def left(self) -> None:
        """Wait until the caller goes away, once its body is read."""
        await self._read.wait()
        with suppress(asyncio.CancelledError):
            while (await self._receive())["type"] != "http.disconnect":
                pass


def _target(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return path + b"?" + query if query else path
