"""What a user trains on (arrays, tensors, data frames, several inputs) as named arrays, checked before any step."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, InvalidInputError
from ..build.example import is_array, is_frame, to_numpy
from .job import Arrays

ONLY: Final = "x"
"""The name of a model's only input, as exporting names it too."""

_PROBABILITIES: Final = ("binary_crossentropy", "bce")


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs and targets that belong together.

    Attributes:
        inputs: by name, rows first.
        targets: ``(rows, …)``.
    """

    inputs: Arrays
    targets: NDArray[Any]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Any) -> Rows:
        """Some of them, by whatever indexes an array."""
        return Rows({name: array[rows] for name, array in self.inputs.items()}, self.targets[rows])

    def sample(self, count: int) -> Rows:
        """At most so many, spread evenly, so that rows that are sorted by class give all of them."""
        if len(self) <= count:
            return self
        return self.take(np.linspace(0, len(self) - 1, count).astype(np.int64))


def inputs_of(x: object, names: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Inputs as named arrays.

    Args:
        x: an array, a tensor, nested lists, a data frame of numbers; or several of these in a mapping, list or tuple.
        names: of the model's inputs, in order, where it has several.
    Raises:
        InvalidInputError: it is none of these, holds text, or its arrays differ in rows.
    """
    if isinstance(x, Mapping):
        found = {str(name): _numbers(value, f"the input '{name}'") for name, value in x.items()}
    elif is_array(x):
        found = {names[0] if len(names) == 1 else ONLY: _numbers(x, "x")}
    else:
        parts: Any = x
        given = list(names) if len(names) == len(parts) else [f"{ONLY}{place}" for place in range(len(parts))]
        found = {name: _numbers(value, f"the input '{name}'") for name, value in zip(given, parts, strict=True)}
    if not found:
        raise InvalidInputError("x is empty")
    counts = {name: len(array) if array.ndim else 0 for name, array in found.items()}
    if len(set(counts.values())) > 1:
        raise InvalidInputError(f"inputs have different numbers of rows: {_counts(counts)}")
    if next(iter(counts.values())) == 0:
        raise InvalidInputError("x has no rows")
    return found


def _numbers(value: object, where: str) -> NDArray[Any]:
    if is_frame(value):
        frame: Any = value
        text = [str(name) for name, dtype in frame.dtypes.items() if getattr(dtype, "kind", "O") not in "biuf"]
        if text:
            raise InvalidInputError(
                f"{where} has columns that are no numbers: {', '.join(map(repr, text[:4]))}; give "
                f"inferway.wrap(model, preprocessing=ColumnTransformer(…)) to encode them"
            )
        return np.asarray(frame.to_numpy(np.float32))
    array = to_numpy(value, where)
    if array.dtype.kind == "O":
        raise InvalidInputError(f"{where} expects numbers, got text; encode it, such as with preprocessing=")
    return array


def targets_of(y: object, rows: int) -> NDArray[Any]:
    """Targets as an array with as many rows as there are inputs.

    Raises:
        InvalidInputError: they are no numbers, have other rows, or hold NaN or infinities.
    """
    if y is None:
        raise ConfigurationError("fit expects targets too: fit(x, y)")
    if not is_array(y):
        raise ConfigurationError(
            "fit takes one array of targets; a model with several is trained by its own fit, "
            "model.model.fit(x, [y1, y2]), and wrapped again with inferway.wrap(model, fitted=True)"
        )
    array = to_numpy(y, "y")
    if array.ndim == 0 or len(array) != rows:
        raise InvalidInputError(
            f"x has {rows} rows and y has {len(array) if array.ndim else 'none'}; expected as many targets as rows"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array.reshape(rows, -1)).all(axis=1))
        raise InvalidInputError(f"y holds {len(bad)} rows that are NaN or infinite, the first is row {bad[0]}")
    return array


