"""What the client makes of text answers is what the contract's models have in them, and the other way round.

Each answer is made of the contract's own models with a value of its own in every member, and read by the client. Then
every value has to be found again, and no member of a result may be left at its default.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

import inferway
from inferway import Inferway
from inferway._core import Reply
from inferway._encoding import classify_call, embeddings_call, rerank_call
from inferway._options import OPTION_NAMES
from inferway._text import ChatParameters, ChatRequest, CompletionParameters, CompletionRequest
from inferway.resources.chat import Chat
from inferway.resources.completions import Completions
from inferway.resources.embeddings import Embeddings
from inferway_contract import models as contract

RAW_ONLY = {"object", "type", "system_fingerprint"}
"""Members that say the same in every answer, or nothing yet; who wants them finds them in ``raw``."""
NAMED_BY_THE_ROUTE = {"id"}
"""Of rankings and classes: the request's id, which the client tells as such."""

USAGE = contract.CompletionUsage(
    prompt_tokens=101,
    completion_tokens=102,
    total_tokens=103,
    prompt_tokens_details=contract.PromptTokensDetails(cached_tokens=104),
)
ENCODED = contract.EncodingUsage(prompt_tokens=105, total_tokens=106)
LOGPROBS = contract.ChoiceLogprobs(
    content=[
        contract.TokenLogprobs(
            token="tok",
            logprob=-0.125,
            bytes=[107],
            top_logprobs=[contract.TopLogprob(token="other", logprob=-0.25, bytes=[108])],
        )
    ]
)
LISTED = contract.CompletionLogprobs(
    tokens=["one"], token_logprobs=[-0.5], top_logprobs=[{"two": -0.75}], text_offset=[109]
)
CHAT = contract.ChatCompletion(
    id="chat-1",
    created=110,
    model="smol",
    choices=[
        contract.ChatChoice(
            index=0,
            message=contract.AssistantMessage(
                role="assistant",
                content="Hello",
                refusal="No",
                tool_calls=[
                    contract.AnsweredToolCall(
                        id="call-1",
                        type="function",
                        function=contract.AnsweredFunctionCall(name="weather", arguments='{"city": "Bern"}'),
                    )
                ],
            ),
            finish_reason="tool_calls",
            logprobs=LOGPROBS,
        )
    ],
    usage=USAGE,
)
CHUNKS = (
    contract.ChatCompletionChunk(
        id="chat-1",
        created=110,
        model="smol",
        choices=[
            contract.ChatChunkChoice(
                index=0,
                delta=contract.ChatDelta(
                    role="assistant",
                    content="Hello",
                    refusal="No",
                    tool_calls=[
                        contract.ToolCallDelta(
                            index=0,
                            id="call-1",
                            type="function",
                            function=contract.FunctionCallDelta(name="weather", arguments='{"city": "Bern"}'),
                        )
                    ],
                ),
                finish_reason="tool_calls",
                logprobs=LOGPROBS,
            )
        ],
    ),
    contract.ChatCompletionChunk(id="chat-1", created=110, model="smol", choices=[], usage=USAGE),
)
COMPLETION = contract.Completion(
    id="cmpl-1",
    created=110,
    model="smol",
    choices=[contract.CompletionChoice(index=0, text="Paris", finish_reason="length", logprobs=LISTED)],
    usage=USAGE,
)
EMBEDDINGS = contract.EmbeddingList(
    data=[contract.Embedding(index=0, embedding=[0.5, 0.25])], model="mini", usage=ENCODED
)
RANKING = contract.RerankAnswer(
    id="req-1",
    model="mini",
    method="cross-encoder",
    results=[contract.RankedResult(index=0, relevance_score=0.625, document=contract.RankedDocument(text="a text"))],
    usage=ENCODED,
)
CLASSES = contract.ClassificationList(
    id="req-1",
    model="mini",
    data=[
        contract.Classification(
            index=0, label="good", score=0.875, scores=[contract.LabelScore(label="good", score=0.875)]
        )
    ],
    usage=ENCODED,
)


def whole(call: Any, answer: BaseModel) -> Any:
    return call.read(Reply(200, (), answer.model_dump_json(by_alias=True).encode()))


def streamed(request: Any, *chunks: BaseModel) -> Any:
    gathering = request.gather()
    for chunk in chunks:
        list(gathering.add(json.loads(chunk.model_dump_json())))
    return gathering.snapshot()


def chat() -> ChatRequest:
    return ChatRequest("Hi", "smol", False, None, None, None, {})


