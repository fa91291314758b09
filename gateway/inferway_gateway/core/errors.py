"""Domain errors. Each knows its contract code and never an HTTP status.

    GatewayError                        code                  retryable
      MalformedRequestError             malformed_request     no
        InvalidTensorError              invalid_tensor        no
        InvalidParameterError           invalid_parameter     no
          ContextLengthError            context_length_exceeded no
        DigestMismatchError             digest_mismatch       no
      UnsupportedEncodingError          unsupported_encoding  no
      UnsupportedOperationError         unsupported           no
      PayloadTooLargeError              payload_too_large     no
      UnauthenticatedError              unauthenticated       no
      PermissionDeniedError             permission_denied     no
      QuotaExceededError                quota_exceeded        no
      NotFoundError                     not_found             no
        ModelNotFoundError              model_not_found       no
        VersionNotFoundError            version_not_found     no
        KeyNotFoundError                key_not_found         no
        BlobNotFoundError               blob_not_found        no
        DeploymentNotFoundError         deployment_not_found  no
        AliasNotFoundError              alias_not_found       no
      ConflictError                     conflict              no
        UploadConflictError             upload_conflict       no
      ModelLoadError                    model_load_failed     no
      ModelRejectedError                model_rejected        no
      GoldenMismatchError               golden_mismatch       no
      ModelNotReadyError                model_not_ready       yes
        ModelFailingError               model_failing         yes
      RateLimitedError                  rate_limited          yes
      QueueFullError                    queue_full            yes
      ShuttingDownError                 shutting_down         yes
      StoreUnavailableError             store_unavailable     yes
      DeadlineExceededError             deadline_exceeded     no
      CancelledByCallerError            cancelled             no
      ModelExecutionError               model_failed          no
        RunTooLargeError                run_too_large         no
      WorkerCrashedError                worker_crashed        no
      UpstreamError                     upstream_failed       no
      InsufficientStorageError          insufficient_storage  no
      MemoryExceededError               memory_exceeded       no
      InternalError                     internal              no

A message says what was expected and what came. It never holds a key, a payload, a path or an address.
"""

from __future__ import annotations

from typing import ClassVar


class GatewayError(Exception):
    """Base of every error that the gateway answers with.

    Attributes:
        code: the contract's name of the situation, stable over releases.
        retryable: the same request may succeed when sent again unchanged.
        retry_after_s: seconds a caller should wait before trying again, where that is known.
        upstream_attempts: calls of servers elsewhere that were made before it came to this.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.upstream_attempts = 0


class MalformedRequestError(GatewayError):
    """The body, a header or the path cannot be read as what the contract asks for."""

    code = "malformed_request"


class InvalidTensorError(MalformedRequestError):
    """A tensor has the wrong name, datatype, shape or content for the model's signature."""

    code = "invalid_tensor"


class InvalidParameterError(MalformedRequestError):
    """A request parameter has the wrong type or lies outside its range.

    Attributes:
        param: the member of the request that it is about, as the caller wrote it; None where that is not known.
    """

    code = "invalid_parameter"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidParameterError):
    """Prompt and wanted tokens do not fit the model's context; the message has both numbers."""

    code = "context_length_exceeded"


class UnsupportedEncodingError(GatewayError):
    """The Content-Encoding of the body is none that the gateway can undo."""

    code = "unsupported_encoding"


class UnsupportedOperationError(GatewayError):
    """The protocol knows the operation, this gateway does not offer it."""

    code = "unsupported"


class PayloadTooLargeError(GatewayError):
    """The body, before or after decompression, is larger than the limit."""

    code = "payload_too_large"


class UnauthenticatedError(GatewayError):
    """No key, or none that is known, unexpired and unrevoked. Never says which."""

    code = "unauthenticated"


class PermissionDeniedError(GatewayError):
    """The key is good and lacks the scope that the route asks for."""

    code = "permission_denied"


class NotFoundError(GatewayError):
    """No such path or object."""

    code = "not_found"


