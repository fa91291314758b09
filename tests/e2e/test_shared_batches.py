"""Who shares a run of a model: the steps of pipelines with everybody else, and all fronts in a deployed one's process.

A model is held until it has so many rows, for longer than these take to come, so that requests share a run or are late.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import models
from deploying import deploy
from live import LiveGateway, run_gateway

LIMIT_S = 30.0
HOLD_S = 4.0
ROWS = 4
HELD = (
    f"max_batch_size: {ROWS}\n"
    f"dynamic_batching {{ preferred_batch_size: [ {ROWS} ] max_queue_delay_microseconds: {int(HOLD_S * 1e6)} }}\n"
)
THREADED = b"[session]\ninline = false\n"
"""A run as short as this model's would begin at once otherwise."""
TWO_STEPS = """
[[steps]]
name = "one"
model = "held"
inputs = { x = "x" }
[[steps]]
name = "two"
model = "after"
inputs = { x = "one.y" }
"""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("batches")
    repository = models.write_repository(root / "models", {"resident": models.add_one()})
    with run_gateway(repository, root / "state", "--workers", "2") as gateway:
        files = {"model.onnx": models.add_one(), "config.pbtxt": HELD.encode(), "inferway.toml": THREADED}
        deploy(gateway, "held", files)
        deploy(gateway, "after", models.add_one(increment=10))
        deploy(gateway, "steps", {"pipeline.toml": TWO_STEPS.encode()})
        yield gateway


class Caller:
    """A connection that stays with one of the fronts."""

    def __init__(self, gateway: LiveGateway) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=2 * LIMIT_S)
        self._headers = {"Authorization": f"Bearer {gateway.admin_key}"}
        self.front = ""

    def ask(self, model: str, value: float) -> float:
        """The first number of its answer to one row."""
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [value] * 16}]}
        self._connection.request("POST", f"/v2/models/{model}/infer", json.dumps(body), self._headers)
        response = self._connection.getresponse()
        self.front = (response.getheader("X-Request-Id") or "").partition("-")[0]
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return float(answer["outputs"][0]["data"][0])

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def callers(live: LiveGateway) -> Iterator[list[Caller]]:
    """Two at each of the two fronts."""
    made: list[Caller] = []
    found: dict[str, list[Caller]] = {}
    try:
        while sorted(map(len, found.values()))[-2:] != [2, 2]:
            assert len(made) < 200, "the kernel gives all connections to one front"
            caller = Caller(live)
            made.append(caller)
            caller.ask("resident", 0)
            if len(found.setdefault(caller.front, [])) < 2:
                found[caller.front].append(caller)
        yield [caller for some in found.values() for caller in some]
    finally:
        for caller in made:
            caller.close()


def counts(gateway: LiveGateway, model: str) -> tuple[int, int, dict[int, int]]:
    """Rows, runs, and runs by their rows."""
    found: Any = gateway.call("GET", f"/v2/models/{model}/stats")[1]["model_stats"][0]
    batches = {batch["batch_size"]: batch["compute_infer"]["count"] for batch in found["batch_stats"]}
    return found["inference_count"], found["execution_count"], batches


def together(*calls: Callable[[], float]) -> list[float]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(call) for call in calls]]


def test_requests_of_all_fronts_share_a_run_in_a_deployed_models_process(
    live: LiveGateway, callers: list[Caller]
) -> None:
    assert live.call("GET", "/api/v1/models/held/versions/1")[1]["isolation"] == "worker"
    assert len({caller.front for caller in callers}) == 2
    rows, runs, batches = counts(live, "held")
    answers = together(*(lambda c=caller, i=i: c.ask("held", i) for i, caller in enumerate(callers)))
    assert answers == [1, 2, 3, 4], "everybody has their own row"
    after = counts(live, "held")
    assert (after[0] - rows, after[1] - runs) == (ROWS, 1)
    assert after[2].get(ROWS, 0) - batches.get(ROWS, 0) == 1


def test_a_step_of_a_pipeline_shares_a_run_with_those_who_ask_its_model(
    live: LiveGateway, callers: list[Caller]
) -> None:
    rows, runs, batches = counts(live, "held")
    one, two, three, four = callers
    answers = together(
        lambda: one.ask("steps", 1),
        lambda: two.ask("held", 2),
        lambda: three.ask("steps", 3),
        lambda: four.ask("held", 4),
    )
    assert answers == [12, 3, 14, 5]
    after = counts(live, "held")
    assert (after[0] - rows, after[1] - runs) == (ROWS, 1), "two came through the pipeline and two did not"
    assert after[2].get(ROWS, 0) - batches.get(ROWS, 0) == 1


def proportional_bytes(pid: str) -> int:
    """A process's memory, of which pages that it shares count in part (PSS)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1]) * 1024


def family(pid: str) -> Iterator[str]:
    """A process and all that come from it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from family(child)


@pytest.mark.slow
def test_a_deployed_models_weights_are_in_memory_once_however_many_listen(tmp_path: Path) -> None:
    width = 7_000
    weights_bytes = 4 * width * width
    repository = models.write_repository(tmp_path / "models", {"resident": models.add_one()})
    row = {"name": "x", "datatype": "FP32", "shape": [1, width], "data": [0.5] * width}
    with run_gateway(repository, tmp_path / "state", "--workers", "3") as gateway:
        owner = str(gateway.process.pid)

        def held() -> dict[str, int]:
            return {pid: proportional_bytes(pid) for pid in family(owner)}

        deploy(gateway, "small", models.add_one())
        before = held()
        assert len(before) >= 6, "the owner, three fronts, what forks workers and one of these"
        deploy(gateway, "wide", models.matmul(width, width))
        for _ in range(12):
            with closing(Caller(gateway)) as caller:
                caller.ask("resident", 0)
            assert gateway.call("POST", "/v2/models/wide/infer", {"inputs": [row]})[0] == 200
        after = held()
    grown = sum(after.values()) - sum(before.values())
    print(f"{weights_bytes >> 20} MiB of weights; all processes together grew by {grown >> 20} MiB")
    assert weights_bytes < grown < 1.3 * weights_bytes
    assert max(after[pid] - size for pid, size in before.items() if pid in after) < weights_bytes / 4
    assert max(size for pid, size in after.items() if pid not in before) > weights_bytes, "the worker has them"
