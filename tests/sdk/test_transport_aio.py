"""What is special to the asynchronous transport: event loops, cancellation, its own httpx transport."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from typing import Any

import aiohttp
import httpx
import pytest
import uvloop
import yarl

import inferway
from inferway import AsyncInferway
from inferway._transport_aio import AsyncPieces, LeanAiohttpTransport, LeanRequest, aiohttp_translated
from scripted import KEY, Answer, ScriptedServer, as_json, plan


def pool_of(client: AsyncInferway) -> LeanAiohttpTransport:
    """The transport of the client's only pool, without a reference to what keeps the pool alive."""
    [pool] = client._engine.sender._pools.values()
    return pool[0]


def many_loops(server: ScriptedServer) -> AsyncInferway:
    server.serve_simple()
    return AsyncInferway(server.url)


def run_quietly(main: Any) -> None:
    """`asyncio.run` with every warning an error, and what is left over collected at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main)
        gc.collect()


def test_a_client_outlives_its_loop(server: ScriptedServer) -> None:
    client = many_loops(server)

    async def main() -> None:
        assert (await client.infer("simple", [1, 2]))["y"].tolist() == [[1, 2]]

    for _ in range(3):
        run_quietly(main())
    assert server.connections == 3
    assert len(client._engine.sender._pools) == 1, "pools of closed loops are let go"


def test_a_loop_that_ends_closes_its_pool(server: ScriptedServer) -> None:
    client = many_loops(server)
    seen: list[LeanAiohttpTransport] = []

    async def main() -> None:
        await client.infer("simple", [1, 2])
        transport = pool_of(client)
        seen.append(transport)

    run_quietly(main())
    assert seen[0].session.closed


def test_a_loop_that_is_closed_without_ceremony_is_let_go(server: ScriptedServer) -> None:
    client = many_loops(server)
    for _ in range(2):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(client.infer("simple", [1, 2]))
        loop.close()
    transport = pool_of(client)
    with warnings.catch_warnings():
        # asyncio itself complains of a transport that outlives its loop; aiohttp must have nothing to add.
        warnings.simplefilter("ignore", ResourceWarning)
        del client
        gc.collect()
    assert transport.session.closed


def test_a_dropped_client_closes_its_pool_on_its_own_loop(server: ScriptedServer) -> None:
    server.serve_simple()

    async def main() -> None:
        client = AsyncInferway(server.url)
        await client.infer("simple", [1, 2])
        transport = pool_of(client)
        del client
        gc.collect()
        async with asyncio.timeout(10):
            while not transport.session.closed:
                await asyncio.sleep(0)

    run_quietly(main())


def test_several_loops_at_once_have_a_pool_each(server: ScriptedServer) -> None:
    client = many_loops(server)
    together = threading.Barrier(3)
    wrong: list[BaseException] = []

    def work() -> None:
        async def main() -> None:
            for number in range(20):
                result = await client.infer("simple", [number, number])
                assert result["y"].tolist() == [[number, number]]
            together.wait(20)

        try:
            asyncio.run(main())
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert server.connections == 3


def test_closing_on_one_loop_closes_those_of_others_on_theirs(server: ScriptedServer) -> None:
    client = many_loops(server)
    ready, closed = threading.Event(), threading.Event()
    states: list[bool] = []

    def other() -> None:
        async def main() -> None:
            await client.infer("simple", [1, 2])
            transport = pool_of(client)
            ready.set()
            await asyncio.to_thread(closed.wait, 10)
            async with asyncio.timeout(10):
                while not transport.session.closed:
                    await asyncio.sleep(0)
            states.append(transport.session.closed)

        asyncio.run(main())

    thread = threading.Thread(target=other)
    thread.start()
    assert ready.wait(10)

    async def main() -> None:
        await client.infer("simple", [3, 4])
        await client.close()
        with pytest.raises(inferway.ClientClosedError):
            await client.infer("simple", [5, 6])

    asyncio.run(main())
    closed.set()
    thread.join()
    assert states == [True]


def test_a_client_may_be_closed_on_a_loop_that_never_used_it(server: ScriptedServer) -> None:
    client = many_loops(server)
    run_quietly(client.infer("simple", [1, 2]))
    run_quietly(client.close())


def test_uvloop_is_a_loop_like_others(server: ScriptedServer) -> None:
    client = many_loops(server)

    async def main() -> None:
        for _ in range(2):
            await client.infer("simple", [1, 2])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            uvloop.run(main())
        gc.collect()


def test_a_forked_child_leaves_its_parents_loop_alone(server: ScriptedServer) -> None:
    import os

    server.serve_simple()

    async def main() -> None:
        async with AsyncInferway(server.url) as client:
            await client.infer("simple", [1, 2])
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:  # pragma: no cover - the child
                try:
                    pools = len(client._engine.sender._pools)
                    gc.collect()
                    os.write(write, b"%d" % pools)
                finally:
                    os._exit(0)
            await asyncio.to_thread(os.waitpid, pid, 0)
            assert os.read(read, 10) == b"0"
            os.close(read)
            os.close(write)
            assert (await client.infer("simple", [3, 4]))["y"].tolist() == [[3, 4]]
        assert server.connections == 1

    asyncio.run(main())


async def test_a_cancelled_caller_closes_its_connection_and_nothing_else(server: ScriptedServer) -> None:
    server.script = [Answer(hang=True)]
    async with AsyncInferway(server.url) as client:
        task = asyncio.create_task(client.models.list())
        await asyncio.to_thread(server.hanging.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.closed.wait, 10), "the gateway learns that nobody waits"
        server.script = [as_json({"models": ["m"]})]
        assert await client.models.list() == ["m"]
        assert len(server.seen) == 2, "a cancelled call is not tried again"


async def test_a_callers_own_time_limit_is_not_taken_for_ours(server: ScriptedServer) -> None:
    server.script = [Answer(hang=True)]
    async with AsyncInferway(server.url) as client:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.1):
                await client.models.list()
        assert not isinstance(caught.value, inferway.APITimeoutError)


async def test_a_hundred_calls_at_once_come_back_to_their_callers(server: ScriptedServer) -> None:
    server.serve_simple()
    async with AsyncInferway(server.url, max_connections=16) as client:
        results = await asyncio.gather(*(client.infer("simple", [n, -n]) for n in range(100)))
        assert [result["y"].tolist() for result in results] == [[[n, -n]] for n in range(100)]
    assert server.connections <= 16


async def test_the_transport_serves_any_httpx_client(server: ScriptedServer) -> None:
    server.otherwise = lambda seen: Answer(body=seen.body, headers={"X-Echo": seen.headers.get("x-mine", "")})
    transport = LeanAiohttpTransport(server.url, 4)
    async with httpx.AsyncClient(transport=transport) as client:
        response = await client.post(f"{server.url}/echo", content=b"hello", headers={"X-Mine": "yes"})
        assert (response.status_code, response.content, response.headers["x-echo"]) == (200, b"hello", "yes")
        assert (await client.get(server.url)).content == b""
        for read in range(70):
            timeout = httpx.Timeout(5.0, read=5.0 + read)
            assert (await client.get(server.url, timeout=timeout)).status_code == 200
    assert transport.session.closed


async def test_a_lean_request_is_a_request() -> None:
    request = LeanRequest(
        "POST", httpx.URL("http://h/p"), yarl.URL("http://h/p"), [("A", "1"), ("a", "2")], b"body", {}
    )
    assert isinstance(request, httpx.Request)
    assert request.headers.get_list("a") == ["1", "2"]
    assert await request.aread() == b"body"
    assert request.method == "POST"
    with pytest.raises(AttributeError):
        _ = request.nothing


async def test_a_body_in_pieces_is_a_body_for_both_libraries() -> None:
    body = AsyncPieces((b"ab", memoryview(bytes(range(3)))))
    assert b"".join([bytes(piece) async for piece in body]) == b"ab\x00\x01\x02"
    assert body.size == 5
    assert body.decode() == "ab\x00\x01\x02"


@pytest.mark.parametrize(
    ("error", "sent", "timeout"),
    [
        (aiohttp.ConnectionTimeoutError("x"), False, True),
        (aiohttp.SocketTimeoutError("x"), True, True),
        (aiohttp.ServerDisconnectedError(), True, False),
        (aiohttp.ClientOSError("x"), True, False),
        (aiohttp.ClientPayloadError("x"), True, False),
        (aiohttp.InvalidURL("x"), False, False),
        (aiohttp.ClientError("x"), True, False),
    ],
)
def test_errors_of_aiohttp_become_ours(error: Exception, sent: bool, timeout: bool) -> None:
    found = aiohttp_translated(error, plan(api_key=KEY))
    assert isinstance(found, inferway.APIConnectionError)
    assert (found.sent, isinstance(found, inferway.APITimeoutError)) == (sent, timeout)


def test_other_errors_stay_what_they_are() -> None:
    assert aiohttp_translated(KeyError("x"), plan()) is None
