"""Keras models to ONNX, held against the models' own outputs; on TensorFlow in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

from inferway import BuildError, ExportError, ExportMismatchError, ModelNotBuiltError, to_onnx

keras = pytest.importorskip("keras")
pytestmark = pytest.mark.torch
L = keras.layers
RNG = np.random.default_rng(0)


def rows(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def test_the_documents_model_that_was_never_called_is_built_by_the_example() -> None:
    model = keras.Sequential(
        [L.Dense(128, activation="relu"), L.Dense(64, activation="relu"), L.Dense(1, activation="sigmoid")]
    )
    x = rows(4, 1000)
    made = to_onnx(model, x)
    assert (made.framework, made.backend) == ("keras", "torch")
    assert [str(spec) for spec in (*made.inputs, *made.outputs)] == ["x: FP32 [-1, 1000]", "y: FP32 [-1, 1]"]
    assert len(made.proto.graph.node) <= 9
    more = rows(10, 1000)
    np.testing.assert_allclose(made.run(more)["y"], model.predict(more, verbose=0), atol=1e-5)


def test_a_model_that_says_what_it_takes_needs_no_example_and_keeps_its_names() -> None:
    model = keras.Sequential([keras.Input((5,), name="features"), L.Dropout(0.5), L.Dense(2, name="score")])
    made = to_onnx(model)
    assert [str(spec) for spec in (*made.inputs, *made.outputs)] == ["features: FP32 [-1, 5]", "score: FP32 [-1, 2]"]


def test_a_model_that_says_nothing_needs_an_example() -> None:
    with pytest.raises(ModelNotBuiltError, match=r"was never called.*give an example, to_onnx\(model, x\[:8\]\)"):
        to_onnx(keras.Sequential([L.Dense(2)]))


def test_an_lstm_of_variable_length_is_refused_with_the_layers_name() -> None:
    model = keras.Sequential([L.LSTM(8, name="memory"), L.Dense(1)])
    with pytest.raises(ExportError, match=r"the recurrent layer 'memory'.*leave that axis out of dynamic") as got:
        to_onnx(model, rows(3, 6, 3), dynamic={"x": {1: "time"}})
    assert (got.value.operator, got.value.where) == ("LSTM", "layer memory")


def test_an_lstm_that_keras_exports_wrong_without_an_error_is_found_out() -> None:
    model = keras.Sequential([L.LSTM(8), L.Dense(1)])
    with pytest.raises(ExportMismatchError, match="output 'y' differs by") as got:
        to_onnx(model, rows(3, 6, 3), dynamic={"x": {1: "time"}}, method="keras")
    assert got.value.max_difference > 100 * got.value.tolerance


def test_attention_of_variable_length_is_exported() -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    found = L.Embedding(50, 8)(ids)
    found = L.LayerNormalization()(L.MultiHeadAttention(2, 4)(found, found))
    model = keras.Model(ids, L.Dense(2)(L.GlobalAveragePooling1D()(found)))
    made = to_onnx(model, RNG.integers(0, 50, (3, 7)), dynamic={"ids": {1: "time"}})
    assert str(made.inputs[0]) == "ids: INT32 [-1, -1]"
    tokens = RNG.integers(0, 50, (2, 19)).astype(np.int32)
    np.testing.assert_allclose(made.run(tokens)["y"], model.predict(tokens, verbose=0), atol=1e-5)


@pytest.mark.parametrize("kind", [list, dict])
def test_several_inputs_and_outputs(kind: type) -> None:
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    both = L.Concatenate()([a, b])
    model = keras.Model([a, b], [L.Dense(2, name="left")(both), L.Dense(1, name="right")(both)])
    one, two = rows(3, 4), rows(3, 3)
    made = to_onnx(model, [one, two] if kind is list else {"a": one, "b": two})
    assert [spec.name for spec in (*made.inputs, *made.outputs)] == ["a", "b", "left", "right"]
    got = made.run({"a": one, "b": two})
    for name, expected in zip(("left", "right"), model([one, two]), strict=True):
        np.testing.assert_allclose(got[name], keras.ops.convert_to_numpy(expected), atol=1e-5)


@keras.saving.register_keras_serializable("tests")
class Twice(L.Layer):  # type: ignore[name-defined, misc]  # keras is not followed
    def build(self, shape: Any) -> None:
        self.weight = self.add_weight(shape=(shape[-1],))

    def call(self, x: Any) -> Any:
        return x * self.weight + keras.ops.cumsum(x, axis=-1)


def test_custom_layers_lambdas_and_normalisation_are_exported_for_inference() -> None:
    model = keras.Sequential(
        [Twice(), L.Lambda(lambda x: x**2), L.BatchNormalization(), L.GaussianNoise(1.0), L.Dense(3)]
    )
    x = rows(3, 5)
    made = to_onnx(model, x)
    np.testing.assert_allclose(made.run(x)["y"], model.predict(x, verbose=0), atol=1e-5)


def test_a_mixed_precision_model_is_held_to_what_its_precision_allows_and_the_policy_stays() -> None:
    try:
        keras.config.set_dtype_policy("mixed_float16")
        model = keras.Sequential([L.Dense(8), L.Dense(2, dtype="float32")])
        made = to_onnx(model, rows(3, 5))
        assert keras.config.dtype_policy().name == "mixed_float16"
    finally:
        keras.config.set_dtype_policy("float32")
    assert made.verification is not None
    assert made.verification.rtol == 5e-3


def test_an_example_of_the_wrong_shape_is_refused_with_both_shapes() -> None:
    with pytest.raises(BuildError, match=r"'x' \[3, 4\].*expected .*\(None, 5\)"):
        to_onnx(keras.Sequential([keras.Input((5,)), L.Dense(2)]), rows(3, 4))


@pytest.mark.tensorflow
@pytest.mark.slow
def test_keras_on_tensorflow_exports_lstms_of_any_length_and_several_inputs() -> None:
    code = """
        import numpy as np, keras
        from keras import layers as L
        from inferway import ExportError, to_onnx
        rng = np.random.default_rng(0)
        model = keras.Sequential([L.LSTM(8), L.Dense(1)])
        x = rng.normal(size=(3, 6, 3)).astype("float32")
        made = to_onnx(model, x, dynamic={"x": {1: "time"}})
        longer = rng.normal(size=(2, 15, 3)).astype("float32")
        print(np.abs(made.predict(longer) - model(longer).numpy()).max() < 1e-5, made.backend, made.inputs[0])
        a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
        model = keras.Model({"a": a, "b": b}, {"p": L.Dense(2)(L.Concatenate()([a, b]))})
        print(to_onnx(model, {"a": x[:, 0, [0, 1, 2, 0]], "b": x[:, 0]}).outputs[0])
        class Svd(L.Layer):
            def call(self, x):
                return keras.ops.svd(x)[1]
        try:
            to_onnx(keras.Sequential([Svd()]), x)
        except ExportError as error:
            print(error.operator, error.where)
    """
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    agrees, outputs, refused = done.stdout.splitlines()
    assert agrees == "True tensorflow x: FP32 [-1, -1, 3]"
    assert outputs == "p: FP32 [-1, 2]"
    assert refused.startswith("Svd node ")
