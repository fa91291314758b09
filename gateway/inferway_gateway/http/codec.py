"""Inference bodies to core tensors and back: JSON, binary tensors, and any mix of the two.

This is the hot path of the gateway, so it works on plain dicts and numpy arrays, and every check is made by hand.
Source: Open Inference Protocol v2, REST; Triton's binary tensor data, classification and parameters extensions.
"""

from __future__ import annotations

import gc
import json
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from ..core.batcher import InferenceRequest
from ..core.errors import InvalidParameterError, InvalidTensorError, MalformedRequestError, PayloadTooLargeError
from ..core.tensors import DTYPES, MAX_RANK, Signature, TensorSpec

JSON_STRUCTURE_LIMIT: Final = 400_000
"""Objects and arrays a JSON body may hold. Each empty one costs a parser some 56 bytes for two on the wire, so their
number, not the length of the body, bounds memory and the time for which the event loop stands still."""

OFF_LOOP_JSON_BYTES: Final = 128 * 1024
"""JSON and strings longer than this, some milliseconds' worth, are read on a thread."""
OFF_LOOP_ELEMENTS: Final = 16 * 1024
"""An output of more elements that is sent as text or as strings is written on a thread."""

CLASSIFICATION_LIMIT: Final = 1_000_000
"""Classes that one output is told as. Each is a string that costs a microsecond; 32 million of them, asked for with
120 kB of gzip, took two minutes."""

_TYPECODES: Final = {
    "INT8": "b", "UINT8": "B", "INT16": "h", "UINT16": "H", "INT32": "i", "UINT32": "I", "INT64": "q", "UINT64": "Q",
    "FP32": "f", "FP64": "d",
}  # fmt: skip
_INTS: Final = frozenset({int})
_NUMBERS: Final = (frozenset({int}), frozenset({float}), frozenset({int, float}))
_FLOATS: Final = frozenset({"FP32", "FP64"})
_FRAME: Final = struct.Struct("<I")
_NO_JSON_FORM: Final = frozenset({"FP16", "BF16"})
_EMPTY: Final[dict[str, Any]] = {}
_INT64_MAX: Final = 2**63 - 1
_UINT64_MAX: Final = 2**64 - 1
_PIECE_ELEMENTS: Final = 1 << 16
"""Elements that one call of orjson or numpy turns into text or strings: it lets no other thread run meanwhile."""


@dataclass(slots=True)
class OutputForm:
    """How one requested output is to be sent. ``classification`` is the k of top-k, 0 for the tensor itself."""

    binary: bool
    classification: int = 0


@dataclass(slots=True)
class DecodedRequest(InferenceRequest):
    """An inference request after its bytes: what the core is asked, and how the answer is to be written.

    ``inputs`` may share memory with the body. ``rows`` and ``deadline`` are for the caller of ``decode`` to set.

    Attributes:
        forms: one per name of ``outputs``; None is the same as all JSON.
        id: echoed in the answer; None where the request had none.
    """

    forms: tuple[OutputForm, ...] | None = None
    id: str | None = None


