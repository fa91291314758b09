"""Starting: addresses, sockets, the lifespan's failure, what a process is allowed."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from inferway_gateway.server.policy import DrainPolicy, EdgeLimits
from inferway_gateway.server.serve import EdgeServer, _allow_files, bind, bind_unix, serve
from raw_edge import WAIT_S, Client, echo, with_lifespan

REQUEST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
AT_ONCE = DrainPolicy(delay_s=0, idle_grace_s=0, timeout_s=1)


def test_port_0_binds_one_free_port_on_every_address_of_a_name() -> None:
    bound = bind("localhost", 0)
    try:
        assert {listener.getsockname()[1] for listener in bound} == {bound[0].getsockname()[1]}
        assert bound[0].getsockname()[1] != 0
    finally:
        for listener in bound:
            listener.close()


def test_an_address_in_use_is_an_error_and_leaves_nothing_open() -> None:
    (first,) = bind("127.0.0.1", 0)
    with first:
        first.listen()
        with pytest.raises(OSError, match="in use"):
            bind("127.0.0.1", first.getsockname()[1])


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(OSError, match=r"not known|resolution|No address"):
        bind("no-such-host.invalid", 0)


def test_a_unix_socket_nobody_listens_on_is_replaced_and_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bind_unix(path).close()
    assert path.is_socket()
    with bind_unix(path) as listener:
        listener.listen()
        with pytest.raises(OSError, match="listens"):
            bind_unix(path)
    other = tmp_path / "file"
    other.write_text("precious")
    with pytest.raises(FileExistsError):
        bind_unix(other)
    assert other.read_text() == "precious"


async def test_serve_reports_its_port_answers_and_ends_when_it_is_cancelled() -> None:
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(with_lifespan(echo), ready=ready.set_result, drain=AT_ONCE))
    async with asyncio.timeout(WAIT_S):
        port = await ready
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        assert (await reader.readuntil(b"\r\n\r\nhi")).startswith(b"HTTP/1.1 200")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_sockets_that_are_given_are_served_and_left_to_those_who_share_them() -> None:
    (listener,) = bind("127.0.0.1", 0)
    shared = listener.dup()  # what a supervisor would go on holding
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    began: list[str] = []
    server = EdgeServer(
        with_lifespan(echo),
        limits=EdgeLimits(),
        drain=AT_ONCE,
        on_drain=lambda: began.append("drain"),
        sockets=[listener],
        own_sockets=False,
        ready=ready.set_result,
    )
    task = asyncio.create_task(server.run_until_stopped())
    async with asyncio.timeout(WAIT_S):
        port = await ready
        server.stop()
        await task
        assert began == ["drain"]
        # It still takes connections, for whoever comes next: no filter was left on it.
        await asyncio.to_thread(lambda: socket.create_connection(("127.0.0.1", port)).close())
        shared.close()


async def test_a_lifespan_that_fails_ends_the_start(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no models"})

    ready: list[int] = []
    task = asyncio.ensure_future(_exit_code(serve(app, ready=ready.append)))
    assert await task == 3
    assert ready == []
    assert "no models" in caplog.text


async def _exit_code(work: Any) -> Any:
    try:
        await work
    except SystemExit as end:
        return end.code


def test_a_server_in_another_thread_needs_no_signals() -> None:
    found: list[int] = []
    ready = threading.Event()
    server: list[EdgeServer] = []

    def started(port: int) -> None:
        found.append(port)
        ready.set()

    async def main() -> None:
        sockets = bind("127.0.0.1", 0)
        server.append(
            EdgeServer(
                with_lifespan(echo),
                limits=EdgeLimits(),
                drain=AT_ONCE,
                on_drain=lambda: None,
                sockets=sockets,
                ready=started,
            )
        )
        loops.append(asyncio.get_running_loop())
        await server[0].run_until_stopped()

    loops: list[asyncio.AbstractEventLoop] = []
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(WAIT_S)
    with Client(("127.0.0.1", found[0])) as client:
        client.send(REQUEST)
        assert client.read().body == b"hi"
    loops[0].call_soon_threadsafe(server[0].stop)
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_files_are_allowed_as_far_as_the_hard_limit_goes() -> None:
    program = (
        "import resource, logging, sys\n"
        "from inferway_gateway.server.serve import _allow_files\n"
        "logging.basicConfig(format='%(message)s')\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))\n"
        "_allow_files(200); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "_allow_files(150); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "_allow_files(4000); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["200", "200", "300"]
    assert "expected to be allowed 4000 open files, got 300" in done.stderr


def test_files_that_are_allowed_already_stay_so() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    _allow_files(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
