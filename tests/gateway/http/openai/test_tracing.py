"""An answer of a text model has a span with OpenTelemetry's names, where somebody traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from generating import FakeGenerator, events, serving
from inferway_contract import models as contract
from inferway_gateway.core.encoding import Encoded, Text, TextEncoder
from inferway_gateway.http.openai import tracing

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
KNOWN = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where the spans of a real SDK go."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # The process's own provider can be set once, and other tests would be traced too.
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return exporter


class OneVector(TextEncoder):
    """Gives the same vector for every text."""

    vocabulary_size = 10

    def __init__(self) -> None:
        """None of the parts that it does without."""

    async def embed(self, inputs: Sequence[Text], **_: Any) -> Encoded:
        return Encoded(np.ones((len(inputs), 2), np.float32), len(inputs))


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_chat_is_exported_with_what_was_asked_and_what_came(exporter: InMemorySpanExporter) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {**HELLO, "temperature": 0.5, "max_tokens": 9, "top_k": 4, "stop": "END", "seed": 7, "n": 2}
    async with serving({"m": FakeGenerator()}) as client:
        answer = (await client.post(CHAT, json=body, headers={"traceparent": parent})).json()
    [span] = exporter.get_finished_spans()
    assert (span.name, span.kind) == ("chat m", trace.SpanKind.SERVER)
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" == parent[3:52]
    assert attributes_of(span) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "inferway",
        "gen_ai.request.model": "m",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 4.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stop_sequences": ("END",),
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "inferway.model.version": 1,
    }
    assert isinstance(attributes_of(span)["gen_ai.request.top_k"], float)


async def test_streams_forms_and_failures_are_told(exporter: InMemorySpanExporter) -> None:
    form = {"type": "json_object"}
    async with serving({"m": FakeGenerator()}) as client:
        streamed = await events(client, CHAT, {**HELLO, "response_format": form, "n": 1})
        await events(client, "/v1/completions", {"model": "m", "prompt": "x"})
        await client.post(CHAT, json={**HELLO, "model": "nobody"})
    chat, completion, failed = exporter.get_finished_spans()
    told = attributes_of(chat)
    assert told["gen_ai.request.stream"] is True
    assert told["gen_ai.output.type"] == "json"
    assert told["gen_ai.response.id"] == streamed[0]["id"]
    assert 0 < told["gen_ai.response.time_to_first_chunk"] < 60
    assert "gen_ai.request.choice.count" not in told
    assert attributes_of(completion)["gen_ai.operation.name"] == "text_completion"
    assert attributes_of(completion)["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes_of(failed)["error.type"] == "model_not_found"
    assert failed.status.status_code is trace.StatusCode.ERROR


async def test_embeddings_are_told(exporter: InMemorySpanExporter) -> None:
    async with serving({"m": OneVector()}) as client:
        body = {"model": "m", "input": ["a", "b"], "encoding_format": "float", "dimensions": 2}
        assert (await client.post("/v1/embeddings", json=body)).status_code == 200
        assert (await client.post("/v1/embeddings", json={**body, "model": "nobody"})).status_code == 404
    done, failed = exporter.get_finished_spans()
    assert done.name == "embeddings m"
    assert attributes_of(done) == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "inferway",
        "gen_ai.request.model": "m",
        "gen_ai.request.encoding_formats": ("float",),
        "gen_ai.embeddings.dimension.count": 2,
        "gen_ai.response.model": "m",
        "gen_ai.usage.input_tokens": 2,
        "inferway.model.version": 1,
    }
    assert attributes_of(failed)["error.type"] == "model_not_found"


async def test_every_name_is_one_of_opentelemetrys(exporter: InMemorySpanExporter) -> None:
    everything: dict[str, Any] = {
        **HELLO, "temperature": 1, "top_p": 1, "top_k": 1, "frequency_penalty": 0, "presence_penalty": 0, "seed": 1,
        "n": 2, "stop": ["a"], "max_completion_tokens": 3, "stream": True, "response_format": {"type": "text"},
    }  # fmt: skip
    assert contract.ChatCompletionRequest.model_validate(everything).n == 2
    async with serving({"m": FakeGenerator(), "e": OneVector()}) as client:
        await events(client, CHAT, everything)
        await client.post("/v1/embeddings", json={"model": "e", "input": "a", "dimensions": 2})
    names = _names(exporter.get_finished_spans())
    assert len(names) > 15
    assert {name for name in names if name.startswith("gen_ai.")} <= KNOWN
    assert {name for name in names if not name.startswith("gen_ai.")} == {"inferway.model.version"}


def _names(spans: Sequence[ReadableSpan]) -> set[str]:
    return {name for span in spans for name in attributes_of(span)}


async def test_without_the_extra_nothing_is_traced(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "trace", None)
    async with serving({"m": FakeGenerator()}) as client:
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
    assert exporter.get_finished_spans() == ()
