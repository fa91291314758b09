"""Running ONNX models in this process, on ONNX Runtime."""

from .backend import OnnxBackend
from .session import OnnxSession

__all__ = ["OnnxBackend", "OnnxSession"]
