"""Running ONNX models in this process, on ONNX Runtime."""

import os

# Read by the runtime when it is imported, so it has to be said before. Builds since 1.32 else give the machine an id,
# keep a database of what was loaded under the user's cache directory, and send it to the vendor. What models a gateway
# serves is nobody's business; whoever wants to tell sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from .backend import OnnxBackend  # after the variable
from .session import OnnxSession

__all__ = ["OnnxBackend", "OnnxSession"]
