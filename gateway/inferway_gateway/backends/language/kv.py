"""Keys and values of attention: where they lie, how they are moved, and what is remembered of prompts.

Running answers share one slab, in which each has a slot; attention reads and writes it in place, and a batch is the
slots from the first on. A prompt that is being read has arrays of its own, exactly as long as it is, which become the
first tokens of a slot, and are remembered afterwards for prompts that begin alike. Only what reading a prompt gave is
remembered, never what writing an answer gave: the two are computed by different kernels and differ in their last bits.

The slab is address space: a page of it becomes memory when it is first written to, and is given back when a long
answer ends. So each slot can be as long as the context, and what is counted are the tokens in it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)
_RELEASE_BYTES: Final = 4 << 20
"""A slot that held less is used again as it is: giving pages back and taking new ones costs more."""
_PREFIX_TOKENS: Final = 16
"""Fewer are read as fast as they are looked up and copied."""
_MAX_PREFIXES: Final = 64


@dataclass(frozen=True, slots=True)
class KvTensor:
    """One of the past's inputs, and the output that it becomes.

    Attributes:
        heads, width: of the shape ``(batch, heads, tokens, width)``.
    """

    past: str
    present: str
    heads: int
    width: int


@dataclass(frozen=True, slots=True)
class KvLayout:
    tensors: tuple[KvTensor, ...]
    dtype: np.dtype[Any]

    @property
    def token_bytes(self) -> int:
        return sum(tensor.heads * tensor.width for tensor in self.tensors) * self.dtype.itemsize

    def allocate(self, tokens: int) -> list[Array]:
        """Arrays ``(heads, tokens, width)`` for one prompt. Their content is whatever lay there."""
        return [np.empty((tensor.heads, tokens, tensor.width), self.dtype) for tensor in self.tensors]


class Slab:
    """Slots of running answers.

    Args:
        length: tokens that one may have.
    """

    def __init__(self, layout: KvLayout, slots: int, length: int) -> None:
        self._token_bytes = layout.token_bytes
        self._maps: list[mmap.mmap] = []
        self.arrays: list[Array] = []
        self.length: Final = length
        for tensor in layout.tensors:
            shape = (slots, tensor.heads, length, tensor.width)
            nbytes = int(np.prod(shape)) * layout.dtype.itemsize
            area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
            self._maps.append(area)
            self.arrays.append(np.frombuffer(area, layout.dtype).reshape(shape))

    def put(self, slot: int, source: Sequence[Array], tokens: int) -> None:
        for array, given in zip(self.arrays, source, strict=True):
            array[slot, :, :tokens] = given[:, :tokens]

    def move(self, to: int, source: int, tokens: int) -> None:
        for array in self.arrays:
            array[to, :, :tokens] = array[source, :, :tokens]

    def release(self, slot: int, tokens: int) -> None:
        """Nobody needs the slot: its memory goes back where it is much."""
        if tokens * self._token_bytes < _RELEASE_BYTES:
            return
        page = mmap.PAGESIZE
        for area, array in zip(self._maps, self.arrays, strict=True):
            size = array[0].nbytes
            start = -(-slot * size // page) * page
            stop = (slot + 1) * size // page * page
            if stop > start:
                area.madvise(mmap.MADV_DONTNEED, start, stop - start)


@dataclass(slots=True, eq=False)
class _Prefix:
    owner: tuple[str, str | None]
    tokens: NDArray[np.int64]
    arrays: list[Array]
    used: int = 0


class Prefixes:
    """Prompts that were read lately, with their keys and values.

    Kept apart by API key and adapter: with another adapter the values are others, and how fast an answer begins would
    else tell one key what another one asked.
    """

    def __init__(self, token_bytes: int) -> None:
        self._token_bytes = token_bytes
        self._found: list[_Prefix] = []
        self._clock = 0
        self.nbytes = 0

    def find(self, owner: tuple[str, str | None], prompt: NDArray[np.int64]) -> tuple[int, list[Array]]:
        """How many of the first tokens are known, and arrays that begin with theirs."""
        most, best = 0, None
        for prefix in self._found:
            if prefix.owner != owner:
                continue
            length = min(len(prompt), len(prefix.tokens))
            if length <= most:
                continue
            differing = np.flatnonzero(prompt[:length] != prefix.tokens[:length])
            common = int(differing[0]) if len(differing) else length
            if common > most:
                most, best = common, prefix
        if best is None or most < _PREFIX_TOKENS:
            return 0, []
        self._clock += 1
        best.used = self._clock
        return most, best.arrays

    def add(self, owner: tuple[str, str | None], prompt: NDArray[np.int64], arrays: list[Array]) -> None:
        if len(prompt) < _PREFIX_TOKENS:
            return
        for prefix in [p for p in self._found if p.owner == owner and len(p.tokens) <= len(prompt)]:
            if np.array_equal(prefix.tokens, prompt[: len(prefix.tokens)]):
                self._drop(prefix)
        self._clock += 1
        self._found.append(_Prefix(owner, prompt, arrays, self._clock))
        self.nbytes += len(prompt) * self._token_bytes
        if len(self._found) > _MAX_PREFIXES:
            self._drop(min(self._found, key=lambda prefix: prefix.used))

    def make_room(self, nbytes: int) -> None:
        """Forget, least recently used first, until at most ``nbytes`` are held."""
        while self._found and self.nbytes > nbytes:
            self._drop(min(self._found, key=lambda prefix: prefix.used))

    def _drop(self, prefix: _Prefix) -> None:
        self._found.remove(prefix)
        self.nbytes -= len(prefix.tokens) * self._token_bytes
