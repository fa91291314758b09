"""The life of a model through the SDK and the command line, on a real gateway."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnx
import pytest

import inferway
import models
from inferway import DeployEvent, DeploymentFailedError, _package
from inferway_gateway.__main__ import main
from live import LiveGateway, run_gateway
from scripted import Side

MIB = 1024 * 1024
ROW = np.zeros((1, 16), np.float32)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway with one model of the operator's own; tests deploy under names of their own."""
    root = tmp_path_factory.mktemp("lifecycle")
    models.write_repository(root / "models", {"placed": models.add_one()})
    with run_gateway(root / "models", root / "state", "--trial-budget-s", "0") as running:
        yield running


@pytest.fixture(params=["sync", "async"])
async def side(request: pytest.FixtureRequest) -> AsyncIterator[Side]:
    made = Side(request.param)
    yield made
    await made.end()


@pytest.fixture
def client(side: Side, live: LiveGateway) -> Any:
    return side.client(live.url, api_key=live.admin_key)


@pytest.fixture
def name(side: Side, request: pytest.FixtureRequest) -> str:
    return f"m{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"


def adds(amount: float) -> bytes:
    return models.add_one(increment=amount)


# --- deploying ---------------------------------------------------------------------------------------------------


async def test_a_model_is_put_up_with_one_call_and_answers(side: Side, client: Any, name: str) -> None:
    deployment = await side(lambda: client.models.deploy(adds(2), name=name, labels={"team": "growth"}))
    assert (deployment.state, deployment.step, deployment.version) == ("succeeded", "ready", 1)
    assert deployment.version_record.labels == {"team": "growth"}
    assert (await side(lambda: deployment.handle.predict(ROW))).tolist() == [[2.0] * 16]
    for called in (name, f"{name}@stable"):
        result = await side(partial(client.infer, called, ROW))
        assert (result.output[0, 0], result.model_version) == (2.0, "1")
        assert result.headers["Inferway-Model-Version"] == "1"
    assert (await side(lambda: client.models.get(f"{name}@stable"))).versions == ("1",)
    assert name in await side(lambda: client.models.list())


async def test_the_same_content_is_the_same_version(side: Side, client: Any, name: str, tmp_path: Path) -> None:
    (tmp_path / "renamed.onnx").write_bytes(adds(2))
    first = await side(lambda: client.models.deploy(adds(2), name=name))
    events: list[DeployEvent] = []
    again = await side(lambda: client.models.deploy(tmp_path / "renamed.onnx", name=name, progress=events.append))
    assert (again.version, again.reused, again.digest) == (first.version, True, first.digest)
    assert [event.kind for event in events if event.file][-1] == "skipped"
    other = await side(lambda: client.models.deploy(adds(3), name=name))
    assert (other.version, other.reused) == (2, False)


async def test_weights_beside_a_model_travel_with_it(side: Side, client: Any, name: str, tmp_path: Path) -> None:
    model, weights = models.external_data(location="weights/w.bin")
    (tmp_path / "weights").mkdir()
    (tmp_path / "net.onnx").write_bytes(model)
    (tmp_path / "weights" / "w.bin").write_bytes(weights)
    deployment = await side(lambda: client.models.deploy(tmp_path / "net.onnx", name=name))
    assert [file.path for file in deployment.version_record.files] == ["model.onnx", "weights/w.bin"]
    row = np.arange(64, dtype=np.float32)[None]
    assert np.array_equal(await side(lambda: deployment.handle.predict(row)), row)


