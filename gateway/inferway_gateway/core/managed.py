"""The catalog's versions in memory: loaded when they are asked for, within a budget, and unloaded to make room.

A version is in one of few places. In the catalog's last snapshot: then the table of models names it, loaded or not, and
a request that finds it unloaded has it loaded. Staged: loaded for a deployment that is not committed yet, and out of
everybody's reach; the snapshot that first names it finds it here, so that it is published by the same step, whoever
takes that step, and is never loaded a second time. Or nowhere.

All of this runs on the event loop. Each version has one lock, which its load and its unload hold; a request takes none.
Loads are tasks of their own: those who wait for one may leave, and it goes on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, Protocol

from .backend import Session
from .batcher import Batcher
from .budget import Key, MemoryBudget
from .catalog import Footprint, VersionRecord
from .encoding import TextEncoder, TextPackage
from .errors import (
    ConflictError,
    DeadlineExceededError,
    GatewayError,
    MemoryExceededError,
    ModelNotFoundError,
    ModelNotReadyError,
    VersionNotFoundError,
)
from .execution import Executor, speaking
from .generation import TextGenerator
from .model_config import ModelConfig
from .relay import TextRelay
from .runners import RunnerPool
from .served import ModelEntry, ModelTable, ServedVersion, State
from .stats import ModelStats

logger = logging.getLogger("inferway.models")

Status = Literal["READY", "LOADING", "UNLOADING", "UNLOADED", "FAILED"]
_STATES: Final[dict[Status, State]] = {
    "READY": "READY",
    "LOADING": "LOADING",
    "UNLOADING": "UNLOADING",
    "UNLOADED": "UNAVAILABLE",
    "FAILED": "UNAVAILABLE",
}
"""As the repository extension's index has them."""
UNLOADED: Final = "unloaded until the next request"
_LOOK_AGAIN_S: Final = 0.1
"""How often a load that waits for room looks: nobody tells when a version's last request is answered."""
_ROOM_WAIT_S: Final = 60.0
_EARLY_WAIT_S: Final = 1.0
"""How long a change of the catalog waits for what is loaded ahead, so that an alias moves to what is there already."""
_RETRY_S: Final = (1.0, 60.0)
"""A version that could not be loaded is tried again at most so often: at first, and after many failures."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A version that was opened.

    Attributes:
        session: requests to it are batched by us; None where ``executor`` answers them itself.
        footprint: measured; None where it could not be, and the estimate holds.
        text: what makes a text encoder of it; None where it is none.
    """

    config: ModelConfig
    session: Session | None = None
    executor: Executor | None = None
    footprint: Footprint | None = None
    text: TextPackage | None = None


class Opener(Protocol):
    """Makes a version of the catalog something that answers."""

    async def estimate(self, record: VersionRecord) -> int:
        """Bytes of memory that it will need, its load included: as measured before, or by its files.

        Raises:
            GatewayError: its files cannot be brought into place.
        """
        ...

    async def open(self, record: VersionRecord, stats: ModelStats) -> Opened:
        """Bring its files into place and load it.

        Args:
            stats: what is counted of the version, for an executor that counts itself.

        Being cancelled leaves nothing open: what cannot be stopped is closed when it is done.

        Raises:
            GatewayError: its files are missing or cannot be loaded; the message is for the operator.
        """
        ...

    async def close(self, opened: Session) -> None:
        """Close a session whose batcher is closed."""
        ...


@dataclass(slots=True, eq=False)
class _Version:
    record: VersionRecord
    status: Status = "UNLOADED"
    reason: str = UNLOADED
    served: ServedVersion | None = None
    footprint: Footprint | None = None
    estimate: int = 0
    """What its last load was expected to need."""
    stats: ModelStats = field(default_factory=ModelStats)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[ServedVersion] | None = None
    urgent: bool = False
    """Somebody waits for it: others may leave for it."""
    staged: bool = False
    failures: int = 0
    retry_at: float = 0.0

    @property
    def key(self) -> Key:
        return self.record.model, self.record.version


class _NoRoomError(MemoryExceededError):
    """There is no room for what nobody asks for yet."""


