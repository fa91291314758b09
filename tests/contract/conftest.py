"""A gateway as a process of its own, as a stranger's client meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import models

ADD_SUB_CONFIG = "version_policy: { all { } }\n"
CLASSIFIER_CONFIG = """
output [ { name: "probabilities" data_type: TYPE_FP32 dims: [ 3 ] label_filename: "labels.txt" } ]
"""
LOADED = ("add_sub", "all_types", "bf16", "classifier", "scalar", "text")


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where it listens, and a key with every scope. ``models`` has a model that cannot be loaded besides ``LOADED``."""

    url: str
    key: str
    state_dir: Path

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def new_key(self, *scopes: str, patterns: tuple[str, ...] = ("*",)) -> str:
        body = {"name": "another", "scopes": scopes, "models": patterns}
        answer = httpx.post(self.url + "/api/v1/keys", json=body, headers=self.headers)
        assert answer.status_code == 201, answer.text
        key: str = answer.json()["key"]
        return key


def write_models(path: Path) -> Path:
    return models.write_repository(
        path,
        {
            "add_sub": models.ModelFiles({1: models.add_sub(), 2: models.add_sub()}, config=ADD_SUB_CONFIG),
            "all_types": models.identity_all(),
            "bf16": models.identity("BF16"),
            "broken": models.corrupt()["html"],
            "classifier": models.ModelFiles(
                {1: models.classifier()}, config=CLASSIFIER_CONFIG, files={"labels.txt": b"cat\ndog\nfox\n"}
            ),
            "scalar": models.scalar_add(),
            "text": models.identity("BYTES"),
        },
    )


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with explicit model control, started from the command line."""
    folder = tmp_path_factory.mktemp("served")
    state = folder / "state"
    command = [sys.executable, "-m", "inferway_gateway"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INFERWAY_")}
    made = subprocess.run(
        [*command, "keys", "create", "--name", "root", "--scopes", "admin", "--state-dir", str(state), "--json"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    load = [part for name in LOADED for part in ("--load-model", name)]
    log = folder / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "serve", str(write_models(folder / "models")), "--port", "0", "--state-dir", str(state),
             "--model-control", "explicit", "--no-trial", *load],
            stderr=stderr, env=environment,
        )  # fmt: skip
    try:
        url = wait_until_ready(process, log)
        yield Gateway(url, json.loads(made.stdout)["key"], state)
    finally:
        process.terminate()
        status = process.wait(30)
    assert status == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL of a gateway that answers; its process writes to ``log``."""
    deadline = time.monotonic() + 60
    url = None
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"listens on (http://\S+)", log.read_text())
        url = found[1] if found else None
        if url is not None and httpx.get(url + "/v2/health/ready").status_code == 200:
            return url
        time.sleep(0.05)  # of another process, nothing tells us when
    raise AssertionError(f"the gateway did not become ready:\n{log.read_text()}")
