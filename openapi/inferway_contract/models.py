"""The bodies of the contract as pydantic models.

Three attitudes towards what a model does not know: bodies that our own routes under ``/api`` receive refuse unknown
members (`Strict`), because a misspelt ``expires_in`` must not make a key that lives for ever; bodies of the Open
Inference Protocol and of the routes under ``/v1`` ignore them, as the protocol and OpenAI's clients expect (`Lenient`);
answers keep them, and take any text where the contract has a closed set (`Answer`), so that a client may be older than
its gateway.

None of them is meant for the hot path: tensors' elements are plain Python values or raw bytes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictStr,
    Tag,
    WithJsonSchema,
)

from .names import (
    ALIAS_FALLBACK_MAX_ITEMS,
    ALIAS_WEIGHTS_MAX_ITEMS,
    BODY_LIMIT_BYTES,
    CHOICES_MAX,
    DEFAULT_ALIAS,
    EMBEDDING_INPUTS_MAX_ITEMS,
    FILE_PATH_MAX_LENGTH,
    KEY_CURSOR_MAX_LENGTH,
    KEY_DEFAULT_OVERLAP_S,
    KEY_LIST_MAX_LIMIT,
    KEY_MAX_EXPIRES_IN_S,
    KEY_MAX_OVERLAP_S,
    KEY_MODELS_MAX_ITEMS,
    KEY_NAME_MAX_LENGTH,
    LABEL_MAX_LENGTH,
    LABELS_MAX_ITEMS,
    LIST_MAX_LIMIT,
    LOGIT_BIAS_MAX_ITEMS,
    MAX_DIM,
    MAX_RANK,
    MAX_VERSION,
    MESSAGES_MAX_ITEMS,
    METADATA_MAX_ITEMS,
    MODEL_REFERENCE_MAX_LENGTH,
    RERANK_DOCUMENTS_MAX_ITEMS,
    STOP_MAX_ITEMS,
    TOOLS_MAX_ITEMS,
    TOP_LOGPROBS_MAX,
    UPLOAD_LIMIT_BYTES,
    VERSION_FILES_MAX_ITEMS,
    Datatype,
    Environment,
    Isolation,
    Scope,
)


class Strict(BaseModel):
    """A body that our own routes receive: an unknown member is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Lenient(BaseModel):
    """A body of the Open Inference Protocol, or of a route under ``/v1``, that the gateway receives: unknown members
    are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Answer(BaseModel):
    """A body that the gateway sends: unknown members are kept, in ``model_extra``."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


