"""What a worker process costs beside a run in the gateway's own: p50, rows a second and CPU, by size of the tensors.

    python tests/bench/bench_isolation.py [--seconds 2.0] [--rounds 5] [--json FILE]

First both ways take turns in one process on one event loop, without HTTP, so that what is reported as a ratio or a
difference saw the same machine; the medians of the rounds are given. CPU is that of the gateway and its workers
together. The model adds one to each of its numbers, so all that is measured is the way there and back. ``respawn`` is
the time from the death of a worker to the moment when runs can begin again.

Then two gateways, one for each way, answer a tiny model over HTTP in turn, with one connection and with many. What a
worker adds to p50 with one connection is held against the project's own figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.backends.worker import SessionLimits, WorkerBackend, WorkerLimits, WorkerSession
from inferway_gateway.core.backend import Artifact, Session
from inferway_gateway.core.batcher import Batcher, InferenceRequest
from inferway_gateway.core.model_config import ModelConfig
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import addsub
from harness.gateway import gateway
from harness.load import Measurement, wrk
from harness.paths import MODELS
from harness.report import Check

from models import add_one

SIZES = {"1 KiB": 1 << 8, "64 KiB": 1 << 14, "16 MiB": 1 << 22}
"""Name to FP32 numbers of one row; an output is as large."""
IN_FLIGHT = 16
RESPAWNS = 20
WANTED_US = 120.0
"""What a worker may add to p50 for small tensors, as the project's specification has it."""
CONNECTIONS = (1, 64)
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Figures:
    """p50_us of calls one after the other; rows a second and CPU µs a row with ``IN_FLIGHT`` at once."""

    p50_us: float
    rows_per_s: float
    cpu_us: float


def cpu_s(pids: list[int]) -> float:
    """Processor seconds of this process and others so far."""
    used = time.process_time()
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / _TICKS
    return used


def pids_of(session: Session) -> list[int]:
    if not isinstance(session, WorkerSession):
        return []
    return [place.process.pid for place in session._places if place.process is not None]


async def measured(batcher: Batcher, session: Session, width: int, seconds: float) -> Figures:
    x = np.ones((1, width), np.float32)

    async def ask() -> None:
        request = InferenceRequest({"x": x}, ("y",), 1, x.nbytes)
        if batcher.run_inline(request) is None:
            await batcher.infer(request)

    times: list[float] = []
    until = time.perf_counter() + seconds / 2
    while time.perf_counter() < until or len(times) < 5:
        begun = time.perf_counter()
        await ask()
        times.append(time.perf_counter() - begun)
    done = 0
    pids = pids_of(session)
    used, begun = cpu_s(pids), time.perf_counter()
    until = begun + seconds / 2

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < until:
            await ask()
            done += 1
            if done % 64 == 0:
                await asyncio.sleep(0)

    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    lasted = time.perf_counter() - begun
    return Figures(statistics.median(times) * 1e6, done / lasted, (cpu_s(pids) - used) / done * 1e6)


def middle(rounds: list[Figures]) -> Figures:
    return Figures(*(statistics.median(values) for values in zip(*(asdict(r).values() for r in rounds), strict=True)))


async def compare(here: Session, there: Session, width: int, seconds: float, rounds: int) -> tuple[Figures, Figures]:
    async with RunnerPool() as pool:
        both = (here, there)
        batchers = [Batcher(session, ModelConfig(), ModelStats(), pool, run_timeout_s=30.0) for session in both]
        results: tuple[list[Figures], list[Figures]] = ([], [])
        for number in range(rounds + 1):
            for into, batcher, session in zip(results, batchers, both, strict=True):
                figures = await measured(batcher, session, width, seconds / rounds)
                if number:  # the first is for warming up
                    into.append(figures)
        for batcher in batchers:
            await batcher.close()
    return middle(results[0]), middle(results[1])


def respawn_ms(session: WorkerSession) -> list[float]:
    """Milliseconds without a process, ascending."""
    taken = []
    x = np.ones((1, session.signature.inputs[0].shape[1]), np.float32)
    for _ in range(RESPAWNS):
        pid = pids_of(session)[0]
        begun = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        while pids_of(session) in ([], [pid]):
            time.sleep(0.0005)
        session.run({"x": x}, ["y"])
        taken.append((time.perf_counter() - begun) * 1e3)
    return sorted(taken)


