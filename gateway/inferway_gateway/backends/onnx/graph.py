"""What a model file says about its graph, read without its weights.

The runtime tells names, types and shapes of inputs and outputs, and no more. Whether a run's length depends on values,
whether rows share a quantisation scale, and which data files the model wants stand in the graph. Parsing the whole
file would hold its weights in memory a second time (and importing the ``onnx`` package costs 46 MB and 130 ms in every
gateway), so this reads protobuf's wire format directly and seeks over every tensor: fields are numbered, and everything
long carries its length in front.

Nothing here is trusted for safety: a file that cannot be read this way counts as one that may do anything.

Source: ``onnx.proto``, field numbers; Protocol Buffers, "Encoding".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

_GRAPH, _FUNCTIONS = 7, 25
"""Fields of ModelProto."""
_G_NODE, _G_INITIALIZER, _G_INPUT, _G_OUTPUT = 1, 5, 11, 12
"""Fields of GraphProto. A function has its nodes in field 7."""
_HEAD_BYTES: Final = 4096
"""A tensor's name, shape and place stand before its data."""
_TYPE_TAG: Final = b"\xa0\x01"
"""Field 20 of AttributeProto, its type, which writers put last."""
_NUMBERS_OR_TEXT: Final = frozenset({1, 2, 3, 6, 7, 8})
"""AttributeProto.AttributeType FLOAT, INT, STRING, FLOATS, INTS, STRINGS."""
_MAX_FIELDS: Final = 4_000_000
"""Bounds the work on a file that was made to be slow; a graph of 10,000 nodes has some 200,000."""

DYNAMIC_QUANTISATION: Final = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
"""Operators that take one scale from all rows together."""

RANDOM: Final = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)

_SIZE_INPUTS: Final[dict[str, tuple[int, ...]]] = {
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1,),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
    "Tile": (1,),
    "Upsample": (1,),
}
"""Inputs whose values, not only their shape, decide how large the operator's output is."""

_UNBOUNDED: Final = frozenset({"ImageDecoder"})
_KNOWN_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_SHAPE_ONLY: Final = frozenset({"Shape", "Size"})


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """Facts of a graph, its subgraphs and functions included.

    Attributes:
        readable: the rest is known; where not, the defaults below are the careful assumption.
        operators: operator types in use, without domain.
        bounded: how long a run takes depends on the shapes of the inputs only: no loop or branch, and no size
            computed from a caller's values.
        unranked: inputs and outputs of which the graph tells no shape.
        elements: initialiser name to its number of elements.
        external: locations of external data, relative to the model's folder.
    """

    readable: bool = False
    operators: frozenset[str] = frozenset()
    bounded: bool = False
    unranked: frozenset[str] = frozenset()
    elements: dict[str, int] = field(default_factory=dict)
    external: frozenset[str] = frozenset()


def read_graph(path: Path) -> GraphFacts:
    """The facts of an ONNX file; ``GraphFacts()`` where it cannot be read. Never raises for what the file contains."""
    try:
        with path.open("rb") as stream:
            return _Reader(stream, os.fstat(stream.fileno()).st_size).read()
    except (_Malformed, RecursionError, OSError):
        return GraphFacts()


class _Malformed(Exception):
    """Not the wire format of a model."""


@dataclass(slots=True)
class _Node:
    operator: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    has_graph: bool


