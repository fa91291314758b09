"""BYTES tensors in an arena: each string's length in four bytes, then its UTF-8, one after another."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .messages import ProtocolError

_LENGTH: Final = struct.Struct("<I")


def pack_strings(array: NDArray[Any]) -> bytes:
    """The strings of an object array, in C order."""
    parts = []
    for text in array.ravel():
        raw = text.encode()
        parts.append(_LENGTH.pack(len(raw)))
        parts.append(raw)
    return b"".join(parts)


def unpack_strings(raw: bytes, shape: Sequence[int]) -> NDArray[Any]:
    """An object array of strings.

    Args:
        raw: a copy that nobody else can change.
    Raises:
        ProtocolError: it does not hold as many strings as the shape says, or they are not UTF-8.
    """
    count = 1
    for dim in shape:
        count *= dim
    if count * _LENGTH.size > len(raw):  # before anything is allocated for them
        raise ProtocolError(f"{len(raw)} bytes cannot hold {count} strings")
    flat = np.empty(count, object)
    at = 0
    size = len(raw)
    try:
        for index in range(count):
            (length,) = _LENGTH.unpack_from(raw, at)
            at += _LENGTH.size
            if length > size - at:
                raise ProtocolError("a string reaches beyond its tensor")
            flat[index] = raw[at : at + length].decode()
            at += length
    except (struct.error, UnicodeDecodeError):
        raise ProtocolError("strings are cut off or not UTF-8") from None
    if at != size:
        raise ProtocolError("bytes are left over after the strings")
    return flat.reshape(shape)
