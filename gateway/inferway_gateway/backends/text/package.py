"""What lies beside a graph and makes it a text encoder: read once, when the version is loaded.

``[text]`` of ``inferway.toml`` goes before everything. What it leaves open is taken from the files that
sentence-transformers and transformers write beside their models, and from the graph: its inputs, the rank and the width
of its outputs. A graph with a ``tokenizer.json`` of which nothing says what it is for stays a model of tensors, and the
log says what to write; what was declared and does not fit is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import orjson

from ...core.backend import Artifact
from ...core.encoding import Activation, Pooling, Task, TextPackage, TextSpec, TextTokenizer
from ...core.errors import ModelLoadError
from ...core.model_config import ModelConfig, PaddingAxis, TextOptions
from ...core.tensors import Signature, TensorSpec
from .isolated import IsolatedTokenizer
from .tokenizer import MAX_BYTES, MISSING, LoadedTokenizer, TokenizerError, read_limited

_log = logging.getLogger("inferway.models")

TOKENIZER_FILE: Final = "tokenizer.json"
MAX_JSON_BYTES: Final = 4 * 1024 * 1024
DEFAULT_MAX_TOKENS: Final = 512

_INPUTS: Final[Mapping[str, str]] = {
    "input_ids": "ids",
    "attention_mask": "mask",
    "token_type_ids": "types",
    "segment_ids": "types",
    "position_ids": "positions",
}
_POOLED: Final = ("sentence_embedding", "embeddings", "text_embeds")
_TOKENS: Final = ("last_hidden_state", "token_embeddings", "hidden_states")
_MODES: Final[Mapping[str, Pooling]] = {
    "cls_token": "cls", "cls": "cls", "mean_tokens": "mean", "mean": "mean", "max_tokens": "max", "max": "max",
    "lasttoken": "last",
}  # fmt: skip
_FLOATS: Final = ("FP32", "FP16", "FP64")
_TRUNCATION: Final = re.compile(rb'"truncation"\s*:\s*(\{[^{}]{0,500}\})')
_UNSAID: Final = 1_000_000
"""transformers write a number beyond it for a tokenizer without a bound."""


class _PackageError(Exception):
    """The files do not make a text encoder of the model; the message says why."""


@dataclass(slots=True)
class _Said:
    """What sentence-transformers' and transformers' files say."""

    config: Mapping[str, Any] = field(default_factory=dict)
    pooling: Pooling | None = None
    modules: bool = False
    normalise: bool = False
    foreign: str = ""
    max_tokens: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None


def read_package(artifact: Artifact, signature: Signature, *, isolated: bool = False) -> TextPackage | None:
    """``TextReader`` of ``core/encoding.py``.

    Args:
        isolated: the tokenizer is read and run in processes of its own.
    """
    declared = artifact.config.text
    where = f"failed to load '{artifact.name}' version {artifact.version}: "
    try:
        return _read(artifact, signature, declared, isolated=isolated)
    except (_PackageError, TokenizerError) as error:
        if declared is None and str(error) == MISSING:
            _log.warning("'%s' version %d is served as tensors: %s", artifact.name, artifact.version, error)
            return None
        raise ModelLoadError(f"{where}{error}") from None


def _read(
    artifact: Artifact, signature: Signature, declared: TextOptions | None, *, isolated: bool
) -> TextPackage | None:
    folders = _folders(artifact)
    path = _find(folders, TOKENIZER_FILE)
    if path is None:
        if declared is not None:
            raise _PackageError(f"[text] is declared, and there is no {TOKENIZER_FILE} beside the model")
        return None
    options = declared or TextOptions()
    inputs = _inputs(signature)
    if inputs is None:
        if declared is not None:
            names = ", ".join(f"'{s.name}'" for s in signature.inputs)
            raise _PackageError(
                f"[text] is declared, and the graph takes {names}, expected 'input_ids' and of "
                "'attention_mask', 'token_type_ids' and 'position_ids' what it needs, with rows along the first axis"
            )
        return None
    said = _said(folders)
    spec = _spec(options, said, inputs, signature, declared=declared is not None)
    if isinstance(spec, str):
        _log.warning("'%s' version %d is served as tensors: %s", artifact.name, artifact.version, spec)
        return None
    content = read_limited(path, MAX_BYTES)
    tokenizer = IsolatedTokenizer(content) if isolated else LoadedTokenizer(content)
    spec = _limits(spec, options, said, tokenizer, content)
    return TextPackage(spec, tokenizer, _padded(artifact.config, spec, signature, said))


def _folders(artifact: Artifact) -> list[Path]:
    """From the graph's folder up to the model's own, which is never left."""
    here = artifact.path.parent
    folders = [here]
    home = artifact.home
    while home is not None and here != home and here.is_relative_to(home):
        here = here.parent
        folders.append(here)
    return folders


def _find(folders: Sequence[Path], *parts: str) -> Path | None:
    for folder in folders:
        if any(len(part.encode(errors="replace")) > 255 or "\0" in part for part in parts):
            continue
        path = folder.joinpath(*parts)
        # A link may lead to another model of the same repository, and no further.
        if path.is_file() and path.resolve().is_relative_to(folders[-1].resolve().parent):
            return path
    return None


def _json(folders: Sequence[Path], *parts: str) -> Any:
    path = _find(folders, *parts)
    if path is None:
        return None
    try:
        return orjson.loads(read_limited(path, MAX_JSON_BYTES))
    except orjson.JSONDecodeError as error:
        raise _PackageError(f"{'/'.join(parts)} is not JSON: {error}") from None


def _object(folders: Sequence[Path], *parts: str) -> Mapping[str, Any]:
    found = _json(folders, *parts)
    return found if isinstance(found, dict) else {}


def _inputs(signature: Signature) -> dict[str, TensorSpec] | None:
    """The graph's inputs by what they are; None where it has others, or lacks the token ids."""
    found: dict[str, TensorSpec] = {}
    for spec in signature.inputs:
        part = _INPUTS.get(spec.name)
        if part is None or spec.datatype not in ("INT64", "INT32") or len(spec.shape) != 2:
            if spec.optional:
                continue
            return None
        found[part] = spec
    return found if "ids" in found and signature.batched else None


