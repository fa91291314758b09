"""Trees whose thresholds are double, in a format whose thresholds are float32.

LightGBM and scikit-learn's histogram boosting compare in double: ``x <= t``. ONNX's tree operators keep ``t`` as
float32, and a converter that rounds it to the nearest sends every ``x`` between ``t`` and that number the wrong way:
one leaf of one tree, 7.5e-3 of the prediction in a case that we measured (LightGBM 4.7). Both ways of being exact are
used here:

- *float32 input.* ``x <= t`` is the same as ``x <= t'`` with ``t'`` the largest float32 that is not above ``t``, since
  no float32 lies between them. So thresholds are rounded down.
- *double input.* From version 3 of the operators thresholds may be a tensor of doubles, beside an input of doubles.

The converters build their nodes by ``add_node``, which is where the thresholds are still double.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from .runtime import onnx_module

_DOUBLE: Final = 11
_FLOATS: Final = ("nodes_values", "nodes_hitrates", "target_weights", "class_weights", "base_values")


@contextlib.contextmanager
def exact_thresholds(*containers: Any) -> Iterator[dict[str, list[float]]]:
    """While a converter runs, round its thresholds so that float32 inputs go the way they went.

    Args:
        containers: the converters' classes that have ``add_node``.
    Yields:
        Name of a tree node's first output to its double thresholds; of those that are no float32 only.
    """
    found: dict[str, list[float]] = {}
    originals = [(container, container.add_node) for container in containers]

    def wrapped(original: Any) -> Any:
        def add_node(self: Any, op_type: str, inputs: Any, outputs: Any, *args: Any, **attributes: Any) -> Any:
            if op_type.startswith("TreeEnsemble"):
                # protobuf 7 refuses a boolean where it expects an integer.
                attributes = {name: _plain(value) for name, value in attributes.items()}
                _round(attributes, [outputs] if isinstance(outputs, str) else outputs, found)
            return original(self, op_type, inputs, outputs, *args, **attributes)

        return add_node

    try:
        for container, original in originals:
            container.add_node = wrapped(original)
        yield found
    finally:
        for container, original in originals:
            container.add_node = original


@contextlib.contextmanager
def missing_followed() -> Iterator[None]:
    """While skl2onnx runs, let the trees of a forest send NaN where scikit-learn sends it.

    Its forests and decision trees take NaN also when they saw none in training (the larger child gets it); the
    converter (1.20) reads that of histogram boosting alone, and sends NaN to the right in all others.
    """
    from skl2onnx.common import tree_ensemble
    from skl2onnx.operator_converters import decision_tree, isolation_forest, random_forest

    modules = (decision_tree, isolation_forest, random_forest)
    original = random_forest.add_tree_to_attribute_pairs
    threshold = tree_ensemble.sklearn_threshold

    def finite_threshold(value: Any, *args: Any) -> Any:
        # What only parts NaN from the rest has the threshold infinity, whose neighbour is searched for without end.
        return threshold(value, *args) if np.isfinite(value) else np.float64(value)

    def add_tree(attributes: Any, classifies: Any, tree: Any, *args: Any, **settings: Any) -> None:
        original(attributes, classifies, tree, *args, **settings)
        left = getattr(tree, "missing_go_to_left", None)
        if left is not None:
            inner = tree.children_left != tree.children_right
            flags = [int(goes) for goes in left.astype(bool) & inner]
            attributes["nodes_missing_value_tracks_true"][-len(flags) :] = flags

    try:
        for module in modules:
            module.add_tree_to_attribute_pairs = add_tree
        tree_ensemble.sklearn_threshold = finite_threshold
        yield
    finally:
        tree_ensemble.sklearn_threshold = threshold
        for module in modules:
            module.add_tree_to_attribute_pairs = original


def _plain(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, list | tuple | np.ndarray) and any(isinstance(item, bool | np.bool_) for item in value):
        return [int(item) if isinstance(item, bool | np.bool_) else item for item in value]
    return value


def _round(attributes: dict[str, Any], outputs: Any, found: dict[str, list[float]]) -> None:
    values = attributes.get("nodes_values")
    modes = attributes.get("nodes_modes")
    if values is None or modes is None:
        return
    exact = [float(value) for value in values]
    rounded = [_beside(value, _text(mode)) for value, mode in zip(exact, modes, strict=True)]
    attributes["nodes_values"] = rounded
    # XGBoost's thresholds are float32, printed with few digits; only its mode is BRANCH_LT.
    moved = [e != r for e, r, mode in zip(exact, rounded, modes, strict=True) if _text(mode) == "BRANCH_LEQ"]
    if any(moved):
        found[outputs[0]] = exact


def _text(mode: Any) -> str:
    return mode.decode() if isinstance(mode, bytes) else str(mode)


def _beside(value: float, mode: str) -> float:
    """The largest float32 that is not above a threshold, for ``<=``; the nearest for all other modes."""
    with np.errstate(over="ignore"):
        near = np.float32(value)
    if mode == "BRANCH_LEQ" and float(near) > value:
        near = np.nextafter(near, np.float32(-np.inf))
    return float(near)


def widen(proto: Any, thresholds: dict[str, list[float]], inner: str) -> bool:
    """Let tree nodes that read the graph's input take it as double, with their own thresholds.

    Returns:
        False where something else reads the input too, so that nothing was changed.
    """
    onnx = onnx_module()
    readers = [node for node in proto.graph.node if inner in node.input]
    if not readers or not all(node.op_type.startswith("TreeEnsemble") for node in readers):
        return False
    if not all(node.output[0] in thresholds for node in readers):
        return False
    for node in readers:
        for name in _FLOATS:
            given = [attribute for attribute in node.attribute if attribute.name == name]
            if not given:
                continue
            values = thresholds[node.output[0]] if name == "nodes_values" else list(given[0].floats)
            node.attribute.remove(given[0])
            if name == "nodes_hitrates" and not any(value != 1.0 for value in values):
                continue
            tensor = onnx.numpy_helper.from_array(np.array(values, np.float64), f"{node.name}_{name}")
            node.attribute.append(onnx.helper.make_attribute(f"{name}_as_tensor", tensor))
    for value in proto.graph.input:
        if value.name == inner:
            value.type.tensor_type.elem_type = _DOUBLE
    for opset in proto.opset_import:
        if opset.domain == "ai.onnx.ml":
            opset.version = max(3, opset.version)
    return True
