"""What a gateway and an engine in a process of its own send each other: frames of four bytes of length and a body.

The first frame tells the engine what to open, its first answer what came of that. Then ``ORDER`` and ``CANCEL``, with
a byte in front that says which, go one way, and reports the other.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Final

LENGTH: Final = struct.Struct("<I")
ORDER: Final = b"O"
CANCEL: Final = b"C"
NUMBER: Final = struct.Struct("<Q")
MAX_FRAME_BYTES: Final = 64 << 20
"""A prompt of two million tokens takes 16 MiB."""
MAX_REPORT_BYTES: Final = 4 << 20
"""Of what an engine says, which the event loop parses: 256 answers' logarithms take a tenth of it."""


def pack(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


def receive(stream: socket.socket) -> bytes | None:
    """The next frame, waited for; None where the other side is gone."""
    head = _exactly(stream, LENGTH.size)
    return None if head is None else _exactly(stream, LENGTH.unpack(head)[0])


def _exactly(stream: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = stream.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


async def read(reader: asyncio.StreamReader) -> bytes:
    """The next frame of an engine.

    Raises:
        ValueError: it is longer than any.
        asyncio.IncompleteReadError: the other side is gone.
    """
    (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    if size > MAX_REPORT_BYTES:
        raise ValueError(f"a report of {size} bytes")
    return await reader.readexactly(size)
