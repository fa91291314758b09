"""scikit-learn's estimators and pipelines to ONNX, by skl2onnx; boosters' estimators that look like them, too."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from .._errors import BuildError, ConfigurationError, ExportError, MissingExtraError, ModelNotBuiltError
from .._tensors import Array, quoted_names
from .boosters import learn_boosters, unnamed_features
from .example import Arrays, is_frame, to_numpy
from .graph import put_in_front, rename, type_of
from .source import Source, Wishes
from .trees import exact_thresholds, missing_followed, widen
from .verify import first_line

OPSETS: Final = {"": 20, "ai.onnx.ml": 3}
_ASCII_WORDS: Final = "[a-zA-Z0-9_]+"
_WORDS: Final = rb"[\p{L}\p{N}_][\p{L}\p{N}_]+"
INNER: Final = "x"
_FLOAT, _DOUBLE = 1, 11


def sklearn_source(model: Any, example: object, wishes: Wishes, framework: str = "sklearn") -> Source:
    """See `export.to_onnx`."""
    try:
        from sklearn.exceptions import NotFittedError
        from sklearn.utils.validation import check_is_fitted
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "export", "exporting this model") from error

    title = {"sklearn": "scikit-learn", "xgboost": "XGBoost", "lightgbm": "LightGBM"}[framework]
    what = f"the {title} model {type(model).__name__}"
    try:
        check_is_fitted(model)
    except NotFittedError as error:
        raise ModelNotBuiltError(f"{what} was never fitted: call fit(x, y) first") from error
    if example is None:
        raise ConfigurationError(f"{what} is exported with an example of its inputs: to_onnx(model, x[:8])")
    inputs, rebuild, columns = table_of(example, wishes, what)
    calls = outputs_of(model, wishes, what)
    outputs = list(calls)

    def predict(arrays: Arrays) -> Arrays:
        rows = rebuild(arrays)
        return {name: plain(call(rows)) for name, call in calls.items()}

    attempts = ways(
        lambda types: convert_estimator(model, types, outputs, wishes.opset, what),
        inputs, bool(columns) and addresses_columns(model),
    )  # fmt: skip
    return Source(
        framework, what, inputs, predict, attempts, digest_of(model),
        classes=classes_of(model), columns=columns, ties=ties_of(outputs),
        table=True,
    )  # fmt: skip


def ties_of(outputs: Sequence[str]) -> dict[str, str]:
    """The output whose scores decided the labels."""
    return {outputs[0]: outputs[1]} if len(outputs) > 1 else {}


# --- inputs ------------------------------------------------------------------------------------------------------


def table_of(
    example: object, wishes: Wishes, what: str
) -> tuple[dict[str, Array], Callable[[Arrays], Any], tuple[str, ...]]:
    """Rows as the graph takes them, how rows are made of these again, and the names of the columns.

    A data frame is one input ``(rows, 1)`` for each column, of the column's type; anything else is one input ``x``.
    """
    if is_frame(example):
        if wishes.input_names is not None:
            raise ConfigurationError("input_names does not go with a data frame: its columns name the inputs")
        return _frame(example)
    if wishes.input_names and len(wishes.input_names) != 1:
        raise ConfigurationError(f"{what} takes one input, and input_names has {len(wishes.input_names)} names")
    name = wishes.input_names[0] if wishes.input_names else INNER
    array = to_numpy(example, "the example")
    flat = array.ndim == 1
    if flat and array.dtype.kind != "O":
        raise ConfigurationError(f"{what} takes rows: expected an example of shape (rows, columns), got {array.shape}")
    return (
        {name: array[:, None] if flat else array},
        lambda arrays: arrays[name][:, 0] if flat else arrays[name],
        (),
    )


def _frame(frame: Any) -> tuple[dict[str, Array], Callable[[Arrays], Any], tuple[str, ...]]:
    pandas = sys.modules.get("pandas")
    of_pandas = pandas is not None and isinstance(frame, pandas.DataFrame)
    columns = list(frame.columns)
    names = [str(column) for column in columns]
    if len(set(names)) != len(names):
        raise ConfigurationError(f"expected columns of different names, got {quoted_names(names)}")
    inputs = {name: _column(frame[column], name) for name, column in zip(names, columns, strict=True)}
    missing = {
        name: next(value for value in frame[column] if not isinstance(value, str))
        for name, column in zip(names, columns, strict=True)
        if inputs[name].dtype.kind == "O" and not all(isinstance(value, str) for value in frame[column])
    }
    maker = type(frame) if of_pandas else sys.modules["polars"].DataFrame
    dtypes = dict(zip(columns, frame.dtypes, strict=True)) if of_pandas else {}

    def rebuild(arrays: Arrays) -> Any:
        values = {}
        for name, column in zip(names, columns, strict=True):
            found = arrays[name][:, 0]
            if name in missing:
                found = np.array([text or missing[name] for text in found], object)
            values[column] = found
        made = maker(values)
        return made.astype(dtypes) if of_pandas else made

    return inputs, rebuild, tuple(names)


def _column(series: Any, name: str) -> Array:
    """A column as ``(rows, 1)``. What is missing in a column of texts stands as an empty one."""
    kind = str(series.dtype)
    if kind in (
        "Int8",
        "Int16",
        "Int32",
        "Int64",
        "UInt8",
        "UInt16",
        "UInt32",
        "UInt64",
        "Float32",
        "Float64",
        "boolean",
    ):
        # pandas' numbers that may be missing.
        whole = kind.startswith(("I", "U")) and not series.isna().any()
        values = (
            series.to_numpy(dtype=kind.lower() if whole else np.float64, na_value=np.nan)
            if not whole
            else (series.to_numpy(dtype=kind.lower()))
        )
        return np.asarray(values)[:, None]
    array = to_numpy(np.asarray(series.to_numpy()), f"column '{name}'")
    if array.dtype.kind == "O":
        array = _texts(array, name)
    return array[:, None]


def _texts(array: Array, name: str) -> Array:
    kinds = {type(value) for value in array}
    if kinds <= {bool, np.bool_}:
        return array.astype(np.bool_)
    found = np.empty(array.shape, object)
    for place, value in enumerate(array):
        if isinstance(value, str):
            found[place] = value
        elif value is None or value != value or type(value).__name__ == "NAType":
            found[place] = ""
        else:
            raise ConfigurationError(
                f"column '{name}' expects texts alone or numbers alone, got {value!r:.40} of type "
                f"{type(value).__name__} among others; convert it with astype first"
            )
    return found


def steps_of(model: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The model and every estimator in it, each with where it is, such as ``columns -> text``."""
    yield path, model
    parts: list[tuple[str, Any]] = []
    for member in ("steps", "transformer_list", "transformers_", "named_estimators_"):
        listed = getattr(model, member, None)
        if isinstance(listed, Mapping):
            listed = list(listed.items())
        if isinstance(listed, list):
            parts += [(str(part[0]), part[1]) for part in listed if isinstance(part, tuple)]
    for member in ("best_estimator_", "estimator_", "regressor_"):
        held = getattr(model, member, None)
        if held is not None:
            parts.append((member, held))
    for member in ("estimators_", "calibrated_classifiers_"):
        listed = getattr(model, member, None)
        if isinstance(listed, list | np.ndarray) and not hasattr(model, "named_estimators_"):
            parts += [(member, held) for held in np.asarray(listed, object).ravel()[:1]]
    for name, part in parts:
        if hasattr(part, "get_params"):
            yield from steps_of(part, f"{path} -> {name}" if path else name)


