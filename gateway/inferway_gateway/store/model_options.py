"""``inferway.toml``: what the gateway offers for one model and Triton's configuration has no word for.

The file is strict. A member it does not know is an error that lists those it knows, because a setting that is spelled
wrong and silently has no effect is found in production.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, field_validator

from ..core.chat_formats import FORMATS
from ..core.model_config import ModelConfig, PaddingAxis, TextOptions
from .toml_text import parse_toml
from .triton_config import ConfigError

Axis = Annotated[int, Field(ge=1, le=31)]
"""A dimension of a tensor, axis 0 being the batch's and never padded."""

ProviderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]+ExecutionProvider$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PaddingOptions(_Strict):
    """``[[batching.padding]]``: one variable axis along which requests of different lengths may share a batch."""

    inputs: dict[str, Axis] = Field(min_length=1)
    outputs: dict[str, Axis] = {}
    fill: dict[str, float] = {}
    buckets: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    max_waste: Annotated[float, Field(ge=0, le=1)] = 0.25

    @field_validator("buckets")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must be ascending, none twice")
        return value

    @field_validator("fill")
    @classmethod
    def _fills_inputs(cls, value: dict[str, float], info: Any) -> dict[str, float]:
        unknown = sorted(set(value) - set(info.data.get("inputs", value)))
        if unknown:
            raise ValueError(f"names {unknown}, which is not among inputs")
        return value


class BatchingOptions(_Strict):
    """``[batching]``.

    Attributes:
        enabled: true vouches for rows that depend on their mates, such as a dynamically quantised model's; false
            never puts requests together; not said leaves it to what the load-time probe finds.
        row_exact: true runs a lone row with a copy of itself where the model needs company for the same bits, false
            never does; not said does it where the copy costs little.
        max_queue_rows, max_queue_bytes: how much may wait before requests are refused.
    """

    enabled: bool | None = None
    row_exact: bool | None = None
    max_queue_rows: PositiveInt | None = None
    max_queue_bytes: PositiveInt | None = None
    padding: Annotated[tuple[PaddingOptions, ...], Field(strict=False)] = ()


class SessionOptionsTable(_Strict):
    """``[session]``.

    Attributes:
        providers: execution providers in order of preference, in place of the gateway's.
        intra_op_threads: threads inside one run.
        disabled_optimizers: graph optimisers of ONNX Runtime to leave out.
        trial: false opens the session as said here, without trying alternatives and without timing runs; whether rows
            may share a run is found out all the same.
        inline: true or false decides whether runs happen on the event loop, in place of the measurement.
        extensions: true lets the model use operators of onnxruntime-extensions. For deployed models the gateway's
            setting ``extensions_models`` decides, whatever is said here.
    """

    providers: Annotated[tuple[ProviderName, ...] | None, Field(strict=False)] = None
    intra_op_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    disabled_optimizers: Annotated[tuple[str, ...] | None, Field(strict=False)] = None
    trial: bool | None = None
    inline: bool | None = None
    extensions: bool | None = None


class TextTable(_Strict):
    """``[text]``: a text encoder, that is a graph over token ids with a ``tokenizer.json`` beside it.

    What sentence-transformers' own files beside the graph say need not be said again.

    Attributes:
        task: embeddings, classify or rerank.
        output: the graph's output that is read.
        pooling: how one vector comes of one for each token; none where the graph does that.
        normalise: true brings vectors to length 1.
        max_tokens: of one text, special tokens counted.
        long_text: what happens to a longer text: error refuses it, truncate cuts its end off, chunk embeds it in parts
            and takes the mean, weighted by their tokens.
        dimensions: lengths to which callers may have a vector cut, for models that were trained for it; "any" allows
            each.
        labels: names of the classes, in the order of the output.
        multi_label: true gives each label a probability of its own.
        activation: softmax, sigmoid or none, applied to the logits.
        prompts: kind of input, such as query and document, to what is put before the text.
    """

    task: Literal["embeddings", "classify", "rerank"] | None = None
    output: Annotated[str, Field(min_length=1)] | None = None
    pooling: Literal["mean", "cls", "last", "max", "none"] | None = None
    normalise: bool | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    long_text: Literal["error", "truncate", "chunk"] | None = None
    dimensions: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] | Literal["any"] | None = None
    labels: Annotated[tuple[str, ...], Field(strict=False, max_length=65_536)] = ()
    multi_label: bool | None = None
    activation: Literal["softmax", "sigmoid", "none"] | None = None
    prompts: Annotated[dict[str, str], Field(max_length=64)] = {}

    @field_validator("labels")
    @classmethod
    def _different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("must be different from each other")
        return value


