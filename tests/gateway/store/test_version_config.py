"""What a version is by its files, and which of its configurations holds."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import models
from inferway_gateway.core.catalog import FileRef, Kind, VersionRecord
from inferway_gateway.core.errors import InvalidParameterError, ModelRejectedError
from inferway_gateway.store.version_config import (
    check_options,
    kind_of,
    read_artifact,
    read_pipeline,
    read_remote,
)


def laid_out(
    place: Path, files: Mapping[str, bytes], config: Mapping[str, Any] | None = None, kind: Kind = "onnx"
) -> VersionRecord:
    """A version whose files are in its folder."""
    for path, content in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content)
    return VersionRecord(
        model="churn",
        version=3,
        kind=kind,
        digest="0" * 64,
        files=tuple(FileRef(path, "0" * 64, len(content)) for path, content in files.items()),
        config=config or {},
        isolation="worker",
        labels={},
        metadata={},
        pinned=False,
        footprint=None,
        created_at=datetime(2026, 11, 23, tzinfo=UTC),
        created_by="k",
    )


@pytest.mark.parametrize(
    ("paths", "kind"),
    [
        (["model.onnx", "weights.bin"], "onnx"),
        (["other.onnx", "inferway.toml"], "onnx"),
        (["genai_config.json", "decoder.onnx", "tokenizer.json"], "language"),
        (["pipeline.toml"], "pipeline"),
        (["remote.toml", "golden.json"], "remote"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_files_tell_the_kind(paths: list[str], kind: str) -> None:
    assert kind_of(paths) == kind


@pytest.mark.parametrize(
    "paths",
    [["weights.bin"], ["pipeline.toml", "remote.toml"], ["pipeline.toml", "model.onnx"], ["sub/remote.toml"]],
    ids=["none", "two", "both", "elsewhere"],
)
def test_files_of_no_kind_or_of_two_are_refused(paths: list[str]) -> None:
    with pytest.raises(InvalidParameterError, match=r"pipeline\.toml"):
        kind_of(paths)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["model.onnx", "second.onnx"], "model.onnx"),
        (["net.onnx", "weights.bin"], "net.onnx"),
        (["net.onnx", "parts/other.onnx"], "net.onnx"),
    ],
    ids=["default", "only one", "only one at the top"],
)
def test_the_model_is_the_usual_file_or_the_only_one(tmp_path: Path, files: list[str], found: str) -> None:
    record = laid_out(tmp_path / "v", {path: models.add_one() for path in files})
    assert read_artifact(record, tmp_path / "v").path.name == found


def test_the_configuration_may_name_the_model(tmp_path: Path) -> None:
    files = {"model.onnx": b"", "special.onnx": b"", "config.pbtxt": b'default_model_filename: "special.onnx"'}
    assert read_artifact(laid_out(tmp_path / "v", files), tmp_path / "v").path.name == "special.onnx"


def test_what_lies_above_wins_member_by_member(tmp_path: Path) -> None:
    files = {
        "model.onnx": models.add_one(),
        "config.pbtxt": b"max_batch_size: 16 instance_group { count: 3 }",
        "inferway.toml": b"run_timeout_s = 5.0\nmax_batch_size = 8\n[batching]\nenabled = false\nmax_queue_rows = 9\n",
    }
    record = laid_out(tmp_path / "v", files, {"max_batch_size": 4, "batching": {"enabled": True}})
    config = read_artifact(record, tmp_path / "v").config
    assert (config.max_batch_size, config.instances, config.run_timeout_s) == (4, 3, 5.0)
    assert (config.batching.enabled, config.batching.max_queue_rows) == (True, 9)


def test_labels_and_warm_up_data_are_read_from_the_version(tmp_path: Path) -> None:
    files = {
        "model.onnx": models.classifier(),
        "config.pbtxt": b'output { name: "probabilities" data_type: TYPE_FP32 dims: [3] label_filename: "labels.txt" }',
        "labels.txt": b"cat\ndog\nfox\n",
    }
    config = read_artifact(laid_out(tmp_path / "v", files), tmp_path / "v").config
    assert config.outputs[0].labels == ("cat", "dog", "fox")


@pytest.mark.parametrize(
    ("files", "config", "words"),
    [
        ({"a.onnx": b"", "b.onnx": b""}, {}, "expected the model as 'model.onnx' among its files"),
        ({"model.onnx": b"", "config.pbtxt": b"{"}, {}, "config.pbtxt"),
        ({"model.onnx": b"", "config.pbtxt": b'name: "other"'}, {}, "config.pbtxt: name is 'other'"),
        ({"model.onnx": b"", "inferway.toml": b"a ="}, {}, "inferway.toml: not TOML"),
        ({"model.onnx": b""}, {"batching": {"speed": 1}}, "inferway.toml: batching.speed is not known"),
        (
            {"model.onnx": b"", "config.pbtxt": b'default_model_filename: "../../x"'},
            {},
            "must lie in the model's folder",
        ),
    ],
    ids=["two models", "pbtxt", "name", "toml", "option", "outside"],
)
def test_what_cannot_be_read_is_told(
    tmp_path: Path, files: dict[str, bytes], config: dict[str, Any], words: str
) -> None:
    record = laid_out(tmp_path / "v", files, config)
    with pytest.raises(ModelRejectedError) as caught:
        read_artifact(record, tmp_path / "v")
    assert words in caught.value.message
    assert "'churn' version 3" in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_a_request_is_held_against_the_options_at_once() -> None:
    check_options({"instances": 2, "batching": {"enabled": False}})
    with pytest.raises(InvalidParameterError, match="'config': instances"):
        check_options({"instances": 0})


def test_remote_and_pipeline_files_are_read_or_told_of(tmp_path: Path) -> None:
    laid_out(tmp_path / "r", {"remote.toml": b'upstream = "other"\nmodel = "net"\n'}, kind="remote")
    assert read_remote(tmp_path / "r").upstream == "other"
    laid_out(tmp_path / "broken", {"remote.toml": b"\xff", "pipeline.toml": b"steps = 1"})
    with pytest.raises(ModelRejectedError, match=r"remote\.toml: .*UTF-8"):
        read_remote(tmp_path / "broken")
    with pytest.raises(ModelRejectedError, match=r"pipeline\.toml: "):
        read_pipeline(tmp_path / "broken")
    with pytest.raises(ModelRejectedError, match=r"pipeline\.toml: is missing"):
        read_pipeline(tmp_path / "r")
