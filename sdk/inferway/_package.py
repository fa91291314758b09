"""What a caller deploys (a file, a folder, bytes, a ``ModelProto``) to the files that go to the gateway.

**What goes along.** Of an ``.onnx`` file: the file, as ``model.onnx``, and the files that it names as the home of its
weights. Of a folder: every file in it, by its path there. A folder that holds numbered folders is one of a model
repository (``NAME/1/model.onnx``): one of its versions goes, and what lies beside the numbers, such as
``config.pbtxt``. Hidden files and ``__pycache__`` stay behind; `Package.left_out` names them. Refused with words are
links that lead out of the folder, what is neither file nor folder, more than `MAX_FILES`, and a file of `LARGE_BYTES`
that no model in the folder names: that is a checkpoint or a download, and sending it would take long and help nobody.

Nothing is read whole: files are read in pieces when they are hashed and again when they are sent, and the weights of a
``ModelProto`` that is too large for one file are taken from it tensor by tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeAlias, cast

from inferway_contract.names import FILE_PATH_MAX_LENGTH, FILE_PATH_PATTERN

from ._errors import ConfigurationError
from ._onnx import NotOnnx, OnnxFacts, read_facts
from ._signature import ModelMetadata

ModelSource: TypeAlias = "str | os.PathLike[str] | bytes | Any"
"""A path of an ``.onnx`` file or a folder, the bytes of a model, or an ``onnx.ModelProto``; or an object that gives one
of these by a method ``__inferway_source__() -> Offer``."""

MODEL_FILE: Final = "model.onnx"
FACTS_FILE: Final = "inferway-package.json"
"""What `inferway.package` writes beside a model; labels and metadata of a deployment come from it."""
MAX_FILES: Final = 1000
LARGE_BYTES: Final = 64 * 1024 * 1024
PROTOBUF_LIMIT_BYTES: Final = 2**31 - 1
"""No protobuf message is longer; a larger model keeps its weights in another file."""
_EXTERNAL: Final = 1
_EXTERNAL_FROM_BYTES: Final = 1024
"""Smaller tensors stay in the graph, where shape inference needs the values of some."""
_ALIGNMENT: Final = 4096
"""Tensors in a weights file begin at pages, so that they can be mapped into memory as they are."""
_PIECE_BYTES: Final = 1024 * 1024
_ELEMENT_BYTES: Final = {2: 1, 3: 1, 4: 2, 5: 2, 7: 8, 9: 1, 10: 2, 11: 8, 13: 8, 16: 2}
"""Of ``TensorProto.DataType``; of all others 4, or about that."""
_TOO_LONG: Final = (
    "the model is longer than 2 GiB without its initializers; save it with onnx.save_model(…, "
    "save_as_external_data=True, convert_attribute=True) and deploy the file"
)
_DEFINITIONS: Final = ("pipeline.toml", "remote.toml")
_FOREIGN: Final = (".safetensors", ".gguf", "pytorch_model.bin")
"""Ends of the names of weights that other frameworks save."""
_BESIDE: Final = re.compile(r"[1-9][0-9]{0,18}")


class Source:
    """One file of a package. It can be read any number of times, from any place.

    Attributes:
        path: within the package, with ``/``.
        size: bytes.
        blocking: reading it waits for a disk.
    """

    __slots__ = ("blocking", "path", "size")

    def __init__(self, path: str, size: int, *, blocking: bool) -> None:
        self.path = path
        self.size = size
        self.blocking = blocking

    def pieces(self, offset: int = 0) -> Iterator[Any]:
        """Its bytes from ``offset`` on, in pieces of the buffer protocol of at most 1 MiB."""
        raise NotImplementedError


class BytesSource(Source):
    """A file that is in memory."""

    __slots__ = ("_data",)

    def __init__(self, path: str, data: bytes) -> None:
        super().__init__(path, len(data), blocking=False)
        self._data = data

    def pieces(self, offset: int = 0) -> Iterator[Any]:
        view = memoryview(self._data)
        for start in range(offset, len(view), _PIECE_BYTES):
            yield view[start : start + _PIECE_BYTES]


class FileSource(Source):
    """A file on disk; its size is that of the moment when it was packed."""

    __slots__ = ("file",)

    def __init__(self, path: str, file: Path) -> None:
        super().__init__(path, file.stat().st_size, blocking=True)
        self.file = file

    def pieces(self, offset: int = 0) -> Iterator[Any]:
        left = self.size - offset
        try:
            with self.file.open("rb", buffering=0) as opened:
                opened.seek(offset)
                while left > 0:
                    piece = opened.read(min(left, _PIECE_BYTES))
                    if not piece:
                        raise ConfigurationError(f"{self.file} became shorter while it was read; deploy it again")
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise ConfigurationError(f"{self.file} cannot be read: {error.strerror or error}") from error


class _WeightsSource(Source):
    """The weights of a ``ModelProto`` as a file that never exists: each tensor is fetched when its turn comes."""

    __slots__ = ("_segments",)

    def __init__(self, path: str, segments: Sequence[tuple[int, int, Callable[[], bytes]]]) -> None:
        super().__init__(path, segments[-1][0] + segments[-1][1], blocking=False)
        self._segments = segments

    def pieces(self, offset: int = 0) -> Iterator[Any]:
        at = offset
        for start, length, fetch in self._segments:
            if at >= start + length:
                continue
            if at < start:
                yield bytes(start - at)
                at = start
            view = memoryview(fetch())
            for begin in range(at - start, length, _PIECE_BYTES):
                yield view[begin : begin + _PIECE_BYTES]
            at = start + length


@dataclass(frozen=True, slots=True)
class Package:
    """The files of one version.

    Attributes:
        sources: sorted by path.
        left_out: paths of a folder that stay behind.
        signature: of the model, where there is one and it is known.
    """

    sources: tuple[Source, ...]
    left_out: tuple[str, ...] = ()
    signature: ModelMetadata | None = None
    by_path: Mapping[str, Source] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.sources, key=lambda source: source.path))
        object.__setattr__(self, "sources", ordered)
        object.__setattr__(self, "by_path", {source.path: source for source in ordered})

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(source.size for source in self.sources)

    def with_file(self, path: str, data: bytes) -> Package:
        """The same with one more file.

        Raises:
            ConfigurationError: there is a file of that path already.
        """
        if path in self.by_path:
            raise ConfigurationError(f"the folder has a {path} of its own; give one of the two")
        return Package((*self.sources, BytesSource(path, data)), self.left_out, self.signature)


@dataclass(frozen=True, slots=True)
class Offer:
    """What is deployed where an object is given that knows more of itself than a file does.

    Attributes:
        model: the model.
        labels, metadata: those of the caller are put over them, name by name.
        golden: used where the caller gives none; see `_golden.Golden`.
    """

    model: ModelSource
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    golden: Any = None


def offer_of(model: ModelSource) -> Offer:
    """What an object gives of itself, or what lies beside a model in a folder that `inferway.package` wrote.

    Raises:
        ConfigurationError: the folder's facts cannot be read.
    """
    give = None if isinstance(model, type) else getattr(model, "__inferway_source__", None)
    offer: Offer = Offer(model) if give is None else give()
    given: object = offer.model
    if not isinstance(given, str | os.PathLike):
        return offer
    place = cast("str | os.PathLike[str]", given)
    labels, metadata = _written_facts(Path(place) / FACTS_FILE)
    return Offer(place, {**labels, **offer.labels}, {**metadata, **offer.metadata}, offer.golden)


def _written_facts(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        if not path.is_file():
            return {}, {}
        facts: Any = json.loads(path.read_text("utf-8"))
        found = (facts.get("labels", {}), facts.get("metadata", {}))
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ConfigurationError(f"{path} cannot be read as what inferway.package writes: {error}") from error
    if not all(isinstance(part, dict) for part in found):
        raise ConfigurationError(f"expected labels and metadata in {path} to be JSON objects")
    return found


def pack(model: ModelSource, version: int | None = None) -> Package:
    """What goes to the gateway. Reads folders and the structure of models, and no weights.

    Args:
        model: see `ModelSource`.
        version: which of a repository's folders is meant, where there are several.
    Raises:
        ConfigurationError: it is none of these, is no ONNX model, lacks a file that it names, or holds what must not
            be sent; the message says which and what to do.
    """
    if isinstance(model, bytes | bytearray | memoryview):
        return _of_bytes(bytes(cast(bytes, model)))
    if isinstance(model, str | os.PathLike):
        path = Path(cast("str | os.PathLike[str]", model))
        try:
            if path.is_dir():
                return _of_folder(path, version)
            if path.is_file():
                return _of_file(path)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error
        raise ConfigurationError(f"expected {path} to be an .onnx file or a folder, and there is none")
    onnx = sys.modules.get("onnx")
    if onnx is not None and isinstance(model, onnx.ModelProto):
        return _of_proto(model)
    raise ConfigurationError(
        f"expected a path of an .onnx file or of a folder, bytes, an onnx.ModelProto, or what inferway.to_onnx or "
        f"inferway.package gives, got {type(model).__name__}{_how(model)}"
    )


_FRAMEWORKS: Final = frozenset(
    {"sklearn", "torch", "keras", "tensorflow", "xgboost", "lightgbm", "catboost", "transformers"}
)


def _how(model: object) -> str:
    """What to do with a model that is still one of its framework; nothing for anything else."""
    # A class of the user's own, such as a torch.nn.Module, is known by what it is made of.
    roots = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    if not roots & _FRAMEWORKS:
        return ""
    return ": export it first, with inferway.to_onnx(model, a few rows of its inputs)"


def _of_bytes(data: bytes) -> Package:
    facts = _facts(data, "the bytes")
    if facts.locations:
        raise ConfigurationError(
            f"the model keeps weights in another file, {_quoted(facts.locations)}, which bytes cannot bring along; "
            f"deploy its path"
        )
    return Package((BytesSource(MODEL_FILE, data),), signature=facts.signature)


# --- files -------------------------------------------------------------------------------------------------------


def _of_file(path: Path) -> Package:
    facts = _facts_of_file(path)
    # Under one name, whatever the file is called here: the same model twice is the same version.
    name = MODEL_FILE if MODEL_FILE not in facts.locations else path.name
    weights = {_relative(location, path): _weights(path.parent, location, path) for location in facts.locations}
    sources = [FileSource(name, path), *(FileSource(inner, file) for inner, file in weights.items())]
    return Package(tuple(sources), signature=facts.signature)


def _weights(folder: Path, location: str, model: Path) -> Path:
    """The file that a model names, which must lie in the model's own folder, links followed."""
    found = folder / location
    _relative(location, model)
    if not found.is_file():
        raise ConfigurationError(f"{model} keeps weights in {location!r}, and {folder} has no such file")
    if not found.resolve().is_relative_to(folder.resolve()):
        raise ConfigurationError(f"{model} keeps weights in {location!r}, which is a link that leads out of {folder}")
    return found


