"""Inferway's client SDK: run models on a gateway from Python.

    from inferway import Inferway

    with Inferway("http://127.0.0.1:8080", api_key="ifw_…") as client:
        result = client.infer("digits", images)
        print(result["scores"])

`AsyncInferway` has the same methods to await. Importing this package imports nothing else: a name's module is imported
when the name is first used (PEP 562), so that a program pays for numpy and httpx only where it calls a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._client import AsyncInferway, Inferway
    from ._errors import (
        AliasNotFoundError,
        APIConnectionError,
        APIError,
        APIResponseValidationError,
        APIStatusError,
        APITimeoutError,
        AuthenticationError,
        BadRequestError,
        BlobNotFoundError,
        ClientClosedError,
        ConfigurationError,
        ConflictError,
        DeadlineExceededError,
        DeploymentFailedError,
        DeploymentNotFoundError,
        DigestMismatchError,
        GoldenMismatchError,
        InferwayError,
        InsufficientStorageError,
        InternalServerError,
        InvalidInputError,
        InvalidTensorError,
        KeyNotFoundError,
        MemoryExceededError,
        ModelFailedError,
        ModelFailingError,
        ModelLoadError,
        ModelNotFoundError,
        ModelNotReadyError,
        ModelRejectedError,
        NotFoundError,
        PayloadTooLargeError,
        PermissionDeniedError,
        QueueFullError,
        QuotaExceededError,
        RateLimitError,
        ServiceUnavailableError,
        UnsupportedError,
        UploadConflictError,
        UpstreamFailedError,
        VersionNotFoundError,
        WorkerCrashedError,
    )
    from ._inference import InferenceResult
    from ._options import (
        NOT_GIVEN,
        Clock,
        NotGiven,
        RequestEvent,
        RequestOptions,
        ResponseEvent,
        RetryEvent,
        RetryPolicy,
        Timeout,
    )
    from ._progress import DeployEvent
    from ._raw import RawResponse
    from ._signature import ModelMetadata, TensorSpec
    from ._version import __version__
    from .resources.deployments import AsyncDeployment, Deployment
    from .resources.inference import AsyncModelHandle, ModelHandle

__all__ = [
    "NOT_GIVEN",
    "APIConnectionError",
    "APIError",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AliasNotFoundError",
    "AsyncDeployment",
    "AsyncInferway",
    "AsyncModelHandle",
    "AuthenticationError",
    "BadRequestError",
    "BlobNotFoundError",
    "ClientClosedError",
    "Clock",
    "ConfigurationError",
    "ConflictError",
    "DeadlineExceededError",
    "DeployEvent",
    "Deployment",
    "DeploymentFailedError",
    "DeploymentNotFoundError",
    "DigestMismatchError",
    "GoldenMismatchError",
    "InferenceResult",
    "Inferway",
    "InferwayError",
    "InsufficientStorageError",
    "InternalServerError",
    "InvalidInputError",
    "InvalidTensorError",
    "KeyNotFoundError",
    "MemoryExceededError",
    "ModelFailedError",
    "ModelFailingError",
    "ModelHandle",
    "ModelLoadError",
    "ModelMetadata",
    "ModelNotFoundError",
    "ModelNotReadyError",
    "ModelRejectedError",
    "NotFoundError",
    "NotGiven",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "QueueFullError",
    "QuotaExceededError",
    "RateLimitError",
    "RawResponse",
    "RequestEvent",
    "RequestOptions",
    "ResponseEvent",
    "RetryEvent",
    "RetryPolicy",
    "ServiceUnavailableError",
    "TensorSpec",
    "Timeout",
    "UnsupportedError",
    "UploadConflictError",
    "UpstreamFailedError",
    "VersionNotFoundError",
    "WorkerCrashedError",
    "__version__",
]

_MODULES = {
    "AsyncDeployment": "resources.deployments",
    "AsyncInferway": "_client",
    "AsyncModelHandle": "resources.inference",
    "Clock": "_options",
    "DeployEvent": "_progress",
    "Deployment": "resources.deployments",
    "InferenceResult": "_inference",
    "Inferway": "_client",
    "ModelHandle": "resources.inference",
    "ModelMetadata": "_signature",
    "NOT_GIVEN": "_options",
    "NotGiven": "_options",
    "RawResponse": "_raw",
    "RequestEvent": "_options",
    "RequestOptions": "_options",
    "ResponseEvent": "_options",
    "RetryEvent": "_options",
    "RetryPolicy": "_options",
    "TensorSpec": "_signature",
    "Timeout": "_options",
    "__version__": "_version",
}
"""Where public names live; every other one is an error, in ``_errors``."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f".{_MODULES.get(name, '_errors')}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
