"""Contents by digest: how they come in, where they are kept, and when they go.

    STATE/uploads/DIGEST-KEY.part             what has come of an upload; the next attempt goes on there
    STATE/blobs/sha256/AB/DIGEST-COPY         a whole content, mode 0400

An upload is written and hashed 256 KiB at a time on threads of the store's own. When the last byte has come and the
hash is right, these happen in this order, each after the one before has lasted: the file's content (fsync), its final
name (rename), the directory that holds the name (fsync), the row in the catalog (commit). So a row never lacks its
content, at whatever point the process dies; what it can leave is a file without a row, which a sweep finds.

Removing goes the other way: the row first, then the file. Every stored file has a name of its own (COPY is random), and
is removed only by whoever deleted its row, by the upload that made it and came too late, or when it has had no row for
as long as ``orphan_s``. So a content that is collected and uploaded again at the same time, by whatever process, is
collected once and kept once, and nothing has to lock the one against the other.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar

from ..core.catalog import BlobRecord, Catalog, FileRef, VersionRecord
from ..core.errors import (
    BlobNotFoundError,
    DigestMismatchError,
    GatewayError,
    InsufficientStorageError,
    MalformedRequestError,
    PayloadTooLargeError,
    QuotaExceededError,
    StoreUnavailableError,
    UploadConflictError,
)
from .state import sync_directory

_log = logging.getLogger("inferway.store")
_T = TypeVar("_T")

DIGEST_PATTERN: Final = re.compile(r"[0-9a-f]{64}")
_BY_PATTERN: Final = re.compile(r"[0-9A-Za-z]{1,32}")
STORED_PATTERN: Final = re.compile(r"([0-9a-f]{64})(?:-([0-9a-f]{1,16}))?")
_THREADS: Final = 4
_PIECE: Final = 256 * 1024
"""What is collected before a thread writes and hashes it: a hop costs as much as hashing some 50 KiB."""
_READ: Final = 1024 * 1024
_PARTIALS_PER_KEY: Final = 64
_COMMIT_TRIES: Final = 5
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class StorageLimits:
    """What may be stored. Sizes are bytes; None: no limit.

    Attributes:
        upload_bytes: one content.
        total_bytes, per_key_bytes: all contents; those that one key has uploaded.
        partial_s: how long an upload that was cut off waits to be continued.
        grace_s: how long a content that no version names is kept, for a deployment that is about to begin.
        orphan_s: how long a file without a row is kept: an upload is about to give it one.
    """

    upload_bytes: int = 16 * 1024**3
    total_bytes: int | None = None
    per_key_bytes: int | None = None
    partial_s: float = 24 * 3600.0
    grace_s: float = 3600.0
    orphan_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class BlobState:
    """How much of a content is here.

    Attributes:
        size: in bytes; None while nobody has said it.
        received: how much of it has come.
    """

    digest: str
    size: int | None
    received: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Stored:
    """One stored content, as the depot lists it."""

    digest: str
    copy: str
    size: int
    modified: datetime


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed: contents that no version names, files without a row, uploads that nobody went on with.

    Sizes are bytes.
    """

    blobs: int = 0
    blob_bytes: int = 0
    orphans: int = 0
    orphan_bytes: int = 0
    uploads: int = 0
    upload_bytes: int = 0


