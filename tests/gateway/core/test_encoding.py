"""Texts to vectors and scores: held against numpy, over real sessions and the real batcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.testing import assert_allclose

import text_models
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.backends.text import read_package
from inferway_gateway.core.batcher import Batcher
from inferway_gateway.core.encoding import Call, Template, TextEncoder, activated, string_encoder, string_spec
from inferway_gateway.core.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InvalidParameterError,
    ModelExecutionError,
)
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.tensors import Signature, TensorSpec
from inferway_gateway.store.repository import ModelRepository

TABLE = text_models.table()


@asynccontextmanager
async def encoder(tmp_path: Path, files: Mapping[str, bytes]) -> AsyncIterator[tuple[TextEncoder, ModelStats]]:
    folder = tmp_path / "models" / "some"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    artifact = ModelRepository(tmp_path / "models").scan()["some"].artifact(1)
    session = OnnxBackend(("CPUExecutionProvider",), cpus=2, trial_budget_s=0.0).open(artifact)
    package = read_package(artifact, session.signature)
    assert package is not None
    stats = ModelStats()
    try:
        async with RunnerPool(2) as runners:
            batcher = Batcher(session, package.config, stats, runners, run_timeout_s=30.0)
            yield TextEncoder(batcher, package.spec, package.tokenizer), stats
            await batcher.close()
    finally:
        session.close()


def ids(text: str) -> list[int]:
    """The words of a text as text_models' tokenizer numbers them, special tokens around."""
    return [2, *(int(word[1:]) + 4 for word in text.split()), 3]


def mean(text: str) -> Any:
    """By plain numpy, in double precision."""
    return TABLE[ids(text)].astype(np.float64).mean(axis=0)


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


TEXTS = [words(*range(start, start + length)) for length in (1, 3, 3, 17, 30, 2, 9) for start in (0, 20, 50)]


async def test_vectors_are_those_of_numpy_whatever_company_and_length(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder()) as (some, stats):
        together = await some.embed(TEXTS)
        assert_allclose(together.values, [mean(text) for text in TEXTS], atol=1e-6)
        assert together.tokens == sum(len(ids(text)) for text in TEXTS)
        alone = await asyncio.gather(*(some.embed([text]) for text in TEXTS))
        assert_allclose(np.concatenate([found.values for found in alone]), together.values, atol=1e-6)
        # Texts of different callers shared runs.
        assert stats.execution_count < stats.inference_count
    assert (some.stats.texts, some.stats.tokens) == (2 * len(TEXTS), 2 * together.tokens)


@pytest.mark.parametrize(
    ("pooling", "by_hand"),
    [("cls", lambda rows: rows[0]), ("last", lambda rows: rows[-1]), ("max", lambda rows: rows.max(axis=0))],
    ids=["cls", "last", "max"],
)
async def test_each_pooling_is_that_of_numpy(tmp_path: Path, pooling: str, by_hand: Any) -> None:
    async with encoder(tmp_path, text_models.embedder(pooling=pooling)) as (some, _):
        found = await some.embed(TEXTS)
    assert_allclose(found.values, [by_hand(TABLE[ids(text)]) for text in TEXTS], atol=1e-6)


async def test_token_ids_are_as_good_as_their_text_with_and_without_the_special_ones(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder()) as (some, _):
        found = await some.embed([words(1, 2), [5, 6], [2, 5, 6, 3]])
        assert found.tokens == 12
        assert_allclose(found.values, [mean(words(1, 2))] * 3, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        (["w1", ""], "input[1]"),
        ([[5], []], "input[1]"),
        ([[5, 100]], "input[0]"),
        ([[-1]], "input[0]"),
        ([[2**70]], "input[0]"),
    ],
    ids=["empty", "no ids", "too high", "negative", "huge"],
)
async def test_a_bad_input_is_named_and_its_neighbours_are_not_disturbed(
    tmp_path: Path, inputs: Sequence[Any], param: str
) -> None:
    async with encoder(tmp_path, text_models.embedder()) as (some, _):
        beside = asyncio.ensure_future(some.embed(TEXTS))
        with pytest.raises(InvalidParameterError) as caught:
            await some.embed(inputs)
        assert caught.value.param == param
        assert_allclose((await beside).values, [mean(text) for text in TEXTS], atol=1e-6)


LONG = words(*range(60))  # 62 tokens with the special ones, the model takes 32


async def test_a_text_that_is_too_long_is_refused_with_both_numbers(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder()) as (some, _):
        with pytest.raises(ContextLengthError, match="at most 32 tokens in 'input\\[1\\]', got 62"):
            await some.embed(["w1", LONG])


async def test_a_text_that_is_too_long_is_cut_where_the_model_says_so(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder(long_text="truncate")) as (some, _):
        found = await some.embed([LONG])
    assert found.tokens == 32
    assert_allclose(found.values[0], mean(words(*range(30))), atol=1e-6)
    assert some.stats.truncated == 1


