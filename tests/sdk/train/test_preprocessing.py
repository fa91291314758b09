"""Preprocessing: fitted once, the same in training, in the served graph and before a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, OrdinalEncoder, StandardScaler

import inferway
from inferway.train.preprocessing import Preprocessing
from inferway.train.wrapper import WrappedModel

pytestmark = pytest.mark.torch

CITIES = ["Lima", "Oslo", "Rome"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def people(rows: int = 160) -> tuple[pd.DataFrame, NDArray[np.int64]]:
    """A table as it comes: ages and cities are missing here and there, a column is a category, one is a truth value."""
    random = np.random.default_rng(0)
    age = random.integers(18, 90, rows).astype(float)
    city = random.choice(CITIES, rows).astype(object)
    y = ((age > 50) ^ (city == "Rome")).astype(np.int64)
    age[::7] = np.nan
    city[::5] = None
    frame = pd.DataFrame(
        {
            "age": age,
            "city": city,
            "plan": pd.Series(random.choice(["a", "b"], rows)).astype("category"),
            "member": random.random(rows) > 0.5,
            "visits": random.integers(0, 9, rows),
        }
    )
    return frame, y


def columns() -> ColumnTransformer:
    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    texts = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    return ColumnTransformer(
        [
            ("numbers", numbers, ["age", "visits"]),
            ("city", texts, ["city"]),
            ("plan", OneHotEncoder(), ["plan"]),
            ("member", "passthrough", ["member"]),
        ]
    )


def network(width: int, preprocessing: Any) -> WrappedModel:
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1), torch.nn.Sigmoid())
    return inferway.wrap(
        module, loss="binary_crossentropy", optimizer="adam", metrics=["accuracy"], preprocessing=preprocessing
    )


def test_it_is_fitted_to_the_rows_that_are_trained_on_and_to_no_others() -> None:
    frame, y = people()
    frame.loc[120:, "visits"] = 1000
    given = columns()
    model = network(8, given)
    model.fit(frame, y, validation_split=0.25, epochs=1)
    scaler = model.preprocessing.named_transformers_["numbers"][-1]
    assert scaler.mean_[1] == pytest.approx(frame["visits"][:120].mean(), rel=1e-5)
    assert not hasattr(given, "transformers_")
    mean = scaler.mean_.copy()
    model.fit(frame[120:], y[120:], epochs=1)
    assert np.array_equal(model.preprocessing.named_transformers_["numbers"][-1].mean_, mean)


def test_the_graph_takes_raw_columns_and_answers_as_both_do() -> None:
    frame, y = people()
    model = network(8, columns())
    model.fit(frame, y, epochs=3, seed=0)
    onnx = model.onnx
    assert {spec.name: spec.datatype for spec in onnx.inputs} == {
        "age": "FP32", "city": "BYTES", "plan": "BYTES", "member": "FP32", "visits": "FP32",
    }  # fmt: skip
    assert all(spec.shape == (-1, 1) for spec in onnx.inputs)
    assert onnx.columns == tuple(frame.columns)
    assert model._preprocessing is not None
    new = frame[::-1].assign(city=pd.Series(["Oslo", None, "Nowhere", ""] * 40, dtype=object).to_numpy())
    found = onnx.run(model._preprocessing.wire(new))["y"]
    assert np.allclose(found, model.predict(new), atol=1e-5)
    assert found[1] == pytest.approx(model.predict(new[1:2])[0], abs=1e-5)
    assert onnx.verification is not None
    assert [case.shapes["age"][0] for case in onnx.verification.cases] == [1, 5, 64]


@pytest.mark.parametrize(
    "texts",
    [
        OneHotEncoder(handle_unknown="ignore"),
        OneHotEncoder(drop="first"),
        make_pipeline(SimpleImputer(strategy="constant", fill_value="unknown"), OneHotEncoder()),
        make_pipeline(SimpleImputer(strategy="most_frequent"), OrdinalEncoder()),
    ],
    ids=["missing is a category", "first dropped", "constant", "ordinal"],
)
def test_a_missing_text_means_the_same_there_as_here(texts: Any) -> None:
    frame, y = people()
    transformer = ColumnTransformer([("city", texts, ["city"]), ("age", SimpleImputer(), ["age"])])
    width = transformer.fit_transform(frame).shape[1]
    model = network(width, transformer)
    model.fit(frame, y, epochs=1, seed=0)
    assert model._preprocessing is not None
    found = model.onnx.run(model._preprocessing.wire(frame))["y"]
    assert np.allclose(found, model.predict(frame), atol=1e-5)


def test_plain_tables_of_numbers_stay_one_input() -> None:
    random = np.random.default_rng(0)
    x = random.normal(50, 9, (90, 4))
    y = (x[:, 0] > 50).astype(int)
    x[::6, 2] = np.nan
    model = network(4, make_pipeline(SimpleImputer(), MinMaxScaler()))
    model.fit(x, y, epochs=2, seed=0)
    onnx = model.onnx
    assert [(spec.name, spec.shape) for spec in onnx.inputs] == [("x", (-1, 4))]
    assert np.allclose(onnx.run(x.astype(np.float32))["y"], model.predict(x), atol=1e-5)
    with pytest.raises(inferway.InvalidInputError, match="expected 4 columns, got 3"):
        model.predict(x[:, :3])


def test_an_estimator_has_its_preprocessing_in_the_graph_too() -> None:
    frame, y = people()
    model = inferway.wrap(LogisticRegression(), preprocessing=columns())
    history = model.fit(frame, y, validation_split=0.2)
    assert history.last["val_accuracy"] > 0.4
    onnx = model.onnx
    assert model._preprocessing is not None
    found = onnx.run(model._preprocessing.wire(frame))
    assert np.array_equal(found["label"], model.predict(frame))
    assert np.allclose(found["probabilities"], model.predict_proba(frame), atol=1e-5)
    assert model.score(frame, y) == pytest.approx(model.evaluate(frame, y)["accuracy"])


def booster(name: str) -> Any:
    if name == "xgboost":
        from xgboost import XGBClassifier

        return XGBClassifier(n_estimators=6, max_depth=3)
    if name == "lightgbm":
        from lightgbm import LGBMClassifier

        return LGBMClassifier(n_estimators=6, verbose=-1)
    from catboost import CatBoostClassifier

    return CatBoostClassifier(iterations=6, verbose=0, allow_writing_files=False)


@pytest.mark.parametrize("name", ["xgboost", "lightgbm", "catboost"])
def test_trees_part_rows_in_the_graph_where_they_do_here(name: str) -> None:
    frame, y = people()
    model = inferway.wrap(booster(name), preprocessing=columns())
    model.fit(frame, y, validation_split=0.2)
    assert model._preprocessing is not None
    found = model.onnx.run(model._preprocessing.wire(frame))
    assert np.array_equal(found["label"], model.predict(frame))
    assert np.allclose(found["probabilities"], model.predict_proba(frame), atol=1e-5)
    plain = Preprocessing(columns())
    plain.fit(frame[:128], y[:128])
    assert np.allclose(model._preprocessing.transform(frame), plain.transform(frame), atol=1e-5)


def test_what_was_optimised_keeps_its_preprocessing() -> None:
    frame, y = people()
    model = network(8, columns())
    model.fit(frame, y, epochs=3, seed=0, validation_split=0.3)
    report = model.optimize(techniques=["static_int8"], rounds=3)
    assert [spec.shape for spec in report.model.inputs] == [(-1, 8)]
    assert len(model.onnx.inputs) == 5
    assert model._preprocessing is not None
    table = model._preprocessing.transform(frame)
    served = model.onnx.run(model._preprocessing.wire(frame))["y"]
    assert np.allclose(served, report.model.run(table)["y"], atol=1e-5)


def test_a_transformer_without_a_form_in_onnx_is_named() -> None:
    frame, y = people()
    numbers = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())
    model = network(3, ColumnTransformer([("numbers", numbers, ["age", "visits"])]))
    model.fit(frame, y)
    with pytest.raises(inferway.ExportError, match="ColumnTransformer cannot be turned into ONNX"):
        _ = model.onnx


def test_a_table_comes_to_the_transformer_in_one_form() -> None:
    frame, _ = people()
    made = Preprocessing(columns())
    made.fit(frame, None)
    wire = made.wire(frame)
    assert wire["age"].dtype == np.float32
    assert np.isnan(wire["age"][0, 0])
    assert wire["city"][0, 0] == ""
    assert wire["plan"].dtype == object
    nullable = frame.assign(visits=frame["visits"].astype("Int64"), city=frame["city"].astype("string"))
    assert np.array_equal(made.transform(nullable), made.transform(frame))
    shuffled = frame[list(reversed(frame.columns))].assign(more=1)
    assert np.array_equal(made.transform(shuffled), made.transform(frame))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="age"), r"no column 'age', expected 'age', 'city'"),
        (lambda f: f.assign(age="old"), r"the column 'age' expects numbers, got text"),
        (lambda f: f.assign(city=3), r"the column 'city' expects text, got int64"),
        (
            lambda f: f.assign(visits=pd.Timestamp("2026-01-01")),
            r"the column 'visits' is of type datetime64.*a date can",
        ),
        (lambda f: f.to_numpy(), r"expected a data frame with the columns 'age', 'city'.*, got ndarray"),
        (lambda f: f.assign(plan="z"), r"the preprocessing cannot take these rows: .*unknown categor"),
    ],
    ids=["missing", "text", "number", "date", "array", "category"],
)
def test_rows_that_do_not_fit_are_named(change: Any, message: str) -> None:
    frame, y = people()
    model = network(8, columns())
    model.fit(frame, y)
    with pytest.raises(inferway.InvalidInputError, match=message):
        model.predict(change(frame))


def test_what_cannot_be_preprocessing_is_named() -> None:
    frame, y = people()
    with pytest.raises(
        inferway.ConfigurationError, match=r"expects a transformer of scikit-learn.*got LogisticRegression"
    ):
        network(8, LogisticRegression())
    with pytest.raises(inferway.ConfigurationError, match="got StandardScaler; give an object of it"):
        network(8, StandardScaler)
    with pytest.raises(inferway.InvalidInputError, match="x has 160 rows and y has 3"):
        network(8, columns()).fit(frame, y[:3])
    with pytest.raises(inferway.InvalidInputError, match=r"encode columns of text, such as with OneHotEncoder"):
        network(1, ColumnTransformer([("city", SimpleImputer(strategy="most_frequent"), ["city"])])).fit(frame, y)
    with pytest.raises(inferway.InvalidInputError, match="two have the same"):
        network(8, columns()).fit(pd.concat([frame, frame], axis=1), y)
    with pytest.raises(
        inferway.InvalidInputError, match=r"columns that are no numbers: 'city', 'plan'; give .*preproc"
    ):
        network(8, None).fit(frame, y)
    with pytest.raises(inferway.ModelNotBuiltError, match="the preprocessing was not fitted yet"):
        network(8, columns()).predict(frame)