def _relative(location: str, model: Path) -> str:
    parts = PurePosixPath(location).parts
    path = str(PurePosixPath(location))
    if ".." in parts or not FILE_PATH_PATTERN.fullmatch(path) or len(path) > FILE_PATH_MAX_LENGTH:
        raise ConfigurationError(
            f"{model} keeps weights in {location!r}, which is not a path within the model's own folder; save it with "
            f"its weights beside it"
        )
    return path


def _facts_of_file(path: Path) -> OnnxFacts:
    if path.stat().st_size == 0:
        raise ConfigurationError(f"{path} is empty")
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return _facts(mapped, str(path))


def _facts(data: Any, what: str) -> OnnxFacts:
    try:
        return read_facts(data)
    except NotOnnx as error:
        raise ConfigurationError(
            f"{what} cannot be read as an ONNX model: {error}; a model of another framework is exported to ONNX first"
        ) from error


# --- folders -----------------------------------------------------------------------------------------------------


def _weights_of_others(files: Iterable[str]) -> str:
    """What to do with the model of another framework that a folder holds."""
    found = next((path for path in sorted(files) if path.endswith(_FOREIGN)), None)
    if found is None:
        return ""
    return (
        f"; {found} is exported to ONNX first, a language model with "
        "python -m onnxruntime_genai.models.builder -i FOLDER -o OUT -p int4 -e cpu"
    )


