"""What is made of a graph: equal where it has to be, smaller where it should be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from inferway.build.optimize import quantise
from inferway.build.optimize.data import Rows
from models import F32, model, node, value
from optimizing import cnn, given, mlp, outputs_of, rows, transformer, weights

IDS = np.random.default_rng(1).integers(0, 300, (24, 10))
TOKENS = Rows({"ids": IDS}, None, len(IDS))


def operators(proto: Any) -> set[str]:
    return {entry.op_type for entry in proto.graph.node}


def test_a_graph_tells_what_it_is_made_of() -> None:
    dense, images, words = (quantise.read_graph(given(make()).proto) for make in (mlp, cnn, transformer))
    assert dense.weighted == ("first", "second")
    assert not dense.convolutional
    assert not dense.transformer
    assert images.convolutional
    assert words.transformer
    # Products of two activations have no constant matrix.
    assert words.weighted == ("query", "up", "down")
    assert words.float_bytes > 200_000


def test_nodes_without_a_name_get_one_of_their_own() -> None:
    data = model(
        [node("MatMul", ["x", "a"], ["h"]), node("MatMul", ["h", "a"], ["y"])],
        [value("x", F32, ["n", 4])], [value("y", F32, ["n", 4])], {"a": weights(4, 4)},
    )  # fmt: skip
    names = quantise.read_graph(given(data).proto).weighted
    assert len(set(names)) == 2


def test_equalised_graphs_compute_the_same() -> None:
    proto = given(transformer()).proto
    equal = quantise.equalise(proto, quantise.read_graph(proto), TOKENS)
    assert sum(entry.op_type == "Mul" for entry in equal.graph.node) == 3
    expected, found = (outputs_of(p.SerializeToString(), ids=IDS)[0] for p in (proto, equal))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_equalising_takes_the_transposed_matrices_of_gemm() -> None:
    data = model(
        [node("Gemm", ["x", "w"], ["y"], name="g", transB=1)],
        [value("x", F32, ["n", 6])], [value("y", F32, ["n", 3])], {"w": weights(3, 6)},
    )  # fmt: skip
    x = rows(20, 6)
    x[:, 2] *= 300
    proto = given(data).proto
    equal = quantise.equalise(proto, quantise.read_graph(proto), Rows({"x": x}, None, 20))
    found = outputs_of(equal.SerializeToString(), x=x)[0]
    np.testing.assert_allclose(found, outputs_of(data, x=x)[0], rtol=1e-4, atol=1e-4)
    scaled = next(n for n in equal.graph.node if n.op_type == "Mul")
    factors = next(onnx.numpy_helper.to_array(t) for t in equal.graph.initializer if t.name == scaled.input[1])
    assert factors.argmin() == 2


def test_matrices_that_several_products_share_cannot_be_changed() -> None:
    data = model(
        [node("MatMul", ["x", "a"], ["h"], name="one"), node("MatMul", ["h", "a"], ["y"], name="two")],
        [value("x", F32, ["n", 4])], [value("y", F32, ["n", 4])], {"a": weights(4, 4)},
    )  # fmt: skip
    proto = given(data).proto
    with pytest.raises(ValueError, match="its products share their matrices"):
        quantise.equalise(proto, quantise.read_graph(proto), Rows({"x": rows(8, 4)}, None, 8))


def test_statically_quantised_rows_are_the_same_in_any_company() -> None:
    proto = quantise.prepared(given(transformer()).proto)
    made = quantise.static_int8(proto, quantise.read_graph(proto), TOKENS, "minmax").SerializeToString()
    alone = np.concatenate([outputs_of(made, ids=IDS[i : i + 1])[0] for i in range(4)])
    np.testing.assert_allclose(outputs_of(made, ids=IDS)[0][:4], alone, atol=1e-5)


def test_of_a_transformer_only_products_with_constants_become_integers() -> None:
    proto = quantise.prepared(given(transformer()).proto)
    made = quantise.static_int8(proto, quantise.read_graph(proto), TOKENS, "minmax")
    quantised = {t.name for t in made.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    assert {"q_quantized", "up_quantized", "down_quantized"} <= quantised
    fed = {name for entry in made.graph.node if entry.op_type == "Softmax" for name in entry.input}
    assert not any("Dequantize" in name for name in fed)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_every_way_of_calibrating_keeps_what_a_network_decides(method: Any) -> None:
    x = rows(200, 16)
    proto = quantise.prepared(given(mlp()).proto)
    made = quantise.static_int8(proto, quantise.read_graph(proto), Rows({"x": x}, None, 200), method)
    held_out = rows(100, 16, seed=9)
    same = outputs_of(made.SerializeToString(), x=held_out)[0].argmax(1) == outputs_of(mlp(), x=held_out)[0].argmax(1)
    assert same.mean() > 0.9


def test_biases_with_a_leading_one_are_no_obstacle() -> None:
    data = model(
        [node("Gemm", ["x", "w", "b"], ["y"], name="g")],
        [value("x", F32, ["n", 16])], [value("y", F32, ["n", 8])], {"w": weights(16, 8), "b": weights(1, 8, seed=1)},
    )  # fmt: skip
    proto = quantise.prepared(given(data).proto)
    made = quantise.static_int8(proto, quantise.read_graph(proto), Rows({"x": rows(40, 16)}, None, 40), "minmax")
    x = rows(10, 16, seed=3)
    np.testing.assert_allclose(outputs_of(made.SerializeToString(), x=x)[0], outputs_of(data, x=x)[0], atol=0.3)


@pytest.mark.parametrize(("bits", "close"), [(8, 0.05), (4, 0.5)])
def test_blocks_of_fewer_bits_are_less_close(bits: int, close: float) -> None:
    made = quantise.block_weights(given(mlp(width=128)).proto, bits)
    assert "MatMulNBits" in operators(made)
    x = rows(50, 16)
    gap = np.abs(outputs_of(made.SerializeToString(), x=x)[0] - outputs_of(mlp(width=128), x=x)[0]).max()
    assert gap < close


def test_blocks_need_a_matrix() -> None:
    data = model([node("Relu", ["x"], ["y"])], [value("x", F32, ["n", 4])], [value("y", F32, ["n", 4])])
    with pytest.raises(ValueError, match="no matrix of it could be put into blocks"):
        quantise.block_weights(given(data).proto, 8)


@pytest.mark.parametrize(("kind", "close"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_constants_of_16_bits_are_half_as_long(kind: Any, close: float) -> None:
    proto = given(mlp(width=1024)).proto
    made = quantise.stored_half(proto, kind)
    assert made.ByteSize() < 0.55 * proto.ByteSize()
    x = rows(20, 16)
    expected = outputs_of(proto.SerializeToString(), x=x)[0]
    np.testing.assert_allclose(outputs_of(made.SerializeToString(), x=x)[0], expected, atol=close)


def test_the_model_that_was_given_stays_as_it_was() -> None:
    proto = given(transformer()).proto
    quantise.read_graph(proto)
    before = proto.SerializeToString(deterministic=True)
    facts = quantise.read_graph(proto)
    quantise.equalise(proto, facts, TOKENS)
    quantise.static_int8(quantise.prepared(proto), facts, TOKENS, "minmax")
    quantise.dynamic_int8(proto)
    quantise.block_weights(proto, 4)
    quantise.stored_half(proto, "bf16")
    quantise.graph_optimised(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_nothing_is_printed_logged_or_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    proto = quantise.prepared(given(mlp()).proto)
    quantise.static_int8(proto, quantise.read_graph(proto), Rows({"x": rows(40, 16)}, None, 40), "entropy")
    quantise.dynamic_int8(proto)
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")
    assert list(tmp_path.iterdir()) == []


def test_metadata_is_the_models_and_not_the_quantisers() -> None:
    proto = given(mlp()).proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = "author", "somebody"
    made = quantise.dynamic_int8(quantise.prepared(proto))
    assert [(found.key, found.value) for found in made.metadata_props] == [("author", "somebody")]
