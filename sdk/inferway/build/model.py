"""A model as ONNX, with where it came from and how it was held against that: `OnnxModel`."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias

from .._errors import ConfigurationError
from .._inputs import fit
from .._onnx import read_facts
from .._package import Offer
from .._signature import ModelMetadata, TensorSpec
from .._tensors import Array
from .example import Arrays
from .runtime import open_session, run, save
from .verify import Verification

Label: TypeAlias = str | int | float | bool
"""A class, as the classifier was taught it."""

GOLDEN_ROWS: Final = 8
GOLDEN_VALUES: Final = 200_000
"""Of all tensors of the golden examples: a fifth of what a gateway reads."""
GOLDEN_RTOL: Final = 1e-3
GOLDEN_ATOL: Final = 1e-5
"""The gateway's own tolerances."""
METADATA_BYTES: Final = 16 << 10
"""Of classes and of columns each; a gateway keeps 64 KiB of metadata."""


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """A model in ONNX that was found to compute what its source computes.

    Attributes:
        proto: the ``onnx.ModelProto``, with all its weights.
        framework: where it came from: ``keras``, ``torch``, ``sklearn``, ``xgboost``, ``lightgbm``, ``catboost``,
            ``onnx``.
        backend: of Keras: ``torch``, ``tensorflow`` or ``jax``; else None.
        classes: the labels of a classifier, in the order of its scores; else None.
        columns: names of the columns where the example was a data frame; else empty.
        verification: the runs in which graph and source agreed; None for ONNX that was given as such.
        source_digest: ``sha256:…`` of the source model's structure and weights.
        examples: inputs with the outputs of the source, by name, as golden examples want them.
    """

    proto: Any = field(repr=False)
    framework: str
    backend: str | None = None
    classes: tuple[Label, ...] | None = None
    columns: tuple[str, ...] = ()
    verification: Verification | None = None
    source_digest: str = ""
    examples: tuple[tuple[Arrays, Arrays], ...] = field(default=(), repr=False)

    @cached_property
    def signature(self) -> ModelMetadata:
        """What it takes and gives."""
        import onnx

        head = onnx.ModelProto()
        head.graph.input.extend(self.proto.graph.input)
        head.graph.output.extend(self.proto.graph.output)
        initialized = {tensor.name for tensor in self.proto.graph.initializer}
        for name in initialized & {value.name for value in self.proto.graph.input}:
            head.graph.initializer.add(name=name)
        found = read_facts(head.SerializeToString()).signature
        return found or ModelMetadata(name="the model", versions=(), platform="onnx", inputs=(), outputs=())

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, datatype and shape of each input; -1 is variable."""
        return self.signature.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, datatype and shape of each output."""
        return self.signature.outputs

    @property
    def size(self) -> int:
        """Bytes of the model as a file."""
        return int(self.proto.ByteSize())

    def to_bytes(self) -> bytes:
        """The model as the content of an ``.onnx`` file; the same for the same model.

        Raises:
            ValueError: it is longer than 2 GiB, which no message can be; `save` parts it.
        """
        data: bytes = self.proto.SerializeToString(deterministic=True)
        return data

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an ``.onnx`` file, replacing what was there.

        A model of more than 2 GiB keeps its weights beside it, in ``NAME.onnx.data``. Folders are made.

        Raises:
            OSError: it cannot be written.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        save(self.proto, target)
        return target

    @cached_property
    def _session(self) -> Any:
        return open_session(self.proto)

    def run(self, inputs: object) -> dict[str, Array]:
        """Run it here, in ONNX Runtime on the CPU.

        Args:
            inputs: arrays, tensors, lists, images or a data frame, as `ModelHandle.infer` takes them.
        Returns:
            Output name to array.
        Raises:
            InvalidInputError: the inputs do not fit the signature.
            MissingExtraError: onnxruntime is not installed.
        """
        return run(self._session, {spec.name: array for spec, array in fit(self.signature, inputs)})

    def predict(self, inputs: object, *, outputs: Sequence[str] | None = None) -> Array | dict[str, Array]:
        """`run` with nothing around the arrays: the array of a single output, else output name to array.

        Args:
            inputs: see `run`.
            outputs: those that are wanted; None for all.
        """
        found = self.run(inputs)
        if outputs is not None:
            found = {name: found[name] for name in outputs}
        return next(iter(found.values())) if len(found) == 1 else found

    @property
    def scores(self) -> TensorSpec | None:
        """The output that has a number for each class; None where there is none, or are several."""
        if self.classes is None:
            return None
        found = [
            spec
            for spec in self.outputs
            if len(spec.shape) == 2 and spec.shape[1] == len(self.classes) and spec.datatype.startswith("FP")
        ]
        return found[0] if len(found) == 1 else None

    def with_classes(self, classes: Sequence[Label]) -> OnnxModel:
        """The same with labels for a classifier's scores.

        Raises:
            ConfigurationError: no output, or more than one, has as many numbers for a row.
        """
        made = replace(self, classes=tuple(classes))
        if made.scores is None:
            raise ConfigurationError(
                f"{len(classes)} classes need one output of shape [-1, {len(classes)}], the model gives "
                f"{', '.join(map(str, self.outputs))}"
            )
        return made

    def golden(self, rows: int = GOLDEN_ROWS) -> list[tuple[Arrays, Arrays, dict[str, float]]]:
        """The first rows of the example with the source's outputs, as ``client.models.deploy`` takes golden examples.

        Fewer than ``rows`` where they are large: a gateway reads 16 MiB of them. None where one row is too large.
        """
        found: list[tuple[Arrays, Arrays, dict[str, float]]] = []
        for inputs, outputs in self.examples:
            total = sum(array.size for array in (*inputs.values(), *outputs.values()))
            held = max((len(array) for array in inputs.values() if array.ndim), default=1)
            fit = min(rows, held, GOLDEN_VALUES * held // max(1, total))
            if fit < 1:
                continue
            allowed = {"rtol": GOLDEN_RTOL, "atol": max(GOLDEN_ATOL, self.tolerance)}
            found.append((_head(inputs, held, fit), _head(outputs, held, fit), allowed))
        return found

    @property
    def tolerance(self) -> float:
        """The largest absolute difference that was allowed in the verification; 0 without one."""
        return (
            0.0 if self.verification is None else max((case.tolerance for case in self.verification.cases), default=0.0)
        )

    def __inferway_source__(self) -> Offer:
        source: dict[str, Any] = {"framework": self.framework}
        if self.backend is not None:
            source["backend"] = self.backend
        if self.source_digest:
            source["digest"] = self.source_digest
        metadata: dict[str, Any] = {"source": source}
        if self.verification is not None:
            metadata["verification"] = {
                "cases": len(self.verification.cases),
                "max_abs": self.verification.max_abs,
                "tolerance": self.tolerance,
            }
        for name, values in (("classes", self.classes), ("columns", self.columns)):
            if values and len(json.dumps(values)) <= METADATA_BYTES:
                metadata[name] = list(values)
        return Offer(self.proto, {"framework": self.framework}, metadata, self.golden() or None)

    @property
    def _facts(self) -> list[tuple[str, str]]:
        source = self.framework + (f" on {self.backend}" if self.backend else "")
        facts = [("from", source), ("size", _size_text(self.size))]
        facts += [("in", str(spec)) for spec in self.inputs]
        facts += [("out", str(spec)) for spec in self.outputs]
        if self.classes is not None:
            shown = ", ".join(map(str, self.classes[:8])) + (", …" if len(self.classes) > 8 else "")
            facts.append(("classes", f"{len(self.classes)}: {shown}"))
        facts.append(("verified", "not held against a source" if self.verification is None else str(self.verification)))
        return facts

    def __repr__(self) -> str:
        lines = [f"  {name:9}{value}" for name, value in self._facts]
        return "\n".join(["OnnxModel", *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._facts
        )
        return f"<table><caption style='text-align:left'><b>OnnxModel</b></caption>{rows}</table>"

    def __getstate__(self) -> dict[str, Any]:
        # A session belongs to its process.
        return {name: value for name, value in self.__dict__.items() if name != "_session"}


def cut_golden(example: Any, rows: int) -> Any:
    """A golden example with its first rows alone; as it is, where it has no rows that could be told."""
    inputs, outputs, *allowed = example
    if not isinstance(inputs, Mapping) or not isinstance(outputs, Mapping):
        return example
    held = max((len(array) for array in inputs.values() if array.ndim), default=1)
    return (_head(inputs, held, rows), _head(outputs, held, rows), *allowed)


def _head(arrays: Arrays, rows: int, wanted: int) -> Arrays:
    return {name: array[:wanted] if array.ndim and len(array) == rows else array for name, array in arrays.items()}


def _size_text(size: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
