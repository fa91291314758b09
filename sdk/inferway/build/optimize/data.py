"""The rows that candidates are calibrated with and the other rows that they are measured on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..._errors import BuildError, CalibrationError, InvalidInputError
from ..._inputs import fit
from ..._signature import ModelMetadata
from ..._tensors import quoted_names, shape_text

Array = NDArray[Any]

CALIBRATION_ROWS: Final = 512
"""At most; ranges of activations change little with more, and every one is run with every value inside the model."""
_SHARE: Final = 0.25
"""Of the rows that go to calibration, where the caller gives none apart."""
_SHOWN: Final = 5
_TAKES_NAN: Final = frozenset({"Imputer", "IsNaN", "TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"})
"""Operators whose models are made for missing values."""


@dataclass(frozen=True)
class Rows:
    """Inputs by name, each ``(count, …)``, with a label for each row where there are labels."""

    inputs: Mapping[str, Array]
    labels: Array | None
    count: int

    def take(self, chosen: Array) -> Rows:
        """These rows, in this order."""
        labels = None if self.labels is None else self.labels[chosen]
        return Rows({name: array[chosen] for name, array in self.inputs.items()}, labels, len(chosen))

    def batch(self, size: int) -> dict[str, Array]:
        """Inputs of ``size`` rows, beginning anew where there are fewer."""
        chosen = np.arange(size) % self.count
        return {name: np.ascontiguousarray(array[chosen]) for name, array in self.inputs.items()}

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Inputs of all rows, ``size`` at a time; the last may be shorter."""
        for start in range(0, self.count, size):
            yield {name: np.ascontiguousarray(array[start : start + size]) for name, array in self.inputs.items()}


@dataclass(frozen=True)
class Split:
    """Calibration rows, held-out rows, and how they were parted, in words."""

    calibration: Rows
    held_out: Rows
    about: str


def require_batch_axis(signature: ModelMetadata) -> None:
    """Every input's and output's first axis must be free, or batches cannot be measured.

    Raises:
        BuildError: one is not; the message says which.
    """
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if not spec.shape or spec.shape[0] != -1:
                raise BuildError(
                    f"the {kind} '{spec.name}' has the shape {shape_text(spec.shape)}, without a variable first axis: "
                    "its rows cannot be stacked, so no batches can be measured. Export the model with a variable "
                    "batch axis (inferway.to_onnx does)"
                )


def read_rows(
    signature: ModelMetadata, data: object, *, operators: frozenset[str] = frozenset(), name: str = "data"
) -> Rows:
    """Hold what the caller gave against the model's signature.

    Args:
        data: ``(x, y)`` or ``x``; ``x`` is an array, a data frame, or a mapping of input name to array.
        operators: of the model; some are there to take missing values.
        name: what the argument is called.
    Raises:
        CalibrationError: nothing was given, an input does not fit (which, what was expected, what came), inputs or
            labels are of different lengths, or there are numbers that are none.
    """
    require_data(data, name)
    given, labels = _parted(data)
    try:
        arrays = {spec.name: array for spec, array in fit(signature, given)}
    except InvalidInputError as error:
        raise CalibrationError(f"{name} does not fit the model: {error}") from error
    lengths = {key: len(array) for key, array in arrays.items()}
    count = next(iter(lengths.values()))
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"'{key}' has {length}" for key, length in lengths.items())
        raise CalibrationError(f"the inputs in {name} have different numbers of rows: {told}")
    if count == 0:
        raise CalibrationError(f"{name} has no rows")
    if not operators & _TAKES_NAN:
        for key, array in arrays.items():
            _require_finite(array, f"input '{key}' of {name}")
    if labels is not None:
        if len(labels) != count:
            raise CalibrationError(f"y has {len(labels)} rows and x has {count}: expected a label for each row")
        _require_finite(labels, f"y of {name}")
    return Rows(arrays, labels, count)


def require_data(data: object, name: str = "data") -> None:
    """Refuse what is no data at all, before anything is made of it.

    Raises:
        CalibrationError: nothing was given, a path, or a list of arrays in place of a pair.
    """
    if data is None:
        raise CalibrationError(
            f"{name} is missing: rows as the model takes them are needed to calibrate and to measure with; give "
            f"{name}=(x, y), or {name}=x where there are no labels"
        )
    if isinstance(data, str | bytes | os.PathLike):
        raise CalibrationError(f"{name} is a path, expected the rows themselves: numpy.load reads .npz and .npy files")
    if isinstance(data, list) and data and hasattr(data[0], "shape") and len({len(part) for part in data}) == 1:
        first = getattr(data[0], "ndim", 1)
        if any(getattr(part, "ndim", 1) != first for part in data):
            raise CalibrationError(f"{name} is a list of {len(data)} arrays; a pair of x and y is a tuple: (x, y)")


