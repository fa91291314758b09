"""``remote.toml`` and ``pipeline.toml``: model versions without a model file of their own.

    upstream = "triton-a"                       [[steps]]
    model = "resnet"                            name = "tokenise"
                                                model = "tokeniser@stable"
                                                inputs = { text = "text" }

Like ``inferway.toml`` both are strict: a member that is not known is an error that names it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from ..core.pipeline import MAX_STEPS, PipelineSpec, StepSpec, StepTarget
from ..core.tensors import DTYPES, MAX_RANK, TensorSpec
from ..core.upstream import Operation, RemoteSpec, has_dots
from .toml_text import parse_toml
from .triton_config import ConfigError

REMOTE_FILE: Final = "remote.toml"
PIPELINE_FILE: Final = "pipeline.toml"
ENSEMBLE_FILE: Final = "config.pbtxt"
"""Stands for the model of an ensemble, whose version's folders are empty."""
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_TARGET: Final = rf"^{_NAME}(@[a-z][a-z0-9-]{{0,62}}|/versions/[1-9][0-9]{{0,17}})?$"
_Options = TypeVar("_Options", bound=BaseModel)
TensorName = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


MAX_PIPELINE_BYTES: Final = 128 * 1024
"""It is read while a request for its deployment waits."""


class RemoteOptions(_Strict):
    """The whole of ``remote.toml``; ``core.upstream.RemoteSpec`` says what each member is for."""

    upstream: Annotated[str, Field(min_length=1, max_length=64)]
    model: Annotated[str, Field(min_length=1, max_length=256)]
    version: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    operation: Operation = "infer"
    batched: bool | None = None
    dimensions: PositiveInt | None = None
    parameters: dict[str, Any] = {}

    @field_validator("model", "version")
    @classmethod
    def _stays_in_its_place(cls, value: str | None) -> str | None:
        # It stands in a path, and clients and proxies on the way resolve dots however they are escaped.
        if value is not None and (not value.isprintable() or has_dots(value)):
            raise ValueError("expected a name, without '.' or '..' between slashes, and of what can be printed")
        return value

    @field_validator("parameters")
    @classmethod
    def _is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        for reserved in ("model", "input", "messages", "prompt", "stream"):
            if reserved in value:
                raise ValueError(f"'{reserved}' is set by the gateway")
        if not _is_json(value):
            raise ValueError("expected what JSON has: no dates and times")
        return value


class TensorOptions(_Strict):
    """One of ``[[inputs]]`` of a pipeline."""

    name: TensorName
    datatype: str
    shape: Annotated[tuple[Annotated[int, Field(ge=-1)], ...], Field(strict=False, max_length=MAX_RANK)]

    @field_validator("datatype")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"expected one of {', '.join(DTYPES)}")
        return value


