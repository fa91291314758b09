"""A model in workers: the same answers as in this process, and whatever the model does stays there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import models
from inferway_gateway.backends.onnx import OnnxBackend
from inferway_gateway.backends.worker import SessionLimits, WorkerLimits
from inferway_gateway.backends.worker.child import CRASH_VALUE
from inferway_gateway.core.backend import Artifact, IsolatedSession, RunHandle
from inferway_gateway.core.batcher import Answer
from inferway_gateway.core.errors import (
    DeadlineExceededError,
    GatewayError,
    ModelExecutionError,
    ModelFailingError,
    ModelLoadError,
    WorkerCrashedError,
)
from inferway_gateway.core.model_config import Warmup, WarmupInput

from .conftest import (
    LIMIT_S,
    Workers,
    alive,
    own_resident,
    plain_config,
    process_of,
    rows,
    running_workers,
    served,
    until,
)

FULL = bool(os.environ.get("INFERWAY_TEST_FULL"))
"""The bars at their full size, which takes minutes."""
MIB = 1 << 20


def stuck_matmul() -> bytes:
    """y = the sum of a product of matrices as large as the caller says: one node, which cannot be stopped."""
    f32, i64 = models.F32, models.I64
    return models.model(
        [
            models.node("ConstantOfShape", ["shape"], ["ones"]),
            models.node("MatMul", ["ones", "ones"], ["product"]),
            models.node("ReduceSum", ["product"], ["y"], keepdims=0),
        ],
        [models.value("shape", i64, [2])],
        [models.value("y", f32, [])],
    )


def load_bomb(side: int) -> bytes:
    """A small file whose constants are folded into a matrix of ``side`` squared while it is loaded."""
    return models.model(
        [
            models.node("ConstantOfShape", ["shape"], ["ones"]),
            models.node("MatMul", ["ones", "ones"], ["product"]),
            models.node("ReduceSum", ["product"], ["total"], keepdims=0),
            models.node("Add", ["x", "total"], ["y"]),
        ],
        [models.value("x", models.F32, ["batch", 4])],
        [models.value("y", models.F32, ["batch", 4])],
        {"shape": np.array([side, side], np.int64)},
    )


# ---- the same answers


def test_it_is_an_isolated_session_with_the_signature_that_the_model_has_in_this_process(
    workers: Workers, tmp_path: Path
) -> None:
    session = workers.open(models.matmul())
    assert isinstance(session, IsolatedSession)
    file = tmp_path / "model.onnx"
    file.write_bytes(models.matmul())
    here = OnnxBackend(cpus=2).open(Artifact("m", 1, file, plain_config()))
    assert session.signature == here.signature
    assert session.profile.row_exactness == here.profile.row_exactness
    assert session.profile.inline_max_elements == 0
    here.close()


@pytest.mark.parametrize("dims", [(0, 3), (1, 1), (5, 7)], ids=str)
def test_every_datatype_goes_there_and_back(workers: Workers, dims: tuple[int, ...]) -> None:
    session = workers.open(models.identity_all())
    generator = np.random.default_rng(1)
    inputs = {}
    for spec in session.signature.inputs:
        name = spec.datatype
        if name == "BYTES":
            words = np.array(["", "é", "x" * 300, "a\0b"], object)
            inputs[spec.name] = words[generator.integers(0, 4, dims)].reshape(dims)
        elif name == "BOOL":
            inputs[spec.name] = generator.integers(0, 2, dims).astype(bool)
        elif name.startswith("FP"):
            inputs[spec.name] = generator.standard_normal(dims).astype(f"f{int(name[2:]) // 8}")
        else:
            inputs[spec.name] = generator.integers(0, 100, dims).astype(name.lower())
    names = session.signature.output_names
    for name, array in zip(names, session.run(inputs, names), strict=True):
        given = inputs[name.removesuffix("_out")]
        assert array.dtype == given.dtype
        assert array.shape == given.shape
        assert array.tolist() == given.tolist()
        assert not np.shares_memory(array, inputs[name.removesuffix("_out")])


def test_an_answer_does_not_change_with_the_next_run(workers: Workers) -> None:
    session = workers.open(models.add_one())
    first = session.run({"x": rows(2, 1)}, ["y"])[0]
    session.run({"x": rows(2, 2)}, ["y"])
    assert np.array_equal(first, rows(2, 1) + 1)


def test_tensors_larger_than_the_shared_memory_are_given_more(workers: Workers) -> None:
    session = workers.open(models.add_one(size=1 << 18))
    for count in (1, 16, 2):
        x = rows(count, count, 1 << 18)
        assert np.array_equal(session.run({"x": x}, ["y"])[0], x + 1)


def test_outputs_beyond_the_bound_are_refused_and_the_worker_goes_on(tmp_path: Path) -> None:
    limits = WorkerLimits(session=SessionLimits(answer_limit_bytes=MIB))
    with running_workers(tmp_path, limits) as workers:
        session = workers.open(models.fill())
        with pytest.raises(ModelExecutionError, match="4194304 bytes, a run may give 1048576"):
            session.run({"shape": np.array([MIB], np.int64)}, ["y"])
        assert session.run({"shape": np.array([3], np.int64)}, ["y"])[0].tolist() == [0, 0, 0]
        assert session.stats.crashes == 0


def test_external_data_is_read_below_the_version_and_warm_up_files_where_they_are(
    workers: Workers, tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "version", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    proto, weights = models.external_data()
    (folder / "model.onnx").write_bytes(proto)
    (folder / "model.onnx.data").write_bytes(weights)
    data = elsewhere / "row"
    data.write_bytes(rows(1, size=64).tobytes())
    warmup = Warmup("w", 1, 1, (WarmupInput("x", "FP32", (64,), "file", str(data)),))
    session = workers.backend.open(Artifact("m", 1, folder / "model.onnx", plain_config(warmup=(warmup,))))
    x = rows(3, size=64)
    assert np.array_equal(session.run({"x": x}, ["y"])[0], x)
    os.kill(process_of(session).pid, signal.SIGKILL)
    until(lambda: session.stats.restarts == 1 and session.capacity > 0)
    assert np.array_equal(session.run({"x": x}, ["y"])[0], x)
    session.close()


def test_what_the_model_refuses_is_told_as_in_this_process(workers: Workers) -> None:
    session = workers.open(models.fails_on_negative())
    with pytest.raises(ModelExecutionError, match="model 'm' failed"):
        session.run({"x": -np.ones((1, 4), np.float32)}, session.signature.output_names)


@pytest.mark.parametrize(
    "content", [b"", b"no model at all", models.corrupt()["truncated"]], ids=["empty", "text", "cut"]
)
def test_what_is_no_model_is_refused_by_name(workers: Workers, content: bytes) -> None:
    with pytest.raises(ModelLoadError, match=r"^failed to load 'broken' version 1: ."):
        workers.open(content, name="broken")


def test_the_footprint_is_measured_and_the_memory_bounded(workers: Workers) -> None:
    session = workers.open(models.matmul(1024, 1024))
    footprint = session.footprint()
    assert footprint is not None
    assert 4 * MIB < footprint.resident_bytes < 400 * MIB
    assert footprint.peak_bytes >= footprint.resident_bytes
    limits = Path(f"/proc/{process_of(session).pid}/limits").read_text()
    bound = int(next(line for line in limits.splitlines() if line.startswith("Max address space")).split()[3])
    assert footprint.peak_bytes * 2 + 512 * MIB <= bound < footprint.peak_bytes * 4 + 4096 * MIB


def test_the_footprint_holds_the_largest_declared_batch(workers: Workers) -> None:
    """A hidden layer of 64 KiB a row: 1,024 rows take 64 MiB, which one row does not."""
    graph = models.model(
        [models.node("MatMul", ["x", "wide"], ["h"]), models.node("MatMul", ["h", "narrow"], ["y"])],
        [models.value("x", models.F32, ["batch", 1])],
        [models.value("y", models.F32, ["batch", 1])],
        {"wide": np.ones((1, 16384), np.float32), "narrow": np.ones((16384, 1), np.float32)},
    )
    small = workers.open(graph, config=plain_config(max_batch_size=1)).footprint()
    large = workers.open(graph, config=plain_config(max_batch_size=1024)).footprint()
    assert small is not None
    assert large is not None
    assert large.peak_bytes - small.peak_bytes > 50 * MIB


def test_the_footprint_is_of_all_instances(workers: Workers) -> None:
    graph = models.matmul(1024, 1024)
    one = workers.open(graph).footprint()
    both = workers.open(graph, config=plain_config(instances=2)).footprint()
    assert one is not None
    assert both is not None
    assert both.peak_bytes > one.peak_bytes + 4 * MIB  # the weights once more
    assert both.resident_bytes < 2.5 * one.resident_bytes


def test_every_layer_of_the_sandbox_holds_in_the_worker(workers: Workers) -> None:
    session = workers.open(models.add_one())
    from inferway_gateway.backends.worker.sandbox import capabilities

    expected = not capabilities().missing
    assert all(session.stats.layers.values()) is expected
    status = Path(f"/proc/{process_of(session).pid}/status").read_text()
    assert ("Seccomp:\t2" in status) is capabilities().seccomp
    assert "CapEff:\t0000000000000000" in status


def test_nothing_of_the_gateways_environment_is_in_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERWAY_KEY_PEPPER", "canary-7f3b")
    with running_workers(tmp_path) as workers:
        session = workers.open(models.add_one())
        parent = int(Path(f"/proc/{process_of(session).pid}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in (process_of(session).pid, parent):
            with contextlib.suppress(PermissionError):  # what is locked in shows it to the privileged only
                assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert Path(f"/proc/{process_of(session).pid}/cmdline").read_bytes().startswith(b"inferway worker m/1")
        assert Path(f"/proc/{process_of(session).pid}/comm").read_text() == "iw-m/1\n"


# ---- crashes


def test_a_killed_worker_is_back_within_a_moment_and_measures_nothing_again(workers: Workers) -> None:
    session = workers.open(models.matmul())
    x = rows(2, size=64)
    wanted = session.run({"x": x}, ["y"])[0]
    profile = session.profile
    os.kill(process_of(session).pid, signal.SIGKILL)
    until(lambda: session.stats.restarts == 1 and session.capacity == session.lanes)
    assert np.array_equal(session.run({"x": x}, ["y"])[0], wanted)
    assert session.profile is profile
    assert workers.kinds("worker_crashed") == ["SIGKILL"]


def test_a_run_whose_worker_dies_is_told_so(workers: Workers) -> None:
    session = workers.open(models.add_one())
    with pytest.raises(WorkerCrashedError):
        session.run({"x": np.full((1, 16), CRASH_VALUE, np.float32)}, ["y"])
    until(lambda: workers.kinds("worker_crashed") == ["SIGSEGV"])


def test_the_fork_server_is_started_again_with_its_workers(tmp_path: Path) -> None:
    with running_workers(tmp_path) as workers:
        session = workers.open(models.add_one())
        pid = process_of(session).pid
        server = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(server, signal.SIGKILL)
        until(lambda: not alive(pid))
        until(lambda: session.capacity > 0 and process_of(session).pid != pid)
        assert np.array_equal(session.run({"x": rows(1)}, ["y"])[0], rows(1) + 1)


_GATEWAY = """
import sys, threading
from pathlib import Path
from inferway_gateway.backends.worker import WorkerBackend
from inferway_gateway.core.backend import Artifact
with WorkerBackend() as backend:
    session = backend.open(Artifact("m", 1, Path(sys.argv[1])))
    print(session._places[0].process.pid, flush=True)
    threading.Event().wait()
