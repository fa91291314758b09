"""The state directory: private to one user, with the pepper in it unless the settings give one.

Everything here is blocking file I/O, done once before anything listens.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from ..core.keys import Peppers

PEPPER_FILE: Final = "pepper"
_PEPPER_FILE_LIMIT: Final = 16 * 1024


class StateError(Exception):
    """What is to last cannot be used as it is, and only the operator can help it.

    Raised before the gateway listens, never while it answers requests. Unlike the errors of requests, the message may
    name a path. It holds no secret and no password.
    """


def prepare_directory(directory: Path) -> None:
    """Make the directory with mode 0700 unless it is there.

    One that is there is left as it is, because it may be anybody's (``--state-dir /tmp``), but must not let others
    write: they could put their own files in place of ours.

    Raises:
        StateError: it cannot be made, is no directory, or others may write to it.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        mode = directory.stat().st_mode
    except OSError as error:
        raise StateError(f"cannot use '{directory}' as state directory: {error.strerror}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StateError(
            f"expected a state directory that only its owner may write to, got '{directory}' with mode "
            f"{stat.S_IMODE(mode):04o}; name a directory of its own, such as '{directory / 'inferway'}', or run: "
            f"chmod go-w '{directory}'"
        )


def check_private(file: Path, mode: int) -> None:
    """Refuse a file that anybody but its owner may read or write.

    Raises:
        StateError
    """
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StateError(
            f"expected '{file}' to be readable by its owner only, got mode {stat.S_IMODE(mode):04o}; "
            f"if nobody else has read it, run: chmod 600 '{file}'"
        )


def load_peppers(directory: Path, configured: str | None = None) -> Peppers:
    """The peppers of the settings; where they have none, those of the file ``pepper``, which is made at first use.

    Processes that start at the same time agree on one pepper: the file appears whole, under its name, once.

    Args:
        directory: the state directory; not touched when the settings have a pepper.
        configured: the setting, in the form of ``Peppers.parse``.
    Raises:
        StateError: the setting or the file has another form, others may read the file, or it cannot be read or made.
    """
    if configured is not None:
        try:
            return Peppers.parse(configured)
        except ValueError as error:
            raise StateError(f"the setting key_pepper (INFERWAY_KEY_PEPPER): {error}") from error
    prepare_directory(directory)
    file = directory / PEPPER_FILE
    try:
        if not file.exists():
            _create_once(file, Peppers.generate().format() + "\n")
        text = _read_private(file)
    except OSError as error:
        raise StateError(f"cannot use the pepper file '{file}': {error.strerror}") from error
    try:
        return Peppers.parse(text)
    except ValueError as error:
        raise StateError(f"the pepper file '{file}': {error}") from error


def _create_once(file: Path, text: str) -> None:
    """Write a new private file whole, or leave the one that is there by then.

    A hard link, because it fails where the name is taken; a rename would put the later pepper in place of the earlier.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, file)
        except FileExistsError:
            return
    finally:
        temporary.unlink()
    sync_directory(file.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory last."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_private(file: Path) -> str:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StateError(f"expected '{file}' to be a file, got a symbolic link") from error
        raise
    try:
        # Of the open file, not of its name: that could mean another file by now.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _PEPPER_FILE_LIMIT:
            raise StateError(f"expected '{file}' to be a file of up to {_PEPPER_FILE_LIMIT} bytes, got something else")
        check_private(file, status.st_mode)
        return os.read(descriptor, _PEPPER_FILE_LIMIT).decode("ascii", "replace")
    finally:
        os.close(descriptor)
