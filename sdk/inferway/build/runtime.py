"""ONNX Runtime on this machine: sessions of models in memory, of any size."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .._errors import MissingExtraError
from .._tensors import Array

MESSAGE_LIMIT_BYTES: Final = 2**31 - 1
"""No protobuf message is longer; a larger model keeps its weights in another file."""
_QUIET: Final = 4
"""ONNX Runtime's severity of what ends a process; all else is raised as an exception, too."""
_ELEMENT_BYTES: Final = {2: 1, 3: 1, 4: 2, 5: 2, 7: 8, 9: 1, 10: 2, 11: 8, 13: 8, 16: 2}


def ort() -> Any:
    """The module ``onnxruntime``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export", "running a model on this machine") from error
    return onnxruntime


def onnx_module() -> Any:
    """The module ``onnx``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "export", "exporting a model") from error
    return onnx


def is_large(proto: Any) -> bool:
    """Whether a model is too long for one message, by its initializers; writing it to find out would take as long."""
    weights = sum(math.prod(t.dims) * _ELEMENT_BYTES.get(t.data_type, 4) for t in proto.graph.initializer)
    return bool(weights > MESSAGE_LIMIT_BYTES - (1 << 20))


def open_session(proto: Any, threads: int = 0) -> Any:
    """An ``InferenceSession`` on the CPU.

    Args:
        proto: an ``onnx.ModelProto`` of any size.
        threads: for one operator; 0 for as many as there are cores.
    """
    runtime = ort()
    options = runtime.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    if not is_large(proto):
        return runtime.InferenceSession(proto.SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory(prefix="inferway-") as folder:
        path = Path(folder) / "model.onnx"
        save(proto, path)
        # The weights are read while the session is made; nothing of the folder is needed afterwards.
        return runtime.InferenceSession(str(path), options, providers=providers)


def save(proto: Any, path: Path) -> None:
    """Write a model: one file, or, where it is too long for that, its weights beside it as ``NAME.data``."""
    onnx = onnx_module()
    if not is_large(proto):
        path.write_bytes(proto.SerializeToString(deterministic=True))
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    onnx.save_model(copy, str(path), save_as_external_data=True, location=data.name)


def run(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Output name to array."""
    names = [output.name for output in session.get_outputs()]
    options = ort().RunOptions()
    options.log_severity_level = _QUIET
    return dict(zip(names, session.run(names, dict(feeds), options), strict=True))
