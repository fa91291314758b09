"""Inference bodies: what is read from them, what is written, and how the wrong ones are refused."""

from __future__ import annotations

import gc
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from inferway_gateway.core.errors import GatewayError, InvalidParameterError, InvalidTensorError, PayloadTooLargeError
from inferway_gateway.core.errors import MalformedRequestError as Malformed
from inferway_gateway.core.tensors import DTYPES, Signature, TensorSpec
from inferway_gateway.http.codec import (
    CLASSIFICATION_LIMIT,
    JSON_STRUCTURE_LIMIT,
    OFF_LOOP_ELEMENTS,
    OFF_LOOP_JSON_BYTES,
    DecodedRequest,
    OutputForm,
    SignatureCodec,
    classify,
    load_json,
    to_json,
)

LIMIT = 8 << 20
NUMERIC = [d for d in DTYPES if d not in ("BYTES", "BF16", "FP16")]


def codec(datatype: str = "INT32", shape: tuple[int, ...] = (-1, 2), *, batched: bool = True) -> SignatureCodec:
    """A model of one input ``x`` and one output ``y`` of the same kind."""
    return SignatureCodec(
        "m",
        "1",
        Signature((TensorSpec("x", datatype, shape),), (TensorSpec("y", datatype, shape),), batched=batched),
    )


def body(**members: Any) -> bytes:
    return json.dumps(members).encode()


def one(datatype: str, shape: list[Any], data: Any, **members: Any) -> bytes:
    return body(inputs=[{"name": "x", "datatype": datatype, "shape": shape, "data": data}], **members)


def binary(
    datatype: str, shape: list[int], payload: bytes, *, size: int | None = None, **members: Any
) -> tuple[bytes, int]:
    head = body(
        inputs=[
            {
                "name": "x",
                "datatype": datatype,
                "shape": shape,
                "parameters": {"binary_data_size": len(payload) if size is None else size},
            }
        ],
        **members,
    )
    return head + payload, len(head)


def answer(c: SignatureCodec, request: DecodedRequest, value: NDArray[Any]) -> tuple[dict[str, Any], bytes]:
    """The parsed JSON header of an answer and the bytes after it."""
    parts, length = c.encode(request, [value])
    whole = b"".join(bytes(p) for p in parts)
    if length is None:
        return json.loads(whole), b""
    return json.loads(whole[:length]), whole[length:]


# ---------------------------------------------------------------------- what is read


def test_flat_and_nested_data_give_the_same_tensor() -> None:
    flat = codec().decode(one("INT32", [2, 2], [1, 2, 3, 4]), None, LIMIT).inputs["x"]
    nested = codec().decode(one("INT32", [2, 2], [[1, 2], [3, 4]]), None, LIMIT).inputs["x"]
    assert flat.dtype == np.int32
    np.testing.assert_array_equal(flat, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(nested, flat)


@given(data=st.data(), datatype=st.sampled_from(NUMERIC))
def test_a_tensor_survives_json_both_ways(data: st.DataObject, datatype: str) -> None:
    value = data.draw(hnp.arrays(DTYPES[datatype], hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)))
    c = codec(datatype, (-1,) * value.ndim, batched=False)
    sent = json.dumps({"inputs": [{"name": "x", "datatype": datatype, "shape": value.shape, "data": value.tolist()}]})
    request = c.decode(sent.encode(), None, LIMIT)
    np.testing.assert_array_equal(request.inputs["x"], value)
    head, rest = answer(c, request, value)
    assert rest == b""
    got = np.array(head["outputs"][0]["data"], DTYPES[datatype]).reshape(head["outputs"][0]["shape"])
    np.testing.assert_array_equal(got, value)


