"""Wrapped models train as their framework does, and stay what they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import inferway
from inferway import CheckpointOptions, EarlyStopping
from inferway.train.job import OptimizerSpec, Progress
from inferway.train.wrapper import WrappedModel

Array = NDArray[Any]

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def line_data(rows: int = 240) -> tuple[Array, Array]:
    """Rows of 8 numbers, of which a line tells two classes apart."""
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 8)).astype(np.float32)
    return x, (x @ random.normal(size=8) > 0).astype(np.int64)


def of_torch(optimizer: Any = None, *, last: Any = None, **options: Any) -> WrappedModel:
    import torch

    torch.manual_seed(0)
    tail = torch.nn.Linear(8, 1) if last is None else last
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Dropout(0.1), tail)
    chosen = torch.optim.Adam(module.parameters(), lr=0.02) if optimizer is None else optimizer
    loss = options.pop("loss", "binary_crossentropy")
    return inferway.wrap(module, loss=loss, optimizer=chosen, metrics=["accuracy"], **options)


def of_keras(**options: Any) -> WrappedModel:
    import keras

    keras.utils.set_random_seed(0)
    model = inferway.wrap(
        keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(8, "relu"),
                keras.layers.Dropout(0.1),
                keras.layers.Dense(1, "sigmoid"),
            ],
            name="line",
        ),
        **options,
    )
    model.compile(optimizer=keras.optimizers.Adam(0.02), loss="binary_crossentropy", metrics=["accuracy"])
    return model


MAKERS = pytest.mark.parametrize("make", [of_torch, of_keras], ids=["torch", "keras"])


def weights(model: WrappedModel) -> list[Array]:
    if hasattr(model.model, "get_weights"):
        return [np.array(array) for array in model.model.get_weights()]
    return [tensor.detach().numpy().copy() for tensor in model.model.state_dict().values()]


def same(left: WrappedModel, right: WrappedModel) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(weights(left), weights(right), strict=True))


# The model itself -----------------------------------------------------------------------------------------------------


def test_everything_of_the_model_is_still_there() -> None:
    model = of_keras()
    assert model.name == "line"
    assert [type(layer).__name__ for layer in model.layers] == ["Dense", "Dropout", "Dense"]
    assert model.count_params() == 81
    model.trainable = False
    assert model.model.trainable_variables == []
    assert "summary" in dir(model)
    assert "deploy" in dir(model)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    assert repr(model) == "<WrappedModel of Sequential 'line', not fitted yet>"


def test_a_module_is_called_as_ever() -> None:
    import torch

    model = of_torch()
    x = torch.zeros(3, 8)
    assert torch.equal(model.eval()(x), model(x))
    assert len(list(model.parameters())) == 4


@MAKERS
def test_training_learns_and_tells_how(make: Any) -> None:
    x, y = line_data()
    model = make()
    history = model.fit(x, y, epochs=12, batch_size=16, validation_split=0.25, seed=1)
    assert model.history is history
    assert set(history.history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert history.steps == 12 * 12
    assert len(history.history["loss"]) == history.epochs == 12
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert history.history["val_accuracy"][-1] > 0.85
    decided = (model.predict(x) > (0.5 if make is of_keras else 0)).reshape(-1)
    assert np.mean(decided == y) > 0.9


def test_keras_returns_from_fit_what_it_always_did() -> None:
    x, y = line_data()
    model, plain = of_keras(), of_keras().model
    import keras

    keras.utils.set_random_seed(3)
    ours = model.fit(x, y, epochs=2, shuffle=False)
    keras.utils.set_random_seed(3)
    theirs = plain.fit(x, y, epochs=2, shuffle=False, batch_size=32, verbose=0)
    assert ours.history.keys() == theirs.history.keys()
    for name, values in theirs.history.items():
        assert ours.history[name] == pytest.approx(values)
    assert ours.epoch == theirs.epoch
    assert model.evaluate(x, y, verbose=0) == pytest.approx(plain.evaluate(x, y, verbose=0))


def test_options_of_keras_reach_it() -> None:
    import keras

    x, y = line_data()
    seen: list[int] = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))
    of_keras().fit(x, y, epochs=2, callbacks=[callback], class_weight={0: 1.0, 1: 2.0})
    assert seen == [0, 1]
    # Weights are shared out as the rows are: only those that are trained on count.
    weighed, alone = of_keras(), of_keras()
    weighed.fit(x, y, seed=1, validation_split=0.5, sample_weight=np.repeat([1.0, 100.0], 120))
    alone.fit(x[:120], y[:120], seed=1)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(weights(weighed), weights(alone), strict=True))


@MAKERS
def test_the_same_seed_gives_the_same_weights(make: Any) -> None:
    x, y = line_data()
    one, two, other = make(), make(), make()
    one.fit(x, y, epochs=2, seed=7)
    two.fit(x, y, epochs=2, seed=7)
    other.fit(x, y, epochs=2, seed=8)
    assert same(one, two)
    assert not same(one, other)


@MAKERS
def test_a_training_that_broke_off_goes_on_as_if_it_had_not(make: Any, tmp_path: Path) -> None:
    x, y = line_data()
    whole, first, second = make(), make(), make()
    expected = whole.fit(x, y, epochs=4, seed=1, validation_split=0.2)
    first.fit(x, y, epochs=2, seed=1, validation_split=0.2, checkpoints=tmp_path)
    found = second.fit(x, y, epochs=4, seed=1, validation_split=0.2, checkpoints=tmp_path)
    assert same(whole, second)
    assert found.resumed_from == 2
    assert found.history == expected.history
    assert found.steps == expected.steps
    assert "resumed after epoch 2" in str(found)
    again = make()
    assert again.fit(x, y, epochs=4, seed=1, validation_split=0.2, checkpoints=tmp_path).steps == expected.steps
    assert same(again, whole)


KILLED = """
import os, signal, sys
from test_wrapper import line_data, of_torch

