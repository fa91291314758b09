"""Text encoders: texts to rows of token ids, rows to one model's batcher, and its outputs to vectors and scores.

A text becomes token ids on a thread, together with all the other texts that came in the meantime (``_Lane``). Each
becomes a row of its own length, which waits in the model version's batcher beside the rows of all other requests. There
the batch is formed: rows of about the same length run together, because the batcher pads along the sequence and holds
the waste against what company saves. So nothing here decides about batches, but for rows of one request that have the
same length to the token: these go as one part, up to ``_PART_ROWS``, which saves the queue some work. A request of many
texts has no more than ``_PARTS_AT_ONCE`` parts in the queue, so that it does not fill it up.

Pooling is over a row's own tokens, since the batcher cuts outputs back to each row's length: there is no mask to get
wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .backend import Artifact
from .batcher import Asker, Batcher, InferenceRequest
from .batching import pieces
from .errors import ContextLengthError, DeadlineExceededError, InvalidParameterError, ModelExecutionError
from .execution import Executor
from .generation import LongText, Ranking
from .model_config import ModelConfig
from .tensors import DTYPES, Signature

Task = Literal["embeddings", "classify", "rerank"]
Pooling = Literal["mean", "cls", "last", "max", "none"]
Activation = Literal["softmax", "sigmoid", "none"]
Vectors = NDArray[Any]
"""FP32, one row for each text."""
Text = str | Sequence[int]
"""A text, or its token ids, with or without the special ones around it."""

MAX_TEXT_CHARACTERS: Final = 1_000_000
"""Of one text: a tokenizer takes about 0.3 µs for each, and some 300 bytes of memory until it is done."""
_LANE_CHARACTERS: Final = 1_000_000
"""Of the texts that are encoded at once."""
_LONG_CHARACTERS: Final = 20_000
"""Longer texts have a thread of their own, so that short ones do not wait behind them."""
_PART_ROWS: Final = 8
_PARTS_AT_ONCE: Final = 32
_BREATH: Final = 64
"""Texts of one request, after which the loop looks at what else there is to do."""
_UNIT: Final = 1e-3
"""A vector whose length differs from 1 by less was normalised by the graph, and is again after it was cut."""


@dataclass(frozen=True, slots=True)
class Template:
    """The special tokens around a text, or around two."""

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    types: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    """Segment numbers of: before, first text, between, second text, after."""

    @property
    def tokens(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


class TextTokenizer(Protocol):
    """Texts to token ids, without special tokens. Thread-safe; does not change."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        ...

    @property
    def single(self) -> Template: ...

    @property
    def pair(self) -> Template | None:
        """None where the tokenizer has no form for two texts."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Blocks, and gives the interpreter's lock back meanwhile. Raises ``ModelExecutionError``."""
        ...


@dataclass(frozen=True, slots=True)
class TextSpec:
    """What a text encoder's graph is given and gives, and what is made of that.

    Attributes:
        ids, mask, types, positions: names of the inputs; None where there is no such input. With a graph that takes
            texts themselves ``ids`` names the input of type BYTES, and the rest is None.
        output, width: the output that is read, and how long its last axis is; 0 where that varies.
        length: of the sequence axis where it is fixed, else 0.
        dimensions: lengths to which a vector may be cut; "any" for each; empty for none.
        labels: as many as ``width``, for the task classify.
    """

    task: Task
    ids: str
    output: str
    width: int = 0
    mask: str | None = None
    types: str | None = None
    positions: str | None = None
    length: int = 0
    pooling: Pooling = "none"
    normalise: bool = False
    max_tokens: int = 0
    long_text: LongText = "error"
    dimensions: tuple[int, ...] | Literal["any"] = ()
    labels: tuple[str, ...] = ()
    activation: Activation = "none"
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class TextPackage:
    """What was read of the files beside a graph.

    Attributes:
        config: the model's, with the padding that lets rows of different lengths share runs.
    """

    spec: TextSpec
    tokenizer: TextTokenizer
    config: ModelConfig


class TextReader(Protocol):
    """Reads the files beside a graph."""

    def __call__(self, artifact: Artifact, signature: Signature, /) -> TextPackage | None:
        """Blocks. None: the model is no text encoder. Raises ``ModelLoadError``: it was to be one and cannot be."""
        ...