def addresses_columns(model: Any) -> bool:
    """Whether some step takes columns by their names, so that they must stay apart."""
    return any(type(part).__name__ == "ColumnTransformer" for _, part in steps_of(model))


# --- outputs -----------------------------------------------------------------------------------------------------


def classes_of(model: Any) -> tuple[Any, ...] | None:
    """Labels of a classifier, as Python's own values; None where there are none, or those of several targets."""
    found = getattr(model, "classes_", None)
    if found is None or (isinstance(found, list) and found and isinstance(found[0], np.ndarray)):
        return None
    return tuple(np.asarray(found).tolist())


def outputs_of(model: Any, wishes: Wishes, what: str) -> dict[str, Callable[[Any], Any]]:
    """Names of the graph's outputs, and the model's own methods that compute them."""
    found: dict[str, Callable[[Any], Any]]
    kind = getattr(model, "_estimator_type", None)
    if hasattr(model, "predict_proba"):
        found = {"label": model.predict, "probabilities": model.predict_proba}
    elif hasattr(model, "predict") and hasattr(model, "decision_function"):
        found = {"label": model.predict, "scores": model.decision_function}
    elif kind == "classifier":
        found = {"label": model.predict}
    elif hasattr(model, "predict") and hasattr(model, "transform") and hasattr(model, "labels_"):
        found = {"label": model.predict, "scores": model.transform}
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


def plain(values: Any) -> Array:
    """What an estimator gave, dense, as an array."""
    if isinstance(values, list):
        raise BuildError("the model has several targets, each with labels of its own; export one model for each")
    dense = values.toarray() if hasattr(values, "toarray") else values
    return to_numpy(dense.to_numpy() if is_frame(dense) else dense, "an output")


# --- conversion --------------------------------------------------------------------------------------------------

Convert = Callable[[Arrays], tuple[Any, dict[str, list[float]]]]
"""Arrays that say names, types and shapes of the inputs, to a graph and the double thresholds of its trees."""


