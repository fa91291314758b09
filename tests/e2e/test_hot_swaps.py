"""Versions that change places while requests come at a steady rate (bar R18): none fails, none gets another's answer.

Every request is held against the history of the swaps: the version that answered has to have been the alias's at some
moment between the request and its answer. ``INFERWAY_TEST_FULL=1`` makes 200 swaps at 300 requests a second.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import models
from deploying import deploy, infer
from live import LiveGateway, run_gateway

FULL = bool(os.environ.get("INFERWAY_TEST_FULL"))
SWAPS = 200 if FULL else 40
RATE = 300 if FULL else 100
CALLERS = 10
EVERY_S = 0.1
"""From one swap to the next, at the least."""
DEPLOY_EVERY = 10
"""Of so many swaps one is the deployment of a version that was not there before."""
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [0.0] * 16}]})


@dataclass(frozen=True)
class Asked:
    """A request: when it began and ended, and which version answered with which number."""

    began: float
    ended: float
    status: int
    version: str
    value: float | None


@dataclass(frozen=True)
class Swapped:
    """A change of the alias: when it was asked for and when it was acknowledged."""

    began: float
    ended: float
    version: str


class Steady(threading.Thread):
    """Asks at moments that were set before, whatever the answers take. A moment that has passed is caught up with."""

    def __init__(self, gateway: LiveGateway, offset_s: float, stop: threading.Event) -> None:
        super().__init__()
        self._connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
        self._headers = {"Authorization": f"Bearer {gateway.admin_key}"}
        self._offset_s = offset_s
        self._stop_event = stop
        self.asked: list[Asked] = []
        self.error: Exception | None = None

    def run(self) -> None:
        due = time.monotonic() + self._offset_s
        try:
            while not self._stop_event.wait(max(due - time.monotonic(), 0)):
                due += CALLERS / RATE
                self.asked.append(self._ask())
        except Exception as error:
            self.error = error
        finally:
            self._connection.close()

    def _ask(self) -> Asked:
        began = time.monotonic()
        self._connection.request("POST", "/v2/models/swapped/infer", BODY, self._headers)
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        value = answer["outputs"][0]["data"][0] if response.status == 200 else None
        version = response.getheader("Inferway-Model-Version") or ""
        return Asked(began, time.monotonic(), response.status, version, value)


def possible(asked: Asked, history: list[Swapped]) -> set[str]:
    """Versions that the alias may have had between the request and its answer."""
    found = {swap.version for swap in history if swap.began < asked.ended and swap.ended > asked.began}
    before = [swap.version for swap in history if swap.ended <= asked.began]
    return found | set(before[-1:])


@pytest.mark.slow
def test_swaps_under_a_steady_load_lose_no_request_and_mix_no_versions(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"resident": models.add_one()})
    environment = {"INFERWAY_TRIAL_BUDGET_S": "0", "INFERWAY_MEASURE_BUDGET_S": "0.05"}
    history: list[Swapped] = []
    with run_gateway(repository, tmp_path / "state", environment=environment) as gateway:
        newest = 0

        def deploy_another() -> str:
            nonlocal newest
            newest += 1
            deploy(gateway, "swapped", models.add_one(increment=float(newest)))
            return str(newest)

        def move(version: str) -> str:
            path = "/api/v1/models/swapped/aliases/stable"
            status, answer, _ = gateway.call("PUT", path, {"version": int(version)})
            assert status == 200, answer
            return version

        for _ in range(2):
            began = time.monotonic()
            version = deploy_another()
            history.append(Swapped(began, time.monotonic(), version))
        stop = threading.Event()
        callers = [Steady(gateway, number / RATE, stop) for number in range(CALLERS)]
        started = time.monotonic()
        for caller in callers:
            caller.start()
        try:
            for swap in range(1, SWAPS + 1):
                began = time.monotonic()
                others = [str(v) for v in (newest, newest - 1) if str(v) != history[-1].version]
                version = deploy_another() if swap % DEPLOY_EVERY == 0 else move(others[0])
                history.append(Swapped(began, time.monotonic(), version))
                assert infer(gateway, "swapped")[2] == version, "whoever asks after it was acknowledged gets it"
                stop.wait(max(began + EVERY_S - time.monotonic(), 0))
        finally:
            stop.set()
            for caller in callers:
                caller.join(60)
        took_s = time.monotonic() - started
    asked = [one for caller in callers for one in caller.asked]
    print(f"{SWAPS} swaps in {took_s:.1f} s, {len(asked)} requests, {len(asked) / took_s:.0f} a second")
    assert [caller.error for caller in callers if caller.error is not None] == []
    assert [one for one in asked if one.status != 200] == []
    assert [one for one in asked if one.value != float(one.version)] == [], "a version gives its own answers"
    assert [one for one in asked if one.version not in possible(one, history)] == []
    assert len({one.version for one in asked}) >= SWAPS // DEPLOY_EVERY
    assert len(asked) > RATE * took_s / 4, "the load came"
