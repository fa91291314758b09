"""``/v1/chat/completions`` and ``/v1/completions``: requests read, asked of a model, and answered whole or as it comes.

The status of a stream is decided by its first piece: until then a request that fails has an answer of its own, and an
alias' fallback may take it over. Only where the first piece lets itself be waited for, the stream begins without it, so
that nobody on the way takes the connection for dead.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from time import perf_counter
from typing import Any, Final, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inferway_contract import models as contract

from ...core.errors import (
    CancelledByCallerError,
    GatewayError,
    InternalError,
    InvalidParameterError,
    ShuttingDownError,
)
from ...core.generation import Delta, GenerationRequest, TextGenerator, Usage
from ...core.relay import RelayPiece, RelayRequest, TextRelay
from ...core.served import ServedVersion
from ...core.tensors import Signature
from ..callers import while_there
from ..infer import origin_of
from ..routing import header_fields
from .asking import (
    chat_prompt,
    each_choice,
    plain_prompts,
    read_constraint,
    read_messages,
    read_sampling,
    read_stop,
    told,
)
from .frames import KEEP_ALIVE, ChatWriter, CompletionWriter, Writer, error_event, usage_body
from .reading import read_members
from .relay import RelayWriter, relay_request
from .targets import Reference, answered, check_adapter, failed_late, granted_s, parse_reference
from .tools import read_tools
from .tracing import Span, code_of

logger = logging.getLogger("inferway.http")

FIRST_PIECE_S: Final = 3.0
"""How long a stream's status waits for its first piece."""
KEEP_ALIVE_S: Final = 10.0
"""A stream says at least this often that it is alive."""
_WAITING: Final = 256
"""Pieces of several answers to one request that may wait to be sent."""

Prepare = Callable[[ServedVersion, TextGenerator], Awaitable[tuple[list[GenerationRequest], Writer[Delta]]]]


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    started = perf_counter()
    body, members = await read_members(request.scope, request.receive, contract.ChatCompletionRequest)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameterError("top_logprobs: needs 'logprobs' to be true", "top_logprobs")
    tools = read_tools(body)
    forced = tools.constraint()
    constraint, source = (forced, "tools") if forced is not None else read_constraint(body)
    reference = parse_reference(body.model)
    n = body.n or 1
    most = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"

    async def prepare(served: ServedVersion, generator: TextGenerator) -> tuple[list[GenerationRequest], Writer[Delta]]:
        messages = read_messages(body.messages)  # not before: other servers' models may take more than texts
        renderer = request.scope["state"]["templates"]
        prompt = await chat_prompt(generator, renderer, served.name, body, messages, tools)
        asked = GenerationRequest(
            prompt=prompt,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            sampling=read_sampling(body, generator.defaults.sampling),
            stop=read_stop(body),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            constraint=constraint,
            ignore_end=bool(body.ignore_eos),
            priority=body.priority or 0,
            adapter=reference.adapter,
            key_id=request.scope["principal"].key_id,
            deadline=_deadline(request.scope, started),
        )
        writer = ChatWriter(body.model, n, tools, logprobs=bool(body.logprobs), usage=_wants_usage(body))
        return each_choice(asked, [prompt], n), writer

    told_as = _Words(source, most, "messages")
    return await _answer(request, body, members, reference, prepare, told_as, started)


async def completions(request: Request) -> Response:
    """Go on with a text."""
    started = perf_counter()
    body, members = await read_members(request.scope, request.receive, contract.CompletionRequest)
    n = body.n or 1
    constraint, source = read_constraint(body)
    reference = parse_reference(body.model)

    async def prepare(_: ServedVersion, generator: TextGenerator) -> tuple[list[GenerationRequest], Writer[Delta]]:
        if body.suffix:
            raise InvalidParameterError("suffix: expected none, this gateway's models go on at the end alone", "suffix")
        if body.best_of is not None and body.best_of != n:
            raise InvalidParameterError("best_of: expected as many as 'n', which is all that are made", "best_of")
        prompts, texts = await plain_prompts(generator, body)
        asked = GenerationRequest(
            prompt=prompts[0],
            max_tokens=body.max_tokens,
            sampling=read_sampling(body, generator.defaults.sampling),
            stop=read_stop(body),
            logprobs=body.logprobs,
            constraint=constraint,
            ignore_end=bool(body.ignore_eos),
            priority=body.priority or 0,
            adapter=reference.adapter,
            key_id=request.scope["principal"].key_id,
            deadline=_deadline(request.scope, started),
        )
        echoed = [text if body.echo else "" for text in texts for _ in range(n)]
        writer = CompletionWriter(body.model, echoed, logprobs=body.logprobs, usage=_wants_usage(body))
        return each_choice(asked, prompts, n), writer

    told_as = _Words(source, "max_tokens", "prompt")
    return await _answer(request, body, members, reference, prepare, told_as, started)