@given(data=st.data(), datatype=st.sampled_from([d for d in DTYPES if d != "BYTES"]))
def test_a_tensor_survives_binary_both_ways_bit_for_bit(data: st.DataObject, datatype: str) -> None:
    value = data.draw(hnp.arrays(DTYPES[datatype], hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)))
    c = codec(datatype, (-1,) * value.ndim, batched=False)
    raw, length = binary(datatype, list(value.shape), value.tobytes(), parameters={"binary_data_output": True})
    request = c.decode(raw, length, LIMIT)
    assert request.inputs["x"].tobytes() == value.tobytes()
    assert request.inputs["x"].shape == value.shape
    head, rest = answer(c, request, value)
    assert rest == value.tobytes()
    assert head["outputs"][0]["parameters"]["binary_data_size"] == value.nbytes
    assert "data" not in head["outputs"][0]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_strings_survive_json_and_binary_with_embedded_nuls(texts: list[str]) -> None:
    texts = [*texts, "a\0b\0", ""]
    c = codec("BYTES", (-1,), batched=False)
    framed = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)
    by_binary = c.decode(*binary("BYTES", [len(texts)], framed, parameters={"binary_data_output": True}), LIMIT)
    by_json = c.decode(one("BYTES", [len(texts)], texts), None, LIMIT)
    assert by_binary.inputs["x"].tolist() == by_json.inputs["x"].tolist() == texts
    assert answer(c, by_binary, by_binary.inputs["x"])[1] == framed
    assert answer(c, by_json, by_json.inputs["x"])[0]["outputs"][0]["data"] == texts


def test_many_strings_survive_json_and_binary() -> None:
    texts = [str(i) for i in range(150_000)]
    c = codec("BYTES", (-1,), batched=False)
    framed = b"".join(struct.pack("<I", len(t)) + t.encode() for t in texts)
    for output_in_binary in (True, False):
        parameters = {"binary_data_output": output_in_binary}
        request = c.decode(*binary("BYTES", [len(texts)], framed, parameters=parameters), LIMIT)
        assert request.inputs["x"].tolist() == texts
        head, rest = answer(c, request, request.inputs["x"])
        assert (rest == framed) if output_in_binary else (head["outputs"][0]["data"] == texts)
    with pytest.raises(InvalidTensorError, match="at element 149999, with 5 bytes left"):
        c.decode(*binary("BYTES", [len(texts)], framed[:-1]), LIMIT)


def test_nan_and_infinities_survive_json_as_tokens() -> None:
    c = codec("FP32", (-1,), batched=False)
    sent = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[5],"data":[NaN,Infinity,-Infinity,1.5,-0.0]}]}'
    request = c.decode(sent, None, LIMIT)
    x = request.inputs["x"]
    assert math.isnan(x[0])
    assert x[1:].tolist() == [math.inf, -math.inf, 1.5, 0.0]
    (part,), _ = c.encode(request, [x])
    assert bytes(part).endswith(b'"data":[NaN,Infinity,-Infinity,1.5,-0.0]}]}')


@pytest.mark.parametrize("odd", [(), (0,), (70_000,), (65_535, 65_536, 199_999), range(0, 200_000, 3)])
def test_a_large_tensor_is_one_json_array_whatever_is_in_it(odd: Sequence[int]) -> None:
    value = np.arange(200_000, dtype=np.float32)
    value[list(odd)] = np.resize(np.array([np.nan, np.inf, -np.inf], np.float32), len(odd))
    text = b"[" + b"".join(to_json("y", "FP32", value)) + b"]"
    np.testing.assert_array_equal(np.array(json.loads(text), np.float32), value)
    assert b"null" not in text
    whole = np.arange(200_000)
    backwards = whole.reshape(2, -1)[:, ::-1]
    text = b"[" + b"".join(to_json("y", "INT64", backwards)) + b"]"
    assert json.loads(text) == backwards.ravel().tolist()


def test_a_long_answer_comes_in_pieces_with_the_length_of_its_header() -> None:
    signature = Signature((), tuple(TensorSpec(n, "FP32", (-1,)) for n in "abc"))
    c = SignatureCodec("m", "1", signature)
    long, short = np.arange(200_000, dtype=np.float32), np.ones(3, np.float32)
    request = DecodedRequest({}, ("a", "b", "c"), 1, 0, id="7")
    parts, length = c.encode(request, [short, long, short])
    assert length is None
    assert max(map(len, parts)) < 1 << 20
    assert [o["data"] for o in json.loads(b"".join(parts))["outputs"]] == [v.tolist() for v in (short, long, short)]
    forms = (OutputForm(True), OutputForm(False), OutputForm(True))
    parts, length = c.encode(replace(request, forms=forms), [short, long, short])
    whole = b"".join(parts)
    assert length is not None
    assert json.loads(whole[:length])["outputs"][1]["data"] == long.tolist()
    assert whole[length:] == short.tobytes() * 2


