from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from inferway_gateway.backends.remote import RemoteBackend
from inferway_gateway.core.errors import (
    DeadlineExceededError,
    GatewayError,
    InvalidTensorError,
    ModelFailingError,
    ModelLoadError,
    QueueFullError,
    ShuttingDownError,
    UpstreamError,
)
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.tensors import TensorSpec
from inferway_gateway.core.upstream import EndpointSpec, RemoteSpec, Secret, UpstreamSpec
from scripted import SIMPLE_METADATA, Answer, as_error, as_json, as_outputs

from .conftest import SERVER, Open, request

LIMIT_S = 10.0


def left(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_a_request_goes_there_and_back(remote: Open) -> None:
    mine = await remote()
    answer = await mine.executor.infer(request(3))
    np.testing.assert_array_equal(answer.outputs[0], np.arange(6, dtype=np.float32).reshape(3, 2))
    assert answer.upstream_attempts == 1
    (seen,) = mine.calls
    assert seen.path == "/v2/models/simple/infer"
    assert seen.json["outputs"] == [{"name": "y", "parameters": {"binary_data": True}}]


async def test_the_signature_is_the_upstreams(remote: Open) -> None:
    mine = await remote()
    assert mine.executor.signature.inputs == (TensorSpec("x", "FP32", (-1, 2)),)
    assert mine.executor.signature.outputs == (TensorSpec("y", "FP32", (-1, 2)),)
    assert mine.executor.signature.batched


async def test_an_upstream_without_binary_data_is_sent_json(servers: Any, remote: Open) -> None:
    mine = await remote(binary=False)
    (server,) = mine.servers
    server.script.append(as_json({"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [[0, 1.5]]}]}))
    answer = await mine.executor.infer(request())
    assert answer.outputs[0].tolist() == [[0.0, 1.5]]
    (seen,) = mine.calls
    assert seen.json["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 1.0]}]
    assert "inference-header-content-length" not in seen.headers


async def test_what_is_left_of_the_time_and_the_origin_are_passed_on(remote: Open) -> None:
    mine = await remote()
    origin = (("X-Request-Id", "r-1"), ("Inferway-Attempt", "2"))
    await mine.executor.infer(request(deadline=left(2.0), origin=origin))
    (seen,) = mine.calls
    assert seen.headers["x-request-id"] == "r-1"
    assert seen.headers["inferway-attempt"] == "2"
    assert 1000 < int(seen.headers["inferway-timeout-ms"]) <= 2000
    assert "authorization" not in seen.headers


async def test_a_request_that_goes_round_in_a_circle_ends(remote: Open) -> None:
    mine = await remote()
    await mine.executor.infer(request(origin=(("Inferway-Hops", "8"),)))
    (seen,) = mine.calls
    assert seen.headers["inferway-hops"] == "8"
    with pytest.raises(UpstreamError, match="through 8 gateways already") as caught:
        await mine.executor.infer(request(origin=(("Inferway-Hops", "9"),)))
    assert len(mine.calls) == 1
    assert not caught.value.retryable
    await mine.executor.infer(request(origin=(("Inferway-Hops", "many"),)))


async def test_the_upstream_gets_its_secret_and_a_redirect_is_not_followed(remote: Open) -> None:
    mine = await remote(2, secret=Secret("hush"))
    elsewhere = mine.servers[1]
    before = len(elsewhere.seen)
    for server in mine.servers:
        server.otherwise = lambda _: Answer(307, headers={"Location": f"{elsewhere.url}/stolen"})
    with pytest.raises(UpstreamError, match="status 307") as caught:
        await mine.executor.infer(request())
    assert caught.value.upstream_attempts == 1
    assert not any(seen.path == "/stolen" for seen in elsewhere.seen[before:])
    assert mine.calls[0].headers["authorization"] == "Bearer hush"


@pytest.mark.parametrize("status", [429, 502, 503])
async def test_a_failure_is_tried_again_at_another_endpoint(remote: Open, status: int) -> None:
    mine = await remote(2)
    failing = mine.servers[0]
    failing.script.append(as_error(status, "queue_full"))
    attempts = []
    while failing.script:  # which of the two is asked first is drawn
        attempts.append((await mine.executor.infer(request())).upstream_attempts)
    assert attempts == [1] * (len(attempts) - 1) + [2]
    assert len(mine.calls) == len(attempts) + 1


@pytest.mark.parametrize(
    "answer",
    [
        Answer(raw=b""),
        Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"),
        Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"),
    ],
    ids=["nothing", "short-of-its-length", "cut-chunks"],
)
async def test_a_broken_answer_is_tried_again_and_then_told_of(remote: Open, answer: Answer) -> None:
    mine = await remote(2, attempts=2)
    for server in mine.servers:
        server.otherwise = lambda _: answer
    with pytest.raises(UpstreamError, match=r"broke off.*after 2 attempts") as caught:
        await mine.executor.infer(request(deadline=left(LIMIT_S)))
    assert caught.value.upstream_attempts == 2
    assert not caught.value.retryable
    assert [len([s for s in server.seen if s.method == "POST"]) for server in mine.servers] == [1, 1]


async def test_the_only_endpoint_is_tried_again_only_after_a_broken_connection(remote: Open) -> None:
    mine = await remote(1)
    (server,) = mine.servers
    server.script.append(Answer(raw=b""))
    assert (await mine.executor.infer(request())).upstream_attempts == 2
    server.script.append(as_error(503, "queue_full"))
    with pytest.raises(UpstreamError, match="no other endpoint") as caught:
        await mine.executor.infer(request())
    assert caught.value.upstream_attempts == 1


async def test_an_endpoint_that_says_not_to_is_not_tried_again(remote: Open) -> None:
    mine = await remote(2)
    for server in mine.servers:
        server.otherwise = lambda _: as_error(503, "worker_crashed", X_Should_Retry="false")
    with pytest.raises(UpstreamError, match="status 503"):
        await mine.executor.infer(request())
    assert len(mine.calls) == 1


async def test_retries_end_with_the_budget(remote: Open) -> None:
    mine = await remote(2, retry_ratio=0.0)
    for server in mine.servers:
        server.otherwise = lambda _: as_error(502, "upstream_failed")
    with pytest.raises(UpstreamError, match="retry budget is spent"):
        await mine.executor.infer(request())
    assert len(mine.calls) == 1


async def test_an_upstream_that_is_a_gateway_has_its_own_attempts_counted(remote: Open) -> None:
    mine = await remote(1)
    (server,) = mine.servers
    server.script.append(as_error(502, "upstream_failed", Inferway_Upstream_Attempts="3", X_Should_Retry="false"))
    with pytest.raises(UpstreamError) as caught:
        await mine.executor.infer(request())
    assert caught.value.upstream_attempts == 3


async def test_one_that_never_answers_ends_with_the_callers_time(remote: Open) -> None:
    mine = await remote(1)
    mine.servers[0].otherwise = lambda _: Answer(hang=True)
    begun = left(0)
    with pytest.raises(DeadlineExceededError):
        await mine.executor.infer(request(deadline=left(0.2)))
    assert left(0) - begun < 5
    assert mine.servers[0].closed.wait(LIMIT_S), "the connection was kept open"


@pytest.mark.parametrize(
    "answer",
    [Answer(hang=True), Answer(headers={"Content-Length": "100000"}, body=b"{", drip=b" ")],
    ids=["hangs", "drips"],
)
async def test_one_that_never_ends_is_given_up_after_its_own_time(remote: Open, answer: Answer) -> None:
    mine = await remote(2, timeout_s=0.3, attempts=2)
    for server in mine.servers:
        server.otherwise = lambda _: answer
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(UpstreamError, match=r"did not answer within 0.3 s.*2 attempts"):
            await mine.executor.infer(request())


async def test_a_caller_that_leaves_ends_the_call(remote: Open) -> None:
    mine = await remote(1)
    (server,) = mine.servers
    server.otherwise = lambda _: Answer(hang=True)
    task = asyncio.create_task(mine.executor.infer(request()))
    assert await asyncio.to_thread(server.hanging.wait, LIMIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.closed.wait, LIMIT_S), "the upstream still works for nobody"
    assert mine.stats.running == mine.stats.queued_requests == 0


LIES = {
    "not-json": (Answer(body=b"<html>"), "not JSON"),
    "no-outputs": (as_json({"outputs": "no"}), "'outputs'"),
    "lacks-one": (as_json({"outputs": []}), "lacks output 'y'"),
    "other-datatype": (as_outputs(("y", "FP64", [1, 2], b"0" * 16)), "not FP32"),
    "other-shape": (as_outputs(("y", "FP32", [1, 3], b"0" * 12)), "shape"),
    "other-rows": (as_outputs(("y", "FP32", [2, 2], b"0" * 16)), "2 rows, expected 1"),
    "too-few-bytes": (as_outputs(("y", "FP32", [1, 2], b"0" * 7)), "7 bytes, expected 8"),
    "bytes-too-many": (
        Answer(body=as_outputs(("y", "FP32", [1, 2], b"0" * 8)).body + b"more",
               headers=as_outputs(("y", "FP32", [1, 2], b"0" * 8)).headers), "belong to no output",
    ),
    "huge-size": (
        as_json({"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2],
                              "parameters": {"binary_data_size": 2**39}}]}), "longer than the answer",
    ),
    "wrong-head": (Answer(body=b"{}", headers={"Inference-Header-Content-Length": "9"}), "wrong Inference-Header"),
    "compressed": (Answer(body=b"{}", headers={"Content-Encoding": "gzip"}), "compressed"),
    "too-long": (Answer(headers={"Content-Length": str(10**12)}), "more than 100000 bytes"),
    "endless": (Answer(raw=b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200_000), "more than 100000 bytes"),
    "no-http": (Answer(raw=b"SSH-2.0-OpenSSH\r\n\r\n"), "did not answer in HTTP"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
async def test_a_lie_is_an_error_of_the_upstream(remote: Open, name: str) -> None:
    answer, words = LIES[name]
    mine = await remote(2, max_response_bytes=100_000)
    for server in mine.servers:
        server.script += [answer, answer]
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(UpstreamError, match=words) as caught:
            await mine.executor.infer(request())
    assert caught.value.upstream_attempts == 1
    assert caught.value.code == "upstream_failed"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidTensorError), (401, UpstreamError), (404, UpstreamError), (500, UpstreamError),
     (504, DeadlineExceededError)],
)  # fmt: skip
async def test_a_refusal_is_told_in_the_callers_terms(remote: Open, status: int, kind: type[GatewayError]) -> None:
    mine = await remote(2)
    for server in mine.servers:
        server.otherwise = lambda seen: as_error(status, "any", "x is too\nlarge")
    with pytest.raises(kind) as caught:
        await mine.executor.infer(request())
    assert len(mine.calls) == 1
    assert ("x is too large" in caught.value.message) == (status == 400)


async def test_retry_after_is_waited_for_and_told(remote: Open) -> None:
    mine = await remote(1)
    (server,) = mine.servers
    server.otherwise = lambda _: as_error(429, "queue_full", Retry_After="7")
    with pytest.raises(UpstreamError):
        await mine.executor.infer(request())
    with pytest.raises(ModelFailingError) as caught:
        await mine.executor.infer(request())
    assert caught.value.retry_after_s is not None
    assert 6 < caught.value.retry_after_s <= 7
    assert caught.value.retryable
    assert caught.value.upstream_attempts == 0
    assert len(mine.calls) == 1
    assert "no endpoint" in (mine.executor.problem() or "")


async def test_an_endpoint_that_fails_again_and_again_is_left_alone_until_a_trial_succeeds(remote: Open) -> None:
    mine = await remote(1, breaker_failures=3, breaker_open_s=0.05)
    (server,) = mine.servers
    server.otherwise = lambda _: as_error(502, "upstream_failed")
    for _ in range(3):
        with pytest.raises(UpstreamError):
            await mine.executor.infer(request())
    with pytest.raises(ModelFailingError):
        await mine.executor.infer(request())
    assert len(mine.calls) == 3
    server.serve_simple()
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                await mine.executor.infer(request())
                break
            except ModelFailingError as error:
                assert error.retry_after_s  # noqa: PT017  # which of the two comes is not known
                await asyncio.sleep(error.retry_after_s)
    assert mine.executor.problem() is None


async def test_other_metadata_is_noticed_when_an_answer_does_not_fit(remote: Open) -> None:
    mine = await remote(1)
    (server,) = mine.servers
    wider = {**SIMPLE_METADATA, "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]}
    server.script += [as_outputs(("y", "FP32", [1, 3], b"0" * 12)), as_json(SERVER), as_json(wider)]
    with pytest.raises(UpstreamError, match="shape"):
        await mine.executor.infer(request())
    async with asyncio.timeout(LIMIT_S):
        while mine.executor.signature.output("y").shape != (-1, 3):
            await asyncio.sleep(0.01)


async def test_requests_beyond_the_bound_wait_and_beyond_that_are_refused(remote: Open) -> None:
    mine = await remote(1, max_in_flight=1, max_queued=1)
    (server,) = mine.servers
    server.script.append(Answer(hang=True))
    running = asyncio.create_task(mine.executor.infer(request()))
    assert await asyncio.to_thread(server.hanging.wait, LIMIT_S)
    waiting = asyncio.create_task(mine.executor.infer(request()))
    while mine.stats.queued_requests != 1:
        await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await mine.executor.infer(request())
    assert (mine.stats.running, mine.stats.queued_requests, mine.stats.queued_rows) == (1, 1, 1)
    running.cancel()
    assert (await waiting).outputs[0].shape == (1, 2)
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_request_waits_no_longer_than_its_queue_timeout(remote: Open) -> None:
    mine = await remote(1, max_in_flight=1)
    (server,) = mine.servers
    server.script.append(Answer(hang=True))
    running = asyncio.create_task(mine.executor.infer(request()))
    assert await asyncio.to_thread(server.hanging.wait, LIMIT_S)
    with pytest.raises(DeadlineExceededError, match="before it could be sent on"):
        await mine.executor.infer(request(queue_timeout_s=0.01))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (await mine.executor.infer(request())).upstream_attempts == 1


async def test_a_drained_version_answers_what_it_has_and_takes_no_more(remote: Open) -> None:
    mine = await remote(1)
    (server,) = mine.servers
    server.script.append(Answer(hang=True))
    running = asyncio.create_task(mine.executor.infer(request()))
    assert await asyncio.to_thread(server.hanging.wait, LIMIT_S)
    assert await mine.executor.drain(0.0) == 1
    with pytest.raises(ShuttingDownError):
        await running
    with pytest.raises(ShuttingDownError):
        await mine.executor.infer(request())
    assert await mine.executor.close()


async def test_no_rows_need_no_upstream(remote: Open) -> None:
    mine = await remote(1)
    answer = await mine.executor.infer(request(0))
    assert answer.outputs[0].shape == (0, 2)
    assert not mine.calls


BAD_METADATA: dict[str, Any] = {
    "not-an-object": [],
    "no-inputs": {"outputs": []},
    "no-outputs": {"inputs": [], "outputs": []},
    "unknown-datatype": {"inputs": [], "outputs": [{"name": "y", "datatype": "FP8", "shape": [1]}]},
    "negative-shape": {"inputs": [], "outputs": [{"name": "y", "datatype": "FP32", "shape": [-2]}]},
    "huge-rank": {"inputs": [], "outputs": [{"name": "y", "datatype": "FP32", "shape": [1] * 33}]},
    "twice": {"inputs": [], "outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}] * 2},
    "long-name": {"inputs": [], "outputs": [{"name": "y" * 300, "datatype": "FP32", "shape": [1]}]},
    "too-many": {"inputs": [], "outputs": [{"name": str(i), "datatype": "FP32", "shape": [1]} for i in range(300)]},
}


@pytest.mark.parametrize("name", BAD_METADATA)
async def test_bad_metadata_fails_the_load(servers: Any, name: str) -> None:
    (server,) = servers(1)
    server.script += [as_json(SERVER), as_json(BAD_METADATA[name])]
    async with RemoteBackend([UpstreamSpec("up", "oip", (EndpointSpec(server.url, "one"),))]) as backend:
        with pytest.raises(ModelLoadError, match="failed to load 'mine' version 1: "):
            await backend.open("mine", 1, RemoteSpec("up", "simple"), ModelStats())
