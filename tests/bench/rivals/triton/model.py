"""Triton's Python backend calling ONNX Runtime on the add/sub model: what the wheel's server runs for the benchmark.

Triton loads this file from ``NAME/1/model.py``. ``join`` in the model's parameters decides whether the requests that
the scheduler hands over together are run as one batch or one after the other; the benchmark tries both.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # only inside tritonserver


class TritonPythonModel:
    """One instance of the model, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        options = ort.SessionOptions()
        # A run of this model takes microseconds: a second thread only costs.
        options.intra_op_num_threads = 1
        folder = Path(args["model_repository"]) / args["model_version"]
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        self.join = '"join":{"string_value":"true"}' in args["model_config"].replace(" ", "")

    def execute(self, requests: list[Any]) -> list[Any]:
        feeds = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        if not self.join or len(feeds) == 1:
            return [self.respond(self.session.run(self.names, feed)) for feed in feeds]
        rows = np.cumsum([feed["INPUT0"].shape[0] for feed in feeds])[:-1]
        batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        parts = [np.split(array, rows) for array in self.session.run(self.names, batch)]
        return [self.respond(list(arrays)) for arrays in zip(*parts, strict=True)]

    def respond(self, arrays: list[Any]) -> Any:
        tensors = [pb_utils.Tensor(name, array) for name, array in zip(self.names, arrays, strict=True)]
        return pb_utils.InferenceResponse(output_tensors=tensors)