def _whole(value: object) -> object:
    # For JSON, and so for JSON Schema, 3.0 is an integer; for pydantic "3" and true are integers unless told otherwise.
    if isinstance(value, bool | str):
        raise ValueError("expected a whole number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: object) -> object:
    if isinstance(value, bool | str):
        raise ValueError("expected a number")
    return value


def _distinct(scopes: list[Scope]) -> list[Scope]:
    if len(set(scopes)) != len(scopes):
        raise ValueError("expected each scope at most once")
    return scopes


ModelName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
VersionText: TypeAlias = Annotated[str, Field(pattern=r"^[0-9]+$")]
RequestId: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
TensorName: TypeAlias = Annotated[str, Field(min_length=1)]
_WHOLE = BeforeValidator(_whole)
Dims: TypeAlias = Annotated[list[Annotated[int, Field(ge=-1)]], Field(max_length=MAX_RANK)]
Count: TypeAlias = Annotated[int, Field(ge=0)]
Uint64: TypeAlias = Annotated[int, Field(ge=0, le=2**64 - 1), _WHOLE]

# --- errors ------------------------------------------------------------------------------------------------------


class Error(Answer):
    """The error body of every path outside ``/api``."""

    error: str = Field(min_length=1)
    code: str
    request_id: RequestId


class Problem(Answer):
    """The error body under ``/api``. Source: RFC 9457."""

    type: Annotated[str, Field(pattern=r"^urn:inferway:error:[a-z_]+$")]
    title: str = Field(min_length=1)
    status: int = Field(ge=400, le=599)
    detail: str = Field(min_length=1)
    code: str
    request_id: RequestId


# --- server and models -------------------------------------------------------------------------------------------


class ServerLive(Answer):
    live: Literal[True] = True


class ServerReady(Answer):
    """``live`` stands beside ``ready`` because the protocol's text names the one and its schema the other."""

    live: Literal[True] = True
    ready: bool


class ServerNotReady(Error):
    """The 503 of the readiness route: an error that also says what the 200 says."""

    live: Literal[True] = True
    ready: Literal[False] = False


class ServerMetadata(Answer):
    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    extensions: list[str]


class ModelList(Answer):
    models: list[ModelName]


class ModelReady(Answer):
    name: ModelName
    ready: bool


class ModelNotReady(Error):
    """The 503 of a model's readiness route: an error that also says what the 200 says."""

    name: ModelName
    ready: Literal[False] = False


class TensorMetadata(Answer):
    """An input or output of a signature; in ``shape`` -1 is a variable dimension."""

    name: TensorName
    datatype: str
    shape: Dims
    optional: bool = False


class ModelMetadata(Answer):
    """A signature. ``properties`` always has ``row_exact`` ("true" or "false") and ``row_exactness``."""

    name: ModelName
    versions: list[VersionText]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    properties: dict[str, str]


class ModelConfigTensor(Answer):
    name: TensorName
    data_type: str
    dims: Dims
    reshape: dict[str, list[int]] | None = None
    label_filename: str = ""
    optional: bool = False


class CostPoint(Answer):
    rows: int = Field(ge=1)
    seconds: float = Field(ge=0)


class TrialRow(Answer):
    options: str
    rows: int = Field(ge=1)
    seconds: float = Field(ge=0)
    chosen: bool
    note: str


class ModelConfigInferway(Answer):
    """What the gateway derived and measured when it loaded the version."""

    version: VersionText
    row_exactness: str
    batching: bool
    isolation: str
    inline_max_elements: Count
    execution_providers: list[str]
    load_seconds: float = Field(ge=0)
    cost: list[CostPoint]
    trial: list[TrialRow]
    note: str


class ModelConfig(Answer):
    """Triton's ModelConfig in JSON, as far as this gateway acts on it, and the member ``inferway``."""

    name: ModelName
    platform: str
    backend: str = ""
    default_model_filename: str = ""
    max_batch_size: Count
    version_policy: dict[str, Any]
    input: list[ModelConfigTensor]
    output: list[ModelConfigTensor]
    instance_group: list[dict[str, Any]]
    dynamic_batching: dict[str, Any] | None = None
    model_warmup: list[dict[str, Any]] = []
    parameters: dict[str, dict[str, Any]] = {}
    inferway: ModelConfigInferway


# --- statistics --------------------------------------------------------------------------------------------------


class Duration(Answer):
    """How often something happened, and how many nanoseconds it took in all."""

    count: Count
    ns: Count


class InferenceStats(Answer):
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStats(Answer):
    batch_size: int = Field(ge=1)
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class MemoryUsage(Answer):
    type: str
    id: Count
    byte_size: Count


class ModelStat(Answer):
    """``last_inference`` is milliseconds since the epoch, 0 for never; ``inference_count`` counts rows."""

    name: ModelName
    version: VersionText
    last_inference: Count
    inference_count: Count
    execution_count: Count
    inference_stats: InferenceStats
    response_stats: dict[str, Any]
    batch_stats: list[BatchStats]
    memory_usage: list[MemoryUsage]


class ModelStats(Answer):
    model_stats: list[ModelStat]


# --- repository --------------------------------------------------------------------------------------------------


class RepositoryIndexRequest(Lenient):
    ready: StrictBool = False


class RepositoryIndexEntry(Answer):
    """``version`` is empty where the model has none."""

    name: ModelName
    version: Annotated[str, Field(pattern=r"^[0-9]*$")]
    state: str
    reason: str


class LoadParameters(Lenient):
    """``config`` is a model configuration in Triton's JSON form, in the place of the model's ``config.pbtxt``; the
    protocol's ``file:...`` is answered with 501."""

    config: str | None = None


class LoadRequest(Lenient):
    parameters: LoadParameters | None = None


class LoadResult(Answer):
    name: ModelName
    load: Literal[True] = True


class UnloadParameters(Lenient):
    """``unload_dependents`` has no effect, since no model depends on another."""

    unload_dependents: StrictBool = False


class UnloadRequest(Lenient):
    parameters: UnloadParameters | None = None


class UnloadResult(Answer):
    name: ModelName
    unload: Literal[True] = True


# --- inference ---------------------------------------------------------------------------------------------------


class InputParameters(Lenient):
    binary_data_size: Annotated[int, Field(ge=0, le=BODY_LIMIT_BYTES), _WHOLE] | None = None


class OutputParameters(Lenient):
    binary_data: StrictBool = False
    classification: Annotated[int, Field(ge=1), _WHOLE] | None = None


class RequestParameters(Lenient):
    """``timeout`` is microseconds in the queue; ``priority`` 1 is first, 0 the model's default."""

    priority: Uint64 = 0
    timeout: Uint64 = 0
    binary_data_output: StrictBool = False


Shape: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, le=MAX_DIM), _WHOLE]], Field(max_length=MAX_RANK)]


