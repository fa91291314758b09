"""``client.with_raw_response``: the client's methods, each with the HTTP answer beside its result.

A method is wrapped by a descriptor that keeps its parameters' types, so that nothing is declared twice. It runs the
method on a copy of the client that records the answers it gets; the last one is the answer of the method.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from ._core import HeaderMap, Reply
from .resources.chat import AsyncChat, Chat
from .resources.completions import AsyncCompletions, Completions
from .resources.embeddings import AsyncEmbeddings, Embeddings
from .resources.health import AsyncHealth, Health
from .resources.keys import AsyncKeys, Keys
from .resources.models import AsyncModels, Models

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")


class RawResponse(Generic[T]):
    """An HTTP answer with status 2xx and what it means.

    Attributes:
        status_code: HTTP status.
        headers: names in any case.
        content: the body, after any Content-Encoding was undone.
        request_id: the id under which the gateway's log knows the request.
        attempts: how often the call was sent.
        elapsed: seconds from the call to this answer, retries included.
    """

    __slots__ = ("_parsed", "attempts", "content", "elapsed", "headers", "request_id", "status_code")

    def __init__(self, reply: Reply, parsed: T) -> None:
        self.status_code: int = reply.status_code
        self.headers: HeaderMap = reply.headers
        self.content: bytes = bytes(reply.body)
        self.request_id: str | None = reply.request_id
        self.attempts: int = reply.attempts
        self.elapsed: float = reply.elapsed
        self._parsed = parsed

    def parse(self) -> T:
        """What the method gives without ``with_raw_response``."""
        return self._parsed

    def __repr__(self) -> str:
        return f"<RawResponse {self.status_code}, {len(self.content)} bytes, request {self.request_id}>"


class RawView(Generic[C]):
    """A part of a client, and how to make the same part of a client that records."""

    def __init__(self, recording: Callable[[list[Reply]], C]) -> None:
        self.recording = recording


class RawMethod(Generic[P, T]):
    """Wraps a method of a synchronous client or resource."""

    def __init__(self, method: Callable[Concatenate[Any, P], T]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, view: RawView[Any], owner: type[object]) -> Callable[P, RawResponse[T]]:
        def call(*args: P.args, **kwargs: P.kwargs) -> RawResponse[T]:
            record: list[Reply] = []
            parsed = self._method(view.recording(record), *args, **kwargs)
            return RawResponse(record[-1], parsed)

        return call


class AsyncRawMethod(Generic[P, T]):
    """Wraps a method of an asynchronous client or resource."""

    def __init__(self, method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, view: RawView[Any], owner: type[object]) -> Callable[P, Coroutine[Any, Any, RawResponse[T]]]:
        async def call(*args: P.args, **kwargs: P.kwargs) -> RawResponse[T]:
            record: list[Reply] = []
            parsed = await self._method(view.recording(record), *args, **kwargs)
            return RawResponse(record[-1], parsed)

        return call


class RawModels(RawView[Models]):
    list = RawMethod(Models.list)
    get = RawMethod(Models.get)
    config = RawMethod(Models.config)
    stats = RawMethod(Models.stats)
    ready = RawMethod(Models.ready)
    index = RawMethod(Models.index)
    load = RawMethod(Models.load)
    unload = RawMethod(Models.unload)
    deployments = RawMethod(Models.deployments)
    describe = RawMethod(Models.describe)
    catalog = RawMethod(Models.catalog)
    versions = RawMethod(Models.versions)
    version = RawMethod(Models.version)
    update = RawMethod(Models.update)
    delete = RawMethod(Models.delete)
    aliases = RawMethod(Models.aliases)
    alias = RawMethod(Models.alias)
    set_alias = RawMethod(Models.set_alias)
    delete_alias = RawMethod(Models.delete_alias)
    rollback = RawMethod(Models.rollback)


class RawKeys(RawView[Keys]):
    create = RawMethod(Keys.create)
    get = RawMethod(Keys.get)
    self = RawMethod(Keys.self)
    revoke = RawMethod(Keys.revoke)
    rotate = RawMethod(Keys.rotate)


class RawHealth(RawView[Health]):
    live = RawMethod(Health.live)
    ready = RawMethod(Health.ready)


class AsyncRawModels(RawView[AsyncModels]):
    list = AsyncRawMethod(AsyncModels.list)
    get = AsyncRawMethod(AsyncModels.get)
    config = AsyncRawMethod(AsyncModels.config)
    stats = AsyncRawMethod(AsyncModels.stats)
    ready = AsyncRawMethod(AsyncModels.ready)
    index = AsyncRawMethod(AsyncModels.index)
    load = AsyncRawMethod(AsyncModels.load)
    unload = AsyncRawMethod(AsyncModels.unload)
    deployments = AsyncRawMethod(AsyncModels.deployments)
    describe = AsyncRawMethod(AsyncModels.describe)
    catalog = AsyncRawMethod(AsyncModels.catalog)
    versions = AsyncRawMethod(AsyncModels.versions)
    version = AsyncRawMethod(AsyncModels.version)
    update = AsyncRawMethod(AsyncModels.update)
    delete = AsyncRawMethod(AsyncModels.delete)
    aliases = AsyncRawMethod(AsyncModels.aliases)
    alias = AsyncRawMethod(AsyncModels.alias)
    set_alias = AsyncRawMethod(AsyncModels.set_alias)
    delete_alias = AsyncRawMethod(AsyncModels.delete_alias)
    rollback = AsyncRawMethod(AsyncModels.rollback)


class AsyncRawKeys(RawView[AsyncKeys]):
    create = AsyncRawMethod(AsyncKeys.create)
    get = AsyncRawMethod(AsyncKeys.get)
    self = AsyncRawMethod(AsyncKeys.self)
    revoke = AsyncRawMethod(AsyncKeys.revoke)
    rotate = AsyncRawMethod(AsyncKeys.rotate)


class AsyncRawHealth(RawView[AsyncHealth]):
    live = AsyncRawMethod(AsyncHealth.live)
    ready = AsyncRawMethod(AsyncHealth.ready)


class RawChat(RawView[Chat]):
    create = RawMethod(Chat.create)


class RawCompletions(RawView[Completions]):
    create = RawMethod(Completions.create)


class RawEmbeddings(RawView[Embeddings]):
    create = RawMethod(Embeddings.create)


class AsyncRawChat(RawView[AsyncChat]):
    create = AsyncRawMethod(AsyncChat.create)


class AsyncRawCompletions(RawView[AsyncCompletions]):
    create = AsyncRawMethod(AsyncCompletions.create)


class AsyncRawEmbeddings(RawView[AsyncEmbeddings]):
    create = AsyncRawMethod(AsyncEmbeddings.create)