class SignatureCodec:
    """Encodes and decodes for one model version. Holds what is the same for every request of it.

    Args:
        name, version: as they stand in the path and in the answer.
        signature: the version's inputs and outputs.
    """

    __slots__ = (
        "_few_parts",
        "_head",
        "_inputs",
        "_outputs",
        "_shapes",
        "_takes_strings",
        "name",
        "output_names",
        "signature",
        "version_header",
    )

    def __init__(self, name: str, version: str, signature: Signature) -> None:
        self.name = name
        self.signature = signature
        self.output_names = signature.output_names
        self.version_header = (b"inferway-model-version", version.encode())
        self._head = b'{"model_name":%s,"model_version":%s' % (orjson.dumps(name), orjson.dumps(version))
        self._outputs: dict[str, tuple[TensorSpec, bytes, bytes]] = {
            s.name: (s, *_output_prefixes(s.name, s.datatype)) for s in signature.outputs
        }
        self._inputs = {s.name: s for s in signature.inputs}
        self._shapes: dict[tuple[int, ...], bytes] = {}
        self._few_parts = 3 + 6 * len(signature.outputs)
        self._takes_strings = any(s.datatype == "BYTES" for s in signature.inputs)

    # ------------------------------------------------------------------ requests

    def decodes_long(self, size: int, header_length: int | None) -> bool:
        """Whether ``decode`` may take long enough to belong on a thread: JSON and strings, unlike numbers in binary,
        cost time by the byte.

        Args:
            size: bytes of the whole body.
            header_length: as ``decode`` takes it.
        """
        if size <= OFF_LOOP_JSON_BYTES:
            return False
        return self._takes_strings or header_length is None or header_length > OFF_LOOP_JSON_BYTES

    def decode(
        self, body: bytes | bytearray | memoryview, header_length: int | None, json_limit: int
    ) -> DecodedRequest:
        """Read a request body.

        Args:
            body: the decompressed body.
            header_length: value of ``Inference-Header-Content-Length``; None where the header is absent; 0 is a raw
                request, whose body is the only input's bytes.
            json_limit: the most bytes that the JSON part may have.
        Raises:
            MalformedRequestError, InvalidTensorError, InvalidParameterError: what was expected and what came.
            PayloadTooLargeError: the JSON part is longer than ``json_limit``.
        """
        if header_length is None:
            return self._decode(load_json(body, json_limit), None)
        view = memoryview(body)
        if header_length > len(view):
            raise MalformedRequestError(
                f"Inference-Header-Content-Length is {header_length}, expected at most the body's {len(view)} bytes"
            )
        if header_length == 0:
            return self._decode_raw(view)
        return self._decode(load_json(view[:header_length], json_limit), view[header_length:])

    def _decode(self, head: Any, rest: memoryview | None) -> DecodedRequest:
        if type(head) is not dict:
            raise MalformedRequestError(f"expected a JSON object as the request, got {_kind(head)}")
        inputs = head.get("inputs")
        if type(inputs) is not list:
            raise MalformedRequestError(f"expected 'inputs' to be an array of tensors, got {_kind(inputs)}")
        arrays: dict[str, NDArray[Any]] = {}
        offset = 0
        nbytes = 0
        known = self._inputs
        for item in inputs:
            if type(item) is not dict:
                raise MalformedRequestError(f"expected each of 'inputs' to be an object, got {_kind(item)}")
            name = item.get("name")
            if type(name) is not str:
                raise MalformedRequestError(f"expected 'name' of an input to be a string, got {_kind(name)}")
            if name in arrays:
                raise InvalidTensorError(f"input '{name}' already exists in request")
            spec = known.get(name) or self.signature.input(name)
            shape = item.get("shape")
            if type(shape) is not list:
                raise InvalidTensorError(f"input '{name}' expects 'shape' as an array of integers, got {_kind(shape)}")
            count = _count(name, shape)
            datatype = item.get("datatype")
            if datatype != spec.datatype:
                raise InvalidTensorError(f"input '{name}' expects datatype {spec.datatype}, got {_said(datatype)}")
            parameters = item.get("parameters")
            if parameters is not None:
                if type(parameters) is not dict:
                    raise MalformedRequestError(
                        f"expected 'parameters' of input '{name}' to be an object, got {_kind(parameters)}"
                    )
                if "shared_memory_region" in parameters:
                    raise InvalidTensorError(f"input '{name}' names shared memory, which this server does not offer")
                size = parameters.get("binary_data_size")
                if size is not None:
                    if type(size) is not int or size < 0:
                        raise InvalidTensorError(
                            f"input '{name}' expects 'binary_data_size' as a non-negative integer, got {_said(size)}"
                        )
                    if "data" in item:
                        raise InvalidTensorError(f"input '{name}' has both 'data' and 'binary_data_size'")
                    have = 0 if rest is None else len(rest) - offset
                    if size > have:
                        raise InvalidTensorError(
                            f"unexpected size for input '{name}', expecting {size - have} additional bytes "
                            f"for model '{self.name}'"
                        )
                    data = memoryview(b"") if rest is None else rest[offset : offset + size]
                    offset += size
                    arrays[name] = value = _from_binary(name, datatype, shape, count, data)
                    nbytes += size if datatype == "BYTES" else value.nbytes
                    continue
            if "data" not in item:
                raise InvalidTensorError(f"input '{name}' has neither 'data' nor 'binary_data_size'")
            arrays[name] = value = _from_json(name, datatype, shape, count, item["data"])
            nbytes += value.nbytes
        if rest is not None and offset != len(rest):
            raise InvalidTensorError(
                f"unexpected additional input data for model '{self.name}': "
                f"expected {offset} bytes after the JSON header, got {len(rest)}"
            )
        return self._request(head, arrays, nbytes)

    def _request(self, head: dict[str, Any], arrays: dict[str, NDArray[Any]], nbytes: int) -> DecodedRequest:
        binary_default = False
        priority = 0
        timeout_s = None
        parameters = head.get("parameters")
        if parameters is not None:
            if type(parameters) is not dict:
                raise MalformedRequestError(f"expected 'parameters' to be an object, got {_kind(parameters)}")
            binary_default, priority, timeout_s = _request_parameters(parameters)
        id_ = head.get("id")
        if id_ is not None and type(id_) is not str:
            raise MalformedRequestError(f"expected 'id' to be a string, got {_kind(id_)}")
        wanted = head.get("outputs")
        if not wanted:
            if wanted is not None and type(wanted) is not list:
                raise MalformedRequestError(f"expected 'outputs' to be an array, got {_kind(wanted)}")
            names = self.output_names
            forms = tuple([OutputForm(True)] * len(names)) if binary_default else None
        else:
            names, forms = self._wanted(wanted)
        return DecodedRequest(arrays, names, 1, nbytes, priority, None, timeout_s, forms, id_)

    def _wanted(self, wanted: Any) -> tuple[tuple[str, ...], tuple[OutputForm, ...]]:
        if type(wanted) is not list:
            raise MalformedRequestError(f"expected 'outputs' to be an array, got {_kind(wanted)}")
        forms: dict[str, OutputForm] = {}
        for item in wanted:
            if type(item) is not dict:
                raise MalformedRequestError(f"expected each of 'outputs' to be an object, got {_kind(item)}")
            name = item.get("name")
            if type(name) is not str:
                raise MalformedRequestError(f"expected 'name' of an output to be a string, got {_kind(name)}")
            spec = self.signature.output(name)
            if name in forms:
                raise InvalidTensorError(f"output '{name}' already exists in request")
            parameters = item.get("parameters")
            if parameters is None:
                parameters = _EMPTY
            elif type(parameters) is not dict:
                raise MalformedRequestError(
                    f"expected 'parameters' of output '{name}' to be an object, got {_kind(parameters)}"
                )
            if "shared_memory_region" in parameters:
                raise InvalidTensorError(f"output '{name}' names shared memory, which this server does not offer")
            binary = parameters.get("binary_data", False)
            if type(binary) is not bool:
                raise InvalidParameterError(f"'binary_data' of output '{name}' expects a boolean, got {_said(binary)}")
            k = parameters.get("classification", 0)
            if type(k) is not int or k < 0 or ("classification" in parameters and k == 0):
                raise InvalidParameterError(
                    f"'classification' of output '{name}' expects a positive integer, got {_said(k)}"
                )
            if k and spec.datatype in ("BYTES", "BOOL"):
                raise InvalidParameterError(f"'classification' of output '{name}' expects numbers, not {spec.datatype}")
            forms[name] = OutputForm(binary, k)
        return tuple(forms), tuple(forms.values())

    def _decode_raw(self, view: memoryview) -> DecodedRequest:
        inputs = self.signature.inputs
        if len(inputs) != 1:
            raise MalformedRequestError(
                f"Raw request must only have 1 input (found 1) to be deduced but got {len(inputs)} inputs in "
                f"'{self.name}' model configuration"
            )
        spec = inputs[0]
        dims = spec.shape[1:] if self.signature.batched else spec.shape
        if sum(d == -1 for d in dims) > 1:
            raise MalformedRequestError(
                f"The shape of the raw input '{spec.name}' can not be deduced because there are more than one "
                "variable-sized dimension"
            )
        value: NDArray[Any]
        if spec.datatype == "BYTES":
            if tuple(dims) not in ((1,), (-1,)):
                raise MalformedRequestError(
                    f"For BYTE datatype raw input '{spec.name}', the model must have input shape [1]"
                )
            value = np.empty((1, 1) if self.signature.batched else (1,), dtype=object)
            value.flat[0] = _text(spec.name, view)
        else:
            dtype = DTYPES[spec.datatype]
            unit = dtype.itemsize
            for d in dims:
                unit *= d if d != -1 else 1
            variable = -1 in dims
            if (unit == 0 and len(view)) or (unit and len(view) % unit) or (not variable and len(view) != unit):
                raise InvalidTensorError(
                    f"raw input '{spec.name}' expects "
                    f"{'a multiple of ' if variable else ''}{unit} bytes, got {len(view)}"
                )
            length = len(view) // unit if unit else 0
            shape = [length if d == -1 else d for d in dims]
            if self.signature.batched:
                shape.insert(0, 1)
            value = _from_binary(spec.name, spec.datatype, shape, _count(spec.name, shape), view)
        names = self.output_names
        forms = tuple([OutputForm(True)] * len(names))
        return DecodedRequest({spec.name: value}, names, 1, len(view), forms=forms)

    # ------------------------------------------------------------------ answers

    def encodes_long(self, request: DecodedRequest, outputs: Sequence[NDArray[Any]]) -> bool:
        """Whether ``encode`` may take long enough to belong on a thread. Takes what ``encode`` takes."""
        for i, value in enumerate(outputs):
            if value.size > OFF_LOOP_ELEMENTS:
                form = None if request.forms is None else request.forms[i]
                if form is None or not form.binary or form.classification or value.dtype.hasobject:
                    return True
        return False

    def encode(
        self, request: DecodedRequest, outputs: Sequence[NDArray[Any]]
    ) -> tuple[list[bytes | memoryview], int | None]:
        """Write an answer.

        Args:
            request: what was asked.
            outputs: one C-contiguous array per name of ``request.outputs``.
        Returns:
            The parts of the body, to be sent in order, and the length of its JSON header, which is None where the
            whole body is JSON. The parts may share memory with ``outputs``.
        Raises:
            InvalidParameterError: an FP16 or BF16 output was asked for in JSON, or too many classes.
        """
        json_parts = [self._head]
        if request.id is not None:
            json_parts.append(b',"id":' + orjson.dumps(request.id))
        tail: list[bytes | memoryview] = []
        forms = request.forms
        table = self._outputs
        lead = b',"outputs":['
        for i, name in enumerate(request.outputs):
            value = outputs[i]
            spec, prefix, class_prefix = table[name]
            form = None if forms is None else forms[i]
            if form is not None and form.classification:
                value = classify(spec, value, form.classification, batched=self.signature.batched)
                prefix, datatype = class_prefix, "BYTES"
            else:
                datatype = spec.datatype
            shape = value.shape
            shape_json = self._shapes.get(shape)
            if shape_json is None:
                shape_json = b"[" + ",".join(map(str, shape)).encode() + b"]"
                if len(self._shapes) < 256:
                    self._shapes[shape] = shape_json
            if form is not None and form.binary:
                part = to_binary(datatype, value)
                json_parts += (lead, prefix, shape_json, b',"parameters":{"binary_data_size":%d}}' % len(part))
                if len(part):
                    tail.append(part)
            else:
                json_parts += (lead, prefix, shape_json, b',"data":[', *to_json(name, datatype, value), b"]}")
            lead = b","
        json_parts.append(b"]}")
        if len(json_parts) > self._few_parts:  # long tensors come in pieces, and joining them would copy all of it
            return [*json_parts, *tail], sum(map(len, json_parts)) if tail else None
        head = b"".join(json_parts)
        if tail:
            return [head, *tail], len(head)
        return [head], None


