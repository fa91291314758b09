"""Operators of onnxruntime-extensions, where the operator allows them, in process and in a locked-in worker."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from inferway_gateway.backends.onnx import OnnxBackend, extensions
from inferway_gateway.backends.worker.backend import WorkerBackend
from inferway_gateway.core.backend import Artifact, Backend
from inferway_gateway.core.errors import ModelLoadError
from inferway_gateway.core.model_config import ModelConfig, SessionOptions
from models import model, node, value

UPPER = model(
    [node("StringUpper", ["x"], ["y"], domain="ai.onnx.contrib")],
    [value("x", TensorProto.STRING, ["n"])],
    [value("y", TensorProto.STRING, ["n"])],
    domains={"ai.onnx.contrib": 1},
)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    (tmp_path / "model.onnx").write_bytes(UPPER)
    allowed = ModelConfig(session=SessionOptions(extensions=True, trial=False))
    return Artifact("upper", 1, tmp_path / "model.onnx", allowed)


def speak(backend: Backend, artifact: Artifact) -> list[str]:
    session = backend.open(artifact)
    try:
        (found,) = session.run({"x": np.array(["grüße", "x"], object)}, ["y"])
        return [text if isinstance(text, str) else text.decode() for text in found.tolist()]
    finally:
        session.close()


def test_a_model_that_is_allowed_them_runs_in_process(artifact: Artifact) -> None:
    assert speak(OnnxBackend(), artifact) == ["GRÜSSE", "X"] or speak(OnnxBackend(), artifact) == ["GRüßE", "X"]


def test_a_model_that_is_allowed_them_runs_in_a_locked_in_worker(artifact: Artifact) -> None:
    with WorkerBackend() as backend:
        assert speak(backend, artifact) == speak(OnnxBackend(), artifact)


def test_a_model_that_is_not_allowed_them_does_not_load(artifact: Artifact) -> None:
    with pytest.raises(ModelLoadError, match=r"ai\.onnx\.contrib"):
        OnnxBackend().open(Artifact("upper", 1, artifact.path))


def test_a_gateway_without_the_package_says_what_to_install(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    extensions.library.cache_clear()
    extensions.load.cache_clear()
    try:
        with pytest.raises(ModelLoadError, match=r"pip install 'inferway\[extensions\]'"):
            OnnxBackend().open(artifact)
    finally:
        extensions.library.cache_clear()
        extensions.load.cache_clear()
