"""Aliases over several processes: gateways on one database, and fronts of one gateway."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from inferway import Inferway
from live import LiveGateway, run_gateway

LIMIT_S = 30.0
AGREE_S = 2.0
"""Within which a change on one gateway is followed by all."""
USERS = [f"user-{i}" for i in range(40)]
GOOD = {"x": np.ones((1, 4), np.float32)}
BAD = {"x": -np.ones((1, 4), np.float32)}
GUARD = {"window_s": 6, "min_requests": 20, "max_error_rate": 0.1, "max_p95_ratio": 1000}


def until(done: Callable[[], bool], limit_s: float = LIMIT_S) -> float:
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < limit_s
        time.sleep(0.02)
    return time.monotonic() - began


def deploy(client: Inferway, name: str) -> None:
    """Version 1 adds one, version 2 is the same and fails on negative numbers."""
    client.models.deploy(models.add_one(4), name=name, progress=False)
    client.models.deploy(models.fails_on_negative(4), name=name, alias=None, progress=False)


def versions(client: Inferway, name: str) -> list[str | None]:
    return [client.infer(name, GOOD, headers={"X-User": user}).model_version for user in USERS]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Inferway]]:
    """Clients of two gateways on one state directory."""
    root = tmp_path_factory.mktemp("two")
    repository = models.write_repository(root / "models", {"resident": models.add_one()})
    with ExitStack() as stack:
        gateways: list[LiveGateway] = [stack.enter_context(run_gateway(repository, root / "state")) for _ in range(2)]
        key = gateways[0].admin_key
        yield [stack.enter_context(Inferway(gateway.url, api_key=key)) for gateway in gateways]


def test_a_change_of_an_alias_is_followed_by_every_gateway_and_all_choose_alike(two: list[Inferway]) -> None:
    here, there = two
    deploy(here, "shared")
    until(lambda: "shared" in there.models.list(), AGREE_S)
    here.models.set_alias("shared", "stable", {1: 50, 2: 50}, sticky="header:X-User")
    expected = versions(here, "shared")
    assert set(expected) == {"1", "2"}
    until(lambda: versions(there, "shared") == expected, AGREE_S + 2)
    there.models.set_alias("shared", "stable", 2)
    until(lambda: set(versions(here, "shared")) == {"2"}, AGREE_S + 2)
    there.models.delete_alias("shared", "stable")
    there.models.set_alias("shared", "stable", 1)
    until(lambda: set(versions(here, "shared")) == {"1"}, AGREE_S + 2)


def test_a_bad_canary_is_taken_back_once_whoever_sees_it(two: list[Inferway]) -> None:
    here, there = two
    deploy(here, "guarded")
    here.models.set_alias("guarded", "stable", {1: 50, 2: 50}, fallback=[1], guard=GUARD)
    until(lambda: "guarded" in there.models.list(), AGREE_S)
    until(lambda: set(versions(there, "guarded")) == {"1", "2"}, AGREE_S + 2)

    def taken_back() -> bool:
        for client in two:
            for inputs in (GOOD, BAD):
                answers = [client.infer("guarded", inputs) for _ in range(4)]
                assert inputs is GOOD or {answer.model_version for answer in answers} == {"1"}
        return here.models.alias("guarded", "stable").weights["2"] == 0

    until(taken_back)
    until(lambda: set(versions(there, "guarded")) == {"1"}, AGREE_S + 2)
    done = [event for event in there.models.events("guarded") if event.kind == "auto_rolled_back"]
    assert [(event.by, event.version, event.alias) for event in done] == [("gateway", 2, "stable")]
    detail = done[0].detail
    assert detail["reason"] == "error_rate"
    assert detail["error_rate"] - detail["baseline_error_rate"] > GUARD["max_error_rate"]
    assert f"failed {detail['errors']} of {detail['requests']} requests" in detail["text"]
    back = here.models.rollback("guarded")
    assert back.weights == {"1": 50, "2": 50}


@pytest.mark.slow
def test_a_slow_canary_is_taken_back(two: list[Inferway]) -> None:
    """By latency alone: nothing fails, and errors are not even bounded."""
    here, there = two
    here.models.deploy(models.late(1, 4), name="steady", progress=False)
    here.models.deploy(models.late(20_000, 4), name="steady", alias=None, progress=False)
    slow = {"window_s": 6, "min_requests": 20, "max_error_rate": 1, "max_p95_ratio": 3}
    here.models.set_alias("steady", "stable", {1: 70, 2: 30}, guard=slow)
    until(lambda: "steady" in there.models.list(), AGREE_S)

    def taken_back() -> bool:
        for client in two:
            for _ in range(4):
                client.infer("steady", GOOD)
        return here.models.alias("steady", "stable").weights["2"] == 0

    until(taken_back)
    until(lambda: set(versions(there, "steady")) == {"1"}, AGREE_S + 2)
    done = [event for event in there.models.events("steady") if event.kind == "auto_rolled_back"]
    assert [(event.by, event.version, event.detail["reason"]) for event in done] == [("gateway", 2, "p95")]
    detail = done[0].detail
    assert detail["errors"] == 0
    assert detail["p95_ms"] > 3 * detail["baseline_p95_ms"]
    assert f"took {detail['p95_ms']:g} ms at the 95th percentile" in detail["text"]


def test_a_shadow_that_was_deployed_is_compared(two: list[Inferway]) -> None:
    here, _ = two
    deploy(here, "copied")
    here.models.set_alias("copied", "stable", 1, shadow={"version": 2, "rtol": 0, "atol": 0.5})
    for _ in range(10):
        assert here.infer("copied", GOOD).model_version == "1"
    until(lambda: here.models.alias("copied", "stable").traffic["2"].compared == 10)
    traffic = here.models.alias("copied", "stable").traffic["2"]
    assert (traffic.differed, traffic.largest_difference) == (10, 1.0)


def test_an_alias_that_names_a_version_keeps_it_from_being_deleted(two: list[Inferway]) -> None:
    here, _ = two
    deploy(here, "named")
    for target, options in (({1: 99, 2: 1}, {}), (1, {"fallback": [2]}), (1, {"shadow": 2})):
        given: Any = options
        here.models.set_alias("named", "stable", target, **given)
        with pytest.raises(Exception, match="no alias names"):
            here.models.delete("named", 2)
    here.models.set_alias("named", "stable", 1)
    here.models.delete("named", 2)
    with pytest.raises(Exception, match="a version that it named is deleted") as caught:
        here.models.rollback("named")
    assert getattr(caught.value, "status_code", None) == 409


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inferway]:
    """A client of one gateway that listens in two processes."""
    root: Path = tmp_path_factory.mktemp("fronts")
    repository = models.write_repository(root / "models", {"resident": models.add_one()})
    with (
        run_gateway(repository, root / "state", "--workers", "2") as gateway,
        Inferway(gateway.url, api_key=gateway.admin_key) as client,
    ):
        yield client


def test_fronts_share_out_fall_back_and_are_guarded(fronts: Inferway) -> None:
    deploy(fronts, "behind")
    fronts.models.set_alias("behind", "stable", {1: 50, 2: 50}, sticky="header:X-User")

    def anew() -> Inferway:  # a connection of its own, which any of the fronts may take
        return fronts.with_options()

    until(lambda: set(versions(anew(), "behind")) == {"1", "2"}, AGREE_S + 2)
    expected = versions(anew(), "behind")
    assert all(versions(anew(), "behind") == expected for _ in range(4))
    fronts.models.set_alias("behind", "stable", {1: 50, 2: 50}, fallback=[1], guard=GUARD)

    def taken_back() -> bool:
        counts = Counter(anew().infer("behind", BAD if i % 2 else GOOD).model_version for i in range(8))
        assert set(counts) <= {"1", "2"}
        return fronts.models.alias("behind", "stable").weights["2"] == 0

    until(taken_back)
    traffic = fronts.models.alias("behind", "stable").traffic["2"]
    assert traffic.errors == traffic.fallbacks > 0


@pytest.mark.slow
def test_what_fronts_time_is_judged_together(fronts: Inferway) -> None:
    fronts.models.deploy(models.late(1, 4), name="timed", progress=False)
    fronts.models.deploy(models.late(20_000, 4), name="timed", alias=None, progress=False)
    slow = {"window_s": 6, "min_requests": 20, "max_error_rate": 1, "max_p95_ratio": 3}
    fronts.models.set_alias("timed", "stable", {1: 70, 2: 30}, guard=slow)

    def taken_back() -> bool:
        client = fronts.with_options()  # a connection of its own, which either of the fronts may take
        for _ in range(8):
            client.infer("timed", GOOD)
        return fronts.models.alias("timed", "stable").weights["2"] == 0

    until(taken_back)
    done = [event.detail for event in fronts.models.events("timed") if event.kind == "auto_rolled_back"]
    assert [(detail["reason"], detail["errors"]) for detail in done] == [("p95", 0)]


STEP = '[[steps]]\nname = "s"\nmodel = "stepped"\ninputs = { x = "x" }\n'


@pytest.mark.parametrize("processes", ["one process", "fronts"])
def test_a_pipelines_step_is_as_sticky_guarded_and_answered_for_as_its_alias(
    processes: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    client: Inferway = request.getfixturevalue("two")[0] if processes == "one process" else fronts_of(request)
    client.models.deploy(models.add_one(4), name="stepped", progress=False)
    client.models.deploy(models.fails_on_negative(4), name="stepped", alias=None, progress=False)
    (tmp_path / "pipeline.toml").write_text(STEP)
    client.models.deploy(tmp_path, name="outer", progress=False)
    client.models.set_alias("stepped", "stable", {1: 50, 2: 50}, sticky="header:X-User")

    def sums(target: str) -> list[float]:
        return [float(client.infer(target, GOOD, headers={"X-User": user})["y"][0, 0]) for user in USERS]

    direct = sums("stepped")
    assert len(set(direct)) == 2
    until(lambda: sums("outer") == direct, AGREE_S + 2)
    client.models.set_alias("stepped", "stable", {1: 50, 2: 50}, fallback=[1], guard=GUARD)

    def taken_back() -> bool:
        for inputs in (GOOD, BAD, GOOD, BAD):
            client.infer("outer", inputs)  # raises where a caller is given an error
        return client.models.alias("stepped", "stable").weights["2"] == 0

    until(taken_back)
    traffic = client.models.alias("stepped", "stable").traffic["2"]
    assert traffic.errors == traffic.fallbacks > 0


def fronts_of(request: pytest.FixtureRequest) -> Inferway:
    client: Inferway = request.getfixturevalue("fronts")
    return client


def descendants(pid: int) -> set[int]:
    """Processes that a process started, and those that these did."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def test_a_canary_whose_processes_die_is_answered_for_and_taken_back(tmp_path: Path) -> None:
    repository = models.write_repository(tmp_path / "models", {"resident": models.add_one()})
    with ExitStack() as stack:
        gateway = stack.enter_context(run_gateway(repository, tmp_path / "state"))
        client = stack.enter_context(Inferway(gateway.url, api_key=gateway.admin_key))
        client.models.deploy(models.add_one(4), name="mortal", progress=False)
        others = descendants(gateway.process.pid)
        client.models.deploy(models.add_one(4, 1.5), name="mortal", alias=None, progress=False)
        assert descendants(gateway.process.pid) - others, "a deployed version has a process of its own"
        client.models.set_alias("mortal", "stable", {1: 50, 2: 50}, fallback=[1])

        def taken_back() -> bool:
            for pid in descendants(gateway.process.pid) - others:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for _ in range(4):
                client.infer("mortal", GOOD)  # raises where a caller is given an error
            return client.models.alias("mortal", "stable").weights["2"] == 0

        until(taken_back)
        told = [event for event in client.models.events("mortal") if event.kind == "auto_rolled_back"]
        assert [(event.version, event.detail["reason"]) for event in told] == [(2, "breaker_open")]
        assert {client.infer("mortal", GOOD).model_version for _ in range(8)} == {"1"}
