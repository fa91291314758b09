"""``inferway.to_onnx``: a model of any framework to ONNX, held against its source before anybody sees it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from .._errors import BuildError, ExportError, InferwayError, UnknownFrameworkError
from .._tensors import Array, quoted_names
from .example import Arrays
from .export_boosters import catboost_source, lightgbm_source, xgboost_source
from .export_keras import keras_source
from .export_onnx import load_onnx
from .export_sklearn import sklearn_source
from .export_torch import torch_source
from .graph import cast_outputs, reshape_outputs
from .model import OnnxModel
from .quiet import undisturbed
from .runtime import onnx_module, open_session, ort, run
from .source import Dynamic, Source, Wishes, axes_of
from .verify import BATCH, COARSE, Axes, Run, first_line, unlikely, variants, verify

_FAMILIES: Final = ("keras", "torch", "xgboost", "lightgbm", "catboost", "sklearn", "onnx")
"""Top modules, in the order in which a type's ancestors are searched for them: a Keras model may be a torch module,
and the boosters' estimators are scikit-learn's."""
_MAKERS: Final[dict[str, Callable[[Any, object, Wishes], Source]]] = {
    "keras": keras_source,
    "torch": torch_source,
    "sklearn": sklearn_source,
    "xgboost": xgboost_source,
    "lightgbm": lightgbm_source,
    "catboost": catboost_source,
}
_EXAMPLE_ROWS: Final = 8
"""Rows of the example that are kept with the model."""


def to_onnx(
    model: Any,
    example: object = None,
    *,
    dynamic: Dynamic = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
) -> OnnxModel:
    """Make ONNX of a model, run both on rows that the exporter has not seen, and refuse what differs.

    Args:
        model: of Keras 3, PyTorch, scikit-learn, XGBoost, LightGBM or CatBoost; or ONNX already, as a path, as bytes or
            as an ``onnx.ModelProto``.
        example: inputs as the model takes them, two rows or more: an array, a data frame, a tensor, or several of
            these in a tuple, list or mapping. Types and names of the graph's inputs are the example's.
        dynamic: axes that vary beside the batch, which always does: ``{"x": {1: "time"}}``. Axes of one name have one
            length. None in the place of a name keeps an axis as it is: ``{"table": {0: None}}``.
        input_names, output_names: instead of the model's own.
        opset: version of ONNX's operators; None for one that every supported ONNX Runtime has.
        rtol, atol: an output may differ by ``atol + rtol * its largest absolute value``; None for 1e-4 and 1e-5, and
            more for outputs of 16 bits.
        method: the way of exporting, where there are several; None for the best.
    Returns:
        The graph with what is known about it. The model is as it was before: mode, gradients, random state.
    Raises:
        UnknownFrameworkError: the model is of none of these.
        ModelNotBuiltError: it was never fitted, or has no shapes and the example gives it none.
        ExportError: an operator has no form in ONNX; ``operator`` and ``where`` say which, where that is known.
        ExportMismatchError: the graph computes something else than the model.
        MissingExtraError: a converter is not installed.
        ConfigurationError, InvalidInputError: an argument does not fit the model.
    """
    family = family_of(model)
    onnx_module()
    ort()
    wishes = Wishes(dynamic, input_names, output_names, opset, method)
    with undisturbed():
        if family == "onnx":
            return load_onnx(model, example, wishes)
        source = _MAKERS[family](model, example, wishes)
        axes = axes_of(source.inputs, dynamic)
        if source.precision in COARSE:
            rtol, atol = (
                given if given is not None else coarse
                for given, coarse in zip((rtol, atol), COARSE[source.precision], strict=True)
            )
        runs, skipped = _source_runs(source, axes)
        return _first_good(source, axes, runs, skipped, rtol, atol)


def family_of(model: Any) -> str:
    """The framework that a model is of; found by the names of its type's ancestors, so that none is imported.

    Raises:
        UnknownFrameworkError: it is of none that is known.
    """
    if isinstance(model, str | bytes | bytearray | memoryview) or hasattr(model, "__fspath__"):
        return "onnx"
    tops = {ancestor.__module__.partition(".")[0] for ancestor in type(model).__mro__}
    for family in _FAMILIES:
        if family in tops:
            return family
    raise UnknownFrameworkError(
        f"expected a model of Keras, PyTorch, scikit-learn, XGBoost, LightGBM or CatBoost, or ONNX as a path, bytes or "
        f"ModelProto, got {type(model).__module__}.{type(model).__qualname__}"
        + ("; give an object of the class, not the class" if isinstance(model, type) else "")
    )


def _source_runs(source: Source, axes: Axes) -> tuple[list[Run], list[str]]:
    """What the source makes of the example, and of rows and lengths that are made of it."""
    runs: list[Run] = []
    skipped: list[str] = []
    lengths: set[str] = set()
    for sizes, choices in variants(source.inputs, axes):
        outputs: Arrays | None = None
        failure: Exception | None = None
        for inputs in choices:
            try:
                outputs = source.predict(inputs)
                break
            except InferwayError:
                raise
            except Exception as error:
                failure = failure or error
        if outputs is None:
            assert failure is not None
            if not runs:
                raise BuildError(f"{source.what} cannot be run on the example: {first_line(failure)}") from failure
            skipped.append(f"{', '.join(f'{name}={size}' for name, size in sizes.items())}: {first_line(failure)}")
            continue
        if runs:
            lengths |= {name for name, size in sizes.items() if size != runs[0].sizes[name]}
        runs.append(Run(sizes, inputs, outputs))
    fixed = [name for name in runs[0].sizes if name not in lengths]
    if fixed:
        raise ExportError(
            f"{source.what} itself takes no other length of {quoted_names(fixed)} than the example's: "
            f"{skipped[0] if skipped else 'nothing else was tried'}"
        )
    if source.table:
        for inputs in unlikely(source.inputs):
            # What the source refuses itself, such as NaN or an unknown category, cannot be held against it.
            with contextlib.suppress(Exception):
                runs.append(Run({BATCH: len(next(iter(inputs.values())))}, inputs, source.predict(inputs)))
    return runs, skipped


def _first_good(
    source: Source, axes: Axes, runs: Sequence[Run], skipped: Sequence[str], rtol: float | None, atol: float | None
) -> OnnxModel:
    # Later attempts ask for less: what the last one failed of is the reason.
    failure: BuildError | None = None
    for attempt in source.attempts:
        try:
            proto = attempt()
            if proto is None:
                continue
            session = _opened(proto, axes, runs)
            verification = verify(
                partial(run, session), runs,
                what=source.what, rtol=rtol, atol=atol, skipped=skipped, ties=source.ties,
            )  # fmt: skip
        except BuildError as error:
            failure = error
            continue
        except InferwayError:  # something is not installed, or an argument cannot be used
            raise
        except Exception as error:
            failure = _not_run(error, source)
            failure.__cause__ = error
            continue
        return OnnxModel(
            proto=proto, framework=source.framework, backend=source.backend, classes=source.classes,
            columns=source.columns, verification=verification, source_digest=source.digest,
            examples=((_head(runs[0].inputs, runs[0]), _head(runs[0].outputs, runs[0])),),
        )  # fmt: skip
    assert failure is not None
    raise failure


def _not_run(error: Exception, source: Source) -> ExportError:
    """ONNX Runtime refuses a graph."""
    what = source.what
    unknown = re.search(r"No Op registered for (\w+)|Could not find an implementation for (\w+)\(", str(error))
    if unknown is None:
        return ExportError(f"ONNX Runtime cannot run what was made of {what}: {first_line(error)}")
    operator = unknown[1] or unknown[2]
    node = re.search(r"In Node, \(\"([^\"]+)\"|node with name '([^']+)'", str(error))
    where = f"node {node[1] or node[2]}" if node else None
    return ExportError(
        f"{what} uses the operator {operator}, which ONNX Runtime does not have for these types"
        f"{f' ({where})' if where else ''}; "
        + (
            f"it has few for {source.precision} on CPUs: export the model in float32"
            if source.precision in COARSE
            else "write that step with other operators, or leave it out of the model"
        ),
        operator=operator, where=where,
    )  # fmt: skip


def _opened(proto: Any, axes: Axes, runs: Sequence[Run]) -> Any:
    """A session of the graph, after its outputs have got the shapes of the source's."""
    first = runs[0]
    session = open_session(proto)
    given = run(session, first.inputs)
    wanted = {name: array for name, array in first.outputs.items() if name in given}
    if any(given[name].shape != array.shape or given[name].dtype != array.dtype for name, array in wanted.items()):
        reshape_outputs(proto, given, wanted)
        cast_outputs(proto, given, wanted)
    declare(proto, axes, runs)
    return open_session(proto)