def test_what_takes_long_is_known_before_it_is_done() -> None:
    numbers, strings = codec("FP32"), codec("BYTES")
    assert not numbers.decodes_long(OFF_LOOP_JSON_BYTES, None)
    assert numbers.decodes_long(OFF_LOOP_JSON_BYTES + 1, None)
    assert not numbers.decodes_long(1 << 26, 100)
    assert numbers.decodes_long(1 << 26, OFF_LOOP_JSON_BYTES + 1)
    assert strings.decodes_long(1 << 26, 100)
    large, small = np.zeros(OFF_LOOP_ELEMENTS + 1, np.float32), np.zeros(OFF_LOOP_ELEMENTS, np.float32)
    text = DecodedRequest({}, ("y",), 1, 0)
    assert not numbers.encodes_long(text, [small])
    assert numbers.encodes_long(text, [large])
    assert not numbers.encodes_long(replace(text, forms=(OutputForm(True),)), [large])
    assert numbers.encodes_long(replace(text, forms=(OutputForm(True, classification=1),)), [large])
    assert strings.encodes_long(replace(text, forms=(OutputForm(True),)), [large.astype(object)])


def test_reading_much_json_leaves_the_collector_as_it_was() -> None:
    raw = b'{"a":[' + b"[]," * OFF_LOOP_JSON_BYTES + b"[]]}"
    try:
        for was in (True, False):
            (gc.enable if was else gc.disable)()
            load_json(raw, LIMIT)
            with pytest.raises(Malformed):
                load_json(raw[:-1], LIMIT)
            assert gc.isenabled() is was
    finally:
        gc.enable()


def test_json_and_binary_inputs_mix_in_one_request() -> None:
    signature = Signature(
        tuple(TensorSpec(n, "INT32", (-1,)) for n in "abc"), (TensorSpec("y", "INT32", (-1,)),), batched=True
    )
    head = body(
        inputs=[
            {"name": "a", "datatype": "INT32", "shape": [1], "parameters": {"binary_data_size": 4}},
            {"name": "b", "datatype": "INT32", "shape": [1], "data": [7]},
            {"name": "c", "datatype": "INT32", "shape": [1], "parameters": {"binary_data_size": 4}},
        ]
    )
    inputs = SignatureCodec("m", "1", signature).decode(head + struct.pack("<ii", 5, 9), len(head), LIMIT).inputs
    assert [int(inputs[n][0]) for n in "abc"] == [5, 7, 9]


def test_an_unaligned_binary_tensor_comes_out_aligned() -> None:
    raw, length = binary("INT64", [2, 2], np.arange(4).tobytes())
    for shift in range(8):
        view = memoryview(b"\0" * shift + raw)[shift:]
        assert codec("INT64").decode(view, length, LIMIT).inputs["x"].flags.aligned


def test_id_priority_and_timeout_are_read() -> None:
    request = codec().decode(
        one("INT32", [1, 2], [1, 2], id="abc", parameters={"priority": 2, "timeout": 1500}), None, LIMIT
    )
    assert (request.id, request.priority, request.queue_timeout_s) == ("abc", 2, 0.0015)
    assert answer(codec(), request, request.inputs["x"])[0]["id"] == "abc"


def test_an_answer_without_a_request_id_has_none() -> None:
    request = codec().decode(one("INT32", [1, 2], [1, 2]), None, LIMIT)
    head, _ = answer(codec(), request, request.inputs["x"])
    assert head == {
        "model_name": "m",
        "model_version": "1",
        "outputs": [{"name": "y", "datatype": "INT32", "shape": [1, 2], "data": [1, 2]}],
    }


def test_unknown_members_are_ignored() -> None:
    assert codec().decode(one("INT32", [1, 2], [1, 2], model_name="m", whatever={"a": [1]}), None, LIMIT).outputs == (
        "y",
    )


@pytest.mark.parametrize("value", [True, False])
def test_a_listed_output_says_for_itself_whether_it_is_binary(value: bool) -> None:
    request = codec().decode(
        one(
            "INT32",
            [1, 2],
            [1, 2],
            outputs=[{"name": "y", "parameters": {"binary_data": value}}],
            parameters={"binary_data_output": not value},
        ),
        None,
        LIMIT,
    )
    head, rest = answer(codec(), request, request.inputs["x"])
    assert (len(rest) > 0) is value
    assert ("data" in head["outputs"][0]) is not value


