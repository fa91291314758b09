"""``inferway.package``: a model with everything that is known of it, as a folder that ``deploy`` takes.

    model.onnx              the graph; beyond 2 GiB its weights are in model.onnx.data
    golden.json             inputs with the source model's outputs, which a gateway runs before the version serves
    classes.txt             a classifier's labels, one a line, in the order of its scores
    config.pbtxt            says which output they belong to
    inferway-package.json   labels, metadata (source, metrics, verification) and signature

There is no time and no machine in it: the same model makes the same folder, and so the same version.
"""

from __future__ import annotations

import html
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, SupportsFloat

from .._calls import plain
from .._errors import ConfigurationError
from .._golden import GOLDEN_FILE, Golden, golden_json
from .._package import FACTS_FILE, MODEL_FILE, Offer
from .._signature import TensorSpec
from .._tensors import quoted_names
from .export import to_onnx
from .model import Label, OnnxModel, cut_golden
from .source import Dynamic

CLASSES_FILE: Final = "classes.txt"
CONFIG_FILE: Final = "config.pbtxt"
_OURS: Final = (MODEL_FILE, f"{MODEL_FILE}.data", GOLDEN_FILE, CLASSES_FILE, CONFIG_FILE, FACTS_FILE)


@dataclass(frozen=True)
class Package:
    """A folder that ``client.models.deploy`` and ``inferway deploy`` take.

    Attributes:
        path: the folder.
        model: what is in it.
        name: of the model, where one was given.
        labels, metadata: those that a deployment will have.
        files: name to bytes.
    """

    path: Path
    model: OnnxModel = field(repr=False)
    name: str | None
    labels: Mapping[str, str]
    metadata: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, int]

    def __inferway_source__(self) -> Offer:
        return Offer(self.path)

    def __str__(self) -> str:
        lines = [f"{self.path}"]
        lines += [f"  {name:24}{size:>12,} bytes" for name, size in self.files.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td><td>{size:,}</td></tr>"
            for name, size in self.files.items()
        )
        return f"<table><caption style='text-align:left'><b>{html.escape(str(self.path))}</b></caption>{rows}</table>"


def package(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    example: object = None,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    classes: Sequence[Label] | None = None,
    golden: int | Golden = 8,
    metrics: Mapping[str, SupportsFloat] | None = None,
    metadata: Mapping[str, Any] | None = None,
    dynamic: Dynamic = None,
    overwrite: bool = False,
) -> Package:
    """Write a model and what is known of it into a folder.

    Args:
        model: an `OnnxModel`, a report or a wrapped model, which have one as ``model`` or ``onnx``, or anything that
            `to_onnx` takes; then with ``example`` and ``dynamic``. What a report, a wrapped model or another package
            knows goes along: labels, metadata and golden examples.
        folder: is made. One that has files of other origin is refused.
        name: kept with it, as the name that is meant.
        labels: short texts to find the version by; ``framework`` is there already.
        classes: labels of a classifier's scores, instead of those that it was taught.
        golden: how many rows of the example to keep with the source's outputs, or golden examples as
            ``client.models.deploy`` takes them; 0 for none.
        metrics: scores that were measured, such as ``{"accuracy": 0.97}``; kept in the metadata.
        metadata: anything that JSON has.
        overwrite: replace a package that is there.
    Raises:
        ConfigurationError: an argument cannot be used, or the folder has something else in it.
        BuildError: see `to_onnx`.
        InvalidInputError: a golden example does not fit the model's signature.
    """
    made = model_of(model, example, dynamic)
    if classes is not None:
        made = made.with_classes(classes)
    target = Path(folder)
    offer = _known_of(model, made)
    kept = {
        **offer.metadata,
        **({"metrics": {key: float(value) for key, value in metrics.items()}} if metrics else {}),
        **(metadata or {}),
    }
    said = plain("labels", {**offer.labels, **(labels or {})})
    known = plain("metadata", kept)
    facts = {
        "name": name,
        "labels": said,
        "metadata": known,
        "signature": {
            "inputs": [_spec(spec) for spec in made.inputs],
            "outputs": [_spec(spec) for spec in made.outputs],
        },
    }
    examples = _examples(model, made, offer, golden) if isinstance(golden, int) else golden
    text = golden_json(examples, made.signature) if examples else None
    _make_room(target, overwrite)  # last, for the package that is replaced may be the one that was given
    made.save(target / MODEL_FILE)
    if text is not None:
        (target / GOLDEN_FILE).write_bytes(text)
    scores = made.scores
    if made.classes is not None and scores is not None:
        (target / CLASSES_FILE).write_text("".join(f"{_line(label)}\n" for label in made.classes), "utf-8")
        (target / CONFIG_FILE).write_text(_config(made.outputs, scores), "utf-8")
    (target / FACTS_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir()) if path.name in _OURS}
    return Package(target, made, name, said, known, files)


def model_of(model: Any, example: object = None, dynamic: Dynamic = None) -> OnnxModel:
    """The `OnnxModel` that is meant: itself, the one that an object holds, or what `to_onnx` makes of it."""
    if isinstance(model, OnnxModel):
        return model
    if isinstance(model, Package):
        return model.model
    for member in ("onnx", "model"):
        held = None if isinstance(model, type) else getattr(model, member, None)
        if isinstance(held, OnnxModel):
            return held
    give = getattr(model, "__inferway_source__", None)
    if give is not None and not isinstance(model, type):
        return model_of(give().model)
    return to_onnx(model, example, dynamic=dynamic)


def _known_of(given: Any, made: OnnxModel) -> Offer:
    """What is known of a model by the object that was given for it, which may know more than the graph does."""
    if isinstance(given, Package):
        return Offer(made.proto, given.labels, given.metadata)
    give = getattr(given, "__inferway_source__", None)
    offer: Offer = made.__inferway_source__() if give is None or isinstance(given, type) else give()
    return offer


def _examples(given: Any, made: OnnxModel, offer: Offer, rows: int) -> Golden | None:
    """Golden examples of the object that was given. An optimised graph has outputs of its own, which its report knows:
    those of what it was made from are another model's."""
    if isinstance(given, Package):
        there = given.path / GOLDEN_FILE
        return there if rows > 0 and there.is_file() else None
    if isinstance(given, OnnxModel) or not isinstance(offer.golden, list | tuple):
        return made.golden(rows)
    return [cut_golden(example, rows) for example in offer.golden] if rows > 0 else None


def _make_room(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigurationError(f"expected {target} to be a folder, and it is a file; choose another path")
    target.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in target.iterdir())
    foreign = [name for name in there if name not in _OURS]
    if foreign:
        raise ConfigurationError(
            f"{target} has files of other origin, {quoted_names(foreign)}, which would be deployed too; choose an "
            f"empty folder"
        )
    if there and not overwrite:
        raise ConfigurationError(f"{target} has a package already; give overwrite=True to replace it, or another path")
    for name in there:
        (target / name).unlink() if not (target / name).is_dir() else shutil.rmtree(target / name)


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _line(label: Label) -> str:
    return " ".join(str(label).split())


def _config(outputs: Sequence[TensorSpec], scores: TensorSpec) -> str:
    """Every output, because a configuration that lists some offers these and no others. What the graph says itself,
    types and shapes, is left to it."""
    lines = []
    for spec in outputs:
        name = spec.name.replace("\\", "\\\\").replace('"', '\\"')
        labelled = f' label_filename: "{CLASSES_FILE}"' if spec.name == scores.name else ""
        lines.append(f'  {{ name: "{name}"{labelled} }}')
    return "output [\n" + ",\n".join(lines) + "\n]\n"
