"""What a backend promises: how a model version is opened, what is known of it, and how a batch is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.typing import NDArray

from .errors import GatewayError
from .model_config import ModelConfig
from .tensors import Arrays, Signature

RowExactness = Literal["exact", "padded", "inexact", "unbatched"]
"""How a row's result depends on the rows that run with it.

exact: bit-equal alone and in any batch. padded: bit-equal in every batch of two and more, so a lone row needs a copy of
itself beside it. inexact: it depends on its mates (dynamic quantisation does that). unbatched: there is no batch axis.
"""


@dataclass(frozen=True, slots=True)
class CostPoint:
    """Seconds that one run of ``rows`` rows takes, the best of several."""

    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One candidate of the load-time trial of session options, for the report."""

    options: str
    rows: int
    seconds: float
    chosen: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured of a session at load.

    Attributes:
        row_exactness: found by the probe, not assumed.
        batchable: rows of different requests may share a run.
        inline_max_elements: a run whose inputs have at most that many elements was measured short enough to happen on
            the event loop; 0 where no run may.
        cost: run time by rows, ascending in rows; empty where it could not be measured.
        cost_row_elements: elements of all inputs together, per row, with which ``cost`` was measured; 0 where not
            known. It lets the curve be carried over to other lengths of a variable axis.
        trial: every candidate of the option trial with its time.
        execution_providers: in the order in which the session prefers them.
        intra_op_threads: processors that one run keeps busy; more runs at once than processors divided by it gain
            nothing.
        note: in words, why the model is not batched or not inline.
    """

    row_exactness: RowExactness = "unbatched"
    batchable: bool = False
    inline_max_elements: int = 0
    cost: tuple[CostPoint, ...] = ()
    cost_row_elements: int = 0
    trial: tuple[TrialRow, ...] = ()
    execution_providers: tuple[str, ...] = ()
    intra_op_threads: int = 1
    load_s: float = 0.0
    note: str = ""


class RunHandle:
    """A handle on one run, by which another thread ends it early.

    ``terminate`` before the run begins prevents it; during the run it asks the runtime to stop between two nodes;
    after the run it does nothing. It may be called from any thread, any number of times.
    """

    __slots__ = ("_stop", "terminated")

    def __init__(self) -> None:
        self.terminated = False
        self._stop: Callable[[], None] | None = None

    def bind(self, stop: Callable[[], None] | None) -> None:
        """Set by the session at the start of the run, to None at its end."""
        self._stop = stop
        if stop is not None and self.terminated:
            stop()

    def terminate(self) -> None:
        self.terminated = True
        stop = self._stop
        if stop is not None:
            stop()


class Session(Protocol):
    """A loaded model version. ``run`` is thread-safe and blocks; the rest does not change after ``open``."""

    @property
    def signature(self) -> Signature: ...

    @property
    def profile(self) -> Profile: ...

    def run(self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None = None) -> list[NDArray[Any]]:
        """Run the model once.

        Args:
            inputs: arrays that ``signature.check`` accepted.
            outputs: names of outputs, each of the signature's, none twice.
            handle: ends the run early when given.
        Returns:
            One array per name of ``outputs``, in that order, C-contiguous.
        Raises:
            ModelExecutionError: the runtime refused or failed; the message is fit for a caller.
            DeadlineExceededError: the run was ended through ``handle``.
        """
        ...

    def close(self) -> None:
        """Release the session and give its memory back. Idempotent; never called during a run."""
        ...


Done = Callable[[list[NDArray[Any]] | GatewayError], None]
"""Takes what a run gave: outputs as ``Session.run`` returns them, or what it would have raised."""


@runtime_checkable
class IsolatedSession(Session, Protocol):
    """A session whose runs happen in other processes: they can be begun without a thread, and they can die.

    A run whose process died raises ``WorkerCrashedError``. Whose fault that was is known only of a run that had the
    session to itself. All of this may be called from any thread, but ``begin``.
    """

    @property
    def lanes(self) -> int:
        """Runs that may go on at once while everything is well."""
        ...

    @property
    def capacity(self) -> int:
        """Runs that may go on at once now; 0 while its processes start again."""
        ...

    @property
    def begin_max_bytes(self) -> int:
        """Inputs, or outputs, of more bytes than that take too long to copy for an event loop."""
        ...

    @property
    def quick_max_elements(self) -> int:
        """A run whose inputs have at most that many elements was measured, where it happens, to be as short as one that
        a session of this process may run on the event loop; 0 where none is."""
        ...

    def refusal(self) -> GatewayError | None:
        """What to answer instead of running, where the session is to be left alone for a while."""
        ...

    def begin(
        self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle, done: Done, *, wait: bool = False
    ) -> bool:
        """Begin a run on the event loop; ``done`` is called there when it is over. False: it cannot begin now.

        Args:
            wait: stay for the answer for up to a millisecond, without using the processor, before the loop goes on.
        """
        ...

    def convict(self) -> None:
        """A request has killed its process although it was alone there and had been tried before."""
        ...

    def watch(self, changed: Callable[[], None] | None) -> None:
        """Have ``changed`` called, on any thread, after ``capacity`` or ``refusal`` may have changed."""
        ...


@dataclass(frozen=True, slots=True)
class Artifact:
    """The files of one model version, as a backend needs them."""

    name: str
    version: int
    path: Path
    """The ONNX file; external data, where present, lies in the same directory."""
    config: ModelConfig = field(default_factory=ModelConfig)
    home: Path | None = None
    """The model's own folder, where files that belong to it may lie; None: there is only the ONNX file's."""


class Backend(Protocol):
    """Opens sessions. ``open`` blocks: it loads, tries options, probes and warms up."""

    def open(self, artifact: Artifact) -> Session:
        """Raises ``ModelLoadError`` with a message that says what is wrong with the model."""
        ...
