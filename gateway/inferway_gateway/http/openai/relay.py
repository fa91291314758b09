"""Requests for text that a model on another server answers: sent on as they came, and answered in the same words."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import orjson

from inferway_contract import models as contract

from ...core.errors import InvalidParameterError
from ...core.relay import RelayOperation, RelayPiece, RelayRequest
from .frames import DONE, new_id

MOST_ANSWERS = 128
"""Answers of one request for completions, over all its prompts."""


def relay_request(
    body: contract.GenerationOptions,
    members: Mapping[str, Any],
    *,
    deadline: float | None,
    origin: tuple[tuple[str, str], ...],
) -> RelayRequest:
    """A request as it goes on.

    Args:
        members: of the request, as its caller wrote them.
        deadline: moment on the loop's clock.
    Raises:
        InvalidParameterError: too many answers are asked for.
    """
    operation: RelayOperation = "completions"
    answers = body.n or 1
    if isinstance(body, contract.ChatCompletionRequest):
        operation = "chat"
    elif isinstance(body, contract.CompletionRequest):
        given = body.prompt
        answers *= 1 if isinstance(given, str) or isinstance(given[0], int) else len(given)
        if answers > MOST_ANSWERS:
            raise InvalidParameterError(f"prompt: expected at most {MOST_ANSWERS} answers in all", "prompt")
    return RelayRequest(operation, members, answers, bool(body.stream), body.priority or 0, deadline, origin)


class RelayWriter:
    """Writes what another server answers, under this gateway's name of the model and an id of its own.

    Args:
        model: as the caller called it.
        usage: each event says that its usage is null, for one will have it.
    """

    def __init__(self, operation: RelayOperation, model: str, answers: int, *, usage: bool) -> None:
        chat = operation == "chat"
        self.identity = new_id("chatcmpl" if chat else "cmpl")
        self.reasons: list[str | None] = [None] * answers
        self._kind = "chat.completion" if chat else "text_completion"
        self._members: dict[str, Any] = {
            "id": self.identity,
            "object": "chat.completion.chunk" if chat else self._kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self._start = b"data: " + orjson.dumps(self._members)[:-1] + b',"choices":'
        self._end = b',"usage":null}\n\n' if usage else b"}\n\n"
        self._named: set[int] = set() if chat else set(range(answers))
        """Answers of whose writer, the assistant, an event has told."""
        self._choices: list[dict[str, Any]] = []
        self._counts: dict[str, Any] | None = None

    def opening(self) -> bytes:
        return b""

    def event(self, index: int, piece: RelayPiece) -> bytes:
        if piece.counts is not None:
            self._counts = piece.counts
        events = []
        # One event for each, for there are clients that look at the first choice alone.
        for choice in piece.choices:
            at = choice["index"]
            self.reasons[at] = choice["finish_reason"] or self.reasons[at]
            if at not in self._named:
                self._named.add(at)
                choice["delta"] = {"role": "assistant", "content": "", **choice["delta"]}
            events.append(self._start + orjson.dumps([choice]) + self._end)
        return b"".join(events)

    def closing(self, usage: dict[str, Any] | None) -> bytes:
        """``usage`` says whether it is wanted; what is told is the server's own, and nothing where it told nothing."""
        if usage is None or self._counts is None:
            return DONE
        return self._start + b'[],"usage":' + orjson.dumps(self._counts) + b"}\n\n" + DONE

    def take(self, index: int, piece: RelayPiece) -> None:
        self._choices = list(piece.choices)
        self._counts = piece.counts
        for choice in piece.choices:
            self.reasons[choice["index"]] = choice["finish_reason"]

    def body(self, usage: dict[str, Any]) -> bytes:
        members = {**self._members, "object": self._kind, "choices": self._choices}
        if self._counts is not None:
            members["usage"] = self._counts
        return orjson.dumps(members)
