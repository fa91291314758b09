"""The steps of deployments and what ends them, on a real catalog and real sessions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.batcher import Answer, InferenceRequest
from inferway_gateway.core.budget import MemoryBudget
from inferway_gateway.core.catalog import (
    AliasRecord,
    AliasSpec,
    DeploymentRecord,
    FileRef,
    Guard,
    Shadow,
    Step,
    VersionRecord,
    VersionSpec,
)
from inferway_gateway.core.deployments import (
    WARM_RUNS,
    Deployer,
    FairSlots,
    Follower,
    declared,
    following,
    is_gone,
    manifest_digest,
    process_id,
    wanted_ahead,
    warm_up,
)
from inferway_gateway.core.errors import (
    ConflictError,
    DigestMismatchError,
    GatewayError,
    ModelExecutionError,
    ModelNotFoundError,
    ModelRejectedError,
    QuotaExceededError,
    ShuttingDownError,
    StoreUnavailableError,
)
from inferway_gateway.core.golden import Example
from inferway_gateway.core.managed import ManagedVersions
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig, PaddingAxis
from inferway_gateway.core.opening import LOAD_RATIO, VersionOpener
from inferway_gateway.core.registry import Registry
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.served import ServedVersion
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.tensors import Signature, TensorSpec
from inferway_gateway.store.catalog import SqlCatalog, open_catalog

KEY = "a1B2c3D4e5F6"
PLACES = ("verify", "admit", "golden")


class StepChecks:
    """Files lie in a folder by digest. Each look at them can be held up, or fail."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.holds: dict[str, asyncio.Event] = {}
        self.reached: dict[str, asyncio.Event] = {}
        self.failures: dict[str, Exception] = {}
        self.examples: Sequence[Example] = ()
        self.removed: list[tuple[str, int]] = []

    def hold(self, place: str) -> asyncio.Event:
        """Stop deployments there; the event that is returned tells that one has come to it."""
        self.holds[place] = asyncio.Event()
        self.reached[place] = asyncio.Event()
        return self.reached[place]

    async def at(self, place: str) -> None:
        if place in self.holds:
            self.reached[place].set()
            await self.holds[place].wait()
        if place in self.failures:
            raise self.failures[place]

    async def verify(self, record: VersionRecord) -> None:
        await self.at("verify")

    async def admit(self, record: VersionRecord) -> None:
        await self.at("admit")

    async def golden(self, record: VersionRecord) -> Sequence[Example]:
        await self.at("golden")
        return self.examples

    async def remove(self, record: VersionRecord) -> None:
        self.removed.append((record.model, record.version))

    async def place(self, record: VersionRecord) -> Path:
        await self.at("place")
        return self.root

    @staticmethod
    def describe(record: VersionRecord, folder: Path) -> Artifact:
        return Artifact(record.model, record.version, folder / record.files[0].digest)


class Aliases:
    def __init__(self) -> None:
        self.found: dict[tuple[str, str], AliasSpec] = {}

    def update(self, aliases: Iterable[AliasRecord]) -> None:
        self.found = {(record.model, record.alias): record.spec for record in aliases}


@dataclass
class Gateway:
    """The parts of a gateway that deployments need."""

    catalog: SqlCatalog
    managed: ManagedVersions
    registry: Registry
    checks: StepChecks
    aliases: Aliases
    follower: Follower
    deployer: Deployer
    folder: Path
    blobs: set[str] = field(default_factory=set)

    async def spec(self, increment: float, name: str = "m", **members: object) -> VersionSpec:
        content = models.add_one(4, increment)
        digest = sha256(content).hexdigest()
        (self.folder / digest).write_bytes(content)
        await self.catalog.add_blob(digest, len(content), by=KEY)
        file = FileRef("model.onnx", digest, len(content))
        return VersionSpec(name, "onnx", (file,), **members)  # type: ignore[arg-type]  # members of the spec

    async def begin(self, increment: float, name: str = "m", **members: object) -> DeploymentRecord:
        spec = await self.spec(increment, name, **members)
        return await self.deployer.submit(spec, isolation="inprocess", by=KEY)

    async def end(self, record: DeploymentRecord) -> DeploymentRecord:
        step = record.step
        while True:
            record = await self.deployer.wait(record.id, step, 10)
            if record.state != "running":
                return record
            step = record.step

    async def deploy(self, increment: float, name: str = "m", **members: object) -> DeploymentRecord:
        ended = await self.end(await self.begin(increment, name, **members))
        assert ended.state == "succeeded", ended
        return ended

    async def answer(self, name: str = "m", version: int | None = None) -> float:
        """What a model of the kind ``add_one`` makes of 0."""
        served = await self.registry.acquire(name, version)
        request = InferenceRequest({"x": np.zeros((1, 4), np.float32)}, ("y",), 1, 16)
        answer = served.batcher.run_inline(request) or await served.batcher.infer(request)
        return float(answer.outputs[0][0, 0])


