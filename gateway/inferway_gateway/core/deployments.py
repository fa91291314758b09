"""Deployments: how a version comes into service, step by step, and how gateways follow the catalog.

    received   every file's blob is stored whole (the catalog checks it when the deployment begins)
    checked    the blobs have the bytes that their digests say
    admitted   the configuration can be read, and the model is one that this gateway takes
    loaded     it is in memory, within the budget, out of everybody's reach
    warmed     it has run at the shapes that it declares, and was measured
    compared   it gives the golden examples' outputs
    ready      in one transaction: the version exists, its alias points at it, the deployment has succeeded

Until that transaction nothing that serves is touched, so whatever fails before it leaves the old version serving, and
what was loaded is unloaded. After it, every gateway on the database finds the new revision and follows: this one at
once, the others within half a second.

Deployments of one model go one after the other, in the order in which they began, whichever gateways carry them out; at
most ``parallel`` of different models go at the same time, and the next one is of the key that has the fewest of those.
A key may have so many that go on or wait, and each may take so long: nobody's models keep others' from being deployed.
A gateway says from time to time that it is there; the
deployments of one that has not said so are ended as interrupted by whoever notices.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Protocol

from .batcher import InferenceRequest
from .budget import Key
from .catalog import (
    AliasRecord,
    AliasSpec,
    Catalog,
    DeploymentRecord,
    FileRef,
    Isolation,
    Kind,
    Snapshot,
    Step,
    VersionRecord,
    VersionSpec,
)
from .errors import (
    AliasNotFoundError,
    ConflictError,
    DeadlineExceededError,
    DeploymentNotFoundError,
    GatewayError,
    InternalError,
    ModelExecutionError,
    ModelNotReadyError,
    QuotaExceededError,
    ShuttingDownError,
    StoreUnavailableError,
)
from .execution import Speaker
from .generation import GenerationRequest
from .golden import Example, compare, zeros
from .managed import ManagedVersions
from .model_config import ModelConfig
from .served import ServedVersion
from .tensors import Signature

logger = logging.getLogger("inferway.deployments")

POLL_S: Final = 0.5
"""How often a gateway asks for the catalog's revision, and a deployment whether it is to end."""
KEEP_S: Final = 5.0
"""How often a gateway says that it is there, while it carries out deployments."""
GONE_S: Final = 30.0
"""A gateway that has not said so for this long is taken for gone."""
PER_KEY: Final = 32
LIMIT_S: Final = 1800.0
SAME_CONTENT_WAIT_S: Final = 20.0
"""How long a deployment of content that is being deployed already waits to find it there."""
WARM_LIMIT_BYTES: Final = 256 * 1024 * 1024
"""The largest input of zeros that a version is warmed up with."""
WARM_RUNS: Final = 32
"""Runs that a version is warmed up with, at most."""
INTERRUPTED: Final = "interrupted: the gateway that carried it out has gone; deploy again"

Clock = Callable[[], float]


