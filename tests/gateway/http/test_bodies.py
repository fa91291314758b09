"""Bodies on their way in and out: limits, decompression, compression."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway_gateway.core.errors import (
    CancelledByCallerError,
    MalformedRequestError,
    PayloadTooLargeError,
    UnsupportedEncodingError,
)
from inferway_gateway.http.bodies import Receive, accepted_encoding, deflate, inflate, read_body


def receive(pieces: Sequence[bytes | None]) -> Receive:
    """An ASGI ``receive`` that gives these pieces; None is a disconnect."""
    messages: list[dict[str, Any]] = [
        {"type": "http.disconnect"}
        if piece is None
        else {"type": "http.request", "body": piece, "more_body": i < len(pieces) - 1}
        for i, piece in enumerate(pieces)
    ]

    async def call() -> dict[str, Any]:
        return messages.pop(0)

    return call


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=6), st.booleans(), st.integers(0, 20))
async def test_a_body_arrives_whole_however_it_is_cut(pieces: list[bytes], declare: bool, head: int) -> None:
    whole = b"".join(pieces)
    got = await read_body(receive(pieces), len(whole) if declare else None, 200, head)
    assert bytes(got) == whole


@pytest.mark.parametrize("head", [0, 1, 63, 64, 100])
async def test_tensors_of_a_body_in_pieces_begin_aligned(head: int) -> None:
    got = await read_body(receive([bytes(head + 10), bytes(90)]), head + 100, 1000, head)
    assert np.frombuffer(got, np.uint8).ctypes.data % 64 == -head % 64


@pytest.mark.parametrize(
    ("pieces", "declared", "expected"),
    [
        ([b"12345"], 5, PayloadTooLargeError),
        ([b"12345"], None, PayloadTooLargeError),
        ([b"123", b"45"], None, PayloadTooLargeError),
        ([b"12", b"3", b"45"], None, PayloadTooLargeError),
        ([None], 3, CancelledByCallerError),
        ([b"1", None], 3, CancelledByCallerError),
        ([b"1", None], None, CancelledByCallerError),
        ([b"1", b"2"], 3, MalformedRequestError),
        ([b"12", b"34"], 3, MalformedRequestError),
    ],
)
async def test_a_body_that_is_too_long_cut_off_or_not_as_declared_is_refused(
    pieces: list[bytes | None], declared: int | None, expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        await read_body(receive(pieces), declared, 4)


@given(st.binary(max_size=3000), st.sampled_from([b"gzip", b"deflate"]))
async def test_inflate_undoes_deflate(data: bytes, coding: bytes) -> None:
    packed = await deflate([data[:10], memoryview(data)[10:]], coding)
    assert await inflate(packed, coding, 3000) == data


async def test_large_bodies_are_inflated_and_deflated_too() -> None:
    data = np.random.default_rng(0).bytes(300_000)
    assert await inflate(await deflate([data], b"gzip"), b"GZIP ", 300_000) == data


async def test_identity_and_bare_deflate_are_accepted() -> None:
    assert await inflate(b"abc", b"identity", 3) == b"abc"
    engine = zlib.compressobj(wbits=-15)
    assert await inflate(engine.compress(b"abc") + engine.flush(), b"deflate", 3) == b"abc"


async def test_a_bomb_is_stopped_at_the_limit() -> None:
    bomb = gzip.compress(bytes(50_000_000), 9)
    with pytest.raises(PayloadTooLargeError, match="after decompression"):
        await inflate(bomb, b"gzip", 1_000_000)


@pytest.mark.parametrize(
    ("body", "encoding", "expected"),
    [
        (b"abc", b"br", UnsupportedEncodingError),
        (b"abc", b"gzip, gzip", UnsupportedEncodingError),
        (b"abc", b"gzip", MalformedRequestError),
        (b"", b"gzip", MalformedRequestError),
        (gzip.compress(b"abcdef", mtime=0)[:-9], b"gzip", MalformedRequestError),
        (gzip.compress(b"a", mtime=0) + b"rest", b"gzip", MalformedRequestError),
        (zlib.compress(b"abc"), b"gzip", MalformedRequestError),
    ],
)
async def test_bytes_that_are_not_what_the_encoding_says_are_refused(
    body: bytes, encoding: bytes, expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        await inflate(body, encoding, 1000)


@pytest.mark.parametrize(
    ("accept", "size", "binary", "coding"),
    [
        (b"gzip", 10, True, b"gzip"),
        (b"deflate", 10, False, b"deflate"),
        (b"GZIP;q=0.5", 10, False, b"gzip"),
        (b"gzip, deflate", 10, False, None),
        (b"gzip, deflate", 10_000, False, b"gzip"),
        (b"gzip, deflate, br", 10_000, True, None),
        (b"br, deflate", 10_000, False, b"deflate"),
        (b"identity", 10_000, False, None),
        (b"gzip;q=0", 10_000, False, None),
        (b"", 10_000, False, None),
    ],
)
def test_an_answer_is_packed_for_who_wants_it_or_gains(
    accept: bytes, size: int, binary: bool, coding: bytes | None
) -> None:
    assert accepted_encoding(accept, size, binary=binary) == coding
