"""A new version gets 5 % of the users, then all of them; the one after that is bad and is taken back by itself.

Starts a gateway of its own, with a database that is gone afterwards. The model guesses which customers will leave.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from inferway import Inferway

USERS: Final = [f"user-{i}" for i in range(400)]
PLANS: Final = ("free", "home", "office", "campus")
PATIENCE_S: Final = 60
Answers = dict[str, str | None]
"""User to the version that answered."""


def churn(weight: float, plans: int) -> onnx.ModelProto:
    """Who leaves: sigmoid(weight * months + what is known of the plan), with a table of so many plans."""
    table = np.array([1.5, 0.5, -0.5, -1.0], np.float32)[:plans]
    nodes = [
        helper.make_node("Gather", ["table", "plan"], ["of_plan"]),
        helper.make_node("Mul", ["months", "weight"], ["of_time"]),
        helper.make_node("Add", ["of_time", "of_plan"], ["score"]),
        helper.make_node("Sigmoid", ["score"], ["leaves"]),
    ]
    graph = helper.make_graph(
        nodes,
        "churn",
        [
            helper.make_tensor_value_info("months", TensorProto.FLOAT, ["customers", 1]),
            helper.make_tensor_value_info("plan", TensorProto.INT64, ["customers", 1]),
        ],
        [helper.make_tensor_value_info("leaves", TensorProto.FLOAT, ["customers", 1])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array(weight, np.float32), "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@contextmanager
def gateway(state: Path) -> Iterator[Inferway]:
    """A client of a new gateway that has no models yet."""
    inferway = (sys.executable, "-m", "inferway_gateway")
    create = ("keys", "create", "--name", "canary", "--scopes", "admin", "--quiet", "--state-dir", str(state))
    key = subprocess.run([*inferway, *create], check=True, capture_output=True, text=True).stdout.strip()
    log = state / "gateway.log"
    with log.open("wb") as file:
        serve = ("serve", "--port", "0", "--state-dir", str(state))
        process = subprocess.Popen([*inferway, *serve], stdout=file, stderr=file, start_new_session=True)
    try:
        while not (found := re.search(r"Inferway listens on ([^\s\"]+)", log.read_text())):
            if process.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(0.02)
        with Inferway(found[1], api_key=key) as client:
            client.health.wait_until_ready(timeout=PATIENCE_S)
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=PATIENCE_S)


def ask(client: Inferway, user: str) -> str | None:
    """Ask about one user's customer; returns the version that answered."""
    number = int(user.removeprefix("user-"))
    customer = {"months": np.array([[number % 36]], np.float32), "plan": np.array([[number % len(PLANS)]])}
    return client.infer("churn", customer, headers={"X-User": user}).model_version


def ask_for_all(client: Inferway) -> Answers:
    return {user: ask(client, user) for user in USERS}


def shares(answers: Answers) -> str:
    counts = Counter(answers.values())
    return ", ".join(f"version {v} answers {n / len(answers):.1%}" for v, n in sorted(counts.items(), key=str))


def main() -> None:
    with TemporaryDirectory(prefix="inferway-") as folder, gateway(Path(folder)) as client:
        models = client.models
        guard = {"window_s": 5, "min_requests": 20, "max_error_rate": 0.05}

        print("1. Deploy a model")
        models.deploy(churn(-0.05, 4), name="churn", progress=False)
        print(f"   All users: {shares(ask_for_all(client))}.")

        print("\n2. Deploy a better one, for 5 % of the users")
        second = models.deploy(churn(-0.06, 4), name="churn", alias=None, progress=False)
        models.set_alias("churn", "stable", {1: 95, second.version: 5}, sticky="header:X-User")
        few = ask_for_all(client)
        again = ask_for_all(client)
        print(f"   All users: {shares(few)}.")
        print(f"   Each sees the same version again: {few == again}.")

        models.set_alias("churn", "stable", {1: 75, second.version: 25}, sticky="header:X-User")
        more = ask_for_all(client)
        stay = all(more[user] == "2" for user in USERS if few[user] == "2")
        print(f"   At 25 %: {shares(more)}.")
        print(f"   Who had version 2 still has it: {stay}.")

        print("\n3. It does well: for everybody")
        models.set_alias("churn", "stable", second.version)
        print(f"   All users: {shares(ask_for_all(client))}.")

        print("\n4. Deploy one that nobody tried with the plan 'campus'")
        third = models.deploy(churn(-0.07, 3), name="churn", alias=None, progress=False)
        models.set_alias("churn", "stable", {2: 80, third.version: 20}, sticky="header:X-User", fallback=2, guard=guard)
        started = time.monotonic()
        asked = 0
        while models.alias("churn", "stable").weights[str(third.version)] > 0:
            if time.monotonic() - started > PATIENCE_S:
                sys.exit("it was not taken back")
            for user in USERS[asked % 400 : asked % 400 + 100]:
                ask(client, user)  # raises where a user is given an error
            asked += 100
        traffic = models.alias("churn", "stable").traffic[str(third.version)]
        print(
            f"   Version 3 failed {traffic.errors} of its {traffic.requests} requests; "
            f"version 2 answered {traffic.fallbacks} of these in its place."
        )
        print(f"   All users: {shares(ask_for_all(client))}.")

        print("\n5. What happened, youngest first")
        for event in models.events("churn"):
            weights = event.detail.get("spec", {}).get("weights", "")
            print(f"   {event.at:%H:%M:%S} {event.kind:22} by {event.by:12} {weights or ''}".rstrip())
            if event.kind == "auto_rolled_back":
                print(textwrap.indent(textwrap.fill(event.detail["text"], 84), 12 * " "))


if __name__ == "__main__":
    main()
