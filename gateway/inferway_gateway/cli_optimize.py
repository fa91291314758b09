"""``inferway optimize``: make an ONNX model smaller or faster, on this machine, without a gateway.

The table goes to stdout, or JSON with ``--json``; how far it is, and what went wrong, goes to stderr. The exit status
says whether there is a new file: 0 when a better model was written, 3 when none was better and nothing was written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

COMMANDS: Final = frozenset({"optimize"})
"""Commands that need no gateway on this machine."""

NO_CHANGE: Final = 3
"""Exit status where the model stays as it is."""


def add_parser(commands: Any) -> None:
    """Add ``optimize`` to the sub-commands of a parser (what ``ArgumentParser.add_subparsers`` gave)."""
    optimize = commands.add_parser(
        "optimize",
        help="make an ONNX model smaller or faster: quantise, measure, choose",
        description="Try what makes an ONNX model smaller or faster, measure each candidate against the original in "
        "one run on this machine, and write the best that loses no more of a metric than is allowed. Needs "
        "pip install 'inferway[optimize]'.",
        epilog="Exit status: 0 a better model was written; 3 none was better, nothing was written; 1 it failed; 2 "
        "wrong arguments.",
    )
    optimize.add_argument("model", type=Path, metavar="MODEL.onnx", help="the model")
    optimize.add_argument(
        "--data", type=Path, required=True, metavar="FILE",
        help=".npz with an array for each input and 'y' for labels, or .npy for a single input without labels; a part "
        "of the rows calibrates, the rest is measured on",
    )  # fmt: skip
    optimize.add_argument("--labels", metavar="NAME", help="array of the labels in FILE (default y)")
    optimize.add_argument("--calibration", type=Path, metavar="FILE", help="rows to calibrate with, instead of a part")
    optimize.add_argument(
        "--output", "-o", type=Path, metavar="FILE", help="where to write (default MODEL-optimized.onnx beside it)"
    )
    optimize.add_argument(
        "--metric",
        help="accuracy, f1, auc, mse, rmse, mae or r2 with labels; cosine or agreement with the original without "
        "(default: by the labels)",
    )
    optimize.add_argument(
        "--max-drop", type=float, default=0.01, metavar="D",
        help="what of the metric may be lost; of errors: by what share they may grow (default 0.01)",
    )  # fmt: skip
    optimize.add_argument(
        "--techniques", default="auto", metavar="A,B",
        help="auto, or some of graph, static_int8, dynamic_int8, int8_weights, int4_weights, fp16, bf16, magnitude "
        "(default auto)",
    )  # fmt: skip
    optimize.add_argument(
        "--objective", choices=("latency", "size"), default="latency", help="what to gain (default latency)"
    )
    optimize.add_argument(
        "--batch-sizes", type=_sizes, default=(1, 8, 64), metavar="N,N",
        help="rows of the runs that are timed; the largest decides (default 1,8,64)",
    )  # fmt: skip
    optimize.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="of a run (default 1, as a gateway)"
    )
    optimize.add_argument("--rounds", type=_positive, default=7, metavar="N", help="times each is timed (default 7)")
    optimize.add_argument("--seed", type=int, default=0, metavar="N", help="of the rows that are drawn (default 0)")
    optimize.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw metric against latency, as .png, .svg or .pdf"
    )
    optimize.add_argument("--json", action="store_true", help="print everything measured as JSON")
    optimize.add_argument("--quiet", action="store_true", help="do not tell how far it is")
    optimize.set_defaults(run=_optimize)


def _optimize(args: argparse.Namespace) -> int:
    from inferway import InferwayError
    from inferway.build.optimize.data import read_file

    target: Path = args.output or args.model.with_name(f"{args.model.stem}-optimized.onnx")
    if not args.model.is_file():
        return _fail(f"expected {args.model} to be an ONNX file, and there is none", 2)
    if target.exists() and target.samefile(args.model):
        return _fail("--output is the model itself; give another path", 2)
    if not target.parent.is_dir():
        return _fail(f"expected {target.parent} to be a folder to write into, and there is none", 2)
    progress = _Progress(args.quiet or args.json or not sys.stderr.isatty())
    try:
        from inferway import ConfigurationError, MissingExtraError, optimize, to_onnx

        try:
            model = to_onnx(args.model)
            names = [spec.name for spec in model.inputs]
            inputs, labels = read_file(args.data, names, args.labels)
            calibration = None if args.calibration is None else read_file(args.calibration, names, args.labels)[0]
            report = optimize(
                model, (inputs, labels), metric=args.metric, max_drop=args.max_drop,
                techniques=_techniques(args.techniques), objective=args.objective, calibration=calibration,
                threads=args.threads, batch_sizes=args.batch_sizes, rounds=args.rounds, seed=args.seed,
                on_progress=progress,
            )  # fmt: skip
        finally:
            progress.end()
        if args.plot is not None:
            report.plot(str(args.plot))
        if report.changed:
            report.model.save(target)
    except (ConfigurationError, MissingExtraError) as error:
        return _fail(str(error), 2)
    except (InferwayError, OSError) as error:
        return _fail(str(error), 1)
    if args.json:
        written = str(target) if report.changed else None
        print(json.dumps({**report.as_dict(), "written": written}, indent=2, ensure_ascii=False))
    else:
        print(report)
        print(f"\nWritten: {target}" if report.changed else "\nNothing was written.")
    return 0 if report.changed else NO_CHANGE


class _Progress:
    """One line that is written over, on a terminal."""

    def __init__(self, silent: bool) -> None:
        self._silent = silent
        self._wide = 0

    def __call__(self, words: str) -> None:
        if not self._silent:
            print(f"\r{words:{self._wide}}", end="", file=sys.stderr, flush=True)
            self._wide = max(self._wide, len(words))

    def end(self) -> None:
        if self._wide:
            print(f"\r{' ' * self._wide}\r", end="", file=sys.stderr, flush=True)


def _techniques(text: str) -> str | list[str]:
    named = [name.strip() for name in text.split(",") if name.strip()]
    return "auto" if named == ["auto"] else named


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(part.strip()) for part in text.split(","))


def _fail(words: str, status: int) -> int:
    print(f"inferway: {words}", file=sys.stderr)
    return status
