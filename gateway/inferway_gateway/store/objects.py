"""Contents in an object store (S3 or one that speaks like it), through obstore, with a cache on this machine.

    STORE/sha256/AB/DIGEST-COPY       an object, written once
    STATE/cache/sha256/AB/DIGEST      the same content in a file, mode 0400, for as long as there is room

A model is opened from a file, so what is used has to be here. The cache keeps to its size by removing what was used
longest ago; a content that a version's directory links to takes no less room when its name in the cache goes, so it
stays. Everything that was fetched is held against its digest before it is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Final

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import ObjectStore, from_url

from ..core.catalog import BlobRecord
from ..core.errors import BlobNotFoundError, StoreUnavailableError
from .blobs import STORED_PATTERN, DiskThreads, Stored, make_directories
from .state import StateError, sync_directory

_log = logging.getLogger("inferway.store")

_PART: Final = 8 * 1024 * 1024
"""What is sent or fetched by one request, and so in memory."""
_PARTS: Final = 9_000
"""Parts of one object; S3 takes 10,000."""
_AT_ONCE: Final = 2
_REQUEST_TIMEOUT_S: Final = 60
_RETRY_TIMEOUT_S: Final = 120
_IN_USE_S: Final = 600.0
"""What was asked for so lately is not removed: somebody may be about to link to it."""


def open_object_store(url: str) -> ObjectStore:
    """The object store of a URL such as ``s3://bucket/prefix``; credentials, region and endpoint are in the usual
    variables of the environment (``AWS_ACCESS_KEY_ID`` and so on).

    Raises:
        StateError: not such a URL.
    """
    # Options given here replace all that the library would take from the environment, so this one is taken over.
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    try:
        return from_url(
            url,
            client_options={"timeout": timedelta(seconds=_REQUEST_TIMEOUT_S), "allow_http": allow_http},
            retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=_RETRY_TIMEOUT_S)},
        )
    except (BaseError, ValueError) as error:
        raise StateError(f"expected the setting blob_store to be a URL such as s3://bucket/prefix: {error}") from error


class ObjectDepot:
    """Contents in an object store."""

    def __init__(self, store: ObjectStore, cache: Path, cache_bytes: int, threads: DiskThreads) -> None:
        """
        Args:
            cache: its directory, which is there.
            cache_bytes: what it may take. It takes more while more is in use.
        """
        self._store = store
        self._cache = cache
        self._cache_bytes = cache_bytes
        self._threads = threads
        self._fetching: dict[str, asyncio.Lock] = {}

    async def keep(self, file: Path, digest: str, copy: str) -> None:
        size = await self._threads.run(lambda: file.stat().st_size)
        with _answering():
            await obstore.put_async(
                self._store,
                _key(digest, copy),
                file,
                chunk_size=max(_PART, size // _PARTS + 1),
                max_concurrency=_AT_ONCE,
            )
        path = self._path(digest)
        await self._threads.run(lambda: _move(file, path, self._cache))

    async def local(self, record: BlobRecord) -> Path:
        path = self._path(record.digest)
        async with self._alone(record.digest):
            if not await self._threads.run(lambda: _use(path, record.size)):
                await self._fetch(record, path)
                await self.tidy()
        return path

    async def remove(self, digest: str, copy: str) -> None:
        with suppress(BlobNotFoundError), _answering(digest):
            await obstore.delete_async(self._store, _key(digest, copy))

    async def stored(self) -> list[Stored]:
        found = []
        with _answering():
            async for page in obstore.list(self._store, "sha256/"):
                for item in page:
                    match = STORED_PATTERN.fullmatch(item["path"].rpartition("/")[2])
                    if match is not None:
                        found.append(Stored(match[1], match[2] or "", item["size"], item["last_modified"]))
        return sorted(found, key=lambda one: (one.digest, one.copy))

    async def digest_of(self, record: BlobRecord) -> tuple[str, int] | None:
        found = hashlib.sha256()
        size = 0
        try:
            async for part in self._parts(record):
                await self._threads.run(lambda part=part: found.update(part))  # type: ignore[misc]  # bound at once
                size += len(part)
        except BlobNotFoundError:
            return None
        return found.hexdigest(), size

    async def tidy(self) -> None:
        await self._threads.run(lambda: _evict(self._cache, self._cache_bytes))

    def _path(self, digest: str) -> Path:
        return self._cache / "sha256" / digest[:2] / digest

    @asynccontextmanager
    async def _alone(self, digest: str) -> AsyncIterator[None]:
        """Several who want one content fetch it once."""
        lock = self._fetching.setdefault(digest, asyncio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._fetching.pop(digest, None)

    async def _parts(self, record: BlobRecord) -> AsyncIterator[memoryview]:
        """The content as it is stored, whatever its size is. Raises BlobNotFoundError, StoreUnavailableError."""
        key = _key(record.digest, record.copy)
        with _answering(record.digest):
            size = (await obstore.head_async(self._store, key))["size"]
        for start in range(0, size, _PART):
            with _answering(record.digest):
                part = await obstore.get_range_async(self._store, key, start=start, end=min(start + _PART, size))
            yield memoryview(part)

    async def _fetch(self, record: BlobRecord, path: Path) -> None:
        temporary = self._cache / f".new-{secrets.token_hex(8)}"
        found = hashlib.sha256()
        descriptor = await self._threads.run(
            lambda: os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        )
        try:
            try:
                async for part in self._parts(record):
                    await self._threads.run(lambda part=part: _write(descriptor, part, found))  # type: ignore[misc]
                if found.hexdigest() != record.digest:
                    raise BlobNotFoundError(
                        f"expected the object store to have the content of blob {record.digest}, it has another; "
                        "'inferway registry check' lists all of these"
                    )
                await self._threads.run(lambda: _seal(descriptor))
            finally:
                os.close(descriptor)
            await self._threads.run(lambda: _move(temporary, path, self._cache))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _key(digest: str, copy: str) -> str:
    return f"sha256/{digest[:2]}/{digest}-{copy}" if copy else f"sha256/{digest[:2]}/{digest}"


@contextmanager
def _answering(digest: str = "") -> Iterator[None]:
    """Translate what the object store has against it."""
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        if digest and isinstance(error, NotFoundError | FileNotFoundError):
            raise BlobNotFoundError(f"expected the object store to have the content of blob {digest}") from error
        # Its address and the bucket's name are the operator's to know, so they are in the log and not in the answer.
        _log.warning("the object store does not do what it is asked: %s", reason_of(error))
        raise StoreUnavailableError(
            "expected the object store to do what it is asked, it does not; the gateway's log says why",
            retry_after_s=2.0,
        ) from error


def reason_of(error: BaseException) -> str:
    """What the object store's client says, without the debugging output that it appends."""
    return str(error).partition("\n\nDebug source")[0].strip() or type(error).__name__


