"""How a version of the catalog becomes something that answers: files into place, and the backend of its kind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from .backend import Artifact, Backend, Session
from .catalog import Footprint, Isolation, Kind, VersionRecord
from .encoding import TextReader, TextTokenizer
from .errors import ModelLoadError
from .execution import Executor
from .managed import Opened
from .model_config import ModelConfig
from .registry import LOADER_THREAD
from .stats import ModelStats

WORKER_BYTES: Final = 32 * 1024 * 1024
"""What a worker process takes without a model."""
_TOKENIZER_FILE: Final = "tokenizer.json"
_TOKENIZER_BYTES: Final = 64 * 1024 * 1024
_TOKENIZER_RATIO: Final = 64
"""What the two processes of a tokenizer take at the most, by the size of its file. Measured: 0.5 MB took 88 MB, 1.5 MB
took 150 MB, x86-64, 2026-11."""
LOAD_RATIO: Final = 1.05
"""Memory at its most while a large model is loaded, by that of its weights: a billion parameters in FP32, x86-64,
2026-11. What is measured of a version is taken afterwards."""

Weigh = Callable[[VersionRecord, Path], int]
"""What a version's weights take beyond the sizes of its files, by its folder; blocks."""
Place = Callable[[VersionRecord], Awaitable[Path]]
"""Brings a version's files into its folder and gives the folder; quick where they are there."""


class Builder(Protocol):
    """Makes the executor of a version that is no model in memory here."""

    async def __call__(self, record: VersionRecord, folder: Path, stats: ModelStats, /) -> Executor: ...


class VersionOpener:
    """``Opener`` of ``core/managed.py``; ``async with`` ends its threads.

    Args:
        place: see ``Place``.
        describe: reads a version's configuration from its folder; blocks.
        backends: where models run.
        builders: kind to what makes its executor, for kinds other than models.
        weigh: see ``Weigh``; None: nothing.
        threads: loads that go on at once.
        read_text: reads what makes a text encoder of a model; None: there are none.
    """

    def __init__(
        self,
        place: Place,
        describe: Callable[[VersionRecord, Path], Artifact],
        backends: Mapping[Isolation, Backend],
        builders: Mapping[Kind, Builder],
        *,
        weigh: Weigh | None = None,
        threads: int = 2,
        read_text: TextReader | None = None,
    ) -> None:
        self._read_text = read_text
        self._place = place
        self._describe = describe
        self._backends = backends
        self._builders = builders
        self._weigh = weigh
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"{LOADER_THREAD}-deployed")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A load under way cannot be stopped and is not waited for; its thread closes what it opens.
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def estimate(self, record: VersionRecord) -> int:
        if record.kind not in ("onnx", "language"):
            return 0 if record.footprint is None else record.footprint.peak_bytes
        weights = sum(file.size for file in record.files)
        if record.footprint is not None:
            return max(record.footprint.peak_bytes, int(weights * LOAD_RATIO))
        if self._weigh is not None:
            weights += await asyncio.to_thread(self._weigh, record, await self._place(record))
        tokenizers = [file.size for file in record.files if file.path.rpartition("/")[2] == _TOKENIZER_FILE]
        beside = sum(_TOKENIZER_BYTES + _TOKENIZER_RATIO * size for size in tokenizers)
        return int(weights * LOAD_RATIO) + (WORKER_BYTES if record.isolation == "worker" else 0) + beside

    async def open(self, record: VersionRecord, stats: ModelStats) -> Opened:
        folder = await self._place(record)
        builder = self._builders.get(record.kind)
        if builder is not None:
            executor = await builder(record, folder, stats)
            config = ModelConfig(platform=f"inferway_{record.kind}")
            return Opened(config, executor=executor, footprint=_footprint(executor))
        backend = self._backends.get(record.isolation)
        if backend is None or record.kind != "onnx":
            raise ModelLoadError(
                f"failed to load '{record.model}' version {record.version}: this gateway serves no {record.kind} "
                f"version with isolation '{record.isolation}'"
            )
        artifact = await asyncio.to_thread(self._describe, record, folder)
        work = self._threads.submit(backend.open, artifact)
        try:
            session = await asyncio.shield(asyncio.wrap_future(work))
        except asyncio.CancelledError:
            if not work.cancel():
                work.add_done_callback(_close_orphan)
            raise
        package = None
        if self._read_text is not None:
            try:
                package = await asyncio.to_thread(self._read_text, artifact, session.signature)
            except BaseException:
                await asyncio.shield(self.close(session))
                raise
        config = artifact.config if package is None else package.config
        footprint, beside = _footprint(session), None if package is None else _footprint(package.tokenizer)
        if footprint is not None and beside is not None:
            footprint += beside
        return Opened(config, session, footprint=footprint, text=package)

    async def close(self, session: Session) -> None:
        await asyncio.to_thread(session.close)


def _footprint(session: Session | Executor | TextTokenizer) -> Footprint | None:
    """What it takes of the memory; None where it has none, or the system does not tell."""
    measured: Callable[[], Footprint | None] | None = getattr(session, "footprint", None)
    return None if measured is None else measured()


def _close_orphan(work: Future[Session]) -> None:
    """Close what was opened for somebody who has gone."""
    if not work.cancelled() and work.exception() is None:
        work.result().close()
