from __future__ import annotations

import pytest

from inferway_gateway.backends.remote.events import EventReader, EventTooLongError

STREAM = (
    b"\xef\xbb\xbfdata: one\r\n\r\n: comment\n\ndata:two\rdata\r\rdata:  three\ndata:more\nid: 7\n\n"
    b"data:\n\nretry: 1\r\n\ndata:\ndata: \n\ndata: open"
)
EVENTS = [b"one", b"two", b" three\nmore"]


def read(*pieces: bytes, limit: int = 100) -> list[bytes]:
    reader = EventReader(limit)
    return [event for piece in pieces for event in reader.feed(piece)]


def test_an_event_is_what_its_data_are() -> None:
    assert read(STREAM) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_pieces_of_any_size_make_the_same_events(size: int) -> None:
    assert read(*(STREAM[start : start + size] for start in range(0, len(STREAM), size))) == EVENTS


def test_it_does_not_matter_where_a_stream_is_cut() -> None:
    for at in range(len(STREAM) + 1):
        assert read(STREAM[:at], b"", STREAM[at:]) == EVENTS, at


@pytest.mark.parametrize(
    "pieces",
    [[b"x" * 101], [b"data: " + b"x" * 101 + b"\n\n"], [b"x"] * 101, [b"data: " + b"x" * 40 + b"\n"] * 3],
    ids=["a-name", "a-line", "dripping", "many-lines"],
)
def test_what_goes_on_for_too_long_is_refused(pieces: list[bytes]) -> None:
    with pytest.raises(EventTooLongError):
        read(*pieces)


def test_events_that_are_no_longer_than_the_limit_go_on_for_ever() -> None:
    reader = EventReader(100)
    assert sum(len(reader.feed(b"data: " + b"x" * 90 + b"\n\n")) for _ in range(1000)) == 1000
    assert sum(len(reader.feed(b": " + b"x" * 90 + b"\n")) for _ in range(1000)) == 0
