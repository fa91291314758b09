"""Chats and completions of OpenAI-compatible servers, as they are: nothing of them is made tensors of.

**What goes there.** The members of a request that this gateway's contract has, and a few more of OpenAI's that are
about the text alone. The rest stays here, unknown members first of all: a server that is a gateway itself may take one
for another model, another address or another account than the operator allowed. ``parameters`` of the version stand
where the caller says nothing.

**What comes back.** Choices and usage, looked at before they are sent on; the server's name of the model, its ids and
whatever else it tells of itself stay here. An answer that comes in pieces is tried again at another endpoint until its
first piece with content is there. From then on its caller has part of it, and whatever goes wrong is an error between
two pieces.

**How long.** ``timeout_s`` bounds a whole answer, and of one in pieces the time to the first and between two; comments
and pieces without content do not count, or a server could hold its caller for ever.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeGuard

import httpx
import orjson

from ...core.errors import (
    ContextLengthError,
    DeadlineExceededError,
    GatewayError,
    InternalError,
    InvalidParameterError,
    MalformedRequestError,
    UpstreamError,
)
from ...core.generation import GenerationStats, Usage
from ...core.inflight import InFlight
from ...core.relay import RelayOperation, RelayPiece, RelayRequest
from ...core.upstream import RemoteSpec
from .events import EventReader, EventTooLongError
from .gate import Gate
from .oip import LONG_BYTES, parse_json
from .openai import PATHS
from .pool import NETWORK_ERRORS, Call, CallError, Lane, Reply, Rest, UpstreamPool, broken

logger = logging.getLogger("inferway.upstreams")

ANSWER_LIMIT_S: Final = 3600.0
"""The longest that an answer in pieces may take, however steadily they come."""
_END_S: Final = 0.5
"""How long the end of a response is waited for whose answer is complete: then its connection can be used again."""
_WAITING: Final = 16
"""Pieces that wait for a caller who reads slowly; then the upstream is not read either."""
_MOST_TOKENS: Final = 1 << 40
_MOST_LEVELS: Final = 16
_SHOWN_CHARACTERS: Final = 400

_COMMON: Final = frozenset({
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "logit_bias", "n", "stop", "response_format", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "ignore_eos", "user", "logprobs",
})  # fmt: skip
PASSED: Final[Mapping[RelayOperation, frozenset[str]]] = {
    "chat": _COMMON
    | {
        "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
        "chat_template_kwargs", "reasoning_effort", "verbosity", "modalities", "audio", "prediction",
    },
    "completions": _COMMON | {"prompt", "echo", "suffix", "best_of"},
}  # fmt: skip
"""Members of a request that go to an upstream. Not among them, beside what is unknown: ``priority``, which is heeded
here, and what is about money, accounts and storage, such as ``service_tier`` and ``store``: an operator who wants one
has it in ``parameters``."""
_LENGTHS: Final = frozenset({"max_tokens", "max_completion_tokens"})
"""Two names of one thing, of which servers refuse to get both."""

_REFUSALS: Final = frozenset({400, 413, 415, 422})
_PARAM: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]-]{0,63}")
_ADDRESS: Final = re.compile(
    r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+|\b(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?\b|\[[0-9a-f]*:[0-9a-f:.]+\](?::\d+)?", re.I
)
_SECRET: Final = re.compile(r"\b(?:(?:sk|pk|ifw|hf|gsk|xai)[-_]|Bearer )[\w*.-]{6,}", re.I)

_Put = Callable[[RelayPiece | GatewayError | None], Awaitable[None]]


class ChatRelay:
    """Implements ``core.relay.TextRelay``. All that a version sends goes through one gate and by the same lanes."""

    task: Final = "generate"

    def __init__(
        self, remote: RemoteSpec, pool: UpstreamPool, lanes: list[Lane], gate: Gate, in_flight: InFlight
    ) -> None:
        self._remote = remote
        self._pool = pool
        self._lanes = lanes
        self._gate = gate
        self._in_flight = in_flight
        self.stats = GenerationStats()

    async def ask(self, request: RelayRequest) -> AsyncGenerator[RelayPiece]:
        """As ``TextRelay.ask``. The call is made in a task of its own, so that a version that is taken out of service
        can end it, and so that it stands still while nobody takes its pieces."""
        pieces: asyncio.Queue[RelayPiece | GatewayError | None] = asyncio.Queue(_WAITING)
        self.stats.requests += 1

        async def work() -> None:
            try:
                await self._in_flight.run(self._relay(request, pieces.put))
            except GatewayError as error:
                await pieces.put(error)
            except Exception:
                logger.exception("asking upstream '%s' failed unexpectedly", self._remote.upstream)
                await pieces.put(InternalError("internal error; the gateway's log has the details"))

        task = asyncio.create_task(work(), name="inferway-relay")
        over = False
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, GatewayError):
                    over = True
                    raise piece
                yield piece
            over = True
        finally:
            if not over:
                self.stats.cancelled += 1
                task.cancel()
                await asyncio.wait((task,))

    async def _relay(self, request: RelayRequest, put: _Put) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with self._place(request):
            reader = partial(_ChunkReader, self, request) if request.stream else None
            call = Call("POST", PATHS[request.operation], self._headers(request), (self._body(request),), reader=reader)
            reply = await self._pool.send(call, self._lanes, request.deadline)
            try:
                if reply.rest is not None:
                    await self._read_on(request, reply, reply.rest, started, put)
                elif 200 <= reply.status < 300:
                    await put(await self._whole(request, reply))
                    await put(None)
                else:
                    raise self._refused(request, reply)
            except GatewayError as error:
                error.upstream_attempts = reply.attempts
                raise

    @asynccontextmanager
    async def _place(self, request: RelayRequest) -> AsyncIterator[None]:
        stats = self.stats
        stats.waiting += 1
        waiting = True
        try:
            async with self._gate.place(request.priority, request.deadline or math.inf):
                stats.waiting -= 1
                waiting = False
                stats.running += 1
                try:
                    yield
                finally:
                    stats.running -= 1
        finally:
            stats.waiting -= waiting

    def _headers(self, request: RelayRequest) -> dict[str, str]:
        headers = {**dict(request.origin), "Content-Type": "application/json"}
        headers["Accept"] = "text/event-stream" if request.stream else "application/json"
        if request.deadline is not None:
            left = request.deadline - asyncio.get_running_loop().time()
            headers["Inferway-Timeout-Ms"] = str(max(1, int(left * 1000)))
        return headers

    def _body(self, request: RelayRequest) -> bytes:
        passed = PASSED[request.operation]
        said = {name: value for name, value in request.body.items() if name in passed and value is not None}
        ours = self._remote.parameters
        if said.keys() & _LENGTHS:
            ours = {name: value for name, value in ours.items() if name not in _LENGTHS}
        body: dict[str, Any] = {**ours, **said, "model": self._remote.model, "stream": request.stream}
        if request.stream:
            body["stream_options"] = {"include_usage": True}
        try:
            return orjson.dumps(body)
        except TypeError:  # what JSON of others may be read with, half a surrogate pair for one, is not written again
            raise MalformedRequestError("expected JSON of well-formed texts that is not nested as deeply") from None

    # --- answers ---------------------------------------------------------------------------------------------------

    async def _whole(self, request: RelayRequest, reply: Reply) -> RelayPiece:
        try:
            read = partial(_read_whole, request, reply.body)
            piece = await asyncio.to_thread(read) if len(reply.body) > LONG_BYTES else read()
        except UpstreamError:
            reply.lane.breaker.fail()  # who answers what is none is no better than who does not answer
            raise
        self._count(piece)
        return replace(piece, attempts=reply.attempts)

    async def _read_on(self, request: RelayRequest, reply: Reply, rest: Rest, started: float, put: _Put) -> None:
        """Pass an answer on whose beginning is there."""
        reader = rest.reader
        assert isinstance(reader, _ChunkReader)
        loop = asyncio.get_running_loop()
        stats = self.stats
        last = loop.time()
        stats.first_token.observe(last - started)
        outcome, failed = "cancelled", None
        try:
            while True:
                pieces, reader.pieces = reader.pieces, []
                for piece in pieces:
                    self._count(piece)
                    await put(replace(piece, attempts=reply.attempts))
                if reader.error is not None:
                    outcome = "refused" if isinstance(reader.error, InvalidParameterError) else "failed"
                    raise reader.error
                if reader.over:
                    break
                # From here, not from the last piece: a caller who reads slowly is not the upstream's fault.
                asked = loop.time()
                try:
                    async with asyncio.timeout_at(self._until(request, asked, started)):
                        await reader.more()
                except TimeoutError:
                    outcome = "timeout"
                    now = loop.time()
                    if request.deadline is not None and now >= request.deadline:
                        raise DeadlineExceededError(
                            "the request's time was over before its answer was complete"
                        ) from None
                    failed = True
                    raise self._broke(f"sent nothing of its answer for {now - asked:.3g} s") from None
                except NETWORK_ERRORS as error:
                    outcome, words = broken(error)
                    failed = True
                    raise self._broke(words) from error
                except CallError as error:
                    outcome, failed = error.outcome, True
                    raise self._broke(str(error)) from error
                stats.per_token.observe(loop.time() - last)
                last = loop.time()
            outcome, failed = "ok", False
            await put(None)
            await reader.read_to_end()
        finally:
            await rest.end(outcome, failed)

    def _until(self, request: RelayRequest, now: float, started: float) -> float:
        limit = min(now + self._pool.spec.timeout_s, started + ANSWER_LIMIT_S)
        return limit if request.deadline is None else min(limit, request.deadline)

    def _count(self, piece: RelayPiece) -> None:
        stats = self.stats
        for choice in piece.choices:
            reason = choice.get("finish_reason")
            if reason is not None:
                stats.finished["length" if reason == "length" else "stop"] += 1
        if piece.usage is not None:
            stats.prompt_tokens += piece.usage.prompt_tokens
            stats.cached_tokens += piece.usage.cached_tokens
            stats.completion_tokens += piece.usage.completion_tokens
            stats.prefix_hits += piece.usage.cached_tokens > 0

    # --- errors ----------------------------------------------------------------------------------------------------

    def _broke(self, words: str) -> UpstreamError:
        return UpstreamError(f"upstream '{self._remote.upstream}' {words}, in the middle of its answer")

    def _refused(self, request: RelayRequest, reply: Reply) -> GatewayError:
        """The error for a status that is not tried again."""
        upstream, status = f"upstream '{self._remote.upstream}'", reply.status
        if status in _REFUSALS:
            try:
                said = orjson.loads(bytes(reply.body[:65536]))
            except orjson.JSONDecodeError:
                said = None
            return self.refusal(said.get("error", said.get("detail")) if isinstance(said, dict) else None, status)
        if status in (401, 403):
            logger.error("%s does not take the gateway's secret: status %d", upstream, status)
            return UpstreamError(f"{upstream} does not let the gateway in")
        if status == 404 and request.operation != self._remote.operation:
            return InvalidParameterError(
                f"model: expected one that takes requests of this kind, {upstream} has none for it there", "model"
            )
        if status == 404:
            return UpstreamError(f"{upstream} does not have the model")
        if status in (408, 504):
            return DeadlineExceededError(f"{upstream} did not finish in time")
        return UpstreamError(f"{upstream} answered with status {status}")

    def refusal(self, said: Any, status: int | None = None) -> InvalidParameterError:
        """The error for a request that an upstream calls wrong, from the ``error`` of its answer."""
        message, param, code = said, None, None
        if isinstance(said, dict):
            message, param, code = said.get("message"), said.get("param"), said.get("code")
        words = self._clean(message) if isinstance(message, str) else ""
        if not words:
            words = "the request is wrong" if status is None else f"status {status}"
        param = param if isinstance(param, str) and _PARAM.fullmatch(param) else None
        kind = ContextLengthError if code == "context_length_exceeded" else InvalidParameterError
        return kind(f"upstream '{self._remote.upstream}' refused the request: {words}", param)

    def failure(self, said: Any) -> GatewayError:
        """The error for one that an upstream tells of within a stream."""
        if isinstance(said, dict) and said.get("type") == "invalid_request_error":
            return self.refusal(said)
        if isinstance(said, dict) and said.get("code") == DeadlineExceededError.code:
            return DeadlineExceededError(f"upstream '{self._remote.upstream}' did not finish in time")
        return self._broke("told of an error of its own")

    def _clean(self, text: str) -> str:
        """An upstream's words about a request, without what they may have of its secret and of where it is."""
        text = "".join(c if c.isprintable() else " " for c in text[: 4 * _SHOWN_CHARACTERS]).strip()
        spec = self._pool.spec
        hidden = [] if spec.secret is None else [spec.secret.value]
        for endpoint in spec.endpoints:
            url = httpx.URL(endpoint.url)
            hidden += [endpoint.url, url.netloc.decode("ascii", "replace"), url.host]
        for secret in hidden:
            if secret:
                text = re.sub(re.escape(secret), "***", text, flags=re.I)
        text = _SECRET.sub("***", _ADDRESS.sub("***", text))
        return text[:_SHOWN_CHARACTERS]


