"""Golden examples: inputs with the outputs that they must give, as ``golden.json`` takes them.

A gateway runs them before a version may serve. They are written as tensors of the Open Inference Protocol, so that they
are held against the model's own signature here, like the inputs of any call.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np

from ._errors import ConfigurationError, InvalidInputError
from ._inputs import fit
from ._signature import ModelMetadata
from ._tensors import Array, json_data, widen_bf16

GOLDEN_FILE: Final = "golden.json"
Golden: TypeAlias = "Sequence[tuple[object, object] | tuple[object, object, Mapping[str, float]]] | os.PathLike[str]"
"""Pairs of inputs and the outputs that belong to them, each as `ModelHandle.infer` takes inputs, with ``rtol`` and
``atol`` as a third part where the gateway's own are not wanted; or the path of a ``golden.json`` that has been written
before."""

_UNKNOWN: Final = ModelMetadata(name="the model", versions=(), platform="", inputs=(), outputs=())


def golden_json(golden: Golden, signature: ModelMetadata | None) -> bytes:
    """The content of ``golden.json``.

    Args:
        signature: the model's, against which examples are checked and cast; None where it is not known.
    Raises:
        ConfigurationError: it is no list of pairs, or an empty one, or no file of examples.
        InvalidInputError: an example does not fit the signature; the message counts from 1.
    """
    if isinstance(golden, os.PathLike):
        return _written(Path(golden))
    if isinstance(golden, str | bytes) or not isinstance(golden, Sequence) or not golden:
        raise ConfigurationError("golden expects a list of pairs (inputs, outputs)")
    takes = signature or _UNKNOWN
    # Outputs are checked as if they were inputs: one needs none of them all, but at least one.
    gives = replace(takes, inputs=tuple(replace(spec, optional=True) for spec in takes.outputs))
    examples: list[dict[str, Any]] = []
    for number, pair in enumerate(golden, 1):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) not in (2, 3):
            raise ConfigurationError(
                f"golden expects pairs (inputs, outputs), example {number} is {type(pair).__name__}"
            )
        side = "input"
        try:
            inputs, side = _tensors(takes, pair[0]), "output"
            outputs = _tensors(gives, pair[1])
        except InvalidInputError as error:
            words = str(error) if side == "input" else _of_outputs(str(error))
            raise InvalidInputError(f"golden example {number}: {words}", tensor=error.tensor) from error
        if not outputs:
            raise InvalidInputError(f"golden example {number}: expected at least one output")
        examples.append({"inputs": inputs, "outputs": outputs, **_tolerances(number, pair[2:])})
    return json.dumps({"examples": examples}, separators=(",", ":"), allow_nan=True).encode()


def _tolerances(number: int, given: Sequence[object]) -> dict[str, float]:
    if not given:
        return {}
    members = given[0]
    if not isinstance(members, Mapping) or not set(cast(Mapping[str, float], members)) <= {"rtol", "atol"}:
        raise ConfigurationError(
            f"golden example {number} expects rtol and atol as its third part, got {members!r:.80}"
        )
    found = {name: float(value) for name, value in cast(Mapping[str, float], members).items()}
    if not all(0 <= value < math.inf for value in found.values()):
        raise ConfigurationError(f"golden example {number} expects rtol and atol of at least 0, got {found}")
    return found


def _of_outputs(words: str) -> str:
    """What is said of inputs, said of outputs: see ``gives``. Only the words before a caller's values are changed."""
    for said, meant in (("' is no input of", "' is no output of"), ("expects the inputs", "expects the outputs")):
        if said in words:
            return words.replace(said, meant, 1)
    return "output" + words.removeprefix("input") if words.startswith("input '") else words


def _written(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        members: Any = json.loads(content)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is no JSON: {error}") from error
    if not isinstance(members, dict) or not isinstance(cast(dict[str, Any], members).get("examples"), list):
        raise ConfigurationError(f"expected {path} to hold golden examples: {{'examples': [{{'inputs', 'outputs'}}]}}")
    return content


def _tensors(model: ModelMetadata, values: object) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(array.shape),
            "data": _data(array, spec.datatype, spec.name),
        }
        for spec, array in fit(model, values)
    ]


def _data(array: Array, datatype: str, name: str) -> Any:
    """A tensor's elements. The protocol's JSON has no half precision; in this file it stands as its numbers."""
    if datatype == "BF16":
        return widen_bf16(array).ravel().tolist()
    if datatype == "FP16":
        return array.astype(np.float32).ravel().tolist()
    return json.loads(json_data(array, datatype, name))
