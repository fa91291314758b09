"""Triton's configuration: the schema agrees with Triton's own, and each part means what it means there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tritonclient

from inferway_gateway.core.model_config import ModelConfig, QueuePolicy, WarmupInput
from inferway_gateway.core.tensors import Signature, TensorSpec
from inferway_gateway.store.triton_config import (
    MODEL_CONFIG,
    ConfigError,
    describe_config,
    parse_json,
    parse_text,
    to_json,
    to_model_config,
)


def read(text: str) -> ModelConfig:
    message, remark = parse_text(text)
    assert remark == ""
    return to_model_config(message, "m", lambda name: (name, "b"), lambda name: f"/warmup/{name}")


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return str(caught.value)


def test_every_declared_field_is_tritons_own() -> None:
    # The module of the gRPC client carries the descriptor; importing it by path avoids needing gRPC.
    path = Path(tritonclient.__file__).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config", path)
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    compared = compare(MODEL_CONFIG().DESCRIPTOR, theirs.ModelConfig.DESCRIPTOR, set())
    assert {"dynamic_batching", "model_warmup", "preferred_batch_size", "label_filename"} <= compared


def compare(ours: Any, theirs: Any, seen: set[str]) -> set[str]:
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.is_repeated, field.type) == (other.number, other.is_repeated, other.type), (
            field.name
        )
        seen.add(field.name)
        if field.enum_type is not None:
            known = {value.name: value.number for value in other.enum_type.values}
            assert {value.name: value.number for value in field.enum_type.values} == known
        if field.message_type is not None:
            compare(field.message_type, other.message_type, seen)
    if ours.full_name == "inference.ModelConfig":
        assert {field.name for field in theirs.fields} == {field.name for field in ours.fields}
    return seen


def test_a_whole_configuration_is_understood() -> None:
    config = read(
        """
        # as in Triton's own documentation
        name: "m"
        platform: "onnxruntime_onnx"
        max_batch_size: 8
        input [
          { name: "a" data_type: TYPE_FP32 dims: [ 16 ] reshape: { shape: [ 4, 4 ] } },
          { name: "b" data_type: TYPE_STRING dims: -1 optional: true }
        ]
        output { name: "y" data_type: TYPE_BF16 dims: [ 1 ] reshape { shape: [ ] } label_filename: "labels.txt" }
        dynamic_batching {
          preferred_batch_size: [ 8, 4 ]
          max_queue_delay_microseconds: 100
          preserve_ordering: true
          priority_levels: 3
          default_priority_level: 2
          default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5000 }
          priority_queue_policy { key: 1 value { allow_timeout_override: true max_queue_size: 7 } }
        }
        instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_AUTO } ]
        parameters { key: "intra_op_thread_count" value { string_value: "2" } }
        model_warmup {
          name: "w" batch_size: 4 count: 3
          inputs { key: "a" value { data_type: TYPE_FP32 dims: 16 random_data: true } }
          inputs { key: "b" value { data_type: TYPE_STRING dims: 2 input_data_file: "text" } }
        }
        optimization { graph { level: 1 } input_pinned_memory { enable: false } }
        """
    )
    a, b = config.inputs
    assert (a.name, a.datatype, a.dims, a.reshape, a.optional) == ("a", "FP32", (16,), (4, 4), False)
    assert (b.datatype, b.dims, b.reshape, b.optional) == ("BYTES", (-1,), None, True)
    assert (config.outputs[0].datatype, config.outputs[0].reshape) == ("BF16", ())
    assert config.outputs[0].labels == ("labels.txt", "b")
    assert config.max_batch_size == 8
    batching = config.batching
    assert batching.enabled is None
    assert (batching.preferred_rows, batching.max_queue_delay_s, batching.preserve_order) == ((4, 8), 0.0001, True)
    assert (batching.priority_levels, batching.default_priority) == (3, 2)
    assert batching.queue == QueuePolicy(0.005, False, "delay", 0)
    assert batching.queue_by_priority == {1: QueuePolicy(None, True, "reject", 7)}
    assert config.instances == 3
    assert config.session.intra_op_threads == 2
    assert (config.warmup[0].rows, config.warmup[0].count) == (4, 3)
    assert config.warmup[0].inputs == (
        WarmupInput("a", "FP32", (16,), "random"),
        WarmupInput("b", "BYTES", (2,), "file", "/warmup/text"),
    )


def test_saying_nothing_and_saying_zero_differ_for_the_batch_size() -> None:
    assert read("").max_batch_size is None
    assert read("max_batch_size: 0").max_batch_size == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_batch_size: -1", "max_batch_size must be 0 or more, got -1"),
        ('platform: "tensorflow_savedmodel"', "platform is 'tensorflow_savedmodel', expected 'onnxruntime_onnx'"),
        ('backend: "python"', "backend is 'python', expected 'onnxruntime'"),
        ("sequence_batching { }", "sequence_batching is not supported"),
        ("ensemble_scheduling { }", "ensemble_scheduling and platform 'ensemble' go together"),
        ("batch_input { }", "batch_input is not supported"),
        ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled is not supported"),
        ('input { name: "x" is_shape_tensor: true }', "is_shape_tensor of 'x'"),
        ('input { name: "x" allow_ragged_batch: true }', "allow_ragged_batch of input 'x'"),
        ("input { dims: 1 }", "input.name must be given"),
        ('input { name: "x" data_type: TYPE_INVALID }', "data_type of input 'x' is TYPE_INVALID"),
        ('input { name: "x" dims: [ 4, -2 ] }', "dims of input 'x' must be positive or -1, got [4, -2]"),
        ('input { name: "x" reshape { shape: 4 } }', "reshape of input 'x' needs dims beside it"),
        ('input { name: "x" dims: [2, -1] reshape { shape: [-1, 3] } }', "has other elements than dims [2, -1]"),
        ("max_batch_size: 4 dynamic_batching { preferred_batch_size: 5 }", "1 to max_batch_size 4, got 5"),
        ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "must be 2 or less, got 3"),
        ("dynamic_batching { priority_queue_policy { key: 1 } }", "names level 1 of 0"),
        ("instance_group { count: -1 }", "instance_group.count must be 1 or more"),
        ('parameters { key: "intra_op_thread_count" value { string_value: "two" } }', "0 to 1024, got 'two'"),
        ('model_warmup { name: "w" inputs { key: "x" } }', "must have a data_type"),
        ('model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 1 } } }', "must have one of"),
        ("max_batch_size: 1 max_batch_size: 2", "should not have multiple"),
        ('name: "a" name', "1:15"),
        ("{" * 5000, "1:1"),
        ("input { " * 5000, "not a model configuration"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(text: str, reason: str) -> None:
    message = refused(text)
    assert reason in message
    assert len(message) < 400


def test_a_reshape_keeps_variable_dimensions_in_order() -> None:
    config = read('input { name: "x" dims: [ 4, -1, 6 ] reshape { shape: [ 2, 2, -1, 2, 3 ] } }')
    assert config.inputs[0].reshape == (2, 2, -1, 2, 3)


def test_json_has_tritons_names_and_plain_numbers() -> None:
    shown = read('max_batch_size: 4 input { name: "x" data_type: TYPE_INT64 dims: [ -1, 3 ] }').raw
    assert shown["max_batch_size"] == 4
    assert shown["input"][0]["dims"] == [-1, 3]
    assert shown["input"][0]["data_type"] == "TYPE_INT64"
    assert shown["input"][0]["format"] == "FORMAT_NONE"
    assert shown["instance_group"] == []
    assert "dynamic_batching" not in shown


def test_the_json_form_is_read_back() -> None:
    text = """
        max_batch_size: 4
        input { name: "x" dims: [ 2 ] }
        dynamic_batching { preferred_batch_size: 2 priority_levels: 1 priority_queue_policy { key: 1 value { } } }
        model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 2 zero_data: true } } }
    """
    message, _ = parse_text(text)
    again, remark = parse_json(to_json(message))
    assert remark == ""
    assert to_json(again) == to_json(message)


def test_json_of_another_type_is_refused_and_an_unknown_member_reported() -> None:
    with pytest.raises(ConfigError, match="max_batch_size"):
        parse_json({"max_batch_size": "many"})
    message, remark = parse_json({"max_batch_size": 2, "surprise": 1})
    assert message.max_batch_size == 2
    assert "surprise" in remark


SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("text", "BYTES", (-1, -1), optional=True)),
    (TensorSpec("y", "BF16", (-1, 2)),),
    batched=True,
    max_rows=16,
)


def test_a_model_without_configuration_is_described_from_its_signature() -> None:
    shown = describe_config(ModelConfig(instances=3), SIGNATURE, "m")
    assert (shown["name"], shown["backend"], shown["platform"]) == ("m", "onnxruntime", "onnxruntime_onnx")
    assert shown["max_batch_size"] == 16
    assert [(t["name"], t["data_type"], t["dims"], t["optional"]) for t in shown["input"]] == [
        ("x", "TYPE_FP32", [4], False),
        ("text", "TYPE_STRING", [-1], True),
    ]
    assert shown["output"][0]["data_type"] == "TYPE_BF16"
    assert shown["instance_group"][0]["count"] == 3
    assert shown["version_policy"] == {"latest": {"num_versions": 1}}
    assert shown["default_model_filename"] == "model.onnx"
    again, remark = parse_json(shown)
    assert (remark, again.name) == ("", "m")


def test_rows_without_bound_are_described_by_whole_shapes() -> None:
    signature = Signature(SIGNATURE.inputs, SIGNATURE.outputs, batched=True)
    shown = describe_config(ModelConfig(), signature, "m")
    assert (shown["max_batch_size"], shown["input"][0]["dims"]) == (0, [-1, 4])


def test_what_the_configuration_says_stays_in_the_description() -> None:
    config = read(
        """
        max_batch_size: 16
        input { name: "x" dims: [ 4 ] reshape { shape: [ 2, 2 ] } }
        version_policy { all { } }
        parameters { key: "a" value { string_value: "b" } }
        instance_group { count: 2 }
        """
    )
    shown = describe_config(config, SIGNATURE, "m")
    assert shown["input"][0]["reshape"] == {"shape": [2, 2]}
    assert shown["version_policy"] == {"all": {}}
    assert shown["parameters"] == {"a": {"string_value": "b"}}
    assert shown["instance_group"][0]["count"] == 2
    assert config.raw["name"] == ""