def die(progress):
    if (progress.epoch, progress.step) == (3, 4):
        os.kill(os.getpid(), signal.SIGKILL)

x, y = line_data()
of_torch().fit(x, y, epochs=4, seed=1, validation_split=0.2, checkpoints=sys.argv[1], progress=die)
"""


def test_a_process_that_was_killed_in_the_middle_loses_the_steps_of_one_epoch(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(kept)], env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    x, y = line_data()
    undisturbed, resumed = of_torch(), of_torch()
    expected = undisturbed.fit(x, y, epochs=4, seed=1, validation_split=0.2)
    found = resumed.fit(x, y, epochs=4, seed=1, validation_split=0.2, checkpoints=kept)
    assert found.resumed_from == 2
    assert same(resumed, undisturbed)
    assert found.history == expected.history


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    x, y = line_data()
    of_torch().fit(x, y, seed=1, checkpoints=tmp_path)
    with pytest.raises(inferway.ConfigurationError, match=r"another training: its rows is 240, this one's is 100"):
        of_torch().fit(x[:100], y[:100], seed=1, checkpoints=tmp_path)
    with pytest.raises(inferway.ConfigurationError, match=r"its seed is 1, this one's is 2"):
        of_torch().fit(x, y, seed=2, checkpoints=tmp_path)
    history = of_torch().fit(x, y, seed=2, checkpoints=CheckpointOptions(str(tmp_path), resume=False))
    assert history.resumed_from == 0
    with pytest.raises(inferway.ConfigurationError, match="every_steps is for strategy='ddp'"):
        of_torch().fit(x, y, checkpoints=CheckpointOptions(str(tmp_path / "other"), every_steps=3))


@MAKERS
def test_early_stopping_ends_and_takes_the_best_back(make: Any, tmp_path: Path) -> None:
    x, y = line_data()
    noise = np.random.default_rng(1).integers(0, 2, 60)  # what cannot be learnt gets worse soon
    model = make()
    history = model.fit(
        x[:180], y[:180], epochs=60, validation_data=(x[180:], noise), early_stopping=2, seed=1, checkpoints=tmp_path
    )
    assert history.stopped == "early"
    assert history.epochs < 60
    assert history.best_epoch == 1 + int(np.argmin(history.history["val_loss"]))
    assert history.epochs == history.best_epoch + 2
    found = model.evaluate(x[180:], noise, **({"return_dict": True, "verbose": 0} if make is of_keras else {}))
    assert found["loss"] == pytest.approx(min(history.history["val_loss"]), rel=1e-4)
    resumed = make()
    again = resumed.fit(
        x[:180], y[:180], epochs=60, validation_data=(x[180:], noise), early_stopping=2, seed=1, checkpoints=tmp_path
    )
    assert (again.epochs, again.stopped, again.best_epoch) == (history.epochs, "early", history.best_epoch)
    assert same(model, resumed)


def test_early_stopping_watches_what_it_is_told_to() -> None:
    x, y = line_data()
    history = of_torch().fit(x, y, epochs=30, early_stopping=EarlyStopping("accuracy", 1, 0.5, "max"), seed=1)
    assert (history.epochs, history.best_epoch) == (2, 1)
    named = of_torch().fit(x, y, epochs=5, validation_split=0.2, early_stopping="val_accuracy", seed=1)
    assert named.best_epoch == 1 + int(np.argmax(named.history["val_accuracy"]))
    with pytest.raises(inferway.ConfigurationError, match="watches 'auc', which is none of loss, accuracy"):
        of_torch().fit(x, y, early_stopping=EarlyStopping("auc"))
    with pytest.raises(inferway.ConfigurationError, match="nothing is validated"):
        of_torch().fit(x, y, early_stopping=True)
    with pytest.raises(inferway.ConfigurationError, match="expects 'min' or 'max'"):
        of_torch().fit(x, y, early_stopping=EarlyStopping("loss", mode="best"))  # type: ignore[arg-type]  # wrong


@MAKERS
def test_progress_is_told_step_by_step(make: Any) -> None:
    x, y = line_data()
    told: list[Progress] = []
    make().fit(x, y, epochs=2, batch_size=100, progress=told.append)
    steps = [(progress.epoch, progress.step, bool(progress.metrics)) for progress in told]
    one = [(1, 1, False), (1, 2, False), (1, 3, False), (1, 3, True)]
    assert steps == [*one, *((2, step, ends) for _, step, ends in one)]
    assert {progress.steps_per_epoch for progress in told} == {3}


@MAKERS
def test_a_training_that_diverges_stops_and_names_the_step(make: Any) -> None:
    x, y = line_data()
    model = make()
    model.fit(x, y, seed=1)
    if make is of_keras:
        model.optimizer.learning_rate = 1e30
    else:
        model = of_torch("sgd")
        model.fit(x, y)
        framework: Any = model._framework
        framework.optimizer.param_groups[0]["lr"] = 1e30
    with pytest.raises(inferway.TrainingDivergedError, match="lower the learning rate") as caught:
        model.fit(x, y, epochs=3)
    assert 1 <= caught.value.step <= 24
    assert caught.value.worker is None
    assert f"at step {caught.value.step}" in str(caught.value)


@MAKERS
def test_rows_that_are_no_numbers_are_named(make: Any) -> None:
    x, y = line_data()
    x[17, 3] = np.nan
    with pytest.raises(inferway.TrainingDivergedError, match=r"'x' holds 1 rows with NaN .* is row 17: fill them"):
        make().fit(x, y)


# Inputs and targets ---------------------------------------------------------------------------------------------------


def test_several_inputs_are_given_by_name_or_in_order() -> None:
    import keras

    x, y = line_data()
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    joined = keras.layers.Dense(1, "sigmoid")(keras.layers.Concatenate()([left, right]))
    model = inferway.wrap(keras.Model([left, right], joined), loss="binary_crossentropy", optimizer="adam")
    named = {"right": x[:, 4:], "left": x[:, :4]}
    model.fit(named, y, epochs=1, seed=1)
    model.fit([x[:, :4], x[:, 4:]], y, epochs=1, seed=1)
    assert np.array_equal(model.predict(named, verbose=0), model.predict([x[:, :4], x[:, 4:]], verbose=0))
    assert {spec.name for spec in model.onnx.inputs} == {"left", "right"}


def test_a_module_of_several_arguments_gets_them_by_name() -> None:
    import torch

    class Two(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def forward(self, left: Any, right: Any) -> Any:
            return self.layer(torch.cat([left, right], dim=1))

    x, y = line_data()
    model = inferway.wrap(Two(), loss="binary_crossentropy", optimizer="adam")
    model.fit((x[:, :4], x[:, 4:]), y, epochs=1)
    assert model.predict({"left": x[:, :4], "right": x[:, 4:]}).shape == (240, 1)
    assert {spec.name for spec in model.onnx.inputs} == {"left", "right"}


def test_losses_of_torch_take_targets_of_either_shape() -> None:
    import torch

    x, y = line_data()
    flat = of_torch(loss=torch.nn.BCEWithLogitsLoss())
    column = of_torch(loss=torch.nn.BCEWithLogitsLoss())
    flat.fit(x, y, seed=1)
    column.fit(x, y[:, None].astype(np.float64), seed=1)
    assert same(flat, column)
    classes = of_torch(loss=torch.nn.CrossEntropyLoss(), last=torch.nn.Linear(8, 2))
    assert classes.fit(x, y, epochs=12, seed=1).last["accuracy"] > 0.85


def wrong(name: str) -> tuple[WrappedModel, dict[str, Any]]:
    import torch

    x, y = line_data()
    three = torch.nn.Linear(8, 3)
    sparse = "sparse_categorical_crossentropy"
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "nothing": (of_torch, {}),
        "no targets": (of_torch, {"x": x}),
        "fewer targets": (of_torch, {"x": x, "y": y[:5]}),
        "fewer targets, split": (of_torch, {"x": x, "y": y[:5], "validation_split": 0.5}),
        "other width": (of_torch, {"x": x[:, :3], "y": y}),
        "two outputs wanted": (of_torch, {"x": x, "y": np.stack([y, y], axis=1)}),
        "no probabilities": (of_torch, {"x": x, "y": y + 3}),
        "class that is not there": (lambda: of_torch(last=three, loss=sparse), {"x": x, "y": y + 2}),
        "one hot": (lambda: of_torch(last=three, loss=sparse), {"x": x, "y": np.eye(3)[y]}),
        "no one hot": (lambda: of_torch(last=three, loss="categorical_crossentropy"), {"x": x, "y": y}),
        "half classes": (lambda: of_torch(last=three, loss=sparse), {"x": x, "y": y + 0.5}),
        "text": (of_torch, {"x": x, "y": np.where(y == 1, "yes", "no")}),
        "NaN target": (of_torch, {"x": x, "y": np.where(np.arange(240) == 9, np.nan, y)}),
        "no array": (of_torch, {"x": 3, "y": y}),
        "several targets": (of_torch, {"x": x, "y": [y, y]}),
        "no rows": (of_torch, {"x": x[:0], "y": y[:0]}),
        "unequal inputs": (of_torch, {"x": {"a": x, "b": x[:3]}, "y": y}),
        "text input": (of_torch, {"x": np.full((240, 8), "a", object), "y": y}),
        "epochs": (of_torch, {"x": x, "y": y, "epochs": 0}),
        "batch size": (of_torch, {"x": x, "y": y, "batch_size": 1.5}),
        "split": (of_torch, {"x": x, "y": y, "validation_split": 2.0}),
        "both validations": (of_torch, {"x": x, "y": y, "validation_split": 0.2, "validation_data": (x, y)}),
        "validation": (of_torch, {"x": x, "y": y, "validation_data": x}),
        "option": (of_torch, {"x": x, "y": y, "callbacks": []}),
        "strategy": (of_torch, {"x": x, "y": y, "strategy": "cluster"}),
        "mode": (of_torch, {"x": x, "y": y, "strategy": "parameter_server", "mode": "chaos"}),
        "mode elsewhere": (of_torch, {"x": x, "y": y, "strategy": "ddp", "mode": "sync"}),
        "workers elsewhere": (of_torch, {"x": x, "y": y, "workers": 2}),
        "staleness elsewhere": (
            of_torch,
            {"x": x, "y": y, "strategy": "parameter_server", "mode": "sync", "staleness": 3},
        ),
        "no workers": (of_torch, {"x": x, "y": y, "strategy": "ddp", "workers": 0}),
        "checkpoints": (of_torch, {"x": x, "y": y, "checkpoints": 3}),
        "not compiled": (lambda: inferway.wrap(torch.nn.Linear(8, 1)), {"x": x, "y": y}),
        "foreign optimizer": (lambda: of_torch(torch.optim.SGD([torch.zeros(1)])), {"x": x, "y": y}),
    }
    make, arguments = cases[name]
    return make(), arguments


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing", inferway.ConfigurationError, r"fit expects rows and targets: fit\(x, y\)"),
        ("no targets", inferway.ConfigurationError, r"fit expects targets too"),
        ("fewer targets", inferway.InvalidInputError, r"x has 240 rows and y has 5"),
        ("fewer targets, split", inferway.InvalidInputError, r"x has 240 rows and y has 5"),
        ("other width", inferway.InvalidInputError, r"cannot take these rows \('x' \(240, 3\)\)"),
        ("two outputs wanted", inferway.InvalidInputError, r"shape \(rows, 1\) with targets of shape \(rows, 2\)"),
        ("no probabilities", inferway.InvalidInputError, r"targets from 0 to 1, got values from 3 to 4; for more than"),
        (
            "class that is not there",
            inferway.InvalidInputError,
            r"3 outputs are for the classes 0 to 2, .* from 2 to 3",
        ),
        ("one hot", inferway.InvalidInputError, r"one class a row.*take categorical_crossentropy"),
        ("no one hot", inferway.InvalidInputError, r"for a class a row take sparse_categorical_crossentropy"),
        ("half classes", inferway.InvalidInputError, r"classes as whole numbers, got"),
        ("text", inferway.InvalidInputError, r"numbers as targets, got text such as .*LabelEncoder"),
        ("NaN target", inferway.InvalidInputError, r"y holds 1 rows that are NaN or infinite, the first is row 9"),
        ("no array", inferway.InvalidInputError, r"expected rows, such as an array \(rows, …\), got int"),
        ("several targets", inferway.ConfigurationError, r"one array of targets; .* model\.model\.fit"),
        ("no rows", inferway.InvalidInputError, r"x has no rows"),
        ("unequal inputs", inferway.InvalidInputError, r"different numbers of rows: 'a' 240, 'b' 3"),
        ("text input", inferway.InvalidInputError, r"x expects numbers, got text"),
        ("epochs", inferway.ConfigurationError, r"epochs expects a whole number of at least 1, got 0"),
        ("batch size", inferway.ConfigurationError, r"batch_size expects a whole number of at least 1, got 1.5"),
        ("split", inferway.ConfigurationError, r"validation_split expects a share between 0 and 1, got 2.0"),
        ("both validations", inferway.ConfigurationError, r"not both"),
        ("validation", inferway.ConfigurationError, r"validation_data expects a pair"),
        ("option", inferway.ConfigurationError, r"knows no 'callbacks'"),
        ("strategy", inferway.ConfigurationError, r"'local', 'ddp', 'parameter_server', got 'cluster'"),
        ("mode", inferway.ConfigurationError, r"'sync', 'async', 'ssp', got 'chaos'"),
        ("mode elsewhere", inferway.ConfigurationError, r"mode does not belong to strategy='ddp'"),
        ("workers elsewhere", inferway.ConfigurationError, r"workers does not belong to strategy='local'"),
        ("staleness elsewhere", inferway.ConfigurationError, r"staleness belongs to mode='ssp'"),
        ("no workers", inferway.ConfigurationError, r"workers expects a whole number, got 0"),
        ("checkpoints", inferway.ConfigurationError, r"a folder or CheckpointOptions, got int"),
        ("not compiled", inferway.ConfigurationError, r"with a loss and an optimizer: wrap\(module, loss="),
        ("foreign optimizer", inferway.ConfigurationError, r"none of the module's parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.replace(" ", "").replace(",", "").isalnum() else "",
)
def test_what_cannot_be_trained_is_said_before_it_is(name: str, error: type[Exception], message: str) -> None:
    model, arguments = wrong(name)
    with pytest.raises(error, match=message):
        model.fit(**arguments)


def test_a_keras_model_says_what_it_expects() -> None:
    import keras

    x, y = line_data()
    with pytest.raises(inferway.ConfigurationError, match=r"not compiled: call model.compile\("):
        inferway.wrap(keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])).fit(x, y)
    with pytest.raises(inferway.InvalidInputError, match=r"\('x' \(240, 3\)\); expected \(None, 8\)"):
        of_keras().fit(x[:, :3], y)
    with pytest.raises(inferway.InvalidInputError, match=r"targets of shape \(rows, 2\)"):
        of_keras().fit(x, np.eye(2)[y])


def test_what_cannot_be_wrapped_is_named() -> None:
    import keras
    import torch
    from sklearn.linear_model import LogisticRegression

    with pytest.raises(inferway.UnknownFrameworkError, match=r"got builtins.int"):
        inferway.wrap(3)
    with pytest.raises(inferway.ConfigurationError, match="wrapped already"):
        inferway.wrap(of_torch())
    with pytest.raises(inferway.ConfigurationError, match="got the layer Dense"):
        inferway.wrap(keras.layers.Dense(1))
    with pytest.raises(inferway.ConfigurationError, match="an ONNX model cannot be trained"):
        inferway.wrap("model.onnx")
    with pytest.raises(inferway.ConfigurationError, match="there is no optimizer 'fastest'; there are adam"):
        inferway.wrap(torch.nn.Linear(1, 1), loss="mse", optimizer="fastest")
    with pytest.raises(inferway.ConfigurationError, match="there is no loss 'best'"):
        inferway.wrap(torch.nn.Linear(1, 1), loss="best", optimizer="adam")
    with pytest.raises(inferway.ConfigurationError, match="loss belongs to models of Keras and PyTorch"):
        inferway.wrap(LogisticRegression(), loss="mse")


# Estimators -----------------------------------------------------------------------------------------------------------


def test_an_estimator_is_fitted_as_ever_and_measured() -> None:
    from sklearn.linear_model import LogisticRegression, Ridge

    x, y = line_data()
    model = inferway.wrap(LogisticRegression())
    history = model.fit(x, y, validation_split=0.25)
    assert set(history.history) == {"accuracy", "val_accuracy"}
    assert model.score(x, y) == pytest.approx(model.evaluate(x, y)["accuracy"])
    assert np.array_equal(model.predict(x), model.model.predict(x))
    assert model.onnx.classes == (0, 1)
    line = inferway.wrap(Ridge()).fit(x, x[:, 0] * 2)
    assert line.last["r2"] > 0.99


def test_an_estimator_has_no_epochs_and_no_gradients() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = line_data()
    for arguments, message in (
        ({"strategy": "ddp"}, "an estimator has no gradients to share"),
        ({"epochs": 3}, "there are no epochs"),
        ({"checkpoints": "somewhere"}, "checkpoints belongs to models of Keras and PyTorch"),
        ({"early_stopping": "loss"}, "early_stopping belongs to models of Keras and PyTorch"),
    ):
        with pytest.raises(inferway.ConfigurationError, match=message):
            inferway.wrap(LogisticRegression()).fit(x, y, **arguments)
    with pytest.raises(inferway.InvalidInputError, match=r"LogisticRegression\.fit: .*NaN"):
        inferway.wrap(LogisticRegression()).fit(np.full_like(x, np.nan), y)
    with pytest.raises(inferway.InvalidInputError, match="x has 240 rows and y has 7"):
        inferway.wrap(LogisticRegression()).fit(x, y[:7])


def test_a_seed_reaches_every_random_state_that_was_left_open() -> None:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = line_data()
    one, two = (inferway.wrap(RandomForestClassifier(5, max_depth=2)) for _ in range(2))
    one.fit(x, y, seed=4)
    two.fit(x, y, seed=4)
    assert np.array_equal(one.predict_proba(x), two.predict_proba(x))
    piped = inferway.wrap(make_pipeline(StandardScaler(), MLPClassifier((4,), max_iter=300, solver="lbfgs")))
    piped.fit(x, y, seed=4)
    assert piped.model[-1].random_state == 4


# Optimisers -----------------------------------------------------------------------------------------------------------


def test_optimisers_of_torch_are_read_in_numbers() -> None:
    import torch

    def spec(make: Any) -> OptimizerSpec:
        return of_torch(make)._framework.optimizer_spec()

    assert spec(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)) == OptimizerSpec(
        "sgd", 0.1, momentum=0.9, nesterov=True
    )
    adam = spec(lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.99)))
    assert adam == OptimizerSpec("adam", 0.01, beta1=0.8, beta2=0.99, epsilon=1e-8, epsilon_in="corrected")
    assert spec(lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)).weight_decay == 0.1
    for make, message in (
        (torch.optim.RMSprop, r"SGD \(momentum, nesterov\), Adam and AdamW, not RMSprop"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "weight_decay of Adam .*AdamW has it"),
        (lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1), "weight_decay of SGD"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad of Adam"),
        (lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:]}], 0.1), "one group of parameters, got 2"),
    ):
        with pytest.raises(inferway.ConfigurationError, match=message):
            spec(make)


def test_optimisers_of_keras_are_read_in_numbers() -> None:
    import keras

    def spec(optimizer: Any) -> OptimizerSpec:
        model = of_keras()
        model.compile(optimizer=optimizer, loss="mse")
        return model._framework.optimizer_spec()

    sgd = spec(keras.optimizers.SGD(0.5, momentum=0.9, nesterov=True))
    assert sgd == OptimizerSpec("sgd", 0.5, momentum=0.9, nesterov=True)
    adam = spec(keras.optimizers.Adam(0.25, beta_1=0.5))
    assert (adam.kind, adam.learning_rate, adam.beta1, adam.epsilon, adam.epsilon_in) == (
        "adam",
        0.25,
        0.5,
        1e-7,
        "raw",
    )
    assert spec(keras.optimizers.AdamW(weight_decay=0.5)).weight_decay == 0.5
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    for optimizer, message in (
        (keras.optimizers.Nadam(), "Adam and AdamW, not Nadam"),
        (keras.optimizers.Adam(clipnorm=1.0), "clipnorm of Adam"),
        (keras.optimizers.Adam(weight_decay=0.1), r"not Adam with weight_decay \(AdamW has it\)"),
        (keras.optimizers.SGD(schedule), "a schedule is not among"),
    ):
        with pytest.raises(inferway.ConfigurationError, match=message):
            spec(optimizer)


# Optimising and exporting ---------------------------------------------------------------------------------------------


def test_what_was_never_fitted_is_not_deployed() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = line_data()
    for model in (of_torch(), of_keras(), inferway.wrap(LogisticRegression())):
        for step in (model.deploy, model.optimize, lambda model=model: model.onnx):
            with pytest.raises(inferway.ModelNotBuiltError, match=r"never fitted: call fit\(x, y\) first"):
                step()
    elsewhere = of_torch(fitted=True)
    with pytest.raises(inferway.ConfigurationError, match=r"fitted elsewhere.*give example=x\[:8\]"):
        _ = elsewhere.onnx
    assert elsewhere.to_onnx(x[:8]).run(x[:3])["y"].shape == (3, 1)
    assert "fitted before" in repr(elsewhere)
    known = inferway.wrap(LogisticRegression().fit(x, y))
    assert known.to_onnx(x[:8]).framework == "sklearn"


@pytest.mark.slow
def test_an_optimised_model_of_older_weights_is_not_deployed_silently() -> None:
    x, y = line_data()
    model = of_torch()
    model.fit(x, y, epochs=3, validation_split=0.2, seed=1)
    with pytest.raises(inferway.ConfigurationError, match=r"not optimised: call optimize\(\) first"):
        model.to_onnx(optimized=True)
    report = model.optimize(techniques=["static_int8", "structured"], rounds=3)
    assert {candidate.technique for candidate in report.measured} >= {"static_int8", "structured"}
    assert model.onnx is report.model
    assert np.allclose(model.to_onnx(optimized=False).run(x[:5])["y"], model.predict(x[:5]), atol=1e-5)
    model.fit(x, y, seed=2)
    for step in (model.deploy, lambda: model.onnx):
        with pytest.raises(inferway.StaleModelError, match=r"call optimize\(\) again, or deploy\(optimized=False\)"):
            step()
    assert np.allclose(model.to_onnx(optimized=False).run(x[:5])["y"], model.predict(x[:5]), atol=1e-5)
    model.optimize(techniques=["static_int8"], rounds=3)
    assert model.onnx.outputs


@pytest.mark.slow
def test_the_metric_of_optimising_follows_the_loss() -> None:
    import torch

    x, _ = line_data()
    model = of_torch(loss="mse")
    model.fit(x, x[:, 0] * 2, epochs=2, seed=1)
    report = model.optimize(techniques=["fp16"], rounds=3)
    assert "mse" in str(report)
    measured = model.optimize((x[:50], x[:50, 0]), techniques=["fp16"], rounds=3)
    assert "50" in str(measured)
    assert torch.is_grad_enabled()


@pytest.mark.slow
@pytest.mark.tensorflow
def test_keras_on_tensorflow_trains_resumes_and_exports(tmp_path: Path) -> None:
    program = """
        import numpy as np, keras, inferway
        random = np.random.default_rng(0)
        x = random.normal(size=(200, 8)).astype(np.float32)
        y = (x @ random.normal(size=8) > 0).astype(np.int64)
        def make():
            keras.utils.set_random_seed(0)
            layers = [keras.Input((8,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1, "sigmoid")]
            model = inferway.wrap(keras.Sequential(layers))
            model.compile(optimizer=keras.optimizers.Adam(0.02), loss="binary_crossentropy", metrics=["accuracy"])
            return model
        one, two, three = make(), make(), make()
        one.fit(x, y, epochs=3, seed=1)
        two.fit(x, y, epochs=3, seed=1)
        print("same", all(np.array_equal(a, b) for a, b in zip(one.get_weights(), two.get_weights())))
        three.fit(x, y, epochs=1, seed=1, checkpoints="kept")
        print("resumed", three.fit(x, y, epochs=12, seed=1, checkpoints="kept").resumed_from)
        print("learnt", three.history.last["accuracy"] > 0.85)
        print("exported", np.abs(three.onnx.predict(x) - three.predict(x, verbose=0)).max() < 1e-5)
        three.optimizer.learning_rate = 1e30
        try:
            three.fit(x, y, epochs=3)
        except inferway.TrainingDivergedError as error:
            print("diverged", error.step > 0)
    """
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = ["same True", "resumed 1", "learnt True", "exported True", "diverged True"]
    assert done.stdout.splitlines() == expected
