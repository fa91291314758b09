"""What a run costs by its number of rows, and from that how many rows are worth putting together.

Batching pays where a run is bound by overhead or by memory, and on processors many models are bound by neither:
MiniLM gains 15 % from eight sentences, a convolutional network nothing, some lose a fifth. So no number of rows is
assumed to be good. The seconds that runs of 1, 2, 4, ... rows took at load are where a curve starts, each run that
happens corrects it, and the target is the smallest number of rows beyond which rows per second no longer rise.

What a live run takes differs from the best of several at load: other threads compete, caches are cold. That slows
every size alike, and an average for each size would see only the visited ones become slower, and wander off to the
others. So the curve is a Kalman filter on the logarithm of how far each size is from what was first believed. What it
believes beforehand: sizes are wrong together, the nearer the more so; and with time all of them drift, mostly in
common. A size that was never run thus follows its neighbours, one that was run long ago keeps its place among them,
and a run counts for as much as is not known yet. Source: R. E. Kalman, "A New Approach to Linear Filtering and
Prediction Problems", 1960, for a random walk observed one element at a time.

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

from .backend import CostPoint

ROWS_BOUND: Final = 1024
"""A curve looks no further; a model that gains beyond that is so cheap by row that nobody would notice."""
EXPLORE_EVERY: Final = 32
EXPLORE_AT_LEAST: Final = 0.75
"""Rows per second that a size must promise, as a share of the target's, to be tried."""

LEARN_S: Final = 1e-5
"""What taking in one run costs."""
LEARN_SHARE: Final = 0.02
"""The share of the run time that learning may take, for runs of one size."""

_GROW: Final = 1.03  # rows/s must rise by that much for more rows, or waiting and padding are spent on noise
_KEEP: Final = 1.01  # and by that much to stay there, so that the target does not flutter
_GROW_SLOW: Final = 1.10  # where a run already takes _SLOW_S, a little more throughput is not worth doubling it
_SLOW_S: Final = 0.1
_COMMON_VARIANCE: Final = 0.5**2  # a load-time measurement may be off by a half for all sizes alike
_OWN_VARIANCE: Final = 0.15**2  # and by a sixth for each
_UNKNOWN_COMMON_VARIANCE: Final = 1e4  # without a measurement by any factor for all
_UNKNOWN_OWN_VARIANCE: Final = 0.5**2  # and by a half for each
_NEARNESS: Final = 0.95  # correlation of two neighbouring sizes' own errors
_NOISE: Final = 0.15**2  # of a single run
_COMMON_DRIFT: Final = 0.02**2  # for each run
_OWN_DRIFT: Final = 0.003**2  # for each run
_OUTLIER: Final = 3.0  # standard deviations of what was expected; more counts as that
_CURIOSITY: Final = 2.0
_CLASSES_PER_OCTAVE: Final = 4
_CURVES_BOUND: Final = 64


