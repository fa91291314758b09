"""What skl2onnx has to learn of XGBoost and LightGBM, so that their estimators can stand in pipelines, too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from .._errors import MissingExtraError


def top_of(model: Any) -> str:
    """The top module of a type's own class, or of the nearest ancestor that is no user's."""
    tops = [ancestor.__module__.partition(".")[0] for ancestor in type(model).__mro__]
    return next((top for top in tops if top in ("xgboost", "lightgbm", "catboost")), tops[0])


def learn_boosters(parts: Sequence[Any]) -> None:
    """Register the converters of those boosters that are among a model's parts.

    Raises:
        MissingExtraError: onnxmltools is not installed.
    """
    wanted = {top_of(part) for part in parts} & {"xgboost", "lightgbm"}
    if not wanted:
        return
    from skl2onnx import update_registered_converter
    from skl2onnx.common.shape_calculator import (
        calculate_linear_classifier_output_shapes,
        calculate_linear_regressor_output_shapes,
    )

    try:
        import onnxmltools  # noqa: F401 - its converters are imported below
    except ImportError as error:
        raise MissingExtraError("onnxmltools", "export", "exporting a booster") from error
    classifier = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
    if "xgboost" in wanted:
        import xgboost
        from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost

        for kind in (xgboost.XGBClassifier, xgboost.XGBRFClassifier):
            update_registered_converter(
                kind, f"XGBoost{kind.__name__}", calculate_linear_classifier_output_shapes, convert_xgboost,
                options=classifier, overwrite=True,
            )  # fmt: skip
        for kind in (xgboost.XGBRegressor, xgboost.XGBRFRegressor, xgboost.XGBRanker):
            update_registered_converter(
                kind, f"XGBoost{kind.__name__}", calculate_linear_regressor_output_shapes, convert_xgboost,
                overwrite=True,
            )  # fmt: skip
    if "lightgbm" in wanted:
        import lightgbm
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm

        update_registered_converter(
            lightgbm.LGBMClassifier, "LightGbmLGBMClassifier", calculate_linear_classifier_output_shapes,
            convert_lightgbm, options=classifier, overwrite=True,
        )  # fmt: skip
        for kind in (lightgbm.LGBMRegressor, lightgbm.LGBMRanker):
            update_registered_converter(
                kind, f"LightGbm{kind.__name__}", calculate_linear_regressor_output_shapes, convert_lightgbm,
                options={"split": None}, overwrite=True,
            )  # fmt: skip


@contextlib.contextmanager
def unnamed_features(parts: Sequence[Any]) -> Iterator[None]:
    """XGBoost models without the names of their features, which the converter takes only in the form ``f0``, ``f1``."""
    boosters = [part.get_booster() for part in parts if top_of(part) == "xgboost" and hasattr(part, "get_booster")]
    names = [(booster, booster.feature_names, booster.feature_types) for booster in boosters]
    try:
        for booster in boosters:
            booster.feature_names = None
        yield
    finally:
        for booster, given, types in names:
            booster.feature_names = given
            booster.feature_types = types
