"""scikit-learn's estimators, and the boosters that speak its language: their own ``fit``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from .._errors import ConfigurationError, InvalidInputError, ModelNotBuiltError, UnknownFrameworkError
from .data import Rows
from .history import History
from .job import Arrays, OptimizerSpec, Replica
from .local import LocalJob

_NO_STEPS: Final = "an estimator is fitted as a whole"


class EstimatorFramework:
    """An estimator or a pipeline; of XGBoost, LightGBM and CatBoost, classes such as ``XGBClassifier``."""

    family: Final = "sklearn"
    trains_in_steps: Final = False
    input_names: Final[Sequence[str]] = ()
    loss: Final = None

    def __init__(self, model: Any, loss: Any, optimizer: Any, metrics: Sequence[Any]) -> None:
        for name, value in (("loss", loss), ("optimizer", optimizer), ("metrics", metrics or None)):
            if value is not None:
                raise ConfigurationError(f"{_NO_STEPS}: {name} belongs to models of Keras and PyTorch")
        if not hasattr(model, "fit") or not hasattr(model, "predict"):
            kind = type(model)
            raise UnknownFrameworkError(
                f"{kind.__module__}.{kind.__qualname__} has no fit and predict; wrap an estimator, such as "
                f"XGBClassifier for a Booster, or export what is trained with inferway.to_onnx"
            )
        self.model = model

    def require_compiled(self) -> None:
        """Estimators are ready as they are."""

    def build(self, inputs: Arrays) -> None:
        """There is nothing to build before ``fit``."""

    def check(self, rows: Rows) -> None:
        """An estimator checks its targets itself."""

    def fit_table(self, x: Any, y: Any, validation: tuple[Any, Any] | None, job: LocalJob) -> History:
        """Fit the estimator, then measure it on what it was fitted to and on the validation.

        Args:
            x: as the user gave it, or as the preprocessing made it; a data frame stays one.
        Raises:
            ConfigurationError: an option belongs to training in steps.
            InvalidInputError: the estimator cannot take the rows.
        """
        if job.checkpoints is not None or job.early_stopping is not None:
            which = "checkpoints" if job.checkpoints is not None else "early_stopping"
            raise ConfigurationError(f"{_NO_STEPS}: {which} belongs to models of Keras and PyTorch")
        if job.epochs != 1:
            raise ConfigurationError(
                f"{_NO_STEPS}: there are no epochs; how long it trains is an argument of {type(self.model).__name__}"
            )
        if job.seed is not None:
            self._sow(job.seed)
        began = time.monotonic()
        try:
            self.model.fit(x, y, **job.options)
        except (ValueError, TypeError) as error:
            raise InvalidInputError(f"{type(self.model).__name__}.fit: {error}") from error
        elapsed = time.monotonic() - began
        history = {name: [value] for name, value in self._scores(x, y).items()}
        if validation is not None:
            history |= {f"val_{name}": [value] for name, value in self._scores(*validation).items()}
        curve = getattr(self.model, "loss_curve_", None)
        if curve is not None:
            history = {"loss": [float(value) for value in curve], **history}
        return History(history=history, epochs=max(map(len, history.values()), default=1), elapsed_s=elapsed)

    def _sow(self, seed: int) -> None:
        """Every ``random_state`` that was left open."""
        given = self.model.get_params(deep=True) if hasattr(self.model, "get_params") else {}
        seeds = {name: seed for name, value in given.items() if name.endswith("random_state") and value is None}
        if seeds:
            self.model.set_params(**seeds)

    def _scores(self, x: Any, y: Any) -> dict[str, float]:
        from sklearn import metrics
        from sklearn.base import is_classifier, is_regressor

        if y is None:
            return {}
        found = self.model.predict(x)
        if is_classifier(self.model):
            return {"accuracy": float(metrics.accuracy_score(y, found))}
        if is_regressor(self.model):
            return {"mse": float(metrics.mean_squared_error(y, found)), "r2": float(metrics.r2_score(y, found))}
        return {}

    def fit(self, job: LocalJob) -> NoReturn:
        """Never called: see `fit_table`."""
        raise AssertionError(job)

    def predict(self, inputs: Any, **options: Any) -> Any:
        return self.model.predict(inputs, **options)

    def outputs(self, inputs: Any) -> list[NDArray[Any]]:
        """Every output as an array, in order, as exporting names them."""
        from ..build.export_sklearn import outputs_of
        from ..build.source import Wishes

        calls = outputs_of(self.model, Wishes(), type(self.model).__name__)
        return [np.asarray(call(inputs)) for call in calls.values()]

    def evaluate(self, rows: tuple[Any, Any], **options: Any) -> dict[str, float]:
        if options:
            raise ConfigurationError(f"evaluate of an estimator knows no {', '.join(map(repr, options))}")
        return self._scores(*rows)

    def replica(self) -> Callable[[], Replica]:
        raise ConfigurationError(f"{_NO_STEPS}, in this process: strategy='local'")

    def optimizer_spec(self) -> OptimizerSpec:
        raise ConfigurationError(f"{_NO_STEPS}, in this process: strategy='local'")

    def put(self, parameters: NDArray[np.float32], state: Mapping[str, NDArray[Any]]) -> None:
        raise AssertionError("estimators have no vector of parameters")

    def is_fitted(self) -> bool:
        from sklearn.exceptions import NotFittedError
        from sklearn.utils.validation import check_is_fitted

        if hasattr(self.model, "is_fitted"):  # CatBoost
            return bool(self.model.is_fitted())
        try:
            check_is_fitted(self.model)
        except NotFittedError:
            return False
        return True

    def digest(self) -> str:
        from ..build.export_sklearn import digest_of

        if not self.is_fitted():
            raise ModelNotBuiltError(f"{type(self.model).__name__} was never fitted: call fit(x, y) first")
        return digest_of(self.model)

    def likeness(self, other: Any) -> EstimatorFramework:
        return EstimatorFramework(other, None, None, ())

    @property
    def metric(self) -> str | None:
        """The metric by which a smaller model is held against this one; None: whatever suits the outputs."""
        from sklearn.base import is_regressor

        return "mse" if is_regressor(self.model) else None