def load_json(body: bytes | bytearray | memoryview, limit: int) -> Any:
    """Parse a JSON body. NaN, Infinity and -Infinity are accepted as tokens.

    Raises:
        PayloadTooLargeError: more than ``limit`` bytes, or more than ``JSON_STRUCTURE_LIMIT`` objects and arrays.
        MalformedRequestError: not JSON, or nested too deeply.
    """
    size = len(memoryview(body))
    if size > limit:
        raise PayloadTooLargeError(
            f"expected at most {limit} bytes of JSON, got {size}; send large tensors as binary data"
        )
    if size > JSON_STRUCTURE_LIMIT:
        raw = bytes(body)
        structures = raw.count(b"[") + raw.count(b"{")
        if structures > JSON_STRUCTURE_LIMIT:
            raise PayloadTooLargeError(
                f"expected at most {JSON_STRUCTURE_LIMIT} arrays and objects in JSON, got {structures}; "
                "send tensor data flat or as binary"
            )
    # Nothing that a parser makes is garbage, yet several hundred thousand new lists have the collector look for some
    # again and again, which took two thirds of the time (5.5 MB of rows of five: 160 ms, without it 56 ms).
    collecting = size > OFF_LOOP_JSON_BYTES and gc.isenabled()
    if collecting:
        gc.disable()
    try:
        return _parse(body)
    finally:
        if collecting:
            gc.enable()


