"""What the tests of faults kill: a process that does one thing to the registry, with the real stores.

It imports everything once, then forks for each run, so that a run takes milliseconds. Its lines on stdin:

    RUN STATE OPERATION ACK     fork; the answer is the pid of the child, which has opened the stores and waits
    GO                          let the child begin; the answer is its exit status once it has ended

The stores' threads are replaced by the one that calls, because strace counts calls per thread. What was done is told by
a symbolic link called ACK, whose target are the words: no other call of the registry's makes one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from inferway_gateway.core.catalog import AliasSpec, FileRef, Step, VersionSpec
from inferway_gateway.store import blobs, sql
from inferway_gateway.store.blobs import StorageLimits
from inferway_gateway.store.catalog import SqlCatalog, open_catalog
from inferway_gateway.store.database import open_keys
from inferway_gateway.store.storage import Storage, open_storage

T = TypeVar("T")
KEY = "a1B2c3D4e5F6"
GRAPH = b"graph " * 100_000
WEIGHTS = b"weights " * 100_000
KEY_NAME = "made by the driver"


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


def spec_of(weights: bytes) -> VersionSpec:
    files = (FileRef("model.onnx", digest_of(GRAPH), len(GRAPH)), FileRef("w/a.bin", digest_of(weights), len(weights)))
    return VersionSpec("churn", "onnx", files)


async def deploy(catalog: SqlCatalog, storage: Storage, weights: bytes) -> None:
    spec = spec_of(weights)
    digest = digest_of(repr(spec).encode())
    running = await catalog.begin_deployment(spec, digest=digest, isolation="worker", by=KEY, owner="driver")
    await catalog.advance_deployment(running.id, Step.CHECKED)
    version = await catalog.commit_deployment(running.id, None, AliasSpec({running.version: 100.0}))
    await storage.versions.materialise(version)


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
        async with opened(state) as (catalog, storage):
            await catalog.revision()
            begin()
            await change(operation, catalog, storage)
            acknowledge()


async def change(operation: str, catalog: SqlCatalog, storage: Storage) -> None:
    match operation:
        case "upload":
            await put(storage, GRAPH)
        case "deploy":
            for left in await catalog.running_deployments():
                await catalog.end_deployment(left.id, code="internal", message="interrupted", step=None)
            await deploy(catalog, storage, WEIGHTS[:700_000])
        case "roll back":
            alias = await catalog.alias("churn", "stable")
            if alias.spec.weights == {2: 100.0}:
                assert alias.previous is not None
                await catalog.set_alias("churn", "stable", alias.previous, by=KEY, kind="rolled_back")
        case "delete":
            if any(version.model == "churn" for version in (await catalog.snapshot()).versions):
                await catalog.delete_model("churn", by=KEY)
            await storage.collect(0)
        case other:
            raise AssertionError(other)


async def prepare(state: Path, operation: str) -> None:
    """What there is before it."""
    if operation == "open":
        return
    async with opened(state) as (catalog, storage):
        if operation in ("deploy", "roll back", "delete"):
            for content in (GRAPH, WEIGHTS, WEIGHTS[:700_000]):
                await put(storage, content)
        if operation in ("roll back", "delete"):
            await deploy(catalog, storage, WEIGHTS)
            await deploy(catalog, storage, WEIGHTS[:700_000])
    if operation == "create a key":
        async with open_keys(database_url=database_of(state), state_dir=state):
            pass


def child(state: Path, operation: str, ack: Path, begin: Callable[[], None]) -> None:
    sql.ThreadPoolExecutor = blobs.ThreadPoolExecutor = Inline  # type: ignore[attr-defined]

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
