"""Continuous batching: answers join and leave between two steps, and what one does, no other notices.

Two threads share one session. One reads prompts, a piece at a time, each into arrays of its own; the other writes: one
run gives every running answer its next token. An answer whose prompt was read is copied into the slot behind the last
one; one that ends leaves a gap, into which the last is moved, so that a batch always is the slots from the first on.

A request is let in when there is a slot, and memory for the keys and values of its prompt and of all the tokens that it
may write: nothing that runs ever has to leave for another. Who comes next is decided by priority, then by which key has
had the fewest tokens worked on, then by order; a long prompt is looked at again after every piece. Who cannot be let in
in time is refused.

Everything about a request that may fail, fails that request: its values, its grammar, its logits. A run that fails,
fails the answers that were in it.

All that is asked of the engine from outside is set under one lock and taken in between two steps.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...core.errors import (
    DeadlineExceededError,
    GatewayError,
    InternalError,
    ModelExecutionError,
    QueueFullError,
    ShuttingDownError,
)
from ...core.generation import FinishReason
from .constraints import Grammars, Matcher
from .kv import Array, Prefixes, Slab
from .orders import Failure, Gauges, Order, Piece, RawLogprob, Report
from .runtime import Runtime
from .sampling import PoisonedLogitsError, Sampler, log_probabilities
from .text import Vocabulary, Writer

_log = logging.getLogger(__name__)

PIECE_TOKENS: Final = 256
"""Of a prompt, read in one run. Larger pieces read a prompt no faster and hold attention's scratch memory longer."""
_KEEP_PROMPT: Final = 2
"""Tokens at the end of a prompt that are read although they are known: one alone goes through another kernel."""
_PATIENCE_S: Final = 0.5
"""How often waiting requests are looked at while nothing else happens."""
RUN_LIMIT_S: Final = 60.0
"""For one run: a piece of a prompt, or a token of every answer. Somebody's graph may be a loop without end, and nothing
else gets the answers in it to leave."""
_WATCH_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine may hold.

    Attributes:
        sequences: answers at once.
        waiting: requests beyond these.
        wait_s: how long one may wait.
        kv_bytes: keys and values of all of them, and of remembered prompts.
    """

    sequences: int
    waiting: int
    wait_s: float
    kv_bytes: int


@dataclass(slots=True, eq=False)
class _Sequence:
    order: Order
    tokens: NDArray[np.int64]
    sampler: Sampler
    writer: Writer
    arrived: float
    need: int
    """Bytes of keys and values that it holds once it is let in."""
    matcher: Matcher | None = None
    arrays: list[Array] = field(default_factory=list)
    known: int = 0
    """Tokens of the prompt that were read."""
    cached: int = 0
    length: int = 0
    """Tokens in its slot."""
    last: int = 0
    written: int = 0
    cancelled_at: int | None = None
    """The step before which its caller left."""
    stop: ort.RunOptions | None = None

    @property
    def owner(self) -> tuple[str, str | None]:
        return self.order.request.key_id, self.order.request.adapter


class Engine:
    """Runs one language model.

    Args:
        ends: tokens that end an answer.
        emit: gets what each step gave. Called on the engine's threads, one call at a time; must not block.
        on_defect: called when the engine failed in a way that no request explains, after all were told.
        run_limit_s: for one run of the model.
    """

    def __init__(
        self,
        runtime: Runtime,
        vocabulary: Vocabulary,
        grammars: Grammars,
        ends: tuple[int, ...],
        limits: EngineLimits,
        context_length: int,
        emit: Callable[[Report], None],
        *,
        on_defect: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        run_limit_s: float = RUN_LIMIT_S,
    ) -> None:
        self._run_limit_s = run_limit_s
        self._closed = threading.Event()
        self._at_work: dict[str, tuple[float, ort.RunOptions] | None] = {"read": None, "write": None}
        """Runs that go on, since when, and what ends them."""
        self._on_defect = on_defect
        self._runtime = runtime
        self._vocabulary = vocabulary
        self._grammars = grammars
        self._ends = frozenset(ends)
        self._limits = limits
        self._emit = emit
        self._clock = clock
        self._token_bytes = runtime.layout.token_bytes
        length = min(context_length, max(limits.kv_bytes // self._token_bytes, 2))
        self.context_length: Final = length
        self._slab = Slab(runtime.layout, limits.sequences, length)
        self._prefixes = Prefixes(self._token_bytes)
        self._changed = threading.Condition()
        self._emitting = threading.Lock()
        self._known: dict[int, _Sequence | None] = {}
        self._waiting: list[_Sequence] = []
        self._reading: list[_Sequence] = []
        self._joining: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._early: set[int] = set()
        self._served: dict[str, float] = {}
        """Key to tokens that were worked on for it, as of its first request since it had none; see ``_rank``."""
        self._inside = 0
        """Sequences that were let in and have not left."""
        self._held = 0
        self._steps = 0
        self._freed: list[int] = []
        self._closing = False
        self.broken = False
        """A thread has ended of a defect: nothing is answered any more."""
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="inferway-grammars")
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for work, name in (
                (self._read_prompts, "inferway-read"),
                (self._write_answers, "inferway-write"),
                (self._watch_runs, "inferway-watch"),
            )
        ]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            _log.exception("an engine has failed")
            self.broken = True
            with self._changed:
                left = list(self._known)
                self._known.clear()
                self._closing = True
                self._changed.notify_all()
            self._tell([Failure.of(number, InternalError("internal error")) for number in left])
            self._on_defect()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End; requests that are under way fail. Idempotent. Waits for runs that go on."""
        with self._changed:
            self._closing = True
            for sequence in self._reading:
                if sequence.stop is not None:
                    sequence.stop.terminate = True
            self._changed.notify_all()
        self._closed.set()
        for at_work in self._at_work.values():
            if at_work is not None:
                at_work[1].terminate = True
        self._compiling.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        with self._changed:
            left = list(self._known)
            self._known.clear()
        if left:
            self._tell([Failure.of(number, ShuttingDownError("the model is being unloaded")) for number in left])

    # -- asked from outside --------------------------------------------------------------------------------------------

    def submit(self, order: Order) -> None:
        """Take a request in. Its pieces, or its failure, come through ``emit``. From any thread."""
        with self._changed:
            self._known[order.number] = None
        request = order.request
        try:
            tokens = np.asarray(request.prompt, np.int64)
            prompt = len(tokens)
            sequence = _Sequence(
                order,
                tokens,
                Sampler(request.sampling, request.prompt, secrets.randbits(63)),
                Writer(self._vocabulary, request.stop),
                self._clock(),
                (prompt + order.max_tokens) * self._token_bytes,
            )
            if request.constraint is not None:
                self._compiling.submit(self._compile, sequence)
            else:
                self._queue(sequence)
        except Exception as error:
            self._fail_alone(order.number, error)

    def cancel(self, number: int) -> None:
        """Nobody wants that answer any more. From any thread."""
        with self._changed:
            if number not in self._known:
                return
            sequence = self._known[number]
            if sequence is None:
                self._early.add(number)  # its grammar is being compiled
                return
            sequence.cancelled_at = self._steps
            if sequence.stop is not None:
                sequence.stop.terminate = True
            self._changed.notify_all()

    def _compile(self, sequence: _Sequence) -> None:
        constraint = sequence.order.request.constraint
        assert constraint is not None
        try:
            sequence.matcher = self._grammars.compile(constraint)
            self._queue(sequence)
        except Exception as error:
            self._fail_alone(sequence.order.number, error)

    def _queue(self, sequence: _Sequence) -> None:
        number = sequence.order.number
        displaced: _Sequence | None = None
        with self._changed:
            if self._closing:
                raise ShuttingDownError("the model is being unloaded")
            if number in self._early:
                self._early.discard(number)
                del self._known[number]
                return
            free = self._inside < self._limits.sequences
            key = sequence.order.request.key_id
            if len(self._waiting) >= self._limits.waiting + (self._limits.sequences if free else 0):
                displaced = self._displaced_by(key)
                if displaced is None:
                    raise QueueFullError(f"{len(self._waiting)} requests wait already", retry_after_s=1.0)
                self._waiting.remove(displaced)
                self._forget(displaced, let_in=False)
            others = [self._served[k] for k in self._active_keys() if k in self._served]
            # A key that comes back does not make up for the time in which it asked for nothing.
            self._served[key] = max(self._served.get(key, 0.0), min(others, default=0.0))
            if len(self._served) > 4096:
                active = self._active_keys() | {key}
                self._served = {k: v for k, v in self._served.items() if k in active}
            self._known[number] = sequence
            self._waiting.append(sequence)
            self._changed.notify_all()
        if displaced is not None and displaced.cancelled_at is None:
            error = QueueFullError("requests of other keys took its place in the queue", retry_after_s=1.0)
            self._tell([Failure.of(displaced.order.number, error)])

    def _displaced_by(self, key: str) -> _Sequence | None:
        """Who leaves a full queue for a request of that key: the last one of the key that has the most in it, where the
        other will still not have more than that one. Else a key could keep all others out. Holds the lock."""
        waiting = Counter(sequence.order.request.key_id for sequence in self._waiting)
        greedy, most = max(waiting.items(), key=lambda item: item[1], default=("", 0))
        if greedy == key or most < waiting[key] + 2:
            return None
        return next(s for s in reversed(self._waiting) if s.order.request.key_id == greedy)

    def _active_keys(self) -> set[str]:
        active = (*self._waiting, *self._reading, *self._joining, *self._running)
        return {sequence.order.request.key_id for sequence in active}

    def _fail_alone(self, number: int, error: Exception) -> None:
        with self._changed:
            self._known.pop(number, None)
            self._early.discard(number)
        self._tell([Failure.of(number, _ours(error))])

    def _watch_runs(self) -> None:
        while not self._closed.wait(min(_WATCH_S, self._run_limit_s)):
            now = self._clock()
            for at_work in self._at_work.values():
                if at_work is not None and now - at_work[0] > self._run_limit_s:
                    at_work[1].terminate = True

    # -- reading prompts -----------------------------------------------------------------------------------------------

    def _read_prompts(self) -> None:
        while True:
            told: list[Piece | Failure] = []
            with self._changed:
                while True:
                    if self._closing:
                        return
                    changed = self._tidy(told)
                    self._let_in()
                    sequence = min(self._reading, key=self._rank, default=None)
                    if sequence is not None:
                        sequence.stop = ort.RunOptions()
                        break
                    if changed:
                        break
                    self._changed.wait(_PATIENCE_S if self._waiting else None)
            if told or sequence is None:
                self._tell(told)
            if sequence is not None:
                self._read_piece(sequence)

    def _rank(self, sequence: _Sequence) -> tuple[int, float, int]:
        request = sequence.order.request
        return request.priority or 1 << 30, self._served.get(request.key_id, 0.0), sequence.order.number

    def _tidy(self, told: list[Piece | Failure]) -> bool:
        """Drop those who left, and those who waited too long. Holds the lock."""
        now = self._clock()
        changed = False
        for queue in (self._waiting, self._reading):
            for sequence in list(queue):
                error = self._over(sequence, now, waiting=queue is self._waiting)
                left = sequence.cancelled_at is not None
                if not left and error is None:
                    continue
                changed = True
                queue.remove(sequence)
                self._forget(sequence, let_in=queue is self._reading)
                if error is not None and not left:
                    told.append(Failure.of(sequence.order.number, error))
        return changed

    def _over(self, sequence: _Sequence, now: float, *, waiting: bool) -> GatewayError | None:
        deadline = sequence.order.request.deadline
        if deadline is not None and now >= deadline:
            return DeadlineExceededError("the deadline passed before the answer was complete")
        if waiting and now - sequence.arrived > self._limits.wait_s:
            return QueueFullError(
                f"there was no room for its keys and values within {self._limits.wait_s:g} s", retry_after_s=1.0
            )
        return None

    def _let_in(self) -> None:
        """Holds the lock."""
        while self._waiting:
            if self._inside >= self._limits.sequences:
                return
            sequence = min(self._waiting, key=self._rank)
            # Nobody passes the first in line by being smaller: it would never come in.
            if self._held + sequence.need > self._limits.kv_bytes and self._held:
                return
            self._waiting.remove(sequence)
            self._held += sequence.need
            self._inside += 1
            self._prefixes.make_room(max(self._limits.kv_bytes - self._held, 0))
            self._reading.append(sequence)

    def _forget(self, sequence: _Sequence, *, let_in: bool) -> None:
        """Holds the lock."""
        self._known.pop(sequence.order.number, None)
        sequence.arrays = []
        if let_in:
            self._held -= sequence.need
            self._inside -= 1
        if sequence.cancelled_at is not None:
            self._freed.append(self._steps - sequence.cancelled_at)
        self._changed.notify_all()

    def _read_piece(self, sequence: _Sequence) -> None:
        try:
            row = self._read_next(sequence)
        except Exception as error:
            with self._changed:
                sequence.stop = None
                if sequence.cancelled_at is not None or self._closing:
                    return  # ``_tidy`` and ``close`` see to it
                self._reading.remove(sequence)
                self._forget(sequence, let_in=True)
            self._tell([Failure.of(sequence.order.number, _ours(error))])
            return
        with self._changed:
            sequence.stop = None
        if row is not None:
            self._begin(sequence, row)

    def _read_next(self, sequence: _Sequence) -> NDArray[np.float32] | None:
        """Read one piece; gives the logits of the prompt's end when that was reached."""
        tokens, request = sequence.tokens, sequence.order.request
        if not sequence.arrays:
            sequence.arrays = self._runtime.layout.allocate(len(tokens))
            common, known = self._prefixes.find(sequence.owner, tokens)
            common = min(common, len(tokens) - _KEEP_PROMPT)
            if common > 0:
                for to, given in zip(sequence.arrays, known, strict=True):
                    to[:, :common] = given[:, :common]
                sequence.known = sequence.cached = common
        left = len(tokens) - sequence.known
        count = min(left, PIECE_TOKENS)
        if left - count == 1:
            count -= 1
        piece = tokens[sequence.known : sequence.known + count]
        assert sequence.stop is not None  # set by whoever chose it
        self._at_work["read"] = self._clock(), sequence.stop
        try:
            row = self._runtime.read(sequence.arrays, piece, sequence.known, request.adapter, sequence.stop)
        finally:
            self._at_work["read"] = None
        sequence.known += count
        with self._changed:
            self._served[request.key_id] = self._served.get(request.key_id, 0.0) + count
        return row if sequence.known == len(tokens) else None

    def _begin(self, sequence: _Sequence, row: NDArray[np.float32]) -> None:
        """The prompt was read: the first token, and a slot for the others."""
        sequence.length = len(sequence.tokens)
        piece = self._next_token(sequence, row)
        ended = isinstance(piece, Failure) or piece.finish is not None
        self._prefixes.add(sequence.owner, sequence.tokens, sequence.arrays)
        if not ended:
            self._tell([piece])  # before the other thread can tell of the next one
        with self._changed:
            self._reading.remove(sequence)
            self._prefixes.make_room(max(self._limits.kv_bytes - self._held, 0))
            if ended:
                self._forget(sequence, let_in=True)
            else:
                self._joining.append(sequence)
                self._changed.notify_all()
        if ended:
            self._tell([piece])

    # -- writing answers -----------------------------------------------------------------------------------------------

    def _write_answers(self) -> None:
        while True:
            with self._changed:
                while not (self._running or self._joining or self._closing):
                    self._changed.wait()
                if self._closing:
                    return
                joining, self._joining = self._joining, []
            for sequence in joining:
                slot = len(self._running)
                self._slab.put(slot, sequence.arrays, sequence.length)
                with self._changed:
                    sequence.arrays = []
                    self._running.append(sequence)
            self._step()

    def _step(self) -> None:
        told: list[Piece | Failure] = []
        now = self._clock()
        gone: list[_Sequence] = []
        for sequence in self._running:
            error = self._over(sequence, now, waiting=False)
            if sequence.cancelled_at is not None or error is not None:
                gone.append(sequence)
                if error is not None and sequence.cancelled_at is None:
                    told.append(Failure.of(sequence.order.number, error))
        self._leave(gone)
        if not self._running:
            if gone:
                self._tell(told)
            return
        with self._changed:
            self._steps += 1
        running = self._running
        tokens = np.fromiter((s.last for s in running), np.int64, len(running))
        lengths = np.fromiter((s.length for s in running), np.int64, len(running))
        stop = ort.RunOptions()
        self._at_work["write"] = self._clock(), stop
        try:
            rows = self._runtime.write(self._slab, tokens, lengths, [s.order.request.adapter for s in running], stop)
        except Exception as error:
            if self._closing:
                return  # ``close`` tells them
            failed = list(running)
            self._leave(failed)
            self._tell([*told, *(Failure.of(s.order.number, _ours(error)) for s in failed)])
            return
        finally:
            self._at_work["write"] = None
        likeliest = rows.argmax(axis=1)
        ended: list[_Sequence] = []
        for index, sequence in enumerate(running):
            sequence.length += 1
            piece = self._next_token(sequence, rows[index], int(likeliest[index]))
            told.append(piece)
            if isinstance(piece, Failure) or piece.finish is not None:
                ended.append(sequence)
        with self._changed:
            for sequence in running:
                key = sequence.order.request.key_id
                self._served[key] = self._served.get(key, 0.0) + 1
        self._leave(ended)
        self._tell(told)

    def _leave(self, gone: list[_Sequence]) -> None:
        """Free slots, filling each gap with the last slot's content."""
        for sequence in gone:
            slot, last = self._running.index(sequence), len(self._running) - 1
            if slot != last:
                self._slab.move(slot, last, self._running[last].length)
            freed = self._running[last].length
            with self._changed:
                self._running[slot] = self._running[last]
                self._running.pop()
                self._forget(sequence, let_in=True)
            self._slab.release(last, freed)

    # -- one token -----------------------------------------------------------------------------------------------------

    def _next_token(
        self, sequence: _Sequence, row: NDArray[np.float32], likeliest: int | None = None
    ) -> Piece | Failure:
        """Choose the token that follows and say what became of it. Whatever fails, fails this answer alone."""
        try:
            return self._chosen(sequence, row, likeliest)
        except Exception as error:
            return Failure.of(sequence.order.number, _ours(error))

    def _chosen(self, sequence: _Sequence, row: NDArray[np.float32], likeliest: int | None) -> Piece:
        order = sequence.order
        request = order.request
        logprobs: tuple[RawLogprob, ...] = ()
        matcher = sequence.matcher
        raw = row
        if matcher is not None:
            row = row.copy()
            matcher.apply(row)
        if matcher is None and likeliest is not None and sequence.sampler.plain and np.isfinite(row[likeliest]):
            token = likeliest
        else:
            token = sequence.sampler.choose(row, own=matcher is not None)
        if request.logprobs is not None:
            its, top = log_probabilities(raw, token, request.logprobs)
            logprobs = ((token, its, top),)
        sequence.last = token
        sequence.written += 1
        finish: FinishReason | None = None
        text = ""
        if token in self._ends and not request.ignore_end:
            finish = "stop"
        else:
            text = sequence.writer.push(token)
            if sequence.writer.stopped or (matcher is not None and matcher.accept(token)):
                finish = "stop"
            elif sequence.written >= order.max_tokens:
                finish = "length"
        if finish is not None:
            text += sequence.writer.finish()
        cached = sequence.cached if finish is not None else 0
        return Piece(order.number, text, (token,), logprobs, finish, cached)

    # -- telling -------------------------------------------------------------------------------------------------------

    def _tell(self, told: list[Piece | Failure]) -> None:
        with self._changed:
            freed, self._freed = tuple(self._freed), []
            gauges = Gauges(
                self._inside,
                len(self._waiting),
                self._held + self._prefixes.nbytes,
                self._steps,
                freed,
            )
        with self._emitting:
            self._emit(Report(told, gauges))


def _ours(error: Exception) -> GatewayError:
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, PoisonedLogitsError):
        return ModelExecutionError("the model gave no token that could be chosen")
    if isinstance(error, MemoryError):
        return ModelExecutionError("there is not enough memory for this request")
    _log.error("a request failed unexpectedly", exc_info=error)
    return InternalError("internal error")
