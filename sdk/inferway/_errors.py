"""Every error that the SDK raises.

    InferwayError
      ConfigurationError                       also ValueError: an argument or environment variable cannot be used
      ClientClosedError                        also RuntimeError
      InvalidInputError                        also ValueError: inputs do not fit the model's signature
      DeploymentFailedError                    a deployment ended, and its version does not serve
      MissingExtraError                        also ImportError: a part of the package that was not installed
      BuildError                               a model could not be made into one that can be served
        UnknownFrameworkError                  also TypeError
        ModelNotBuiltError                     a model whose weights have no shapes yet
        ExportError                            what it computes cannot be said in ONNX
          ExportMismatchError                  what was exported computes something else
        CalibrationError                       also ValueError: calibration data that is missing or does not fit
        StaleModelError                        weights that changed after the model was optimised
      TrainingError                            a training ended without a result
        TrainingDivergedError                  a loss or a gradient is no number
        InsufficientResourcesError             also TimeoutError: what was asked for is not there, or not in time
      APIError                                 a call was made and has no result
        APIConnectionError                     no complete answer came
          APITimeoutError                      also TimeoutError: the call's time is over
          StreamInterruptedError               a streamed answer began and did not end
        APIResponseValidationError             an answer came that is none of this API
        APIStatusError                         the gateway, or something before it, answered with an error
          BadRequestError                400
            InvalidTensorError           400   also InvalidInputError: found by the gateway, not by the SDK
            ModelLoadError               400
              ModelRejectedError, GoldenMismatchError
            DigestMismatchError          400
          AuthenticationError            401
          PermissionDeniedError          403
            QuotaExceededError           403
          NotFoundError                  404
            ModelNotFoundError, VersionNotFoundError, KeyNotFoundError
            AliasNotFoundError, DeploymentNotFoundError, BlobNotFoundError
          ConflictError                  409
            UploadConflictError          409
          PayloadTooLargeError           413
          RateLimitError                 429
          InternalServerError            500 and every other 5xx
            ModelFailedError             500   the model itself failed on this input
            UnsupportedError             501
            UpstreamFailedError          502   the server behind a remote model
            ServiceUnavailableError      503
              ModelNotReadyError, QueueFullError, ModelFailingError, WorkerCrashedError
            DeadlineExceededError        504   also APITimeoutError: the time ran out at the gateway
            InsufficientStorageError     507
              MemoryExceededError        507

An answer's ``code`` chooses the class, then its status. An error with a code that this version does not know is still
the class of its status, with the code as text. ``str()`` is short and for people; ``repr()`` has every fact for a
support ticket. Neither ever holds an API key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast


class InferwayError(Exception):
    """Base of everything that the SDK raises on purpose. All of them can be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


class ConfigurationError(InferwayError, ValueError):
    """An argument of a client or a call, or an environment variable, cannot be used as it is."""


class ClientClosedError(InferwayError, RuntimeError):
    """The client was closed; make a new one."""


class InvalidInputError(InferwayError, ValueError):
    """Inputs do not fit the model's signature: a name, a datatype, a shape or a value.

    Raised by the SDK before anything is sent, and as `InvalidTensorError` when the gateway found it.

    Attributes:
        tensor: name of the input at fault; None where the fault is none of a single input.
    """

    tensor: str | None = None

    def __init__(self, message: str, *, tensor: str | None = None) -> None:
        super().__init__(message)
        self.tensor = tensor


def _rebuild(cls: type[InferwayError], args: tuple[Any, ...], state: dict[str, Any]) -> InferwayError:
    """Undo pickling. ``__init__`` takes keywords that pickle does not know of, so it is not called again."""
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class DeploymentFailedError(InferwayError):
    """A deployment ended and its version does not serve; whatever served before goes on serving.

    Attributes:
        deployment: its `Deployment`, or `AsyncDeployment`, in its last state.
        step: the step that failed, such as ``admitted``; None where it was cancelled before any.
        code: the contract's name of the situation, such as ``golden_mismatch``; ``cancelled`` where it was cancelled.
        message: why, in one sentence.
    """

    deployment: Any
    step: str | None
    code: str
    message: str

    def __init__(self, deployment: Any, step: str | None, code: str, message: str) -> None:
        super().__init__(message)
        self.deployment = deployment
        self.step = step
        self.code = code
        self.message = message

    def __str__(self) -> str:
        at = f" at the step '{self.step}'" if self.step is not None else ""
        if self.code == "cancelled":
            return f"{_shown(self.deployment)} was cancelled{at}"
        return f"{_shown(self.deployment)} failed{at}: {self.message} ({self.code})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A deployment holds a client, which cannot travel to another process; its id can.
        return (_rebuild, (type(self), self.args, {**self.__dict__, "deployment": _shown(self.deployment)}))