def _said(folders: Sequence[Path]) -> _Said:
    said = _Said(config=_object(folders, "config.json"))
    modules = _json(folders, "modules.json")
    for module in modules if isinstance(modules, list) else ():
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        said.modules = True
        if kind == "Pooling":
            said.pooling = _pooling(_object(folders, *str(module.get("path", "1_Pooling")).split("/"), "config.json"))
        elif kind == "Normalize":
            said.normalise = True
        elif kind != "Transformer":
            said.foreign = kind
    if said.pooling is None and not said.modules:
        pooling = _object(folders, "1_Pooling", "config.json")
        said.pooling = _pooling(pooling) if pooling else None
    bounds = [_object(folders, "sentence_bert_config.json").get("max_seq_length")]
    bounds.append(_object(folders, "tokenizer_config.json").get("model_max_length"))
    said.max_tokens = next((int(b) for b in bounds if isinstance(b, int | float) and 0 < b < _UNSAID), None)
    extra = _object(folders, "config_sentence_transformers.json")
    prompts = extra.get("prompts")
    said.prompts = {str(k): str(v) for k, v in prompts.items()} if isinstance(prompts, dict) else {}
    default = extra.get("default_prompt_name")
    said.default_prompt = default if isinstance(default, str) else None
    return said


def _pooling(config: Mapping[str, Any]) -> Pooling:
    modes = [
        name.removeprefix("pooling_mode_") for name, on in config.items() if on is True and "pooling_mode_" in name
    ]
    named = config.get("pooling_mode")
    modes += [named] if isinstance(named, str) else []
    found = {_MODES[mode] for mode in modes if mode in _MODES}
    if len(found) != 1 or any(mode not in _MODES for mode in modes):
        raise _PackageError(
            f"1_Pooling/config.json asks for {', '.join(modes) or 'nothing'}, expected one of mean, cls, max and last"
        )
    return found.pop()


