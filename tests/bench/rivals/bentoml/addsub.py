"""BentoML services: ONNX Runtime on the add/sub model, in the forms that the benchmark tries.

``Plain`` takes and gives the same JSON as the other servers. ``Typed`` declares arrays, BentoML's own way, and gets
``{"INPUT0": [...], "INPUT1": [...]}`` therefore. ``Batched`` takes pairs of vectors, with BentoML's adaptive batching.
"""

import os
from typing import Annotated, Any

import bentoml  # type: ignore[import-not-found,unused-ignore]  # installed in the rival's environment
import numpy as np
import onnxruntime as ort
from bentoml.validators import DType, Shape  # type: ignore[import-not-found,unused-ignore]

Rows = Annotated[np.ndarray, DType("int32"), Shape((1, 16))]

# What the benchmark does not need is off, in the rival's favour.
SETTINGS: dict[str, Any] = {
    "workers": 1,
    "traffic": {"timeout": 60},
    "logging": {"access": {"enabled": False}},
    "metrics": {"enabled": False},
}


def session() -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])


@bentoml.service(**SETTINGS)  # type: ignore[untyped-decorator,unused-ignore]
class Plain:
    def __init__(self) -> None:
        self.session = session()
        self.names = [output.name for output in self.session.get_outputs()]

    @bentoml.api(route="/infer")  # type: ignore[untyped-decorator,unused-ignore]
    async def infer(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        feed = {one["name"]: np.array(one["data"], np.int32).reshape(one["shape"]) for one in inputs}
        outputs = [
            {"name": name, "datatype": "INT32", "shape": list(array.shape), "data": array.ravel().tolist()}
            for name, array in zip(self.names, self.session.run(self.names, feed), strict=True)
        ]
        return {"model_name": "addsub", "outputs": outputs}


@bentoml.service(**SETTINGS)  # type: ignore[untyped-decorator,unused-ignore]
class Typed:
    def __init__(self) -> None:
        self.session = session()

    @bentoml.api(route="/infer")  # type: ignore[untyped-decorator,unused-ignore]
    async def infer(self, INPUT0: Rows, INPUT1: Rows) -> dict[str, list[list[int]]]:
        total, difference = self.session.run(None, {"INPUT0": INPUT0, "INPUT1": INPUT1})
        return {"OUTPUT0": total.tolist(), "OUTPUT1": difference.tolist()}


@bentoml.service(**SETTINGS)  # type: ignore[untyped-decorator,unused-ignore]
class Batched:
    def __init__(self) -> None:
        self.session = session()

    # One batchable array: the two vectors as two rows of a pair, since batching joins a single argument.
    @bentoml.api(route="/infer", batchable=True, max_batch_size=64, max_latency_ms=1000)  # type: ignore[untyped-decorator,unused-ignore]
    async def infer(self, pairs: np.ndarray) -> np.ndarray:
        pairs = pairs.astype(np.int32, copy=False)
        feed = {"INPUT0": np.ascontiguousarray(pairs[:, 0]), "INPUT1": np.ascontiguousarray(pairs[:, 1])}
        return np.stack(self.session.run(None, feed), axis=1)
