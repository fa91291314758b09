"""Looking at the files of a model that somebody sent, before anything loads them.

The runtime is native code that was written for models of friends: it follows the paths that a model names, expands
what a model declares, and adopts code that a model asks for. So what can be told from the structure is told here, by a
reader that allocates nothing the file asks for: is it whole, does this runtime know its versions and operators, does
its data lie in its own folder and have the size that its tensors say, is it small enough to be looked at. What remains
is the sandbox's business: that a model is admitted says that it is well-formed, not that it is harmless.

A refusal names the rule, the place in the model and what to do about it.

Source: onnx.proto, "External Data" and "Operator Sets" of the ONNX documentation; versions are asked of the runtime.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from ...core.errors import ModelRejectedError
from .wire import BYTES, FIXED32, FIXED64, VARINT, Field, Source, WireError

STANDARD_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Operator sets that the runtime has by itself."""
EXTENSIONS_DOMAINS: Final = frozenset({"ai.onnx.contrib", "com.microsoft.extensions"})
"""Operator sets of the package onnxruntime-extensions."""
_INTERNAL_DOMAINS: Final = frozenset({"com.microsoft.nchwc", "com.ms.internal.nhwc"})
"""What the runtime writes when it saves a model that it optimised for one kind of processor."""
_REFUSED_OPERATORS: Final = frozenset({"EPContext", "PyOp", "PythonOp", "PythonOpGrad", "ATen"})
"""Operators that read another file, or run other code, than the model's."""

_MIB: Final = 1 << 20
_ONNX_BYTES: Final = (1 << 31) - 1
"""What protobuf can parse."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds of a model's structure. Ordinary models stay far below: ResNet-50 has 122 nodes, large ones some 10,000.

    Attributes:
        nodes: of graph, subgraphs and functions, each function counted wherever it is called.
        depth: graphs inside graphs, as ``If`` and ``Loop`` have them; a speech model in wide use has 4.
        fields: parts of the file that are looked at; 2 million take about 3 s.
        values: inputs, and outputs, of the graph.
        text_bytes: of descriptions and metadata together, which nobody needs to serve the model.
        name_bytes: of one name.
        sparse_bytes: of a sparse tensor once it is expanded.
        overcommit: how many times the bytes of the files the tensors may take together: tied weights share their data,
            a bomb has a thousand tensors made of the same bytes.
        external_files: files of weights.
    """

    nodes: int = 100_000
    depth: int = 8
    fields: int = 8_000_000
    values: int = 4096
    text_bytes: int = 16 * _MIB
    name_bytes: int = 1024
    sparse_bytes: int = 256 * _MIB
    overcommit: int = 4
    external_files: int = 1024


@dataclass(frozen=True, slots=True)
class AdmissionReport:
    """What was found in a model that was let in.

    Attributes:
        ir_version: of the file format.
        opsets: domain to version, as imported.
        domains: of operators in use, model-local functions not counted.
        operators: types in use, without domain.
        nodes: as bounded by ``AdmissionLimits.nodes``.
        depth: of subgraphs; 0 where there are none.
        file_bytes: of the ONNX file.
        weight_bytes: of all initialisers once they are loaded, external ones included.
        half_bytes: of those in 16 bits, float16 and bfloat16, which processors expand to twice as much.
        external_files: paths in the model's folder, sorted.
    """

    ir_version: int
    opsets: dict[str, int]
    domains: frozenset[str]
    operators: frozenset[str]
    nodes: int
    depth: int
    file_bytes: int
    weight_bytes: int
    half_bytes: int
    external_files: tuple[str, ...]


def admit(
    path: Path,
    *,
    allowed_domains: Collection[str] = (),
    files: Collection[str] | None = None,
    limits: AdmissionLimits | None = None,
) -> AdmissionReport:
    """Look at a model without loading it. Reads the ONNX file's structure, and of other files only what they are.

    Args:
        path: the ONNX file. Its folder is the model's folder.
        allowed_domains: operator sets that the operator of this gateway allows besides ``STANDARD_DOMAINS``.
        files: paths of the version's files, relative to the folder, which external data must be among; None takes
            whatever lies there.
    Raises:
        ModelRejectedError: with the rule, the place, and what to do.
    """
    bounds = limits or AdmissionLimits()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise _refusal("file", path.name, "the model file is missing") from None
    except OSError:
        raise _refusal("file", path.name, "is a link or cannot be opened: send the file itself") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal("file", path.name, "is not a regular file: send the file itself")
        _look_at_ends(fd, path.name, status.st_size)
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            source = Source(fd, status.st_size, bounds.fields)
            known = None if files is None else frozenset(files)
            return _Admission(source, bounds, path.name, folder, known, frozenset(allowed_domains)).report()
        except WireError as error:
            hint = "it may be cut off or damaged: try onnx.checker.check_model on the copy at hand and upload it again"
            raise _refusal("format", f"byte {error.at} of {status.st_size}", f"{error}: {hint}") from None
        finally:
            os.close(folder)
    finally:
        os.close(fd)