class GenerationTable(_Strict):
    """``[generation]``, of language models.

    Attributes:
        kv_cache_bytes: memory for keys and values of all answers together, and of prompts that are remembered.
        max_sequences: answers that are written at once.
        max_waiting: requests that may wait for a place among them; more are refused.
        wait_s: how long one may wait.
        max_tokens: of an answer whose request does not say how long it may be.
        temperature, top_p, top_k: of requests that do not say.
        template: name of a well-known format of conversations, in place of the model's own template.
    """

    kv_cache_bytes: PositiveInt | None = None
    max_sequences: Annotated[int, Field(ge=1, le=256)] | None = None
    max_waiting: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    wait_s: PositiveFloat | None = None
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    template: str | None = None

    @field_validator("template")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in FORMATS:
            raise ValueError(f"must be one of {', '.join(sorted(FORMATS))}")
        return value


class ModelOptions(_Strict):
    """The whole file.

    Attributes:
        run_timeout_s: a run that takes longer is ended.
        instances: runs of the model that may happen at once; with isolation, processes that it has.
        isolation: worker runs the model in processes of its own, inprocess in the gateway's. For models of the folder:
            where deployed ones run is said when they are deployed.
        max_batch_size: rows of one run at most; 0 says that there is no batch axis.
    """

    run_timeout_s: PositiveFloat | None = None
    instances: Annotated[int, Field(ge=1, le=1024)] | None = None
    isolation: Literal["worker", "inprocess"] | None = None
    max_batch_size: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    batching: BatchingOptions = BatchingOptions()
    session: SessionOptionsTable = SessionOptionsTable()
    generation: GenerationTable = GenerationTable()
    text: TextTable | None = None


_TABLES: Final[dict[tuple[str, ...], type[BaseModel]]] = {
    (): ModelOptions,
    ("batching",): BatchingOptions,
    ("batching", "padding"): PaddingOptions,
    ("session",): SessionOptionsTable,
    ("generation",): GenerationTable,
    ("text",): TextTable,
}


def parse_options(text: str) -> ModelOptions:
    """Read ``inferway.toml``.

    Raises:
        ConfigError: the text is not TOML, or a member is unknown or has a wrong type or value; names the member.
    """
    return validate_options(parse_toml(text))


def validate_options(members: Mapping[str, Any]) -> ModelOptions:
    """The options that members of ``inferway.toml`` give, wherever they come from; as ``parse_options``."""
    try:
        return ModelOptions.model_validate(members)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(detail) for detail in error.errors(include_url=False))) from None


def merge_options(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Members of ``inferway.toml`` with others put over them: tables member by member, everything else as a whole."""
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[name] = merge_options(under, value) if both else value  # type: ignore[arg-type]  # both are mappings
    return merged


def _explain(detail: Any) -> str:
    path = tuple(part for part in detail["loc"] if isinstance(part, str))
    where = ".".join(str(part) for part in detail["loc"])
    table = _TABLES.get(path[:-1])
    if detail["type"] == "extra_forbidden" and table is not None:
        text = f"{where} is not known, expected one of {', '.join(table.model_fields)}"
        homes = [".".join((*home, path[-1])) for home, other in _TABLES.items() if path[-1] in other.model_fields]
        return f"{text}; did you mean {' or '.join(homes)}?" if homes else text
    return f"{where}: {detail['msg'].removeprefix('Value error, ')}"


def apply_options(config: ModelConfig, options: ModelOptions) -> ModelConfig:
    """``config`` with what ``options`` says put over it; what they do not say stays."""
    batching = options.batching
    return replace(
        config,
        **_said(options, "run_timeout_s", "instances", "isolation", "max_batch_size"),
        text=config.text if options.text is None else TextOptions(**options.text.model_dump()),
        batching=replace(
            config.batching,
            **_said(batching, "enabled", "row_exact", "max_queue_rows", "max_queue_bytes"),
            padding=tuple(PaddingAxis(**padding.model_dump()) for padding in batching.padding),
        ),
        session=replace(
            config.session,
            **_said(
                options.session, "providers", "intra_op_threads", "disabled_optimizers", "trial", "inline", "extensions"
            ),
        ),
        generation=replace(config.generation, **_said(options.generation, *GenerationTable.model_fields)),
    )


def _said(table: BaseModel, *names: str) -> dict[str, Any]:
    return {name: getattr(table, name) for name in names if getattr(table, name) is not None}
