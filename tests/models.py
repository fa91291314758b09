"""Tiny ONNX models for the suite, and a repository on disk made of them.

Each function returns a serialised ``ModelProto`` of some hundred bytes. All of them run on real ONNX Runtime, so tests
need no stand-in for a session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Dims = Sequence[int | str | None]

OPSET: Final = 20
IR_VERSION: Final = 10

ELEMENT_TYPES: Final[dict[str, int]] = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
"""Wire datatype to ONNX element type."""

F32: Final = TensorProto.FLOAT
I64: Final = TensorProto.INT64


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), **attributes)


def value(name: str, element_type: int, dims: Dims | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, None if dims is None else list(dims))


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Mapping[str, NDArray[Any]] | None = None,
    domains: Mapping[str, int] | None = None,
) -> bytes:
    """A model of these parts; ``domains`` names operator sets beside the standard one."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), tensors)
    imports = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, v) for d, v in (domains or {}).items())]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)
    serialised: bytes = proto.SerializeToString()
    return serialised


# ---- rows that are independent of each other


def add_sub(datatype: str = "INT32", size: int = 16) -> bytes:
    """OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1, each ``[batch, size]``: Triton's "simple"."""
    kind = ELEMENT_TYPES[datatype]
    dims: Dims = ["batch", size]
    return model(
        [node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]), node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"])],
        [value("INPUT0", kind, dims), value("INPUT1", kind, dims)],
        [value("OUTPUT0", kind, dims), value("OUTPUT1", kind, dims)],
    )


def add_one(size: int = 16, increment: float = 1.0) -> bytes:
    """y = x + ``increment``, FP32 ``[batch, size]``: as cheap as a run gets."""
    return model(
        [node("Add", ["x", "c"], ["y"])],
        [value("x", F32, ["batch", size])],
        [value("y", F32, ["batch", size])],
        {"c": np.full(size, increment, np.float32)},
    )


def identity(datatype: str, dims: Dims = ("batch", "n")) -> bytes:
    """y = x for one datatype."""
    kind = ELEMENT_TYPES[datatype]
    return model([node("Identity", ["x"], ["y"])], [value("x", kind, dims)], [value("y", kind, dims)])


def identity_all(dims: Dims = ("batch", "n"), leave_out: Sequence[str] = ("BF16",)) -> bytes:
    """``<datatype>_out`` = ``<datatype>`` in lower case, for the wire's datatypes: ``fp32`` to ``fp32_out``.

    BF16 is left out unless asked for, because the runtime's Python binding cannot have it beside BYTES.
    """
    names = [(datatype.lower(), kind) for datatype, kind in ELEMENT_TYPES.items() if datatype not in leave_out]
    return model(
        [node("Identity", [name], [name + "_out"]) for name, _ in names],
        [value(name, kind, dims) for name, kind in names],
        [value(name + "_out", kind, dims) for name, kind in names],
    )


def scalar_add() -> bytes:
    """z = x + y, all of rank 0, FP32."""
    return model([node("Add", ["x", "y"], ["z"])], [value("x", F32, []), value("y", F32, [])], [value("z", F32, [])])


def matmul(width: int = 64, classes: int = 32, seed: int = 0) -> bytes:
    """y = x @ w, FP32 ``[batch, width]`` to ``[batch, classes]``."""
    w = np.random.default_rng(seed).standard_normal((width, classes)).astype(np.float32)
    return model(
        [node("MatMul", ["x", "w"], ["y"])],
        [value("x", F32, ["batch", width])],
        [value("y", F32, ["batch", classes])],
        {"w": w},
    )


def classifier(width: int = 4, classes: int = 3) -> bytes:
    """probabilities = softmax(x @ w), FP32 ``[batch, width]`` to ``[batch, classes]``; label INT64 ``[batch]``."""
    w = np.eye(width, classes, dtype=np.float32) * 4
    return model(
        [
            node("MatMul", ["x", "w"], ["scores"]),
            node("Softmax", ["scores"], ["probabilities"], axis=-1),
            node("ArgMax", ["scores"], ["label"], axis=-1, keepdims=0),
        ],
        [value("x", F32, ["batch", width])],
        [value("probabilities", F32, ["batch", classes]), value("label", I64, ["batch"])],
        {"w": w},
    )


def concat_text() -> bytes:
    """y = a + b, BYTES ``[batch, 1]`` each."""
    kind = ELEMENT_TYPES["BYTES"]
    dims: Dims = ["batch", 1]
    return model(
        [node("StringConcat", ["a", "b"], ["y"])],
        [value("a", kind, dims), value("b", kind, dims)],
        [value("y", kind, dims)],
    )


