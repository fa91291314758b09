"""A model version that is a small graph of others: its steps run in the gateway, each through its model's executor.

**Names.** A step's input is fed from a *source*: an input of the pipeline, by its name, or an output of another step,
as ``step.output``. What the pipeline takes and gives is derived from its steps, or declared.

**Which versions.** A step may name an alias, so which version answers is decided for each request, once, when the
request begins, as for a request of the same caller to that alias: a request sees one version of each model, and a
caller of a sticky alias always the same. What a version fails counts against it there, and the alias' fallbacks, where
they fit, stand in for it. The types of the graph were checked when the pipeline was
loaded, against the versions of that time. When an alias moves on to a version with another signature they are checked
again, against what the pipeline has promised since.

**Rows.** Where all steps are batched the pipeline is: as many rows come out as went in, and each step shares its runs
with everybody else's requests. A step without a batch axis makes the pipeline one without.

**Memory.** A tensor between two steps lives until the last step that reads it has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from .batcher import Allowance, Answer, Asker, InferenceRequest
from .errors import (
    DeadlineExceededError,
    GatewayError,
    InternalError,
    ModelNotReadyError,
    ModelRejectedError,
    NotFoundError,
    ShuttingDownError,
)
from .execution import Executor
from .inflight import InFlight
from .routing import FALLBACK_CODES, TargetStats
from .stats import Histogram, ModelStats
from .tensors import Arrays, Signature, TensorSpec

MAX_STEPS: Final = 64
MAX_DEPTH: Final = 8
MAX_RUNS: Final = 256
"""Of steps, for one request, those of pipelines in pipelines included: without it 8 deep pipelines of 64 steps could
have one request ask for 64**8."""
"""Pipelines in pipelines; more is a mistake, or goes round in a circle."""
_PROGRAMS: Final = 32


@dataclass(frozen=True, slots=True)
class StepTarget:
    """Which model answers for a step.

    Attributes:
        model: its bare name.
        alias: None where none is named.
        version: None where none is named.
    """

    model: str
    alias: str | None = None
    version: int | None = None

    @property
    def name(self) -> str:
        """The model with its alias, as paths have it."""
        return self.model if self.alias is None else f"{self.model}@{self.alias}"

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.model}/versions/{self.version}"


@dataclass(frozen=True, slots=True)
class StepSpec:
    """One step: its model, and for each input of the model the source that feeds it."""

    name: str
    target: StepTarget
    inputs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """What ``pipeline.toml`` says.

    Attributes:
        inputs: declared inputs; None derives them from the sources that no step gives.
        outputs: output to its source; None takes every output of a step that no other step reads.
    """

    steps: tuple[StepSpec, ...]
    inputs: tuple[TensorSpec, ...] | None = None
    outputs: Mapping[str, str] | None = None

    @property
    def targets(self) -> tuple[StepTarget, ...]:
        return tuple(dict.fromkeys(step.target for step in self.steps))


class StepModel(Protocol):
    """A loaded model version, as far as a step needs it."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def batcher(self) -> Executor: ...
    @property
    def stats(self) -> ModelStats: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What a target stands for, for one request.

    Attributes:
        target: names no alias.
        fallback: what stands in for it, in order; names no aliases.
        stats: of the alias' target; None where no alias has a say.
    """

    target: StepTarget
    fallback: tuple[StepTarget, ...] = ()
    stats: TargetStats | None = None


class StepModels(Protocol):
    """Finds the models of steps. Errors are the registry's and the router's."""

    def choose(self, target: StepTarget, asker: Asker | None) -> Choice:
        """What a request that begins now gets."""
        ...

    def locate(self, target: StepTarget) -> StepTarget:
        """Without an alias, where no request asks: of several versions the one of the largest weight."""
        ...

    def resolve(self, target: StepTarget) -> StepModel:
        """The version of a target without an alias; ``ModelNotReadyError`` where it has to be loaded first."""
        ...

    async def acquire(self, target: StepTarget, deadline: float | None) -> StepModel:
        """The same, loaded where it can be."""
        ...

    def problem(self, target: StepTarget) -> str | None:
        """Why a request would not get one, in words; None where it would, if need be after a load."""
        ...


# ---------------------------------------------------------------------------------------------------- checked and bound


@dataclass(frozen=True, slots=True)
class _Step:
    """A step with its tensors as numbers of slots.

    Attributes:
        reads: input of the model, slot, for each input that is fed.
        writes: output of the model, slot, for each output that somebody reads.
        after: steps whose outputs it reads.
    """

    spec: StepSpec
    reads: tuple[tuple[str, int], ...]
    writes: tuple[tuple[str, int], ...]
    after: frozenset[int]


@dataclass(frozen=True, slots=True)
class Program:
    """The steps that some of the outputs need.

    Attributes:
        steps: indices into the graph's steps, in an order in which they could run one after the other.
        readers: slot to the number of steps that read it, and one more where it is an output.
        writes: for each step the outputs that are needed of it.
    """

    steps: tuple[int, ...]
    readers: Mapping[int, int]
    writes: Mapping[int, tuple[tuple[str, int], ...]]


@dataclass(slots=True)
class Graph:
    """A pipeline whose names and types fit together.

    Attributes:
        signature: what it takes and gives.
        steps: as they were declared.
        sources: input of the pipeline to its slot; results: output to its slot.
    """

    signature: Signature
    steps: tuple[_Step, ...]
    sources: Mapping[str, int]
    results: Mapping[str, int]
    _programs: dict[tuple[str, ...], Program] = field(default_factory=dict)

    def program(self, outputs: tuple[str, ...]) -> Program:
        """What has to run for these outputs."""
        known = self._programs.get(outputs)
        if known is None:
            known = self._make_program(outputs)
            if len(self._programs) < _PROGRAMS:
                self._programs[outputs] = known
        return known

    def _make_program(self, outputs: tuple[str, ...]) -> Program:
        wanted = {self.results[name] for name in outputs}
        readers = dict.fromkeys(wanted, 1)
        needed: list[int] = []
        # Backwards through an order in which every step comes after what it reads.
        for i in reversed(_order(self.steps)):
            step = self.steps[i]
            if any(slot in wanted for _, slot in step.writes):
                needed.append(i)
                for slot in {slot for _, slot in step.reads}:
                    wanted.add(slot)
                    readers[slot] = readers.get(slot, 0) + 1
        writes = {i: tuple(w for w in self.steps[i].writes if w[1] in wanted) for i in needed}
        return Program(tuple(reversed(needed)), readers, writes)


def check_structure(spec: PipelineSpec, model: str, version: int) -> None:
    """Check what can be checked without the models of the steps.

    Args:
        model, version: of the pipeline itself.
    Raises:
        ModelRejectedError: says which step and tensor.
    """
    if not spec.steps:
        raise ModelRejectedError("expected at least one step")
    if len(spec.steps) > MAX_STEPS:
        raise ModelRejectedError(f"expected at most {MAX_STEPS} steps, got {len(spec.steps)}")
    names = [step.name for step in spec.steps]
    for name in names:
        if names.count(name) > 1:
            raise ModelRejectedError(f"expected each step once, '{name}' is there twice")
    for step in spec.steps:
        if step.target.model == model and step.target.version in (None, version):
            raise ModelRejectedError(f"step '{step.name}' names the pipeline itself, '{step.target}'")
        for name, source in step.inputs.items():
            other, output = _split(source, names)
            if other == step.name:
                raise ModelRejectedError(
                    f"step '{step.name}', input '{name}': '{source}' is an output of the step itself"
                )
            if other is not None and not output:
                raise ModelRejectedError(f"step '{step.name}', input '{name}': '{source}' names no output of a step")
    _check_order(spec, names)
    declared = None if spec.inputs is None else [tensor.name for tensor in spec.inputs]
    read = {source for step in spec.steps for source in step.inputs.values()}
    if declared is not None:
        for name in declared:
            if declared.count(name) > 1:
                raise ModelRejectedError(f"expected each input once, '{name}' is there twice")
            if name not in read:
                raise ModelRejectedError(f"no step reads the input '{name}'")
    for step in spec.steps:
        for name, source in step.inputs.items():
            if _split(source, names)[0] is None and declared is not None and source not in declared:
                raise ModelRejectedError(
                    f"step '{step.name}', input '{name}': '{source}' is neither an input of the pipeline nor "
                    "the output of a step"
                )
    for name, source in (spec.outputs or {}).items():
        if _split(source, names)[0] is None:
            raise ModelRejectedError(f"output '{name}': '{source}' is not the output of a step, as STEP.OUTPUT")
    if spec.outputs is not None:
        if not spec.outputs:
            raise ModelRejectedError("expected at least one output")
        read |= set(spec.outputs.values())
        for name in names:
            if not any(_split(source, names)[0] == name for source in read):
                raise ModelRejectedError(f"nothing reads an output of step '{name}'")


def bind(spec: PipelineSpec, models: Mapping[StepTarget, StepModel], promised: Signature | None = None) -> Graph:
    """Hold the sources of a structurally sound pipeline against the signatures of its models.

    Args:
        models: what each target of ``spec`` stands for now.
        promised: what the pipeline took and gave before, which it has to go on with.
    Raises:
        ModelRejectedError: says which step and tensor.
    """
    signatures = {step.name: models[step.target].batcher.signature for step in spec.steps}
    names = list(signatures)
    produced: dict[str, TensorSpec] = {}
    for step in spec.steps:
        for tensor in signatures[step.name].outputs:
            produced[f"{step.name}.{tensor.name}"] = tensor
    batched = all(signature.batched for signature in signatures.values())
    inputs = {tensor.name: tensor for tensor in spec.inputs or ()}
    for step in spec.steps:
        signature = signatures[step.name]
        known = {tensor.name: tensor for tensor in signature.inputs}
        for name, source in step.inputs.items():
            where = f"step '{step.name}', input '{name}'"
            wanted = known.get(name)
            if wanted is None:
                raise ModelRejectedError(f"{where}: {step.target} has no such input, expected one of {_quoted(known)}")
            if _split(source, names)[0] is None:
                inputs[source] = _joined(where, source, inputs.get(source), wanted)
            elif source not in produced:
                other = _split(source, names)[0]
                has = [tensor.name for tensor in signatures[other or ""].outputs]
                raise ModelRejectedError(f"{where}: '{source}' is no output of that step, expected {_quoted(has)}")
            else:
                _check_fit(where, source, produced[source], wanted)
        missing = [tensor.name for tensor in signature.inputs if not tensor.optional and tensor.name not in step.inputs]
        if missing:
            raise ModelRejectedError(f"step '{step.name}' lacks the input {_quoted(missing)} of {step.target}")
    outputs = _outputs(spec, produced)
    found = Signature(
        tuple(inputs.values()),
        tuple(_renamed(produced[source], name) for name, source in outputs.items()),
        batched=batched,
    )
    if promised is not None:
        _check_promise(found, promised)
    return _graph(spec, promised or found, list(inputs), outputs)


def _graph(spec: PipelineSpec, signature: Signature, inputs: Sequence[str], outputs: Mapping[str, str]) -> Graph:
    names = [step.name for step in spec.steps]
    read = [*inputs, *dict.fromkeys([s for step in spec.steps for s in step.inputs.values()] + list(outputs.values()))]
    slots = {source: slot for slot, source in enumerate(dict.fromkeys(read))}
    steps = tuple(
        _Step(
            step,
            tuple((name, slots[source]) for name, source in step.inputs.items()),
            tuple(
                (source[len(step.name) + 1 :], slot)
                for source, slot in slots.items()
                if source not in inputs and _split(source, names)[0] == step.name
            ),
            frozenset(
                names.index(other) for source in step.inputs.values() if (other := _split(source, names)[0]) is not None
            ),
        )
        for step in spec.steps
    )
    return Graph(
        signature,
        steps,
        {name: slots[name] for name in inputs},
        {name: slots[source] for name, source in outputs.items()},
    )


def _outputs(spec: PipelineSpec, produced: Mapping[str, TensorSpec]) -> Mapping[str, str]:
    if spec.outputs is not None:
        for name, source in spec.outputs.items():
            if source not in produced:
                raise ModelRejectedError(f"output '{name}': '{source}' is no output of that step")
        return spec.outputs
    read = {source for step in spec.steps for source in step.inputs.values()}
    found: dict[str, str] = {}
    for source, tensor in produced.items():
        if source in read:
            continue
        if tensor.name in found:
            raise ModelRejectedError(
                f"both '{found[tensor.name]}' and '{source}' would be the output '{tensor.name}': "
                "name the outputs in a table [outputs]"
            )
        found[tensor.name] = source
    if not found:
        raise ModelRejectedError("every output of a step is read by another one: name the outputs in a table [outputs]")
    return found


def _joined(where: str, source: str, known: TensorSpec | None, wanted: TensorSpec) -> TensorSpec:
    """An input of the pipeline that has to be what one more step wants."""
    if known is None:
        return TensorSpec(source, wanted.datatype, wanted.shape, wanted.optional, axes=wanted.axes)
    _check_fit(where, source, known, wanted)
    shape = tuple(k if k != -1 else w for k, w in zip(known.shape, wanted.shape, strict=True))
    return TensorSpec(source, known.datatype, shape, known.optional and wanted.optional, axes=known.axes)


def _check_fit(where: str, source: str, given: TensorSpec, wanted: TensorSpec) -> None:
    if given.datatype != wanted.datatype:
        raise ModelRejectedError(f"{where} is {wanted.datatype}, but '{source}' is {given.datatype}")
    fits = len(given.shape) == len(wanted.shape) and all(
        g == w or -1 in (g, w) for g, w in zip(given.shape, wanted.shape, strict=True)
    )
    if not fits:
        raise ModelRejectedError(f"{where} has shape {list(wanted.shape)}, but '{source}' has {list(given.shape)}")


def _check_promise(found: Signature, promised: Signature) -> None:
    """A model of a step has changed: what callers send must still do, and what they get must still be it."""
    if found.batched != promised.batched:
        raise ModelRejectedError("a step has or lacks a batch axis now, unlike when the pipeline was loaded")
    for what, now, then in (("input", found.inputs, promised.inputs), ("output", found.outputs, promised.outputs)):
        by_name = {tensor.name: tensor for tensor in now}
        if set(by_name) != {tensor.name for tensor in then}:
            raise ModelRejectedError(f"the pipeline would have other {what}s than when it was loaded")
        for tensor in then:
            fresh = by_name[tensor.name]
            if fresh.datatype != tensor.datatype or len(fresh.shape) != len(tensor.shape):
                raise ModelRejectedError(
                    f"{what} '{tensor.name}' would be another one than when the pipeline was loaded"
                )


def _check_order(spec: PipelineSpec, names: Sequence[str]) -> None:
    """Raises where steps wait for each other."""
    before = {
        step.name: {other for s in step.inputs.values() if (other := _split(s, names)[0]) is not None}
        for step in spec.steps
    }
    while before:
        free = [name for name, needs in before.items() if not needs & before.keys()]
        if not free:
            raise ModelRejectedError("steps " + " -> ".join(_circle(before)) + " wait for each other")
        for name in free:
            del before[name]


def _circle(before: Mapping[str, set[str]]) -> list[str]:
    path = [next(iter(before))]
    while True:
        following = min(before[path[-1]] & before.keys())
        if following in path:
            return [f"'{name}'" for name in [*path[path.index(following) :], following]]
        path.append(following)


def _order(steps: Sequence[_Step]) -> list[int]:
    done: list[int] = []
    waiting = list(range(len(steps)))
    while waiting:
        i = next(i for i in waiting if steps[i].after <= set(done))
        waiting.remove(i)
        done.append(i)
    return done


def _split(source: str, names: Sequence[str]) -> tuple[str | None, str]:
    """Step and output that a source names; no step where it is an input of the pipeline."""
    step, separator, output = source.partition(".")
    return (step, output) if separator and step in names else (None, source)


def _renamed(tensor: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, tensor.datatype, tensor.shape, labels=tensor.labels, axes=tensor.axes)


def _quoted(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


# ---------------------------------------------------------------------------------------------------- run


class PipelineExecutor:
    """Runs the requests of one pipeline. ``open`` makes one.

    Args:
        name, version: of the pipeline.
        stats: of the version.
    """

    inline: Final = False

    def __init__(
        self, name: str, version: int, spec: PipelineSpec, models: StepModels, graph: Graph, stats: ModelStats
    ) -> None:
        self._name = name
        self._version = version
        self.spec: Final = spec
        self._models = models
        self._graph = graph
        self._stats = stats
        self._bound: tuple[Signature, ...] = ()
        self._in_flight = InFlight()
        self.step_seconds: Final = {step.name: Histogram() for step in spec.steps}
        """Step to how long it took, its model's queue included."""

    @classmethod
    async def open(
        cls,
        name: str,
        version: int,
        spec: PipelineSpec,
        models: StepModels,
        stats: ModelStats,
        deadline: float | None = None,
    ) -> PipelineExecutor:
        """Check a pipeline against the models of its steps, which are loaded where they are not.

        Raises:
            ModelRejectedError: it does not fit together; says which step and tensor.
            ModelNotReadyError: a step's model is missing or cannot be loaded; says which.
        """
        check_structure(spec, name, version)
        found = {}
        for step in spec.steps:
            if step.target not in found:
                try:
                    found[step.target] = await _acquired(models, models.locate(step.target), deadline)
                except GatewayError as error:
                    raise _unready(step, error) from error
        _check_nesting(name, version, found, models, Allowance(MAX_RUNS - len(spec.steps)))
        return cls(name, version, spec, models, bind(spec, found), stats)

    @property
    def signature(self) -> Signature:
        return self._graph.signature

    @property
    def row_exact(self) -> bool:
        """Whether those of all steps are, as they stand now."""
        try:
            models = self._models
            return all(models.resolve(models.locate(target)).batcher.row_exact for target in self.spec.targets)
        except GatewayError:
            return False

    def problem(self) -> str | None:
        """Which step keeps requests from being answered now, in words; None where none does."""
        for step in self.spec.steps:
            problem = self._models.problem(step.target)
            if problem is not None:
                return f"step '{step.name}' needs {step.target}: {problem}"
        return None

    def run_inline(self, request: InferenceRequest) -> Answer | None:
        return None

    async def infer(self, request: InferenceRequest) -> Answer:
        """Run the steps that the wanted outputs need. Being cancelled cancels the steps that run.

        Raises:
            ModelNotReadyError: a step's model cannot answer now; says which.
            GatewayError: what a step failed with; the message names the step.
        """
        if request.depth >= MAX_DEPTH:
            raise ModelNotReadyError(
                f"'{self._name}' is a pipeline more than {MAX_DEPTH} deep, or one that names itself"
            )
        try:
            return await self._in_flight.run(self._answer(request))
        except asyncio.CancelledError:
            self._stats.dropped_cancelled += 1
            raise

    async def drain(self, timeout_s: float) -> int:
        return await self._in_flight.drain(timeout_s)

    async def close(self) -> bool:
        return await self._in_flight.close()

    async def _answer(self, request: InferenceRequest) -> Answer:
        self._stats.running += 1
        started = time.perf_counter()
        try:
            chosen = await self._chosen_for(request)
            run = _Run(self, self._graph, chosen, request)
            outputs = await run.all()
        finally:
            self._stats.running -= 1
        seconds = time.perf_counter() - started
        self._stats.ran(request.rows, 0.0, seconds, 0.0)
        self._stats.answered(request.rows, 0.0, 0.0, seconds, 0.0)
        return Answer(outputs, 0.0, 0.0, seconds, 0.0, request.rows, run.upstream_attempts)

    async def _chosen_for(self, request: InferenceRequest) -> dict[StepTarget, _Chosen]:
        """What each step's target stands for, from here to the end of the request."""
        found: dict[StepTarget, _Chosen] = {}
        for step in self.spec.steps:
            if step.target not in found:
                try:
                    choice = self._models.choose(step.target, request.asker)
                    found[step.target] = await _found(self._models, choice, request.deadline)
                except DeadlineExceededError:
                    raise
                except GatewayError as error:
                    raise _unready(step, error) from error
        # Another signature is another object, or nearly always the same one: then nothing has to be compared.
        bound = tuple(chosen.model.batcher.signature for chosen in found.values())
        if len(bound) != len(self._bound) or any(a is not b for a, b in zip(bound, self._bound, strict=True)):
            try:
                models = {target: chosen.model for target, chosen in found.items()}
                self._graph = bind(self.spec, models, self._graph.signature)
            except ModelRejectedError as error:
                raise ModelNotReadyError(
                    f"'{self._name}' is not ready, its steps do not fit together any more: {error.message}"
                ) from error
            self._bound = bound
        return found

    async def acquired(self, target: StepTarget, deadline: float | None) -> StepModel:
        """A version of a step's model, loaded where it is not."""
        return await _acquired(self._models, target, deadline)

    async def reacquired(self, model: StepModel, deadline: float | None) -> StepModel:
        """The same version of a model that was unloaded under a request, loaded again."""
        return await self._models.acquire(StepTarget(model.name, None, model.version), deadline)


