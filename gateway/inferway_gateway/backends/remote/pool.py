"""One upstream: its endpoints, which of them gets a request, and what happens when that fails.

**Choice.** Of two endpoints drawn by weight the one with fewer requests outstanding for its weight gets the request
(power of two choices): nearly as even as looking at all of them, and gateways that do not know of each other do not all
run to the same one. An endpoint that is down by the health probe is taken only when no other is left. A version's own
breaker, or a Retry-After that the endpoint gave it, takes the endpoint out altogether.

**Retries.** Connections that broke, 502, 503, 429 and attempts that took too long are tried again on another endpoint,
a few times, within the caller's deadline and the upstream's retry budget; only a broken connection may be tried again
on the same endpoint where there is no other one. Whoever called is told not to try again himself, so that retries of
several layers do not multiply.

**Trust.** Nothing that an upstream sends is believed: no redirect is followed, lengths are counted, compression is not
undone. The upstream's secret goes to its endpoints and nowhere else, the caller's key goes nowhere.

Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001); Envoy, "Load balancing".
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol
from weakref import WeakSet

import aiohttp
import httpx
import tenacity

from ...core.errors import DeadlineExceededError, GatewayError, ModelFailingError, UpstreamError
from ...core.upstream import EndpointSpec, EndpointStats, UpstreamSpec, UpstreamStats
from .breaker import Breaker
from .budget import RetryBudget
from .transport import Buffer, Pieces, UpstreamTransport, tls_context

logger = logging.getLogger("inferway.upstreams")

RETRY_STATUSES: Final = frozenset({429, 502, 503})
BREAKING_STATUSES: Final = frozenset({502, 503, 504})
RETRY_DELAY_S: Final = 0.025
HANG_S: Final = 1.0
"""An attempt that had no answer for so long when its caller's time ended tells of the endpoint; a shorter one of the
caller's haste."""
MAX_HOPS: Final = 8
"""Gateways that a request may go through. More is a circle, in which one request would keep all of them busy until its
time is over."""
_DOWN_AFTER: Final = 2
"""Failed probes in a row after which an endpoint counts as down."""
NETWORK_ERRORS: Final = (aiohttp.ClientError, OSError, httpx.TransportError, httpx.InvalidURL)
"""What a call may raise, ``TimeoutError`` aside, which is an ``OSError`` and means another thing."""


class Reader(Protocol):
    """Reads an answer as it comes."""

    async def begin(self) -> None:
        """Read until something of it is there; from then on nothing is tried again. Raises ``CallError``."""
        ...


