"""Server-sent events of an upstream, read within bounds: nothing that it sends makes the gateway keep more than one
event's worth of it.

Source: WHATWG HTML, "Server-sent events", section 9.2.6, of which fields other than ``data`` have no use here.
"""

from __future__ import annotations

import re
from typing import Final

MAX_EVENT_BYTES: Final = 1 << 20
"""Of the longest event that is read. A piece of a text has some hundred bytes; one with a log probability for each of
twenty alternatives has a few thousand."""
_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
_BOM: Final = b"\xef\xbb\xbf"


class EventTooLongError(ValueError):
    """A line, or the data of an event, goes on for longer than any event may."""


class EventReader:
    """Bytes in, the data of whole events out."""

    __slots__ = ("_begun", "_data", "_limit", "_line", "_return", "_size")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._line = bytearray()
        """Of the line whose end has not come."""
        self._data: list[bytes] = []
        self._size = 0
        self._return = False
        """The last byte was a carriage return: a line feed after it ends no other line."""
        self._begun = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Take the next bytes; gives the data of the events that they complete, without the empty ones.

        Raises:
            EventTooLongError: an event is longer than the limit.
        """
        if self._return and piece.startswith(b"\n"):
            piece = piece[1:]
            self._return = False
        if not piece:
            return []
        self._return = piece.endswith(b"\r")
        *lines, rest = _LINE_END.split(piece)
        found = []
        for line in lines:
            if self._line:
                self._line += line
                line = bytes(self._line)
                self._line.clear()
            if not self._begun:
                self._begun = True
                line = line.removeprefix(_BOM)
            if line.startswith(b"data:"):
                line = line[6:] if line.startswith(b"data: ") else line[5:]
                self._data.append(line)
                self._size += len(line) + 1
            elif not line:
                if any(self._data):
                    found.append(b"\n".join(self._data))
                self._data = []
                self._size = 0
            if self._size > self._limit:
                raise EventTooLongError
        self._line += rest
        if len(self._line) + self._size > self._limit:
            raise EventTooLongError
        return found
