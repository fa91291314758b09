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
        ours = stack.enter_context(gateway(repository, OURS))
        job = addsub.job("/v2/models/addsub/infer", headers=ours.authorization)
        reply = ask(ours.server, job)
        addsub.check(OURS, reply)
        # The echo answers with our bytes, so it starts when those are known; it is also sent ours, the key included.
        variant = rivals.echo(MODELS / "echo", reply.body)
        echo = Contestant(stack.enter_context(running(ECHO, variant.command, LOGS)), job, variant.command.note)
        if (got := ask(echo.server, job)).body != reply.body:
            raise BenchError(f"the echo answers {got.body[:200]!r}")
        crowd = {ECHO: echo, OURS: Contestant(ours.server, job, "defaults: key, metrics and validation on")}
        single = dict(crowd)
        for name, build in rivals.RIVAL_SERVERS.items():
            if options.only and name.lower() not in options.only:
                continue
            if not rivals.installed(name.lower()):
                report.note(
                    f"{name}: NOT INSTALLED, so not measured; python tests/bench/setup_rivals.py {name.lower()}"
                )
                continue
            fastest, quickest = _best(name, build(MODELS / name.lower()), options, report)
            crowd[name] = single[name] = _start(name, fastest, stack)
            if quickest is not fastest:
                single[name] = _start(f"{name} for one connection", quickest, stack)
        for title, contestants in (("many connections", crowd), ("one connection", single)):
            for name, one in contestants.items():
                report.note(f"{title}, {name}: {one.note}")
        _many(crowd, options, report)
        _single(single, options, report)
        for contestants in (crowd, single):
            for name, one in contestants.items():
                addsub.check(name, ask(one.server, one.job))
        for line in ours.warnings():
            report.note(f"the gateway warned: {line}")
    return report


def _start(name: str, variant: rivals.Variant, stack: ExitStack) -> Contestant:
    server = stack.enter_context(running(name, variant.command, LOGS))
    addsub.check(name, ask(server, variant.job))
    return Contestant(server, variant.job, variant.command.note)


def _best(
    name: str, variants: Mapping[str, rivals.Variant], options: Options, report: Report
) -> tuple[rivals.Variant, rivals.Variant]:
    """The rival's configurations with the most requests/s in a crowd and with the least p50 alone.

    Each is tried by itself for a moment, after its answer was found right.
    """
    tried, rows = [], []
    for title, variant in variants.items():
        with running(f"{name} {title}", variant.command, LOGS) as server:
            addsub.check(f"{name} {title}", ask(server, variant.job))
            wrk(server, variant.job, connections=CONNECTIONS, seconds=1)
            many = wrk(server, variant.job, connections=CONNECTIONS, seconds=max(1.0, options.seconds / 2))
            one = wrk(server, variant.job, connections=1, seconds=1)
        tried.append((many.per_s, one.p50_us, variant))
        rows.append([title, f"{many.per_s:,.0f}", f"{many.cpu_us:,.0f}", f"{one.p50_us:,.0f}"])
    report.table(
        f"{name}: configurations tried; the most req/s and the least p50 are taken",
        ["", f"req/s, {CONNECTIONS} conn.", "CPU µs", "p50 µs, 1 conn."],
        rows,
    )
    return max(tried, key=lambda row: row[0])[2], min(tried, key=lambda row: row[1])[2]


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