ProblemKind = Literal["missing", "damaged", "unnamed", "version", "orphan"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a check found; ``words`` say what it is and what to do.

    Attributes:
        harmless: only room is lost.
    """

    kind: ProblemKind
    subject: str
    words: str
    harmless: bool = False


class Depot(Protocol):
    """Where whole contents are kept. Names are a digest and a copy id."""

    async def keep(self, file: Path, digest: str, copy: str) -> None:
        """Take a file, whole and on disk, under its final name, so that it lasts; the file may be moved away."""
        ...

    async def local(self, record: BlobRecord) -> Path:
        """A file of this machine with the content. Raises BlobNotFoundError."""
        ...

    async def remove(self, digest: str, copy: str) -> None:
        """Does nothing where it is gone already."""
        ...

    async def stored(self) -> list[Stored]: ...

    async def digest_of(self, record: BlobRecord) -> tuple[str, int] | None:
        """Digest and size of what is really there; None: nothing."""
        ...

    async def tidy(self) -> None:
        """Remove what is there for speed alone and has become too much."""
        ...


class DiskThreads:
    """The threads that wait for disks, so that nobody else does."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="inferway-blobs")

    async def run(self, work: Callable[[], _T]) -> _T:
        """Do it on a thread. Being cancelled waits for its end, for whoever is next finds what it did done.

        Raises:
            InsufficientStorageError: in place of the system's own words for no room.
        """
        future = self._pool.submit(work)
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await asyncio.wait([waiting])
            if not waiting.cancelled() and waiting.exception() is not None:
                _log.warning("work of a caller who has gone failed: %s", type(waiting.exception()).__name__)
            raise
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise no_room() from error
            raise

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.shutdown)


def no_room() -> InsufficientStorageError:
    return InsufficientStorageError(
        "expected room for this on the gateway's disk, there is none left; remove versions that are not needed, "
        "collect garbage, or have the operator make room"
    )


