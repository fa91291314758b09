from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inferway_gateway.core.batcher import Answer, Asker, InferenceRequest
from inferway_gateway.core.errors import (
    DeadlineExceededError,
    GatewayError,
    InvalidTensorError,
    ModelExecutionError,
    ModelNotFoundError,
    ModelNotReadyError,
    ModelRejectedError,
    QueueFullError,
    ShuttingDownError,
)
from inferway_gateway.core.execution import Executor
from inferway_gateway.core.pipeline import MAX_DEPTH, MAX_RUNS, Choice, PipelineExecutor, StepTarget
from inferway_gateway.core.routing import TargetStats
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.tensors import Signature, TensorSpec
from inferway_gateway.store.elsewhere import parse_pipeline

LIMIT_S = 10.0
Function = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def tensor(text: str) -> TensorSpec:
    """A spec such as ``x FP32 -1 4``."""
    name, datatype, *shape = text.split()
    optional = name.endswith("?")
    return TensorSpec(name.rstrip("?"), datatype, tuple(map(int, shape)), optional)


class Fake:
    """An executor that calls a function on the event loop, after ``gate`` where that is set."""

    inline = False
    row_exact = True

    def __init__(self, inputs: str, outputs: str, function: Function, *, batched: bool = True) -> None:
        split = [tuple(tensor(t) for t in side.split(", ") if t) for side in (inputs, outputs)]
        self.signature = Signature(split[0], split[1], batched=batched)
        self.function = function
        self.gate: asyncio.Event | None = None
        self.begun = asyncio.Event()
        self.requests: list[InferenceRequest] = []
        self.cancelled = 0
        self.failure: GatewayError | None = None

    def run_inline(self, request: InferenceRequest) -> Answer | None:
        return None

    async def infer(self, request: InferenceRequest) -> Answer:
        self.requests.append(request)
        self.begun.set()
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.failure is not None:
            raise self.failure
        found = self.function(dict(request.inputs))
        return Answer([found[name] for name in request.outputs], 0.0, 0.0, 0.0, 0.0, request.rows, 1)

    async def drain(self, timeout_s: float) -> int:
        return 0

    async def close(self) -> bool:
        return True


@dataclass
class Held:
    name: str
    version: int
    batcher: Executor
    stats: ModelStats = field(default_factory=ModelStats)


class Models:
    """Models by name and version; a name stands for what ``latest`` says, or for its only version."""

    def __init__(self, **executors: Executor) -> None:
        self.held: dict[tuple[str, int], Held] = {}
        self.latest: dict[str, int] = {}
        self.asleep: dict[tuple[str, int], Held] = {}
        """Loaded when they are acquired."""
        self.resolved: list[str] = []
        self.choices: dict[str, Choice] = {}
        """What targets stand for that are no names."""
        self.askers: list[Asker | None] = []
        for name, executor in executors.items():
            self.put(name, 1, executor)

    def put(self, name: str, version: int, executor: Executor) -> Held:
        held = self.held[name, version] = Held(name, version, executor)
        self.latest[name] = version
        return held

    def choose(self, target: StepTarget, asker: Asker | None) -> Choice:
        self.askers.append(asker)
        return self.choices.get(str(target), Choice(self.locate(target)))

    def locate(self, target: StepTarget) -> StepTarget:
        return StepTarget(target.model, None, target.version or self.latest.get(target.model))

    def resolve(self, target: StepTarget) -> Held:
        self.resolved.append(str(target))
        version = target.version or self.latest.get(target.model, 0)
        held = self.held.get((target.model, version))
        if held is not None:
            return held
        if (target.model, version) in self.asleep:
            raise ModelNotReadyError(f"'{target.model}' is unloaded")
        raise ModelNotFoundError(f"Request for unknown model: '{target.model}' is not found")

    async def acquire(self, target: StepTarget, deadline: float | None) -> Held:
        version = target.version or self.latest[target.model]
        await asyncio.sleep(0)
        if (target.model, version) in self.asleep:
            self.held[target.model, version] = self.asleep.pop((target.model, version))
        return self.resolve(target)

    def problem(self, target: StepTarget) -> str | None:
        try:
            self.resolve(target)
        except GatewayError as error:
            return error.message
        return None


