"""Several front processes before one that holds the models: real processes, real sockets."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from live import LiveGateway, run_gateway
from models import ModelFiles

WAIT_S = 20.0
ADD_ONE = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}
SLOW = "[session]\ninline = false\n"
HELD = "dynamic_batching { max_queue_delay_microseconds: 400000 preferred_batch_size: [ 3 ] }\nmax_batch_size: 8"


def until(condition: Callable[[], bool], why: Callable[[], object] = lambda: "") -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.02)


def fronts_of(gateway: LiveGateway) -> list[int]:
    """Process ids of the fronts: children of the owner that run this package's ``front``."""
    found = []
    for task in Path(f"/proc/{gateway.process.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if b"inferway_gateway.front" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
    return sorted(found)


class Connection:
    """A connection that stays, and which front it reached."""

    def __init__(self, gateway: LiveGateway, key: str | None = None) -> None:
        self.http = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=WAIT_S)
        self._headers = {"Authorization": f"Bearer {key or gateway.admin_key}"}
        self.front = ""
        self.closes = False

    def infer(self, model: str = "add_one", body: Any = ADD_ONE, **headers: str) -> tuple[int, Any]:
        self.http.request("POST", f"/v2/models/{model}/infer", json.dumps(body), {**self._headers, **headers})
        response = self.http.getresponse()
        # Each process makes ids with a beginning of its own.
        self.front = (response.getheader("X-Request-Id") or "").partition("-")[0]
        self.closes = response.getheader("Connection") == "close"
        return response.status, json.loads(response.read())

    def close(self) -> None:
        self.http.close()


@contextlib.contextmanager
def one_connection_to_each(gateway: LiveGateway, count: int) -> Iterator[list[Connection]]:
    found: dict[str, Connection] = {}
    made: list[Connection] = []
    try:
        while len(found) < count:
            assert len(made) < 200
            connection = Connection(gateway)
            made.append(connection)
            status, answer = connection.infer()
            assert status == 200, answer
            found.setdefault(connection.front, connection)
        yield list(found.values())
    finally:
        for connection in made:
            connection.close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("fronts")
    repository = models.write_repository(
        folder / "models",
        {
            "add_one": models.add_one(),
            "held": ModelFiles({1: models.add_one()}, config=HELD, toml=SLOW),
            "text": models.concat_text(),
            "slow": ModelFiles({1: models.slow()}, toml=SLOW),
        },
    )
    (folder / "tmp").mkdir()
    with run_gateway(repository, folder / "state", "--workers", "3", environment={"TMPDIR": str(folder / "tmp")}) as it:
        yield it


def stats(gateway: LiveGateway, model: str) -> Any:
    return gateway.call("GET", f"/v2/models/{model}/stats")[1]["model_stats"][0]


def test_requests_of_all_fronts_share_a_batch(gateway: LiveGateway) -> None:
    with one_connection_to_each(gateway, 3) as connections, ThreadPoolExecutor(3) as pool:
        for _ in range(3):  # a thread may come late, on a machine with other work
            before = stats(gateway, "held")
            answers = list(pool.map(lambda c: c.infer("held"), connections))
            assert [status for status, _ in answers] == [200] * 3
            after = stats(gateway, "held")
            assert after["inference_count"] - before["inference_count"] == 3
            if after["execution_count"] - before["execution_count"] == 1:
                break
        else:
            pytest.fail("three requests of three fronts never shared a run")
        assert {b["batch_size"] for b in after["batch_stats"]} >= {3}


def test_what_all_fronts_count_is_found_through_any(gateway: LiveGateway) -> None:
    with one_connection_to_each(gateway, 3) as connections:
        before = stats(gateway, "add_one")["inference_stats"]
        for connection in connections:
            assert connection.infer()[0] == 200
            assert connection.infer(body={"inputs": []})[0] == 400
        after = stats(gateway, "add_one")["inference_stats"]
        assert after["success"]["count"] - before["success"]["count"] == 3
        assert after["fail"]["count"] - before["fail"]["count"] == 3
        text = gateway.call("GET", "/metrics")[1]
        opened = next(line for line in text.splitlines() if line.startswith("inferway_connections "))
        assert float(opened.split()[1]) >= 3
        assert 'inferway_stage_duration_seconds_count{model="add_one",stage="parse"' in text.replace(
            '",version="1",', '",'
        )


