"""``client.models.deploy`` and deployments, against a scripted gateway: what goes over the wire, and every fault."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import inferway
import models
from inferway import DeployEvent, DeploymentFailedError, RetryEvent, _upload
from lifecycle import FakeLifecycle, problem, version_record
from scripted import Answer, FakeClock, ScriptedServer, Side, as_json

MIB = 1024 * 1024
MODEL = models.add_one()


@pytest.fixture
def gateway(server: ScriptedServer) -> FakeLifecycle:
    return FakeLifecycle(server)


@pytest.fixture
def client(side: Side, gateway: FakeLifecycle, time: FakeClock) -> Any:
    return side.client(gateway.server.url, api_key="key-1234567890", clock=time.clock())


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model with 5 MiB of weights beside it."""
    model, _ = models.external_data(location="w.bin")
    (tmp_path / "net.onnx").write_bytes(model)
    (tmp_path / "w.bin").write_bytes(np.random.default_rng(0).bytes(5 * MIB + 123))
    return tmp_path / "net.onnx"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- the way of a model ------------------------------------------------------------------------------------------


async def test_a_model_is_sent_by_its_digest_and_waited_for(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    deployment = await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert gateway.blobs == {digest(MODEL): MODEL}
    [put] = gateway.puts()
    assert put.headers["content-length"] == put.headers["upload-length"] == str(len(MODEL))
    assert put.headers["content-type"] == "application/octet-stream"
    assert put.headers["authorization"] == "Bearer key-1234567890"
    assert "upload-offset" not in put.headers
    assert gateway.created == [
        {
            "files": [{"path": "model.onnx", "digest": digest(MODEL), "size": len(MODEL)}],
            "alias": "stable", "labels": {}, "metadata": {}, "config": {}, "pinned": False,
        }
    ]  # fmt: skip
    assert (deployment.id, deployment.model, deployment.version) == ("d1", "churn", 1)
    assert (deployment.state, deployment.step, deployment.error) == ("succeeded", "ready", None)
    assert (deployment.alias, deployment.reused, deployment.failed_step) == ("stable", False, None)
    assert deployment.created_by == "key"
    assert deployment.created_at.tzinfo is not None
    assert deployment.version_record.state == "READY"
    assert (deployment.handle.name, deployment.handle.version) == ("churn", "1")
    assert repr(deployment).endswith("Deployment d1 of churn version 1: succeeded>")


async def test_everything_that_is_said_of_a_version_goes_along(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    await side(
        lambda: client.models.deploy(
            MODEL, name="churn", version=7, alias=None, labels={"team": "growth"}, metadata={"auc": 0.9},
            batching={"max_queue_rows": 5}, instances=2, isolation="inprocess", config={"run_timeout_s": 3.0},
            pinned=True,
        )
    )  # fmt: skip
    [body] = gateway.created
    del body["files"]
    assert body == {
        "alias": None, "labels": {"team": "growth"}, "metadata": {"auc": 0.9}, "pinned": True, "version": 7,
        "isolation": "inprocess",
        "config": {"run_timeout_s": 3.0, "batching": {"max_queue_rows": 5}, "instances": 2},
    }  # fmt: skip


async def test_batching_may_be_a_word(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    await side(lambda: client.models.deploy(MODEL, name="churn", batching=False))
    assert gateway.created[0]["config"] == {"batching": {"enabled": False}}


async def test_golden_examples_become_a_file_of_the_version(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    row = np.zeros((1, 16), np.float32)
    await side(lambda: client.models.deploy(MODEL, name="churn", golden=[({"x": row}, row + 1)]))
    file = gateway.created[0]["files"][0]
    assert file["path"] == "golden.json"
    [example] = json.loads(gateway.blobs[file["digest"]])["examples"]
    assert example == {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [0.0] * 16}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}],
    }


async def test_what_the_gateway_has_is_not_sent_again(
    side: Side, client: Any, gateway: FakeLifecycle, large: Path
) -> None:
    events: list[DeployEvent] = []
    await side(lambda: client.models.deploy(large, name="churn"))
    sent = len(gateway.puts())
    assert sent == 2
    await side(lambda: client.models.deploy(large, name="churn", progress=events.append))
    assert len(gateway.puts()) == sent
    assert [event.file for event in events if event.kind == "skipped"] == ["model.onnx", "w.bin"]
    assert "uploading" not in {event.kind for event in events}


async def test_the_same_content_under_two_names_is_sent_once(
    side: Side, client: Any, gateway: FakeLifecycle, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(MODEL)
    (tmp_path / "copy.txt").write_bytes(MODEL)
    await side(lambda: client.models.deploy(tmp_path, name="churn"))
    assert len(gateway.puts()) == 1
    assert len(gateway.created[0]["files"]) == 2


async def test_progress_is_told_as_it_happens(side: Side, client: Any, gateway: FakeLifecycle, large: Path) -> None:
    events: list[DeployEvent] = []
    (large.parent / ".hidden").write_bytes(b"")
    await side(lambda: client.models.deploy(large.parent, name="churn", progress=events.append))
    size, head = len((large.parent / "w.bin").read_bytes()), len(models.external_data(location="w.bin")[0])
    packed = events[0]
    assert (packed.kind, packed.files, packed.left_out) == ("packed", ("net.onnx", "w.bin"), (".hidden",))
    assert packed.total_bytes == size + head
    hashed = [event.done_bytes for event in events if event.kind == "hashing" and event.file == "w.bin"]
    assert hashed[-1] == size
    sent = [event.done_bytes for event in events if event.kind == "uploading" and event.file == "w.bin"]
    assert sent == sorted(sent)
    assert len(sent) >= 5
    assert sent[-1] == size
    tail = [event for event in events if event.deployment_id is not None]
    assert {event.deployment_id for event in tail} == {"d1"}
    assert [event.step for event in tail if event.kind == "step"] == [
        "received", "checked", "admitted", "loaded", "warmed", "compared", "ready",
    ]  # fmt: skip
    assert (tail[0].kind, tail[-1].kind, tail[-1].message) == ("created", "ended", "succeeded")


async def test_an_empty_file_is_a_file(side: Side, client: Any, gateway: FakeLifecycle, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(MODEL)
    (tmp_path / "empty.txt").write_bytes(b"")
    await side(lambda: client.models.deploy(tmp_path, name="churn"))
    assert gateway.blobs[digest(b"")] == b""


async def test_a_callers_own_http_client_streams_too(side: Side, gateway: FakeLifecycle, large: Path) -> None:
    own = httpx.Client() if side.kind == "sync" else httpx.AsyncClient()
    client = side.client(gateway.server.url, http_client=own)
    await side(lambda: client.models.deploy(large, name="churn"))
    assert digest((large.parent / "w.bin").read_bytes()) in gateway.blobs
    assert all("transfer-encoding" not in put.headers for put in gateway.puts())


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "no spaces"}, "expected a model's name"),
        ({"name": "churn@canary"}, "an alias has no place here"),
        ({"name": "churn", "version": 0}, "a whole number from 1"),
        ({"name": "churn", "version": True}, "a whole number from 1"),
        ({"name": "churn", "alias": "Stable"}, "expected an alias"),
        ({"name": "churn", "batching": True, "config": {"batching": {}}}, "batching is given twice"),
        ({"name": "churn", "golden": []}, "a list of pairs"),
        ({"name": "churn", "golden": [[1]]}, "example 1 is list"),
        ({"name": "churn", "golden": [({"z": 1}, {"y": 1})]}, "golden example 1: 'z' is no input"),
        (
            {"name": "churn", "golden": [([[0.0] * 16], {"z": 1})]},
            "golden example 1: 'z' is no output of the model, expected 'y'",
        ),
        ({"name": "churn", "golden": [([[0.0] * 16], {"y": [["a"]]})]}, "golden example 1: output 'y'"),
        ({"name": "churn", "metadata": {"auc": object()}}, "metadata can hold what JSON has, .* is of type object"),
        ({"name": "churn", "metadata": {"auc": float("nan")}}, "metadata can hold what JSON has"),
        ({"name": "churn", "config": {"instances": {1, 2}}}, "config can hold what JSON has, .* is of type set"),
        ({"name": "churn", "timeout": -1}, "positive"),
    ],
)
async def test_arguments_are_checked_before_anything_is_sent(
    side: Side, client: Any, gateway: FakeLifecycle, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        await side(lambda: client.models.deploy(MODEL, **arguments))
    assert gateway.server.seen == []


async def test_scores_of_numpy_are_kept_as_numbers(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    scores = {"auc": np.float64(0.75), "seen": np.int64(3), "by_kind": np.array([0.5, 1.0]), "split": {"test": 0.2}}
    done = await side(lambda: client.models.deploy(MODEL, name="churn", metadata=scores))
    assert done.state == "succeeded"
    [created] = [seen for seen in gateway.server.seen if seen.path.endswith("/versions") and seen.method == "POST"]
    kept = {"auc": 0.75, "seen": 3, "by_kind": [0.5, 1.0], "split": {"test": 0.2}}
    assert json.loads(created.body)["metadata"] == kept


# --- uploads that break ------------------------------------------------------------------------------------------


async def test_a_cut_upload_goes_on_where_it_was(
    side: Side, client: Any, gateway: FakeLifecycle, large: Path, time: FakeClock
) -> None:
    data = (large.parent / "w.bin").read_bytes()
    gateway.keep(large)
    events: list[DeployEvent] = []
    gateway.server.cuts = [2 * MIB, MIB]
    await side(lambda: client.models.deploy(large, name="churn", progress=events.append))
    assert gateway.blobs[digest(data)] == data
    assert [put.headers.get("upload-offset") for put in gateway.puts()] == [None, str(2 * MIB), str(3 * MIB)]
    assert [put.headers["content-length"] for put in gateway.puts()] == [
        str(len(data)), str(len(data) - 2 * MIB), str(len(data) - 3 * MIB),
    ]  # fmt: skip
    retries = [event for event in events if event.kind == "retrying"]
    assert [event.done_bytes for event in retries] == [2 * MIB, 3 * MIB]
    assert all(event.message == "the connection broke" for event in retries)
    assert len(time.slept) == 2


async def test_a_new_call_goes_on_with_what_an_earlier_one_left(
    side: Side, client: Any, gateway: FakeLifecycle, large: Path
) -> None:
    data = (large.parent / "w.bin").read_bytes()
    gateway.partial[digest(data)] = data[: 4 * MIB]
    await side(lambda: client.models.deploy(large, name="churn"))
    assert gateway.puts()[-1].headers["upload-offset"] == str(4 * MIB)
    assert gateway.blobs[digest(data)] == data


async def test_attempts_that_bring_something_are_not_counted(
    side: Side, client: Any, gateway: FakeLifecycle, large: Path
) -> None:
    gateway.keep(large)
    gateway.server.cuts = [MIB // 2] * 9
    await side(lambda: client.models.deploy(large, name="churn"))
    assert len(gateway.puts()) == 10


async def test_attempts_that_bring_nothing_are_bounded(
    side: Side, client: Any, gateway: FakeLifecycle, large: Path
) -> None:
    gateway.keep(large)
    gateway.server.cuts = [0] * 9
    with pytest.raises(inferway.APIConnectionError) as raised:
        await side(lambda: client.models.deploy(large, name="churn"))
    assert len(gateway.puts()) == 3
    assert "3 attempts that brought nothing new" in raised.value.__notes__[-1]
    assert gateway.created == []


async def test_uploads_spend_the_clients_retry_budget(side: Side, gateway: FakeLifecycle, time: FakeClock) -> None:
    policy = inferway.RetryPolicy(budget_ratio=0, budget_floor_per_s=0)
    client = side.client(gateway.server.url, retry=policy, clock=time.clock())
    gateway.server.cuts = [10]
    with pytest.raises(inferway.APIConnectionError) as raised:
        await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert len(gateway.puts()) == 1
    assert "budget is spent" in raised.value.__notes__[-1]


async def test_retry_none_sends_once(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    gateway.server.cuts = [10]
    with pytest.raises(inferway.APIConnectionError):
        await side(lambda: client.models.deploy(MODEL, name="churn", retry=None))
    assert len(gateway.puts()) == 1


async def test_retries_of_uploads_are_told_to_the_hook(side: Side, gateway: FakeLifecycle, time: FakeClock) -> None:
    told: list[RetryEvent] = []
    client = side.client(gateway.server.url, clock=time.clock(), on_retry=told.append)
    gateway.server.cuts = [10]
    await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert [(event.attempt, type(event.error)) for event in told] == [(1, inferway.APIConnectionError)]


async def test_an_upload_whose_answer_was_lost_is_not_sent_again(
    side: Side, client: Any, gateway: FakeLifecycle
) -> None:
    def arrived(_: Any) -> None:
        gateway.blobs[digest(MODEL)] = MODEL

    gateway.refuse = [Answer(raw=b"", before=arrived)]
    await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert len(gateway.puts()) == 1


async def test_a_conflict_goes_on_from_what_the_gateway_has(
    side: Side, client: Any, gateway: FakeLifecycle, large: Path
) -> None:
    data = (large.parent / "w.bin").read_bytes()
    gateway.keep(large)

    def elsewhere(_: Any) -> None:
        gateway.partial[digest(data)] = data[:MIB]

    conflict = problem(409, "upload_conflict", received=MIB)
    conflict.before = elsewhere
    gateway.refuse = [conflict]
    await side(lambda: client.models.deploy(large, name="churn"))
    assert [put.headers.get("upload-offset") for put in gateway.puts()] == [None, str(MIB)]
    assert gateway.blobs[digest(data)] == data


async def test_a_conflict_that_says_nothing_is_an_error(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    gateway.refuse = [problem(409, "upload_conflict")]
    with pytest.raises(inferway.UploadConflictError):
        await side(lambda: client.models.deploy(MODEL, name="churn"))


async def test_a_refused_digest_says_that_the_file_changed(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    gateway.refuse = [problem(400, "digest_mismatch", "the content has another digest")]
    with pytest.raises(inferway.DigestMismatchError) as raised:
        await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert len(gateway.puts()) == 1
    assert "was changed while it was deployed" in raised.value.__notes__[-1]


async def test_a_bad_start_of_an_earlier_upload_is_sent_again_from_the_first_byte(
    side: Side, client: Any, gateway: FakeLifecycle, large: Path
) -> None:
    data = (large.parent / "w.bin").read_bytes()
    gateway.partial[digest(data)] = bytes(MIB)
    await side(lambda: client.models.deploy(large, name="churn"))
    assert [put.headers.get("upload-offset") for put in gateway.puts()] == [None, str(MIB), None]
    assert gateway.blobs[digest(data)] == data


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (problem(507, "insufficient_storage", "the disk is full"), inferway.InsufficientStorageError),
        (problem(413, "payload_too_large"), inferway.PayloadTooLargeError),
        (problem(403, "quota_exceeded"), inferway.QuotaExceededError),
    ],
    ids=["507", "413", "403"],
)
async def test_what_the_gateway_does_not_take_is_said_once(
    side: Side, client: Any, gateway: FakeLifecycle, answer: Answer, error: type[inferway.APIError]
) -> None:
    gateway.refuse = [answer]
    with pytest.raises(error):
        await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert len(gateway.puts()) == 1
    assert gateway.created == []


async def test_a_gateway_that_is_busy_is_asked_again(
    side: Side, client: Any, gateway: FakeLifecycle, time: FakeClock
) -> None:
    gateway.refuse = [problem(503, "store_unavailable", headers={"Retry-After": "2"})]
    await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert len(gateway.puts()) == 2
    assert time.slept[0] >= 2


async def test_an_answer_that_lacks_a_part_is_not_success(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    gateway.refuse = [as_json({"digest": digest(MODEL), "size": len(MODEL), "received": 5, "complete": False}, 202)]
    with pytest.raises(inferway.APIResponseValidationError, match="the gateway has 5"):
        await side(lambda: client.models.deploy(MODEL, name="churn"))


async def test_a_file_that_shrinks_meanwhile_is_the_callers_fault(
    side: Side, client: Any, gateway: FakeLifecycle, large: Path
) -> None:
    def shrink(event: DeployEvent) -> None:
        if event.kind == "uploading" and event.file == "w.bin" and event.done_bytes < 2 * MIB:
            (large.parent / "w.bin").write_bytes(b"short")

    with pytest.raises(inferway.ConfigurationError, match="became shorter"):
        await side(lambda: client.models.deploy(large, name="churn", progress=shrink))


async def test_blobs_that_were_cleared_away_are_sent_again(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    gateway.lose_blobs.set()
    await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert len(gateway.puts()) == 2


async def test_where_nobody_knows_whether_it_has_begun_the_error_says_so(
    side: Side, client: Any, gateway: FakeLifecycle
) -> None:
    answer = gateway.answer
    gateway.server.otherwise = lambda seen: Answer(raw=b"") if seen.method == "POST" else answer(seen)
    with pytest.raises(inferway.APIConnectionError) as raised:
        await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert "client.models.deployments('churn') lists it" in raised.value.__notes__[-1]
    assert sum(seen.method == "POST" for seen in gateway.server.seen) == 1


async def test_an_upload_that_takes_too_long_ends(side: Side, gateway: FakeLifecycle) -> None:
    client = side.client(gateway.server.url)
    gateway.refuse = [Answer(hang=True)]
    with pytest.raises(inferway.APITimeoutError):
        await side(lambda: client.models.deploy(MODEL, name="churn", timeout=0.3))


async def test_a_connection_that_takes_nothing_more_is_given_up(
    side: Side, gateway: FakeLifecycle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_upload, "STALL_S", 0.2)
    (tmp_path / "net.onnx").write_bytes(models.external_data(location="w.bin")[0])
    gateway.keep(tmp_path / "net.onnx")
    with (tmp_path / "w.bin").open("wb") as weights:
        weights.truncate(64 * MIB)  # more than the buffers of both sides
    gateway.server.stalls = True
    client = side.client(gateway.server.url, retry=None)
    with pytest.raises(inferway.APITimeoutError):
        await side(lambda: client.models.deploy(tmp_path / "net.onnx", name="churn", timeout=60))


# --- deployments -------------------------------------------------------------------------------------------------


async def test_a_failing_step_is_told_with_its_reason(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    failure = {"code": "golden_mismatch", "message": "output 'y' differs by 0.5"}
    gateway.looks = [{"step": "warmed"}, {"state": "failed", "failed_step": "compared", "error": failure}]
    with pytest.raises(DeploymentFailedError) as raised:
        await side(lambda: client.models.deploy(MODEL, name="churn"))
    error = raised.value
    assert (error.step, error.code, error.message) == ("compared", "golden_mismatch", "output 'y' differs by 0.5")
    assert error.deployment.id == "d1"
    assert error.deployment.state == "failed"
    assert error.deployment.error.code == "golden_mismatch"
    assert str(error) == (
        "deployment d1 of churn failed at the step 'compared': output 'y' differs by 0.5 (golden_mismatch)"
    )


async def test_without_wait_a_deployment_is_watched_and_awaited(
    side: Side, client: Any, gateway: FakeLifecycle
) -> None:
    gateway.looks = [{"step": "checked"}, {"step": "loaded"}, {"step": "ready", "state": "succeeded"}]
    deployment: Any = await side(lambda: client.models.deploy(MODEL, name="churn", wait=False))
    assert (deployment.state, deployment.version_record) == ("running", None)
    assert repr(deployment).endswith("running>")
    # Steps that were passed between two looks are told all the same.
    assert await side.all(deployment.watch()) == [
        "received", "checked", "admitted", "loaded", "warmed", "compared", "ready",
    ]  # fmt: skip
    assert (await side(lambda: deployment.wait(5))) is deployment
    assert deployment.version_record.version == 1
    assert await side.all(deployment.watch()) == [
        "received", "checked", "admitted", "loaded", "warmed", "compared", "ready",
    ]  # fmt: skip


async def test_a_deployment_is_found_by_its_id_and_cancelled(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    made = await side(lambda: client.models.deploy(MODEL, name="churn", wait=False))
    found = await side(lambda: client.models.deployment(made.id))
    assert (await side(lambda: found.cancel())) is found
    with pytest.raises(DeploymentFailedError) as raised:
        await side(lambda: found.wait())
    assert (raised.value.code, raised.value.step) == ("cancelled", None)
    assert str(raised.value) == "deployment d1 of churn was cancelled"
    assert (await side(lambda: made.refresh())).state == "cancelled"
    with pytest.raises(inferway.DeploymentNotFoundError):
        await side(lambda: client.models.deployment("d9"))
    with pytest.raises(inferway.ConfigurationError):
        await side(lambda: client.models.deployment("../keys"))


async def test_waiting_asks_for_news_with_what_is_known(side: Side, client: Any, gateway: FakeLifecycle) -> None:
    await side(lambda: client.models.deploy(MODEL, name="churn"))
    asked = [seen.path for seen in gateway.server.seen if "/deployments/" in seen.path]
    assert asked[0] == "/api/v1/deployments/d1?wait=20"
    assert asked[1] == "/api/v1/deployments/d1?wait=20&step=received"


async def test_a_slow_deployment_goes_on_when_the_time_is_over(
    side: Side, client: Any, gateway: FakeLifecycle, time: FakeClock
) -> None:
    gateway.looks = [{"step": "admitted"}]
    with pytest.raises(inferway.APITimeoutError) as raised:
        await side(lambda: client.models.deploy(MODEL, name="churn", timeout=3))
    assert "still runs after the step 'admitted'" in str(raised.value)
    assert "client.models.deployment('d1')" in str(raised.value)
    assert gateway.deployments["d1"].record["state"] == "running"
    assert sum(time.slept) >= 3 - 0.25


def test_an_interrupted_wait_says_what_goes_on(gateway: FakeLifecycle) -> None:
    def interrupt(event: DeployEvent) -> None:
        if event.kind == "step":
            raise KeyboardInterrupt

    with inferway.Inferway(gateway.server.url) as client, pytest.raises(KeyboardInterrupt) as raised:
        client.models.deploy(MODEL, name="churn", progress=interrupt)
    assert "deployment d1 of churn goes on; client.models.deployment('d1') watches it" in raised.value.__notes__[0]
    assert gateway.deployments["d1"].record["state"] == "running"


async def test_a_cancelled_wait_leaves_the_deployment_running(server: ScriptedServer) -> None:
    gateway = FakeLifecycle(server)
    async with inferway.AsyncInferway(server.url) as client:
        deployment = await client.models.deploy(MODEL, name="churn", wait=False)
        server.script = [Answer(hang=True)]
        waiting = asyncio.create_task(deployment.wait())
        async with asyncio.timeout(10):
            await asyncio.to_thread(server.hanging.wait, 10)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
    assert gateway.deployments["d1"].record["state"] == "running"


async def test_a_deployment_changes_what_the_client_believes_of_the_model(
    side: Side, client: Any, gateway: FakeLifecycle
) -> None:
    signatures = client._engine.signatures
    for name in ("churn", "churn@canary", "churnless"):
        signatures.keep((name, None), object(), 0.0)
    await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert list(signatures) == [("churnless", None)]


async def test_the_record_of_the_version_comes_from_the_gateway(
    side: Side, client: Any, gateway: FakeLifecycle, server: ScriptedServer
) -> None:
    answer = gateway.answer
    footprint = {"resident_bytes": 5, "peak_bytes": 9}
    server.otherwise = lambda seen: (
        as_json(version_record("churn", 1, footprint=footprint)) if "/versions/1" in seen.path else answer(seen)
    )
    deployment = await side(lambda: client.models.deploy(MODEL, name="churn"))
    assert deployment.version_record.footprint.peak_bytes == 9
