"""What the tests of faults kill: a process that does one thing to the registry, with the real stores.

It imports everything once, then forks for each run, so that a run takes milliseconds. Its lines on stdin:

    RUN STATE OPERATION ACK     fork; the answer is the pid of the child, which has opened the stores and waits
    GO                          let the child begin; the answer is its exit status once it has ended

What deploys, follows, rolls back and deletes are the gateway's own parts in its own order: the stores, the checks, the
state machine of deployments and the follower. Only what a version's files are opened into is a stand-in, which writes
nothing either.

The stores' threads are replaced by the one that calls, because strace counts calls per thread. What was done is told by
a symbolic link called ACK, whose target are the words: no other call of the registry's makes one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from inferway_gateway.core import opening
from inferway_gateway.core.batcher import Answer, InferenceRequest
from inferway_gateway.core.budget import MemoryBudget
from inferway_gateway.core.catalog import DeploymentRecord, FileRef, VersionRecord, VersionSpec
from inferway_gateway.core.deployments import Deployer, Follower, process_id
from inferway_gateway.core.execution import Executor
from inferway_gateway.core.managed import ManagedVersions
from inferway_gateway.core.opening import VersionOpener
from inferway_gateway.core.routing import Router
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.tensors import Signature, TensorSpec
from inferway_gateway.store import blobs, sql
from inferway_gateway.store.blobs import StorageLimits
from inferway_gateway.store.catalog import SqlCatalog, open_catalog
from inferway_gateway.store.database import open_keys
from inferway_gateway.store.storage import Storage, open_storage
from inferway_gateway.store.version_checks import VersionChecks
from inferway_gateway.store.version_config import read_artifact

T = TypeVar("T")
KEY = "a1B2c3D4e5F6"
GRAPH = b"graph " * 100_000
WEIGHTS = b"weights " * 100_000
KEY_NAME = "made by the driver"
LESS_WEIGHTS = WEIGHTS[:700_000]
GOOD, WRONG = (
    json.dumps(
        {
            "examples": [
                {
                    "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 1, 2, 3]}],
                    "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [first, 1, 2, 3]}],
                }
            ]
        }
    ).encode()
    for first in (0, 9)
)
"""Golden examples that the stand-in gives, and others."""


class Inline(ThreadPoolExecutor):
    """Does at once what it is given, on the thread that gives it."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def database_of(state: Path) -> str:
    return f"sqlite:///{state}/inferway.db"


@asynccontextmanager
async def opened(state: Path) -> AsyncIterator[tuple[SqlCatalog, Storage]]:
    async with (
        open_catalog(database_url=database_of(state), timeout_s=20) as catalog,
        open_storage(state_dir=state, catalog=catalog, limits=StorageLimits(orphan_s=0, partial_s=0)) as storage,
    ):
        yield catalog, storage


async def put(storage: Storage, content: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 65_536):
            yield content[start : start + 65_536]

    await storage.blobs.put_stream(digest_of(content), pieces(), by=KEY)


class Stand:
    """What a version is opened into: answers each input with itself."""

    inline = row_exact = True
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),), batched=True)

    def run_inline(self, request: InferenceRequest) -> Answer:
        return Answer([np.array(request.inputs["x"])], 0, 0, 0, 0, request.rows)

    async def infer(self, request: InferenceRequest) -> Answer:
        return self.run_inline(request)

    async def drain(self, timeout_s: float) -> int:
        return 0

    async def close(self) -> bool:
        return True


@dataclass
class Parts:
    """Those of a gateway that change its registry."""

    catalog: SqlCatalog
    storage: Storage
    follower: Follower
    deployer: Deployer

    async def deploy(self, spec: VersionSpec) -> DeploymentRecord:
        """Carry a deployment out to its end, as a gateway does."""
        record = await self.deployer.submit(spec, isolation="worker", by=KEY)
        while record.state == "running":
            record = await self.deployer.wait(record.id, record.step, 10)
        return record


@asynccontextmanager
async def gateway(state: Path) -> AsyncIterator[Parts]:
    """A gateway's parts as it has them once it has started."""
    async with AsyncExitStack() as stack:
        catalog, storage = await stack.enter_async_context(opened(state))
        runners = await stack.enter_async_context(RunnerPool(1))

        async def stand(record: VersionRecord, folder: Path, stats: ModelStats) -> Executor:
            assert (folder / "model.onnx").stat().st_size == len(GRAPH)
            return Stand()

        opener = VersionOpener(storage.versions.materialise, read_artifact, {}, {"onnx": stand})
        await stack.enter_async_context(opener)
        managed = ManagedVersions(opener, runners, MemoryBudget(1 << 30))
        stack.push_async_callback(managed.close)
        checks = VersionChecks(storage.blobs, storage.versions, None)
        follower = Follower(catalog, managed, Router(), remove=checks.remove)
        deployer = Deployer(catalog, managed, checks, follower.follow, owner=process_id(), poll_s=0.01)
        stack.push_async_callback(deployer.close)
        await deployer.end_interrupted()
        await follower.follow()
        yield Parts(catalog, storage, follower, deployer)


