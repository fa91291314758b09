"""Pipelines on a real gateway."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import inferway
import models
from inferway import Inferway, RetryPolicy
from live import LiveGateway, run_gateway

LIMIT_S = 30.0

TWICE = """
[[steps]]
name = "one"
model = "add_one"
inputs = { x = "x" }
[[steps]]
name = "two"
model = "add_one/versions/1"
inputs = { x = "one.y" }
"""
# Named so that it comes before everything that it needs.
BOTH = """
[outputs]
sum = "arithmetic.OUTPUT0"
difference = "arithmetic.OUTPUT1"
[[steps]]
name = "arithmetic"
model = "simple"
inputs = { INPUT0 = "a", INPUT1 = "same.y" }
[[steps]]
name = "same"
model = "whole"
inputs = { x = "b" }
"""
CLASSIFY = """
[[steps]]
name = "scale"
model = "a-pipeline"
inputs = { x = "x" }
[[steps]]
name = "classify"
model = "wide_classifier"
inputs = { x = "scale.y" }
"""
ENSEMBLE = """
platform: "ensemble"
input { name: "RAW" data_type: TYPE_FP32 dims: [-1, 16] }
output { name: "DONE" data_type: TYPE_FP32 dims: [-1, 16] }
ensemble_scheduling {
  step { model_name: "add_one" input_map { key: "x" value: "RAW" } output_map { key: "y" value: "HALF" } }
  step { model_name: "add_one" input_map { key: "x" value: "HALF" } output_map { key: "y" value: "DONE" } }
}
"""


def write_pipeline(repository: Path, name: str, text: str, version: int = 1) -> None:
    folder = repository / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pipeline.toml").write_text(text)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("pipelines")
    repository = models.write_repository(
        root / "models",
        {
            "add_one": models.add_one(),
            "simple": models.add_sub(),
            "whole": models.identity("INT32", ("batch", 16)),
            "wide_classifier": models.classifier(16),
            "picky": models.fails_on_negative(16),
            "an-ensemble": models.ModelFiles({}, config=ENSEMBLE),
        },
    )
    (repository / "an-ensemble" / "1").mkdir(parents=True)
    write_pipeline(repository, "a-pipeline", TWICE)
    write_pipeline(repository, "a-sum", BOTH)
    write_pipeline(repository, "a-class", CLASSIFY)
    write_pipeline(repository, "a-picky", TWICE.replace('"add_one/versions/1"', '"picky"'))
    names = sorted(path.name for path in repository.iterdir())
    loads = [option for name in names for option in ("--load-model", name)]
    with run_gateway(repository, root / "state", "--model-control", "explicit", *loads) as running:
        yield running


@pytest.fixture(scope="module")
def client(live: LiveGateway) -> Iterator[Inferway]:
    with Inferway(live.url, api_key=live.make_key("infer", "read", models=["a-*"])) as made:
        yield made


def test_a_pipeline_is_called_like_a_model(client: Inferway) -> None:
    result = client.infer("a-pipeline", {"x": np.zeros((3, 16), np.float32)})
    np.testing.assert_array_equal(result["y"], np.full((3, 16), 2, np.float32))
    found = client.models.get("a-pipeline")
    assert found.platform == "inferway_pipeline"
    assert [(spec.name, spec.datatype, spec.shape) for spec in found.inputs] == [("x", "FP32", (-1, 16))]


def test_outputs_have_the_names_that_they_were_given(client: Inferway) -> None:
    a, b = np.arange(16, dtype=np.int32)[None], np.full((1, 16), 2, np.int32)
    result = client.infer("a-sum", {"a": a, "b": b})
    np.testing.assert_array_equal(result["sum"], a + b)
    np.testing.assert_array_equal(result["difference"], a - b)


def test_a_pipeline_in_a_pipeline_gives_what_its_models_give(client: Inferway, live: LiveGateway) -> None:
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    result = client.infer("a-class", {"x": x})
    with Inferway(live.url, api_key=live.admin_key) as admin:
        alone = admin.infer("wide_classifier", {"x": x + 2})
    np.testing.assert_array_equal(result["label"], alone["label"])
    np.testing.assert_allclose(result["probabilities"], alone["probabilities"], rtol=1e-6)


def test_an_ensemble_of_triton_is_served(live: LiveGateway) -> None:
    with Inferway(live.url, api_key=live.admin_key) as admin:
        assert admin.models.get("an-ensemble").platform == "ensemble"
        assert admin.infer("an-ensemble", {"RAW": np.zeros((2, 16), np.float32)})["DONE"].tolist() == [[2.0] * 16] * 2


def test_a_key_need_not_see_the_models_of_the_steps(client: Inferway) -> None:
    with pytest.raises(inferway.ModelNotFoundError):
        client.infer("add_one", {"x": np.zeros((1, 16), np.float32)})


def test_many_callers_each_get_their_own_rows(client: Inferway) -> None:
    def call(i: int) -> bool:
        rows = 1 + i % 3
        result = client.infer("a-pipeline", {"x": np.full((rows, 16), i, np.float32)})
        return bool(np.array_equal(result["y"], np.full((rows, 16), i + 2, np.float32)))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(call, range(200)))


def test_an_error_names_the_step(client: Inferway) -> None:
    with pytest.raises(inferway.ModelFailedError, match=r"step 'two' \(picky version 1\)"):
        client.infer("a-picky", {"x": np.full((1, 16), -5, np.float32)})


def test_without_a_model_it_is_not_ready_and_says_which(live: LiveGateway, client: Inferway) -> None:
    def ready() -> tuple[int, object]:
        status, answer, _ = live.call("GET", "/v2/models/a-picky/ready")
        return status, answer

    assert ready()[0] == 200
    assert live.call("POST", "/v2/repository/models/picky/unload")[0] == 200
    try:
        status, answer = ready()
        assert status == 503
        assert "step 'two' needs picky: " in str(answer)
        _, index, _ = live.call("POST", "/v2/repository/index")
        (entry,) = [entry for entry in index if entry["name"] == "a-picky"]
        assert entry["state"] == "UNAVAILABLE"
        assert "step 'two' needs picky" in entry["reason"]
        with pytest.raises(inferway.ModelNotReadyError, match="step 'two' needs picky"):
            client.with_options(retry=RetryPolicy(attempts=1)).infer("a-picky", {"x": np.zeros((1, 16), np.float32)})
    finally:
        assert live.call("POST", "/v2/repository/models/picky/load")[0] == 200
    assert ready()[0] == 200
    client.infer("a-picky", {"x": np.zeros((1, 16), np.float32)})


def test_the_steps_show_in_the_metrics_to_those_who_see_the_pipeline(live: LiveGateway, client: Inferway) -> None:
    client.infer("a-pipeline", {"x": np.zeros((1, 16), np.float32)})
    wanted = 'inferway_pipeline_step_seconds_count{model="a-pipeline",step="two",version="1"}'
    _, text, _ = live.call("GET", "/metrics")
    assert wanted in str(text)
    _, text, _ = live.call("GET", "/metrics", key=live.make_key("read", models=["simple"]))
    assert "a-pipeline" not in str(text)


def test_a_wrong_pipeline_is_refused_with_its_place(live: LiveGateway) -> None:
    write_pipeline(live.repository, "a-wrong", TWICE.replace('"add_one/versions/1"', '"simple"'))
    status, answer, _ = live.call("POST", "/v2/repository/models/a-wrong/load")
    assert status == 400
    assert answer["error"].startswith("failed to load 'a-wrong'")
    assert "step 'two', input 'x': simple has no such input, expected one of 'INPUT0', 'INPUT1'" in answer["error"]


def test_a_pipeline_waits_for_a_model_that_comes_later(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"simple": models.add_sub()})
    write_pipeline(repository, "a-pipeline", TWICE)
    with run_gateway(
        repository, tmp_path / "state", "--model-control", "poll", "--poll-interval-s", "0.2", wait=False
    ) as gateway:
        end = time.monotonic() + LIMIT_S
        while "step 'one' needs add_one: there is none such" not in "".join(gateway.log):
            assert time.monotonic() < end, gateway.log
            time.sleep(0.02)
        models.write_repository(repository, {"add_one": models.add_one()})
        gateway.wait_until_ready()
        with Inferway(gateway.url, api_key=gateway.make_key("infer")) as client:
            assert client.infer("a-pipeline", {"x": np.zeros((1, 16), np.float32)})["y"][0, 0] == 2


def deploy_folder(tmp_path: Path, **files: str) -> Path:
    folder = tmp_path / "package"
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def test_a_pipeline_is_deployed_over_models_that_were_deployed(live: LiveGateway, tmp_path: Path) -> None:
    text = TWICE.replace('"add_one"', '"d-first@stable"').replace('"add_one/versions/1"', '"d-second"')
    with Inferway(live.url, api_key=live.make_key("deploy", "infer", "read", models=["d-*"])) as client:
        client.models.deploy(models.add_one(), name="d-first")
        client.models.deploy(models.add_one(increment=10.0), name="d-second")
        client.models.deploy(deploy_folder(tmp_path, pipeline=text), name="d-pipeline")
        x = np.zeros((1, 16), np.float32)
        assert client.infer("d-pipeline", {"x": x})["y"][0, 0] == 11
        client.models.deploy(models.add_one(increment=100.0), name="d-second")
        assert client.infer("d-pipeline", {"x": x})["y"][0, 0] == 101
        client.models.delete("d-second")
        with pytest.raises(inferway.ModelNotReadyError, match="step 'two' needs d-second: there is none such"):
            client.with_options(retry=RetryPolicy(attempts=1)).infer("d-pipeline", {"x": x})
        status, answer, _ = live.call("GET", "/v2/models/d-pipeline/ready")
        assert status == 503, answer


def test_a_pipeline_over_a_model_that_its_deployer_does_not_see_is_refused(live: LiveGateway, tmp_path: Path) -> None:
    key = live.make_key("deploy", "infer", "read", models=["e-*"])
    with (
        Inferway(live.url, api_key=key) as client,
        pytest.raises(inferway.ModelRejectedError, match="step 'one' needs add_one: there is none such"),
    ):
        client.models.deploy(deploy_folder(tmp_path, pipeline=TWICE), name="e-pipeline")


def test_a_deployed_pipeline_that_does_not_fit_fails_with_its_place(live: LiveGateway, tmp_path: Path) -> None:
    text = TWICE.replace('"add_one/versions/1"', '"simple"')
    with (
        Inferway(live.url, api_key=live.admin_key) as client,
        pytest.raises(inferway.DeploymentFailedError, match="step 'two', input 'x': simple has no such input"),
    ):
        client.models.deploy(deploy_folder(tmp_path, pipeline=text), name="f-pipeline")
