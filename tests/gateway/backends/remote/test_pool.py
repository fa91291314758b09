from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import pytest

from batching_fakes import virtually
from inferway_gateway.backends.remote.pool import Call, UpstreamPool
from inferway_gateway.core.errors import DeadlineExceededError, GatewayError, UpstreamError
from inferway_gateway.core.upstream import EndpointSpec, UpstreamSpec

CALL = Call("POST", "/infer", body=(b"x",))


class Network:
    """Endpoints without sockets: ``answer`` says what each call of one comes to."""

    def __init__(self, answer: Callable[[str], Any]) -> None:
        self.answer = answer
        self.calls: list[str] = []
        self.busy: dict[str, int] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        self.calls.append(host)
        self.busy[host] = self.busy.get(host, 0) + 1
        try:
            found = self.answer(host)
            if asyncio.iscoroutine(found):
                found = await found
        finally:
            self.busy[host] -= 1
        if isinstance(found, Exception):
            raise found
        status, headers = found if isinstance(found, tuple) else (found, {})
        return httpx.Response(status, headers=headers, content=b"{}")

    async def aclose(self) -> None:
        pass


@asynccontextmanager
async def opened(
    answer: Callable[[str], Any], *weights: float, seed: int = 0, **options: Any
) -> AsyncIterator[tuple[UpstreamPool, Network]]:
    endpoints = tuple(EndpointSpec(f"http://e{i}", f"e{i}", weight) for i, weight in enumerate(weights or (1.0, 1.0)))
    spec = UpstreamSpec("up", "oip", endpoints, **options)
    async with UpstreamPool(spec, chance=random.Random(seed)) as pool:
        real, network = pool._transport, Network(answer)
        await real.aclose()
        pool._transport = network  # type: ignore[assignment]  # answers like one
        yield pool, network


def test_requests_are_shared_by_weight() -> None:
    async def work() -> dict[str, int]:
        async def answer(_: str) -> int:
            await asyncio.sleep(0.1)
            return 200

        async with opened(answer, 3.0, 1.0) as (pool, network):
            lanes = pool.lanes()

            async def one(delay: float) -> None:
                await asyncio.sleep(delay)
                await pool.send(CALL, lanes, None)

            await asyncio.gather(*(one(i * 0.002) for i in range(1000)))
            return {host: network.calls.count(host) for host in set(network.calls)}

    shares = virtually(work)
    assert 0.65 <= shares["e0"] / 1000 <= 0.85, shares


def test_of_two_the_one_with_less_to_do_is_asked() -> None:
    async def work() -> tuple[int, int]:
        async def answer(host: str) -> int:
            await asyncio.sleep(1.0 if host == "e0" else 0.01)
            return 200

        async with opened(answer) as (pool, network):
            lanes = pool.lanes()

            async def one(delay: float) -> None:
                await asyncio.sleep(delay)
                await pool.send(CALL, lanes, None)

            await asyncio.gather(*(one(i * 0.01) for i in range(500)))
            return network.calls.count("e0"), network.calls.count("e1")

    slow, fast = virtually(work)
    assert slow < fast / 5


def test_an_endpoint_that_is_down_by_its_probe_is_asked_only_when_there_is_no_other() -> None:
    async def work() -> None:
        async with opened(lambda _: 200) as (pool, network):
            lanes = pool.lanes()
            lanes[0].endpoint.stats.healthy = False
            for _ in range(20):
                await pool.send(CALL, lanes, None)
            assert set(network.calls) == {"e1"}
            lanes[1].endpoint.stats.healthy = False
            for _ in range(20):
                await pool.send(CALL, lanes, None)
            assert set(network.calls) == {"e0", "e1"}

    virtually(work)


def test_probes_tell_when_an_endpoint_goes_and_comes() -> None:
    async def work() -> None:
        down = {"e0"}

        def answer(host: str) -> Any:
            return aiohttp.ClientConnectionError("no") if host in down else 404

        async with opened(answer, health_path="/live", health_interval_s=1.0) as (pool, _):
            await asyncio.sleep(5)
            assert [endpoint.healthy for endpoint in pool.stats.endpoints] == [False, True]
            assert pool.stats.probes_failed >= 2
            down.clear()
            await asyncio.sleep(5)
            assert [endpoint.healthy for endpoint in pool.stats.endpoints] == [True, True]

    virtually(work)


def test_a_failing_model_keeps_no_other_model_from_its_endpoint() -> None:
    async def work() -> None:
        status = 503
        async with opened(lambda _: (status, {"Retry-After": "9"}), 1.0) as (pool, _):
            mine, theirs = pool.lanes(), pool.lanes()
            with pytest.raises(UpstreamError):
                await pool.send(CALL, mine, None)
            assert pool.wait_s(mine) == 9
            assert pool.wait_s(theirs) == 0

    virtually(work)


