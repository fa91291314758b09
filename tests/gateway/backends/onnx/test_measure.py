"""What running a session tells: which rows may run together, what runs cost, which are short."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inferway_gateway.backends.onnx.measure import (
    Runner,
    Watchdog,
    distance,
    measure_cost,
    measure_inline,
    probe_rows,
    throughput,
)
from inferway_gateway.backends.onnx.sample import Sample
from inferway_gateway.core.backend import Profile, RunHandle
from inferway_gateway.core.errors import DeadlineExceededError, ModelExecutionError
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig, PaddingAxis, SessionOptions
from inferway_gateway.core.tensors import Arrays, Signature, TensorSpec
from models import (
    F32,
    add_sub,
    batch_centred,
    classifier,
    concat_text,
    doubled_rows,
    dynamic_quantised,
    identity,
    masked_mean,
    matmul,
    model,
    node,
    running_sum,
    softmax_over_rows,
    value,
)

from .conftest import OpenModel

UNMEASURED = ModelConfig(session=SessionOptions(trial=False))
Compute = Callable[[Arrays], list[NDArray[Any]]]


class ComputedSession:
    """A session that computes what a test says, to have results that no kernel here gives."""

    def __init__(self, signature: Signature, compute: Compute) -> None:
        self.signature = signature
        self.profile = Profile()
        self._compute = compute

    def run(self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None = None) -> list[NDArray[Any]]:
        return self._compute(inputs)

    def close(self) -> None:
        """Nothing is held."""


ROWS = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),), batched=True)


def probe_computed(compute: Compute) -> tuple[str, str]:
    with Watchdog(5.0) as watchdog:
        return probe_rows(Runner(ComputedSession(ROWS, compute), watchdog), Sample(ROWS, "plain", 4, {}, {}))


def gelu_on_odd_tail(inputs: Arrays) -> list[NDArray[Any]]:
    y = inputs["x"].copy()
    if len(y) % 2 and len(y) > 1:
        y[-1] *= np.float32(1 + 1e-6)
    return [y]


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        (add_sub(), "exact"),
        (identity("BF16"), "exact"),
        (identity("BOOL"), "exact"),
        (concat_text(), "exact"),
        (classifier(), "exact"),
        (matmul(), "exact"),
        (dynamic_quantised(), "inexact"),
        (batch_centred(), "inexact"),
        (running_sum(), "inexact"),
        (softmax_over_rows(), "inexact"),
    ],
)
def test_rows_are_judged_by_what_they_give(open_model: OpenModel, content: bytes, verdict: str) -> None:
    session = open_model(content, UNMEASURED)
    assert session.profile.row_exactness == verdict
    assert session.profile.batchable is (verdict == "exact")
    assert session.signature.batched


def test_a_mean_over_variable_length_is_judged_at_several_lengths(open_model: OpenModel) -> None:
    assert open_model(masked_mean(), UNMEASURED).profile.row_exactness in ("exact", "padded")


def test_more_rows_out_than_in_are_no_batch(open_model: OpenModel) -> None:
    session = open_model(doubled_rows(), UNMEASURED)
    assert session.profile.row_exactness == "unbatched"
    assert not session.signature.batched
    assert "shape [4, 4] for two rows" in session.profile.note
    x = np.ones((3, 4), np.float32)
    assert session.run({"x": x}, ["y"])[0].shape == (6, 4)


def test_two_rows_that_fail_together_are_no_batch() -> None:
    def compute(inputs: Arrays) -> list[NDArray[Any]]:
        # As of a reshape to one row, which exporters write that saw a batch of one.
        if len(inputs["x"]) > 1:
            raise ModelExecutionError("Reshape: sizes differ")
        return [inputs["x"]]

    assert probe_computed(compute) == ("unbatched", "one row runs and two together do not: Reshape: sizes differ")


def test_random_results_are_inexact(open_model: OpenModel) -> None:
    content = model(
        [node("RandomNormalLike", ["x"], ["y"])], [value("x", F32, ["batch", 4])], [value("y", F32, ["batch", 4])]
    )
    assert "equal runs give different results" in open_model(content, UNMEASURED).profile.note


def test_a_lone_row_that_rounds_differently_is_padded() -> None:
    def compute(inputs: Arrays) -> list[NDArray[Any]]:
        x = inputs["x"]
        return [x * np.float32(1 + 1e-6) if len(x) == 1 else x]

    verdict, note = probe_computed(compute)
    assert verdict == "padded"
    assert "differs by" in note


def test_a_lone_row_that_gives_something_else_is_inexact() -> None:
    assert probe_computed(lambda inputs: [inputs["x"] * (2 if len(inputs["x"]) == 1 else 1)])[0] == "inexact"


def test_a_result_that_depends_on_its_place_is_told_from_one_that_depends_on_its_mates() -> None:
    assert "size of its batch and its place" in probe_computed(gelu_on_odd_tail)[1]
    assert "what the rows beside it hold" in probe_computed(lambda inputs: [inputs["x"] - inputs["x"].mean(0)])[1]


def test_a_dependence_that_only_large_batches_show_is_found() -> None:
    def compute(inputs: Arrays) -> list[NDArray[Any]]:
        y = inputs["x"].copy()
        y[16:] += 1
        return [y]

    assert probe_computed(compute)[0] == "inexact"


@pytest.mark.parametrize(("most_rows", "largest"), [(None, 33), (64, 33), (12, 12), (8, 8), (1, 3)])
def test_no_batch_is_tried_that_is_never_run(most_rows: int | None, largest: int) -> None:
    seen: list[int] = []

    def compute(inputs: Arrays) -> list[NDArray[Any]]:
        seen.append(len(inputs["x"]))
        return [inputs["x"]]

    with Watchdog(5.0) as watchdog:
        sample = Sample(ROWS, "plain", 4, {}, {})
        assert probe_rows(Runner(ComputedSession(ROWS, compute), watchdog), sample, most_rows)[0] == "exact"
    assert max(seen) == largest


def test_equal_rows_prove_nothing() -> None:
    sample = Sample(ROWS, "zero", 4, {}, {})
    with Watchdog(5.0) as watchdog:
        verdict, note = probe_rows(Runner(ComputedSession(ROWS, lambda inputs: [inputs["x"]]), watchdog), sample)
    assert verdict == "inexact"
    assert "no two different rows" in note


def test_not_a_number_equals_itself_in_the_comparison() -> None:
    assert probe_computed(lambda inputs: [np.full_like(inputs["x"], np.nan)])[0] == "exact"


def test_distance_is_relative_and_infinite_where_nothing_compares() -> None:
    a = [np.array([1.0, 2.0, np.nan])]
    assert distance(a, [np.array([1.0, 2.0, np.nan])]) == 0
    assert distance(a, [np.array([1.0, 1.0, np.nan])]) == 0.5
    assert distance(a, [np.array([np.nan, 2.0, 1.0])]) == float("inf")
    assert distance([np.array([1])], [np.array([2])]) == float("inf")
    assert distance([np.zeros(1)], [np.zeros(2)]) == float("inf")


def test_the_watchdog_ends_what_does_not_end_and_lets_the_next_run_be() -> None:
    ended = threading.Event()

    class Stuck(ComputedSession):
        def run(self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None = None) -> list[NDArray[Any]]:
            assert handle is not None
            if not inputs:
                return []
            handle.bind(ended.set)
            assert ended.wait(10)
            raise DeadlineExceededError("ended")

    session = Stuck(ROWS, lambda _: [])
    with Watchdog(0.02) as watchdog:
        with pytest.raises(DeadlineExceededError):
            watchdog.run(session, {"x": np.zeros(1)}, [])
        assert watchdog.run(session, {}, []) == []


class CountedSession(ComputedSession):
    """Fails above a number of rows, and remembers what it was asked."""

    def __init__(self, limit: int) -> None:
        super().__init__(ROWS, self._answer)
        self.seen: list[int] = []
        self._limit = limit

    def _answer(self, inputs: Arrays) -> list[NDArray[Any]]:
        rows = len(inputs["x"])
        self.seen.append(rows)
        if rows > self._limit:
            raise ModelExecutionError("too many rows")
        return [inputs["x"]]


def test_cost_is_measured_by_doubling_up_to_what_the_model_takes() -> None:
    session = CountedSession(limit=4)
    sample = Sample(ROWS, "plain", 4, {}, {})
    with Watchdog(5.0) as watchdog:
        cost = measure_cost(Runner(session, watchdog), sample, 64, 5.0)
        assert [point.rows for point in cost] == [1, 2, 4]
        assert all(point.seconds > 0 for point in cost)
        assert [p.rows for p in measure_cost(Runner(CountedSession(99), watchdog), sample, 1, 5.0)] == [1]
        assert [p.rows for p in measure_cost(Runner(CountedSession(99), watchdog), sample, 64, 0.0)] == [1]


def test_cost_never_falls_with_rows() -> None:
    release = threading.Event()

    def compute(inputs: Arrays) -> list[NDArray[Any]]:
        if len(inputs["x"]) == 2:
            release.wait(0.01)
        return [inputs["x"]]

    with Watchdog(5.0) as watchdog:
        runner = Runner(ComputedSession(ROWS, compute), watchdog)
        cost = measure_cost(runner, Sample(ROWS, "plain", 4, {}, {}), 4, 5.0)
    assert [point.rows for point in cost] == [1, 2, 4]
    assert cost[0].seconds <= cost[1].seconds <= cost[2].seconds < 0.01


def test_inline_runs_end_where_the_model_does() -> None:
    sample = Sample(ROWS, "plain", 4, {}, {})
    with Watchdog(5.0) as watchdog:
        assert measure_inline(Runner(CountedSession(limit=4), watchdog), sample, 1.0, 5.0) == 16
        assert measure_inline(Runner(CountedSession(limit=4), watchdog), sample, 0.0, 5.0) == 0
        assert measure_inline(Runner(CountedSession(limit=0), watchdog), sample, 1.0, 5.0) == 0


def test_inline_runs_are_held_against_long_rows_as_well_as_many() -> None:
    signature = Signature((TensorSpec("x", "FP32", (-1, -1)),), (TensorSpec("y", "FP32", (-1, -1)),), batched=True)

    def compute(inputs: Arrays) -> list[NDArray[Any]]:
        if inputs["x"].shape[1] > 8:
            raise ModelExecutionError("too long")
        return [inputs["x"]]

    sample = Sample(signature, "plain", 4, {}, {})
    with Watchdog(5.0) as watchdog:
        assert measure_inline(Runner(ComputedSession(signature, compute), watchdog), sample, 1.0, 5.0) == 8


def masked_mean_padding(**inputs: int) -> ModelConfig:
    padding = PaddingAxis(inputs, {"tokens": 1}, {"input_ids": 7})
    return ModelConfig(session=SessionOptions(trial=False), batching=BatchPolicy(padding=(padding,)))


def test_padding_that_the_mask_hides_is_fine(open_model: OpenModel) -> None:
    note = open_model(masked_mean(), masked_mean_padding(input_ids=1, attention_mask=1)).profile.note
    assert "padding" not in note


def test_padding_without_a_mask_is_noticed(open_model: OpenModel, caplog: pytest.LogCaptureFixture) -> None:
    content = model(
        [
            node("ReduceMean", ["input_ids", "axes"], ["pooled"], keepdims=0),
            node("Identity", ["input_ids"], ["tokens"]),
        ],
        [value("input_ids", F32, ["batch", "sequence"])],
        [value("pooled", F32, ["batch"]), value("tokens", F32, ["batch", "sequence"])],
        {"axes": np.array([1])},
    )
    assert "padding changes results" in open_model(content, masked_mean_padding(input_ids=1)).profile.note
    assert "padding changes results" in caplog.text


def test_padding_some_inputs_only_is_noticed(open_model: OpenModel) -> None:
    note = open_model(masked_mean(), masked_mean_padding(input_ids=1)).profile.note
    assert "a padded row does not run: model 'm' failed" in note


def test_rows_that_depend_on_each_other_through_an_optional_input_are_found(open_model: OpenModel) -> None:
    content = model(
        [node("ReduceSum", ["bias", "axes"], ["b"], keepdims=1), node("Add", ["x", "b"], ["y"])],
        [value("x", F32, ["batch", 4]), value("bias", F32, ["batch", 4])],
        [value("y", F32, ["batch", 4])],
        {"axes": np.array([0]), "bias": np.zeros((1, 4), np.float32)},
    )
    session = open_model(content, UNMEASURED)
    assert session.signature.inputs[1].optional
    assert (session.profile.row_exactness, session.profile.batchable) == ("inexact", False)


def test_throughput_raises_what_a_run_raised() -> None:
    def fail() -> None:
        raise ModelExecutionError("no")

    with pytest.raises(ModelExecutionError):
        throughput(fail, 2, 1)


def test_throughput_makes_every_caller_run() -> None:
    calls: list[int] = []
    seconds = throughput(lambda: calls.append(1), 3, 5)
    assert len(calls) == 15
    assert seconds > 0
