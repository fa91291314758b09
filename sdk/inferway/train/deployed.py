"""A model that was trained here and is called there: the handle that ``model.deploy()`` gives."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Unpack

import numpy as np

from .._client import Inferway
from .._inference import InferenceResult
from .._options import RequestOptions
from ..resources.deployments import Deployment
from ..resources.inference import ModelHandle
from .preprocessing import Preprocessing


class DeployedModel:
    """A version of a model in a gateway, called with what the model was trained on.

    Attributes:
        name: of the model.
        version: its number in the gateway.
        deployment: how it came there.
        handle: the `ModelHandle` of this version, with all that it can.
        client: the client that is used. One that ``deploy`` made of the environment is closed by `close`.
    """

    def __init__(
        self,
        client: Inferway,
        deployment: Deployment,
        preprocessing: Preprocessing | None,
        answer: str | None,
        background: Any,
        *,
        owned: bool,
    ) -> None:
        self.client = client
        self.deployment = deployment
        self.name: str = deployment.model
        self.version: int = deployment.version
        self.handle: ModelHandle = client.model(self.name, self.version)
        self._preprocessing = preprocessing
        self._answer = answer
        self._background = background
        self._owned = owned

    def predict(self, x: object, **options: Unpack[RequestOptions]) -> Any:
        """Predict as the model itself does: its output, or an estimator's labels.

        Args:
            x: rows as they were trained on: an array, or a data frame with texts and missing values.
            options: see `RequestOptions`.
        Returns:
            An array; output name to array where a network has several outputs.
        Raises:
            InvalidInputError: the rows do not fit the model.
            APIError: as of `ModelHandle.infer`.
        """
        result = self.infer(x, **options)
        if self._answer is not None:
            return result[self._answer]
        return result.output if len(result) == 1 else dict(result.outputs)

    __call__ = predict

    def infer(self, x: object, **options: Unpack[RequestOptions]) -> InferenceResult:
        """All outputs, with the version that answered and its times. Arguments and errors as `predict`."""
        return self.handle.infer(self._wire(x), **options)

    def explain(self, x: object, background: object = None, **options: Any) -> Any:
        """What predictions rest on, see `Models.explain`.

        Args:
            x: rows as `predict` takes them.
            background: rows that stand for "nothing is known"; None: some of those that the model was trained on.
        """
        if background is None:
            background = self._background
        return self.handle.explain(self._wire(x), None if background is None else self._wire(background), **options)

    def close(self) -> None:
        """Close the client, if ``deploy`` made it; the model goes on serving."""
        if self._owned:
            self.client.close()

    def __enter__(self) -> DeployedModel:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<DeployedModel {self.name} version {self.version} at {self.client.base_url}>"

    def _wire(self, x: object) -> Any:
        if self._preprocessing is not None:
            made = self._preprocessing.wire(x)
            return next(iter(made.values())) if len(made) == 1 and not self._preprocessing.columns else made
        dtypes = getattr(x, "dtypes", None)
        if dtypes is not None and hasattr(x, "columns"):
            return x
        return x if not isinstance(x, np.ndarray) or x.dtype != np.float64 else x.astype(np.float32)
