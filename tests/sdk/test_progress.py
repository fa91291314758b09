"""What people see of a deployment."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import pytest

from inferway import DeployEvent, _progress
from inferway._progress import reporter, size_text

MIB = 1024 * 1024


class Terminal(io.StringIO):
    def __init__(self, looked_at: bool) -> None:
        super().__init__()
        self.looked_at = looked_at

    def isatty(self) -> bool:
        return self.looked_at


def story() -> list[DeployEvent]:
    events = [DeployEvent("packed", total_bytes=4 * MIB, files=("model.onnx", "w.bin"), left_out=(".git",))]
    for kind in ("hashing", "uploading"):
        events += [DeployEvent(kind, "w.bin", done * MIB, 3 * MIB) for done in (1, 2)]
        if kind == "uploading":
            events.append(DeployEvent("retrying", "w.bin", MIB, 3 * MIB, message="the connection broke"))
        events.append(DeployEvent(kind, "w.bin", 3 * MIB, 3 * MIB))
    events.append(DeployEvent("skipped", "model.onnx", MIB, MIB))
    events.append(DeployEvent("created", deployment_id="d1"))
    events.append(DeployEvent("step", step="loaded", deployment_id="d1"))
    events.append(DeployEvent("ended", deployment_id="d1", message="succeeded"))
    return events


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without tqdm on which every change is drawn."""
    monkeypatch.setattr(_progress, "find_spec", lambda _: None)
    monkeypatch.setattr(_progress, "_REDRAW_S", 0.0)


@pytest.mark.parametrize(
    ("progress", "looked_at", "shown"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
@pytest.mark.usefixtures("plain")
def test_it_is_shown_to_whoever_looks(
    monkeypatch: pytest.MonkeyPatch, progress: bool | None, looked_at: bool, shown: bool
) -> None:
    terminal = Terminal(looked_at)
    monkeypatch.setattr(sys, "stderr", terminal)
    report = reporter(progress)
    for event in story():
        report(event)
    assert bool(terminal.getvalue()) is shown


def test_a_program_without_a_console_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    reporter(None)(DeployEvent("step", step="loaded"))


def test_a_function_is_told_instead() -> None:
    events: list[DeployEvent] = []
    assert reporter(events.append) == events.append


@pytest.mark.usefixtures("plain")
def test_without_tqdm_a_line_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    report = reporter(None)
    for event in story():
        report(event)
    text = terminal.getvalue()
    assert text.startswith("left out: .git\n")
    for words in ("\rhashing 25 % of 4.0 MiB", "\ruploading 50 % of 4.0 MiB"):
        assert words in text
    assert "w.bin: the connection broke; goes on from 1.0 MiB\n" in text
    assert text.endswith("deployment d1\n  loaded\n  succeeded\n")


class Bar:
    made: list[Bar] = []  # noqa: RUF012 - looked at by the test

    def __init__(self, desc: str, total: int, **_: Any) -> None:
        self.desc = desc
        self.total = total
        self.done = 0
        self.closed = False
        Bar.made.append(self)

    def update(self, count: int) -> None:
        self.done += count

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("notebook", [False, True])
def test_with_tqdm_its_bar_is_shown_also_in_notebooks(monkeypatch: pytest.MonkeyPatch, notebook: bool) -> None:
    imported: list[str] = []

    def module(name: str) -> types.SimpleNamespace:
        imported.append(name)
        return types.SimpleNamespace(tqdm=Bar)

    monkeypatch.setattr(_progress, "find_spec", lambda name: name)
    monkeypatch.setattr(_progress, "import_module", module)
    terminal = Terminal(not notebook)
    monkeypatch.setattr(sys, "stderr", terminal)
    if notebook:
        shell = type("ZMQInteractiveShell", (), {})()
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    Bar.made.clear()
    report = reporter(None)
    for event in story():
        report(event)
    assert set(imported) == {"tqdm.notebook" if notebook else "tqdm.std"}
    assert all(bar.closed and bar.total == 4 * MIB for bar in Bar.made)
    assert Bar.made[0].desc == "hashing"
    assert Bar.made[0].done == 3 * MIB
    assert {bar.desc for bar in Bar.made[1:]} == {"uploading"}


def test_tqdm_itself_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = Terminal(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(_progress, "_REDRAW_S", 0.0)
    report = reporter(None)
    for event in story():
        report(event)
    assert "hashing" in terminal.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 1024**3, "3.0 GiB"), (1024**5, "1024.0 TiB")],
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert size_text(count) == text