def add(amount: float, inputs: str = "x FP32 -1 4", outputs: str = "y FP32 -1 4", **options: Any) -> Fake:
    return Fake(inputs, outputs, lambda arrays: {"y": arrays["x"] + np.float32(amount)}, **options)


def both() -> Fake:
    return Fake("a FP32 -1 4, b FP32 -1 4", "sum FP32 -1 4", lambda arrays: {"sum": arrays["a"] + arrays["b"]})


def ask(rows: int = 1, outputs: tuple[str, ...] = ("y",), **members: Any) -> InferenceRequest:
    x = np.zeros((rows, 4), np.float32)
    return InferenceRequest({"x": x}, outputs, rows, x.nbytes, **members)


async def opened(text: str, models: Models, name: str = "mine", version: int = 1) -> PipelineExecutor:
    return await PipelineExecutor.open(name, version, parse_pipeline(text), models, ModelStats())


CHAIN = """
    [[steps]]
    name = "one"
    model = "first"
    inputs = { x = "x" }
    [[steps]]
    name = "two"
    model = "second"
    inputs = { x = "one.y" }
"""
DIAMOND = """
    [[steps]]
    name = "join"
    model = "both"
    inputs = { a = "left.y", b = "right.y" }
    [[steps]]
    name = "left"
    model = "first"
    inputs = { x = "x" }
    [[steps]]
    name = "right"
    model = "second"
    inputs = { x = "x" }
"""


async def test_steps_feed_each_other() -> None:
    pipeline = await opened(CHAIN, Models(first=add(1), second=add(10)))
    assert pipeline.signature == Signature((tensor("x FP32 -1 4"),), (tensor("y FP32 -1 4"),), batched=True)
    answer = await pipeline.infer(ask(3))
    np.testing.assert_array_equal(answer.outputs[0], np.full((3, 4), 11, np.float32))
    assert answer.upstream_attempts == 2
    assert {name: seconds.count for name, seconds in pipeline.step_seconds.items()} == {"one": 1, "two": 1}


async def test_steps_that_need_nothing_of_each_other_run_at_once() -> None:
    left, right = add(1), add(10)
    left.gate = right.gate = asyncio.Event()
    pipeline = await opened(DIAMOND, Models(first=left, second=right, both=both()))
    task = asyncio.create_task(pipeline.infer(ask(2, ("sum",))))
    async with asyncio.timeout(LIMIT_S):
        await left.begun.wait()
        await right.begun.wait()
        left.gate.set()
        answer = await task
    np.testing.assert_array_equal(answer.outputs[0], np.full((2, 4), 11, np.float32))


async def test_a_step_whose_outputs_nobody_wants_is_left_out() -> None:
    left, right = add(1), add(10)
    text = DIAMOND.replace("[[steps]]", '[outputs]\nonly = "left.y"\nall = "join.sum"\n[[steps]]', 1)
    pipeline = await opened(text, Models(first=left, second=right, both=both()))
    await pipeline.infer(ask(1, ("only",)))
    assert (len(left.requests), len(right.requests)) == (1, 0)
    answer = await pipeline.infer(ask(1, ("all", "only")))
    assert [float(array[0, 0]) for array in answer.outputs] == [11.0, 1.0]


async def test_what_the_request_wants_is_passed_on() -> None:
    first, second = add(1), add(10)
    pipeline = await opened(CHAIN, Models(first=first, second=second))
    deadline = asyncio.get_running_loop().time() + LIMIT_S
    origin = (("X-Request-Id", "r"),)
    await pipeline.infer(ask(2, priority=3, deadline=deadline, queue_timeout_s=7.0, origin=origin))
    for executor in (first, second):
        (request,) = executor.requests
        assert (request.priority, request.deadline, request.queue_timeout_s) == (3, deadline, 7.0)
        assert (request.origin, request.rows, request.nbytes, request.depth) == (origin, 2, 32, 1)


