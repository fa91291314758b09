"""What training over several processes costs and gains beside one: rows a second, bytes, processor time, limits.

    python tests/bench/bench_training.py [--rounds 1] [--only 5k,5m,100m,accuracy] [--json FILE]

All contestants of a size take the same batches of the same rows in one run, so read the ratios to ``one process``. Two
workers with one thread each; a step in step shares a batch between them, an asynchronous step has half as many rows, so
speed is told in rows. Starting processes is left out: times are those of the steps, as workers take them, and of
PyTorch's own DistributedDataParallel (without Ray; its all-reduce begins while the backward pass computes) likewise.
``waits`` is the share of a worker's time that is not the framework's: packing, sending, the server, other workers.
Processor time is that of all processes together, Ray's own included, from the end of the first epoch on.

The object store is made large enough here (`ray_session.connect`); with the 1 GiB that a local Ray gets otherwise, the
largest model's gradients go over the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from harness.options import print_machine

from inferway.train import ddp, parameter_server, ray_session
from inferway.train.job import OptimizerSpec, Progress, TrainingJob, TrainingResult
from inferway.train.optimizers import make_optimizer
from inferway.train.plan import Plan
from inferway.train.replica import replica_factory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training import digits_job

WORKERS = 2
SGD = OptimizerSpec("sgd", 1e-3)
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Size:
    """A network of dense layers: widths, rows of a batch, steps of an epoch; two epochs are trained."""

    widths: tuple[int, ...]
    batch_size: int
    steps: int

    def module(self) -> Any:
        torch.manual_seed(0)
        layers: list[Any] = []
        for before, after in zip(self.widths, self.widths[1:], strict=False):
            layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-1])

    def job(self) -> TrainingJob:
        rng = np.random.default_rng(0)
        rows = self.batch_size * self.steps
        x = rng.normal(size=(rows, self.widths[0])).astype(np.float32)
        y = rng.integers(self.widths[-1], size=rows)
        factory = replica_factory(self.module(), loss="sparse_categorical_crossentropy")
        return TrainingJob(factory, SGD, {"x": x}, y, epochs=2, batch_size=self.batch_size)


SIZES = {
    "5k": Size((64, 64, 10), 64, 200),
    "5m": Size((1024, 2400, 1024, 10), 64, 30),
    "100m": Size((4096, 8192, 8192, 10), 64, 4),
}
PARAMETER_SERVER: dict[str, dict[str, Any]] = {
    "sync, 1 server": {},
    "sync, 2 servers": {"servers": 2},
    "sync, fp16": {"compression": "fp16"},
    "sync, top 1 %": {"compression": "topk", "fraction": 0.01},
    "async": {"mode": "async"},
    "async, overlapped": {"mode": "async", "overlap": True},
    "ssp(3)": {"mode": "ssp", "staleness": 3},
}


@dataclass
class Figures:
    """Of one contestant: bytes are those that one worker sends and receives in a step."""

    rows_per_s: float
    waits: float
    bytes_per_step: float
    cpu_s_per_1000_rows: float


def cpu_s() -> float:
    """Processor seconds of this process and all below it so far."""
    parents, used = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
            used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / _TICKS
    total, found = 0.0, {os.getpid()}
    while found:
        total += sum(used.get(pid, 0.0) for pid in found)
        found = {pid for pid, parent in parents.items() if parent in found}
    return total


class Watch:
    """Processor time between the ends of the first and the last epoch."""

    def __init__(self, job: TrainingJob) -> None:
        self._ends: list[float] = []
        self.job = replace(job, on_progress=self._see)

    def _see(self, progress: Progress) -> None:
        if progress.metrics:
            self._ends.append(cpu_s())

    def per_1000_rows(self) -> float:
        rows = (len(self._ends) - 1) * self.job.rows
        return (self._ends[-1] - self._ends[0]) / rows * 1000 if rows else float("nan")


def one_process(job: TrainingJob) -> Figures:
    replica = job.replica()
    parameters, gradient = np.empty((2, replica.size), np.float32)
    replica.read(parameters)
    optimizer = make_optimizer(job.optimizer, replica.size)
    plan = Plan(job.rows, job.batch_size)
    x = job.inputs["x"]

    def epoch() -> None:
        for step in range(plan.steps):
            rows = plan.part(0, step, 0).rows
            replica.gradient({"x": x[rows]}, job.targets[rows], gradient, seed=0)
            optimizer.step(parameters, gradient)
            replica.load(parameters)

    epoch()
    began, used = time.perf_counter(), time.process_time()
    epoch()
    spent = time.perf_counter() - began
    return Figures(job.rows / spent, 0.0, 0.0, (time.process_time() - used) / job.rows * 1000)


def with_ddp(job: TrainingJob) -> Figures:
    watch = Watch(job)
    facts = ddp.fit(watch.job, workers=WORKERS).facts
    spent = facts["compute_s"] + facts["communicate_s"] + facts["update_s"]
    waits = facts["communicate_s"] / spent
    rows = job.rows * job.epochs
    return Figures(rows / spent, waits, 2 * facts["bytes_per_step"], watch.per_1000_rows())


def with_server(job: TrainingJob, options: dict[str, Any]) -> Figures:
    if options.get("mode", "sync") != "sync":
        job = replace(job, batch_size=job.batch_size // WORKERS)
    watch = Watch(job)
    facts = parameter_server.fit(watch.job, workers=WORKERS, **options).facts
    spent = (facts["compute_s"] + facts["exchange_s"]) / WORKERS
    waits = facts["exchange_s"] / (facts["compute_s"] + facts["exchange_s"])
    moved = facts["bytes_pushed_per_step"] + facts["bytes_pulled_per_step"]
    return Figures(job.rows * job.epochs / spent, waits, moved, watch.per_1000_rows())


def with_pytorch(job: TrainingJob, size: Size) -> Figures:
    """PyTorch's DistributedDataParallel with its own SGD, without Ray and without our vectors."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_pytorch, (size, folder), nprocs=WORKERS)
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    spent = max(each["wall_s"] for each in found)
    used = sum(each["cpu_s"] for each in found)
    sent = 2 * found[0]["bytes"] * 2 * (WORKERS - 1) / WORKERS
    return Figures(job.rows / spent, float("nan"), sent, used / job.rows * 1000)


