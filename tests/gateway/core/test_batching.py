from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from batching_fakes import FLAT, RISING, expected, profile, row_signature
from inferway_gateway.core.batching import BatchQueue, Layout, Part, Ticket, pieces
from inferway_gateway.core.cost import CostModel
from inferway_gateway.core.errors import ModelExecutionError, ModelLoadError
from inferway_gateway.core.model_config import BatchPolicy, PaddingAxis, QueuePolicy
from inferway_gateway.core.tensors import Signature, TensorSpec

PADDED = BatchPolicy(padding=(PaddingAxis({"x": 1}, {"same": 1}, max_waste=0.5),))


def bucketed(*buckets: int) -> BatchPolicy:
    return BatchPolicy(padding=(PaddingAxis({"x": 1}, {"same": 1}, buckets=buckets),))


class Waiting:
    """A queue with what is needed to fill it."""

    def __init__(
        self,
        policy: BatchPolicy | None = None,
        cost: dict[int, float] | None = None,
        *,
        batching: bool = True,
        max_rows: int = 0,
        length: int = -1,
        row_elements: int = 3,
    ) -> None:
        signature = row_signature(max_rows=max_rows, length=length, optional_bias=length == -1)
        self.layout = Layout(signature, policy or BatchPolicy())
        costs = CostModel(
            profile(cost or RISING).cost, row_elements=row_elements, max_rows=max_rows, variable=self.layout.variable
        )
        self.queue = BatchQueue(policy or BatchPolicy(), self.layout, costs, batching=batching, max_rows=max_rows)

    def add(self, rows: int = 1, length: int = 3, at: float = 0.0, priority: int = 0, **options: Any) -> Ticket:
        x = np.zeros((rows, length))
        inputs = {"x": x, "bias": np.zeros((rows, 1))} if options.pop("bias", False) else {"x": x}
        expires = options.pop("expires", math.inf)
        ticket = Ticket(("same",), self.queue.level(priority), **options)
        key, lengths, elements = self.layout.place(inputs, rows)
        nbytes = x.nbytes
        ticket.parts = [
            Part(ticket, inputs, rows, nbytes, 0, key, lengths, elements, at, min(expires, ticket.deadline))
        ]
        self.queue.push(ticket)
        return ticket

    def take(self, now: float = 0.0) -> list[Ticket]:
        return [part.ticket for part in self.queue.take(now) or []]


# ---- which requests go together


def test_a_batch_takes_rows_up_to_what_is_worth_having() -> None:
    waiting = Waiting(length=3, max_rows=8)
    tickets = [waiting.add(rows) for rows in (3, 2, 3, 1, 1)]
    assert waiting.take() == tickets[:3]
    assert waiting.take() == tickets[3:]
    assert waiting.take() == []
    assert (waiting.queue.requests, waiting.queue.rows, waiting.queue.nbytes) == (0, 0, 0)


def test_a_part_that_does_not_fit_is_passed_over_and_goes_next() -> None:
    waiting = Waiting(length=3, max_rows=8)
    first, large, small = waiting.add(5), waiting.add(6), waiting.add(3)
    assert waiting.take() == [first, small]
    assert waiting.take() == [large]


def test_nothing_is_put_together_where_rows_per_second_do_not_rise() -> None:
    waiting = Waiting(cost=FLAT, length=3)
    tickets = [waiting.add(2) for _ in range(3)]
    assert [waiting.take() for _ in range(3)] == [[ticket] for ticket in tickets]


def test_nothing_is_put_together_where_batching_is_off() -> None:
    waiting = Waiting(batching=False, length=3)
    tickets = [waiting.add() for _ in range(3)]
    assert [waiting.take() for _ in range(3)] == [[ticket] for ticket in tickets]


def test_only_equal_shapes_and_equal_sets_of_inputs_go_together() -> None:
    waiting = Waiting()
    first = waiting.add(length=3)
    longer = waiting.add(length=4)
    with_bias = waiting.add(length=3, bias=True)
    same = waiting.add(length=3)
    assert waiting.take() == [first, same]
    assert waiting.take() == [longer]
    assert waiting.take() == [with_bias]


