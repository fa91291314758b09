from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway_gateway.core.backend import CostPoint
from inferway_gateway.core.cost import EXPLORE_EVERY, CostModel

SIZES = (1, 2, 4, 8, 16, 32)


class Known:
    """A model of one length whose runs take what ``seconds`` says, as measured at load."""

    def __init__(self, seconds: list[float], lone_rows: int = 1) -> None:
        sizes = SIZES[: len(seconds)]
        measured = [CostPoint(n, s) for n, s in zip(sizes, seconds, strict=True)]
        self.model = CostModel(measured, max_rows=sizes[-1], lone_rows=lone_rows)

    @property
    def target(self) -> int:
        return self.model.latest.target

    def seconds(self, rows: int) -> float:
        return self.model.latest.seconds(rows)

    def limit(self, available: int) -> int:
        return self.model.limit(self.model.latest, available)

    def learn(self, rows: int, seconds: float) -> None:
        self.model.learn(1, rows, seconds, seconds)


def curve(seconds: list[float], lone_rows: int = 1) -> Known:
    return Known(seconds, lone_rows)


def points(**seconds: float) -> tuple[CostPoint, ...]:
    return tuple(CostPoint(int(n[1:]), s) for n, s in seconds.items())


def test_a_batch_grows_only_while_rows_per_second_rise() -> None:
    assert curve([1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).target == 32
    assert curve([1.0, 1.5, 2.2, 4.3, 8.6, 17.2]).target == 4


def test_flat_and_falling_curves_mean_no_batching() -> None:
    assert curve([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).target == 1
    assert curve([1.0, 2.2, 4.9, 10.0, 21.0, 44.0]).target == 1
    # MiniLM at 128 tokens and magika, rows/s as measured on two cores: 56, 55, 50 and 210, 180, 173.
    for rates in ((56, 55, 50), (210, 180, 173)):
        model = CostModel(points(n1=1 / rates[0], n8=8 / rates[1], n32=32 / rates[2]))
        assert model.latest.target == 1


def test_a_gain_within_the_noise_is_no_gain() -> None:
    assert curve([1.0, 1.98, 3.92]).target == 1


def test_slow_runs_must_gain_more_to_be_worth_doubling() -> None:
    # Six per cent more rows a second: taken where a run has milliseconds, not where it has seconds.
    assert curve([0.001, 0.00188]).target == 2
    assert curve([1.0, 1.88]).target == 1


def test_a_lone_row_that_is_padded_costs_what_two_rows_cost() -> None:
    padded = curve([0.001, 0.002, 0.004, 0.008], lone_rows=2)
    assert padded.seconds(1) == padded.seconds(2)
    assert padded.target == 2


def test_a_curve_that_only_a_lone_row_fits_still_knows_its_cost() -> None:
    assert curve([0.5], lone_rows=2).seconds(1) == pytest.approx(1.0)


def test_between_and_beyond_the_sizes() -> None:
    known = curve([1.0, 1.0, 3.0])
    assert known.seconds(3) == pytest.approx(2.0)
    assert known.seconds(8) == pytest.approx(6.0)
    assert known.model.latest.rows_within(1.5) == 2
    assert known.model.latest.rows_within(0.1) == 1


def test_a_slowdown_of_every_size_leaves_the_target_alone() -> None:
    flat = curve([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    targets = set()
    for _ in range(200):
        flat.learn(1, 1.6)
        targets.add(flat.target)
    assert targets == {1}
    assert flat.seconds(1) == pytest.approx(1.6, rel=0.05)
    assert flat.seconds(8) == pytest.approx(8 * 1.6, rel=0.1), "a size that never ran follows the drift"


def test_a_noisy_flat_curve_settles_without_batching() -> None:
    noise = random.Random(3)
    flat = curve([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    at_one = 0
    for _ in range(1000):
        rows = flat.limit(100)
        flat.learn(rows, rows * noise.choice((1.0, 1.1, 1.2, 1.5)))
        at_one += rows == 1
    assert at_one > 900


def test_a_curve_found_better_than_promised_is_climbed() -> None:
    rising = curve([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    for _ in range(2000):
        rows = rising.limit(100)
        rising.learn(rows, 1.0 + rows * 0.01)
    assert rising.target == 32


def test_a_curve_found_worse_than_promised_is_left() -> None:
    # Eight rows promised 15 % more rows a second; stacking them costs more than that.
    deceived = curve([1.0, 1.9, 3.65, 7.0, 14.0, 28.0])
    assert deceived.target == 8
    for _ in range(2000):
        rows = deceived.limit(100)
        deceived.learn(rows, rows * (1.0 + 0.03 * rows))
    assert deceived.target == 1


def test_a_curve_found_wrong_in_height_is_doubted_in_shape() -> None:
    # Promised: 32 rows for the price of one, in a microsecond. Found: rows cost a millisecond each, and more together.
    wrong = curve([1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6])
    for _ in range(10_000):
        rows = wrong.limit(100)
        wrong.learn(rows, rows * 1e-3 * (1 + 0.05 * rows))
    assert wrong.target == 1


def test_exploring_is_rare_and_one_step() -> None:
    flat = curve([1.0, 2.0, 4.0, 8.0])
    limits = [flat.limit(100) for _ in range(EXPLORE_EVERY * 4)]
    assert limits.count(2) == 2
    assert set(limits) == {1, 2}
    rising = curve([0.001, 0.0019, 0.0034, 0.0062, 0.0124])
    limits = [rising.limit(100) for _ in range(EXPLORE_EVERY * 4)]
    assert (limits.count(16), limits.count(4), limits.count(8)) == (2, 2, EXPLORE_EVERY * 4 - 4)


def test_exploring_does_not_happen_where_it_would_cost_much_or_nothing_waits() -> None:
    falling = curve([1.0, 2.6, 6.0])
    assert {falling.limit(100) for _ in range(EXPLORE_EVERY * 4)} == {1}
    flat = curve([1.0, 2.0, 4.0])
    assert {flat.limit(1) for _ in range(EXPLORE_EVERY * 4)} == {1}


def test_one_outlier_does_not_move_the_target() -> None:
    rising = curve([1.0, 1.1, 1.2, 1.4])
    for _ in range(50):
        rising.learn(8, 1.4)
    rising.learn(8, 500.0)
    assert rising.target == 8
    for _ in range(50):
        rising.learn(8, 1.4)
    assert rising.seconds(8) == pytest.approx(1.4, rel=0.1)


def test_without_a_measurement_batching_has_to_prove_itself() -> None:
    model = CostModel(())
    assert not model.known
    assert model.latest.target == 1
    for _ in range(5000):
        rows = model.limit(model.latest, 1000)
        model.learn(7, rows, 0.01 + rows * 1e-5, 0.01 + rows * 1e-5)
    assert model.known
    assert model.latest.target >= 256
    assert model.latest.seconds(256) == pytest.approx(0.01256, rel=0.25)


def test_no_size_exceeds_the_bound_of_rows() -> None:
    model = CostModel(points(n1=1.0, n32=1.0), max_rows=12)
    assert [p.rows for p in model.latest.points] == [1, 2, 4, 8, 12]
    assert model.latest.target == 12


def test_rows_of_another_length_start_from_the_measured_curve() -> None:
    # Bound by overhead at 10 elements a row; a thousand elements a row are bound by work.
    model = CostModel(points(n1=1.0, n2=1.01, n4=1.03, n8=1.07, n64=1.63), row_elements=10, variable=True)
    assert model.curve(10).target == 64
    assert model.curve(10_000).target == 1
    assert model.curve(10_000).seconds(1) > 10
    assert model.curve(1).target >= model.curve(10).target
    assert model.curve(1).seconds(1) <= model.curve(10).seconds(1)


def test_lengths_learn_apart_and_models_of_one_length_know_only_one() -> None:
    model = CostModel(points(n1=1.0, n2=2.0), row_elements=16, variable=True)
    for _ in range(50):
        model.learn(16, 1, 3.0, 3.0)
    assert model.curve(16).seconds(1) == pytest.approx(3.0, rel=0.1)
    assert model.curve(64).seconds(1) == pytest.approx(12.0, rel=0.2), "what befell one length befell the others"
    assert model.latest is model.curve(16)
    assert model.curve(64) is not model.curve(16)
    fixed = CostModel(points(n1=1.0))
    assert fixed.curve(3) is fixed.curve(4000)


def test_the_first_row_seen_stands_for_an_unknown_measurement() -> None:
    model = CostModel(points(n1=1.0, n2=1.0), variable=True)
    assert model.curve(300).seconds(1) == pytest.approx(1.0)
    assert model.curve(0).seconds(1) > 0, "rows without elements have a cost too"


def test_curves_are_bounded_in_number() -> None:
    model = CostModel(points(n1=1.0), row_elements=1, variable=True)
    for elements in range(5000):
        model.curve(elements)
    assert len(model._curves) <= 512


@given(
    st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(1, 2000), st.floats(1e-7, 100.0)), max_size=60),
    st.integers(1, 2),
    st.booleans(),
    st.floats(0.0, 1.0),
)
def test_whatever_is_measured_and_learnt_costs_stay_positive_and_the_target_a_size(
    measured: list[float], runs: list[tuple[int, float]], lone_rows: int, variable: bool, share: float
) -> None:
    points = [CostPoint(1 << i, s) for i, s in enumerate(measured)]
    model = CostModel(points, max_rows=100, lone_rows=lone_rows, variable=variable)
    for rows, seconds in runs:
        model.learn(5, rows, seconds, seconds * share)
        assert model.limit(model.latest, rows) <= 100
    for rows in (1, 2, 3, 50, 100, 5000):
        assert 0 < model.latest.seconds(rows) < math.inf
    assert model.latest.target in {p.rows for p in model.latest.points}


def test_waiting_for_the_processor_is_not_learnt_as_cost_and_known_as_stretch() -> None:
    model = CostModel(points(n1=0.001, n2=0.002, n4=0.004), max_rows=4)
    noise = random.Random(4)
    for i in range(1000):
        rows = (1, 2, 4)[i % 3]
        work_s = rows * 0.001
        # Another process takes the processor for 4 ms at a time: few short runs are hit, and long ones nearly always.
        wall_s = work_s + 0.004 * (noise.random() < rows / 5)
        model.learn(1, rows, wall_s, work_s)
    assert model.latest.seconds(1) == pytest.approx(0.001, rel=0.05)
    assert model.latest.seconds(4) == pytest.approx(0.004, rel=0.05)
    assert 1.3 < model.stretch < 3.0


def test_where_threads_wait_for_a_device_the_time_on_the_wall_counts() -> None:
    model = CostModel(points(n1=0.001, n2=0.002), max_rows=2)
    for _ in range(200):
        model.learn(1, 1, 0.003, 0.0002)
    assert model.latest.seconds(1) == pytest.approx(0.003, rel=0.05)
    assert model.stretch == 1.0


def test_learning_costs_little_of_the_time_that_short_runs_take() -> None:
    model = CostModel(points(n1=5e-6))
    learnt = 0
    for _ in range(10_000):
        version = model._version
        model.learn(1, 1, 5e-6, 5e-6)
        learnt += model._version > version
    assert 10 < learnt < 100
    model.learn(1, 2, 5e-6, 5e-6)
    assert model._last_rows == 2, "a size that was not run just before is always learnt from"


def test_a_gain_learnt_at_one_length_is_expected_at_the_next() -> None:
    flat = {f"n{n}": n * 0.001 for n in (1, 2, 4, 8, 16)}
    model = CostModel(points(**flat), row_elements=64, variable=True, max_rows=16)
    assert model.curve(64).target == model.curve(96).target == 1
    for i in range(300):
        rows = (1, 2, 4, 8)[i % 4]
        model.learn(64, rows, 0.0006 + rows * 0.0004, 0.0006 + rows * 0.0004)
    assert model.curve(64).target >= 4
    assert model.curve(96).target >= 4
