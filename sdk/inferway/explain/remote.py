"""Explaining a deployed model: what is asked for, and how the gateway is asked for it, by either client."""

# Handles' and engines' parts are used that are not for users.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from .._calls import metadata_call
from .._core import Call, model_path
from .._encoding import EmbeddingResult, classify_call, embeddings_call
from .._engine import AsyncEngine, SyncEngine
from .._errors import BadRequestError, ConfigurationError, InvalidInputError
from .._inference import InferenceResult, infer_call
from .._inputs import fit
from .._options import RequestOptions
from .._progress import counter
from .._signature import ModelMetadata
from .explainer import Ask, check, explain, shap_module
from .explanation import Explanation
from .players import MASK, Players, Words, players_of

Task: TypeAlias = Literal["classify", "embed"]

_FLOATING: Final = frozenset({"FP16", "BF16", "FP32", "FP64"})
_TEXTS: Final = 32
"""Texts in one request, at most: their vectors come back as one body."""


@dataclass(frozen=True)
class Question:
    """What a caller wants explained; arguments as of `Models.explain`."""

    model: str
    x: Any
    background: Any = None
    version: str | int | None = None
    output: str | None = None
    task: Task | None = None
    reference: Any = None
    feature_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    segments: Any = None
    mask: str = MASK
    permutations: int | None = None
    chunk_rows: int = 256
    concurrency: int = 8
    seed: int = 0
    progress: Callable[[int, int], object] | bool | None = None

    def checked(self) -> None:
        """Raises what is wrong with the question, before anything is sent."""
        if self.task not in (None, "classify", "embed"):
            raise ConfigurationError(f"task expects 'classify' or 'embed', got {self.task!r}")
        if self.permutations is not None:
            check("permutations", self.permutations, 1)
        check("chunk_rows", self.chunk_rows, 1)
        check("concurrency", self.concurrency, 1)
        check("seed", self.seed, 0)
        if self.seed >= 2**32:
            raise ConfigurationError(f"seed expects a number below 2^32, got {self.seed}")

    @property
    def text(self) -> str | None:
        """The text to explain, where it is one."""
        x = self.x
        if isinstance(x, list | tuple) and len(x) == 1 and isinstance(x[0], str):
            x = x[0]
        return x if isinstance(x, str) else None


class ExplainOptions(RequestOptions, total=False):
    """What `Models.explain` takes by name, for a model's handle."""

    output: str | None
    task: Task | None
    reference: object
    feature_names: Sequence[str] | None
    output_names: Sequence[str] | None
    segments: object
    mask: str
    permutations: int | None
    chunk_rows: int
    concurrency: int
    seed: int
    progress: Callable[[int, int], object] | bool | None


def question_of(
    model: str, version: str | int | None, x: object, background: object, arguments: ExplainOptions
) -> tuple[Question, RequestOptions]:
    """What a handle was asked, and the options of its requests."""
    own: dict[str, Any] = {**arguments}
    options = {name: own.pop(name) for name in RequestOptions.__annotations__ if name in own}
    question = Question(model=model, x=x, background=background, version=version, **own)
    return question, cast(RequestOptions, options)


@dataclass
class Route:
    """How the model is asked with inputs, and what of its answers is the prediction."""

    call: Callable[[Any], Call[Any]]
    read: Callable[[Any], NDArray[Any]]
    players: Players
    output: str
    chunk_rows: int
    output_names: Sequence[str] | None


Send: TypeAlias = "Callable[[Call[Any]], Any]"
"""Sends one call and waits for its answer."""


def explain_remote(question: Question, send: Send, ask_all: Callable[[Route], Ask]) -> Explanation:
    """Answer a question in this thread.

    Raises:
        MissingExtraError: shap is not installed.
        InvalidInputError: ``x`` or ``background`` do not fit the model.
        ConfigurationError: an argument cannot be used.
        APIError: the model could not be asked.
    """
    question.checked()
    shap_module()
    route = _text_route(question, send) if question.text is not None else _tensor_route(question, send)
    tell, close = counter(question.progress, "explaining")
    try:
        return explain(
            route.players,
            ask_all(route),
            model=question.model,
            output=route.output,
            permutations=question.permutations,
            chunk_rows=route.chunk_rows,
            seed=question.seed,
            output_names=route.output_names,
            tell=tell,
        )
    finally:
        close()


