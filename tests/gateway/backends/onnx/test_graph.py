"""Facts of a graph, read without its weights, from good files and bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from inferway_gateway.backends.onnx.graph import GraphFacts, read_graph
from models import (
    F32,
    I64,
    add_one,
    corrupt,
    dynamic_quantised,
    endless,
    external_data,
    fill,
    masked_mean,
    matmul,
    model,
    node,
    optional_input,
    slow,
    value,
)


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    return Reader(tmp_path / "model.onnx")


class Reader:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, content: bytes) -> GraphFacts:
        self._path.write_bytes(content)
        return read_graph(self._path)


def test_operators_of_subgraphs_count_too(read: Reader) -> None:
    assert read(slow()).operators == {"Loop", "Identity", "MatMul", "Tanh"}
    assert "DynamicQuantizeLinear" in read(dynamic_quantised()).operators


def test_loops_are_not_bounded_and_plain_graphs_are(read: Reader) -> None:
    assert not read(endless()).bounded
    assert not read(slow()).bounded
    assert read(masked_mean()).bounded
    assert read(add_one()).bounded


def test_a_size_computed_from_values_is_not_bounded(read: Reader) -> None:
    assert not read(fill()).bounded
    through = model(
        [node("Mul", ["n", "n"], ["m"]), node("Expand", ["c", "m"], ["y"])],
        [value("n", I64, [1])],
        [value("y", F32, [None])],
        {"c": np.ones(1, np.float32)},
    )
    assert not read(through).bounded


def test_a_size_computed_from_shapes_is_bounded(read: Reader) -> None:
    content = model(
        [node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["z"]), node("Add", ["x", "z"], ["y"])],
        [value("x", F32, ["batch", 4])],
        [value("y", F32, ["batch", 4])],
    )
    assert read(content).bounded


def test_an_operator_of_an_unknown_domain_is_not_bounded(read: Reader) -> None:
    assert not read(corrupt()["no_such_operator"]).bounded


def test_a_function_that_may_size_its_output_is_not_bounded(read: Reader) -> None:
    proto = onnx.load_from_string(add_one())
    body = helper.make_function(
        "local", "Fill", ["s"], ["o"], [node("ConstantOfShape", ["s"], ["o"])], [helper.make_opsetid("", 20)]
    )
    proto.functions.append(body)
    facts = read(proto.SerializeToString())
    assert "ConstantOfShape" in facts.operators
    assert not facts.bounded


def test_an_unknown_rank_is_told_from_rank_zero(read: Reader) -> None:
    assert read(fill()).unranked == {"y"}
    scalar = model([node("Identity", ["x"], ["y"])], [value("x", F32, [])], [value("y", F32, [])])
    assert read(scalar).unranked == frozenset()


def test_initialisers_have_their_number_of_elements(read: Reader) -> None:
    assert read(optional_input()).elements == {"scale": 1}
    assert read(matmul(1000, 1000)).elements == {"w": 1_000_000}


def test_locations_of_external_data_are_found(read: Reader) -> None:
    assert read(external_data(location="a/b.data")[0]).external == {"a/b.data"}


def test_external_data_inside_a_subgraph_is_found(read: Reader) -> None:
    proto = onnx.load_from_string(slow())
    tensor = proto.graph.node[0].attribute[0].g.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../x")
    assert read(proto.SerializeToString()).external == {"../x"}


def test_a_long_list_attribute_is_passed_over_and_a_graph_behind_it_is_not(read: Reader) -> None:
    proto = onnx.load_from_string(slow())
    proto.graph.node[0].attribute.insert(0, helper.make_attribute("numbers", list(range(5000))))
    facts = read(proto.SerializeToString())
    assert facts.readable
    assert "Tanh" in facts.operators
    assert not facts.bounded


@pytest.mark.parametrize("what", ["empty", "truncated", "html", "zeros"])
def test_what_is_no_model_counts_as_one_that_may_do_anything(read: Reader, what: str) -> None:
    assert read(corrupt()[what]) == GraphFacts()


def test_a_missing_file_and_a_folder_are_no_models(tmp_path: Path) -> None:
    assert read_graph(tmp_path / "none.onnx") == GraphFacts()
    assert read_graph(tmp_path) == GraphFacts()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.sampled_from([add_one(), endless(), masked_mean(), external_data()[0]]), st.data())
def test_no_content_makes_reading_raise(read: Reader, content: bytes, data: st.DataObject) -> None:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 5))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    read(bytes(changed[: data.draw(st.integers(0, len(changed)))]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=300))
def test_no_noise_makes_reading_raise(read: Reader, content: bytes) -> None:
    read(content)