def masked_mean(width: int = 8, vocabulary: int = 100) -> bytes:
    """A sentence encoder in small: variable length with a mask.

    ``input_ids``, ``attention_mask`` INT64 ``[batch, sequence]`` to ``pooled`` FP32 ``[batch, width]``, the mean over
    the positions whose mask is 1, and ``tokens`` FP32 ``[batch, sequence, width]``. A masked position changes nothing
    in ``pooled``. Ids lie in ``[0, vocabulary)``; others fail the run.
    """
    table = np.random.default_rng(0).standard_normal((vocabulary, width)).astype(np.float32)
    return model(
        [
            node("Gather", ["table", "input_ids"], ["tokens"]),
            node("Cast", ["attention_mask"], ["mask"], to=F32),
            node("Unsqueeze", ["mask", "last"], ["mask3"]),
            node("Mul", ["tokens", "mask3"], ["kept"]),
            node("ReduceSum", ["kept", "one"], ["total"], keepdims=0),
            node("ReduceSum", ["mask3", "one"], ["count"], keepdims=0),
            node("Div", ["total", "count"], ["pooled"]),
        ],
        [value("input_ids", I64, ["batch", "sequence"]), value("attention_mask", I64, ["batch", "sequence"])],
        [value("pooled", F32, ["batch", width]), value("tokens", F32, ["batch", "sequence", width])],
        {"table": table, "last": np.array([-1]), "one": np.array([1])},
    )


def image_sum(size: int = 4) -> bytes:
    """y = the row sums of x, FP32 ``[batch, size, size]`` to ``[batch, size]``: a model to put a reshape before."""
    return model(
        [node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
        [value("x", F32, ["batch", size, size])],
        [value("y", F32, ["batch", size])],
        {"axes": np.array([2])},
    )


def optional_input() -> bytes:
    """y = x * scale, FP32 ``[batch, 4]``; ``scale`` FP32 ``[1]`` may be left out and is 2 then."""
    return model(
        [node("Mul", ["x", "scale"], ["y"])],
        [value("x", F32, ["batch", 4]), value("scale", F32, [1])],
        [value("y", F32, ["batch", 4])],
        {"scale": np.array([2], np.float32)},
    )


def fails_on_negative(size: int = 4) -> bytes:
    """y = x, FP32 ``[batch, size]``; a negative element fails the whole run, for an index out of bounds."""
    return model(
        [
            node("Less", ["x", "zero"], ["negative"]),
            node("Where", ["negative", "outside", "inside"], ["index"]),
            node("Gather", ["table", "index"], ["nothing"]),
            node("Add", ["x", "nothing"], ["y"]),
        ],
        [value("x", F32, ["batch", size])],
        [value("y", F32, ["batch", size])],
        {
            "zero": np.array(0, np.float32),
            "outside": np.array(1000),
            "inside": np.array(0),
            "table": np.zeros(1, np.float32),
        },
    )


# ---- rows that depend on their mates, or an axis 0 that is no batch


def dynamic_quantised(width: int = 64, classes: int = 32) -> bytes:
    """y = x @ w with activations quantised by one scale for the whole tensor, FP32 ``[batch, width]``."""
    w = np.random.default_rng(0).integers(-100, 100, (width, classes)).astype(np.int8)
    return model(
        [
            node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            node("MatMulInteger", ["q", "w", "zero"], ["product"]),
            node("Cast", ["product"], ["float"], to=F32),
            node("Mul", ["float", "scale"], ["y"]),
        ],
        [value("x", F32, ["batch", width])],
        [value("y", F32, ["batch", classes])],
        {"w": w},
    )


def batch_centred(size: int = 4) -> bytes:
    """y = x - mean of x over the rows, FP32 ``[batch, size]``: looks like a batched model and is none."""
    return model(
        [node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1), node("Sub", ["x", "mean"], ["y"])],
        [value("x", F32, ["batch", size])],
        [value("y", F32, ["batch", size])],
        {"axes": np.array([0])},
    )


def softmax_over_rows(size: int = 4) -> bytes:
    """y = softmax over axis 0, FP32 ``[batch, size]``."""
    return model(
        [node("Softmax", ["x"], ["y"], axis=0)],
        [value("x", F32, ["batch", size])],
        [value("y", F32, ["batch", size])],
    )


def running_sum(size: int = 4) -> bytes:
    """y = cumulative sum over axis 0, FP32 ``[batch, size]``: row 0 is right in any company, the others are not."""
    return model(
        [node("CumSum", ["x", "axis"], ["y"])],
        [value("x", F32, ["batch", size])],
        [value("y", F32, ["batch", size])],
        {"axis": np.array(0)},
    )


def doubled_rows(size: int = 4) -> bytes:
    """y = x twice, FP32 ``[batch, size]`` to ``[rows, size]``: more rows out than in."""
    return model(
        [node("Concat", ["x", "x"], ["y"], axis=0)],
        [value("x", F32, ["batch", size])],
        [value("y", F32, ["rows", size])],
    )


def total(size: int = 4) -> bytes:
    """y = the sum of all elements, FP32 ``[batch, size]`` to rank 0: the output has no batch axis."""
    return model(
        [node("ReduceSum", ["x"], ["y"], keepdims=0)], [value("x", F32, ["batch", size])], [value("y", F32, [])]
    )


def positions() -> bytes:
    """y = the coordinates of x's elements that are not zero: FP32 ``[n]`` to INT64 ``[1, found]``."""
    return model([node("NonZero", ["x"], ["y"])], [value("x", F32, ["n"])], [value("y", I64, [1, "found"])])


