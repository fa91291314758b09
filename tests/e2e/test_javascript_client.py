"""Chat and embeddings through the openai package for JavaScript, on Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_allclose

import models
import text_models
from live import run_gateway
from models import ModelFiles

HERE = Path(__file__).parent / "javascript"
CACHE = Path(__file__).parents[2] / ".cache"
TABLE = text_models.table()


@pytest.fixture(scope="module")
def packages() -> Path:
    """A folder with what ``package.json`` asks for, installed once."""
    node, npm = shutil.which("node"), shutil.which("npm")
    wanted = (HERE / "package.json").read_text()
    folder = CACHE / "javascript"
    told = folder / "package.json"
    problem = None if node and npm else "node and npm are not installed"
    if problem is None and not (told.is_file() and told.read_text() == wanted and (folder / "node_modules").is_dir()):
        folder.mkdir(parents=True, exist_ok=True)
        told.write_text(wanted)
        command = [str(npm), "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            told.unlink()
            problem = f"npm could not install the openai package: {done.stderr[-500:]}"
    if problem is not None:
        if os.environ.get("INFERWAY_REQUIRE_SERVICES") == "1":
            pytest.fail(problem)
        pytest.skip(problem)
    return folder


def test_the_javascript_package_chats_streams_calls_and_embeds(packages: Path, tmp_path: Path) -> None:
    files = text_models.embedder()
    repository = models.write_repository(
        tmp_path / "models", {"embed": ModelFiles({1: files.pop("model.onnx")}, files=files)}
    )
    shutil.copytree(CACHE / "inferway-models" / "tiny-llm", repository / "tiny-llm")
    with run_gateway(repository, tmp_path / "state") as gateway:
        arguments = [str(packages), f"{gateway.url}/v1", gateway.make_key("infer"), "tiny-llm", "embed"]
        done = subprocess.run(
            ["node", str(HERE / "chat.mjs"), *arguments], capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    out: dict[str, Any] = json.loads(done.stdout)
    assert out["usage"] == 12
    assert out["whole"] == out["streamed"] == out["helped"] == out["final"]
    assert out["reasons"][-1] == "length"
    assert set(out["reasons"][:-1]) == {None}
    assert out["called"][0] == "weather"
    assert out["called"][1] in ("Bern", "Rome")
    assert out["models"] == ["embed", "tiny-llm"]
    assert_allclose(out["embedding"][0], TABLE[[2, 5, 3]].mean(axis=0), atol=1e-6)
    assert_allclose(out["floats"], out["embedding"][0], atol=1e-6)
    assert out["retrieved"] == "tiny-llm/versions/1"
    assert out["errors"]["version"][:4] == ["NotFoundError", 404, "version_not_found", "model"]
    assert out["errors"]["missing"][:4] == ["NotFoundError", 404, "model_not_found", "model"]
    assert out["errors"]["bad"][:4] == ["BadRequestError", 400, "invalid_parameter", "temperature"]
    assert "temperature" in out["errors"]["bad"][4]
    assert out["errors"]["stranger"] == ["AuthenticationError", 401, "unauthenticated"]
