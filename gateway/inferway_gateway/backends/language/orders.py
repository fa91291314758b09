"""What goes between a language model's face in the gateway and its engine, wherever that runs: plain values.

An engine in a process of its own gets them as JSON, one text a frame; nothing is pickled. What it says is held against
its shape before it is believed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ...core.errors import (
    DeadlineExceededError,
    GatewayError,
    InternalError,
    MemoryExceededError,
    ModelExecutionError,
    QueueFullError,
    ShuttingDownError,
    WorkerCrashedError,
)
from ...core.generation import (
    Constraint,
    ContextLengthError,
    FinishReason,
    GenerationParameterError,
    GenerationRequest,
    Sampling,
)

_CODES: Final[dict[str, type[GatewayError]]] = {
    kind.code: kind
    for kind in (
        QueueFullError,
        DeadlineExceededError,
        ShuttingDownError,
        ModelExecutionError,
        WorkerCrashedError,
        MemoryExceededError,
        InternalError,
    )
}

RawLogprob = tuple[int, float, tuple[tuple[int, float], ...]]
"""A token, its logarithmic probability, and the likeliest tokens with theirs."""


@dataclass(frozen=True, slots=True)
class Order:
    """A checked request as the engine takes it.

    Attributes:
        number: of the request, by which it is cancelled and its pieces come back.
        max_tokens: filled in; with the prompt it fits the context.
    """

    number: int
    request: GenerationRequest
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step gave to one request.

    Attributes:
        finish: set in the last piece, with ``cached``, the prompt's tokens that needed no reading.
    """

    number: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[RawLogprob, ...] = ()
    finish: FinishReason | None = None
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that ended without an answer."""

    number: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, number: int, error: GatewayError) -> Failure:
        param = error.param if isinstance(error, GenerationParameterError) else None
        code = "context_length" if isinstance(error, ContextLengthError) else error.code
        return cls(number, code, error.message, param, error.retry_after_s)

    def error(self) -> GatewayError:
        if self.code == "context_length":
            return ContextLengthError(self.message, self.param)
        if self.code == GenerationParameterError.code:
            return GenerationParameterError(self.message, self.param)
        kind = _CODES.get(self.code, InternalError)
        return kind(self.message, retry_after_s=self.retry_after_s)


@dataclass(frozen=True, slots=True)
class Gauges:
    """How the engine is. ``freed`` are numbers of steps that began between a cancellation and its slot's being free,
    one for each slot that became free since the last report."""

    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0
    steps: int = 0
    freed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that one step gave."""

    pieces: Sequence[Piece | Failure] = field(default_factory=tuple)
    gauges: Gauges = field(default_factory=Gauges)


def write_order(order: Order) -> bytes:
    request, sampling = order.request, order.request.sampling
    members = {
        "n": order.number,
        "p": request.prompt,
        "m": order.max_tokens,
        "s": [
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.seed,
            list(sampling.logit_bias.items()),
        ],
        "stop": request.stop,
        "lp": request.logprobs,
        "c": None if request.constraint is None else [request.constraint.kind, request.constraint.text],
        "ie": request.ignore_end,
        "a": request.adapter,
        "pr": request.priority,
        "k": request.key_id,
        "d": request.deadline,
    }
    return json.dumps(members, separators=(",", ":")).encode()


def read_order(raw: bytes) -> Order:
    m = json.loads(raw)
    *numbers, bias = m["s"]
    request = GenerationRequest(
        tuple(m["p"]),
        m["m"],
        replace(Sampling(*numbers), logit_bias={int(token): float(value) for token, value in bias}),
        tuple(m["stop"]),
        m["lp"],
        None if m["c"] is None else Constraint(*m["c"]),
        m["ie"],
        m["a"],
        m["pr"],
        m["k"],
        m["d"],
    )
    return Order(m["n"], request, m["m"])


def write_report(report: Report) -> bytes:
    gauges = report.gauges
    pieces: list[list[Any]] = []
    for piece in report.pieces:
        if isinstance(piece, Piece):
            pieces.append([piece.number, piece.text, piece.tokens, piece.logprobs, piece.finish, piece.cached])
        else:
            pieces.append([piece.number, piece.code, piece.message, piece.param, piece.retry_after_s])
    told = [gauges.running, gauges.waiting, gauges.kv_bytes, gauges.steps, gauges.freed]
    return json.dumps([pieces, told], separators=(",", ":")).encode()


def read_report(raw: bytes, vocabulary: int) -> Report:
    """What an engine elsewhere says.

    Args:
        vocabulary: token ids lie below it.
    Raises:
        ValueError: it says what no engine says.
    """
    try:
        pieces, told = json.loads(raw)
        running, waiting, kv_bytes, steps, freed = told
        gauges = Gauges(int(running), int(waiting), int(kv_bytes), int(steps), tuple(int(n) for n in freed))
        return Report([_read_piece(piece, vocabulary) for piece in pieces], gauges)
    except (TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"a report has the wrong shape: {type(error).__name__}") from None


def _read_piece(said: list[Any], vocabulary: int) -> Piece | Failure:
    if len(said) == 5:
        number, code, message, param, retry = said
        return Failure(
            int(number),
            str(code),
            str(message)[:2000],
            None if param is None else str(param)[:100],
            None if retry is None else float(retry),
        )
    number, text, tokens, logprobs, finish, cached = said
    if not isinstance(text, str) or finish not in (None, "stop", "length"):
        raise ValueError("a piece has no text, or an unknown end")
    return Piece(
        int(number),
        text,
        tuple(_token(token, vocabulary) for token in tokens),
        tuple(
            (
                _token(token, vocabulary),
                float(value),
                tuple((_token(other, vocabulary), float(its)) for other, its in top),
            )
            for token, value, top in logprobs
        ),
        finish,
        int(cached),
    )


def _token(said: Any, vocabulary: int) -> int:
    token = int(said)
    if not 0 <= token < vocabulary:
        raise ValueError(f"token {token} of a vocabulary of {vocabulary}")
    return token
