"""Shared memory of one lane: anonymous files that the gateway makes, both sides map, and nobody can resize.

A worker that could shrink the file would end the gateway with SIGBUS at its next read, and one that could grow it would
keep memory outside of its own limits. So an arena is sealed against both as soon as it has its size; one that is too
small is replaced by another. Pages exist once somebody has written to them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

PAGE: Final = mmap.PAGESIZE
ALIGNMENT: Final = 64
"""Of every tensor in an arena: a cache line, and what the widest vector instructions want."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """A mapped anonymous file of fixed size.

    Attributes:
        fd: to be sent to the other side; -1 once ``forget_fd`` was called.
        size: in bytes, a multiple of the page.
        memory: the whole arena as ``uint8``.
    """

    __slots__ = ("_map", "fd", "memory", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.memory: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    @classmethod
    def create(cls, size: int) -> Arena:
        """A new one with at least ``size`` bytes, sealed.

        Raises:
            OSError: no memory, or no file descriptor is left.
        """
        size = max(-(-size // PAGE), 1) * PAGE
        fd = os.memfd_create("inferway-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, size)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> Arena:
        """The one that the other side made; takes the descriptor over and closes it."""
        try:
            arena = cls(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        arena.fd = -1
        return arena

    def view(self, offset: int, dtype: np.dtype[Any], shape: Sequence[int]) -> NDArray[Any]:
        """A tensor in the arena. The caller has checked that it lies inside."""
        return np.ndarray(shape, dtype, self.memory.data, offset)

    def release_pages(self) -> None:
        """Give the memory back; what the arena held reads as zeros."""
        self._map.madvise(mmap.MADV_REMOVE)

    def forget_fd(self) -> None:
        """Close the descriptor once the other side has it; the mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def aligned(size: int) -> int:
    """The offset at which the next tensor may begin."""
    return (size + ALIGNMENT - 1) & -ALIGNMENT
