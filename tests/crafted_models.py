"""Models that were made to be refused. Each carries a marker and does no harm, whoever loads it.

Every builder writes ``model.onnx``, and what goes with it, into an empty folder; beside the folder lies
``outside/secret.bin``, which none of them may have opened.
"""

from __future__ import annotations

import io
import itertools
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from models import F32, add_one, matmul, model, node, value

SECRET: Final = "outside/secret.bin"
_WIDTH: Final = 16
_NBYTES: Final = 4 * _WIDTH


@dataclass(frozen=True, slots=True)
class Crafted:
    """One model: how it is written, the rule that refuses it, and words of the message."""

    build: Callable[[Path], None]
    rule: str
    words: Sequence[str]


def _proto(content: bytes = b"") -> onnx.ModelProto:
    return onnx.load_model_from_string(content or add_one(_WIDTH))


def _write(folder: Path, proto: onnx.ModelProto | bytes) -> None:
    content = proto if isinstance(proto, bytes) else proto.SerializeToString()
    (folder / "model.onnx").write_bytes(content)


def _external(**entries: str) -> onnx.ModelProto:
    """A model whose only initialiser lies outside of the file."""
    proto = _proto()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, said in entries.items():
        tensor.external_data.add(key=key, value=said)
    return proto


def _data(folder: Path, size: int = _NBYTES, name: str = "weights.bin") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(bytes(size))


def _points_at(location: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        _data(folder)
        _write(folder, _external(location=location, length=str(_NBYTES)))

    return build


def _says(size: int = _NBYTES, **entries: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        _data(folder, size)
        _write(folder, _external(location="weights.bin", **entries))

    return build


def _symlink(folder: Path) -> None:
    (folder / "weights.bin").symlink_to(folder.parent / SECRET)
    _write(folder, _external(location="weights.bin"))


def _symlinked_folder(folder: Path) -> None:
    (folder / "data").symlink_to(folder.parent / "outside")
    _write(folder, _external(location="data/secret.bin"))


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "weights.bin")
    _write(folder, _external(location="weights.bin"))


def _directory(folder: Path) -> None:
    (folder / "weights.bin").mkdir()
    _write(folder, _external(location="weights.bin"))


def _itself(folder: Path) -> None:
    proto = _external(location="model.onnx")
    proto.doc_string = "x" * _NBYTES
    _write(folder, proto)


def _hard_link_to_itself(folder: Path) -> None:
    proto = _external(location="weights.bin")
    proto.doc_string = "x" * _NBYTES
    _write(folder, proto)
    (folder / "weights.bin").hardlink_to(folder / "model.onnx")


def _overlap(folder: Path) -> None:
    _data(folder, 2 * _NBYTES)
    proto = _external(location="weights.bin", offset="0", length=str(_NBYTES))
    other = proto.graph.initializer.add()
    other.CopyFrom(proto.graph.initializer[0])
    other.name = "other"
    other.external_data[1].value = "4"
    _write(folder, proto)


def _shared_thousandfold(folder: Path) -> None:
    _data(folder, 1 << 16)
    proto = _external(location="weights.bin", length=str(1 << 16))
    first = proto.graph.initializer[0]
    first.dims[:] = [1 << 14]
    for index in range(2000):
        other = proto.graph.initializer.add()
        other.CopyFrom(first)
        other.name = f"w{index}"
    _write(folder, proto)


def _twice_a_location(folder: Path) -> None:
    _data(folder)
    proto = _external(location="weights.bin")
    proto.graph.initializer[0].external_data.add(key="location", value="../" + SECRET)
    _write(folder, proto)


def _inside_and_outside(folder: Path) -> None:
    _data(folder)
    proto = _external(location="weights.bin")
    proto.graph.initializer[0].raw_data = bytes(_NBYTES)
    _write(folder, proto)


def _external_without_saying(folder: Path) -> None:
    proto = _external(location="../" + SECRET)
    proto.graph.initializer[0].data_location = TensorProto.DEFAULT
    _write(folder, proto)


def _constant(tensor: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor)


def _outside_tensor(location: str = "../" + SECRET) -> onnx.TensorProto:
    tensor = TensorProto(name="c", data_type=F32, dims=[_WIDTH], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


_X = [value("x", F32, ["batch", _WIDTH])]
_Y = [value("y", F32, ["batch", _WIDTH])]


def _in_attribute(folder: Path) -> None:
    _write(folder, model([_constant(_outside_tensor()), node("Add", ["x", "c"], ["y"])], _X, _Y))


def _branch(nodes: Sequence[onnx.NodeProto], name: str = "b") -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [value("r", F32, None)])


def _in_subgraph(folder: Path) -> None:
    inner = _branch([_constant(_outside_tensor()), node("Identity", ["c"], ["r"])])
    choose = node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner)
    _write(folder, model([choose], [value("flag", TensorProto.BOOL, [])], [value("y", F32, None)]))


