"""Which token is chosen: the arithmetic of each parameter, and that nothing else decides."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from inferway_gateway.backends.language.generator import Generator
from inferway_gateway.backends.language.sampling import PoisonedLogitsError, Sampler, log_probabilities
from inferway_gateway.core.generation import Sampling

from .conftest import PROMPT, ask

ROW = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def shares(count: int = 20_000, prompt: tuple[int, ...] = (), **members: Any) -> list[float]:
    """How often each token is drawn, each for itself."""
    sampler = Sampler(Sampling(**members), prompt, 1)
    drawn = np.bincount([sampler.choose(ROW) for _ in range(count)], minlength=5)
    return [float(share) for share in drawn / count]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [0.561, 0.316, 0.079, 0.035, 0.009]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 100}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.5}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.0}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        ({"logit_bias": {0: -100.0}}, [0, 0.5, 0.25, 1 / 6, 1 / 12]),
        ({"temperature": 1e-30}, [1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_should(members: dict[str, Any], expected: list[float]) -> None:
    assert shares(**members) == pytest.approx(expected, abs=0.015)


def test_penalties_are_taken_from_tokens_that_were_used() -> None:
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=0.2, presence_penalty=0.1), (), 1)
    # 0.4 falls by e^-0.3 the first time and e^-0.2 from then on, and so do the others.
    assert [sampler.choose(ROW) for _ in range(5)] == [0, 1, 0, 0, 1]
    row = np.array([2.0, 1.5, -1.0], np.float32)
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0), (0,), 1).choose(row) == 1
    assert row.tolist() == [2.0, 1.5, -1.0]
    # A negative logit is multiplied, which makes it less likely too.
    assert Sampler(Sampling(temperature=0, repetition_penalty=4.0), (0,), 1).choose(-row) == 2
    assert Sampler(Sampling(temperature=0, repetition_penalty=4.0), (0,), 1).choose(row[[2, 2]] * 1.0) == 1


@pytest.mark.parametrize("row", [[np.nan, 1.0], [-np.inf, -np.inf], [np.inf, 1.0]], ids=str)
def test_a_row_without_a_largest_number_is_refused(row: list[float]) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(PoisonedLogitsError):
            Sampler(Sampling(temperature=temperature), (), 1).choose(np.array(row, np.float32))


def test_logarithms_of_probabilities_are_the_models_own() -> None:
    its, top = log_probabilities(ROW * 1.0 + 5, 2, 3)
    assert its == pytest.approx(np.log(0.15), abs=1e-5)
    assert [token for token, _ in top] == [0, 1, 2]
    assert [value for _, value in top] == pytest.approx(np.log([0.4, 0.3, 0.15]), abs=1e-5)


async def test_a_seed_gives_the_same_answer_alone_and_in_company(tiny: Generator) -> None:
    drawn = Sampling(temperature=1.0, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.1, seed=42)
    alone = await ask(tiny, PROMPT, 30, sampling=drawn)
    others = [ask(tiny, (5, 6, 7), 20 + n, sampling=Sampling(seed=n)) for n in range(6)]
    together, *_ = await asyncio.gather(ask(tiny, PROMPT, 30, sampling=drawn), *others)
    assert together.tokens == alone.tokens
    another = await ask(tiny, PROMPT, 30, sampling=Sampling(temperature=1.0, seed=43))
    assert another.tokens != alone.tokens


async def test_without_a_seed_answers_differ(tiny: Generator) -> None:
    first, second = [await ask(tiny, PROMPT, 30, sampling=Sampling(temperature=1.5)) for _ in range(2)]
    assert first.tokens != second.tokens


async def test_a_biased_token_is_taken_or_left_out(tiny: Generator) -> None:
    plain = await ask(tiny, PROMPT, 5)
    without = await ask(tiny, PROMPT, 5, sampling=Sampling(temperature=0, logit_bias={plain.tokens[0]: -100}))
    assert plain.tokens[0] not in without.tokens
    always = await ask(tiny, PROMPT, 5, sampling=Sampling(temperature=0, logit_bias={77: 100}))
    assert always.tokens == (77,) * 5
