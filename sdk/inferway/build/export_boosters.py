"""XGBoost, LightGBM and CatBoost to ONNX, as estimators and in their own forms.

Estimators of XGBoost and LightGBM go the way of scikit-learn's (`export_sklearn`). A ``Booster`` of XGBoost is put into
an estimator, one of LightGBM goes through onnxmltools, and CatBoost writes ONNX itself, with its probabilities as a
list of mappings, which is no tensor: that part is cut off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._errors import ConfigurationError, ExportError, MissingExtraError, ModelNotBuiltError
from .._tensors import Array
from .example import Arrays
from .export_sklearn import OPSETS, convert_estimator, sklearn_source, table_of, ties_of, ways
from .graph import rename
from .quiet import scratch
from .runtime import onnx_module
from .source import Source, Wishes
from .trees import exact_thresholds
from .verify import first_line


def xgboost_source(model: Any, example: object, wishes: Wishes) -> Source:
    """See `export.to_onnx`."""
    import xgboost

    if not isinstance(model, xgboost.Booster):
        return sklearn_source(model, example, wishes, "xgboost")
    what = "the XGBoost model Booster"
    inputs, rebuild, columns = _rows(example, wishes, what)
    trial = np.asarray(model.predict(xgboost.DMatrix(rebuild(inputs))))
    classifies = _objective(model).startswith(("binary:", "multi:"))
    estimator = (xgboost.XGBClassifier if classifies else xgboost.XGBRegressor)()
    estimator.load_model(bytearray(model.save_raw("ubj")))
    names = _names(["label", "probabilities"] if classifies else ["y"], wishes, what)
    if classifies and trial.ndim == 1 and _objective(model) != "binary:logistic":
        raise ExportError(f"{what} has the objective {_objective(model)}, which gives no probabilities to compare with")

    def predict(arrays: Arrays) -> Arrays:
        given = np.asarray(model.predict(xgboost.DMatrix(rebuild(arrays))))
        return _classified(given, names) if classifies else {names[0]: given}

    return Source(
        "xgboost", what, inputs, predict,
        ways(lambda types: convert_estimator(estimator, types, names, wishes.opset, what), inputs, False),
        _digest(bytes(model.save_raw("ubj"))), classes=_numbered(trial) if classifies else None, columns=columns,
        ties=ties_of(names), table=True,
    )  # fmt: skip


def lightgbm_source(model: Any, example: object, wishes: Wishes) -> Source:
    """See `export.to_onnx`."""
    import lightgbm

    if not isinstance(model, lightgbm.Booster):
        return sklearn_source(model, example, wishes, "lightgbm")
    what = "the LightGBM model Booster"
    inputs, rebuild, columns = _rows(example, wishes, what)
    objective = str(model.dump_model(num_iteration=1).get("objective", ""))
    classifies = objective.startswith(("binary", "multiclass"))
    trial = np.asarray(model.predict(rebuild(inputs)))
    names = _names(["label", "probabilities"] if classifies else ["y"], wishes, what)

    def predict(arrays: Arrays) -> Arrays:
        given = np.asarray(model.predict(rebuild(arrays)))
        return _classified(given, names) if classifies else {names[0]: given}

    def convert(types: Arrays) -> tuple[Any, dict[str, list[float]]]:
        try:
            from onnxmltools import convert_lightgbm
            from onnxmltools.convert.common._container import ModelComponentContainer
            from onnxmltools.convert.common.data_types import DoubleTensorType, FloatTensorType
        except ImportError as error:
            raise MissingExtraError("onnxmltools", "export", "exporting a LightGBM model") from error
        [(name, array)] = types.items()
        kind = DoubleTensorType if array.dtype == np.float64 else FloatTensorType
        try:
            with exact_thresholds(ModelComponentContainer) as thresholds:
                proto = convert_lightgbm(
                    model, name="Booster", initial_types=[(name, kind([None, array.shape[1]]))], zipmap=False,
                    target_opset=min(wishes.opset or 15, 15),
                )  # fmt: skip
        except Exception as error:
            raise ExportError(f"{what} cannot be turned into ONNX: {first_line(error)}") from error
        given = [value.name for value in proto.graph.output]
        rename(proto, given[: len(names)], names)
        changed = dict(zip(given, names, strict=False))
        return proto, {changed.get(output, output): values for output, values in thresholds.items()}

    return Source(
        "lightgbm", what, inputs, predict, ways(convert, inputs, False), _digest(model.model_to_string().encode()),
        classes=_numbered(trial) if classifies else None, columns=columns, ties=ties_of(names),
        table=True,
    )  # fmt: skip


def catboost_source(model: Any, example: object, wishes: Wishes) -> Source:
    """See `export.to_onnx`."""
    what = f"the CatBoost model {type(model).__name__}"
    if not model.is_fitted():
        raise ModelNotBuiltError(f"{what} was never fitted: call fit(x, y) first")
    if model.get_cat_feature_indices() or model.get_text_feature_indices():
        raise ExportError(
            f"{what} has features that are categories or texts, which CatBoost cannot write as ONNX; encode them in a "
            f"scikit-learn step before it, such as OneHotEncoder, and train it on the result",
            operator="categorical features",
        )
    inputs, rebuild, columns = _rows(example, wishes, what)
    classifies = hasattr(model, "predict_proba") and model._estimator_type == "classifier"
    names = _names(["label", "probabilities"] if classifies else ["y"], wishes, what)
    labels: Callable[[Any], Array] = model.predict

    def predict(arrays: Arrays) -> Arrays:
        rows = rebuild(arrays)
        if not classifies:
            return {names[0]: np.asarray(model.predict(rows))}
        chosen = np.asarray(labels(rows)).reshape(-1)
        chosen = chosen.astype(object) if chosen.dtype.kind in "US" else chosen
        return {names[0]: chosen, names[1]: np.asarray(model.predict_proba(rows))}

    def convert(types: Arrays) -> tuple[Any, dict[str, list[float]]]:
        [name] = types
        with scratch() as folder:
            path = folder / "model.onnx"
            try:
                model.save_model(str(path), format="onnx")
                proto = onnx_module().load(str(path))
            except Exception as error:
                raise ExportError(f"{what} cannot be turned into ONNX: {first_line(error)}") from error
        _without_zipmap(proto)
        rename(proto, [proto.graph.input[0].name], [name])
        given = [value.name for value in proto.graph.output]
        rename(proto, given[: len(names)], names)
        for opset in proto.opset_import:
            opset.version = max(opset.version, OPSETS.get(opset.domain, 1)) if opset.domain == "" else opset.version
        return proto, {}

    return Source(
        "catboost", what, inputs, predict, ways(convert, inputs, False), _digest(_saved(model)),
        classes=tuple(np.asarray(model.classes_).tolist()) if classifies else None, columns=columns,
        ties=ties_of(names), table=True,
    )  # fmt: skip


def _rows(
    example: object, wishes: Wishes, what: str
) -> tuple[dict[str, Array], Callable[[Arrays], Any], tuple[str, ...]]:
    if example is None:
        raise ConfigurationError(f"{what} is exported with an example of its inputs: to_onnx(model, x[:8])")
    return table_of(example, wishes, what)


def _names(own: list[str], wishes: Wishes, what: str) -> list[str]:
    if wishes.output_names is None:
        return own
    if len(wishes.output_names) != len(own):
        raise ConfigurationError(
            f"output_names has {len(wishes.output_names)} names, and {what} has {len(own)} outputs"
        )
    return list(wishes.output_names)


def _classified(scores: Array, names: Sequence[str]) -> Arrays:
    """Labels and a column for each class, of what a booster gave: one probability, or one for each class."""
    columns = np.stack([1 - scores, scores], axis=1) if scores.ndim == 1 else scores
    return {names[0]: columns.argmax(axis=1).astype(np.int64), names[1]: columns}


def _numbered(scores: Array) -> tuple[int, ...]:
    return tuple(range(2 if scores.ndim == 1 else scores.shape[1]))


def _objective(booster: Any) -> str:
    import json

    return str(json.loads(booster.save_config())["learner"]["objective"]["name"])


def _without_zipmap(proto: Any) -> None:
    """Let the tensor of probabilities be the output in the place of the list of mappings."""
    onnx = onnx_module()
    graph = proto.graph
    for node in [node for node in graph.node if node.op_type == "ZipMap"]:
        place = next(index for index, value in enumerate(graph.output) if value.name == node.output[0])
        kept = list(graph.output)
        kept[place] = onnx.helper.make_tensor_value_info(node.input[0], 1, [None, None])
        del graph.output[:]
        graph.output.extend(kept)
        graph.node.remove(node)


def _saved(model: Any) -> bytes:
    with scratch() as folder:
        path = folder / "model.json"
        model.save_model(str(path), format="json")
        import json

        facts = json.loads(path.read_text())
    # The rest has the time and an identifier of the training.
    return json.dumps(
        [facts.get(name) for name in ("oblivious_trees", "trees", "scale_and_bias", "features_info")]
    ).encode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
