"""Rows for calibration and measuring: where they come from and how they are parted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inferway import CalibrationError
from inferway.build.optimize.data import CALIBRATION_ROWS, Rows, read_file, read_rows, split
from optimizing import given, mlp, rows


def numbered(count: int) -> Rows:
    x = np.arange(count, dtype=np.float32).reshape(-1, 1)
    return Rows({"x": x}, np.arange(count), count)


def test_no_row_both_calibrates_and_is_measured_on() -> None:
    parts = split(numbered(101), None, seed=0)
    calibrated, measured = (set(part.inputs["x"][:, 0]) for part in (parts.calibration, parts.held_out))
    assert not calibrated & measured
    assert len(calibrated) + len(measured) == 101
    assert len(calibrated) == 25


def test_labels_stay_with_their_rows() -> None:
    held_out = split(numbered(40), None, seed=2).held_out
    assert held_out.labels is not None
    np.testing.assert_array_equal(held_out.inputs["x"][:, 0], held_out.labels)


def test_another_seed_draws_other_rows() -> None:
    first, second, again = (split(numbered(60), None, seed).calibration.inputs["x"] for seed in (0, 1, 0))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)


def test_many_rows_do_not_all_calibrate() -> None:
    assert split(numbered(5000), None, 0).calibration.count == CALIBRATION_ROWS
    apart = split(numbered(50), numbered(900), 0)
    assert apart.calibration.count == CALIBRATION_ROWS
    assert apart.held_out.count == 50
    assert apart.about == "calibrated on 512 rows given for it, drawn from 900 (seed 0), and measured on 50"


def test_a_batch_begins_anew_where_there_are_fewer_rows() -> None:
    np.testing.assert_array_equal(numbered(3).batch(5)["x"][:, 0], [0, 1, 2, 0, 1])


def test_all_rows_come_in_batches() -> None:
    sizes = [len(batch["x"]) for batch in numbered(70).batches(32)]
    assert sizes == [32, 32, 6]


def test_models_that_take_missing_values_may_be_given_some() -> None:
    x = rows(8, 16)
    x[2, 3] = np.nan
    assert read_rows(given(mlp()).signature, x, operators=frozenset({"Imputer"})).count == 8
    with pytest.raises(CalibrationError, match=r"row 2\)"):
        read_rows(given(mlp()).signature, x)


def test_a_tensor_of_labels_is_taken() -> None:
    torch = pytest.importorskip("torch")
    found = read_rows(given(mlp()).signature, (rows(4, 16), torch.tensor([1, 0, 2, 1], requires_grad=False)))
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, [1, 0, 2, 1])


# -- files


def test_arrays_are_taken_by_the_names_of_the_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", a=np.ones((2, 1)), b=np.zeros((2, 1)), y=np.array([1, 0]))
    inputs, labels = read_file(tmp_path / "rows.npz", ["a", "b"])
    assert set(inputs) == {"a", "b"}
    assert labels is not None
    np.testing.assert_array_equal(labels, [1, 0])


def test_one_array_is_taken_for_one_input_whatever_it_is_called(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", data=np.ones((2, 1)), truth=np.array([1, 0]))
    inputs, labels = read_file(tmp_path / "rows.npz", ["x"], "truth")
    assert set(inputs) == {"x"}
    assert labels is not None
    np.save(tmp_path / "rows.npy", np.ones((3, 1)))
    inputs, labels = read_file(tmp_path / "rows.npy", ["x"])
    assert inputs["x"].shape == (3, 1)
    assert labels is None


def test_an_input_called_y_is_no_label(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", y=np.ones((2, 1)))
    inputs, labels = read_file(tmp_path / "rows.npz", ["y"])
    assert set(inputs) == {"y"}
    assert labels is None


def test_files_with_other_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", p=np.ones(2), q=np.ones(2))
    with pytest.raises(CalibrationError, match=r"has the arrays 'p', 'q', expected one for each input .* 'x', and 'y'"):
        read_file(tmp_path / "rows.npz", ["x"])
    with pytest.raises(CalibrationError, match="has no array 'truth' for the labels, only 'p', 'q'"):
        read_file(tmp_path / "rows.npz", ["p"], "truth")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot be read as numpy's \.npz or \.npy: No such file"):
        read_file(tmp_path / "missing.npz", ["x"])
    (tmp_path / "text.npz").write_text("x,y\n1,2\n")
    with pytest.raises(CalibrationError, match="cannot be read as numpy's"):
        read_file(tmp_path / "text.npz", ["x"])
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(CalibrationError, match="cannot be read as numpy's"):
        read_file(tmp_path / "objects.npy", ["x"])
