"""A hundred rounds of loading and unloading end where they began, wherever the model runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models import matmul

MIB = 1 << 20
ROUNDS = 100

SCRIPT = """
import json, sys
from pathlib import Path
from inferway_gateway.backends.footprint import MemoryWatch
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.backends.worker.backend import WorkerBackend
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.model_config import ModelConfig, SessionOptions

where, path, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
artifact = Artifact("m", 1, path, ModelConfig(max_batch_size=4, session=SessionOptions(trial=False)))
watch = MemoryWatch()

def go(backend):
    held = []
    for _ in range(rounds + 2):
        session = backend.open(artifact)
        session.close()
        held.append(watch.read().resident)
    return held[1:]

if where == "worker":
    with WorkerBackend() as backend:
        held = go(backend)
else:
    held = go(OnnxBackend())
print(json.dumps(held))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inprocess", "worker"])
def test_a_hundred_rounds_of_loading_and_unloading_end_where_they_began(tmp_path: Path, where: str) -> None:
    """8 MiB of weights, so that one round in forty that kept them would show."""
    (tmp_path / "model.onnx").write_bytes(matmul(2048, 1024))
    command: list[str | Path] = [sys.executable, "-c", SCRIPT, where, tmp_path / "model.onnx", str(ROUNDS)]
    done = subprocess.run(command, capture_output=True, timeout=300, check=True)
    held = json.loads(done.stdout)
    assert len(held) == ROUNDS + 1
    assert held[-1] - held[0] < 20 * MIB
