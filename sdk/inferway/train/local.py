"""Training in this process: what is recorded, watched and kept, whichever framework takes the steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, InferwayError, TrainingDivergedError
from .checkpoints import Checkpoints
from .data import Rows, why_diverged
from .history import History
from .job import Arrays, CheckpointOptions, EarlyStopping, Progress

_KIND: Final = "local"
_PROBED_ROWS: Final = 64
_PARTS: Final = ("weights", "optimizer")


class State(Protocol):
    """What changes in a framework's model and optimiser while it trains, as arrays by name."""

    def weights(self) -> dict[str, NDArray[Any]]: ...
    def load_weights(self, arrays: Mapping[str, NDArray[Any]]) -> None: ...
    def optimizer(self) -> dict[str, NDArray[Any]]: ...
    def load_optimizer(self, arrays: Mapping[str, NDArray[Any]]) -> None: ...


@dataclass(frozen=True, slots=True)
class LocalJob:
    """A training in this process.

    Attributes:
        rows: to train on, preprocessed.
        validation: only evaluated.
        seed: None leaves the framework's own randomness as it is.
        display: is told each step.
        options: for the framework's own ``fit``, such as ``callbacks`` or ``class_weight`` of Keras.
    """

    rows: Rows
    validation: Rows | None = None
    epochs: int = 1
    batch_size: int = 32
    shuffle: bool = True
    seed: int | None = None
    checkpoints: CheckpointOptions | None = None
    early_stopping: EarlyStopping | None = None
    display: Callable[[Progress], object] = lambda _: None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-len(self.rows) // self.batch_size)


