"""What a front and the owner say to each other: frames over a Unix socket, and tensors in them without a copy.

A frame is a header of 16 bytes (id, kind and length of the meta part, length of the data part), the meta part, which is
JSON of some hundred bytes, and the data part: the tensors' bytes one after the other, each at a multiple of 64. Writing
gathers them from where they lie; a data part that is not here as a whole is received into the buffer that it stays in.
So a large tensor is copied by the kernel, once out of this process and once into the other, and by nobody else.

Both ends are this gateway: a frame that makes no sense is a defect and ends the connection.
"""

from __future__ import annotations

import asyncio
import enum
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from ..core.tensors import DTYPES

Buffer = bytes | bytearray | memoryview

_HEADER: Final = struct.Struct("<IIQ")
_META_BITS: Final = 24
_META_LIMIT: Final = 512 * 1024
_RING_BYTES: Final = 1024 * 1024
"""What is read at once. Its pages are only touched as far as they are used."""
_HIGH_WATER_BYTES: Final = 8 * 1024 * 1024
"""Unsent bytes beyond which senders wait."""
_ALIGNMENT: Final = 64
_ZEROS: Final = bytes(_ALIGNMENT)
_NUMBERS: Final = {dtype.str: dtype for dtype in DTYPES.values() if dtype.kind != "O"}
_STRINGS: Final = "O"


class Kind(enum.IntEnum):
    """What a frame is. A front asks (id: any number that is not in use), the owner answers under the same id."""

    HELLO = 1
    """Front: its token. The first frame of a connection."""
    WELCOME = 2
    """Owner: what ``SYNC`` has, all of it."""
    FIND = 3
    """Front: a model and a version, or none. Answered by ``VERSION`` or ``ERROR``."""
    VERSION = 4
    INFER = 5
    """Front: a checked request. Answered by ``ANSWER``, ``MOVED`` or ``ERROR``."""
    ANSWER = 6
    ERROR = 7
    MOVED = 8
    """Owner: nothing was run; the version that was found before is not the one that answers any more, this one is."""
    CANCEL = 9
    """Front: nobody waits any more for what has this id. Not answered."""
    SYNC = 10
    """Owner: aliases and keys that changed, or a wish for a report. Answered by ``DONE``, after the report."""
    DONE = 11
    REPORT = 12
    """Front: what it counted since the last one. Not answered."""


class FrameError(Exception):
    """The other end does not speak as it should."""


def pack(
    kind: Kind, number: int, meta: Mapping[str, Any], arrays: Iterable[NDArray[Any]] = (), text: Buffer = b""
) -> list[Buffer]:
    """A frame as buffers to be written one after the other.

    Args:
        meta: small; what may be long goes into ``text``.
        arrays: with the dtypes of ``core.tensors.DTYPES``; C-contiguous ones are not copied, and must not change until
            they are sent. Their dtypes, shapes and lengths go into the meta part.
        text: a data part that is no tensors.
    Raises:
        FrameError: the meta part is too long.
    """
    parts: list[Buffer] = []
    described: list[tuple[str, tuple[int, ...], int]] = []
    size = 0
    for array in arrays:
        raw: Buffer
        if array.dtype.kind == "O":
            raw = _strings_to_bytes(array)
            described.append((_STRINGS, array.shape, len(raw)))
        else:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
            described.append((array.dtype.str, array.shape, len(raw)))
        if raw:
            parts.append(raw)
        size += len(raw)
        padding = -size % _ALIGNMENT
        if padding:
            parts.append(_ZEROS[:padding])
            size += padding
    if text:
        parts.append(text)
        size += len(text)
    head = orjson.dumps({**meta, "arrays": described} if described else meta)
    if len(head) > _META_LIMIT:
        raise FrameError(f"expected at most {_META_LIMIT} bytes of meta data, got {len(head)}")
    return [_HEADER.pack(number, kind << _META_BITS | len(head), size) + head, *parts]


def unpack_arrays(meta: Mapping[str, Any], data: memoryview) -> list[NDArray[Any]]:
    """The arrays of a frame; numbers share memory with ``data``.

    Raises:
        FrameError: they are not what the meta part says.
    """
    arrays: list[NDArray[Any]] = []
    offset = 0
    try:
        for dtype, shape, size in meta.get("arrays", ()):
            raw = data[offset : offset + size]
            if dtype == _STRINGS:
                arrays.append(_bytes_to_strings(raw, shape))
            else:
                arrays.append(np.frombuffer(raw, _NUMBERS[dtype]).reshape(shape))
            offset += size + -size % _ALIGNMENT
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise FrameError("expected the arrays that the frame announces") from error
    return arrays


