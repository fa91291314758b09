"""Optimisers on flat vectors against those of PyTorch and Keras, over many steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inferway import ConfigurationError
from inferway.train.job import OptimizerSpec, Vector
from inferway.train.optimizers import make_optimizer

SIZE = 40_000
"""More than two blocks, and no multiple of one."""
STEPS = 60

torch_like: dict[str, Any] = {"epsilon": 1e-8, "epsilon_in": "corrected"}


@pytest.fixture(scope="module")
def gradients() -> list[Vector]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=SIZE).astype(np.float32) * np.float32(rng.lognormal()) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def beginning() -> Vector:
    return np.random.default_rng(1).normal(size=SIZE).astype(np.float32)


def stepped(spec: OptimizerSpec, beginning: Vector, gradients: list[Vector]) -> Vector:
    parameters = beginning.copy()
    optimizer = make_optimizer(spec, SIZE)
    for gradient in gradients:
        kept = gradient.copy()
        optimizer.step(parameters, gradient)
        assert np.array_equal(gradient, kept)
    return parameters


def near(got: NDArray[Any], expected: NDArray[Any]) -> None:
    # Both round in FP32 at every step, in an order of operations of their own.
    assert np.abs(got - expected).max() < 2e-6 * max(1.0, np.abs(expected).max())
    assert np.abs(got - expected).mean() < 1e-6


@pytest.mark.torch
@pytest.mark.parametrize(
    ("spec", "kind", "settings"),
    [
        (OptimizerSpec("sgd", 0.01), "SGD", {"lr": 0.01}),
        (OptimizerSpec("sgd", 0.01, momentum=0.9), "SGD", {"lr": 0.01, "momentum": 0.9}),
        (
            OptimizerSpec("sgd", 0.01, momentum=0.9, nesterov=True),
            "SGD",
            {"lr": 0.01, "momentum": 0.9, "nesterov": True},
        ),
        (
            OptimizerSpec("sgd", 0.01, momentum=0.9, weight_decay=0.1),
            "SGD",
            {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
        ),
        (OptimizerSpec("adam", 0.01, **torch_like), "Adam", {"lr": 0.01}),
        (OptimizerSpec("adam", 0.01, beta1=0.8, beta2=0.99, **torch_like), "Adam", {"lr": 0.01, "betas": (0.8, 0.99)}),
        (OptimizerSpec("adam", 0.01, weight_decay=0.1, **torch_like), "Adam", {"lr": 0.01, "weight_decay": 0.1}),
        (OptimizerSpec("adamw", 0.01, weight_decay=0.1, **torch_like), "AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ],
    ids=["sgd", "momentum", "nesterov", "sgd decay", "adam", "adam betas", "adam decay", "adamw"],
)
def test_it_steps_as_pytorch_does(
    spec: OptimizerSpec, kind: str, settings: dict[str, Any], beginning: Vector, gradients: list[Vector]
) -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.from_numpy(beginning.copy()))
    optimizer = getattr(torch.optim, kind)([parameter], **settings)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    near(stepped(spec, beginning, gradients), parameter.detach().numpy())


@pytest.mark.torch
@pytest.mark.parametrize(
    ("spec", "kind", "settings"),
    [
        (OptimizerSpec("sgd", 0.01, momentum=0.9), "SGD", {"momentum": 0.9}),
        (OptimizerSpec("sgd", 0.01, momentum=0.9, nesterov=True), "SGD", {"momentum": 0.9, "nesterov": True}),
        (OptimizerSpec("adam", 0.01), "Adam", {}),
        (OptimizerSpec("adam", 0.01, epsilon=1e-2), "Adam", {"epsilon": 1e-2}),
        (OptimizerSpec("adamw", 0.01, weight_decay=0.1), "AdamW", {"weight_decay": 0.1}),
    ],
    ids=["momentum", "nesterov", "adam", "adam epsilon", "adamw"],
)
def test_it_steps_as_keras_does(
    spec: OptimizerSpec, kind: str, settings: dict[str, Any], beginning: Vector, gradients: list[Vector]
) -> None:
    keras = pytest.importorskip("keras")
    variable = keras.Variable(beginning.copy())
    optimizer = getattr(keras.optimizers, kind)(0.01, **settings)
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    near(stepped(spec, beginning, gradients), keras.ops.convert_to_numpy(variable))


SPECS = [
    OptimizerSpec("sgd", 0.01),
    OptimizerSpec("sgd", 0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    OptimizerSpec("adam", 0.01, weight_decay=0.1),
    OptimizerSpec("adamw", 0.01, weight_decay=0.1, epsilon_in="corrected"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_vector_in_pieces_steps_as_the_whole_to_the_bit(
    spec: OptimizerSpec, beginning: Vector, gradients: list[Vector]
) -> None:
    pieces = [slice(0, 7), slice(7, 20_001), slice(20_001, SIZE)]
    parameters = beginning.copy()
    optimizers = [make_optimizer(spec, piece.stop - piece.start) for piece in pieces]
    for gradient in gradients[:5]:
        for piece, optimizer in zip(pieces, optimizers, strict=True):
            optimizer.step(parameters[piece], gradient[piece])
    assert parameters.tobytes() == stepped(spec, beginning, gradients[:5]).tobytes()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_it_goes_on_from_its_state_to_the_bit(spec: OptimizerSpec, beginning: Vector, gradients: list[Vector]) -> None:
    parameters = beginning.copy()
    before, after = make_optimizer(spec, SIZE), make_optimizer(spec, SIZE)
    for gradient in gradients[:3]:
        before.step(parameters, gradient)
    state = before.state()
    before.step(np.zeros(SIZE, np.float32), gradients[0])
    after.load_state(state)
    for gradient in gradients[3:6]:
        after.step(parameters, gradient)
    assert parameters.tobytes() == stepped(spec, beginning, gradients[:6]).tobytes()


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (OptimizerSpec("rmsprop", 0.1), "no optimiser 'rmsprop' here; there are sgd, adam, adamw"),  # type: ignore[arg-type]
        (OptimizerSpec("sgd", float("nan")), "a learning rate is a number from 0 on, not nan"),
        (OptimizerSpec("sgd", 0.1, momentum=1.0), "momentum lies between 0 and 1"),
        (OptimizerSpec("adam", 0.1, beta2=1.5), "beta2 lies between 0 and 1"),
        (OptimizerSpec("sgd", 0.1, nesterov=True), "nesterov needs a momentum"),
        (OptimizerSpec("adam", 0.1, epsilon=-1), "epsilon is a number from 0 on"),
    ],
    ids=["kind", "rate", "momentum", "beta", "nesterov", "epsilon"],
)
def test_numbers_that_make_no_sense_are_refused(spec: OptimizerSpec, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        make_optimizer(spec, 1)