def _parse(body: bytes | bytearray | memoryview) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raw = bytes(body)
        if b"NaN" in raw or b"Infinity" in raw:
            try:
                value = json.loads(str(raw, "utf-8"))
                if b"\\ud" in raw or b"\\uD" in raw:
                    json.dumps(value, ensure_ascii=False).encode()  # lone surrogates are no text
                return value
            except (ValueError, RecursionError):
                pass
        if not raw.strip():
            raise MalformedRequestError("expected a JSON object as the request, got an empty body") from None
        raise MalformedRequestError(f"Unable to parse the JSON of the request: {error}") from None


def _request_parameters(parameters: dict[str, Any]) -> tuple[bool, int, float | None]:
    binary = parameters.get("binary_data_output", False)
    if type(binary) is not bool:
        raise InvalidParameterError(f"'binary_data_output' expects a boolean, got {_said(binary)}")
    priority = parameters.get("priority", 0)
    if type(priority) is not int or not 0 <= priority <= _UINT64_MAX:
        raise InvalidParameterError(f"'priority' expects an unsigned integer, got {_said(priority)}")
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or not 0 <= timeout <= _UINT64_MAX:
        raise InvalidParameterError(f"'timeout' expects an unsigned integer of microseconds, got {_said(timeout)}")
    for key in parameters:
        if key.startswith("triton_"):
            raise InvalidParameterError(f"parameter keys starting with 'triton_' are reserved, got '{key[:64]}'")
    return binary, priority, timeout / 1e6 if timeout else None


