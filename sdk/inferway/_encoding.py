"""Texts to vectors, rankings and labels: bodies of the routes under ``/v1``, and what their answers mean. Pure."""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from inferway_contract import names

from ._core import Call, Reply
from ._errors import ConfigurationError, InvalidInputError, MalformedAnswer
from ._inputs import as_column
from ._options import RequestOptions
from ._text import Usage, body_of, checked_model, objects_of, post, text_of, usage_of, whole_of

Vectors: TypeAlias = NDArray[np.float32]
Texts: TypeAlias = Any
"""A text, or several in a list, an array, a pandas or polars column, or any other iterable."""

MAX_TEXTS: Final = 512
"""Of one request for vectors, at most: enough to fill the gateway's batches, and an answer of a megabyte or two."""
MAX_CHARACTERS: Final = 1_000_000
"""Of one request for vectors, unless one text alone has more."""


# --- results -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingResult:
    """Vectors of texts.

    Attributes:
        vectors: ``float32`` of shape ``[n, d]``, in the order of the texts.
        model: name of the model that answered.
        raw: the answer's body without its vectors.
    """

    vectors: Vectors
    model: str
    usage: Usage | None = None
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return f"<EmbeddingResult of {self.model}, {self.vectors.shape[0]} of {self.vectors.shape[1]} dimensions>"


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document with its place in a ranking.

    Attributes:
        index: of the document among those that were given.
        score: higher is more relevant; what its numbers mean is the model's matter.
        document: the text; None unless it was asked for.
    """

    index: int
    score: float
    document: str | None = None


@dataclass(frozen=True, slots=True)
class RerankResult:
    """Documents by relevance, the most relevant first.

    Attributes:
        method: ``cross-encoder``, or ``embedding`` where the model compares vectors.
    """

    results: tuple[Ranked, ...]
    model: str
    method: str
    usage: Usage | None = None
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


@dataclass(frozen=True, slots=True)
class Classified:
    """What a text was found to be.

    Attributes:
        label, score: the likeliest.
        scores: label to score, the highest first; all of them, or ``top_k``.
    """

    label: str
    score: float
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ClassifyResult:
    """What texts were found to be, in their order."""

    results: tuple[Classified, ...]
    model: str
    usage: Usage | None = None
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    @property
    def labels(self) -> list[str]:
        """The likeliest label of each text."""
        return [found.label for found in self.results]

    def __iter__(self) -> Iterator[Classified]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


# --- requests ----------------------------------------------------------------------------------------------------


def texts_of(value: Texts, what: str = "texts") -> list[str]:
    """Texts as a list. Raises InvalidInputError where something among them is no text."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise InvalidInputError(f"{what} expects a text or several, got {type(cast(object, value)).__name__}")
    found: list[Any] = as_column(cast(object, value), what)
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise InvalidInputError(f"{what}[{index}] expects a text, got {type(text).__name__}")
    return found


def tokens_or_texts(value: Any) -> Any:
    """The input of one request: texts, or token ids as they are."""
    if isinstance(value, list | tuple):
        first = next(iter(cast(Iterable[Any], value)), None)
        if isinstance(first, int | list | tuple | np.integer) and not isinstance(first, bool):
            return _plain(cast(Sequence[Any], value))
    if isinstance(value, np.ndarray) and cast(Vectors, value).dtype.kind in "iu":
        return cast(Vectors, value).tolist()
    return value if isinstance(value, str) else texts_of(value, "input")


def _plain(ids: Sequence[Any]) -> list[Any]:
    return [_plain(cast(Sequence[Any], item)) if isinstance(item, list | tuple) else int(item) for item in ids]


def embeddings_call(
    input: Any, model: str, dimensions: int | None, input_type: str | None, user: str | None
) -> Call[EmbeddingResult]:
    """Vectors of what is sent in one request."""
    sent = tokens_or_texts(input)
    body: dict[str, Any] = {"model": checked_model(model), "input": sent, "encoding_format": "base64"}
    if dimensions is not None:
        body["dimensions"] = dimensions
    if input_type is not None:
        body["input_type"] = input_type
    if user is not None:
        body["user"] = user
    alone = isinstance(sent, str) or (bool(sent) and isinstance(sent[0], int))
    count = 1 if alone else len(cast(list[Any], sent))

    def read(reply: Reply) -> EmbeddingResult:
        return _embeddings(reply, count)

    return post("embeddings", body, read)