class InputTensor(Lenient):
    """Exactly one of ``data`` and ``parameters.binary_data_size`` is there."""

    name: TensorName
    datatype: Datatype
    shape: Shape
    parameters: InputParameters | None = None
    data: list[Any] | None = None


class RequestedOutput(Lenient):
    name: TensorName
    parameters: OutputParameters | None = None


class InferenceRequest(Lenient):
    """The JSON part of an inference request."""

    id: StrictStr | None = None
    parameters: RequestParameters | None = None
    inputs: list[InputTensor]
    outputs: list[RequestedOutput] | None = None


class OutputTensor(Answer):
    """Either ``data`` or ``parameters["binary_data_size"]`` is there; ``data`` is flat, in row-major order."""

    name: TensorName
    datatype: str
    shape: Shape
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class InferenceResponse(Answer):
    """The JSON part of an inference response."""

    model_name: ModelName
    model_version: VersionText
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[OutputTensor]


# --- keys --------------------------------------------------------------------------------------------------------

KeyId: TypeAlias = Annotated[str, Field(pattern=r"^[0-9A-Za-z]{12}$")]
ApiKey: TypeAlias = Annotated[str, Field(pattern=r"^ifw_(live|test|adm)_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}$")]
KeyName: TypeAlias = Annotated[
    StrictStr, Field(min_length=1, max_length=KEY_NAME_MAX_LENGTH, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")
]
Scopes: TypeAlias = Annotated[list[Scope], Field(min_length=1, max_length=4), AfterValidator(_distinct)]
ModelGlobs: TypeAlias = Annotated[
    list[Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._*?\[\]!-]{1,128}$")]],
    Field(min_length=1, max_length=KEY_MODELS_MAX_ITEMS),
]


class KeyCreate(Strict):
    """What a new key may do.

    ``expires_in_s`` is its life; None is for ever, and left out (see ``model_fields_set``) for ever too, or 90 days
    with the scope ``admin``.
    """

    name: KeyName
    scopes: Scopes
    models: ModelGlobs = ["*"]
    environment: Environment = "live"
    expires_in_s: Annotated[int, Field(ge=1, le=KEY_MAX_EXPIRES_IN_S), _WHOLE] | None = None


class KeyRecord(Answer):
    """What is kept of a key; times are aware, in UTC. ``replaced_by`` is the id of its successor by rotation."""

    id: KeyId
    name: KeyName
    environment: str
    scopes: Annotated[list[str], Field(min_length=1, max_length=4)]
    models: ModelGlobs
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None
    replaced_by: KeyId | None


class KeyCreated(KeyRecord):
    """A record and the key itself, which is shown here and never again. Its repr hides the key."""

    key: ApiKey = Field(repr=False)


class KeyRotate(Strict):
    overlap_s: Annotated[int, Field(ge=0, le=KEY_MAX_OVERLAP_S), _WHOLE] = KEY_DEFAULT_OVERLAP_S


class KeyRotated(KeyCreated):
    """The new key with its record, and in ``replaced`` the record of the old one with its new expiry."""

    replaced: KeyRecord


class KeyList(Answer):
    """A page of records, newest first; ``next_cursor`` is None on the last page."""

    data: Annotated[list[KeyRecord], Field(max_length=KEY_LIST_MAX_LIMIT)]
    next_cursor: Annotated[str, Field(max_length=KEY_CURSOR_MAX_LENGTH)] | None


# --- the life of deployed models ---------------------------------------------------------------------------------

DIGEST: Final = r"^[0-9a-f]{64}$"
ALIAS: Final = r"^[a-z][a-z0-9-]{0,62}$"
FILE_PATH: Final = r"^[A-Za-z0-9_][A-Za-z0-9._+@=,: -]*(/[A-Za-z0-9_][A-Za-z0-9._+@=,: -]*)*$"
LABEL: Final = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$"

Digest: TypeAlias = Annotated[str, Field(pattern=DIGEST)]
DeploymentId: TypeAlias = Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,64}$")]
AliasName: TypeAlias = Annotated[StrictStr, Field(pattern=ALIAS)]
VersionNumber: TypeAlias = Annotated[int, Field(ge=1, le=MAX_VERSION), _WHOLE]
FilePath: TypeAlias = Annotated[StrictStr, Field(max_length=FILE_PATH_MAX_LENGTH, pattern=FILE_PATH)]
Labels: TypeAlias = Annotated[
    dict[
        Annotated[StrictStr, Field(pattern=LABEL)],
        Annotated[StrictStr, Field(max_length=LABEL_MAX_LENGTH)],
    ],
    Field(max_length=LABELS_MAX_ITEMS),
]
Metadata: TypeAlias = Annotated[dict[str, Any], Field(max_length=METADATA_MAX_ITEMS)]
_NUMBER = BeforeValidator(_number)
Weights: TypeAlias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,9}$")], Annotated[float, Field(ge=0, le=100), _NUMBER]],
    Field(min_length=1, max_length=ALIAS_WEIGHTS_MAX_ITEMS),
]
Sticky: TypeAlias = Annotated[StrictStr, Field(pattern=r"^(none|key|header:[A-Za-z0-9-]{1,64})$")]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1), _NUMBER]
Tolerance: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False), _NUMBER]


