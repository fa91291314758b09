"""Numpy arrays to and from the wire's tensors: datatypes, casts that lose nothing, binary and JSON forms.

Two datatypes have no numpy dtype of their own. ``BF16`` is accepted as its bits in ``uint16``, as
``ml_dtypes.bfloat16`` or as any float, rounded to nearest even, and comes back as ``float32``, which holds every BF16
value exactly. ``BYTES`` is an object array of ``str``; bytes that are no UTF-8 survive as lone surrogates
(``surrogateescape``), so that ``text.encode("utf-8", "surrogateescape")`` always gives the bytes back.

Source: Open Inference Protocol v2, "Tensor Data Types" and "Tensor Data"; Triton's binary tensor data extension.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ._errors import InvalidInputError, MalformedAnswer

Array = NDArray[Any]

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
"""Datatype to the numpy dtype that carries it on the wire; for BF16 its bits."""

_DATATYPES: Final[dict[np.dtype[Any], str]] = {
    dtype: name for name, dtype in DTYPES.items() if name not in ("BF16", "BYTES")
}


def datatype_of(array: Array) -> str:
    """The wire datatype that carries an array without a signature's help.

    Raises:
        InvalidInputError: the dtype has no datatype on the wire, such as complex numbers or dates.
    """
    dtype = array.dtype
    found = _DATATYPES.get(dtype.newbyteorder("<") if dtype.kind in "iuf" else dtype)
    if found is not None:
        return found
    if dtype.kind in "OUST":
        return "BYTES"
    if dtype.name == "bfloat16":
        return "BF16"
    raise InvalidInputError(f"expected numbers, booleans or text, got an array of {dtype}")


def cast_to(array: Array, datatype: str, where: str) -> Array:
    """Turn an array into the carrier of a datatype without losing anything.

    Integers and booleans keep their value exactly, also on the way to and from floating point. Floating-point numbers
    are rounded to the nearest that the datatype has, because that is all the model can take, but never to infinity.
    NaN and infinities stay what they are.

    Args:
        array: any shape and dtype.
        datatype: one of `DTYPES`.
        where: how an error names the array, such as ``input 'x'``.
    Returns:
        An array of the same shape, C-contiguous, little-endian, with the dtype of ``DTYPES[datatype]``; the array
        itself where it is that already.
    Raises:
        InvalidInputError: the array holds a value that the datatype cannot hold.
    """
    target = DTYPES[datatype]
    if datatype == "BYTES":
        return _as_text(array, where)
    if datatype == "BF16":
        if array.dtype.name == "bfloat16":
            return np.ascontiguousarray(array).view(target)
        if array.dtype == target:
            return np.ascontiguousarray(array, dtype=target).reshape(array.shape)
        return _round_to_bf16(_number(array, DTYPES["FP32"], "BF16", where), where)
    return _number(array, target, datatype, where)


def _number(array: Array, target: np.dtype[Any], datatype: str, where: str) -> Array:
    if array.dtype == target:
        return array if array.flags.c_contiguous else array.copy(order="C")
    source = array
    if source.dtype.name == "bfloat16":
        source = source.astype(np.float32)
    elif source.dtype.kind == "O":
        source = _of_objects(source, datatype, where)
    kind = source.dtype.kind
    if kind not in "biuf":
        raise InvalidInputError(f"{where} expects {datatype} ({target}), got {_contents(array)}")
    # What numpy calls safe is, except that it lets 64-bit integers become floating point, which has 53 bits for them.
    safe = np.can_cast(source.dtype, target, "safe") and not (target.kind == "f" and source.dtype.itemsize == 8)
    if source.dtype == target or kind == "b" or safe:
        return np.ascontiguousarray(source, dtype=target).reshape(array.shape)
    if source.size and not _fits(source, target):
        raise InvalidInputError(
            f"{where} expects {datatype} ({target}), got an array of {source.dtype} with values that {datatype} cannot "
            f"hold{_range(source)}; convert it yourself if that is what you want"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(source.astype(target)).reshape(array.shape)


def _fits(source: Array, target: np.dtype[Any]) -> bool:
    """Whether `_number` may cast: exactly between integers, booleans and floats, rounding from float to float."""
    if source.dtype.kind == "f":
        finite = np.isfinite(source)
        if target.kind == "f":
            with np.errstate(over="ignore"):
                return bool((np.isfinite(source.astype(target)) == finite).all())
        if not finite.all() or (np.trunc(source) != source).any():
            return False
    low, high = int(source.min()), int(source.max())
    if target.kind == "b":
        return low >= 0 and high <= 1
    if target.kind in "iu":
        bounds = np.iinfo(target)
        return int(bounds.min) <= low and high <= int(bounds.max)
    # Integers to floating point: every whole number up to two to the number of mantissa bits has its own float.
    exact = 1 << (np.finfo(target).nmant + 1)
    if -exact <= low and high <= exact:
        return True
    with np.errstate(over="ignore"):
        rounded = source.astype(target)
    return bool(np.isfinite(rounded).all() and (rounded.astype(object) == source.astype(object)).all())


def _of_objects(array: Array, datatype: str, where: str) -> Array:
    """Object arrays, such as pandas columns of mixed origin, may hold plain numbers."""
    try:
        found = np.array(array.tolist())
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(f"{where} expects {datatype}, got {_contents(array)}") from error
    if found.shape != array.shape or found.dtype.kind == "O":
        raise InvalidInputError(f"{where} expects {datatype}, got {_contents(array)}")
    return found


def _round_to_bf16(array: NDArray[np.float32], where: str) -> NDArray[np.uint16]:
    """Bits of the nearest BF16, ties to even; NaN stays NaN, infinities stay, nothing finite becomes infinite."""
    bits = array.view(np.uint32)
    # 0x7FFF and the lowest kept bit make the carry that rounding to nearest even needs.
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    nan = np.isnan(array)
    rounded = np.where(nan, ((bits >> 16) | 0x40).astype(np.uint16), rounded).astype("<u2")
    if bool((((rounded & 0x7FFF) == 0x7F80) & np.isfinite(array)).any()):
        raise InvalidInputError(f"{where} expects BF16, got finite values that are infinite in BF16")
    return rounded.reshape(array.shape)


def widen_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """BF16 bits to the same values in float32; exact, since BF16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _as_text(array: Array, where: str) -> Array:
    """An object array of ``str`` and ``bytes``, as `_frames` takes it."""
    kind = array.dtype.kind
    if kind in "UST":
        return array.astype(object)
    if kind == "O":
        for element in array.flat:
            if not isinstance(element, str | bytes | bytearray | memoryview):
                raise InvalidInputError(f"{where} expects BYTES, text or bytes, got {type(element).__name__} among it")
        return array if array.flags.c_contiguous else array.copy(order="C")
    raise InvalidInputError(f"{where} expects BYTES, text or bytes, got {_contents(array)}")


