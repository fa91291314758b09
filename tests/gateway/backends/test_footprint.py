"""Memory as the kernel counts it, and as control groups bound it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inferway_gateway.backends.footprint import MemoryWatch, memory_of_machine

MIB = 1 << 20


def test_memory_that_is_taken_and_given_back_shows_and_the_peak_stays_until_it_is_reset() -> None:
    with MemoryWatch() as watch:
        before = watch.read()
        with mmap.mmap(-1, 64 * MIB) as memory:
            memory.write(b"x" * (64 * MIB))
            during = watch.read()
        after = watch.read()
        assert during.resident - before.resident > 60 * MIB
        assert during.proportional - before.proportional > 60 * MIB
        assert after.resident < during.resident - 60 * MIB
        assert after.peak >= during.resident
        assert watch.reset_peak()
        assert watch.read().peak < during.resident - 30 * MIB


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # the child only waits
def test_pages_that_two_processes_map_are_counted_by_half() -> None:
    with mmap.mmap(-1, 64 * MIB) as memory:
        memory.write(b"x" * (64 * MIB))
        go, wait = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(wait)
            os.read(go, 1)
            os._exit(0)
        try:
            os.close(go)
            with MemoryWatch(child) as watch:
                use = watch.read()
            # Other processes of the suite may share more than these two do, never less.
            assert use.resident - use.proportional > 30 * MIB
        finally:
            os.close(wait)
            os.waitpid(child, 0)


def test_a_process_that_has_ended_is_said_to_have() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        watch = MemoryWatch(child.pid)
        assert watch.read().resident > 0
    with pytest.raises(ProcessLookupError):
        watch.read()
    assert not watch.reset_peak()
    watch.close()
    with pytest.raises(OSError):
        MemoryWatch(child.pid)


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        pytest.param("0::/", {}, 8 << 30, id="no-limit"),
        pytest.param("0::/a/b", {"sys/fs/cgroup/a/b/memory.max": "max"}, 8 << 30, id="unlimited"),
        pytest.param("0::/a/b", {"sys/fs/cgroup/a/b/memory.max": str(1 << 30)}, 1 << 30, id="own"),
        pytest.param(
            "0::/a/b",
            {"sys/fs/cgroup/a/b/memory.max": str(2 << 30), "sys/fs/cgroup/a/memory.max": str(1 << 30)},
            1 << 30,
            id="outer",
        ),
        pytest.param("0::/host/path", {"sys/fs/cgroup/memory.max": str(3 << 30)}, 3 << 30, id="container"),
        pytest.param(
            "5:cpu,cpuacct:/x\n4:memory:/m",
            {"sys/fs/cgroup/memory/m/memory.limit_in_bytes": str(1 << 29)},
            1 << 29,
            id="first-version",
        ),
        pytest.param(
            "4:memory:/", {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 8 << 30, id="v1-none"
        ),
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, cgroup: str, files: dict[str, str], expected: int) -> None:
    for name, content in {
        "proc/meminfo": f"MemTotal:       {8 << 20} kB\nMemFree: 1 kB",
        "proc/self/cgroup": cgroup,
        **files,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert memory_of_machine(tmp_path) == expected


def test_where_nothing_is_said_the_machine_is_asked(tmp_path: Path) -> None:
    assert memory_of_machine(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory_of_machine() <= memory_of_machine(tmp_path)
