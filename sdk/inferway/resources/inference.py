"""Inference: the handle of a model, which knows the model's live signature.

A handle fetches the signature when it first needs it and shares it with every handle of the same model that the client
or its copies make. Inputs are held against it before they are sent. A signature may grow old, because someone deployed
another version: where inputs do not fit it, or the gateway says that they do not, it is fetched again, and where it has
changed the call starts over once with the new one.
"""

# `run` and `run_async` are a part of their handles, outside of the classes only to stay out of what users see.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Literal, Unpack, cast, overload

from .._calls import metadata_call
from .._core import Call, model_path
from .._engine import AsyncEngine, SyncEngine
from .._errors import ConfigurationError, InferwayError, InvalidInputError, InvalidTensorError
from .._inference import InferenceResult, Outputs, infer_call, known_call
from .._inputs import fit, items_of
from .._options import RequestOptions
from .._signature import ModelMetadata
from .._tensors import Array
from ..explain.explanation import Explanation
from ..explain.remote import ExplainOptions, explain_async, explain_sync, question_of

_FRESH_S: Final = 1.0
"""A signature younger than this is believed, so that a loop over bad inputs does not fetch it for each of them."""
_READ_AHEAD: Final = 4
"""`map` has at most this many times its concurrency of items begun and not yet handed over."""


class _Handle:
    """What both handles share: the model's name and the pure parts of a call."""

    __slots__ = ("_infer_path", "_key", "name", "version")

    name: str
    version: str | None

    def __init__(self, model: str, version: str | int | None) -> None:
        self._infer_path = model_path(model, version, "infer")
        self.name = model
        self.version = None if version is None else str(version)
        self._key = (self.name, self.version)

    def __repr__(self) -> str:
        version = f", version={self.version!r}" if self.version is not None else ""
        return f"{type(self).__name__}({self.name!r}{version})"

    def _call(
        self,
        metadata: ModelMetadata,
        inputs: object,
        outputs: Outputs,
        id: str | None,
        parameters: Mapping[str, Any] | None,
        priority: int | None,
        binary: bool,
    ) -> Call[InferenceResult]:
        if binary and outputs is None and id is None and parameters is None and priority is None:
            known = known_call(self._infer_path, metadata, inputs)
            if known is not None:
                return known
        return infer_call(
            self._infer_path,
            metadata,
            fit(metadata, inputs),
            outputs=outputs,
            id=id,
            parameters=parameters,
            priority=priority,
            binary=binary,
        )


def _bare(result: InferenceResult) -> Array | dict[str, Array]:
    return result.output if len(result) == 1 else result.outputs


def _check_map(concurrency: int, on_error: str) -> None:
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise ConfigurationError(f"concurrency expects a whole number of at least 1, got {concurrency!r}")
    if on_error not in ("raise", "return"):
        raise ConfigurationError(f"on_error expects 'raise' or 'return', got {on_error!r}")


