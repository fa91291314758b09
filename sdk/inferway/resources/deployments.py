"""Deployments: a model's way to the gateway, and how it goes on there.

`deploy` is what ``client.models.deploy`` does: settle what goes along, hash it, send what the gateway lacks, ask for a
version of it, and watch. The gateway does the rest by itself: a client that goes away ends nothing.
"""

# `Deployment` and `AsyncDeployment` use their base's members, which stay out of what users see.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import datetime
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, Unpack, get_args

from inferway_contract import names

from .._calls import (
    cancel_call,
    checked_alias,
    checked_name,
    checked_version,
    create_call,
    deployment_call,
    plain,
    version_call,
)
from .._core import Plan, refuse_awaitable
from .._engine import AsyncEngine, SyncEngine, logger
from .._errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    BlobNotFoundError,
    ConfigurationError,
    DeploymentFailedError,
)
from .._golden import GOLDEN_FILE, Golden, golden_json
from .._options import NO_RETRY, RequestOptions, Timeout
from .._package import ModelSource, Package, Source, offer_of, pack
from .._progress import DeployEvent, Progress, reporter
from .._upload import Hashing, Transfer
from .inference import AsyncModelHandle, ModelHandle

if TYPE_CHECKING:
    from inferway_contract.models import Deployment as Record
    from inferway_contract.models import DeploymentFailure, ModelVersion

DEPLOY_TIMEOUT_S: Final = 3600.0
"""For sending a model and bringing it into service, where the caller names no time."""
_POLL_S: Final = 20
_MARGIN_S: Final = 30.0
"""A request for news may take this much longer than the gateway was asked to wait."""
_PAUSE_S: Final = 0.25
"""After an answer that came at once and brought nothing new, from a server that does not wait."""
_STEPS: Final[tuple[str, ...]] = get_args(names.Step)


def _quiet(_: DeployEvent) -> None:
    return None


def _passed(before: str | None, now: str | None) -> list[str]:
    """The steps that were done between two looks, those between them too."""
    if now is None or now == before:
        return []
    if now not in _STEPS or (before is not None and before not in _STEPS):
        return [now]
    first = 0 if before is None else _STEPS.index(before) + 1
    return list(_STEPS[first : _STEPS.index(now) + 1])


