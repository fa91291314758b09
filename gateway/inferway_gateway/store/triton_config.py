"""Triton's model configuration, as far as ONNX models use it: its schema, text and JSON forms, and what it means here.

The schema below has the names, numbers and types of ``model_config.proto`` for every part that can stand in the
configuration of an ONNX model; a test holds it against the schema that the Triton client carries. It is declared here
rather than generated, so that neither a compiler nor generated code of one certain protobuf release is needed.
Fields are ``optional`` in the sense of proto2, because "not said" and "0" differ for ``max_batch_size``: the first asks
to derive it from the graph, the second says that there is no batch axis.

Parts that the gateway cannot honour are refused, never ignored in silence; parts that only other hardware knows
(pinned memory, CUDA graphs) are read and have no effect; a field of a future release is reported and passed over.

Source: Triton Inference Server, "Model Configuration".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from ..core.model_config import (
    BatchPolicy,
    ModelConfig,
    QueuePolicy,
    SessionOptions,
    TensorConfig,
    VersionPolicy,
    Warmup,
    WarmupInput,
)
from ..core.tensors import Signature, TensorSpec

MAX_CONFIG_BYTES: Final = 1 << 20
"""A configuration is some kilobytes; protobuf text format is parsed in Python at about a megabyte a second."""

ENSEMBLE: Final = "ensemble"
"""The platform of a model that is a graph of others."""

_SCHEMA: Final = """
enum DataType: TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 TYPE_INT32
  TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16
enum Format: FORMAT_NONE FORMAT_NHWC FORMAT_NCHW
enum GroupKind: KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL
enum Priority: PRIORITY_DEFAULT PRIORITY_MAX PRIORITY_MIN
enum TimeoutAction: REJECT DELAY
message Reshape: 1 shape int64*
message Input: 1 name string, 2 data_type DataType, 3 format Format, 4 dims int64*, 5 reshape Reshape,
  6 is_shape_tensor bool, 7 allow_ragged_batch bool, 8 optional bool, 9 is_non_linear_format_io bool
message Output: 1 name string, 2 data_type DataType, 3 dims int64*, 5 reshape Reshape, 4 label_filename string,
  6 is_shape_tensor bool, 7 is_non_linear_format_io bool
message Latest: 1 num_versions uint32
message All:
message Specific: 1 versions int64*
message VersionPolicy: 1 latest Latest @policy_choice, 2 all All @policy_choice, 3 specific Specific @policy_choice
message Graph: 1 level int32
message PinnedMemory: 1 enable bool
message Accelerator: 1 name string, 2 parameters map:string
message Accelerators: 1 gpu_execution_accelerator Accelerator*, 2 cpu_execution_accelerator Accelerator*
message Cuda: 1 graphs bool, 2 busy_wait_events bool, 4 output_copy_stream bool
message Optimization: 1 graph Graph, 2 priority Priority, 3 cuda Cuda, 4 execution_accelerators Accelerators,
  5 input_pinned_memory PinnedMemory, 6 output_pinned_memory PinnedMemory, 7 gather_kernel_buffer_threshold uint32,
  8 eager_batching bool
message QueuePolicy: 1 timeout_action TimeoutAction, 2 default_timeout_microseconds uint64,
  3 allow_timeout_override bool, 4 max_queue_size uint32
message DynamicBatching: 1 preferred_batch_size int32*, 2 max_queue_delay_microseconds uint64, 3 preserve_ordering bool,
  4 priority_levels uint64, 5 default_priority_level uint64, 6 default_queue_policy QueuePolicy,
  7 priority_queue_policy map:uint64:QueuePolicy
message SequenceBatching:
message EnsembleStep: 1 model_name string, 2 model_version int64, 3 input_map map:string, 4 output_map map:string,
  5 model_namespace string
message Ensemble: 1 step EnsembleStep*
message BatchInput:
message BatchOutput:
message Resource: 1 name string, 2 global bool, 3 count uint32
message RateLimiter: 1 resources Resource*, 2 priority uint32
message SecondaryDevice:
message InstanceGroup: 1 name string, 4 kind GroupKind, 2 count int32, 6 rate_limiter RateLimiter, 3 gpus int32*,
  8 secondary_devices SecondaryDevice*, 5 profile string*, 7 passive bool, 9 host_policy string
message Parameter: 1 string_value string
message WarmupInput: 1 data_type DataType, 2 dims int64*, 3 zero_data bool @input_data_type,
  4 random_data bool @input_data_type, 5 input_data_file string @input_data_type