class DiskDepot:
    """Contents in files of this machine, or of a directory that several gateways share."""

    def __init__(self, root: Path, threads: DiskThreads) -> None:
        self._root = root
        self._threads = threads

    def path(self, digest: str, copy: str) -> Path:
        return self._root / "sha256" / digest[:2] / (f"{digest}-{copy}" if copy else digest)

    async def keep(self, file: Path, digest: str, copy: str) -> None:
        await self._threads.run(lambda: self._keep(file, self.path(digest, copy)))

    def _keep(self, file: Path, path: Path) -> None:
        make_directories(path.parent, self._root)
        file.rename(path)
        sync_directory(path.parent)

    async def local(self, record: BlobRecord) -> Path:
        path = self.path(record.digest, record.copy)
        if not await self._threads.run(path.is_file):
            raise BlobNotFoundError(f"expected the content of blob {record.digest} to be stored, its file is missing")
        return path

    async def remove(self, digest: str, copy: str) -> None:
        await self._threads.run(lambda: self.path(digest, copy).unlink(missing_ok=True))

    async def stored(self) -> list[Stored]:
        return await self._threads.run(lambda: list(self._stored()))

    def _stored(self) -> Iterator[Stored]:
        for path in sorted(self._root.glob("sha256/*/*")):
            match = STORED_PATTERN.fullmatch(path.name)
            if match is None:
                continue
            with suppress(FileNotFoundError):
                status = path.lstat()
                yield Stored(match[1], match[2] or "", status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    async def digest_of(self, record: BlobRecord) -> tuple[str, int] | None:
        path = self.path(record.digest, record.copy)
        return await self._threads.run(lambda: file_digest(path))

    async def tidy(self) -> None:
        pass  # it has nothing for speed alone


class BlobStore:
    """Contents by digest. Opened by ``open_storage``."""

    def __init__(
        self, uploads: Path, catalog: Catalog, depot: Depot, threads: DiskThreads, limits: StorageLimits
    ) -> None:
        self._uploads = uploads
        self._catalog = catalog
        self._depot = depot
        self._threads = threads
        self.limits = limits

    # --- uploads -----------------------------------------------------------------------------------------------------

    async def partial(self, digest: str, by: str) -> BlobState | None:
        """How much has come of an upload of that key that is not complete; None: nothing."""
        path = self._partial_path(digest, by)

        def size() -> int | None:
            try:
                return path.stat().st_size
            except FileNotFoundError:
                return None

        received = await self._threads.run(size)
        return None if received is None else BlobState(digest, None, received, False)

    async def put_stream(
        self,
        digest: str,
        content: AsyncIterable[bytes | memoryview],
        *,
        by: str,
        offset: int = 0,
        total: int | None = None,
        length: int | None = None,
    ) -> BlobState:
        """Take a content, or a part of it.

        What has come stays when the caller goes away in the middle, or sends less than ``total``, and the next call
        goes on from there.

        Args:
            content: its bytes in order; read only as fast as they are written.
            by: key id.
            offset: of the first byte; 0 begins anew.
            total: size of the whole content, where the caller says it.
            length: how much ``content`` will give, where that is known.
        Raises:
            MalformedRequestError: more came than ``total`` says.
            DigestMismatchError: all came, and it is another content; it is thrown away.
            UploadConflictError: ``offset`` is not where the earlier part ends, or the same key sends it elsewhere too;
                ``received`` says where it ends.
            PayloadTooLargeError, QuotaExceededError, InsufficientStorageError: before anything is read, where the sizes
                are known; what has come is thrown away.
            StoreUnavailableError
        """
        if not DIGEST_PATTERN.fullmatch(digest):
            raise MalformedRequestError("expected the digest of a content as 64 lower-case hexadecimal digits")
        if total is None and length is not None:
            total = offset + length
        if total is not None and length is not None and offset + length > total:
            raise MalformedRequestError(f"expected {total} bytes in all, got {length} from byte {offset} on")
        limit = self.limits.upload_bytes
        if total is not None and total > limit:
            raise PayloadTooLargeError(f"expected a content of at most {limit} bytes, got {total}")
        await self._check_room(digest, by, total or 0)
        path = self._partial_path(digest, by)
        async with self._locked(path) as descriptor:
            upload = _Upload(descriptor)
            await self._threads.run(lambda: upload.begin(offset))
            try:
                await self._receive(upload, content, limit if total is None else total, total is None)
                await self._threads.run(upload.flush)
            except (InsufficientStorageError, PayloadTooLargeError, MalformedRequestError):
                await self._threads.run(lambda: _unlink(path, descriptor))
                raise
            except BaseException:
                # The caller has gone: what came is worth keeping.
                with suppress(InsufficientStorageError, OSError):
                    await self._threads.run(upload.flush)
                raise
            if total is not None and upload.size < total:
                return BlobState(digest, total, upload.size, False)
            if upload.hexdigest() != digest:
                await self._threads.run(lambda: _unlink(path, descriptor))
                raise DigestMismatchError(
                    f"expected content with the SHA-256 digest {digest}, the {upload.size} bytes that came have "
                    f"{upload.hexdigest()}; send it again from the first byte"
                )
            await self._store(path, descriptor, upload, digest, by)
            return BlobState(digest, upload.size, upload.size, True)

    async def _receive(
        self, upload: _Upload, content: AsyncIterable[bytes | memoryview], limit: int, unsaid: bool
    ) -> None:
        """Write the pieces as they come, the next one coming in while the last one is written."""
        writing: asyncio.Task[None] | None = None
        try:
            async for piece in content:
                if upload.size + upload.waiting + len(piece) > limit:
                    words = f"expected a content of at most {limit} bytes, got more"
                    raise PayloadTooLargeError(words) if unsaid else MalformedRequestError(words)
                upload.add(piece)
                if upload.waiting >= _PIECE:
                    if writing is not None:
                        await writing
                    writing = asyncio.ensure_future(self._threads.run(upload.take()))
        finally:
            if writing is not None:
                await writing

    async def _store(self, path: Path, descriptor: int, upload: _Upload, digest: str, by: str) -> None:
        """From a whole content in its partial file to a row."""
        copy = secrets.token_hex(4)
        try:
            await self._threads.run(upload.seal)
            await self._depot.keep(path, digest, copy)
        except StoreUnavailableError:
            await self._discard(digest, copy)
            raise  # what came is whole and stays: going on from its end tries again
        except (GatewayError, OSError):
            # After an error of the disk nobody knows what of it lasts.
            await self._discard(digest, copy)
            await self._threads.run(lambda: _unlink(path, descriptor))
            raise
        record = await self._commit(digest, upload.size, copy, by)
        await self._threads.run(lambda: _unlink(path, descriptor))
        if record.copy != copy:
            await self._discard(digest, copy)  # it was here already

    async def _commit(self, digest: str, size: int, copy: str, by: str) -> BlobRecord:
        limits = self.limits
        tries = 0
        while True:
            tries += 1
            try:
                return await self._catalog.add_blob(
                    digest,
                    size,
                    by=by,
                    copy=copy,
                    limit_bytes=limits.total_bytes,
                    limit_per_key_bytes=limits.per_key_bytes,
                )
            except StoreUnavailableError:
                # It may have happened, so the file has to stay. Asking again is safe, and sending gigabytes again is
                # what it spares the caller.
                if tries == _COMMIT_TRIES:
                    raise
            except QuotaExceededError:
                await self._discard(digest, copy)
                raise

    async def _discard(self, digest: str, copy: str) -> None:
        """Remove a copy of our own that nothing names; what fails here, a sweep does later."""
        try:
            await self._depot.remove(digest, copy)
        except (GatewayError, OSError) as error:
            _log.warning("a spare copy of a blob could not be removed: %s", error)

    async def _check_room(self, digest: str, by: str, size: int) -> None:
        """Refuse what cannot be stored before it is sent. The last word is the catalog's."""
        limits = self.limits
        total, per_key = limits.total_bytes, limits.per_key_bytes
        waiting, count, free = await self._threads.run(lambda: self._waiting(digest, by))
        if count >= _PARTIALS_PER_KEY:
            raise QuotaExceededError(
                f"expected at most {_PARTIALS_PER_KEY} uploads of one key that are not complete, there are {count}; "
                "complete some, or wait until they are swept"
            )
        if size > free:
            raise no_room()
        if total is None and per_key is None:
            return
        known = await self._catalog.blob(digest) is not None
        shown = await self._catalog.has_shown(digest, by)
        for what, limit, counts, whose in (("gateway", total, not known, None), ("key", per_key, not shown, by)):
            if limit is None or not counts:
                continue
            stored = await self._catalog.stored_bytes(whose) + (waiting if whose is not None else 0)
            if stored + size > limit:
                raise QuotaExceededError(
                    f"expected at most {limit} bytes of files for this {what}, it has {stored}, this has {size}; "
                    "delete versions that are not needed"
                )

    def _waiting(self, digest: str, by: str) -> tuple[int, int, int]:
        """Bytes and number of the key's other partial uploads, and the bytes that the disk has room for."""
        size = count = mine = 0
        for path in self._uploads.glob(f"*-{by}.part"):
            with suppress(FileNotFoundError):
                bytes_here = path.stat().st_size
                if path.name.startswith(digest):
                    mine = bytes_here
                    continue
                size += bytes_here
                count += 1
        disk = os.statvfs(self._uploads)
        return size, count, disk.f_bavail * disk.f_frsize + mine

    def _partial_path(self, digest: str, by: str) -> Path:
        if not DIGEST_PATTERN.fullmatch(digest) or not _BY_PATTERN.fullmatch(by):
            raise MalformedRequestError("expected the digest of a content as 64 lower-case hexadecimal digits")
        return self._uploads / f"{digest}-{by}.part"

    @asynccontextmanager
    async def _locked(self, path: Path) -> AsyncIterator[int]:
        """Open a partial upload and have it to oneself, among all processes."""
        descriptor = await self._threads.run(lambda: _open_locked(path))
        if descriptor is None:
            received = await self.partial(path.name[:64], path.name[65:-5])
            raise UploadConflictError(
                "expected one upload of this content by this key at a time, another is under way; wait for it",
                0 if received is None else received.received,
            )
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def open_local(self, digest: str) -> Path:
        """A file of this machine with the content, never to be changed.

        Raises:
            BlobNotFoundError: it is not stored.
            StoreUnavailableError: the object store or the database does not answer.
        """
        record = await self._catalog.blob(digest)
        if record is None:
            raise BlobNotFoundError(f"expected blob {digest} to be stored, there is none")
        return await self._depot.local(record)

    # --- what goes ---------------------------------------------------------------------------------------------------

    async def collect(self, grace_s: float | None = None) -> Collected:
        """Remove what nothing names any more. Safe beside uploads, deployments and other gateways that do the same.

        Args:
            grace_s: in place of that of the limits.
        Raises:
            StoreUnavailableError
        """
        now = datetime.now(UTC)
        older = now - timedelta(seconds=self.limits.grace_s if grace_s is None else grace_s)
        lost_before = now - timedelta(seconds=self.limits.orphan_s)
        stored = await self._depot.stored()  # before the rows are read: what comes in between has a row by then
        old = await self._catalog.unreferenced_blobs(older)
        forgotten = await self._catalog.forget_blobs([record.digest for record in old], older) if old else []
        for record in forgotten:
            await self._depot.remove(record.digest, record.copy)
        gone = {(record.digest, record.copy) for record in forgotten}
        named = {(record.digest, record.copy) for record in await self._catalog.blobs()} | gone
        orphans = [one for one in stored if (one.digest, one.copy) not in named and one.modified < lost_before]
        for orphan in orphans:
            await self._depot.remove(orphan.digest, orphan.copy)
        uploads = await self.sweep_uploads()
        await self._depot.tidy()
        return Collected(
            blobs=len(forgotten),
            blob_bytes=sum(record.size for record in forgotten),
            orphans=len(orphans),
            orphan_bytes=sum(orphan.size for orphan in orphans),
            uploads=len(uploads),
            upload_bytes=sum(uploads),
        )

    async def sweep_uploads(self) -> list[int]:
        """Remove partial uploads that nobody has gone on with for ``partial_s``; returns their sizes in bytes."""
        older = datetime.now(UTC).timestamp() - self.limits.partial_s
        return await self._threads.run(lambda: list(_sweep(self._uploads, older)))

    async def check(self) -> list[Problem]:
        """Compare every row with its content, which reads all of it, and look for contents without a row."""
        stored = await self._depot.stored()
        records = await self._catalog.blobs()
        problems: list[Problem] = []
        for record in records:
            found = await self._depot.digest_of(record)
            if found is None:
                problems.append(_missing(record))
            elif found != (record.digest, record.size):
                problems.append(_damaged(record, *found))
        digests = {record.digest for record in records}
        for version in (await self._catalog.snapshot()).versions:
            problems += [_unnamed(version, file) for file in version.files if file.digest not in digests]
        named = {(record.digest, record.copy) for record in records}
        problems += [_orphan(one) for one in stored if (one.digest, one.copy) not in named]
        return problems


class _Upload:
    """A partial file and the hash of what is in it. Its blocking methods run on one thread at a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self._pieces: list[bytes | memoryview] = []
        self.waiting = 0
        """Bytes that were added and not taken to be written."""
        self.size = 0
        """Bytes that were taken to be written."""
        self._failed = False

    def begin(self, offset: int) -> None:
        """Go on after ``offset`` bytes that are there. Raises UploadConflictError."""
        there = os.fstat(self._descriptor).st_size
        if offset and offset != there:
            raise UploadConflictError(f"expected the upload to go on at byte {there}, got byte {offset}", there)
        if not offset:
            os.ftruncate(self._descriptor, 0)
        position = 0
        while position < offset:
            piece = os.pread(self._descriptor, min(_READ, offset - position), position)
            if not piece:
                raise UploadConflictError(f"expected the upload to go on at byte {position}", position)
            self._hash.update(piece)
            position += len(piece)
        self.size = offset

    def add(self, piece: bytes | memoryview) -> None:
        self._pieces.append(piece)
        self.waiting += len(piece)

    def take(self) -> Callable[[], None]:
        """What writes and hashes all that was added so far."""
        pieces, self._pieces = self._pieces, []
        position = self.size
        self.size += self.waiting
        self.waiting = 0

        def write() -> None:
            at = position
            if self._failed:
                return  # there would be a hole before it
            self._failed = True
            for piece in pieces:
                view = memoryview(piece)
                self._hash.update(view)
                while view:
                    written = os.pwrite(self._descriptor, view, at)
                    at += written
                    view = view[written:]
            self._failed = False

        return write

    def flush(self) -> None:
        self.take()()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def seal(self) -> None:
        """Make the content last, and nobody's to change. Its age begins now."""
        os.fchmod(self._descriptor, 0o400)
        os.utime(self._descriptor)
        os.fsync(self._descriptor)


# --- files -----------------------------------------------------------------------------------------------------------


def make_directories(directory: Path, root: Path) -> None:
    """Make ``directory``, somewhere below ``root``, which is there, so that its name lasts."""
    missing = []
    while directory != root and not directory.is_dir():
        missing.append(directory)
        directory = directory.parent
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)
        sync_directory(one.parent)