def _count(name: str, shape: list[Any]) -> int:
    """Elements of a shape, with Python's unbounded integers: the rank and the dimensions bound how large they get."""
    if len(shape) > MAX_RANK:
        raise InvalidTensorError(f"input '{name}' expects at most {MAX_RANK} dimensions, got {len(shape)}")
    count = 1
    for d in shape:
        if type(d) is not int or d < 0:
            raise InvalidTensorError(f"input '{name}' expects dimensions as non-negative integers, got {_said(d)}")
        if d > _INT64_MAX:
            raise InvalidTensorError(f"input '{name}' expects dimensions below 2**63, got {_said(d)}")
        count *= d
    return count


def _from_json(name: str, datatype: str, shape: list[int], count: int, data: Any) -> NDArray[Any]:
    if datatype in _NO_JSON_FORM:
        raise InvalidTensorError(
            f"sending {datatype} data via JSON is not supported, input '{name}' expects binary tensor data"
        )
    if type(data) is not list:
        if shape or type(data) is dict:
            raise InvalidTensorError(f"input '{name}' expects 'data' as an array, got {_kind(data)}")
        data = [data]
    if data and type(data[0]) is list:
        data = _flatten(name, shape, data)
    if len(data) != count:
        raise InvalidTensorError(f"input '{name}' with shape {shape} expects {count} elements, got {len(data)}")
    types = set(map(type, data))
    value: NDArray[Any]
    code = _TYPECODES.get(datatype)
    if code is not None:
        if types != _INTS and types and (datatype not in _FLOATS or types not in _NUMBERS):
            raise _wrong_elements(name, datatype, types, data)
        try:
            value = np.frombuffer(array(code, data), DTYPES[datatype]) if count else np.empty(0, DTYPES[datatype])
        except OverflowError:
            raise InvalidTensorError(f"input '{name}' has a number that lies outside the range of {datatype}") from None
        # A float32 that overflows turns into infinity without a word. The second look, only where there is an
        # infinity, tells those that were sent from those that were made.
        if code == "f" and not np.isfinite(value).all():
            sent = np.array(data, np.float64)
            if not np.array_equal(np.isinf(sent), np.isinf(value)):
                raise InvalidTensorError(f"input '{name}' has a number that lies outside the range of FP32")
    elif datatype == "BOOL":
        if types - {bool} and not (types == _INTS and all(v in (0, 1) for v in data)):
            raise _wrong_elements(name, datatype, types, data)
        value = np.array(data, np.bool_)
    else:
        if types - {str}:
            raise _wrong_elements(name, datatype, types, data)
        value = np.empty(count, dtype=object)
        value[:] = data
    return _reshape(name, value, shape)


