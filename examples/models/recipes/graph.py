"""A small writer of ONNX graphs, and the one way in which the checks open what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

MS: Final = "com.microsoft"
OPSET: Final = [helper.make_opsetid("", 20), helper.make_opsetid(MS, 1)]
IR_VERSION: Final = 10
F32: Final = TensorProto.FLOAT
I32: Final = TensorProto.INT32
I64: Final = TensorProto.INT64

Array = NDArray[Any]
Shape = Sequence[int | str | None]
Linear = Callable[["Graph", str, str, Array], str]
"""Emits ``x @ weight``: takes the graph, the name of x, a name for the product and the weight ``(K, N)``."""

PAGE_BYTES: Final = 4096
INLINE_BYTES: Final = 1024


class Graph:
    """Nodes, initializers, inputs and outputs in the order in which they are named."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.inits: dict[str, Array] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def const(self, name: str, array: ArrayLike) -> str:
        """Add an initializer, unless there is one of that name already."""
        if name not in self.inits:
            self.inits[name] = np.ascontiguousarray(array)
        return name

    def op(self, kind: str, *inputs: str, out: str | Sequence[str] = "", domain: str = "", **attributes: Any) -> str:
        """Add a node and return the name of its first output, which is made up where ``out`` gives none."""
        name = f"{kind}_{len(self.nodes) + 1}"
        outputs = [out or name] if isinstance(out, str) else list(out)
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name, domain=domain, **attributes))
        return outputs[0]

    def input(self, name: str, element_type: int, shape: Shape | None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def output(self, name: str, element_type: int, shape: Shape | None) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def save(self, path: Path, *, external: bool = False) -> Path:
        """Write the model, with ``external`` its larger initializers to ``<path>.data`` beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if external:
            tensors = write_external(path.with_name(path.name + ".data"), self.inits.items(), align=PAGE_BYTES)
        else:
            tensors = [numpy_helper.from_array(array, name) for name, array in self.inits.items()]
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, tensors)
        model = helper.make_model(graph, opset_imports=OPSET, ir_version=IR_VERSION, producer_name="inferway-models")
        onnx.save(model, path)
        return path


def write_external(data: Path, arrays: Iterable[tuple[str, Array]], *, align: int) -> list[TensorProto]:
    """Write arrays to one data file, each at a multiple of ``align`` bytes so that a runtime can map it.

    Small ones stay inside the model file. Arrays are taken one at a time, so a generator keeps the memory low.
    """
    tensors: list[TensorProto] = []
    offset = 0
    with data.open("wb") as stream:
        for name, array in arrays:
            if array.nbytes < INLINE_BYTES:
                tensors.append(numpy_helper.from_array(array, name))
                continue
            padding = -offset % align
            stream.write(b"\0" * padding)
            offset += padding
            stream.write(array.tobytes())
            tensor = TensorProto(
                name=name,
                dims=array.shape,
                data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in (("location", data.name), ("offset", offset), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            offset += array.nbytes
            tensors.append(tensor)
    return tensors


def open_session(path: Path, **config: str) -> ort.InferenceSession:
    """Open a model on one thread and without the runtime's log; ``config`` are session config entries."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(path), options)
