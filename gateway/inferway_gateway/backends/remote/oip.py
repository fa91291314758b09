"""The Open Inference Protocol v2 as its client: tensors to requests, answers to tensors, metadata to a signature.

Whatever comes is checked before it is used: names, datatypes, shapes and lengths are those of the signature or the
answer is an error of the upstream. Nothing is allocated because an upstream says a large number.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Final
from urllib.parse import quote

import numpy as np
import orjson
from numpy.typing import NDArray

from ...core.errors import UpstreamError
from ...core.tensors import DTYPES, MAX_RANK, Arrays, Signature, TensorSpec
from ...core.upstream import has_dots
from .transport import Buffer

MAX_TENSORS: Final = 256
MAX_NAME: Final = 256
MAX_DIMENSION: Final = 2**40
MAX_METADATA_BYTES: Final = 1 << 20
MAX_JSON_BYTES: Final = 32 << 20
MAX_JSON_STRUCTURES: Final = 1_000_000
"""Arrays and objects of an answer: each empty one takes two bytes on the wire and 56 of memory."""
BINARY_EXTENSION: Final = "binary_tensor_data"
LONG_BYTES: Final = 128 * 1024
"""JSON and strings longer than this are written and read on a thread."""
_FRAME: Final = struct.Struct("<I")
_NO_JSON_FORM: Final = frozenset({"FP16", "BF16"})


class SignatureMismatchError(UpstreamError):
    """The upstream's model is no longer the one that its metadata told of when it was loaded."""


def model_path(model: str, version: str | None) -> str:
    """The path of a model at an upstream.

    Raises:
        UpstreamError: a name has ``.`` or ``..`` between slashes, which may lead elsewhere however they are escaped.
    """
    if has_dots(model) or has_dots(version or ""):
        raise UpstreamError("expected names of a model and its version without '.' or '..' between slashes")
    path = "/v2/models/" + quote(model, safe="")
    return path if version is None else f"{path}/versions/{quote(version, safe='')}"


def read_extensions(body: bytes | bytearray) -> frozenset[str]:
    """The extensions of a server's metadata; none where it says none."""
    found = parse_json(body).get("extensions")
    return frozenset(e for e in found if isinstance(e, str)) if isinstance(found, list) else frozenset()


def read_signature(body: bytes | bytearray, batched: bool | None) -> Signature:
    """The signature that a model's metadata tells of.

    Args:
        batched: whether axis 0 counts rows; None: where it is variable in every input and output.
    Raises:
        UpstreamError: it is no metadata, or tells of what no model has.
    """
    found = parse_json(body)
    inputs = _specs(found.get("inputs"), "inputs")
    outputs = _specs(found.get("outputs"), "outputs")
    if not outputs:
        raise UpstreamError("expected the upstream's metadata to tell of outputs, it tells of none")
    rows = all(spec.shape and spec.shape[0] == -1 for spec in (*inputs, *outputs)) and bool(inputs)
    if batched and not rows:
        raise UpstreamError("expected a first dimension of -1 in every input and output of a batched model")
    return Signature(inputs, outputs, batched=rows if batched is None else batched)


def _specs(found: Any, what: str) -> tuple[TensorSpec, ...]:
    if not isinstance(found, list) or len(found) > MAX_TENSORS:
        raise UpstreamError(f"expected at most {MAX_TENSORS} {what} in the upstream's metadata")
    specs: list[TensorSpec] = []
    for item in found:
        name, datatype, shape = (
            (item.get(k) for k in ("name", "datatype", "shape")) if isinstance(item, dict) else "   "
        )
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise UpstreamError(f"expected a name for each of {what} in the upstream's metadata")
        if any(spec.name == name for spec in specs):
            raise UpstreamError(f"expected each of {what} once in the upstream's metadata, '{name}' is there twice")
        if datatype not in DTYPES:
            raise UpstreamError(f"expected a datatype of the protocol for '{name}' in the upstream's metadata")
        if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_dimension(d, -1) for d in shape):
            raise UpstreamError(f"expected dimensions from -1 for '{name}' in the upstream's metadata")
        specs.append(TensorSpec(name, datatype, tuple(shape), optional=item.get("optional") is True))
    return tuple(specs)


