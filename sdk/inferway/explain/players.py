"""What can be taken away from an input: its columns, patches of its image, words of its text.

Shapley values ask what a model gives where only some of an input is known. What is known and what is not is said by a
row of numbers, one for each part; `Players.inputs` turns many such rows into inputs of the model. Columns carry their
own values, or their place in a table of values where these are no numbers, and rows of the background stand in for
what is not known; parts of images and texts are there (1) or not (0), and a neutral colour or a mark stands in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, InvalidInputError
from .._signature import ModelMetadata

Codes: TypeAlias = NDArray[np.float64]
Kind: TypeAlias = Literal["table", "image", "text"]

MASK: Final = "…"
"""Stands for words that are taken away: something has to stand where nothing is left."""
_WORDS: Final = re.compile(r"\S+")
_EXACT_INTEGER: Final = 2**53
_PATCHES: Final = 8


class Players(Protocol):
    """The parts of some inputs that are explained together."""

    @property
    def kind(self) -> Kind: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def background(self) -> Codes:
        """``(b, parts)``: what stands in for parts that are not known."""
        ...

    @property
    def rows(self) -> Codes:
        """``(rows, parts)``: the inputs that are explained."""
        ...

    def inputs(self, codes: Codes, row: int) -> Any:
        """Inputs of the model, ``len(codes)`` of them, for rows of codes that belong to input ``row``."""
        ...

    def shown(self) -> NDArray[Any]:
        """``(rows, parts)``: the parts' values for people."""
        ...


@dataclass(frozen=True)
class Numbers:
    """Columns of one array, ``(rows, columns)``, of a model with one input."""

    x: NDArray[Any]
    base: NDArray[Any]
    names: Sequence[str]
    kind: Kind = "table"

    @property
    def background(self) -> Codes:
        return self.base.astype(np.float64)

    @property
    def rows(self) -> Codes:
        return self.x.astype(np.float64)

    def inputs(self, codes: Codes, row: int) -> Any:
        return codes.astype(self.x.dtype)

    def shown(self) -> NDArray[Any]:
        return self.x


@dataclass(frozen=True)
class Columns:
    """Columns by name, each an array of ``(rows,)`` of any type, of a model with an input for each."""

    x: Mapping[str, NDArray[Any]]
    base: Mapping[str, NDArray[Any]]
    shapes: Mapping[str, tuple[int, ...]]
    kind: Kind = "table"
    tables: Mapping[str, NDArray[Any]] = field(init=False)
    rows: Codes = field(init=False)
    background: Codes = field(init=False)

    def __post_init__(self) -> None:
        tables: dict[str, NDArray[Any]] = {}
        known: list[Codes] = []
        unknown: list[Codes] = []
        for name, column in self.x.items():
            places: dict[Any, int] = {}
            for value in (*self.base[name].tolist(), *column.tolist()):
                places.setdefault(_same(value), len(places))
            table = np.empty(len(places), column.dtype if column.dtype == self.base[name].dtype else object)
            for value in (*self.base[name].tolist(), *column.tolist()):
                table[places[_same(value)]] = value
            tables[name] = table
            known.append(np.array([places[_same(value)] for value in column.tolist()], np.float64))
            unknown.append(np.array([places[_same(value)] for value in self.base[name].tolist()], np.float64))
        object.__setattr__(self, "tables", tables)
        object.__setattr__(self, "rows", np.stack(known, axis=1))
        object.__setattr__(self, "background", np.stack(unknown, axis=1))

    @property
    def names(self) -> Sequence[str]:
        return list(self.x)

    def inputs(self, codes: Codes, row: int) -> Any:
        return {
            name: table[codes[:, at].astype(np.intp)].reshape(len(codes), *self.shapes[name])
            for at, (name, table) in enumerate(self.tables.items())
        }

    def shown(self) -> NDArray[Any]:
        return np.stack([column.astype(object) for column in self.x.values()], axis=1)


def _same(value: Any) -> Any:
    """A key under which equal values meet, and NaN meets NaN."""
    return (type(value), None if value != value else value)


@dataclass(frozen=True)
class Patches:
    """Pieces of images, ``(rows, …)`` in any layout of axes; ``segments`` gives each element's piece, from 0."""

    x: NDArray[Any]
    fill: NDArray[Any]
    segments: NDArray[np.intp]
    kind: Kind = "image"

    @property
    def names(self) -> Sequence[str]:
        return [f"patch {at}" for at in range(int(self.segments.max()) + 1)]

    @property
    def background(self) -> Codes:
        return np.zeros((1, len(self.names)))

    @property
    def rows(self) -> Codes:
        return np.ones((len(self.x), len(self.names)))

    def inputs(self, codes: Codes, row: int) -> Any:
        there = codes.astype(bool)[:, self.segments]
        return np.where(there, self.x[row], self.fill[row])

    def shown(self) -> NDArray[Any]:
        return self.rows