class _ChunkReader:
    """Reads the chunks of one answer.

    Attributes:
        pieces: that were read and that nobody took.
        over: the answer is complete.
        error: what the upstream says went wrong, after ``pieces``.
    """

    def __init__(
        self, relay: ChatRelay, request: RelayRequest, headers: httpx.Headers, body: AsyncIterator[bytes]
    ) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "text/event-stream":
            raise CallError("failed", "did not answer with a stream of events", retryable=False)
        self._relay = relay
        self._request = request
        self._body = body
        self._events = EventReader()
        self._left = relay._pool.spec.max_response_bytes
        self._open: set[int] = set()
        self._finished: set[int] = set()
        self._counted: tuple[Usage, dict[str, Any]] | None = None
        self._failure: CallError | None = None
        self.pieces: list[RelayPiece] = []
        self.over = False
        self.error: GatewayError | None = None

    async def begin(self) -> None:
        await self.more()

    async def more(self) -> None:
        """Read until there is a piece, or the end.

        Raises:
            CallError: what came is not what the protocol has, or it ended too early.
        """
        while not self.pieces and not self.over and self.error is None:
            if self._failure is not None:
                raise self._failure
            part = await anext(self._body, None)
            try:
                if part is None:
                    self._end_early()
                else:
                    self._take_part(part)
            except CallError as error:
                # What was good before it is told first, however the bytes were cut on their way.
                self._failure = error

    def _take_part(self, part: bytes) -> None:
        self._left -= len(part)
        if self._left < 0:
            limit = self._relay._pool.spec.max_response_bytes
            raise CallError("failed", f"answered with more than {limit} bytes", retryable=False)
        try:
            events = self._events.feed(part)
        except EventTooLongError:
            raise CallError("failed", "sent an event that is too long", retryable=False) from None
        for event in events:
            if self.over or self.error is not None:
                break
            self._take(event)

    def _end_early(self) -> None:
        """The response ended without a word that it would: fine where the answer is complete."""
        if self._open or not self._finished:
            raise CallError("broken", "broke off before its answer was complete", retryable=True, broken=True)
        self._end()

    async def read_to_end(self) -> None:
        """Read what follows the answer, which is to be nothing, so that the connection can be used again."""
        try:
            async with asyncio.timeout(_END_S):
                while await anext(self._body, None) is not None and self._left > 0:
                    self._left = 0  # one part more, the mark of the end perhaps
        except (TimeoutError, *NETWORK_ERRORS):
            pass

    def _take(self, event: bytes) -> None:
        if event.strip() == b"[DONE]":
            if self._open or not self._finished:
                raise CallError("broken", "ended before its answer was complete", retryable=True)
            self._end()
            return
        try:
            chunk = parse_json(event)
            if chunk.get("error") is not None:
                self.error = self._relay.failure(chunk["error"])
                return
            self._counted = _read_usage(chunk.get("usage")) or self._counted  # some tell it with every chunk
            choices = [
                choice for item in _choices(chunk, self._request.answers) if (choice := self._read(item)) is not None
            ]
        except UpstreamError as error:
            raise CallError(
                "failed", f"answered what the protocol does not have: {error.message}", retryable=False
            ) from error
        if choices:
            self.pieces.append(RelayPiece(choices))

    def _end(self) -> None:
        self.over = True
        if self._counted is not None:
            self.pieces.append(RelayPiece((), *self._counted))

    def _read(self, item: dict[str, Any]) -> dict[str, Any] | None:
        """One choice of a chunk; None where it has nothing to tell."""
        index: int = item["index"]
        if index in self._finished:
            return None
        self._open.add(index)
        reason = _reason(item)
        choice: dict[str, Any] = {"index": index}
        if self._request.operation == "chat":
            delta = item.get("delta")
            choice["delta"] = _message({} if delta is None else delta, whole=False)
            told = bool(choice["delta"])
        else:
            choice["text"] = _text(item, "text") or ""
            told = bool(choice["text"])
        choice["logprobs"] = _plain(item.get("logprobs"))
        choice["finish_reason"] = reason
        if reason is not None:
            self._finished.add(index)
            self._open.discard(index)
        return choice if told or reason is not None or choice["logprobs"] else None