def _flatten(name: str, shape: list[int], data: list[Any]) -> list[Any]:
    """Nested rows to one flat list; the nesting has to be that of ``shape``."""
    depth = 0
    while data and type(data[0]) is list:
        if depth + 1 >= len(shape):
            raise InvalidTensorError(f"input '{name}' with shape {shape} has 'data' nested deeper than its dimensions")
        if len(data) != _product(shape[: depth + 1]):
            break
        want = shape[depth + 1]
        for row in data:
            if type(row) is not list or len(row) != want:
                got = len(row) if type(row) is list else _kind(row)
                raise InvalidTensorError(
                    f"input '{name}' with shape {shape} expects rows of {want} elements at depth {depth + 1}, got {got}"
                )
        data = list(chain.from_iterable(data))
        depth += 1
    if data and type(data[0]) is list:
        raise InvalidTensorError(
            f"input '{name}' with shape {shape} expects {_product(shape[: depth + 1])} rows at depth {depth}, "
            f"got {len(data)}"
        )
    return data


def _product(shape: Sequence[int]) -> int:
    count = 1
    for d in shape:
        count *= d
    return count


def _from_binary(name: str, datatype: str, shape: list[int], count: int, data: memoryview) -> NDArray[Any]:
    if datatype == "BYTES":
        return _reshape(name, _strings(name, count, data), shape)
    dtype = DTYPES[datatype]
    want = count * dtype.itemsize
    if len(data) != want:
        raise InvalidTensorError(
            f"input '{name}' with shape {shape} and datatype {datatype} expects {want} bytes of binary data, "
            f"got {len(data)}"
        )
    if not want:
        return _reshape(name, np.empty(0, dtype), shape)
    value: NDArray[Any]
    if datatype == "BOOL":
        octets = np.frombuffer(data, np.uint8)
        value = octets.view(np.bool_) if octets.max() <= 1 else octets != 0
    else:
        value = np.frombuffer(data, dtype)
        if not value.flags.aligned:
            value = value.copy()
    return _reshape(name, value, shape)


