"""How a training went: metrics for each epoch, as a table, as small curves of text, and as a figure."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Final, Literal

import numpy as np

from .._errors import MissingExtraError

_BARS: Final = "▁▂▃▄▅▆▇█"
_WIDTH: Final = 24
_COLOURS: Final = ("#1f5fa8", "#d9822b")
"""Of training and validation: blue and orange, which look different to everybody."""
_LARGER_IS_BETTER: Final = ("acc", "auc", "precision", "recall", "r2", "f1", "score")


@dataclass(slots=True)
class History:
    """What a training came to, epoch by epoch; ``history`` and ``epoch`` are those of Keras.

    Attributes:
        history: metrics by name, a value for each epoch; those of validation begin with ``val_``.
        strategy: ``local``, ``ddp`` or ``parameter_server``.
        epochs: how many were trained, those before a resumption included.
        steps: updates of the weights.
        elapsed_s: seconds, without what a checkpoint had behind it.
        stopped: ``early`` where early stopping ended it.
        best_epoch: the epoch, from 1, whose weights early stopping took back.
        resumed_from: epochs that a checkpoint had behind it; 0 where there was none.
        facts: figures of distributed training, such as ``bytes_pushed``.
    """

    history: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    strategy: str = "local"
    epochs: int = 0
    steps: int = 0
    elapsed_s: float = 0.0
    stopped: Literal["finished", "early"] = "finished"
    best_epoch: int | None = None
    resumed_from: int = 0
    facts: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def epoch(self) -> list[int]:
        """Numbers of the epochs, from 0."""
        return list(range(self.epochs))

    @property
    def last(self) -> dict[str, float]:
        """The metrics of the weights that the model has now: of the last epoch, or of the best where that was taken."""
        at = -1 if self.best_epoch is None else self.best_epoch - 1
        return {name: values[at] for name, values in self.history.items() if len(values) >= (self.best_epoch or 1)}

    def frame(self) -> Any:
        """A pandas data frame, a row for each epoch, counted from 1."""
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("pandas", "train", "a history as a data frame") from error
        made = pandas.DataFrame(self.history)
        made.index = pandas.RangeIndex(1, len(made) + 1, name="epoch")
        return made

    def plot(self, metrics: Sequence[str] | None = None) -> Any:
        """Curves of the metrics over the epochs, training and validation together.

        Args:
            metrics: names without ``val_``; None for all.
        Returns:
            A ``matplotlib.figure.Figure``; ``figure.savefig("history.png")`` writes it.
        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise MissingExtraError("matplotlib", "optimize", "plotting a history") from error
        names = list(metrics) if metrics is not None else self._names()
        figure = Figure(figsize=(4.2 * max(1, len(names)), 3.0), layout="constrained")
        axes = figure.subplots(1, max(1, len(names)), squeeze=False)[0]
        for axis, name in zip(axes, names, strict=False):
            both = ((name, "training"), (f"val_{name}", "validation"))
            for (key, label), colour in zip(both, _COLOURS, strict=True):
                values = self.history.get(key)
                if values:
                    marker = "o" if len(values) <= 30 else None
                    axis.plot(range(1, len(values) + 1), values, color=colour, label=label, marker=marker, markersize=3)
            if self.best_epoch is not None:
                axis.axvline(self.best_epoch, color="0.6", linestyle=":", label=f"best: epoch {self.best_epoch}")
            axis.set_title(name, loc="left", fontsize=10)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8, frameon=False)
        return figure

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name.removeprefix("val_") for name in self.history))

    @property
    def _head(self) -> str:
        parts = [f"{self.epochs} epoch{'s' if self.epochs != 1 else ''}"]
        if self.steps:
            parts.append(f"{self.steps} steps")
        parts.append(f"{self.elapsed_s:.1f} s")
        words = ", ".join(parts)
        if self.strategy != "local":
            words += f", {self.strategy}"
        if self.resumed_from:
            words += f", resumed after epoch {self.resumed_from}"
        if self.stopped == "early":
            words += f", stopped early; the best is epoch {self.best_epoch}"
        return words

    def __str__(self) -> str:
        if not self.history:
            return self._head
        width = max(map(len, self.history))
        lines = [self._head]
        for name, values in self.history.items():
            if len(values) == 1:
                lines.append(f"  {name:{width}}  {number(values[0]):>8}")
            elif values:
                at = best_at(name, values)
                lines.append(
                    f"  {name:{width}}  {number(values[0]):>8} {sparkline(values)} {number(values[-1]):<8}  "
                    f"best {number(values[at])} in epoch {at + 1}"
                )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        drawn = StringIO()
        try:
            self.plot().savefig(drawn, format="svg")
        except MissingExtraError:
            return f"<pre>{html.escape(str(self))}</pre>"
        svg = drawn.getvalue()
        return f"<div><p>{html.escape(self._head)}</p>{svg[svg.index('<svg') :]}</div>"


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """A curve in one line of text. Values that are no numbers are gaps; more than ``width`` of them are averaged."""
    array = np.asarray(values, float)
    if len(array) > width:
        array = np.array([part.mean() for part in np.array_split(array, width)])
    finite = array[np.isfinite(array)]
    if not len(finite):
        return " " * len(array)
    low, high = float(finite.min()), float(finite.max())
    spread = (high - low) or 1.0
    return "".join(
        _BARS[round((value - low) / spread * (len(_BARS) - 1))] if np.isfinite(value) else " " for value in array
    )


def best_at(name: str, values: Sequence[float]) -> int:
    """Index of the best value: the largest of an accuracy and the like, the smallest of anything else."""
    array = np.asarray(values, float)
    if not np.isfinite(array).any():
        return len(array) - 1
    return int(np.nanargmax(array) if larger_is_better(name) else np.nanargmin(array))


def larger_is_better(name: str) -> bool:
    """Whether a metric of that name grows as the model becomes better."""
    return any(part in name.lower() for part in _LARGER_IS_BETTER)


def number(value: float) -> str:
    """A metric for people: four significant digits."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
