"""Names, patterns, sizes and limits of the contract. Standard library only.

Sizes are bytes, times are seconds where the name does not say otherwise. The limits are the gateway's defaults; an
operator may set lower or higher ones, and `openapi/inferway.yaml` documents the defaults.
"""

from __future__ import annotations

import re
import zlib
from typing import Final, Literal, TypeAlias

Datatype: TypeAlias = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64",
    "BYTES",
]  # fmt: skip

DATATYPE_BYTES: Final[dict[str, int | None]] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
    "BYTES": None,
}
"""Datatype to the bytes of one element in a binary tensor, little-endian. None: each element is a length of four
bytes, little-endian and unsigned, and that many bytes of UTF-8. Source: Open Inference Protocol, "Tensor Data Types";
BF16 and the framing of BYTES: Triton's binary tensor extension."""

BINARY_ONLY_DATATYPES: Final = frozenset({"FP16", "BF16"})
"""Datatypes that have no JSON form; a ``data`` array of them is refused, an output of them is always binary."""

# --- headers -----------------------------------------------------------------------------------------------------
HEADER_LENGTH: Final = "Inference-Header-Content-Length"
"""Bytes of the JSON part that stands before the binary tensors, of the body after decompression."""
REQUEST_ID: Final = "X-Request-Id"
TIMEOUT_MS: Final = "Inferway-Timeout-Ms"
"""Milliseconds that the caller still grants, counted from the arrival of the request's first byte."""
ATTEMPT: Final = "Inferway-Attempt"
HOPS: Final = "Inferway-Hops"
"""Gateways that a request came through on its way here."""
IDEMPOTENCY_KEY: Final = "Idempotency-Key"
API_KEY_HEADER: Final = "X-API-Key"
SHOULD_RETRY: Final = "X-Should-Retry"
RETRY_AFTER: Final = "Retry-After"
SERVER_TIMING: Final = "Server-Timing"

UPLOAD_OFFSET: Final = "Upload-Offset"
"""The byte of the content that an upload's body begins at."""
UPLOAD_LENGTH: Final = "Upload-Length"
"""Bytes of the whole content of an upload."""
MODEL_VERSION: Final = "Inferway-Model-Version"
"""The version that answered a request for inference."""
FALLBACK: Final = "Inferway-Fallback"
"""On the answer of a fallback: the version that could not answer."""
UPSTREAM_ATTEMPTS: Final = "Inferway-Upstream-Attempts"
"""On the answer for a remote model: how many requests its servers got for this one."""

REQUEST_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""A caller's request id is taken over when it matches as a whole; any other is replaced."""
MAX_TIMEOUT_MS: Final = 999_999_999_999
TIMING_STAGES: Final = ("parse", "queue", "assemble", "run", "serialise")
"""Metrics of ``Server-Timing`` on an inference response, in order; milliseconds."""

# --- media types -------------------------------------------------------------------------------------------------
JSON: Final = "application/json"
BINARY: Final = "application/octet-stream"
PROBLEM_JSON: Final = "application/problem+json"
ENCODINGS: Final = ("gzip", "deflate")
"""Content codings understood in both directions; deflate is zlib's format (RFC 9110, section 8.4.1.2)."""

# --- scopes and keys ---------------------------------------------------------------------------------------------
Scope: TypeAlias = Literal["infer", "read", "deploy", "admin"]
SCOPES: Final[tuple[Scope, ...]] = ("infer", "read", "deploy", "admin")
"""Permissions a key can have. ``admin`` opens every route."""

Environment: TypeAlias = Literal["live", "test", "adm"]
ENVIRONMENTS: Final[tuple[Environment, ...]] = ("live", "test", "adm")

KEY_ID_PATTERN: Final = re.compile(r"[0-9A-Za-z]{12}")
KEY_PATTERN: Final = re.compile(r"ifw_(live|test|adm)_([0-9A-Za-z]{12})_([0-9A-Za-z]{43})([0-9A-Za-z]{6})")
"""An API key: environment, public id, 256 bits of secret in base 62, checksum. Match as a whole."""
KEY_IN_TEXT_PATTERN: Final = re.compile(r"\bifw_(live|test|adm)_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}\b")
"""Finds keys in running text, for scanners and for redaction."""
_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def key_checksum(unchecked: str) -> str:
    """The last six characters of a key: the CRC-32 of all characters before them, in base 62, zero-padded.

    It finds typing errors without a look-up and lets scanners tell keys from look-alikes. It is no protection.

    Args:
        unchecked: the key without its checksum: ``ifw_ENV_ID_SECRET``, ASCII.
    """
    value = zlib.crc32(unchecked.encode("ascii"))
    digits = ""
    for _ in range(6):
        value, digit = divmod(value, 62)
        digits = _BASE62[digit] + digits
    return digits