def _refusal(rule: str, place: str, text: str) -> ModelRejectedError:
    return ModelRejectedError(f"{place}: {text} (rule: {rule})")


# ---- what the runtime knows


@functools.cache
def newest_ir_version() -> int:
    """The newest file format that the runtime reads, found by trying a model of 30 bytes."""
    return _newest(lambda version: _identity(version, "", _OPSET), 10, 40)


@functools.cache
def newest_opset(domain: str) -> int:
    """The newest version of a standard operator set that the runtime has."""
    named = "" if domain == "ai.onnx" else domain
    first = _OPSET if named == "" else 1
    return _newest(lambda version: _identity(8, named, version), first, first + 40)


@functools.cache
def _operators() -> Mapping[tuple[str, str], Mapping[int, bool]]:
    """Operator and domain to the versions of the domain that changed it, and whether it was withdrawn with that one.

    Empty for a runtime that was built without the list; then the load itself tells.
    """
    found: dict[tuple[str, str], dict[int, bool]] = {}
    for schema in getattr(runtime, "get_all_operator_schema", list)():
        found.setdefault((schema.name, schema.domain), {})[schema.since_version] = schema.deprecated
    return found


_OPSET: Final = 18
"""Known to every runtime that this gateway runs on."""


def _newest(build: Callable[[int], bytes], first: int, last: int) -> int:
    best = first
    for version in range(first, last + 1):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        try:
            ort.InferenceSession(build(version), options, providers=["CPUExecutionProvider"])
        except Exception:
            break
        best = version
    return best


def _identity(ir_version: int, domain: str, opset: int) -> bytes:
    """y = x, written out by hand: ModelProto with a graph of one Identity node."""
    value = _part(2, _part(1, b"\x08\x01" + _part(2, _part(1, b"\x08\x01"))))
    graph = _part(1, _part(1, b"x") + _part(2, b"y") + _part(4, b"Identity")) + _part(2, b"g")
    graph += _part(11, _part(1, b"x") + value) + _part(12, _part(1, b"y") + value)
    imports = {"": _OPSET, domain: opset}
    written = b"".join(_part(8, _part(1, name.encode()) + bytes([0x10, version])) for name, version in imports.items())
    return bytes([0x08, ir_version]) + _part(7, graph) + written


def _part(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | BYTES, len(content)]) + content


# ---- the file as a whole

_OTHERS: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"PK\x03\x04", "a zip archive, such as a PyTorch checkpoint or a Keras file: export the model to ONNX"),
    (0, b"\x1f\x8b", "compressed: send the ONNX file itself"),
    (0, b"version https://git-lfs", "a pointer of Git LFS: run 'git lfs pull' and send what it brings"),
    (0, b"\x89HDF", "an HDF5 file, such as Keras writes: export the model to ONNX"),
    (0, b"\x80\x02", "a Python pickle, which is never loaded here: export the model to ONNX"),
    (0, b"\x80\x04", "a Python pickle, which is never loaded here: export the model to ONNX"),
    (0, b"\x80\x05", "a Python pickle, which is never loaded here: export the model to ONNX"),
    (0, b"GGUF", "a GGUF file: export the model to ONNX"),
    (0, b"\x7fELF", "a program or a library: send an ONNX file"),
    (0, b"#!", "a script: send an ONNX file"),
    (0, b"%PDF", "a PDF: send an ONNX file"),
    (0, b"<", "text, such as a web page in place of a download: send the ONNX file"),
    (0, b"{", "JSON: send the ONNX file"),
    (4, b"TFL3", "a TensorFlow Lite file: export the model to ONNX"),
    (4, b"ORTM", "in the runtime's own format (.ort): send the ONNX file that it was made from"),
    (8, b"{\"", "a safetensors file: export the model to ONNX"),
)  # fmt: skip
_ZIP_END: Final = b"PK\x05\x06"


