from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from inferway_gateway.backends.remote import RemoteBackend
from inferway_gateway.backends.remote.executor import RemoteExecutor
from inferway_gateway.core.batcher import InferenceRequest
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.upstream import EndpointSpec, RemoteSpec, UpstreamSpec
from scripted import SIMPLE_METADATA, Answer, ScriptedServer, Seen, as_json, as_outputs

SERVER = {"name": "scripted", "version": "1", "extensions": ["binary_tensor_data"]}


def answer_simply(seen: Seen) -> Answer:
    """A server with the model "simple", which gives its input back as ``y``."""
    if seen.path == "/v2":
        return as_json(SERVER)
    if seen.method == "GET":
        return as_json(SIMPLE_METADATA)
    data = seen.body[int(seen.headers["inference-header-content-length"]) :]
    return as_outputs(("y", "FP32", seen.json["inputs"][0]["shape"], data))


class Remote:
    """An executor for the model "simple" of scripted servers."""

    def __init__(self, executor: RemoteExecutor, servers: list[ScriptedServer], stats: ModelStats) -> None:
        self.executor = executor
        self.servers = servers
        self.stats = stats

    @property
    def calls(self) -> list[Seen]:
        """The inference requests that came."""
        return [seen for server in self.servers for seen in server.seen if seen.path.endswith("/infer")]


Open = Callable[..., Any]


@pytest.fixture
def servers() -> Iterator[Callable[[int], list[ScriptedServer]]]:
    """Makes so many scripted servers."""
    made: list[ScriptedServer] = []

    def make(count: int) -> list[ScriptedServer]:
        new = [ScriptedServer() for _ in range(count)]
        for server in new:
            server.otherwise = answer_simply
        made.extend(new)
        return new

    yield make
    for server in made:
        server.stop()


@pytest.fixture
async def remote(servers: Callable[[int], list[ScriptedServer]]) -> AsyncIterator[Open]:
    """Opens a ``Remote`` over so many servers; keyword arguments are members of ``UpstreamSpec``."""
    async with AsyncExitStack() as stack:

        async def open_(count: int = 1, spec: RemoteSpec | None = None, **options: Any) -> Remote:
            made = servers(count)
            upstream = UpstreamSpec(
                "up",
                "oip",
                tuple(EndpointSpec(server.url, f"127.0.0.1:{server.port}") for server in made),
                retry_floor_per_s=0.0,
                timeout_s=5.0,
            )
            backend = await stack.enter_async_context(RemoteBackend([replace(upstream, **options)]))
            stats = ModelStats()
            executor = await backend.open("mine", 1, spec or RemoteSpec("up", "simple"), stats)
            stack.push_async_callback(executor.close)
            return Remote(executor, made, stats)

        yield open_


def request(rows: int = 1, **members: Any) -> InferenceRequest:
    x = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    return InferenceRequest({"x": x}, ("y",), rows, x.nbytes, **members)
