"""Distributed gradient descent without a server: every worker has all parameters, and they add up their gradients.

Ray Train places the workers, joins them to one process group of PyTorch (gloo) and starts them again when one dies. A
step is the plan's, as with a parameter server in step: each worker computes the gradient of its share of the batch,
weighs it with that share, and one all-reduce sums them, so that every worker then takes the same step of the optimiser:

    g = Σ_w (B_w / B) · g_w,        θ ← optimiser(θ, g)

PyTorch's own ``DistributedDataParallel`` is not used: it takes the plain mean over workers, which is another gradient
whenever a batch does not split evenly, and it wraps a module, which a Keras model on TensorFlow is not. What it does
better is to begin sending while the backward pass still computes.

What a worker reports goes to an actor beside the caller, the conductor, which also holds Ray Train's driver. It is the
owner of all others, so that ending it ends them, in whatever state they are. Ray Train's own checkpoints would need a
folder that every node sees; here the newest state lies with the conductor, or where `CheckpointOptions` says.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._errors import (
    ConfigurationError,
    InsufficientResourcesError,
    TrainingDivergedError,
    TrainingError,
)
from . import ray_session
from .checkpoints import Checkpoints
from .job import EarlyStopping, Progress, TrainingJob, TrainingResult, Vector
from .optimizers import make_optimizer
from .plan import Part, Plan
from .replica import check_finite

POLL_S: Final = 0.1
"""How often Ray Train looks after its workers. Its default of 2 s is most of the time of a short training."""
TOLD_S: Final = 0.1
"""At most this often does a worker tell where it is, besides the ends of epochs."""
START_S: Final = 300.0
"""How long workers may take to start where there is room for them; a busy machine took a minute."""
ALIVE_S: Final = 2.0
"""How often the first worker says that it lives, however long a step is."""
END_S: Final = 60.0
"""How long Ray Train may take to end."""
GLOO_TIMEOUT_S: Final = 1800
"""How long a worker waits for another one, such as for the first of them to evaluate."""

SIOCGIFADDR: Final = 0x8915
"""Linux: the address of an interface, see netdevice(7)."""

Arrays: TypeAlias = dict[str, NDArray[Any]]


def fit(
    job: TrainingJob,
    *,
    workers: int,
    address: str | None = None,
    cpus_per_worker: float = 1.0,
    resources_timeout_s: float = 60.0,
    restarts: int = 3,
) -> TrainingResult:
    """Train with workers that hold all parameters each and sum their gradients; equals one process up to rounding.

    Args:
        job: its ``batch_size`` is of all workers together. Each of them gets all rows once, by Ray's object store.
        workers: how many.
        address: of a Ray cluster, see `ray_session.connect`; None: a local Ray, for this training only. Inferway and
            the framework have to be installed on its machines, in the same versions.
        cpus_per_worker: processors that each takes; a worker computes on so many threads.
        resources_timeout_s: how long to wait for the resources, at the beginning and whenever a machine is lost.
        restarts: how often workers that died are started again, from the newest state.
    Returns:
        The result; ``facts`` has ``workers``, ``restarts``, ``bytes_per_step`` (sent by each worker, as of a ring),
        ``cpu_s`` of all workers, and of the slowest the seconds by what it did: ``compute_s``, ``communicate_s``,
        ``update_s``, ``evaluate_s``.
    Raises:
        ConfigurationError: ``workers`` is below 1, or there is no Ray at the address.
        MissingExtraError: Ray or PyTorch is not installed.
        InsufficientResourcesError: the resources did not come in time, or went and did not come back.
        TrainingDivergedError: a loss or a gradient is no number; names step and worker.
        TrainingError: workers died once too often, or did not start.
        Exception: what the user's own code, such as the loss, raised in a worker, with a note where.
    """
    if workers < 1:
        raise ConfigurationError(f"at least 1 worker is needed, not {workers}")
    wanted = {"CPU": cpus_per_worker}
    began = time.monotonic()
    with ray_session.connect(address, cpus=workers * cpus_per_worker):
        with ray_session.reserve([wanted] * workers, timeout_s=resources_timeout_s):
            pass  # Ray Train reserves for itself; this was the question whether it can
        return _Caller(job, workers, wanted, resources_timeout_s, restarts, began).run()


@dataclass
class _Snapshot:
    """A state to begin from: arrays and facts as `Checkpoints` keeps them."""

    step: int
    arrays: Arrays
    facts: dict[str, Any]


# With the caller ------------------------------------------------------------------------------------------------------


class _Caller:
    """Starts the conductor, hands on what it hears, and ends it."""

    def __init__(
        self,
        job: TrainingJob,
        workers: int,
        resources: Mapping[str, float],
        resources_timeout_s: float,
        restarts: int,
        began: float,
    ) -> None:
        self._job = job
        self._workers = workers
        self._resources = dict(resources)
        self._resources_timeout_s = resources_timeout_s
        self._restarts = restarts
        self._began = began
        self._heard = time.monotonic()
        self._attempts = 0
        self._result: TrainingResult | None = None

    def run(self) -> TrainingResult:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        conductor = (
            ray.remote(_Conductor)
            .options(
                num_cpus=0,
                max_concurrency=8,
                scheduling_strategy=here,
                runtime_env={
                    "env_vars": {
                        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
                        # It cannot be told to stop while it waits for room; it then waits again, without limit.
                        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
                        "RAY_TRAIN_METRICS_ENABLED": "0",
                        "RAY_CHDIR_TO_TRIAL_DIR": "0",
                    }
                },
            )
            .remote(self._job.checkpoints)
        )
        job = ray.put(replace(self._job, on_progress=None))
        ended = conductor.run.remote([job], self._workers, self._resources, self._restarts)
        try:
            while self._result is None:
                over = bool(ray.wait([ended], timeout=0)[0])
                for kind, message in ray.get(conductor.heard.remote(0.0 if over else 0.5)):
                    self._hear(kind, message)
                if self._result is None and over:
                    why = ray.get(ended)
                    raise TrainingError(
                        f"the workers ended without a result: {why}" if why else "the workers fell silent"
                    )
                self._watch()
            return self._result
        except ray.exceptions.RayActorError as error:
            raise TrainingError(f"the machine that conducted the training was lost: {error}") from error
        finally:
            # Ray Train gives back what it reserved only where it ends by itself: so it is asked to, and waited for.
            with contextlib.suppress(ray.exceptions.RayError):
                if self._result is None:
                    ray.get(conductor.abort.remote(), timeout=END_S)
                ray.wait([ended], timeout=END_S)
                ray.get(conductor.tidy.remote(), timeout=END_S)
            ray.kill(conductor)

    def _hear(self, kind: str, message: Any) -> None:
        self._heard = time.monotonic()
        elapsed_s = self._heard - self._began
        if kind == "progress" and self._job.on_progress is not None:
            self._job.on_progress(Progress(**message, elapsed_s=elapsed_s, workers=self._workers))
        elif kind == "diverged":
            check_finite(
                message["loss"], np.array([np.nan], np.float32), step=message["step"], worker=message["worker"]
            )
        elif kind == "failed":
            self._fail(message)
        elif kind == "began":
            self._attempts = message
        elif kind == "result":
            facts = {**message.pop("facts"), "restarts": float(self._attempts - 1)}
            self._result = TrainingResult(**message, facts=facts, elapsed_s=elapsed_s)

    def _fail(self, message: dict[str, Any]) -> None:
        where = f"in worker {message['worker']}"
        if message["error"] is None:
            raise TrainingError(f"{where} {message['text']}")
        from ray import cloudpickle

        error: Exception = cloudpickle.loads(message["error"])
        error.add_note(f"raised {where}:\n{message['traceback']}")
        raise error

    def _watch(self) -> None:
        """Say so when workers that are not heard of cannot be there."""
        import ray

        silent_s = time.monotonic() - self._heard
        if silent_s < self._resources_timeout_s:
            return
        wanted = {name: amount * self._workers for name, amount in self._resources.items()}
        there = ray.cluster_resources()
        lacking = [name for name, amount in wanted.items() if there.get(name, 0.0) < amount]
        if lacking:
            raise InsufficientResourcesError(
                f"the workers are gone, and what they need did not come back in {self._resources_timeout_s:g} s: "
                + ", ".join(f"{wanted[name]:g} {name} of which there are {there.get(name, 0.0):g}" for name in lacking),
                wanted=wanted,
                available={name: float(there.get(name, 0.0)) for name in wanted},
            )
        if silent_s > max(START_S, self._resources_timeout_s):
            raise TrainingError(f"nothing was heard of the workers for {silent_s:.0f} s")


class _Conductor:
    """An actor: runs Ray Train's driver, and keeps what the workers tell until the caller asks for it."""

    def __init__(self, checkpoints: Any) -> None:
        self._messages: list[tuple[str, Any]] = []
        self._more = threading.Condition()
        self._store = None if checkpoints is None else Checkpoints(checkpoints.path, keep=checkpoints.keep)
        self._newest: _Snapshot | None = None
        self._fresh = checkpoints is not None and not checkpoints.resume
        self._attempt = 0
        self._pinned: _Snapshot | None = None
        self._controller: Any = None
        self._folder = tempfile.mkdtemp(prefix="inferway-ddp-")

    def run(self, job: list[Any], workers: int, resources: dict[str, float], restarts: int) -> str:
        """Train; gives why that did not end well, if it did not."""
        import ray
        from ray import train
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            _train,
            train_loop_config={"job": job, "conductor": ray.get_runtime_context().current_actor},
            scaling_config=train.ScalingConfig(num_workers=workers, resources_per_worker=resources),
            run_config=train.RunConfig(
                name="ddp",
                storage_path=self._folder,
                failure_config=train.FailureConfig(max_failures=restarts),
                callbacks=[_introducing(ray.get_runtime_context().current_actor)],
            ),
            torch_config=_gloo(),
        )
        try:
            trainer.fit()
        except (train.TrainingFailedError, ray.exceptions.RayError) as error:
            return str(error)
        return ""

    def conducts(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """End the training, wherever it is."""
        if self._controller is not None:
            self._controller.abort.remote()

    def tell(self, kind: str, message: Any) -> None:
        with self._more:
            self._messages.append((kind, message))
            self._more.notify_all()

    def heard(self, wait_s: float) -> list[tuple[str, Any]]:
        with self._more:
            self._more.wait_for(lambda: self._messages, wait_s)
            messages, self._messages = self._messages, []
        return messages

    def keep(self, snapshot: _Snapshot) -> None:
        # Where the folder's own checkpoints do not count, the newest in it need not be of this training.
        if self._store is None or self._fresh:
            self._newest = snapshot
        if self._store is not None:
            self._store.save(snapshot.step, snapshot.arrays, snapshot.facts)

    def begin(self) -> int:
        """Fix what the workers of a new attempt begin from; gives its number, from 1."""
        self._attempt += 1
        if self._store is None or self._fresh:
            self._pinned = self._newest
        else:
            saved = self._store.load()
            self._pinned = None if saved is None else _Snapshot(saved.step, saved.arrays, saved.facts)
        self.tell("began", self._attempt)
        return self._attempt

    def beginning(self, attempt: int) -> _Snapshot | None:
        if attempt != self._attempt:
            raise RuntimeError(f"attempt {attempt} is over, it is attempt {self._attempt} now")
        return self._pinned

    def tidy(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _introducing(conductor: Any) -> Any:
    """A callback that tells the conductor who controls the workers: Ray Train itself keeps that to itself."""
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Introducing(ControllerCallback):  # type: ignore[misc]  # ray is not followed
        def after_controller_start(self, train_run_context: Any) -> None:
            ray.get(conductor.conducts.remote(ray.get_runtime_context().current_actor))

    return Introducing()


# With each worker -----------------------------------------------------------------------------------------------------


def _gloo() -> Any:
    """Ray Train's settings for PyTorch, and before a process group is made, the interface that it is made on.

    Gloo asks for the address of the host's name, which many machines say is 127.0.0.1; over that no other machine is
    reached. The one by which Ray knows the machine is one by which the others reach it.
    """
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class Backend(_TorchBackend):  # type: ignore[misc]  # ray is not followed
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_choose_interface)
            super().on_start(worker_group, backend_config)

    @dataclass
    class Config(TorchConfig):  # type: ignore[misc]  # ray is not followed
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return Config(backend="gloo", timeout_s=GLOO_TIMEOUT_S)


def _choose_interface() -> None:
    import ray

    name = _interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _interface_of(address: str) -> str | None:
    """The network interface with an IPv4 address; None where none has it, or the system does not say."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _train(config: dict[str, Any]) -> None:
    """What Ray Train runs in every worker."""
    import ray
    from ray import train

    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    conductor = config["conductor"]
    with _telling(conductor, rank), _breathing(conductor if rank == 0 else None):
        _Worker(ray.get(config["job"][0]), rank, world, conductor).run()


@contextlib.contextmanager
def _breathing(conductor: Any | None) -> Iterator[None]:
    """Let the caller know every while that the workers are there."""
    over = threading.Event()

    def breathe() -> None:
        while not over.wait(ALIVE_S):
            conductor.tell.remote("alive", None)  # type: ignore[union-attr]  # the thread is started only with one

    thread = threading.Thread(target=breathe, daemon=True)
    if conductor is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if conductor is not None:
            thread.join()


class _PeerLost(Exception):
    """Another worker died or failed; the training begins again without anything being said of this one."""


@contextlib.contextmanager
def _telling(conductor: Any, rank: int) -> Iterator[None]:
    """Tell of an error, which is the model's or the data's and comes again: no restart helps."""
    import ray

    try:
        yield
    except (_PeerLost, ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
        raise
    except Exception as error:
        message = {"worker": rank, "text": _said(error), "traceback": traceback.format_exc(), "error": _pickled(error)}
        ray.get(conductor.tell.remote("failed", message))
        raise


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more was said'}"


def _pickled(error: Exception) -> bytes | None:
    """An error on its way to the caller; nothing where it cannot go, or is Ray's, with a traceback for a message."""
    import ray
    from ray import cloudpickle

    if isinstance(error, ray.exceptions.RayError):
        return None
    try:
        pickled: bytes = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)
    except Exception:  # whatever the user's error holds
        return None
    return pickled


