"""Models, keys and health: what each method asks for and what it makes of the answer."""

from __future__ import annotations

import base64
from typing import Any

import pytest

import inferway
from inferway import ConfigurationError
from scripted import KEY, Answer, FakeClock, ScriptedServer, Side, as_error, as_json

RECORD = {
    "id": "0123456789ab",
    "name": "n",
    "environment": "live",
    "scopes": ["infer"],
    "models": ["*"],
    "created_at": "2026-11-23T12:00:00Z",
    "expires_at": None,
    "last_used_at": None,
    "revoked_at": None,
    "replaced_by": None,
}
DURATION = {"count": 1, "ns": 2}
STAT = {
    "name": "m",
    "version": "1",
    "last_inference": 0,
    "inference_count": 3,
    "execution_count": 2,
    "inference_stats": dict.fromkeys(
        ["success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"],
        DURATION,
    ),
    "response_stats": {},
    "batch_stats": [],
    "memory_usage": [],
}
CONFIG = {
    "name": "m",
    "platform": "onnxruntime_onnx",
    "max_batch_size": 8,
    "version_policy": {"latest": {"num_versions": 1}},
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}],
    "output": [],
    "instance_group": [],
    "inferway": {
        "version": "1",
        "row_exactness": "exact",
        "batching": True,
        "isolation": "inprocess",
        "inline_max_elements": 0,
        "execution_providers": ["CPUExecutionProvider"],
        "load_seconds": 0.5,
        "cost": [],
        "trial": [],
        "note": "",
        "news": 1,
    },
}


def last(server: ScriptedServer) -> tuple[str, str, Any]:
    seen = server.seen[-1]
    return seen.method, seen.path, seen.json if seen.body else None


# --- models ------------------------------------------------------------------------------------------------------


async def test_models_are_asked_about_where_the_contract_says(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url)
    server.script = [as_json({"models": ["a", "b"]})]
    assert await side(lambda: client.models.list()) == ["a", "b"]
    assert last(server) == ("GET", "/v2/models", None)

    server.script = [as_json({"name": "m", "inputs": [], "outputs": []})]
    assert (await side(lambda: client.models.get("m", 2))).name == "m"
    assert last(server) == ("GET", "/v2/models/m/versions/2", None)

    server.script = [as_json(CONFIG)]
    assert (await side(lambda: client.models.config("m"))).max_batch_size == 8
    assert last(server) == ("GET", "/v2/models/m/config", None)

    server.script = [as_json({"model_stats": [STAT]})] * 2
    [stat] = await side(lambda: client.models.stats())
    assert (stat.inference_count, stat.inference_stats.queue.ns) == (3, 2)
    assert last(server) == ("GET", "/v2/models/stats", None)
    await side(lambda: client.models.stats("m", 1))
    assert last(server) == ("GET", "/v2/models/m/versions/1/stats", None)

    server.script = [as_json({"name": "m", "ready": True}), as_json({"name": "m", "ready": False}, 503)]
    assert await side(lambda: client.models.ready("m")) is True
    assert await side(lambda: client.models.ready("m", 1)) is False
    assert last(server) == ("GET", "/v2/models/m/versions/1/ready", None)

    server.script = [as_json([{"name": "m", "version": "1", "state": "READY", "reason": ""}])]
    [entry] = await side(lambda: client.models.index(ready=True))
    assert (entry.name, entry.state) == ("m", "READY")
    assert last(server) == ("POST", "/v2/repository/index", {"ready": True})

    server.script = [Answer(), as_json({"name": "m", "load": True}), as_json({"name": "m", "unload": True})]
    await side(lambda: client.models.load("m"))
    assert last(server) == ("POST", "/v2/repository/models/m/load", None)
    await side(lambda: client.models.load("m", config={"max_batch_size": 4}, files={"1/model.onnx": b"\x00\xff"}))
    assert last(server)[2] == {
        "parameters": {"config": '{"max_batch_size": 4}', "file:1/model.onnx": base64.b64encode(b"\x00\xff").decode()}
    }
    await side(lambda: client.models.unload("m"))
    assert last(server) == ("POST", "/v2/repository/models/m/unload", None)

    server.script = [as_json({"name": "inferway", "version": "1", "extensions": []})]
    assert (await side(lambda: client.server())).name == "inferway"
    assert last(server) == ("GET", "/v2", None)


