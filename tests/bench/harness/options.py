"""The command line that every benchmark shares."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.processes import BenchError
from harness.report import Report, machine, write_json


@dataclass(frozen=True, slots=True)
class Options:
    """
    Attributes:
        rounds: how often every contestant is measured; medians and the least and greatest are printed.
        seconds: length of one window.
        only: rivals or models to restrict a benchmark to, in lower case; empty is all.
    """

    rounds: int = 5
    seconds: int = 4
    only: tuple[str, ...] = ()


DEFAULTS = Options()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=DEFAULTS.rounds, help="windows for each contestant (%(default)s)")
    parser.add_argument("--seconds", type=int, default=DEFAULTS.seconds, help="length of a window (%(default)s)")
    parser.add_argument("--only", default="", help="comma-separated rivals or models; all when empty")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")


def parsed(arguments: argparse.Namespace) -> Options:
    only = tuple(part.strip().lower() for part in arguments.only.split(",") if part.strip())
    return Options(max(1, arguments.rounds), max(1, arguments.seconds), only)


def print_machine() -> None:
    facts = machine()
    print(
        f"{facts['processor']}, {facts['usable_cpus']} usable processors, Python {facts['python']}, "
        f"kernel {facts['kernel']}, {facts['date']}"
    )
    if facts["load_average"] > 0.5:
        print(
            f"WARNING: load average {facts['load_average']:.1f} before the start: something else is running, "
            "so these numbers are not to be relied on."
        )


def main(run: Callable[[Options], Report], description: str) -> None:
    """Run one benchmark as a program: 0 when it could be measured, whatever came out; 1 when it could not."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    print_machine()
    try:
        report = run(parsed(arguments))
    except BenchError as error:
        print(f"not measured: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    report.finish()
    if arguments.json:
        write_json(arguments.json, [report])
