"""Domain errors to statuses and bodies: the one place where a code meets HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import orjson

from inferway_contract.codes import ERRORS, problem_type

from ..core.errors import GatewayError, InvalidParameterError, ModelNotReadyError, NotFoundError, UploadConflictError

STATUSES: Final[Mapping[str, int]] = {code: kind.status for code, kind in ERRORS.items()}
"""Code to status, as the contract has it."""
_OPENAI_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
"""Status to the ``type`` of an error, where it is neither that of 4xx nor that of 5xx."""
DEFAULT_RETRY_AFTER_S: Final = 1.0
Headers = list[tuple[bytes, bytes]]


class NotReadyError(ModelNotReadyError):
    """A readiness route's no. Its body has the members of the route's yes beside those of every error, so that clients
    that read ``ready`` and clients that read ``error`` both find what they look for."""

    def __init__(self, message: str, members: Mapping[str, str | bool]) -> None:
        super().__init__(message)
        self.members = members


def render(error: GatewayError, path: str, request_id: str, *, basic: bool = False) -> tuple[int, Headers, bytes]:
    """Status, headers and body of an error.

    Args:
        error: what went wrong.
        path: the request's path, which decides the shape of the body: RFC 9457 below ``/api/``, OpenAI's with the
            members of RFC 9457 below ``/v1/``, the Open Inference Protocol's ``{"error": ...}`` everywhere else.
        basic: the route also takes HTTP Basic, so a 401 says so.
    """
    status = STATUSES[error.code]
    body: dict[str, Any]
    if path.startswith("/v1/"):
        # No application/problem+json: OpenAI's client for JavaScript reads a body as JSON by its type alone.
        content_type = b"application/json"
        body = {"error": openai_error(error), **_problem(error, status, request_id)}
    elif path.startswith("/api/"):
        content_type = b"application/problem+json"
        body = _problem(error, status, request_id)
        if isinstance(error, UploadConflictError):
            body["received"] = error.received
    else:
        content_type = b"application/json"
        body = {"error": error.message, "code": error.code, "request_id": request_id}
        if isinstance(error, NotReadyError):
            body |= error.members
    payload = orjson.dumps(body)
    headers: Headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(payload)),
        (b"x-request-id", request_id.encode()),
        (b"x-should-retry", b"true" if error.retryable else b"false"),
    ]
    if error.upstream_attempts:
        headers.append((b"inferway-upstream-attempts", b"%d" % error.upstream_attempts))
    if status in (429, 503):
        wait = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(wait))))
    elif status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="inferway"'))
        if basic:
            headers.append((b"www-authenticate", b'Basic realm="inferway", charset="UTF-8"'))
    elif error.code == "unsupported_encoding":
        headers.append((b"accept-encoding", b"gzip, deflate"))
    return status, headers, payload


def openai_error(error: GatewayError) -> dict[str, str | None]:
    """The ``error`` member of a body under ``/v1``, and of an event of a stream that fails."""
    param = None
    if isinstance(error, InvalidParameterError):
        param = error.param
    elif isinstance(error, NotFoundError) and error.code != "not_found":
        param = "model"
    status = STATUSES[error.code]
    kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"message": error.message, "type": kind, "param": param, "code": error.code}


def _problem(error: GatewayError, status: int, request_id: str) -> dict[str, Any]:
    """The members of RFC 9457, and ours."""
    return {
        "type": problem_type(error.code),
        "title": ERRORS[error.code].title,
        "status": status,
        "detail": error.message,
        "code": error.code,
        "request_id": request_id,
    }