def test_a_caller_in_a_hurry_tells_nothing_against_an_endpoint() -> None:
    async def work() -> None:
        async def answer(_: str) -> int:
            await asyncio.sleep(0.5)
            return 200

        async with opened(answer, 1.0, breaker_failures=1) as (pool, _):
            lanes = pool.lanes()
            with pytest.raises(DeadlineExceededError) as caught:
                await pool.send(CALL, lanes, asyncio.get_running_loop().time() + 0.1)
            assert caught.value.upstream_attempts == 1
            assert lanes[0].breaker.state == "closed"
            assert (await pool.send(CALL, lanes, None)).status == 200

    virtually(work)


def test_an_endpoint_that_hangs_is_found_although_callers_have_less_time_than_it_is_given() -> None:
    async def work() -> None:
        async with opened(lambda _: asyncio.sleep(math.inf), 1.0, breaker_failures=3) as (pool, _):
            lanes = pool.lanes()
            for _ in range(3):
                with pytest.raises(DeadlineExceededError):
                    await pool.send(CALL, lanes, asyncio.get_running_loop().time() + 2.0)
            assert lanes[0].breaker.state == "open"
            assert pool.stats.endpoints[0].open_breakers == 1
            assert pool.stats.endpoints[0].outstanding == 0

    virtually(work)


class Brown:
    """An upstream of two endpoints that is unwell from second 30 to 60."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.coin = random.Random(1)

    async def __call__(self, _: str) -> Any:
        await asyncio.sleep(0.02)
        if not 30 <= asyncio.get_running_loop().time() < 60:
            return 200
        match self.how:
            case "half-overloaded":
                return 503 if self.coin.random() < 0.5 else 200
            case "overloaded":
                return 503
            case "says-when":
                return 429, {"Retry-After": "2"}
            case "refuses":
                return aiohttp.ClientConnectionError("refused")
            case "mostly-hangs":
                await asyncio.sleep(math.inf if self.coin.random() < 0.8 else 0)
                return 200
        raise AssertionError(self.how)


@pytest.mark.parametrize("how", ["half-overloaded", "overloaded", "says-when", "refuses", "mostly-hangs"])
def test_thirty_seconds_of_trouble_are_not_made_worse(how: str) -> None:
    """Callers that try what they are told to try again, up to four times, make at most 1.2 calls a request, and ten
    seconds after the trouble nobody notices anything any more."""

    async def work() -> tuple[int, int, int, int]:
        requests = calls = served = late_failures = 0
        async with opened(Brown(how), timeout_s=5.0) as (pool, network):
            lanes = pool.lanes()
            loop = asyncio.get_running_loop()

            async def caller(chance: random.Random) -> None:
                nonlocal requests, calls, served, late_failures
                await asyncio.sleep(chance.random())
                while loop.time() < 80:
                    begun = loop.time()
                    before = 30 <= begun < 60
                    made = 0
                    done = False
                    for attempt in range(4):
                        try:
                            made += (await pool.send(CALL, lanes, loop.time() + 10)).attempts
                            done = True
                            break
                        except GatewayError as error:
                            made += error.upstream_attempts
                            if not error.retryable:
                                break
                            wait_s = max(1, math.ceil(error.retry_after_s or 1)) if error.code == "model_failing" else 0
                            await asyncio.sleep(wait_s + chance.uniform(0, 0.5 * 2**attempt))
                    if before:
                        requests += 1
                        calls += made
                        served += done
                    elif begun >= 70 and not done:
                        late_failures += 1
                    await asyncio.sleep(chance.expovariate(0.5))

            await asyncio.gather(*(caller(random.Random(i)) for i in range(200)))
            outcomes = sum(sum(endpoint.outcomes.values()) for endpoint in pool.stats.endpoints)
            assert outcomes == len(network.calls)
            assert all(count == 0 for count in network.busy.values())
        return requests, calls, served, late_failures

    requests, calls, _, late_failures = virtually(work)
    assert requests > 200
    assert calls <= 1.2 * requests, (calls, requests)
    assert late_failures == 0


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("per_s", [0.5, 1, 5, 50])
def test_trouble_is_not_made_worse_for_an_upstream_of_few_requests(per_s: float, share: float) -> None:
    """What quiet times save up, and what is granted by the second, is little where requests are few, too."""

    async def work() -> tuple[int, int]:
        requests = calls = 0
        coin = random.Random(1)

        async def answer(_: str) -> Any:
            await asyncio.sleep(0.02)
            return 503 if 60 <= asyncio.get_running_loop().time() < 90 and coin.random() < share else 200

        async with opened(answer) as (pool, _):
            lanes = pool.lanes()
            loop = asyncio.get_running_loop()

            async def ask() -> None:
                nonlocal requests, calls
                during = 60 <= loop.time() < 90
                try:
                    made = (await pool.send(CALL, lanes, loop.time() + 10)).attempts
                except GatewayError as error:
                    made = error.upstream_attempts
                if during:
                    requests += 1
                    calls += made

            chance = random.Random(2)
            async with asyncio.TaskGroup() as asking:
                while loop.time() < 90:
                    asking.create_task(ask())
                    await asyncio.sleep(chance.expovariate(per_s))
        return requests, calls

    requests, calls = virtually(work)
    assert requests >= 10
    assert calls <= 1.2 * requests, (calls, requests)
