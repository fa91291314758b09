"""Where the benchmarks find and keep things: all of it in the working copy, under the ignored folder `.cache`."""

from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
ROOT = BENCH.parent.parent
CACHE = ROOT / ".cache"
RIVALS = BENCH / "rivals"
RIVAL_VENVS = CACHE / "bench-venvs"
MODELS = CACHE / "bench-models"
LOGS = CACHE / "bench-logs"
