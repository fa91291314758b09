"""Where the gateway spends its time under load: samples it with py-spy while wrk asks.

    python tests/bench/setup_rivals.py py-spy
    python tests/bench/profile_gateway.py                        # the tiny model of bench_http.py, 64 connections
    python tests/bench/profile_gateway.py --model minilm         # a model of bench_batching.py
    python tests/bench/profile_gateway.py --native --seconds 10  # frames of C extensions too

It prints the functions with the most samples of their own and with all that they call, and leaves the stacks as a flame
graph and as text in `.cache/bench-profiles`. Only threads that run are sampled. Attaching needs root or ptrace rights.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from harness import addsub
from harness.gateway import gateway
from harness.load import Job, require_wrk, wrk
from harness.paths import CACHE, MODELS, RIVAL_VENVS
from harness.processes import BenchError, Server
from harness.workloads import binary_job, lay_out, make_models, workloads

PROFILES = CACHE / "bench-profiles"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="addsub", help="addsub, or a model of bench_batching.py (%(default)s)")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--rate", type=int, default=500, help="samples per second (%(default)s)")
    parser.add_argument("--native", action="store_true", help="sample frames of C extensions as well; slower")
    parser.add_argument("--top", type=int, default=30, help="functions to print (%(default)s)")
    arguments = parser.parse_args()
    try:
        require_wrk()
        spy = find_py_spy()
        stacks = profile(spy, arguments)
    except BenchError as error:
        print(f"not profiled: {error}", file=sys.stderr)
        return 1
    print_top(stacks, arguments.top)
    return 0


def find_py_spy() -> str:
    own = RIVAL_VENVS / "py-spy" / "bin" / "py-spy"
    found = str(own) if own.exists() else shutil.which("py-spy")
    if found is None:
        raise BenchError("py-spy is not installed; python tests/bench/setup_rivals.py py-spy")
    return found


def profile(spy: str, arguments: argparse.Namespace) -> Path:
    """Start the gateway, load it, sample it; the file with one line for each stack and its count."""
    repository = MODELS / "profile-repository"
    workload = None
    if arguments.model == "addsub":
        shutil.rmtree(repository, ignore_errors=True)
        addsub.write_model(repository / "addsub" / "1" / "model.onnx")
    else:
        make_models()
        known = workloads()
        if arguments.model not in known:
            raise BenchError(f"unknown model {arguments.model}; there are addsub, {', '.join(known)}")
        workload = known[arguments.model]
        lay_out(workload, repository)
    with gateway(repository, "Inferway profiled") as ours:
        if workload is None:
            job = addsub.job("/v2/models/addsub/infer", headers=ours.authorization)
        else:
            job = binary_job(workload, workload.name, ours.authorization)
        wrk(ours.server, job, connections=arguments.connections, seconds=1)
        return sample(spy, ours.server, job, arguments)


def sample(spy: str, server: Server, job: Job, arguments: argparse.Namespace) -> Path:
    PROFILES.mkdir(parents=True, exist_ok=True)
    stacks = PROFILES / f"{arguments.model}.txt"
    command = [spy, "record", "--pid", str(server.pid), "--duration", str(arguments.seconds)]
    command += ["--rate", str(arguments.rate), "--threads", *(["--native"] if arguments.native else [])]
    # One after the other: two samplers cannot stop the same process.
    for kind, path in (("raw", stacks), ("flamegraph", stacks.with_suffix(".svg"))):
        recorder = subprocess.Popen([*command, "--format", kind, "--output", str(path)], stdout=subprocess.DEVNULL)
        seen = wrk(server, job, connections=arguments.connections, seconds=arguments.seconds + 1)
        if recorder.wait():
            raise BenchError("py-spy failed; it needs root or the right to ptrace")
        print(f"{seen.per_s:,.0f} req/s, {seen.cpu_us:,.0f} µs of CPU each, while being sampled (which slows it down)")
    print(f"flame graph: {stacks.with_suffix('.svg')}")
    return stacks


def print_top(stacks: Path, count: int) -> None:
    """The main thread's functions, on which all requests are handled; of the other threads only their names.

    A thread that waits without the interpreter's lock often passes for one that runs, so shares of all threads together
    would mean little.
    """
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    threads: Counter[str] = Counter()
    for line in stacks.read_text().splitlines():
        stack, _, number = line.rpartition(" ")
        samples = int(number)
        # "function (path/file.py:12)": lines are joined, one row for each function.
        thread, *frames = [re.sub(r":\d+\)$", ")", frame) for frame in stack.split(";")]
        threads[thread] += samples
        if frames and thread.endswith("MainThread"):
            own[frames[-1]] += samples
            for frame in set(frames):
                within[frame] += samples
    print("\nsamples by thread: " + ", ".join(f"{name} {samples}" for name, samples in threads.most_common()))
    total = own.total()
    for title, counter in (("own samples", own), ("with what it calls", within)):
        print(f"\nmain thread, {title}:")
        for frame, samples in counter.most_common(count):
            print(f"  {samples / total:6.1%}  {frame}")


if __name__ == "__main__":
    raise SystemExit(main())
