"""What a scrape tells of the processes of deployed models, and of the sandbox that they are in."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import pytest

import models
from deploying import deploy, infer
from inferway_gateway.backends.worker import sandbox
from live import LiveGateway, run_gateway

LIMIT_S = 30.0


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def scrape(gateway: LiveGateway, model: str = "m") -> dict[str, float]:
    """The workers' metrics of one model, by their names without what all have in common; layers by their own."""
    text = gateway.call("GET", "/metrics")[1]
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r'inferway_worker_(\w+)\{(?:layer="(\w+)",)?model="(\w+)",version="1"\} (\S+)', line)
        if match is not None and match[3] == model:
            found[match[2] or match[1]] = float(match[4])
    return found


def incomplete(gateway: LiveGateway) -> float:
    lines = gateway.call("GET", "/metrics")[1].splitlines()
    return float(next(line for line in lines if line.startswith("inferway_sandbox_incomplete ")).split()[1])


def worker(gateway: LiveGateway, model: str) -> int | None:
    """The process of that model's first version, by the title that it gives itself."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if words.startswith(f"inferway worker {model}/1".encode()) and _descends(entry.name, gateway):
                    return int(entry.name)
    return None


def _descends(pid: str, gateway: LiveGateway) -> bool:
    while pid not in ("0", "1"):
        if int(pid) == gateway.process.pid:
            return True
        pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return False


@pytest.mark.slow
def test_crashes_kills_restarts_and_the_breaker_are_told(tmp_path: Path) -> None:
    environment = {"INFERWAY_WORKER_BREAKER_FAILURES": "1"}
    with run_gateway(
        models.write_repository(tmp_path / "models", {"resident": models.add_one()}),
        tmp_path / "state",
        environment=environment,
    ) as g:
        deploy(g, "m", models.add_one())
        deploy(g, "stuck", models.stuck())
        before = scrape(g)
        assert {name: before[name] for name in ("processes", "restarts_total", "crashes_total", "kills_total")} == {
            "processes": 1, "restarts_total": 0, "crashes_total": 0, "kills_total": 0,
        }  # fmt: skip
        assert before["recycled_total"] == before["breaker"] == 0
        assert before["resident_bytes"] > 1 << 20

        size = {"name": "shape", "datatype": "INT64", "shape": [2], "data": [4000, 4000]}
        headers = {"Inferway-Timeout-Ms": "300"}

        def killed() -> bool:
            # On a machine with much other work the time may be over before the run begins, and the next may meet it.
            status, answer, _ = g.call("POST", "/v2/models/stuck/infer", {"inputs": [size]}, headers=headers)
            assert (status, answer["code"]) in (
                (504, "deadline_exceeded"), (503, "model_failing"), (400, "run_too_large"),
            )  # fmt: skip
            return scrape(g, "stuck")["kills_total"] >= 1

        until(killed)
        until(lambda: scrape(g, "stuck")["processes"] == 1)
        assert scrape(g, "stuck")["crashes_total"] == 0, "whoever is killed does not crash"
        assert scrape(g) == {**before, "resident_bytes": scrape(g)["resident_bytes"]}, "the other has its own"

        victim = worker(g, "m")
        assert victim is not None
        os.kill(victim, signal.SIGSEGV)
        until(lambda: scrape(g)["breaker"] == 2)
        until(lambda: scrape(g)["processes"] == 1)
        after = scrape(g)
        assert (after["crashes_total"], after["restarts_total"], after["kills_total"]) == (1, 1, 0)
        status, answer, _ = infer(g, "m")
        assert (status, answer["code"]) == (503, "model_failing")
        # It is tried again by one request once the time has come, which closes it.
        until(lambda: infer(g, "m")[0] == 200)
        assert scrape(g)["breaker"] == 0


@pytest.mark.skipif(bool(sandbox.capabilities().missing), reason="this kernel lacks layers of the sandbox")
def test_a_whole_sandbox_is_told_layer_by_layer(tmp_path: Path) -> None:
    with run_gateway(
        models.write_repository(tmp_path / "models", {"resident": models.add_one()}), tmp_path / "state"
    ) as gateway:
        deploy(gateway, "m", models.add_one())
        assert incomplete(gateway) == 0
        found = scrape(gateway)
        assert {name: found.get(name) for name in ("landlock", "seccomp", "no_new_privs", "rlimits")} == {
            "landlock": 1, "seccomp": 1, "no_new_privs": 1, "rlimits": 1,
        }  # fmt: skip
        assert not [line for line in gateway.log if "not locked in" in line]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter below is for x86-64")
def test_a_kernel_without_landlock_is_warned_of_and_counted_and_models_run(tmp_path: Path) -> None:
    """The gateway starts below a filter that answers Landlock's first call as a kernel does that does not have it."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(
        dedent("""
        import ctypes, struct
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7FFF0000)]
        raw = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
        given = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(raw))
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.prctl(38, 1, 0, 0, 0), libc.prctl(22, 2, ctypes.c_char_p(given), 0, 0)
        assert done == (0, 0), ctypes.get_errno()
        """)
    )
    environment = {"PYTHONPATH": str(tmp_path / "without")}
    with run_gateway(
        models.write_repository(tmp_path / "models", {"resident": models.add_one()}),
        tmp_path / "state",
        environment=environment,
    ) as gateway:
        warnings = [line for line in gateway.log if "workers are not locked in as they should be" in line]
        assert len(warnings) == incomplete(gateway) > 0
        assert any("landlock" in line.lower() for line in warnings)
        deploy(gateway, "m", models.add_one())
        found = scrape(gateway)
        assert (found["landlock"], found["seccomp"]) == (0, 1)
        assert infer(gateway, "m") == (200, 2.0, "1")
