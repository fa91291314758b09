"""What optimising came to: a table, a picture, and the model that was chosen."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..._package import Offer
from ..example import Arrays
from .measure import Timing
from .plot import draw
from .words import duration_text, size_text

if TYPE_CHECKING:
    from ..model import OnnxModel


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How far one output is from the original's, over the held-out rows.

    Attributes:
        name: of the output.
        max_abs, mean_abs: of the differences of its numbers; None for an output that has no floats.
        relative: ``mean_abs`` as a share of the mean absolute value of the original's.
        differing: share of the rows in which an output that has no floats is another.
    """

    name: str
    max_abs: float | None = None
    mean_abs: float | None = None
    relative: float | None = None
    differing: float | None = None

    def __str__(self) -> str:
        if self.max_abs is None:
            return f"{self.name}: other in {self.differing or 0:.2%} of rows"
        return (
            f"{self.name}: at most {self.max_abs:.2g}, on average {self.mean_abs or 0:.2g} ({self.relative or 0:.2%})"
        )


@dataclass(frozen=True)
class Candidate:
    """One way to make the model smaller or faster, and what came of it.

    Attributes:
        name: such as ``static int8 (minmax)``.
        technique: what `optimize` calls the family, such as ``static_int8``; ``original`` for the model as it was.
        status: measured; failed, and ``reason`` says why; or skipped, and ``reason`` says why not.
        model: as `OnnxModel`; None unless measured.
        size_bytes: of the model as a file.
        gzip_bytes: of that file compressed; None where no candidate is about that.
        metric: of the held-out rows.
        drop: what of the metric is lost, see `OptimizationReport.max_drop`; negative for a gain.
        timings: batch size to timing.
        differences: for each output.
        independent_rows: whether a row's result is the same in any company; the gateway joins requests only then.
        pareto: nothing measured is better in one of metric, latency and size and as good in the others.
        notes: what is worth knowing beside.
    """

    name: str
    technique: str
    status: Literal["measured", "failed", "skipped"]
    reason: str = ""
    model: OnnxModel | None = field(default=None, repr=False)
    size_bytes: int = 0
    gzip_bytes: int | None = None
    metric: float = float("nan")
    drop: float = float("nan")
    timings: Mapping[int, Timing] = field(default_factory=dict[int, Timing])
    differences: tuple[OutputDifference, ...] = ()
    independent_rows: bool = True
    pareto: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimizationReport:
    """Every candidate against the original, from one run.

    Attributes:
        candidates: the original first.
        chosen: one of them; the original where nothing was better.
        changed: whether ``chosen`` is another model than the original.
        reason: why this one.
        metric_name, metric_about: what was measured for quality, and between what.
        greater_is_better: of the metric.
        max_drop: what may be lost: the difference where more is better, else the increase as a share of the original.
        objective: ``latency`` at ``objective_batch`` rows, or ``size``.
        threads: of one run.
        split: which rows calibrated and which measured.
        rounds: how often each was timed.
        machine: where.
        notes: what holds for all of it.
        golden: held-out rows with the chosen model's outputs, as ``client.models.deploy`` takes golden examples.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reason: str
    metric_name: str
    metric_about: str
    greater_is_better: bool
    max_drop: float
    objective: Literal["latency", "size"]
    objective_batch: int
    threads: int
    split: str
    rounds: int
    machine: str
    notes: tuple[str, ...] = ()
    golden: tuple[tuple[Arrays, Arrays, dict[str, float]], ...] = field(default=(), repr=False)

    @property
    def original(self) -> Candidate:
        """The model as it was given."""
        return self.candidates[0]

    @property
    def changed(self) -> bool:
        return self.chosen is not self.original

    @property
    def model(self) -> OnnxModel:
        """The model that was chosen. ``client.models.deploy`` and ``inferway.package`` take the report as well."""
        assert self.chosen.model is not None
        return self.chosen.model

    @property
    def measured(self) -> tuple[Candidate, ...]:
        """Candidates that could be measured, the original first."""
        return tuple(candidate for candidate in self.candidates if candidate.status == "measured")

    @property
    def speedup(self) -> float:
        """How many times as fast the chosen model is, at the objective's batch size."""
        return self.chosen.timings[self.objective_batch].speedup

    def candidate(self, name: str) -> Candidate:
        """One of the candidates.

        Raises:
            KeyError: there is none of that name.
        """
        found = {candidate.name: candidate for candidate in self.candidates}
        if name not in found:
            raise KeyError(f"no candidate {name!r}; there are {', '.join(found)}")
        return found[name]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the models, of types that JSON has."""
        return {
            "chosen": self.chosen.name,
            "changed": self.changed,
            "reason": self.reason,
            "metric": {
                "name": self.metric_name,
                "about": self.metric_about,
                "greater_is_better": self.greater_is_better,
                "max_drop": self.max_drop,
            },
            "objective": {"kind": self.objective, "batch": self.objective_batch},
            "threads": self.threads,
            "split": self.split,
            "rounds": self.rounds,
            "machine": self.machine,
            "notes": list(self.notes),
            "candidates": [_candidate_as_dict(candidate) for candidate in self.candidates],
        }

    def table(self) -> str:
        """The measured candidates as aligned text; ``*`` marks the chosen one, ``+`` the rest of the Pareto front."""
        header, rows = self._rows()
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = []
        for row in (header, *rows):
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def plot(self, path: str | None = None) -> Any:
        """The metric against latency, areas as sizes.

        Args:
            path: writes the picture there as well, in the format of its suffix.
        Returns:
            A ``matplotlib.figure.Figure``.
        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return draw(self, path)

    def __str__(self) -> str:
        parts = [f"{'Chosen: ' + self.chosen.name if self.changed else 'No change'}: {self.reason}", "", self.table()]
        differing = self._differences()
        if differing:
            parts += [
                "",
                "Difference to the original's outputs on the held-out rows (in percent of their mean absolute value):",
            ]
            wide = max(len(name) for name, _ in differing)
            before = ""
            for name, difference in differing:
                parts.append(f"  {(name if name != before else '').ljust(wide)}  {difference}")
                before = name
        for word, status in (("Failed", "failed"), ("Not tried", "skipped")):
            found = [c for c in self.candidates if c.status == status]
            if found:
                parts += ["", f"{word}:", *(f"  {c.name}: {c.reason}" for c in found)]
        parts += ["", *self._facts()]
        return "\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        header, rows = self._rows()
        styles = [f"text-align:{side};padding:.15em .7em;white-space:pre" for side in ("left", "right")]
        head = "".join(f"<th style='{styles[i > 0]}'>{html.escape(cell)}</th>" for i, cell in enumerate(header))
        body = []
        for candidate, row in zip(self.measured, rows, strict=True):
            weight = "font-weight:bold;" if candidate is self.chosen else ""
            faded = "" if candidate.pareto or candidate is self.chosen else "opacity:.7;"
            cells = "".join(f"<td style='{styles[i > 0]}'>{html.escape(cell)}</td>" for i, cell in enumerate(row))
            body.append(f"<tr style='font-variant-numeric:tabular-nums;{weight}{faded}'>{cells}</tr>")
        word = f"Chosen: {self.chosen.name}" if self.changed else "No change"
        rest = [f"{c.name}: {c.reason}" for c in self.candidates if c.status != "measured"]
        apart = [f"{name}: {difference}" for name, difference in self._differences()]
        return (
            f"<p><b>{html.escape(word)}</b>: {html.escape(self.reason)}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
            + _details("Difference to the original's outputs (in percent of their mean absolute value)", apart)
            + _details(f"Failed or not tried: {len(rest)}", rest)
            + "".join(f"<p style='margin:.2em 0'><small>{html.escape(fact)}</small></p>" for fact in self._facts())
        )

    def _differences(self) -> list[tuple[str, OutputDifference]]:
        return [(c.name, found) for c in self.measured if c is not self.original for found in c.differences]

    def __inferway_source__(self) -> Offer:
        """What ``client.models.deploy`` takes in its place.

        The chosen model, what is known of it, and some held-out rows with its own outputs as golden examples.
        """
        offer = self.model.__inferway_source__()
        if not self.changed:
            return offer
        facts = {
            "technique": self.chosen.name,
            "metric": self.metric_name,
            "value": self.chosen.metric,
            "original": self.original.metric,
            "speedup": {str(size): round(timing.speedup, 3) for size, timing in self.chosen.timings.items()},
            "rows": self.split,
        }
        labels = {**offer.labels, "optimised": _label(self.chosen.name)}
        return Offer(offer.model, labels, {**offer.metadata, "optimised": facts}, self.golden or None)

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        batches = list(self.original.timings)
        lost = "lost" if self.greater_is_better else "increase"
        compressed = self.original.gzip_bytes is not None
        header = ["", "size", *(["gzip"] if compressed else []), self.metric_name, lost]
        header += [f"batch {size}" for size in batches]
        rows = []
        for candidate in self.measured:
            mark = "*" if candidate is self.chosen else "+" if candidate.pareto else " "
            row = [f"{mark} {candidate.name}", size_text(candidate.size_bytes)]
            if compressed:
                row.append(size_text(candidate.gzip_bytes or 0))
            row.append(f"{candidate.metric:.4f}" if abs(candidate.metric) < 1000 else f"{candidate.metric:.4g}")
            if candidate is self.original:
                row.append("")
            else:
                row.append(f"{candidate.drop:.4f}" if self.greater_is_better else f"{candidate.drop:+.2%}")
            for size in batches:
                timing = candidate.timings[size]
                ratio = "" if candidate is self.original else f"{sure_text(timing)}{timing.speedup:.2f}×"
                row.append(f"{duration_text(timing.seconds)} {ratio:>6}")
            rows.append(row)
        return header, rows

    def _facts(self) -> list[str]:
        loss = "difference" if self.greater_is_better else "increase as a share of the original's"
        facts = [
            f"{self.metric_name} {self.metric_about}; allowed to lose {self.max_drop:g} ({loss}). Rows: {self.split}.",
            f"{self.machine}, {self.threads} thread{'s' if self.threads != 1 else ''} a run, medians of {self.rounds} "
            "rounds in turn; ≈ marks what is within the noise. * chosen, + on the Pareto front of metric, latency and "
            "size.",
        ]
        noted: dict[str, list[str]] = {}
        for candidate in self.measured:
            for note in candidate.notes:
                noted.setdefault(note, []).append(candidate.name)
        facts += [f"{', '.join(names)}: {note}." for note, names in noted.items()]
        return [*facts, *self.notes]


