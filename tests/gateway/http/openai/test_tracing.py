"""An answer of a language model has a span with OpenTelemetry's names, where somebody traces."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry import trace

from generating import FakeGenerator, events, serving
from inferway_gateway.http.openai import tracing

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


class Recorded:
    """A span that keeps what it is told."""

    def __init__(self, name: str, parent: Any, attributes: dict[str, Any]) -> None:
        self.name = name
        self.parent = parent
        self.attributes = attributes
        self.status: Any = None
        self.ended = 0

    def set_attribute(self, name: str, value: Any) -> None:
        self.attributes[name] = value

    def set_status(self, status: Any) -> None:
        self.status = status

    def end(self) -> None:
        self.ended += 1


class Tracer:
    """Makes spans that keep what they are told."""

    def __init__(self) -> None:
        self.spans: list[Recorded] = []

    def start_span(self, name: str, context: Any, kind: Any, attributes: dict[str, Any]) -> Recorded:
        assert kind is trace.SpanKind.SERVER
        self.spans.append(Recorded(name, context, attributes))
        return self.spans[-1]


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Tracer:
    tracer = Tracer()
    monkeypatch.setattr(trace, "get_tracer", lambda _: tracer)
    return tracer


async def test_an_answer_has_a_span(tracer: Tracer) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serving({"m": FakeGenerator()}) as client:
        body = {**HELLO, "temperature": 0.5, "max_tokens": 9}
        await client.post(CHAT, json=body, headers={"traceparent": parent})
        await events(client, "/v1/completions", {"model": "m", "prompt": "x"})
        await client.post(CHAT, json={**HELLO, "model": "nobody"})
    chat, completion, failed = tracer.spans
    assert chat.name == "chat m"
    assert trace.get_current_span(chat.parent).get_span_context().trace_id == int(parent[3:35], 16)
    assert chat.attributes["gen_ai.operation.name"] == "chat"
    assert chat.attributes["gen_ai.request.temperature"] == 0.5
    assert chat.attributes["gen_ai.request.max_tokens"] == 9
    assert chat.attributes["gen_ai.usage.output_tokens"] == 3
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert completion.attributes["gen_ai.operation.name"] == "text_completion"
    assert completion.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert failed.attributes["error.type"] == "model_not_found"
    assert failed.status is trace.StatusCode.ERROR
    assert [span.ended for span in tracer.spans] == [1, 1, 1]


async def test_without_the_extra_nothing_is_traced(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "trace", None)
    async with serving({"m": FakeGenerator()}) as client:
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
    assert tracer.spans == []