def _shown(deployment: Any) -> str:
    return deployment if isinstance(deployment, str) else f"deployment {deployment.id} of {deployment.model}"


class MissingExtraError(InferwayError, ImportError):
    """A part of the package is used that was not installed; the message says how to.

    Attributes:
        package: what could not be imported.
        extra: the extra of ``inferway`` that brings it.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'inferway[{extra}]'")


class BuildError(InferwayError):
    """A model could not be made into one that can be served."""


class UnknownFrameworkError(BuildError, TypeError):
    """What was given is a model of no framework that is known here."""


class ModelNotBuiltError(BuildError):
    """The model has never seen an input, so that its weights have no shapes yet; or it was never fitted."""


class ExportError(BuildError):
    """What the model computes cannot be said in ONNX.

    Attributes:
        operator: what cannot be exported; None where the exporter does not say.
        where: the layer or line that it is in; None where the exporter does not say.
    """

    def __init__(self, message: str, *, operator: str | None = None, where: str | None = None) -> None:
        self.operator = operator
        self.where = where
        super().__init__(message)


class ExportMismatchError(ExportError):
    """The exported graph computes something else than the model.

    Attributes:
        output: name of the output that differs most, relative to what is allowed.
        max_difference: largest absolute difference of an element; infinite where shapes differ.
        tolerance: what is allowed there.
        shapes: shapes of the inputs with which it was seen, by name.
    """

    def __init__(
        self,
        message: str,
        *,
        output: str,
        max_difference: float,
        tolerance: float,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.output = output
        self.max_difference = max_difference
        self.tolerance = tolerance
        self.shapes = dict(shapes)
        super().__init__(message)


class CalibrationError(BuildError, ValueError):
    """Data to calibrate or measure with is missing, or does not fit the model's signature."""


class StaleModelError(BuildError):
    """The model's weights have changed since it was optimised: what would be deployed is not what was trained last."""


class TrainingError(InferwayError):
    """A training ended without a result."""


class TrainingDivergedError(TrainingError):
    """A loss or a gradient is no number, so that the training was stopped.

    Attributes:
        step: the step, counted from 1 over all epochs.
        worker: which worker saw it, from 0; None in local training.
        loss: what it was.
    """

    def __init__(self, message: str, *, step: int, worker: int | None, loss: float) -> None:
        self.step = step
        self.worker = worker
        self.loss = loss
        super().__init__(message)


class InsufficientResourcesError(TrainingError, TimeoutError):
    """The cluster has not what was asked for, or did not get it in time.

    Attributes:
        wanted: resources that were asked for, by Ray's names (``CPU``, ``GPU``, ``memory`` in bytes).
        available: those that there were at the end of the wait.
    """

    def __init__(self, message: str, *, wanted: Mapping[str, float], available: Mapping[str, float]) -> None:
        self.wanted = dict(wanted)
        self.available = dict(available)
        super().__init__(message)


class APIError(InferwayError):
    """A call was made and has no result.

    Attributes:
        message: what happened, in one sentence.
        code: the contract's name of the situation, such as ``queue_full``; None where the answer had none.
        request_id: the id under which the gateway's log knows the last attempt.
        attempts: how often the call was sent.
        retryable: the same call may succeed later. The SDK has tried again already, as far as its policy went.
        retry_after: seconds that the gateway asked to wait, where it did.
        elapsed: seconds from the call to this error.
    """

    message: str
    code: str | None
    request_id: str | None
    attempts: int
    retryable: bool
    retry_after: float | None
    elapsed: float | None

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        attempts: int = 1,
        retryable: bool = False,
        retry_after: float | None = None,
        elapsed: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self._status_code = status_code
        self.code = code
        self.request_id = request_id
        self.attempts = attempts
        self.retryable = retryable
        self.retry_after = retry_after
        self.elapsed = elapsed

    @property
    def status_code(self) -> int | None:
        """HTTP status of the last answer, None where none came."""
        return self._status_code

    def __str__(self) -> str:
        facts = [
            " ".join(str(fact) for fact in (self.status_code, self.code) if fact is not None),
            f"{self.attempts} attempts" if self.attempts > 1 else "",
            f"request {self.request_id}" if self.request_id else "",
        ]
        known = ", ".join(fact for fact in facts if fact)
        return f"{self.message} ({known})" if known else self.message

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={getattr(self, name)!r}" for name in _FACTS)
        return f"{type(self).__name__}({self.message!r}, {facts})"