def file_digest(path: Path) -> tuple[str, int] | None:
    """SHA-256 and size of a file; None where there is none."""
    try:
        with _reading(path) as descriptor:
            found = hashlib.sha256()
            size = 0
            while piece := os.read(descriptor, _READ):
                found.update(piece)
                size += len(piece)
            return found.hexdigest(), size
    except FileNotFoundError:
        return None


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int | None:
    """A descriptor of the file, made where it is missing, that nobody else has locked; None: somebody has."""
    while True:
        with suppress(FileNotFoundError):
            if not path.lstat().st_mode & stat.S_IWUSR:
                path.chmod(0o600)  # its process died after it had sealed it, and before it was moved away
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its name may have been moved away, with the file, between the two calls.
            if _is_named(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


def _unlink(path: Path, descriptor: int) -> None:
    """Remove the name of a file that is locked, unless it was moved away and is another file's by now."""
    if _is_named(descriptor, path):
        path.unlink(missing_ok=True)


def _sweep(uploads: Path, older: float) -> Iterator[int]:
    """Remove files that were last written before ``older`` (Unix time) and that nobody holds."""
    for path in sorted(uploads.glob("*.part")):
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_mtime >= older:
                continue
            descriptor = _open_locked(path)
        except OSError:
            continue
        if descriptor is None:
            continue
        try:
            if os.fstat(descriptor).st_mtime < older:
                path.unlink(missing_ok=True)
                yield status.st_size
        finally:
            os.close(descriptor)


# --- problems --------------------------------------------------------------------------------------------------------


def _missing(record: BlobRecord) -> Problem:
    return Problem(
        "missing",
        record.digest,
        f"blob {record.digest} ({record.size} bytes) has no content: put the file back from a backup, or delete the "
        "versions that have it and deploy them again",
    )


def _damaged(record: BlobRecord, digest: str, size: int) -> Problem:
    return Problem(
        "damaged",
        record.digest,
        f"blob {record.digest} ({record.size} bytes) has other content ({size} bytes, SHA-256 {digest}): see to the "
        "disk, and put the file back from a backup, or delete the versions that have it and deploy them again",
    )


def _unnamed(version: VersionRecord, file: FileRef) -> Problem:
    return Problem(
        "unnamed",
        file.digest,
        f"'{version.model}' version {version.version} has '{file.path}' ({file.digest}), of which there is no blob: "
        "delete the version and deploy it again",
    )


def _orphan(one: Stored) -> Problem:
    return Problem(
        "orphan",
        one.digest,
        f"content {one.digest} ({one.size} bytes) belongs to no blob: an interrupted upload left it; "
        "'inferway registry gc' removes it once it is old enough",
        harmless=True,
    )
