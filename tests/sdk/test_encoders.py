"""Vectors, rankings and classes of texts: what goes over the wire, and what comes back."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

import inferway
from inferway import _encoding
from inferway._options import Timeout
from scripted import Answer, ScriptedServer, Seen, Side, as_json

USAGE = {"prompt_tokens": 4, "total_tokens": 4}


def lengths(seen: Seen) -> Answer:
    """Vectors that say how long each text is, the last one first."""
    texts = seen.json["input"]
    texts = [texts] if isinstance(texts, str) else texts
    data = [
        {"object": "embedding", "index": index, "embedding": packed(len(text), index)}
        for index, text in enumerate(texts)
    ]
    return as_json({"object": "list", "data": data[::-1], "model": "minilm", "usage": USAGE})


def packed(*values: float) -> str:
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    "texts",
    [["a", "bb", "ccc"], ("a", "bb", "ccc"), np.array(["a", "bb", "ccc"]), np.array([["a"], ["bb"], ["ccc"]], object),
     pd.Series(["a", "bb", "ccc"]), pd.DataFrame({"t": ["a", "bb", "ccc"]}), pl.Series(["a", "bb", "ccc"]),
     pl.DataFrame({"t": ["a", "bb", "ccc"]})],
    ids=["list", "tuple", "array", "column", "series", "frame", "polars series", "polars frame"],
)  # fmt: skip
async def test_texts_of_any_kind_become_vectors_in_their_order(server: ScriptedServer, side: Side, texts: Any) -> None:
    server.otherwise = lengths
    client = side.client(server.url)
    vectors = await side(lambda: client.embed(texts, model="minilm"))
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[1, 0], [2, 1], [3, 2]]
    assert server.seen[0].json == {"model": "minilm", "input": ["a", "bb", "ccc"], "encoding_format": "base64"}
    assert server.seen[0].path == "/v1/embeddings"


async def test_one_text_is_one_row_and_none_is_no_request(server: ScriptedServer, side: Side) -> None:
    server.otherwise = lengths
    client = side.client(server.url)
    assert (await side(lambda: client.embed("abc", model="minilm"))).shape == (1, 2)
    assert (await side(lambda: client.embed(iter(["a", "b"]), model="minilm"))).shape == (2, 2)
    assert (await side(lambda: client.embed([], model="minilm"))).shape == (0, 0)
    assert len(server.seen) == 2


async def test_many_texts_are_several_requests(
    server: ScriptedServer, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_encoding, "MAX_TEXTS", 4)
    monkeypatch.setattr(_encoding, "MAX_CHARACTERS", 20)
    server.otherwise = lengths
    client = side.client(server.url, timeout=Timeout(total=50))
    texts = ["x" * length for length in (1, 2, 3, 4, 5, 15, 30, 1, 1)]
    vectors = await side(lambda: client.embed(texts, model="minilm", dimensions=2, idempotency_key="k"))
    assert vectors[:, 0].tolist() == [1, 2, 3, 4, 5, 15, 30, 1, 1]
    assert [len(seen.json["input"]) for seen in server.seen] == [4, 2, 1, 2]
    assert [seen.headers["idempotency-key"] for seen in server.seen] == ["k", "k.1", "k.2", "k.3"]
    assert all(seen.json["dimensions"] == 2 for seen in server.seen)
    # What is left of the time that was granted for all of them.
    assert int(server.seen[-1].headers["inferway-timeout-ms"]) < 50_000


async def test_vectors_of_two_versions_are_not_mixed(
    server: ScriptedServer, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_encoding, "MAX_TEXTS", 1)
    for vector in (packed(1), packed(1, 2)):
        server.script.append(as_json({"data": [{"index": 0, "embedding": vector}], "model": "m"}))
    client = side.client(server.url)
    with pytest.raises(inferway.InvalidInputError, match="the model changed"):
        await side(lambda: client.embed(["a", "b"], model="m"))


@pytest.mark.parametrize(
    ("given", "sent", "count"),
    [
        ("a", "a", 1),
        (["a", "b"], ["a", "b"], 2),
        ([1, 2], [1, 2], 1),
        ([[1, 2], (3,)], [[1, 2], [3]], 2),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]], 2),
        ([np.int64(7)], [7], 1),
    ],
    ids=["text", "texts", "ids", "lists of ids", "array of ids", "numpy ids"],
)
async def test_a_request_may_have_token_ids(
    server: ScriptedServer, side: Side, given: Any, sent: Any, count: int
) -> None:
    rows = [{"index": index, "embedding": [0.5, 1.0]} for index in range(count)]
    server.script = [as_json({"data": rows, "model": "m", "usage": USAGE, "more": 1})]
    client = side.client(server.url)
    found = await side(lambda: client.embeddings.create(given, model="m", user="me"))
    assert server.seen[0].json["input"] == sent
    assert server.seen[0].json["user"] == "me"
    assert found.vectors.tolist() == [[0.5, 1.0]] * count
    assert (found.usage.prompt_tokens, found.model, found.raw["more"], len(found)) == (4, "m", 1, count)
    assert repr(found) == f"<EmbeddingResult of m, {count} of 2 dimensions>"


async def test_what_texts_are_for_is_said_with_each_request(
    server: ScriptedServer, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_encoding, "MAX_TEXTS", 1)
    one = as_json({"data": [{"index": 0, "embedding": [0.5]}], "model": "m", "usage": USAGE})
    server.script = [one, one, one]
    client = side.client(server.url)
    await side(lambda: client.embed(["a", "b"], model="m", input_type="document", dimensions=1))
    await side(lambda: client.embeddings.create("a", model="m", input_type="query"))
    assert [seen.json["input_type"] for seen in server.seen] == ["document", "document", "query"]
    assert [seen.json.get("dimensions") for seen in server.seen] == [1, 1, None]


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "embedding": packed(1)}],
        [{"index": 0, "embedding": packed(1)}, {"index": 0, "embedding": packed(1)}],
        [{"index": 0, "embedding": packed(1)}, {"index": 7, "embedding": packed(1)}],
        [{"index": 0, "embedding": packed(1)}, {"index": 1, "embedding": packed(1, 2)}],
        [{"index": 0, "embedding": packed(1)}, {"index": 1, "embedding": "AAAA"}],
        [{"index": 0, "embedding": packed(1)}, {"index": 1, "embedding": "!"}],
        [{"index": 0, "embedding": packed(1)}, {"index": 1, "embedding": None}],
        [{"index": 0, "embedding": packed(1)}, {"index": 1, "embedding": [[1]]}],
        [{"index": 0, "embedding": packed(1)}, {"index": 1, "embedding": ["x"]}],
        None,
    ],
    ids=["few", "twice", "beyond", "ragged", "odd bytes", "no base64", "nothing", "nested", "words", "no data"],
)
async def test_vectors_that_are_none_are_refused(server: ScriptedServer, side: Side, data: Any) -> None:
    server.script = [as_json({"data": data, "model": "m"})]
    client = side.client(server.url)
    with pytest.raises(inferway.APIResponseValidationError):
        await side(lambda: client.embeddings.create(["a", "b"], model="m"))


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a", None], r"texts\[1\] expects a text, got NoneType"),
        (pd.Series(["a", None, "b"]), r"texts\[1\]"),
        (pl.Series(["a", None]), "has nulls"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), "one column"),
        ({"a": 1}, "a text or several, got dict"),
        (3, "a text or several, got int"),
        ([b"a"], r"texts\[0\] expects a text, got bytes"),
    ],
    ids=["none", "pandas null", "polars null", "columns", "mapping", "number", "bytes"],
)
async def test_what_is_no_text_is_refused_before_it_is_sent(
    server: ScriptedServer, side: Side, texts: Any, words: str
) -> None:
    client = side.client(server.url)
    with pytest.raises(inferway.InvalidInputError, match=words):
        await side(lambda: client.embed(texts, model="m"))
    assert server.seen == []


async def test_documents_are_ranked(server: ScriptedServer, side: Side) -> None:
    results = [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": -2}]
    body = {"id": "r", "model": "ce", "method": "cross-encoder", "results": results, "usage": USAGE}
    server.script = [as_json(body), as_json(body)]
    client = side.client(server.url)
    found = await side(lambda: client.rerank("q", pd.Series(["a", "b"]), model="ce", top_n=2, return_documents=True))
    assert [(each.index, each.score, each.document) for each in found] == [(1, 0.9, "b"), (0, -2.0, "a")]
    assert (found.method, found.model, len(found), found.usage.total_tokens) == ("cross-encoder", "ce", 2, 4)
    assert server.seen[0].path == "/v1/rerank"
    assert server.seen[0].json == {"model": "ce", "query": "q", "documents": ["a", "b"], "top_n": 2}
    raw = await side(lambda: client.with_raw_response.rerank("q", ["a", "b"], model="ce"))
    assert raw.parse().results[0].document is None


async def test_texts_are_classified(server: ScriptedServer, side: Side) -> None:
    def one(index: int, label: str) -> dict[str, Any]:
        scores = [{"label": label, "score": 0.9}, {"label": "other", "score": 0.1}]
        return {"object": "classification", "index": index, "label": label, "score": 0.9, "scores": scores}

    server.script = [as_json({"id": "c", "model": "cl", "data": [one(1, "bad"), one(0, "good")], "usage": USAGE})]
    client = side.client(server.url)
    found = await side(lambda: client.classify(["yes", "no"], model="cl", top_k=2, activation="sigmoid"))
    assert found.labels == ["good", "bad"]
    assert next(iter(found)).scores == {"good": 0.9, "other": 0.1}
    assert (found.results[1].score, len(found), found.model) == (0.9, 2, "cl")
    assert server.seen[0].path == "/v1/classify"
    assert server.seen[0].json == {"model": "cl", "input": ["yes", "no"], "top_k": 2, "activation": "sigmoid"}


@pytest.mark.parametrize(
    ("results", "words"),
    [([{"index": 2, "relevance_score": 1}], "ranks a document 2"), ([{"index": 0}], "to be a number"), (None, "list")],
    ids=["beyond", "no score", "nothing"],
)
async def test_rankings_that_are_none_are_refused(server: ScriptedServer, side: Side, results: Any, words: str) -> None:
    server.script = [as_json({"results": results, "model": "ce", "method": "x"})]
    client = side.client(server.url)
    with pytest.raises(inferway.APIResponseValidationError, match=words):
        await side(lambda: client.rerank("q", ["a"], model="ce"))


async def test_wrong_arguments_are_refused(server: ScriptedServer, side: Side) -> None:
    client = side.client(server.url)
    wrong: Any = 3
    with pytest.raises(inferway.InvalidInputError, match="query expects"):
        await side(lambda: client.rerank(wrong, ["a"], model="m"))
    with pytest.raises(inferway.ConfigurationError, match="top_k expects"):
        await side(lambda: client.classify(["a"], model="m", top_k="x"))
    with pytest.raises(inferway.ConfigurationError, match="model's name"):
        await side(lambda: client.embed(["a"], model=wrong))
    assert server.seen == []
