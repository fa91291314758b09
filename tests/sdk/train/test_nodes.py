"""Three machines, as network namespaces of this one: a training over them, and one of them that dies in the middle.

Each has an address of its own on a bridge that nothing else is connected to; no packet leaves it. Ray runs on each as
on a machine. Where namespaces cannot be made (not root, no iproute2, a container without the capability), the tests
are skipped and say why.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.torch, pytest.mark.slow, pytest.mark.xdist_group("ray")]
pytest.importorskip("ray")

TESTS: Final = Path(__file__).resolve().parents[2]
RAY: Final = Path(sys.executable).with_name("ray")
SUBNET: Final = "10.213.77"
LIMIT_S: Final = 150
STARTED: Final = "Ray runtime started."

# Runs on the first machine. Says a line for each thing that happens, and waits for an answer where it says "running".
DRIVER: Final = """
import json, logging, sys, time
from dataclasses import replace

import numpy as np
import ray

from inferway.train import parameter_server, ray_session
from training import alone, digits_job


def say(**what):
    print(json.dumps(what), flush=True)


class Processes(logging.Handler):
    def emit(self, record):
        if "is process" in record.msg:
            say(process=record.args[1])


log = logging.getLogger("inferway.train.parameter_server")
log.setLevel(logging.INFO)
log.addHandler(Processes())


def train(job):
    return parameter_server.fit(job, mode="sync", servers=1, workers=2, resources_timeout_s=60)


asked = False


def in_the_middle(progress):
    global asked
    if progress.epoch == 2 and not asked:
        asked = True
        say(running=progress.step)
        assert sys.stdin.readline() == "go on\\n"


job = digits_job(epochs=4)
with ray_session.connect(sys.argv[1]):
    # The other machines come when they come.
    until = time.monotonic() + 60
    while (nodes := sum(node["Alive"] for node in ray.nodes())) < 3 and time.monotonic() < until:
        time.sleep(0.2)
    say(nodes=nodes)
    undisturbed = train(job)
    say(undisturbed=float(np.abs(undisturbed.parameters - alone(job)).max()))
    disturbed = train(replace(job, on_progress=in_the_middle))
    say(
        same=disturbed.parameters.tobytes() == undisturbed.parameters.tobytes(),
        restarts=disturbed.facts["restarts"],
        replayed=disturbed.facts["replayed_steps"],
    )
"""


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


class Machines:
    """Namespaces on a bridge, and what runs in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tag = f"iw{os.getpid()}"
        self._made: list[str] = []
        self._started: list[subprocess.Popen[str]] = []
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "HOME": str(folder),
            "PYTHONPATH": str(TESTS),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            # A machine counts as dead after 5 s without a sign of life, instead of after 20.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "5",
        }

    def connect(self, count: int) -> None:
        """Make so many machines; the switch between them is a namespace as well."""
        switch = self._add("switch")
        ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge0", "up")
        for index in range(count):
            name = self._add(str(index))
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{index}", "netns", switch)
            ip("-n", switch, "link", "set", f"port{index}", "master", "bridge0", "up")
            ip("-n", name, "addr", "add", f"{self.address(index)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            # Ray looks up its own address by a route to elsewhere; there is none there to answer.
            ip("-n", name, "route", "add", "default", "dev", "eth0")

    def _add(self, name: str) -> str:
        full = f"{self._tag}-{name}"
        ip("netns", "add", full)
        self._made.append(full)
        return full

    def address(self, index: int) -> str:
        return f"{SUBNET}.{index + 1}"

    def start(self, index: int, command: list[str], **given: Any) -> subprocess.Popen[str]:
        inside = ["ip", "netns", "exec", f"{self._tag}-{index}", *command]
        return subprocess.Popen(inside, env=self.environment, cwd=self.folder, text=True, **given)

    def start_ray(self, index: int) -> None:
        """Start Ray on a machine, the first one leads, and come back when it runs.

        One after the other: where the machines share a folder for sessions, as here, of two that start at the same
        time one does not see itself join.
        """
        head = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={self.folder / 'ray'}"]
        role = [f"--address={self.address(0)}:6379"] if index else head
        path = self.folder / f"ray-{index}.log"
        started = path.read_text().count(STARTED) if path.exists() else 0
        with path.open("a") as log:
            ray = self.start(
                index,
                [str(RAY), "start", "--block", "--disable-usage-stats", f"--node-ip-address={self.address(index)}",
                 "--num-cpus=1", "--object-store-memory=100000000", *role],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._started.append(ray)
        until = time.monotonic() + 60
        while path.read_text().count(STARTED) == started:
            assert ray.poll() is None, "Ray ended"
            assert time.monotonic() < until, "Ray did not start"
            time.sleep(0.05)

    def processes(self, index: int | str) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", f"{self._tag}-{index}").split()]

    def kill(self, index: int | str) -> int:
        """SIGKILL to every process of a machine; gives to how many."""
        count = 0
        until = time.monotonic() + 20
        while pids := self.processes(index):
            assert time.monotonic() < until, f"{len(pids)} processes of machine {index} do not end"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    count += 1
        return count

    def close(self) -> None:
        for name in reversed(self._made):
            self.kill(name.removeprefix(f"{self._tag}-"))
            ip("netns", "del", name)
        for process in self._started:
            process.wait(timeout=20)

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log")))


@pytest.fixture
def machines() -> Iterator[Machines]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip (package iproute2)")
    # Not pytest's folder: the path of a socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="iw-"))
    machines = Machines(folder)
    try:
        try:
            machines.connect(3)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield machines
    finally:
        machines.close()
        shutil.rmtree(folder, ignore_errors=True)


class Said:
    """What the driver says, one line after the other."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.processes: list[int] = []

    def next(self, key: str) -> dict[str, Any]:
        for line in self._stream:
            if not line.startswith("{"):  # Ray's own, of a machine that is gone
                continue
            said: dict[str, Any] = json.loads(line)
            if key in said:
                return said
            assert "process" in said, said
            self.processes.append(said["process"])
        raise AssertionError(f"the driver ended before it said '{key}'")


def test_a_machine_that_dies_in_the_middle_of_a_training_changes_nothing(machines: Machines) -> None:
    try:
        for index in range(3):
            machines.start_ray(index)
        train_and_lose_one(machines)
    except AssertionError as error:
        error.add_note(machines.logs())
        raise


def train_and_lose_one(machines: Machines) -> None:
    with (machines.folder / "driver.log").open("w") as log:
        driver = machines.start(
            0,
            ["timeout", "--signal=KILL", str(LIMIT_S), sys.executable, "-c", DRIVER, f"{machines.address(0)}:6379"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert driver.stdin is not None
    assert driver.stdout is not None
    said = Said(driver.stdout)
    try:
        assert said.next("nodes")["nodes"] == 3
        assert said.next("undisturbed")["undisturbed"] < 1e-5
        # A server and two workers, each on a machine of its own.
        assert len(said.processes) == 3
        said.next("running")
        again = said.processes[3:]
        of_machines = [set(machines.processes(index)) for index in range(3)]
        assert sorted(len(pids & set(again)) for pids in of_machines) == [1, 1, 1]
        assert machines.kill(2) > 0
        machines.start_ray(2)
        print("go on", file=driver.stdin, flush=True)
        ended = said.next("same")
        assert ended["same"]
        assert ended["restarts"] == 1
        assert driver.wait(timeout=30) == 0
    finally:
        driver.kill()
        driver.communicate()