def _of_folder(folder: Path, version: int | None) -> Package:
    files, left_out = _listed(folder, "")
    tops = {path.partition("/")[0] for path in files if "/" in path}
    numbers = sorted(int(top) for top in tops if _BESIDE.fullmatch(top))
    if numbers and not any(_is_definition(path) for path in files if "/" not in path):
        chosen = _chosen(folder, numbers, version)
        prefix = f"{chosen}/"
        left_out += tuple(f"{number}/" for number in numbers if number != chosen)
        beside = {path: file for path, file in files.items() if path.partition("/")[0] not in map(str, numbers)}
        inner = {path.removeprefix(prefix): file for path, file in files.items() if path.startswith(prefix)}
        twice = sorted(beside.keys() & inner.keys())
        if twice:
            raise ConfigurationError(f"{folder} has {twice[0]!r} twice, in version {chosen} and beside it")
        files = {**beside, **inner}
    if not any(_is_definition(path) for path in files):
        raise ConfigurationError(
            f"{folder} holds no model: expected {MODEL_FILE}, one other .onnx file, {' or '.join(_DEFINITIONS)}"
            f"{_weights_of_others(files)}"
        )
    signature, named = _models_in(files)
    for path, file in files.items():
        if path not in named and file.stat().st_size >= LARGE_BYTES:
            raise ConfigurationError(
                f"{file} has {file.stat().st_size} bytes and no model in {folder} names it; take it out of the folder, "
                f"or deploy the .onnx file alone"
            )
    return Package(tuple(FileSource(path, file) for path, file in files.items()), left_out, signature)


