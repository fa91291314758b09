"""Routes that know who may use them, and the one place where that is decided.

Authorisation is bound to the route object: a route without an answer to "who may?" cannot be built, and nothing reads
the URL again to decide. Every route of the gateway is an ``ApiRoute``.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from ..core.errors import GatewayError, ModelNotFoundError, PermissionDeniedError, UnauthenticatedError
from ..core.keys import ANONYMOUS, Authenticator, Principal
from ..core.routing import bare_name
from .key_bodies import deprecation

Endpoint = Callable[..., Awaitable[Any]]
INFER_SCOPES: Final = frozenset({"infer"})
"""Of the routes that run models; their requests are those that a key's rate limits."""
ANY_KEY: Final[frozenset[str]] = frozenset()
"""Accepted scopes of a route that takes any valid key."""


Fields = Mapping[bytes, bytes]
"""Headers of a request: lower-case name to value, the last one of a name that is there twice."""

_LOCAL_HOST: Final = re.compile(rb"(?:(?:.+\.)?localhost|[0-9.]+|\[[0-9a-f:.]+\])(?::[0-9]*)?", re.IGNORECASE)

_FIELDS: Final = "inferway.headers"
"""Where our own server puts the fields, which it has made anyway; it refuses requests that repeat one that matters."""


def header_fields(scope: Scope) -> Fields:
    """The headers of a request, whichever server it came through."""
    fields: Fields | None = scope.get(_FIELDS)
    return dict(scope["headers"]) if fields is None else fields


class MethodNotAllowedError(GatewayError):
    """The path exists and does not take the method."""

    code = "method_not_allowed"

    def __init__(self, method: str, allowed: Iterable[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"Method Not Allowed: expected {self.allowed}, got {method}")


class ApiRoute(Route):
    """A route and the scopes that open it.

    Args:
        scopes: any one of these opens it; empty takes any valid key.
        public: no key is asked for.
        basic: the key may also come as the password of HTTP Basic, for pages that a browser opens.
        besides: values of the last path parameter that have a route of their own. That one decides which methods they
            take; without this, a method that it lacks would be answered by this route.
    """

    def __init__(
        self,
        path: str,
        endpoint: Endpoint,
        method: str,
        *,
        scopes: frozenset[str] = ANY_KEY,
        public: bool = False,
        basic: bool = False,
        besides: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.app = _answering(endpoint)
        self.methods: set[str] = {method}  # Starlette adds HEAD to GET; the contract lists what there is
        self.scopes = scopes
        self.public = public
        self.basic = basic
        self._counted = method == "POST" and scopes == INFER_SCOPES
        self._besides = besides

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if self._besides and match is not Match.NONE and scope["path"].rpartition("/")[2] in self._besides:
            return Match.NONE, {}
        return match, child

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self
        if scope["method"] not in self.methods:
            allowed = {
                method
                for route in scope["app"].routes
                if route.matches(scope)[0] is not Match.NONE
                for method in route.methods
            }
            raise MethodNotAllowedError(scope["method"], allowed)
        state = scope["state"]
        scope["principal"] = principal = await authorise(
            state["authenticator"], header_fields(scope), self.scopes, public=self.public, basic=self.basic
        )
        if principal is not None and principal.rotated_at is not None:
            scope["response_headers"] = deprecation(principal)
        name = scope["path_params"].get("model")
        if name is not None and principal is not None and not principal.sees(bare_name(name)):
            # The same words as for a model that does not exist, so that a key learns nothing of other people's.
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        if self._counted and principal is not None and state["rate_limits"] is not None:
            state["rate_limits"].take(principal.key_id)
        await self.app(scope, receive, send)


def _answering(endpoint: Endpoint) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """What Starlette makes of an endpoint, less its own handling of errors: ours is around the whole application."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    return app


async def authorise(
    authenticator: Authenticator | None,
    fields: Fields,
    accepted: frozenset[str],
    *,
    public: bool = False,
    basic: bool = False,
) -> Principal | None:
    """Who the request acts for.

    Args:
        authenticator: None where the gateway runs without authentication.
        fields: the request's headers.
        accepted: scopes, any one of which is enough; empty takes any valid key.
    Returns:
        The principal; None on a public route.
    Raises:
        UnauthenticatedError: no key or no good one, never saying which.
        PermissionDeniedError: a good key without any of the scopes.
        StoreUnavailableError: the key could not be looked up.
    """
    if public:
        return None
    principal = known_principal(authenticator, fields, accepted, basic=basic)
    if principal is None:
        assert authenticator is not None
        principal = await authenticator.authenticate(credentials(fields, basic=basic) or b"")
        if not principal.may(accepted):
            raise permission_denied(principal, accepted)
    return principal


def known_principal(
    authenticator: Authenticator | None,
    fields: Fields,
    accepted: frozenset[str],
    *,
    basic: bool = False,
) -> Principal | None:
    """``authorise`` for a key that was checked lately, without waiting. None: ``authorise`` has to ask the database."""
    if authenticator is None:
        return ANONYMOUS
    presented = credentials(fields, basic=basic)
    if presented is None:
        raise UnauthenticatedError("expected an API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
    principal = authenticator.authenticate_cached(presented)
    if principal is not None and not principal.may(accepted):
        raise permission_denied(principal, accepted)
    return principal


def refuse_foreign_pages(fields: Fields, *, any_host: bool) -> None:
    """Refuse what the page of another site has a browser on this machine send, where no key keeps it from acting.

    A browser sends such a request without asking us, and it could make a key for later. It says so in
    ``Sec-Fetch-Site`` (Fetch Metadata, W3C) or, if it is old, by a foreign ``Origin``. A page whose own name was made
    to resolve to this machine says neither: it is known by that name in ``Host``, where an address or ``localhost``
    cannot be forged.

    Args:
        any_host: the gateway is meant to be reached by other names.
    Raises:
        PermissionDeniedError
    """
    host = fields.get(b"host", b"")
    origin = fields.get(b"origin")
    if (
        fields.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin")
        or (origin is not None and origin.partition(b"://")[2] != host)
        or not (any_host or _LOCAL_HOST.fullmatch(host))
    ):
        raise PermissionDeniedError(
            "expected a request of a program on this machine, got one of a web page or under another name; "
            "without API keys only Host: localhost or an address is answered, unless the gateway runs with --insecure"
        )


def permission_denied(principal: Principal, accepted: frozenset[str]) -> PermissionDeniedError:
    wanted = " or ".join(f"'{s}'" for s in sorted(accepted | {"admin"}))
    have = ", ".join(f"'{s}'" for s in sorted(principal.scopes)) or "none"
    return PermissionDeniedError(f"expected a key with scope {wanted}, this one has {have}")


def credentials(fields: Fields, *, basic: bool = False) -> bytes | None:
    """The key that a request presents; None where there is none. ``Authorization`` goes before ``X-API-Key``."""
    authorization = fields.get(b"authorization")
    if authorization is not None:
        if authorization[:7] == b"Bearer ":
            return authorization[7:].strip()
        scheme, _, rest = authorization.partition(b" ")
        scheme = scheme.lower()
        if scheme == b"bearer":
            return rest.strip()
        if basic and scheme == b"basic":
            try:
                return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return None
    api_key = fields.get(b"x-api-key")
    return None if api_key is None else api_key.strip()
