from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from inferway_gateway.backends.remote import oip
from inferway_gateway.core.errors import UpstreamError
from inferway_gateway.core.tensors import DTYPES, Signature, TensorSpec

FIXED = sorted(set(DTYPES) - {"BYTES"})


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, NDArray[Any]]:
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    if datatype == "BYTES":
        value = np.empty(shape, object)
        for index in np.ndindex(shape):
            value[index] = draw(st.text(max_size=5))
        return datatype, value
    return datatype, draw(arrays.arrays(DTYPES[datatype], shape))


def body_of(parts: list[Any]) -> bytes:
    return b"".join(bytes(part) for part in parts)


@given(st.lists(tensors(), max_size=4), st.booleans())
def test_what_is_encoded_is_what_is_decoded(found: list[tuple[str, NDArray[Any]]], binary: bool) -> None:
    if not binary:
        found = [(datatype, value) for datatype, value in found if datatype not in ("FP16", "BF16")]
    specs = tuple(TensorSpec(f"t{i}", datatype, (-1,) * value.ndim) for i, (datatype, value) in enumerate(found))
    signature = Signature(specs, specs)
    inputs = {f"t{i}": value for i, (_, value) in enumerate(found)}
    parts, length = oip.encode_request(signature, inputs, [], binary=binary)
    body = body_of(parts)
    head = json.loads(body[:length])
    # A server that gives its inputs back answers with the same tensors under another name of the list.
    text = json.dumps({"outputs": head["inputs"]}).encode()
    answer = text + (body[length:] if length is not None else b"")
    header = None if length is None else str(len(text))
    decoded = oip.decode_answer(signature, tuple(inputs), answer, header, None)
    for value, back in zip(inputs.values(), decoded, strict=True):
        assert back.dtype == value.dtype
        assert back.shape == value.shape
        assert back.flags.c_contiguous
        np.testing.assert_array_equal(back, value)


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 300).map(str), st.text(max_size=5)))
def test_noise_is_an_error_of_the_upstream(noise: bytes, header: str | None) -> None:
    spec = TensorSpec("y", "FP32", (-1,))
    with pytest.raises(UpstreamError):
        oip.decode_answer(Signature((), (spec,)), ("y",), noise, header, None)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {"name": st.just("y")},
        optional={
            "datatype": st.sampled_from(["FP32", "INT64", "BYTES", "BOOL"]) | JSON_VALUES,
            "shape": st.lists(st.integers(-2, 2**70), max_size=3) | JSON_VALUES,
            "data": JSON_VALUES,
            "parameters": st.fixed_dictionaries(
                {}, optional={"binary_data_size": st.integers(-1, 2**70) | JSON_VALUES}
            ),
        },
    ),
    st.sampled_from(["FP32", "INT64", "BYTES", "BOOL", "FP16"]),
    st.binary(max_size=16),
)
def test_a_tensor_is_what_was_promised_or_an_error(item: dict[str, Any], datatype: str, rest: bytes) -> None:
    spec = TensorSpec("y", datatype, (-1, -1))
    text = json.dumps({"outputs": [item]}).encode()
    try:
        (value,) = oip.decode_answer(Signature((), (spec,)), ("y",), text + rest, str(len(text)), None)
    except UpstreamError:
        return
    assert value.dtype == DTYPES[datatype]
    assert value.ndim == 2


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_what_json_cannot_carry_is_not_sent_as_json(datatype: str) -> None:
    spec = TensorSpec("x", datatype, (-1,))
    with pytest.raises(UpstreamError, match="no form in JSON"):
        oip.encode_request(Signature((spec,), ()), {"x": np.zeros(2, DTYPES[datatype])}, [], binary=False)


def test_null_is_read_as_not_a_number() -> None:
    spec = TensorSpec("y", "FP32", (-1,))
    body = b'{"outputs":[{"name":"y","datatype":"FP32","shape":[2],"data":[null,1]}]}'
    (value,) = oip.decode_answer(Signature((), (spec,)), ("y",), body, None, None)
    np.testing.assert_array_equal(value, np.array([np.nan, 1], np.float32))


def test_what_is_not_finite_is_written_and_read_as_tokens() -> None:
    spec = TensorSpec("x", "FP64", (-1,))
    parts, _ = oip.encode_request(Signature((spec,), ()), {"x": np.array([np.nan, np.inf])}, [], binary=False)
    assert b"NaN" in body_of(parts)
    assert b"Infinity" in body_of(parts)


@pytest.mark.parametrize(
    ("batched", "shape", "wanted"),
    [(None, [-1, 2], True), (None, [1, 2], False), (None, [], False), (False, [-1], False), (True, [-1], True)],
    ids=str,
)
def test_rows_are_counted_where_every_first_dimension_is_open(
    batched: bool | None, shape: list[int], wanted: bool
) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": shape}
    text = json.dumps({"inputs": [tensor], "outputs": [tensor]}).encode()
    assert oip.read_signature(text, batched).batched == wanted


def test_a_model_without_open_dimensions_cannot_be_called_batched() -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1]}
    with pytest.raises(UpstreamError, match="first dimension of -1"):
        oip.read_signature(json.dumps({"inputs": [tensor], "outputs": [tensor]}).encode(), True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": "too\\u0007 large"}', "too  large"),
        (b'{"error": {"message": "no"}}', "no"),
        (b'{"detail": "no"}', "no"),
        (b'{"detail": [1]}', ""),
        (b"<html>", ""),
        (b'{"error": "' + b"x" * 1000 + b'"}', "x" * 300),
    ],
    ids=["control", "openai", "problem", "list", "html", "long"],
)
def test_an_upstreams_words_are_made_fit_for_a_message(body: bytes, said: str) -> None:
    assert oip.read_error(body) == said


def test_a_models_name_cannot_lead_elsewhere() -> None:
    assert oip.model_path("b/a?b#c", "1/x") == "/v2/models/b%2Fa%3Fb%23c/versions/1%2Fx"


@pytest.mark.parametrize(
    ("model", "version"), [("..", None), (".", "1"), ("a", ".."), ("../../api", "1"), ("a/./b", None), ("a\\..", None)]
)
def test_names_that_are_ways_in_a_path_are_none(model: str, version: str | None) -> None:
    with pytest.raises(UpstreamError, match="between slashes"):
        oip.model_path(model, version)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"outputs":[' + b"[]," * 1_000_001 + b"[]]}", "at most 1000000 arrays"),
        (b" " * ((32 << 20) + 1), "at most 33554432 bytes of JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": NaN' + b"[" * 100_000, "not JSON"),
    ],
    ids=["many-arrays", "long", "deep", "deep-with-a-token"],
)
def test_json_that_would_fill_the_memory_is_not_parsed(body: bytes, words: str) -> None:
    with pytest.raises(UpstreamError, match=words):
        oip.parse_json(body)
