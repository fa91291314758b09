"""What gateway, fork server and worker say to each other: one datagram each, packed with ``struct``, never pickled.

Three kinds of sockets, all ``SOCK_SEQPACKET`` pairs without a name, so a message arrives whole or not at all and nobody
else can say anything:

    gateway - fork server    SPAWN (with the worker's end of a control socket)
                             SPAWNED (with a pidfd), ENDED
    gateway - worker         control: LOAD, LANE (with that lane's socket), TERMINATE, WARM; LOADED, FAILED, WARMED
    gateway - worker's lane  INPUTS and OUTPUTS (with an arena), RUN, REFUSED; DONE, ERROR, NEED

A lane runs one request at a time. Its RUN and DONE say where in the arenas the tensors lie. Both are cached by their
bytes on the other side, because a model gets the same few shapes over and over: a message seen before costs a look into
a dictionary, not a parse and not a check. Nothing that changes from run to run is in them.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ...core.tensors import MAX_RANK

SPAWN: Final = 1
SPAWNED: Final = 2
ENDED: Final = 3
FAILED: Final = 4

LOAD: Final = 10
LOADED: Final = 11
LANE: Final = 12
TERMINATE: Final = 13
WARM: Final = 14
WARMED: Final = 15
SET_LIMIT: Final = 16

SPEAK: Final = 17
"""Become the engine of a language model, see ``backends/language/child.py``; with a stream and the model's folder."""

INPUTS: Final = 20
OUTPUTS: Final = 21
RUN: Final = 22
REFUSED: Final = 23
DONE: Final = 24
ERROR: Final = 25
NEED: Final = 26

MODEL_FAILED: Final = 1
TERMINATED: Final = 2
DEFECT: Final = 3
TOO_LARGE: Final = 4
"""Kinds of ERROR: the model refused or failed; the run was ended through its handle; the worker itself is wrong; the
run takes more memory than there is for it."""

MAX_TEXT_BYTES: Final = 1200
CONTROL_BYTES: Final = 4096
MAX_FDS: Final = 64

SERVER_MESSAGE: Final = struct.Struct("<BIi")
"""Kind, number of the spawn, pid (SPAWNED) or wait status (ENDED)."""
TERMINATE_MESSAGE: Final = struct.Struct("<BIQ")
"""Kind, lane, number of the run on that lane."""
NUMBER_MESSAGE: Final = struct.Struct("<BQ")
"""Kind and a number: bytes that are needed (NEED), bytes of a report (LOADED), rows (WARM), lane (LANE)."""

_HEAD: Final = struct.Struct("<BHH")
_TENSOR: Final = struct.Struct("<HBQQ")
_RESULT: Final = struct.Struct("<BQQ")


class ProtocolError(Exception):
    """The other side said what it may not."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor in an arena.

    Attributes:
        index: of the input or output in the signature.
        offset, nbytes: where it lies.
        shape: its dimensions.
    """

    index: int
    offset: int
    nbytes: int
    shape: tuple[int, ...]


def pack_run(inputs: Sequence[Placed], outputs: Sequence[int]) -> bytes:
    parts = [_HEAD.pack(RUN, len(inputs), len(outputs))]
    for placed in inputs:
        parts.append(_TENSOR.pack(placed.index, len(placed.shape), placed.offset, placed.nbytes))
        parts.append(struct.pack(f"<{len(placed.shape)}Q", *placed.shape))
    parts.append(struct.pack(f"<{len(outputs)}H", *outputs))
    return b"".join(parts)


def unpack_run(message: bytes) -> tuple[list[Placed], tuple[int, ...]]:
    """In the worker, which trusts the gateway."""
    _, count, wanted = _HEAD.unpack_from(message)
    at = _HEAD.size
    inputs = []
    for _ in range(count):
        index, rank, offset, nbytes = _TENSOR.unpack_from(message, at)
        at += _TENSOR.size
        inputs.append(Placed(index, offset, nbytes, struct.unpack_from(f"<{rank}Q", message, at)))
        at += 8 * rank
    return inputs, struct.unpack_from(f"<{wanted}H", message, at)


def pack_done(outputs: Sequence[Placed]) -> bytes:
    parts = [_HEAD.pack(DONE, len(outputs), 0)]
    for placed in outputs:
        parts.append(_RESULT.pack(len(placed.shape), placed.offset, placed.nbytes))
        parts.append(struct.pack(f"<{len(placed.shape)}Q", *placed.shape))
    return b"".join(parts)


def unpack_done(message: bytes, expected: int, size: int) -> list[Placed]:
    """In the gateway, which trusts nothing of it.

    Args:
        expected: outputs that were asked for.
        size: bytes of the arena that they lie in.
    Raises:
        ProtocolError: a number is not what it must be, or a tensor reaches beyond the arena.
    """
    try:
        _, count, zero = _HEAD.unpack_from(message)
        if count != expected or zero:
            raise ProtocolError(f"{count} outputs for {expected} that were asked for")
        at = _HEAD.size
        outputs = []
        for index in range(count):
            rank, offset, nbytes = _RESULT.unpack_from(message, at)
            at += _RESULT.size
            if rank > MAX_RANK or offset > size or nbytes > size - offset:
                raise ProtocolError("an output lies outside of the arena")
            outputs.append(Placed(index, offset, nbytes, struct.unpack_from(f"<{rank}Q", message, at)))
            at += 8 * rank
    except struct.error:
        raise ProtocolError("a message is too short") from None
    if at != len(message):
        raise ProtocolError("a message is too long")
    return outputs


def pack_error(kind: int, text: str) -> bytes:
    return bytes((ERROR, kind)) + text.encode("utf-8", "replace")[:MAX_TEXT_BYTES]


def clean_text(raw: bytes) -> str:
    """Text of a worker, for a log or a caller: one line that can be printed, of bounded length."""
    text = raw[:MAX_TEXT_BYTES].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text).strip()


def packet_bytes(tensors: int) -> int:
    """The longest RUN or DONE with so many tensors."""
    return 64 + tensors * (_TENSOR.size + 8 * MAX_RANK + 2)


def send_fds(sock: socket.socket, message: bytes, fds: Sequence[int]) -> None:
    socket.send_fds(sock, [message], list(fds))


def receive(sock: socket.socket, size: int = CONTROL_BYTES) -> tuple[bytes, list[int]]:
    """A message with the descriptors that came with it; ``b""`` where the other side is gone.

    Raises:
        ProtocolError: it does not fit, or there was no room for its descriptors.
    """
    message, fds, whole = receive_some(sock, size)
    if not whole:
        for fd in fds:
            os.close(fd)
        raise ProtocolError("a message is too long")
    return message, fds


def receive_some(sock: socket.socket, size: int = CONTROL_BYTES) -> tuple[bytes, list[int], bool]:
    """As ``receive``, and whether that was all: a process that has no descriptor left gets messages without theirs."""
    fds = array.array("i")
    message, ancillary, flags, _ = sock.recvmsg(
        size, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds), not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
