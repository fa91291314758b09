"""What the gateway takes through the API, and what it refuses before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import TensorProto

from crafted_models import CRAFTED
from deploying import begin, deploy, watch
from live import LiveGateway, run_gateway
from models import add_one, model, node, value

UPPER = model(
    [node("StringUpper", ["x"], ["y"], domain="ai.onnx.contrib")],
    [value("x", TensorProto.STRING, ["n"])],
    [value("y", TensorProto.STRING, ["n"])],
    domains={"ai.onnx.contrib": 1},
)

REFUSED = [
    "parent-folder", "memory-address", "itself", "missing-data", "cut-off-data", "overlap", "in-subgraph",
    "sparse-bomb", "laughing-functions", "custom-domain", "unknown-ir-version", "unknown-opset", "wrong-shape",
    "deep-subgraph", "truncated", "pickle", "polyglot",
]  # fmt: skip


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("admission")
    (root / "models").mkdir()
    environment = {"INFERWAY_EXTENSIONS_MODELS": "ocr-*,upper"}
    with run_gateway(root / "models", root / "state", environment=environment) as running:
        yield running


@pytest.mark.parametrize("name", REFUSED)
def test_a_crafted_model_ends_its_deployment_and_nothing_else(live: LiveGateway, tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    CRAFTED[name].build(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    key = live.make_key("deploy", "read", "infer")
    status, deployment = begin(live, "crafted", files, key=key)
    assert status == 202, deployment
    ended, _ = watch(live, deployment, key=key)
    assert ended["state"] == "failed"
    assert ended["failed_step"] == "admitted"
    assert ended["error"]["code"] == "model_rejected"
    assert f"(rule: {CRAFTED[name].rule})" in ended["error"]["message"]
    assert live.call("GET", "/api/v1/models/crafted", key=key)[0] == 404


def test_models_that_the_operator_named_may_use_the_extensions_and_others_may_not(live: LiveGateway) -> None:
    key = live.make_key("deploy", "read", "infer")
    deploy(live, "upper", UPPER, key=key)
    body = {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [2], "data": ["abc", "x"]}]}
    status, answer, _ = live.call("POST", "/v2/models/upper/infer", body, key=key)
    assert (status, answer["outputs"][0]["data"]) == (200, ["ABC", "X"])

    asked = {"config": {"session": {"extensions": True}}}
    _, deployment = begin(live, "other", {"model.onnx": UPPER}, key=key, **asked)
    ended, _ = watch(live, deployment, key=key)
    assert ended["failed_step"] == "admitted"
    assert "extensions_models" in ended["error"]["message"]


def test_a_name_that_is_allowed_more_still_serves_ordinary_models(live: LiveGateway) -> None:
    key = live.make_key("deploy", "read", "infer")
    deploy(live, "ocr-plain", add_one(), key=key)
    assert live.call("GET", "/v2/models/ocr-plain/ready", key=key)[0] == 200
