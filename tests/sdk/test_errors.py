"""The error tree: what it covers, what it says, and what it never says."""

from __future__ import annotations

import pickle
import re

import pytest

import inferway
from inferway import _errors
from inferway._errors import status_error_class
from inferway_contract import codes

PUBLIC = [
    value
    for name, value in vars(_errors).items()
    if isinstance(value, type) and issubclass(value, inferway.InferwayError)
]
BUILT_IN = {"ImportError", "RuntimeError", "TimeoutError", "TypeError", "ValueError"}


def test_every_error_is_public_and_drawn_in_the_tree() -> None:
    drawn = set(re.findall(r"\b[A-Z]\w+Error\b", _errors.__doc__ or ""))
    for error in PUBLIC:
        assert error.__name__ in inferway.__all__
        assert error.__name__ in drawn
    assert {name for name in drawn if name not in BUILT_IN} == {error.__name__ for error in PUBLIC}


def test_every_code_of_the_contract_has_a_class_that_fits_its_status() -> None:
    for code, kind in codes.ERRORS.items():
        by_code = status_error_class(kind.status, code)
        by_status = status_error_class(kind.status, None)
        assert issubclass(by_code, by_status) or code == "deadline_exceeded"


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [
        (400, "made_up", inferway.BadRequestError),
        (400, "invalid_tensor", inferway.InvalidTensorError),
        (401, None, inferway.AuthenticationError),
        (403, None, inferway.PermissionDeniedError),
        (404, None, inferway.NotFoundError),
        (404, "model_not_found", inferway.ModelNotFoundError),
        (400, "golden_mismatch", inferway.GoldenMismatchError),
        (403, "quota_exceeded", inferway.QuotaExceededError),
        (404, "blob_not_found", inferway.BlobNotFoundError),
        (409, None, inferway.ConflictError),
        (409, "upload_conflict", inferway.UploadConflictError),
        (413, None, inferway.PayloadTooLargeError),
        (418, None, inferway.APIStatusError),
        (429, None, inferway.RateLimitError),
        (500, None, inferway.InternalServerError),
        (502, None, inferway.InternalServerError),
        (503, None, inferway.ServiceUnavailableError),
        (503, "queue_full", inferway.QueueFullError),
        (504, None, inferway.InternalServerError),
        (504, "deadline_exceeded", inferway.DeadlineExceededError),
        (507, None, inferway.InsufficientStorageError),
        (507, "memory_exceeded", inferway.MemoryExceededError),
        (599, "made_up", inferway.InternalServerError),
    ],
)
def test_an_answer_finds_its_class_by_code_then_by_status(status: int, code: str | None, wanted: type) -> None:
    assert status_error_class(status, code) is wanted


def test_one_class_catches_a_mistake_wherever_it_was_found() -> None:
    assert issubclass(inferway.InvalidTensorError, inferway.InvalidInputError)
    assert issubclass(inferway.InvalidInputError, ValueError)
    assert issubclass(inferway.DeadlineExceededError, inferway.APITimeoutError)
    assert issubclass(inferway.APITimeoutError, TimeoutError)


def test_str_is_short_and_repr_has_every_fact() -> None:
    error = inferway.QueueFullError(
        "the queue is full",
        status_code=503,
        code="queue_full",
        request_id="r1",
        attempts=3,
        retryable=True,
        retry_after=2.0,
        elapsed=1.5,
    )
    assert str(error) == "the queue is full (503 queue_full, 3 attempts, request r1)"
    assert repr(error) == (
        "QueueFullError('the queue is full', status_code=503, code='queue_full', request_id='r1', attempts=3, "
        "retryable=True, retry_after=2.0, elapsed=1.5)"
    )
    assert str(inferway.APIConnectionError("gone")) == "gone"


@pytest.mark.parametrize(
    "error",
    [
        inferway.InvalidInputError("bad", tensor="x"),
        inferway.APITimeoutError("late", sent=False, attempts=2),
        inferway.APIResponseValidationError("odd", body="<html>", status_code=200),
        inferway.InvalidTensorError("bad", status_code=400, code="invalid_tensor", body={"a": 1}),
        inferway.DeadlineExceededError("late", status_code=504, headers={"a": "b"}),
        inferway.DeploymentFailedError("deployment d1 of churn", "admitted", "model_rejected", "no such opset"),
        inferway.MissingExtraError("torch", "train", "exporting a PyTorch model"),
        inferway.ExportMismatchError("no", output="y", max_difference=0.2, tolerance=1e-5, shapes={"x": (3, 7)}),
        inferway.TrainingDivergedError("no", step=3, worker=1, loss=float("inf")),
        inferway.InsufficientResourcesError("no", wanted={"CPU": 64.0}, available={"CPU": 2.0}),
    ],
)
def test_an_error_survives_a_trip_to_another_process(error: inferway.InferwayError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize(
    ("body", "received"),
    [({"received": 5}, 5), ({"received": -1}, None), ({"received": True}, None), ({}, None), ("text", None)],
)
def test_a_conflict_of_uploads_says_where_the_gateways_part_ends(body: object, received: int | None) -> None:
    assert inferway.UploadConflictError("no", status_code=409, body=body).received == received


def test_a_missing_extra_is_an_import_error_that_says_how_to_install_it() -> None:
    error = inferway.MissingExtraError("torch", "train", "exporting a PyTorch model")
    assert isinstance(error, ImportError)
    assert str(error) == (
        "exporting a PyTorch model needs torch, which is not installed: pip install 'inferway[train]'"
    )


def test_a_failed_deployment_says_which_where_and_why() -> None:
    error = inferway.DeploymentFailedError("deployment d1 of churn", "admitted", "model_rejected", "no such opset")
    assert str(error) == "deployment d1 of churn failed at the step 'admitted': no such opset (model_rejected)"
    before = inferway.DeploymentFailedError("deployment d1 of churn", None, "cancelled", "it was cancelled")
    assert str(before) == "deployment d1 of churn was cancelled"