def _wants_usage(body: contract.GenerationOptions) -> bool:
    return bool(body.stream and body.stream_options is not None and body.stream_options.include_usage)


def _deadline(scope: Scope, started: float) -> float | None:
    left = granted_s(scope, started)
    return None if left == math.inf else time.monotonic() + left


class _Words:
    """What members of a request a model's complaints are about."""

    __slots__ = ("constraint", "most", "prompt")

    def __init__(self, constraint: str | None, most: str, prompt: str) -> None:
        self.constraint = constraint
        self.most = most
        self.prompt = prompt

    def of(self, error: InvalidParameterError) -> InvalidParameterError:
        return told(error, constraint=self.constraint, most=self.most, prompt=self.prompt)


async def _answer(
    request: Request,
    body: contract.GenerationOptions,
    members: Mapping[str, Any],
    reference: Reference,
    prepare: Prepare,
    words: _Words,
    started: float,
) -> Response:
    scope = request.scope
    operation = "chat" if isinstance(body, contract.ChatCompletionRequest) else "text_completion"
    span = Span(operation, body, header_fields(scope))

    async def attempt(served: ServedVersion) -> _Answering:
        relay = _relay(served, reference)
        generator = _generator(served, reference) if relay is None else None
        served.stats.running += 1
        answering: _Answering | None = None
        try:
            if generator is not None:
                requests, writer = await prepare(served, generator)
                pieces = _pieces(generator, requests)
                answering = _Answering(served, pieces, len(requests), writer, started, words)
            elif relay is not None:
                asked = _relayed(scope, body, members, started)
                told_by = RelayWriter(asked.operation, body.model, asked.answers, usage=_wants_usage(body))
                answering = _Answering(served, _relay_pieces(relay, asked), 1, told_by, started, None)
            assert answering is not None  # it is one or the other
            if body.stream:
                await answering.begin()
            else:
                await answering.gather()
        except InvalidParameterError as error:
            raise (words.of(error) if relay is None else error) from None
        finally:
            if answering is None or not answering.open:
                served.stats.running -= 1
        return answering

    n = body.n or 1
    if not body.stream:
        work = answered(scope, reference, attempt, started=started)
        try:
            answering = await while_there(scope, request.receive, work)
        except BaseException as error:
            span.end(code_of(error))
            raise
        answering.served.stats.finished(perf_counter() - started, None)
        answering.tell(span, n, None)
        timing = (b"server-timing", _timing(answering.first_s, perf_counter() - started))
        scope["response_headers"] = (*scope["response_headers"], timing, *answering.attempts_headers())
        return Response(answering.writer.body(answering.usage(n)), media_type="application/json")
    begun: list[_Answering] = []

    async def begin() -> None:
        begun.append(await answered(scope, reference, attempt, started=started))

    try:
        await while_there(scope, request.receive, begin())
    except BaseException as error:
        span.end(code_of(error))
        for answering in begun:  # it was left between its first piece and here
            await answering.close()
        raise
    return EventStream(begun[0], n, usage=_wants_usage(body), started=started, span=span)


def _timing(first_s: float | None, total_s: float | None = None) -> bytes:
    """Where the time of an answer went, as ``Server-Timing`` says it: to the first piece, and to the last."""
    times = ((b"first", first_s), (b"total", total_s))
    return b", ".join(b"%b;dur=%.1f" % (name, seconds * 1e3) for name, seconds in times if seconds is not None)


def _relay(served: ServedVersion, reference: Reference) -> TextRelay | None:
    if not hasattr(served.text, "ask"):
        return None
    check_adapter(reference, ())
    return cast(TextRelay, served.text)  # nothing else that a version may be has such a method


