"""What is answered: whole bodies, and events of streams, whose unchanging parts are made once.

A token costs some microseconds here: its text is written between two ready pieces of JSON.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeVar

import orjson

from ...core.errors import GatewayError
from ...core.generation import ChosenLogprob, Delta, TokenLogprob, Usage
from ..problems import openai_error
from .tools import CallParser, CallPiece, Tools

DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"
_Piece = TypeVar("_Piece", contravariant=True)


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def error_event(error: GatewayError, request_id: str) -> bytes:
    """The last event of a stream that failed."""
    return b"data: %b\n\n" % orjson.dumps({"error": openai_error(error), "request_id": request_id})


def usage_body(usages: Sequence[Usage], n: int) -> dict[str, Any]:
    """Tokens of all answers; those of a prompt count once, however many answers it has.

    Args:
        usages: of each answer, in the order of their indices.
        n: answers to each prompt.
    """
    prompts = usages[::n]
    prompt = sum(usage.prompt_tokens for usage in prompts)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
    }


class Writer(Protocol[_Piece]):
    """Writes the answers to one request. Each piece is given to it as it comes.

    Attributes:
        identity: the ``id`` of what is answered.
        reasons: why each answer ended; None where it has not.
    """

    identity: str
    reasons: list[str | None]

    def opening(self) -> bytes:
        """Events before the first piece."""
        ...

    def event(self, index: int, delta: _Piece, /) -> bytes:
        """Events for a piece of the answer with that index; empty where there is nothing to tell yet."""
        ...

    def closing(self, usage: dict[str, Any] | None) -> bytes:
        """Events after the last piece, with the usage where it was asked for."""
        ...

    def take(self, index: int, delta: _Piece, /) -> None:
        """Keep a piece for ``body``."""
        ...

    def body(self, usage: dict[str, Any]) -> bytes:
        """The whole answer."""
        ...


class _Head:
    """The members that all events of a stream share."""

    def __init__(self, identifier: str, kind: str, model: str, *, usage: bool) -> None:
        self.id = identifier
        self.created = int(time.time())
        self.model = model
        self.members: dict[str, Any] = {
            "id": identifier, "object": kind, "created": self.created, "model": model, "system_fingerprint": None,
        }  # fmt: skip
        self.start = b"data: " + orjson.dumps(self.members)[:-1] + b',"choices":['
        self.end = b'],"usage":null}\n\n' if usage else b"]}\n\n"

    def usage(self, usage: dict[str, Any]) -> bytes:
        return self.start + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"


class ChatWriter:
    """Answers of ``/v1/chat/completions``.

    Args:
        n: answers that there are.
        usage: each event says that its usage is null, for one will have it.
    """

    def __init__(self, model: str, n: int, tools: Tools, *, logprobs: bool, usage: bool = False) -> None:
        self.identity = new_id("chatcmpl")
        self._head = _Head(self.identity, "chat.completion.chunk", model, usage=usage)
        self._n = n
        self._logprobs = logprobs
        self._pre = [self._head.start + b'{"index":%d,"delta":{"content":' % index for index in range(n)]
        self._post = b'},"logprobs":null,"finish_reason":null}' + self._head.end
        self._parsers: list[CallParser] | None = None
        if tools.choice != "none":
            self._parsers = [CallParser(tools.names, forced=tools.choice == "forced") for _ in range(n)]
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._calls: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self._tokens: list[list[ChosenLogprob]] = [[] for _ in range(n)]
        self.reasons: list[str | None] = [None] * n

    def opening(self) -> bytes:
        return b"".join(
            self._event(index, {"role": "assistant", "content": "", "refusal": None}) for index in range(self._n)
        )

    def event(self, index: int, delta: Delta) -> bytes:
        if self._parsers is None and delta.finish_reason is None and not delta.logprobs:
            return self._pre[index] + orjson.dumps(delta.text) + self._post if delta.text else b""
        text, pieces = self._parsed(index, delta)
        events = []
        if text or delta.logprobs:
            events.append(self._event(index, {"content": text}, logprobs=delta.logprobs))
        events += (self._event(index, {"tool_calls": [_piece(piece)]}) for piece in pieces)
        if delta.finish_reason is not None:
            self.reasons[index] = reason = self._reason(index, delta)
            events.append(self._event(index, {}, reason))
        return b"".join(events)

    def closing(self, usage: dict[str, Any] | None) -> bytes:
        return (b"" if usage is None else self._head.usage(usage)) + DONE

    def take(self, index: int, delta: Delta) -> None:
        text, pieces = self._parsed(index, delta)
        if text:
            self._texts[index].append(text)
        calls = self._calls[index]
        for piece in pieces:
            if piece.name is not None:
                calls.append(
                    {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": piece.arguments}}
                )
            else:
                calls[piece.index]["function"]["arguments"] += piece.arguments
        self._tokens[index] += delta.logprobs
        if delta.finish_reason is not None:
            self.reasons[index] = self._reason(index, delta)

    def body(self, usage: dict[str, Any]) -> bytes:
        choices = []
        for index in range(self._n):
            text = "".join(self._texts[index])
            calls = self._calls[index]
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message["content"] = text if text.strip() else None
                message["tool_calls"] = calls
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": _chat_logprobs(self._tokens[index]) if self._logprobs else None,
                    "finish_reason": self.reasons[index],
                }
            )
        members = {**self._head.members, "object": "chat.completion", "choices": choices, "usage": usage}
        return orjson.dumps(members)

    def _parsed(self, index: int, delta: Delta) -> tuple[str, list[CallPiece]]:
        if self._parsers is None:
            return delta.text, []
        parser = self._parsers[index]
        text, pieces = parser.push(delta.text)
        if delta.finish_reason is not None:
            rest, more = parser.finish()
            text, pieces = text + rest, pieces + more
        return text, pieces

    def _reason(self, index: int, delta: Delta) -> str:
        called = self._parsers is not None and self._parsers[index].calls
        return "tool_calls" if called and delta.finish_reason == "stop" else str(delta.finish_reason)

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: Sequence[ChosenLogprob] = (),
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _chat_logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }
        return self._head.start + orjson.dumps(choice) + self._head.end


def _piece(piece: CallPiece) -> dict[str, Any]:
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {
        "index": piece.index,
        "id": piece.id,
        "type": "function",
        "function": {"name": piece.name, "arguments": piece.arguments},
    }


def _chat_logprobs(tokens: Sequence[ChosenLogprob]) -> dict[str, Any]:
    def one(token: TokenLogprob) -> dict[str, Any]:
        return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.data)}

    listed = [{**one(t.chosen), "top_logprobs": [one(other) for other in t.top]} for t in tokens]
    return {"content": listed, "refusal": None}


def _finite(value: float) -> float:
    """JSON has no infinity; what cannot come has a logarithm below that of every token that can."""
    return max(value, -9999.0)


class CompletionWriter:
    """Answers of ``/v1/completions``.

    Args:
        echoed: the text that each answer begins with.
        logprobs: alternatives that are told of each token; None: nothing is.
    """

    def __init__(self, model: str, echoed: Sequence[str], *, logprobs: int | None = None, usage: bool = False) -> None:
        self.identity = new_id("cmpl")
        self._head = _Head(self.identity, "text_completion", model, usage=usage)
        self._echoed = echoed
        self._n = len(echoed)
        self._logprobs = logprobs
        self._pre = [self._head.start + b'{"index":%d,"text":' % index for index in range(self._n)]
        self._post = b',"logprobs":null,"finish_reason":null}' + self._head.end
        self._texts: list[list[str]] = [[text] if text else [] for text in echoed]
        self._tokens: list[list[ChosenLogprob]] = [[] for _ in echoed]
        self.reasons: list[str | None] = [None] * self._n
        self._offsets = [len(text) for text in echoed]

    def opening(self) -> bytes:
        return b"".join(self._event(index, text) for index, text in enumerate(self._echoed) if text)

    def event(self, index: int, delta: Delta) -> bytes:
        if delta.finish_reason is None and not delta.logprobs:
            return self._pre[index] + orjson.dumps(delta.text) + self._post if delta.text else b""
        self.reasons[index] = delta.finish_reason
        return self._event(index, delta.text, delta.finish_reason, delta.logprobs)

    def closing(self, usage: dict[str, Any] | None) -> bytes:
        return (b"" if usage is None else self._head.usage(usage)) + DONE

    def take(self, index: int, delta: Delta) -> None:
        self._texts[index].append(delta.text)
        self._tokens[index] += delta.logprobs
        if delta.finish_reason is not None:
            self.reasons[index] = delta.finish_reason

    def body(self, usage: dict[str, Any]) -> bytes:
        choices = [
            {
                "index": index,
                "text": "".join(self._texts[index]),
                "logprobs": self._listed(index, self._tokens[index]) if self._logprobs is not None else None,
                "finish_reason": self.reasons[index],
            }
            for index in range(self._n)
        ]
        return orjson.dumps({**self._head.members, "choices": choices, "usage": usage})

    def _event(self, index: int, text: str, reason: str | None = None, logprobs: Sequence[ChosenLogprob] = ()) -> bytes:
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._listed(index, logprobs) if logprobs else None,
            "finish_reason": reason,
        }
        return self._head.start + orjson.dumps(choice) + self._head.end

    def _listed(self, index: int, tokens: Sequence[ChosenLogprob]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.chosen.text)
        return {
            "tokens": [token.chosen.text for token in tokens],
            "token_logprobs": [_finite(token.chosen.logprob) for token in tokens],
            "top_logprobs": [{t.text: _finite(t.logprob) for t in token.top} for token in tokens],
            "text_offset": offsets,
        }
