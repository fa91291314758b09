"""Contents by digest: uploads, what is kept, and what goes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from inferway_gateway.core.catalog import BlobRecord, FileRef, VersionSpec
from inferway_gateway.core.errors import (
    BlobNotFoundError,
    CancelledByCallerError,
    DigestMismatchError,
    InsufficientStorageError,
    MalformedRequestError,
    PayloadTooLargeError,
    QuotaExceededError,
    StoreUnavailableError,
    UploadConflictError,
)
from inferway_gateway.store.blobs import BlobStore, Collected, StorageLimits
from inferway_gateway.store.catalog import SqlCatalog, open_catalog
from inferway_gateway.store.storage import Storage, open_storage

KEY = "a1B2c3D4e5F6"
CONTENT = random.Random(1).randbytes(1_000_003)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Place:
    """A state directory with what is open on it."""

    def __init__(self, root: Path, catalog: SqlCatalog, storage: Storage) -> None:
        self.root = root
        self.catalog = catalog
        self.storage = storage
        self.blobs: BlobStore = storage.blobs

    def files(self, below: str) -> list[Path]:
        return sorted(path for path in (self.root / below).rglob("*") if path.is_file())

    async def put(self, content: bytes, by: str = KEY, **options: Any) -> str:
        digest = hashlib.sha256(content).hexdigest()
        state = await self.blobs.put_stream(digest, pieces(content), by=by, **options)
        assert state.complete
        return digest


@asynccontextmanager
async def opened(root: Path, **limits: Any) -> AsyncIterator[Place]:
    async with (
        open_catalog(database_url=f"sqlite:///{root}/inferway.db", timeout_s=20) as catalog,
        open_storage(state_dir=root, catalog=catalog, limits=StorageLimits(**limits)) as storage,
    ):
        yield Place(root, catalog, storage)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
async def place(root: Path) -> AsyncIterator[Place]:
    async with opened(root) as place:
        yield place


async def pieces(content: bytes, size: int = 65_536, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]
    if then is not None:
        raise then


def gone() -> CancelledByCallerError:
    return CancelledByCallerError("gone")


class TestUploads:
    @pytest.mark.parametrize("size", [0, 1, 65_536, 262_144, 262_145, 1_000_003])
    @pytest.mark.parametrize("step", [1000, 65_536, 10_000_000])
    async def test_are_kept_as_they_came(self, place: Place, size: int, step: int) -> None:
        content = CONTENT[:size]
        digest = hashlib.sha256(content).hexdigest()
        state = await place.blobs.put_stream(digest, pieces(content, step), by=KEY)
        assert (state.size, state.received, state.complete) == (size, size, True)
        path = await place.blobs.open_local(digest)
        assert path.read_bytes() == content
        assert place.files("uploads") == []
        record = await place.catalog.blob(digest)
        assert record is not None
        assert (record.size, record.created_by) == (size, KEY)
        assert await place.catalog.has_shown(digest, KEY)

    async def test_are_nobody_elses_to_read(self, place: Place) -> None:
        await place.put(CONTENT)
        await place.blobs.put_stream("0" * 64, pieces(b"abc"), by=KEY, total=4)
        for path in place.root.rglob("*"):
            if path.name.startswith("inferway.db"):
                continue
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600 if path.suffix == ".part" else 0o400), path

    async def test_go_on_where_they_were_cut_off(self, root: Path) -> None:
        async with opened(root) as place:
            with pytest.raises(CancelledByCallerError):
                await place.blobs.put_stream(
                    DIGEST, pieces(CONTENT[:300_001], then=gone()), by=KEY, length=len(CONTENT)
                )
            state = await place.blobs.partial(DIGEST, KEY)
            assert state is not None
            assert (state.received, state.complete) == (300_001, False)
            assert await place.blobs.partial(DIGEST, "another") is None
        async with opened(root) as place:  # another process
            rest = CONTENT[300_001:]
            state = await place.blobs.put_stream(DIGEST, pieces(rest), by=KEY, offset=300_001, length=len(rest))
            assert state.complete
            assert (await place.blobs.open_local(DIGEST)).read_bytes() == CONTENT

    async def test_may_be_sent_in_parts(self, place: Place) -> None:
        for start in range(0, len(CONTENT), 400_000):
            part = CONTENT[start : start + 400_000]
            state = await place.blobs.put_stream(
                DIGEST, pieces(part), by=KEY, offset=start, total=len(CONTENT), length=len(part)
            )
            assert state.received == start + len(part)
            assert state.complete is (state.received == len(CONTENT))
        assert (await place.blobs.open_local(DIGEST)).read_bytes() == CONTENT

    @pytest.mark.parametrize("offset", [1, 99, 101, 1_000_000])
    async def test_go_on_nowhere_else(self, place: Place, offset: int) -> None:
        await place.blobs.put_stream(DIGEST, pieces(CONTENT[:100]), by=KEY, total=len(CONTENT))
        with pytest.raises(UploadConflictError, match="byte 100") as caught:
            await place.blobs.put_stream(DIGEST, pieces(CONTENT[offset:]), by=KEY, offset=offset, total=len(CONTENT))
        assert caught.value.received == 100

    async def test_begin_anew_at_byte_0(self, place: Place) -> None:
        await place.blobs.put_stream(DIGEST, pieces(b"x" * 500_000), by=KEY, total=len(CONTENT))
        assert await place.put(CONTENT) == DIGEST

    async def test_of_other_content_are_thrown_away(self, place: Place) -> None:
        wrong = hashlib.sha256(CONTENT[:-1] + b"x").hexdigest()
        with pytest.raises(DigestMismatchError, match=wrong):
            await place.blobs.put_stream(DIGEST, pieces(CONTENT[:-1] + b"x"), by=KEY)
        assert await place.blobs.partial(DIGEST, KEY) is None
        assert await place.catalog.blob(DIGEST) is None
        assert place.files("uploads") + place.files("blobs") == []
        with pytest.raises(BlobNotFoundError):
            await place.blobs.open_local(DIGEST)

    async def test_hold_to_what_they_said(self, place: Place) -> None:
        with pytest.raises(MalformedRequestError, match="at most 10 bytes"):
            await place.blobs.put_stream(DIGEST, pieces(CONTENT), by=KEY, total=10)
        with pytest.raises(MalformedRequestError, match="10 bytes in all"):
            await place.blobs.put_stream(DIGEST, pieces(CONTENT), by=KEY, total=10, length=11)
        assert place.files("uploads") == []

    async def test_of_one_key_come_one_at_a_time(self, place: Place) -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield CONTENT[:300_000]
            begun.set()
            await go_on.wait()
            yield CONTENT[300_000:]

        async with asyncio.timeout(10):
            first = asyncio.ensure_future(place.blobs.put_stream(DIGEST, slow(), by=KEY))
            await begun.wait()
            with pytest.raises(UploadConflictError, match="under way"):
                await place.blobs.put_stream(DIGEST, pieces(CONTENT), by=KEY)
            assert await place.put(CONTENT, by="another") == DIGEST
            go_on.set()
            assert (await first).complete
        assert len(place.files("blobs")) == 1, "the copy that came too late is gone"
        assert (await place.blobs.open_local(DIGEST)).read_bytes() == CONTENT
        assert await place.catalog.has_shown(DIGEST, KEY)

    async def test_of_one_content_by_many_keys_are_stored_once(self, place: Place) -> None:
        async with asyncio.timeout(20):
            await asyncio.gather(*(place.put(CONTENT, by=f"key{number}") for number in range(8)))
        assert len(place.files("blobs")) == 1
        assert (await place.blobs.open_local(DIGEST)).read_bytes() == CONTENT
        assert await place.catalog.stored_bytes() == len(CONTENT)
        assert await place.storage.check() == []

    async def test_take_no_memory(self, place: Place) -> None:
        async def long() -> AsyncIterator[bytes]:
            piece = bytes(65_536)
            for _ in range(1024):
                yield piece

        digest = hashlib.sha256(bytes(64 * 1024 * 1024)).hexdigest()
        tracemalloc.start()
        try:
            await place.blobs.put_stream(digest, long(), by=KEY)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4 * 1024 * 1024

    @pytest.mark.parametrize("digest", ["", "ab", "A" * 64, "../" * 21 + "a", "0" * 63 + "\n", "0" * 65])
    async def test_have_no_say_in_where_they_are_kept(self, place: Place, digest: str) -> None:
        with pytest.raises(MalformedRequestError):
            await place.blobs.put_stream(digest, pieces(b""), by=KEY)
        with pytest.raises(MalformedRequestError):
            await place.blobs.partial(digest, KEY)

    async def test_survive_a_database_that_does_not_answer_for_a_while(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add = place.catalog.add_blob
        failures = [StoreUnavailableError("no"), StoreUnavailableError("no")]

        async def sometimes(*arguments: Any, **options: Any) -> BlobRecord:
            record = await add(*arguments, **options)  # it may have happened, and the answer be lost
            if failures:
                raise failures.pop()
            return record

        monkeypatch.setattr(place.catalog, "add_blob", sometimes)
        assert await place.put(CONTENT) == DIGEST
        assert (await place.blobs.open_local(DIGEST)).read_bytes() == CONTENT
        assert await place.storage.check() == []


class TestLimits:
    async def test_of_one_upload_hold_before_and_while_it_comes(self, root: Path) -> None:
        async with opened(root, upload_bytes=100_000) as place:
            untouched = pieces(b"", then=AssertionError("nothing is read"))
            with pytest.raises(PayloadTooLargeError, match="at most 100000 bytes, got 100001"):
                await place.blobs.put_stream(DIGEST, untouched, by=KEY, length=100_001)
            with pytest.raises(PayloadTooLargeError, match="got more"):
                await place.blobs.put_stream(DIGEST, pieces(CONTENT), by=KEY)
            assert place.files("uploads") == []
            await place.put(CONTENT[:100_000])

    async def test_of_a_key_and_of_all_hold(self, root: Path) -> None:
        async with opened(root, total_bytes=250, per_key_bytes=200) as place:
            await place.put(b"a" * 150)
            with pytest.raises(QuotaExceededError, match="for this key, it has 150"):
                await place.put(b"b" * 51, length=51)
            with pytest.raises(QuotaExceededError, match="for this key, it has 150"):
                await place.put(b"b" * 51)
            await place.put(b"a" * 150)  # what is there is no more
            with pytest.raises(QuotaExceededError, match="for this gateway, it has 150"):
                await place.put(b"c" * 101, by="another", length=101)
            await place.put(b"a" * 150, by="another")
            assert [len(path.read_bytes()) for path in place.files("blobs")] == [150]
            assert place.files("uploads") == []

    async def test_of_partial_uploads_hold(self, root: Path) -> None:
        async with opened(root, per_key_bytes=1000) as place:
            for number in range(64):
                digest = hashlib.sha256(str(number).encode()).hexdigest()
                await place.blobs.put_stream(digest, pieces(b"x" * 10), by=KEY, total=11)
            with pytest.raises(QuotaExceededError, match="64 uploads"):
                await place.put(b"one more")
            await place.blobs.put_stream(hashlib.sha256(b"0").hexdigest(), pieces(b"y"), by=KEY, total=11, offset=0)
            await place.put(b"one more", by="another")

    async def test_count_what_has_not_come_whole(self, root: Path) -> None:
        async with opened(root, per_key_bytes=1000) as place:
            await place.blobs.put_stream(DIGEST, pieces(b"x" * 900), by=KEY, total=1000)
            with pytest.raises(QuotaExceededError, match="it has 900"):
                await place.put(b"y" * 101, length=101)


class TestCollecting:
    async def test_takes_what_nothing_names(self, root: Path) -> None:
        async with opened(root) as place:
            kept, gone = await place.put(b"kept"), await place.put(b"gone!")
            spec = VersionSpec("m", "onnx", (FileRef("model.onnx", kept, 4),))
            await place.catalog.begin_deployment(spec, digest="0" * 64, isolation="worker", by=KEY, owner="g")
            assert await place.blobs.collect() == Collected(), "both are too young"
            assert await place.blobs.collect(0) == Collected(blobs=1, blob_bytes=5)
            assert [path.name[:64] for path in place.files("blobs")] == [kept]
            assert await place.catalog.blob(gone) is None
            assert await place.put(b"gone!") == gone

    async def test_takes_files_without_a_row_once_they_are_old(self, place: Place) -> None:
        digest = await place.put(CONTENT)
        [path] = place.files("blobs")
        orphan = path.with_name(f"{digest}-0123abcd")
        orphan.write_bytes(b"half")
        [problem] = await place.storage.check()
        assert (problem.kind, problem.harmless) == ("orphan", True)
        assert (await place.blobs.collect()).orphans == 0
        old = time.time() - 7200
        os.utime(orphan, (old, old))
        assert await place.blobs.collect() == Collected(orphans=1, orphan_bytes=4)
        assert place.files("blobs") == [path]

    async def test_takes_uploads_that_nobody_goes_on_with(self, place: Place) -> None:
        other = hashlib.sha256(b"other").hexdigest()
        for digest in (DIGEST, other):
            await place.blobs.put_stream(digest, pieces(b"xyz"), by=KEY, total=5)
        old = time.time() - 25 * 3600
        os.utime(place.root / "uploads" / f"{DIGEST}-{KEY}.part", (old, old))
        assert await place.blobs.collect() == Collected(uploads=1, upload_bytes=3)
        assert [path.name[:64] for path in place.files("uploads")] == [other]

    async def test_leaves_an_upload_that_comes_slowly(self, place: Place) -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield CONTENT
            begun.set()
            await go_on.wait()

        async with asyncio.timeout(10):
            upload = asyncio.ensure_future(place.blobs.put_stream(DIGEST, slow(), by=KEY))
            await begun.wait()
            [part] = place.files("uploads")
            old = time.time() - 25 * 3600
            os.utime(part, (old, old))
            assert (await place.blobs.collect(0)).uploads == 0
            go_on.set()
            assert (await upload).complete

    async def test_and_uploading_at_once_lose_nothing(self, root: Path) -> None:
        """Whatever way they come between each other, a row never lacks its content."""
        async with opened(root) as one, opened(root) as two, asyncio.timeout(60):

            async def upload(place: Place, by: str) -> None:
                for number in range(15):
                    await place.put(b"content %d" % (number % 3), by=by)

            async def collect(place: Place) -> None:
                for _ in range(15):
                    await place.blobs.collect(0)

            await asyncio.gather(upload(one, "a"), upload(two, "b"), collect(one), collect(two))
            problems = [problem for problem in await one.storage.check() if not problem.harmless]
            assert problems == []
            await one.blobs.collect(0)
            assert place_is_empty(one)


def place_is_empty(place: Place) -> bool:
    return place.files("blobs") + place.files("uploads") == []


class TestChecking:
    async def test_finds_what_is_missing_and_what_is_damaged(self, place: Place) -> None:
        lost, broken, good = await place.put(b"lost"), await place.put(b"broken"), await place.put(b"good")
        (await place.blobs.open_local(lost)).unlink()
        path = await place.blobs.open_local(broken)
        path.chmod(0o600)
        path.write_bytes(b"BROKEN")
        found = {problem.subject: problem for problem in await place.storage.check()}
        assert {digest: problem.kind for digest, problem in found.items()} == {lost: "missing", broken: "damaged"}
        assert all("deploy them again" in problem.words and not problem.harmless for problem in found.values())
        assert good not in found
        with pytest.raises(BlobNotFoundError, match="missing"):
            await place.blobs.open_local(lost)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; where none can be mounted, the test with a limit on files stands alone."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


async def test_a_full_disk_is_an_answer_and_leaves_nothing_behind(tmp_path: Path, small_disk: Path) -> None:
    content = random.Random(2).randbytes(20 * 1024 * 1024)
    digest = hashlib.sha256(content).hexdigest()
    async with (
        open_catalog(database_url=f"sqlite:///{tmp_path}/inferway.db") as catalog,
        open_storage(state_dir=small_disk / "state", catalog=catalog, limits=StorageLimits()) as storage,
    ):
        place = Place(small_disk / "state", catalog, storage)
        untouched = pieces(b"", then=AssertionError("nothing is read"))
        with pytest.raises(InsufficientStorageError):
            await place.blobs.put_stream(digest, untouched, by=KEY, length=len(content))
        for _ in range(3):
            with pytest.raises(InsufficientStorageError, match="make room"):
                await place.blobs.put_stream(digest, pieces(content), by=KEY)
            assert place_is_empty(place)
        assert await place.put(CONTENT) == DIGEST
        assert (await place.blobs.open_local(DIGEST)).read_bytes() == CONTENT


LIMITED: str = """
import asyncio, hashlib, resource, sys
from pathlib import Path
from inferway_gateway.core.errors import InsufficientStorageError
from inferway_gateway.store.blobs import StorageLimits
from inferway_gateway.store.catalog import open_catalog
from inferway_gateway.store.storage import open_storage

