"""The database of keys: SQLite in one file, or PostgreSQL.

SQLAlchemy's synchronous engine on a few threads of our own. The asynchronous engine was left out: for SQLite it is a
thread as well, it would add greenlet, and a key is read once in seconds and written by hand. Every call ends in time:

- the caller is answered after ``timeout_s`` with StoreUnavailableError, whatever the thread does;
- the thread's work is then ended from outside, by stopping SQLite or shutting the socket to PostgreSQL down, so
  that a server which hangs holds no thread for longer than that either;
- SQLite gives up waiting for a lock, and PostgreSQL cancels a statement, shortly before.

A write whose caller was told that the store is unavailable may have happened. Revoking again is safe; rotating again is
refused and names the successor; creating again with the same Idempotency-Key likewise.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from ..core.errors import ConflictError, KeyNotFoundError, StoreUnavailableError
from ..core.keys import NO_SUCH_KEY, Authenticator, Clock, KeyRecord, KeyService, Peppers
from .state import StateError, check_private, load_peppers, prepare_directory

_log = logging.getLogger("inferway.store")
_T = TypeVar("_T")

RETRY_WINDOW: Final = timedelta(hours=24)
"""For how long a creation is not done twice for the same Idempotency-Key."""
_THREADS: Final = 4
_OPEN_TIMEOUT_S: Final = 30.0
_VERSION_TABLE: Final = "inferway_version"
_MIGRATION_LOCK: Final = 0x1F_E12A7  # any number that no other program locks
_MIGRATING: Final = threading.Lock()
_WRITES: Final = "inferway_writes"
_SQLITE_STEPS: Final = 10_000
"""Instructions of SQLite's machine, some tenths of a millisecond, between two looks at whether to go on."""
_UNAVAILABLE: Final = "expected an answer of the key database, got none in time"


class _Utc(sa.types.TypeDecorator[datetime]):
    """An aware moment, in UTC on both sides. SQLite keeps no zone, so it gets the naive moment in UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        moment = value.astimezone(UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# As the migrations leave it; a test compares the two.
METADATA: Final = sa.MetaData()
_KEYS: Final = sa.Table(
    "inferway_keys",
    METADATA,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("environment", sa.String(4), nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("models", sa.JSON, nullable=False),
    sa.Column("digest", sa.LargeBinary(32), nullable=False),
    sa.Column("pepper_version", sa.Integer, nullable=False),
    sa.Column("created_at", _Utc, nullable=False),
    sa.Column("created_by", sa.String(12)),
    sa.Column("expires_at", _Utc),
    sa.Column("revoked_at", _Utc),
    sa.Column("rotated_at", _Utc),
    sa.Column("replaced_by", sa.String(12)),
    sa.Column("last_used_at", _Utc),
    sa.Column("retry_token", sa.LargeBinary(32), unique=True),
    sa.Index("inferway_keys_by_age", "created_at", "id"),
)
_PEPPERS: Final = sa.Table(
    "inferway_peppers",
    METADATA,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("check_value", sa.LargeBinary(32), nullable=False),
)
_RECORD: Final = [column for column in _KEYS.c if column.name != "retry_token"]


class _Work:
    """One job on a thread, and the connection it is using, so that it can be ended from outside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = False
        self._driver: DBAPIConnection | None = None

    def check(self) -> None:
        """Raises TimeoutError where ``end`` was called: nobody waits for this any more."""
        if self._ended:
            raise TimeoutError

    def begin(self, connection: sa.Connection) -> None:
        """From here on ``end`` reaches this connection. Raises TimeoutError where it was called before."""
        with self._lock:
            self.check()
            self._driver = driver = connection.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            # SQLite asks while it works. Its interrupt would be lost if it came between two statements.
            driver.set_progress_handler(lambda: self._ended, _SQLITE_STEPS)

    def done(self) -> None:
        """The connection may go back to the pool: nobody ends it any more."""
        with self._lock:
            driver, self._driver = self._driver, None
        if isinstance(driver, sqlite3.Connection):
            driver.set_progress_handler(None, 0)

    def end(self) -> None:
        """Let the thread's call fail soon. Called on the event loop; does not wait."""
        with self._lock:
            self._ended = True
            if self._driver is not None and not isinstance(self._driver, sqlite3.Connection):
                _shut(self._driver)


