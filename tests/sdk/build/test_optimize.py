"""``inferway.optimize`` from end to end, what it says of bad input, and how it chooses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import inferway
from inferway import BuildError, CalibrationError, ConfigurationError, MissingExtraError, optimize
from inferway.build.optimize.api import _choose
from inferway.build.optimize.metrics import Metric
from inferway_gateway.backends.onnx.admission import admit
from models import F32, model, node, value
from optimizing import candidate, cnn, given, labels_of, mlp, outputs_of, rows, timing, transformer, two_outputs

QUICK: dict[str, Any] = {"batch_sizes": (1, 4), "rounds": 3}


def test_every_candidate_is_measured_beside_the_original() -> None:
    data, x = mlp(), rows(80, 16)
    told: list[str] = []
    report = optimize(data, (x, labels_of(data, x)), **QUICK, on_progress=told.append)
    assert [c.name for c in report.measured] == [
        "original", "graph optimised", "static int8 (minmax)", "static int8 (entropy)", "static int8 (percentile)",
        "dynamic int8", "fp16 weights",
    ]  # fmt: skip
    assert report.metric_name == "accuracy"
    assert report.original.metric == 1.0
    for found in report.measured:
        assert set(found.timings) == {1, 4}
        assert all(t.seconds > 0 and t.low <= t.seconds <= t.high for t in found.timings.values())
        assert found.size_bytes == found.model.size  # type: ignore[union-attr]  # measured ones have a model
        assert found.drop == pytest.approx(1.0 - found.metric)
    int8 = report.candidate("static int8 (minmax)")
    assert int8.size_bytes < 0.6 * report.original.size_bytes
    assert int8.metric > 0.9
    (difference,) = int8.differences
    assert difference.name == "logits"
    assert difference.max_abs is not None
    assert 0 < difference.max_abs < 0.5
    assert any(words.startswith("making 2 of 6") for words in told)
    assert any(words.startswith("measuring, round 3 of 3") for words in told)


def test_the_report_says_which_rows_calibrated_and_which_measured() -> None:
    data, x = mlp(), rows(80, 16)
    drawn = optimize(data, x, techniques="fp16", **QUICK)
    assert drawn.split == "calibrated on 20 rows and measured on the 60 others (drawn with seed 0)"
    apart = optimize(data, x, calibration=rows(10, 16, seed=1), techniques="fp16", **QUICK)
    assert apart.split == "calibrated on 10 rows given for it and measured on 80"


def test_the_same_seed_gives_the_same_models_and_metrics() -> None:
    data, x = mlp(), rows(60, 16)
    first, second = (optimize(data, x, techniques="static_int8/minmax", **QUICK, seed=3) for _ in range(2))
    one, other = (found.candidate("static int8 (minmax)") for found in (first, second))
    assert one.metric == other.metric
    assert one.model is not None
    assert other.model is not None
    assert one.model.to_bytes() == other.model.to_bytes()


def test_without_labels_the_original_is_what_is_agreed_with() -> None:
    report = optimize(mlp(), rows(40, 16), techniques=["fp16", "dynamic_int8"], **QUICK)
    assert report.metric_name == "cosine"
    assert report.original.metric == pytest.approx(1.0)
    assert report.candidate("fp16 weights").metric > 0.9999


def test_convolutions_are_never_quantised_dynamically() -> None:
    report = optimize(cnn(), rows(40, 1, 8, 8), techniques=["dynamic_int8", "static_int8/minmax"], **QUICK)
    skipped = report.candidate("dynamic int8")
    assert skipped.status == "skipped"
    assert "convolutions" in skipped.reason
    assert "6 to 9 times slower" in str(report)
    assert report.candidate("static int8 (minmax)").status == "measured"


def test_a_transformer_gets_block_weights_and_equalised_activations() -> None:
    ids = np.random.default_rng(0).integers(0, 300, (48, 12))
    report = optimize(transformer(), {"ids": ids}, **QUICK)
    named = {c.name: c for c in report.measured}
    assert {"static int8 (equalised)", "dynamic int8", "int8 block weights", "int4 block weights"} <= set(named)
    assert named["static int8 (equalised)"].metric > named["static int8 (minmax)"].metric > 0.9
    assert named["static int8 (equalised)"].independent_rows
    assert not named["dynamic int8"].independent_rows
    assert named["int8 block weights"].metric > named["int4 block weights"].metric


@pytest.mark.parametrize("make", [mlp, cnn, transformer])
def test_a_gateway_admits_whatever_comes_out(make: Any, tmp_path: Path) -> None:
    data = make()
    if make is transformer:
        given_rows: Any = np.random.default_rng(0).integers(0, 300, (24, 8))
    else:
        given_rows = rows(24, *((16,) if make is mlp else (1, 8, 8)))
    names = ["graph", "static_int8/minmax", "dynamic_int8", "int8_weights", "int4_weights", "fp16", "bf16", "magnitude"]
    report = optimize(data, given_rows, techniques=names, **QUICK)
    assert len(report.measured) >= 5
    assert not [c for c in report.candidates if c.status == "failed"]
    for found in report.measured:
        assert found.model is not None
        path = found.model.save(tmp_path / f"{found.technique}.onnx")
        assert admit(path).opsets[""] >= 13


def test_what_fails_is_told_in_its_row_and_the_others_go_on() -> None:
    large = np.full((64, 64), 1e6, np.float32)
    data = model(
        [node("MatMul", ["x", "w"], ["y"])], [value("x", F32, ["n", 64])], [value("y", F32, ["n", 64])], {"w": large}
    )
    report = optimize(data, rows(40, 64), techniques=["fp16", "bf16"], **QUICK)
    failed = report.candidate("fp16 weights")
    assert failed.status == "failed"
    assert failed.reason == "the constant 'w' has numbers that are too large for fp16"
    assert report.candidate("bf16 weights").status == "measured"
    assert "Failed:\n  fp16 weights: the constant 'w'" in str(report)


def test_a_metric_that_fails_on_a_candidate_fails_only_that() -> None:
    data, x = mlp(), rows(40, 16)
    exact = outputs_of(data, x=x)[0]

    def exacting(outputs: Any, y: Any) -> float:
        if not np.isin(outputs, exact).all():
            raise ArithmeticError("not what it was")
        return 1.0

    report = optimize(data, x, metric=exacting, techniques=["dynamic_int8"], **QUICK)
    assert report.candidate("dynamic int8").reason == "the metric exacting raised ArithmeticError: not what it was"
    assert not report.changed
    assert report.reason.startswith("no candidate could be measured (dynamic int8: the metric exacting raised")


def test_a_metric_that_gets_worse_everywhere_means_no_change() -> None:
    data, x = mlp(), rows(40, 16)
    reference = outputs_of(data, x=x)[0]

    def equality(outputs: Any, y: Any) -> float:
        return float(np.isin(outputs, reference).all())

    report = optimize(data, x, metric=equality, techniques=["fp16"], objective="size", **QUICK)
    assert not report.changed
    assert report.model.to_bytes() == given(data).to_bytes()
    assert report.reason == (
        "whatever is smaller loses more than is allowed: fp16 weights comes closest and loses 1.0000 (equality 1 → 0), "
        "0.01 is allowed"
    )


def test_the_smallest_is_taken_where_size_is_what_counts() -> None:
    data, x = mlp(width=512), rows(80, 16)
    both = ["fp16", "dynamic_int8"]
    labelled = (x, labels_of(data, x))
    report = optimize(data, labelled, techniques=both, objective="size", max_drop=0.2, independent_rows=False, **QUICK)
    assert report.chosen.name == "dynamic int8"
    assert report.model.run(x).keys() == {"logits"}
    careful = optimize(data, x, techniques=both, objective="size", **QUICK)
    assert careful.chosen.name == "fp16 weights"
    assert "dynamic int8 was passed over" in careful.reason
    assert careful.reason.endswith("as its rows depend on each other")


def test_the_model_that_was_given_stays_as_it_was() -> None:
    data = model(
        [node("MatMul", ["x", "w"], ["y"])], [value("x", F32, ["n", 16])], [value("y", F32, ["n", 4])],
        {"w": rows(16, 4)},
    )  # fmt: skip
    theirs = given(data)
    optimize(theirs, rows(40, 16), techniques=["static_int8/minmax", "fp16", "magnitude"], **QUICK)
    assert theirs.proto.SerializeToString() == given(data).proto.SerializeToString()


def test_what_is_deployed_of_a_report_is_the_chosen_model_with_golden_rows_of_its_own() -> None:
    data, x = mlp(), rows(40, 16)
    report = optimize(data, x, techniques=["static_int8/minmax"], objective="size", **QUICK)
    offer = report.__inferway_source__()
    assert offer.model is report.model.proto
    assert offer.labels["optimised"] == "static-int8-minmax"
    assert offer.metadata["optimised"]["metric"] == "cosine"
    ((inputs, outputs, room),) = offer.golden
    found = report.model.run(inputs)["logits"]
    np.testing.assert_allclose(found, outputs["logits"], **room)
    unchanged = optimize(data, x, techniques=["fp16"], max_drop=0, metric=_worse_each_time(), **QUICK)
    assert unchanged.__inferway_source__().golden is None


def _worse_each_time() -> Any:
    seen = iter(range(0, -100, -1))
    return lambda outputs, y: float(next(seen))


# -- bad input


def test_data_has_to_be_there() -> None:
    with pytest.raises(CalibrationError, match=r"data is missing: .* give data=\(x, y\), or data=x"):
        optimize(mlp())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (rows(40, 15), r"data does not fit the model: input 'x' .*\[-1, 16\].*\[40, 15\]"),
        ({"z": rows(40, 16)}, r"'z' is no input of the model, expected 'x'"),
        ({}, r"expects the inputs 'x', missing 'x'"),
        ((rows(40, 16), np.zeros(39)), "y has 39 rows and x has 40"),
        ((rows(40, 16), 3), "expected y as one label for each row"),
        ((rows(40, 16), None, 1), "got a tuple of 3"),
        ([rows(40, 16), np.zeros(40)], r"a list of 2 arrays; a pair of x and y is a tuple: \(x, y\)"),
        ("rows.npz", "data is a path, expected the rows themselves: numpy.load"),
        (np.empty((0, 16), np.float32), "data has no rows"),
        (rows(3, 16), "data has 3 rows, too few"),
        (np.where(np.arange(640).reshape(40, 16) == 35, np.nan, rows(40, 16)).astype(np.float32),
         r"input 'x' of data has NaN or infinite numbers in 1 of 40 rows \(row 2\)"),
        ((rows(40, 16), np.array([0.5] * 39 + [np.nan])), r"y of data has NaN or infinite numbers in 1 of 40 rows"),
    ],
    ids=["shape", "name", "missing", "labels", "no-labels", "tuple", "list", "path", "empty", "few", "nan",
         "nan-label"],
)  # fmt: skip
def test_data_that_does_not_fit_is_refused_with_what_was_expected(data: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        optimize(mlp(), data, **QUICK)


def test_calibration_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"calibration does not fit the model: input 'x'"):
        optimize(mlp(), rows(40, 16), calibration=rows(8, 4), **QUICK)


def test_inputs_of_different_lengths_are_refused() -> None:
    both = model(
        [node("Add", ["a", "b"], ["y"])],
        [value("a", F32, ["n", 2]), value("b", F32, ["n", 2])],
        [value("y", F32, ["n", 2])],
    )
    with pytest.raises(CalibrationError, match="'a' has 5, 'b' has 4"):
        optimize(both, {"a": rows(5, 2), "b": rows(4, 2)}, **QUICK)


def test_a_model_without_a_batch_axis_is_refused() -> None:
    with pytest.raises(BuildError, match=r"the input 'x' has the shape \[1, 16\], without a variable first axis"):
        optimize(mlp(batch=1), rows(40, 16), **QUICK)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"techniques": "static-int8"}, "unknown technique 'static-int8'.*did you mean 'static_int8'"),
        ({"techniques": ["fp16", "magic"]}, "unknown technique 'magic', expected 'auto' or some of"),
        ({"techniques": []}, "techniques is empty"),
        ({"metric": "acuracy"}, "unknown metric 'acuracy', expected a callable or one of 'accuracy'"),
        ({"metric": "cosine", "greater_is_better": True}, "named metrics know their direction"),
        ({"output": "scores"}, "no output 'scores', expected 'logits'"),
        ({"max_drop": -0.1}, "max_drop is at least 0, got -0.1"),
        ({"max_drop": float("nan")}, "max_drop is at least 0, got nan"),
        ({"objective": "speed"}, "objective is 'latency' or 'size', got 'speed'"),
        ({"sparsity": 1.0}, "sparsity is between 0 and 1"),
        ({"threads": 0}, "threads is at least 1"),
        ({"batch_sizes": ()}, "batch_sizes are whole numbers from 1"),
        ({"rounds": 1}, "rounds is at least 3"),
    ],
    ids=["near", "unknown", "none", "metric", "direction", "output", "drop", "nan", "objective", "sparsity", "threads",
         "batches", "rounds"],
)  # fmt: skip
def test_arguments_that_cannot_be_used_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        optimize(mlp(), rows(40, 16), **{**QUICK, **options})


def test_a_metric_that_needs_labels_says_so() -> None:
    with pytest.raises(CalibrationError, match=r"the metric f1 needs labels: give data=\(x, y\)"):
        optimize(mlp(), rows(40, 16), metric="f1", **QUICK)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda outputs, y: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda outputs, y: float("nan"), "gave nan, expected a finite number"),
        (lambda outputs, y: "good", "raised ValueError"),
    ],
    ids=["raises", "nan", "text"],
)
def test_a_metric_that_fails_on_the_original_ends_it(metric: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        optimize(mlp(), rows(40, 16), metric=metric, **QUICK)


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    root = model([node("Log", ["x"], ["y"])], [value("x", F32, ["n", 2])], [value("y", F32, ["n", 2])])
    with pytest.raises(CalibrationError, match="the model gives NaN or infinite numbers in 'y' on the held-out rows"):
        optimize(root, -np.ones((40, 2), np.float32), **QUICK)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"to be an \.onnx file, and there is none"):
        optimize(tmp_path / "missing.onnx", rows(40, 16))
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ConfigurationError, match=r"text\.onnx cannot be read as an ONNX model"):
        optimize(tmp_path / "text.onnx", rows(40, 16))
    with pytest.raises(inferway.UnknownFrameworkError):
        optimize(object(), rows(40, 16))


def test_weights_in_another_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save_model(
        onnx.load_from_string(mlp()), str(path), save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    report = optimize(path, rows(40, 16), techniques="fp16", **QUICK)
    assert report.candidate("fp16 weights").metric > 0.9999
    with pytest.raises(ConfigurationError, match=r"keeps weights in another file, .* give the path"):
        optimize(path.read_bytes(), rows(40, 16))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ConfigurationError, match=r"model\.onnx cannot be read as an ONNX model"):
        optimize(path, rows(40, 16))


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        MissingExtraError, match=r"onnxruntime, which is not installed: pip install 'inferway\[optimize"
    ):
        optimize(mlp(), rows(40, 16))


def test_naming_it_imports_no_runtime() -> None:
    code = (
        "import sys, inferway; inferway.optimize; "
        "assert not {'onnx', 'onnxruntime', 'torch', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- models of scikit-learn


def test_a_model_of_a_data_frame_is_exported_and_optimised() -> None:
    pandas = pytest.importorskip("pandas")
    from sklearn.compose import ColumnTransformer
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    age = np.arange(60, dtype=np.float32) % 17
    frame = pandas.DataFrame({"age": age, "city": ["rome", "oslo", "bern"] * 20})
    columns = ColumnTransformer([("n", StandardScaler(), ["age"]), ("c", OneHotEncoder(), ["city"])])
    kinds = np.where(frame["city"] == "rome", "south", "north")
    fitted = make_pipeline(columns, MLPClassifier(64, solver="lbfgs", max_iter=30, random_state=0)).fit(frame, kinds)
    report = optimize(fitted, (frame, kinds), techniques=["static_int8/minmax", "dynamic_int8"], **QUICK)
    assert report.metric_name == "accuracy"
    assert report.original.metric == 1.0
    # The bias of shape [1, n] that such networks have is no obstacle.
    assert [c.status for c in report.candidates] == ["measured"] * 3
    wide = fitted.fit(frame.astype({"age": np.float64}), kinds)
    double = optimize(wide, (frame.astype({"age": np.float64}), kinds), techniques=["dynamic_int8"], **QUICK)
    assert double.candidate("dynamic int8").reason.startswith("the model computes in FP64")


# -- choosing

ORIGINAL = candidate("original")
ACCURACY = Metric("accuracy", True, "", lambda outputs: 0.0)


def choice(*others: Any, objective: str = "latency", independent: bool = True) -> tuple[str, str]:
    chosen, reason = _choose([ORIGINAL, *others], ACCURACY, 0.01, objective, 64, independent)
    return chosen.name, reason


def test_the_fastest_within_what_may_be_lost_is_chosen() -> None:
    fast = candidate("fast", seconds=5e-4, drop=0.005, metric=0.895)
    faster = candidate("faster", seconds=2e-4, drop=0.02, metric=0.88)
    name, reason = choice(fast, faster)
    assert name == "fast"
    assert reason == "2.00 times as fast at batch 64 with 100% of the size, and loses 0.0050 (accuracy 0.9 → 0.895)"


def test_a_loss_of_exactly_what_is_allowed_is_allowed() -> None:
    assert choice(candidate("edge", seconds=5e-4, drop=0.9 - 0.89, metric=0.89))[0] == "edge"


def test_a_gain_within_the_noise_is_none() -> None:
    name, reason = choice(candidate("little", seconds=9.7e-4, spread=0.05))
    assert name == "original"
    assert reason == (
        "no candidate was faster at batch 64 by more than the spread: little came closest with 1.03 times, where 5% "
        "either way is noise"
    )


def test_what_is_slower_elsewhere_is_said() -> None:
    fast = candidate("fast", seconds=5e-4)
    both = replace(fast, timings={1: timing(2e-5, 0.75), **fast.timings})
    assert choice(both)[1].endswith("; it is slower elsewhere (0.75 times as fast at batch 1)")


def test_among_equally_fast_ones_the_one_that_loses_least_is_chosen() -> None:
    quicker = candidate("quicker", seconds=5.0e-4, drop=0.008)
    better = candidate("better", seconds=5.1e-4, drop=0.001)
    assert choice(quicker, better)[0] == "better"


def test_rows_that_depend_on_each_other_are_taken_where_nothing_else_will_do() -> None:
    dependent = candidate("dynamic", seconds=2e-4, independent_rows=False)
    assert choice(dependent)[0] == "dynamic"
    name, reason = choice(dependent, candidate("static", seconds=4e-4))
    assert name == "static"
    assert "dynamic was passed over (5.00 times as fast" in reason
    assert choice(dependent, candidate("static", seconds=4e-4), independent=False)[0] == "dynamic"


def test_two_outputs_are_compared_each_in_its_own_way() -> None:
    data, x = two_outputs(), rows(60, 32)
    report = optimize(data, (x, outputs_of(data, x=x)[0]), techniques=["dynamic_int8"], **QUICK)
    assert report.metric_about == "of 'label' with the labels"
    label, probabilities = report.candidate("dynamic int8").differences
    assert label.differing is not None
    assert label.max_abs is None
    assert probabilities.max_abs is not None
    assert probabilities.differing is None