class _Deployment:
    """What is known of a deployment, and the pure parts of watching it."""

    __slots__ = ("_engine", "_record", "_report", "_told", "version_record")

    version_record: ModelVersion | None

    def __init__(self, engine: Any, record: Record, report: Callable[[DeployEvent], object] = _quiet) -> None:
        self._engine = engine
        self._record = record
        self._report = report
        self._told: str | None = None
        self.version_record = None

    @property
    def id(self) -> str:
        """Its id, under which any client can watch or cancel it."""
        return self._record.id

    @property
    def model(self) -> str:
        """The model's name."""
        return self._record.model

    @property
    def version(self) -> int:
        """The version that it makes, or the one that has this content already."""
        return self._record.version

    @property
    def digest(self) -> str:
        """Of the version's content."""
        return self._record.digest

    @property
    def state(self) -> str:
        """``running``, ``succeeded``, ``failed`` or ``cancelled``, when it was last looked at."""
        return self._record.state

    @property
    def step(self) -> str | None:
        """The last step that is done: ``received``, ``checked``, ``admitted``, ``loaded``, ``warmed``, ``compared``,
        ``ready``. None before the first."""
        return self._record.step

    @property
    def failed_step(self) -> str | None:
        """The step that failed."""
        return self._record.failed_step

    @property
    def error(self) -> DeploymentFailure | None:
        """Why it failed: ``code`` and ``message``."""
        return self._record.error

    @property
    def reused(self) -> bool:
        """The same content was deployed before, and this made no new version."""
        return self._record.reused

    @property
    def alias(self) -> str | None:
        """The alias that points at the version when it is ready; None where none is moved."""
        return self._record.alias

    @property
    def created_at(self) -> datetime:
        """When it was asked for."""
        return self._record.created_at

    @property
    def created_by(self) -> str:
        """The id of the key that asked for it."""
        return self._record.created_by

    @property
    def record(self) -> Record:
        """All of it, as the gateway sent it."""
        return self._record

    def __repr__(self) -> str:
        at = f" after {self.step}" if self.step and self.state != "succeeded" else ""
        return f"<{type(self).__name__} {self.id} of {self.model} version {self.version}: {self.state}{at}>"

    def _learn(self, record: Record) -> None:
        """Take news, and tell them on."""
        self._record = record
        for step in _passed(self._told, record.step):
            self._told = step
            self._report(DeployEvent("step", step=step, deployment_id=record.id))
        if record.state != "running":
            self._engine.signatures.forget(record.model)

    def _ended(self) -> None:
        """Tell the end. Raises DeploymentFailedError where it is no success."""
        record = self._record
        self._report(DeployEvent("ended", step=record.step, deployment_id=record.id, message=record.state))
        if record.state == "succeeded":
            return
        cancelled = record.state == "cancelled"
        code, message = ("cancelled", "it was cancelled") if cancelled else ("internal", "the gateway does not say why")
        if record.error is not None:
            code, message = record.error.code, record.error.message
        raise DeploymentFailedError(self, record.failed_step, code, message)

    def _left(self, until: float | None) -> float | None:
        return None if until is None else until - self._engine.config.clock.monotonic()

    def _until(self, timeout: float | None) -> float | None:
        total = Timeout.of(timeout).total
        return None if total is None else self._engine.config.clock.monotonic() + total

    def _poll(self, until: float | None, timeout: float | None) -> tuple[int, RequestOptions]:
        """How long to ask the gateway to wait, and the options of that request."""
        left = self._left(until)
        if left is not None and left <= 0:
            at = f" after the step '{self.step}'" if self.step else ""
            raise APITimeoutError(
                f"deployment {self.id} of {self.model} still runs{at}, and the time for it is over; it goes on, and "
                f"client.models.deployment({self.id!r}) watches it",
                retryable=True,
                elapsed=timeout,
            )
        wait = _POLL_S if left is None else max(1, min(_POLL_S, int(left)))
        return wait, {"timeout": Timeout(total=wait + _MARGIN_S, connect=self._engine.config.timeout.connect)}

    def _interrupted(self, error: BaseException) -> None:
        error.add_note(
            f"deployment {self.id} of {self.model} goes on; client.models.deployment({self.id!r}) watches it, and its "
            f"cancel() ends it"
        )


class Deployment(_Deployment):
    """A model on its way into service, as ``client.models.deploy`` gives it.

    The gateway carries it out by itself: dropping this object, or interrupting `wait` with Ctrl+C, ends nothing.

    Attributes:
        version_record: the version as the gateway has it, once `wait` has seen it ready; None before.
    """

    __slots__ = ()

    _engine: SyncEngine

    @property
    def handle(self) -> ModelHandle:
        """A handle of exactly this version: ``deployment.handle.predict(inputs)``."""
        return ModelHandle(self._engine, self.model, self.version)

    def refresh(self, **options: Unpack[RequestOptions]) -> Deployment:
        """Ask the gateway how it stands; the same object comes back, with the news in it.

        Raises:
            DeploymentNotFoundError: the gateway does not know it any more.
        """
        self._learn(self._engine.send(deployment_call(self.id), options))
        return self

    def watch(self, timeout: float | None = DEPLOY_TIMEOUT_S) -> Iterator[str]:
        """Every step as it is done, from the first; ends when the deployment has ended, however it did (`state`).

        Args:
            timeout: seconds for all of it; None for no limit.
        Raises:
            APITimeoutError: the time is over; the deployment goes on.
        """
        until = self._until(timeout)
        seen: str | None = None
        while True:
            for step in _passed(seen, self.step):
                seen = step
                yield step
            if self.state != "running":
                return
            clock = self._engine.config.clock
            asked = clock.monotonic()
            wait, options = self._poll(until, timeout)
            self._learn(self._engine.send(deployment_call(self.id, wait, self.step), options))
            if self.state == "running" and self.step == seen and clock.monotonic() - asked < _PAUSE_S:
                clock.sleep(_PAUSE_S)

    def wait(self, timeout: float | None = DEPLOY_TIMEOUT_S) -> Deployment:
        """Wait until the version is in service; the same object comes back, with `version_record`.

        Interrupting it with Ctrl+C leaves the deployment running; the exception's note has its id.

        Args:
            timeout: seconds; None for no limit.
        Raises:
            DeploymentFailedError: it failed or was cancelled; what served before goes on serving.
            APITimeoutError: the time is over; the deployment goes on.
            APIError: the gateway cannot be asked; the deployment may go on.
        """
        try:
            for _ in self.watch(timeout):
                pass
        except (KeyboardInterrupt, APIError) as error:
            self._interrupted(error)
            raise
        self._ended()
        self.version_record = self._engine.send(version_call(self.model, self.version), {})
        return self

    def cancel(self, **options: Unpack[RequestOptions]) -> Deployment:
        """Ask the gateway to give it up; the same object comes back. One that has ended stays as it is.

        What served before goes on serving. It may take a moment until `state` says so; `wait` raises then.
        """
        self._learn(self._engine.send(cancel_call(self.id), options))
        return self