def test_an_empty_binary_output_is_sent_without_bytes_as_plain_json() -> None:
    c = codec()
    request = c.decode(one("INT32", [0, 2], [], parameters={"binary_data_output": True}), None, LIMIT)
    parts, length = c.encode(request, [np.empty((0, 2), np.int32)])
    assert length is None
    assert json.loads(b"".join(parts))["outputs"][0]["parameters"] == {"binary_data_size": 0}


# ---------------------------------------------------------------------- raw requests


def test_a_raw_body_is_the_only_input_and_is_answered_in_binary() -> None:
    c = codec("FP32", (-1, 2))
    request = c.decode(np.array([1.5, 2.5], np.float32).tobytes(), 0, LIMIT)
    np.testing.assert_array_equal(request.inputs["x"], [[1.5, 2.5]])
    assert answer(c, request, request.inputs["x"])[1] == request.inputs["x"].tobytes()


def test_a_raw_body_fills_the_one_variable_dimension() -> None:
    assert codec("UINT8", (-1, -1, 3)).decode(bytes(12), 0, LIMIT).inputs["x"].shape == (1, 4, 3)


def test_a_raw_string_is_unframed() -> None:
    assert codec("BYTES", (-1, 1)).decode("grüße".encode(), 0, LIMIT).inputs["x"].tolist() == [["grüße"]]


@pytest.mark.parametrize(
    ("c", "raw", "words"),
    [
        (codec("FP32", (-1, -1, -1)), b"1234", "more than one variable-sized dimension"),
        (codec("BYTES", (-1, 2)), b"ab", "must have input shape [1]"),
        (codec("FP32", (-1, 2)), b"1234567", "expects 8 bytes, got 7"),
        (codec("FP32", (-1, -1, 2)), b"123456789", "a multiple of 8 bytes, got 9"),
        (codec("FP32", (-1, 0)), b"1", "expects 0 bytes, got 1"),
        (
            SignatureCodec("m", "1", Signature((TensorSpec("a", "FP32", (1,)), TensorSpec("b", "FP32", (1,))), ())),
            b"",
            "Raw request must only have 1 input",
        ),
    ],
)
def test_a_raw_body_that_cannot_be_placed_is_refused(c: SignatureCodec, raw: bytes, words: str) -> None:
    with pytest.raises(Malformed, match=words.replace("[", r"\[")):
        c.decode(raw, 0, LIMIT)


# ---------------------------------------------------------------------- classification


def test_classification_gives_the_best_classes_with_their_labels() -> None:
    spec = TensorSpec("y", "FP32", (-1, 3), labels=("cat", "dog"))
    value = np.array([[0.1, 0.7, 0.2], [3.0, -1.0, 3.0]], np.float32)
    assert classify(spec, value, 2, batched=True).tolist() == [
        ["0.700000:1:dog", "0.200000:2"],
        ["3.000000:0:cat", "3.000000:2"],
    ]
    assert classify(spec, value[0], 5, batched=False).tolist() == ["0.700000:1:dog", "0.200000:2", "0.100000:0:cat"]


def test_classification_writes_integers_as_they_are_and_ranks_the_largest_exactly() -> None:
    spec = TensorSpec("y", "UINT64", (3,))
    values = np.array([2**64 - 2, 2**64 - 1, 5], np.uint64)
    assert classify(spec, values, 3, batched=False).tolist() == [
        "18446744073709551615:1",
        "18446744073709551614:0",
        "5:2",
    ]
    lowest = np.array([[-128, 127, -7]], np.int8)
    assert classify(TensorSpec("y", "INT8", (-1, 3)), lowest, 3, batched=True).tolist() == [["127:1", "-7:2", "-128:0"]]


@pytest.mark.parametrize(
    ("shape", "batched", "expected"),
    [
        ((), False, (1,)),
        ((), True, (1,)),
        ((0, 3), True, (0, 2)),
        ((2, 0), True, (2, 0)),
        ((0,), False, (0,)),
        ((3,), True, (3, 1)),
        ((2, 2, 2), True, (2, 2)),
        ((2, 2, 2), False, (2,)),
    ],
)
def test_classification_has_a_shape_for_every_output(
    shape: tuple[int, ...], batched: bool, expected: tuple[int, ...]
) -> None:
    assert classify(TensorSpec("y", "FP16", shape), np.ones(shape, np.float16), 2, batched=batched).shape == expected


