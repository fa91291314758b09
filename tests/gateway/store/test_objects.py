"""Contents in an object store, against a real S3 server in a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import stat
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import ObjectStore

from inferway_gateway.core.catalog import AliasSpec, FileRef, VersionSpec
from inferway_gateway.core.errors import BlobNotFoundError, StoreUnavailableError
from inferway_gateway.store.blobs import Collected, StorageLimits
from inferway_gateway.store.catalog import SqlCatalog, open_catalog
from inferway_gateway.store.objects import open_object_store
from inferway_gateway.store.sql import cause_in_words
from inferway_gateway.store.state import StateError
from inferway_gateway.store.storage import Storage, open_storage

KEY = "a1B2c3D4e5F6"
CONTENT = random.Random(1).randbytes(20_000_003)
"""Three parts."""
DIGEST = hashlib.sha256(CONTENT).hexdigest()
BUCKETS = count(1)


class Place:
    """A gateway's state directory, with what is open on it."""

    def __init__(self, root: Path, catalog: SqlCatalog, storage: Storage, bucket: str) -> None:
        self.root = root
        self.catalog = catalog
        self.storage = storage
        self.blobs = storage.blobs
        self.objects: ObjectStore = open_object_store(bucket)

    def cached(self) -> list[Path]:
        return sorted(path for path in (self.root / "cache").rglob("*") if path.is_file())

    def stored(self) -> dict[str, int]:
        return {item["path"]: item["size"] for page in obstore.list(self.objects) for item in page}

    async def put(self, content: bytes, by: str = KEY) -> str:
        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(content), 65_536):
                yield content[start : start + 65_536]

        digest = hashlib.sha256(content).hexdigest()
        assert (await self.blobs.put_stream(digest, pieces(), by=by)).complete
        return digest


@asynccontextmanager
async def opened(root: Path, bucket: str, *, database: Path | None = None, **options: Any) -> AsyncIterator[Place]:
    url = f"sqlite:///{database or root}/inferway.db"
    async with (
        open_catalog(database_url=url, timeout_s=20) as catalog,
        open_storage(state_dir=root, catalog=catalog, limits=StorageLimits(), blob_store=bucket, **options) as storage,
    ):
        yield Place(root, catalog, storage, bucket)


async def test_a_content_is_one_object_and_a_file_here(tmp_path: Path, bucket: str) -> None:
    async with opened(tmp_path / "a", bucket) as place:
        await place.put(CONTENT)
        [(key, size)] = place.stored().items()
        assert key.startswith(f"sha256/{DIGEST[:2]}/{DIGEST}-")
        assert size == len(CONTENT)
        path = await place.blobs.open_local(DIGEST)
        assert path.read_bytes() == CONTENT
        assert stat.S_IMODE(path.stat().st_mode) == 0o400
        assert list((place.root / "uploads").iterdir()) == []
        assert await place.storage.check() == []


async def test_gateways_share_contents_and_lay_versions_out_from_them(tmp_path: Path, bucket: str) -> None:
    async with (
        opened(tmp_path / "a", bucket) as one,
        opened(tmp_path / "b", bucket, database=tmp_path / "a") as two,
    ):
        await one.put(CONTENT)
        spec = VersionSpec("m", "onnx", (FileRef("w/model.onnx", DIGEST, len(CONTENT)),))
        running = await one.catalog.begin_deployment(spec, digest="0" * 64, isolation="worker", by=KEY, owner="g")
        version = await one.catalog.commit_deployment(running.id, None, AliasSpec({1: 100.0}))
        directories = await asyncio.gather(*(two.storage.versions.materialise(version) for _ in range(4)))
        assert (directories[0] / "w/model.onnx").read_bytes() == CONTENT
        [cached] = two.cached()
        assert cached.stat().st_ino == (directories[0] / "w/model.onnx").stat().st_ino
        assert await two.storage.check() == []


async def test_two_uploads_of_one_content_are_one_object(tmp_path: Path, bucket: str) -> None:
    async with opened(tmp_path / "a", bucket) as place:
        await asyncio.gather(*(place.put(CONTENT[:100_000], by=f"key{number}") for number in range(4)))
        assert len(place.stored()) == 1


