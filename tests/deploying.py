"""Deploying to a live gateway by plain HTTP, for tests."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from live import LiveGateway

LIMIT_S = 60.0


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def upload(gateway: LiveGateway, content: bytes, *, key: str = "") -> dict[str, Any]:
    """Send one content; returns its members of a file, but the path."""
    digest = digest_of(content)
    status, answer, _ = gateway.call("PUT", f"/api/v1/blobs/{digest}", content, key=key)
    assert status == 201, answer
    return {"digest": digest, "size": len(content)}


def begin(
    gateway: LiveGateway, model: str, files: Mapping[str, bytes], *, key: str = "", **members: Any
) -> tuple[int, Any]:
    """Upload the files and ask for a deployment."""
    listed = [{"path": path, **upload(gateway, content, key=key)} for path, content in files.items()]
    status, answer, headers = gateway.call(
        "POST", f"/api/v1/models/{model}/versions", {"files": listed, **members}, key=key
    )
    if status == 202:
        assert headers["Location"] == f"/api/v1/deployments/{answer['id']}"
    return status, answer


def watch(gateway: LiveGateway, deployment: Mapping[str, Any], *, key: str = "") -> tuple[Any, list[str]]:
    """Follow a deployment to its end: how it ended, and the steps that were seen."""
    end = time.monotonic() + LIMIT_S
    seen: list[str] = []
    while True:
        step = f"&step={seen[-1]}" if seen else ""
        status, answer, _ = gateway.call("GET", f"/api/v1/deployments/{deployment['id']}?wait=10{step}", key=key)
        assert status == 200, answer
        if answer["step"] is not None and answer["step"] not in seen:
            seen.append(answer["step"])
        if answer["state"] != "running":
            return answer, seen
        assert time.monotonic() < end, answer


def deploy(gateway: LiveGateway, model: str, files: Mapping[str, bytes] | bytes, **members: Any) -> Any:
    """Deploy and wait until it has succeeded."""
    content = {"model.onnx": files} if isinstance(files, bytes) else files
    status, answer = begin(gateway, model, content, **members)
    assert status == 202, answer
    ended, _ = watch(gateway, answer)
    assert ended["state"] == "succeeded", ended
    return ended


def infer(gateway: LiveGateway, target: str, *, size: int = 16, value: float = 1.0) -> tuple[int, Any, str | None]:
    """Ask a model of the kind ``add_one``: status, the first number of its answer (or the error), and its version."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, size], "data": [value] * size}]}
    status, answer, headers = gateway.call("POST", f"/v2/models/{target}/infer", body)
    version = headers.get("Inferway-Model-Version")
    return status, answer["outputs"][0]["data"][0] if status == 200 else answer, version


def golden(inputs: Sequence[float], outputs: Sequence[float], **tolerance: float) -> bytes:
    """``golden.json`` with one example of one row for a model of the kind ``add_one``."""

    def tensor(name: str, data: Sequence[float]) -> dict[str, Any]:
        row = np.asarray(data, np.float32)
        return {"name": name, "datatype": "FP32", "shape": [1, row.size], "data": row.tolist()}

    return json.dumps(
        {"examples": [{"inputs": [tensor("x", inputs)], "outputs": [tensor("y", outputs)], **tolerance}]}
    ).encode()
