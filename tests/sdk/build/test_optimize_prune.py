"""Pruning of Keras and PyTorch models, and what `inferway.optimize` makes of it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx
import pytest

from inferway import optimize
from inferway.build.optimize.prune import framework_of, magnitude, magnitude_onnx, structured
from optimizing import given, mlp, outputs_of, rows

# Before anything imports Keras.
os.environ.setdefault("KERAS_BACKEND", "torch")

QUICK: dict[str, Any] = {"batch_sizes": (1, 4), "rounds": 3}


def untrained(model: Any) -> None:
    """What fine-tuning does to a model in tests that look at its form."""


def zeros(values: Any) -> float:
    return float(np.mean(np.asarray(values) == 0))


def test_the_smallest_weights_of_each_matrix_go() -> None:
    pruned = magnitude_onnx(given(mlp()).proto, 0.75)
    before, after = (
        {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        for proto in (given(mlp()).proto, pruned)
    )
    for name in ("a", "c"):
        assert zeros(after[name]) == pytest.approx(0.75, abs=0.01)
        kept = after[name] != 0
        np.testing.assert_array_equal(after[name][kept], before[name][kept])
        assert np.abs(before[name][~kept]).max() <= np.abs(before[name][kept]).min()
    np.testing.assert_array_equal(after["b"], before["b"])


def test_zeros_gain_nothing_but_compressed_size() -> None:
    report = optimize(mlp(), rows(40, 16), techniques=["magnitude"], sparsity=0.8, objective="size", **QUICK)
    pruned = report.candidate("magnitude pruning 80%")
    assert pruned.size_bytes == report.original.size_bytes
    assert pruned.gzip_bytes is not None
    assert report.original.gzip_bytes is not None
    assert pruned.gzip_bytes < 0.5 * report.original.gzip_bytes
    assert "zeros make nothing faster; what is gained is the compressed size" in str(report)
    assert not report.changed


def test_onnx_alone_is_not_pruned_in_structure() -> None:
    report = optimize(mlp(), rows(40, 16), techniques=["structured", "fp16"], **QUICK)
    skipped = report.candidate("structured pruning 50%")
    assert skipped.status == "skipped"
    assert skipped.reason == "needs the Keras or PyTorch model; give that in place of its ONNX"


def test_a_model_of_no_framework_is_of_none() -> None:
    assert framework_of(b"") is None
    assert framework_of(np.zeros(1)) is None


# -- PyTorch


def perceptron() -> Any:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)
    ).eval()


@pytest.mark.torch
def test_torch_layers_become_narrower_and_the_outputs_stay() -> None:
    import torch

    model = perceptron()
    tuned: list[Any] = []
    narrower = structured(model, rows(4, 16), 0.5, tuned.append)
    shapes = [tuple(layer.weight.shape) for layer in narrower if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(32, 16), (16, 32), (4, 16)]
    assert tuned == [narrower]
    assert model[0].weight.shape == (64, 16)
    assert narrower(torch.zeros(2, 16)).shape == (2, 4)


@pytest.mark.torch
def test_torch_convolutions_lose_channels() -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3, padding=1),
        torch.nn.Flatten(), torch.nn.Linear(8 * 64, 10),
    )  # fmt: skip
    narrower = structured(model, rows(4, 1, 8, 8), 0.5, untrained)
    assert narrower[0].out_channels == 8
    assert narrower[2].out_channels == 4
    assert narrower[4].in_features == 4 * 64
    assert narrower(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.torch
def test_zeros_of_a_torch_model_stay_while_it_is_trained() -> None:
    import torch

    def train(model: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(8, 16)).square().sum().backward()
            optimizer.step()

    model = perceptron()
    pruned = magnitude(model, 0.6, train)
    assert zeros(pruned[0].weight.detach()) == pytest.approx(0.6, abs=0.01)
    assert not np.allclose(pruned[0].bias.detach(), model[0].bias.detach())
    assert zeros(model[0].weight.detach()) == 0


@pytest.mark.torch
def test_a_torch_model_that_cannot_be_narrowed_says_so() -> None:
    import torch

    with pytest.raises(ValueError, match="no layer that could be narrowed"):
        structured(torch.nn.Sequential(torch.nn.Linear(16, 4)), rows(4, 16), 0.5, untrained)


@pytest.mark.slow
@pytest.mark.torch
def test_pruning_and_quantising_are_joined() -> None:
    tuned: list[Any] = []
    model, x = perceptron(), rows(40, 16)
    report = optimize(model, x, fine_tune=tuned.append, techniques=["structured"], **QUICK)
    both = report.candidate("structured pruning 50% + static int8")
    alone = report.candidate("structured pruning 50%")
    assert len(tuned) == 1
    assert both.status == alone.status == "measured"
    assert both.size_bytes < report.original.size_bytes
    assert both.model is not None
    assert "QuantizeLinear" in {node.op_type for node in both.model.proto.graph.node}
    assert "a gain of the metric is the training's, not the pruning's" in str(report)


@pytest.mark.torch
def test_training_that_fails_is_told_in_the_row() -> None:
    def broken(model: Any) -> None:
        raise RuntimeError("no rows left")

    report = optimize(perceptron(), rows(40, 16), fine_tune=broken, techniques=["structured", "fp16"], **QUICK)
    assert report.candidate("structured pruning 50%").reason == "RuntimeError: no rows left"
    assert report.candidate("fp16 weights").status == "measured"


@pytest.mark.torch
def test_without_training_a_torch_model_is_not_pruned() -> None:
    report = optimize(perceptron(), rows(40, 16), techniques=["structured", "fp16"], **QUICK)
    assert report.candidate("structured pruning 50%").reason.startswith("needs training afterwards: give fine_tune")


@pytest.mark.torch
def test_the_extra_is_named_where_torch_pruning_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    report = optimize(perceptron(), rows(40, 16), fine_tune=untrained, techniques=["structured", "fp16"], **QUICK)
    assert "pip install 'inferway[train]'" in report.candidate("structured pruning 50%").reason


# -- Keras


def dense_chain(**last: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((16,)), keras.layers.Dense(64, activation="relu"), keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(3, **last),
        ]
    )  # fmt: skip
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


@pytest.mark.torch
def test_keras_layers_become_narrower_with_what_lies_between() -> None:
    model = dense_chain(activation="softmax")
    narrower = structured(model, None, 0.5, untrained)
    assert [layer.units for layer in narrower.layers if hasattr(layer, "units")] == [32, 16, 3]
    assert narrower.count_params() < 0.5 * model.count_params()
    assert narrower.compiled
    assert narrower(rows(2, 16)).shape == (2, 3)
    assert model.layers[0].units == 64


@pytest.mark.torch
def test_units_that_nothing_comes_of_go_first() -> None:
    model = dense_chain()
    kernel, bias = model.layers[3].get_weights()
    kernel[:, ::2] = 0
    bias[::2] = 0
    model.layers[3].set_weights([kernel, bias])
    norm = model.layers[0].get_weights()
    norm[0][:, ::2] = 0
    norm[1][::2] = 0
    model.layers[0].set_weights(norm)
    x = rows(6, 16)
    narrower = structured(model, None, 0.5, untrained)
    np.testing.assert_allclose(
        np.asarray(narrower(x).detach()), np.asarray(model(x).detach()), atol=1e-5
    )  # nothing was lost with them


@pytest.mark.torch
def test_zeros_of_a_keras_model_are_there_after_training() -> None:
    model = dense_chain()
    before = model.layers[0].get_weights()[0].copy()

    def train(copy: Any) -> None:
        kernel, bias = copy.layers[0].get_weights()
        copy.layers[0].set_weights([kernel + 1, bias])

    pruned = magnitude(model, 0.5, train)
    assert zeros(pruned.layers[0].get_weights()[0]) == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(model.layers[0].get_weights()[0], before)


@pytest.mark.torch
def test_keras_models_that_are_no_chain_of_dense_layers_say_so() -> None:
    import keras

    other = keras.Sequential([keras.Input((8, 2)), keras.layers.LSTM(4, name="memory"), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"it has the layer 'memory' \(LSTM\)"):
        structured(other, None, 0.5, untrained)
    with pytest.raises(ValueError, match="no Dense layer between input and output"):
        structured(keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)]), None, 0.5, untrained)
    entry = keras.Input((8,))
    left, right = keras.layers.Dense(4)(entry), keras.layers.Dense(4)(entry)
    branching = keras.Model(entry, [keras.layers.Dense(2)(left), keras.layers.Dense(2)(right)])
    with pytest.raises(ValueError, match="its layers branch"):
        structured(branching, None, 0.5, untrained)


@pytest.mark.slow
@pytest.mark.torch
def test_a_keras_model_is_exported_quantised_and_pruned() -> None:
    x = rows(60, 16)
    model = dense_chain(activation="softmax")
    truth = np.asarray(model(x).detach()).argmax(axis=1)
    report = optimize(
        model, (x, truth), fine_tune=untrained, techniques=["static_int8/minmax", "structured"], **QUICK
    )  # fmt: skip
    assert report.original.metric == 1.0
    assert report.candidate("static int8 (minmax)").metric > 0.9
    assert report.candidate("structured pruning 50% + static int8").status == "measured"
    assert report.original.model is not None
    assert report.original.model.framework == "keras"


def test_what_a_pruned_graph_computes_is_what_its_weights_say() -> None:
    x = rows(5, 16)
    pruned = magnitude_onnx(given(mlp()).proto, 0.5)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in pruned.graph.initializer}
    expected = np.maximum(x @ held["a"] + held["b"], 0) @ held["c"]
    np.testing.assert_allclose(outputs_of(pruned.SerializeToString(), x=x)[0], expected, rtol=1e-4, atol=1e-5)
