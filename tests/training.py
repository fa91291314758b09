"""Small trainings, and replicas to which something happens; in a module, so that other processes find them as well."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inferway.train.job import Arrays, OptimizerSpec, Replica, TrainingJob, Vector
from inferway.train.optimizers import make_optimizer
from inferway.train.plan import Plan
from inferway.train.replica import replica_factory

ADAM = OptimizerSpec("adam", 0.01)


def digits_job(*, rows: int = 203, epochs: int = 3, batch_size: int = 32, **given: Any) -> TrainingJob:
    """A small network on the first rows of scikit-learn's digits; the last batch of an epoch is uneven."""
    import torch
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    torch.manual_seed(5)
    x, y = load_digits(return_X_y=True)
    model = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10))
    factory = replica_factory(model, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    inputs = {"x": (x / 16).astype(np.float32)}
    held_out = ({"x": inputs["x"][-200:]}, y[-200:])
    job = TrainingJob(factory, ADAM, {"x": inputs["x"][:rows]}, y[:rows], held_out, epochs, batch_size, seed=3)
    return replace(job, **given)


def alone(job: TrainingJob) -> Vector:
    """What one process makes of a job: parameters, ``(size,)``."""
    replica = job.replica()
    parameters, gradient = np.empty((2, replica.size), np.float32)
    replica.read(parameters)
    optimizer = make_optimizer(job.optimizer, replica.size)
    plan = Plan(job.rows, job.batch_size, 1, job.seed, job.shuffle)
    for epoch in range(job.epochs):
        for step in range(plan.steps):
            rows = plan.part(epoch, step, 0).rows
            inputs = {name: array[rows] for name, array in job.inputs.items()}
            replica.gradient(inputs, job.targets[rows], gradient, seed=plan.noise(epoch, step, 0))
            optimizer.step(parameters, gradient)
            replica.load(parameters)
    return parameters


@dataclass
class Eventful:
    """A replica to which something happens at one of its steps; once, however often it is made anew.

    Attributes:
        event: what happens, of ``die`` (SIGKILL), ``nan`` (a loss that is none), ``nan_gradient``, ``fail``.
        step: at which of its gradients, from 1.
        mark: a file that is made when it happens; who makes it is the one.
    """

    factory: Callable[[], Replica]
    event: str
    step: int
    mark: Path
    _replica: Replica | None = field(default=None, repr=False)
    _count: int = 0

    def __call__(self) -> Eventful:
        return replace(self, _replica=self.factory(), _count=0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._replica, name)

    def gradient(self, inputs: Arrays, targets: NDArray[Any], out: Vector, *, seed: int) -> float:
        assert self._replica is not None
        self._count += 1
        loss = self._replica.gradient(inputs, targets, out, seed=seed)
        # What is no number stays so, as it would; the others happen once.
        happens = self._count >= self.step if self.event.startswith("nan") else self._count == self.step
        if not happens or not self._mine():
            return loss
        if self.event == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.event == "fail":
            raise ValueError("this row is of another kind")
        if self.event == "nan_gradient":
            out[0] = np.nan
            return loss
        return float("nan")

    def _mine(self) -> bool:
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return self.mark.read_text() == str(os.getpid())
        self.mark.write_text(str(os.getpid()))
        return True
