"""The catalog of deployed models, over SQL: ``Catalog`` of ``core/catalog.py``.

Whoever writes changes the one row of the table ``inferway_catalog`` first, and so has the catalog to itself until its
transaction ends: on PostgreSQL by that row's lock, on SQLite by the lock on the file. What is read after that is what
was written last, and the order of the revisions is the order of the writes. Deploying is rare and each such transaction
takes some milliseconds, so one at a time is enough. The unique constraints hold what must hold all the same.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Self, TypeVar

import sqlalchemy as sa

from ..core.catalog import (
    AliasRecord,
    AliasSpec,
    BlobRecord,
    DeploymentRecord,
    DeploymentState,
    Event,
    EventKind,
    FileRef,
    Footprint,
    Guard,
    Isolation,
    Shadow,
    Snapshot,
    Step,
    VersionRecord,
    VersionSpec,
)
from ..core.errors import (
    AliasNotFoundError,
    BlobNotFoundError,
    ConflictError,
    DeploymentNotFoundError,
    InvalidParameterError,
    ModelNotFoundError,
    QuotaExceededError,
    VersionNotFoundError,
)
from .sql import SqlStore
from .tables import (
    ALIASES,
    BLOB_HOLDERS,
    BLOBS,
    CATALOG,
    DEPLOYMENTS,
    EVENTS,
    RETIRED,
    VERSION_FILES,
    VERSIONS,
)

Sees = Callable[[str], bool]
"""Whether a model of that name is there for whoever asks."""

_T = TypeVar("_T")
MAX_VERSION: Final = 2_000_000_000
NO_DEPLOYMENT: Final = (
    "expected the id of a deployment, there is none of that id; GET /api/v1/deployments lists those that there are"
)
_MANY: Final = 500
"""Values in one IN: fewer than any version of SQLite takes."""


_FORGET: Final = 2000
"""Rows that one transaction forgets: some milliseconds, for which whoever deploys waits."""


class Forgotten(NamedTuple):
    """How many records of the past were deleted."""

    events: int
    deployments: int


def utc_now() -> datetime:
    return datetime.now(UTC)


class SqlCatalog(SqlStore):
    """The catalog in a database, SQLite or PostgreSQL. Used from one event loop."""

    def __init__(self, engine: sa.Engine, timeout_s: float) -> None:
        """Use ``open``."""
        super().__init__(engine, timeout_s)
        self._now: Callable[[], datetime] = utc_now

    @classmethod
    async def open(cls, url: str, *, timeout_s: float = 5.0, now: Callable[[], datetime] = utc_now) -> Self:
        """``connect``. Waits longer than the store of keys does: other gateways write to the catalog too.

        Args:
            now: the wall clock, aware.
        """
        catalog = await cls.connect(url, timeout_s)
        catalog._now = now
        return catalog

    # --- reading -----------------------------------------------------------------------------------------------------

    async def revision(self) -> int:
        return await self._call(_revision)

    async def snapshot(self) -> Snapshot:
        def work(connection: sa.Connection) -> Snapshot:
            # Shared, so that no writer comes between the queries. SQLite's transaction sees one moment anyway.
            query = sa.select(CATALOG.c.revision).with_for_update(read=True)
            revision = connection.execute(query).scalar_one()
            order = (VERSIONS.c.model, VERSIONS.c.version)
            versions = _versions(connection, sa.select(VERSIONS).order_by(*order), sa.true())
            aliases = connection.execute(sa.select(ALIASES).order_by(ALIASES.c.model, ALIASES.c.alias))
            return Snapshot(revision, tuple(versions), tuple(_alias_record(row) for row in aliases))

        return await self._call(work)

    async def version(self, model: str, version: int) -> VersionRecord:
        return await self._call(lambda connection: _found_version(connection, model, version))

    async def alias(self, model: str, alias: str) -> AliasRecord:
        return await self._call(lambda connection: _found_alias(connection, model, alias))

    async def deployment(self, deployment_id: str) -> DeploymentRecord:
        return await self._call(lambda connection: _found_deployment(connection, deployment_id))

    async def deployments(
        self, model: str | None = None, limit: int = 100, *, sees: Sees | None = None
    ) -> list[DeploymentRecord]:
        """See ``Catalog``; with ``sees``, those of models that it is true of."""

        def work(connection: sa.Connection) -> list[DeploymentRecord]:
            query = sa.select(DEPLOYMENTS).where(_of_models(connection, DEPLOYMENTS.c.model, model, sees))
            rows = connection.execute(query.order_by(DEPLOYMENTS.c.sequence.desc()).limit(limit))
            return [_deployment(row) for row in rows]

        return await self._call(work)

    async def running_deployments(self) -> list[DeploymentRecord]:
        return await self._running_where()

    async def unkept_deployments(self, older_than: datetime) -> list[DeploymentRecord]:
        return await self._running_where(DEPLOYMENTS.c.owner_seen_at < older_than)

    async def _running_where(self, *conditions: sa.ColumnElement[bool]) -> list[DeploymentRecord]:
        runs = DEPLOYMENTS.c.state == "running"
        query = sa.select(DEPLOYMENTS).where(runs, *conditions).order_by(DEPLOYMENTS.c.sequence)
        return await self._call(lambda connection: [_deployment(row) for row in connection.execute(query)])

    async def events(
        self, model: str | None = None, *, before: int | None = None, limit: int = 100, sees: Sees | None = None
    ) -> list[Event]:
        """See ``Catalog``; with ``sees``, those of models that it is true of."""

        def work(connection: sa.Connection) -> list[Event]:
            query = sa.select(EVENTS).where(_of_models(connection, EVENTS.c.model, model, sees))
            if before is not None:
                query = query.where(EVENTS.c.id < before)
            rows = connection.execute(query.order_by(EVENTS.c.id.desc()).limit(limit))
            return [Event(**row._asdict()) for row in rows]

        return await self._call(work)

    # --- forgetting --------------------------------------------------------------------------------------------------

    def now(self) -> datetime:
        """The moment by the clock that records are given theirs by."""
        return self._now()

    async def forget_history(self, older_than: datetime, per_model: int) -> Forgotten:
        """Delete events, and deployments that have ended, which are older or of which their model has more.

        Args:
            older_than: an event is as old as it is, a deployment as its last change.
            per_model: so many events, and so many ended deployments, stay of each model at the most, the youngest.
        Raises:
            StoreUnavailableError: some may be deleted.
        """
        ended = DEPLOYMENTS.c.state != "running"
        return Forgotten(
            await self._forget(EVENTS.c.id, EVENTS.c.at < older_than, sa.true(), per_model),
            await self._forget(DEPLOYMENTS.c.sequence, DEPLOYMENTS.c.updated_at < older_than, ended, per_model),
        )

    async def _forget(
        self, order: sa.Column[Any], old: sa.ColumnElement[bool], over: sa.ColumnElement[bool], per_model: int
    ) -> int:
        """Delete records that are over, and old or beyond the number; ``order`` is the column that they are ordered by,
        and unique."""
        table = order.table
        model = table.c.model

        def crowded(connection: sa.Connection) -> list[sa.ColumnElement[bool]]:
            query = sa.select(model).where(over).group_by(model).having(sa.func.count() > per_model)
            found = []
            for name in connection.execute(query).scalars().all():
                here = sa.select(order).where(over, model == name).order_by(order.desc())
                last = connection.execute(here.offset(per_model).limit(1)).scalar_one_or_none()
                if last is not None:
                    found.append(sa.and_(model == name, order <= last))
            return found

        total = 0
        for which in (old, *await self._call(crowded)):
            some = sa.select(order).where(over, which).order_by(order).limit(_FORGET)
            change = sa.delete(table).where(order.in_(some))

            def work(connection: sa.Connection, change: sa.Delete = change) -> int:
                return connection.execute(change).rowcount

            while deleted := await self._call(work, write=True):
                total += deleted
        return total

    # --- deploying ---------------------------------------------------------------------------------------------------

    async def begin_deployment(
        self, spec: VersionSpec, *, digest: str, isolation: Isolation, by: str, owner: str
    ) -> DeploymentRecord:
        deployment_id = secrets.token_hex(12)
        now = self._now()

        def work(connection: sa.Connection) -> DeploymentRecord:
            revision = _write(connection)
            _check_blobs(connection, spec.files)
            version, reused = _reserve(connection, spec, digest)
            record = DeploymentRecord(
                id=deployment_id,
                spec=spec,
                version=version,
                digest=digest,
                state="running",
                step=None,
                failed_step=None,
                error_code=None,
                error_message=None,
                reused=reused,
                cancel_requested=False,
                owner=owner,
                created_at=now,
                created_by=by,
                updated_at=now,
            )
            members = {column.name: getattr(record, column.name, None) for column in DEPLOYMENTS.c}
            members |= {
                "sequence": revision,
                "model": spec.model,
                "spec": asdict(spec),
                "isolation": isolation,
                "owner_seen_at": now,
            }
            connection.execute(DEPLOYMENTS.insert().values(**members))
            detail = {"deployment": deployment_id, "reused": reused}
            _event(connection, now, "deployment_started", spec.model, by, version=version, detail=detail)
            return record

        return await self._call(work, write=True)

    async def advance_deployment(self, deployment_id: str, step: Step) -> DeploymentRecord:
        now = self._now()
        runs = sa.and_(DEPLOYMENTS.c.id == deployment_id, DEPLOYMENTS.c.state == "running")
        change = DEPLOYMENTS.update().where(runs).values(step=step.value, updated_at=now, owner_seen_at=now)

        def work(connection: sa.Connection) -> DeploymentRecord:
            connection.execute(change)
            return _found_deployment(connection, deployment_id)

        return await self._call(work, write=True)

    async def keep_deployments(self, owner: str) -> list[DeploymentRecord]:
        mine = sa.and_(DEPLOYMENTS.c.owner == owner, DEPLOYMENTS.c.state == "running")
        now = self._now()

        def work(connection: sa.Connection) -> list[DeploymentRecord]:
            connection.execute(DEPLOYMENTS.update().where(mine).values(owner_seen_at=now))
            query = sa.select(DEPLOYMENTS).where(mine).order_by(DEPLOYMENTS.c.sequence)
            return [_deployment(row) for row in connection.execute(query)]

        return await self._call(work, write=True)

    async def commit_deployment(
        self, deployment_id: str, footprint: Footprint | None, alias: AliasSpec | None
    ) -> VersionRecord:
        now = self._now()

        def work(connection: sa.Connection) -> VersionRecord:
            revision = _write(connection)
            row = _deployment_row(connection, deployment_id)
            record = _deployment(row)
            if record.state != "running":
                raise ConflictError(f"expected a deployment that runs, got one that has {record.state}")
            if record.cancel_requested:
                raise ConflictError("expected a deployment that is to go on, got one whose end was asked for")
            model, version = record.spec.model, record.version
            if record.reused:
                said = _said_anew(record.spec, _found_version(connection, model, version))
                measured = _footprint_values(footprint) if footprint is not None else {}
                if measured or said:
                    connection.execute(VERSIONS.update().where(_is_version(model, version)).values(**measured, **said))
                if said:
                    _changed(connection, now, model, version, record.created_by, said)
            else:
                _insert_version(connection, record, row.isolation, footprint, now)
            change: dict[str, object] = {"state": "succeeded", "step": Step.READY.value, "updated_at": now}
            connection.execute(DEPLOYMENTS.update().where(DEPLOYMENTS.c.id == deployment_id).values(**change))
            detail = {"deployment": deployment_id, "reused": record.reused, "digest": record.digest}
            by = record.created_by
            _event(connection, now, "deployment_succeeded", model, by, version=version, detail=detail)
            if alias is not None and record.spec.alias is not None:
                _point(connection, revision, now, model, record.spec.alias, alias, by=by)
            return _found_version(connection, model, version)

        return await self._call(work, write=True)

    async def end_deployment(
        self, deployment_id: str, *, code: str, message: str, step: Step | None, cancelled: bool = False
    ) -> DeploymentRecord:
        now = self._now()
        state: DeploymentState = "cancelled" if cancelled else "failed"
        kind: EventKind = "deployment_cancelled" if cancelled else "deployment_failed"

        def work(connection: sa.Connection) -> DeploymentRecord:
            _write(connection)
            row = _deployment_row(connection, deployment_id)
            if row.state != "running":
                return _deployment(row)
            change: dict[str, object] = {
                "state": state,
                "error_code": code,
                "error_message": message,
                "failed_step": None if step is None else step.value,
                "updated_at": now,
            }
            connection.execute(DEPLOYMENTS.update().where(DEPLOYMENTS.c.id == deployment_id).values(**change))
            detail = {"deployment": deployment_id, "step": change["failed_step"], "code": code, "message": message}
            by = (row.cancelled_by if cancelled else None) or row.created_by
            _event(connection, now, kind, row.model, by, version=row.version, detail=detail)
            return _found_deployment(connection, deployment_id)

        return await self._call(work, write=True)

    async def request_cancel(self, deployment_id: str, by: str) -> DeploymentRecord:
        now = self._now()

        def work(connection: sa.Connection) -> DeploymentRecord:
            _write(connection)
            row = _deployment_row(connection, deployment_id)
            if row.state == "running" and not row.cancel_requested:
                this = DEPLOYMENTS.c.id == deployment_id
                change = {"cancel_requested": True, "cancelled_by": by, "updated_at": now}
                connection.execute(DEPLOYMENTS.update().where(this).values(**change))
            return _found_deployment(connection, deployment_id)

        return await self._call(work, write=True)

    # --- aliases and versions ----------------------------------------------------------------------------------------

    async def set_alias(
        self,
        model: str,
        alias: str,
        spec: AliasSpec,
        *,
        by: str,
        kind: EventKind = "alias_set",
        expected_revision: int | None = None,
        detail: Mapping[str, Any] | None = None,
        checked: bool = False,
    ) -> AliasRecord:
        now = self._now()

        def work(connection: sa.Connection) -> AliasRecord:
            revision = _write(connection)
            there = _alias_or_none(connection, model, alias)
            at = there.revision if there is not None else 0
            if expected_revision is not None and expected_revision != at:
                raise ConflictError(
                    f"expected alias '{alias}' to be at revision {expected_revision}, it is at {at}; "
                    "read it again and decide anew"
                )
            return _point(
                connection, revision, now, model, alias, spec, by=by, kind=kind, detail=detail, checked=checked
            )

        return await self._call(work, write=True)

    async def delete_alias(self, model: str, alias: str, *, by: str) -> None:
        now = self._now()

        def work(connection: sa.Connection) -> None:
            _write(connection)
            _found_alias(connection, model, alias)
            _drop_alias(connection, now, model, alias, by)

        await self._call(work, write=True)

    async def change_version(
        self,
        model: str,
        version: int,
        *,
        by: str,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        pinned: bool | None = None,
    ) -> VersionRecord:
        now = self._now()
        change: dict[str, object] = {
            name: value
            for name, value in (
                ("labels", None if labels is None else dict(labels)),
                ("notes", None if metadata is None else dict(metadata)),
                ("pinned", pinned),
            )
            if value is not None
        }

        def work(connection: sa.Connection) -> VersionRecord:
            _write(connection)
            record = _found_version(connection, model, version)
            if change:
                connection.execute(VERSIONS.update().where(_is_version(model, version)).values(**change))
                _changed(connection, now, model, version, by, change)
                record = _found_version(connection, model, version)
            return record

        return await self._call(work, write=True)

    async def delete_version(self, model: str, version: int, *, by: str) -> None:
        now = self._now()

        def work(connection: sa.Connection) -> None:
            _write(connection)
            record = _found_version(connection, model, version)
            query = sa.select(ALIASES).where(ALIASES.c.model == model).order_by(ALIASES.c.alias)
            for row in connection.execute(query):
                alias = _alias_record(row)
                if version in _named(alias.spec):
                    raise ConflictError(
                        f"expected a version that no alias names, got one that '{alias.alias}' does; "
                        "point that alias at another version, or delete the alias, first; deleting the whole model "
                        "needs neither"
                    )
            running = _running(connection, model, DEPLOYMENTS.c.version == version)
            if running is not None:
                raise ConflictError(
                    f"expected no deployment of this version to run, {running.id} does; cancel it first"
                )
            _drop_version(connection, now, record, by)

        await self._call(work, write=True)

    async def delete_model(self, model: str, *, by: str) -> None:
        now = self._now()

        def work(connection: sa.Connection) -> None:
            _write(connection)
            running = _running(connection, model)
            if running is not None:
                raise ConflictError(f"expected no deployment of it to run, {running.id} does; cancel that first")
            here = VERSIONS.c.model == model
            versions = list(_versions(connection, sa.select(VERSIONS).where(here).order_by(VERSIONS.c.version), here))
            if not versions:
                raise _no_model(model)
            aliases = sa.select(ALIASES.c.alias).where(ALIASES.c.model == model).order_by(ALIASES.c.alias)
            for alias in connection.execute(aliases).scalars().all():
                _drop_alias(connection, now, model, alias, by)
            for record in versions:
                _drop_version(connection, now, record, by)

        await self._call(work, write=True)

    async def add_event(
        self,
        kind: EventKind,
        model: str,
        *,
        version: int | None = None,
        alias: str | None = None,
        by: str,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        now = self._now()

        def work(connection: sa.Connection) -> None:
            _lock(connection)
            _event(connection, now, kind, model, by, version=version, alias=alias, detail=detail)

        await self._call(work, write=True)

    # --- blobs -------------------------------------------------------------------------------------------------------

    async def add_blob(
        self,
        digest: str,
        size: int,
        *,
        by: str,
        copy: str = "",
        limit_bytes: int | None = None,
        limit_per_key_bytes: int | None = None,
    ) -> BlobRecord:
        now = self._now()

        def work(connection: sa.Connection) -> BlobRecord:
            _lock(connection)
            there = _blob_or_none(connection, digest)
            shown = _is_shown(connection, digest, by)
            for what, limit, counted, whose in (
                ("gateway", limit_bytes, there is not None, None),
                ("key", limit_per_key_bytes, shown, by),
            ):
                if limit is None or counted:
                    continue
                stored = _stored(connection, whose)
                if stored + size > limit:
                    raise QuotaExceededError(
                        f"expected at most {limit} bytes of files for this {what}, it has {stored}, this has {size}; "
                        "delete versions that are not needed"
                    )
            if there is None:
                there = BlobRecord(digest=digest, size=size, created_at=now, created_by=by, copy=copy)
                connection.execute(BLOBS.insert().values(**asdict(there), wanted_at=now))
            else:
                connection.execute(BLOBS.update().where(BLOBS.c.digest == digest).values(wanted_at=now))
            if not shown:
                connection.execute(BLOB_HOLDERS.insert().values(digest=digest, key_id=by))
            return there

        return await self._call(work, write=True)

    async def blob(self, digest: str) -> BlobRecord | None:
        return await self._call(lambda connection: _blob_or_none(connection, digest))

    async def blobs(self, digests: Sequence[str] | None = None) -> list[BlobRecord]:
        def work(connection: sa.Connection) -> list[BlobRecord]:
            query = sa.select(*_BLOB)
            queries = (
                [query] if digests is None else [query.where(BLOBS.c.digest.in_(some)) for some in _parts(digests)]
            )
            rows = [row for part in queries for row in connection.execute(part)]
            return sorted((BlobRecord(**row._asdict()) for row in rows), key=lambda record: record.digest)

        return await self._call(work)

    async def want_blobs(self, digests: Sequence[str]) -> None:
        now = self._now()

        def work(connection: sa.Connection) -> None:
            _lock(connection)
            for some in _parts(digests):
                connection.execute(BLOBS.update().where(BLOBS.c.digest.in_(some)).values(wanted_at=now))

        await self._call(work, write=True)

    async def has_shown(self, digest: str, by: str) -> bool:
        return await self._call(lambda connection: _is_shown(connection, digest, by))

    async def shown(self, digests: Sequence[str], by: str) -> set[str]:
        query = sa.select(BLOB_HOLDERS.c.digest).where(BLOB_HOLDERS.c.key_id == by)

        def work(connection: sa.Connection) -> set[str]:
            found: set[str] = set()
            for some in _parts(digests):
                found.update(connection.execute(query.where(BLOB_HOLDERS.c.digest.in_(some))).scalars())
            return found

        return await self._call(work)

    async def models_with(self, digests: Sequence[str]) -> Mapping[str, frozenset[str]]:
        query = sa.select(VERSION_FILES.c.digest, VERSION_FILES.c.model).distinct()

        def work(connection: sa.Connection) -> Mapping[str, frozenset[str]]:
            found: dict[str, set[str]] = {}
            for some in _parts(digests):
                for digest, model in connection.execute(query.where(VERSION_FILES.c.digest.in_(some))):
                    found.setdefault(digest, set()).add(model)
            return {digest: frozenset(models) for digest, models in found.items()}

        return await self._call(work)

    async def stored_bytes(self, by: str | None = None) -> int:
        return await self._call(lambda connection: _stored(connection, by))

    async def unreferenced_blobs(self, older_than: datetime) -> list[BlobRecord]:
        return await self._call(lambda connection: _unreferenced(connection, older_than))

    async def forget_blobs(self, digests: Sequence[str], older_than: datetime) -> list[BlobRecord]:
        wanted = set(digests)

        def work(connection: sa.Connection) -> list[BlobRecord]:
            _lock(connection)  # so that no deployment begins that names one of them
            forgotten = [record for record in _unreferenced(connection, older_than) if record.digest in wanted]
            for some in _parts([record.digest for record in forgotten]):
                for table in (BLOBS, BLOB_HOLDERS):
                    connection.execute(table.delete().where(table.c.digest.in_(some)))
            return forgotten

        return await self._call(work, write=True)


@asynccontextmanager
async def open_catalog(*, database_url: str, timeout_s: float = 5.0) -> AsyncIterator[SqlCatalog]:
    """Open the catalog, and close it.

    Args:
        database_url: see ``SqlStore.connect``.
        timeout_s: seconds after which a call gives up.
    Raises:
        StateError: something of it cannot be used; the message is for the operator.
        StoreUnavailableError: the database does not answer.
    """
    catalog = await SqlCatalog.open(database_url, timeout_s=timeout_s)
    try:
        yield catalog
    finally:
        await catalog.close()


# --- steps of transactions -------------------------------------------------------------------------------------------


def _of_models(
    connection: sa.Connection, column: sa.Column[Any], model: str | None, sees: Sees | None
) -> sa.ColumnElement[bool]:
    """The condition that a record is of one model, or of one that ``sees`` is true of. Patterns of names are not SQL's,
    so the names are looked at, which are fewer than records: others' records must not make reading one's own slow."""
    if model is not None:
        return column == model
    if sees is None:
        return sa.true()
    names = connection.execute(sa.select(column).distinct()).scalars().all()
    seen = [name for name in names if sees(name)]
    if len(seen) == len(names):
        return sa.true()
    return sa.or_(sa.false(), *(column.in_(some) for some in _parts(seen)))


def _revision(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(CATALOG.c.revision)).scalar_one())


def _write(connection: sa.Connection) -> int:
    """Have the catalog to oneself until the transaction ends, and raise its revision; returns the new one."""
    connection.execute(CATALOG.update().values(revision=CATALOG.c.revision + 1))
    return _revision(connection)


def _lock(connection: sa.Connection) -> None:
    """Have the catalog to oneself for a write that others need not follow."""
    connection.execute(sa.select(CATALOG.c.revision).with_for_update()).scalar_one()


def _check_blobs(connection: sa.Connection, files: Sequence[FileRef]) -> None:
    """Raises BlobNotFoundError, InvalidParameterError."""
    sizes: dict[str, int] = {}
    for some in _parts({file.digest for file in files}):
        rows = connection.execute(sa.select(BLOBS.c.digest, BLOBS.c.size).where(BLOBS.c.digest.in_(some)))
        sizes |= {row.digest: row.size for row in rows}
    for file in files:
        if file.digest not in sizes:
            raise BlobNotFoundError(
                f"expected blob {file.digest} for '{file.path}' to be uploaded before, it is not there"
            )
        if sizes[file.digest] != file.size:
            raise InvalidParameterError(
                f"expected 'size' of '{file.path}' to be that of its content, {sizes[file.digest]}, got {file.size}"
            )


def _reserve(connection: sa.Connection, spec: VersionSpec, digest: str) -> tuple[int, bool]:
    """The number for a content, and whether a version has it already."""
    model, wanted = spec.model, spec.version
    if wanted is not None and not 1 <= wanted <= MAX_VERSION:
        raise InvalidParameterError(f"expected 'version' to be from 1 to {MAX_VERSION}, got {wanted}")
    same = sa.select(VERSIONS.c.version).where(VERSIONS.c.model == model, VERSIONS.c.digest == digest)
    number = connection.execute(same).scalar_one_or_none()
    if number is not None:
        if wanted is not None and wanted != number:
            raise ConflictError(
                f"expected content of its own for version {wanted}, got that of version {number}; "
                "leave 'version' out to use that one, or point an alias at it"
            )
        return int(number), True
    making = DEPLOYMENTS.c.reused.is_(sa.false())
    rival = _running(connection, model, making, DEPLOYMENTS.c.digest == digest)
    if rival is not None:
        raise ConflictError(
            f"expected other content, deployment {rival.id} is making version {rival.version} of this; "
            "wait for it or cancel it"
        )
    if wanted is None:
        highest = [
            connection.execute(sa.select(sa.func.max(table.c.version)).where(table.c.model == model)).scalar()
            for table in (VERSIONS, RETIRED)
        ]
        here = sa.and_(DEPLOYMENTS.c.model == model, DEPLOYMENTS.c.state == "running")
        highest.append(connection.execute(sa.select(sa.func.max(DEPLOYMENTS.c.version)).where(here)).scalar())
        return max((number for number in highest if number is not None), default=0) + 1, False
    if connection.execute(sa.select(VERSIONS.c.version).where(_is_version(model, wanted))).first() is not None:
        raise ConflictError(
            f"expected a free version number, {wanted} has other content and versions do not change; "
            "leave 'version' out to take the next one"
        )
    retired = sa.select(RETIRED.c.digest).where(RETIRED.c.model == model, RETIRED.c.version == wanted)
    if connection.execute(retired).scalar_one_or_none() not in (None, digest):
        raise ConflictError(
            f"expected a version number that was never used, {wanted} had other content before it was deleted; "
            "leave 'version' out to take the next one"
        )
    rival = _running(connection, model, making, DEPLOYMENTS.c.version == wanted)
    if rival is not None:
        raise ConflictError(
            f"expected a free version number, deployment {rival.id} is making version {wanted}; "
            "wait for it, cancel it, or leave 'version' out"
        )
    return wanted, False


def _insert_version(
    connection: sa.Connection, record: DeploymentRecord, isolation: str, footprint: Footprint | None, now: datetime
) -> None:
    spec = record.spec
    key = {"model": spec.model, "version": record.version}
    connection.execute(
        VERSIONS.insert().values(
            **key,
            kind=spec.kind,
            digest=record.digest,
            config=dict(spec.config),
            isolation=isolation,
            labels=dict(spec.labels),
            notes=dict(spec.metadata),
            pinned=spec.pinned,
            created_at=now,
            created_by=record.created_by,
            **_footprint_values(footprint),
        )
    )
    if spec.files:
        connection.execute(VERSION_FILES.insert(), [key | asdict(file) for file in spec.files])
    connection.execute(RETIRED.delete().where(RETIRED.c.model == spec.model, RETIRED.c.version == record.version))


def _said_anew(spec: VersionSpec, there: VersionRecord) -> dict[str, Any]:
    """What a deployment of content that is there says of it otherwise. What it does not say stays."""
    said: dict[str, Any] = {}
    if spec.labels and dict(spec.labels) != dict(there.labels):
        said["labels"] = dict(spec.labels)
    if spec.metadata and dict(spec.metadata) != dict(there.metadata):
        said["notes"] = dict(spec.metadata)
    if spec.pinned and not there.pinned:
        said["pinned"] = True
    return said


def _changed(
    connection: sa.Connection, now: datetime, model: str, version: int, by: str, change: Mapping[str, object]
) -> None:
    names = ["metadata" if name == "notes" else name for name in sorted(change)]
    _event(connection, now, "version_changed", model, by, version=version, detail={"changed": names})


def _drop_version(connection: sa.Connection, now: datetime, record: VersionRecord, by: str) -> None:
    for table in (VERSION_FILES, VERSIONS):
        here = sa.and_(table.c.model == record.model, table.c.version == record.version)
        connection.execute(table.delete().where(here))
    connection.execute(RETIRED.insert().values(model=record.model, version=record.version, digest=record.digest))
    detail = {"digest": record.digest}
    _event(connection, now, "version_deleted", record.model, by, version=record.version, detail=detail)


def _drop_alias(connection: sa.Connection, now: datetime, model: str, alias: str, by: str) -> None:
    connection.execute(ALIASES.delete().where(ALIASES.c.model == model, ALIASES.c.alias == alias))
    _event(connection, now, "alias_deleted", model, by, alias=alias)


def _point(
    connection: sa.Connection,
    revision: int,
    now: datetime,
    model: str,
    alias: str,
    spec: AliasSpec,
    *,
    by: str,
    kind: EventKind = "alias_set",
    detail: Mapping[str, Any] | None = None,
    checked: bool = False,
) -> AliasRecord:
    """Point an alias, unless it is so already.

    Its revision is the catalog's, so that one that was deleted and made again never has a revision twice.
    """
    if not checked:
        present = connection.execute(sa.select(VERSIONS.c.version).where(VERSIONS.c.model == model)).scalars().all()
        if not present:
            raise _no_model(model)
        for version in _named(spec):
            if version not in present:
                raise _no_version(model, version)
    there = _alias_or_none(connection, model, alias)
    if there is not None and there.spec == spec:
        return there
    values = {
        "spec": _alias_json(spec),
        "previous": None if there is None else _alias_json(there.spec),
        "revision": revision,
        "updated_at": now,
        "updated_by": by,
    }
    if there is None:
        connection.execute(ALIASES.insert().values(model=model, alias=alias, **values))
    else:
        here = sa.and_(ALIASES.c.model == model, ALIASES.c.alias == alias)
        connection.execute(ALIASES.update().where(here).values(**values))
    told = {"spec": values["spec"], "previous": values["previous"], **(detail or {})}
    only = told.get("version", next(iter(spec.weights)) if len(spec.weights) == 1 else None)
    _event(connection, now, kind, model, by, version=only, alias=alias, detail=told)
    return _found_alias(connection, model, alias)


def _event(
    connection: sa.Connection,
    now: datetime,
    kind: EventKind,
    model: str,
    by: str,
    *,
    version: int | None = None,
    alias: str | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    values = {"at": now, "kind": kind, "model": model, "version": version, "alias": alias, "by": by}
    connection.execute(EVENTS.insert().values(**values, detail=dict(detail or {})))


def _running(connection: sa.Connection, model: str, *conditions: sa.ColumnElement[bool]) -> DeploymentRecord | None:
    query = sa.select(DEPLOYMENTS).where(DEPLOYMENTS.c.model == model, DEPLOYMENTS.c.state == "running", *conditions)
    row = connection.execute(query.order_by(DEPLOYMENTS.c.sequence).limit(1)).one_or_none()
    return None if row is None else _deployment(row)


def _unreferenced(connection: sa.Connection, older_than: datetime) -> list[BlobRecord]:
    named = sa.exists().where(VERSION_FILES.c.digest == BLOBS.c.digest)
    query = sa.select(*_BLOB).where(BLOBS.c.wanted_at < older_than, ~named).order_by(BLOBS.c.digest)
    running = sa.select(DEPLOYMENTS).where(DEPLOYMENTS.c.state == "running")
    needed = {file.digest for row in connection.execute(running) for file in _deployment(row).spec.files}
    return [BlobRecord(**row._asdict()) for row in connection.execute(query) if row.digest not in needed]


def _stored(connection: sa.Connection, by: str | None) -> int:
    query = sa.select(sa.func.coalesce(sa.func.sum(BLOBS.c.size), 0))
    if by is not None:
        query = query.join_from(BLOBS, BLOB_HOLDERS, BLOBS.c.digest == BLOB_HOLDERS.c.digest)
        query = query.where(BLOB_HOLDERS.c.key_id == by)
    return int(connection.execute(query).scalar_one())


def _is_shown(connection: sa.Connection, digest: str, by: str) -> bool:
    here = sa.and_(BLOB_HOLDERS.c.digest == digest, BLOB_HOLDERS.c.key_id == by)
    return bool(connection.execute(sa.select(sa.exists().where(here))).scalar())


def _parts(values: Iterable[_T]) -> Iterator[list[_T]]:
    rest = list(values)
    for start in range(0, len(rest), _MANY):
        yield rest[start : start + _MANY]


# --- rows ------------------------------------------------------------------------------------------------------------

_BLOB: Final = [column for column in BLOBS.c if column.name != "wanted_at"]


def _is_version(model: str, version: int) -> sa.ColumnElement[bool]:
    return sa.and_(VERSIONS.c.model == model, VERSIONS.c.version == version)


def _no_model(model: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"Request for unknown model: '{model}' is not found")


def _no_version(model: str, version: int) -> VersionNotFoundError:
    return VersionNotFoundError(f"Request for unknown model: '{model}' version {version} is not found")


def _versions(
    connection: sa.Connection, query: sa.Select[Any], here: sa.ColumnElement[bool]
) -> Iterator[VersionRecord]:
    """Versions of a query, with their files, which a second one reads: as many as there are, in two round trips."""
    of_these = sa.and_(VERSION_FILES.c.model == VERSIONS.c.model, VERSION_FILES.c.version == VERSIONS.c.version)
    files: dict[tuple[str, int], list[FileRef]] = {}
    joined = sa.select(VERSION_FILES).join_from(VERSION_FILES, VERSIONS, of_these).where(here)
    rows = connection.execute(query).all()
    for row in connection.execute(joined):
        files.setdefault((row.model, row.version), []).append(FileRef(row.path, row.digest, row.size))
    for row in rows:
        yield VersionRecord(
            model=row.model,
            version=row.version,
            kind=row.kind,
            digest=row.digest,
            # Not in the database's order, which depends on its locale.
            files=tuple(sorted(files.get((row.model, row.version), ()), key=lambda file: file.path)),
            config=row.config,
            isolation=row.isolation,
            labels=row.labels,
            metadata=row.notes,
            pinned=row.pinned,
            footprint=None if row.peak_bytes is None else Footprint(row.resident_bytes, row.peak_bytes),
            created_at=row.created_at,
            created_by=row.created_by,
        )


def _found_version(connection: sa.Connection, model: str, version: int) -> VersionRecord:
    here = _is_version(model, version)
    for record in _versions(connection, sa.select(VERSIONS).where(here), here):
        return record
    raise _no_version(model, version)


def _footprint_values(footprint: Footprint | None) -> dict[str, int | None]:
    return {
        "resident_bytes": None if footprint is None else footprint.resident_bytes,
        "peak_bytes": None if footprint is None else footprint.peak_bytes,
    }


def _blob_or_none(connection: sa.Connection, digest: str) -> BlobRecord | None:
    row = connection.execute(sa.select(*_BLOB).where(BLOBS.c.digest == digest)).one_or_none()
    return None if row is None else BlobRecord(**row._asdict())


def _alias_or_none(connection: sa.Connection, model: str, alias: str) -> AliasRecord | None:
    query = sa.select(ALIASES).where(ALIASES.c.model == model, ALIASES.c.alias == alias)
    row = connection.execute(query).one_or_none()
    return None if row is None else _alias_record(row)


def _found_alias(connection: sa.Connection, model: str, alias: str) -> AliasRecord:
    record = _alias_or_none(connection, model, alias)
    if record is None:
        raise AliasNotFoundError(f"expected an alias of '{model}', it has none that is called '{alias}'")
    return record


def _alias_record(row: sa.Row[Any]) -> AliasRecord:
    fields: dict[str, Any] = row._asdict()
    previous = fields["previous"]
    fields |= {"spec": _alias_spec(fields["spec"]), "previous": None if previous is None else _alias_spec(previous)}
    return AliasRecord(**fields)


def _alias_json(spec: AliasSpec) -> dict[str, Any]:
    members = asdict(spec)
    return members | {"weights": {str(version): weight for version, weight in spec.weights.items()}}


def _alias_spec(members: Mapping[str, Any]) -> AliasSpec:
    shadow, guard = members["shadow"], members["guard"]
    return AliasSpec(
        weights={int(version): weight for version, weight in members["weights"].items()},
        sticky=members["sticky"],
        shadow=None if shadow is None else Shadow(**shadow),
        fallback=tuple(members["fallback"]),
        guard=None if guard is None else Guard(**guard),
    )


def _named(spec: AliasSpec) -> list[int]:
    """Every version that an alias names, once."""
    shadow = () if spec.shadow is None else (spec.shadow.version,)
    return sorted({*spec.weights, *spec.fallback, *shadow})


def _deployment_row(connection: sa.Connection, deployment_id: str) -> sa.Row[Any]:
    row = connection.execute(sa.select(DEPLOYMENTS).where(DEPLOYMENTS.c.id == deployment_id)).one_or_none()
    if row is None:
        raise DeploymentNotFoundError(NO_DEPLOYMENT)
    return row


def _found_deployment(connection: sa.Connection, deployment_id: str) -> DeploymentRecord:
    return _deployment(_deployment_row(connection, deployment_id))


def _deployment(row: sa.Row[Any]) -> DeploymentRecord:
    fields: dict[str, Any] = row._asdict()
    for name in ("sequence", "model", "cancelled_by", "isolation", "owner_seen_at"):
        del fields[name]
    spec = fields["spec"]
    files = tuple(FileRef(**file) for file in spec["files"])
    fields["spec"] = VersionSpec(**spec | {"files": files})
    for name in ("step", "failed_step"):
        fields[name] = None if fields[name] is None else Step(fields[name])
    return DeploymentRecord(**fields)
