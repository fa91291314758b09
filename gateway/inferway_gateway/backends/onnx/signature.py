"""From a graph's inputs and outputs and a configuration to the signature that callers see.

Two shapes are told apart. The wire's is what callers send and get: ``dims`` of the configuration, with a batch axis in
front where the model has one. The model's is what the graph declares. They differ only where the configuration says
``reshape``, and then hold the same elements.

Source: Triton Inference Server, "Model Configuration", "Inputs and Outputs", "Reshape".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ...core.errors import ModelLoadError
from ...core.model_config import ModelConfig, TensorConfig
from ...core.tensors import MAX_RANK, Signature, TensorSpec
from .graph import GraphFacts

_DATATYPES: Final = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

_MANY_ELEMENTS: Final = 1024


@dataclass(frozen=True, slots=True)
class Declared:
    """An input or output as the graph declares it. ``shape`` is None where it declares none."""

    name: str
    kind: str
    shape: tuple[int, ...] | None
    axes: tuple[str | None, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Reshape:
    """Turns a tensor of one shape into the other; -1 stands for the next variable length, the batch axis included."""

    wire: tuple[int, ...]
    model: tuple[int, ...]

    def to_model(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _carry(shape, self.wire, self.model)

    def to_wire(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _carry(shape, self.model, self.wire)


def _carry(shape: tuple[int, ...], given: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    lengths = iter([length for length, dim in zip(shape, given, strict=True) if dim == -1])
    return tuple(next(lengths) if dim == -1 else dim for dim in wanted)


@dataclass(frozen=True, slots=True)
class Layout:
    """The signature of a version and how it maps to the graph.

    Attributes:
        signature: ``batched`` is what graph and configuration allow; the probe may find otherwise.
        vouched: the configuration says that axis 0 is the batch axis; otherwise it is derived.
        reshapes: tensors whose wire shape is not the model's.
        notes: what an operator should know, such as outputs that cannot be served.
        why_unbatched: in words; empty where ``signature.batched``.
        row_inputs: inputs that, when one of them has length 0 along axis 0, leave every output with no rows, also
            where there is no batch axis because an optional switch has none.
    """

    signature: Signature
    vouched: bool
    reshapes: dict[str, Reshape]
    notes: tuple[str, ...]
    why_unbatched: str
    row_inputs: frozenset[str]


def declared(arguments: Sequence[Any], facts: GraphFacts, optional: bool = False) -> list[Declared]:
    """``onnxruntime.NodeArg`` values as :class:`Declared`."""
    found = []
    for argument in arguments:
        shape: tuple[int, ...] | None = None
        axes: tuple[str | None, ...] = ()
        # The runtime shows an unknown rank as rank 0; the graph tells them apart.
        if argument.name not in facts.unranked:
            dims = list(argument.shape)
            shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in dims)
            axes = tuple(dim if isinstance(dim, str) and dim else None for dim in dims)
        found.append(Declared(argument.name, argument.type, shape, axes, optional))
    return found


def overridable(arguments: Sequence[Declared], facts: GraphFacts, config: ModelConfig) -> list[Declared]:
    """Of the initialisers that a caller may override, those that are meant as optional inputs.

    Older exporters list every weight among the inputs. Where one of them is larger than any switch or adapter would
    be at fixed shape, all of them count as weights, and only those that the configuration names are offered.
    """
    named = {tensor.name for tensor in config.inputs}
    weights = any(facts.elements.get(a.name, 0) > _MANY_ELEMENTS and -1 not in (a.shape or ()) for a in arguments)
    return [argument for argument in arguments if argument.name in named or not weights]


def make_layout(inputs: Sequence[Declared], outputs: Sequence[Declared], config: ModelConfig) -> Layout:
    """Put the graph's declaration and the configuration together.

    Raises:
        ModelLoadError: the two contradict each other, or a tensor has a type that the protocol cannot carry.
    """
    for tensor in inputs:
        if tensor.kind not in _DATATYPES:
            raise ModelLoadError(f"input '{tensor.name}' is a {tensor.kind}, which the protocol cannot carry")
    served = [tensor for tensor in outputs if tensor.kind in _DATATYPES]
    notes = [
        f"output '{tensor.name}' is a {tensor.kind}, which the protocol cannot carry: left out"
        for tensor in outputs
        if tensor.kind not in _DATATYPES
    ]
    said_in = _by_name(config.inputs, inputs, "input")
    said_out = _by_name(config.outputs, outputs, "output")
    if said_out:
        # A configuration that lists outputs offers these and no others.
        by_name = {tensor.name: tensor for tensor in served}
        missing = [name for name in said_out if name not in by_name]
        if missing:
            raise ModelLoadError(f"output '{missing[0]}' has a type that the protocol cannot carry")
        served = [by_name[name] for name in said_out]
    if not served:
        raise ModelLoadError("the model has no output that the protocol can carry")

    tensors = [(tensor, said_in.get(tensor.name), "input") for tensor in inputs]
    tensors += [(tensor, said_out.get(tensor.name), "output") for tensor in served]
    batched, vouched, why = _find_batch_axis(tensors, config)
    reshapes: dict[str, Reshape] = {}
    specs = [_spec(tensor, said, kind, batched, vouched, reshapes) for tensor, said, kind in tensors]
    for tensor, said, _ in tensors:
        if said is not None and said.optional and not tensor.optional:
            notes.append(f"input '{tensor.name}' is configured as optional, but the graph requires it")
    signature = Signature(
        tuple(specs[: len(inputs)]),
        tuple(specs[len(inputs) :]),
        batched,
        (config.max_batch_size or 0) if batched else 0,
    )
    _check_padding(signature, config)
    return Layout(signature, vouched, reshapes, tuple(notes), why, _row_inputs(inputs, served))


def _row_inputs(inputs: Sequence[Declared], outputs: Sequence[Declared]) -> frozenset[str]:
    """The required inputs, where axis 0 of each, and of every output, goes by one name."""
    required = [tensor for tensor in inputs if not tensor.optional]
    first_axes = {tensor.axes[0] if tensor.axes else None for tensor in (*required, *outputs)}
    if len(first_axes) != 1 or None in first_axes:
        return frozenset()
    return frozenset(tensor.name for tensor in required)


def _by_name(said: Sequence[TensorConfig], tensors: Sequence[Declared], kind: str) -> dict[str, TensorConfig]:
    known = {tensor.name for tensor in tensors}
    for tensor in said:
        if tensor.name not in known:
            names = ", ".join(f"'{name}'" for name in sorted(known))
            raise ModelLoadError(f"the configuration names {kind} '{tensor.name}', the graph has {names}")
    if len({tensor.name for tensor in said}) != len(said):
        raise ModelLoadError(f"the configuration names an {kind} twice")
    return {tensor.name: tensor for tensor in said}


Tensors = Sequence[tuple[Declared, TensorConfig | None, str]]


def _find_batch_axis(tensors: Tensors, config: ModelConfig) -> tuple[bool, bool, str]:
    """Whether there may be a batch axis, whether the configuration vouches for it, and if not, why."""
    if config.max_batch_size == 0:
        return False, False, "the configuration says that there is no batch axis"
    if config.max_batch_size is not None:
        for tensor, _, kind in tensors:
            if tensor.shape is not None and (not tensor.shape or tensor.shape[0] != -1):
                raise ModelLoadError(
                    f"max_batch_size is {config.max_batch_size}, but axis 0 of {kind} '{tensor.name}' of shape "
                    f"{list(tensor.shape)} is not variable"
                )
        return True, True, ""
    # Dimensions that leave out the graph's first axis say that it is the batch axis, as Triton's always do.
    ranks = {_missing_axes(tensor, said) for tensor, said, _ in tensors} - {None}
    if ranks == {1}:
        return True, True, ""
    if ranks - {0}:
        raise ModelLoadError("dims of the configuration and the graph differ in rank")
    for tensor, said, kind in tensors:
        if said is not None and said.dims and said.dims[0] != -1:
            return False, False, f"the configuration fixes axis 0 of {kind} '{tensor.name}'"
        if not tensor.shape or tensor.shape[0] != -1:
            return False, False, f"axis 0 of {kind} '{tensor.name}' is not variable"
    if not any(kind == "input" for _, _, kind in tensors):
        return False, False, "the model has no input"
    symbols = {tensor.axes[0] for tensor, _, _ in tensors} - {None}
    for tensor, _, kind in tensors:
        if any(axis in symbols for axis in tensor.axes[1:]):
            return False, False, f"the length of axis 0 is also one of another axis of {kind} '{tensor.name}'"
    return True, False, ""


def _missing_axes(tensor: Declared, said: TensorConfig | None) -> int | None:
    """How many axes of the graph the configuration leaves out; None where one of them says nothing."""
    if said is None or said.dims is None or tensor.shape is None:
        return None
    return len(tensor.shape) - len(said.dims if said.reshape is None else said.reshape)


def _spec(
    tensor: Declared,
    said: TensorConfig | None,
    kind: str,
    batched: bool,
    vouched: bool,
    reshapes: dict[str, Reshape],
) -> TensorSpec:
    datatype = _DATATYPES[tensor.kind]
    if said is not None and said.datatype not in (None, datatype):
        raise ModelLoadError(f"{kind} '{tensor.name}' is {datatype}, the configuration says {said.datatype}")
    shape = tensor.shape
    axes = tensor.axes
    if said is not None and said.dims is not None:
        # Derived batching reads dims as the whole shape, because they then have the graph's rank.
        front = (-1,) if batched and vouched else ()
        wire = front + said.dims
        model = wire if said.reshape is None else front + said.reshape
        _check_shape(model, shape, f"{kind} '{tensor.name}'")
        if said.reshape is not None and wire != model:
            reshapes[tensor.name] = Reshape(wire, model)
            axes = (tensor.axes[:1] if batched else ()) + (None,) * (len(wire) - (1 if batched else 0))
        shape = wire
    elif shape is None:
        if kind == "input":
            raise ModelLoadError(f"the graph declares no shape for input '{tensor.name}': say its dims in config.pbtxt")
        # The protocol has no word for an unknown rank; the answer carries the real shape.
        shape = (-1,)
    if len(shape) > MAX_RANK:
        raise ModelLoadError(f"{kind} '{tensor.name}' has {len(shape)} dimensions, at most {MAX_RANK} are served")
    labels = said.labels if said is not None else ()
    return TensorSpec(tensor.name, datatype, shape, tensor.optional, labels, axes if len(axes) == len(shape) else ())


def _check_shape(said: tuple[int, ...], graph: tuple[int, ...] | None, what: str) -> None:
    if graph is None:
        return
    fits = len(said) == len(graph) and all(b in (-1, a) for a, b in zip(said, graph, strict=True))
    if not fits:
        raise ModelLoadError(f"{what} has shape {list(graph)} in the graph, the configuration makes it {list(said)}")


def _check_padding(signature: Signature, config: ModelConfig) -> None:
    """Padding needs a batch axis, and every axis it names must exist and be variable."""
    for padding in config.batching.padding:
        if not signature.batched:
            raise ModelLoadError("batching.padding needs a model with a batch axis")
        for specs, axes, kind in (
            (signature.inputs, padding.inputs, "input"),
            (signature.outputs, padding.outputs, "output"),
        ):
            shapes = {spec.name: spec.shape for spec in specs}
            for name, axis in axes.items():
                if name not in shapes:
                    raise ModelLoadError(f"batching.padding names {kind} '{name}', which the model has not")
                shape = shapes[name]
                if axis >= len(shape) or shape[axis] != -1:
                    raise ModelLoadError(
                        f"batching.padding names axis {axis} of {kind} '{name}', "
                        f"whose shape {list(shape)} is not variable there"
                    )