def test_strings_and_large_tensors_go_both_ways(gateway: LiveGateway) -> None:
    def text(name: str, data: list[str]) -> Any:
        return {"name": name, "datatype": "BYTES", "shape": [len(data), 1], "data": data}

    body = {"inputs": [text("a", ["x", "", "ö"]), text("b", ["y", "", "\u0000z"])]}
    status, answer, _ = gateway.call("POST", "/v2/models/text/infer", body)
    assert (status, answer["outputs"][0]["data"]) == (200, ["xy", "", "ö\u0000z"])
    rows = 200_000
    x = np.random.default_rng(0).random((rows, 16), np.float32)
    head = json.dumps(
        {
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [rows, 16], "parameters": {"binary_data_size": x.nbytes}}
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=WAIT_S)
    headers = {
        "Authorization": f"Bearer {gateway.admin_key}", "Inference-Header-Content-Length": str(len(head)),
    }  # fmt: skip
    connection.request("POST", "/v2/models/add_one/infer", head + x.tobytes(), headers)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    length = int(response.headers["Inference-Header-Content-Length"])
    assert response.status == 200
    assert np.array_equal(np.frombuffer(raw[length:], np.float32).reshape(rows, 16), x + 1)


def test_a_revoked_key_is_refused_by_every_front_at_once(gateway: LiveGateway) -> None:
    key = gateway.make_key("infer")
    with one_connection_to_each(gateway, 3) as connections:
        for connection in connections:
            connection._headers = {"Authorization": f"Bearer {key}"}
            assert connection.infer()[0] == 200
        assert gateway.call("DELETE", f"/api/v1/keys/{key.split('_')[2]}")[0] == 200
        assert [connection.infer()[0] for connection in connections] == [401] * 3


def deploy(gateway: LiveGateway, model: str, content: bytes, **body: Any) -> Any:
    digest = hashlib.sha256(content).hexdigest()
    assert gateway.call("PUT", f"/api/v1/blobs/{digest}", content)[0] == 201
    files = [{"path": "model.onnx", "digest": digest, "size": len(content)}]
    status, deployment, _ = gateway.call("POST", f"/api/v1/models/{model}/versions", {"files": files, **body})
    assert status == 202, deployment
    end = time.monotonic() + 3 * WAIT_S
    while deployment["state"] == "running":
        assert time.monotonic() < end
        step = f"&step={deployment['step']}" if deployment["step"] else ""
        deployment = gateway.call("GET", f"/api/v1/deployments/{deployment['id']}?wait=10{step}")[1]
    assert deployment["state"] == "succeeded", deployment
    return deployment


def test_an_alias_that_is_moved_holds_in_every_front_at_once(gateway: LiveGateway) -> None:
    for number in (1, 2):
        deploy(gateway, "moved", models.add_one(16, float(number)), alias="stable" if number == 1 else None)
    alias = "/api/v1/models/moved/aliases/stable"

    def answers(connections: list[Connection], target: str = "moved") -> list[float]:
        return [connection.infer(target)[1]["outputs"][0]["data"][0] - 1 for connection in connections]

    with one_connection_to_each(gateway, 3) as connections:
        assert answers(connections) == [1.0] * 3
        for version in (2, 1, 2):
            assert gateway.call("PUT", alias, {"version": version})[0] == 200
            assert answers(connections) == [float(version)] * 3
        assert answers(connections, "moved@stable") == [2.0] * 3
        assert gateway.call("PUT", alias, {"weights": {"1": 50, "2": 50}})[0] == 200
        before = gateway.call("GET", alias)[1]["traffic"]
        shared = [value for _ in range(20) for value in answers(connections)]
        # Each front shares by itself, evenly but for some requests.
        assert 20 <= shared.count(1.0) <= 40
        traffic = gateway.call("GET", alias)[1]["traffic"]
        assert sum(traffic[v]["requests"] - before[v]["requests"] for v in ("1", "2")) == 60
        assert gateway.call("DELETE", alias)[0] == 204
        assert [c.infer("moved@stable")[1]["code"] for c in connections] == ["alias_not_found"] * 3
    assert gateway.call("DELETE", "/api/v1/models/moved")[0] == 204
    with one_connection_to_each(gateway, 3) as connections:
        assert [c.infer("moved")[1]["code"] for c in connections] == ["model_not_found"] * 3


