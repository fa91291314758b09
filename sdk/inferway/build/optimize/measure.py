"""How long candidates take, side by side in one run, and how sure that is.

Machines have slow moments, other work runs beside, and a later measurement meets a warmer processor. So candidates take
turns: in every round each one is timed once for each batch size, every other round backwards, and what is compared are
times of the same round. A time is the quickest run of a short window, for what interrupts a run only ever adds to it.
The original is in the race twice; how far the two are apart is what this machine cannot tell from a difference. A
candidate is faster only where it wins by more than that, and by more than its own rounds leave open.

Source: McGill, Tukey and Larsen, "Variations of box plots" (1978): the median of ``n`` values is known to within
``1.57 * (q3 - q1) / sqrt(n)``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..runtime import is_large, ort
from .data import Array, Rows

WINDOW_S: Final = 0.01
"""A timed window: as many runs as fit, at least two."""
_LEAST_RUNS: Final = 2
_RESTLESS: Final = 0.1
"""Noise from which on more rounds are worth their time."""
_MORE: Final = 3
"""How many times the rounds that were asked for are run where the machine has no rest."""
_HELD_OUT_BATCH: Final = 64
_LEAST_GAIN: Final = 0.02
"""What nobody would change a model for."""
NORMALISATION: Final = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"})


@dataclass(frozen=True, slots=True)
class Timing:
    """One batch size of one candidate.

    Attributes:
        seconds: of a run, median of the rounds.
        low, high: the quartiles of the rounds.
        speedup: the original's time over this one's, median of the ratios within each round.
        spread: what ``speedup - 1`` has to exceed to be more than noise: how far the median of the ratios is open, or
            that of the original against itself, whichever is larger.
    """

    seconds: float
    low: float
    high: float
    speedup: float
    spread: float

    @property
    def faster(self) -> bool:
        """Whether it beats the original by more than the spread."""
        return self.speedup > 1 + self.spread

    @property
    def slower(self) -> bool:
        """Whether the original beats it by more than the spread."""
        return self.speedup < 1 / (1 + self.spread)


class Runner:
    """A model in ONNX Runtime, set up as the gateway sets it up: one session, no spinning.

    Attributes:
        threads: of a run.
        disabled: optimisations of ONNX Runtime that are left out.
        names: of the outputs.
    """

    def __init__(self, proto: Any, threads: int, disabled: Sequence[str] = (), *, plain: bool = False) -> None:
        runtime = ort()
        options = runtime.SessionOptions()
        if plain:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what fails is raised too
        self.threads = threads
        self.disabled = tuple(disabled)
        self._session = runtime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
        )
        self.names: list[str] = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        found: list[Array] = self._session.run(self.names, dict(inputs))
        return found

    def outputs(self, rows: Rows) -> dict[str, Array]:
        """Outputs by name for all rows, run in batches of 64."""
        parts = [self.run(batch) for batch in rows.batches(_HELD_OUT_BATCH)]
        return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(self.names)}

    def time(self, inputs: Mapping[str, Array], window_s: float = WINDOW_S) -> float:
        """Seconds of the quickest run of as many as fit into the window."""
        best, count, started = math.inf, 0, time.perf_counter()
        before = started
        while True:
            self.run(inputs)
            now = time.perf_counter()
            best = min(best, now - before)
            count += 1
            if now - started >= window_s and count >= _LEAST_RUNS:
                return best
            before = now


def open_runner(proto: Any, threads: int, sample: Mapping[str, Array]) -> Runner:
    """A runner with the options that the gateway would choose for this model when it loads it.

    ONNX Runtime's fused kernel for a normalisation after a sum is slower than the two operators apart on some
    processors; the gateway tries both, so both are tried here.
    """
    if is_large(proto):
        raise ValueError("it is longer than 2 GiB, which is not measured")
    first = Runner(proto, threads)
    operators = {node.op_type for node in proto.graph.node}
    if not (operators & NORMALISATION or {"ReduceMean", "Sqrt"} <= operators):
        return first
    second = Runner(proto, threads, ("SkipLayerNormFusion",))
    for runner in (first, second):
        runner.run(sample)
    rounds = [(first.time(sample, 0.005), second.time(sample, 0.005)) for _ in range(3)]
    return second if statistics.median(b / a for a, b in rounds) < 1 else first


@dataclass(frozen=True)
class Race:
    """Name to batch size to timing, and how many rounds it took."""

    timings: Mapping[str, Mapping[int, Timing]]
    rounds: int


def race(
    runners: Mapping[str, Runner],
    original: str,
    twin: Runner,
    batches: Mapping[int, Mapping[str, Array]],
    rounds: int,
    told: Callable[[str], object] = lambda _: None,
) -> Race:
    """Time every runner against the original.

    Args:
        runners: by name, ``original`` among them.
        twin: the original once more, in a session of its own.
        batches: number of rows to inputs.
        rounds: at least 3; up to three times as many where the original is far from itself.
        told: is told how far it is.
    """
    everyone = {**runners, "": twin}
    seen: dict[str, dict[int, list[float]]] = {name: {size: [] for size in batches} for name in everyone}
    for runner in everyone.values():
        for inputs in batches.values():
            runner.run(inputs)
    noise: dict[int, float] = {}
    done = 0
    while done < rounds or (done < _MORE * rounds and max(noise.values()) > _RESTLESS):
        done += 1
        told(f"measuring, round {done}" + (f" of {rounds}" if done <= rounds else ": the machine is restless"))
        order = list(everyone) if done % 2 else list(reversed(list(everyone)))
        for name in order:
            for size, inputs in batches.items():
                seen[name][size].append(everyone[name].time(inputs))
        if done >= rounds:
            noise = {size: _noise(seen[original][size], seen[""][size]) for size in batches}
    timings = {
        name: {size: _timing(seen[name][size], seen[original][size], noise[size]) for size in batches}
        for name in runners
    }
    return Race(timings, done)


def _timing(own: Sequence[float], original: Sequence[float], noise: float) -> Timing:
    low, median, high = statistics.quantiles(own, n=4)
    ratios = [theirs / mine for mine, theirs in zip(own, original, strict=True)]
    speedup = statistics.median(ratios)
    return Timing(median, low, high, speedup, max(noise, _open(ratios) / speedup, _LEAST_GAIN))


def _noise(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two equals may come out apart."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return max(abs(statistics.median(ratios) - 1), _open(ratios))


def _open(values: Sequence[float]) -> float:
    """How far the median of these is from certain, either way."""
    quarter, _, three = statistics.quantiles(values, n=4)
    return 1.57 * (three - quarter) / math.sqrt(len(values))