class BlobStatus(Answer):
    """``size`` is None where an upload that is not complete has not said how long it will be."""

    digest: Digest
    size: Count | None
    received: Count
    complete: bool


class UploadConflict(Problem):
    """The 409 of an upload: ``received`` is the byte to go on from."""

    received: Count | None = None


class FileRef(Strict):
    """One file of a version that is to be deployed; its blob has been uploaded. ``size`` is in bytes."""

    path: FilePath
    digest: Digest
    size: Annotated[int, Field(ge=0, le=UPLOAD_LIMIT_BYTES), _WHOLE]


class VersionCreate(Strict):
    """What a deployment asks for. ``version`` None is the next number, ``alias`` None moves none."""

    files: Annotated[list[FileRef], Field(min_length=1, max_length=VERSION_FILES_MAX_ITEMS)]
    version: VersionNumber | None = None
    config: dict[str, Any] = {}
    isolation: Isolation | None = None
    labels: Labels = {}
    metadata: Metadata = {}
    alias: AliasName | None = DEFAULT_ALIAS
    pinned: StrictBool = False


class VersionChange(Strict):
    """What is beside a version's content; None leaves it as it is."""

    labels: Labels | None = None
    metadata: Metadata | None = None
    pinned: StrictBool | None = None


class VersionFile(Answer):
    path: str = Field(min_length=1)
    digest: Digest
    size: Count


