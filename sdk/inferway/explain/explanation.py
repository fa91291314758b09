"""What came out of explaining predictions: numbers, and pictures of them."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, MissingExtraError
from .players import Kind, Patches, Players

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Plot: TypeAlias = Literal["waterfall", "bar", "image", "text"]

_SHOWN: Final = 12
_RAISES, _LOWERS = "#d1495b", "#2e6f9e"
"""Of what raises and what lowers a prediction: apart for people who see no red or no green too."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What predictions rest on: for each part of each input, how much knowing it adds to the prediction.

    Attributes:
        values: FP64, ``(rows, parts)``, or ``(rows, parts, outputs)`` where the output has several, such as classes.
        base_values: the mean prediction over the background, ``(rows,)`` or ``(rows, outputs)``.
        predictions: of the inputs themselves, in the same shape. ``base_values`` and ``values`` add up to them.
        feature_names: of the parts.
        data: the parts' own values, ``(rows, parts)``.
        standard_error: of each value over the orders that were drawn, in the shape of ``values``. Exactly zero where
            a part's worth does not depend on the others.
        additivity_error: the largest difference between a prediction and what its base value and values add up to.
        kind: what the parts are: columns of a table, patches of an image, words of a text.
        model, output: what was asked; ``output_names`` name the outputs where they were given.
        permutations: orders drawn for each input.
        rows_sent: with how many rows the model was asked.
    """

    values: NDArray[np.float64]
    base_values: NDArray[np.float64]
    predictions: NDArray[np.float64]
    feature_names: tuple[str, ...]
    data: NDArray[Any]
    standard_error: NDArray[np.float64]
    additivity_error: float
    kind: Kind
    model: str
    output: str
    output_names: tuple[str, ...] | None
    permutations: int
    rows_sent: int
    players: Players = field(repr=False)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return (
            f"Explanation(model={self.model!r}, kind={self.kind!r}, values{list(self.values.shape)}, "
            f"rows_sent={self.rows_sent}, additivity_error={self.additivity_error:.1e})"
        )

    def __str__(self) -> str:
        lines: list[str] = []
        for row in range(min(len(self), 3)):
            at = self._output_of(row, None)
            lines += [self._title(row, at), *(f"  {line}" for line in self._lines(row, at)), ""]
        if len(self) > 3:
            lines += [f"and {len(self) - 3} more", ""]
        return "\n".join([*lines, self._footer()])

    def _repr_html_(self) -> str:
        row, at = 0, self._output_of(0, None)
        values = self._row(row, at)
        limit = float(np.abs(values).max()) or 1.0
        cells: list[str] = []
        for part in _largest(values)[:_SHOWN]:
            width = abs(values[part]) / limit * 10
            colour = _RAISES if values[part] > 0 else _LOWERS
            shown = html.escape(self._shown(row, int(part)))
            cells.append(
                f"<tr><td style='text-align:left'>{html.escape(self.feature_names[part])}</td><td>{shown}</td>"
                f"<td>{values[part]:+.4g}</td><td style='text-align:left'>"
                f"<div style='height:.8em;width:{width:.2f}em;background:{colour}'></div></td></tr>"
            )
        return (
            f"<p>{html.escape(self._title(row, at))}</p><table><thead><tr><th>part</th><th>value</th><th>adds</th>"
            f"<th></th></tr></thead><tbody>{''.join(cells)}</tbody></table><p>{html.escape(self._footer())}</p>"
        )

    def to_frame(self, *, output: int | str | None = None) -> Any:
        """A pandas data frame: a row for each input, a column for each part.

        Args:
            output: which of several outputs; each row's highest where it is left out.
        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("pandas", "explain", "a data frame of an explanation") from error
        rows = [self._row(row, self._output_of(row, output)) for row in range(len(self))]
        return pandas.DataFrame(np.stack(rows), columns=list(self.feature_names))

    def plot(self, kind: Plot | None = None, *, row: int = 0, output: int | str | None = None, top: int = 12) -> Figure:
        """Draw one input's explanation.

        Args:
            kind: ``waterfall``: from the base value to the prediction, part by part; ``bar``: the mean size of each
                part's value over all inputs; ``image``: the patches' values over the image; ``text``: the words in
                their colours. What fits the input where it is left out.
            row: which input.
            output: which of several outputs, by place or by name; the highest where it is left out.
            top: parts that are named; the others are summed.
        Returns:
            A figure; a notebook shows it, ``figure.savefig(path)`` keeps it.
        Raises:
            ConfigurationError: there is no such kind, row or output, or the kind does not fit the input.
            MissingExtraError: matplotlib is not installed.
        """
        natural: dict[Kind, Plot] = {"table": "waterfall", "image": "image", "text": "text"}
        wanted = natural[self.kind] if kind is None else kind
        if wanted not in ("waterfall", "bar", "image", "text"):
            raise ConfigurationError(f"kind expects waterfall, bar, image or text, got {kind!r}")
        if wanted in ("image", "text") and wanted != self.kind:
            raise ConfigurationError(f"a plot of kind {wanted!r} needs an explanation of that kind, got {self.kind!r}")
        if not -len(self) <= row < len(self):
            raise ConfigurationError(f"row expects a number below {len(self)}, got {row}")
        row %= len(self)
        at = self._output_of(row, output)
        figure: Figure
        figure, axes = _figure()
        if wanted == "waterfall":
            self._waterfall(axes, row, at, top)
        elif wanted == "bar":
            self._bar(axes, output, top)
        elif wanted == "image":
            self._image(figure, axes, row, at)
        else:
            self._text(figure, axes, row, at)
        if wanted != "bar":
            axes.set_title(self._title(row, at), fontsize=10, loc="left", parse_math=False)
        return figure

    # --- what the pictures and tables share -----------------------------------------------------------------------

    def _output_of(self, row: int, output: int | str | None) -> int | None:
        if self.values.ndim == 2:
            if output not in (None, 0):
                raise ConfigurationError(f"output expects nothing, because there is one, got {output!r}")
            return None
        count = self.values.shape[2]
        if output is None:
            return int(self.predictions[row].argmax())
        if isinstance(output, str):
            if self.output_names is None or output not in self.output_names:
                raise ConfigurationError(f"output expects one of {self.output_names}, got {output!r}")
            return self.output_names.index(output)
        if not 0 <= output < count:
            raise ConfigurationError(f"output expects a number below {count}, got {output}")
        return output

    def _row(self, row: int, at: int | None) -> NDArray[np.float64]:
        return self.values[row] if at is None else self.values[row, :, at]

    def _numbers(self, row: int, at: int | None) -> tuple[float, float]:
        if at is None:
            return float(self.base_values[row]), float(self.predictions[row])
        return float(self.base_values[row, at]), float(self.predictions[row, at])

    def _title(self, row: int, at: int | None) -> str:
        base, prediction = self._numbers(row, at)
        name = self.output
        if at is not None:
            name += f"[{at}]" if self.output_names is None else f" {self.output_names[at]}"
        of = f", input {row}" if len(self) > 1 else ""
        return f"{self.model}{of}: {name} = {prediction:.4g}, usually {base:.4g}"

    def _footer(self) -> str:
        return (
            f"{self.rows_sent:,} rows asked, {self.permutations} orders; base and values add up to the prediction "
            f"within {self.additivity_error:.1g}"
        )

    def _shown(self, row: int, part: int) -> str:
        if self.kind != "table":
            return ""
        value = self.data[row, part]
        return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)

    def _lines(self, row: int, at: int | None) -> list[str]:
        values, errors = self._row(row, at), self.standard_error[row]
        errors = errors if at is None else errors[:, at]
        order = _largest(values)[:_SHOWN]
        if not len(order):
            return ["no part changes it"]
        labels = [self._label(row, int(part)) for part in order]
        width = max(len(label) for label in labels)
        lines = [
            f"{label:{width}}  {values[part]:+.4g}" + (f" ± {errors[part]:.1g}" if errors[part] else "")
            for label, part in zip(labels, order, strict=True)
        ]
        others = _largest(values)[_SHOWN:]
        if len(others):
            lines.append(f"{_others(len(others)):{width}}  {values[others].sum():+.4g}")
        return lines

    def _label(self, row: int, part: int) -> str:
        shown = self._shown(row, part)
        return f"{self.feature_names[part]} = {shown}" if shown else self.feature_names[part]

    # --- pictures -------------------------------------------------------------------------------------------------

    def _waterfall(self, axes: Any, row: int, at: int | None, top: int) -> None:
        values = self._row(row, at)
        base, prediction = self._numbers(row, at)
        order = _largest(values)
        named, rest = order[:top], order[top:]
        bars = [(self._label(row, int(part)), float(values[part])) for part in reversed(named)]
        if len(rest):
            bars.insert(0, (_others(len(rest)), float(values[rest].sum())))
        axes.figure.set_size_inches(7.5, 1.4 + 0.34 * len(bars))
        level = base
        levels = [base]
        for place, (_, value) in enumerate(bars):
            axes.barh(place, value, left=level, color=_RAISES if value > 0 else _LOWERS, height=0.7)
            axes.plot([level + value] * 2, [place - 0.35, min(place + 1.35, len(bars) - 0.5)], color="#888888", lw=0.8)
            level += value
            levels.append(level)
        span = max(levels) - min(levels) or abs(prediction) or 1.0
        for place, (_, value) in enumerate(bars):
            right = max(levels[place], levels[place + 1])
            axes.text(right + span * 0.015, place, f"{value:+.3g}", va="center", fontsize=8)
        axes.set_xlim(min(levels) - span * 0.05, max(levels) + span * 0.17)
        axes.set_yticks(range(len(bars)), [_short(name) for name, _ in bars], fontsize=8, parse_math=False)
        axes.axvline(base, color="#888888", lw=0.8, ls=":")
        axes.axvline(prediction, color="#333333", lw=0.8, ls=":")
        axes.set_xlabel(f"{self.output}: from the usual {base:.4g} to {prediction:.4g}")
        _plain(axes)

    def _bar(self, axes: Any, output: int | str | None, top: int) -> None:
        rows = np.stack([self._row(row, self._output_of(row, output)) for row in range(len(self))])
        mean = np.abs(rows).mean(axis=0)
        order = np.argsort(-mean)[:top][::-1]
        axes.figure.set_size_inches(7.5, 1.4 + 0.34 * len(order))
        axes.barh(range(len(order)), mean[order], color=_LOWERS, height=0.7)
        axes.set_yticks(
            range(len(order)), [_short(self.feature_names[part]) for part in order], fontsize=8, parse_math=False
        )
        inputs = "1 input" if len(self) == 1 else f"{len(self)} inputs"
        axes.set_xlabel(f"mean size of what each adds to {self.output}, over {inputs}")
        axes.set_title(self.model, fontsize=10, loc="left", parse_math=False)
        _plain(axes)

    def _image(self, figure: Any, axes: Any, row: int, at: int | None) -> None:
        assert isinstance(self.players, Patches)
        values = self._row(row, at)[self.players.segments]
        image = np.asarray(self.players.x[row], np.float64)
        if image.ndim == 3:
            channel = 0 if image.shape[0] <= image.shape[-1] else 2
            image = image.mean(axis=channel)
            values = values.mean(axis=channel)
        elif image.ndim == 1:
            image, values = image[np.newaxis], values[np.newaxis]
        elif image.ndim > 3:
            raise ConfigurationError(f"a picture expects 1 to 3 axes, got {image.ndim}; values[row] has the numbers")
        figure.set_size_inches(6, 5)
        limit = float(np.abs(values).max()) or 1.0
        axes.imshow(image, cmap="gray", interpolation="nearest")
        # Grey where a patch says little: opacity grows with the size of its value.
        alpha = np.abs(values) / limit * 0.75
        axes.imshow(values, cmap=_two_colours(), vmin=-limit, vmax=limit, alpha=alpha, interpolation="nearest")
        bar = figure.colorbar(_scale(limit), ax=axes, shrink=0.85)
        bar.set_label(f"adds to {self.output}")
        axes.set_xticks([])
        axes.set_yticks([])

    def _text(self, figure: Any, axes: Any, row: int, at: int | None) -> None:
        """Words in lines, as a page has them; how wide each is drawn has to be asked first."""
        from matplotlib.colors import to_rgb

        values = self._row(row, at)
        limit = float(np.abs(values).max()) or 1.0
        figure.set_layout_engine("none")
        renderer = figure.canvas.get_renderer()
        space, width = 7.0, figure.get_figwidth() * figure.dpi * 0.96
        left, line = 0.0, 0
        placed: list[tuple[Any, float, int]] = []
        for word, value in zip(self.feature_names, values, strict=True):
            strength = abs(value) / limit
            colour = tuple(1 - (1 - part) * strength for part in to_rgb(_RAISES if value > 0 else _LOWERS))
            text = axes.text(
                0, 0, _short(word), va="center", fontsize=11, color="white" if strength > 0.6 else "black",
                transform=axes.transAxes, parse_math=False,
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 2.0},
            )  # fmt: skip
            size = text.get_window_extent(renderer).width
            if left + size > width and left:
                left, line = 0.0, line + 1
            placed.append((text, left, line))
            left += size + space
        lines = 0.3 * (line + 1)
        height = lines + 1.1
        figure.set_size_inches(figure.get_figwidth(), height)
        axes.set_position((0.02, 0.75 / height, 0.96, lines / height))
        for text, begin, of in placed:
            text.set_position((begin / width, 1 - (of + 0.5) / (line + 1)))
        bar = figure.colorbar(
            _scale(limit), cax=figure.add_axes((0.25, 0.5 / height, 0.5, 0.12 / height)), orientation="horizontal"
        )
        bar.set_label(f"adds to {self.output}", fontsize=8)
        bar.ax.tick_params(labelsize=8)
        axes.axis("off")


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "explain", "a plot") from error
    # Not pyplot's: that keeps figures, and picks a window for them.
    figure = Figure(figsize=(7.5, 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _two_colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("worth", [_LOWERS, "#f4f4f4", _RAISES])


def _scale(limit: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(-limit, limit), _two_colours())


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)


def _largest(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Parts by the size of their values, the largest first, without those that add nothing."""
    order = np.argsort(-np.abs(values), kind="stable")
    return order[np.abs(values[order]) > 1e-9 * (np.abs(values).max() if len(values) else 0.0)]


def _others(count: int) -> str:
    return "1 other" if count == 1 else f"{count} others"


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
