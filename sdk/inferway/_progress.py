"""How a deployment goes on: events for programs, a bar for people.

The bar is tqdm's where that is installed (``pip install 'inferway[progress]'``), because everybody knows it and it is
at home in notebooks too; without it a plain line says the same. Neither is shown where nobody looks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Literal, TypeAlias

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_REDRAW_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class DeployEvent:
    """Something happened on the way of a model to the gateway.

    Attributes:
        kind: ``packed``: it is settled what goes along, ``total_bytes`` of it, and ``left_out`` stays behind;
            ``hashing``, ``uploading``: ``done_bytes`` of a file's ``total_bytes`` are; ``skipped``: the gateway has
            the file already; ``retrying``: an upload was cut and goes on from ``done_bytes``, ``message`` says why;
            ``created``: the gateway has everything and began; ``step``: it has done ``step``; ``ended``: it is over,
            ``message`` is the deployment's state.
        file: path within the package.
        files: paths of everything that goes along, with ``packed``.
        deployment_id: from ``created`` on.
    """

    kind: Literal["packed", "hashing", "uploading", "skipped", "retrying", "created", "step", "ended"]
    file: str | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    step: str | None = None
    deployment_id: str | None = None
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    message: str = ""


Progress: TypeAlias = "Callable[[DeployEvent], object] | bool | None"
"""A function that is told each `DeployEvent`; True shows a bar, False nothing; None shows one to whoever looks: on a
terminal and in a notebook."""


def reporter(progress: Progress) -> Callable[[DeployEvent], object]:
    """What events are given to."""
    if callable(progress):
        return progress
    notebook = in_notebook()
    if progress is False or (progress is None and not notebook and not looked_at()):
        return _silent
    return _Bar(notebook)


def _silent(_: DeployEvent) -> None:
    return None


def looked_at() -> bool:
    # A program without a console has no stderr at all.
    return bool(sys.stderr) and sys.stderr.isatty()


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this; it has imported IPython then."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


def size_text(count: float) -> str:
    """A number of bytes for people."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def _line(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


class _Bar:
    """One bar for each of hashing and uploading over all files, then a line for each step."""

    def __init__(self, notebook: bool) -> None:
        self._notebook = notebook
        self._bar: Any = None
        self._of = ""
        self._total = 0
        self._done: dict[str, int] = {}

    def __call__(self, event: DeployEvent) -> None:
        if event.kind == "packed":
            self._total = event.total_bytes
            if event.left_out:
                _line(f"left out: {', '.join(event.left_out)}")
        elif event.kind in ("hashing", "uploading"):
            self._move(event.kind, event.file or "", event.done_bytes)
        elif event.kind == "skipped":
            self._move("uploading", event.file or "", event.total_bytes)
        elif event.kind == "retrying":
            self._close()
            _line(f"{event.file}: {event.message}; goes on from {size_text(event.done_bytes)}")
        elif event.kind == "created":
            self._close()
            _line(f"deployment {event.deployment_id}")
        elif event.kind == "step":
            _line(f"  {event.step}")
        else:
            self._close()
            _line(f"  {event.message}")

    def _move(self, of: str, file: str, done: int) -> None:
        if of != self._of:
            self._close()
            self._of = of
            self._done = {}
        if self._bar is None:
            self._bar = _tqdm(of, self._total, self._notebook) or _PlainBar(of, self._total)
        before = sum(self._done.values())
        self._done[file] = done
        now = sum(self._done.values())
        # An upload that begins again in the middle goes back, which a bar does not.
        self._bar.update(max(0, now - before))
        if now >= self._total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def counter(
    progress: Callable[[int, int], object] | bool | None, of: str
) -> tuple[Callable[[int, int], object], Callable[[], object]]:
    """What is told how much of how much is done, and what ends it. `progress` as `Progress`, with two numbers."""
    if callable(progress):
        return progress, lambda: None
    notebook = in_notebook()
    if progress is False or (progress is None and not notebook and not looked_at()):
        return lambda done, total: None, lambda: None
    bars: list[Any] = []

    def tell(done: int, total: int) -> None:
        if not bars:
            bars.append([_tqdm(of, total, notebook, "") or _PlainBar(of, total, ""), 0])
        bar, before = bars[0]
        bar.update(done - before)
        bars[0][1] = done

    return tell, lambda: bars[0][0].close() if bars else None


def _tqdm(of: str, total: int, notebook: bool, unit: str = "B") -> Any:
    """A bar of tqdm's; None where it is not installed. Without ipywidgets its notebook bar is none."""
    if find_spec("tqdm") is None:
        return None
    module = "tqdm.notebook" if notebook and find_spec("ipywidgets") is not None else "tqdm.std"
    bar: Any = import_module(module).tqdm
    return bar(
        desc=of,
        total=total,
        unit=unit,
        unit_scale=True,
        unit_divisor=1024 if unit else 1000,
        delay=_REDRAW_S,
        leave=False,
    )


class _PlainBar:
    """The same in a line that is written over."""

    def __init__(self, of: str, total: int, unit: str = "B") -> None:
        self._of = of
        self._total = total
        self._unit = unit
        self._done = 0
        self._drawn = time.monotonic()
        self._width = 0

    def update(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._drawn >= _REDRAW_S:
            self._drawn = now
            percent = 100 * self._done // max(1, self._total)
            total = size_text(self._total) if self._unit else f"{self._total:,}"
            self._draw(f"{self._of} {percent} % of {total}")

    def close(self) -> None:
        if self._width:
            self._draw("")

    def _draw(self, words: str) -> None:
        print(f"\r{words.ljust(self._width)}", end="\r" if not words else "", file=sys.stderr, flush=True)
        self._width = max(self._width, len(words))
