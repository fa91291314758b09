"""A front's end of the line to the owner: what stands where the registry and its executors stand in the owner.

The inference route asks a registry for a version and its executor for an answer; here both go over the line. A version
that was found once is kept with its signature, so that a request costs one message each way. Whether it still is the
one that answers is looked at by the owner, with the request in its hand: it says ``MOVED`` where a newer one has taken
its place, and the route, which knows that from reloads, reads the body anew by the newer one's signature.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from ..core.batcher import Answer, Asker, InferenceRequest
from ..core.errors import GatewayError, InternalError, ModelNotReadyError, ShuttingDownError
from ..core.model_config import BatchPolicy, ModelConfig
from ..core.routing import Router
from ..core.served import ServedVersion
from ..core.stats import ModelStats
from ..core.tensors import Signature
from .frames import Channel, FrameError, Kind, pack, unpack_arrays
from .wire import aliases_from_json, make_error, signature_from_json

_GONE: Final = "the process that holds the models is gone"

Reply = tuple[int, dict[str, Any], memoryview]


class RemoteExecutor:
    """Answers the requests for one model version by asking the owner.

    Args:
        generation: the owner's number of the version as it is loaded now.
        by_name: it was found as the version that answers where none is named.
    """

    inline: Final = False

    def __init__(self, link: Link, generation: int, signature: Signature, *, by_name: bool, row_exact: bool) -> None:
        self._link = link
        self.generation: Final = generation
        self._signature = signature
        self._by_name = by_name
        self._row_exact = row_exact

    @property
    def signature(self) -> Signature:
        return self._signature

    @property
    def row_exact(self) -> bool:
        return self._row_exact

    def run_inline(self, request: InferenceRequest) -> None:
        """Never: the run is in another process."""

    async def infer(self, request: InferenceRequest) -> Answer:
        """Have the owner answer. Cancelling gives the place in its queue up.

        Raises:
            ShuttingDownError: this is not the version that answers any more; the registry has its successor.
            GatewayError: whatever the owner's executor raised.
        """
        meta = {
            "gen": self.generation,
            "name": self._by_name,
            "inputs": list(request.inputs),
            "outputs": None if request.outputs == self._signature.output_names else request.outputs,
            "rows": request.rows,
            "nbytes": request.nbytes,
            "priority": request.priority,
            "deadline": request.deadline,
            "queue_timeout_s": request.queue_timeout_s,
            "origin": request.origin,
            "asker": self._link.asker(request.asker),
        }
        kind, said, data = await self._link.call(Kind.INFER, meta, list(request.inputs.values()))
        if kind == Kind.MOVED:
            raise ShuttingDownError("another version has taken the place of the one that the request was read for")
        queue_s, assemble_s, run_s, split_s = said["times"]
        outputs = unpack_arrays(said, data)
        return Answer(outputs, queue_s, assemble_s, run_s, split_s, said["rows"], said["attempts"])

    async def drain(self, timeout_s: float) -> int:
        """Nothing: what is to be drained is in the owner."""
        return 0

    async def close(self) -> bool:
        return True


class RemoteRegistry:
    """The versions that were found so far."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._found: dict[tuple[str, int | None], ServedVersion] = {}

    def get(self, name: str, version: int | None = None) -> ServedVersion:
        """A version that was found before; ``ModelNotReadyError`` where it is to be asked for by ``acquire``."""
        served = self._found.get((name, version))
        if served is None:
            raise ModelNotReadyError(f"Request for unready model: '{name}' was not asked for yet")
        return served

    async def acquire(self, name: str, version: int | None, *, deadline: float | None = None) -> ServedVersion:
        """A version, loaded if need be. Raises what the owner's registry does."""
        _, meta, data = await self._link.call(
            Kind.FIND,
            {"model": name, "version": version, "deadline": deadline, "known": self._generation(name, version)},
        )
        return self.keep(meta, data)

    def keep(self, meta: Mapping[str, Any], data: memoryview) -> ServedVersion:
        """Take over a version that the owner describes."""
        key = (meta["model"], None if meta["by_name"] else meta["version"])
        known = self._found.get(key)
        if known is not None and self._generation(*key) == meta["gen"]:
            return known
        executor = RemoteExecutor(
            self._link,
            meta["gen"],
            signature_from_json(data),
            by_name=meta["by_name"],
            row_exact=meta["row_exact"],
        )
        config = ModelConfig(batching=BatchPolicy(priority_levels=meta["priority_levels"]))
        served = self._found[key] = ServedVersion(meta["model"], meta["version"], config, None, executor, ModelStats())
        if known is not None:
            self._link.retired.append(known)
        return served

    def forget(self, generation: int) -> None:
        """Ask anew for what was found as this."""
        for key in [key for key in self._found if self._generation(*key) == generation]:
            self._link.retired.append(self._found.pop(key))

    def served(self) -> list[ServedVersion]:
        return list(self._found.values())

    def _generation(self, name: str, version: int | None) -> int | None:
        served = self._found.get((name, version))
        executor = served.batcher if served is not None else None
        return executor.generation if isinstance(executor, RemoteExecutor) else None