@dataclass(slots=True)
class TextStats:
    """What is counted of one text encoder. Written on the event loop.

    Attributes:
        tokens: that the model read, special ones among them, padding not.
        truncated: texts whose end was cut off; chunked: texts that were read in several parts.
    """

    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    chunked: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row of numbers for each text, in the texts' order: vectors, or the scores of the labels."""

    values: Vectors
    tokens: int


@dataclass(frozen=True, slots=True)
class Call:
    """What all runs for one request have in common; as ``InferenceRequest`` has it."""

    deadline: float | None = None
    origin: tuple[tuple[str, str], ...] = ()
    asker: Asker | None = None


@dataclass(slots=True, eq=False)
class _Row:
    """One sequence that the model reads."""

    text: int
    ids: NDArray[np.int64]
    types: NDArray[np.int64] | None = None
    weight: int = 1


class TextEncoder:
    """A loaded text encoder. Lives on the event loop.

    Args:
        executor: answers the rows; shared with requests that bring tensors.
        spec: fits ``executor.signature``.
        tokenizer: None where the graph takes texts themselves.
    """

    def __init__(self, executor: Executor, spec: TextSpec, tokenizer: TextTokenizer | None) -> None:
        self._executor = executor
        self._tokenizer = tokenizer
        self.spec: Final = spec
        self.stats: Final = TextStats()
        self._short = _Lane(tokenizer) if tokenizer is not None else None
        self._long = _Lane(tokenizer) if tokenizer is not None else None
        self._dtypes = {s.name: DTYPES[s.datatype] for s in executor.signature.inputs}
        rank = next((len(s.shape) for s in executor.signature.inputs if s.name == spec.ids), 1)
        self._column = rank == 2
        most = executor.signature.max_rows
        self._part_rows = min(most, _PART_ROWS) if most else _PART_ROWS
        if isinstance(executor, Batcher) and not executor.batching:
            self._part_rows = 1  # rows depend on their mates, those of the same request too

    @property
    def task(self) -> Task:
        return self.spec.task

    @property
    def context_length(self) -> int | None:
        """Tokens of one text, special ones counted; None where nobody knows."""
        return self.spec.max_tokens or None

    @property
    def vocabulary_size(self) -> int | None:
        """None where nobody knows, for the graph takes texts themselves."""
        return None if self._tokenizer is None else self._tokenizer.vocabulary

    async def embed(
        self,
        inputs: Sequence[Text],
        *,
        dimensions: int | None = None,
        kind: str | None = None,
        call: Call = Call(),
        param: Callable[[int], str] = lambda index: f"input[{index}]",
    ) -> Encoded:
        """A vector for each text.

        Args:
            dimensions: cut vectors to so many numbers.
            kind: of input, such as ``query``: chooses among the model's prompts.
            call: its deadline is a moment on the loop's clock.
            param: names the field of the request that an input came from.
        Raises:
            InvalidParameterError: the model gives no vectors, or an argument is out of its range.
            ContextLengthError: a text is longer than the model takes, and its policy is to say so.
            GatewayError: what ``Executor.infer`` raises.
        """
        if self.spec.task != "embeddings":
            raise InvalidParameterError(f"expected a model for embeddings, this one is for {_USE[self.spec.task]}",
                                           "model")  # fmt: skip
        self._check_dimensions(dimensions)
        prompt = self._prompt(kind)
        texts = [prompt + text if prompt and isinstance(text, str) else text for text in inputs]
        vectors, tokens = await self._embed(texts, call, param)
        if dimensions is not None and dimensions < vectors.shape[1]:
            unit = self.spec.normalise or _are_unit(vectors)
            vectors = np.ascontiguousarray(vectors[:, :dimensions])
            if unit:
                vectors = _normalised(vectors)
        return Encoded(vectors, tokens)

    async def classify(
        self,
        inputs: Sequence[Text],
        *,
        activation: Activation | None = None,
        call: Call = Call(),
        param: Callable[[int], str] = lambda index: f"input[{index}]",
    ) -> Encoded:
        """A score for each label, FP32 [n, labels]. Errors as ``embed``."""
        if self.spec.task != "classify":
            raise InvalidParameterError(
                f"expected a model that classifies, this one is for {_USE[self.spec.task]}", "model"
            )
        rows = await self._rows(inputs, call.deadline, param)
        logits, tokens = await self._run(rows, len(inputs), call)
        return Encoded(activated(logits, activation or self.spec.activation), tokens)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        call: Call = Call(),
    ) -> Ranking:
        """How well each document answers the query. Errors as ``embed``."""
        if self.spec.task == "classify":
            raise InvalidParameterError("expected a model that ranks or embeds, this one classifies", "model")
        if self.spec.task == "embeddings":
            texts = [self._prompt("query", wanted=False) + query]
            texts += [self._prompt("document", wanted=False) + text for text in documents]
            vectors, tokens = await self._embed(texts, call, _rerank_field)
            unit = _normalised(vectors)
            return Ranking(tuple((unit[1:] @ unit[0]).tolist()), tokens, "embedding")
        rows = await self._pairs(query, documents, call.deadline)
        logits, tokens = await self._run(rows, len(documents), call)
        if logits.shape[1] > 1:
            scores = activated(logits, "softmax")[:, -1]
        else:
            scores = activated(logits, self.spec.activation)[:, 0]
        return Ranking(tuple(scores.tolist()), tokens, "cross-encoder")

    def _check_dimensions(self, wanted: int | None) -> None:
        allowed, width = self.spec.dimensions, self.spec.width
        if wanted is None or wanted == width or (not allowed and wanted < 1):
            return
        if not allowed:
            raise InvalidParameterError(
                f"expected no 'dimensions'{f', or {width}' if width else ''}: the model's vectors cannot be cut, got "
                f"{wanted}",
                "dimensions",
            )
        if allowed == "any" and wanted >= 1 and (not width or wanted <= width):
            return
        if allowed == "any" or wanted not in allowed:
            range_ = f"1 to {width}" if allowed == "any" else f"one of {', '.join(map(str, allowed))}"
            raise InvalidParameterError(f"expected 'dimensions' to be {range_}, got {wanted}", "dimensions")

    def _prompt(self, kind: str | None, *, wanted: bool = True) -> str:
        prompts = self.spec.prompts
        if kind is None:
            return prompts.get(self.spec.default_prompt, "") if self.spec.default_prompt is not None else ""
        found = next((prompts[name] for name in (kind, *_SYNONYMS.get(kind, ())) if name in prompts), None)
        if found is None and wanted and prompts and kind not in _SYNONYMS:
            raise InvalidParameterError(
                f"expected 'input_type' to be one of {', '.join(sorted(prompts))}, got '{kind[:40]}'", "input_type"
            )
        return found or ""

    async def _embed(self, texts: Sequence[Text], call: Call, param: Callable[[int], str]) -> tuple[Vectors, int]:
        rows = await self._rows(texts, call.deadline, param)
        vectors, tokens = await self._run(rows, len(texts), call)
        return (_normalised(vectors) if self.spec.normalise else vectors), tokens

    # -- texts to rows ------------------------------------------------------------------------------------------------

    async def _rows(self, inputs: Sequence[Text], deadline: float | None, param: Callable[[int], str]) -> list[_Row]:
        for index, text in enumerate(inputs):
            if not len(text):
                raise InvalidParameterError(f"expected '{param(index)}' not to be empty", param(index))
            _check_length(text, param(index))
        if self._tokenizer is None:
            return self._plain(inputs, param)
        spec, template, vocabulary = self.spec, self._tokenizer.single, self._tokenizer.vocabulary
        found = iter(await self._encode([text for text in inputs if isinstance(text, str)], deadline))
        rows: list[_Row] = []
        most = spec.max_tokens - template.tokens
        for index, text in enumerate(inputs):
            ids = next(found) if isinstance(text, str) else _unwrapped(text, template)
            # Looked at before it becomes an array: a megabyte that is refused costs the loop nothing.
            parts = [ids] if len(ids) <= most else self._shorten(ids, most, template.tokens, param(index))
            for piece in parts:
                if not isinstance(text, str):
                    _check_range(piece, vocabulary, param(index))
                rows.append(self._row(index, piece, template))
            if not rows[-1].ids.size:
                raise InvalidParameterError(f"expected '{param(index)}' to have tokens, it has none", param(index))
            if index % _BREATH == _BREATH - 1:
                await asyncio.sleep(0)
        self.stats.texts += len(inputs)
        return rows

    def _plain(self, inputs: Sequence[Text], param: Callable[[int], str]) -> list[_Row]:
        for index, text in enumerate(inputs):
            if not isinstance(text, str):
                raise InvalidParameterError(
                    f"expected '{param(index)}' to be a text: the model reads texts, not token ids", param(index)
                )
        self.stats.texts += len(inputs)
        return [_Row(index, np.asarray([text], object)) for index, text in enumerate(inputs)]

    def _shorten(self, ids: Sequence[int], most: int, around: int, param: str) -> list[Sequence[int]]:
        policy = self.spec.long_text
        if policy == "error":
            raise ContextLengthError(
                f"expected at most {self.spec.max_tokens} tokens in '{param}', got {len(ids) + around}", param
            )
        if policy == "truncate":
            self.stats.truncated += 1
            return [ids[:most]]
        self.stats.chunked += 1
        # Parts as equal as can be: a last one of two tokens would say little and cost a run of its own length.
        return [ids[start:end] for start, end in pieces(len(ids), most)]

    def _row(self, index: int, ids: Sequence[int], template: Template) -> _Row:
        whole = np.asarray((*template.before, *ids, *template.after), np.int64)
        types = None
        if any(template.types):
            first, text, _, _, last = template.types
            types = np.repeat([first, text, last], [len(template.before), len(ids), len(template.after)])
        return _Row(index, whole, types, weight=max(1, len(ids)))

    async def _pairs(self, query: str, documents: Sequence[str], deadline: float | None) -> list[_Row]:
        for index, text in enumerate((query, *documents)):
            if not text:
                name = _rerank_field(index)
                raise InvalidParameterError(f"expected '{name}' not to be empty", name)
            _check_length(text, _rerank_field(index))
        template = None if self._tokenizer is None else self._tokenizer.pair
        assert template is not None  # the package was held against it
        first, *rest = await self._encode([query, *documents], deadline)
        most = self.spec.max_tokens - template.tokens
        if len(first) >= most:
            raise ContextLengthError(
                f"expected fewer than {most} tokens in 'query', so that there is room for a document, got {len(first)}",
                "query",
            )
        rows = []
        for index, ids in enumerate(rest):
            if len(first) + len(ids) > most:
                if self.spec.long_text == "error":
                    raise ContextLengthError(
                        f"expected at most {most - len(first)} tokens in 'documents[{index}]' beside those of 'query', "
                        f"got {len(ids)}",
                        f"documents[{index}]",
                    )
                self.stats.truncated += 1
                ids = ids[: most - len(first)]
            parts: list[Sequence[int]] = [template.before, first, template.between, ids, template.after]
            whole = np.concatenate([np.asarray(part, np.int64) for part in parts])
            rows.append(_Row(index, whole, np.repeat(template.types, [len(part) for part in parts])))
        self.stats.texts += len(documents)
        return rows

    async def _encode(self, texts: list[str], deadline: float | None) -> list[list[int]]:
        if not texts:
            return []
        characters = sum(map(len, texts))
        lane = self._long if characters > _LONG_CHARACTERS else self._short
        assert lane is not None  # there is a tokenizer
        work = lane.encode(texts, characters)
        if deadline is None:
            return await work
        try:
            async with asyncio.timeout_at(deadline):
                return await work
        except TimeoutError:
            raise DeadlineExceededError("the deadline passed before the text was cut into tokens") from None

    # -- rows to the model --------------------------------------------------------------------------------------------

    async def _run(self, rows: list[_Row], texts: int, call: Call) -> tuple[Vectors, int]:
        """Run the rows; several of one text become their mean, weighted."""
        plain = self._tokenizer is None
        tokens = 0 if plain else sum(row.ids.size for row in rows)
        self.stats.tokens += tokens
        if len(rows) == 1:  # as most requests are: nothing to put together
            (vector,) = await self._run_part(rows, call)
            return self._checked(vector[None]), tokens
        order = sorted(rows, key=lambda row: row.ids.size, reverse=True)
        parts: list[list[_Row]] = []
        for row in order:
            last = parts[-1] if parts else []
            if last and len(last) < self._part_rows and last[0].ids.size == row.ids.size:
                last.append(row)
            else:
                parts.append([row])
        results: dict[int, Vectors] = {}

        async def run(part: list[_Row]) -> None:
            for row, vector in zip(part, await self._run_part(part, call), strict=True):
                results[id(row)] = vector

        await _limited([partial(run, part) for part in parts], _PARTS_AT_ONCE)
        if len(rows) == texts:
            values = np.stack([results[id(row)] for row in rows])
        else:
            sums: list[Any] = [0.0] * texts
            weights = [0] * texts
            for row in rows:
                sums[row.text] = sums[row.text] + results[id(row)] * np.float32(row.weight)
                weights[row.text] += row.weight
            values = np.stack(sums) / np.asarray(weights, np.float32)[:, None]
        return self._checked(values), tokens

    def _checked(self, values: Vectors) -> Vectors:
        if not np.isfinite(values).all():
            raise ModelExecutionError("the model's output has values that are not numbers")
        return values.astype(np.float32, copy=False)

    async def _run_part(self, part: list[_Row], call: Call) -> Sequence[Vectors]:
        inputs = self._inputs(part)
        request = InferenceRequest(
            inputs,
            (self.spec.output,),
            len(part) if self._executor.signature.batched else 1,
            sum(array.nbytes for array in inputs.values()),
            deadline=call.deadline,
            origin=call.origin,
            asker=call.asker,
        )
        executor = self._executor
        answer = executor.run_inline(request)
        if answer is None:
            answer = await executor.infer(request)
        output = answer.outputs[0]
        expected = 2 if self.spec.pooling == "none" else 3
        if output.ndim != expected or len(output) != len(part):
            raise ModelExecutionError(
                f"output '{self.spec.output}' was to have {len(part)} rows and {expected} dimensions, its shape is "
                f"{list(output.shape)}"
            )
        values = output.astype(np.float32, copy=False)
        if self.spec.pooling == "none":
            return list(values)
        return [_pooled(values[i, : row.ids.size], self.spec.pooling) for i, row in enumerate(part)]

    def _inputs(self, part: list[_Row]) -> dict[str, NDArray[Any]]:
        spec = self.spec
        if self._tokenizer is None:
            texts = np.concatenate([row.ids for row in part])
            return {spec.ids: texts.reshape(-1, 1) if self._column else texts}
        own = part[0].ids.size
        shape = (len(part), max(spec.length, own))
        if shape == (1, own):
            ids = part[0].ids[None]
        else:
            ids = np.zeros(shape, np.int64)
            ids[:, :own] = [row.ids for row in part]
        inputs = {spec.ids: ids}
        if spec.mask is not None:
            inputs[spec.mask] = np.zeros(shape, np.int64)
            inputs[spec.mask][:, :own] = 1
        if spec.types is not None:
            inputs[spec.types] = np.zeros(shape, np.int64)
            for i, row in enumerate(part):
                if row.types is not None:
                    inputs[spec.types][i, :own] = row.types
        if spec.positions is not None:
            inputs[spec.positions] = np.broadcast_to(np.arange(shape[1]), shape)
        return {name: np.ascontiguousarray(array, self._dtypes[name]) for name, array in inputs.items()}


