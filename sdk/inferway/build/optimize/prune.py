"""Pruning: weights to zero, or whole channels away, in the framework that the model is from.

*Magnitude* pruning sets the smallest weights of each matrix to zero. The file is as long as before and dense kernels
multiply zeros as they multiply everything: alone it makes no model faster, only better to compress.

*Structured* pruning takes the units of a layer that weigh least away, with what reads them, so that the layers that
remain are narrower and everything is faster. It costs accuracy that only training gets back, so it comes with
fine-tuning.

Sources: Han et al., "Learning both weights and connections" (2015); for torch the dependency graph of torch-pruning,
Fang et al., "DepGraph" (2023); units are ranked by the norm of their weights, Li et al. (2017).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np

from ..._errors import MissingExtraError
from ..runtime import onnx_module
from .data import Array
from .quantise import copied

FineTune = Callable[[Any], object]

_LEAST_ELEMENTS: Final = 256
_ROUND_TO: Final = 4
"""Channels of a torch module stay a multiple of this: kernels work on several at once."""


def framework_of(model: Any) -> Literal["keras", "torch"] | None:
    """Which of the two a model is of; Keras on torch is Keras."""
    tops = {ancestor.__module__.partition(".")[0] for ancestor in type(model).__mro__}
    return "keras" if "keras" in tops else "torch" if "torch" in tops else None


def magnitude_onnx(proto: Any, sparsity: float) -> Any:
    """A ``ModelProto`` with that share of each matrix or kernel at zero, the smallest ones."""
    onnx = onnx_module()
    fresh = copied(proto)
    changed = False
    for tensor in fresh.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.size < _LEAST_ELEMENTS:
            continue
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.where(_kept(values, sparsity), values, 0), tensor.name))
        changed = True
    if not changed:
        raise ValueError("it has no matrices or kernels to prune")
    return fresh


def magnitude(model: Any, sparsity: float, fine_tune: FineTune) -> Any:
    """A copy of a Keras or torch model, pruned and fine-tuned, with its zeros kept."""
    if framework_of(model) == "keras":
        return _magnitude_keras(model, sparsity, fine_tune)
    return _magnitude_torch(model, sparsity, fine_tune)


def structured(model: Any, example: object, sparsity: float, fine_tune: FineTune) -> Any:
    """A narrower copy of a Keras or torch model, fine-tuned.

    Args:
        example: inputs as the model takes them; torch is traced with them.
        sparsity: share of each layer's units that goes.
        fine_tune: trains the model that it is given, in place.
    Raises:
        ValueError: the model has a form that cannot be narrowed here; the message says which.
        MissingExtraError: torch-pruning is not installed.
    """
    narrower = (
        _narrow_keras(model, sparsity) if framework_of(model) == "keras" else _narrow_torch(model, example, sparsity)
    )
    fine_tune(narrower)
    return narrower


def _kept(values: Array, sparsity: float) -> Array:
    size = np.abs(values)
    return np.asarray(size > np.quantile(size, sparsity))


# -- torch


def _magnitude_torch(model: Any, sparsity: float, fine_tune: FineTune) -> Any:
    import torch
    from torch.nn.utils import prune

    fresh = copy.deepcopy(model)
    layers = [
        layer
        for layer in fresh.modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d)
        and layer.weight.numel() >= _LEAST_ELEMENTS
    ]
    if not layers:
        raise ValueError("it has no linear or convolution layers to prune")
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=sparsity)
    try:
        fine_tune(fresh)  # the masks hold while it trains
    finally:
        for layer in layers:
            prune.remove(layer, "weight")
    return fresh.eval()


def _narrow_torch(model: Any, example: object, sparsity: float) -> Any:
    import torch

    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtraError("torch-pruning", "train", "structured pruning of a PyTorch model") from error
    fresh = copy.deepcopy(model).eval()
    inputs = _tensors(example, next(fresh.parameters()).device)
    before = sum(p.numel() for p in fresh.parameters())
    with torch.no_grad():
        outputs = fresh(*inputs) if isinstance(inputs, tuple) else fresh(inputs)
    kept = _output_layers(fresh, inputs, outputs)
    for parameter in fresh.parameters():
        parameter.requires_grad_(True)  # the dependency graph is read from autograd
    pruner = torch_pruning.pruner.BasePruner(
        fresh, inputs, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), pruning_ratio=sparsity,
        ignored_layers=kept, round_to=_ROUND_TO,
    )  # fmt: skip
    pruner.step()
    for old, new in zip(model.parameters(), fresh.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    if sum(p.numel() for p in fresh.parameters()) >= before:
        raise ValueError("it has no layer that could be narrowed without changing what the model gives")
    return fresh


def _tensors(example: object, device: Any) -> Any:
    import torch

    if isinstance(example, dict):
        raise ValueError("structured pruning needs an example as the module's forward takes it, got a mapping")
    if isinstance(example, tuple | list):
        return tuple(_tensors(part, device) for part in example)
    found = example if isinstance(example, torch.Tensor) else torch.as_tensor(np.asarray(example))
    return found[:2].to(device)


def _output_layers(model: Any, inputs: Any, outputs: Any) -> list[Any]:
    """The layers whose width is the model's output: nothing of theirs may go.

    They are found by what runs last: layers with weights, back to front, until one is as wide as each output.
    """
    import torch

    ran: list[Any] = []
    hooks = [
        layer.register_forward_hook(lambda layer, *_: ran.append(layer))
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d | torch.nn.LSTM)
    ]
    try:
        with torch.no_grad():
            model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    tensors = [t for t in (outputs if isinstance(outputs, tuple | list) else [outputs]) if isinstance(t, torch.Tensor)]
    widths = {axis for tensor in tensors for axis in tensor.shape[1:]}
    # Every layer as wide as an output may be one: to keep too much is only to prune too little.
    heads = [layer for layer in ran if getattr(layer, "out_features", getattr(layer, "out_channels", None)) in widths]
    return list({id(layer): layer for layer in [*heads, *ran[-1:]]}.values())


# -- Keras


def _keras() -> Any:
    return sys.modules["keras"]


def _magnitude_keras(model: Any, sparsity: float, fine_tune: FineTune) -> Any:
    keras = _keras()
    fresh = keras.models.clone_model(model)
    fresh.set_weights(model.get_weights())
    pruned = [
        (layer, number)
        for layer in fresh.layers
        for number, values in enumerate(layer.get_weights())
        if values.ndim >= 2 and values.size >= _LEAST_ELEMENTS and not isinstance(layer, keras.layers.Embedding)
    ]
    if not pruned:
        raise ValueError("it has no kernels to prune")
    masks = [_kept(layer.get_weights()[number], sparsity) for layer, number in pruned]

    def apply() -> None:
        for (layer, number), mask in zip(pruned, masks, strict=True):
            weights = layer.get_weights()
            weights[number] = np.where(mask, weights[number], 0)
            layer.set_weights(weights)

    apply()
    fine_tune(fresh)
    apply()  # training has moved the zeros; what it learnt around them stays
    return fresh


def _narrow_keras(model: Any, sparsity: float) -> Any:
    """A chain of Dense layers, each but the last with fewer units, and what lies between them."""
    keras = _keras()
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    between = (
        keras.layers.Activation, keras.layers.Dropout, keras.layers.ReLU, keras.layers.LeakyReLU,
        keras.layers.BatchNormalization, keras.layers.LayerNormalization, keras.layers.Dense,
    )  # fmt: skip
    strange = [layer for layer in layers if not isinstance(layer, between)]
    if strange:
        raise ValueError(
            f"only chains of Dense layers can be narrowed in Keras, and it has the layer '{strange[0].name}' "
            f"({type(strange[0]).__name__})"
        )
    if not isinstance(model, keras.Sequential) and not _is_chain(model, layers):
        raise ValueError("only chains of Dense layers can be narrowed in Keras, and its layers branch")
    dense = [layer for layer in layers if isinstance(layer, keras.layers.Dense)]
    if len(dense) < 2:
        raise ValueError("it has no Dense layer between input and output that could be narrowed")
    chosen: Array | None = None
    fresh_layers: list[Any] = []
    weights: list[list[Array]] = []
    for layer in layers:
        config = layer.get_config()
        own = layer.get_weights()
        if isinstance(layer, keras.layers.Dense):
            if chosen is not None:
                own[0] = own[0][chosen]
            if layer is not dense[-1]:
                following = dense[dense.index(layer) + 1].get_weights()[0]
                # A unit matters by what comes in and by what is made of it.
                weight = np.linalg.norm(own[0], axis=0) * np.linalg.norm(following, axis=1)
                count = max(1, round(len(weight) * (1 - sparsity)))
                chosen = np.sort(np.argsort(weight)[len(weight) - count :])
                own = [own[0][:, chosen], *(part[chosen] for part in own[1:])]
                config["units"] = count
        elif chosen is not None:
            own = [part[chosen] for part in own]
        config.pop("build_config", None)
        fresh_layers.append(type(layer).from_config(config))
        weights.append(own)
    fresh = keras.Sequential([keras.Input(shape=model.input_shape[1:]), *fresh_layers], name=f"{model.name}_narrower")
    for layer, own in zip(fresh_layers, weights, strict=True):
        layer.set_weights(own)
    _compile_like(fresh, model)
    return fresh


def _is_chain(model: Any, layers: list[Any]) -> bool:
    return len(model.inputs) == 1 and len(model.outputs) == 1 and all(len(n._inbound_nodes) == 1 for n in layers)


def _compile_like(fresh: Any, model: Any) -> None:
    """Compile a copy as its model was, so that it can be trained as it was."""
    if not getattr(model, "compiled", False):
        return
    config = model.get_compile_config()
    if config:
        fresh.compile_from_config(config)
