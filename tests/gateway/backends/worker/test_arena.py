from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from inferway_gateway.backends.worker.arena import ALIGNMENT, PAGE, Arena, aligned


def test_nobody_can_shrink_or_grow_an_arena_or_lift_that() -> None:
    arena = Arena.create(3 * PAGE)
    for size in (0, PAGE, 4 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    arena.forget_fd()


def test_both_sides_see_the_same_bytes() -> None:
    ours = Arena.create(1)
    theirs = Arena.attach(os.dup(ours.fd))
    ours.forget_fd()
    ours.view(64, np.dtype("<f4"), (2, 3))[:] = 7.0
    assert theirs.view(64, np.dtype("<f4"), (2, 3)).tolist() == [[7.0] * 3] * 2
    assert ours.size == theirs.size == mmap.PAGESIZE
    assert theirs.fd == -1


def test_pages_that_were_given_back_read_as_zeros() -> None:
    arena = Arena.create(4 * PAGE)
    arena.memory[:] = 1
    assert os.fstat(arena.fd).st_blocks > 0
    arena.release_pages()
    assert os.fstat(arena.fd).st_blocks == 0
    assert not arena.memory.any()
    arena.forget_fd()


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4097])
def test_the_next_tensor_begins_at_the_next_cache_line(size: int) -> None:
    assert size <= aligned(size) < size + ALIGNMENT
    assert aligned(size) % ALIGNMENT == 0