def ways(convert: Convert, inputs: Arrays, apart: bool) -> list[Callable[[], Any]]:
    """Ways to a graph with these inputs, the most exact first. One that does not apply gives None.

    Args:
        apart: the model takes columns by name, so that each stays an input of the conversion.
    """

    def typed(numbers: Callable[[Array], Array]) -> Callable[[], Any]:
        """Columns stay apart and keep their types; some are cast before anything else."""

        def make() -> Any:
            given = {name: array if array.dtype.kind == "O" else numbers(array) for name, array in inputs.items()}
            proto, _ = convert(given)
            cast_each(proto, inputs)
            return proto

        return make

    if apart or any(array.dtype.kind == "O" for array in inputs.values()):
        kinds = {array.dtype.name for array in inputs.values() if array.dtype.kind != "O"}
        found = [typed(lambda array: array)]
        if len(kinds) > 1:
            # An imputer or a scaler over columns of several types wants them of one.
            found.append(typed(lambda array: array.astype(np.float64)))
        if "float64" in kinds:
            found.append(typed(lambda array: array.astype(np.float32) if array.dtype == np.float64 else array))
        if kinds - {"float32"}:
            found.append(typed(lambda array: array.astype(np.float32)))
        return found
    joined = np.concatenate([array[:2] for array in inputs.values()], axis=1) if len(inputs) > 1 else None
    whole = next(iter(inputs.values())) if joined is None else joined
    inner = next(iter(inputs)) if joined is None else INNER

    def matrix(dtype: Any, exact: bool) -> Callable[[], Any]:
        def make() -> Any:
            proto, thresholds = convert({inner: whole.astype(dtype)})
            elem_type = _FLOAT if dtype == np.float32 else type_of(whole.astype(dtype))
            if exact:
                if not widen(proto, thresholds, inner):
                    return None
                elem_type = _DOUBLE
            if joined is not None or type_of(whole) != elem_type:
                put_in_front(proto, inputs, inner, elem_type)
            return proto

        return make

    if whole.dtype == np.float32:
        return [matrix(np.float32, False)]
    if whole.dtype == np.float64:
        return [matrix(np.float32, True), matrix(np.float64, False), matrix(np.float32, False)]
    return [matrix(whole.dtype, False), matrix(np.float32, False)]


def cast_each(proto: Any, inputs: Arrays) -> None:
    """Give each input of a graph the type of these arrays, and cast it to what the graph was made for."""
    from .runtime import onnx_module

    helper = onnx_module().helper
    graph = proto.graph
    nodes = []
    for value in graph.input:
        array = inputs[value.name]
        elem_type = value.type.tensor_type.elem_type
        if type_of(array) == elem_type:
            continue
        name = value.name
        rename(proto, [name], [f"{name}__cast"])
        value.name = name
        value.type.tensor_type.elem_type = type_of(array)
        nodes.append(helper.make_node("Cast", [name], [f"{name}__cast"], to=elem_type))
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])


def convert_estimator(
    model: Any, inputs: Arrays, outputs: Sequence[str], opset: int | None, what: str
) -> tuple[Any, dict[str, list[float]]]:
    """The graph of an estimator.

    Args:
        inputs: say names, types and shapes.
        outputs: names of the graph's outputs.
    Returns:
        The graph, and the double thresholds of its trees, see `trees.exact_thresholds`.
    Raises:
        ExportError: a step has no form in ONNX.
        MissingExtraError: skl2onnx, or onnxmltools for a booster, is not installed.
    """
    try:
        import skl2onnx
        from skl2onnx.common import data_types
        from skl2onnx.common._container import ModelComponentContainer
    except ImportError as error:
        raise MissingExtraError("skl2onnx", "export", "exporting a scikit-learn model") from error

    parts = list(steps_of(model))
    learn_boosters([part for _, part in parts])
    _learn_zipmap(_last(model))
    types = [(name, _type(array, data_types)) for name, array in inputs.items()]
    wanted: list[dict[str, Any]] = [{}]
    if len(outputs) > 1:
        wanted = [{"zipmap": False}, {}]
        if not hasattr(model, "predict_proba"):
            wanted = [{"zipmap": False, "raw_scores": True}, {"raw_scores": True}, *wanted]
    failure: Exception | None = None
    for options in wanted:
        try:
            with (
                exact_thresholds(ModelComponentContainer) as thresholds,
                missing_followed(),
                unnamed_features([part for _, part in parts]),
                _as_converters_want([part for _, part in parts]),
            ):
                proto = skl2onnx.convert_sklearn(
                    model, name=type(model).__name__, initial_types=types,
                    options={id(_last(model)): options} if options else None,
                    target_opset={**OPSETS, **({"": opset} if opset else {})},
                )  # fmt: skip
        except NameError as error:  # an option that this estimator does not have
            failure = error
            continue
        except Exception as error:
            failure = error
            break
        _localized(proto)
        _in_every_script(proto, parts)
        given = [value.name for value in proto.graph.output]
        if len(given) < len(outputs):
            raise ExportError(f"{what} has {len(outputs)} outputs, and its graph has {len(given)}")
        del proto.graph.output[len(outputs) :]
        rename(proto, given[: len(outputs)], outputs)
        # The thresholds are kept by names of outputs, some of which have just changed.
        changed = dict(zip(given, outputs, strict=False))
        return proto, {changed.get(name, name): values for name, values in thresholds.items()}
    assert failure is not None
    raise _refused(failure, parts, what) from failure


