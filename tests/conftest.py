"""Fixtures that more than one part of the suite uses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import models
from live import LiveGateway, run_gateway
from models import ModelFiles

# A policy that was never asked makes a loop on demand for whoever looks, and nobody closes it. pytest-asyncio and
# looptime look before each test; told that there is none, they leave it at that.
asyncio.set_event_loop(None)

# How long an example takes is the machine's matter; tests of ours assert no times.
settings.register_profile("inferway", deadline=None)
settings.load_profile("inferway")


def write_standard_repository(path: Path) -> Path:
    """The models that most tests call: one of each kind."""
    return models.write_repository(
        path,
        {
            "simple": ModelFiles(
                {1: models.add_sub(), 2: models.add_sub()}, config="max_batch_size: 8 version_policy { all {} }"
            ),
            "classifier": ModelFiles(
                {1: models.classifier()},
                config='output { name: "probabilities" data_type: TYPE_FP32 dims: [3] label_filename: "labels.txt" }',
                files={"labels.txt": b"cat\ndog\nfox\n"},
            ),
            "add_one": models.add_one(),
            "all_types": models.identity_all(),
            "bf16": models.identity("BF16"),
            "strings": models.identity("BYTES"),
            "matmul": models.matmul(),
            "optional": models.optional_input(),
            "text": models.masked_mean(),
            "scalar": models.scalar_add(),
            "picky": models.fails_on_negative(),
            "slow": models.slow(),
        },
    )


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A live gateway over the standard repository, with every version loaded and load and unload allowed.

    It is shared by the whole session: a test that changes what is loaded puts it back.
    """
    root = tmp_path_factory.mktemp("gateway")
    repository = write_standard_repository(root / "models")
    names = sorted(p.name for p in repository.iterdir())
    loads = [option for name in names for option in ("--load-model", name)]
    with run_gateway(repository, root / "state", "--model-control", "explicit", *loads) as running:
        yield running