def test_classification_into_ever_so_many_classes_is_refused() -> None:
    value = np.zeros((CLASSIFICATION_LIMIT // 2 + 1, 2), np.int8)
    assert classify(TensorSpec("y", "INT8", (-1, 2)), value[:5], 2, batched=True).shape == (5, 2)
    with pytest.raises(InvalidParameterError, match="got 2 for each of"):
        classify(TensorSpec("y", "INT8", (-1, 2)), value, 2, batched=True)


def test_classification_ranks_what_is_no_number_last() -> None:
    values = np.array([math.nan, -math.inf, math.inf, 1.0], np.float32)
    assert classify(TensorSpec("y", "FP32", (4,)), values, 4, batched=False).tolist() == [
        "inf:2",
        "1.000000:3",
        "-inf:1",
        "nan:0",
    ]


@pytest.mark.parametrize("as_binary", [True, False])
def test_classification_is_sent_as_strings(as_binary: bool) -> None:
    c = codec("FP32", (-1, 2))
    request = c.decode(
        one(
            "FP32",
            [1, 2],
            [1, 2],
            outputs=[{"name": "y", "parameters": {"classification": 1, "binary_data": as_binary}}],
        ),
        None,
        LIMIT,
    )
    head, rest = answer(c, request, np.array([[1.0, 2.0]], np.float32))
    output = head["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 1])
    assert (rest[4:] == b"2.000000:1") if as_binary else (output["data"] == ["2.000000:1"])


# ---------------------------------------------------------------------- what is refused

GOOD: dict[str, Any] = {"name": "x", "datatype": "INT32", "shape": [1, 2], "data": [1, 2]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty body"),
        (b"{", "Unable to parse"),
        (b"[" * 100_000, "Unable to parse"),
        (b'{"a":' * 2000 + b"NaN" + b"}" * 2000, "Unable to parse"),
        (b'"\xff"', "Unable to parse"),
        (b"[]", "expected a JSON object as the request, got an array"),
        (body(), "'inputs'"),
        (body(inputs={}), "'inputs' to be an array"),
        (body(inputs=[1]), "each of 'inputs'"),
        (body(inputs=[{**GOOD, "name": 3}]), "'name' of an input"),
        (body(inputs=[{**GOOD, "name": "z"}]), "unexpected inference input 'z'"),
        (body(inputs=[GOOD, GOOD]), "already exists"),
        (body(inputs=[{**GOOD, "shape": None}]), "'shape' as an array"),
        (body(inputs=[{**GOOD, "shape": [-1, 2]}]), "non-negative integers, got -1"),
        (body(inputs=[{**GOOD, "shape": [1.0, 2]}]), "non-negative integers, got 1.0"),
        (body(inputs=[{**GOOD, "shape": [True, 2]}]), "non-negative integers, got True"),
        (body(inputs=[{**GOOD, "shape": [1] * 40}]), "at most 32 dimensions, got 40"),
        (body(inputs=[{**GOOD, "shape": [2**62, 2**62]}]), "elements, got 2"),
        (body(inputs=[{**GOOD, "shape": [2**63 - 1, 0], "data": []}]), "no tensor can have"),
        (body(inputs=[{**GOOD, "shape": [2**63, 0], "data": []}]), "dimensions below 2**63, got 9223372036854775808"),
        (body(inputs=[{**GOOD, "shape": [10**3000] * 2, "data": [math.nan]}]), "below 2**63, got a very large number"),
        # The rank goes first: the product of ever so many dimensions would take minutes.
        (body(inputs=[{**GOOD, "shape": [1] * 40 + [-1]}]), "at most 32 dimensions, got 41"),
        (body(inputs=[{**GOOD, "datatype": "FP32"}]), "expects datatype INT32, got 'FP32'"),
        (body(inputs=[{**GOOD, "datatype": 7}]), "expects datatype INT32, got 7"),
        (body(inputs=[{**GOOD, "data": [1]}]), "expects 2 elements, got 1"),
        (body(inputs=[{**GOOD, "data": [1, 2.5]}]), "expects integers, got 2.5"),
        (body(inputs=[{**GOOD, "data": [1, True]}]), "expects integers, got True"),
        (body(inputs=[{**GOOD, "data": [1, "2"]}]), "expects integers, got '2'"),
        (body(inputs=[{**GOOD, "data": [1, None]}]), "expects integers, got nothing"),
        (body(inputs=[{**GOOD, "data": [1, 2**40]}]), "outside the range of INT32"),
        (body(inputs=[{**GOOD, "data": "ab"}]), "'data' as an array"),
        (body(inputs=[{**GOOD, "data": [[1], [2]]}]), "expects 1 rows at depth 0, got 2"),
        (body(inputs=[{**GOOD, "data": [[1, 2, 3]]}]), "rows of 2 elements"),
        (body(inputs=[{**GOOD, "data": [[[1], [2]]]}]), "nested deeper"),
        (body(inputs=[{**GOOD, "data": [1, [2]]}]), "mixed"),
        (body(inputs=[{k: v for k, v in GOOD.items() if k != "data"}]), "neither 'data' nor"),
        (body(inputs=[{**GOOD, "parameters": 3}]), "'parameters' of input 'x'"),
        (body(inputs=[{**GOOD, "parameters": {"binary_data_size": 8}}]), "both 'data' and"),
        (body(inputs=[{**GOOD, "parameters": {"binary_data_size": -1}}]), "non-negative integer, got -1"),
        (body(inputs=[{**GOOD, "parameters": {"shared_memory_region": "r"}}]), "shared memory"),
        (body(inputs=[GOOD], id=7), "'id' to be a string"),
        (body(inputs=[GOOD], parameters=[1]), "'parameters' to be an object"),
        (body(inputs=[GOOD], parameters={"priority": -1}), "'priority'"),
        (body(inputs=[GOOD], parameters={"timeout": "1"}), "'timeout'"),
        (body(inputs=[GOOD], parameters={"binary_data_output": 1}), "'binary_data_output'"),
        (body(inputs=[GOOD], parameters={"triton_x": 1}), "reserved"),
        (body(inputs=[GOOD], outputs="y"), "'outputs' to be an array"),
        (body(inputs=[GOOD], outputs=[3]), "each of 'outputs'"),
        (body(inputs=[GOOD], outputs=[{"name": None}]), "'name' of an output"),
        (body(inputs=[GOOD], outputs=[{"name": "z"}]), "unexpected inference output 'z'"),
        (body(inputs=[GOOD], outputs=[{"name": "y"}] * 2), "output 'y' already exists in request"),
        (body(inputs=[GOOD], outputs=[{"name": "y", "parameters": {"classification": 0}}]), "positive integer"),
        (body(inputs=[GOOD], outputs=[{"name": "y", "parameters": {"binary_data": "yes"}}]), "expects a boolean"),
        (body(inputs=[GOOD], outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]), "shared memory"),
        (body(inputs=[GOOD], outputs=[{"name": "y", "parameters": 1}]), "'parameters' of output 'y'"),
    ],
)
def test_a_malformed_json_request_is_refused_with_what_was_expected(raw: bytes, words: str) -> None:
    with pytest.raises(Malformed) as caught:
        codec().decode(raw, None, LIMIT)
    assert words in caught.value.message


def test_an_output_listed_twice_is_refused() -> None:
    signature = Signature(
        (TensorSpec("x", "INT32", (-1,)),), (TensorSpec("y", "INT32", (-1,)), TensorSpec("z", "INT32", (-1,)))
    )
    with pytest.raises(InvalidTensorError, match="output 'y' already exists in request"):
        SignatureCodec("m", "1", signature).decode(one("INT32", [1], [1], outputs=[{"name": "y"}] * 2), None, LIMIT)


@pytest.mark.parametrize(
    ("raw", "length", "words"),
    [
        (*binary("INT32", [1, 2], b"1234567"), "expects 8 bytes of binary data, got 7"),
        (*binary("INT32", [1, 2], b"123456789"), "expects 8 bytes of binary data, got 9"),
        (*binary("INT32", [1, 2], b"1234", size=8), "expecting 4 additional bytes"),
        (*binary("INT32", [1, 2], b"123456789", size=8), "unexpected additional input data"),
        (*binary("INT32", [2**62, 4], b"12345678"), "bytes of binary data, got 8"),
        (b"{}", 3, "expected at most the body's 2 bytes"),
    ],
)
def test_a_malformed_binary_request_is_refused(raw: bytes, length: int, words: str) -> None:
    with pytest.raises(Malformed) as caught:
        codec().decode(raw, length, LIMIT)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("payload", "count", "words"),
    [
        (b"\x05\0\0\0abc", 1, "a string of 5 bytes at element 0, with 3 bytes left"),
        (b"\x01\0\0\0a", 2, "too few for their lengths"),
        (b"\x04\0\0\0aaaa", 2, "expects 2 strings, got 1"),
        (b"\x01\0\0\0ab", 1, "expects 1 strings in 5 bytes, got 6"),
        (b"\xff\xff\xff\xffab", 1, "a string of 4294967295 bytes"),
        (b"\x01\0\0\0\xff", 1, "expects UTF-8"),
    ],
)
def test_badly_framed_strings_are_refused(payload: bytes, count: int, words: str) -> None:
    with pytest.raises(InvalidTensorError) as caught:
        codec("BYTES", (-1,), batched=False).decode(*binary("BYTES", [count], payload), LIMIT)
    assert words in caught.value.message