async def test_what_nothing_names_is_removed_there_too(tmp_path: Path, bucket: str) -> None:
    async with opened(tmp_path / "a", bucket) as place:
        digest = await place.put(b"gone!")
        obstore.put(place.objects, f"sha256/00/{'0' * 64}-abcd", b"an interrupted upload")
        obstore.put(place.objects, "something-else", b"of somebody else")
        assert await place.blobs.collect(0) == Collected(blobs=1, blob_bytes=5), "the orphan is too young"
        assert place.stored() == {f"sha256/00/{'0' * 64}-abcd": 21, "something-else": 16}
        with pytest.raises(BlobNotFoundError):
            await place.blobs.open_local(digest)
        assert await place.put(b"gone!") == digest
        assert (await place.blobs.open_local(digest)).read_bytes() == b"gone!"


async def test_what_is_damaged_there_is_never_used(tmp_path: Path, bucket: str) -> None:
    async with opened(tmp_path / "a", bucket) as place:
        digest, lost = await place.put(b"content"), await place.put(b"lost")
        for key in place.stored():
            if digest in key:
                obstore.put(place.objects, key, b"CONTENT")
            else:
                obstore.delete(place.objects, key)
        for path in place.cached():
            path.unlink()
        for wanted in (digest, lost):
            with pytest.raises(BlobNotFoundError):
                await place.blobs.open_local(wanted)
        assert place.cached() == []
        found = {problem.subject: problem.kind for problem in await place.storage.check()}
        assert found == {digest: "damaged", lost: "missing"}


async def test_the_cache_keeps_to_its_size(tmp_path: Path, bucket: str) -> None:
    async with opened(tmp_path / "a", bucket, cache_bytes=250_000) as place:
        digests = [await place.put(random.Random(number).randbytes(100_000)) for number in range(4)]
        spec = VersionSpec("m", "onnx", (FileRef("model.onnx", digests[0], 100_000),))
        running = await place.catalog.begin_deployment(spec, digest="0" * 64, isolation="worker", by=KEY, owner="g")
        await place.storage.versions.materialise(await place.catalog.commit_deployment(running.id, None, None))
        await place.blobs.collect()
        assert len(place.cached()) == 4, "all were used just now"
        for age, digest in enumerate(reversed(digests)):
            [path] = place.root.glob(f"cache/sha256/*/{digest}")
            os.utime(path, (time.time() - 1000 - age,) * 2)
        await place.blobs.collect()
        kept = [path.name for path in place.cached()]
        assert sorted(kept) == sorted([digests[0], digests[3]]), "what is in use, and what was used last"
        assert (await place.blobs.open_local(digests[1])).stat().st_size == 100_000


async def test_a_store_that_does_not_answer_is_said_so_and_what_came_stays(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "a", bucket) as place:
        real = obstore.put_async

        async def fails(*_: Any, **__: Any) -> None:
            raise obstore.exceptions.GenericError("no")

        monkeypatch.setattr(obstore, "put_async", fails)
        with pytest.raises(StoreUnavailableError, match="the gateway's log says why"):
            await place.put(b"content")
        digest = hashlib.sha256(b"content").hexdigest()
        state = await place.blobs.partial(digest, KEY)
        assert state is not None
        assert state.received == 7
        monkeypatch.setattr(obstore, "put_async", real)

        async def nothing() -> AsyncIterator[bytes]:
            for _ in ():
                yield b""

        done = await place.blobs.put_stream(digest, nothing(), by=KEY, offset=7, total=7, length=0)
        assert done.complete


async def test_a_bucket_that_is_not_there_is_named_in_the_log_and_to_nobody_else(
    tmp_path: Path, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "a", "s3://not-made-yet/models") as place:
        with pytest.raises(StoreUnavailableError) as refused:
            await place.put(b"content")
    assert "not-made-yet" not in refused.value.message
    assert re.search("does not do what it is asked: .*not-made-yet", caplog.text, re.DOTALL)
    assert "Debug source" not in caplog.text
    assert "Debug source" not in cause_in_words(refused.value)


@pytest.mark.parametrize("url", ["", "bucket", "ftp://x/y"])
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(StateError, match="blob_store"):
        open_object_store(url)


async def test_the_library_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "inferway_gateway.store.objects", raising=False)
    with pytest.raises(StateError, match=r"inferway\[gateway,s3\]"):
        async with opened(tmp_path / "a", "s3://bucket"):
            pass