async def test_a_folder_brings_its_configuration_along(side: Side, client: Any, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "churn"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(adds(1))
    (folder / "inferway.toml").write_text("[batching]\nenabled = false\n")
    (folder / ".git").mkdir()
    await side(lambda: client.models.deploy(folder, name=name))
    config = await side(lambda: client.models.config(name))
    assert config.inferway.batching is False
    on = await side(lambda: client.models.deploy(folder, name=name, batching=True))
    assert (on.version, on.version_record.config) == (2, {"batching": {"enabled": True}})
    assert (await side(lambda: client.models.config(name))).inferway.batching is True


async def test_a_model_in_memory_of_any_size_is_deployed(
    side: Side, client: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = onnx.load_model_from_string(models.matmul())
    whole = await side(lambda: client.models.deploy(proto, name=name))
    row = np.ones((1, 64), np.float32)
    wanted = await side(lambda: whole.handle.predict(row))
    monkeypatch.setattr(_package, "PROTOBUF_LIMIT_BYTES", 500)
    parted = await side(lambda: client.models.deploy(proto, name=name))
    assert [file.path for file in parted.version_record.files] == ["model.onnx", "model.onnx.data"]
    assert np.array_equal(await side(lambda: parted.handle.predict(row)), wanted)


# --- what fails leaves what serves -------------------------------------------------------------------------------


async def test_golden_examples_decide(side: Side, client: Any, name: str) -> None:
    await side(lambda: client.models.deploy(adds(1), name=name, golden=[({"x": ROW}, {"y": ROW + 1})]))
    with pytest.raises(DeploymentFailedError) as raised:
        await side(lambda: client.models.deploy(adds(2), name=name, golden=[(ROW, ROW + 1)]))
    assert (raised.value.step, raised.value.code) == ("compared", "golden_mismatch")
    assert raised.value.deployment.state == "failed"
    result = await side(lambda: client.infer(name, ROW))
    assert (result.output[0, 0], result.model_version) == (1.0, "1")
    assert [version.version for version in await side(lambda: client.models.versions(name))] == [1]
    [failed, _] = await side(lambda: client.models.deployments(name))
    assert (failed.state, failed.failed_step, failed.error.code) == ("failed", "compared", "golden_mismatch")


async def test_a_model_that_cannot_be_loaded_says_at_which_step_and_why(side: Side, client: Any, name: str) -> None:
    with pytest.raises(DeploymentFailedError) as raised:
        await side(lambda: client.models.deploy(models.corrupt()["no_such_operator"], name=name))
    assert raised.value.step in ("admitted", "loaded")
    assert raised.value.code in ("model_rejected", "model_load_failed")
    with pytest.raises(inferway.ModelNotFoundError):
        await side(lambda: client.infer(name, ROW))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"name": "placed"}, inferway.ConflictError),
        ({"isolation": "inprocess"}, inferway.PermissionDeniedError),
        ({"config": {"run_timeout": 1}}, inferway.BadRequestError),
    ],
    ids=["name", "isolation", "config"],
)
async def test_what_is_not_allowed_is_said_at_once(
    side: Side, client: Any, name: str, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await side(lambda: client.models.deploy(adds(1), **{"name": name, **arguments}))


async def test_a_key_without_the_scope_deploys_nothing(side: Side, live: LiveGateway, name: str) -> None:
    client = side.client(live.url, api_key=live.make_key("infer", "read"))
    with pytest.raises(inferway.PermissionDeniedError):
        await side(lambda: client.models.deploy(adds(1), name=name))


async def test_an_upload_that_was_cut_goes_on(
    side: Side, client: Any, live: LiveGateway, name: str, tmp_path: Path
) -> None:
    model, weights = models.external_data(size=1024, location=f"{side.kind}.bin")
    (tmp_path / "net.onnx").write_bytes(model)
    (tmp_path / f"{side.kind}.bin").write_bytes(weights + side.kind.encode())
    data = weights + side.kind.encode()
    digest, half = hashlib.sha256(data).hexdigest(), len(data) // 2
    parts = urlsplit(live.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0)) as connection:
        head = f"PUT /api/v1/blobs/{digest} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {live.admin_key}\r\n"
        head += f"Content-Length: {len(data)}\r\nUpload-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data[:half])
    end = time.monotonic() + 30
    while live.call("GET", f"/api/v1/blobs/{digest}")[1].get("received") != half:
        assert time.monotonic() < end, "what came before the cut is not kept"
        await asyncio.sleep(0.02)
    events: list[DeployEvent] = []
    deployment = await side(lambda: client.models.deploy(tmp_path / "net.onnx", name=name, progress=events.append))
    assert deployment.state == "succeeded"
    sent = [event for event in events if event.kind == "uploading" and event.file == f"{side.kind}.bin"]
    assert sent[0].done_bytes > half, "what the gateway had is not sent again"
    assert sent[-1].done_bytes == len(data)


