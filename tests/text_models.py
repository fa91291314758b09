"""Text encoders in small: tokenizers of a hundred words, and graphs over their ids."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import models
from models import F32, I64, node, value

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(96)))
WIDTH = 8


def tokenizer(**changes: Any) -> dict[str, Any]:
    """The document of a tokenizer for words w0 to w95, with [CLS] before and [SEP] after a text."""
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for i, word in enumerate(WORDS[:4])
        ],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 1}},
            ],
            "special_tokens": {
                name: {"id": name, "ids": [WORDS.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")
            },
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "[UNK]"},
    }  # fmt: skip
    return {**document, **changes}


def as_bytes(document: Any) -> bytes:
    return json.dumps(document).encode()


def embedder(*, max_tokens: int = 32, **options: Any) -> dict[str, bytes]:
    """The files of a model that gives a vector for each token, to be averaged."""
    text = {"task": "embeddings", "output": "tokens", "pooling": "mean", "max_tokens": max_tokens, **options}
    return {
        "model.onnx": models.masked_mean(WIDTH, len(WORDS)),
        "tokenizer.json": as_bytes(tokenizer()),
        "inferway.toml": toml(text=text),
    }


def scorer(classes: int, **options: Any) -> dict[str, bytes]:
    """The files of a model that gives logits for each row: of one class to rank, of several to classify."""
    return {
        "model.onnx": logits(classes),
        "tokenizer.json": as_bytes(tokenizer()),
        "inferway.toml": toml(text={"max_tokens": 16, **options}),
    }


def table(width: int = WIDTH) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The vector of each token, as ``models.masked_mean`` has them."""
    return np.random.default_rng(0).standard_normal((len(WORDS), width)).astype(np.float32)


def logits(classes: int) -> bytes:
    """``input_ids``, ``attention_mask``, ``token_type_ids`` INT64 ``[batch, sequence]`` to ``logits`` FP32
    ``[batch, classes]``: the sum of the ids of the second segment plus a hundredth of that of the first, and for each
    further class one more."""
    return models.model(
        [
            node("Mul", ["input_ids", "attention_mask"], ["own"]),
            node("Cast", ["own"], ["ids"], to=F32),
            node("Cast", ["token_type_ids"], ["types"], to=F32),
            node("Mul", ["types", "much"], ["scaled"]),
            node("Add", ["scaled", "little"], ["weights"]),
            node("Mul", ["ids", "weights"], ["weighted"]),
            node("ReduceSum", ["weighted", "one"], ["total"], keepdims=1),
            node("Add", ["total", "steps"], ["logits"]),
        ],
        [value(n, I64, ["batch", "sequence"]) for n in ("input_ids", "attention_mask", "token_type_ids")],
        [value("logits", F32, ["batch", classes])],
        {
            "one": np.array([1]),
            "much": np.float32(0.0099).reshape(1),
            "little": np.float32(0.0001).reshape(1),
            "steps": np.arange(classes, dtype=np.float32).reshape(1, -1),
        },
    )


def external_table(weights: NDArray[np.float32], location: str = "model.onnx_data") -> tuple[bytes, bytes]:
    """A graph from ids to ``last_hidden_state``, the rows of a table that lies in a file beside it: both of them."""
    tensor = TensorProto(name="table", dims=weights.shape, data_type=F32, data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", "0"), ("length", str(weights.nbytes))):
        tensor.external_data.add(key=key, value=text)
    graph = helper.make_graph(
        [
            node("Gather", ["table", "input_ids"], ["found"]),
            node("Cast", ["attention_mask"], ["mask"], to=F32),
            node("Unsqueeze", ["mask", "last"], ["mask3"]),
            node("Mul", ["found", "mask3"], ["last_hidden_state"]),
        ],
        "g",
        [value(name, I64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask")],
        [value("last_hidden_state", F32, ["batch", "sequence", weights.shape[1]])],
        [tensor, numpy_helper.from_array(np.array([-1]), "last")],
    )
    imports = [helper.make_opsetid("", models.OPSET)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=models.IR_VERSION)
    return proto.SerializeToString(), weights.tobytes()


def strings() -> bytes:
    """Texts themselves to vectors: ``text`` BYTES ``[n]`` to ``vector`` FP32 ``[n, 2]``, whose numbers are 1 and 10
    times the number of the word, 0 for what is no word."""
    nodes = [
        node("LabelEncoder", ["text"], ["number"], domain="ai.onnx.ml", keys_strings=list(WORDS),
             values_floats=[float(i) for i in range(len(WORDS))], default_float=0.0),
        node("Unsqueeze", ["number", "last"], ["column"]),
        node("Mul", ["column", "both"], ["vector"]),
    ]  # fmt: skip
    return models.model(
        nodes,
        [value("text", models.ELEMENT_TYPES["BYTES"], ["batch"])],
        [value("vector", F32, ["batch", 2])],
        {"last": np.array([-1]), "both": np.array([[1.0, 10.0]], np.float32)},
        {"ai.onnx.ml": 3},
    )


def toml(**tables: dict[str, Any]) -> bytes:
    lines = []
    for name, members in tables.items():
        plain = {k: v for k, v in members.items() if not isinstance(v, dict)}
        lines.append(f"[{name}]")
        lines += [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in plain.items()]
        for key, inner in members.items():
            if isinstance(inner, dict):
                lines.append(f"[{name}.{key}]")
                lines += [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in inner.items()]
    return "\n".join(lines).encode()