def test_the_oldest_request_is_always_in_the_next_batch() -> None:
    waiting = Waiting()
    odd = waiting.add(length=7)
    for _ in range(100):
        waiting.add(length=3)
    assert waiting.take() == [odd]


def test_priority_one_goes_first_and_lower_levels_fill_its_batch_up() -> None:
    waiting = Waiting(BatchPolicy(priority_levels=3), length=3, max_rows=4)
    low = [waiting.add(priority=3) for _ in range(3)]
    unnamed = waiting.add()
    high = [waiting.add(priority=1) for _ in range(2)]
    assert waiting.take() == [*high, *low[:2]]
    assert waiting.take() == [low[2], unnamed], "who names no priority overtakes nobody"


def test_priorities_out_of_range_mean_the_default() -> None:
    queue = Waiting(BatchPolicy(priority_levels=3, default_priority=2)).queue
    assert [queue.level(p) for p in (0, 1, 2, 3, 4, -1)] == [2, 1, 2, 3, 2, 2]
    assert Waiting().queue.level(5) == 0


def test_the_oldest_request_is_not_made_late_by_company() -> None:
    waiting = Waiting(cost={1: 1.0, 2: 1.1, 4: 1.2, 8: 1.5, 16: 2.0}, length=3, max_rows=16)
    first = waiting.add(deadline=1.3)
    for _ in range(20):
        waiting.add()
    batch = waiting.take()
    assert batch[0] is first
    assert len(batch) == 4
    hopeless = Waiting(cost={1: 1.0, 2: 1.1}, length=3, max_rows=2)
    hopeless.add(deadline=0.5)
    hopeless.add()
    assert len(hopeless.take()) == 2, "what is late anyway need not run alone"


def test_a_batch_is_bounded_in_bytes() -> None:
    waiting = Waiting(length=3)
    tickets = [waiting.add() for _ in range(3)]
    for ticket in tickets:
        ticket.parts[0].nbytes = 40 * 1024 * 1024
    assert waiting.take() == tickets[:1]


# ---- when a batch leaves


def test_without_a_delay_a_batch_leaves_when_somebody_asks() -> None:
    waiting = Waiting(length=3)
    only = waiting.add()
    assert waiting.queue.due(0.0) is None
    assert waiting.take() == [only]


def test_with_a_delay_a_batch_waits_for_as_many_rows_as_are_worth_having_and_no_longer() -> None:
    waiting = Waiting(BatchPolicy(max_queue_delay_s=0.5), length=3, max_rows=4)
    tickets = [waiting.add(at=1.0), waiting.add(at=1.2)]
    assert waiting.take(1.4) == []
    assert waiting.queue.due(1.4) == 1.5
    assert waiting.take(1.5) == tickets
    tickets = [waiting.add(at=2.0) for _ in range(4)]
    assert waiting.take(2.0) == tickets


def test_a_delay_is_not_spent_where_company_gains_nothing_or_the_model_drains() -> None:
    flat = Waiting(BatchPolicy(max_queue_delay_s=0.5), FLAT, length=3)
    only = flat.add()
    assert flat.take(0.0) == [only]
    draining = Waiting(BatchPolicy(max_queue_delay_s=0.5), length=3)
    only = draining.add()
    draining.queue.hurry = True
    assert draining.queue.due(0.0) is None
    assert draining.take(0.0) == [only]


def test_while_one_shape_waits_for_company_another_that_has_enough_may_leave() -> None:
    waiting = Waiting(BatchPolicy(max_queue_delay_s=0.5), max_rows=2)
    lonely = waiting.add(length=5)
    pair = [waiting.add(length=3), waiting.add(length=3)]
    assert waiting.take(0.1) == pair
    assert waiting.take(0.1) == []
    assert waiting.take(0.5) == [lonely]


