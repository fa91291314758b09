"""What OpenAI's client makes of the errors that the gateway sends: which class, and whether and when it tries again.

The gateway has no limits on rates, so nothing is answered with 429; a full queue is 503, as OpenAI's own overload is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import anyio
import openai
import pytest

from generating import FakeGenerator, serving
from inferway_gateway.core.errors import (
    DeadlineExceededError,
    GatewayError,
    ModelExecutionError,
    ModelNotReadyError,
    QueueFullError,
    ShuttingDownError,
    WorkerCrashedError,
)

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]


class Failing:
    """Fails the first answers, and gives the others."""

    def __init__(self, error: GatewayError, times: int) -> None:
        self.left = times
        self.error = error
        self.generator = FakeGenerator(before=self._before)

    async def _before(self, _: int) -> None:
        if self.left:
            self.left -= 1
            raise self.error


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client wanted to wait before each further attempt; it does not have to."""
    waited: list[float] = []

    async def note(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(anyio, "sleep", note)
    return waited


def asked(base_url: Any, stream: bool, max_retries: int = 2) -> str:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="any", max_retries=max_retries) as client:
        if not stream:
            answer = client.chat.completions.create(model="m", messages=HELLO)
            return answer.choices[0].message.content or ""
        chunks = client.chat.completions.create(model="m", messages=HELLO, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("error", "least"),
    [
        (QueueFullError("2 requests wait already", retry_after_s=7.0), 7.0),
        (ModelNotReadyError("it is being loaded", retry_after_s=2.0), 2.0),
        (ShuttingDownError("the gateway shuts down"), 1.0),
    ],
    ids=["queue", "not ready", "shutting down"],
)
async def test_what_passes_is_tried_again_after_the_time_that_the_gateway_says(
    waits: list[float], error: GatewayError, least: float, stream: bool
) -> None:
    failing = Failing(error, 2)
    async with serving({"m": failing.generator}) as client:
        assert await asyncio.to_thread(asked, client.base_url, stream) == "Hello!"
    assert len(failing.generator.asked) == 3
    assert waits == [least, least]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (WorkerCrashedError("the process died"), openai.InternalServerError),
        (DeadlineExceededError("the time is over"), openai.InternalServerError),
        (ModelExecutionError("the model failed"), openai.InternalServerError),
    ],
    ids=["crashed", "deadline", "failed"],
)
async def test_what_would_happen_again_is_not_tried_again(
    waits: list[float], error: GatewayError, kind: type[openai.APIStatusError]
) -> None:
    # Left to itself the client would try every status from 500 on again; X-Should-Retry keeps it from that.
    failing = Failing(error, 9)
    async with serving({"m": failing.generator}) as client:
        with pytest.raises(kind) as caught:
            await asyncio.to_thread(asked, client.base_url, False)
    assert (len(failing.generator.asked), waits) == (1, [])
    assert caught.value.code == error.code
    assert caught.value.type == "server_error"
    assert caught.value.request_id


async def test_a_queue_that_stays_full_is_told_as_such(waits: list[float]) -> None:
    failing = Failing(QueueFullError("2 requests wait already", retry_after_s=3.0), 99)
    async with serving({"m": failing.generator}) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await asyncio.to_thread(asked, client.base_url, False, 1)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (503, "queue_full", "server_error")
    assert "2 requests wait already" in caught.value.message
    assert caught.value.response.headers["retry-after"] == "3"
    assert waits == [3.0]


async def test_the_asynchronous_client_tries_again_too(waits: list[float]) -> None:
    failing = Failing(QueueFullError("full", retry_after_s=7.0), 1)
    async with (
        serving({"m": failing.generator}) as client,
        openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="any") as theirs,
    ):
        answer = await theirs.chat.completions.create(model="m", messages=HELLO)
    assert answer.choices[0].message.content == "Hello!"
    assert waits == [7.0]


Status = Callable[[Any], Any]


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (lambda c: c.chat.completions.create(model="m", messages=[]), openai.BadRequestError),
        (lambda c: c.chat.completions.create(model="x", messages=HELLO), openai.NotFoundError),
        (lambda c: c.models.retrieve("a/b/c"), openai.NotFoundError),
        (lambda c: c.models.delete("m"), openai.APIStatusError),
        (lambda c: c.responses.create(model="m", input="Hi"), openai.NotFoundError),
    ],
    ids=["400", "404", "404 of an id with slashes", "405", "404 of a route"],
)
async def test_what_the_caller_did_wrong_is_told_at_once(
    waits: list[float], ask: Status, kind: type[openai.APIStatusError]
) -> None:
    def call(base_url: Any) -> None:
        with openai.OpenAI(base_url=f"{base_url}/v1", api_key="any") as client:
            ask(client)

    async with serving({"m": FakeGenerator()}) as client:
        with pytest.raises(kind) as caught:
            await asyncio.to_thread(call, client.base_url)
    assert waits == []
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code
    assert caught.value.request_id


async def test_names_with_slashes_are_found() -> None:
    def retrieved(base_url: Any) -> list[str]:
        with openai.OpenAI(base_url=f"{base_url}/v1", api_key="any") as client:
            return [
                client.models.retrieve(name).id for name in ("m", "m/versions/2", "m:pirate", "m/versions/2:pirate")
            ]

    generator = FakeGenerator(adapters=("pirate",))
    async with serving({"m": {2: generator}}) as client:
        found = await asyncio.to_thread(retrieved, client.base_url)
    assert found == ["m", "m/versions/2", "m:pirate", "m/versions/2:pirate"]
