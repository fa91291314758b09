"""Dynamic batching, the asynchronous half: a bounded queue, deadlines, hand-over to a runner, answers to waiters.

A request goes one of two ways. What was measured to be shorter than a hop runs at once on the event loop
(``run_inline``). Everything else waits in a ``BatchQueue`` until a runner takes it (``infer``).

Who owns what: the loop owns waiters, timers and counters; the pool's lock guards the queue, the running jobs and the
cost model, which the loop and the runners share; a job's arrays belong to the runner until it is completed, then to
the loop. A batch belongs to the batcher. A caller that goes away leaves a dead ticket: dropped where it still waits,
skipped by the answer where it runs, and a run all of whose tickets are dead is ended early.

A run that fails is cut in two and both halves run again, down to single requests, so that one bad request costs its
neighbours time and nothing else: of n requests with one bad one at most 2·log2(n) further runs, of n bad ones 2n - 2.
The same is done with a run that lasted too long, because nobody knows whose fault it was.

Where runs happen in other processes, a run that ends its process is followed by one run for each of its requests, not
by halves, because each failure costs a process; and these have the model to themselves, so that the one at fault is
known and those that ran beside it are not blamed. Short runs there need no thread: the loop begins them and is told.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .backend import CostPoint, IsolatedSession, RunHandle, Session
from .batching import BatchQueue, Layout, Lengths, Part, Ticket, pieces
from .cost import CostModel
from .errors import (
    DeadlineExceededError,
    GatewayError,
    InternalError,
    ModelExecutionError,
    ModelFailingError,
    QueueFullError,
    ShuttingDownError,
    WorkerCrashedError,
)
from .model_config import ModelConfig
from .runners import Job, RunnerPool
from .stats import ModelStats
from .tensors import DTYPES, Arrays, Signature

_log = logging.getLogger(__name__)

SPLIT_RUN_S: Final = 0.25
"""How long a run of one large request may take where the model has no bound of rows: others want their turn."""
SPLIT_ROWS: Final = 256
"""Rows of a run of one large request while the model's cost is not known."""
INLINE_SLOW_S: Final = 5e-4
"""An inline run that takes longer was not short: five times the 100 µs that a hop costs."""
INLINE_STRIKES: Final = 5
"""So many slow inline runs, each within ``INLINE_STRIKE_RUNS`` runs of the one before, end inline running for good."""
INLINE_STRIKE_RUNS: Final = 64
CLOSE_LIMIT_S: Final = 30.0
RETRY_AFTER_BOUNDS_S: Final = (0.05, 30.0)


WAITED_SLOW_S: Final = 2.5e-4
"""A run in another process that the event loop waits for is not to take longer; waking a process that sleeps and being
woken by it takes 50 µs, and more where others want the processor."""
WAITED_SHARE: Final = 0.2
"""Of the time, that the loop may wait beyond that. A process may say that its runs are short and let them be long."""
WAITED_BURST_S: Final = 0.02
CROWD: Final = 32
"""So many requests in a row have to come while no other is there before the loop waits for their runs again."""
COMPANY_COST: Final = 1.25
"""A lone row is given a copy of itself, for bits that no company changes, where two rows cost at most so many times
one: for small models, not for those that compute, whose single requests would take up to twice as long for a difference
in the seventh digit. Nothing is to be slower than unbatched unless its operator asks for that."""


@dataclass(slots=True)
class InferenceRequest:
    """One request for one model version, checked against the signature before.

    Attributes:
        inputs: input name to array, as ``Signature.check`` accepted them.
        outputs: resolved names of the outputs asked for, in the caller's order, never empty.
        rows: what ``Signature.check`` returned.
        nbytes: payload bytes of the inputs, counted against the queue's bound.
        priority: 1 is first; 0 takes the model's default.
        deadline: moment on the monotonic clock after which nobody wants the answer.
        queue_timeout_s: how long the request may wait before its run begins (the protocol's ``timeout``).
        origin: headers by which servers elsewhere recognise the request, such as its id; passed on with it.
        depth: how many pipelines it came through.
        allowance: runs that these may still make for it; None where it came through none.
        asker: who asks, where that may decide which version of a pipeline's step answers.
    """

    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...]
    rows: int
    nbytes: int
    priority: int = 0
    deadline: float | None = None
    queue_timeout_s: float | None = None
    origin: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)
    depth: int = field(default=0, kw_only=True)
    allowance: Allowance | None = field(default=None, kw_only=True)
    asker: Asker | None = field(default=None, kw_only=True)
    begun: _Waiter | None = field(default=None, kw_only=True)
    """Set by ``Batcher.run_inline`` where its run was begun and lasts; for ``Batcher.infer`` alone."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, as sticky aliases know a caller.

    Attributes:
        key_id: of the key; empty where there is none.
        fields: headers, names in lower case.
    """

    key_id: str
    fields: Mapping[bytes, bytes]


@dataclass(slots=True)
class Allowance:
    """Runs that pipelines may still make for one request, counted together: pipelines in pipelines multiply."""

    left: int


