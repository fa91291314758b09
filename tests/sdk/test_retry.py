"""Which failures are tried again, after how long, within which budget; against a real server and a clock of our own."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import inferway
from inferway import RetryEvent, RetryPolicy, Timeout
from inferway._core import Call
from inferway._retry import delay_s, may_retry
from scripted import Answer, FakeClock, ScriptedServer, Side, as_error, as_json, plan

LIVE = as_json({"models": ["m"]})


def broken() -> Answer:
    """The connection ends before an answer."""
    return Answer(raw=b"")


@pytest.mark.parametrize(
    "failure",
    [
        as_error(503, "queue_full"),
        as_error(503, "model_not_ready"),
        as_error(503, "shutting_down"),
        as_error(408, "request_timeout"),
        Answer(429),
        Answer(502, b"<html>bad gateway</html>"),
        Answer(503),
        Answer(504),
        as_error(500, "internal", X_Should_Retry="true"),
        broken(),
        Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhalf"),
        Answer(raw=b"garbage that is no HTTP\r\n\r\n"),
    ],
)
async def test_a_failure_that_may_pass_is_tried_again(
    side: Side, server: ScriptedServer, time: FakeClock, failure: Answer
) -> None:
    server.script = [failure, failure, LIVE]
    client = side.client(server.url, clock=time.clock())
    assert await side(lambda: client.models.list()) == ["m"]
    assert len(server.seen) == 3
    assert time.slept == [0.5, 1.0]


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (as_error(400, "malformed_request"), inferway.BadRequestError),
        (as_error(401, "unauthenticated"), inferway.AuthenticationError),
        (as_error(403, "permission_denied"), inferway.PermissionDeniedError),
        (as_error(404, "model_not_found"), inferway.ModelNotFoundError),
        (as_error(409, "conflict"), inferway.ConflictError),
        (as_error(413, "payload_too_large"), inferway.PayloadTooLargeError),
        (as_error(500, "internal"), inferway.InternalServerError),
        (as_error(500, "model_failed"), inferway.ModelFailedError),
        (as_error(501, "unsupported"), inferway.UnsupportedError),
        (as_error(504, "deadline_exceeded", X_Should_Retry="false"), inferway.DeadlineExceededError),
        (as_error(503, "queue_full", X_Should_Retry="false"), inferway.QueueFullError),
        (Answer(302, headers={"Location": "http://127.0.0.1:1/"}), inferway.APIStatusError),
        (Answer(200, b"<html>"), inferway.APIResponseValidationError),
    ],
)
async def test_a_failure_that_stays_is_raised_at_once(
    side: Side, server: ScriptedServer, time: FakeClock, failure: Answer, error: type[Exception]
) -> None:
    server.script = [failure]
    client = side.client(server.url, clock=time.clock())
    with pytest.raises(error) as caught:
        await side(lambda: client.models.list())
    assert type(caught.value) is error
    assert len(server.seen) == 1
    assert time.slept == []


async def test_a_connection_that_cannot_be_made_is_tried_again(side: Side, time: FakeClock) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = side.client(f"http://127.0.0.1:{port}", clock=time.clock())
    with pytest.raises(inferway.APIConnectionError, match=r"could not connect to http://127\.0\.0\.1") as caught:
        await side(lambda: client.models.list())
    error = caught.value
    assert (error.attempts, error.sent, error.retryable, error.status_code) == (3, False, True, None)
    assert error.elapsed == 1.5
    assert error.request_id
    assert len(time.slept) == 2


async def test_the_last_failure_is_the_one_that_is_raised(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.script = [broken(), as_error(503, "queue_full"), as_error(503, "model_not_ready", "loading")]
    client = side.client(server.url, clock=time.clock())
    with pytest.raises(inferway.ModelNotReadyError, match=r"loading \(503 model_not_ready, 3 attempts") as caught:
        await side(lambda: client.models.list())
    assert (caught.value.attempts, caught.value.retryable, caught.value.elapsed) == (3, True, 1.5)


async def test_every_attempt_of_a_call_has_the_same_ids(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.script = [as_error(503, "queue_full"), broken(), as_json([])]
    client = side.client(server.url, clock=time.clock(), timeout=60)
    await side(lambda: client.models.index())
    first, second, third = (seen.headers for seen in server.seen)
    for name in ("idempotency-key", "x-request-id"):
        assert first[name] == second[name] == third[name]
    assert "inferway-attempt" not in first
    assert (second["inferway-attempt"], third["inferway-attempt"]) == ("2", "3")
    assert [int(seen.headers["inferway-timeout-ms"]) for seen in server.seen] == [60_000, 59_500, 58_500]
    assert [seen.body for seen in server.seen] == [b'{"ready":false}'] * 3


async def test_a_call_that_must_not_happen_twice_is_only_repeated_when_it_did_not_happen(
    side: Side, server: ScriptedServer, time: FakeClock
) -> None:
    client = side.client(server.url, clock=time.clock())
    for once in (broken(), Answer(502), Answer(504)):
        server.script = [once]
        with pytest.raises(inferway.APIError) as caught:
            await side(lambda: client.keys.create("n", ["infer"]))
        assert caught.value.attempts == 1
    for refused in (
        Answer(429),
        Answer(503),
        as_error(503, "store_unavailable"),
        Answer(502, headers={"X-Should-Retry": "true"}),
    ):
        server.script = [refused, Answer(400)]
        with pytest.raises(inferway.BadRequestError) as caught:
            await side(lambda: client.keys.create("n", ["infer"]))
        assert caught.value.attempts == 2


# --- Retry-After -------------------------------------------------------------------------------------------------


async def test_retry_after_is_waited_for_with_jitter_on_top(
    side: Side, server: ScriptedServer, time: FakeClock
) -> None:
    date = format_datetime(datetime.fromtimestamp(time.wall + 7, UTC), usegmt=True)
    server.script = [
        as_error(503, "queue_full", Retry_After="3"),
        as_error(503, "queue_full", Retry_After=date),
        LIVE,
    ]
    client = side.client(server.url, clock=time.clock())
    await side(lambda: client.models.list())
    assert time.slept == [3.5, 7.5]


async def test_a_retry_after_beyond_the_ceiling_raises_instead_of_sleeping(
    side: Side, server: ScriptedServer, time: FakeClock
) -> None:
    server.script = [as_error(503, "queue_full", Retry_After="31")]
    client = side.client(server.url, clock=time.clock())
    with pytest.raises(inferway.QueueFullError) as caught:
        await side(lambda: client.models.list())
    assert (caught.value.attempts, caught.value.retry_after) == (1, 31.0)
    assert caught.value.__notes__ == [
        "not tried again: Retry-After is 31 s, more than RetryPolicy.max_retry_after_s, 30 s"
    ]
    assert time.slept == []


async def test_a_retry_after_that_is_nonsense_is_ignored(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.script = [as_error(503, "queue_full", Retry_After="soon"), LIVE]
    client = side.client(server.url, clock=time.clock())
    await side(lambda: client.models.list())
    assert time.slept == [0.5]


# --- time --------------------------------------------------------------------------------------------------------


async def test_a_delay_beyond_the_calls_time_is_not_begun(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.script = [as_error(503, "queue_full"), as_error(503, "queue_full"), LIVE]
    client = side.client(server.url, clock=time.clock(), timeout=1.2)
    with pytest.raises(inferway.QueueFullError) as caught:
        await side(lambda: client.models.list())
    assert caught.value.attempts == 2
    assert caught.value.elapsed == 0.5
    assert "the call's time is over" in caught.value.__notes__[0]
    assert time.slept == [0.5]


async def test_without_a_limit_attempts_end_a_call(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.script = [as_error(503, "queue_full")] * 5
    client = side.client(server.url, clock=time.clock(), timeout=None)
    with pytest.raises(inferway.QueueFullError):
        await side(lambda: client.models.list())
    assert time.slept == [0.5, 1.0]


@given(st.integers(1, 200), st.floats(0, 1))
def test_a_delay_is_drawn_from_zero_to_its_bound(attempt: int, chance: float) -> None:
    time = FakeClock(chance)
    made = plan(clock=time.clock(), retry=RetryPolicy(base_delay_s=0.5, max_delay_s=8))
    delay = delay_s(inferway.APIConnectionError("x"), attempt, made)
    bound = min(8.0, 0.5 * 2.0 ** min(attempt - 1, 64))
    assert time.bounds == [(0.0, bound)]
    assert 0 <= delay <= bound


# --- policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retry", [None, RetryPolicy(attempts=1)])
async def test_retries_can_be_switched_off(
    side: Side, server: ScriptedServer, time: FakeClock, retry: RetryPolicy | None
) -> None:
    server.script = [as_error(503, "queue_full")] * 2
    client = side.client(server.url, clock=time.clock(), retry=retry)
    with pytest.raises(inferway.QueueFullError):
        await side(lambda: client.models.list())
    with pytest.raises(inferway.QueueFullError):
        await side(lambda: client.with_options(retry=RetryPolicy()).models.list(retry=None))
    assert len(server.seen) == 2


async def test_a_policy_names_its_own_statuses_and_attempts(
    side: Side, server: ScriptedServer, time: FakeClock
) -> None:
    server.script = [Answer(500), Answer(500), Answer(500), LIVE]
    client = side.client(server.url, clock=time.clock())
    policy = RetryPolicy(attempts=4, statuses=frozenset({500}), base_delay_s=0)
    assert await side(lambda: client.models.list(retry=policy)) == ["m"]
    server.script = [Answer(503)]
    with pytest.raises(inferway.ServiceUnavailableError):
        await side(lambda: client.models.list(retry=policy))


async def test_a_gateway_in_trouble_is_not_buried_by_retries(
    side: Side, server: ScriptedServer, time: FakeClock
) -> None:
    server.otherwise = lambda _: as_error(503, "queue_full")
    policy = RetryPolicy(budget_ratio=0.1, budget_floor_per_s=0, base_delay_s=0)
    client = side.client(server.url, clock=time.clock(), retry=policy)
    for _ in range(100):
        with pytest.raises(inferway.QueueFullError) as caught:
            await side(lambda: client.models.list())
    assert len(server.seen) <= 100 + 0.1 * 100 + 1
    assert "retry budget is spent" in caught.value.__notes__[0]


async def test_copies_of_a_client_share_its_budget_until_they_change_the_policy(
    side: Side, server: ScriptedServer, time: FakeClock
) -> None:
    server.otherwise = lambda _: as_error(503, "queue_full")
    policy = RetryPolicy(attempts=2, budget_ratio=0, budget_floor_per_s=0, base_delay_s=0)
    client = side.client(server.url, clock=time.clock(), retry=policy)
    twin = client.with_options(timeout=5)
    other = client.with_options(retry=RetryPolicy(attempts=2, budget_ratio=0.5, budget_floor_per_s=0, base_delay_s=0))
    sent = []
    for one in (client, twin, other):
        before = len(server.seen)
        with pytest.raises(inferway.QueueFullError):
            await side(one.models.list)
        sent.append(len(server.seen) - before)
    assert sent == [1, 1, 2] or sent == [2, 1, 2]


# --- hooks -------------------------------------------------------------------------------------------------------


async def test_a_hook_sees_each_retry_before_its_delay(side: Side, server: ScriptedServer, time: FakeClock) -> None:
    server.script = [as_error(503, "queue_full"), broken(), LIVE]
    events: list[tuple[RetryEvent, int]] = []

    def see(event: RetryEvent) -> None:
        events.append((event, len(time.slept)))

    async def see_async(event: RetryEvent) -> None:
        see(event)

    client = side.client(server.url, clock=time.clock(), on_retry=see if side.kind == "sync" else see_async)
    await side(lambda: client.models.list())
    assert [(event.attempt, event.delay_s, type(event.error), slept) for event, slept in events] == [
        (1, 0.5, inferway.QueueFullError, 0),
        (2, 1.0, inferway.APIConnectionError, 1),
    ]


def test_a_synchronous_client_has_no_use_for_a_coroutine(server: ScriptedServer, time: FakeClock) -> None:
    async def hook(_: Any) -> None:
        return None

    server.otherwise = lambda _: as_error(503, "queue_full")
    with (
        inferway.Inferway(server.url, clock=time.clock(), on_retry=hook) as client,
        pytest.raises(TypeError, match="must not be a coroutine"),
    ):
        client.models.list()


# --- decisions ---------------------------------------------------------------------------------------------------


def test_an_error_of_somebody_else_is_never_tried_again() -> None:
    assert not may_retry(KeyError("x"), plan())
    assert not may_retry(inferway.APIResponseValidationError("x"), plan())


def test_what_was_not_sent_may_be_sent_again_whatever_it_is() -> None:
    once: Call[Any] = Call("POST", "/p", lambda reply: reply, repeatable=False)
    sent = inferway.APIConnectionError("x", sent=True, retryable=True)
    unsent = inferway.APITimeoutError("x", sent=False, retryable=True)
    assert [may_retry(error, plan(once)) for error in (sent, unsent)] == [False, True]
    assert [may_retry(error, plan()) for error in (sent, unsent)] == [True, True]
    assert not may_retry(inferway.APIConnectionError("x", retryable=False), plan())


def test_a_deadline_that_passed_at_the_gateway_does_not_come_back() -> None:
    error = inferway.DeadlineExceededError("x", status_code=504, retryable=True)
    assert not may_retry(error, plan(timeout=Timeout()))
