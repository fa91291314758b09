"""Which ways to try on which model, each as a plan that makes one candidate."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Final, Literal

from ..._errors import ConfigurationError
from ..._tensors import quoted_names
from ..model import OnnxModel
from . import prune, quantise
from .data import Rows
from .quantise import Calibration, Facts

TECHNIQUES: Final = (
    "graph",
    "static_int8",
    "dynamic_int8",
    "int8_weights",
    "int4_weights",
    "fp16",
    "bf16",
    "magnitude",
    "structured",
)
"""What the argument ``techniques`` knows, in the order in which candidates are listed."""
_METHODS: Final[tuple[Calibration, ...]] = ("minmax", "entropy", "percentile")
_HEAVY: Final = 0.3
"""Share of the constants' bytes in matrices from which a transformer counts as made of products."""
_TINY_BYTES: Final = 4096
CONVOLUTION_REASON: Final = (
    "the model has convolutions, whose dynamically quantised kernel is 6 to 9 times slower than FP32; static int8 is "
    "the way for those"
)
_MAGNITUDE_REASON: Final = (
    "zeros alone make nothing faster, they only compress better; techniques=['magnitude'] measures it"
)


@dataclass(frozen=True)
class Plan:
    """One candidate to be made.

    Attributes:
        make: gives the candidate; what it raises is the reason in its row.
    """

    name: str
    technique: str
    make: Callable[[], OnnxModel]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skip:
    """A technique that is not tried on this model, and why."""

    name: str
    technique: str
    reason: str


@dataclass
class Workbench:
    """What plans are made of.

    Attributes:
        model: the original.
        rows: to calibrate with.
        source: the framework's model; None where only ONNX was given.
        example: inputs as ``source`` takes them.
        export: makes ONNX of a model like ``source``.
        fine_tune: trains such a model, in place; None where there is no way to.
        sparsity: share that pruning takes away.
    """

    model: OnnxModel
    rows: Rows
    source: Any
    example: object
    export: Callable[[Any], OnnxModel]
    fine_tune: Callable[[Any], object] | None
    sparsity: float
    _pruned: dict[str, OnnxModel] = field(default_factory=dict[str, OnnxModel])

    @cached_property
    def facts(self) -> Facts:
        # A copy, because nodes without names are given some.
        return quantise.read_graph(quantise.copied(self.model.proto))

    @cached_property
    def prepared(self) -> Any:
        return quantise.prepared(self.model.proto)

    def changed(self, proto: Any) -> OnnxModel:
        """The original with another graph. How the original was verified, and its example, say nothing of that."""
        return replace(self.model, proto=proto, verification=None, examples=())

    def magnitude(self) -> OnnxModel:
        """The model with zeros, trained around them."""
        assert self.fine_tune is not None
        return self.export(prune.magnitude(self.source, self.sparsity, self.fine_tune))

    def structured(self) -> OnnxModel:
        """The narrower model; made once, because it is trained."""
        if "structured" not in self._pruned:
            assert self.fine_tune is not None
            self._pruned["structured"] = self.export(
                prune.structured(self.source, self.example, self.sparsity, self.fine_tune)
            )
        return self._pruned["structured"]


