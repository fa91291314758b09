"""Choosing the next token from a row of logits, in numpy.

Each answer draws from its own generator, one number a token, so what it draws does not depend on whose answers are
made beside it. A row is looked at alone; the same bits give the same token.

Measured 2026-11 on 49,152 tokens: argmax 5 us, temperature with top_p 0.9 150 us a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...core.generation import Sampling

Row = NDArray[np.float32]

_FEW: Final = 256
_NEGLIGIBLE: Final = 30.0
"""A token whose logit is that far below the largest, in units of the temperature, is e^-30 times as likely: even all of
a vocabulary of such tokens are not drawn once in ten million."""


class PoisonedLogitsError(Exception):
    """No token can be chosen: the row has no number in it that is larger than minus infinity, or one that is none."""


class Sampler:
    """Draws the tokens of one answer.

    Args:
        prompt: for the repetition penalty.
        seed: taken where ``sampling`` has none.
    Attributes:
        plain: the likeliest token is taken from the row as it is.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], seed: int) -> None:
        s = self._sampling = sampling
        self._random = np.random.default_rng(seed if s.seed is None else s.seed)
        self._counts: Counter[int] = Counter()
        self._prompt = np.unique(np.asarray(prompt, np.int64)) if s.repetition_penalty != 1.0 else None
        self._penalised = bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)
        self._bias: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
        if s.logit_bias:
            self._bias = (
                np.fromiter(s.logit_bias.keys(), np.int64, len(s.logit_bias)),
                np.fromiter(s.logit_bias.values(), np.float32, len(s.logit_bias)),
            )
        self.plain = s.temperature == 0.0 and not self._penalised and self._bias is None

    def choose(self, row: Row, *, own: bool = False) -> int:
        """The next token.

        Args:
            row: logits of one position.
            own: the row may be written to.
        Raises:
            PoisonedLogitsError: there is nothing to choose from.
        """
        if self._bias is not None or self._penalised:
            row = self._adjusted(row if own else row.copy())
        top = int(row.argmax())
        best = float(row[top])
        if not np.isfinite(best):
            raise PoisonedLogitsError
        temperature = self._sampling.temperature
        token = top if temperature == 0.0 else self._draw(row, best, temperature)
        if self._penalised:
            self._counts[token] += 1
        return token

    def _adjusted(self, row: Row) -> Row:
        s = self._sampling
        if self._bias is not None:
            tokens, values = self._bias
            row[tokens] += values
        if not self._penalised:
            return row
        drawn = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
        if self._prompt is not None:
            seen = np.union1d(self._prompt, drawn)
            logits = row[seen]
            row[seen] = np.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
        if len(drawn):
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            row[drawn] -= (s.presence_penalty + s.frequency_penalty * times).astype(np.float32)
        return row

    def _draw(self, row: Row, best: float, temperature: float) -> int:
        s = self._sampling
        # Also drawn where only one token is left, so that the same seed goes on with the same numbers.
        number = float(self._random.random())
        with np.errstate(over="ignore"):
            tokens = np.flatnonzero(row > best - _NEGLIGIBLE * temperature)
            if 0 < s.top_k < len(tokens):
                tokens = tokens[np.argpartition(-row[tokens], s.top_k - 1)[: s.top_k]]
            weights = np.exp((row[tokens].astype(np.float64) - best) / temperature)
        if s.min_p > 0.0:
            kept = weights >= s.min_p
            tokens, weights = tokens[kept], weights[kept]
        if s.top_p < 1.0 and len(tokens) > 1:
            likely = _nucleus(weights, s.top_p * float(weights.sum()))
            tokens, weights = tokens[likely], weights[likely]
        if not len(tokens):  # a temperature so small that nothing else is as large as the largest
            return int(row.argmax())
        sums = np.cumsum(weights)
        return int(tokens[min(int(np.searchsorted(sums, number * sums[-1], side="right")), len(tokens) - 1)])


def _nucleus(weights: NDArray[np.float64], enough: float) -> NDArray[np.int64]:
    """The fewest weights, largest first, that are ``enough`` together. Mostly they are few, and sorting all of a
    vocabulary takes 3 ms."""
    some = _FEW
    while True:
        if some < len(weights):
            order = np.argpartition(-weights, some)[:some]
            order = order[np.argsort(-weights[order], kind="stable")]
        else:
            order = np.argsort(-weights)
        sums = np.cumsum(weights[order])
        if sums[-1] >= enough or some >= len(weights):
            return order[: int(np.searchsorted(sums, enough, side="left")) + 1]
        some *= 16


def log_probabilities(row: NDArray[Any], token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Natural logarithms of the probabilities that the model itself gives, before anything that a request changes.

    Returns:
        That of ``token``, and the ``count`` likeliest tokens with theirs, likeliest first.
    """
    values = row.astype(np.float64)
    largest = values.max()
    total = largest + np.log(np.exp(values - largest).sum())
    top: tuple[tuple[int, float], ...] = ()
    if count:
        found = np.argpartition(values, len(values) - count)[len(values) - count :]
        found = found[np.lexsort((found, -values[found]))]
        top = tuple((int(one), float(values[one] - total)) for one in found)
    return float(values[token] - total), top
