"""Golden examples: inputs whose outputs are known, which a version must reproduce before it answers anybody.

Two floating-point numbers agree where ``|got - expected| <= atol + rtol * |expected|``; NaN agrees with NaN, and an
infinity with itself. Everything else, integers too, has to be equal: a class index that is nearly right is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .batcher import InferenceRequest
from .errors import GatewayError, GoldenMismatchError, ModelRejectedError
from .execution import Executor
from .tensors import DTYPES, Signature, TensorSpec

RTOL: Final = 1e-3
ATOL: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Example:
    """One golden example, checked against no signature yet.

    Attributes:
        inputs: name to array, with the dtypes of ``DTYPES``.
        outputs: those that are compared; the model may have more.
    """

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    rtol: float = RTOL
    atol: float = ATOL


async def compare(executor: Executor, examples: Sequence[Example]) -> None:
    """Run each example and hold its outputs against what it says.

    Raises:
        ModelRejectedError: an example does not fit the model's signature.
        GoldenMismatchError: the model failed on an example, or gave other outputs; names the output, the largest
            difference and where it is.
    """
    for number, example in enumerate(examples, 1):
        await _compare(executor, f"golden example {number}", example)


async def _compare(executor: Executor, what: str, example: Example) -> None:
    signature = executor.signature
    names = tuple(example.outputs)
    inputs = dict(example.inputs)
    try:
        rows = signature.check(inputs)
        specs = [signature.output(name) for name in names]
    except GatewayError as error:
        raise ModelRejectedError(f"{what} does not fit the model: {error.message}") from None
    nbytes = sum(array.nbytes for array in inputs.values())
    request = InferenceRequest(inputs, names, rows, nbytes)
    try:
        answer = executor.run_inline(request)
        if answer is None:
            answer = await executor.infer(request)
    except GatewayError as error:
        raise GoldenMismatchError(f"{what} could not be run: {error.message}") from error
    for spec, got in zip(specs, answer.outputs, strict=True):
        _check_output(what, spec, got, example.outputs[spec.name], example.rtol, example.atol)


def _check_output(
    what: str, spec: TensorSpec, got: NDArray[Any], expected: NDArray[Any], rtol: float, atol: float
) -> None:
    if got.shape != expected.shape:
        raise GoldenMismatchError(
            f"{what}: output '{spec.name}' has shape {list(got.shape)}, expected {list(expected.shape)}"
        )
    if got.dtype != expected.dtype:
        raise GoldenMismatchError(
            f"{what}: output '{spec.name}' has datatype {spec.datatype}, expected {_datatype(expected)}"
        )
    if spec.datatype not in ("FP16", "BF16", "FP32", "FP64"):
        different = np.asarray(got != expected)
        if different.any():
            raise GoldenMismatchError(
                f"{what}: output '{spec.name}' differs in {int(different.sum())} of {got.size} elements, "
                f"first at {_place(different)}"
            )
        return
    ours, theirs = _numbers(spec, got), _numbers(spec, expected)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(ours - theirs)
        near = (gap <= atol + rtol * np.abs(theirs)) & np.isfinite(theirs)
    agree = near | (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    if agree.all():
        return
    outside = np.where(agree, -1.0, np.where(np.isnan(gap), np.inf, gap))
    worst = np.unravel_index(int(np.argmax(outside)), outside.shape) if outside.ndim else ()
    raise GoldenMismatchError(
        f"{what}: output '{spec.name}' differs in {int((~agree).sum())} of {got.size} elements, at most by "
        f"{float(outside[worst]):.6g} at {[int(i) for i in worst]}: expected {float(theirs[worst]):.6g}, "
        f"got {float(ours[worst]):.6g}, allowed atol {atol:g} + rtol {rtol:g}"
    )


def _numbers(spec: TensorSpec, value: NDArray[Any]) -> NDArray[np.float64]:
    if spec.datatype == "BF16":
        return (value.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return value.astype(np.float64)


def _place(different: NDArray[Any]) -> list[int]:
    return [int(i) for i in np.argwhere(different)[0]] if different.ndim else []


def _datatype(value: NDArray[Any]) -> str:
    return next((name for name, dtype in DTYPES.items() if dtype == value.dtype), str(value.dtype))


def zeros(
    signature: Signature, rows: int, lengths: Mapping[tuple[str, int], int] | None = None
) -> dict[str, NDArray[Any]] | None:
    """Inputs of nothing but zeros for so many rows; None where an axis other than the batch's is variable.

    Args:
        lengths: input and axis, batch axis counted, to the length of those that are variable.
    """
    known = lengths or {}
    found: dict[str, NDArray[Any]] = {}
    for spec in signature.inputs:
        if spec.optional:
            continue
        shape = tuple(known.get((spec.name, axis), length) if length < 0 else length
                      for axis, length in enumerate(spec.shape))  # fmt: skip
        if signature.batched:
            shape = (rows, *shape[1:])
        if -1 in shape:
            return None
        made = np.zeros(shape, DTYPES[spec.datatype])
        if spec.datatype == "BYTES":
            made.fill("")
        found[spec.name] = made
    return found
