"""A span for each answer of a language model, with OpenTelemetry's names for generative AI.

Only where ``opentelemetry-api`` is installed (the extra ``inferway[otel]``); it does nothing until an SDK is set up
beside it. Names: OpenTelemetry, "Semantic conventions for generative AI spans".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from inferway_contract import models as contract

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


class Span:
    """One answer's span. Does nothing where nobody traces.

    Args:
        operation: ``chat`` or ``text_completion``.
        fields: the request's headers, where the caller's own span may be named.
        tracer: for tests; by default that of the process.
    """

    __slots__ = ("_span",)

    def __init__(
        self, operation: str, body: contract.GenerationOptions, fields: Mapping[bytes, bytes], tracer: Any = None
    ) -> None:
        self._span: Any = None
        if trace is None:
            return
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
        for member, name in _ASKED:
            value = getattr(body, member)
            if value is not None:
                attributes[name] = value
        most = getattr(body, "max_completion_tokens", None) or body.max_tokens
        if most is not None:
            attributes["gen_ai.request.max_tokens"] = most
        self._span = (tracer or trace.get_tracer("inferway_gateway")).start_span(
            f"{operation} {body.model}",
            context=propagate.extract(carrier) if carrier else None,
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
        )

    def end(
        self,
        error: str | None,
        usage: Mapping[str, Any] | None = None,
        reasons: Sequence[str | None] = (),
        version: int | None = None,
    ) -> None:
        """The answer is over.

        Args:
            error: contract code of what went wrong.
            usage: as the answer tells it.
        """
        span = self._span
        if span is None:
            return
        if usage is not None:
            span.set_attribute("gen_ai.usage.input_tokens", usage["prompt_tokens"])
            span.set_attribute("gen_ai.usage.output_tokens", usage["completion_tokens"])
        if version is not None:
            span.set_attribute("inferway.model.version", version)
        ended = [reason for reason in reasons if reason is not None]
        if ended:
            span.set_attribute("gen_ai.response.finish_reasons", ended)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(trace.StatusCode.ERROR)
        span.end()
