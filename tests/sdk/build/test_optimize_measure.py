"""Timing in turns, and what counts as faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from inferway.build.optimize.measure import Runner, Timing, open_runner, race
from optimizing import given, mlp, rows, transformer


class Scripted(Runner):
    """A runner whose times are known."""

    def __init__(self, log: list[str], name: str, times: list[float]) -> None:
        self.log, self.name, self.times = log, name, times
        self.asked = 0

    def run(self, inputs: Mapping[str, Any]) -> list[Any]:
        return []

    def time(self, inputs: Mapping[str, Any], window_s: float = 0.02) -> float:
        self.log.append(self.name)
        self.asked += 1
        return self.times[(self.asked - 1) % len(self.times)]


def raced(rounds: int = 4, *, twin: list[float] | None = None, **times: list[float]) -> tuple[Any, list[str], int]:
    log: list[str] = []
    runners = {name: Scripted(log, name, values) for name, values in times.items()}
    found = race(runners, "original", Scripted(log, "twin", twin or times["original"]), {8: {}}, rounds)
    return found.timings, log, found.rounds


def test_candidates_take_turns_and_every_other_round_goes_backwards() -> None:
    _, log, rounds = raced(3, original=[1.0], fast=[0.5])
    assert rounds == 3
    assert log == ["original", "fast", "twin", "twin", "fast", "original", "original", "fast", "twin"]


def test_times_of_the_same_round_are_compared() -> None:
    # The machine became five times as slow half way, for all of them.
    timings, _, _ = raced(4, original=[1.0, 1.0, 5.0, 5.0], fast=[0.5, 0.5, 2.5, 2.5])
    assert timings["fast"][8].speedup == pytest.approx(2.0)
    assert timings["fast"][8].spread == pytest.approx(0.02)
    assert timings["fast"][8].faster
    assert timings["original"][8].speedup == 1.0
    assert not timings["original"][8].faster


def test_a_machine_that_cannot_tell_the_original_from_itself_tells_nothing() -> None:
    timings, _, rounds = raced(4, original=[1.0, 1.4, 0.7, 1.2], twin=[1.4, 0.7, 1.2, 0.8], little=[0.9, 1.3, 0.7, 1.1])
    assert rounds == 12
    assert timings["little"][8].spread > 0.1
    assert not timings["little"][8].faster
    assert not timings["little"][8].slower


def test_a_quiet_machine_is_not_kept_longer_than_asked_for() -> None:
    assert raced(4, original=[1.0, 1.01, 0.99, 1.0])[2] == 4


def test_ratios_that_scatter_widely_are_not_sure() -> None:
    timings, _, _ = raced(4, original=[1.0], wild=[0.5, 2.0, 0.6, 1.0])
    assert timings["wild"][8].spread > 0.5
    assert not timings["wild"][8].faster


def test_faster_and_slower_have_to_be_more_than_the_spread() -> None:
    assert Timing(1, 1, 1, 1.06, 0.05).faster
    assert not Timing(1, 1, 1, 1.04, 0.05).faster
    assert Timing(1, 1, 1, 0.9, 0.05).slower
    assert not Timing(1, 1, 1, 0.96, 0.05).slower


def test_outputs_of_all_rows_are_joined() -> None:
    runner = Runner(given(mlp()).proto, 1)
    from inferway.build.optimize.data import Rows

    x = rows(150, 16)
    together = runner.outputs(Rows({"x": x}, None, 150))["logits"]
    np.testing.assert_allclose(together, runner.run({"x": x})[0], atol=1e-5)
    assert together.shape == (150, 4)


def test_the_gateways_trial_is_made_where_layers_are_normalised() -> None:
    ids = np.zeros((2, 4), np.int64)
    assert open_runner(given(transformer()).proto, 1, {"ids": ids}).disabled in ((), ("SkipLayerNormFusion",))
    assert open_runner(given(mlp()).proto, 1, {"x": rows(2, 16)}).disabled == ()


def test_a_run_is_timed_at_least_twice() -> None:
    runs: list[int] = []

    class Counting(Runner):
        def __init__(self) -> None:
            pass

        def run(self, inputs: Mapping[str, Any]) -> list[Any]:
            runs.append(1)
            return []

    assert 0 <= Counting().time({}, window_s=0.0) < 60
    assert len(runs) == 2