class AsyncDeployment(_Deployment):
    """A model on its way into service, as ``client.models.deploy`` gives it.

    The gateway carries it out by itself: dropping this object, or cancelling `wait`, ends nothing.

    Attributes:
        version_record: the version as the gateway has it, once `wait` has seen it ready; None before.
    """

    __slots__ = ()

    _engine: AsyncEngine

    @property
    def handle(self) -> AsyncModelHandle:
        """A handle of exactly this version: ``await deployment.handle.predict(inputs)``."""
        return AsyncModelHandle(self._engine, self.model, self.version)

    async def refresh(self, **options: Unpack[RequestOptions]) -> AsyncDeployment:
        """Ask the gateway how it stands; the same object comes back, with the news in it.

        Raises:
            DeploymentNotFoundError: the gateway does not know it any more.
        """
        self._learn(await self._engine.send(deployment_call(self.id), options))
        return self

    async def watch(self, timeout: float | None = DEPLOY_TIMEOUT_S) -> AsyncIterator[str]:  # noqa: ASYNC109
        """Every step as it is done, from the first; ends when the deployment has ended, however it did (`state`).

        Args:
            timeout: seconds for all of it; None for no limit.
        Raises:
            APITimeoutError: the time is over; the deployment goes on.
        """
        until = self._until(timeout)
        seen: str | None = None
        while True:
            for step in _passed(seen, self.step):
                seen = step
                yield step
            if self.state != "running":
                return
            clock = self._engine.config.clock
            asked = clock.monotonic()
            wait, options = self._poll(until, timeout)
            self._learn(await self._engine.send(deployment_call(self.id, wait, self.step), options))
            if self.state == "running" and self.step == seen and clock.monotonic() - asked < _PAUSE_S:
                await clock.sleep_async(_PAUSE_S)

    async def wait(self, timeout: float | None = DEPLOY_TIMEOUT_S) -> AsyncDeployment:  # noqa: ASYNC109
        """Wait until the version is in service; the same object comes back, with `version_record`.

        Cancelling it leaves the deployment running; the exception's note has its id.

        Args:
            timeout: seconds; None for no limit.
        Raises:
            DeploymentFailedError: it failed or was cancelled; what served before goes on serving.
            APITimeoutError: the time is over; the deployment goes on.
            APIError: the gateway cannot be asked; the deployment may go on.
        """
        try:
            async for _ in self.watch(timeout):
                pass
        except (KeyboardInterrupt, asyncio.CancelledError, APIError) as error:
            self._interrupted(error)
            raise
        self._ended()
        self.version_record = await self._engine.send(version_call(self.model, self.version), {})
        return self

    async def cancel(self, **options: Unpack[RequestOptions]) -> AsyncDeployment:
        """Ask the gateway to give it up; the same object comes back. One that has ended stays as it is.

        What served before goes on serving. It may take a moment until `state` says so; `wait` raises then.
        """
        self._learn(await self._engine.send(cancel_call(self.id), options))
        return self


# --- deploying ---------------------------------------------------------------------------------------------------


