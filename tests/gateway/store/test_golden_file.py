"""``golden.json``: what can be read, and what is said of what cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferway_gateway.core.errors import ModelRejectedError
from inferway_gateway.store import golden_file
from inferway_gateway.store.golden_file import parse_golden, read_golden


def tensor(name: str = "x", datatype: str = "FP32", shape: Any = (2,), data: Any = (1.0, 2.0)) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data}


def text(inputs: list[Any], outputs: list[Any], **more: Any) -> bytes:
    return json.dumps({"examples": [{"inputs": inputs, "outputs": outputs, **more}]}).encode()


def test_examples_have_their_tensors_and_tolerances() -> None:
    found = parse_golden(text([tensor(data=[1, 2.5])], [tensor("y", "INT64", (2, 1), [[3], [4]])], rtol=0.5, atol=0))
    assert len(found) == 1
    assert found[0].inputs["x"].dtype == np.float32
    assert found[0].inputs["x"].tolist() == [1.0, 2.5]
    assert found[0].outputs["y"].tolist() == [[3], [4]]
    assert (found[0].rtol, found[0].atol) == (0.5, 0.0)


def test_datatypes_without_a_form_in_json_are_numbers_here() -> None:
    found = parse_golden(text([tensor(datatype="BF16", data=[1.0, -2.0])], [tensor("y", "FP16")]))
    assert found[0].inputs["x"].tolist() == [0x3F80, 0xC000]
    assert found[0].outputs["y"].dtype == np.float16


def test_strings_booleans_and_nan_are_read() -> None:
    inputs = [tensor("s", "BYTES", (2,), ["a", "ü"]), tensor("b", "BOOL", (2,), [True, False])]
    content = text(inputs, [tensor("y", data=[float("nan"), float("inf")])])
    found = parse_golden(content)[0]
    assert found.inputs["s"].tolist() == ["a", "ü"]
    assert found.inputs["b"].tolist() == [True, False]
    assert np.isnan(found.outputs["y"][0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "golden.json is no JSON"),
        (b"[" * 100_000, "golden.json is no JSON"),
        (b"{}", "golden.json: examples: Field required"),
        (text([tensor()], []), "examples.0.outputs"),
        (text([tensor()], [tensor("y")], rtol=-1), "examples.0.rtol"),
        (text([tensor()], [tensor("y")], tolerance=1), "examples.0.tolerance: Extra inputs"),
        (text([tensor()], [tensor("y", "FLOAT")]), "output 'y' has datatype 'FLOAT', expected one of BOOL"),
        (text([tensor()], [tensor("y", shape=(3,))]), r"output 'y' with shape \[3\] has 2 elements, expected 3"),
        (text([tensor()], [tensor("y", "INT8", data=[1, 300])]), "outside the range of INT8"),
        (text([tensor()], [tensor("y", "INT8", data=[1, 2.5])]), "elements that are no INT8"),
        (text([tensor()], [tensor("y", "BYTES", data=[1, 2])]), "elements that are no BYTES"),
        (text([tensor(), tensor()], [tensor("y")]), "input 'x' is there twice"),
    ],
    ids=[
        "cut", "deep", "empty", "no outputs", "tolerance", "unknown member", "datatype", "shape", "range", "fraction",
        "strings", "twice",
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(content: bytes, reason: str) -> None:
    with pytest.raises(ModelRejectedError, match=reason):
        parse_golden(content)


def test_nested_lists_have_a_bound() -> None:
    data: Any = 1.0
    for _ in range(40):
        data = [data]
    with pytest.raises(ModelRejectedError, match="nested deeper than 32"):
        parse_golden(text([tensor(data=data, shape=(1,))], [tensor("y")]))


def test_a_folder_without_the_file_has_no_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_golden(tmp_path) == ()
    (tmp_path / "golden.json").write_bytes(text([tensor()], [tensor("y")]))
    assert len(read_golden(tmp_path)) == 1
    monkeypatch.setattr(golden_file, "MAX_BYTES", 10)
    with pytest.raises(ModelRejectedError, match="larger than 10 bytes"):
        read_golden(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" + b"0," * golden_file.MAX_VALUES + b"0, 0]", id="values"),
        pytest.param(b"[" + b"[],{}," * (golden_file.MAX_STRUCTURES // 2) + b"0]", id="structures"),
    ],
)
def test_what_would_keep_the_interpreter_busy_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    def parse(content: bytes) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(golden_file, "parse_golden", parse)
    (tmp_path / "golden.json").write_bytes(content)
    with pytest.raises(ModelRejectedError, match="expected at most 1000000 and 100000"):
        read_golden(tmp_path)
