"""The tiny model of the HTTP benchmark: two INT32 vectors of 16, their sum and their difference, in four forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.load import Job, Reply
from harness.processes import BenchError
from onnx import TensorProto, helper, save

LEFT = [1000 + 7 * i for i in range(16)]
RIGHT = [3 * i - 5 for i in range(16)]
TOTAL = [a + b for a, b in zip(LEFT, RIGHT, strict=True)]
DIFFERENCE = [a - b for a, b in zip(LEFT, RIGHT, strict=True)]


def write_model(path: Path) -> Path:
    """An ONNX file with a variable batch axis; Triton's example `simple` is the same model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape: list[str | int | None] = ["batch", 16]
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
            helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
        ],
        "addsub",
        [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name in ("INPUT0", "INPUT1")],
        [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name in ("OUTPUT0", "OUTPUT1")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def _tensor(name: str, values: list[int]) -> dict[str, Any]:
    return {"name": name, "shape": [1, 16], "datatype": "INT32", "data": values}


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


PROTOCOL_BODY = _compact({"inputs": [_tensor("INPUT0", LEFT), _tensor("INPUT1", RIGHT)]})
"""The Open Inference Protocol's request; LitServe's and BentoML's plain services take the same bytes."""
TYPED_BODY = _compact({"INPUT0": [LEFT], "INPUT1": [RIGHT]})
PAIRS_BODY = _compact({"pairs": [[LEFT, RIGHT]]})
JSON = {"Content-Type": "application/json"}


def job(path: str, body: bytes = PROTOCOL_BODY, headers: Mapping[str, str] | None = None) -> Job:
    return Job(path, [body], {**JSON, **(headers or {})})


def check(name: str, reply: Reply) -> None:
    """Raises ``BenchError`` unless the answer, in whichever of the forms, holds the right numbers."""
    if reply.status != 200:
        raise BenchError(f"{name} answered {reply.status}: {reply.body[:300]!r}")
    value = json.loads(reply.body)
    if isinstance(value, list):
        found = {"OUTPUT0": value[0][0], "OUTPUT1": value[0][1]}
    elif "outputs" in value:
        found = {one["name"]: one["data"] for one in value["outputs"]}
    else:
        found = {key: rows[0] for key, rows in value.items()}
    if found != {"OUTPUT0": TOTAL, "OUTPUT1": DIFFERENCE}:
        raise BenchError(f"{name} answered wrongly: {reply.body[:300]!r}")