def _contents(array: Array) -> str:
    if array.dtype.kind in "OUS" and array.size:
        kinds = sorted({type(element).__name__ for element in array.flat})
        return f"an array of {', '.join(kinds[:4])}"
    return f"an array of {array.dtype}"


def _range(array: Array) -> str:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return " (NaN or infinity among them)"
    return f" ({array.min()} to {array.max()})"


# --- to the wire -------------------------------------------------------------------------------------------------


def _element_bytes(element: str | bytes) -> bytes:
    return element.encode("utf-8", "surrogateescape") if isinstance(element, str) else bytes(element)


def frames(array: Array) -> bytes:
    """Elements of a BYTES tensor in row-major order, each after its length in four bytes, little-endian, unsigned."""
    parts: list[bytes] = []
    for element in array.ravel().tolist():
        raw = _element_bytes(element)
        parts.append(len(raw).to_bytes(4, "little"))
        parts.append(raw)
    return b"".join(parts)


def json_data(array: Array, datatype: str, name: str) -> str:
    """An array's elements as a flat JSON array; NaN and infinities are the bare tokens of the protocol.

    Raises:
        InvalidInputError: FP16 and BF16 have no JSON form, and BYTES has one only for UTF-8 text.
    """
    if datatype in ("FP16", "BF16"):
        raise InvalidInputError(f"input '{name}' is {datatype}, which has no JSON form; send it with binary=True")
    flat = array.ravel().tolist()
    if datatype == "BYTES":
        try:
            flat = [_element_bytes(element).decode("utf-8") for element in flat]
        except UnicodeDecodeError as error:
            raise InvalidInputError(
                f"input '{name}' holds bytes that are no UTF-8 text; send it with binary=True"
            ) from error
    return json.dumps(flat, separators=(",", ":"))


