"""Distributed gradient descent with a parameter server on Ray.

The parameters are one flat vector, cut into as many shards as there are servers; each worker has a whole replica and
exchanges gradients for parameters with all shards. The driver, which is the caller of `fit`, gives the workers segments
of steps, up to the end of an epoch or the next checkpoint, and meets all of them at its end. There nothing is on its
way, so the state is one of all processes together: the servers' parameters and optimiser, the workers' own (running
means, what compression holds back), and where the training is.

When any process dies, all are ended and started again from that state, and the steps since are taken again. Ray could
restart an actor by itself (``max_restarts``), but only with its constructor's state, that is, with the first weights;
and a single shard brought back to a checkpoint would not fit the others. A step is a function of state, rows and seeds
alone, so in sync what comes out is the same to the bit, however often something died.

Sync computes what one process would: see `plan` for why, and `parameter_server_shard` for the rules of async and ssp.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, TrainingError
from .checkpoints import Checkpoints
from .compression import Compression, Compressor
from .job import Progress, TrainingJob, TrainingResult, Vector
from .optimizers import make_optimizer
from .parameter_server_shard import Mode, Shard, ShardFacts
from .parameter_server_worker import Assignment, Failure, Segment, Worker
from .plan import Plan
from .ray_session import connect, reserve

logger = logging.getLogger(__name__)

POLL_S: Final = 0.5
"""How often a progress callback is told within an epoch."""
START_S: Final = 300.0
"""How long workers may take to start and import their framework, once there is room for them."""

EVALUATED_ROWS: Final = 256
"""Rows of a batch in validation, at least; without gradients there is room for more than in training."""


def fit(
    job: TrainingJob,
    *,
    mode: Mode = "sync",
    staleness: int = 3,
    servers: int = 1,
    workers: int = 2,
    address: str | None = None,
    overlap: bool = False,
    compression: Compression = None,
    fraction: float = 0.01,
    restarts: int = 3,
    resources_timeout_s: float = 60.0,
    cpus_per_worker: float = 1.0,
    cpus_per_server: float = 1.0,
) -> TrainingResult:
    """Train with ``servers`` shards of the parameters and ``workers`` copies of the model.

    Args:
        mode: ``sync``: all workers share each batch, and the result is that of one process up to rounding. ``async``:
            each worker takes batches of its own and waits for nobody. ``ssp``: likewise, but never more than
            ``staleness`` steps ahead of the slowest.
        staleness: steps, from 0; only of ssp.
        address: of a Ray cluster, see `ray_session.connect`; None: a local Ray, for this training only. Inferway and
            the framework have to be installed on its machines, in the same versions.
        overlap: async, and ssp with a staleness of 1 or more: exchange a step's gradient while the next one is
            computed. Worth it where an exchange takes as long as a computation; every gradient is a step older then,
            which costs accuracy, or wants a lower learning rate or momentum.
        compression: of gradients: ``fp16``, or ``topk`` with the ``fraction`` of the values that is sent in a step.
        restarts: how often in a row processes may die without a new checkpoint having come about.
        resources_timeout_s: how long to wait for the processors of all processes.
        cpus_per_worker, cpus_per_server: processors that each takes; a worker computes on so many threads.
    Returns:
        ``facts``: ``restarts``, ``replayed_steps``; ``max_staleness`` (steps that a worker was ahead of the slowest
        when it pushed), ``max_missed_updates`` and ``mean_missed_updates`` (steps of the optimiser between pull and
        push); ``duplicate_pushes``; ``bytes_pushed`` and ``bytes_pulled`` over all workers, and both ``_per_step`` of
        one; ``compute_s`` and ``exchange_s`` (waiting for the exchange), summed over workers; ``servers``,
        ``workers``, ``resumed_at_step``.
    Raises:
        ConfigurationError: arguments that make no sense together, or checkpoints of another model.
        MissingExtraError: Ray is not installed.
        InsufficientResourcesError: the cluster has no room, or had none in time.
        TrainingDivergedError: a loss or gradient became NaN or infinite.
        TrainingError: processes died again and again; or workers did not start.
        Exception: what the user's own code, such as the loss, raised in a worker, with a note where.

    No actor is left behind, also after an interrupt. ``on_progress`` is called in this process; after processes died it
    is told of the steps since the last checkpoint again.
    """
    options = _Options(mode, staleness, servers, workers, overlap, compression, fraction, restarts)
    training = _Training(job, options)
    bundles = [{"CPU": cpus_per_server}] * servers + [{"CPU": cpus_per_worker}] * workers
    with connect(address, cpus=max(sum(b["CPU"] for b in bundles), _cores())):
        return training.run(bundles, resources_timeout_s)


@dataclass(frozen=True, slots=True)
class _Options:
    mode: Mode
    staleness: int
    servers: int
    workers: int
    overlap: bool
    compression: Compression
    fraction: float
    restarts: int

    def __post_init__(self) -> None:
        if self.mode not in ("sync", "async", "ssp"):
            raise ConfigurationError(f"there is no mode '{self.mode}'; there are sync, async and ssp")
        for name, least in (("staleness", 0), ("servers", 1), ("workers", 1), ("restarts", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} has to be at least {least}, not {getattr(self, name)}")
        if self.overlap and (self.mode == "sync" or (self.mode == "ssp" and self.staleness == 0)):
            raise ConfigurationError("overlap needs mode='async', or mode='ssp' with a staleness of 1 or more")
        Compressor(self.compression, 0, fraction=self.fraction)


@dataclass(slots=True)
class _State:
    """A training between two segments; everything that a checkpoint holds.

    Attributes:
        step: that all workers have taken, over all epochs.
        optimizer: of the whole vector, as of `Optimizer.state`.
        states: `Replica.state` of each worker.
        residuals: what each worker's compression has not sent.
        loss_sum: over the rows of this epoch so far.
        best: the metric that early stopping watches, parameters and merged state at its best; nothing before.
        waited: epochs since then.
    """

    step: int
    parameters: Vector
    optimizer: dict[str, NDArray[Any]]
    states: list[dict[str, NDArray[Any]]]
    residuals: list[Vector]
    history: dict[str, list[float]] = field(default_factory=dict)
    loss_sum: float = 0.0
    best: tuple[float, Vector, dict[str, NDArray[Any]]] | None = None
    waited: int = 0
    stopped: bool = False


class _LostError(Exception):
    """An actor is gone."""


class _Training:
    """The driver's side of one `fit`."""

    def __init__(self, job: TrainingJob, options: _Options) -> None:
        rows = job.batch_size * (1 if options.mode == "sync" else options.workers)
        self._job, self._options = job, options
        self._plan = Plan(job.rows, rows, options.workers, job.seed, job.shuffle)
        self._last = job.epochs * self._plan.steps
        self._checkpoints = Checkpoints(job.checkpoints.path, keep=job.checkpoints.keep) if job.checkpoints else None
        self._state: _State | None = None
        self._reached = 0
        self._facts = dict.fromkeys(("restarts", "replayed_steps", "bytes_pushed", "bytes_pulled"), 0.0)
        self._facts |= {"compute_s": 0.0, "exchange_s": 0.0}
        self._seen = ShardFacts()
        self._worker_steps = 0
        _check(job)

    def run(self, bundles: Sequence[Mapping[str, float]], timeout_s: float) -> TrainingResult:
        import ray

        job = self._job
        self._began = time.monotonic()
        if self._checkpoints and job.checkpoints and job.checkpoints.resume:
            self._state = self._restored()
        resumed = self._state.step if self._state else 0
        # Once for all workers, and for all that follow one that died.
        data = {"inputs": {name: ray.put(array) for name, array in job.inputs.items()}, "targets": ray.put(job.targets)}
        replica = ray.put(job.replica)
        validation = None
        if job.validation:
            inputs, targets = job.validation
            validation = ({name: ray.put(array) for name, array in inputs.items()}, ray.put(targets))
        left = self._options.restarts
        while self._state is None or not self._over():
            kept = self._state.step if self._state else -1
            try:
                with reserve(bundles, timeout_s=timeout_s) as group, _Fleet(self, group, bundles) as fleet:
                    fleet.make(replica, data)
                    fleet.begin()
                    while not self._over():
                        self._advance(fleet, validation)
            except _LostError as error:
                state = self._state
                if state is not None and state.step > kept:
                    left = self._options.restarts
                at = state.step if state else 0
                self._facts["replayed_steps"] += max(0, self._reached - at)
                self._reached = at
                if not left:
                    raise TrainingError(
                        f"processes died {self._options.restarts + 1} times in a row after step {at}, last: {error}"
                    ) from error
                left -= 1
                self._facts["restarts"] += 1
                logger.warning("%s; starting all processes again from step %d", error, at)
        return self._result(resumed)

    # One segment and what follows it -----------------------------------------------------------------------------

    def _over(self) -> bool:
        return self.state.stopped or self.state.step >= self._last

    def _advance(self, fleet: _Fleet, validation: Any) -> None:
        state, plan, job = self.state, self._plan, self._job
        every = job.checkpoints.every_steps if job.checkpoints else 0
        ends = [(state.step // plan.steps + 1) * plan.steps, self._last]
        if every:
            ends.append((state.step // every + 1) * every)
        last = min(ends)
        segments = fleet.run(state.step, last)
        self._count(segments, fleet)
        loss_sum = state.loss_sum + self._loss_over_rows(segments, state.step, last)
        parameters, optimizer = fleet.parameters()
        states, residuals = fleet.worker_states()
        history = {name: list(values) for name, values in state.history.items()}
        new = replace(
            state,
            step=last,
            parameters=parameters,
            optimizer=optimizer,
            states=states,
            residuals=residuals,
            history=history,
            loss_sum=loss_sum,
        )
        ended = last % plan.steps == 0
        metrics: dict[str, float] = {}
        loss = loss_sum / max(1, min(job.rows, (last % plan.steps or plan.steps) * plan.batch_size))
        if ended:
            merged = _merged(states)
            metrics = {"loss": loss}
            if validation:
                found = fleet.evaluate(validation, merged)
                metrics |= {f"val_{name}": value for name, value in found.items()}
            for name, value in metrics.items():
                history.setdefault(name, []).append(value)
            new.loss_sum = 0.0
            self._watch(new, metrics, merged)
        self._state = new
        if (last % every == 0 if every else ended) or self._over():
            self._save()
        self._tell(last, loss, metrics)

    def _watch(self, state: _State, metrics: Mapping[str, float], merged: dict[str, NDArray[Any]]) -> None:
        watched = self._job.early_stopping
        if watched is None:
            return
        if watched.metric not in metrics:
            raise ConfigurationError(
                f"early stopping watches '{watched.metric}', and there are only {', '.join(metrics)}"
            )
        value = metrics[watched.metric]
        better = state.best is None or (
            value < state.best[0] - watched.min_delta
            if watched.mode == "min"
            else value > state.best[0] + watched.min_delta
        )
        if better:
            state.best, state.waited = (value, state.parameters, merged), 0
        else:
            state.waited += 1
            state.stopped = state.waited >= watched.patience

    def _loss_over_rows(self, segments: Sequence[Segment], first: int, last: int) -> float:
        """Sum of the loss over the rows of some steps; in the order of workers, so the same every time."""
        plan = self._plan
        total = 0.0
        for step in range(first, last):
            of_epoch = step % plan.steps
            rows = min(plan.batch_size, plan.rows - of_epoch * plan.batch_size)
            total += rows * sum(s.weights[step - first] * s.losses[step - first] for s in segments)
        return float(total)

    def _count(self, segments: Sequence[Segment], fleet: _Fleet) -> None:
        for segment in segments:
            self._facts["bytes_pushed"] += segment.bytes_pushed
            self._facts["bytes_pulled"] += segment.bytes_pulled
            self._facts["compute_s"] += segment.compute_s
            self._facts["exchange_s"] += segment.exchange_s
            self._worker_steps += len(segment.losses)
        for facts in fleet.facts():
            self._seen.pushes += facts.pushes
            self._seen.duplicates += facts.duplicates
            self._seen.sum_missed += facts.sum_missed
            self._seen.max_missed = max(self._seen.max_missed, facts.max_missed)
            self._seen.max_staleness = max(self._seen.max_staleness, facts.max_staleness)

    def tell_underway(self, step: int, loss: float) -> None:
        """Tell of a step in the middle of a segment."""
        self._reached = max(self._reached, step)
        if step and not math.isnan(loss):
            self._tell(step, loss, {})

    def _tell(self, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        if self._job.on_progress is None:
            return
        epoch, of_epoch = divmod(step - 1, self._plan.steps)
        self._job.on_progress(
            Progress(
                epoch=epoch + 1,
                epochs=self._job.epochs,
                step=of_epoch + 1,
                steps_per_epoch=self._plan.steps,
                loss=loss,
                metrics=metrics,
                elapsed_s=time.monotonic() - self._began,
                workers=self._options.workers,
            )
        )

    # What lasts ------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> _State:
        if self._state is None:
            raise RuntimeError("the training has not begun")
        return self._state

    @state.setter
    def state(self, state: _State) -> None:
        self._state = state

    @property
    def has_state(self) -> bool:
        return self._state is not None

    @property
    def job(self) -> TrainingJob:
        return self._job

    @property
    def options(self) -> _Options:
        return self._options

    @property
    def plan(self) -> Plan:
        return self._plan

    def _save(self) -> None:
        if self._checkpoints is None:
            return
        state = self.state
        arrays = {"parameters": state.parameters}
        arrays |= {f"optimizer/{name}": array for name, array in state.optimizer.items()}
        for worker, (own, residual) in enumerate(zip(state.states, state.residuals, strict=True)):
            arrays |= {f"worker/{worker}/{name}": array for name, array in own.items()}
            if len(residual):
                arrays[f"residual/{worker}"] = residual
        if state.best:
            arrays["best"] = state.best[1]
            arrays |= {f"best/{name}": array for name, array in state.best[2].items()}
        facts = {
            "strategy": "parameter_server",
            "optimizer": self._job.optimizer.kind,
            "steps_per_epoch": self._plan.steps,
            "workers": self._options.workers,
            "history": state.history,
            "loss_sum": state.loss_sum,
            "best": state.best[0] if state.best else None,
            "waited": state.waited,
            "stopped": state.stopped,
        }
        self._checkpoints.save(state.step, arrays, facts)

    def _restored(self) -> _State | None:
        saved = self._checkpoints.load() if self._checkpoints else None
        if saved is None:
            return None
        facts, arrays = saved.facts, saved.arrays
        given = {"optimizer": self._job.optimizer.kind, "steps_per_epoch": self._plan.steps}
        for name, value in given.items():
            if facts.get(name) != value:
                raise ConfigurationError(
                    f"the checkpoints are of another training: {name} is {facts.get(name)} there and {value} here; "
                    "take another path, or resume=False"
                )
        before = int(facts["workers"])
        # With other workers than before, each begins with the state of one of those.
        states = [_below(arrays, f"worker/{w % before}/") for w in range(self._options.workers)]
        nothing = np.zeros(0, np.float32)
        residuals = [arrays.get(f"residual/{w}", nothing) for w in range(self._options.workers)]
        best = None
        if facts["best"] is not None:
            best = (float(facts["best"]), arrays["best"], _below(arrays, "best/"))
        return _State(
            step=saved.step,
            parameters=arrays["parameters"],
            optimizer=_below(arrays, "optimizer/"),
            states=states,
            residuals=residuals,
            history=facts["history"],
            loss_sum=facts["loss_sum"],
            best=best,
            waited=facts["waited"],
            # With more patience, or none to be had, a training that had stopped goes on.
            stopped=bool(
                facts["stopped"] and self._job.early_stopping and facts["waited"] >= self._job.early_stopping.patience
            ),
        )

    def _result(self, resumed: int) -> TrainingResult:
        state = self.state
        parameters, merged = state.parameters, _merged(state.states)
        if self._job.early_stopping and state.best:
            _, parameters, merged = state.best
        seen = self._seen
        facts = self._facts | {
            "max_staleness": float(seen.max_staleness),
            "max_missed_updates": float(seen.max_missed),
            "mean_missed_updates": seen.sum_missed / max(1, seen.pushes),
            "duplicate_pushes": float(seen.duplicates),
            "bytes_pushed_per_step": self._facts["bytes_pushed"] / max(1, self._worker_steps),
            "bytes_pulled_per_step": self._facts["bytes_pulled"] / max(1, self._worker_steps),
            "servers": float(self._options.servers),
            "workers": float(self._options.workers),
            "resumed_at_step": float(resumed),
        }
        return TrainingResult(
            parameters=np.array(parameters),
            state=merged,
            history=state.history,
            epochs=state.step // self._plan.steps,
            steps=state.step,
            elapsed_s=time.monotonic() - self._began,
            stopped="early" if state.stopped else "finished",
            facts=facts,
        )


class _Fleet:
    """All actors of one attempt. They end with the block."""

    def __init__(self, training: _Training, group: Any, bundles: Sequence[Mapping[str, float]]) -> None:
        self._training = training
        self._options = training.options
        self._group, self._bundles = group, bundles
        self._names: dict[Any, str] = {}
        self._shards: list[Any] = []
        self._workers: list[Any] = []

    def __enter__(self) -> _Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in (*self._workers, *self._shards):
            ray.kill(actor)

    def make(self, replica: Any, data: Mapping[str, Any]) -> None:
        """Start all actors, and make the models."""
        job, options = self._training.job, self._options
        arguments = (job.optimizer, options.mode, options.staleness, options.workers)
        self._shards += [self._actor(Shard, i, f"server {i}", *arguments) for i in range(options.servers)]
        self._workers += [self._actor(Worker, options.servers + i, f"worker {i}") for i in range(options.workers)]
        made = self._all(
            [
                worker.make.remote(
                    replica,
                    Assignment(
                        index=index,
                        plan=self._training.plan,
                        overlap=options.overlap,
                        compression=options.compression,
                        fraction=options.fraction,
                        **data,
                    ),
                )
                for index, worker in enumerate(self._workers)
            ],
            timeout_s=START_S,
        )
        for index, (process, host, size) in enumerate(made):
            logger.info("worker %d is process %d on %s", index, process, host)
            self._size = size

    def begin(self) -> None:
        """Give all actors the state of the training, or the first one, which is then the training's."""
        training, options = self._training, self._options
        if not training.has_state:
            parameters, state = self._all([self._workers[0].first.remote()])[0]
            nothing = np.zeros(0, np.float32)
            training.state = _State(0, parameters, {}, [state] * options.workers, [nothing] * options.workers)
        state = training.state
        if len(state.parameters) != self._size:
            raise ConfigurationError(
                f"the checkpoint is of a model with {len(state.parameters)} trainable numbers, "
                f"and this one has {self._size}; take another path, or resume=False"
            )
        self._borders = [self._size * i // options.servers for i in range(options.servers + 1)]
        parts = [slice(low, high) for low, high in zip(self._borders, self._borders[1:], strict=False)]
        begun = self._all(
            [
                shard.begin.remote(
                    state.parameters[part],
                    {name: array[part] if array.ndim else array for name, array in state.optimizer.items()},
                    state.step,
                )
                for shard, part in zip(self._shards, parts, strict=True)
            ],
            timeout_s=START_S,
        )
        for index, (process, host) in enumerate(begun):
            logger.info("server %d is process %d on %s", index, process, host)
        self._all(
            [
                worker.begin.remote(self._shards, self._borders, own, residual)
                for worker, own, residual in zip(self._workers, state.states, state.residuals, strict=True)
            ]
        )

    def run(self, first: int, last: int) -> list[Segment]:
        """Have all workers take some steps."""
        training = self._training
        return self._all(
            [worker.run.remote(first, last) for worker in self._workers],
            watch=lambda: training.tell_underway(*self._underway()),
        )

    def parameters(self) -> tuple[Vector, dict[str, NDArray[Any]]]:
        """Parameters and the optimiser's state, of all shards together."""
        found = self._all([shard.snapshot.remote() for shard in self._shards])
        names = found[0][1]
        optimizer = {
            name: np.concatenate([state[name] for _, state in found]) if names[name].ndim else names[name]
            for name in names
        }
        return np.concatenate([parameters for parameters, _ in found]), optimizer

    def worker_states(self) -> tuple[list[dict[str, NDArray[Any]]], list[Vector]]:
        found = self._all([worker.snapshot.remote() for worker in self._workers])
        return [state for state, _ in found], [residual for _, residual in found]

    def facts(self) -> list[ShardFacts]:
        """What the shards saw since they were asked last."""
        return self._all([shard.facts.remote() for shard in self._shards])

    def evaluate(self, rows: Any, state: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        batch_size = max(EVALUATED_ROWS, self._training.job.batch_size)
        found: list[dict[str, float]] = self._all([self._workers[0].evaluate.remote(rows, batch_size, state)])
        return found[0]

    def _underway(self) -> tuple[int, float]:
        step, loss = self._all([self._shards[0].progress.remote()])[0]
        return step, loss

    def _actor(self, kind: type, bundle: int, name: str, *arguments: Any) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = (
            ray.remote(kind)
            .options(
                num_cpus=self._bundles[bundle]["CPU"],
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=bundle
                ),
                # Not Ray's to restart: see the module.
                max_restarts=0,
                max_task_retries=0,
            )
            .remote(*arguments)
        )
        self._names[actor] = name
        return actor

    def _all(
        self, references: Sequence[Any], *, timeout_s: float | None = None, watch: Callable[[], None] | None = None
    ) -> list[Any]:
        """Answers in order, or the first failure of any of them.

        Raises:
            _LostError: an actor is gone.
            TrainingError: no answer in time.
            Exception: what was raised in a worker.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        until = None if timeout_s is None else time.monotonic() + timeout_s
        left = list(references)
        answers: dict[Any, Any] = {}
        while left:
            if until is not None and time.monotonic() > until:
                raise TrainingError(f"{len(left)} of {len(references)} processes did not start in {timeout_s:g} s")
            ready, left = ray.wait(left, num_returns=1, timeout=POLL_S)
            for reference in ready:
                try:
                    answer = ray.get(reference)
                except RayTaskError as error:
                    # Not the user's code, whose errors come as a `Failure`.
                    raise TrainingError(
                        f"a process could not do what it was told: {_last_line(error)}. Modules that the model is made "
                        "of have to be installed on all machines, unless they are the script itself"
                    ) from error
                except RayError as error:
                    raise _LostError(_reason(error)) from error
                if isinstance(answer, Failure):
                    self._fail(answer)
                answers[reference] = answer
            if not ready and watch:
                watch()
        return [answers[reference] for reference in references]

    def _fail(self, failure: Failure) -> None:
        if failure.lost:
            raise _LostError(failure.text.strip().splitlines()[-1])
        where = f"raised in a worker at step {failure.step + 1}:\n{failure.text}"
        error = _unpickled(failure.error)
        if error is None:
            raise TrainingError(where)
        error.add_note(where)
        raise error


def _unpickled(content: bytes | None) -> Exception | None:
    from ray import cloudpickle

    if content is None:
        return None
    try:
        error = cloudpickle.loads(content)
    except Exception:  # one whose class wants other arguments than it keeps
        return None
    return error if isinstance(error, Exception) else None


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _check(job: TrainingJob) -> None:
    make_optimizer(job.optimizer, 0)
    if job.epochs < 1:
        raise ConfigurationError(f"epochs has to be at least 1, not {job.epochs}")
    for name, array in job.inputs.items():
        if len(array) != job.rows:
            raise ConfigurationError(f"the input '{name}' has {len(array)} rows, and there are {job.rows} targets")
    watched = job.early_stopping
    if watched and watched.metric.startswith("val_") and job.validation is None:
        raise ConfigurationError(f"early stopping watches '{watched.metric}', and there is no validation data")


def _merged(states: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """One state of all workers': the mean of what is fractional, such as running means; else that of the first."""
    first = states[0]
    return {
        name: np.mean([state[name] for state in states], axis=0, dtype=np.float64).astype(array.dtype)
        if array.dtype.kind == "f"
        else np.array(array)
        for name, array in first.items()
    }


def _below(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
