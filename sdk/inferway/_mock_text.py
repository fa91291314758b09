"""Text models in `testing.MockGateway`: chats, completions and vectors, answered by functions of a test.

Plain values in and out; `testing` does the HTTP.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias, cast

import numpy as np

ChatFunction: TypeAlias = Callable[[list[dict[str, Any]]], "str | Iterable[str] | Mapping[str, Any]"]
EmbedFunction: TypeAlias = Callable[[list[str]], Any]

_CREATED: Final = 1_767_225_600
_WORDS: Final = re.compile(r"\S+\s*|\s+")


class TextRefusal(Exception):
    """An error to answer with.

    Attributes:
        param: the member of the request that it is about.
    """

    def __init__(self, status_code: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code
        self.param = param


def error_object(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The ``error`` member of a body under ``/v1``."""
    return {"message": message, "type": "invalid_request_error", "param": param, "code": code}


class MockText:
    """What the mock knows of text models.

    Attributes:
        chats, embedders: functions by model.
        cuts: after how many pieces the next streams break off.
    """

    def __init__(self) -> None:
        self.chats: dict[str, ChatFunction] = {}
        self.embedders: dict[str, EmbedFunction] = {}
        self.cuts: list[int] = []

    def answer(self, method: str, path: str, body: Mapping[str, Any]) -> tuple[str, bytes]:
        """Answer a request below ``/v1``: a content type and a body.

        Raises:
            TextRefusal: the answer is an error.
        """
        if (method, path) == ("GET", "models"):
            models = [
                {"id": name, "object": "model", "created": _CREATED, "owned_by": "mock"}
                for name in sorted({*self.chats, *self.embedders})
            ]
            return _json({"object": "list", "data": models})
        if (method, path) == ("POST", "chat/completions"):
            messages = body.get("messages")
            if not isinstance(messages, list) or not messages:
                raise TextRefusal(400, "invalid_parameter", "messages: expected at least one", "messages")
            return self._generated(body, cast(list[dict[str, Any]], messages), chat=True)
        if (method, path) == ("POST", "completions"):
            return self._generated(body, [{"role": "user", "content": body.get("prompt")}], chat=False)
        if (method, path) == ("POST", "embeddings"):
            return self._embedded(body)
        raise TextRefusal(404, "not_found", f"the mock gateway has no {method} /v1/{path}")

    def _generated(self, body: Mapping[str, Any], messages: list[dict[str, Any]], *, chat: bool) -> tuple[str, bytes]:
        model = str(body.get("model"))
        function = _found(self.chats, model)
        try:
            made = function(messages)
            failure = None
        except Exception as error:
            raise TextRefusal(500, "model_failed", f"{type(error).__name__}: {error}") from error
        message: dict[str, Any] = dict(cast(Mapping[str, Any], made)) if isinstance(made, Mapping) else {}
        pieces: list[str] = []
        try:
            # Grows as they come, so that those before a failure are there.
            pieces.extend(_pieces(message.get("content") if isinstance(made, Mapping) else made))
        except Exception as error:
            if not body.get("stream"):
                raise TextRefusal(500, "model_failed", f"{type(error).__name__}: {error}") from error
            failure = error_object("model_failed", f"{type(error).__name__}: {error}")
        calls = message.get("tool_calls")
        finish = "tool_calls" if calls else "stop"
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if isinstance(limit, int) and len(pieces) > limit:
            pieces, finish = pieces[:limit], "length"
        prompt = sum(len(_WORDS.findall(str(each.get("content")))) for each in messages)
        usage = {"prompt_tokens": prompt, "completion_tokens": len(pieces), "total_tokens": prompt + len(pieces)}
        head = {"id": "mock-1", "created": _CREATED, "model": model}
        if body.get("stream"):
            return self._stream(body, head, pieces, calls, finish, usage, failure, chat)
        text = "".join(pieces)
        if chat:
            said = {"role": "assistant", "content": text if pieces or not calls else None, "refusal": None}
            choice = {"index": 0, "message": said | ({"tool_calls": calls} if calls else {}), "finish_reason": finish}
        else:
            choice = {"index": 0, "text": text, "finish_reason": finish}
        kind = "chat.completion" if chat else "text_completion"
        return _json({**head, "object": kind, "choices": [{**choice, "logprobs": None}], "usage": usage})

    def _stream(
        self,
        body: Mapping[str, Any],
        head: dict[str, Any],
        pieces: list[str],
        calls: Any,
        finish: str,
        usage: dict[str, int],
        failure: dict[str, Any] | None,
        chat: bool,
    ) -> tuple[str, bytes]:
        head = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}

        def event(content: dict[str, Any], reason: str | None = None) -> bytes:
            choice = {"index": 0, **({"delta": content} if chat else {"text": content.get("content", "")})}
            return _event({**head, "choices": [{**choice, "finish_reason": reason}]})

        events = [event({"role": "assistant", "content": ""})] if chat else []
        events += [event({"content": piece}) for piece in pieces]
        if self.cuts:
            return "text/event-stream", b"".join(events[: self.cuts.pop(0) + (1 if chat else 0)])
        if failure is not None:
            return "text/event-stream", b"".join([*events, _event({"error": failure})])
        events += [event({"tool_calls": [{"index": index, **call}]}) for index, call in enumerate(calls or [])]
        events.append(event({}, finish))
        options: dict[str, Any] = body.get("stream_options") or {}
        if options.get("include_usage"):
            events.append(_event({**head, "choices": [], "usage": usage}))
        return "text/event-stream", b"".join([*events, b"data: [DONE]\n\n"])

    def _embedded(self, body: Mapping[str, Any]) -> tuple[str, bytes]:
        model = str(body.get("model"))
        function = _found(self.embedders, model)
        given = body.get("input")
        texts: list[Any] = [given] if isinstance(given, str) else list(given or [])
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TextRefusal(400, "invalid_parameter", "input: the mock takes texts alone, at least one", "input")
        try:
            vectors = np.asarray(function(texts), "<f4")
        except Exception as error:
            raise TextRefusal(500, "model_failed", f"{type(error).__name__}: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            words = f"the function gave shape {list(vectors.shape)} for {len(texts)} texts, expected [n, d]"
            raise TextRefusal(500, "model_failed", words)
        vectors = vectors[:, : body.get("dimensions") or None]
        packed = body.get("encoding_format") == "base64"
        rows = [base64.b64encode(row.tobytes()).decode() if packed else row.tolist() for row in vectors]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        tokens = sum(len(_WORDS.findall(text)) for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": data, "model": model, "usage": usage})


def _found(functions: Mapping[str, Any], model: str) -> Any:
    function = functions.get(model.partition("@")[0].partition(":")[0])
    if function is None:
        raise TextRefusal(404, "model_not_found", f"there is no model '{model}' for this", "model")
    return function


def _pieces(made: Any) -> Iterable[str]:
    if made is None:
        return []
    return _WORDS.findall(made) if isinstance(made, str) else cast(Iterable[str], made)


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _json(value: object) -> tuple[str, bytes]:
    return "application/json", json.dumps(value).encode()
