"""A model version that runs in worker processes, kept alive.

Each instance is a process with as many lanes as runs may go on in it at once. A process that dies takes its runs with
it, which raise ``WorkerCrashedError``, and is started again: at once the first time, then after 0.1 s and twice as long
each time, up to 5 s, until a run succeeds. Starting again opens the model as it was decided the first time.

Two bounds hold when that does not help. Requests that killed a worker although they were alone in it, processes that
crashed while nothing ran in them, and processes that could not be started again, open the breaker: then nothing runs
for a while and every caller is told so. Processes that end for other reasons, such as those that somebody else killed,
are started again at most ``respawns_per_minute`` times.

A run that is to end is asked to, which the runtime looks at between two nodes; 250 ms later its process is killed.
Where runs take longer than that, it is given one and a half of what the longest took instead: a caller with a tight
deadline must not cost everybody the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from numpy.typing import NDArray

from ...core.backend import Artifact, Done, Profile, RunHandle
from ...core.catalog import Footprint
from ...core.errors import (
    DeadlineExceededError,
    GatewayError,
    ModelFailingError,
    ModelLoadError,
    ShuttingDownError,
    WorkerCrashedError,
)
from ...core.stats import WorkerStats
from ...core.tensors import Arrays, Signature
from .breaker import WINDOW_S, Breaker
from .forks import ForkError, WorkerEndedError
from .keeper import Keeper
from .lane import Lane
from .process import WorkerProcess

_log = logging.getLogger(__name__)

OnEvent = Callable[[str, Artifact, str], None]
"""Takes the kind of an event of ``core.catalog``, the version and a sentence. Called on any thread; must not block."""

KILL_AFTER_S: Final = 0.25
_FIRST_BACK_OFF_S: Final = 0.1
_MAX_BACK_OFF_S: Final = 5.0
_USUAL: Final = 1.5
_CHECK_S: Final = 1.0
_IDLE_S: Final = 2.0
_GROWN: Final = 2.0
_GROWN_FLOOR_BYTES: Final = 64 << 20
_GROWN_CHECKS: Final = 5


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How a session treats its processes.

    Attributes:
        instances: processes; lanes: runs at once in each.
        breaker_failures: see ``Breaker``; 0 never opens it.
        respawns_per_minute: of all instances together, for whatever reason.
        answer_limit_bytes: of the outputs of one run.
        begin_max_bytes: of inputs that an event loop copies itself.
        capacity_wait_s: how long ``run`` waits for a process that starts again.
    """

    instances: int = 1
    lanes: int = 1
    breaker_failures: int = 3
    respawns_per_minute: int = 60
    answer_limit_bytes: int = 256 << 20
    begin_max_bytes: int = 64 << 10
    capacity_wait_s: float = 30.0


@dataclass(slots=True, eq=False)
class _Place:
    """Where an instance's process is, or will be again."""

    process: WorkerProcess | None = None
    on_loop: list[Lane] = field(default_factory=list)
    on_threads: list[Lane] = field(default_factory=list)
    grown: int = 0
    """Checks in a row at which the process was too large."""


