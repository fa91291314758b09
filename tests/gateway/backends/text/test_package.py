"""What lies beside a graph and makes it a text encoder, and what does not fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import models
import text_models
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.backends.text import read_package
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.encoding import TextPackage
from inferway_gateway.core.errors import ModelLoadError
from inferway_gateway.store.repository import ModelRepository

Files = dict[str, bytes | Mapping[str, Any]]


def read(tmp_path: Path, files: Mapping[str, bytes | Mapping[str, Any]]) -> TextPackage | None:
    """The package of a model of the folder with these files; mappings become JSON."""
    folder = tmp_path / "models" / "some"
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    found = ModelRepository(tmp_path / "models").scan()["some"]
    assert found.error is None, found.error
    artifact: Artifact = found.artifact(1)
    backend = OnnxBackend(("CPUExecutionProvider",), cpus=1, trial_budget_s=0.0)
    session = backend.open(artifact)
    try:
        return read_package(artifact, session.signature)
    finally:
        session.close()


TOKENS: Files = {"model.onnx": models.masked_mean(8, 100), "tokenizer.json": text_models.tokenizer()}


def declared(**text: Any) -> Files:
    return {"inferway.toml": text_models.toml(text=text)}


SENTENCE_TRANSFORMERS: Files = {
    "modules.json": json.dumps(
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]
    ).encode(),
    "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_cls_token": True,
                              "pooling_mode_mean_tokens": False},
    "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {"query": "w1 "}, "default_prompt_name": None},
}  # fmt: skip


def test_the_files_of_sentence_transformers_need_no_declaration(tmp_path: Path) -> None:
    package = read(tmp_path, {**TOKENS, **SENTENCE_TRANSFORMERS})
    assert package is not None
    spec = package.spec
    assert (spec.task, spec.output, spec.pooling, spec.normalise) == ("embeddings", "tokens", "cls", True)
    assert (spec.max_tokens, spec.width, dict(spec.prompts)) == (24, 8, {"query": "w1 "})
    [padding] = package.config.batching.padding
    assert padding.inputs == {"input_ids": 1, "attention_mask": 1}
    assert padding.outputs == {"tokens": 1}


def test_a_declaration_goes_before_the_files(tmp_path: Path) -> None:
    text = declared(pooling="mean", normalise=False, max_tokens=12, long_text="chunk", dimensions=[4, 2])
    package = read(tmp_path, {**TOKENS, **SENTENCE_TRANSFORMERS, **text})
    assert package is not None
    spec = package.spec
    assert (spec.pooling, spec.normalise, spec.max_tokens, spec.long_text) == ("mean", False, 12, "chunk")
    assert spec.dimensions == (4, 2)


def test_files_beside_the_versions_belong_to_each_of_them(tmp_path: Path) -> None:
    files: Files = {**TOKENS, **SENTENCE_TRANSFORMERS}
    files["1/model.onnx"] = files.pop("model.onnx")
    package = read(tmp_path, files)
    assert package is not None
    assert package.spec.pooling == "cls"


@pytest.mark.parametrize(
    ("config", "task", "labels", "activation"),
    [
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "bad", "1": "good", "2": "so"}},
         "classify", ("bad", "good", "so"), "softmax"),
        ({"architectures": ["XForSequenceClassification"], "problem_type": "multi_label_classification"},
         "classify", ("LABEL_0", "LABEL_1", "LABEL_2"), "sigmoid"),
    ],
    ids=["labels", "several labels"],
)  # fmt: skip
def test_a_classifier_is_known_by_its_config(
    tmp_path: Path, config: dict[str, Any], task: str, labels: tuple[str, ...], activation: str
) -> None:
    files: Files = {
        "model.onnx": text_models.logits(3),
        "tokenizer.json": text_models.tokenizer(),
        "config.json": config,
    }
    package = read(tmp_path, files)
    assert package is not None
    assert (package.spec.task, package.spec.labels, package.spec.activation) == (task, labels, activation)


def test_one_logit_makes_a_cross_encoder(tmp_path: Path) -> None:
    config = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    files: Files = {
        "model.onnx": text_models.logits(1),
        "tokenizer.json": text_models.tokenizer(),
        "config.json": config,
    }
    package = read(tmp_path, files)
    assert package is not None
    assert (package.spec.task, package.spec.activation) == ("rerank", "none")


def test_a_model_without_a_tokenizer_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, {"model.onnx": TOKENS["model.onnx"]}) is None


def test_a_graph_over_something_else_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, {"model.onnx": models.add_one(), "tokenizer.json": b"anything"}) is None


def test_a_graph_of_which_nothing_says_what_it_is_for_stays_one_of_tensors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(tmp_path, TOKENS) is None
    assert "declare [text] pooling in inferway.toml" in caplog.text


def test_without_the_library_it_is_served_as_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert read(tmp_path, {**TOKENS, **SENTENCE_TRANSFORMERS}) is None
    assert "pip install 'inferway[language]'" in caplog.text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model.onnx": TOKENS["model.onnx"], **declared(task="embeddings")}, "no tokenizer.json"),
        ({**TOKENS, "model.onnx": models.add_one(), **declared(task="embeddings")}, "expected 'input_ids'"),
        ({**TOKENS, **declared(task="embeddings")}, "declare .text. pooling"),
        ({**TOKENS, **declared(output="else")}, "names 'else'"),
        ({**TOKENS, **declared(output="pooled", pooling="mean", task="embeddings")}, "needs a vector for each token"),
        ({**TOKENS, **declared(task="classify", output="pooled", labels=["a", "b"])}, "2 labels, output .pooled. has"),
        ({**TOKENS, **declared(task="rerank", output="pooled")}, "needs one number a row"),
        ({**TOKENS, **declared(task="embeddings", pooling="mean", dimensions=[16])}, "go to 16, the vectors have 8"),
        ({**TOKENS, **declared(task="classify", output="pooled", long_text="chunk")}, "long_text chunk is for embed"),
        ({**TOKENS, **declared(task="embeddings", pooling="mean", max_tokens=2)}, "leave no room"),
        ({**TOKENS, **declared(task="embeddings", pooling="mean"), "tokenizer.json": b"{"}, "not JSON"),
        ({**TOKENS, **SENTENCE_TRANSFORMERS, "1_Pooling/config.json": {"pooling_mode_weightedmean_tokens": True}},
         "asks for weightedmean_tokens"),
        ({**TOKENS, **SENTENCE_TRANSFORMERS, "modules.json": b'[{"type": "a.Pooling", "path": "1_Pooling"}, '
          b'{"type": "a.Dense"}]'}, "a step Dense"),
        ({**TOKENS, **SENTENCE_TRANSFORMERS, "config.json": b"{"}, "config.json is not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_does_not_fit_is_refused_at_load(tmp_path: Path, files: Files, words: str) -> None:
    with pytest.raises(ModelLoadError, match=r"failed to load 'some' version 1: .*" + words):
        read(tmp_path, files)


def test_a_link_out_of_the_repository_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "secret.json"
    elsewhere.write_text("{}")
    folder = tmp_path / "models" / "some"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").symlink_to(elsewhere)
    assert read(tmp_path, {"model.onnx": TOKENS["model.onnx"]}) is None


@pytest.mark.parametrize("place", ["a" * 100_000, "a\0b", "../../../../etc"], ids=["long", "nul", "outside"])
def test_a_module_that_is_nowhere_is_refused_in_words(tmp_path: Path, place: str) -> None:
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": place}]
    files = {**text_models.embedder(), "modules.json": json.dumps(modules).encode()}
    files.pop("inferway.toml", None)
    with pytest.raises(ModelLoadError, match="asks for nothing"):
        read(tmp_path, files)