class Footprint(Answer):
    """Bytes, as measured when the version was deployed: after warm-up, and at its largest batch."""

    resident_bytes: Count
    peak_bytes: Count


class ModelVersion(Answer):
    """One version. Of one in the operator's repository, ``digest``, ``created_at`` and ``created_by`` are None."""

    model: ModelName
    version: VersionNumber
    kind: str
    digest: Digest | None
    files: list[VersionFile]
    config: dict[str, Any]
    isolation: str
    labels: Labels
    metadata: Metadata
    pinned: bool
    footprint: Footprint | None
    state: str
    reason: str
    created_at: datetime | None
    created_by: str | None


class DeploymentFailure(Answer):
    code: str
    message: str


class Deployment(Answer):
    """One attempt to bring a version into service. ``step`` is the last one that is done, None before the first."""

    id: DeploymentId
    model: ModelName
    version: VersionNumber
    digest: Digest
    state: str
    step: str | None
    failed_step: str | None
    error: DeploymentFailure | None
    reused: bool
    alias: AliasName | None
    created_at: datetime
    created_by: str
    updated_at: datetime


class DeploymentList(Answer):
    """Youngest first."""

    deployments: Annotated[list[Deployment], Field(max_length=LIST_MAX_LIMIT)]


class ShadowPut(Strict):
    """``share`` of the requests, 0 to 1, go to ``version`` too."""

    version: VersionNumber
    share: Share = 1.0
    rtol: Tolerance = 1e-3
    atol: Tolerance = 1e-5


class GuardPut(Strict):
    """When the lesser targets of an alias go back to no traffic."""

    window_s: Annotated[float, Field(ge=2, le=86_400), _NUMBER] = 60.0
    min_requests: Annotated[int, Field(ge=1, le=1_000_000), _WHOLE] = 50
    max_error_rate: Share = 0.02
    max_p95_ratio: Annotated[float, Field(ge=1, le=1000), _NUMBER] = 2.0


class AliasPut(Strict):
    """Where an alias is to point: exactly one of ``version`` and ``weights`` (percent, which sum to 100)."""

    version: VersionNumber | None = None
    weights: Weights | None = None
    sticky: Sticky = "none"
    shadow: ShadowPut | None = None
    fallback: Annotated[list[VersionNumber], Field(max_length=ALIAS_FALLBACK_MAX_ITEMS)] = []
    guard: GuardPut | None = None
    expected_revision: Annotated[int, Field(ge=0), _WHOLE] | None = None


class Shadow(Answer):
    version: VersionNumber
    share: Share
    rtol: Tolerance
    atol: Tolerance


class Guard(Answer):
    window_s: Annotated[float, Field(ge=2, le=86_400), _NUMBER]
    min_requests: Annotated[int, Field(ge=1, le=1_000_000)]
    max_error_rate: Share
    max_p95_ratio: Annotated[float, Field(ge=1, le=1000), _NUMBER]


class AliasTarget(Answer):
    """Where an alias points, or pointed; ``weights`` is version to percent."""

    weights: Weights
    sticky: Sticky
    shadow: Shadow | None
    fallback: list[VersionNumber]
    guard: Guard | None


class AliasTraffic(Answer):
    """What the gateway process that answers saw of one version through the alias, since it started.

    ``p95_ms`` is over the guard's window; ``compared`` and what follows is about the copies that it got as a shadow.
    """

    requests: Count
    errors: Count
    fallbacks: Count
    p95_ms: Annotated[float, Field(ge=0)] | None
    compared: Count
    differed: Count
    failed: Count
    dropped: Count
    largest_difference: Annotated[float, Field(ge=0)]


