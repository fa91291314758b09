"""One copy of a Keras or PyTorch model in one process, met as one flat vector of parameters.

On PyTorch, and so for Keras on PyTorch, every trainable parameter is pointed at its part of one contiguous FP32 buffer,
and so is its gradient: autograd then writes the gradients where they are sent from, and taking parameters over is one
copy, whatever the number of layers. TensorFlow's variables own their memory, so there each is copied.

The loss is the framework's own: Keras computes it as ``fit`` would, regularisation included; a PyTorch module has none,
so that it is named here or given as a callable of outputs and targets.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, MissingExtraError, ModelNotBuiltError, TrainingDivergedError
from .._errors import UnknownFrameworkError as UnknownFramework
from .job import Arrays, Replica, Vector

Loss: TypeAlias = str | Callable[..., Any]
"""A name (``mse``, ``binary_crossentropy``, ``sparse_categorical_crossentropy``…), or a callable:
``loss(outputs, targets)`` for PyTorch, ``loss(targets, outputs)`` for Keras."""
Metric: TypeAlias = str | Callable[..., Any]

_SEED_STATE: Final = "seed_generator_state"


def replica_factory(
    model: Any, *, loss: Loss | None = None, metrics: Sequence[Metric] = (), from_logits: bool | None = None
) -> Callable[[], Replica]:
    """What makes copies of a model, here or in other processes.

    Args:
        model: a built Keras model or a ``torch.nn.Module``. It is copied, never changed; the copies begin with the
            weights that it has now.
        loss: as of `Loss`. None: the one that a Keras model was compiled with.
        metrics: names or callables that `Replica.evaluate` also gives. PyTorch: ``accuracy``, ``mse``, ``mae`` or
            ``metric(outputs, targets)`` of arrays over all rows; Keras: what ``compile`` takes.
        from_logits: PyTorch only: whether a named cross-entropy is given scores instead of probabilities. None:
            scores, unless the module's last layer is a sigmoid or a softmax. Keras losses say it themselves.
    Raises:
        UnknownFrameworkError: the model is of neither framework.
        ModelNotBuiltError: its weights have no shapes yet.
        ConfigurationError: there is no such loss or metric, nothing to train, or a parameter that is not FP32.
    """
    family = _family(model)
    if family == "keras":
        return _keras_factory(model, loss, metrics)
    if family == "torch":
        return _torch_factory(model, loss, metrics, from_logits)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise UnknownFramework(f"a model of Keras or PyTorch can be trained this way, not a {kind}")


def put_into(model: Any, parameters: Vector, state: Mapping[str, NDArray[Any]]) -> None:
    """Give a model what a training came to: trainable parameters ``(size,)`` and `Replica.state`.

    Raises:
        ConfigurationError: the vector, or the state, is of another model.
    """
    if _family(model) == "keras":
        _check_size(sum(int(np.prod(v.shape)) for v in model.trainable_variables), parameters)
        at = 0
        for variable in model.trainable_variables:
            size = int(np.prod(variable.shape))
            variable.assign(parameters[at : at + size].reshape(tuple(variable.shape)))
            at += size
        variables = _keras_state(model)
        _check_names(variables, state)
        for name, array in state.items():
            variables[name].assign(array)
        return
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    _check_size(sum(p.numel() for p in trainable), parameters)
    at = 0
    with torch.no_grad():
        for parameter in trainable:
            part = np.array(parameters[at : at + parameter.numel()])
            parameter.copy_(torch.from_numpy(part).view_as(parameter))
            at += parameter.numel()
        buffers = dict(model.named_buffers())
        _check_names(buffers, state)
        for name, array in state.items():
            buffers[name].copy_(torch.from_numpy(np.array(array)))


def check_finite(loss: float, gradient: Vector, *, step: int, worker: int | None) -> None:
    """Stop a training whose numbers are none any more.

    Args:
        gradient: ``(size,)``, FP32.
        step: counted from 1 over all epochs.
    Raises:
        TrainingDivergedError: the loss, or an element of the gradient, is NaN or infinite.
    """
    if np.isfinite(loss) and _finite(gradient):
        return
    what = f"the loss is {loss}" if not np.isfinite(loss) else f"the loss is {loss:.6g}, but the gradient is no number"
    who = "" if worker is None else f" in worker {worker}"
    raise TrainingDivergedError(
        f"{what} at step {step}{who}: look for values in its rows that are missing or huge, or lower the learning rate",
        step=step,
        worker=worker,
        loss=loss,
    )


def _finite(values: Vector) -> bool:
    # A sum is several times quicker than a mask, and only ever wrong in the careful direction: by overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum(dtype=np.float64)):
            return True
    return bool(np.isfinite(values).all())


def _family(model: Any) -> str:
    """``keras``, ``torch`` or nothing, by the names of a type's bases: nothing is imported for it."""
    for base in type(model).__mro__:
        # Before PyTorch: a Keras model on PyTorch is a torch.nn.Module as well.
        if base.__module__.split(".")[0] == "keras" and base.__name__ == "Model":
            return "keras"
    for base in type(model).__mro__:
        if base.__module__.startswith("torch.nn.modules") and base.__name__ == "Module":
            return "torch"
    return ""


