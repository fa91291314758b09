"""``golden.json``, one of a version's files: examples of inputs and the outputs that the version has to give.

    {"examples": [{"inputs": [TENSOR, ...], "outputs": [TENSOR, ...], "rtol": 1e-3, "atol": 1e-5}]}

A tensor is written as the Open Inference Protocol writes it in JSON: ``name``, ``datatype``, ``shape``, and ``data``,
flat or nested. FP16 and BF16, which the protocol sends in binary only, stand here as numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import ModelRejectedError
from ..core.golden import ATOL, RTOL, Example
from ..core.tensors import DTYPES, MAX_RANK

GOLDEN_FILE: Final = "golden.json"
MAX_BYTES: Final = 16 << 20
MAX_VALUES: Final = 1_000_000
MAX_STRUCTURES: Final = 100_000
"""Arrays and objects. Together with ``MAX_VALUES`` it bounds what reading the file holds of the memory, and for how
long the interpreter does nothing else: while a text is parsed, nobody is let in between."""
MAX_EXAMPLES: Final = 1000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Tensor(_Strict):
    name: Annotated[str, Field(min_length=1)]
    datatype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(max_length=MAX_RANK)]
    data: list[Any]


class _Example(_Strict):
    inputs: Annotated[list[_Tensor], Field(min_length=1)]
    outputs: Annotated[list[_Tensor], Field(min_length=1)]
    rtol: Tolerance = RTOL
    atol: Tolerance = ATOL


class _File(_Strict):
    examples: Annotated[list[_Example], Field(max_length=MAX_EXAMPLES)]


def read_golden(folder: Path) -> tuple[Example, ...]:
    """The golden examples of a version's folder; none where it has no such file. Blocks.

    Raises:
        ModelRejectedError: the file is too large, or is none that can be read; says where.
    """
    try:
        with (folder / GOLDEN_FILE).open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return ()
    if len(content) > MAX_BYTES:
        raise ModelRejectedError(f"{GOLDEN_FILE} is larger than {MAX_BYTES} bytes; fewer examples do as well")
    values, structures = content.count(b","), content.count(b"[") + content.count(b"{")
    if values > MAX_VALUES or structures > MAX_STRUCTURES:
        raise ModelRejectedError(
            f"{GOLDEN_FILE} has {values} values, {structures} of them arrays and objects, expected at most "
            f"{MAX_VALUES} and {MAX_STRUCTURES}; write data flat, fewer examples do as well"
        )
    return parse_golden(content)


def parse_golden(content: bytes) -> tuple[Example, ...]:
    """Read the text of ``golden.json``; as ``read_golden``."""
    try:
        members = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelRejectedError(f"{GOLDEN_FILE} is no JSON: {error}") from None
    try:
        found = _File.model_validate(members)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ModelRejectedError(f"{GOLDEN_FILE}: {where}: {first['msg']}") from None
    return tuple(_example(number, item) for number, item in enumerate(found.examples, 1))


def _example(number: int, item: _Example) -> Example:
    sides = []
    for kind, tensors in (("input", item.inputs), ("output", item.outputs)):
        side: dict[str, NDArray[Any]] = {}
        for tensor in tensors:
            what = f"{GOLDEN_FILE}: example {number}, {kind} '{tensor.name}'"
            if tensor.name in side:
                raise ModelRejectedError(f"{what} is there twice")
            side[tensor.name] = _array(what, tensor)
        sides.append(side)
    return Example(sides[0], sides[1], item.rtol, item.atol)


def _array(what: str, tensor: _Tensor) -> NDArray[Any]:
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None:
        raise ModelRejectedError(f"{what} has datatype '{tensor.datatype[:32]}', expected one of {', '.join(DTYPES)}")
    flat: list[Any] = []
    _flatten(tensor.data, flat, 0)
    count = math.prod(tensor.shape)
    if len(flat) != count:
        raise ModelRejectedError(f"{what} with shape {tensor.shape} has {len(flat)} elements, expected {count}")
    kinds: tuple[type, ...] = (int, float)
    if tensor.datatype == "BYTES":
        kinds = (str,)
    elif tensor.datatype == "BOOL":
        kinds = (bool,)
    elif tensor.datatype.startswith(("INT", "UINT")):
        kinds = (int,)
    if any(type(value) not in kinds for value in flat):
        raise ModelRejectedError(f"{what} has elements that are no {tensor.datatype}")
    value: NDArray[Any]
    try:
        with np.errstate(over="raise"):
            if tensor.datatype == "BF16":
                value = (np.array(flat, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            else:
                value = np.empty(count, dtype)
                value[:] = flat
    except (OverflowError, FloatingPointError):
        raise ModelRejectedError(f"{what} has a number that lies outside the range of {tensor.datatype}") from None
    return value.reshape(tensor.shape)


def _flatten(data: list[Any], flat: list[Any], depth: int) -> None:
    if depth > MAX_RANK:
        raise ModelRejectedError(f"{GOLDEN_FILE} has data nested deeper than {MAX_RANK} dimensions")
    for item in data:
        if type(item) is list:
            _flatten(item, flat, depth + 1)
        else:
            flat.append(item)