class ModelHandle(_Handle):
    """A model of a gateway, as `Inferway.model` gives it. Cheap to make, safe to use from several threads.

    Attributes:
        name: the model's name.
        version: the version, or None for the one that answers requests without one.
    """

    __slots__ = ("_engine",)

    def __init__(self, engine: SyncEngine, model: str, version: str | int | None) -> None:
        super().__init__(model, version)
        self._engine = engine

    def signature(self, **options: Unpack[RequestOptions]) -> ModelMetadata:
        """What the model takes and gives; fetched once and remembered.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
            APIError: the gateway cannot be asked.
        """
        known = self._engine.signatures.get(self._key)
        return self.refresh(**options) if known is None else known[0]

    def refresh(self, **options: Unpack[RequestOptions]) -> ModelMetadata:
        """Fetch the signature again, such as after a deployment. Errors as `signature`."""
        metadata = self._engine.send(metadata_call(self.name, self.version), options)
        self._engine.signatures.keep(self._key, metadata, self._engine.config.clock.monotonic())
        return metadata

    def infer(
        self,
        inputs: object,
        *,
        outputs: Outputs = None,
        id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> InferenceResult:
        """Run the model once.

        Args:
            inputs: a mapping of input names to values, a data frame whose columns are inputs, rows as a list of
                mappings, or a value for the model's only input. A value may be a numpy array, a list, a scalar, text or
                bytes, a pandas or polars column, a torch tensor, a PIL image, anything with ``__array__`` or DLPack.
                Values are cast to the model's datatypes where that loses nothing (floating point is rounded to the
                model's precision); one missing axis of length 1 is added where that can mean only one thing.
                Arrays must not change before the call returns.
            outputs: names of the outputs that are wanted, or a mapping of name to the protocol's parameters for it,
                such as ``{"scores": {"classification": 3}}``; None for all.
            id: text that comes back in the result.
            parameters: of the protocol, such as ``{"timeout": microseconds in the queue}``.
            priority: 1 is first; None is the model's default.
            binary: send and receive tensors in binary form, else in JSON.
            options: see `RequestOptions`; ``timeout`` covers everything, fetching the signature too.
        Raises:
            InvalidInputError: inputs or outputs do not fit the signature; where the SDK found it, nothing was sent.
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
            QueueFullError, ModelNotReadyError, RateLimitError: and trying again did not help.
            APITimeoutError: the time is over, here or at the gateway.
            APIError: any other failure.
        """
        return run(self, inputs, outputs, id, parameters, priority, binary, options)

    __call__ = infer

    def predict(
        self,
        inputs: object,
        *,
        outputs: Outputs = None,
        id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> Array | dict[str, Array]:
        """`infer` with nothing around the arrays: the array of a single output, else output name to array."""
        return _bare(run(self, inputs, outputs, id, parameters, priority, binary, options))

    def explain(self, x: object, background: object = None, **arguments: Unpack[ExplainOptions]) -> Explanation:
        """What predictions of this model rest on: Shapley values. Everything is as in `Models.explain`."""
        question, options = question_of(self.name, self.version, x, background, arguments)
        return explain_sync(question, self._engine, options)

    @overload
    def map(
        self,
        items: Iterable[object],
        *,
        concurrency: int = 16,
        batch_size: int | None = None,
        on_error: Literal["raise"] = "raise",
        outputs: Outputs = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> Iterator[InferenceResult]: ...

    @overload
    def map(
        self,
        items: Iterable[object],
        *,
        concurrency: int = 16,
        batch_size: int | None = None,
        on_error: Literal["return"],
        outputs: Outputs = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> Iterator[InferenceResult | InferwayError]: ...

    def map(
        self,
        items: Iterable[object],
        *,
        concurrency: int = 16,
        batch_size: int | None = None,
        on_error: Literal["raise", "return"] = "raise",
        outputs: Outputs = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> Iterator[InferenceResult | InferwayError]:
        """Run the model on many items at once; results come in the items' order.

        Items are taken as results are consumed, at most four times ``concurrency`` ahead, so that an endless iterable
        is fine. Leaving the iteration early begins no further item and waits for those that are running.

        Args:
            items: inputs as `infer` takes them, each for one call; or one array, data frame, column or tensor, which is
                cut along its first axis.
            concurrency: calls in flight at most, each in a thread of its own.
            batch_size: rows of one call where ``items`` is cut; 1 when left out. For other iterables it must be.
            on_error: ``raise`` ends the iteration with the first error in order; ``return`` gives an item's
                `InferwayError` in the place of its result.
            outputs, parameters, priority, binary, options: of each call, as `infer` takes them.
        Raises:
            ConfigurationError: an argument has a wrong value, or ``items`` is no iterable of inputs.
        """
        _check_map(concurrency, on_error)
        source = items_of(items, batch_size)

        def one(item: object) -> InferenceResult | InferwayError:
            try:
                return run(self, item, outputs, None, parameters, priority, binary, options)
            except InferwayError as error:
                if on_error == "return":
                    return error
                raise

        return _threaded(one, source, concurrency)


def run(
    handle: ModelHandle,
    inputs: object,
    outputs: Outputs,
    id: str | None,
    parameters: Mapping[str, Any] | None,
    priority: int | None,
    binary: bool,
    options: RequestOptions,
) -> InferenceResult:
    """`ModelHandle.infer` for callers within the SDK: without packing keyword arguments at each step."""
    engine = handle._engine
    known = engine.signatures.get(handle._key)
    started = engine.config.clock.monotonic()
    if known is None:
        metadata, fetched = handle.refresh(**options), started
        options = engine.rest(options, started)
    else:
        metadata, fetched = known
    try:
        call = handle._call(metadata, inputs, outputs, id, parameters, priority, binary)
    except InvalidInputError:
        if started - fetched < _FRESH_S:
            raise
        latest = handle.refresh(**options)
        if latest == metadata:
            raise
        call = handle._call(latest, inputs, outputs, id, parameters, priority, binary)
        return engine.send(call, engine.rest(options, started))
    try:
        return engine.send(call, options)
    except InvalidTensorError:
        latest = handle.refresh(**engine.rest(options, started))
        if latest == metadata:
            raise
        call = handle._call(latest, inputs, outputs, id, parameters, priority, binary)
        return engine.send(call, engine.rest(options, started))


def _threaded(
    one: Any, source: Iterator[object], concurrency: int
) -> Generator[InferenceResult | InferwayError, None, None]:
    begun: deque[Future[InferenceResult | InferwayError]] = deque()
    with ThreadPoolExecutor(concurrency, thread_name_prefix="inferway-map") as pool:
        try:
            for item in source:
                # Each item in a copy of the caller's context, where tracing keeps the current span.
                begun.append(pool.submit(contextvars.copy_context().run, one, item))
                if len(begun) >= concurrency * _READ_AHEAD:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


class AsyncModelHandle(_Handle):
    """A model of a gateway, as `AsyncInferway.model` gives it. Cheap to make, usable on any event loop.

    Attributes:
        name: the model's name.
        version: the version, or None for the one that answers requests without one.
    """

    __slots__ = ("_engine",)

    def __init__(self, engine: AsyncEngine, model: str, version: str | int | None) -> None:
        super().__init__(model, version)
        self._engine = engine

    async def signature(self, **options: Unpack[RequestOptions]) -> ModelMetadata:
        """What the model takes and gives; fetched once and remembered.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
            APIError: the gateway cannot be asked.
        """
        known = self._engine.signatures.get(self._key)
        return await self.refresh(**options) if known is None else known[0]

    async def refresh(self, **options: Unpack[RequestOptions]) -> ModelMetadata:
        """Fetch the signature again, such as after a deployment. Errors as `signature`."""
        metadata = await self._engine.send(metadata_call(self.name, self.version), options)
        self._engine.signatures.keep(self._key, metadata, self._engine.config.clock.monotonic())
        return metadata

    async def infer(
        self,
        inputs: object,
        *,
        outputs: Outputs = None,
        id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> InferenceResult:
        """Run the model once.

        Args:
            inputs: a mapping of input names to values, a data frame whose columns are inputs, rows as a list of
                mappings, or a value for the model's only input. A value may be a numpy array, a list, a scalar, text or
                bytes, a pandas or polars column, a torch tensor, a PIL image, anything with ``__array__`` or DLPack.
                Values are cast to the model's datatypes where that loses nothing (floating point is rounded to the
                model's precision); one missing axis of length 1 is added where that can mean only one thing.
                Arrays must not change before the call returns.
            outputs: names of the outputs that are wanted, or a mapping of name to the protocol's parameters for it,
                such as ``{"scores": {"classification": 3}}``; None for all.
            id: text that comes back in the result.
            parameters: of the protocol, such as ``{"timeout": microseconds in the queue}``.
            priority: 1 is first; None is the model's default.
            binary: send and receive tensors in binary form, else in JSON.
            options: see `RequestOptions`; ``timeout`` covers everything, fetching the signature too.
        Raises:
            InvalidInputError: inputs or outputs do not fit the signature; where the SDK found it, nothing was sent.
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
            QueueFullError, ModelNotReadyError, RateLimitError: and trying again did not help.
            APITimeoutError: the time is over, here or at the gateway.
            APIError: any other failure.
        """
        return await run_async(self, inputs, outputs, id, parameters, priority, binary, options)

    __call__ = infer

    async def predict(
        self,
        inputs: object,
        *,
        outputs: Outputs = None,
        id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> Array | dict[str, Array]:
        """`infer` with nothing around the arrays: the array of a single output, else output name to array."""
        return _bare(await run_async(self, inputs, outputs, id, parameters, priority, binary, options))

    async def explain(self, x: object, background: object = None, **arguments: Unpack[ExplainOptions]) -> Explanation:
        """What predictions of this model rest on: Shapley values. Everything is as in `Models.explain`."""
        question, options = question_of(self.name, self.version, x, background, arguments)
        return await explain_async(question, self._engine, options)

    @overload
    def map(
        self,
        items: Iterable[object] | AsyncIterable[object],
        *,
        concurrency: int = 16,
        batch_size: int | None = None,
        on_error: Literal["raise"] = "raise",
        outputs: Outputs = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> AsyncIterator[InferenceResult]: ...

    @overload
    def map(
        self,
        items: Iterable[object] | AsyncIterable[object],
        *,
        concurrency: int = 16,
        batch_size: int | None = None,
        on_error: Literal["return"],
        outputs: Outputs = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> AsyncIterator[InferenceResult | InferwayError]: ...

    def map(
        self,
        items: Iterable[object] | AsyncIterable[object],
        *,
        concurrency: int = 16,
        batch_size: int | None = None,
        on_error: Literal["raise", "return"] = "raise",
        outputs: Outputs = None,
        parameters: Mapping[str, Any] | None = None,
        priority: int | None = None,
        binary: bool = True,
        **options: Unpack[RequestOptions],
    ) -> AsyncIterator[InferenceResult | InferwayError]:
        """Run the model on many items at once; results come in the items' order.

        Items are taken as results are consumed, at most four times ``concurrency`` ahead, so that an endless iterable
        is fine. Leaving the iteration early begins no further item and cancels those that are running.

        Args:
            items: inputs as `infer` takes them, each for one call, from an iterable or an asynchronous one; or one
                array, data frame, column or tensor, which is cut along its first axis.
            concurrency: calls in flight at most, each in a task of its own.
            batch_size: rows of one call where ``items`` is cut; 1 when left out. For other iterables it must be.
            on_error: ``raise`` ends the iteration with the first error in order; ``return`` gives an item's
                `InferwayError` in the place of its result.
            outputs, parameters, priority, binary, options: of each call, as `infer` takes them.
        Raises:
            ConfigurationError: an argument has a wrong value, or ``items`` is no iterable of inputs.
        """
        _check_map(concurrency, on_error)
        source = items if isinstance(items, AsyncIterable) else _async_items(items_of(items, batch_size))
        if isinstance(items, AsyncIterable) and batch_size is not None:
            raise ConfigurationError("batch_size is for items that are one array, data frame, column or tensor")

        async def one(item: object) -> InferenceResult | InferwayError:
            try:
                return await run_async(self, item, outputs, None, parameters, priority, binary, options)
            except InferwayError as error:
                if on_error == "return":
                    return error
                raise

        return _tasked(one, source, concurrency)


async def run_async(
    handle: AsyncModelHandle,
    inputs: object,
    outputs: Outputs,
    id: str | None,
    parameters: Mapping[str, Any] | None,
    priority: int | None,
    binary: bool,
    options: RequestOptions,
) -> InferenceResult:
    """`AsyncModelHandle.infer` for callers within the SDK: without packing keyword arguments at each step."""
    engine = handle._engine
    known = engine.signatures.get(handle._key)
    started = engine.config.clock.monotonic()
    if known is None:
        metadata, fetched = await handle.refresh(**options), started
        options = engine.rest(options, started)
    else:
        metadata, fetched = known
    try:
        call = handle._call(metadata, inputs, outputs, id, parameters, priority, binary)
    except InvalidInputError:
        if started - fetched < _FRESH_S:
            raise
        latest = await handle.refresh(**options)
        if latest == metadata:
            raise
        call = handle._call(latest, inputs, outputs, id, parameters, priority, binary)
        return await engine.send(call, engine.rest(options, started))
    try:
        return await engine.send(call, options)
    except InvalidTensorError:
        latest = await handle.refresh(**engine.rest(options, started))
        if latest == metadata:
            raise
        call = handle._call(latest, inputs, outputs, id, parameters, priority, binary)
        return await engine.send(call, engine.rest(options, started))


async def _async_items(items: Iterator[object]) -> AsyncGenerator[object, None]:
    for item in items:
        yield item


async def _tasked(
    one: Any, source: AsyncIterable[object], concurrency: int
) -> AsyncGenerator[InferenceResult | InferwayError, None]:
    begun: deque[asyncio.Task[InferenceResult | InferwayError]] = deque()
    free = asyncio.Semaphore(concurrency)

    async def limited(item: object) -> InferenceResult | InferwayError:
        async with free:
            return cast("InferenceResult | InferwayError", await one(item))

    try:
        async for item in source:
            begun.append(asyncio.create_task(limited(item)))
            if len(begun) >= concurrency * _READ_AHEAD:
                yield await begun[0]
                begun.popleft()
        while begun:
            yield await begun[0]
            begun.popleft()
    finally:
        # Every task is awaited here, also when the iteration ends early or this generator's task is cancelled.
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
