"""A language model as one of tensors."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from inferway_gateway.backends.language.executor import SIGNATURE, LanguageExecutor
from inferway_gateway.backends.language.generator import Generator
from inferway_gateway.core.batcher import InferenceRequest
from inferway_gateway.core.errors import InvalidTensorError, ShuttingDownError
from inferway_gateway.core.execution import Executor, Speaker
from inferway_gateway.core.stats import ModelStats

from .conftest import PROMPT, ask, until


def request(text: str, **others: Any) -> InferenceRequest:
    inputs = {"text_input": np.array([text], object), **others}
    return InferenceRequest(inputs, SIGNATURE.output_names, SIGNATURE.check(inputs), 8)


@pytest.fixture
def executor(tiny: Generator) -> LanguageExecutor:
    return LanguageExecutor(tiny, ModelStats())


async def test_a_text_is_continued(executor: LanguageExecutor) -> None:
    seam: Executor = executor
    assert isinstance(seam, Speaker)
    answer = await seam.infer(request(PROMPT, max_tokens=np.array([6])))
    assert answer.outputs[0].tolist() == [(await ask(executor.generator, max_tokens=6)).text]


@pytest.mark.parametrize(
    ("text", "others", "name"),
    [
        ("", {}, "text_input"),
        ("x", {"max_tokens": np.array([0])}, "max_tokens"),
        ("x", {"max_tokens": np.array([9000])}, "max_tokens"),
        ("x", {"temperature": np.array([np.nan], np.float32)}, "temperature"),
        ("x " * 5000, {}, "text_input"),
    ],
    ids=["empty", "no tokens", "too many tokens", "no temperature", "too long"],
)
async def test_values_out_of_range_are_named(
    executor: LanguageExecutor, text: str, others: dict[str, Any], name: str
) -> None:
    with pytest.raises(InvalidTensorError, match=f"input '{name}'"):
        await executor.infer(request(text, **others))


async def test_being_drained_it_answers_what_it_has_and_nothing_more(executor: LanguageExecutor) -> None:
    going_on = asyncio.create_task(executor.infer(request(PROMPT, max_tokens=np.array([200]))))
    await until(lambda: executor.generator.busy == 1)
    assert await executor.drain(20) == 0
    assert (await going_on).outputs[0].tolist()[0]
    with pytest.raises(ShuttingDownError):
        await executor.infer(request(PROMPT))