def manifest_digest(kind: Kind, files: Iterable[FileRef], config: Mapping[str, Any], isolation: Isolation) -> str:
    """What makes two versions the same: SHA-256 of their content in canonical JSON, 64 hexadecimal digits."""
    content = {
        "kind": kind,
        "files": sorted([file.path, file.digest, file.size] for file in files),
        "config": config,
        "isolation": isolation,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def process_id() -> str:
    """A name for this process that no other has or had, by which others on this machine see whether it lives."""
    return f"{_namespace()}-{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(4)}"


def is_gone(owner: str) -> bool:
    """Whether the process of that name is gone. False where that cannot be told: it is of another machine."""
    parts = owner.split("-")
    if len(parts) != 4 or parts[0] != _namespace() or not parts[1].isdigit():
        return False
    return _started(int(parts[1])) != parts[2]


def _namespace() -> str:
    """This start of this machine, and the set of process numbers in it that this process sees."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")[:8]
        return f"{boot}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return "unknown." + secrets.token_hex(4)  # nobody's, so that nobody is taken for gone


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


class Checks(Protocol):
    """What is done to the files of a version before they are loaded."""

    async def verify(self, record: VersionRecord) -> None:
        """Hold the stored blobs against their digests.

        Raises:
            BlobNotFoundError, DigestMismatchError
        """
        ...

    async def admit(self, record: VersionRecord) -> None:
        """Bring the files into place and look at them without loading anything.

        Raises:
            ModelRejectedError: the configuration or the model is none that this gateway takes.
        """
        ...

    async def golden(self, record: VersionRecord) -> Sequence[Example]:
        """The version's golden examples.

        Raises:
            ModelRejectedError: they cannot be read.
        """
        ...

    async def remove(self, record: VersionRecord) -> None:
        """Take the version's files out of place again. Does not raise."""
        ...


class Routes(Protocol):
    """What resolves aliases to versions."""

    def update(self, aliases: Iterable[AliasRecord], /) -> object: ...


class Follower:
    """Keeps what this gateway serves in line with the catalog.

    Args:
        catalog: asked for its revision every ``poll_s``.
        managed: the versions in memory.
        routes: gets the aliases.
        remove: takes the files of a version that was deleted out of place.
    """

    def __init__(
        self,
        catalog: Catalog,
        managed: ManagedVersions,
        routes: Routes,
        *,
        remove: Callable[[VersionRecord], Awaitable[None]],
        poll_s: float = POLL_S,
    ) -> None:
        self._catalog = catalog
        self._managed = managed
        self._routes = routes
        self._remove = remove
        self._poll_s = poll_s
        self._lock = asyncio.Lock()
        self._records: dict[Key, VersionRecord] = {}
        self._revision = -1
        self.snapshot: Snapshot = Snapshot(-1, (), ())
        """The last one that was taken in."""

    async def run(self) -> None:
        """Follow until cancelled. A database that does not answer is asked again; what serves, serves on."""
        lost = False
        while True:
            try:
                if await self._catalog.revision() != self._revision:
                    await self.follow()
                if lost:
                    logger.info("the database answers again")
                lost = False
            except StoreUnavailableError:
                if not lost:
                    logger.warning("the database does not answer: models serve on, nothing can be deployed")
                lost = True
            except Exception:
                logger.exception("following the catalog failed")
            self._managed.trim()
            await asyncio.sleep(self._poll_s)

    async def follow(self) -> None:
        """Bring versions and aliases in line with the catalog as it is now.

        Raises:
            StoreUnavailableError: nothing was changed.
        """
        async with self._lock:
            snapshot = await self._catalog.snapshot()
            records = {(record.model, record.version): record for record in snapshot.versions}
            gone = self._managed.sync(snapshot.versions)
            # Before the aliases move, so that they move to what is there already.
            await self._managed.load_ahead(wanted_ahead(snapshot))
            # A name that the folder has is the folder's: its aliases have nothing to point at.
            self._routes.update(alias for alias in snapshot.aliases if not self._managed.hides(alias.model))
            self.snapshot = snapshot
            self._revision = snapshot.revision
            before, self._records = self._records, records
        await self._managed.retire(gone)
        for key in gone:
            if key in before:
                await self._remove(before[key])


def wanted_ahead(snapshot: Snapshot) -> set[Key]:
    """The versions that are loaded before anybody asks: those that aliases send requests to, and the pinned ones."""
    wanted = {(record.model, record.version) for record in snapshot.versions if record.pinned}
    for alias in snapshot.aliases:
        wanted.update((alias.model, version) for version, weight in alias.spec.weights.items() if weight > 0)
    return wanted


class FairSlots:
    """So many at once; one that is free goes to the key that holds the fewest, and among its equals to who came first.

    Args:
        count: of them.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def slot(self, key: str) -> AsyncIterator[None]:
        """Wait for one, and hold it."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, granted))
        self._grant()
        try:
            await granted
            yield
        finally:
            if granted.done() and not granted.cancelled():
                self._free += 1
                self._held -= Counter((key,))
            self._grant()

    def _grant(self) -> None:
        self._waiting = [(key, granted) for key, granted in self._waiting if not granted.done()]
        while self._free and self._waiting:
            first = min(self._waiting, key=lambda entry: self._held[entry[0]])
            self._waiting.remove(first)
            key, granted = first
            self._free -= 1
            self._held[key] += 1
            granted.set_result(None)


class Deployer:
    """Carries deployments out.

    Args:
        owner: the name of this process, see ``process_id``.
        parallel: deployments that go on at once.
        per_key: deployments of one key that go on or wait, on all gateways together.
        limit_s: how long one may take, once it goes on.
    """

    def __init__(
        self,
        catalog: Catalog,
        managed: ManagedVersions,
        checks: Checks,
        follow: Callable[[], Awaitable[None]],
        *,
        owner: str,
        parallel: int = 2,
        per_key: int = PER_KEY,
        limit_s: float = LIMIT_S,
        poll_s: float = POLL_S,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Clock = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._managed = managed
        self._checks = checks
        self._follow = follow
        self._owner = owner
        self._slots = FairSlots(parallel)
        self._per_key = per_key
        self.limit_s: Final = limit_s
        self.poll_s: Final = poll_s
        self._now = now
        self._clock = clock
        self._running: dict[str, _Course] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._closing = False

    # ------------------------------------------------------------------ what is asked

    async def submit(self, spec: VersionSpec, *, isolation: Isolation, by: str) -> DeploymentRecord:
        """Begin a deployment; it goes on after this returns.

        Raises:
            ConflictError: the wanted number belongs to other content.
            BlobNotFoundError: a file's blob is not stored whole.
            QuotaExceededError: the key has so many deployments that go on or wait already.
            ShuttingDownError: this gateway ends.
        """
        running = await self._catalog.running_deployments()
        if sum(record.created_by == by for record in running) >= self._per_key:
            raise QuotaExceededError(
                f"expected at most {self._per_key} deployments of this key at once, so many go on or wait already; "
                "wait for one of them or cancel it"
            )
        digest = manifest_digest(spec.kind, spec.files, spec.config, isolation)
        end = self._clock() + SAME_CONTENT_WAIT_S
        while True:
            if self._closing:
                raise ShuttingDownError("the gateway ends and begins no deployment")
            try:
                record = await self._catalog.begin_deployment(
                    spec, digest=digest, isolation=isolation, by=by, owner=self._owner
                )
                break
            except ConflictError:
                rival = await self._same_content(spec.model, digest)
                if rival is None or self._clock() >= end:
                    raise
            # The same content is being deployed: once it is there, this deployment finds it, and moves its alias.
            await self.wait(rival.id, rival.step, self.poll_s)
        course = _Course(self, record, isolation)
        self._running[record.id] = course
        course.task = asyncio.create_task(course.run(), name=f"inferway-deploy {record.id}")
        course.task.add_done_callback(lambda _: self._running.pop(record.id, None))
        return record

    async def _same_content(self, model: str, digest: str) -> DeploymentRecord | None:
        for record in await self._catalog.running_deployments():
            if record.spec.model == model and record.digest == digest:
                return record
        return None

    async def get(self, deployment_id: str) -> DeploymentRecord:
        """The deployment as it is. One that has succeeded here is told of once this gateway serves it.

        Raises:
            DeploymentNotFoundError
        """
        record = await self._catalog.deployment(deployment_id)
        course = self._running.get(deployment_id)
        if record.state == "succeeded" and course is not None and course.task is not None:
            await asyncio.wait((course.task,))
        return record

    async def cancel(self, deployment_id: str, *, by: str) -> DeploymentRecord:
        """Ask for the end of a deployment, whichever gateway carries it out; one that has ended is left as it is.

        Raises:
            DeploymentNotFoundError
        """
        record = await self._catalog.request_cancel(deployment_id, by)
        course = self._running.get(deployment_id)
        if course is not None and record.state == "running":
            course.cancel()
            record = await self.wait(deployment_id, record.step, self.poll_s)
        return record

    async def wait(self, deployment_id: str, step: Step | None, limit_s: float) -> DeploymentRecord:
        """The deployment, as soon as it has ended or its last step is another than ``step``; as it is after
        ``limit_s`` seconds.

        Raises:
            DeploymentNotFoundError
        """
        end = self._clock() + limit_s
        while True:
            news = self._news.setdefault(deployment_id, asyncio.Event())
            record = await self.get(deployment_id)
            left = end - self._clock()
            if record.state != "running" or record.step != step or left <= 0:
                if deployment_id not in self._running:
                    self._news.pop(deployment_id, None)
                return record
            # One that another gateway carries out tells no news here: it is asked for.
            here = deployment_id in self._running
            with suppress(TimeoutError):
                async with asyncio.timeout(left if here else min(left, self.poll_s)):
                    await news.wait()

    def _tell(self, deployment_id: str) -> None:
        news = self._news.pop(deployment_id, None)
        if news is not None:
            news.set()

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        """Say from time to time that this gateway is there, look for what is to be cancelled here, and end what others
        left behind. Until cancelled."""
        kept = looked = float("-inf")
        while True:
            try:
                now = self._clock()
                if self._running and now - kept >= KEEP_S:
                    await self._catalog.keep_deployments(self._owner)
                    kept = now
                for deployment_id in list(self._running):
                    record = await self._catalog.deployment(deployment_id)
                    course = self._running.get(deployment_id)
                    if course is not None and (record.cancel_requested or record.state != "running"):
                        course.cancel()
                if now - looked >= KEEP_S:
                    await self.end_interrupted()
                    looked = now
            except StoreUnavailableError:
                logger.debug("the database does not answer; deployments go on until their next step")
            except Exception:
                logger.exception("looking after deployments failed")
            await asyncio.sleep(self.poll_s)

    async def end_interrupted(self) -> None:
        """End the deployments whose gateway is gone."""
        for record in await self._catalog.unkept_deployments(self._now() - timedelta(seconds=GONE_S)):
            if record.id not in self._running:
                await self._end_interrupted(record)
        for record in await self._catalog.running_deployments():
            if record.id not in self._running and is_gone(record.owner):
                await self._end_interrupted(record)

    async def _end_interrupted(self, record: DeploymentRecord) -> None:
        logger.warning("deployment %s of '%s' was interrupted", record.id, record.spec.model)
        await self._catalog.end_deployment(
            record.id, code="interrupted", message=INTERRUPTED, step=following(record.step)
        )

    async def close(self) -> None:
        """End what goes on here: it is interrupted, and can be deployed again."""
        self._closing = True
        tasks = [course.task for course in self._running.values() if course.task is not None]
        for course in list(self._running.values()):
            course.cancel(interrupted=True)
        if tasks:
            await asyncio.wait(tasks)


class _Course:
    """One deployment on its way."""

    task: asyncio.Task[None] | None = None

    def __init__(self, deployer: Deployer, record: DeploymentRecord, isolation: Isolation) -> None:
        self._deployer = deployer
        self._catalog = deployer._catalog
        self._managed = deployer._managed
        self._checks = deployer._checks
        self._deployment = record
        spec = record.spec
        self._record = VersionRecord(
            model=spec.model,
            version=record.version,
            kind=spec.kind,
            digest=record.digest,
            files=spec.files,
            config=spec.config,
            isolation=isolation,
            labels=spec.labels,
            metadata=spec.metadata,
            pinned=spec.pinned,
            footprint=None,
            created_at=record.created_at,
            created_by=record.created_by,
        )
        self._step: Step = Step.RECEIVED
        """The one that is being done."""
        self._interrupted = False
        self._committed = False
        self._work: asyncio.Task[None] | None = None

    def cancel(self, *, interrupted: bool = False) -> None:
        """End it, unless it has committed already."""
        self._interrupted = self._interrupted or interrupted
        if self._work is not None and not self._committed:
            self._work.cancel()

    async def run(self) -> None:
        """Carry it out, and record how it ended. Does not raise."""
        self._work = asyncio.create_task(self._steps())
        if self._interrupted:
            self._work.cancel()
        await asyncio.wait((self._work,))
        name, version = self._record.model, self._record.version
        if self._work.cancelled():
            code, message = "cancelled", "cancelled before it was ready"
            if self._interrupted:
                code, message = "interrupted", INTERRUPTED
            logger.info("deployment of '%s' version %d: %s", name, version, message)
            await self._end(code, message, cancelled=not self._interrupted)
            return
        error = self._work.exception()
        if error is None:
            logger.info("'%s' version %d is deployed", name, version)
            self._deployer._tell(self._deployment.id)
            return
        if not isinstance(error, GatewayError):
            logger.error("deployment of '%s' version %d failed unexpectedly", name, version, exc_info=error)
            error = InternalError("internal error; the gateway's log has the details")
        logger.warning("deployment of '%s' version %d failed at %s: %s", name, version, self._step, error.message)
        await self._end(error.code, error.message)

    async def _steps(self) -> None:
        deployer = self._deployer
        try:
            await self._done(Step.RECEIVED)
            await self._turn()
            async with deployer._slots.slot(self._record.created_by):
                await self._within_limit(self._bring_back if self._deployment.reused else self._bring)
                self._step = Step.READY
                await self._commit()
        except BaseException:
            if not self._committed and not self._deployment.reused:
                await asyncio.shield(self._undo())
            raise

    async def _within_limit(self, bring: Callable[[], Awaitable[None]]) -> None:
        limit_s = self._deployer.limit_s
        try:
            async with asyncio.timeout(limit_s) as timer:
                await bring()
        except TimeoutError:
            if not timer.expired():
                raise
            raise DeadlineExceededError(
                f"deploying it took longer than the {limit_s:g} s that a deployment may take"
            ) from None

    async def _bring(self) -> None:
        record = self._record
        await self._checks.verify(record)
        await self._done(Step.CHECKED)
        await self._checks.admit(record)
        examples = await self._checks.golden(record)
        await self._done(Step.ADMITTED)
        served = await self._managed.stage(record)
        await self._done(Step.LOADED)
        await warm_up(served)
        self._record = replace(record, footprint=self._managed.footprint(record.model, record.version))
        await self._done(Step.WARMED)
        await compare(served.batcher, examples)
        await self._done(Step.COMPARED)

    async def _bring_back(self) -> None:
        """The version is there already: see that it can serve, so that its alias moves to what does."""
        await self._done(Step.CHECKED)
        await self._done(Step.ADMITTED)
        await self._deployer._follow()
        name, version = self._record.model, self._record.version
        while True:
            try:
                await self._managed.acquire(name, version)
                break
            except ModelNotReadyError:
                # A request would give up here; a large model may take longer.
                if self._managed.status(name, version)[0] != "LOADING":
                    raise
        for step in (Step.LOADED, Step.WARMED, Step.COMPARED):
            await self._done(step)

    async def _turn(self) -> None:
        """Wait until no older deployment of this model runs, here or elsewhere."""
        deployer = self._deployer
        while True:
            older = None
            for record in await self._catalog.running_deployments():
                if record.id == self._deployment.id:
                    break
                if record.spec.model == self._record.model:
                    older = record
                    break
            if older is None:
                return
            await deployer.wait(older.id, older.step, deployer.poll_s)

    async def _done(self, step: Step) -> None:
        """Record a step, and begin the next one."""
        self._step = step
        record = await self._catalog.advance_deployment(self._deployment.id, step)
        self._deployer._tell(record.id)
        if record.cancel_requested or record.state != "running":
            raise asyncio.CancelledError
        self._step = following(step)

    async def _commit(self) -> None:
        alias = await self._alias()
        commit = asyncio.create_task(
            self._catalog.commit_deployment(self._deployment.id, self._record.footprint, alias)
        )
        # Whether it happened has to be known: nobody may take away what the catalog has by then.
        try:
            await asyncio.shield(commit)
        except asyncio.CancelledError:
            await asyncio.wait((commit,))
            if commit.cancelled() or commit.exception() is not None:
                raise
        except StoreUnavailableError:
            # In a task: whoever sees in the catalog that it has ended cancels this one, and must not undo it thereby.
            asked = asyncio.create_task(self._is_committed())
            try:
                await asyncio.shield(asked)
            except asyncio.CancelledError:
                await asyncio.wait((asked,))
            if not asked.result():
                raise
        self._committed = True
        await self._publish()

    async def _is_committed(self) -> bool:
        """Whether a transaction that nobody saw the end of has happened; asked until the database answers."""
        while True:
            with suppress(StoreUnavailableError):
                return (await self._catalog.deployment(self._deployment.id)).state == "succeeded"
            if self._deployer._closing:
                return False  # what is undone of a version that the catalog has is made again at the next start
            await asyncio.sleep(self._deployer.poll_s)

    async def _publish(self) -> None:
        try:
            await self._deployer._follow()
        except StoreUnavailableError:
            logger.warning("the database went away after a deployment; what it changed is seen when it is back")

    async def _alias(self) -> AliasSpec | None:
        """What the alias is to be: all to this version, the rest as it was."""
        name = self._deployment.spec.alias
        if name is None:
            return None
        version = self._record.version
        try:
            spec = (await self._catalog.alias(self._record.model, name)).spec
        except AliasNotFoundError:
            return AliasSpec({version: 100.0})
        fallback = tuple(other for other in spec.fallback if other != version)
        shadow = None if spec.shadow is None or spec.shadow.version == version else spec.shadow
        return replace(spec, weights={version: 100.0}, fallback=fallback, shadow=shadow)

    async def _undo(self) -> None:
        await self._managed.discard(self._record)
        await self._checks.remove(self._record)

    async def _end(self, code: str, message: str, *, cancelled: bool = False) -> None:
        while True:
            try:
                await self._catalog.end_deployment(
                    self._deployment.id, code=code, message=message, step=self._step, cancelled=cancelled
                )
                break
            except DeploymentNotFoundError:
                break
            except StoreUnavailableError:
                if self._deployer._closing:
                    break  # the next gateway finds it and ends it as interrupted
                await asyncio.sleep(self._deployer.poll_s)
        self._deployer._tell(self._deployment.id)


def following(step: Step | None) -> Step:
    """The step after ``step``; the first where that is None."""
    steps = list(Step)
    return steps[0] if step is None else steps[min(steps.index(step) + 1, len(steps) - 1)]


async def warm_up(served: ServedVersion) -> None:
    """Run a version at every shape that it declares, see ``declared``, where its inputs' shapes are known.

    Raises:
        WorkerCrashedError, DeadlineExceededError: it cannot run.
    """
    if isinstance(served.batcher, Speaker):
        async for _ in served.batcher.generator.generate(GenerationRequest((0, 0), 2, ignore_end=True)):
            pass
        return
    signature = served.batcher.signature
    for rows, lengths in declared(signature, served.config):
        inputs = zeros(signature, rows, lengths)
        if inputs is None:
            continue
        nbytes = sum(array.nbytes for array in inputs.values())
        if nbytes > WARM_LIMIT_BYTES:
            continue
        request = InferenceRequest(inputs, signature.output_names, signature.check(inputs), nbytes)
        # Zeros need not be what a model takes; golden examples are there to tell whether it works.
        with suppress(ModelExecutionError):
            if served.batcher.run_inline(request) is None:
                await served.batcher.infer(request)


def declared(signature: Signature, config: ModelConfig) -> list[tuple[int, dict[tuple[str, int], int]]]:
    """The shapes that a version says it will be run at, the largest last: one row, the preferred numbers of rows and
    the largest batch, each at every length that inputs are padded to.

    Returns:
        Number of rows, and input and axis to length for the axes that are padded to buckets; ``WARM_RUNS`` at most.
    """
    most = max(1, min(config.max_batch_size or 1, signature.max_rows or 1)) if signature.batched else 1
    rows = sorted({1, most, *(count for count in config.batching.preferred_rows if 1 <= count <= most)})
    padded = [axis for axis in config.batching.padding if axis.buckets]
    steps = max((len(axis.buckets) for axis in padded), default=1)
    lengths = [
        {place: axis.buckets[min(step, len(axis.buckets) - 1)] for axis in padded for place in axis.inputs.items()}
        for step in range(steps)
    ]
    shapes = [(count, sizes) for sizes in lengths for count in rows]
    return [*shapes[: WARM_RUNS - 1], shapes[-1]] if len(shapes) > WARM_RUNS else shapes
