"""The store of keys, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from inferway_gateway.core.errors import ConflictError, KeyNotFoundError, StoreUnavailableError
from inferway_gateway.core.keys import ApiKey, Authenticator, KeyRecord, KeyService, Peppers
from inferway_gateway.store.database import KeyDatabase, open_keys
from inferway_gateway.store.state import StateError
from inferway_gateway.store.tables import METADATA

T = TypeVar("T")
NOW = datetime(2026, 11, 23, 12, 0, 0, 123456, tzinfo=UTC)
PEPPERS = Peppers({1: bytes(range(32))})
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)


def make(**changes: Any) -> KeyRecord:
    record = KeyRecord(
        id=ApiKey.generate("live").id,
        name="a caller",
        environment="live",
        scopes=frozenset({"infer", "read"}),
        models=("minilm*", "digits"),
        digest=os.urandom(32),
        pepper_version=1,
        created_at=NOW,
    )
    return dataclasses.replace(record, **changes)


@asynccontextmanager
async def opened(url: str, *, timeout_s: float = 10.0, peppers: Peppers = PEPPERS) -> AsyncIterator[KeyDatabase]:
    database = await KeyDatabase.open(url, peppers, timeout_s=timeout_s)
    try:
        yield database
    finally:
        await database.close()


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[KeyDatabase]:
    async with opened(database_url) as database:
        yield database


async def all_at_once(*work: Coroutine[Any, Any, T]) -> list[T | BaseException]:
    async with asyncio.timeout(30):
        return await asyncio.gather(*work, return_exceptions=True)


class TestRecords:
    async def test_come_back_as_they_went_in(self, store: KeyDatabase) -> None:
        record = make(
            name="Ωμέγα '; DROP TABLE inferway_keys; --",
            environment="test",
            created_by="0" * 12,
            expires_at=NOW + DAY,
            revoked_at=NOW + 2 * SECOND,
            rotated_at=NOW + SECOND,
            replaced_by="z" * 12,
            last_used_at=NOW + 3 * SECOND,
        )
        await store.insert(record)
        assert await store.fetch([record.id]) == {record.id: record}
        assert (await store.fetch([record.id]))[record.id].created_at.tzinfo is UTC

    async def test_of_any_time_zone_come_back_in_utc(self, store: KeyDatabase) -> None:
        record = make(created_at=NOW.astimezone(timezone(timedelta(hours=5, minutes=30))))
        await store.insert(record)
        assert (await store.fetch([record.id]))[record.id].created_at == NOW

    async def test_that_do_not_exist_are_left_out(self, store: KeyDatabase) -> None:
        records = [make() for _ in range(3)]
        for record in records:
            await store.insert(record)
        found = await store.fetch([record.id for record in records] + ["x" * 12, "' OR 1=1 --"])
        assert dict(found) == {record.id: record for record in records}
        assert await store.fetch([]) == {}

    async def test_of_one_id_cannot_be_two(self, store: KeyDatabase) -> None:
        record = make()
        await store.insert(record)
        with pytest.raises(ConflictError):
            await store.insert(make(id=record.id))
        assert (await store.fetch([record.id]))[record.id] == record

    async def test_outlive_the_process(self, database_url: str) -> None:
        record = make()
        async with opened(database_url) as first:
            await first.insert(record)
        async with opened(database_url) as second:
            assert await second.fetch([record.id]) == {record.id: record}


class TestPages:
    async def test_give_every_record_once_newest_first_while_others_are_made(self, store: KeyDatabase) -> None:
        # Several of the same moment, so that the id decides.
        records = [make(created_at=NOW + timedelta(seconds=i // 3)) for i in range(10)]
        for record in records:
            await store.insert(record)
        seen: list[KeyRecord] = []
        after = None
        while page := await store.page(3, after):
            assert len(page) <= 3
            seen += page
            after = (page[-1].created_at, page[-1].id)
            await store.insert(make(created_at=NOW + DAY))
        assert seen == sorted(records, key=lambda record: (record.created_at, record.id), reverse=True)


class TestRetryTokens:
    async def test_make_one_key_in_24_hours(self, store: KeyDatabase) -> None:
        token, first = os.urandom(32), make()
        await store.insert(first, retry_token=token)
        again = make(created_at=NOW + DAY - SECOND)
        with pytest.raises(ConflictError, match=first.id):
            await store.insert(again, retry_token=token)
        assert await store.fetch([again.id]) == {}
        late = make(created_at=NOW + DAY)
        await store.insert(late, retry_token=token)
        with pytest.raises(ConflictError, match=late.id):
            await store.insert(make(created_at=NOW + DAY), retry_token=token)

    async def test_of_others_do_not_matter(self, store: KeyDatabase) -> None:
        await store.insert(make(), retry_token=os.urandom(32))
        await store.insert(make(), retry_token=os.urandom(32))
        await store.insert(make())
        await store.insert(make())

    async def test_of_requests_at_the_same_time_make_one_key(self, store: KeyDatabase) -> None:
        token = os.urandom(32)
        results = await all_at_once(*(store.insert(make(), retry_token=token) for _ in range(8)))
        assert results.count(None) == 1
        (made,) = await store.page(10, None)
        conflicts = [result for result in results if isinstance(result, ConflictError)]
        assert len(conflicts) == 7
        assert all(made.id in conflict.message for conflict in conflicts)


class TestRevoking:
    async def test_sets_the_moment_once(self, store: KeyDatabase) -> None:
        record = make()
        await store.insert(record)
        assert await store.revoke(record.id, NOW + SECOND) == dataclasses.replace(record, revoked_at=NOW + SECOND)
        assert (await store.revoke(record.id, NOW + DAY)).revoked_at == NOW + SECOND

    async def test_an_unknown_key_says_so(self, store: KeyDatabase) -> None:
        with pytest.raises(KeyNotFoundError):
            await store.revoke("x" * 12, NOW)


class TestRotating:
    async def test_adds_the_successor_and_ends_the_old_one(self, store: KeyDatabase) -> None:
        old, new = make(), make(created_at=NOW + SECOND)
        await store.insert(old)
        changed = await store.rotate(old.id, new, NOW + DAY)
        assert changed == dataclasses.replace(old, expires_at=NOW + DAY, rotated_at=NOW + SECOND, replaced_by=new.id)
        assert await store.fetch([old.id, new.id]) == {old.id: changed, new.id: new}

    async def test_never_lengthens_a_life(self, store: KeyDatabase) -> None:
        old = make(expires_at=NOW + timedelta(hours=1))
        await store.insert(old)
        changed = await store.rotate(old.id, make(), NOW + DAY)
        assert changed.expires_at == old.expires_at

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"revoked_at": NOW - SECOND}, "revoked"),
            ({"expires_at": NOW}, "expired"),
            ({"rotated_at": NOW - SECOND, "replaced_by": "s" * 12}, "s" * 12),
        ],
    )
    async def test_a_key_that_is_done_is_refused(self, store: KeyDatabase, changes: dict[str, Any], words: str) -> None:
        old, new = make(**changes), make()
        await store.insert(old)
        with pytest.raises(ConflictError, match=words):
            await store.rotate(old.id, new, NOW + DAY)
        assert await store.fetch([old.id, new.id]) == {old.id: old}

    async def test_an_unknown_key_says_so_and_adds_nothing(self, store: KeyDatabase) -> None:
        new = make()
        with pytest.raises(KeyNotFoundError):
            await store.rotate("x" * 12, new, NOW + DAY)
        assert await store.fetch([new.id]) == {}

    async def test_is_all_or_nothing(self, store: KeyDatabase) -> None:
        old, other = make(), make()
        await store.insert(old)
        await store.insert(other)
        with pytest.raises(ConflictError):
            await store.rotate(old.id, make(id=other.id), NOW + DAY)
        assert await store.fetch([old.id, other.id]) == {old.id: old, other.id: other}

    async def test_one_key_many_times_at_once_succeeds_once(self, store: KeyDatabase) -> None:
        old = make()
        await store.insert(old)
        results = await all_at_once(*(store.rotate(old.id, make(), NOW + DAY) for _ in range(8)))
        (done,) = [result for result in results if isinstance(result, KeyRecord)]
        assert sum(isinstance(result, ConflictError) for result in results) == 7
        assert sorted(record.id for record in await store.page(10, None)) == sorted([old.id, str(done.replaced_by)])


class TestTouching:
    async def test_stores_the_latest_moment_of_known_keys(self, store: KeyDatabase) -> None:
        a, b, c = make(), make(last_used_at=NOW + DAY), make(last_used_at=NOW)
        for record in (a, b, c):
            await store.insert(record)
        await store.touch(dict.fromkeys((a.id, b.id, c.id, "x" * 12), NOW + SECOND))
        found = await store.fetch([a.id, b.id, c.id])
        assert [found[record.id].last_used_at for record in (a, b, c)] == [NOW + SECOND, NOW + DAY, NOW + SECOND]

    async def test_nothing_asks_nothing(self, store: KeyDatabase) -> None:
        await store.close()  # a call would fail from here on
        await store.touch({})


class TestUsable:
    @pytest.mark.parametrize(
        ("changes", "usable"),
        [
            ({}, True),
            ({"expires_at": NOW + SECOND}, True),
            ({"expires_at": NOW}, False),
            ({"revoked_at": NOW}, False),
            ({"rotated_at": NOW, "replaced_by": "s" * 12, "expires_at": NOW + SECOND}, True),
        ],
    )
    async def test_is_a_key_that_is_neither_revoked_nor_expired(
        self, store: KeyDatabase, changes: dict[str, Any], usable: bool
    ) -> None:
        assert not await store.any_usable(NOW)
        await store.insert(make(**changes))
        assert await store.any_usable(NOW) is usable


class TestSchema:
    async def test_of_the_migrations_is_that_of_the_tables(self, database_url: str, store: KeyDatabase) -> None:
        engine = sa.create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"version_table": "inferway_version", "compare_type": True}
            )
            assert compare_metadata(context, METADATA) == []
        engine.dispose()

    async def test_of_a_later_version_is_refused(self, database_url: str, store: KeyDatabase) -> None:
        engine = sa.create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE inferway_version SET version_num = '9999'"))
        engine.dispose()
        with pytest.raises(StateError, match="9999"):
            await KeyDatabase.open(database_url, PEPPERS)

    def test_is_made_once_when_processes_start_together(self, database_url: str, tmp_path: Path) -> None:
        state = tmp_path / "state"
        script = (
            "import asyncio, sys\n"
            "from pathlib import Path\n"
            "from inferway_gateway.store.database import open_keys\n"
            "async def main():\n"
            "    print('ready', flush=True)\n"
            "    sys.stdin.readline()\n"
            "    async with open_keys(database_url=sys.argv[1], state_dir=Path(sys.argv[2])) as keys:\n"
            "        new = await keys.service.create(name='racer', scopes=['infer'])\n"
            "        print(new.key.reveal(), flush=True)\n"
            "asyncio.run(main())\n"
        )
        command = [sys.executable, "-W", "error", "-c", script, database_url, str(state)]
        racers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        outcomes = [racer.communicate(timeout=60) for racer in racers]
        assert [(racer.returncode, errors) for racer, (_, errors) in zip(racers, outcomes, strict=True)] == [
            (0, "")
        ] * 4

        # One schema, and one pepper: every racer's key is good for whoever comes later.
        async def authenticate_all() -> list[str]:
            async with open_keys(database_url=database_url, state_dir=state) as keys:
                return [(await keys.authenticator.authenticate(output.strip())).name for output, _ in outcomes]

        assert asyncio.run(authenticate_all()) == ["racer"] * 4

    @pytest.mark.postgres
    async def test_needs_no_right_to_change_it_once_it_is_there(self, postgres: Any) -> None:
        url = postgres.new_schema()
        async with opened(url) as owner:
            await owner.insert(make())
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.execute(sa.text("DROP ROLE IF EXISTS clerk"))
            connection.execute(sa.text("CREATE ROLE clerk LOGIN"))
            schema = connection.scalar(sa.text("SELECT current_schema()"))
            connection.execute(sa.text(f"GRANT USAGE ON SCHEMA {schema} TO clerk"))
            connection.execute(sa.text(f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA {schema} TO clerk"))
        engine.dispose()
        async with opened(url.replace("inferway@", "clerk@")) as clerk:
            await clerk.insert(make())
            assert len(await clerk.page(10, None)) == 2
        with sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool).begin() as done:
            done.execute(sa.text("DROP OWNED BY clerk"))
            done.execute(sa.text("DROP ROLE clerk"))


class TestPeppers:
    async def test_other_than_those_of_the_stored_keys_are_refused(self, database_url: str, store: KeyDatabase) -> None:
        with pytest.raises(StateError, match="version 1 is not the one"):
            await KeyDatabase.open(database_url, Peppers({1: os.urandom(32)}))

    async def test_may_be_added_and_are_remembered(self, database_url: str, store: KeyDatabase) -> None:
        async with opened(database_url, peppers=Peppers({1: bytes(range(32)), 2: bytes(range(1, 33))})):
            pass
        async with opened(database_url, peppers=Peppers({2: bytes(range(1, 33))})):
            pass
        with pytest.raises(StateError, match="version 2 is not the one"):
            await KeyDatabase.open(database_url, Peppers({2: bytes(range(2, 34))}))


def silent(database: KeyDatabase) -> Callable[[], Any]:
    """Work that the database takes for ever over."""

    def work(connection: sa.Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_sleep(600)))
        else:
            endless = sa.select(sa.literal(1).label("n")).cte("endless", recursive=True)
            endless = endless.union_all(sa.select(endless.c.n + 1))
            connection.execute(sa.select(sa.func.count()).select_from(endless))

    return lambda: database._call(work)


class TestTrouble:
    async def test_work_that_takes_too_long_is_answered_and_ended(self, database_url: str) -> None:
        async with opened(database_url, timeout_s=0.5) as store:
            started = time.monotonic()
            # More than there are threads: none of them may stay taken.
            results = await all_at_once(*(silent(store)() for _ in range(8)))
            assert all(isinstance(result, StoreUnavailableError) for result in results)
            assert time.monotonic() - started < 5
            await asyncio.to_thread(_wait_for_idle, store)
            await store.insert(make())

    async def test_a_cancelled_caller_leaves_the_store_usable(self, database_url: str) -> None:
        async with opened(database_url, timeout_s=0.5) as store:
            waiting = [asyncio.ensure_future(silent(store)()) for _ in range(4)]
            await asyncio.wait(waiting, timeout=0.1)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            async with asyncio.timeout(30):
                while True:  # until the abandoned work has been ended, which its time limit does
                    try:
                        assert await store.page(1, None) == []
                        break
                    except StoreUnavailableError:
                        continue

    async def test_closing_ends_work_that_runs(self, database_url: str) -> None:
        store = await KeyDatabase.open(database_url, PEPPERS, timeout_s=600)
        waiting = [asyncio.ensure_future(silent(store)()) for _ in range(6)]
        await asyncio.wait(waiting, timeout=0.1)
        for task in waiting[:3]:
            task.cancel()
        async with asyncio.timeout(10):
            await store.close()
            results = await asyncio.gather(*waiting, return_exceptions=True)
        kinds = [type(result) for result in results]
        assert kinds == [asyncio.CancelledError] * 3 + [StoreUnavailableError] * 3
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("inferway-keys")]

    async def test_tells_neither_caller_nor_log_what_was_asked(
        self, database_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        record = make(name="canary-name", digest=b"canary-digest-0123456789abcdefgh")
        async with opened(database_url) as store:
            await store.insert(record)
            await store._call(
                lambda connection: connection.execute(sa.text("DROP TABLE inferway_keys")) and None, write=True
            )
            with pytest.raises(StoreUnavailableError) as caught:
                await store.insert(record)
        texts = [caplog.text, str(caught.value), repr(caught.value), str(caught.value.__cause__)]
        assert not any("canary" in text for text in texts)
        assert "the key database failed" in caplog.text
        assert caught.value.retry_after_s == 1.0

    @pytest.mark.parametrize(
        "url",
        [
            "nonsense with hunter2",
            "mysql://me:hunter2@localhost/db",
            "postgresql+asyncpg://me:hunter2@localhost/db",
            "sqlite://",
            "sqlite:///:memory:",
            "sqlite:///file:keys?uri=true",
        ],
    )
    async def test_an_unusable_url_is_refused_without_its_password(self, url: str) -> None:
        with pytest.raises(StateError) as caught:
            await KeyDatabase.open(url, PEPPERS)
        assert "hunter2" not in str(caught.value)
        assert caught.value.__cause__ is None

    async def test_a_missing_driver_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(StateError, match="pip install"):
            await KeyDatabase.open("postgresql://localhost/db", PEPPERS)

    async def test_no_server_is_an_outage(self) -> None:
        with pytest.raises(StoreUnavailableError) as caught:
            await KeyDatabase.open("postgresql://me:hunter2@127.0.0.1:1/db", PEPPERS)
        assert "hunter2" not in str(caught.value) + str(caught.value.__cause__)


class TestSqlite:
    async def test_files_are_private_whatever_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            async with opened(f"sqlite:///{tmp_path}/state/keys.db") as store:
                await store.insert(make())
                modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "state").iterdir()}
        finally:
            os.umask(before)
        assert modes == dict.fromkeys(("keys.db", "keys.db-wal", "keys.db-shm"), 0o600)
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700

    async def test_that_others_may_read_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "keys.db").touch(mode=0o644)
        with pytest.raises(StateError, match="readable by its owner only"):
            await KeyDatabase.open(f"sqlite:///{tmp_path}/keys.db", PEPPERS)

    async def test_that_is_a_directory_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StateError, match="cannot use the database file"):
            await KeyDatabase.open(f"sqlite:///{tmp_path}", PEPPERS)

    async def test_that_is_no_database_is_said(self, tmp_path: Path) -> None:
        file = tmp_path / "keys.db"
        file.touch(mode=0o600)
        file.write_bytes(b"this is no database, only some text that is long enough to be looked at" * 20)
        with pytest.raises(StoreUnavailableError) as caught:
            await KeyDatabase.open(f"sqlite:///{file}", PEPPERS)
        assert "not a database" in str(caught.value.__cause__)

    async def test_path_may_hold_any_character(self, tmp_path: Path) -> None:
        async with opened(f"sqlite:///{tmp_path}/50% of äll/keys.db") as store:
            await store.insert(make())

    async def test_is_durable_at_each_commit(self, tmp_path: Path) -> None:
        async with opened(f"sqlite:///{tmp_path}/keys.db") as store:
            pragmas = await store._call(
                lambda c: (c.scalar(sa.text("PRAGMA journal_mode")), c.scalar(sa.text("PRAGMA synchronous")))
            )
        assert pragmas == ("wal", 2)

    async def test_that_another_process_is_making_is_waited_for(self, tmp_path: Path) -> None:
        (tmp_path / "keys.db").touch(mode=0o600)
        other = sqlite3.connect(tmp_path / "keys.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        opening = asyncio.ensure_future(KeyDatabase.open(f"sqlite:///{tmp_path}/keys.db", PEPPERS))
        await asyncio.wait([opening], timeout=0.3)
        assert not opening.done()
        other.execute("ROLLBACK")
        other.close()
        async with asyncio.timeout(30):
            store = await opening
        assert await store.page(1, None) == []
        await store.close()

    async def test_that_another_process_writes_to_refuses_writes_in_time_and_reads_on(self, tmp_path: Path) -> None:
        record = make()
        async with opened(f"sqlite:///{tmp_path}/keys.db", timeout_s=0.5) as store:
            await store.insert(record)
            other = sqlite3.connect(tmp_path / "keys.db", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            started = time.monotonic()
            with pytest.raises(StoreUnavailableError):
                await store.revoke(record.id, NOW)
            assert time.monotonic() - started < 2
            assert await store.fetch([record.id]) == {record.id: record}
            other.execute("ROLLBACK")
            other.close()
            assert (await store.revoke(record.id, NOW)).revoked_at == NOW

    async def test_that_another_process_has_to_itself_is_an_outage_until_it_is_free(self, tmp_path: Path) -> None:
        async with opened(f"sqlite:///{tmp_path}/keys.db", timeout_s=0.5) as store:
            other = sqlite3.connect(tmp_path / "keys.db", isolation_level=None)
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(StoreUnavailableError):
                await store.page(1, None)
            other.execute("ROLLBACK")
            other.close()
            assert await store.page(1, None) == []


@pytest.mark.postgres
class TestPostgres:
    async def test_restart_is_not_noticed(self, postgres: Any) -> None:
        record = make()
        async with opened(postgres.new_schema()) as store:
            await store.insert(record)
            await asyncio.gather(*(store.page(1, None) for _ in range(4)))  # several connections
            await asyncio.to_thread(postgres.control, "restart", "-m", "fast")
            assert await store.fetch([record.id]) == {record.id: record}
            assert (await store.revoke(record.id, NOW)).revoked_at == NOW

    async def test_that_hangs_is_an_outage_in_time_holds_no_thread_and_recovers(self, postgres: Any) -> None:
        async with opened(postgres.new_schema(), timeout_s=0.5) as store:
            await asyncio.gather(*(store.page(1, None) for _ in range(4)))
            postgres.stop()
            try:
                started = time.monotonic()
                results = await all_at_once(*(store.page(1, None) for _ in range(4)))
                assert all(isinstance(result, StoreUnavailableError) for result in results)
                assert time.monotonic() - started < 2
                # The connections were ended from this side, so the threads come back while the server still hangs.
                await asyncio.to_thread(_wait_for_idle, store)
            finally:
                postgres.resume()
            started = time.monotonic()
            async with asyncio.timeout(10):
                while True:
                    try:
                        assert await store.page(1, None) == []
                        break
                    except StoreUnavailableError:
                        continue
            assert time.monotonic() - started < 2

    async def test_that_hangs_does_not_hold_up_the_end(self, postgres: Any) -> None:
        store = await KeyDatabase.open(postgres.new_schema(), PEPPERS, timeout_s=0.5)
        await store.page(1, None)
        postgres.stop()
        try:
            with pytest.raises(StoreUnavailableError):
                await store.page(1, None)
            async with asyncio.timeout(5):
                await store.close()
        finally:
            postgres.resume()

    async def test_holds_hashes_and_no_key(self, postgres: Any, tmp_path: Path) -> None:
        url = postgres.new_schema()
        async with open_keys(database_url=url, state_dir=tmp_path) as keys:
            new = await keys.service.create(name="a", scopes=["infer"])
            text = new.key.reveal()
            rows = await keys.database._call(
                lambda c: [tuple(r) for r in c.execute(sa.text("SELECT * FROM inferway_keys"))]
            )
        assert new.record.id in repr(rows)
        assert text[-49:] not in repr(rows)


def _wait_for_idle(store: KeyDatabase) -> None:
    """Until every thread of the store takes work again; fails after some seconds."""
    barrier = threading.Barrier(5)
    for _ in range(4):
        store._threads.submit(barrier.wait, 5)
    barrier.wait(5)


class TestOpenKeys:
    async def test_gives_what_works_together_and_closes_it(self, database_url: str, tmp_path: Path) -> None:
        async with open_keys(database_url=database_url, state_dir=tmp_path / "state") as (
            database,
            service,
            authenticator,
        ):
            assert isinstance(service, KeyService)
            assert isinstance(authenticator, Authenticator)
            new = await service.create(name="a", scopes=["infer"])
            principal = await authenticator.authenticate(new.key.reveal())
            assert principal.key_id == new.record.id
        # What was not written yet is written at the end.
        async with opened(database_url, peppers=_peppers(tmp_path / "state")) as later:
            assert (await later.fetch([new.record.id]))[new.record.id].last_used_at is not None
        with pytest.raises(RuntimeError):
            await database.page(1, None)

    async def test_revoking_in_one_process_is_seen_in_another(self, database_url: str, tmp_path: Path) -> None:
        ours = {"database_url": database_url, "state_dir": tmp_path / "state"}
        script = (
            "import asyncio, json, sys\n"
            "from pathlib import Path\n"
            "from inferway_gateway.store.database import open_keys\n"
            "async def main():\n"
            "    async with open_keys(database_url=sys.argv[1], state_dir=Path(sys.argv[2])) as keys:\n"
            "        record = await keys.service.revoke(sys.argv[3])\n"
            "        print(json.dumps(record.revoked_at is not None))\n"
            "asyncio.run(main())\n"
        )
        async with open_keys(**ours, ttl_s=0.4) as keys:  # type: ignore[arg-type]  # one dict of both kinds
            new = await keys.service.create(name="a", scopes=["infer"])
            raw = new.key.reveal().encode()
            await keys.authenticator.authenticate(raw)
            other = await asyncio.create_subprocess_exec(
                sys.executable, "-c", script, database_url, str(tmp_path / "state"), new.record.id,
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            output, _ = await other.communicate()
            assert json.loads(output) is True
            revoked_by_now = time.monotonic()
            # A busy key: asked for all the time, so that only reading ahead can find out.
            while keys.authenticator.authenticate_cached(raw) is not None:
                assert time.monotonic() - revoked_by_now < 5
                await asyncio.sleep(0)


def _peppers(state: Path) -> Peppers:
    return Peppers.parse((state / "pepper").read_text())
