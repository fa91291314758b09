"""Signatures from graphs and configurations, and what of the two contradicts the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inferway_gateway.backends.onnx.graph import GraphFacts
from inferway_gateway.backends.onnx.signature import Declared, Layout, Reshape, make_layout, overridable
from inferway_gateway.core.errors import ModelLoadError
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig, PaddingAxis, TensorConfig

FLOAT = "tensor(float)"


def tensor(name: str, *dims: int | str | None, kind: str = FLOAT, optional: bool = False) -> Declared:
    shape = tuple(dim if isinstance(dim, int) else -1 for dim in dims)
    return Declared(name, kind, shape, tuple(dim if isinstance(dim, str) else None for dim in dims), optional)


X = tensor("x", "batch", 4)
Y = tensor("y", "batch", 2)


def layout(graph_inputs: list[Declared], graph_outputs: list[Declared], /, **config: Any) -> Layout:
    return make_layout(graph_inputs, graph_outputs, ModelConfig(**config))


def test_an_axis_that_varies_everywhere_may_be_the_batch_axis() -> None:
    found = layout([X], [Y])
    assert found.signature.batched
    assert not found.vouched
    assert found.signature.max_rows == 0
    assert found.signature.inputs[0].shape == (-1, 4)
    assert found.signature.inputs[0].axes == ("batch", None)


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        ([tensor("x", 1, 4)], [Y], "axis 0 of input 'x' is not variable"),
        ([X], [tensor("y")], "axis 0 of output 'y' is not variable"),
        ([X, tensor("state", 2, "batch")], [Y], "axis 0 of input 'state' is not variable"),
        ([X, tensor("n")], [Y], "axis 0 of input 'n' is not variable"),
        ([tensor("x", "n", "n")], [Y], "the length of axis 0 is also one of another axis of input 'x'"),
        ([], [Y], "the model has no input"),
        ([X], [Declared("y", FLOAT, None, ())], "axis 0 of output 'y' is not variable"),
    ],
)
def test_what_cannot_be_a_batch_says_why(inputs: list[Declared], outputs: list[Declared], why: str) -> None:
    found = layout(inputs, outputs)
    assert (found.signature.batched, found.why_unbatched) == (False, why)


def test_max_batch_size_vouches_for_the_axis_and_bounds_it() -> None:
    found = layout([X], [Y], max_batch_size=8, inputs=(TensorConfig("x", "FP32", (4,)),))
    assert (found.signature.batched, found.vouched, found.signature.max_rows) == (True, True, 8)
    assert found.signature.inputs[0].shape == (-1, 4)


def test_dims_without_the_first_axis_vouch_for_it_too() -> None:
    found = layout([X], [Y], inputs=(TensorConfig("x", dims=(4,)),), outputs=(TensorConfig("y", dims=(2,)),))
    assert (found.signature.batched, found.vouched, found.signature.max_rows) == (True, True, 0)


def test_whole_shapes_leave_the_axis_to_be_derived() -> None:
    found = layout([X], [Y], inputs=(TensorConfig("x", dims=(-1, 4)),))
    assert (found.signature.batched, found.vouched) == (True, False)
    fixed = layout([X], [Y], inputs=(TensorConfig("x", dims=(3, 4)),))
    assert (fixed.signature.batched, fixed.signature.inputs[0].shape) == (False, (3, 4))


def test_max_batch_size_zero_means_no_batch_axis() -> None:
    found = layout([X], [Y], max_batch_size=0, inputs=(TensorConfig("x", dims=(-1, 4)),))
    assert not found.signature.batched
    assert found.signature.inputs[0].shape == (-1, 4)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"max_batch_size": 4, "inputs": (TensorConfig("x", dims=(5,)),)}, "shape [-1, 4] in the graph"),
        ({"max_batch_size": 4, "inputs": (TensorConfig("x", dims=(-1,)),)}, "the configuration makes it [-1, -1]"),
        ({"max_batch_size": 4, "inputs": (TensorConfig("x", dims=(4, 1)),)}, "the configuration makes it [-1, 4, 1]"),
        ({"inputs": (TensorConfig("x", "INT32"),)}, "input 'x' is FP32, the configuration says INT32"),
        ({"inputs": (TensorConfig("z"),)}, "the configuration names input 'z', the graph has 'x'"),
        ({"outputs": (TensorConfig("z"),)}, "the configuration names output 'z', the graph has 'y'"),
        ({"inputs": (TensorConfig("x"), TensorConfig("x"))}, "names an input twice"),
        ({"inputs": (TensorConfig("x", dims=(1, 2, 3)),)}, "differ in rank"),
        (
            {"inputs": (TensorConfig("x", dims=(4,)),), "outputs": (TensorConfig("y", dims=(-1, 2)),)},
            "differ in rank",
        ),
    ],
)
def test_a_contradiction_is_an_error_that_shows_both_sides(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        layout([X], [Y], **config)
    assert why in caught.value.message


def test_max_batch_size_for_a_fixed_axis_is_an_error() -> None:
    with pytest.raises(ModelLoadError, match=r"max_batch_size is 4, but axis 0 of input 'x' of shape \[1, 4\]"):
        layout([tensor("x", 1, 4)], [Y], max_batch_size=4)


def test_types_that_the_protocol_lacks_are_refused_in_inputs_and_left_out_of_outputs() -> None:
    with pytest.raises(ModelLoadError, match="cannot carry"):
        layout([tensor("x", 1, kind="tensor(complex64)")], [Y])
    found = layout([X], [tensor("label", "n", kind="tensor(int64)"), tensor("scores", kind="seq(map(int64,float))")])
    assert [spec.name for spec in found.signature.outputs] == ["label"]
    assert "output 'scores' is a seq(map(int64,float))" in found.notes[0]
    with pytest.raises(ModelLoadError, match="no output"):
        layout([X], [tensor("scores", kind="seq(map(int64,float))")])
    with pytest.raises(ModelLoadError, match="output 'scores'"):
        layout([X], [Y, tensor("scores", kind="seq(tensor(float))")], outputs=(TensorConfig("scores"),))


def test_a_configuration_that_lists_outputs_offers_these_in_its_order() -> None:
    found = layout([X], [Y, tensor("z", "batch"), tensor("w", "batch")], outputs=(TensorConfig("w"), TensorConfig("y")))
    assert found.signature.output_names == ("w", "y")


def test_labels_go_to_their_output() -> None:
    assert layout([X], [Y], outputs=(TensorConfig("y", labels=("a", "b")),)).signature.outputs[0].labels == ("a", "b")


def test_an_input_without_a_shape_needs_dims() -> None:
    unranked = Declared("x", FLOAT, None, ())
    with pytest.raises(ModelLoadError, match="say its dims"):
        layout([unranked], [Y])
    found = layout([unranked], [Y], inputs=(TensorConfig("x", dims=(4,)),), max_batch_size=2)
    assert found.signature.inputs[0].shape == (-1, 4)


def test_an_input_configured_as_optional_that_the_graph_requires_is_noted() -> None:
    found = layout([X], [Y], inputs=(TensorConfig("x", optional=True),))
    assert not found.signature.inputs[0].optional
    assert "requires it" in found.notes[0]


def test_weights_listed_among_the_inputs_are_not_offered() -> None:
    switch, weight = tensor("scale", 1, optional=True), tensor("w", 64, 64, optional=True)
    facts = GraphFacts(elements={"scale": 1, "w": 4096})
    assert overridable([switch], facts, ModelConfig()) == [switch]
    assert overridable([switch, weight], facts, ModelConfig()) == []
    assert overridable([switch, weight], facts, ModelConfig(inputs=(TensorConfig("scale"),))) == [switch]
    adapter = tensor("lora", "batch", 576, 8, optional=True)
    assert overridable([adapter], GraphFacts(elements={"lora": 4608}), ModelConfig()) == [adapter]


def test_an_optional_input_without_batch_axis_forbids_batches_and_not_empty_ones() -> None:
    found = layout([X, tensor("scale", 1, optional=True)], [Y])
    assert found.why_unbatched == "axis 0 of input 'scale' is not variable"
    assert found.row_inputs == {"x"}
    assert layout([tensor("x", "n")], [tensor("y", 1, "found")]).row_inputs == frozenset()


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        ({"z": 1}, {}, "names input 'z', which the model has not"),
        ({"x": 1}, {}, "axis 1 of input 'x', whose shape [-1, 4] is not variable there"),
        ({"x": 2}, {}, "axis 2 of input 'x'"),
        ({"ids": 1}, {"y": 1}, "axis 1 of output 'y'"),
    ],
)
def test_padding_must_name_axes_that_vary(inputs: dict[str, int], outputs: dict[str, int], why: str) -> None:
    batching = BatchPolicy(padding=(PaddingAxis(inputs, outputs),))
    with pytest.raises(ModelLoadError) as caught:
        layout([X, tensor("ids", "batch", "sequence")], [Y], batching=batching)
    assert why in caught.value.message


def test_padding_needs_a_batch_axis() -> None:
    with pytest.raises(ModelLoadError, match="needs a model with a batch axis"):
        layout([tensor("ids", 1, "s")], [Y], batching=BatchPolicy(padding=(PaddingAxis({"ids": 1}),)))


def test_a_reshape_carries_variable_lengths_in_order() -> None:
    reshape = Reshape((-1, 4, -1, 6), (-1, 2, 2, -1, 2, 3))
    assert reshape.to_model((7, 4, 5, 6)) == (7, 2, 2, 5, 2, 3)
    assert reshape.to_wire((7, 2, 2, 5, 2, 3)) == (7, 4, 5, 6)
    assert np.prod(reshape.to_model((7, 4, 5, 6))) == 7 * 4 * 5 * 6
