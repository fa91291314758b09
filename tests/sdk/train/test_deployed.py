"""From training to answers: deployed models are called through a live gateway with what they were trained on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import inferway
from inferway import Inferway
from live import LiveGateway, run_gateway

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("deployed")]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway without models."""
    root = tmp_path_factory.mktemp("deployed")
    (root / "models").mkdir()
    with run_gateway(root / "models", root / "state") as gateway:
        yield gateway


@pytest.fixture
def client(running: LiveGateway) -> Iterator[Inferway]:
    with Inferway(running.url, api_key=running.admin_key) as client:
        yield client


def guests(rows: int = 120) -> tuple[pd.DataFrame, Any]:
    random = np.random.default_rng(0)
    age = random.integers(18, 90, rows).astype(float)
    city = random.choice(["Lima", "Oslo"], rows).astype(object)
    y = ((age > 50) ^ (city == "Oslo")).astype(int)
    age[::7], city[::5] = np.nan, None
    return pd.DataFrame({"age": age, "city": city}), y


def columns() -> ColumnTransformer:
    texts = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    return ColumnTransformer(
        [("age", make_pipeline(SimpleImputer(), StandardScaler()), ["age"]), ("city", texts, ["city"])]
    )


def network(**options: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1), torch.nn.Sigmoid())
    return inferway.wrap(module, loss="binary_crossentropy", optimizer="adam", metrics=["accuracy"], **options)


def test_a_network_with_preprocessing_is_called_with_raw_columns(client: Inferway) -> None:
    frame, y = guests()
    model = network(preprocessing=columns(), name="guests")
    model.fit(frame, y, epochs=2, seed=0, validation_split=0.2)
    deployed = model.deploy(client=client, labels={"by": "me"}, metadata={"note": "first"})
    assert (deployed.name, deployed.version) == ("guests", 1)
    assert np.allclose(deployed.predict(frame), model.predict(frame), atol=1e-5)
    assert deployed.infer(frame[:2]).model_version == "1"
    with pytest.raises(inferway.InvalidInputError, match="no column 'city'"):
        deployed.predict(frame[["age"]])
    record = client.models.version("guests", 1)
    assert record.labels == {"by": "me", "framework": "torch"}
    metadata: Any = record.metadata
    assert metadata["note"] == "first"
    assert metadata["metrics"] == pytest.approx(model.history.last)
    assert metadata["training"] == {"strategy": "local", "epochs": 2, "steps": 6, "rows": 96}
    assert metadata["columns"] == ["age", "city"]
    assert metadata["verification"]["cases"] == 3
    assert any(file.path == "golden.json" for file in record.files)
    again = model.deploy(client=client, labels={"by": "me"}, metadata={"note": "first"})
    assert again.version == 1
    assert again.deployment.reused
    model.fit(frame, y, epochs=2, seed=1)
    assert model.deploy(client=client).version == 2
    client.models.delete("guests")


def test_an_estimator_answers_with_its_labels(client: Inferway) -> None:
    frame, y = guests()
    kinds = np.array(["old", "young"])[y]
    model = inferway.wrap(LogisticRegression(), preprocessing=columns())
    model.fit(frame, kinds)
    with model.deploy(client=client) as deployed:
        assert deployed.name == "logistic-regression"
        assert list(deployed.predict(frame)) == list(model.predict(frame))
        probabilities = deployed.infer(frame)["probabilities"]
    assert np.allclose(probabilities, model.predict_proba(frame), atol=1e-5)
    client.models.delete("logistic-regression")


@pytest.mark.slow
def test_what_optimising_chose_is_what_is_deployed(client: Inferway) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 3)).astype(np.float32)
    y = (x.sum(axis=1) > 0).astype(int)
    model = network(name="chosen")
    model.fit(x, y, epochs=2, seed=0, validation_split=0.3)
    report = model.optimize(techniques=["static_int8"], objective="size", max_drop=1.0, rounds=3)
    deployed = model.deploy(client=client)
    assert np.allclose(deployed.predict(x), report.model.predict(x), atol=1e-6)
    metadata: Any = client.models.version("chosen", 1).metadata
    assert metadata["optimized"] == report.chosen.name
    plain = model.deploy("plain", client, optimized=False)
    assert np.allclose(plain.predict(x), model.predict(x), atol=1e-5)
    assert "optimized" not in client.models.version("plain", 1).metadata
    for name in ("chosen", "plain"):
        client.models.delete(name)


def test_the_gateway_comes_from_the_environment(
    running: LiveGateway, client: Inferway, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, y = guests()
    model = inferway.wrap(LogisticRegression(), preprocessing=columns(), name="from here")
    model.fit(frame, y)
    monkeypatch.setenv("INFERWAY_BASE_URL", running.url)
    monkeypatch.setenv("INFERWAY_API_KEY", running.admin_key)
    with model.deploy() as deployed:
        assert deployed.name == "from-here"
        assert repr(deployed) == f"<DeployedModel from-here version 1 at {running.url}>"
        assert len(deployed.predict(frame)) == 120
    with pytest.raises(inferway.ClientClosedError):
        deployed.predict(frame)
    client.models.delete("from-here")
    monkeypatch.setenv("INFERWAY_API_KEY", "ifw_wrong")
    with pytest.raises(inferway.AuthenticationError):
        model.deploy()
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("INFERWAY_BASE_URL", nobody)
    with pytest.raises(inferway.APIConnectionError, match=f"could not connect to {nobody}") as caught:
        model.deploy()
    assert caught.value.__notes__ == ["start a gateway with `inferway serve`, or say where one is in INFERWAY_BASE_URL"]


def test_models_deploy_takes_a_wrapped_model_as_it_is(client: Inferway) -> None:
    frame, y = guests()
    model = network(preprocessing=columns())
    model.fit(frame, y, epochs=1, seed=0)
    deployment = client.models.deploy(model, name="handed-over")
    record = client.models.version("handed-over", deployment.version)
    metadata: Any = record.metadata
    assert metadata["metrics"].keys() == {"loss", "accuracy"}
    client.models.delete("handed-over")