def _look_at_ends(fd: int, name: str, size: int) -> None:
    """Tell apart what is no ONNX file at all, and what is one and something else too."""
    if size == 0:
        raise _refusal("file", name, "is empty: the upload, or the export before it, brought nothing")
    if size > _ONNX_BYTES:
        raise _refusal(
            "size",
            name,
            f"has {size} bytes, an ONNX file can have {_ONNX_BYTES}: save the weights as external data "
            "(onnx.save(model, path, save_as_external_data=True)) and send both files",
        )
    head = os.pread(fd, 64, 0)
    for at, mark, text in _OTHERS:
        if head[at : at + len(mark)] == mark:
            raise _refusal("format", name, f"is {text}")
    tail = os.pread(fd, min(size, (1 << 16) + 22), max(size - (1 << 16) - 22, 0))
    at = tail.rfind(_ZIP_END)
    # The end of an archive: 22 bytes, of which the last two are the length of a comment that fills the file.
    if at >= 0 and len(tail) - at >= 22 and int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail) - at - 22:
        raise _refusal("format", name, "is an ONNX file and a zip archive in one: export the model again")


# ---- the structure

_MODEL: Final = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26})
_GRAPH: Final = frozenset({1, 2, 5, 10, 11, 12, 13, 14, 15, 16})
_NODE: Final = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
_ATTRIBUTE: Final = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 20, 21, 22, 23})
_TENSOR: Final = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16})
_FUNCTION: Final = frozenset({1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14})
_SPARSE: Final = frozenset({1, 2, 3})
_VALUE: Final = frozenset({1, 2, 3, 4})

_STRING: Final = 8
_BITS: Final[dict[int, int]] = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2, 27: 6, 28: 6,
}  # fmt: skip
"""TensorProto.DataType to bits of an element; strings have no size."""
_HALVES: Final = frozenset({10, 16})
_TYPED: Final[dict[int, tuple[frozenset[int], int, int]]] = {
    4: (frozenset({1, 14}), FIXED32, 32),
    5: (frozenset({2, 3, 4, 5, 6, 9, 10, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28}), VARINT, 0),
    7: (frozenset({7}), VARINT, 0),
    10: (frozenset({11, 15}), FIXED64, 64),
    11: (frozenset({12, 13}), VARINT, 0),
}
"""Field with typed data to the types that it is for, its wire type, and its bits where they are fixed."""
_TYPED_NAMES: Final = {
    4: "float_data",
    5: "int32_data",
    6: "string_data",
    7: "int64_data",
    10: "double_data",
    11: "uint64_data",
}
_MAX_ELEMENTS: Final = 1 << 48
_EXTERNAL_KEYS: Final = frozenset({"location", "offset", "length", "checksum"})
_MAX_RANK: Final = 64
_MAX_TYPE_DEPTH: Final = 8
_FORBIDDEN_IN_LOCATION: Final = frozenset("\\:*?")
"""Of other systems' paths, and of the marker by which the runtime takes a location for an address in memory."""


_Call = tuple[str, str]
"""Operator and domain of a node, which may be a function of the model's own."""