class CostCurve:
    """Seconds by rows for rows of one size.

    Args:
        sizes: ascending numbers of rows, the first 1.
        prior: seconds for each of them as far as they are known beforehand.
        relative: ``prior`` has the shape of a curve but no unit; the first run gives it.
        lone_rows: rows that a lone row is run as: 2 where it is padded with a copy of itself.
        drift: how much slower than ``prior`` all sizes are thought to be before any was run.
    """

    __slots__ = (
        "_covariance", "_known", "_lone", "_offset", "_prior", "_seconds", "_sizes", "_target", "_turn", "_walk",
    )  # fmt: skip

    def __init__(
        self,
        sizes: Sequence[int],
        prior: Sequence[float],
        *,
        relative: bool = False,
        lone_rows: int = 1,
        drift: float = 1.0,
    ) -> None:
        self._sizes = tuple(sizes)
        self._prior = np.log(np.asarray(prior, dtype=np.float64))
        self._known = not relative
        self._lone = lone_rows
        self._offset = np.full(len(self._sizes), math.log(drift))
        index = np.arange(len(self._sizes))
        shape = _NEARNESS ** np.abs(index[:, None] - index[None, :])
        own, common = _OWN_VARIANCE, _COMMON_VARIANCE
        if relative:
            own, common = _UNKNOWN_OWN_VARIANCE, _UNKNOWN_COMMON_VARIANCE
        self._covariance = shape * own + common
        self._walk = shape * _OWN_DRIFT + _COMMON_DRIFT
        self._seconds: list[float] = []
        self._target = 0
        self._turn = 0
        self._refresh()

    @property
    def known(self) -> bool:
        """Whether ``seconds`` are seconds: something was measured, at load or since."""
        return self._known

    @property
    def drift(self) -> float:
        """How much slower than was known beforehand a run at the target is."""
        return math.exp(self._offset[self._target])

    @property
    def target(self) -> int:
        """The number of rows beyond which rows per second no longer rise; 1: batching gains nothing."""
        return self._sizes[self._target]

    @property
    def points(self) -> tuple[CostPoint, ...]:
        """The curve as it is believed now."""
        return tuple(CostPoint(n, s) for n, s in zip(self._sizes, self._seconds, strict=True))

    def seconds(self, rows: int) -> float:
        """What a run of ``rows`` rows is expected to take."""
        return _between(self._sizes, self._seconds, rows)

    def rows_within(self, seconds: float) -> int:
        """The largest known size that is expected to take no longer; at least 1."""
        best = 1
        for size, cost in zip(self._sizes, self._seconds, strict=True):
            if cost <= seconds:
                best = size
        return best

    def limit(self, available: int) -> int:
        """How many rows the next run may take when ``available`` wait: the target, or a step more or less to look.

        Every call stands for one run.
        """
        target = self._target
        if available > self._sizes[target]:
            self._turn += 1
            if self._turn % EXPLORE_EVERY == 0:
                other = target + (1 if self._turn % (2 * EXPLORE_EVERY) else -1)
                if 0 <= other < len(self._sizes) and self._promising(other):
                    return self._sizes[other]
        return self._sizes[target]

    def _promising(self, other: int) -> bool:
        believed = self._rate(other) / self._rate(self._target)
        at, known = self._target, self._covariance
        # A curve whose height was wrong by much is not trusted in its shape either.
        wrong = abs(float(self._offset[at]))
        doubt = math.sqrt(max(known[at, at] + known[other, other] - 2 * known[at, other], 0.0))
        return believed >= EXPLORE_AT_LEAST * math.exp(-wrong) and math.log(believed) + _CURIOSITY * doubt + wrong > 0.0

    def learn(self, rows: int, seconds: float) -> None:
        """Take in one run: ``rows`` rows as they were run, padding included, took ``seconds``."""
        sizes = self._sizes
        at = bisect_left(sizes, rows)
        if at == len(sizes) or (at and rows * rows < sizes[at - 1] * sizes[at]):
            at -= 1  # the nearer neighbour, sizes taken as a geometric series
        self._known = True
        self._covariance += self._walk
        toward = self._covariance[at].copy()
        expected = toward[at] + _NOISE
        # A page fault or a processor taken away may cost a hundredfold once: it counts as a slow run, no more.
        most = _OUTLIER * math.sqrt(expected)
        surprise = math.log(max(seconds, 1e-9) / self.seconds(rows))
        self._offset += toward * (min(max(surprise, -most), most) / expected)
        self._covariance -= toward[:, None] * (toward / expected)
        self._refresh()

    def _rate(self, at: int) -> float:
        return self._sizes[at] / self._seconds[at]

    def _refresh(self) -> None:
        self._seconds = np.exp(self._prior + self._offset).tolist()
        if self._lone > 1:
            # A lone row costs what its padded run costs; without this a padded model would seem to gain nothing.
            rest, costs = self._sizes[1:], self._seconds[1:]
            self._seconds[0] = _between(rest, costs, self._lone) if rest else self._seconds[0] * self._lone
        best = 0
        for i in range(1, len(self._sizes)):
            gain = _KEEP if i <= self._target else _GROW_SLOW if self._seconds[i] > _SLOW_S else _GROW
            if self._rate(i) > self._rate(best) * gain:
                best = i
        self._target = best


