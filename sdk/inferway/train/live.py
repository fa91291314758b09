"""What is seen while a model trains: a bar with its curve on a terminal; a bar and plotted curves in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, TypeAlias

from .._progress import in_notebook, looked_at
from .history import History, number, sparkline
from .job import Progress

_REDRAW_S: Final = 0.2
_SHOWN: Final = 3
"""Metrics beside the bar; all of them are in the table at the end."""

Shows: TypeAlias = "Callable[[Progress], object] | bool | None"
"""A function that is told each `Progress`; True shows a bar, False nothing; None shows one to whoever looks: on a
terminal and in a notebook."""


class Display:
    """Shows a training. Given each `Progress`, it keeps the metrics of the epochs that are over."""

    def __init__(self, shows: Shows, before: dict[str, list[float]] | None = None) -> None:
        notebook = in_notebook()
        self._tell = shows if callable(shows) else None
        self._shown = not callable(shows) and (shows is True or (shows is None and (notebook or looked_at())))
        self._bar: Any = None
        self._plot = _Plot() if self._shown and notebook else None
        self._notebook = notebook
        self._curves: dict[str, list[float]] = {name: list(values) for name, values in (before or {}).items()}
        self._drawn = 0.0

    @property
    def shown(self) -> bool:
        """Whether somebody sees it."""
        return self._shown

    def __call__(self, progress: Progress) -> None:
        if self._tell is not None:
            self._tell(progress)
        if not self._shown:
            return
        for name, value in progress.metrics.items():
            self._curves.setdefault(name, []).append(value)
        total = progress.epochs * progress.steps_per_epoch
        done = (progress.epoch - 1) * progress.steps_per_epoch + progress.step
        if self._bar is None:
            self._bar = _bar(total, done - 1, self._notebook)
        now = time.monotonic()
        self._bar.update(max(0, done - self._bar.n))
        if progress.metrics or now - self._drawn >= _REDRAW_S:
            self._drawn = now
            self._bar.set_description(f"epoch {progress.epoch}/{progress.epochs}", refresh=False)
            self._bar.set_postfix_str(self._words(progress.loss))
        if progress.metrics and self._plot is not None:
            self._plot.draw(self._curves)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _words(self, loss: float) -> str:
        # In the order in which it may be cut off at the end of a line.
        curve = self._curves.get("val_loss") or self._curves.get("loss") or []
        last = {name: values[-1] for name, values in self._curves.items() if name != "loss" and values}
        first = sorted(last, key=lambda name: not name.startswith("val_"))
        shown = [f"{name} {number(last[name])}" for name in first[:_SHOWN]]
        return "  ".join([f"loss {number(loss)} {sparkline(curve, 12)}".rstrip(), *shown])


class _Plot:
    """One figure in a notebook's cell, drawn anew after each epoch."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._began = time.monotonic()

    def draw(self, curves: dict[str, list[float]]) -> None:
        display: Any = import_module("IPython.display")
        so_far = History(curves, epochs=max(map(len, curves.values())), elapsed_s=time.monotonic() - self._began)
        if self._handle is None:
            self._handle = display.display(so_far, display_id=True)
        else:
            self._handle.update(so_far)


def _bar(total: int, done: int, notebook: bool) -> Any:
    if find_spec("tqdm") is None:
        return _Line(total, done)
    module = "tqdm.notebook" if notebook and find_spec("ipywidgets") is not None else "tqdm.std"
    made: Any = import_module(module).tqdm
    return made(
        total=total, initial=done, unit="step", dynamic_ncols=True, leave=True, mininterval=_REDRAW_S,
        bar_format="{desc}|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
    )  # fmt: skip


class _Line:
    """The same without tqdm: a line that is written over."""

    def __init__(self, total: int, done: int) -> None:
        self.n = done
        self._total = total
        self._words = ""

    def update(self, count: int) -> None:
        self.n += count

    def set_description(self, words: str, *, refresh: bool) -> None:
        self._words = words

    def set_postfix_str(self, words: str) -> None:
        print(f"\r\033[K{self._words}  step {self.n}/{self._total}  {words}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        print(file=sys.stderr, flush=True)
