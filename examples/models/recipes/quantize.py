"""Block quantisation of weights, and the node that multiplies with such weights."""

from __future__ import annotations

import numpy as np

from .graph import MS, Array, Graph


def quantize_blocks(weight: Array, bits: int, block: int) -> tuple[Array, Array]:
    """Round rows to the nearest of ``2**bits`` levels, symmetric, one scale per block.

    Args:
        weight: ``(N, K)`` float, K a multiple of ``block``.
    Returns:
        Levels, uint8 ``(N, K / block, block)``, and scales, float32 ``(N, K / block)``.
    """
    n, k = weight.shape
    blocks = weight.reshape(n, k // block, block)
    # The element of largest magnitude keeps its sign and maps to the lowest level, which has no positive twin.
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scale = top / -(1 << (bits - 1))
    divisor = np.where(scale == 0, 1, scale)
    levels = np.clip(np.rint(blocks / divisor) + (1 << (bits - 1)), 0, (1 << bits) - 1).astype(np.uint8)
    return levels, scale[..., 0].astype(np.float32)


def block_linear(
    graph: Graph, x: str, name: str, levels: Array, scale: Array, bits: int, block: int, out: str = ""
) -> str:
    """Emit ``x @ weight.T`` for weights as `quantize_blocks` gives them, with int8 activations."""
    n, blocks, _ = levels.shape
    packed = levels[..., 0::2] | (levels[..., 1::2] << 4) if bits == 4 else levels
    return graph.op(
        "MatMulNBits",
        x,
        graph.const(name + ".q", packed),
        graph.const(name + ".s", scale),
        out=out,
        domain=MS,
        K=blocks * block,
        N=n,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
