"""What each family of models gives to `export.to_onnx`: a `Source`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .example import Arrays
from .model import Label
from .verify import BATCH

Dynamic: TypeAlias = "Mapping[str, Mapping[int, str | None] | Sequence[int]] | None"
"""Input name to axes that vary beside the batch: ``{"x": {1: "time"}}``, or ``{"x": [1]}``."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model of some framework together with an example of its inputs.

    Attributes:
        framework, backend: see `OnnxModel`.
        what: how an error names it, such as ``the Keras model 'sequential'``.
        inputs: the example, by the names and with the types that the graph's inputs will have.
        predict: the model's own outputs for such inputs, by the names that the graph's outputs will have.
        attempts: ways to make the graph, the best first; each gives a ``ModelProto`` and may raise.
        digest: ``sha256:…`` of structure and weights.
        ties: see `verify.verify`.
        precision: the least precise type that the model computes with, which the tolerances go by.
        table: it takes rows of columns, some of which may be missing, zero or unknown when it is served.
    """

    framework: str
    what: str
    inputs: Arrays
    predict: Callable[[Arrays], Arrays]
    attempts: Sequence[Callable[[], Any]]
    digest: str
    backend: str | None = None
    classes: tuple[Label, ...] | None = None
    columns: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict[str, str])
    precision: str = "float32"
    table: bool = False


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller asked for.

    Attributes:
        axes: input name to its variable axes and their names; filled in by `axes_of`.
    """

    dynamic: Dynamic = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    opset: int | None = None
    method: str | None = None


def axes_of(inputs: Arrays, dynamic: Dynamic) -> dict[str, dict[int, str]]:
    """Every input's variable axes: the first one, the batch's, and those that are asked for.

    An axis that is asked for by number alone has a name of its own; one that is None does not vary.
    """
    from .._errors import ConfigurationError
    from .._tensors import quoted_names, shape_text

    wanted = dict(dynamic or {})
    for name in wanted:
        if name not in inputs:
            raise ConfigurationError(f"dynamic names '{name}', and the inputs are {quoted_names(list(inputs))}")
    found: dict[str, dict[int, str]] = {}
    for name, array in inputs.items():
        asked = wanted.get(name, {})
        named: dict[int, str | None]
        named = dict(asked) if isinstance(asked, Mapping) else {axis: f"{name}_{axis}" for axis in asked}
        for axis in named:
            if isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis < array.ndim:
                raise ConfigurationError(
                    f"dynamic names axis {axis!r} of '{name}', whose example has shape {shape_text(array.shape)}: "
                    f"expected axes from 0 to {array.ndim - 1}"
                )
        if array.ndim:
            named = {0: BATCH, **named}
        found[name] = {axis: symbol for axis, symbol in sorted(named.items()) if symbol is not None}
    return found