async def test_a_request_sees_one_version_of_each_model() -> None:
    first, second = add(1), add(10)
    first.gate = asyncio.Event()
    models = Models(first=first, second=second)
    text = CHAIN + '[[steps]]\nname = "three"\nmodel = "second"\ninputs = { x = "two.y" }\n'
    pipeline = await opened(text, models)
    models.resolved.clear()
    task = asyncio.create_task(pipeline.infer(ask()))
    async with asyncio.timeout(LIMIT_S):
        await first.begun.wait()
        models.put("second", 2, add(1000))
        first.gate.set()
        answer = await task
    assert answer.outputs[0][0, 0] == 21
    assert models.resolved == ["first/versions/1", "second/versions/1"]
    assert (await pipeline.infer(ask())).outputs[0][0, 0] == 2001


def shared(models: Models, first: Fake, second: Fake, third: Fake | None = None) -> TargetStats:
    """Has ``m@canary`` stand for version 2 of a model, with version 1, and 3 where it is given, as fallbacks."""
    models.put("m", 2, second)
    if third is not None:
        models.put("m", 3, third)
    models.put("m", 1, first)
    stats = TargetStats()
    fallback = tuple(StepTarget("m", None, v) for v in ((3, 1) if third is not None else (1,)))
    models.choices["m@canary"] = Choice(StepTarget("m", None, 2), fallback, stats)
    return stats


CANARY = '[[steps]]\nname = "s"\nmodel = "m@canary"\ninputs = { x = "x" }\n'


async def test_a_step_knows_who_asks_and_counts_for_its_alias() -> None:
    models = Models()
    stats = shared(models, add(1), add(2))
    pipeline = await opened(CANARY, models)
    models.put("inner", 1, pipeline)
    outer = await opened(CANARY.replace("m@canary", "inner"), models)
    asker = Asker("key", {b"x-user": b"ann"})
    assert (await outer.infer(ask(asker=asker))).outputs[0][0, 0] == 2
    assert models.askers == [asker, asker]
    assert (stats.requests, stats.errors, stats.fallbacks) == (1, 0, 0)


async def test_a_fallback_of_its_alias_stands_in_for_a_step_that_fails() -> None:
    models = Models()
    second, misfit = add(2), add(3, "x FP32 -1 4", "y FP64 -1 4")
    stats = shared(models, add(1), second, misfit)
    pipeline = await opened(CANARY, models)
    second.failure = ModelExecutionError("it broke")
    assert (await pipeline.infer(ask())).outputs[0][0, 0] == 1
    assert not misfit.requests, "what gives another datatype is passed over"
    assert (stats.requests, stats.errors, stats.fallbacks) == (1, 1, 1)
    second.failure = InvalidTensorError("the caller's own fault")
    with pytest.raises(InvalidTensorError, match=r"step 's' \(m version 2\)"):
        await pipeline.infer(ask())
    assert (stats.requests, stats.errors, stats.fallbacks) == (2, 1, 1)


async def test_where_every_fallback_fails_too_the_chosen_versions_error_is_told() -> None:
    models = Models()
    first, second = add(1), add(2)
    stats = shared(models, first, second)
    pipeline = await opened(CANARY, models)
    second.failure = ModelExecutionError("it broke")
    first.failure = QueueFullError("full", retry_after_s=1.0)
    with pytest.raises(ModelExecutionError, match=r"step 's' \(m version 2\): it broke"):
        await pipeline.infer(ask())
    assert (stats.requests, stats.errors, stats.fallbacks) == (1, 1, 0)


