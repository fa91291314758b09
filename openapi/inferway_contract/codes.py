"""Every error code that goes over the wire, with its status and whether trying again can help.

Standard library only: the SDK imports it before anything else. `openapi/inferway.yaml` lists the same codes; a test
compares the two, and a third table, the gateway's own errors, with both.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias, get_args

ErrorCode: TypeAlias = Literal[
    "malformed_request",
    "invalid_tensor",
    "invalid_parameter",
    "model_load_failed",
    "digest_mismatch",
    "model_rejected",
    "golden_mismatch",
    "context_length_exceeded",
    "run_too_large",
    "unauthenticated",
    "permission_denied",
    "quota_exceeded",
    "not_found",
    "model_not_found",
    "version_not_found",
    "key_not_found",
    "blob_not_found",
    "deployment_not_found",
    "alias_not_found",
    "method_not_allowed",
    "request_timeout",
    "conflict",
    "upload_conflict",
    "payload_too_large",
    "rate_limited",
    "headers_too_large",
    "cancelled",
    "internal",
    "model_failed",
    "unsupported",
    "unsupported_encoding",
    "upstream_failed",
    "model_not_ready",
    "queue_full",
    "shutting_down",
    "store_unavailable",
    "worker_crashed",
    "model_failing",
    "deadline_exceeded",
    "insufficient_storage",
    "memory_exceeded",
]
"""The closed set of codes of this version of the contract. A client keeps codes that it does not know as text."""


class ErrorKind(NamedTuple):
    """What one code means on the wire. No dataclass: that would make the SDK's import load ``inspect``.

    Attributes:
        code: the name of the situation, stable over releases.
        status: the HTTP status it is sent with.
        retryable: the same request, sent again unchanged, may succeed. The response header ``X-Should-Retry`` of one
            answer comes before this general rule.
        title: a short sentence; the ``title`` of a problem body.
    """

    code: ErrorCode
    status: int
    retryable: bool
    title: str


_KINDS: Final = (
    ErrorKind("malformed_request", 400, False, "The request cannot be read"),
    ErrorKind("invalid_tensor", 400, False, "A tensor does not fit the model's signature"),
    ErrorKind("invalid_parameter", 400, False, "A parameter has the wrong type or lies outside its range"),
    ErrorKind("model_load_failed", 400, False, "The model could not be loaded"),
    ErrorKind("digest_mismatch", 400, False, "The content does not have the digest it was sent under"),
    ErrorKind("model_rejected", 400, False, "The model is not admitted"),
    ErrorKind("golden_mismatch", 400, False, "The model's outputs differ from its golden examples"),
    ErrorKind("context_length_exceeded", 400, False, "Prompt and answer do not fit the model's context"),
    ErrorKind("run_too_large", 400, False, "The request takes more memory than its model may have"),
    ErrorKind("unauthenticated", 401, False, "A valid API key is needed"),
    ErrorKind("permission_denied", 403, False, "The API key lacks a scope"),
    ErrorKind("quota_exceeded", 403, False, "A quota is used up"),
    ErrorKind("not_found", 404, False, "There is nothing at this path"),
    ErrorKind("model_not_found", 404, False, "There is no such model"),
    ErrorKind("version_not_found", 404, False, "The model has no such version"),
    ErrorKind("key_not_found", 404, False, "There is no such API key"),
    ErrorKind("blob_not_found", 404, False, "There is no such blob"),
    ErrorKind("deployment_not_found", 404, False, "There is no such deployment"),
    ErrorKind("alias_not_found", 404, False, "The model has no such alias"),
    ErrorKind("method_not_allowed", 405, False, "The path does not take this method"),
    ErrorKind("request_timeout", 408, True, "The request did not arrive in time"),
    ErrorKind("conflict", 409, False, "The request contradicts the present state"),
    ErrorKind("upload_conflict", 409, False, "The upload does not continue where the blob ends"),
    ErrorKind("payload_too_large", 413, False, "The body is too large"),
    ErrorKind("rate_limited", 429, True, "The API key makes too many requests"),
    ErrorKind("headers_too_large", 431, False, "The request's headers are too large or too many"),
    ErrorKind("cancelled", 499, False, "The caller went away"),
    ErrorKind("internal", 500, False, "The gateway failed"),
    ErrorKind("model_failed", 500, False, "The model failed on this request"),
    ErrorKind("unsupported", 501, False, "This gateway does not offer the operation"),
    ErrorKind("unsupported_encoding", 501, False, "The body's Content-Encoding cannot be undone"),
    ErrorKind("upstream_failed", 502, False, "The server behind the model failed"),
    ErrorKind("model_not_ready", 503, True, "The model cannot answer now"),
    ErrorKind("queue_full", 503, True, "The model's queue is full"),
    ErrorKind("shutting_down", 503, True, "The gateway is shutting down"),
    ErrorKind("store_unavailable", 503, True, "The database does not answer"),
    ErrorKind("worker_crashed", 503, False, "The model's process died of this request"),
    ErrorKind("model_failing", 503, True, "The model fails too often and is held back"),
    ErrorKind("deadline_exceeded", 504, False, "The time that the caller granted has passed"),
    ErrorKind("insufficient_storage", 507, False, "There is no room to store it"),
    ErrorKind("memory_exceeded", 507, False, "The model does not fit into memory"),
)

ERRORS: Final[dict[str, ErrorKind]] = {kind.code: kind for kind in _KINDS}
"""Code to its meaning, ordered by status. ``cancelled`` is only ever logged and counted: nobody is left to read it."""

RETRYABLE: Final = frozenset(kind.code for kind in _KINDS if kind.retryable)
"""Codes after which the same request may succeed when sent again."""

STATUSES: Final = frozenset(kind.status for kind in _KINDS)
"""Every status an error of the gateway can have."""

PROBLEM_TYPE_PREFIX: Final = "urn:inferway:error:"
"""The ``type`` of a problem body is this and the code. Source: RFC 9457, section 3.1.1."""


def problem_type(code: str) -> str:
    """The ``type`` member of an RFC 9457 problem body for a code."""
    return PROBLEM_TYPE_PREFIX + code


if set(get_args(ErrorCode)) != set(ERRORS):  # pragma: no cover - a slip in this file, found at the first import
    raise AssertionError("ErrorCode and ERRORS must list the same codes")
