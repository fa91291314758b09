"""``client.chat``: conversations with a language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, Unpack, overload

from .._engine import AsyncEngine, SyncEngine
from .._streams import AsyncTextStream, TextStream
from .._text import ChatCompletion, ChatParameters, ChatRequest, Messages

ChatStream: TypeAlias = TextStream[ChatCompletion]
AsyncChatStream: TypeAlias = AsyncTextStream[ChatCompletion]


class Chat:
    """Conversations with a language model."""

    def __init__(self, engine: SyncEngine) -> None:
        self._engine = engine

    @overload
    def create(
        self,
        messages: Messages,
        *,
        model: str,
        stream: Literal[False] = False,
        response_format: object = None,
        tools: Iterable[type[Any] | Mapping[str, Any]] | None = None,
        tool_choice: object = None,
        **parameters: Unpack[ChatParameters],
    ) -> ChatCompletion: ...

    @overload
    def create(
        self,
        messages: Messages,
        *,
        model: str,
        stream: Literal[True],
        response_format: object = None,
        tools: Iterable[type[Any] | Mapping[str, Any]] | None = None,
        tool_choice: object = None,
        **parameters: Unpack[ChatParameters],
    ) -> ChatStream: ...

    @overload
    def create(
        self,
        messages: Messages,
        *,
        model: str,
        stream: bool,
        response_format: object = None,
        tools: Iterable[type[Any] | Mapping[str, Any]] | None = None,
        tool_choice: object = None,
        **parameters: Unpack[ChatParameters],
    ) -> ChatCompletion | ChatStream: ...

    def create(
        self,
        messages: Messages,
        *,
        model: str,
        stream: bool = False,
        response_format: object = None,
        tools: Iterable[type[Any] | Mapping[str, Any]] | None = None,
        tool_choice: object = None,
        **parameters: Unpack[ChatParameters],
    ) -> ChatCompletion | ChatStream:
        """The model's answer to a conversation.

        Args:
            messages: mappings with ``role`` and ``content``, oldest first; messages of answers may stand among them as
                they are. A plain text is one message of the user's.
            model: ``NAME``, ``NAME@ALIAS``, or ``NAME:ADAPTER``.
            stream: give the answer as it is written, as a stream to use in a ``with`` block.
            response_format: a pydantic model, or any type that pydantic knows, a JSON schema, or ``json``; the answer
                is held to it while it is written, and ``parsed`` has it.
            tools: pydantic models, or mappings with name, description and parameters, that the model may call.
            tool_choice: ``auto``, ``none``, ``required``, or one of the tools by its name or type.
            parameters: how the answer is drawn, see `ChatParameters`, and the options of the request.
        Raises:
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer. Only what fails before the first byte of a stream is tried again; after it a
                stream raises `StreamInterruptedError`, with what had come as ``partial``.
        """
        request = ChatRequest(messages, model, stream, response_format, tools, tool_choice, parameters)
        if not stream:
            return self._engine.send(request.call, request.options)
        plan, reply = self._engine.open(request.call, request.options)
        if reply.pieces is None:
            plan.refuse_no_stream(reply)
        return TextStream(plan, reply, reply.pieces, request.gather())


class AsyncChat:
    """Conversations with a language model."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @overload
    async def create(
        self,
        messages: Messages,
        *,
        model: str,
        stream: Literal[False] = False,
        response_format: object = None,
        tools: Iterable[type[Any] | Mapping[str, Any]] | None = None,
        tool_choice: object = None,
        **parameters: Unpack[ChatParameters],
    ) -> ChatCompletion: ...

    @overload
    async def create(
        self,
        messages: Messages,
        *,
        model: str,
        stream: Literal[True],
        response_format: object = None,
        tools: Iterable[type[Any] | Mapping[str, Any]] | None = None,
        tool_choice: object = None,
        **parameters: Unpack[ChatParameters],
    ) -> AsyncChatStream: ...

    @overload
    async def create(
        self,
        messages: Messages,
        *,
        model: str,
        stream: bool,
        response_format: object = None,
        tools: Iterable[type[Any] | Mapping[str, Any]] | None = None,
        tool_choice: object = None,
        **parameters: Unpack[ChatParameters],
    ) -> ChatCompletion | AsyncChatStream: ...

    async def create(
        self,
        messages: Messages,
        *,
        model: str,
        stream: bool = False,
        response_format: object = None,
        tools: Iterable[type[Any] | Mapping[str, Any]] | None = None,
        tool_choice: object = None,
        **parameters: Unpack[ChatParameters],
    ) -> ChatCompletion | AsyncChatStream:
        """The model's answer to a conversation.

        Args:
            messages: mappings with ``role`` and ``content``, oldest first; messages of answers may stand among them as
                they are. A plain text is one message of the user's.
            model: ``NAME``, ``NAME@ALIAS``, or ``NAME:ADAPTER``.
            stream: give the answer as it is written, as a stream to use in a ``with`` block.
            response_format: a pydantic model, or any type that pydantic knows, a JSON schema, or ``json``; the answer
                is held to it while it is written, and ``parsed`` has it.
            tools: pydantic models, or mappings with name, description and parameters, that the model may call.
            tool_choice: ``auto``, ``none``, ``required``, or one of the tools by its name or type.
            parameters: how the answer is drawn, see `ChatParameters`, and the options of the request.
        Raises:
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer. Only what fails before the first byte of a stream is tried again; after it a
                stream raises `StreamInterruptedError`, with what had come as ``partial``.
        """
        request = ChatRequest(messages, model, stream, response_format, tools, tool_choice, parameters)
        if not stream:
            return await self._engine.send(request.call, request.options)
        plan, reply = await self._engine.open(request.call, request.options)
        if reply.pieces is None:
            plan.refuse_no_stream(reply)
        return AsyncTextStream(plan, reply, reply.pieces, request.gather())