def test_lone_surrogates_are_no_text() -> None:
    raw = b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\\ud800"]}],"z":NaN}'
    with pytest.raises(Malformed):
        codec("BYTES", (-1,), batched=False).decode(raw, None, LIMIT)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_json_form(datatype: str) -> None:
    c = codec(datatype)
    with pytest.raises(InvalidTensorError, match=f"sending {datatype} data via JSON is not supported"):
        c.decode(one(datatype, [1, 2], [1, 2]), None, LIMIT)
    request = c.decode(*binary(datatype, [1, 2], bytes(4)), LIMIT)
    with pytest.raises(InvalidParameterError, match="as binary data"):
        c.encode(request, [np.zeros((1, 2), DTYPES[datatype])])


def test_a_float_that_overflows_fp32_is_refused_rather_than_made_infinite() -> None:
    c = codec("FP32", (-1,), batched=False)
    with pytest.raises(InvalidTensorError, match="outside the range of FP32"):
        c.decode(one("FP32", [2], [1.0, 1e39]), None, LIMIT)
    with pytest.raises(Malformed, match="infinity"):
        c.decode(one("FP32", [1], [10**400]), None, LIMIT)
    big = c.decode(one("FP32", [2], [3e38, 3e38]), None, LIMIT).inputs["x"]
    assert np.isfinite(big).all()


