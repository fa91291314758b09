"""The page with the equations names functions that exist, in the files that it links."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "distributed-training.md").read_text()
LINKS = sorted(set(re.findall(r"\[`(\w+)\.([\w.]+)`\]\(\.\./sdk/inferway/train/(\w+)\.py\)", PAGE)))


@pytest.mark.parametrize(("module", "name", "file"), LINKS, ids=lambda part: part)
def test_every_function_that_the_page_links_exists(module: str, name: str, file: str) -> None:
    assert module == file
    found = importlib.import_module(f"inferway.train.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)


def test_the_page_links_what_computes_each_of_its_equations() -> None:
    named = {f"{module}.{name}" for module, name, _ in LINKS}
    assert named >= {
        "replica.torch_loss",
        "optimizers.make_optimizer",
        "plan.Plan.part",
        "ddp.fit",
        "parameter_server.fit",
        "parameter_server_shard.Shard.exchange",
        "compression.Compressor.pack",
        "checkpoints.Checkpoints.save",
        "replica.check_finite",
    }
    assert PAGE.count("](../sdk/") == len(re.findall(r"\[`\w+\.[\w.]+`\]\(\.\./sdk/", PAGE))