class ModelNotFoundError(NotFoundError):
    """No model of that name, or none that the caller's key may see."""

    code = "model_not_found"


class VersionNotFoundError(NotFoundError):
    """The model has no such version."""

    code = "version_not_found"


class KeyNotFoundError(NotFoundError):
    """No API key with that public id."""

    code = "key_not_found"


class ConflictError(GatewayError):
    """The request contradicts the present state of the object."""

    code = "conflict"


class ModelLoadError(GatewayError):
    """A model version could not be loaded; the message starts with ``failed to load '<name>'``."""

    code = "model_load_failed"


class ModelNotReadyError(GatewayError):
    """The version exists and cannot answer now: loading, unloading or failed."""

    code = "model_not_ready"
    retryable = True


class RateLimitedError(GatewayError):
    """The key makes more requests than it may."""

    code = "rate_limited"
    retryable = True


class QueueFullError(GatewayError):
    """The model's queue is at its bound of rows or bytes."""

    code = "queue_full"
    retryable = True


class ShuttingDownError(GatewayError):
    """The gateway drains and takes no new work."""

    code = "shutting_down"
    retryable = True


class StoreUnavailableError(GatewayError):
    """The database does not answer."""

    code = "store_unavailable"
    retryable = True


class DeadlineExceededError(GatewayError):
    """The caller's deadline, or the queue's timeout, passed before the answer was there."""

    code = "deadline_exceeded"


class CancelledByCallerError(GatewayError):
    """The caller went away; nobody reads this answer."""

    code = "cancelled"


class ModelExecutionError(GatewayError):
    """The model itself failed on this request, which had passed every check of its signature."""

    code = "model_failed"


class RunTooLargeError(ModelExecutionError):
    """What the model would compute for this request takes more memory than it may have."""

    code = "run_too_large"


class InternalError(GatewayError):
    """A defect of the gateway; details are in its log under the request id."""

    code = "internal"


class DigestMismatchError(MalformedRequestError):
    """The bytes of an upload do not have the SHA-256 digest that names them."""

    code = "digest_mismatch"


class ModelRejectedError(GatewayError):
    """The files are no model that this gateway takes; the message names the rule and the place."""

    code = "model_rejected"


class GoldenMismatchError(GatewayError):
    """A golden example gave other outputs than it says."""

    code = "golden_mismatch"


class QuotaExceededError(GatewayError):
    """What the request would store, or begin, goes beyond what its key, or the gateway, may have."""

    code = "quota_exceeded"


class BlobNotFoundError(NotFoundError):
    """No blob of that digest, or none that the caller's key may use."""

    code = "blob_not_found"


class DeploymentNotFoundError(NotFoundError):
    """No deployment of that id, or none that the caller's key may see."""

    code = "deployment_not_found"


class AliasNotFoundError(NotFoundError):
    """The model has no alias of that name."""

    code = "alias_not_found"


class UploadConflictError(ConflictError):
    """An upload was to continue at another byte than the next one, or another is under way.

    Attributes:
        received: bytes of the content that are here, after which the upload may go on.
    """

    code = "upload_conflict"

    def __init__(self, message: str, received: int = 0) -> None:
        super().__init__(message)
        self.received = received


class UpstreamError(GatewayError):
    """A remote model's servers did not answer, or not with what the protocol asks for; retries were made."""

    code = "upstream_failed"


class WorkerCrashedError(GatewayError):
    """The worker process died while it ran this request, alone and after a first try; it would die of it again."""

    code = "worker_crashed"


class ModelFailingError(ModelNotReadyError):
    """The version's circuit breaker is open: its worker crashed, or its servers failed, too often lately."""

    code = "model_failing"


class InsufficientStorageError(GatewayError):
    """The disk, or the object store, has no room left."""

    code = "insufficient_storage"


class MemoryExceededError(GatewayError):
    """The version needs more memory than the budget; the message has both numbers."""

    code = "memory_exceeded"
