"""A model's metadata as the SDK uses it: the signature that inputs are held against before they are sent.

These are plain classes and no pydantic models, because `client.infer` needs them and should not pay for importing
pydantic. They are read from the contract's ``ModelMetadata``; members that this version does not know are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from ._errors import MalformedAnswer
from ._tensors import DTYPES, shape_text


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: the tensor's name.
        datatype: the wire's datatype, such as ``FP32``.
        shape: dimensions, the batch axis included; -1 is variable.
        optional: an input that a request may leave out.
        extra: members of the metadata that this version of the SDK does not know.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    carrier: np.dtype[Any] = field(init=False, repr=False, compare=False)
    """The numpy dtype that carries the tensor on the wire: ``uint16`` for BF16, ``object`` for BYTES."""
    lead: str = field(init=False, repr=False, compare=False)
    """The part of the tensor's JSON object on the wire that never changes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "carrier", DTYPES[self.datatype])
        object.__setattr__(self, "lead", tensor_lead(self.name, self.datatype))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the arrays that `InferenceResult` gives: ``float32`` for BF16, ``object`` for BYTES."""
        return np.dtype(np.float32) if self.datatype == "BF16" else self.carrier

    def __str__(self) -> str:
        return f"{self.name}: {self.datatype} {shape_text(self.shape)}" + (" optional" if self.optional else "")


def tensor_lead(name: str, datatype: str) -> str:
    """The start of a tensor's JSON object, up to its shape."""
    return f'{{"name":{json.dumps(name)},"datatype":"{datatype}","shape":'


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a model takes and gives.

    Attributes:
        name: the model's name.
        versions: the versions that answer now, as text.
        platform: what runs the model, such as ``onnxruntime_onnx``.
        inputs, outputs: tensors in the model's order; empty for a server that does not tell them.
        properties: further facts; the gateway's ``row_exact`` says whether a row's result is the same to the bit in
            any company, ``row_exactness`` how that is reached.
        extra: members that this version of the SDK does not know.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    properties: Mapping[str, str] = field(default_factory=dict[str, str])
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    by_name: Mapping[str, TensorSpec] = field(init=False, repr=False, compare=False)
    """Input name to input."""
    required: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Names of the inputs that a request must have."""
    heads: dict[Any, Any] = field(init=False, repr=False, compare=False, default_factory=dict[Any, Any])
    """JSON parts of requests that were made before, by the names and shapes of their inputs; see `_inference`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {spec.name: spec for spec in self.inputs})
        object.__setattr__(self, "required", tuple(spec.name for spec in self.inputs if not spec.optional))

    def __str__(self) -> str:
        takes = ", ".join(map(str, self.inputs))
        gives = ", ".join(map(str, self.outputs))
        return f"{self.name}({takes}) -> ({gives})"


_TENSOR_MEMBERS = frozenset({"name", "datatype", "shape", "optional"})
_MODEL_MEMBERS = frozenset({"name", "versions", "platform", "inputs", "outputs", "properties"})


def read_metadata(answer: object) -> ModelMetadata:
    """A decoded JSON body to metadata.

    Raises:
        MalformedAnswer: a member that the contract requires is missing or has the wrong type.
    """
    members = _object(answer, "model metadata")
    name = members.get("name")
    if type(name) is not str:
        raise MalformedAnswer("model metadata has no 'name'")
    versions = members.get("versions")
    properties = members.get("properties")
    return ModelMetadata(
        name=name,
        versions=tuple(str(version) for version in cast(list[object], versions)) if type(versions) is list else (),
        platform=str(members.get("platform", "")),
        inputs=_tensors(members, "inputs"),
        outputs=_tensors(members, "outputs"),
        properties=(
            {key: str(value) for key, value in cast(dict[str, object], properties).items()}
            if type(properties) is dict
            else {}
        ),
        extra={key: value for key, value in members.items() if key not in _MODEL_MEMBERS},
    )


def _tensors(members: Mapping[str, object], member: str) -> tuple[TensorSpec, ...]:
    listed = members.get(member)
    if type(listed) is not list:
        raise MalformedAnswer(f"model metadata has no list '{member}'")
    specs: list[TensorSpec] = []
    for item in cast(list[object], listed):
        tensor = _object(item, member)
        name, datatype, shape = tensor.get("name"), tensor.get("datatype"), tensor.get("shape")
        if type(name) is not str or type(datatype) is not str or type(shape) is not list:
            raise MalformedAnswer(f"'{member}' of the model metadata lacks a name, datatype or shape")
        if datatype not in DTYPES:
            raise MalformedAnswer(f"'{name}' has the datatype {datatype!r:.80}, which this version of the SDK lacks")
        dims = cast(list[object], shape)
        if not all(type(dim) is int and dim >= -1 for dim in dims):
            raise MalformedAnswer(f"'{name}' has the shape {dims!r:.80}, expected whole numbers from -1")
        specs.append(
            TensorSpec(
                name=name,
                datatype=datatype,
                shape=tuple(cast(list[int], dims)),
                optional=tensor.get("optional") is True,
                extra={key: value for key, value in tensor.items() if key not in _TENSOR_MEMBERS},
            )
        )
    return tuple(specs)


def _object(value: object, what: str) -> Mapping[str, object]:
    if type(value) is not dict:
        raise MalformedAnswer(f"expected {what} as a JSON object, got {type(value).__name__}")
    return cast(dict[str, object], value)
