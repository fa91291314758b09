"""What a deployment does to a version's files before anything is loaded: ``Checks`` of ``core/deployments.py``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import PurePosixPath

from ..core.backend import Artifact
from ..core.catalog import VersionRecord
from ..core.errors import DigestMismatchError
from ..core.golden import Example
from .blobs import BlobStore, file_digest
from .golden_file import read_golden
from .version_config import read_artifact, read_pipeline, read_remote
from .versions import VersionDirectories

_log = logging.getLogger("inferway.store")

Admit = Callable[[Artifact, Collection[str]], object]
"""Looks at a model without loading it, and gets the paths of its version's files. Blocks; raises
``ModelRejectedError``."""


class VersionChecks:
    """Checks over the stored blobs and the version's folder.

    Args:
        blobs: where the contents are.
        directories: where versions are laid out.
        admit: the backend's look at a model; None: it has none.
    """

    def __init__(self, blobs: BlobStore, directories: VersionDirectories, admit: Admit | None) -> None:
        self._blobs = blobs
        self._directories = directories
        self._admit = admit

    async def verify(self, record: VersionRecord) -> None:
        sizes = {file.digest: (file.size, file.path) for file in record.files}
        for digest, (size, path) in sorted(sizes.items()):
            file = await self._blobs.open_local(digest)
            if await asyncio.to_thread(file_digest, file) != (digest, size):
                raise DigestMismatchError(
                    f"expected the stored content of '{path}' to be {size} bytes with digest {digest}, it is not: the "
                    "disk has damaged it, or somebody changed it; ask the operator to run 'inferway registry check'"
                )

    async def admit(self, record: VersionRecord) -> None:
        folder = await self._directories.materialise(record)
        if record.kind in ("onnx", "language"):
            artifact = await asyncio.to_thread(read_artifact, record, folder)
            if self._admit is not None:
                await asyncio.to_thread(self._admit, artifact, list(_beside(record, artifact)))
        elif record.kind == "remote":
            await asyncio.to_thread(read_remote, folder)
        else:
            await asyncio.to_thread(read_pipeline, folder)

    async def golden(self, record: VersionRecord) -> Sequence[Example]:
        folder = await self._directories.materialise(record)
        return await asyncio.to_thread(read_golden, folder)

    async def remove(self, record: VersionRecord) -> None:
        try:
            await self._directories.remove(record)
        except OSError as error:
            _log.warning(
                "the folder of '%s' version %d could not be removed: %s", record.model, record.version, error.strerror
            )


def _beside(record: VersionRecord, artifact: Artifact) -> Iterator[str]:
    """The version's files in the graph's own folder, and below it, as seen from there."""
    home = artifact.path.parent if artifact.home is None else artifact.home
    place = artifact.path.parent.relative_to(home)
    for file in record.files:
        if PurePosixPath(file.path).is_relative_to(place):
            yield PurePosixPath(file.path).relative_to(place).as_posix()