class Job:
    """One deployment before it is one: what was asked for, checked before anything is read or sent."""

    def __init__(
        self,
        engine: SyncEngine | AsyncEngine,
        name: str,
        version: int | None,
        alias: str | None,
        labels: Mapping[str, str] | None,
        metadata: Mapping[str, Any] | None,
        batching: bool | Mapping[str, Any] | None,
        instances: int | None,
        isolation: str | None,
        config: Mapping[str, Any] | None,
        pinned: bool,
        golden: Golden | None,
        progress: Progress,
        options: RequestOptions,
    ) -> None:
        self.name = checked_name(name)
        self.version = None if version is None else checked_version(version)
        self.report = reporter(progress)
        self._engine = engine
        self._golden = golden
        self._options: RequestOptions = {"timeout": DEPLOY_TIMEOUT_S, **options}
        self._body: dict[str, Any] = {
            "alias": None if alias is None else checked_alias(alias),
            "labels": plain("labels", labels),
            "metadata": plain("metadata", metadata),
            "config": plain("config", _config(config, batching, instances)),
            "pinned": pinned,
        }
        if self.version is not None:
            self._body["version"] = self.version
        if isolation is not None:
            self._body["isolation"] = isolation
        # Checks the options, and knows when the time is over and what may be tried again.
        self.plan = Plan(engine.config, deployment_call("-"), self._options)

    def packed(self, model: ModelSource) -> Package:
        """The files that go along. Reads the disk, and takes over what the model says of itself."""
        offer = offer_of(model)
        for member, given in (("labels", offer.labels), ("metadata", offer.metadata)):
            self._body[member] = {**plain(member, given), **self._body[member]}
        package = pack(offer.model, self.version)
        golden = offer.golden if self._golden is None else self._golden
        if golden is not None:
            package = package.with_file(GOLDEN_FILE, golden_json(golden, package.signature))
        return package

    def settled(self, package: Package) -> None:
        """Tell what goes along."""
        paths = tuple(source.path for source in package.sources)
        self.report(DeployEvent("packed", total_bytes=package.size, files=paths, left_out=package.left_out))
        if package.left_out:
            logger.info("not deployed with %s: %s", self.name, ", ".join(package.left_out))

    def hashing(self, source: Source) -> Hashing:
        return Hashing(source, self.report)

    def transfer(self, source: Source, digest: str) -> Transfer:
        return Transfer(source, digest, self.plan, self._engine.budget, self.report)

    def short(self) -> RequestOptions:
        """The options of a small call: the client's own time limit, within what is left."""
        limits = self._engine.config.timeout
        left = self.left()
        total = limits.total if left is None else left if limits.total is None else min(left, limits.total)
        return {**self._options, "timeout": Timeout(total=total, connect=limits.connect, read=limits.read)}

    def sending(self) -> RequestOptions:
        """The options of one attempt to send a file: all the time that is left, and no retry but our own."""
        connect = self._engine.config.timeout.connect
        return {**self._options, "timeout": Timeout(total=self.left(), connect=connect), "retry": NO_RETRY}

    def left(self) -> float | None:
        """Seconds for all that is still to be done; more than 0, so that whoever is asked says that they are over."""
        left = self.plan.left()
        return None if left is None else max(0.001, left)

    def body(self, package: Package, digests: Mapping[str, str]) -> dict[str, Any]:
        files = [
            {"path": source.path, "digest": digests[source.path], "size": source.size} for source in package.sources
        ]
        return {"files": files, **self._body}

    def unsure(self, error: APIConnectionError) -> None:
        """Say what to do where nobody knows whether the gateway has begun."""
        if error.sent:
            error.add_note(
                f"the gateway may have begun all the same: client.models.deployments({self.name!r}) lists it"
            )

    def created(self, record: Record) -> None:
        self.report(DeployEvent("created", deployment_id=record.id))


def _config(
    config: Mapping[str, Any] | None, batching: bool | Mapping[str, Any] | None, instances: int | None
) -> dict[str, Any]:
    made = dict(config or {})
    for member, value in (("batching", batching), ("instances", instances)):
        if value is None:
            continue
        if member in made:
            raise ConfigurationError(f"{member} is given twice, in config and by itself")
        made[member] = (
            {"enabled": value} if isinstance(value, bool) else dict(value) if isinstance(value, Mapping) else value
        )
    return made


