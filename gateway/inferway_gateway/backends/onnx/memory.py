"""Giving memory back to the system when a model goes, without taking every tensor's from it anew.

glibc keeps what a large model freed: after loading and dropping a ResNet-50 a process stayed at 302 MB, against 61 MB
with thresholds that are set (2026-11, 2 cpus, onnxruntime 1.32). Left alone they grow with each large block that is
freed, so that the next one comes from a heap that cannot shrink; setting them once stops that growth.

Blocks from the threshold on are mapped as they are allocated and unmapped as they are freed, so each of their pages
costs a fault at every run. That is nothing beside the reading of weights, but more than anything else beside the run of
a batch: with a threshold of 64 KiB a worker did a quarter of the rows that it does with 4 MiB (rows of 64 KiB, sixteen
at once). So batches of usual size come from the heap, and weights do not.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from typing import Any, Final

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_MMAP_THRESHOLD_BYTES: Final = 4 << 20
_TRIM_THRESHOLD_BYTES: Final = 16 << 20
"""Free bytes at a heap's end that are kept; ``trim`` gives them back as well."""


@functools.cache
def _glibc() -> Any | None:
    """The C library where it is glibc; None elsewhere, where nothing here has any effect."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version.restype = ctypes.c_char_p
        library.gnu_get_libc_version()
    except (OSError, AttributeError):
        return None
    library.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library


@functools.cache
def return_freed_memory() -> bool:
    """Have blocks of 4 MiB and more go back to the system as they are freed. Once a process; later calls do nothing.

    Returns:
        Whether the C library understood.
    """
    library = _glibc()
    if library is None:
        return False
    results = (
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES),
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES),
    )
    return results == (1, 1)


def trim() -> None:
    """Give free pages back now. Takes milliseconds: after an unload, never per request."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
