"""Whether an exported graph computes what its source computes.

Exporters trace a model with one example, and what was one number in it (a batch size, a number of time steps) may be
that number for ever in the graph, without an error. So graph and source are run side by side on rows that are made of
the example's: one row, another number of them, more of them; and with other lengths of every axis that is to vary.

What is made of the example stays likely: rows and steps are repeated in turn, values of a column are shuffled within
it, and floating-point numbers that are no whole numbers are changed by up to a tenth, which keeps signs, zeros and NaN.
Models of tables are also run on what is `unlikely`, as far as they take it themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .._errors import ExportError, ExportMismatchError
from .._tensors import Array, shape_text
from .example import Arrays

Axes = Mapping[str, Mapping[int, str]]
"""Input name to its variable axes and their names."""

BATCH: Final = "batch"
LARGE_BATCH: Final = 33
_CASE_BYTES: Final = 64 << 20
_TABLE_ROWS: Final = 24
RTOL: Final = 1e-4
ATOL: Final = 1e-5
COARSE: Final = {"float16": (5e-3, 5e-3), "bfloat16": (4e-2, 4e-2)}
"""Of types with 11 and 8 bits: a few roundings at each of many layers."""


@dataclass(frozen=True, slots=True)
class VerifiedCase:
    """One run of graph and source on the same rows.

    Attributes:
        shapes: of the inputs, by name.
        max_abs: largest absolute difference of any element of any floating-point output.
        tolerance: what was allowed for that element's output.
        output: the output that it was in.
    """

    shapes: Mapping[str, tuple[int, ...]]
    max_abs: float
    tolerance: float
    output: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What an export was held against.

    Attributes:
        cases: the runs, all of which agreed.
        rtol, atol: ``|got - expected| <= atol + rtol * largest |expected| of the output``.
        skipped: lengths that the source itself refuses, in words.
    """

    cases: tuple[VerifiedCase, ...]
    rtol: float
    atol: float
    skipped: tuple[str, ...] = ()

    @property
    def max_abs(self) -> float:
        """The largest absolute difference of all."""
        return max((case.max_abs for case in self.cases), default=0.0)

    def __str__(self) -> str:
        return f"agrees within {self.max_abs:.2g} in {len(self.cases)} cases"


@dataclass(frozen=True, slots=True)
class Run:
    """Inputs of one case, with what the source made of them."""

    sizes: Mapping[str, int]
    inputs: Arrays
    outputs: Arrays


