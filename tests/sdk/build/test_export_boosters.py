"""XGBoost, LightGBM and CatBoost to ONNX, held against their own predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import catboost
import lightgbm
import numpy as np
import pandas as pd
import pytest
import xgboost
from sklearn.compose import ColumnTransformer
from sklearn.datasets import make_classification, make_regression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from inferway import ExportError, ExportMismatchError, ModelNotBuiltError, to_onnx
from inferway.build import trees

X, Y = make_classification(600, 6, n_informative=4, n_redundant=0, n_classes=3, random_state=0)
XR, YR = make_regression(3000, 6, noise=5, random_state=0)


def classifier(kind: str) -> Any:
    if kind == "catboost":
        return catboost.CatBoostClassifier(iterations=20, verbose=0, random_seed=0, allow_writing_files=False)
    if kind == "lightgbm":
        return lightgbm.LGBMClassifier(n_estimators=20, verbose=-1, n_jobs=1)
    return xgboost.XGBClassifier(n_estimators=20, n_jobs=1)


def regressor(kind: str) -> Any:
    if kind == "catboost":
        return catboost.CatBoostRegressor(iterations=20, verbose=0, random_seed=0, allow_writing_files=False)
    if kind == "lightgbm":
        return lightgbm.LGBMRegressor(verbose=-1, n_jobs=1)
    return xgboost.XGBRegressor(n_jobs=1)


KINDS = ["catboost", "lightgbm", "xgboost"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_gives_labels_and_a_tensor_of_probabilities(kind: str, classes: int, dtype: Any) -> None:
    rows, labels = X.astype(dtype), Y if classes == 3 else Y % 2
    model = classifier(kind).fit(rows, labels)
    made = to_onnx(model, rows[:40])
    assert (made.framework, made.classes) == (kind, tuple(range(classes)))
    assert made.inputs[0].datatype == ("FP32" if dtype is np.float32 else "FP64")
    assert [spec.shape for spec in made.outputs] == [(-1,), (-1, classes)]
    got = made.run(rows)
    assert (got["label"] == np.asarray(model.predict(rows)).reshape(-1)).all()
    np.testing.assert_allclose(got["probabilities"], model.predict_proba(rows), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_regressor_sends_every_row_to_the_same_leaf(kind: str, dtype: Any) -> None:
    rows = XR.astype(dtype)
    model = regressor(kind).fit(rows, YR)
    made = to_onnx(model, rows[:100])
    assert str(made.outputs[0]) == "y: FP32 [-1]"
    # Sums in float32: one part in a million of a range of about a thousand. A wrong leaf would be far more.
    np.testing.assert_allclose(made.run(rows)["y"], model.predict(rows), atol=1e-3)


def test_a_row_between_a_threshold_and_its_float32_goes_the_way_it_went() -> None:
    # 0.1 is above its nearest float32's predecessor and below the nearest float32 itself.
    near = np.float32(0.1)
    below = np.nextafter(near, np.float32(0))
    rows = np.array([[below], [near]] * 50, np.float32)
    model = lightgbm.LGBMRegressor(n_estimators=1, min_child_samples=1, verbose=-1).fit(rows, [0.0, 1.0] * 50)
    threshold = model.booster_.dump_model()["tree_info"][0]["tree_structure"]["threshold"]
    assert float(below) <= threshold < float(near)
    for example in (rows, rows.astype(np.float64)):
        np.testing.assert_allclose(to_onnx(model, example).run(example)["y"], model.predict(example), atol=1e-6)


def test_thresholds_are_rounded_down_for_smaller_or_equal_only() -> None:
    above = 0.1  # its nearest float32 is larger
    assert float(np.float32(above)) > above
    assert trees._beside(above, "BRANCH_LEQ") < above
    assert trees._beside(above, "BRANCH_LT") == float(np.float32(above))
    assert trees._beside(0.5, "BRANCH_LEQ") == 0.5
    assert trees._plain([True, 2, False]) == [1, 2, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: xgboost.train({"objective": "binary:logistic"}, xgboost.DMatrix(X, Y % 2), 5),
        lambda: xgboost.train({"objective": "multi:softprob", "num_class": 3}, xgboost.DMatrix(X, Y), 5),
        lambda: xgboost.train({}, xgboost.DMatrix(X, Y), 5),
        lambda: lightgbm.train({"objective": "binary", "verbose": -1}, lightgbm.Dataset(X, Y % 2), 5),
        lambda: lightgbm.train({"objective": "multiclass", "num_class": 3, "verbose": -1}, lightgbm.Dataset(X, Y), 5),
        lambda: lightgbm.train({"verbose": -1}, lightgbm.Dataset(X, Y), 5),
    ],
    ids=["xgb-binary", "xgb-classes", "xgb-number", "lgb-binary", "lgb-classes", "lgb-number"],
)
def test_a_booster_without_an_estimator_is_exported(make: Any) -> None:
    booster = make()
    made = to_onnx(booster, X[:40])
    own = booster.predict(xgboost.DMatrix(X) if isinstance(booster, xgboost.Booster) else X)
    got = made.run(X)
    if made.classes is None:
        np.testing.assert_allclose(got["y"], own, atol=1e-5)
    else:
        np.testing.assert_allclose(got["probabilities"][:, 1:] if own.ndim == 1 else got["probabilities"],
                                   own[:, None] if own.ndim == 1 else own, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("kind", ["lightgbm", "xgboost"])
def test_a_booster_stands_in_a_pipeline_with_texts_and_keeps_its_features_names(kind: str) -> None:
    frame = pd.DataFrame({"size": X[:, 0], "kind": np.where(X[:, 1] > 0, "a", "b")})
    columns = ColumnTransformer([("texts", OneHotEncoder(), ["kind"])], remainder="passthrough")
    model = make_pipeline(columns, classifier(kind)).fit(frame, Y)
    made = to_onnx(model, frame[:40])
    assert [spec.name for spec in made.inputs] == ["size", "kind"]
    np.testing.assert_allclose(made.run(frame)["probabilities"], model.predict_proba(frame), atol=1e-5)
    alone = classifier(kind).fit(frame[["size"]], Y)
    to_onnx(alone, frame[["size"]][:10])
    assert list(alone.feature_names_in_) == ["size"]
    if kind == "xgboost":
        assert alone.get_booster().feature_names == ["size"]


def test_missing_values_go_where_the_booster_sends_them() -> None:
    rows = X.copy()
    rows[::4, 1] = np.nan
    model = classifier("lightgbm").fit(rows, Y)
    np.testing.assert_allclose(
        to_onnx(model, rows[:40]).run(rows)["probabilities"], model.predict_proba(rows), atol=1e-5
    )


def test_a_booster_whose_zeros_are_missing_is_refused_though_the_example_has_none() -> None:
    model = lightgbm.LGBMRegressor(n_estimators=10, verbose=-1, zero_as_missing=True).fit(X, X[:, 0] * 3 + X[:, 1])
    with pytest.raises(ExportMismatchError, match="computes something else: output 'y' differs by"):
        to_onnx(model, X[:5])


def test_categories_of_catboost_are_refused_with_what_to_do(tmp_path: Path) -> None:
    frame = pd.DataFrame({"size": X[:, 0], "kind": np.where(X[:, 1] > 0, "a", "b")})
    model = classifier("catboost").fit(frame, Y, cat_features=["kind"])
    with pytest.raises(ExportError, match=r"which CatBoost cannot write as ONNX; encode them in a scikit-learn step"):
        to_onnx(model, frame)


@pytest.mark.parametrize("kind", KINDS)
def test_a_booster_that_was_never_fitted_is_refused(kind: str) -> None:
    with pytest.raises(ModelNotBuiltError, match=r"was never fitted: call fit\(x, y\) first"):
        to_onnx(classifier(kind), X[:5])