async def pieces(size):
    for _ in range(size // 65536):
        yield bytes(65536)

async def main(root):
    async with (
        open_catalog(database_url=f"sqlite:///{root}/inferway.db") as catalog,
        open_storage(state_dir=root, catalog=catalog, limits=StorageLimits()) as storage,
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 2**20, 4 * 2**20))
        for size, fits in ((8 * 2**20, False), (2**20, True)):
            digest = hashlib.sha256(bytes(size)).hexdigest()
            try:
                await storage.blobs.put_stream(digest, pieces(size), by="key")
                assert fits
            except InsufficientStorageError:
                assert not fits
        assert [path for path in root.rglob("*.part")] == []

asyncio.run(main(Path(sys.argv[1])))
"""


def test_a_limit_on_files_is_like_a_full_disk(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "state")], check=True, timeout=60)


@pytest.mark.parametrize("step", ["fsync", "rename"])
async def test_a_disk_that_fails_at_the_end_stores_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    fail = True

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if fail:
                raise OSError(5, "Input/output error")
            return real(*arguments)

        return call

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", failing(os.fsync))
    else:
        monkeypatch.setattr(Path, "rename", failing(Path.rename))
    with pytest.raises(OSError, match="Input/output"):
        await place.put(CONTENT)
    assert place_is_empty(place)
    assert await place.catalog.blob(DIGEST) is None
    fail = False
    assert await place.put(CONTENT) == DIGEST


async def test_what_a_dead_process_had_sealed_is_gone_on_with(place: Place) -> None:
    await place.blobs.put_stream(DIGEST, pieces(CONTENT[:-1]), by=KEY, total=len(CONTENT))
    [part] = place.files("uploads")
    with part.open("ab") as file:
        file.write(CONTENT[-1:])
    part.chmod(0o400)
    state = await place.blobs.put_stream(DIGEST, pieces(b""), by=KEY, offset=len(CONTENT), total=len(CONTENT), length=0)
    assert state.complete
