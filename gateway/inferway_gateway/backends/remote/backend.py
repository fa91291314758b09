"""The upstreams of a gateway, and the model versions that are there."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Final, Self

from ...core.errors import GatewayError, ModelLoadError
from ...core.stats import ModelStats
from ...core.upstream import RemoteSpec, UpstreamSpec, UpstreamStats
from .executor import RemoteExecutor, load_error
from .pool import UpstreamPool

LOAD_LIMIT_S: Final = 10.0


class RemoteBackend:
    """Holds the connections to the operator's upstreams; ``async with`` opens and closes it.

    Args:
        upstreams: none of them of the same name.
    """

    def __init__(self, upstreams: Iterable[UpstreamSpec] = ()) -> None:
        self._specs = {spec.name: spec for spec in upstreams}
        self._pools: dict[str, UpstreamPool] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Raises OSError where a file of certificates cannot be read."""
        try:
            for name, spec in self._specs.items():
                self._pools[name] = await self._stack.enter_async_context(UpstreamPool(spec))
        except ssl.SSLError as error:
            await self._stack.aclose()
            raise OSError(f"the file of certificates of upstream '{name}' holds none: {error.reason}") from error
        except OSError as error:
            await self._stack.aclose()
            raise OSError(f"the file of certificates of upstream '{name}': {error.strerror}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def pool(self, name: str) -> UpstreamPool | None:
        """The connections to one upstream, for whatever else speaks to it."""
        return self._pools.get(name)

    def stats(self) -> list[UpstreamStats]:
        return [pool.stats for pool in self._pools.values()]

    def check(self, remote: RemoteSpec) -> None:
        """Hold what ``remote.toml`` says against what the operator allows.

        Raises:
            ModelLoadError: there is no such upstream, it is of another protocol, or the model may not be used.
        """
        pool = self._pools.get(remote.upstream)
        if pool is None:
            known = ", ".join(f"'{name}'" for name in sorted(self._pools)) or "none is defined"
            raise ModelLoadError(
                f"expected an upstream that the gateway's operator has defined ({known}), got '{remote.upstream}'"
            )
        if (pool.spec.protocol == "oip") != (remote.operation == "infer"):
            raise ModelLoadError(
                f"upstream '{remote.upstream}' speaks {pool.spec.protocol}, operation '{remote.operation}' is not of it"
            )
        if not pool.spec.allows(remote.model):
            raise ModelLoadError(f"upstream '{remote.upstream}' may not be used for its model '{remote.model}'")

    async def open(self, name: str, version: int, remote: RemoteSpec, stats: ModelStats) -> RemoteExecutor:
        """Ask the upstream for the model's signature, and be ready for requests.

        Args:
            name, version: of the gateway's model version.
        Raises:
            ModelLoadError: as ``check``, or the upstream does not have the model or does not answer within ten seconds.
        """
        try:
            self.check(remote)
        except ModelLoadError as error:
            raise load_error(name, version, error) from None
        executor = RemoteExecutor(f"'{name}' version {version}", remote, self._pools[remote.upstream], stats)
        try:
            await executor.load(asyncio.get_running_loop().time() + LOAD_LIMIT_S)
        except GatewayError as error:
            raise load_error(name, version, error) from error
        return executor
