"""Opening language models."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...core.backend import Artifact
from ...core.catalog import Footprint
from ...core.errors import GatewayError, ModelLoadError, ModelRejectedError
from ...core.model_config import ModelConfig
from ...core.stats import ModelStats
from ..footprint import memory_of_machine
from ..onnx.admission import AdmissionReport, admit
from .constraints import Grammars
from .engine import Engine, EngineLimits
from .executor import LanguageExecutor
from .generator import Generator, on_loop
from .orders import Order, Report
from .package import Package, parse_object, read_package
from .runtime import Runtime
from .text import Vocabulary

_log = logging.getLogger(__name__)

_USUAL_TOKENS: Final = 16 * 1024
"""What the memory for keys and values is to hold where nobody says: sixteen answers of a thousand tokens each."""
_LEAST_TOKENS: Final = 1024
_MEMORY_SHARE: Final = 4


@dataclass(frozen=True, slots=True)
class Opened:
    """A package and its engine, which is not started yet."""

    engine: Engine
    vocabulary: Vocabulary
    kv_bytes: int


def admit_language(path: Path, files: Collection[str] | None = None) -> AdmissionReport:
    """Look at a language model's files without loading it. Blocks. Raises ``ModelRejectedError``."""
    from_folder = path if path.is_dir() else path.parent
    try:
        package = read_package(from_folder, ModelConfig().generation)
    except ModelLoadError as error:
        raise ModelRejectedError(error.message) from None
    return admit(package.model, files=files)


def open_engine(package: Package, config: ModelConfig, cpus: int, emit: Callable[[Report], None]) -> Opened:
    """Load a model. Blocks. Raises ``ModelLoadError``."""
    try:
        report = admit(package.model)
    except ModelRejectedError as error:
        raise ModelLoadError(error.message) from None
    vocabulary = read_vocabulary(package)
    threads = config.session.intra_op_threads or max(cpus // 2, 1)
    runtime = Runtime(package, report, threads=threads)
    options = config.generation
    token_bytes = runtime.layout.token_bytes
    kv_bytes = options.kv_cache_bytes or usual_kv_bytes(token_bytes)
    limits = EngineLimits(options.max_sequences, options.max_waiting, options.wait_s, kv_bytes)
    grammars = Grammars(package.tokenizer, package.ends, package.vocabulary_size)
    engine = Engine(runtime, vocabulary, grammars, package.ends, limits, package.context_length, emit)
    return Opened(engine, vocabulary, kv_bytes)


def usual_kv_bytes(token_bytes: int) -> int:
    """Memory for keys and values where no configuration says: ``_USUAL_TOKENS``, or a quarter of the machine's memory
    where that is less, but ``_LEAST_TOKENS`` at least."""
    most = memory_of_machine() // _MEMORY_SHARE
    return max(min(_USUAL_TOKENS * token_bytes, most), _LEAST_TOKENS * token_bytes)


def read_vocabulary(package: Package) -> Vocabulary:
    """Raises ``ModelLoadError``."""
    try:
        return Vocabulary(parse_object(package.tokenizer, "tokenizer.json"), package.vocabulary_size)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ModelLoadError(f"tokenizer.json has the wrong shape: {type(error).__name__}") from None


class LocalLink:
    """An engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def submit(self, order: Order) -> None:
        self._engine.submit(order)

    def cancel(self, number: int) -> None:
        self._engine.cancel(number)

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)


class LanguageBackend:
    """Opens language models.

    Args:
        cpus: processors that runs may use; None asks the system.
    """

    def __init__(self, cpus: int | None = None) -> None:
        self._cpus = cpus or len(os.sched_getaffinity(0))

    async def open(self, artifact: Artifact, stats: ModelStats, *, approved: bool = False) -> LanguageExecutor:
        """Open a model version.

        Args:
            artifact: its path is that of ``genai_config.json``.
            approved: the model's own chat template may be rendered.
        Raises:
            ModelLoadError: with what is wrong with it.
        """
        name, version, folder, config = artifact.name, artifact.version, artifact.path.parent, artifact.config
        loop = asyncio.get_running_loop()
        holder: list[Generator] = []

        def take(report: Report) -> None:
            holder[0].take(report)

        def load() -> tuple[Package, Opened]:
            package = read_package(folder, config.generation)
            return package, open_engine(package, config, self._cpus, on_loop(loop, take))

        try:
            package, opened = await asyncio.to_thread(load)
            generator = Generator(
                package,
                opened.vocabulary,
                context_length=opened.engine.context_length,
                kv_bytes=opened.kv_bytes,
                approved=approved,
                model_stats=stats,
            )
        except GatewayError as error:
            raise ModelLoadError(f"failed to load '{name}' version {version}: {error.message}") from None
        except OSError as error:
            reason = error.strerror or "the files cannot be read"
            raise ModelLoadError(f"failed to load '{name}' version {version}: {reason}") from None
        holder.append(generator)
        opened.engine.start()
        generator.connect(LocalLink(opened.engine))
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        return LanguageExecutor(generator, stats, Footprint(size, size + opened.kv_bytes))
