"""Models that behave badly on purpose, and the smallest ones that behave well.

add: as cheap as a run gets. slow: run time grows with the input ``steps``. endless: only ``RunOptions.terminate`` ends
it. fill: an output as large as the request asks for. echo: ten element types. corrupt_* and missing_data do not load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from .graph import F32, I32, I64, Graph, open_session

ECHO_TYPES: Final = {
    "f32": F32,
    "f16": TensorProto.FLOAT16,
    "f64": TensorProto.DOUBLE,
    "i8": TensorProto.INT8,
    "u8": TensorProto.UINT8,
    "i16": TensorProto.INT16,
    "i32": I32,
    "i64": I64,
    "bool": TensorProto.BOOL,
    "text": TensorProto.STRING,
}


def add() -> Graph:
    g = Graph("add-one")
    g.input("x", F32, ["batch", 16])
    g.output("y", F32, ["batch", 16])
    g.op("Add", "x", g.const("c", np.ones(16, np.float32)), out="y")
    return g


def loop(name: str, width: int, *, steps: str = "") -> Graph:
    """``x = tanh(x @ identity)``, as often as the scalar input ``steps`` says, or for ever without one."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["keep_in"], ["keep_out"]),
            helper.make_node("MatMul", ["s", "m"], ["t"]),
            helper.make_node("Tanh", ["t"], ["s_out"]),
        ],
        "body",
        [value("i", I64, []), value("keep_in", TensorProto.BOOL, []), value("s", F32, [None, width])],
        [value("keep_out", TensorProto.BOOL, []), value("s_out", F32, [None, width])],
        [numpy_helper.from_array(np.eye(width, dtype=np.float32), "m")],
    )
    g = Graph(name)
    g.input("x", F32, ["batch", width])
    g.output("y", F32, ["batch", width])
    if steps:
        g.input(steps, I64, [])
        g.op("Loop", steps, "", "x", out="y", body=body)
    else:
        g.op("Loop", "", g.const("true", np.array(True)), "x", out="y", body=body)
    return g


def fill() -> Graph:
    g = Graph("fill")
    g.input("shape", I64, ["rank"])
    g.output("y", F32, None)
    g.op("ConstantOfShape", "shape", out="y")
    return g


def echo() -> Graph:
    g = Graph("echo")
    for name, element_type in ECHO_TYPES.items():
        g.input(name, element_type, ["n"])
        g.output(name + "_out", element_type, ["n"])
        g.op("Identity", name, out=name + "_out")
    return g


def matmul() -> Graph:
    g = Graph("missing-data")
    g.input("x", F32, ["batch", 512])
    g.output("y", F32, ["batch", 512])
    g.op("MatMul", "x", g.const("w", np.eye(512, dtype=np.float32)), out="y")
    return g


def make(out: Path) -> dict[str, Any]:
    good = add().save(out / "add.onnx").read_bytes()
    loop("endless", 64).save(out / "endless.onnx")
    loop("slow", 256, steps="steps").save(out / "slow.onnx")
    fill().save(out / "fill.onnx")
    echo().save(out / "echo.onnx")
    (out / "corrupt_truncated.onnx").write_bytes(good[: len(good) // 2])
    (out / "corrupt_empty.onnx").write_bytes(b"")
    (out / "corrupt_text.onnx").write_bytes(b"<html>404 not found</html>")
    matmul().save(out / "missing_data.onnx", external=True)
    (out / "missing_data.onnx.data").unlink()
    return {"license": "generated"}


def check(out: Path) -> None:
    y = np.asarray(open_session(out / "add.onnx").run(None, {"x": np.zeros((1, 16), np.float32)})[0])
    assert (y == 1).all()
    for file in [*sorted(out.glob("corrupt_*.onnx")), out / "missing_data.onnx"]:
        try:
            open_session(file)
        except Exception:  # the runtime has no one base class for its load errors
            continue
        raise AssertionError(f"{file.name} loaded")
    open_session(out / "slow.onnx").run(None, {"x": np.zeros((1, 256), np.float32), "steps": np.array(10)})
