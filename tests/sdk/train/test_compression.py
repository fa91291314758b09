"""What a compressed gradient is, and what it keeps for later."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway import ConfigurationError
from inferway.train.compression import Compressor, _halves
from inferway.train.job import Vector


def gradient(seed: int = 0, size: int = 1000, scale: float = 1.0) -> Vector:
    return np.random.default_rng(seed).normal(scale=scale, size=size).astype(np.float32)


def test_nothing_is_copied_where_nothing_is_compressed() -> None:
    given = gradient()
    packed = Compressor(None, 1000).pack(given[10:500], 10)
    assert np.shares_memory(packed.values, given)
    assert np.shares_memory(packed.whole(np.empty(490, np.float32)), given)
    assert packed.nbytes == 490 * 4


@given(seed=st.integers(0, 50), power=st.integers(-20, 20))
def test_half_precision_is_near_whatever_the_size_of_the_values(seed: int, power: int) -> None:
    whole = gradient(seed, scale=10.0**power)
    packed = Compressor("fp16", 1000).pack(whole, 0)
    assert packed.nbytes == 2000
    got = packed.whole(np.empty(1000, np.float32))
    largest = np.abs(whole).max()
    assert np.all(np.abs(got - whole) <= np.abs(whole) * 2**-10 + largest * 1e-7)


def test_half_precision_of_zeros_is_zeros() -> None:
    packed = Compressor("fp16", 8).pack(np.zeros(8, np.float32), 0)
    assert not packed.whole(np.ones(8, np.float32)).any()


@pytest.mark.torch
def test_halves_are_the_same_whoever_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    values = np.concatenate([gradient(scale=10.0**power) for power in range(-9, 1)]).clip(-1, 1)
    by_torch = _halves(values)
    monkeypatch.delitem(sys.modules, "torch")
    by_numpy = _halves(values)
    assert (np.abs(by_numpy) < 6e-5).any(), "none that is subnormal"
    assert by_torch.tobytes() == by_numpy.tobytes()


def test_the_largest_are_sent_and_the_rest_is_kept() -> None:
    compressor = Compressor("topk", 6, fraction=0.34)
    packed = compressor.pack(np.array([1, -5, 2, 0, 4, -3], np.float32), 0)
    assert packed.places is not None
    assert packed.places.tolist() == [1, 4]
    assert packed.values.tolist() == [-5, 4]
    assert packed.nbytes == 16
    assert compressor.residual.tolist() == [1, 0, 2, 0, 0, -3]
    again = compressor.pack(np.array([0, 0, 2, 0, 0, 0], np.float32), 0)
    assert again.whole(np.empty(6, np.float32)).tolist() == [0, 0, 4, 0, 0, -3]


@given(seed=st.integers(0, 30), steps=st.integers(1, 8), fraction=st.floats(0.01, 1))
def test_what_was_sent_and_what_is_kept_is_all_there_was(seed: int, steps: int, fraction: float) -> None:
    compressor = Compressor("topk", 100, fraction=fraction)
    sent, there_was = np.zeros(100, np.float32), np.zeros(100, np.float32)
    for step in range(steps):
        whole = gradient(seed + step, 100)
        there_was += whole
        # In two parts, as for two servers.
        for part in (slice(0, 30), slice(30, 100)):
            compressor.pack(whole[part], part.start).add_to(sent[part], 1.0)
    assert np.allclose(sent + compressor.residual, there_was, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "fp16", "topk"])
def test_it_is_added_with_its_weight(kind: None) -> None:
    whole = gradient(size=100_000)
    total = np.ones(100_000, np.float32)
    packed = Compressor(kind, 100_000, fraction=1.0).pack(whole, 0)
    packed.add_to(total, 0.25)
    assert np.allclose(total, 1 + 0.25 * whole, atol=2e-3 if kind == "fp16" else 1e-6)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.1, float("nan")])
def test_a_fraction_is_one(fraction: float) -> None:
    with pytest.raises(ConfigurationError, match="a fraction of the values lies above 0"):
        Compressor("topk", 1, fraction=fraction)


def test_another_compression_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="there is no compression 'int8'; there are fp16 and topk"):
        Compressor("int8", 1)  # type: ignore[arg-type]
