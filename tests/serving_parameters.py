"""A model that needs no framework, and things that happen at a step of a worker; importable by Ray's processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inferway.train.job import Arrays, OptimizerSpec, Replica, TrainingJob, Vector
from inferway.train.plan import Plan

FEATURES = 40


class Linear:
    """Least squares, ``y = x w``, with a running mean of the rows' first column as its state."""

    def __init__(self) -> None:
        self.values = np.linspace(-1, 1, FEATURES, dtype=np.float32)
        self.running = np.zeros(1, np.float32)

    size = FEATURES
    layout = (("w", (FEATURES,)),)

    def read(self, out: Vector) -> None:
        out[:] = self.values

    def load(self, parameters: Vector, start: int = 0) -> None:
        self.values[start : start + len(parameters)] = parameters

    def gradient(self, inputs: Arrays, targets: NDArray[Any], out: Vector, *, seed: int) -> float:
        x = inputs["x"]
        # What is random in a model: here a little noise, the same whenever the step is taken again.
        noise = np.random.default_rng(seed).normal(scale=0.01, size=len(targets)).astype(np.float32)
        errors = x @ self.values - targets + noise
        out[:] = 2 * errors @ x / len(targets)
        self.running += np.float32(0.1) * (x[:, 0].mean() - self.running)
        return float(np.mean(errors**2))

    def state(self) -> dict[str, NDArray[Any]]:
        return {"running": self.running.copy()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.running[:] = state["running"]

    def evaluate(self, inputs: Arrays, targets: NDArray[Any], *, batch_size: int) -> dict[str, float]:
        return {"loss": float(np.mean((inputs["x"] @ self.values - targets) ** 2))}


def linear_job(**given: Any) -> TrainingJob:
    """230 rows in steps of 32, so that the last one of an epoch is uneven."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(330, FEATURES)).astype(np.float32)
    y = (x @ rng.normal(size=FEATURES) + rng.normal(scale=0.1, size=330)).astype(np.float32)
    settings: dict[str, Any] = {
        "replica": Linear,
        "optimizer": OptimizerSpec("adam", 0.05),
        "inputs": {"x": x[:230]},
        "targets": y[:230],
        "validation": ({"x": x[230:]}, y[230:]),
        "epochs": 3,
        "seed": 3,
    }
    return TrainingJob(**(settings | given))


Event = Callable[[], None]


@dataclass
class Scripted:
    """A replica to which something happens before a step of a worker, told by the step's seed.

    Attributes:
        events: what, by worker and step of the first epoch, both from 0.
        before: called with worker and step ahead of every gradient.
    """

    factory: Callable[[], Replica]
    plan: Plan
    events: Mapping[tuple[int, int], Event] = field(default_factory=dict)
    before: Callable[[int, int], None] | None = None

    def __call__(self) -> Any:
        return _ScriptedReplica(self.factory(), self)


class _ScriptedReplica:
    def __init__(self, replica: Replica, script: Scripted) -> None:
        self._replica, self._script = replica, script
        plan = script.plan
        self._at = {
            plan.noise(epoch, step, worker): (worker, epoch * plan.steps + step)
            for epoch in range(10)
            for step in range(plan.steps)
            for worker in range(plan.workers)
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._replica, name)

    def gradient(self, inputs: Arrays, targets: NDArray[Any], out: Vector, *, seed: int) -> float:
        worker, step = self._at[seed]
        if self._script.before:
            self._script.before(worker, step)
        if event := self._script.events.get((worker, step)):
            event()
        return self._replica.gradient(inputs, targets, out, seed=seed)


@dataclass(frozen=True)
class Kill:
    """SIGKILL to a process that a file names, or to the own one; the first time only."""

    mark: Path
    process: Path | None = None
    always: bool = False

    def __call__(self) -> None:
        if self.always or _first(self.mark):
            os.kill(int(self.process.read_text()) if self.process else os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fail:
    """An error of the user's own code."""

    text: str

    def __call__(self) -> None:
        raise KeyError(self.text)


class TwoPartError(Exception):
    """Cannot be unpickled: it is made of two things and keeps one."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


@dataclass(frozen=True)
class Held:
    """Keeps a worker at a step until another one has come to one of its own, then writes down how far that has come.

    Every worker that comes to a step leaves a file of that name in the folder.
    """

    folder: Path
    worker: int
    step: int
    until: tuple[int, int]

    def __call__(self, worker: int, step: int) -> None:
        (self.folder / f"{worker}-{step}").touch()
        if (worker, step) == (self.worker, self.step):
            limit = time.monotonic() + 60
            while not (self.folder / "{}-{}".format(*self.until)).exists():
                if time.monotonic() > limit:
                    raise TimeoutError(f"nobody came to {self.until}")
                time.sleep(0.005)
            came = sorted(int(p.name.partition("-")[2]) for p in self.folder.glob(f"{self.until[0]}-*"))
            (self.folder / "came").write_text(str(came[-1]))


def _first(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
