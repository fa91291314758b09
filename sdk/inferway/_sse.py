"""Server-sent events out of bytes, pure: no I/O, any pieces in, whole events out.

Lines end in LF, CR or CRLF, also where the pair is split over two pieces. Lines and events are bounded, because a
server that never ends one would otherwise fill the memory. Bytes are decoded when an event is complete, so that no
piece can break a character.

Source: WHATWG HTML, "Server-sent events", sections 9.2.5 and 9.2.6. ``id`` and ``retry`` are for clients that connect
again, which an inference must not; they are passed over.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ._errors import MalformedAnswer

MAX_EVENT_BYTES: Final = 8 * 1024 * 1024
_BOM: Final = b"\xef\xbb\xbf"


class ServerEvent(NamedTuple):
    """One event. ``event`` is its type, empty where the server named none."""

    data: str
    event: str = ""


class EventParser:
    """Collects pieces of a body and gives the events that they complete.

    Attributes:
        max_event_bytes: an event, or a line of one, that is longer is refused.
    """

    __slots__ = ("_data", "_event", "_first", "_held", "_rest", "_skip_lf", "max_event_bytes")

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.max_event_bytes = max_event_bytes
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._held = 0
        self._event = b""
        self._first = True
        self._skip_lf = False

    def feed(self, piece: bytes) -> list[ServerEvent]:
        """The events that ``piece`` completes, in order.

        Raises:
            MalformedAnswer: an event is longer than ``max_event_bytes``.
        """
        if self._skip_lf and piece:
            # The CR before it, at the end of the last piece, has ended the line already.
            self._skip_lf = False
            if piece[:1] == b"\n":
                piece = piece[1:]
        scanned = len(self._rest)
        self._rest += piece
        if b"\n" not in piece and b"\r" not in piece:
            self._check(len(self._rest))
            return []
        self._skip_lf = self._rest.endswith(b"\r")
        # Only what is new can hold the end of a line: what was kept has been looked at.
        cut = max(self._rest.rfind(b"\n", scanned), self._rest.rfind(b"\r", scanned)) + 1
        whole = bytes(self._rest[:cut])
        del self._rest[:cut]
        found: list[ServerEvent] = []
        if b"\r" in whole:
            whole = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if self._first:
            self._first = False
            whole = whole.removeprefix(_BOM)
        for line in whole.split(b"\n")[:-1]:
            event = self._line(line)
            if event is not None:
                found.append(event)
        self._check(len(self._rest))
        return found

    def _line(self, line: bytes) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._held += len(value) + 1
            self._check(0)
        elif name == b"event":
            self._check(len(value))
            self._event = value
        return None

    def _dispatch(self) -> ServerEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._held = [], b"", 0
        if not data:
            return None
        return ServerEvent(b"\n".join(data).decode("utf-8", "replace"), event.decode("utf-8", "replace"))

    def _check(self, more: int) -> None:
        if self._held + more > self.max_event_bytes:
            raise MalformedAnswer(f"an event of the stream is longer than {self.max_event_bytes} bytes")
