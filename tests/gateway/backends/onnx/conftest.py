from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferway_gateway.backends.onnx import OnnxBackend, OnnxSession
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.model_config import ModelConfig
from models import write_repository

OpenModel = Callable[..., OnnxSession]


@pytest.fixture
def open_model(tmp_path: Path) -> Iterator[OpenModel]:
    """Open a model from its bytes; ``backend`` arguments go to the backend. Sessions close at the test's end."""
    opened: list[OnnxSession] = []

    def open_one(content: bytes, config: ModelConfig | None = None, **backend: Any) -> OnnxSession:
        write_repository(tmp_path, {"m": content})
        artifact = Artifact("m", 1, tmp_path / "m" / "1" / "model.onnx", config or ModelConfig())
        session = OnnxBackend(**{"run_limit_s": 2.0, **backend}).open(artifact)
        opened.append(session)
        return session

    yield open_one
    for session in opened:
        session.close()
