"""Opening language models, in this process or in one of their own."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Final

from ...core.backend import Artifact
from ...core.catalog import Footprint
from ...core.errors import GatewayError, ModelLoadError, ModelRejectedError, ShuttingDownError
from ...core.model_config import GenerationOptions, ModelConfig
from ...core.stats import ModelStats
from ..onnx import memory
from ..onnx.admission import AdmissionReport, admit
from ..worker.forks import ForkServer
from .engine import Engine
from .executor import LanguageExecutor
from .generator import Generator, on_loop
from .opening import isolate_tokenizer, open_engine, read_tokenizer, usual_kv_bytes
from .orders import Order, Report
from .package import Package, read_package
from .process import Plan, ProcessLink

_log = logging.getLogger(__name__)

_WIDEST: Final = 4
"""Bytes of a number in keys and values."""
_LOAD_FLOOR_BYTES: Final = 3 << 30
_LOAD_RATIO: Final = 6

OnEvent = Callable[[str, Artifact, str], None]


def admit_language(path: Path, files: Collection[str] | None = None) -> AdmissionReport:
    """Look at a language model's files without loading it. Blocks.

    Args:
        path: of ``genai_config.json``.
    Raises:
        ModelRejectedError: a file cannot be read, or asks for what no engine does.
    """
    try:
        package = read_package(path.parent, ModelConfig().generation)
    except ModelLoadError as error:
        raise ModelRejectedError(error.message) from None
    return admit(package.model, files=files)


def _nothing(kind: str, artifact: Artifact, detail: str) -> None:
    """Nobody wants to hear of events."""


class LocalLink:
    """An engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine

    def problem(self) -> str | None:
        return "its engine has failed" if self._engine is not None and self._engine.broken else None

    def submit(self, order: Order) -> None:
        if self._engine is None:
            raise ShuttingDownError("the model is being unloaded")
        self._engine.submit(order)

    def cancel(self, number: int) -> None:
        if self._engine is not None:
            self._engine.cancel(number)

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.close)
            # The last one who knows it: with it go the session, and the memory of keys and values.
            del engine
            await asyncio.to_thread(memory.trim)


class LanguageBackend:
    """Opens language models.

    Args:
        cpus: processors that runs may use; None asks the system.
        forks: starts the processes of models with the isolation ``worker``; None: there are none.
        on_event: told when such a process dies, and of its breaker.
        load_timeout_s: for opening a model in one.
        breaker_failures: see ``worker.breaker.Breaker``.
    """

    def __init__(
        self,
        cpus: int | None = None,
        forks: ForkServer | None = None,
        *,
        on_event: OnEvent = _nothing,
        load_timeout_s: float = 300.0,
        breaker_failures: int = 3,
        confine: bool = True,
    ) -> None:
        self._cpus = cpus or len(os.sched_getaffinity(0))
        self._forks = forks
        self.on_event = on_event
        self._load_timeout_s = load_timeout_s
        self._breaker_failures = breaker_failures
        self._confine = confine

    async def open(self, artifact: Artifact, stats: ModelStats, *, approved: bool = False) -> LanguageExecutor:
        """Open a model version.

        Args:
            artifact: its path is that of ``genai_config.json``.
            approved: the model's own chat template may be rendered.
        Raises:
            ModelLoadError: with what is wrong with it.
        """
        try:
            return await self._open(artifact, stats, approved)
        except GatewayError as error:
            reason = error.message
        except OSError as error:
            reason = error.strerror or "the files cannot be read"
        raise ModelLoadError(f"failed to load '{artifact.name}' version {artifact.version}: {reason}")

    async def _open(self, artifact: Artifact, stats: ModelStats, approved: bool) -> LanguageExecutor:
        config, folder = artifact.config, artifact.path.parent
        package = await asyncio.to_thread(read_package, folder, config.generation)
        token_bytes = _token_bytes(package)
        options = config.generation
        kv_bytes = await asyncio.to_thread(_kv_bytes, package, options)
        options = replace(options, kv_cache_bytes=kv_bytes)
        approved = approved or options.template is not None  # which is the gateway's own
        threads = config.session.intra_op_threads or max(self._cpus // 2, 1)
        size = await asyncio.to_thread(_size, folder)
        if config.isolation != "worker":
            return await self._open_here(package, replace(config, generation=options), threads, size, stats, approved)
        if self._forks is None:
            raise ModelLoadError("there are no worker processes here")
        slots = options.max_sequences * min(package.context_length * token_bytes, kv_bytes)
        title = f"inferway language {artifact.name}/{artifact.version}"
        space = _LOAD_FLOOR_BYTES + _LOAD_RATIO * size + slots + 2 * kv_bytes
        plan = Plan(title, folder, options, threads, space, self._load_timeout_s, self._confine, self._breaker_failures)

        def happened(kind: str, detail: str) -> None:
            self.on_event(kind, artifact, detail)

        tokenizer, vocabulary = await asyncio.to_thread(isolate_tokenizer, package)
        link = ProcessLink(self._forks, plan, happened)
        context_length, footprint = await link.open()
        try:
            generator = Generator(
                package,
                vocabulary,
                tokenizer,
                isolated=True,
                context_length=min(context_length, package.context_length),
                kv_bytes=kv_bytes,
                approved=approved,
                model_stats=stats,
            )
        except BaseException:
            await asyncio.shield(link.close())
            raise
        generator.connect(link)
        link.attend(generator)
        beside = tokenizer.footprint()
        if footprint is not None and beside is not None:
            footprint += beside
        return LanguageExecutor(generator, stats, footprint, workers=link)

    async def _open_here(
        self, package: Package, config: ModelConfig, threads: int, size: int, stats: ModelStats, approved: bool
    ) -> LanguageExecutor:
        loop = asyncio.get_running_loop()
        holder: list[Generator] = []

        def take(report: Report) -> None:
            holder[0].take(report)

        emit = on_loop(loop, take)
        tokenizer = await asyncio.to_thread(read_tokenizer, package)
        opened = await asyncio.to_thread(open_engine, package, config.generation, threads, emit)
        kv_bytes = config.generation.kv_cache_bytes or 0
        generator = Generator(
            package,
            opened.vocabulary,
            tokenizer,
            context_length=opened.engine.context_length,
            kv_bytes=kv_bytes,
            approved=approved,
            model_stats=stats,
        )
        holder.append(generator)
        opened.engine.start()
        generator.connect(LocalLink(opened.engine))
        return LanguageExecutor(generator, stats, Footprint(size, size + kv_bytes))


def weigh_language(artifact: Artifact) -> int:
    """Bytes of memory that a language model takes beyond what its files do: keys and values. Blocks.

    Args:
        artifact: its path is that of ``genai_config.json``.
    Raises:
        ModelLoadError: a file cannot be read.
    """
    return _kv_bytes(read_package(artifact.path.parent, artifact.config.generation), artifact.config.generation)


def _token_bytes(package: Package) -> int:
    return 2 * package.layers * package.kv_heads * package.head_size * _WIDEST


def _kv_bytes(package: Package, options: GenerationOptions) -> int:
    """What keys and values may take, said or usual."""
    return usual_kv_bytes(_token_bytes(package)) if options.kv_cache_bytes is None else options.kv_cache_bytes


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
