"""The store of keys, over SQL.

A write whose caller was told that the store is unavailable may have happened. Revoking again is safe; rotating again is
refused and names the successor; creating again with the same Idempotency-Key likewise.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, Self

import sqlalchemy as sa

from ..core.errors import ConflictError, KeyNotFoundError
from ..core.keys import NO_SUCH_KEY, Authenticator, Clock, KeyRecord, KeyService, Peppers
from .sql import SqlStore, TakenError
from .state import StateError, load_peppers
from .tables import KEYS, PEPPERS, Utc

RETRY_WINDOW: Final = timedelta(hours=24)
"""For how long a creation is not done twice for the same Idempotency-Key."""
_RECORD: Final = [column for column in KEYS.c if column.name != "retry_token"]


class KeyDatabase(SqlStore):
    """The store of keys: ``KeyStore`` of ``core/keys.py``, over SQL. Used from one event loop."""

    what: ClassVar[str] = "key database"

    @classmethod
    async def open(cls, url: str, peppers: Peppers, *, timeout_s: float = 1.5) -> Self:
        """``connect``, and see that the peppers are those that the stored keys were made with.

        Args:
            peppers: their check values are stored when they are first seen.
        Raises:
            StateError: an unusable URL, file, schema or pepper.
            StoreUnavailableError: the database does not answer; ``__cause__`` has its own words.
        """
        return await cls.connect(url, timeout_s, lambda connection: _compare_peppers(connection, peppers))

    async def fetch(self, key_ids: Sequence[str]) -> Mapping[str, KeyRecord]:
        query = sa.select(*_RECORD).where(KEYS.c.id.in_(key_ids))
        records = await self._call(lambda connection: [_record(row) for row in connection.execute(query)])
        return {record.id: record for record in records}

    async def touch(self, used: Mapping[str, datetime]) -> None:
        moment = sa.bindparam("moment", type_=Utc)
        update = (
            KEYS.update()
            .where(
                KEYS.c.id == sa.bindparam("key_id"),
                sa.or_(KEYS.c.last_used_at.is_(None), KEYS.c.last_used_at < moment),
            )
            .values(last_used_at=moment)
        )
        # In order, so that two gateways which touch the same keys do not wait for each other in a circle.
        rows = [{"key_id": key_id, "moment": at} for key_id, at in sorted(used.items())]

        def work(connection: sa.Connection) -> None:
            connection.execute(update, rows)

        if rows:
            await self._call(work, write=True)

    async def insert(self, record: KeyRecord, *, retry_token: bytes | None = None) -> None:
        def work(connection: sa.Connection) -> None:
            if retry_token is not None:
                same = KEYS.c.retry_token == retry_token
                too_old = KEYS.c.created_at <= record.created_at - RETRY_WINDOW
                connection.execute(KEYS.update().where(same, too_old).values(retry_token=None))
                made = connection.scalar(sa.select(KEYS.c.id).where(same))
                if made is not None:
                    raise ConflictError(
                        f"expected a new Idempotency-Key, got that of key {made}, which was shown once and cannot be "
                        "shown again; if it was not received, revoke it and create another"
                    )
            connection.execute(KEYS.insert().values(**_values(record), retry_token=retry_token))

        try:
            await self._call(work, write=True)
        except TakenError:
            # Two requests with one token came at the same time, and the other was first: now it is found.
            await self._call(work, write=True)

    async def page(self, limit: int, after: tuple[datetime, str] | None) -> list[KeyRecord]:
        query = sa.select(*_RECORD).order_by(KEYS.c.created_at.desc(), KEYS.c.id.desc()).limit(limit)
        if after is not None:
            created_at, key_id = after
            query = query.where(
                sa.or_(
                    KEYS.c.created_at < created_at,
                    sa.and_(KEYS.c.created_at == created_at, KEYS.c.id < key_id),
                )
            )
        return await self._call(lambda connection: [_record(row) for row in connection.execute(query)])

    async def revoke(self, key_id: str, now: datetime) -> KeyRecord:
        def work(connection: sa.Connection) -> KeyRecord:
            this = KEYS.c.id == key_id
            connection.execute(KEYS.update().where(this, KEYS.c.revoked_at.is_(None)).values(revoked_at=now))
            return _found(connection, key_id)

        return await self._call(work, write=True)

    async def rotate(self, key_id: str, successor: KeyRecord, expires_at: datetime) -> KeyRecord:
        now = successor.created_at

        def work(connection: sa.Connection) -> KeyRecord:
            old = _found(connection, key_id, lock=True)
            if old.replaced_by is not None:
                raise ConflictError(
                    f"expected a key that was not replaced yet, got one that {old.replaced_by} replaced"
                )
            if (state := old.state(now)) != "active":
                raise ConflictError(f"expected a key that works, got one that is {state}")
            connection.execute(KEYS.insert().values(**_values(successor)))
            end = expires_at if old.expires_at is None else min(old.expires_at, expires_at)
            change = {"expires_at": end, "rotated_at": now, "replaced_by": successor.id}
            connection.execute(KEYS.update().where(KEYS.c.id == key_id).values(**change))
            return _found(connection, key_id)

        return await self._call(work, write=True)

    async def any_usable(self, now: datetime) -> bool:
        usable = sa.and_(KEYS.c.revoked_at.is_(None), sa.or_(KEYS.c.expires_at.is_(None), KEYS.c.expires_at > now))
        query = sa.select(sa.exists().where(usable))
        return bool(await self._call(lambda connection: connection.scalar(query)))


class OpenKeys(NamedTuple):
    """Everything about keys that is open while the gateway runs."""

    database: KeyDatabase
    service: KeyService
    authenticator: Authenticator


@asynccontextmanager
async def open_keys(
    *, database_url: str, state_dir: Path, pepper: str | None = None, ttl_s: float = 4.0, clock: Clock | None = None
) -> AsyncIterator[OpenKeys]:
    """Open the peppers, the database and what stands on them, and close them in reverse.

    Args:
        database_url: see ``KeyDatabase.open``.
        state_dir: where the pepper file is, or is to be, when ``pepper`` is None.
        ttl_s: see ``Authenticator``.
    Raises:
        StateError: something of it cannot be used; the message is for the operator.
        StoreUnavailableError: the database does not answer.
    """
    peppers = await asyncio.to_thread(load_peppers, state_dir, pepper)
    database = await KeyDatabase.open(database_url, peppers)
    try:
        async with Authenticator(database, peppers, clock, ttl_s=ttl_s) as authenticator:
            yield OpenKeys(database, KeyService(database, peppers, authenticator, clock), authenticator)
    finally:
        await database.close()


def _compare_peppers(connection: sa.Connection, peppers: Peppers) -> None:
    rows = connection.execute(sa.select(PEPPERS.c.version, PEPPERS.c.check_value))
    stored = {row.version: row.check_value for row in rows}
    for version, check in peppers.checks().items():
        if version not in stored:
            connection.execute(PEPPERS.insert().values(version=version, check_value=check))
        elif stored[version] != check:
            raise StateError(
                f"pepper version {version} is not the one that the stored keys were made with: no key would work. "
                "Bring the old pepper back (the setting key_pepper, or the file 'pepper' in the state directory); to "
                "change it, keep the old one and add the new one as the next version: 1:OLD,2:NEW"
            )


# --- rows ------------------------------------------------------------------------------------------------------------


def _found(connection: sa.Connection, key_id: str, *, lock: bool = False) -> KeyRecord:
    query = sa.select(*_RECORD).where(KEYS.c.id == key_id)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise KeyNotFoundError(NO_SUCH_KEY)
    return _record(row)


def _record(row: sa.Row[Any]) -> KeyRecord:
    fields: dict[str, Any] = row._asdict()
    return KeyRecord(**fields | {"scopes": frozenset(fields["scopes"]), "models": tuple(fields["models"])})


def _values(record: KeyRecord) -> dict[str, object]:
    values: dict[str, object] = {column.name: getattr(record, column.name) for column in _RECORD}
    return values | {"scopes": sorted(record.scopes), "models": list(record.models)}
