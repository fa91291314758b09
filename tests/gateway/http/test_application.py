"""The application's outermost layer, under servers that are not ours too."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

import models
from inferway_gateway.app import create_app
from inferway_gateway.http import application
from inferway_gateway.http.application import GatewayApplication
from inferway_gateway.http.codec import SignatureCodec
from inferway_gateway.http.routing import ApiRoute
from inferway_gateway.settings import Settings

INFER = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}],
    "id": "7",
}


@asynccontextmanager
async def running(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[GatewayApplication, httpx.AsyncClient]]:
    """The application with its lifespan entered, and a client that calls it without a socket."""
    repository = models.write_repository(tmp_path / "models", {"add_one": models.add_one(), "slow": models.slow()})
    app = create_app(Settings(model_dir=repository, state_dir=tmp_path / "state", auth=False, **settings))

    async with app.router.lifespan_context(app) as state:
        app.state.lifespan = dict(state or {})

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            scope["state"] = dict(state or {})
            await app(scope, receive, send)

        transport = httpx.ASGITransport(app=with_state)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            async with asyncio.timeout(30):
                while (await client.get("/v2/health/ready")).status_code != 200:
                    await asyncio.sleep(0.01)
            yield app, client


PATHS = [
    "/v2/models/add_one/infer",
    "/v2/models/add_one/versions/1/infer",
    "/v2/models/add_one/versions/9/infer",
    "/v2/models/add_one/versions/x/infer",
    "/v2/models/nobody/infer",
    "/v2/models//infer",
    "/v2/models/infer",
    "/v2/models/add_one/versions/infer",
    "/v2/models/add_one/versions//infer",
    "/v2/models/a/b/infer",
    "/v2/models/add_one/infer/",
    "/v2/models/add%5Fone/infer",
    "/v2/models/add_one/versions/1/2/infer",
]


async def test_the_short_way_to_inference_leads_where_the_router_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as (_, client):

        async def answers() -> list[tuple[int, Any]]:
            responses = [await client.post(path, json=INFER) for path in PATHS]
            return [(r.status_code, {k: v for k, v in r.json().items() if k != "request_id"}) for r in responses]

        short = await answers()
        with monkeypatch.context() as patch:
            patch.setattr(application, "infer_target", lambda path: None)
            assert await answers() == short
        assert [status for status, _ in short][:2] == [200, 200]
        assert {status for status, _ in short[2:]} >= {404}


async def test_a_path_without_parameters_leads_where_the_router_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as (app, client):
        paths = sorted({route.path.replace("{key_id}", "self") for route in app.routes if isinstance(route, ApiRoute)})
        paths = [path for path in paths if "{" not in path]
        asked = [(method, path + end) for path in paths for method in ("GET", "PUT") for end in ("", "/")]

        async def answers() -> list[tuple[int, str | None, str | None, str]]:
            found = [await client.request(method, path) for method, path in asked]
            return [(r.status_code, r.headers.get("allow"), r.headers["content-type"], r.text[:20]) for r in found]

        looked_up = await answers()
        monkeypatch.setattr(app, "_fixed", {})
        assert await answers() == looked_up
        assert {200, 404, 405} <= {status for status, *_ in looked_up}


async def test_long_bodies_are_read_and_written_off_the_loop_and_short_ones_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threading.get_ident()
    where: list[tuple[str, bool]] = []

    def watched(name: str) -> Any:
        original = getattr(SignatureCodec, name)

        def call(*args: Any) -> Any:
            where.append((name, threading.get_ident() == here))
            return original(*args)

        return call

    for name in ("decode", "encode"):
        monkeypatch.setattr(SignatureCodec, name, watched(name))
    async with running(tmp_path) as (_, client):
        rows = 4096
        long = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 16], "data": [1.0] * 16 * rows}]}
        for request, on_loop in ((INFER, True), (long, False)):
            where.clear()
            answer = await client.post("/v2/models/add_one/infer", json=request)
            assert answer.json()["outputs"][0]["data"] == [2.0] * len(request["inputs"][0]["data"])  # type: ignore[index]
            assert where == [("decode", on_loop), ("encode", on_loop)]


async def test_what_is_answered_at_once_is_what_the_application_answers(tmp_path: Path) -> None:
    head = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "parameters": {"binary_data_size": 64}}]}
    packed = json.dumps({**head, "parameters": {"binary_data_output": True}}).encode()
    length = b"%d" % len(packed)
    cases: list[tuple[bytes, list[tuple[bytes, bytes]], bool]] = [
        (json.dumps(INFER).encode(), [], True),
        (json.dumps(INFER).encode(), [(b"x-request-id", b"mine"), (b"inferway-timeout-ms", b"5000")], True),
        (packed + bytes(64), [(b"inference-header-content-length", length)], True),
        (bytes(64), [(b"inference-header-content-length", b"0")], True),
        # Whatever is out of the ordinary, or fails, is left to the application.
        (json.dumps(INFER).encode(), [(b"accept-encoding", b"gzip")], False),
        (json.dumps(INFER).encode(), [(b"inferway-timeout-ms", b"0")], False),
        (json.dumps(INFER).encode(), [(b"inferway-timeout-ms", b"soon")], False),
        (json.dumps({**INFER, "outputs": [{"name": "nobody"}]}).encode(), [], False),
        (b"nonsense", [], False),
    ]
    async with running(tmp_path) as (app, client):
        await client.post(PATHS[0], json=INFER)  # the first request of a version is never answered at once
        for path in PATHS[:5]:
            for body, headers, at_once in cases:
                names = [(k.decode(), v.decode()) for k, v in headers]
                if not any(name == b"accept-encoding" for name, _ in headers):
                    names.append(("accept-encoding", "identity"))
                response = await client.post(path, content=body, headers=names)
                before = await _counted(client)
                scope = {"method": "POST", "path": path, "headers": headers, "state": app.state.lifespan}
                app.guard = None
                answer = app.answer_at_once(scope, body)
                if path in PATHS[:2] and at_once:
                    assert answer is not None
                    assert (answer[0], answer[2]) == (response.status_code, response.content)
                    given = dict(answer[1])
                    for name in (b"content-type", b"content-length", b"inference-header-content-length"):
                        assert given.get(name, b"").decode() == response.headers.get(name.decode(), "")
                    assert await _counted(client) == before + 1
                else:
                    assert answer is None
                    assert await _counted(client) == before


async def _counted(client: httpx.AsyncClient) -> int:
    stats = (await client.get("/v2/models/add_one/stats")).json()["model_stats"][0]
    return int(stats["inference_stats"]["success"]["count"]) + int(stats["inference_stats"]["fail"]["count"])


async def test_a_defect_is_logged_with_its_request_and_answered_without_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as (_, client):

        def broken(*_: Any) -> None:
            raise ZeroDivisionError("secret detail")

        monkeypatch.setattr(application, "infer_target", broken)
        with caplog.at_level(logging.ERROR):
            response = await client.post(PATHS[0], json=INFER, headers={"X-Request-Id": "abc"})
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert "secret" not in response.text
    assert any("abc" in r.getMessage() and r.exc_info for r in caplog.records)


async def test_problems_below_api_have_the_shape_of_rfc_9457(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        response = await client.get("/api/v1/keys/000000000000")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["type"] == "urn:inferway:error:key_not_found"
    assert (body["status"], body["code"]) == (404, "key_not_found")
    assert body["title"]
    assert body["request_id"] == response.headers["x-request-id"]


async def test_a_wrong_method_says_which_are_right(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        response = await client.put("/api/v1/keys")
        assert response.status_code == 405
        assert response.headers["allow"] == "GET, POST"
        assert (await client.head("/v2")).status_code == 405
        assert (await client.get("/v2/models/add_one/infer")).headers["allow"] == "POST"


async def test_every_answer_has_a_request_id_and_no_two_made_ones_are_equal(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        paths = ["/v2", "/nowhere", "/v2/models/nobody", "/v2/health/live"]
        ids = [(await client.get(path)).headers["x-request-id"] for path in paths for _ in range(3)]
    assert len(set(ids)) == len(ids)


@asynccontextmanager
async def stock_server(app: Any) -> AsyncIterator[int]:
    """uvicorn as it comes, on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(30):
            while not server.started:
                await asyncio.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def test_a_caller_that_leaves_is_noticed_under_a_server_without_our_extension(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"slow": models.slow()})
    app = create_app(Settings(model_dir=repository, state_dir=tmp_path / "state", auth=False))
    body = json.dumps(
        {
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64},
                {"name": "steps", "datatype": "INT64", "shape": [], "data": [10**9]},
            ]
        }
    ).encode()
    async with stock_server(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        async with asyncio.timeout(30):
            while (await client.get("/v2/health/ready")).status_code != 200:
                await asyncio.sleep(0.01)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        async with asyncio.timeout(30):
            await asyncio.sleep(0.2)  # long enough to be at work; the test holds whether it is or not
            writer.close()
            await writer.wait_closed()
            while await _failures(client) != 1:
                await asyncio.sleep(0.01)


async def _failures(client: httpx.AsyncClient) -> int:
    stats = (await client.get("/v2/models/slow/stats")).json()["model_stats"][0]
    return int(stats["inference_stats"]["fail"]["count"])
