"""A network of the shape of ResNet-50 with seeded random weights: vision-sized bodies and compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from .graph import F32, Graph, open_session

# Width, blocks, stride of the first block.
STAGES: Final = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))


def make(out: Path) -> dict[str, Any]:
    g, rng = Graph("resnet50-random"), np.random.default_rng(0)
    x = g.input("pixel_values", F32, ["batch", 3, 224, 224])
    g.output("logits", F32, ["batch", 1000])

    def conv(x: str, channels: int, width: int, kernel: int, stride: int = 1, gain: float = 1.0) -> str:
        # Scaled so that activations keep their size through fifty layers of random weights.
        std = gain * (2 / (channels * kernel * kernel)) ** 0.5
        i = len(g.inits)
        values = rng.standard_normal((width, channels, kernel, kernel), dtype=np.float32) * np.float32(std)
        weight = g.const(f"conv{i}.w", values)
        bias = g.const(f"conv{i}.b", rng.standard_normal(width, dtype=np.float32) * np.float32(0.01))
        pads = [kernel // 2] * 4
        return g.op("Conv", x, weight, bias, kernel_shape=[kernel, kernel], strides=[stride] * 2, pads=pads)

    x = g.op("MaxPool", g.op("Relu", conv(x, 3, 64, 7, 2)), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for width, blocks, first_stride in STAGES:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            y = g.op("Relu", conv(x, channels, width, 1))
            y = g.op("Relu", conv(y, width, width, 3, stride))
            y = conv(y, width, 4 * width, 1, gain=0.3)
            skip = conv(x, channels, 4 * width, 1, stride, gain=0.7) if block == 0 else x
            x, channels = g.op("Relu", g.op("Add", y, skip)), 4 * width
    x = g.op("Flatten", g.op("GlobalAveragePool", x))
    weight = g.const("fc.w", rng.standard_normal((2048, 1000), dtype=np.float32) * np.float32(0.02))
    g.op("Gemm", x, weight, g.const("fc.b", np.zeros(1000, np.float32)), out="logits")
    g.save(out / "model.onnx")
    return {"license": "random weights"}


def check(out: Path) -> None:
    feed = {"pixel_values": np.zeros((2, 3, 224, 224), np.float32)}
    logits = np.asarray(open_session(out / "model.onnx").run(None, feed)[0])
    assert logits.shape == (2, 1000)
    assert np.isfinite(logits).all()
