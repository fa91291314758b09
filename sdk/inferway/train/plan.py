"""Which rows are used when, and by whom: the same in every process that computes it, and again after a crash.

An epoch is one order of all rows, drawn from the seed and the epoch. A step takes the next ``batch_size`` of them, the
last one what is left, and gives each worker a run of neighbours; the runs differ by one row at most. A worker's
gradient is a mean over its rows, so weighted by ``rows of the worker / rows of the step`` they sum to the mean over the
step, which is why synchronous training over any number of workers computes what one process does:

    (1/B) Σᵢ ∇ℓᵢ = Σ_w (B_w / B) · (1/B_w) Σ_{i∈w} ∇ℓᵢ
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Part:
    """What one worker does in one step.

    Attributes:
        rows: indices of its rows, ``(n,)``, int64; n is 0 where a step has fewer rows than there are workers.
        weight: its share of the step's rows, from 0 to 1; the shares of a step sum to 1.
    """

    rows: NDArray[np.int64]
    weight: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The batches of a whole training.

    Attributes:
        rows: how many there are to train on.
        batch_size: rows of a step over all workers.
        workers: how many share it.
        seed: of the order; every epoch has one of its own.
        shuffle: whether the order is drawn at all.
    """

    rows: int
    batch_size: int
    workers: int = 1
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} has to be at least 1, not {getattr(self, name)}")

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.rows // self.batch_size)

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Rows of a step, ``(n,)``; epoch and step count from 0."""
        if not 0 <= step < self.steps:
            raise IndexError(f"an epoch has the steps 0 to {self.steps - 1}, not {step}")
        return self._order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def part(self, epoch: int, step: int, worker: int) -> Part:
        """What a worker, counted from 0, does in a step."""
        batch = self.batch(epoch, step)
        low, high = (len(batch) * w // self.workers for w in (worker, worker + 1))
        return Part(batch[low:high], (high - low) / len(batch))

    def noise(self, epoch: int, step: int, worker: int) -> int:
        """A seed for what is random in the model during this part, below 2⁶³."""
        words = np.random.SeedSequence((self.seed, 1, epoch, step, worker)).generate_state(1, np.uint64)
        return int(words[0] >> np.uint64(1))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return _order(self.rows, self.seed, epoch) if self.shuffle else np.arange(self.rows, dtype=np.int64)


@lru_cache(maxsize=2)  # this epoch and, where a rollback crosses the border, the one before
def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = np.random.default_rng(np.random.SeedSequence((seed, 0, epoch))).permutation(rows)
    order.flags.writeable = False
    return order