_USE: Final[Mapping[Task, str]] = {
    "embeddings": "embeddings",
    "classify": "classification",
    "rerank": "ranking",
}
_SYNONYMS: Final[Mapping[str, tuple[str, ...]]] = {
    "query": ("search_query", "retrieval_query"),
    "document": ("passage", "search_document", "retrieval_document"),
}


def string_encoder(executor: Executor) -> TextEncoder | None:
    """The encoder that a model is which takes texts themselves and gives a vector for each: BYTES [n] or [n,1] to
    FP32 [n,d]. None: it is no such model."""
    spec = string_spec(executor.signature)
    return None if spec is None else TextEncoder(executor, spec, None)


def string_spec(signature: Signature) -> TextSpec | None:
    """As ``string_encoder``, for its signature."""
    if len(signature.inputs) != 1 or len(signature.outputs) != 1:
        return None
    texts, vectors = signature.inputs[0], signature.outputs[0]
    tail = texts.shape[1:]
    if texts.datatype != "BYTES" or texts.shape[:1] != (-1,) or tail not in ((), (1,)):
        return None
    if vectors.datatype != "FP32" or len(vectors.shape) != 2 or vectors.shape[0] != -1:
        return None
    return TextSpec("embeddings", texts.name, vectors.name, max(vectors.shape[1], 0))