def variants(
    example: Arrays, axes: Axes, *, rows: Sequence[int] | None = None
) -> Iterator[tuple[dict[str, int], Sequence[Arrays]]]:
    """Sizes of the variable axes, with inputs of these sizes; the example itself comes first.

    Of each size there are inputs with numbers that are not in the example, and others with none but these, for models
    that take numbers as categories.
    """
    base = sizes_of(example, axes)
    random = np.random.default_rng(0)
    yield base, [example]
    # A row is repeated often only where that takes no memory to speak of.
    row_bytes = sum(array.nbytes // max(1, len(array)) for array in example.values() if array.ndim)
    large = max(2, min(LARGE_BATCH, _CASE_BYTES // max(1, row_bytes)))
    if rows is None:
        rows = [size for size in dict.fromkeys((1, 3 if base.get(BATCH) != 3 else 5, large)) if size != base.get(BATCH)]
    plans = [{**base, BATCH: size} for size in rows] if BATCH in base else []
    others = [name for name in base if name != BATCH]
    for name in others:
        plans += [{**base, name: size} for size in dict.fromkeys((base[name] + 3, 2 * base[name], base[name] - 1))
                  if 0 < size != base[name]]  # fmt: skip
    if others and BATCH in base:
        plans.append({**{name: size + 2 for name, size in base.items()}})
    for sizes in plans:
        yield (
            sizes,
            [
                {name: resized(array, axes.get(name, {}), sizes, random, new) for name, array in example.items()}
                for new in (True, False)
            ],
        )


def _foreign(texts: Array) -> Array:
    """The texts' own words with a letter beyond ASCII at the end of each, and in capitals every other one."""
    said = [re.sub(r"\b(?=\W|$)", "é", str(text)) for text in texts.ravel()]
    made = np.empty(len(said), object)
    made[:] = [text.upper() if at % 2 else text for at, text in enumerate(said)]
    return made.reshape(texts.shape)


def unlikely(example: Arrays) -> Iterator[Arrays]:
    """Rows of a table as they come in service though not in the example, for sources that take them: numbers that are
    missing, zero or of the other sign, and texts that are empty, were never seen or have letters of other scripts.

    Converters go wrong there without a word: in where a tree sends NaN, in what a booster takes for missing.
    """
    random = np.random.default_rng(1)
    rows = {name: np.take(array, np.arange(_TABLE_ROWS) % len(array), axis=0) for name, array in example.items()}
    changes: tuple[tuple[str, Callable[[Array], Any]], ...] = (
        ("f", lambda _: np.nan), ("biuf", lambda _: 0), ("f", np.negative), ("O", lambda _: ""), ("O", lambda _: "~?~"),
        ("O", _foreign),
    )  # fmt: skip
    for kinds, change in changes:
        if not any(array.dtype.kind in kinds for array in rows.values()):
            continue
        made: dict[str, Array] = {}
        for name, array in rows.items():
            made[name] = array
            if array.dtype.kind in kinds:
                # A third of the cells for themselves, and then a whole row.
                chosen = random.random(array.shape) < 1 / 3
                chosen[-1] = True
                made[name] = np.where(chosen, change(array), array).astype(array.dtype)
        yield made


def sizes_of(example: Arrays, axes: Axes) -> dict[str, int]:
    """Length of each named axis in the example; the batch first."""
    found: dict[str, int] = {}
    for name, named in axes.items():
        for axis, symbol in named.items():
            found.setdefault(symbol, example[name].shape[axis])
    return dict(sorted(found.items(), key=lambda item: item[0] != BATCH))


def resized(
    array: Array, named: Mapping[int, str], sizes: Mapping[str, int], random: np.random.Generator, new: bool = True
) -> Array:
    """An array of other lengths, made of the values of this one; ``new``: numbers are changed a little."""
    made = array
    for axis, symbol in named.items():
        made = np.take(made, np.arange(sizes[symbol]) % made.shape[axis], axis=axis)
    if 0 in named and made.shape[0] > 1:
        # Each column for itself, so that rows are new ones and no column gets another's values.
        made = random.permuted(made, axis=0) if made.dtype.name != "bfloat16" else made[random.permutation(len(made))]
    if new and made.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = bool((np.trunc(array) == array)[np.isfinite(array)].all())
        if not whole:
            made = (made * random.uniform(0.9, 1.1, made.shape)).astype(array.dtype)
    return np.ascontiguousarray(made)


def verify(
    run: Callable[[Arrays], Mapping[str, Array]],
    runs: Sequence[Run],
    *,
    what: str,
    rtol: float | None = None,
    atol: float | None = None,
    skipped: Sequence[str] = (),
    ties: Mapping[str, str] | None = None,
) -> Verification:
    """Run the graph on what the source was run on.

    Args:
        run: runs the graph.
        runs: cases with the source's outputs.
        what: how an error names the source.
        rtol, atol: tolerances; None for those of the outputs' types.
        ties: name of an output of labels to the one with the scores that decided them. A label may differ where the
            two best scores are as near as the tolerance.
    Raises:
        ExportMismatchError: an output differs by more, or in its shape or type.
        ExportError: the graph cannot be run.
    """
    cases: list[VerifiedCase] = []
    for case in runs:
        shapes = {name: tuple(array.shape) for name, array in case.inputs.items()}
        try:
            got = run(case.inputs)
        except Exception as error:
            raise ExportError(
                f"the graph made of {what} cannot be run on inputs of {shown(shapes)}: {first_line(error)}"
            ) from error
        cases.append(_compared(case, got, shapes, what, rtol, atol, ties or {}))
    return Verification(tuple(cases), RTOL if rtol is None else rtol, ATOL if atol is None else atol, tuple(skipped))


def _compared(
    case: Run,
    got: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    what: str,
    rtol: float | None,
    atol: float | None,
    ties: Mapping[str, str],
) -> VerifiedCase:
    worst = VerifiedCase(shapes, 0.0, ATOL if atol is None else atol, next(iter(case.outputs)))
    for name, expected in case.outputs.items():
        given = got[name]

        def refuse(how: str, difference: float, tolerance: float, name: str = name) -> ExportMismatchError:
            return ExportMismatchError(
                f"the graph made of {what} computes something else: output '{name}' {how}, for inputs of "
                f"{shown(shapes)}; expected the same as the source, so nothing was exported",
                output=name, max_difference=difference, tolerance=tolerance, shapes=shapes,
            )  # fmt: skip

        if given.shape != expected.shape:
            raise refuse(f"has shape {shape_text(given.shape)}, expected {shape_text(expected.shape)}", math.inf, 0.0)
        if expected.dtype.kind not in "f" and expected.dtype.name != "bfloat16":
            different = np.asarray(given != expected)
            tied = _tied(case, name, given, different, rtol, atol, ties)
            if (different & ~tied).any():
                place = tuple(int(i) for i in np.argwhere(different & ~tied)[0])
                raise refuse(
                    f"differs in {int(different.sum())} of {different.size} elements, first at {list(place)}: got "
                    f"{given[place]!r}, expected {expected[place]!r}", math.inf, 0.0,
                )  # fmt: skip
            continue
        difference, tolerance = distance(given, expected, rtol, atol)
        if not difference <= tolerance:
            raise refuse(f"differs by {difference:.3g}, and {tolerance:.3g} is allowed", difference, tolerance)
        if difference * worst.tolerance >= worst.max_abs * tolerance:
            worst = VerifiedCase(shapes, difference, tolerance, name)
    return worst


def distance(
    given: Array, expected: Array, rtol: float | None = None, atol: float | None = None
) -> tuple[float, float]:
    """The largest absolute difference, and what is allowed. NaN agrees with NaN, an infinity with itself."""
    coarse = COARSE.get(expected.dtype.name, (RTOL, ATOL))
    rtol, atol = coarse[0] if rtol is None else rtol, coarse[1] if atol is None else atol
    left, right = given.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.abs(left - right)
    gap = np.where((left == right) | (np.isnan(left) & np.isnan(right)), 0.0, gap)
    gap = np.where(np.isnan(gap), np.inf, gap)
    finite = np.abs(right[np.isfinite(right)])
    return float(gap.max(initial=0.0)), atol + rtol * float(finite.max(initial=0.0))


def _tied(
    case: Run,
    name: str,
    given: Array,
    different: Array,
    rtol: float | None,
    atol: float | None,
    ties: Mapping[str, str],
) -> Array:
    none = np.zeros(different.shape, bool)
    scores = case.outputs.get(ties.get(name, ""))
    if scores is None or not different.any() or scores.dtype.kind != "f":
        return none
    _, tolerance = distance(scores, scores, rtol, atol)
    if scores.ndim == 1:
        near = np.abs(scores) <= tolerance
    else:
        best = np.sort(scores, axis=1)[:, -2:]
        near = best[:, -1] - best[:, 0] <= 2 * tolerance
    return near if near.shape == different.shape else none


def shown(shapes: Mapping[str, Sequence[int]]) -> str:
    """Shapes by name, for a message; the first few of many."""
    parts = [f"'{name}' {shape_text(shape)}" for name, shape in shapes.items()]
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")


def first_line(error: BaseException) -> str:
    """What an error says, in one line, without the colours and the preamble of Keras."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("Exception encountered when calling")]
    return (telling or lines or [type(error).__name__])[0]
