"""A 16 MiB float32 tensor in and out, against a bare ASGI echo of the same bytes, and how often it is copied.

The model hands its input back (`Identity`), which costs ONNX Runtime one copy of its own; that one is measured apart
and not charged to the gateway. Copies are counted in two ways: bytes that went through memcpy and memmove in the whole
process, and the high-water mark of resident memory over its level at rest, which is how many were alive at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from harness import rivals
from harness.copies import CopyCounter, copy_counter
from harness.gateway import gateway
from harness.load import Connection, Job, Reply
from harness.options import Options, main
from harness.paths import LOGS, MODELS
from harness.processes import BenchError, Server, cpu_s, memory_bytes, reset_high_water, running
from harness.report import Check, Report, in_turn
from numpy.typing import NDArray
from onnx import TensorProto, helper, save

SIZE = 16 * 2**20
ECHO, OURS = "bare uvicorn echo", "Inferway"
WANTED_RATIO, WANTED_COPIES = 0.7, 3.0


def run(options: Options) -> Report:
    report = Report("tensors")
    report.say(
        f"16 MiB float32 in and out, binary, one connection, {options.rounds} rounds of {options.seconds} s in turn"
    )
    repository = MODELS / "tensors-repository"
    _identity(repository / "identity" / "1")
    values = np.random.default_rng(3).standard_normal(SIZE // 4, np.float32)
    with ExitStack() as stack:
        ours = stack.enter_context(gateway(repository, OURS))
        job = _job(values, ours.authorization)
        _check(values, _ask(ours.server, job))
        servers = {OURS: ours.server}
        for app in ("mirror", "joined"):
            name = f"{ECHO}, {'chunks as they came' if app == 'mirror' else 'one piece'}"
            servers[name] = stack.enter_context(running(name, rivals.uvicorn_echo(f"echo:{app}"), LOGS))
            if len(_ask(servers[name], job).body) != len(job.bodies[0]):
                raise BenchError(f"{name} does not give the body back")
        windows = {name: _window(server, job, options.seconds) for name, server in servers.items()}
        for window in windows.values():
            window()
        seen = in_turn(windows, options.rounds, report)
        for line in ours.warnings():
            report.note(f"the gateway warned: {line}")
        alive = {name: _alive(server, job) for name, server in servers.items()}
    copied = _copied(values, report)
    best = max(seen[name]["mib_per_s"].median for name in seen if name != OURS)
    rows = [
        [
            name,
            measured["mib_per_s"].text(),
            f"{seen[OURS]['mib_per_s'].median / measured['mib_per_s'].median:.2f}×",
            measured["p50_ms"].text(1),
            measured["cpu_ms"].text(1),
            f"{alive[name]:.2f}",
        ]
        for name, measured in seen.items()
    ]
    report.table(
        f"16 MiB in and 16 MiB out: median (least–most) of {options.rounds} rounds",
        ["server", "MiB/s, both ways", "ours/its", "p50 ms", "CPU ms/req", "copies alive at once"],
        rows,
    )
    report.check(Check("bytes/s, Inferway over the faster echo", seen[OURS]["mib_per_s"].median / best, WANTED_RATIO))
    if copied is not None:
        report.check(
            Check("times that the tensor is copied, in and out together", copied, WANTED_COPIES, at_least=False)
        )
    report.check(Check("copies alive at once", alive[OURS], WANTED_COPIES, at_least=False))
    return report


def _identity(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", tensors[:1], tensors[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx")


def _job(values: NDArray[np.float32], headers: Mapping[str, str]) -> Job:
    tensor = {
        "name": "x",
        "shape": [1, len(values)],
        "datatype": "FP32",
        "parameters": {"binary_data_size": values.nbytes},
    }
    outputs = [{"name": "y", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}, separators=(",", ":")).encode()
    own = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return Job("/v2/models/identity/infer", [head + values.tobytes()], {**own, **headers})


def _ask(server: Server, job: Job) -> Reply:
    connection = Connection(server.port)
    try:
        reply = connection.ask(job)
    finally:
        connection.close()
    if reply.status != 200:
        raise BenchError(f"{server.name} answered {reply.status}: {reply.body[:300]!r}")
    return reply


def _check(values: NDArray[np.float32], reply: Reply) -> None:
    if reply.body[-values.nbytes :] != values.tobytes():
        raise BenchError("the gateway does not give the tensor back")


def _window(server: Server, job: Job, seconds: float) -> Callable[[], Mapping[str, float]]:
    request = Connection.prepare(job)

    def measure() -> Mapping[str, float]:
        connection, times, moved = Connection(server.port), [], 0
        before = cpu_s(server.pid)
        started = time.perf_counter()
        try:
            while time.perf_counter() - started < seconds:
                begun = time.perf_counter()
                moved += len(request) + len(connection.exchange(request))
                times.append(time.perf_counter() - begun)
        finally:
            connection.close()
        elapsed = time.perf_counter() - started
        return {
            "mib_per_s": moved / elapsed / 2**20,
            "p50_ms": sorted(times)[len(times) // 2] * 1e3,
            "cpu_ms": (cpu_s(server.pid) - before) / len(times) * 1e3,
        }

    return measure


def _alive(server: Server, job: Job) -> float:
    """Resident memory at its highest during one request over its level before it, in tensors of 16 MiB."""
    time.sleep(0.5)
    reset_high_water(server.pid)
    before = memory_bytes(server.pid)
    _ask(server, job)
    return (memory_bytes(server.pid, "VmHWM") - before) / SIZE


def _copied(values: NDArray[np.float32], report: Report) -> float | None:
    """How often the gateway copies the tensor's bytes, less what the model's own run copies."""
    counter = copy_counter("gateway")
    if counter is None:
        report.note("copies NOT counted: there is no C compiler")
        return None
    with gateway(MODELS / "tensors-repository", "Inferway counted", env=counter.env) as ours:
        job = _job(values, ours.authorization)
        for _ in range(3):  # the first requests also fill caches
            _ask(ours.server, job)
        before = counter.copied_bytes()
        for _ in range(4):
            _ask(ours.server, job)
        whole = (counter.copied_bytes() - before) / 4 / SIZE
    model = _copied_by_the_run(counter)
    report.note(
        f"bytes through memcpy and memmove for one request: {whole:.2f} tensors, of which the run itself {model:.2f}"
    )
    return whole - model


def _copied_by_the_run(counter: CopyCounter) -> float:
    """Copies of one ``session.run`` of the model, in a process of its own."""
    program = """
import os, struct, sys
import numpy as np, onnxruntime as ort
count = lambda: struct.unpack("=Q", open(os.environ["COPIES_FILE"], "rb").read(8))[0]
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
x = np.ones((1, int(sys.argv[2])), np.float32)
session.run(None, {"x": x})
before = count()
session.run(None, {"x": x})
print(count() - before)
"""
    model = MODELS / "tensors-repository" / "identity" / "1" / "model.onnx"
    argv = [sys.executable, "-c", program, str(model), str(SIZE // 4)]
    done = subprocess.run(argv, env={**os.environ, **counter.env}, capture_output=True, text=True, check=True)
    return int(done.stdout) / SIZE


if __name__ == "__main__":
    main(run, __doc__ or "")
