"""Workers that sum their gradients: the same as one process, whatever happens to them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inferway import ConfigurationError, InsufficientResourcesError, TrainingDivergedError, TrainingError
from inferway.train import ddp
from inferway.train.checkpoints import Checkpoints
from inferway.train.job import CheckpointOptions, EarlyStopping, Progress, TrainingResult
from inferway.train.replica import replica_factory
from training import Eventful, alone, digits_job

pytestmark = [pytest.mark.ray, pytest.mark.torch, pytest.mark.slow, pytest.mark.xdist_group("ray")]
pytest.importorskip("ray")


@pytest.fixture(autouse=True)
def nothing_is_left(local_ray: None) -> Iterator[None]:
    """Every processor is free again after a test, and nothing was written to the home folder."""
    import ray

    results = Path.home() / "ray_results"
    before = results.exists()
    yield
    limit = time.monotonic() + 30
    while (free := ray.available_resources().get("CPU", 0)) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < limit, f"only {free} processors are free again"
    assert results.exists() == before


@pytest.fixture(scope="module")
def undisturbed(local_ray: None) -> TrainingResult:
    return ddp.fit(digits_job(), workers=2)


def test_two_workers_train_what_one_process_trains(undisturbed: TrainingResult) -> None:
    job = digits_job()
    assert np.abs(undisturbed.parameters - alone(job)).max() < 1e-5
    assert undisturbed.epochs == 3
    assert undisturbed.steps == 21
    assert undisturbed.stopped == "finished"
    assert set(undisturbed.history) == {"loss", "val_loss", "val_accuracy"}
    assert all(len(values) == 3 for values in undisturbed.history.values())
    assert undisturbed.history["loss"][2] < undisturbed.history["loss"][0]
    assert undisturbed.facts["restarts"] == 0
    assert undisturbed.facts["bytes_per_step"] == (len(undisturbed.parameters) + 2) * 4


def test_a_last_batch_with_fewer_rows_than_workers_counts_by_its_rows() -> None:
    job = digits_job(rows=34, epochs=2)
    told: list[Progress] = []
    result = ddp.fit(replace(job, on_progress=told.append), workers=3)
    assert np.abs(result.parameters - alone(job)).max() < 1e-5
    ends = [progress for progress in told if progress.metrics]
    assert [(p.epoch, p.epochs, p.step, p.steps_per_epoch, p.workers) for p in ends] == [
        (1, 2, 2, 2, 3),
        (2, 2, 2, 2, 3),
    ]
    assert [p.metrics["val_accuracy"] for p in ends] == result.history["val_accuracy"]


def test_a_keras_model_trains_as_in_one_process() -> None:
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    job = digits_job(replica=replica_factory(model, loss=loss, metrics=["accuracy"]), epochs=2)
    result = ddp.fit(job, workers=2)
    assert np.abs(result.parameters - alone(job)).max() < 1e-5
    assert len(result.history["val_accuracy"]) == 2


@pytest.mark.parametrize("every_steps", [None, 4], ids=["in memory", "kept every 4 steps"])
def test_a_killed_worker_changes_nothing(undisturbed: TrainingResult, every_steps: int | None, tmp_path: Path) -> None:
    job = digits_job()
    job = replace(job, replica=Eventful(job.replica, "die", 10, tmp_path / "mark"))
    if every_steps is not None:
        job = replace(job, checkpoints=CheckpointOptions(str(tmp_path / "kept"), every_steps))
    result = ddp.fit(job, workers=2)
    assert (tmp_path / "mark").exists(), "nobody was killed"
    assert result.facts["restarts"] == 1
    assert result.parameters.tobytes() == undisturbed.parameters.tobytes()
    assert result.history == undisturbed.history


def test_a_worker_that_always_dies_ends_the_training(tmp_path: Path) -> None:
    job = digits_job(epochs=1)
    job = replace(job, replica=Eventful(job.replica, "die", 2, tmp_path / "mark"))
    with pytest.raises(TrainingError, match="ended without a result"):
        ddp.fit(job, workers=2, restarts=0)


def test_a_training_goes_on_from_its_checkpoints(undisturbed: TrainingResult, tmp_path: Path) -> None:
    kept = CheckpointOptions(str(tmp_path))
    first = ddp.fit(digits_job(epochs=2, checkpoints=kept), workers=2)
    assert first.steps == 14
    second = ddp.fit(digits_job(checkpoints=kept), workers=2)
    assert second.parameters.tobytes() == undisturbed.parameters.tobytes()
    assert second.history == undisturbed.history


def test_checkpoints_of_another_model_are_not_gone_on_from(tmp_path: Path) -> None:
    kind = {"strategy": "ddp", "optimizer": "adam", "steps_per_epoch": 7}
    Checkpoints(tmp_path).save(7, {"parameters": np.zeros(650, np.float32)}, kind)
    with pytest.raises(ConfigurationError, match=r"another training: size is 650 there and 1810 here"):
        ddp.fit(digits_job(checkpoints=CheckpointOptions(str(tmp_path))), workers=1)


@pytest.mark.parametrize("event", ["nan", "nan_gradient"])
def test_a_loss_that_is_no_number_stops_it_and_names_step_and_worker(event: str, tmp_path: Path) -> None:
    job = digits_job()
    job = replace(job, replica=Eventful(job.replica, event, 9, tmp_path / "mark"))
    with pytest.raises(TrainingDivergedError, match=r"at step 9 in worker [01]") as caught:
        ddp.fit(job, workers=2)
    assert caught.value.step == 9
    assert caught.value.worker in (0, 1)
    assert np.isnan(caught.value.loss) == (event == "nan")


def test_an_error_of_the_model_is_not_tried_again(tmp_path: Path) -> None:
    job = digits_job()
    job = replace(job, replica=Eventful(job.replica, "fail", 3, tmp_path / "mark"))
    with pytest.raises(ValueError, match="this row is of another kind") as caught:
        ddp.fit(job, workers=2)
    assert "raised in worker" in caught.value.__notes__[0]


def test_resources_that_never_come_are_an_error() -> None:
    with pytest.raises(InsufficientResourcesError, match="400 CPU") as caught:
        ddp.fit(digits_job(), workers=2, cpus_per_worker=200.0, resources_timeout_s=0.5)
    assert caught.value.wanted == {"CPU": 400.0}
    with pytest.raises(ConfigurationError, match="at least 1 worker"):
        ddp.fit(digits_job(), workers=0)


def test_early_stopping_takes_the_best_epoch_back(undisturbed: TrainingResult) -> None:
    stopping = EarlyStopping(metric="val_loss", patience=1, min_delta=10.0)
    result = ddp.fit(digits_job(early_stopping=stopping), workers=2)
    assert result.stopped == "early"
    assert result.epochs == 2
    assert np.abs(result.parameters - alone(digits_job(epochs=1))).max() < 1e-5
    assert result.history["val_loss"] == undisturbed.history["val_loss"][:2]


def test_early_stopping_says_which_metrics_there_are() -> None:
    patience = ddp._Patience(EarlyStopping("val_f1"))
    with pytest.raises(ConfigurationError, match=r"early stopping waits for 'val_f1'.*loss, val_loss"):
        patience.better({"loss": 1.0, "val_loss": 2.0})


def test_running_means_are_the_mean_over_workers() -> None:
    import torch

    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(64, 12), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 10))
    factory = replica_factory(model, loss="sparse_categorical_crossentropy")
    job = digits_job(replica=factory, rows=64, batch_size=64, epochs=1, shuffle=False)
    result = ddp.fit(job, workers=2)
    halves = []
    for rows in (slice(0, 32), slice(32, 64)):
        replica = factory()
        gradient = np.empty(replica.size, np.float32)
        replica.gradient({"x": job.inputs["x"][rows]}, job.targets[rows], gradient, seed=0)
        halves.append(replica.state())
    for name, value in result.state.items():
        np.testing.assert_allclose(value, (halves[0][name] + halves[1][name]) / 2, rtol=1e-6)
    assert {str(value.dtype) for value in result.state.values()} == {"float32", "int64"}


def test_the_interface_of_an_address_is_found() -> None:
    assert ddp._interface_of("127.0.0.1") == "lo"
    assert ddp._interface_of("203.0.113.77") is None
