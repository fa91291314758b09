"""``client.keys``: API keys and their life. Needs the scope ``admin``, except `Keys.self`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack
from urllib.parse import urlencode

from .._calls import reader
from .._core import Call, json_call, path_of
from .._engine import AsyncEngine, SyncEngine
from .._errors import APIResponseValidationError, ConfigurationError
from .._options import NOT_GIVEN, NotGiven, RequestOptions

if TYPE_CHECKING:
    from inferway_contract.models import KeyCreated, KeyList, KeyRecord, KeyRotated
    from inferway_contract.names import Environment, Scope

    Scopes: TypeAlias = Sequence[Scope]


def _create(
    name: str,
    scopes: Scopes,
    models: Sequence[str],
    environment: Environment,
    expires_in_s: int | NotGiven | None,
) -> Call[KeyCreated]:
    for given, argument in ((scopes, "scopes"), (models, "models")):
        if isinstance(given, str):
            raise ConfigurationError(f"{argument} expects a list, got the text {given!r:.80}")
    body: dict[str, Any] = {
        "name": name,
        "scopes": list(scopes),
        "models": list(models),
        "environment": environment,
    }
    if expires_in_s is not NOT_GIVEN:
        body["expires_in_s"] = expires_in_s
    return json_call("POST", path_of("api", "v1", "keys"), reader("KeyCreated"), body, repeatable=False)


def _page(limit: int | None, cursor: str | None) -> Call[KeyList]:
    query = {name: value for name, value in (("limit", limit), ("cursor", cursor)) if value is not None}
    path = path_of("api", "v1", "keys") + (f"?{urlencode(query)}" if query else "")
    return json_call("GET", path, reader("KeyList"))


def _key_path(key_id: str, *operation: str) -> str:
    if not isinstance(key_id, str) or not key_id:
        raise ConfigurationError("expected a key's id as text")
    if key_id.startswith("ifw_"):
        # The whole key must not end up in an access log.
        raise ConfigurationError("expected a key's id, its twelve characters between underscores, not the key itself")
    return path_of("api", "v1", "keys", key_id, *operation)


def _get(key_id: str) -> Call[KeyRecord]:
    return json_call("GET", _key_path(key_id), reader("KeyRecord"))


def _self() -> Call[KeyRecord]:
    return json_call("GET", path_of("api", "v1", "keys", "self"), reader("KeyRecord"))


def _revoke(key_id: str) -> Call[KeyRecord]:
    return json_call("DELETE", _key_path(key_id), reader("KeyRecord"))


def _rotate(key_id: str, overlap_s: int | NotGiven) -> Call[KeyRotated]:
    body = {} if overlap_s is NOT_GIVEN else {"overlap_s": overlap_s}
    return json_call("POST", _key_path(key_id, "rotate"), reader("KeyRotated"), body, repeatable=False)


def _next(page: KeyList, cursor: str | None) -> str | None:
    """The cursor of the page after this one; a gateway that turns in circles is not followed."""
    if page.next_cursor is not None and page.next_cursor == cursor:
        raise APIResponseValidationError("the list of keys does not end: its next cursor is the one it was asked with")
    return page.next_cursor


class Keys:
    """API keys. Every method also takes `RequestOptions` and may raise `APIError`."""

    def __init__(self, engine: SyncEngine) -> None:
        self._engine = engine

    def create(
        self,
        name: str,
        scopes: Scopes,
        *,
        models: Sequence[str] = ("*",),
        environment: Environment = "live",
        expires_in_s: int | NotGiven | None = NOT_GIVEN,
        **options: Unpack[RequestOptions],
    ) -> KeyCreated:
        """Make a key. The answer's ``key`` is the only time that the key itself is shown; its repr hides it.

        Not tried again when an attempt may have arrived, since that could make two.

        Args:
            name: for people, such as whom or what the key is for.
            scopes: of ``infer``, ``read``, ``deploy``, ``admin``.
            models: names or shell patterns of the models that the key may see.
            environment: ``live``, ``test`` or ``adm``; a part of the key that tells people what it opens.
            expires_in_s: seconds of life, None for ever. Left out: for ever, or 90 days for a key with ``admin``.
        """
        return self._engine.send(_create(name, scopes, models, environment, expires_in_s), options)

    def list(self, *, page_size: int | None = None, **options: Unpack[RequestOptions]) -> Iterator[KeyRecord]:
        """Every key, newest first; pages are fetched while the iteration goes on.

        Args:
            page_size: keys for each request, at most 200; None for the gateway's choice.
        """
        cursor: str | None = None
        while True:
            page = self._engine.send(_page(page_size, cursor), options)
            yield from page.data
            cursor = _next(page, cursor)
            if cursor is None:
                return

    def get(self, key_id: str, **options: Unpack[RequestOptions]) -> KeyRecord:
        """What is known of a key.

        Raises:
            KeyNotFoundError: there is none with that id.
        """
        return self._engine.send(_get(key_id), options)

    def self(self, **options: Unpack[RequestOptions]) -> KeyRecord:
        """What is known of the key that this client uses; any valid key may ask."""
        return self._engine.send(_self(), options)

    def revoke(self, key_id: str, **options: Unpack[RequestOptions]) -> KeyRecord:
        """End a key at once. Revoking twice is revoking once.

        Raises:
            KeyNotFoundError: there is none with that id.
        """
        return self._engine.send(_revoke(key_id), options)

    def rotate(
        self, key_id: str, *, overlap_s: int | NotGiven = NOT_GIVEN, **options: Unpack[RequestOptions]
    ) -> KeyRotated:
        """Make a key's successor with the same rights; the old one ends after an overlap.

        Not tried again when an attempt may have arrived, since that could make two.

        Args:
            key_id: the old key's id.
            overlap_s: seconds for which both are good, at most 30 days; a day when left out.
        Raises:
            KeyNotFoundError: there is none with that id.
            ConflictError: the key has ended or has a successor already.
        """
        return self._engine.send(_rotate(key_id, overlap_s), options)


class AsyncKeys:
    """API keys. Every method also takes `RequestOptions` and may raise `APIError`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def create(
        self,
        name: str,
        scopes: Scopes,
        *,
        models: Sequence[str] = ("*",),
        environment: Environment = "live",
        expires_in_s: int | NotGiven | None = NOT_GIVEN,
        **options: Unpack[RequestOptions],
    ) -> KeyCreated:
        """Make a key. The answer's ``key`` is the only time that the key itself is shown; its repr hides it.

        Not tried again when an attempt may have arrived, since that could make two.

        Args:
            name: for people, such as whom or what the key is for.
            scopes: of ``infer``, ``read``, ``deploy``, ``admin``.
            models: names or shell patterns of the models that the key may see.
            environment: ``live``, ``test`` or ``adm``; a part of the key that tells people what it opens.
            expires_in_s: seconds of life, None for ever. Left out: for ever, or 90 days for a key with ``admin``.
        """
        return await self._engine.send(_create(name, scopes, models, environment, expires_in_s), options)

    async def list(
        self, *, page_size: int | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncIterator[KeyRecord]:
        """Every key, newest first; pages are fetched while the iteration goes on.

        Args:
            page_size: keys for each request, at most 200; None for the gateway's choice.
        """
        cursor: str | None = None
        while True:
            page = await self._engine.send(_page(page_size, cursor), options)
            for record in page.data:
                yield record
            cursor = _next(page, cursor)
            if cursor is None:
                return

    async def get(self, key_id: str, **options: Unpack[RequestOptions]) -> KeyRecord:
        """What is known of a key.

        Raises:
            KeyNotFoundError: there is none with that id.
        """
        return await self._engine.send(_get(key_id), options)

    async def self(self, **options: Unpack[RequestOptions]) -> KeyRecord:
        """What is known of the key that this client uses; any valid key may ask."""
        return await self._engine.send(_self(), options)

    async def revoke(self, key_id: str, **options: Unpack[RequestOptions]) -> KeyRecord:
        """End a key at once. Revoking twice is revoking once.

        Raises:
            KeyNotFoundError: there is none with that id.
        """
        return await self._engine.send(_revoke(key_id), options)

    async def rotate(
        self, key_id: str, *, overlap_s: int | NotGiven = NOT_GIVEN, **options: Unpack[RequestOptions]
    ) -> KeyRotated:
        """Make a key's successor with the same rights; the old one ends after an overlap.

        Not tried again when an attempt may have arrived, since that could make two.

        Args:
            key_id: the old key's id.
            overlap_s: seconds for which both are good, at most 30 days; a day when left out.
        Raises:
            KeyNotFoundError: there is none with that id.
            ConflictError: the key has ended or has a successor already.
        """
        return await self._engine.send(_rotate(key_id, overlap_s), options)
