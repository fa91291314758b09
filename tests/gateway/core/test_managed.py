"""The catalog's versions in memory: on demand, within a budget, beside the folder's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

import models
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.core.backend import Artifact, Session
from inferway_gateway.core.batcher import InferenceRequest
from inferway_gateway.core.budget import MemoryBudget
from inferway_gateway.core.catalog import Footprint, VersionRecord
from inferway_gateway.core.errors import (
    BlobNotFoundError,
    ConflictError,
    DeadlineExceededError,
    MemoryExceededError,
    ModelLoadError,
    ModelNotFoundError,
    ModelNotReadyError,
    VersionNotFoundError,
)
from inferway_gateway.core.managed import ManagedVersions, Opened
from inferway_gateway.core.registry import Registry
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.store.repository import ModelRepository

MOMENT = datetime(2026, 11, 23, tzinfo=UTC)


class HeldOpener:
    """Opens ``add_one`` models whose increment is their version; each takes as long as it is held, and 10 bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._backend = OnnxBackend(trial_budget_s=0, measure_budget_s=0.01)
        self.opened: list[tuple[str, int]] = []
        self.closed = 0
        self.held: asyncio.Event | None = None
        self.fails: Exception | None = None

    async def estimate(self, record: VersionRecord) -> int:
        return 10 if record.footprint is None else record.footprint.peak_bytes

    async def open(self, record: VersionRecord, stats: ModelStats) -> Opened:
        self.opened.append((record.model, record.version))
        if self.held is not None:
            await self.held.wait()
        if self.fails is not None:
            raise self.fails
        path = self._folder / f"{record.model}-{record.version}.onnx"  # its own: another may be read meanwhile
        path.write_bytes(models.add_one(4, record.version))
        artifact = Artifact(record.model, record.version, path)
        return Opened(artifact.config, await asyncio.to_thread(self._backend.open, artifact))

    async def close(self, session: Session) -> None:
        self.closed += 1
        session.close()


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Scene:
    managed: ManagedVersions
    registry: Registry
    opener: HeldOpener
    clock: Clock
    records: dict[tuple[str, int], VersionRecord] = field(default_factory=dict)

    def add(self, name: str, version: int = 1, **members: object) -> VersionRecord:
        """Put a version into the catalog, and let the gateway see it."""
        found = replace(record(name, version), **members)  # type: ignore[arg-type]  # members of the record
        self.records[name, version] = found
        self.managed.sync(self.records.values())
        return found

    async def answer(self, name: str, version: int | None = None) -> float:
        served = await self.registry.acquire(name, version)
        request = InferenceRequest({"x": np.zeros((1, 4), np.float32)}, ("y",), 1, 16)
        answer = served.batcher.run_inline(request) or await served.batcher.infer(request)
        served.stats.finished(0.0, None)
        return float(answer.outputs[0][0, 0])

    def status(self, name: str, version: int = 1) -> str:
        return self.managed.status(name, version)[0]


def record(name: str, version: int = 1) -> VersionRecord:
    return VersionRecord(
        model=name,
        version=version,
        kind="onnx",
        digest=f"{version:064}",
        files=(),
        config={},
        isolation="inprocess",
        labels={},
        metadata={},
        pinned=False,
        footprint=None,
        created_at=MOMENT,
        created_by="k",
    )


@asynccontextmanager
async def running(
    folder: Path, *, memory_bytes: int = 1000, load_wait_s: float = 10, repository: Path | None = None
) -> AsyncIterator[Scene]:
    clock = Clock()
    async with asyncio.timeout(30), RunnerPool(1) as runners:
        opener = HeldOpener(folder)
        budget = MemoryBudget(memory_bytes, clock=clock)
        managed = ManagedVersions(opener, runners, budget, load_wait_s=load_wait_s, clock=clock)
        found = None if repository is None else ModelRepository(repository)
        registry = Registry(
            found, OnnxBackend(trial_budget_s=0), runners, managed=managed, control="poll", poll_interval_s=0.01
        )
        following = asyncio.create_task(registry.run())
        await managed.load_ahead(())
        while not registry.ready:
            await asyncio.sleep(0.001)
        yield Scene(managed, registry, opener, clock)
        if opener.held is not None:
            opener.held.set()
        following.cancel()
        await asyncio.wait((following,))
        await registry.close()
        assert budget.used_bytes == 0
        assert not list(managed.loaded())