@dataclass(slots=True)
class Answer:
    """The outputs of one request and where its time went.

    Attributes:
        outputs: in the order of ``request.outputs``; axis 0 holds the request's own rows; C-contiguous.
        queue_s: from submission to the start of assembling; assemble_s: stacking and padding; run_s: inside the
            session; split_s: cutting the outputs apart. For a request that took several runs these are sums, but for
            ``queue_s``, which ends when the first begins.
        batch_rows: rows of the run it shared, its own included; the largest of several.
        upstream_attempts: calls of servers elsewhere that were made for it; 0 where it stayed in the gateway.
    """

    outputs: list[NDArray[Any]]
    queue_s: float
    assemble_s: float
    run_s: float
    split_s: float
    batch_rows: int
    upstream_attempts: int = 0


@dataclass(slots=True, eq=False)
class _Waiter(Ticket):
    """A ticket somebody awaits. Beside ``Ticket``'s, all of this belongs to the loop, but for ``merged``.

    Once it is answered it holds on to nothing large: the queue and the timer may know it for a while.
    """

    future: asyncio.Future[Answer] | None = field(kw_only=True)
    """None: answered, or nobody waits any more."""
    rows: int = field(kw_only=True)
    counted_rows: int = field(kw_only=True)
    """What the statistics count: nothing for the row that stands in for a request of none."""
    open: int = 1
    """Parts without a result."""
    merged: list[NDArray[Any]] | None = None
    """Outputs of a request of several parts, which each part's runner fills in. Allocated under the lock."""
    outcome: Answer | GatewayError | None = None
    queue_s: float = -1.0
    assemble_s: float = 0.0
    run_s: float = 0.0
    split_s: float = 0.0
    batch_rows: int = 0


