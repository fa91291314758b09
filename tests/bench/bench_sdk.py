"""What the SDK adds to the HTTP call that it makes.

A call of the SDK is recorded against a real gateway; then a bare server that answers every request with the recorded
bytes stands in for the gateway, so that only the client is measured. The bare clients send the very request that the
SDK sent, prepared beforehand, and read the whole answer. Processor time is this process's own, per call.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import ExitStack
from functools import partial

import aiohttp
import httpx
import httpx_aiohttp
import numpy as np
from harness import addsub, rivals
from harness.gateway import gateway
from harness.options import Options, main
from harness.paths import LOGS, MODELS
from harness.processes import BenchError, running
from harness.recorder import Exchange, recording
from harness.report import Check, Report, in_turn

from inferway import AsyncInferway, Inferway

IN_FLIGHT = 128
INPUTS = {
    "INPUT0": np.array([addsub.LEFT], np.int32),
    "INPUT1": np.array([addsub.RIGHT], np.int32),
}
WANTED_SYNC_CPU, WANTED_ASYNC_RATE = 1.3, 0.7


def run(options: Options) -> Report:
    report = Report("sdk")
    repository = MODELS / "http-repository"
    addsub.write_model(repository / "addsub" / "1" / "model.onnx")
    with gateway(repository, "Inferway sdk") as ours:
        key = ours.key
        exchanges = _record(ours.server.port, key)
    call = next(one for one in reversed(exchanges) if one.path.endswith("/infer"))
    report.note(
        f"the recorded call: {call.method} {call.path}, {len(call.body)} bytes out, {len(call.reply.body)} back"
    )
    replies = MODELS / "replies.json"
    replies.write_text(json.dumps({f"{one.method} {one.path}": _reply(one) for one in exchanges}))
    with running("replay", rivals.uvicorn_echo("echo:replay", {"REPLIES": str(replies)}), LOGS) as server:
        base = f"http://127.0.0.1:{server.port}"
        _sync(base, key, call, options, report)
        _asynchronous(base, key, call, options, report)
    return report


def _record(port: int, key: str) -> list[Exchange]:
    with recording(port) as recorder, Inferway(base_url=f"http://127.0.0.1:{recorder.port}", api_key=key) as client:
        for _ in range(2):  # the first may also ask for the signature
            _check(client.infer("addsub", INPUTS))
        return list(recorder.seen)


def _check(result: Mapping[str, object]) -> None:
    if not np.array_equal(np.asarray(result["OUTPUT0"])[0], addsub.TOTAL):
        raise BenchError(f"the SDK gave {result!r}")


def _reply(one: Exchange) -> dict[str, object]:
    # The server that replays writes these two itself.
    headers = {name: value for name, value in one.reply.headers.items() if name not in ("date", "server")}
    return {"status": one.reply.status, "headers": headers, "body": one.reply.body.hex()}


def _bare_headers(call: Exchange) -> dict[str, str]:
    return {name: value for name, value in call.headers.items() if name not in ("host", "content-length")}


def _sync(base: str, key: str, call: Exchange, options: Options, report: Report) -> None:
    url, headers = base + call.path, _bare_headers(call)
    with ExitStack() as stack:
        bare = stack.enter_context(httpx.Client())
        transport = stack.enter_context(httpx.HTTPTransport())
        client = stack.enter_context(Inferway(base_url=base, api_key=key))
        handle = client.model("addsub")
        _check(client.infer("addsub", INPUTS))
        _check(handle.infer(INPUTS))

        def transport_only() -> bytes:
            return transport.handle_request(httpx.Request("POST", url, headers=headers, content=call.body)).read()

        calls: dict[str, Callable[[], object]] = {
            "bare httpx": lambda: bare.post(url, content=call.body, headers=headers).content,
            "bare httpx transport": transport_only,
            "client.infer": lambda: client.infer("addsub", INPUTS),
            "client.model(...).infer": lambda: handle.infer(INPUTS),
        }
        for one in calls.values():
            _repeat(one, 0.5)
        seen = in_turn(
            {name: partial(_repeat, one, options.seconds) for name, one in calls.items()},
            options.rounds,
            report,
        )
    floor = seen["bare httpx"]
    rows = [
        [
            name,
            values["per_s"].text(),
            values["cpu_us"].text(),
            f"{values['cpu_us'].median / floor['cpu_us'].median:.2f}×",
            f"{values['p50_us'].median:,.0f}",
        ]
        for name, values in seen.items()
    ]
    report.table(
        "Synchronous, one thread, one call at a time", ["client", "calls/s", "CPU µs/call", "of bare", "p50 µs"], rows
    )
    for name in ("client.infer", "client.model(...).infer"):
        ratio = seen[name]["cpu_us"].median / floor["cpu_us"].median
        report.check(Check(f"CPU of {name} over bare httpx", ratio, WANTED_SYNC_CPU, at_least=False))


def _repeat(call: Callable[[], object], seconds: float) -> Mapping[str, float]:
    times = []
    used, started = time.process_time(), time.perf_counter()
    end = now = started
    limit = started + seconds
    while now < limit:
        call()
        end = time.perf_counter()
        times.append(end - now)
        now = end
    return {
        "per_s": len(times) / (end - started),
        "cpu_us": (time.process_time() - used) / len(times) * 1e6,
        "p50_us": sorted(times)[len(times) // 2] * 1e6,
    }


def _asynchronous(base: str, key: str, call: Exchange, options: Options, report: Report) -> None:
    url, headers = base + call.path, _bare_headers(call)

    async def bare_aiohttp() -> Mapping[str, float]:
        connector = aiohttp.TCPConnector(limit=IN_FLIGHT)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one() -> None:
                async with session.post(url, data=call.body, headers=headers) as response:
                    await response.read()

            return await _fan_out(one, options.seconds)

    async def bare_httpx() -> Mapping[str, float]:
        limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:

            async def one() -> None:
                await client.post(url, content=call.body, headers=headers)

            return await _fan_out(one, options.seconds)

    async def httpx_over_aiohttp() -> Mapping[str, float]:
        limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
        transport = httpx_aiohttp.AiohttpTransport(limits=limits)
        async with httpx.AsyncClient(transport=transport, timeout=30) as client:

            async def one() -> None:
                await client.post(url, content=call.body, headers=headers)

            return await _fan_out(one, options.seconds)

    async def sdk() -> Mapping[str, float]:
        async with AsyncInferway(base_url=base, api_key=key) as client:
            _check(await client.infer("addsub", INPUTS))
            return await _fan_out(lambda: client.infer("addsub", INPUTS), options.seconds)

    programs = {
        "bare aiohttp": bare_aiohttp,
        "AsyncInferway.infer": sdk,
        "httpx over httpx-aiohttp": httpx_over_aiohttp,
        "bare httpx": bare_httpx,
    }
    seen = in_turn(
        {name: partial(_run, program) for name, program in programs.items()},
        options.rounds,
        report,
    )
    floor = seen["bare aiohttp"]
    rows = [
        [
            name,
            values["per_s"].text(),
            f"{values['per_s'].median / floor['per_s'].median:.2f}×",
            values["cpu_us"].text(),
            f"{values['p50_ms'].median:.1f}",
            f"{values['p99_ms'].median:.1f}",
        ]
        for name, values in seen.items()
    ]
    report.table(
        f"Asynchronous, {IN_FLIGHT} calls in flight, the standard event loop",
        ["client", "calls/s", "of bare aiohttp", "CPU µs/call", "p50 ms", "p99 ms"],
        rows,
    )
    ratio = seen["AsyncInferway.infer"]["per_s"].median / floor["per_s"].median
    report.check(
        Check(f"calls/s of AsyncInferway at {IN_FLIGHT} in flight over bare aiohttp", ratio, WANTED_ASYNC_RATE)
    )


def _run(program: Callable[[], Coroutine[None, None, Mapping[str, float]]]) -> Mapping[str, float]:
    return asyncio.run(program())


async def _fan_out(call: Callable[[], Awaitable[object]], seconds: float) -> Mapping[str, float]:
    times: list[float] = []

    async def caller(limit: float) -> None:
        now = time.perf_counter()
        while now < limit:
            await call()
            end = time.perf_counter()
            times.append(end - now)
            now = end

    async def window(length: float) -> float:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(caller(started + length))
        return time.perf_counter() - started

    await window(0.5)  # connections are made
    times.clear()
    used = time.process_time()
    elapsed = await window(seconds)
    used = time.process_time() - used
    times.sort()
    return {
        "per_s": len(times) / elapsed,
        "cpu_us": used / len(times) * 1e6,
        "p50_ms": times[len(times) // 2] * 1e3,
        "p99_ms": times[int(len(times) * 0.99)] * 1e3,
    }


if __name__ == "__main__":
    main(run, __doc__ or "")
