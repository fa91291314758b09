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
    from ._encoding import Classified, ClassifyResult, EmbeddingResult, Ranked, RerankResult
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
        BuildError,
        CalibrationError,
        ClientClosedError,
        ConfigurationError,
        ConflictError,
        DeadlineExceededError,
        DeploymentFailedError,
        DeploymentNotFoundError,
        DigestMismatchError,
        ExportError,
        ExportMismatchError,
        GoldenMismatchError,
        InferwayError,
        InsufficientResourcesError,
        InsufficientStorageError,
        InternalServerError,
        InvalidInputError,
        InvalidTensorError,
        KeyNotFoundError,
        MemoryExceededError,
        MissingExtraError,
        ModelFailedError,
        ModelFailingError,
        ModelLoadError,
        ModelNotBuiltError,
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
        StaleModelError,
        StreamInterruptedError,
        TrainingDivergedError,
        TrainingError,
        UnknownFrameworkError,
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
    from ._streams import AsyncTextStream, TextStream
    from ._text import (
        ChatChoice,
        ChatCompletion,
        ChatMessage,
        Completion,
        CompletionChoice,
        ContentDelta,
        Finish,
        ToolCall,
        ToolCallDelta,
        Usage,
        UsageReport,
    )
    from ._version import __version__
    from .build.export import to_onnx
    from .build.model import OnnxModel
    from .build.optimize.api import optimize
    from .build.optimize.report import Candidate, OptimizationReport, OutputDifference
    from .build.package import Package, package
    from .build.verify import Verification, VerifiedCase
    from .explain.explanation import Explanation
    from .resources.deployments import AsyncDeployment, Deployment
    from .resources.inference import AsyncModelHandle, ModelHandle
    from .train.deployed import DeployedModel
    from .train.history import History
    from .train.job import CheckpointOptions, EarlyStopping
    from .train.wrapper import WrappedModel, wrap

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
    "AsyncTextStream",
    "AuthenticationError",
    "BadRequestError",
    "BlobNotFoundError",
    "BuildError",
    "CalibrationError",
    "Candidate",
    "ChatChoice",
    "ChatCompletion",
    "ChatMessage",
    "CheckpointOptions",
    "Classified",
    "ClassifyResult",
    "ClientClosedError",
    "Clock",
    "Completion",
    "CompletionChoice",
    "ConfigurationError",
    "ConflictError",
    "ContentDelta",
    "DeadlineExceededError",
    "DeployEvent",
    "DeployedModel",
    "Deployment",
    "DeploymentFailedError",
    "DeploymentNotFoundError",
    "DigestMismatchError",
    "EarlyStopping",
    "EmbeddingResult",
    "Explanation",
    "ExportError",
    "ExportMismatchError",
    "Finish",
    "GoldenMismatchError",
    "History",
    "InferenceResult",
    "Inferway",
    "InferwayError",
    "InsufficientResourcesError",
    "InsufficientStorageError",
    "InternalServerError",
    "InvalidInputError",
    "InvalidTensorError",
    "KeyNotFoundError",
    "MemoryExceededError",
    "MissingExtraError",
    "ModelFailedError",
    "ModelFailingError",
    "ModelHandle",
    "ModelLoadError",
    "ModelMetadata",
    "ModelNotBuiltError",
    "ModelNotFoundError",
    "ModelNotReadyError",
    "ModelRejectedError",
    "NotFoundError",
    "NotGiven",
    "OnnxModel",
    "OptimizationReport",
    "OutputDifference",
    "Package",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "QueueFullError",
    "QuotaExceededError",
    "Ranked",
    "RateLimitError",
    "RawResponse",
    "RequestEvent",
    "RequestOptions",
    "RerankResult",
    "ResponseEvent",
    "RetryEvent",
    "RetryPolicy",
    "ServiceUnavailableError",
    "StaleModelError",
    "StreamInterruptedError",
    "TensorSpec",
    "TextStream",
    "Timeout",
    "ToolCall",
    "ToolCallDelta",
    "TrainingDivergedError",
    "TrainingError",
    "UnknownFrameworkError",
    "UnsupportedError",
    "UploadConflictError",
    "UpstreamFailedError",
    "Usage",
    "UsageReport",
    "Verification",
    "VerifiedCase",
    "VersionNotFoundError",
    "WorkerCrashedError",
    "WrappedModel",
    "__version__",
    "optimize",
    "package",
    "to_onnx",
    "wrap",
]

_MODULES = {
    "CheckpointOptions": "train.job",
    "DeployedModel": "train.deployed",
    "EarlyStopping": "train.job",
    "History": "train.history",
    "WrappedModel": "train.wrapper",
    "wrap": "train.wrapper",
    "AsyncTextStream": "_streams",
    "TextStream": "_streams",
    "ChatChoice": "_text",
    "ChatCompletion": "_text",
    "ChatMessage": "_text",
    "Completion": "_text",
    "CompletionChoice": "_text",
    "ContentDelta": "_text",
    "Finish": "_text",
    "ToolCall": "_text",
    "ToolCallDelta": "_text",
    "Usage": "_text",
    "UsageReport": "_text",
    "Classified": "_encoding",
    "ClassifyResult": "_encoding",
    "EmbeddingResult": "_encoding",
    "Ranked": "_encoding",
    "RerankResult": "_encoding",
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
    "OnnxModel": "build.model",
    "Candidate": "build.optimize.report",
    "OptimizationReport": "build.optimize.report",
    "OutputDifference": "build.optimize.report",
    "optimize": "build.optimize.api",
    "Package": "build.package",
    "package": "build.package",
    "Verification": "build.verify",
    "VerifiedCase": "build.verify",
    "to_onnx": "build.export",
    "Explanation": "explain.explanation",
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