class CostModel:
    """The cost curves of one model version, one for each size of row that was seen.

    A model with variable axes costs by elements rather than by rows, so the curve measured at load is read as seconds
    by elements, and rows of another length start from there.

    Args:
        measured: run time by rows, ascending, as the backend measured it; may be empty.
        row_elements: elements per row of what was measured; 0 where not known: the first row seen stands for it.
        max_rows: the most rows that one run may take; 0 for no bound.
        lone_rows: see ``CostCurve``.
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
        self._measured = tuple(p for p in measured if p.rows > 0 and p.seconds > 0)
        self._row_elements = row_elements
        self._lone_rows = lone_rows
        self._variable = variable
        self._budget_s = 0.0
        self._last_rows = 0
        self._latest = self._new(1.0, 1.0)
        self._curves: dict[int, CostCurve] = {0: self._latest}

    @property
    def latest(self) -> CostCurve:
        """The curve of the rows that ran last."""
        return self._latest

    def curve(self, row_elements: int) -> CostCurve:
        """The curve for rows of that many elements."""
        if not self._variable:
            return self._latest
        if row_elements < 1:
            row_elements = 1
        if self._row_elements == 0:
            self._row_elements = row_elements
        at = round(math.log2(row_elements / self._row_elements) * _CLASSES_PER_OCTAVE)
        found = self._curves.get(at)
        if found is None:
            if len(self._curves) >= _CURVES_BOUND:
                del self._curves[next(iter(self._curves))]
            found = self._curves[at] = self._new(2.0 ** (at / _CLASSES_PER_OCTAVE), self._latest.drift)
        return found

    def learn(self, row_elements: int, rows: int, seconds: float) -> None:
        """Take in one run of ``rows`` rows of ``row_elements`` elements each, as they were run."""
        self._budget_s += seconds * LEARN_SHARE
        if self._budget_s < LEARN_S and rows == self._last_rows:
            return
        self._budget_s = 0.0
        self._last_rows = rows
        curve = self.curve(row_elements)
        curve.learn(rows, seconds)
        self._latest = curve

    def _new(self, scale: float, drift: float) -> CostCurve:
        """A curve for rows ``scale`` times as large as those that were measured."""
        points = self._measured
        rows = [p.rows for p in points]
        seconds = [p.seconds for p in points]
        if not points:
            # Nothing known: proportional to rows, so that batching has to prove itself.
            return CostCurve(self._sizes, self._sizes, relative=True, lone_rows=self._lone_rows, drift=drift)
        overhead = 0.0
        if len(points) > 1 and rows[1] > rows[0]:
            slope = max((seconds[1] - seconds[0]) / (rows[1] - rows[0]), 0.0)
            overhead = max(seconds[0] - slope * rows[0], 0.0)
        prior = []
        for size in self._sizes:
            at = size * scale
            below = overhead + (seconds[0] - overhead) * at / rows[0]
            prior.append(below if at < rows[0] else _between(rows, seconds, at))
        return CostCurve(self._sizes, prior, lone_rows=self._lone_rows, drift=drift)


def _between(sizes: Sequence[int], values: Sequence[float], rows: float) -> float:
    """Linear between the sizes; beyond the last proportional to rows, which promises no gain that was not measured."""
    at = bisect_left(sizes, rows)
    if at == len(sizes):
        return values[-1] * rows / sizes[-1]
    if at == 0 or sizes[at] == rows:
        return values[at]
    low, high = sizes[at - 1], sizes[at]
    return values[at - 1] + (values[at] - values[at - 1]) * (rows - low) / (high - low)
