"""A gateway and its model directory: what is broken, what changes, what an operator loads."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
from live import LiveGateway, run_gateway
from models import ModelFiles

ADD_ONE = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}


def index(gateway: LiveGateway) -> dict[tuple[str, str], tuple[str, str]]:
    entries = gateway.call("POST", "/v2/repository/index", b"")[1]
    return {(e["name"], e["version"]): (e["state"], e["reason"]) for e in entries}


def infer(gateway: LiveGateway, model: str, body: Any = ADD_ONE) -> tuple[int, Any]:
    status, answer, _ = gateway.call("POST", f"/v2/models/{model}/infer", body)
    return status, answer


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_broken_model_harms_no_other_and_says_what_is_wrong(tmp_path: Path) -> None:
    broken = models.corrupt()
    repository = models.write_repository(tmp_path / "models", {"good": models.add_one(), **broken})
    (repository / "no_version").mkdir()
    models.write_repository(repository, {"config": ModelFiles({1: models.add_one()}, config="max_batch_size: what")})
    with run_gateway(repository, tmp_path / "state", wait=False) as gateway:
        until(lambda: index(gateway).get(("good", "1"), ("", ""))[0] == "READY")
        until(lambda: all(state != "LOADING" for state, _ in index(gateway).values()))
        assert infer(gateway, "good")[0] == 200
        states = index(gateway)
        for name in [*broken, "no_version", "config"]:
            found = [entry for (model, _), entry in states.items() if model == name]
            assert found, name
            for state, reason in found:
                assert state == "UNAVAILABLE"
                assert reason.startswith(f"failed to load '{name}'")
                assert str(tmp_path) not in reason
            status, answer = infer(gateway, name)
            assert (status, answer["code"]) == (503, "model_not_ready")
            assert gateway.call("GET", f"/v2/models/{name}/ready")[0] == 503
        status, answer, _ = gateway.call("GET", "/v2/health/ready", key=None)
        assert (status, answer["code"], answer["live"], answer["ready"]) == (503, "model_not_ready", True, False)
        assert gateway.call("GET", "/v2/health/live", key=None)[0] == 200


def test_lenient_readiness_is_that_of_the_server(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"good": models.add_one(), **models.corrupt()})
    with run_gateway(repository, tmp_path / "state", "--no-strict-readiness") as gateway:
        assert infer(gateway, "good")[0] == 200


def test_an_empty_repository_is_ready(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with run_gateway(tmp_path / "models", tmp_path / "state") as gateway:
        assert gateway.call("GET", "/v2/models")[1] == {"models": []}


def test_polling_follows_what_is_added_changed_broken_and_removed(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"a": models.add_one()})
    with run_gateway(repository, tmp_path / "state", "--model-control", "poll", "--poll-interval-s", "0.05") as gateway:
        assert infer(gateway, "a")[1]["outputs"][0]["data"] == [2.0] * 16
        models.write_repository(repository, {"b": models.add_one()})
        until(lambda: infer(gateway, "b")[0] == 200)

        models.write_repository(repository, {"a": {2: models.add_one(increment=5.0)}})
        until(lambda: infer(gateway, "a")[1].get("model_version") == "2")
        assert infer(gateway, "a")[1]["outputs"][0]["data"] == [6.0] * 16
        status, answer, _ = gateway.call("POST", "/v2/models/a/versions/1/infer", ADD_ONE)
        assert status == 404, answer  # the policy is to serve the latest alone

        (repository / "b" / "1" / "model.onnx").write_bytes(b"no model")
        until(lambda: "failed" in index(gateway)["b", "1"][1])
        assert infer(gateway, "b")[0] == 200  # the old one serves on

        shutil.rmtree(repository / "a")
        until(lambda: infer(gateway, "a")[0] == 404)
        status, answer, _ = gateway.call("POST", "/v2/repository/models/b/unload", b"")
        assert status == 409
        assert "polling" in answer["error"]


def test_what_cannot_be_loaded_takes_nothing_that_serves_out_of_service(tmp_path: Path) -> None:
    kept = ModelFiles({1: models.add_one()}, config="max_batch_size: 4")
    repository = models.write_repository(tmp_path / "models", {"a": kept, "b": models.add_one()})
    config = repository / "a" / "config.pbtxt"
    with run_gateway(repository, tmp_path / "state", "--model-control", "poll", "--poll-interval-s", "0.05") as gateway:

        def serves(version: str) -> None:
            assert infer(gateway, "a")[1]["model_version"] == version
            assert gateway.call("GET", "/v2/health/ready", key=None)[0] == 200

        config.write_text("max_batch_si")  # as an editor leaves it half-way
        until(lambda: "config.pbtxt" in index(gateway)["a", "1"][1])
        assert index(gateway)["a", "1"][0] == "READY"
        serves("1")
        config.write_text("max_batch_size: 4")
        until(lambda: index(gateway)["a", "1"] == ("READY", ""))

        models.write_repository(repository, {"a": {2: models.add_one()[:60]}})  # a copy that is not complete
        until(lambda: index(gateway).get(("a", "2"), ("", ""))[0] == "UNAVAILABLE")
        serves("1")
        models.write_repository(repository, {"a": {2: models.add_one(increment=5.0)}})
        until(lambda: index(gateway).get(("a", "2")) == ("READY", ""))
        until(lambda: ("a", "1") not in index(gateway))
        serves("2")


def test_an_operator_loads_reloads_and_unloads(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"a": models.add_one(), "b": models.add_one()})
    with run_gateway(repository, tmp_path / "state", "--model-control", "explicit", "--load-model", "a") as gateway:
        assert infer(gateway, "a")[0] == 200
        status, answer = infer(gateway, "b")
        assert (status, answer["code"]) == (503, "model_not_ready")
        assert "unloaded" in answer["error"]

        assert gateway.call("POST", "/v2/repository/models/b/load", b"")[0] == 200
        assert infer(gateway, "b")[0] == 200

        (repository / "b" / "1" / "model.onnx").write_bytes(models.add_one(increment=3.0))
        assert infer(gateway, "b")[1]["outputs"][0]["data"] == [2.0] * 16
        assert gateway.call("POST", "/v2/repository/models/b/load", b"{}")[0] == 200
        assert infer(gateway, "b")[1]["outputs"][0]["data"] == [4.0] * 16

        (repository / "b" / "1" / "model.onnx").write_bytes(b"")
        status, answer, _ = gateway.call("POST", "/v2/repository/models/b/load", b"")
        assert status == 400
        assert answer["error"].startswith("failed to load 'b'")
        assert infer(gateway, "b")[1]["outputs"][0]["data"] == [4.0] * 16

        for _ in range(2):
            body = {"parameters": {"unload_dependents": True}}
            assert gateway.call("POST", "/v2/repository/models/b/unload", body)[0] == 200
        assert infer(gateway, "b")[0] == 503
        assert gateway.call("POST", "/v2/repository/models/nobody/load", b"")[0] == 400
        assert gateway.call("POST", "/v2/repository/models/nobody/unload", b"")[0] == 404


def test_a_request_whose_body_arrives_across_a_reload_is_answered_by_the_new_one(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"a": models.identity("FP32")})
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 100_000], "parameters": {"binary_data_size": 400_000}}
    head = json.dumps({"inputs": [tensor]}).encode()
    body = head + bytes(400_000)
    with run_gateway(repository, tmp_path / "state", "--model-control", "explicit", "--load-model", "a") as gateway:
        for action in ("load", "unload"):
            connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
            with contextlib.closing(connection):
                connection.putrequest("POST", "/v2/models/a/infer")
                connection.putheader("Authorization", f"Bearer {gateway.admin_key}")
                connection.putheader("Content-Length", str(len(body)))
                connection.putheader("Inference-Header-Content-Length", str(len(head)))
                connection.endheaders()
                connection.send(body[:300_000])  # the route has chosen a version by now
                (repository / "a" / "1" / "model.onnx").write_bytes(models.identity("FP32"))
                assert gateway.call("POST", f"/v2/repository/models/a/{action}", b"")[0] == 200
                connection.send(body[300_000:])
                response = connection.getresponse()
                answer = json.loads(response.read())
            if action == "load":
                assert response.status == 200, answer
            else:
                assert (response.status, answer["code"]) == (503, "model_not_ready")
                assert "unloaded" in answer["error"]


def test_a_load_may_bring_its_configuration(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"a": models.add_one()})
    with run_gateway(repository, tmp_path / "state", "--model-control", "explicit") as gateway:
        body: dict[str, Any] = {"parameters": {"config": '{"max_batch_size": 3}'}}
        assert gateway.call("POST", "/v2/repository/models/a/load", body)[0] == 200
        assert gateway.call("GET", "/v2/models/a/config")[1]["max_batch_size"] == 3
        for parameters in ({"config": "{"}, {"config": 3}, {"config": "[]"}, {"config": '{"max_batch_size": "x"}'}):
            status, answer, _ = gateway.call("POST", "/v2/repository/models/a/load", {"parameters": parameters})
            assert status == 400, answer
        status, answer, _ = gateway.call("POST", "/v2/repository/models/a/load", {"parameters": {"file:1/x": "AA=="}})
        assert (status, answer["code"]) == (501, "unsupported")
        assert infer(gateway, "a")[0] == 200


def test_without_model_control_nothing_is_loaded_by_request(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"a": models.add_one()})
    with run_gateway(repository, tmp_path / "state") as fixed:
        status, answer, _ = fixed.call("POST", "/v2/repository/models/a/load", b"")
        assert (status, answer["code"]) == (409, "conflict")
        assert "explicit" in answer["error"]
