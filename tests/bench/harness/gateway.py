"""The gateway under measurement, started as an operator starts it: its own command line, SQLite, a real key."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.load import Job, ask
from harness.paths import CACHE, LOGS, ROOT
from harness.processes import BenchError, Command, Server, running

INFERWAY = str(Path(sys.executable).with_name("inferway"))


@dataclass(frozen=True, slots=True)
class BatchCounters:
    """Rows answered and runs made since the start."""

    rows: int
    runs: int


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway with a key that may infer and read."""

    server: Server
    key: str

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def warnings(self) -> list[str]:
        """What the gateway warned of since its start: a benchmark says it, for it may explain a number."""
        lines = self.server.log.read_text(errors="replace").splitlines()
        return [line for line in lines if any(word in line for word in ('"warning"', '"error"', "WARNING", "ERROR"))]

    def batch_counters(self, model: str) -> BatchCounters:
        reply = ask(self.server, Job(f"/v2/models/{model}/stats", [], self.authorization, method="GET"))
        if reply.status != 200:
            raise BenchError(f"the statistics of {model}: {reply.status} {reply.body[:300]!r}")
        (stats,) = json.loads(reply.body)["model_stats"]
        return BatchCounters(stats["inference_count"], stats["execution_count"])


@contextmanager
def gateway(
    repository: Path, name: str = "Inferway", options: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[Gateway]:
    """Serve ``repository`` with authentication, metrics and validation as they are by default."""
    state = CACHE / "bench-state" / name.lower().replace(" ", "-")
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    key = create_key(state)
    argv = [INFERWAY, "serve", str(repository), "--port", "{port}", "--state-dir", str(state), *options]
    command = Command(
        argv, ROOT, env or {}, ready_path="/v2/health/ready", note="defaults: key, metrics, validation, logs"
    )
    with running(name, command, LOGS) as server:
        yield Gateway(server, key)


def create_key(state: Path) -> str:
    argv = [INFERWAY, "keys", "create", "--name", "bench", "--scopes", "infer", "read", "--state-dir", str(state)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"no key could be made: {done.stderr or done.stdout}")
    return done.stdout.strip()
