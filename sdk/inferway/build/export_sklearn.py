"""scikit-learn's estimators and pipelines to ONNX, by skl2onnx."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from .._errors import BuildError, ConfigurationError, ExportError, MissingExtraError, ModelNotBuiltError
from .._tensors import Array, quoted_names
from .example import Arrays, is_frame, to_numpy
from .source import Source, Wishes
from .verify import first_line

OPSETS: Final = {"": 20, "ai.onnx.ml": 3}


def sklearn_source(model: Any, example: object, wishes: Wishes) -> Source:
    """See `export.to_onnx`."""
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    what = f"the scikit-learn model {type(model).__name__}"
    try:
        check_is_fitted(model)
    except NotFittedError as error:
        raise ModelNotBuiltError(f"{what} was never fitted: call fit(x, y) first") from error
    if example is None:
        raise ConfigurationError(f"{what} is exported with an example of its inputs: to_onnx(model, x[:8])")
    inputs, rebuild, columns = table_of(example, wishes, what)
    outputs = outputs_of(model, wishes, what)

    def predict(arrays: Arrays) -> Arrays:
        rows = rebuild(arrays)
        return {name: _plain(call(rows)) for name, call in outputs.items()}

    def convert() -> Any:
        return convert_estimator(model, inputs, list(outputs), wishes.opset, what)

    classes = classes_of(model)
    ties = {"label": "probabilities" if "probabilities" in outputs else "scores"}
    return Source(
        "sklearn", what, inputs, predict, [convert], digest_of(model), classes=classes, columns=columns, ties=ties
    )


def table_of(
    example: object, wishes: Wishes, what: str
) -> tuple[dict[str, Array], Callable[[Arrays], Any], tuple[str, ...]]:
    """Rows as the graph takes them, how rows are made of these, and the names of the columns.

    A data frame is one input ``(rows, 1)`` for each column, of the column's type; anything else is one input ``x``.
    """
    if is_frame(example):
        frame: Any = example
        names = [str(column) for column in frame.columns]
        if wishes.input_names is not None:
            raise ConfigurationError("input_names does not go with a data frame: its columns name the inputs")
        inputs = {name: _column(frame[column], name) for name, column in zip(names, frame.columns, strict=True)}
        dtypes = list(frame.dtypes)
        columns = list(frame.columns)

        def rebuild(arrays: Arrays) -> Any:
            import pandas

            made = pandas.DataFrame({column: arrays[name][:, 0] for name, column in zip(names, columns, strict=True)})
            return made.astype(dict(zip(columns, dtypes, strict=True)))

        return inputs, rebuild, tuple(names)
    name = wishes.input_names[0] if wishes.input_names else "x"
    if wishes.input_names and len(wishes.input_names) != 1:
        raise ConfigurationError(f"{what} takes one input, and input_names has {len(wishes.input_names)} names")
    array = to_numpy(example, "the example")
    text = array.dtype.kind == "O"
    flat = array.ndim == 1

    def plain(arrays: Arrays) -> Any:
        found = arrays[name]
        return found[:, 0] if flat else found

    if flat and not text:
        raise ConfigurationError(f"{what} takes rows: expected an example of shape (rows, columns), got {array.shape}")
    return {name: array[:, None] if flat else array}, plain, ()


def _column(series: Any, name: str) -> Array:
    values = series.to_numpy()
    if str(series.dtype) == "category":
        values = np.asarray(values)
    array = to_numpy(values, f"column '{name}'")
    return array[:, None]


def classes_of(model: Any) -> tuple[Any, ...] | None:
    """Labels of a classifier, as Python's own values."""
    found = getattr(model, "classes_", None)
    if found is None or (isinstance(found, list) and found and isinstance(found[0], np.ndarray)):
        return None
    return tuple(np.asarray(found).tolist())


def outputs_of(model: Any, wishes: Wishes, what: str) -> dict[str, Callable[[Any], Any]]:
    """Names of the graph's outputs, and the model's own methods that compute them."""
    from sklearn.base import is_classifier, is_clusterer, is_outlier_detector

    found: dict[str, Callable[[Any], Any]]
    if is_classifier(model):
        if hasattr(model, "predict_proba"):
            found = {"label": model.predict, "probabilities": model.predict_proba}
        else:
            found = {"label": model.predict, "scores": model.decision_function}
    elif is_clusterer(model) and hasattr(model, "predict"):
        found = {"label": model.predict}
        if hasattr(model, "transform"):
            found["scores"] = model.transform
    elif is_outlier_detector(model):
        found = {"label": model.predict, "scores": model.decision_function}
    elif hasattr(model, "predict"):
        found = {"y": model.predict}
    elif hasattr(model, "transform"):
        found = {"y": model.transform}
    else:
        raise BuildError(f"{what} has neither predict nor transform, so that there is nothing to export")
    if wishes.output_names is not None:
        if len(wishes.output_names) != len(found):
            raise ConfigurationError(
                f"output_names has {len(wishes.output_names)} names, and {what} has the outputs "
                f"{quoted_names(list(found))}"
            )
        found = dict(zip(wishes.output_names, found.values(), strict=True))
    return found


def _plain(values: Any) -> Array:
    dense = values.toarray() if hasattr(values, "toarray") else values
    return to_numpy(dense.to_numpy() if is_frame(dense) else dense, "an output")


def convert_estimator(model: Any, inputs: Arrays, outputs: Sequence[str], opset: int | None, what: str) -> Any:
    """The graph, with inputs of the types of ``inputs`` and outputs of these names."""
    try:
        import skl2onnx
        from skl2onnx.common import data_types
    except ImportError as error:
        raise MissingExtraError("skl2onnx", "export", "exporting a scikit-learn model") from error
    from .export_keras import rename

    types = [(name, _type(array, data_types)) for name, array in inputs.items()]
    options = {id(model): {"zipmap": False}} if "label" in outputs and "probabilities" in outputs else {}
    try:
        proto = skl2onnx.convert_sklearn(
            model, initial_types=types, options=options, target_opset={**OPSETS, **({"": opset} if opset else {})},
        )  # fmt: skip
    except Exception as error:
        raise ExportError(f"{what} cannot be turned into ONNX: {first_line(error)}") from error
    rename(proto, [value.name for value in proto.graph.output], outputs)
    return proto


def _type(array: Array, data_types: Any) -> Any:
    shape = [None, *array.shape[1:]]
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "O":
        return data_types.StringTensorType(shape)
    if kind == "b":
        return data_types.BooleanTensorType(shape)
    if kind == "f":
        return (data_types.DoubleTensorType if size == 8 else data_types.FloatTensorType)(shape)
    return (data_types.Int32TensorType if size == 4 and kind == "i" else data_types.Int64TensorType)(shape)


def digest_of(model: Any) -> str:
    """SHA-256 of a fitted estimator."""
    try:
        content = pickle.dumps(model, protocol=5)
    except Exception:
        content = repr(model).encode()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
