"""Shapley values by shap's permutation explainer, over a model that is asked through the gateway.

The value of a part is what knowing it adds to the prediction, averaged over orders in which parts become known. The
explainer draws orders at random, walks each forwards and backwards, and asks the model at every step: for ``f`` parts,
``b`` rows of background and ``p`` orders, at most ``p * (2 f + 1) * b`` rows. Each walk ends where the other began, so
that values and base value add up to the prediction but for rounding; how far they do is told.

Source: Lundberg and Lee, "A Unified Approach to Interpreting Model Predictions", 2017; Mitchell et al., "Sampling
Permutations for Shapley Value Estimation", 2022, for the walk in both directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, MissingExtraError
from .explanation import Explanation
from .players import Codes, Players

Ask: TypeAlias = "Callable[[Sequence[Any]], list[NDArray[Any]]]"
"""Asks the model with several inputs, one request each and many at once; gives their predictions in order, each
``(rows,)`` or ``(rows, outputs)``."""

CHUNK_BYTES: Final = 4 * 1024 * 1024
WALK_BYTES: Final = 2 * 1024**3
"""The explainer makes all rows of a walk at once; more than this is refused with what to do."""
_EVALUATIONS: Final = 5000
"""Rows for which wide inputs are asked by default, for each row of background."""


def default_permutations(parts: int) -> int:
    """Ten, or fewer where there are many parts; never none."""
    return max(1, min(10, _EVALUATIONS // (2 * parts + 1)))


def check(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} expects a whole number of at least {least}, got {value!r}")
    return value


def shap_module() -> Any:
    """The library, or how to install it.

    Raises:
        MissingExtraError: it is not there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that it imports
            import shap
    except ImportError as error:
        raise MissingExtraError(error.name or "shap", "explain", "explaining a prediction") from error
    return shap


def explain(
    players: Players,
    ask: Ask,
    *,
    model: str,
    output: str,
    permutations: int | None,
    chunk_rows: int,
    seed: int,
    output_names: Sequence[str] | None,
    tell: Callable[[int, int], object],
) -> Explanation:
    """Explain each of the players' rows.

    Raises:
        MissingExtraError: shap is not installed.
        ConfigurationError: an argument cannot be used.
        APIError: the model could not be asked.
    """
    shap = shap_module()
    rows, background = players.rows, players.background
    parts = rows.shape[1]
    if not parts:
        raise ConfigurationError("there is nothing to take away: the input has no parts")
    walk = (2 * parts + 1) * parts * 8
    if walk * len(background) > WALK_BYTES:
        raise ConfigurationError(
            f"{len(background)} rows of background over {parts} parts would take "
            f"{walk * len(background) / 1024**3:.1f} GiB at once; give at most {max(1, WALK_BYTES // walk)} rows"
        )
    orders = default_permutations(parts) if permutations is None else permutations
    most = len(rows) * (orders * (2 * parts + 1) * len(background) + 1)
    sent = 0
    at = 0

    def predict(codes: Any) -> NDArray[np.float64]:
        nonlocal sent
        codes = np.asarray(codes, np.float64)
        size = _chunk(players, codes, at, chunk_rows)
        chunks = [players.inputs(codes[begin : begin + size], at) for begin in range(0, len(codes), size)]
        answers = ask(chunks)
        sent += len(codes)
        tell(sent, most)
        return np.concatenate([np.asarray(answer, np.float64) for answer in answers])

    values: list[NDArray[np.float64]] = []
    deviations: list[NDArray[np.float64]] = []
    bases: list[NDArray[np.float64]] = []
    predictions: list[NDArray[np.float64]] = []
    for at in range(len(rows)):
        predictions.append(predict(rows[at : at + 1])[0])
        found = _walk(shap, predict, players, background, rows[at], orders, seed)
        values.append(found["values"])
        bases.append(found["expected_values"])
        deviations.append(found["error_std"])
    tell(most, most)
    given = np.stack(values)
    prediction = np.stack(predictions)
    base = np.stack(bases)
    error = np.abs(base + given.sum(axis=1) - prediction)
    if output_names is not None and (given.ndim != 3 or len(output_names) != given.shape[2]):
        raise ConfigurationError(
            f"output_names expects a name for each of the {given.shape[2] if given.ndim == 3 else 1} outputs, got "
            f"{len(output_names)}"
        )
    return Explanation(
        values=given,
        base_values=base,
        predictions=prediction,
        feature_names=tuple(players.names),
        data=players.shown(),
        standard_error=np.stack(deviations) / np.sqrt(2 * orders),
        additivity_error=float(error.max()),
        kind=players.kind,
        model=model,
        output=output,
        output_names=None if output_names is None else tuple(str(name) for name in output_names),
        permutations=orders,
        rows_sent=sent,
        players=players,
    )


def _walk(
    shap: Any, predict: Any, players: Players, background: Codes, row: Codes, orders: int, seed: int
) -> dict[str, Any]:
    """One row's values. The explainer seeds numpy's own generator, which is the caller's: it is put back."""
    state = np.random.get_state()
    try:
        masker = shap.maskers.Independent(background, max_samples=len(background))
        explainer = shap.PermutationExplainer(predict, masker, feature_names=list(players.names), seed=seed)
        evaluations = orders * (2 * len(row) + 1)
        found = explainer(row[np.newaxis], max_evals=evaluations, error_bounds=True, silent=True)
    finally:
        np.random.set_state(state)
    return {
        "values": np.asarray(found.values[0], np.float64),
        "expected_values": np.asarray(found.base_values[0], np.float64),
        "error_std": np.asarray(found.error_std[0], np.float64),
    }


def _chunk(players: Players, codes: Codes, at: int, most: int) -> int:
    """Rows of one request: many, but no more than some megabytes."""
    sample = players.inputs(codes[:1], at)
    arrays = sample.values() if isinstance(sample, dict) else [np.asarray(sample)]
    each = sum(array.nbytes for array in arrays)
    return max(1, min(most, CHUNK_BYTES // max(1, each)))
