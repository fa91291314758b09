"""The rival of the batching benchmark: ONNX Runtime in a loop in this process, tuned by hand.

The loop has what a server has: a window of 64 requests at a time, to group and order as it likes, and must give every
request its own rows back. It has what a server has not: no HTTP, no other process, no waiting for arrivals. A second
family sorts *all* requests by length beforehand, which no server can do, and is shown as the bound it is.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from harness.workloads import Feed, Workload
from numpy.typing import NDArray

WINDOW = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to run the loop.

    Attributes:
        intra: threads inside a run; callers: threads that run batches side by side.
        batch: rows that share a run, at most.
        order: as they came; sorted by length within each window; or sorted over all requests.
        disabled: graph optimisers of ONNX Runtime that are left out.
    """

    intra: int
    callers: int
    batch: int
    order: str = "arrival"
    disabled: tuple[str, ...] = ()

    def text(self) -> str:
        parts = [f"intra {self.intra} × {self.callers} callers", f"batch {self.batch}"]
        if self.order != "arrival":
            parts.append({"window": "sorted in windows of 64", "all": "all sorted"}[self.order])
        if self.disabled:
            parts.append("without " + ",".join(self.disabled))
        return ", ".join(parts)


class Sessions:
    """Sessions by their options, opened once."""

    def __init__(self, workload: Workload) -> None:
        self._path = str(workload.model)
        self._open: dict[tuple[int, tuple[str, ...]], ort.InferenceSession] = {}

    def get(self, intra: int, disabled: tuple[str, ...] = ()) -> ort.InferenceSession:
        key = (intra, disabled)
        if key not in self._open:
            options = ort.SessionOptions()
            options.intra_op_num_threads = intra  # 0: ONNX Runtime's default, one for each processor
            self._open[key] = ort.InferenceSession(
                self._path, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled) or None
            )
        return self._open[key]


def grid(workload: Workload, cpus: int) -> list[Plan]:
    """Everything that a person would try: threads × batch × order × the one optimiser known to hurt."""
    threads = sorted({(1, 1), (1, cpus), (cpus, 1), (1, cpus + 1)})
    orders = ("arrival", "window", "all") if workload.ragged is not None else ("arrival",)
    disabled: tuple[tuple[str, ...], ...] = ((), ("SkipLayerNormFusion",)) if workload.ragged is not None else ((),)
    return [
        Plan(intra, callers, batch, order, without)
        for (intra, callers), batch, order, without in itertools.product(threads, workload.batches, orders, disabled)
        if not (batch == 1 and order != "arrival")
    ]


def rows_per_s(workload: Workload, sessions: Sessions, plan: Plan, seconds: float) -> float:
    """Rows answered in a second, over at least ``seconds`` and one batch for each caller."""
    session = sessions.get(plan.intra, plan.disabled)
    batches = _batches(workload, plan)
    lock, done = threading.Lock(), [0] * plan.callers
    session.run(workload.outputs, _stack([workload.feeds[0]], workload.ragged))  # not the first run of the session
    started = time.perf_counter()
    limit = started + seconds

    def call(slot: int) -> None:
        while True:
            with lock:
                rows = next(batches)
            answers = session.run(workload.outputs, _stack(rows, workload.ragged))
            # Every request gets rows of its own, as a server's does; views, which is the least that can be done.
            for row in range(len(rows)):
                [array[row : row + 1] for array in answers]
            done[slot] += len(rows)
            if time.perf_counter() >= limit:
                return

    threads = [threading.Thread(target=call, args=(slot,)) for slot in range(plan.callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)


def default_loop(workload: Workload, sessions: Sessions, seconds: float) -> float:
    """What most people write: a default ``InferenceSession``, one request after the other."""
    return rows_per_s(workload, sessions, Plan(0, 1, 1), seconds)


def _batches(workload: Workload, plan: Plan) -> Iterator[Sequence[Feed]]:
    feeds, axis = list(workload.feeds), workload.ragged

    def length(feed: Feed) -> int:
        return int(next(iter(feed.values())).shape[axis or 0])

    window = len(feeds) if plan.order == "all" else min(WINDOW, len(feeds))
    groups: list[Sequence[Feed]] = []
    for start in range(0, len(feeds), window):
        part = feeds[start : start + window]
        if plan.order != "arrival":
            part.sort(key=length)
        groups += [part[i : i + plan.batch] for i in range(0, len(part), plan.batch)]
    return itertools.cycle(groups)


def _stack(rows: Sequence[Feed], ragged: int | None) -> Feed:
    if len(rows) == 1:
        return rows[0]
    if ragged is None or len({next(iter(row.values())).shape[ragged] for row in rows}) == 1:
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    stacked: Feed = {}
    for name, first in rows[0].items():
        shape = [len(rows), *first.shape[1:]]
        shape[ragged] = max(row[name].shape[ragged] for row in rows)
        room: NDArray[Any] = np.zeros(shape, first.dtype)
        for index, row in enumerate(rows):
            # All of these models have their ragged axis right behind the batch axis.
            room[index, : row[name].shape[1]] = row[name][0]
        stacked[name] = room
    return stacked
