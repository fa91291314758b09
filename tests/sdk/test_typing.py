"""The SDK's public names under both type checkers, as a user would write them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_mypy_is_content_with_a_users_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "tests/typing/use_sdk.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_pyright_is_content_with_the_sdk_and_a_users_program() -> None:
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent))
    assert pyright is not None
    done = subprocess.run([pyright], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_pyright_knows_every_type_of_the_public_names(tmp_path: Path) -> None:
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent))
    assert pyright is not None
    # Outside of the project, as a user of the package would be; a path stands for an installation.
    command = [pyright, "-p", str(tmp_path), "--ignoreexternal", "--outputjson", "--verifytypes", "inferway"]
    paths = os.pathsep.join([str(ROOT / "sdk"), str(ROOT / "openapi")])
    # pyright asks the first python of the path where packages such as numpy are.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    counts = json.loads(done.stdout)["typeCompleteness"]["exportedSymbolCounts"]
    assert counts["withKnownType"] > 100
    assert counts["withUnknownType"] == 0
