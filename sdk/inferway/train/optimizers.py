"""Gradient descent on flat vectors, without a framework: what a parameter server does with a gradient.

With parameters w, gradient g, learning rate η, and t counted from 1:

    sgd                 w ← w − η g
    momentum μ          b ← μ b + g;  w ← w − η b           (nesterov: w ← w − η (g + μ b))
    adam                m ← m + (1−β₁)(g − m);  v ← v + (1−β₂)(g² − v)
      as PyTorch        w ← w − η/(1−β₁ᵗ) · m / (√(v/(1−β₂ᵗ)) + ε)
      as Keras          w ← w − η √(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε)
    weight decay λ      sgd, adam: g ← g + λ w first;  adamw: w ← w − η λ w first

Every element is on its own, so a vector may be cut into shards anywhere, and a shard's step is that part of the whole
one's, to the bit. The work is done in blocks that stay in a core's cache: a step then reads and writes each vector
once.
Sources: Sutskever et al. 2013 (momentum), Kingma and Ba 2015 (Adam), Loshchilov and Hutter 2019 (AdamW).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError
from .job import OptimizerSpec, Vector

_BLOCK: Final = 1 << 14
"""Elements; five FP32 blocks of it are 320 KB, below the second-level cache of any server processor."""


class Optimizer(Protocol):
    """The state of an optimiser of one vector, ``(size,)``."""

    def step(self, parameters: Vector, gradient: Vector) -> None:
        """Move ``parameters`` in place. ``gradient`` is only read. Neither is kept."""
        ...

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of what has to be kept to go on later, by name; vectors are ``(size,)``, FP32."""
        ...

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from there."""
        ...


def make_optimizer(spec: OptimizerSpec, size: int) -> Optimizer:
    """An optimiser at its beginning.

    Raises:
        ConfigurationError: numbers of the specification that make no sense, or no such kind.
    """
    _check(spec)
    return _Sgd(spec, size) if spec.kind == "sgd" else _Adam(spec, size)


def _check(spec: OptimizerSpec) -> None:
    if spec.kind not in ("sgd", "adam", "adamw"):
        raise ConfigurationError(f"there is no optimiser '{spec.kind}' here; there are sgd, adam, adamw")
    if not (math.isfinite(spec.learning_rate) and spec.learning_rate >= 0):
        raise ConfigurationError(f"a learning rate is a number from 0 on, not {spec.learning_rate}")
    for name in ("momentum", "beta1", "beta2"):
        if not 0 <= getattr(spec, name) < 1:
            raise ConfigurationError(f"{name} lies between 0 and 1, which {getattr(spec, name)} does not")
    if spec.nesterov and not spec.momentum:
        raise ConfigurationError("nesterov needs a momentum")
    for name in ("epsilon", "weight_decay"):
        if not getattr(spec, name) >= 0:
            raise ConfigurationError(f"{name} is a number from 0 on, not {getattr(spec, name)}")


class _Sgd:
    def __init__(self, spec: OptimizerSpec, size: int) -> None:
        self._spec = spec
        self._velocity = np.zeros(size, np.float32) if spec.momentum else None
        self._scratch = np.empty(min(size, _BLOCK), np.float32)

    def step(self, parameters: Vector, gradient: Vector) -> None:
        rate, momentum = np.float32(self._spec.learning_rate), np.float32(self._spec.momentum)
        for part in _blocks(len(parameters)):
            w, g = parameters[part], gradient[part]
            scratch = self._scratch[: len(w)]
            if self._spec.weight_decay:
                np.multiply(w, np.float32(self._spec.weight_decay), out=scratch)
                g = np.add(scratch, g)
            if self._velocity is None:
                np.multiply(g, rate, out=scratch)
            else:
                b = self._velocity[part]
                b *= momentum
                b += g
                if self._spec.nesterov:
                    np.multiply(b, momentum, out=scratch)
                    scratch += g
                    scratch *= rate
                else:
                    np.multiply(b, rate, out=scratch)
            w -= scratch

    def state(self) -> dict[str, NDArray[Any]]:
        return {} if self._velocity is None else {"velocity": self._velocity.copy()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        if self._velocity is not None:
            self._velocity[:] = state["velocity"]


class _Adam:
    def __init__(self, spec: OptimizerSpec, size: int) -> None:
        self._spec = spec
        self._steps = 0
        self._mean = np.zeros(size, np.float32)
        self._square = np.zeros(size, np.float32)
        self._scratch = np.empty((2, min(size, _BLOCK)), np.float32)

    def step(self, parameters: Vector, gradient: Vector) -> None:
        spec = self._spec
        self._steps += 1
        left1, left2 = 1 - spec.beta1**self._steps, 1 - spec.beta2**self._steps
        if spec.epsilon_in == "corrected":
            rate, root = spec.learning_rate / left1, math.sqrt(left2)
        else:
            rate, root = spec.learning_rate * math.sqrt(left2) / left1, 1.0
        to_mean, to_square = np.float32(1 - spec.beta1), np.float32(1 - spec.beta2)
        decay = np.float32(spec.weight_decay)
        kept = np.float32(1 - spec.learning_rate * spec.weight_decay)
        for part in _blocks(len(parameters)):
            w, g, m, v = parameters[part], gradient[part], self._mean[part], self._square[part]
            one, two = self._scratch[0, : len(w)], self._scratch[1, : len(w)]
            if spec.weight_decay and spec.kind == "adamw":
                w *= kept
            elif spec.weight_decay:
                g = w * decay + g
            np.subtract(g, m, out=one)
            one *= to_mean
            m += one
            np.multiply(g, g, out=one)
            one -= v
            one *= to_square
            v += one
            np.sqrt(v, out=one)
            if spec.epsilon_in == "corrected":
                one /= np.float32(root)
            one += np.float32(spec.epsilon)
            np.multiply(m, np.float32(rate), out=two)
            two /= one
            w -= two

    def state(self) -> dict[str, NDArray[Any]]:
        return {"mean": self._mean.copy(), "square": self._square.copy(), "steps": np.array(self._steps)}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._mean[:] = state["mean"]
        self._square[:] = state["square"]
        self._steps = int(state["steps"])


def _blocks(size: int) -> list[slice]:
    return [slice(at, min(at + _BLOCK, size)) for at in range(0, size, _BLOCK)]
