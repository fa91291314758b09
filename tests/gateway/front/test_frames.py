"""Frames: what one end packs the other unpacks, however the bytes arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from inferway_gateway.core.tensors import DTYPES
from inferway_gateway.front import frames
from inferway_gateway.front.frames import Channel, FrameError, Kind, pack, unpack_arrays


class Recorder(Channel):
    """Keeps every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[tuple[int, int, dict[str, Any], memoryview]] = []

    def frame(self, kind: int, number: int, meta: dict[str, Any], data: memoryview) -> None:
        self.frames.append((kind, number, meta, data))

    def feed(self, raw: bytes, size: Callable[[], int]) -> None:
        """Take bytes as a transport hands them over."""
        position = 0
        while position < len(raw):
            buffer = self.get_buffer(-1)
            assert len(buffer) > 0
            count = min(len(buffer), size(), len(raw) - position)
            buffer[:count] = raw[position : position + count]
            self.buffer_updated(count)
            position += count


def arrays() -> list[NDArray[Any]]:
    """One of each dtype, and the odd shapes."""
    made: list[NDArray[Any]] = [
        np.arange(6).astype(dtype).reshape(2, 3) for dtype in DTYPES.values() if dtype.kind != "O"
    ]
    texts: NDArray[Any] = np.array([["", "a"], ["ö\0", "x" * 300]], object)
    made += [np.empty((0, 3), np.float32), np.array(7, np.int64), np.arange(12.0)[::2], texts, np.empty((0,), object)]
    return made


@pytest.mark.parametrize("step", [1, 7, 64, 1 << 20])
async def test_frames_come_out_as_they_went_in_however_they_are_cut(step: int) -> None:
    recorder = Recorder()
    sent = arrays()
    raw = b"".join(
        [
            *pack(Kind.INFER, 1, {"gen": 3}, sent),
            *pack(Kind.CANCEL, 2, {}),
            *pack(Kind.VERSION, 2**32 - 1, {"a": "ö"}, text=b"text"),
        ]
    )
    recorder.feed(raw, lambda: step)
    (first, second, third) = recorder.frames
    assert first[:2] == (Kind.INFER, 1)
    got = unpack_arrays(first[2], first[3])
    assert len(got) == len(sent)
    for one, other in zip(got, sent, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes() if one.dtype.kind != "O" else one.tolist() == other.tolist()
        assert one.flags.aligned
    assert second[:3] == (Kind.CANCEL, 2, {})
    assert third[:3] == (Kind.VERSION, 2**32 - 1, {"a": "ö"})
    assert bytes(third[3]) == b"text"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3_000_000), min_size=1, max_size=4), st.integers(0, 2**32))
def test_frames_of_any_size_pass_in_pieces_of_any_size(sizes: list[int], seed: int) -> None:
    async def run() -> None:
        random = Random(seed)
        recorder = Recorder()
        bodies = [random.randbytes(size) for size in sizes]
        raw = b"".join(b"".join(pack(Kind.INFER, i, {"n": i}, text=body)) for i, body in enumerate(bodies))
        recorder.feed(raw, lambda: random.choice((1 << 10, 1 << 16, 300_000, 5_000_000)))
        assert [bytes(data) for *_, data in recorder.frames] == bodies
        assert [number for _, number, *_ in recorder.frames] == list(range(len(sizes)))

    asyncio.run(run())


def test_a_large_tensor_is_written_from_where_it_lies() -> None:
    array = np.arange(1 << 16, dtype=np.float32)
    parts = pack(Kind.INFER, 1, {}, [array])
    assert any(isinstance(part, memoryview) and np.shares_memory(np.frombuffer(part, np.float32), array)
               for part in parts)  # fmt: skip


async def test_what_is_received_of_a_tensor_is_not_copied_again() -> None:
    recorder = Recorder()
    recorder.feed(b"".join(pack(Kind.INFER, 1, {}, [np.ones(1 << 18)])), lambda: 1 << 30)
    ((_, _, meta, data),) = recorder.frames
    (array,) = unpack_arrays(meta, data)
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))


async def test_frames_do_not_share_the_buffer_that_is_read_into() -> None:
    recorder = Recorder()
    for value in range(200):
        recorder.feed(b"".join(pack(Kind.INFER, value, {}, [np.full(3000, value)])), lambda: 1 << 30)
    for value, (_, number, meta, data) in enumerate(recorder.frames):
        assert number == value
        assert (unpack_arrays(meta, data)[0] == value).all()


@pytest.mark.parametrize(
    "described",
    [[["<f4", [3], 12]], [["<f4", [2, 2], 8]], [["<f9", [1], 4]], [["O", [9], 8]], [["<f4"]], [[1, 2, 3]], 5],
    ids=str,
)
def test_arrays_that_are_not_what_they_are_announced_as_are_refused(described: Any) -> None:
    with pytest.raises(FrameError):
        unpack_arrays({"arrays": described}, memoryview(b"\0" * 8))


async def test_a_frame_that_makes_no_sense_ends_the_connection() -> None:
    with pytest.raises(FrameError, match="JSON"):
        Recorder().feed(frames._HEADER.pack(1, Kind.INFER << 24 | 3, 0) + b"{{{", lambda: 100)
    with pytest.raises(FrameError, match="at most"):
        Recorder().feed(frames._HEADER.pack(1, Kind.INFER << 24 | 0xFFFFFF, 0), lambda: 100)
    with pytest.raises(FrameError, match="at most"):
        pack(Kind.INFER, 1, {"long": "x" * 600_000})
