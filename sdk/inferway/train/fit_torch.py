"""PyTorch modules: a training loop of the usual form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, InvalidInputError, ModelNotBuiltError
from ..build.verify import first_line
from .data import Rows, check_targets, loss_name
from .history import History
from .job import Arrays, OptimizerSpec, Replica
from .local import Course, LocalJob
from .plan import Plan
from .replica import last_layer, put_into, replica_factory, torch_loss, torch_metric

_SUPPORTED: Final = "distributed training updates with torch.optim.SGD (momentum, nesterov), Adam and AdamW"
_OPTIMIZERS: Final = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}
_PREDICT_ROWS: Final = 256


class TorchFramework:
    """A ``torch.nn.Module`` with a loss and an optimiser."""

    family: Final = "torch"
    trains_in_steps: Final = True

    def __init__(self, model: Any, loss: Any, optimizer: Any, metrics: Sequence[Any]) -> None:
        self.model = model
        self.loss = loss
        self._given = optimizer
        self._metrics = tuple(metrics)
        self._optimizer: Any = None
        if isinstance(optimizer, str) and optimizer.lower() not in _OPTIMIZERS:
            raise ConfigurationError(
                f"there is no optimizer '{optimizer}'; there are {', '.join(_OPTIMIZERS)}, and any of torch.optim"
            )
        if isinstance(loss, str):
            torch_loss(loss, logits=True, log=False)
        for metric in self._metrics:
            torch_metric(metric)

    @property
    def input_names(self) -> list[str]:
        """Of ``forward``'s arguments, where it has several that are needed."""
        found = [
            name
            for name, parameter in inspect.signature(self.model.forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        return found if len(found) > 1 else []

    def require_compiled(self) -> None:
        """Raises:
        ConfigurationError: it has no loss or optimiser.
        """
        if self.loss is None or self._given is None:
            raise ConfigurationError(
                "a PyTorch module is trained with a loss and an optimizer: wrap(module, loss='binary_crossentropy', "
                "optimizer=torch.optim.Adam(module.parameters(), lr=0.001))"
            )

    def build(self, inputs: Arrays) -> None:
        """Call the module once: lazy layers take their shapes, and what does not fit is found.

        Raises:
            InvalidInputError: it cannot take these inputs.
        """
        try:
            self._shape = self._forward({name: array[:2] for name, array in inputs.items()})[0].shape
        except Exception as error:
            shapes = ", ".join(f"'{name}' {array.shape}" for name, array in inputs.items())
            raise InvalidInputError(f"the module cannot take these rows ({shapes}): {first_line(error)}") from error

    def check(self, rows: Rows) -> None:
        """Hold targets against the loss."""
        check_targets(rows.targets, (None, *self._shape[1:]), self.loss)

    @property
    def optimizer(self) -> Any:
        """The optimiser, made where only its kind was given."""
        if self._optimizer is None:
            import torch

            given = self._given
            if isinstance(given, torch.optim.Optimizer):
                self._optimizer = given
            else:
                make = getattr(torch.optim, _OPTIMIZERS[given.lower()]) if isinstance(given, str) else given
                self._optimizer = make([p for p in self.model.parameters() if p.requires_grad])
        ours = {id(parameter) for parameter in self.model.parameters()}
        theirs = [id(p) for group in self._optimizer.param_groups for p in group["params"]]
        if not ours & set(theirs):
            raise ConfigurationError(
                "the optimizer has none of the module's parameters; make it of module.parameters() after the last "
                "change of the module, such as moving it or casting it"
            )
        return self._optimizer

    def fit(self, job: LocalJob) -> History:
        """Train: forward, loss, backward, step."""
        import torch

        if job.options:
            raise ConfigurationError(f"fit of a PyTorch module knows no {', '.join(map(repr, job.options))}")
        optimizer = self.optimizer
        course = Course(job, _TorchState(self.model, optimizer), self.outputs)
        first = course.resume()
        seed = int(np.random.default_rng().integers(2**31)) if job.seed is None else job.seed
        plan = Plan(len(job.rows), job.batch_size, seed=seed, shuffle=job.shuffle)
        loss_of, threshold = self._loss()
        device = next(self.model.parameters()).device
        with course.watched():
            for epoch in range(first, job.epochs):
                self.model.train()
                total = 0.0
                seen: list[NDArray[Any]] = []
                order: list[NDArray[Any]] = []
                for step in range(plan.steps):
                    rows = plan.batch(epoch, step)
                    if job.seed is not None:
                        torch.manual_seed(plan.noise(epoch, step, 0))
                    optimizer.zero_grad()
                    outputs = self._call({name: array[rows] for name, array in job.rows.inputs.items()}, device)
                    targets = job.rows.targets[rows]
                    loss = loss_of(outputs, _tensor(targets, device))
                    loss = loss.mean() if loss.ndim else loss
                    loss.backward()
                    optimizer.step()
                    value = float(loss.detach())
                    total += value * len(rows)
                    if self._metrics:
                        seen.append(outputs.detach().cpu().numpy())
                        order.append(targets)
                    course.step(epoch, step, value)
                metrics = {"loss": total / len(job.rows)}
                if seen:
                    metrics |= self._measured(np.concatenate(seen), np.concatenate(order), threshold)
                if job.validation is not None:
                    found = self.evaluate(job.validation, batch_size=job.batch_size)
                    metrics |= {f"val_{name}": number for name, number in found.items()}
                if course.end(epoch, metrics):
                    break
        self.model.eval()
        return course.finish()

    def predict(self, inputs: Arrays, *, batch_size: int = _PREDICT_ROWS) -> Any:
        """The module's output as an array, in evaluation mode; a tuple where it has several."""
        rows = len(next(iter(inputs.values())))
        parts = [
            [leaf.cpu().numpy() for leaf in self._forward({n: a[at : at + batch_size] for n, a in inputs.items()})]
            for at in range(0, rows, batch_size)
        ]
        made = [np.concatenate(leaves) for leaves in zip(*parts, strict=True)]
        return made[0] if len(made) == 1 else tuple(made)

    def outputs(self, inputs: Arrays) -> list[NDArray[Any]]:
        """Every output as an array, in order, as exporting names them."""
        made = self.predict(inputs)
        return list(made) if isinstance(made, tuple) else [made]

    def evaluate(self, rows: Rows, *, batch_size: int = _PREDICT_ROWS) -> dict[str, float]:
        """``loss`` and the metrics over all rows."""
        import torch

        loss_of, threshold = self._loss()
        outputs: list[NDArray[Any]] = []
        total = 0.0
        for at in range(0, len(rows), batch_size):
            part = rows.take(slice(at, at + batch_size))
            given = self._forward(part.inputs)[0]
            with torch.no_grad():
                loss = loss_of(given, _tensor(part.targets, given.device))
            total += float(loss.mean()) * len(part)
            outputs.append(given.cpu().numpy())
        return {"loss": total / len(rows), **self._measured(np.concatenate(outputs), rows.targets, threshold)}

    def _measured(self, outputs: NDArray[Any], targets: NDArray[Any], threshold: float) -> dict[str, float]:
        found = {}
        for metric in self._metrics:
            name, measure = torch_metric(metric)
            found[name] = float(measure(outputs, targets, threshold))
        return found

    def _loss(self) -> tuple[Callable[[Any, Any], Any], float]:
        last = type(last_layer(self.model)).__name__
        logits = last not in ("Sigmoid", "Softmax", "LogSoftmax")
        threshold = 0.0 if logits else 0.5
        if isinstance(self.loss, str):
            return torch_loss(self.loss, logits=logits, log=last == "LogSoftmax"), threshold
        return _like(self.loss), threshold

    def _forward(self, inputs: Arrays) -> list[Any]:
        import torch

        training = self.model.training
        self.model.eval()
        parameter = next(self.model.parameters(), None)
        try:
            with torch.no_grad():
                made = self._call(inputs, "cpu" if parameter is None else parameter.device)
        finally:
            self.model.train(training)
        if isinstance(made, Mapping):
            return list(made.values())
        return list(made) if isinstance(made, list | tuple) else [made]

    def _call(self, inputs: Arrays, device: Any) -> Any:
        tensors = {name: _tensor(array, device) for name, array in inputs.items()}
        return self.model(*tensors.values()) if len(tensors) == 1 else self.model(**tensors)

    def replica(self) -> Callable[[], Replica]:
        loss = self.loss if isinstance(self.loss, str) else _like(self.loss)
        return replica_factory(self.model, loss=loss, metrics=self._metrics)

    def optimizer_spec(self) -> OptimizerSpec:
        """The optimiser, in numbers.

        Raises:
            ConfigurationError: distributed training has no such optimiser, or not this option of it.
        """
        optimizer = self.optimizer
        kind = type(optimizer).__name__
        if kind not in ("SGD", "Adam", "AdamW"):
            raise ConfigurationError(f"{_SUPPORTED}, not {kind}; strategy='local' takes any")
        if len(optimizer.param_groups) != 1:
            raise ConfigurationError(f"{_SUPPORTED} with one group of parameters, got {len(optimizer.param_groups)}")
        group = optimizer.param_groups[0]
        for name in ("dampening", "maximize", "amsgrad", *(() if kind == "AdamW" else ("weight_decay",))):
            if group.get(name):
                hint = "; AdamW has it" if name == "weight_decay" and kind == "Adam" else ""
                raise ConfigurationError(f"{_SUPPORTED}; {name} of {kind} is not among what it can do{hint}")
        rate = float(group["lr"])
        if kind == "SGD":
            return OptimizerSpec("sgd", rate, momentum=float(group["momentum"]), nesterov=bool(group["nesterov"]))
        return OptimizerSpec(
            "adamw" if kind == "AdamW" else "adam",
            rate,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            epsilon=float(group["eps"]),
            epsilon_in="corrected",
            weight_decay=float(group["weight_decay"]) if kind == "AdamW" else 0.0,
        )

    def put(self, parameters: NDArray[np.float32], state: Mapping[str, NDArray[Any]]) -> None:
        put_into(self.model, parameters, state)

    def digest(self) -> str:
        import torch

        from ..build.export_torch import digest_of

        if any(isinstance(p, torch.nn.parameter.UninitializedParameter) for p in self.model.parameters()):
            raise ModelNotBuiltError("the module has parameters without shapes: call fit(x, y) first")
        return digest_of(self.model)

    def likeness(self, other: Any) -> TorchFramework:
        """Another module of the same task, such as a narrower one, with an optimiser of the same kind."""
        optimizer = self.optimizer
        settings = {
            name: value
            for name, value in optimizer.defaults.items()
            if name in inspect.signature(type(optimizer)).parameters
        }

        def make(parameters: Any) -> Any:
            return type(optimizer)(parameters, **settings)

        return TorchFramework(other, self.loss, make, self._metrics)

    @property
    def metric(self) -> str | None:
        """The metric by which a smaller model is held against this one; None: whatever suits the outputs."""
        return "mse" if loss_name(self.loss) in ("mse", "mae", "mean_squared_error", "mean_absolute_error") else None


class _Like:
    """A loss of PyTorch's with targets in the shape and type that it wants: (n,) and (n, 1) are the same numbers."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.__name__ = getattr(loss, "__name__", type(loss).__name__)

    def __call__(self, outputs: Any, targets: Any) -> Any:
        if type(self.loss).__name__ in ("CrossEntropyLoss", "NLLLoss"):
            return self.loss(outputs, targets if targets.is_floating_point() else targets.long().reshape(len(targets)))
        if loss_name(self.loss) and targets.numel() == outputs.numel():
            targets = targets.to(outputs.dtype).reshape(outputs.shape)
        return self.loss(outputs, targets)


def _like(loss: Any) -> Callable[[Any, Any], Any]:
    return _Like(loss)


def _tensor(array: NDArray[Any], device: Any) -> Any:
    import torch

    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


class _TorchState:
    """A module's and its optimiser's state as arrays."""

    def __init__(self, module: Any, optimizer: Any) -> None:
        self._module = module
        self._optimizer = optimizer

    def weights(self) -> dict[str, NDArray[Any]]:
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in self._module.state_dict().items()}

    def load_weights(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        import torch

        self._module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})

    def optimizer(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        for place, values in self._optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:
                    found[f"{place}/{name}"] = np.asarray(
                        value.cpu().numpy() if hasattr(value, "cpu") else value
                    ).copy()
        return found

    def load_optimizer(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        import torch

        whole = self._optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        for key, array in arrays.items():
            place, _, name = key.partition("/")
            state.setdefault(int(place), {})[name] = torch.from_numpy(np.array(array))
        self._optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
