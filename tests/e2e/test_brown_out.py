"""Servers elsewhere that fail or hang for a while, with real sockets between all: callers, gateway, servers.

Callers that try again, behind a gateway that tries again, must not make it worse: at most 1.2 calls of the servers for
each request (bar R13). ``INFERWAY_TEST_FULL=1`` has it last thirty seconds with 32 callers, in every way to fail.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import inferway
import models
from inferway import Inferway, RetryPolicy
from live import run_gateway
from scripted import SIMPLE_METADATA, Answer, ScriptedServer, Seen, as_error, as_json, as_outputs

FULL = bool(os.environ.get("INFERWAY_TEST_FULL"))
BROWN_OUT_S = 30.0 if FULL else 3.0
CALLERS = 32 if FULL else 8
RECOVERY_S = 10.0
X = {"x": np.zeros((1, 2), np.float32)}

WAYS: dict[str, Callable[[int, int], str]] = {
    "all-fail": lambda endpoint, number: "fail",
    "half-fail": lambda endpoint, number: "fail" if number % 2 else "",
    "all-hang": lambda endpoint, number: "hang",
    "one-hangs": lambda endpoint, number: "" if endpoint else "hang",
}
"""What an endpoint does with its so manieth call while the brown-out lasts."""


class BrownOut:
    """Two servers that answer, and how they do not while it is on."""

    def __init__(self, way: Callable[[int, int], str]) -> None:
        self.way = way
        self.on = False
        self.calls = 0
        self._lock = threading.Lock()

    def endpoint(self, index: int) -> Callable[[Seen], Answer]:
        def answer(seen: Seen) -> Answer:
            if seen.method == "GET":
                return as_json({"extensions": ["binary_tensor_data"], **SIMPLE_METADATA})
            with self._lock:
                self.calls += 1
                does = self.way(index, self.calls) if self.on else ""
            if does == "hang":
                return Answer(hang=True)
            if does == "fail":
                return as_error(503, "queue_full", "brown-out")
            data = seen.body[int(seen.headers["inference-header-content-length"]) :]
            return as_outputs(("y", "FP32", seen.json["inputs"][0]["shape"], data))

        return answer


@pytest.fixture
def servers() -> Iterator[list[ScriptedServer]]:
    found = [ScriptedServer(), ScriptedServer()]
    yield found
    for server in found:
        server.stop()


def call(clients: list[Inferway], enough: Callable[[int, int], bool]) -> tuple[int, int]:
    """Have all call until it is enough of requests that were answered and that were not; nobody is left calling."""
    answered = failed = 0
    lock = threading.Lock()

    def one(client: Inferway) -> None:
        nonlocal answered, failed
        while not enough(answered, failed):
            try:
                client.infer("mine", X, timeout=1.0)
            except inferway.InferwayError:
                with lock:
                    failed += 1
            else:
                with lock:
                    answered += 1

    with ThreadPoolExecutor(len(clients)) as pool:
        for done in [pool.submit(one, client) for client in clients]:
            done.result()
    return answered, failed


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS if FULL else ["all-hang", "one-hangs"])
def test_a_brown_out_is_not_made_worse_and_ends_when_it_ends(
    servers: list[ScriptedServer], tmp_path: Path, way: str
) -> None:
    brown_out = BrownOut(WAYS[way])
    for index, server in enumerate(servers):
        server.otherwise = brown_out.endpoint(index)
    endpoints = ", ".join(f'{{ url = "{server.url}" }}' for server in servers)
    (tmp_path / "upstreams.toml").write_text(
        f'[[upstreams]]\nname = "up"\nprotocol = "oip"\nendpoints = [{endpoints}]\n'
    )
    package = tmp_path / "models" / "mine" / "1"
    package.mkdir(parents=True)
    (package / "remote.toml").write_text('upstream = "up"\nmodel = "simple"\n')
    repository = models.write_repository(tmp_path / "models", {})
    with ExitStack() as stack:
        upstreams = str(tmp_path / "upstreams.toml")
        front = stack.enter_context(run_gateway(repository, tmp_path / "state", "--upstreams", upstreams))
        key = front.make_key("infer")
        clients = [
            stack.enter_context(Inferway(front.url, api_key=key, retry=RetryPolicy(attempts=4))) for _ in range(CALLERS)
        ]
        assert call(clients, lambda answered, failed: answered >= 200)[1] == 0
        brown_out.calls, brown_out.on = 0, True
        end = time.monotonic() + BROWN_OUT_S
        answered, failed = call(clients, lambda *_: time.monotonic() > end)
        made, brown_out.on = brown_out.calls, False
        began = time.monotonic()
        call(clients, lambda answered, failed: answered >= 200 or time.monotonic() - began > 2 * RECOVERY_S)
        recovery_s = time.monotonic() - began
    share = made / (answered + failed)
    print(
        f"{way}: {made} calls for {answered + failed} requests, {share:.2f} each, {failed} failed; {recovery_s:.1f} s"
    )
    assert made <= 1.2 * (answered + failed)
    assert failed, "it was no brown-out"
    if way == "one-hangs":
        assert answered > failed, "the other server answers"
    assert recovery_s <= RECOVERY_S