def test_an_upload_passes_through_a_front_and_continues_through_another(gateway: LiveGateway) -> None:
    content = os.urandom(3_000_000)
    path = f"/api/v1/blobs/{hashlib.sha256(content).hexdigest()}"
    head = (
        f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.admin_key}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port)) as caller:
        caller.sendall(head.encode() + content[:1_000_000])

    def kept() -> int:
        status, answer, _ = gateway.call("GET", path)
        return int(answer["received"]) if status == 200 else 0

    # What a cut connection has brought stays, however much of it the front had passed on.
    until(lambda: kept() > 0)
    until(lambda: gateway.call("PUT", path, content[kept() :], headers={"Upload-Offset": str(kept())})[0] == 201)
    assert gateway.call("GET", path)[1]["complete"] is True


def test_errors_have_the_words_and_headers_that_one_process_gives(gateway: LiveGateway) -> None:
    for model, code in (("nobody", "model_not_found"), ("add_one@canary", "alias_not_found")):
        status, answer, headers = gateway.call("POST", f"/v2/models/{model}/infer", ADD_ONE)
        assert (status, answer["code"]) == (404, code)
        assert headers["X-Request-Id"] == answer["request_id"]
    status, answer, _ = gateway.call("POST", "/v2/models/add_one/versions/9/infer", ADD_ONE)
    assert (status, answer["code"]) == (404, "version_not_found")
    status, answer, headers = gateway.call("POST", "/v2/models/add_one/infer", {"inputs": []})
    assert (status, answer["code"], headers["Inferway-Model-Version"]) == (400, "invalid_tensor", "1")
    status, answer, _ = gateway.call("GET", "/api/v1/keys/000000000000", headers={"X-Request-Id": "mine"})
    assert (status, answer["code"], answer["request_id"]) == (404, "key_not_found", "mine")
    assert gateway.call("PATCH", "/v2/models/add_one")[0] == 405


def steps(count: int) -> Any:
    return {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64},
            {"name": "steps", "datatype": "INT64", "shape": [], "data": [count]},
        ]
    }


