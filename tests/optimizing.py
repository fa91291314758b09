"""Small models and rows for tests of `inferway.optimize`; what is right is what the model itself says of a row."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from inferway.build.model import OnnxModel
from inferway.build.optimize import Candidate, OptimizationReport
from inferway.build.optimize.measure import Timing
from inferway.build.optimize.report import mark_pareto
from inferway.build.runtime import open_session
from models import F32, I64, model, node, value

FloatArray = NDArray[np.float32]


def weights(*shape: int, seed: int = 0) -> FloatArray:
    scale = np.prod(shape[:-1]) ** -0.5
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def mlp(inputs: int = 16, width: int = 256, classes: int = 4, *, batch: int | str = "batch") -> bytes:
    """logits = relu(x @ a + b) @ c, FP32 ``[batch, inputs]`` to ``[batch, classes]``."""
    return model(
        [
            node("Gemm", ["x", "a", "b"], ["hidden"], name="first"),
            node("Relu", ["hidden"], ["active"], name="relu"),
            node("MatMul", ["active", "c"], ["logits"], name="second"),
        ],
        [value("x", F32, [batch, inputs])],
        [value("logits", F32, [batch, classes])],
        {"a": weights(inputs, width), "b": weights(1, width, seed=1)[0], "c": weights(width, classes, seed=2)},
    )


def cnn(channels: int = 128, classes: int = 4) -> bytes:
    """logits of a convolution over 8 by 8 images, pooled, FP32 ``[batch, 1, 8, 8]`` to ``[batch, classes]``."""
    return model(
        [
            node("Conv", ["x", "k"], ["maps"], name="conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", ["maps"], ["active"], name="relu"),
            node("GlobalMaxPool", ["active"], ["pooled"], name="pool"),
            node("Flatten", ["pooled"], ["flat"], name="flatten"),
            node("MatMul", ["flat", "c"], ["logits"], name="head"),
        ],
        [value("x", F32, ["batch", 1, 8, 8])],
        [value("logits", F32, ["batch", classes])],
        {"k": weights(channels, 1, 3, 3), "c": weights(channels, classes, seed=2)},
    )


def transformer(width: int = 64, vocabulary: int = 300) -> bytes:
    """A block of attention and two products over token ids, pooled; one channel is a hundred times the others.

    I64 ``[batch, length]`` to FP32 ``[batch, width]``.
    """
    gain = np.ones(width, np.float32)
    gain[3] = 100.0
    first = weights(width, 4 * width, seed=5)
    first[3] /= 100.0
    return model(
        [
            node("Gather", ["table", "ids"], ["x"], name="embed"),
            node("LayerNormalization", ["x", "gain", "zero"], ["normal"], name="norm", axis=-1),
            node("MatMul", ["x", "q"], ["query"], name="query"),
            node("Transpose", ["x"], ["keys"], name="turn", perm=[0, 2, 1]),
            node("MatMul", ["query", "keys"], ["scores"], name="scores"),
            node("Softmax", ["scores"], ["weights"], name="softmax", axis=-1),
            node("MatMul", ["weights", "x"], ["context"], name="context"),
            node("MatMul", ["normal", "up"], ["wide"], name="up"),
            node("Relu", ["wide"], ["active"], name="relu"),
            node("MatMul", ["active", "down"], ["narrow"], name="down"),
            node("Add", ["narrow", "context"], ["sum"], name="add"),
            node("ReduceMean", ["sum", "axis"], ["vector"], name="pool", keepdims=0),
        ],
        [value("ids", I64, ["batch", "length"])],
        [value("vector", F32, ["batch", width])],
        {
            "table": weights(vocabulary, width, seed=3) * 8,
            "gain": gain,
            "zero": np.zeros(width, np.float32),
            "q": weights(width, width, seed=4),
            "up": first,
            "down": weights(4 * width, width, seed=6),
            "axis": np.array([1]),
        },
    )


def two_outputs() -> bytes:
    """label and probabilities, as a classifier of scikit-learn gives them."""
    return model(
        [
            node("MatMul", ["x", "c"], ["scores"], name="scores"),
            node("Softmax", ["scores"], ["probabilities"], name="softmax", axis=-1),
            node("ArgMax", ["scores"], ["label"], name="label", axis=-1, keepdims=0),
        ],
        [value("x", F32, ["batch", 32])],
        [value("label", I64, ["batch"]), value("probabilities", F32, ["batch", 3])],
        {"c": weights(32, 3)},
    )


def given(data: bytes) -> OnnxModel:
    return OnnxModel(onnx.load_from_string(data), "onnx")


def rows(count: int, *shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def outputs_of(data: bytes, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
    found: list[NDArray[Any]] = open_session(onnx.load_from_string(data), threads=1).run(None, inputs)
    return found


def labels_of(data: bytes, x: NDArray[Any]) -> NDArray[np.int64]:
    """What the model itself decides."""
    return np.asarray(outputs_of(data, x=x)[0].argmax(axis=-1))


def timing(seconds: float, speedup: float, spread: float = 0.05) -> Timing:
    return Timing(seconds, seconds * 0.98, seconds * 1.02, speedup, spread)


def candidate(
    name: str, *, metric: float = 0.9, drop: float = 0.0, seconds: float = 1e-3, size: int = 1000, **facts: Any
) -> Candidate:
    """A candidate that was measured against an original of 0.9 and 1 ms."""
    return Candidate(
        name, name, "measured", metric=metric, drop=drop, size_bytes=size,
        timings={64: timing(seconds, 1e-3 / seconds, facts.pop("spread", 0.05))}, **facts,
    )  # fmt: skip


def report(*candidates: Candidate, chosen: int = 0, **facts: Any) -> OptimizationReport:
    from dataclasses import replace

    front = mark_pareto(candidates, 64)
    marked = tuple(replace(c, pareto=c.name in front) for c in candidates)
    known: dict[str, Any] = {
        "reason": "because", "metric_name": "accuracy", "metric_about": "of 'y' with the labels",
        "greater_is_better": True, "max_drop": 0.01, "objective": "latency", "objective_batch": 64, "threads": 1,
        "split": "calibrated on 10 rows and measured on the 30 others (drawn with seed 0)", "rounds": 5,
        "machine": "a machine",
    }  # fmt: skip
    return OptimizationReport(candidates=marked, chosen=marked[chosen], **{**known, **facts})


def plain(text: str) -> str:
    """Text with each run of white space as one space."""
    return re.sub(r"\s+", " ", text)
