"""The files of a model version, laid out in a directory as they name each other.

    STATE/versions/MODEL/VERSION-DIGEST/PATH

Each file is a hard link to the stored content, so that versions with the same weights have them once on disk and once
in the page cache. A directory appears whole, under its name, or not at all; its name has the version's digest in it, so
that one that is there has the right files. It can be made again from the catalog at any time.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import stat
import time
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..core.catalog import Catalog, FileRef, VersionRecord
from ..core.errors import InvalidParameterError
from .blobs import BlobStore, DiskThreads, Problem
from .repository import NAME_PATTERN
from .state import sync_directory

_log = logging.getLogger("inferway.store")

MAX_FILES: Final = 4096
MAX_DEPTH: Final = 16
MAX_PATH_BYTES: Final = 512
MAX_NAME_BYTES: Final = 255
_DIRECTORY: Final = re.compile(r"([1-9][0-9]{0,9})-([0-9a-f]{16})")
_TEMPORARY: Final = ".new-"
_TRIES: Final = 100
"""How often others may put something that lacks files in a version's place before its maker gives up."""
_TEMPORARY_AGE_S: Final = 3600.0
_NO_LINK: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES})
"""Where a hard link is not to be had, and a copy is."""


def check_files(files: Sequence[FileRef]) -> None:
    """See that the paths of a version's files can be laid out in a directory of their own, on any file system.

    Raises:
        InvalidParameterError: a path that is absolute, leads out, has an empty or odd part, is too long or too deep,
            that is there twice (also when upper case is lower case), or that another path needs as a directory.
    """
    if not 1 <= len(files) <= MAX_FILES:
        raise InvalidParameterError(f"expected 1 to {MAX_FILES} files, got {len(files)}")
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for file in files:
        path = file.path
        _check_path(path)
        parts = _folded(path).split("/")
        for depth in range(1, len(parts)):
            folders.setdefault("/".join(parts[:depth]), path)
        folded = "/".join(parts)
        if folded in seen:
            raise InvalidParameterError(f"expected each path once, got {_shown(path)} beside {_shown(seen[folded])}")
        seen[folded] = path
    for folded, path in seen.items():
        if folded in folders:
            raise InvalidParameterError(
                f"expected {_shown(path)} to be a file or a directory, {_shown(folders[folded])} makes it both"
            )


def _check_path(path: str) -> None:
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise InvalidParameterError("expected a path in Unicode, got half of a surrogate pair in it") from None
    if not 1 <= len(encoded) <= MAX_PATH_BYTES:
        raise InvalidParameterError(f"expected a path of 1 to {MAX_PATH_BYTES} bytes, got {len(encoded)}")
    shown = _shown(path)
    parts = path.split("/")
    if path.startswith("/") or "\\" in path or re.match(r"[A-Za-z]:", path):
        raise InvalidParameterError(f"expected a relative path with '/' between its parts, got {shown}")
    if any(unicodedata.category(letter).startswith("C") for letter in path):
        raise InvalidParameterError(f"expected a path of characters that can be seen, got {shown}")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidParameterError(f"expected a path without empty parts, '.' and '..', got {shown}")
    if len(parts) > MAX_DEPTH or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise InvalidParameterError(
            f"expected a path of at most {MAX_DEPTH} parts of at most {MAX_NAME_BYTES} bytes, got {shown}"
        )


