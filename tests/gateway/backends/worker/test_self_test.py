"""The forbidden acts, tried in confined processes, and in others to show that they can be told apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from inferway_gateway.backends.worker import sandbox
from inferway_gateway.backends.worker.self_test import ACTS, NEEDS

pytestmark = pytest.mark.skipif(bool(sandbox.capabilities().missing), reason="this kernel lacks layers of the sandbox")

ALWAYS_POSSIBLE = {
    "read outside", "write", "socket", "exec", "fork", "signal to parent", "open other model", "env secret",
}  # fmt: skip
"""What any process can do unless it is kept from it; the other acts need privileges or settings."""


def self_test(*options: str) -> dict[str, bool]:
    done = subprocess.run(
        [sys.executable, "-m", "inferway_gateway.backends.worker.self_test", *options],
        capture_output=True,
        timeout=60,
        check=False,
    )
    outcome: dict[str, bool] = json.loads(done.stdout)
    assert done.returncode == (0 if all(outcome.values()) else 1)
    return outcome


def test_every_forbidden_act_is_denied_and_every_need_is_met() -> None:
    outcome = self_test()
    assert set(outcome) == {*ACTS, *NEEDS}
    assert [act for act, well in outcome.items() if not well] == []


def test_without_the_sandbox_the_same_acts_succeed() -> None:
    outcome = self_test("--unconfined")
    expected = set(ACTS) if os.geteuid() == 0 else ALWAYS_POSSIBLE
    assert {act for act in expected if outcome[act]} == set()
    assert all(outcome[need] for need in NEEDS)
