"""Requests per second and processor time for a tiny model over HTTP, against a bare echo and other model servers.

The model's run takes some microseconds, so this measures the servers. Every server has one process that speaks HTTP
(LitServe and Triton have more beside it, which count), gets the same 64 connections from wrk with one thread, and is
measured in turn with the others for several rounds. wrk and the server share the machine, as they do for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from harness import addsub, rivals
from harness.gateway import gateway
from harness.load import Job, Measurement, ask, require_wrk, wrk
from harness.options import Options, main
from harness.paths import LOGS, MODELS
from harness.processes import BenchError, Server, cpu_s, memory_bytes, running
from harness.report import Check, Report, in_turn

CONNECTIONS = 64
ECHO, OURS = "bare uvicorn echo", "Inferway"
# Requests per second, ours over theirs, as the project's specification of its first release has it.
WANTED = {ECHO: 0.5, "Triton": 1.5, "MLServer": 6.0, "LitServe": 20.0, "BentoML": 20.0}
WANTED_ECHO_CPU, WANTED_P50_MS = 2.5, 0.10


@dataclass(frozen=True, slots=True)
class Contestant:
    server: Server
    job: Job
    note: str


def run(options: Options) -> Report:
    report = Report("http")
    require_wrk()
    report.say(
        f"Tiny model over HTTP, {CONNECTIONS} connections, {options.rounds} rounds of {options.seconds} s in turn"
    )
    repository = MODELS / "http-repository"
    addsub.write_model(repository / "addsub" / "1" / "model.onnx")
    with ExitStack() as stack:
        contestants: dict[str, Contestant] = {}
        ours = stack.enter_context(gateway(repository, OURS))
        job = addsub.job("/v2/models/addsub/infer", headers=ours.authorization)
        reply = ask(ours.server, job)
        addsub.check(OURS, reply)
        # The echo comes first in the table and answers with our bytes, so it starts when those are known.
        variant = rivals.echo(MODELS / "echo", reply.body)
        server = stack.enter_context(running(ECHO, variant.command, LOGS))
        if (got := ask(server, variant.job)).body != reply.body:
            raise BenchError(f"the echo answers {got.body[:200]!r}")
        contestants[ECHO] = Contestant(server, variant.job, variant.command.note)
        contestants[OURS] = Contestant(ours.server, job, "defaults: key, metrics, validation and log on")
        for name, build in rivals.RIVAL_SERVERS.items():
            if options.only and name.lower() not in options.only:
                continue
            if not rivals.installed(name.lower()):
                report.note(
                    f"{name}: NOT INSTALLED, so not measured; python tests/bench/setup_rivals.py {name.lower()}"
                )
                continue
            best = _best(name, build(MODELS / name.lower()), options, report)
            server = stack.enter_context(running(name, best.command, LOGS))
            contestants[name] = Contestant(server, best.job, best.command.note)
        for name, one in contestants.items():
            report.note(f"{name}: {one.note}")
            if name != ECHO:
                addsub.check(name, ask(one.server, one.job))
        _many(contestants, options, report)
        _single(contestants, options, report)
        for name, one in contestants.items():
            if name != ECHO:
                addsub.check(name, ask(one.server, one.job))
    return report


def _best(name: str, variants: Mapping[str, rivals.Variant], options: Options, report: Report) -> rivals.Variant:
    """The rival's configuration with the most requests/s, each tried alone for a moment, checked for its answer."""
    rows, best, most = [], None, 0.0
    for title, variant in variants.items():
        with running(f"{name} {title}", variant.command, LOGS) as server:
            addsub.check(f"{name} {title}", ask(server, variant.job))
            wrk(server, variant.job, connections=CONNECTIONS, seconds=1)
            seen = wrk(server, variant.job, connections=CONNECTIONS, seconds=max(1.0, options.seconds / 2))
        rows.append([title, f"{seen.per_s:,.0f}", f"{seen.cpu_us:,.0f}", f"{seen.p99_us / 1000:.1f}"])
        if seen.per_s > most:
            best, most = variant, seen.per_s
    report.table(
        f"{name}: configurations tried; the one with the most req/s is taken", ["", "req/s", "CPU µs", "p99 ms"], rows
    )
    if best is None:
        raise BenchError(f"{name} has no configuration")
    return best


