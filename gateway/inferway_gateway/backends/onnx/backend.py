"""Opening a model version: load it, choose how to run it, find out what it does with rows, and warm it up.

Everything that is decided here by measuring is bounded in time, so a small model is ready within tens of milliseconds
and a large one within about two seconds of its own loading. At most two sessions of a model exist at once: the best so
far and the one that is tried against it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from ...core.backend import Artifact, CostPoint, Profile, RowExactness, TrialRow
from ...core.errors import DeadlineExceededError, GatewayError, ModelLoadError
from ...core.tensors import Arrays
from . import extensions, memory
from .graph import DYNAMIC_QUANTISATION, GraphFacts, read_graph
from .measure import (
    MAX_COST_ROWS,
    Runner,
    Watchdog,
    distance,
    find_sample,
    measure_cost,
    measure_inline,
    probe_padding,
    probe_rows,
    throughput,
)
from .sample import Sample, warmup_inputs
from .session import Choice, OnnxSession, explain
from .signature import Layout, declared, make_layout, overridable

log = logging.getLogger(__name__)
runtime_log = logging.getLogger("onnxruntime")

CPU: Final = "CPUExecutionProvider"
ANY_SIZE: Final = 1 << 62
"""``inline_max_elements`` of a model that its operator wants on the event loop."""

_SEVERITIES: Final = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
_MARGIN: Final = 0.95
"""A candidate must take at most this share of the time of the best so far: less is noise."""
_EQUAL: Final = 1e-4
"""Largest difference between two ways of running the same model, relative to an output's largest value."""
_NORMALISATION: Final = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"})
_MAPPED_BYTES: Final = 256 << 20
"""Below this, packing the weights takes a fraction of a second and memory that nobody misses."""
_PACKED: Final = frozenset(
    {"MatMulNBits", "MatMulInteger", "QLinearMatMul", "QGemm", "QLinearConv", "Conv", "LSTM", "GRU"}
)
"""Operators that are many times slower on weights that were not packed."""
_LONG_RUN_S: Final = 1e-3
"""Below this, splitting a run over threads costs more than it gains."""
_BATCH_S: Final = 0.5
"""About how long the largest batch may take where no configuration bounds it: others wait for it, and a run can only
be ended between two nodes."""
_UNMEASURED_ROWS: Final = 256
_LARGEST_ELEMENTS: Final = 1 << 24
"""Elements of all inputs of a run that is to show the peak of memory: as many as one batch has at most in FP32."""
_MAX_DERIVED_ROWS: Final = 1 << 20
"""The most rows that a run is given where neither a configuration nor its time bounds it. A long vector through a model
whose rows are single numbers would else be cut into thousands of runs, each of which costs more than its rows."""

_prepare_lock = threading.Lock()
_prepared = False


