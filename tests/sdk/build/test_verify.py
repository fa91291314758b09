"""What exports are held against, and how near is near."""

from __future__ import annotations

import numpy as np
import pytest

from inferway import ExportError, ExportMismatchError
from inferway.build.verify import Run, distance, resized, variants, verify

AXES = {"x": {0: "batch", 1: "time"}, "mask": {0: "batch", 1: "time"}}
EXAMPLE = {"x": np.arange(8, dtype=np.float32).reshape(2, 4) + 0.5, "mask": np.ones((2, 4), np.int64)}


def test_batches_and_lengths_differ_from_the_examples_and_axes_of_one_name_stay_equal() -> None:
    found = list(variants(EXAMPLE, AXES))
    assert found[0][1] == [EXAMPLE]
    sizes = [(sizes["batch"], sizes["time"]) for sizes, _ in found]
    assert sizes == [(2, 4), (1, 4), (3, 4), (33, 4), (2, 7), (2, 8), (2, 3), (4, 6)]
    for (batch, time), (_, choices) in zip(sizes, found, strict=True):
        for inputs in choices:
            assert inputs["x"].shape == inputs["mask"].shape == (batch, time)


def test_new_rows_keep_types_signs_zeros_and_whole_numbers() -> None:
    random = np.random.default_rng(0)
    mixed = np.array([[-1.5, 0.0], [np.nan, 2.25]])
    made = resized(mixed, {0: "batch"}, {"batch": 50}, random)
    assert made.dtype == mixed.dtype
    assert np.isnan(made[:, 0]).any()
    assert (made[:, 0][~np.isnan(made[:, 0])] < 0).all()
    assert set(made[:, 1] == 0) == {True, False}
    codes = np.array([[1.0], [3.0]])
    assert set(resized(codes, {0: "batch"}, {"batch": 50}, random).ravel()) == {1.0, 3.0}
    words = np.array([["a"], ["b"]], object)
    assert set(resized(words, {0: "batch"}, {"batch": 9}, random).ravel()) == {"a", "b"}


def test_nan_agrees_with_nan_and_infinities_with_themselves() -> None:
    odd = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    assert distance(odd, odd)[0] == 0
    assert distance(np.zeros(1), np.array([np.nan]))[0] == np.inf
    assert distance(np.array([np.inf]), np.array([-np.inf]))[0] == np.inf
    difference, allowed = distance(np.array([1.0, 100.0]), np.array([1.001, 100.0]))
    assert difference == pytest.approx(0.001)
    assert allowed == pytest.approx(0.01001)


def case(**outputs: np.ndarray) -> Run:
    return Run({"batch": 2}, {"x": np.zeros((2, 1))}, outputs)


def test_a_wrong_shape_is_refused_with_both() -> None:
    with pytest.raises(ExportMismatchError, match=r"output 'y' has shape \[2, 1\], expected \[2\]") as got:
        verify(lambda _: {"y": np.zeros((2, 1))}, [case(y=np.zeros(2))], what="m")
    assert got.value.max_difference == np.inf


def test_labels_may_differ_only_where_their_scores_are_as_good_as_equal() -> None:
    scores = np.array([[0.5, 0.5000001], [0.9, 0.1]])
    run = case(label=np.array([1, 0]), scores=scores)
    ties = {"label": "scores"}
    done = verify(lambda _: {"label": np.array([0, 0]), "scores": scores}, [run], what="m", ties=ties)
    assert done.max_abs == 0
    with pytest.raises(ExportMismatchError, match=r"'label' differs in 1 of 2 elements, first at \[1\]"):
        verify(lambda _: {"label": np.array([1, 1]), "scores": scores}, [run], what="m", ties=ties)


def test_a_graph_that_cannot_be_run_is_refused_with_the_reason_and_shapes() -> None:
    def fails(_: object) -> dict[str, np.ndarray]:
        raise RuntimeError("no such kernel\nmore words")

    with pytest.raises(ExportError, match=r"cannot be run on inputs of 'x' \[2, 1\]: no such kernel$"):
        verify(fails, [case(y=np.zeros(2))], what="m")