def _many(contestants: Mapping[str, Contestant], options: Options, report: Report) -> None:
    idle = {name: _idle(one.server) for name, one in contestants.items()}
    for one in contestants.values():  # warm up: caches, lazy imports, allocator
        wrk(one.server, one.job, connections=CONNECTIONS, seconds=1)

    def window(one: Contestant) -> Callable[[], Mapping[str, float]]:
        return lambda: _values(wrk(one.server, one.job, connections=CONNECTIONS, seconds=options.seconds))

    seen = in_turn({name: window(one) for name, one in contestants.items()}, options.rounds, report)
    rows = []
    for name, values in seen.items():
        ratio = seen[OURS]["per_s"].median / values["per_s"].median
        cpu_ratio = seen[OURS]["cpu_us"].median / values["cpu_us"].median
        rss = memory_bytes(contestants[name].server.pid) / 2**20
        rows.append(
            [
                name,
                values["per_s"].text(),
                values["cpu_us"].text(),
                f"{values['cores'].median:.2f}",
                f"{values['client_cpu_us'].median:.1f}",
                f"{values['p50_us'].median / 1000:.2f}",
                f"{values['p99_us'].median / 1000:.2f}",
                f"{ratio:.2f}×",
                f"{cpu_ratio:.2f}×",
                f"{idle[name] * 100:.0f} %",
                f"{rss:.0f}",
            ]
        )
        if name in WANTED:
            report.check(Check(f"requests/s, Inferway over {name}", ratio, WANTED[name]))
        if name == ECHO:
            report.check(Check("CPU per request, Inferway over bare echo", cpu_ratio, WANTED_ECHO_CPU, at_least=False))
    report.table(
        f"{CONNECTIONS} connections: median (least–most) of {options.rounds} rounds",
        [
            "server",
            "req/s",
            "CPU µs/req",
            "cores",
            "wrk CPU µs",
            "p50 ms",
            "p99 ms",
            "ours/its req/s",
            "ours/its CPU",
            "idle",
            "RSS MiB",
        ],
        rows,
    )


def _single(contestants: Mapping[str, Contestant], options: Options, report: Report) -> None:
    """One request at a time; the echo shows what wrk, the loopback interface and uvicorn need of that by themselves."""

    def window(one: Contestant) -> Callable[[], Mapping[str, float]]:
        return lambda: _values(wrk(one.server, one.job, connections=1, seconds=max(1.0, options.seconds / 2)))

    seen = in_turn({name: window(one) for name, one in contestants.items()}, options.rounds, report)
    rows = []
    for name, values in seen.items():
        more = values["p50_us"].median - seen[ECHO]["p50_us"].median
        rows.append(
            [
                name,
                values["p50_us"].text(),
                values["p99_us"].text(),
                values["cpu_us"].text(),
                f"{more:+,.0f}",
                f"{values['p50_us'].median / seen[OURS]['p50_us'].median:.2f}×",
            ]
        )
    report.table(
        f"One connection: median (least–most) of {options.rounds} rounds",
        ["server", "p50 µs", "p99 µs", "CPU µs/req", "over echo µs", "its/ours p50"],
        rows,
    )
    report.check(
        Check(
            "p50 of one request at a time",
            seen[OURS]["p50_us"].median / 1000,
            WANTED_P50_MS,
            at_least=False,
            unit=" ms",
        )
    )


def _values(seen: Measurement) -> dict[str, float]:
    names = ("per_s", "cpu_us", "client_cpu_us", "cores", "p50_us", "p99_us")
    return {name: getattr(seen, name) for name in names}


def _idle(server: Server) -> float:
    """Cores that a server uses when nobody asks it: it would take them from whoever is being measured."""
    before = cpu_s(server.pid)
    time.sleep(1.0)
    return cpu_s(server.pid) - before


if __name__ == "__main__":
    main(run, __doc__ or "")