def _pytorch(rank: int, size: Size, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORKERS)
    job = size.job()
    module = torch.nn.parallel.DistributedDataParallel(size.module(), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    plan = Plan(job.rows, job.batch_size, WORKERS)
    x, y = torch.from_numpy(job.inputs["x"]), torch.from_numpy(job.targets)

    def epoch() -> None:
        for step in range(plan.steps):
            rows = torch.from_numpy(plan.part(0, step, rank).rows.copy())
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()

    epoch()
    torch.distributed.barrier()
    began, used = time.perf_counter(), time.process_time()
    epoch()
    spent = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - used}
    spent["bytes"] = 4 * sum(parameter.numel() for parameter in module.parameters())
    Path(folder, f"{rank}.json").write_text(json.dumps(spent))
    torch.distributed.destroy_process_group()


def speed(name: str, rounds: int) -> dict[str, Figures]:
    size = SIZES[name]
    job = size.job()
    contestants: dict[str, Any] = {
        "one process": lambda: one_process(job),
        "PyTorch DDP": lambda: with_pytorch(job, size),
        "Ray Train (ddp)": lambda: with_ddp(job),
    }
    for label, options in PARAMETER_SERVER.items():
        contestants[label] = lambda options=options: with_server(job, options)
    count = job.replica().size
    print(f"\n{count:,} parameters, {job.batch_size} rows a step", flush=True)
    print(f"{'':20} {'rows/s':>10} {'ratio':>7} {'waits':>6} {'MB a step':>10} {'CPU s/1000 rows':>16}")
    found: dict[str, list[Figures]] = {label: [] for label in contestants}
    for _ in range(rounds):
        for label, run in contestants.items():
            found[label].append(run())
    medians: dict[str, Figures] = {}
    for label, each in found.items():
        values = [statistics.median(getattr(f, field) for f in each) for field in Figures.__dataclass_fields__]
        medians[label] = figures = Figures(*values)
        ratio = figures.rows_per_s / medians["one process"].rows_per_s
        print(
            f"{label:20} {figures.rows_per_s:10,.0f} {ratio:7.3f} {figures.waits:6.0%} "
            f"{figures.bytes_per_step / 1e6:10.3f} {figures.cpu_s_per_1000_rows:16.3f}",
            flush=True,
        )
    return medians


def accuracy() -> dict[str, dict[str, float]]:
    """What modes and compression cost in accuracy: digits, 15 epochs, 200 rows held out, one seed."""
    job = digits_job(rows=1597, epochs=15)
    results: dict[str, TrainingResult] = {"Ray Train (ddp)": ddp.fit(job, workers=WORKERS)}
    for label, options in PARAMETER_SERVER.items():
        asynchronous = options.get("mode", "sync") != "sync"
        given = replace(job, batch_size=job.batch_size // WORKERS) if asynchronous else job
        results[label] = parameter_server.fit(given, workers=WORKERS, **options)
    print(f"\ndigits\n{'':20} {'accuracy':>9} {'loss':>7} {'pushed B/step':>14} {'max staleness':>14}")
    rows: dict[str, dict[str, float]] = {}
    for label, result in results.items():
        pushed = result.facts.get("bytes_pushed_per_step", result.facts.get("bytes_per_step", 0.0))
        row = {
            "accuracy": result.history["val_accuracy"][-1],
            "loss": result.history["val_loss"][-1],
            "pushed": pushed,
            "max_staleness": result.facts.get("max_staleness", 0.0),
        }
        rows[label] = row
        print(f"{label:20} {row['accuracy']:9.4f} {row['loss']:7.4f} {pushed:14,.0f} {row['max_staleness']:14.0f}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help=f"of {', '.join((*SIZES, 'accuracy'))}; all when empty")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    wanted = [part for part in arguments.only.split(",") if part] or [*SIZES, "accuracy"]
    torch.set_num_threads(1)
    print_machine()
    measured: dict[str, Any] = {}
    with ray_session.connect(cpus=8, object_store_bytes=5 << 30):
        for name in wanted:
            if name == "accuracy":
                measured[name] = accuracy()
            else:
                measured[name] = {label: asdict(figures) for label, figures in speed(name, arguments.rounds).items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
