"""The script that builds the real models: what it keeps, what it makes again, and that it makes the same bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
MODELS: Final = ROOT / "examples" / "models"
BUILD_TIMEOUT_S: Final = 300


def make(room: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(room / "make_models.py"), str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )


def manifest(out: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return entries


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A copy of the script's folder that a test may change."""
    shutil.copytree(MODELS, tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "models"


def test_a_set_is_made_checked_and_then_kept_until_a_recipe_changes(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = make(room, out, "--only", "faults")
    assert first.returncode == 0, first.stderr
    assert "made in" in first.stdout
    assert "checked in" in first.stdout
    made = (out / "faults" / "add.onnx").stat().st_ino
    assert "there" in make(room, out, "--only", "faults").stdout
    assert make(room, out, "--only", "faults", "--quiet").stdout == ""
    assert (out / "faults" / "add.onnx").stat().st_ino == made
    with (room / "recipes" / "faults.py").open("a") as recipe:
        recipe.write("# changed\n")
    assert "made in" in make(room, out, "--only", "faults", "--quiet").stdout
    assert (out / "faults" / "add.onnx").stat().st_ino != made


def test_the_same_recipes_make_the_same_bytes(tmp_path: Path) -> None:
    sets = ("digits", "faults")
    for out in (tmp_path / "one", tmp_path / "two"):
        done = make(MODELS, out, "--only", ",".join(sets), "--no-check")
        assert done.returncode == 0, done.stderr
    one, two = manifest(tmp_path / "one"), manifest(tmp_path / "two")
    assert {name: one[name]["files"] for name in sets} == {name: two[name]["files"] for name in sets}


def test_a_model_that_does_something_else_fails_its_check(tmp_path: Path) -> None:
    assert make(MODELS, tmp_path, "--only", "faults").returncode == 0
    shutil.copy(tmp_path / "faults" / "slow.onnx", tmp_path / "faults" / "add.onnx")
    assert make(MODELS, tmp_path, "--only", "faults", "--check").returncode != 0


def test_two_builds_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    command = [sys.executable, str(MODELS / "make_models.py"), str(tmp_path), "--only", "faults"]
    builds = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    printed = [build.communicate(timeout=BUILD_TIMEOUT_S)[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0], printed
    assert sum(text.count("made in") for text in printed) == 1
    assert sum(text.count("there") for text in printed) == 1


def test_a_set_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    done = make(MODELS, tmp_path, "--only", "resnet51")
    assert done.returncode == 2
    assert "unknown set: resnet51; known: digits, minilm" in done.stderr
