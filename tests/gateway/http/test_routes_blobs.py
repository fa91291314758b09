"""Contents by digest over HTTP, on a gateway of their own."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import models
from inferway_gateway.core.catalog import AliasSpec, FileRef, VersionSpec
from inferway_gateway.store.catalog import open_catalog
from live import LiveGateway, run_gateway
from raw_edge import Client

LIMIT = 300 * 1024 * 1024
QUOTA = 320 * 1024 * 1024
CONTENT = random.Random(1).randbytes(3_000_001)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("blobs")
    (root / "models").mkdir()
    environment = {
        "INFERWAY_UPLOAD_LIMIT_BYTES": str(LIMIT),
        "INFERWAY_STORAGE_LIMIT_PER_KEY_BYTES": str(QUOTA),
        "INFERWAY_BODY_LIMIT_BYTES": "1000000",
        "INFERWAY_BLOB_GRACE_S": "0.001",
    }
    with run_gateway(root / "models", root / "state", environment=environment) as running:
        yield running


@pytest.fixture
def key(gateway: LiveGateway) -> str:
    """A fresh one that may deploy."""
    return gateway.make_key("deploy")


def fresh(seed: int, size: int = 1_000_003) -> tuple[bytes, str]:
    content = random.Random(seed).randbytes(size)
    return content, hashlib.sha256(content).hexdigest()


def put(gateway: LiveGateway, digest: str, content: bytes, key: str, **fields: object) -> tuple[int, dict[str, Any]]:
    headers = {name.replace("_", "-"): str(value) for name, value in fields.items()}
    status, answer, _ = gateway.call("PUT", f"/api/v1/blobs/{digest}", content, key=key, headers=headers)
    return status, answer


def get(gateway: LiveGateway, digest: str, key: str) -> tuple[int, dict[str, Any]]:
    status, answer, _ = gateway.call("GET", f"/api/v1/blobs/{digest}", key=key)
    return status, answer


def raw(gateway: LiveGateway, digest: str, key: str, *fields: str) -> Client:
    """A connection with the head of an upload on it."""
    client = Client(("127.0.0.1", gateway.port))
    head = [f"PUT /api/v1/blobs/{digest} HTTP/1.1", "Host: x", f"X-API-Key: {key}", *fields, "", ""]
    client.send("\r\n".join(head).encode())
    return client


def until_received(gateway: LiveGateway, digest: str, key: str, least: int) -> int:
    """Wait until that many bytes of an upload that was cut off are kept, and nobody holds it."""
    end = time.monotonic() + 10
    while True:
        status, answer = get(gateway, digest, key)
        if status == 200 and answer["received"] >= least:
            return int(answer["received"])
        assert time.monotonic() < end, (status, answer)
        time.sleep(0.01)


def test_a_content_that_was_sent_is_there(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(2, 2_500_000)
    assert get(gateway, digest, key)[0] == 404
    whole = {"digest": digest, "size": len(content), "received": len(content), "complete": True}
    assert put(gateway, digest, content, key) == (201, whole)
    assert get(gateway, digest, key) == (200, whole)
    assert put(gateway, digest, content, key) == (201, whole)


def test_an_empty_content_is_one_too(gateway: LiveGateway, key: str) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    assert put(gateway, digest, b"", key)[0] == 201
    assert get(gateway, digest, key)[1]["complete"] is True


def test_chunks_are_a_body_too(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(3)
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    pieces = (content[start : start + 10_000] for start in range(0, len(content), 10_000))
    connection.request("PUT", f"/api/v1/blobs/{digest}", pieces, {"X-API-Key": key}, encode_chunked=True)
    assert connection.getresponse().status == 201
    connection.close()


def test_knowing_a_digest_is_not_having_the_content(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(4)
    put(gateway, digest, content, key)
    absent = "0" * 64
    other = gateway.make_key("deploy")
    status, answer = get(gateway, digest, other)
    missing_status, missing = get(gateway, absent, other)
    assert status == missing_status == 404
    assert answer["code"] == missing["code"] == "blob_not_found"
    assert answer["detail"].replace(digest, absent) == missing["detail"]
    put(gateway, digest, content, other)
    assert get(gateway, digest, other)[0] == 200


def test_who_sees_a_model_may_use_its_contents(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(5)
    put(gateway, digest, content, key)

    async def deploy() -> None:
        async with open_catalog(database_url=f"sqlite:///{gateway.state_dir}/inferway.db") as catalog:
            spec = VersionSpec("seen", "onnx", (FileRef("model.onnx", digest, len(content)),))
            running = await catalog.begin_deployment(spec, digest="0" * 64, isolation="worker", by="x", owner="test")
            await catalog.commit_deployment(running.id, None, AliasSpec({running.version: 100.0}))

    asyncio.run(deploy())
    assert get(gateway, digest, gateway.make_key("deploy", models=["se*"]))[1]["complete"] is True
    assert get(gateway, digest, gateway.make_key("deploy", models=["other"]))[0] == 404


def test_an_upload_goes_on_after_its_connection_was_cut(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(6, 3_000_000)
    with raw(gateway, digest, key, f"Content-Length: {len(content)}") as client:
        client.send(content[:2_000_000])
        until_received(gateway, digest, key, 1_000_000)
    received = until_received(gateway, digest, key, 2_000_000)
    assert received == 2_000_000
    assert get(gateway, digest, gateway.make_key("deploy"))[0] == 404, "it is only there for who began it"
    status, answer = put(gateway, digest, content[received:], key, Upload_Offset=received)
    assert (status, answer["complete"]) == (201, True)


def test_an_upload_may_come_in_parts(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(7)
    size = len(content)
    status, answer = put(gateway, digest, content[:600_000], key, Upload_Length=size)
    assert (status, answer) == (202, {"digest": digest, "size": size, "received": 600_000, "complete": False})
    status, answer = put(gateway, digest, content[500_000:], key, Upload_Length=size, Upload_Offset=500_000)
    assert (status, answer["code"], answer["received"]) == (409, "upload_conflict", 600_000)
    status, answer = put(gateway, digest, content[600_000:], key, Upload_Length=size, Upload_Offset=600_000)
    assert (status, answer["complete"]) == (201, True)


def test_two_uploads_of_one_content_at_once(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(8)
    other = gateway.make_key("deploy")
    with raw(gateway, digest, key, f"Content-Length: {len(content)}") as client:
        client.send(content[:500_000])
        until_received(gateway, digest, key, 1)
        status, answer = put(gateway, digest, content, key)
        assert (status, answer["code"]) == (409, "upload_conflict")
        assert put(gateway, digest, content, other)[0] == 201
        client.send(content[500_000:])
        assert client.read().status == 201
    assert get(gateway, digest, key)[1]["complete"] is True


def test_other_content_is_refused_and_thrown_away(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(9)
    status, answer = put(gateway, digest, content[:-1] + b"?", key)
    assert (status, answer["code"]) == (400, "digest_mismatch")
    assert get(gateway, digest, key)[0] == 404


def test_more_than_was_announced_is_refused(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(10)
    status, answer = put(gateway, digest, content, key, Upload_Length=5)
    assert (status, answer["code"]) == (400, "malformed_request")


@pytest.mark.parametrize("expect", [True, False])
def test_a_length_beyond_the_limit_is_refused_before_the_body(gateway: LiveGateway, key: str, expect: bool) -> None:
    fields = [f"Content-Length: {LIMIT + 1}", *(["Expect: 100-continue"] if expect else [])]
    with raw(gateway, DIGEST, key, *fields) as client:
        answer = client.read()
        assert (answer.status, answer.json["code"]) == (413, "payload_too_large")
        assert answer.headers["content-type"] == "application/problem+json"
    status, found = put(gateway, DIGEST, b"x", key, Upload_Length=LIMIT + 1)
    assert (status, found["code"]) == (413, "payload_too_large")


def test_a_key_without_the_scope_is_refused_before_the_body(gateway: LiveGateway) -> None:
    for key, status in ((gateway.make_key("read", "infer"), 403), ("nobody", 401)):
        with raw(gateway, DIGEST, key, "Content-Length: 3000001") as client:
            assert client.read().status == status


def test_other_routes_keep_their_limit(gateway: LiveGateway) -> None:
    body = json.dumps({"name": "x" * 1_100_000}).encode()
    assert gateway.call("POST", "/v2/repository/index", body)[0] == 413
    assert gateway.call("POST", "/api/v1/keys", body)[0] == 413


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"Upload_Offset": "x"}, 400, "invalid_parameter"),
        ({"Upload_Offset": "-1"}, 400, "invalid_parameter"),
        ({"Upload_Length": "1e3"}, 400, "invalid_parameter"),
        ({"Upload_Offset": "5"}, 409, "upload_conflict"),
        ({"Content_Encoding": "gzip"}, 501, "unsupported_encoding"),
    ],
    ids=["no-number", "negative", "float", "nothing-there", "encoded"],
)
def test_odd_headers_are_refused(
    gateway: LiveGateway, key: str, fields: dict[str, str], status: int, code: str
) -> None:
    got, answer = put(gateway, "1" * 64, b"abc", key, **fields)
    assert (got, answer["code"]) == (status, code)


@pytest.mark.parametrize("digest", ["0", "A" * 64, "0" * 63 + "g", "..%2f..%2fetc", "0" * 65])
def test_a_digest_has_one_form(gateway: LiveGateway, key: str, digest: str) -> None:
    for method in ("GET", "PUT"):
        status, answer, _ = gateway.call(method, f"/api/v1/blobs/{digest}", b"" if method == "PUT" else None, key=key)
        assert status in (400, 404)
        assert answer["code"] in ("invalid_parameter", "not_found")


def memory(gateway: LiveGateway, field: str) -> int:
    """A line of the gateway's memory, in bytes."""
    text = Path(f"/proc/{gateway.process.pid}/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def test_256_mib_take_no_memory_and_serving_goes_on(gateway: LiveGateway, key: str) -> None:
    piece = random.Random(11).randbytes(1024 * 1024)
    found = hashlib.sha256()
    for _ in range(256):
        found.update(piece)
    digest = found.hexdigest()
    content, warm = fresh(12)
    put(gateway, warm, content, key)  # what is loaded once is
    before = memory(gateway, "VmRSS")
    Path(f"/proc/{gateway.process.pid}/clear_refs").write_text("5")  # forget the peak
    with raw(gateway, digest, key, f"Content-Length: {256 * len(piece)}") as client:
        for number in range(256):
            client.send(piece)
            if number % 64 == 32:
                assert gateway.call("GET", "/v2/health/ready", key=None)[0] == 200
        assert client.read().status == 201
    assert memory(gateway, "VmHWM") - before < 16 * 1024 * 1024
    status, answer = put(gateway, "2" * 64, b"x" * 70_000_000, key)
    assert (status, answer["code"]) == (403, "quota_exceeded")


def test_what_nothing_names_is_collected(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(13, 12_345)
    put(gateway, digest, content, key)
    status, report, _ = gateway.call("POST", "/api/v1/registry/gc")
    assert status == 200
    assert report["removed"] >= 1
    assert report["freed_bytes"] >= 12_345
    assert get(gateway, digest, key)[0] == 404
    assert gateway.call("POST", "/api/v1/registry/gc")[1] == {"removed": 0, "freed_bytes": 0}


def test_a_check_names_what_is_damaged_and_whose_it_is(gateway: LiveGateway, key: str) -> None:
    content, digest = fresh(14)
    put(gateway, digest, content, key)
    assert gateway.call("GET", "/api/v1/registry/check")[1]["ok"] is True
    [path] = (gateway.state_dir / "blobs").glob(f"sha256/*/{digest}*")
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    status, report, _ = gateway.call("GET", "/api/v1/registry/check")
    assert (status, report["ok"]) == (200, False)
    assert report["problems"] == [{"digest": digest, "problem": "damaged", "versions": []}]
    path.unlink()
    assert gateway.call("GET", "/api/v1/registry/check")[1]["problems"][0]["problem"] == "missing"
    gateway.call("POST", "/api/v1/registry/gc")
    assert gateway.call("GET", "/api/v1/registry/check")[1]["ok"] is True


def test_a_full_disk_is_an_answer_and_serving_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", str(state)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        models.write_repository(tmp_path / "models", {"add_one": models.add_one()})
        with run_gateway(tmp_path / "models", state) as gateway:
            key = gateway.make_key("deploy")
            infer = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1] * 16}]}
            served: list[int] = []
            over = threading.Event()

            def ask() -> None:
                while not over.is_set():
                    served.append(gateway.call("POST", "/v2/models/add_one/infer", infer)[0])

            asking = threading.Thread(target=ask)
            asking.start()
            content, digest = fresh(20, 20 * 1024 * 1024)
            try:
                for _ in range(3):
                    status, answer = put(gateway, digest, content, key)
                    assert (status, answer["code"]) == (507, "insufficient_storage")
                    assert "remove versions that are not needed" in answer["detail"]
            finally:
                over.set()
                asking.join()
            assert len(served) > 3
            assert set(served) == {200}, "nobody notices while the disk is full"
            with raw(gateway, digest, key, "Transfer-Encoding: chunked") as client:
                for start in range(0, len(content), 65_536):
                    client.send(b"10000\r\n" + content[start : start + 65_536] + b"\r\n")
                client.send(b"0\r\n\r\n")
                answered = client.read()
                assert (answered.status, answered.json["code"]) == (507, "insufficient_storage")
            assert list((state / "uploads").iterdir()) == []
            assert gateway.call("POST", "/v2/models/add_one/infer", infer)[0] == 200
            small, its_digest = fresh(21, 100_000)
            assert put(gateway, its_digest, small, key)[0] == 201
    finally:
        subprocess.run(["umount", str(state)], check=True)
