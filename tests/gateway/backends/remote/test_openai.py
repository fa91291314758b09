from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from inferway_gateway.backends.remote import openai
from inferway_gateway.core.errors import InvalidTensorError, UpstreamError
from inferway_gateway.core.tensors import TensorSpec
from inferway_gateway.core.upstream import RemoteSpec

EMBED = RemoteSpec("up", "m", operation="embeddings")
CHAT = RemoteSpec("up", "m", operation="chat", parameters={"max_tokens": 5})
COMPLETE = RemoteSpec("up", "m", operation="completions")


def texts(*items: str) -> Any:
    found = np.empty(len(items), object)
    found[:] = items
    return found


def test_embeddings_have_a_row_for_each_text() -> None:
    signature = openai.signature(EMBED)
    assert signature.batched
    assert openai.signature(RemoteSpec("up", "m", operation="embeddings", dimensions=3)).outputs == (
        TensorSpec("embedding", "FP32", (-1, 3)),
    )
    sent = json.loads(openai.encode_request(EMBED, {"text": texts("a", "b")}))
    assert sent == {"model": "m", "input": ["a", "b"], "encoding_format": "float"}
    body = json.dumps({"data": [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2.5]}]}).encode()
    found = openai.decode_answer(EMBED, body, 2)
    np.testing.assert_array_equal(found, np.array([[1, 2.5], [3, 4]], np.float32))


WRONG_EMBEDDINGS = {
    "not-json": b"<",
    "no-object": b"[]",
    "too-few": {"data": [{"embedding": [1]}]},
    "twice": {"data": [{"index": 0, "embedding": [1]}] * 2},
    "out-of-range": {"data": [{"index": 0, "embedding": [1]}, {"index": 7, "embedding": [1]}]},
    "no-numbers": {"data": [{"embedding": ["1"]}, {"embedding": [1]}]},
    "lengths": {"data": [{"embedding": [1, 2]}, {"embedding": [1]}]},
    "base64": {"data": [{"embedding": "AAAA"}, {"embedding": "AAAA"}]},
    "too-large": {"data": [{"embedding": [10**400]}, {"embedding": [1]}]},
}


@pytest.mark.parametrize("name", WRONG_EMBEDDINGS)
def test_wrong_embeddings_are_an_error_of_the_upstream(name: str) -> None:
    body = WRONG_EMBEDDINGS[name]
    with pytest.raises(UpstreamError):
        openai.decode_answer(EMBED, body if isinstance(body, bytes) else json.dumps(body).encode(), 2)


def test_other_dimensions_than_promised_are_an_error() -> None:
    remote = RemoteSpec("up", "m", operation="embeddings", dimensions=3)
    with pytest.raises(UpstreamError, match="embeddings of 3 length"):
        openai.decode_answer(remote, b'{"data":[{"embedding":[1,2]}]}', 1)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("hello", [{"role": "user", "content": "hello"}]),
        ('[{"role": "system", "content": "x"}]', [{"role": "system", "content": "x"}]),
        ("[sic] hello", [{"role": "user", "content": "[sic] hello"}]),
    ],
    ids=["text", "messages", "bracket"],
)
def test_a_chat_takes_messages_or_a_text(text: str, messages: Any) -> None:
    sent = json.loads(openai.encode_request(CHAT, {"messages": texts(text)}))
    assert sent == {"model": "m", "messages": messages, "stream": False, "max_tokens": 5}


@pytest.mark.parametrize("text", ["[]", "[1]", '[{"content": "x"}]'])
def test_an_array_of_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidTensorError):
        openai.encode_request(CHAT, {"messages": texts(text)})


def test_the_first_choice_is_the_answer() -> None:
    assert openai.decode_answer(CHAT, b'{"choices":[{"message":{"content":"hi"}}]}', 1).tolist() == ["hi"]
    assert openai.decode_answer(COMPLETE, b'{"choices":[{"text":"hi"}]}', 1).tolist() == ["hi"]
    assert json.loads(openai.encode_request(COMPLETE, {"prompt": texts("x")}))["prompt"] == "x"


@pytest.mark.parametrize("body", [b"{}", b'{"choices":[]}', b'{"choices":[{"message":null}]}', b'{"choices":[{}]}'])
def test_an_answer_without_a_text_is_an_error_of_the_upstream(body: bytes) -> None:
    for remote in (CHAT, COMPLETE):
        with pytest.raises(UpstreamError, match="expected a text"):
            openai.decode_answer(remote, body, 1)
