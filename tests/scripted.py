"""For tests of the SDK: a server that follows a script, a clock that does not wait, both clients behind one face."""

from __future__ import annotations

import asyncio
import inspect
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inferway import AsyncInferway, Clock, Inferway, RequestOptions, RetryPolicy, Timeout
from inferway._core import Call, Config, Plan, json_call

SIMPLE_METADATA = {
    "name": "simple",
    "versions": ["1"],
    "platform": "onnxruntime_onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    "properties": {"row_exact": "true", "row_exactness": "exact"},
}


@dataclass
class Seen:
    """A request that the server got. Header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        length = self.headers.get("inference-header-content-length")
        return json.loads(self.body[: int(length)] if length else self.body)


@dataclass
class Answer:
    """What the server does with one request.

    Attributes:
        raw: sent as it is instead of a response, and then the connection is closed.
        hang: nothing is sent until the server ends.
        drip: bytes that are sent after the head one at a time, a hundred a second, for ever.
        before: called before anything is sent.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    hang: bool = False
    drip: bytes | None = None
    before: Callable[[Seen], object] | None = None


def as_json(value: object, status: int = 200, **headers: str) -> Answer:
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **names})


def as_error(status: int, code: str, message: str = "no", **headers: str) -> Answer:
    return as_json({"error": message, "code": code, "request_id": "from-gateway"}, status, **headers)


def as_outputs(*tensors: tuple[str, str, list[int], bytes], **members: object) -> Answer:
    """A binary inference response."""
    outputs = [
        {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(data)}}
        for name, datatype, shape, data in tensors
    ]
    head = json.dumps({"model_name": "simple", "model_version": "1", "outputs": outputs, **members}).encode()
    body = head + b"".join(data for *_, data in tensors)
    return Answer(200, body, {"Inference-Header-Content-Length": str(len(head))})


class ScriptedServer:
    """An HTTP server on a port of its own, in a thread of its own, that answers from a script.

    ``script`` is used up first; after it `otherwise` decides. Requests are kept in ``seen``.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.seen: list[Seen] = []
        self.script: list[Answer] = []
        self.otherwise: Callable[[Seen], Answer] = lambda _: Answer(404)
        self.connections = 0
        self.cuts: list[int] = []
        """For each of the next uploads (PUT): how many bytes of its body are taken before the connection breaks."""
        self.stalls = False
        """Uploads (PUT) are begun and then not read any further, with the connection open."""
        self.cut_short: Callable[[Seen], object] = lambda _: None
        """Told of such an upload, with what came of it."""
        self.closed = threading.Event()
        """Set when a client has closed a connection whose request hangs."""
        self.hanging = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)

    def _run(self, started: threading.Event) -> None:
        self._loop.run_until_complete(self._start())
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}"

    async def _end(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        length = int(headers.get("content-length", "0"))
        if method == "PUT" and self.stalls:
            await asyncio.Event().wait()
        if method == "PUT" and self.cuts:
            seen = Seen(method, path, headers, await reader.readexactly(min(length, self.cuts.pop(0))))
            self.seen.append(seen)
            self.cut_short(seen)
            writer.transport.abort()
            return False
        seen = Seen(method, path, headers, await reader.readexactly(length))
        self.seen.append(seen)
        answer = self.script.pop(0) if self.script else self.otherwise(seen)
        if answer.before is not None:
            answer.before(seen)
        if answer.hang:
            self.hanging.set()
            await reader.read(1)
            self.closed.set()
            return False
        if answer.raw is not None:
            writer.write(answer.raw)
            await writer.drain()
            return False
        lines = [f"HTTP/1.1 {answer.status} Reason", *(f"{name}: {value}" for name, value in answer.headers.items())]
        if "content-length" not in {name.lower() for name in answer.headers}:
            lines.append(f"Content-Length: {len(answer.body) if answer.drip is None else 10**9}")
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + answer.body)
        await writer.drain()
        while answer.drip is not None:
            writer.write(answer.drip)
            await writer.drain()
            await asyncio.sleep(0.01)
        return True

    def serve_simple(self) -> None:
        """Answer as a gateway with the model ``simple``, which gives its input back as ``y``."""

        def otherwise(seen: Seen) -> Answer:
            if seen.method == "GET":
                return as_json(SIMPLE_METADATA)
            head = seen.json
            data = seen.body[int(seen.headers["inference-header-content-length"]) :]
            return as_outputs(("y", "FP32", head["inputs"][0]["shape"], data))

        self.otherwise = otherwise


class FakeClock:
    """Time that passes when somebody sleeps, and chance that is always ``chance`` of the way up."""

    def __init__(self, chance: float = 1.0) -> None:
        self.now = 1000.0
        self.wall = 1_700_000_000.0
        self.slept: list[float] = []
        self.bounds: list[tuple[float, float]] = []
        self.chance = chance

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)

    def uniform(self, low: float, high: float) -> float:
        self.bounds.append((low, high))
        return low + (high - low) * self.chance

    def clock(self) -> Clock:
        return Clock(
            monotonic=lambda: self.now,
            wall=lambda: self.wall,
            sleep=self.sleep,
            sleep_async=self.sleep_async,
            uniform=self.uniform,
        )


class Side:
    """One of the two clients. Calling it calls a function and awaits what comes, if that is to be awaited."""

    def __init__(self, kind: Literal["sync", "async"]) -> None:
        self.kind = kind
        self._made: list[Any] = []

    def client(self, base_url: str | None = None, **arguments: Any) -> Any:
        made = (Inferway if self.kind == "sync" else AsyncInferway)(base_url, **arguments)
        self._made.append(made)
        return made

    async def __call__(self, function: Callable[[], Any]) -> Any:
        found = function()
        return await found if inspect.isawaitable(found) else found

    async def all(self, iterable: Any) -> list[Any]:
        if hasattr(iterable, "__aiter__"):
            return [item async for item in iterable]
        return list(iterable)

    async def end(self) -> None:
        for made in self._made:
            closing: Awaitable[None] | None = made.close()
            if closing is not None:
                await closing


KEY = "ifw_test_0123456789ab_" + "s" * 49


def config(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "base_url": "http://gateway",
        "host": "gateway",
        "api_key": KEY,
        "timeout": Timeout(total=10),
        "retry": RetryPolicy(),
        "default_headers": {},
        "max_response_bytes": 1000,
        "clock": FakeClock().clock(),
    }
    return Config(**{**values, **changes})


def plan(call: Call[Any] | None = None, options: RequestOptions | None = None, **changes: Any) -> Plan:
    made = Plan(config(**changes), call or json_call("GET", "/v2", lambda reply: reply), options or {})
    made.attempt = 1
    return made
