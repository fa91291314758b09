"""Several gateway processes over one PostgreSQL, and one directory of files or one object store."""

from __future__ import annotations

import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import models
from deploying import LIMIT_S, begin, deploy, infer, watch
from live import LiveGateway, run_gateway

AGREE_S = 2.0


@pytest.fixture
def pair(postgres: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LiveGateway, LiveGateway]]:
    """Two gateways that share a database and a state directory, and have no folder of models in common."""
    monkeypatch.setenv("INFERWAY_DATABASE_URL", postgres.new_schema())
    with ExitStack() as stack:
        found = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            found.append(stack.enter_context(run_gateway(tmp_path / name, tmp_path / "state")))
        yield found[0], found[1]


def within(limit_s: float, agreed: Callable[[], bool]) -> float:
    """Seconds until it is so; fails where it takes longer."""
    began = time.monotonic()
    while not agreed():
        assert time.monotonic() - began < limit_s, "they did not agree in time"
        time.sleep(0.01)
    return time.monotonic() - began


@pytest.mark.postgres
def test_what_one_does_the_other_serves_within_two_seconds(pair: tuple[LiveGateway, LiveGateway]) -> None:
    here, there = pair
    deploy(here, "shared", models.add_one(increment=1))
    within(AGREE_S, lambda: infer(there, "shared") == (200, 2.0, "1"))
    deploy(there, "shared", models.add_one(increment=2))
    within(AGREE_S, lambda: infer(here, "shared") == (200, 3.0, "2"))
    assert here.call("POST", "/api/v1/models/shared/aliases/stable/rollback", {})[0] == 200
    within(AGREE_S, lambda: infer(there, "shared") == (200, 2.0, "1"))
    assert here.call("DELETE", "/api/v1/models/shared/versions/2")[0] == 204
    within(AGREE_S, lambda: infer(there, "shared/versions/2")[0] == 404)
    assert there.call("DELETE", "/api/v1/models/shared")[0] == 204
    within(AGREE_S, lambda: infer(here, "shared")[0] == 404)


@pytest.mark.postgres
def test_a_deployment_is_watched_and_cancelled_from_the_other(pair: tuple[LiveGateway, LiveGateway]) -> None:
    here, there = pair
    deploy(here, "watched", models.add_one(increment=1))
    status, answer = begin(here, "watched", {"model.onnx": models.add_one(increment=2)})
    assert status == 202
    ended, _ = watch(there, answer)
    assert ended["state"] == "succeeded"
    status, answer = begin(here, "watched", {"model.onnx": models.matmul(1024, 4096)})
    assert status == 202
    assert there.call("POST", f"/api/v1/deployments/{answer['id']}/cancel")[0] == 200
    ended, _ = watch(there, answer)
    assert ended["state"] == "cancelled", ended
    assert infer(here, "watched") == (200, 3.0, "2")


@pytest.mark.postgres
def test_they_serve_on_without_the_database_and_follow_when_it_is_back(
    pair: tuple[LiveGateway, LiveGateway], postgres: Any
) -> None:
    here, there = pair
    deploy(here, "steady", models.add_one(increment=1))
    deploy(here, "steady", models.add_one(increment=2), alias="canary")
    within(AGREE_S, lambda: infer(there, "steady@canary") == (200, 3.0, "2"))
    postgres.control("stop", "-m", "immediate")
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            for gateway in pair:
                assert infer(gateway, "steady") == (200, 2.0, "1")
                assert infer(gateway, "steady@canary") == (200, 3.0, "2")
        assert here.call("GET", "/api/v1/models/steady")[0] == 503
    finally:
        postgres.control("start")
    deploy(there, "steady", models.add_one(increment=3))
    within(AGREE_S, lambda: infer(here, "steady") == (200, 4.0, "3"))


@pytest.mark.slow
@pytest.mark.postgres
def test_gateways_with_nothing_but_a_database_and_an_object_store_in_common_serve_the_same(
    postgres: Any, s3: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("DATABASE_URL", postgres.new_schema()),
        ("BLOB_STORE", bucket),
        ("KEY_PEPPER", "5a" * 32),
        ("BLOB_GRACE_S", "0.001"),
    ):
        monkeypatch.setenv(f"INFERWAY_{name}", value)
    (tmp_path / "models").mkdir()
    with ExitStack() as stack:

        def start(name: str) -> LiveGateway:
            return stack.enter_context(run_gateway(tmp_path / "models", tmp_path / name))

        here, there = start("one"), start("two")
        deploy(here, "shared", models.add_one(increment=1))
        within(AGREE_S, lambda: infer(there, "shared") == (200, 2.0, "1"))
        assert deploy(there, "shared", models.add_one(increment=1))["reused"]
        assert deploy(there, "shared", models.add_one(increment=2))["version"] == 2
        within(AGREE_S, lambda: infer(here, "shared") == (200, 3.0, "2"))
        assert not list(tmp_path.glob("*/blobs")), "contents are in the store, and local copies in caches"
        assert all(list(tmp_path.glob(f"{name}/cache/sha256/*/*")) for name in ("one", "two"))

        s3.process.send_signal(signal.SIGSTOP)
        try:
            for gateway in (here, there):
                assert infer(gateway, "shared") == (200, 3.0, "2")
                assert infer(gateway, "shared/versions/1") == (200, 2.0, "1")
        finally:
            s3.process.send_signal(signal.SIGCONT)

        late = start("three")
        assert infer(late, "shared") == (200, 3.0, "2")
        assert late.call("GET", "/api/v1/registry/check")[1] == {"checked": 2, "ok": True, "problems": []}
        assert late.call("DELETE", "/api/v1/models/shared")[0] == 204
        within(AGREE_S, lambda: infer(here, "shared")[0] == 404 and infer(there, "shared")[0] == 404)
        within(LIMIT_S, lambda: here.call("POST", "/api/v1/registry/gc")[0] == 200 and not _objects(s3, bucket))


def _objects(s3: Any, bucket: str) -> int:
    """How many there are in the store."""
    name = bucket.removeprefix("s3://").partition("/")[0]
    with urllib.request.urlopen(f"{s3.url}/{name}?list-type=2", timeout=10) as answer:
        return int(answer.read().count(b"<Key>"))
