"""What a run costs by its number of rows, and from that how many rows are worth putting together.

Batching pays where a run is bound by overhead or by memory, and on processors many models are bound by neither:
MiniLM gains a third from eight sentences, a convolutional network nothing, some lose a fifth. So no number of rows is
assumed to be good. The seconds that runs of 1, 2, 4, ... rows took at load are where a curve starts, each run that
happens corrects it, and the target is the smallest number of rows beyond which rows per second no longer rise. Where
rows differ in length, what was measured is read as seconds by elements, and each length has its own curve.

Live runs are noisy. Other threads compete for the processor, which hits long runs always and short ones rarely, so
that small batches would seem better than they are. What is learnt from is therefore the time that the run's thread
had the processor, where runs are seen that had it nearly all the time; where they wait for a device, the time on the
wall. ``stretch`` says by how much the wall's time is longer at present.

Nor can each size be averaged for itself: only the visited ones would follow a machine that became slower. So what is
learnt is a Kalman filter on the logarithm of how far each size, at each octave of length, is from what was first
believed. What it believes beforehand: sizes and lengths are wrong together, the nearer the more so; and with time all
of them drift, mostly in common. A size that was never run thus follows its neighbours, one that was run long ago keeps
its place among them, and a run counts for as much as is not known yet. Source: R. E. Kalman, "A New Approach to Linear
Filtering and Prediction Problems", 1960, for a random walk of which one linear combination is observed at a time.

Learning costs some microseconds. Where a run is not much longer, only some of the runs of a size are learnt from.

While rows wait, one run in ``EXPLORE_EVERY`` takes one step more than the target, or one less, by turns. It does so
only where the other size may be better for all that is known, and is not believed to lose much.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .backend import CostPoint

ROWS_BOUND: Final = 1024
"""Curves look no further; a model that gains beyond that is so cheap by row that nobody would notice."""
EXPLORE_EVERY: Final = 32
EXPLORE_AT_LEAST: Final = 0.75
"""Rows per second that a size must promise, as a share of the target's, to be tried."""
LEARN_SHARE: Final = 0.02
"""The share of the run time that learning may take, for runs of one size."""
WORKING_SHARE: Final = 0.8
"""A thread that had the processor for that share of a run worked; in less it may have waited for a device."""

_GROW: Final = 1.03  # rows/s must rise by that much for more rows, or waiting and padding are spent on noise
_KEEP: Final = 1.01  # and by that much to stay there, so that the target does not flutter
_GROW_SLOW: Final = 1.10  # where a run already takes _SLOW_S, a little more throughput is not worth doubling it
_SLOW_S: Final = 0.1
_COMMON_VARIANCE: Final = 0.5**2  # a load-time measurement may be off by a half for all sizes alike
_OWN_VARIANCE: Final = 0.15**2  # and by a sixth for each
_UNKNOWN_COMMON_VARIANCE: Final = 1e4  # without a measurement by any factor for all
_UNKNOWN_OWN_VARIANCE: Final = 0.5**2  # and by a half for each
_NEAR_SIZE: Final = 0.95  # correlation of two neighbouring sizes' own errors
_NEAR_LENGTH: Final = 0.9  # and of two neighbouring octaves of length
_NOISE: Final = 0.15**2  # of a single run
_COMMON_DRIFT: Final = 0.02**2  # for each run
_OWN_DRIFT: Final = 0.003**2  # for each run
_WALK_EVERY: Final = 8  # runs whose drift is added in one go
_OUTLIER: Final = 3.0  # standard deviations of what was expected; more counts as that
_CURIOSITY: Final = 2.0
_OCTAVES: Final = 4  # lengths are told apart up to 2**4 times what was measured, and down to that part of it
_STALE: Final = 16  # runs learnt from until the curve of another length is looked at anew
_CURVES_BOUND: Final = 512
_LEARN_S: Final = 2e-5  # what learning from a run costs, and below the same where lengths vary
_LEARN_VARIABLE_S: Final = 6e-5


