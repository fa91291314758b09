"""What the SDK must know of an ONNX model to send it: which files hold its weights, and its signature.

Only the few fields that say so are read, straight from protobuf's wire format, so that neither ``onnx`` nor
``protobuf`` is needed, and weights are skipped over without being touched: a file of 2 GiB costs what its nodes cost.

Source: ``onnx/onnx.proto`` of ONNX 1.23 (field numbers); Protocol Buffers, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from ._signature import ModelMetadata, TensorSpec

_SCHEMA: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Kind of message to the fields that lead to tensors."""
_DATATYPES: Final = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES", 9: "BOOL",
    10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip
_EXTERNAL: Final = 1


class NotOnnx(ValueError):
    """The bytes are no ONNX model."""


@dataclass(frozen=True, slots=True)
class OnnxFacts:
    """What a model says of itself.

    Attributes:
        locations: names of the files that hold its weights, as the model writes them, each once, in order.
        signature: None where an input or output is no tensor of a known datatype and rank.
    """

    locations: tuple[str, ...]
    signature: ModelMetadata | None


def read_facts(data: Any) -> OnnxFacts:
    """Look through a model.

    Args:
        data: ``bytes``, or anything that is indexed and sliced like them, such as an ``mmap``.
    Raises:
        NotOnnx: it is no protobuf message, or one without a graph.
    """
    locations: dict[str, None] = {}
    graph: tuple[int, int] | None = None
    waiting: list[tuple[str, int, int]] = [("model", 0, len(data))]
    while waiting:
        kind, start, end = waiting.pop()
        leads = _SCHEMA[kind]
        for number, value, begin, stop in _fields(data, start, end):
            inner = leads.get(number)
            if inner is None or value is not None:
                continue
            if kind == "model" and inner == "graph":
                graph = (begin, stop)
            if inner == "tensor":
                found = _location(data, begin, stop)
                if found is not None:
                    locations[found] = None
            else:
                waiting.append((inner, begin, stop))
    if graph is None:
        raise NotOnnx("it has no graph")
    return OnnxFacts(tuple(locations), _signature(data, *graph))


def _location(data: Any, start: int, end: int) -> str | None:
    """The file of a tensor whose elements are elsewhere; None for one that holds them itself."""
    entries: dict[str, str] = {}
    external = False
    for number, value, begin, stop in _fields(data, start, end):
        if number == 14:
            external = value == _EXTERNAL
        elif number == 13 and value is None:
            pair = {n: _text(data, b, s) for n, v, b, s in _fields(data, begin, stop) if v is None and n in (1, 2)}
            entries[pair.get(1, "")] = pair.get(2, "")
    if not external:
        return None
    if "location" not in entries:
        raise NotOnnx("a tensor is said to be in another file, and the file's name is missing")
    return entries["location"]


def _signature(data: Any, start: int, end: int) -> ModelMetadata | None:
    initialized: set[str] = set()
    sides: dict[int, list[tuple[str, str, tuple[int, ...]]]] = {11: [], 12: []}
    for number, value, begin, stop in _fields(data, start, end):
        if value is not None:
            continue
        if number == 5:
            names = [_text(data, b, s) for n, v, b, s in _fields(data, begin, stop) if n == 8 and v is None]
            initialized.update(names[-1:])
        elif number in sides:
            spec = _value_info(data, begin, stop)
            if spec is None:
                return None
            sides[number].append(spec)
    inputs, outputs = (
        tuple(TensorSpec(name, datatype, shape, optional=name in initialized) for name, datatype, shape in sides[side])
        for side in (11, 12)
    )
    return ModelMetadata(name="the model", versions=(), platform="onnx", inputs=inputs, outputs=outputs)


def _value_info(data: Any, start: int, end: int) -> tuple[str, str, tuple[int, ...]] | None:
    name = ""
    tensor: tuple[int, int] | None = None
    for number, value, begin, stop in _fields(data, start, end):
        if number == 1 and value is None:
            name = _text(data, begin, stop)
        elif number == 2 and value is None:
            tensor = next(((b, s) for n, v, b, s in _fields(data, begin, stop) if n == 1 and v is None), None)
    if tensor is None:
        return None
    datatype: str | None = None
    shape: tuple[int, ...] | None = None
    for number, value, begin, stop in _fields(data, *tensor):
        if number == 1 and value is not None:
            datatype = _DATATYPES.get(value)
        elif number == 2 and value is None:
            dims = ((b, s) for n, v, b, s in _fields(data, begin, stop) if n == 1 and v is None)
            shape = tuple(_dim(data, b, s) for b, s in dims)
    return None if datatype is None or shape is None else (name, datatype, shape)


def _dim(data: Any, start: int, end: int) -> int:
    """A dimension's length; -1 where it is variable, whatever it is called."""
    for number, value, _, _ in _fields(data, start, end):
        if number == 1 and value is not None:
            return value if 0 < value < 2**63 else -1
    return -1


def _text(data: Any, start: int, end: int) -> str:
    try:
        return bytes(data[start:end]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotOnnx("a name in it is no text") from error


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, int | None, int, int]]:
    """The fields of a message: number, its value where it is a varint and else None, and where its content lies."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        value: int | None = None
        begin = at
        if wire == 0:
            value, at = _varint(data, at, end)
        elif wire == 2:
            length, begin = _varint(data, at, end)
            at = begin + length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
            value = -1  # a fixed number, which no field of ours is
        else:
            raise NotOnnx("it is no protobuf message")
        if at > end or number == 0:
            raise NotOnnx("it is no protobuf message, or it is cut off")
        yield number, value, begin, at


def _varint(data: Any, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise NotOnnx("it is no protobuf message, or it is cut off")