def _initialiser_of_subgraph(folder: Path) -> None:
    inner = _branch([node("Identity", ["c"], ["r"])])
    inner.initializer.append(_outside_tensor())
    choose = node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner)
    _write(folder, model([choose], [value("flag", TensorProto.BOOL, [])], [value("y", F32, None)]))


def _function(name: str, nodes: Sequence[onnx.NodeProto], domain: str = "mine") -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    return helper.make_function(domain, name, ["a"], ["b"], list(nodes), imports)


def _with_functions(folder: Path, functions: Sequence[onnx.FunctionProto], call: str = "f") -> None:
    proto = _proto(model([node(call, ["x"], ["y"], domain="mine")], _X, _Y, domains={"mine": 1}))
    proto.functions.extend(functions)
    _write(folder, proto)


def _in_function(folder: Path) -> None:
    _with_functions(folder, [_function("f", [_constant(_outside_tensor()), node("Add", ["a", "c"], ["b"])])])


def _function_calls_itself(folder: Path) -> None:
    _with_functions(folder, [_function("f", [node("f", ["a"], ["b"], domain="mine")])])


def _laughing_functions(folder: Path) -> None:
    def twice(index: int) -> onnx.FunctionProto:
        inner = f"f{index + 1}"
        calls = [node(inner, ["a"], ["m"], domain="mine"), node(inner, ["m"], ["b"], domain="mine")]
        return _function(f"f{index}", calls)

    last = _function("f24", [node("Neg", ["a"], ["b"])])
    _with_functions(folder, [*(twice(index) for index in range(24)), last], "f0")


def _function_takes_the_place_of_an_operator(folder: Path) -> None:
    proto = _proto()
    proto.functions.append(_function("Add", [node("Neg", ["a"], ["b"])], domain=""))
    _write(folder, proto)


def _sparse(dims: Sequence[int], values: onnx.TensorProto | None = None) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        proto = _proto()
        held = values or numpy_helper.from_array(np.ones(1, np.float32), "c")
        indices = numpy_helper.from_array(np.zeros(1, np.int64), "at")
        del proto.graph.initializer[:]
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(held, indices, list(dims)))
        _write(folder, proto)

    return build


def _outside_sparse(folder: Path) -> None:
    _sparse([_WIDTH], _outside_tensor())(folder)


def _operator(name: str, domain: str, imported: bool = True) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        domains = {domain: 1} if imported and domain else {}
        _write(folder, model([node(name, ["x"], ["y"], domain=domain)], _X, _Y, domains=domains))

    return build


def _custom_in_subgraph(folder: Path) -> None:
    inner = _branch([node("Marker", ["flag"], ["r"], domain="evil.example")])
    choose = node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner)
    outputs = [value("y", F32, None)]
    _write(folder, model([choose], [value("flag", TensorProto.BOOL, [])], outputs, domains={"evil.example": 1}))


def _custom_in_function(folder: Path) -> None:
    _with_functions(folder, [_function("f", [node("Marker", ["a"], ["b"], domain="evil.example")])])


def _version(ir_version: int | None = None, opset: int | None = None, domain: str = "") -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        proto = _proto()
        if ir_version is not None:
            proto.ir_version = ir_version
        if opset is not None:
            del proto.opset_import[:]
            proto.opset_import.extend([helper.make_opsetid("", 20 if domain else opset)])
            if domain:
                proto.opset_import.extend([helper.make_opsetid(domain, opset)])
        _write(folder, proto)

    return build


