"""The batcher over real sessions: what a caller gets in company is what it gets alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.core.backend import Artifact, Session
from inferway_gateway.core.batcher import Answer, Batcher, InferenceRequest
from inferway_gateway.core.errors import DeadlineExceededError, ModelExecutionError
from inferway_gateway.core.model_config import BatchPolicy, ModelConfig, PaddingAxis, SessionOptions
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats
from models import add_sub, endless, fails_on_negative, masked_mean, matmul

Inputs = dict[str, NDArray[Any]]


@dataclass
class Served:
    session: Session
    batcher: Batcher
    stats: ModelStats

    def ask(self, inputs: Inputs, *outputs: str, **options: Any) -> InferenceRequest:
        rows = self.session.signature.check(inputs)
        names = outputs or self.session.signature.output_names
        return InferenceRequest(inputs, names, rows, sum(a.nbytes for a in inputs.values()), **options)

    async def all(self, *requests: InferenceRequest) -> list[Answer | BaseException]:
        async with asyncio.timeout(60):
            return await asyncio.gather(*map(self.batcher.infer, requests), return_exceptions=True)


@asynccontextmanager
async def served(
    path: Path, proto: bytes, policy: BatchPolicy | None = None, *, run_timeout_s: float = 30.0, threads: int = 2
) -> AsyncIterator[Served]:
    file = path / "model.onnx"
    file.write_bytes(proto)
    config = ModelConfig(
        # Whether company pays is not what is tested here: a size that is preferred is filled.
        batching=policy or BatchPolicy(preferred_rows=(32,)),
        session=SessionOptions(trial=False, inline=False),
    )
    session = OnnxBackend(("CPUExecutionProvider",), cpus=2, run_limit_s=0.5).open(Artifact("m", 1, file, config))
    stats = ModelStats()
    async with RunnerPool(threads) as pool:
        batcher = Batcher(session, config, stats, pool, run_timeout_s=run_timeout_s)
        yield Served(session, batcher, stats)
        assert await batcher.close()
    session.close()


def answered(result: Answer | BaseException) -> list[NDArray[Any]]:
    assert isinstance(result, Answer), result
    return result.outputs


async def test_rows_have_the_same_bits_in_any_company(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((1 + n % 5, 64), dtype=np.float32) for n in range(60)]
    async with served(tmp_path, matmul()) as s:
        assert s.batcher.row_exact
        alone = [answered((await s.all(s.ask({"x": x})))[0])[0] for x in arrays]
        runs = s.stats.execution_count
        together = await s.all(*(s.ask({"x": x}) for x in arrays))
        assert s.stats.execution_count - runs < 20, "they did run together"
        for x, own, result in zip(arrays, alone, together, strict=True):
            np.testing.assert_array_equal(answered(result)[0], own)
            np.testing.assert_allclose(own, s.session.run({"x": x}, ["y"])[0], rtol=1e-4, atol=1e-5)


async def test_padded_sentences_have_their_own_vectors_and_lengths(tmp_path: Path) -> None:
    padding = PaddingAxis({"input_ids": 1, "attention_mask": 1}, {"tokens": 1}, fill={"input_ids": 3}, max_waste=0.9)
    rng = np.random.default_rng(2)
    sentences = []
    for n in range(80):
        ids = rng.integers(0, 100, (1 + n % 3, 1 + n % 17))
        sentences.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    async with served(tmp_path, masked_mean(), BatchPolicy(preferred_rows=(16,), padding=(padding,))) as s:
        runs = s.stats.execution_count
        results = await s.all(*(s.ask(inputs) for inputs in sentences))
        assert s.stats.execution_count - runs < 40
        for inputs, result in zip(sentences, results, strict=True):
            pooled, tokens = s.session.run(inputs, ["pooled", "tokens"])
            np.testing.assert_array_equal(answered(result)[1], tokens)
            np.testing.assert_allclose(answered(result)[0], pooled, rtol=1e-5, atol=1e-6)


async def test_a_bad_row_fails_alone_and_its_neighbours_have_their_results(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    arrays = [rng.random((1 + n % 4, 4), dtype=np.float32) for n in range(40)]
    for n in (5, 6, 31):
        arrays[n][-1, 2] = -1.0
    async with served(tmp_path, fails_on_negative()) as s:
        results = await s.all(*(s.ask({"x": x}) for x in arrays))
        for n, (x, result) in enumerate(zip(arrays, results, strict=True)):
            if n in (5, 6, 31):
                assert isinstance(result, ModelExecutionError)
                assert "failed" in result.message
            else:
                np.testing.assert_array_equal(answered(result)[0], x)


async def test_a_run_without_end_is_ended_and_the_session_serves_on(tmp_path: Path) -> None:
    x = np.zeros((1, 64), np.float32)
    async with served(tmp_path, endless(), run_timeout_s=0.1) as s:
        result = (await s.all(s.ask({"x": x})))[0]
        assert isinstance(result, DeadlineExceededError)
        assert "0.1 s" in result.message
        gone = asyncio.ensure_future(s.batcher.infer(s.ask({"x": x})))
        await asyncio.sleep(0)
        gone.cancel()
        assert (await asyncio.gather(gone, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_large_and_empty_requests_come_back_whole(tmp_path: Path) -> None:
    x = np.arange(1000 * 16, dtype=np.int32).reshape(1000, 16)
    async with served(tmp_path, add_sub(), BatchPolicy(preferred_rows=(32,))) as s:
        large, empty = await s.all(
            s.ask({"INPUT0": x, "INPUT1": x}, "OUTPUT1", "OUTPUT0"),
            s.ask({"INPUT0": x[:0], "INPUT1": x[:0]}, "OUTPUT1"),
        )
        np.testing.assert_array_equal(answered(large)[0], np.zeros_like(x))
        np.testing.assert_array_equal(answered(large)[1], 2 * x)
        assert answered(empty)[0].shape == (0, 16)
        assert answered(empty)[0].dtype == np.int32


async def test_sentences_of_no_rows_keep_the_length_they_asked_about(tmp_path: Path) -> None:
    async with served(tmp_path, masked_mean()) as s:
        ids = np.empty((0, 5), np.int64)
        result = await s.all(s.ask({"input_ids": ids, "attention_mask": ids}))
        assert [a.shape for a in answered(result[0])] == [(0, 8), (0, 5, 8)]
