"""MLServer runtime: ONNX Runtime on the add/sub model. MLServer has none of its own, so this is what a user writes."""

import numpy as np
import onnxruntime as ort
from mlserver import MLModel  # type: ignore[import-not-found,unused-ignore]  # installed in the rival's environment
from mlserver.types import (  # type: ignore[import-not-found,unused-ignore]
    InferenceRequest,
    InferenceResponse,
    ResponseOutput,
)
from mlserver.utils import get_model_uri  # type: ignore[import-not-found,unused-ignore]


class AddSub(MLModel):  # type: ignore[misc,unused-ignore]
    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = await get_model_uri(self._settings)
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        # Straight from the parsed list to an array: the codecs of the package give the same and cost more.
        feed = {one.name: np.array(one.data.root, np.int32).reshape(one.shape) for one in payload.inputs}
        arrays = self.session.run(self.names, feed)
        outputs = [
            ResponseOutput(name=name, shape=list(array.shape), datatype="INT32", data=array.ravel().tolist())
            for name, array in zip(self.names, arrays, strict=True)
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)