def _strings_to_bytes(array: NDArray[Any]) -> bytes:
    """All lengths, as uint32, and then all strings in UTF-8."""
    encoded = [item.encode() if isinstance(item, str) else bytes(item) for item in array.reshape(-1).tolist()]
    return np.array([len(item) for item in encoded], "<u4").tobytes() + b"".join(encoded)


def _bytes_to_strings(raw: memoryview, shape: Sequence[int]) -> NDArray[Any]:
    count = 1
    for dim in shape:
        count *= dim
    ends = np.cumsum(np.frombuffer(raw[: 4 * count], "<u4"), dtype=np.int64)
    text = raw[4 * count :].tobytes()
    if len(ends) != count or (count and ends[-1] != len(text)):
        raise ValueError("expected strings as long as they are said to be")
    array = np.empty(count, object)
    begin = 0
    for i, end in enumerate(ends.tolist()):
        array[i] = text[begin:end].decode()
        begin = end
    return array.reshape(shape)


def _buffer(size: int) -> memoryview:
    """Room for ``size`` bytes, aligned for every dtype; unlike a bytearray's it is not written to beforehand."""
    if not size:
        return memoryview(bytearray())  # numpy's has no bytes to be cast to
    room: NDArray[np.uint8] = np.empty(size, np.uint8)
    return room.data.cast("B")


class Channel(asyncio.BufferedProtocol):
    """One end of a connection. What is derived from it overrides ``frame`` and ``lost``."""

    def __init__(self) -> None:
        self._ring = _buffer(_RING_BYTES)
        self._begin = 0
        self._end = 0
        self._head: tuple[int, int, dict[str, Any]] | None = None
        """Of the frame whose data part is being received: kind, id and meta."""
        self._data: memoryview = memoryview(b"")
        self._filled = 0
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- for those who derive from it ------------------------------------------------------------------------------

    def frame(self, kind: int, number: int, meta: dict[str, Any], data: memoryview) -> None:
        """A frame came. ``data`` stays as it is. Raises ``FrameError`` where it makes no sense."""
        raise NotImplementedError

    def lost(self) -> None:
        """The connection is gone."""

    # --- for everybody ---------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def congested(self) -> bool:
        """Whether the other end reads slower than this one writes."""
        return not self._writable.is_set()

    async def writable(self) -> None:
        """Wait until the other end has read enough. Ends also when it is gone."""
        while not self._writable.is_set() and self.connected:
            await self._writable.wait()

    def write(self, frame: list[Buffer]) -> None:
        """Send a frame; nothing happens where the other end is gone."""
        transport = self._transport
        if transport is not None and not transport.is_closing():
            if len(frame) == 1:
                transport.write(frame[0])
            else:
                transport.writelines(frame)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._gone)

    # --- what asyncio calls ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)

    def connection_lost(self, error: Exception | None) -> None:
        self._writable.set()
        if not self._gone.done():
            self._gone.set_result(None)
        self.lost()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._head is not None:
            return self._data[self._filled :]
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._begin > _RING_BYTES // 2 or (self._begin and self._end == _RING_BYTES):
            rest = self._end - self._begin
            self._ring[:rest] = bytes(self._ring[self._begin : self._end])
            self._begin, self._end = 0, rest
        return self._ring[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        try:
            if self._head is not None:
                self._filled += nbytes
                if self._filled == len(self._data):
                    self._deliver()
            else:
                self._end += nbytes
                self._cut()
        except FrameError:
            self.close()
            raise

    def eof_received(self) -> bool:
        return False

    def _cut(self) -> None:
        """Deliver every frame that is here as a whole."""
        ring = self._ring
        while self._end - self._begin >= _HEADER.size:
            number, packed, size = _HEADER.unpack_from(ring, self._begin)
            length = packed & ((1 << _META_BITS) - 1)
            if length > _META_LIMIT:
                raise FrameError(f"expected at most {_META_LIMIT} bytes of meta data, got {length}")
            start = self._begin + _HEADER.size
            if self._end - start < length:
                break
            try:
                meta = orjson.loads(ring[start : start + length])
            except orjson.JSONDecodeError as error:
                raise FrameError("expected JSON") from error
            start += length
            here = min(self._end - start, size)
            self._begin = start + here
            # A buffer of its own: the ring is written over, and what comes of the frame may live long.
            self._data = _buffer(size)
            self._data[:here] = ring[start : start + here]
            self._filled = here
            self._head = (packed >> _META_BITS, number, meta)
            if here < size:
                return
            self._deliver()

    def _deliver(self) -> None:
        head, data = self._head, self._data
        assert head is not None
        self._head = None
        self._data = memoryview(b"")
        self.frame(*head, data)
