"""The report as text, in a notebook, as JSON, and as a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inferway import MissingExtraError, OutputDifference
from inferway.build.optimize import Candidate
from inferway.build.optimize.report import mark_pareto
from inferway.build.optimize.words import duration_text, size_text
from optimizing import candidate, plain, report

ORIGINAL = candidate("original", size=500_000)
INT8 = candidate(
    "static int8 (minmax)", seconds=4e-4, drop=0.004, metric=0.896, size=140_000,
    differences=(OutputDifference("logits", 0.25, 0.01, 0.02), OutputDifference("label", differing=0.125)),
    notes=("a note",),
)  # fmt: skip
HALF = candidate("fp16 weights", size=250_000, notes=("a note",))
SKIPPED = Candidate("dynamic int8", "dynamic_int8", "skipped", "the model has <convolutions>")
FAILED = Candidate("int4 block weights", "int4_weights", "failed", "no matrix of it could be put into blocks")
REPORT = report(ORIGINAL, INT8, HALF, SKIPPED, FAILED, chosen=1)


def test_the_table_marks_the_chosen_one_and_the_front() -> None:
    lines = REPORT.table().splitlines()
    assert [plain(line) for line in lines] == [
        " size accuracy lost batch 64",
        " original 500 kB 0.9000 1.0 ms",
        "* static int8 (minmax) 140 kB 0.8960 0.0040 400 µs 2.50×",
        "+ fp16 weights 250 kB 0.9000 0.0000 1.0 ms ≈1.00×",
    ]
    assert max(map(len, lines)) <= 120


def test_what_was_not_measured_says_why() -> None:
    text = str(REPORT)
    assert "Failed:\n  int4 block weights: no matrix of it could be put into blocks" in text
    assert "Not tried:\n  dynamic int8: the model has <convolutions>" in text


def test_differences_are_told_for_each_output() -> None:
    text = str(REPORT)
    assert "static int8 (minmax)  logits: at most 0.25, on average 0.01 (2.00%)" in text
    assert "label: other in 12.50% of rows" in text


def test_a_note_of_several_candidates_is_told_once() -> None:
    assert "static int8 (minmax), fp16 weights: a note." in str(REPORT)


def test_no_change_is_said_as_plainly() -> None:
    unchanged = report(ORIGINAL, HALF, reason="nothing was faster")
    assert str(unchanged).startswith("No change: nothing was faster\n")
    assert not unchanged.changed
    assert unchanged.speedup == 1.0
    assert REPORT.changed
    assert REPORT.speedup == pytest.approx(2.5)


def test_errors_are_told_as_an_increase() -> None:
    found = report(
        replace(ORIGINAL, metric=2.0), replace(INT8, metric=2.1, drop=0.05), chosen=1, greater_is_better=False,
        metric_name="mse",
    )  # fmt: skip
    assert "increase" in found.table().splitlines()[0]
    assert "+5.00%" in found.table()


def test_compressed_sizes_are_shown_where_they_are_known() -> None:
    assert "gzip" not in REPORT.table()
    found = report(replace(ORIGINAL, gzip_bytes=400_000), replace(INT8, gzip_bytes=90_000), chosen=1)
    assert "90.0 kB" in found.table()


def test_a_notebook_gets_a_table_with_nothing_unescaped() -> None:
    shown = REPORT._repr_html_()
    assert "<b>Chosen: static int8 (minmax)</b>: because" in shown
    assert shown.count("<tr") == 4
    assert "&lt;convolutions&gt;" in shown
    assert "<convolutions>" not in shown


def test_everything_but_the_models_is_json() -> None:
    found = json.loads(json.dumps(REPORT.as_dict(), allow_nan=False))
    assert found["chosen"] == "static int8 (minmax)"
    assert found["candidates"][1]["latency"]["64"]["speedup"] == pytest.approx(2.5)
    assert found["candidates"][1]["differences"][0] == {
        "output": "logits", "max_abs": 0.25, "mean_abs": 0.01, "relative": 0.02, "differing": None,
    }  # fmt: skip
    assert found["candidates"][3] == {
        "name": "dynamic int8", "technique": "dynamic_int8", "status": "skipped",
        "reason": "the model has <convolutions>",
    }  # fmt: skip


def test_a_candidate_is_found_by_its_name() -> None:
    assert REPORT.candidate("fp16 weights").size_bytes == 250_000
    with pytest.raises(KeyError, match="no candidate 'fp8'; there are original, static int8"):
        REPORT.candidate("fp8")


def test_what_another_beats_in_everything_is_not_on_the_front() -> None:
    worse = candidate("worse", seconds=5e-4, drop=0.01, size=200_000)
    front = mark_pareto([ORIGINAL, INT8, HALF, worse, SKIPPED], 64)
    assert front == {"static int8 (minmax)", "fp16 weights"}


def test_numbers_are_written_as_people_read_them() -> None:
    assert [size_text(n) for n in (12, 1500, 140_000, 90_280_000, 2_500_000_000)] == [
        "12 B", "1.5 kB", "140 kB", "90.3 MB", "2.5 GB",
    ]  # fmt: skip
    assert [duration_text(s) for s in (3.2e-6, 45e-6, 1.5e-3, 0.171, 2.0)] == [
        "3.2 µs", "45 µs", "1.5 ms", "171 ms", "2000 ms",
    ]  # fmt: skip


# -- the picture


def crowded() -> Any:
    near = [candidate(f"candidate number {i}", seconds=4e-4 + i * 1e-6, size=100_000 + i) for i in range(6)]
    lost = candidate("hopeless", seconds=3e-4, metric=0.2, drop=0.7, size=50_000)
    return report(ORIGINAL, INT8, HALF, *near, lost, chosen=1)


def test_no_two_names_cover_each_other_in_the_picture() -> None:
    figure = crowded().plot()
    renderer = figure.canvas.get_renderer()
    names = [text for text in figure.axes[0].texts if "B" in text.get_text() and text.get_text().count(",")]
    assert len(names) == 10
    boxes = [text.get_window_extent(renderer) for text in names]
    for number, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[number + 1 :]), names[number]
    frame = figure.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def test_a_hopeless_candidate_does_not_flatten_the_others() -> None:
    axes = crowded().plot().axes[0]
    low, high = axes.get_ylim()
    assert low > 0.8
    assert high < 1.0
    assert any("accuracy 0.2, beyond the scale" in text.get_text() for text in axes.texts)


def test_areas_are_sizes() -> None:
    axes = REPORT.plot().axes[0]
    areas = sorted({float(found.get_sizes()[0]) for found in axes.collections if len(found.get_offsets()) and
                    found.get_alpha() == 0.35})  # fmt: skip
    assert areas == pytest.approx([1600 * 140 / 500, 800, 1600])


def test_the_picture_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    REPORT.plot(str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_extra_is_named_where_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib, which is not installed: pip install 'inferway\[optimize"):
        REPORT.plot()
