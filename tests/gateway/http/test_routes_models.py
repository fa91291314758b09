"""Models, versions and deployments on a gateway without a folder of models, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

import models
from inferway_gateway.app import create_app
from inferway_gateway.core.opening import LOAD_RATIO
from inferway_gateway.settings import Settings


@asynccontextmanager
async def running(tmp_path: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway that has nothing but what is deployed to it."""
    app = create_app(Settings(state_dir=tmp_path / "state", auth=False, **settings))
    async with asyncio.timeout(60), app.router.lifespan_context(app) as state:

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            scope["state"] = dict(state or {})
            await app(scope, receive, send)

        transport = httpx.ASGITransport(app=with_state)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            while (await client.get("/v2/health/ready")).status_code != 200:
                await asyncio.sleep(0.01)
            yield client


async def deploy(client: httpx.AsyncClient, model: str, content: bytes, **members: Any) -> httpx.Response:
    """Deploy one file and wait for the end; the answer that told of it, or the one that refused it."""
    digest = sha256(content).hexdigest()
    sent = await client.put(f"/api/v1/blobs/{digest}", content=content)
    assert sent.status_code == 201, sent.text
    body = {"files": [{"path": "model.onnx", "digest": digest, "size": len(content)}], **members}
    answer = await client.post(f"/api/v1/models/{model}/versions", json=body)
    while answer.status_code in (200, 202) and answer.json()["state"] == "running":
        query = {"wait": "10", **({"step": answer.json()["step"]} if answer.json()["step"] else {})}
        answer = await client.get(f"/api/v1/deployments/{answer.json()['id']}", params=query)
    return answer


async def test_a_gateway_without_a_folder_serves_what_is_deployed(tmp_path: Path) -> None:
    async with running(tmp_path, isolation="inprocess") as client:
        assert (await client.get("/v2/models")).json() == {"models": []}
        assert (await client.get("/api/v1/models")).json() == {"models": []}
        assert (await deploy(client, "m", models.add_one())).json()["state"] == "succeeded"
        assert (await client.get("/v2/models")).json() == {"models": ["m"]}
        version = (await client.get("/api/v1/models/m/versions/1")).json()
        assert (version["isolation"], version["created_by"], version["footprint"]) == ("inprocess", "anonymous", None)
        assert (await client.delete("/api/v1/models/m")).status_code == 204
        assert (await client.get("/v2/models")).json() == {"models": []}


async def test_a_caller_chooses_the_gateways_process_only_where_the_operator_lets_him(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        answer = await deploy(client, "m", models.add_one(), isolation="inprocess")
        assert (answer.status_code, answer.json()["code"]) == (403, "permission_denied")
    async with running(tmp_path, allow_inprocess=True) as client:
        answer = await deploy(client, "m", models.add_one(), isolation="inprocess")
        assert answer.json()["state"] == "succeeded"
        assert (await client.get("/api/v1/models/m/versions/1")).json()["isolation"] == "inprocess"
        # Isolation is content: the same file in a worker is another version.
        assert (await deploy(client, "m", models.add_one(), isolation="worker")).json()["version"] == 2


async def test_the_memory_of_deployed_models_is_in_the_metrics(tmp_path: Path) -> None:
    async with running(tmp_path, isolation="inprocess", memory_budget_bytes=1_000_000) as client:
        content = models.add_one()
        assert (await deploy(client, "m", content)).json()["state"] == "succeeded"
        lines = (await client.get("/metrics")).text.splitlines()
        for line in (
            "inferway_memory_budget_bytes 1e+06",
            f"inferway_memory_used_bytes {float(int(len(content) * LOAD_RATIO))}",
            "inferway_model_loads_total 1.0",
            "inferway_model_evictions_total 0.0",
        ):
            assert line in lines


@pytest.mark.parametrize("member", ["metadata", "config"])
async def test_what_is_kept_beside_the_files_is_bounded(tmp_path: Path, member: str) -> None:
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"a": [deep]} if len(deep) else {"a": 1}
    async with running(tmp_path, isolation="inprocess") as client:
        refused = await deploy(client, "m", models.add_one(), **{member: {"a": deep}})
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_parameter")
        assert f"'{member}' to be nested at most 32 deep" in refused.json()["detail"]
        refused = await deploy(client, "m", models.add_one(), **{member: {"a": "x" * 70_000}})
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_parameter")
        assert f"'{member}' to take at most 65536 bytes" in refused.json()["detail"]
        assert (await client.get("/api/v1/deployments")).json() == {"deployments": []}


async def test_the_metadata_of_a_version_is_bounded_when_it_is_changed(tmp_path: Path) -> None:
    async with running(tmp_path, isolation="inprocess") as client:
        assert (await deploy(client, "m", models.add_one(), metadata={"a": 1})).json()["state"] == "succeeded"
        changed = await client.patch("/api/v1/models/m/versions/1", json={"metadata": {"a": "x" * 70_000}})
        assert (changed.status_code, changed.json()["code"]) == (400, "invalid_parameter")
        assert (await client.get("/api/v1/models/m/versions/1")).json()["metadata"] == {"a": 1}


async def test_a_model_cannot_ask_for_more_threads_or_time_than_the_operator_gives(tmp_path: Path) -> None:
    """1024 threads that the process table has no room for would keep its load waiting for them."""
    config = {"run_timeout_s": 1e9, "session": {"intra_op_threads": 1024}}
    async with running(tmp_path, cpus=1, run_timeout_s=0.2, run_timeout_limit_s=0.5) as client:
        assert (await deploy(client, "m", models.add_one(), config=config)).json()["state"] == "succeeded"
        assert (await deploy(client, "e", models.endless(), config=config)).json()["state"] == "succeeded"
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.0] * 64}]}
        answer = await client.post("/v2/models/e/infer", json=body)
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
        assert "longer than the 0.5 s" in answer.json()["error"]


async def test_a_key_has_so_many_deployments_going_on(tmp_path: Path) -> None:
    async with running(tmp_path, deployments_per_key=1, deployment_timeout_s=60) as client:
        slow = models.endless()
        digest = sha256(slow).hexdigest()
        await client.put(f"/api/v1/blobs/{digest}", content=slow)
        body = {"files": [{"path": "model.onnx", "digest": digest, "size": len(slow)}]}
        first = await client.post("/api/v1/models/a/versions", json=body)
        second = await client.post("/api/v1/models/b/versions", json=body)
        assert (first.status_code, second.status_code) == (202, 403)
        assert second.json()["code"] == "quota_exceeded"
        assert (await client.post(f"/api/v1/deployments/{first.json()['id']}/cancel")).status_code == 200


async def test_a_pipeline_that_takes_long_to_read_is_refused_unread(tmp_path: Path) -> None:
    step = b'[[steps]]\nname = "s"\nmodel = "m"\ninputs = { x = "x" }\n'
    async with running(tmp_path, isolation="inprocess") as client:
        assert (await deploy(client, "m", models.add_one())).json()["state"] == "succeeded"
        content = step + b"# and more\n" * 12_000
        digest = sha256(content).hexdigest()
        assert (await client.put(f"/api/v1/blobs/{digest}", content=content)).status_code == 201
        body = {"files": [{"path": "pipeline.toml", "digest": digest, "size": len(content)}]}
        answer = await client.post("/api/v1/models/p/versions", json=body)
        assert (answer.status_code, answer.json()["code"]) == (400, "model_rejected")
        assert "larger than the 131072 bytes" in answer.json()["detail"]