class Alias(AliasTarget):
    """``previous`` is what a roll back would swap it with; ``traffic`` is by version."""

    model: ModelName
    alias: AliasName
    previous: AliasTarget | None
    revision: int = Field(ge=1)
    updated_at: datetime
    updated_by: str
    traffic: dict[str, AliasTraffic]


class AliasList(Answer):
    aliases: list[Alias]


class CatalogModel(Answer):
    """``source`` is catalog for what was deployed, repository for what the operator put there."""

    name: ModelName
    source: str
    versions: list[ModelVersion]
    aliases: list[Alias]


class CatalogModelList(Answer):
    models: list[CatalogModel]


class Event(Answer):
    """Who did what, when; ``by`` is a key's id, ``gateway`` or ``anonymous``."""

    id: int = Field(ge=1)
    at: datetime
    kind: str
    model: ModelName
    version: VersionNumber | None
    alias: str | None
    by: str
    detail: dict[str, Any]


class EventList(Answer):
    """Youngest first; older ones come with ``before`` and the last id."""

    events: Annotated[list[Event], Field(max_length=LIST_MAX_LIMIT)]
    has_more: bool


class GarbageReport(Answer):
    """Blobs that were removed, and the bytes they took."""

    removed: Count
    freed_bytes: Count


class RegistryProblem(Answer):
    """``versions`` are those that have the blob, as ``MODEL/VERSION``."""

    digest: Digest
    problem: str
    versions: list[str]


class RegistryReport(Answer):
    checked: Count
    ok: bool
    problems: list[RegistryProblem]


# --- text, in the shape of OpenAI's clients ----------------------------------------------------------------------


def _kind(value: object) -> str:
    """Which member of a union a value is meant as."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        if any(isinstance(item, list) for item in value):
            return "token lists"
        return "tokens" if any(isinstance(item, int | float) for item in value) else "texts"
    return "none" if value is None else "object"


ModelReference: TypeAlias = Annotated[StrictStr, Field(min_length=1, max_length=MODEL_REFERENCE_MAX_LENGTH)]
"""``NAME``, ``NAME@ALIAS`` or ``NAME/versions/3``, and ``:ADAPTER`` after it."""
_NUMBER = BeforeValidator(_number)
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1), _NUMBER]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2), _NUMBER]
Tokens: TypeAlias = Annotated[int, Field(ge=1), _WHOLE]
TokenIds: TypeAlias = list[Annotated[int, Field(ge=0, le=2**31 - 1), _WHOLE]]
StopStrings: TypeAlias = Annotated[list[Annotated[StrictStr, Field(min_length=1)]], Field(max_length=STOP_MAX_ITEMS)]
TextOrTokens: TypeAlias = Annotated[
    Annotated[StrictStr, Tag("text")]
    | Annotated[list[StrictStr], Field(min_length=1, max_length=EMBEDDING_INPUTS_MAX_ITEMS), Tag("texts")]
    | Annotated[TokenIds, Field(min_length=1), Tag("tokens")]
    | Annotated[
        list[Annotated[TokenIds, Field(min_length=1)]],
        Field(min_length=1, max_length=EMBEDDING_INPUTS_MAX_ITEMS),
        Tag("token lists"),
    ],
    Discriminator(
        _kind,
        custom_error_type="text_or_tokens",
        custom_error_message="expected a text, texts, token ids or lists of token ids",
    ),
    WithJsonSchema({}),
]


class OpenAIErrorDetail(Answer):
    """``param`` is the member of the request that it is about, such as ``messages[2].content``."""

    message: str = Field(min_length=1)
    type: str
    param: str | None
    code: str


class OpenAIError(Answer):
    """The error body under ``/v1``: OpenAI's, with the members of RFC 9457 beside it."""

    error: OpenAIErrorDetail
    type: Annotated[str, Field(pattern=r"^urn:inferway:error:[a-z_]+$")]
    title: str = Field(min_length=1)
    status: int = Field(ge=400, le=599)
    detail: str = Field(min_length=1)
    code: str
    request_id: RequestId


