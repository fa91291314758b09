"""The memory budget on a real gateway: what was measured counts, and what is unloaded is given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import models
import text_models
from deploying import begin, deploy, watch
from inferway_gateway.backends.footprint import MemoryWatch
from live import LiveGateway, run_gateway

MIB = 1 << 20
ROUNDS = 100
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2048], "data": [1.0] * 2048}]}


def versions(gateway: LiveGateway) -> dict[str, dict[str, Any]]:
    listed = gateway.call("GET", "/api/v1/models")[1]["models"]
    return {model["name"]: model["versions"][0] for model in listed}


def metric(gateway: LiveGateway, name: str) -> float:
    text = gateway.call("GET", "/metrics")[1]
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def ask(gateway: LiveGateway, name: str) -> None:
    status, answer, _ = gateway.call("POST", f"/v2/models/{name}/infer", BODY)
    assert status == 200, answer


def descendants(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found


def held(gateway: LiveGateway) -> int:
    """Bytes of memory of the gateway and all that came from it, what they share counted once."""
    total = 0
    for pid in descendants(gateway.process.pid):
        with MemoryWatch(pid) as watch_:
            total += watch_.read().proportional
    return total


@pytest.mark.slow
def test_workers_count_as_they_were_measured_and_the_sum_stays_within(tmp_path: Path) -> None:
    """Deployed where there is room for all; then served by a gateway with room for two of three."""
    (tmp_path / "models").mkdir()
    folders = tmp_path / "models", tmp_path / "state"
    with run_gateway(*folders) as gateway:
        for seed, name in enumerate("abc"):
            deploy(gateway, name, models.matmul(2048, 1024, seed), isolation="worker")
        measured = {name: version["footprint"] for name, version in versions(gateway).items()}
        peaks = {name: footprint["peak_bytes"] for name, footprint in measured.items()}
        for footprint in measured.values():
            assert 8 * MIB < footprint["resident_bytes"] <= footprint["peak_bytes"]
        assert metric(gateway, "inferway_memory_used_bytes") == sum(peaks.values())
    limit = int(2.5 * max(peaks.values()))
    with run_gateway(*folders, environment={"INFERWAY_MEMORY_BUDGET_BYTES": str(limit)}) as gateway:
        for name in "abcabc":
            ask(gateway, name)
            now = versions(gateway)
            assert now[name]["state"] == "READY"
            assert sum(version["state"] == "READY" for version in now.values()) == 2
            assert metric(gateway, "inferway_memory_used_bytes") <= limit
        assert metric(gateway, "inferway_model_evictions_total") >= 4
        ended, _ = watch(gateway, begin(gateway, "huge", {"model.onnx": models.matmul(2048, limit // 8192 + 1)})[1])
        assert (ended["state"], ended["error"]["code"]) == ("failed", "memory_exceeded")
        assert f"the budget of this gateway is {limit} bytes" in ended["error"]["message"]


@pytest.mark.slow
def test_the_processes_of_a_tokenizer_are_in_the_footprint_of_its_model(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with run_gateway(tmp_path / "models", tmp_path / "state") as gateway:
        files = text_models.embedder()
        deploy(gateway, "texts", files)
        deploy(gateway, "tensors", files["model.onnx"])
        found = versions(gateway)
        texts, tensors = found["texts"]["footprint"], found["tensors"]["footprint"]
        assert texts["peak_bytes"] - tensors["peak_bytes"] > 20 * MIB  # two processes with an interpreter each
        assert texts["resident_bytes"] > tensors["resident_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["inprocess", "worker"])
def test_a_hundred_versions_that_come_and_go_leave_nothing_behind(tmp_path: Path, isolation: str) -> None:
    """Room for one of two, asked for in turn: a hundred loads, and as many unloads, through the whole gateway."""
    (tmp_path / "models").mkdir()
    folders, settings = (tmp_path / "models", tmp_path / "state"), {"INFERWAY_ISOLATION": isolation}
    with run_gateway(*folders, environment=settings) as gateway:
        for seed, name in enumerate("ab"):
            deploy(gateway, name, models.matmul(2048, 1024, seed), config={"session": {"trial": False}})
        taken = metric(gateway, "inferway_memory_used_bytes")
    settings["INFERWAY_MEMORY_BUDGET_BYTES"] = str(int(0.75 * taken))
    with run_gateway(*folders, environment=settings) as gateway:
        for name in "abab":
            ask(gateway, name)
        before, loads = held(gateway), metric(gateway, "inferway_model_loads_total")
        for _ in range(ROUNDS // 2):
            ask(gateway, "a")
            ask(gateway, "b")
        after = held(gateway)
        assert metric(gateway, "inferway_model_loads_total") - loads == ROUNDS
        print(f"{(after - before) / MIB:.1f} MiB more than {before / MIB:.0f}")
        assert after - before < 20 * MIB
