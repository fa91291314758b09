"""The registry survives being killed, and disks that are full or broken, at every single call that writes.

strace kills the process at the n-th call of a kind, or has the call fail, for every n and every kind that an operation
makes. After each of these the registry is opened again and has to be whole. A process that is killed is not a machine
that loses power: what the kernel was given is there afterwards. That syncs come in the right order is therefore looked
at in the trace itself.

It is killed at every call, some 500 in all. Of the two ways to fail, calls get one in turn, and of SQLite's writes of
one page after the other some are taken; ``INFERWAY_FAULTS=all``, as ``make test-full`` has it, has every call fail in
both ways, which takes minutes. Each test prints how many faults it tried. Everything lies in memory where that can be
had.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import registry_driver
from inferway_gateway.core.catalog import AliasSpec, DeploymentRecord, Snapshot
from inferway_gateway.store.database import open_keys
from registry_driver import GRAPH, KEY, KEY_NAME, LESS_WEIGHTS, WEIGHTS, database_of, digest_of, gateway

OPERATIONS = {
    "open": 120, "upload": 35, "deploy": 90, "deploy in vain": 75, "roll back": 18, "delete": 70, "create a key": 16,
}  # fmt: skip
"""What is done to the registry, and how many calls that write it makes at the least."""
WRITING = (
    "write", "pwrite64", "writev", "pwritev", "fsync", "fdatasync", "ftruncate", "rename", "renameat", "renameat2",
    "link", "linkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "chmod", "fchmod", "fchmodat", "utimensat",
)  # fmt: skip
FAILING = ("write", "pwrite64", "fsync", "fdatasync", "ftruncate", "rename", "link", "linkat", "mkdir")
SOME_WRITES = 6
LIMIT_S = 30.0


@dataclass
class Driver:
    """The process that forks for each run."""

    process: subprocess.Popen[str]

    def tell(self, *words: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\t".join(words) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, state: Path, operation: str, trace: Path, *options: str) -> tuple[int, str | None, bool]:
        """One run under strace.

        Returns:
            Exit status, negative for a signal; what was acknowledged, None for nothing; whether it was done after that.
        """
        ack = trace.with_suffix(".ack")
        again = ack.with_name(f"{ack.name}-again")
        for left in (ack, again):
            left.unlink(missing_ok=True)
        pid = self.tell("RUN", str(state), operation, str(ack))
        strace = subprocess.Popen(["strace", "-qq", "-f", "-o", str(trace), *options, "-p", str(pid)])
        end = time.monotonic() + LIMIT_S
        while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
            assert strace.poll() is None, "strace could not attach"
            assert time.monotonic() < end
            os.sched_yield()
        status = self.tell("GO")
        strace.wait(LIMIT_S)
        return status, str(ack.readlink()) if ack.is_symlink() else None, again.is_symlink()


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    if shutil.which("strace") is None:
        words = "strace is not installed"
        if os.environ.get("INFERWAY_REQUIRE_SERVICES") == "1":
            pytest.fail(words)
        pytest.skip(words)
    probe = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], check=False, capture_output=True)
    if probe.returncode and os.environ.get("INFERWAY_REQUIRE_SERVICES") != "1":
        pytest.skip("this system does not let a process be traced")
    command = [sys.executable, registry_driver.__file__]
    # Not in the trace of coverage: it would write files of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Driver(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(LIMIT_S)


@dataclass
class Ground:
    """A state directory as it is before an operation, to begin each run from."""

    operation: str
    template: Path
    state: Path
    trace: Path

    def reset(self) -> None:
        shutil.rmtree(self.state, ignore_errors=True)
        if self.template.exists():
            shutil.copytree(self.template, self.state)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="inferway-faults-") as path:
        yield Path(path)


@pytest.fixture(params=OPERATIONS, ids=lambda name: name.replace(" ", "-"))
def ground(request: pytest.FixtureRequest, directory: Path) -> Ground:
    made = Ground(request.param, directory / "template", directory / "state", directory / "trace")
    asyncio.run(registry_driver.prepare(made.template, made.operation))
    return made


def calls(trace: Path) -> Counter[str]:
    """How many calls of each kind a run made."""
    return Counter(re.findall(r"^(?:\d+ +)?(\w+)\(", trace.read_text(), re.MULTILINE))


def points(
    driver: Driver, ground: Ground, kinds: Sequence[str], some_writes: int | None = None
) -> list[tuple[str, int]]:
    """The calls to fault of those that the operation makes, as their kind and their number among these.

    Args:
        some_writes: take about so many of those that write a page; None: all.
    """
    ground.reset()
    options = ("-y", "-e", f"trace={','.join(kinds)}")
    status, acknowledged, _ = driver.run(ground.state, ground.operation, ground.trace, *options)
    assert (status, acknowledged) == (0, "done")
    found = []
    for kind, count in sorted(calls(ground.trace).items()):
        step = max(1, count // some_writes) if kind == "pwrite64" and some_writes else 1
        found += [(kind, number) for number in range(1, count + 1, step)]
    verify(ground, acknowledged)
    return found


def done(operation: str, snapshot: Snapshot, deployments: Sequence[DeploymentRecord]) -> bool:
    """Whether an operation on versions has happened; AssertionError where half of it has."""
    versions = {record.version for record in snapshot.versions}
    aliases = {record.alias: record for record in snapshot.aliases}
    match operation:
        case "deploy":
            assert (versions == {1}) is ("stable" in aliases)
            assert (versions == {1}) is ([record.state for record in deployments][-1:] == ["succeeded"])
            return versions == {1}
        case "deploy in vain":
            assert not versions
            assert not aliases
            return any(record.error_code == "golden_mismatch" for record in deployments)
        case "roll back":
            assert versions == {1, 2}
            back, forth = AliasSpec({1: 100.0}), AliasSpec({2: 100.0})
            found = aliases["stable"].spec, aliases["stable"].previous
            assert found in ((back, forth), (forth, back))
            return found == (back, forth)
        case "delete":
            assert versions in (set(), {1, 2})
            assert bool(aliases) is bool(versions)
            return not versions
        case _:
            return False


EVENTS = {
    "deploy": "deployment_succeeded",
    "deploy in vain": "deployment_failed",
    "roll back": "rolled_back",
    "delete": "version_deleted",
}


def verify(ground: Ground, acknowledged: str | None) -> None:
    """Start a gateway's parts again: the registry is whole, what was acknowledged is there, what was interrupted is
    told so, and what is left over can be swept."""
    state, operation = ground.state, ground.operation

    async def look() -> None:
        async with gateway(state) as parts:
            catalog, storage = parts.catalog, parts.storage
            problems = [problem for problem in await storage.check() if not problem.harmless]
            assert problems == []
            assert await catalog.running_deployments() == []
            snapshot = await catalog.snapshot()
            if operation in EVENTS:
                deployments = sorted(await catalog.deployments(), key=lambda record: record.created_at)
                happened = done(operation, snapshot, deployments)
                assert happened or acknowledged != "done"
                events = await catalog.events(limit=1000)
                kinds = [event.kind for event in events if event.detail.get("code") != "interrupted"]
                assert (EVENTS[operation] in kinds) is happened, "with its event or not at all"
            if operation == "upload":
                blob = await catalog.blob(digest_of(GRAPH))
                assert blob is not None or acknowledged != "done"
            for version in snapshot.versions:
                directory = await storage.versions.materialise(version)
                assert (directory / "model.onnx").read_bytes() == GRAPH
                assert (directory / "w/a.bin").read_bytes() in (WEIGHTS, LESS_WEIGHTS)
            for path in state.glob("versions/*/.new-*"):
                os.utime(path, (0, 0))
            await storage.collect()
            assert await storage.check() == []
            kept = {path.name for path in state.glob("blobs/sha256/*/*")}
            assert kept == {f"{blob.digest}-{blob.copy}" for blob in await catalog.blobs()}
            assert list((state / "uploads").iterdir()) == []
            assert not list(state.glob("versions/*/.new-*"))
            laid_out = {path.parent.name for path in state.glob("versions/*/*")}
            assert laid_out == {version.model for version in snapshot.versions}
        if operation == "create a key":
            async with open_keys(database_url=database_of(state), state_dir=state) as keys:
                made, _ = await keys.service.page(limit=10, cursor=None)
                assert [record.name for record in made] in ([], [KEY_NAME], [KEY_NAME] * 2)
                assert made or acknowledged != "done"

    asyncio.run(look())
    with sqlite3.connect(state / "inferway.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()


@pytest.mark.slow
def test_being_killed_at_any_call_loses_and_halves_nothing(driver: Driver, ground: Ground) -> None:
    found = points(driver, ground, WRITING)
    assert len(found) >= OPERATIONS[ground.operation]
    print(f"{ground.operation}: killed at each of {len(found)} calls that write")
    for kind, number in found:
        ground.reset()
        options = ("-e", f"trace={kind}", "-e", f"inject={kind}:signal=KILL:when={number}")
        status, acknowledged, _ = driver.run(ground.state, ground.operation, ground.trace, *options)
        assert status == -signal.SIGKILL, (kind, number)
        try:
            verify(ground, acknowledged)
        except AssertionError as error:
            raise AssertionError(f"killed at {kind} {number}, {acknowledged}") from error


@pytest.mark.slow
def test_a_disk_that_fails_at_any_call_is_an_error_and_no_more(driver: Driver, ground: Ground) -> None:
    errors = ("ENOSPC", "EIO")
    both = os.environ.get("INFERWAY_FAULTS") == "all"
    found = points(driver, ground, FAILING, None if both else SOME_WRITES)
    faults = [(*point, error) for i, point in enumerate(found) for error in (errors if both else (errors[i % 2],))]
    print(f"{ground.operation}: {len(faults)} calls failed, {'all in both ways' if both else 'not all of them'}")
    for kind, number, error in faults:
        ground.reset()
        options = ("-e", f"trace={kind}", "-e", f"inject={kind}:error={error}:when={number}")
        status, acknowledged, again = driver.run(ground.state, ground.operation, ground.trace, *options)
        try:
            assert status == 0
            assert acknowledged == "done" or again, "it goes on once the disk works"
            verify(ground, "done")
        except AssertionError as failure:
            raise AssertionError(f"{error} at {kind} {number}: {acknowledged}") from failure


def test_a_content_lasts_before_its_name_and_its_name_before_its_row(driver: Driver, directory: Path) -> None:
    ground = Ground("upload", directory / "template", directory / "state", directory / "trace")
    asyncio.run(registry_driver.prepare(ground.template, "upload"))
    points(driver, ground, WRITING)
    lines = ground.trace.read_text().splitlines()

    def at(pattern: str) -> list[int]:
        return [number for number, line in enumerate(lines) if re.search(pattern, line)]

    written = at(rf"pwrite64\(\d+<[^>]*/uploads/[0-9a-f]{{64}}-{KEY}\.part>")
    synced = at(r"f(data)?sync\(\d+<[^>]*/uploads/[^>]*\.part>\) += 0")
    renamed = at(r"rename\w*\(.*/uploads/[0-9a-f]{64}.*/blobs/sha256/[0-9a-f]{2}/[0-9a-f]{64}-[0-9a-f]{8}.*\) += 0")
    named = at(r"f(data)?sync\(\d+<[^>]*/blobs/sha256/[0-9a-f]{2}>\) += 0")
    rows = at(r"pwrite64\(\d+<[^>]*/inferway\.db-wal>")
    committed = at(r"f(data)?sync\(\d+<[^>]*/inferway\.db-wal>\) += 0")
    assert written
    assert max(written) < synced[0] < renamed[0] < named[-1]
    row = [number for number in rows if number > named[-1]]
    assert row, "the row is written after the name lasts"
    assert max(row) < max(committed)