def _folded(path: str) -> str:
    """What file systems that ignore case and the form of accents take for one name."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _shown(path: str) -> str:
    text = path if len(path) <= 80 else path[:77] + "..."
    return ascii(text) if any(unicodedata.category(letter).startswith("C") for letter in text) else repr(text)


class VersionDirectories:
    """Lays versions out on disk, below one directory."""

    def __init__(self, root: Path, catalog: Catalog, blobs: BlobStore, threads: DiskThreads) -> None:
        self._root = root
        self._catalog = catalog
        self._blobs = blobs
        self._threads = threads

    def path(self, record: VersionRecord) -> Path:
        """Where a version is, once it is laid out. Of its own names nothing but checked ones gets into it."""
        if not NAME_PATTERN.fullmatch(record.model):
            raise InvalidParameterError(f"expected the name of a model, got {_shown(record.model)}")
        return self._root / record.model / _name(record.version, record.digest)

    async def materialise(self, record: VersionRecord) -> Path:
        """Lay a version out, unless it is; returns its directory, read-only.

        Raises:
            InvalidParameterError: its paths are none that can be laid out.
            BlobNotFoundError: a content is not stored.
            InsufficientStorageError: the disk is full; nothing is left behind.
            StoreUnavailableError: the object store or the database does not answer.
        """
        check_files(record.files)
        target = self.path(record)
        if await self._threads.run(lambda: _is_whole(target, record.files)):
            return target
        sources = {digest: await self._blobs.open_local(digest) for digest in sorted({f.digest for f in record.files})}
        await self._threads.run(lambda: _lay_out(target, record.files, sources))
        return target

    async def remove(self, record: VersionRecord) -> None:
        """Remove a version's directory. What has its files open or mapped keeps them until it lets go."""
        target = self.path(record)
        await self._threads.run(lambda: _remove(target))

    async def sweep(self) -> int:
        """Remove directories of versions that are gone, and what an interrupted process left; returns how many."""
        # Listed before the catalog is read: what is laid out in between has its row by then.
        found = await self._threads.run(lambda: _directories(self._root))
        snapshot = await self._catalog.snapshot()
        keep = {(record.model, self.path(record).name) for record in snapshot.versions}
        for running in await self._catalog.running_deployments():
            keep.add((running.spec.model, _name(running.version, running.digest)))
        gone = [self._root / model / name for model, name in found if (model, name) not in keep]
        return await self._threads.run(lambda: _sweep(self._root, gone))

    async def check(self) -> list[Problem]:
        """Compare what is laid out with the catalog, by name and size. What is not laid out yet is no problem."""
        found = await self._threads.run(lambda: _directories(self._root))
        records = (await self._catalog.snapshot()).versions
        keep = {(record.model, self.path(record).name) for record in records}
        for running in await self._catalog.running_deployments():
            keep.add((running.spec.model, _name(running.version, running.digest)))

        def look() -> list[Problem]:
            problems = []
            for record in records:
                target = self.path(record)
                if target.exists() and not _is_whole(target, record.files):
                    problems.append(
                        Problem(
                            "version",
                            f"{record.model}/{record.version}",
                            f"the directory of '{record.model}' version {record.version} lacks files of its own: "
                            f"remove {target} and restart the gateway, which makes it again",
                        )
                    )
            problems += [self._orphan(model, name) for model, name in found if (model, name) not in keep]
            return problems

        return await self._threads.run(look)

    def _orphan(self, model: str, name: str) -> Problem:
        return Problem(
            "orphan",
            f"{model}/{name}",
            f"{self._root / model / name} belongs to no version: an interrupted deployment left it; "
            "'inferway registry gc' removes it",
            harmless=True,
        )


# --- blocking --------------------------------------------------------------------------------------------------------


def _name(version: int, digest: str) -> str:
    return f"{version}-{digest[:16]}"


def _is_whole(directory: Path, files: Sequence[FileRef]) -> bool:
    """Whether every file is there with its size. What is in it, the link to the stored content answers for."""
    try:
        found = [(directory / file.path).lstat() for file in files]
        return stat.S_ISDIR(directory.lstat().st_mode) and all(
            stat.S_ISREG(status.st_mode) and status.st_size == file.size
            for status, file in zip(found, files, strict=True)
        )
    except OSError:
        return False


def _lay_out(target: Path, files: Sequence[FileRef], sources: dict[str, Path]) -> None:
    model = target.parent
    building = _begin(model)
    try:
        folders = {building}
        for file in files:
            path = building / file.path
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folders.update(parent for parent in path.parents if parent.is_relative_to(building))
            _link(sources[file.digest], path)
        for folder in folders:
            folder.chmod(0o500)
        _put_in_place(building, target, files)
        sync_directory(model)
    except BaseException:
        _remove(building)
        raise


def _put_in_place(building: Path, target: Path, files: Sequence[FileRef]) -> None:
    """Give a finished directory its name. One that is whole is left alone: somebody was first, and may be using it."""
    for _ in range(_TRIES):
        try:
            building.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if _is_whole(target, files):
                _remove(building)
                return
        _remove(target)  # it lacks something
    raise OSError(errno.EBUSY, "the version's directory is made anew without end", str(target))


def _begin(model: Path) -> Path:
    building = model / f"{_TEMPORARY}{secrets.token_hex(8)}"
    while True:
        model.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):  # a sweep has taken the empty directory away again
            building.mkdir(mode=0o700)
            return building


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path, follow_symlinks=False)
        return
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    with source.open("rb") as content, path.open("xb") as copy:
        os.fchmod(copy.fileno(), 0o400)
        shutil.copyfileobj(content, copy, 1024 * 1024)
        copy.flush()
        os.fsync(copy.fileno())


def _remove(directory: Path) -> None:
    """Remove a directory with all that is in it. Out of its place first, so that nobody sees half of it."""
    doomed = directory
    if not directory.name.startswith(_TEMPORARY):
        doomed = directory.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
        try:
            directory.rename(doomed)
        except FileNotFoundError:
            return
    if doomed.is_symlink():
        doomed.unlink()
        return
    for folder, _, _ in os.walk(doomed):
        with suppress(OSError):
            Path(folder).chmod(0o700)
    shutil.rmtree(doomed, ignore_errors=True)


def _directories(root: Path) -> list[tuple[str, str]]:
    return [
        (path.parent.name, path.name)
        for path in sorted(root.glob("*/*"))
        if _DIRECTORY.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _sweep(root: Path, gone: Sequence[Path]) -> int:
    for directory in gone:
        _remove(directory)
    swept = len(gone)
    old = time.time() - _TEMPORARY_AGE_S
    for path in sorted(root.glob(f"*/{_TEMPORARY}*")):
        with suppress(FileNotFoundError):
            if path.lstat().st_mtime < old:
                _remove(path)
                swept += 1
    for path in sorted(root.iterdir()):
        with suppress(OSError):
            path.rmdir()  # which does nothing to one that is not empty
    return swept
