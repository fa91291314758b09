"""Reading what a worker reports of its model.

A report comes from the process that ran the model, so nothing of it is believed: each field is checked, and what a lie
can do is bounded to the model that told it. Apart from ``description``, so that workers need not carry the validator.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Final

from pydantic import ConfigDict, Field, StrictBool, StrictInt, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from ...core.backend import CostPoint, Profile, RowExactness, TrialRow
from ...core.errors import ModelLoadError
from ...core.tensors import DTYPES, MAX_RANK, Signature, TensorSpec
from .description import Decided, Report
from .messages import clean_text

_STRICT: Final = ConfigDict(extra="forbid")
_Name = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
_Text = Annotated[str, StringConstraints(max_length=4096)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[StrictInt, Field(ge=0, le=1 << 40)]
_Dimension = Annotated[StrictInt, Field(ge=-1, le=1 << 62)]


@checked(frozen=True, config=_STRICT)
class _Spec:
    name: _Name
    datatype: str
    shape: Annotated[tuple[_Dimension, ...], Field(max_length=MAX_RANK)]
    optional: StrictBool
    labels: Annotated[tuple[_Text, ...], Field(max_length=1 << 20)]
    axes: Annotated[tuple[_Text | None, ...], Field(max_length=MAX_RANK)]


@checked(frozen=True, config=_STRICT)
class _Point:
    rows: Annotated[StrictInt, Field(ge=1, le=1 << 40)]
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]


@checked(frozen=True, config=_STRICT)
class _Trial:
    options: _Text
    rows: _Count
    seconds: _Seconds
    chosen: StrictBool
    note: _Text


@checked(frozen=True, config=_STRICT)
class _Profile:
    row_exactness: RowExactness
    batchable: StrictBool
    inline_max_elements: Annotated[StrictInt, Field(ge=0, le=1 << 62)]
    cost: Annotated[tuple[_Point, ...], Field(max_length=256)]
    cost_row_elements: _Count
    trial: Annotated[tuple[_Trial, ...], Field(max_length=64)]
    execution_providers: Annotated[tuple[_Name, ...], Field(max_length=64)]
    intra_op_threads: Annotated[StrictInt, Field(ge=1, le=4096)]
    load_s: _Seconds
    note: Annotated[str, StringConstraints(max_length=1 << 16)]


@checked(frozen=True, config=_STRICT)
class _Decided:
    intra_op_threads: Annotated[StrictInt, Field(ge=1, le=4096)]
    disabled_optimizers: Annotated[tuple[_Name, ...], Field(max_length=256)]
    batched: StrictBool
    max_rows: _Count


@checked(frozen=True, config=_STRICT)
class _Report:
    inputs: Annotated[tuple[_Spec, ...], Field(max_length=1 << 14)]
    outputs: Annotated[tuple[_Spec, ...], Field(min_length=1, max_length=1 << 14)]
    profile: _Profile
    decided: _Decided
    layers: Annotated[tuple[_Name, ...], Field(max_length=32)]
    missing: Annotated[dict[_Name, _Text], Field(max_length=32)]


_REPORT: Final = TypeAdapter(_Report)


def read_report(raw: bytes) -> Report:
    """In the gateway.

    Raises:
        ModelLoadError: the report is none; says which field is wrong and nothing of what it holds.
    """
    try:
        found = _REPORT.validate_json(raw)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors(include_input=False, include_context=False)[0]["loc"])
        raise ModelLoadError(f"the worker's report is not valid at {place or 'its beginning'}") from None
    specs = [[_spec(spec) for spec in found.inputs], [_spec(spec) for spec in found.outputs]]
    for kind, group in zip(("input", "output"), specs, strict=True):
        if len({spec.name for spec in group}) != len(group):
            raise ModelLoadError(f"the model names an {kind} twice")
    decided = found.decided
    told = found.profile
    cost = tuple(CostPoint(point.rows, point.seconds) for point in told.cost)
    if any(a.rows >= b.rows for a, b in pairwise(cost)):
        raise ModelLoadError("the worker's report is not valid at profile.cost")
    profile = Profile(
        row_exactness=told.row_exactness,
        batchable=told.batchable,
        inline_max_elements=told.inline_max_elements,
        cost=cost,
        cost_row_elements=told.cost_row_elements,
        trial=tuple(TrialRow(_text(t.options), t.rows, t.seconds, t.chosen, _text(t.note)) for t in told.trial),
        execution_providers=tuple(_text(name) for name in told.execution_providers),
        intra_op_threads=told.intra_op_threads,
        load_s=told.load_s,
        note=_text(told.note),
    )
    return Report(
        Signature(tuple(specs[0]), tuple(specs[1]), decided.batched, decided.max_rows),
        profile,
        Decided(decided.intra_op_threads, decided.disabled_optimizers, decided.batched, decided.max_rows),
        tuple(_text(layer) for layer in found.layers),
        {_text(layer): _text(reason) for layer, reason in found.missing.items()},
    )


def _spec(told: _Spec) -> TensorSpec:
    if told.datatype not in DTYPES:
        raise ModelLoadError("the worker's report names a datatype that the protocol does not have")
    if told.axes and len(told.axes) != len(told.shape):
        raise ModelLoadError("the worker's report names more axes than there are")
    if math.prod(max(dim, 1) for dim in told.shape) > 1 << 62:
        raise ModelLoadError(f"tensor '{_text(told.name)}' is larger than any memory")
    return TensorSpec(told.name, told.datatype, told.shape, told.optional, told.labels, told.axes)


def _text(value: str) -> str:
    return clean_text(value.encode("utf-8", "replace"))
