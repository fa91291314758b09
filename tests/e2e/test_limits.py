"""What the gateway refuses, gives up and bounds, on a live one and over a socket."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from live import LiveGateway, run_gateway
from models import ModelFiles

QUEUE = """
dynamic_batching { default_queue_policy { max_queue_size: 2 } priority_levels: 2 default_priority_level: 2 }
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
STEPS_OF_A_SECOND = 400_000
"""Trips of the slow model's loop; some seconds on any machine."""


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway with low limits and models that are slow on demand."""
    root = tmp_path_factory.mktemp("limited")
    repository = models.write_repository(
        root / "models",
        {
            "add_one": models.add_one(),
            "slow": models.slow(),
            "queue": ModelFiles({1: models.slow()}, config=QUEUE),
            "short": ModelFiles({1: models.slow()}, toml="run_timeout_s = 0.2\n"),
            "endless": models.endless(),
            "picky": models.fails_on_negative(),
        },
    )
    environment = {"INFERWAY_BODY_LIMIT_BYTES": "100000", "INFERWAY_JSON_LIMIT_BYTES": "20000"}
    options = ["--model-control", "explicit"]
    for name in ("add_one", "slow", "queue", "short", "picky"):
        options += ["--load-model", name]
    with run_gateway(repository, root / "state", *options, environment=environment) as running:
        yield running


def slow_body(steps: int, **members: Any) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64},
            {"name": "steps", "datatype": "INT64", "shape": [], "data": [steps]},
        ],
        **members,
    }


def add_one_body(rows: int = 1) -> dict[str, Any]:
    data = [1.0] * (16 * rows)
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 16], "data": data}]}


def test_a_body_over_the_limit_is_413(limited: LiveGateway) -> None:
    status, answer, _ = limited.call("POST", "/v2/models/add_one/infer", b" " * 100_001)
    assert (status, answer["code"]) == (413, "payload_too_large")
    assert "100000" in answer["error"]


def test_json_over_its_own_limit_is_413_and_points_at_binary(limited: LiveGateway) -> None:
    status, answer, _ = limited.call("POST", "/v2/models/add_one/infer", add_one_body(400))
    assert (status, answer["code"]) == (413, "payload_too_large")
    assert "binary" in answer["error"]
    head = json.dumps(
        {
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [400, 16], "parameters": {"binary_data_size": 25_600}}
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    body = head + np.ones((400, 16), np.float32).tobytes()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    assert limited.call("POST", "/v2/models/add_one/infer", body, headers=headers)[0] == 200


def test_a_deadline_ends_the_wait_and_the_run(limited: LiveGateway) -> None:
    began = time.monotonic()
    status, answer, headers = limited.call(
        "POST", "/v2/models/slow/infer", slow_body(100 * STEPS_OF_A_SECOND), headers={"Inferway-Timeout-Ms": "150"}
    )
    assert (status, answer["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - began < 10
    assert headers["X-Should-Retry"] == "false"
    assert limited.call("POST", "/v2/models/slow/infer", slow_body(1))[0] == 200


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "", "9" * 20])
def test_a_deadline_that_is_no_number_is_400(limited: LiveGateway, value: str) -> None:
    status, answer, _ = limited.call(
        "POST", "/v2/models/slow/infer", slow_body(1), headers={"Inferway-Timeout-Ms": value}
    )
    assert (status, answer["code"]) == (400, "invalid_parameter")


def test_a_deadline_of_nothing_is_504_at_once(limited: LiveGateway) -> None:
    status, answer, _ = limited.call(
        "POST", "/v2/models/slow/infer", slow_body(1), headers={"Inferway-Timeout-Ms": "0"}
    )
    assert (status, answer["code"]) == (504, "deadline_exceeded")


def test_a_run_past_the_models_limit_is_ended(limited: LiveGateway) -> None:
    began = time.monotonic()
    status, answer, _ = limited.call("POST", "/v2/models/short/infer", slow_body(100 * STEPS_OF_A_SECOND))
    assert (status, answer["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - began < 10
    assert "0.2 s" in answer["error"]


def test_a_full_queue_is_503_with_a_time_to_come_back(limited: LiveGateway) -> None:
    gate = threading.Barrier(9)
    results: list[tuple[int, Any, Any]] = []

    def call() -> None:
        gate.wait()
        headers = {"Inferway-Timeout-Ms": "1500"}
        results.append(
            limited.call("POST", "/v2/models/queue/infer", slow_body(50 * STEPS_OF_A_SECOND), headers=headers)
        )

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.wait()
    for thread in threads:
        thread.join()
    refused = [r for r in results if r[0] == 503]
    assert len(results) == 8
    assert refused, [r[0] for r in results]
    for _, answer, headers in refused:
        assert answer["code"] == "queue_full"
        assert int(headers["Retry-After"]) >= 1
        assert headers["X-Should-Retry"] == "true"
    assert {r[0] for r in results} <= {503, 504}


def test_a_caller_that_leaves_gives_its_place_up(limited: LiveGateway) -> None:
    body = json.dumps(slow_body(100 * STEPS_OF_A_SECOND)).encode()
    request = (
        f"POST /v2/models/queue/infer HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {limited.admin_key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body

    def running() -> tuple[int, int]:
        text = limited.call("GET", "/v2/models/queue/stats")[1]["model_stats"][0]
        return text["inference_stats"]["fail"]["count"], text["inference_stats"]["success"]["count"]

    failed, succeeded = running()
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", limited.port)) as connection:
            connection.sendall(request)
            time.sleep(0.2)  # long enough to be at work; the test holds whether it is or not
    end = time.monotonic() + 20
    while running() != (failed + 2, succeeded):
        assert time.monotonic() < end, running()
        time.sleep(0.02)
    assert limited.call("POST", "/v2/models/queue/infer", slow_body(1))[0] == 200


def test_a_request_that_fails_in_the_model_is_500_and_its_neighbours_succeed(limited: LiveGateway) -> None:
    gate = threading.Barrier(8)
    results: dict[int, tuple[int, Any]] = {}

    def call(i: int) -> None:
        data = [1.0, 2.0, 3.0, -1.0 if i == 3 else 4.0]
        gate.wait()
        status, answer, _ = limited.call(
            "POST",
            "/v2/models/picky/infer",
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data}]},
        )
        results[i] = status, answer

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[3][0] == 500
    assert results[3][1]["code"] == "model_failed"
    for i in set(range(8)) - {3}:
        assert results[i][0] == 200, results[i]
        assert results[i][1]["outputs"][0]["data"] == [1.0, 2.0, 3.0, 4.0]


def test_an_endless_model_is_served_without_stopping_anything(limited: LiveGateway) -> None:
    assert limited.call("POST", "/v2/repository/models/endless/load", b"")[0] == 200
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}]}
    headers = {"Inferway-Timeout-Ms": "300"}
    status, answer, _ = limited.call("POST", "/v2/models/endless/infer", body, headers=headers)
    assert (status, answer["code"]) == (504, "deadline_exceeded")
    assert limited.call("POST", "/v2/models/add_one/infer", add_one_body())[0] == 200
    assert limited.call("POST", "/v2/repository/models/endless/unload", b"")[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v2/models/nobody/infer", {}, 404, "model_not_found"),
        ("/v2/models/add_one/versions/7/infer", {}, 404, "version_not_found"),
        ("/v2/models/add_one/versions/x/infer", {}, 404, "version_not_found"),
        ("/v2/models/add_one/versions/" + "9" * 30 + "/infer", {}, 404, "version_not_found"),
        ("/v2/models/add_one/infer", b"", 400, "malformed_request"),
        ("/v2/models/add_one/infer", b"[" * 19_000, 400, "malformed_request"),
        ("/v2/models/add_one/infer", {"inputs": []}, 400, "invalid_tensor"),
        ("/v2/repository/index", b"nonsense", 400, "malformed_request"),
        ("/v2/repository/index", {"ready": 1}, 400, "malformed_request"),
        ("/v2/repository/other/index", b"", 501, "unsupported"),
        ("/v2/nowhere", b"", 404, "not_found"),
    ],
)
def test_what_cannot_be_answered_says_why(limited: LiveGateway, path: str, body: Any, status: int, code: str) -> None:
    got, answer, headers = limited.call("POST", path, body, headers={"X-Request-Id": "mine-1"})
    assert (got, answer["code"]) == (status, code), answer
    assert set(answer) == {"error", "code", "request_id"}
    assert answer["request_id"] == headers["X-Request-Id"] == "mine-1"
    assert headers["Content-Type"] == "application/json"


def test_an_unknown_encoding_says_which_are_known(limited: LiveGateway) -> None:
    status, answer, headers = limited.call(
        "POST", "/v2/models/add_one/infer", b"{}", headers={"Content-Encoding": "br"}
    )
    assert (status, answer["code"]) == (501, "unsupported_encoding")
    assert headers["Accept-Encoding"] == "gzip, deflate"


def test_a_request_id_that_could_harm_a_log_is_replaced(limited: LiveGateway) -> None:
    _, _, headers = limited.call("GET", "/v2", headers={"X-Request-Id": "a b{}"})
    assert headers["X-Request-Id"] != "a b{}"


def test_an_answer_says_where_its_time_went(limited: LiveGateway) -> None:
    _, _, headers = limited.call("POST", "/v2/models/add_one/infer", add_one_body())
    stages = [part.strip().split(";dur=") for part in headers["Server-Timing"].split(",")]
    assert [name for name, _ in stages] == ["parse", "queue", "assemble", "run", "serialise"]
    assert all(float(duration) >= 0 for _, duration in stages)


def test_a_gateway_that_others_could_reach_does_not_start_without_keys(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    command = [sys.executable, "-m", "inferway_gateway", "serve", str(tmp_path / "models"), "--port", "0"]
    command += ["--host", "0.0.0.0", "--state-dir", str(tmp_path / "state")]
    for option in ([], ["--no-auth"]):
        done = subprocess.run([*command, *option], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "refusing to listen on 0.0.0.0" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("keyless")
    repository = models.write_repository(root / "models", {"add_one": models.add_one()})
    with run_gateway(repository, root / "state", "--no-auth") as open_gateway:
        yield open_gateway


def test_without_authentication_everything_is_open_on_loopback(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"add_one": models.add_one()})
    with run_gateway(repository, tmp_path / "state", "--no-auth") as open_gateway:
        assert open_gateway.call("POST", "/v2/models/add_one/infer", add_one_body(), key=None)[0] == 200
        assert open_gateway.call("GET", "/api/v1/keys", key=None)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost.evil.example:8080"},
    ],
    ids=str,
)
def test_without_authentication_a_web_page_can_do_nothing(keyless: LiveGateway, headers: dict[str, str]) -> None:
    for method, path, body in (
        ("POST", "/api/v1/keys", {"name": "page", "scopes": ["admin"]}),
        ("POST", "/v2/models/add_one/infer", add_one_body()),
        ("GET", "/v2/models", None),
    ):
        status, answer, _ = keyless.call(method, path, body, key=None, headers=headers)
        assert (status, answer["code"]) == (403, "permission_denied")


@pytest.mark.parametrize("host", ["localhost", "LocalHost:1", "127.0.0.1", "[::1]:8080", "models.localhost"])
def test_without_authentication_this_machine_is_answered_by_its_names(keyless: LiveGateway, host: str) -> None:
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert keyless.call("GET", "/v2/models", key=None, headers=headers)[0] == 200


def test_a_gateway_that_is_open_on_purpose_is_answered_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with run_gateway(tmp_path / "models", tmp_path / "state", "--no-auth", "--insecure") as wide_open:
        assert wide_open.call("GET", "/v2/models", key=None, headers={"Host": "models.example"})[0] == 200
        page = {"Host": "models.example", "Origin": "http://evil.example"}
        assert wide_open.call("GET", "/v2/models", key=None, headers=page)[0] == 403
