"""A package to an engine, in whatever process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ...core.errors import ModelLoadError, ModelRejectedError
from ...core.model_config import GenerationOptions
from ..footprint import memory_of_machine
from ..onnx.admission import admit
from ..text.isolated import IsolatedTokenizer
from ..text.tokenizer import MarkingTokenizer, TokenizerError
from .constraints import Grammars
from .engine import Engine, EngineLimits
from .generator import Marking
from .orders import Report
from .package import Package, parse_object
from .runtime import Runtime
from .text import Vocabulary

_USUAL_TOKENS: Final = 16 * 1024
"""What the memory for keys and values is to hold where nobody says: sixteen answers of a thousand tokens each."""
_LEAST_TOKENS: Final = 1024
_MEMORY_SHARE: Final = 4


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine that is not started yet."""

    engine: Engine
    vocabulary: Vocabulary


def open_engine(
    package: Package,
    options: GenerationOptions,
    threads: int,
    emit: Callable[[Report], None],
    on_defect: Callable[[], None] = lambda: None,
) -> Opened:
    """Load a model. Blocks.

    Args:
        options: with ``kv_cache_bytes`` said.
        threads: inside one run.
        emit, on_defect: see ``Engine``.
    Raises:
        ModelLoadError: it cannot be loaded, or is none that the engine can run.
    """
    assert options.kv_cache_bytes is not None
    try:
        report = admit(package.model)
    except ModelRejectedError as error:
        raise ModelLoadError(error.message) from None
    vocabulary = read_vocabulary(package)
    runtime = Runtime(package, report, threads=threads)
    limits = EngineLimits(options.max_sequences, options.max_waiting, options.wait_s, options.kv_cache_bytes)
    grammars = Grammars(package.tokenizer, package.ends, package.vocabulary_size)
    grammars.prepare()
    engine = Engine(
        runtime, vocabulary, grammars, package.ends, limits, runtime.context_length, emit, on_defect=on_defect
    )
    return Opened(engine, vocabulary)


def usual_kv_bytes(token_bytes: int) -> int:
    """Memory for keys and values where no configuration says: ``_USUAL_TOKENS``, or a quarter of the machine's memory
    where that is less, but ``_LEAST_TOKENS`` at least."""
    most = memory_of_machine() // _MEMORY_SHARE
    return max(min(_USUAL_TOKENS * token_bytes, most), _LEAST_TOKENS * token_bytes)


def read_vocabulary(package: Package) -> Vocabulary:
    """Raises ``ModelLoadError``."""
    try:
        return Vocabulary.of(parse_object(package.tokenizer, "tokenizer.json"), package.vocabulary_size)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ModelLoadError(f"tokenizer.json has the wrong shape: {type(error).__name__}") from None


def read_tokenizer(package: Package) -> Marking:
    """What makes tokens of texts. Blocks. Raises ``ModelLoadError``."""
    try:
        return MarkingTokenizer(package.tokenizer.encode())
    except TokenizerError as error:
        raise ModelLoadError(str(error)) from None


def isolate_tokenizer(package: Package) -> tuple[IsolatedTokenizer, Vocabulary]:
    """The same in processes of its own, where the vocabulary is read too. Blocks. Raises ``ModelLoadError``."""
    try:
        tokenizer = IsolatedTokenizer(package.tokenizer.encode(), "generator", package.vocabulary_size)
        packed, names = tokenizer.packed
        return tokenizer, Vocabulary.unpacked(packed, package.vocabulary_size, names)
    except TokenizerError as error:
        raise ModelLoadError(str(error)) from None
    except ValueError:
        raise ModelLoadError("the process that read tokenizer.json gave no vocabulary") from None