class _Admission:
    def __init__(
        self,
        source: Source,
        limits: AdmissionLimits,
        name: str,
        folder: int,
        files: frozenset[str] | None,
        allowed: frozenset[str],
    ) -> None:
        self._source = source
        self._limits = limits
        self._name = name
        self._folder = folder
        self._files = files
        self._allowed = allowed
        self._opsets: dict[str, int] = {}
        self._oldest: dict[str, int] = {}
        """As ``_opsets``, where the model and its functions import several versions: the lowest."""
        self._functions: dict[_Call, list[_Call]] = {}
        self._calls: list[_Call] = []
        self._body_calls: dict[_Call, None] = {}
        self._seen_nodes = 0
        self._operators: set[str] = set()
        self._depth = 0
        self._text = 0
        self._weights = 0
        self._halves = 0
        self._external: dict[str, int] = {}
        """Location to the size of its file."""
        self._ranges: dict[str, dict[tuple[int, int], str]] = {}
        """Location to begin and end of a tensor, to its name."""

    def report(self) -> AdmissionReport:
        source, limits = self._source, self._limits
        ir_version = 0
        graphs: list[Field] = []
        for part in self._parts(0, source.size, _MODEL, "the model"):
            number = part.number
            if number == 1:
                ir_version = part.value
            elif number == 7:
                graphs.append(part)
            elif number == 8:
                self._import(part)
            elif number == 20:
                raise _refusal("training", "the model", "has training information: export it for inference")
            elif number == 25:
                self._function(part)
            elif number in (2, 3, 4, 6, 14, 26):
                self._count_text(part, "the model")
        if not graphs:
            raise _refusal(
                "format", self._name, f"has no graph in its {source.size} bytes: it is no ONNX model, or cut off"
            )
        self._check_versions(ir_version)
        for part in graphs:
            self._graph(part, "graph", 0)
        nodes = self._expanded()
        self._check_operators()
        self._check_ranges()
        on_disk = source.size + sum(self._external.values())
        if self._weights > limits.overcommit * on_disk + 16 * _MIB:
            raise _refusal(
                "weights",
                "the initialisers",
                f"take {self._weights} bytes together, and the files have {on_disk}: the same data makes up many "
                "tensors; let nodes share one initialiser",
            )
        return AdmissionReport(
            ir_version,
            dict(self._opsets),
            frozenset(domain for operator, domain in self._used() if (operator, domain) not in self._functions),
            frozenset(self._operators),
            nodes,
            self._depth,
            source.size,
            self._weights,
            self._halves,
            tuple(sorted(self._external)),
        )

    def _used(self) -> dict[_Call, None]:
        return {**dict.fromkeys(self._calls), **self._body_calls}

    # -- fields

    def _parts(
        self, start: int, stop: int, known: frozenset[int], place: str, skip_runs: bool = False
    ) -> Iterator[Field]:
        for part in self._source.fields(start, stop, skip_runs=skip_runs):
            if part.number not in known:
                raise _refusal(
                    "format",
                    place,
                    f"has a part that ONNX does not know (field {part.number} at byte {part.start}): the file is "
                    "damaged, holds something else too, or is of a newer ONNX than this gateway's; export it again",
                )
            yield part

    def _text_of(self, part: Field, place: str, limit: int | None = None) -> str:
        limit = self._limits.name_bytes if limit is None else limit
        size = part.stop - part.start
        if part.kind != BYTES:
            raise _refusal("format", place, f"has a number where text belongs (byte {part.start})")
        if size > limit:
            raise _refusal("names", place, f"has a name of {size} bytes, at most {limit} are taken: shorten it")
        try:
            text = self._source.read(part.start, part.stop).decode()
        except UnicodeDecodeError:
            raise _refusal("names", place, f"has a name that is not UTF-8 (byte {part.start}): rename it") from None
        if not text.isprintable():
            raise _refusal("names", place, f"has a name with control characters (byte {part.start}): rename it")
        return text

    def _count_text(self, part: Field, place: str) -> None:
        self._text += part.stop - part.start
        if self._text > self._limits.text_bytes:
            raise _refusal(
                "metadata",
                place,
                f"descriptions and metadata have more than {self._limits.text_bytes} bytes: strip them "
                "(doc_string, metadata_props), they are not needed to serve the model",
            )

    # -- versions and operators

    def _import(self, part: Field) -> None:
        domain, version = "", 0
        for inner in self._source.fields(part.start, part.stop):
            if inner.number == 1:
                domain = self._text_of(inner, "opset_import")
            elif inner.number == 2:
                version = inner.value
        domain = "" if domain == "ai.onnx" else domain
        self._opsets[domain] = max(version, self._opsets.get(domain, 0))
        self._oldest[domain] = min(version, self._oldest.get(domain, version))

    def _check_versions(self, ir_version: int) -> None:
        newest = newest_ir_version()
        if not 1 <= ir_version <= newest:
            raise _refusal(
                "version",
                "ir_version",
                f"is {ir_version}, this runtime reads 1 to {newest}: export with an older onnx package, or set "
                f"model.ir_version = {min(newest, 10)} where the model uses nothing newer",
            )
        if not self._opsets:
            raise _refusal("version", "opset_import", "is missing: export the model again")
        for domain, version in self._opsets.items():
            if domain not in STANDARD_DOMAINS:
                continue
            named = domain or "ai.onnx"
            newest = newest_opset(domain)
            if not 1 <= version <= newest:
                raise _refusal(
                    "version",
                    f"opset_import of {named}",
                    f"is version {version}, this runtime has 1 to {newest}: export with opset_version={newest} or "
                    "lower, or convert with onnx.version_converter",
                )

    def _check_operators(self) -> None:
        for operator, domain in self._used():
            if (operator, domain) in self._functions:
                continue
            place = f"operator {domain or 'ai.onnx'}::{operator}"
            if operator in _REFUSED_OPERATORS:
                raise _refusal("operators", place, "reads or runs what is not in the model: export without it")
            if domain in _INTERNAL_DOMAINS:
                raise _refusal(
                    "operators",
                    place,
                    "is of a model that ONNX Runtime optimised for one processor: send the model from before that",
                )
            if domain in EXTENSIONS_DOMAINS and domain not in self._allowed:
                raise _refusal(
                    "operators",
                    place,
                    "is of onnxruntime-extensions, which the operator of this gateway has not allowed for this model: "
                    "ask for it (setting extensions_models), or leave that step to the client",
                )
            if domain not in STANDARD_DOMAINS and domain not in self._allowed:
                raise _refusal(
                    "operators",
                    place,
                    "is a custom operator, and no libraries are loaded for models: replace it by operators of ai.onnx, "
                    "ai.onnx.ml or com.microsoft, or by a function that the model itself defines",
                )
            if domain not in self._opsets:
                raise _refusal("version", place, "is used, and opset_import does not name its domain: add it")
            if domain in STANDARD_DOMAINS and _operators():
                self._check_known(operator, domain, place)

    def _check_known(self, operator: str, domain: str, place: str) -> None:
        """See that the runtime has an operator of a standard domain, in the version that the model imports."""
        versions = _operators().get((operator, domain))
        named = domain or "ai.onnx"
        newest, oldest = self._opsets[domain], self._oldest[domain]
        if versions is None:
            raise _refusal(
                "operators",
                place,
                f"does not exist in this gateway's ONNX Runtime {ort.__version__}, which has {named} up to version "
                f"{newest_opset(domain)}: look for a mistake in its name or domain, or export with operators that "
                "are there",
            )
        if min(versions) > newest:
            raise _refusal(
                "operators",
                place,
                f"came with version {min(versions)} of {named}, the model imports version {newest}: export with "
                f"opset_version={min(versions)} or higher, of which this gateway's ONNX Runtime {ort.__version__} has "
                f"up to {newest_opset(domain)}",
            )
        # Where a function imports an older version, the operator may be its: what is not certain, the load tells.
        last = max((version for version in versions if version <= oldest), default=None)
        if last is not None and versions[last]:
            raise _refusal(
                "operators",
                place,
                f"was withdrawn with version {last} of {named}, the model imports version {newest}: export it again "
                "for that version with the operators that took its place",
            )

    def _expanded(self) -> int:
        """The number of nodes once every function is written out where it is called; also finds circles."""
        sizes: dict[_Call, int] = {}

        def size_of(key: _Call, around: tuple[_Call, ...]) -> int:
            if key in sizes:
                return sizes[key]
            if key in around or len(around) > 32:
                raise _refusal("functions", f"function {key[0]}", "calls itself, or functions are nested too deeply")
            total = 0
            for call in self._functions[key]:
                total += size_of(call, (*around, key)) if call in self._functions else 1
            sizes[key] = total
            return total

        total = self._seen_nodes
        for key in self._functions:
            size_of(key, ())
        for call in self._calls:
            if call in self._functions:
                total += sizes[call]
        if total > self._limits.nodes:
            raise _refusal(
                "nodes",
                "the graph",
                f"has {total} nodes with its functions written out, at most {self._limits.nodes} are taken: "
                "simplify it",
            )
        return total

    # -- graphs

    def _graph(self, part: Field, place: str, depth: int, calls: list[_Call] | None = None) -> None:
        calls = self._calls if calls is None else calls
        if depth > self._limits.depth:
            raise _refusal(
                "depth",
                place,
                f"graphs are nested {depth} deep, at most {self._limits.depth} are taken: flatten If, Loop and Scan",
            )
        self._depth = max(self._depth, depth)
        inputs = outputs = 0
        for inner in self._parts(part.start, part.stop, _GRAPH, place):
            number = inner.number
            if number == 1:
                self._node(inner, place, depth, calls)
            elif number == 2:
                self._text_of(inner, place)
            elif number == 5:
                self._tensor(inner, f"initialiser of {place}")
            elif number == 15:
                self._sparse(inner, f"sparse initialiser of {place}")
            elif number in (10, 14, 16):
                self._count_text(inner, place)
            else:
                inputs += number == 11
                outputs += number == 12
                self._value(inner, f"{'input' if number == 11 else 'output' if number == 12 else 'value'} of {place}")
        if max(inputs, outputs) > self._limits.values:
            raise _refusal(
                "values", place, f"has {inputs} inputs and {outputs} outputs, at most {self._limits.values} are taken"
            )
        if depth == 0 and not outputs:
            raise _refusal("format", place, "has no outputs, so there is nothing to ask it: export the model again")

    def _value(self, part: Field, place: str) -> None:
        for inner in self._parts(part.start, part.stop, _VALUE, place):
            if inner.number == 1:
                if not self._text_of(inner, place) and not place.startswith("value"):
                    raise _refusal("names", place, "has no name: export the model again")
            elif inner.number == 2:
                self._type(inner, place, 0)
            else:
                self._count_text(inner, place)

    def _type(self, part: Field, place: str, depth: int) -> None:
        if depth > _MAX_TYPE_DEPTH:
            raise _refusal("depth", place, f"has types nested more than {_MAX_TYPE_DEPTH} deep")
        for inner in self._source.fields(part.start, part.stop):
            if inner.kind == BYTES and inner.number in (4, 5, 9):  # sequence, map, optional
                for held in self._source.fields(inner.start, inner.stop):
                    if held.kind == BYTES:
                        self._type(held, place, depth + 1)
            elif inner.kind == BYTES and inner.number in (1, 8):
                self._shape(inner, place)

    def _shape(self, part: Field, place: str) -> None:
        for inner in self._source.fields(part.start, part.stop):
            if inner.number != 2 or inner.kind != BYTES:
                continue
            rank = 0
            for dimension in self._source.fields(inner.start, inner.stop):
                rank += 1
                if dimension.kind != BYTES:
                    continue
                for said in self._source.fields(dimension.start, dimension.stop):
                    if said.number == 2:
                        self._text_of(said, place)
            if rank > _MAX_RANK:
                raise _refusal("shape", place, f"has {rank} dimensions, at most {_MAX_RANK} are taken")

    def _node(self, part: Field, place: str, depth: int, calls: list[_Call]) -> None:
        self._seen_nodes += 1
        if self._seen_nodes > self._limits.nodes:
            raise _refusal("nodes", place, f"has more than {self._limits.nodes} nodes: simplify it")
        operator = domain = ""
        attributes: list[Field] = []
        for inner in self._parts(part.start, part.stop, _NODE, f"node {self._seen_nodes} of {place}"):
            number = inner.number
            if number in (1, 2, 3, 4, 7, 8):
                text = self._text_of(inner, f"node {self._seen_nodes} of {place}")
                if number == 4:
                    operator = text
                elif number == 7:
                    domain = "" if text == "ai.onnx" else text
            elif number == 5:
                attributes.append(inner)
            else:
                self._count_text(inner, place)
        if not operator:
            raise _refusal("format", f"node {self._seen_nodes} of {place}", "has no operator: export the model again")
        calls.append((operator, domain))
        self._operators.add(operator)
        for inner in attributes:
            self._attribute(inner, f"{operator} (node {self._seen_nodes}) of {place}", depth, calls)

    def _attribute(self, part: Field, place: str, depth: int, calls: list[_Call]) -> None:
        for inner in self._parts(part.start, part.stop, _ATTRIBUTE, place, skip_runs=True):
            number, kind = inner.number, inner.kind
            if kind != BYTES:
                continue
            if number in (5, 10):
                self._tensor(inner, f"attribute of {place}")
            elif number in (6, 11):
                self._graph(inner, f"subgraph of {place}", depth + 1, calls)
            elif number in (22, 23):
                self._sparse(inner, f"attribute of {place}")
            elif number in (14, 15):
                self._type(inner, place, 0)
            elif number in (1, 21):
                self._text_of(inner, f"attribute of {place}")
            elif number == 13:
                self._count_text(inner, place)

    def _function(self, part: Field) -> None:
        name = domain = ""
        nodes: list[Field] = []
        attributes: list[Field] = []
        calls: list[_Call] = []
        for inner in self._parts(part.start, part.stop, _FUNCTION, "a function"):
            number = inner.number
            if number == 1:
                name = self._text_of(inner, "a function")
            elif number == 10:
                domain = self._text_of(inner, "a function")
            elif number == 7:
                nodes.append(inner)
            elif number == 11:
                attributes.append(inner)
            elif number == 9:
                self._import(inner)
            elif number == 12:
                self._value(inner, f"value of function {name}")
            elif number in (4, 5, 6, 13):
                self._text_of(inner, f"function {name}")
            else:
                self._count_text(inner, f"function {name}")
        domain = "" if domain == "ai.onnx" else domain
        if domain in STANDARD_DOMAINS:
            # It would take the place of an operator that everybody knows.
            raise _refusal(
                "functions",
                f"function {name}",
                f"is defined in the domain '{domain or 'ai.onnx'}': use one of your own",
            )
        for inner in nodes:
            self._node(inner, f"function {name}", 1, calls)
        for inner in attributes:
            self._attribute(inner, f"function {name}", 1, calls)
        # Two of a name are overloads, of which a call names one; counting both is on the careful side.
        self._functions.setdefault((name, domain), []).extend(calls)
        # What a function calls is checked like what the graph calls, and counted where it is called.
        self._body_calls.update(dict.fromkeys(calls))

    # -- tensors

    def _tensor(self, part: Field, place: str, *, sparse: bool = False) -> tuple[int, list[int], int]:
        """Check one tensor; its element type, its dimensions and the bytes that it takes."""
        name = ""
        element = 0
        dims: list[int] = []
        raw: int | None = None
        typed: dict[int, int] = {}
        entries: list[Field] = []
        is_external = False
        strings = 0
        for inner in self._parts(part.start, part.stop, _TENSOR, place):
            number = inner.number
            if number == 1:
                dims += [inner.value] if inner.kind == VARINT else self._source.varints(inner.start, inner.stop)
                if len(dims) > _MAX_RANK:
                    raise _refusal("shape", place, f"has more than {_MAX_RANK} dimensions")
            elif number == 2:
                element = inner.value
            elif number == 3:
                raise _refusal(
                    "weights", place, "is stored in segments, which the runtime cannot read: export it again"
                )
            elif number == 6:
                strings += 1
                typed[6] = typed.get(6, 0) + inner.stop - inner.start
            elif number in _TYPED:
                typed[number] = typed.get(number, 0) + self._count(inner, number, place)
            elif number == 8:
                name = self._text_of(inner, place)
            elif number == 9:
                raw = (raw or 0) + inner.stop - inner.start
            elif number == 13:
                entries.append(inner)
            elif number == 14:
                is_external = inner.value == 1
            else:
                self._count_text(inner, place)
        if name:
            place = f"{place} '{name}'"
        elements = self._elements(dims, place)
        if element == _STRING:
            if raw is not None or entries or is_external or strings != elements:
                raise _refusal(
                    "weights", place, f"has {strings} strings, its shape {dims} says {elements}: export again"
                )
            nbytes = typed.get(6, 0)
        else:
            if element not in _BITS:
                raise _refusal(
                    "weights", place, f"has elements of type {element}, which does not exist: export it again"
                )
            nbytes = (elements * _BITS[element] + 7) // 8
            if entries or is_external:
                if sparse:
                    raise _refusal(
                        "external data", place, "is sparse and external: save sparse tensors in the ONNX file"
                    )
                if raw is not None or typed:
                    raise _refusal("external data", place, "has data in the file and outside: export it again")
                self._external_data(entries, is_external, nbytes, name, place)
            else:
                self._check_data(element, elements, nbytes, raw, typed, dims, place)
        self._weights += nbytes
        if element in _HALVES:
            self._halves += nbytes
        return element, dims, nbytes

    def _elements(self, dims: list[int], place: str) -> int:
        elements = 1
        for dim in dims:
            if dim < 0:
                raise _refusal("shape", place, f"has the shape {dims}, and no dimension can be negative")
            elements *= dim
        if elements > _MAX_ELEMENTS:
            raise _refusal("shape", place, f"has the shape {dims}, which is {elements} elements: export it again")
        return elements

    def _count(self, part: Field, number: int, place: str) -> int:
        """How many numbers one field of typed data has, packed or not."""
        _, kind, bits = _TYPED[number]
        if part.kind == kind:
            return 1
        if part.kind != BYTES:
            raise _refusal("format", place, f"has {_TYPED_NAMES[number]} in another form than ONNX has it")
        size = part.stop - part.start
        if bits:
            if size % (bits // 8):
                raise _refusal("weights", place, f"has {size} bytes of {_TYPED_NAMES[number]}: no whole number of them")
            return size // (bits // 8)
        return self._source.count_varints(part.start, part.stop)

    def _check_data(
        self,
        element: int,
        elements: int,
        nbytes: int,
        raw: int | None,
        typed: dict[int, int],
        dims: list[int],
        place: str,
    ) -> None:
        if raw is not None:
            if typed or raw != nbytes:
                raise _refusal(
                    "weights", place, f"has {raw} bytes of data, its shape {dims} says {nbytes}: export it again"
                )
            return
        bits = _BITS[element]
        expected = elements
        if element in (14, 15):  # a complex number is two
            expected = 2 * elements
        elif bits < 8:  # a byte of them in each number
            expected = (elements * bits + 7) // 8
        for number, count in typed.items():
            if number not in _TYPED or element not in _TYPED[number][0]:
                raise _refusal("weights", place, f"keeps elements of type {element} as {_TYPED_NAMES[number]}")
            if count != expected:
                raise _refusal(
                    "weights", place, f"has {count} numbers of data, its shape {dims} says {expected}: export it again"
                )
        if not typed and expected:
            raise _refusal("weights", place, f"has the shape {dims} and no data: export it again")

    def _sparse(self, part: Field, place: str) -> None:
        element = 0
        dims: list[int] = []
        for inner in self._parts(part.start, part.stop, _SPARSE, place):
            if inner.number == 1:
                element, _, _ = self._tensor(inner, place, sparse=True)
            elif inner.number == 2:
                self._tensor(inner, place, sparse=True)
            else:
                dims += [inner.value] if inner.kind == VARINT else self._source.varints(inner.start, inner.stop)
                if len(dims) > _MAX_RANK:
                    raise _refusal("shape", place, f"has more than {_MAX_RANK} dimensions")
        dense = (self._elements(dims, place) * _BITS.get(element, 128) + 7) // 8
        if dense > self._limits.sparse_bytes:
            raise _refusal(
                "weights",
                place,
                f"takes {dense} bytes once it is expanded, at most {self._limits.sparse_bytes} are taken",
            )
        self._weights += dense

    # -- external data

    def _external_data(self, entries: list[Field], is_external: bool, nbytes: int, name: str, place: str) -> None:
        said: dict[str, str] = {}
        for entry in entries:
            pair = {1: "", 2: ""}
            for inner in self._parts(entry.start, entry.stop, frozenset({1, 2}), f"external data of {place}"):
                pair[inner.number] = self._text_of(inner, f"external data of {place}")
            if pair[1] not in _EXTERNAL_KEYS or pair[1] in said:
                raise _refusal(
                    "external data",
                    place,
                    f"says '{pair[1]}'{' twice' if pair[1] in said else ''}: known are location, offset, length and "
                    "checksum, each once",
                )
            said[pair[1]] = pair[2]
        if not is_external or "location" not in said:
            raise _refusal("external data", place, "is half inside and half outside of the file: export it again")
        location = said["location"]
        size = self._external_size(location, place)
        numbers: dict[str, int] = {}
        for key in ("offset", "length"):
            text = said.get(key)
            if text is not None:
                if not (text.isascii() and text.isdecimal()) or len(text) > 18:
                    raise _refusal("external data", place, f"has the {key} '{text}', expected a number of bytes")
                numbers[key] = int(text)
        start = numbers.get("offset", 0)
        if numbers.get("length", nbytes) != nbytes:
            raise _refusal(
                "external data", place, f"has the length {numbers['length']}, its shape says {nbytes}: export it again"
            )
        if start + nbytes > size:
            raise _refusal(
                "external data",
                place,
                f"ends at byte {start + nbytes} of '{location}', which has {size}: it is cut off, or another model's",
            )
        if nbytes:
            self._ranges.setdefault(location, {}).setdefault((start, start + nbytes), name)

    def _external_size(self, location: str, place: str) -> int:
        if location in self._external:
            return self._external[location]
        advice = "save external data beside the model, as one file with a plain relative name"
        path = PurePosixPath(location)
        parts = location.split("/")
        if not location or path.is_absolute() or ".." in parts or _FORBIDDEN_IN_LOCATION & set(location):
            raise _refusal("external data", place, f"'{location}' does not lie in the model's folder: {advice}")
        if self._files is not None and str(path) not in self._files:
            raise _refusal("external data", place, f"'{location}' is not among the version's files: send it with them")
        if len(self._external) >= self._limits.external_files:
            raise _refusal("external data", place, f"there are more than {self._limits.external_files} files: {advice}")
        with contextlib.ExitStack() as opened:
            folder = self._folder
            for index, name in enumerate(path.parts):
                last = index == len(path.parts) - 1
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_NONBLOCK if last else os.O_DIRECTORY)
                try:
                    folder = os.open(name, flags, dir_fd=folder)
                except FileNotFoundError:
                    raise _refusal("external data", place, f"'{location}' is missing: send it with the model") from None
                except OSError:
                    raise _refusal(
                        "external data", place, f"'{location}' is a link or cannot be opened: send the file itself"
                    ) from None
                opened.callback(os.close, folder)
            status = os.fstat(folder)
            if not path.parts or not stat.S_ISREG(status.st_mode):
                raise _refusal("external data", place, f"'{location}' is not a regular file: send the file itself")
            if os.path.samestat(status, self._source.status):
                raise _refusal("external data", place, f"'{location}' is the ONNX file itself: {advice}")
        self._external[location] = status.st_size
        return status.st_size

    def _check_ranges(self) -> None:
        for location, ranges in self._ranges.items():
            end, before = 0, ""
            for (start, stop), name in sorted(ranges.items()):
                if start < end:
                    raise _refusal(
                        "external data",
                        f"initialiser '{name}'",
                        f"begins at byte {start} of '{location}', inside of '{before}': tensors may share their data "
                        "whole, not in part",
                    )
                end, before = stop, name