def _embeddings(reply: Reply, count: int) -> EmbeddingResult:
    body = body_of(reply)
    rows: list[Vectors | None] = [None] * count
    data = objects_of(body, "data")
    for at, item in enumerate(data):
        index = whole_of(item, "index", at)
        if not 0 <= index < count or rows[index] is not None:
            raise MalformedAnswer(f"the answer has a vector {index}, which was not asked for once")
        rows[index] = _vector(item.get("embedding"))
    found = [row for row in rows if row is not None]
    if len(found) != count:
        raise MalformedAnswer(f"{count} vectors were asked for, {len(found)} came")
    if len({len(row) for row in found}) > 1:
        raise MalformedAnswer("the answer's vectors have different lengths")
    vectors = np.stack(found) if found else np.empty((0, 0), np.float32)
    raw = {name: value for name, value in body.items() if name != "data"}
    return EmbeddingResult(vectors, text_of(body, "model", ""), usage_of(body), raw)


def _vector(value: object) -> Vectors:
    try:
        if isinstance(value, str):
            data = binascii.a2b_base64(value, strict_mode=True)
            return np.frombuffer(data, "<f4").astype(np.float32, copy=False)
        made = np.array(value, np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise MalformedAnswer(f"a vector cannot be read: {error}") from error
    if made.ndim != 1:
        raise MalformedAnswer("expected a vector to be numbers or base64")
    return made


def chunks_of(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Texts in runs that are one request each."""
    most = min(MAX_TEXTS, names.EMBEDDING_INPUTS_MAX_ITEMS)
    start, characters = 0, 0
    for index, text in enumerate(texts):
        if index > start and (index - start >= most or characters + len(text) > MAX_CHARACTERS):
            yield texts[start:index]
            start, characters = index, 0
        characters += len(text)
    if start < len(texts):
        yield texts[start:]


def chunk_options(options: RequestOptions, number: int) -> RequestOptions:
    """Options of one request of several; each needs a key of its own, as their bodies differ."""
    if number and "idempotency_key" in options:
        return {**options, "idempotency_key": f"{options['idempotency_key']}.{number}"}
    return options


def joined_vectors(parts: Sequence[EmbeddingResult]) -> Vectors:
    """The vectors of several requests, in their order."""
    if not parts:
        return np.empty((0, 0), np.float32)
    if len({part.vectors.shape[1] for part in parts}) > 1:
        # The model's alias was pointed at another version meanwhile.
        raise InvalidInputError(
            "the model changed while the texts were sent: vectors of different lengths came; name a version"
        )
    return np.concatenate([part.vectors for part in parts])


def rerank_call(
    query: str, documents: Texts, model: str, top_n: int | None, return_documents: bool
) -> Call[RerankResult]:
    """The documents by relevance to the query."""
    if not isinstance(cast(object, query), str):
        raise InvalidInputError(f"query expects a text, got {type(query).__name__}")
    sent = texts_of(documents, "documents")
    body: dict[str, Any] = {"model": checked_model(model), "query": query, "documents": sent}
    if top_n is not None:
        body["top_n"] = top_n

    def read(reply: Reply) -> RerankResult:
        answer = body_of(reply)
        results: list[Ranked] = []
        for item in objects_of(answer, "results"):
            index = whole_of(item, "index", -1)
            if not 0 <= index < len(sent):
                raise MalformedAnswer(f"the answer ranks a document {index}, and {len(sent)} were given")
            results.append(Ranked(index, _score(item, "relevance_score"), sent[index] if return_documents else None))
        return RerankResult(
            tuple(results), text_of(answer, "model", ""), text_of(answer, "method", ""), usage_of(answer), answer
        )

    return post("rerank", body, read)


def classify_call(texts: Any, model: str, top_k: int | None, activation: str | None = None) -> Call[ClassifyResult]:
    """What the texts are."""
    sent = tokens_or_texts(texts)
    body: dict[str, Any] = {"model": checked_model(model), "input": sent}
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(cast(object, top_k), int):
            raise ConfigurationError(f"top_k expects a whole number, got {top_k!r:.80}")
        body["top_k"] = top_k
    if activation is not None:
        body["activation"] = activation

    def read(reply: Reply) -> ClassifyResult:
        answer = body_of(reply)
        data = sorted(enumerate(objects_of(answer, "data")), key=lambda pair: whole_of(pair[1], "index", pair[0]))
        return ClassifyResult(
            tuple(
                Classified(
                    text_of(item, "label", ""),
                    _score(item, "score"),
                    {text_of(each, "label", ""): _score(each, "score") for each in objects_of(item, "scores")},
                )
                for _, item in data
            ),
            text_of(answer, "model", ""),
            usage_of(answer),
            answer,
        )

    return post("classify", body, read)


def _score(owner: dict[str, Any], name: str) -> float:
    found = owner.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise MalformedAnswer(f"expected '{name}' to be a number, got {type(found).__name__}")
    return float(found)