def _relayed(
    scope: Scope, body: contract.GenerationOptions, members: Mapping[str, Any], started: float
) -> RelayRequest:
    left = granted_s(scope, started)
    deadline = None if left == math.inf else asyncio.get_running_loop().time() + left
    return relay_request(body, members, deadline=deadline, origin=origin_of(scope, header_fields(scope)))


async def _relay_pieces(relay: TextRelay, request: RelayRequest) -> AsyncGenerator[tuple[int, RelayPiece]]:
    async with aclosing(relay.ask(request)) as pieces:
        async for piece in pieces:
            yield 0, piece


def _generator(served: ServedVersion, reference: Reference) -> TextGenerator:
    text = served.text
    if text is None or not hasattr(text, "generate"):
        raise InvalidParameterError(
            f"model: expected a model that generates text, '{served.name}' does not{_why_not(served)}", "model"
        )
    generator = cast(TextGenerator, text)  # an encoder has no such method
    check_adapter(reference, generator.adapters)
    return generator


def _why_not(served: ServedVersion) -> str:
    """What a decoder lacks that is served as tensors: a model as transformers or optimum save it is easily taken for
    one that can be talked to as it is."""
    signature: Signature | None = getattr(served.batcher, "signature", None)
    inputs = () if signature is None else signature.inputs
    if not any(spec.name.startswith(("past_key", "past.", "past_")) for spec in inputs):
        return ""
    return (
        ": it is a decoder without genai_config.json beside its graph, and answers with tensors alone; "
        "onnxruntime-genai's model builder writes that file"
    )


class _Answering:
    """The answers to one request, from one version.

    Attributes:
        open: pieces may still come; whoever has it closes it.
        first_s: from the request's beginning to its first piece; None until that is there.
        words: of the request, for what the model complains of; None: the complaints are in them already.
    """

    def __init__(
        self,
        served: ServedVersion,
        pieces: AsyncGenerator[tuple[int, Any]],
        answers: int,
        writer: Writer[Any],
        started: float,
        words: _Words | None,
    ) -> None:
        self.served = served
        self.writer = writer
        self.words = words
        self.open = False
        self.first_s: float | None = None
        self._started = started
        self._pieces = pieces
        self._attempts = 0
        self._usages: list[Usage | None] = [None] * answers
        self._first: asyncio.Future[tuple[int, Any]] | None = None

    async def gather(self) -> None:
        """Wait for all of it."""
        async with aclosing(self._pieces) as pieces:
            async for index, delta in pieces:
                if self.first_s is None:
                    self.first_s = perf_counter() - self._started
                self._count(index, delta)
                self.writer.take(index, delta)

    async def begin(self) -> None:
        """Wait for the first piece, but not for long. Raises what the generator does until then."""
        self.open = True
        self._first = asyncio.ensure_future(anext(self._pieces))
        try:
            await asyncio.wait((self._first,), timeout=FIRST_PIECE_S)
            if self._first.done():
                self._count(*self._first.result())
                self.first_s = perf_counter() - self._started
        except BaseException:
            await self._shut()
            raise

    async def events(self, span: Span) -> AsyncGenerator[bytes]:
        """The events of all pieces, the first one's first."""
        assert self._first is not None
        event = self.writer.event
        with suppress(StopAsyncIteration):
            index, delta = await self._first
            span.began()
            self._count(index, delta)
            yield event(index, delta)
            async for index, delta in self._pieces:
                if delta.usage is not None:
                    self._count(index, delta)
                yield event(index, delta)

    def attempts_headers(self) -> list[tuple[bytes, bytes]]:
        """How many calls of servers elsewhere were made, where any was and that is known yet."""
        return [(b"inferway-upstream-attempts", b"%d" % self._attempts)] if self._attempts else []

    def usage(self, n: int) -> dict[str, Any]:
        return usage_body([usage or Usage(0, 0) for usage in self._usages], n)

    def tell(self, span: Span, n: int, error: str | None) -> None:
        """End the request's span with what came of it."""
        span.end(
            error,
            self.usage(n),
            self.writer.reasons,
            self.served.version,
            model=self.served.name,
            identity=self.writer.identity,
        )

    async def close(self) -> None:
        """End it, and give its places back."""
        if self.open:
            await self._shut()
            self.served.stats.running -= 1

    async def _shut(self) -> None:
        self.open = False
        first = self._first
        if first is not None and not first.done():
            first.cancel()
            await asyncio.wait((first,))
        elif first is not None and not first.cancelled():
            first.exception()  # looked at, so that nobody is told of it again
        await self._pieces.aclose()

    def _count(self, index: int, delta: Delta | RelayPiece) -> None:
        if isinstance(delta, RelayPiece):
            self._attempts = delta.attempts
        if delta.usage is not None:
            self._usages[index] = delta.usage


