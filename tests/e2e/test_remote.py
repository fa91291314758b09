"""Models on servers elsewhere, through real gateways and the SDK."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import deploying
import inferway
import models
from inferway import Inferway, RetryPolicy
from inferway_gateway.core.tensors import DTYPES
from live import LiveGateway, run_gateway
from models import ModelFiles, write_repository
from scripted import SIMPLE_METADATA, Answer, ScriptedServer, Seen, as_error, as_json, as_outputs

LIMIT_S = 30.0


def write_remote(repository: Path, name: str, text: str, version: int = 1) -> None:
    folder = repository / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "remote.toml").write_text(text)


def write_upstream(path: Path, name: str, urls: list[str], *lines: str, protocol: str = "oip") -> Path:
    endpoints = ", ".join(f'{{ url = "{url}" }}' for url in urls)
    text = f'[[upstreams]]\nname = "{name}"\nprotocol = "{protocol}"\nendpoints = [{endpoints}]\n' + "\n".join(lines)
    path.write_text(path.read_text() + "\n" + text if path.exists() else text)
    return path


@pytest.fixture(scope="module")
def front(gateway: LiveGateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway whose models are all on the session's gateway."""
    root = tmp_path_factory.mktemp("front")
    secret = root / "secret"
    secret.write_text(gateway.make_key("infer", "read", models=["simple", "all_types", "strings", "picky", "slow"]))
    secret.chmod(0o600)
    upstreams = write_upstream(root / "upstreams.toml", "other", [gateway.url], 'secret = { file = "secret" }')
    write_upstream(upstreams, "limited", [gateway.url], 'models = ["simple", "all_*"]')
    repository = write_repository(root / "models", {})
    for name in ("simple", "all_types", "strings", "picky", "slow"):
        write_remote(repository, f"far-{name}", f'upstream = "other"\nmodel = "{name}"\n')
    write_remote(repository, "far-first", 'upstream = "other"\nmodel = "simple"\nversion = "1"\n')
    with run_gateway(repository, root / "state", "--upstreams", str(upstreams)) as running:
        yield running


@pytest.fixture(scope="module")
def client(front: LiveGateway) -> Iterator[Inferway]:
    with Inferway(front.url, api_key=front.make_key("infer", "read")) as made:
        yield made


def test_another_gateway_answers_through_this_one(client: Inferway) -> None:
    a, b = np.arange(32, dtype=np.int32).reshape(2, 16), np.ones((2, 16), np.int32)
    result = client.infer("far-simple", {"INPUT0": a, "INPUT1": b})
    np.testing.assert_array_equal(result["OUTPUT0"], a + b)
    np.testing.assert_array_equal(result["OUTPUT1"], a - b)


def test_the_answer_says_which_version_and_how_many_attempts(front: LiveGateway) -> None:
    x = {"name": "INPUT0", "datatype": "INT32", "shape": [1, 16], "data": [1] * 16}
    body = {"inputs": [x, {**x, "name": "INPUT1"}]}
    status, answer, headers = front.call("POST", "/v2/models/far-first/infer", body, key=front.make_key("infer"))
    assert status == 200, answer
    assert headers["Inferway-Upstream-Attempts"] == "1"
    assert headers["Inferway-Model-Version"] == "1"
    assert answer["model_name"] == "far-first"


def test_the_metadata_is_the_upstreams(client: Inferway, gateway: LiveGateway) -> None:
    there = Inferway(gateway.url, api_key=gateway.admin_key)
    with there:
        far, near = client.models.get("far-all_types"), there.models.get("all_types")
    assert far.inputs == near.inputs
    assert far.outputs == near.outputs
    assert far.platform == "inferway_remote"


def test_strings_and_every_other_datatype_go_there_and_back(client: Inferway) -> None:
    metadata = client.models.get("far-all_types")
    inputs = {
        spec.name: np.array([["ä", "b"]], object)
        if spec.datatype == "BYTES"
        else np.array([[0, 1]], DTYPES[spec.datatype])
        for spec in metadata.inputs
    }
    result = client.infer("far-all_types", inputs)
    for name, array in inputs.items():
        np.testing.assert_array_equal(result[name + "_out"], array)


