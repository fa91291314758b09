"""Inputs to measure a model with, made from its signature, and warm-up requests as a configuration describes them.

A probe needs two rows that differ and on which the model runs. What a model accepts is written nowhere, so this offers
several kinds of values and several lengths for variable axes, the likeliest first, and the measurement takes the first
that runs. Names are used as hints only for what to try (a mask of ones, segment ids of zero): what is concluded rests
on what the runs gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ModelLoadError
from ...core.model_config import Warmup, WarmupInput
from ...core.tensors import DTYPES, Signature, TensorSpec

Kind = Literal["plain", "small", "zero"]
"""plain: normal floats, ids up to 100; small: floats in 0 to 1, ids 0 and 1; zero: nothing but zeros."""

LENGTHS: Final = (32, 8, 16, 64, 224, 1, 128, 256, 512)
"""Lengths tried for variable axes. 32 is a usual sentence and the least that five halvings of an image leave."""

_SCALES: Final = (1.0, 0.3, 3.0, 0.1, 1.7)
"""Rows differ in magnitude too, so that a scale shared by the rows of a batch shows in the result."""

_MAX_ELEMENTS: Final = 1 << 22

_WORDS: Final = ("gateway", "a", "model of some length", "Übung", "0", "")


@dataclass(frozen=True, slots=True)
class Sample:
    """Makes inputs for a signature, the same ones whenever it is asked.

    Attributes:
        length: of every variable axis but the batch's.
        lengths: exceptions to ``length``, by input and axis.
        given: rows that a configuration supplies; further rows are made from them by turning them around.
        with_optional: make optional inputs too, which are left out otherwise.
    """

    signature: Signature
    kind: Kind
    length: int
    lengths: Mapping[tuple[str, int], int]
    given: Mapping[str, NDArray[Any]]
    with_optional: bool = False

    def batch(self, rows: Sequence[int]) -> dict[str, NDArray[Any]]:
        """The inputs of these rows, by their numbers; for a signature without batch axis, those of row ``rows[0]``."""
        wanted = [spec for spec in self.signature.inputs if self.with_optional or not spec.optional]
        if not self.signature.batched:
            return {spec.name: self._row(index, spec, rows[0]) for index, spec in enumerate(wanted)}
        distinct = sorted(set(rows))
        places = [distinct.index(row) for row in rows]
        found = {}
        for index, spec in enumerate(wanted):
            made = np.stack([self._row(index, spec, row) for row in distinct])
            found[spec.name] = made if places == list(range(len(distinct))) else made[places]
        return found

    def count_elements(self) -> int:
        """Elements of all inputs of one row together."""
        return sum(array.size for array in self.batch([0]).values())

    def has_different_rows(self) -> bool:
        first, second = self.batch([0]), self.batch([1])
        return any(not same_bits(first[name], second[name]) for name in first)

    def _row(self, index: int, spec: TensorSpec, row: int) -> NDArray[Any]:
        if spec.name in self.given:
            return _turn(self.given[spec.name], row)
        return make_values(spec.name, spec.datatype, self._shape(spec), self.kind, (row, index))

    def _shape(self, spec: TensorSpec) -> tuple[int, ...]:
        first = 1 if self.signature.batched else 0
        return tuple(
            self.lengths.get((spec.name, axis), self.length) if dim == -1 else dim
            for axis, dim in enumerate(spec.shape)
            if axis >= first
        )

    def is_small(self) -> bool:
        """One row can be made without a thought for memory: three variable axes of 512 are half a gigabyte."""
        specs = [spec for spec in self.signature.inputs if not spec.optional]
        return sum(math.prod(self._shape(spec)) for spec in specs) <= _MAX_ELEMENTS


def _turn(array: NDArray[Any], row: int) -> NDArray[Any]:
    """Row 0 is as given; others hold the same values at other places, so they stay within what the model accepts."""
    return array if row == 0 or array.ndim == 0 else np.roll(array, row, axis=-1)


def make_values(name: str, datatype: str, shape: tuple[int, ...], kind: Kind, seed: tuple[int, int]) -> NDArray[Any]:
    """Plausible values for an input of that name.

    Args:
        seed: the row's number and the input's; equal arguments give equal values.
    """
    dtype = DTYPES[datatype]
    lower = name.lower()
    if datatype == "BYTES":
        words = "" if kind == "zero" else None
        size = int(np.prod(shape, dtype=np.int64))
        texts = [words if words is not None else _WORDS[(place + sum(seed)) % len(_WORDS)] for place in range(size)]
        return np.array(texts, dtype=object).reshape(shape)
    if "mask" in lower:
        # Ones: every position counts. In BF16's bits that is 0x3f80.
        return np.full(shape, 0x3F80 if datatype == "BF16" else 1, dtype)
    if kind == "zero" or "type_id" in lower or "segment" in lower:
        return np.zeros(shape, dtype)
    random = np.random.default_rng(seed)
    if datatype in ("FP16", "FP32", "FP64", "BF16"):
        values = random.random(shape) if kind == "small" else random.standard_normal(shape)
        values = np.asarray(values * _SCALES[seed[0] % len(_SCALES)], np.float32)
        if datatype == "BF16":
            return np.asarray(values.view(np.uint32) >> 16, np.uint16)
        return values.astype(dtype)
    if datatype == "BOOL":
        return random.integers(0, 2, shape).astype(dtype)
    return np.asarray(random.integers(1, 100, shape) if kind == "plain" else random.integers(0, 2, shape), dtype)


def candidates(signature: Signature, warmups: Sequence[Warmup], bounded: bool) -> Iterator[Sample]:
    """Samples to try, the likeliest to run first.

    Args:
        bounded: values cannot decide how long a run takes or how large it grows; otherwise only 0 and 1 are tried.
    """
    given: dict[str, NDArray[Any]] = {}
    lengths: dict[tuple[str, int], int] = {}
    for warmup in warmups[:1]:
        inputs = warmup_inputs(warmup, signature, rows=1)
        first = 1 if signature.batched else 0
        given = {name: array[0] if first else array for name, array in inputs.items()}
        for name, array in inputs.items():
            lengths.update({(name, axis): length for axis, length in enumerate(array.shape) if axis >= first})
    variable = any(-1 in spec.shape[1 if signature.batched else 0 :] for spec in signature.inputs if not spec.optional)
    kinds: tuple[Kind, ...] = ("plain", "small") if bounded else ("small",)
    if lengths:
        # The configuration says which lengths are usual, so those are what is measured.
        for kind in kinds:
            yield Sample(signature, kind, LENGTHS[0], lengths, {})
        yield Sample(signature, "zero", LENGTHS[0], lengths, given)
    else:
        for length in LENGTHS if variable else LENGTHS[:1]:
            for kind in kinds:
                sample = Sample(signature, kind, length, {}, {})
                if not variable or sample.is_small():
                    yield sample
    for length in LENGTHS if variable else LENGTHS[:1]:
        sample = Sample(signature, "zero", length, {}, {})
        if not variable or sample.is_small():
            yield sample


def warmup_inputs(warmup: Warmup, signature: Signature, rows: int | None = None) -> dict[str, NDArray[Any]]:
    """The inputs of a configured warm-up request.

    Its dims leave out the batch axis, as in Triton's configuration; where they have as many axes as the signature, they
    are taken as they are.

    Args:
        rows: in place of the number that the warm-up says.
    Raises:
        ModelLoadError: it names another input, datatype or shape than the signature, or its data file does not fit.
    """
    found = {}
    known = {spec.name: spec for spec in signature.inputs}
    for index, given in enumerate(warmup.inputs):
        spec = known.get(given.name)
        if spec is None:
            raise ModelLoadError(f"warm-up '{warmup.name}' names input '{given.name}', which the model has not")
        if spec.datatype != given.datatype:
            raise ModelLoadError(
                f"warm-up '{warmup.name}' has {given.datatype} for input '{given.name}', expected {spec.datatype}"
            )
        row = _warmup_row(warmup, given, index)
        if row.ndim == len(spec.shape) - 1:
            row = np.repeat(row[np.newaxis], rows or warmup.rows, axis=0)
        found[given.name] = row
    try:
        signature.check(found)
    except Exception as error:
        raise ModelLoadError(f"warm-up '{warmup.name}': {error}") from None
    return found


def _warmup_row(warmup: Warmup, given: WarmupInput, index: int) -> NDArray[Any]:
    if given.source != "file":
        kind: Kind = "zero" if given.source == "zero" else "plain"
        # Zeros asked for are zeros, whatever the input's name suggests.
        name = "" if kind == "zero" else given.name
        return make_values(name, given.datatype, given.dims, kind, (0, index))
    what = f"data of warm-up '{warmup.name}' for input '{given.name}'"
    count = int(np.prod(given.dims, dtype=np.int64))
    dtype = DTYPES[given.datatype]
    path = Path(given.file)
    if given.datatype != "BYTES":
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise ModelLoadError(f"{what} has {size} bytes, expected {count * dtype.itemsize}")
        return np.fromfile(path, dtype, count).reshape(given.dims)
    return np.array(_framed_texts(path.read_bytes(), count, what), dtype=object).reshape(given.dims)


def _framed_texts(content: bytes, count: int, what: str) -> list[str]:
    """Strings as the protocol's binary form has them: four bytes of length, little-endian, then UTF-8."""
    texts = []
    at = 0
    while at + 4 <= len(content):
        length = int.from_bytes(content[at : at + 4], "little")
        at += 4 + length
        if at > len(content):
            break
        try:
            texts.append(content[at - length : at].decode())
        except UnicodeDecodeError:
            raise ModelLoadError(f"{what} is not UTF-8") from None
    if at != len(content) or len(texts) != count:
        raise ModelLoadError(f"{what} does not hold {count} strings with their lengths")
    return texts


def same_bits(first: NDArray[Any], second: NDArray[Any]) -> bool:
    """Equal in shape and every bit; two NaNs of the same bits are equal."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.dtype == object:
        return bool(first.tolist() == second.tolist())
    return first.tobytes() == second.tobytes()
