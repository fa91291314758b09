"""Several gateway processes over one PostgreSQL and one directory of files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import models
from deploying import begin, deploy, infer, watch
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