def families(techniques: str | Sequence[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Check what was asked for.

    Returns:
        The families in their order, and the variants that were named (``static_int8/entropy``); both are those of all
        for ``auto``.
    Raises:
        ConfigurationError: a name is unknown, or none was given.
    """
    if isinstance(techniques, str):
        named: Sequence[str] = TECHNIQUES if techniques == "auto" else [techniques]
    else:
        named = list(techniques)
    if not named:
        raise ConfigurationError("techniques is empty: give 'auto', or some of " + quoted_names(list(TECHNIQUES)))
    known = [*TECHNIQUES, *(f"static_int8/{method}" for method in (*_METHODS, "equalised"))]
    for name in named:
        if name not in known:
            near = difflib.get_close_matches(str(name).replace("-", "_"), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(
                f"unknown technique {name!r}, expected 'auto' or some of {quoted_names(list(TECHNIQUES))}{hint}"
            )
    wanted = {name.partition("/")[0] for name in named}
    variants = frozenset(name.partition("/")[2] for name in named if "/" in name)
    return tuple(name for name in TECHNIQUES if name in wanted), variants


def plan(bench: Workbench, techniques: str | Sequence[str]) -> tuple[list[Plan], list[Skip]]:
    """What to try on this model, and what not.

    Raises:
        ConfigurationError: see `families`.
    """
    wanted, variants = families(techniques)
    auto = techniques == "auto"
    planner = _Planner(bench, auto, variants)
    for family in wanted:
        getattr(planner, f"_{family}")()
    return planner.plans, planner.skips


class _Planner:
    def __init__(self, bench: Workbench, auto: bool, variants: frozenset[str]) -> None:
        self.bench = bench
        self.auto = auto
        self.variants = variants
        self.plans: list[Plan] = []
        self.skips: list[Skip] = []

    def _add(self, name: str, technique: str, make: Callable[[], Any], *notes: str) -> None:
        bench = self.bench

        def made() -> OnnxModel:
            found = make()
            return found if isinstance(found, OnnxModel) else bench.changed(found)

        self.plans.append(Plan(name, technique, made, notes))

    def _skip(self, name: str, technique: str, reason: str) -> None:
        self.skips.append(Skip(name, technique, reason))

    def _quantisable(self, name: str, technique: str) -> bool:
        facts = self.bench.facts
        if facts.quantised:
            self._skip(name, technique, "the model is quantised already")
        elif facts.double and not facts.weighted:
            self._skip(name, technique, "the model computes in FP64; exported with FP32 inputs it could be")
        elif not facts.weighted and not facts.convolutional:
            self._skip(name, technique, "the model has no products with constant matrices and no convolutions")
        else:
            return True
        return False

    def _graph(self) -> None:
        self._add(
            "graph optimised",
            "graph",
            lambda: quantise.graph_optimised(self.bench.model.proto),
            "the gateway does the same when it loads a model, so this mostly shortens loading",
        )

    def _static_int8(self) -> None:
        if not self._quantisable("static int8", "static_int8"):
            return
        bench = self.bench
        transformer = bench.facts.transformer
        ways = self.variants or ({"minmax", "equalised"} if transformer else set(_METHODS))
        if "equalised" in ways:
            self._add(
                "static int8 (equalised)",
                "static_int8",
                lambda: self._static(bench.model, "minmax", equalised=True),
                "large channels of activations were moved into the weights first",
            )
        for method in _METHODS:
            if method in ways:
                self._add(f"static int8 ({method})", "static_int8", partial(self._static, bench.model, method))

    def _static(self, model: OnnxModel, method: Calibration, *, equalised: bool = False) -> Any:
        bench = self.bench
        proto = bench.prepared if model is bench.model else quantise.prepared(model.proto)
        facts = quantise.read_graph(proto)
        if equalised:
            proto = quantise.equalise(proto, facts, bench.rows)
            facts = quantise.read_graph(proto)
        return replace(
            model, proto=quantise.static_int8(proto, facts, bench.rows, method), verification=None, examples=()
        )

    def _dynamic_int8(self) -> None:
        name = "dynamic int8"
        if not self._quantisable(name, "dynamic_int8"):
            return
        if self.bench.facts.convolutional:
            self._skip(name, "dynamic_int8", CONVOLUTION_REASON)
            return
        self._add(
            name,
            "dynamic_int8",
            lambda: quantise.dynamic_int8(self.bench.model.proto),
            "one scale for all rows of a run makes a row's result depend on its company, so the gateway runs each "
            "request alone unless [batching] enabled = true says otherwise",
        )

    def _int8_weights(self) -> None:
        self._blocks("int8 block weights", "int8_weights", 8)

    def _int4_weights(self) -> None:
        self._blocks("int4 block weights", "int4_weights", 4)

    def _blocks(self, name: str, technique: str, bits: int) -> None:
        facts = self.bench.facts
        if not self._quantisable(name, technique):
            return
        if not facts.weighted:
            self._skip(name, technique, "the model has no products with constant matrices")
        elif self.auto and not (facts.transformer and facts.weight_share >= _HEAVY):
            self._skip(name, technique, "pays for transformers made of large products, and this is none")
        else:
            self._add(name, technique, lambda: quantise.block_weights(self.bench.model.proto, bits))

    def _fp16(self) -> None:
        self._half("fp16")

    def _bf16(self) -> None:
        if self.auto:
            self._skip("bf16 weights", "bf16", "halves the file as fp16 does, with fewer digits, and gains no speed")
        else:
            self._half("bf16")

    def _half(self, kind: Literal["fp16", "bf16"]) -> None:
        if self.bench.facts.float_bytes < _TINY_BYTES:
            self._skip(f"{kind} weights", kind, "the model has hardly any FP32 constants")
            return
        self._add(
            f"{kind} weights",
            kind,
            lambda: quantise.stored_half(self.bench.model.proto, kind),
            "halves the file; processors compute in FP32 all the same, so it gains no speed here",
        )

    def _trainable(self, name: str, technique: str) -> bool:
        bench = self.bench
        if prune.framework_of(bench.source) is None:
            self._skip(name, technique, "needs the Keras or PyTorch model; give that in place of its ONNX")
        elif bench.fine_tune is None:
            self._skip(
                name, technique, "needs training afterwards: give fine_tune, or use inferway.wrap(model).optimize()"
            )
        else:
            return True
        return False

    def _magnitude(self) -> None:
        bench = self.bench
        share = f"{bench.sparsity:.0%}"
        name = f"magnitude pruning {share}"
        note = "zeros make nothing faster; what is gained is the compressed size"
        trainable = prune.framework_of(bench.source) is not None and bench.fine_tune is not None
        if self.auto and not trainable:
            self._skip(name, "magnitude", _MAGNITUDE_REASON)
        elif trainable:
            self._add(
                name,
                "magnitude",
                bench.magnitude,
                note,
            )
        else:
            self._add(
                name,
                "magnitude",
                lambda: prune.magnitude_onnx(bench.model.proto, bench.sparsity),
                note,
                "it was not trained afterwards",
            )

    def _structured(self) -> None:
        bench = self.bench
        name = f"structured pruning {bench.sparsity:.0%}"
        if not self._trainable(name, "structured"):
            return
        note = "it was trained longer than the original: a gain of the metric is the training's, not the pruning's"
        self._add(name, "structured", bench.structured, note)
        if not bench.facts.quantised:
            self._add(
                f"{name} + static int8",
                "structured+static_int8",
                lambda: self._static(bench.structured(), "minmax"),
                note,
            )
