"""A loaded session: every datatype, shape and failure at the seam."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferway_gateway.backends.onnx.session import explain
from inferway_gateway.core.backend import RunHandle
from inferway_gateway.core.errors import DeadlineExceededError, ModelExecutionError
from inferway_gateway.core.model_config import ModelConfig, SessionOptions, TensorConfig
from inferway_gateway.core.tensors import DTYPES, Arrays
from models import (
    ELEMENT_TYPES,
    F32,
    add_one,
    add_sub,
    classifier,
    concat_text,
    endless,
    fails_on_negative,
    fill,
    identity,
    identity_all,
    image_sum,
    masked_mean,
    model,
    node,
    optional_input,
    scalar_add,
    value,
)

from .conftest import OpenModel

VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False, True, True],
    "FP16": [1.5, -0.0, float("nan"), 65504.0],
    "FP32": [1.5, -0.0, float("nan"), float("-inf")],
    "FP64": [1.5, 1e300, float("nan"), float("inf")],
    "BF16": [0x3F80, 0x7FC0, 0xFF80, 0x0001],
    "BYTES": ["", "nul\0nul\0", "é\u2028\U0001f600", "x" * 1000],
}


def values_of(datatype: str) -> list[Any]:
    if datatype in VALUES:
        return VALUES[datatype]
    limits = np.iinfo(DTYPES[datatype])
    return [limits.min, limits.max, 0, 1]


@pytest.mark.parametrize("datatype", ELEMENT_TYPES)
@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (0, 3), (2, 0)])
def test_every_datatype_goes_through_unchanged(open_model: OpenModel, datatype: str, shape: tuple[int, ...]) -> None:
    session = open_model(identity(datatype))
    count = int(np.prod(shape))
    x = np.array(values_of(datatype)[:count], DTYPES[datatype]).reshape(shape)
    assert session.signature.inputs[0].datatype == datatype
    session.signature.check({"x": x})
    (y,) = session.run({"x": x}, ["y"])
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y.flags.c_contiguous
    assert y.tolist() == x.tolist() if datatype == "BYTES" else y.tobytes() == x.tobytes()


def test_all_datatypes_together_and_any_choice_of_outputs(open_model: OpenModel) -> None:
    session = open_model(identity_all())
    inputs = {
        spec.name: np.array(values_of(spec.datatype), DTYPES[spec.datatype]).reshape(2, 2)
        for spec in session.signature.inputs
    }
    names = ["bytes_out", "fp16_out", "bool_out"]
    found = session.run(inputs, names)
    assert [y.dtype for y in found] == [DTYPES["BYTES"], DTYPES["FP16"], DTYPES["BOOL"]]
    assert found[0].tolist() == inputs["bytes"].tolist()
    assert all(type(text) is str for text in found[0].flat)


def test_bf16_beside_other_datatypes_in_and_out(open_model: OpenModel) -> None:
    content = model(
        [node("Cast", ["x"], ["b"], to=ELEMENT_TYPES["BF16"]), node("Cast", ["c"], ["y"], to=F32)],
        [value("x", F32, ["batch", 2]), value("c", ELEMENT_TYPES["BF16"], ["batch", 2])],
        [value("b", ELEMENT_TYPES["BF16"], ["batch", 2]), value("y", F32, ["batch", 2])],
    )
    session = open_model(content)
    inputs: Arrays = {"x": np.array([[1, -2]], np.float32), "c": np.array([[0x3F80, 0xC000]], np.uint16)}
    b, y = session.run(inputs, ["b", "y"])
    assert b.dtype == np.uint16
    assert b.tolist() == [[0x3F80, 0xC000]]
    assert y.tolist() == [[1.0, -2.0]]
    (only,) = session.run(inputs, ["y"])
    assert only.tolist() == [[1.0, -2.0]]


def test_rank_zero_goes_in_and_comes_out(open_model: OpenModel) -> None:
    session = open_model(scalar_add())
    (z,) = session.run({"x": np.array(1, np.float32), "y": np.array(2, np.float32)}, ["z"])
    assert z.shape == ()
    assert z == 3


def test_outputs_come_in_the_order_asked_for(open_model: OpenModel) -> None:
    session = open_model(add_sub())
    x = np.full((1, 16), 5, np.int32)
    y = np.full((1, 16), 3, np.int32)
    minus, plus = session.run({"INPUT1": y, "INPUT0": x}, ["OUTPUT1", "OUTPUT0"])
    assert (minus[0, 0], plus[0, 0]) == (2, 8)


def test_inputs_need_not_be_contiguous(open_model: OpenModel) -> None:
    wide = np.arange(64, dtype=np.float32).reshape(2, 32)
    (y,) = open_model(add_one()).run({"x": wide[:, ::2]}, ["y"])
    assert (y == wide[:, ::2] + 1).all()
    bits = np.arange(8, dtype=np.uint16).reshape(2, 4)
    (z,) = open_model(identity("BF16")).run({"x": bits[:, ::2]}, ["y"])
    assert z.tolist() == bits[:, ::2].tolist()


def test_an_empty_batch_is_answered_without_a_run(open_model: OpenModel) -> None:
    session = open_model(masked_mean())
    ids = np.empty((0, 5), np.int64)
    pooled, tokens = session.run({"input_ids": ids, "attention_mask": ids}, ["pooled", "tokens"])
    assert pooled.shape == (0, 8)
    assert pooled.dtype == np.float32
    assert tokens.shape == (0, 5, 8)
    label, probabilities = open_model(classifier()).run({"x": np.empty((0, 4), np.float32)}, ["label", "probabilities"])
    assert (label.shape, probabilities.shape) == ((0,), (0, 3))
    assert label.dtype == np.int64
    (y,) = open_model(concat_text()).run({"a": np.empty((0, 1), object), "b": np.empty((0, 1), object)}, ["y"])
    assert y.shape == (0, 1)
    assert y.dtype == object


def test_an_empty_batch_is_also_known_where_an_optional_input_forbids_batches(open_model: OpenModel) -> None:
    session = open_model(optional_input())
    assert not session.signature.batched
    (y,) = session.run({"x": np.empty((0, 4), np.float32), "scale": np.ones(1, np.float32)}, ["y"])
    assert y.shape == (0, 4)


def test_reshape_turns_the_wires_shape_into_the_models_and_back(open_model: OpenModel) -> None:
    config = ModelConfig(
        max_batch_size=8,
        inputs=(TensorConfig("x", dims=(16,), reshape=(4, 4)),),
        outputs=(TensorConfig("y", dims=(2, 2), reshape=(4,)),),
    )
    session = open_model(image_sum(), config)
    assert session.signature.inputs[0].shape == (-1, 16)
    assert session.signature.outputs[0].shape == (-1, 2, 2)
    x = np.arange(32, dtype=np.float32).reshape(2, 16)
    (y,) = session.run({"x": x}, ["y"])
    assert y.tolist() == x.reshape(2, 4, 4).sum(2).reshape(2, 2, 2).tolist()


def test_a_reshape_carries_variable_lengths_over(open_model: OpenModel) -> None:
    config = ModelConfig(
        max_batch_size=0,
        inputs=(TensorConfig("x", dims=(-1,), reshape=(-1, 1)),),
        outputs=(TensorConfig("y", dims=(1, -1), reshape=(-1, 1)),),
    )
    (y,) = open_model(identity("INT64"), config).run({"x": np.arange(5)}, ["y"])
    assert y.shape == (1, 5)


def test_an_optional_input_may_be_left_out_or_given(open_model: OpenModel) -> None:
    session = open_model(optional_input())
    x = np.ones((1, 4), np.float32)
    session.signature.check({"x": x})
    assert session.run({"x": x}, ["y"])[0][0, 0] == 2
    assert session.run({"x": x, "scale": np.array([5], np.float32)}, ["y"])[0][0, 0] == 5


def test_a_failing_run_is_the_models_error_in_words_for_a_caller(
    open_model: OpenModel, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    session = open_model(fails_on_negative())
    with pytest.raises(ModelExecutionError) as caught:
        session.run({"x": np.array([[1, -1, 0, 0]], np.float32)}, ["y"])
    assert caught.value.message.startswith("model 'm' failed: Gather: indices element out of data bounds")
    (y,) = session.run({"x": np.ones((1, 4), np.float32)}, ["y"])
    assert y.tolist() == [[1, 1, 1, 1]]
    # Callers must not be able to fill the log or standard error with failing runs.
    assert capfd.readouterr().err == ""
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_output_that_no_memory_holds_is_an_error(open_model: OpenModel) -> None:
    session = open_model(fill())
    assert session.run({"shape": np.array([2, 3])}, ["y"])[0].shape == (2, 3)
    for shape in ([1 << 40], [-1], [1 << 62, 1 << 62]):
        with pytest.raises(ModelExecutionError, match="ConstantOfShape"):
            session.run({"shape": np.array(shape)}, ["y"])


def test_terminating_ends_a_run_that_would_not_end(open_model: OpenModel) -> None:
    session = open_model(endless(), ModelConfig(), run_limit_s=0.1)
    handle = RunHandle()
    bound = threading.Event()
    errors: list[BaseException] = []

    class Watched(RunHandle):
        __slots__ = ()

        def bind(self, stop: Any) -> None:
            super().bind(stop)
            bound.set()

    handle = Watched()

    def work() -> None:
        try:
            session.run({"x": np.zeros((1, 64), np.float32)}, ["y"], handle)
        except DeadlineExceededError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert bound.wait(10)
    handle.terminate()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1


def test_a_run_terminated_before_it_begins_does_not_begin(open_model: OpenModel) -> None:
    session = open_model(add_one())
    handle = RunHandle()
    handle.terminate()
    with pytest.raises(DeadlineExceededError):
        session.run({"x": np.zeros((1, 16), np.float32)}, ["y"], handle)


def test_terminating_after_a_run_touches_no_other_run(open_model: OpenModel) -> None:
    session = open_model(add_one())
    x = np.zeros((1, 16), np.float32)
    first = RunHandle()
    session.run({"x": x}, ["y"], first)
    first.terminate()
    assert session.run({"x": x}, ["y"], RunHandle())[0][0, 0] == 1
    assert session.run({"x": x}, ["y"])[0][0, 0] == 1


def test_a_failing_run_with_a_handle_is_not_taken_for_a_terminated_one(open_model: OpenModel) -> None:
    with pytest.raises(ModelExecutionError):
        open_model(fails_on_negative()).run({"x": -np.ones((1, 4), np.float32)}, ["y"], RunHandle())


def test_many_threads_share_a_session(open_model: OpenModel) -> None:
    session = open_model(masked_mean(), ModelConfig(session=SessionOptions(trial=False)))
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(50):
            rows, length = random.integers(1, 9, 2)
            ids = random.integers(0, 100, (rows, length))
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            pooled, tokens = session.run(inputs, ["pooled", "tokens"])
            if not np.allclose(pooled, tokens.mean(1), atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_of_an_unusually_large_batch_is_given_back(open_model: OpenModel) -> None:
    nodes = [node("Exp", ["x"], ["a"]), node("Concat", ["a", "a", "a", "a"], ["b"], axis=1)]
    nodes.append(node("ReduceSum", ["b", "axes"], ["y"], keepdims=0))
    content = model(nodes, [value("x", F32, ["batch", 1024])], [value("y", F32, ["batch"])], {"axes": np.array([1])})
    # Unmeasured, so that loading runs nothing larger than three rows.
    session = open_model(content, ModelConfig(session=SessionOptions(trial=False)))
    small, large = np.zeros((1, 1024), np.float32), np.zeros((8192, 1024), np.float32)
    session.run({"x": small}, ["y"])
    before = resident_mb()
    session.run({"x": large}, ["y"])
    # Its intermediates take 160 MiB.
    assert resident_mb() - before < 60


def resident_mb() -> float:
    with open("/proc/self/statm") as stream:  # noqa: PTH123
        return int(stream.read().split()[1]) * 4096 / 1e6


def test_closing_twice_is_allowed(open_model: OpenModel) -> None:
    session = open_model(add_one())
    session.close()
    session.close()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Mul node. Name:'n' Status "
            "Message: /build/core/providers/cpu/math/element_wise_ops.h:583 void onnxruntime::BroadcastIterator::Append"
            "(ptrdiff_t, ptrdiff_t) axis == 1 || axis == largest was false. Attempting to broadcast. 5 by 6\n",
            "Mul: axis == 1 || axis == largest was false. Attempting to broadcast. 5 by 6",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running ConstantOfShape node. "
            "Name:'' Status Message: /src/framework/op_kernel.cc:87 virtual OrtValue* onnxruntime::OpKernelContext::"
            "Output(int, const onnxruntime::TensorShape&) [ONNXRuntimeError] : 1 : FAIL : tensor.cc:57 "
            "CalculateTensorStorageSize Tensor shape.Size() must be >= 0\n",
            "ConstantOfShape: Tensor shape.Size() must be >= 0",
        ),
        (
            "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from /data/models/m/1/model.onnx failed:Protobuf "
            "parsing failed.",
            "Protobuf parsing failed.",
        ),
        ('[ONNXRuntimeError] : 1 : FAIL : no file "/secret/place/x.data" there', 'no file "…" there'),
        ("", "RuntimeError"),
    ],
)
def test_an_explanation_has_no_status_number_source_position_or_path(said: str, told: str) -> None:
    assert explain(RuntimeError(said)) == told


@settings(deadline=None)
@given(st.text(max_size=2000))
def test_an_explanation_is_one_bounded_line(text: str) -> None:
    told = explain(RuntimeError(text))
    assert told
    assert len(told) <= 300
    assert "\n" not in told
