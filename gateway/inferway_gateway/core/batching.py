"""Dynamic batching, the pure half: which requests run together and when, how they are stacked, padded, split and cut.

Nothing here waits, locks or reads a clock; the batcher holds its lock around every call of a ``BatchQueue`` and passes
the time in.

Words: a *ticket* is one request. Its rows wait as one *part*, or as several where a run cannot take them all. A run
takes whole parts. Parts may share a run when they have the same *key*: the same inputs, of the same shape behind the
batch axis, where a length along a declared padding axis counts as its bucket, or not at all.

When a batch closes: the oldest part of the first priority level is always in the next batch, so nothing starves inside
a level; the rest of the batch are parts that fit it. A batch leaves as soon as somebody asks for one, that is when a
runner is free. Only where the operator set a delay does it wait for more rows, and never once it has as many as are
worth having. How many those are says the cost model; preferred sizes, where set, say it instead.

Padding: with buckets a part is always padded to its own bucket, alone or not, so that its result does not depend on
its company. Without, a batch is padded to its longest part, and mates are chosen by length: from the oldest parts of
the same key, in order of length, the stretch around the head that promises the most own elements per second.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .cost import CostCurve, CostModel
from .errors import ModelExecutionError, ModelLoadError
from .model_config import BatchPolicy, QueuePolicy
from .tensors import Arrays, Signature, TensorSpec

Key = tuple[Any, ...]
Lengths = tuple[int, ...]

BATCH_BYTES_BOUND: Final = 64 * 1024 * 1024
"""Payload that requests may add up to in one run. A single larger request still runs; more only costs copies."""

_SKIPPED_BOUND: Final = 16
_HUSKS_BOUND: Final = 16
_WINDOW_BOUND: Final = 128
_ELEMENTS_BOUND: Final = 4096
_WORTH: Final = 1.005  # own elements per second must rise by that much for a mate of another length


@dataclass(slots=True, eq=False)
class Ticket:
    """One request, as the queue knows it.

    Attributes:
        outputs: names of the outputs asked for.
        level: priority level, 0 where the model has none.
        deadline: moment after which nobody wants the answer; infinite where there is none.
        live: somebody waits for the answer.
        begun: a run with one of its parts has begun.
        waiting: its parts in the queue.
    """

    outputs: tuple[str, ...]
    level: int = 0
    deadline: float = math.inf
    live: bool = True
    begun: bool = False
    waiting: int = 0
    parts: list[Part] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Part:
    """Rows of one request that go into the same run.

    Attributes:
        inputs: arrays of these rows only.
        start: index of the first of them in the request.
        key, lengths, elements: as ``Layout.place`` found them.
        queued_at: moment of arrival.
        expires: moment after which it may not be taken any more; infinite where there is none.
        level: where it waits; differs from the ticket's once it was delayed.
        queued: it waits.
    """

    ticket: Ticket
    inputs: Arrays
    rows: int
    nbytes: int
    start: int = 0
    key: Key = ()
    lengths: Lengths = ()
    elements: int = 1
    queued_at: float = 0.0
    expires: float = math.inf
    level: int = 0
    queued: bool = False


def pieces(rows: int, most: int) -> list[tuple[int, int]]:
    """Cut ``rows`` into the fewest ranges of at most ``most`` rows, as equal as can be.

    Equal, because 8 + 1 costs more than 5 + 4 where a lone row is padded, and because equal ranges end together.
    """
    if most <= 0 or rows <= most:
        return [(0, rows)]
    count = -(-rows // most)
    return [(rows * i // count, rows * (i + 1) // count) for i in range(count)]


class Layout:
    """Where the rows and lengths of a model's tensors are, and how parts become one run's inputs and back.

    Args:
        signature: the model's.
        policy: its padding is read.
        pad_lone_rows: run a lone row with a copy of itself.
    Raises:
        ModelLoadError: a padding axis names a tensor or an axis that the model lacks or that does not vary.
    """

    def __init__(self, signature: Signature, policy: BatchPolicy, *, pad_lone_rows: bool = False) -> None:
        self._names = tuple(s.name for s in signature.inputs)
        self._lone_rows = 2 if pad_lone_rows else 1
        self._paddings = policy.padding if signature.batched else ()
        self._batched = signature.batched
        inputs = {s.name: s for s in signature.inputs}
        outputs = {s.name: s for s in signature.outputs}
        self._padded: dict[str, tuple[tuple[int, int], ...]] = {}
        self._cut: dict[str, tuple[tuple[int, int], ...]] = {}
        for number, padding in enumerate(self._paddings):
            for name, axis in padding.inputs.items():
                _require_variable("input", name, axis, inputs)
                self._padded[name] = (*self._padded.get(name, ()), (axis, number))
            for name, axis in padding.outputs.items():
                _require_variable("output", name, axis, outputs)
                self._cut[name] = (*self._cut.get(name, ()), (axis, number))
        fills = {name: value for padding in self._paddings for name, value in padding.fill.items()}
        self._fill = {name: _fill(fills.get(name, 0.0), inputs[name].datatype) for name in self._padded}
        self.max_waste = min((p.max_waste for p in self._paddings if not p.buckets), default=1.0)
        self.free = any(not p.buckets for p in self._paddings)
        self.pads = bool(self._paddings)
        self.variable = any(s.optional or -1 in s.shape[1:] for s in signature.inputs) or not signature.batched
        self._elements: dict[tuple[Key, Lengths], int] = {}
        self._place: tuple[Key, Lengths, int] = ((), (), sum(math.prod(s.shape[1:]) for s in signature.inputs))

    def place(self, inputs: Arrays, rows: int) -> tuple[Key, Lengths, int]:
        """What decides with whom a request may run.

        Returns:
            Its key; its own length along each padding axis, -1 where the request has no such input, and nothing at all
            where its inputs disagree about a length and it can therefore not be padded; and its elements per row, when
            padded to its buckets.
        """
        if not self.variable:
            return self._place
        lengths: Lengths = ()
        if self._paddings:
            lengths = self._lengths(inputs)
        target = self._buckets(lengths)
        key: list[tuple[int, ...] | None] = []
        elements = 0
        for name in self._names:
            array = inputs.get(name)
            if array is None:
                key.append(None)
                continue
            tail = array.shape[1:] if self._batched else array.shape
            if lengths and name in self._padded:
                own = list(tail)
                mark = list(tail)
                for axis, number in self._padded[name]:
                    mark[axis - 1] = target[number]
                    own[axis - 1] = target[number] if target[number] >= 0 else lengths[number]
                key.append(tuple(mark))
                elements += math.prod(own)
            else:
                key.append(tail)
                elements += math.prod(tail)
        return (bool(lengths), *key), lengths, elements

    def _lengths(self, inputs: Arrays) -> Lengths:
        lengths = []
        for padding in self._paddings:
            found = {inputs[name].shape[axis] for name, axis in padding.inputs.items() if name in inputs}
            if len(found) > 1:
                return ()
            lengths.append(found.pop() if found else -1)
        return tuple(lengths)

    def _buckets(self, lengths: Lengths) -> Lengths:
        """The length to pad each axis to: its bucket; its own beyond the last bucket; -1 where the batch decides."""
        target = []
        for padding, length in zip(self._paddings, lengths, strict=bool(lengths)):
            at = bisect_left(padding.buckets, length)
            if not padding.buckets:
                target.append(-1)
            else:
                target.append(length if length < 0 or at == len(padding.buckets) else padding.buckets[at])
        return tuple(target)

    def target(self, parts: Sequence[Part]) -> Lengths:
        """The lengths that a run of these parts, all of one key, is padded to."""
        longest = parts[0].lengths
        if not longest:
            return ()
        if len(parts) > 1:
            longest = tuple(map(max, zip(*(p.lengths for p in parts), strict=True)))
        return self._rounded(longest)

    def _rounded(self, longest: Lengths) -> Lengths:
        return tuple(b if b >= 0 else n for b, n in zip(self._buckets(longest), longest, strict=True))

    def row_elements(self, part: Part, longest: Lengths) -> int:
        """Elements of all inputs per row when ``part`` is padded to run with parts of these lengths."""
        if not longest or longest == part.lengths:
            return part.elements
        found = self._elements.get((part.key, longest))
        if found is None:
            target = self._rounded(longest)
            found = 0
            for name, array in part.inputs.items():
                shape = list(array.shape)
                for axis, number in self._padded.get(name, ()):
                    shape[axis] = target[number]
                found += math.prod(shape[1:])
            if len(self._elements) >= _ELEMENTS_BOUND:
                self._elements.clear()
            self._elements[part.key, longest] = found
        return found

    def stack(self, parts: Sequence[Part], target: Lengths) -> tuple[Arrays, int]:
        """Join parts along the batch axis.

        Args:
            parts: of one key, not empty; arrays are ``(n_i, *tail)``, ``n_i >= 1``.
            target: from ``target``.
        Returns:
            One C-contiguous array ``(n, *padded tail)`` for each input, and ``n``: the sum of ``n_i``, or 2 for a lone
            row that is padded. A single part that needs no padding is handed through without a copy.
        """
        first = parts[0]
        rows = sum(p.rows for p in parts)
        joined: dict[str, NDArray[Any]] = {}
        if len(parts) == 1 and rows >= self._lone_rows and target == first.lengths:
            return first.inputs, rows
        lone = rows < self._lone_rows
        for name in first.inputs:
            arrays = [p.inputs[name] for p in parts]
            axes = self._padded.get(name) if target else None
            if axes and any(a.shape[axis] != target[number] for a in arrays for axis, number in axes):
                shape = list(arrays[0].shape)
                shape[0] = self._lone_rows if lone else rows
                for axis, number in axes:
                    shape[axis] = target[number]
                full = np.full(shape, self._fill[name], dtype=arrays[0].dtype)
                at = 0
                for array in arrays * self._lone_rows if lone else arrays:
                    full[(slice(at, at + len(array)), *map(slice, array.shape[1:]))] = array
                    at += len(array)
                joined[name] = full
            else:
                joined[name] = np.concatenate(arrays * self._lone_rows if lone else arrays)
        return joined, self._lone_rows if lone else rows

    def split(
        self, outputs: Sequence[NDArray[Any]], names: Sequence[str], parts: Sequence[Part], target: Lengths
    ) -> list[list[NDArray[Any]]]:
        """Give each part its own rows of the outputs it asked for, cut back to its own lengths.

        Args:
            outputs: one array per name of ``names``, axis 0 at least as long as the parts have rows together.
        Returns:
            For each part the arrays of ``part.ticket.outputs``, in that order, C-contiguous; views where possible.
        Raises:
            ModelExecutionError: an output that is declared to follow a padded axis does not have its length.
        """
        results = []
        at = 0
        index = {name: i for i, name in enumerate(names)}
        for part in parts:
            end = at + part.rows
            own = []
            for name in part.ticket.outputs:
                array = outputs[index[name]]
                if self._batched and (at > 0 or end < len(array)):
                    array = array[at:end]
                if target and part.lengths != target and name in self._cut:
                    array = self._cut_back(name, array, part.lengths, target)
                own.append(array)
            results.append(own)
            at = end
        return results

    def _cut_back(self, name: str, array: NDArray[Any], own: Lengths, target: Lengths) -> NDArray[Any]:
        for axis, number in self._cut[name]:
            if own[number] == target[number]:
                continue
            if array.shape[axis] != target[number]:
                raise ModelExecutionError(
                    f"output '{name}' is declared to be as long as its padded inputs along axis {axis}, "
                    f"expected {target[number]}, got {array.shape[axis]}"
                )
            array = array[(slice(None),) * axis + (slice(own[number]),)]
        return np.ascontiguousarray(array)


class BatchQueue:
    """What waits for one model version, by priority level and key.

    Args:
        policy: bounds, levels, delay, preferred sizes.
        layout, costs: of the model.
        batching: parts of different requests may share a run.
        max_rows: the most rows that one run may take; 0 for no bound.
    """

    def __init__(
        self, policy: BatchPolicy, layout: Layout, costs: CostModel, *, batching: bool, max_rows: int = 0
    ) -> None:
        self._policy = policy
        self._layout = layout
        self._costs = costs
        self._batching = batching
        self._max_rows = max_rows
        self._preferred = tuple(sorted(n for n in policy.preferred_rows if not max_rows or n <= max_rows))
        self._delay_s = policy.max_queue_delay_s if batching else 0.0
        # One more than the levels that callers can name: the last holds what overstayed under the action "delay".
        self._levels = [_Level(i, self._policy_of(i)) for i in range(max(policy.priority_levels, 0) + 2)]
        self.hurry = False
        """Do not wait for more rows: the model drains."""
        self.requests = 0
        self.rows = 0
        self.nbytes = 0

    def _policy_of(self, level: int) -> QueuePolicy:
        return self._policy.queue_by_priority.get(level, self._policy.queue)

    def level(self, priority: int) -> int:
        """The level of a request that named ``priority``; one out of range, and 0, mean the model's default.

        Where the model names no default either, it is the last level, so that who asks for nothing overtakes nobody.
        """
        levels = self._policy.priority_levels
        if levels <= 0:
            return 0
        if 1 <= priority <= levels:
            return priority
        return self._policy.default_priority if 1 <= self._policy.default_priority <= levels else levels

    def timeout_s(self, level: int, asked_s: float | None) -> float:
        """How long a request of ``level`` may wait when it asked for ``asked_s``; infinite without a bound.

        A request may shorten the level's timeout where the policy allows it, never lengthen it.
        Source: Triton's ``ModelQueuePolicy``, ``allow_timeout_override``.
        """
        policy = self._levels[level].policy
        bound = math.inf if policy.default_timeout_s is None else policy.default_timeout_s
        return min(bound, asked_s) if asked_s is not None and policy.allow_timeout_override else bound

    def delays(self, level: int) -> bool:
        """Whether a request that overstayed waits on, behind all others, instead of being turned away."""
        return self._levels[level].policy.timeout_action == "delay"

    @property
    def delayed(self) -> bool:
        """Whether a batch may wait for more rows although a runner is free."""
        return self._delay_s > 0 and not self.hurry

    def refusal(self, level: int, rows: int, nbytes: int) -> str | None:
        """Why a request must not be queued now, or None. What is larger than a bound is taken by an empty queue."""
        policy = self._policy
        if self.requests == 0:
            return None
        most = self._levels[level].policy.max_queue_requests
        if most and self._levels[level].requests >= most:
            return f"{self._levels[level].requests} requests wait, at most {most} may"
        if self.rows + rows > policy.max_queue_rows:
            return f"{self.rows} rows wait and {rows} came, at most {policy.max_queue_rows} may"
        if self.nbytes + nbytes > policy.max_queue_bytes:
            return f"{self.nbytes} bytes wait and {nbytes} came, at most {policy.max_queue_bytes} may"
        return None

    def push(self, ticket: Ticket) -> None:
        """Let all parts of a ticket wait, at its level."""
        self.requests += 1
        level = self._levels[ticket.level]
        level.requests += 1
        ticket.waiting = len(ticket.parts)
        for part in ticket.parts:
            part.level = ticket.level
            part.queued = True
            level.add(part)
            self.rows += part.rows
            self.nbytes += part.nbytes

    def remove(self, ticket: Ticket) -> None:
        """Take the ticket's waiting parts out; nothing happens to those that run."""
        for part in ticket.parts:
            if part.queued:
                level = self._levels[part.level]
                level.drop(part)
                self._taken(part)
                part.inputs = {}  # the husk may stay a while, its arrays need not

    def put_last(self, ticket: Ticket) -> None:
        """Let the ticket's waiting parts wait behind everything else, without an end."""
        last = self._levels[-1]
        moved = False
        for part in ticket.parts:
            if part.queued and part.level != last.index:
                level = self._levels[part.level]
                level.drop(part)
                if not moved:
                    moved = True
                    level.requests -= 1
                    last.requests += 1
                part.level = last.index
                part.expires = part.ticket.deadline
                last.add(part)

    def take(self, now: float) -> list[Part] | None:
        """The next batch, or None where nothing waits or what waits had better wait on. Parts are taken out."""
        for level in self._levels:
            head = level.order.head(now)
            if head is None:
                continue
            group = level.groups[head.key]
            if self._delay_s and not self._ready(head, group, now):
                for other in level.groups.values():
                    first = other.head(now)
                    if first is not None and self._ready(first, other, now):
                        return self._form(level, first, now)
                continue
            return self._form(level, head, now)
        return None

    def due(self, now: float) -> float | None:
        """When a batch that waits for more rows leaves without them; None where none does."""
        if not self.delayed:
            return None
        heads = (level.order.head(now) for level in self._levels)
        return min((h.queued_at + self._delay_s for h in heads if h is not None), default=None)

    def worth_waiting(self) -> bool:
        """Whether requests that arrive in the same moment should be gathered before the first of them leaves."""
        return self._batching and (bool(self._preferred) or self._costs.latest.target > self.rows)

    def _ready(self, head: Part, group: _Line, now: float) -> bool:
        if self.hurry or now >= head.queued_at + self._delay_s:
            return True
        wanted = self._preferred[0] if self._preferred else self._costs.curve(head.elements).target
        if self._max_rows:
            wanted = min(wanted, self._max_rows)
        return group.rows >= wanted

    def _form(self, level: _Level, head: Part, now: float) -> list[Part]:
        chosen = self._choose(level, head, now) if self._batching else [head]
        for part in chosen:
            self._levels[part.level].drop(part)
            self._taken(part)
            for other in part.ticket.parts if part.ticket.waiting else ():
                other.expires = part.ticket.deadline  # the queue's timeout binds until a request's first run only
        return chosen

    def _choose(self, level: _Level, head: Part, now: float) -> list[Part]:
        lower = self._levels[level.index + 1 :]
        groups = [level.groups[head.key]]
        groups += [found for other in lower if (found := other.groups.get(head.key)) is not None]
        available = sum(g.rows for g in groups)
        curve = self._costs.curve(head.elements)
        limit = self._limit(head, curve, available, now)
        if limit <= head.rows or available <= head.rows:
            return [head]
        if self._layout.free and head.lengths:
            return self._by_length(head, self._window(head, groups, limit, now), limit, curve)
        return self._in_order(head, groups, limit, now)

    def _limit(self, head: Part, curve: CostCurve, available: int, now: float) -> int:
        limit = self._costs.limit(curve, available)
        if self._preferred:
            # The operator's word against the curve's: the largest wanted size that can be filled.
            fitting = bisect_left(self._preferred, available + 1)
            limit = self._preferred[fitting - 1] if fitting else available
        if self._max_rows:
            limit = min(limit, self._max_rows)
        slack = (head.ticket.deadline - now) / self._costs.stretch
        if slack < curve.seconds(limit) and self._costs.known and curve.seconds(head.rows) <= slack:
            limit = min(limit, curve.rows_within(slack))  # company must not make the oldest late
        return max(limit, head.rows)

    def _in_order(self, head: Part, groups: Sequence[_Line], limit: int, now: float) -> list[Part]:
        """Parts of the same shape: the oldest first, passing over those that do not fit any more."""
        chosen = [head]
        rows, nbytes = head.rows, head.nbytes
        skipped = 0
        for part in _waiting(groups, now):
            if part is head:
                continue
            if rows + part.rows <= limit and nbytes + part.nbytes <= BATCH_BYTES_BOUND:
                chosen.append(part)
                rows += part.rows
                nbytes += part.nbytes
                if rows == limit:
                    break
            else:
                skipped += 1
                if skipped == _SKIPPED_BOUND:
                    break
        return chosen

    def _window(self, head: Part, groups: Sequence[_Line], limit: int, now: float) -> list[Part]:
        """The oldest parts that mates are chosen from: a few times what a batch takes, so that lengths match."""
        found = [head]
        rows = head.rows
        for part in _waiting(groups, now):
            if part is not head:
                found.append(part)
                rows += part.rows
                if rows >= 4 * limit or len(found) == _WINDOW_BOUND:
                    break
        return found

    def _by_length(self, head: Part, window: list[Part], limit: int, curve: CostCurve) -> list[Part]:
        """The stretch of parts around the head, in order of length, with the most own elements per second."""
        layout = self._layout
        exploring = limit > curve.target
        order = sorted(window, key=lambda p: p.elements)
        low = high = order.index(head)
        rows, nbytes, own, target = head.rows, head.nbytes, head.rows * head.elements, head.lengths
        best, best_low, best_high = own / curve.seconds(rows), low, high
        while True:
            step: tuple[float, Part, Lengths] | None = None
            for at in (low - 1, high + 1):
                if not 0 <= at < len(order):
                    continue
                part = order[at]
                if rows + part.rows > limit or nbytes + part.nbytes > BATCH_BYTES_BOUND:
                    continue
                longest = target if part.lengths == target else tuple(map(max, target, part.lengths))
                padded = layout.row_elements(head, longest)
                useful = own + part.rows * part.elements
                total = padded * (rows + part.rows)
                if total - useful > layout.max_waste * total:
                    continue
                rate = useful / self._costs.curve(padded).seconds(rows + part.rows)
                if step is None or rate > step[0]:
                    step = rate, part, longest
            if step is None:
                return order[best_low : best_high + 1]
            rate, part, target = step
            if low > 0 and part is order[low - 1]:
                low -= 1
            else:
                high += 1
            rows += part.rows
            nbytes += part.nbytes
            own += part.rows * part.elements
            if exploring or rate > best * _WORTH:
                best, best_low, best_high = rate, low, high

    def _taken(self, part: Part) -> None:
        part.queued = False
        self.rows -= part.rows
        self.nbytes -= part.nbytes
        ticket = part.ticket
        ticket.waiting -= 1
        if ticket.waiting == 0:
            self.requests -= 1
            self._levels[part.level].requests -= 1