def _read_whole(request: RelayRequest, body: bytes | bytearray) -> RelayPiece:
    found = parse_json(body)
    choices: list[dict[str, Any]] = []
    for item in _choices(found, request.answers):
        choice: dict[str, Any] = {"index": item["index"]}
        if request.operation == "chat":
            message = _message(item.get("message"), whole=True)
            choice["message"] = {"role": "assistant", "content": None, "refusal": None, **message}
        else:
            choice["text"] = _text(item, "text") or ""
        choice["logprobs"] = _plain(item.get("logprobs"))
        choice["finish_reason"] = _reason(item)
        if choice["finish_reason"] is None:
            raise UpstreamError("expected a finish_reason of each choice of the upstream's answer")
        choices.append(choice)
    if not choices or len({choice["index"] for choice in choices}) != len(choices):
        raise UpstreamError("expected each choice once in the upstream's answer")
    choices.sort(key=lambda choice: choice["index"])
    usage, counts = _read_usage(found.get("usage")) or (None, None)
    return RelayPiece(choices, usage, counts)


def _choices(found: Mapping[str, Any], answers: int) -> list[dict[str, Any]]:
    choices = found.get("choices")
    if choices is None and found.get("usage") is not None:
        return []
    if not isinstance(choices, list) or len(choices) > answers:
        raise UpstreamError(f"expected at most {answers} choices")
    for item in choices:
        index = item.get("index") if isinstance(item, dict) else None
        if type(index) is not int or not 0 <= index < answers:
            raise UpstreamError("expected an index of each choice")
    return choices


