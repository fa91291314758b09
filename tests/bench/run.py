"""All benchmarks, or some of them.

    python tests/bench/run.py                                  # everything, about half an hour
    python tests/bench/run.py http sdk --rounds 3 --seconds 2  # two of them, quicker
    python tests/bench/run.py batching --only minilm --json out.json

Ends with 0 when everything asked for could be measured, whatever came out: no time is asserted here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import bench_batching
import bench_embeddings
import bench_fronts
import bench_http
import bench_lifecycle
import bench_sdk
import bench_tensors
from harness.options import add_arguments, parsed, print_machine
from harness.processes import BenchError
from harness.report import Report, write_json

BENCHMARKS = {
    "http": bench_http.run,
    "tensors": bench_tensors.run,
    "sdk": bench_sdk.run,
    "batching": bench_batching.run,
    "fronts": bench_fronts.run,
    "lifecycle": bench_lifecycle.run,
    "embeddings": bench_embeddings.run,
}
SCRIPTS = {
    "isolation": "bench_isolation.py",
    "generation": "bench_generation.py",
    "optimize": "bench_optimize.py",
    "training": "bench_training.py",
}
"""Those that measure inside their own process, so that each has a fresh one; they print their own figures."""
NAMES = (*BENCHMARKS, *SCRIPTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all when none is named")
    add_arguments(parser)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    print_machine()
    reports: list[Report] = []
    failed = []
    for name in arguments.names or NAMES:
        print(f"\n=== {name} ===", flush=True)
        if name in SCRIPTS:
            script = Path(__file__).with_name(SCRIPTS[name])
            if subprocess.run([sys.executable, script, "--rounds", str(arguments.rounds)], check=False).returncode:
                failed.append(name)
            continue
        try:
            report = BENCHMARKS[name](parsed(arguments))
        except BenchError as error:
            print(f"{name} not measured: {error}", file=sys.stderr)
            failed.append(name)
            continue
        report.finish()
        reports.append(report)
    if arguments.json:
        write_json(arguments.json, reports)
    if failed:
        print(f"\nNOT measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
