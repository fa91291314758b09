"""What front processes bring: the same requests with one process, and with several before the one with the models.

JSON is what fronts are for: reading and writing it is nearly all that such a request costs, and it happens in Python,
in each process on one processor at a time. The tiny request shows the price: each inference crosses a Unix socket
twice. All processes and the client share this machine's processors, so on two of them there is little to be won,
whatever the number of fronts; the table says how many there are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from harness import addsub
from harness.gateway import gateway
from harness.load import Job, ask, require_wrk, wrk
from harness.options import Options, main
from harness.paths import MODELS
from harness.processes import BenchError, Server, memory_bytes
from harness.report import Report, in_turn

CONNECTIONS = 32
FRONTS = (1, 2)
ROWS = 64
"""Of 16 numbers, in two inputs and two outputs: 4,096 numbers of JSON for each request."""


def run(options: Options) -> Report:
    report = Report("fronts")
    require_wrk()
    processors = len(os.sched_getaffinity(0))
    report.say(
        f"JSON bodies over HTTP, {CONNECTIONS} connections, {options.rounds} rounds of {options.seconds} s in turn; "
        f"{processors} processors for the gateway's processes and the client together"
    )
    repository = MODELS / "fronts-repository"
    addsub.write_model(repository / "addsub" / "1" / "model.onnx")
    with ExitStack() as stack:
        windows: dict[str, Callable[[], Mapping[str, float]]] = {}
        servers: dict[str, Server] = {}
        for count in FRONTS:
            name = "one process" if count == 1 else f"{count} fronts and the owner"
            ours = stack.enter_context(gateway(repository, f"Inferway {count}", ["--workers", str(count)]))
            servers[name] = ours.server
            for size, job in (("large", _large(ours.authorization)), ("tiny", _tiny(ours.authorization))):
                reply = ask(ours.server, job)
                if reply.status != 200:
                    raise BenchError(f"{name} answered {reply.status}: {reply.body[:300]!r}")
                windows[f"{size}, {name}"] = _window(ours.server, job, options.seconds)
        for window in windows.values():
            window()
        seen = in_turn(windows, options.rounds, report)
        memory = {name: memory_bytes(server.pid) for name, server in servers.items()}
    for size in ("large", "tiny"):
        base = seen[f"{size}, one process"]["per_s"].median
        rows = [
            [
                name,
                measured["per_s"].text(),
                f"{measured['per_s'].median / base:.2f}×",
                measured["p50_ms"].text(2),
                measured["p99_ms"].text(2),
                measured["cpu_us"].text(),
                measured["cores"].text(2),
                f"{memory[name] / 2**20:.0f}",
            ]
            for name, measured in ((name, seen[f"{size}, {name}"]) for name in servers)
        ]
        report.table(
            f"{'4,096 numbers of JSON' if size == 'large' else '64 numbers of JSON'} for each request, on {processors} "
            f"processors: median (least–most) of {options.rounds} rounds",
            ["gateway", "requests/s", "of one process", "p50 ms", "p99 ms", "CPU µs/req", "processors used", "RSS MiB"],
            rows,
        )
    return report


def _large(headers: Mapping[str, str]) -> Job:
    values = [(7 * i) % 1000 for i in range(16 * ROWS)]
    inputs = [{"name": name, "shape": [ROWS, 16], "datatype": "INT32", "data": values} for name in ("INPUT0", "INPUT1")]
    body = json.dumps({"inputs": inputs}, separators=(",", ":")).encode()
    return Job("/v2/models/addsub/infer", [body], {"Content-Type": "application/json", **headers})


def _tiny(headers: Mapping[str, str]) -> Job:
    return addsub.job("/v2/models/addsub/infer", headers=dict(headers))


def _window(server: Server, job: Job, seconds: int) -> Callable[[], Mapping[str, float]]:
    def measure() -> Mapping[str, float]:
        seen = wrk(server, job, connections=CONNECTIONS, seconds=seconds)
        return {
            "per_s": seen.per_s,
            "p50_ms": seen.p50_us / 1e3,
            "p99_ms": seen.p99_us / 1e3,
            "cpu_us": seen.cpu_us,
            "cores": seen.cores,
        }

    return measure


if __name__ == "__main__":
    main(run, __doc__ or "")
