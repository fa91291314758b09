"""`Inferway` and `AsyncInferway`: two thin shells over the same core.

Sync and async are twins written by hand, not generated: what could differ by mistake (building requests, reading
answers, errors, retry rules) is one code in `_core` and `_retry`, and what is left are signatures, docstrings and an
``await``, which ``tests/sdk/test_twins.py`` compares word by word. Generating one from the other would add a build step
and a second place to look, to save those lines.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, Unpack

from ._calls import reader
from ._core import DEFAULT_BASE_URL, MAX_RESPONSE_BYTES, Call, Config, Reply, authorization, json_call, path_of
from ._encoding import (
    ClassifyResult,
    RerankResult,
    Texts,
    Vectors,
    classify_call,
    rerank_call,
)
from ._engine import AsyncEngine, SyncEngine, logger
from ._errors import ConfigurationError
from ._inference import InferenceResult, Outputs
from ._options import (
    NO_RETRY,
    NOT_GIVEN,
    SYSTEM_CLOCK,
    Clock,
    NotGiven,
    RequestHook,
    RequestOptions,
    ResponseHook,
    RetryHook,
    RetryPolicy,
    Timeout,
)
from ._raw import (
    AsyncRawChat,
    AsyncRawCompletions,
    AsyncRawEmbeddings,
    AsyncRawHealth,
    AsyncRawKeys,
    AsyncRawMethod,
    AsyncRawModels,
    RawChat,
    RawCompletions,
    RawEmbeddings,
    RawHealth,
    RawKeys,
    RawMethod,
    RawModels,
    RawView,
)
from ._transport import AsyncHTTPClient, SyncHTTPClient, SyncSender, split_base_url
from .resources.chat import AsyncChat, Chat
from .resources.completions import AsyncCompletions, Completions
from .resources.embeddings import AsyncEmbeddings, Embeddings, embed, embed_async
from .resources.health import AsyncHealth, Health
from .resources.inference import AsyncModelHandle, ModelHandle, run, run_async
from .resources.keys import AsyncKeys, Keys
from .resources.models import AsyncModels, Models

if TYPE_CHECKING:
    from inferway_contract.models import ServerMetadata

ApiKey: TypeAlias = str | Callable[[], str]
AsyncApiKey: TypeAlias = str | Callable[[], str | Awaitable[str]]

BASE_URL_VARIABLE: Final = "INFERWAY_BASE_URL"
API_KEY_VARIABLE: Final = "INFERWAY_API_KEY"
MAX_CONNECTIONS: Final = 128
_LOOPBACK: Final = ("localhost", "127.", "[::1]")
_warned: Final[set[str]] = set()


def _configured(
    base_url: str | None,
    api_key: Any,
    timeout: float | Timeout | None,
    retry: RetryPolicy | None,
    default_headers: Mapping[str, str] | None,
    max_response_bytes: int,
    on_request: RequestHook | None,
    on_response: ResponseHook | None,
    on_retry: RetryHook | None,
    clock: Clock | None,
) -> Config:
    """Arguments, then the environment, then defaults. The environment is read here, when a client is made."""
    if base_url is None:
        base_url = os.environ.get(BASE_URL_VARIABLE) or DEFAULT_BASE_URL
    if api_key is None:
        api_key = os.environ.get(API_KEY_VARIABLE) or None
    if isinstance(api_key, str):
        authorization(api_key)
    elif api_key is not None and not callable(api_key):
        raise ConfigurationError(f"api_key expects text or a function that gives it, got {type(api_key).__name__}")
    url, host = split_base_url(base_url)
    if api_key is not None and url.startswith("http:") and not host.startswith(_LOOPBACK) and url not in _warned:
        _warned.add(url)
        logger.warning("the API key will cross the network to %s unencrypted; use https", url)
    return Config(
        base_url=url,
        host=host,
        api_key=api_key,
        timeout=Timeout.of(timeout),
        retry=retry or NO_RETRY,
        default_headers=dict(default_headers or {}),
        max_response_bytes=_checked_size(max_response_bytes),
        clock=clock or SYSTEM_CLOCK,
        on_request=on_request,
        on_response=on_response,
        on_retry=on_retry,
    )


def _checked_size(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"max_response_bytes expects a whole number of at least 1, got {value!r}")
    return value


def _changes(
    config: Config,
    api_key: Any,
    timeout: float | Timeout | NotGiven | None,
    retry: RetryPolicy | NotGiven | None,
    default_headers: Mapping[str, str] | NotGiven,
    max_response_bytes: int | NotGiven,
    on_request: RequestHook | NotGiven | None,
    on_response: ResponseHook | NotGiven | None,
    on_retry: RetryHook | NotGiven | None,
) -> Config:
    changes: dict[str, Any] = {
        name: value
        for name, value in (
            ("api_key", api_key),
            ("on_request", on_request),
            ("on_response", on_response),
            ("on_retry", on_retry),
        )
        if value is not NOT_GIVEN
    }
    if timeout is not NOT_GIVEN:
        changes["timeout"] = Timeout.of(timeout)
    if retry is not NOT_GIVEN:
        changes["retry"] = retry or NO_RETRY
    if default_headers is not NOT_GIVEN:
        changes["default_headers"] = {**config.default_headers, **default_headers}
    if max_response_bytes is not NOT_GIVEN:
        changes["max_response_bytes"] = _checked_size(max_response_bytes)
    return config.changed(**changes)


def _server() -> Call[ServerMetadata]:
    return json_call("GET", path_of("v2"), reader("ServerMetadata"))


class Inferway:
    """A client of an Inferway gateway, or of any server that speaks the Open Inference Protocol over REST.

    Safe to use from several threads and after a fork: a child process makes connections of its own. Close it, or use it
    as a context manager, to close its connections; one that is dropped closes them by itself.

    Attributes:
        models: which models there are, and their life: deploying, versions, aliases, deleting.
        keys: API keys and their life.
        health: is the gateway there?
        chat, completions: what language models answer.
        embeddings: vectors of texts.
    """

    models: Models
    keys: Keys
    health: Health
    chat: Chat
    completions: Completions
    embeddings: Embeddings

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: ApiKey | None = None,
        timeout: float | Timeout | None = Timeout(),  # noqa: B008 - frozen
        retry: RetryPolicy | None = RetryPolicy(),  # noqa: B008 - frozen
        default_headers: Mapping[str, str] | None = None,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        max_connections: int = MAX_CONNECTIONS,
        http_client: SyncHTTPClient | None = None,
        on_request: RequestHook | None = None,
        on_response: ResponseHook | None = None,
        on_retry: RetryHook | None = None,
        clock: Clock | None = None,
    ) -> None:
        """
        Args:
            base_url: of the gateway, such as ``https://models.example.com``; a path before the API's own is kept. Left
                out: ``INFERWAY_BASE_URL``, else ``http://127.0.0.1:8080``.
            api_key: sent as ``Authorization: Bearer``; a function is called for each attempt, so that a rotated key is
                picked up. Left out: ``INFERWAY_API_KEY``, else no key.
            timeout: seconds for a whole call, retries included, or a `Timeout`; None for no limit.
            retry: which failures are tried again; None to send once.
            default_headers: sent with every request; they replace the SDK's own of the same name.
            max_response_bytes: a longer answer is refused.
            max_connections: connections at most; further calls wait for one.
            http_client: an ``httpx`` or ``httpx2`` client to send through, for proxies, certificates or tests. It is
                closed with this client. Its redirects are not followed; across a fork it is on its own.
            on_request: called before each attempt; headers that it gives are added, for tracing.
            on_response: called after each answer.
            on_retry: called before each delay.
            clock: where time and chance come from, for tests.
        Raises:
            ConfigurationError: an argument or environment variable cannot be used.
        """
        config = _configured(base_url, api_key, timeout, retry, default_headers, max_response_bytes, on_request,
                             on_response, on_retry, clock)  # fmt: skip
        self._use(SyncEngine(config, SyncSender(config.base_url, http_client, max_connections)))

    def _use(self, engine: SyncEngine) -> None:
        self._engine = engine
        self.models = Models(engine)
        self.keys = Keys(engine)
        self.health = Health(engine)
        self.chat = Chat(engine)
        self.completions = Completions(engine)
        self.embeddings = Embeddings(engine)
        self._handles: dict[tuple[str, str | int | None], ModelHandle] = {}

    @property
    def base_url(self) -> str:
        """Where the gateway is, without a slash at the end."""
        return self._engine.config.base_url

    def model(self, model: str, version: str | int | None = None) -> ModelHandle:
        """A handle of a model. Nothing is sent until it is used.

        Args:
            model: its name.
            version: one version; None for the one that answers requests without a version.
        Raises:
            ConfigurationError: the name or version cannot be one.
        """
        handle = self._handles.get((model, version))
        if handle is None:
            handle = ModelHandle(self._engine, model, version)
            if len(self._handles) >= MAX_CONNECTIONS:
                self._handles.clear()
            self._handles[(model, version)] = handle
        return handle

    def infer(
        self,
        model: str,
        inputs: object,
        *,
        version: str | int | None = None,
        outputs: Outputs = None,
        id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> InferenceResult:
        """Run a model once: ``model(model, version).infer(inputs, …)``, see there for everything.

        The first call for a model fetches its signature, against which inputs are checked and cast.
        """
        return run(self.model(model, version), inputs, outputs, id, parameters, priority, binary, options)

    def embed(
        self,
        texts: Texts,
        *,
        model: str,
        dimensions: int | None = None,
        input_type: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Vectors:
        """Vectors of any number of texts: ``float32`` of shape ``[n, d]``, in the order of the texts.

        Many texts are sent in several requests, one after the other; ``timeout`` is for all of them.

        Args:
            texts: a text, or several in a list, an array, a pandas or polars column, or any other iterable.
            model: ``NAME`` or ``NAME@ALIAS``.
            dimensions: cut the vectors to that length, where the model allows it.
            input_type: such as ``query`` or ``document``: which of the model's prompts is put before each text.
        Raises:
            InvalidInputError: something among them is no text.
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer to one of the requests.
        """
        return embed(self._engine, texts, model, dimensions, input_type, options)

    def rerank(
        self,
        query: str,
        documents: Texts,
        *,
        model: str,
        top_n: int | None = None,
        return_documents: bool = False,
        **options: Unpack[RequestOptions],
    ) -> RerankResult:
        """Documents by their relevance to a query, the most relevant first.

        Args:
            query: a text.
            documents: texts, in a list, an array, a pandas or polars column, or any other iterable.
            model: a cross-encoder, or an embedding model, whose vectors are compared; ``method`` says which it was.
            top_n: only so many of them.
            return_documents: put the texts into the result.
        Raises:
            InvalidInputError: something among them is no text.
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer.
        """
        return self._engine.send(rerank_call(query, documents, model, top_n, return_documents), options)

    def classify(
        self,
        texts: Texts,
        *,
        model: str,
        top_k: int | None = None,
        activation: Literal["softmax", "sigmoid", "none"] | None = None,
        **options: Unpack[RequestOptions],
    ) -> ClassifyResult:
        """What texts are, by a model that knows labels.

        Args:
            texts: a text, or several in a list, an array, a pandas or polars column, or any other iterable.
            model: ``NAME`` or ``NAME@ALIAS``.
            top_k: only the scores of so many labels, the likeliest.
            activation: how scores come of the model's logits; the model's own way where it is left out.
        Raises:
            InvalidInputError: something among them is no text.
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer.
        """
        return self._engine.send(classify_call(texts, model, top_k, activation), options)

    def server(self, **options: Unpack[RequestOptions]) -> ServerMetadata:
        """Name, version and protocol extensions of the server."""
        return self._engine.send(_server(), options)

    def with_options(
        self,
        *,
        api_key: ApiKey | NotGiven | None = NOT_GIVEN,
        timeout: float | Timeout | NotGiven | None = NOT_GIVEN,
        retry: RetryPolicy | NotGiven | None = NOT_GIVEN,
        default_headers: Mapping[str, str] | NotGiven = NOT_GIVEN,
        max_response_bytes: int | NotGiven = NOT_GIVEN,
        on_request: RequestHook | NotGiven | None = NOT_GIVEN,
        on_response: ResponseHook | NotGiven | None = NOT_GIVEN,
        on_retry: RetryHook | NotGiven | None = NOT_GIVEN,
    ) -> Inferway:
        """A copy with other options that shares this client's connections: closing one closes both.

        Args:
            default_headers: added to those that the client has.
            api_key, timeout, retry, max_response_bytes, on_request, on_response, on_retry: as the constructor takes
                them; None means none.
        """
        config = _changes(self._engine.config, api_key, timeout, retry, default_headers, max_response_bytes, on_request,
                          on_response, on_retry)  # fmt: skip
        return self._over(self._engine.changed(config))

    def _over(self, engine: SyncEngine) -> Inferway:
        made = copy.copy(self)
        made._use(engine)
        return made

    @property
    def with_raw_response(self) -> InferwayWithRawResponse:
        """The same methods, each giving a `RawResponse`: status, headers and body beside the parsed result."""
        engine = self._engine
        return InferwayWithRawResponse(lambda record: self._over(engine.changed(engine.config, record)))

    def close(self) -> None:
        """Close every connection, also for copies made by `with_options`. Closing twice is closing once."""
        self._engine.sender.close()

    def __enter__(self) -> Inferway:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return _shown(self, self._engine.config)


class InferwayWithRawResponse(RawView[Inferway]):
    """See `Inferway.with_raw_response`."""

    infer = RawMethod(Inferway.infer)
    rerank = RawMethod(Inferway.rerank)
    classify = RawMethod(Inferway.classify)
    server = RawMethod(Inferway.server)

    def __init__(self, recording: Callable[[list[Reply]], Inferway]) -> None:
        super().__init__(recording)
        self.models = RawModels(lambda record: recording(record).models)
        self.keys = RawKeys(lambda record: recording(record).keys)
        self.health = RawHealth(lambda record: recording(record).health)
        self.chat = RawChat(lambda record: recording(record).chat)
        self.completions = RawCompletions(lambda record: recording(record).completions)
        self.embeddings = RawEmbeddings(lambda record: recording(record).embeddings)


class AsyncInferway:
    """A client of an Inferway gateway, or of any server that speaks the Open Inference Protocol over REST.

    Usable on any number of event loops, one after the other or at once, and after a fork. Close it, or use it as a
    context manager, to close its connections; one that is dropped closes them by itself, and so does a loop that ends.

    Attributes:
        models: which models there are, and their life: deploying, versions, aliases, deleting.
        keys: API keys and their life.
        health: is the gateway there?
        chat, completions: what language models answer.
        embeddings: vectors of texts.
    """

    models: AsyncModels
    keys: AsyncKeys
    health: AsyncHealth
    chat: AsyncChat
    completions: AsyncCompletions
    embeddings: AsyncEmbeddings

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: AsyncApiKey | None = None,
        timeout: float | Timeout | None = Timeout(),  # noqa: B008 - frozen
        retry: RetryPolicy | None = RetryPolicy(),  # noqa: B008 - frozen
        default_headers: Mapping[str, str] | None = None,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        max_connections: int = MAX_CONNECTIONS,
        http_client: AsyncHTTPClient | None = None,
        on_request: RequestHook | None = None,
        on_response: ResponseHook | None = None,
        on_retry: RetryHook | None = None,
        clock: Clock | None = None,
    ) -> None:
        """
        Args:
            base_url: of the gateway, such as ``https://models.example.com``; a path before the API's own is kept. Left
                out: ``INFERWAY_BASE_URL``, else ``http://127.0.0.1:8080``.
            api_key: sent as ``Authorization: Bearer``; a function is called for each attempt, so that a rotated key is
                picked up. Left out: ``INFERWAY_API_KEY``, else no key.
            timeout: seconds for a whole call, retries included, or a `Timeout`; None for no limit.
            retry: which failures are tried again; None to send once.
            default_headers: sent with every request; they replace the SDK's own of the same name.
            max_response_bytes: a longer answer is refused.
            max_connections: connections at most; further calls wait for one.
            http_client: an ``httpx`` or ``httpx2`` client to send through, for proxies, certificates or tests. It is
                closed with this client. Its redirects are not followed; across a fork it is on its own.
            on_request: called before each attempt; headers that it gives are added, for tracing.
            on_response: called after each answer.
            on_retry: called before each delay.
            clock: where time and chance come from, for tests.
        Raises:
            ConfigurationError: an argument or environment variable cannot be used.
        """
        # Imported when first needed: a synchronous program has no use for aiohttp, which takes 150 ms to import.
        from ._transport_aio import AsyncSender

        config = _configured(base_url, api_key, timeout, retry, default_headers, max_response_bytes, on_request,
                             on_response, on_retry, clock)  # fmt: skip
        self._use(AsyncEngine(config, AsyncSender(config.base_url, http_client, max_connections)))

    def _use(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.models = AsyncModels(engine)
        self.keys = AsyncKeys(engine)
        self.health = AsyncHealth(engine)
        self.chat = AsyncChat(engine)
        self.completions = AsyncCompletions(engine)
        self.embeddings = AsyncEmbeddings(engine)
        self._handles: dict[tuple[str, str | int | None], AsyncModelHandle] = {}

    @property
    def base_url(self) -> str:
        """Where the gateway is, without a slash at the end."""
        return self._engine.config.base_url

    def model(self, model: str, version: str | int | None = None) -> AsyncModelHandle:
        """A handle of a model. Nothing is sent until it is used.

        Args:
            model: its name.
            version: one version; None for the one that answers requests without a version.
        Raises:
            ConfigurationError: the name or version cannot be one.
        """
        handle = self._handles.get((model, version))
        if handle is None:
            handle = AsyncModelHandle(self._engine, model, version)
            if len(self._handles) >= MAX_CONNECTIONS:
                self._handles.clear()
            self._handles[(model, version)] = handle
        return handle

    async def infer(
        self,
        model: str,
        inputs: object,
        *,
        version: str | int | None = None,
        outputs: Outputs = None,
        id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> InferenceResult:
        """Run a model once: ``model(model, version).infer(inputs, …)``, see there for everything.

        The first call for a model fetches its signature, against which inputs are checked and cast.
        """
        return await run_async(self.model(model, version), inputs, outputs, id, parameters, priority, binary, options)

    async def embed(
        self,
        texts: Texts,
        *,
        model: str,
        dimensions: int | None = None,
        input_type: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Vectors:
        """Vectors of any number of texts: ``float32`` of shape ``[n, d]``, in the order of the texts.

        Many texts are sent in several requests, one after the other; ``timeout`` is for all of them.

        Args:
            texts: a text, or several in a list, an array, a pandas or polars column, or any other iterable.
            model: ``NAME`` or ``NAME@ALIAS``.
            dimensions: cut the vectors to that length, where the model allows it.
            input_type: such as ``query`` or ``document``: which of the model's prompts is put before each text.
        Raises:
            InvalidInputError: something among them is no text.
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer to one of the requests.
        """
        return await embed_async(self._engine, texts, model, dimensions, input_type, options)

    async def rerank(
        self,
        query: str,
        documents: Texts,
        *,
        model: str,
        top_n: int | None = None,
        return_documents: bool = False,
        **options: Unpack[RequestOptions],
    ) -> RerankResult:
        """Documents by their relevance to a query, the most relevant first.

        Args:
            query: a text.
            documents: texts, in a list, an array, a pandas or polars column, or any other iterable.
            model: a cross-encoder, or an embedding model, whose vectors are compared; ``method`` says which it was.
            top_n: only so many of them.
            return_documents: put the texts into the result.
        Raises:
            InvalidInputError: something among them is no text.
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer.
        """
        return await self._engine.send(rerank_call(query, documents, model, top_n, return_documents), options)

    async def classify(
        self,
        texts: Texts,
        *,
        model: str,
        top_k: int | None = None,
        activation: Literal["softmax", "sigmoid", "none"] | None = None,
        **options: Unpack[RequestOptions],
    ) -> ClassifyResult:
        """What texts are, by a model that knows labels.

        Args:
            texts: a text, or several in a list, an array, a pandas or polars column, or any other iterable.
            model: ``NAME`` or ``NAME@ALIAS``.
            top_k: only the scores of so many labels, the likeliest.
            activation: how scores come of the model's logits; the model's own way where it is left out.
        Raises:
            InvalidInputError: something among them is no text.
            BadRequestError: a value cannot be used; ``param`` names the member.
            APIError: there is no answer.
        """
        return await self._engine.send(classify_call(texts, model, top_k, activation), options)

    async def server(self, **options: Unpack[RequestOptions]) -> ServerMetadata:
        """Name, version and protocol extensions of the server."""
        return await self._engine.send(_server(), options)

    def with_options(
        self,
        *,
        api_key: AsyncApiKey | NotGiven | None = NOT_GIVEN,
        timeout: float | Timeout | NotGiven | None = NOT_GIVEN,
        retry: RetryPolicy | NotGiven | None = NOT_GIVEN,
        default_headers: Mapping[str, str] | NotGiven = NOT_GIVEN,
        max_response_bytes: int | NotGiven = NOT_GIVEN,
        on_request: RequestHook | NotGiven | None = NOT_GIVEN,
        on_response: ResponseHook | NotGiven | None = NOT_GIVEN,
        on_retry: RetryHook | NotGiven | None = NOT_GIVEN,
    ) -> AsyncInferway:
        """A copy with other options that shares this client's connections: closing one closes both.

        Args:
            default_headers: added to those that the client has.
            api_key, timeout, retry, max_response_bytes, on_request, on_response, on_retry: as the constructor takes
                them; None means none.
        """
        config = _changes(self._engine.config, api_key, timeout, retry, default_headers, max_response_bytes, on_request,
                          on_response, on_retry)  # fmt: skip
        return self._over(self._engine.changed(config))

    def _over(self, engine: AsyncEngine) -> AsyncInferway:
        made = copy.copy(self)
        made._use(engine)
        return made

    @property
    def with_raw_response(self) -> AsyncInferwayWithRawResponse:
        """The same methods, each giving a `RawResponse`: status, headers and body beside the parsed result."""
        engine = self._engine
        return AsyncInferwayWithRawResponse(lambda record: self._over(engine.changed(engine.config, record)))

    async def close(self) -> None:
        """Close every connection, also for copies made by `with_options`. Closing twice is closing once."""
        await self._engine.sender.aclose()

    async def __aenter__(self) -> AsyncInferway:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return _shown(self, self._engine.config)


class AsyncInferwayWithRawResponse(RawView[AsyncInferway]):
    """See `AsyncInferway.with_raw_response`."""

    infer = AsyncRawMethod(AsyncInferway.infer)
    rerank = AsyncRawMethod(AsyncInferway.rerank)
    classify = AsyncRawMethod(AsyncInferway.classify)
    server = AsyncRawMethod(AsyncInferway.server)

    def __init__(self, recording: Callable[[list[Reply]], AsyncInferway]) -> None:
        super().__init__(recording)
        self.models = AsyncRawModels(lambda record: recording(record).models)
        self.keys = AsyncRawKeys(lambda record: recording(record).keys)
        self.health = AsyncRawHealth(lambda record: recording(record).health)
        self.chat = AsyncRawChat(lambda record: recording(record).chat)
        self.completions = AsyncRawCompletions(lambda record: recording(record).completions)
        self.embeddings = AsyncRawEmbeddings(lambda record: recording(record).embeddings)


def _shown(client: object, config: Config) -> str:
    key = "None" if config.api_key is None else "'***'"
    return f"{type(client).__name__}({config.base_url!r}, api_key={key})"