# --- from the wire -----------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """Where an output is in an answer: binary, at ``offset`` bytes after the JSON part, or in JSON as
    ``data``, and then ``size`` is -1."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    elements: int
    offset: int
    size: int
    data: object


class Layout(NamedTuple):
    """The outputs of one answer. ``size`` is the number of bytes that must follow the JSON part."""

    slots: tuple[Slot, ...]
    size: int
    binary: bool
    """Every output is binary, so that an answer with the same JSON part has the same layout."""


def layout_of(outputs: object) -> Layout:
    """Hold the ``outputs`` of a response against the protocol, before memory is taken for any of them.

    Args:
        outputs: the decoded member of that name, of any type: it comes from the network.
    Raises:
        MalformedAnswer: anything that the protocol does not allow.
    """
    if type(outputs) is not list:
        raise MalformedAnswer(f"expected a list of outputs, got {_kind(outputs)}")
    slots: list[Slot] = []
    names: set[str] = set()
    offset = 0
    binary = True
    for output in cast(list[object], outputs):
        if type(output) is not dict:
            raise MalformedAnswer(f"expected an output as an object, got {_kind(output)}")
        members = cast(dict[str, object], output)
        name, datatype, shape = members.get("name"), members.get("datatype"), members.get("shape")
        if type(name) is not str or name in names:
            raise MalformedAnswer(f"expected a name for each output, all different, got {name!r:.80}")
        names.add(name)
        if type(datatype) is not str or datatype not in DTYPES:
            raise MalformedAnswer(f"output '{name}' has the datatype {datatype!r:.80}, which the protocol lacks")
        dims = _dims(name, shape)
        count = math.prod(dims)
        parameters = members.get("parameters")
        size = cast(dict[str, object], parameters).get("binary_data_size") if type(parameters) is dict else None
        if size is None:
            slots.append(Slot(name, datatype, dims, count, 0, -1, members.get("data")))
            binary = False
            continue
        if type(size) is not int or size < 0:
            raise MalformedAnswer(f"output '{name}' has the binary_data_size {size!r:.40}")
        if datatype != "BYTES" and size != count * DTYPES[datatype].itemsize:
            raise MalformedAnswer(
                f"output '{name}' has {size} bytes, expected {count * DTYPES[datatype].itemsize} for {datatype} "
                f"{shape_text(dims)}"
            )
        slots.append(Slot(name, datatype, dims, count, offset, size, None))
        offset += size
    return Layout(tuple(slots), offset, binary)


def read_outputs(layout: Layout, body: bytes | bytearray, start: int) -> dict[str, Array]:
    """Output name to array.

    Args:
        layout: as `layout_of` gives it.
        body: the whole body.
        start: where the binary tensors begin in it.
    Returns:
        Writable, aligned arrays: views of ``body`` where it is a bytearray, else of a copy of its binary part.
    Raises:
        MalformedAnswer: the body is shorter or longer than the layout says, or an output's content is wrong.
    """
    if layout.size != len(body) - start:
        raise MalformedAnswer(f"{layout.size} bytes of tensors are announced, {len(body) - start} came")
    found: dict[str, Array] = {}
    if type(body) is bytes:
        body, start = bytearray(memoryview(body)[start:]), 0
    for name, datatype, dims, elements, offset, size, data in layout.slots:
        if size < 0:
            found[name] = _from_json(name, datatype, dims, elements, data)
        elif datatype == "BYTES":
            framed = memoryview(body)[start + offset : start + offset + size]
            found[name] = _from_frames(name, dims, elements, framed)
        elif size == 0:
            found[name] = _shaped(name, np.empty(0, np.float32 if datatype == "BF16" else DTYPES[datatype]), dims)
        else:
            dtype = DTYPES[datatype]
            array: Array = np.ndarray(dims, dtype, body, start + offset)
            if datatype == "BF16":
                array = widen_bf16(array)
            elif (start + offset) % dtype.itemsize:
                # A bytearray's memory is aligned for every dtype; an array at an odd place in it would be slow to use.
                array = array.copy()
            found[name] = array
    return found