def test_preferred_sizes_close_a_batch() -> None:
    policy = BatchPolicy(preferred_rows=(4, 8), max_queue_delay_s=1.0)
    waiting = Waiting(policy, FLAT, length=3, max_rows=16)
    tickets = [waiting.add() for _ in range(3)]
    assert waiting.take(0.0) == []
    tickets += [waiting.add() for _ in range(3)]
    assert waiting.take(0.0) == tickets[:4]
    assert waiting.take(0.5) == []
    assert waiting.take(1.0) == tickets[4:]
    tickets = [waiting.add() for _ in range(13)]
    assert waiting.take(0.0) == tickets[:8]


# ---- timeouts and bounds


def test_a_request_may_shorten_its_levels_timeout_where_allowed_and_never_lengthen_it() -> None:
    policy = BatchPolicy(
        priority_levels=3,
        queue=QueuePolicy(default_timeout_s=2.0),
        queue_by_priority={2: QueuePolicy(default_timeout_s=2.0, allow_timeout_override=False), 3: QueuePolicy()},
    )
    queue = Waiting(policy).queue
    assert [queue.timeout_s(1, asked) for asked in (None, 0.5, 5.0)] == [2.0, 0.5, 2.0]
    assert [queue.timeout_s(2, asked) for asked in (None, 0.5, 5.0)] == [2.0, 2.0, 2.0]
    assert [queue.timeout_s(3, asked) for asked in (None, 0.5)] == [math.inf, 0.5]


def test_what_is_overdue_is_not_taken_and_counts_until_it_is_answered() -> None:
    waiting = Waiting(length=3)
    overdue = waiting.add(expires=1.0)
    assert waiting.take(1.0) == []
    assert waiting.queue.requests == 1
    waiting.queue.remove(overdue)
    assert (waiting.queue.requests, waiting.queue.rows, waiting.queue.nbytes) == (0, 0, 0)


def test_what_is_put_last_runs_behind_all_others_and_once() -> None:
    policy = BatchPolicy(priority_levels=2, queue=QueuePolicy(max_queue_requests=2))
    waiting = Waiting(policy, length=3, max_rows=2)
    late = waiting.add(priority=1, expires=1.0)
    others = [waiting.add(priority=2), waiting.add(priority=2)]
    waiting.queue.put_last(late)
    assert waiting.queue.refusal(1, 1, 1) is None, "it no longer counts against its level's bound"
    later = waiting.add(priority=1, at=2.0)
    assert waiting.take(2.0) == [later, others[0]]
    assert waiting.take(2.0) == [others[1], late]
    assert waiting.take(2.0) == []
    assert waiting.queue.requests == 0


def test_bounds_of_requests_rows_and_bytes_refuse_and_say_so() -> None:
    waiting = Waiting(BatchPolicy(max_queue_rows=10, max_queue_bytes=400, queue=QueuePolicy(max_queue_requests=3)))
    assert waiting.queue.refusal(0, 11, 1) is None, "an empty queue takes what is larger than its bound"
    waiting.add(rows=4)
    assert "11" in (waiting.queue.refusal(0, 7, 1) or "") or "10 may" in (waiting.queue.refusal(0, 7, 1) or "")
    assert waiting.queue.refusal(0, 6, 304) is None
    assert "bytes" in (waiting.queue.refusal(0, 6, 305) or "")
    waiting.add()
    waiting.add()
    assert "requests" in (waiting.queue.refusal(0, 1, 1) or "")


def test_removed_requests_leave_no_arrays_and_no_end_of_husks_behind() -> None:
    waiting = Waiting(length=3)
    stays = waiting.add()
    for _ in range(1000):
        ticket = waiting.add()
        waiting.queue.remove(ticket)
        assert ticket.parts[0].inputs == {}
    level = waiting.queue._levels[0]
    assert len(level.order.parts) <= 20
    assert sum(len(group.parts) for group in level.groups.values()) <= 20
    assert waiting.take() == [stays]


def test_a_queue_that_is_never_empty_does_not_grow() -> None:
    waiting = Waiting(PADDED, max_rows=4)
    rng = np.random.default_rng(0)
    for _ in range(40):
        waiting.add(length=int(rng.integers(1, 60)))
    for _ in range(2000):
        for _ in waiting.take():
            waiting.add(length=int(rng.integers(1, 60)))
    level = waiting.queue._levels[0]
    assert waiting.queue.requests == 40
    assert len(level.order.parts) <= 100
    assert sum(len(group.parts) for group in level.groups.values()) <= 100


