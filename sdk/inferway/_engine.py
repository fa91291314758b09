"""Runs a call: attempt, retry, result. One engine for each client; copies made by ``with_options`` share connections.

The two classes differ in where they wait and in nothing else.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, cast

from ._budget import RetryBudget
from ._core import Call, Config, HeaderList, OpenReply, Plan, Reply, Stream, overridden, refuse_awaitable
from ._errors import APIError
from ._options import NOT_GIVEN, RequestEvent, RequestOptions, Timeout
from ._signature import ModelMetadata
from ._transport import Incoming, SyncSender, forget_at_fork, timed_out

if TYPE_CHECKING:
    # Only its name: importing aiohttp takes 150 ms, which a synchronous program need not spend.
    from ._transport_aio import AsyncIncoming, AsyncSender

T = TypeVar("T")
_Transmit: TypeAlias = Callable[[Plan, HeaderList, "float | None"], Reply]
_AsyncTransmit: TypeAlias = Callable[[Plan, HeaderList, "float | None"], Awaitable[Reply]]
"""One attempt, as a sender makes it."""

logger: Final = logging.getLogger("inferway")
"""Attempts and answers at DEBUG, retries at INFO. Keys are masked; bodies are never logged."""


def _debugging() -> bool:
    return logger.isEnabledFor(logging.DEBUG)


_KEEP_SIGNATURES: Final = 1024


class Signatures(dict[tuple[str, str | None], tuple[ModelMetadata, float]]):
    """Model name and version to metadata and the moment it was fetched, shared by a client and its copies."""

    def keep(self, key: tuple[str, str | None], metadata: ModelMetadata, now: float) -> None:
        """Remember; forgets everything when a program walks through very many models."""
        if len(self) >= _KEEP_SIGNATURES:
            self.clear()
        self[key] = (metadata, now)

    def forget(self, model: str) -> None:
        """After a change of what a model's name or its aliases mean: what they meant before."""
        for key in [key for key in self if key[0].partition("@")[0] == model]:
            self.pop(key, None)


class _Engine:
    config: Config
    budget: RetryBudget
    signatures: Signatures
    record: list[Reply] | None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.budget = RetryBudget(config.retry, config.clock.monotonic)
        forget_at_fork(self.budget)
        self.signatures = Signatures()
        self.record = None
        self._watched = False
        self._set(config)

    def _set(self, config: Config) -> None:
        self.config = config
        self._watched = config.on_request is not None or config.on_response is not None

    def rest(self, options: RequestOptions, started: float) -> RequestOptions:
        """The options of the second call of two that one method makes, with what is left of the first one's time."""
        limits = Timeout.of(options["timeout"]) if "timeout" in options else self.config.timeout
        if limits.total is None:
            return options
        clock = self.config.clock
        left = max(0.001, limits.total - (clock.monotonic() - started))
        return {**options, "timeout": Timeout(total=left, connect=limits.connect, read=limits.read)}


def _expired(plan: Plan) -> APIError:
    return plan.fail(timed_out("the call's time was over before {url} could be asked", False, plan))


def _log_retry(error: APIError, plan: Plan) -> None:
    if error.attempts < plan.retry.attempts:
        logger.info("%s %s failed: %s", plan.call.method, plan.call.path, error)


class SyncEngine(_Engine):
    """Runs calls and waits in the caller's thread. Safe to use from several threads."""

    def __init__(self, config: Config, sender: SyncSender) -> None:
        super().__init__(config)
        self.sender = sender

    def changed(self, config: Config, record: list[Reply] | None = None) -> SyncEngine:
        """A copy with another configuration, sharing connections, signatures and, if the policy stays, the budget."""
        made = copy.copy(self)
        made.record = record
        if config.retry != self.config.retry:
            made.budget = RetryBudget(config.retry, config.clock.monotonic)
            forget_at_fork(made.budget)
        made._set(config)
        return made

    def send(self, call: Call[T], options: RequestOptions) -> T:
        """The call's result.

        Raises:
            APIError: the last attempt's failure, see `_retry`.
            ConfigurationError, TypeError: an option cannot be used.
        """
        plan = Plan(self.config, call, options)
        return cast(T, plan.result(self._replied(plan, self.sender.send)))

    def open(self, call: Call[Any], options: RequestOptions) -> tuple[Plan, OpenReply[Incoming]]:
        """Begin a call whose answer may be a stream of events; tried again only before the first byte of its body.

        Whoever gets ``pieces`` closes them.

        Raises:
            APIError: the last attempt's failure, see `_retry`.
            ConfigurationError, TypeError: an option cannot be used.
        """
        plan = Plan(self.config, call, options)
        return plan, cast("OpenReply[Incoming]", self._replied(plan, self.sender.open))

    def _replied(self, plan: Plan, transmit: _Transmit) -> Reply:
        self.budget.deposit()
        try:
            reply = self._attempt(plan, transmit)
        except APIError as error:
            if plan.retry.attempts == 1:
                raise
            # Imported when first needed: tenacity takes as long to import as a few hundred calls take to make.
            from ._retry import may_retry, retried

            if not may_retry(error, plan):
                raise
            _log_retry(error, plan)
            reply = retried(error, plan, self.budget, lambda: self._attempt(plan, transmit))
        if self.record is not None:
            self.record.append(reply)
        return reply

    def _attempt(self, plan: Plan, transmit: _Transmit) -> Reply:
        plan.attempt += 1
        left = plan.left()
        if left is not None and left <= 0:
            raise _expired(plan)
        api_key = plan.config.api_key
        headers = plan.headers(left, api_key() if callable(api_key) else NOT_GIVEN)
        try:
            if self._watched or _debugging():
                return plan.accept(self._observed(plan, transmit, headers, left))
            return plan.accept(transmit(plan, headers, left))
        except APIError as error:
            plan.fail(error)
            raise

    def _observed(self, plan: Plan, transmit: _Transmit, headers: HeaderList, left: float | None) -> Reply:
        config = plan.config
        event = plan.event(headers, _length(plan), left)
        if config.on_request is not None:
            more = config.on_request(event)
            refuse_awaitable(more, "on_request")
            headers = overridden(headers, cast(Any, more))
        logger.debug("%s %s attempt %d, headers %s", event.method, event.url, event.attempt, event.headers)
        begun = config.clock.monotonic()
        reply = transmit(plan, headers, left)
        _log_answer(event, reply)
        if config.on_response is not None:
            try:
                done = config.on_response(plan.answered(event, reply, config.clock.monotonic() - begun))
                refuse_awaitable(done, "on_response")
            except BaseException:
                if isinstance(reply, OpenReply):
                    opened = cast("OpenReply[Incoming]", reply)
                    if opened.pieces is not None:
                        opened.pieces.close()
                raise
        return reply