async def test_a_fallback_stands_in_for_a_version_that_is_gone() -> None:
    models = Models()
    stats = shared(models, add(1), add(2))
    pipeline = await opened(CANARY, models)
    del models.held["m", 2]
    assert (await pipeline.infer(ask())).outputs[0][0, 0] == 1
    assert (stats.requests, stats.failures, stats.fallbacks) == (1, {"model_not_ready": 1}, 1)
    del models.held["m", 1]
    with pytest.raises(ModelNotReadyError, match="there is none such"):
        await pipeline.infer(ask())
    assert (stats.requests, stats.fallbacks) == (2, 1)


async def test_a_model_that_is_not_loaded_is_loaded_for_the_request() -> None:
    models = Models(first=add(1), second=add(10))
    pipeline = await opened(CHAIN, models)
    models.asleep["second", 1] = models.held.pop(("second", 1))
    assert (await pipeline.infer(ask())).outputs[0][0, 0] == 11


async def test_a_model_unloaded_under_a_request_is_loaded_again_for_it() -> None:
    first, second = add(1), add(10)
    second.failure = ShuttingDownError("leaves")
    models = Models(first=first, second=second)
    pipeline = await opened(CHAIN, models)
    models.asleep["second", 1] = Held("second", 1, add(20))
    del models.held["second", 1]
    models.held["second", 1] = Held("second", 1, second)
    task = asyncio.create_task(pipeline.infer(ask()))
    assert (await task).outputs[0][0, 0] == 21


async def test_an_error_names_the_step_and_keeps_its_kind() -> None:
    second = add(10)
    second.failure = QueueFullError("the model's queue is full", retry_after_s=3.0)
    models = Models(first=add(1), second=second)
    pipeline = await opened(CHAIN, models)
    with pytest.raises(QueueFullError, match=r"^step 'two' \(second version 1\): the model's queue is full$") as caught:
        await pipeline.infer(ask())
    assert caught.value.retry_after_s == 3.0
    assert caught.value.upstream_attempts == 1
    assert models.held["second", 1].stats.failures == {"queue_full": 1}
    assert models.held["first", 1].stats.success.count == 1


async def test_a_failing_step_ends_those_beside_it() -> None:
    left, right = add(1), add(10)
    left.gate = asyncio.Event()
    right.failure = ModelExecutionError("no")
    pipeline = await opened(DIAMOND, Models(first=left, second=right, both=both()))
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(ModelExecutionError, match="step 'right'"):
            await pipeline.infer(ask(outputs=("sum",)))
    assert left.cancelled == 1


@pytest.mark.parametrize("text", [CHAIN, DIAMOND], ids=["chain", "diamond"])
async def test_a_caller_that_leaves_ends_what_runs(text: str) -> None:
    first, second = add(1), add(10)
    first.gate = second.gate = asyncio.Event()
    pipeline = await opened(text, Models(first=first, second=second, both=both()))
    task = asyncio.create_task(pipeline.infer(ask(outputs=pipeline.signature.output_names)))
    async with asyncio.timeout(LIMIT_S):
        await first.begun.wait()
        if text == DIAMOND:
            await second.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert first.cancelled == 1
    assert second.cancelled == (text == DIAMOND)
    assert await pipeline.close()


