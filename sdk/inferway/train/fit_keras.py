"""Keras models: their own ``fit``, watched through a callback."""

from __future__ import annotations

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
from .replica import put_into, replica_factory

_SEED_STATE: Final = "seed_generator_state"
_SUPPORTED: Final = "distributed training updates with SGD (momentum, nesterov), Adam and AdamW"


class KerasFramework:
    """A Keras 3 model."""

    family: Final = "keras"
    trains_in_steps: Final = True

    def __init__(self, model: Any, loss: Any, optimizer: Any, metrics: Sequence[Any]) -> None:
        import keras

        if not isinstance(model, keras.Model):
            raise ConfigurationError(
                f"expected a whole Keras model, got the layer {type(model).__name__}: keras.Sequential([layer])"
            )
        self.model = model
        if loss is not None or optimizer is not None:
            if loss is None:
                raise ConfigurationError("a Keras model is compiled with a loss: wrap(model, loss=…, optimizer=…)")
            model.compile(optimizer=optimizer or "adam", loss=loss, metrics=list(metrics) or None)

    @property
    def input_names(self) -> list[str]:
        """Of the model's inputs, where it has several."""
        tensors = getattr(self.model, "inputs", None) or []
        return [str(tensor.name) for tensor in tensors] if len(tensors) > 1 else []

    @property
    def loss(self) -> Any:
        return getattr(self.model, "loss", None)

    def require_compiled(self) -> None:
        """Raises:
        ConfigurationError: it has no loss or optimiser yet.
        """
        if not self.model.compiled:
            raise ConfigurationError(
                "the Keras model is not compiled: call model.compile(optimizer='adam', loss='binary_crossentropy')"
            )

    def build(self, inputs: Arrays) -> None:
        """Give the weights their shapes by calling the model once.

        Raises:
            InvalidInputError: it cannot take these inputs.
        """
        try:
            self.model(self._arranged({name: array[:1] for name, array in inputs.items()}), training=False)
        except Exception as error:
            shapes = ", ".join(f"'{name}' {array.shape}" for name, array in inputs.items())
            tensors = getattr(self.model, "inputs", None) or []
            expected = "".join(f"; expected {tuple(tensor.shape)}" for tensor in tensors)
            raise InvalidInputError(
                f"the model cannot take these rows ({shapes}){expected}: {first_line(error)}"
            ) from error

    def check(self, rows: Rows) -> None:
        """Hold targets against the loss."""
        shape = self._output_shape()
        check_targets(rows.targets, shape, self.loss)

    def _output_shape(self) -> tuple[int | None, ...] | None:
        try:
            shape = self.model.output_shape
        except (AttributeError, ValueError):
            return None
        return (
            tuple(shape) if isinstance(shape, tuple) and all(n is None or isinstance(n, int) for n in shape) else None
        )

    def fit(self, job: LocalJob) -> History:
        """Train as Keras does."""
        import keras

        model = self.model
        state = _KerasState(model)
        course = Course(job, state, self.outputs)
        first = course.resume()
        if first >= job.epochs:
            return course.finish()
        backend = keras.backend.backend()

        class Watch(keras.callbacks.Callback):  # type: ignore[misc]  # keras is not followed
            def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
                if job.seed is not None:
                    _sow(model, backend, job.seed, epoch)
                self._epoch = epoch

            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                course.step(self._epoch, batch, float((logs or {}).get("loss", float("nan"))))

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                if course.end(epoch, logs or {}):
                    model.stop_training = True

        if job.seed is not None:
            # TensorFlow takes its seed when the order's operators are made, which is before the first epoch.
            _sow(model, backend, job.seed, first)
        options = {"verbose": 0, **job.options}
        callbacks = [Watch(), *(options.pop("callbacks", None) or [])]
        validation = job.validation
        with course.watched():
            model.fit(
                self._arranged(job.rows.inputs),
                job.rows.targets,
                epochs=job.epochs,
                initial_epoch=first,
                batch_size=job.batch_size,
                shuffle=job.shuffle,
                validation_data=None if validation is None else (self._arranged(validation.inputs), validation.targets),
                callbacks=callbacks,
                **options,
            )
        return course.finish()

    def predict(self, inputs: Arrays, **options: Any) -> Any:
        return self.model.predict(self._arranged(inputs), **options)

    def outputs(self, inputs: Arrays) -> list[NDArray[Any]]:
        """Every output as an array, in order, as exporting names them."""
        import keras

        made = self.model.predict(self._arranged(inputs), verbose=0)
        return [np.asarray(leaf) for leaf in keras.tree.flatten(made)]

    def evaluate(self, rows: Rows, **options: Any) -> Any:
        return self.model.evaluate(self._arranged(rows.inputs), rows.targets, **options)

    def replica(self) -> Callable[[], Replica]:
        return replica_factory(self.model)

    def optimizer_spec(self) -> OptimizerSpec:
        """The compiled optimiser, in numbers.

        Raises:
            ConfigurationError: distributed training has no such optimiser, or not this option of it.
        """
        import keras

        optimizer = self.model.optimizer
        kind = type(optimizer).__name__
        for name in ("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "gradient_accumulation_steps", "amsgrad"):
            if getattr(optimizer, name, None):
                raise ConfigurationError(f"{_SUPPORTED}; {name} of {kind} is not among what it can do")
        if isinstance(getattr(optimizer, "_learning_rate", None), keras.optimizers.schedules.LearningRateSchedule):
            raise ConfigurationError(f"{_SUPPORTED} at one learning rate; a schedule is not among what it can do")
        decay = getattr(optimizer, "weight_decay", None)
        rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        if kind == "SGD" and not decay:
            return OptimizerSpec("sgd", rate, momentum=float(optimizer.momentum), nesterov=bool(optimizer.nesterov))
        if kind in ("Adam", "AdamW") and (kind == "AdamW" or not decay):
            return OptimizerSpec(
                "adamw" if kind == "AdamW" else "adam",
                rate,
                beta1=float(optimizer.beta_1),
                beta2=float(optimizer.beta_2),
                epsilon=float(optimizer.epsilon),
                weight_decay=float(decay or 0.0),
            )
        with_decay = " with weight_decay (AdamW has it)" if decay and kind in ("SGD", "Adam") else ""
        raise ConfigurationError(f"{_SUPPORTED}, not {kind}{with_decay}; strategy='local' takes any")

    def put(self, parameters: NDArray[np.float32], state: Mapping[str, NDArray[Any]]) -> None:
        put_into(self.model, parameters, state)

    def digest(self) -> str:
        from ..build.export_keras import digest_of

        if not self.model.built:
            raise ModelNotBuiltError(f"the Keras model '{self.model.name}' has no weights yet: call fit(x, y) first")
        return digest_of(self.model)

    def likeness(self, other: Any) -> KerasFramework:
        """Another model of the same task, such as a narrower one, compiled as this one is."""
        import keras

        if not getattr(other, "compiled", False):
            optimizer = type(self.model.optimizer).from_config(self.model.optimizer.get_config())
            given = getattr(getattr(self.model, "_compile_metrics", None), "_user_metrics", None)
            config = self.model.loss
            if isinstance(config, keras.losses.Loss):
                config = type(config).from_config(config.get_config())
            other.compile(optimizer=optimizer, loss=config, metrics=given)
        return KerasFramework(other, None, None, ())

    @property
    def metric(self) -> str | None:
        """The metric by which a smaller model is held against this one; None: whatever suits the outputs."""
        return "mse" if loss_name(self.loss) in ("mse", "mae", "mean_squared_error", "mean_absolute_error") else None

    def _arranged(self, inputs: Arrays) -> Any:
        if len(inputs) == 1:
            return next(iter(inputs.values()))
        names = self.input_names
        return [inputs[name] for name in names] if set(names) == set(inputs) else dict(inputs)


class _KerasState:
    """A Keras model's and its optimiser's variables."""

    def __init__(self, model: Any) -> None:
        self._model = model
        optimizer = model.optimizer
        if not optimizer.built:
            optimizer.build(model.trainable_variables)

    def weights(self) -> dict[str, NDArray[Any]]:
        return _arrays(self._model.variables)

    def load_weights(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        _assign(self._model.variables, arrays)

    def optimizer(self) -> dict[str, NDArray[Any]]:
        return _arrays(self._model.optimizer.variables)

    def load_optimizer(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        _assign(self._model.optimizer.variables, arrays)


def _arrays(variables: Sequence[Any]) -> dict[str, NDArray[Any]]:
    import keras

    # By their place: names are counted through in a process, so that they are others in the next one.
    return {str(place): np.array(keras.ops.convert_to_numpy(variable)) for place, variable in enumerate(variables)}


def _assign(variables: Sequence[Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    for place, variable in enumerate(variables):
        variable.assign(arrays[str(place)])


def _sow(model: Any, backend: str, seed: int, epoch: int) -> None:
    """Make what is random in an epoch (order of rows, dropout) depend on seed and epoch alone, so that it can be
    repeated from a checkpoint."""
    words = np.random.SeedSequence((seed, epoch)).generate_state(1 + len(model.variables)) >> 1
    if backend == "torch":
        import torch

        torch.manual_seed(int(words[0]))
    elif backend == "tensorflow":
        import tensorflow

        tensorflow.random.set_seed(int(words[0]))
    for place, variable in enumerate(model.variables):
        if variable.name == _SEED_STATE:
            variable.assign(np.array([words[1 + place], 0], np.uint32))
