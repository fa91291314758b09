"""Domain errors to statuses and bodies: the one place where a code meets HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import orjson

from ..core.errors import GatewayError

STATUSES: Final[Mapping[str, int]] = {
    "malformed_request": 400,
    "invalid_tensor": 400,
    "invalid_parameter": 400,
    "model_load_failed": 400,
    "unauthenticated": 401,
    "permission_denied": 403,
    "not_found": 404,
    "model_not_found": 404,
    "version_not_found": 404,
    "key_not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "conflict": 409,
    "payload_too_large": 413,
    "headers_too_large": 431,
    "cancelled": 499,
    "internal": 500,
    "model_failed": 500,
    "unsupported": 501,
    "unsupported_encoding": 501,
    "model_not_ready": 503,
    "queue_full": 503,
    "shutting_down": 503,
    "store_unavailable": 503,
    "deadline_exceeded": 504,
}
_TITLES: Final = {
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 409: "Conflict", 413: "Content Too Large", 431: "Request Header Fields Too Large",
    499: "Client Closed Request", 500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable",
    504: "Gateway Timeout",
}  # fmt: skip
DEFAULT_RETRY_AFTER_S: Final = 1.0
Headers = list[tuple[bytes, bytes]]


def render(error: GatewayError, path: str, request_id: str, *, basic: bool = False) -> tuple[int, Headers, bytes]:
    """Status, headers and body of an error.

    Args:
        error: what went wrong.
        path: the request's path, which decides the shape of the body: RFC 9457 below ``/api/``, the Open Inference
            Protocol's ``{"error": ...}`` everywhere else.
        basic: the route also takes HTTP Basic, so a 401 says so.
    """
    status = STATUSES[error.code]
    if path.startswith("/api/"):
        content_type = b"application/problem+json"
        body = {
            "type": f"urn:inferway:error:{error.code}",
            "title": _TITLES[status],
            "status": status,
            "detail": error.message,
            "code": error.code,
            "request_id": request_id,
        }
    else:
        content_type = b"application/json"
        body = {"error": error.message, "code": error.code, "request_id": request_id}
    payload = orjson.dumps(body)
    headers: Headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(payload)),
        (b"x-request-id", request_id.encode()),
        (b"x-should-retry", b"true" if error.retryable else b"false"),
    ]
    if status == 503:
        wait = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(wait))))
    elif status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="inferway"'))
        if basic:
            headers.append((b"www-authenticate", b'Basic realm="inferway", charset="UTF-8"'))
    elif error.code == "unsupported_encoding":
        headers.append((b"accept-encoding", b"gzip, deflate"))
    return status, headers, payload