class _Run:
    """One request on its way through the steps."""

    def __init__(
        self,
        pipeline: PipelineExecutor,
        graph: Graph,
        chosen: Mapping[StepTarget, _Chosen],
        request: InferenceRequest,
    ) -> None:
        self._pipeline = pipeline
        self._graph = graph
        self._chosen = chosen
        self._request = request
        self._program = program = graph.program(request.outputs)
        self._values: dict[int, NDArray[Any]] = {
            graph.sources[name]: array
            for name, array in request.inputs.items()
            if program.readers.get(graph.sources[name])
        }
        self._readers = dict(program.readers)
        self._allowance = request.allowance or Allowance(MAX_RUNS)
        self.upstream_attempts = 0

    async def all(self) -> list[NDArray[Any]]:
        """Run every step as soon as what it reads is there; returns the wanted outputs in order."""
        needs = {i: set(self._graph.steps[i].after) & set(self._program.steps) for i in self._program.steps}
        running: dict[asyncio.Task[None], int] = {}
        try:
            while needs or running:
                able = [i for i, before in needs.items() if not before]
                for i in able:
                    del needs[i]
                if len(able) == 1 and not running:
                    await self._step(able[0])
                    ended = able
                else:
                    for i in able:
                        running[asyncio.create_task(self._step(i))] = i
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    ended = [running.pop(task) for task in done]
                    for task in done:
                        task.result()
                for before in needs.values():
                    before.difference_update(ended)
        except BaseException as error:
            _tell_attempts(error, self.upstream_attempts)
            raise
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
                for task in running:
                    if not task.cancelled():
                        task.exception()  # one failure is told of, the others are of no interest
        return [self._values[self._graph.results[name]] for name in self._request.outputs]

    async def _step(self, index: int) -> None:
        step = self._graph.steps[index]
        writes = self._program.writes[index]
        outputs = tuple(name for name, _ in writes)
        # An optional input that the request leaves out is left out of the step.
        inputs = {name: self._values[slot] for name, slot in step.reads if slot in self._values}
        answer, rows = await self._answer(step.spec, inputs, outputs)
        self.upstream_attempts += answer.upstream_attempts
        if self._graph.signature.batched:
            self._check_rows(step.spec, outputs, answer, rows)
        for (_, slot), array in zip(writes, answer.outputs, strict=True):
            self._values[slot] = array
        for slot in {slot for _, slot in step.reads}:
            self._readers[slot] -= 1
            if not self._readers[slot]:
                self._values.pop(slot, None)

    async def _answer(self, step: StepSpec, inputs: Arrays, outputs: tuple[str, ...]) -> tuple[Answer, int]:
        """What the step's version answers, or the first fallback that fits where that one fails by its own fault, and
        the rows that it was given."""
        chosen = self._chosen[step.target]
        stats = chosen.stats
        if stats is not None:
            stats.requests += 1
        try:
            return await self._ask(step, chosen.model, inputs, outputs)
        except GatewayError as error:
            failure = error
        if stats is not None:
            stats.failed(failure.code)
        crashes = int(failure.code == "worker_crashed")
        for target in chosen.fallback if failure.code in FALLBACK_CODES else ():
            try:
                model = await self._pipeline.acquired(target, self._request.deadline)
                if not _alike(chosen.model.batcher.signature, model.batcher.signature, outputs):
                    continue
                answer = await self._ask(step, model, inputs, outputs)
            except GatewayError as error:
                crashes += error.code == "worker_crashed"
                if crashes > 1 or error.code in ("deadline_exceeded", "cancelled"):
                    break
            else:
                if stats is not None:
                    stats.fallbacks += 1
                return answer
        raise failure

    async def _ask(
        self, step: StepSpec, model: StepModel, inputs: Arrays, outputs: tuple[str, ...]
    ) -> tuple[Answer, int]:
        whole = self._request
        self._allowance.left -= 1
        if self._allowance.left < 0:
            raise ModelNotReadyError(
                f"step '{step.name}' of '{self._pipeline._name}' would be more than the {MAX_RUNS} runs that "
                "pipelines, with those in them, may make for one request"
            )
        started = time.perf_counter()
        code: str | None = None
        try:
            while True:
                executor = model.batcher
                request = InferenceRequest(
                    dict(inputs),
                    outputs,
                    executor.signature.check(inputs),
                    sum(map(_nbytes, inputs.values())),
                    whole.priority,
                    whole.deadline,
                    whole.queue_timeout_s,
                    origin=whole.origin,
                    depth=whole.depth + 1,
                    allowance=self._allowance,
                    asker=whole.asker,
                )
                try:
                    answer = executor.run_inline(request)
                    if answer is None:
                        answer = await executor.infer(request)
                    break
                except ShuttingDownError:
                    # It was unloaded to make room, or reloaded, after this request began.
                    fresh = await self._pipeline.reacquired(model, whole.deadline)
                    if fresh is model:
                        raise
                    model = fresh
            return answer, request.rows
        except asyncio.CancelledError:
            code = "cancelled"
            raise
        except GatewayError as error:
            code = error.code
            raise _at(step, model, error) from error
        except Exception as error:
            code = "internal"
            raise InternalError(f"step '{step.name}' failed, the gateway's log has the details") from error
        finally:
            seconds = time.perf_counter() - started
            self._pipeline.step_seconds[step.name].observe(seconds)
            model.stats.finished(seconds, code)

    def _check_rows(self, step: StepSpec, outputs: Sequence[str], answer: Answer, rows: int) -> None:
        for name, array in zip(outputs, answer.outputs, strict=True):
            if array.ndim == 0 or array.shape[0] != rows:
                raise InternalError(f"step '{step.name}' gave '{name}' with other rows than the {rows} it got")