def test_json_over_the_limit_is_too_large() -> None:
    with pytest.raises(PayloadTooLargeError, match="at most 10 bytes of JSON"):
        codec().decode(one("INT32", [1, 2], [1, 2]), None, 10)


def test_more_structures_than_the_limit_are_too_large_however_few_their_bytes() -> None:
    raw = b'{"inputs":[' + b"[]," * JSON_STRUCTURE_LIMIT + b"[]]}"
    with pytest.raises(PayloadTooLargeError, match="arrays and objects"):
        codec().decode(raw, None, LIMIT)


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 250)))
def test_no_body_leads_to_anything_but_an_answer_or_a_domain_error(raw: bytes, length: int | None) -> None:
    try:
        request = codec("UINT8", (-1,), batched=False).decode(raw, length, LIMIT)
    except GatewayError:
        return
    assert request.inputs["x"].dtype == np.uint8


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.sampled_from(["x", "y"]) | _JSON,
            "shape": st.lists(st.integers(-2, 5), max_size=4) | _JSON,
            "datatype": st.sampled_from(["FP32", "INT8"]) | _JSON,
            "data": st.lists(st.integers(-2, 300) | st.floats(), max_size=6) | _JSON,
            "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 9) | _JSON}) | _JSON,
        },
    ),
    _JSON,
    _JSON,
)
def test_no_json_leads_to_anything_but_an_answer_or_a_domain_error(item: Any, outputs: Any, parameters: Any) -> None:
    raw = json.dumps({"inputs": [item], "outputs": outputs, "parameters": parameters}).encode()
    try:
        request = codec("FP32", (-1, 2)).decode(raw, None, LIMIT)
    except GatewayError as error:
        assert error.message  # noqa: PT017 - the property is that nothing else is raised
        return
    assert set(request.inputs) == {"x"}