class StreamOptions(Lenient):
    include_usage: StrictBool | None = None


class JsonSchemaFormat(Lenient):
    """``schema`` is kept as it came; what it may say, the gateway's constraints decide."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | StrictBool | None = Field(
        default=None, alias="schema", json_schema_extra={"anyOf": [{"type": "object"}, {"type": "null"}]}
    )
    strict: StrictBool | None = None


class ResponseFormat(Lenient):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class GenerationOptions(Lenient):
    """What chat and completions have in common. An explicit null is as good as absent everywhere."""

    model: ModelReference
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2), _NUMBER] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=-1), _WHOLE] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100), _NUMBER] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), _WHOLE] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100), _NUMBER]],
            Field(max_length=LOGIT_BIAS_MAX_ITEMS),
        ]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX), _WHOLE] | None = None
    stop: Annotated[
        Annotated[StrictStr, Field(min_length=1), Tag("text")]
        | Annotated[StopStrings, Tag("texts")]
        | Annotated[None, Tag("none")],
        Discriminator(
            lambda value: "texts" if isinstance(value, list) else _kind(value),
            custom_error_type="stop",
            custom_error_message="expected a text or a list of texts",
        ),
        WithJsonSchema({}),
    ] = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: Annotated[dict[str, Any] | StrictBool | StrictStr | None, WithJsonSchema({})] = None
    guided_regex: Annotated[StrictStr, Field(min_length=1)] | None = None
    guided_choice: Annotated[list[StrictStr], Field(min_length=1)] | None = None
    guided_grammar: Annotated[StrictStr, Field(min_length=1)] | None = None
    ignore_eos: StrictBool | None = None
    priority: Annotated[int, Field(ge=0, le=1_000_000), _WHOLE] | None = None
    user: StrictStr | None = None


class FunctionCall(Lenient):
    name: StrictStr
    arguments: StrictStr


class ToolCall(Lenient):
    """A call that the model made earlier, as it was told. ``arguments`` is JSON in a text."""

    id: StrictStr | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ContentPart(Lenient):
    """A text model takes parts of type ``text``, and ``refusal`` where it repeats an answer."""

    type: StrictStr
    text: StrictStr | None = None
    refusal: StrictStr | None = None


class ChatMessage(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[StrictStr, Tag("text")]
        | Annotated[list[ContentPart], Field(min_length=1), Tag("parts")]
        | Annotated[None, Tag("none")],
        Discriminator(
            lambda value: "parts" if isinstance(value, list) else _kind(value),
            custom_error_type="content",
            custom_error_message="expected a text or a list of parts",
        ),
        WithJsonSchema({}),
    ] = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None
    refusal: StrictStr | None = None


class FunctionDefinition(Lenient):
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class FunctionTool(Lenient):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Lenient):
    name: StrictStr


class NamedToolChoice(Lenient):
    type: Literal["function"]
    function: FunctionName


class ChatCompletionRequest(GenerationOptions):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MESSAGES_MAX_ITEMS)]
    max_completion_tokens: Tokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX), _WHOLE] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=TOOLS_MAX_ITEMS)] | None = None
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], Tag("text")]
        | Annotated[NamedToolChoice, Tag("object")]
        | Annotated[None, Tag("none")],
        Discriminator(
            _kind,
            custom_error_type="tool_choice",
            custom_error_message="expected 'none', 'auto', 'required' or a function by its name",
        ),
        WithJsonSchema({}),
    ] = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(GenerationOptions):
    prompt: TextOrTokens
    echo: StrictBool | None = None
    suffix: StrictStr | None = None
    best_of: Annotated[int, Field(ge=1, le=CHOICES_MAX), _WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX), _WHOLE] | None = None


class PromptTokensDetails(Answer):
    cached_tokens: Count


class CompletionUsage(Answer):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails | None = None


class TopLogprob(Answer):
    """``token`` is lossy where the token is no whole character; ``bytes`` are its own."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Answer):
    content: list[TokenLogprobs] | None
    refusal: None = None


