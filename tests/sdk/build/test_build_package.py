"""``inferway.package``, and deploying what it and ``to_onnx`` give to a real gateway."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import inferway
import models
from inferway import ConfigurationError, DeploymentFailedError, Inferway
from inferway._package import Offer, offer_of
from live import LiveGateway, run_gateway
from optimizing import mlp, rows

FLOWERS, NUMBERS = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])
MODEL = LogisticRegression(max_iter=500).fit(FLOWERS, NAMES[NUMBERS])


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "models").mkdir()
    with run_gateway(folder / "models", folder / "state") as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> Iterator[Inferway]:
    with Inferway(gateway.url, api_key=gateway.admin_key) as client:
        yield client


def test_a_packaged_model_is_deployed_with_labels_metadata_golden_examples_and_classes(
    gateway: LiveGateway, client: Inferway, tmp_path: Path
) -> None:
    made = inferway.package(
        MODEL, tmp_path / "iris", example=FLOWERS, name="iris", labels={"team": "botany"},
        metrics={"accuracy": np.float32(0.5)}, metadata={"rows": 150},
    )  # fmt: skip
    assert list(made.files) == ["classes.txt", "config.pbtxt", "golden.json", "inferway-package.json", "model.onnx"]
    for given in (made, made.path):
        record = client.models.deploy(given, name="iris").version_record
        assert record is not None
        assert record.labels == {"framework": "sklearn", "team": "botany"}
        assert record.metadata["metrics"] == {"accuracy": 0.5}
        assert record.metadata["rows"] == 150
        assert record.metadata["source"]["digest"].startswith("sha256:")
        assert record.metadata["verification"]["cases"] == 6
    assert (client.infer("iris", FLOWERS)["label"] == MODEL.predict(FLOWERS)).all()
    asked = {
        "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP64", "data": FLOWERS[0].tolist()}],
        "outputs": [{"name": "probabilities", "parameters": {"classification": 1}}],
    }
    _, answer, _ = gateway.call("POST", "/v2/models/iris/infer", asked)
    assert answer["outputs"][0]["data"][0].endswith(":0:setosa")


def test_the_command_line_deploys_a_package(gateway: LiveGateway, client: Inferway, tmp_path: Path) -> None:
    made = inferway.package(MODEL, tmp_path / "iris", example=FLOWERS)
    command = [sys.executable, "-m", "inferway_gateway", "deploy", str(made.path), "--name", "shell", "--quiet"]
    key = tmp_path / "key"
    key.write_text(gateway.admin_key)
    key.chmod(0o600)
    done = subprocess.run(
        [*command, "--url", gateway.url, "--api-key-file", str(key), "--label", "team=me"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = client.models.versions("shell")[0]
    assert record.labels == {"framework": "sklearn", "team": "me"}


def test_an_exported_model_is_deployed_as_it_is_and_what_is_said_wins(client: Inferway) -> None:
    made = inferway.to_onnx(MODEL, FLOWERS)
    record = client.models.deploy(
        made, name="direct", labels={"framework": "mine"}, metadata={"source": "here"}
    ).version_record
    assert record is not None
    assert record.labels == {"framework": "mine"}
    assert record.metadata["source"] == "here"
    assert record.metadata["classes"] == NAMES.tolist()
    assert [file.path for file in record.files] == ["golden.json", "model.onnx"]
    with pytest.raises(DeploymentFailedError, match="golden_mismatch"):
        client.models.deploy(made, name="direct", golden=[(FLOWERS[:1], {"label": ["virginica"]})])


def test_a_package_whose_graph_is_another_does_not_go_into_service(client: Inferway, tmp_path: Path) -> None:
    made = inferway.package(MODEL, tmp_path / "iris", example=FLOWERS)
    other = LogisticRegression(C=0.001).fit(FLOWERS, NAMES[NUMBERS])
    inferway.to_onnx(other, FLOWERS).save(made.path / "model.onnx")
    with pytest.raises(DeploymentFailedError, match="golden example 1"):
        client.models.deploy(made, name="changed")


def test_the_same_model_makes_the_same_folder(tmp_path: Path) -> None:
    one = inferway.package(MODEL, tmp_path / "one", example=FLOWERS)
    two = inferway.package(MODEL, tmp_path / "two", example=FLOWERS)
    assert all((one.path / name).read_bytes() == (two.path / name).read_bytes() for name in one.files)
    facts = json.loads((one.path / "inferway-package.json").read_text())
    assert facts["signature"]["inputs"] == [{"name": "x", "datatype": "FP64", "shape": [-1, 4]}]
    [example] = json.loads((one.path / "golden.json").read_text())["examples"]
    assert example["inputs"][0]["shape"] == [8, 4]
    assert example["rtol"] == 1e-3
    assert example["atol"] >= 1e-5
    assert str(tmp_path) not in (one.path / "inferway-package.json").read_text()
    assert "golden.json" in str(one)
    assert "golden.json" in one._repr_html_()


def test_golden_examples_are_as_many_as_asked_for_or_as_given(tmp_path: Path) -> None:
    none = inferway.package(MODEL, tmp_path / "none", example=FLOWERS, golden=0)
    assert "golden.json" not in none.files
    own = inferway.package(MODEL, tmp_path / "own", example=FLOWERS, golden=[(FLOWERS[:2], {"label": NAMES[[0, 0]]})])
    [example] = json.loads((own.path / "golden.json").read_text())["examples"]
    assert [tensor["name"] for tensor in example["outputs"]] == ["label"]


def test_onnx_is_packaged_with_classes_of_its_scores(tmp_path: Path) -> None:
    data = inferway.to_onnx(MODEL, FLOWERS).to_bytes()
    made = inferway.package(data, tmp_path / "iris", example=FLOWERS[:3], classes=["a", "b\nc", "d"])
    assert (made.path / "classes.txt").read_text() == "a\nb c\nd\n"
    with pytest.raises(ConfigurationError, match=r"2 classes need one output of shape \[-1, 2\]"):
        inferway.package(data, tmp_path / "other", classes=["a", "b"])


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"files of other origin, 'notes.txt'"):
        inferway.package(models.add_one(), tmp_path)
    made = inferway.package(models.add_one(), tmp_path / "new")
    with pytest.raises(ConfigurationError, match="has a package already; give overwrite=True"):
        inferway.package(models.add_one(), made.path)
    assert inferway.package(models.add_one(), made.path, overwrite=True).files["model.onnx"] > 0
    with pytest.raises(ConfigurationError, match="to be a folder, and it is a file"):
        inferway.package(models.add_one(), tmp_path / "notes.txt")


def test_a_package_of_a_report_has_its_golden_examples_and_what_it_knows(client: Inferway, tmp_path: Path) -> None:
    report = inferway.optimize(
        mlp(), rows(40, 16), techniques=["static_int8/minmax"], objective="size", rounds=3, batch_sizes=(1,)
    )
    offer = report.__inferway_source__()
    made = inferway.package(report, tmp_path / "small", labels={"team": "botany"}, metadata={"rows": 150})
    assert made.labels == {**offer.labels, "team": "botany"}
    assert made.metadata == {**offer.metadata, "rows": 150}
    assert made.labels["optimised"] == "static-int8-minmax"
    ((_, outputs, room),) = report.golden
    (kept,) = json.loads((made.path / "golden.json").read_text())["examples"]
    assert kept["outputs"][0]["data"] == pytest.approx(outputs["logits"][:8].ravel().tolist())
    assert kept["atol"] == room["atol"]
    few = inferway.package(report, tmp_path / "few", golden=2)
    (kept,) = json.loads((few.path / "golden.json").read_text())["examples"]
    assert kept["inputs"][0]["shape"] == [2, 16]
    assert inferway.package(report, tmp_path / "bare", golden=0).files.keys() == made.files.keys() - {"golden.json"}
    record = client.models.deploy(made, name="small").version_record
    assert record is not None
    assert record.labels == made.labels
    assert record.metadata == made.metadata
    for folder in (tmp_path / "again", made.path):
        again = inferway.package(made, folder, overwrite=True)
        assert (again.labels, again.metadata, again.files) == (made.labels, made.metadata, made.files)


def test_what_knows_its_model_gives_it(tmp_path: Path) -> None:
    class Report:
        model = inferway.to_onnx(MODEL, FLOWERS)

        def __inferway_source__(self) -> Offer:
            return Offer(b"", {"from": "report"})

    assert inferway.package(Report(), tmp_path / "report").model is Report.model
    assert offer_of(Report()).labels == {"from": "report"}
    assert offer_of(b"bytes") == Offer(b"bytes")


def test_facts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    made = inferway.package(models.add_one(), tmp_path / "m")
    for text in ("no json", '{"labels": 3}', "[]"):
        (made.path / "inferway-package.json").write_text(text)
        with pytest.raises(ConfigurationError, match=r"inferway-package\.json"):
            offer_of(made.path)
