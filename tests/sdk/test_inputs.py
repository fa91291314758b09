"""What people hold, to the arrays that a model takes."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inferway._errors import ConfigurationError, InvalidInputError
from inferway._inputs import fit, items_of, to_array
from inferway._signature import ModelMetadata, TensorSpec
from inferway._tensors import DTYPES


def model(*specs: TensorSpec) -> ModelMetadata:
    return ModelMetadata("m", ("1",), "test", specs, ())


def spec(datatype: str, *shape: int, name: str = "x", optional: bool = False) -> TensorSpec:
    return TensorSpec(name, datatype, shape, optional)


MATRIX = np.array([[1, 2], [3, 4]], np.float32)
FRAME = pd.DataFrame({"a": [1.0, 3.0], "b": [2.0, 4.0]})

VALUES: list[tuple[str, Any, TensorSpec, Any]] = [
    ("an array", MATRIX, spec("FP32", -1, 2), [[1, 2], [3, 4]]),
    ("an array of doubles", MATRIX.astype(np.float64), spec("FP32", -1, 2), [[1, 2], [3, 4]]),
    ("an array in another order", np.asfortranarray(MATRIX), spec("FP32", 2, 2), [[1, 2], [3, 4]]),
    ("a big-endian array", MATRIX.astype(">f4"), spec("FP32", -1, 2), [[1, 2], [3, 4]]),
    ("nested lists", [[1, 2], [3, 4]], spec("FP32", -1, 2), [[1, 2], [3, 4]]),
    ("tuples", ((1, 2), (3, 4)), spec("INT8", -1, 2), [[1, 2], [3, 4]]),
    ("a row without its batch axis", [1, 2], spec("INT64", -1, 2), [[1, 2]]),
    ("one value per row", [1, 2, 3], spec("FP64", -1, 1), [[1], [2], [3]]),
    ("a token sequence", [5, 6, 7], spec("INT64", -1, -1), [[5, 6, 7]]),
    ("a scalar", 5, spec("INT32"), 5),
    ("a scalar for a row", 5, spec("INT32", -1, 1), [[5]]),
    ("a boolean", True, spec("BOOL", 1), [True]),
    ("a numpy scalar", np.float32(0.5), spec("FP16", -1), [0.5]),
    ("the smallest and the largest", [0, 2**64 - 1], spec("UINT64", -1), [0, 2**64 - 1]),
    ("an empty list", [], spec("FP32", -1, 4), np.empty((0, 4)).tolist()),
    ("an empty list of text", [], spec("BYTES", -1), []),
    ("a text", "a\x00", spec("BYTES", -1), ["a\x00"]),
    ("a text for a row", "a", spec("BYTES", -1, 1), [["a"]]),
    ("bytes", b"\xff\x00", spec("BYTES", 1), [b"\xff\x00"]),
    ("texts", ["a", "b\x00"], spec("BYTES", -1), ["a", "b\x00"]),
    ("nested texts", [["a"], ["b"]], spec("BYTES", -1, 1), [["a"], ["b"]]),
    ("texts and bytes", ["a", b"b"], spec("BYTES", -1), ["a", b"b"]),
    ("an array of text", np.array(["a", "bc"]), spec("BYTES", -1), ["a", "bc"]),
    ("arrays in a list", [MATRIX[0], MATRIX[1]], spec("FP32", -1, 2), [[1, 2], [3, 4]]),
    ("arrays in lists in a list", [[MATRIX[0]], [MATRIX[1]]], spec("FP32", -1, 1, 2), [[[1, 2]], [[3, 4]]]),
    ("a pandas column", pd.Series([1, 2]), spec("FP32", -1), [1, 2]),
    ("a pandas column for rows", pd.Series([1, 2]), spec("FP32", -1, 1), [[1], [2]]),
    ("a pandas column of nullable integers", pd.Series([1, 2], dtype="Int64"), spec("INT32", -1), [1, 2]),
    ("a pandas column of text", pd.Series(["a", "b"]), spec("BYTES", -1), ["a", "b"]),
    ("a pandas category", pd.Series(["a", "b"], dtype="category"), spec("BYTES", -1), ["a", "b"]),
    ("a pandas column of objects", pd.Series([1, 2], dtype=object), spec("INT32", -1), [1, 2]),
    ("a pandas index", pd.Index([1, 2]), spec("INT32", -1), [1, 2]),
    ("a pandas frame", FRAME, spec("FP32", -1, 2), [[1, 2], [3, 4]]),
    ("a polars column", pl.Series([1, 2]), spec("FP32", -1), [1, 2]),
    ("a polars column of text", pl.Series(["a", "b"]), spec("BYTES", -1), ["a", "b"]),
    ("a polars column of lists", pl.Series([[1, 2], [3, 4]]), spec("FP32", -1, 2), [[1, 2], [3, 4]]),
    ("a polars column of arrays", pl.Series([[1, 2]], dtype=pl.Array(pl.Int8, 2)), spec("FP32", -1, 2), [[1, 2]]),
    ("a polars frame", pl.DataFrame({"a": [1, 3], "b": [2, 4]}), spec("FP32", -1, 2), [[1, 2], [3, 4]]),
    ("bfloat16", np.array([1.5], ml_dtypes.bfloat16), spec("FP32", -1), [1.5]),
]


@pytest.mark.parametrize(("value", "wanted_spec", "wanted"), [v[1:] for v in VALUES], ids=[v[0] for v in VALUES])
def test_a_value_becomes_the_array_that_the_model_takes(value: Any, wanted_spec: TensorSpec, wanted: Any) -> None:
    found = to_array(value, wanted_spec)
    assert found.dtype == wanted_spec.carrier
    assert found.flags.c_contiguous
    assert found.tolist() == wanted


REFUSED: list[tuple[str, Any, TensorSpec, str]] = [
    ("a wrong size", [[1, 2, 3]], spec("FP32", -1, 2), r"expects shape \[-1, 2\], FP32, got shape \[1, 3\]"),
    ("too many axes", [[[1, 2]]], spec("FP32", -1, 2), r"got shape \[1, 1, 2\]"),
    ("a scalar for a vector", 1, spec("FP32", 2), r"got shape \[\]"),
    ("a vector for a scalar", [1], spec("FP32"), r"got shape \[1\]"),
    ("ragged lists", [[1], [2, 3]], spec("FP32", -1, -1), "unequal length"),
    ("ragged texts", [["a"], ["b", "c"]], spec("BYTES", -1, 1), "list among it|got shape"),
    ("None", None, spec("FP32", -1), "got NoneType"),
    ("None in a list", [1, None], spec("FP32", -1), "NoneType"),
    ("text for numbers", ["1"], spec("FP32", -1), "expects FP32"),
    ("numbers for text", [1], spec("BYTES", -1), "expects BYTES"),
    ("a mapping", {"y": 1}, spec("FP32", -1), "got dict"),
    ("a set", {1}, spec("FP32", -1), "got set"),
    ("a generator", (i for i in [1]), spec("FP32", -1), "got generator"),
    ("a negative and a large one", [-1, 2**64 - 1], spec("UINT64", -1), "UINT64|unequal length or kind"),
    ("a huge integer", [2**70], spec("INT64", -1), "expects INT64"),
    ("masked elements", np.ma.array([1.0, 2.0], mask=[True, False]), spec("FP32", -1), "masked"),
    ("polars nulls", pl.Series([1, None]), spec("FP32", -1), "nulls"),
    ("pandas missing integers", pd.Series([1, None], dtype="Int64"), spec("INT64", -1), "expects INT64"),
    ("dates", pd.Series(pd.to_datetime(["2020-01-01"])), spec("INT64", -1), "datetime64"),
    ("complex numbers", [1j], spec("FP32", -1), "complex"),
]


@pytest.mark.parametrize(("value", "wanted_spec", "match"), [v[1:] for v in REFUSED], ids=[v[0] for v in REFUSED])
def test_a_value_that_does_not_fit_is_refused_by_name(value: Any, wanted_spec: TensorSpec, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match) as caught:
        to_array(value, wanted_spec)
    assert "'x'" in str(caught.value)
    assert caught.value.tensor == "x"


def test_missing_floats_stay_nan() -> None:
    found = to_array(pd.Series([1.0, None]), spec("FP32", -1))
    assert math.isnan(found[1])


def test_anything_with_an_array_inside_is_taken() -> None:
    class Held:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return MATRIX

    class Shared:
        def __dlpack__(self, **options: Any) -> Any:
            return MATRIX.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return MATRIX.__dlpack_device__()

    assert to_array(Held(), spec("FP32", -1, 2)).tolist() == MATRIX.tolist()
    assert to_array(Shared(), spec("FP32", -1, 2)).tolist() == MATRIX.tolist()


# --- torch -------------------------------------------------------------------------------------------------------


def test_torch_tensors_are_taken() -> None:
    torch = pytest.importorskip("torch")
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    wanted = [[1, 2], [3, 4]]
    assert to_array(matrix, spec("FP32", -1, 2)).tolist() == wanted
    assert to_array(matrix.detach().T, spec("FP32", -1, 2)).tolist() == [[1, 3], [2, 4]]
    assert to_array([matrix[0], matrix[1]], spec("FP32", -1, 2)).tolist() == wanted
    assert to_array(matrix.detach().to_sparse(), spec("FP32", -1, 2)).tolist() == wanted
    brain = matrix.detach().to(torch.bfloat16)
    assert to_array(brain, spec("FP32", -1, 2)).tolist() == wanted
    bits = np.array(wanted, ml_dtypes.bfloat16).view(np.uint16)
    assert to_array(brain, spec("BF16", -1, 2)).tolist() == bits.tolist()
    assert [item.tolist() for item in items_of(torch.arange(3), 2)] == [[0, 1], [2]]


# --- images ------------------------------------------------------------------------------------------------------

RED = Image.new("RGB", (3, 2), (255, 0, 0))


@pytest.mark.parametrize(
    ("value", "wanted_spec", "shape"),
    [
        (RED, spec("UINT8", -1, 2, 3, 3), (1, 2, 3, 3)),
        (RED, spec("UINT8", 2, 3, 3), (2, 3, 3)),
        (RED, spec("FP32", -1, 3, -1, -1), (1, 3, 2, 3)),
        (RED, spec("FP32", 3, 2, 3), (3, 2, 3)),
        ([RED, RED], spec("UINT8", -1, 2, 3, 3), (2, 2, 3, 3)),
        ([RED, RED], spec("FP32", -1, 3, 2, 3), (2, 3, 2, 3)),
        (RED.convert("L"), spec("UINT8", -1, 2, 3, 3), (1, 2, 3, 3)),
        (RED.convert("L"), spec("UINT8", 2, 3), (2, 3)),
        (RED.convert("L"), spec("UINT8", -1, 2, 3, 1), (1, 2, 3, 1)),
        (RED.convert("L"), spec("FP32", 1, 1, 2, 3), (1, 1, 2, 3)),
        (RED.convert("P"), spec("UINT8", -1, 2, 3, 3), (1, 2, 3, 3)),
        (RED, spec("UINT8", -1, 2, 3, 4), (1, 2, 3, 4)),
        (RED.convert("F"), spec("FP32", 2, 3), (2, 3)),
        (RED, spec("UINT8", -1, -1, -1, -1), (1, 2, 3, 3)),
    ],
)
def test_an_image_is_laid_out_as_the_model_wants(value: Any, wanted_spec: TensorSpec, shape: tuple[int, ...]) -> None:
    assert to_array(value, wanted_spec).shape == shape


def test_channels_keep_their_values_in_either_order() -> None:
    last = to_array(RED, spec("UINT8", 1, 2, 3, 3))
    first = to_array(RED, spec("FP32", 1, 3, 2, 3))
    assert last[0, 0, 0].tolist() == [255, 0, 0]
    assert first[0, :, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("image", "wanted_spec"),
    [
        (RED, spec("UINT8", -1, 2, 3, 1)),
        (RED.convert("RGBA"), spec("UINT8", -1, 2, 3, 3)),
        (RED.convert("CMYK"), spec("UINT8", -1, 2, 3, 3)),
        (RED, spec("UINT8", 2, 3)),
    ],
)
def test_an_image_that_would_lose_something_is_refused(image: Image.Image, wanted_spec: TensorSpec) -> None:
    with pytest.raises(InvalidInputError, match="mode"):
        to_array(image, wanted_spec)


def test_a_palette_with_transparency_is_no_rgb() -> None:
    image = RED.convert("P")
    image.info["transparency"] = 0
    with pytest.raises(InvalidInputError, match="mode RGB, got P"):
        to_array(image, spec("UINT8", -1, 2, 3, 3))


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="expects shape"):
        to_array(RED, spec("UINT8", -1, 224, 224, 3))


# --- names -------------------------------------------------------------------------------------------------------

TWO = model(spec("FP32", -1, name="a"), spec("FP32", -1, name="b"))


@pytest.mark.parametrize(
    "inputs",
    [
        {"a": [1, 3], "b": [2, 4]},
        {"b": [2, 4], "a": [1, 3]},
        FRAME,
        pl.DataFrame({"a": [1, 3], "b": [2, 4]}),
        [{"a": 1, "b": 2}, {"a": 3, "b": 4}],
    ],
)
def test_inputs_find_their_names(inputs: Any) -> None:
    found = {tensor.name: array.tolist() for tensor, array in fit(TWO, inputs)}
    assert found == {"a": [1, 3], "b": [2, 4]}


def test_the_only_input_needs_no_name() -> None:
    one = model(spec("FP32", -1, 2))
    for inputs in (MATRIX, MATRIX.tolist(), FRAME, pl.DataFrame({"a": [1, 3], "b": [2, 4]})):
        assert [array.tolist() for _, array in fit(one, inputs)] == [MATRIX.tolist()]


def test_the_only_required_input_needs_no_name() -> None:
    some = model(spec("FP32", -1), spec("FP32", -1, name="scale", optional=True))
    assert [tensor.name for tensor, _ in fit(some, [1, 2])] == ["x"]
    assert [tensor.name for tensor, _ in fit(some, {"x": [1], "scale": [2]})] == ["x", "scale"]
    assert [tensor.name for tensor, _ in fit(model(spec("FP32", -1, optional=True)), [1])] == ["x"]


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"a": [1]}, "missing 'b'"),
        ({"a": [1], "b": [1], "c": [1]}, "'c' is no input of m, expected 'a', 'b'"),
        ({"a": [1], 3: [1]}, "'3' is no input"),
        ({}, "missing 'a', 'b'"),
        ([1, 2], "takes 2 inputs: expected a mapping"),
        (MATRIX, "takes 2 inputs"),
        (pd.DataFrame({"a": [1], "z": [2]}), "data frame with the columns 'a', 'z'"),
        ([{"a": 1, "b": 2}, {"a": 3}], "row 1 has other names"),
        ([{"a": 1, "b": 2}, 5], "row 1 has other names"),
        ([], "takes 2 inputs"),
    ],
)
def test_wrong_names_are_refused(inputs: Any, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        fit(TWO, inputs)


def test_another_mapping_than_a_dictionary_is_taken() -> None:
    from types import MappingProxyType

    found = fit(TWO, MappingProxyType({"a": [1], "b": [2]}))
    assert [array.tolist() for _, array in found] == [[1], [2]]


def test_without_a_signature_arrays_keep_their_own_datatype() -> None:
    found = fit(model(), {"x": np.zeros((2, 3), np.int16), "s": ["a"], "f": [0.5]})
    assert [(tensor.name, tensor.datatype, array.shape) for tensor, array in found] == [
        ("x", "INT16", (2, 3)),
        ("s", "BYTES", (1,)),
        ("f", "FP64", (1,)),
    ]


@given(st.data(), st.sampled_from([name for name in DTYPES if name != "BYTES"]))
def test_what_fits_already_is_taken_as_it_is(data: st.DataObject, datatype: str) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=4)))
    pattern = tuple(data.draw(st.sampled_from([dim, -1])) for dim in shape)
    array = np.zeros(shape, DTYPES[datatype])
    [(_, found)] = fit(model(spec(datatype, *pattern)), {"x": array})
    assert found is array


# --- many inputs -------------------------------------------------------------------------------------------------


def test_one_array_or_frame_is_cut_along_its_rows() -> None:
    assert [item.tolist() for item in items_of(MATRIX, None)] == [[[1, 2]], [[3, 4]]]
    assert [item.tolist() for item in items_of(np.arange(5), 2)] == [[0, 1], [2, 3], [4]]
    assert [item.to_numpy().tolist() for item in items_of(FRAME, 1)] == [[[1, 2]], [[3, 4]]]
    assert [item.to_list() for item in items_of(pd.Series([1, 2, 3], index=[9, 8, 7]), 2)] == [[1, 2], [3]]
    assert [item.height for item in items_of(pl.DataFrame({"a": [1, 2, 3]}), 2)] == [2, 1]


def test_other_iterables_are_taken_item_by_item() -> None:
    assert list(items_of(iter([1, 2]), None)) == [1, 2]


@pytest.mark.parametrize(
    ("items", "batch_size"),
    [(5, None), ("text", None), (b"text", None), ({"a": 1}, None), ([1], 2), (MATRIX, 0), (MATRIX, True), (RED, None)],
)
def test_what_is_no_iterable_of_inputs_is_refused(items: Any, batch_size: Any) -> None:
    with pytest.raises(ConfigurationError):
        items_of(items, batch_size)


def test_no_library_is_imported_to_look_at_a_value() -> None:
    code = """
import sys
from inferway._inputs import to_array
from inferway._signature import TensorSpec
to_array([[1.0, 2.0]], TensorSpec("x", "FP32", (-1, 2)))
assert not {"pandas", "polars", "torch", "PIL"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
