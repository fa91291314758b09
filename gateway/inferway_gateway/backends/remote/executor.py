"""One model version whose model is on servers elsewhere."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...core.batcher import Answer, InferenceRequest
from ...core.errors import (
    DeadlineExceededError,
    GatewayError,
    InvalidTensorError,
    ModelLoadError,
    UpstreamError,
)
from ...core.inflight import InFlight
from ...core.stats import ModelStats
from ...core.tensors import DTYPES, Signature
from ...core.upstream import RemoteSpec
from . import oip, openai
from .chat import ChatRelay
from .gate import Gate
from .pool import Call, Reply, UpstreamPool

logger = logging.getLogger("inferway.upstreams")

REFRESH_INTERVAL_S: Final = 5.0
_REFUSALS: Final = frozenset({400, 413, 422})
_PRIORITIES: Final = "schedule_policy"


class RemoteExecutor:
    """Sends requests to an upstream. ``RemoteBackend.open`` makes it ready.

    Args:
        stats: of the version; its gauges tell how many requests wait and are under way.
    """

    inline: Final = False
    row_exact: Final = False

    def __init__(self, name: str, remote: RemoteSpec, pool: UpstreamPool, stats: ModelStats) -> None:
        self._name = name
        self._remote = remote
        self._pool = pool
        self._stats = stats
        self._lanes = pool.lanes()
        self._gate = Gate(pool.spec.max_in_flight, pool.spec.max_queued)
        self._signature = Signature((), ())
        self._binary = False
        self._priorities = False
        self._path = ""
        self._in_flight = InFlight()
        self._relay: ChatRelay | None = None
        if pool.spec.protocol == "openai" and remote.operation in ("chat", "completions"):
            self._relay = ChatRelay(remote, pool, self._lanes, self._gate, self._in_flight)
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -math.inf

    @property
    def signature(self) -> Signature:
        """The upstream's; another object after its model has become another one."""
        return self._signature

    @property
    def relay(self) -> ChatRelay | None:
        """What answers for the version under ``/v1``; None where its model writes no texts."""
        return self._relay

    def problem(self) -> str | None:
        """Why requests cannot be answered now, in words; None where they can."""
        if self._pool.wait_s(self._lanes) > 0:
            return f"no endpoint of upstream '{self._remote.upstream}' takes requests now"
        return None

    def run_inline(self, request: InferenceRequest) -> Answer | None:
        return None

    async def load(self, deadline: float | None = None) -> None:
        """Ask the upstream what the model takes and gives.

        Raises:
            GatewayError: it does not answer, does not have the model, or tells of what no model has.
        """
        if self._pool.spec.protocol == "openai":
            self._signature = openai.signature(self._remote)
            self._path = openai.PATHS[self._remote.operation]
            return
        extensions: frozenset[str] = frozenset()
        server = await self._pool.send(Call("GET", "/v2"), self._lanes, deadline)
        if server.status == 200 and len(server.body) <= oip.MAX_METADATA_BYTES:
            extensions = oip.read_extensions(server.body)
        path = oip.model_path(self._remote.model, self._remote.version)
        reply = await self._pool.send(Call("GET", path), self._lanes, deadline)
        if reply.status != 200:
            raise self._refused(reply, "metadata")
        if len(reply.body) > oip.MAX_METADATA_BYTES:
            raise UpstreamError(f"expected metadata of at most {oip.MAX_METADATA_BYTES} bytes from the upstream")
        self._signature = oip.read_signature(reply.body, self._remote.batched)
        binary = self._pool.spec.binary
        self._binary = oip.BINARY_EXTENSION in extensions if binary is None else binary
        self._priorities = _PRIORITIES in extensions
        self._path = path + "/infer"

    async def infer(self, request: InferenceRequest) -> Answer:
        """Send a request and read the answer. Cancelling closes the connection that the upstream answers on.

        Raises:
            QueueFullError: as many requests as may wait do.
            DeadlineExceededError: the deadline or the queue timeout passed.
            ModelFailingError: no endpoint takes requests now.
            UpstreamError: the upstream did not answer, or not with what it promised.
            InvalidTensorError: the upstream says that the request is wrong.
            ShuttingDownError: the version drains.
        """
        if not request.rows and self._signature.batched:
            return self._no_rows(request)
        try:
            return await self._in_flight.run(self._answer(request))
        except asyncio.CancelledError:
            self._stats.dropped_cancelled += 1
            raise

    async def drain(self, timeout_s: float) -> int:
        given_up = await self._in_flight.drain(timeout_s)
        self._gate.close()
        return given_up

    async def close(self) -> bool:
        ended = await self._in_flight.close()
        self._gate.close()
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait((self._refreshing,))
        return ended

    async def _answer(self, request: InferenceRequest) -> Answer:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        until = math.inf if request.deadline is None else request.deadline
        patience = until if request.queue_timeout_s is None else min(until, begun + request.queue_timeout_s)
        if until <= begun:
            raise DeadlineExceededError("the deadline had passed before the request was queued")
        stats = self._stats
        stats.queued_requests += 1
        stats.queued_rows += request.rows
        stats.queued_bytes += request.nbytes
        waiting = True
        try:
            async with self._gate.place(request.priority, patience):
                waiting = self._begin(request)
                queue_s = loop.time() - begun
                try:
                    return await self._call(request, queue_s)
                finally:
                    stats.running -= 1
        finally:
            if waiting:
                self._leave_queue(request)

    def _no_rows(self, request: InferenceRequest) -> Answer:
        specs = [self._signature.output(name) for name in request.outputs]
        outputs: list[NDArray[Any]] = [
            np.empty((0, *(max(d, 0) for d in spec.shape[1:])), DTYPES[spec.datatype]) for spec in specs
        ]
        self._stats.answered(0, 0.0, 0.0, 0.0, 0.0)
        return Answer(outputs, 0.0, 0.0, 0.0, 0.0, 0)

    def _begin(self, request: InferenceRequest) -> bool:
        self._leave_queue(request)
        self._stats.running += 1
        return False

    def _leave_queue(self, request: InferenceRequest) -> None:
        stats = self._stats
        stats.queued_requests -= 1
        stats.queued_rows -= request.rows
        stats.queued_bytes -= request.nbytes

    async def _call(self, request: InferenceRequest, queue_s: float) -> Answer:
        signature, path, binary = self._signature, self._path, self._binary
        started = time.perf_counter()
        call = await self._encode(request, signature, path, binary)
        encoded = time.perf_counter()
        reply = await self._pool.send(call, self._lanes, request.deadline)
        answered = time.perf_counter()
        try:
            if not 200 <= reply.status < 300:
                raise self._refused(reply, "inference")
            outputs = await self._decode(request, signature, reply)
        except GatewayError as error:
            error.upstream_attempts = reply.attempts
            if isinstance(error, UpstreamError) and reply.status < 300:
                reply.lane.breaker.fail()  # who answers what is none is no better than who does not answer
            if isinstance(error, oip.SignatureMismatchError) or reply.status in (400, 404):
                self._refresh()
            raise
        split_s = time.perf_counter() - answered
        self._stats.ran(request.rows, encoded - started, answered - encoded, split_s)
        self._stats.answered(request.rows, queue_s, encoded - started, answered - encoded, split_s)
        return Answer(outputs, queue_s, encoded - started, answered - encoded, split_s, request.rows, reply.attempts)

    async def _encode(self, request: InferenceRequest, signature: Signature, path: str, binary: bool) -> Call:
        headers = dict(request.origin)
        if self._pool.spec.protocol == "openai":
            body = openai.encode_request(self._remote, request.inputs)
            return Call("POST", path, {**headers, "Content-Type": "application/json"}, (body,))
        arguments = (signature, request.inputs, request.outputs)
        said: dict[str, Any] = {
            "binary": binary,
            "priority": request.priority if self._priorities else 0,
            "name": headers.get("X-Request-Id", ""),
        }
        if request.nbytes > oip.LONG_BYTES and (not binary or _has_strings(request)):
            buffers, length = await asyncio.to_thread(oip.encode_request, *arguments, **said)
        else:
            buffers, length = oip.encode_request(*arguments, **said)
        headers["Content-Type"] = "application/json" if length is None else "application/octet-stream"
        if length is not None:
            headers["Inference-Header-Content-Length"] = str(length)
        return Call("POST", path, headers, buffers, tells_timeout=True)

    async def _decode(self, request: InferenceRequest, signature: Signature, reply: Reply) -> list[NDArray[Any]]:
        long = len(reply.body) > oip.LONG_BYTES
        if self._pool.spec.protocol == "openai":
            decode = openai.decode_answer
            found = (
                await asyncio.to_thread(decode, self._remote, reply.body, request.rows)
                if long
                else decode(self._remote, reply.body, request.rows)
            )
            return [found]
        rows = request.rows if signature.batched else None
        arguments = (
            signature, request.outputs, reply.body, reply.headers.get("inference-header-content-length"), rows,
        )  # fmt: skip
        if long:
            return await asyncio.to_thread(oip.decode_answer, *arguments)
        return oip.decode_answer(*arguments)

    def _refused(self, reply: Reply, what: str) -> GatewayError:
        """The error for an answer that is not what was asked for."""
        upstream, status = f"upstream '{self._remote.upstream}'", reply.status
        said = oip.read_error(reply.body)
        if status in _REFUSALS and what == "inference":
            return InvalidTensorError(f"{upstream} refused the request: {said or f'status {status}'}")
        if status in (401, 403):
            logger.error("%s does not take the gateway's secret: status %d", upstream, status)
            return UpstreamError(f"{upstream} does not let the gateway in")
        if status == 404:
            return UpstreamError(f"{upstream} does not have the model")
        if status in (408, 504):
            return DeadlineExceededError(f"{upstream} did not finish in time")
        return UpstreamError(f"{upstream} answered with status {status}")

    def _refresh(self) -> None:
        """Look at the upstream's metadata again: its model may be another one by now."""
        now = asyncio.get_running_loop().time()
        if (
            now - self._refreshed_at < REFRESH_INTERVAL_S
            or self._in_flight.draining
            or self._pool.spec.protocol != "oip"
        ):
            return
        self._refreshed_at = now
        self._refreshing = asyncio.create_task(self._look_again(now), name="inferway-remote-metadata")

    async def _look_again(self, now: float) -> None:
        before = self._signature
        try:
            await self.load(now + self._pool.spec.timeout_s)
        except GatewayError as error:
            logger.warning("%s: its metadata could not be read again: %s", self._name, error.message)
            return
        except Exception:
            logger.exception("%s: reading its metadata again failed unexpectedly", self._name)
            return
        if self._signature != before:
            logger.warning("%s: the upstream's model has other inputs or outputs now", self._name)


def load_error(name: str, version: int, error: GatewayError) -> ModelLoadError:
    return ModelLoadError(f"failed to load '{name}' version {version}: {error.message}")


def _has_strings(request: InferenceRequest) -> bool:
    return any(array.dtype.hasobject for array in request.inputs.values())
