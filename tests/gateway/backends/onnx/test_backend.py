"""Opening models: what is refused, what is tried, and what of it the profile tells."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferway_gateway.backends.onnx import OnnxBackend, OnnxSession
from inferway_gateway.backends.onnx.backend import ANY_SIZE, _log_runtime
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.errors import ModelLoadError
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig, SessionOptions, Warmup, WarmupInput
from inferway_gateway.core.tensors import Arrays
from models import (
    F32,
    ModelFiles,
    add_one,
    add_sub,
    batch_centred,
    concat_text,
    corrupt,
    doubled_rows,
    dynamic_quantised,
    endless,
    external_data,
    fails_on_negative,
    fill,
    identity,
    masked_mean,
    matmul,
    model,
    node,
    optional_input,
    slow,
    value,
    write_repository,
)

from .conftest import OpenModel


def artifact(root: Path, name: str = "m", version: int = 1) -> Artifact:
    return Artifact(name, version, root / name / str(version) / "model.onnx")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("empty", "No graph was found in the protobuf."),
        ("truncated", "Protobuf parsing failed."),
        ("html", "Protobuf parsing failed."),
        ("zeros", "Protobuf parsing failed."),
        ("no_such_operator", "NoSuchOperator(-1) is not a registered function/op"),
        ("missing_data", "external data 'model.onnx.data' is missing"),
    ],
)
def test_a_file_that_is_no_model_is_refused_with_the_reason(tmp_path: Path, what: str, reason: str) -> None:
    write_repository(tmp_path, {"m": corrupt()[what]})
    with pytest.raises(ModelLoadError) as caught:
        OnnxBackend().open(artifact(tmp_path))
    assert caught.value.message.startswith("failed to load 'm' version 1: ")
    assert reason in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_a_missing_file_and_a_folder_in_its_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="failed to load 'm' version 1: the model file is missing"):
        OnnxBackend().open(artifact(tmp_path))
    (tmp_path / "m" / "1" / "model.onnx").mkdir(parents=True)
    with pytest.raises(ModelLoadError, match="the model file is missing"):
        OnnxBackend().open(artifact(tmp_path))


def test_external_data_is_read_from_the_models_own_folder_only(tmp_path: Path) -> None:
    content, weights = external_data()
    write_repository(tmp_path, {"good": ModelFiles({1: content}, files={"1/model.onnx.data": weights})})
    session = OnnxBackend().open(artifact(tmp_path, "good"))
    x = np.ones((1, 64), np.float32)
    assert session.run({"x": x}, ["y"])[0].tolist() == x.tolist()
    session.close()

    (tmp_path / "outside.data").write_bytes(weights)
    for location in ("../../outside.data", str(tmp_path / "outside.data"), "link.data"):
        files = ModelFiles({1: external_data(location=location)[0]})
        write_repository(tmp_path, {"bad": files})
        link = tmp_path / "bad" / "1" / "link.data"
        if not link.exists():
            link.symlink_to(tmp_path / "outside.data")
        with pytest.raises(ModelLoadError, match="is outside the model's folder"):
            OnnxBackend().open(artifact(tmp_path, "bad"))


def test_a_missing_execution_provider_is_passed_over_while_another_is_left(
    open_model: OpenModel, caplog: pytest.LogCaptureFixture
) -> None:
    session = open_model(add_one(), providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert session.profile.execution_providers == ("CPUExecutionProvider",)
    assert "execution provider CUDAExecutionProvider is not in this build of ONNX Runtime" in session.profile.note
    assert "it runs on CPUExecutionProvider" in caplog.text


def test_no_execution_provider_left_is_an_error_that_says_which_there_are(open_model: OpenModel) -> None:
    options = SessionOptions(providers=("CUDAExecutionProvider",))
    with pytest.raises(ModelLoadError, match=r"CUDAExecutionProvider is not in .* CPUExecutionProvider: install"):
        open_model(add_one(), ModelConfig(session=options))


def test_a_small_model_is_measured_and_short_enough_for_the_event_loop(open_model: OpenModel) -> None:
    # The threshold is far above any machine's time for this model, so that a busy one passes too.
    session = open_model(add_sub(), inline_threshold_s=0.05)
    profile = session.profile
    assert profile.row_exactness == "exact"
    assert profile.batchable
    assert profile.inline_max_elements >= 1024
    assert [point.rows for point in profile.cost][:3] == [1, 2, 4]
    assert profile.cost_row_elements == 32
    assert profile.execution_providers == ("CPUExecutionProvider",)
    assert profile.load_s > 0
    assert profile.note == ""
    assert session.signature.max_rows > 1
    assert session.signature.max_rows & (session.signature.max_rows - 1) == 0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (slow(), "values, not only shapes"),
        (fill(), "values, not only shapes"),
        (concat_text(), "strings have no bound"),
    ],
)
def test_what_a_caller_can_make_long_is_never_inline(open_model: OpenModel, content: bytes, why: str) -> None:
    profile = open_model(content, inline_threshold_s=10.0).profile
    assert profile.inline_max_elements == 0
    assert why in profile.note


def test_a_run_above_the_threshold_is_not_inline(open_model: OpenModel) -> None:
    assert open_model(add_one(), inline_threshold_s=1e-9).profile.inline_max_elements == 0


def test_the_operator_decides_about_inline_runs_where_he_says_so(open_model: OpenModel) -> None:
    yes = ModelConfig(session=SessionOptions(inline=True))
    no = ModelConfig(session=SessionOptions(inline=False))
    assert open_model(slow(), yes).profile.inline_max_elements == ANY_SIZE
    assert open_model(add_one(), no, inline_threshold_s=1.0).profile.inline_max_elements == 0


def test_without_trial_nothing_is_timed_and_rows_are_still_judged(open_model: OpenModel) -> None:
    options = ModelConfig(session=SessionOptions(trial=False))
    profile = open_model(add_one(), options).profile
    assert (profile.trial, profile.cost, profile.inline_max_elements) == ((), (), 0)
    assert (profile.row_exactness, profile.batchable) == ("exact", True)
    assert open_model(batch_centred(), options).profile.row_exactness == "inexact"


def test_dynamic_quantisation_is_batched_only_where_the_operator_vouches_for_it(open_model: OpenModel) -> None:
    default = open_model(dynamic_quantised())
    assert (default.profile.row_exactness, default.profile.batchable) == ("inexact", False)
    assert default.signature.max_rows == 0
    vouched = open_model(dynamic_quantised(), ModelConfig(batching=BatchPolicy(enabled=True)))
    assert (vouched.profile.row_exactness, vouched.profile.batchable) == ("inexact", True)
    assert len(vouched.profile.cost) > 1


def test_dynamic_quantisation_counts_even_where_the_probe_does_not_see_it(open_model: OpenModel) -> None:
    # Rows of whole numbers up to 255 quantise without error whatever their mates, until a caller sends others.
    content = model(
        [
            node("Cast", ["x"], ["f"], to=F32),
            node("Mul", ["f", "zero"], ["z"]),
            node("DynamicQuantizeLinear", ["z"], ["q", "s", "p"]),
            node("DequantizeLinear", ["q", "s", "p"], ["y"]),
        ],
        [value("x", F32, ["batch", 4])],
        [value("y", F32, ["batch", 4])],
        {"zero": np.zeros(4, np.float32)},
    )
    profile = open_model(content).profile
    assert (profile.row_exactness, profile.batchable) == ("inexact", False)
    assert "DynamicQuantizeLinear takes one scale from all rows" in profile.note


def test_batching_can_be_turned_off(open_model: OpenModel) -> None:
    profile = open_model(add_one(), ModelConfig(batching=BatchPolicy(enabled=False))).profile
    assert (profile.row_exactness, profile.batchable) == ("exact", False)
    assert [point.rows for point in profile.cost] == [1]


def test_a_configured_batch_size_bounds_rows_and_cost(open_model: OpenModel) -> None:
    session = open_model(add_one(), ModelConfig(max_batch_size=4))
    assert session.signature.max_rows == 4
    assert [point.rows for point in session.profile.cost] == [1, 2, 4]


def test_a_configured_batch_size_does_not_make_rows_of_what_are_none(open_model: OpenModel) -> None:
    session = open_model(doubled_rows(), ModelConfig(max_batch_size=4))
    assert not session.signature.batched
    assert not session.profile.batchable


def test_inputs_of_unrelated_length_are_no_rows(open_model: OpenModel) -> None:
    # Scores of queries against documents: callers need numbers of both that differ.
    content = model(
        [node("Transpose", ["documents"], ["t"], perm=[1, 0]), node("MatMul", ["queries", "t"], ["scores"])],
        [value("queries", F32, ["q", 4]), value("documents", F32, ["d", 4])],
        [value("scores", F32, ["q", "d"])],
    )
    session = open_model(content)
    assert not session.signature.batched
    queries, documents = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)
    inputs = {"queries": queries, "documents": documents}
    session.signature.check(inputs)
    assert session.run(inputs, ["scores"])[0].shape == (3, 5)


def test_a_model_that_never_answers_is_loaded_in_bounded_time_and_served_unmeasured(open_model: OpenModel) -> None:
    started = time.monotonic()
    session = open_model(endless(), run_limit_s=0.2)
    assert time.monotonic() - started < 30
    assert session.profile.cost == ()
    assert "did not end in time" in session.profile.note


def test_a_model_that_runs_on_no_made_up_input_is_served_unmeasured(open_model: OpenModel) -> None:
    # Ids must lie beyond what is tried.
    content = model(
        [node("Add", ["x", "shift"], ["i"]), node("Gather", ["table", "i"], ["y"])],
        [value("x", 7, ["batch", 1])],
        [value("y", F32, ["batch", 1])],
        {"shift": np.array([-1000]), "table": np.zeros(4, np.float32)},
    )
    session = open_model(content)
    assert not session.profile.batchable
    assert "no input was found on which it runs: model 'm' failed: Gather" in session.profile.note
    assert session.run({"x": np.array([[1001]])}, ["y"])[0].tolist() == [[0]]


def test_rows_are_judged_on_a_configured_warmup_where_nothing_else_runs(open_model: OpenModel, tmp_path: Path) -> None:
    content = model(
        [node("Add", ["x", "shift"], ["i"]), node("Gather", ["table", "i"], ["y"])],
        [value("x", 7, ["batch", "n"])],
        [value("y", F32, ["batch", "n"])],
        {"shift": np.array([-1000]), "table": np.arange(4, dtype=np.float32)},
    )
    (tmp_path / "ids").write_bytes(np.array([1000, 1001, 1002]).tobytes())
    warmup = Warmup("w", 1, 1, (WarmupInput("x", "INT64", (3,), "file", str(tmp_path / "ids")),))
    profile = open_model(content, ModelConfig(warmup=(warmup,))).profile
    assert (profile.row_exactness, profile.batchable) == ("exact", True)
    assert profile.cost_row_elements == 3


def test_configured_warmups_run_as_often_as_they_say(open_model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_seen: list[int] = []
    run = OnnxSession.run

    def counted(self: OnnxSession, inputs: Arrays, *rest: Any) -> list[Any]:
        rows_seen.append(len(inputs["x"]))
        return run(self, inputs, *rest)

    monkeypatch.setattr(OnnxSession, "run", counted)
    # No measurement uses five rows.
    warmup = Warmup("w", 5, 3, (WarmupInput("x", "FP32", (16,), "random"),))
    open_model(add_one(), ModelConfig(warmup=(warmup,)))
    assert rows_seen.count(5) == 3
    assert rows_seen[-1] == 5


def test_a_warmup_that_does_not_fit_or_does_not_end_fails_the_load(open_model: OpenModel) -> None:
    short = Warmup("w", 1, 1, (WarmupInput("x", "FP32", (3,), "zero"),))
    with pytest.raises(ModelLoadError, match=r"failed to load 'm' version 1: warm-up 'w': input 'x' expects shape"):
        open_model(add_one(), ModelConfig(warmup=(short,)))
    for dims in ((64,), (2, 64)):
        unending = Warmup("w", 1, 1, (WarmupInput("x", "FP32", dims, "zero"),))
        with pytest.raises(ModelLoadError, match="warm-up 'w' did not end in time"):
            open_model(endless(), ModelConfig(warmup=(unending,)), run_limit_s=0.1)


def test_a_warmup_on_which_the_model_fails_is_an_error(open_model: OpenModel, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(np.full(4, -1, np.float32).tobytes())
    warmup = Warmup("negative", 1, 1, (WarmupInput("x", "FP32", (4,), "file", str(tmp_path / "x")),))
    with pytest.raises(ModelLoadError, match="warm-up 'negative' failed: model 'm' failed: Gather"):
        open_model(fails_on_negative(), ModelConfig(warmup=(warmup,)))


def normalising(width: int = 64) -> bytes:
    """x + residual, normalised: what the runtime fuses into one operator."""
    return model(
        [node("Add", ["x", "r"], ["s"]), node("LayerNormalization", ["s", "g", "b"], ["y"], axis=-1)],
        [value("x", F32, ["batch", 8, width]), value("r", F32, ["batch", 8, width])],
        [value("y", F32, ["batch", 8, width])],
        {"g": np.ones(width, np.float32), "b": np.zeros(width, np.float32)},
    )


def test_the_trial_lists_each_candidate_and_marks_one_as_chosen(open_model: OpenModel) -> None:
    trial = open_model(normalising(), cpus=1).profile.trial
    assert [row.options for row in trial] == ["default", "disabled_optimizers=SkipLayerNormFusion"]
    assert [row.chosen for row in trial].count(True) == 1
    assert all(row.seconds > 0 for row in trial)
    chosen = next(row for row in trial if row.chosen)
    assert chosen.seconds == min(row.seconds for row in trial) or chosen.options == "default"


def test_options_that_the_operator_gives_are_not_tried_otherwise(open_model: OpenModel) -> None:
    options = SessionOptions(disabled_optimizers=("GeluFusion",), intra_op_threads=2)
    session = open_model(normalising(), ModelConfig(session=options), cpus=4)
    assert [row.options for row in session.profile.trial] == ["disabled_optimizers=GeluFusion intra_op_threads=2"]
    assert session.profile.intra_op_threads == 2


def test_more_threads_are_tried_for_long_runs_and_reported(open_model: OpenModel) -> None:
    content = matmul(2048, 2048)
    trial = open_model(content, ModelConfig(max_batch_size=1), cpus=2, trial_budget_s=20.0).profile.trial
    # Whether one run takes over a millisecond is the machine's affair; if it does, threads are tried.
    assert trial[0].options == "default"
    assert [row.options for row in trial[1:]] == (["intra_op_threads=2"] if trial[0].seconds > 1e-3 else [])


def test_a_model_too_large_to_load_twice_is_not_tried_otherwise(open_model: OpenModel) -> None:
    trial = open_model(normalising(), cpus=1, trial_max_bytes=10).profile.trial
    assert [row.chosen for row in trial] == [True, False]
    assert "too large" in trial[1].note


def test_no_budget_means_no_trial_and_says_so(open_model: OpenModel) -> None:
    trial = open_model(normalising(), cpus=1, trial_budget_s=0.0).profile.trial
    assert trial[1].note == "not tried: no time left"


def test_an_optional_input_appears_in_the_signature(open_model: OpenModel) -> None:
    session = open_model(optional_input())
    assert [(spec.name, spec.optional) for spec in session.signature.inputs] == [("x", False), ("scale", True)]
    assert "axis 0 of input 'scale' is not variable" in session.profile.note


def test_several_models_open_at_once_from_several_threads(tmp_path: Path) -> None:
    contents = {"a": add_one(), "b": masked_mean(), "c": identity("BYTES"), "d": matmul()}
    write_repository(tmp_path, contents)
    backend = OnnxBackend(trial_budget_s=0.0, measure_budget_s=0.0)
    found: dict[str, tuple[str, ...]] = {}

    def work(name: str) -> None:
        session = backend.open(artifact(tmp_path, name))
        found[name] = session.signature.output_names
        session.close()

    threads = [threading.Thread(target=work, args=(name,)) for name in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"a": ("y",), "b": ("pooled", "tokens"), "c": ("y",), "d": ("y",)}


def test_no_thread_of_loading_stays(open_model: OpenModel) -> None:
    open_model(add_one())
    with pytest.raises(ModelLoadError):
        open_model(corrupt()["html"])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inferway-load")]


def test_nothing_is_written_to_standard_error(open_model: OpenModel, capfd: pytest.CaptureFixture[str]) -> None:
    open_model(normalising())
    for content in corrupt().values():
        with pytest.raises(ModelLoadError):
            open_model(content)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("severity", "level"), [(0, "DEBUG"), (2, "WARNING"), (3, "ERROR"), (4, "CRITICAL")])
def test_what_the_runtime_says_goes_to_its_logger(caplog: pytest.LogCaptureFixture, severity: int, level: str) -> None:
    with caplog.at_level(logging.DEBUG, "onnxruntime"):
        _log_runtime(severity, "onnxruntime", "m", "graph.cc:10", "something")
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("onnxruntime", level, "something [m, graph.cc:10]")
