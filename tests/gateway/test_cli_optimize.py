"""``inferway optimize``: what it writes, prints and answers with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from inferway_gateway.__main__ import main
from inferway_gateway.cli_optimize import NO_CHANGE
from optimizing import labels_of, mlp, rows

QUICK = ("--batch-sizes", "1,4", "--rounds", "3")
SMALLER = ("--techniques", "fp16", "--objective", "size")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with rows and labels, and the working directory there."""
    x = rows(60, 16)
    (tmp_path / "model.onnx").write_bytes(mlp())
    np.savez(tmp_path / "rows.npz", x=x, y=labels_of(mlp(), x))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_chosen_model_is_written_and_the_table_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "model.onnx", "--data", "rows.npz", *SMALLER, *QUICK]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Chosen: fp16 weights: ")
    assert "accuracy" in out
    assert out.endswith("Written: model-optimized.onnx\n")
    assert err == ""
    written = onnx.load(str(folder / "model-optimized.onnx"))
    assert "Cast" in {node.op_type for node in written.graph.node}
    assert (folder / "model.onnx").read_bytes() == mlp()


def test_no_change_writes_nothing_and_says_so_by_its_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(
        ["optimize", "model.onnx", "--data", "rows.npz", "--techniques", "graph", "--objective", "size", *QUICK]
    )
    assert status == NO_CHANGE == 3
    out = capsys.readouterr().out
    assert out.startswith("No change: no candidate was smaller by more than 1 %")
    assert out.endswith("Nothing was written.\n")
    assert not (folder / "model-optimized.onnx").exists()


def test_json_has_everything_that_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "model.onnx", "--data", "rows.npz", "-o", "out.onnx", "--json", *SMALLER, *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] == "out.onnx"
    assert found["chosen"] == "fp16 weights"
    assert found["metric"]["name"] == "accuracy"
    assert set(found["candidates"][0]["latency"]) == {"1", "4"}
    assert (folder / "out.onnx").is_file()


def test_the_picture_is_drawn_and_calibration_taken_from_its_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(folder / "calibration.npy", rows(12, 16, seed=9))
    arguments = ["--calibration", "calibration.npy", "--plot", "picture.svg", "--metric", "agreement", "--quiet"]
    assert main(["optimize", "model.onnx", "--data", "rows.npz", *arguments, *SMALLER, *QUICK]) == 0
    assert "calibrated on 12 rows given for it and measured on 60" in capsys.readouterr().out
    assert "<svg" in (folder / "picture.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["missing.onnx", "--data", "rows.npz"], 2, "expected missing.onnx to be an ONNX file, and there is none"),
        (["rows.npz", "--data", "rows.npz"], 2, "rows.npz cannot be read as an ONNX model"),
        (
            ["model.onnx", "--data", "missing.npz"],
            1,
            "missing.npz cannot be read as numpy's .npz or .npy: No such file",
        ),
        (["model.onnx", "--data", "wide.npy"], 1, "data does not fit the model: input 'x'"),
        (["model.onnx", "--data", "rows.npz", "-o", "model.onnx"], 2, "--output is the model itself"),
        (["model.onnx", "--data", "rows.npz", "-o", "no/out.onnx"], 2, "expected no to be a folder to write into"),
        (["model.onnx", "--data", "rows.npz", "--techniques", "magic"], 2, "unknown technique 'magic'"),
        (["model.onnx", "--data", "rows.npz", "--metric", "luck"], 2, "unknown metric 'luck'"),
        (["model.onnx", "--data", "rows.npz", "--labels", "truth"], 1, "has no array 'truth' for the labels"),
        (["model.onnx", "--data", "rows.npz", "--rounds", "1"], 2, "rounds is at least 3"),
    ],
    ids=["model", "no-onnx", "data", "shape", "itself", "folder", "technique", "metric", "labels", "rounds"],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], status: int, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(folder / "wide.npy", rows(40, 17))
    assert main(["optimize", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("inferway: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--batch-sizes", "1,x"], ["--objective", "fame"]])
def test_arguments_of_the_wrong_form_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["optimize", "model.onnx", "--data", "rows.npz", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_extra_is_named_where_it_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["optimize", "model.onnx", "--data", "rows.npz"]) == 2
    assert "pip install 'inferway[" in capsys.readouterr().err


def test_how_far_it_is_goes_to_a_terminal_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    assert main(["optimize", "model.onnx", "--data", "rows.npz", *SMALLER, *QUICK]) == 0
    assert "making 1 of 1: fp16 weights" in shown.getvalue()
    assert shown.getvalue().endswith("\r")


def test_it_needs_nothing_of_the_gateway() -> None:
    blocked = ["starlette", "uvicorn", "sqlalchemy", "pydantic_settings"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from inferway_gateway.__main__ import main; "
        "sys.exit(main(['optimize', 'missing.onnx', '--data', 'rows.npz']))"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "expected missing.onnx to be an ONNX file" in done.stderr
