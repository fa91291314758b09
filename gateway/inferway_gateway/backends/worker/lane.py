"""One run at a time through shared memory: the gateway's side of a lane.

Inputs are copied into one arena, a message says where; the worker answers where in the other arena the outputs lie, and
they are copied out. What the worker says is checked against the arena and the signature: datatypes are the
signature's and never the worker's, and a tensor that reaches beyond the arena ends the worker. Its memory is read after
its message, never trusted to stay as it is: what is checked is the message, which is ours once it is here, and strings
are copied before they are looked at.

Both messages are remembered with what was made of them: a model gets the same few shapes over and over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import select
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.backend import Done, RunHandle
from ...core.errors import (
    DeadlineExceededError,
    GatewayError,
    ModelExecutionError,
    RunTooLargeError,
    WorkerCrashedError,
)
from ...core.tensors import DTYPES, Arrays, Signature
from . import messages
from .arena import Arena, aligned
from .messages import Placed, ProtocolError
from .strings import pack_strings, unpack_strings

_log = logging.getLogger(__name__)

FIRST_BYTES: Final = 64 * 1024
"""Of an arena. Pages that nobody writes to cost nothing."""
KEEP_BYTES: Final = 4 * 1024 * 1024
"""An idle arena above this gives its pages back."""
WAIT_MS: Final = 1
"""The least that the system call takes. A run that is waited for is expected to take a twentieth of it."""
_PLANS: Final = 64
_BOOL: Final = np.dtype(np.bool_)

_Key = tuple[Any, ...]
_Answer = list[tuple[NDArray[Any], bool]]


class Owner(Protocol):
    """The process that a lane leads to, as the session counts its users."""

    users: int
    retired: bool

    def close(self) -> None: ...


class Lane:
    """A way into a worker for one run at a time.

    Args:
        number: of the lane in its worker.
        owner: the process that it leads to.
        sock: connected to the worker's lane.
        on_loop: whether runs are begun on an event loop and not waited for on a thread.
        stop: ends run ``number`` of this lane, with SIGKILL where it must be. From any thread.
        lost: the worker ended, or has to: it broke the protocol for the reason given.
        answer_limit_bytes: of one run's outputs.
    """

    def __init__(
        self,
        number: int,
        owner: Owner,
        sock: socket.socket,
        signature: Signature,
        *,
        on_loop: bool,
        stop: Callable[[Lane, int], None],
        lost: Callable[[str], None],
        answer_limit_bytes: int,
    ) -> None:
        self.number = number
        self.owner: Final[Owner] = owner
        self.on_loop = on_loop
        self.runs = 0
        """Runs that were begun; both sides count them alike."""
        self.since: float | None = None
        """When the present run began; None: there is none."""
        self.took_s = 0.0
        """How long the last run took."""
        self.last_used = 0.0
        self._socket = sock
        sock.setblocking(not on_loop)
        self._stop = stop
        self._lost = lost
        self._limit = answer_limit_bytes
        self._inputs: Arena | None = None
        self._outputs: Arena | None = None
        self._input_specs = {spec.name: (index, spec.datatype) for index, spec in enumerate(signature.inputs)}
        self._output_specs = {spec.name: (index, spec.datatype) for index, spec in enumerate(signature.outputs)}
        self._strings = any(spec.datatype == "BYTES" for spec in signature.inputs)
        self._packet = messages.packet_bytes(max(len(self._input_specs), len(self._output_specs), 16))
        self._plans: dict[_Key, tuple[bytes, list[NDArray[Any]]]] = {}
        self._answers: dict[tuple[bytes, Sequence[str]], _Answer] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: tuple[Sequence[str], RunHandle | None, Done] | None = None
        self._poll: select.poll | None = None
        self._grown = False
        self._closed = False

    # -- a run, waited for ---------------------------------------------------------------------------------------------

    def run(self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None) -> list[NDArray[Any]]:
        """As ``Session.run``; ``WorkerCrashedError`` where the worker ended meanwhile."""
        self._send(inputs, outputs, handle)
        try:
            while True:
                try:
                    message = self._socket.recv(self._packet)
                except OSError:
                    message = b""
                found = self._taken(message, outputs, handle)
                if found is not None:
                    return found
        finally:
            self._over(handle)

    # -- a run on the event loop ---------------------------------------------------------------------------------------

    def begin(self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None, done: Done) -> None:
        """Begin a run; when it is over, ``done`` is called on this loop.

        Raises:
            GatewayError: it could not be begun; ``done`` is not called.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            loop.add_reader(self._socket.fileno(), self._readable)
            self._loop = loop
        self._pending = outputs, handle, done
        try:
            self._send(inputs, outputs, handle)
        except BaseException:
            self._pending = None
            raise

    def wait(self) -> None:
        """Stay on the loop's thread until the run that was begun is over, ``WAIT_MS`` at most.

        For a run of some microseconds that is cheaper for everybody than to come back to the loop: that takes two of
        its turns and two changes of task, which is more than the run. The processor is free meanwhile.
        """
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._socket, select.POLLIN)
        # A second time where the worker has to be given room for its answer first.
        for _ in range(2):
            if self._pending is None or not self._poll.poll(WAIT_MS):
                return
            self._readable()

    def _readable(self) -> None:
        try:
            message = self._socket.recv(self._packet)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        pending = self._pending
        if pending is None:
            # Either it has ended while nothing ran, or it speaks unasked, which none of ours does.
            self._detach()
            self._lost("it spoke unasked" if message else "")
            return
        outputs, handle, done = pending
        outcome: list[NDArray[Any]] | GatewayError | None
        try:
            outcome = self._taken(message, outputs, handle)
        except GatewayError as error:
            outcome = error
        if outcome is None:
            return
        self._pending = None
        if not message:
            self._detach()
        self._over(handle)
        done(outcome)

    def _detach(self) -> None:
        if self._loop is not None and self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())

    # -- both ----------------------------------------------------------------------------------------------------------

    def _send(self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None) -> None:
        if handle is not None and handle.terminated:
            raise DeadlineExceededError("the run was ended before it began")
        self._grown = False
        try:
            message = self._placed(inputs, outputs)
            self.runs += 1
            self.since = time.monotonic()
            if handle is not None:
                handle.bind(partial(self._stop, self, self.runs))
            self._socket.send(message)
        except OSError as error:
            self._over(handle)
            if isinstance(error, BrokenPipeError | ConnectionError):
                self._lost("")
                raise WorkerCrashedError("the model's process had ended") from None
            raise ModelExecutionError(f"the run could not be handed to the model's process: {error.strerror}") from None

    def _over(self, handle: RunHandle | None) -> None:
        self.last_used = now = time.monotonic()
        if self.since is not None:
            self.took_s = now - self.since
            self.since = None
        if handle is not None:
            handle.bind(None)

    def _placed(self, inputs: Arrays, outputs: Sequence[str]) -> bytes:
        """Copy the inputs into the arena; the message that says where they are."""
        if self._strings:
            return self._placed_strings(inputs, outputs)
        arrays = inputs.values()
        key = (*inputs, *[array.shape for array in arrays], outputs)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(inputs, outputs, [array.nbytes for array in arrays])
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = plan
        message, views = plan
        for view, array in zip(views, arrays, strict=True):
            view[...] = array
        return message

    def _placed_strings(self, inputs: Arrays, outputs: Sequence[str]) -> bytes:
        packed = {
            name: np.frombuffer(pack_strings(array), np.uint8) if array.dtype == object else array
            for name, array in inputs.items()
        }
        message, views = self._plan(inputs, outputs, [array.nbytes for array in packed.values()])
        for view, array in zip(views, packed.values(), strict=True):
            view[...] = array
        return message

    def _plan(self, inputs: Arrays, outputs: Sequence[str], sizes: Sequence[int]) -> tuple[bytes, list[NDArray[Any]]]:
        placed = []
        at = 0
        for (name, array), nbytes in zip(inputs.items(), sizes, strict=True):
            placed.append(Placed(self._input_specs[name][0], at, nbytes, array.shape))
            at = aligned(at + nbytes)
        arena = self._inputs
        if arena is None or at > arena.size:
            arena = self._inputs = self._hand_over(messages.INPUTS, max(at, FIRST_BYTES))
            self._plans.clear()
        views = []
        for one, (name, array) in zip(placed, inputs.items(), strict=True):
            if self._input_specs[name][1] == "BYTES":
                views.append(arena.memory[one.offset : one.offset + one.nbytes])
            else:
                views.append(arena.view(one.offset, array.dtype, array.shape))
        return messages.pack_run(placed, [self._output_specs[name][0] for name in outputs]), views

    def _hand_over(self, kind: int, size: int) -> Arena:
        arena = Arena.create(size)
        messages.send_fds(self._socket, bytes((kind,)), [arena.fd])
        arena.forget_fd()
        return arena

    def _taken(self, message: bytes, outputs: Sequence[str], handle: RunHandle | None) -> list[NDArray[Any]] | None:
        """The outputs, or None where more is to come.

        Raises:
            GatewayError: what the run ended with.
        """
        known = self._answers.get((message, outputs)) if self._outputs is not None else None
        if known is None:
            if not message:
                self._lost("")
                raise self._crash(handle)
            try:
                known = self._read(message, outputs)
            except ProtocolError as error:
                self._lost(str(error))
                raise self._crash(handle) from None
            if known is None:
                return None
            if isinstance(known, list) and known and known[0][0].dtype == object:
                return [array for array, _ in known]
        return [view.view(np.uint8) != 0 if is_bool else view.copy() for view, is_bool in known]

    def _crash(self, handle: RunHandle | None) -> GatewayError:
        if handle is not None and handle.terminated:
            return DeadlineExceededError("the run did not end in time; the model's process was ended")
        return WorkerCrashedError("the model's process died while it ran this request")

    def _read(self, message: bytes, outputs: Sequence[str]) -> _Answer | None:
        kind = message[0]
        if kind == messages.DONE:
            return self._read_done(message, outputs)
        if kind == messages.NEED and len(message) == messages.NUMBER_MESSAGE.size:
            self._make_room(messages.NUMBER_MESSAGE.unpack(message)[1])
            return None
        if kind == messages.ERROR and len(message) >= 2:
            text = messages.clean_text(message[2:])
            if message[1] == messages.TERMINATED:
                raise DeadlineExceededError("the run was ended before it was done")
            if message[1] == messages.MODEL_FAILED:
                raise ModelExecutionError(text)
            if message[1] == messages.TOO_LARGE:
                raise RunTooLargeError(text)
            raise ProtocolError(f"it failed with {text}")
        raise ProtocolError(f"a message of kind {kind}")

    def _make_room(self, size: int) -> None:
        if self._grown:
            raise ProtocolError("it asked twice for room")
        self._grown = True
        try:
            if size > self._limit:
                text = f"the outputs take {size} bytes, a run may give {self._limit}"
                self._socket.send(bytes((messages.REFUSED,)) + text.encode())
                return
            held = self._outputs.size if self._outputs is not None else 0
            self._answers.clear()
            self._outputs = None
            self._outputs = self._hand_over(messages.OUTPUTS, max(size, min(2 * held, self._limit), FIRST_BYTES))
        except OSError as error:
            raise ProtocolError(f"it could not be given room: {error.strerror}") from None

    def _read_done(self, message: bytes, outputs: Sequence[str]) -> _Answer:
        arena = self._outputs
        placed = messages.unpack_done(message, len(outputs), 0 if arena is None else arena.size)
        found: _Answer = []
        strings = False
        for one, name in zip(placed, outputs, strict=True):
            assert arena is not None
            datatype = self._output_specs[name][1]
            dtype = DTYPES[datatype]
            if datatype == "BYTES":
                strings = True
                raw = arena.memory[one.offset : one.offset + one.nbytes].tobytes()
                found.append((unpack_strings(raw, one.shape), False))
                continue
            if math.prod(one.shape) * dtype.itemsize != one.nbytes or one.nbytes > arena.size - one.offset:
                raise ProtocolError(f"output '{name}' of shape {list(one.shape)} has {one.nbytes} bytes")
            try:
                view = arena.view(one.offset, dtype, one.shape)
            except ValueError:  # no array has such a shape, even without elements
                raise ProtocolError(f"output '{name}' has shape {list(one.shape)}") from None
            found.append((view, dtype is _BOOL))
        if strings:
            return [(_own(array, is_bool), False) for array, is_bool in found]
        if len(self._answers) >= _PLANS:
            self._answers.clear()
        self._answers[message, outputs] = found
        return found

    # -- care ----------------------------------------------------------------------------------------------------------

    def trim(self) -> None:
        """Give large arenas' pages back. The lane is idle and held by the caller."""
        for arena in (self._inputs, self._outputs):
            if arena is not None and arena.size > KEEP_BYTES:
                arena.release_pages()

    @property
    def large(self) -> bool:
        return any(arena is not None and arena.size > KEEP_BYTES for arena in (self._inputs, self._outputs))

    def close(self) -> None:
        """Let go of the worker. From any thread, never during a run of it."""
        if self._closed:
            return
        self._closed = True
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._close_on_loop)
                return
        self._release()

    def _close_on_loop(self) -> None:
        self._detach()
        self._release()

    def _release(self) -> None:
        self._socket.close()
        self._plans.clear()
        self._answers.clear()
        self._inputs = self._outputs = None


def _own(array: NDArray[Any], is_bool: bool) -> NDArray[Any]:
    if array.dtype == object:
        return array
    return array.view(np.uint8) != 0 if is_bool else array.copy()