def _strings(name: str, count: int, data: memoryview) -> NDArray[Any]:
    """Strings framed by their length in four bytes, little-endian."""
    total = len(data)
    if 4 * count > total:
        raise InvalidTensorError(
            f"input '{name}' expects {count} strings, got {total} bytes, too few for their lengths"
        )
    raw = data.tobytes()
    value = np.empty(count, dtype=object)
    position = 0
    unpack = _FRAME.unpack_from
    for start in range(0, count, _PIECE_ELEMENTS):
        items: list[str] = []
        for i in range(start, min(start + _PIECE_ELEMENTS, count)):
            if position + 4 > total:
                raise InvalidTensorError(f"input '{name}' expects {count} strings, got {i} in {total} bytes")
            (length,) = unpack(raw, position)
            position += 4
            if length > total - position:
                raise InvalidTensorError(
                    f"input '{name}' has a string of {length} bytes at element {i}, with {total - position} bytes left"
                )
            items.append(_text(name, raw[position : position + length]))
            position += length
        value[start : start + len(items)] = items
    if position != total:
        raise InvalidTensorError(f"input '{name}' expects {count} strings in {position} bytes, got {total} bytes")
    return value


def _text(name: str, raw: bytes | memoryview) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidTensorError(
            f"input '{name}' expects UTF-8 strings, got an invalid byte at position {error.start}"
        ) from None


def _reshape(name: str, value: NDArray[Any], shape: list[int]) -> NDArray[Any]:
    try:
        return value.reshape(shape)
    except (ValueError, OverflowError):
        raise InvalidTensorError(f"input '{name}' has shape {shape}, which no tensor can have") from None


def _wrong_elements(name: str, datatype: str, types: set[type], data: list[Any]) -> InvalidTensorError:
    if list in types:
        return InvalidTensorError(f"input '{name}' has 'data' with rows and elements mixed")
    wanted = {"BYTES": "strings", "BOOL": "booleans"}.get(datatype, "numbers" if datatype in _FLOATS else "integers")
    odd = next(v for v in data if type(v) is not int or datatype in ("BYTES", "BOOL"))
    return InvalidTensorError(f"input '{name}' with datatype {datatype} expects {wanted}, got {_said(odd)}")