READ: dict[str, tuple[BaseModel, Callable[[], Any], set[str]]] = {
    "chat": (CHAT, lambda: whole(chat().call, CHAT), set()),
    "streamed chat": (CHAT, lambda: streamed(chat(), *CHUNKS), set()),
    "completion": (COMPLETION, lambda: whole(CompletionRequest("x", "smol", False, {}).call, COMPLETION), set()),
    "streamed completion": (
        COMPLETION,
        lambda: streamed(CompletionRequest("x", "smol", True, {}), COMPLETION),
        set(),
    ),
    "embeddings": (EMBEDDINGS, lambda: whole(embeddings_call("x", "mini", None, None, None), EMBEDDINGS), set()),
    "ranking": (
        RANKING,
        lambda: whole(rerank_call("x", ["a text"], "mini", None, True), RANKING),
        NAMED_BY_THE_ROUTE,
    ),
    "classes": (CLASSES, lambda: whole(classify_call("x", "mini", None), CLASSES), NAMED_BY_THE_ROUTE),
}


def leaves(value: Any, left_out: set[str]) -> Iterator[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in ("raw", "_format")}
    if isinstance(value, Mapping):
        for name, member in value.items():
            if name not in left_out:
                yield from leaves(member, left_out)
                if name not in KNOWN_NAMES:
                    yield name  # a mapping by values, such as label to score
    elif isinstance(value, np.ndarray):
        yield from value.ravel().tolist()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item, left_out)
    elif value is not None:
        yield value


def _names(kind: type[BaseModel], seen: set[type] | None = None) -> set[str]:
    seen = set() if seen is None else seen
    found: set[str] = set()
    if kind not in seen:
        seen.add(kind)
        for name, member in kind.model_fields.items():
            found.add(name)
            for inner in _models_in(member.annotation):
                found |= _names(inner, seen)
    return found


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


RESULTS = (
    inferway.ChatCompletion, inferway.ChatChoice, inferway.ChatMessage, inferway.ToolCall, inferway.Usage,
    inferway.Completion, inferway.CompletionChoice, inferway.EmbeddingResult, inferway.RerankResult, inferway.Ranked,
    inferway.ClassifyResult, inferway.Classified,
)  # fmt: skip
KNOWN_NAMES = {name for answer, _, _ in READ.values() for name in _names(type(answer))} | {
    f.name for result in RESULTS for f in dataclasses.fields(result)
}


@pytest.mark.parametrize("name", sorted(READ))
def test_every_value_of_an_answer_is_in_the_result(name: str) -> None:
    answer, read, left_out = READ[name]
    sent = set(leaves(json.loads(answer.model_dump_json()), RAW_ONLY | left_out))
    assert len(sent) > 4
    assert sent - {0} <= set(leaves(read(), set()))


@pytest.mark.parametrize("name", sorted(READ))
def test_every_member_of_a_result_is_filled_by_some_answer(name: str) -> None:
    _, read, _ = READ[name]
    for result in instances(read()):
        for member in dataclasses.fields(result):
            if member.name.startswith("_"):
                continue
            if name in ("embeddings", "ranking", "classes") and member.name in ("completion_tokens", "cached_tokens"):
                continue  # nothing is written or remembered by an encoder
            value = getattr(result, member.name)
            filled = value.size > 0 if isinstance(value, np.ndarray) else value not in (None, "", (), [], {})
            assert filled, (type(result).__name__, member.name)


def instances(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        for member in dataclasses.fields(value):
            if member.name != "raw":
                yield from instances(getattr(value, member.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from instances(item)


def test_no_kind_of_result_is_left_out() -> None:
    seen = {type(result) for _, read, _ in READ.values() for result in instances(read())}
    assert seen == set(RESULTS)


def members_of(method: Callable[..., Any], parameters: Any = None) -> set[str]:
    """What a method of the client can say, less the options of the request itself."""
    named = {name for name in inspect.signature(method).parameters if name not in ("self", "options", "parameters")}
    return (named | set(getattr(parameters, "__annotations__", ()))) - OPTION_NAMES - {"extra_body"}


SAID: dict[str, tuple[type[BaseModel], set[str], set[str]]] = {
    # The last: what the client says by itself, or leaves to extra_body.
    "chat": (
        contract.ChatCompletionRequest,
        members_of(Chat.create, ChatParameters),
        {"stream_options", "ignore_eos"},
    ),
    "completion": (
        contract.CompletionRequest,
        members_of(Completions.create, CompletionParameters),
        # The gateway refuses suffix and best_of; guided_json says what response_format would.
        {"stream_options", "ignore_eos", "suffix", "best_of", "response_format"},
    ),
    "embeddings": (contract.EmbeddingsRequest, members_of(Embeddings.create), {"encoding_format"}),
    "embed": (
        contract.EmbeddingsRequest,
        members_of(Inferway.embed) - {"texts"} | {"input"},
        {"encoding_format", "user"},
    ),
    "ranking": (contract.RerankRequest, members_of(Inferway.rerank), set()),
    "classes": (contract.ClassifyRequest, members_of(Inferway.classify) - {"texts"} | {"input"}, {"user"}),
}


@pytest.mark.parametrize("name", sorted(SAID))
def test_a_request_can_say_what_the_contract_knows_and_nothing_else(name: str) -> None:
    model, said, left_out = SAID[name]
    assert said.isdisjoint(left_out)
    assert said | left_out == set(model.model_fields)
