from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inferway_gateway.backends.worker.description import (
    BackendOptions,
    Decided,
    Order,
    Report,
    read_order,
    write_order,
    write_report,
)
from inferway_gateway.backends.worker.report import read_report
from inferway_gateway.core.backend import CostPoint, Profile, TrialRow
from inferway_gateway.core.errors import ModelLoadError
from inferway_gateway.core.model_config import (
    BatchPolicy,
    ModelConfig,
    PaddingAxis,
    QueuePolicy,
    SessionOptions,
    TensorConfig,
    Warmup,
    WarmupInput,
)
from inferway_gateway.core.tensors import Signature, TensorSpec

REPORT = Report(
    Signature((TensorSpec("x", "FP32", (-1, 4), axes=("batch", None)),), (TensorSpec("y", "BYTES", (-1,)),), True, 64),
    Profile(
        row_exactness="padded",
        batchable=True,
        cost=(CostPoint(1, 1e-5), CostPoint(8, 2e-5)),
        cost_row_elements=4,
        trial=(TrialRow("default", 8, 1e-5, True),),
        execution_providers=("CPUExecutionProvider",),
        note="fine",
    ),
    Decided(1, ("SkipLayerNormFusion",), True, 64),
    ("rlimits", "seccomp"),
    {"landlock": "the kernel does not have it"},
)


def test_an_order_is_read_as_it_was_written() -> None:
    config = ModelConfig(
        max_batch_size=8,
        inputs=(TensorConfig("x", "FP32", (4,), (2, 2), labels=("a",)),),
        batching=BatchPolicy(
            queue=QueuePolicy(default_timeout_s=1.5),
            queue_by_priority={2: QueuePolicy(timeout_action="delay")},
            padding=(PaddingAxis({"x": 1}, fill={"x": 0.5}, buckets=(8, 16)),),
        ),
        session=SessionOptions(disabled_optimizers=("A", "B")),
        warmup=(Warmup("w", 1, 2, (WarmupInput("x", "FP32", (4,), "file", str(Path("/a"))),)),),
        parameters={"a": "b"},
    )
    order = Order("m", 3, "model.onnx", config, BackendOptions(cpus=2), ("/a",), Decided(2, ("A",), True, 8), 1 << 33)
    assert read_order(write_order(order)) == order


def test_a_report_is_read_as_it_was_written() -> None:
    assert read_report(write_report(REPORT)) == REPORT


LIES: dict[str, tuple[list[str | int], Any]] = {
    "datatype": (["inputs", 0, "datatype"], "FP8"),
    "shape": (["inputs", 0, "shape"], [-2, 4]),
    "rank": (["inputs", 0, "shape"], [1] * 33),
    "axes": (["inputs", 0, "axes"], ["a"]),
    "larger than memory": (["inputs", 0, "shape"], [1 << 40, 1 << 40]),
    "no outputs": (["outputs"], []),
    "exactness": (["profile", "row_exactness"], "perfect"),
    "cost descends": (["profile", "cost"], [{"rows": 8, "seconds": 1.0}, {"rows": 1, "seconds": 1.0}]),
    "cost of nothing": (["profile", "cost"], [{"rows": 1, "seconds": 0.0}]),
    "cost without end": (["profile", "cost"], [{"rows": 1, "seconds": float("inf")}]),
    "threads": (["profile", "intra_op_threads"], 0),
    "rows": (["decided", "max_rows"], -1),
    "a word too many": (["decided", "pickle"], 1),
    "truth": (["decided", "batched"], "yes"),
    "name": (["inputs", 0, "name"], ""),
    "note": (["profile", "note"], "x" * (1 << 17)),
}


@pytest.mark.parametrize(("place", "lie"), LIES.values(), ids=LIES)
def test_a_report_that_cannot_be_is_refused_without_its_content(place: list[Any], lie: Any) -> None:
    told = json.loads(write_report(REPORT))
    inner = told
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = lie
    with pytest.raises(ModelLoadError) as refused:
        read_report(json.dumps(told).encode())
    assert len(refused.value.message) < 200


def test_names_are_there_once() -> None:
    told = json.loads(write_report(REPORT))
    told["inputs"] *= 2
    with pytest.raises(ModelLoadError, match="names an input twice"):
        read_report(json.dumps(told).encode())


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"\xff", b"{}" * 3, b"[" * 100_000], ids=["empty", "list", "bytes", "more", "deep"]
)
def test_what_is_no_report_is_refused(raw: bytes) -> None:
    with pytest.raises(ModelLoadError, match="not valid"):
        read_report(raw)