def explain_sync(question: Question, engine: SyncEngine, options: RequestOptions) -> Explanation:
    """What ``Models.explain`` does."""
    with ThreadPoolExecutor(max(1, question.concurrency), thread_name_prefix="inferway-explain") as pool:

        def send(call: Call[Any]) -> Any:
            return engine.send(call, options)

        def ask_all(route: Route) -> Ask:
            def one(inputs: Any) -> NDArray[Any]:
                return route.read(send(route.call(inputs)))

            def ask(chunks: Sequence[Any]) -> list[NDArray[Any]]:
                begun = [pool.submit(contextvars.copy_context().run, one, chunk) for chunk in chunks]
                try:
                    return [future.result() for future in begun]
                finally:
                    for future in begun:
                        future.cancel()

            return ask

        return explain_remote(question, send, ask_all)


async def explain_async(question: Question, engine: AsyncEngine, options: RequestOptions) -> Explanation:
    """What ``AsyncModels.explain`` does: the sampling in a thread, the requests on this loop."""
    loop = asyncio.get_running_loop()
    left = False
    begin = threading.Lock()
    begun: list[Future[Any]] = []
    limit = asyncio.Semaphore(max(1, question.concurrency))

    def wait_for(work: Coroutine[Any, Any, Any]) -> Any:
        with begin:
            if left:
                work.close()
                raise CancelledError
            running = asyncio.run_coroutine_threadsafe(work, loop)
            begun[:] = [running]
        return running.result()

    async def send_async(call: Call[Any]) -> Any:
        async with limit:
            return await engine.send(call, options)

    def send(call: Call[Any]) -> Any:
        return wait_for(send_async(call))

    def ask_all(route: Route) -> Ask:
        async def all_of(chunks: Sequence[Any]) -> list[NDArray[Any]]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(send_async(route.call(chunk))) for chunk in chunks]
            return [route.read(task.result()) for task in tasks]

        def ask(chunks: Sequence[Any]) -> list[NDArray[Any]]:
            try:
                answers: list[NDArray[Any]] = wait_for(all_of(chunks))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
            return answers

        return ask

    try:
        return await asyncio.to_thread(explain_remote, question, send, ask_all)
    finally:
        # Whoever stops waiting stops the thread too, at its next request at the latest.
        with begin:
            left = True
        for running in begun:
            running.cancel()


# --- models that take tensors -------------------------------------------------------------------------------------


def _tensor_route(question: Question, send: Send) -> Route:
    if question.task is not None:
        raise ConfigurationError(f"task is for a text; x is {type(question.x).__name__}")
    metadata: ModelMetadata = send(metadata_call(question.model, question.version))
    output = _output(metadata, question.output)
    players = players_of(metadata, question.x, question.background, question.feature_names, question.segments)
    model, version = question.model, question.version
    if version is None:
        # One version is explained, even where another becomes the default meanwhile.
        first = _infer(metadata, model, None, output, players.inputs(players.rows[:1], 0))
        result: InferenceResult = send(first)
        if result.model_version:
            model, version = question.model.partition("@")[0], result.model_version
    batch = metadata.inputs[0].shape[0] if metadata.inputs[0].shape else 1
    chunk = question.chunk_rows if batch < 0 else min(question.chunk_rows, batch)

    def call(inputs: Any) -> Call[InferenceResult]:
        return _infer(metadata, model, version, output, inputs)

    def read(result: InferenceResult) -> NDArray[Any]:
        return _prediction(np.asarray(result.outputs[output]), output)

    return Route(call, read, players, output, chunk, question.output_names)