def _text(item: Mapping[str, Any], name: str) -> str | None:
    value = item.get(name)
    if value is not None and not isinstance(value, str):
        raise UpstreamError(f"expected a text as '{name}'")
    return value


def _reason(item: Mapping[str, Any]) -> str | None:
    reason = _text(item, "finish_reason")
    return None if reason is None else reason[:64]


def _message(value: Any, *, whole: bool) -> dict[str, Any]:
    """What a message, or a piece of one, tells; the role, which is always the assistant's, is not among that."""
    if not isinstance(value, dict):
        raise UpstreamError("expected a message of each choice")
    told: dict[str, Any] = {}
    for name, member in value.items():
        if name == "role" or member is None or member == "" or member == []:
            continue
        if name in ("content", "refusal", "reasoning_content", "reasoning"):
            told[name] = _text(value, name)
        elif name == "tool_calls":
            told[name] = _calls(member, whole=whole)
        else:
            told[name[:64]] = _plain(member)
    if whole and isinstance(value.get("content"), str):
        told["content"] = value["content"]
    return told


def _calls(value: Any, *, whole: bool) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise UpstreamError("expected a list of calls")
    calls = []
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UpstreamError("expected a function of each call")
        name, arguments = _text(function, "name"), _text(function, "arguments")
        if whole:
            if name is None:
                raise UpstreamError("expected a name of each function")
            told = {"id": _text(call, "id") or "", "type": "function"}
            calls.append({**told, "function": {"name": name, "arguments": arguments or ""}})
            continue
        index = call.get("index", 0)
        if type(index) is not int or not 0 <= index < 1024:
            raise UpstreamError("expected an index of each call")
        piece: dict[str, Any] = {"index": index}
        if call.get("id"):
            piece |= {"id": _text(call, "id"), "type": "function"}
        piece["function"] = {
            **({"name": name} if name else {}), **({"arguments": arguments} if arguments is not None else {})
        }  # fmt: skip
        calls.append(piece)
    return calls


def _plain(value: Any) -> Any:
    """A member that is passed on as it is; what is nested too deeply to be written again is none."""
    levels, inner = 0, [value]
    while inner := [one for one in inner if isinstance(one, dict | list)]:
        levels += 1
        if levels > _MOST_LEVELS:
            raise UpstreamError(f"expected at most {_MOST_LEVELS} levels")
        inner = [deep for one in inner for deep in (one.values() if isinstance(one, dict) else one)]
    return value


def _read_usage(value: Any) -> tuple[Usage, dict[str, Any]] | None:
    """Tokens as an upstream counts them; None where it does not tell, or nothing that can be."""
    if not isinstance(value, dict):
        return None
    prompt, completion = value.get("prompt_tokens"), value.get("completion_tokens")
    if not (_is_count(prompt) and _is_count(completion)):
        return None
    details = {
        name: {key: count for key, count in found.items() if _is_count(count)}
        for name in ("prompt_tokens_details", "completion_tokens_details")
        if isinstance(found := value.get(name), dict)
    }
    cached = details.setdefault("prompt_tokens_details", {}).setdefault("cached_tokens", 0)
    told = {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **details
    }  # fmt: skip
    return Usage(prompt, completion, cached), told


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MOST_TOKENS