async def test_a_tensor_is_let_go_of_after_its_last_reader() -> None:
    made: list[weakref.ref[Any]] = []

    def remember(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        y = arrays["x"] + 1
        made.append(weakref.ref(y))
        return {"y": y}

    def look(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        gc.collect()
        alive.append([ref() is not None for ref in made])
        return {"y": arrays["x"] + 0}

    alive: list[list[bool]] = []
    last = Fake("x FP32 -1 4", "y FP32 -1 4", look)
    middle = Fake("x FP32 -1 4", "y FP32 -1 4", lambda arrays: {"y": arrays["x"] * 2})
    text = CHAIN + '[[steps]]\nname = "three"\nmodel = "third"\ninputs = { x = "two.y" }\n'
    first = Fake("x FP32 -1 4", "y FP32 -1 4", remember)

    async def infer(request: InferenceRequest) -> Answer:
        found = first.function(dict(request.inputs))
        return Answer([found["y"]], 0.0, 0.0, 0.0, 0.0, request.rows)

    first.infer = infer  # type: ignore[method-assign]  # one that remembers no request
    for fake in (middle, last):
        fake.requests = _Nothing()
    pipeline = await opened(text, Models(first=first, second=middle, third=last))
    await pipeline.infer(ask())
    assert alive == [[False]]


class _Nothing(list[Any]):
    def append(self, _: Any) -> None:
        pass


async def test_a_step_without_a_batch_axis_makes_a_pipeline_without() -> None:
    total = Fake(
        "x FP32 -1 4", "y FP32 1", lambda arrays: {"y": arrays["x"].sum(keepdims=True).reshape(1)}, batched=False
    )
    pipeline = await opened(CHAIN, Models(first=add(1), second=total))
    assert not pipeline.signature.batched
    answer = await pipeline.infer(InferenceRequest({"x": np.zeros((3, 4), np.float32)}, ("y",), 1, 48))
    assert answer.outputs[0].tolist() == [12.0]


async def test_unknown_dimensions_take_those_that_are_known() -> None:
    wide = add(1, "x FP32 -1 -1", "y FP32 -1 -1")
    pipeline = await opened(CHAIN, Models(first=wide, second=add(10)))
    assert pipeline.signature.inputs == (tensor("x FP32 -1 -1"),)
    with pytest.raises(InvalidTensorError, match=r"step 'two'.*expects shape \[-1,4\], got \[1,5\]"):
        await pipeline.infer(InferenceRequest({"x": np.zeros((1, 5), np.float32)}, ("y",), 1, 20))


async def test_an_input_that_every_reader_can_do_without_can_be_left_out() -> None:
    def function(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {"y": arrays["x"] + arrays.get("bias", np.float32(5))}

    maybe = Fake("x FP32 -1 4, bias? FP32 -1 4", "y FP32 -1 4", function)
    text = CHAIN.replace('inputs = { x = "x" }', 'inputs = { x = "x", bias = "bias" }')
    pipeline = await opened(text, Models(first=maybe, second=add(10)))
    assert [spec.optional for spec in pipeline.signature.inputs] == [False, True]
    assert (await pipeline.infer(ask())).outputs[0][0, 0] == 15


def step(name: str, model: str, **inputs: str) -> str:
    fed = ", ".join(f'{key} = "{source}"' for key, source in inputs.items())
    return f'[[steps]]\nname = "{name}"\nmodel = "{model}"\ninputs = {{ {fed} }}\n'


WRONG = {
    "twice": (step("a", "first", x="x") * 2, "expected each step once, 'a' is there twice"),
    "unknown-input": (
        step("a", "first", x="x", z="x"), "step 'a', input 'z': first has no such input, expected one of 'x'"),
    "missing-input": (step("a", "both", a="x"), "step 'a' lacks the input 'b' of both"),
    "unknown-output": (
        step("a", "first", x="x") + step("b", "first", x="a.z"),
        "step 'b', input 'x': 'a.z' is no output of that step, expected 'y'"),
    "datatype": (
        step("a", "first", x="x") + step("b", "whole", x="a.y"), "step 'b', input 'x' is INT64, but 'a.y' is FP32"),
    "datatype-of-an-input": (
        step("a", "first", x="x") + step("b", "whole", x="x"), "step 'b', input 'x' is INT64, but 'x' is FP32"),
    "shape": (
        step("a", "first", x="x") + step("b", "wider", x="a.y"),
        r"step 'b', input 'x' has shape \[-1, 8\], but 'a.y' has \[-1, 4\]"),
    "rank": (
        step("a", "first", x="x") + step("b", "flat", x="a.y"),
        r"step 'b', input 'x' has shape \[-1\], but 'a.y' has \[-1, 4\]"),
    "itself": (step("a", "first", x="a.y"), "step 'a', input 'x': 'a.y' is an output of the step itself"),
    "circle": (
        step("a", "first", x="b.y") + step("b", "first", x="c.y") + step("c", "first", x="a.y"),
        "steps 'a' -> 'b' -> 'c' -> 'a' wait for each other"),
    "names-itself": (step("a", "mine", x="x"), "step 'a' names the pipeline itself, 'mine'"),
    "names-its-alias": (step("a", "mine@canary", x="x"), "step 'a' names the pipeline itself, 'mine@canary'"),
    "names-its-version": (
        step("a", "mine/versions/1", x="x"), "step 'a' names the pipeline itself, 'mine/versions/1'"),
    "two-of-a-name": (
        step("a", "first", x="x") + step("b", "first", x="x"), "both 'a.y' and 'b.y' would be the output 'y'"),
    "no-step": (
        '[outputs]\nz = "q.y"\n' + step("a", "first", x="x"), "output 'z': 'q.y' is not the output of a step"),
    "no-output": (
        '[outputs]\nz = "a.q"\n' + step("a", "first", x="x"), "output 'z': 'a.q' is no output of that step"),
    "unread-step": (
        '[outputs]\nz = "a.y"\n' + step("a", "first", x="x") + step("b", "first", x="a.y"),
        "nothing reads an output of step 'b'"),
    "unread-input": (
        '[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 4]\n[[inputs]]\nname = "w"\ndatatype = "FP32"\n'
        "shape = [-1]\n" + step("a", "first", x="x"), "no step reads the input 'w'"),
    "undeclared-input": (
        '[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 4]\n'
        + step("a", "both", a="x", b="elsewhere.y"), "step 'a', input 'b': 'elsewhere.y' is neither an input of"),
    "declared-otherwise": (
        '[[inputs]]\nname = "x"\ndatatype = "FP64"\nshape = [-1, 4]\n' + step("a", "first", x="x"),
        "step 'a', input 'x' is FP32, but 'x' is FP64"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
async def test_what_does_not_fit_is_refused_with_its_place(name: str) -> None:
    text, words = WRONG[name]
    models = Models(
        first=add(1),
        both=both(),
        whole=add(1, "x INT64 -1 4", "y INT64 -1 4"),
        wider=add(1, "x FP32 -1 8", "y FP32 -1 8"),
        flat=add(1, "x FP32 -1", "y FP32 -1"),
        mine=add(1),
    )
    with pytest.raises(ModelRejectedError, match=words):
        await opened(text, models)


async def test_another_version_of_the_same_model_may_be_a_step() -> None:
    models = Models(mine=add(1))
    pipeline = await opened(step("a", "mine/versions/1", x="x"), models, version=2)
    assert (await pipeline.infer(ask())).outputs[0][0, 0] == 1


async def test_a_missing_model_is_named_at_the_load_and_later() -> None:
    models = Models(first=add(1))
    with pytest.raises(ModelNotReadyError, match="step 'two' needs second: there is none such"):
        await opened(CHAIN, models)
    models.put("second", 1, add(10))
    pipeline = await opened(CHAIN, models)
    assert pipeline.problem() is None
    del models.held["second", 1]
    assert "step 'two' needs second: " in (pipeline.problem() or "")
    with pytest.raises(ModelNotReadyError, match="step 'two' needs second"):
        await pipeline.infer(ask())


async def test_an_alias_that_moves_to_another_signature_is_checked_again() -> None:
    models = Models(first=add(1), second=add(10))
    pipeline = await opened(CHAIN, models)
    await pipeline.infer(ask())
    models.put("second", 2, add(20, "x FP32 -1 -1", "y FP32 -1 -1"))
    assert (await pipeline.infer(ask())).outputs[0][0, 0] == 21
    assert pipeline.signature.outputs == (tensor("y FP32 -1 4"),), "callers were promised something else"
    models.put("second", 3, add(1, "x INT64 -1 4", "y INT64 -1 4"))
    with pytest.raises(ModelNotReadyError, match="do not fit together any more: step 'two', input 'x' is INT64"):
        await pipeline.infer(ask())
    models.put("second", 4, Fake("x FP32 -1 4", "z FP32 -1 4", lambda arrays: {"z": arrays["x"]}))
    with pytest.raises(ModelNotReadyError, match="other outputs than when it was loaded"):
        await pipeline.infer(ask())
    models.put("second", 5, add(30))
    assert (await pipeline.infer(ask())).outputs[0][0, 0] == 31


async def test_pipelines_are_steps_too_up_to_a_depth() -> None:
    models = Models(level0=add(1))
    for depth in range(1, MAX_DEPTH + 1):
        inner = await opened(step("a", f"level{depth - 1}", x="x"), models, f"level{depth}")
        models.put(f"level{depth}", 1, inner)
    assert (await models.held[f"level{MAX_DEPTH}", 1].batcher.infer(ask())).outputs[0][0, 0] == 1
    with pytest.raises(ModelRejectedError, match="at most 8 deep"):
        await opened(step("a", f"level{MAX_DEPTH}", x="x"), models)


def chain(*below: str) -> str:
    """A pipeline of these models, one after the other."""
    return "".join(step(f"s{i}", name, x="x" if i == 0 else f"s{i - 1}.y") for i, name in enumerate(below))


async def test_pipelines_in_pipelines_do_not_multiply_without_bound() -> None:
    leaf = add(1)
    models = Models(level0=leaf)
    models.put("level1", 1, await opened(chain(*["level0"] * 16), models, "level1"))
    models.put("level2", 1, await opened(chain(*["level1"] * 15), models, "level2"))
    assert (await models.held["level2", 1].batcher.infer(ask())).outputs[0][0, 0] == 240
    models.put("level2", 1, await opened(chain(*["level1"] * 16), models, "level2"))
    leaf.requests.clear()
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(ModelNotReadyError, match=f"more than the {MAX_RUNS} runs"):
            await models.held["level2", 1].batcher.infer(ask())
    assert 200 < len(leaf.requests) < MAX_RUNS


async def test_looking_at_pipelines_in_pipelines_is_bounded() -> None:
    # Each level names all pipelines of the level below: there are 8**3 ways through the third.
    models = Models(base=add(1))
    below = ["base"]
    for depth in range(2):
        names = [f"level{depth}-{i}" for i in range(8)]
        for name in names:
            models.put(name, 1, await opened(chain(*below), models, name))
        below = names
    third = await opened(chain(*below), models, "third")
    models.put("third", 1, third)
    with pytest.raises(ModelRejectedError, match=f"at most {MAX_RUNS} steps in a pipeline and those in it"):
        await opened(chain(*["third"] * 2, *below, *below, *below), models)


async def test_a_circle_of_pipelines_is_refused_or_ends() -> None:
    models = Models(other=add(1))
    mine = await opened(step("a", "other", x="x"), models)
    models.put("mine", 1, mine)
    with pytest.raises(ModelRejectedError, match="pipeline 'mine' names 'other': that goes round"):
        await opened(step("a", "mine", x="x"), models, "other", 2)
    circle = await opened(step("a", "mine", x="x"), models, "another")
    models.put("other", 2, circle)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(ModelNotReadyError, match="one that names itself"):
            await circle.infer(ask())


async def test_a_deadline_that_passes_in_a_step_is_told_as_such() -> None:
    second = add(10)
    second.failure = DeadlineExceededError("too late")
    pipeline = await opened(CHAIN, Models(first=add(1), second=second))
    with pytest.raises(DeadlineExceededError, match="step 'two'"):
        await pipeline.infer(ask())


async def test_a_drained_pipeline_ends_what_is_late() -> None:
    first = add(1)
    first.gate = asyncio.Event()
    pipeline = await opened(CHAIN, Models(first=first, second=add(10)))
    task = asyncio.create_task(pipeline.infer(ask()))
    async with asyncio.timeout(LIMIT_S):
        await first.begun.wait()
        assert await pipeline.drain(0.0) == 1
        with pytest.raises(ShuttingDownError):
            await task
        with pytest.raises(ShuttingDownError):
            await pipeline.infer(ask())
    assert await pipeline.close()
