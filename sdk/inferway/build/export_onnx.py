"""ONNX that is there already: read, checked, run, and described as every other export."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import ConfigurationError, ExportError
from .._inputs import fit
from .example import Arrays, is_array
from .model import OnnxModel
from .runtime import is_large, onnx_module, open_session, run
from .source import Wishes
from .verify import first_line


def load_onnx(model: Any, example: object, wishes: Wishes) -> OnnxModel:
    """An `OnnxModel` of a path, of bytes, or of a ``ModelProto``, which stays the caller's.

    Args:
        example: inputs to try it with, and to keep with its outputs; None for none.
    Raises:
        ConfigurationError: it is no ONNX model, or cannot be read.
        ExportError: ONNX Runtime cannot load it, or run the example.
    """
    if wishes.dynamic or wishes.input_names or wishes.output_names or wishes.opset or wishes.method:
        raise ConfigurationError(
            "dynamic, input_names, output_names, opset and method are for models that are exported; this one is ONNX "
            "already, and is taken as it is"
        )
    onnx = onnx_module()
    proto = onnx.ModelProto()
    if isinstance(model, onnx.ModelProto):
        what = "the ONNX model"
        proto.CopyFrom(model)
    elif isinstance(model, str | os.PathLike):
        path = Path(model)
        what = f"the ONNX model {path.name}"
        if path.is_dir():
            raise ConfigurationError(f"expected {path} to be an .onnx file, and it is a folder; give the file in it")
        try:
            proto = onnx.load(str(path))
            for tensor in proto.graph.initializer:  # said where weights were read from another file
                tensor.ClearField("data_location")
        except FileNotFoundError as error:
            raise ConfigurationError(f"expected {path} to be an .onnx file, and there is none: {error}") from error
        except Exception as error:
            raise ConfigurationError(f"{path} cannot be read as an ONNX model: {first_line(error)}") from error
    else:
        what = "the ONNX model"
        try:
            proto.ParseFromString(bytes(model))
        except Exception as error:
            raise ConfigurationError(f"the bytes cannot be read as an ONNX model: {first_line(error)}") from error
    if not proto.graph.node and not proto.graph.output:
        raise ConfigurationError(f"{what} has no graph; it may be a file of another framework")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        raise ConfigurationError(
            f"{what} keeps weights in another file, which is not at hand; give the path of the file"
        )
    try:
        session = open_session(proto)
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load {what}: {first_line(error)}") from error
    content = b"" if is_large(proto) else proto.SerializeToString(deterministic=True)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}" if content else ""
    made = OnnxModel(proto=proto, framework="onnx", source_digest=digest)
    if example is None:
        return made
    named = _named(made, example)
    try:
        outputs = run(session, named)
    except Exception as error:
        raise ExportError(f"{what} cannot be run on the example: {first_line(error)}") from error
    return OnnxModel(proto=proto, framework="onnx", source_digest=digest, examples=((named, outputs),))


def _named(made: OnnxModel, example: object) -> Arrays:
    """An example as the inputs of the model; those of a tuple or list go by their order."""
    if isinstance(example, list | tuple) and not is_array(example):
        example = dict(zip((spec.name for spec in made.inputs), example, strict=False))
    return {spec.name: np.asarray(array) for spec, array in fit(made.signature, example)}
