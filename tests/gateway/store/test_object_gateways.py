"""Gateway processes over one PostgreSQL and one S3 store, each with a disk of its own."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import models
from deploying import deploy, digest_of, infer
from live import LiveGateway, run_gateway

AGREE_S = 2.0
GRACE_S = 5.0
"""For which a content is kept without being used: as long as a deployment takes to begin."""


class Fleet:
    """Gateways that share a database and a store, started one after the other."""

    def __init__(self, stack: ExitStack, root: Path) -> None:
        self._stack = stack
        self._root = root

    def start(self, name: str, *options: str) -> LiveGateway:
        """One more, on an empty disk."""
        folder = self._root / name
        (folder / "models").mkdir(parents=True)
        return self._stack.enter_context(run_gateway(folder / "models", folder / "state", *options))


@pytest.fixture
def fleet(postgres: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setenv("INFERWAY_DATABASE_URL", postgres.new_schema())
    monkeypatch.setenv("INFERWAY_BLOB_STORE", bucket)
    monkeypatch.setenv("INFERWAY_BLOB_GRACE_S", str(GRACE_S))
    monkeypatch.setenv("INFERWAY_KEY_PEPPER", secrets.token_hex(32))
    with ExitStack() as stack:
        yield Fleet(stack, tmp_path)


def within(agreed: Callable[[], bool], limit_s: float = AGREE_S) -> None:
    began = time.monotonic()
    while not agreed():
        assert time.monotonic() - began < limit_s, "they did not agree in time"
        time.sleep(0.01)


def cached(gateway: LiveGateway) -> set[str]:
    """Digests of the contents that a gateway has on its disk."""
    return {path.name for path in (gateway.state_dir / "cache" / "sha256").glob("*/*")}


@pytest.mark.postgres
@pytest.mark.slow
def test_gateways_with_disks_of_their_own_agree_within_two_seconds(fleet: Fleet) -> None:
    here, there = fleet.start("one"), fleet.start("two")
    first, second = models.add_one(increment=1), models.add_one(increment=2)
    deploy(here, "shared", first)
    within(lambda: infer(there, "shared") == (200, 2.0, "1"))
    assert cached(there) == {digest_of(first)}, "it has fetched what it serves"
    deploy(there, "shared", second)
    within(lambda: infer(here, "shared") == (200, 3.0, "2"))
    assert here.call("POST", "/api/v1/models/shared/aliases/stable/rollback", {})[0] == 200
    within(lambda: infer(there, "shared") == (200, 2.0, "1"))
    assert here.call("DELETE", "/api/v1/models/shared/versions/2")[0] == 204
    within(lambda: infer(there, "shared/versions/2")[0] == 404)

    # A content that nothing names any more leaves the store, whichever of them is told to look.
    within(lambda: there.call("POST", "/api/v1/registry/gc", {})[1]["removed"] == 1, 4 * GRACE_S)
    assert here.call("GET", f"/api/v1/blobs/{digest_of(second)}")[0] == 404
    for gateway in (here, there):
        report = gateway.call("GET", "/api/v1/registry/check")[1]
        assert report["ok"] is True, report

    assert there.call("DELETE", "/api/v1/models/shared")[0] == 204
    within(lambda: infer(here, "shared")[0] == 404)


@pytest.mark.postgres
@pytest.mark.slow
def test_a_gateway_on_an_empty_disk_fetches_what_it_serves(fleet: Fleet) -> None:
    """Larger than a part of an upload to the store, with weights in a file of their own."""
    here = fleet.start("one")
    graph, weights = models.external_data(1536)
    files = {"model.onnx": graph, "model.onnx.data": weights}
    deploy(here, "weighty", files)
    deploy(here, "small", models.add_one())
    expected = infer(here, "weighty", size=1536, value=3)
    assert expected == (200, 3.0, "1")
    late = fleet.start("late", "--workers", "2")
    within(lambda: infer(late, "weighty", size=1536, value=3) == expected, 20)
    within(lambda: infer(late, "small") == (200, 2.0, "1"))
    assert cached(late) == {digest_of(content) for content in (*files.values(), models.add_one())}
    folder = next((late.state_dir / "versions" / "weighty").iterdir())
    assert (folder / "model.onnx.data").read_bytes() == weights
    assert (folder / "model.onnx.data").stat().st_nlink == 2, "and has it on its disk once"


@pytest.mark.postgres
@pytest.mark.slow
def test_what_is_loaded_is_served_while_the_store_hangs(fleet: Fleet, s3: Any) -> None:
    here = fleet.start("one")
    deploy(here, "steady", models.add_one(increment=1))
    deploy(here, "steady", models.add_one(increment=2), alias="canary")
    s3.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(20):
            assert infer(here, "steady") == (200, 2.0, "1")
            assert infer(here, "steady@canary") == (200, 3.0, "2")
    finally:
        s3.process.send_signal(signal.SIGCONT)
    assert deploy(here, "steady", models.add_one(increment=3))["version"] == 3
