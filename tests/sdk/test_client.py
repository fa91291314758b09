"""Making clients, changing them, watching them."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import inferway
from inferway import (
    AsyncInferway,
    Clock,
    ConfigurationError,
    Inferway,
    RequestEvent,
    ResponseEvent,
    RetryPolicy,
    Timeout,
    _client,
)
from scripted import KEY, Answer, FakeClock, ScriptedServer, Side, as_error, as_json, as_outputs

# --- configuration -----------------------------------------------------------------------------------------------


def test_arguments_come_before_the_environment_and_that_before_defaults(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert side.client().base_url == "http://127.0.0.1:8080"
    monkeypatch.setenv("INFERWAY_BASE_URL", "http://127.0.0.1:1/")
    monkeypatch.setenv("INFERWAY_API_KEY", KEY)
    client = side.client()
    assert client.base_url == "http://127.0.0.1:1"
    assert client._engine.config.api_key == KEY
    other = side.client("http://127.0.0.1:2", api_key="other-key")
    assert other.base_url == "http://127.0.0.1:2"
    assert other._engine.config.api_key == "other-key"
    monkeypatch.setenv("INFERWAY_BASE_URL", "")
    monkeypatch.setenv("INFERWAY_API_KEY", "")
    assert side.client().base_url == "http://127.0.0.1:8080"
    assert side.client()._engine.config.api_key is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"base_url": "no url"},
        {"api_key": "with space inside"},
        {"api_key": 5},
        {"timeout": 0},
        {"max_response_bytes": 0},
        {"max_response_bytes": True},
        {"default_headers": {"X-A": "a\r\nb"}},
    ],
)
def test_arguments_that_cannot_be_used_are_refused_at_once(side: Side, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        side.client(**arguments)


def test_a_client_shows_where_it_points_and_never_its_key(side: Side) -> None:
    client = side.client("http://127.0.0.1:1", api_key=KEY)
    assert repr(client) == f"{type(client).__name__}('http://127.0.0.1:1', api_key='***')"
    assert repr(side.client("http://127.0.0.1:1")).endswith("api_key=None)")
    assert KEY not in repr(client._engine.config) + repr(vars(client))


def test_a_key_that_crosses_a_network_in_the_clear_is_warned_of_once(
    side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    _client._warned.clear()
    side.client("http://gateway.example", api_key=KEY)
    side.client("http://gateway.example", api_key=KEY)
    side.client("https://secure.example", api_key=KEY)
    side.client("http://127.0.0.1:1", api_key=KEY)
    side.client("http://[::1]:1", api_key=KEY)
    side.client("http://other.example")
    assert [record.message for record in caplog.records] == [
        "the API key will cross the network to http://gateway.example unencrypted; use https"
    ]


async def test_a_client_is_a_context_manager(server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_json({"models": []})
    with Inferway(server.url) as client:
        assert client.models.list() == []
    with pytest.raises(inferway.ClientClosedError):
        client.models.list()
    async with AsyncInferway(server.url) as waiting:
        assert await waiting.models.list() == []
    with pytest.raises(inferway.ClientClosedError):
        await waiting.models.list()


# --- options -----------------------------------------------------------------------------------------------------


async def test_a_copy_has_other_options_and_the_same_connections(side: Side, server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_json({"models": []})
    client = side.client(server.url, api_key=KEY, default_headers={"X-A": "1", "X-B": "1"}, timeout=50)
    other = client.with_options(
        api_key="another-key", default_headers={"X-B": "2"}, timeout=Timeout(total=7), retry=None, max_response_bytes=99
    )
    await side(lambda: client.models.list())
    await side(lambda: other.models.list())
    first, second = (seen.headers for seen in server.seen)
    assert (first["x-a"], first["x-b"], first["authorization"]) == ("1", "1", f"Bearer {KEY}")
    assert (second["x-a"], second["x-b"], second["authorization"]) == ("1", "2", "Bearer another-key")
    assert 49_000 < int(first["inferway-timeout-ms"]) <= 50_000
    assert 6_000 < int(second["inferway-timeout-ms"]) <= 7_000
    assert other._engine.config.retry.attempts == 1
    assert server.connections == 1
    bare = other.with_options(api_key=None, timeout=None)
    await side(lambda: bare.models.list())
    assert "authorization" not in server.seen[-1].headers
    assert "inferway-timeout-ms" not in server.seen[-1].headers


def test_a_copy_refuses_what_a_client_refuses(side: Side) -> None:
    client = side.client()
    for wrong in ({"timeout": -1}, {"max_response_bytes": 0}, {"api_key": "a b"}):
        with pytest.raises(ValueError):
            client.with_options(**wrong)


async def test_one_call_may_have_options_of_its_own(side: Side, server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_json({"models": ["m"] * 100})
    client = side.client(server.url, api_key=KEY)
    await side(lambda: client.models.list(headers={"X-Trace": "t"}, request_id="mine", timeout=2))
    seen = server.seen[0].headers
    assert (seen["x-trace"], seen["x-request-id"]) == ("t", "mine")
    with pytest.raises(inferway.APIResponseValidationError, match="max_response_bytes, 50"):
        await side(lambda: client.models.list(max_response_bytes=50))
    with pytest.raises(TypeError, match="unexpected keyword argument: time_out"):
        await side(lambda: client.models.list(time_out=3))


# --- keys that change --------------------------------------------------------------------------------------------


async def test_a_function_gives_the_key_for_each_attempt(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.script = [as_error(503, "queue_full"), as_json({"models": []})]
    keys = iter(["first-key", "second-key"])
    client = side.client(server.url, api_key=lambda: next(keys), clock=time.clock())
    await side(lambda: client.models.list())
    assert [seen.headers["authorization"] for seen in server.seen] == ["Bearer first-key", "Bearer second-key"]


async def test_the_asynchronous_client_awaits_its_key(server: ScriptedServer) -> None:
    async def key() -> str:
        return "awaited-key"

    server.otherwise = lambda _: as_json({"models": []})
    async with AsyncInferway(server.url, api_key=key) as client:
        await client.models.list()
    assert server.seen[0].headers["authorization"] == "Bearer awaited-key"


async def test_a_function_that_gives_no_key_is_a_configuration_error(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url, api_key=lambda: None)
    with pytest.raises(ConfigurationError, match="got NoneType"):
        await side(lambda: client.models.list())
    assert server.seen == []


# --- hooks and logs ----------------------------------------------------------------------------------------------


async def test_hooks_see_every_attempt_and_may_add_headers(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.script = [as_error(503, "queue_full"), as_json([])]
    requests: list[RequestEvent] = []
    responses: list[ResponseEvent] = []

    def before(event: RequestEvent) -> dict[str, str]:
        requests.append(event)
        return {"traceparent": f"00-{event.attempt}"}

    def after(event: ResponseEvent) -> None:
        responses.append(event)

    async def before_async(event: RequestEvent) -> dict[str, str]:
        return before(event)

    async def after_async(event: ResponseEvent) -> None:
        after(event)

    hooks: dict[str, Any] = (
        {"on_request": before, "on_response": after}
        if side.kind == "sync"
        else {"on_request": before_async, "on_response": after_async}
    )
    client = side.client(server.url, api_key=KEY, clock=time.clock(), timeout=9, **hooks)
    await side(lambda: client.models.index())
    assert [seen.headers["traceparent"] for seen in server.seen] == ["00-1", "00-2"]
    assert [(event.attempt, event.timeout_s, event.body_bytes) for event in requests] == [(1, 9, 15), (2, 8.5, 15)]
    assert requests[0].url == f"{server.url}/v2/repository/index"
    assert requests[0].headers["Authorization"] == "***"
    assert [event.status_code for event in responses] == [503, 200]
    assert responses[0].request == requests[0]
    assert responses[1].body_bytes == 2
    assert KEY not in repr(requests) + repr(responses)


async def test_plain_functions_are_hooks_for_both_clients(side: Side, server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_json({"models": []})
    seen: list[str] = []
    client = side.client(
        server.url,
        on_request=lambda event: seen.append(event.method),
        on_response=lambda event: seen.append(str(event.status_code)),
    )
    await side(lambda: client.models.list())
    quiet = client.with_options(on_request=None, on_response=None)
    await side(lambda: quiet.models.list())
    assert seen == ["GET", "200"]


@pytest.mark.parametrize("name", ["on_request", "on_response"])
def test_a_synchronous_client_refuses_hooks_that_wait(server: ScriptedServer, name: str) -> None:
    async def hook(_: Any) -> None:
        return None

    server.otherwise = lambda _: as_json({"models": []})
    hooks: Any = {name: hook}
    with Inferway(server.url, **hooks) as client, pytest.raises(TypeError, match=f"{name} of a synchronous client"):
        client.models.list()


async def test_the_log_tells_attempts_and_retries_and_no_secrets(
    side: Side, server: ScriptedServer, time: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="inferway")
    server.script = [as_error(503, "queue_full"), as_json({"models": []})]
    client = side.client(server.url, api_key=KEY, clock=time.clock())
    await side(lambda: client.models.list(request_id="r-1"))
    mine = [record for record in caplog.records if record.name == "inferway"]
    text = "\n".join(record.getMessage() for record in mine)
    assert "attempt 1" in text
    assert "attempt 2" in text
    assert "answered 503" in text
    assert "request r-1" in text
    assert KEY not in text
    assert [record.levelname for record in mine].count("INFO") == 1


# --- one deadline ------------------------------------------------------------------------------------------------


async def test_fetching_the_signature_is_on_the_same_clock(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.serve_simple()
    inner = server.otherwise

    def slow(seen: Any) -> Answer:
        time.now += 4
        return inner(seen)

    server.otherwise = slow
    client = side.client(server.url, clock=time.clock(), timeout=10)
    await side(lambda: client.infer("simple", [1, 2]))
    assert [seen.headers["inferway-timeout-ms"] for seen in server.seen] == ["10000", "6000"]


async def test_a_call_whose_time_is_over_is_not_begun(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    clock = time.clock()
    steps = iter([1000.0, 1011.0, 1011.0, 1011.0, 1011.0])
    client = side.client(
        server.url, timeout=10, retry=RetryPolicy(attempts=1), clock=Clock(monotonic=lambda: next(steps, 1011.0))
    )
    assert clock.monotonic() == 1000.0
    engine = client._engine
    engine.budget.deposit()
    steps = iter([1000.0, 1011.0, 1011.0, 1011.0, 1011.0])
    with pytest.raises(inferway.APITimeoutError, match="was over before"):
        await side(lambda: client.models.list())
    assert server.seen == []


# --- results -----------------------------------------------------------------------------------------------------


async def test_a_result_has_what_the_gateway_said(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    await side(lambda: client.model("simple").signature())
    answer = as_outputs(
        ("y", "FP32", [1, 1], b"\x00\x00\x80?"), ("n", "INT8", [2], b"\x01\x02"), id="mine", parameters={"p": 1}
    )
    timing = 'parse;dur=0.5, queue;desc="a,b";dur="1.25", cache, run;dur=x, run;dur=3'
    answer.headers = {**answer.headers, "X-Request-Id": "r-9", "Server-Timing": timing}
    server.script = [answer]
    result = await side(lambda: client.infer("simple", [1, 2], id="mine"))
    assert (result.model_name, result.model_version, result.id, result.request_id) == ("simple", "1", "mine", "r-9")
    assert (result.attempts, dict(result.parameters)) == (1, {"p": 1})
    assert result.datatypes == {"y": "FP32", "n": "INT8"}
    assert result.timing["parse"] == 0.5
    assert result.timing["run"] == 3
    assert result.elapsed > 0
    assert result.headers["X-REQUEST-ID"] == "r-9"
    assert list(result) == ["y", "n"]
    assert len(result) == 2
    assert result["n"].tolist() == [1, 2]
    assert result != dict(result)
    assert result == result
    assert {result: 1}[result] == 1
    assert repr(result) == "<InferenceResult of simple version 1: y: FP32 [1, 1], n: INT8 [2]>"
    with pytest.raises(KeyError, match="no output 'z', there is 'y', 'n'"):
        result["z"]
    with pytest.raises(ValueError, match="choose one: 'y', 'n'"):
        _ = result.output
    assert server.seen[-1].json["id"] == "mine"
