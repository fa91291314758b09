"""Real models with the requests that are sent to them, one row each, and how they lie in a model repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness.load import Job
from harness.paths import CACHE, ROOT
from harness.processes import BenchError
from numpy.typing import NDArray

Feed = dict[str, NDArray[Any]]
WIRE = {"float32": "FP32", "int32": "INT32", "int64": "INT64"}
MINILM_PADDING = """\
# Sentences of different lengths share a batch: padded to the longest, with zeros, which the mask hides.
[[batching.padding]]
inputs = { input_ids = 1, attention_mask = 1, token_type_ids = 1 }
"""
UNBATCHED = "[batching]\nenabled = false\n"


@dataclass(frozen=True, slots=True)
class Workload:
    """One model and what is asked of it.

    Attributes:
        feeds: the requests, of one row each, sent in this order over and over.
        outputs: the outputs asked for.
        ragged: the axis along which rows differ in length, filled with zeros; None where all are alike.
        batches: batch sizes that the hand-tuned loop is given to try.
        options: `inferway.toml` by the name under which the gateway serves the model with it.
    """

    name: str
    model: Path
    feeds: Sequence[Feed]
    outputs: tuple[str, ...]
    ragged: int | None
    batches: tuple[int, ...]
    options: Mapping[str, str]


def models_dir() -> Path:
    """Where `make_models.py` puts the models, by its own rule."""
    return Path(os.environ.get("INFERWAY_MODELS_DIR") or CACHE / "inferway-models")


def make_models() -> None:
    """Build what is missing; a second call takes no time."""
    script = ROOT / "examples" / "models" / "make_models.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quiet", "--only", "digits,minilm,resnet50,packaged"], check=False
    )
    if done.returncode:
        raise BenchError("the models could not be made; see above")


def workloads() -> dict[str, Workload]:
    folder = models_dir()
    rng = np.random.default_rng(7)
    digits = np.load(folder / "digits" / "test.npz")
    rows = np.ascontiguousarray(digits[next(key for key in digits.files if digits[key].ndim == 2)], np.float32)
    digit_feeds = [{"X": rows[i : i + 1]} for i in range(256)]
    small = (1, 2, 4, 8, 16, 32, 64)
    found = [
        Workload(
            "minilm",
            folder / "minilm" / "model.onnx",
            _sentences(rng, 512),
            ("sentence_embedding",),
            ragged=1,
            batches=(1, 2, 4, 8, 16, 32),
            options={"minilm": MINILM_PADDING, "minilm-undeclared": "", "minilm-unbatched": UNBATCHED},
        ),
        *(
            Workload(
                f"digits-{kind}",
                folder / "digits" / f"{kind}.onnx",
                digit_feeds,
                ("label", "probabilities"),
                ragged=None,
                batches=small,
                options={f"digits-{kind}": "", f"digits-{kind}-unbatched": UNBATCHED},
            )
            for kind in ("logreg", "mlp", "forest")
        ),
        Workload(
            "resnet50",
            folder / "resnet50" / "model.onnx",
            [{"pixel_values": rng.standard_normal((1, 3, 224, 224), np.float32)} for _ in range(16)],
            ("logits",),
            ragged=None,
            batches=(1, 2, 4, 8, 16),
            options={"resnet50": "", "resnet50-unbatched": UNBATCHED},
        ),
        Workload(
            "magika",
            folder / "packaged" / "magika" / "model.onnx",
            [{"bytes": rng.integers(0, 256, (1, 2048), np.int32)} for _ in range(64)],
            ("target_label",),
            ragged=None,
            batches=(1, 2, 4, 8, 16, 32),
            options={"magika": "", "magika-unbatched": UNBATCHED},
        ),
    ]
    return {one.name: one for one in found}


def _sentences(rng: np.random.Generator, count: int) -> list[Feed]:
    """Token ids with the lengths of ordinary sentences: log-normal, median 18 tokens, one in twenty above 48, 4 to 128.

    Which words they are makes no difference to the time, so ids are random.
    """
    lengths = np.clip(rng.lognormal(np.log(18), 0.6, count).round().astype(int), 4, 128)
    feeds = []
    for length in lengths:
        ids = rng.integers(1000, 30000, (1, int(length)))
        ids[0, 0], ids[0, -1] = 101, 102
        ids = ids.astype(np.int64)
        feeds.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
    return feeds


def lay_out(workload: Workload, repository: Path) -> None:
    """A model repository with the model once for each entry of ``options``."""
    shutil.rmtree(repository, ignore_errors=True)
    for name, text in workload.options.items():
        version = repository / name / "1"
        version.mkdir(parents=True)
        shutil.copy2(workload.model, version / "model.onnx")
        if text:
            (repository / name / "inferway.toml").write_text(text)


def binary_job(workload: Workload, model: str, headers: Mapping[str, str]) -> Job:
    """The requests with binary tensors in and out, as the SDK sends them."""
    bodies, own = [], []
    for feed in workload.feeds:
        inputs = [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": WIRE[array.dtype.name],
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in feed.items()
        ]
        outputs = [{"name": name, "parameters": {"binary_data": True}} for name in workload.outputs]
        head = json.dumps({"inputs": inputs, "outputs": outputs}, separators=(",", ":")).encode()
        bodies.append(head + b"".join(array.tobytes() for array in feed.values()))
        own.append({"Inference-Header-Content-Length": str(len(head))})
    path = f"/v2/models/{model}/infer"
    return Job(path, bodies, {"Content-Type": "application/octet-stream", **headers}, own)


def parse_outputs(headers: Mapping[str, str], body: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a binary answer."""
    numpy_names = {wire: name for name, wire in WIRE.items()}
    length = int(headers["inference-header-content-length"])
    arrays, offset = {}, length
    for output in json.loads(body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        data = np.frombuffer(body[offset : offset + size], numpy_names[output["datatype"]])
        arrays[output["name"]] = data.reshape(output["shape"])
        offset += size
    return arrays
