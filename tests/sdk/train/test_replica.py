"""Models as flat vectors: what a replica computes is what its framework computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inferway import ConfigurationError, ModelNotBuiltError, TrainingDivergedError, UnknownFrameworkError
from inferway.train.job import Replica, Vector
from inferway.train.replica import check_finite, put_into, replica_factory

torch = pytest.importorskip("torch")
keras = pytest.importorskip("keras")
pytestmark = pytest.mark.torch

X = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
REAL = X[:, 0] * 2 - X[:, 1]
TWO = (REAL > 0).astype(np.int64)
THREE = np.digitize(REAL, [-1, 1])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    keras.utils.set_random_seed(1)


def module(outputs: int = 1, *last: Any) -> Any:
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, outputs), *last)


def model(outputs: int = 1, activation: str | None = None, *layers: Any) -> Any:
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), *layers, keras.layers.Dense(outputs, activation)]
    )


def gradient(
    replica: Replica, targets: NDArray[Any], *, seed: int = 0, rows: slice = slice(None)
) -> tuple[float, Vector]:
    out = np.full(replica.size, np.nan, np.float32)
    return replica.gradient({"x": X[rows]}, targets[rows], out, seed=seed), out


def flat(tensors: Any) -> NDArray[Any]:
    return np.concatenate([np.asarray(t.detach()).reshape(-1) for t in tensors])


# PyTorch -------------------------------------------------------------------------------------------------------------

functional = torch.nn.functional


@pytest.mark.parametrize(
    ("made", "loss", "targets", "own"),
    [
        (module, "mse", REAL, lambda p, y: functional.mse_loss(p, y.float()[:, None])),
        (module, "mae", REAL, lambda p, y: functional.l1_loss(p, y.float()[:, None])),
        (
            module,
            "binary_crossentropy",
            TWO,
            lambda p, y: functional.binary_cross_entropy_with_logits(p, y.float()[:, None]),
        ),
        (
            lambda: module(1, torch.nn.Sigmoid()),
            "binary_crossentropy",
            TWO,
            lambda p, y: functional.binary_cross_entropy(p, y.float()[:, None]),
        ),
        (lambda: module(3), "sparse_categorical_crossentropy", THREE, functional.cross_entropy),
        (
            lambda: module(3),
            "sparse_categorical_crossentropy",
            THREE[:, None],
            lambda p, y: functional.cross_entropy(p, y[:, 0]),
        ),
        (lambda: module(3), "cross_entropy", THREE, functional.cross_entropy),
        (
            lambda: module(3),
            "categorical_crossentropy",
            np.eye(3)[THREE],
            lambda p, y: functional.cross_entropy(p, y.float()),
        ),
        (
            lambda: module(3, torch.nn.Softmax(1)),
            "sparse_categorical_crossentropy",
            THREE,
            lambda p, y: functional.nll_loss(p.log(), y),
        ),
        (lambda: module(3, torch.nn.LogSoftmax(1)), "sparse_categorical_crossentropy", THREE, functional.nll_loss),
        (lambda: module(3), torch.nn.CrossEntropyLoss(), THREE, functional.cross_entropy),
        (module, lambda p, y: (p[:, 0] - y) ** 4, REAL, lambda p, y: ((p[:, 0] - y) ** 4).mean()),
    ],
    ids=[
        "mse",
        "mae",
        "scores",
        "sigmoid",
        "sparse",
        "column",
        "torch",
        "one-hot",
        "softmax",
        "log",
        "criterion",
        "rows",
    ],
)
def test_a_gradient_is_that_of_pytorch(made: Callable[[], Any], loss: Any, targets: NDArray[Any], own: Any) -> None:
    plain = made()
    replica = replica_factory(plain, loss=loss)()
    got, vector = gradient(replica, targets)
    expected = own(plain(torch.from_numpy(X)), torch.from_numpy(targets))
    expected.backward()
    assert got == pytest.approx(float(expected.detach()), rel=1e-6)
    assert np.allclose(vector, flat(p.grad for p in plain.parameters()), atol=1e-7)


def test_parameters_and_gradients_lie_in_one_buffer_each() -> None:
    replica: Any = replica_factory(module(), loss="mse")()
    out = np.zeros(replica.size, np.float32)
    replica.gradient({"x": X}, REAL, out, seed=0)
    begins = [p.grad.data_ptr() for p in replica._module.parameters()]
    assert begins[0] == out.ctypes.data
    replica.gradient({"x": X}, REAL, out, seed=0)
    assert [p.grad.data_ptr() for p in replica._module.parameters()] == begins
    assert [name for name, _ in replica.layout] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert replica.size == sum(int(np.prod(shape)) for _, shape in replica.layout)


def test_a_gradient_asked_for_twice_is_not_added_up_in_the_same_buffer_or_another() -> None:
    replica = replica_factory(module(), loss="mse")()
    one, two = np.zeros((2, replica.size), np.float32)
    for out in (one, one, two, one, two):
        replica.gradient({"x": X}, REAL, out, seed=0)
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("made", [module, model], ids=["torch", "keras"])
def test_what_is_loaded_is_read_and_computed_with(made: Callable[[], Any]) -> None:
    replica = replica_factory(made(), loss="mse")()
    values = np.random.default_rng(3).normal(size=replica.size).astype(np.float32)
    replica.load(values)
    out = np.empty(replica.size, np.float32)
    replica.read(out)
    assert out.tobytes() == values.tobytes()
    whole = gradient(replica, REAL)
    replica.load(np.zeros(replica.size, np.float32))
    for part in (slice(0, 7), slice(7, 30), slice(30, None)):
        replica.load(values[part], part.start)
    assert gradient(replica, REAL)[1].tobytes() == whole[1].tobytes()


@pytest.mark.parametrize("made", [module, model], ids=["torch", "keras"])
def test_the_callers_model_is_copied_and_not_changed(made: Callable[[], Any]) -> None:
    given = made()
    factory = replica_factory(given, loss="mse")
    first, before = factory(), np.empty(41, np.float32)
    first.read(before)
    first.load(np.zeros(41, np.float32))
    put_into(given, np.ones(41, np.float32), {})
    after = np.empty(41, np.float32)
    factory().read(after)
    assert after.tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "given",
    [
        lambda: module(1),
        lambda: torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)),
        lambda: model(1, None, keras.layers.BatchNormalization()),
    ],
    ids=["torch", "batch norm", "keras batch norm"],
)
def test_what_was_trained_is_put_into_the_callers_model(given: Callable[[], Any]) -> None:
    original = given()
    factory = replica_factory(original, loss="mse")
    replica = factory()
    gradient(replica, REAL)
    values = np.random.default_rng(3).normal(size=replica.size).astype(np.float32)
    put_into(original, values, replica.state())
    replica.load(values)
    again = replica_factory(original, loss="mse")()
    assert again.evaluate({"x": X}, REAL, batch_size=24) == replica.evaluate({"x": X}, REAL, batch_size=24)
    with pytest.raises(ConfigurationError, match=r"the model has \d+ trainable numbers"):
        put_into(original, values[1:], {})
    with pytest.raises(ConfigurationError, match="of another model: this one has no nothing"):
        put_into(original, values, {"nothing": values})


def dropped(kind: str) -> Replica:
    if kind == "torch":
        return replica_factory(torch.nn.Sequential(torch.nn.Dropout(0.5), *module()), loss="mse")()
    return replica_factory(model(1, None, keras.layers.Dropout(0.5), keras.layers.Dropout(0.5)), loss="mse")()


@pytest.mark.parametrize("kind", ["torch", "keras"])
def test_what_dropout_drops_is_of_the_seed_alone(kind: str) -> None:
    replica = dropped(kind)
    first = gradient(replica, REAL, seed=5)
    other = gradient(replica, REAL, seed=6)
    again = gradient(replica, REAL, seed=5)
    assert first[0] == again[0]
    assert first[1].tobytes() == again[1].tobytes()
    assert first[1].tobytes() != other[1].tobytes()
    assert gradient(dropped(kind), REAL, seed=5)[0] != pytest.approx(other[0])


def test_running_means_are_state() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    factory = replica_factory(plain, loss="mse")
    replica = factory()
    before = replica.state()
    gradient(replica, REAL)
    state = replica.state()
    assert set(state) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert state["1.num_batches_tracked"] == 1
    assert not np.array_equal(state["1.running_mean"], before["1.running_mean"])
    other = factory()
    other.load_state(state)
    assert other.evaluate({"x": X}, REAL, batch_size=5) == replica.evaluate({"x": X}, REAL, batch_size=5)


def test_metrics_are_over_all_rows() -> None:
    def largest(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        return float(np.abs(outputs[:, 0] - targets).max())

    replica = replica_factory(module(), loss="mse", metrics=["mse", "mae", largest])()
    found = replica.evaluate({"x": X}, REAL, batch_size=7)
    assert set(found) == {"loss", "mse", "mae", "largest"}
    assert found["loss"] == pytest.approx(found["mse"])
    assert found == pytest.approx(replica.evaluate({"x": X}, REAL, batch_size=24))


@pytest.mark.parametrize(
    ("made", "targets", "loss"),
    [
        (lambda: module(1), TWO, "binary_crossentropy"),
        (lambda: module(1, torch.nn.Sigmoid()), TWO[:, None], "binary_crossentropy"),
        (lambda: module(3), THREE, "cross_entropy"),
        (lambda: module(3), np.eye(3)[THREE], "categorical_crossentropy"),
    ],
    ids=["scores", "sigmoid", "classes", "one-hot"],
)
def test_accuracy_is_the_share_of_right_classes(made: Callable[[], Any], targets: NDArray[Any], loss: str) -> None:
    plain = made()
    outputs = plain(torch.from_numpy(X)).detach().numpy()
    if outputs.shape[1] == 1:
        right = (outputs[:, 0] > (0.5 if len(plain) == 4 else 0)) == TWO
    else:
        right = outputs.argmax(1) == THREE
    found = replica_factory(plain, loss=loss, metrics=["accuracy"])().evaluate({"x": X}, targets, batch_size=10)
    assert found["accuracy"] == pytest.approx(right.mean())


class Two(torch.nn.Module):  # type: ignore[misc,name-defined]  # torch is not followed
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(6))

    def forward(self, right: Any, left: Any) -> Any:
        return (left * self.scale - right).sum(1)


def test_several_inputs_go_to_pytorch_by_name() -> None:
    replica = replica_factory(Two(), loss="mse")()
    out = np.empty(6, np.float32)
    inputs = {"left": X, "right": X}
    assert replica.gradient(inputs, np.zeros(24), out, seed=0) == 0.0
    assert replica.evaluate(inputs, np.zeros(24), batch_size=5)["loss"] == 0.0


# Keras ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "loss", "targets"),
    [
        (model, "mse", REAL),
        (lambda: model(1, "sigmoid"), "binary_crossentropy", TWO),
        (lambda: model(3, "softmax"), "sparse_categorical_crossentropy", THREE),
        (lambda: model(3, "softmax"), "categorical_crossentropy", np.eye(3)[THREE]),
        (model, lambda y, p: keras.ops.mean((y - p[:, 0]) ** 4), REAL),
    ],
    ids=["mse", "binary", "sparse", "one-hot", "callable"],
)
def test_a_step_is_that_of_keras_fit(made: Callable[[], Any], loss: Any, targets: NDArray[Any]) -> None:
    plain = made()
    replica = replica_factory(plain, loss=loss)()
    before, after = np.empty(replica.size, np.float32), np.empty(replica.size, np.float32)
    replica.read(before)
    got, vector = gradient(replica, targets)
    plain.compile(optimizer=keras.optimizers.SGD(1.0), loss=loss)
    history = plain.fit(X, targets, batch_size=24, epochs=1, shuffle=False, verbose=0).history
    replica_factory(plain, loss=loss)().read(after)
    assert got == pytest.approx(history["loss"][0], rel=1e-5)
    assert np.allclose(before - vector, after, atol=1e-6)


def test_a_kerass_regularisation_is_in_its_loss() -> None:
    decayed = keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(10.0))
    with_it = replica_factory(model(1, None, decayed), loss="mse")()
    assert gradient(with_it, REAL)[0] > 10


def test_a_compiled_keras_model_brings_loss_and_metrics() -> None:
    plain = model(3, "softmax")
    plain.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    found = replica_factory(plain)().evaluate({"x": X}, THREE, batch_size=24)
    expected = plain.evaluate(X, THREE, verbose=0, return_dict=True)
    assert found == pytest.approx(expected)


def test_frozen_layers_are_not_trained() -> None:
    plain = model()
    plain.layers[0].trainable = False
    assert [name.rpartition("/")[2] for name, _ in replica_factory(plain, loss="mse")().layout] == ["kernel", "bias"]
    half = module()
    half[0].weight.requires_grad = False
    assert len(replica_factory(half, loss="mse")().layout) == 3


def test_several_inputs_go_to_keras_by_name() -> None:
    left, right = keras.Input((6,), name="left"), keras.Input((6,), name="right")
    joined = keras.layers.Dense(1, use_bias=False)(keras.layers.Subtract()([left, right]))
    replica = replica_factory(keras.Model([left, right], joined), loss="mse")()
    out = np.empty(6, np.float32)
    swapped = {"right": X, "left": X * 2}
    replica.load(np.ones(6, np.float32))
    assert replica.gradient(swapped, X.sum(1), out, seed=0) == pytest.approx(0, abs=1e-9)


class Scaled(keras.layers.Layer):  # type: ignore[misc,name-defined]  # keras is not followed
    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x: Any) -> Any:
        return x * self.scale


def pickled(factory: Any) -> bytes:
    from ray import cloudpickle

    # As Ray would send what a script defines.
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    try:
        content: bytes = cloudpickle.dumps(factory)
    finally:
        cloudpickle.unregister_pickle_by_value(here)
    return content


ELSEWHERE = """
import pickle, sys
import numpy as np
factory = pickle.load(open(sys.argv[1], "rb"))
import torch
torch.set_num_threads(1)
replica = factory()
x, y = np.load(sys.argv[2], allow_pickle=False), np.load(sys.argv[3], allow_pickle=False)
out = np.zeros(replica.size, np.float32)
loss = replica.gradient({"x": x}, y, out, seed=5)
np.save(sys.argv[4], out)
print(loss)
"""


@pytest.mark.parametrize("kind", ["torch", "keras"])
def test_a_replica_is_made_in_another_process(kind: str, tmp_path: Any) -> None:
    pytest.importorskip("ray")
    if kind == "torch":
        factory = replica_factory(
            torch.nn.Sequential(torch.nn.Dropout(0.3), *module()), loss=lambda p, y: (p[:, 0] - y) ** 2
        )
    else:
        layers = [Scaled(), keras.layers.Dropout(0.3), keras.layers.BatchNormalization()]
        factory = replica_factory(model(1, None, *layers), loss=lambda y, p: keras.ops.mean((y - p[:, 0]) ** 2))
    files = [str(tmp_path / name) for name in ("factory", "x.npy", "y.npy", "out.npy")]
    (tmp_path / "factory").write_bytes(pickled(factory))
    np.save(files[1], X)
    np.save(files[2], REAL)
    told = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *files], check=True, capture_output=True, text=True, timeout=120
    )
    loss, vector = gradient(factory(), REAL, seed=5)
    assert float(told.stdout.split()[-1]) == pytest.approx(loss)
    assert np.allclose(np.load(files[3], allow_pickle=False), vector, atol=1e-7)


TENSORFLOW = """
import os
os.environ["KERAS_BACKEND"] = "tensorflow"
import numpy as np, keras
from inferway.train.replica import put_into, replica_factory
keras.utils.set_random_seed(1)
x = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
y = (x[:, 0] > 0).astype(np.float32)
layers = keras.layers
plain = keras.Sequential([keras.Input((6,)), layers.Dense(5, activation="tanh"), layers.Dense(1, activation="sigmoid")])
replica = replica_factory(plain, loss="binary_crossentropy", metrics=["accuracy"])()
before, out, after = np.zeros((3, replica.size), np.float32)
replica.read(before)
loss = replica.gradient({"x": x}, y, out, seed=0)
plain.compile(optimizer=keras.optimizers.SGD(1.0), loss="binary_crossentropy", metrics=["accuracy"])
history = plain.fit(x, y, batch_size=24, epochs=1, verbose=0).history
replica_factory(plain)().read(after)
assert abs(loss - history["loss"][0]) < 1e-5
assert np.abs(before - out - after).max() < 1e-6
for part in (slice(0, 7), slice(7, None)):
    replica.load(after[part], part.start)
