"""Models of the suite, each changed in one place: in its bytes, or in its structure and then written out again."""

from __future__ import annotations

import random
from typing import Final

import onnx
from onnx import TensorProto, helper

import models
from models import F32

DOOMED: Final = (
    "truncate",
    "unknown domain",
    "unknown type",
    "shape",
    "data",
    "no outputs",
    "outside",
    "version",
    "dangling",
)
"""Mutations after which no model can be right, so that none of them may become ready."""


def mutant(whole: bytes, how: str, chance: random.Random) -> bytes:
    """A model changed in one place, mostly where its structure is."""
    if how == "truncate":
        return whole[: chance.randrange(len(whole) - 1)]
    if how == "bytes":
        changed = bytearray(whole)
        for _ in range(chance.randrange(1, 8)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    if how == "insert":
        at = chance.randrange(len(whole))
        return whole[:at] + chance.randbytes(chance.randrange(1, 16)) + whole[at:]
    proto = onnx.load_model_from_string(whole)
    graph = proto.graph
    one = chance.choice(graph.node)
    if how == "unknown domain":
        one.domain = "marker.example"
        proto.opset_import.add(domain="marker.example", version=1)
    elif how == "version":
        proto.opset_import[0].version = chance.choice([0, -1, 1 << 40, 999])
    elif how == "no outputs":
        del graph.output[:]
    elif how == "dangling":
        one.input[0] = "nowhere"
    elif how in ("unknown type", "shape", "data", "outside"):
        tensor = graph.initializer.add(name="planted", data_type=F32, dims=[4], raw_data=bytes(16))
        if how == "unknown type":
            tensor.data_type = chance.randrange(40, 1000)
        elif how == "shape":
            tensor.dims[:] = chance.choice([[5], [-4], [1 << 62, 1 << 62], [4, 4], [1 << 40]])
        elif how == "data":
            tensor.raw_data = bytes(chance.choice([0, 1, 15, 17, 64]))
        else:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=chance.choice(["../x", "/etc/passwd", "model.onnx", "none"]))
    elif how == "operator":
        one.op_type = chance.choice(["Add", "MatMul", "Reshape", "Loop", "Scan", "ConstantOfShape", "Expand", "Resize"])
    elif how == "dimension":
        shape = chance.choice([*graph.input, *graph.output]).type.tensor_type.shape
        for dim in shape.dim:
            dim.dim_value = chance.choice([-1, 0, 1, 1 << 31, 1 << 62])
    elif how == "element type":
        chance.choice([*graph.input, *graph.output]).type.tensor_type.elem_type = chance.randrange(30)
    elif how == "attribute":
        one.attribute.append(
            helper.make_attribute(chance.choice(["axis", "perm", "to"]), chance.randrange(-1 << 62, 1 << 62))
        )
    elif how == "rewire":
        names = [name for held in graph.node for name in (*held.input, *held.output)]
        one.input[chance.randrange(len(one.input))] = chance.choice(names)
    elif how == "repeat":
        graph.node.add().CopyFrom(one)
    else:
        graph.node.remove(one)
    return proto.SerializeToString()


HOW: Final = (
    *DOOMED,
    "bytes",
    "insert",
    "operator",
    "dimension",
    "element type",
    "attribute",
    "rewire",
    "repeat",
    "remove",
)


def parents() -> list[bytes]:
    """What is changed."""
    return [
        models.add_sub("FP32"), models.matmul(8, 4), models.masked_mean(), models.classifier(),
        models.dynamic_quantised(), models.fails_on_negative(),
    ]  # fmt: skip
