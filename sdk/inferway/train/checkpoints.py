"""The state of a training on disk, or in an object store: whole or not at all, and checked when it is read.

A checkpoint is one file, named by its step:

    magic, 16 bytes | SHA-256 of the head, 32 | length of the head, 8, little-endian | head | body

The head is JSON: facts, the body's SHA-256, and name, dtype, shape and offset of each array; the body is the arrays,
one behind the other, each from a multiple of 64 bytes on. There is no pickle in it, so a checkpoint from anywhere can
be read without running what it says.

On a file system a file is written under another name, flushed to the disk, and renamed; an object store shows an object
only when all of it has come. Whatever breaks all the same (a full disk that lied, a flipped bit) fails the digest, and
then the checkpoint before it is taken, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, MissingExtraError

MAGIC: Final = b"inferway-train-1"
_NAME: Final = re.compile(r"step-(\d{12})\.ckpt")
_ALIGNED: Final = 64
_KINDS: Final = "biufc"
"""Of numpy's dtypes: numbers and truth values, nothing that holds objects."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be read, and an older one was."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        step: after which step it was taken, counted over all epochs.
        arrays: by name, of the dtypes and shapes that were saved.
        facts: what JSON can hold.
    """

    step: int
    arrays: dict[str, NDArray[Any]]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training, in a folder or below a URL such as ``s3://bucket/prefix``.

    Args:
        path: a folder, made where it is missing, that every machine sees that reads from it; or a URL that
            ``pyarrow.fs`` knows, with its credentials where S3 clients look for them.
        keep: how many of the newest stay; at least 1. Two are better: the older is what is left if the newer breaks.
    Raises:
        ConfigurationError: ``keep`` is below 1, or no file system is known for the URL.
        MissingExtraError: a URL, and pyarrow is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 3) -> None:
        if keep < 1:
            raise ConfigurationError(f"at least 1 checkpoint has to be kept, not {keep}")
        given = os.fspath(path)
        self.path = given.split("?")[0]
        """Without what a URL is given besides, such as keys."""
        self._keep = keep
        self._place: _Place = _Objects(given) if "://" in given else _Folder(Path(given))

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in order; they were not read."""
        matches = (_NAME.fullmatch(name) for name in self._place.names())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove those that are too many.

        Args:
            step: from 0; an older checkpoint of the same step is replaced.
            arrays: of numbers.
            facts: what JSON can hold.
        Raises:
            OSError: it could not be written; those before it are still there.
        """
        self._place.write(_name(step), _encode(step, arrays, facts))
        for old in self.steps()[: -self._keep]:
            self._place.remove(_name(old))

    def load(self) -> Saved | None:
        """The newest checkpoint that is whole; None where there is none.

        Warns:
            CheckpointWarning: a newer one is broken; which, and which is taken for it.
        """
        broken: list[tuple[int, str]] = []
        saved = None
        for step in reversed(self.steps()):
            try:
                saved = _decode(step, self._place.read(_name(step)))
                break
            except (OSError, ValueError) as error:
                broken.append((step, str(error)))
        for step, why in broken:
            instead = f"going on from step {saved.step}" if saved else "there is none before it: starting anew"
            warnings.warn(
                f"the checkpoint of step {step} in {self.path} is broken ({why}); {instead}",
                CheckpointWarning,
                stacklevel=2,
            )
        return saved


def _name(step: int) -> str:
    return f"step-{step:012d}.ckpt"


def _encode(step: int, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> list[memoryview]:
    """Pieces to be written one behind the other; the arrays are not copied where they lie contiguous."""
    pieces: list[memoryview] = []
    entries = []
    at = 0
    digest = hashlib.sha256()
    for name, given in arrays.items():
        if given.dtype.kind not in _KINDS:
            raise ConfigurationError(f"'{name}' cannot be kept: its dtype is {given.dtype}, not one of numbers")
        array = np.ascontiguousarray(given)
        entries.append({"name": name, "dtype": array.dtype.str, "shape": list(given.shape), "offset": at})
        for piece in (array.reshape(-1).view(np.uint8).data, memoryview(bytes(-array.nbytes % _ALIGNED))):
            digest.update(piece)
            pieces.append(piece)
            at += len(piece)
    head = json.dumps(
        {"step": step, "facts": dict(facts), "arrays": entries, "bytes": at, "sha256": digest.hexdigest()}
    )
    encoded = head.encode()
    front = MAGIC + hashlib.sha256(encoded).digest() + len(encoded).to_bytes(8, "little") + encoded
    return [memoryview(front), *pieces]


def _decode(step: int, content: memoryview) -> Saved:
    fixed = len(MAGIC) + 32 + 8
    if len(content) < fixed or bytes(content[: len(MAGIC)]) != MAGIC:
        raise ValueError("it does not begin as one")
    length = int.from_bytes(content[fixed - 8 : fixed], "little")
    encoded = content[fixed : fixed + length]
    if hashlib.sha256(encoded).digest() != bytes(content[len(MAGIC) : len(MAGIC) + 32]):
        raise ValueError("its head is damaged")
    head = json.loads(bytes(encoded))
    body = content[fixed + length :]
    if len(body) != head["bytes"]:
        raise ValueError(f"it has {len(body)} bytes of arrays instead of {head['bytes']}")
    if hashlib.sha256(body).hexdigest() != head["sha256"]:
        raise ValueError("its content is damaged")
    if head["step"] != step:
        raise ValueError(f"it is of step {head['step']}")
    arrays = {}
    for entry in head["arrays"]:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        # A copy: the head is of any length, so that nothing of the body lies where its dtype wants it.
        arrays[entry["name"]] = np.frombuffer(body, dtype, count, entry["offset"]).reshape(shape).copy()
    return Saved(head["step"], arrays, head["facts"])


class _Place(Protocol):
    def names(self) -> Iterator[str]: ...
    def write(self, name: str, pieces: list[memoryview]) -> None: ...
    def read(self, name: str) -> memoryview: ...
    def remove(self, name: str) -> None: ...


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> Iterator[str]:
        return (entry.name for entry in self._folder.iterdir())

    def write(self, name: str, pieces: list[memoryview]) -> None:
        partial = self._folder / f".{name}.{os.getpid()}"
        try:
            with partial.open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._folder / name)
        finally:
            partial.unlink(missing_ok=True)
        # The name is on the disk only when the folder is.
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, name: str) -> memoryview:
        return memoryview((self._folder / name).read_bytes())

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)


class _Objects:
    def __init__(self, url: str) -> None:
        try:
            from pyarrow import ArrowInvalid, fs
        except ModuleNotFoundError as error:
            raise MissingExtraError("pyarrow", "ray", f"Keeping checkpoints at {url.split('?')[0]}") from error
        try:
            self._files, self._base = fs.FileSystem.from_uri(url)
        except ArrowInvalid as error:
            raise ConfigurationError(f"no file system is known for the checkpoints' {url.split('?')[0]}") from error
        self._file_type = fs.FileType.File
        self._selector = fs.FileSelector(self._base, allow_not_found=True)

    def names(self) -> Iterator[str]:
        found = self._files.get_file_info(self._selector)
        return (info.base_name for info in found if info.type == self._file_type)

    def write(self, name: str, pieces: list[memoryview]) -> None:
        with self._files.open_output_stream(f"{self._base}/{name}") as stream:
            for piece in pieces:
                if len(piece):
                    stream.write(piece)

    def read(self, name: str) -> memoryview:
        with self._files.open_input_file(f"{self._base}/{name}") as stream:
            return memoryview(stream.read())

    def remove(self, name: str) -> None:
        self._files.delete_file(f"{self._base}/{name}")
