"""How good a model's outputs are: named metrics, callables, and agreement with the original where there are no labels.

What may be lost is told in one number: for metrics of which more is better (accuracy, F1, AUC, R², cosine, agreement)
the difference to the original's value; for errors (MSE, RMSE, MAE) the increase as a share of the original's, because
an error has the unit of what it measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from ..._errors import CalibrationError, ConfigurationError, MissingExtraError
from ..._tensors import quoted_names
from .data import Array

Outputs: TypeAlias = Mapping[str, Array]
Scorer: TypeAlias = Callable[[Outputs], float]
MetricArgument: TypeAlias = "str | Callable[[Any, Any], float] | None"

_GREATER: Final = {
    "accuracy": True,
    "f1": True,
    "auc": True,
    "r2": True,
    "cosine": True,
    "agreement": True,
    "mse": False,
    "rmse": False,
    "mae": False,
}
NAMES: Final = tuple(_GREATER)
_UNLABELLED: Final = frozenset({"cosine", "agreement"})
_CLASSIFYING: Final = frozenset({"accuracy", "f1", "auc"})


@dataclass(frozen=True)
class Metric:
    """A metric, bound to labels or to the original's outputs.

    Attributes:
        name: its name, or the callable's.
        greater_is_better: which way is good.
        about: what is compared with what, in words.
        score: outputs of a model on the held-out rows to a number.
    """

    name: str
    greater_is_better: bool
    about: str
    score: Scorer

    def drop(self, original: float, value: float) -> float:
        """What is lost against the original's value; negative for a gain."""
        if self.greater_is_better:
            return original - value
        return (value - original) / max(abs(original), 1e-12)

    def measure(self, outputs: Outputs) -> float:
        """The metric of these outputs.

        Raises:
            CalibrationError: the metric raised, or gave something else than a finite number.
        """
        try:
            value = float(self.score(outputs))
        except (CalibrationError, MissingExtraError):
            raise
        except Exception as error:
            raise CalibrationError(f"the metric {self.name} raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise CalibrationError(f"the metric {self.name} gave {value}, expected a finite number")
        return value


def make_metric(
    wanted: MetricArgument,
    original: Outputs,
    labels: Array | None,
    *,
    classes: Sequence[Any] | None = None,
    output: str | None = None,
    greater_is_better: bool | None = None,
) -> Metric:
    """Bind a metric.

    Args:
        wanted: a name of `NAMES`, a callable, or None for the one that suits labels and outputs.
        original: the original's outputs on the held-out rows.
        classes: labels of a classifier in the order of its scores, where ``labels`` has them in place of numbers.
        output: the output to look at, where there are several; not for callables, which get all.
        greater_is_better: of a callable; True where nothing is said.
    Raises:
        ConfigurationError: an unknown metric or output, or a direction for a metric that has one.
        CalibrationError: the metric needs labels and there are none, or labels that the outputs do not know.
    """
    if output is not None and output not in original:
        raise ConfigurationError(f"the model has no output '{output}', expected {quoted_names(list(original))}")
    if callable(wanted):
        return _of_callable(wanted, original, labels, greater_is_better)
    if greater_is_better is not None:
        raise ConfigurationError(
            "greater_is_better belongs to a metric of your own; named metrics know their direction"
        )
    if wanted is not None and wanted not in _GREATER:
        raise ConfigurationError(
            f"unknown metric {wanted!r}, expected a callable or one of {quoted_names(list(NAMES))}"
        )
    name = wanted or _suitable(original, labels, output)
    if labels is None and name not in _UNLABELLED:
        raise CalibrationError(
            f"the metric {name} needs labels: give data=(x, y), or one of {quoted_names(sorted(_UNLABELLED))}, which "
            "compare with the original"
        )
    scorer, about = _scorer(name, original, labels, classes, output)
    return Metric(name, _GREATER[name], about, scorer)


def _of_callable(
    wanted: Callable[[Any, Any], float], original: Outputs, labels: Array | None, greater: bool | None
) -> Metric:
    name = getattr(wanted, "__name__", type(wanted).__name__)

    def score(outputs: Outputs) -> float:
        given = next(iter(outputs.values())) if len(original) == 1 else dict(outputs)
        return float(wanted(given, labels))

    return Metric(name, greater is not False, "a function of the caller's", score)


def _suitable(original: Outputs, labels: Array | None, output: str | None) -> str:
    if labels is not None:
        one_hot = labels.ndim == 2 and labels.shape[1] > 1 and set(np.unique(labels)) <= {0, 1}
        return "accuracy" if labels.dtype.kind in "iubUSO" or one_hot or _is_binary(original, labels, output) else "mse"
    outputs = [original[output]] if output is not None else list(original.values())
    return "cosine" if any(array.dtype.kind == "f" for array in outputs) else "agreement"


def _is_binary(original: Outputs, labels: Array, output: str | None) -> bool:
    """Whether float labels are the two classes of a model that gives one probability."""
    if set(np.unique(labels)) != {0.0, 1.0}:
        return False
    scores = [original[output]] if output is not None else [a for a in original.values() if a.dtype.kind == "f"]
    return bool(scores) and scores[0].size == len(scores[0]) and scores[0].min() >= 0 and scores[0].max() <= 1


def _scorer(
    name: str, original: Outputs, labels: Array | None, classes: Sequence[Any] | None, output: str | None
) -> tuple[Scorer, str]:
    if name == "cosine":
        chosen = output or next((n for n, array in original.items() if array.dtype.kind == "f"), None)
        if chosen is None:
            raise CalibrationError("the metric cosine compares vectors, and no output of the model has floats")
        reference = _flat(original[chosen])
        return lambda outputs: _cosine(reference, _flat(outputs[chosen])), f"of '{chosen}' with the original's, mean"
    if name in _CLASSIFYING or name == "agreement":
        chosen = output or _deciding(original, name == "auc")
        if name == "agreement":
            decided = _decisions(original[chosen])
            return (
                lambda outputs: float(np.mean(_decisions(outputs[chosen]) == decided)),
                f"rows of which '{chosen}' decides as the original's",
            )
        assert labels is not None
        if name == "auc":
            return _auc(chosen, labels, classes), f"of '{chosen}' with the labels"
        truth = _truth(original[chosen], labels, classes)
        if name == "accuracy":
            return (
                lambda outputs: float(np.mean(_decisions(outputs[chosen]) == truth)),
                f"of '{chosen}' with the labels",
            )
        return lambda outputs: _f1(
            truth, _decisions(outputs[chosen])
        ), f"of '{chosen}' with the labels, mean of classes"
    assert labels is not None
    chosen = output or next((n for n, array in original.items() if array.dtype.kind == "f"), next(iter(original)))
    return _regression(name, chosen, original[chosen], labels), f"of '{chosen}' with the labels"


def _deciding(original: Outputs, scores: bool) -> str:
    """The output that tells classes: scores in more than one column, else a label, else scores in one."""
    floats = [name for name, array in original.items() if array.dtype.kind == "f"]
    wide = [name for name in floats if original[name].ndim > 1 and original[name].shape[-1] > 1]
    if scores and not floats:
        raise CalibrationError("the metric auc needs scores, and no output of the model has floats")
    if scores:
        return (wide or floats)[0]
    labelled = [name for name, array in original.items() if array.dtype.kind in "iubOUS" and array.size == len(array)]
    return (labelled or wide or floats or list(original))[0]


def _decisions(output: Array) -> Array:
    """Class of each row, or of each place in it: the column of the highest score, or the label as it is."""
    if output.dtype.kind in "iubOUS":
        found: Array = output.reshape(-1) if output.size == len(output) else output
        if found.dtype.kind != "O":
            return found
        return np.array([v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in found.flat]).reshape(
            found.shape
        )
    if output.ndim > 1 and output.shape[-1] > 1:
        return np.asarray(output.argmax(axis=-1))
    flat = output.reshape(-1)
    # One number for each row is a probability where it looks like one, and a logit where not.
    return (flat > (0.5 if flat.size and flat.min() >= 0 and flat.max() <= 1 else 0)).astype(np.int64)


def _truth(output: Array, labels: Array, classes: Sequence[Any] | None) -> Array:
    """Labels in the form in which `_decisions` gives them."""
    if labels.ndim > 1 and labels.shape[-1] > 1 and output.ndim == labels.ndim and output.dtype.kind == "f":
        return np.asarray(labels.argmax(axis=-1))
    found: Array = labels.reshape(-1) if labels.size == len(labels) else labels
    if output.dtype.kind in "OUS":
        return np.array([str(label) for label in found.flat]).reshape(found.shape)
    if found.dtype.kind in "OUS" or (classes is not None and output.dtype.kind == "f"):
        if classes is None:
            raise CalibrationError(
                "y has labels as text, and the model's output has scores: give y as the numbers of the scores' columns"
            )
        columns = {str(label): column for column, label in enumerate(classes)}
        unknown = [label for label in np.unique(found) if str(label) not in columns]
        if unknown:
            raise CalibrationError(
                f"y has the label {str(unknown[0])!r}, and the model knows {quoted_names(list(columns))}"
            )
        return np.array([columns[str(label)] for label in found])
    return found.astype(np.int64)


def _f1(truth: Array, decided: Array) -> float:
    return float(_sklearn().f1_score(truth.reshape(-1), decided.reshape(-1), average="macro", zero_division=0.0))


def _auc(chosen: str, labels: Array, classes: Sequence[Any] | None) -> Scorer:
    metrics = _sklearn()

    def score(outputs: Outputs) -> float:
        scores = outputs[chosen].astype(np.float64)
        truth = _truth(outputs[chosen], labels, classes)
        if scores.ndim == 1 or scores.shape[-1] == 1:
            return float(metrics.roc_auc_score(truth, scores.reshape(-1)))
        if scores.shape[-1] == 2:
            return float(metrics.roc_auc_score(truth, scores[:, 1] - scores[:, 0]))
        # Its multi-class form wants rows that sum to one; the order within a column is what counts.
        shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
        known = np.arange(scores.shape[-1])
        if scores.min() < 0 or not np.allclose(scores.sum(axis=-1), 1, atol=1e-3):
            scores = shifted
        scores = scores / scores.sum(axis=-1, keepdims=True)
        return float(metrics.roc_auc_score(truth, scores, multi_class="ovr", labels=known))

    return score


def _regression(name: str, chosen: str, output: Array, labels: Array) -> Scorer:
    if output.size != labels.size:
        raise CalibrationError(
            f"y has {labels.size} numbers and the output '{chosen}' has {output.size}: expected one for each"
        )
    try:
        truth = labels.astype(np.float64).reshape(-1)
    except ValueError as error:
        raise CalibrationError(f"the metric {name} needs numbers in y, got {labels.dtype}") from error

    def score(outputs: Outputs) -> float:
        gap = outputs[chosen].astype(np.float64).reshape(-1) - truth
        if name == "mae":
            return float(np.mean(np.abs(gap)))
        squared = float(np.mean(np.square(gap)))
        if name == "r2":
            return 1 - squared / max(float(np.var(truth)), 1e-300)
        return math.sqrt(squared) if name == "rmse" else squared

    return score


def _flat(array: Array) -> Array:
    return array.reshape(len(array), -1).astype(np.float64)


def _cosine(one: Array, other: Array) -> float:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(np.mean(np.sum(one * other, axis=1) / np.maximum(lengths, 1e-300)))


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "optimize", "the metrics f1 and auc") from error
    return metrics
