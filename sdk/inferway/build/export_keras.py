"""Keras 3 models to ONNX, on whichever backend they run.

On PyTorch a Keras model is a ``torch.nn.Module`` and goes the way of those (`export_torch`). ``model.export`` is not
used there: with a variable axis it takes the older TorchScript exporter, which writes an LSTM for one length, without
an error (Keras 3.15, PyTorch 2.13). On TensorFlow ``model.export`` goes through tf2onnx. On JAX nothing leads to ONNX
but through TensorFlow, so the weights are asked for in one of the other two.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from .._errors import BuildError, ConfigurationError, ExportError, MissingExtraError, ModelNotBuiltError
from .._tensors import Array, quoted_names, shape_text
from .example import Arrays, Tree, is_frame, to_numpy, tree_of, unique
from .export_torch import export_module, from_numpy, strip
from .graph import rename
from .quiet import scratch
from .source import Source, Wishes, axes_of
from .verify import first_line

TF_OPSET: Final = 18
"""The newest that tf2onnx 1.17 writes."""
_AUTOMATIC: Final = re.compile(r"(keras_tensor|input_layer|input|keras_tensor_\w+)(_?\d+)*(CLONE)*")
"""Names that Keras counts out, which are others in the next process."""


def keras_source(model: Any, example: object, wishes: Wishes) -> Source:
    """See `export.to_onnx`."""
    import keras

    backend = str(keras.backend.backend())
    if not isinstance(model, keras.Model):
        raise ConfigurationError(
            f"expected a whole Keras model, got the layer {type(model).__name__}; put it into keras.Sequential([layer])"
        )
    what = f"the Keras model '{model.name}'"
    if example is None:
        example = _made_up(model, what)
    tree, names = _arguments(model, example, wishes, what)
    inputs = {
        name: _typed(to_numpy(leaf, f"input '{name}'"), spec)
        for name, leaf, spec in zip(names, tree.leaves, _specs(model, tree), strict=True)
    }

    def call(tensors: Sequence[Any]) -> Any:
        return model(tree.rebuild(tensors), training=False)

    def run(arrays: Arrays) -> list[Array]:
        tensors = [keras.ops.convert_to_tensor(_text(arrays[name]), dtype=_dtype(arrays[name])) for name in names]
        with _no_gradients(backend):
            return [np.asarray(keras.ops.convert_to_numpy(leaf)) for _, leaf in _leaves(call(tensors))]

    try:
        first = run(inputs)
    except Exception as error:
        shapes = ", ".join(f"'{name}' {shape_text(array.shape)}" for name, array in inputs.items())
        expected = "" if not model.built else f", expected {_expected(model)}"
        made = BuildError if model.built else ModelNotBuiltError
        raise made(f"{what} cannot be run on the example ({shapes}){expected}: {first_line(error)}") from error
    with _no_gradients(backend):
        paths = [
            path
            for path, _ in _leaves(
                call([keras.ops.convert_to_tensor(_text(inputs[name]), dtype=_dtype(inputs[name])) for name in names])
            )
        ]
    outputs = list(wishes.output_names or _output_names(model, paths))
    if len(outputs) != len(first):
        raise ConfigurationError(f"output_names has {len(outputs)} names, and {what} has {len(first)} outputs")

    def predict(arrays: Arrays) -> Arrays:
        return dict(zip(outputs, run(arrays), strict=True))

    def convert() -> Any:
        axes = axes_of(inputs, wishes.dynamic)
        if backend == "tensorflow" and wishes.method is None:
            return _by_tf2onnx(call, inputs, outputs, axes, wishes.opset, what)
        if wishes.method == "keras":
            return _by_keras(model, inputs, outputs, axes, wishes.opset, what)
        if backend == "torch":
            import torch

            tensors = [from_numpy(array, torch) for array in inputs.values()]
            try:
                return export_module(call, model, tensors, names, outputs, axes, wishes.opset, what)
            except ExportError as error:
                recurrent = _recurrent(model)
                if (
                    recurrent is None
                    or error.operator is not None
                    or not any(len(named) > 1 for named in axes.values())
                ):
                    raise
                raise ExportError(
                    f"{what} has the recurrent layer '{recurrent}', which Keras on PyTorch writes out step by step, "
                    f"for one number of steps; leave that axis out of dynamic, or export the model in a process that "
                    f"was started with KERAS_BACKEND=tensorflow",
                    operator=type(model.get_layer(recurrent)).__name__ if _has(model, recurrent) else None,
                    where=f"layer {recurrent}",
                ) from error
        raise ExportError(
            f"{what} runs on the Keras backend '{backend}', from which nothing leads to ONNX; save it, and load it in "
            f"a process that was started with KERAS_BACKEND=torch"
        )

    if wishes.method not in (None, "keras", "torch"):
        raise ConfigurationError(f"method of a Keras model expects 'torch' or 'keras', got {wishes.method!r}")
    return Source(
        "keras", what, inputs, predict, [convert], digest_of(model), backend=backend, precision=precision_of(model)
    )


def _made_up(model: Any, what: str) -> Any:
    """Two rows for a model that says itself what it takes."""
    if not getattr(model, "inputs", None):
        raise ModelNotBuiltError(
            f"{what} was never called, and nothing says what it takes: give an example, to_onnx(model, x[:8]), or "
            f"begin it with keras.Input(shape)"
        )
    rng = np.random.default_rng(0)
    made = []
    for tensor in model.inputs:
        if None in tensor.shape[1:] or tensor.dtype == "string":
            raise ModelNotBuiltError(
                f"{what} takes '{tensor.name}' of shape {tensor.shape} and type {tensor.dtype}, of which no example "
                f"can be made up: give one, to_onnx(model, x[:8])"
            )
        made.append(rng.uniform(0, 1, (2, *tensor.shape[1:])).astype(tensor.dtype))
    return made[0] if len(made) == 1 else made


def _expected(model: Any) -> str:
    return ", ".join(f"'{tensor.name}' {tuple(tensor.shape)}" for tensor in (model.inputs or [])) or "another shape"


def _arguments(model: Any, example: object, wishes: Wishes, what: str) -> tuple[Tree, list[str]]:
    if is_frame(example):
        frame: Any = example
        columns = {str(column) for column in frame.columns}
        known = [tensor.name for tensor in (getattr(model, "inputs", None) or [])]
        example = (
            {name: frame[name].to_numpy()[:, None] for name in known}
            if len(known) > 1 and set(known) <= columns
            else frame.to_numpy()
        )
    tree = tree_of(example)
    if wishes.input_names is not None:
        names = list(wishes.input_names)
    elif isinstance(example, Mapping):
        names = unique([".".join(map(str, path)) for path in tree.paths])
    else:
        known = [str(tensor.name) for tensor in (getattr(model, "inputs", None) or [])]
        if len(known) != len(tree.leaves):
            known = [""] * len(tree.leaves)
        single = len(known) == 1
        names = unique(
            [
                ("x" if single else f"x{place}") if not name or _AUTOMATIC.fullmatch(name) else name
                for place, name in enumerate(known)
            ]
        )
    if len(names) != len(tree.leaves):
        raise ConfigurationError(
            f"input_names has {len(names)} names, and the example of {what} has {len(tree.leaves)}"
        )
    return tree, names


def _specs(model: Any, tree: Tree) -> list[str | None]:
    """The dtype that the model declares for each leaf; None where it does not say."""
    known = list(getattr(model, "inputs", None) or [])
    names = list(getattr(model, "input_names", None) or [tensor.name for tensor in known])
    if len(known) != len(tree.leaves):
        return [None] * len(tree.leaves)
    by_name = dict(zip(names, known, strict=False))
    return [
        str(by_name[path[0]].dtype if path and path[0] in by_name else tensor.dtype)
        for path, tensor in zip(tree.paths, known, strict=True)
    ]


def _typed(array: Array, dtype: str | None) -> Array:
    """An array of the type that the model declares; numpy's 64-bit floats stand for the usual 32 where it is silent."""
    if dtype is not None and dtype != "string" and array.dtype.kind in "biuf":
        return array.astype(_numpy(dtype))
    return array.astype(np.float32) if array.dtype == np.float64 and dtype is None else array