def _no_imports(folder: Path) -> None:
    proto = _proto()
    del proto.opset_import[:]
    _write(folder, proto)


def _initialiser(**changes: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        proto = _proto()
        tensor = proto.graph.initializer[0]
        for name, said in changes.items():
            if name == "dims":
                tensor.dims[:] = said
            elif name == "float_data":
                tensor.ClearField("raw_data")
                tensor.float_data.extend(said)
            else:
                setattr(tensor, name, said)
        _write(folder, proto)

    return build


def _no_data(folder: Path) -> None:
    proto = _proto()
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].dims[:] = [1 << 20, 1 << 20]
    _write(folder, proto)


def _nested(depth: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        inner = _branch([helper.make_node("Constant", [], ["r"], value_float=1.0)])
        for _ in range(depth - 1):
            # The other branch stays flat, or the file would double with each level.
            flat = _branch([helper.make_node("Constant", [], ["r"], value_float=2.0)])
            inner = _branch([node("If", ["flag"], ["r"], then_branch=inner, else_branch=flat)])
        flat = _branch([helper.make_node("Constant", [], ["r"], value_float=2.0)])
        outer = node("If", ["flag"], ["y"], then_branch=inner, else_branch=flat)
        _write(folder, model([outer], [value("flag", TensorProto.BOOL, [])], [value("y", F32, None)]))

    return build


def _many_nodes(folder: Path) -> None:
    names = ["x", *(f"v{index}" for index in range(100_001)), "y"]
    _write(folder, model([node("Neg", [a], [b]) for a, b in itertools.pairwise(names)], _X, _Y))


def _many_outputs(folder: Path) -> None:
    outputs = [f"y{index}" for index in range(5000)]
    _write(
        folder,
        model([node("Identity", ["x"], [y]) for y in outputs], _X, [value(y, F32, ["b", _WIDTH]) for y in outputs]),
    )


def _no_outputs(folder: Path) -> None:
    proto = _proto()
    del proto.graph.output[:]
    _write(folder, proto)


def _renamed(name: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        _write(folder, model([node("Neg", [name], ["y"])], [value(name, F32, [1])], [value("y", F32, [1])]))

    return build


def _metadata(folder: Path) -> None:
    proto = _proto()
    for index in range(17):
        proto.metadata_props.add(key=f"k{index}", value="x" * (1 << 20))
    _write(folder, proto)


def _training(folder: Path) -> None:
    proto = _proto()
    proto.training_info.add().algorithm.CopyFrom(proto.graph)
    _write(folder, proto)


def _nested_types(folder: Path) -> None:
    proto = _proto()
    kind = proto.graph.input[0].type
    inner = onnx.TypeProto()
    inner.CopyFrom(kind)
    for _ in range(12):
        outer = onnx.TypeProto()
        outer.sequence_type.elem_type.CopyFrom(inner)
        inner = outer
    kind.CopyFrom(inner)
    _write(folder, proto)


def _attribute_of_graphs(folder: Path) -> None:
    """The subgraph hides in an attribute that says it is a number."""
    inner = helper.make_graph([_constant(_outside_tensor())], "hidden", [], [value("c", F32, None)])
    proto = _proto()
    hidden = AttributeProto(name="axis", type=AttributeProto.INT, i=0)
    hidden.g.CopyFrom(inner)
    proto.graph.node[0].attribute.append(hidden)
    _write(folder, proto)


def _two_graphs(folder: Path) -> None:
    """Protobuf joins a message that comes twice."""
    second = onnx.ModelProto()
    second.graph.initializer.append(_outside_tensor())
    _write(folder, add_one(_WIDTH) + second.SerializeToString())


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda folder: _write(folder, content)


def _polyglot(folder: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("marker.txt", "marker")
    proto = _proto()
    proto.doc_string = "text"
    raw = archive.getvalue()
    # As the last field, a description, so that the archive ends the file.
    _write(folder, proto.SerializeToString() + bytes([0x32]) + _varint(len(raw)) + raw)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _link(folder: Path) -> None:
    (folder.parent / "outside" / "model.onnx").write_bytes(add_one())
    (folder / "model.onnx").symlink_to(folder.parent / "outside" / "model.onnx")


def _memory_address(folder: Path) -> None:
    # The runtime takes this location for an address in its own memory, with the offset as pointer.
    _write(folder, _external(location="*/_ORT_MEM_ADDR_/*", offset="4096", length=str(_NBYTES)))


CRAFTED: Final[dict[str, Crafted]] = {
    "parent-folder": Crafted(_points_at("../" + SECRET), "external data", ["../outside", "model's folder"]),
    "deep-parent": Crafted(_points_at("a/../../" + SECRET), "external data", ["model's folder"]),
    "absolute": Crafted(_points_at("/etc/passwd"), "external data", ["/etc/passwd", "model's folder"]),
    "backslashes": Crafted(_points_at("..\\outside\\secret.bin"), "external data", ["model's folder"]),
    "drive": Crafted(_points_at("C:/secret.bin"), "external data", ["model's folder"]),
    "memory-address": Crafted(_memory_address, "external data", ["model's folder"]),
    "process-memory": Crafted(_points_at("/proc/self/mem"), "external data", ["model's folder"]),
    "no-location": Crafted(_points_at(""), "external data", ["model's folder"]),
    "dot": Crafted(_points_at("."), "external data", ["not a regular file"]),
    "symlink": Crafted(_symlink, "external data", ["link"]),
    "symlinked-folder": Crafted(_symlinked_folder, "external data", ["link"]),
    "pipe": Crafted(_pipe, "external data", ["regular file"]),
    "directory": Crafted(_directory, "external data", ["regular file"]),
    "itself": Crafted(_itself, "external data", ["ONNX file itself"]),
    "link-to-itself": Crafted(_hard_link_to_itself, "external data", ["ONNX file itself"]),
    "missing-data": Crafted(_points_at("other.bin"), "external data", ["'c'", "missing", "send it"]),
    "cut-off-data": Crafted(_says(_NBYTES - 1), "external data", ["ends at byte 64", "has 63"]),
    "offset-past-the-end": Crafted(_says(offset="64"), "external data", ["ends at byte 128"]),
    "negative-offset": Crafted(_says(offset="-4"), "external data", ["offset '-4'"]),
    "huge-offset": Crafted(_says(offset="9" * 30), "external data", ["offset"]),
    "wrong-length": Crafted(_says(128, length="128"), "external data", ["length 128", "says 64"]),
    "unknown-key": Crafted(_says(basepath="/etc"), "external data", ["basepath", "known are"]),
    "location-twice": Crafted(_twice_a_location, "external data", ["twice"]),
    "inside-and-outside": Crafted(_inside_and_outside, "external data", ["in the file and outside"]),
    "external-without-saying": Crafted(_external_without_saying, "external data", ["half inside"]),
    "overlap": Crafted(_overlap, "external data", ["inside of"]),
    "shared-thousandfold": Crafted(_shared_thousandfold, "weights", ["131137536 bytes"]),
    "in-attribute": Crafted(_in_attribute, "external data", ["attribute of Constant", "model's folder"]),
    "in-subgraph": Crafted(_in_subgraph, "external data", ["subgraph of If", "model's folder"]),
    "initialiser-of-subgraph": Crafted(_initialiser_of_subgraph, "external data", ["subgraph", "model's folder"]),
    "in-function": Crafted(_in_function, "external data", ["function f", "model's folder"]),
    "in-hidden-graph": Crafted(_attribute_of_graphs, "external data", ["subgraph", "model's folder"]),
    "in-second-graph": Crafted(_two_graphs, "external data", ["model's folder"]),
    "sparse-outside": Crafted(_outside_sparse, "external data", ["sparse"]),
    "sparse-bomb": Crafted(_sparse([1 << 20, 1 << 10]), "weights", ["4294967296 bytes"]),
    "function-calls-itself": Crafted(_function_calls_itself, "functions", ["function f", "calls itself"]),
    "laughing-functions": Crafted(_laughing_functions, "nodes", ["functions written out", "100000"]),
    "operator-replaced": Crafted(_function_takes_the_place_of_an_operator, "functions", ["Add"]),
    "custom-domain": Crafted(_operator("Marker", "evil.example"), "operators", ["evil.example::Marker", "replace it"]),
    "custom-in-subgraph": Crafted(_custom_in_subgraph, "operators", ["evil.example::Marker"]),
    "custom-in-function": Crafted(_custom_in_function, "operators", ["evil.example::Marker"]),
    "extensions": Crafted(_operator("StringUpper", "ai.onnx.contrib"), "operators", ["onnxruntime-extensions", "ask"]),
    "compiled-context": Crafted(_operator("EPContext", "com.microsoft"), "operators", ["EPContext"]),
    "processor-specific": Crafted(_operator("Conv", "com.microsoft.nchwc"), "operators", ["before"]),
    "domain-not-imported": Crafted(_operator("Gelu", "com.microsoft", imported=False), "version", ["opset_import"]),
    "unknown-ir-version": Crafted(_version(ir_version=99), "version", ["is 99", "export"]),
    "no-ir-version": Crafted(_version(ir_version=0), "version", ["is 0"]),
    "unknown-opset": Crafted(_version(opset=1000), "version", ["version 1000", "opset_version="]),
    "unknown-ml-opset": Crafted(_version(opset=99, domain="ai.onnx.ml"), "version", ["ai.onnx.ml", "version 99"]),
    "opset-zero": Crafted(_version(opset=0), "version", ["version 0"]),
    "no-opset": Crafted(_no_imports, "version", ["missing"]),
    "no-data": Crafted(_no_data, "weights", ["no data"]),
    "huge-shape": Crafted(_initialiser(dims=[1 << 31, 1 << 31]), "shape", ["elements"]),
    "wrong-shape": Crafted(_initialiser(dims=[1 << 20]), "weights", ["64 bytes of data", "says 4194304"]),
    "negative-shape": Crafted(_initialiser(dims=[-1, _WIDTH]), "shape", ["negative"]),
    "unknown-type": Crafted(_initialiser(data_type=77), "weights", ["type 77"]),
    "wrong-type": Crafted(_initialiser(data_type=TensorProto.STRING), "weights", ["strings"]),
    "too-few-numbers": Crafted(_initialiser(float_data=[1.0, 2.0]), "weights", ["2 numbers", "says 16"]),
    "deep-subgraph": Crafted(_nested(12), "depth", ["nested"]),
    "many-nodes": Crafted(_many_nodes, "nodes", ["100000"]),
    "many-outputs": Crafted(_many_outputs, "values", ["5000"]),
    "no-outputs": Crafted(_no_outputs, "format", ["no outputs"]),
    "control-characters": Crafted(_renamed("x\x1b[2J"), "names", ["control characters"]),
    "long-name": Crafted(_renamed("x" * 5000), "names", ["5000 bytes"]),
    "metadata": Crafted(_metadata, "metadata", ["strip"]),
    "training": Crafted(_training, "training", ["inference"]),
    "nested-types": Crafted(_nested_types, "depth", ["types"]),
    "empty": Crafted(_bytes(b""), "file", ["empty"]),
    "truncated": Crafted(_bytes(matmul()[:4000]), "format", ["byte", "cut off", "upload it again"]),
    "nothing-but-zeros": Crafted(_bytes(bytes(100)), "format", ["field number 0"]),
    "no-graph": Crafted(_bytes(onnx.ModelProto(ir_version=8).SerializeToString()), "format", ["no graph"]),
    "unknown-part": Crafted(_bytes(add_one() + b"\xfa\x07\x01x"), "format", ["field 127"]),
    "pickle": Crafted(_bytes(b"\x80\x04\x95" + bytes(64)), "format", ["pickle", "export"]),
    "zip": Crafted(_bytes(b"PK\x03\x04" + bytes(64)), "format", ["zip", "export"]),
    "web-page": Crafted(_bytes(b"<!DOCTYPE html><title>404</title>"), "format", ["web page"]),
    "lfs-pointer": Crafted(_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "format", ["git lfs pull"]),
    "polyglot": Crafted(_polyglot, "format", ["zip archive in one"]),
    "link": Crafted(_link, "file", ["link"]),
}  # fmt: skip
