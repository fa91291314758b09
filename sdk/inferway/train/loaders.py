"""Rows out of what frameworks load them with: a Ray Data dataset, a PyTorch dataset or loader, batches of an iterable.

Everything is read once, into this process's memory, and trained on as arrays are: then any strategy can give each
worker its rows by number, in an order that is the same for one process and for many, and again after a crash. What does
not fit into memory does not fit here. An augmentation that a loader draws at random is drawn once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, InvalidInputError

_READ_ROWS: Final = 1024


def is_source(x: object) -> bool:
    """Whether rows have to be read out of it; otherwise they are there: an array, a frame, a list, a mapping."""
    if _is(x, "ray.data", "Dataset") or _is(x, "torch.utils.data", "Dataset", "DataLoader"):
        return True  # before the question for a shape: a dataset may well have one
    if isinstance(x, (list, tuple, Mapping, str, bytes)) or hasattr(x, "shape") or hasattr(x, "__array__"):
        return False
    # A Keras dataset is no iterable by its type; whatever else gives one thing after the other gives batches.
    return _is(x, "keras", "PyDataset") or isinstance(x, Iterable)


def gathered(x: object, y: object = None) -> tuple[Any, Any]:
    """All rows of a source, as ``(x, y)``.

    Args:
        x: a ``ray.data.Dataset``; a PyTorch ``Dataset`` of pairs of inputs and targets, or a ``DataLoader`` of such;
            or what gives pairs of a batch of inputs and one of targets, and ends.
        y: of a Ray Data dataset, the name of the column with the targets; None otherwise.
    Returns:
        Inputs as an array, as a mapping or list of arrays where there are several, or, of plain columns of a Ray Data
        dataset, as a pandas data frame; and targets, an array.
    Raises:
        ConfigurationError: ``y`` is given and does not belong, or is missing.
        InvalidInputError: a batch is no such pair, or there are none.
    """
    if _is(x, "ray.data", "Dataset"):
        return _of_columns(x, y)
    if y is not None:
        raise ConfigurationError("a loader has its targets in its batches: fit(loader), without y")
    pairs: Iterator[Any]
    if _is(x, "torch.utils.data", "Dataset") and hasattr(x, "__len__"):
        from torch.utils.data import DataLoader

        pairs = iter(DataLoader(x, batch_size=_READ_ROWS))
    elif _is(x, "keras", "PyDataset"):
        source: Any = x
        pairs = (source[index] for index in range(len(source)))
    else:
        batches: Any = x
        pairs = iter(batches)
    return _joined(pairs)


def _of_columns(dataset: Any, target: object) -> tuple[Any, Any]:
    names = dataset.columns() or []
    if not isinstance(target, str) or target not in names:
        raise ConfigurationError(
            f"of a Ray Data dataset say which column holds the targets: fit(dataset, 'name'); it has {', '.join(names)}"
        )
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    for batch in dataset.iter_batches(batch_size=_READ_ROWS, batch_format="numpy"):
        for name, array in batch.items():
            parts[name].append(np.asarray(array))
    if not parts[target]:
        raise InvalidInputError("the dataset has no rows")
    columns = {name: np.concatenate(found) for name, found in parts.items()}
    targets = columns.pop(target)
    if all(array.ndim == 1 for array in columns.values()):
        import pandas

        return pandas.DataFrame(columns), targets
    return next(iter(columns.values())) if len(columns) == 1 else columns, targets


def _joined(pairs: Iterator[Any]) -> tuple[Any, Any]:
    inputs: list[Any] = []
    targets: list[NDArray[Any]] = []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InvalidInputError(
                f"batch {number} is a {type(pair).__name__}"
                + (f" of {len(pair)}" if isinstance(pair, (list, tuple)) else "")
                + "; expected a pair: inputs and targets"
            )
        inputs.append(pair[0])
        targets.append(_array(pair[1]))
    if not inputs:
        raise InvalidInputError("the loader gave no batch; an iterator that was read before is empty")
    first = inputs[0]
    if isinstance(first, Mapping):
        joined: Any = {name: np.concatenate([_array(each[name]) for each in inputs]) for name in first}
    elif isinstance(first, (list, tuple)):
        joined = [np.concatenate([_array(each[place]) for each in inputs]) for place in range(len(first))]
    else:
        joined = np.concatenate([_array(each) for each in inputs])
    return joined, np.concatenate(targets)


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _is(value: object, module: str, *names: str) -> bool:
    """Whether one of a type's bases has such a name in such a module; nothing is imported for it."""
    return any(
        base.__name__ in names and (base.__module__ == module or base.__module__.startswith(f"{module}."))
        for base in type(value).__mro__
    )
