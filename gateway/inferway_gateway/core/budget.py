"""How much memory loaded models may take, and who leaves when there is no room.

Pure bookkeeping: it loads and unloads nothing itself, and knows no time but the clock that it is given. Whoever loads a
version first reserves what it will need, so that loads at the same time are counted before they happen; whoever is
named as leaving is unloaded, and released when its memory is back.

A version is last used when its counter of requests was last seen to have moved. Nothing is written when a request
comes: ``observe`` looks at the counters from time to time, and before each choice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from .errors import MemoryExceededError

Key = tuple[str, int]
"""Model name and version."""


@dataclass(slots=True)
class Holding:
    """What one version holds of the budget.

    Attributes:
        nbytes: reserved, or measured once it is loaded.
        pinned: never leaves to make room.
        busy: whether requests are in flight, which keep it.
        activity: a counter that moves with each request.
        used_at: when the counter was last seen to have moved, on the budget's clock.
    """

    nbytes: int
    state: Literal["loading", "loaded", "leaving"]
    pinned: bool
    busy: Callable[[], bool]
    activity: Callable[[], int]
    seen: int
    used_at: float


class MemoryBudget:
    """Who holds how much of a bounded memory. Not thread-safe: for one event loop.

    Args:
        limit_bytes: what all versions together may hold.
        clock: seconds, monotonic.
    """

    def __init__(self, limit_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if limit_bytes < 1:
            raise ValueError(f"expected a budget of at least one byte, got {limit_bytes}")
        self.limit_bytes: Final = limit_bytes
        self.loads = 0
        """Versions that were loaded, since the start."""
        self.evictions = 0
        """Versions that were chosen to leave, since the start."""
        self._clock = clock
        self._held: dict[Key, Holding] = {}

    @property
    def used_bytes(self) -> int:
        """What all hold: those that load, that are loaded, and that are leaving and not gone yet."""
        return sum(h.nbytes for h in self._held.values())

    @property
    def committed_bytes(self) -> int:
        """What will be held when those that leave are gone."""
        return sum(h.nbytes for h in self._held.values() if h.state != "leaving")

    @property
    def pinned_bytes(self) -> int:
        return sum(h.nbytes for h in self._held.values() if h.pinned and h.state != "leaving")

    def held_bytes(self, which: Callable[[Key], bool]) -> int:
        """What some of the versions hold that are not leaving."""
        return sum(h.nbytes for key, h in self._held.items() if h.state != "leaving" and which(key))

    def holding(self, key: Key) -> Holding | None:
        return self._held.get(key)

    def check(self, key: Key, need_bytes: int, *, how: str) -> None:
        """Refuse what can never fit, however many others leave.

        Args:
            how: how the need is known: ``estimated`` or ``measured``, for the message.
        Raises:
            MemoryExceededError: with both numbers.
        """
        name, version = key
        if need_bytes > self.limit_bytes:
            raise MemoryExceededError(
                f"'{name}' version {version} needs {need_bytes} bytes of memory ({how}), "
                f"the budget of this gateway is {self.limit_bytes} bytes: deploy a smaller model, or ask the operator "
                "for a larger budget (INFERWAY_MEMORY_BUDGET_BYTES)"
            )
        held = self._held.get(key)
        others = self.pinned_bytes - (held.nbytes if held is not None and held.pinned else 0)
        if need_bytes > self.limit_bytes - others:
            raise MemoryExceededError(
                f"'{name}' version {version} needs {need_bytes} bytes of memory ({how}), pinned versions leave "
                f"{max(self.limit_bytes - others, 0)} of the {self.limit_bytes} bytes of this gateway's budget: unpin "
                "one, deploy a smaller model, or ask the operator for a larger budget (INFERWAY_MEMORY_BUDGET_BYTES)"
            )

    def observe(self) -> None:
        """Look at every counter, so that the next choice knows who was used lately."""
        now = self._clock()
        for held in self._held.values():
            count = held.activity()
            if count != held.seen:
                held.seen = count
                held.used_at = now

    def reserve(
        self,
        key: Key,
        need_bytes: int,
        *,
        pinned: bool = False,
        evict: bool = True,
        spare: Callable[[Key], bool] = lambda _: False,
    ) -> list[Key] | None:
        """Take room for a version that is about to be loaded.

        Args:
            evict: idle versions may leave for it.
            spare: versions that must not leave for this one.
        Returns:
            The versions that leave for it, which the caller unloads, and then releases, before it loads; None: there is
            no room now, and nothing has changed.
        """
        if key in self._held:
            return None
        leaving = self._choose(need_bytes, spare) if evict else ([] if self._fits(need_bytes) else None)
        if leaving is None:
            return None
        self._leave(leaving)
        self._held[key] = Holding(need_bytes, "loading", pinned, lambda: True, lambda: 0, 0, self._clock())
        return leaving

    def loaded(
        self, key: Key, nbytes: int, *, pinned: bool, busy: Callable[[], bool], activity: Callable[[], int]
    ) -> list[Key]:
        """A reserved version is loaded and was measured.

        Returns:
            Versions that leave because it holds more than was reserved; the caller unloads and releases them.
        """
        self._held[key] = Holding(nbytes, "loaded", pinned, busy, activity, activity(), self._clock())
        self.loads += 1
        return self.trim(spare=lambda other: other == key)

    def trim(self, *, spare: Callable[[Key], bool] = lambda _: False) -> list[Key]:
        """Versions that leave because all hold more than the budget. Those that are busy may keep it above for a while;
        then as many leave as can."""
        leaving: list[Key] = []
        for key in self._candidates(spare):
            if self._fits(0, without=leaving):
                break
            leaving.append(key)
        self._leave(leaving)
        return leaving

    def resize(self, key: Key, nbytes: int) -> None:
        """A version was measured again."""
        held = self._held.get(key)
        if held is not None:
            held.nbytes = nbytes

    def pin(self, key: Key, pinned: bool) -> None:
        held = self._held.get(key)
        if held is not None:
            held.pinned = pinned

    def mark_leaving(self, key: Key) -> None:
        """A version is unloaded for another reason than room."""
        held = self._held.get(key)
        if held is not None:
            held.state = "leaving"

    def release(self, key: Key) -> None:
        """A version's memory is back, or its load failed. Idempotent."""
        self._held.pop(key, None)

    def _fits(self, need_bytes: int, without: list[Key] | None = None) -> bool:
        gone = sum(self._held[key].nbytes for key in without or ())
        return self.committed_bytes - gone + need_bytes <= self.limit_bytes

    def _candidates(self, spare: Callable[[Key], bool]) -> list[Key]:
        """Who may leave, the least recently used first."""
        self.observe()
        able = [
            (held.used_at, key)
            for key, held in self._held.items()
            if held.state == "loaded" and not held.pinned and not held.busy() and not spare(key)
        ]
        return [key for _, key in sorted(able)]

    def _choose(self, need_bytes: int, spare: Callable[[Key], bool]) -> list[Key] | None:
        """The fewest of the least recently used whose leaving makes room; None where all together do not."""
        leaving: list[Key] = []
        candidates = iter(self._candidates(spare))
        while not self._fits(need_bytes, leaving):
            key = next(candidates, None)
            if key is None:
                return None
            leaving.append(key)
        # The last one chosen may be so large that some of those before it need not go; the later used of them stay.
        for key in leaving[-2::-1]:
            rest = [other for other in leaving if other != key]
            if self._fits(need_bytes, rest):
                leaving = rest
        return leaving

    def _leave(self, keys: list[Key]) -> None:
        for key in keys:
            self._held[key].state = "leaving"
        self.evictions += len(keys)


def machine_bytes(root: Path = Path("/")) -> int:
    """The memory that this process may use: the machine's, or the least that a control group above it allows.

    Args:
        root: of the file system that ``/proc`` and ``/sys`` are looked for in.
    """
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in _limit_files(root):
        try:
            text = file.read_text("ascii").strip()
        except OSError:
            continue
        # Version 2 says "max" where there is no limit, version 1 a number beyond any machine.
        if text.isdigit() and int(text) > 0:
            found = min(found, int(text))
    return found


def _limit_files(root: Path) -> list[Path]:
    mount = root / "sys/fs/cgroup"
    files: list[Path] = []
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        base, name = mount, "memory.max"
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            base, name = mount / "memory", "memory.limit_in_bytes"
        here = base / path.lstrip("/")
        files += [folder / name for folder in (here, *here.parents) if folder.is_relative_to(base)]
    return files