class AsyncEngine(_Engine):
    """Runs calls on whatever event loop they are awaited on."""

    def __init__(self, config: Config, sender: AsyncSender) -> None:
        super().__init__(config)
        self.sender = sender

    def changed(self, config: Config, record: list[Reply] | None = None) -> AsyncEngine:
        """A copy with another configuration, sharing connections, signatures and, if the policy stays, the budget."""
        made = copy.copy(self)
        made.record = record
        if config.retry != self.config.retry:
            made.budget = RetryBudget(config.retry, config.clock.monotonic)
            forget_at_fork(made.budget)
        made._set(config)
        return made

    async def send(self, call: Call[T], options: RequestOptions) -> T:
        """The call's result. A cancelled caller leaves nothing behind: its connection is closed, no retry follows.

        Raises:
            APIError: the last attempt's failure, see `_retry`.
            ConfigurationError, TypeError: an option cannot be used.
        """
        plan = Plan(self.config, call, options)
        return cast(T, plan.result(await self._replied(plan, self.sender.send)))

    async def open(self, call: Call[Any], options: RequestOptions) -> tuple[Plan, OpenReply[AsyncIncoming]]:
        """Begin a call whose answer may be a stream of events; tried again only before the first byte of its body.

        Whoever gets ``pieces`` closes them.

        Raises:
            APIError: the last attempt's failure, see `_retry`.
            ConfigurationError, TypeError: an option cannot be used.
        """
        plan = Plan(self.config, call, options)
        return plan, cast("OpenReply[AsyncIncoming]", await self._replied(plan, self.sender.open))

    async def _replied(self, plan: Plan, transmit: _AsyncTransmit) -> Reply:
        self.budget.deposit()
        try:
            reply = await self._attempt(plan, transmit)
        except APIError as error:
            if plan.retry.attempts == 1:
                raise
            # Imported when first needed: tenacity takes as long to import as a few hundred calls take to make.
            from ._retry import may_retry, retried_async

            if not may_retry(error, plan):
                raise
            _log_retry(error, plan)
            reply = await retried_async(error, plan, self.budget, lambda: self._attempt(plan, transmit))
        if self.record is not None:
            self.record.append(reply)
        return reply

    async def _attempt(self, plan: Plan, transmit: _AsyncTransmit) -> Reply:
        plan.attempt += 1
        left = plan.left()
        if left is not None and left <= 0:
            raise _expired(plan)
        api_key = plan.config.api_key
        key: object = NOT_GIVEN
        if callable(api_key):
            key = api_key()
            if isawaitable(key):
                key = await key
        headers = plan.headers(left, key)
        try:
            if self._watched or _debugging():
                return plan.accept(await self._observed(plan, transmit, headers, left))
            return plan.accept(await transmit(plan, headers, left))
        except APIError as error:
            plan.fail(error)
            raise

    async def _observed(self, plan: Plan, transmit: _AsyncTransmit, headers: HeaderList, left: float | None) -> Reply:
        config = plan.config
        event = plan.event(headers, _length(plan), left)
        if config.on_request is not None:
            more = config.on_request(event)
            headers = overridden(headers, cast(Any, await more if isawaitable(more) else more))
        logger.debug("%s %s attempt %d, headers %s", event.method, event.url, event.attempt, event.headers)
        begun = config.clock.monotonic()
        reply = await transmit(plan, headers, left)
        _log_answer(event, reply)
        if config.on_response is not None:
            try:
                done = config.on_response(plan.answered(event, reply, config.clock.monotonic() - begun))
                if isawaitable(done):
                    await done
            except BaseException:
                if isinstance(reply, OpenReply):
                    opened = cast("OpenReply[AsyncIncoming]", reply)
                    if opened.pieces is not None:
                        await opened.pieces.close()
                raise
        return reply


def _length(plan: Plan) -> int:
    body = plan.call.body
    if isinstance(body, Stream):
        return body.size
    return len(body) if isinstance(body, bytes) else sum(len(memoryview(piece)) for piece in body)


def _log_answer(event: RequestEvent, reply: Reply) -> None:
    logger.debug(
        "%s %s answered %d, %d bytes, request %s", event.method, event.url, reply.status_code, len(reply.body),
        reply.request_id or event.request_id,
    )  # fmt: skip