def deploy(engine: SyncEngine, job: Job, model: ModelSource, wait: bool) -> Deployment:
    """What ``Models.deploy`` does."""
    package = job.packed(model)
    job.settled(package)
    digests: dict[str, str] = {}
    for source in package.sources:
        hashing = job.hashing(source)
        while hashing.step():
            hashing.tell()
        hashing.tell()
        digests[source.path] = hashing.digest
    _send_all(engine, job, package, digests)
    call = create_call(job.name, job.body(package, digests))
    try:
        record = engine.send(call, job.short())
    except BlobNotFoundError:
        # What was there a moment ago was cleared away before the version could hold it.
        _send_all(engine, job, package, digests)
        record = engine.send(call, job.short())
    except APIConnectionError as error:
        job.unsure(error)
        raise
    job.created(record)
    deployment = Deployment(engine, record, job.report)
    return deployment.wait(job.left()) if wait else deployment


def _send_all(engine: SyncEngine, job: Job, package: Package, digests: Mapping[str, str]) -> None:
    sent: set[str] = set()
    for source in package.sources:
        digest = digests[source.path]
        transfer = job.transfer(source, digest)
        if digest not in sent:
            _send(engine, job, transfer)
            sent.add(digest)
        else:
            transfer.skipped()


def _send(engine: SyncEngine, job: Job, transfer: Transfer) -> None:
    _ask(engine, job, transfer)
    if transfer.done:
        transfer.skipped()
        return
    while True:
        try:
            transfer.answered(engine.send(transfer.put(), job.sending()))
            return
        except APIError as error:
            delay = transfer.failed(error)
            failure = error
        hook = engine.config.on_retry
        if hook is not None:
            refuse_awaitable(hook(transfer.event(failure, delay)), "on_retry")
        engine.config.clock.sleep(delay)
        _ask(engine, job, transfer)
        if transfer.done:
            # All of it arrived, only the answer was lost.
            transfer.skipped()
            return
        transfer.resumed(failure)


def _ask(engine: SyncEngine, job: Job, transfer: Transfer) -> None:
    try:
        status = engine.send(transfer.ask(), job.short())
    except BlobNotFoundError:
        transfer.learned(None)
    else:
        transfer.learned(status)


async def deploy_async(engine: AsyncEngine, job: Job, model: ModelSource, wait: bool) -> AsyncDeployment:
    """What ``AsyncModels.deploy`` does: as `deploy`, with disks and hashing in threads."""
    package = await asyncio.to_thread(job.packed, model)
    job.settled(package)
    digests: dict[str, str] = {}
    for source in package.sources:
        hashing = job.hashing(source)
        while await asyncio.to_thread(hashing.step):
            hashing.tell()
        hashing.tell()
        digests[source.path] = hashing.digest
    await _send_all_async(engine, job, package, digests)
    call = create_call(job.name, job.body(package, digests))
    try:
        record = await engine.send(call, job.short())
    except BlobNotFoundError:
        await _send_all_async(engine, job, package, digests)
        record = await engine.send(call, job.short())
    except APIConnectionError as error:
        job.unsure(error)
        raise
    job.created(record)
    deployment = AsyncDeployment(engine, record, job.report)
    return await deployment.wait(job.left()) if wait else deployment


async def _send_all_async(engine: AsyncEngine, job: Job, package: Package, digests: Mapping[str, str]) -> None:
    sent: set[str] = set()
    for source in package.sources:
        digest = digests[source.path]
        transfer = job.transfer(source, digest)
        if digest not in sent:
            await _send_async(engine, job, transfer)
            sent.add(digest)
        else:
            transfer.skipped()


async def _send_async(engine: AsyncEngine, job: Job, transfer: Transfer) -> None:
    await _ask_async(engine, job, transfer)
    if transfer.done:
        transfer.skipped()
        return
    while True:
        try:
            transfer.answered(await engine.send(transfer.put(), job.sending()))
            return
        except APIError as error:
            delay = transfer.failed(error)
            failure = error
        hook = engine.config.on_retry
        if hook is not None:
            pending = hook(transfer.event(failure, delay))
            if isawaitable(pending):
                await pending
        await engine.config.clock.sleep_async(delay)
        await _ask_async(engine, job, transfer)
        if transfer.done:
            transfer.skipped()
            return
        transfer.resumed(failure)


async def _ask_async(engine: AsyncEngine, job: Job, transfer: Transfer) -> None:
    try:
        status = await engine.send(transfer.ask(), job.short())
    except BlobNotFoundError:
        transfer.learned(None)
    else:
        transfer.learned(status)