message Warmup: 1 name string, 2 batch_size uint32, 3 inputs map:WarmupInput, 4 count uint32
message Operations: 1 op_library_filename string*
message TransactionPolicy: 1 decoupled bool
message Agent: 1 name string, 2 parameters map:string
message Agents: 1 agents Agent*
message ResponseCache: 1 enable bool
message Metrics:
message ModelConfig: 1 name string, 2 platform string, 17 backend string, 25 runtime string,
  3 version_policy VersionPolicy, 4 max_batch_size int32, 5 input Input*, 6 output Output*,
  20 batch_input BatchInput*, 21 batch_output BatchOutput*, 12 optimization Optimization,
  11 dynamic_batching DynamicBatching @scheduling_choice, 13 sequence_batching SequenceBatching @scheduling_choice,
  15 ensemble_scheduling Ensemble @scheduling_choice, 7 instance_group InstanceGroup*,
  8 default_model_filename string, 9 cc_model_filenames map:string, 10 metric_tags map:string,
  14 parameters map:Parameter, 16 model_warmup Warmup*, 18 model_operations Operations,
  19 model_transaction_policy TransactionPolicy, 23 model_repository_agents Agents, 24 response_cache ResponseCache,
  26 model_metrics Metrics
"""
"""``NUMBER name type``; ``*`` repeats it, ``map:type`` has string keys, ``@name`` puts it in a oneof."""

_SCALARS: Final = {
    "string": FieldDescriptorProto.TYPE_STRING,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "int64": FieldDescriptorProto.TYPE_INT64,
    "uint32": FieldDescriptorProto.TYPE_UINT32,
    "uint64": FieldDescriptorProto.TYPE_UINT64,
}

DATATYPES: Final = {
    "TYPE_STRING": "BYTES",
    **{
        f"TYPE_{t}": t
        for t in "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 BF16 FP32 FP64".split()  # noqa: SIM905
    },
}
"""Triton's name of a datatype to the wire's."""


class ConfigError(ValueError):
    """A configuration cannot be read or asks for something that cannot be done; the message names the field."""


def _build_schema() -> Callable[[], Any]:
    file = descriptor_pb2.FileDescriptorProto(name="inferway/model_config.proto", package="inference", syntax="proto2")
    declarations = " ".join(_SCHEMA.split()).replace(" enum ", "\nenum ").replace(" message ", "\nmessage ").split("\n")
    kinds: dict[str, str] = {}
    for declaration in declarations:
        head, _, body = declaration.partition(":")
        kind, name = head.split()
        kinds[name] = kind
        if kind == "enum":
            enum = file.enum_type.add(name=name)
            for number, value in enumerate(body.split()):
                enum.value.add(name=value, number=number)
        else:
            message = file.message_type.add(name=name)
            for item in filter(None, (part.strip() for part in body.split(","))):
                _add_field(message, item, kinds)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made: Callable[[], Any] = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return made


def _add_field(message: descriptor_pb2.DescriptorProto, item: str, kinds: dict[str, str]) -> None:
    number, name, type_name, *oneof = item.split()
    field = message.field.add(name=name, number=int(number), label=FieldDescriptorProto.LABEL_OPTIONAL)
    if type_name.startswith("map:"):
        key, value = (["string", *type_name.split(":")[1:]])[-2:]
        entry = message.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        for index, (part, part_type) in enumerate((("key", key), ("value", value)), 1):
            inner = entry.field.add(name=part, number=index, label=FieldDescriptorProto.LABEL_OPTIONAL)
            _set_type(inner, part_type, kinds)
        field.label = FieldDescriptorProto.LABEL_REPEATED
        field.type = FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".inference.{message.name}.{entry.name}"
        return
    if type_name.endswith("*"):
        field.label = FieldDescriptorProto.LABEL_REPEATED
    _set_type(field, type_name.rstrip("*"), kinds)
    for mark in oneof:
        names = [declared.name for declared in message.oneof_decl]
        if mark[1:] not in names:
            message.oneof_decl.add(name=mark[1:])
            names.append(mark[1:])
        field.oneof_index = names.index(mark[1:])


def _set_type(field: FieldDescriptorProto, type_name: str, kinds: dict[str, str]) -> None:
    if type_name in _SCALARS:
        field.type = _SCALARS[type_name]
    else:
        is_enum = kinds[type_name] == "enum"
        field.type = FieldDescriptorProto.TYPE_ENUM if is_enum else FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".inference.{type_name}"


MODEL_CONFIG: Final = _build_schema()
"""Makes an empty configuration message. Its fields exist at run time only, so to a type checker it is anything."""


def parse_text(text: str) -> tuple[Any, str]:
    """Read protobuf text format.

    Returns:
        The message, of ``MODEL_CONFIG``, and a remark: empty, or which unknown field was passed over.
    Raises:
        ConfigError: the text is not a configuration; the message has line and column.
    """
    try:
        return text_format.Parse(text, MODEL_CONFIG()), ""
    except (text_format.ParseError, RecursionError) as strict:
        try:
            # A newer Triton may know more than this schema. What is known is then still good.
            message = text_format.Parse(text, MODEL_CONFIG(), allow_unknown_field=True)
        except (text_format.ParseError, RecursionError) as error:
            raise ConfigError(f"not a model configuration in protobuf text format: {_short(error)}") from None
        return message, f"passed over what is not known: {_short(strict)}"


def parse_json(value: dict[str, Any]) -> tuple[Any, str]:
    """Read the JSON form, as the repository extension's ``load`` carries it; as :func:`parse_text`."""
    try:
        return json_format.ParseDict(value, MODEL_CONFIG()), ""
    except (json_format.ParseError, RecursionError) as strict:
        try:
            message = json_format.ParseDict(value, MODEL_CONFIG(), ignore_unknown_fields=True)
        except (json_format.ParseError, RecursionError) as error:
            raise ConfigError(f"not a model configuration: {_short(error)}") from None
        return message, f"passed over what is not known: {_short(strict)}"