async def test_a_name_stays_one_segment_of_the_path(side: Side, server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_error(404, "model_not_found")
    client = side.client(server.url)
    with pytest.raises(inferway.ModelNotFoundError):
        await side(lambda: client.models.get("../keys?x=1#y/z"))
    assert last(server)[1] == "/v2/models/..%2Fkeys%3Fx%3D1%23y%2Fz"


async def test_mistakes_are_found_before_anything_is_sent(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url)
    for wrong in (
        lambda: client.models.get(""),
        lambda: client.models.get("m", "v1"),
        lambda: client.models.load(""),
        lambda: client.models.unload(None),
        lambda: client.models.load("m", files={"1/model.onnx": b""}),
        lambda: client.models.stats(None, 1),
        lambda: client.keys.get(""),
        lambda: client.keys.revoke(KEY),
        lambda: client.keys.create("n", "infer"),
        lambda: client.keys.create("n", ["infer"], models="m"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            await side(wrong)
        assert KEY not in str(caught.value)
    assert server.seen == []


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("list", {"models": "m"}),
        ("list", {"models": [1]}),
        ("list", []),
        ("index", [{"name": "m"}]),
        ("index", {}),
        ("stats", {"model_stats": [{**STAT, "inference_count": "many"}]}),
        ("stats", {}),
    ],
)
async def test_an_answer_that_breaks_the_contract_says_where(
    side: Side, server: ScriptedServer, call: str, answer: Any
) -> None:
    server.script = [as_json(answer)]
    client = side.client(server.url)
    with pytest.raises(inferway.APIResponseValidationError):
        await side(lambda: getattr(client.models, call)())


async def test_what_is_new_in_an_answer_is_kept(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url)
    server.script = [as_json([{"name": "org/m:tag", "version": "v1", "state": "SLEEPING", "reason": "", "since": 5}])]
    [entry] = await side(lambda: client.models.index())
    assert (entry.name, entry.version, entry.state) == ("org/m:tag", "v1", "SLEEPING")
    assert entry.model_extra == {"since": 5}


# --- keys --------------------------------------------------------------------------------------------------------


async def test_keys_are_made_and_ended_where_the_contract_says(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url)
    created = {**RECORD, "key": KEY}
    server.script = [as_json(created, 201)] * 2
    made = await side(lambda: client.keys.create("n", ["infer", "read"], models=["a*"], environment="test"))
    assert made.key == KEY
    assert KEY not in repr(made)
    assert last(server) == (
        "POST",
        "/api/v1/keys",
        {"name": "n", "scopes": ["infer", "read"], "models": ["a*"], "environment": "test"},
    )
    await side(lambda: client.keys.create("n", ("infer",), expires_in_s=None))
    assert last(server)[2]["expires_in_s"] is None

    server.script = [as_json(RECORD)] * 3
    assert (await side(lambda: client.keys.get("0123456789ab"))).created_at.year == 2026
    assert last(server) == ("GET", "/api/v1/keys/0123456789ab", None)
    assert (await side(lambda: client.keys.self())).id == "0123456789ab"
    assert last(server) == ("GET", "/api/v1/keys/self", None)
    await side(lambda: client.keys.revoke("0123456789ab"))
    assert last(server) == ("DELETE", "/api/v1/keys/0123456789ab", None)

    server.script = [as_json({**created, "replaced": RECORD}, 201)] * 2
    rotated = await side(lambda: client.keys.rotate("0123456789ab"))
    assert rotated.replaced.id == "0123456789ab"
    assert last(server) == ("POST", "/api/v1/keys/0123456789ab/rotate", {})
    await side(lambda: client.keys.rotate("0123456789ab", overlap_s=5))
    assert last(server)[2] == {"overlap_s": 5}


async def test_scopes_of_a_newer_gateway_pass(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url)
    server.script = [as_json({**RECORD, "scopes": ["infer", "train"], "environment": "moon", "region": "eu"})]
    record = await side(lambda: client.keys.self())
    assert (record.scopes, record.environment) == (["infer", "train"], "moon")
    assert record.model_extra == {"region": "eu"}


async def test_a_list_of_keys_fetches_page_after_page(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url)
    pages: dict[str, Any] = {
        "/api/v1/keys?limit=2": ([1, 2], "c 1"),
        "/api/v1/keys?limit=2&cursor=c+1": ([3, 4], "c2"),
        "/api/v1/keys?limit=2&cursor=c2": ([], None),
    }

    def page(seen: Any) -> Answer:
        numbers, cursor = pages[seen.path]
        return as_json({"data": [{**RECORD, "name": str(n)} for n in numbers], "next_cursor": cursor})

    server.otherwise = page
    iterator = client.keys.list(page_size=2)
    assert server.seen == []
    assert [record.name for record in await side.all(iterator)] == ["1", "2", "3", "4"]


async def test_a_list_of_keys_that_turns_in_circles_ends(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url)
    server.otherwise = lambda _: as_json({"data": [], "next_cursor": "again"})
    with pytest.raises(inferway.APIResponseValidationError, match="does not end"):
        await side.all(client.keys.list())


async def test_problems_are_errors_like_others(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url)
    body = {
        "type": "urn:inferway:error:key_not_found",
        "title": "There is no such API key",
        "status": 404,
        "detail": "no key 'x'",
        "code": "key_not_found",
        "request_id": "r",
    }
    server.script = [as_json(body, 404, Content_Type="application/problem+json")]
    with pytest.raises(inferway.KeyNotFoundError, match="no key 'x'") as caught:
        await side(lambda: client.keys.get("0123456789ab"))
    assert caught.value.body["title"] == "There is no such API key"


# --- health ------------------------------------------------------------------------------------------------------


async def test_probes_are_sent_once_and_answer_with_a_truth(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url)
    server.script = [
        as_json({"live": True}),
        as_json({"live": True, "ready": True}),
        as_json({"live": True, "ready": False}, 503),
        Answer(502),
        Answer(raw=b""),
    ]
    assert await side(lambda: client.health.live()) is True
    assert await side(lambda: client.health.ready()) is True
    assert await side(lambda: client.health.ready()) is False
    assert await side(lambda: client.health.ready()) is False
    assert await side(lambda: client.health.live()) is False
    assert [seen.path for seen in server.seen] == ["/v2/health/live", *["/v2/health/ready"] * 3, "/v2/health/live"]
    server.otherwise = lambda _: Answer(404)
    for probe in (client.health.live, client.health.ready):
        with pytest.raises(inferway.NotFoundError):
            await side(probe)


async def test_nobody_there_is_not_ready(side: Side) -> None:
    client = side.client("http://127.0.0.1:1")
    assert await side(lambda: client.health.live()) is False
    assert await side(lambda: client.health.ready(timeout=2)) is False


async def test_waiting_asks_less_and_less_often(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.script = [Answer(raw=b""), Answer(502), *[as_json({"ready": False}, 503)] * 6, as_json({"ready": True})]
    client = side.client(server.url, clock=time.clock())
    await side(lambda: client.health.wait_until_ready())
    assert time.slept == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


async def test_waiting_ends(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.otherwise = lambda _: as_json({"ready": False}, 503)
    client = side.client(server.url, clock=time.clock())
    with pytest.raises(inferway.APITimeoutError, match="not ready within 3 s: it answered that it is not"):
        await side(lambda: client.health.wait_until_ready(3))
    assert sum(time.slept) == pytest.approx(3)
    server.otherwise = lambda _: Answer(raw=b"")
    with pytest.raises(inferway.APITimeoutError, match=r"not ready within 0\.5 s") as caught:
        await side(lambda: client.health.wait_until_ready(0.5))
    assert isinstance(caught.value.__cause__, inferway.APIConnectionError)


async def test_waiting_for_something_else_than_a_gateway_is_an_error(
    side: Side, server: ScriptedServer, time: FakeClock
) -> None:
    server.otherwise = lambda _: Answer(404)
    client = side.client(server.url, clock=time.clock())
    with pytest.raises(inferway.NotFoundError):
        await side(lambda: client.health.wait_until_ready(None))
    assert time.slept == []


# --- raw responses -----------------------------------------------------------------------------------------------


async def test_every_answer_can_be_had_raw(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.serve_simple()
    client = side.client(server.url, clock=time.clock())
    raw = client.with_raw_response
    found = await side(lambda: raw.infer("simple", [1, 2]))
    assert found.parse()["y"].tolist() == [[1, 2]]
    assert (found.status_code, found.attempts) == (200, 1)
    assert found.content.endswith(found.parse()["y"].tobytes())
    server.script = [as_error(503, "queue_full"), as_json({"models": ["m"]}, X_Request_Id="r-1")]
    listed = await side(lambda: raw.models.list(timeout=5))
    assert (listed.parse(), listed.request_id, listed.attempts) == (["m"], "r-1", 2)
    assert listed.headers["content-type"] == "application/json"
    assert repr(listed) == "<RawResponse 200, 17 bytes, request r-1>"
    server.script = [as_json({**RECORD, "key": KEY}, 201), as_json({"live": True}), as_json(RECORD)]
    assert (await side(lambda: raw.keys.create("n", ["infer"]))).status_code == 201
    assert (await side(lambda: raw.health.live())).parse() is True
    assert (await side(lambda: raw.keys.self())).parse().name == "n"
    server.script = [as_json({"name": "s", "version": "1", "extensions": []})]
    assert (await side(lambda: raw.server())).parse().name == "s"
    assert server.connections == 1
