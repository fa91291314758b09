"""What every way of training is given, and what it gives back.

``wrapper.py`` makes a `TrainingJob` of a user's model and data; ``ddp.py`` and ``parameter_server.py`` run it. A model
is met through a `Replica`: one copy of it in one process, whose parameters are one flat vector, so that a
parameter server needs to know nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float32]
Arrays: TypeAlias = Mapping[str, NDArray[Any]]
"""Arrays by name, rows first, all with as many rows."""


class Replica(Protocol):
    """One worker's copy of a model."""

    @property
    def size(self) -> int:
        """How many trainable numbers there are."""
        ...

    @property
    def layout(self) -> Sequence[tuple[str, tuple[int, ...]]]:
        """Name and shape of each trainable parameter, in the order in which they lie in the vector."""
        ...

    def read(self, out: Vector) -> None:
        """Write the parameters, ``(size,)``, into ``out``."""
        ...

    def load(self, parameters: Vector, start: int = 0) -> None:
        """Take parameters, ``(n,)``, over, from place ``start`` of the vector on; all of them or a part."""
        ...

    def gradient(self, inputs: Arrays, targets: NDArray[Any], out: Vector, *, seed: int) -> float:
        """Write the gradient of the mean loss over these rows into ``out``, ``(size,)``; gives that loss.

        ``seed`` makes what is random in a step (dropout) the same again when the step is repeated.
        """
        ...

    def state(self) -> dict[str, NDArray[Any]]:
        """What changes in training without a gradient, such as running means; by name."""
        ...

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None: ...

    def evaluate(self, inputs: Arrays, targets: NDArray[Any], *, batch_size: int) -> dict[str, float]:
        """``loss`` and the model's metrics over these rows, without training."""
        ...


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """An optimiser, said in numbers. Names and defaults as in Keras and PyTorch where the two agree.

    Attributes:
        kind: sgd with ``momentum`` and ``nesterov``; adam and adamw with ``beta1``, ``beta2`` and ``epsilon``.
        weight_decay: adamw: decoupled from the gradient, as Keras has it in every optimiser; sgd and adam: added to the
            gradient, as in PyTorch.
        epsilon_in: ``corrected``: added to the root of the bias-corrected second moment, as in PyTorch; ``raw``: to the
            root of the uncorrected one, with the learning rate corrected for both moments, as in Keras.
    """

    kind: Literal["sgd", "adam", "adamw"]
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-7
    epsilon_in: Literal["corrected", "raw"] = "raw"
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Stop when a metric has not become better by ``min_delta`` for ``patience`` epochs, and take the best back."""

    metric: str = "val_loss"
    patience: int = 3
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """Where and how often the state of a training is kept.

    Attributes:
        path: a folder that every node sees, or a URL of an object store (``s3://bucket/prefix``).
        every_steps: a checkpoint after each so many steps; 0: after each epoch.
        keep: how many of the newest stay.
        resume: go on from the newest one that is there.
    """

    path: str
    every_steps: int = 0
    keep: int = 3
    resume: bool = True


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training is. Metrics of validation begin with ``val_``."""

    epoch: int
    epochs: int
    step: int
    """Of this epoch, from 1."""
    steps_per_epoch: int
    loss: float
    metrics: Mapping[str, float]
    """Empty but at the end of an epoch."""
    elapsed_s: float
    workers: int = 1


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A training, whole.

    Attributes:
        replica: makes the model in whichever process calls it; goes to other processes by Ray's own serialisation, so
            it holds what it needs (architecture, first weights, loss) and nothing of the session.
        inputs, targets: training rows, preprocessed. ``targets`` is ``(rows, …)``.
        validation: inputs and targets that are only evaluated.
        batch_size: rows of one step over all workers together in sync training, and of one worker's step otherwise.
        seed: of the order of rows and of what is random in the model.
    """

    replica: Callable[[], Replica]
    optimizer: OptimizerSpec
    inputs: Arrays
    targets: NDArray[Any]
    validation: tuple[Arrays, NDArray[Any]] | None = None
    epochs: int = 1
    batch_size: int = 32
    shuffle: bool = True
    seed: int = 0
    checkpoints: CheckpointOptions | None = None
    early_stopping: EarlyStopping | None = None
    on_progress: Callable[[Progress], None] | None = None

    @property
    def rows(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        parameters: ``(size,)``, FP32.
        state: as of `Replica.state`.
        history: metrics by name, a value for each epoch.
        facts: figures of the way of training, such as ``max_staleness``, ``restarts``, ``bytes_pulled`` and
            ``bytes_pushed``.
    """

    parameters: Vector
    state: dict[str, NDArray[Any]]
    history: dict[str, list[float]]
    epochs: int
    steps: int
    elapsed_s: float
    stopped: Literal["finished", "early"] = "finished"
    facts: Mapping[str, float] = field(default_factory=dict)