def over_http(seconds: float, rounds: int) -> dict[str, Any]:
    """Figures of both ways by the number of connections."""
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        ways = {}
        for isolation in ("inprocess", "worker"):
            repository = MODELS / f"isolation-{isolation}"
            addsub.write_model(repository / "addsub" / "1" / "model.onnx")
            (repository / "addsub" / "inferway.toml").write_text(f'isolation = "{isolation}"\n')
            ways[isolation] = stack.enter_context(gateway(repository, f"Inferway {isolation}"))
        for connections in CONNECTIONS:
            seen: dict[str, list[Measurement]] = {isolation: [] for isolation in ways}
            for number in range(rounds + 1):
                for isolation, ours in ways.items():
                    job = addsub.job("/v2/models/addsub/infer", headers=ours.authorization)
                    measured = wrk(ours.server, job, connections=connections, seconds=max(1.0, seconds / rounds))
                    if number:  # the first is for warming up
                        seen[isolation].append(measured)
            middles = {
                isolation: Figures(
                    statistics.median(one.p50_us for one in those),
                    statistics.median(one.per_s for one in those),
                    statistics.median(one.cpu_us for one in those),
                )
                for isolation, those in seen.items()
            }
            label = f"HTTP x{connections}"
            for isolation, f in middles.items():
                print(f"{label:>8} {isolation:>10} {f.p50_us:>10.1f} {f.rows_per_s:>10.0f} {f.cpu_us:>11.1f}")
            figures[str(connections)] = {isolation: asdict(f) for isolation, f in middles.items()}
    alone = figures[str(CONNECTIONS[0])]
    added_us = alone["worker"]["p50_us"] - alone["inprocess"]["p50_us"]
    print(Check("what a worker adds to p50 over HTTP", added_us, WANTED_US, at_least=False, unit=" µs").text())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each way and size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.ERROR)  # of workers that are killed on purpose
    report: dict[str, Any] = {"cpus": len(os.sched_getaffinity(0)), "sizes": {}}
    limits = WorkerLimits(session=SessionLimits(respawns_per_minute=10_000))
    with tempfile.TemporaryDirectory() as folder, WorkerBackend(limits=limits) as workers:
        print(f"{'tensor':>8} {'':>10} {'p50 µs':>10} {'rows/s':>10} {'CPU µs/row':>11}")
        for name, width in SIZES.items():
            file = Path(folder) / f"{width}.onnx"
            file.write_bytes(add_one(width))
            artifact = Artifact("m", 1, file)
            here, there = OnnxBackend().open(artifact), workers.open(artifact)
            ours, theirs = uvloop.run(compare(here, there, width, options.seconds, options.rounds))
            for label, f in (("in-process", ours), ("worker", theirs)):
                print(f"{name:>8} {label:>10} {f.p50_us:>10.1f} {f.rows_per_s:>10.0f} {f.cpu_us:>11.1f}")
            print(
                f"{'':>8} {'difference':>10} {theirs.p50_us - ours.p50_us:>+10.1f} "
                f"{theirs.rows_per_s / ours.rows_per_s:>9.2f}x {theirs.cpu_us / ours.cpu_us:>10.2f}x"
            )
            report["sizes"][name] = {"inprocess": asdict(ours), "worker": asdict(theirs)}
            if width == min(SIZES.values()):
                taken = respawn_ms(there)
                report["respawn_ms"] = {"p50": statistics.median(taken), "max": taken[-1]}
                longest = f"the longest of {RESPAWNS} {taken[-1]:.1f} ms"
                print(f"{'':>8} {'respawn':>10} p50 {statistics.median(taken):.1f} ms, {longest}")
                footprint = there.footprint()
                if footprint is not None:
                    report["footprint_mib"] = footprint.resident_bytes / 2**20
                    print(f"{'':>8} {'memory':>10} {footprint.resident_bytes / 2**20:.0f} MiB proportional, warm")
            here.close()
            there.close()
    if shutil.which("wrk") is None:
        print("wrk is not installed, so nothing was measured over HTTP")
    else:
        report["http"] = over_http(options.seconds, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