replica.read(out)
assert out.tobytes() == after.tobytes()
found, own = replica.evaluate({"x": x}, y, batch_size=24), plain.evaluate(x, y, verbose=0, return_dict=True)
assert all(abs(found[name] - own[name]) < 1e-6 for name in ("loss", "accuracy")), (found, own)
random = keras.Sequential([keras.Input((6,)), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)])
replica = replica_factory(random, loss="mse")()
out = np.zeros(replica.size, np.float32)
losses = [replica.gradient({"x": x[:n]}, y[:n], out, seed=s) for n, s in ((24, 5), (7, 5), (24, 6), (24, 5))]
assert losses[0] == losses[3] != losses[2]
assert any(name.endswith("moving_mean") for name in replica.state())
put_into(random, np.zeros(replica.size, np.float32), replica.state())
assert not random.predict(x, verbose=0).any()
print("as fit")
"""


@pytest.mark.tensorflow
@pytest.mark.slow
def test_on_tensorflow_a_step_is_that_of_keras_fit() -> None:
    pytest.importorskip("tensorflow")
    told = subprocess.run([sys.executable, "-c", TENSORFLOW], capture_output=True, text=True, timeout=300)
    assert told.stdout.strip().endswith("as fit"), told.stderr[-3000:]


# What cannot be trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: replica_factory(object(), loss="mse"), UnknownFrameworkError, "Keras or PyTorch .* builtins.object"),
        (lambda: replica_factory(module()), ConfigurationError, "no loss of its own"),
        (lambda: replica_factory(module(), loss="hinge"), ConfigurationError, "there is no loss 'hinge'; there are"),
        (lambda: replica_factory(module(), loss="mse", metrics=["auc"]), ConfigurationError, "no metric 'auc'"),
        (lambda: replica_factory(torch.nn.LazyLinear(3), loss="mse"), ModelNotBuiltError, "'weight' has no shape yet"),
        (lambda: replica_factory(module().double(), loss="mse"), ConfigurationError, "'0.weight' is float64"),
        (lambda: replica_factory(torch.nn.Tanh(), loss="mse"), ConfigurationError, "no parameter that can be trained"),
        (lambda: replica_factory(model()), ConfigurationError, "no loss: give one"),
        (lambda: replica_factory(model(), loss="hinges"), ConfigurationError, "Keras knows no loss 'hinges'"),
        (
            lambda: replica_factory(keras.Sequential([keras.layers.Dense(1)]), loss="mse"),
            ModelNotBuiltError,
            "has no weights yet",
        ),
        (
            lambda: replica_factory(keras.Sequential([keras.Input((6,)), keras.layers.ReLU()]), loss="mse"),
            ConfigurationError,
            "no weight that can be trained",
        ),
    ],
    ids=[
        "framework", "no loss", "loss", "metric", "lazy", "double", "nothing",
        "keras no loss", "keras loss", "not built", "keras nothing",
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("loss", "gradient", "match"),
    [
        (float("nan"), [1.0], "the loss is nan at step 7 in worker 2"),
        (float("inf"), [1.0], "the loss is inf at step 7"),
        (0.5, [1.0, np.nan], "the loss is 0.5, but the gradient is no number at step 7"),
        (0.5, [np.inf, -np.inf], "the gradient is no number"),
    ],
    ids=["nan", "inf", "gradient nan", "gradient inf"],
)
def test_numbers_that_are_none_are_found(loss: float, gradient: list[float], match: str) -> None:
    with pytest.raises(TrainingDivergedError, match=match) as caught:
        check_finite(loss, np.array(gradient, np.float32), step=7, worker=2)
    assert (caught.value.step, caught.value.worker) == (7, 2)
    assert not np.isfinite(caught.value.loss) or caught.value.loss == loss


def test_large_numbers_are_numbers() -> None:
    check_finite(3e38, np.full(1000, 3e38, np.float32), step=1, worker=None)