def _numpy(dtype: str) -> Any:
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(dtype)


def _dtype(array: Array) -> str:
    return "string" if array.dtype.kind == "O" else str(array.dtype)


def _text(array: Array) -> Any:
    return array.tolist() if array.dtype.kind == "O" else array


def _no_gradients(backend: str) -> Any:
    import contextlib

    if backend == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def _leaves(outputs: Any) -> list[tuple[tuple[str | int, ...], Any]]:
    if isinstance(outputs, Mapping):
        return [((str(key), *path), leaf) for key, item in outputs.items() for path, leaf in _leaves(item)]
    if isinstance(outputs, list | tuple):
        return [((place, *path), leaf) for place, item in enumerate(outputs) for path, leaf in _leaves(item)]
    return [((), outputs)]


def _output_names(model: Any, paths: Sequence[tuple[str | int, ...]]) -> list[str]:
    """Keys of a mapping; names that the user gave to the last layers; else ``y``."""
    if any(isinstance(part, str) for path in paths for part in path):
        return unique([".".join(map(str, path)) for path in paths])
    if len(paths) == 1:
        last = model.layers[-1] if getattr(model, "layers", None) and not _is_subclass(model) else None
        return [str(last.name)] if last is not None and not _counted_out(last) else ["y"]
    known = [str(name) for name in (getattr(model, "output_names", None) or [])]
    if len(known) == len(paths) and len(set(known)) == len(known) and not any(re.search(r"_\d+$", n) for n in known):
        return known
    return [f"y{place}" for place in range(len(paths))]