async def test_a_version_is_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        scene.add("m", 1)
        scene.add("m", 2)
        assert scene.registry.names() == ["m"]
        assert [(e.version, e.state) for e in scene.registry.index()] == [("1", "UNAVAILABLE"), ("2", "UNAVAILABLE")]
        with pytest.raises(ModelNotReadyError, match="unloaded until the next request"):
            scene.registry.get("m", 1)
        assert await scene.answer("m") == 2.0
        assert await scene.answer("m", 1) == 1.0
        assert scene.registry.get("m").version == 2
        for name, version, error in (("m", 3, VersionNotFoundError), ("n", None, ModelNotFoundError)):
            with pytest.raises(error):
                await scene.registry.acquire(name, version)


async def test_the_highest_version_is_not_stood_in_for_while_it_is_not_loaded(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        scene.add("m", 1)
        assert await scene.answer("m") == 1.0
        scene.add("m", 2)
        with pytest.raises(ModelNotReadyError):
            scene.registry.get("m")
        assert await scene.answer("m") == 2.0


async def test_all_who_ask_wait_for_one_load(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        scene.add("m")
        scene.opener.held = asyncio.Event()
        waiting = [asyncio.create_task(scene.registry.acquire("m")) for _ in range(20)]
        while scene.status("m") != "LOADING" or not scene.opener.opened:
            await asyncio.sleep(0)
        for task in waiting[:10]:
            task.cancel()
        await asyncio.wait(waiting[:10])
        scene.opener.held.set()
        found = await asyncio.gather(*waiting[10:])
        assert len({id(served) for served in found}) == 1
        assert scene.opener.opened == [("m", 1)]


async def test_a_load_that_takes_longer_goes_on_and_says_when_to_come_back(tmp_path: Path) -> None:
    async with running(tmp_path, load_wait_s=0.02) as scene:
        scene.add("m")
        scene.opener.held = asyncio.Event()
        with pytest.raises(ModelNotReadyError, match=r"loading, which takes longer than 0\.02 s") as caught:
            await scene.registry.acquire("m")
        assert caught.value.retry_after_s is not None
        loop = asyncio.get_running_loop()
        with pytest.raises(DeadlineExceededError):
            await scene.registry.acquire("m", deadline=loop.time() + 0.001)
        scene.opener.held.set()
        while scene.status("m") != "READY":
            await asyncio.sleep(0.001)
        assert await scene.answer("m") == 1.0
        assert len(scene.opener.opened) == 1


@pytest.mark.parametrize("error", [ModelLoadError("it is broken"), BlobNotFoundError("it is broken"), OSError("x")])
async def test_what_cannot_be_loaded_is_not_tried_at_every_request(tmp_path: Path, error: Exception) -> None:
    async with running(tmp_path) as scene:
        scene.add("m")
        scene.opener.fails = error
        for _ in range(3):
            with pytest.raises(ModelNotReadyError, match=r"version 1 is not ready: (it is broken|failed to load)"):
                await scene.registry.acquire("m")
        assert len(scene.opener.opened) == 1
        assert scene.status("m") == "FAILED"
        assert scene.managed.budget.used_bytes == 0
        scene.clock.now += 1.1
        with pytest.raises(ModelNotReadyError):
            await scene.registry.acquire("m")
        assert len(scene.opener.opened) == 2
        scene.opener.fails = None
        scene.clock.now += 60
        assert await scene.answer("m") == 1.0


async def test_what_cannot_be_loaded_is_told_of_less_and_less(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as scene:
        scene.add("m", pinned=True)
        scene.opener.fails = ModelLoadError("no such operator")
        for _ in range(20):
            scene.clock.now += 61
            await scene.managed.load_ahead([("m", 1)])
            with pytest.raises(ModelNotReadyError):
                await scene.registry.acquire("m", 1)
        told = [entry.getMessage() for entry in caplog.records if entry.levelname == "ERROR"]
    assert len(scene.opener.opened) == 20
    assert told == ["no such operator", *(f"no such operator (try {tries})" for tries in (2, 4, 8, 16))]


async def test_the_least_recently_used_idle_version_leaves_and_comes_back(tmp_path: Path) -> None:
    async with running(tmp_path, memory_bytes=25) as scene:
        for name in "abc":
            scene.add(name)
        for name in ("a", "b", "a", "c"):
            scene.clock.now += 1
            await scene.answer(name)
            scene.managed.trim()
        assert [scene.status(name) for name in "abc"] == ["READY", "UNLOADED", "READY"]
        assert scene.opener.closed == 1
        assert await scene.answer("b") == 1.0
        assert scene.managed.budget.evictions == 2


async def test_a_version_with_requests_in_flight_is_not_taken_away(tmp_path: Path) -> None:
    async with running(tmp_path, memory_bytes=15, load_wait_s=5) as scene:
        scene.add("slow")
        scene.add("next")
        served = await scene.registry.acquire("slow")
        lock = scene.managed._runners.lock
        with lock:  # no run begins, so the request stays where it is
            request = InferenceRequest({"x": np.zeros((1, 4), np.float32)}, ("y",), 1, 16)
            served.batcher._inline_elements = 0  # type: ignore[attr-defined]  # it is a batcher: let it queue
        asking = asyncio.create_task(served.batcher.infer(request))
        await asyncio.sleep(0)
        assert served.busy
        waiting = asyncio.create_task(scene.registry.acquire("next"))
        await asyncio.sleep(0)
        assert scene.status("slow") == "READY"
        assert (await asking).outputs[0][0, 0] == 1.0
        assert (await waiting).name == "next"
        assert scene.status("slow") == "UNLOADED"


async def test_pinned_versions_stay_and_what_does_not_fit_beside_them_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, memory_bytes=15) as scene:
        scene.add("kept", pinned=True)
        await scene.answer("kept")
        scene.add("other")
        with pytest.raises(MemoryExceededError, match=r"needs 10 bytes .*pinned versions leave 5 of the 15 bytes"):
            await scene.registry.acquire("other")
        scene.add("kept", pinned=False)
        scene.clock.now += 60
        assert await scene.answer("other") == 1.0


async def test_what_was_measured_counts_after_it_was_loaded_once(tmp_path: Path) -> None:
    async with running(tmp_path, memory_bytes=15) as scene:
        scene.add("m", footprint=Footprint(10, 16))
        with pytest.raises(MemoryExceededError, match=r"needs 16 bytes of memory \(measured\)"):
            await scene.registry.acquire("m")


async def test_loading_ahead_takes_only_room_that_is_free(tmp_path: Path) -> None:
    async with running(tmp_path, memory_bytes=25) as scene:
        for name in "abc":
            scene.add(name)
        await scene.managed.load_ahead([(name, 1) for name in "abc"])
        while any(scene.status(name) == "LOADING" for name in "abc"):  # it waits a second only
            await asyncio.sleep(0.01)
        assert sorted(scene.status(name) for name in "abc") == ["READY", "READY", "UNLOADED"]
        assert scene.managed.budget.evictions == 0


async def test_what_must_not_displace_others_is_told_that_there_is_no_room(tmp_path: Path) -> None:
    async with running(tmp_path, memory_bytes=15) as scene:
        scene.add("serving")
        scene.add("shadow")
        await scene.answer("serving")
        scene.clock.now += 60
        with pytest.raises(ModelNotReadyError, match=r"'shadow' version 1: there is no room for it now"):
            await scene.registry.acquire("shadow", 1, evict=False)
        assert (scene.status("serving"), scene.managed.budget.evictions) == ("READY", 0)
        scene.records.pop(("serving", 1))
        await scene.managed.retire(scene.managed.sync(scene.records.values()))
        assert (await scene.registry.acquire("shadow", 1, evict=False)).name == "shadow"


async def test_a_deleted_version_answers_what_it_has_and_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        scene.add("m", 1)
        scene.add("m", 2)
        await scene.answer("m", 1)
        gone = scene.managed.sync([scene.records["m", 2]])
        assert gone == {("m", 1)}
        assert await scene.answer("m", 1) == 1.0  # until the aliases have moved
        await scene.managed.retire(gone)
        with pytest.raises(VersionNotFoundError):
            scene.registry.get("m", 1)
        await scene.managed.retire(scene.managed.sync([]))
        assert scene.registry.names() == []


async def test_a_number_with_other_content_is_another_version(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        scene.add("m")
        first = await scene.registry.acquire("m")
        scene.add("m", digest="f" * 64)
        second = await scene.registry.acquire("m")
        assert second is not first
        assert scene.opener.opened == [("m", 1), ("m", 1)]


async def test_a_staged_version_is_out_of_reach_until_the_catalog_has_it(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        staged = record("m", 1)
        served = await scene.managed.stage(staged)
        with pytest.raises(ModelNotFoundError):
            scene.registry.get("m")
        with pytest.raises(ConflictError):
            await scene.managed.stage(staged)
        scene.managed.sync([staged])
        assert scene.registry.get("m") is served
        await scene.managed.discard(staged)  # it is published: nothing happens
        assert scene.registry.get("m") is served
        assert len(scene.opener.opened) == 1


async def test_a_discarded_or_cancelled_stage_leaves_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.managed.stage(record("m", 1))
        await scene.managed.discard(record("m", 1))
        assert scene.managed.budget.used_bytes == 0
        scene.opener.held = asyncio.Event()
        staging = asyncio.create_task(scene.managed.stage(record("m", 2)))
        while ("m", 2) not in scene.opener.opened:
            await asyncio.sleep(0)
        staging.cancel()
        await asyncio.wait((staging,))
        scene.opener.held.set()
        while scene.managed.budget.used_bytes:
            await asyncio.sleep(0.001)
        assert scene.opener.closed == 2


async def test_what_an_alias_points_at_does_not_leave_for_its_own_successor(tmp_path: Path) -> None:
    async with running(tmp_path, memory_bytes=15) as scene:
        scene.add("m", 1)
        await scene.managed.load_ahead([("m", 1)])
        with pytest.raises(MemoryExceededError, match="aliases of 'm' point at holds 10 of the budget of 15 bytes"):
            await scene.managed.stage(record("m", 2))
        assert scene.status("m") == "READY"
        assert await scene.answer("m") == 1.0


async def test_a_name_that_the_folder_has_is_the_folders(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    async with running(tmp_path, repository=folder) as scene:
        scene.add("m", 7)
        assert await scene.answer("m") == 7.0
        models.write_repository(folder, {"m": models.add_one(4, 50)})
        while not scene.registry.in_folder("m") or scene.registry.state("m", 1)[0] != "READY":
            await asyncio.sleep(0.001)
        assert await scene.answer("m") == 50.0
        assert scene.managed.hides("m")
        while scene.status("m", 7) != "UNLOADED":
            await asyncio.sleep(0.001)
        with pytest.raises(ModelNotFoundError):
            await scene.managed.acquire("m", 7)
        (folder / "m/1/model.onnx").unlink()
        (folder / "m/1").rmdir()
        (folder / "m").rmdir()
        while scene.registry.in_folder("m"):
            await asyncio.sleep(0.001)
        assert await scene.answer("m") == 7.0
        with pytest.raises(ConflictError):
            await scene.registry.unload("m")


async def test_a_load_that_finds_no_room_gives_up_in_the_end(tmp_path: Path) -> None:
    async with running(tmp_path, memory_bytes=15) as scene:
        await scene.managed.stage(record("other", 1))  # nobody may take its room
        scene.add("m", 1)
        asking = asyncio.create_task(scene.registry.acquire("m"))
        while scene.status("m") != "LOADING":
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        scene.clock.now += 61
        with pytest.raises(MemoryExceededError, match="in use or pinned hold 10 of the budget of 15 bytes"):
            await asking
        await scene.managed.discard(record("other", 1))
        scene.clock.now += 61
        assert await scene.answer("m") == 1.0