def _parted(data: object) -> tuple[object, Array | None]:
    if not isinstance(data, tuple):
        return data, None
    if len(data) != 2:
        raise CalibrationError(
            f"expected data as (x, y) or x, got a tuple of {len(data)}; several inputs go into a mapping by name"
        )
    given, labels = data
    if labels is None:
        return given, None
    numpy_method = getattr(labels, "numpy", None)  # of a tensor, which may hold a graph or be on another device
    if numpy_method is not None and hasattr(labels, "detach"):
        labels = labels.detach().cpu().numpy()
    found = np.asarray(labels)
    if found.ndim == 0:
        raise CalibrationError(f"expected y as one label for each row, got {type(labels).__name__}")
    return given, found


def _require_finite(array: Array, where: str) -> None:
    if array.dtype.kind != "f":
        return
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    if bad.any():
        rows = np.flatnonzero(bad)
        shown = ", ".join(map(str, rows[:_SHOWN])) + (", …" if len(rows) > _SHOWN else "")
        raise CalibrationError(
            f"{where} has NaN or infinite numbers in {len(rows)} of {len(array)} rows (row {shown}): leave these out "
            "or fill them"
        )


def split(data: Rows, calibration: Rows | None, seed: int) -> Split:
    """Part the rows, so that nothing is measured on what it was fitted to.

    Args:
        calibration: rows that the caller set apart; then all of ``data`` is held out.
        seed: of the order in which rows are drawn where nothing was set apart.
    Raises:
        CalibrationError: there are too few rows to part.
    """
    generator = np.random.default_rng(seed)
    if calibration is not None:
        used = calibration
        if used.count > CALIBRATION_ROWS:
            used = used.take(np.sort(generator.permutation(used.count)[:CALIBRATION_ROWS]))
        drawn = f", drawn from {calibration.count} (seed {seed})," if used is not calibration else ""
        return Split(used, data, f"calibrated on {used.count} rows given for it{drawn} and measured on {data.count}")
    if data.count < 4:
        raise CalibrationError(
            f"data has {data.count} rows, too few to calibrate on some and measure on others: give at least 4, better "
            "some hundred"
        )
    order = generator.permutation(data.count)
    wanted = min(CALIBRATION_ROWS, max(1, round(data.count * _SHARE)))
    about = f"calibrated on {wanted} rows and measured on the {data.count - wanted} others (drawn with seed {seed})"
    return Split(data.take(np.sort(order[:wanted])), data.take(np.sort(order[wanted:])), about)


def read_file(
    path: str | os.PathLike[str], inputs: Sequence[str], labels: str | None = None
) -> tuple[dict[str, Array], Array | None]:
    """Rows from a file: ``.npz`` with an array for each input and one for the labels, or ``.npy`` with the only input.

    Args:
        inputs: names of the model's inputs. One array is taken for a single input whatever it is called.
        labels: name of the labels' array; None for ``y``, where there is one and it is no input.
    Returns:
        Input name to array, and the labels.
    Raises:
        CalibrationError: the file cannot be read, or holds other arrays than these.
    """
    file = Path(path)
    try:
        loaded = np.load(file, allow_pickle=False)
        found: dict[str, Array] = {"": loaded} if isinstance(loaded, np.ndarray) else {n: loaded[n] for n in loaded}
    except (OSError, ValueError, EOFError) as error:
        detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        raise CalibrationError(f"{file} cannot be read as numpy's .npz or .npy: {detail}") from error
    wanted = labels if labels is not None else ("y" if "y" not in inputs else None)
    if labels is not None and labels not in found:
        raise CalibrationError(f"{file} has no array '{labels}' for the labels, only {quoted_names(list(found))}")
    y = found.pop(wanted, None) if wanted is not None else None
    if set(found) == set(inputs):
        return found, y
    if len(found) == 1 and len(inputs) == 1:
        return {inputs[0]: next(iter(found.values()))}, y
    raise CalibrationError(
        f"{file} has the arrays {quoted_names([n or '(unnamed)' for n in found])}, expected one for each input of the "
        f"model: {quoted_names(list(inputs))}, and 'y' for labels"
    )
