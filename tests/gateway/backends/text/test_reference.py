"""The same weights in the gateway's way and in sentence-transformers': the same vectors."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.backends.text import read_package
from inferway_gateway.core.batcher import Batcher
from inferway_gateway.core.encoding import TextEncoder
from inferway_gateway.core.runners import RunnerPool
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.store.repository import ModelRepository

HERE = Path(__file__).resolve().parent
MAKE = HERE.parents[3] / "examples" / "models" / "make_models.py"


@pytest.fixture(scope="module")
def minilm() -> Path:
    done = subprocess.run(
        [sys.executable, str(MAKE), "--quiet", "--only", "minilm"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return MAKE.parents[2] / ".cache" / "inferway-models" / "minilm"


@pytest.mark.slow
@pytest.mark.parametrize("one_by_one", [False, True], ids=["one request", "a request each"])
async def test_a_hundred_sentences_have_the_vectors_of_sentence_transformers(
    minilm: Path, tmp_path: Path, one_by_one: bool
) -> None:
    sentences = (HERE / "sentences.txt").read_text().splitlines()
    expected: NDArray[Any] = np.load(HERE / "reference.npz")["vectors"].astype(np.float64)
    assert len(set(sentences)) == len(expected) == 100
    shutil.copytree(minilm, tmp_path / "models" / "minilm")
    (tmp_path / "models" / "minilm" / "inferway.toml").write_text('[text]\nlong_text = "truncate"\n')
    artifact = ModelRepository(tmp_path / "models").scan()["minilm"].artifact(1)
    session = OnnxBackend(("CPUExecutionProvider",), cpus=2, trial_budget_s=0.0).open(artifact)
    try:
        package = read_package(artifact, session.signature)
        assert package is not None
        async with RunnerPool(2) as runners:
            batcher = Batcher(session, package.config, ModelStats(), runners, run_timeout_s=60.0)
            encoder = TextEncoder(batcher, package.spec, package.tokenizer)
            groups = [[text] for text in sentences] if one_by_one else [sentences]
            found = await asyncio.gather(*(encoder.embed(group) for group in groups))
            await batcher.close()
    finally:
        session.close()
    vectors = np.concatenate([one.values for one in found]).astype(np.float64)
    cosines = (vectors * expected).sum(axis=1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
    worst = int(cosines.argmin())
    assert cosines[worst] >= 0.9999, (sentences[worst][:60], float(cosines[worst]))
