"""The end of a server, in a process of its own: whoever sent a request gets its answer."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from inferway_gateway.server.serve import _take_no_more
from raw_edge import WAIT_S

PROGRAM = """
import asyncio, logging, sys, time
from inferway_gateway.server.policy import DrainPolicy, EdgeLimits
from inferway_gateway.server.serve import run

logging.basicConfig(level="INFO", stream=sys.stderr, format="%(message)s")
draining = False
started = 0

async def app(scope, receive, send):
    global started
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                print("lifespan ended", file=sys.stderr, flush=True)
                return
    message = await receive()
    if scope["path"] == "/slow":
        started += 1
        await asyncio.sleep(float(message["body"]))
    elif scope["path"] == "/block":
        print("blocked", file=sys.stderr, flush=True)
        time.sleep(float(message["body"]))
    elif scope["path"] == "/never":
        started += 1
        await asyncio.Event().wait()
    body = b"draining" if draining else b"%d" % started
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

def on_drain():
    global draining
    draining = True
    print("drain begins", file=sys.stderr, flush=True)

run(
    app,
    on_drain=on_drain,
    ready=lambda port: print(f"port {port}", file=sys.stderr, flush=True),
    fast=(lambda scope: scope["path"] == "/") if FAST else None,
    limits=EdgeLimits(tick_s=0.05, connections=2000),
    drain=DrainPolicy(**POLICY),
    **OPTIONS,
)
print("over", file=sys.stderr, flush=True)
"""


@dataclass
class Server:
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    port: int = 0
    reader: threading.Thread | None = None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit status, once everything that was logged is in ``log``."""
        status = self.process.wait(WAIT_S)
        assert self.reader is not None
        self.reader.join(WAIT_S)
        return status


@contextmanager
def server(policy: dict[str, float], *, fast: bool = True, options: dict[str, str] | None = None) -> Iterator[Server]:
    program = (
        PROGRAM.replace("FAST", repr(fast)).replace("POLICY", repr(policy)).replace("OPTIONS", repr(options or {}))
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    found = Server(process)
    ready = threading.Event()

    def follow() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            found.log.append(line.rstrip())
            if match := re.fullmatch(r"port (\d+)\n", line):
                found.port = int(match[1])
                ready.set()
        ready.set()

    reader = found.reader = threading.Thread(target=follow)
    reader.start()
    try:
        assert ready.wait(WAIT_S)
        assert process.poll() is None, "\n".join(found.log)
        yield found
    finally:
        process.kill()
        process.wait()
        reader.join(WAIT_S)
        assert process.stderr is not None
        process.stderr.close()


def request(path: str = "/", body: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


class Lost(Exception):
    """A request was sent on a connection that had not said it would close, and no answer came."""


class Keeper:
    """A client that keeps its connection and calls again and again, as pools do."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers = 0
        self.closes = 0
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def call(self, path: str = "/", body: str = "") -> bytes | None:
        """The answer's body; None where the server takes no connections any more."""
        if self.reader is None:
            try:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            except ConnectionError:
                return None
        assert self.writer is not None
        try:
            self.writer.write(request(path, body))
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]  # always there
            answer = await self.reader.readexactly(length)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise Lost(f"{path} after {self.answers} answers: {error!r}") from None
        self.answers += 1
        if b"connection: close" in head:
            self.closes += 1
            await self.close()
        return answer

    async def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            with suppress(ConnectionError):
                await self.writer.wait_closed()
        self.reader = self.writer = None

    async def forever(self) -> None:
        while await self.call() is not None:
            pass


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "task"])
@pytest.mark.parametrize("run", range(2))
async def test_no_request_is_lost_when_a_busy_server_is_told_to_stop(fast: bool, run: int) -> None:
    policy = {"delay_s": 0.3, "idle_grace_s": 8, "timeout_s": 8}
    with server(policy, fast=fast) as found:
        busy = [Keeper(found.port) for _ in range(64)]
        slow = [Keeper(found.port) for _ in range(200)]
        idle = [Keeper(found.port) for _ in range(20)]
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
            for keeper in idle:
                await keeper.call()
            loops = [group.create_task(keeper.forever()) for keeper in busy]
            waits = [group.create_task(keeper.call("/slow", "1.0")) for keeper in slow]
            while await busy_probe(found.port) != b"200":
                pass
            found.signal(signal.SIGTERM)
            while "drain begins" not in found.log:
                await asyncio.sleep(0.01)
            # Connections that slept so far wake up at different moments of the drain, within their grace.
            late = [group.create_task(after(0.03 * i, keeper.call())) for i, keeper in enumerate(idle)]
        assert all(task.result() is not None for task in waits)
        assert all(task.result() is not None for task in late)
        assert all(task.done() for task in loops)
        assert all(keeper.closes >= 1 for keeper in busy + slow + idle)
        assert await asyncio.to_thread(found.wait) == 0
        assert "lifespan ended" in found.log
        assert found.log[-1] == "over"
        assert not [line for line in found.log if "Traceback" in line or ("ended" in line and "requests" in line)]