def test_a_failure_of_the_model_is_told_and_not_tried_again(client: Inferway, gateway: LiveGateway) -> None:
    def executions() -> int:
        _, answer, _ = gateway.call("GET", "/v2/models/picky/stats")
        return int(answer["model_stats"][0]["inference_stats"]["fail"]["count"])

    before = executions()
    with pytest.raises(inferway.APIStatusError) as caught:
        client.infer("far-picky", {"x": np.full((1, 4), -1, np.float32)})
    assert caught.value.status_code == 502
    assert caught.value.code == "upstream_failed"
    assert executions() == before + 1


def remote_package(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "remote.toml").write_text(text)
    return folder


def test_a_remote_model_is_deployed_like_any_other(front: LiveGateway, tmp_path: Path) -> None:
    package = remote_package(tmp_path / "package", 'upstream = "other"\nmodel = "simple"\n')
    with Inferway(front.url, api_key=front.admin_key) as client:
        client.models.deploy(package, name="deployed")
        ones = np.ones((1, 16), np.int32)
        assert client.infer("deployed@stable", {"INPUT0": ones, "INPUT1": ones})["OUTPUT0"][0, 0] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('upstream = "nowhere"\nmodel = "simple"\n', "expected an upstream that the gateway's operator has defined"),
        ('upstream = "limited"\nmodel = "matmul"\n', "upstream 'limited' may not be used for its model 'matmul'"),
        ('upstream = "other"\nmodel = "no-such"\n', "upstream 'other' does not have the model"),
        ('upstream = "other"\nmodel = "simple"\noperation = "chat"\n', "speaks oip, operation 'chat' is not of it"),
        ('upstream = "other"\nmodel = "simple"\nurl = "http://169.254.169.254"\n', "url is not known"),
    ],
    ids=["unknown-upstream", "model-not-allowed", "no-such-model", "other-protocol", "an-address"],
)
def test_what_the_operator_does_not_allow_is_not_deployed(
    front: LiveGateway, tmp_path: Path, text: str, words: str
) -> None:
    package = remote_package(tmp_path / "package", text)
    with (
        Inferway(front.url, api_key=front.admin_key) as client,
        pytest.raises(inferway.InferwayError, match=words),
    ):
        client.models.deploy(package, name="refused")


def test_metrics_tell_of_the_upstream(front: LiveGateway, client: Inferway) -> None:
    client.infer("far-strings", {"x": np.array([["a"]], object)})
    _, text, _ = front.call("GET", "/metrics", key=front.make_key("read"))
    lines = [line for line in str(text).splitlines() if line.startswith("inferway_upstream_")]
    assert any(
        line.startswith('inferway_upstream_calls_total{endpoint="0",outcome="ok",upstream="other"}') for line in lines
    )
    assert 'inferway_upstream_up{endpoint="0",upstream="other"} 1.0' in lines
    assert "127.0.0.1" not in "".join(lines)


@pytest.fixture
def endpoints() -> Iterator[list[ScriptedServer]]:
    servers = [ScriptedServer(), ScriptedServer()]
    yield servers
    for server in servers:
        server.stop()


def simple(seen: Seen) -> Answer:
    if seen.method == "GET":
        return as_json({"extensions": ["binary_tensor_data"], **SIMPLE_METADATA})
    data = seen.body[int(seen.headers["inference-header-content-length"]) :]
    return as_outputs(("y", "FP32", seen.json["inputs"][0]["shape"], data))


