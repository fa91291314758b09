"""Text in, text out: what is asked of a language model, what comes back, and what a backend of one promises.

A prompt is token ids by the time it is here: templates and tokenizers belong to whoever speaks to the caller. What
comes back is a sequence of deltas, each with whole characters only: a character whose bytes are spread over tokens, and
a text that may yet become a stop string, wait until they are complete.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from .errors import ContextLengthError as ContextLengthError  # told of with the others here
from .errors import InvalidParameterError
from .stats import Histogram

FinishReason = Literal["stop", "length"]
"""stop: the model ended, or a stop string or token came. length: ``max_tokens`` or the context's end was reached."""
ConstraintKind = Literal["json_object", "json_schema", "regex", "lark", "choice"]

MAX_STOP_STRINGS: Final = 16
MAX_TOP_LOGPROBS: Final = 20
MAX_LOGIT_BIASES: Final = 1024

TOKEN_SECONDS_BOUNDS: Final = (
    1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 1.5e-2, 2.5e-2, 5e-2, 7.5e-2, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
)  # fmt: skip
STEPS_BOUNDS: Final = (0.0, 1.0, 2.0, 3.0, 4.0, 8.0)


_LEAST_CHARACTERS: Final = 1 << 20
_CHARACTERS_A_TOKEN: Final = 16
"""More than a text that fills a context has on the average."""


def most_characters(context_length: int) -> int:
    """Of a text that is encoded at all: what is longer does not fit the context, and encoding takes some 300 bytes of
    memory for each character."""
    return max(_LEAST_CHARACTERS, _CHARACTERS_A_TOKEN * context_length)


def check_characters(characters: int, context_length: int) -> None:
    """Raises ``ContextLengthError``."""
    most = most_characters(context_length)
    if characters > most:
        raise ContextLengthError(
            f"the model takes at most {context_length} tokens, too few for a text of more than {most} characters; the "
            f"prompt has {characters}",
            "prompt",
        )


GenerationParameterError = InvalidParameterError
"""A parameter of a generation cannot be what it is; ``param`` names it."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p, min_p: 0 to 1; 1 and 0 leave all tokens in.
        top_k: 0 leaves all tokens in.
        repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and answer; 1 is none.
        presence_penalty, frequency_penalty: taken from the logits of tokens of the answer, once and for each time.
        seed: the same seed, request and model version give the same answer; None draws one.
        logit_bias: token id to what is added to its logit.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Constraint:
    """A language that the answer has to be a sentence of.

    Attributes:
        text: the JSON schema, the regular expression, the Lark grammar, or the choices as a JSON array of strings;
            empty for ``json_object``.
    """

    kind: ConstraintKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One continuation of one prompt.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: of the answer; None takes what the context leaves.
        stop: strings at which the answer ends, none of which is part of it.
        logprobs: None: none; else the number of alternatives told with each token, 0 for the token's own alone.
        ignore_end: go on where the model would end, for measuring.
        adapter: name of an adapter that was deployed beside the model.
        priority: 1 is first; 0 takes the model's default.
        key_id: whose request it is: turns are shared fairly between keys.
        deadline: moment on the monotonic clock after which nobody wants the answer.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    ignore_end: bool = False
    adapter: str | None = None
    priority: int = 0
    key_id: str = ""
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a token's probability; ``text`` is lossy where ``data`` is no whole character."""

    token: int
    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class ChosenLogprob:
    """A token of the answer and the likeliest tokens in its place, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. ``cached_tokens`` are those of the prompt whose keys and values were known already."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer.

    Attributes:
        text: whole characters; may be empty, as when a token ends in the middle of one.
        tokens: those that were drawn since the last delta.
        logprobs: one for each of ``tokens`` where they were asked for.
        finish_reason: set in the last delta alone, with ``usage``.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[ChosenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What holds where a request says nothing, from the model's own files."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a conversation becomes a prompt.

    Attributes:
        source: a Jinja template; one of a model's own files is only rendered where an operator approved of it.
        approved: whether that is so.
        variables: such as ``bos_token``, as the model's files have them.
    """

    source: str
    approved: bool
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class GenerationStats:
    """What is counted of one language model. Written on the event loop, or copied whole from the engine's process.

    Attributes:
        first_token: seconds from a request's arrival to its first token.
        per_token: seconds between two tokens of one answer.
        prefix_hits: requests of whose prompt a part was known already; its tokens are in ``cached_tokens``.
        running, waiting: sequences that have a slot, prompts being read among them, and that have none yet.
        kv_bytes, kv_limit_bytes: of keys and values, in use and in all.
        finished: answers by the reason of their end.
        cancelled: requests that were left by their caller before their end.
        freed_after_steps: token steps that began between a caller's leaving and the slot's being free.
    """

    first_token: Histogram = field(default_factory=Histogram)
    per_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS_BOUNDS))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefix_hits: int = 0
    requests: int = 0
    steps: int = 0
    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0
    kv_limit_bytes: int = 0
    finished: dict[FinishReason, int] = field(default_factory=lambda: {"stop": 0, "length": 0})
    cancelled: int = 0
    freed_after_steps: Histogram = field(default_factory=lambda: Histogram(STEPS_BOUNDS))


class TextGenerator(Protocol):
    """A loaded language model. Lives on the event loop."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def special_tokens(self) -> Collection[str]:
        """Names that ``encode`` makes special tokens of."""
        ...

    @property
    def begin(self) -> Sequence[int]:
        """Tokens that belong in front of a text that no template was applied to."""
        ...

    @property
    def adapters(self) -> Sequence[str]: ...

    @property
    def template(self) -> ChatTemplate | None: ...

    @property
    def defaults(self) -> GenerationDefaults: ...

    @property
    def stats(self) -> GenerationStats: ...

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; long ones are encoded off the loop.

        Args:
            special: names of special tokens in the text, such as ``<|im_start|>``, become those tokens. Text that comes
                from a caller is not to become any.
        """
        ...

    async def encode_all(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """As ``encode``, for several texts at once."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta]:
        """Continue a prompt. Closing the generator frees the request's place within two token steps.

        The request is checked and admitted before the first delta; from then on every failure comes between deltas.

        Raises:
            GenerationParameterError: a value is out of range; ``param`` names it.
            ContextLengthError: it does not fit the context.
            QueueFullError: there was no room for its keys and values within the time that a request may wait.
            DeadlineExceededError, WorkerCrashedError, ShuttingDownError, ModelExecutionError
        """
        ...


LongText = Literal["error", "truncate", "chunk"]
"""What happens to a text longer than the model takes: refused, cut at the end, or embedded in parts whose mean,
weighted by their tokens, stands for the whole."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scores of documents for one query, in the documents' order.

    Attributes:
        method: cross-encoder: the model read query and document together; embedding: cosine similarity of two vectors.
    """

    scores: tuple[float, ...]
    tokens: int
    method: Literal["cross-encoder", "embedding"]