class OnnxBackend:
    """Runs ONNX models in this process.

    Args:
        providers: execution providers, most preferred first. Those that this build of the runtime lacks are passed
            over with a warning as long as one is left.
        cpus: processors that this process may use; None asks the system.
        inline_threshold_s: runs shorter than this may happen on the event loop. A hop to another thread and back
            costs about as much.
        trial_budget_s: time for trying session options, per model.
        measure_budget_s: time for measuring what runs cost, per model.
        run_limit_s: a run during loading that takes longer is ended; the model is then served unmeasured.
        trial_max_bytes: a larger model is not loaded a second time to try options.
    """

    def __init__(
        self,
        providers: Sequence[str] = (CPU,),
        cpus: int | None = None,
        *,
        inline_threshold_s: float = 100e-6,
        trial_budget_s: float = 1.0,
        measure_budget_s: float = 0.5,
        run_limit_s: float = 5.0,
        trial_max_bytes: int = 1 << 30,
    ) -> None:
        self._providers = tuple(providers)
        self._cpus = cpus or len(os.sched_getaffinity(0))
        self._inline_threshold_s = inline_threshold_s
        self._trial_budget_s = trial_budget_s
        self._measure_budget_s = measure_budget_s
        self._run_limit_s = run_limit_s
        self._trial_max_bytes = trial_max_bytes

    def open(self, artifact: Artifact) -> OnnxSession:
        """Load a model version; blocks for as long as that takes.

        Raises:
            ModelLoadError: the files are missing, broken or no model that can be served, the configuration contradicts
                the graph, no execution provider is there, or a configured warm-up fails.
        """
        started = time.perf_counter()

        def measured(loader: _Loader) -> OnnxSession:
            with Watchdog(self._run_limit_s) as watchdog:
                session = self._prepare(loader, watchdog)
            session.profile = replace(session.profile, load_s=time.perf_counter() - started)
            return session

        return self._opened(artifact, measured)

    def reopen(self, artifact: Artifact, choice: Choice, *, batched: bool, max_rows: int) -> OnnxSession:
        """Open a version of which an earlier ``open`` found out everything; neither tries nor measures nor warms up.

        Args:
            choice: the earlier session's.
            batched, max_rows: of the earlier session's signature.
        Raises:
            ModelLoadError: as ``open`` does.
        """

        def decided(loader: _Loader) -> OnnxSession:
            session = loader.open(choice)
            session.settle(replace(session.signature, batched=batched, max_rows=max_rows))
            session.profile = Profile(
                execution_providers=loader.active_providers, intra_op_threads=choice.intra_op_threads
            )
            return session

        return self._opened(artifact, decided)

    def run_largest(self, session: OnnxSession, declared_rows: int | None = None) -> int:
        """Run once with as many rows as ``session`` may be given, so that its memory is at its peak.

        Args:
            declared_rows: what the configuration allows; None: as many as runs were measured with, at most.
        Returns:
            The rows; 0 where no input is known on which the model runs.
        """
        sample = session.sample
        if sample is None:
            return 0
        per_row = max(sample.count_elements(), 1)
        most = min(session.signature.max_rows, declared_rows or MAX_COST_ROWS, _LARGEST_ELEMENTS // per_row)
        rows = max(most, 1)
        with Watchdog(self._run_limit_s) as watchdog:
            try:
                Runner(session, watchdog).run(sample.batch([row % 3 for row in range(rows)]))
            except GatewayError:
                return 0
        return rows

    def _opened(self, artifact: Artifact, opened: Callable[[_Loader], OnnxSession]) -> OnnxSession:
        prepare_process()
        try:
            return opened(_Loader(artifact, self._providers))
        except ModelLoadError as error:
            reason = error.message
        except MemoryError:
            reason = "not enough memory"
        except OSError as error:
            reason = error.strerror or "the files cannot be read"
        # Raised out here, the error holds on to no frame, so to no session: what was loaded is gone and its memory too.
        memory.trim()
        raise ModelLoadError(f"failed to load '{artifact.name}' version {artifact.version}: {reason}")

    def _prepare(self, loader: _Loader, watchdog: Watchdog) -> OnnxSession:
        config = loader.artifact.config
        choice = loader.first_choice()
        session = loader.open(choice)
        notes = [*loader.notes, *loader.layout.notes]
        sample, why = find_sample(Runner(session, watchdog), config.warmup, loader.facts.bounded, self._run_limit_s)
        trial: tuple[TrialRow, ...] = ()
        if sample is None:
            notes.append(f"not measured: {why}")
        elif config.session.trial:
            session, choice, trial = self._try_options(loader, session, choice, sample, watchdog)
        runner = Runner(session, watchdog)
        exactness, batched, note = _judge_rows(loader, runner, sample)
        notes.append(note)
        if batched and sample is not None:
            for padding in config.batching.padding:
                note = probe_padding(runner, sample, padding)
                if note:
                    log.warning("model '%s': %s", loader.artifact.name, note)
                    notes.append(note)
        wanted = config.batching.enabled
        batchable = wanted is not False and (
            exactness in ("exact", "padded") or (exactness == "inexact" and wanted is True)
        )
        cost: tuple[CostPoint, ...] = ()
        inline = 0
        if not batched:
            session.settle(replace(session.signature, batched=False, max_rows=0))
        if sample is not None:
            sample = replace(sample, signature=session.signature)
            if config.session.trial:
                cost, inline, note = self._measure(loader, runner, sample, batchable)
                notes.append(note)
        if config.session.inline is not None:
            inline = ANY_SIZE if config.session.inline else 0
        if batchable and config.max_batch_size is None:
            session.settle(replace(session.signature, max_rows=_rows_within(cost, _BATCH_S)))
        _warm_up(runner, loader.artifact)
        session.sample = sample
        session.profile = Profile(
            row_exactness=exactness,
            batchable=batchable,
            inline_max_elements=inline,
            cost=cost,
            cost_row_elements=sample.count_elements() if sample is not None and cost else 0,
            trial=trial,
            execution_providers=loader.active_providers,
            intra_op_threads=choice.intra_op_threads,
            note="; ".join(filter(None, notes)),
        )
        return session

    def _measure(
        self, loader: _Loader, runner: Runner, sample: Sample, batchable: bool
    ) -> tuple[tuple[CostPoint, ...], int, str]:
        """The cost curve, the bound of inline runs, and why runs are not inline though short."""
        max_rows = (loader.artifact.config.max_batch_size or MAX_COST_ROWS) if batchable else 1
        cost = measure_cost(runner, sample, max_rows, self._measure_budget_s)
        if not cost or cost[0].seconds > self._inline_threshold_s:
            return cost, 0, ""
        if not loader.facts.bounded:
            return cost, 0, "not inline: values, not only shapes, decide how long a run takes"
        if any(spec.datatype == "BYTES" for spec in sample.signature.inputs):
            return cost, 0, "not inline: strings have no bound on their length"
        return cost, measure_inline(runner, sample, self._inline_threshold_s, self._measure_budget_s), ""

    def _try_options(
        self, loader: _Loader, session: OnnxSession, choice: Choice, sample: Sample, watchdog: Watchdog
    ) -> tuple[OnnxSession, Choice, tuple[TrialRow, ...]]:
        """Time other session options against the best so far, on the same input and in turn, and keep the fastest."""
        until = time.monotonic() + self._trial_budget_s
        best = Runner(session, watchdog)
        try:
            rows, inputs, seconds = _trial_input(loader, best, sample, self._trial_budget_s)
        except GatewayError:
            return session, choice, ()
        table = [TrialRow(str(choice), rows, seconds, True)]
        chosen = 0
        for change in loader.changes(seconds, self._cpus):
            other = replace(choice, **change)
            if loader.size_bytes > self._trial_max_bytes:
                table.append(TrialRow(str(other), rows, 0.0, False, "not tried: the model is too large to load twice"))
                continue
            if time.monotonic() + loader.last_load_s + 4 * seconds > until:
                table.append(TrialRow(str(other), rows, 0.0, False, "not tried: no time left"))
                continue
            opened = None
            try:
                opened = loader.open(other)
                noise = _noise(loader, best, sample)
                ours, theirs, note = self._compare(best, Runner(opened, watchdog), inputs, noise, choice, other, until)
            except GatewayError as error:
                table.append(TrialRow(str(other), rows, 0.0, False, f"failed: {error.message}"))
                if opened is not None:
                    opened.close()
                continue
            wins = not note and theirs < ours * _MARGIN
            table[chosen] = replace(table[chosen], chosen=not wins)
            table.append(TrialRow(str(other), rows, theirs * (table[chosen].seconds / ours), wins, note))
            if wins:
                session.close()
                session, best, choice, chosen, seconds = opened, Runner(opened, watchdog), other, len(table) - 1, theirs
            else:
                opened.close()
        return session, choice, tuple(table)

    def _compare(
        self,
        best: Runner,
        challenger: Runner,
        inputs: Arrays,
        noise: float,
        choice: Choice,
        other: Choice,
        until: float,
    ) -> tuple[float, float, str]:
        """Seconds of both, taken in turn, and why the challenger is out of the question."""
        gap = distance(best.run(inputs), challenger.run(inputs))
        note = f"results differ by {gap:.1g} of the largest value" if gap > max(_EQUAL, noise) else ""
        # A run that uses more processors leaves fewer to others: what counts is what all of them get done together.
        callers, their_callers = (max(self._cpus // c.intra_op_threads, 1) for c in (choice, other))
        names = best.session.signature.output_names
        ours = theirs = float("inf")
        for turn in range(5):
            if callers == their_callers:
                ours = min(ours, best.time(inputs, 0.02, repeats=3))
                theirs = min(theirs, challenger.time(inputs, 0.02, repeats=3))
            else:
                ours = min(ours, callers * throughput(partial(best.session.run, inputs, names), callers, 2))
                theirs = min(
                    theirs, callers * throughput(partial(challenger.session.run, inputs, names), their_callers, 2)
                )
            hopeless = turn > 0 and theirs > ours * (1 + _MARGIN) / 2
            if hopeless or time.monotonic() + 2 * (ours + theirs) > until:
                break
        return ours, theirs, note


class _Loader:
    """One model version while it is being opened: its file, its facts, and the sessions made of them."""

    layout: Layout

    def __init__(self, artifact: Artifact, providers: Sequence[str]) -> None:
        self.artifact = artifact
        self.notes: list[str] = []
        self._providers = self._available(artifact.config.session.providers or providers)
        if not artifact.path.is_file():
            raise ModelLoadError("the model file is missing")
        self.facts: GraphFacts = read_graph(artifact.path)
        self.size_bytes = artifact.path.stat().st_size + _external_bytes(artifact.path, self.facts)
        self.active_providers: tuple[str, ...] = ()
        self.last_load_s = 0.0
        self.stays_mapped = (
            artifact.config.max_batch_size == 1
            and self.facts.readable
            and bool(self.facts.external)
            and self.size_bytes >= _MAPPED_BYTES
            and not self.facts.operators & _PACKED
        )
        """Weights are used as they lie in their file: nothing is copied, and all processes that map it share its pages.
        One row at a time runs about as fast as from packed weights (4 GB: 135 ms and 125), several take twice as long
        and more, so it is for models that never get more than one."""

    def _available(self, wanted: Sequence[str]) -> list[str]:
        present = ort.get_available_providers()
        missing = [name for name in wanted if name not in present]
        found = [name for name in wanted if name in present]
        if not missing:
            return found
        message = (
            f"execution provider {', '.join(missing)} is not in this build of ONNX Runtime, which has "
            f"{', '.join(present)}"
        )
        if not found:
            raise ModelLoadError(f"{message}: install the package that has it, or name another")
        log.warning("model '%s': %s; it runs on %s", self.artifact.name, message, found[0])
        self.notes.append(message)
        return found

    def first_choice(self) -> Choice:
        options = self.artifact.config.session
        return Choice(options.intra_op_threads or 1, options.disabled_optimizers or ())

    def changes(self, seconds: float, cpus: int) -> list[dict[str, Any]]:
        """What is worth a try: only what the configuration leaves open and could matter to this graph."""
        options = self.artifact.config.session
        operators = self.facts.operators
        found: list[dict[str, Any]] = []
        normalises = operators & _NORMALISATION or {"ReduceMean", "Sqrt"} <= operators or not self.facts.readable
        if options.disabled_optimizers is None and normalises:
            # The fused kernel takes 0.45 ms where Add and LayerNormalization take 0.08. Other fusions and lower levels
            # of optimisation were never faster on nine models (2026-11, onnxruntime 1.32), so they are not tried.
            found.append({"disabled_optimizers": ("SkipLayerNormFusion",)})
        if options.intra_op_threads is None and cpus > 1 and seconds > _LONG_RUN_S:
            found.append({"intra_op_threads": cpus})
        return found

    def open(self, choice: Choice) -> OnnxSession:
        """A session with these options.

        Raises:
            ModelLoadError: the runtime refuses the file, or the configuration contradicts the graph.
        """
        name = self.artifact.name
        options = _session_options(choice, name)
        if self.stays_mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self.artifact.config.session.extensions:
            extensions.register(options)
        started = time.perf_counter()
        try:
            session = ort.InferenceSession(
                str(self.artifact.path),
                options,
                providers=self._providers,
                disabled_optimizers=list(choice.disabled_optimizers),
                enable_fallback=0,
            )
        except Exception as error:
            # The runtime's exceptions have no common base, and odd metadata raises UnicodeDecodeError.
            raise ModelLoadError(explain(error)) from None
        self.last_load_s = time.perf_counter() - started
        active = tuple(session.get_providers())
        if not self.active_providers and active[0] != self._providers[0]:
            log.warning("model '%s': %s could not be set up; it runs on %s", name, self._providers[0], active[0])
            self.notes.append(f"{self._providers[0]} could not be set up")
        self.active_providers = active
        optional = declared(session.get_overridable_initializers(), self.facts, optional=True)
        self.layout = make_layout(
            declared(session.get_inputs(), self.facts) + overridable(optional, self.facts, self.artifact.config),
            declared(session.get_outputs(), self.facts),
            self.artifact.config,
        )
        return OnnxSession(session, name, self.layout, choice)


def prepare_process() -> None:
    """Set up what ONNX Runtime and the C library have once per process. Called by the first ``open``.

    Memory that a model frees goes back to the system, and what the runtime has to say goes to the logger
    ``onnxruntime`` instead of standard error.
    """
    global _prepared
    with _prepare_lock:
        if _prepared:
            return
        _prepared = True
        memory.return_freed_memory()
        set_callback = getattr(ort, "set_default_logger_callback", None)
        if set_callback is not None:
            set_callback(_log_runtime, 2)
        else:
            # Older runtimes can only be told to be quiet.
            ort.set_default_logger_severity(3)


def _log_runtime(severity: int, category: str, log_id: str, place: str, message: str) -> None:
    runtime_log.log(_SEVERITIES[min(severity, 4)], "%s [%s, %s]", message, log_id or category, place)


def _session_options(choice: Choice, name: str) -> Any:
    options = ort.SessionOptions()
    # Throughput comes from several runs at once, each in one thread: MiniLM does 390 sentences/s with two callers of
    # one thread each, 318 with one caller of two threads (2026-11, 2 cpus).
    options.intra_op_num_threads = choice.intra_op_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.logid = name
    # What fails in a run is raised too; logging it as well would let callers fill the log.
    options.log_severity_level = 4
    return options


def _external_bytes(path: Path, facts: GraphFacts) -> int:
    """The size of the model's data files, each of which must lie in the model's own folder."""
    folder = path.parent.resolve()
    total = 0
    for location in facts.external:
        file = (folder / location).resolve()
        if "\\" in location or Path(location).is_absolute() or not file.is_relative_to(folder):
            raise ModelLoadError(f"external data '{location}' is outside the model's folder")
        if not file.is_file():
            raise ModelLoadError(f"external data '{location}' is missing")
        total += file.stat().st_size
    return total


def _trial_input(loader: _Loader, runner: Runner, sample: Sample, budget_s: float) -> tuple[int, dict[str, Any], float]:
    """A batch as it will be run, where there is time for a dozen of them, else one row; and how long it takes."""
    single = sample.batch([0])
    seconds = runner.time(single, 0.02)
    alone = loader.facts.operators & DYNAMIC_QUANTISATION and loader.artifact.config.batching.enabled is not True
    if sample.signature.batched and not alone and seconds * 8 * 12 < budget_s:
        batch = sample.batch(range(8))
        try:
            return 8, batch, runner.time(batch, 0.05)
        except GatewayError:
            pass
    return 1, single, seconds


def _noise(loader: _Loader, runner: Runner, sample: Sample) -> float:
    """How far a dynamically quantised row is from itself in other company.

    Rounding differences far below any that matter push values over the edge of a quantisation step, and layers of that
    add up. Two ways to run such a model are equal when they differ less than each of them does by itself.
    """
    if not sample.signature.batched or not loader.facts.operators & DYNAMIC_QUANTISATION:
        return 0.0
    alone = runner.run(sample.batch([0]))
    paired = [result[:1] for result in runner.run(sample.batch([0, 1]))]
    gap = distance(alone, paired)
    return gap if gap < 1.0 else 0.0


def _judge_rows(loader: _Loader, runner: Runner, sample: Sample | None) -> tuple[RowExactness, bool, str]:
    """What rows may do together, whether axis 0 counts as a batch axis, and why not more."""
    layout = loader.layout
    if not layout.signature.batched:
        return "unbatched", False, f"not batched: {layout.why_unbatched}"
    if sample is None:
        # Whoever wrote max_batch_size knows that rows are rows; that they do not depend on each other stays unproved.
        return ("inexact", True, "") if layout.vouched else ("unbatched", False, "")
    exactness, note = probe_rows(runner, sample, loader.artifact.config.max_batch_size or None)
    if exactness == "unbatched":
        return exactness, False, f"not batched: {note}"
    if exactness != "inexact" and (found := loader.facts.operators & DYNAMIC_QUANTISATION):
        exactness, note = "inexact", f"{min(found)} takes one scale from all rows of a batch"
    if exactness == "inexact":
        first_axes = {spec.axes[0] if spec.axes else None for spec in layout.signature.inputs}
        related = len(layout.signature.inputs) == 1 or (len(first_axes) == 1 and None not in first_axes)
        if not layout.vouched and not related and not loader.facts.operators & DYNAMIC_QUANTISATION:
            # Several inputs of unrelated length, such as queries against documents: callers may need them to differ.
            return "unbatched", False, f"not batched: {note}"
    return exactness, True, note


def _rows_within(cost: Sequence[CostPoint], limit_s: float) -> int:
    """The largest power of two of rows that takes about ``limit_s``, from the cost of the largest batch measured."""
    if not cost:
        return _UNMEASURED_ROWS
    row_s = cost[-1].seconds / cost[-1].rows
    rows = 1
    while rows < _MAX_DERIVED_ROWS and 2 * rows * row_s <= limit_s:
        rows *= 2
    return rows


def _warm_up(runner: Runner, artifact: Artifact) -> None:
    for warmup in artifact.config.warmup:
        inputs = warmup_inputs(warmup, runner.session.signature)
        try:
            for _ in range(warmup.count):
                runner.run(inputs)
        except DeadlineExceededError:
            raise ModelLoadError(f"warm-up '{warmup.name}' did not end in time") from None
        except GatewayError as error:
            raise ModelLoadError(f"warm-up '{warmup.name}' failed: {error.message}") from None
