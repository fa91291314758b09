"""Unloading a model gives its memory back: measured in a process of its own, where nothing else allocates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from inferway_gateway.backends.onnx import memory
from models import matmul, write_repository

SCRIPT = """
import sys
from pathlib import Path
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.core.backend import Artifact

def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * 4096 / 1e6

backend = OnnxBackend(trial_budget_s=0.0, measure_budget_s=0.0)
def cycle():
    session = backend.open(Artifact("m", 1, Path(sys.argv[1])))
    loaded = resident()
    session.close()
    return loaded, resident()

first = cycle()
for _ in range(4):
    last = cycle()
print(*first, *last)
"""


def test_loading_and_unloading_leaves_nothing_behind(tmp_path: Path) -> None:
    write_repository(tmp_path, {"m": matmul(4096, 4096)})
    path = tmp_path / "m" / "1" / "model.onnx"
    assert path.stat().st_size > 64e6
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, path], capture_output=True, text=True, check=True, timeout=120
    )
    first_loaded, first_closed, last_loaded, last_closed = map(float, result.stdout.split())
    weights = path.stat().st_size / 1e6
    assert first_loaded - first_closed > 0.9 * weights
    assert last_loaded < first_loaded + 8
    assert last_closed < first_closed + 4


def test_setting_up_the_heap_twice_is_the_same_as_once() -> None:
    assert memory.return_freed_memory() is memory.return_freed_memory()
    memory.trim()
