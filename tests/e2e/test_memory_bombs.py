"""Requests and models that ask for more memory than there is, sent to a gateway."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inferway
import models
from deploying import begin, deploy, infer, watch
from inferway import Inferway
from live import LiveGateway, run_gateway

MIB = 1 << 20
LIMIT_S = 30.0
BOMBS = {
    "4-gib": [1 << 30],
    "4-tib": [1 << 40],
    "more-bytes-than-can-be-counted": [1 << 62],
    "more-elements-than-can-be-counted": [1 << 31] * 3,
    "a-larger-answer-than-may-be-given": [80_000_000],
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("bombs")
    resident = models.write_repository(root / "models", {"resident": models.fill()})
    with run_gateway(resident, root / "state") as gateway:
        deploy(gateway, "fill", models.fill())
        deploy(gateway, "other", models.add_one())
        yield gateway


def ask(gateway: LiveGateway, shape: list[int], model: str = "fill") -> tuple[int, Any]:
    tensor = {"name": "shape", "datatype": "INT64", "shape": [len(shape)], "data": shape}
    status, answer, headers = gateway.call("POST", f"/v2/models/{model}/infer", {"inputs": [tensor]})
    if status == 400:
        assert headers["X-Should-Retry"] == "false"
    return status, answer


def own_bytes(gateway: LiveGateway) -> int:
    """Of the gateway's process alone."""
    text = Path(f"/proc/{gateway.process.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon:")).split()[1]) * 1024


def metric(gateway: LiveGateway, name: str) -> float:
    lines = gateway.call("GET", "/metrics")[1].splitlines()
    return float(next(x for x in lines if x.startswith(f'inferway_worker_{name}{{model="fill"')).split()[1])


def test_a_request_that_stands_for_too_much_is_refused_and_costs_nothing(live: LiveGateway) -> None:
    assert ask(live, [4])[0] == 200
    before, warm = own_bytes(live), metric(live, "resident_bytes")
    for _ in range(3):
        for shape in BOMBS.values():
            status, answer = ask(live, shape)
            assert (status, answer["code"]) == (400, "run_too_large"), answer
            assert infer(live, "other") == (200, 2.0, "1")
    assert ask(live, [2])[1]["outputs"][0]["data"] == [0, 0]
    assert own_bytes(live) - before < 20 * MIB
    assert metric(live, "crashes_total") == metric(live, "kills_total") == metric(live, "restarts_total") == 0
    # What the runtime keeps of an answer that it computed in vain, it keeps until another process takes its place.
    end = time.monotonic() + LIMIT_S
    while metric(live, "resident_bytes") > 2 * warm:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert ask(live, [2])[0] == 200


@pytest.mark.parametrize("name", [name for name in BOMBS if name.startswith("more")])
def test_it_is_the_same_in_the_gateways_own_process(live: LiveGateway, name: str) -> None:
    status, answer = ask(live, BOMBS[name], "resident")
    assert (status, answer["code"]) == (400, "run_too_large"), answer
    assert "ask for less at once" in answer["error"]


def test_the_client_is_told_by_name(live: LiveGateway) -> None:
    with Inferway(live.url, api_key=live.admin_key) as client:
        with pytest.raises(
            inferway.BadRequestError, match="takes more memory for this request than it may have"
        ) as told:
            client.infer("fill", {"shape": np.array([1 << 40])})
        assert told.value.code == "run_too_large"


def test_a_model_that_takes_too_much_to_load_is_refused_and_costs_nothing(live: LiveGateway) -> None:
    """4 GiB of constants, which some runtimes fold while they load and others compute in a run, here the golden one."""
    bomb = models.model(
        [
            models.node("ConstantOfShape", ["size"], ["ones"]),
            models.node("MatMul", ["ones", "ones"], ["product"]),
            models.node("ReduceSum", ["product"], ["total"], keepdims=0),
            models.node("Add", ["x", "total"], ["y"]),
        ],
        [models.value("x", models.F32, ["batch", 4])],
        [models.value("y", models.F32, ["batch", 4])],
        {"size": np.array([1 << 15, 1 << 15])},
    )
    row = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}
    golden = json.dumps({"examples": [{"inputs": [row], "outputs": [{**row, "name": "y"}]}]}).encode()
    before = own_bytes(live)
    status, answer = begin(live, "bomb", {"model.onnx": bomb, "golden.json": golden})
    assert status == 202, answer
    ended, _ = watch(live, answer)
    assert ended["state"] == "failed"
    assert ended["failed_step"] in ("loaded", "warmed", "compared")
    assert ended["error"]["code"] in ("model_load_failed", "memory_exceeded", "golden_mismatch", "deadline_exceeded")
    assert own_bytes(live) - before < 20 * MIB
    assert infer(live, "other") == (200, 2.0, "1")
    assert live.call("GET", "/api/v1/models/bomb")[0] == 404
