"""What is kept on disk of deployed models, opened together: contents by digest, and the directories of versions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from ..core.catalog import Catalog
from ..core.errors import GatewayError
from .blobs import BlobStore, Collected, Depot, DiskDepot, DiskThreads, Problem, StorageLimits
from .state import StateError, prepare_directory
from .versions import VersionDirectories

_log = logging.getLogger("inferway.store")

SWEEP_INTERVAL_S: Final = 3600.0
CACHE_BYTES: Final = 32 * 1024**3


@dataclass(frozen=True, slots=True)
class Swept:
    """What a collection removed: see ``Collected``, and directories of versions that are gone."""

    collected: Collected
    directories: int


class Storage(NamedTuple):
    blobs: BlobStore
    versions: VersionDirectories

    async def collect(self, grace_s: float | None = None) -> Swept:
        """Remove what nothing needs. Raises StoreUnavailableError; what was removed by then stays removed."""
        directories = await self.versions.sweep()  # first: a version's own links would keep a content's room taken
        return Swept(await self.blobs.collect(grace_s), directories)

    async def check(self) -> list[Problem]:
        """Everything that is not as the catalog has it. Reads all contents."""
        return [*await self.blobs.check(), *await self.versions.check()]

    async def keep_tidy(self, interval_s: float = SWEEP_INTERVAL_S) -> None:
        """Sweep now and every so often, until cancelled."""
        while True:
            try:
                swept = await self.collect()
            except (GatewayError, OSError) as error:
                _log.warning("collecting what is not needed failed: %s", error)
            except Exception:  # the next one may do better
                _log.exception("collecting what is not needed failed")
            else:
                if swept != Swept(Collected(), 0):
                    _log.info("collected what is not needed: %s", swept)
            await asyncio.sleep(interval_s)


@asynccontextmanager
async def open_storage(
    *,
    state_dir: Path,
    catalog: Catalog,
    limits: StorageLimits,
    blob_store: str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> AsyncIterator[Storage]:
    """Open what is on disk, and close it.

    Args:
        state_dir: the state directory, made where it is missing.
        blob_store: URL of an object store; None keeps contents in the state directory.
        cache_bytes: what the local copies of an object store's contents may take.
    Raises:
        StateError: a directory or the URL cannot be used; the message is for the operator.
    """
    uploads, versions = state_dir / "uploads", state_dir / "versions"
    kept = state_dir / ("blobs" if blob_store is None else "cache")

    def prepare() -> None:
        for directory in (state_dir, uploads, kept, versions):
            prepare_directory(directory)

    threads = DiskThreads()
    try:
        await threads.run(prepare)
        depot: Depot = DiskDepot(kept, threads)
        if blob_store is not None:
            try:
                # Only here: it is an extra, which a gateway that keeps contents on disk need not have.
                from .objects import ObjectDepot, open_object_store
            except ModuleNotFoundError as error:
                if error.name != "obstore":
                    raise
                raise StateError("an object store needs a library: pip install 'inferway[gateway,s3]'") from error
            depot = ObjectDepot(open_object_store(blob_store), kept, cache_bytes, threads)
        blobs = BlobStore(uploads, catalog, depot, threads, limits)
        yield Storage(blobs, VersionDirectories(versions, catalog, blobs, threads))
    finally:
        await threads.close()
