"""What is left of a training: numbers, lines, a figure."""

from __future__ import annotations

import math
import pickle

import pytest

from inferway import History
from inferway.train.history import best_at, number, sparkline

CURVES = {
    "loss": [0.9, 0.5, 0.3, 0.2],
    "accuracy": [0.5, 0.7, 0.8, 0.9],
    "val_loss": [0.8, 0.6, 0.7, 0.75],
    "val_accuracy": [0.6, 0.75, 0.7, 0.7],
}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([2.0, 2.0], "▁▁"),
        ([1.0, math.nan, 0.0], "█ ▁"),
        ([math.nan, math.nan], "  "),
        ([], ""),
    ],
    ids=["rising", "constant", "gap", "nothing", "empty"],
)
def test_a_line_of_bars_follows_the_values(values: list[float], line: str) -> None:
    assert sparkline(values) == line


def test_many_values_are_drawn_in_the_width_that_there_is() -> None:
    line = sparkline(list(range(1000)), width=12)
    assert len(line) == 12
    assert line[0] == "▁"
    assert line[-1] == "█"


def test_the_best_is_the_largest_of_accuracies_and_the_smallest_of_losses() -> None:
    assert best_at("val_accuracy", [0.1, 0.9, 0.3]) == 1
    assert best_at("val_loss", [0.4, 0.1, 0.3]) == 1
    assert best_at("auc", [0.4, math.nan, 0.3]) == 0
    assert best_at("loss", [math.nan, math.nan]) == 1


def test_numbers_have_four_digits_that_matter() -> None:
    assert [number(value) for value in (0.5, 0.0, 1e-5, 123456.0)] == ["0.5000", "0.0000", "1e-05", "1.23e+05"]


def test_a_history_says_what_happened() -> None:
    history = History(CURVES, epochs=4, steps=40, elapsed_s=1.25, stopped="early", best_epoch=2, resumed_from=1)
    lines = str(history).splitlines()
    assert lines[0] == "4 epochs, 40 steps, 1.2 s, resumed after epoch 1, stopped early; the best is epoch 2"
    assert lines[1].split() == ["loss", "0.9000", "█▄▂▁", "0.2000", "best", "0.2000", "in", "epoch", "4"]
    assert "best 0.7500 in epoch 2" in lines[4]
    assert history.epoch == [0, 1, 2, 3]
    assert str(History({"accuracy": [0.9]}, epochs=1)) == "1 epoch, 0.0 s\n  accuracy    0.9000"
    assert str(History(strategy="ddp", epochs=2)) == "2 epochs, 0.0 s, ddp"


def test_last_is_of_the_weights_that_the_model_has() -> None:
    assert History(CURVES, epochs=4).last == {name: values[-1] for name, values in CURVES.items()}
    assert History(CURVES, epochs=4, best_epoch=2).last["val_loss"] == 0.6


def test_a_history_is_a_table_too() -> None:
    frame = History(CURVES, epochs=4).frame()
    assert list(frame.columns) == list(CURVES)
    assert list(frame.index) == [1, 2, 3, 4]
    assert frame.loc[3, "val_loss"] == 0.7


def test_the_figure_has_training_and_validation_in_one_part_for_each_metric() -> None:
    figure = History(CURVES, epochs=4, best_epoch=2).plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "accuracy"]
    first = figure.axes[0]
    assert [line.get_label() for line in first.lines] == ["training", "validation", "best: epoch 2"]
    assert list(first.lines[1].get_ydata()) == CURVES["val_loss"]
    assert list(first.lines[0].get_xdata()) == [1, 2, 3, 4]
    only = History(CURVES, epochs=4).plot(["accuracy"])
    assert len(only.axes) == 1


def test_a_notebook_gets_the_figure_as_a_drawing() -> None:
    html = History(CURVES, epochs=4)._repr_html_()
    assert "4 epochs" in html
    assert "<svg" in html
    assert "<?xml" not in html


def test_a_history_survives_pickling() -> None:
    history = History(CURVES, epochs=4, best_epoch=2)
    assert pickle.loads(pickle.dumps(history)) == history
