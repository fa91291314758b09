"""The Inferway gateway: a Starlette application that serves ONNX models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("inferway")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"