def _output(options: TextOptions, signature: Signature) -> TensorSpec:
    floats = [s for s in signature.outputs if s.datatype in _FLOATS and len(s.shape) in (2, 3)]
    if options.output is not None:
        found = next((s for s in floats if s.name == options.output), None)
        if found is None:
            names = ", ".join(f"'{s.name}'" for s in floats) or "none"
            raise _PackageError(
                f"[text] output names '{options.output}', expected a float output of the graph: {names}"
            )
        return found
    if not floats:
        raise _PackageError("the graph has no output of numbers for each row or each token")
    order = [s for name in (*_POOLED, *_TOKENS) for s in floats if s.name == name]
    order += [s for s in floats if len(s.shape) == 3] + floats
    return order[0]


def _spec(
    options: TextOptions, said: _Said, inputs: Mapping[str, TensorSpec], signature: Signature, *, declared: bool
) -> TextSpec | str:
    """What the model is, but for its limits; or in words why it stays a model of tensors."""
    output = _output(options, signature)
    tokens = len(output.shape) == 3
    width = max(output.shape[-1], 0)
    task = options.task or _task(said, output, width)
    if task is None:
        problem = f"nothing says what its output '{output.name}' is; declare [text] task in inferway.toml"
        if declared:
            raise _PackageError(problem)
        return problem
    pooling = options.pooling or (said.pooling if tokens else "none")
    if tokens and pooling in (None, "none"):
        problem = (
            f"its output '{output.name}' has a vector for each token, and nothing says how they become one; "
            "declare [text] pooling in inferway.toml"
        )
        if declared or pooling == "none":
            raise _PackageError(problem)
        return problem
    if not tokens and pooling != "none":
        raise _PackageError(f"pooling {pooling} needs a vector for each token, output '{output.name}' has one a row")
    if tokens and said.foreign and options.pooling is None:
        raise _PackageError(f"modules.json has a step {said.foreign}, which must be part of the graph")
    if tokens and task != "embeddings":
        raise _PackageError(f"task {task} needs an output of one row of logits a text, '{output.name}' has one a token")
    if task == "rerank" and width > 2:
        raise _PackageError(f"task rerank needs one number a row, output '{output.name}' has {width}")
    if options.dimensions and task != "embeddings":
        raise _PackageError(f"[text] dimensions are for embeddings, the task is {task}")
    if options.long_text == "chunk" and task != "embeddings":
        raise _PackageError(f"[text] long_text chunk is for embeddings, the task is {task}")
    if isinstance(options.dimensions, tuple) and width and max(options.dimensions) > width:
        raise _PackageError(f"[text] dimensions go to {max(options.dimensions)}, the vectors have {width} numbers")
    multi = options.multi_label
    if multi is None:
        multi = said.config.get("problem_type") == "multi_label_classification"
    assert pooling is not None  # of rank 2 it is none, and rank 3 was looked at
    return TextSpec(
        task,
        inputs["ids"].name,
        output.name,
        width,
        mask=_name(inputs, "mask"),
        types=_name(inputs, "types"),
        positions=_name(inputs, "positions"),
        length=max(inputs["ids"].shape[1], 0),
        pooling=pooling,
        normalise=said.normalise if options.normalise is None else options.normalise,
        long_text=options.long_text or "error",
        dimensions=options.dimensions or (),
        labels=_labels(options, said, output, width) if task == "classify" else (),
        activation=options.activation or _activation(task, said, width, multi=multi),
        prompts={**said.prompts, **options.prompts},
        default_prompt=said.default_prompt,
    )


def _name(inputs: Mapping[str, TensorSpec], part: str) -> str | None:
    spec = inputs.get(part)
    return None if spec is None else spec.name


