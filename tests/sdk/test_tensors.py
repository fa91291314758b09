"""Arrays to and from wire tensors."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from inferway._errors import InvalidInputError, MalformedAnswer
from inferway._tensors import (
    DTYPES,
    cast_to,
    datatype_of,
    frames,
    json_data,
    layout_of,
    read_outputs,
    widen_bf16,
)
from inferway_contract import names

NUMBERS = [name for name in DTYPES if name not in ("BYTES", "BF16")]


def test_datatypes_are_those_of_the_contract_with_their_sizes() -> None:
    assert set(DTYPES) == set(names.DATATYPE_BYTES)
    for name, size in names.DATATYPE_BYTES.items():
        assert DTYPES[name].itemsize == (size if size is not None else 8)


def binary(name: str, datatype: str, array: NDArray[Any]) -> tuple[dict[str, Any], bytes]:
    data = frames(array) if datatype == "BYTES" else array.tobytes()
    shape = list(array.shape)
    return (
        {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(data)}},
        data,
    )


def roundtrip(datatype: str, array: NDArray[Any], prefix: bytes = b"", large: bool = False) -> NDArray[Any]:
    output, data = binary("y", datatype, array)
    body: bytes | bytearray = prefix + data
    return read_outputs(layout_of([output]), bytearray(body) if large else body, len(prefix))["y"]


@given(st.data(), st.sampled_from(NUMBERS), st.booleans(), st.integers(0, 9))
def test_reading_undoes_writing(data: st.DataObject, datatype: str, large: bool, offset: int) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    array = data.draw(hnp.arrays(DTYPES[datatype], shape))
    found = roundtrip(datatype, array, b"x" * offset, large)
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()
    assert found.flags.aligned
    assert found.flags.writeable


@given(st.lists(st.text() | st.binary(), max_size=8))
def test_text_and_bytes_survive_with_nulls_and_what_is_no_utf8(elements: list[str | bytes]) -> None:
    array = np.empty(len(elements), object)
    array[:] = elements
    found = roundtrip("BYTES", cast_to(array, "BYTES", "x"))
    for element, back in zip(elements, found, strict=True):
        raw = element.encode("utf-8", "surrogateescape") if isinstance(element, str) else element
        assert isinstance(back, str)
        assert back.encode("utf-8", "surrogateescape") == raw


def test_an_output_may_stand_beside_others_of_any_kind() -> None:
    a, da = binary("a", "INT8", np.array([1, 2, 3], np.int8))
    b, db = binary("b", "FP64", np.array([0.5]))
    c = {"name": "c", "datatype": "INT64", "shape": [2], "data": [7, 8]}
    d, dd = binary("d", "FP32", np.empty((0, 3), np.float32))
    e, de = binary("e", "BYTES", np.array(["é", ""], object))
    found = read_outputs(layout_of([a, b, c, d, e]), b"head" + da + db + dd + de, 4)
    assert list(found) == ["a", "b", "c", "d", "e"]
    assert found["b"].tolist() == [0.5]
    assert found["c"].tolist() == [7, 8]
    assert found["d"].shape == (0, 3)
    assert found["e"].tolist() == ["é", ""]


# --- casts -------------------------------------------------------------------------------------------------------

LOSSLESS: list[tuple[Any, str]] = [
    (np.array([1, 2], np.int32), "INT64"),
    (np.array([1, 2], np.int64), "INT8"),
    (np.array([0, 255], np.int64), "UINT8"),
    (np.array([1, 2**24], np.int64), "FP32"),
    (np.array([2**53], np.int64), "FP64"),
    (np.array([2**60], np.int64), "FP32"),
    (np.array([1.0, -3.0], np.float64), "INT16"),
    (np.array([0.0, 1.0], np.float64), "BOOL"),
    (np.array([0, 1], np.int64), "BOOL"),
    (np.array([True, False]), "FP16"),
    (np.array([True, False]), "INT8"),
    (np.array([0.5, math.inf, -math.inf], np.float64), "FP32"),
    (np.array([1.0, 2.5], np.float32), "FP16"),
    (np.array([1, 2.5], object), "FP32"),
    (np.array([], np.float64), "INT64"),
    (np.array(3, np.int64), "FP32"),
    (np.arange(6).reshape(2, 3)[:, ::2], "INT32"),
    (np.array([1, 2], ">i4"), "INT32"),
]


@pytest.mark.parametrize(("array", "datatype"), LOSSLESS)
def test_a_cast_keeps_every_value(array: NDArray[Any], datatype: str) -> None:
    found = cast_to(array, datatype, "x")
    assert found.dtype == DTYPES[datatype]
    assert found.shape == array.shape
    assert found.flags.c_contiguous
    assert found.tolist() == array.tolist()


LOSSY: list[tuple[Any, str]] = [
    (np.array([128], np.int64), "INT8"),
    (np.array([-1], np.int64), "UINT64"),
    (np.array([2**63], np.uint64), "INT64"),
    (np.array([2**24 + 1], np.int64), "FP32"),
    (np.array([2**53 + 1], np.int64), "FP64"),
    (np.array([70000], np.int64), "FP16"),
    (np.array([0.5], np.float64), "INT32"),
    (np.array([math.nan], np.float64), "INT32"),
    (np.array([math.inf], np.float64), "INT64"),
    (np.array([2.0**63], np.float64), "INT64"),
    (np.array([2], np.int64), "BOOL"),
    (np.array([0.5], np.float64), "BOOL"),
    (np.array([1e39], np.float64), "FP32"),
    (np.array([1e5], np.float32), "FP16"),
    (np.array([3.4e38], np.float32), "BF16"),
    (np.array([1 + 2j]), "FP32"),
    (np.array(["1"]), "FP32"),
    (np.array([b"1"], object), "INT64"),
    (np.array([None], object), "FP32"),
    (np.array([[1], [1, 2]], object), "FP32"),
    (np.array(["2020-01-01"], "M8[D]"), "INT64"),
    (np.array([1, 2]), "BYTES"),
    (np.array([1, "a"], object), "BYTES"),
]


@pytest.mark.parametrize(("array", "datatype"), LOSSY)
def test_a_cast_that_would_lose_something_is_refused(array: NDArray[Any], datatype: str) -> None:
    with pytest.raises(InvalidInputError, match="input 'x' expects"):
        cast_to(array, datatype, "input 'x'")


def test_the_very_array_is_taken_where_nothing_is_to_be_done() -> None:
    array = np.arange(4, dtype=np.float32)
    assert cast_to(array, "FP32", "x") is array


@given(hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)))
def test_bf16_rounds_to_nearest_even_as_ml_dtypes_does(array: NDArray[np.float32]) -> None:
    with np.errstate(over="ignore"):
        wanted = array.astype(ml_dtypes.bfloat16)
    if (np.isinf(wanted.astype(np.float32)) & np.isfinite(array)).any():
        with pytest.raises(InvalidInputError):
            cast_to(array, "BF16", "x")
        return
    bits = cast_to(array, "BF16", "x")
    ours, theirs = widen_bf16(bits), wanted.astype(np.float32)
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert np.array_equal(np.signbit(ours[ours == 0]), np.signbit(theirs[theirs == 0]))


def test_bf16_takes_bits_and_ml_dtypes_and_comes_back_as_float32() -> None:
    values = np.array([1.5, -2.0, math.nan], np.float32)
    brain = values.astype(ml_dtypes.bfloat16)
    bits = brain.view(np.uint16)
    assert cast_to(bits, "BF16", "x").tolist() == bits.tolist()
    assert cast_to(brain, "BF16", "x").tolist() == bits.tolist()
    assert cast_to(brain, "FP32", "x").tolist()[:2] == [1.5, -2.0]
    found = roundtrip("BF16", bits)
    assert found.dtype == np.float32
    assert np.array_equal(found, values, equal_nan=True)


@pytest.mark.parametrize(
    ("array", "datatype"),
    [
        (np.zeros(1, np.float32), "FP32"),
        (np.zeros(1, ">i8"), "INT64"),
        (np.zeros(1, bool), "BOOL"),
        (np.array(["a"]), "BYTES"),
        (np.array([b"a"]), "BYTES"),
        (np.zeros(1, ml_dtypes.bfloat16), "BF16"),
    ],
)
def test_an_array_names_its_own_datatype(array: NDArray[Any], datatype: str) -> None:
    assert datatype_of(array) == datatype


def test_an_array_without_a_datatype_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="complex"):
        datatype_of(np.zeros(1, complex))


# --- JSON --------------------------------------------------------------------------------------------------------


def from_json(datatype: str, shape: list[int], data: object) -> NDArray[Any]:
    outputs = [{"name": "y", "datatype": datatype, "shape": shape, "data": data}]
    return read_outputs(layout_of(outputs), b"{}", 2)["y"]


def test_json_data_is_flat_with_bare_tokens() -> None:
    array = np.array([[1.0, math.nan], [math.inf, -math.inf]], np.float32)
    assert json_data(array, "FP32", "x") == "[1.0,NaN,Infinity,-Infinity]"
    assert json_data(np.array([True, False]), "BOOL", "x") == "[true,false]"
    assert json_data(np.array("é", object), "BYTES", "x") == '["\\u00e9"]'


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_has_no_json_form(datatype: str) -> None:
    with pytest.raises(InvalidInputError, match="binary=True"):
        json_data(np.zeros(1, DTYPES[datatype]), datatype, "x")


def test_bytes_that_are_no_text_have_no_json_form() -> None:
    with pytest.raises(InvalidInputError, match="no UTF-8"):
        json_data(np.array([b"\xff"], object), "BYTES", "x")


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "wanted"),
    [
        ("FP32", [2, 2], [[1, 2.5], [3, 4]], [[1, 2.5], [3, 4]]),
        ("FP32", [2], [1, None], None),
        ("INT64", [2], [-(2**63), 2**63 - 1], [-(2**63), 2**63 - 1]),
        ("UINT64", [2], [0, 2**64 - 1], [0, 2**64 - 1]),
        ("FP32", [2], [1, 2], [1, 2]),
        ("BOOL", [2], [True, False], [True, False]),
        ("BYTES", [1, 2], ["a", "\x00b"], [["a", "\x00b"]]),
        ("FP64", [0, 3], [], []),
        ("FP32", [], [5], 5.0),
        ("BF16", [1], [1.5], [1.5]),
        ("BYTES", [0], [], []),
    ],
)
def test_json_outputs_are_read(datatype: str, shape: list[int], data: object, wanted: object) -> None:
    found = from_json(datatype, shape, data)
    assert list(found.shape) == shape
    if wanted is None:
        assert math.isnan(found[1])
    else:
        assert found.tolist() == wanted


def test_a_deep_list_is_flattened_without_recursion() -> None:
    nested: Any = [1.0]
    for _ in range(5000):
        nested = [nested]
    assert from_json("FP32", [1], nested).tolist() == [1.0]


GOOD = {"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}


@pytest.mark.parametrize(
    ("outputs", "tail", "match"),
    [
        (None, 0, "list of outputs"),
        ({}, 0, "list of outputs"),
        (["y"], 0, "as an object"),
        ([{**GOOD, "name": 3}], 8, "name"),
        ([GOOD, GOOD], 16, "all different"),
        ([{**GOOD, "datatype": "FP7"}], 8, "protocol lacks"),
        ([{**GOOD, "datatype": ["FP32"]}], 8, "protocol lacks"),
        ([{**GOOD, "shape": None}], 8, "dimensions"),
        ([{**GOOD, "shape": [-1]}], 8, "dimension -1"),
        ([{**GOOD, "shape": [True]}], 8, "dimension True"),
        ([{**GOOD, "shape": [1.5]}], 8, "dimension 1.5"),
        ([{**GOOD, "shape": [1] * 65}], 8, "65 dimensions"),
        ([{**GOOD, "shape": [3]}], 8, "8 bytes, expected 12"),
        ([{**GOOD, "shape": [2**62, 4]}], 8, "8 bytes"),
        ([{**GOOD, "parameters": {"binary_data_size": -8}}], 8, "binary_data_size -8"),
        ([{**GOOD, "parameters": {"binary_data_size": "8"}}], 8, "binary_data_size '8'"),
        ([GOOD], 7, "8 bytes of tensors are announced, 7 came"),
        ([GOOD], 9, "8 bytes of tensors are announced, 9 came"),
        ([{**GOOD, "shape": [0, 2**70], "parameters": {"binary_data_size": 0}}], 0, "no array can have"),
        ([{**GOOD, "parameters": {}}], 0, "neither data"),
        ([{**GOOD, "parameters": [], "data": {}}], 0, "neither data"),
        ([{**GOOD, "parameters": None, "data": [1]}], 0, "1 elements, expected 2"),
        ([{**GOOD, "parameters": None, "data": ["a", "b"]}], 0, "FP32"),
        ([{**GOOD, "parameters": None, "data": [1, {}]}], 0, "FP32"),
        ([{**GOOD, "datatype": "INT8", "parameters": None, "data": [1, 300]}], 0, "INT8"),
        ([{**GOOD, "datatype": "INT8", "parameters": None, "data": [1, 0.5]}], 0, "INT8"),
        ([{**GOOD, "datatype": "INT8", "parameters": None, "data": [1, None]}], 0, "INT8"),
        ([{**GOOD, "datatype": "UINT64", "parameters": None, "data": [1, 2**64]}], 0, "UINT64"),
        ([{**GOOD, "datatype": "BOOL", "parameters": None, "data": [1, 0]}], 0, "BOOL"),
        ([{**GOOD, "datatype": "BYTES", "parameters": None, "data": ["a", 1]}], 0, "text only"),
        ([{**GOOD, "datatype": "BYTES", "parameters": None, "data": ["a", ["b", "c"]]}], 0, "3 elements"),
    ],
)
def test_outputs_that_break_the_protocol_are_refused(outputs: object, tail: int, match: str) -> None:
    with pytest.raises(MalformedAnswer, match=match):
        read_outputs(layout_of(outputs), b"h" * tail, 0)


@pytest.mark.parametrize(
    ("shape", "data", "match"),
    [
        ([1], b"\x05\x00\x00\x00abc", "ends within element 0"),
        ([1], b"\x01\x00", "too few"),
        ([2], b"\x08\x00\x00\x00abcdefgh", "ends within element 1"),
        ([1], b"\x00\x00\x00\x00more", "4 bytes after its last"),
        ([10**12], b"\x00\x00\x00\x00", "too few"),
        ([1], b"\xff\xff\xff\xff" + b"x" * 8, "ends within element 0"),
    ],
)
def test_text_that_is_framed_wrongly_is_refused(shape: list[int], data: bytes, match: str) -> None:
    output = {"name": "y", "datatype": "BYTES", "shape": shape, "parameters": {"binary_data_size": len(data)}}
    with pytest.raises(MalformedAnswer, match=match):
        read_outputs(layout_of([output]), data, 0)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["name", "datatype", "shape", "data", "parameters", "binary_data_size"]), inner
            )
        ),
        max_leaves=20,
    ),
    st.binary(max_size=16),
)
def test_whatever_comes_is_an_array_or_a_typed_refusal(outputs: object, tail: bytes) -> None:
    try:
        found = read_outputs(layout_of(outputs), tail, 0)
    except MalformedAnswer:
        return
    assert all(isinstance(array, np.ndarray) for array in found.values())
