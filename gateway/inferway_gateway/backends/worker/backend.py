"""Opening model versions in worker processes.

A model is loaded for the first time where it is going to run: in a process that is locked in and bounded in memory and
time. One that it does not survive, or that takes too much, is thrown away with all that it took, so no trial is needed
before that, which would cost a large model a second load.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ...core.backend import Artifact
from ...core.errors import ModelLoadError
from ..onnx.graph import read_graph
from .description import BackendOptions, Order, Report
from .forks import ForkError, ForkServer
from .keeper import Keeper
from .process import WorkerProcess
from .sandbox import capabilities
from .session import OnEvent, SessionLimits, WorkerSession

_log = logging.getLogger(__name__)

_MOST_INSTANCES: Final = 4
"""Processes of one version per processor: more gain nothing, and who deploys must not fill the process table."""
_LOAD_FLOOR_BYTES: Final = 2 << 30
_LOAD_RATIO: Final = 6
"""FP16 weights in a file of 1 are mapped, expanded to 2 and packed into 2 more while they are loaded."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What workers may use and how they are treated.

    Attributes:
        load_timeout_s: for opening a model, everything included; then its process is killed.
        load_bytes: address space while a model is opened; None derives it from the size of its files.
        session: see ``SessionLimits``; ``instances`` and ``lanes`` are each model's own.
    """

    load_timeout_s: float = 300.0
    load_bytes: int | None = None
    session: SessionLimits = field(default_factory=SessionLimits)


def _nothing(kind: str, artifact: Artifact, detail: str) -> None:
    """Nobody wants to hear of events."""


class WorkerBackend:
    """Implements ``core.backend.Backend``: each model version in processes of its own, locked in.

    Leaving ends the fork server, which the first ``open`` starts, and every worker. ``open`` may be called from any
    thread.

    Args:
        options: of the ``OnnxBackend`` in the workers.
        cpus: processors that runs may use; decides the lanes of a process.
        on_event: told of crashes and of the breaker.
        test_hooks: lets inputs crash a worker. For tests.
    """

    def __init__(
        self,
        options: BackendOptions | None = None,
        *,
        cpus: int | None = None,
        limits: WorkerLimits | None = None,
        on_event: OnEvent = _nothing,
        confine: bool = True,
        test_hooks: bool = False,
    ) -> None:
        self._cpus = cpus or len(os.sched_getaffinity(0))
        self._options = replace(options or BackendOptions(), cpus=self._cpus)
        self._limits = limits or WorkerLimits()
        self.on_event = on_event
        self._confine = confine
        self._hooks = test_hooks
        self._stack = ExitStack()
        self._forks = ForkServer()
        self._keeper = Keeper()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._forks)
        self._stack.enter_context(self._keeper)
        if self._confine:
            for lack in capabilities().missing:
                _log.warning("workers are not locked in as they should be: %s", lack)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def forks(self) -> ForkServer:
        """What starts the processes, for others that need some."""
        return self._forks

    def open(self, artifact: Artifact) -> WorkerSession:
        """Open a model version; blocks for as long as that takes.

        Raises:
            ModelLoadError: as ``OnnxBackend.open`` does, or the process died of it, took too long or did not start.
        """
        try:
            return self._open(artifact)
        except ModelLoadError as error:
            message = error.message
        except ForkError as error:
            message = str(error)
        except OSError as error:
            message = error.strerror or "the files cannot be read"
        prefix = f"failed to load '{artifact.name}'"
        if not message.startswith(prefix):
            message = f"{prefix} version {artifact.version}: {message}"
        raise ModelLoadError(message)

    def _open(self, artifact: Artifact) -> WorkerSession:
        limits = self._limits
        order = self._order(artifact)
        # The session needs what the first process finds out, and that process needs the session to tell of its end.
        holder: list[Callable[[WorkerProcess], None]] = []
        first, report = self._start(artifact, order, lambda process: holder[0](process) if holder else None)
        try:
            footprint = first.warm_up(limits.load_timeout_s)
            if footprint is not None:
                first.limit(footprint.peak_bytes)
            peak = footprint.peak_bytes if footprint is not None else None
            again = replace(order, decided=report.decided)

            def start(on_end: Callable[[WorkerProcess], None]) -> WorkerProcess:
                process, _ = self._start(artifact, again, on_end)
                process.warm_bytes = first.warm_bytes
                if peak is not None:
                    process.limit(peak)
                return process

            most = _MOST_INSTANCES * self._cpus
            instances = artifact.config.instances or 1
            if instances > most:
                _log.warning(
                    "%s version %d asks for %d instances; it gets %d, which is %d for each of %d processors",
                    artifact.name, artifact.version, instances, most, _MOST_INSTANCES, self._cpus,
                )  # fmt: skip
            session = WorkerSession(
                artifact,
                report.signature,
                report.profile,
                replace(
                    limits.session,
                    instances=min(instances, most),
                    lanes=max(self._cpus // report.profile.intra_op_threads, 1),
                ),
                self._keeper,
                start,
                self._tell,
                {layer: layer not in report.missing for layer in (*report.layers, *report.missing)},
            )
            holder.append(session.owner())
            session.adopt(first, footprint)
        except BaseException:
            first.close()
            raise
        return session

    def _tell(self, kind: str, artifact: Artifact, detail: str) -> None:
        self.on_event(kind, artifact, detail)

    def _order(self, artifact: Artifact) -> Order:
        path = artifact.path
        if not path.is_file():
            raise ModelLoadError("the model file is missing")
        external = read_graph(path).external
        config = artifact.config
        size = path.stat().st_size
        if external:
            size += sum(entry.stat().st_size for entry in path.parent.rglob("*") if entry.is_file())
        files = sorted({given.file for warmup in config.warmup for given in warmup.inputs if given.source == "file"})
        return Order(
            artifact.name,
            artifact.version,
            path.name if external else "",
            config,
            self._options,
            tuple(files),
            address_space_bytes=self._limits.load_bytes or _LOAD_FLOOR_BYTES + _LOAD_RATIO * size,
            confine=self._confine,
            test_hooks=self._hooks,
        )

    def _start(
        self, artifact: Artifact, order: Order, on_end: Callable[[WorkerProcess], None]
    ) -> tuple[WorkerProcess, Report]:
        title = f"inferway worker {artifact.name}/{artifact.version}"
        with ExitStack() as stack:
            wanted: Sequence[Path] = [artifact.path.parent if order.file else artifact.path, *map(Path, order.files)]
            fds = [_opened(stack, path) for path in wanted]
            process = WorkerProcess(self._forks, title, on_end)
            try:
                report = process.open(order, fds, self._limits.load_timeout_s)
            except BaseException:
                process.close()
                raise
        return process, report


def _opened(stack: ExitStack, path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