def _head(arrays: Arrays, first: Run) -> dict[str, Array]:
    rows = first.sizes.get(BATCH, 0)
    return {
        name: array[:_EXAMPLE_ROWS] if array.ndim and len(array) == rows else array for name, array in arrays.items()
    }


def declare(proto: Any, axes: Axes, runs: Sequence[Run]) -> None:
    """Write into the graph what its inputs' and outputs' axes are, as it was seen in the source.

    Exporters leave them open, or declare the batch of a column of labels as 1; the gateway reads them.
    """
    first = runs[0]
    for value in proto.graph.input:
        if value.name in first.inputs:
            named = axes.get(value.name, {})
            shape = [named.get(axis, size) for axis, size in enumerate(first.inputs[value.name].shape)]
            _set_shape(value.type.tensor_type, shape)
    for value in proto.graph.output:
        seen = [(case.sizes, case.outputs[value.name].shape) for case in runs if value.name in case.outputs]
        if not seen or len({len(shape) for _, shape in seen}) > 1:
            continue
        _set_shape(value.type.tensor_type, [_axis(value.name, axis, seen) for axis in range(len(seen[0][1]))])


def _axis(name: str, axis: int, seen: Sequence[tuple[Mapping[str, int], tuple[int, ...]]]) -> str | int:
    for symbol in seen[0][0]:
        if all(sizes[symbol] == shape[axis] for sizes, shape in seen):
            return symbol
    lengths = {shape[axis] for _, shape in seen}
    return lengths.pop() if len(lengths) == 1 else f"{name}_{axis}"


def _set_shape(tensor: Any, shape: Sequence[str | int]) -> None:
    tensor.shape.Clear()
    for size in shape:
        if isinstance(size, str):
            tensor.shape.dim.add(dim_param=size)
        else:
            tensor.shape.dim.add(dim_value=size)
