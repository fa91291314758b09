"""``inferway.wrap``: a model of Keras, PyTorch or scikit-learn that can also be optimised and deployed.

The wrapped model stays what it was: whatever is not said here goes to it, reading, calling and setting alike. Added is
what no framework has, and what it takes for that is remembered from ``fit``: a few raw rows as an example, the rows
that were held out, and a digest of the weights, by which an optimised model of older weights is told from one of these.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._client import Inferway
from .._errors import (
    APIConnectionError,
    ConfigurationError,
    InvalidInputError,
    MissingExtraError,
    ModelNotBuiltError,
    StaleModelError,
)
from .._package import Offer
from ..build.export import family_of, to_onnx
from ..build.model import Label, OnnxModel
from .data import Rows, cut, inputs_of, parted, rows_in, targets_of
from .deployed import DeployedModel
from .fit_keras import KerasFramework
from .fit_sklearn import EstimatorFramework
from .fit_torch import TorchFramework
from .history import History, larger_is_better
from .job import CheckpointOptions, EarlyStopping, TrainingJob, TrainingResult
from .live import Display, Shows
from .loaders import gathered, is_source
from .local import LocalJob
from .preprocessing import Preprocessing, composed

Framework: TypeAlias = KerasFramework | TorchFramework | EstimatorFramework
Strategy: TypeAlias = Literal["local", "ddp", "parameter_server"]
Mode: TypeAlias = Literal["sync", "async", "ssp"]

_STRATEGIES: Final = ("local", "ddp", "parameter_server")
_MODES: Final = ("sync", "async", "ssp")
_BATCH_SIZE: Final = 32
_WORKERS: Final = 2
_EXAMPLE_ROWS: Final = 64
_BACKGROUND_ROWS: Final = 10
_CALIBRATION_ROWS: Final = 512
_MEASURED_ROWS: Final = 20_000
_TUNING_EPOCHS: Final = 2
_OWN: Final = frozenset(
    {"_model", "_framework", "_preprocessing", "_label", "_memory", "_fitted", "_chosen", "history"}
)
_TAKES_ROWS: Final = frozenset(
    {"decision_function", "predict_log_proba", "predict_proba", "predict_on_batch", "score", "test_on_batch"}
)
"""Methods of frameworks whose first argument is rows; with preprocessing they are given what it makes of them."""


@dataclass(frozen=True, slots=True)
class _Memory:
    """What is remembered of a training.

    Attributes:
        raw: a few rows as they were given.
        train, validation: inputs, preprocessed, and targets; references, no copies.
        batch_size: of the training.
    """

    raw: Any
    train: tuple[Any, Any]
    validation: tuple[Any, Any] | None
    batch_size: int


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What `optimize` chose, and of which weights."""

    report: Any
    model: OnnxModel
    digest: str


def wrap(
    model: Any,
    *,
    loss: Any = None,
    optimizer: Any = None,
    metrics: Sequence[Any] = (),
    preprocessing: Any = None,
    name: str | None = None,
    fitted: bool = False,
) -> WrappedModel:
    """Give a model ``fit`` on one or many machines, ``optimize`` and ``deploy``.

    Args:
        model: of Keras 3, a ``torch.nn.Module``, or an estimator of scikit-learn, XGBoost, LightGBM or CatBoost.
        loss: of a PyTorch module: a name (``binary_crossentropy``, ``sparse_categorical_crossentropy``, ``mse``, …), a
            loss of ``torch.nn``, or any callable of outputs and targets. Keras models bring theirs from ``compile``.
        optimizer: of a PyTorch module: one of ``torch.optim``, its name (``adam``, ``sgd``), or what makes one of
            parameters.
        metrics: of a PyTorch module: ``accuracy``, ``mse``, ``mae``, or callables of arrays of outputs and targets.
        preprocessing: a transformer of scikit-learn, such as a ``ColumnTransformer``. It is fitted by ``fit`` to the
            rows that are trained on, and becomes a part of what is served.
        name: under which the model is deployed; None for its own.
        fitted: the model was trained before, so that it may be deployed without ``fit``.
    Raises:
        UnknownFrameworkError: it is of none of these.
        ConfigurationError: an argument does not belong to such a model.
        MissingExtraError: a part of the package is not installed.
    """
    return WrappedModel(model, loss, optimizer, metrics, preprocessing, name, fitted)