@dataclass(frozen=True)
class Words:
    """Words of one text, by what stands between spaces."""

    text: str
    mask: str = MASK
    kind: Kind = "text"

    @property
    def names(self) -> Sequence[str]:
        return _WORDS.findall(self.text)

    @property
    def background(self) -> Codes:
        return np.zeros((1, len(self.names)))

    @property
    def rows(self) -> Codes:
        return np.ones((1, len(self.names)))

    def inputs(self, codes: Codes, row: int) -> Any:
        spans = [match.span() for match in _WORDS.finditer(self.text)]
        texts: list[str] = []
        for there in codes.astype(bool):
            parts: list[str] = []
            end = 0
            for (begin, until), kept in zip(spans, there, strict=True):
                parts += [self.text[end:begin], self.text[begin:until] if kept else self.mask]
                end = until
            texts.append("".join([*parts, self.text[end:]]))
        return texts

    def shown(self) -> NDArray[Any]:
        return np.array([self.names], dtype=object)


def players_of(
    metadata: ModelMetadata,
    x: Any,
    background: Any,
    feature_names: Sequence[str] | None,
    segments: Any,
) -> Players:
    """The parts of inputs of a model that takes tensors.

    Raises:
        InvalidInputError: ``x`` or ``background`` do not fit the model or each other.
        ConfigurationError: an argument cannot be used.
    """
    columns = _columns(x)
    if columns is None and len(metadata.inputs) > 1:
        wanted = ", ".join(spec.name for spec in metadata.inputs)
        raise InvalidInputError(
            f"x expects a data frame or a mapping with the inputs {wanted}, got {type(x).__name__}", tensor=None
        )
    if columns is not None and len(metadata.inputs) == 1 and metadata.inputs[0].name in columns and len(columns) == 1:
        x, columns = columns[metadata.inputs[0].name], None
        if isinstance(background, Mapping):
            background = background.get(metadata.inputs[0].name)
    if columns is not None and len(metadata.inputs) > 1:
        return _table(metadata, columns, background)
    if columns is not None:
        # One input of several columns: a frame's own names are worth keeping.
        feature_names = list(columns) if feature_names is None else feature_names
        x = np.stack(list(columns.values()), axis=1)
        other = _columns(background)
        if other is not None:
            background = np.stack([other[name] for name in columns if name in other], axis=1)
    spec = metadata.inputs[0]
    array = np.asarray(x)
    if array.ndim == len(spec.shape) - 1:
        array = array[np.newaxis]
    if array.ndim != len(spec.shape) or not len(array):
        raise InvalidInputError(
            f"{spec.name}: expected an array with {len(spec.shape)} axes, rows first, got shape {array.shape}",
            tensor=spec.name,
        )
    if array.dtype.kind not in "biuf":
        raise InvalidInputError(
            f"{spec.name}: expected numbers, got {array.dtype}; give columns of other types as a data frame",
            tensor=spec.name,
        )
    if array.ndim == 2 and segments is None:
        return _numbers(spec.name, array, background, feature_names)
    return _patches(spec.name, array, background, segments)


def _columns(x: Any) -> dict[str, NDArray[Any]] | None:
    """Columns of a data frame or a mapping; None for anything else."""
    if isinstance(x, Mapping):
        names, get = [str(name) for name in x], {str(name): value for name, value in x.items()}.__getitem__
    elif hasattr(x, "columns") and hasattr(x, "__getitem__"):
        names = [str(name) for name in x.columns]
        get = x.__getitem__
    else:
        return None
    columns: dict[str, NDArray[Any]] = {}
    for name in names:
        value = get(name)
        array = np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)
        columns[name] = array.reshape(1) if array.ndim == 0 else array
    return columns


