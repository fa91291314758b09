"""Batches that any process can work out."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway import ConfigurationError
from inferway.train.plan import Plan

sizes = st.integers(1, 200)


@given(rows=sizes, batch_size=sizes, workers=st.integers(1, 9), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_an_epoch_takes_every_row_once_and_shares_sum_to_one(
    rows: int, batch_size: int, workers: int, epoch: int, shuffle: bool
) -> None:
    plan = Plan(rows, batch_size, workers, 3, shuffle)
    taken = []
    for step in range(plan.steps):
        parts = [plan.part(epoch, step, worker) for worker in range(workers)]
        assert sum(part.weight for part in parts) == pytest.approx(1)
        assert max(len(p.rows) for p in parts) - min(len(p.rows) for p in parts) <= 1
        together = np.concatenate([part.rows for part in parts])
        assert together.tolist() == plan.batch(epoch, step).tolist()
        assert len(together) == (batch_size if step + 1 < plan.steps else rows - batch_size * (plan.steps - 1))
        for part in parts:
            assert part.weight == pytest.approx(len(part.rows) / len(together))
        taken += together.tolist()
    assert sorted(taken) == list(range(rows))


@given(rows=st.integers(2, 100), workers=st.integers(1, 5))
def test_weighted_means_of_the_workers_are_the_mean_of_the_step(rows: int, workers: int) -> None:
    values = np.random.default_rng(0).normal(size=rows)
    plan = Plan(rows, 7, workers, 1)
    for step in range(plan.steps):
        parts = [plan.part(0, step, worker) for worker in range(workers)]
        mean = sum(part.weight * values[part.rows].mean() for part in parts if len(part.rows))
        assert mean == pytest.approx(values[plan.batch(0, step)].mean())


def test_without_shuffling_rows_come_as_they_are() -> None:
    assert Plan(5, 2, shuffle=False).batch(4, 1).tolist() == [2, 3]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [Plan(50, 50, seed=seed).batch(epoch, 0).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_what_is_random_in_a_step_is_of_its_worker_and_step() -> None:
    plan = Plan(64, 8, 3, 5)
    seeds = [plan.noise(epoch, step, worker) for epoch in range(2) for step in range(8) for worker in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_another_process_works_out_the_same() -> None:
    code = (
        "from inferway.train.plan import Plan; p = Plan(40, 7, 2, 9);"
        "print(p.part(1, 2, 1).rows.tolist(), p.noise(1, 2, 1))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    plan = Plan(40, 7, 2, 9)
    assert told.stdout.strip() == f"{plan.part(1, 2, 1).rows.tolist()} {plan.noise(1, 2, 1)}"


def test_rows_of_a_step_cannot_be_changed_for_another() -> None:
    rows = Plan(10, 5).batch(0, 0)
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 1


@pytest.mark.parametrize(("rows", "batch_size", "workers"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_plan_of_nothing_is_refused(rows: int, batch_size: int, workers: int) -> None:
    with pytest.raises(ConfigurationError, match="has to be at least 1, not 0"):
        Plan(rows, batch_size, workers)


def test_steps_end_with_the_epoch() -> None:
    with pytest.raises(IndexError, match="the steps 0 to 2, not 3"):
        Plan(10, 4).batch(0, 3)
