"""``client.health``: is the gateway there, and may it be asked? No key is needed."""

from __future__ import annotations

from typing import Final, Unpack

from .._core import Call, Reply, json_call, path_of
from .._engine import AsyncEngine, SyncEngine
from .._errors import APIError, APITimeoutError
from .._options import NO_RETRY, RequestOptions, Timeout

_POLL_FIRST_S: Final = 0.05
_POLL_MOST_S: Final = 1.0
_PROBE_S: Final = 5.0


def _answered(reply: Reply) -> bool:
    return reply.status_code == 200


def _live() -> Call[bool]:
    return json_call("GET", path_of("v2", "health", "live"), _answered, statuses=frozenset({503}))


def _ready() -> Call[bool]:
    return json_call("GET", path_of("v2", "health", "ready"), _answered, statuses=frozenset({503}))


def _once(options: RequestOptions) -> RequestOptions:
    """A probe says what is now, so it is not tried again unless the caller says so."""
    return options if "retry" in options else {**options, "retry": NO_RETRY}


def _absent(error: APIError) -> bool:
    """False for a failure that only says that nobody is there yet; any other is raised."""
    if not error.retryable:
        raise error
    return False


class _Wait:
    """The pauses between probes and their end."""

    def __init__(self, engine: SyncEngine | AsyncEngine, timeout: float | None) -> None:
        self._total = Timeout.of(timeout).total
        self._clock = engine.config.clock
        self._started = self._clock.monotonic()
        self._pause = _POLL_FIRST_S
        self.base_url = engine.config.base_url

    def options(self) -> RequestOptions:
        left = self._left()
        return {"timeout": _PROBE_S if left is None else max(0.001, min(_PROBE_S, left)), "retry": NO_RETRY}

    def pause(self, failure: APIError | None) -> float:
        """Seconds until the next probe; raises when the time is over."""
        left = self._left()
        if left is not None and left <= 0:
            raise APITimeoutError(
                f"{self.base_url} was not ready within {self._total:g} s: "
                f"{'it answered that it is not' if failure is None else failure}",
                retryable=True,
                elapsed=self._clock.monotonic() - self._started,
            ) from failure
        pause = self._pause if left is None else min(self._pause, left)
        self._pause = min(_POLL_MOST_S, self._pause * 2)
        return pause

    def _left(self) -> float | None:
        return None if self._total is None else self._total - (self._clock.monotonic() - self._started)


class Health:
    """Probes of a gateway. They are sent once: a probe says what is now."""

    def __init__(self, engine: SyncEngine) -> None:
        self._engine = engine

    def live(self, **options: Unpack[RequestOptions]) -> bool:
        """Whether the gateway's process answers; False when it cannot be reached, or a proxy says so.

        Raises:
            APIStatusError: something else than a gateway answers at the base URL.
        """
        try:
            return self._engine.send(_live(), _once(options))
        except APIError as error:
            return _absent(error)

    def ready(self, **options: Unpack[RequestOptions]) -> bool:
        """Whether the gateway takes requests; False while it starts or drains, and when it cannot be reached.

        Raises:
            APIStatusError: something else than a gateway answers at the base URL.
        """
        try:
            return self._engine.send(_ready(), _once(options))
        except APIError as error:
            return _absent(error)

    def wait_until_ready(self, timeout: float | None = 60.0) -> None:
        """Wait until the gateway takes requests. Asks after 0.05 s, then less and less often, up to once a second.

        Args:
            timeout: seconds, or None to wait for ever.
        Raises:
            APITimeoutError: it was not ready in time; the cause is the last probe's failure.
            APIStatusError: something else than a gateway answers at the base URL.
        """
        wait = _Wait(self._engine, timeout)
        while True:
            failure: APIError | None = None
            try:
                if self._engine.send(_ready(), wait.options()):
                    return
            except APIError as error:
                _absent(error)
                failure = error
            self._engine.config.clock.sleep(wait.pause(failure))


class AsyncHealth:
    """Probes of a gateway. They are sent once: a probe says what is now."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def live(self, **options: Unpack[RequestOptions]) -> bool:
        """Whether the gateway's process answers; False when it cannot be reached, or a proxy says so.

        Raises:
            APIStatusError: something else than a gateway answers at the base URL.
        """
        try:
            return await self._engine.send(_live(), _once(options))
        except APIError as error:
            return _absent(error)

    async def ready(self, **options: Unpack[RequestOptions]) -> bool:
        """Whether the gateway takes requests; False while it starts or drains, and when it cannot be reached.

        Raises:
            APIStatusError: something else than a gateway answers at the base URL.
        """
        try:
            return await self._engine.send(_ready(), _once(options))
        except APIError as error:
            return _absent(error)

    async def wait_until_ready(self, timeout: float | None = 60.0) -> None:  # noqa: ASYNC109 - as its twin
        """Wait until the gateway takes requests. Asks after 0.05 s, then less and less often, up to once a second.

        Args:
            timeout: seconds, or None to wait for ever.
        Raises:
            APITimeoutError: it was not ready in time; the cause is the last probe's failure.
            APIStatusError: something else than a gateway answers at the base URL.
        """
        wait = _Wait(self._engine, timeout)
        while True:
            failure: APIError | None = None
            try:
                if await self._engine.send(_ready(), wait.options()):
                    return
            except APIError as error:
                _absent(error)
                failure = error
            await self._engine.config.clock.sleep_async(wait.pause(failure))
