"""A language model's folder, as onnxruntime-genai's model builder writes it, read without that library.

``genai_config.json`` says which ONNX file it is and how its inputs are named, ``tokenizer.json`` and
``tokenizer_config.json`` how text becomes tokens, ``chat_template.jinja`` how a conversation becomes text, and
``*.onnx_adapter`` files hold what low-rank adapters change. What the engine cannot run is refused with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...core.catalog import LANGUAGE_FILE
from ...core.chat_formats import FORMATS
from ...core.errors import ModelLoadError
from ...core.generation import GenerationDefaults, Sampling
from ...core.model_config import GenerationOptions

TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
ADAPTER_SUFFIX: Final = ".onnx_adapter"

_SMALL_BYTES: Final = 4 << 20
_SMALL_VALUES: Final = 200_000
_TOKENIZER_BYTES: Final = 64 << 20
_TOKENIZER_VALUES: Final = 4_000_000
"""In ``tokenizer.json``, counted before it is parsed, for an empty list of two bytes becomes seventy. The largest
in use have some two million."""
_TEMPLATE_BYTES: Final = 256 << 10
_MOST_TOKENS: Final = 1 << 21
_MOST_ADAPTERS: Final = 64
_SPECIAL: Final = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

DEFAULT_MAX_TOKENS: Final = 1024


@dataclass(frozen=True, slots=True)
class Package:
    """What the files say.

    Attributes:
        model: the ONNX file.
        context_length: tokens of prompt and answer.
        vocabulary_size: of the logits.
        ends: tokens that end an answer.
        inputs, outputs: of ``genai_config.json``: part to name, names of keys and values with ``%d`` for the layer.
        layers, kv_heads, head_size: as said there; the graph is held against them.
        tokenizer: the text of ``tokenizer.json``.
        template: of conversations, a well-known one where that was chosen; None where there is none.
        variables: that templates use.
        adapters: name to file.
    """

    folder: Path
    model: Path
    context_length: int
    vocabulary_size: int
    ends: tuple[int, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    layers: int
    kv_heads: int
    head_size: int
    tokenizer: str
    template: str | None
    variables: Mapping[str, str]
    defaults: GenerationDefaults
    adapters: Mapping[str, Path] = field(default_factory=dict)


def read_package(folder: Path, options: GenerationOptions) -> Package:
    """Read a model's folder. Blocks.

    Raises:
        ModelLoadError: a file is missing, cannot be read, or asks for what the engine does not do.
    """
    config = _read_json(folder, LANGUAGE_FILE, _SMALL_BYTES)
    model = _table(config, "model", LANGUAGE_FILE)
    decoder = _table(model, "decoder", f"{LANGUAGE_FILE}: model")
    for part in ("encoder", "vision", "speech", "embedding"):
        if part in model:
            raise ModelLoadError(f"{LANGUAGE_FILE} has an {part} model: only decoders of text can be served")
    if isinstance(decoder.get("pipeline"), list):
        raise ModelLoadError(f"{LANGUAGE_FILE} splits the decoder into a pipeline, expected one ONNX file")
    if decoder.get("sliding_window"):
        raise ModelLoadError(
            f"{LANGUAGE_FILE} has a sliding window: the graph keeps the keys and values of the last tokens only, where "
            "the engine needs all of them: build it with --extra_options windowed_kv_cache=false"
        )
    name = decoder.get("filename", "model.onnx")
    if not isinstance(name, str) or Path(name).name != name or len(name) > 255 or not (folder / name).is_file():
        raise ModelLoadError(f"{LANGUAGE_FILE} names a decoder that is not in the folder")
    numbers = {
        "context_length": _number(model, "context_length", 2, 1 << 24),
        "vocabulary_size": _number(model, "vocab_size", 1, _MOST_TOKENS),
        "layers": _number(decoder, "num_hidden_layers", 1, 4096),
        "kv_heads": _number(decoder, "num_key_value_heads", 1, 4096),
        "head_size": _number(decoder, "head_size", 1, 4096),
    }
    ends = model.get("eos_token_id", [])
    ends = tuple(ends) if isinstance(ends, list) else (ends,)
    if not ends or not all(type(end) is int and 0 <= end < numbers["vocabulary_size"] for end in ends):
        raise ModelLoadError(f"{LANGUAGE_FILE}: model.eos_token_id has to be a token, or a list of tokens")
    tokenizer = _read_text(folder, TOKENIZER_FILE, _TOKENIZER_BYTES)
    if tokenizer is None:
        raise ModelLoadError(f"{TOKENIZER_FILE} is missing: save it beside the model")
    _check_values(tokenizer, TOKENIZER_FILE, _TOKENIZER_VALUES)
    tokens = _read_json(folder, TOKENIZER_CONFIG_FILE, _SMALL_BYTES, missing={})
    known = FORMATS.get(options.template or "")
    if known is not None:
        template: str | None = known.source
        ends = (*ends, *(token for token in _added(tokenizer, known.ends) if token < numbers["vocabulary_size"]))
    else:
        template = _read_text(folder, TEMPLATE_FILE, _TEMPLATE_BYTES)
    if template is None:
        template = _named_template(tokens.get("chat_template"))
    adapters = sorted(path for path in folder.iterdir() if path.name.endswith(ADAPTER_SUFFIX) and path.is_file())
    if len(adapters) > _MOST_ADAPTERS:
        raise ModelLoadError(f"there are {len(adapters)} adapters, at most {_MOST_ADAPTERS} are served")
    search = config.get("search")
    return Package(
        folder,
        folder / name,
        ends=ends,
        inputs=_names(decoder, "inputs", {"input_ids": "input_ids", "attention_mask": "attention_mask"}),
        outputs=_names(decoder, "outputs", {"logits": "logits"}),
        tokenizer=tokenizer,
        template=template,
        variables=_variables(tokens),
        defaults=_defaults(search if isinstance(search, Mapping) else {}, options),
        adapters={path.name.removesuffix(ADAPTER_SUFFIX): path for path in adapters},
        **numbers,
    )


def _named_template(said: object) -> str | None:
    """The template in ``tokenizer_config.json``: a text, or the default one of several that have names."""
    if isinstance(said, list):
        named = [entry for entry in said if isinstance(entry, Mapping) and entry.get("name") == "default"]
        said = named[0].get("template") if named else None
    return said if isinstance(said, str) else None


def _added(tokenizer: str, names: Collection[str]) -> list[int]:
    """Tokens that ``tokenizer.json`` has under these names, as far as it has them."""
    listed = parse_object(tokenizer, TOKENIZER_FILE).get("added_tokens")
    entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []
    found = [entry.get("id") for entry in entries if entry.get("content") in names]
    return [token for token in found if type(token) is int and token >= 0]


def _names(decoder: Mapping[str, Any], part: str, least: Mapping[str, str]) -> dict[str, str]:
    said = decoder.get(part, {})
    if not isinstance(said, Mapping) or not all(isinstance(name, str) for name in said.values()):
        raise ModelLoadError(f"{LANGUAGE_FILE}: model.decoder.{part} has to map parts to names")
    kind = "past" if part == "inputs" else "present"
    kv = {f"{kind}_{of}_names": f"{kind}_key_values.%d.{of}".replace("present_key_values", "present") for of in
          ("key", "value")}  # fmt: skip
    found = {**kv, **least, **said}
    for of in kv:
        if found[of].count("%d") != 1:
            raise ModelLoadError(f"{LANGUAGE_FILE}: model.decoder.{part}.{of} has to hold one %d")
    return found


def _variables(tokens: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL:
        said = tokens.get(name)
        if isinstance(said, Mapping):
            said = said.get("content")
        if isinstance(said, str):
            found[name] = said
    return found


def _defaults(search: Mapping[str, Any], options: GenerationOptions) -> GenerationDefaults:
    """What ``[generation]`` says, else what genai's search options say where they ask for sampling."""
    draws = search.get("do_sample") is True
    temperature = _real(search, "temperature", 1.0, 0.0, 100.0) if draws else 0.0
    top_k = int(_real(search, "top_k", 0, 0, _MOST_TOKENS)) if draws else 0
    sampling = Sampling(
        temperature=temperature if options.temperature is None else options.temperature,
        top_p=_real(search, "top_p", 1.0, 0.0, 1.0) if options.top_p is None else options.top_p,
        top_k=top_k if options.top_k is None else options.top_k,
        repetition_penalty=_real(search, "repetition_penalty", 1.0, 0.01, 100.0),
    )
    return GenerationDefaults(sampling, options.max_tokens or DEFAULT_MAX_TOKENS)


