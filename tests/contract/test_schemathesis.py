"""Schemathesis tries the contract on a live gateway: every check, every phase, requests that fit and that do not."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from inferway_contract import document
from live import run_gateway
from models import add_sub, write_repository

HERE = Path(__file__).parent
PHASES = "examples,coverage,fuzzing,stateful"


@pytest.mark.slow
def test_schemathesis_finds_no_failure(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "models", {"add_sub": add_sub(), "minilm": add_sub()})
    loads = ["--load-model", "add_sub", "--load-model", "minilm"]
    contract = tmp_path / "inferway.yaml"
    contract.write_text(document.read_text())
    with run_gateway(repository, tmp_path / "state", "--model-control", "explicit", *loads) as gateway:
        # A folder of its own, where nothing of an earlier run lies that could be replayed.
        for name in ("schemathesis.toml", "hooks.py"):
            shutil.copy(HERE / name, tmp_path / name)
        model = add_sub()
        (tmp_path / "model.onnx").write_bytes(model)
        assert gateway.call("PUT", f"/api/v1/blobs/{hashlib.sha256(model).hexdigest()}", model)[0] == 201
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run", str(contract),
             "--url", gateway.url, "--phases", PHASES],
            cwd=tmp_path, env={**os.environ, "INFERWAY_API_KEY": gateway.admin_key, "NO_COLOR": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        status, _, _ = gateway.call("GET", "/api/v1/keys/self")
    assert done.returncode == 0, done.stdout + done.stderr
    assert status == 200, "the run revoked its own key, so what came after it proves nothing"
    operations = sum(method != "parameters" for item in document.load()["paths"].values() for method in item)
    assert f"{operations} selected / {operations} total" in done.stdout, done.stdout
