"""Rows per second with 64 single-row requests in flight, against ONNX Runtime tuned by hand on the same processors.

The rival is searched, not chosen: threads × batch × order by length × options, all tried for a moment, the four best
tried again in turn with everything else, and the best median of these counts. Inferway is measured twice: through HTTP
with binary tensors (wrk shares the processors), and in this process through its batcher, which shows what HTTP costs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import numpy as np
from harness import inprocess
from harness.gateway import Gateway, gateway
from harness.load import ask, require_wrk, wrk
from harness.options import Options, main
from harness.paths import MODELS
from harness.processes import BenchError
from harness.report import Check, Report, in_turn
from harness.tuned import Plan, Sessions, default_loop, grid, rows_per_s
from harness.workloads import Workload, binary_job, lay_out, make_models, parse_outputs, workloads

IN_FLIGHT = 64
FINALISTS = 4
DEFAULT, UNBATCHED_LOOP = "default InferenceSession in a loop", "unbatched, as many callers as processors"


def run(options: Options) -> Report:
    report = Report("batching")
    require_wrk()
    make_models()
    for name, workload in workloads().items():
        if not options.only or any(name.startswith(part) for part in options.only):
            _measure(workload, options, report)
    return report


def _measure(workload: Workload, options: Options, report: Report) -> None:
    cpus = len(os.sched_getaffinity(0))
    sessions = Sessions(workload)
    tried = sorted(
        ((rows_per_s(workload, sessions, plan, 0.25), plan) for plan in grid(workload, cpus)),
        key=lambda pair: pair[0],
        reverse=True,
    )
    # The bound that knows all lengths beforehand is no server's rival: it is shown, and takes no finalist's place.
    fair = [pair for pair in tried if pair[1].order != "all"][:FINALISTS]
    offline = [pair for pair in tried if pair[1].order == "all"][:1]
    report.table(
        f"{workload.name}: the best of {len(tried)} ways to run it in this process, each tried for 0.25 s",
        ["", "rows/s"],
        [[plan.text(), f"{rate:,.0f}"] for rate, plan in tried[:8]],
    )
    repository = MODELS / "batching" / workload.name
    lay_out(workload, repository)
    with gateway(repository, f"Inferway {workload.name}") as ours, inprocess.batcher(workload) as inside:
        for model in workload.options:
            _check_answers(ours, workload, model, sessions)
        contestants: dict[str, Callable[[], Mapping[str, float]]] = {}
        for _, plan in [*fair, *offline]:
            contestants[f"tuned: {plan.text()}"] = _loop(workload, sessions, plan, options.seconds)
        contestants[DEFAULT] = lambda: {"rows": default_loop(workload, sessions, options.seconds)}
        contestants[UNBATCHED_LOOP] = _loop(workload, sessions, Plan(1, cpus, 1), options.seconds)
        contestants["Inferway batcher in this process"] = lambda: inside.rows_per_s(IN_FLIGHT, options.seconds)
        for model in workload.options:
            contestants[f"Inferway HTTP: {model}"] = _http(ours, workload, model, options.seconds)
        for measure in contestants.values():  # warm up, and let the gateway learn its costs
            measure()
        seen = in_turn(contestants, options.rounds, report)
        for line in ours.warnings():
            report.note(f"the gateway warned: {line}")
    best = max(seen[f"tuned: {plan.text()}"]["rows"].median for _, plan in fair)
    rows = []
    for name, values in seen.items():
        cost = f"{values['cpu_us'].median:,.0f}" if "cpu_us" in values else ""
        batch = f"{values['batch'].median:.1f}" if "batch" in values else ""
        tail = f"{values['p99_us'].median / 1000:,.1f}" if "p99_us" in values else ""
        rows.append([name, values["rows"].text(), f"{values['rows'].median / best:.2f}×", cost, batch, tail])
    report.table(
        f"{workload.name}: {IN_FLIGHT} single-row requests in flight, median (least–most) of {options.rounds} rounds",
        ["", "rows/s", "of the best tuned", "CPU µs/row", "rows/run", "p99 ms"],
        rows,
    )
    http = seen[f"Inferway HTTP: {workload.name}"]["rows"].median
    inner = seen["Inferway batcher in this process"]["rows"].median
    unbatched = seen[f"Inferway HTTP: {workload.name}-unbatched"]["rows"].median
    report.check(Check(f"{workload.name}: HTTP over best tuned loop", http / best, 0.95))
    report.check(Check(f"{workload.name}: batcher in process over best tuned loop", inner / best, 0.95))
    report.check(
        Check(
            f"{workload.name}: HTTP over default InferenceSession in a loop", http / seen[DEFAULT]["rows"].median, 1.0
        )
    )
    report.check(Check(f"{workload.name}: HTTP batched over HTTP unbatched", http / unbatched, 1.0))


def _loop(workload: Workload, sessions: Sessions, plan: Plan, seconds: float) -> Callable[[], Mapping[str, float]]:
    def measure() -> Mapping[str, float]:
        before = time.process_time()
        rate = rows_per_s(workload, sessions, plan, seconds)
        return {"rows": rate, "cpu_us": (time.process_time() - before) / (rate * seconds) * 1e6}

    return measure


def _http(ours: Gateway, workload: Workload, model: str, seconds: int) -> Callable[[], Mapping[str, float]]:
    job = binary_job(workload, model, ours.authorization)

    def measure() -> Mapping[str, float]:
        before = ours.batch_counters(model)
        seen = wrk(ours.server, job, connections=IN_FLIGHT, seconds=seconds)
        after = ours.batch_counters(model)
        runs = max(1, after.runs - before.runs)
        return {
            "rows": seen.per_s,
            "cpu_us": seen.cpu_us,
            "p99_us": seen.p99_us,
            "batch": (after.rows - before.rows) / runs,
        }

    return measure


def _check_answers(ours: Gateway, workload: Workload, model: str, sessions: Sessions) -> None:
    """The gateway's rows equal the model's own, to the rounding that another batch size or padding brings."""
    job = binary_job(workload, model, ours.authorization)
    for index in (0, 1, len(workload.feeds) - 1):
        reply = ask(ours.server, job, index)
        if reply.status != 200:
            raise BenchError(f"{model} answered {reply.status}: {reply.body[:300]!r}")
        outputs = parse_outputs(reply.headers, reply.body)
        for name, expected in zip(
            workload.outputs, sessions.get(1).run(workload.outputs, workload.feeds[index]), strict=True
        ):
            if not np.allclose(outputs[name], expected, rtol=1e-3, atol=1e-4):
                raise BenchError(f"{model}: output {name} of request {index} is not what the model gives alone")


if __name__ == "__main__":
    main(run, __doc__ or "")