@dataclass(slots=True)
class Call:
    """What is asked of an upstream, the same at each endpoint.

    Attributes:
        path: appended to the endpoint's URL.
        headers: beside those that the pool adds: the secret, lengths, ``Inferway-Timeout-Ms``.
        body: buffers, sent one after the other.
        tells_timeout: say in ``Inferway-Timeout-Ms`` how long the gateway waits.
        reader: makes what reads a successful answer as it comes, from its headers and its bytes; None: it is read
            as a whole. May raise ``CallError``.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Sequence[Buffer] = ()
    tells_timeout: bool = False
    reader: Callable[[httpx.Headers, AsyncIterator[bytes]], Reader] | None = None


@dataclass(slots=True)
class Reply:
    """A whole answer, with a status that is not tried again.

    Attributes:
        attempts: calls that were made for it, those that the endpoints say they made themselves included.
        rest: of an answer that is read as it comes, of which only the beginning is there. Whoever has it ends it.
    """

    status: int
    headers: httpx.Headers
    body: bytearray
    lane: Lane
    attempts: int = 1
    rest: Rest | None = None


class Rest:
    """What is still to come of an answer; it counts as outstanding at its endpoint until its end."""

    def __init__(self, response: httpx.Response, reader: Reader, settle: Callable[[str, bool | None], None]) -> None:
        self.reader = reader
        self._response = response
        self._settle = settle

    async def end(self, outcome: str, failed: bool | None) -> None:
        """The last of it was read, or is not wanted: then the connection is closed.

        Args:
            outcome: one of ``CALL_OUTCOMES``.
            failed: what it tells of the endpoint; None: nothing.
        """
        self._settle(outcome, failed)
        await self._response.aclose()


class CallError(Exception):
    """One attempt failed."""

    def __init__(self, outcome: str, words: str, *, retryable: bool, made: int = 1, broken: bool = False) -> None:
        super().__init__(words)
        self.outcome = outcome
        self.retryable = retryable
        self.made = made
        self.broken = broken


class Endpoint:
    """One server of an upstream, shared by all versions that are there."""

    __slots__ = ("failed_probes", "spec", "stats")

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec = spec
        self.stats = EndpointStats(spec.label)
        self.failed_probes = 0

    @property
    def load(self) -> float:
        return (self.stats.outstanding + 1) / self.spec.weight


class Lane:
    """One endpoint as one version sees it: a model that fails there says nothing of the others."""

    __slots__ = ("__weakref__", "breaker", "endpoint", "rest_until")

    def __init__(self, endpoint: Endpoint, breaker: Breaker) -> None:
        self.endpoint = endpoint
        self.breaker = breaker
        self.rest_until = 0.0
        """Until when the endpoint asked, by Retry-After, to be left alone."""


class UpstreamPool:
    """The endpoints of one upstream. ``async with`` opens and closes it.

    Args:
        clock: seconds; None takes the running loop's.
        chance: where chance is needed.
    """

    def __init__(
        self,
        spec: UpstreamSpec,
        *,
        clock: Callable[[], float] | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self.spec = spec
        self._context = tls_context(spec)
        self._endpoints = [Endpoint(endpoint) for endpoint in spec.endpoints]
        self._stats = UpstreamStats(spec.name, [endpoint.stats for endpoint in self._endpoints])
        self._given_clock = clock
        self._chance = chance or random.Random()  # noqa: S311  # balances load, hides nothing
        self._lanes: WeakSet[Lane] = WeakSet()
        self._secret: dict[str, str] = {}
        if spec.secret is not None:
            self._secret[spec.secret_header] = f"{spec.secret_scheme} {spec.secret.value}".strip()

    async def __aenter__(self) -> UpstreamPool:
        self._clock = self._given_clock or asyncio.get_running_loop().time
        self._budget = RetryBudget(self.spec.retry_ratio, self.spec.retry_floor_per_s, self._clock)
        self._transport = UpstreamTransport(self.spec, self._context)
        self._probing = (
            asyncio.create_task(self._probe(), name=f"inferway-upstream-{self.spec.name}")
            if self.spec.health_path
            else None
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])
        await self._transport.aclose()

    @property
    def stats(self) -> UpstreamStats:
        for endpoint in self._endpoints:
            endpoint.stats.open_breakers = 0
        for lane in self._lanes:
            if lane.breaker.state != "closed":
                lane.endpoint.stats.open_breakers += 1
        return self._stats

    def lanes(self) -> list[Lane]:
        """The endpoints for one version."""
        spec = self.spec
        made = [
            Lane(
                endpoint,
                Breaker(
                    spec.breaker_failures,
                    spec.breaker_open_s,
                    spec.breaker_max_open_s,
                    self._chance.random,
                    self._clock,
                ),
            )
            for endpoint in self._endpoints
        ]
        self._lanes.update(made)
        return made

    def wait_s(self, lanes: Sequence[Lane]) -> float:
        """Seconds until the first of ``lanes`` takes requests again; 0 where one does now."""
        now = self._clock()
        return min(max(lane.breaker.wait_s(), lane.rest_until - now, 0.0) for lane in lanes)

    async def send(self, call: Call, lanes: Sequence[Lane], deadline: float | None) -> Reply:
        """Ask one endpoint after the other until one answers.

        Args:
            lanes: of the version that asks.
            deadline: moment on the pool's clock when the answer has to be there; None: each attempt has its time.
        Returns:
            An answer of any status but those that are tried again, such as a refusal with status 400.
        Raises:
            ModelFailingError: no endpoint takes requests now; none was asked.
            UpstreamError: none answered.
            DeadlineExceededError: the deadline came first.
        """
        if _hops(call) > MAX_HOPS:
            raise UpstreamError(
                f"the request came through {MAX_HOPS} gateways already: the models of upstream '{self.spec.name}' and "
                "of this gateway are each other's"
            )
        rules = _Rules(self, lanes, deadline)
        try:
            try:
                reply = await self._attempt(call, rules.next_lane(), deadline)
            except CallError as error:
                reply = await self._retried(error, rules, call, deadline)
            reply.attempts += rules.made
            return reply
        except CallError as error:
            raise self._told(rules, error) from error
        except GatewayError as error:
            error.upstream_attempts = max(rules.made, len(rules.tried))
            raise
        finally:
            if rules.tried:
                self._stats.requests += 1

    async def _retried(self, first: CallError, rules: _Rules, call: Call, deadline: float | None) -> Reply:
        """Go on after the failure ``first``. The loop starts with it as the outcome of its attempt 1, so that a request
        that succeeds at once pays nothing for the machinery."""

        async def attempt() -> Reply:
            if loop.statistics["attempt_number"] == 1:
                raise first
            return await self._attempt(call, rules.next_lane(), deadline)

        loop = tenacity.AsyncRetrying(
            retry=rules.retry, wait=rules.wait, stop=rules.stop, before_sleep=rules.again, reraise=True
        )
        return await loop(attempt)

    def _told(self, rules: _Rules, error: CallError) -> GatewayError:
        why = f"upstream '{self.spec.name}' {error}"
        if rules.made > 1:
            why += f", after {rules.made} attempts"
        if rules.note:
            why += f"; not tried again: {rules.note}"
        told = UpstreamError(why)
        told.upstream_attempts = rules.made
        return told

    def pick(self, lanes: Sequence[Lane], leave_out: Sequence[Lane] = ()) -> Lane | None:
        """The endpoint for the next attempt; None where none takes requests."""
        now = self._clock()
        able = [lane for lane in lanes if lane not in leave_out and lane.breaker.allows and lane.rest_until <= now]
        able = [lane for lane in able if lane.endpoint.stats.healthy] or able
        if len(able) < 2:
            return able[0] if able else None
        weights = [lane.endpoint.spec.weight for lane in able]
        first = self._chance.choices(range(len(able)), weights)[0]
        weights[first] = 0.0
        second = self._chance.choices(range(len(able)), weights)[0]
        one, other = able[first], able[second]
        return one if one.endpoint.load <= other.endpoint.load else other

    async def _attempt(self, call: Call, lane: Lane, deadline: float | None) -> Reply:
        """One call of one endpoint, with everything that is to be learnt from its end."""
        spec, stats = self.spec, lane.endpoint.stats
        started = self._clock()
        left = float("inf") if deadline is None else deadline - started
        limit_s = min(spec.timeout_s, left)
        if limit_s <= 0:
            raise DeadlineExceededError("the request's time was over before the upstream could be asked")
        lane.breaker.begin()
        stats.outstanding += 1
        settled = False
        outcome = "cancelled"
        failed: bool | None = None  # None: it tells nothing of the endpoint
        try:
            try:
                async with asyncio.timeout(limit_s):
                    reply = await self._exchange(call, lane, limit_s)
            except TimeoutError:
                failed = True if self._clock() - started >= min(HANG_S, spec.timeout_s) else None
                outcome = "timeout"
                if left <= spec.timeout_s:
                    raise DeadlineExceededError("the upstream did not answer within the request's time") from None
                raise CallError("timeout", f"did not answer within {spec.timeout_s:g} s", retryable=True) from None
            except NETWORK_ERRORS as error:
                failed = True
                outcome, words = broken(error)
                raise CallError(outcome, words, retryable=outcome == "broken", broken=True) from error
            except CallError as error:
                failed = True
                outcome = error.outcome
                raise
            outcome, failed = self._judge(reply, lane, started, left)
            retry = reply.headers.get("x-should-retry", "").lower()
            wanted = (reply.status in RETRY_STATUSES and retry != "false") or (reply.status >= 500 and retry == "true")
            if wanted or reply.status in RETRY_STATUSES:
                words = f"answered with status {reply.status}"
                raise CallError(outcome, words, retryable=wanted, made=_made(reply))
            reply.attempts = _made(reply)
            if reply.rest is not None:
                settled = True  # when it ends
                if lane.breaker.state != "closed":
                    lane.breaker.succeed()  # the trial is over: the others need not wait for the end of a long answer
            return reply
        finally:
            if not settled:
                self._settle(lane, outcome, failed)

    def _settle(self, lane: Lane, outcome: str, failed: bool | None) -> None:
        """A call is over; ``failed`` is what it tells of its endpoint, None where it tells nothing."""
        stats = lane.endpoint.stats
        stats.outstanding -= 1
        stats.outcomes[outcome] += 1
        if failed is None:
            lane.breaker.leave()
        elif failed:
            before = lane.breaker.state
            lane.breaker.fail()
            if before != "open" and lane.breaker.state == "open":
                logger.warning("upstream '%s': %s is left alone for a while", self.spec.name, stats.label)
        else:
            lane.breaker.succeed()

    async def _exchange(self, call: Call, lane: Lane, limit_s: float) -> Reply:
        headers = {**call.headers, "Accept-Encoding": "identity", **self._secret}
        if call.tells_timeout:
            headers["Inferway-Timeout-Ms"] = str(max(1, int(limit_s * 1000)))
        response = await self._transport.handle_async_request(
            httpx.Request(
                call.method,
                lane.endpoint.spec.url + call.path,
                headers=headers,
                stream=Pieces(call.body) if call.body else httpx.ByteStream(b""),
            )
        )
        rest: Rest | None = None
        try:
            coding = response.headers.get("content-encoding", "identity").lower()
            if coding != "identity":
                raise CallError("failed", "answered compressed, which was not asked for", retryable=False)
            if call.reader is not None and 200 <= response.status_code < 300:
                body = aiter(response.stream)  # type: ignore[arg-type]  # asynchronous by its transport
                reader = call.reader(response.headers, body)
                await reader.begin()
                rest = Rest(response, reader, partial(self._settle, lane))
                return Reply(response.status_code, response.headers, bytearray(), lane, rest=rest)
            return Reply(response.status_code, response.headers, await self._read(response), lane)
        finally:
            if rest is None:
                await response.aclose()

    async def _read(self, response: httpx.Response) -> bytearray:
        limit = self.spec.max_response_bytes
        declared = response.headers.get("content-length", "")
        body = bytearray()
        too_long = declared.isdigit() and int(declared) > limit
        if not too_long:
            async for piece in response.stream:  # type: ignore[union-attr]  # asynchronous by its transport
                body += piece
                if len(body) > limit:
                    too_long = True
                    break
        if too_long:
            raise CallError("failed", f"answered with more than {limit} bytes", retryable=False)
        return body

    def _judge(self, reply: Reply, lane: Lane, started: float, left: float) -> tuple[str, bool | None]:
        """What a whole answer is counted as, and what it tells the breaker."""
        status = reply.status
        if status in (429, 503):
            rest = _seconds(reply.headers.get("retry-after", ""))
            if rest is not None:
                lane.rest_until = self._clock() + min(rest, self.spec.max_retry_after_s)
            return "overloaded", status == 503 or None
        if status == 504 and left <= self.spec.timeout_s and self._clock() - started < HANG_S:
            return "timeout", None
        if status in BREAKING_STATUSES:
            return "timeout" if status == 504 else "failed", True
        if status >= 500 or status < 200:
            return "failed", None
        if status >= 400:
            return "refused", False
        return ("ok", False) if status < 300 else ("failed", None)

    async def _probe(self) -> None:
        """Ask every endpoint for its health, for ever."""
        while True:
            await asyncio.gather(*(self._probe_one(endpoint) for endpoint in self._endpoints))
            await asyncio.sleep(self.spec.health_interval_s * (0.9 + 0.2 * self._chance.random()))

    async def _probe_one(self, endpoint: Endpoint) -> None:
        lane = Lane(endpoint, Breaker(1, 0.0, 0.0, self._chance.random, self._clock))
        well = False
        try:
            async with asyncio.timeout(self.spec.health_timeout_s):
                reply = await self._exchange(Call("GET", self.spec.health_path), lane, self.spec.health_timeout_s)
            well = reply.status < 500  # whoever refuses the question is there
        except (TimeoutError, aiohttp.ClientError, OSError, httpx.TransportError, CallError):
            pass
        except Exception:
            logger.exception("upstream '%s': probing %s failed unexpectedly", self.spec.name, endpoint.spec.label)
        endpoint.failed_probes = 0 if well else endpoint.failed_probes + 1
        self._stats.probes_failed += not well
        healthy = endpoint.failed_probes < _DOWN_AFTER
        if healthy != endpoint.stats.healthy:
            endpoint.stats.healthy = healthy
            words = "answers again" if healthy else "does not answer its health probe"
            logger.warning("upstream '%s': %s %s", self.spec.name, endpoint.spec.label, words)


class _Rules:
    """The questions that tenacity asks after each attempt, answered for one request."""

    def __init__(self, pool: UpstreamPool, lanes: Sequence[Lane], deadline: float | None) -> None:
        self._pool = pool
        self._lanes = lanes
        self._deadline = deadline
        self._next: Lane | None = None
        self.tried: list[Lane] = []
        self.made = 0
        """Calls so far, those that the endpoints made themselves included."""
        self.note = ""

    def next_lane(self) -> Lane:
        lane = self._next
        if lane is None or not lane.breaker.allows:
            lane = self._pool.pick(self._lanes, self.tried)
        self._next = None
        if lane is None and self.made:
            raise CallError("failed", "failed, and no other endpoint takes requests now", retryable=False, made=0)
        if lane is None:
            wait_s = self._pool.wait_s(self._lanes)
            raise ModelFailingError(
                f"no endpoint of upstream '{self._pool.spec.name}' takes requests now", retry_after_s=max(wait_s, 0.1)
            )
        if not self.tried:
            self._pool._budget.deposit()  # not before: who is turned away here makes no room for retries of others
        self.tried.append(lane)
        return lane

    def retry(self, state: tenacity.RetryCallState) -> bool:
        error = _error(state)
        if not isinstance(error, CallError):
            return False
        self.made += error.made
        return error.retryable

    def wait(self, state: tenacity.RetryCallState) -> float:
        return self._pool._chance.uniform(0.0, RETRY_DELAY_S * 2.0 ** (state.attempt_number - 1))

    def stop(self, state: tenacity.RetryCallState) -> bool:
        # Asked after `wait`, so that the delay is known; the budget is asked last, because asking takes from it.
        pool, error = self._pool, _error(state)
        if state.attempt_number >= pool.spec.attempts:
            return True
        if self._deadline is not None and state.upcoming_sleep >= self._deadline - pool._clock():
            self.note = "the request's time is over"
            return True
        self._next = pool.pick(self._lanes, self.tried)
        if self._next is None and isinstance(error, CallError) and error.broken and len(self._lanes) == 1:
            self._next = pool.pick(self._lanes)
        if self._next is None:
            self.note = "no other endpoint takes requests"
            return True
        if not pool._budget.withdraw():
            self.note = "the upstream's retry budget is spent"
            pool._stats.budget_exhausted += 1
            return True
        return False

    def again(self, _: tenacity.RetryCallState) -> None:
        self._pool._stats.retries += 1


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


def broken(error: Exception) -> tuple[str, str]:
    """How a call that did not end is counted, and in words without addresses."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return "broken", "could not be connected to: its certificate is not trusted"
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return "broken", "could not be connected to"
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | OSError):
        return "broken", "broke off before its answer was complete"
    return "failed", "did not answer in HTTP"


def _made(reply: Reply) -> int:
    """Calls behind one answer: an endpoint that is a gateway itself says how many it made."""
    said = reply.headers.get("inferway-upstream-attempts", "")
    return min(int(said), 100) if said.isascii() and said.isdigit() and len(said) <= 3 and int(said) else 1


def _hops(call: Call) -> int:
    """How many gateways the request will have come through where it is sent."""
    said = call.headers.get("Inferway-Hops", "")
    return int(said) if said.isascii() and said.isdigit() and len(said) <= 3 else 0


def _seconds(text: str) -> float | None:
    """Retry-After in seconds; the form with a date is not worth a dependence on the clocks of both."""
    return float(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