# ---- models that take long, grow or break


def _loop(trips: str, inputs: Sequence[onnx.ValueInfoProto], size: int, constants: dict[str, NDArray[Any]]) -> bytes:
    body = helper.make_graph(
        [
            node("Identity", ["go_in"], ["go_out"]),
            node("MatMul", ["s", "m"], ["t"]),
            node("Tanh", ["t"], ["s_out"]),
        ],
        "body",
        [value("i", I64, []), value("go_in", TensorProto.BOOL, []), value("s", F32, [None, size])],
        [value("go_out", TensorProto.BOOL, []), value("s_out", F32, [None, size])],
        [numpy_helper.from_array(np.eye(size, dtype=np.float32), "m")],
    )
    return model(
        [node("Loop", [trips, "go", "x"], ["y"], body=body)],
        [value("x", F32, ["batch", size]), *inputs],
        [value("y", F32, ["batch", size])],
        {"go": np.array(True), **constants},
    )


def slow(size: int = 64) -> bytes:
    """y = tanh applied ``steps`` times to x, FP32 ``[batch, size]``, ``steps`` INT64 rank 0: as slow as asked."""
    return _loop("steps", [value("steps", I64, [])], size, {})


def late(steps: int, size: int = 64) -> bytes:
    """y = tanh applied ``steps`` times to x, FP32 ``[batch, size]``: a version as slow as it was made."""
    return _loop("trips", [], size, {"trips": np.array(steps, np.int64)})


def endless(size: int = 64) -> bytes:
    """Never returns; only terminating the run ends it. FP32 ``[batch, size]``."""
    return _loop("", [], size, {})


def fill() -> bytes:
    """y = zeros of the shape that the INT64 input ``shape`` asks for: the output is as large as a caller wishes."""
    return model([node("ConstantOfShape", ["shape"], ["y"])], [value("shape", I64, ["rank"])], [value("y", F32, None)])


def stuck() -> bytes:
    """y = the sum of a product of matrices of the shape that the INT64 input ``shape`` asks for: one node that can take
    as long as a caller wishes, and that cannot be stopped."""
    return model(
        [
            node("ConstantOfShape", ["shape"], ["ones"]),
            node("MatMul", ["ones", "ones"], ["product"]),
            node("ReduceSum", ["product"], ["y"], keepdims=0),
        ],
        [value("shape", I64, [2])],
        [value("y", F32, [])],
    )


def external_data(size: int = 64, location: str = "model.onnx.data") -> tuple[bytes, bytes]:
    """y = x @ identity with the weight in a data file: the model, and the content of ``location``."""
    weight = np.eye(size, dtype=np.float32)
    tensor = TensorProto(name="w", dims=weight.shape, data_type=F32, data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", "0"), ("length", str(weight.nbytes))):
        tensor.external_data.add(key=key, value=text)
    graph = helper.make_graph(
        [node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", F32, ["batch", size])],
        [value("y", F32, ["batch", size])],
        [tensor],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return proto.SerializeToString(), weight.tobytes()


def corrupt() -> dict[str, bytes]:
    """Files that are no model, by what is wrong with them."""
    whole = add_one()
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "html": b"<html><title>404 Not Found</title></html>",
        "zeros": bytes(256),
        "no_such_operator": _unknown_operator(),
        "missing_data": external_data()[0],
    }


def _unknown_operator() -> bytes:
    return model(
        [node("NoSuchOperator", ["x"], ["y"], domain="example")],
        [value("x", F32, ["batch", 4])],
        [value("y", F32, ["batch", 4])],
        domains={"example": 1},
    )


# ---- on disk


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The folder of one model.

    Attributes:
        versions: version to the content of its ``model.onnx``.
        config: the text of ``config.pbtxt``; None writes no such file.
        toml: the text of ``inferway.toml``; None writes no such file.
        files: path inside the model's folder to content, such as label files or ``1/model.onnx.data``.
    """

    versions: Mapping[int, bytes]
    config: str | None = None
    toml: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def write_repository(path: Path, models: Mapping[str, bytes | Mapping[int, bytes] | ModelFiles]) -> Path:
    """Write models in the layout of a repository and return ``path``.

    Args:
        path: the repository's folder; made when missing. Models already there under other names stay.
        models: model name to the content of version 1, or of each version, or to everything there is to say.
    """
    for name, given in models.items():
        if isinstance(given, bytes):
            given = ModelFiles({1: given})
        elif not isinstance(given, ModelFiles):
            given = ModelFiles(given)
        folder = path / name
        folder.mkdir(parents=True, exist_ok=True)
        for version, content in given.versions.items():
            (folder / str(version)).mkdir(exist_ok=True)
            (folder / str(version) / "model.onnx").write_bytes(content)
        if given.config is not None:
            (folder / "config.pbtxt").write_text(given.config)
        if given.toml is not None:
            (folder / "inferway.toml").write_text(given.toml)
        for inner, content in given.files.items():
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            (folder / inner).write_bytes(content)
    return path