def encode_request(
    signature: Signature, inputs: Arrays, outputs: Sequence[str], *, binary: bool, priority: int = 0, name: str = ""
) -> tuple[list[Buffer], int | None]:
    """Write an inference request.

    Args:
        name: the request's ``id``; some of KServe's models fail without one.
    Returns:
        The buffers of the body and the length of its JSON part, None where it is all JSON.
    Raises:
        UpstreamError: a tensor has no form in JSON, which is all that the upstream takes.
    """
    head: dict[str, Any] = {"id": name, "inputs": []} if name else {"inputs": []}
    tail: list[Buffer] = []
    for key, value in inputs.items():
        datatype = signature.input(key).datatype
        tensor: dict[str, Any] = {"name": key, "datatype": datatype, "shape": list(value.shape)}
        if binary:
            data = _to_binary(datatype, value)
            tensor["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            tensor["data"] = _to_json(key, datatype, value)
        head["inputs"].append(tensor)
    head["outputs"] = [{"name": n, "parameters": {"binary_data": True}} if binary else {"name": n} for n in outputs]
    if priority:
        head["parameters"] = {"priority": priority}
    text = _dumps(head)
    return [text, *tail], len(text) if binary else None


def decode_answer(
    signature: Signature, outputs: Sequence[str], body: bytes | bytearray, header_length: str | None, rows: int | None
) -> list[NDArray[Any]]:
    """Read an inference answer.

    Args:
        header_length: value of ``Inference-Header-Content-Length``; None where it is absent.
        rows: what axis 0 of every output has to be; None where the signature is not batched.
    Returns:
        One array per name of ``outputs``, C-contiguous, of the signature's datatype and within its shape.
    Raises:
        SignatureMismatchError: an output has another datatype, rank or fixed dimension than the signature says.
        UpstreamError: the answer is none, or lies about its lengths.
    """
    view = memoryview(body)
    length = len(view)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and int(header_length[:12]) <= len(view)):
            raise UpstreamError("the upstream's answer has a wrong Inference-Header-Content-Length")
        length = int(header_length)
    head = parse_json(view[:length])
    rest = view[length:]
    found: dict[str, NDArray[Any]] = {}
    items = head.get("outputs")
    if not isinstance(items, list) or len(items) > MAX_TENSORS:
        raise UpstreamError("expected 'outputs' as an array of tensors in the upstream's answer")
    position = 0
    for item in items:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or name in found:
            raise UpstreamError("expected a name of its own for each output of the upstream's answer")
        parameters = item.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        data = None
        if size is not None:
            if not _is_dimension(size, 0) or size > len(rest) - position:
                raise UpstreamError(f"output '{name[:64]}' of the upstream's answer is longer than the answer")
            data = rest[position : position + size]
            position += size
        if name in outputs:
            found[name] = _tensor(signature.output(name), item, data, rows)
    if position != len(rest):
        raise UpstreamError(f"the upstream's answer has {len(rest) - position} bytes that belong to no output")
    missing = [name for name in outputs if name not in found]
    if missing:
        raise SignatureMismatchError(f"the upstream's answer lacks output '{missing[0]}'")
    return [found[name] for name in outputs]


def read_error(body: bytes | bytearray) -> str:
    """What an upstream says of an error, fit for a message; empty where it says nothing."""
    try:
        found = orjson.loads(bytes(body[:65536]))
    except orjson.JSONDecodeError:
        return ""
    said = found.get("error", found.get("detail")) if isinstance(found, dict) else None
    if isinstance(said, dict):
        said = said.get("message")
    return "".join(c if c.isprintable() else " " for c in said[:300]).strip() if isinstance(said, str) else ""


def _tensor(spec: TensorSpec, item: Mapping[str, Any], data: memoryview | None, rows: int | None) -> NDArray[Any]:
    name = spec.name
    if item.get("datatype") != spec.datatype:
        raise SignatureMismatchError(f"output '{name}' of the upstream's answer is not {spec.datatype}")
    shape = item.get("shape")
    if not isinstance(shape, list) or not all(_is_dimension(d, 0) for d in shape):
        raise UpstreamError(f"expected dimensions from 0 for output '{name}' of the upstream's answer")
    if len(shape) != len(spec.shape) or any(w not in (-1, g) for w, g in zip(spec.shape, shape, strict=True)):
        raise SignatureMismatchError(
            f"output '{name}' of the upstream's answer has shape {shape[:8]}, expected {list(spec.shape)}"
        )
    if rows is not None and shape[0] != rows:
        raise UpstreamError(f"output '{name}' of the upstream's answer has {shape[0]} rows, expected {rows}")
    count = 1
    for d in shape:
        count *= d
    value = _from_json(spec, count, item) if data is None else _from_binary(spec, count, data)
    return value.reshape(shape)


def _from_binary(spec: TensorSpec, count: int, data: memoryview) -> NDArray[Any]:
    if spec.datatype == "BYTES":
        return _strings(spec.name, count, data)
    dtype = DTYPES[spec.datatype]
    if len(data) != count * dtype.itemsize:
        raise UpstreamError(
            f"output '{spec.name}' of the upstream's answer has {len(data)} bytes, expected {count * dtype.itemsize}"
        )
    if not count:
        return np.empty(0, dtype)
    if spec.datatype == "BOOL":
        return np.not_equal(np.frombuffer(data, np.uint8), 0)
    value: NDArray[Any] = np.frombuffer(data, dtype)
    return value if value.flags.aligned else value.copy()


