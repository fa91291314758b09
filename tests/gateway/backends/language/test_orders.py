"""What an engine in another process says is held against its shape before it is believed."""

from __future__ import annotations

import asyncio

import pytest

from inferway_gateway.backends.language import frames
from inferway_gateway.backends.language.orders import (
    Failure,
    Gauges,
    Order,
    Piece,
    Report,
    read_order,
    read_report,
    write_order,
    write_report,
)
from inferway_gateway.core.generation import Constraint, GenerationRequest, Sampling

PIECE = '[1, "a", [5], [], null, 0]'
GAUGES = "[1, 0, 0, 1, []]"


def test_what_is_written_is_read() -> None:
    sampling = Sampling(0.5, 0.9, 7, 0.1, 1.1, 0.2, 0.3, 2**64 - 1, {5: -1.5})
    constraint = Constraint("regex", "[ä]")
    request = GenerationRequest((1, 2), 3, sampling, ("x",), 2, constraint, True, "a", 1, "k", 4.5)
    assert read_order(write_order(Order(7, request, 3))) == Order(7, request, 3)
    pieces = (
        Piece(1, "ä", (5,), ((5, -0.5, ((5, -0.5), (6, -1.5))),), "stop", 3),
        Failure(2, "queue_full", "no room", None, 1.0),
    )
    report = Report(pieces, Gauges(1, 2, 3, 4, (0, 1)))
    read = read_report(write_report(report), 10)
    assert (tuple(read.pieces), read.gauges) == (pieces, report.gauges)


@pytest.mark.parametrize(
    "raw",
    [
        "", "{", "[]", "7", "null", '{"a": 1}', "[[], []]", f"[[7], {GAUGES}]", f"[[[1, 2, 3]], {GAUGES}]",
        f"[[{PIECE}], [1, 0, 0, Infinity, []]]", f"[[{PIECE}], [1, 0, 0, NaN, []]]", f"[[{PIECE}], [1, 0, 0, 1, 5]]",
        f'[[[1, 5, [], [], null, 0]], {GAUGES}]', f'[[[1, "a", [10], [], null, 0]], {GAUGES}]',
        f'[[[1, "a", [-1], [], null, 0]], {GAUGES}]', f'[[[1, "a", [], [], "tired", 0]], {GAUGES}]',
        f'[[[1, "a", [5], [[5, {"9" * 400}, []]], null, 0]], {GAUGES}]',
        f'[[[Infinity, "a", [], [], null, 0]], {GAUGES}]',
        "[" * 100_000,
    ],
    ids=range(19),
)  # fmt: skip
def test_what_no_engine_says_is_refused(raw: str) -> None:
    with pytest.raises(ValueError):
        read_report(raw.encode(), 10)


async def test_a_report_beyond_measure_is_not_read() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(frames.pack(b"[]") + frames.LENGTH.pack(frames.MAX_REPORT_BYTES + 1))
    assert await frames.read(reader) == b"[]"
    with pytest.raises(ValueError, match="a report of 4194305 bytes"):
        await frames.read(reader)