def _real(table: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    said = table.get(name, default)
    if isinstance(said, bool) or not isinstance(said, int | float) or not math.isfinite(said):
        raise ModelLoadError(f"{LANGUAGE_FILE}: search.{name} has to be a number")
    return min(max(float(said), least), most)


def _number(table: Mapping[str, Any], name: str, least: int, most: int) -> int:
    said = table.get(name)
    if type(said) is not int or not least <= said <= most:
        raise ModelLoadError(f"{LANGUAGE_FILE}: {name} has to be a whole number from {least} to {most}")
    return said


def _table(parent: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    found = parent.get(name)
    if not isinstance(found, Mapping):
        raise ModelLoadError(f"{where} has no table '{name}'")
    return found


def _read_json(folder: Path, name: str, limit: int, missing: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    text = _read_text(folder, name, limit)
    if text is None:
        if missing is not None:
            return missing
        raise ModelLoadError(f"{name} is missing")
    _check_values(text, name, _SMALL_VALUES)
    return parse_object(text, name)


def _check_values(text: str, name: str, most: int) -> None:
    if sum(map(text.count, ",[{")) > most:
        raise ModelLoadError(f"{name} has more than {most} values")


def parse_object(text: str, name: str, loads: Callable[[str], Any] = json.loads) -> Mapping[str, Any]:
    """Raises ModelLoadError."""
    try:
        found = loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{name} is no JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise ModelLoadError(f"{name} has to be a JSON object")
    return found


def _read_text(folder: Path, name: str, limit: int) -> str | None:
    path = folder / name
    try:
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelLoadError(f"{name} cannot be read: {error.strerror}") from None
    if len(raw) > limit:
        raise ModelLoadError(f"{name} is larger than {limit} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ModelLoadError(f"{name} is not UTF-8") from None