def _by_tf2onnx(
    call: Any,
    inputs: Arrays,
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    opset: int | None,
    what: str,
) -> Any:
    """The graph of a model on TensorFlow. ``model.export`` does the same, for a model with one input."""
    import tensorflow

    try:
        import tf2onnx
    except ImportError as error:
        raise MissingExtraError("tf2onnx", "tensorflow", "exporting a Keras model on TensorFlow") from error
    specs = [
        tensorflow.TensorSpec(
            [None if axis in axes.get(name, {}) else size for axis, size in enumerate(array.shape)],
            _dtype(array), name=f"input_{place}",
        )
        for place, (name, array) in enumerate(inputs.items())
    ]  # fmt: skip
    flat = tensorflow.function(lambda *tensors: [leaf for _, leaf in _leaves(call(tensors))])
    try:
        proto, _ = tf2onnx.convert.from_function(flat, specs, opset=min(opset or TF_OPSET, TF_OPSET))
    except Exception as error:
        raise ExportError(f"{what} cannot be turned into ONNX: {first_line(error)}") from error
    strip(proto)
    given = {value.name for value in proto.graph.input}
    kept = [(f"input_{place}", name) for place, name in enumerate(inputs) if f"input_{place}" in given]
    if len(kept) < len(inputs):
        unused = [name for place, name in enumerate(inputs) if f"input_{place}" not in given]
        raise ExportError(f"{what} does not use its inputs {quoted_names(unused)}; leave them out of the model")
    rename(proto, *map(list, zip(*kept, strict=True)))
    rename(proto, [value.name for value in proto.graph.output], outputs)
    return proto


def _is_subclass(model: Any) -> bool:
    """Whether a model's own ``call`` says which layer comes last."""
    import keras

    return type(model) is not keras.Sequential and not isinstance(model, keras.src.models.Functional)


def _counted_out(layer: Any) -> bool:
    """Whether a layer has the name that Keras gives: its class's, and a number."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(layer).__name__).lower()
    return re.fullmatch(rf"{re.escape(snake)}(_\d+)?", str(layer.name)) is not None


def _by_keras(
    model: Any,
    inputs: Arrays,
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    opset: int | None,
    what: str,
) -> Any:
    """The graph as ``model.export`` makes it."""
    import keras
    import onnx

    if keras.backend.backend() == "tensorflow":
        try:
            import tf2onnx  # noqa: F401 - keras needs it
        except ImportError as error:
            raise MissingExtraError("tf2onnx", "tensorflow", "exporting a Keras model on TensorFlow") from error
    signature = [
        keras.InputSpec(
            shape=[None if axis in axes.get(name, {}) else size for axis, size in enumerate(array.shape)],
            dtype=_dtype(array), name=name,
        )
        for name, array in inputs.items()
    ]  # fmt: skip
    with scratch() as folder:
        path = folder / "model.onnx"
        try:
            given = signature if len(signature) != 1 else [signature[0]]
            model.export(str(path), format="onnx", verbose=False, input_signature=given,
                         **({"opset_version": opset} if opset else {}))  # fmt: skip
            proto = onnx.load(str(path))
        except Exception as error:
            raise ExportError(f"{what} cannot be exported by Keras: {first_line(error)}") from error
    strip(proto)
    rename(proto, [value.name for value in proto.graph.input], list(inputs))
    rename(proto, [value.name for value in proto.graph.output], outputs)
    return proto


def _recurrent(model: Any) -> str | None:
    """The name of the first recurrent layer."""
    import keras

    return next((str(layer.name) for layer in model._flatten_layers() if isinstance(layer, keras.layers.RNN)), None)


def _has(model: Any, name: str) -> bool:
    return any(layer.name == name for layer in model.layers)


def precision_of(model: Any) -> str:
    """The least precise type that a layer computes with."""
    kinds = {str(getattr(layer, "compute_dtype", "")) for layer in model._flatten_layers()}
    return next((kind for kind in ("bfloat16", "float16") if kind in kinds), "float32")


def digest_of(model: Any) -> str:
    """SHA-256 of a model's layers and weights."""
    try:
        structure = json.dumps(model.get_config(), sort_keys=True, default=str)
    except Exception:
        structure = type(model).__qualname__
    digest = hashlib.sha256(structure.encode())
    for variable in model.weights:
        import keras

        array = np.asarray(keras.ops.convert_to_numpy(variable))
        digest.update(f"\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return f"sha256:{digest.hexdigest()}"
