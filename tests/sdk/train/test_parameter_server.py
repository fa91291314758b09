"""A parameter server on a real Ray: what it computes, what it survives, and how it ends."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferway import ConfigurationError, InsufficientResourcesError, TrainingDivergedError, TrainingError
from inferway.train import parameter_server
from inferway.train.checkpoints import Checkpoints, CheckpointWarning
from inferway.train.job import CheckpointOptions, EarlyStopping, OptimizerSpec, Progress, TrainingJob, TrainingResult
from inferway.train.optimizers import make_optimizer
from inferway.train.plan import Plan
from inferway.train.replica import replica_factory
from serving_parameters import Event, Fail, Held, Kill, Linear, Scripted, TwoPartError, linear_job
from training import alone, digits_job

pytestmark = [pytest.mark.ray, pytest.mark.torch, pytest.mark.slow, pytest.mark.xdist_group("ray")]
pytest.importorskip("ray")


@pytest.fixture(autouse=True)
def nobody_is_left(local_ray: None, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every process that a test's training started is gone after it, and its processors are free."""
    import ray
    from ray import cloudpickle

    import serving_parameters

    cloudpickle.register_pickle_by_value(serving_parameters)
    caplog.set_level(logging.INFO, "inferway.train.parameter_server")
    yield
    limit = time.monotonic() + 30
    left = [process for _, process in processes(caplog)]
    while left := [process for process in left if Path(f"/proc/{process}").exists()]:
        assert time.monotonic() < limit, f"still there: {left}"
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < limit, "processors are still taken"