def activated(logits: Vectors, how: Activation) -> Vectors:
    """Scores of logits, FP32 [n, c], along the last axis."""
    scores = logits
    if how == "sigmoid":
        small = np.exp(-np.abs(logits))  # by the half that does not overflow
        scores = np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
    elif how == "softmax":
        raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = raised / raised.sum(axis=-1, keepdims=True)
    return scores.astype(np.float32, copy=False)


def _pooled(tokens: Vectors, how: Pooling) -> Vectors:
    """One vector of those of a row's tokens, [length, width]."""
    pooled: Vectors
    if how == "cls":
        pooled = tokens[0]
    elif how == "last":
        pooled = tokens[-1]
    elif how == "max":
        pooled = tokens.max(axis=0)
    else:
        pooled = tokens.mean(axis=0, dtype=np.float32)
    return pooled


def _normalised(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32, copy=False)
    return unit


def _are_unit(vectors: Vectors) -> bool:
    return bool((np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT).all())


def _rerank_field(index: int) -> str:
    return "query" if index == 0 else f"documents[{index - 1}]"


def _check_range(ids: Sequence[int], vocabulary: int, param: str) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        position, token = next((i, t) for i, t in enumerate(ids) if not 0 <= t < vocabulary)
        raise InvalidParameterError(
            f"expected token ids from 0 to {vocabulary - 1} in '{param}', got {str(token)[:24]} at position {position}"
            "; ids are those of the model's own tokenizer, a client that counts with another one sends texts instead",
            param,
        )