class CostCurve:
    """Seconds by rows, for rows of one size, as they are believed now. Made and kept up to date by a ``CostModel``."""

    __slots__ = ("_at", "_lone", "_prior", "_seconds", "_share", "_sizes", "_target", "_version")

    def __init__(
        self, sizes: tuple[int, ...], prior: NDArray[np.float64], lone_rows: int, at: int, share: float
    ) -> None:
        self._sizes = sizes
        self._prior = prior
        self._lone = lone_rows
        # The octave below and how far the next one is: where in the model's table this curve is found.
        self._at = at
        self._share = share
        self._seconds: list[float] = []
        self._target = 0
        self._version = -_STALE

    @property
    def target(self) -> int:
        """The number of rows beyond which rows per second no longer rise; 1: batching gains nothing."""
        return self._sizes[self._target]

    @property
    def points(self) -> tuple[CostPoint, ...]:
        return tuple(CostPoint(n, s) for n, s in zip(self._sizes, self._seconds, strict=True))

    def seconds(self, rows: int) -> float:
        """What a run of ``rows`` rows is expected to take of a processor that does nothing else."""
        sizes, seconds = self._sizes, self._seconds
        at = bisect_left(sizes, rows)
        if at == len(sizes):
            return seconds[-1] * rows / sizes[-1]  # which promises no gain that was not seen
        if sizes[at] == rows or at == 0:
            return seconds[at]
        low = sizes[at - 1]
        return seconds[at - 1] + (seconds[at] - seconds[at - 1]) * (rows - low) / (sizes[at] - low)

    def rows_within(self, seconds: float) -> int:
        """The largest known size that is expected to take no longer; at least 1."""
        best = 1
        for size, cost in zip(self._sizes, self._seconds, strict=True):
            if cost <= seconds:
                best = size
        return best

    def _rate(self, at: int) -> float:
        return self._sizes[at] / self._seconds[at]

    def _refresh(self, offset: NDArray[np.float64]) -> None:
        self._seconds = seconds = np.exp(self._prior + offset).tolist()
        if self._lone > 1:
            # A lone row costs what its padded run costs; without this a padded model would seem to gain nothing.
            seconds[0] = seconds[1] if len(seconds) > 1 else seconds[0] * self._lone
        best = 0
        for i in range(1, len(seconds)):
            gain = _KEEP if i <= self._target else _GROW_SLOW if seconds[i] > _SLOW_S else _GROW
            if self._rate(i) > self._rate(best) * gain:
                best = i
        self._target = best