def classify(spec: TensorSpec, value: NDArray[Any], k: int, *, batched: bool) -> NDArray[Any]:
    """The top ``k`` classes as strings ``value:index[:label]``, best first.

    Args:
        value: numbers of shape ``(rows, *dims)`` where ``batched``, else ``(*dims)``; classes are all of ``dims``.
        k: at most the number of classes are returned.
    Returns:
        An object array of ``str``, shape ``(rows, k)`` or ``(k,)``.
    Raises:
        InvalidParameterError: more than ``CLASSIFICATION_LIMIT`` strings would come of it.
    Source: Triton's classification extension; values are written as C++'s ``std::to_string`` does: integers as they
        are, the others with six decimals.
    """
    numbers = bf16_to_float32(value) if spec.datatype == "BF16" else value
    count = numbers.shape[0] if batched and numbers.ndim else 1
    rows = numbers.reshape(count, _product(numbers.shape) // count if count else _product(numbers.shape[1:]))
    k = min(k, rows.shape[1])
    if count * k > CLASSIFICATION_LIMIT:
        raise InvalidParameterError(
            f"'classification' of output '{spec.name}' expects to give at most {CLASSIFICATION_LIMIT} classes, "
            f"got {k} for each of {count} rows"
        )
    whole = rows.dtype.kind in "iu"
    # Best first and the earlier of equals first; inverting turns integers of any sign round without loss.
    best = np.argsort(np.invert(rows) if whole else -rows, axis=1, kind="stable")[:, :k]
    labels = spec.labels
    out = np.empty(best.shape, dtype=object)
    for r in range(best.shape[0]):
        for j in range(k):
            c = int(best[r, j])
            text = f"{rows[r, c]}:{c}" if whole else f"{rows[r, c]:f}:{c}"
            out[r, j] = f"{text}:{labels[c]}" if c < len(labels) else text
    return out if batched and numbers.ndim else out.reshape(-1)


def bf16_to_float32(bits: NDArray[Any]) -> NDArray[np.float32]:
    """BF16 bits in ``uint16`` to the float32 values that they stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_binary(datatype: str, value: NDArray[Any]) -> bytes | memoryview:
    """The bytes of a tensor as the binary extension sends them; shares memory with ``value`` where it can."""
    if datatype == "BYTES":
        framed = bytearray()
        pack = _FRAME.pack
        strings = value.ravel()
        for start in range(0, strings.size, _PIECE_ELEMENTS):
            for item in strings[start : start + _PIECE_ELEMENTS].tolist():
                raw = item.encode() if isinstance(item, str) else item
                framed += pack(len(raw))
                framed += raw
        return memoryview(framed)
    if not value.size:
        return b""
    if not value.flags.c_contiguous:
        value = np.ascontiguousarray(value)
    return value.reshape(-1).view(np.uint8).data


def to_json(name: str, datatype: str, value: NDArray[Any]) -> list[bytes]:
    """The elements of a tensor as JSON with commas between them; NaN and infinities as NaN, Infinity, -Infinity.

    Returns:
        The text, in pieces where it is long.
    Raises:
        InvalidParameterError: the datatype has no JSON form.
    """
    if datatype in _NO_JSON_FORM:
        raise InvalidParameterError(
            f"sending {datatype} data via JSON is not supported, ask for output '{name}' as binary data"
        )
    flat = np.ascontiguousarray(value).reshape(-1)
    write = _strings_to_text if datatype == "BYTES" else _floats_to_text if datatype in _FLOATS else _to_text
    if flat.size <= _PIECE_ELEMENTS:
        return [write(flat)]
    texts: list[bytes] = []
    for i in range(0, flat.size, _PIECE_ELEMENTS):
        texts += (b",", write(flat[i : i + _PIECE_ELEMENTS]))
    return texts[1:]


def _to_text(flat: NDArray[Any]) -> bytes:
    """The elements with commas between them; what is not finite is ``null``."""
    return orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def _strings_to_text(flat: NDArray[Any]) -> bytes:
    return orjson.dumps(flat.tolist())[1:-1]


def _floats_to_text(flat: NDArray[Any]) -> bytes:
    text = _to_text(flat)
    finite = np.isfinite(flat)
    if finite.all():
        return text
    odd = flat[~finite]
    tokens = np.where(odd > 0, b"Infinity", np.where(odd < 0, b"-Infinity", b"NaN")).tolist()
    tokens.append(b"")
    return b"".join(chain.from_iterable(zip(text.split(b"null"), tokens, strict=True)))


def _output_prefixes(name: str, datatype: str) -> tuple[bytes, bytes]:
    quoted = orjson.dumps(name)
    return (
        b'{"name":%s,"datatype":"%s","shape":' % (quoted, datatype.encode()),
        b'{"name":%s,"datatype":"BYTES","shape":' % quoted,
    )


def _kind(value: Any) -> str:
    """The JSON kind of a parsed value, for messages; never its content."""
    if value is None:
        return "nothing"
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number"}
    return kinds.get(type(value), "a number")


def _said(value: Any) -> str:
    """A short value for a message: numbers and names as they are, everything else by kind."""
    if isinstance(value, bool | int | float):
        text = repr(value)
        return text if len(text) <= 40 else "a very large number"
    if isinstance(value, str) and len(value) <= 40 and value.isprintable():
        return f"'{value}'"
    return _kind(value)
