"""The picture of a report: metric against latency, areas as sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from ..._errors import MissingExtraError
from .words import duration_text, size_text

if TYPE_CHECKING:
    from .report import Candidate, OptimizationReport

_ORIGINAL, _CHOSEN, _FRONT, _OTHER = "#000000", "#D55E00", "#0072B2", "#999999"
"""Of the palette of Okabe and Ito, which people with any form of colour blindness tell apart."""
_LARGEST_AREA: Final = 1600.0
"""Points squared, of the largest file."""
_SMALLEST_AREA: Final = 25.0
_FAR: Final = 6.0
"""Losses beyond so many times what is allowed are drawn at the edge, or they would flatten all others."""


def draw(report: OptimizationReport, path: str | None = None) -> Any:
    """See `OptimizationReport.plot`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise MissingExtraError("matplotlib", "optimize", "the plot of a report") from error

    figure = Figure(figsize=(8.5, 5.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever backend the program uses
    axes = figure.add_subplot()
    batch = report.objective_batch
    shown = list(report.measured)
    low, high = _limits(report, shown)
    largest = max(c.size_bytes for c in shown)
    points = []
    for candidate in sorted(shown, key=lambda c: -c.size_bytes):
        timing = candidate.timings[batch]
        value = min(max(candidate.metric, low), high)
        area = max(_SMALLEST_AREA, _LARGEST_AREA * candidate.size_bytes / largest)
        colour = _colour(report, candidate)
        axes.errorbar(
            timing.seconds, value, xerr=[[timing.seconds - timing.low], [timing.high - timing.seconds]], color=colour,
            capsize=2, linewidth=1, zorder=2,
        )  # fmt: skip
        axes.scatter(
            timing.seconds, value, s=area, color=colour, alpha=0.35, edgecolors=colour, linewidths=1.5, zorder=3
        )
        axes.scatter(timing.seconds, value, s=8, color=colour, zorder=4)
        points.append((candidate, timing.seconds, value, math.sqrt(area) / 2))
    limit = _allowed(report)
    if low <= limit <= high:
        axes.axhline(limit, color=_OTHER, linewidth=1, linestyle="--", zorder=0)
        axes.annotate(
            "what may be lost", (1, limit), xycoords=("axes fraction", "data"), xytext=(-3, 3),
            textcoords="offset points", ha="right", fontsize=8, color="#666666",
        )  # fmt: skip
    times = [t for c in shown for t in (c.timings[batch].low, c.timings[batch].high)]
    axes.set_xlim(0, max(times) * 1.18)
    margin = (high - low) * 0.22
    axes.set_ylim(low - margin, high + margin)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration_text(value) if value else "0"))
    axes.set_xlabel(f"latency of {batch} rows, median (quartiles)")
    better = "more" if report.greater_is_better else "less"
    axes.set_ylabel(f"{report.metric_name} ({better} is better)")
    word = f"Chosen: {report.chosen.name}" if report.changed else "No change"
    figure.suptitle(f"{word} (areas are file sizes)", fontsize=11, x=0.01, ha="left")
    kinds = {_CHOSEN: "chosen", _ORIGINAL: "original", _FRONT: "on the Pareto front", _OTHER: "beaten by another"}
    present = {_colour(report, c) for c in shown}
    for colour, words in kinds.items():
        if colour in present:
            axes.scatter([], [], s=60, color=colour, alpha=0.6, linewidths=0, label=words)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8, borderaxespad=0.2)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label(figure, axes, report, points)
    if path is not None:
        figure.savefig(path)
    return figure


def _colour(report: OptimizationReport, candidate: Candidate) -> str:
    if candidate is report.chosen:
        return _CHOSEN
    return _ORIGINAL if candidate is report.original else _FRONT if candidate.pareto else _OTHER


def _allowed(report: OptimizationReport) -> float:
    if report.greater_is_better:
        return report.original.metric - report.max_drop
    return report.original.metric * (1 + report.max_drop)


