"""What a process holds of the memory, and how much of it there is.

Proportional set size counts a page that several processes map once, divided among them: workers were forked from one
process and map one copy of a model's weights, so their resident sizes added up would count both many times.

Source: proc(5), ``smaps_rollup``, ``status``, ``clear_refs``; cgroups(7), ``memory.max``.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_UNLIMITED: Final = 1 << 60
"""The first version of cgroups writes a number of this order where there is no limit."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory of one process, in bytes.

    Attributes:
        resident: pages in memory, shared ones counted whole.
        proportional: the same with shared ones divided by the number of processes that map them; ``resident`` where the
            kernel does not say.
        anonymous: of ``resident``, what is no page of a file: it goes only when the process frees it.
        peak: the most that ``resident`` has been since the start, or since ``MemoryWatch.reset_peak``.
    """

    resident: int
    proportional: int
    anonymous: int
    peak: int


class MemoryWatch:
    """Reads a process's memory, again and again.

    Open it before the process is confined: the kernel asks for the right to trace the process when the file is opened,
    and not when it is read. Reading takes 0.1 ms and more, by the number of pages.

    Args:
        pid: None is the process itself.
    Raises:
        OSError: there is no such process, or it may not be looked at.
    """

    def __init__(self, pid: int | None = None) -> None:
        folder = Path("/proc") / ("self" if pid is None else str(pid))
        self._status = os.open(folder / "status", os.O_RDONLY | os.O_CLOEXEC)
        self._rollup = self._references = -1
        with contextlib.suppress(OSError):
            self._rollup = os.open(folder / "smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            self._references = os.open(folder / "clear_refs", os.O_WRONLY | os.O_CLOEXEC)

    def read(self) -> MemoryUse:
        """Raises ProcessLookupError when the process is gone."""
        status = _fields(self._status)
        if "VmRSS" not in status:  # a process that ended and was not waited for has no memory
            raise ProcessLookupError("the process has ended")
        resident = status["VmRSS"]
        proportional = resident
        if self._rollup >= 0:
            proportional = _fields(self._rollup).get("Pss", resident)
        anonymous = status.get("RssAnon", resident)
        return MemoryUse(resident, proportional, anonymous, max(status.get("VmHWM", 0), resident))

    def reset_peak(self) -> bool:
        """Let ``peak`` start anew from what is resident now; false where the kernel does not let us."""
        try:
            return self._references >= 0 and os.write(self._references, b"5") == 1
        except OSError:
            return False

    def close(self) -> None:
        for fd in (self._status, self._rollup, self._references):
            if fd >= 0:
                os.close(fd)
        self._status = self._rollup = self._references = -1

    def __enter__(self) -> MemoryWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def memory_of_machine(root: Path = Path("/")) -> int:
    """Bytes that this process may hope for: the machine's memory, or what its control group is held to.

    Args:
        root: where ``proc`` and ``sys`` are found.
    """
    totals = [line for line in _lines(root / "proc/meminfo") if line.startswith("MemTotal:")]
    limits = [int(line.split()[1]) * 1024 for line in totals]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        inner = base / path.lstrip("/")
        # A group is held to the limits of those around it too. In a container the path may be the host's, which is not
        # there; the mount is then the group itself.
        for folder in (inner, *inner.parents):
            if folder == base.parent:
                break
            limits += [int(said) for said in _lines(folder / name) if said.isdigit()]
    limits = [limit for limit in limits if 0 < limit < _UNLIMITED]
    if not limits:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(limits)


def _fields(fd: int) -> dict[str, int]:
    """Of lines such as ``VmRSS:   1234 kB``, in bytes."""
    found: dict[str, int] = {}
    for line in os.pread(fd, 1 << 16, 0).decode(errors="replace").splitlines():
        name, _, said = line.partition(":")
        words = said.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")[:-1]
    except OSError:
        return []