async def test_connections_that_only_the_kernel_has_taken_are_served_too() -> None:
    with server({"delay_s": 0, "idle_grace_s": 0, "timeout_s": 8}) as found:
        first = Keeper(found.port)
        blocking = asyncio.create_task(first.call("/block", "0.5"))
        while "blocked" not in found.log:
            await asyncio.sleep(0.01)
        # The loop stands still: the signal and all of these reach it together.
        found.signal(signal.SIGTERM)
        keepers = [Keeper(found.port) for _ in range(100)]
        calls = [asyncio.create_task(keeper.call()) for keeper in keepers]
        assert await blocking == b"0"
        assert all(await asyncio.gather(*calls))
        assert await asyncio.to_thread(found.wait) == 0
        for keeper in (first, *keepers):
            await keeper.close()


def test_a_listener_that_takes_no_more_keeps_what_it_has() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address) as taken:
            _take_no_more(listener)
            with socket.socket() as late:
                late.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    late.connect(address)
            accepted, _ = listener.accept()
            with accepted:
                taken.sendall(b"still")
                assert accepted.recv(5) == b"still"
                accepted.sendall(b"works")
                assert taken.recv(5) == b"works"


async def busy_probe(port: int) -> bytes | None:
    keeper = Keeper(port)
    try:
        return await keeper.call()
    finally:
        await keeper.close()


async def after(seconds: float, call: object) -> bytes | None:
    await asyncio.sleep(seconds)
    return await call  # type: ignore[misc,no-any-return]  # a coroutine of Keeper.call


async def test_while_it_waits_a_draining_server_answers_newcomers_and_says_so() -> None:
    with server({"delay_s": 3, "idle_grace_s": 3, "timeout_s": 5}) as found:
        found.signal(signal.SIGTERM)
        while "drain begins" not in found.log:
            await asyncio.sleep(0.01)
        keeper = Keeper(found.port)
        assert await keeper.call() == b"draining"
        assert keeper.closes == 1
        found.signal(signal.SIGTERM)  # a second one: at once
        assert await asyncio.to_thread(found.wait) == 0
        assert "lifespan ended" in found.log


async def test_a_second_signal_ends_requests_at_work_at_once() -> None:
    with server({"delay_s": 0, "idle_grace_s": 0, "timeout_s": 60}) as found:
        keeper = Keeper(found.port)
        waiting = asyncio.create_task(keeper.call("/never"))
        while await busy_probe(found.port) != b"1":
            pass
        found.signal(signal.SIGTERM)
        while "drain begins" not in found.log:
            await asyncio.sleep(0.01)
        assert not waiting.done()
        begun = time.monotonic()
        found.signal(signal.SIGINT)
        assert b"shutting_down" in (await waiting or b"")
        assert await asyncio.to_thread(found.wait) == 0
        assert time.monotonic() - begun < 3
        assert any("ended 1 requests" in line for line in found.log)
        await keeper.close()


async def test_the_time_limit_ends_what_does_not_end_itself() -> None:
    with server({"delay_s": 0, "idle_grace_s": 0, "timeout_s": 0.3}) as found:
        keeper = Keeper(found.port)
        waiting = asyncio.create_task(keeper.call("/never"))
        while await busy_probe(found.port) != b"1":
            pass
        begun = time.monotonic()
        found.signal(signal.SIGTERM)
        assert b"shutting_down" in (await waiting or b"")
        assert await asyncio.to_thread(found.wait) == 0
        assert 0.3 <= time.monotonic() - begun < 3
        await keeper.close()


async def test_ctrl_c_does_not_wait_for_load_balancers() -> None:
    policy = {"delay_s": 60, "idle_grace_s": 60, "timeout_s": 5, "interactive_grace_s": 0.2}
    with server(policy) as found:
        keeper, idle = Keeper(found.port), Keeper(found.port)
        await idle.call()
        waiting = asyncio.create_task(keeper.call("/slow", "0.5"))
        while await busy_probe(found.port) != b"1":
            pass
        begun = time.monotonic()
        found.signal(signal.SIGINT)
        assert await waiting == b"draining"
        assert await asyncio.to_thread(found.wait) == 0
        assert time.monotonic() - begun < 3
        await keeper.close()
        await idle.close()


async def test_a_unix_socket_is_removed_before_the_last_connections_are_served(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    with server({"delay_s": 0, "idle_grace_s": 0, "timeout_s": 5}, options={"uds": str(path)}) as found:
        assert found.port == 0
        assert path.stat().st_mode & 0o777 == 0o660
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(request("/slow", "0.5"))
        second_reader, second = await asyncio.open_unix_connection(str(path))
        second.write(request())
        await second_reader.readuntil(b"\r\n\r\n1")
        second.close()
        found.signal(signal.SIGTERM)
        assert b"draining" in await reader.read()
        assert await asyncio.to_thread(found.wait) == 0
        assert not path.exists()
        writer.close()


def test_writing_to_a_caller_that_is_gone_does_not_end_the_server() -> None:
    with server({"delay_s": 0, "idle_grace_s": 0, "timeout_s": 5}) as found:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", found.port)) as client:
                client.sendall(request("/slow", "0.01") * 3)
        with socket.create_connection(("127.0.0.1", found.port), timeout=WAIT_S) as client:
            client.sendall(request())
            assert client.recv(15) == b"HTTP/1.1 200 OK"
        os.kill(found.process.pid, signal.SIGTERM)
        assert found.wait() == 0