def test_a_key_never_leaves_and_the_secret_goes_nowhere_else(endpoints: list[ScriptedServer], tmp_path: Path) -> None:
    for server in endpoints:
        server.otherwise = simple
    upstreams = write_upstream(
        tmp_path / "upstreams.toml",
        "up",
        [endpoints[0].url],
        'secret = { env = "UP_TOKEN" }',
        'secret_header = "X-Token"',
    )
    write_upstream(upstreams, "other", [endpoints[1].url])
    repository = write_repository(tmp_path / "models", {})
    write_remote(repository, "mine", 'upstream = "up"\nmodel = "simple"\n')
    write_remote(repository, "theirs", 'upstream = "other"\nmodel = "simple"\n')
    environment = {"UP_TOKEN": "hush-hush", "INFERWAY_LOG_LEVEL": "debug"}
    with run_gateway(repository, tmp_path / "state", "--upstreams", str(upstreams), environment=environment) as front:
        key = front.make_key("infer")
        with Inferway(front.url, api_key=key) as client:
            client.infer("mine", {"x": np.zeros((1, 2), np.float32)})
            client.infer("theirs", {"x": np.zeros((1, 2), np.float32)})
    assert all(seen.headers["x-token"] == "Bearer hush-hush" for seen in endpoints[0].seen)
    everything = [f"{seen.path} {seen.headers} {seen.body!r}" for server in endpoints for seen in server.seen]
    assert not any(key in text for text in everything)
    assert not any("hush" in f"{seen.headers}" for seen in endpoints[1].seen)
    assert "hush" not in "".join(front.log)


def test_a_start_with_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o644)
    upstreams = write_upstream(
        tmp_path / "upstreams.toml", "up", ["http://127.0.0.1:9"], 'secret = { file = "secret" }'
    )
    repository = write_repository(tmp_path / "models", {"add_one": models.add_one()})
    with (
        pytest.raises(AssertionError, match="others may use its file, expected mode 0600, got 0644"),
        run_gateway(repository, tmp_path / "state", "--upstreams", str(upstreams)),
    ):
        raise RuntimeError("it started")


def test_an_upstream_that_comes_later_is_found(endpoints: list[ScriptedServer], tmp_path: Path) -> None:
    server = endpoints[0]
    server.otherwise = lambda _: as_error(503, "model_not_ready")
    upstreams = write_upstream(tmp_path / "upstreams.toml", "up", [server.url], "attempts = 1", "max_retry_after_s = 0")
    repository = write_repository(tmp_path / "models", {})
    write_remote(repository, "mine", 'upstream = "up"\nmodel = "simple"\n')
    with run_gateway(repository, tmp_path / "state", "--upstreams", str(upstreams), wait=False) as front:
        end = time.monotonic() + LIMIT_S
        while not any(seen.path == "/v2" for seen in server.seen):
            assert time.monotonic() < end
            time.sleep(0.01)
        status, answer, _ = front.call("GET", "/v2/models/mine/ready")
        assert status in (404, 503), answer
        server.otherwise = simple
        front.wait_until_ready()
        assert front.call("GET", "/v2/models/mine/ready")[0] == 200


BROWN_OUT_S = 4.0
"""Thirty seconds, shortened like the breaker's times."""