def spec_of(weights: bytes, golden: bytes = GOOD) -> VersionSpec:
    contents = {"model.onnx": GRAPH, "w/a.bin": weights, "golden.json": golden}
    files = tuple(FileRef(path, digest_of(content), len(content)) for path, content in contents.items())
    return VersionSpec("churn", "onnx", files, alias="stable")


async def act(state: Path, operation: str, begin: Callable[[], None], acknowledge: Callable[[], None]) -> None:
    """Open what it needs, begin, do it, say so, and close. Each may be done again after it failed half way."""
    if operation == "open":
        begin()
        async with opened(state):
            acknowledge()
    elif operation == "create a key":
        async with open_keys(database_url=database_of(state), state_dir=state) as keys:
            await keys.service.page(limit=1, cursor=None)
            begin()
            await keys.service.create(name=KEY_NAME, scopes=["infer"], models=["*"], environment="live")
            acknowledge()
    else:
        async with gateway(state) as parts:
            begin()
            await change(operation, parts)
            acknowledge()


async def change(operation: str, parts: Parts) -> None:
    catalog, storage = parts.catalog, parts.storage
    match operation:
        case "upload":
            await put(storage, GRAPH)
        case "deploy":
            ended = await parts.deploy(spec_of(LESS_WEIGHTS))
            if ended.state != "succeeded":
                raise RuntimeError(f"{ended.error_code} at {ended.failed_step}")
        case "deploy in vain":
            ended = await parts.deploy(spec_of(LESS_WEIGHTS, WRONG))
            if ended.error_code != "golden_mismatch":
                raise RuntimeError(f"{ended.error_code} at {ended.failed_step}")
        case "roll back":
            alias = await catalog.alias("churn", "stable")
            if alias.spec.weights == {2: 100.0}:
                assert alias.previous is not None
                await catalog.set_alias("churn", "stable", alias.previous, by=KEY, kind="rolled_back")
            await parts.follower.follow()
        case "delete":
            if any(version.model == "churn" for version in (await catalog.snapshot()).versions):
                await catalog.delete_model("churn", by=KEY)
            await parts.follower.follow()
            await storage.collect(0)
        case other:
            raise AssertionError(other)


async def prepare(state: Path, operation: str) -> None:
    """What there is before it."""
    if operation == "open":
        return
    async with gateway(state) as parts:
        if operation not in ("upload", "create a key"):
            for content in (GRAPH, WEIGHTS, LESS_WEIGHTS, GOOD, WRONG):
                await put(parts.storage, content)
        if operation in ("roll back", "delete"):
            for weights in (WEIGHTS, LESS_WEIGHTS):
                assert (await parts.deploy(spec_of(weights))).state == "succeeded"
    if operation == "create a key":
        async with open_keys(database_url=database_of(state), state_dir=state):
            pass


def child(state: Path, operation: str, ack: Path, begin: Callable[[], None]) -> None:
    logging.disable()  # what is written to a terminal is none of the registry's
    for module in (sql, blobs, opening):
        module.ThreadPoolExecutor = Inline  # type: ignore[attr-defined]

    async def main(begin: Callable[[], None], acknowledge: Callable[[], None]) -> None:
        asyncio.get_running_loop().set_default_executor(Inline())
        await act(state, operation, begin, acknowledge)

    try:
        asyncio.run(main(begin, lambda: ack.symlink_to("done")))
    except Exception as error:
        if not ack.is_symlink():
            ack.symlink_to(type(error).__name__)
        # The disk works again, and so does this.
        asyncio.run(main(lambda: None, lambda: ack.with_name(f"{ack.name}-again").symlink_to("done")))


def fork(state: Path, operation: str, ack: Path) -> tuple[int, int]:
    """The pid of a child that waits, and the pipe that lets it go."""
    told, ready = os.pipe()
    gate, go = os.pipe()
    pid = os.fork()
    if pid:
        os.close(ready)
        os.close(gate)
        os.read(told, 1)
        os.close(told)
        return pid, go
    os.close(told)
    os.close(go)

    def begin() -> None:
        os.close(ready)
        os.read(gate, 1)

    try:
        child(state, operation, ack, begin)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def serve() -> None:
    pid = go = 0
    for line in sys.stdin:
        match line.rstrip("\n").split("\t"):
            case ["RUN", state, operation, ack]:
                pid, go = fork(Path(state), operation, Path(ack))
                print(pid, flush=True)
            case ["GO"]:
                os.close(go)
                _, status = os.waitpid(pid, 0)
                print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