class _Reader:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self._budget = _MAX_FIELDS
        self._operators: set[str] = set()
        self._bounded = True
        self._unranked: set[str] = set()
        self._elements: dict[str, int] = {}
        self._external: set[str] = set()
        self._data: set[str] = set()
        """Names of values that depend on what callers send, not only on its shape."""

    def read(self) -> GraphFacts:
        seen = False
        for number, length in self._walk(self._size):
            if number == _GRAPH:
                seen = True
                self._read_graph(self._stream.tell() + length)
            elif number == _FUNCTIONS:
                self._read_function(self._stream.read(length))
        if not seen:
            raise _Malformed
        return GraphFacts(
            True,
            frozenset(self._operators),
            self._bounded,
            frozenset(self._unranked),
            self._elements,
            frozenset(self._external),
        )

    def _walk(self, end: int) -> Iterator[tuple[int, int]]:
        """Number and length of each length-delimited field up to ``end``; what the caller leaves unread is skipped."""
        stream = self._stream
        while stream.tell() < end:
            tag = self._varint()
            number, kind = tag >> 3, tag & 7
            if kind == 2:
                length = self._varint()
                following = stream.tell() + length
                if following > end:
                    raise _Malformed
                yield number, length
                stream.seek(following)
            elif kind == 0:
                self._varint()
            elif kind in (1, 5):
                stream.seek(8 if kind == 1 else 4, os.SEEK_CUR)
            else:
                raise _Malformed

    def _varint(self) -> int:
        self._spend()
        value = shift = 0
        while True:
            byte = self._stream.read(1)
            if not byte or shift > 63:
                raise _Malformed
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value
            shift += 7

    def _spend(self) -> None:
        self._budget -= 1
        if self._budget < 0:
            raise _Malformed

    def _read_graph(self, end: int) -> None:
        inputs: set[str] = set()
        nodes: list[_Node] = []
        stream = self._stream
        for number, length in self._walk(end):
            if number == _G_NODE:
                nodes.append(self._node(stream.read(length)))
            elif number == _G_INITIALIZER:
                self._tensor(stream.read(min(length, _HEAD_BYTES)))
            elif number in (_G_INPUT, _G_OUTPUT):
                name, ranked = self._value(stream.read(length))
                if not ranked:
                    self._unranked.add(name)
                if number == _G_INPUT:
                    inputs.add(name)
        # An initialiser that is listed as an input may be overridden by callers, so it counts as theirs.
        self._data = inputs
        for node in nodes:
            self._follow(node)

    def _follow(self, node: _Node) -> None:
        data = self._data
        if node.has_graph or node.operator in _UNBOUNDED or node.domain not in _KNOWN_DOMAINS:
            self._bounded = False
        sizes = _SIZE_INPUTS.get(node.operator, ())
        if any(index < len(node.inputs) and node.inputs[index] in data for index in sizes):
            self._bounded = False
        if node.operator not in _SHAPE_ONLY and any(name in data for name in node.inputs):
            data.update(node.outputs)

    def _read_function(self, content: bytes) -> None:
        # A body knows nothing of what it is called with: whatever could size its output by a value counts as doing so.
        for number, part in self._fields(content):
            if number == 7 and isinstance(part, bytes):
                node = self._node(part)
                if node.has_graph or node.operator in _SIZE_INPUTS or node.operator in _UNBOUNDED:
                    self._bounded = False

    def _node(self, content: bytes) -> _Node:
        node = _Node("", "", [], [], False)
        for number, part in self._fields(content):
            if not isinstance(part, bytes):
                continue
            if number == 1:
                node.inputs.append(_text(part))
            elif number == 2:
                node.outputs.append(_text(part))
            elif number == 4:
                node.operator = _text(part)
            elif number == 7:
                node.domain = _text(part)
            elif number == 5:
                node.has_graph |= self._attribute(part)
        self._operators.add(node.operator)
        return node

    def _attribute(self, content: bytes) -> bool:
        """Whether the attribute is a graph; collects what that graph uses."""
        if len(content) > _HEAD_BYTES and content[-3:-1] == _TYPE_TAG and content[-1] in _NUMBERS_OR_TEXT:
            # A tree ensemble carries its trees as lists with a field per number: reading them took 130 ms of a forest.
            return False
        has_graph = False
        for number, part in self._fields(content):
            if number in (6, 11) and isinstance(part, bytes):
                has_graph = True
                for inner, item in self._fields(part):
                    if isinstance(item, bytes):
                        if inner == _G_NODE:
                            self._node(item)
                        elif inner == _G_INITIALIZER:
                            self._tensor(item[:_HEAD_BYTES])
            elif number == 5 and isinstance(part, bytes):
                self._tensor(part[:_HEAD_BYTES])
        return has_graph

    def _tensor(self, head: bytes) -> None:
        name = ""
        elements = 1
        for number, part in self._fields(head, whole=False):
            if number == 1:
                for dim in [part] if isinstance(part, int) else _varints(part):
                    elements *= dim
            elif number == 8 and isinstance(part, bytes):
                name = _text(part)
            elif number == 13 and isinstance(part, bytes):
                entry = {key: value for key, value in self._fields(part) if isinstance(value, bytes)}
                if entry.get(1) == b"location":
                    self._external.add(_text(entry.get(2, b"")))
        self._elements[name] = elements

    def _value(self, content: bytes) -> tuple[str, bool]:
        name, ranked = "", False
        for number, part in self._fields(content):
            if not isinstance(part, bytes):
                continue
            if number == 1:
                name = _text(part)
            elif number == 2:
                for kind, tensor in self._fields(part):
                    if kind == 1 and isinstance(tensor, bytes):
                        ranked = any(inner == 2 for inner, _ in self._fields(tensor))
        return name, ranked

    def _fields(self, content: bytes, whole: bool = True) -> Iterator[tuple[int, int | bytes]]:
        """Number and value of each field; with ``whole`` false the content may end early, which ends the fields."""
        at, end = 0, len(content)
        while at < end:
            self._spend()
            try:
                tag, at = _varint_at(content, at)
                number, kind = tag >> 3, tag & 7
                if kind == 2:
                    length, at = _varint_at(content, at)
                    if at + length > end:
                        raise IndexError
                    yield number, content[at : at + length]
                    at += length
                elif kind == 0:
                    value, at = _varint_at(content, at)
                    yield number, value
                elif kind in (1, 5):
                    at += 8 if kind == 1 else 4
                else:
                    raise _Malformed
            except IndexError:
                if whole:
                    raise _Malformed from None
                return


def _varint_at(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise _Malformed


def _varints(packed: bytes) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint_at(packed, at)
        yield value


def _text(part: bytes) -> str:
    return part.decode(errors="replace")