class ManagedVersions:
    """The versions of the catalog.

    Args:
        opener: opens and closes them.
        runners: the threads that in-process sessions and batches run on.
        budget: what they may hold together.
        run_timeout_s: the longest run of a version whose configuration says nothing.
        drain_timeout_s: how long an unloaded version may still answer what it had taken.
        load_wait_s: how long a request waits for a load.
    """

    def __init__(
        self,
        opener: Opener,
        runners: RunnerPool,
        budget: MemoryBudget,
        *,
        run_timeout_s: float = 30.0,
        drain_timeout_s: float = 30.0,
        load_wait_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._opener = opener
        self._runners = runners
        self.budget: Final = budget
        self._run_timeout_s = run_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._load_wait_s = load_wait_s
        self._clock = clock
        self.table: Final[ModelTable] = {}
        """Every model by name, the folder's too, which the registry puts in."""
        self._entries: dict[str, ModelEntry] = {}
        self._versions: dict[Key, _Version] = {}
        self._staged: dict[Key, _Version] = {}
        self._ahead: frozenset[Key] = frozenset()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled = False
        self._closing = False

    # ------------------------------------------------------------------ what is asked

    @property
    def settled(self) -> bool:
        """The first snapshot was taken in, and what was to be loaded ahead is, or could not be."""
        return self._settled

    def has(self, name: str) -> bool:
        """Whether the catalog's last snapshot has versions of that model."""
        return name in self._entries

    def status(self, name: str, version: int) -> tuple[Status, str]:
        """How a version is, and why; ``UNLOADED`` for one that no snapshot has named yet."""
        found = self._versions.get((name, version))
        return ("UNLOADED", UNLOADED) if found is None else (found.status, found.reason)

    def footprint(self, name: str, version: int) -> Footprint | None:
        """What a loaded version, staged ones too, was measured to need; None where it was not."""
        found = self._staged.get((name, version)) or self._versions.get((name, version))
        return None if found is None else found.footprint

    def loaded(self) -> Iterator[ServedVersion]:
        """Every loaded version, staged ones too."""
        for found in [*self._versions.values(), *self._staged.values()]:
            if found.served is not None:
                yield found.served

    async def acquire(
        self, name: str, version: int | None, *, deadline: float | None = None, evict: bool = True
    ) -> ServedVersion:
        """The version, loaded if it is not; all who ask while it loads wait for the same load.

        Args:
            version: None takes the highest.
            deadline: moment on the loop's clock after which nobody wants it.
            evict: whether others may leave memory for it.
        Raises:
            ModelNotFoundError, VersionNotFoundError: the catalog has none such.
            ModelNotReadyError: it could not be loaded, or loading takes longer than ``load_wait_s``; the load goes on.
                Without ``evict``: or there is no room for it.
            MemoryExceededError: it needs more memory than there is.
            DeadlineExceededError: the deadline passed before it was loaded.
        """
        entry = self._entries.get(name)
        if entry is None or self.table.get(name) is not entry or not entry.states:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        number = max(entry.states) if version is None else version
        found = self._versions.get((name, number))
        if found is None:
            raise VersionNotFoundError(f"Request for unknown model: '{name}' version {number} is not found")
        loop = asyncio.get_running_loop()
        end = loop.time() + self._load_wait_s
        while found.served is None:
            self._check_retry(found)
            task = self._start(found, urgent=evict)
            until = end if deadline is None else min(end, deadline)
            await asyncio.wait((task,), timeout=max(until - loop.time(), 0))
            if not task.done():
                if deadline is not None and until == deadline:
                    raise DeadlineExceededError(f"the deadline passed while '{name}' version {number} was loaded")
                raise ModelNotReadyError(
                    f"Request for unready model: '{name}' version {number} is loading, which takes longer than "
                    f"{self._load_wait_s:g} s",
                    retry_after_s=self._load_wait_s / 4,
                )
            self._raise_failure(found, task, evict)
        return found.served

    def _check_retry(self, found: _Version) -> None:
        left = found.retry_at - self._clock()
        if found.status == "FAILED" and left > 0:
            raise self._unready(found, left)

    def _raise_failure(self, found: _Version, task: asyncio.Task[ServedVersion], evict: bool) -> None:
        """Raise what a load that was waited for ended with; nothing where it succeeded or is worth another try."""
        if task.cancelled():
            raise self._unready(found, 1.0)
        error = task.exception()
        if error is None or (evict and isinstance(error, _NoRoomError)):
            return
        if isinstance(error, _NoRoomError):
            raise ModelNotReadyError(
                f"Request for unready model: '{found.key[0]}' version {found.key[1]}: {error.message}"
            )
        if isinstance(error, MemoryExceededError):
            raise MemoryExceededError(error.message)
        raise self._unready(found, max(found.retry_at - self._clock(), 0.0))

    def _unready(self, found: _Version, wait_s: float) -> ModelNotReadyError:
        name, version = found.key
        return ModelNotReadyError(
            f"Request for unready model: '{name}' version {version} is not ready: {found.reason}",
            retry_after_s=wait_s,
        )

    # ------------------------------------------------------------------ the catalog

    def sync(self, records: Iterable[VersionRecord]) -> frozenset[Key]:
        """Take in the catalog's versions; what is staged and named here is published.

        Returns:
            Versions that are in the catalog no more. They serve on until ``retire``, so that the aliases that named
            them can be moved first.
        """
        wanted = {(record.model, record.version): record for record in records}
        for key, record in wanted.items():
            found = self._versions.get(key)
            if found is not None and found.record.digest != record.digest:
                # The number was deleted and given to other content while nobody looked.
                self._forget(found)
                self._spawn(self._dispose(found, self._detach(found)))
                found = None
            if found is None:
                found = self._staged.get(key)
                if found is not None and found.record.digest == record.digest and found.served is not None:
                    del self._staged[key]
                    found.staged = False
                else:
                    found = _Version(record)
                self._versions[key] = found
            found.record = record
            self.budget.pin(key, record.pinned)
            self._show(found)
        return frozenset(self._versions.keys() - wanted.keys())

    async def load_ahead(self, keys: Collection[Key]) -> None:
        """Load what aliases point at and what is pinned, where there is room for it without anybody leaving. Waits a
        moment for it, and at the first time until it is done."""
        self._ahead = frozenset(keys)
        starting = []
        for key in sorted(keys):
            found = self._versions.get(key)
            if (
                found is not None
                and found.served is None
                and found.retry_at <= self._clock()
                and not self.hides(key[0])
            ):
                starting.append(self._start(found, urgent=found.record.pinned))
        if not self._settled:
            self._spawn(self._settle(starting))
        if starting:
            await asyncio.wait(starting, timeout=_EARLY_WAIT_S)

    async def _settle(self, starting: Collection[asyncio.Task[ServedVersion]]) -> None:
        if starting:
            await asyncio.wait(starting)
        self._settled = True

    async def retire(self, keys: Collection[Key]) -> None:
        """Unload versions that were deleted, and forget them. Waits for what they have in flight."""
        gone = [found for key in keys if (found := self._versions.get(key)) is not None]
        for found in gone:
            self._forget(found)
        await asyncio.gather(*(self._dispose(found, self._detach(found)) for found in gone))

    def trim(self) -> None:
        """Look at who was used lately, and let some go where all hold more than the budget. Cheap; called often."""
        self.budget.observe()
        if self.budget.committed_bytes > self.budget.limit_bytes:
            self._unload(self.budget.trim())

    # ------------------------------------------------------------------ deployments

    async def stage(self, record: VersionRecord) -> ServedVersion:
        """Load a version that is not in the catalog yet, out of everybody's reach. Then ``sync`` publishes it once the
        catalog has it, or ``discard`` unloads it.

        Being cancelled leaves nothing: what cannot be stopped is closed, and its memory released, when it is done.

        Raises:
            ConflictError: it is staged already.
            MemoryExceededError: it can never fit, or cannot while versions in use stay.
            GatewayError: it cannot be loaded.
        """
        key = record.model, record.version
        if key in self._staged:
            raise ConflictError(f"'{record.model}' version {record.version} is being deployed already")
        found = _Version(record, staged=True)
        self._staged[key] = found
        task = self._start(found, urgent=True)
        try:
            served = await asyncio.shield(task)
            if found.footprint is not None:
                self.budget.check(key, found.footprint.peak_bytes, how="measured")
        except BaseException:
            del self._staged[key]
            ending = self._spawn(self._dispose(found, self._detach(found)))
            if task.done():
                await asyncio.shield(ending)
            raise
        return served

    async def discard(self, record: VersionRecord) -> None:
        """Unload a staged version. Does nothing where it is not staged any more."""
        found = self._staged.pop((record.model, record.version), None)
        if found is not None:
            await asyncio.shield(self._spawn(self._dispose(found, self._detach(found))))

    # ------------------------------------------------------------------ names of the folder

    def hide(self, name: str) -> None:
        """The folder has that name: what the catalog has under it is unloaded and out of reach."""
        for found in self._of(name):
            if found.served is not None:
                self._unload([found.key])

    def reveal(self, name: str) -> None:
        """The folder has that name no more."""
        entry = self._entries.get(name)
        if entry is not None:
            self.table[name] = entry

    def hides(self, name: str) -> bool:
        """Whether the catalog has a model of that name, and the folder too."""
        return name in self._entries and self.table.get(name) is not self._entries[name]

    def _of(self, name: str) -> list[_Version]:
        return [found for (model, _), found in self._versions.items() if model == name]

    # ------------------------------------------------------------------ end

    async def close(self) -> None:
        """Unload everything. Loads under way are given up."""
        self._closing = True
        everything = [*self._versions.values(), *self._staged.values()]
        loading = [found.task for found in everything if found.task is not None and not found.task.done()]
        for task in loading:
            task.cancel()
        if loading:
            await asyncio.wait(loading)
        await asyncio.gather(*(self._dispose(found, self._detach(found)) for found in everything))
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ------------------------------------------------------------------ how

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something whose end ``close`` waits for, and whoever else wants to."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("unloading a model version failed unexpectedly", exc_info=task.exception())

    def _start(self, found: _Version, *, urgent: bool) -> asyncio.Task[ServedVersion]:
        """The load of a version, begun unless it is under way."""
        found.urgent = found.urgent or urgent
        if found.task is None or found.task.done():
            name, version = found.key
            found.task = asyncio.create_task(self._load(found), name=f"inferway-load {name}/{version}")
            found.task.add_done_callback(_retrieve)
        return found.task

    async def _load(self, found: _Version) -> ServedVersion:
        async with found.lock:
            if found.served is not None:
                return found.served
            self._set(found, "LOADING", "")
            try:
                served = await self._open(found)
            except _NoRoomError:
                self._set(found, "UNLOADED", UNLOADED)
                raise
            except Exception as error:
                self._failed(found, error)
                raise
            except BaseException:
                self._set(found, "UNLOADED", UNLOADED)
                raise
            finally:
                found.urgent = False
            found.failures = 0
            found.served = served
            self._set(found, "READY", "")
        return served

    async def _open(self, found: _Version) -> ServedVersion:
        key, record = found.key, found.record
        name, version = key
        need = found.estimate = await self._opener.estimate(record)
        self.budget.check(key, need, how="estimated" if record.footprint is None else "measured")
        await self._make_room(found, need)
        try:
            started = self._clock()
            opened = await self._opener.open(record, found.stats)
            try:
                executor = opened.executor or self._batch(found, opened)
            except BaseException:
                if opened.session is not None:
                    await asyncio.shield(self._opener.close(opened.session))
                raise
            found.footprint = opened.footprint
            leaving = self.budget.loaded(
                key,
                self._need(found),
                pinned=record.pinned,
                busy=partial(_is_busy, found),
                activity=partial(_activity, found.stats),
            )
        except BaseException:
            self.budget.release(key)
            self._changed.set()
            raise
        self._unload(leaving)
        logger.info("'%s' version %d is loaded in %.2f s", name, version, self._clock() - started)
        package = opened.text
        text: TextEncoder | TextGenerator | TextRelay | None = speaking(executor)
        if package is not None:
            text = TextEncoder(executor, package.spec, package.tokenizer)
        return ServedVersion(name, version, opened.config, opened.session, executor, found.stats, text=text)

    def _need(self, found: _Version) -> int:
        if found.footprint is not None:
            return found.footprint.peak_bytes
        return found.estimate

    def _batch(self, found: _Version, opened: Opened) -> Executor:
        assert opened.session is not None  # an opener gives one of the two
        name, version = found.key
        return Batcher(
            opened.session,
            opened.config,
            found.stats,
            self._runners,
            run_timeout_s=self._run_timeout_s,
            name=f"'{name}' version {version}",
        )

    async def _make_room(self, found: _Version, need: int) -> None:
        """Reserve memory, and wait until those that leave for it have."""
        key, record = found.key, found.record
        if found.staged:
            kept = self.budget.held_bytes(partial(self._serves_on, record.model))
            if need + kept > self.budget.limit_bytes:
                raise MemoryExceededError(
                    f"'{key[0]}' version {key[1]} needs {need} bytes of memory; what the aliases of '{key[0]}' point "
                    f"at holds {kept} of the budget of {self.budget.limit_bytes} bytes and serves until they move"
                )
        end = self._clock() + _ROOM_WAIT_S
        while True:
            # Cleared first: what changes between a failed try and the wait is not missed.
            self._changed.clear()
            leaving = self.budget.reserve(
                key, need, pinned=record.pinned, evict=found.urgent, spare=self._spared(found)
            )
            if leaving is not None:
                break
            if not found.urgent:
                raise _NoRoomError("there is no room for it now")
            if self._clock() >= end:
                raise MemoryExceededError(
                    f"'{key[0]}' version {key[1]} needs {need} bytes of memory, and versions that are in use or pinned "
                    f"hold {self.budget.committed_bytes} of the budget of {self.budget.limit_bytes} bytes"
                )
            try:
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
        try:
            await asyncio.gather(*(asyncio.shield(task) for task in self._unload(leaving)))
        except BaseException:
            self.budget.release(key)
            raise

    def _spared(self, found: _Version) -> Callable[[Key], bool]:
        """Who must not leave for this version: for a deployment, what its model's aliases point at now, for that has to
        serve on if the deployment fails."""
        if not found.staged:
            return lambda key: key == found.key or key in self._staged
        model = found.record.model
        return lambda key: key in self._staged or self._serves_on(model, key)

    def _serves_on(self, model: str, key: Key) -> bool:
        return key[0] == model and key in self._ahead

    def _unload(self, keys: Collection[Key]) -> list[asyncio.Task[None]]:
        """Take versions out of reach now, and out of memory in tasks of their own, which are returned."""
        tasks = []
        for key in keys:
            found = self._versions.get(key)
            if found is None:
                self.budget.release(key)
                continue
            logger.info("'%s' version %d leaves memory", *key)
            tasks.append(self._spawn(self._dispose(found, self._detach(found))))
        return tasks

    def _detach(self, found: _Version) -> ServedVersion | None:
        """Take a version out of reach; what was loaded of it is the caller's to dispose of."""
        served, found.served = found.served, None
        if served is not None:
            self.budget.mark_leaving(found.key)
            self._set(found, "UNLOADING", "")
        return served

    async def _dispose(self, found: _Version, served: ServedVersion | None) -> None:
        """Let a detached version answer what it has taken, close it, and give its memory back. One that is loading is
        waited for and goes the same way."""
        async with found.lock:
            served = served or self._detach(found)
            if served is None:
                return
            try:
                await self._shut(served)
            finally:
                self.budget.release(found.key)
                self._changed.set()
                self._set(found, "UNLOADED", UNLOADED)

    async def _shut(self, served: ServedVersion) -> None:
        given_up = await served.batcher.drain(self._drain_timeout_s)
        if given_up:
            logger.warning("gave up on %d requests of '%s' version %d", given_up, served.name, served.version)
        if not await served.batcher.close():
            # A run that ignores its end still reads the session's memory: better to keep it than to crash.
            logger.error("'%s' version %d has a run that does not end, its memory is kept", served.name, served.version)
            return
        if served.session is not None:
            await self._opener.close(served.session)

    def _failed(self, found: _Version, error: Exception) -> None:
        name, version = found.key
        if isinstance(error, GatewayError):
            reason = error.message
        else:
            logger.exception("loading '%s' version %d failed unexpectedly", name, version)
            reason = f"failed to load '{name}' version {version}: internal error, see the gateway's log"
        first, most = _RETRY_S
        found.retry_at = self._clock() + min(first * math.pow(2, min(found.failures, 16)), most)
        found.failures += 1
        # It is tried for as long as it is pinned or asked for, once a minute in the end: less and less is said of that.
        tries = found.failures
        often = "" if tries == 1 else f" (try {tries})"
        logger.log(logging.DEBUG if tries & (tries - 1) else logging.ERROR, "%s%s", reason, often)
        self._set(found, "FAILED", reason)

    def _set(self, found: _Version, status: Status, reason: str) -> None:
        found.status, found.reason = status, reason
        self._show(found)

    def _show(self, found: _Version) -> None:
        """Bring the table of models in line with one version."""
        name, version = found.key
        if self._versions.get(found.key) is not found:
            return
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = ModelEntry(name, managed=True, settled=True)
            self.table.setdefault(name, entry)
        entry.states[version] = _STATES[found.status], found.reason
        if found.served is not None and found.status == "READY":
            entry.ready[version] = found.served
        else:
            entry.ready.pop(version, None)
        entry.choose_latest()

    def _forget(self, found: _Version) -> None:
        """Take a version out of the table of models."""
        name, version = found.key
        self._versions.pop(found.key, None)
        entry = self._entries[name]
        entry.states.pop(version, None)
        entry.ready.pop(version, None)
        entry.choose_latest()
        if not entry.states:
            del self._entries[name]
            if self.table.get(name) is entry:
                del self.table[name]


def _is_busy(found: _Version) -> bool:
    return found.staged or (found.served is not None and found.served.busy)


def _activity(stats: ModelStats) -> int:
    return stats.success.count + stats.fail.count


def _retrieve(task: asyncio.Task[ServedVersion]) -> None:
    """Look at a load's outcome, which is told by the version's state: nobody may be waiting for it."""
    if not task.cancelled():
        task.exception()