def _short(error: Exception) -> str:
    """The parser quotes the whole line, which may be the whole file."""
    text = str(error)
    return text if len(text) <= 200 else f"{text[:100]} … {text[-80:]}"


def to_json(message: Any) -> dict[str, Any]:
    """The JSON form as Triton answers it: proto names, every scalar with its default, 64-bit integers as numbers.

    protobuf's own converter writes 64-bit integers as strings, which Triton's clients do not expect in ``dims``.
    """
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            nested = field.message_type.fields_by_name["value"].message_type is not None
            found[field.name] = {str(key): to_json(value[key]) if nested else value[key] for key in value}
        elif field.is_repeated:
            found[field.name] = [_json_value(field, item) for item in value]
        elif (field.containing_oneof is None and field.message_type is None) or message.HasField(field.name):
            found[field.name] = _json_value(field, value)
    return found


def _json_value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_json(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def to_model_config(
    message: Any,
    name: str,
    read_labels: Callable[[str], tuple[str, ...]],
    find_warmup_file: Callable[[str], str],
) -> ModelConfig:
    """What a configuration means to the gateway.

    Args:
        message: of ``MODEL_CONFIG``.
        name: the model's folder, with which the configuration must agree.
        read_labels: label file, as named in the configuration, to the label of each class index.
        find_warmup_file: warm-up data file, as named in the configuration, to where it is.
    Raises:
        ConfigError: a value is outside its range, contradicts another, or asks for what the gateway cannot do.
    """
    _refuse_unsupported(message, name)
    max_batch_size = message.max_batch_size if message.HasField("max_batch_size") else None
    if max_batch_size is not None and max_batch_size < 0:
        raise ConfigError(f"max_batch_size must be 0 or more, got {max_batch_size}")
    counts = [group.count or 1 for group in message.instance_group]
    if any(count < 0 for count in counts):
        raise ConfigError("instance_group.count must be 1 or more")
    parameters = {key: message.parameters[key].string_value for key in sorted(message.parameters)}
    return ModelConfig(
        platform=message.platform or "onnxruntime_onnx",
        max_batch_size=max_batch_size,
        inputs=tuple(_tensor(item, "input", ()) for item in message.input),
        outputs=tuple(
            _tensor(item, "output", read_labels(item.label_filename) if item.label_filename else ())
            for item in message.output
        ),
        version_policy=_version_policy(message.version_policy),
        batching=_batch_policy(message, max_batch_size),
        instances=sum(counts) if counts else None,
        warmup=tuple(_warmup(item, find_warmup_file) for item in message.model_warmup),
        session=_session_options(parameters),
        parameters=parameters,
        raw=to_json(message),
    )


def _session_options(parameters: dict[str, str]) -> SessionOptions:
    """The one parameter of Triton's ONNX Runtime backend that means the same here; 0 leaves the choice."""
    threads = parameters.get("intra_op_thread_count", "0")
    if not threads.isascii() or not threads.isdigit() or int(threads) > 1024:
        raise ConfigError(f"parameter intra_op_thread_count must be a number from 0 to 1024, got '{threads[:20]}'")
    return SessionOptions(intra_op_threads=int(threads) or None)


def _refuse_unsupported(message: Any, name: str) -> None:
    if message.name and message.name != name:
        raise ConfigError(f"name is '{message.name}', expected the folder's name '{name}' or none")
    if message.platform not in ("", "onnxruntime_onnx", ENSEMBLE):
        raise ConfigError(f"platform is '{message.platform}', expected 'onnxruntime_onnx' or '{ENSEMBLE}'")
    if message.backend not in ("", "onnxruntime"):
        raise ConfigError(f"backend is '{message.backend}', expected 'onnxruntime'")
    if message.HasField("ensemble_scheduling") != (message.platform == ENSEMBLE):
        raise ConfigError(f"ensemble_scheduling and platform '{ENSEMBLE}' go together")
    for part in ("sequence_batching", "model_operations"):
        if message.HasField(part):
            raise ConfigError(f"{part} is not supported")
    for part in ("batch_input", "batch_output", "cc_model_filenames"):
        if getattr(message, part):
            raise ConfigError(f"{part} is not supported")
    if message.model_transaction_policy.decoupled:
        raise ConfigError("model_transaction_policy.decoupled is not supported")
    for tensor in (*message.input, *message.output):
        if tensor.is_shape_tensor:
            raise ConfigError(f"is_shape_tensor of '{tensor.name}' is not supported: it belongs to TensorRT")
    for tensor in message.input:
        if tensor.allow_ragged_batch:
            raise ConfigError(
                f"allow_ragged_batch of input '{tensor.name}' is not supported: rows of different length are "
                "batched by padding, see batching.padding of inferway.toml"
            )


def _tensor(item: Any, kind: str, labels: tuple[str, ...]) -> TensorConfig:
    if not item.name:
        raise ConfigError(f"{kind}.name must be given")
    datatype = None
    if item.HasField("data_type"):
        text = item.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[item.data_type].name
        if text not in DATATYPES:
            raise ConfigError(f"data_type of {kind} '{item.name}' is {text}")
        datatype = DATATYPES[text]
    dims = _dims(item.dims, f"dims of {kind} '{item.name}'") if item.dims else None
    reshape = None
    if item.HasField("reshape"):
        reshape = _dims(item.reshape.shape, f"reshape of {kind} '{item.name}'")
        if dims is None:
            raise ConfigError(f"reshape of {kind} '{item.name}' needs dims beside it")
        _check_reshape(dims, reshape, f"{kind} '{item.name}'")
    optional = kind == "input" and item.optional
    return TensorConfig(item.name, datatype, dims, reshape, optional, labels)


def _dims(values: Any, what: str) -> tuple[int, ...]:
    dims = tuple(int(value) for value in values)
    if any(dim == 0 or dim < -1 for dim in dims):
        raise ConfigError(f"{what} must be positive or -1, got {list(dims)}")
    return dims


def _check_reshape(dims: tuple[int, ...], reshape: tuple[int, ...], what: str) -> None:
    """Both sides hold the same elements: as many variable dimensions, and equal products between them."""

    def products(shape: tuple[int, ...]) -> list[int]:
        parts = [1]
        for dim in shape:
            if dim == -1:
                parts.append(1)
            else:
                parts[-1] *= dim
        return parts

    if products(dims) != products(reshape):
        raise ConfigError(f"reshape of {what} to {list(reshape)} has other elements than dims {list(dims)}")


def _version_policy(policy: Any) -> VersionPolicy:
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return VersionPolicy("all")
    if kind == "specific":
        return VersionPolicy("specific", specific=tuple(sorted(set(policy.specific.versions))))
    return VersionPolicy("latest", latest=policy.latest.num_versions or 1)


def _batch_policy(message: Any, max_batch_size: int | None) -> BatchPolicy:
    given = message.dynamic_batching
    preferred = tuple(sorted(set(given.preferred_batch_size)))
    for rows in preferred:
        if rows < 1 or (max_batch_size and rows > max_batch_size):
            raise ConfigError(
                f"dynamic_batching.preferred_batch_size must lie in 1 to max_batch_size {max_batch_size}, got {rows}"
            )
    levels = given.priority_levels
    if levels > 1024:
        raise ConfigError(f"dynamic_batching.priority_levels must be 1024 or less, got {levels}")
    default = given.default_priority_level
    if default > levels:
        raise ConfigError(f"dynamic_batching.default_priority_level must be {levels} or less, got {default}")
    by_priority = {int(level): _queue_policy(policy) for level, policy in given.priority_queue_policy.items()}
    for level in by_priority:
        if not 1 <= level <= levels:
            raise ConfigError(f"dynamic_batching.priority_queue_policy names level {level} of {levels}")
    return BatchPolicy(
        preferred_rows=preferred,
        max_queue_delay_s=given.max_queue_delay_microseconds / 1e6,
        priority_levels=levels,
        default_priority=default or (levels + 1) // 2,
        queue=_queue_policy(given.default_queue_policy) if given.HasField("default_queue_policy") else QueuePolicy(),
        queue_by_priority=by_priority,
        preserve_order=given.preserve_ordering,
    )


def _queue_policy(policy: Any) -> QueuePolicy:
    return QueuePolicy(
        default_timeout_s=policy.default_timeout_microseconds / 1e6 or None,
        allow_timeout_override=policy.allow_timeout_override,
        timeout_action="delay" if policy.timeout_action else "reject",
        max_queue_requests=policy.max_queue_size,
    )


def _warmup(item: Any, find_file: Callable[[str], str]) -> Warmup:
    inputs = []
    for name in sorted(item.inputs):
        given = item.inputs[name]
        what = f"model_warmup '{item.name}', input '{name}'"
        text = given.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[given.data_type].name
        if text not in DATATYPES:
            raise ConfigError(f"{what} must have a data_type")
        dims = tuple(given.dims)
        if any(dim < 1 for dim in dims):
            raise ConfigError(f"{what} must have positive dims, got {list(dims)}")
        match given.WhichOneof("input_data_type"):
            case "zero_data":
                inputs.append(WarmupInput(name, DATATYPES[text], dims, "zero"))
            case "random_data":
                inputs.append(WarmupInput(name, DATATYPES[text], dims, "random"))
            case "input_data_file":
                inputs.append(WarmupInput(name, DATATYPES[text], dims, "file", find_file(given.input_data_file)))
            case _:
                raise ConfigError(f"{what} must have one of zero_data, random_data, input_data_file")
    return Warmup(item.name, item.batch_size or 1, item.count or 1, tuple(inputs))


_TRITON_TYPES: Final = {wire: name for name, wire in DATATYPES.items()}


def describe_config(config: ModelConfig, signature: Signature, name: str) -> dict[str, Any]:
    """The configuration that the protocol's ``config`` route shows: what the files say, completed from the graph.

    Args:
        signature: of the loaded version, which decides about shapes: ``max_batch_size`` is 0 and ``dims`` are whole
            shapes where the number of rows has no bound, since that is how Triton tells them apart.
    """
    shown = dict(config.raw) or to_json(MODEL_CONFIG())
    rows = signature.max_rows if signature.batched else 0
    onnx = config.platform == "onnxruntime_onnx"
    backend = "onnxruntime" if onnx else ""
    shown |= {"name": name, "platform": config.platform, "backend": backend, "max_batch_size": rows}
    for part, specs in (("input", signature.inputs), ("output", signature.outputs)):
        said = {tensor["name"]: tensor for tensor in config.raw.get(part, ())}
        shown[part] = [_describe_tensor(part, spec, said.get(spec.name), rows) for spec in specs]
    shown["default_model_filename"] = shown["default_model_filename"] or ("model.onnx" if onnx else "")
    shown.setdefault("version_policy", {"latest": {"num_versions": 1}})
    if not shown["instance_group"]:
        group = {**to_json(MODEL_CONFIG().instance_group.add()), "name": name, "kind": "KIND_CPU"}
        shown["instance_group"] = [{**group, "count": config.instances or len(os.sched_getaffinity(0))}]
    shown.setdefault("model_transaction_policy", {"decoupled": False})
    return shown


def _describe_tensor(part: str, spec: TensorSpec, said: dict[str, Any] | None, rows: int) -> dict[str, Any]:
    empty = MODEL_CONFIG()
    tensor = said or to_json(empty.input.add() if part == "input" else empty.output.add())
    dims = spec.shape[1:] if rows else spec.shape
    found = {**tensor, "name": spec.name, "data_type": _TRITON_TYPES[spec.datatype], "dims": list(dims)}
    if part == "input":
        found["optional"] = spec.optional
    return found
