"""Rounds, their medians, and tables: every benchmark prints ratios of medians taken in one run, in turn."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of the rounds with the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 0) -> str:
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}–{self.high:,.{digits}f})"


@dataclass(frozen=True, slots=True)
class Check:
    """One figure of the specification beside what was measured. It informs; nothing fails because of it."""

    what: str
    measured: float
    wanted: float
    at_least: bool = True
    unit: str = ""

    @property
    def reached(self) -> bool:
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    def text(self) -> str:
        sign = "≥" if self.at_least else "≤"
        verdict = "reached" if self.reached else "NOT reached"
        return f"{self.what}: {self.measured:.2f}{self.unit} (wanted {sign} {self.wanted:g}{self.unit}) {verdict}"


@dataclass(slots=True)
class Report:
    """What one benchmark found: notes, tables, checks, and the raw values for a JSON file."""

    name: str
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(f"  {text}")

    def check(self, check: Check) -> None:
        self.checks.append(check)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a Markdown table and keep it for the JSON file."""
        self.data.setdefault("tables", []).append(
            {"title": title, "header": list(header), "rows": [list(r) for r in rows]}
        )
        widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
        self.say(f"\n{title}")
        for index, row in enumerate((header, *rows)):
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            self.say("| " + " | ".join(cells) + " |")
            if index == 0:
                self.say(
                    "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
                )

    def finish(self) -> None:
        if self.checks:
            self.say("\nAgainst the figures that the project set itself:")
            for check in self.checks:
                self.say(f"  {check.text()}")

    def as_json(self) -> dict[str, Any]:
        checks = [{**_plain(check), "reached": check.reached} for check in self.checks]
        return {"name": self.name, "notes": self.notes, "checks": checks, **self.data}


def _plain(check: Check) -> dict[str, Any]:
    return {"what": check.what, "measured": check.measured, "wanted": check.wanted, "at_least": check.at_least}


def in_turn(
    contestants: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int, report: Report
) -> dict[str, dict[str, Spread]]:
    """Measure A, B, C, A, B, C, … so that a slow minute of the machine hits all of them.

    Args:
        contestants: name to a function that measures one window and returns values by name.
    Returns:
        contestant to value name to its spread over the rounds. The raw values go into the report's data.
    """
    seen: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    for number in range(rounds):
        # Every other round runs backwards, so that nobody always follows the same neighbour.
        order = list(contestants) if number % 2 == 0 else list(reversed(list(contestants)))
        for name in order:
            for key, value in contestants[name]().items():
                seen[name].setdefault(key, []).append(value)
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    report.data.setdefault("rounds", []).append(seen)
    return {name: {key: Spread.of(values) for key, values in found.items()} for name, found in seen.items()}


def machine() -> dict[str, Any]:
    """What a reader needs to know of the machine to place the numbers."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "processor": model,
        "usable_cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_json(path: Path, reports: Sequence[Report]) -> None:
    path.write_text(json.dumps({"machine": machine(), "benchmarks": [r.as_json() for r in reports]}, indent=1))