class Batcher:
    """Puts the requests to one model version together and runs them.

    Args:
        name: of the model version, for the log.
        session: used by this batcher alone; closed by whoever opened it, after ``close``.
        runners: open, on the running loop.
        run_timeout_s: a run that takes longer is ended; ``config.run_timeout_s`` overrides it.
        clock: seconds on the clock of the requests' deadlines; None takes the pool's.
    Raises:
        ModelLoadError: the configured padding does not fit the signature.
    """

    def __init__(
        self,
        session: Session,
        config: ModelConfig,
        stats: ModelStats,
        runners: RunnerPool,
        *,
        run_timeout_s: float,
        clock: Callable[[], float] | None = None,
        name: str = "a model",
    ) -> None:
        signature, profile, policy = session.signature, session.profile, config.batching
        self._name = name
        self._session = session
        self._run = session.run
        self._stats = stats
        self._runners = runners
        self._lock = runners.lock
        self._clock = clock or runners.clock
        self._run_timeout_s = config.run_timeout_s if config.run_timeout_s is not None else run_timeout_s
        self._isolated = session if isinstance(session, IsolatedSession) else None
        if self._isolated is not None:
            self._instances = self._isolated.lanes
        else:
            self._instances = config.instances or max(runners.threads // profile.intra_op_threads, 1)
        self._batched = signature.batched
        self._order = signature.output_names
        self.batching: Final = signature.batched and (profile.batchable if policy.enabled is None else policy.enabled)
        """Whether rows of different requests share runs."""
        needs_company = signature.batched and profile.row_exactness == "padded"
        self._pad_lone = needs_company and (
            self.batching and _company_is_cheap(profile.cost) if policy.row_exact is None else policy.row_exact
        )
        self._max_rows = signature.max_rows if signature.batched else 0
        # Cutting a request apart changes results where rows depend on their mates, so only a hard bound does it there.
        self._may_cut = signature.batched and (self.batching or profile.row_exactness in ("exact", "padded"))
        self._layout = Layout(signature, policy, pad_lone_rows=self._pad_lone)
        stretched = self.batching and self._layout.free
        alike = profile.row_exactness in ("exact", "unbatched") or self._pad_lone
        self.row_exact: Final = alike and not stretched
        """Whether a row's result has the same bits whatever ran with it; padding to a mate's length may change them."""
        self.costs: Final = CostModel(
            profile.cost,
            row_elements=profile.cost_row_elements,
            max_rows=self._max_rows,
            lone_rows=2 if self._pad_lone else 1,
            variable=self._layout.variable,
        )
        self._queue = BatchQueue(policy, self._layout, self.costs, batching=self.batching, max_rows=self._max_rows)
        self._preserve_order = policy.preserve_order
        self._unsent: dict[int, deque[_Waiter]] = {}

        self._waiters: set[_Waiter] = set()
        self._again: deque[list[Part]] = deque()
        self._suspects: deque[Part] = deque()
        """Parts of runs that ended their process; each is tried once more, with nothing beside it."""
        self._answer_row_bytes = 0
        """Of the outputs of one row, lately: the loop copies small answers only."""
        self._jobs: set[BatchRun] = set()
        self._expiries: list[tuple[float, int, _Waiter]] = []
        self._serial = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._asked_at = -math.inf
        """When ``take`` was called last."""
        self._gathering = False
        self._draining = False
        self._quiet: asyncio.Event = asyncio.Event()

        # Whoever comes is taken for alone only where it is cheap to be wrong: lengths that are filled up need a layout.
        quick = self._isolated is not None and not self._layout.pads
        self._quick_elements = self._isolated.quick_max_elements if self._isolated is not None and quick else 0
        self._crowd = 0
        self._wait_debt_s = 0.0
        self._wait_debt_at = 0.0
        self._waited = False
        """In this turn of the loop it waited for a run."""
        self._inline_elements = profile.inline_max_elements
        self._inline_trusted = config.session.inline is True
        self._inline_strikes = 0
        self._inline_struck_at = 0
        if self._isolated is not None:
            self._isolated.watch(lambda: runners.call(self._capacity_changed))

    @property
    def signature(self) -> Signature:
        """What requests are checked against."""
        return self._session.signature

    @property
    def inline(self) -> bool:
        """Whether ``run_inline`` may answer at all."""
        return self._inline_elements > 0 or (self._quick_elements > 0 and not self._crowd)

    @property
    def in_flight(self) -> int:
        """Requests that were taken and have no answer yet. None is, between two events, of those that run inline."""
        return len(self._waiters)

    # -- requests ------------------------------------------------------------------------------------------------------

    def run_inline(self, request: InferenceRequest) -> Answer | None:
        """Run at once on the event loop where that is cheaper than a hop.

        Returns:
            The answer, or None where the request must be awaited through ``infer``: its run may be long, others wait
            before it, it has no rows or too many, its deadline has passed, or the model drains. A run in another
            process may have been begun and not have ended: ``infer`` then waits for that one.
        Raises:
            ModelExecutionError: the model failed.
        """
        if self._quick_elements:
            return self._run_waited(request)
        bound = self._inline_elements
        if not bound or self._queue.requests or len(self._jobs) >= self._instances:
            return None
        inputs: Arrays = request.inputs
        for array in inputs.values():
            bound -= array.size
        rows = request.rows
        if bound < 0 or not rows or (self._max_rows and rows > self._max_rows):
            return None
        if request.deadline is not None and self._clock() >= request.deadline:
            return None
        begun = started = time.perf_counter()
        padded = rows == 1 and self._pad_lone
        if padded:
            inputs = {name: np.concatenate((array, array)) for name, array in inputs.items()}
            started = time.perf_counter()
        try:
            outputs = self._run(inputs, request.outputs)
        except GatewayError:
            raise
        except Exception as error:
            raise _failure(error) from error
        ended = time.perf_counter()
        if padded:
            outputs = [array[:1] for array in outputs]
        run_s = ended - started
        assemble_s = started - begun
        self._stats.ran_alone(rows, assemble_s, run_s)
        if run_s > INLINE_SLOW_S:
            self._strike(run_s)
        return Answer(outputs, 0.0, assemble_s, run_s, 0.0, rows)

    def _run_waited(self, request: InferenceRequest) -> Answer | None:
        """Have another process run a request that is the only one around, and wait for it on the event loop.

        Coming back to the loop for the answer takes two of its turns, a task and a future, which is more than the run.
        The processor is free meanwhile. In a crowd that would keep requests from sharing runs, so it is not done there.
        """
        session = self._isolated
        assert session is not None
        rows = request.rows
        bound = self._quick_elements
        for array in request.inputs.values():
            bound -= array.size
        if (
            self._crowd  # ``infer`` sees to that it does not stay so
            or self._draining
            or self._suspects
            or not rows
            or bound < 0
            or request.nbytes > session.begin_max_bytes
            or rows * self._answer_row_bytes > session.begin_max_bytes
            or (self._max_rows and rows > self._max_rows)
            or self._has_company()
            or session.refusal() is not None
            or (request.deadline is not None and self._clock() >= request.deadline)
        ):
            return None
        started = time.perf_counter()
        inputs: Arrays = request.inputs
        padded = rows == 1 and self._pad_lone
        if padded:
            inputs = {name: np.concatenate((array, array)) for name, array in inputs.items()}
        assembled = time.perf_counter()
        handle = RunHandle()
        run: BatchRun | None = None
        early: list[NDArray[Any]] | GatewayError | None = None

        def done(outcome: list[NDArray[Any]] | GatewayError) -> None:
            nonlocal early
            if run is None:
                early = outcome
                return
            run.run_s = time.perf_counter() - assembled
            self._take_apart(run, request.outputs, outcome)
            run.work_s = run.assemble_s + run.run_s
            self._runners.ended(run)

        self._waited = True
        asyncio.get_running_loop().call_soon(self._turned)
        if not session.begin(inputs, request.outputs, handle, done, wait=True):
            return None
        ended = time.perf_counter()
        paid_s = WAITED_SHARE * (ended - self._wait_debt_at)
        self._wait_debt_at = ended
        self._wait_debt_s = max(self._wait_debt_s - paid_s, 0.0) + max(ended - assembled - WAITED_SLOW_S, 0.0)
        if self._wait_debt_s > WAITED_BURST_S:
            self._crowd = CROWD
        outputs = early
        if isinstance(outputs, list):
            if self._batched:
                self._require_rows(outputs, request.outputs, rows + padded)
            self._answer_row_bytes = sum(array.nbytes for array in outputs) // (rows + padded)
            if padded:
                outputs = [array[:1] for array in outputs]
            self._stats.ran_alone(rows, assembled - started, ended - assembled)
            return Answer(outputs, 0.0, assembled - started, ended - assembled, 0.0, rows)
        if isinstance(outputs, GatewayError) and not isinstance(outputs, WorkerCrashedError):
            raise outputs
        run = self._went_on(request, handle, rows + padded, assembled - started)
        if outputs is not None:
            done(outputs)
        return None

    def _went_on(self, request: InferenceRequest, handle: RunHandle, stacked_rows: int, assemble_s: float) -> BatchRun:
        """Keep a run that was waited for in vain, or whose process died, as one that went through the queue is kept."""
        now = self._clock()
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        # Nobody may come for it: a request that cannot be told of its answer has none.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        rows = request.rows
        deadline = math.inf if request.deadline is None else request.deadline
        level = self._queue.level(request.priority)
        waiter = _Waiter(request.outputs, level, deadline, future=future, rows=rows, counted_rows=rows)
        key, lengths, elements = self._layout.place(request.inputs, rows)
        part = Part(waiter, request.inputs, rows, request.nbytes, 0, key, lengths, elements, now, deadline, level)
        waiter.parts.append(part)
        waiter.begun = True
        run = BatchRun(self, [part], now + self._run_timeout_s, handle)
        run.direct = True
        run.begun, run.rows, run.elements = now, rows, elements
        run.stacked_rows, run.assemble_s = stacked_rows, assemble_s
        with self._lock:
            self._jobs.add(run)
            self._runners.adopt(run)
        self._waiters.add(waiter)
        if self._preserve_order:
            self._unsent.setdefault(level, deque()).append(waiter)
        if deadline < math.inf:
            self._watch(deadline, waiter)
        self._arm(now)
        self._gauge()
        request.begun = waiter
        return run

    async def infer(self, request: InferenceRequest) -> Answer:
        """Queue, batch, run and split.

        Cancelling is safe at any time: a request that waits is dropped, one that runs leaves its mates alone.

        Raises:
            QueueFullError: the queue is at a bound; says when to come back.
            DeadlineExceededError: the deadline or the queue timeout passed, or the request's own run took too long.
            ModelExecutionError: the model failed on this very request.
            ShuttingDownError: the model drains.
        """
        if request.begun is not None:
            return await self._answer_of(request.begun)
        if self._draining:
            raise ShuttingDownError("the model version is being taken out of service")
        if self._isolated is not None and (refused := self._isolated.refusal()) is not None:
            raise refused
        if request.deadline is not None and self._clock() >= request.deadline:
            raise DeadlineExceededError("the deadline had passed before the request was queued")
        rows = request.rows
        if not rows and self._batched:
            known = self._no_rows(request)
            if isinstance(known, Answer):
                return known
            request = known
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiter = self._admit(request, rows, future)
        answer = await self._answer_of(waiter)
        if rows != request.rows:
            answer.outputs = [array[:0] for array in answer.outputs]
        return answer

    async def _answer_of(self, waiter: _Waiter) -> Answer:
        future = waiter.future
        assert future is not None
        try:
            return await future
        except asyncio.CancelledError:
            self._abandon(waiter)
            raise

    async def drain(self, timeout_s: float) -> int:
        """Take no new work, and wait for what there is.

        What has no answer after ``timeout_s`` seconds gets ``ShuttingDownError``, and its runs are ended.

        Returns:
            How many requests were given up on.
        """
        self._draining = True
        self._inline_elements = 0
        with self._lock:
            self._queue.hurry = True
            self._runners.offer(self)
        self._runners.launch()
        self.refresh()
        try:
            async with asyncio.timeout(timeout_s):
                while self._waiters:
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            pass
        given_up = list(self._waiters)
        for waiter in given_up:
            self._settle(waiter, ShuttingDownError("the model version was taken out of service"))
        return len(given_up)

    async def close(self) -> bool:
        """Drain at once and wait for the runs to end.

        Returns:
            True: no run is left and the session may be closed. False: a run did not end within ``CLOSE_LIMIT_S``.
        """
        await self.drain(0)
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                while self._jobs:
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            _log.error("%s: %d runs did not end within %g s", self._name, len(self._jobs), CLOSE_LIMIT_S)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._isolated is not None:
            self._isolated.watch(None)
        return not self._jobs

    def _admit(self, request: InferenceRequest, counted_rows: int, future: asyncio.Future[Answer]) -> _Waiter:
        """Queue a request, or raise what refuses it."""
        now = self._clock()
        queue = self._queue
        rows, nbytes = request.rows, request.nbytes
        level = queue.level(request.priority)
        waiter = _Waiter(
            request.outputs,
            level,
            math.inf if request.deadline is None else request.deadline,
            future=future,
            rows=rows,
            counted_rows=counted_rows,
        )
        expires = min(now + queue.timeout_s(level, request.queue_timeout_s), waiter.deadline)
        key, lengths, elements = self._layout.place(request.inputs, rows)
        with self._lock:
            refused = queue.refusal(level, rows, nbytes)
            if refused is not None:
                raise QueueFullError(f"the model's queue is full: {refused}", retry_after_s=self._retry_after_s())
            ranges = pieces(rows, self._most_rows(elements)) if self._may_cut or self._max_rows else [(0, rows)]
            for start, end in ranges:
                inputs: Arrays = request.inputs
                if len(ranges) > 1:
                    inputs = {name: array[start:end] for name, array in inputs.items()}
                share = nbytes * end // max(rows, 1) - nbytes * start // max(rows, 1)
                part = Part(waiter, inputs, end - start, share, start, key, lengths, elements, now, expires)
                waiter.parts.append(part)
            waiter.open = len(ranges)
            if self._quick_elements:
                self._has_company()
            gather = queue.worth_waiting() and not self._runners.saturated
            queue.push(waiter)
            self._runners.offer(self, later=gather)
        self._waiters.add(waiter)
        if self._preserve_order:
            self._unsent.setdefault(level, deque()).append(waiter)
        if gather and not self._gathering:
            # Requests that one turn of the loop brings in leave together. That costs a turn, some microseconds, and is
            # done only where the model gains from company.
            self._gathering = True
            asyncio.get_running_loop().call_soon(self._gathered)
        if expires < math.inf:
            self._watch(expires, waiter)
        self._gauge()
        if expires < self._timer_at or self._unwatched(now):
            self._arm(now)
        self._runners.launch()
        return waiter

    def _has_company(self) -> bool:
        """Whether the request that comes now is not the only one, or those before it were not.

        One that comes in the turn of the loop in which another was waited for came together with it.
        """
        if self._waiters or self._waited or self._runners.busy:
            self._crowd = CROWD
        elif self._crowd:
            self._crowd -= 1
        return self._crowd > 0

    def _turned(self) -> None:
        self._waited = False

    def _gathered(self) -> None:
        self._gathering = False
        with self._lock:
            self._runners.offer(self)
        self._runners.launch()
        self.refresh()

    def _capacity_changed(self) -> None:
        """The session's processes came or went, or it is to be left alone for a while."""
        assert self._isolated is not None
        refused = self._isolated.refusal()
        if refused is not None:
            for waiter in list(self._waiters):
                self._settle(waiter, refused)
        with self._lock:
            self._runners.offer(self)
        self._runners.launch()
        self.refresh()

    def _no_rows(self, request: InferenceRequest) -> Answer | InferenceRequest:
        """Answer a request for no rows, which many models cannot run, or say what to run in its place.

        Where the shape of an output is not known without a run, that is one row of zeros, to be cut away.
        """
        specs = [self._session.signature.output(name) for name in request.outputs]
        if all(-1 not in spec.shape[1:] for spec in specs):
            self._stats.answered(0, 0.0, 0.0, 0.0, 0.0)
            outputs = [np.empty((0, *spec.shape[1:]), DTYPES[spec.datatype]) for spec in specs]
            return Answer(outputs, 0.0, 0.0, 0.0, 0.0, 0)
        zeros: dict[str, NDArray[Any]] = {}
        for name, array in request.inputs.items():
            blank = "" if array.dtype == np.dtype(object) else 0
            zeros[name] = np.full((1, *array.shape[1:]), blank, dtype=array.dtype)
        return replace(request, inputs=zeros, rows=1)

    def _most_rows(self, elements: int) -> int:
        """The rows of one request that go into one run; 0 for all. Lock held."""
        if self._max_rows or not self._may_cut:
            return self._max_rows
        if not self.costs.known:
            return SPLIT_ROWS
        curve = self.costs.curve(elements)
        most = curve.rows_within(SPLIT_RUN_S)
        if most == curve.points[-1].rows:
            most = int(most * SPLIT_RUN_S / curve.seconds(most))
        return max(most, curve.target)

    def _retry_after_s(self) -> float:
        """When the queue will have emptied at the present speed. Lock held."""
        if not self.costs.known:
            return 1.0
        curve = self.costs.latest
        at_once = min(self._instances, self._runners.threads)
        wait_s = self._queue.rows / curve.target * curve.seconds(curve.target) * self.costs.stretch / at_once
        low, high = RETRY_AFTER_BOUNDS_S
        return min(max(wait_s, low), high)

    # -- what becomes of a waiter --------------------------------------------------------------------------------------

    def _abandon(self, waiter: _Waiter) -> None:
        """The caller went away."""
        if waiter.live:
            if not waiter.begun:
                self._stats.dropped_cancelled += 1
            self._forget(waiter)
        waiter.future = waiter.outcome = None

    def _settle(self, waiter: _Waiter, outcome: Answer | GatewayError) -> None:
        """Answer a waiter, once; in order of arrival where that was promised."""
        if not waiter.live:
            return
        waiter.outcome = outcome
        self._forget(waiter)
        if not self._preserve_order:
            self._send(waiter)

    def _forget(self, waiter: _Waiter) -> None:
        """Nothing more is done for this waiter."""
        waiter.live = False
        self._waiters.discard(waiter)
        if waiter.open:
            with self._lock:
                self._queue.remove(waiter)
                for job in self._jobs:
                    if not any(part.ticket.live for part in job.parts):
                        job.handle.terminate()
            self._gauge()
        waiter.parts.clear()
        waiter.merged = None
        if self._preserve_order:
            line = self._unsent[waiter.level]
            while line and not line[0].live:
                self._send(line.popleft())
        if not self._waiters:
            self._quiet.set()

    def _send(self, waiter: _Waiter) -> None:
        future, outcome = waiter.future, waiter.outcome
        waiter.future = waiter.outcome = None
        if future is None or future.done() or outcome is None:
            return
        if isinstance(outcome, Answer):
            self._stats.answered(
                waiter.counted_rows, outcome.queue_s, outcome.assemble_s, outcome.run_s, outcome.split_s
            )
            future.set_result(outcome)
        else:
            future.set_exception(outcome)

    def _strike(self, run_s: float) -> None:
        """An inline run was slow. Once it is a habit, the model runs on the runners for good."""
        runs = self._stats.execution_count
        recent = runs - self._inline_struck_at <= INLINE_STRIKE_RUNS
        self._inline_struck_at = runs
        self._inline_strikes = self._inline_strikes + 1 if recent else 1
        if self._inline_strikes >= INLINE_STRIKES and not self._inline_trusted:
            self._inline_elements = 0
            _log.warning(
                "%s: runs were measured short and are not, the last took %.0f µs; they leave the event loop for good",
                self._name,
                run_s * 1e6,
            )

    # -- time ----------------------------------------------------------------------------------------------------------

    def _watch(self, moment: float, waiter: _Waiter) -> None:
        """Look after a waiter at ``moment``."""
        if len(self._expiries) > 2 * len(self._waiters) + 64:
            # Most requests are answered long before their deadline.
            self._expiries = [entry for entry in self._expiries if entry[2].future is not None]
            heapq.heapify(self._expiries)
        self._serial += 1
        heapq.heappush(self._expiries, (moment, self._serial, waiter))

    def _unwatched(self, now: float) -> bool:
        """Whether something may be due before the timer. A timer within a run's time sees to all runs that began."""
        return self._timer_at > now + self._run_timeout_s or self._queue.delayed

    def _arm(self, now: float) -> None:
        """Let ``_tick`` be called when the next thing is due, unless it is called before that anyway."""
        at = self._expiries[0][0] if self._expiries else math.inf
        if self._jobs:
            at = min([at, *(job.limit_at for job in self._jobs.copy())])
        if self._queue.delayed and self._queue.requests:
            with self._lock:
                due = self._queue.due(now)
                # A timer may fire up to a millisecond early, so that what was asked for it just before is due only now.
                # What was asked for in vain since then waits for a runner or a process, whose end asks again.
                if due is not None and due <= now and (self._asked_at >= due or self._runners.offered(self)):
                    due = None
            if due is not None:
                at = min(at, due)
        if at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            # Event loops count in milliseconds: asking for less would make them spin until the moment has come.
            self._timer = asyncio.get_running_loop().call_later(max(at - now, 0.001), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            waiter = heapq.heappop(self._expiries)[2]
            if waiter.future is not None and not waiter.future.done():
                self._expire(waiter, waiter.future, now)
        with self._lock:
            for job in self._jobs:
                if job.limit_at <= now:
                    job.limit_at = math.inf
                    job.handle.terminate()
            if self._queue.requests:
                self._runners.offer(self)
        self._runners.launch()
        self.refresh()

    def _expire(self, waiter: _Waiter, future: asyncio.Future[Answer], now: float) -> None:
        if now >= waiter.deadline:
            error = DeadlineExceededError(
                f"the deadline of the request passed while it {'ran' if waiter.begun else 'waited'}"
            )
            if waiter.live:
                self._settle(waiter, error)
            else:
                future.set_exception(error)  # answered, and held back until those before it are
            return
        # The queue's timeout. It binds until the first run begins.
        if waiter.waiting and not waiter.begun:
            if not self._queue.delays(waiter.level):
                self._settle(waiter, DeadlineExceededError("the request waited longer than its queue timeout"))
                return
            with self._lock:
                self._queue.put_last(waiter)
        if waiter.deadline < math.inf:
            self._watch(waiter.deadline, waiter)

    def _gauge(self) -> None:
        stats, queue = self._stats, self._queue
        stats.queued_requests = queue.requests
        stats.queued_rows = queue.rows
        stats.queued_bytes = queue.nbytes
        stats.running = len(self._jobs)

    # -- as a source of jobs -------------------------------------------------------------------------------------------

    def take(self, now: float) -> Job | None:
        """The next batch, unless as many runs as there are instances go on. Lock held, any thread."""
        self._asked_at = now
        running = len(self._jobs)
        if self._isolated is not None:
            if running >= min(self._instances, self._isolated.capacity):
                return None
            if self._suspects or running:
                if any(job.alone for job in self._jobs):
                    return None
                suspect = self._next_suspect()
                if suspect is not None:
                    # Whoever waits for the runs that go on hears of their end: then this is asked again.
                    if running:
                        self._suspects.appendleft(suspect)
                        return None
                    return self._job([suspect], now, alone=True)
        elif running >= self._instances:
            return None
        parts: list[Part] | None = None
        while self._again and not parts:
            parts = [part for part in self._again.popleft() if part.ticket.live]
        if not parts:
            parts = self._queue.take(now)
        if not parts:
            return None
        return self._job(parts, now)

    def _next_suspect(self) -> Part | None:
        while self._suspects:
            part = self._suspects.popleft()
            if part.ticket.live:
                return part
        return None

    def _job(self, parts: list[Part], now: float, *, alone: bool = False) -> BatchRun:
        job = BatchRun(self, parts, now + self._run_timeout_s, alone=alone)
        if self._isolated is not None:
            bound = self._isolated.begin_max_bytes
            rows = sum(part.rows for part in parts)
            job.direct = sum(part.nbytes for part in parts) <= bound and rows * self._answer_row_bytes <= bound
        self._jobs.add(job)
        return job

    def completed(self, job: Job) -> bool:
        """Learn from a run, and put what failed together back to be run apart. Lock held, any thread."""
        assert isinstance(job, BatchRun)
        self._jobs.discard(job)
        if job.error is None:
            if job.physical_rows:
                wall_s = job.assemble_s + job.run_s + job.split_s
                self.costs.learn(job.elements, job.physical_rows, wall_s, job.work_s)
        elif self._isolated is not None and self._try_apart(job, self._isolated):
            job.again = True
            return True
        elif self._isolated is None and len(job.parts) > 1:
            middle = (len(job.parts) + 1) // 2
            self._again.append(job.parts[:middle])
            self._again.append(job.parts[middle:])
            job.again = True
            return True
        for part in job.parts:
            part.inputs = {}  # the queue may still hold the part as a husk
        return bool(self._again or self._suspects or self._queue.requests)

    def _try_apart(self, job: BatchRun, session: IsolatedSession) -> bool:
        """Whether the requests of a run that failed in another process are tried again. Lock held."""
        error = job.error
        if isinstance(error, WorkerCrashedError):
            if job.alone:
                session.convict()
                job.error = WorkerCrashedError(
                    "the model's process died of this request, twice, the second time with nothing beside it"
                )
                return False
            self._suspects.extend(job.parts)
            return True
        if isinstance(error, ModelFailingError) or len(job.parts) == 1:
            return False
        if isinstance(error, DeadlineExceededError):
            self._suspects.extend(job.parts)  # one more that does not end may cost the process
            return True
        middle = (len(job.parts) + 1) // 2
        self._again.append(job.parts[:middle])
        self._again.append(job.parts[middle:])
        return True

    def refresh(self) -> None:
        """Bring the gauges and the timer up to date with what the runners did. On the event loop."""
        self._gauge()
        now = self._clock()
        if self._unwatched(now):
            self._arm(now)
        if not self._jobs:
            self._quiet.set()

    def fail(self, error: Exception) -> None:
        """Answer everybody after a defect and take no more. On the event loop."""
        _log.error("%s: batching failed, the model takes no more requests", self._name, exc_info=error)
        self._draining = True
        self._inline_elements = 0
        for waiter in list(self._waiters):
            self._settle(waiter, InternalError("the gateway failed to put the request's batch together"))

    @property
    def ready(self) -> bool:
        """Whether requests are taken: neither draining nor failed."""
        return not self._draining

    def execute(self, job: BatchRun) -> None:
        """Stack, run and split one batch, on a runner thread."""
        used = time.thread_time()
        stacked = self._stack(job)
        if stacked is None:
            return
        inputs, names = stacked
        started = time.perf_counter()
        outcome: list[NDArray[Any]] | GatewayError
        try:
            outcome = self._run(inputs, names, job.handle)
        except GatewayError as error:
            outcome = error
        except Exception as error:
            outcome = _failure(error)
        job.run_s = time.perf_counter() - started
        self._take_apart(job, names, outcome)
        # What another process works cannot be seen from here: it counts as working for as long as it takes.
        wall_s = job.assemble_s + job.run_s + job.split_s
        job.work_s = time.thread_time() - used if self._isolated is None else wall_s

    def begin(self, job: BatchRun) -> bool:
        """Stack one batch and have another process run it, on the event loop; False: a thread has to."""
        assert self._isolated is not None
        stacked = self._stack(job)
        if stacked is None:
            self._runners.ended(job)
            return True
        inputs, names = stacked
        started = time.perf_counter()

        def done(outcome: list[NDArray[Any]] | GatewayError) -> None:
            job.run_s = time.perf_counter() - started
            self._take_apart(job, names, outcome)
            job.work_s = job.assemble_s + job.run_s + job.split_s
            self._runners.ended(job)

        try:
            return self._isolated.begin(inputs, names, job.handle, done)
        except Exception as error:
            done(_failure(error))
            return True

    def _stack(self, job: BatchRun) -> tuple[Arrays, tuple[str, ...]] | None:
        """Inputs of the run and the outputs to ask for; None: nobody waits any more, or it failed."""
        parts = job.parts = [part for part in job.parts if part.ticket.live]
        if not parts:
            return None
        for part in parts:
            part.ticket.begun = True
        job.begun = self._clock()
        start = time.perf_counter()
        try:
            job.target = self._layout.target(parts)
            inputs, job.stacked_rows = self._layout.stack(parts, job.target)
            names = self._union(parts)
            job.elements = self._layout.row_elements(parts[0], job.target)
            job.rows = sum(part.rows for part in parts)
        except GatewayError as error:
            job.error = error
            return None
        except Exception:
            _log.exception("a batch could not be assembled")
            job.error = InternalError("the gateway failed to put the request's batch together")
            return None
        job.assemble_s = time.perf_counter() - start
        return inputs, names

    def _take_apart(self, job: BatchRun, names: tuple[str, ...], outcome: list[NDArray[Any]] | GatewayError) -> None:
        """Give each part its rows of the outputs."""
        if isinstance(outcome, GatewayError):
            job.error = outcome
            return
        start = time.perf_counter()
        parts = job.parts
        try:
            if self._batched:
                self._require_rows(outcome, names, job.stacked_rows)
            if self._isolated is not None:
                self._answer_row_bytes = sum(array.nbytes for array in outcome) // max(job.stacked_rows, 1)
            job.results = self._layout.split(outcome, names, parts, job.target)
            for part, own in zip(parts, job.results, strict=True):
                assert isinstance(part.ticket, _Waiter)
                if part.rows != part.ticket.rows:
                    self._merge(part, part.ticket, own)
            job.split_s = time.perf_counter() - start
            job.physical_rows = job.stacked_rows
        except GatewayError as error:
            job.error = error
        except Exception:
            _log.exception("a batch could not be taken apart")
            job.error = InternalError("the gateway failed to put the request's batch together")

    def _union(self, parts: list[Part]) -> tuple[str, ...]:
        """The outputs that any of the parts asked for; in the caller's order where all agree."""
        first = parts[0].ticket.outputs
        if all(part.ticket.outputs == first for part in parts):
            return first
        wanted = {name for part in parts for name in part.ticket.outputs}
        return tuple(name for name in self._order if name in wanted)

    def _require_rows(self, outputs: list[NDArray[Any]], names: tuple[str, ...], rows: int) -> None:
        for name, array in zip(names, outputs, strict=True):
            if array.ndim == 0 or len(array) != rows:
                got = "a scalar" if array.ndim == 0 else f"{len(array)}"
                raise ModelExecutionError(f"output '{name}' of the model should have {rows} rows, got {got}")

    def _merge(self, part: Part, waiter: _Waiter, own: list[NDArray[Any]]) -> None:
        """Write one part's outputs to their place in the whole request's."""
        with self._lock:
            if waiter.merged is None:
                waiter.merged = [np.empty((waiter.rows, *a.shape[1:]), a.dtype) for a in own]
            merged = waiter.merged
        for name, whole, array in zip(waiter.outputs, merged, own, strict=True):
            if whole.shape[1:] != array.shape[1:]:
                raise ModelExecutionError(
                    f"output '{name}' of the model has a shape that depends on the rows, {list(whole.shape[1:])} and "
                    f"{list(array.shape[1:])}: a request of more than {part.rows} rows cannot be put together"
                )
            whole[part.start : part.start + part.rows] = array

    def finish(self, job: BatchRun) -> None:
        """Answer the waiters of a run, on the event loop."""
        if job.begun is None:
            return
        if job.rows:
            self._stats.ran(job.rows, job.assemble_s, job.run_s, job.split_s)
        for number, part in enumerate(job.parts):
            waiter = part.ticket
            assert isinstance(waiter, _Waiter)
            if waiter.queue_s < 0:
                waiter.queue_s = max(job.begun - part.queued_at, 0.0)
            if job.error is not None:
                if not job.again:
                    self._settle(waiter, self._explained(job, job.error))
                continue
            own = job.results[number]
            waiter.assemble_s += job.assemble_s
            waiter.run_s += job.run_s
            waiter.split_s += job.split_s
            waiter.batch_rows = max(waiter.batch_rows, job.rows)
            waiter.open -= 1
            if not waiter.open:
                answer = Answer(
                    own if waiter.merged is None else waiter.merged,
                    waiter.queue_s,
                    waiter.assemble_s,
                    waiter.run_s,
                    waiter.split_s,
                    waiter.batch_rows,
                )
                self._settle(waiter, answer)

    def _explained(self, job: BatchRun, error: GatewayError) -> GatewayError:
        if isinstance(error, DeadlineExceededError) and job.limit_at == math.inf:
            return DeadlineExceededError(f"the run took longer than the {self._run_timeout_s:g} s that it may take")
        return error


@dataclass(slots=True, eq=False)
class BatchRun:
    """One batch on its way. Written by the runner until it is completed, then by the loop."""

    source: Batcher
    parts: list[Part]
    limit_at: float
    handle: RunHandle = field(default_factory=RunHandle)
    begun: float | None = None
    rows: int = 0
    """Rows of the requests; 0 until a run was assembled."""
    physical_rows: int = 0
    """Rows that were run, a padded lone row's copy included; 0 until a run succeeded."""
    elements: int = 0
    assemble_s: float = 0.0
    run_s: float = 0.0
    split_s: float = 0.0
    work_s: float = 0.0
    """For how much of all that the runner's thread had the processor."""
    results: list[list[NDArray[Any]]] = field(default_factory=list)
    error: GatewayError | None = None
    direct: bool = False
    alone: bool = False
    """It is a second try, after its first run ended its process, with nothing beside it."""
    again: bool = False
    """Its parts are run again, so nobody is answered yet."""
    target: Lengths = ()
    stacked_rows: int = 0

    def begin(self) -> bool:
        return self.source.begin(self)

    def execute(self) -> None:
        self.source.execute(self)

    def finish(self) -> None:
        self.source.finish(self)


def _company_is_cheap(cost: Sequence[CostPoint]) -> bool:
    seconds = {point.rows: point.seconds for point in cost}
    return 1 not in seconds or 2 not in seconds or seconds[2] <= COMPANY_COST * seconds[1]


def _failure(error: Exception) -> ModelExecutionError:
    """What a caller may know of an exception that the session let through; the log knows the rest."""
    _log.error("a session raised %s", type(error).__name__, exc_info=error)
    return ModelExecutionError(f"the model failed with {type(error).__name__}")
