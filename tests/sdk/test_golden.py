"""Golden examples, written as the gateway reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import models
from inferway import ConfigurationError, InvalidInputError
from inferway._golden import golden_json
from inferway._onnx import read_facts
from inferway_gateway.store.golden_file import parse_golden

ALL = read_facts(models.identity_all(leave_out=())).signature
SAMPLES: dict[str, list[Any]] = {
    "BOOL": [[True, False]],
    "UINT8": [[0, 255]],
    "UINT16": [[0, 65535]],
    "UINT32": [[0, 2**32 - 1]],
    "UINT64": [[0, 2**64 - 1]],
    "INT8": [[-128, 127]],
    "INT16": [[-32768, 32767]],
    "INT32": [[-(2**31), 2**31 - 1]],
    "INT64": [[-(2**63), 2**63 - 1]],
    "FP16": [[0.5, 65504.0]],
    "BF16": [[1.5, -2.0]],
    "FP32": [[0.5, float("nan")]],
    "FP64": [[0.1, 1e300]],
    "BYTES": [["a\x00b", "é"]],
}


def test_every_datatype_is_read_by_the_gateway_as_it_was_given() -> None:
    assert ALL is not None
    inputs = {spec.name: SAMPLES[spec.datatype] for spec in ALL.inputs}
    outputs = {spec.name: SAMPLES[spec.datatype] for spec in ALL.outputs}
    [example] = parse_golden(golden_json([(inputs, outputs)], ALL))
    for side, specs in ((example.inputs, ALL.inputs), (example.outputs, ALL.outputs)):
        assert set(side) == {spec.name for spec in specs}
        for spec in specs:
            found = side[spec.name]
            if spec.datatype == "BF16":
                found = (found.astype(np.uint32) << 16).view(np.float32)
            if spec.datatype == "BYTES":
                assert [value.decode() if isinstance(value, bytes) else value for value in found.ravel()] == [
                    "a\x00b",
                    "é",
                ]
            else:
                assert np.array_equal(
                    found, np.array(SAMPLES[spec.datatype], spec.dtype), equal_nan=spec.datatype[0] == "F"
                )


def test_examples_are_taken_as_inference_takes_inputs() -> None:
    signature = read_facts(models.add_sub()).signature
    left = np.arange(16)
    frame = pd.DataFrame({"a": [1.0]})
    text = golden_json([({"INPUT0": left, "INPUT1": [1] * 16}, {"OUTPUT0": left + 1})], signature)
    [example] = json.loads(text)["examples"]
    assert [(tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in example["inputs"]] == [
        ("INPUT0", "INT32", [1, 16]),
        ("INPUT1", "INT32", [1, 16]),
    ]
    # One output is enough.
    assert [tensor["name"] for tensor in example["outputs"]] == ["OUTPUT0"]
    one = read_facts(models.add_one(size=1)).signature
    assert json.loads(golden_json([(frame, [[2.0]])], one))["examples"][0]["inputs"][0]["data"] == [1.0]


def test_without_a_signature_arrays_keep_their_own_types() -> None:
    text = golden_json([({"x": np.zeros((1, 2), np.float16)}, {"y": np.ones(1, np.int64)})], None)
    [example] = json.loads(text)["examples"]
    assert (example["inputs"][0]["datatype"], example["outputs"][0]["datatype"]) == ("FP16", "INT64")


@pytest.mark.parametrize(
    ("golden", "error"),
    [
        ("text", ConfigurationError),
        ([], ConfigurationError),
        ([5], ConfigurationError),
        ([({"x": 1},)], ConfigurationError),
        ([({"x": [[0.0] * 16]}, {})], InvalidInputError),
        ([({"x": "text"}, {"y": [[0.0] * 16]})], InvalidInputError),
        ([({}, {"y": [[0.0] * 16]})], InvalidInputError),
    ],
)
def test_what_is_no_example_is_refused(golden: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        golden_json(golden, read_facts(models.add_one()).signature)


def test_a_file_of_examples_goes_along_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(golden_json([([[0.0] * 16], [[1.0] * 16])], read_facts(models.add_one()).signature))
    assert golden_json(path, None) == path.read_bytes()


@pytest.mark.parametrize("content", [None, "text", "[]", '{"example": []}', "[" * 100_000])
def test_a_file_without_examples_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"mine\.json"):
        golden_json(path, None)