def _is_definition(path: str) -> bool:
    return path in _DEFINITIONS or ("/" not in path and path.endswith(".onnx")) or path == f"onnx/{MODEL_FILE}"


def _chosen(folder: Path, numbers: list[int], version: int | None) -> int:
    if version in numbers:
        return version
    if len(numbers) > 1:
        raise ConfigurationError(
            f"{folder} holds the versions {', '.join(map(str, numbers))}; deploy one of its folders, such as "
            f"{folder / str(numbers[-1])}"
        )
    return numbers[0]


def _models_in(files: Mapping[str, Path]) -> tuple[ModelMetadata | None, set[str]]:
    """The signature of the folder's one model, and the files that may be large: models, and what they name."""
    signature: ModelMetadata | None = None
    named: set[str] = set()
    models = [path for path in files if path.endswith(".onnx")]
    tops = [path for path in models if "/" not in path]
    if not any(path in files for path in _DEFINITIONS) and MODEL_FILE not in files and len(tops) > 1:
        raise ConfigurationError(f"expected one model, found {_quoted(tops)}; call the one that is meant {MODEL_FILE}")
    for path in models:
        facts = _facts_of_file(files[path])
        named.add(path)
        parent = PurePosixPath(path).parent
        for location in facts.locations:
            wanted = str(parent / _relative(location, files[path]))
            if wanted not in files:
                raise ConfigurationError(
                    f"{files[path]} keeps weights in {location!r}, and the folder has no such file"
                )
            named.add(wanted)
        if path == MODEL_FILE or tops == [path]:
            signature = facts.signature
    return signature, named