def _check_length(text: Text, param: str) -> None:
    if isinstance(text, str) and len(text) > MAX_TEXT_CHARACTERS:
        raise InvalidParameterError(
            f"expected at most {MAX_TEXT_CHARACTERS} characters in '{param}', got {len(text)}", param
        )


def _unwrapped(ids: Sequence[int], template: Template) -> Sequence[int]:
    """Token ids without the special ones around them, where the caller put them there."""
    before, after = len(template.before), len(template.after)
    end = len(ids) - after
    if template.tokens and end >= before and (*ids[:before], *ids[end:]) == (*template.before, *template.after):
        return ids[before:end]
    return ids


async def _limited(jobs: Sequence[Callable[[], Awaitable[None]]], most: int) -> None:
    """Do all jobs, at most so many at once. The first failure ends the rest and is raised as it is."""
    if len(jobs) == 1:
        await jobs[0]()
        return
    waiting = iter(jobs)

    async def work() -> None:
        for job in waiting:
            await job()
            await asyncio.sleep(0)  # short runs happen on the loop, and others want their turn

    tasks = [asyncio.ensure_future(work()) for _ in range(min(most, len(jobs)))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class _Lane:
    """One thread at a time that cuts texts into tokens; what comes meanwhile goes together the next time.

    The thread is the lane's own: a tokenizer that takes for ever holds up its own model and no other. It ends with the
    lane.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inferway-tokens")
        self._waiting: list[tuple[list[str], int, asyncio.Future[list[list[int]]]]] = []
        self._task: asyncio.Task[None] | None = None

    async def encode(self, texts: list[str], characters: int) -> list[list[int]]:
        """Cancelling is safe: what is under way goes on, and nobody gets it."""
        future: asyncio.Future[list[list[int]]] = asyncio.get_running_loop().create_future()
        self._waiting.append((texts, characters, future))
        if self._task is None:
            self._task = asyncio.ensure_future(self._work())
        return await future

    async def _work(self) -> None:
        try:
            while self._waiting:
                taken, characters = 0, 0
                for _, size, _ in self._waiting:
                    characters += size
                    if taken and characters > _LANE_CHARACTERS:
                        break
                    taken += 1
                batch = [entry for entry in self._waiting[:taken] if not entry[2].done()]
                del self._waiting[:taken]
                if batch:
                    await self._encode(batch)
        finally:
            self._task = None

    async def _encode(self, batch: list[tuple[list[str], int, asyncio.Future[list[list[int]]]]]) -> None:
        texts = [text for entry in batch for text in entry[0]]
        try:
            found: list[list[int]] = []
            for part in _parts(texts):
                work = self._thread.submit(self._tokenizer.encode, part)
                tokens = await asyncio.wrap_future(work)
                found += tokens
        except Exception as error:
            if len(batch) > 1:  # one text spoils it for all, nobody knows which
                for entry in batch:
                    await self._encode([entry])
            elif not batch[0][2].done():
                batch[0][2].set_exception(error)
            return
        at = 0
        for own, _, future in batch:
            if not future.done():
                future.set_result(found[at : at + len(own)])
            at += len(own)


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """The texts in their order, together no longer than are encoded at once, or one."""
    part: list[str] = []
    left = _LANE_CHARACTERS
    for text in texts:
        left -= len(text)
        if part and left < 0:
            yield part
            part, left = [], _LANE_CHARACTERS - len(text)
        part.append(text)
    yield part
