"""A language model as the gateway sees it: requests are checked here, the engine is told, and its pieces come back."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from ...core.errors import DeadlineExceededError, ModelExecutionError, ShuttingDownError, WorkerCrashedError
from ...core.generation import (
    MAX_LOGIT_BIASES,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    ChatTemplate,
    ChosenLogprob,
    ContextLengthError,
    Delta,
    GenerationDefaults,
    GenerationParameterError,
    GenerationRequest,
    GenerationStats,
    TokenLogprob,
    Usage,
    check_characters,
)
from ...core.stats import ModelStats
from .orders import Failure, Order, Piece, RawLogprob, Report
from .package import Package
from .text import Vocabulary
from .trial import GrammarTrial

_log = logging.getLogger(__name__)

_SHORT_CHARS: Final = 2000
"""Encoding that many takes some 0.5 ms; more is done on a thread."""
_MAX_STOP_CHARS: Final = 1000
_LATE: Final = "the deadline passed before the answer was complete"


class Link(Protocol):
    """The way to an engine."""

    def submit(self, order: Order) -> None:
        """Raises ``GatewayError`` where the engine is not there."""
        ...

    def cancel(self, number: int) -> None: ...

    def problem(self) -> str | None:
        """Why it cannot be asked now, in words; None where it can."""
        ...

    async def close(self) -> None: ...


class Marking(Protocol):
    """What makes tokens of texts. Thread-safe."""

    @property
    def begin(self) -> Sequence[int]:
        """Tokens that belong in front of a text."""
        ...

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Blocks.

        Args:
            special: names of special tokens become those tokens.
        Raises:
            ModelExecutionError, TypeError: it fails, or a text has half a surrogate pair.
        """
        ...


