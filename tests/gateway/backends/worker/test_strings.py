from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway_gateway.backends.worker.messages import ProtocolError
from inferway_gateway.backends.worker.strings import pack_strings, unpack_strings


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=12))
def test_strings_come_back_as_they_were(words: list[str]) -> None:
    array = np.empty(len(words), object)
    array[:] = words
    assert unpack_strings(pack_strings(array), (len(words),)).tolist() == words


@pytest.mark.parametrize(
    ("raw", "shape"),
    [
        (b"", (1,)),
        (b"", (1 << 40, 1 << 40)),
        (struct.pack("<I", 5) + b"abc", (1,)),
        (struct.pack("<I", 0xFFFFFFFF), (1,)),
        (struct.pack("<I", 2) + b"\xff\xfe", (1,)),
        (struct.pack("<I", 1) + b"ab", (1,)),
        (b"\0" * 7, (2,)),
    ],
    ids=["none", "too many", "cut", "huge", "not UTF-8", "left over", "half a length"],
)
def test_bytes_that_are_no_such_strings_are_refused(raw: bytes, shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError):
        unpack_strings(raw, shape)


@given(st.binary(max_size=64), st.integers(0, 8))
def test_any_bytes_are_read_or_refused(raw: bytes, count: int) -> None:
    try:
        found = unpack_strings(raw, (count,))
    except ProtocolError:
        return
    assert pack_strings(found) == raw
