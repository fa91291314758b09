"""Golden examples, on real sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.batcher import Batcher
from inferway_gateway.core.errors import GoldenMismatchError, ModelRejectedError
from inferway_gateway.core.execution import Executor
from inferway_gateway.core.golden import Example, compare, zeros
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats

Open = Callable[[bytes], Awaitable[Executor]]


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Open]:
    """Opens a model as an executor."""
    async with RunnerPool(1) as runners:
        held: list[tuple[Batcher, Any]] = []

        async def open_one(content: bytes) -> Executor:
            path = tmp_path / "model.onnx"
            path.write_bytes(content)
            artifact = Artifact("golden", 1, path)
            session = OnnxBackend(trial_budget_s=0).open(artifact)
            held.append((Batcher(session, artifact.config, ModelStats(), runners, run_timeout_s=10), session))
            return held[-1][0]

        yield open_one
        for batcher, session in held:
            await batcher.close()
            session.close()


def example(y: Any, **tolerance: float) -> Example:
    return Example({"x": np.zeros((2, 4), np.float32)}, {"y": np.asarray(y, np.float32)}, **tolerance)


async def test_outputs_within_the_tolerances_pass(opened: Open) -> None:
    executor = await opened(models.add_one(4))
    await compare(executor, [])
    await compare(executor, [example(np.ones((2, 4))), example(np.full((2, 4), 1.0009))])
    await compare(executor, [example(np.full((2, 4), 1.5), atol=0.5, rtol=0)])


async def test_the_message_names_the_output_the_largest_difference_and_its_place(opened: Open) -> None:
    executor = await opened(models.add_one(4))
    expected = np.ones((2, 4))
    expected[0, 1] = 1.25
    expected[1, 2] = 3.0
    with pytest.raises(GoldenMismatchError) as caught:
        await compare(executor, [example(np.ones((2, 4))), example(expected)])
    assert caught.value.message == (
        "golden example 2: output 'y' differs in 2 of 8 elements, at most by 2 at [1, 2]: expected 3, got 1, "
        "allowed atol 1e-05 + rtol 0.001"
    )


@pytest.mark.parametrize("expected", [np.nan, np.inf, -np.inf], ids=str)
async def test_a_number_is_neither_nan_nor_infinity(opened: Open, expected: float) -> None:
    executor = await opened(models.add_one(4))
    wanted = np.ones((2, 4), np.float32)
    wanted[1, 3] = expected
    with pytest.raises(GoldenMismatchError, match=r"differs in 1 of 8 elements, at most by inf at \[1, 3\]"):
        await compare(executor, [example(wanted)])
    x = np.zeros((2, 4), np.float32)
    x[1, 3] = expected
    await compare(executor, [Example({"x": x}, {"y": wanted})])


async def test_integers_have_to_be_equal(opened: Open) -> None:
    executor = await opened(models.identity("INT64"))
    x = np.array([[1000, 1001]])
    await compare(executor, [Example({"x": x}, {"y": x})])
    with pytest.raises(GoldenMismatchError, match=r"output 'y' differs in 1 of 2 elements, first at \[0, 1\]"):
        await compare(executor, [Example({"x": x}, {"y": np.array([[1000, 1000]])}, atol=5, rtol=5)])


async def test_strings_are_compared(opened: Open) -> None:
    executor = await opened(models.identity("BYTES"))
    x = np.array([["a", "b"]], object)
    await compare(executor, [Example({"x": x}, {"y": x})])
    with pytest.raises(GoldenMismatchError, match=r"first at \[0, 0\]"):
        await compare(executor, [Example({"x": x}, {"y": np.array([["c", "b"]], object)})])


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ({"y": np.ones((2, 3), np.float32)}, r"output 'y' has shape \[2, 4\], expected \[2, 3\]"),
        ({"y": np.ones((2, 4), np.float64)}, "output 'y' has datatype FP32, expected FP64"),
    ],
    ids=["shape", "datatype"],
)
async def test_another_form_is_a_difference(opened: Open, outputs: dict[str, Any], reason: str) -> None:
    executor = await opened(models.add_one(4))
    with pytest.raises(GoldenMismatchError, match=reason):
        await compare(executor, [Example({"x": np.zeros((2, 4), np.float32)}, outputs)])


async def test_an_example_that_does_not_fit_the_model_is_no_example_of_it(opened: Open) -> None:
    executor = await opened(models.add_one(4))
    with pytest.raises(ModelRejectedError, match="golden example 1 does not fit the model: unexpected inference input"):
        await compare(executor, [Example({"z": np.zeros((2, 4), np.float32)}, {"y": np.ones((2, 4), np.float32)})])
    with pytest.raises(ModelRejectedError, match="unexpected inference output 'z'"):
        await compare(executor, [Example({"x": np.zeros((2, 4), np.float32)}, {"z": np.ones((2, 4), np.float32)})])


async def test_a_model_that_fails_on_an_example_does_not_pass(opened: Open) -> None:
    executor = await opened(models.fails_on_negative())
    bad = Example({"x": np.full((1, 4), -1, np.float32)}, {"y": np.zeros((1, 4), np.float32)})
    with pytest.raises(GoldenMismatchError, match="golden example 1 could not be run: model 'golden' failed"):
        await compare(executor, [bad])


async def test_zeros_have_the_shape_of_the_signature_or_are_none(opened: Open) -> None:
    fixed = zeros((await opened(models.add_one(4))).signature, 3)
    assert fixed is not None
    assert fixed["x"].shape == (3, 4)
    assert zeros((await opened(models.identity("FP32"))).signature, 3) is None
    text = zeros((await opened(models.concat_text())).signature, 2)
    assert text is not None
    assert text["a"].tolist() == [[""], [""]]
