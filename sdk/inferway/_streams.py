"""Streamed answers: events as they come, the answer that they add up to, and what is left when the stream breaks.

A stream holds a connection, and at the gateway a place among the sequences that are generated together. Ending it
early, by ``close`` or by leaving its ``with`` block, closes the connection, and the gateway takes the place back.
"""

# The two classes use their base's members, which stay out of what users see.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar, cast

from ._core import Plan, Reply, load_json
from ._errors import APIConnectionError, APIError, MalformedAnswer, StreamInterruptedError
from ._sse import EventParser
from ._text import ContentDelta, StreamEvent, error_of

if TYPE_CHECKING:
    from ._transport import Incoming
    from ._transport_aio import AsyncIncoming

R_co = TypeVar("R_co", covariant=True)
_DONE: Final = "[DONE]"


class Gatherer(Protocol[R_co]):
    """What collects chunks, see `_text.Gathering`."""

    @property
    def complete(self) -> bool: ...

    def add(self, chunk: dict[str, Any]) -> Iterator[StreamEvent]: ...

    def snapshot(self) -> R_co: ...


class _TextStream(Generic[R_co]):
    """What both streams share: bytes to events."""

    def __init__(self, plan: Plan, reply: Reply, incoming: Any, gatherer: Gatherer[R_co]) -> None:
        self._plan = plan
        self._reply = reply
        self._incoming = incoming
        self._gatherer = gatherer
        self._parser = EventParser()
        self._events: deque[StreamEvent] = deque()
        self._ended = False
        self._closed = False
        self._failure: StreamInterruptedError | None = None

    @property
    def request_id(self) -> str | None:
        """The id under which the gateway's log knows the request."""
        return self._reply.request_id

    @property
    def snapshot(self) -> R_co:
        """The answer as far as it has been read."""
        return self._gatherer.snapshot()

    @property
    def closed(self) -> bool:
        """Whether the connection is given back: the stream has ended, was cut, or was closed."""
        return self._closed

    def _take(self, piece: bytes) -> None:
        """Events out of a piece; or the end, or the failure, which is raised when the events before it were read."""
        if not piece:
            self._ended = True
            if not self._gatherer.complete:
                url = self._plan.config.base_url
                self._cut(APIConnectionError(f"{url} ended the stream before the answer was complete"))
            return
        try:
            for event in self._parser.feed(piece):
                if event.data == _DONE:
                    self._ended = True
                    return
                chunk = load_json(event.data.encode())
                if not isinstance(chunk, dict):
                    raise MalformedAnswer(f"expected a JSON object as an event, got {type(chunk).__name__}")
                members = cast(dict[str, Any], chunk)
                error = error_of(members)
                if error is not None:
                    self._told(error)
                    return
                self._events.extend(self._gatherer.add(members))
        except MalformedAnswer as error:
            self._cut(APIConnectionError(self._plan.hide(f"the stream cannot be read: {error}")))

    def _told(self, error: dict[str, Any]) -> None:
        """The gateway says that it cannot go on."""
        message, code, param = error.get("message"), error.get("code"), error.get("param")
        self._failure = self._failed(
            self._plan.hide(message) if isinstance(message, str) and message else "the gateway broke the stream off",
            code=code if isinstance(code, str) else None,
            param=param if isinstance(param, str) else None,
        )

    def _cut(self, cause: APIError) -> None:
        """Something between here and there broke."""
        self._failure = self._failed(cause.message, code=cause.code)
        self._failure.__cause__ = cause

    def _failed(self, message: str, **facts: Any) -> StreamInterruptedError:
        failure = StreamInterruptedError(
            message, partial=self._gatherer.snapshot(), request_id=self._reply.request_id, **facts
        )
        self._plan.fail(failure)
        return failure

    def _whole(self) -> R_co:
        if not self._ended:
            raise self._failed("the stream was closed before the answer was complete")
        return self._gatherer.snapshot()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<{type(self).__name__} of request {self.request_id}, {state}>"


class TextStream(_TextStream[R_co]):
    """A streamed answer: a context manager, and an iterator of its events.

    Events are `ContentDelta`, `ToolCallDelta`, `Finish` and `UsageReport`. Iterating again goes on where it stopped.
    Leaving the ``with`` block closes the connection, and the gateway stops working on the answer.

    Raises, from whatever reads it:
        StreamInterruptedError: the stream was cut; ``partial`` is what had come.
    """

    _incoming: Incoming

    def __enter__(self) -> TextStream[R_co]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> TextStream[R_co]:
        return self

    def __next__(self) -> StreamEvent:
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if self._ended or self._closed:
                raise StopIteration
            self._read()
        return self._events.popleft()

    @property
    def text_stream(self) -> Iterator[str]:
        """The pieces of the first answer's text that are still to come."""
        return (event.text for event in self if isinstance(event, ContentDelta) and event.choice == 0)

    def get_final(self) -> R_co:
        """Read what is still to come; the whole answer.

        Raises:
            StreamInterruptedError: the stream was cut; ``partial`` is what had come.
        """
        for _ in self:
            pass
        return self._whole()

    def _read(self) -> None:
        """Wait for the next piece."""
        try:
            self._take(self._incoming.read())
        except APIError as error:
            self._cut(error)
        except BaseException:
            self.close()
            raise
        if self._failure is not None:
            self.close()
        elif self._ended and not self._closed:
            self._closed = True
            self._incoming.finish()

    def close(self) -> None:
        """Give the connection back. An answer that is not complete is given up, and the gateway stops working on it."""
        if not self._closed:
            self._closed = True
            self._incoming.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            with contextlib.suppress(Exception):
                self.close()


class AsyncTextStream(_TextStream[R_co]):
    """A streamed answer: a context manager, and an iterator of its events.

    Events are `ContentDelta`, `ToolCallDelta`, `Finish` and `UsageReport`. Iterating again goes on where it stopped.
    Leaving the ``async with`` block closes the connection, and the gateway stops working on the answer.

    Raises, from whatever reads it:
        StreamInterruptedError: the stream was cut; ``partial`` is what had come.
    """

    _incoming: AsyncIncoming

    async def __aenter__(self) -> AsyncTextStream[R_co]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncTextStream[R_co]:
        return self

    async def __anext__(self) -> StreamEvent:
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if self._ended or self._closed:
                raise StopAsyncIteration
            await self._read()
        return self._events.popleft()

    @property
    def text_stream(self) -> AsyncIterator[str]:
        """The pieces of the first answer's text that are still to come."""
        return (event.text async for event in self if isinstance(event, ContentDelta) and event.choice == 0)

    async def get_final(self) -> R_co:
        """Read what is still to come; the whole answer.

        Raises:
            StreamInterruptedError: the stream was cut; ``partial`` is what had come.
        """
        async for _ in self:
            pass
        return self._whole()

    async def _read(self) -> None:
        """Wait for the next piece."""
        try:
            self._take(await self._incoming.read())
        except APIError as error:
            self._cut(error)
        except BaseException:
            await self.close()
            raise
        if self._failure is not None:
            await self.close()
        elif self._ended and not self._closed:
            self._closed = True
            await self._incoming.finish()

    async def close(self) -> None:
        """Give the connection back. An answer that is not complete is given up, and the gateway stops working on it."""
        if not self._closed:
            self._closed = True
            await self._incoming.close()

    def __del__(self) -> None:
        # Nothing can be awaited here; aiohttp's answers can be let go of all the same.
        if not getattr(self, "_closed", True) and self._incoming.release is not None:
            with contextlib.suppress(Exception):
                self._incoming.release()
