"""Inputs to measure with: they fit the signature, rows differ, and configured warm-ups are made as they are said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inferway_gateway.backends.onnx.sample import LENGTHS, Sample, candidates, same_bits, warmup_inputs
from inferway_gateway.core.errors import ModelLoadError
from inferway_gateway.core.model_config import Warmup, WarmupInput
from inferway_gateway.core.tensors import DTYPES, Signature, TensorSpec


def signature(*inputs: TensorSpec, batched: bool = True) -> Signature:
    return Signature(inputs, (TensorSpec("y", "FP32", (-1,)),), batched)


EVERY = signature(*(TensorSpec(name.lower(), name, (-1, -1, 3)) for name in DTYPES))


@pytest.mark.parametrize(
    "sample", list(candidates(EVERY, (), True)), ids=lambda sample: f"{sample.kind}-{sample.length}"
)
def test_every_candidate_fits_its_signature(sample: Sample) -> None:
    assert EVERY.check(sample.batch([0, 1, 2])) == 3
    assert EVERY.check(sample.batch([5])) == 1


def test_rows_are_the_same_in_any_batch_and_differ_from_each_other() -> None:
    sample = Sample(EVERY, "plain", 4, {}, {})
    batch = sample.batch([2, 0, 2, 1])
    for name, array in batch.items():
        alone = sample.batch([2])[name]
        assert same_bits(array[0:1], alone)
        assert same_bits(array[2:3], alone)
    assert sample.has_different_rows()
    assert not Sample(EVERY, "zero", 4, {}, {}).has_different_rows()


def test_names_hint_at_what_a_model_accepts() -> None:
    ids = signature(
        *(TensorSpec(name, "INT64", (-1, -1)) for name in ("input_ids", "attention_mask", "token_type_ids"))
    )
    batch = Sample(ids, "plain", 8, {}, {}).batch([0])
    assert (batch["attention_mask"] == 1).all()
    assert (batch["token_type_ids"] == 0).all()
    assert batch["input_ids"].min() >= 1
    assert batch["input_ids"].max() < 100


def test_only_harmless_values_are_tried_where_values_decide_about_the_run() -> None:
    ints = signature(TensorSpec("n", "INT64", (3,)), batched=False)
    tried = [sample.batch([0])["n"] for sample in candidates(ints, (), bounded=False)]
    assert tried
    assert all(set(values.tolist()) <= {0, 1} for values in tried)


def test_an_optional_input_is_left_out() -> None:
    some = signature(TensorSpec("x", "FP32", (-1, 2)), TensorSpec("scale", "FP32", (-1,), optional=True))
    assert list(Sample(some, "plain", 4, {}, {}).batch([0])) == ["x"]


def test_lengths_that_would_fill_the_memory_are_not_tried() -> None:
    volume = signature(TensorSpec("x", "FP32", (-1, -1, -1, -1)))
    tried = list(candidates(volume, (), True))
    assert all(sample.length**3 <= 1 << 22 for sample in tried)
    assert {8, 32, 128} <= {sample.length for sample in tried}
    large = signature(TensorSpec("x", "FP32", (-1, 3, 4096, 4096)))
    assert list(candidates(large, (), True))


def test_a_fixed_shape_is_tried_at_one_length_only() -> None:
    fixed = signature(TensorSpec("x", "FP32", (-1, 4)))
    assert {sample.length for sample in candidates(fixed, (), True)} == {LENGTHS[0]}


X = TensorSpec("x", "FP32", (-1, -1))
TEXT = TensorSpec("text", "BYTES", (-1, 2))


def test_a_warmup_says_which_lengths_are_usual() -> None:
    warmup = Warmup("w", 3, 1, (WarmupInput("x", "FP32", (5,), "random"),))
    first = next(candidates(signature(X), [warmup], True))
    assert first.batch([0, 1])["x"].shape == (2, 5)


def test_a_warmup_has_the_rows_it_says(tmp_path: Path) -> None:
    np.arange(4, dtype=np.float32).tofile(tmp_path / "x")
    (tmp_path / "text").write_bytes(b"\x01\x00\x00\x00a\x03\x00\x00\x00\xc3\xa9\x00")
    warmup = Warmup(
        "w",
        2,
        1,
        (
            WarmupInput("x", "FP32", (4,), "file", str(tmp_path / "x")),
            WarmupInput("text", "BYTES", (2,), "file", str(tmp_path / "text")),
        ),
    )
    inputs = warmup_inputs(warmup, signature(X, TEXT))
    assert inputs["x"].tolist() == [[0, 1, 2, 3]] * 2
    assert inputs["text"].tolist() == [["a", "é\0"]] * 2


def test_a_warmup_may_say_the_whole_shape() -> None:
    warmup = Warmup("w", 7, 1, (WarmupInput("x", "FP32", (2, 5), "random"),))
    assert warmup_inputs(warmup, signature(X))["x"].shape == (2, 5)


def test_zeros_asked_for_are_zeros_whatever_the_name() -> None:
    mask = signature(TensorSpec("mask", "INT64", (-1, 3)), TEXT)
    inputs = (WarmupInput("mask", "INT64", (3,), "zero"), WarmupInput("text", "BYTES", (2,), "zero"))
    made = warmup_inputs(Warmup("w", 1, 1, inputs), mask)
    assert made["mask"].tolist() == [[0, 0, 0]]
    assert made["text"].tolist() == [["", ""]]


@pytest.mark.parametrize(
    ("given", "content", "why"),
    [
        (WarmupInput("z", "FP32", (1,)), b"", "names input 'z', which the model has not"),
        (WarmupInput("x", "INT32", (1,)), b"", "has INT32 for input 'x', expected FP32"),
        (WarmupInput("x", "FP32", (1, 2, 3)), b"", "expects 2 dimensions"),
        (WarmupInput("x", "FP32", (3,), "file"), b"1234", "has 4 bytes, expected 12"),
        (WarmupInput("text", "BYTES", (2,), "file"), b"\x01\x00\x00\x00a", "does not hold 2 strings"),
        (WarmupInput("text", "BYTES", (1,), "file"), b"\xff\xff\x00\x00a", "does not hold 1 strings"),
        (WarmupInput("text", "BYTES", (1,), "file"), b"\x01\x00\x00\x00a\x00", "does not hold 1 strings"),
        (WarmupInput("text", "BYTES", (1,), "file"), b"\x01\x00\x00\x00\xff", "is not UTF-8"),
    ],
)
def test_a_warmup_that_does_not_fit_says_why(tmp_path: Path, given: WarmupInput, content: bytes, why: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    placed = WarmupInput(given.name, given.datatype, given.dims, given.source, str(path))
    with pytest.raises(ModelLoadError) as caught:
        warmup_inputs(Warmup("w", 1, 1, (placed,)), signature(X, TEXT))
    assert why in caught.value.message
    assert str(tmp_path) not in caught.value.message
