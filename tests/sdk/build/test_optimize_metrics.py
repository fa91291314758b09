"""Metrics of candidates: which is taken, what it compares, and which way is good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inferway import CalibrationError, MissingExtraError
from inferway.build.optimize.metrics import make_metric

SCORES = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 4.0], [5.0, 1.0, 2.0]], np.float32)
COLUMN = np.array([[0.1], [0.9], [0.8], [0.3]], np.float32)


def measured(wanted: Any, outputs: NDArray[Any], labels: Any, original: Any = None, **options: Any) -> float:
    reference = {"y": outputs if original is None else original}
    return make_metric(wanted, reference, labels, **options).measure({"y": outputs})


def test_accuracy_takes_the_highest_score() -> None:
    assert measured("accuracy", SCORES, np.array([0, 1, 2, 1])) == 0.75


def test_accuracy_takes_one_hot_labels() -> None:
    assert measured(None, SCORES, np.eye(3)[[0, 1, 2, 1]]) == 0.75


def test_accuracy_takes_labels_of_a_column() -> None:
    assert measured("accuracy", SCORES, np.array([[0], [1], [2], [1]])) == 0.75


def test_accuracy_of_a_probability_asks_for_a_half_and_of_a_logit_for_more_than_zero() -> None:
    truth = np.array([0, 1, 1, 1])
    assert measured("accuracy", COLUMN, truth) == 0.75
    assert measured("accuracy", COLUMN * 4 - 2, truth) == 0.75


def test_labels_are_found_among_the_classes() -> None:
    classes = ("ant", "bee", "cat")
    assert measured(None, SCORES, np.array(["ant", "bee", "cat", "bee"]), classes=classes) == 0.75
    with pytest.raises(CalibrationError, match="y has the label 'dog', and the model knows 'ant', 'bee', 'cat'"):
        measured("accuracy", SCORES, np.array(["ant", "bee", "cat", "dog"]), classes=classes)
    with pytest.raises(CalibrationError, match="y has labels as text"):
        measured("accuracy", SCORES, np.array(["ant", "bee", "cat", "bee"]))


def test_numbers_that_name_classes_are_no_columns() -> None:
    assert measured("accuracy", SCORES, np.array([3, 5, 7, 5]), classes=(3, 5, 7)) == 0.75


def test_an_output_of_labels_is_compared_as_it_is() -> None:
    words = np.array([b"ant", b"bee"], object)
    assert measured(None, words, np.array(["ant", "cat"])) == 0.5
    assert measured(None, np.array([4, 9]), np.array([4, 8])) == 0.5


def test_f1_is_the_mean_of_the_classes() -> None:
    pytest.importorskip("sklearn")
    assert measured("f1", SCORES, np.array([0, 1, 2, 1])) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_auc_takes_one_column_two_or_many() -> None:
    truth = np.array([0, 1, 1, 0])
    assert measured("auc", COLUMN, truth) == 1.0
    assert measured("auc", np.hstack([1 - COLUMN, COLUMN]), truth) == 1.0
    assert measured("auc", SCORES, np.array([0, 1, 2, 0])) == 1.0


@pytest.mark.parametrize(
    ("name", "expected"), [("mse", 0.25), ("rmse", 0.5), ("mae", 0.5), ("r2", 1 - 0.25 / np.var([1.0, 2.0, 4.0]))]
)
def test_errors_are_of_all_numbers(name: str, expected: float) -> None:
    outputs = np.array([[1.5], [1.5], [4.5]], np.float32)
    assert measured(name, outputs, np.array([1.0, 2.0, 4.0])) == pytest.approx(expected)


def test_float_labels_ask_for_an_error_unless_they_are_two_classes_of_one_probability() -> None:
    assert make_metric(None, {"y": COLUMN}, np.array([0.0, 1.0, 1.0, 0.0])).name == "accuracy"
    assert make_metric(None, {"y": COLUMN * 3}, np.array([0.0, 1.0, 1.0, 0.0])).name == "mse"
    assert make_metric(None, {"y": COLUMN}, np.array([0.2, 1.0, 1.0, 0.0])).name == "mse"


def test_labels_of_another_size_than_the_output_are_refused() -> None:
    with pytest.raises(CalibrationError, match="y has 4 numbers and the output 'y' has 12"):
        make_metric("mse", {"y": SCORES}, np.zeros(4))


def test_cosine_and_agreement_compare_with_the_original() -> None:
    turned = SCORES.copy()
    turned[0] = [0, 0, 5]
    assert measured("agreement", turned, None, original=SCORES) == 0.75
    assert measured("cosine", SCORES * 3, None, original=SCORES) == pytest.approx(1.0)
    assert measured("cosine", turned, None, original=SCORES) == pytest.approx(0.75)
    assert make_metric(None, {"y": np.array([1, 2])}, None).name == "agreement"
    with pytest.raises(CalibrationError, match="no output of the model has floats"):
        make_metric("cosine", {"y": np.array([1, 2])}, None)


def test_a_callable_gets_the_only_output_as_it_is_and_several_by_name() -> None:
    seen: list[Any] = []

    def remember(outputs: Any, y: Any) -> float:
        seen.append((outputs, y))
        return 2.0

    metric = make_metric(remember, {"y": SCORES}, None)
    assert metric.measure({"y": SCORES}) == 2.0
    assert metric.name == "remember"
    assert metric.greater_is_better
    make_metric(remember, {"y": SCORES, "z": COLUMN}, COLUMN).measure({"y": SCORES, "z": COLUMN})
    assert seen[0][0] is SCORES
    assert set(seen[1][0]) == {"y", "z"}
    assert seen[1][1] is COLUMN


def test_what_is_lost_is_a_difference_or_the_share_by_which_an_error_grew() -> None:
    accuracy = make_metric("accuracy", {"y": SCORES}, np.array([0, 1, 2, 1]))
    assert accuracy.drop(0.9, 0.85) == pytest.approx(0.05)
    error = make_metric("mse", {"y": COLUMN}, np.zeros(4))
    assert error.drop(2.0, 2.5) == pytest.approx(0.25)
    cost = make_metric(lambda outputs, y: 1.0, {"y": COLUMN}, None, greater_is_better=False)
    assert cost.drop(1.0, 0.5) == pytest.approx(-0.5)


def test_a_named_output_is_looked_at() -> None:
    both = {"first": SCORES, "second": SCORES[:, ::-1]}
    metric = make_metric("accuracy", both, np.array([2, 1, 0, 2]), output="second")
    assert metric.measure(both) == 1.0


def test_scikit_learn_is_named_where_a_metric_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'inferway\[optimize\]'"):
        measured("f1", SCORES, np.array([0, 1, 2, 1]))
