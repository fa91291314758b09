"""One billion parameters in external data: files over 2 GiB, and what loading them costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import DTypeLike
from onnx import helper

from .graph import IR_VERSION, OPSET, Array, open_session, write_external

WIDTH: Final = 5632
LAYERS: Final = 32
# The largest page of the systems that map such files.
ALIGN_BYTES: Final = 65536


def weights(dtype: DTypeLike) -> Iterator[tuple[str, Array]]:
    """One random matrix, rolled for each layer: 32 different ones would take a minute to draw."""
    base = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5)
    base = base.astype(dtype)
    for i in range(LAYERS):
        yield f"w{i}", np.roll(base, 7 * i, axis=0)


def make(out: Path, dtype: DTypeLike = np.float32) -> dict[str, Any]:
    element_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensors = write_external(out / "model.onnx.data", weights(dtype), align=ALIGN_BYTES)
    nodes, x = [], "x"
    for i in range(LAYERS):
        nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Tanh" if i % 2 else "Relu", [f"m{i}"], [f"a{i}"]))
        x = f"a{i}"
    ends = [helper.make_tensor_value_info(name, element_type, ["batch", WIDTH]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "big", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=OPSET[:1], ir_version=IR_VERSION), out / "model.onnx")
    return {"license": "random weights", "parameters": LAYERS * WIDTH * WIDTH}


def check(out: Path) -> None:
    # Without prepacking the file is mapped, not copied.
    session = open_session(out / "model.onnx", **{"session.disable_prepacking": "1"})
    dtype = np.float16 if "16" in session.get_inputs()[0].type else np.float32
    assert np.isfinite(np.asarray(session.run(None, {"x": np.ones((1, WIDTH), dtype)})[0])).all()
