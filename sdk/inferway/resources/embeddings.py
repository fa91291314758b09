"""``client.embeddings``, ``client.embed``, ``client.rerank`` and ``client.classify``: what text encoders answer."""

from __future__ import annotations

from typing import Any, Unpack

from .._encoding import (
    EmbeddingResult,
    Texts,
    Vectors,
    chunk_options,
    chunks_of,
    embeddings_call,
    joined_vectors,
    texts_of,
)
from .._engine import AsyncEngine, SyncEngine
from .._options import RequestOptions


class Embeddings:
    """Vectors of texts."""

    def __init__(self, engine: SyncEngine) -> None:
        self._engine = engine

    def create(
        self,
        input: Any,
        *,
        model: str,
        dimensions: int | None = None,
        input_type: str | None = None,
        user: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> EmbeddingResult:
        """Vectors of texts, in one request. ``client.embed`` takes any number of texts.

        Args:
            input: a text or several, or the token ids of one or of several.
            model: ``NAME`` or ``NAME@ALIAS``.
            dimensions: cut the vectors to that length, where the model allows it.
            input_type: such as ``query`` or ``document``: which of the model's prompts is put before each text.
            user: passed on as it is.
        Raises:
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer.
        """
        return self._engine.send(embeddings_call(input, model, dimensions, input_type, user), options)


def embed(
    engine: SyncEngine,
    texts: Texts,
    model: str,
    dimensions: int | None,
    input_type: str | None,
    options: RequestOptions,
) -> Vectors:
    """What ``client.embed`` does."""
    started = engine.config.clock.monotonic()
    parts: list[EmbeddingResult] = []
    for number, chunk in enumerate(chunks_of(texts_of(texts))):
        left = chunk_options(engine.rest(options, started) if number else options, number)
        parts.append(engine.send(embeddings_call(list(chunk), model, dimensions, input_type, None), left))
    return joined_vectors(parts)


class AsyncEmbeddings:
    """Vectors of texts."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def create(
        self,
        input: Any,
        *,
        model: str,
        dimensions: int | None = None,
        input_type: str | None = None,
        user: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> EmbeddingResult:
        """Vectors of texts, in one request. ``client.embed`` takes any number of texts.

        Args:
            input: a text or several, or the token ids of one or of several.
            model: ``NAME`` or ``NAME@ALIAS``.
            dimensions: cut the vectors to that length, where the model allows it.
            input_type: such as ``query`` or ``document``: which of the model's prompts is put before each text.
            user: passed on as it is.
        Raises:
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer.
        """
        return await self._engine.send(embeddings_call(input, model, dimensions, input_type, user), options)


async def embed_async(
    engine: AsyncEngine,
    texts: Texts,
    model: str,
    dimensions: int | None,
    input_type: str | None,
    options: RequestOptions,
) -> Vectors:
    """What ``client.embed`` does: as `embed`."""
    started = engine.config.clock.monotonic()
    parts: list[EmbeddingResult] = []
    for number, chunk in enumerate(chunks_of(texts_of(texts))):
        left = chunk_options(engine.rest(options, started) if number else options, number)
        parts.append(await engine.send(embeddings_call(list(chunk), model, dimensions, input_type, None), left))
    return joined_vectors(parts)
