"""A span for each answer of a language model or an embedder, with OpenTelemetry's names for generative AI.

Only where ``opentelemetry-api`` is installed (the extra ``inferway[otel]``); it does nothing until an SDK is set up
beside it. Names: OpenTelemetry, "Semantic conventions for generative AI spans", as they stood in November 2026, when
none of them was stable yet. Prompts and answers are not among the attributes: they may be secret, and they are long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, Final

from inferway_contract import models as contract

from ...core.errors import CancelledByCallerError, GatewayError, InternalError

try:
    from opentelemetry import propagate, trace
except ImportError:  # the extra is not installed
    propagate = trace = None  # type: ignore[assignment]  # looked at before use

PROVIDER: Final = "inferway"
_ASKED: Final = (
    ("temperature", "gen_ai.request.temperature"),
    ("top_p", "gen_ai.request.top_p"),
    ("top_k", "gen_ai.request.top_k"),
    ("frequency_penalty", "gen_ai.request.frequency_penalty"),
    ("presence_penalty", "gen_ai.request.presence_penalty"),
    ("seed", "gen_ai.request.seed"),
    ("n", "gen_ai.request.choice.count"),
)
_REAL: Final = frozenset({"temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty"})
"""Members whose attributes are of the type ``double``; one of another type would be dropped by strict backends."""


def code_of(error: BaseException) -> str:
    """The contract's code of what ended an answer."""
    if isinstance(error, GatewayError):
        return error.code
    return CancelledByCallerError.code if isinstance(error, asyncio.CancelledError) else InternalError.code


class Span:
    """One answer's span. Does nothing where nobody traces.

    Args:
        operation: ``chat``, ``text_completion`` or ``embeddings``.
        fields: the request's headers, where the caller's own span may be named.
        tracer: for tests; by default that of the process.
    """

    __slots__ = ("_span", "_started")

    def __init__(
        self,
        operation: str,
        body: contract.GenerationOptions | contract.EmbeddingsRequest,
        fields: Mapping[bytes, bytes],
        tracer: Any = None,
    ) -> None:
        self._span: Any = None
        self._started = perf_counter()
        if trace is None or (tracer is None and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)):
            return  # no SDK is set up: what is told would go nowhere
        carrier = {
            name: fields[name.encode()].decode("latin-1")
            for name in ("traceparent", "tracestate")
            if name.encode() in fields
        }
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": body.model,
        }
        if isinstance(body, contract.EmbeddingsRequest):
            attributes |= _of_embeddings(body)
        else:
            attributes |= _of_generation(body)
        self._span = (tracer or trace.get_tracer("inferway_gateway")).start_span(
            f"{operation} {body.model}",
            context=propagate.extract(carrier) if carrier else None,
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
        )

    def began(self) -> None:
        """The first piece of the answer is there."""
        if self._span is not None:
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", perf_counter() - self._started)

    def end(
        self,
        error: str | None,
        usage: Mapping[str, Any] | None = None,
        reasons: Sequence[str | None] = (),
        version: int | None = None,
        *,
        model: str | None = None,
        identity: str | None = None,
    ) -> None:
        """The answer is over.

        Args:
            error: contract code of what went wrong.
            usage: as the answer tells it.
            version, model: which one answered, where an alias or a fallback may have chosen.
            identity: the answer's ``id``.
        """
        span = self._span
        if span is None:
            return
        if usage is not None:
            span.set_attribute("gen_ai.usage.input_tokens", usage["prompt_tokens"])
            if "completion_tokens" in usage:
                span.set_attribute("gen_ai.usage.output_tokens", usage["completion_tokens"])
            cached = usage.get("prompt_tokens_details", {}).get("cached_tokens")
            if cached is not None:
                span.set_attribute("gen_ai.usage.cache_read.input_tokens", cached)
        for name, value in (
            ("inferway.model.version", version),
            ("gen_ai.response.model", model),
            ("gen_ai.response.id", identity),
        ):
            if value is not None:
                span.set_attribute(name, value)
        ended = [reason for reason in reasons if reason is not None]
        if ended:
            span.set_attribute("gen_ai.response.finish_reasons", ended)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(trace.StatusCode.ERROR)
        span.end()


def _of_generation(body: contract.GenerationOptions) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for member, name in _ASKED:
        value = getattr(body, member)
        if value is not None:
            attributes[name] = float(value) if member in _REAL else value
    if body.n == 1:
        del attributes["gen_ai.request.choice.count"]  # told where it is not one
    most = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if most is not None:
        attributes["gen_ai.request.max_tokens"] = most
    if body.stop is not None:
        attributes["gen_ai.request.stop_sequences"] = [body.stop] if isinstance(body.stop, str) else list(body.stop)
    if body.stream:
        attributes["gen_ai.request.stream"] = True
    form = body.response_format
    if form is not None:
        attributes["gen_ai.output.type"] = "text" if form.type == "text" else "json"
    return attributes


def _of_embeddings(body: contract.EmbeddingsRequest) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    if body.dimensions is not None:
        attributes["gen_ai.embeddings.dimension.count"] = body.dimensions
    if body.encoding_format is not None:
        attributes["gen_ai.request.encoding_formats"] = [body.encoding_format]
    return attributes
