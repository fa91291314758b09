"""Protobuf's wire format, read from a file field by field, without holding the file in memory.

A model may be gigabytes, nearly all of it the content of tensors, which is skipped: fields are numbered, and everything
long carries its length in front. Reading is bounded in work and in depth, and every place is known by its byte, so that
a message can say where a file is wrong.

Source: Protocol Buffers, "Encoding".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types. Groups (3 and 4) are not used by ONNX."""

_WINDOW: Final = 1 << 16
_LONGEST_HEAD: Final = 20
"""A tag and a length, ten bytes each at most."""
_MAX_NUMBER: Final = (1 << 29) - 1
_INT_MASK: Final = (1 << 64) - 1

_RUNS: Final = {
    0x3D: (re.compile(rb"(?:\x3d[\s\S]{4})+"), 5),
    0x40: (re.compile(rb"(?:\x40[\x80-\xff]{0,9}[\x00-\x7f])+"), 2),
}
"""Fields 7 (32 bits each) and 8 (varints) that stand one after the other: a tree ensemble carries its trees as lists
with a field per number, a million of them."""


class WireError(Exception):
    """Not the wire format, or more of it than is read.

    Attributes:
        at: the byte.
    """

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


class Field(NamedTuple):
    """One field. ``start`` to ``stop`` is its content in the file; ``value`` is a varint's, as signed 64 bits."""

    number: int
    kind: int
    value: int
    start: int
    stop: int


class Source:
    """A file that is read through a window.

    Args:
        fd: stays open, and the caller's.
        size: of the file.
        budget: fields that are read before the file counts as made to be slow.
    """

    def __init__(self, fd: int, size: int, budget: int) -> None:
        self.status = os.fstat(fd)
        self.size = size
        self._fd = fd
        self._budget = budget
        self._base = 0
        self._window = b""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes between two places.

        Raises:
            WireError: the file ends before.
        """
        base, window = self._base, self._window
        if base <= start and stop <= base + len(window):
            return window[start - base : stop - base]
        parts: list[bytes] = []
        at = start
        while at < stop:
            part = os.pread(self._fd, min(stop - at, 1 << 24), at)
            if not part:
                raise WireError("the file became shorter while it was read", at)
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def fields(self, start: int, stop: int, *, skip_runs: bool = False) -> Iterator[Field]:
        """The fields of the message between two places.

        Args:
            skip_runs: leave out numbers of fields 7 and 8 that stand in a row, which count all the same.
        Raises:
            WireError
        """
        at = start
        while at < stop:
            self._spend(at)
            at, tag = self._varint(at, stop)
            number, kind = tag >> 3, tag & 7
            if not 0 < number <= _MAX_NUMBER:
                raise WireError(f"field number {number} does not exist", at)
            if kind == BYTES:
                at, length = self._varint(at, stop)
                following = at + length
                if following > stop:
                    inside = "the file" if stop == self.size else "the message around it"
                    raise WireError(f"{length} bytes of field {number} begin here, and {inside} ends before", at)
                yield Field(number, kind, 0, at, following)
            elif kind == VARINT:
                following, value = self._varint(at, stop)
                value &= _INT_MASK
                yield Field(number, kind, value - (value >> 63 << 64), at, following)
            elif kind in (FIXED32, FIXED64):
                following = at + (4 if kind == FIXED32 else 8)
                if following > stop:
                    raise WireError(f"a number of field {number} begins here, and the message ends before", at)
                yield Field(number, kind, 0, at, following)
            else:
                raise WireError(f"wire type {kind} of field {number} is none that ONNX uses", at)
            at = following
            if skip_runs and tag in _RUNS:
                at = self._skip_run(tag, at, stop)

    def count_varints(self, start: int, stop: int) -> int:
        """How many varints stand between two places: each ends with a byte below 128."""
        count = 0
        for at in range(start, stop, 1 << 20):
            count += len(self.read(at, min(at + (1 << 20), stop)).translate(None, _CONTINUED))
        return count

    def varints(self, start: int, stop: int) -> Iterator[int]:
        """The packed varints between two places, as signed 64 bits."""
        at = start
        while at < stop:
            self._spend(at)
            at, value = self._varint(at, stop)
            value &= _INT_MASK
            yield value - (value >> 63 << 64)

    def _skip_run(self, tag: int, at: int, stop: int) -> int:
        pattern, shortest = _RUNS[tag]
        while at < stop:
            window, offset = self._look(at, min(stop, at + _WINDOW), _WINDOW)
            found = pattern.match(window, offset, offset + min(stop - at, len(window) - offset))
            if found is None:
                return at
            self._spend(at, (found.end() - offset) // (shortest * 64))
            at += found.end() - offset
        return at

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        window, offset = self._look(at, min(stop, at + _LONGEST_HEAD))
        value = shift = 0
        end = min(len(window), offset + stop - at)
        for index in range(offset, min(offset + 10, end)):
            byte = window[index]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return at + index + 1 - offset, value
            shift += 7
        raise WireError("a number is cut off" if end - offset < 10 else "a number has more than 64 bits", at)

    def _look(self, at: int, need: int, fill: int = _WINDOW) -> tuple[bytes, int]:
        """A window that has the bytes from ``at`` to ``need``, and where ``at`` is in it."""
        base = self._base
        if not base <= at or need > base + len(self._window):
            self._base = base = at
            self._window = os.pread(self._fd, fill, at)
            if need > at + len(self._window):
                raise WireError("the file became shorter while it was read", at)
        return self._window, at - base

    def _spend(self, at: int, fields: int = 1) -> None:
        self._budget -= fields
        if self._budget < 0:
            raise WireError("the file has more parts than are read", at)


_CONTINUED: Final = bytes(range(128, 256))