async def test_a_file_that_is_too_large_is_refused_while_it_is_sent(
    side: Side, small: LiveGateway, name: str, tmp_path: Path
) -> None:
    client = side.client(small.url, api_key=small.admin_key)
    model, _ = models.external_data(location="w.bin")
    (tmp_path / "net.onnx").write_bytes(model)
    with (tmp_path / "w.bin").open("wb") as weights:
        weights.truncate(64 * MIB)
    with pytest.raises(inferway.PayloadTooLargeError):
        await side(lambda: client.models.deploy(tmp_path / "net.onnx", name=name, timeout=30))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway that takes files of a mebibyte at most."""
    root = tmp_path_factory.mktemp("small")
    (root / "models").mkdir()
    with run_gateway(root / "models", root / "state", environment={"INFERWAY_UPLOAD_LIMIT_BYTES": str(MIB)}) as running:
        yield running


# --- deployments, versions, aliases, events ----------------------------------------------------------------------


async def test_a_deployment_is_watched_from_anywhere(side: Side, client: Any, name: str) -> None:
    begun = await side(lambda: client.models.deploy(adds(1), name=name, wait=False))
    found = await side(lambda: client.models.deployment(begun.id))
    steps = await side.all(found.watch(60))
    assert steps == ["received", "checked", "admitted", "loaded", "warmed", "compared", "ready"]
    assert (await side(lambda: begun.wait(60))).version_record.state == "READY"
    # Cancelling what has ended changes nothing.
    assert (await side(lambda: found.cancel())).state == "succeeded"
    with pytest.raises(inferway.DeploymentNotFoundError):
        await side(lambda: client.models.deployment("0" * 24))


async def test_a_deployment_that_would_never_end_is_cancelled(side: Side, client: Any, name: str) -> None:
    deployment = await side(lambda: client.models.deploy(models.endless(), name=name, wait=False))
    watching = deployment.watch(60)
    while (await side(lambda: anext(watching) if side.kind == "async" else next(watching))) != "admitted":
        pass
    assert deployment.state == "running"
    await side(lambda: deployment.cancel())
    with pytest.raises(DeploymentFailedError) as raised:
        await side(lambda: deployment.wait(60))
    assert (raised.value.code, deployment.state) == ("cancelled", "cancelled")
    assert f"deployment {deployment.id} of {name} was cancelled" in str(raised.value)
    with pytest.raises(inferway.ModelNotFoundError):
        await side(lambda: client.models.describe(name))


async def test_a_canary_is_tried_taken_back_and_remembered(side: Side, client: Any, name: str) -> None:
    await side(lambda: client.models.deploy(adds(1), name=name))
    await side(lambda: client.models.deploy(adds(2), name=name, alias="canary"))
    assert (await side(lambda: client.infer(name, ROW))).model_version == "1"
    assert (await side(lambda: client.infer(f"{name}@canary", ROW))).model_version == "2"
    alias = await side(lambda: client.models.set_alias(name, "stable", {1: 50, 2: 50}, fallback=[1], guard=True))
    assert alias.weights == {"1": 50, "2": 50}
    seen = {(await side(lambda: client.infer(name, ROW))).model_version for _ in range(60)}
    assert seen == {"1", "2"}
    with pytest.raises(inferway.ConflictError):
        await side(lambda: client.models.set_alias(name, "stable", 2, expected_revision=alias.revision + 5))
    back = await side(lambda: client.models.rollback(name))
    assert back.weights == {"1": 100}
    assert {(await side(lambda: client.infer(name, ROW))).model_version for _ in range(10)} == {"1"}
    traffic = (await side(lambda: client.models.alias(name, "stable"))).traffic
    assert traffic["1"].requests > 0
    assert {alias.alias for alias in await side(lambda: client.models.aliases(name))} == {"stable", "canary"}
    events = await side.all(client.models.events(name, page_size=3))
    assert [event.kind for event in events][:2] == ["rolled_back", "alias_set"]
    assert [event.kind for event in events].count("deployment_succeeded") == 2
    assert [event.id for event in events] == sorted((event.id for event in events), reverse=True)
    everything = await side.all(client.models.events())
    assert {event.id for event in events} <= {event.id for event in everything}


async def test_a_version_goes_when_nothing_names_it(side: Side, client: Any, name: str) -> None:
    await side(lambda: client.models.deploy(adds(1), name=name))
    await side(lambda: client.models.deploy(adds(2), name=name))
    with pytest.raises(inferway.ConflictError):
        await side(lambda: client.models.delete(name, 2))
    pinned = await side(lambda: client.models.update(name, 1, pinned=True, labels={"kept": "yes"}))
    assert (pinned.pinned, pinned.labels) == (True, {"kept": "yes"})
    await side(lambda: client.models.set_alias(name, "stable", 1))
    await side(lambda: client.models.delete(name, 2))
    with pytest.raises(inferway.VersionNotFoundError):
        await side(lambda: client.models.version(name, 2))
    described = await side(lambda: client.models.describe(name))
    assert (described.source, [version.version for version in described.versions]) == ("catalog", [1])
    await side(lambda: client.models.delete(name))
    with pytest.raises(inferway.ModelNotFoundError):
        await side(lambda: client.models.describe(name))
    with pytest.raises(inferway.ModelNotFoundError):
        await side(lambda: client.infer(name, ROW))


async def test_models_of_the_operator_are_described_too(side: Side, client: Any) -> None:
    described = await side(lambda: client.models.describe("placed"))
    assert described.source == "repository"
    assert "placed" in {model.name for model in await side(lambda: client.models.catalog())}


async def test_an_alias_or_version_that_is_not_there_is_said_so(side: Side, client: Any, name: str) -> None:
    await side(lambda: client.models.deploy(adds(1), name=name))
    with pytest.raises(inferway.AliasNotFoundError):
        await side(lambda: client.infer(f"{name}@canary", ROW))
    with pytest.raises(inferway.VersionNotFoundError):
        await side(lambda: client.models.set_alias(name, "stable", 9))
    with pytest.raises(inferway.ConflictError):
        await side(lambda: client.models.rollback(name))


# --- the command line --------------------------------------------------------------------------------------------


def test_the_same_life_on_the_command_line(
    live: LiveGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INFERWAY_BASE_URL", live.url)
    monkeypatch.setenv("INFERWAY_API_KEY", live.admin_key)

    def inferway_(*arguments: str, status: int = 0) -> str:
        ended = main(arguments)
        printed = capsys.readouterr()
        assert ended == status, printed.err
        return printed.out or printed.err

    for number, amount in enumerate((1.0, 2.0), 1):
        (tmp_path / "net.onnx").write_bytes(adds(amount))
        said = inferway_("deploy", str(tmp_path / "net.onnx"), "--name", "cli", "--label", f"n={number}")
        assert said == f"cli version {number} is ready, and cli@stable points at it.\n"
    assert "version 2" in inferway_("models", "list")
    assert [version["version"] for version in json.loads(inferway_("models", "versions", "cli", "--json"))] == [1, 2]
    assert "n=1" in inferway_("models", "show", "cli")
    assert inferway_("models", "rollback", "cli") == "cli@stable points at version 1; before it was version 2.\n"
    set_to = inferway_("models", "alias", "set", "cli", "stable", "1=95", "2=5")
    assert set_to.startswith("cli@stable points at version 1 with 95 %, version 2 with 5 %")
    assert "REVISION" in inferway_("models", "alias", "list", "cli")
    assert "rolled_back" in inferway_("models", "history", "cli")
    assert "stays in memory" in inferway_("models", "pin", "cli", "1")
    assert "409 conflict" in inferway_("models", "delete", "cli", "1", "--yes", status=1)
    assert inferway_("models", "delete", "cli", "--yes") == "cli is deleted.\n"
    (tmp_path / "net.onnx").write_bytes(b"no model")
    assert "cannot be read as an ONNX model" in inferway_("deploy", str(tmp_path / "net.onnx"), "--name", "x", status=2)