async def test_a_text_that_is_too_long_is_read_in_parts_where_the_model_says_so(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder(long_text="chunk", max_tokens=27)) as (some, _):
        found = await some.embed(["w1", LONG])
    parts = [words(*range(20)), words(*range(20, 40)), words(*range(40, 60))]
    assert found.tokens == 3 + 66
    assert_allclose(found.values, [mean("w1"), np.mean([mean(part) for part in parts], axis=0)], atol=1e-6)
    assert some.stats.chunked == 1


async def test_vectors_are_cut_and_scaled_where_the_model_allows_it(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder(dimensions=[4], normalise=True)) as (some, _):
        found = await some.embed(["w1 w2"], dimensions=4)
        expected = mean("w1 w2")[:4]
        assert_allclose(found.values[0], expected / np.linalg.norm(expected), atol=1e-6)
        assert (await some.embed(["w1"], dimensions=8)).values.shape == (1, 8)
        with pytest.raises(InvalidParameterError, match="one of 4, got 3") as caught:
            await some.embed(["w1"], dimensions=3)
        assert caught.value.param == "dimensions"


async def test_vectors_are_not_cut_where_the_model_says_nothing(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder()) as (some, _):
        with pytest.raises(InvalidParameterError, match="cannot be cut, got 4"):
            await some.embed(["w1"], dimensions=4)


async def test_prompts_are_put_before_the_texts_they_are_for(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder(prompts={"query": "w9 ", "passage": "w8 "})) as (some, _):
        query = await some.embed(["w1"], kind="query")
        document = await some.embed(["w1"], kind="document")
        plain = await some.embed(["w1"])
        with pytest.raises(InvalidParameterError, match="one of passage, query, got 'else'"):
            await some.embed(["w1"], kind="else")
    expected = [mean("w9 w1"), mean("w8 w1"), mean("w1")]
    assert_allclose(np.concatenate([query.values, document.values, plain.values]), expected, atol=1e-6)


async def test_documents_are_ranked_by_similarity_where_the_model_embeds(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder()) as (some, _):
        ranking = await some.rerank("w1 w2", ["w50", "w1 w2", "w2"])
        with pytest.raises(InvalidParameterError) as caught:
            await some.rerank("w1", ["w2", ""])
        assert caught.value.param == "documents[1]"
    vectors = np.array([mean(text) for text in ("w1 w2", "w50", "w1 w2", "w2")])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert ranking.method == "embedding"
    assert_allclose(ranking.scores, vectors[1:] @ vectors[0], atol=1e-6)


def pair_logit(query: str, document: str) -> float:
    first = 2 + sum(ids(query)[1:-1]) + 3
    second = sum(ids(document)[1:-1]) + 3
    return 0.0001 * first + 0.01 * second


async def test_a_cross_encoder_reads_query_and_document_together(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.scorer(1, task="rerank")) as (some, _):
        ranking = await some.rerank("w3", ["w90 w2", "w5", "w1 w2 w3"])
        with pytest.raises(ContextLengthError, match="'documents\\[0\\]'"):
            await some.rerank("w3", [words(*range(20))])
        with pytest.raises(ContextLengthError, match="'query'"):
            await some.rerank(words(*range(20)), ["w3"])
    expected = [1 / (1 + np.exp(-pair_logit("w3", d))) for d in ("w90 w2", "w5", "w1 w2 w3")]
    assert ranking.method == "cross-encoder"
    assert_allclose(ranking.scores, expected, atol=1e-6)


async def test_labels_have_the_scores_of_the_activation(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.scorer(3, task="classify", labels=["a", "b", "c"])) as (some, _):
        one = await some.classify(["w1 w2", "w3"])
        many = await some.classify(["w1 w2", "w3"], activation="sigmoid")
        raw = await some.classify(["w1 w2", "w3"], activation="none")
        with pytest.raises(InvalidParameterError, match="for embeddings, this one is for classification"):
            await some.embed(["w1"])
    logits = np.array([[0.0001 * sum(ids(t)) + step for step in range(3)] for t in ("w1 w2", "w3")])
    assert_allclose(raw.values, logits, atol=1e-6)
    assert_allclose(many.values, 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert_allclose(one.values, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), atol=1e-6)


async def test_many_texts_do_not_fill_the_queue(tmp_path: Path) -> None:
    files = text_models.embedder()
    files["inferway.toml"] += b"\n[batching]\nmax_queue_rows = 256\n"
    async with encoder(tmp_path, files) as (some, _):
        texts = [words(*range(n % 29)) or "w1" for n in range(2048)]
        found = await some.embed(texts)
        assert_allclose(found.values[-3:], [mean(text) for text in texts[-3:]], atol=1e-6)