def _shut(driver: Any) -> None:
    """End both directions of a psycopg connection's socket: the thread that waits for it then reads its end."""
    try:
        with socket.socket(fileno=os.dup(driver.fileno())) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)
    except Exception as error:
        # It was closed at this very moment, which psycopg says with an error of its own; that serves as well.
        _log.debug("nothing was left to end: %s", type(error).__name__)


class _TakenError(ConflictError):
    """A unique value is in the database already."""


class KeyDatabase:
    """The store of keys: ``KeyStore`` of ``core/keys.py``, over SQL. Used from one event loop."""

    def __init__(self, engine: sa.Engine, timeout_s: float) -> None:
        """Use ``open``."""
        self._engine = engine
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="inferway-keys")
        self._running: set[_Work] = set()

    @classmethod
    async def open(cls, url: str, peppers: Peppers, *, timeout_s: float = 1.5) -> Self:
        """Connect, bring the schema up to date, and see that the peppers are those that the stored keys were made with.

        Several processes may do so at the same time. A role that may not change the schema is enough once it is there.

        Args:
            url: SQLAlchemy URL of a SQLite file (made with mode 0600 where it is missing) or of PostgreSQL.
            peppers: their check values are stored when they are first seen.
            timeout_s: seconds after which a call gives up.
        Raises:
            StateError: an unusable URL, file, schema or pepper.
            StoreUnavailableError: the database does not answer; ``__cause__`` has its own words.
        """
        address = _address(url)
        if address.get_backend_name() == "sqlite":
            await asyncio.to_thread(_prepare_file, Path(address.database or ""))
        # With more patience: another process may be changing the schema.
        opening = cls(_engine(address, _OPEN_TIMEOUT_S), _OPEN_TIMEOUT_S)
        try:
            await opening._call(lambda connection: _prepare(connection, peppers), write=True)
        finally:
            await opening.close()
        return cls(_engine(address, timeout_s), timeout_s)

    async def close(self) -> None:
        """End the work that still runs, and close every connection. Calls after it raise RuntimeError."""
        for job in list(self._running):
            job.end()
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._engine.dispose)

    async def fetch(self, key_ids: Sequence[str]) -> Mapping[str, KeyRecord]:
        query = sa.select(*_RECORD).where(_KEYS.c.id.in_(key_ids))
        records = await self._call(lambda connection: [_record(row) for row in connection.execute(query)])
        return {record.id: record for record in records}

    async def touch(self, used: Mapping[str, datetime]) -> None:
        moment = sa.bindparam("moment", type_=_Utc)
        update = (
            _KEYS.update()
            .where(
                _KEYS.c.id == sa.bindparam("key_id"),
                sa.or_(_KEYS.c.last_used_at.is_(None), _KEYS.c.last_used_at < moment),
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
                same = _KEYS.c.retry_token == retry_token
                too_old = _KEYS.c.created_at <= record.created_at - RETRY_WINDOW
                connection.execute(_KEYS.update().where(same, too_old).values(retry_token=None))
                made = connection.scalar(sa.select(_KEYS.c.id).where(same))
                if made is not None:
                    raise ConflictError(
                        f"expected a new Idempotency-Key, got that of key {made}, which was shown once and cannot be "
                        "shown again; if it was not received, revoke it and create another"
                    )
            connection.execute(_KEYS.insert().values(**_values(record), retry_token=retry_token))

        try:
            await self._call(work, write=True)
        except _TakenError:
            # Two requests with one token came at the same time, and the other was first: now it is found.
            await self._call(work, write=True)

    async def page(self, limit: int, after: tuple[datetime, str] | None) -> list[KeyRecord]:
        query = sa.select(*_RECORD).order_by(_KEYS.c.created_at.desc(), _KEYS.c.id.desc()).limit(limit)
        if after is not None:
            created_at, key_id = after
            query = query.where(
                sa.or_(
                    _KEYS.c.created_at < created_at,
                    sa.and_(_KEYS.c.created_at == created_at, _KEYS.c.id < key_id),
                )
            )
        return await self._call(lambda connection: [_record(row) for row in connection.execute(query)])

    async def revoke(self, key_id: str, now: datetime) -> KeyRecord:
        def work(connection: sa.Connection) -> KeyRecord:
            this = _KEYS.c.id == key_id
            connection.execute(_KEYS.update().where(this, _KEYS.c.revoked_at.is_(None)).values(revoked_at=now))
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
            connection.execute(_KEYS.insert().values(**_values(successor)))
            end = expires_at if old.expires_at is None else min(old.expires_at, expires_at)
            change = {"expires_at": end, "rotated_at": now, "replaced_by": successor.id}
            connection.execute(_KEYS.update().where(_KEYS.c.id == key_id).values(**change))
            return _found(connection, key_id)

        return await self._call(work, write=True)

    async def any_usable(self, now: datetime) -> bool:
        usable = sa.and_(_KEYS.c.revoked_at.is_(None), sa.or_(_KEYS.c.expires_at.is_(None), _KEYS.c.expires_at > now))
        query = sa.select(sa.exists().where(usable))
        return bool(await self._call(lambda connection: connection.scalar(query)))

    async def _call(self, work: Callable[[sa.Connection], _T], *, write: bool = False) -> _T:
        """Run work on a thread, in one transaction.

        Being cancelled leaves the thread to finish, or to be ended when its time is up.

        Raises:
            StoreUnavailableError: for everything else that the database or the clock has against it.
            _TakenError: something unique is there already.
        """
        job = _Work()
        future = self._threads.submit(self._run, work, write, job)
        self._running.add(job)
        future.add_done_callback(lambda _: self._running.discard(job))
        timer = asyncio.get_running_loop().call_later(self._timeout_s, job.end)
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await asyncio.wrap_future(future)
        except IntegrityError as error:
            raise _TakenError("expected a key of its own, got one that the database has already") from error
        except (TimeoutError, SQLAlchemyError) as error:
            _log.warning("the key database failed: %s", _words(error))
            raise StoreUnavailableError(_UNAVAILABLE, retry_after_s=1.0) from error
        timer.cancel()
        return result

    def _run(self, work: Callable[[sa.Connection], _T], write: bool, job: _Work) -> _T:
        job.check()  # before the wait for a connection that a queue of such jobs would add up
        with self._engine.connect() as connection:
            connection.execution_options(**{_WRITES: write})
            try:
                self._start(connection, job)
                result = work(connection)
                connection.commit()
            except BaseException:
                with suppress(SQLAlchemyError):
                    connection.rollback()  # here and not in the pool, because here it can be ended from outside
                raise
            finally:
                job.done()
        return result

    def _start(self, connection: sa.Connection, job: _Work) -> None:
        """Begin the transaction on a connection that answers."""
        job.begin(connection)
        if connection.dialect.name == "sqlite":
            return
        # Ends with the transaction, so that it also holds behind a pooler that shares connections.
        limit = sa.select(sa.func.set_config("statement_timeout", f"{self._timeout_s * 0.9:.3f}s", True))
        try:
            connection.execute(limit)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            # The server was restarted since the connection was used last; with it the pool gave up all like it.
            connection.rollback()
            job.begin(connection)
            connection.execute(limit)


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


# --- opening ---------------------------------------------------------------------------------------------------------


def _address(url: str) -> sa.URL:
    try:
        address = sa.make_url(url)
    except ArgumentError:
        # From None, and without the text: it may hold a password.
        raise StateError(
            "expected a database URL such as sqlite:////var/lib/inferway/inferway.db or "
            "postgresql://user@host/database, got another text"
        ) from None
    match address.drivername:
        case "sqlite" | "sqlite+pysqlite":
            if not address.database or address.database == ":memory:" or address.database.startswith("file:"):
                raise StateError("expected the path of a file in the SQLite URL: keys must outlive the process")
            return address
        case "postgres" | "postgresql" | "postgresql+psycopg":
            return address.set(drivername="postgresql+psycopg")
        case other:
            raise StateError(f"expected a database URL that begins with sqlite: or postgresql:, got {other}:")


def _engine(address: sa.URL, timeout_s: float) -> sa.Engine:
    """An engine whose every wait ends a little before ``timeout_s``. Connects to nothing yet."""
    if address.get_backend_name() == "sqlite":
        engine = sa.create_engine(
            address, pool_size=_THREADS, hide_parameters=True, connect_args={"timeout": timeout_s * 0.8}
        )
        sa.event.listen(engine, "connect", lambda driver, _: _connected_sqlite(driver, timeout_s * 0.8))
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        return sa.create_engine(
            address,
            pool_size=_THREADS,
            hide_parameters=True,
            use_native_hstore=False,
            connect_args={
                "connect_timeout": 2,  # seconds; the least that libpq takes
                "tcp_user_timeout": int(timeout_s * 1000),
                "keepalives_idle": 30,
                # Prepared statements do not go with poolers that share connections, and nothing here needs them.
                "prepare_threshold": None,
                "application_name": "inferway",
            },
        )
    except ModuleNotFoundError as error:
        raise StateError("PostgreSQL needs a driver: pip install 'inferway[gateway,postgres]'") from error


def _connected_sqlite(driver: sqlite3.Connection, limit_s: float) -> None:
    # Python's sqlite3 module would begin transactions by itself, and only before writing.
    driver.isolation_level = None
    end = time.monotonic() + limit_s
    while True:
        try:
            driver.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            # SQLite does not wait for this lock by itself: processes that made the file together would fail.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= end:
                raise
            time.sleep(0.01)
    driver.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later can fail where one that asks for the lock at once only waits.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options()[_WRITES] else "BEGIN")


def _prepare_file(file: Path) -> None:
    """Make the database file with mode 0600, or see that it has it. SQLite gives its side files the same mode."""
    prepare_directory(file.parent)
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        check_private(file, file.stat().st_mode)
    except OSError as error:
        raise StateError(f"cannot use the database file '{file}': {error.strerror}") from error


def _prepare(connection: sa.Connection, peppers: Peppers) -> None:
    if connection.dialect.name == "postgresql":
        # Until the end of the transaction. SQLite has locked the whole file by now.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
    _migrate(connection)
    _compare_peppers(connection, peppers)


def _migrate(connection: sa.Connection) -> None:
    steps = Path(__file__).parent / "migrations"
    config = Config(attributes={"connection": connection, "version_table": _VERSION_TABLE})
    config.set_main_option("script_location", str(steps).replace("%", "%%"))
    present = MigrationContext.configure(connection, opts={"version_table": _VERSION_TABLE}).get_current_revision()
    try:
        # Alembic keeps the migration under way in module globals, so threads take turns.
        with _MIGRATING:
            if present != ScriptDirectory.from_config(config).get_current_head():
                command.upgrade(config, "head")
    except CommandError as error:
        raise StateError(
            f"the key database has schema {present}, which this version does not know; was it made by a later one?"
        ) from error


def _compare_peppers(connection: sa.Connection, peppers: Peppers) -> None:
    rows = connection.execute(sa.select(_PEPPERS.c.version, _PEPPERS.c.check_value))
    stored = {row.version: row.check_value for row in rows}
    for version, check in peppers.checks().items():
        if version not in stored:
            connection.execute(_PEPPERS.insert().values(version=version, check_value=check))
        elif stored[version] != check:
            raise StateError(
                f"pepper version {version} is not the one that the stored keys were made with: no key would work. "
                "Bring the old pepper back (the setting key_pepper, or the file 'pepper' in the state directory); to "
                "change it, keep the old one and add the new one as the next version: 1:OLD,2:NEW"
            )


def cause_in_words(error: StoreUnavailableError) -> str:
    """What the database or the clock had against it, for the operator. Holds no password: drivers never repeat one."""
    return _words(error.__cause__) if error.__cause__ is not None else error.message


def _words(error: BaseException) -> str:
    reason = error.orig if isinstance(error, DBAPIError) else error
    return f"{type(reason).__name__}: {str(reason).strip() or 'no answer in time'}"


# --- rows ------------------------------------------------------------------------------------------------------------


def _found(connection: sa.Connection, key_id: str, *, lock: bool = False) -> KeyRecord:
    query = sa.select(*_RECORD).where(_KEYS.c.id == key_id)
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
