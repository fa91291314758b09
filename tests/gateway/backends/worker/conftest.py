"""Models in real worker processes. One fork server serves a file of tests; each test opens what it needs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inferway_gateway.backends.worker import BackendOptions, WorkerBackend, WorkerLimits, WorkerSession
from inferway_gateway.backends.worker.process import WorkerProcess
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.batcher import Answer, Batcher, InferenceRequest
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig, SessionOptions
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats

LIMIT_S = 30.0
Inputs = dict[str, NDArray[Any]]


def until(happened: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Wait for something that no event tells of."""
    give_up = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < give_up, "it never happened"
        time.sleep(0.002)


def process_of(session: WorkerSession, index: int = 0) -> WorkerProcess:
    """The process of an instance, once there is one."""
    until(lambda: session._places[index].process is not None)
    process = session._places[index].process
    assert process is not None
    return process


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not.

    The first thread of one that was killed may be gone before the others, and its files are open until they are too.
    """
    try:
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X") or threads > 1


def own_resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Workers:
    """Opens models in workers and remembers what the backend told."""

    backend: WorkerBackend
    folder: Path
    events: list[tuple[str, str, str]] = field(default_factory=list)
    opened: list[WorkerSession] = field(default_factory=list)

    def open(self, proto: bytes, *, name: str = "m", config: ModelConfig | None = None) -> WorkerSession:
        place = Path(tempfile.mkdtemp(dir=self.folder))
        file = place / "model.onnx"
        file.write_bytes(proto)
        session = self.backend.open(Artifact(name, 1, file, config or plain_config()))
        self.opened.append(session)
        return session

    def kinds(self, kind: str) -> list[str]:
        return [detail for told, _, detail in self.events if told == kind]


def plain_config(**changes: Any) -> ModelConfig:
    return ModelConfig(
        batching=changes.pop("batching", BatchPolicy(preferred_rows=(32,))),
        session=SessionOptions(trial=False),
        **changes,
    )


@contextlib.contextmanager
def running_workers(folder: Path, limits: WorkerLimits | None = None, **options: Any) -> Iterator[Workers]:
    backend = WorkerBackend(
        BackendOptions(run_limit_s=0.5, measure_budget_s=0.05),
        cpus=2,
        limits=limits or WorkerLimits(load_timeout_s=LIMIT_S),
        test_hooks=True,
        **options,
    )
    with backend:
        workers = Workers(backend, folder)
        backend.on_event = lambda kind, artifact, detail: workers.events.append((kind, artifact.name, detail))
        yield workers
        for session in workers.opened:
            session.close()


@pytest.fixture(scope="module")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with running_workers(tmp_path_factory.mktemp("workers")) as workers:
        yield workers


@pytest.fixture
def workers(fork_server: Workers) -> Iterator[Workers]:
    """A fork server of the whole file, with what this test opened closed after it."""
    already = len(fork_server.opened)
    fork_server.events.clear()
    yield fork_server
    for session in fork_server.opened[already:]:
        session.close()


@dataclass
class Served:
    session: WorkerSession
    batcher: Batcher
    stats: ModelStats

    def ask(self, inputs: Inputs, *outputs: str, **options: Any) -> InferenceRequest:
        rows = self.session.signature.check(inputs)
        names = outputs or self.session.signature.output_names
        return InferenceRequest(inputs, names, rows, sum(a.nbytes for a in inputs.values()), **options)

    async def all(self, *requests: InferenceRequest) -> list[Answer | BaseException]:
        async with asyncio.timeout(60):
            return await asyncio.gather(*map(self.batcher.infer, requests), return_exceptions=True)


@asynccontextmanager
async def served(
    session: WorkerSession, *, config: ModelConfig | None = None, run_timeout_s: float = LIMIT_S, threads: int = 2
) -> AsyncIterator[Served]:
    stats = ModelStats()
    async with RunnerPool(threads) as pool:
        batcher = Batcher(session, config or plain_config(), stats, pool, run_timeout_s=run_timeout_s)
        yield Served(session, batcher, stats)
        assert await batcher.close()


def rows(count: int, seed: int = 0, size: int = 16) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)