# ---- pieces of large requests


@given(st.integers(0, 5000), st.integers(0, 300))
def test_pieces_cover_all_rows_in_order_with_as_few_and_as_equal_runs_as_can_be(rows: int, most: int) -> None:
    ranges = pieces(rows, most)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    if most and rows:
        sizes = [end - start for start, end in ranges]
        assert len(ranges) == math.ceil(rows / most)
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1


# ---- stacking, padding, splitting, cutting


def parts_of(layout: Layout, arrays: list[NDArray[Any]], outputs: list[tuple[str, ...]] | None = None) -> list[Part]:
    parts = []
    for i, x in enumerate(arrays):
        key, lengths, elements = layout.place({"x": x}, len(x))
        ticket = Ticket(outputs[i] if outputs else ("same",))
        parts.append(Part(ticket, {"x": x}, len(x), x.nbytes, 0, key, lengths, elements))
    return parts


def run(layout: Layout, parts: list[Part]) -> tuple[NDArray[Any], list[list[NDArray[Any]]]]:
    """Stack, run in numpy, split: what the model was given, and what each part got."""
    target = layout.target(parts)
    inputs, rows = layout.stack(parts, target)
    x = inputs["x"]
    assert len(x) == rows
    assert x.flags.c_contiguous
    names = ("total", "same", "first")
    return x, layout.split([np.ascontiguousarray(expected(x, name)) for name in names], names, parts, target)


shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=8)
wanted = st.sampled_from([("same",), ("total", "same"), ("first",), ("same", "first", "total")])


@given(st.data(), shapes, st.sampled_from([PADDED, bucketed(4, 8), bucketed(2, 16)]), st.booleans())
def test_padded_stacked_split_and_cut_every_request_has_what_it_has_alone(
    data: st.DataObject, given_shapes: list[tuple[int, int]], policy: BatchPolicy, pad_lone: bool
) -> None:
    layout = Layout(row_signature(), policy, pad_lone_rows=pad_lone)
    arrays = [np.random.default_rng(i).integers(1, 1000, shape).astype(float) for i, shape in enumerate(given_shapes)]
    outputs = [data.draw(wanted) for _ in arrays]
    parts = parts_of(layout, arrays, outputs)
    groups: dict[Any, list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(part.key, []).append(i)
    for members in groups.values():
        x, results = run(layout, [parts[i] for i in members])
        assert len(x) >= (2 if pad_lone else 1)
        for i, own in zip(members, results, strict=True):
            assert len(own) == len(outputs[i])
            for name, array in zip(outputs[i], own, strict=True):
                np.testing.assert_array_equal(array, expected(arrays[i], name))
                assert array.flags.c_contiguous


@given(st.lists(st.integers(1, 6), min_size=1, max_size=10))
def test_stacked_and_split_every_request_has_its_own_rows_back(counts: list[int]) -> None:
    layout = Layout(row_signature(length=4), BatchPolicy())
    arrays = [np.random.default_rng(i).random((n, 4)) for i, n in enumerate(counts)]
    x, results = run(layout, parts_of(layout, arrays))
    np.testing.assert_array_equal(x, np.concatenate(arrays))
    for array, own in zip(arrays, results, strict=True):
        np.testing.assert_array_equal(own[0], expected(array, "same"))


def test_a_request_that_runs_alone_is_not_copied() -> None:
    layout = Layout(row_signature(), PADDED)
    x = np.ones((2, 5))
    inputs, rows = layout.stack(parts_of(layout, [x]), (5,))
    assert inputs["x"] is x
    assert rows == 2


def test_a_lone_row_is_run_with_its_copy_and_answered_once() -> None:
    layout = Layout(row_signature(), BatchPolicy(), pad_lone_rows=True)
    x, results = run(layout, parts_of(layout, [np.array([[1.0, 2.0]])]))
    assert x.tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert results[0][0].tolist() == [[3.0, 5.0]]


def test_buckets_pad_the_same_way_alone_and_in_company() -> None:
    layout = Layout(row_signature(), bucketed(4, 8))
    alone, _ = run(layout, parts_of(layout, [np.ones((2, 3))]))
    together, _ = run(layout, parts_of(layout, [np.ones((2, 3)), np.ones((1, 4))]))
    assert alone.shape == (2, 4)
    assert together.shape == (3, 4)
    np.testing.assert_array_equal(alone, together[:2])


def test_lengths_beyond_the_last_bucket_run_with_their_equals_only() -> None:
    layout = Layout(row_signature(), bucketed(4))
    nine, other_nine, ten, three = parts_of(layout, [np.ones((1, n)) for n in (9, 9, 10, 3)])
    assert nine.key == other_nine.key
    assert len({nine.key, ten.key, three.key}) == 3
    assert layout.target([nine, other_nine]) == (9,)


def two_inputs() -> Signature:
    return Signature(
        (TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "INT64", (-1, -1)), TensorSpec("w", "FP32", (-1, 2))),
        (TensorSpec("hidden", "FP32", (-1, -1, 2)), TensorSpec("pooled", "FP32", (-1, 2))),
        True,
    )