def _table(metadata: ModelMetadata, columns: dict[str, NDArray[Any]], background: Any) -> Players:
    wanted = [spec.name for spec in metadata.inputs]
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise InvalidInputError(f"x expects the columns {', '.join(wanted)}; {', '.join(missing)} is missing")
    other = _columns(background)
    if other is None:
        raise ConfigurationError(
            "background expects a data frame or a mapping of some typical rows, with the same columns as x"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    x: dict[str, NDArray[Any]] = {}
    base: dict[str, NDArray[Any]] = {}
    for spec in metadata.inputs:
        tail = spec.shape[1:]
        if any(size != 1 for size in tail):
            raise ConfigurationError(
                f"{spec.name} has the shape {list(spec.shape)}; of several inputs each may have one column"
            )
        if spec.name not in other:
            raise InvalidInputError(f"background expects the columns of x; {spec.name} is missing", tensor=spec.name)
        shapes[spec.name] = tail
        x[spec.name] = columns[spec.name].reshape(len(columns[spec.name]))
        base[spec.name] = other[spec.name].reshape(len(other[spec.name]))
    if len({len(column) for column in x.values()}) > 1 or len({len(column) for column in base.values()}) > 1:
        raise InvalidInputError("x and background each expect columns of one length")
    if not len(next(iter(x.values()))) or not len(next(iter(base.values()))):
        raise InvalidInputError("x and background expect at least one row each")
    return Columns(x, base, shapes)


def _numbers(name: str, x: NDArray[Any], background: Any, feature_names: Sequence[str] | None) -> Players:
    if background is None:
        raise ConfigurationError(
            "background expects some typical rows, such as 10 to 100 of the training data: what a prediction rests on "
            "can only be said against what is usual"
        )
    base = np.asarray(background)
    base = base[np.newaxis] if base.ndim == 1 else base
    if base.ndim != 2 or base.shape[1] != x.shape[1] or not len(base):
        raise InvalidInputError(
            f"background expects rows of {x.shape[1]} columns as x has, got shape {base.shape}", tensor=name
        )
    if base.dtype.kind not in "biuf":
        raise InvalidInputError(f"background expects numbers, got {base.dtype}", tensor=name)
    if x.dtype.kind in "iu" and max(int(np.abs(x).max()), int(np.abs(base).max())) > _EXACT_INTEGER:
        raise InvalidInputError(f"{name}: expected whole numbers of at most 2^53, which a double holds", tensor=name)
    names = [f"{name}[{at}]" for at in range(x.shape[1])] if feature_names is None else [str(n) for n in feature_names]
    if len(names) != x.shape[1]:
        raise ConfigurationError(f"feature_names expects {x.shape[1]} names, got {len(names)}")
    return Numbers(x, base, names)


def _patches(name: str, x: NDArray[Any], background: Any, segments: Any) -> Players:
    """Squares of an image, or the segments that were given, over the axes that are no channels."""
    spatial = _spatial(x.shape)
    if segments is None:
        grid = _grid(tuple(x.shape[axis] for axis in spatial))
    else:
        grid = np.asarray(segments)
        expected = tuple(x.shape[axis] for axis in spatial)
        if grid.dtype.kind not in "iu" or grid.shape not in (expected, x.shape[1:]):
            raise ConfigurationError(
                f"segments expects whole numbers of shape {expected}, a piece's number for each place, got "
                f"{grid.dtype} of shape {grid.shape}"
            )
        grid = np.unique(grid, return_inverse=True)[1].reshape(grid.shape)
    if grid.shape != x.shape[1:]:
        grid = np.broadcast_to(
            grid.reshape([x.shape[axis] if axis in spatial else 1 for axis in range(1, x.ndim)]), x.shape[1:]
        )
    if background is None:
        mean = x.mean(axis=spatial, keepdims=True)
        fill = np.broadcast_to(mean, x.shape).astype(x.dtype)
    else:
        value = np.asarray(background)
        try:
            fill = np.broadcast_to(value, x.shape).astype(x.dtype)
        except ValueError:
            raise InvalidInputError(
                f"background expects a value or an image that fits {x.shape[1:]}, got shape {value.shape}", tensor=name
            ) from None
    return Patches(x, fill, np.ascontiguousarray(grid, np.intp))


def _spatial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of height and width (and what else there is but channels) of ``(rows, …)``."""
    axes = tuple(range(1, len(shape)))
    if len(axes) < 3:
        return axes
    # Channels are few and stand first or last; where both could be, first, as ONNX's own operators have it.
    if shape[1] <= 4 or shape[1] < min(shape[2:]):
        return axes[1:]
    return axes[:-1] if shape[-1] <= 4 else axes


def _grid(sizes: tuple[int, ...]) -> NDArray[np.intp]:
    """About eight pieces along each axis."""
    grid = np.zeros(sizes, np.intp)
    for axis, size in enumerate(sizes):
        pieces = min(size, _PATCHES)
        along = np.arange(size) * pieces // size
        grid = grid * pieces + along.reshape([-1 if at == axis else 1 for at in range(len(sizes))])
    return grid
