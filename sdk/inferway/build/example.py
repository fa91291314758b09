"""A user's example, whatever it is made of, as named arrays and back.

An example is an array, a tensor, a list of numbers or texts, a data frame, or several of them in a tuple, list or
mapping. `Tree` keeps how they are nested, so that arrays of other lengths can be put into the same form.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from .._errors import InvalidInputError
from .._tensors import Array

Arrays: TypeAlias = Mapping[str, Array]
"""Arrays by input or output name, in the model's order."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A nest of arrays.

    Attributes:
        leaves: the arrays, in order.
        paths: of each, the keys and positions that lead to it.
        like: the object as it was given, without its arrays; None at their places.
    """

    leaves: tuple[Any, ...]
    paths: tuple[tuple[str | int, ...], ...]
    like: Any

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        """The same nest around other arrays."""
        return _fill(self.like, iter(leaves))


def tree_of(value: object) -> Tree:
    """Take an example apart. Leaves stay what they are: tensors, arrays, frames."""
    leaves: list[Any] = []
    paths: list[tuple[str | int, ...]] = []
    like = _part(value, (), leaves, paths)
    return Tree(tuple(leaves), tuple(paths), like)


def is_frame(value: object) -> bool:
    """Whether it is a data frame of pandas or polars; the modules are never imported here."""
    loaded = [sys.modules[name] for name in ("pandas", "polars") if name in sys.modules]
    return any(isinstance(value, module.DataFrame) for module in loaded)


def is_array(value: object) -> bool:
    """Whether it is one array, of whatever library, and no nest of them."""
    if isinstance(value, Mapping):
        return False
    if isinstance(value, list | tuple):
        sequence = cast(Sequence[object], value)
        return not (sequence and (isinstance(sequence[0], Mapping) or _has_shape(_first(sequence))))
    return True


def _first(value: Sequence[object]) -> object:
    first = value[0]
    while isinstance(first, list | tuple) and first:
        first = cast(Sequence[object], first)[0]
    return first


def _has_shape(value: object) -> bool:
    return hasattr(value, "shape") and not isinstance(value, np.generic)


def _part(value: Any, path: tuple[str | int, ...], leaves: list[Any], paths: list[tuple[str | int, ...]]) -> Any:
    if is_array(value):
        leaves.append(value)
        paths.append(path)
        return None
    if isinstance(value, Mapping):
        return {key: _part(item, (*path, str(key)), leaves, paths) for key, item in value.items()}
    parts = [_part(item, (*path, index), leaves, paths) for index, item in enumerate(value)]
    return tuple(parts) if isinstance(value, tuple) else parts


def _fill(like: Any, leaves: Any) -> Any:
    if like is None:
        return next(leaves)
    if isinstance(like, dict):
        return {key: _fill(item, leaves) for key, item in like.items()}
    return type(like)(_fill(item, leaves) for item in like)


def to_numpy(value: Any, where: str) -> Array:
    """One array as numpy's. Text becomes an object array of ``str``.

    Raises:
        InvalidInputError: it is none, such as a ragged list.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        tensor: Any = value.detach()
        if tensor.dtype is torch.bfloat16:
            import ml_dtypes

            return np.asarray(tensor.view(torch.int16).numpy(force=True)).view(ml_dtypes.bfloat16)
        return np.asarray(tensor.numpy(force=True))
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidInputError(f"{where} expects an array, got nested values of unequal length: {error}") from error
    if array.dtype.kind in "UST":
        array = array.astype(object)
    if array.dtype.kind not in "biufO" and array.dtype.name != "bfloat16":
        raise InvalidInputError(f"{where} expects numbers, booleans or text, got an array of {array.dtype}")
    return array


def unique(names: Sequence[str]) -> list[str]:
    """The same names, a number added to those that came before."""
    seen: dict[str, int] = {}
    found: list[str] = []
    for name in names:
        chosen, count = name, seen.get(name, 0)
        while chosen in found or (count and chosen == name):
            chosen, count = f"{name}_{count + 1}", count + 1
        seen[name] = count + 1
        found.append(chosen)
    return found
