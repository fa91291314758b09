"""OpenAI-compatible servers seen as tensors.

    embeddings    text BYTES [n]                 ->  embedding FP32 [n, d]
    chat          messages BYTES [1]             ->  answer BYTES [1]
    completions   prompt BYTES [1]               ->  answer BYTES [1]

``messages`` is either a JSON array of messages or the text of one message of the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from ...core.errors import InvalidTensorError, UpstreamError
from ...core.tensors import Arrays, Signature, TensorSpec
from ...core.upstream import RemoteSpec
from .oip import parse_json

PATHS: Final = {"embeddings": "/embeddings", "chat": "/chat/completions", "completions": "/completions"}
MAX_MESSAGES: Final = 10_000


def signature(remote: RemoteSpec) -> Signature:
    """What a version takes and gives."""
    if remote.operation == "embeddings":
        return Signature(
            (TensorSpec("text", "BYTES", (-1,)),),
            (TensorSpec("embedding", "FP32", (-1, remote.dimensions or -1)),),
            batched=True,
        )
    name = "messages" if remote.operation == "chat" else "prompt"
    return Signature((TensorSpec(name, "BYTES", (1,)),), (TensorSpec("answer", "BYTES", (1,)),))


def encode_request(remote: RemoteSpec, inputs: Arrays) -> bytes:
    """Write a request.

    Raises:
        InvalidTensorError: ``messages`` begins as a JSON array and is none of messages.
    """
    body: dict[str, Any] = {**remote.parameters, "model": remote.model}
    if remote.operation == "embeddings":
        body |= {"input": inputs["text"].tolist(), "encoding_format": "float"}
        if remote.dimensions is not None and "dimensions" in remote.parameters:
            body["dimensions"] = remote.dimensions
    elif remote.operation == "chat":
        body |= {"messages": _messages(inputs["messages"].item()), "stream": False}
    else:
        body |= {"prompt": inputs["prompt"].item(), "stream": False}
    return orjson.dumps(body)


def decode_answer(remote: RemoteSpec, body: bytes | bytearray, rows: int) -> NDArray[Any]:
    """Read the one output of an answer.

    Raises:
        UpstreamError: the answer is not what the protocol has.
    """
    found = parse_json(body)
    if remote.operation == "embeddings":
        return _embeddings(found.get("data"), rows, remote.dimensions)
    choices = found.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) and remote.operation == "chat" else first
    key = "content" if remote.operation == "chat" else "text"
    text = message.get(key) if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise UpstreamError("expected a text as the first choice of the upstream's answer")
    answer = np.empty(1, dtype=object)
    answer[0] = text
    return answer


def _messages(text: str) -> Sequence[Mapping[str, Any]]:
    if not text.lstrip().startswith("["):
        return [{"role": "user", "content": text}]
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        # A text may well begin with a bracket.
        return [{"role": "user", "content": text}]
    if not found or len(found) > MAX_MESSAGES or not all(isinstance(m, dict) and "role" in m for m in found):
        raise InvalidTensorError("input 'messages' expects a JSON array of messages with a role, or the user's text")
    messages: Sequence[Mapping[str, Any]] = found
    return messages


def _embeddings(data: Any, rows: int, dimensions: int | None) -> NDArray[Any]:
    if not isinstance(data, list) or len(data) != rows:
        raise UpstreamError(f"expected {rows} embeddings in the upstream's answer")
    found: list[Any] = [None] * rows
    for i, item in enumerate(data):
        at = item.get("index", i) if isinstance(item, dict) else -1
        if type(at) is not int or not 0 <= at < rows or found[at] is not None:
            raise UpstreamError("expected each embedding once in the upstream's answer")
        vector = item.get("embedding")
        if not isinstance(vector, list) or set(map(type, vector)) - {int, float}:
            raise UpstreamError("expected an embedding as an array of numbers in the upstream's answer")
        found[at] = vector
    lengths = {len(vector) for vector in found} or {dimensions or 0}
    if len(lengths) != 1 or (dimensions is not None and lengths != {dimensions}):
        raise UpstreamError(f"expected embeddings of {dimensions or 'one'} length in the upstream's answer")
    try:
        return np.array(found, np.float32).reshape(rows, lengths.pop())
    except (OverflowError, ValueError):
        raise UpstreamError("expected numbers of FP32 as embeddings in the upstream's answer") from None