"""


def test_a_gateway_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(models.add_one())
    gateway = subprocess.Popen([sys.executable, "-c", _GATEWAY, str(file)], stdout=subprocess.PIPE, text=True)
    assert gateway.stdout is not None
    worker = int(gateway.stdout.readline())
    server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    gateway.kill()
    gateway.wait()
    gateway.stdout.close()
    until(lambda: not alive(worker) and not alive(server))


def test_neither_descriptors_nor_shared_memory_are_left_by_respawns(workers: Workers) -> None:
    session = workers.open(models.add_one())

    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return sum(1 for _ in Path("/proc/self/fd").iterdir()), maps.count("inferway-arena")

    def again() -> None:
        before = process_of(session).pid
        session.run({"x": rows(1)}, ["y"])
        os.kill(before, signal.SIGKILL)
        until(lambda: session.capacity > 0 and process_of(session).pid != before)
        session._respawns.clear()  # the bound on starts a minute has a test of its own
        session.run({"x": rows(1)}, ["y"])

    for _ in range(3):
        again()
    until(lambda: threading.active_count() < 20)
    before = held()
    for _ in range(200 if FULL else 20):
        again()
    until(lambda: held() <= (before[0] + 1, before[1] + 2))


def test_starting_again_is_bounded_per_minute_and_callers_are_told(tmp_path: Path) -> None:
    with running_workers(tmp_path, WorkerLimits(session=SessionLimits(respawns_per_minute=3))) as workers:
        session = workers.open(models.add_one())
        for count in range(3):
            pid = process_of(session).pid
            os.kill(pid, signal.SIGKILL)
            until(partial(lambda after: session.stats.restarts == after and session.capacity > 0, count + 1))
            session.run({"x": rows(1)}, ["y"])
        os.kill(process_of(session).pid, signal.SIGKILL)
        until(lambda: session.refusal() is not None)
        with pytest.raises(ModelFailingError, match="started too often") as refused:
            session.run({"x": rows(1)}, ["y"])
        assert 0 < (refused.value.retry_after_s or 0) <= 60


# ---- R7: a model that does not end


def test_a_run_that_can_be_stopped_is_stopped_without_ending_the_process(workers: Workers) -> None:
    session = workers.open(models.endless())
    handle = RunHandle()
    timer = threading.Timer(0.1, handle.terminate)
    timer.start()
    with pytest.raises(DeadlineExceededError):
        session.run({"x": rows(1, size=64)}, session.signature.output_names, handle)
    assert session.stats.kills == session.stats.crashes == 0


async def test_a_stuck_kernel_is_killed_250_ms_after_its_deadline_and_others_go_on(workers: Workers) -> None:
    stuck = workers.open(stuck_matmul(), name="stuck")
    other = workers.open(models.add_one(), name="other")
    loop = asyncio.get_running_loop()
    async with served(stuck) as bad, served(other) as good:
        await good.all(good.ask({"x": rows(1)}))
        size = np.array([6000, 6000], np.int64)
        deadline = loop.time() + 0.5
        victim = asyncio.ensure_future(bad.batcher.infer(bad.ask({"shape": size}, deadline=deadline)))
        killed_at = 0.0
        answered = 0
        async with asyncio.timeout(LIMIT_S):
            while not stuck.stats.kills:
                answer = await good.batcher.infer(good.ask({"x": rows(1)}))
                assert np.array_equal(answer.outputs[0], rows(1) + 1)
                answered += 1
            killed_at = loop.time()
            with pytest.raises(DeadlineExceededError):
                await victim
        # The machine is shared: what is measured is that nothing waits for the product, which takes several seconds.
        assert killed_at - deadline < 1.0
        assert answered > 20
        back = await bad.batcher.infer(bad.ask({"shape": np.array([2, 2], np.int64)}))
        assert back.outputs[0] == 8.0 or back.outputs[0] == 0.0
    assert other.stats.crashes == other.stats.kills == 0


# ---- R8: memory bombs


def test_a_model_that_takes_too_much_memory_to_load_is_refused_and_costs_the_gateway_nothing(workers: Workers) -> None:
    workers.open(models.add_one()).close()
    before = own_resident()
    # 4 GiB at once, more than the 2 GiB and some that a small file may map. Some runtimes refuse it while they fold
    # constants, others leave the constant to the run.
    with pytest.raises((ModelLoadError, ModelExecutionError)):
        workers.open(load_bomb(1 << 15), name="bomb").run({"x": rows(1, size=4)}, ["y"])
    assert own_resident() - before < 20 * MIB


def test_a_request_that_takes_too_much_memory_is_refused_and_the_worker_goes_on(workers: Workers) -> None:
    session = workers.open(models.fill())
    session.run({"shape": np.array([4], np.int64)}, ["y"])
    before = own_resident()
    for elements in (1 << 30, 1 << 33, 1 << 40):
        with pytest.raises(ModelExecutionError):
            session.run({"shape": np.array([elements], np.int64)}, ["y"])
    assert own_resident() - before < 20 * MIB
    assert session.run({"shape": np.array([2], np.int64)}, ["y"])[0].tolist() == [0, 0]
    assert session.stats.crashes == 0


# ---- R9: poison


async def test_neighbours_of_a_request_that_kills_the_worker_are_answered_as_if_alone(workers: Workers) -> None:
    session = workers.open(models.matmul())
    x = [rows(1, seed, 64) for seed in range(12)]
    alone = [session.run({"x": np.concatenate((one, one))}, ["y"])[0][:1] for one in x]
    async with served(session) as model:
        poison = {"x": np.full((1, 64), CRASH_VALUE, np.float32)}
        requests = [model.ask({"x": one}) for one in x]
        requests.insert(5, model.ask(poison))
        found = await model.all(*requests)
    guilty = found.pop(5)
    assert isinstance(guilty, WorkerCrashedError)
    for answer, wanted in zip(found, alone, strict=True):
        assert isinstance(answer, Answer), answer
        np.testing.assert_allclose(answer.outputs[0], wanted, rtol=1e-5, atol=1e-5)
    assert session.stats.crashes == 2
    assert session.stats.breaker == "closed"


async def test_batches_with_one_bad_request_each_harm_nobody_else(tmp_path: Path) -> None:
    batches = 10_000 if FULL else 24
    limits = WorkerLimits(session=SessionLimits(breaker_failures=0, respawns_per_minute=10**6))
    generator = np.random.default_rng(7)
    with running_workers(tmp_path, limits) as workers:
        session = workers.open(models.fails_on_negative())
        output = session.signature.output_names[0]
        async with served(session) as model:
            for number in range(batches):
                good = [np.abs(rows(1, number * 8 + k, 4)) for k in range(5)]
                bad = np.ones((1, 4), np.float32)
                bad[0, 0] = (np.nan, -1.0, CRASH_VALUE)[number % 3]
                requests = [model.ask({"x": x}) for x in good]
                place = int(generator.integers(0, 6))
                requests.insert(place, model.ask({"x": bad}))
                found = await model.all(*requests)
                outcome = found.pop(place)
                if number % 3:
                    assert isinstance(outcome, GatewayError)
                for x, answer in zip(good, found, strict=True):
                    assert isinstance(answer, Answer), answer
                    assert np.array_equal(answer.outputs[0], session.run({"x": x}, [output])[0])
                session._streak = 0  # the worker is well between two batches


async def test_three_that_kill_their_worker_alone_open_the_breaker_and_a_success_closes_it(workers: Workers) -> None:
    session = workers.open(models.add_one())
    poison = {"x": np.full((1, 16), CRASH_VALUE, np.float32)}
    async with served(session) as model:
        for _ in range(3):
            (crashed,) = await model.all(model.ask(poison))
            assert isinstance(crashed, WorkerCrashedError)
        until(lambda: session.stats.breaker == "open")
        (refused,) = await model.all(model.ask({"x": rows(1)}))
        assert isinstance(refused, ModelFailingError)
        assert 0 < (refused.retry_after_s or 0) <= 5
        assert len(workers.kinds("breaker_opened")) == 1
        session._breaker._open_until = 0.0  # the time has come
        assert session.capacity <= 1
        (answer,) = await model.all(model.ask({"x": rows(1)}))
        assert isinstance(answer, Answer)
        assert session.stats.breaker == "closed"
        assert len(workers.kinds("breaker_closed")) == 1


def test_a_process_that_crashes_again_and_again_while_nothing_runs_in_it_opens_the_breaker(workers: Workers) -> None:
    session = workers.open(models.add_one())
    for number in range(1, 4):
        process = process_of(session)
        os.kill(process.pid, signal.SIGSEGV)
        until(lambda dead=process: session._places[0].process is not dead)  # type: ignore[misc]  # bound on purpose
        until(lambda count=number: len(workers.kinds("worker_crashed")) == count)  # type: ignore[misc]
    until(lambda: session.stats.breaker == "open")
    assert workers.kinds("breaker_opened") == ["its process crashed while nothing ran in it: SIGSEGV"]
    with pytest.raises(ModelFailingError):
        session.run({"x": rows(1)}, ["y"])


def test_processes_that_others_kill_are_not_the_models_fault(workers: Workers) -> None:
    session = workers.open(models.add_one())
    for number, sent in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL), 1):
        process = process_of(session)
        os.kill(process.pid, sent)
        until(lambda dead=process: session._places[0].process is not dead)  # type: ignore[misc]  # bound on purpose
        until(lambda count=number: len(workers.kinds("worker_crashed")) == count)  # type: ignore[misc]
    assert np.array_equal(session.run({"x": rows(1)}, ["y"])[0], rows(1) + 1)
    assert session.stats.breaker == "closed"
    assert not workers.kinds("breaker_opened")


# ---- R10: killed again and again


async def test_requests_survive_workers_that_are_killed_again_and_again(workers: Workers) -> None:
    session = workers.open(models.matmul())
    seconds, every = (300.0, 2.0) if FULL else (3.0, 0.3)
    x = rows(4, size=64)
    wanted = session.run({"x": x}, ["y"])[0]
    session._respawns.clear()
    stop = asyncio.Event()
    outcomes: list[object] = []
    returns: list[float] = []

    async def ask(model: object) -> None:
        while not stop.is_set():
            (answer,) = await client.all(client.ask({"x": x}))
            outcomes.append(answer)
            if isinstance(answer, Answer):
                np.testing.assert_allclose(answer.outputs[0], wanted, rtol=1e-5, atol=1e-5)
            await asyncio.sleep(0.002)

    async with served(session) as client:
        callers = [asyncio.create_task(ask(client)) for _ in range(4)]
        until_at = time.monotonic() + seconds
        while time.monotonic() < until_at:
            await asyncio.sleep(every)
            pid = process_of(session).pid
            killed = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            while session.capacity == 0 or process_of(session).pid == pid:
                await asyncio.sleep(0.001)
                assert time.monotonic() - killed < LIMIT_S
            returns.append(time.monotonic() - killed)
        stop.set()
        await asyncio.gather(*callers)
    good = sum(isinstance(outcome, Answer) for outcome in outcomes)
    assert good >= 0.995 * len(outcomes), [o for o in outcomes if not isinstance(o, Answer)][:3]
    assert len(outcomes) > 100
    assert sorted(returns)[len(returns) // 2] < 1.0


# ---- several at once


def test_runs_share_lanes_and_instances(workers: Workers) -> None:
    session = workers.open(models.add_one(), config=plain_config(instances=2))
    assert session.lanes == session.capacity == 4
    assert session.stats.processes == 2

    def ask(seed: int) -> bool:
        x = rows(3, seed)
        return bool(np.array_equal(session.run({"x": x}, ["y"])[0], x + 1))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))


def test_more_instances_than_the_machine_bears_are_cut_and_that_is_told(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    session = workers.open(models.add_one(), config=plain_config(instances=100))
    assert session.stats.processes == 8
    assert "asks for 100 instances; it gets 8, which is 4 for each of 2 processors" in caplog.text


def test_one_instance_goes_on_while_the_other_comes_back(workers: Workers) -> None:
    session = workers.open(models.add_one(), config=plain_config(instances=2))
    os.kill(process_of(session, 0).pid, signal.SIGKILL)
    for seed in range(20):
        x = rows(1, seed)
        try:
            assert np.array_equal(session.run({"x": x}, ["y"])[0], x + 1)
        except WorkerCrashedError:
            assert seed < 2
    until(lambda: session.capacity == 4)


def test_closing_gives_the_memory_back_by_ending_the_process(workers: Workers) -> None:
    session = workers.open(models.add_one())
    pid = process_of(session).pid
    session.close()
    session.close()
    assert not alive(pid)


def test_a_process_that_has_grown_is_replaced_between_runs(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    session = workers.open(models.add_one())
    pid = process_of(session).pid
    monkeypatch.setattr("inferway_gateway.backends.worker.session._GROWN_FLOOR_BYTES", -(1 << 40))
    process_of(session).warm_bytes = 1
    for _ in range(5):
        session._check()
    until(lambda: session.stats.recycled == 1 and session.capacity > 0)
    assert process_of(session).pid != pid
    until(lambda: not alive(pid))
    assert np.array_equal(session.run({"x": rows(1)}, ["y"])[0], rows(1) + 1)
    assert not workers.events


def test_loading_may_take_so_long_and_no_longer(tmp_path: Path) -> None:
    # Half a million million operations, while constants are folded.
    with running_workers(tmp_path, WorkerLimits(load_timeout_s=0.5)) as workers:
        begun = time.monotonic()
        with pytest.raises(ModelLoadError, match=r"^failed to load 'slow' .* longer than the 0\.5 s"):
            workers.open(load_bomb(6000), name="slow")
        assert time.monotonic() - begun < 4.0


async def test_the_loop_waits_for_short_runs_in_the_worker_and_gets_room_for_its_answer(workers: Workers) -> None:
    session = workers.open(models.add_one(16))
    session.quick_max_elements = 1 << 20
    async with served(session) as ways:
        for count in (1, 7, 400):  # the last answer needs more shared memory, which is asked for on the way
            x = rows(count)
            request = ways.ask({"x": x})
            assert ways.batcher.inline
            answer = ways.batcher.run_inline(request)
            if answer is None:  # a busy machine kept the worker from it for a millisecond
                answer = await ways.batcher.infer(request)
            assert np.array_equal(answer.outputs[0], x + 1)
            await asyncio.sleep(0)
        assert ways.batcher.in_flight == 0


async def test_a_request_that_is_waited_for_survives_a_worker_that_is_killed_meanwhile(workers: Workers) -> None:
    session = workers.open(models.add_one(16))
    session.quick_max_elements = 1 << 20
    async with served(session) as ways:
        pid = process_of(session).pid
        os.kill(pid, signal.SIGSTOP)
        x = rows(3)
        request = ways.ask({"x": x})
        assert ways.batcher.run_inline(request) is None, "a process that is stopped answers nothing"
        assert ways.batcher.in_flight == 1
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            answer = await ways.batcher.infer(request)
        assert np.array_equal(answer.outputs[0], x + 1)
        assert process_of(session).pid != pid


def test_a_fork_server_that_hangs_is_killed_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_workers(tmp_path) as workers:
        session = workers.open(models.add_one())
        pid = process_of(session).pid
        server = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(server, signal.SIGSTOP)
        monkeypatch.setattr("inferway_gateway.backends.worker.forks._ANSWER_LIMIT_S", 1.0)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid))
        # Nobody could tell that the process is gone: the run finds it out, and waits for the next.
        assert np.array_equal(session.run({"x": rows(1)}, ["y"])[0], rows(1) + 1)


_WITHOUT_DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
import numpy as np
from inferway_gateway.backends.worker import WorkerBackend
from inferway_gateway.backends.worker.process import WorkerProcess
from inferway_gateway.backends.worker.forks import ForkError
from inferway_gateway.backends.worker import messages
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.errors import ModelLoadError
with WorkerBackend() as backend:
    session = backend.open(Artifact("m", 1, Path(sys.argv[1])))
    x = {"x": np.ones((1, 16), np.float32)}
    ours, theirs = messages.socket_pair()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        pass
    try:
        backend.forks.spawn("inferway worker m/1", theirs)
    except ForkError as error:
        print("spawn:", error)
    try:
        backend.open(Artifact("m", 2, Path(sys.argv[1])))
    except ModelLoadError as error:
        print("open:", error.message)
    for fd in taken:
        os.close(fd)
    ours.close()
    other = backend.open(Artifact("m", 3, Path(sys.argv[1])))
    print("again:", other.run(x, ["y"])[0][0, 0], session.run(x, ["y"])[0][0, 0], session.stats.crashes)
    other.close()
    session.close()
"""


def test_a_gateway_without_descriptors_starts_no_worker_and_starts_them_again_when_it_has_some(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(models.add_one())
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_DESCRIPTORS, str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "spawn: the gateway has no file descriptor left",
        "open: failed to load 'm' version 2: Too many open files",
        "again: 2.0 2.0 0",
    ]