class Link(Channel):
    """The connection to the owner.

    Args:
        router: is told of the aliases.
        forget_key: is told of keys that changed.
        report: gives what was counted since the last call.
        on_lost: called when the owner is gone.
    """

    def __init__(
        self,
        router: Router,
        *,
        forget_key: Callable[[str], None],
        report: Callable[[], Mapping[str, Any]],
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__()
        self.registry: Final = RemoteRegistry(self)
        self.retired: list[ServedVersion] = []
        """Versions that are not asked any more, whose last counts have yet to be reported."""
        self._router = router
        self._forget_key = forget_key
        self._report = report
        self._on_lost = on_lost
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[asyncio.Future[Reply], int | None]] = {}
        self._welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing = False

    async def greet(self, token: str) -> None:
        """Say who this is, and wait for the aliases. Raises ``ConnectionError``."""
        self.write(pack(Kind.HELLO, 0, {"token": token, "pid": os.getpid()}))
        await self._welcome

    async def call(self, kind: Kind, meta: Mapping[str, Any], arrays: list[NDArray[Any]] | None = None) -> Reply:
        """Ask, and wait for what comes back. Cancelling tells the owner that nobody waits any more.

        Raises:
            GatewayError: what the owner answered, or that it is gone.
        """
        if self.congested:
            await self.writable()
        if not self.connected:
            raise ShuttingDownError(_GONE)
        number = next(self._numbers) & 0xFFFFFFFF
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future, meta.get("gen")
        try:
            self.write(pack(kind, number, meta, arrays or ()))
            return await future
        except asyncio.CancelledError:
            self.write(pack(Kind.CANCEL, number, {}))
            raise
        except FrameError as error:
            raise InternalError("the request does not fit the line between the gateway's processes") from error
        finally:
            self._waiting.pop(number, None)

    def report(self) -> None:
        """Tell the owner what was counted."""
        counted = self._report()
        if counted:
            self.write(pack(Kind.REPORT, 0, counted))

    def end(self) -> None:
        """Close the connection after a last report."""
        self._closing = True
        self.report()
        if self._transport is not None:
            self._transport.close()

    def asker(self, asker: Asker | None) -> tuple[str, dict[str, str]] | None:
        """What the owner has to know of who asks, should the model be a pipeline: no more than its aliases look at."""
        if asker is None:
            return None
        fields = asker.fields
        return asker.key_id, {h.decode(): fields[h].decode("latin-1") for h in self._router.headers if h in fields}

    def frame(self, kind: int, number: int, meta: dict[str, Any], data: memoryview) -> None:
        if kind in (Kind.ANSWER, Kind.VERSION, Kind.MOVED, Kind.ERROR):
            future, generation = self._waiting.get(number, (None, None))
            if kind == Kind.MOVED:
                # Also where nobody waits any more: the next request would run into the same.
                if generation is not None:
                    self.registry.forget(generation)
                self.registry.keep(meta, data)
            if future is None or future.done():
                return
            if kind == Kind.ERROR:
                error: GatewayError = make_error(meta)
                if meta.get("stale") and generation is not None:
                    self.registry.forget(generation)
                future.set_exception(error)
            else:
                future.set_result((kind, meta, data))
        elif kind in (Kind.WELCOME, Kind.SYNC):
            if meta["aliases"]:
                self._router.update(aliases_from_json(data))
            for key_id in meta["keys"]:
                self._forget_key(key_id)
            if kind == Kind.WELCOME:
                if not self._welcome.done():
                    self._welcome.set_result(None)
            else:
                self.report()
                self.write(pack(Kind.DONE, number, {}))
        else:
            raise FrameError(f"expected an answer of the owner, got a frame of kind {kind}")

    def lost(self) -> None:
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(ShuttingDownError(_GONE))
        if not self._welcome.done():
            self._welcome.set_exception(ConnectionError("the owner closed the connection"))
        if not self._closing:
            self._on_lost()


async def connect(path: Path, make: Callable[[], Link]) -> Link:
    """Connect to the owner. Raises ``OSError``."""
    _, link = await asyncio.get_running_loop().create_unix_connection(make, str(path))
    return link