class BrownOut:
    """Counts inference requests, and lets a share of them fail while it lasts."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.on = False
        self.calls = 0
        self._lock = threading.Lock()
        self._due = 0.0

    def __call__(self, seen: Seen) -> Answer:
        if seen.method == "GET":
            return simple(seen)
        with self._lock:
            self.calls += 1
            fails = False
            if self.on:
                self._due += self.share
                fails = self._due >= 1
                self._due -= fails
        return as_error(503, "queue_full", "brown-out") if fails else simple(seen)


def test_a_deadline_goes_along(endpoints: list[ScriptedServer], tmp_path: Path) -> None:
    server = endpoints[0]
    server.otherwise = lambda seen: simple(seen) if seen.method == "GET" else Answer(hang=True)
    upstreams = write_upstream(tmp_path / "upstreams.toml", "up", [server.url])
    repository = write_repository(tmp_path / "models", {})
    write_remote(repository, "mine", 'upstream = "up"\nmodel = "simple"\n')
    with (
        run_gateway(repository, tmp_path / "state", "--upstreams", str(upstreams)) as front,
        Inferway(front.url, api_key=front.make_key("infer"), retry=RetryPolicy(attempts=1)) as client,
    ):
        with pytest.raises(inferway.APITimeoutError):
            client.infer("mine", {"x": np.zeros((1, 2), np.float32)}, timeout=1.0)
        assert server.closed.wait(LIMIT_S), "the upstream works on for nobody"
        (asked,) = [seen for seen in server.seen if seen.method == "POST"]
        assert 0 < int(asked.headers["inferway-timeout-ms"]) <= 1000
        assert asked.headers["x-request-id"]


@pytest.mark.slow
def test_gateways_whose_models_are_each_others_do_not_keep_each_other_busy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    repository = write_repository(tmp_path / "models", {"resident": models.add_one()})
    one = write_upstream(tmp_path / "one.toml", "up", [f"http://127.0.0.1:{port}"])
    with run_gateway(repository, tmp_path / "state-1", "--no-auth", "--upstreams", str(one)) as first:
        two = write_upstream(tmp_path / "two.toml", "up", [first.url])
        options = ("--no-auth", "--upstreams", str(two), "--port", str(port))
        with run_gateway(repository, tmp_path / "state-2", *options) as second:
            deploying.deploy(first, "loop", models.add_one(4))
            deploying.deploy(second, "loop", {"remote.toml": b'upstream = "up"\nmodel = "loop"\n'})
            assert deploying.infer(second, "loop", size=4)[:2] == (200, 2.0)
            deploying.deploy(first, "loop", {"remote.toml": b'upstream = "up"\nmodel = "loop"\n'})
            status, answer, _ = deploying.infer(first, "loop", size=4)
            assert status == 502, answer
            assert answer["code"] == "upstream_failed"
            made = 0.0
            for gateway in (first, second):
                for line in gateway.call("GET", "/metrics")[1].splitlines():
                    if line.startswith("inferway_upstream_calls_total{") and 'outcome="failed"' in line:
                        made += float(line.rpartition(" ")[2])
            assert made == 8, "once through each of eight gateways, and nobody tried again"


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all-fail", "half-fail"])
def test_a_brown_out_is_not_made_worse(endpoints: list[ScriptedServer], tmp_path: Path, share: float) -> None:
    """Callers that try again behind a gateway that tries again make at most 1.2 calls a request, and recover."""
    brown_out = BrownOut(share)
    for server in endpoints:
        server.otherwise = brown_out
    upstreams = write_upstream(
        tmp_path / "upstreams.toml",
        "up",
        [server.url for server in endpoints],
        "breaker_open_s = 0.2",
        "breaker_max_open_s = 0.5",
    )
    repository = write_repository(tmp_path / "models", {})
    write_remote(repository, "mine", 'upstream = "up"\nmodel = "simple"\n')
    x = np.zeros((1, 2), np.float32)
    counts = {"requests": 0, "failed": 0}
    lock = threading.Lock()
    stop = threading.Event()
    with run_gateway(repository, tmp_path / "state", "--upstreams", str(upstreams)) as front:
        key = front.make_key("infer")

        def caller() -> None:
            with Inferway(front.url, api_key=key, retry=RetryPolicy(attempts=4)) as client:
                while not stop.is_set():
                    failed = 0
                    try:
                        client.infer("mine", {"x": x})
                    except inferway.APIError:
                        failed = 1
                    with lock:
                        counts["requests"] += 1
                        counts["failed"] += failed

        with ThreadPoolExecutor(8) as pool:
            callers = [pool.submit(caller) for _ in range(8)]
            try:
                wait_for(lambda: counts["requests"] >= 100)
                with lock:
                    counts.update(requests=0, failed=0)
                    calls = brown_out.calls
                    brown_out.on = True
                time.sleep(BROWN_OUT_S)
                brown_out.on = False
                with lock:
                    during = dict(counts)
                    made = brown_out.calls - calls
                    counts.update(requests=0, failed=0)
                ended = time.monotonic()
                wait_for(lambda: counts["requests"] - counts["failed"] >= 200)
                recovery_s = time.monotonic() - ended
            finally:
                stop.set()
            for done in callers:
                done.result()
    assert made <= 1.2 * during["requests"], (made, during)
    assert during["failed"], "it was no brown-out"
    assert recovery_s <= 10, recovery_s


def wait_for(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def test_an_openai_compatible_server_gives_embeddings_and_answers(
    endpoints: list[ScriptedServer], tmp_path: Path
) -> None:
    def answer(seen: Seen) -> Answer:
        if seen.path == "/v1/embeddings":
            texts = seen.json["input"]
            found = [{"index": i, "embedding": [len(text), i]} for i, text in enumerate(texts)]
            return as_json({"data": found[::-1]})
        if seen.path == "/v1/chat/completions":
            return as_json({"choices": [{"message": {"content": json.dumps(seen.json, sort_keys=True)}}]})
        return Answer(404)

    server = endpoints[0]
    server.otherwise = answer
    upstreams = write_upstream(tmp_path / "upstreams.toml", "llm", [server.url + "/v1"], protocol="openai")
    repository = write_repository(tmp_path / "models", {"add_one": ModelFiles({})})
    write_remote(repository, "embed", 'upstream = "llm"\nmodel = "e-5"\noperation = "embeddings"\n')
    write_remote(
        repository, "chat", 'upstream = "llm"\nmodel = "gpt"\noperation = "chat"\nparameters = { temperature = 0.5 }\n'
    )
    with (
        run_gateway(repository, tmp_path / "state", "--upstreams", str(upstreams), "--model-control", "explicit",
                    "--load-model", "embed", "--load-model", "chat") as front,
        Inferway(front.url, api_key=front.make_key("infer", "read")) as client,
    ):  # fmt: skip
        embedded = client.infer("embed", {"text": np.array(["a", "bcd"], object)})
        np.testing.assert_array_equal(embedded["embedding"], np.array([[1, 0], [3, 1]], np.float32))
        said = client.infer("chat", {"messages": np.array(["hello"], object)})["answer"]
        body = {"model": "embed", "input": ["a", "bcd"]}
        status, _, _ = front.call(
            "POST", "/v1/embeddings", body, headers={"Inferway-Hops": "3", "X-Request-Id": "from-me"}
        )
        assert status == 200
        texts = [seen for seen in server.seen if seen.path == "/v1/embeddings" and seen.headers["inferway-hops"] == "4"]
        assert [(seen.headers["x-request-id"], seen.json["input"]) for seen in texts] == [("from-me", ["a", "bcd"])]
        status, refused, _ = front.call("POST", "/v1/embeddings", body, headers={"Inferway-Hops": "8"})
        assert (status, refused["error"]["code"]) == (502, "upstream_failed"), refused
    assert json.loads(str(said[0])) == {
        "messages": [{"role": "user", "content": "hello"}], "model": "gpt", "stream": False, "temperature": 0.5,
    }  # fmt: skip


KSERVE = """
import sys
from kserve import InferOutput, InferResponse, Model, ModelServer