def _details(title: str, lines: Sequence[str]) -> str:
    """Lines that a notebook shows when they are asked for."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<details><summary>{html.escape(title)}</summary><ul>{items}</ul></details>" if lines else ""


def _label(name: str) -> str:
    """A technique's name as a label's value may be written."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def sure_text(timing: Timing) -> str:
    """A mark for a ratio that noise explains."""
    return "" if timing.faster or timing.slower else "≈"


def mark_pareto(candidates: Sequence[Candidate], batch: int) -> frozenset[str]:
    """Names of the measured candidates that no other beats in metric, latency and size together."""
    found = [c for c in candidates if c.status == "measured"]
    values = {c.name: (c.drop, c.timings[batch].seconds, float(c.size_bytes)) for c in found}

    def beaten(name: str) -> bool:
        mine = values[name]
        return any(
            theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True)) for theirs in values.values()
        )

    return frozenset(name for name in values if not beaten(name))


def _candidate_as_dict(candidate: Candidate) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": candidate.name, "technique": candidate.technique, "status": candidate.status}
    if candidate.status != "measured":
        return {**facts, "reason": candidate.reason}
    return {
        **facts,
        "size_bytes": candidate.size_bytes,
        "gzip_bytes": candidate.gzip_bytes,
        "metric": candidate.metric,
        "drop": candidate.drop,
        "pareto": candidate.pareto,
        "independent_rows": candidate.independent_rows,
        "latency": {
            str(size): {
                "seconds": t.seconds, "low": t.low, "high": t.high, "speedup": t.speedup, "spread": t.spread,
                "faster": t.faster,
            }
            for size, t in candidate.timings.items()
        },
        "differences": [
            {"output": d.name, "max_abs": d.max_abs, "mean_abs": d.mean_abs, "relative": d.relative,
             "differing": d.differing}
            for d in candidate.differences
        ],
        "notes": list(candidate.notes),
    }  # fmt: skip
