"""Long bodies, received straight into their memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import httptools
import numpy as np

if TYPE_CHECKING:
    from .exchange import Exchange
    from .protocol import EdgeProtocol

_ALIGNMENT: Final = 64


class Sink(asyncio.BufferedProtocol):
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
        so_far = exchange.parts if exchange.parts is not None else exchange.body
        body[: len(so_far)] = so_far
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
        exchange.hold(nbytes)
        if exchange.received == exchange.length:
            self._end()
            if connection.receiving is exchange:
                connection.parser = httptools.HttpRequestParser(connection)
                exchange.body = self._body
                connection.raw_complete()
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