class WorkerSession:
    """Implements ``core.backend.IsolatedSession``.

    Args:
        opened: the first process, open and limited.
        start: starts and opens another one as the first was opened; raises ``ModelLoadError`` or ``ForkError``.
    """

    def __init__(
        self,
        artifact: Artifact,
        signature: Signature,
        profile: Profile,
        limits: SessionLimits,
        keeper: Keeper,
        start: Callable[[Callable[[WorkerProcess], None]], WorkerProcess],
        on_event: OnEvent,
        layers: dict[str, bool],
    ) -> None:
        self.artifact = artifact
        self.signature = signature
        # What is short in the worker is not short from here, where a hop comes to it.
        self.profile = replace(profile, inline_max_elements=0)
        self.lanes: Final = limits.instances * limits.lanes
        self.begin_max_bytes: Final = limits.begin_max_bytes
        self.quick_max_elements = profile.inline_max_elements
        self.stats = WorkerStats(layers=layers)
        self._limits = limits
        self._keeper = keeper
        self._start = start
        self._on_event = on_event
        self._changed = threading.Condition()
        self._places = [_Place() for _ in range(limits.instances)]
        self._breaker = Breaker(limits.breaker_failures)
        self._troubled = False
        """A breaker that is not closed, or a streak: only then a success has to be told."""
        self._streak = 0
        self._respawns: deque[float] = deque()
        self._capped_until = 0.0
        self._watcher: Callable[[], None] | None = None
        self._footprint: Footprint | None = None
        self._own_bytes = 0
        self._usual_s = 0.0
        self._closed = False
        self._closing = threading.Event()

    # -- beginning -----------------------------------------------------------------------------------------------------

    def adopt(self, first: WorkerProcess, footprint: Footprint | None) -> None:
        """Take over the process that was opened, and start the other instances."""
        self._footprint = footprint
        self._own_bytes = first.warm_bytes
        self._install(self._places[0], first)
        for place in self._places[1:]:
            self._install(place, self._start(partial(self._ended, place)))
        self._keeper.every(_CHECK_S, self._check)

    def owner(self, index: int = 0) -> Callable[[WorkerProcess], None]:
        """What to call when the process of an instance ends."""
        return partial(self._ended, self._places[index])

    def _install(self, place: _Place, process: WorkerProcess) -> None:
        lanes = [self._new_lane(process, on_loop=True) for _ in range(self._limits.lanes)]
        with self._changed:
            if self._closed or process.gone:
                gone = True
            else:
                gone = False
                place.process = process
                place.on_loop, place.on_threads = lanes, []
                self.stats.processes += 1
                self._changed.notify_all()
        if gone:
            process.close()
            if not self._closed:
                raise ForkError(f"the worker died at once: {process.cause()}")
        self._tell()

    def _new_lane(self, process: WorkerProcess, *, on_loop: bool) -> Lane:
        return process.add_lane(
            self.signature,
            on_loop=on_loop,
            stop=partial(self._stop, process),
            lost=partial(self._lost, process),
            answer_limit_bytes=self._limits.answer_limit_bytes,
        )

    # -- running -------------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        if self._troubled and self._breaker.state(time.monotonic()) == "half_open":
            return min(self._room(), 1)
        return self._room()

    def _room(self) -> int:
        return sum(self._limits.lanes for place in self._places if place.process is not None)

    def refusal(self) -> GatewayError | None:
        if not self._troubled and not self._capped_until:
            return None
        now = time.monotonic()
        wait_s = self._breaker.retry_after_s(now)
        if wait_s > 0:
            return ModelFailingError(
                f"model '{self.artifact.name}' version {self.artifact.version} failed too often and is held back",
                retry_after_s=wait_s,
            )
        if now < self._capped_until and not self._room():
            return ModelFailingError(
                f"model '{self.artifact.name}' version {self.artifact.version} had to be started too often",
                retry_after_s=self._capped_until - now,
            )
        return None

    def run(self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None = None) -> list[NDArray[Any]]:
        """As ``core.backend.Session.run``; blocks. Waits for a process that starts again.

        Raises:
            WorkerCrashedError: the process died meanwhile.
            ModelFailingError: the breaker is open.
            DeadlineExceededError: the run was ended through ``handle``.
            ModelExecutionError: the runtime refused or failed, or the outputs are too large.
        """
        place, lane = self._acquire_waiting()
        try:
            found = lane.run(inputs, tuple(outputs), handle)
        except GatewayError as error:
            self._release(place, lane, error)
            raise
        self._release(place, lane, found)
        return found

    def begin(
        self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle, done: Done, *, wait: bool = False
    ) -> bool:
        """Begin a run on the event loop; see ``core.backend.IsolatedSession``."""
        taken = self._acquire(on_loop=True)
        if taken is None:
            return False
        place, lane = taken
        ended = partial(self._finished, place, lane, done)
        try:
            lane.begin(inputs, tuple(outputs), handle, ended)
        except GatewayError as error:
            ended(error)
        else:
            if wait:
                lane.wait()
        return True

    def _finished(self, place: _Place, lane: Lane, done: Done, outcome: list[NDArray[Any]] | GatewayError) -> None:
        self._release(place, lane, outcome)
        done(outcome)

    def _acquire(self, *, on_loop: bool) -> tuple[_Place, Lane] | None:
        with self._changed:
            most = self._limits.lanes
            found: _Place | None = None
            process: WorkerProcess | None = None
            for place in self._places:
                held = place.process
                if held is not None and held.users < most and (process is None or held.users < process.users):
                    found, process = place, held
            if found is None or process is None:
                return None
            process.users += 1
            lanes = found.on_loop if on_loop else found.on_threads
            if lanes:
                return found, lanes.pop()
        try:
            return found, self._new_lane(process, on_loop=on_loop)
        except ForkError as error:
            with self._changed:
                process.users -= 1
            if isinstance(error, WorkerEndedError):
                self._lost(process, "")
            return None

    def _acquire_waiting(self) -> tuple[_Place, Lane]:
        until = time.monotonic() + self._limits.capacity_wait_s
        while True:
            if self._closed:
                raise ShuttingDownError("the model version was taken out of service")
            refused = self.refusal()
            if refused is not None:
                raise refused
            taken = self._acquire(on_loop=False)
            if taken is not None:
                return taken
            with self._changed:
                left = until - time.monotonic()
                if left <= 0:
                    raise ModelFailingError(f"model '{self.artifact.name}' has no process that is free")
                self._changed.wait(min(left, 0.1))

    def _release(self, place: _Place, lane: Lane, outcome: object) -> None:
        owner = lane.owner
        with self._changed:
            owner.users -= 1
            kept = place.process is owner
            if kept:
                (place.on_loop if lane.on_loop else place.on_threads).append(lane)
                self._changed.notify()
            last = owner.retired and not owner.users
        if not kept:
            lane.close()
        if last:
            owner.close()
        if not isinstance(outcome, WorkerCrashedError | DeadlineExceededError):
            self._usual_s = max(self._usual_s * 0.999, lane.took_s)
            if self._troubled:
                self._succeeded()

    def _succeeded(self) -> None:
        now = time.monotonic()
        with self._changed:
            self._streak = 0
            closed = self._breaker.succeeded(now)
            self.stats.breaker = self._breaker.state(now)
            self._troubled = self.stats.breaker != "closed"
        if closed:
            _log.info("%s: a run succeeded, the breaker closed", self._name)
            self._event("breaker_closed", "a run succeeded")
            self._tell()

    # -- ending runs ---------------------------------------------------------------------------------------------------

    def _stop(self, process: WorkerProcess, lane: Lane, run: int) -> None:
        process.terminate(lane, run)
        since = lane.since
        ran_s = 0.0 if since is None else time.monotonic() - since
        self._keeper.after(max(KILL_AFTER_S, _USUAL * self._usual_s - ran_s), partial(self._kill, process, lane, run))

    def _kill(self, process: WorkerProcess, lane: Lane, run: int) -> None:
        if lane.runs == run and lane.since is not None and not process.gone:
            _log.warning("%s: a run did not end when it was told to; its process is killed", self._name)
            self.stats.kills += 1
            process.kill("it was killed: a run did not end in time")

    # -- dying and coming back -----------------------------------------------------------------------------------------

    def convict(self) -> None:
        self._failed("requests killed their process although they were alone in it")

    def _failed(self, why: str) -> None:
        now = time.monotonic()
        with self._changed:
            opened = self._breaker.failed(now)
            self.stats.breaker = self._breaker.state(now)
            wait_s = self._breaker.retry_after_s(now)
            self._troubled = True
        if opened:
            _log.error("%s: %s; the breaker is open for %.1f s", self._name, why, wait_s)
            self._event("breaker_opened", why)
            self._keeper.after(wait_s, self._half_open)
            self._tell()

    def _half_open(self) -> None:
        self.stats.breaker = self._breaker.state(time.monotonic())
        self._tell()

    def _lost(self, process: WorkerProcess, reason: str) -> None:
        """A lane found its worker dead, or wants it dead."""
        if reason:
            process.kill(f"it broke the protocol: {reason}")
        for place in self._places:
            self._ended(place, process)

    def _ended(self, place: _Place, process: WorkerProcess) -> None:
        with self._changed:
            if place.process is not process:
                return
            place.process = None
            idle = place.on_loop + place.on_threads
            place.on_loop, place.on_threads = [], []
            self.stats.processes -= 1
            self._troubled = True
            unprovoked = not process.users
        for lane in idle:
            lane.close()
        if self._closed:
            return
        self._tell()
        threading.Thread(
            target=self._come_back, args=(place, process, unprovoked), name="inferway-respawn", daemon=True
        ).start()

    def _come_back(self, place: _Place, dead: WorkerProcess, unprovoked: bool) -> None:
        """Start another process in the place of one that has ended.

        Args:
            unprovoked: nothing ran in it. Of what died with a run, the batcher finds out which request it was.
        """
        cause = dead.cause()
        if not dead.why:
            self.stats.crashes += 1
        _log.error("%s: its worker process ended: %s", self._name, cause)
        self._event("worker_crashed", cause)
        if unprovoked and dead.crashed:
            self._failed(f"its process crashed while nothing ran in it: {cause}")
        dead.close()
        while not self._closing.wait(self._back_off_s()):
            self._streak += 1
            self.stats.restarts += 1
            try:
                process = self._start(partial(self._ended, place))
                self._install(place, process)
            except (ModelLoadError, ForkError) as error:
                _log.error("%s: its worker process did not start again: %s", self._name, error)
                self._failed(f"its process did not start again: {error}")
            else:
                return

    def _back_off_s(self) -> float:
        """How long to wait before a process is started again, this one counted."""
        now = time.monotonic()
        with self._changed:
            streak = self._streak
            wait_s = min(_FIRST_BACK_OFF_S * 2.0 ** min(streak - 1, 30), _MAX_BACK_OFF_S) if streak else 0.0
            while self._respawns and self._respawns[0] <= now - WINDOW_S:
                self._respawns.popleft()
            if len(self._respawns) >= self._limits.respawns_per_minute:
                wait_s = max(wait_s, self._respawns[0] + WINDOW_S - now)
                self._capped_until = now + wait_s
            self._respawns.append(now + wait_s)
            capped = self._capped_until > now
        if capped:
            self._tell()
        return wait_s

    # -- care ----------------------------------------------------------------------------------------------------------

    def _check(self) -> bool:
        """Look after idle memory and processes that have grown. On the keeper's thread; False: never again."""
        if self._closed:
            return False
        now = time.monotonic()
        for place in self._places:
            with self._changed:
                process = place.process
                lanes = [*place.on_loop, *place.on_threads] if process is not None and not process.users else []
                for lane in lanes:
                    if lane.large and now - lane.last_used > _IDLE_S:
                        lane.trim()
            if process is None or not process.warm_bytes:
                continue
            bound = max(_GROWN * process.warm_bytes, process.warm_bytes + _GROWN_FLOOR_BYTES)
            place.grown = place.grown + 1 if process.own_bytes > bound else 0
            if place.grown >= _GROWN_CHECKS:
                place.grown = 0
                threading.Thread(
                    target=self._recycle, args=(place, process), name="inferway-respawn", daemon=True
                ).start()
        return True

    def _recycle(self, place: _Place, old: WorkerProcess) -> None:
        """Put a fresh process in the place of one that has grown; runs that go on in the old one end there."""
        _log.info("%s: its worker process has grown and is replaced", self._name)
        try:
            fresh = self._start(partial(self._ended, place))
        except (ModelLoadError, ForkError) as error:
            _log.error("%s: its worker process could not be replaced: %s", self._name, error)
            return
        with self._changed:
            if place.process is not old:
                idle: list[Lane] = []
                unwanted: WorkerProcess | None = fresh
            else:
                place.process = None
                idle = place.on_loop + place.on_threads
                place.on_loop, place.on_threads = [], []
                self.stats.processes -= 1
                old.retired = True
                unwanted = None if old.users else old
        for lane in idle:
            lane.close()
        if unwanted is not fresh:
            self.stats.recycled += 1
            try:
                self._install(place, fresh)
            except ForkError:
                _log.exception("%s: its new worker process died at once", self._name)
        if unwanted is not None:
            unwanted.close()

    def watch(self, changed: Callable[[], None] | None) -> None:
        self._watcher = changed

    def _tell(self) -> None:
        watcher = self._watcher
        if watcher is not None:
            watcher()

    def _event(self, kind: str, detail: str) -> None:
        try:
            self._on_event(kind, self.artifact, detail)
        except Exception:
            _log.exception("telling of an event failed")

    @property
    def _name(self) -> str:
        return f"{self.artifact.name} version {self.artifact.version}"

    def footprint(self) -> Footprint | None:
        """Of all processes, as measured of one after it was warmed up; None where the system does not tell."""
        one, others = self._footprint, self._limits.instances - 1
        if one is None or not others:
            return one
        # Pages of files are in memory once: weights that are mapped do not count again with each instance.
        each = min(one.resident_bytes, self._own_bytes or one.resident_bytes)
        return Footprint(
            one.resident_bytes + others * each,
            one.peak_bytes + others * (each + one.peak_bytes - one.resident_bytes),
        )

    @property
    def resident_bytes(self) -> int:
        """Memory that the processes have for themselves, now."""
        held = [place.process for place in self._places]
        return sum(process.own_bytes for process in held if process is not None)

    def close(self) -> None:
        """End the processes, whose memory goes back with them. Idempotent; never called during a run."""
        self._closed = True
        self._closing.set()
        with self._changed:
            processes = [place.process for place in self._places if place.process is not None]
            for place in self._places:
                place.process = None
                place.on_loop, place.on_threads = [], []
            self.stats.processes = 0
            self._changed.notify_all()
        for process in processes:
            process.close()