def check_targets(targets: NDArray[Any], output: Sequence[int | None] | None, loss: object) -> None:
    """Hold targets against what a loss makes of an output.

    Args:
        targets: ``(rows, …)``.
        output: shape of the model's output, the batch first; None where it is not known.
        loss: a name; anything else is left to itself.
    Raises:
        InvalidInputError: another shape, a class that the model has not, or no probabilities.
    """
    name = loss_name(loss)
    if targets.dtype.kind == "O" and name:
        raise InvalidInputError(
            f"{name} expects numbers as targets, got text such as {targets.reshape(-1)[0]!r}; encode it, for instance "
            f"with sklearn.preprocessing.LabelEncoder"
        )
    tail = None if output is None else tuple(output[1:])
    shape = targets.shape[1:]
    if name.startswith("sparse_categorical") and tail:
        classes = tail[-1]
        if targets.dtype.kind == "f" and (targets != np.trunc(targets)).any():
            raise InvalidInputError(f"{name} expects classes as whole numbers, got {targets.reshape(-1)[0]!r}")
        if shape not in ((), (1,)) and shape != tail[:-1]:
            raise InvalidInputError(
                f"{name} expects one class a row, ({len(targets)},), got targets of {targets.shape}; for one-hot "
                f"targets take categorical_crossentropy"
            )
        if classes is not None and (targets.min() < 0 or targets.max() >= classes):
            raise InvalidInputError(
                f"the model's {classes} outputs are for the classes 0 to {classes - 1}, and targets go from "
                f"{targets.min()} to {targets.max()}"
            )
        return
    if name in _PROBABILITIES and targets.size and (targets.min() < 0 or targets.max() > 1):
        raise InvalidInputError(
            f"{name} expects targets from 0 to 1, got values from {targets.min()} to {targets.max()}"
            + ("; for more than two classes take sparse_categorical_crossentropy" if targets.dtype.kind in "iu" else "")
        )
    if name in _KNOWN and tail is not None and None not in tail and shape != tail:
        same = int(np.prod(shape, dtype=np.int64)) == int(np.prod([n or 0 for n in tail], dtype=np.int64))
        if not same or name == "categorical_crossentropy":
            raise InvalidInputError(
                f"{name} compares outputs of shape {_shape(tail)} with targets of shape {_shape(shape)}: expected the "
                f"same" + ("; for a class a row take sparse_categorical_crossentropy"
                           if name == "categorical_crossentropy" and shape in ((), (1,)) else "")
            )  # fmt: skip


_KNOWN: Final = (
    *_PROBABILITIES,
    "categorical_crossentropy",
    "mse",
    "mae",
    "mean_squared_error",
    "mean_absolute_error",
)


def loss_name(loss: object) -> str:
    """The name of a loss, such as ``binary_crossentropy``; empty where it has none that is known."""
    if isinstance(loss, str):
        return loss
    names = {
        "BCELoss": "binary_crossentropy",
        "BCEWithLogitsLoss": "binary_crossentropy",
        "BinaryCrossentropy": "binary_crossentropy",
        "CategoricalCrossentropy": "categorical_crossentropy",
        "L1Loss": "mae",
        "MSELoss": "mse",
        "MeanAbsoluteError": "mae",
        "MeanSquaredError": "mse",
        "SparseCategoricalCrossentropy": "sparse_categorical_crossentropy",
    }
    return names.get(type(loss).__name__, "")


def parted(x: Any, y: Any, fraction: float) -> tuple[Any, Any, Any, Any]:
    """Keep the last rows for validation, as Keras does: ``(x, y)`` to train on and ``(x, y)`` to measure on."""
    if not 0 < fraction < 1:
        raise ConfigurationError(f"validation_split expects a share between 0 and 1, got {fraction!r}")
    rows = rows_in(x)
    first = int(rows * (1 - fraction))
    if first < 1 or first == rows:
        raise ConfigurationError(f"validation_split={fraction} of {rows} rows leaves one of the two without any")
    return cut(x, slice(0, first)), cut(y, slice(0, first)), cut(x, slice(first, rows)), cut(y, slice(first, rows))


def rows_in(x: Any) -> int:
    """How many rows there are, whatever holds them."""
    if isinstance(x, Mapping):
        return rows_in(next(iter(x.values()))) if x else 0
    if not is_array(x):
        return rows_in(x[0])
    if not hasattr(x, "__len__") or isinstance(x, str):
        raise InvalidInputError(f"expected rows, such as an array (rows, …), got {type(x).__name__}")
    return len(x)


def cut(x: Any, rows: Any) -> Any:
    """Some rows, in whatever holds them; ``rows`` is a slice or an array of indices."""
    if isinstance(x, Mapping):
        return {name: cut(value, rows) for name, value in x.items()}
    if not is_array(x):
        return type(x)(cut(value, rows) for value in x)
    if is_frame(x) or _is_series(x):
        return x.iloc[rows]
    return x[rows] if hasattr(x, "shape") else np.asarray(x)[rows]


def _is_series(value: object) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.Series)


def why_diverged(inputs: Arrays) -> str:
    """What in the inputs may have made a loss no number; empty where nothing is to be seen."""
    for name, array in inputs.items():
        if array.dtype.kind == "f" and array.size:
            bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
            if len(bad):
                return (
                    f"'{name}' holds {len(bad)} rows with NaN or infinities, the first is row {bad[0]}: fill them, "
                    f"such as with preprocessing=sklearn.impute.SimpleImputer()"
                )
    return ""


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"'{name}' {count}" for name, count in counts.items())


def _shape(tail: Sequence[int | None]) -> str:
    return f"(rows, {', '.join(map(str, tail))})" if tail else "(rows,)"