class WrappedModel:
    """A model that also trains on many machines, is optimised and deployed; see `wrap`.

    Whatever is not named here is the model's own: ``compile``, ``summary``, ``layers``, ``parameters``, ``get_params``.

    Attributes:
        history: `History` of the last training; None before.
    """

    history: History | None

    def __init__(
        self,
        model: Any,
        loss: Any,
        optimizer: Any,
        metrics: Sequence[Any],
        preprocessing: Any,
        name: str | None,
        fitted: bool,
    ) -> None:
        if isinstance(model, WrappedModel):
            raise ConfigurationError("the model is wrapped already")
        self._model = model
        self._framework = _framework_of(model, loss, optimizer, metrics)
        self._preprocessing = None if preprocessing is None else Preprocessing(preprocessing)
        self._label = name
        self._memory: _Memory | None = None
        self._fitted = fitted
        self._chosen: _Chosen | None = None
        self.history = None

    # The model itself ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The model that is wrapped."""
        return self._model

    @property
    def preprocessing(self) -> Any:
        """The transformer, fitted once the model was; None where there is none."""
        return None if self._preprocessing is None else self._preprocessing.transformer

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # while unpickling or copying nothing is there yet
        found = getattr(self._model, name)
        if name in _TAKES_ROWS and self._preprocessing is not None and callable(found):
            prepared = self._preprocessing

            def transformed(x: object, *arguments: Any, **options: Any) -> Any:
                return found(prepared.transform(x), *arguments, **options)

            return transformed
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._model, name, value)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._model(*arguments, **options)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._model)})

    def __repr__(self) -> str:
        state = "not fitted yet" if self.history is None else f"trained for {self.history.epochs} epochs"
        if self.history is None and self._fitted:
            state = "fitted before"
        return f"<WrappedModel of {type(self._model).__name__} '{self._name_or(None)}', {state}>"

    # Training --------------------------------------------------------------------------------------------------------

    def fit(
        self,
        x: object = None,
        y: object = None,
        *,
        epochs: int = 1,
        batch_size: int = _BATCH_SIZE,
        validation_data: tuple[object, object] | None = None,
        validation_split: float = 0.0,
        shuffle: bool = True,
        strategy: Strategy = "local",
        mode: Mode | None = None,
        staleness: int | None = None,
        servers: int | None = None,
        workers: int | None = None,
        address: str | None = None,
        compression: str | None = None,
        checkpoints: str | os.PathLike[str] | CheckpointOptions | None = None,
        early_stopping: bool | int | str | EarlyStopping | None = None,
        seed: int | None = None,
        progress: Shows = None,
        **options: Any,
    ) -> History:
        """Train the model.

        Args:
            x: rows: an array, a tensor, a data frame, or several inputs in a list or a mapping; or, read into memory
                once, a PyTorch dataset or loader, batches ``(x, y)`` of an iterable that ends, or a Ray Data dataset.
            y: targets, as many; None where ``x`` has them; of a Ray Data dataset the name of the column.
            epochs: how often all rows are gone through; of estimators it is none of our business.
            batch_size: rows of a step; of all workers together in sync training.
            validation_data: rows and targets that are only measured on. `optimize` compares with them later.
            validation_split: instead, a share of the rows, the last ones, as in Keras.
            shuffle: draw another order of the rows for each epoch.
            strategy: ``local``: in this process, as the framework does it; ``ddp``: workers that sum their gradients,
                by Ray Train; ``parameter_server``: workers that pull parameters from servers and push gradients there.
            mode: of the parameter server: ``sync``, the same as one process; ``async``, nobody waits; ``ssp``, nobody
                is more than ``staleness`` steps ahead.
            servers, workers: how many.
            address: of a Ray cluster, ``auto`` or ``ray://host:port``; None starts one here for the time.
            compression: of what is pushed: ``fp16`` or ``topk``.
            checkpoints: a folder, or `CheckpointOptions`; a training that was broken off goes on from the newest.
            early_stopping: True: when ``val_loss`` has not become better for 3 epochs; a number: for so many epochs; a
                name: that metric; or `EarlyStopping`. The best weights are taken back.
            seed: makes the order of rows and dropout the same in each run; weights that the model has already are its
                own affair. Distributed training takes 0 for None.
            progress: a function that is told each `Progress`, True for a bar with curves, False for nothing; None shows
                it on a terminal and in a notebook.
            options: more for the framework's ``fit`` in local training, such as ``callbacks``, ``class_weight`` or
                ``verbose`` of Keras, or for the strategy, such as ``resources_timeout_s``.
        Returns:
            The history; ``history.plot()`` draws it.
        Raises:
            ConfigurationError: an argument is missing or cannot be used, or an optimiser is not one that the strategy
                has.
            InvalidInputError: rows and targets do not fit each other, the model or the loss.
            TrainingDivergedError: a loss is no number; names the step.
            InsufficientResourcesError: the cluster has not what was asked for.
            MissingExtraError: Ray, or another part of the package, is not installed.
        """
        if x is None:
            raise ConfigurationError("fit expects rows and targets: fit(x, y)")
        if is_source(validation_data):
            validation_data = gathered(validation_data, y if isinstance(y, str) else None)
        if is_source(x):
            x, y = gathered(x, y)
        _whole("epochs", epochs)
        _whole("batch_size", batch_size)
        _check_strategy(strategy, mode, {
            "staleness": staleness, "servers": servers, "workers": workers, "address": address,
            "compression": compression,
        })  # fmt: skip
        if y is None and self._framework.family != "sklearn":
            raise ConfigurationError("fit expects targets too: fit(x, y)")
        if not self._framework.trains_in_steps and strategy != "local":
            raise ConfigurationError(
                f"strategy='{strategy}' trains models of Keras and PyTorch; an estimator has no gradients to share"
            )
        self._framework.require_compiled()
        rows = rows_in(x)
        raw, y, validation = self._validation(x, y, validation_data, validation_split)
        if validation_split and rows_in(options.get("sample_weight", ())) == rows:
            options["sample_weight"] = cut(options["sample_weight"], slice(0, rows_in(raw)))
        stopping = _stopping(early_stopping)
        kept = _checkpoint_options(checkpoints)
        shown = Display(False if progress is None and "verbose" in options else progress)
        try:
            if isinstance(self._framework, EstimatorFramework):
                job = LocalJob(_NO_ROWS, None, epochs, batch_size, shuffle, seed, kept, stopping, options=options)
                history = self._fit_estimator(raw, y, validation, job)
            else:
                train, held = self._rows(raw, y), None if validation is None else self._rows(*validation)
                self._framework.build(train.inputs)
                for rows in (train, *(() if held is None else (held,))):
                    self._framework.check(rows)
                if strategy == "local":
                    job = LocalJob(
                        train, held, epochs, batch_size, shuffle, seed, kept, stopping, shown, options,
                    )  # fmt: skip
                    history = self._framework.fit(job)
                else:
                    spread = TrainingJob(
                        self._framework.replica(), self._framework.optimizer_spec(), train.inputs, train.targets,
                        None if held is None else (held.inputs, held.targets), epochs, batch_size, shuffle,
                        0 if seed is None else seed, kept, stopping, shown,
                    )  # fmt: skip
                    found = _spread(
                        strategy, spread,
                        {"mode": mode, "staleness": staleness, "servers": servers, "workers": workers or _WORKERS,
                         "address": address, "compression": compression},
                        options,
                    )  # fmt: skip
                    self._framework.put(found.parameters, found.state)
                    history = _history(strategy, found, stopping)
                self._memory = _Memory(
                    cut(raw, slice(0, _EXAMPLE_ROWS)),
                    (train.inputs, train.targets),
                    None if held is None else (held.inputs, held.targets),
                    batch_size,
                )
        finally:
            shown.close()
        self.history = history
        return history

    def _fit_estimator(self, x: Any, y: Any, validation: tuple[Any, Any] | None, job: LocalJob) -> History:
        assert isinstance(self._framework, EstimatorFramework)
        if y is not None and rows_in(x) != rows_in(y):
            raise InvalidInputError(f"x has {rows_in(x)} rows and y has {rows_in(y)}; expected as many targets as rows")
        if self._preprocessing is not None:
            self._preprocessing.fit(x, y, as_served=True)
        table = self._table(x)
        held = None if validation is None else (self._table(validation[0]), validation[1])
        history = self._framework.fit_table(table, y, held, job)
        self._memory = _Memory(cut(x, slice(0, _EXAMPLE_ROWS)), (table, y), held, job.batch_size)
        return history

    def _validation(
        self, x: Any, y: Any, data: tuple[object, object] | None, split: float
    ) -> tuple[Any, Any, tuple[Any, Any] | None]:
        if data is not None:
            if split:
                raise ConfigurationError("give validation_data or validation_split, not both")
            if not isinstance(data, tuple | list) or len(data) != 2:
                raise ConfigurationError("validation_data expects a pair (x, y)")
            return x, y, (data[0], data[1])
        if split:
            if y is not None and rows_in(x) != rows_in(y):
                raise InvalidInputError(f"x has {rows_in(x)} rows and y has {rows_in(y)}; expected as many")
            x, y, held_x, held_y = parted(x, y, split)
            return x, y, (held_x, held_y)
        return x, y, None

    def _rows(self, x: Any, y: Any) -> Rows:
        """Preprocessed rows; the first time, the preprocessing is fitted to them."""
        if self._preprocessing is not None:
            if not self._preprocessing.fitted:
                if y is not None and rows_in(x) != rows_in(y):
                    raise InvalidInputError(
                        f"x has {rows_in(x)} rows and y has {rows_in(y)}; expected as many targets as rows"
                    )
                self._preprocessing.fit(x, y)
            x = self._preprocessing.transform(x)
        inputs = inputs_of(x, self._framework.input_names)
        return Rows(inputs, targets_of(y, len(next(iter(inputs.values())))))

    def _table(self, x: Any) -> Any:
        return x if self._preprocessing is None else self._preprocessing.transform(x)

    def _inputs(self, x: Any) -> Any:
        """What the framework's own ``predict`` takes."""
        if isinstance(self._framework, EstimatorFramework):
            return self._table(x)
        return inputs_of(self._table(x), self._framework.input_names)

    # Using -----------------------------------------------------------------------------------------------------------

    def predict(self, x: object, **options: Any) -> Any:
        """Predict with this model, here, as its framework does it.

        Args:
            x: rows as they were trained on; with preprocessing, before it.
            options: of the framework's ``predict``; a PyTorch module has ``batch_size``.
        Returns:
            What the framework gives; of a PyTorch module, which has no ``predict``, its output as an array.
        Raises:
            InvalidInputError: the rows do not fit.
        """
        return self._framework.predict(self._inputs(x), **options)

    def evaluate(self, x: object, y: object, **options: Any) -> Any:
        """Measure the model, here: as Keras does it, else a mapping of metric to value.

        Args:
            x, y: rows and targets as of `fit`.
            options: of the framework's ``evaluate``.
        """
        if isinstance(self._framework, EstimatorFramework):
            return self._framework.evaluate((self._table(x), y), **options)
        return self._framework.evaluate(self._rows(x, y), **options)

    # Optimising ------------------------------------------------------------------------------------------------------

    @property
    def onnx(self) -> OnnxModel:
        """The model as it would be deployed: optimised where `optimize` was called, with its preprocessing before it.

        Raises:
            ModelNotBuiltError: it was not fitted.
            StaleModelError: its weights have changed since it was optimised.
            ExportError, ExportMismatchError: as of `to_onnx`.
        """
        return self.to_onnx()

    def to_onnx(self, example: object = None, *, optimized: bool | None = None) -> OnnxModel:
        """The model as ONNX, with its preprocessing before it, held against both.

        Args:
            example: raw rows; None for some that it was trained on.
            optimized: True: the one that `optimize` chose; False: the model as it is; None: the chosen one where there
                is one.
        Raises:
            ModelNotBuiltError: it was not fitted.
            ConfigurationError: ``optimized`` without `optimize`, or an example is needed.
            StaleModelError: its weights have changed since it was optimised.
            ExportError, ExportMismatchError: as of `inferway.to_onnx`.
        """
        self._require_trained()
        if optimized and self._chosen is None:
            raise ConfigurationError("the model was not optimised: call optimize() first")
        if self._chosen is not None and optimized is not False:
            if self._framework.digest() != self._chosen.digest:
                raise StaleModelError(
                    "the weights have changed since the model was optimised, so that what would be deployed is not "
                    "what was trained last: call optimize() again, or deploy(optimized=False) to deploy it as it is"
                )
            network = self._chosen.model
        else:
            network = self._network(example)
        if self._preprocessing is None:
            return network
        raw = self._raw(example)
        names = [spec.name for spec in network.outputs]
        if self._chosen is not None and network is self._chosen.model:
            # What was optimised differs from the model on purpose; the graph of both is held against itself.
            def predict(table: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
                return network.run(table)
        else:

            def predict(table: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
                return dict(zip(names, self._framework.outputs(self._given(table)), strict=True))

        return composed(self._preprocessing, network, raw, predict)

    def _given(self, table: NDArray[np.float32]) -> Any:
        return table if isinstance(self._framework, EstimatorFramework) else inputs_of(table)

    def _network(self, example: object) -> OnnxModel:
        """The model alone, as it takes preprocessed rows."""
        return to_onnx(self._model, self._example(example))

    def _example(self, example: object) -> Any:
        """A few preprocessed rows, as the framework itself takes them."""
        x = self._table(self._raw(example))
        if isinstance(self._framework, EstimatorFramework):
            return x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x
        inputs = inputs_of(x, self._framework.input_names)
        if self._framework.family == "torch":
            inputs = {name: _tensor_like(value) for name, value in inputs.items()}
        return next(iter(inputs.values())) if len(inputs) == 1 else dict(inputs)

    def _raw(self, example: object) -> Any:
        if example is not None:
            return example
        if self._memory is None:
            raise ConfigurationError(
                "the model was fitted elsewhere, so that nothing says what it takes: give example=x[:8], rows as it "
                "takes them"
            )
        return self._memory.raw

    def _require_trained(self) -> None:
        if self.history is None and not self._fitted:
            if isinstance(self._framework, EstimatorFramework) and self._framework.is_fitted():
                return
            raise ModelNotBuiltError(
                "the model was never fitted: call fit(x, y) first; one that was trained elsewhere is wrapped with "
                "inferway.wrap(model, fitted=True)"
            )

    def optimize(self, data: Any = None, **options: Any) -> Any:
        """Make the model smaller and faster, see `inferway.optimize`, and keep what was chosen for `deploy`.

        Args:
            data: rows and targets to measure on, as of `fit`; None for the validation's, or, where there was none, rows
                that it was trained on, by which an accuracy looks better than it is. Of many, 20,000 are taken.
            options: see `inferway.optimize`. ``calibration`` is some of the rows that the model was trained on unless
                given.
        Returns:
            The `OptimizationReport`: what was tried, what was measured, what was chosen.
        Raises:
            ModelNotBuiltError: it was not fitted.
            CalibrationError: there are no rows to measure on.
        """
        from ..build.optimize import optimize

        self._require_trained()
        memory = self._memory
        if data is not None:
            measured = self._measured(data)
            example = None if memory is not None else cut(data[0], slice(0, _EXAMPLE_ROWS))
        elif memory is not None:
            measured, example = memory.validation or memory.train, None
        else:
            raise ConfigurationError(
                "the model was fitted elsewhere, so that there are no rows to measure on: optimize(data=(x, y))"
            )
        if memory is not None:
            options.setdefault("calibration", _sample(memory.train, _CALIBRATION_ROWS)[0])
            if self._framework.trains_in_steps:
                options.setdefault("fine_tune", self._fine_tune)
        if options.get("metric") is None and self._framework.metric is not None:
            options["metric"] = self._framework.metric
        shown = self._example(example)
        report = optimize(
            self._model,
            _sample(measured, _MEASURED_ROWS),
            export=lambda model: to_onnx(model, shown),
            example=shown,
            **options,
        )
        self._chosen = _Chosen(report, report.model, self._framework.digest())
        return report

    def _measured(self, data: Any) -> tuple[Any, Any]:
        if not isinstance(data, tuple) or len(data) != 2:
            raise ConfigurationError("data expects a pair (x, y)")
        if isinstance(self._framework, EstimatorFramework):
            return self._table(data[0]), data[1]
        rows = self._rows(*data)
        return rows.inputs, rows.targets

    def _fine_tune(self, model: Any) -> None:
        """Train a narrower model of the same task for a short while, on what this one was trained on."""
        memory = self._memory
        assert memory is not None
        other = self._framework.likeness(model)
        assert not isinstance(other, EstimatorFramework)
        rows = Rows(*memory.train)
        other.build(rows.inputs)
        other.fit(LocalJob(rows, None, _TUNING_EPOCHS, memory.batch_size, seed=0))

    # Deploying -------------------------------------------------------------------------------------------------------

    def deploy(
        self,
        name: str | None = None,
        client: Inferway | None = None,
        *,
        example: object = None,
        optimized: bool | None = None,
        labels: Mapping[str, str] | None = None,
        classes: Sequence[Label] | None = None,
        metadata: Mapping[str, Any] | None = None,
        golden: int = 8,
        **options: Any,
    ) -> DeployedModel:
        """Put the model into service, with its preprocessing, and give what calls it.

        Golden examples (rows of the training with the model's own outputs), the metrics of the training and where the
        model comes from go along.

        Args:
            name: in the gateway; None for the one that `wrap` was given, or the model's own.
            client: of the gateway; None for `Inferway()`, which finds it in ``INFERWAY_BASE_URL`` and
                ``INFERWAY_API_KEY``.
            example: raw rows, for a model that was fitted elsewhere.
            optimized: False deploys the model as it is although it was optimised; None: what `optimize` chose, if it
                was called.
            labels: short texts to find the version by.
            classes: names of a classifier's classes, in the order of its scores.
            metadata: anything that JSON has.
            golden: how many golden examples; 0 for none.
            options: see `Models.deploy`: ``version``, ``alias``, ``batching``, ``instances``, ``pinned``, …
        Raises:
            ModelNotBuiltError: it was not fitted.
            StaleModelError: its weights have changed since it was optimised; nothing was sent.
            DeploymentFailedError, APIError: as of `Models.deploy`.
        """
        from ..build.package import package

        onnx = self.to_onnx(example, optimized=optimized)
        owned = client is None
        gateway = Inferway() if client is None else client
        try:
            with tempfile.TemporaryDirectory(prefix="inferway-") as folder:
                made = package(
                    onnx, Path(folder) / "model", name=self._name_or(name), labels=labels, classes=classes,
                    golden=golden, metrics=self._metrics(), metadata={**self._facts(optimized), **(metadata or {})},
                )  # fmt: skip
                deployment = gateway.models.deploy(made, name=self._name_or(name), **options)
        except BaseException as error:
            if owned:
                gateway.close()
                if isinstance(error, APIConnectionError):
                    error.add_note("start a gateway with `inferway serve`, or say where one is in INFERWAY_BASE_URL")
            raise
        names = [spec.name for spec in onnx.outputs]
        answer = "label" if isinstance(self._framework, EstimatorFramework) and "label" in names else None
        background = None if self._memory is None else cut(self._memory.raw, slice(0, _BACKGROUND_ROWS))
        return DeployedModel(gateway, deployment, self._preprocessing, answer, background, owned=owned)

    def __inferway_source__(self) -> Offer:
        offer = self.onnx.__inferway_source__()
        metadata = {**offer.metadata, "metrics": self._metrics(), **self._facts(None)}
        return Offer(offer.model, offer.labels, metadata, offer.golden)

    def _metrics(self) -> dict[str, float]:
        return {} if self.history is None else {k: v for k, v in self.history.last.items() if np.isfinite(v)}

    def _facts(self, optimized: bool | None) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self.history is not None:
            facts["training"] = {
                "strategy": self.history.strategy,
                "epochs": self.history.epochs,
                "steps": self.history.steps,
                "rows": 0 if self._memory is None else rows_in(self._memory.train[0]),
            }
        if self._chosen is not None and optimized is not False:
            facts["optimized"] = str(getattr(self._chosen.report.chosen, "name", "yes"))
        return facts

    def _name_or(self, name: str | None) -> str:
        """The name given, or the model's own, in the letters that names are made of."""
        own = name or self._label or getattr(self._model, "name", None)
        if not isinstance(own, str):
            own = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", type(self._model).__name__).lower()
        return own if name is not None else re.sub(r"[^A-Za-z0-9._-]+", "-", own).strip("-._") or "model"


_NO_ROWS: Final = Rows({}, np.empty(0))


def _framework_of(model: Any, loss: Any, optimizer: Any, metrics: Sequence[Any]) -> Framework:
    family = family_of(model)
    if family == "onnx":
        raise ConfigurationError(
            "an ONNX model cannot be trained: inferway.optimize and client.models.deploy take it as it is"
        )
    made: dict[str, type[Framework]] = {"keras": KerasFramework, "torch": TorchFramework}
    return made.get(family, EstimatorFramework)(model, loss, optimizer, metrics)


def _check_strategy(strategy: str, mode: str | None, given: Mapping[str, object]) -> None:
    if strategy not in _STRATEGIES:
        raise ConfigurationError(f"strategy expects one of {', '.join(map(repr, _STRATEGIES))}, got {strategy!r}")
    allowed = {
        "local": (),
        "ddp": ("workers", "address"),
        "parameter_server": ("staleness", "servers", "workers", "address", "compression"),
    }[strategy]
    for name, value in given.items():
        if value is not None and name not in allowed:
            raise ConfigurationError(f"{name} does not belong to strategy='{strategy}'")
    if mode is not None:
        if strategy != "parameter_server":
            raise ConfigurationError(f"mode does not belong to strategy='{strategy}', but to 'parameter_server'")
        if mode not in _MODES:
            raise ConfigurationError(f"mode expects one of {', '.join(map(repr, _MODES))}, got {mode!r}")
    if given["staleness"] is not None and mode != "ssp":
        raise ConfigurationError("staleness belongs to mode='ssp'")
    for name in ("servers", "workers", "staleness"):
        value = given[name]
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < (0 if name == "staleness" else 1)
        ):
            raise ConfigurationError(f"{name} expects a whole number, got {value!r}")


def _spread(strategy: str, job: TrainingJob, given: Mapping[str, Any], options: Mapping[str, Any]) -> TrainingResult:
    """Train over several processes."""
    try:
        import ray  # noqa: F401 - asked for before anything is prepared
    except ImportError as error:
        raise MissingExtraError("ray", "ray", f"strategy='{strategy}'") from error
    run: Any
    if strategy == "ddp":
        from .ddp import fit as run
    else:
        from .parameter_server import fit as run
    accepted = inspect.signature(run).parameters
    for name in options:
        if name not in accepted or name == "job":
            raise ConfigurationError(f"fit knows no {name!r} with strategy='{strategy}'")
    wanted = {name: value for name, value in given.items() if value is not None}
    unknown = [name for name in wanted if name not in accepted]
    if unknown:
        raise ConfigurationError(f"{unknown[0]} does not belong to strategy='{strategy}'")
    found: TrainingResult = run(job, **wanted, **options)
    return found


def _history(strategy: str, result: TrainingResult, stopping: EarlyStopping | None) -> History:
    best = None
    values = None if stopping is None else result.history.get(stopping.metric)
    if stopping is not None and values:
        best = 1 + int(np.nanargmin(values) if stopping.mode == "min" else np.nanargmax(values))
    return History(
        history={name: list(values) for name, values in result.history.items()},
        strategy=strategy,
        epochs=result.epochs,
        steps=result.steps,
        elapsed_s=result.elapsed_s,
        stopped=result.stopped,
        best_epoch=best,
        facts=result.facts,
    )


def _stopping(given: bool | int | str | EarlyStopping | None) -> EarlyStopping | None:
    if given is None or given is False:
        return None
    if isinstance(given, EarlyStopping):
        return given
    if given is True:
        return EarlyStopping()
    if isinstance(given, str):
        return EarlyStopping(given, mode="max" if larger_is_better(given) else "min")
    _whole("early_stopping", given)
    return EarlyStopping(patience=given)


def _checkpoint_options(given: Any) -> CheckpointOptions | None:
    if given is None or isinstance(given, CheckpointOptions):
        return given
    if isinstance(given, str | os.PathLike):
        return CheckpointOptions(os.fspath(given))
    raise ConfigurationError(f"checkpoints expects a folder or CheckpointOptions, got {type(given).__name__}")


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigurationError(f"{name} expects a whole number of at least 1, got {value!r}")


def _tensor_like(array: NDArray[Any]) -> Any:
    import torch

    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array))


def _sample(rows: tuple[Any, Any], count: int) -> tuple[Any, Any]:
    total = rows_in(rows[0])
    chosen = np.linspace(0, total - 1, min(total, count)).astype(np.int64)
    x, y = (None if part is None else cut(part, chosen) for part in rows)
    return _bare((x, y))


def _bare(rows: tuple[Any, Any]) -> tuple[Any, Any]:
    """One input without its name, which is another one in the graph."""
    x, y = rows
    if isinstance(x, Mapping) and len(x) == 1:
        x = next(iter(x.values()))
    if isinstance(x, np.ndarray) and x.dtype == np.float64:
        x = x.astype(np.float32)
    return x, y
