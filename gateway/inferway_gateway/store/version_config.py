"""What a deployed version is, by its files: its kind, and for a model the file and configuration that a backend needs.

The configuration is what ``config.pbtxt`` says, over it ``inferway.toml``, over it the members that the deployment's
request gave. All of it lies in the version's own folder, and nothing outside is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ..core.backend import Artifact
from ..core.catalog import LANGUAGE_FILE, Kind, VersionRecord
from ..core.errors import InvalidParameterError, ModelRejectedError
from ..core.model_config import ModelConfig
from ..core.pipeline import PipelineSpec
from ..core.upstream import RemoteSpec
from . import triton_config
from .elsewhere import ENSEMBLE_FILE, ensemble_pipeline, parse_pipeline, parse_remote
from .model_options import apply_options, merge_options, validate_options
from .repository import DEFAULT_FILE, ONNX_FOLDER, ModelFolder, read_message
from .toml_text import parse_toml
from .triton_config import MAX_CONFIG_BYTES, ConfigError

PIPELINE_FILE: Final = "pipeline.toml"
REMOTE_FILE: Final = "remote.toml"
OPTIONS_FILE: Final = "inferway.toml"


def kind_of(paths: Collection[str]) -> Kind:
    """What a version with these files is.

    Raises:
        InvalidParameterError: no kind has such files.
    """
    kinds: dict[str, Kind] = {PIPELINE_FILE: "pipeline", REMOTE_FILE: "remote"}
    found = [kind for name, kind in kinds.items() if name in paths]
    models = [path for path in paths if path.endswith(".onnx")]
    if len(found) > 1 or (found and models):
        raise InvalidParameterError(
            f"expected one of {PIPELINE_FILE}, {REMOTE_FILE} and an ONNX model among 'files', got several"
        )
    if found:
        return found[0]
    if not models:
        raise InvalidParameterError(
            f"expected an ONNX model, {PIPELINE_FILE} or {REMOTE_FILE} among 'files', got none of them"
        )
    return "language" if LANGUAGE_FILE in paths else "onnx"


def check_options(members: Mapping[str, Any]) -> None:
    """Hold the configuration of a deployment's request against what ``inferway.toml`` knows.

    Raises:
        InvalidParameterError: names the member.
    """
    try:
        validate_options(members)
    except ConfigError as error:
        raise InvalidParameterError(f"'config': {error}") from None


def read_remote(place: Path) -> RemoteSpec:
    """``remote.toml`` of a version's folder. Blocks. Raises ``ModelRejectedError`` where it cannot be read."""
    try:
        return parse_remote(_read_text(place, REMOTE_FILE))
    except ConfigError as error:
        raise ModelRejectedError(f"{REMOTE_FILE}: {error}") from None


def read_pipeline(place: Path) -> PipelineSpec:
    """``pipeline.toml`` of a version's folder, as ``read_remote``."""
    try:
        return parse_pipeline(_read_text(place, PIPELINE_FILE))
    except ConfigError as error:
        raise ModelRejectedError(f"{PIPELINE_FILE}: {error}") from None


def read_ensemble(place: Path) -> PipelineSpec:
    """The pipeline that ``config.pbtxt`` of a model's folder is, as ``read_remote``."""
    try:
        message, _ = triton_config.parse_text(_read_text(place, ENSEMBLE_FILE))
        return ensemble_pipeline(message)
    except ConfigError as error:
        raise ModelRejectedError(f"{ENSEMBLE_FILE}: {error}") from None


def _read_text(place: Path, name: str) -> str:
    try:
        text = ModelFolder(place.parent.resolve(), place.name).read_text(name, MAX_CONFIG_BYTES)
    except OSError as error:
        raise ConfigError(error.strerror or "cannot be read") from error
    if text is None:
        raise ConfigError("is missing")
    return text


def read_artifact(record: VersionRecord, place: Path) -> Artifact:
    """The model of a version whose files are in place. Blocks.

    Args:
        place: the version's folder.
    Raises:
        ModelRejectedError: the configuration cannot be read, or names what is not there.
    """
    try:
        folder = ModelFolder(place.parent.resolve(), place.name)
        config, file_name = _read_config(record, folder)
        if record.kind == "language":
            file_name = LANGUAGE_FILE  # it names the ONNX file itself
        path = _find_model(folder, file_name, [file.path for file in record.files])
    except ConfigError as error:
        raise ModelRejectedError(f"'{record.model}' version {record.version}: {error}") from None
    except OSError as error:
        reason = error.strerror or "the files cannot be read"
        raise ModelRejectedError(f"'{record.model}' version {record.version}: {reason}") from error
    return Artifact(record.model, record.version, path, config, folder.path)


def _read_config(record: VersionRecord, folder: ModelFolder) -> tuple[ModelConfig, str]:
    message, _ = read_message(folder)
    try:
        config = triton_config.to_model_config(message, record.model, folder.read_labels, folder.find_warmup_file)
    except ConfigError as error:
        raise ConfigError(f"config.pbtxt: {error}") from None
    text = folder.read_text(OPTIONS_FILE, MAX_CONFIG_BYTES)
    try:
        members = merge_options({} if text is None else parse_toml(text), record.config)
        config = apply_options(config, validate_options(members))
    except ConfigError as error:
        raise ConfigError(f"{OPTIONS_FILE}: {error}") from None
    platform = "onnxruntime_onnx" if record.kind == "onnx" else f"inferway_{record.kind}"
    return replace(config, platform=platform), message.default_model_filename


def _find_model(folder: ModelFolder, named: str, paths: Collection[str]) -> Path:
    """The ONNX file: the one that the configuration names, else ``model.onnx``, else the only one beside it, else the
    one that sentence-transformers puts into a folder of its own."""
    if not named:
        top = [path for path in paths if path.endswith(".onnx") and "/" not in path]
        named = DEFAULT_FILE if DEFAULT_FILE in top or len(top) != 1 else top[0]
        inner = f"{ONNX_FOLDER}/{DEFAULT_FILE}"
        named = inner if not top and inner in paths else named
    path = folder.find(named, named)
    if path is None:
        raise ConfigError(f"expected the model as '{named}' among its files, there is none")
    return path