def place(layout: Layout, **inputs: NDArray[Any]) -> Part:
    rows = len(next(iter(inputs.values())))
    key, lengths, elements = layout.place(inputs, rows)
    return Part(Ticket(("hidden", "pooled")), inputs, rows, 1, 0, key, lengths, elements)


def test_inputs_are_filled_as_declared_and_the_mask_with_nothing() -> None:
    padding = PaddingAxis({"ids": 1, "mask": 1}, {"hidden": 1}, fill={"ids": 7})
    layout = Layout(two_inputs(), BatchPolicy(padding=(padding,)))
    w = np.zeros((1, 2), np.float32)
    parts = [
        place(layout, ids=np.array([[1, 2, 3]]), mask=np.array([[1, 1, 1]]), w=w),
        place(layout, ids=np.array([[4]]), mask=np.array([[1]]), w=w + 1),
    ]
    assert parts[0].key == parts[1].key
    target = layout.target(parts)
    inputs, _ = layout.stack(parts, target)
    assert inputs["ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert inputs["mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs["w"].tolist() == [[0, 0], [1, 1]]
    assert parts[1].elements == 4
    assert layout.row_elements(parts[1], target) == 8
    hidden = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    results = layout.split([hidden, w], ("hidden", "pooled"), parts[:1] + parts[1:], target)
    assert results[0][0].shape == (1, 3, 2)
    assert results[1][0].tolist() == [[[6.0, 7.0]]]


def test_a_request_whose_inputs_disagree_about_the_length_runs_as_it_is() -> None:
    padding = PaddingAxis({"ids": 1, "mask": 1}, {"hidden": 1}, buckets=(8,))
    layout = Layout(two_inputs(), BatchPolicy(padding=(padding,)))
    w = np.zeros((1, 2), np.float32)
    odd = place(layout, ids=np.array([[1, 2, 3]]), mask=np.array([[1, 1]]), w=w)
    even = place(layout, ids=np.array([[1, 2, 3]]), mask=np.array([[1, 1, 1]]), w=w)
    assert odd.key != even.key
    assert layout.target([odd]) == ()
    assert layout.stack([odd], ())[0]["ids"].shape == (1, 3)


def test_an_output_that_does_not_follow_its_declared_axis_is_an_error_not_a_guess() -> None:
    layout = Layout(row_signature(), PADDED)
    parts = parts_of(layout, [np.ones((1, 2)), np.ones((1, 4))])
    with pytest.raises(ModelExecutionError, match=r"'same'.*axis 1.*expected 4, got 6"):
        layout.split([np.ones((2, 6))], ("same",), parts, (4,))


def test_two_axes_may_be_padded_and_text_is_filled_with_nothing() -> None:
    signature = Signature(
        (TensorSpec("words", "BYTES", (-1, -1, -1)), TensorSpec("half", "BF16", (-1, -1))),
        (TensorSpec("words2", "BYTES", (-1, -1, -1)),),
        True,
    )
    paddings = (
        PaddingAxis({"words": 1, "half": 1}, {"words2": 1}, fill={"half": 1.0}),
        PaddingAxis({"words": 2}, {"words2": 2}, buckets=(3,)),
    )
    layout = Layout(signature, BatchPolicy(padding=paddings))

    def part(height: int, width: int) -> Part:
        words = np.full((1, height, width), "w", dtype=object)
        inputs = {"words": words, "half": np.zeros((1, height), "<u2")}
        key, lengths, elements = layout.place(inputs, 1)
        return Part(Ticket(("words2",)), inputs, 1, 1, 0, key, lengths, elements)

    parts = [part(1, 2), part(2, 1)]
    target = layout.target(parts)
    assert target == (2, 3)
    assert parts[0].elements == 3 + 1
    assert layout.row_elements(parts[0], (2, 2)) == 6 + 2
    inputs, _ = layout.stack(parts, target)
    assert inputs["words"][0].tolist() == [["w", "w", ""], ["", "", ""]]
    assert inputs["half"].tolist() == [[0, 0x3F80], [0, 0]]
    results = layout.split([inputs["words"]], ("words2",), parts, target)
    assert [own[0].tolist() for own in results] == [[[["w", "w"]]], [[["w"], ["w"]]]]


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        (PaddingAxis({"y": 1}), "input 'y', expected one of 'x'"),
        (PaddingAxis({"x": 0}), "axis 0 of the input 'x'"),
        (PaddingAxis({"x": 2}), "axis 2 of the input 'x'"),
        (PaddingAxis({"x": 1}, {"total": 1}), "axis 1 of the output 'total'"),
    ],
)
def test_padding_that_does_not_fit_the_signature_is_refused_at_load(padding: PaddingAxis, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        Layout(row_signature(), BatchPolicy(padding=(padding,)))


# ---- mates by length


def lengths_of(batch: list[Ticket]) -> list[int]:
    return sorted(ticket.parts[0].lengths[0] for ticket in batch)


def test_mates_are_chosen_by_length_around_the_oldest() -> None:
    waiting = Waiting(PADDED, max_rows=4)
    for length in (20, 100, 21, 5, 19, 101, 22, 6):
        waiting.add(length=length)
    assert lengths_of(waiting.take()) == [19, 20, 21, 22]
    assert lengths_of(waiting.take()) == [100, 101]
    assert lengths_of(waiting.take()) == [5, 6]


def test_company_that_costs_more_in_padding_than_it_gains_is_declined() -> None:
    # 15 % more rows a second from eight rows together, as MiniLM has: not worth a quarter of padding.
    gains = {1: 1.0, 2: 1.96, 4: 3.76, 8: 6.95}
    waiting = Waiting(PADDED, {n: s * 1e-3 for n, s in gains.items()}, max_rows=8, row_elements=40)
    alone = waiting.add(length=60)
    for _ in range(7):
        waiting.add(length=40)
    assert waiting.take() == [alone]
    assert lengths_of(waiting.take()) == [40] * 7


def test_no_batch_has_more_padding_than_the_operator_allows() -> None:
    policy = BatchPolicy(padding=(PaddingAxis({"x": 1}, {"same": 1}, max_waste=0.1),))
    waiting = Waiting(policy, max_rows=64)
    rng = np.random.default_rng(5)
    for length in rng.integers(1, 60, 200):
        waiting.add(length=int(length))
    seen = 0
    while batch := waiting.take():
        lengths = lengths_of(batch)
        assert 1 - sum(lengths) / (len(lengths) * max(lengths)) <= 0.1 + 1e-9
        seen += len(lengths)
    assert seen == 200


def test_a_window_of_mixed_lengths_is_emptied_with_little_padding() -> None:
    waiting = Waiting(PADDED, max_rows=8)
    rng = np.random.default_rng(11)
    lengths = [int(n) for n in rng.integers(4, 60, 64)]
    for length in lengths:
        waiting.add(length=length)
    run_elements = runs = 0
    while batch := waiting.take():
        taken = lengths_of(batch)
        run_elements += len(taken) * max(taken)
        runs += 1
    assert run_elements < 1.25 * sum(lengths)
    assert runs <= 16
