"""Server-sent events, whole and in pieces, from servers that mean well and from those that do not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway._errors import MalformedAnswer
from inferway._sse import EventParser, ServerEvent


def parsed(*pieces: bytes, limit: int = 1000) -> list[ServerEvent]:
    parser = EventParser(limit)
    return [event for piece in pieces for event in parser.feed(piece)]


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b"data: a\n\n", ["a"]),
        (b"data:a\r\n\r\n", ["a"]),
        (b"data: a\r\rdata: b\r\r", ["a", "b"]),
        (b"data: a\n\r\ndata: b\r\n\n", ["a", "b"]),
        (b"data:  two\n\n", [" two"]),
        (b"data: one\ndata: two\n\n", ["one\ntwo"]),
        (b"data\n\n", [""]),
        (b": a comment\n\ndata: a\n: another\n\n", ["a"]),
        (b"id: 7\nretry: 10\ndata: a\nunknown: x\n\n", ["a"]),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"data: {\"a\": \"b: c\"}\n\n", ['{"a": "b: c"}']),
        (b"event: x\n\ndata: a\n\n", ["a"]),
        (b"data: never ended\n", []),
        (b"data: caf\xc3\xa9 \xf0\x9f\x98\x80\n\n", ["café 😀"]),
        (b"data: \xff\n\n", ["\ufffd"]),
    ],
)  # fmt: skip
def test_events_come_out_whole_however_they_came(body: bytes, wanted: list[str]) -> None:
    assert [event.data for event in parsed(body)] == wanted
    single = [body[index : index + 1] for index in range(len(body))]
    assert [event.data for event in parsed(*single)] == wanted


def test_an_event_has_its_type_and_the_next_one_has_not() -> None:
    assert parsed(b"event: error\ndata: a\n\ndata: b\n\n") == [ServerEvent("a", "error"), ServerEvent("b")]


@given(
    texts=st.lists(st.text(alphabet="aä😀 :,", min_size=1), max_size=5),
    end=st.sampled_from(["\n", "\r", "\r\n"]),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_no_cut_changes_what_comes_out(texts: list[str], end: str, cuts: list[int]) -> None:
    body = "".join(f"data: {text}{end}{end}" for text in texts).encode()
    places = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[start:stop] for start, stop in itertools.pairwise(places)]
    assert [event.data for event in parsed(*pieces)] == texts


@pytest.mark.parametrize(
    "pieces",
    [
        [b"data: " + b"x" * 2000],
        [b"x" * 400] * 3,
        [b"data: " + b"x" * 2000 + b"\n\n"],
        [b"data: " + b"x" * 400 + b"\n"] * 3,
        [b"event: " + b"x" * 2000 + b"\n"],
    ],
    ids=["line", "line in pieces", "event", "event of lines", "type"],
)
def test_what_never_ends_is_refused_before_it_fills_the_memory(pieces: list[bytes]) -> None:
    with pytest.raises(MalformedAnswer, match="longer than 1000 bytes"):
        parsed(*pieces)
