"""scikit-learn's estimators to ONNX, held against their own predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import make_classification, make_regression
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    VotingClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeRegressor

from inferway import ConfigurationError, ExportError, ExportMismatchError, ModelNotBuiltError, to_onnx

X, Y = make_classification(400, 6, n_informative=4, n_redundant=0, n_classes=3, random_state=0)
XR, YR = make_regression(1500, 6, noise=5, random_state=0)
RNG = np.random.default_rng(0)
PEOPLE = pd.DataFrame(
    {
        "age": RNG.integers(18, 80, 300),
        "height": RNG.normal(1.7, 0.1, 300),
        "city": RNG.choice(["Rome", "Oslo", "Bern"], 300),
        "member": RNG.random(300) > 0.5,
    }
)
JOINS = np.where((PEOPLE.age > 40) & (PEOPLE.city != "Oslo"), "yes", "no")


def columns() -> ColumnTransformer:
    return ColumnTransformer(
        [
            ("numbers", StandardScaler(), ["age", "height"]),
            ("texts", OneHotEncoder(handle_unknown="ignore"), ["city"]),
            ("flags", "passthrough", ["member"]),
        ]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "estimator",
    [LogisticRegression(), RandomForestClassifier(5, random_state=0), HistGradientBoostingClassifier(max_iter=10)],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_classifier_keeps_type_and_labels_and_gives_probabilities(estimator: Any, dtype: Any) -> None:
    rows = X.astype(dtype)
    estimator.fit(rows, Y)
    made = to_onnx(estimator, rows[:50])
    assert str(made.inputs[0]) == ("x: FP32 [-1, 6]" if dtype is np.float32 else "x: FP64 [-1, 6]")
    assert str(made.outputs[0]) == "label: INT64 [-1]"
    assert made.outputs[1].shape == (-1, 3)
    assert made.classes == (0, 1, 2)
    got = made.run(rows)
    assert (got["label"] == estimator.predict(rows)).all()
    np.testing.assert_allclose(got["probabilities"], estimator.predict_proba(rows), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "estimator",
    [Ridge(), RandomForestRegressor(5, random_state=0), HistGradientBoostingRegressor(max_iter=30)],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_regressor_gives_one_number_a_row(estimator: Any, dtype: Any) -> None:
    rows = XR.astype(dtype)
    made = to_onnx(estimator.fit(rows, YR), rows[:50])
    assert (made.outputs[0].name, made.outputs[0].shape, made.classes) == ("y", (-1,), None)
    np.testing.assert_allclose(made.run(rows)["y"], estimator.predict(rows), atol=1e-4 * np.ptp(YR))


def test_a_frames_columns_become_typed_inputs_and_text_stays_text() -> None:
    model = Pipeline([("columns", columns()), ("model", LogisticRegression())]).fit(PEOPLE, JOINS)
    made = to_onnx(model, PEOPLE[:40])
    assert list(map(str, made.inputs)) == [
        "age: INT64 [-1, 1]", "height: FP64 [-1, 1]", "city: BYTES [-1, 1]", "member: BOOL [-1, 1]",
    ]  # fmt: skip
    assert (made.columns, made.classes) == (("age", "height", "city", "member"), ("no", "yes"))
    got = made.run(PEOPLE)
    assert (got["label"] == model.predict(PEOPLE)).all()
    np.testing.assert_allclose(got["probabilities"], model.predict_proba(PEOPLE), atol=1e-5)
    unknown = pd.DataFrame({"age": [30], "height": [1.8], "city": ["Paris"], "member": [True]})
    np.testing.assert_allclose(made.run(unknown)["probabilities"], model.predict_proba(unknown), atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        make_pipeline(columns(), SVC()),
        make_pipeline(columns(), LinearSVC()),
        GridSearchCV(make_pipeline(columns(), LogisticRegression()), {"logisticregression__C": [1, 2]}, cv=2),
        make_pipeline(columns(), VotingClassifier([("a", LogisticRegression())], voting="soft")),
    ],
    ids=["svc", "linear-svc", "search", "vote"],
)
def test_pipelines_with_other_ends_agree(model: Any) -> None:
    model.fit(PEOPLE, JOINS)
    made = to_onnx(model, PEOPLE[:40])
    assert (made.run(PEOPLE)["label"] == model.predict(PEOPLE)).all()


def test_missing_numbers_and_texts_are_imputed_in_the_graph() -> None:
    frame = PEOPLE.drop(columns="member")
    frame.loc[::7, "height"] = np.nan
    frame.loc[::5, "city"] = np.nan
    steps = [
        ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["age", "height"]),
        ("texts", make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder()), ["city"]),
    ]
    model = make_pipeline(ColumnTransformer(steps), LogisticRegression()).fit(frame, JOINS)
    made = to_onnx(model, frame[:40])
    sent = frame.assign(city=frame.city.fillna(""))
    np.testing.assert_allclose(made.run(sent)["probabilities"], model.predict_proba(frame), atol=1e-5)
    imputer = model[0].named_transformers_["texts"][0]
    assert np.isnan(imputer.missing_values)


def test_numbers_of_a_frame_are_joined_for_a_model_that_takes_a_matrix() -> None:
    frame = PEOPLE[["age", "height"]].rename(columns={"age": "Alter"})
    model = RandomForestClassifier(5, random_state=0).fit(frame, JOINS)
    made = to_onnx(model, frame[:20])
    assert list(map(str, made.inputs)) == ["Alter: INT64 [-1, 1]", "height: FP64 [-1, 1]"]
    assert (made.run(frame)["label"] == model.predict(frame)).all()


SAID = ["the parcel came late", "the box was wet", "great and fast", "école fermée à Zürich", "straße gesperrt"] * 3


@pytest.mark.parametrize(
    "words", [{}, {"ngram_range": (1, 2)}, {"lowercase": False}, {"token_pattern": "[a-zA-Z0-9_]+"}]
)
def test_words_of_every_script_are_words(words: dict[str, Any]) -> None:
    model = make_pipeline(TfidfVectorizer(**words), LogisticRegression()).fit(SAID, [0, 0, 1, 1, 0] * 3)
    said = np.array(["ÉCOLE straße ÜBER", "parcelé boxé", "школа the box", "the boxÉ a late"])
    exported = to_onnx(model, np.array(SAID[:3]))
    np.testing.assert_allclose(exported.run(said)["probabilities"], model.predict_proba(said), atol=1e-6)


def test_words_that_the_graph_would_cut_elsewhere_are_refused_though_the_example_has_none() -> None:
    model = make_pipeline(TfidfVectorizer(token_pattern=r"\w+"), LogisticRegression()).fit(SAID, [0, 0, 1, 1, 0] * 3)
    with pytest.raises(ExportMismatchError, match="computes something else"):
        to_onnx(model, np.array(SAID[:3]))


def test_texts_in_a_list_are_one_input_of_text() -> None:
    texts = ["The cat sat", "dogs bark", "a cat and a dog", "birds fly"] * 5
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, [0, 1, 0, 1] * 5)
    made = to_onnx(model, texts)
    assert str(made.inputs[0]) == "x: BYTES [-1, 1]"
    np.testing.assert_allclose(made.run(["CAT fly"])["probabilities"], model.predict_proba(["CAT fly"]), atol=1e-5)


@pytest.mark.parametrize(("dtype", "datatype"), [(np.int64, "INT64"), (np.int32, "INT32"), (np.bool_, "BOOL")])
def test_whole_numbers_and_booleans_keep_their_types(dtype: Any, datatype: str) -> None:
    rows = (X * 3).astype(dtype)
    model = RandomForestClassifier(5, random_state=0).fit(rows, Y)
    made = to_onnx(model, rows[:30])
    assert made.inputs[0].datatype == datatype
    assert (made.run(rows)["label"] == model.predict(rows)).all()


def test_a_model_that_was_never_fitted_is_refused() -> None:
    with pytest.raises(ModelNotBuiltError, match=r"LogisticRegression was never fitted: call fit\(x, y\) first"):
        to_onnx(LogisticRegression(), X[:5])


def test_a_step_without_a_form_in_onnx_is_named() -> None:
    model = Pipeline([("scale", StandardScaler()), ("kernel", RBFSampler()), ("model", Ridge())]).fit(X, Y)
    with pytest.raises(ExportError, match=r"has RBFSampler, for which skl2onnx has no form.*the step 'kernel'") as got:
        to_onnx(model, X[:5])
    assert (got.value.operator, got.value.where) == ("RBFSampler", "kernel")


@pytest.mark.parametrize("trained_with", ["missing", "none missing"])
@pytest.mark.parametrize(
    "estimator",
    [RandomForestClassifier(10, random_state=0), RandomForestRegressor(10, random_state=0), DecisionTreeRegressor()],
    ids=lambda estimator: type(estimator).__name__,
)
def test_forests_send_missing_values_where_the_source_does(estimator: Any, trained_with: str) -> None:
    rows = X.copy()
    rows[::3, 2] = rows[1::4, 0] = np.nan
    model = clone(estimator).fit(rows if trained_with == "missing" else X, Y)
    made = to_onnx(model, X[:5])  # nothing is missing in the example
    expected = model.predict_proba(rows) if hasattr(model, "predict_proba") else model.predict(rows)
    np.testing.assert_allclose(list(made.run(rows).values())[-1], expected, atol=1e-5)


def test_an_example_that_is_none_or_flat_is_refused() -> None:
    model = LogisticRegression().fit(X, Y)
    with pytest.raises(ConfigurationError, match=r"with an example of its inputs: to_onnx\(model, x\[:8\]\)"):
        to_onnx(model)
    with pytest.raises(ConfigurationError, match=r"an example of shape \(rows, columns\), got \(6,\)"):
        to_onnx(model, X[0])


def test_a_column_of_mixed_kinds_is_refused_with_the_value() -> None:
    frame = PEOPLE.assign(city=["Rome", 7] * 150)
    model = make_pipeline(columns(), LogisticRegression()).fit(PEOPLE, JOINS)
    with pytest.raises(ConfigurationError, match="column 'city' expects texts alone or numbers alone, got 7"):
        to_onnx(model, frame[:5])
