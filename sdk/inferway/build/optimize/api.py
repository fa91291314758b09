"""``inferway.optimize``."""

from __future__ import annotations

import gzip
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from ..._errors import BuildError, CalibrationError, ConfigurationError, MissingExtraError
from ..export import family_of
from ..model import GOLDEN_ATOL, GOLDEN_ROWS, GOLDEN_RTOL, GOLDEN_VALUES, OnnxModel
from ..package import model_of
from ..runtime import is_large
from ..verify import first_line
from . import prune
from .data import Array, Rows, Split, read_rows, require_batch_axis, require_data, split
from .measure import Runner, Timing, open_runner, race
from .metrics import Metric, MetricArgument, Outputs, make_metric
from .report import Candidate, OptimizationReport, OutputDifference, mark_pareto
from .techniques import Plan, Workbench, families, plan

_EXAMPLE_ROWS: Final = 4
_DEPENDENT: Final = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
"""Operators that take one scale from all rows of a run."""
_EPSILON: Final = 1e-9
_ROUNDING: Final = 0.01
"""Share of an output's largest value that another processor's rounding may move it by."""
_LEAST_SAVING: Final = 0.01
"""Share of the size that nobody would change a model for."""


def optimize(
    model: Any,
    data: Any = None,
    *,
    metric: MetricArgument = None,
    max_drop: float = 0.01,
    techniques: str | Sequence[str] = "auto",
    objective: Literal["latency", "size"] = "latency",
    calibration: Any = None,
    greater_is_better: bool | None = None,
    output: str | None = None,
    fine_tune: Callable[[Any], object] | None = None,
    export: Callable[[Any], OnnxModel] | None = None,
    example: Any = None,
    sparsity: float = 0.5,
    independent_rows: bool = True,
    threads: int = 1,
    batch_sizes: Sequence[int] = (1, 8, 64),
    rounds: int = 7,
    seed: int = 0,
    on_progress: Callable[[str], object] | None = None,
) -> OptimizationReport:
    """Make candidates of a model, measure each against the original in one run, and choose the best that loses little.

    Args:
        model: an ONNX model (path, bytes, ``onnx.ModelProto``, `OnnxModel`), or anything that `to_onnx` takes; pruning
            needs a Keras or PyTorch model.
        data: ``(x, y)``, or ``x`` where there are no labels; ``x`` as the ONNX model takes it: an array ``(rows, …)``,
            a data frame, or input name to array. A part is drawn for calibration, the metric is measured on the rest.
        metric: ``accuracy``, ``f1``, ``auc``, ``mse``, ``rmse``, ``mae``, ``r2``; ``cosine`` and ``agreement``, which
            compare with the original and need no labels; or a callable of outputs (an array; name to array where there
            are several) and ``y``. None: accuracy or MSE by the labels, without them cosine or agreement.
        max_drop: what may be lost: of metrics of which more is better, the difference; of errors, the increase as a
            share of the original's.
        techniques: ``auto``, or some of ``graph``, ``static_int8`` (or ``static_int8/minmax``, ``/entropy``,
            ``/percentile``, ``/equalised``), ``dynamic_int8``, ``int8_weights``, ``int4_weights``, ``fp16``, ``bf16``,
            ``magnitude``, ``structured``.
        objective: the least ``latency`` at the largest of ``batch_sizes``, or the least ``size``.
        calibration: rows to calibrate with, as ``x``; then all of ``data`` is measured on.
        greater_is_better: of a callable; None for yes.
        output: the output that the metric looks at; None for the one that suits.
        fine_tune: trains a pruned Keras or PyTorch model, in place; without it there is no structured pruning.
        export: makes ONNX of such a model; None for ``to_onnx`` with ``example``.
        example: inputs as the Keras or PyTorch model takes them; None for the first rows of ``x``.
        sparsity: the share of weights or units that pruning takes.
        independent_rows: take a candidate whose rows depend on each other (dynamic int8) only where no other will do: a
            gateway cannot join requests for it. False: take the fastest.
        threads: of a run; a gateway uses 1.
        batch_sizes: rows of the runs that are timed.
        rounds: how often each is timed, 3 at least.
        seed: of the rows that are drawn.
        on_progress: is told what is being done.
    Returns:
        What was tried and measured. ``report.model`` is the chosen model, the original where nothing was better.
    Raises:
        CalibrationError: there is no data, it does not fit the signature, has NaN or other lengths, or the metric fails
            on the original.
        ConfigurationError: an argument cannot be used, such as a technique that does not exist.
        BuildError: the model cannot be exported or run, has no batch axis, or is longer than 2 GiB.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    _require_extra()
    _check(objective, max_drop, sparsity, threads, batch_sizes, rounds)
    families(techniques)
    require_data(data)
    told = on_progress or (lambda _: None)
    source = model if prune.framework_of(model) is not None else None
    if example is None and not _is_onnx(model):
        example = _head_of(data)
    original = model_of(model, example) if export is None else export(model)
    if is_large(original.proto):
        raise BuildError("the model is longer than 2 GiB, and models of that size are not optimised here")
    require_batch_axis(original.signature)
    operators = frozenset(node.op_type for node in original.proto.graph.node)
    rows = read_rows(original.signature, data, operators=operators)
    apart = None
    if calibration is not None:
        apart = read_rows(original.signature, calibration, operators=operators, name="calibration")
    parts = split(rows, apart, seed)
    bench = Workbench(original, parts.calibration, source, example, export or _exporter(example), fine_tune, sparsity)
    plans, skips = plan(bench, techniques)
    trial = _Trial(original, parts.held_out, threads, max(batch_sizes))
    judge = make_metric(
        metric, trial.reference, parts.held_out.labels, classes=original.classes, output=output,
        greater_is_better=greater_is_better,
    )  # fmt: skip
    judged = trial.judge(judge)
    for number, step in enumerate(plans, 1):
        told(f"making {number} of {len(plans)}: {step.name}")
        judged.add(step)
    raced = race(
        judged.runners, judged.original.name, Runner(original.proto, threads, judged.twin_options),
        {size: parts.held_out.batch(size) for size in sorted(set(batch_sizes))}, rounds, told,
    )  # fmt: skip
    batch = max(batch_sizes)
    timed = [
        replace(c, timings=raced.timings[c.name]) if c.status == "measured" else c
        for c in (judged.original, *judged.made)
    ]
    front = mark_pareto(timed, batch)
    found = [replace(c, pareto=c.name in front) for c in timed]
    found += [Candidate(skip.name, skip.technique, "skipped", skip.reason) for skip in skips]
    if any(c.technique == "magnitude" and c.status == "measured" for c in found):
        found = [replace(c, gzip_bytes=_compressed(c)) if c.status == "measured" else c for c in found]
    chosen, reason = _choose(found, judge, max_drop, objective, batch, independent_rows)
    return OptimizationReport(
        candidates=tuple(found), chosen=chosen, reason=reason, metric_name=judge.name, metric_about=judge.about,
        greater_is_better=judge.greater_is_better, max_drop=max_drop, objective=objective, objective_batch=batch,
        threads=threads, split=parts.about, rounds=raced.rounds, machine=_machine(),
        notes=_notes(judge, parts, max_drop), golden=_golden(chosen, judged.runners[chosen.name], parts.held_out),
    )  # fmt: skip


@dataclass
class _Trial:
    """The original at work on the held-out rows."""

    model: OnnxModel
    rows: Rows
    threads: int
    batch: int

    def __post_init__(self) -> None:
        try:
            self.runner = open_runner(self.model.proto, self.threads, self.rows.batch(self.batch))
            self.reference: Outputs = self.runner.outputs(self.rows)
        except Exception as error:
            raise BuildError(f"the model cannot be run on the data: {first_line(error)}") from error
        for name, array in self.reference.items():
            if len(array) != self.rows.count:
                raise BuildError(f"the output '{name}' has {len(array)} rows for {self.rows.count} rows of input")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise CalibrationError(f"the model gives NaN or infinite numbers in '{name}' on the held-out rows")

    def judge(self, metric: Metric) -> _Judged:
        value = metric.measure(self.reference)
        original = Candidate(
            "original", "original", "measured", model=self.model, size_bytes=self.model.size, metric=value, drop=0.0,
            independent_rows=_rows_are_independent(self.model), notes=_session_notes(self.runner),
        )  # fmt: skip
        return _Judged(self, metric, original, {original.name: self.runner})


class _Judged:
    """Candidates as they are made and judged."""

    def __init__(self, trial: _Trial, metric: Metric, original: Candidate, runners: dict[str, Runner]) -> None:
        self.trial = trial
        self.metric = metric
        self.original = original
        self.runners = runners
        self.made: list[Candidate] = []

    @property
    def twin_options(self) -> tuple[str, ...]:
        return self.runners[self.original.name].disabled

    def add(self, step: Plan) -> None:
        """Make a candidate and judge it; what fails is told in its row."""
        trial = self.trial
        try:
            model = step.make()
            runner = open_runner(model.proto, trial.threads, trial.rows.batch(trial.batch))
            outputs = runner.outputs(trial.rows)
            differences = _differences(trial.reference, outputs)
            value = self.metric.measure(outputs)
        except Exception as error:
            self.made.append(Candidate(step.name, step.technique, "failed", _reason(error)))
            return
        self.runners[step.name] = runner
        self.made.append(
            Candidate(
                step.name,
                step.technique,
                "measured",
                model=model,
                size_bytes=model.size,
                metric=value,
                drop=self.metric.drop(self.original.metric, value),
                differences=differences,
                independent_rows=_rows_are_independent(model),
                notes=(*step.notes, *_session_notes(runner)),
            )
        )


def _differences(original: Outputs, outputs: Outputs) -> tuple[OutputDifference, ...]:
    found = []
    for name, reference in original.items():
        if name not in outputs:
            raise ValueError(f"it has no output '{name}'")
        array = outputs[name]
        if array.shape != reference.shape:
            raise ValueError(f"its output '{name}' has the shape {array.shape} and the original's {reference.shape}")
        if reference.dtype.kind == "f":
            if not np.isfinite(array).all():
                raise ValueError(f"it gives NaN or infinite numbers in '{name}'")
            gap = np.abs(array.astype(np.float64) - reference)
            usual = float(np.mean(np.abs(reference), dtype=np.float64))
            mean = float(gap.mean())
            found.append(OutputDifference(name, float(gap.max(initial=0)), mean, mean / usual if usual else 0.0))
        else:
            other = (array != reference).reshape(len(array), -1).any(axis=1)
            found.append(OutputDifference(name, differing=float(other.mean())))
    return tuple(found)


def _choose(
    candidates: Sequence[Candidate],
    metric: Metric,
    max_drop: float,
    objective: str,
    batch: int,
    independent: bool,
) -> tuple[Candidate, str]:
    original = candidates[0]
    tried = [c for c in candidates[1:] if c.status == "measured"]
    if not tried:
        why = "; ".join(dict.fromkeys(f"{c.name}: {c.reason}" for c in candidates[1:] if c.reason))
        return original, f"no candidate could be measured ({why})" if why else "there was no candidate"
    better = [c for c in tried if _is_better(c, original, objective, batch)]
    if not better:
        return original, _nothing_better(tried, original, objective, batch)
    within = [c for c in better if c.drop <= max_drop + _EPSILON]
    if not within:
        least = min(better, key=lambda c: c.drop)
        return original, (
            f"whatever is {'faster' if objective == 'latency' else 'smaller'} loses more than is allowed: "
            f"{least.name} comes closest and {_lost(metric, least, original)}, {max_drop:g} is allowed"
        )
    pool = [c for c in within if c.independent_rows] if independent else within
    chosen = _best(pool or within, objective, batch)
    reason = _gain(chosen, original, objective, batch) + f", and {_lost(metric, chosen, original)}"
    slower = [size for size, timing in chosen.timings.items() if timing.slower]
    if slower:
        told = ", ".join(f"{chosen.timings[size].speedup:.2f} times as fast at batch {size}" for size in slower)
        reason += f"; it is slower elsewhere ({told})"
    passed = _best(within, objective, batch)
    if passed is not chosen and not passed.independent_rows:
        gain = _gain(passed, original, objective, batch)
        reason += f"; {passed.name} was passed over ({gain}), as its rows depend on each other"
    return chosen, reason


def _is_better(candidate: Candidate, original: Candidate, objective: str, batch: int) -> bool:
    if objective == "size":
        return candidate.size_bytes < original.size_bytes * (1 - _LEAST_SAVING)
    return candidate.timings[batch].faster


def _best(candidates: Sequence[Candidate], objective: str, batch: int) -> Candidate:
    """The best by the objective; among equals the one that loses least, then the other of size and latency."""
    if objective == "size":
        least = min(c.size_bytes for c in candidates)
        near = [c for c in candidates if c.size_bytes <= least * (1 + _LEAST_SAVING)]
    else:
        first = min(candidates, key=lambda c: c.timings[batch].seconds).timings[batch]
        near = [
            c for c in candidates if c.timings[batch].seconds <= first.seconds * (1 + _doubt(first, c.timings[batch]))
        ]
    return min(near, key=lambda c: (c.drop, c.size_bytes, c.timings[batch].seconds, c.name))


def _doubt(one: Timing, other: Timing) -> float:
    return max(one.spread, other.spread)


def _gain(candidate: Candidate, original: Candidate, objective: str, batch: int) -> str:
    timing = candidate.timings[batch]
    speed = f"{timing.speedup:.2f} times as fast at batch {batch}"
    size = f"{candidate.size_bytes / original.size_bytes:.0%} of the size"
    return f"{size}, {speed}" if objective == "size" else f"{speed} with {size}"


def _lost(metric: Metric, candidate: Candidate, original: Candidate) -> str:
    change = f"{metric.name} {original.metric:.4g} → {candidate.metric:.4g}"
    if abs(candidate.drop) < 5e-5 or f"{original.metric:.4g}" == f"{candidate.metric:.4g}":
        return f"loses nothing ({change})"
    if candidate.drop < 0:
        return f"gains ({change})"
    return f"loses {candidate.drop:.4f} ({change})"


def _nothing_better(tried: Sequence[Candidate], original: Candidate, objective: str, batch: int) -> str:
    if objective == "size":
        return "no candidate was smaller by more than 1 %"
    best = max(tried, key=lambda c: c.timings[batch].speedup)
    timing = best.timings[batch]
    return (
        f"no candidate was faster at batch {batch} by more than the spread: {best.name} came closest with "
        f"{timing.speedup:.2f} times, where {timing.spread:.0%} either way is noise"
    )


def _rows_are_independent(model: OnnxModel) -> bool:
    return not any(node.op_type in _DEPENDENT for node in model.proto.graph.node)


def _session_notes(runner: Runner) -> tuple[str, ...]:
    if not runner.disabled:
        return ()
    return (f"timed without {', '.join(runner.disabled)}, which the gateway tries out when it loads a model",)


def _notes(metric: Metric, parts: Split, max_drop: float) -> tuple[str, ...]:
    step = 1 / parts.held_out.count
    if metric.name in ("accuracy", "agreement") and step > max_drop > 0:
        return (
            f"One of {parts.held_out.count} held-out rows is {step:.1%} of the {metric.name}, more than may be lost: "
            "more data would tell more.",
        )
    return ()


def _golden(
    chosen: Candidate, runner: Runner, rows: Rows
) -> tuple[tuple[Mapping[str, Array], Mapping[str, Array], dict[str, float]], ...]:
    """A few held-out rows with the chosen model's floats, and what they may be off by.

    Rounding to integers falls to the other side where another processor's kernel adds in another order, so there is
    room for twice what lies between the fastest kernels here and the plain ones, and for a hundredth of the largest
    value.
    """
    floats = [difference for difference in chosen.differences if difference.max_abs is not None]
    if not floats:
        return ()
    values = sum(array.size for array in rows.inputs.values()) // rows.count + 1
    count = min(GOLDEN_ROWS, rows.count, GOLDEN_VALUES // values)
    if count < 1:
        return ()
    assert chosen.model is not None
    proto = chosen.model.proto
    inputs = rows.batch(count)
    outputs = dict(zip(runner.names, runner.run(inputs), strict=True))
    plain = dict(zip(runner.names, Runner(proto, runner.threads, plain=True).run(inputs), strict=True))
    gap = 2 * max(float(np.abs(outputs[d.name] - plain[d.name]).max()) for d in floats)
    room = max(gap, _ROUNDING * max(float(np.abs(outputs[d.name]).max()) for d in floats))
    return ((inputs, {d.name: outputs[d.name] for d in floats}, {"rtol": GOLDEN_RTOL, "atol": max(GOLDEN_ATOL, room)}),)


def _compressed(candidate: Candidate) -> int:
    assert candidate.model is not None
    return len(gzip.compress(candidate.model.to_bytes(), 6, mtime=0))


def _exporter(example: Any) -> Callable[[Any], OnnxModel]:
    return lambda model: model_of(model, example)


def _is_onnx(model: Any) -> bool:
    """Whether it is ONNX already, so that no example is needed.

    Raises:
        UnknownFrameworkError: it is a model of no framework that is known.
    """
    offers = not isinstance(model, type) and hasattr(model, "__inferway_source__")
    return isinstance(model, OnnxModel) or offers or family_of(model) == "onnx"


def _head_of(data: Any) -> Any:
    """The first rows of what will be measured, as an example for the exporter."""
    given = data[0] if isinstance(data, tuple) and data else data
    if isinstance(given, Mapping):
        return {name: part[:_EXAMPLE_ROWS] for name, part in given.items()}
    return given[:_EXAMPLE_ROWS]


def _require_extra() -> None:
    for package in ("onnx", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "optimize", "optimising a model") from error


def _check(
    objective: str, max_drop: float, sparsity: float, threads: int, batch_sizes: Sequence[int], rounds: int
) -> None:
    if objective not in ("latency", "size"):
        raise ConfigurationError(f"objective is 'latency' or 'size', got {objective!r}")
    if not max_drop >= 0:
        raise ConfigurationError(f"max_drop is at least 0, got {max_drop}")
    if not 0 < sparsity < 1:
        raise ConfigurationError(f"sparsity is between 0 and 1, got {sparsity}")
    if threads < 1:
        raise ConfigurationError(f"threads is at least 1, got {threads}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigurationError(f"batch_sizes are whole numbers from 1, got {list(batch_sizes)}")
    if rounds < 3:
        raise ConfigurationError(f"rounds is at least 3, for less tells nothing of noise; got {rounds}")


def _reason(error: BaseException) -> str:
    if isinstance(error, BuildError | ConfigurationError | MissingExtraError | ValueError):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"


def _machine() -> str:
    import onnxruntime

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cpus} processors, ONNX Runtime {onnxruntime.__version__}"