# --- models ------------------------------------------------------------------------------------------------------
MODEL_NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION_PATTERN: Final = re.compile(r"[0-9]+")
MODEL_GLOB_PATTERN: Final = re.compile(r"[A-Za-z0-9._*?\[\]!-]{1,128}")
"""What a key's ``models`` may hold: the characters of a model name and those of shell patterns (``fnmatch``)."""
ALIAS_PATTERN: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
MODEL_TARGET_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[a-z][a-z0-9-]{0,62})?")
"""What stands for a model in a path below ``/v2/models``: its name, or its name and an alias."""
DEFAULT_ALIAS: Final = "stable"
"""What a bare name means where the model has this alias."""
DIGEST_PATTERN: Final = re.compile(r"[0-9a-f]{64}")
DEPLOYMENT_ID_PATTERN: Final = re.compile(r"[0-9A-Za-z-]{1,64}")
FILE_PATH_PATTERN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@=,: -]*(/[A-Za-z0-9_][A-Za-z0-9._+@=,: -]*)*")
Isolation: TypeAlias = Literal["worker", "inprocess"]
VersionKind: TypeAlias = Literal["onnx", "language", "remote", "pipeline"]
VersionState: TypeAlias = Literal["READY", "LOADING", "UNLOADING", "UNLOADED", "FAILED"]
Step: TypeAlias = Literal["received", "checked", "admitted", "loaded", "warmed", "compared", "ready"]
"""What a deployment has done, in order."""
DeploymentState: TypeAlias = Literal["running", "succeeded", "failed", "cancelled"]
EventKind: TypeAlias = Literal[
    "deployment_started", "deployment_succeeded", "deployment_failed", "deployment_cancelled",
    "alias_set", "alias_deleted", "rolled_back", "auto_rolled_back",
    "version_deleted", "version_changed", "worker_crashed", "breaker_opened", "breaker_closed",
]  # fmt: skip
PLATFORM: Final = "onnxruntime_onnx"
ModelState: TypeAlias = Literal["UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING"]
RowExactness: TypeAlias = Literal["exact", "padded", "inexact", "unbatched"]

EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""Extensions of the protocol that the server metadata names."""

# --- limits ------------------------------------------------------------------------------------------------------
BODY_LIMIT_BYTES: Final = 128 * 1024 * 1024
"""A body, before and after decompression: a tensor of 64 MiB passes with its header."""
JSON_LIMIT_BYTES: Final = 8 * 1024 * 1024
"""The JSON part of a body."""
JSON_STRUCTURE_LIMIT: Final = 400_000
"""Arrays and objects that one JSON body may hold."""
JSON_DEPTH_LIMIT: Final = 1024
HEADER_LIMIT_BYTES: Final = 16 * 1024
HEADER_COUNT_LIMIT: Final = 100
HEADER_TIMEOUT_S: Final = 10
BODY_TIMEOUT_S: Final = 30
"""A body may take this long, and besides one second for each ``BODY_RATE_BYTES_PER_S`` of it."""
BODY_RATE_BYTES_PER_S: Final = 64 * 1024
MAX_RANK: Final = 32
MAX_DIM: Final = 2**63 - 1

KEY_NAME_MAX_LENGTH: Final = 128
KEY_MODELS_MAX_ITEMS: Final = 64
KEY_MAX_EXPIRES_IN_S: Final = 10 * 365 * 86_400
KEY_ADMIN_EXPIRES_IN_S: Final = 90 * 86_400
"""Life of a key with the scope ``admin`` whose creator names none."""
KEY_MAX_OVERLAP_S: Final = 30 * 86_400
KEY_DEFAULT_OVERLAP_S: Final = 86_400
KEY_LIST_MAX_LIMIT: Final = 200
KEY_LIST_DEFAULT_LIMIT: Final = 50
KEY_CURSOR_MAX_LENGTH: Final = 128

UPLOAD_LIMIT_BYTES: Final = 16 * 1024**3
"""One file of a version."""
UPLOAD_LIFE_S: Final = 86_400
"""How long an upload that nobody continues is kept."""
DEPLOY_BODY_LIMIT_BYTES: Final = 1024 * 1024
"""A JSON body that creates a version, changes one or sets an alias."""
VERSION_FILES_MAX_ITEMS: Final = 1024
FILE_PATH_MAX_LENGTH: Final = 512
LABELS_MAX_ITEMS: Final = 64
LABEL_MAX_LENGTH: Final = 256
METADATA_MAX_ITEMS: Final = 256
MAX_VERSION: Final = 2**31 - 1
ALIAS_WEIGHTS_MAX_ITEMS: Final = 16
ALIAS_FALLBACK_MAX_ITEMS: Final = 8
DEPLOYMENT_WAIT_MAX_S: Final = 30
"""The longest that a request for a deployment waits for news of it."""
LIST_MAX_LIMIT: Final = 1000
LIST_DEFAULT_LIMIT: Final = 100
"""Of deployments and of events."""

MODEL_REFERENCE_MAX_LENGTH: Final = 256
"""What stands for a model in a body under ``/v1``."""
CHOICES_MAX: Final = 16
"""Answers to one prompt (``n``), and prompts of one request for completions times that."""
MESSAGES_MAX_ITEMS: Final = 4096
STOP_MAX_ITEMS: Final = 16
TOP_LOGPROBS_MAX: Final = 20
LOGIT_BIAS_MAX_ITEMS: Final = 1024
TOOLS_MAX_ITEMS: Final = 128
EMBEDDING_INPUTS_MAX_ITEMS: Final = 2048
"""Texts of one request for embeddings or classes."""
RERANK_DOCUMENTS_MAX_ITEMS: Final = 1000