class _Line:
    """Parts in order of arrival. Those that were taken out of turn, went away or moved stay as husks for a while."""

    __slots__ = ("level", "live", "parts", "rows")

    def __init__(self, level: int) -> None:
        self.level = level
        self.parts: deque[Part] = deque()
        self.live = 0
        self.rows = 0

    def add(self, part: Part) -> None:
        self.parts.append(part)
        self.live += 1
        self.rows += part.rows

    def drop(self, part: Part) -> None:
        self.live -= 1
        self.rows -= part.rows
        parts = self.parts
        if parts and parts[0] is part:
            parts.popleft()
        if len(parts) > 2 * self.live + _HUSKS_BOUND:
            self.parts = deque(p for p in parts if p.queued and p.level == self.level and p is not part)

    def head(self, now: float) -> Part | None:
        """The oldest part that may be taken. What is overdue is let go; it counts until the batcher has answered it."""
        parts = self.parts
        while parts:
            part = parts[0]
            if part.queued and part.level == self.level and part.expires > now:
                return part
            parts.popleft()
        return None

    def waiting(self, now: float) -> Iterator[Part]:
        for part in self.parts:
            if part.queued and part.level == self.level and part.expires > now:
                yield part


class _Level:
    """One priority level: all its parts in order of arrival, and those of each key."""

    __slots__ = ("groups", "index", "order", "policy", "requests")

    def __init__(self, index: int, policy: QueuePolicy) -> None:
        self.index = index
        self.policy = policy
        self.order = _Line(index)
        self.groups: dict[Key, _Line] = {}
        self.requests = 0

    def add(self, part: Part) -> None:
        self.order.add(part)
        group = self.groups.get(part.key)
        if group is None:
            group = self.groups[part.key] = _Line(self.index)
        group.add(part)

    def drop(self, part: Part) -> None:
        self.order.drop(part)
        group = self.groups[part.key]
        group.drop(part)
        if group.live == 0:
            del self.groups[part.key]


def _waiting(lines: Sequence[_Line], now: float) -> Iterator[Part]:
    return chain.from_iterable(line.waiting(now) for line in lines)


def _require_variable(kind: str, name: str, axis: int, specs: dict[str, TensorSpec]) -> None:
    spec = specs.get(name)
    if spec is None:
        raise ModelLoadError(f"padding names the {kind} '{name}', expected one of {', '.join(map(repr, specs))}")
    if not 1 <= axis < len(spec.shape) or spec.shape[axis] != -1:
        raise ModelLoadError(
            f"padding names axis {axis} of the {kind} '{name}', expected a variable axis behind the batch axis, "
            f"its shape is {list(spec.shape)}"
        )


def _fill(value: float, datatype: str) -> Any:
    """The padding value as the element that carries it."""
    if datatype == "BYTES":
        return "" if value == 0 else str(value)
    if datatype == "BF16":
        return int(np.float32(value).view(np.uint32)) >> 16
    return value