class AnsweredFunctionCall(Answer):
    name: str
    arguments: str


class AnsweredToolCall(Answer):
    id: str
    type: str
    function: AnsweredFunctionCall


class AssistantMessage(Answer):
    role: str
    content: str | None
    refusal: str | None = None
    tool_calls: list[AnsweredToolCall] | None = None


class ChatChoice(Answer):
    index: Count
    message: AssistantMessage
    finish_reason: str
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(Answer):
    """An answer. A model on another server may not tell its usage."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str | None = None


class FunctionCallDelta(Answer):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Answer):
    """``id``, ``type`` and the name come with the first delta of an index, then the arguments' text in pieces."""

    index: Count
    id: str | None = None
    type: str | None = None
    function: FunctionCallDelta | None = None


class ChatDelta(Answer):
    role: str | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    index: Count
    delta: ChatDelta
    finish_reason: str | None
    logprobs: ChoiceLogprobs | None = None


class ChatCompletionChunk(Answer):
    """One event of a stream. ``choices`` is empty in the one that has the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str | None = None


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    index: Count
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None


class Completion(Answer):
    """An answer, and one event of a stream; ``usage`` is in the whole answer and in the last event where asked for."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str | None = None


class OpenAIModel(Answer):
    """A name that requests under ``/v1`` may have as their ``model``.

    Attributes:
        task: generate, embeddings, classify or rerank; None for a model that takes tensors alone.
        max_model_len: tokens of prompt and answer together.
        parent: the model whose adapter it is.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    task: str | None = None
    max_model_len: int | None = None
    parent: str | None = None


class OpenAIModelList(Answer):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class EmbeddingsRequest(Lenient):
    model: ModelReference
    input: TextOrTokens
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1), _WHOLE] | None = None
    input_type: Annotated[StrictStr, Field(max_length=64)] | None = None
    user: StrictStr | None = None


class EncodingUsage(Answer):
    prompt_tokens: Count
    total_tokens: Count


class Embedding(Answer):
    """``embedding`` is numbers, or base64 of little-endian FP32."""

    object: Literal["embedding"] = "embedding"
    index: Count
    embedding: Annotated[list[float] | str, WithJsonSchema({})]


class EmbeddingList(Answer):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EncodingUsage


class RerankDocument(Lenient):
    text: StrictStr


class RerankRequest(Lenient):
    model: ModelReference
    query: Annotated[StrictStr, Field(min_length=1)]
    documents: Annotated[
        list[Annotated[StrictStr | RerankDocument, WithJsonSchema({})]],
        Field(min_length=1, max_length=RERANK_DOCUMENTS_MAX_ITEMS),
    ]
    top_n: Annotated[int, Field(ge=1), _WHOLE] | None = None
    return_documents: StrictBool | None = None


class RankedDocument(Answer):
    text: str


class RankedResult(Answer):
    index: Count
    relevance_score: float
    document: RankedDocument | None = None


class RerankAnswer(Answer):
    """``results`` by falling score; ``method`` is cross-encoder or embedding."""

    id: str
    object: Literal["list"] = "list"
    model: str
    method: str
    results: list[RankedResult]
    usage: EncodingUsage


class ClassifyRequest(Lenient):
    model: ModelReference
    input: TextOrTokens
    top_k: Annotated[int, Field(ge=1), _WHOLE] | None = None
    activation: Literal["softmax", "sigmoid", "none"] | None = None
    user: StrictStr | None = None


class LabelScore(Answer):
    label: str
    score: float


class Classification(Answer):
    """``scores`` by falling score; ``label`` and ``score`` are the first of them."""

    object: Literal["classification"] = "classification"
    index: Count
    label: str
    score: float
    scores: list[LabelScore]


class ClassificationList(Answer):
    id: str
    object: Literal["list"] = "list"
    model: str
    data: list[Classification]
    usage: EncodingUsage
