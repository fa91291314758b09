"""What is found out about a session by running it: whether rows may share a run, what a run costs, what is short.

**Rows.** A model declares that axis 0 may vary, never that its rows are independent of each other. So rows are run
alone and together, and results compared bit by bit:

    row in every batch = row alone                      exact
    equal in all batches of two and more, near alone    padded     (a lone row takes another kernel, GEMV for GEMM)
    differs with its mates, place, or equal runs        inexact
    other number of rows out than in, or batches fail   unbatched

The same place in a batch of the same size with other mates tells a dependence on what the mates hold: one quantisation
scale for all, a mean or a running sum over rows. Other places and sizes tell kernels that work in tiles, such as 8-bit
block weights, where the last of an odd number of positions is rounded differently (0.02 of the largest value, MiniLM),
and convolutions (1e-7, magika; both 2026-11, onnxruntime 1.32). A lone row of MiniLM differs by 3e-8; `padded` allows
more, because FP16 rounds at 1e-3.

**Time.** The best of several runs, because a neighbour on the machine can only slow a run down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...core.backend import CostPoint, RowExactness, RunHandle, Session
from ...core.errors import DeadlineExceededError, GatewayError
from ...core.model_config import PaddingAxis, Warmup
from ...core.tensors import Arrays
from .sample import Sample, candidates, same_bits

Results = list[NDArray[Any]]

_PROBE_BATCHES: Final = ((0, 2), (1, 0), (2, 0), (0, 1, 2))
"""With (0, 1) before them: row 0 in front of and behind two different mates, each row at several places."""
_SMALL: Final = max(map(len, _PROBE_BATCHES))
_LARGE_BATCHES: Final = (8, 33)
"""Sizes that cross the tiles of matrix kernels, with the same three rows at every place; tried while they are cheap."""
_LARGE_BATCH_S: Final = 0.25
_OTHER_LENGTHS: Final = (7, 1)
_NEAR: Final = 2e-2
"""Largest difference of a lone row from itself in a batch, relative to the largest value of the output."""

_EXTRA: Final = 5
"""Positions added to see what padding does."""
_PADDING_NEAR: Final = 1e-3
"""Other lengths take other kernels, whose rounding adds up through the layers of a network."""

_SHORT_S: Final = 0.02
"""A run that took less the first time is timed without the watchdog, whose hand-over would be measured too."""
_MAX_INLINE_ELEMENTS: Final = 1 << 16
"""Copying more than this takes the event loop as long as a short run."""
MAX_COST_ROWS: Final = 1024
_MAX_COST_ELEMENTS: Final = 1 << 23


class Watchdog:
    """Ends runs that take too long, so that loading a model that never answers ends. One thread while entered."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._changed = threading.Condition()
        self._handle: RunHandle | None = None
        self._due = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="inferway-load-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def run(self, session: Session, inputs: Arrays, outputs: Sequence[str]) -> Results:
        """A run under the limit.

        Raises:
            DeadlineExceededError: it took longer.
            ModelExecutionError: it failed.
        """
        handle = RunHandle()
        with self._changed:
            self._handle, self._due = handle, time.monotonic() + self._limit_s
            self._changed.notify()
        try:
            return session.run(inputs, outputs, handle)
        finally:
            with self._changed:
                self._handle = None

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                if self._handle is None:
                    self._changed.wait()
                elif (left := self._due - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    self._handle.terminate()
                    self._handle = None


@dataclass(frozen=True, slots=True)
class Runner:
    """A session with the watchdog over it, and all outputs asked for."""

    session: Session
    watchdog: Watchdog

    def run(self, inputs: Arrays) -> Results:
        return self.watchdog.run(self.session, inputs, self.session.signature.output_names)

    def time(self, inputs: Arrays, budget_s: float, repeats: int = 7) -> float:
        """Seconds of the best of up to ``repeats`` runs after a first one, which is not counted where others follow."""
        names = self.session.signature.output_names
        started = time.perf_counter()
        self.watchdog.run(self.session, inputs, names)
        best = first = time.perf_counter() - started
        spent = 0.0
        for repeat in range(repeats):
            if spent + best > budget_s:
                break
            started = time.perf_counter()
            if first < _SHORT_S:
                self.session.run(inputs, names)
            else:
                self.watchdog.run(self.session, inputs, names)
            took = time.perf_counter() - started
            spent += took
            best = took if repeat == 0 else min(best, took)
        return best


def find_sample(runner: Runner, warmups: Sequence[Warmup], bounded: bool, budget_s: float) -> tuple[Sample | None, str]:
    """Inputs on which the model runs, or None and why none was found."""
    until = time.monotonic() + budget_s
    reason = ""
    for sample in candidates(runner.session.signature, warmups, bounded):
        try:
            runner.run(sample.batch([0]))
        except DeadlineExceededError:
            # It runs, and does not end: other lengths would take as long.
            return None, "a run on made-up input did not end in time"
        except GatewayError as error:
            reason = reason or error.message
        else:
            return sample, ""
        if time.monotonic() > until:
            break
    return None, f"no input was found on which it runs: {reason}"


def probe_rows(runner: Runner, sample: Sample, most_rows: int | None = None) -> tuple[RowExactness, str]:
    """How a row's result depends on the rows that run with it, and why where it does.

    Args:
        most_rows: that a batch is ever given; no larger one is tried, for the memory that it takes is kept for good.
    """
    if not sample.has_different_rows():
        return "inexact", "no two different rows were found on which the model runs"
    sizes = _LARGE_BATCHES if most_rows is None else tuple(min(size, most_rows) for size in _LARGE_BATCHES)
    verdict, note = _probe_at(runner, sample, sorted({size for size in sizes if size > _SMALL}))
    for other in _others(runner, sample):
        if verdict not in ("exact", "padded"):
            break
        again, why = _probe_at(runner, other, ())
        if again != "exact":
            verdict, note = again, why
    return verdict, note


def _others(runner: Runner, sample: Sample) -> Iterator[Sample]:
    """Samples of other lengths and with the optional inputs, those on which the model runs.

    Optional inputs on which it does not run stay unproved; a request that has them meets only requests that do.
    """
    tried = []
    if any(-1 in spec.shape[1:] for spec in sample.signature.inputs if not spec.optional) and not sample.given:
        tried += [replace(sample, length=length, lengths={}) for length in _OTHER_LENGTHS]
    if any(spec.optional for spec in sample.signature.inputs):
        tried.append(replace(sample, with_optional=True))
    for other in tried:
        try:
            runner.run(other.batch([0]))
        except GatewayError:
            continue
        yield other


def _probe_at(runner: Runner, sample: Sample, sizes: Sequence[int]) -> tuple[RowExactness, str]:
    try:
        first = runner.run(sample.batch([0, 1]))
        for spec, result in zip(sample.signature.outputs, first, strict=True):
            if result.ndim == 0 or result.shape[0] != 2:
                return "unbatched", f"output '{spec.name}' has shape {list(result.shape)} for two rows"
        if not _all_same(first, runner.run(sample.batch([0, 1]))):
            return "inexact", "equal runs give different results"
        started = time.perf_counter()
        alone = {row: runner.run(sample.batch([row])) for row in (0, 1, 2)}
        row_s = (time.perf_counter() - started) / 3
        elements = sample.count_elements()
        batches = [
            *_PROBE_BATCHES,
            *(
                tuple(i % 3 for i in range(size))
                for size in sizes
                if size * row_s < _LARGE_BATCH_S and size * elements <= _MAX_COST_ELEMENTS
            ),
        ]
        return _compare(alone, [((0, 1), first), *((rows, runner.run(sample.batch(rows))) for rows in batches)])
    except DeadlineExceededError:
        return "unbatched", "a run of two rows did not end in time"
    except GatewayError as error:
        return "unbatched", f"one row runs and two together do not: {error.message}"


def _compare(alone: dict[int, Results], batches: Sequence[tuple[Sequence[int], Results]]) -> tuple[RowExactness, str]:
    together: dict[int, Results] = {}
    placed: dict[tuple[int, int, int], Results] = {}
    moved = ""
    for rows, results in batches:
        if any(result.shape[:1] != (len(rows),) for result in results):
            return "unbatched", f"the outputs of {len(rows)} rows do not have {len(rows)} rows each"
        for place, row in enumerate(rows):
            own = [result[place : place + 1] for result in results]
            known = placed.setdefault((row, place, len(rows)), own)
            if not _all_same(known, own):
                return "inexact", f"a row's result depends on what the rows beside it hold ({_difference(known, own)})"
            known = together.setdefault(row, own)
            if not moved and not _all_same(known, own):
                moved = _difference(known, own)
    if moved:
        return "inexact", f"a row's result depends on the size of its batch and its place in it ({moved})"
    gaps = [(distance(own, together[row]), row) for row, own in alone.items() if not _all_same(own, together[row])]
    if not gaps:
        return "exact", ""
    worst, row = max(gaps)
    if worst > _NEAR:
        return "inexact", f"a row alone differs from itself in a batch ({_difference(alone[row], together[row])})"
    return "padded", f"a row alone differs by {worst:.1g} of the largest value from itself in a batch"


def _all_same(first: Results, second: Results) -> bool:
    return all(map(same_bits, first, second))


def _difference(first: Results, second: Results) -> str:
    gap = distance(first, second)
    return "other values" if gap == float("inf") else f"by {gap:.1g} of the largest value"


def distance(first: Results, second: Results) -> float:
    """The largest difference of two results, relative to each output's largest value; inf where not comparable.

    Integers, strings and shapes are either equal or not comparable; so are NaN and infinities at other places.
    """
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if same_bits(a, b):
            continue
        if a.shape != b.shape or a.dtype.kind != "f":
            return float("inf")
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return float("inf")
        left, right = a[finite].astype(np.float64), b[finite].astype(np.float64)
        if left.size:
            worst = max(worst, float(np.abs(left - right).max()) / (float(np.abs(left).max()) or 1.0))
    return worst


def probe_padding(runner: Runner, sample: Sample, padding: PaddingAxis) -> str:
    """What padding along an axis does to a row's own results; empty where it does nothing that matters.

    A configuration declares that a row may be made longer by a fill that the model does not regard, usually because a
    mask says so. Where it forgot the mask, or the model has none, answers would be wrong without any error.
    """
    inputs = sample.batch([0])
    padded = dict(inputs)
    for name, axis in padding.inputs.items():
        array = inputs.get(name)
        if array is None or array.dtype.kind not in "fiub":
            return ""
        widths = [(0, _EXTRA if number == axis else 0) for number in range(array.ndim)]
        padded[name] = np.pad(array, widths, constant_values=padding.fill.get(name, 0))
    length = next(inputs[name].shape[axis] for name, axis in padding.inputs.items())
    try:
        alone, longer = runner.run(inputs), runner.run(padded)
    except GatewayError as error:
        return f"a padded row does not run: {error.message}"
    for place, spec in enumerate(sample.signature.outputs):
        axis = padding.outputs.get(spec.name, 0)
        if axis and longer[place].ndim > axis:
            longer[place] = np.take(longer[place], range(length), axis)
    gap = distance(alone, longer)
    return f"padding changes results ({_difference(alone, longer)})" if gap > _PADDING_NEAR else ""


def measure_cost(runner: Runner, sample: Sample, max_rows: int, budget_s: float) -> tuple[CostPoint, ...]:
    """Run time by rows: 1, 2, 4, … as far as ``max_rows`` and the budget reach.

    Stops also where two doublings in turn gained no rows per second, since no batch will be made larger than that.
    """
    until = time.monotonic() + budget_s
    points: list[CostPoint] = []
    elements = max(sample.count_elements(), 1)
    rows, idle = 1, 0
    while rows <= max_rows and idle < 2 and rows * elements <= _MAX_COST_ELEMENTS:
        expected = points[-1].seconds * 2 if points else 0.0
        left = until - time.monotonic()
        if points and expected * 2 > left:
            break
        try:
            seconds = runner.time(sample.batch([row % 8 for row in range(rows)]), min(max(left, 0) / 4, 0.1))
        except GatewayError:
            break
        if points and rows / seconds < 1.02 * max(point.rows / point.seconds for point in points):
            idle += 1
        else:
            idle = 0
        points.append(CostPoint(rows, seconds))
        rows *= 2
    # Fewer rows take no longer than more: where they seem to, a neighbour was busy for all of their runs.
    for place in range(len(points) - 2, -1, -1):
        if points[place].seconds > points[place + 1].seconds:
            points[place] = replace(points[place], seconds=points[place + 1].seconds)
    return tuple(points)


def measure_inline(runner: Runner, sample: Sample, threshold_s: float, budget_s: float) -> int:
    """The largest number of input elements of which every run, whatever its shape, takes less than ``threshold_s``.

    A number of elements can be many short rows or one long one, and time may grow with the square of a length. So at
    each number the extremes are run: all in rows, and all in each variable length.
    """
    until = time.monotonic() + budget_s
    axes = _free_axes(sample)
    best = 0
    budget = replace(sample, length=1, lengths={}, given={}).count_elements()
    while budget <= _MAX_INLINE_ELEMENTS:
        extremes = [_stretch(sample, budget, axis) for axis in axes]
        for inputs in extremes:
            if time.monotonic() > until or not _is_short(runner, inputs, threshold_s):
                return best
        best = max(best, min(sum(array.size for array in inputs.values()) for inputs in extremes))
        if not axes[0]:
            break
        budget *= 2
    return best


def _is_short(runner: Runner, inputs: Arrays, threshold_s: float) -> bool:
    """Whether a run in one of several short series is below the threshold: a neighbour's time slice ends a series."""
    try:
        return any(runner.time(inputs, threshold_s * 8, repeats=5) <= threshold_s for _ in range(4))
    except GatewayError:
        return False


def _free_axes(sample: Sample) -> list[str]:
    """What can make a run larger: ``rows``, ``length``, or nothing, which is the empty string."""
    signature = sample.signature
    first = 1 if signature.batched else 0
    free = ["rows"] if signature.batched else []
    if any(-1 in spec.shape[first:] for spec in signature.inputs if not spec.optional):
        free.append("length")
    return free or [""]


def _stretch(sample: Sample, elements: int, axis: str) -> dict[str, NDArray[Any]]:
    """Inputs of about that many elements, all of them along one axis."""
    short = replace(sample, length=1, lengths={}, given={})
    if axis == "length":
        while (longer := replace(short, length=short.length * 2)).count_elements() <= elements:
            short = longer
        return short.batch([0])
    rows = max(elements // max(short.count_elements(), 1), 1) if axis == "rows" else 1
    return short.batch([row % 8 for row in range(rows)])


def throughput(call: Callable[[], object], callers: int, runs: int) -> float:
    """Seconds per run with that many callers at once, each in its own thread.

    Raises:
        GatewayError: a run failed.
    """
    gate = threading.Barrier(callers + 1)
    errors: list[GatewayError] = []

    def work() -> None:
        gate.wait()
        try:
            for _ in range(runs):
                call()
        except GatewayError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, name="inferway-load-trial") for _ in range(callers)]
    for thread in threads:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return (time.perf_counter() - started) / (callers * runs)
