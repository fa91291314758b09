"""What the batcher costs: CPU µs a request, inline and queued, against bare ``session.run``; how busy runners are.

    python tests/bench/bench_batcher.py [--seconds 1.0]

How well runners are kept busy is measured with runs of some milliseconds while requests wait: runs a second, as a share
of what threads reach that do nothing but run. Once with an event loop that has little to do, and once with one that
decodes JSON without a pause, which is where the interpreter's switch interval shows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray

from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.core.backend import Artifact, Session
from inferway_gateway.core.batcher import Batcher, InferenceRequest
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig, SessionOptions
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.tensors import Arrays

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import add_sub, matmul

IN_FLIGHT = 64
PAUSE_EVERY = 100
"""Decodings, some 10 µs each, between two looks at the event loop."""


def opened(folder: Path, name: str, proto: bytes, config: ModelConfig) -> Session:
    file = folder / f"{name}.onnx"
    file.write_bytes(proto)
    return OnnxBackend(("CPUExecutionProvider",), cpus=os.cpu_count() or 1).open(Artifact(name, 1, file, config))


def cpu_us(work: Callable[[], object], seconds: float) -> float:
    """CPU µs of one call, the best of five rounds."""
    best = float("inf")
    for _ in range(5):
        calls, begun, limit = 0, time.process_time(), time.perf_counter() + seconds / 5
        while time.perf_counter() < limit:
            for _ in range(100):
                work()
            calls += 100
        best = min(best, (time.process_time() - begun) / calls * 1e6)
    return best


async def queued_us(batcher: Batcher, request: InferenceRequest, seconds: float) -> tuple[float, float]:
    """CPU µs of one request with ``IN_FLIGHT`` in flight, and rows a run."""
    rows: list[int] = []
    limit = time.perf_counter() + seconds

    async def caller() -> None:
        while time.perf_counter() < limit:
            rows.append((await batcher.infer(request)).batch_rows)

    begun = time.process_time()
    async with asyncio.TaskGroup() as callers:
        for _ in range(IN_FLIGHT):
            callers.create_task(caller())
    return (time.process_time() - begun) / len(rows) * 1e6, statistics.fmean(rows)


def back_to_back(session: Session, inputs: Arrays, threads: int, seconds: float, busy: bool) -> float:
    """Runs a second that so many threads reach which do nothing else: what a batcher cannot exceed."""
    counts = [0] * threads
    begin = threading.Barrier(threads + 1)
    limit = 0.0

    def work(number: int) -> None:
        begin.wait()
        while time.perf_counter() < limit:
            session.run(inputs, ("y",))
            counts[number] += 1

    members = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for member in members:
        member.start()
    limit = time.perf_counter() + seconds
    begin.wait()
    body = json.dumps({"data": list(range(200))})
    while busy and time.perf_counter() < limit:
        for _ in range(PAUSE_EVERY):
            json.loads(body)
        time.sleep(0)
    for member in members:
        member.join()
    return sum(counts) / seconds


async def through_batcher(batcher: Batcher, request: InferenceRequest, seconds: float, busy: bool) -> float:
    """Runs a second with ``IN_FLIGHT`` requests waiting."""
    done = 0
    limit = time.perf_counter() + seconds
    body = json.dumps({"data": list(range(200))})

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < limit:
            await batcher.infer(request)
            done += time.perf_counter() < limit

    async def noise() -> None:
        while busy and time.perf_counter() < limit:
            for _ in range(PAUSE_EVERY):
                json.loads(body)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(noise())
        for _ in range(IN_FLIGHT):
            group.create_task(caller())
    return done / seconds


async def main(seconds: float, folder: Path) -> None:
    tiny = np.ones((1, 16), np.int32)
    feed = {"INPUT0": tiny, "INPUT1": tiny}
    names = ("OUTPUT0", "OUTPUT1")
    request = InferenceRequest(feed, names, 1, 128)
    session = opened(folder, "add_sub", add_sub(), ModelConfig(session=SessionOptions(inline=True)))
    async with RunnerPool() as pool:
        print(f"{pool.threads} runner threads, {IN_FLIGHT} in flight where queued, tiny add/sub model\n")
        bare = session._ort  # type: ignore[attr-defined]  # the runtime's own session, for comparison
        print(f"{'bare InferenceSession.run':44} {cpu_us(lambda: bare.run(names, feed), seconds):8.2f} µs CPU")
        print(f"{'Session.run':44} {cpu_us(lambda: session.run(feed, names), seconds):8.2f} µs CPU")
        batcher = Batcher(session, ModelConfig(), ModelStats(), pool, run_timeout_s=30)
        assert batcher.run_inline(request) is not None
        print(f"{'Batcher.run_inline':44} {cpu_us(lambda: batcher.run_inline(request), seconds):8.2f} µs CPU")
        us, rows = await queued_us(batcher, request, seconds)
        print(f"{'Batcher.infer':44} {us:8.2f} µs CPU, {rows:.1f} rows a run")
        alone = Batcher(session, ModelConfig(batching=BatchPolicy(enabled=False)), ModelStats(), pool, run_timeout_s=30)
        us, rows = await queued_us(alone, request, seconds)
        print(f"{'Batcher.infer, not batched':44} {us:8.2f} µs CPU, {rows:.1f} rows a run")
        await batcher.close()
        await alone.close()

        width = 1536
        config = ModelConfig(session=SessionOptions(trial=False, inline=False), batching=BatchPolicy(enabled=False))
        large = opened(folder, "matmul", matmul(width, width), config)
        x = np.ones((64, width), np.float32)
        sheet: dict[str, NDArray[Any]] = {"x": x}
        slow = InferenceRequest(sheet, ("y",), len(x), x.nbytes)
        alone_s = 1 / back_to_back(large, sheet, 1, seconds, False)
        print(f"\nruns of {alone_s * 1e3:.1f} ms, {pool.threads} at once: runs/s of bare threads, and of the batcher")
        usual = sys.getswitchinterval()
        for interval in (usual, 1e-3, 2e-4):
            sys.setswitchinterval(interval)
            for busy in (False, True):
                # The best of many short rounds in turn: others use this machine, and not always equally.
                bare_rates, rates = [], []
                for _ in range(10):
                    bare_rates.append(back_to_back(large, sheet, pool.threads, seconds / 4, busy))
                    batcher = Batcher(large, config, ModelStats(), pool, run_timeout_s=30)
                    rates.append(await through_batcher(batcher, slow, seconds / 4, busy))
                    await batcher.close()
                bare_rate, rate = max(bare_rates), max(rates)
                print(
                    f"  switch interval {interval * 1e3:4.1f} ms, loop {'busy' if busy else 'idle'}: "
                    f"bare {bare_rate:6.1f}/s, batcher {rate:6.1f}/s, {rate / bare_rate:5.1%} of it"
                )
        sys.setswitchinterval(usual)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    with tempfile.TemporaryDirectory() as made, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(arguments.parse_args().seconds, Path(made)))