async def _pieces(generator: TextGenerator, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, Delta]]:
    """What a generator gives for each request, with its index, in the order in which it comes."""
    if len(requests) == 1:
        async with aclosing(generator.generate(requests[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue(_WAITING)

    async def one(index: int, request: GenerationRequest) -> None:
        async with aclosing(generator.generate(request)) as deltas:
            async for delta in deltas:
                await arrived.put((index, delta))

    tasks = [asyncio.create_task(one(i, r), name="inferway-choice") for i, r in enumerate(requests)]

    async def until_all_are_over() -> None:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        await arrived.put((-1, None))

    over = asyncio.create_task(until_all_are_over(), name="inferway-choices")
    try:
        while True:
            index, piece = await arrived.get()
            if piece is None:
                break
            yield index, piece
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in (*tasks, over):
            task.cancel()
        await asyncio.wait((*tasks, over))
        for task in tasks:
            if not task.cancelled():
                task.exception()


class EventStream(Response):
    """A response of server-sent events: the answers as they come.

    Args:
        usage: an event has the usage before the end.
    """

    def __init__(self, answering: _Answering, n: int, *, usage: bool, started: float, span: Span) -> None:
        self.status_code = 200
        self.background = None
        self._answering = answering
        self._n = n
        self._usage = usage
        self._started = started
        self._span = span

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = self._answering
        code: str | None = None
        try:
            code = await while_there(scope, receive, self._send(scope, send))
        except CancelledByCallerError:
            code = CancelledByCallerError.code  # its end of the connection is gone: nobody reads a word of ours
        finally:
            await answering.close()
            answering.served.stats.finished(perf_counter() - self._started, code)
            if code is not None:
                failed_late(scope, answering.served, code)
            answering.tell(self._span, self._n, code)

    async def _send(self, scope: Scope, send: Send) -> str | None:
        """Send all there is; gives the code of what went wrong on the way."""
        answering, writer = self._answering, self._answering.writer
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        if answering.first_s is not None:
            headers.append((b"server-timing", _timing(answering.first_s)))
        headers += answering.attempts_headers()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        line = _Line(send)
        await line.write(writer.opening())
        keeping = asyncio.create_task(line.keep_alive(), name="inferway-keep-alive")
        failure: GatewayError | None = None
        try:
            async with aclosing(answering.events(self._span)) as events:
                async for event in events:
                    if event:
                        await line.write(event)
        except InvalidParameterError as error:
            failure = error if answering.words is None else answering.words.of(error)
        except GatewayError as error:
            failure = error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            # Where it is the gateway that ends, its callers hear so; one that left hears nothing.
            shutting = ShuttingDownError("the gateway shuts down and could not wait for this answer any longer")
            with suppress(Exception):
                await line.end(error_event(shutting, scope["request_id"].decode()))
            raise
        except Exception:
            logger.exception("request %s failed after its answer began", scope["request_id"].decode())
            failure = InternalError("internal error; the gateway's log has the details under this request id")
        finally:
            keeping.cancel()
            await asyncio.wait((keeping,))
        if failure is not None:
            await line.end(error_event(failure, scope["request_id"].decode()))
            return failure.code
        await line.end(writer.closing(answering.usage(self._n) if self._usage else None))
        return None


class _Line:
    """The way to the caller, on which a comment goes when nothing else does."""

    __slots__ = ("_send", "_silent")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._silent = True

    async def write(self, body: bytes) -> None:
        self._silent = False
        if body:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            if self._silent:
                await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            self._silent = True