def _move(file: Path, path: Path, root: Path) -> None:
    make_directories(path.parent, root)
    file.rename(path)
    sync_directory(path.parent)


def _use(path: Path, size: int) -> bool:
    """Whether the content is here; if so, it is as young as new."""
    try:
        if path.lstat().st_size != size:
            path.unlink()
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _write(descriptor: int, part: memoryview, found: hashlib._Hash) -> None:
    found.update(part)
    while part:
        part = part[os.write(descriptor, part) :]


def _seal(descriptor: int) -> None:
    os.fchmod(descriptor, 0o400)
    os.fsync(descriptor)


def _evict(cache: Path, limit: int) -> None:
    """Remove what was used longest ago and is linked to from nowhere else, until the rest is within the limit."""
    now = time.time()
    for path in cache.glob(".new-*"):
        with suppress(FileNotFoundError):
            if path.lstat().st_mtime < now - 24 * _IN_USE_S:
                path.unlink()
    found = []
    for path in cache.glob("sha256/*/*"):
        with suppress(FileNotFoundError):
            status = path.lstat()
            found.append((status.st_mtime, status.st_size, status.st_nlink, path))
    total = sum(size for _, size, _, _ in found)
    for used_at, size, links, path in sorted(found):
        if total <= limit or used_at > now - _IN_USE_S:
            break
        if links == 1:
            path.unlink(missing_ok=True)
            total -= size
