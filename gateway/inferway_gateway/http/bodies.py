"""Request bodies in, answers out: limits, decompression and compression, with as few copies as there can be."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import numpy as np

from ..core.errors import (
    CancelledByCallerError,
    MalformedRequestError,
    PayloadTooLargeError,
    UnsupportedEncodingError,
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Body = bytes | bytearray | memoryview

_ALIGNMENT: Final = 64
_OFF_LOOP_BYTES: Final = 64 * 1024
"""Bodies larger than this are inflated and deflated on a thread: zlib releases the GIL and takes milliseconds."""
_COMPRESS_FROM_BYTES: Final = 4 * 1024
_INFLATE_STEP: Final = 1 << 20


async def read_body(receive: Receive, declared: int | None, limit: int, head: int = 0) -> Body:
    """Receive a whole body.

    A body of known length that arrives in pieces is written into one buffer as it comes: one copy. The buffer is placed
    so that the byte at ``head``, where the first binary tensor begins, is aligned and can be used where it lies.

    Args:
        receive: the ASGI callable.
        declared: Content-Length, None for a chunked body.
        limit: the most bytes that are accepted.
        head: length of the JSON header before the tensors.
    Raises:
        PayloadTooLargeError: more than ``limit`` bytes, declared or received.
        CancelledByCallerError: the caller went away.
        MalformedRequestError: the body differs from its declared length.
    """
    if declared is not None and declared > limit:
        raise PayloadTooLargeError(f"expected a body of at most {limit} bytes, got {declared}")
    message = await receive()
    if message["type"] == "http.disconnect":
        raise CancelledByCallerError("the caller went away while its request was read")
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False):
        if len(body) > limit:
            raise PayloadTooLargeError(f"expected a body of at most {limit} bytes, got {len(body)}")
        return body
    if declared is None:
        return await _read_chunked(receive, body, limit)
    raw = np.empty(declared + _ALIGNMENT, np.uint8)
    start = -(raw.ctypes.data + head) % _ALIGNMENT
    buffer = raw[start : start + declared].data.cast("B")
    position = 0
    while True:
        end = position + len(body)
        if end > declared:
            raise MalformedRequestError(f"expected a body of {declared} bytes, got more")
        buffer[position:end] = body
        position = end
        if not message.get("more_body", False):
            break
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CancelledByCallerError("the caller went away while its request was read")
        body = message.get("body", b"")
    if position != declared:
        raise MalformedRequestError(f"expected a body of {declared} bytes, got {position}")
    return buffer


async def _read_chunked(receive: Receive, first: bytes, limit: int) -> Body:
    buffer = bytearray(first)
    more = True
    while more:
        if len(buffer) > limit:
            raise PayloadTooLargeError(f"expected a body of at most {limit} bytes, got more")
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CancelledByCallerError("the caller went away while its request was read")
        buffer += message.get("body", b"")
        more = message.get("more_body", False)
    if len(buffer) > limit:
        raise PayloadTooLargeError(f"expected a body of at most {limit} bytes, got more")
    return buffer


async def inflate(body: Body, encoding: bytes, limit: int) -> Body:
    """Undo a Content-Encoding.

    Raises:
        UnsupportedEncodingError: anything but gzip, deflate and identity.
        PayloadTooLargeError: the content is longer than ``limit``; no more than that is ever produced.
        MalformedRequestError: the bytes are not what the encoding says.
    """
    name = encoding.strip().lower()
    if name in (b"", b"identity"):
        return body
    if name not in (b"gzip", b"x-gzip", b"deflate"):
        raise UnsupportedEncodingError(
            f"expected Content-Encoding gzip, deflate or identity, got '{encoding[:40].decode('latin-1')}'"
        )
    if len(body) > _OFF_LOOP_BYTES:
        return await asyncio.to_thread(_inflate, body, name, limit)
    return _inflate(body, name, limit)


def _inflate(body: Body, name: bytes, limit: int) -> bytearray:
    view = memoryview(body)
    # deflate is zlib's framing by RFC 9110; bare streams are seen in the wild and told by their first byte.
    bare = name == b"deflate" and (len(view) < 2 or view[0] & 0x0F != 8 or (view[0] * 256 + view[1]) % 31)
    engine = zlib.decompressobj(31 if name != b"deflate" else -15 if bare else 15)
    content = bytearray()  # pieces that are joined in the end would stand in memory twice
    try:
        data: bytes | memoryview = view
        while not engine.eof:
            part = engine.decompress(data, _INFLATE_STEP)
            if not part and not engine.unconsumed_tail:
                break
            if len(content) + len(part) > limit:
                raise PayloadTooLargeError(f"expected a body of at most {limit} bytes after decompression, got more")
            content += part
            data = engine.unconsumed_tail
    except zlib.error:
        raise MalformedRequestError(
            f"expected a {name.decode()} stream as Content-Encoding says, got other bytes"
        ) from None
    if not engine.eof:
        raise MalformedRequestError(f"expected a whole {name.decode()} stream, got one that is cut off")
    if engine.unused_data:
        raise MalformedRequestError(f"expected one {name.decode()} stream, got bytes after its end")
    return content


def accepted_encoding(accept: bytes, size: int, *, binary: bool) -> bytes | None:
    """Which coding to answer with, None for none.

    A caller that names exactly one coding wants it. One that names several has it from its library, where it pays only
    for JSON of some length: packing float tensors costs far more time than it saves on any fast network.
    """
    wanted: list[bytes] = []
    for part in accept.lower().split(b","):
        name, _, rest = part.partition(b";")
        quality = rest.strip().replace(b" ", b"")
        if quality.startswith(b"q=0") and not quality.strip(b"q=0."):
            continue
        wanted.append(name.strip())
    known = [name for name in (b"gzip", b"deflate") if name in wanted]
    if not known:
        return None
    if len(wanted) == 1 or (not binary and size >= _COMPRESS_FROM_BYTES):
        return known[0]
    return None


async def deflate(parts: list[bytes | memoryview], encoding: bytes) -> bytes:
    """Compress an answer with the ``gzip`` or ``deflate`` coding."""
    if sum(map(len, parts)) > _OFF_LOOP_BYTES:
        return await asyncio.to_thread(_deflate, parts, encoding)
    return _deflate(parts, encoding)


def _deflate(parts: list[bytes | memoryview], encoding: bytes) -> bytes:
    engine = zlib.compressobj(1, zlib.DEFLATED, 31 if encoding == b"gzip" else 15)
    packed = [engine.compress(part) for part in parts]
    packed.append(engine.flush())
    return b"".join(packed)
