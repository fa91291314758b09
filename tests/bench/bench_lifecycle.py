"""What the life of a version costs: deploying a large one, and swapping versions under load.

Deploying: a model of 1 GiB of weights goes up, is checked, laid out, looked at, loaded in a worker, compared and made
the default. Beside it stands what nobody can save: copying the file (``cp`` and ``sync``), and loading it in ONNX
Runtime.

Swapping: requests come at a fixed rate, whether or not those before them were answered, while the alias goes from one
version to another many times: by moving it, by deploying what is there already, and by deploying something new. Every
answer has to be right for the version that it names, and a request that was sent after a swap was acknowledged, and
answered before the next began, has to come from the version swapped to. ``--seconds`` and ``--rounds`` do not matter
here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import onnx
from harness.gateway import INFERWAY, gateway
from harness.options import Options, main
from harness.paths import CACHE, MODELS
from harness.processes import BenchError
from harness.report import Check, Report
from harness.steady import Steady
from onnx import TensorProto, helper, numpy_helper

WIDTH: Final = 16_384
"""Of a square matrix of FP32: 1 GiB."""
RATE: Final = 300
SWAPS: Final = 200
_PIECE: Final = 1 << 20


def run(options: Options) -> Report:
    report = Report("lifecycle")
    folder = MODELS / "lifecycle"
    folder.mkdir(parents=True, exist_ok=True)
    empty = MODELS / "lifecycle-repository"
    empty.mkdir(exist_ok=True)
    with gateway(empty, "Inferway lifecycle") as ours:
        key = _key(CACHE / "bench-state" / "inferway-lifecycle")
        base = f"http://127.0.0.1:{ours.server.port}"
        if not options.only or "swap" in options.only:
            asyncio.run(_swap(report, base, key))
        if not options.only or "deploy" in options.only:
            asyncio.run(_deploy_large(report, base, key, folder))
    return report


def _key(state: Path) -> str:
    argv = [INFERWAY, "keys", "create", "--name", "deploys", "--scopes", "infer", "read", "deploy"]
    done = subprocess.run([*argv, "--state-dir", str(state)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"no key could be made: {done.stderr or done.stdout}")
    return done.stdout.strip()


def _client(base: str, key: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    return httpx.AsyncClient(base_url=base, headers={"X-API-Key": key}, timeout=600, limits=limits)


# ---------------------------------------------------------------------------------------------------- deploying


async def _upload(client: httpx.AsyncClient, content: bytes | Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    if isinstance(content, bytes):
        digest.update(content)
        size = len(content)
    else:
        size = await asyncio.to_thread(_hash, content, digest)
    name = digest.hexdigest()
    answer = await client.put(
        f"/api/v1/blobs/{name}",
        content=content if isinstance(content, bytes) else _pieces(content),
        headers={"Content-Length": str(size), "Content-Type": "application/octet-stream"},
    )
    if answer.status_code != 201:
        raise BenchError(f"an upload was answered {answer.status_code}: {answer.text[:300]}")
    return {"digest": name, "size": size}


def _hash(path: Path, digest: Any) -> int:
    """Hash a file; returns its size."""
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
        return stream.tell()


async def _pieces(path: Path) -> Any:
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            yield piece


async def _deploy(
    client: httpx.AsyncClient, model: str, files: list[dict[str, Any]], **members: Any
) -> tuple[int, dict[str, float]]:
    """Deploy files that are there; the version, and seconds from the request to each step that was seen."""
    began = time.perf_counter()
    answer = await client.post(f"/api/v1/models/{model}/versions", json={"files": files, **members})
    if answer.status_code != 202:
        raise BenchError(f"a deployment was answered {answer.status_code}: {answer.text[:300]}")
    found = answer.json()
    path = f"/api/v1/deployments/{found['id']}"
    seen: dict[str, float] = {}
    while found["state"] == "running":
        query = {"wait": "30"} | ({"step": found["step"]} if found["step"] else {})
        found = (await client.get(path, params=query)).json()
        if found["step"] and found["step"] not in seen:
            seen[found["step"]] = time.perf_counter() - began
    if found["state"] != "succeeded":
        raise BenchError(f"a deployment ended as {found['state']}: {found['error']}")
    return int(found["version"]), seen


async def _deploy_large(report: Report, base: str, key: str, folder: Path) -> None:
    model, weights = await asyncio.to_thread(_large_model, folder)
    size = weights.stat().st_size
    copy_s = await asyncio.to_thread(_copy, weights, folder / "copy.bin")
    load_s = await asyncio.to_thread(_load, model)
    async with _client(base, key) as client:
        began = time.perf_counter()
        files = [
            {"path": "model.onnx", **await _upload(client, model.read_bytes())},
            {"path": weights.name, **await _upload(client, weights)},
        ]
        upload_s = time.perf_counter() - began
        _, steps = await _deploy(client, "large", files)
        began = time.perf_counter()
        await _deploy(client, "large", files)
        again_s = time.perf_counter() - began
        began = time.perf_counter()
        await _deploy(client, "large", files, config={"max_batch_size": 2})
        second_s = time.perf_counter() - began
    total_s = upload_s + steps["ready"]
    rows = [
        ["cp and sync", f"{copy_s:.2f}"],
        ["session load in ONNX Runtime", f"{load_s:.2f}"],
        ["upload, hashed here and there", f"{upload_s:.2f}"],
        *[[f"deployment, {step} after", f"{at:.2f}"] for step, at in steps.items()],
        ["upload and deployment", f"{total_s:.2f}"],
        ["the same content again", f"{again_s:.2f}"],
        ["the same weights as another version", f"{second_s:.2f}"],
    ]
    report.table(f"A model of {size / 2**30:.2f} GiB", ["what", "seconds"], rows)
    ratio = total_s / (copy_s + load_s)
    report.check(Check("upload and deployment of 1 GiB against cp and load", ratio, 3.0, at_least=False, unit="×"))


def _large_model(folder: Path) -> tuple[Path, Path]:
    """y = x @ w with ``w`` in a file beside the model; made once."""
    model, weights = folder / "model.onnx", folder / "weights.bin"
    if not model.exists():
        rows = np.random.default_rng(0).standard_normal((WIDTH // 16, WIDTH), np.float32)
        with weights.open("wb") as stream:
            for _ in range(16):
                stream.write(rows.tobytes())
        tensor = TensorProto(name="w", dims=(WIDTH, WIDTH), data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for name, text in (("location", weights.name), ("offset", "0"), ("length", str(weights.stat().st_size))):
            tensor.external_data.add(key=name, value=text)
        model.write_bytes(_model([helper.make_node("MatMul", ["x", "w"], ["y"])], WIDTH, [tensor]))
    return model, weights


def _model(nodes: list[onnx.NodeProto], width: int, constants: list[TensorProto]) -> bytes:
    sides = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])] for name in "xy"]
    graph = helper.make_graph(nodes, "g", sides[0], sides[1], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    content: bytes = made.SerializeToString()
    return content


def _copy(source: Path, target: Path) -> float:
    os.sync()
    began = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())
    took = time.perf_counter() - began
    target.unlink()
    return took


def _load(model: Path) -> float:
    """In a process of its own, whose memory goes with it."""
    code = (
        "import sys, time, onnxruntime as ort\n"
        "began = time.perf_counter()\n"
        "ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "print(time.perf_counter() - began)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    return float(done.stdout)


# ---------------------------------------------------------------------------------------------------- swapping


@dataclass
class _History:
    """What happened, on one clock."""

    answers: list[tuple[float, float, int, int, float]] = field(default_factory=list)
    """Sent at, answered at, status, version, and the number that came."""
    swaps: list[tuple[float, float, int]] = field(default_factory=list)
    """Begun at, acknowledged at, and the version swapped to."""
    failures: Counter[str] = field(default_factory=Counter)
    late: int = 0
    left_out: int = 0


async def _swap(report: Report, base: str, key: str) -> None:
    history = _History()
    increments: dict[int, float] = {}
    async with _client(base, key) as client:
        contents: dict[float, list[dict[str, Any]]] = {}

        async def deploy(increment: float) -> int:
            if increment not in contents:
                made = _model(
                    [helper.make_node("Add", ["x", "c"], ["y"])],
                    16,
                    [numpy_helper.from_array(np.full(16, increment, np.float32), "c")],
                )
                contents[increment] = [{"path": "model.onnx", **await _upload(client, made)}]
            version, _ = await _deploy(client, "swapped", contents[increment])
            increments[version] = increment
            return version

        versions = [await deploy(1.0), await deploy(2.0)]
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [0.0] * 16}]}
        path, headers = "/v2/models/swapped/infer", {"X-API-Key": key, "Content-Type": "application/json"}
        with Steady(client.base_url.port or 80, path, headers, json.dumps(body).encode(), RATE) as asking:
            for number in range(SWAPS):
                await asyncio.sleep(0.05)
                # The clock of the answers too, which come from another process.
                began = time.monotonic()
                if number % 20 == 19:
                    version = await deploy(3.0 + number)
                elif number % 4 == 3:
                    version = await deploy(increments[versions[number % 2]])
                else:
                    version = versions[number % 2]
                    change = {"weights": {str(version): 100}}
                    answer = await client.put("/api/v1/models/swapped/aliases/stable", json=change)
                    if answer.status_code != 200:
                        raise BenchError(f"a swap was answered {answer.status_code}: {answer.text[:300]}")
                history.swaps.append((began, time.monotonic(), version))
            _take(history, await asyncio.to_thread(asking.end))
    _judge(report, history, increments)


def _take(history: _History, found: dict[str, Any]) -> None:
    for sent, answered, status, version, got in found["answers"]:
        if status == 200:
            history.answers.append((sent, answered, status, version, got))
        else:
            history.failures[str(status)] += 1
    if found["broken"]:
        history.failures["connection"] += found["broken"]
    history.late, history.left_out = found["late"], found["left_out"]


def _judge(report: Report, history: _History, increments: dict[int, float]) -> None:
    mixed = sum(got != increments[version] for _, _, _, version, got in history.answers)
    stale = 0
    ends = [begun for begun, _, _ in history.swaps[1:]] + [float("inf")]
    for (_, acknowledged, wanted), end in zip(history.swaps, ends, strict=True):
        for sent, answered, _, version, _ in history.answers:
            if sent >= acknowledged and answered <= end and version != wanted:
                stale += 1
    taken = sorted(answered - sent for sent, answered, _, _, _ in history.answers)
    if not taken:
        raise BenchError("nothing was answered")
    took = history.answers[-1][1] - history.answers[0][0]
    report.table(
        f"{SWAPS} swaps under {RATE} requests a second",
        ["requests", "per s", "errors", "of a mixed version", "of the version before", "p50 ms", "p99 ms", "worst ms"],
        [
            [
                f"{len(taken)}",
                f"{len(taken) / took:.0f}",
                f"{sum(history.failures.values())}",
                f"{mixed}",
                f"{stale}",
                *(f"{taken[min(int(len(taken) * share), len(taken) - 1)] * 1e3:.1f}" for share in (0.5, 0.99, 1.0)),
            ]
        ],
    )
    if history.failures:
        report.note(f"errors: {dict(history.failures)}")
    if history.late or history.left_out:
        report.note(
            f"{history.late} requests were sent 50 ms or more after their time, and {history.left_out} not at all, "
            "because nothing was idle: the processors are busy"
        )
    report.check(Check("requests a second during the swaps", len(taken) / took, 0.98 * RATE, at_least=True))
    report.check(Check("errors during the swaps", sum(history.failures.values()), 0, at_least=False))
    report.check(Check("answers of a mixed version", mixed, 0, at_least=False))
    report.check(Check("answers of the version before an acknowledged swap", stale, 0, at_least=False))


if __name__ == "__main__":
    main(run, __doc__ or "")
