"""``fit`` over several processes: the weights come back into the user's own model."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import inferway
from inferway.train.job import Progress
from inferway.train.wrapper import WrappedModel

pytestmark = [pytest.mark.ray, pytest.mark.torch, pytest.mark.xdist_group("ray")]


def data(rows: int = 192) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 8)).astype(np.float32)
    return x, (x @ random.normal(size=8) > 0).astype(np.int64)


def of_torch(loss: Any = "binary_crossentropy") -> WrappedModel:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
    return inferway.wrap(module, loss=loss, optimizer=optimizer, metrics=["accuracy"])


def of_keras() -> WrappedModel:
    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.Input((8,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1, "sigmoid")]
    model = inferway.wrap(keras.Sequential(layers))
    model.compile(optimizer=keras.optimizers.Adam(0.02), loss="binary_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("strategy", ["ddp", "parameter_server"])
def test_distributed_training_gives_what_local_training_gives(strategy: Any) -> None:
    x, y = data()
    alone, spread = of_torch(), of_torch()
    expected = alone.fit(x, y, epochs=3, seed=5, validation_split=0.25)
    told: list[Progress] = []
    arguments: dict[str, Any] = {"servers": 2, "mode": "sync"} if strategy == "parameter_server" else {}
    found = spread.fit(
        x, y, epochs=3, seed=5, validation_split=0.25, strategy=strategy, workers=2, progress=told.append, **arguments
    )
    assert np.allclose(spread.predict(x), alone.predict(x), atol=1e-4)
    assert found.strategy == strategy
    assert (found.epochs, found.steps) == (expected.epochs, expected.steps)
    assert found.history["val_loss"] == pytest.approx(expected.history["val_loss"], abs=1e-4)
    assert spread.history is found
    assert told[-1].epoch == 3
    assert spread.onnx.verification is not None


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    "arguments", [{"mode": "ssp", "staleness": 2}, {"mode": "async", "compression": "fp16"}], ids=["ssp", "async"]
)
def test_a_keras_model_predicts_with_what_the_servers_learnt(arguments: dict[str, Any]) -> None:
    x, y = data()
    model = of_keras()
    history = model.fit(
        x, y, epochs=10, batch_size=16, validation_split=0.25, strategy="parameter_server", workers=2, **arguments
    )
    assert history.history["val_accuracy"][-1] > 0.8
    decided = model.predict(x, verbose=0).reshape(-1) > 0.5
    assert np.mean(decided == y) > 0.8
    assert "parameter_server" in str(history)
    if arguments["mode"] == "ssp":
        assert history.facts["max_staleness"] <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("strategy", ["ddp", "parameter_server"])
def test_preprocessing_reaches_the_workers_and_the_graph(strategy: Any) -> None:
    import torch

    x, y = data()
    frame = pd.DataFrame(x[:, :3], columns=["a", "b", "c"]).assign(town=np.where(y > 0, "Oslo", "Lima"))
    frame.loc[::7, "a"] = np.nan
    columns = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["a", "b", "c"]),
            ("town", OneHotEncoder(handle_unknown="ignore", sparse_output=False), ["town"]),
        ]
    )
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 1)
    sgd = torch.optim.SGD(module.parameters(), lr=0.2)
    model = inferway.wrap(module, loss="binary_crossentropy", optimizer=sgd, preprocessing=columns)
    model.fit(frame, y, epochs=6, batch_size=16, strategy=strategy, workers=2, progress=False)
    answers = model.predict(frame)
    # That the town was seen: nothing else tells the classes apart this well.
    assert np.mean((answers.reshape(-1) > 0) == y) > 0.95
    assert np.allclose(next(iter(model.onnx.run(frame).values())), answers, atol=1e-5)


def test_what_the_strategy_does_not_know_is_refused_before_ray_starts() -> None:
    x, y = data()
    with pytest.raises(inferway.ConfigurationError, match="fit knows no 'speed' with strategy='ddp'"):
        of_torch().fit(x, y, strategy="ddp", speed=3)
    with pytest.raises(inferway.ConfigurationError, match="compression does not belong to strategy='ddp'"):
        of_torch().fit(x, y, strategy="ddp", compression="fp16")


def test_without_ray_the_message_has_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(inferway.MissingExtraError, match=r"pip install 'inferway\[ray\]'"):
        of_torch().fit(x, y, strategy="parameter_server")


def test_without_scikit_learn_the_message_has_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(inferway.MissingExtraError, match=r"pip install 'inferway\[train\]'"):
        inferway.wrap(of_torch().model, loss="mse", optimizer="adam", preprocessing=object())
