"""Mutated models through the API that deploys (bar S12): whatever becomes of one, the gateway serves on, and none that
cannot be right becomes ready. Two hundred of them, or as many as ``INFERWAY_TEST_DEPLOYED_MUTANTS`` says.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import models
import mutants
from deploying import begin, infer, watch
from inferway_gateway.backends.worker import sandbox
from live import LiveGateway, run_gateway

COUNT = int(os.environ.get("INFERWAY_TEST_DEPLOYED_MUTANTS", "200"))
AT_ONCE = 4


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveGateway]:
    repository = models.write_repository(tmp_path / "models", {"resident": models.add_one()})
    environment = {"INFERWAY_TRIAL_BUDGET_S": "0", "INFERWAY_MEASURE_BUDGET_S": "0.02", "OMP_NUM_THREADS": "1"}
    with run_gateway(repository, tmp_path / "state", environment=environment) as gateway:
        yield gateway


@pytest.mark.slow
@pytest.mark.skipif(bool(sandbox.capabilities().missing), reason="this kernel lacks layers of the sandbox")
def test_no_mutant_harms_the_gateway_and_no_doomed_one_becomes_ready(live: LiveGateway) -> None:
    chance = random.Random(20261124)
    parents = mutants.parents()
    ways = [mutants.HOW[index % len(mutants.HOW)] for index in range(COUNT)]
    contents = [mutants.mutant(chance.choice(parents), way, chance) for way in ways]

    def attempt(index: int) -> tuple[str, str | None, str]:
        """How it ended, at which step and with which code; a version that is ready is taken away again."""
        name = f"mutant-{index}"
        status, answer = begin(live, name, {"model.onnx": contents[index]})
        assert status == 202, answer
        ended, _ = watch(live, answer)
        # Whoever serves meanwhile answers as ever.
        assert infer(live, "resident") == (200, 2.0, "1")
        if ended["state"] == "succeeded":
            assert live.call("DELETE", f"/api/v1/models/{name}")[0] == 204
            return "succeeded", None, ""
        assert ended["state"] == "failed"
        assert ended["error"]["message"]
        assert live.call("GET", f"/api/v1/models/{name}")[0] == 404
        return "failed", ended["failed_step"], ended["error"]["code"]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        ends = list(pool.map(attempt, range(COUNT)))
    print(f"{COUNT} mutants: {dict(Counter(' '.join(filter(None, end)) for end in ends))}")
    assert live.process.poll() is None
    assert [way for way, end in zip(ways, ends, strict=True) if end[0] == "succeeded" and way in mutants.DOOMED] == []
    codes = {code for _, _, code in ends if code}
    assert codes <= {"model_rejected", "model_load_failed", "worker_crashed", "memory_exceeded", "deadline_exceeded"}
    # All verdicts have to occur, or the test shows nothing.
    assert {"succeeded", "failed"} == {end[0] for end in ends}
    assert "admitted" in {end[1] for end in ends}
    assert "Traceback" not in "".join(live.log)
    assert live.call("GET", "/api/v1/registry/check")[1]["ok"] is True