class StepOptions(_Strict):
    """One of ``[[steps]]``.

    Attributes:
        model: ``NAME``, ``NAME@ALIAS`` or ``NAME/versions/NUMBER``.
        inputs: each input of the model to what feeds it: an input of the pipeline, or ``STEP.OUTPUT``.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    model: Annotated[str, Field(pattern=_TARGET)]
    inputs: dict[TensorName, TensorName] = {}


class PipelineOptions(_Strict):
    """The whole of ``pipeline.toml``.

    Attributes:
        inputs: not said: derived from what the steps read and no step gives.
        outputs: output to ``STEP.OUTPUT``; not said: every output that no step reads.
    """

    inputs: Annotated[tuple[TensorOptions, ...] | None, Field(strict=False)] = None
    outputs: dict[TensorName, TensorName] | None = None
    steps: Annotated[tuple[StepOptions, ...], Field(strict=False, min_length=1, max_length=MAX_STEPS)]


def parse_remote(text: str) -> RemoteSpec:
    """Read ``remote.toml``.

    Raises:
        ConfigError: the text is not TOML, or a member is unknown or has a wrong type or value; names the member.
    """
    options = _validated(RemoteOptions, text)
    return RemoteSpec(**{name: getattr(options, name) for name in RemoteOptions.model_fields})


def parse_pipeline(text: str) -> PipelineSpec:
    """Read ``pipeline.toml``. Whether its names and types fit together is looked at when it is loaded.

    Raises:
        ConfigError: as ``parse_remote``, and where the text is larger than ``MAX_PIPELINE_BYTES``.
    """
    if len(text) > MAX_PIPELINE_BYTES:
        raise ConfigError(f"it is larger than the {MAX_PIPELINE_BYTES} bytes that a pipeline may take")
    options = _validated(PipelineOptions, text)
    return PipelineSpec(
        tuple(StepSpec(step.name, parse_step_target(step.model), dict(step.inputs)) for step in options.steps),
        None if options.inputs is None else tuple(TensorSpec(t.name, t.datatype, t.shape) for t in options.inputs),
        None if options.outputs is None else dict(options.outputs),
    )


def ensemble_pipeline(message: Any) -> PipelineSpec:
    """The pipeline that an ensemble of Triton is.

    An ensemble names the tensors between its steps, a pipeline the steps that they come from. Steps are called by their
    models, with a number where a model has several.

    Args:
        message: of ``triton_config.MODEL_CONFIG``, with ``ensemble_scheduling``.
    Raises:
        ConfigError: a tensor has two sources, a name or a map is missing, or a step is of another namespace.
    Source: Triton Inference Server, "Ensemble Models".
    """
    steps = message.ensemble_scheduling.step
    if not 0 < len(steps) <= MAX_STEPS:
        raise ConfigError(f"ensemble_scheduling must have 1 to {MAX_STEPS} steps, got {len(steps)}")
    names: list[str] = []
    sources = {tensor.name: tensor.name for tensor in message.input}
    for step in steps:
        if not re.fullmatch(_NAME, step.model_name):
            raise ConfigError("each step of ensemble_scheduling must name a model")
        if step.model_namespace:
            raise ConfigError("model_namespace of a step is not supported: a repository has one")
        base = re.sub(r"[^A-Za-z0-9_-]", "-", step.model_name)[:56]
        known = sum(name == base or name.startswith(f"{base}-step") for name in names)
        names.append(base if not known else f"{base}-step{known + 1}")
        for output in sorted(step.output_map):
            tensor = step.output_map[output]
            if tensor in sources:
                raise ConfigError(f"tensor '{tensor}' of the ensemble has two sources")
            sources[tensor] = f"{names[-1]}.{output}"
    made = []
    for name, step in zip(names, steps, strict=True):
        unknown = sorted(tensor for tensor in step.input_map.values() if tensor not in sources)
        if unknown:
            raise ConfigError(f"step '{name}' reads '{unknown[0]}', which is no input and which no step writes")
        target = StepTarget(step.model_name, version=step.model_version if step.model_version > 0 else None)
        made.append(StepSpec(name, target, {key: sources[step.input_map[key]] for key in sorted(step.input_map)}))
    unknown = sorted(tensor.name for tensor in message.output if tensor.name not in sources)
    if unknown or not len(message.output):
        raise ConfigError(f"output '{unknown[0] if unknown else ''}' of the ensemble is written by no step")
    return PipelineSpec(tuple(made), None, {tensor.name: sources[tensor.name] for tensor in message.output})


def parse_step_target(text: str) -> StepTarget:
    """``NAME``, ``NAME@ALIAS`` or ``NAME/versions/NUMBER``, checked before."""
    name, separator, version = text.partition("/versions/")
    if separator:
        return StepTarget(name, version=int(version))
    name, _, alias = text.partition("@")
    return StepTarget(name, alias or None)


def _validated(kind: type[_Options], text: str) -> _Options:
    try:
        return kind.model_validate(parse_toml(text))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(detail) for detail in error.errors(include_url=False))) from None


def _explain(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where} is not known"
    if detail["type"] == "string_pattern_mismatch" and where.endswith(".model"):
        return f"{where}: expected NAME, NAME@ALIAS or NAME/versions/NUMBER"
    return f"{where}: {detail['msg'].removeprefix('Value error, ')}"


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return isinstance(value, str | int | float | bool)
