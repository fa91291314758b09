"""Graphs that choose between two tables of positions, as the model builder writes them for LongRoPE (Phi-3, Phi-4).

The choice is an ``If`` over the number of tokens of the longest row in a run: up to the length that the model was first
trained for it takes one table, beyond it another. So one long answer would change what its neighbours get, and the keys
of an answer that grows beyond would not fit those before. Held to that length, the graph always takes the first table,
and rows are as independent of each other as those of other models.

Source: ``onnx.proto``, field numbers; onnxruntime-genai 0.18, ``Phi3MiniLongRoPEModel`` of its model builder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ...core.errors import ModelLoadError
from ..onnx.wire import BYTES, VARINT, Field, Source, WireError

_MODEL_GRAPH: Final = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_INT, _ATTRIBUTE_TENSOR = 3, 5
_TENSOR_INTS, _TENSOR_NAME, _TENSOR_RAW = 7, 8, 9
_SMALL_BYTES: Final = 512
"""A tensor with one number and its name."""
_MAX_FIELDS: Final = 4_000_000


@dataclass(slots=True)
class _Node:
    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    number: int | None = None
    """Of a constant."""


def first_table_length(path: Path) -> int:
    """Up to how many tokens a graph with branches takes the first of two tables.

    Args:
        path: of a graph with the operator ``If``, which admission has read.
    Raises:
        ModelLoadError: it branches over something else.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            found = _lengths(Source(stream.fileno(), size, _MAX_FIELDS), size)
    except (WireError, OSError):
        found = []
    known = [length for length in found if length is not None]
    if not known or len(known) != len(found) or min(known) < 2:
        raise ModelLoadError(
            "its graph has branches (If) other than those between the tables of LongRoPE: which one is taken could "
            "depend on other answers in the same run"
        )
    return min(known)


def _lengths(source: Source, size: int) -> list[int | None]:
    """For each branch of the graph, the number that its condition asks whether it is surpassed."""
    nodes: list[_Node] = []
    numbers: dict[str, int] = {}
    for part in source.fields(0, size):
        if part.number != _MODEL_GRAPH or part.kind != BYTES:
            continue
        for inner in source.fields(part.start, part.stop):
            if inner.number == _GRAPH_NODE:
                nodes.append(_node(source, inner))
            elif inner.number == _GRAPH_INITIALIZER and inner.stop - inner.start <= _SMALL_BYTES:
                name, number = _tensor(source, inner)
                if number is not None:
                    numbers[name] = number
    made = {name: node for node in nodes for name in node.outputs}
    numbers |= {name: node.number for name, node in made.items() if node.number is not None}

    def asked(branch: _Node) -> int | None:
        condition = made.get(branch.inputs[0]) if branch.inputs else None
        if condition is None or condition.operator != "Greater" or len(condition.inputs) != 2:
            return None
        return numbers.get(condition.inputs[1])

    return [asked(node) for node in nodes if node.operator == "If"]


def _node(source: Source, part: Field) -> _Node:
    node = _Node()
    attributes: list[Field] = []
    for inner in source.fields(part.start, part.stop):
        if inner.number in (_NODE_INPUT, _NODE_OUTPUT):
            names = node.inputs if inner.number == _NODE_INPUT else node.outputs
            names.append(source.read(inner.start, inner.stop).decode(errors="replace"))
        elif inner.number == _NODE_OPERATOR:
            node.operator = source.read(inner.start, inner.stop).decode(errors="replace")
        elif inner.number == _NODE_ATTRIBUTE and inner.stop - inner.start <= _SMALL_BYTES:
            attributes.append(inner)
    if node.operator == "Constant":
        for attribute in attributes:
            for inner in source.fields(attribute.start, attribute.stop):
                if inner.number == _ATTRIBUTE_INT and inner.kind == VARINT:
                    node.number = inner.value
                elif inner.number == _ATTRIBUTE_TENSOR and inner.kind == BYTES:
                    node.number = _tensor(source, inner)[1]
    return node


def _tensor(source: Source, part: Field) -> tuple[str, int | None]:
    """A tensor's name, and its number where it is one of int64."""
    name, number = "", None
    for inner in source.fields(part.start, part.stop):
        if inner.number == _TENSOR_NAME:
            name = source.read(inner.start, inner.stop).decode(errors="replace")
        elif inner.number == _TENSOR_INTS:
            number = inner.value if inner.kind == VARINT else next(source.varints(inner.start, inner.stop), None)
        elif inner.number == _TENSOR_RAW and inner.stop - inner.start == 8:
            number = int.from_bytes(source.read(inner.start, inner.stop), "little", signed=True)
    return name, number