def _last(model: Any) -> Any:
    """The estimator that gives a pipeline's, or a search's, predictions; options are its."""
    while True:
        if hasattr(model, "best_estimator_"):
            model = model.best_estimator_
        elif isinstance(getattr(model, "steps", None), list):
            model = model.steps[-1][1]
        else:
            return model


@contextlib.contextmanager
def _as_converters_want(parts: Sequence[Any]) -> Iterator[None]:
    """Settings that the converters insist on, and that change no prediction of the graph; undone afterwards.

    Voting: ``flatten_transform`` matters to ``transform`` alone. Imputing texts: what is missing is an empty text in
    the graph, since its tensors of texts hold nothing else (see `_column`).
    """
    changes: list[tuple[Any, str, Any]] = []
    for part in parts:
        if type(part).__name__ == "VotingClassifier" and part.flatten_transform:
            changes.append((part, "flatten_transform", False))
        statistics = getattr(part, "statistics_", None)
        if type(part).__name__ == "SimpleImputer" and getattr(statistics, "dtype", None) == np.dtype(object):
            changes.append((part, "missing_values", ""))
    before = [(part, name, getattr(part, name)) for part, name, _ in changes]
    try:
        for part, name, value in changes:
            setattr(part, name, value)
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def _learn_zipmap(estimator: Any) -> None:
    """Let a classifier without probabilities, such as LinearSVC, take the option that every pipeline sets."""
    from skl2onnx import update_registered_converter
    from skl2onnx._supported_operators import sklearn_operator_name_map
    from skl2onnx.common._registration import _converter_pool, get_converter, get_shape_calculator

    alias = sklearn_operator_name_map.get(type(estimator))
    known = _converter_pool.get(alias)
    allowed = known.get_allowed_options() if known is not None else None
    if allowed and hasattr(estimator, "classes_") and "raw_scores" in allowed and "zipmap" not in allowed:
        update_registered_converter(
            type(estimator), alias, get_shape_calculator(alias), get_converter(alias)._fct, overwrite=True,
            options={**{name: [True, False] for name in allowed}, "zipmap": [True, False, "columns"]},
        )  # fmt: skip


def _localized(proto: Any) -> None:
    """Lower case as in every locale: the converter's ``en_US`` is on few servers, and ONNX Runtime wants it there."""
    for node in proto.graph.node:
        if node.op_type == "StringNormalizer":
            kept = [attribute for attribute in node.attribute if attribute.name != "locale"]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.add(name="locale", type=3, s=b"C.UTF-8")


def _in_every_script(proto: Any, parts: Sequence[tuple[str, Any]]) -> None:
    """Words as scikit-learn's default pattern has them: two letters or digits of any script, or more. The converter
    writes letters of ASCII there, which takes `caf` for a word of `café`."""
    if any(getattr(part, "token_pattern", None) == _ASCII_WORDS for _, part in parts):
        return  # somebody's own wish, which looks the same in the graph
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Tokenizer" and attribute.name == "tokenexp" and attribute.s == _ASCII_WORDS.encode():
                attribute.s = _WORDS


def _refused(error: Exception, parts: Sequence[tuple[str, Any]], what: str) -> ExportError:
    text = first_line(error)
    named = re.search(r"for type '<class '([\w.]+)'>'", str(error)) or re.search(r"\b(?:Sklearn)(\w+)\b", str(error))
    operator = where = None
    if named:
        operator = named[1].rpartition(".")[2]
    else:
        operator = next((kind for kind in (type(part).__name__ for _, part in parts[1:]) if kind in str(error)), None)
    where = next((path for path, part in parts if type(part).__name__ == operator and path), None)
    step = f"; it is the step '{where}'" if where else ""
    if "Unable to find a shape calculator" in str(error) or "Unable to find a converter" in str(error):
        return ExportError(
            f"{what} has {operator}, for which skl2onnx has no form in ONNX{step}. Use another estimator for that "
            f"step, or do it before the model is called",
            operator=operator, where=where,
        )  # fmt: skip
    return ExportError(f"{what} cannot be turned into ONNX: {text}{step}", operator=operator, where=where)


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
    except Exception:  # it holds a function that cannot be pickled
        content = repr(model).encode()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