async def test_texts_of_a_model_that_is_not_batched_run_one_by_one(tmp_path: Path) -> None:
    files = text_models.embedder()
    files["inferway.toml"] += b"\n[batching]\nenabled = false\n"
    async with encoder(tmp_path, files) as (some, stats):
        found = await some.embed(["w1", "w2", "w3"])
        assert_allclose(found.values, [mean("w1"), mean("w2"), mean("w3")], atol=1e-6)
        assert stats.execution_count == stats.inference_count == 3


async def test_a_deadline_that_has_passed_ends_the_work(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder()) as (some, _):
        with pytest.raises(DeadlineExceededError):
            await some.embed(TEXTS, call=Call(asyncio.get_running_loop().time() - 1))


async def test_a_caller_that_leaves_does_not_disturb_the_others(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder()) as (some, _):
        leaving = asyncio.ensure_future(some.embed(TEXTS * 20))
        staying = asyncio.ensure_future(some.embed(TEXTS))
        await asyncio.sleep(0)
        leaving.cancel()
        assert_allclose((await staying).values, [mean(text) for text in TEXTS], atol=1e-6)
        with pytest.raises(asyncio.CancelledError):
            await leaving


class Picky:
    """A tokenizer that fails on one text."""

    vocabulary = 100
    single = Template((2,), (), (3,))
    pair = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if "bad" in texts:
            raise ModelExecutionError("the model's tokenizer failed on a text of this request")
        return [[4]] * len(texts)


async def test_long_texts_are_encoded_in_turns_and_longer_ones_not_at_all(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder(long_text="truncate")) as (some, _):
        encode = cast(Any, some._tokenizer).encode
        sizes: list[int] = []

        class Counting:
            def encode(self, texts: Sequence[str]) -> list[list[int]]:
                sizes.append(sum(map(len, texts)))
                found: list[list[int]] = encode(texts)
                return found

        for lane in (some._short, some._long):
            assert lane is not None
            lane._tokenizer = cast(Any, Counting())
        encoded = await some.embed([f"w{i} " * 100_000 for i in range(9)])
        assert_allclose(encoded.values, [mean(words(*[i] * 30)) for i in range(9)], atol=1e-6)
        assert len(sizes) == 3
        assert max(sizes) <= 1_000_000
        long = "w1" * 500_001
        for work, param in ((some.embed(["w1", long]), "input[1]"), (some.rerank("w1", ["w2", long]), "documents[1]")):
            with pytest.raises(InvalidParameterError, match="1000002") as caught:
                await work
            assert caught.value.param == param


async def test_a_text_that_the_tokenizer_fails_on_fails_alone(tmp_path: Path) -> None:
    async with encoder(tmp_path, text_models.embedder()) as (some, _):
        picky = TextEncoder(some._executor, some.spec, Picky())
        jobs = [picky.embed([text]) for text in ("w1", "w1", "bad", "w1")]
        found = await asyncio.gather(*jobs, return_exceptions=True)
    assert [isinstance(one, ModelExecutionError) for one in found] == [False, False, True, False]


@pytest.mark.parametrize("size", [1e3, 1e4], ids=str)
def test_activations_do_not_overflow(size: float) -> None:
    logits = np.array([[size, -size, 0]], np.float32)
    assert_allclose(activated(logits, "sigmoid"), [[1, 0, 0.5]])
    assert_allclose(activated(logits, "softmax"), [[1, 0, 0]])


async def test_a_graph_that_takes_texts_themselves_embeds(tmp_path: Path) -> None:
    class Strings:
        """An executor whose vectors are a text's length and its first character."""

        signature = string_signature()
        inline = False
        row_exact = True

        def run_inline(self, request: Any) -> None:
            return None

        async def infer(self, request: Any) -> Any:
            texts = request.inputs["text"]

            class Found:
                outputs = (np.array([[len(t), ord(t[0])] for t in texts], np.float32),)

            return Found()

        async def drain(self, timeout_s: float) -> int:
            return 0

        async def close(self) -> bool:
            return True

    some = string_encoder(Strings())
    assert some is not None
    found = await some.embed(["abc", "z"] * 10)
    assert_allclose(found.values, [[3, 97], [1, 122]] * 10)
    with pytest.raises(InvalidParameterError, match="reads texts, not token ids"):
        await some.embed([[1, 2]])


def string_signature() -> Signature:
    return Signature((TensorSpec("text", "BYTES", (-1,)),), (TensorSpec("vector", "FP32", (-1, 2)),), batched=True)


def test_a_signature_of_something_else_is_no_embedder() -> None:
    text, vector = TensorSpec("text", "BYTES", (-1,)), TensorSpec("vector", "FP32", (-1, 2))
    for signature in (
        Signature((text,), (TensorSpec("vector", "INT64", (-1, 2)),)),
        Signature((text, text), (vector,)),
        Signature((TensorSpec("text", "BYTES", (3,)),), (vector,)),
        Signature((TensorSpec("x", "FP32", (-1,)),), (vector,)),
    ):
        assert string_spec(signature) is None