class Course:
    """The course of one training.

    Args:
        job: what was asked for.
        state: of the framework's model, built.
        outputs: what the model makes of some rows.
    Raises:
        ConfigurationError: early stopping watches a metric of validation and there is none, or the checkpoints cannot
            be used.
    """

    def __init__(self, job: LocalJob, state: State, outputs: Callable[[Arrays], Sequence[NDArray[Any]]]) -> None:
        self._job = job
        self._state = state
        self._outputs = outputs
        self.history: dict[str, list[float]] = {}
        self._epochs = 0
        self._resumed = 0
        self._steps = 0
        self._stopped: Literal["finished", "early"] = "finished"
        self._began = time.monotonic()
        self._before_s = 0.0
        self._stopper = None if job.early_stopping is None else _Stopper(job.early_stopping, job.validation is not None)
        self._places: Checkpoints | None = None
        if job.checkpoints is not None:
            if job.checkpoints.every_steps:
                raise ConfigurationError(
                    "local training keeps a checkpoint after each epoch; every_steps is for strategy='ddp' and "
                    "'parameter_server'"
                )
            self._places = Checkpoints(job.checkpoints.path, keep=job.checkpoints.keep)

    def resume(self) -> int:
        """Take the newest checkpoint over; gives the epoch to go on with, from 0.

        Raises:
            ConfigurationError: it is of another model, other rows, another batch size or seed, or of distributed
                training.
        """
        if self._places is None or self._job.checkpoints is None or not self._job.checkpoints.resume:
            return 0
        saved = self._places.load()
        if saved is None:
            return 0
        expected = self._facts()
        for key, value in expected.items():
            if saved.facts.get(key) != value:
                was, now = (_shown(key, item) for item in (saved.facts.get(key), value))
                raise ConfigurationError(
                    f"the checkpoint in {self._places.path} is of another training: its {key} is {was}, this one's is "
                    f"{now}; take another folder, or CheckpointOptions(path, resume=False)"
                )
        parts = {
            part: {
                name.removeprefix(f"{part}/"): array
                for name, array in saved.arrays.items()
                if name.startswith(f"{part}/")
            }
            for part in (*_PARTS, "best")
        }
        self._state.load_weights(parts["weights"])
        self._state.load_optimizer(parts["optimizer"])
        self.history = {name: list(values) for name, values in saved.facts["history"].items()}
        self._epochs = self._resumed = int(saved.facts["epoch"])
        self._steps = saved.step
        if self._stopper is not None and saved.facts["stopper"] is not None:
            self._stopper.load(saved.facts["stopper"], parts["best"])
            if self._stopper.ended:
                self._stopped = "early"
                return self._job.epochs
        return self._epochs

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Something was learnt: ``epoch`` and ``step`` count from 0.

        Raises:
            TrainingDivergedError: the loss is no number.
        """
        self._steps += 1
        if not np.isfinite(loss):
            raise self._diverged(f"the loss is {loss}", loss)
        self._tell(epoch, step, loss, {})

    def end(self, epoch: int, metrics: Mapping[str, float]) -> bool:
        """An epoch is over; gives whether the training is to end.

        Raises:
            ConfigurationError: there is no such metric as early stopping watches.
        """
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)
        self._epochs = epoch + 1
        enough = self._stopper is not None and self._stopper.update(epoch, values, self._state)
        if enough:
            self._stopped = "early"
        if self._places is not None:
            arrays = {f"weights/{name}": array for name, array in self._state.weights().items()}
            arrays |= {f"optimizer/{name}": array for name, array in self._state.optimizer().items()}
            stopper = None
            if self._stopper is not None:
                stopper, best = self._stopper.facts()
                arrays |= {f"best/{name}": array for name, array in best.items()}
            facts = {**self._facts(), "epoch": self._epochs, "history": self.history, "stopper": stopper}
            self._places.save(self._steps, arrays, facts)
        self._tell(epoch, self._job.steps - 1, values.get("loss", float("nan")), values)
        return enough

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Around the steps: a framework may refuse to go on with numbers that are none before it tells a loss.

        Raises:
            TrainingDivergedError: in the place of such an error.
        """
        try:
            yield
        except (ArithmeticError, RuntimeError, ValueError) as error:
            if isinstance(error, InferwayError):
                raise
            broken = self._broken() or self._overflows()
            if not broken:
                raise
            self._steps += 1
            raise self._diverged(broken, float("nan")) from error

    def _broken(self) -> str:
        for name, array in self._state.weights().items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return f"the weights '{name}' are no numbers any more"
        return ""

    def _overflows(self) -> str:
        rows = self._job.rows
        at = np.linspace(0, len(rows) - 1, min(len(rows), _PROBED_ROWS)).astype(np.int64)
        bad = [array for array in self._outputs(rows.take(at).inputs) if not np.isfinite(array).all()]
        if bad or why_diverged(rows.inputs):
            return "the model's outputs are no numbers any more"
        return ""

    def finish(self) -> History:
        """The history; weights of the best epoch are taken back where early stopping watched.

        Raises:
            TrainingDivergedError: the last step made weights that are no numbers.
        """
        best_epoch = None
        if self._stopper is not None:
            best_epoch = self._stopper.restore(self._state)
        broken = self._broken()
        if broken:
            raise self._diverged(broken, float("nan"))
        return History(
            history=self.history,
            epochs=self._epochs,
            steps=self._steps,
            elapsed_s=time.monotonic() - self._began,
            stopped=self._stopped,
            best_epoch=best_epoch,
            resumed_from=self._resumed,
        )

    def _tell(self, epoch: int, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        elapsed = time.monotonic() - self._began
        self._job.display(Progress(epoch + 1, self._job.epochs, step + 1, self._job.steps, loss, metrics, elapsed))

    def _facts(self) -> dict[str, Any]:
        layout = [[name, list(array.shape)] for name, array in self._state.weights().items()]
        return {
            "kind": _KIND,
            "layout": layout,
            "rows": len(self._job.rows),
            "batch_size": self._job.batch_size,
            "seed": self._job.seed,
        }

    def _diverged(self, what: str, loss: float) -> TrainingDivergedError:
        why = why_diverged(self._job.rows.inputs)
        advice = why or "lower the learning rate, scale the inputs, or clip the gradients"
        return TrainingDivergedError(
            f"training stopped: {what} at step {self._steps}; {advice}", step=self._steps, worker=None, loss=loss
        )


class _Stopper:
    """Early stopping: watches a metric and keeps the best weights."""

    def __init__(self, options: EarlyStopping, validates: bool) -> None:
        if options.metric.startswith("val_") and not validates:
            raise ConfigurationError(
                f"early_stopping watches '{options.metric}', and nothing is validated: give fit validation_data=(x, y) "
                f"or validation_split=0.2, or watch 'loss'"
            )
        if options.mode not in ("min", "max"):
            raise ConfigurationError(f"early stopping's mode expects 'min' or 'max', got {options.mode!r}")
        self._options = options
        self._value: float | None = None
        self._epoch = 0
        self._waited = 0
        self._best: dict[str, NDArray[Any]] = {}

    @property
    def ended(self) -> bool:
        return self._waited >= self._options.patience

    def update(self, epoch: int, metrics: Mapping[str, float], state: State) -> bool:
        name = self._options.metric
        if name not in metrics:
            raise ConfigurationError(f"early_stopping watches '{name}', which is none of {', '.join(metrics)}")
        value = metrics[name]
        sign = 1 if self._options.mode == "min" else -1
        if np.isfinite(value) and (self._value is None or sign * value < sign * self._value - self._options.min_delta):
            self._value, self._epoch, self._waited = value, epoch, 0
            self._best = {key: array.copy() for key, array in state.weights().items()}
        else:
            self._waited += 1
        return self.ended

    def restore(self, state: State) -> int | None:
        if not self._best:
            return None
        state.load_weights(self._best)
        return self._epoch + 1

    def facts(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        return {"value": self._value, "epoch": self._epoch, "waited": self._waited}, self._best

    def load(self, facts: Mapping[str, Any], best: Mapping[str, NDArray[Any]]) -> None:
        self._value, self._epoch, self._waited = facts["value"], facts["epoch"], facts["waited"]
        self._best = dict(best)


def _shown(key: str, value: object) -> str:
    if key != "layout":
        return str(value)
    return f"of {len(value)} arrays" if isinstance(value, list) else "unknown"
