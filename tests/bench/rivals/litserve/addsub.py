"""LitServe application: ONNX Runtime on the add/sub model, taking and giving the same JSON as the other servers.

Settings come from the environment: PORT, MODEL, MAX_BATCH_SIZE, WORKERS, FAST_QUEUE (0 or 1).
"""

import os
from typing import Any

import litserve as ls  # type: ignore[import-not-found,unused-ignore]  # installed in the rival's environment
import numpy as np
import onnxruntime as ort


class AddSub(ls.LitAPI):  # type: ignore[misc,unused-ignore]
    def setup(self, device: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return {one["name"]: np.array(one["data"], np.int32).reshape(one["shape"]) for one in request["inputs"]}

    def batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}

    def predict(self, feed: dict[str, Any]) -> list[Any]:
        return list(self.session.run(self.names, feed))

    def unbatch(self, output: list[Any]) -> list[list[Any]]:
        # Every request of the benchmark has one row.
        return [[array[row : row + 1] for array in output] for row in range(len(output[0]))]

    def encode_response(self, output: list[Any]) -> dict[str, Any]:
        outputs = [
            {"name": name, "datatype": "INT32", "shape": list(array.shape), "data": array.ravel().tolist()}
            for name, array in zip(self.names, output, strict=True)
        ]
        return {"model_name": "addsub", "outputs": outputs}


if __name__ == "__main__":
    batch_size = int(os.environ["MAX_BATCH_SIZE"])
    api = AddSub(max_batch_size=batch_size, batch_timeout=0.001 if batch_size > 1 else 0.0, api_path="/predict")
    server = ls.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=int(os.environ["WORKERS"]),
        fast_queue=os.environ["FAST_QUEUE"] == "1",
        disable_openapi_url=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        num_api_servers=1,
        log_level="error",
        access_log=False,
        generate_client_file=False,
    )