class Generator:
    """Implements ``core.generation.TextGenerator``.

    Args:
        isolated: asking the tokenizer means waiting for a process.
        context_length: of the model, or what the memory for keys and values allows where that is less.
        approved: whether the package's own template may be rendered.
        model_stats: of the version, whose gauge of running requests is kept here.
    """

    def __init__(
        self,
        package: Package,
        vocabulary: Vocabulary,
        tokenizer: Marking,
        *,
        isolated: bool = False,
        context_length: int,
        kv_bytes: int,
        approved: bool,
        model_stats: ModelStats,
    ) -> None:
        self._model_stats = model_stats
        self._tokenizer = tokenizer
        self._isolated = isolated
        # Its own, so that a text that takes long holds up nobody else's.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="inferway-tokens")
        self.begin: Final[Sequence[int]] = tokenizer.begin
        self._vocabulary = vocabulary
        self._ends = frozenset(package.ends)
        self._trial = GrammarTrial(package.tokenizer, package.ends, package.vocabulary_size)
        self.context_length: Final = context_length
        self.vocabulary_size: Final = vocabulary.size
        self.special_tokens: Final[Sequence[str]] = tuple(
            vocabulary.names[token] for token in sorted(vocabulary.special)
        )
        self.adapters: Final[Sequence[str]] = tuple(sorted(package.adapters))
        self.template: Final = (
            None if package.template is None else ChatTemplate(package.template, approved, package.variables)
        )
        self.defaults: Final[GenerationDefaults] = package.defaults
        self.stats: Final = GenerationStats(kv_limit_bytes=kv_bytes)
        self._answers: dict[int, asyncio.Queue[Piece | Failure]] = {}
        self._serial = 0
        self._link: Link | None = None
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def connect(self, link: Link) -> None:
        """Set the engine. Before the first request."""
        self._link = link

    # -- text ----------------------------------------------------------------------------------------------------------

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """As the protocol says."""
        return (await self.encode_all([text], special=special))[0]

    async def encode_all(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """As the protocol says. Raises ``GenerationParameterError`` for texts far beyond any context."""
        if not texts:
            return []
        characters = sum(map(len, texts))
        check_characters(characters, self.context_length)
        try:
            if characters <= _SHORT_CHARS and not self._isolated:
                found = self._tokenizer.encode(texts, special)
            else:
                work = self._threads.submit(self._tokenizer.encode, texts, special)
                found = await asyncio.wrap_future(work)
        except (TypeError, ModelExecutionError):
            if all(map(_is_unicode, texts)):
                raise
            raise GenerationParameterError("expected text, got half a surrogate pair", "prompt") from None
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        for token in tokens:
            if not 0 <= token < self.vocabulary_size:
                raise GenerationParameterError(
                    f"expected token ids from 0 to {self.vocabulary_size - 1}, got {token}", "tokens"
                )
        return self._vocabulary.decode(tokens)

    # -- generation ----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta]:
        """As the protocol says."""
        max_tokens = self._check(request)
        if self._draining or self._link is None:
            raise ShuttingDownError("the model is being unloaded")
        if request.constraint is not None:
            try:
                async with asyncio.timeout_at(request.deadline):
                    await self._trial.check(request.constraint, request.key_id)
            except TimeoutError:
                raise DeadlineExceededError(_LATE) from None
        self._serial += 1
        number = self._serial
        queue: asyncio.Queue[Piece | Failure] = asyncio.Queue()
        self._answers[number] = queue
        self._idle.clear()
        stats = self.stats
        stats.requests += 1
        self._model_stats.running += 1
        prompt = len(request.prompt)
        completion = 0
        before = time.monotonic()
        over = True  # where it cannot even be submitted
        timer: asyncio.TimerHandle | None = None
        try:
            self._link.submit(Order(number, request, max_tokens))
            over = False
            if request.deadline is not None:
                # The engine looks between two runs only, and one that reads a prompt may take seconds.
                timer = asyncio.get_running_loop().call_at(request.deadline, self._expire, number)
            while not over:
                pieces = [await queue.get()]
                while isinstance(pieces[-1], Piece) and not queue.empty():  # a slow reader gets several at once
                    pieces.append(queue.get_nowait())
                now = time.monotonic()
                last = pieces[-1]
                over = isinstance(last, Failure) or last.finish is not None
                good = [piece for piece in pieces if isinstance(piece, Piece)]
                tokens = tuple(token for piece in good for token in piece.tokens)
                if completion == 0 and tokens:
                    stats.first_token.observe(now - before)
                    stats.prompt_tokens += prompt
                elif tokens:
                    for _ in tokens:
                        stats.per_token.observe((now - before) / len(tokens))
                before = now
                completion += len(tokens)
                stats.completion_tokens += len(tokens)
                usage = None
                if isinstance(last, Piece) and last.finish is not None:
                    usage = Usage(prompt, completion, last.cached)
                    stats.cached_tokens += last.cached
                    stats.prefix_hits += last.cached > 0
                    stats.finished[last.finish] += 1
                if good:
                    logprobs = tuple(self._named(raw) for piece in good for raw in piece.logprobs)
                    text = "".join(piece.text for piece in good)
                    yield Delta(text, tokens, logprobs, last.finish if isinstance(last, Piece) else None, usage)
                if isinstance(last, Failure):
                    raise last.error()
        finally:
            if timer is not None:
                timer.cancel()
            del self._answers[number]
            self._model_stats.running -= 1
            if not self._answers:
                self._idle.set()
            if not over:
                stats.cancelled += 1
                self._link.cancel(number)

    def _expire(self, number: int) -> None:
        """The deadline of an answer has passed: its caller is told now, whatever the engine does."""
        queue = self._answers.get(number)
        if queue is not None:
            queue.put_nowait(Failure.of(number, DeadlineExceededError(_LATE)))
            if self._link is not None:
                self._link.cancel(number)

    def _named(self, raw: RawLogprob) -> ChosenLogprob:
        token, value, top = raw

        def one(token: int, value: float) -> TokenLogprob:
            text, data = self._vocabulary.name(token)
            return TokenLogprob(token, text, data, value)

        return ChosenLogprob(one(token, value), tuple(one(*other) for other in top))

    def _check(self, request: GenerationRequest) -> int:
        """Hold a request against the model; gives the most tokens that it may write."""
        prompt = len(request.prompt)
        if not prompt:
            raise GenerationParameterError("expected at least one token", "prompt")
        if prompt >= self.context_length:
            raise ContextLengthError(
                f"the model takes at most {self.context_length} tokens, prompt and answer together; the prompt has "
                f"{prompt}",
                "messages",
            )
        if any(type(token) is not int or not 0 <= token < self.vocabulary_size for token in request.prompt):
            raise GenerationParameterError(f"expected token ids from 0 to {self.vocabulary_size - 1}", "prompt")
        room = self.context_length - prompt
        wanted = request.max_tokens
        if wanted is None:
            wanted = min(room, self.defaults.max_tokens or room)
        if type(wanted) is not int or wanted < 1:
            raise GenerationParameterError("expected at least 1", "max_tokens")
        if wanted > room:
            raise ContextLengthError(
                f"the model takes at most {self.context_length} tokens, prompt and answer together; the prompt has "
                f"{prompt} and max_tokens is {wanted}",
                "max_tokens",
            )
        self._check_sampling(request)
        if len(request.stop) > MAX_STOP_STRINGS:
            raise GenerationParameterError(
                f"expected at most {MAX_STOP_STRINGS} stop strings, got {len(request.stop)}", "stop"
            )
        if any(not stop or len(stop) > _MAX_STOP_CHARS for stop in request.stop):
            raise GenerationParameterError(f"expected stop strings of 1 to {_MAX_STOP_CHARS} characters", "stop")
        if request.logprobs is not None and not 0 <= request.logprobs <= MAX_TOP_LOGPROBS:
            raise GenerationParameterError(f"expected 0 to {MAX_TOP_LOGPROBS}", "top_logprobs")
        if request.adapter is not None and request.adapter not in self.adapters:
            raise GenerationParameterError(f"the model has no adapter '{request.adapter[:100]}'", "model")
        return wanted

    def _check_sampling(self, request: GenerationRequest) -> None:
        s = request.sampling
        bounds = (
            ("temperature", s.temperature, 0.0, 100.0),
            ("top_p", s.top_p, 0.0, 1.0),
            ("min_p", s.min_p, 0.0, 1.0),
            ("repetition_penalty", s.repetition_penalty, 0.01, 100.0),
            ("presence_penalty", s.presence_penalty, -100.0, 100.0),
            ("frequency_penalty", s.frequency_penalty, -100.0, 100.0),
        )
        for name, value, least, most in bounds:
            if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
                raise GenerationParameterError(f"expected a number from {least:g} to {most:g}", name)
        if type(s.top_k) is not int or s.top_k < 0:
            raise GenerationParameterError("expected 0 or more", "top_k")
        if s.seed is not None and (type(s.seed) is not int or not 0 <= s.seed < 1 << 64):
            raise GenerationParameterError("expected a whole number from 0 to 2^64 - 1", "seed")
        if len(s.logit_bias) > MAX_LOGIT_BIASES:
            raise GenerationParameterError(f"expected at most {MAX_LOGIT_BIASES} tokens", "logit_bias")
        for token, bias in s.logit_bias.items():
            if type(token) is not int or not 0 <= token < self.vocabulary_size:
                raise GenerationParameterError(f"expected token ids from 0 to {self.vocabulary_size - 1}", "logit_bias")
            if not isinstance(bias, int | float) or not math.isfinite(bias) or not -100 <= bias <= 100:
                raise GenerationParameterError("expected numbers from -100 to 100", "logit_bias")

    # -- the engine's side ---------------------------------------------------------------------------------------------

    def take(self, report: Report) -> None:
        """What the engine told. On the event loop."""
        stats, gauges = self.stats, report.gauges
        stats.running, stats.waiting = gauges.running, gauges.waiting
        stats.kv_bytes, stats.steps = gauges.kv_bytes, gauges.steps
        for steps in gauges.freed:
            stats.freed_after_steps.observe(steps)
        for piece in report.pieces:
            queue = self._answers.get(piece.number)
            if queue is not None:
                queue.put_nowait(piece)

    def lose(self, message: str = "the process that writes the answers ended") -> None:
        """The engine is gone, with all that it was asked. On the event loop."""
        self.stats.running = self.stats.waiting = self.stats.kv_bytes = 0
        for number, queue in self._answers.items():
            queue.put_nowait(Failure.of(number, WorkerCrashedError(message)))

    def problem(self) -> str | None:
        """Why requests cannot be answered now, in words; None where they can."""
        return None if self._link is None else self._link.problem()

    def end(self) -> None:
        """The model is unloaded: what is still under way fails. On the event loop."""
        for number, queue in self._answers.items():
            queue.put_nowait(Failure.of(number, ShuttingDownError("the model is being unloaded")))

    @property
    def busy(self) -> int:
        """Requests that are under way."""
        return len(self._answers)

    async def drain(self, timeout_s: float) -> int:
        """Take no more requests and wait for those under way; gives how many were left."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        return self.busy

    async def close(self) -> None:
        self._draining = True
        if self._link is not None:
            await self._link.close()
        await self._trial.close()
        # A text that is being encoded is not waited for.
        self._threads.shutdown(wait=False, cancel_futures=True)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def on_loop(loop: asyncio.AbstractEventLoop, take: Callable[[Report], None]) -> Callable[[Report], None]:
    """``take`` to be called from any thread; after the loop's end it is not called any more."""

    def emit(report: Report) -> None:
        try:
            loop.call_soon_threadsafe(take, report)
        except RuntimeError:
            _log.debug("an engine told of a step after its event loop had ended")

    return emit
