"""Reading an ONNX file's structure without onnx: held against onnx itself."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import models
from inferway._onnx import NotOnnx, OnnxFacts, read_facts

SAMPLES: dict[str, bytes] = {
    "add_sub": models.add_sub(),
    "all_types": models.identity_all(leave_out=()),
    "scalar": models.scalar_add(),
    "optional": models.optional_input(),
    "text": models.masked_mean(),
    "loop": models.slow(),
    "external": models.external_data()[0],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_signature_is_what_onnx_reads(name: str) -> None:
    proto = onnx.load_model_from_string(SAMPLES[name])
    signature = read_facts(SAMPLES[name]).signature
    assert signature is not None
    for specs, values in ((signature.inputs, proto.graph.input), (signature.outputs, proto.graph.output)):
        assert [spec.name for spec in specs] == [value.name for value in values]
        for spec, value in zip(specs, values, strict=True):
            assert models.ELEMENT_TYPES[spec.datatype] == value.type.tensor_type.elem_type
            dims = value.type.tensor_type.shape.dim
            assert spec.shape == tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)


def test_an_input_with_a_default_is_optional() -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    node = helper.make_node("Add", ["x", "w"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "w", "y")]
    graph = helper.make_graph([node], "g", values[:2], values[2:], [weight])
    signature = read_facts(helper.make_model(graph).SerializeToString()).signature
    assert signature is not None
    assert signature.required == ("x",)


@pytest.mark.parametrize(
    "shape", [models.value("y", models.F32, None), helper.make_tensor_sequence_value_info("y", models.F32, [2])]
)
def test_what_is_no_tensor_of_a_known_rank_leaves_the_signature_open(shape: onnx.ValueInfoProto) -> None:
    graph = helper.make_graph([], "g", [models.value("x", models.F32, [2])], [shape])
    assert read_facts(helper.make_model(graph).SerializeToString()).signature is None


def external(location: str, name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def hidden_in_places() -> dict[str, onnx.ModelProto]:
    """Weights in every place of a model that may hold some, each in a file that is called after it."""
    sparse = onnx.SparseTensorProto(
        values=external("sparse"), indices=helper.make_tensor("i", TensorProto.INT64, [1], [0])
    )
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=external("branch"))], "inner", [], [])
    loop = helper.make_node("Loop", [], ["l"], body=inner)
    function = helper.make_function(
        "d", "F", [], ["c"], [helper.make_node("Constant", [], ["c"], value=external("function"))], []
    )
    places: dict[str, dict[str, Any]] = {
        "initializer": {"initializer": [external("initializer")]},
        "sparse": {"sparse_initializer": [sparse]},
        "constant": {"nodes": [helper.make_node("Constant", [], ["c"], value=external("constant"))]},
        "list": {"nodes": [helper.make_node("F", [], ["c"], tensors=[external("list")])]},
        "branch": {"nodes": [loop]},
    }
    made = {
        place: helper.make_model(helper.make_graph(parts.pop("nodes", []), "g", [], [], **parts))
        for place, parts in places.items()
    }
    made["function"] = helper.make_model(helper.make_graph([], "g", [], []), functions=[function])
    made["training"] = helper.make_model(helper.make_graph([], "g", [], []))
    made["training"].training_info.add().algorithm.initializer.append(external("training"))
    return made


@pytest.mark.parametrize("place", hidden_in_places())
def test_weights_files_are_found_wherever_a_model_may_name_one(place: str) -> None:
    assert read_facts(hidden_in_places()[place].SerializeToString()).locations == (place,)


def test_a_file_that_several_tensors_name_is_named_once() -> None:
    graph = helper.make_graph([], "g", [], [], [external("a"), external("b", "v"), external("a", "u")])
    assert read_facts(helper.make_model(graph).SerializeToString()).locations == ("a", "b")


def test_a_tensor_that_holds_its_elements_names_no_file_whatever_else_it_says() -> None:
    tensor = external("elsewhere")
    tensor.data_location = TensorProto.DEFAULT
    graph = helper.make_graph([], "g", [], [], [tensor])
    assert read_facts(helper.make_model(graph).SerializeToString()).locations == ()


def test_a_tensor_elsewhere_without_a_file_is_no_model() -> None:
    tensor = external("a")
    del tensor.external_data[:]
    graph = helper.make_graph([], "g", [], [], [tensor])
    with pytest.raises(NotOnnx, match="the file's name is missing"):
        read_facts(helper.make_model(graph).SerializeToString())


def test_weights_are_skipped_and_not_read(tmp_path: Path) -> None:
    class Counting:
        """Bytes that count how many of them are looked at."""

        def __init__(self, data: bytes) -> None:
            self.data = data
            self.seen = 0

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, at: Any) -> Any:
            found = self.data[at]
            self.seen += len(found) if isinstance(found, bytes) else 1
            return found

    data = Counting(models.matmul(width=512, classes=512))
    assert len(data) > 1_000_000
    assert read_facts(data).signature is not None
    assert data.seen < 2000


def test_a_mapped_file_is_read_like_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(SAMPLES["external"])
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert read_facts(mapped) == read_facts(SAMPLES["external"])


@pytest.mark.parametrize(
    "data", [b"", b"text, no model", b"\x80" * 20, b"\x00\x01", b"\x3a\x7f\x00", b"\x3b\x00", b"PK\x03\x04" + bytes(40)]
)
def test_what_is_no_model_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(NotOnnx):
        read_facts(data)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_a_damaged_model_is_read_or_refused_and_nothing_else(name: str, data: st.DataObject) -> None:
    whole = bytearray(SAMPLES[name])
    cut = data.draw(st.integers(0, len(whole)))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        facts = read_facts(bytes(whole[:cut]))
    except NotOnnx:
        return
    assert isinstance(facts, OnnxFacts)


def test_deep_nesting_needs_no_stack() -> None:
    graph = helper.make_graph([], "g", [], [], [external("deep")])
    data = graph.SerializeToString()
    for _ in range(3000):
        # attribute.g = graph, node.attribute, graph.node: written by hand, because protobuf itself refuses such depth.
        for tag in (6, 5, 1):
            length = len(data)
            prefix = bytearray([tag << 3 | 2])
            while length >= 0x80:
                prefix.append(length & 0x7F | 0x80)
                length >>= 7
            data = bytes(prefix) + bytes([length]) + data
    length = len(data)
    prefix = bytearray([7 << 3 | 2])
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    assert read_facts(bytes(prefix) + bytes([length]) + data).locations == ("deep",)