class AddOne(Model):
    def __init__(self):
        super().__init__("add-one")
        self.ready = True

    async def get_input_types(self):
        return [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]

    async def get_output_types(self):
        return [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}]

    async def predict(self, payload, headers=None, response_headers=None):
        x = payload.inputs[0].as_numpy()
        y = InferOutput("y", list(x.shape), "FP32")
        y.set_data_from_numpy(x + 1, binary_data=False)
        return InferResponse(payload.id, "add-one", [y])

ModelServer(http_port=int(sys.argv[1]), enable_grpc=False, workers=1).start([AddOne()])
"""


@pytest.mark.slow
def test_kserve_answers_through_the_gateway(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(KSERVE)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    upstreams = write_upstream(tmp_path / "upstreams.toml", "kserve", [f"http://127.0.0.1:{port}"])
    repository = write_repository(tmp_path / "models", {})
    write_remote(repository, "far", 'upstream = "kserve"\nmodel = "add-one"\n')
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen(
        [sys.executable, str(tmp_path / "server.py"), str(port)], stdout=log, stderr=subprocess.STDOUT
    )
    try:
        with (
            run_gateway(
                repository, tmp_path / "state", "--upstreams", str(upstreams)
            ) as front,  # finds it once it is up
            Inferway(front.url, api_key=front.make_key("infer", "read")) as client,
        ):
            assert [spec.shape for spec in client.models.get("far").inputs] == [(-1, 4)]
            result = client.infer("far", {"x": np.zeros((2, 4), np.float32)})
            np.testing.assert_array_equal(result["y"], np.ones((2, 4), np.float32))
    finally:
        server.terminate()
        try:
            server.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()
