"""`/v1/embeddings`, `/v1/rerank` and `/v1/classify` on a live gateway, with models of the folder and deployed ones."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

import models
import text_models
from deploying import deploy
from inferway import Inferway
from live import LiveGateway, run_gateway
from models import ModelFiles

TABLE = text_models.table()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("texts")

    def files(content: dict[str, bytes]) -> ModelFiles:
        model = content.pop("model.onnx")
        config = content.pop("inferway.toml")
        return ModelFiles({1: model}, files={**content, "inferway.toml": config})

    repository = models.write_repository(
        root / "models",
        {
            "embed": files(text_models.embedder(dimensions="any", prompts={"query": "w9 "})),
            "rank": files(text_models.scorer(1, task="rerank", activation="none")),
            "label": files(text_models.scorer(3, task="classify", labels=["a", "b", "c"])),
            "plain": models.add_one(),
            "strings": text_models.strings(),
            "isolated": files(
                {
                    **text_models.embedder(),
                    "inferway.toml": b'isolation = "worker"\n' + text_models.embedder()["inferway.toml"],
                }
            ),
        },
    )
    with run_gateway(repository, root / "state") as running:
        yield running


def mean(*words: int) -> Any:
    return TABLE[[2, *(w + 4 for w in words), 3]].mean(axis=0)


def post(gateway: LiveGateway, path: str, key: str = "", **body: Any) -> tuple[int, Any, Any]:
    return gateway.call("POST", f"/v1/{path}", body, key=key)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("w1 w2", [mean(1, 2)]),
        (["w1 w2", "w3"], [mean(1, 2), mean(3)]),
        ([5, 6], [mean(1, 2)]),
        ([[5, 6], [7]], [mean(1, 2), mean(3)]),
    ],
    ids=["a text", "texts", "token ids", "lists of token ids"],
)
@pytest.mark.parametrize("encoding", ["float", "base64", None])
@pytest.mark.parametrize("model", ["embed", "isolated"])
def test_each_form_of_input_and_of_answer(
    texts: LiveGateway, given: Any, expected: Any, encoding: str | None, model: str
) -> None:
    status, answer, headers = post(texts, "embeddings", model=model, input=given, encoding_format=encoding, user=None)
    assert status == 200, answer
    assert (answer["object"], answer["model"]) == ("list", model)
    assert headers["Inferway-Model-Version"] == "1"
    assert headers["X-Request-Id"]
    assert [entry["index"] for entry in answer["data"]] == list(range(len(expected)))
    vectors = [entry["embedding"] for entry in answer["data"]]
    if encoding == "base64":
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    assert_allclose(vectors, expected, atol=1e-6)
    tokens = 7 if len(expected) == 2 else 4
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_dimensions_and_prompts(texts: LiveGateway) -> None:
    status, answer, _ = post(texts, "embeddings", model="embed", input="w1", dimensions=3, input_type="query")
    assert status == 200, answer
    assert_allclose(answer["data"][0]["embedding"], mean(9, 1)[:3], atol=1e-6)


def test_a_model_or_a_pipeline_that_takes_texts_themselves_embeds(texts: LiveGateway) -> None:
    steps = b"""
    [[steps]]
    name = "read"
    model = "strings"
    inputs = { text = "text" }

    [outputs]
    vector = "read.vector"
    """
    deploy(texts, "piped", {"pipeline.toml": steps}, alias="stable")
    for model in ("strings", "piped"):
        status, answer, _ = post(texts, "embeddings", model=model, input=["w1", "nothing", "w2"])
        assert status == 200, answer
        assert [entry["embedding"] for entry in answer["data"]] == [[5, 50], [0, 0], [6, 60]]
        status, answer, _ = post(texts, "embeddings", model=model, input=[1, 2])
        assert (status, answer["error"]["param"]) == (400, "input")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("embeddings", {"model": "embed"}, "input"),
        ("embeddings", {"model": "embed", "input": ""}, "input"),
        ("embeddings", {"model": "embed", "input": []}, "input"),
        ("embeddings", {"model": "embed", "input": ["w1", ""]}, "input[1]"),
        ("embeddings", {"model": "embed", "input": [[]]}, "input[0]"),
        ("embeddings", {"model": "embed", "input": [5, 100]}, "input"),
        ("embeddings", {"model": "embed", "input": [[5], [-1]]}, "input[1][0]"),
        ("embeddings", {"model": "embed", "input": {"text": "w1"}}, "input"),
        ("embeddings", {"model": "embed", "input": ["w1"] * 2049}, "input"),
        ("embeddings", {"model": "embed", "input": "w1 " * 40}, "input"),
        ("embeddings", {"model": "embed", "input": "w1", "dimensions": 9}, "dimensions"),
        ("embeddings", {"model": "embed", "input": "w1", "dimensions": 0}, "dimensions"),
        ("embeddings", {"model": "embed", "input": "w1", "encoding_format": "hex"}, "encoding_format"),
        ("embeddings", {"model": "embed", "input": "w1", "input_type": "else"}, "input_type"),
        ("embeddings", {"model": "plain", "input": "w1"}, "model"),
        ("embeddings", {"model": "rank", "input": "w1"}, "model"),
        ("rerank", {"model": "rank", "query": "w1", "documents": []}, "documents"),
        ("rerank", {"model": "rank", "query": "", "documents": ["w1"]}, "query"),
        ("rerank", {"model": "rank", "query": "w1", "documents": ["w1", ""]}, "documents[1]"),
        ("rerank", {"model": "rank", "query": "w1", "documents": ["w1"], "top_n": 0}, "top_n"),
        ("rerank", {"model": "label", "query": "w1", "documents": ["w1"]}, "model"),
        ("classify", {"model": "label", "input": "w1", "top_k": 0}, "top_k"),
        ("classify", {"model": "label", "input": "w1", "activation": "relu"}, "activation"),
        ("classify", {"model": "embed", "input": "w1"}, "model"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_a_400_that_names_the_field(
    texts: LiveGateway, path: str, body: dict[str, Any], param: str
) -> None:
    status, answer, _ = post(texts, path, **body)
    assert status == 400, answer
    assert answer["error"]["param"] == param, answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]


@pytest.mark.parametrize("route", ["embeddings", "rerank"])
def test_an_encoder_has_no_adapters(texts: LiveGateway, route: str) -> None:
    body = {"input": "w1"} if route == "embeddings" else {"query": "w1", "documents": ["w2"]}
    status, answer, _ = post(texts, route, model="embed:other", **body)
    assert status == 404
    assert "no adapter 'other'" in answer["error"]["message"]


def test_a_megabyte_of_text_is_refused_and_nothing_else_waits_for_it(texts: LiveGateway) -> None:
    status, answer, _ = post(texts, "embeddings", model="embed", input="w1 " * 330_000)
    assert status == 400
    assert "got 330002" in answer["error"]["message"]


def test_documents_come_back_by_falling_score(texts: LiveGateway) -> None:
    documents: list[Any] = ["w1", {"text": "w90 w91"}, "w40"]
    status, answer, _ = post(texts, "rerank", model="rank", query="w2", documents=documents, return_documents=True)
    assert status == 200, answer
    assert answer["method"] == "cross-encoder"
    assert [result["index"] for result in answer["results"]] == [1, 2, 0]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["results"][0]["document"] == {"text": "w90 w91"}
    assert answer["usage"]["total_tokens"] == 5 + 6 + 5


def test_top_n_keeps_the_best_and_an_embedder_says_that_it_is_one(texts: LiveGateway) -> None:
    status, answer, _ = post(texts, "rerank", model="isolated", query="w2", documents=["w50", "w2", "w7"], top_n=1)
    assert status == 200, answer
    assert answer["method"] == "embedding"
    [best] = answer["results"]
    assert best["index"] == 1
    assert best["relevance_score"] == pytest.approx(1)
    assert "document" not in best


def test_labels_come_with_their_scores(texts: LiveGateway) -> None:
    status, answer, _ = post(texts, "classify", model="label", input=["w1", "w2"], top_k=2)
    assert status == 200, answer
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    for entry in answer["data"]:
        assert (entry["label"], entry["score"]) == ("c", entry["scores"][0]["score"])
        assert [score["label"] for score in entry["scores"]] == ["c", "b"]
    assert_allclose(answer["data"][0]["score"], np.exp(2) / np.exp([0, 1, 2]).sum(), atol=1e-6)
    status, raw, _ = post(texts, "classify", model="label", input="w1", activation="none")
    assert [score["score"] for score in raw["data"][0]["scores"]] == pytest.approx([2.001, 1.001, 0.001], abs=1e-4)


def test_a_key_sees_its_own_models_only_and_needs_the_scope(texts: LiveGateway) -> None:
    assert post(texts, "embeddings", key=texts.make_key("infer", models=["em*"]), model="embed", input="w1")[0] == 200
    assert post(texts, "embeddings", key=texts.make_key("infer", models=["x*"]), model="embed", input="w1")[0] == 404
    assert post(texts, "embeddings", key=texts.make_key("read"), model="embed", input="w1")[0] == 403


def test_a_deployed_encoder_runs_in_a_worker_and_is_called_by_its_alias(texts: LiveGateway) -> None:
    deploy(texts, "sent", {**text_models.embedder(), "notes/about.txt": b"two folders"}, alias="stable")
    for target in ("sent", "sent@stable"):
        status, answer, headers = post(texts, "embeddings", model=target, input=["w1", "w2 w3"])
        assert status == 200, answer
        assert headers["Inferway-Model-Version"] == "1"
        assert_allclose([entry["embedding"] for entry in answer["data"]], [mean(1), mean(2, 3)], atol=1e-6)
    status, answer, _ = texts.call("GET", "/api/v1/models/sent/versions/1")
    assert (answer["isolation"], answer["state"]) == ("worker", "READY")


def test_aliases_share_out_and_keep_users_and_copies_are_compared(texts: LiveGateway) -> None:
    deploy(texts, "aliased", text_models.embedder(), alias="stable")
    deploy(texts, "aliased", {**text_models.embedder(), "notes.txt": b"another version"}, alias=None)
    path = "/api/v1/models/aliased/aliases/stable"
    status, answer, _ = texts.call("PUT", path, {"weights": {"1": 50, "2": 50}, "sticky": "header:X-User"})
    assert status == 200, answer

    def version(user: int) -> str:
        status, answer, headers = texts.call(
            "POST", "/v1/embeddings", {"model": "aliased", "input": "w1"}, headers={"X-User": f"user-{user}"}
        )
        assert status == 200, answer
        return str(headers["Inferway-Model-Version"])

    seen = [version(user) for user in range(30)]
    assert set(seen) == {"1", "2"}
    assert [version(user) for user in range(30)] == seen
    status, answer, _ = texts.call("PUT", path, {"version": 1, "shadow": {"version": 2}})
    assert status == 200, answer
    for _ in range(5):
        assert post(texts, "embeddings", model="aliased", input=["w1 w2", "w3"])[0] == 200
    end = time.monotonic() + 30
    while (copies := texts.call("GET", path)[1]["traffic"]["2"])["compared"] + copies["failed"] < 5:
        assert time.monotonic() < end, copies
        time.sleep(0.02)
    assert (copies["compared"], copies["differed"], copies["largest_difference"]) == (5, 0, 0.0)


@pytest.mark.parametrize(
    ("task", "model", "body"),
    [
        ("rerank", {"task": "rerank", "activation": "none"}, {"query": "w1", "documents": ["w2", "w3 w4"]}),
        ("classify", {"task": "classify", "labels": ["a", "b", "c"]}, {"input": "w1"}),
    ],
    ids=["rerank", "classify"],
)
def test_a_shadow_that_answers_otherwise_is_found_and_one_of_another_kind_fails(
    texts: LiveGateway, task: str, model: dict[str, Any], body: dict[str, Any]
) -> None:
    classes = 1 if task == "rerank" else 3
    deploy(texts, f"{task}-two", text_models.scorer(classes, **model), alias="stable")
    other = {**model, "activation": "sigmoid"}
    deploy(texts, f"{task}-two", text_models.scorer(classes, **other), alias=None)
    deploy(texts, f"{task}-two", models.add_one(4), alias=None)
    path = f"/api/v1/models/{task}-two/aliases/stable"
    for shadow, counted in ((2, "differed"), (3, "failed")):
        status, answer, _ = texts.call("PUT", path, {"version": 1, "shadow": {"version": shadow}})
        assert status == 200, answer
        before = answer["traffic"][str(shadow)][counted]
        assert post(texts, task, model=f"{task}-two", **body)[0] == 200
        end = time.monotonic() + 30
        while (copies := texts.call("GET", path)[1]["traffic"][str(shadow)])[counted] == before:
            assert time.monotonic() < end, copies
            time.sleep(0.02)


def test_a_folder_as_sentence_transformers_saves_it_is_deployed_as_it_is(texts: LiveGateway) -> None:
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""},
               {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
               {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}]  # fmt: skip
    weights = text_models.table(4)
    graph, data = text_models.external_table(weights)
    deploy(
        texts,
        "saved",
        {
            "onnx/model.onnx": graph,
            "onnx/model.onnx_data": data,
            "tokenizer.json": text_models.as_bytes(text_models.tokenizer()),
            "modules.json": json.dumps(modules).encode(),
            "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
            "config.json": b'{"max_position_embeddings": 20, "pad_token_id": 0}',
        },
        alias="stable",
    )
    status, answer, _ = post(texts, "embeddings", model="saved", input=["w1 w2"])
    assert status == 200, answer
    expected = weights[[2, 5, 6, 3]].mean(axis=0)
    assert_allclose(answer["data"][0]["embedding"], expected / np.linalg.norm(expected), atol=1e-6)
    status, answer, _ = post(texts, "embeddings", model="saved", input="w1 " * 19)
    assert "at most 20 tokens" in answer["error"]["message"]


def test_the_client_deploys_such_a_folder_and_embeds_with_it(texts: LiveGateway, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(models.masked_mean(8, len(text_models.WORDS)))
    (tmp_path / "tokenizer.json").write_bytes(text_models.as_bytes(text_models.tokenizer()))
    (tmp_path / "inferway.toml").write_bytes(text_models.embedder()["inferway.toml"])
    with Inferway(texts.url, api_key=texts.admin_key) as client:
        client.models.deploy(tmp_path, name="folder")
        assert_allclose(client.embed(["w1 w2"], model="folder"), [mean(1, 2)], atol=1e-6)
        assert client.rerank("w1", ["w2", "w1"], model="folder").results[0].index == 1


def test_the_time_that_a_caller_grants_holds(texts: LiveGateway) -> None:
    status, answer, _ = texts.call(
        "POST", "/v1/embeddings", {"model": "embed", "input": ["w1"]}, headers={"Inferway-Timeout-Ms": "0"}
    )
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")


def test_a_caller_that_leaves_leaves_its_work(texts: LiveGateway) -> None:
    body = json.dumps({"model": "embed", "input": ["w1 " * 20 + f"w{n % 90}" for n in range(2048)]}).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {texts.admin_key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", texts.port)) as connection:
        connection.sendall(head.encode() + body)
    end = time.monotonic() + 20
    while "inferway_callers_gone_total 0" in texts.call("GET", "/metrics")[1]:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert post(texts, "embeddings", model="embed", input="w1")[0] == 200


def test_tokens_and_texts_are_counted(texts: LiveGateway) -> None:
    def counted(name: str) -> float:
        lines = texts.call("GET", "/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model="label"'))

    before = counted("inferway_text_tokens_total"), counted("inferway_texts_total")
    post(texts, "classify", model="label", input=["w1", "w2 w3"])
    assert counted("inferway_text_tokens_total") - before[0] == 7
    assert counted("inferway_texts_total") - before[1] == 2