def processes(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    """Names of actors, such as ``server 0``, and their processes, from the log."""
    found = []
    for record in caplog.records:
        words = record.getMessage().split()
        if words[2:4] == ["is", "process"]:
            found.append((" ".join(words[:2]), int(words[4])))
    return found


def scripted(
    job: TrainingJob, workers: int, *, before: Callable[[int, int], None] | None = None, **events: Any
) -> TrainingJob:
    """The job, with events by ``w0s5=``: before step 5 of worker 0, both from 0."""
    plan = Plan(job.rows, job.batch_size, workers, job.seed)
    named: dict[tuple[int, int], Event] = {}
    for name, event in events.items():
        worker, step = name[1:].split("s")
        named[int(worker), int(step)] = event
    return replace(job, replica=Scripted(job.replica, plan, named, before))


@pytest.fixture(scope="module")
def undisturbed(local_ray: None) -> TrainingResult:
    from ray import cloudpickle

    import serving_parameters

    cloudpickle.register_pickle_by_value(serving_parameters)
    return parameter_server.fit(scripted(linear_job(), 2), workers=2, servers=2)


def same(one: TrainingResult, other: TrainingResult) -> None:
    assert one.parameters.tobytes() == other.parameters.tobytes()
    assert {n: a.tobytes() for n, a in one.state.items()} == {n: a.tobytes() for n, a in other.state.items()}
    assert one.history == other.history
    assert one.steps == other.steps


# What it computes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("servers", "workers"), [(1, 2), (3, 3)])
def test_sync_is_what_one_process_computes(servers: int, workers: int) -> None:
    job = digits_job()
    result = parameter_server.fit(job, servers=servers, workers=workers)
    assert np.abs(result.parameters - alone(job)).max() < 1e-5
    assert result.epochs == 3
    assert result.steps == 21
    assert result.stopped == "finished"
    assert {name: len(values) for name, values in result.history.items()} == {
        "loss": 3,
        "val_loss": 3,
        "val_accuracy": 3,
    }
    assert result.history["loss"][2] < result.history["loss"][0]
    size = result.parameters.nbytes
    assert result.facts["bytes_pushed"] == workers * 21 * size
    assert result.facts["bytes_pushed_per_step"] == size
    assert result.facts["max_staleness"] == result.facts["restarts"] == 0


def test_a_last_batch_with_fewer_rows_than_workers_counts_by_its_rows() -> None:
    job = digits_job(rows=34, epochs=2)
    result = parameter_server.fit(job, workers=3)
    assert np.abs(result.parameters - alone(job)).max() < 1e-5


def test_the_same_seed_gives_the_same_to_the_bit_whatever_the_shards(undisturbed: TrainingResult) -> None:
    same(parameter_server.fit(linear_job(), workers=2, servers=3), undisturbed)
    other = parameter_server.fit(linear_job(seed=4), workers=2)
    assert other.parameters.tobytes() != undisturbed.parameters.tobytes()


def test_a_keras_model_with_dropout_and_running_means_is_what_its_workers_would_be_here() -> None:
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(16), layers.BatchNormalization(), layers.Dropout(0.2), layers.Dense(10)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    job = digits_job(replica=replica_factory(model, loss=loss, metrics=["accuracy"]), epochs=1)
    result = parameter_server.fit(job, workers=2)

    plan = Plan(job.rows, job.batch_size, 2, job.seed)
    replicas = [job.replica() for _ in range(2)]
    parameters, gradient, total = np.zeros((3, replicas[0].size), np.float32)
    replicas[0].read(parameters)
    optimizer = make_optimizer(job.optimizer, len(parameters))
    for step in range(plan.steps):
        total.fill(0)
        for worker, replica in enumerate(replicas):
            part = plan.part(0, step, worker)
            inputs = {"x": job.inputs["x"][part.rows]}
            replica.gradient(inputs, job.targets[part.rows], gradient, seed=plan.noise(0, step, worker))
            total += np.float32(part.weight) * gradient
        optimizer.step(parameters, total)
        for replica in replicas:
            replica.load(parameters)
    assert np.abs(result.parameters - parameters).max() < 1e-5
    for name, array in result.state.items():
        assert np.allclose(array, (replicas[0].state()[name] + replicas[1].state()[name]) / 2, atol=1e-5)
    assert {name.partition("/")[2] for name in result.state} == {"moving_mean", "moving_variance"}


def breast_cancer_job() -> TrainingJob:
    import torch
    from sklearn.datasets import load_breast_cancer

    torch.manual_seed(2)
    x, y = load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    train, held_out = order[:300], order[300:]
    model = torch.nn.Sequential(torch.nn.Linear(30, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    factory = replica_factory(model, loss="binary_crossentropy", metrics=["accuracy"])
    return TrainingJob(
        factory,
        OptimizerSpec("sgd", 0.05, momentum=0.5),
        {"x": x[train]},
        y[train],
        ({"x": x[held_out]}, y[held_out]),
        epochs=8,
        batch_size=16,
    )


def document_job() -> TrainingJob:
    """Dense(128) - Dense(64) - Dense(1) on 1,000 features, of which 20 say the class."""
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(3)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(5000, 1000)).astype(np.float32)
    y = (x[:, :20].sum(1) > 0).astype(np.float32)
    x[:, :20] *= 3
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((1000,)),
            layers.Dense(128, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    factory = replica_factory(model, loss="binary_crossentropy", metrics=["accuracy"])
    adam = OptimizerSpec("adam", 0.001)
    return TrainingJob(
        factory, adam, {"x": x[:2000]}, y[:2000], ({"x": x[2000:]}, y[2000:]), epochs=4, batch_size=32, seed=1
    )


def all_digits_job() -> TrainingJob:
    """A third of the digits is held out, and it trains until it no longer gets better."""
    job = digits_job(rows=1797, epochs=30, batch_size=32)
    inputs = {name: array[:1197] for name, array in job.inputs.items()}
    held_out = ({name: array[1197:] for name, array in job.inputs.items()}, job.targets[1197:])
    return replace(job, inputs=inputs, targets=job.targets[:1197], validation=held_out)


@pytest.mark.parametrize("mode", ["async", "ssp"])
@pytest.mark.parametrize(
    ("make", "seeds"),
    [(all_digits_job, 6), (breast_cancer_job, 3), (document_job, 2)],
    ids=["digits", "breast-cancer", "documents"],
)
def test_without_step_it_is_as_accurate_as_one_process(make: Callable[[], TrainingJob], seeds: int, mode: Any) -> None:
    """On average: who is faster than whom differs from run to run, and a few hundred rows tell no hundredth of it."""
    expected, found = [], []
    for seed in range(seeds):
        job = replace(make(), seed=seed)
        assert job.validation is not None
        one = job.replica()
        one.load(alone(job))
        expected.append(one.evaluate(*job.validation, batch_size=500)["accuracy"])
        result = parameter_server.fit(job, mode=mode, staleness=2, workers=2)
        found.append(result.history["val_accuracy"][-1])
        if mode == "ssp":
            assert result.facts["max_staleness"] <= 2
    assert min(expected) > 0.85
    assert np.mean(found) >= np.mean(expected) - 0.01


@pytest.mark.parametrize(("compression", "fraction", "share"), [("fp16", 1.0, 0.5), ("topk", 0.1, 0.2)])
def test_compression_sends_less_and_learns_the_same(compression: Any, fraction: float, share: float) -> None:
    job = linear_job(optimizer=OptimizerSpec("sgd", 0.05), epochs=6)
    result = parameter_server.fit(job, workers=2, compression=compression, fraction=fraction)
    assert result.facts["bytes_pushed_per_step"] == pytest.approx(share * result.parameters.nbytes)
    assert result.facts["bytes_pulled_per_step"] == result.parameters.nbytes
    whole = alone(job)
    assert np.any(result.parameters != whole)
    # The weights that are looked for have a length of about 6.
    assert np.linalg.norm(result.parameters - whole) < 0.3


# Who waits for whom --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "ahead", "overlap"),
    [
        ("sync", 0, False),
        ("ssp", 0, False),
        ("ssp", 2, False),
        ("ssp", 2, True),
        ("async", 7, False),
        ("async", 7, True),
    ],
    ids=lambda value: str(value),
)
def test_a_straggler_is_left_behind_as_far_as_the_mode_allows(
    mode: Any, ahead: int, overlap: bool, tmp_path: Path
) -> None:
    # Worker 1 does not take its first step before worker 0 has come to the last that it may come to.
    held = Held(tmp_path, worker=1, step=0, until=(0, ahead))
    job = linear_job(epochs=2, batch_size=32 if mode == "sync" else 16)
    plan = Plan(job.rows, 32, 2, job.seed)
    job = replace(job, replica=Scripted(Linear, plan, before=held))
    result = parameter_server.fit(job, mode=mode, staleness=ahead, overlap=overlap, workers=2)
    assert result.steps == 16
    assert (tmp_path / "came").read_text() == str(ahead)
    if mode != "async":
        assert result.facts["max_staleness"] <= ahead


# What it survives ----------------------------------------------------------------------------------------------------


def test_a_killed_worker_changes_nothing(undisturbed: TrainingResult, tmp_path: Path) -> None:
    job = scripted(linear_job(), 2, w1s11=Kill(tmp_path / "killed"))
    result = parameter_server.fit(job, workers=2, servers=2)
    assert (tmp_path / "killed").exists()
    assert result.facts["restarts"] == 1
    # The kill was in the second epoch of eight steps; what was before it was not taken again.
    assert result.facts["replayed_steps"] <= 4
    same(result, undisturbed)


def test_a_killed_server_changes_nothing(
    undisturbed: TrainingResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "process"

    class Tell(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("server 1 is process"):
                target.write_text(record.getMessage().split()[4])

    handler = Tell()
    logging.getLogger("inferway.train.parameter_server").addHandler(handler)
    try:
        kept = CheckpointOptions(str(tmp_path / "kept"), every_steps=3)
        job = scripted(linear_job(checkpoints=kept), 2, w0s13=Kill(tmp_path / "killed", target))
        result = parameter_server.fit(job, workers=2, servers=2)
    finally:
        logging.getLogger("inferway.train.parameter_server").removeHandler(handler)
    assert (tmp_path / "killed").exists()
    assert result.facts["restarts"] == 1
    assert result.facts["replayed_steps"] <= 3
    same(result, undisturbed)
    assert "starting all processes again from step 12" in caplog.text


def test_who_dies_at_every_attempt_ends_the_training(tmp_path: Path) -> None:
    job = scripted(linear_job(), 2, w1s2=Kill(tmp_path / "killed", always=True))
    with pytest.raises(TrainingError, match="died 2 times in a row after step 0"):
        parameter_server.fit(job, workers=2, restarts=1)


def test_a_training_goes_on_from_its_checkpoint_to_the_bit(undisturbed: TrainingResult, tmp_path: Path) -> None:
    kept = CheckpointOptions(str(tmp_path), every_steps=5)
    with pytest.raises(KeyError, match="power cut"):
        parameter_server.fit(scripted(linear_job(checkpoints=kept), 2, w0s13=Fail("power cut")), workers=2, servers=2)
    assert Checkpoints(tmp_path).steps() == [5, 10]
    # Where the servers are more now; the vector is the same.
    result = parameter_server.fit(linear_job(checkpoints=kept), workers=2, servers=3)
    assert result.facts["resumed_at_step"] == 10
    same(result, undisturbed)
    assert Checkpoints(tmp_path).steps() == [15, 20, 24]
    again = parameter_server.fit(linear_job(checkpoints=kept), workers=2)
    assert again.facts["resumed_at_step"] == 24
    same(again, undisturbed)
    anew = parameter_server.fit(linear_job(checkpoints=replace(kept, resume=False), epochs=1), workers=2)
    assert anew.steps == 8


def test_a_broken_checkpoint_is_passed_over(undisturbed: TrainingResult, tmp_path: Path) -> None:
    kept = CheckpointOptions(str(tmp_path))
    parameter_server.fit(linear_job(checkpoints=kept), workers=2)
    newest = tmp_path / "step-000000000024.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(CheckpointWarning, match="step 24 .* broken .* going on from step 16"):
        result = parameter_server.fit(linear_job(checkpoints=kept), workers=2)
    assert result.facts["resumed_at_step"] == 16
    same(result, undisturbed)


def test_checkpoints_of_another_training_are_refused(tmp_path: Path) -> None:
    kept = CheckpointOptions(str(tmp_path))
    parameter_server.fit(linear_job(checkpoints=kept, epochs=1), workers=1)
    with pytest.raises(ConfigurationError, match="optimizer is adam there and sgd here"):
        parameter_server.fit(linear_job(checkpoints=kept, optimizer=OptimizerSpec("sgd", 0.1)), workers=1)
    with pytest.raises(ConfigurationError, match="steps_per_epoch is 8 there and 4 here"):
        parameter_server.fit(linear_job(checkpoints=kept, batch_size=64), workers=1)
    job = linear_job(checkpoints=kept)
    other = digits_job(rows=230).replica
    with pytest.raises(ConfigurationError, match="of a model with 40 trainable numbers, and this one has 1810"):
        parameter_server.fit(replace(job, replica=other), workers=1)


# How it ends ---------------------------------------------------------------------------------------------------------


def test_it_stops_early_and_takes_the_best_back() -> None:
    # So high a rate that it is best after the first epoch.
    job = linear_job(optimizer=OptimizerSpec("sgd", 0.028), epochs=10, early_stopping=EarlyStopping(patience=2))
    full = parameter_server.fit(replace(job, epochs=1), workers=2)
    noisy = replace(job, early_stopping=EarlyStopping(patience=2, min_delta=1e9))
    result = parameter_server.fit(noisy, workers=2)
    assert result.stopped == "early"
    assert result.epochs == 3
    assert len(result.history["loss"]) == 3
    assert result.parameters.tobytes() == full.parameters.tobytes()


def test_progress_is_told_at_the_end_of_every_epoch(undisturbed: TrainingResult) -> None:
    told: list[Progress] = []
    parameter_server.fit(linear_job(on_progress=told.append), workers=2, servers=2)
    ends = [progress for progress in told if progress.metrics]
    assert [(p.epoch, p.epochs, p.step, p.steps_per_epoch, p.workers) for p in ends] == [
        (epoch, 3, 8, 8, 2) for epoch in (1, 2, 3)
    ]
    assert [p.metrics["val_loss"] for p in ends] == undisturbed.history["val_loss"]
    assert [p.loss for p in ends] == undisturbed.history["loss"]


def test_a_loss_that_is_no_number_stops_it_and_names_step_and_worker() -> None:
    job = linear_job(optimizer=OptimizerSpec("sgd", 0.01), shuffle=False)
    targets = job.targets.copy()
    # Of the rows 32 to 63, the second step's, the second half is worker 1's.
    targets[60] = np.nan
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 2 in worker 1") as caught:
        parameter_server.fit(replace(job, targets=targets), workers=2)
    assert (caught.value.step, caught.value.worker) == (2, 1)
    assert np.isnan(caught.value.loss)


def test_an_error_of_the_users_code_comes_back_as_itself() -> None:
    job = scripted(linear_job(), 2, w1s2=Fail("no such column"))
    with pytest.raises(KeyError, match="no such column") as caught:
        parameter_server.fit(job, workers=2)
    note = "".join(caught.value.__notes__)
    assert "raised in a worker at step 3" in note
    assert "serving_parameters.py" in note


def test_an_error_that_cannot_travel_comes_back_as_its_text() -> None:
    def replica() -> Any:
        raise TwoPartError("no such", "column")

    with pytest.raises(TrainingError, match=r"raised in a worker at step 1:(.|\n)*TwoPartError: no such"):
        parameter_server.fit(linear_job(replica=replica), workers=1)


def test_an_error_while_the_model_is_made_comes_back_as_itself() -> None:
    with pytest.raises(ZeroDivisionError):
        parameter_server.fit(linear_job(replica=lambda: 1 // 0), workers=2)


def test_a_model_that_the_workers_cannot_import_says_so() -> None:
    with pytest.raises(TrainingError, match=r"No module named .* installed on all machines"):
        parameter_server.fit(linear_job(replica=_of_this_module), workers=1)


def _of_this_module() -> Any:
    """Goes to another process by the name of this module, which is not to be found there."""
    return Linear()


def test_an_interrupt_leaves_no_process_behind(caplog: pytest.LogCaptureFixture) -> None:
    def interrupt(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        parameter_server.fit(linear_job(on_progress=interrupt), workers=2)
    # That they end is what the fixture waits for.
    assert {name for name, _ in processes(caplog)} == {"server 0", "worker 0", "worker 1"}


def test_resources_that_never_come_are_an_error() -> None:
    with pytest.raises(InsufficientResourcesError, match="401 CPU in 3 parts of up to 200 CPU") as caught:
        parameter_server.fit(linear_job(), workers=2, cpus_per_worker=200, resources_timeout_s=0.5)
    assert caught.value.wanted == {"CPU": 401.0}
    assert caught.value.available == {"CPU": 8.0}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"mode": "bsp"}, "there is no mode 'bsp'"),
        ({"workers": 0}, "workers has to be at least 1, not 0"),
        ({"servers": 0}, "servers has to be at least 1"),
        ({"mode": "ssp", "staleness": -1}, "staleness has to be at least 0"),
        ({"compression": "zip"}, "there is no compression 'zip'"),
        ({"compression": "topk", "fraction": 0.0}, "fraction"),
        ({"overlap": True}, "overlap needs mode='async'"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_said_before_anything_starts(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        parameter_server.fit(linear_job(), **given)


def test_a_job_that_makes_no_sense_is_refused() -> None:
    job = linear_job()
    with pytest.raises(ConfigurationError, match="the input 'x' has 230 rows, and there are 5 targets"):
        parameter_server.fit(replace(job, targets=job.targets[:5]))
    with pytest.raises(ConfigurationError, match="watches 'val_loss', and there is no validation data"):
        parameter_server.fit(replace(job, validation=None, early_stopping=EarlyStopping()))
    with pytest.raises(ConfigurationError, match="watches 'accuracy', and there are only loss, val_loss"):
        parameter_server.fit(replace(job, early_stopping=EarlyStopping("accuracy")))
    with pytest.raises(ConfigurationError, match="learning rate"):
        parameter_server.fit(replace(job, optimizer=OptimizerSpec("sgd", -1.0)))
