"""What the runtime would tell others of us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from models import add_one

SCRIPT = """
import sys
from pathlib import Path
from inferway_gateway.backends.worker.backend import WorkerBackend
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.core.backend import Artifact

artifact = Artifact("m", 1, Path(sys.argv[1]))
OnnxBackend().open(artifact).close()
with WorkerBackend() as workers:
    workers.open(artifact).close()
"""


def test_neither_gateway_nor_workers_keep_a_record_of_models_for_the_vendor(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(add_one())
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: said for name, said in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
    command: list[str | Path] = [sys.executable, "-B", "-c", SCRIPT, tmp_path / "model.onnx"]
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert list(home.rglob("*")) == []