def _strings(name: str, count: int, data: memoryview) -> NDArray[Any]:
    wrong = UpstreamError(f"expected {count} framed strings as output '{name}' of the upstream's answer")
    raw = bytes(data)
    if 4 * count > len(raw):
        raise wrong
    items: list[str] = []
    position = 0
    for _ in range(count):
        if position + 4 > len(raw):
            raise wrong
        (length,) = _FRAME.unpack_from(raw, position)
        position += 4 + length
        if position > len(raw):
            raise wrong
        items.append(_text(name, raw[position - length : position]))
    if position != len(raw):
        raise wrong
    return _objects(items)


def _text(name: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise UpstreamError(f"expected UTF-8 strings as output '{name}' of the upstream's answer") from None


def _objects(items: list[str]) -> NDArray[Any]:
    value = np.empty(len(items), dtype=object)
    value[:] = items
    return value


def _from_json(spec: TensorSpec, count: int, item: Mapping[str, Any]) -> NDArray[Any]:
    name, datatype = spec.name, spec.datatype
    data = item.get("data")
    depth = 0
    while isinstance(data, list) and data and isinstance(data[0], list) and depth < MAX_RANK:
        if not all(isinstance(row, list) for row in data):
            break
        data = list(chain.from_iterable(data))
        depth += 1
    if not isinstance(data, list) or len(data) != count:
        raise UpstreamError(f"expected {count} elements as output '{name}' of the upstream's answer")
    types = set(map(type, data))
    if datatype == "BYTES":
        if types - {str}:
            raise UpstreamError(f"expected strings as output '{name}' of the upstream's answer")
        return _objects(data)
    allowed: set[type] = {bool, int} if datatype == "BOOL" else {int}
    if datatype in ("FP32", "FP64", "FP16"):
        # KServe and MLServer write null for what is not a number.
        allowed = {int, float, type(None)}
    if types - allowed or datatype == "BF16":
        raise UpstreamError(f"expected elements of {datatype} as output '{name}' of the upstream's answer")
    try:
        with np.errstate(over="ignore"):
            return np.array(data, DTYPES[datatype]) if count else np.empty(0, DTYPES[datatype])
    except (OverflowError, ValueError, TypeError):
        raise UpstreamError(f"expected elements of {datatype} as output '{name}' of the upstream's answer") from None


def _to_binary(datatype: str, value: NDArray[Any]) -> Buffer:
    if datatype == "BYTES":
        framed = bytearray()
        for item in value.ravel().tolist():
            raw = item.encode() if isinstance(item, str) else item
            framed += _FRAME.pack(len(raw))
            framed += raw
        return framed
    if not value.size:
        return b""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _to_json(name: str, datatype: str, value: NDArray[Any]) -> list[Any]:
    if datatype in _NO_JSON_FORM:
        raise UpstreamError(
            f"input '{name}' is {datatype}, which has no form in JSON, and the upstream takes only that"
        )
    flat: list[Any] = value.ravel().tolist()
    return flat


def _dumps(head: dict[str, Any]) -> bytes:
    for tensor in head["inputs"]:
        data = tensor.get("data")
        if data and isinstance(data[0], float) and not np.isfinite(data).all():
            return json.dumps(head).encode()  # NaN and Infinity, as the protocol's servers take them
    return orjson.dumps(head)


def parse_json(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The object that an upstream's JSON is; NaN and Infinity are taken as tokens.

    Raises:
        UpstreamError: it is none, or its parsing would take more memory than any answer is worth.
    """
    if len(body) > MAX_JSON_BYTES:
        raise UpstreamError(f"expected at most {MAX_JSON_BYTES} bytes of JSON in the upstream's answer")
    raw = bytes(body)
    if len(raw) > MAX_JSON_STRUCTURES and raw.count(b"[") + raw.count(b"{") > MAX_JSON_STRUCTURES:
        raise UpstreamError(f"expected at most {MAX_JSON_STRUCTURES} arrays and objects in the upstream's answer")
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            found = json.loads(raw) if b"NaN" in raw or b"Infinity" in raw else None
        except (ValueError, RecursionError):
            found = None
        if found is None:
            raise UpstreamError("the upstream's answer is not JSON") from None
    if not isinstance(found, dict):
        raise UpstreamError("expected a JSON object as the upstream's answer")
    return found


def _is_dimension(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= MAX_DIMENSION