def _infer(
    metadata: ModelMetadata, model: str, version: str | int | None, output: str, inputs: Any
) -> Call[InferenceResult]:
    path = model_path(model, version, "infer")
    return infer_call(
        path, metadata, fit(metadata, inputs), outputs=[output], id=None, parameters=None, priority=None, binary=True
    )


def _output(metadata: ModelMetadata, wanted: str | None) -> str:
    named = {spec.name: spec for spec in metadata.outputs}
    if wanted is not None and wanted not in named:
        raise ConfigurationError(f"output expects one of {', '.join(named)}, got {wanted!r}")
    numbers = [name for name, spec in named.items() if spec.datatype in _FLOATING]
    if wanted is not None:
        if wanted not in numbers:
            raise ConfigurationError(f"output expects a floating point one; {wanted} is {named[wanted].datatype}")
        return wanted
    if len(numbers) != 1:
        raise ConfigurationError(
            f"output expects the name of what is explained, one of {', '.join(numbers)}"
            if numbers
            else f"the model gives no floating point output: {', '.join(map(str, metadata.outputs))}"
        )
    return numbers[0]


def _prediction(values: NDArray[Any], output: str) -> NDArray[Any]:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim not in (1, 2):
        raise ConfigurationError(
            f"{output} expects one number or one row of numbers for each input, got shape {values.shape}"
        )
    return values


# --- models that take texts ---------------------------------------------------------------------------------------


def _text_route(question: Question, send: Send) -> Route:
    text = question.text
    assert text is not None
    if question.background is not None or question.segments is not None:
        raise ConfigurationError("background and segments are for tensors; what stands for a missing word is `mask`")
    if question.version is not None:
        raise ConfigurationError("version is for tensors; say NAME@ALIAS")
    players = Words(text, question.mask)
    if not players.names:
        raise InvalidInputError("x expects a text with words in it")
    chunk = min(question.chunk_rows, _TEXTS)
    if question.task == "classify" and question.reference is not None:
        raise ConfigurationError("reference is for task='embed'")
    if question.task != "embed" and question.reference is None:
        try:
            return _classify_route(question, send, players, chunk)
        except BadRequestError as error:
            # What the model is for is known to the gateway alone; it says so of this member.
            if question.task is not None or error.param != "model":
                raise
    return _embed_route(question, send, players, chunk)


def _classify_route(question: Question, send: Send, players: Words, chunk: int) -> Route:
    labels = list(send(classify_call([players.text], question.model, None)).results[0].scores)
    labels.sort()

    def call(texts: Any) -> Call[Any]:
        return classify_call(texts, question.model, None)

    def read(result: Any) -> NDArray[Any]:
        return np.array([[found.scores[label] for label in labels] for found in result.results], np.float64)

    return Route(call, read, players, "score of", chunk, labels)


def _embed_route(question: Question, send: Send, players: Words, chunk: int) -> Route:
    def call(texts: Any) -> Call[EmbeddingResult]:
        return embeddings_call(texts, question.model, dimensions=None, input_type=None, user=None)

    if question.reference is None or isinstance(question.reference, str):
        wanted = players.text if question.reference is None else question.reference
        reference = np.asarray(send(call([wanted])).vectors[0], np.float64)
    else:
        reference = np.asarray(question.reference, np.float64)
        if reference.ndim != 1:
            raise ConfigurationError(f"reference expects a text or one vector, got shape {reference.shape}")
    length = float(np.linalg.norm(reference))
    if not length:
        raise ConfigurationError("reference expects a vector that is not zero")

    def read(result: EmbeddingResult) -> NDArray[Any]:
        vectors = np.asarray(result.vectors, np.float64)
        if vectors.shape[1] != len(reference):
            raise ConfigurationError(f"reference expects {vectors.shape[1]} numbers, got {len(reference)}")
        similarity: NDArray[Any] = vectors @ reference / (np.linalg.norm(vectors, axis=1) * length)
        return similarity

    return Route(call, read, players, "similarity", chunk, None)


__all__ = ["MASK", "ExplainOptions", "Explanation", "Question", "explain_async", "explain_sync", "question_of"]