def _limits(report: OptimizationReport, shown: Sequence[Candidate]) -> tuple[float, float]:
    """The range of the metric: everything that is not hopeless."""
    room = max(abs(_allowed(report) - report.original.metric), 1e-4 * max(1.0, abs(report.original.metric)))
    centre = report.original.metric
    near = [c.metric for c in shown if abs(c.metric - centre) <= _FAR * room] + [_allowed(report), centre]
    low, high = min(near), max(near)
    if any(c.metric < low for c in shown):
        low -= 0.35 * (high - low)
    if any(c.metric > high for c in shown):
        high += 0.35 * (high - low)
    return low, high


def _label(
    figure: Any, axes: Any, report: OptimizationReport, points: Sequence[tuple[Any, float, float, float]]
) -> None:
    """Put each name beside its point, where it covers no other name and as little of everything else as can be."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    batch = report.objective_batch
    taken: list[tuple[Any, float]] = []
    for candidate, x, y, radius in points:
        px, py = axes.transData.transform((x, y))
        taken.append((Bbox.from_bounds(px - 5, py - 5, 10, 10), 10))
        wide = 2 * radius * scale
        taken.append((Bbox.from_bounds(px - wide / 2, py - wide / 2, wide, wide), 1))
        ends = [
            axes.transData.transform((t, y))[0] for t in (candidate.timings[batch].low, candidate.timings[batch].high)
        ]
        taken.append((Bbox.from_bounds(ends[0], py - 2, ends[1] - ends[0], 4), 3))
    frame = axes.get_window_extent(renderer)
    _, line = axes.transData.transform((0, _allowed(report)))
    taken.append((Bbox.from_bounds(frame.x0, line - 2, frame.width, 4), 5))
    taken.append((Bbox.from_bounds(frame.x1 - 110, line, 110, 16), 10))
    ordered = sorted(points, key=lambda p: (p[0] is not report.chosen, p[0] is not report.original, not p[0].pareto))
    for candidate, x, y, radius in ordered:
        beyond = abs(candidate.metric - y) > 1e-12
        text = f"{candidate.name}, {size_text(candidate.size_bytes)}"
        if beyond:
            text += f"\n{report.metric_name} {candidate.metric:.3g}, beyond the scale"
        label = axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8, color=_text_colour(report, candidate),
            fontweight="bold" if candidate is report.chosen else "normal", zorder=5,
        )  # fmt: skip
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])
        box = label.get_window_extent(renderer)
        wide, tall = box.width / scale, box.height / scale
        px, py = (part / scale for part in axes.transData.transform((x, y)))
        best: tuple[float, tuple[float, float]] | None = None
        for dx, dy in _places(radius, wide, tall):
            placed = Bbox.from_bounds((px + dx) * scale, (py + dy) * scale, box.width, box.height)
            covered = sum(weight * _overlap(placed, other) for other, weight in taken)
            outside = box.width * box.height - _overlap(placed, frame)
            cost = covered + 10 * outside + 3 * math.hypot(dx + wide / 2, dy + tall / 2)
            if best is None or cost < best[0]:
                best = cost, (dx, dy)
        assert best is not None
        dx, dy = best[1]
        label.set_position((dx, dy))
        taken.append((Bbox.from_bounds((px + dx) * scale, (py + dy) * scale, box.width, box.height), 10))
        if math.hypot(max(dx, -dx - wide, 0), max(dy, -dy - tall, 0)) > radius + 14:
            axes.annotate(
                "", (x, y), xytext=(dx + (0 if dx > 0 else wide if dx + wide < 0 else wide / 2), dy + tall / 2),
                textcoords="offset points", arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.7},
                zorder=1,
            )  # fmt: skip


def _text_colour(report: OptimizationReport, candidate: Candidate) -> str:
    colour = _colour(report, candidate)
    return {_OTHER: "#555555", _CHOSEN: "#A84800"}.get(colour, colour)


def _places(radius: float, wide: float, tall: float) -> list[tuple[float, float]]:
    """Lower left corners around a point, in points from it, near ones first."""
    found = []
    for distance in (3, 10, 20, 34, 50, 70, 95):
        gap = radius + distance
        for degrees in range(0, 360, 15):
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            found.append((gap * across + (across - 1) * wide / 2, gap * up + (up - 1) * tall / 2))
    return found


def _overlap(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(0.0, width) * max(0.0, height))
