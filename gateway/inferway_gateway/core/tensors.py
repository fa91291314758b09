"""Tensors as the gateway sees them: wire datatypes, specs, a model's signature and its checks.

A tensor's elements live in one C-contiguous numpy array, little-endian, with the dtype of ``DTYPES``. Two datatypes
have no numpy dtype of their own: ``BF16`` is carried as its bits in ``uint16``, and ``BYTES`` as an ``object`` array
of ``str`` (ONNX strings are UTF-8; bytes that are not are refused where they enter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidTensorError

Arrays = Mapping[str, NDArray[Any]]

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
"""Wire datatype to the numpy dtype that carries it.

Source: Open Inference Protocol, "Tensor Data Types"; BF16 is Triton's addition.
"""

MAX_RANK: Final = 32
"""Dimensions a tensor may have: numpy's own bound is 64, ONNX models stay far below."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a signature.

    Attributes:
        name: the tensor's name on the wire.
        datatype: one of ``DTYPES``.
        shape: dimensions as a caller sees them, the batch axis included where the model has one; -1 is variable.
        optional: an input that a request may leave out.
        labels: for an output, the label of each class index, used by the classification extension.
        axes: a name for each dimension, such as ``batch`` or ``sequence``; empty where the graph has none.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False
    labels: tuple[str, ...] = ()
    axes: tuple[str | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Signature:
    """The ordered inputs and outputs of a model version.

    Attributes:
        inputs, outputs: in the graph's order.
        batched: axis 0 of every input and output counts rows, which are independent of each other in shape.
        max_rows: the most rows that one run may take; 0 where the model is not batched or the number has no bound.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool = False
    max_rows: int = 0
    _inputs: dict[str, tuple[TensorSpec, np.dtype[Any], int]] = field(init=False, repr=False, compare=False)
    _outputs: dict[str, TensorSpec] = field(init=False, repr=False, compare=False)
    _required: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "_inputs", {s.name: (s, DTYPES[s.datatype], len(s.shape)) for s in self.inputs})
        put(self, "_outputs", {s.name: s for s in self.outputs})
        put(self, "_required", sum(not s.optional for s in self.inputs))

    def input(self, name: str) -> TensorSpec:
        """The input of that name; ``InvalidTensorError`` where there is none."""
        found = self._inputs.get(name)
        if found is None:
            raise InvalidTensorError(f"unexpected inference input '{name}', expected {_names(self.inputs)}")
        return found[0]

    def output(self, name: str) -> TensorSpec:
        """The output of that name; ``InvalidTensorError`` where there is none."""
        found = self._outputs.get(name)
        if found is None:
            raise InvalidTensorError(f"unexpected inference output '{name}', expected {_names(self.outputs)}")
        return found

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.outputs)

    def check(self, inputs: Arrays) -> int:
        """Hold a request's inputs against the signature and count its rows.

        Args:
            inputs: input name to array, with the dtypes of ``DTYPES``.
        Returns:
            The number of rows: the common length of axis 0 where the signature is batched, else 1.
        Raises:
            InvalidTensorError: an input is unknown or missing, its dtype, rank or a fixed dimension differs, or two
                inputs disagree about the number of rows.
        """
        rows = -1
        given = 0
        table = self._inputs
        batched = self.batched
        for name, array in inputs.items():
            entry = table.get(name)
            if entry is None:
                raise InvalidTensorError(f"unexpected inference input '{name}', expected {_names(self.inputs)}")
            spec, dtype, rank = entry
            if array.dtype is not dtype and array.dtype != dtype:
                raise InvalidTensorError(
                    f"input '{name}' expects datatype {spec.datatype} ({dtype}), got an array of {array.dtype}"
                )
            shape = array.shape
            if len(shape) != rank:
                raise InvalidTensorError(
                    f"input '{name}' expects {rank} dimensions, shape {_shape(spec.shape)}, "
                    f"got {len(shape)}, shape {_shape(shape)}"
                )
            for want, got in zip(spec.shape, shape, strict=True):
                if want != got and want != -1:
                    raise InvalidTensorError(f"input '{name}' expects shape {_shape(spec.shape)}, got {_shape(shape)}")
            if batched:
                if rows == -1:
                    rows = shape[0]
                elif rows != shape[0]:
                    raise InvalidTensorError(
                        f"input '{name}' has {shape[0]} rows, expected {rows} like the inputs before it"
                    )
            if not spec.optional:
                given += 1
        if given != self._required:
            missing = [s.name for s in self.inputs if not s.optional and s.name not in inputs]
            raise InvalidTensorError(
                f"expected {self._required} inputs but got {len(inputs)} inputs, missing "
                + ", ".join(f"'{n}'" for n in missing)
            )
        return 1 if rows == -1 else rows


def _names(specs: tuple[TensorSpec, ...]) -> str:
    return "one of " + ", ".join(f"'{s.name}'" for s in specs) if specs else "none"


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
