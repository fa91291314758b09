"""SQLite in one file, or PostgreSQL: what every store over SQL stands on.

SQLAlchemy's synchronous engine on a few threads of the store's own. The asynchronous engine was left out: for SQLite it
is a thread as well, and it would add greenlet to calls that are made by hand or once in seconds. Every call ends in
time:

- the caller is answered after ``timeout_s`` with StoreUnavailableError, whatever the thread does;
- the thread's work is then ended from outside, by stopping SQLite or shutting the socket to PostgreSQL down, so
  that a server which hangs holds no thread for longer than that either;
- SQLite gives up waiting for a lock, and PostgreSQL cancels a statement, shortly before.

A write whose caller was told that the store is unavailable may have happened.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Final, Self, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from ..core.errors import ConflictError, StoreUnavailableError
from .state import StateError, check_private, prepare_directory

_log = logging.getLogger("inferway.store")
_T = TypeVar("_T")

_THREADS: Final = 4
_OPEN_TIMEOUT_S: Final = 30.0
_VERSION_TABLE: Final = "inferway_version"
_MIGRATION_LOCK: Final = 0x1F_E12A7  # any number that no other program locks
_MIGRATING: Final = threading.Lock()
_WRITES: Final = "inferway_writes"
_SQLITE_STEPS: Final = 10_000
"""Instructions of SQLite's machine, some tenths of a millisecond, between two looks at whether to go on."""


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


class TakenError(ConflictError):
    """A unique value is in the database already."""


class SqlStore:
    """Tables behind an engine, and the threads that use it. Used from one event loop."""

    what: ClassVar[str] = "database"
    """What it is called in messages."""

    def __init__(self, engine: sa.Engine, timeout_s: float) -> None:
        """Use ``connect``."""
        self._engine = engine
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"inferway-{self.what.replace(' ', '-')}")
        self._running: set[_Work] = set()

    @classmethod
    async def connect(cls, url: str, timeout_s: float, prepare: Callable[[sa.Connection], None] | None = None) -> Self:
        """Connect, and bring the schema up to date.

        Several processes may do so at the same time. A role that may not change the schema is enough once it is there.

        Args:
            url: SQLAlchemy URL of a SQLite file (made with mode 0600 where it is missing) or of PostgreSQL.
            timeout_s: seconds after which a call gives up.
            prepare: done besides, in the same transaction.
        Raises:
            StateError: an unusable URL, file or schema.
            StoreUnavailableError: the database does not answer; ``__cause__`` has its own words.
        """
        address = _address(url)
        if address.get_backend_name() == "sqlite":
            await asyncio.to_thread(_prepare_file, Path(address.database or ""))

        def work(connection: sa.Connection) -> None:
            if connection.dialect.name == "postgresql":
                # Until the end of the transaction. SQLite has locked the whole file by now.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            _migrate(connection)
            if prepare is not None:
                prepare(connection)

        # With more patience: another process may be changing the schema.
        opening = cls(_engine(address, _OPEN_TIMEOUT_S), _OPEN_TIMEOUT_S)
        try:
            await opening._call(work, write=True)
        finally:
            await opening.close()
        return cls(_engine(address, timeout_s), timeout_s)

    async def close(self) -> None:
        """End the work that still runs, and close every connection. Calls after it raise RuntimeError."""
        for job in list(self._running):
            job.end()
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._engine.dispose)

    async def _call(self, work: Callable[[sa.Connection], _T], *, write: bool = False) -> _T:
        """Run work on a thread, in one transaction.

        Being cancelled leaves the thread to finish, or to be ended when its time is up.

        Raises:
            StoreUnavailableError: for everything else that the database or the clock has against it.
            TakenError: something unique is there already.
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
            raise TakenError(f"expected a value of its own, got one that the {self.what} has already") from error
        except (TimeoutError, SQLAlchemyError) as error:
            _log.warning("the %s failed: %s", self.what, _words(error))
            words = f"expected an answer of the {self.what}, got none in time"
            raise StoreUnavailableError(words, retry_after_s=1.0) from error
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
                raise StateError(
                    "expected the path of a file in the SQLite URL: what it keeps must outlive the process"
                )
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
            f"the database has schema {present}, which this version does not know; was it made by a later one?"
        ) from error


def cause_in_words(error: StoreUnavailableError) -> str:
    """What the database or the clock had against it, for the operator. Holds no password: drivers never repeat one."""
    return _words(error.__cause__) if error.__cause__ is not None else error.message


def _words(error: BaseException) -> str:
    reason = error.orig if isinstance(error, DBAPIError) else error
    # The client of object stores appends pages of debugging output.
    words = str(reason).partition("\n\nDebug source")[0].strip()
    return f"{type(reason).__name__}: {words or 'no answer in time'}"
