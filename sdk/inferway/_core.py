"""What both clients share and neither sends: calls to requests, replies to results, failures to errors.

Nothing here does I/O or knows httpx. A resource makes a `Call`; a client makes a `Plan` of it, which holds what stays
the same over all attempts, asks it for each attempt's headers, and hands the `Reply` to `result`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from inspect import isawaitable
from typing import Any, Final, Generic, NoReturn, TypeAlias, TypeVar, cast
from urllib.parse import quote

from inferway_contract import codes, names

from ._errors import (
    APIError,
    APIResponseValidationError,
    APIStatusError,
    ConfigurationError,
    MalformedAnswer,
    status_error_class,
)
from ._options import (
    NO_RETRY,
    NOT_GIVEN,
    OPTION_NAMES,
    Clock,
    RequestEvent,
    RequestHook,
    RequestOptions,
    ResponseEvent,
    ResponseHook,
    RetryHook,
    RetryPolicy,
    Timeout,
)
from ._version import __version__

T = TypeVar("T")

_process_id = os.urandom(10).hex()
_calls: Final = itertools.count()
"""Request ids and idempotency keys are a random part, which every process has for itself, and a count: unique like a
random number of their length, and several times cheaper."""


def _renew_process_id() -> None:
    global _process_id
    _process_id = os.urandom(10).hex()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_process_id)

HeaderList: TypeAlias = list[tuple[str, str]]


class Stream:
    """A body that is read while it is sent, in pieces of the buffer protocol.

    Attributes:
        size: bytes.
        read: begins to read; called for each attempt.
        sent: told the number of bytes of each piece that the connection has taken.
        blocking: reading waits for a disk, which an event loop must not.
        stall_s: how long the connection may take for one piece, in seconds.
    """

    __slots__ = ("blocking", "read", "sent", "size", "stall_s")

    def __init__(
        self,
        read: Callable[[], Iterator[Any]],
        size: int,
        sent: Callable[[int], object],
        *,
        blocking: bool,
        stall_s: float | None,
    ) -> None:
        self.read = read
        self.size = size
        self.sent = sent
        self.blocking = blocking
        self.stall_s = stall_s

    def __iter__(self) -> Iterator[Any]:
        for piece in self.read():
            yield piece
            # Whoever iterates comes back when the piece is on its way.
            self.sent(len(piece))


Body: TypeAlias = "bytes | tuple[Any, ...] | Stream"
"""Bytes, or pieces of the buffer protocol that are sent one after the other without being joined, or a stream."""

DEFAULT_BASE_URL: Final = "http://127.0.0.1:8080"
MAX_RESPONSE_BYTES: Final = 256 * 1024 * 1024
JSON_LIMIT_BYTES: Final = 32 * 1024 * 1024
"""The most JSON that is decoded: 32 MiB of brackets take near a GiB as Python objects. Tensors are binary anyway."""
_EXCERPT_BYTES: Final = 1024
_SECRET_HEADERS: Final = frozenset({"authorization", "x-api-key", "proxy-authorization", "cookie", "set-cookie"})
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e\t]*")


class HeaderMap(Mapping[str, str]):
    """Headers of an answer; names in any case. Of a header that came twice the values are joined by a comma."""

    __slots__ = ("_values",)

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        values: dict[str, str] = {}
        for name, value in raw:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            values[key] = f"{values[key]}, {text}" if key in values else text
        self._values = values

    def __getitem__(self, name: str) -> str:
        return self._values[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"HeaderMap({self._values!r})"


class Reply:
    """One answer: status, headers as they came, body, and what it took to get it.

    Attributes:
        body: bytes, or a bytearray of which tensors may be views; after any Content-Encoding was undone.
        attempts: which attempt this answers.
        elapsed: seconds from the call to the end of this answer, over all attempts.
        sent_id: the request id that was sent.
    """

    __slots__ = ("_index", "attempts", "body", "elapsed", "raw_headers", "sent_id", "status_code")

    status_code: int
    raw_headers: Sequence[tuple[bytes, bytes]]
    body: bytes | bytearray
    attempts: int
    elapsed: float
    sent_id: str | None

    def __init__(
        self, status_code: int, raw_headers: Sequence[tuple[bytes, bytes]], body: bytes | bytearray = b""
    ) -> None:
        self.status_code = status_code
        self.raw_headers = raw_headers
        self.body = body
        self._index = {name.lower(): value for name, value in raw_headers}
        self.sent_id = None

    def header(self, name: bytes) -> bytes | None:
        """The last header of that name, which is given in lower case."""
        return self._index.get(name)

    @property
    def request_id(self) -> str | None:
        """The id under which the gateway's log knows the request: the answer's, else the one that was sent."""
        found = self._index.get(b"x-request-id")
        return found.decode("latin-1") if found is not None else self.sent_id

    @property
    def headers(self) -> HeaderMap:
        return HeaderMap(self.raw_headers)


Opened = TypeVar("Opened")


class OpenReply(Reply, Generic[Opened]):
    """An answer that began to stream: its head, and where its pieces come from. Whoever gets it closes it.

    Attributes:
        pieces: gives the pieces of the body and closes the connection; None where the body was read whole, as those of
            errors are.
    """

    __slots__ = ("pieces",)

    pieces: Opened | None

    def __init__(self, status_code: int, raw_headers: Sequence[tuple[bytes, bytes]]) -> None:
        super().__init__(status_code, raw_headers)
        self.pieces = None

    @property
    def streams(self) -> bool:
        """Whether the body is a stream of events, and none that a proxy has packed."""
        kind = (self.header(b"content-type") or b"").partition(b";")[0].strip().lower()
        packed = (self.header(b"content-encoding") or b"identity").strip().lower() != b"identity"
        return 200 <= self.status_code < 300 and kind == b"text/event-stream" and not packed


@dataclass(slots=True, eq=False)
class Call(Generic[T]):
    """One operation of the API, before time limits and keys.

    Attributes:
        method, path: the path is quoted and starts with a slash; the client's base URL goes before it.
        read: an answer to the operation's result; raises `MalformedAnswer` where the answer breaks the contract.
        body, body_headers: what is sent, and the headers that describe it.
        repeatable: doing it twice is as good as once, so that it may be sent again although an attempt may have
            arrived. An inference is; making a key is not.
        statuses: statuses beside 2xx that ``read`` understands.
    """

    method: str
    path: str
    read: Callable[[Reply], T]
    body: Body = b""
    body_headers: tuple[tuple[str, str], ...] = ()
    repeatable: bool = True
    statuses: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Config:
    """Everything about a client but its connections. ``with_options`` makes changed copies."""

    base_url: str
    host: str
    api_key: str | Callable[[], Any] | None = field(repr=False)
    timeout: Timeout
    retry: RetryPolicy
    default_headers: Mapping[str, str] = field(repr=False)
    max_response_bytes: int
    clock: Clock
    on_request: RequestHook | None = None
    on_response: ResponseHook | None = None
    on_retry: RetryHook | None = None
    static: HeaderList = field(init=False, repr=False)
    """Headers that are the same on every request."""

    def __post_init__(self) -> None:
        headers: HeaderList = [
            ("Host", self.host),
            # Tensors hardly shrink, and a body that is not compressed cannot be a bomb.
            ("Accept-Encoding", "identity"),
            ("User-Agent", f"inferway-python/{__version__}"),
        ]
        if isinstance(self.api_key, str):
            headers.append(authorization(self.api_key))
        object.__setattr__(self, "static", overridden(headers, self.default_headers))

    def changed(self, **changes: Any) -> Config:
        """A copy with other values."""
        return replace(self, **changes)


def authorization(api_key: object) -> tuple[str, str]:
    """The header that carries a key.

    Raises:
        ConfigurationError: the key cannot stand in a header. The message does not hold it.
    """
    if not isinstance(api_key, str):
        raise ConfigurationError(f"expected the API key as text, got {type(api_key).__name__}")
    stripped = api_key.strip()
    if not stripped or not stripped.isascii() or not stripped.isprintable() or " " in stripped:
        raise ConfigurationError("the API key is empty or holds spaces, line breaks or characters that are not ASCII")
    return ("Authorization", f"Bearer {stripped}")


def overridden(headers: HeaderList, more: Mapping[str, str] | None) -> HeaderList:
    """Headers with those of ``more`` put in the place of equal names.

    Raises:
        ConfigurationError: a name or value that HTTP does not allow, such as one with a line break.
    """
    if not more:
        return headers
    added: HeaderList = []
    for name, value in more.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ConfigurationError(f"expected headers as text, got {type(name).__name__}: {type(value).__name__}")
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ConfigurationError(f"the header {name!r:.60} has a name or a value that HTTP does not allow")
        added.append((name, value))
    replaced = {name.lower() for name, _ in added}
    return [pair for pair in headers if pair[0].lower() not in replaced] + added


def path_of(*segments: str) -> str:
    """A path of segments, each quoted as a whole, so that no name can leave its place."""
    # "@" parts a model's name from an alias; RFC 3986, section 3.3, lets it stand in a path as it is.
    return "/" + "/".join(quote(segment, safe="@") for segment in segments)


def model_path(model: str, version: str | int | None, *operation: str) -> str:
    """``/v2/models/{model}[/versions/{version}]/…``.

    Raises:
        ConfigurationError: the name or version is empty or of another type.
    """
    if not isinstance(model, str) or not model:
        raise ConfigurationError(f"expected a model name as text, got {model!r:.80}")
    if version is None:
        return path_of("v2", "models", model, *operation)
    text = str(version)
    if isinstance(version, bool) or not names.VERSION_PATTERN.fullmatch(text):
        raise ConfigurationError(f"expected a version as a whole number, got {version!r:.80}")
    return path_of("v2", "models", model, "versions", text, *operation)


class Plan:
    """One call with its options: what stays the same over all of its attempts, and where it stands."""

    __slots__ = (
        "_fixed", "attempt", "call", "clock", "config", "deadline", "max_bytes", "more", "request_id", "retry",
        "started", "timeout",
    )  # fmt: skip

    config: Config
    call: Call[Any]
    clock: Clock
    timeout: Timeout
    retry: RetryPolicy
    max_bytes: int
    more: Mapping[str, str] | None
    request_id: str
    started: float
    deadline: float | None
    attempt: int

    def __init__(self, config: Config, call: Call[Any], options: RequestOptions) -> None:
        self.config = config
        self.call = call
        self.timeout = config.timeout
        self.retry = config.retry
        self.max_bytes = config.max_response_bytes
        self.more = None
        idempotency_key = None
        request_id = None
        if options:
            if not options.keys() <= OPTION_NAMES:
                unknown = ", ".join(sorted(options.keys() - OPTION_NAMES))
                raise TypeError(
                    f"unexpected keyword argument: {unknown}; options are {', '.join(sorted(OPTION_NAMES))}"
                )
            if "timeout" in options:
                self.timeout = Timeout.of(options["timeout"])
            if "retry" in options:
                self.retry = options["retry"] or NO_RETRY
            self.max_bytes = options.get("max_response_bytes", self.max_bytes)
            self.more = options.get("headers")
            idempotency_key = options.get("idempotency_key")
            request_id = options.get("request_id")
        if request_id is None:
            request_id = f"{_process_id}{next(_calls):010x}"
        elif not names.REQUEST_ID_PATTERN.fullmatch(request_id):
            raise ConfigurationError("request_id expects 1 to 128 characters of A-Z a-z 0-9 . _ : -")
        self.request_id = request_id
        fixed = [*config.static, *call.body_headers, ("X-Request-Id", request_id)]
        if call.method == "POST":
            if idempotency_key is None:
                idempotency_key = request_id
            elif (
                not 0 < len(idempotency_key) <= 255
                or not idempotency_key.isascii()
                or not idempotency_key.isprintable()
            ):
                raise ConfigurationError("idempotency_key expects 1 to 255 visible ASCII characters")
            fixed.append(("Idempotency-Key", idempotency_key))
        self._fixed = fixed
        self.clock = config.clock
        self.started = now = config.clock.monotonic()
        total = self.timeout.total
        self.deadline = None if total is None else now + total
        self.attempt = 0

    def left(self) -> float | None:
        """Seconds until the call's time is over, None without a limit; may be negative."""
        return None if self.deadline is None else self.deadline - self.clock.monotonic()

    def headers(self, left: float | None, key: object = NOT_GIVEN) -> HeaderList:
        """The headers of the attempt that `attempt` counts; ``key`` is what a function gave as the key."""
        headers = self._fixed.copy()
        if self.attempt > 1:
            headers.append(("Inferway-Attempt", str(self.attempt)))
        if left is not None:
            granted = min(names.MAX_TIMEOUT_MS, max(1, math.ceil(left * 1000)))
            headers.append(("Inferway-Timeout-Ms", str(granted)))
        if key is not NOT_GIVEN:
            pair = authorization(key)
            if not any(name.lower() == "authorization" for name, _ in headers):
                headers.append(pair)
        return overridden(headers, self.more) if self.more else headers

    def accept(self, reply: Reply) -> Reply:
        """The reply with what is known of the call; raises its `APIStatusError` where it is an error."""
        reply.attempts = self.attempt
        reply.elapsed = self.clock.monotonic() - self.started
        reply.sent_id = self.request_id
        encoding = reply.header(b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
            try:
                reply.body = decoded(reply.body, encoding, self.max_bytes)
            except MalformedAnswer as error:
                self._refuse(reply, error)
        status = reply.status_code
        if 200 <= status < 300 or status in self.call.statuses:
            return reply
        raise self._status_error(reply)

    def result(self, reply: Reply) -> Any:
        """What the call gives.

        Raises:
            APIResponseValidationError: the answer breaks the contract.
        """
        try:
            return self.call.read(reply)
        except MalformedAnswer as error:
            self._refuse(reply, error)

    def refuse_no_stream(self, reply: Reply) -> NoReturn:
        """A stream was asked for, and something else came."""
        kind = (reply.header(b"content-type") or b"nothing").decode("latin-1")
        self._refuse(reply, MalformedAnswer(f"expected a stream of events, got {kind:.80}"))

    def fail(self, error: APIError) -> APIError:
        """The error with what is known of the call."""
        error.attempts = self.attempt
        error.elapsed = self.clock.monotonic() - self.started
        if error.request_id is None:
            error.request_id = self.request_id
        return error

    def hide(self, text: str) -> str:
        """A text without the key, should a server or a proxy echo it."""
        for _, value in self._fixed:
            # A short key would be found within ordinary words.
            if value.startswith("Bearer ") and len(value) >= 15:
                text = text.replace(value[7:], "***")
        return names.KEY_IN_TEXT_PATTERN.sub("***", text)

    def event(self, headers: HeaderList, body_bytes: int, left: float | None) -> RequestEvent:
        """The attempt as a hook and the log see it."""
        shown = {name: "***" if name.lower() in _SECRET_HEADERS else value for name, value in headers}
        return RequestEvent(
            method=self.call.method,
            url=self.config.base_url + self.call.path,
            headers=shown,
            body_bytes=body_bytes,
            attempt=self.attempt,
            request_id=self.request_id,
            timeout_s=left,
        )

    def answered(self, request: RequestEvent, reply: Reply, elapsed: float) -> ResponseEvent:
        """The answer as a hook and the log see it."""
        return ResponseEvent(
            request=request,
            status_code=reply.status_code,
            headers=reply.headers,
            body_bytes=len(reply.body),
            elapsed_s=elapsed,
        )

    def _refuse(self, reply: Reply, error: MalformedAnswer) -> NoReturn:
        refused = APIResponseValidationError(
            self.hide(f"{self.call.method} {self.call.path}: {error}"),
            status_code=reply.status_code,
            request_id=reply.request_id,
            body=self.hide(excerpt(reply.body)),
        )
        raise self.fail(refused) from error

    def _status_error(self, reply: Reply) -> APIStatusError:
        status = reply.status_code
        members: Any = None
        with contextlib.suppress(MalformedAnswer):
            members = load_json(reply.body)
        text, code = _message(members)
        if not text and 300 <= status < 400:
            text = "the answer is a redirect, which the SDK does not follow, since it would carry the API key along"
        if not text:
            text = f"{self.call.method} {self.call.path} was answered with status {status}"
            line = excerpt(reply.body).strip().split("\n", 1)[0][:200]
            if line and not line.startswith("<"):
                text += f": {line}"
        hint = reply.header(b"x-should-retry")
        if hint is not None and hint.strip().lower() in (b"true", b"false"):
            retryable = hint.strip().lower() == b"true"
        elif code is not None and code in codes.ERRORS:
            retryable = codes.ERRORS[code].retryable
        else:
            retryable = status in self.retry.statuses
        return status_error_class(status, code)(
            self.hide(text),
            status_code=status,
            code=code,
            request_id=reply.request_id,
            retryable=retryable,
            retry_after=retry_after(reply.header(b"retry-after"), self.clock),
            body=members if isinstance(members, dict) else self.hide(excerpt(reply.body)),
            headers=reply.headers,
        )


def _message(members: object) -> tuple[str, str | None]:
    """Text and code of an error body: ours, a problem (RFC 9457), or an OpenAI-like object."""
    if not isinstance(members, dict):
        return "", None
    body = cast(dict[str, object], members)
    code = body.get("code")
    text = body.get("error", body.get("detail", body.get("title")))
    if isinstance(text, dict):
        inner = cast(dict[str, object], text)
        code = inner.get("code") or code
        text = inner.get("message")
    return (text if isinstance(text, str) else "", code if isinstance(code, str) else None)


def retry_after(value: bytes | None, clock: Clock) -> float | None:
    """Seconds of a ``Retry-After``, which is a number or a date; None for anything else and for the past.

    Source: RFC 9110, section 10.2.3. Fractions are not in it and are taken, because servers send them.
    """
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - clock.wall()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def excerpt(body: bytes | bytearray) -> str:
    """The first kilobyte of a body as text."""
    return bytes(body[:_EXCERPT_BYTES]).decode("utf-8", "replace")


def decoded(body: bytes | bytearray, encoding: bytes, limit: int) -> bytes:
    """Undo gzip or deflate, never to more than ``limit`` bytes."""
    coding = encoding.strip().lower()
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        raise MalformedAnswer(
            f"the answer has the Content-Encoding {coding.decode('latin-1')!r:.40}, which was not asked for"
        )
    unpack = zlib.decompressobj(zlib.MAX_WBITS if coding == b"deflate" else zlib.MAX_WBITS | 16)
    try:
        plain = unpack.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedAnswer(f"the answer's Content-Encoding cannot be undone: {error}") from error
    if len(plain) > limit:
        raise MalformedAnswer(f"the answer is longer than max_response_bytes, {limit}")
    if not unpack.eof:
        raise MalformedAnswer("the answer's Content-Encoding ends too early")
    return plain


def load_json(data: bytes | bytearray | memoryview) -> Any:
    """Decode a JSON document from a server that may be hostile.

    Raises:
        MalformedAnswer: it is none, is too long, or is nested deeper than Python's stack.
    """
    if len(data) > JSON_LIMIT_BYTES:
        raise MalformedAnswer(f"{len(data)} bytes of JSON are more than are decoded, {JSON_LIMIT_BYTES}")
    try:
        return json.loads(str(data, "utf-8"))
    except RecursionError as error:
        raise MalformedAnswer("the JSON is nested too deep") from error
    except ValueError as error:
        raise MalformedAnswer(f"expected JSON, {error}") from error


def json_call(
    method: str,
    path: str,
    read: Callable[[Reply], T],
    body: object = None,
    *,
    repeatable: bool = True,
    statuses: frozenset[int] = frozenset(),
) -> Call[T]:
    """A call with a JSON body, or none where ``body`` is None."""
    headers: tuple[tuple[str, str], ...] = ()
    if body is None:
        if method == "POST":
            headers = (("Content-Length", "0"),)
        return Call(method, path, read, b"", headers, repeatable, statuses)
    content = json.dumps(body, separators=(",", ":")).encode()
    headers = (("Content-Type", "application/json"), ("Content-Length", str(len(content))))
    return Call(method, path, read, content, headers, repeatable, statuses)


def refuse_awaitable(value: object, hook: str) -> None:
    """Hooks of a synchronous client cannot be awaited."""
    if isawaitable(value):
        close = getattr(value, "close", None)
        if close is not None:
            close()
        raise TypeError(f"{hook} of a synchronous client must not be a coroutine function")
