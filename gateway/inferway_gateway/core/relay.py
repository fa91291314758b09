"""Models elsewhere that are asked in OpenAI's words: a request goes on as it came, and so do the pieces of its answer.

Nothing is known here of tokens, templates or grammars: they are the other server's. What comes back has been checked to
have the shape that callers expect, and to be about the answers that were asked for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from .generation import GenerationStats, Usage

RelayOperation = Literal["chat", "completions"]


@dataclass(frozen=True, slots=True)
class RelayRequest:
    """A request for text.

    Attributes:
        body: the members to send on, as the caller wrote them; ``model`` and those about streaming are set on the way.
        answers: how many there will be, over all prompts.
        stream: in pieces, as they come; else as one piece.
        priority: 1 is first; 0 comes after all that say one.
        deadline: moment on the monotonic clock after which nobody wants the answer.
        origin: headers that tell the other server which request it is.
    """

    operation: RelayOperation
    body: Mapping[str, Any]
    answers: int = 1
    stream: bool = False
    priority: int = 0
    deadline: float | None = None
    origin: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class RelayPiece:
    """A piece of an answer, or the whole of it.

    Attributes:
        choices: as OpenAI's API has them: ``index`` is one of the answers', ``finish_reason`` a text or None, ``delta``
            or ``message`` (of a chat) an object, ``text`` (of a completion) a text.
        usage: where the server tells it, once.
        counts: the usage as it is told to the caller.
        attempts: calls that were made for the answer.
    """

    choices: Sequence[dict[str, Any]] = ()
    usage: Usage | None = None
    counts: dict[str, Any] | None = None
    attempts: int = 1


class TextRelay(Protocol):
    """A language model on another server. Lives on the event loop."""

    @property
    def task(self) -> str:
        """``generate``."""
        ...

    @property
    def stats(self) -> GenerationStats: ...

    def ask(self, request: RelayRequest) -> AsyncGenerator[RelayPiece]:
        """Send a request on. Closing the generator ends the call: its connection is closed.

        Until the first piece another endpoint may be tried; from then on every failure comes between pieces.

        Raises:
            InvalidParameterError: the server says that the request is wrong; ``param`` as it says.
            ContextLengthError: it says that the request does not fit the model's context.
            QueueFullError: as many requests as may wait do.
            DeadlineExceededError: the caller's time was over.
            ModelFailingError: no endpoint takes requests now.
            UpstreamError: the server did not answer, not with what the protocol has, or not to the end.
            ShuttingDownError: the version is taken out of service.
        """
        ...


@runtime_checkable
class Relaying(Protocol):
    """An executor whose model may be asked in OpenAI's words."""

    @property
    def relay(self) -> TextRelay | None: ...