def _dims(name: str, shape: object) -> tuple[int, ...]:
    if type(shape) is not list:
        raise MalformedAnswer(f"output '{name}' has no list of dimensions, got {_kind(shape)}")
    dims = cast(list[object], shape)
    for dim in dims:
        if type(dim) is not int or dim < 0:
            raise MalformedAnswer(f"output '{name}' has the dimension {dim!r:.40}, expected whole numbers from 0")
    if len(dims) > 64:
        raise MalformedAnswer(f"output '{name}' has {len(dims)} dimensions, more than an array can have")
    return tuple(cast(list[int], dims))


def _from_frames(name: str, dims: tuple[int, ...], count: int, data: memoryview) -> Array:
    # Four bytes at least for each element: a count beyond that is refused before a list of that length is made.
    if count * 4 > len(data):
        raise MalformedAnswer(f"output '{name}' has {len(data)} bytes, too few for {count} elements of BYTES")
    array: Array = np.empty(count, object)
    offset = 0
    for index in range(count):
        end = offset + 4 + int.from_bytes(data[offset : offset + 4], "little")
        if offset + 4 > len(data) or end > len(data):
            raise MalformedAnswer(f"output '{name}' ends within element {index} of {count}")
        array[index] = str(data[offset + 4 : end], "utf-8", "surrogateescape")
        offset = end
    if offset != len(data):
        raise MalformedAnswer(f"output '{name}' has {len(data) - offset} bytes after its last element")
    return _shaped(name, array, dims)


def _from_json(name: str, datatype: str, dims: tuple[int, ...], count: int, data: object) -> Array:
    if type(data) is not list:
        raise MalformedAnswer(f"output '{name}' has neither data nor binary_data_size")
    flat = _flat(cast(list[object], data))
    if len(flat) != count:
        raise MalformedAnswer(f"output '{name}' has {len(flat)} elements, expected {count} for {list(dims)}")
    array: Array
    if datatype == "BYTES":
        if not all(type(element) is str for element in flat):
            raise MalformedAnswer(f"output '{name}' is BYTES, expected text only")
        array = np.empty(count, object)
        array[:] = flat
        return _shaped(name, array, dims)
    if datatype in ("FP32", "FP64", "FP16", "BF16"):
        # Several servers write NaN as null, since JSON has no word for it.
        flat = [math.nan if element is None else element for element in flat]
    allowed = {"BOOL": "b", "FP32": "iuf", "FP64": "iuf", "FP16": "iuf", "BF16": "iuf"}.get(datatype, "iu")
    try:
        # Said beforehand for whole numbers: numpy takes 0 and 2**64 - 1 together for floating point.
        whole = np.uint64 if datatype == "UINT64" else np.int64
        exact = allowed == "iu" and all(type(element) is int for element in flat)
        array = np.array(flat, whole if exact else None)
        if array.dtype.kind not in allowed and flat:
            raise MalformedAnswer(f"output '{name}' is {datatype}, got {_contents(array)}")
        array = cast_to(array, datatype, f"output '{name}'")
    except InvalidInputError as error:
        raise MalformedAnswer(str(error)) from error
    except OverflowError as error:
        raise MalformedAnswer(f"output '{name}' is {datatype}, got whole numbers beyond it") from error
    return _shaped(name, widen_bf16(array) if datatype == "BF16" else array, dims)


def _flat(data: list[object]) -> list[object]:
    """Row-major elements of a nested list. Its depth is bounded, because the JSON reader's was."""
    if not any(type(element) is list for element in data):
        return data
    flat: list[object] = []
    stack: list[Iterable[object]] = [iter(data)]
    while stack:
        for element in stack[-1]:
            if type(element) is list:
                stack.append(iter(cast(list[object], element)))
                break
            flat.append(element)
        else:
            stack.pop()
    return flat


def _shaped(name: str, array: Array, dims: tuple[int, ...]) -> Array:
    try:
        return array.reshape(dims)
    except (ValueError, OverflowError) as error:
        raise MalformedAnswer(f"output '{name}' has the shape {list(dims)}, which no array can have") from error


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else "nothing" if value is None else type(value).__name__


def shape_text(shape: Sequence[int]) -> str:
    """A shape as people write it, such as ``[-1, 16]``."""
    return "[" + ", ".join(map(str, shape)) + "]"


def quoted_names(names: Mapping[str, object] | Sequence[str]) -> str:
    """Names for a message, the first few of many."""
    listed = list(names)
    text = ", ".join(f"'{name}'" for name in listed[:12])
    return text + (f" and {len(listed) - 12} more" if len(listed) > 12 else "") if listed else "none"