class CostModel:
    """The cost curves of one model version.

    Args:
        measured: run time by rows, ascending, as the backend measured it; may be empty.
        row_elements: elements per row of what was measured; 0 where not known: the first row seen stands for it.
        max_rows: the most rows that one run may take; 0 for no bound.
        lone_rows: rows that a lone row is run as: 2 where it is padded with a copy of itself, else 1.
        variable: rows differ in size; otherwise there is one curve.
    """

    def __init__(
        self,
        measured: Sequence[CostPoint],
        *,
        row_elements: int = 0,
        max_rows: int = 0,
        lone_rows: int = 1,
        variable: bool = False,
    ) -> None:
        bound = min(max_rows or ROWS_BOUND, ROWS_BOUND)
        sizes = [1 << i for i in range(bound.bit_length())]
        self._sizes = tuple(sizes) if sizes[-1] == bound else (*sizes, bound)
        points = [p for p in measured if p.rows > 0 and p.seconds > 0]
        self._known = bool(points)
        # Nothing known: proportional to rows, so that batching has to prove itself.
        self._rows = np.array([float(p.rows) for p in points] or [1.0])
        self._measured = np.array([p.seconds for p in points] or [1.0])
        self._row_elements = row_elements
        self._lone_rows = lone_rows
        self._variable = variable

        octaves = 2 * _OCTAVES + 1 if variable else 1
        self._offset = np.zeros(octaves * len(self._sizes))
        size, octave = np.arange(len(self._sizes)), np.arange(octaves)
        near = np.kron(
            _NEAR_LENGTH ** np.abs(octave[:, None] - octave[None, :]),
            _NEAR_SIZE ** np.abs(size[:, None] - size[None, :]),
        )
        if points:
            self._covariance = near * _OWN_VARIANCE + _COMMON_VARIANCE
        else:
            self._covariance = near * _UNKNOWN_OWN_VARIANCE + _UNKNOWN_COMMON_VARIANCE
        self._walk = (near * _OWN_DRIFT + _COMMON_DRIFT) * _WALK_EVERY
        self._version = 0
        self._turn = 0
        self._budget_s = 0.0
        self._last_rows = 0
        self._working = 0.0
        self.stretch = 1.0
        """By what factor runs take longer on the wall than ``CostCurve.seconds`` says."""
        self._curves: dict[int, CostCurve] = {}
        self.latest = self.curve(max(row_elements, 1)) if row_elements or not variable else self._new(1.0)
        """The curve of the rows that ran last."""

    @property
    def known(self) -> bool:
        """Whether seconds are seconds: something was measured, at load or since."""
        return self._known

    def curve(self, row_elements: int) -> CostCurve:
        """The curve for rows of that many elements."""
        if not self._variable:
            row_elements = 1
        found = self._curves.get(row_elements)
        if found is None:
            if self._row_elements == 0:
                self._row_elements = max(row_elements, 1)
            if len(self._curves) >= _CURVES_BOUND:
                del self._curves[next(iter(self._curves))]
            scale = max(row_elements, 1) / self._row_elements if self._variable else 1.0
            found = self._curves[row_elements] = self._new(scale)
        elif found._version + _STALE <= self._version:
            self._update(found)
        return found

    def limit(self, curve: CostCurve, available: int) -> int:
        """How many rows the next run may take when ``available`` wait: the target, or a step more or less to look.

        Every call stands for one run.
        """
        target = curve._target
        if available > curve._sizes[target]:
            self._turn += 1
            if self._turn % EXPLORE_EVERY == 0:
                other = target + (1 if self._turn % (2 * EXPLORE_EVERY) else -1)
                if 0 <= other < len(self._sizes) and self._promising(curve, other):
                    return self._sizes[other]
        return self._sizes[target]

    def learn(self, row_elements: int, rows: int, wall_s: float, work_s: float) -> None:
        """Take in one run of ``rows`` rows of ``row_elements`` elements each, as they were run, padding included.

        Args:
            wall_s: how long it took.
            work_s: for how much of that its thread had the processor.
        """
        wall_s = max(wall_s, 1e-9)
        self._working = max(self._working * 0.9999, min(work_s / wall_s, 1.0))
        seconds = work_s if self._working >= WORKING_SHARE and work_s > 0 else wall_s
        self.stretch += (min(max(wall_s / seconds, 1.0), 10.0) - self.stretch) * 0.02
        self._budget_s += seconds * LEARN_SHARE
        if self._budget_s < (_LEARN_VARIABLE_S if self._variable else _LEARN_S) and rows == self._last_rows:
            return
        self._budget_s = 0.0
        self._last_rows = rows
        self._known = True
        self._version += 1
        curve = self.latest = self.curve(row_elements)

        sizes = self._sizes
        size = bisect_left(sizes, rows)
        if size == len(sizes) or (size and rows * rows < sizes[size - 1] * sizes[size]):
            size -= 1  # the nearer neighbour, sizes taken as a geometric series
        low = curve._at * len(sizes) + size
        share, covariance, offset = curve._share, self._covariance, self._offset
        if self._version % _WALK_EVERY == 0:
            covariance += self._walk
        if share:
            high = low + len(sizes)
            toward = covariance[low] * (1.0 - share) + covariance[high] * share
            expected = float(toward[low]) * (1.0 - share) + float(toward[high]) * share + _NOISE
            believed = float(offset[low]) * (1.0 - share) + float(offset[high]) * share
        else:
            toward = covariance[low].copy()
            expected = float(toward[low]) + _NOISE
            believed = float(offset[low])
        believed += float(curve._prior[size])
        if rows != sizes[size]:
            believed += math.log(curve.seconds(rows) / curve._seconds[size])
        # A page fault may cost a hundredfold once: it counts as a slow run, no more.
        most = _OUTLIER * math.sqrt(expected)
        surprise = min(max(math.log(seconds) - believed, -most), most)
        offset += toward * (surprise / expected)
        covariance -= toward[:, None] * (toward / expected)
        self._update(curve)

    def _promising(self, curve: CostCurve, other: int) -> bool:
        believed = curve._rate(other) / curve._rate(curve._target)
        at = curve._at * len(self._sizes)
        here, there, known = at + curve._target, at + other, self._covariance
        doubt = math.sqrt(max(known[here, here] + known[there, there] - 2 * known[here, there], 0.0))
        # A curve whose height was wrong by much is not trusted in its shape either.
        wrong = abs(float(self._offset[here]))
        return believed >= EXPLORE_AT_LEAST * math.exp(-wrong) and math.log(believed) + _CURIOSITY * doubt + wrong > 0.0

    def _new(self, scale: float) -> CostCurve:
        """A curve for rows ``scale`` times as large as those that were measured."""
        rows, seconds = self._rows, self._measured
        overhead = 0.0
        if len(rows) > 1 and rows[1] > rows[0]:
            slope = max((seconds[1] - seconds[0]) / (rows[1] - rows[0]), 0.0)
            overhead = max(seconds[0] - slope * rows[0], 0.0)
        at = np.array(self._sizes) * scale
        prior = np.interp(at, rows, seconds)
        prior = np.where(at < rows[0], overhead + (seconds[0] - overhead) * at / rows[0], prior)
        prior = np.where(at > rows[-1], seconds[-1] * at / rows[-1], prior)
        octave = min(max(math.log2(scale) + _OCTAVES, 0.0), 2.0 * _OCTAVES) if self._variable else 0.0
        whole = int(octave)
        made = CostCurve(self._sizes, np.log(prior), self._lone_rows, whole, octave - whole)
        self._update(made)
        return made

    def _update(self, curve: CostCurve) -> None:
        curve._version = self._version
        count, share = len(self._sizes), curve._share
        at = curve._at * count
        offset = self._offset[at : at + count]
        if share:
            offset = offset * (1.0 - share) + self._offset[at + count : at + 2 * count] * share
        curve._refresh(offset)
