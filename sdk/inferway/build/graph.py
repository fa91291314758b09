"""Changes to a graph that an exporter made: names, the columns in front of it, the shapes behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from .._tensors import Array
from .example import Arrays
from .runtime import onnx_module

_TYPES: Final = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "object": 8, "bool": 9,
    "float16": 10, "float64": 11, "uint32": 12, "uint64": 13, "bfloat16": 16,
}  # fmt: skip


def type_of(array: Array) -> int:
    """``TensorProto.DataType`` of an array."""
    return _TYPES[array.dtype.name]


def rename(proto: Any, before: Sequence[str], after: Sequence[str]) -> None:
    """Give inputs or outputs of a graph other names, wherever they stand."""
    changes = {old: new for old, new in zip(before, after, strict=True) if old != new}
    if not changes:
        return
    # What has a new name already, and is something else, makes room for it first.
    graph = proto.graph
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    names |= {value.name for value in (*graph.input, *graph.initializer)}
    taken = (names - set(changes)) & set(changes.values())
    _renamed(graph, {**{name: f"{name}__inner" for name in taken}, **changes})


def _renamed(graph: Any, mapping: Mapping[str, str]) -> None:
    for field in ("input", "output", "value_info", "initializer"):
        for value in getattr(graph, field):
            value.name = mapping.get(value.name, value.name)
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = mapping.get(name, name)
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _renamed(inner, mapping)


def put_in_front(proto: Any, inputs: Arrays, inner: str, elem_type: int) -> None:
    """Let inputs of other names and types lead to the graph's only input, ``inner``.

    Each is cast to ``elem_type``; several, ``(rows, 1)`` each, become the columns of one matrix.
    """
    helper = onnx_module().helper
    graph = proto.graph
    feed = f"{inner}__all"
    rename(proto, [inner], [feed])
    del graph.input[:]
    nodes = []
    parts = []
    for place, (name, array) in enumerate(inputs.items()):
        graph.input.append(helper.make_tensor_value_info(name, type_of(array), [None, *array.shape[1:]]))
        if type_of(array) != elem_type:
            part = feed if len(inputs) == 1 else f"{feed}_{place}"
            nodes.append(helper.make_node("Cast", [name], [part], to=elem_type))
        else:
            part = name
        parts.append(part)
    if len(parts) > 1 or (parts and parts[0] not in (feed,)):
        nodes.append(helper.make_node("Concat", parts, [feed], axis=1))
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])


def reshape_outputs(proto: Any, given: Arrays, wanted: Arrays) -> None:
    """Where an output has the source's elements in another shape, such as ``(rows, 1)`` for ``(rows,)``, reshape it;
    of two columns for two classes, take the one that is the source's where it has one number for them.

    Args:
        given, wanted: outputs of graph and source for the same example.
    """
    helper = onnx_module().helper
    numpy_helper = onnx_module().numpy_helper
    graph = proto.graph
    for value in graph.output:
        want, have = wanted.get(value.name), given.get(value.name)
        if want is None or have is None or want.shape == have.shape or not want.ndim or not len(want):
            continue
        inner, name = f"{value.name}__raw", value.name
        if have.size == want.size:
            tail = np.array([-1, *want.shape[1:]], np.int64)
            node = helper.make_node("Reshape", [inner, f"{name}__shape"], [name])
        elif have.shape == (len(want), 2) and want.ndim == 1:
            gaps = [float(np.abs(have[:, column] - want).max()) for column in (1, 0)]
            tail = np.array(1 if gaps[0] <= gaps[1] else 0, np.int64)
            node = helper.make_node("Gather", [inner, f"{name}__shape"], [name], axis=1)
        else:
            continue
        _renamed(graph, {name: inner})
        value.name = name
        graph.node.append(node)
        graph.initializer.append(numpy_helper.from_array(tail, f"{name}__shape"))


def cast_outputs(proto: Any, given: Arrays, wanted: Arrays) -> None:
    """Where an output's numbers are of another type than the source's and cannot be widened without a loss, cast them
    to the source's: 32-bit integers to 64, booleans and the like. Floating-point outputs stay as they were computed."""
    helper = onnx_module().helper
    graph = proto.graph
    for value in graph.output:
        want, have = wanted.get(value.name), given.get(value.name)
        if want is None or have is None or want.dtype == have.dtype:
            continue
        if want.dtype.kind not in "biu" or have.dtype.kind not in "biuf":
            continue
        inner, name = f"{value.name}__uncast", value.name
        _renamed(graph, {name: inner})
        value.name = name
        graph.node.append(helper.make_node("Cast", [inner], [name], to=type_of(want)))
        value.type.tensor_type.elem_type = type_of(want)
