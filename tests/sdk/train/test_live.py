"""What is seen of a training while it runs."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from inferway.train import live
from inferway.train.job import Progress
from inferway.train.live import Display


def course(display: Display) -> None:
    """Two epochs of two steps."""
    for epoch in (1, 2):
        for step in (1, 2):
            last = step == 2
            metrics = {"loss": 1.0 / epoch, "val_accuracy": 0.4 * epoch} if last else {}
            display(Progress(epoch, 2, step, 2, 1.0 / epoch, metrics, elapsed_s=0.1))
    display.close()


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    for shows in (None, False):
        display = Display(shows)
        course(display)
        assert not display.shown
    assert capsys.readouterr() == ("", "")


def test_a_bar_shows_where_the_training_is_and_how_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    course(Display(True))
    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown
    assert "4/4" in shown
    assert "loss 0.5000 █▁  val_accuracy 0.8000" in shown


def test_without_tqdm_a_line_says_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "find_spec", lambda name: None)
    course(Display(True))
    shown = capsys.readouterr().err
    assert shown.endswith("\n")
    assert "epoch 2/2  step 4/4  loss 0.5000 █▁  val_accuracy 0.8000" in shown


def test_a_function_is_told_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[Progress] = []
    course(Display(told.append))
    assert [(progress.epoch, progress.step) for progress in told] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert capsys.readouterr() == ("", "")


def test_a_notebook_draws_the_curves_anew_after_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    class Handle:
        def update(self, shown: Any) -> None:
            drawn.append(shown._repr_html_())

    def display(shown: Any, *, display_id: bool) -> Handle:
        drawn.append(shown._repr_html_())
        return Handle()

    module = types.ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]  # a module of a test
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr(live, "find_spec", lambda name: None)
    course(Display(None))
    assert len(drawn) == 2
    assert all("<svg" in html for html in drawn)
    assert "1 epoch," in drawn[0]
    assert "2 epochs," in drawn[1]
