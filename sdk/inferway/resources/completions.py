"""``client.completions``: continuations of plain texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, Unpack, overload

from .._engine import AsyncEngine, SyncEngine
from .._streams import AsyncTextStream, TextStream
from .._text import Completion, CompletionParameters, CompletionRequest

CompletionStream: TypeAlias = TextStream[Completion]
AsyncCompletionStream: TypeAlias = AsyncTextStream[Completion]
Prompt: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""A text or its token ids, or several of one of them."""


class Completions:
    """Continuations of plain texts, without a chat template."""

    def __init__(self, engine: SyncEngine) -> None:
        self._engine = engine

    @overload
    def create(
        self,
        prompt: Prompt,
        *,
        model: str,
        stream: Literal[False] = False,
        **parameters: Unpack[CompletionParameters],
    ) -> Completion: ...

    @overload
    def create(
        self,
        prompt: Prompt,
        *,
        model: str,
        stream: Literal[True],
        **parameters: Unpack[CompletionParameters],
    ) -> CompletionStream: ...

    @overload
    def create(
        self,
        prompt: Prompt,
        *,
        model: str,
        stream: bool,
        **parameters: Unpack[CompletionParameters],
    ) -> Completion | CompletionStream: ...

    def create(
        self,
        prompt: Prompt,
        *,
        model: str,
        stream: bool = False,
        **parameters: Unpack[CompletionParameters],
    ) -> Completion | CompletionStream:
        """The model's continuation of a prompt.

        Args:
            prompt: a text, or its token ids; or several, each of which is one more answer.
            model: ``NAME``, ``NAME@ALIAS``, or ``NAME:ADAPTER``.
            stream: give the answer as it is written, as a stream to use in a ``with`` block.
            parameters: how the answer is drawn, see `CompletionParameters`, and the options of the request.
        Raises:
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer. Only what fails before the first byte of a stream is tried again; after it a
                stream raises `StreamInterruptedError`, with what had come as ``partial``.
        """
        request = CompletionRequest(prompt, model, stream, parameters)
        if not stream:
            return self._engine.send(request.call, request.options)
        plan, reply = self._engine.open(request.call, request.options)
        if reply.pieces is None:
            plan.refuse_no_stream(reply)
        return TextStream(plan, reply, reply.pieces, request.gather())


class AsyncCompletions:
    """Continuations of plain texts, without a chat template."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @overload
    async def create(
        self,
        prompt: Prompt,
        *,
        model: str,
        stream: Literal[False] = False,
        **parameters: Unpack[CompletionParameters],
    ) -> Completion: ...

    @overload
    async def create(
        self,
        prompt: Prompt,
        *,
        model: str,
        stream: Literal[True],
        **parameters: Unpack[CompletionParameters],
    ) -> AsyncCompletionStream: ...

    @overload
    async def create(
        self,
        prompt: Prompt,
        *,
        model: str,
        stream: bool,
        **parameters: Unpack[CompletionParameters],
    ) -> Completion | AsyncCompletionStream: ...

    async def create(
        self,
        prompt: Prompt,
        *,
        model: str,
        stream: bool = False,
        **parameters: Unpack[CompletionParameters],
    ) -> Completion | AsyncCompletionStream:
        """The model's continuation of a prompt.

        Args:
            prompt: a text, or its token ids; or several, each of which is one more answer.
            model: ``NAME``, ``NAME@ALIAS``, or ``NAME:ADAPTER``.
            stream: give the answer as it is written, as a stream to use in a ``with`` block.
            parameters: how the answer is drawn, see `CompletionParameters`, and the options of the request.
        Raises:
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer. Only what fails before the first byte of a stream is tried again; after it a
                stream raises `StreamInterruptedError`, with what had come as ``partial``.
        """
        request = CompletionRequest(prompt, model, stream, parameters)
        if not stream:
            return await self._engine.send(request.call, request.options)
        plan, reply = await self._engine.open(request.call, request.options)
        if reply.pieces is None:
            plan.refuse_no_stream(reply)
        return AsyncTextStream(plan, reply, reply.pieces, request.gather())