def test_a_deadline_holds_across_the_line(gateway: LiveGateway) -> None:
    connection = Connection(gateway)
    begun = time.monotonic()
    status, answer = connection.infer("slow", steps(2**40), **{"Inferway-Timeout-Ms": "300"})
    connection.close()
    assert (status, answer["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - begun < WAIT_S / 2


def test_a_caller_that_leaves_frees_its_place_in_the_owner(gateway: LiveGateway) -> None:
    body = json.dumps(steps(2**40)).encode()
    head = (
        f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.admin_key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )

    def running() -> float:
        lines = gateway.call("GET", "/metrics")[1].splitlines()
        return float(next(x for x in lines if x.startswith('inferway_runs_in_progress{model="slow"')).split()[1])

    with socket.create_connection(("127.0.0.1", gateway.port)) as caller:
        caller.sendall(head.encode() + body)
        until(lambda: running() == 1)
    until(lambda: running() == 0)


def test_nobody_but_its_fronts_reaches_the_owner(gateway: LiveGateway, tmp_path_factory: Any) -> None:
    (folder,) = (gateway.state_dir.parent / "tmp").glob("inferway-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(WAIT_S)
        line.connect(str(folder / "line"))
        meta = b'{"token":"wrong","pid":1}'
        line.sendall((0).to_bytes(4, "little") + (1 << 24 | len(meta)).to_bytes(4, "little") + bytes(8) + meta)
        with contextlib.suppress(ConnectionResetError):
            assert line.recv(1) == b""
    with socket.socket(socket.AF_UNIX) as passed_on:
        passed_on.settimeout(WAIT_S)
        passed_on.connect(str(folder / "http"))
        head = f"GET /v2 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.admin_key}\r\nInferway-Front: no\r\n\r\n"
        passed_on.sendall(head.encode())
        assert passed_on.recv(100).startswith(b"HTTP/1.1 403")
    assert gateway.call("GET", "/v2", headers={"Inferway-Front": "no"})[0] == 200


def test_a_front_that_dies_is_begun_anew_and_the_others_go_on(gateway: LiveGateway) -> None:
    before = fronts_of(gateway)
    assert len(before) == 3
    with one_connection_to_each(gateway, 3) as connections:
        os.kill(before[0], signal.SIGKILL)
        until(lambda: before[0] not in fronts_of(gateway))
        outcomes = []
        for connection in connections:
            try:
                outcomes.append(connection.infer()[0])
            except (http.client.HTTPException, OSError):
                outcomes.append(0)
        assert sorted(outcomes) == [0, 200, 200]
    # Connections that the kernel takes for the dead one wait for its successor: none is refused or reset.
    for _ in range(12):
        connection = Connection(gateway)
        assert connection.infer()[0] == 200
        connection.close()
    until(lambda: len(fronts_of(gateway)) == 3)
    with one_connection_to_each(gateway, 3):
        pass
    assert any("beginning another" in line for line in gateway.log)
    lines = gateway.call("GET", "/metrics")[1].splitlines()
    assert "inferway_fronts 3.0" in lines
    assert "inferway_front_restarts_total 1.0" in lines


@pytest.mark.slow
def test_a_front_that_hangs_is_killed_and_replaced_and_holds_nobody_else(gateway: LiveGateway) -> None:
    before = fronts_of(gateway)
    with one_connection_to_each(gateway, 3) as connections:
        hung = before[2]
        os.kill(hung, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(3) as callers:
                answers = [callers.submit(connection.infer) for connection in connections]
                until(lambda: sum(answer.done() for answer in answers) >= 2)
                assert [answer.result()[0] for answer in answers if answer.done()] == [200, 200]
                until(lambda: hung not in fronts_of(gateway), lambda: gateway.log[-5:])
                # Whoever waited for it hears of its end, and the connections that wait go to its successor.
                lost = [answer for answer in answers if answer.exception(WAIT_S) is not None]
                assert len(lost) <= 1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(hung, signal.SIGCONT)
    until(lambda: len(fronts_of(gateway)) == 3)
    with one_connection_to_each(gateway, 3):
        pass
    assert any("no sign of life" in line for line in gateway.log)
    assert any("beginning another" in line for line in gateway.log)


def test_a_front_that_is_told_to_end_does_so_and_is_replaced(gateway: LiveGateway) -> None:
    before = fronts_of(gateway)
    os.kill(before[1], signal.SIGTERM)
    until(lambda: before[1] not in fronts_of(gateway) and len(fronts_of(gateway)) == 3)
    with one_connection_to_each(gateway, 3):
        pass


def proportional_bytes(pid: int) -> int:
    """The process's memory, of which pages it shares count in part (PSS)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1]) * 1024


@pytest.mark.slow
def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    width = 7_000
    weights_bytes = 4 * width * width
    repository = models.write_repository(tmp_path / "models", {"wide": models.matmul(width, width)})
    environment = {"INFERWAY_TRIAL_BUDGET_S": "0"}
    row = {"name": "x", "datatype": "FP32", "shape": [1, width], "data": [0.5] * width}
    with run_gateway(repository, tmp_path / "state", "--workers", "3", environment=environment) as gateway:
        for _ in range(6):
            assert gateway.call("POST", "/v2/models/wide/infer", {"inputs": [row]})[0] == 200
        fronts = fronts_of(gateway)
        assert len(fronts) == 3
        assert proportional_bytes(gateway.process.pid) > weights_bytes
        assert max(map(proportional_bytes, fronts)) < weights_bytes


@pytest.mark.slow
def test_models_are_swapped_under_load_without_an_error_or_a_mixture(tmp_path: Path) -> None:
    """Each content of the model adds another number and has another name for its output."""

    def content(number: int) -> bytes:
        return models.model(
            [models.node("Add", ["x", "c"], [f"y{number}"])],
            [models.value("x", models.F32, ["batch", 4])],
            [models.value(f"y{number}", models.F32, ["batch", 4])],
            {"c": np.full(1, number, np.float32)},
        )

    repository = models.write_repository(tmp_path / "models", {"swapped": content(1)})
    options = ("--workers", "2", "--model-control", "explicit", "--load-model", "swapped")
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0] * 4}]}
    environment = {"INFERWAY_TRIAL_BUDGET_S": "0", "INFERWAY_MEASURE_BUDGET_S": "0.05"}
    with run_gateway(repository, tmp_path / "state", *options, environment=environment) as gateway:
        stop = threading.Event()
        problems: list[object] = []
        seen: set[str] = set()

        def call() -> None:
            connection = Connection(gateway)
            try:
                while not stop.is_set():
                    status, answer = connection.infer("swapped", body)
                    if status != 200 or answer["outputs"][0]["data"] != [float(answer["outputs"][0]["name"][1:])] * 4:
                        problems.append((status, answer))
                        return
                    seen.add(answer["outputs"][0]["name"])
            except Exception as error:
                problems.append(error)
            finally:
                connection.close()

        callers = [threading.Thread(target=call) for _ in range(6)]
        for caller in callers:
            caller.start()
        for number in range(2, 12):
            path = repository / "swapped" / "1" / "model.onnx"
            path.with_suffix(".new").write_bytes(content(number))
            path.with_suffix(".new").replace(path)
            assert gateway.call("POST", "/v2/repository/models/swapped/load")[0] == 200
            # Whoever was told that it is loaded finds it, through whichever front.
            for _ in range(4):
                name = gateway.call("POST", "/v2/models/swapped/infer", body)[1]["outputs"][0]["name"]
                assert name == f"y{number}"
        stop.set()
        for caller in callers:
            caller.join(WAIT_S)
        assert problems == []
        assert "y11" in seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_the_end_loses_no_request(tmp_path: Path, number: signal.Signals) -> None:
    repository = models.write_repository(tmp_path / "models", {"add_one": models.add_one()})
    with run_gateway(repository, tmp_path / "state", "--workers", "2") as gateway:
        fronts = fronts_of(gateway)
        answered = [0] * 8
        lost: list[object] = []

        def call(index: int) -> None:
            connection = Connection(gateway)
            while True:
                try:
                    status, answer = connection.infer()
                except ConnectionRefusedError:
                    return
                except TimeoutError:
                    return  # a connection that was never taken
                except Exception as error:
                    lost.append(error)
                    return
                if status != 200:
                    lost.append(answer)
                    return
                answered[index] += 1
                if connection.closes:
                    connection.close()
                    connection = Connection(gateway)
                    connection.http.timeout = 3.0

        callers = [threading.Thread(target=call, args=(i,)) for i in range(8)]
        for caller in callers:
            caller.start()
        until(lambda: min(answered) > 5)
        gateway.process.send_signal(number)
        for caller in callers:
            caller.join(WAIT_S)
        assert gateway.process.wait(WAIT_S) == 0
        assert lost == []
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in fronts))


def test_fronts_end_with_their_owner(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"add_one": models.add_one()})
    with run_gateway(repository, tmp_path / "state", "--workers", "2") as gateway:
        fronts = fronts_of(gateway)
        assert len(fronts) == 2
        gateway.process.kill()
        gateway.process.wait(WAIT_S)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in fronts))


def test_a_front_that_cannot_start_ends_the_gateway_with_words(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"add_one": models.add_one()})
    broken = tmp_path / "broken"
    broken.mkdir()
    # Only in the fronts does the interpreter find this before the library's.
    (broken / "sitecustomize.py").write_text(
        "import sys\nif 'inferway_gateway.front' in ' '.join(sys.orig_argv):\n    sys.exit('no')\n"
    )
    with (
        pytest.raises(AssertionError, match="a front process ended while it started"),
        run_gateway(repository, tmp_path / "state", "--workers", "2", environment={"PYTHONPATH": str(broken)}),
    ):
        pass