Start = Callable[[], Awaitable[Gateway]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts gateways that share one database and one folder of files."""
    async with asyncio.timeout(60), AsyncExitStack() as stack:

        async def one() -> Gateway:
            return await stack.enter_async_context(running(tmp_path))

        yield one


@asynccontextmanager
async def running(root: Path, *, memory_bytes: int = 1 << 30, **limits: Any) -> AsyncIterator[Gateway]:
    async with (
        RunnerPool(1) as runners,
        open_catalog(database_url=f"sqlite:///{root}/inferway.db") as catalog,
    ):
        checks = StepChecks(root)
        backend = OnnxBackend(trial_budget_s=0, measure_budget_s=0.01)
        opener = VersionOpener(checks.place, checks.describe, {"inprocess": backend}, {})
        managed = ManagedVersions(opener, runners, MemoryBudget(memory_bytes), load_wait_s=10)
        registry = Registry(None, backend, runners, managed=managed)
        aliases = Aliases()
        follower = Follower(catalog, managed, aliases, remove=checks.remove, poll_s=0.02)
        deployer = Deployer(catalog, managed, checks, follower.follow, owner=process_id(), poll_s=0.02, **limits)
        async with opener:
            await registry.run()
            tasks = [asyncio.create_task(follower.run()), asyncio.create_task(deployer.run())]
            try:
                yield Gateway(catalog, managed, registry, checks, aliases, follower, deployer, root)
            finally:
                await deployer.close()
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                await registry.close()


async def test_a_deployment_goes_through_every_step_and_moves_its_alias(start: Start) -> None:
    gateway = await start()
    record = await gateway.begin(1)
    seen: list[Step | None] = [record.step]
    while record.state == "running":
        record = await gateway.deployer.wait(record.id, seen[-1], 10)
        seen.append(record.step)
    assert record.state == "succeeded"
    assert [step for step in Step if step in seen] == sorted({s for s in seen if s}, key=list(Step).index)
    assert await gateway.answer() == 1.0
    assert gateway.aliases.found == {("m", "stable"): AliasSpec({1: 100.0})}
    assert gateway.managed.budget.loads == 1


@pytest.mark.parametrize("place", [*PLACES, "place"])
async def test_a_deployment_is_cancelled_wherever_it_is(start: Start, place: str) -> None:
    gateway = await start()
    await gateway.deploy(1)
    held = gateway.managed.budget.used_bytes
    reached = gateway.checks.hold(place)
    record = await gateway.begin(2)
    await reached.wait()
    await gateway.deployer.cancel(record.id, by="other")
    ended = await gateway.end(record)
    assert (ended.state, ended.error_code) == ("cancelled", "cancelled")
    gateway.checks.holds[place].set()
    await nothing_staged(gateway)
    assert gateway.managed.budget.used_bytes == held
    assert gateway.checks.removed == [("m", 2)]
    assert await gateway.answer() == 1.0
    assert (await gateway.deployer.cancel(record.id, by="other")).state == "cancelled"
    events = await gateway.catalog.events("m")
    assert (events[0].kind, events[0].by) == ("deployment_cancelled", "other")


async def nothing_staged(gateway: Gateway) -> None:
    """A load that cannot be stopped is closed when it is done."""
    while [served.version for served in gateway.managed.loaded()] != [1]:
        await asyncio.sleep(0.005)
    while gateway.managed.budget.holding(("m", 2)) is not None:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("place", "error", "step"),
    [
        ("verify", DigestMismatchError("the disk has damaged it"), Step.CHECKED),
        ("admit", ModelRejectedError("no such opset"), Step.ADMITTED),
        ("golden", ModelRejectedError("no such example"), Step.ADMITTED),
        ("place", StoreUnavailableError("no store"), Step.LOADED),
        ("admit", RuntimeError("a defect"), Step.ADMITTED),
    ],
    ids=["verify", "admit", "golden", "place", "defect"],
)
async def test_a_failure_is_told_with_its_step_and_leaves_the_old_version(
    start: Start, place: str, error: Exception, step: Step
) -> None:
    gateway = await start()
    await gateway.deploy(1)
    held = gateway.managed.budget.used_bytes
    gateway.checks.failures[place] = error
    ended = await gateway.end(await gateway.begin(2))
    code = error.code if isinstance(error, GatewayError) else "internal"
    assert (ended.state, ended.failed_step, ended.error_code) == ("failed", step, code)
    if isinstance(error, GatewayError):
        assert ended.error_message is not None
        assert error.message in ended.error_message
    assert gateway.managed.budget.used_bytes == held
    assert gateway.checks.removed == [("m", 2)]
    assert await gateway.answer() == 1.0
    gateway.checks.failures.clear()
    assert (await gateway.deploy(2)).version == 2
    assert await gateway.answer() == 2.0


async def test_a_model_that_cannot_be_loaded_fails_there(start: Start) -> None:
    gateway = await start()
    spec = await gateway.spec(1)
    (gateway.folder / spec.files[0].digest).write_bytes(b"no model")
    record = await gateway.deployer.submit(spec, isolation="inprocess", by=KEY)
    ended = await gateway.end(record)
    assert (ended.failed_step, ended.error_code) == (Step.LOADED, "model_load_failed")
    assert gateway.managed.budget.used_bytes == 0
    with pytest.raises(ModelNotFoundError):
        gateway.registry.get("m")


async def test_what_never_fits_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    async with asyncio.timeout(30), running(tmp_path, memory_bytes=100) as gateway:
        ended = await gateway.end(await gateway.begin(1))
        assert (ended.failed_step, ended.error_code) == (Step.LOADED, "memory_exceeded")
        assert ended.error_message is not None
        need = int(len(models.add_one(4)) * LOAD_RATIO)
        assert f"needs {need} bytes of memory (estimated), the budget of this gateway is 100" in ended.error_message
        assert "INFERWAY_MEMORY_BUDGET_BYTES" in ended.error_message


async def test_golden_examples_are_compared_before_the_alias_moves(start: Start) -> None:
    gateway = await start()
    await gateway.deploy(1)
    zeros = np.zeros((1, 4), np.float32)
    gateway.checks.examples = [Example({"x": zeros}, {"y": zeros + 5})]
    ended = await gateway.end(await gateway.begin(2))
    assert (ended.failed_step, ended.error_code) == (Step.COMPARED, "golden_mismatch")
    assert await gateway.answer() == 1.0
    assert (await gateway.deploy(5)).state == "succeeded"


async def test_deployments_of_one_model_go_in_their_order(start: Start) -> None:
    gateway = await start()
    reached = gateway.checks.hold("admit")
    first = await gateway.begin(1)
    await reached.wait()
    second = await gateway.begin(2)
    other = await gateway.begin(9, "other")
    gateway.checks.holds["admit"].set()
    del gateway.checks.holds["admit"]
    for record in (first, second, other):
        assert (await gateway.end(record)).state == "succeeded"
    assert gateway.aliases.found["m", "stable"] == AliasSpec({2: 100.0})
    done = [event.version for event in reversed(await gateway.catalog.events("m")) if event.kind == "alias_set"]
    assert done == [1, 2]


async def test_the_same_content_waits_for_itself_and_is_the_same_version(start: Start) -> None:
    gateway = await start()
    reached = gateway.checks.hold("admit")
    first = await gateway.begin(1)
    await reached.wait()
    second = asyncio.create_task(gateway.begin(1, alias="canary"))
    await asyncio.wait((second,), timeout=0.1)
    assert not second.done()
    gateway.checks.holds["admit"].set()
    ended = [await gateway.end(first), await gateway.end(await second)]
    assert [(one.state, one.version, one.reused) for one in ended] == [("succeeded", 1, False), ("succeeded", 1, True)]
    assert gateway.aliases.found == {("m", "stable"): AliasSpec({1: 100.0}), ("m", "canary"): AliasSpec({1: 100.0})}
    assert gateway.managed.budget.loads == 1


async def test_what_is_there_already_may_take_its_time_to_load(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    first, gateway = await start(), await start()
    await first.deploy(1, alias=None)
    monkeypatch.setattr(gateway.managed, "_load_wait_s", 0.01)
    reached = gateway.checks.hold("place")
    record = await gateway.begin(1)
    await reached.wait()
    await asyncio.wait((asyncio.create_task(gateway.deployer.wait(record.id, Step.ADMITTED, 0.1)),))
    gateway.checks.holds["place"].set()
    ended = await gateway.end(record)
    assert (ended.state, ended.reused) == ("succeeded", True), ended


async def test_an_alias_keeps_what_is_not_about_its_target(start: Start) -> None:
    gateway = await start()
    for increment in (1, 2, 3):
        await gateway.deploy(increment, alias=None)
    spec = AliasSpec({1: 90.0, 2: 10.0}, sticky="key", shadow=Shadow(3), fallback=(2, 3), guard=Guard())
    await gateway.catalog.set_alias("m", "stable", spec, by=KEY)
    await gateway.deploy(3)
    moved = gateway.aliases.found["m", "stable"]
    assert moved == AliasSpec({3: 100.0}, sticky="key", shadow=None, fallback=(2,), guard=Guard())


async def test_gateways_on_one_database_follow_each_other(start: Start) -> None:
    here, there = await start(), await start()
    await here.deploy(1)
    async with asyncio.timeout(2):
        while there.aliases.found != here.aliases.found:
            await asyncio.sleep(0.005)
    assert await there.answer() == 1.0
    await there.deploy(2)
    async with asyncio.timeout(2):
        while here.aliases.found != {("m", "stable"): AliasSpec({2: 100.0})}:
            await asyncio.sleep(0.005)
    assert await here.answer() == 2.0
    await here.catalog.delete_version("m", 1, by=KEY)
    await here.follower.follow()
    async with asyncio.timeout(2):
        while [served.version for served in there.managed.loaded()] != [2]:
            await asyncio.sleep(0.005)
    assert ("m", 1) in here.checks.removed


async def test_a_deployment_is_cancelled_and_watched_through_another_gateway(start: Start) -> None:
    here, there = await start(), await start()
    reached = here.checks.hold("admit")
    record = await here.begin(1)
    await reached.wait()
    await there.deployer.cancel(record.id, by="other")
    assert (await there.end(record)).state == "cancelled"


async def test_closing_interrupts_what_goes_on(tmp_path: Path) -> None:
    async with asyncio.timeout(30), AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(running(tmp_path))
        reached = gateway.checks.hold("admit")
        record = await gateway.begin(1)
        await reached.wait()
        await gateway.deployer.close()
        with pytest.raises(ShuttingDownError):
            await gateway.begin(2)
        ended = await gateway.catalog.deployment(record.id)
        assert (ended.state, ended.error_code, ended.failed_step) == ("failed", "interrupted", Step.ADMITTED)


async def test_what_a_dead_process_left_is_ended(start: Start) -> None:
    gateway = await start()
    alive = process_id()
    parts = alive.split("-")
    dead = "-".join([parts[0], parts[1], "1", parts[3]])  # the same number, another process
    spec = await gateway.spec(1)
    left = await gateway.catalog.begin_deployment(spec, digest="0" * 64, isolation="inprocess", by=KEY, owner=dead)
    kept = await gateway.catalog.begin_deployment(
        await gateway.spec(2), digest="1" * 64, isolation="inprocess", by=KEY, owner=alive
    )
    await gateway.deployer.end_interrupted()
    ended = await gateway.catalog.deployment(left.id)
    assert (ended.state, ended.error_code, ended.failed_step) == ("failed", "interrupted", Step.RECEIVED)
    assert (await gateway.catalog.deployment(kept.id)).state == "running"


async def test_what_an_owner_elsewhere_does_not_keep_is_ended(start: Start) -> None:
    gateway = await start()
    spec = await gateway.spec(1)
    left = await gateway.catalog.begin_deployment(
        spec, digest="0" * 64, isolation="inprocess", by=KEY, owner="elsewhere-1-2-3"
    )
    await gateway.deployer.end_interrupted()
    assert (await gateway.catalog.deployment(left.id)).state == "running"
    later = Deployer(
        gateway.catalog,
        gateway.managed,
        gateway.checks,
        gateway.follower.follow,
        owner="me",
        now=lambda: datetime.now(UTC) + timedelta(seconds=31),
    )
    await later.end_interrupted()
    assert (await gateway.catalog.deployment(left.id)).error_code == "interrupted"


async def test_serving_goes_on_while_the_database_is_away(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = await start()
    await gateway.deploy(1)
    await gateway.deploy(2, alias=None)
    asked = asyncio.Event()

    async def gone() -> int:
        asked.set()
        raise StoreUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(gateway.catalog, "revision", gone)
        await asked.wait()
        assert await gateway.answer() == 2.0
        assert await gateway.answer("m", 1) == 1.0
        await gateway.catalog.set_alias("m", "canary", AliasSpec({2: 100.0}), by=KEY)
        assert ("m", "canary") not in gateway.aliases.found
    async with asyncio.timeout(2):
        while ("m", "canary") not in gateway.aliases.found:
            await asyncio.sleep(0.005)


async def test_a_commit_whose_end_nobody_saw_is_looked_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = await start()
    commit = gateway.catalog.commit_deployment

    async def cut(*arguments: object) -> VersionRecord:
        await commit(*arguments)  # type: ignore[arg-type]  # passed on as they are
        raise StoreUnavailableError("the connection was cut after the transaction")

    monkeypatch.setattr(gateway.catalog, "commit_deployment", cut)
    assert (await gateway.end(await gateway.begin(1))).state == "succeeded"
    assert await gateway.answer() == 1.0
    assert gateway.checks.removed == []


async def test_a_wanted_number_that_is_taken_is_a_conflict(start: Start) -> None:
    gateway = await start()
    await gateway.deploy(1, version=4)
    with pytest.raises(ConflictError):
        await gateway.begin(2, version=4)


def test_the_manifest_digest_is_of_the_content_alone() -> None:
    a, b = FileRef("a", "1" * 64, 1), FileRef("b", "2" * 64, 2)
    digest = manifest_digest("onnx", [a, b], {"x": 1, "y": {"z": 2}}, "worker")
    assert digest == manifest_digest("onnx", [b, a], {"y": {"z": 2}, "x": 1}, "worker")
    others = [
        manifest_digest("onnx", [a], {"x": 1, "y": {"z": 2}}, "worker"),
        manifest_digest("onnx", [a, b], {"x": 1}, "worker"),
        manifest_digest("onnx", [a, b], {"x": 1, "y": {"z": 2}}, "inprocess"),
        manifest_digest("pipeline", [a, b], {"x": 1, "y": {"z": 2}}, "worker"),
    ]
    assert len({digest, *others}) == 5
    assert len(digest) == 64


def test_a_process_knows_whether_another_lives() -> None:
    assert not is_gone(process_id())
    parts = process_id().split("-")
    assert parts[1] == str(os.getpid())
    assert is_gone("-".join([parts[0], "999999999", parts[2], parts[3]]))
    assert not is_gone("-".join(["elsewhere", "999999999", parts[2], parts[3]]))
    assert not is_gone("anything")


def test_steps_follow_each_other() -> None:
    assert following(None) == Step.RECEIVED
    assert following(Step.RECEIVED) == Step.CHECKED
    assert following(Step.READY) == Step.READY


async def test_what_is_loaded_ahead(start: Start) -> None:
    gateway = await start()
    for increment in (1, 2, 3, 4):
        await gateway.deploy(increment, alias=None, pinned=increment == 4)
    await gateway.catalog.set_alias("m", "stable", AliasSpec({1: 100.0, 2: 0.0}, fallback=(3,)), by=KEY)
    assert wanted_ahead(await gateway.catalog.snapshot()) == {("m", 1), ("m", 4)}
    other = await start()
    async with asyncio.timeout(5):
        while not other.managed.settled:
            await asyncio.sleep(0.005)
    assert sorted(served.version for served in other.managed.loaded()) == [1, 4]
    assert await other.answer("m", 2) == 2.0


async def test_a_deployment_that_takes_too_long_is_ended_and_gives_its_slot_back(tmp_path: Path) -> None:
    async with running(tmp_path, limit_s=0.2) as gateway, asyncio.timeout(60):
        gateway.checks.hold("admit")
        held = [await gateway.begin(number, f"m{number}") for number in (1, 2)]
        for record in held:
            ended = await gateway.end(record)
            assert (ended.failed_step, ended.error_code) == (Step.ADMITTED, "deadline_exceeded")
            assert "longer than the 0.2 s" in (ended.error_message or "")
        del gateway.checks.holds["admit"]
        await gateway.deploy(3)


async def test_a_key_has_so_many_deployments_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, per_key=2) as gateway, asyncio.timeout(60):
        gateway.checks.hold("admit")
        first = await gateway.begin(1, "m1")
        await gateway.begin(2, "m2")
        with pytest.raises(QuotaExceededError, match="at most 2 deployments of this key at once"):
            await gateway.begin(3, "m3")
        other = await gateway.deployer.submit(await gateway.spec(3, "m3"), isolation="inprocess", by="another")
        await gateway.deployer.cancel(first.id, by=KEY)
        await gateway.begin(4, "m4")
        gateway.checks.holds["admit"].set()
        assert (await gateway.end(other)).state == "succeeded"


async def test_a_slot_goes_to_the_key_that_holds_the_fewest() -> None:
    slots = FairSlots(2)
    begun: list[str] = []
    ends: dict[str, asyncio.Event] = {}

    async def work(name: str) -> None:
        ends[name] = asyncio.Event()
        async with slots.slot(name[0]):
            begun.append(name)
            await ends[name].wait()

    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    tasks = {name: asyncio.create_task(work(name)) for name in ("a1", "a2", "a3", "a4", "b1", "b2")}
    await settle()
    assert begun == ["a1", "a2"]
    ends["a1"].set()
    await settle()
    assert begun == ["a1", "a2", "b1"]
    tasks["a3"].cancel()
    ends["a2"].set()
    await settle()
    assert begun == ["a1", "a2", "b1", "a4"], "whoever waits no more is passed over"
    tasks["a4"].cancel()
    await settle()
    assert begun[4:] == ["b2"]
    for name in ("b1", "b2"):
        ends[name].set()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    async with slots.slot("c"), slots.slot("c"):
        pass


# ---- warming up

TEXT = Signature(
    (TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "INT64", (-1, -1))),
    (TensorSpec("y", "FP32", (-1, 4)),),
    batched=True,
    max_rows=16,
)


class Recorder:
    """An executor that fails the first run and keeps the shapes of all."""

    inline = row_exact = False

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.shapes: list[tuple[int, ...]] = []

    def run_inline(self, request: InferenceRequest) -> Answer | None:
        return None

    async def infer(self, request: InferenceRequest) -> Answer:
        self.shapes.append(request.inputs["ids"].shape)
        assert {array.shape for array in request.inputs.values()} == {self.shapes[-1]}
        if len(self.shapes) == 1:
            raise ModelExecutionError("zeros are not what it takes")
        return Answer([], 0, 0, 0, 0, 1)

    async def drain(self, timeout_s: float) -> int:
        return 0

    async def close(self) -> bool:
        return True


def config_of(*buckets: int, preferred: tuple[int, ...] = (4, 400)) -> ModelConfig:
    padding = (PaddingAxis({"ids": 1, "mask": 1}, buckets=buckets),) if buckets else ()
    return ModelConfig(max_batch_size=8, batching=BatchPolicy(preferred_rows=preferred, padding=padding))


async def test_a_version_is_warmed_up_at_every_shape_that_it_declares() -> None:
    executor = Recorder(TEXT)
    await warm_up(ServedVersion("text", 1, config_of(16, 64), None, executor, ModelStats()))
    assert executor.shapes == [(1, 16), (4, 16), (8, 16), (1, 64), (4, 64), (8, 64)]


async def test_a_version_whose_lengths_nobody_declares_is_not_warmed_up() -> None:
    executor = Recorder(TEXT)
    await warm_up(ServedVersion("text", 1, config_of(), None, executor, ModelStats()))
    assert executor.shapes == []


def test_the_shapes_to_warm_up_at_are_bounded_and_the_largest_is_among_them() -> None:
    many = declared(TEXT, config_of(*range(1, 100)))
    assert len(many) == WARM_RUNS
    assert many[-1] == (8, {("ids", 1): 99, ("mask", 1): 99})
    assert declared(Signature(TEXT.inputs, TEXT.outputs), config_of()) == [(1, {})]