def _check_nesting(
    name: str,
    version: int,
    found: Mapping[StepTarget, StepModel],
    models: StepModels,
    allowance: Allowance,
    depth: int = 1,
) -> None:
    """Refuse pipelines in pipelines that come back to where they began, go too deep or make too many runs."""
    for model in found.values():
        inner = model.batcher
        if not isinstance(inner, PipelineExecutor):
            continue
        if depth >= MAX_DEPTH:
            raise ModelRejectedError(f"expected pipelines in pipelines at most {MAX_DEPTH} deep")
        below: dict[StepTarget, StepModel] = {}
        allowance.left -= len(inner.spec.steps)
        if allowance.left < 0:
            raise ModelRejectedError(
                f"expected at most {MAX_RUNS} steps in a pipeline and those in it, '{model.name}' is too much"
            )
        for step in inner.spec.steps:
            if step.target.model == name and step.target.version in (None, version):
                raise ModelRejectedError(
                    f"step '{step.name}' of the pipeline '{model.name}' names '{name}': that goes round in a circle"
                )
            try:
                below[step.target] = models.resolve(models.locate(step.target))
            except GatewayError:
                continue  # it is not loaded, so it can be looked at no further; a request is counted when it gets there
        _check_nesting(name, version, below, models, allowance, depth + 1)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The version that answers one request for a step, and what stands in for it.

    Attributes:
        stats: None where no alias has a say, or this is a fallback whose failures are nobody's.
    """

    model: StepModel
    fallback: tuple[StepTarget, ...]
    stats: TargetStats | None


async def _found(models: StepModels, choice: Choice, deadline: float | None) -> _Chosen:
    """The chosen version, or the first fallback where that one cannot be had."""
    stats = choice.stats
    try:
        return _Chosen(await _acquired(models, choice.target, deadline), choice.fallback, stats)
    except GatewayError as error:
        code = "model_not_ready" if isinstance(error, NotFoundError) else error.code
        if stats is not None:
            stats.requests += 1
            stats.failed(code)
        for at, target in enumerate(choice.fallback if code in FALLBACK_CODES else (), start=1):
            try:
                model = await _acquired(models, target, deadline)
            except DeadlineExceededError:
                break
            except GatewayError:
                continue
            if stats is not None:
                stats.fallbacks += 1
            return _Chosen(model, choice.fallback[at:], None)
        raise


def _alike(chosen: Signature, other: Signature, outputs: Sequence[str]) -> bool:
    """Whether a fallback's answer can stand where the chosen version's would. Inputs are checked when it is asked."""
    found = {tensor.name: tensor for tensor in other.outputs}
    return chosen.batched == other.batched and all(
        name in found
        and found[name].datatype == (wanted := chosen.output(name)).datatype
        and len(found[name].shape) == len(wanted.shape)
        and all(-1 in (a, b) or a == b for a, b in zip(found[name].shape, wanted.shape, strict=True))
        for name in outputs
    )


async def _acquired(models: StepModels, target: StepTarget, deadline: float | None) -> StepModel:
    try:
        return models.resolve(target)
    except ModelNotReadyError:
        return await models.acquire(target, deadline)


def _unready(step: StepSpec, error: GatewayError) -> ModelNotReadyError:
    """A pipeline is not ready where a step's model is missing or not ready."""
    why = "there is none such" if isinstance(error, NotFoundError) else error.message
    return ModelNotReadyError(f"step '{step.name}' needs {step.target}: {why}", retry_after_s=error.retry_after_s)


def _at(step: StepSpec, model: StepModel, error: GatewayError) -> GatewayError:
    """The same error, saying where it happened."""
    told = type(error).__new__(type(error))
    told.__dict__.update(error.__dict__)
    told.message = f"step '{step.name}' ({model.name} version {model.version}): {error.message}"
    told.args = (told.message,)
    return told


def _tell_attempts(error: BaseException, attempts: int) -> None:
    if isinstance(error, GatewayError):
        error.upstream_attempts += attempts


def _nbytes(array: NDArray[Any]) -> int:
    """Bytes that count against a queue; for strings those of their text, nearly."""
    return array.nbytes + (sum(map(len, array.flat)) if array.dtype.hasobject else 0)
