"""Embeddings through clients that are not ours: `openai`, both halves of it, and `langchain-openai`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import tiktoken
from langchain_openai import OpenAIEmbeddings
from numpy.testing import assert_allclose

import models
import text_models
from live import LiveGateway, run_gateway
from models import ModelFiles

TABLE = text_models.table()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    root = tmp_path_factory.mktemp("clients")
    files = text_models.embedder(dimensions="any")
    model = files.pop("model.onnx")
    repository = models.write_repository(root / "models", {"embed": ModelFiles({1: model}, files=files)})
    with run_gateway(repository, root / "state") as running:
        yield running


@pytest.fixture(scope="module")
def client(texts: LiveGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{texts.url}/v1", api_key=texts.make_key("infer"), max_retries=0) as client:
        yield client


def mean(*words: int) -> Any:
    return TABLE[[2, *(w + 4 for w in words), 3]].mean(axis=0)


@pytest.mark.parametrize("encoding", ["default", "float", "base64"])
def test_the_openai_package_reads_the_vectors(client: openai.OpenAI, encoding: Any) -> None:
    # It asks for base64 by itself, and decodes what it asked for by itself only.
    asked = {} if encoding == "default" else {"encoding_format": encoding}
    answer = client.embeddings.create(model="embed", input=["w1", "w2 w3"], **asked)
    assert (answer.object, answer.model) == ("list", "embed")
    assert [entry.index for entry in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 7)
    if encoding == "base64":
        assert all(isinstance(entry.embedding, str) for entry in answer.data)
    else:
        assert_allclose([entry.embedding for entry in answer.data], [mean(1), mean(2, 3)], atol=1e-6)


@pytest.mark.parametrize("given", ["w1", ["w1"], [5], [[5]]], ids=str)
def test_it_takes_every_form_of_input(client: openai.OpenAI, given: Any) -> None:
    [entry] = client.embeddings.create(model="embed", input=given, dimensions=4, user="somebody").data
    assert_allclose(entry.embedding, mean(1)[:4], atol=1e-6)


async def test_the_asynchronous_half_reads_them_too(texts: LiveGateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{texts.url}/v1", api_key=texts.make_key("infer")) as client:
        answer = await client.embeddings.create(model="embed", input="w1")
    assert_allclose(answer.data[0].embedding, mean(1), atol=1e-6)


def test_an_error_is_the_class_that_it_is_and_names_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.embeddings.create(model="embed", input=["w1", ""])
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "input[1]",
        "invalid_parameter",
        "invalid_request_error",
    )
    assert "input[1]" in bad.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model="embed", input="w1 " * 50)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="w1")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-none").embeddings.create(model="embed", input="w1")


def test_langchain_embeds_documents_and_queries(texts: LiveGateway) -> None:
    # Its own token counting is for OpenAI's models: switched off, texts go out as texts.
    embeddings = OpenAIEmbeddings(
        model="embed",
        base_url=f"{texts.url}/v1",
        api_key=texts.make_key("infer"),  # type: ignore[arg-type]  # it makes a SecretStr of it
        check_embedding_ctx_length=False,
    )
    assert_allclose(embeddings.embed_documents(["w1", "w2 w3"]), [mean(1), mean(2, 3)], atol=1e-6)
    assert_allclose(embeddings.embed_query("w4"), mean(4), atol=1e-6)
    assert np.asarray(embeddings.embed_documents([f"w{n % 90}" for n in range(1500)])).shape == (1500, 8)


def test_langchain_left_to_itself_is_told_why_its_token_ids_do_not_fit(
    texts: LiveGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It downloads a tokenizer of OpenAI's and sends its ids; here is one of the same kind that needs no download.
    words = {bytes([byte]): 100_000 + byte for byte in range(256)}
    encoding = tiktoken.Encoding("cl100k_base", pat_str=r"\w+|\W", mergeable_ranks=words, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: encoding)
    embeddings = OpenAIEmbeddings(
        model="embed",
        base_url=f"{texts.url}/v1",
        api_key=texts.make_key("infer"),  # type: ignore[arg-type]  # it makes a SecretStr of it
    )
    with pytest.raises(openai.BadRequestError, match="ids are those of the model's own tokenizer") as bad:
        embeddings.embed_query("w4")
    assert bad.value.param == "input[0]"
