"""One thread that does things at their time: kills what did not end, and looks after workers once in a while."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

_log = logging.getLogger(__name__)

_CLOSE_LIMIT_S: Final = 5.0


class Keeper:
    """Calls functions at given moments, on a thread of its own, one after another. They must not block."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="inferway-keeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_CLOSE_LIMIT_S)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it once, in so many seconds. From any thread."""
        with self._changed:
            self._serial += 1
            heapq.heappush(self._heap, (time.monotonic() + seconds, self._serial, call))
            self._changed.notify()

    def every(self, seconds: float, call: Callable[[], bool]) -> None:
        """Call it each ``seconds`` for as long as it returns True."""

        def again() -> None:
            if call():
                self.after(seconds, again)

        self.after(seconds, again)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed:
                    if not self._heap:
                        self._changed.wait()
                    elif (left := self._heap[0][0] - time.monotonic()) > 0:
                        self._changed.wait(left)
                    else:
                        break
                if self._closed:
                    return
                call = heapq.heappop(self._heap)[2]
            try:
                call()
            except Exception:
                _log.exception("looking after the workers failed")
            del call  # it may hold on to a session that is closed by now