_FACTS: Final = ("status_code", "code", "request_id", "attempts", "retryable", "retry_after", "elapsed")


class APIConnectionError(APIError):
    """No complete answer came: the connection was refused, broke, or could not be secured.

    Attributes:
        sent: False when the gateway cannot have seen the request; then repeating it never does anything twice.
    """

    sent: bool

    def __init__(self, message: str, *, sent: bool = True, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.sent = sent


class APITimeoutError(APIConnectionError, TimeoutError):
    """The time that the caller granted is over, or one of its parts: connecting, reading.

    The total time covers every attempt and every delay between them, see `Timeout`.
    """


class StreamInterruptedError(APIConnectionError):
    """A streamed answer began and did not end: the connection broke, the time was over, or the gateway says why.

    It is not tried again, because part of the answer has been given out already. ``code`` and ``param`` are those of
    the gateway's error where it sent one into the stream; the cause (``__cause__``) is what broke it otherwise.

    Attributes:
        partial: what had come until then, a `ChatCompletion` or `Completion`; its ``finish_reason`` is None.
        param: the member of the request that the gateway's error is about.
    """

    partial: Any
    param: str | None

    def __init__(self, message: str, *, partial: Any = None, param: str | None = None, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.partial = partial
        self.param = param


class APIResponseValidationError(APIError):
    """An answer came that does not follow the contract: cut off, too long, no JSON, members missing or of wrong type.

    Attributes:
        body: the first kilobyte of the answer's body, as text.
    """

    body: str

    def __init__(self, message: str, *, body: str = "", **facts: Any) -> None:
        super().__init__(message, **facts)
        self.body = body


class APIStatusError(APIError):
    """An answer with an error status. See the class for its status or code.

    Attributes:
        body: the answer's body: the decoded JSON object where it was one, else the first kilobyte as text.
        headers: the answer's headers.
        param: the member of the request that the error is about, such as ``messages[2].content``, where it says so.
    """

    body: Any
    headers: Mapping[str, str]

    def __init__(
        self,
        message: str,
        *,
        status_code: int,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(message, status_code=status_code, **facts)
        self._status = status_code
        self.body = body
        self.headers = {} if headers is None else headers

    @property
    def param(self) -> str | None:
        body = self.body
        inner = cast(dict[str, Any], body).get("error") if isinstance(body, dict) else None
        found = cast(dict[str, Any], inner).get("param") if isinstance(inner, dict) else None
        return found if isinstance(found, str) else None

    @property
    def status_code(self) -> int:
        """HTTP status of the last answer."""
        return self._status


class BadRequestError(APIStatusError):
    """The gateway cannot read the request, or does not accept a value in it."""


class InvalidTensorError(BadRequestError, InvalidInputError):
    """The gateway found that a tensor does not fit the model's signature; the message says what was expected."""


class ModelLoadError(BadRequestError):
    """The model could not be loaded; the message says why."""


class ModelRejectedError(ModelLoadError):
    """The model is not admitted: an operator, opset, file or size that this gateway does not run."""


class GoldenMismatchError(ModelLoadError):
    """The model's outputs differ from those of its golden examples."""


class DigestMismatchError(BadRequestError):
    """What was uploaded does not have the digest it was sent under: the file changed, or the way damaged it."""


class AuthenticationError(APIStatusError):
    """No API key, or one that is unknown, expired or revoked; the gateway never says which."""


class PermissionDeniedError(APIStatusError):
    """The key is good and lacks a scope that this call needs."""


class QuotaExceededError(PermissionDeniedError):
    """The key has used up what it may store or deploy."""


class NotFoundError(APIStatusError):
    """There is nothing of that name, or nothing that this key may see."""


class ModelNotFoundError(NotFoundError):
    """There is no model of that name, or none that this key may see."""


class VersionNotFoundError(NotFoundError):
    """The model has no such version."""


class KeyNotFoundError(NotFoundError):
    """There is no API key with that id."""


class AliasNotFoundError(NotFoundError):
    """The model has no such alias."""


class DeploymentNotFoundError(NotFoundError):
    """There is no such deployment, or none that this key may see."""


class BlobNotFoundError(NotFoundError):
    """The gateway has no file of that digest, or none that this key has shown to have."""


class ConflictError(APIStatusError):
    """The request contradicts the present state of the object."""


class UploadConflictError(ConflictError):
    """The upload does not continue where the gateway's part of the file ends.

    Attributes:
        received: bytes that the gateway has of the file; None where the answer does not say.
    """

    @property
    def received(self) -> int | None:
        body = self.body
        found = cast(dict[str, Any], body).get("received") if isinstance(body, dict) else None
        return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


class PayloadTooLargeError(APIStatusError):
    """The body is longer than the gateway accepts: send fewer rows at once."""


class RateLimitError(APIStatusError):
    """Too many requests; ``retry_after`` says when to come back, where the gateway knows it."""


class InternalServerError(APIStatusError):
    """The gateway, or something before it, failed; its log knows more under ``request_id``."""


class ModelFailedError(InternalServerError):
    """The model itself failed on this input, which had passed every check of its signature."""


class UnsupportedError(InternalServerError):
    """The gateway knows the operation or encoding and does not offer it."""


class UpstreamFailedError(InternalServerError):
    """The server behind a remote model failed, or could not be reached; the gateway has tried as often as it may."""


class ServiceUnavailableError(InternalServerError):
    """The gateway cannot answer now: it starts, drains, is full or misses its database."""


class ModelNotReadyError(ServiceUnavailableError):
    """The model is there and cannot answer now: it is being loaded or unloaded, or its loading failed."""


class QueueFullError(ServiceUnavailableError):
    """The model's queue is full."""


class WorkerCrashedError(ServiceUnavailableError):
    """The model's process died of this request, twice; sending it again would only kill it again."""


class ModelFailingError(ServiceUnavailableError):
    """The model has failed too often of late and is held back; ``retry_after`` says until when."""


class DeadlineExceededError(InternalServerError, APITimeoutError):
    """The time that the caller granted was over at the gateway before the answer was there."""

    sent = True


class InsufficientStorageError(InternalServerError):
    """The gateway has no room to store it."""


class MemoryExceededError(InsufficientStorageError):
    """The model does not fit into the gateway's memory; the message has both sizes."""


_BY_CODE: Final[dict[str, type[APIStatusError]]] = {
    "invalid_tensor": InvalidTensorError,
    "model_load_failed": ModelLoadError,
    "digest_mismatch": DigestMismatchError,
    "model_rejected": ModelRejectedError,
    "golden_mismatch": GoldenMismatchError,
    "quota_exceeded": QuotaExceededError,
    "model_not_found": ModelNotFoundError,
    "version_not_found": VersionNotFoundError,
    "key_not_found": KeyNotFoundError,
    "blob_not_found": BlobNotFoundError,
    "deployment_not_found": DeploymentNotFoundError,
    "alias_not_found": AliasNotFoundError,
    "upload_conflict": UploadConflictError,
    "model_failed": ModelFailedError,
    "upstream_failed": UpstreamFailedError,
    "model_not_ready": ModelNotReadyError,
    "queue_full": QueueFullError,
    "worker_crashed": WorkerCrashedError,
    "model_failing": ModelFailingError,
    "deadline_exceeded": DeadlineExceededError,
    "insufficient_storage": InsufficientStorageError,
    "memory_exceeded": MemoryExceededError,
}
"""Codes that have a class of their own; all others are the class of their status."""

_BY_STATUS: Final[dict[int, type[APIStatusError]]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    429: RateLimitError,
    501: UnsupportedError,
    503: ServiceUnavailableError,
    507: InsufficientStorageError,
}


def status_error_class(status_code: int, code: str | None) -> type[APIStatusError]:
    """The class for an answer: by its code, then by its status.

    A 504 without the gateway's code is a proxy's word about its upstream, not the caller's deadline.
    """
    if code is not None and code in _BY_CODE:
        return _BY_CODE[code]
    return _BY_STATUS.get(status_code, InternalServerError if status_code >= 500 else APIStatusError)


def _named_as_imported() -> None:
    # Tracebacks and pickles name them as users import them.
    for found in list(globals().values()):
        if isinstance(found, type) and issubclass(found, InferwayError):
            found.__module__ = "inferway"


_named_as_imported()


class MalformedAnswer(ValueError):
    """Private: a reader found that an answer breaks the contract; `_core.read` makes it the public error."""