def _listed(root: Path, prefix: str) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Path within the folder to file, links followed as long as they stay within."""
    files: dict[str, Path] = {}
    left_out: list[str] = []
    home = root.resolve()
    waiting = [(root, prefix)]
    while waiting:
        folder, before = waiting.pop()
        for entry in sorted(folder.iterdir()):
            path = before + entry.name
            if entry.name.startswith(".") or entry.name == "__pycache__":
                left_out.append(path)
                continue
            if not FILE_PATH_PATTERN.fullmatch(path) or len(path) > FILE_PATH_MAX_LENGTH:
                raise ConfigurationError(
                    f"{path!r} in {root} cannot be the name of a model's file; use letters, digits, spaces and ._+@=,:-"
                )
            if entry.is_symlink() and not entry.resolve().is_relative_to(home):
                raise ConfigurationError(
                    f"{entry} is a link that leads out of {root}; put the file itself there, or deploy the other folder"
                )
            kind = _kind(entry)
            if stat.S_ISDIR(kind):
                if entry.is_symlink():
                    raise ConfigurationError(f"{entry} is a link to a folder; put the files themselves there")
                waiting.append((entry, f"{path}/"))
            elif stat.S_ISREG(kind):
                files[path] = entry
            else:
                raise ConfigurationError(f"{entry} is neither a file nor a folder; take it out of {root}")
            if len(files) > MAX_FILES:
                raise ConfigurationError(f"{root} holds more than {MAX_FILES} files; it is not a model's own folder")
    return files, tuple(sorted(left_out))


def _kind(entry: Path) -> int:
    try:
        return entry.stat().st_mode
    except FileNotFoundError:
        raise ConfigurationError(f"{entry} is a link that leads nowhere") from None


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (", …" if len(names) > 3 else "")


# --- ModelProto --------------------------------------------------------------------------------------------------


def _of_proto(model: Any) -> Package:
    """A model in memory. One that is too large for a message is parted into its graph and its weights."""
    if sum(map(_bytes_of, model.graph.initializer)) < PROTOBUF_LIMIT_BYTES:
        data = _serialized(model)
        if data is not None:
            return _of_bytes(data)
    if any(_has_external(tensor) for tensor in model.graph.initializer):
        raise ConfigurationError("the model keeps weights in other files; deploy its path, or load it with its weights")
    head, segments = _parted(model)
    if not segments:
        raise ConfigurationError(_TOO_LONG)
    facts = _facts(head, "the model's graph")
    sources = (BytesSource(MODEL_FILE, head), _WeightsSource(f"{MODEL_FILE}.data", segments))
    return Package(sources, signature=facts.signature)


def _bytes_of(tensor: Any) -> int:
    """About how long a tensor's elements are; asking the message itself would write all of it to find out."""
    return int(math.prod(tensor.dims)) * _ELEMENT_BYTES.get(tensor.data_type, 4)


def _serialized(model: Any) -> bytes | None:
    """A model as bytes, the same for the same model; None where they are more than a message may have."""
    try:
        data: bytes = model.SerializeToString(deterministic=True)
    except ValueError:
        return None
    return data if len(data) <= PROTOBUF_LIMIT_BYTES else None


def _has_external(tensor: Any) -> bool:
    return bool(tensor.data_location == _EXTERNAL)


def _parted(model: Any) -> tuple[bytes, list[tuple[int, int, Callable[[], bytes]]]]:
    """The model without its larger initializers, and where each of those lies in the weights file.

    The caller's model stays as it is: what is written is a copy of everything but the weights.
    """
    head = type(model)()
    for descriptor, value in model.ListFields():
        if descriptor.name != "graph":
            _take(head, descriptor, value)
    for descriptor, value in model.graph.ListFields():
        if descriptor.name != "initializer":
            _take(head.graph, descriptor, value)
    segments: list[tuple[int, int, Callable[[], bytes]]] = []
    at = 0
    for tensor in model.graph.initializer:
        fetch = _content(tensor)
        length = 0 if fetch is None else len(fetch())
        if fetch is None or length < _EXTERNAL_FROM_BYTES:
            head.graph.initializer.append(tensor)
            continue
        at = -(-at // _ALIGNMENT) * _ALIGNMENT
        kept = head.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        kept.data_location = _EXTERNAL
        for key, text in (("location", f"{MODEL_FILE}.data"), ("offset", str(at)), ("length", str(length))):
            kept.external_data.add(key=key, value=text)
        segments.append((at, length, fetch))
        at += length
    data = _serialized(head)
    if data is None:
        raise ConfigurationError(_TOO_LONG)
    return data, segments


def _take(message: Any, descriptor: Any, value: Any) -> None:
    name = descriptor.name
    if hasattr(value, "ListFields"):
        getattr(message, name).CopyFrom(value)
    elif hasattr(value, "extend") or hasattr(value, "MergeFrom"):
        getattr(message, name).extend(value)
    else:
        setattr(message, name, value)


def _content(tensor: Any) -> Callable[[], bytes] | None:
    """What gives a tensor's elements as they lie in a weights file; None for text, which has no such form."""
    if tensor.data_type == 8:
        return None
    if tensor.HasField("raw_data"):
        return lambda: cast(bytes, tensor.raw_data)
    helper: Any = import_module("onnx.numpy_helper")
    return lambda: cast(bytes, helper.to_array(tensor).tobytes())