class _Worker:
    """One of them: what it holds, and its way through the plan."""

    def __init__(self, job: TrainingJob, rank: int, world: int, conductor: Any) -> None:
        self._job = job
        self._rank = rank
        self._world = world
        self._conductor = conductor
        self._plan = Plan(job.rows, job.batch_size, world, job.seed, job.shuffle)
        self._replica = job.replica()
        size = self._replica.size
        self._parameters: Vector = np.empty(size, np.float32)
        self._replica.read(self._parameters)
        # The losses of all workers ride behind the gradient: one exchange for both.
        self._flat: Vector = np.zeros(size + world, np.float32)
        self._gradient = self._flat[:size]
        self._losses = self._flat[size:]
        self._optimizer = make_optimizer(job.optimizer, size)
        self._history: dict[str, list[float]] = {}
        self._epoch_loss = 0.0
        self._step = 0
        self._stopped = False
        self._patience = _Patience(job.early_stopping)
        self._best: Arrays = {}
        self._saving: Any = None
        self._told = 0.0
        self._spent = dict.fromkeys(("compute_s", "communicate_s", "update_s", "evaluate_s"), 0.0)

    def run(self) -> None:
        self._begin()
        per_epoch = self._plan.steps
        while not self._stopped and self._step < self._job.epochs * per_epoch:
            epoch, step = divmod(self._step, per_epoch)
            loss = self._take(epoch, step)
            if loss is None:
                return
            ended = step + 1 == per_epoch
            metrics = self._end_epoch() if ended else {}
            self._progress(epoch, step, loss, metrics)
            every = self._job.checkpoints.every_steps if self._job.checkpoints is not None else 0
            if self._step % every == 0 if every else ended:
                self._save(agreed=ended)
        self._finish()

    def _take(self, epoch: int, step: int) -> float | None:
        """One step; gives the batch's loss, or nothing where the training has diverged."""
        part = self._plan.part(epoch, step, self._rank)
        with self._timed("compute_s"):
            loss = self._compute(part, epoch, step)
            self._losses.fill(0.0)
            self._losses[self._rank] = loss * part.weight
        with self._timed("communicate_s"):
            self._sum(self._flat)
        total = float(self._losses.sum())
        try:
            check_finite(total, self._gradient, step=self._step + 1, worker=None)
        except TrainingDivergedError as error:
            self._tell_whose(error, self._compute(part, epoch, step))
            return None
        with self._timed("update_s"):
            self._optimizer.step(self._parameters, self._gradient)
            self._replica.load(self._parameters)
        self._epoch_loss += total * len(self._plan.batch(epoch, step))
        self._step += 1
        return total

    def _compute(self, part: Part, epoch: int, step: int) -> float:
        """Write this worker's part of the gradient, weighed; gives the loss of its rows."""
        if not len(part.rows):
            self._gradient.fill(0.0)
            return 0.0
        inputs = {name: array[part.rows] for name, array in self._job.inputs.items()}
        noise = self._plan.noise(epoch, step, self._rank)
        loss = self._replica.gradient(inputs, self._job.targets[part.rows], self._gradient, seed=noise)
        if part.weight != 1.0:
            self._gradient *= np.float32(part.weight)
        return loss

    def _tell_whose(self, error: TrainingDivergedError, loss: float) -> None:
        """Say which worker's part was no number; in the sum that is lost, so each has computed its own again."""
        seen = np.zeros((2, self._world))
        fine = math.isfinite(loss) and bool(np.isfinite(self._gradient).all())
        seen[:, self._rank] = (not fine, loss)
        self._sum(seen)
        bad = np.flatnonzero(seen[0])
        worker = int(bad[0]) if len(bad) else None  # nobody: the sum is too large for FP32
        message = {
            "step": error.step,
            "worker": worker,
            "loss": error.loss if worker is None else float(seen[1, worker]),
        }
        self._tell("diverged", message)

    def _sum(self, values: NDArray[Any]) -> None:
        """Replace the values of every worker by their sum, in place; in the same order for all."""
        import torch
        from torch import distributed

        if self._world == 1:
            return
        try:
            distributed.all_reduce(torch.from_numpy(values))
        except RuntimeError as error:
            raise _PeerLost(str(error)) from error

    def _end_epoch(self) -> dict[str, float]:
        """Metrics of the epoch, and in all workers whether it was the last; the first one evaluates."""
        self._agree_on_state()
        metrics = {"loss": self._epoch_loss / self._job.rows}
        self._epoch_loss = 0.0
        if self._rank == 0:
            with self._timed("evaluate_s"):
                if self._job.validation is not None:
                    inputs, targets = self._job.validation
                    found = self._replica.evaluate(inputs, targets, batch_size=max(self._job.batch_size, 256))
                    metrics |= {f"val_{name}": value for name, value in found.items()}
            if self._patience.better(metrics):
                self._best = self._model()
            for name, value in metrics.items():
                self._history.setdefault(name, []).append(value)
        stop = np.array([self._rank == 0 and self._patience.over], np.float32)
        self._sum(stop)
        self._stopped = bool(stop[0])
        return metrics

    def _agree_on_state(self) -> None:
        """Give all workers the same running means: each has seen other rows, so their mean."""
        state = self._replica.state()
        if self._world == 1 or not state:
            return
        for name, array in state.items():
            mean = np.array(array, np.float64)
            self._sum(mean)
            # What counts steps has the same value everywhere, and stays whole.
            state[name] = (mean / self._world).astype(array.dtype)
        self._replica.load_state(state)

    def _model(self) -> Arrays:
        return {"parameters": self._parameters.copy(), **_named("state", self._replica.state())}

    # Beginning, keeping, ending

    def _begin(self) -> None:
        """Take over what the newest state is, which is the same for all workers of an attempt."""
        import ray

        attempt = np.zeros(1)
        if self._rank == 0:
            attempt[0] = ray.get(self._conductor.begin.remote())
        self._sum(attempt)
        snapshot = ray.get(self._conductor.beginning.remote(int(attempt[0])))
        if snapshot is None:
            return
        arrays, facts = snapshot.arrays, snapshot.facts
        there = {**facts, "size": arrays["parameters"].size}
        for name, value in {**self._kind(), "size": self._replica.size}.items():
            if there.get(name) != value:
                raise ConfigurationError(
                    f"the checkpoints are of another training: {name} is {there.get(name)} there and {value} here; "
                    "take another path, or resume=False"
                )
        self._parameters[:] = arrays["parameters"]
        self._replica.load(self._parameters)
        self._replica.load_state(_unnamed("state", arrays))
        self._optimizer.load_state(_unnamed("optimizer", arrays))
        self._best = _unnamed("best", arrays)
        self._step = snapshot.step
        self._history = facts["history"]
        self._epoch_loss = facts["epoch_loss"]
        self._stopped = facts["stopped"]
        self._patience.load(facts["patience"])

    def _kind(self) -> dict[str, Any]:
        """What has to be the same for a training to go on."""
        return {"strategy": "ddp", "optimizer": self._job.optimizer.kind, "steps_per_epoch": self._plan.steps}

    def _save(self, *, agreed: bool) -> None:
        """Have the conductor keep where the training is; returns before that has happened."""
        import ray

        if not agreed:
            self._agree_on_state()
        if self._rank != 0:
            return
        arrays = {**self._model(), **_named("optimizer", self._optimizer.state()), **_named("best", self._best)}
        facts = {
            **self._kind(),
            "history": self._history,
            "epoch_loss": self._epoch_loss,
            "stopped": self._stopped,
            "patience": self._patience.facts(),
        }
        if self._saving is not None:
            ray.get(self._saving)
        self._saving = self._conductor.keep.remote(_Snapshot(self._step, arrays, facts))

    def _progress(self, epoch: int, step: int, loss: float, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if self._rank != 0 or (not metrics and now - self._told < TOLD_S):
            return
        self._told = now
        message = {
            "epoch": epoch + 1,
            "epochs": self._job.epochs,
            "step": step + 1,
            "steps_per_epoch": self._plan.steps,
            "loss": loss,
            "metrics": metrics,
        }
        self._conductor.tell.remote("progress", message)

    def _finish(self) -> None:
        import ray

        if self._saving is not None:
            ray.get(self._saving)
        spent = np.zeros((self._world, len(self._spent) + 1))
        spent[self._rank] = [*self._spent.values(), time.process_time()]
        self._sum(spent)
        facts = dict(zip(self._spent, spent[:, :-1].max(axis=0).tolist(), strict=True))
        facts |= {"cpu_s": float(spent[:, -1].sum()), "workers": float(self._world)}
        # A ring sends each part of the vector on world - 1 times to sum it, and as often to spread the sum.
        facts["bytes_per_step"] = self._flat.nbytes * 2 * (self._world - 1) / self._world
        kept = self._best or self._model()
        message = {
            "parameters": kept["parameters"],
            "state": _unnamed("state", kept),
            "history": self._history,
            "epochs": -(-self._step // self._plan.steps),
            "steps": self._step,
            "stopped": "early" if self._stopped else "finished",
            "facts": facts,
        }
        self._tell("result", message)

    def _tell(self, kind: str, message: dict[str, Any]) -> None:
        import ray

        if self._rank == 0:
            ray.get(self._conductor.tell.remote(kind, message))

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._spent[name] += time.perf_counter() - began


class _Patience:
    """Whether a metric still becomes better."""

    def __init__(self, options: EarlyStopping | None) -> None:
        self._options = options
        self._best: float | None = None
        self._waited = 0

    def better(self, metrics: Mapping[str, float]) -> bool:
        """Take an epoch's metrics in; gives whether they are the best so far.

        Raises:
            ConfigurationError: what is waited for is not among them.
        """
        if self._options is None:
            return False
        if self._options.metric not in metrics:
            raise ConfigurationError(
                f"early stopping waits for '{self._options.metric}', and there are {', '.join(metrics)}; a metric of "
                "validation needs validation_data"
            )
        value = metrics[self._options.metric] * (1.0 if self._options.mode == "min" else -1.0)
        if self._best is None or value < self._best - self._options.min_delta:
            self._best, self._waited = value, 0
            return True
        self._waited += 1
        return False

    @property
    def over(self) -> bool:
        return self._options is not None and self._waited >= self._options.patience

    def facts(self) -> list[float | None]:
        return [self._best, self._waited]

    def load(self, facts: list[Any]) -> None:
        self._best, self._waited = facts


def _named(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def _unnamed(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    return {name.removeprefix(f"{prefix}/"): array for name, array in arrays.items() if name.startswith(f"{prefix}/")}