def _check_names(there: Mapping[str, Any], state: Mapping[str, NDArray[Any]]) -> None:
    if unknown := sorted(set(state) - set(there)):
        raise ConfigurationError(f"the state is of another model: this one has no {', '.join(unknown)}")


def _check_size(size: int, parameters: Vector) -> None:
    if parameters.shape != (size,):
        raise ConfigurationError(f"the model has {size} trainable numbers, these are {parameters.shape}")


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra, "Training this model")


def _fed(array: NDArray[Any]) -> NDArray[Any]:
    """Rows as frameworks take them: FP32 for wider floats, contiguous, and writable for PyTorch's sake."""
    if array.dtype == np.float64:
        return array.astype(np.float32)
    return np.require(array, requirements=["C", "W"])


def _batches(rows: int, batch_size: int) -> list[slice]:
    return [slice(at, min(at + batch_size, rows)) for at in range(0, rows, batch_size)]


# PyTorch -------------------------------------------------------------------------------------------------------------


class _FlatTorch:
    """Parameters of PyTorch as views into one buffer, and their gradients as views into another."""

    def __init__(self, parameters: Sequence[tuple[str, Any]]) -> None:
        import torch

        self._parameters = [parameter for _, parameter in parameters]
        for name, parameter in parameters:
            if parameter.dtype != torch.float32:
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise ConfigurationError(f"the parameter '{name}' is {dtype}; only float32 can be trained")
            if parameter.device.type != "cpu":
                raise ConfigurationError(f"the parameter '{name}' is on {parameter.device}; move the model to the CPU")
        self.layout = tuple((name, tuple(parameter.shape)) for name, parameter in parameters)
        self.size = sum(parameter.numel() for parameter in self._parameters)
        self.values = np.empty(self.size, np.float32)
        self._gradient: Vector | None = None
        flat = torch.from_numpy(self.values)
        at = 0
        with torch.no_grad():
            for parameter in self._parameters:
                part = flat[at : at + parameter.numel()].view(parameter.shape)
                part.copy_(parameter)
                parameter.data = part
                at += parameter.numel()

    def collect(self, out: Vector) -> None:
        """Have the next backward pass write into ``out``, which becomes zeros."""
        import torch

        out.fill(0.0)
        if out is self._gradient and all(parameter.grad is not None for parameter in self._parameters):
            return
        flat = torch.from_numpy(out)
        at = 0
        for parameter in self._parameters:
            parameter.grad = flat[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()
        self._gradient = out


@dataclass
class _TorchFactory:
    module: Any
    loss: Loss
    metrics: tuple[Metric, ...]
    from_logits: bool | None

    def __call__(self) -> Replica:
        return TorchReplica(copy.deepcopy(self.module), self.loss, self.metrics, self.from_logits)


def _torch_factory(
    module: Any, loss: Loss | None, metrics: Sequence[Metric], from_logits: bool | None
) -> Callable[[], Replica]:
    import torch

    if loss is None:
        raise ConfigurationError("a PyTorch module has no loss of its own: give one, such as loss='mse'")
    lazy = [name for name, p in module.named_parameters() if isinstance(p, torch.nn.parameter.UninitializedParameter)]
    if lazy:
        raise ModelNotBuiltError(f"the parameter '{lazy[0]}' has no shape yet: call the module once with an example")
    if isinstance(loss, str):
        torch_loss(loss, logits=True, log=False)
    for metric in metrics:
        torch_metric(metric)
    # A copy, so that what the caller does with the module afterwards changes nothing here.
    factory = _TorchFactory(copy.deepcopy(module), loss, tuple(metrics), from_logits)
    factory()  # says now, and not in another process, what cannot be trained
    return factory


class TorchReplica:
    """A PyTorch module as a `Replica`. It takes the module over: parameters become views into one buffer."""

    def __init__(
        self, module: Any, loss: Loss, metrics: Sequence[Metric] = (), from_logits: bool | None = None
    ) -> None:
        self._module = module
        trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not trainable:
            raise ConfigurationError("the module has no parameter that can be trained")
        self._flat = _FlatTorch(trainable)
        self._metrics = tuple(metrics)
        last = type(last_layer(module)).__name__
        logits = last not in ("Sigmoid", "Softmax", "LogSoftmax") if from_logits is None else from_logits
        self._threshold = 0.0 if logits else 0.5
        self._loss = torch_loss(loss, logits=logits, log=last == "LogSoftmax") if isinstance(loss, str) else loss

    @property
    def size(self) -> int:
        return int(self._flat.size)

    @property
    def layout(self) -> Sequence[tuple[str, tuple[int, ...]]]:
        return self._flat.layout

    def read(self, out: Vector) -> None:
        out[:] = self._flat.values

    def load(self, parameters: Vector, start: int = 0) -> None:
        self._flat.values[start : start + len(parameters)] = parameters

    def gradient(self, inputs: Arrays, targets: NDArray[Any], out: Vector, *, seed: int) -> float:
        import torch

        torch.manual_seed(seed)
        self._module.train()
        self._flat.collect(out)
        loss = self._loss(self._outputs(inputs), torch.from_numpy(_fed(targets)))
        if loss.ndim:
            loss = loss.mean()
        loss.backward()
        return float(loss.detach())

    def state(self) -> dict[str, NDArray[Any]]:
        return {name: buffer.detach().numpy().copy() for name, buffer in self._module.named_buffers()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        import torch

        buffers = dict(self._module.named_buffers())
        _check_names(buffers, state)
        with torch.no_grad():
            for name, array in state.items():
                buffers[name].copy_(torch.from_numpy(np.array(array)))

    def evaluate(self, inputs: Arrays, targets: NDArray[Any], *, batch_size: int) -> dict[str, float]:
        import torch

        self._module.eval()
        total = 0.0
        outputs: list[NDArray[Any]] = []
        with torch.no_grad():
            for part in _batches(len(targets), batch_size):
                given = self._outputs({name: array[part] for name, array in inputs.items()})
                loss = self._loss(given, torch.from_numpy(_fed(targets[part])))
                total += float(loss.mean()) * (part.stop - part.start)
                if self._metrics:
                    outputs.append(given.numpy())
        result = {"loss": total / len(targets)}
        for metric in self._metrics:
            name, measure = torch_metric(metric)
            result[name] = float(measure(np.concatenate(outputs), targets, self._threshold))
        return result

    def _outputs(self, inputs: Arrays) -> Any:
        import torch

        tensors = {name: torch.from_numpy(_fed(array)) for name, array in inputs.items()}
        return self._module(*tensors.values()) if len(tensors) == 1 else self._module(**tensors)


def last_layer(module: Any) -> Any:
    """The innermost of a module's last children, which is mostly what computes its outputs."""
    children = list(module.children())
    return last_layer(children[-1]) if children else module


def torch_loss(name: str, *, logits: bool, log: bool) -> Callable[[Any, Any], Any]:
    """A loss by Keras's name, or by PyTorch's short one, of outputs and targets.

    Mean squared error: ``mean((y - p)²)``. Binary cross-entropy: ``-mean(y log p + (1 - y) log(1 - p))``. Categorical:
    ``-mean(log p[class])``. Probabilities ``p`` are computed from scores where ``logits``; ``log``: their logarithms.
    """
    from torch.nn import functional

    def like(outputs: Any, targets: Any) -> Any:
        # (n,) and (n, 1) are the same targets; without this PyTorch would pair every output with every target.
        return targets.to(outputs.dtype).reshape(outputs.shape) if targets.numel() == outputs.numel() else targets

    def squared(outputs: Any, targets: Any) -> Any:
        return functional.mse_loss(outputs, like(outputs, targets))

    def absolute(outputs: Any, targets: Any) -> Any:
        return functional.l1_loss(outputs, like(outputs, targets))

    def binary(outputs: Any, targets: Any) -> Any:
        targets = like(outputs, targets)
        if logits:
            return functional.binary_cross_entropy_with_logits(outputs, targets)
        return functional.binary_cross_entropy(outputs, targets)

    def logarithms(outputs: Any) -> Any:
        if logits:
            return functional.log_softmax(outputs, dim=1)
        return outputs if log else outputs.clamp_min(1e-7).log()

    def sparse(outputs: Any, targets: Any) -> Any:
        if targets.ndim == outputs.ndim:
            targets = targets.squeeze(1)
        return functional.nll_loss(logarithms(outputs), targets.long())

    def categorical(outputs: Any, targets: Any) -> Any:
        return -(targets.to(outputs.dtype) * logarithms(outputs)).sum(dim=1).mean()

    def either(outputs: Any, targets: Any) -> Any:
        return functional.cross_entropy(outputs, targets if targets.is_floating_point() else targets.long())

    known = {
        "mse": squared,
        "mean_squared_error": squared,
        "mae": absolute,
        "mean_absolute_error": absolute,
        "binary_crossentropy": binary,
        "sparse_categorical_crossentropy": sparse,
        "categorical_crossentropy": categorical,
        "cross_entropy": either,
    }
    if name not in known:
        raise ConfigurationError(f"there is no loss '{name}'; there are {', '.join(known)}, and any callable")
    return known[name]


def torch_metric(metric: Metric) -> tuple[str, Callable[[NDArray[Any], NDArray[Any], float], Any]]:
    """A metric's name, and how it is computed of outputs, targets, and the score above which a class of two is taken.

    Raises:
        ConfigurationError: there is none of that name.
    """

    def accuracy(outputs: NDArray[Any], targets: NDArray[Any], threshold: float) -> Any:
        if outputs.ndim == 1 or outputs.shape[1:] == (1,):
            return np.mean((outputs.reshape(-1) > threshold) == (targets.reshape(-1) > 0.5))
        classes = (
            targets.argmax(1) if targets.shape == outputs.shape else targets.reshape(len(outputs), *outputs.shape[2:])
        )
        return np.mean(outputs.argmax(1) == classes)

    def squared(outputs: NDArray[Any], targets: NDArray[Any], threshold: float) -> Any:
        return np.mean((outputs - targets.reshape(outputs.shape)) ** 2)

    def absolute(outputs: NDArray[Any], targets: NDArray[Any], threshold: float) -> Any:
        return np.mean(np.abs(outputs - targets.reshape(outputs.shape)))

    if callable(metric):
        given: Callable[..., Any] = metric
        return getattr(metric, "__name__", type(metric).__name__), lambda outputs, targets, _: given(outputs, targets)
    known = {"accuracy": accuracy, "mse": squared, "mae": absolute}
    if metric not in known:
        raise ConfigurationError(f"there is no metric '{metric}'; there are {', '.join(known)}, and any callable")
    return metric, known[metric]


# Keras ---------------------------------------------------------------------------------------------------------------


@dataclass
class _KerasFactory:
    backend: str
    config: dict[str, Any]
    weights: list[NDArray[Any]]
    custom: dict[str, Any]
    loss: Any
    metrics: tuple[Metric, ...]
    _pickled: bytes = field(default=b"", repr=False)

    def __call__(self) -> Replica:
        import keras

        if keras.backend.backend() != self.backend:
            raise ConfigurationError(
                f"the model is of Keras on {self.backend}, and Keras runs on {keras.backend.backend()} in this process"
            )
        # The functions of a Lambda layer are the user's own, on the user's own machines.
        model = keras.saving.deserialize_keras_object(self.config, custom_objects=self.custom, safe_mode=False)
        model.set_weights(self.weights)
        return _keras_replica(model, copy.deepcopy(self.loss), self.metrics)

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickling a loss may import Keras, which takes its backend from the environment, once: so that is set before.
        from ray import cloudpickle

        inner = cloudpickle.dumps((self.config, self.custom, self.loss, self.metrics))
        return _unpickled_factory, (self.backend, inner, self.weights)


def _unpickled_factory(backend: str, inner: bytes, weights: list[NDArray[Any]]) -> _KerasFactory:
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
    from ray import cloudpickle

    config, custom, loss, metrics = cloudpickle.loads(inner)
    return _KerasFactory(backend, config, weights, custom, loss, metrics)


def _keras_factory(model: Any, loss: Loss | None, metrics: Sequence[Metric]) -> Callable[[], Replica]:
    import keras

    backend = keras.backend.backend()
    if backend not in ("torch", "tensorflow"):
        raise ConfigurationError(f"Keras runs on {backend} here; training needs it on torch or tensorflow")
    if not model.built:
        raise ModelNotBuiltError(
            f"the Keras model '{model.name}' has no weights yet: say its input's shape, or call it once with an example"
        )
    if loss is None:
        loss = getattr(model, "loss", None)
        metrics = metrics or _compiled_metrics(model)
    if loss is None:
        raise ConfigurationError("no loss: give one, or compile the Keras model with one")
    if isinstance(loss, str):
        try:
            keras.losses.get(loss)
        except ValueError as error:
            raise ConfigurationError(f"Keras knows no loss '{loss}'") from error
    if not model.trainable_variables:
        raise ConfigurationError(f"the Keras model '{model.name}' has no weight that can be trained")
    with warnings.catch_warnings():
        # It warns of running what was read from a file; this goes to the user's own processes.
        warnings.filterwarnings("ignore", message="The object being serialized includes a `lambda`")
        config = keras.saving.serialize_keras_object(model)
    # What it was compiled with may be known to this process only, and is given apart.
    config.pop("compile_config", None)
    return _KerasFactory(
        backend,
        config,
        [np.array(w) for w in model.get_weights()],
        _custom_objects(model),
        loss,
        tuple(metrics),
    )


def _compiled_metrics(model: Any) -> Sequence[Metric]:
    given = getattr(getattr(model, "_compile_metrics", None), "_user_metrics", None)
    return tuple(given) if isinstance(given, (list, tuple)) else ()


def _custom_objects(model: Any) -> dict[str, Any]:
    """Classes that are not Keras's own, by the names under which a configuration asks for them."""
    found: dict[str, Any] = {}
    for layer in [model, *model._flatten_layers()]:
        kind = type(layer)
        if kind.__module__.split(".")[0] != "keras":
            import keras

            found[keras.saving.get_registered_name(kind)] = kind
            found[kind.__name__] = kind
    return found


def _keras_state(model: Any) -> dict[str, Any]:
    # By place: a variable's path begins with the model's name in one that was made, and not in one that was read.
    fixed = [v for v in model.non_trainable_variables if v.name != _SEED_STATE]
    return {f"{place}/{v.name}": v for place, v in enumerate(fixed)}


def _keras_replica(model: Any, loss: Any, metrics: Sequence[Metric]) -> Replica:
    import keras

    kind = TorchKerasReplica if keras.backend.backend() == "torch" else TensorFlowReplica
    return kind(model, loss, metrics)


class _KerasReplica:
    """What both backends share. It takes the model over and compiles it."""

    def __init__(self, model: Any, loss: Any, metrics: Sequence[Metric]) -> None:
        self._model = model
        model.compile(optimizer="sgd", loss=loss, metrics=list(metrics) or None)
        names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
        self._input_names = names
        self._trains = "training" in inspect.signature(model.call).parameters
        self._generators = [v for v in model.variables if v.name == _SEED_STATE]
        variables = model.trainable_variables
        self.layout: Sequence[tuple[str, tuple[int, ...]]] = tuple((v.path, tuple(v.shape)) for v in variables)
        self.size = sum(int(np.prod(shape)) for _, shape in self.layout)
        for variable in variables:
            if variable.dtype != "float32":
                raise ConfigurationError(
                    f"the parameter '{variable.path}' is {variable.dtype}; only float32 can be trained"
                )

    def state(self) -> dict[str, NDArray[Any]]:
        return {name: np.array(_array(variable)) for name, variable in _keras_state(self._model).items()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        variables = _keras_state(self._model)
        _check_names(variables, state)
        for name, array in state.items():
            variables[name].assign(array)

    def evaluate(self, inputs: Arrays, targets: NDArray[Any], *, batch_size: int) -> dict[str, float]:
        x = self._arranged({name: _fed(array) for name, array in inputs.items()})
        found = self._model.evaluate(x, _fed(targets), batch_size=batch_size, verbose=0, return_dict=True)
        return {name: float(value) for name, value in found.items()}

    def _arranged(self, inputs: Mapping[str, Any]) -> Any:
        if len(inputs) == 1:
            return next(iter(inputs.values()))
        by_name = set(inputs) == set(self._input_names)
        return [inputs[name] for name in self._input_names] if by_name else list(inputs.values())

    def _sow(self, seed: int) -> None:
        """Set the state of every random layer, so that a step draws the same again."""
        if self._generators:
            drawn = np.random.SeedSequence(seed).generate_state(len(self._generators)) >> 1
            for generator, number in zip(self._generators, drawn, strict=True):
                generator.assign(np.array([number, 0], np.uint32))

    def _outputs(self, x: Any) -> Any:
        return self._model(x, training=True) if self._trains else self._model(x)


def _array(variable: Any) -> NDArray[Any]:
    import keras

    return cast("NDArray[Any]", keras.ops.convert_to_numpy(variable))


class TorchKerasReplica(_KerasReplica):
    """A Keras model on PyTorch as a `Replica`."""

    def __init__(self, model: Any, loss: Any, metrics: Sequence[Metric] = ()) -> None:
        super().__init__(model, loss, metrics)
        self._flat = _FlatTorch([(v.path, v.value) for v in model.trainable_variables])

    def read(self, out: Vector) -> None:
        out[:] = self._flat.values

    def load(self, parameters: Vector, start: int = 0) -> None:
        self._flat.values[start : start + len(parameters)] = parameters

    def gradient(self, inputs: Arrays, targets: NDArray[Any], out: Vector, *, seed: int) -> float:
        import torch

        torch.manual_seed(seed)
        self._sow(seed)
        self._flat.collect(out)
        x = self._arranged({name: torch.from_numpy(_fed(array)) for name, array in inputs.items()})
        y = torch.from_numpy(_fed(targets))
        loss = self._model.compute_loss(x=x, y=y, y_pred=self._outputs(x), sample_weight=None, training=True)
        loss.backward()
        return float(loss.detach())


class TensorFlowReplica(_KerasReplica):
    """A Keras model on TensorFlow as a `Replica`."""

    def __init__(self, model: Any, loss: Any, metrics: Sequence[Metric] = ()) -> None:
        super().__init__(model, loss, metrics)
        import tensorflow

        def step(x: Any, y: Any) -> Any:
            with tensorflow.GradientTape() as tape:
                loss = self._model.compute_loss(x=x, y=y, y_pred=self._outputs(x), sample_weight=None, training=True)
            values = [v.value for v in self._model.trainable_variables]
            none = tensorflow.UnconnectedGradients.ZERO
            return loss, tape.gradient(loss, values, unconnected_gradients=none)

        self._step = tensorflow.function(step, reduce_retracing=True)
        self._values = np.empty(self.size, np.float32)
        self.read(self._values)

    def read(self, out: Vector) -> None:
        self._gather([_array(v) for v in self._model.trainable_variables], out)

    def load(self, parameters: Vector, start: int = 0) -> None:
        end = start + len(parameters)
        self._values[start:end] = parameters
        at = 0
        for variable in self._model.trainable_variables:
            size = int(np.prod(variable.shape))
            # Also one of which only a part came: the other part is what came for it before.
            if at < end and start < at + size:
                variable.assign(self._values[at : at + size].reshape(tuple(variable.shape)))
            at += size

    def gradient(self, inputs: Arrays, targets: NDArray[Any], out: Vector, *, seed: int) -> float:
        import tensorflow

        self._sow(seed)
        x = self._arranged({name: tensorflow.convert_to_tensor(_fed(array)) for name, array in inputs.items()})
        loss, gradients = self._step(x, tensorflow.convert_to_tensor(_fed(targets)))
        # An embedding's gradient comes as slices.
        self._gather([tensorflow.convert_to_tensor(g).numpy() for g in gradients], out)
        return float(loss)

    @staticmethod
    def _gather(arrays: Sequence[NDArray[Any]], out: Vector) -> None:
        at = 0
        for array in arrays:
            out[at : at + array.size] = array.reshape(-1)
            at += array.size
