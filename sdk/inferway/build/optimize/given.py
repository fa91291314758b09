"""What was given to optimise, as an `OnnxModel`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from ..._errors import ConfigurationError
from ..._onnx import NotOnnx, read_facts
from ..export import family_of
from ..model import OnnxModel
from ..package import model_of
from ..runtime import onnx_module


def onnx_of(model: Any, example: Any) -> OnnxModel:
    """The model's ONNX: read where it is that already, else exported.

    Raises:
        ConfigurationError: the file is not there, cannot be read, or is no ONNX model.
        BuildError: see `to_onnx`.
    """
    if isinstance(model, OnnxModel) or hasattr(model, "__inferway_source__") or family_of(model) != "onnx":
        return model_of(model, example)
    onnx = onnx_module()
    if isinstance(model, onnx.ModelProto):
        return OnnxModel(model, "onnx", source_digest=_digest(model.SerializeToString(deterministic=True)))
    if isinstance(model, bytes | bytearray | memoryview):
        return _read(bytes(model), "what was given", None)
    path = Path(os.fspath(model))
    if not path.is_file():
        raise ConfigurationError(f"expected {path} to be an ONNX file, and there is none")
    try:
        return _read(path.read_bytes(), str(path), path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error


def _read(data: bytes, what: str, path: Path | None) -> OnnxModel:
    onnx = onnx_module()
    try:
        facts = read_facts(data)
        proto = onnx.load_from_string(data)
    except NotOnnx as error:
        raise ConfigurationError(f"{what} is no ONNX model: {error}") from error
    except Exception as error:  # protobuf's, of which there are several
        raise ConfigurationError(f"{what} is no ONNX model: it cannot be parsed") from error
    if facts.locations:
        if path is None:
            raise ConfigurationError("the model keeps its weights in another file; give the path of the ONNX file")
        try:
            onnx.external_data_helper.load_external_data_for_model(proto, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise ConfigurationError(f"the weights of {path} cannot be read: {error}") from error
    return OnnxModel(proto, "onnx", source_digest=_digest(data))


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
