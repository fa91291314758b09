"""A lane against a worker that says whatever it likes."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferway_gateway.backends.worker import messages
from inferway_gateway.backends.worker.lane import Lane
from inferway_gateway.backends.worker.messages import Placed
from inferway_gateway.core.backend import RunHandle
from inferway_gateway.core.errors import DeadlineExceededError, GatewayError, ModelExecutionError, WorkerCrashedError
from inferway_gateway.core.tensors import Signature, TensorSpec

SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1,)),),
    (TensorSpec("y", "FP32", (-1,)), TensorSpec("s", "BYTES", (-1,)), TensorSpec("b", "BOOL", (-1,))),
)
X = {"x": np.ones(4, np.float32)}


class Nobody:
    users = 0
    retired = False

    def close(self) -> None:
        """Nothing to end."""


@contextmanager
def speaking(answer: Callable[[socket.socket], None]) -> Iterator[tuple[Lane, list[str]]]:
    """A lane whose worker answers each run with ``answer``, and what the lane complained of."""
    ours, theirs = messages.socket_pair()
    lost: list[str] = []
    lane = Lane(
        0,
        Nobody(),
        ours,
        SIGNATURE,
        on_loop=False,
        stop=lambda lane, run: None,
        lost=lost.append,
        answer_limit_bytes=1 << 20,
    )

    def work() -> None:
        with theirs:
            while True:
                message, fds = messages.receive(theirs, 1 << 16)
                for fd in fds:
                    os.close(fd)
                if not message:
                    return
                if message[0] == messages.RUN:
                    answer(theirs)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lane, lost
    finally:
        lane.close()
        thread.join()


def with_room(then: bytes) -> Callable[[socket.socket], None]:
    """Ask for an arena and answer, once it is there."""

    def answer(sock: socket.socket) -> None:
        sock.send(messages.NUMBER_MESSAGE.pack(messages.NEED, 4096))
        _, fds = messages.receive(sock, 1 << 16)
        for fd in fds:
            os.close(fd)
        sock.send(then)

    return answer


BAD = {
    "nothing known": b"\xff",
    "a word of one byte": bytes((messages.DONE,)),
    "no outputs": messages.pack_done([]),
    "two outputs": messages.pack_done([Placed(0, 0, 16, (4,)), Placed(1, 64, 16, (4,))]),
    "beyond the arena": messages.pack_done([Placed(0, 1 << 40, 16, (4,))]),
    "begins inside and ends beyond": messages.pack_done([Placed(0, 65532, 16, (4,))]),
    "size that wraps around": messages.pack_done([Placed(0, 8, (1 << 64) - 8, (4,))]),
    "shape that is not its size": messages.pack_done([Placed(0, 0, 16, (5,))]),
    "shape whose product wraps around": messages.pack_done([Placed(0, 0, 0, (1 << 32, 1 << 32))]),
    "no array has that shape": messages.pack_done([Placed(0, 0, 0, ((1 << 64) - 1, 0))]),
    "too many dimensions": messages.pack_done([Placed(0, 0, 4, (1,) * 33)]),
    "cut": messages.pack_done([Placed(0, 0, 16, (4,))])[:-1],
    "left over": messages.pack_done([Placed(0, 0, 16, (4,))]) + b"x",
    "of its own": messages.pack_error(messages.DEFECT, "SystemError"),
    "an error without a kind": bytes((messages.ERROR,)),
    "room again": messages.NUMBER_MESSAGE.pack(messages.NEED, 4096),
}


@pytest.mark.parametrize("message", BAD.values(), ids=BAD)
def test_what_a_worker_may_not_say_ends_it(message: bytes) -> None:
    with speaking(with_room(message)) as (lane, lost):
        with pytest.raises(WorkerCrashedError):
            lane.run(X, ("y",), None)
        assert len(lost) == 1
        assert lost[0]


@given(st.binary(min_size=1, max_size=80))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_message_is_an_answer_or_a_known_error(message: bytes) -> None:
    def answer(sock: socket.socket) -> None:
        with_room(message)(sock)
        sock.shutdown(socket.SHUT_WR)  # where the lane waits for more

    with speaking(answer) as (lane, _):
        try:
            found = lane.run(X, ("y",), None)
        except GatewayError:
            return
        assert found[0].dtype == np.float32


def test_strings_and_booleans_are_made_good_or_refused() -> None:
    good = messages.pack_done([Placed(0, 0, 4, (1,)), Placed(1, 64, 3, (3,))])
    with speaking(with_room(good)) as (lane, lost):
        found = lane.run(X, ("s", "b"), None)
        assert found[0].tolist() == [""]
        assert found[1].tolist() == [False] * 3
        assert not lost
    with (
        speaking(with_room(messages.pack_done([Placed(0, 0, 2, (1,))]))) as (lane, lost),
        pytest.raises(WorkerCrashedError),
    ):
        lane.run(X, ("s",), None)


def test_room_beyond_the_bound_is_refused_in_words() -> None:
    def answer(sock: socket.socket) -> None:
        sock.send(messages.NUMBER_MESSAGE.pack(messages.NEED, 1 << 62))
        message, _ = messages.receive(sock, 1 << 16)
        assert message[0] == messages.REFUSED
        sock.send(messages.pack_error(messages.MODEL_FAILED, messages.clean_text(message[1:])))

    with speaking(answer) as (lane, lost):
        with pytest.raises(ModelExecutionError, match="a run may give 1048576"):
            lane.run(X, ("y",), None)
        assert not lost


def test_text_of_a_worker_is_one_line_of_bounded_length() -> None:
    text = b"\x1b[31mline\nnext\x00\xff" + b"x" * 3000

    def answer(sock: socket.socket) -> None:
        sock.send(bytes((messages.ERROR, messages.MODEL_FAILED)) + text)

    with speaking(answer) as (lane, _), pytest.raises(ModelExecutionError) as failed:
        lane.run(X, ("y",), None)
    message = failed.value.message
    assert message.isprintable()
    assert len(message) <= messages.MAX_TEXT_BYTES


def test_the_end_of_a_worker_is_a_crash_or_the_deadline_that_ended_it() -> None:
    with speaking(lambda sock: sock.shutdown(socket.SHUT_RDWR)) as (lane, lost):
        with pytest.raises(WorkerCrashedError):
            lane.run(X, ("y",), None)
        assert lost == [""]
    handle = RunHandle()

    def late(sock: socket.socket) -> None:
        handle.terminate()
        sock.shutdown(socket.SHUT_RDWR)

    with speaking(late) as (lane, _), pytest.raises(DeadlineExceededError):
        lane.run(X, ("y",), handle)


def test_a_run_that_was_ended_before_is_not_begun() -> None:
    handle = RunHandle()
    handle.terminate()
    with speaking(lambda sock: None) as (lane, _):
        with pytest.raises(DeadlineExceededError):
            lane.run(X, ("y",), handle)
        assert lane.runs == 0


def test_messages_are_read_as_they_were_written() -> None:
    inputs = [Placed(3, 64, 24, (2, 3)), Placed(0, 128, 0, (0,)), Placed(1, 192, 4, ())]
    assert messages.unpack_run(messages.pack_run(inputs, [2, 0])) == (inputs, (2, 0))
    outputs = [Placed(0, 0, 8, (2,)), Placed(1, 64, 0, (0, 5))]
    assert messages.unpack_done(messages.pack_done(outputs), 2, 4096) == outputs
    with pytest.raises(struct.error):
        messages.unpack_run(b"\0")


@pytest.mark.parametrize("waits", [True, False], ids=["waited for", "told of"])
@pytest.mark.parametrize("message", [*BAD.values(), b""], ids=[*BAD, "its end"])
async def test_what_a_worker_may_not_say_to_a_loop_ends_its_run_and_nothing_else(message: bytes, waits: bool) -> None:
    ours, theirs = messages.socket_pair()
    lost: list[str] = []
    lane = Lane(
        0, Nobody(), ours, SIGNATURE, on_loop=True, stop=lambda lane, run: None, lost=lost.append,
        answer_limit_bytes=1 << 20,
    )  # fmt: skip
    over: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    with theirs:
        # Said before it is asked anything, as a worker that wants to confuse would.
        theirs.send(messages.NUMBER_MESSAGE.pack(messages.NEED, 4096))
        if message:
            theirs.send(message)
        else:
            theirs.shutdown(socket.SHUT_WR)
        lane.begin(X, ("y",), None, over.set_result)
        if waits:
            lane.wait()
            assert over.done(), "all of it was there"
        async with asyncio.timeout(20):
            assert isinstance(await over, WorkerCrashedError)
        assert len(lost) == 1
        lane.close()
        await asyncio.sleep(0)