def _task(said: _Said, output: TensorSpec, width: int) -> Task | None:
    if said.modules or said.pooling is not None or output.name == "sentence_embedding":
        return "embeddings"
    architectures = said.config.get("architectures")
    classifier = isinstance(architectures, list) and any("SequenceClassification" in str(a) for a in architectures)
    if len(output.shape) == 2 and (classifier or output.name == "logits"):
        if width == 1:
            return "rerank"
        return "classify" if classifier or isinstance(said.config.get("id2label"), dict) else None
    return "embeddings" if len(output.shape) == 3 else None


def _labels(options: TextOptions, said: _Said, output: TensorSpec, width: int) -> tuple[str, ...]:
    labels = options.labels
    named = said.config.get("id2label")
    if not labels and isinstance(named, dict) and all(str(i) in named for i in range(len(named))):
        labels = tuple(str(named[str(i)]) for i in range(len(named)))
    labels = labels or output.labels
    if not labels and width:
        labels = tuple(f"LABEL_{i}" for i in range(width))
    if not labels:
        raise _PackageError(f"output '{output.name}' is of variable width: declare [text] labels in inferway.toml")
    if width and len(labels) != width:
        raise _PackageError(f"there are {len(labels)} labels, output '{output.name}' has {width} numbers")
    return labels


def _activation(task: Task, said: _Said, width: int, *, multi: bool) -> Activation:
    if task == "embeddings":
        return "none"
    named = said.config.get("sbert_ce_default_activation_function")
    inner = said.config.get("sentence_transformers")
    if isinstance(inner, dict):
        named = inner.get("activation_fn", named)
    if isinstance(named, str) and task == "rerank":
        return "none" if named.endswith("Identity") else "sigmoid"
    return "sigmoid" if multi or width == 1 else "softmax"


def _limits(spec: TextSpec, options: TextOptions, said: _Said, tokenizer: TextTokenizer, content: bytes) -> TextSpec:
    """The spec with the number of tokens that a text may have."""
    positions = said.config.get("max_position_embeddings")
    hard = spec.length or (positions if isinstance(positions, int) and positions > 0 else 0)
    if hard and not spec.length and said.config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        hard -= 2  # their positions begin behind the padding's
    wanted = (
        options.max_tokens or said.max_tokens or _cut(content) or min(hard or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS)
    )
    if options.max_tokens and hard and options.max_tokens > hard:
        raise _PackageError(f"[text] max_tokens is {options.max_tokens}, the model reads at most {hard}")
    most = min(wanted, hard) if hard else wanted
    template = tokenizer.pair if spec.task == "rerank" else tokenizer.single
    if template is None:
        raise _PackageError("task rerank needs a tokenizer.json with a template for two texts")
    if most <= template.tokens + (spec.task == "rerank"):
        raise _PackageError(f"{most} tokens leave no room for a text beside {template.tokens} special ones")
    return replace(spec, max_tokens=most)


def _cut(content: bytes) -> int | None:
    """Where the tokenizer's own file would cut texts. Parsed in part: the file may be huge, and is somebody else's."""
    found = _TRUNCATION.search(content)
    try:
        truncation = None if found is None else orjson.loads(found[1])
    except orjson.JSONDecodeError:
        return None
    length = truncation.get("max_length") if isinstance(truncation, dict) else None
    return length if isinstance(length, int) and 0 < length < _UNSAID else None


def _padded(config: ModelConfig, spec: TextSpec, signature: Signature, said: _Said) -> ModelConfig:
    """The configuration with padding along the sequence, where the operator has said nothing of padding."""
    if config.batching.padding or spec.length:
        return config
    names = [name for name in (spec.ids, spec.mask, spec.types, spec.positions) if name is not None]
    if spec.mask is None:  # without one the model would read the padding
        return config
    outputs = {s.name: 1 for s in signature.outputs if len(s.shape) == 3 and s.shape[1] == -1 and signature.batched}
    pad = said.config.get("pad_token_id")
    fill = {spec.ids: float(pad)} if isinstance(pad, int) and pad > 0 else {}
    padding = PaddingAxis(dict.fromkeys(names, 1), outputs, fill)
    return replace(config, batching=replace(config.batching, padding=(padding,)))
