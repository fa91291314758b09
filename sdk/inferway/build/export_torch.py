"""PyTorch modules to ONNX: `torch.export` and the exporter that stands on it."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePath
from typing import Any, Final

import numpy as np

from .._errors import BuildError, ConfigurationError, ExportError, MissingExtraError
from .._tensors import Array
from .example import Arrays, Tree, to_numpy, tree_of, unique
from .source import Source, Wishes, axes_of
from .verify import first_line

_FOREIGN: Final = re.compile(r"site-packages|/inferway/build/|^<|/lib/python")
_LONGEST: Final = 1 << 16
"""Of an axis that is tried out."""
_ANSI: Final = re.compile(r"\x1b\[[\d;]*m")
_PREAMBLE: Final = re.compile(
    r"^Failed to export the model|Next steps:|^Modify the model|^Debug `torch|^Create an issue|^Summary of|"
    r"^## |^Refer to|^\(Refer|^Exception summary|^$"
)
OPSET: Final = 20
"""Of every ONNX Runtime since 1.17 and every `onnx` since 1.15."""


def torch_source(model: Any, example: object, wishes: Wishes) -> Source:
    """See `export.to_onnx`."""
    import torch

    if example is None:
        raise ConfigurationError("a PyTorch module is exported with an example of its inputs: to_onnx(module, example)")
    what = f"the PyTorch module {type(model).__name__}"
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError(
            f"{what} was made by torch.jit, whose programs torch.export cannot follow; export the module that it was "
            f"made of"
        )
    tree, names, call = _arguments(model, example)
    names = list(wishes.input_names or names)
    if len(names) != len(tree.leaves):
        raise ConfigurationError(f"input_names has {len(names)} names, and the example has {len(tree.leaves)} inputs")
    tensors = [_tensor(leaf, model, name) for leaf, name in zip(tree.leaves, names, strict=True)]
    device = (
        next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        if hasattr(model, "parameters")
        else torch.device("cpu")
    )
    inputs = {name: to_numpy(tensor, f"input '{name}'") for name, tensor in zip(names, tensors, strict=True)}

    def forward(flat: Sequence[Any]) -> Any:
        return call(tree.rebuild(flat))

    with inference(model), torch.no_grad():
        try:
            first = _flat(forward([tensor.to(device) for tensor in tensors]))
        except Exception as error:
            raise BuildError(f"{what} cannot be run on the example: {first_line(error)}") from error
    outputs = list(wishes.output_names or _output_names(first.paths))
    if len(outputs) != len(first.leaves):
        raise ConfigurationError(f"output_names has {len(outputs)} names, and {what} has {len(first.leaves)} outputs")

    def predict(arrays: Arrays) -> Arrays:
        with inference(model), torch.no_grad():
            given = _flat(forward([from_numpy(arrays[name], torch).to(device) for name in names]))
        return {name: to_numpy(leaf, name) for name, leaf in zip(outputs, given.leaves, strict=True)}

    def convert() -> Any:
        return export_module(
            forward, model, tensors, names, outputs, axes_of(inputs, wishes.dynamic), wishes.opset, what
        )

    return Source("torch", what, inputs, predict, [convert], digest_of(model), precision=precision_of(model))


def _arguments(model: Any, example: object) -> tuple[Tree, list[str], Any]:
    """The example's tensors, their names, and how the module is called with a nest of such tensors."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    many = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    tree = tree_of(example)
    if isinstance(example, Mapping):
        keywords = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if all(str(key) in keywords for key in example) or any(p.kind is p.VAR_KEYWORD for p in parameters):
            return tree, unique([_joined(path) for path in tree.paths]), lambda given: model(**given)
        return tree, unique([_joined(path) for path in tree.paths]), model
    if isinstance(example, list | tuple) and tree.like is not None and (many or len(plain) > 1 or len(example) == 1):
        firsts = [plain[int(path[0])] if int(path[0]) < len(plain) else f"x{path[0]}" for path in tree.paths]
        names = [_joined((first, *path[1:])) for first, path in zip(firsts, tree.paths, strict=True)]
        return tree, unique(names), lambda given: model(*given)
    first = plain[0] if plain else "x"
    return tree, unique([_joined((first, *path)) for path in tree.paths]), model


def _joined(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _output_names(paths: Sequence[tuple[str | int, ...]]) -> list[str]:
    if len(paths) == 1 and not any(isinstance(part, str) for part in paths[0]):
        return ["y"]
    return unique([_joined(path) if isinstance(path[0], str) else "y" + _joined(path) for path in paths])


def _flat(outputs: Any) -> Tree:
    """A module's outputs, those that are None left out."""
    import torch

    if not isinstance(outputs, torch.Tensor | Mapping | list | tuple) and hasattr(outputs, "__dataclass_fields__"):
        outputs = {name: getattr(outputs, name) for name in outputs.__dataclass_fields__}
    if isinstance(outputs, Mapping):
        outputs = {key: item for key, item in outputs.items() if item is not None}
    elif isinstance(outputs, list | tuple):
        named = getattr(outputs, "_fields", None)
        outputs = dict(zip(named, outputs, strict=True)) if named else [item for item in outputs if item is not None]
    leaves: list[Any] = []
    paths: list[tuple[str | int, ...]] = []

    def walk(value: Any, path: tuple[str | int, ...]) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, (*path, str(key)))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(item, (*path, index))
        elif isinstance(value, torch.Tensor):
            leaves.append(value)
            paths.append(path)

    walk(outputs, ())
    return Tree(tuple(leaves), tuple(paths), None)


def _tensor(leaf: Any, model: Any, name: str) -> Any:
    """A leaf of the example as a tensor; numpy's 64-bit numbers become what the module's weights are."""
    import torch

    if isinstance(leaf, torch.Tensor):
        # A module may write into its input, and the example is the caller's.
        return leaf.detach().clone()
    array = to_numpy(leaf, f"input '{name}'")
    if array.dtype.kind == "O":
        raise ConfigurationError(f"input '{name}' of a PyTorch module expects numbers, got text")
    tensor = from_numpy(array, torch)
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return tensor.to(weights) if tensor.dtype is torch.float64 and weights is not torch.float64 else tensor


def from_numpy(array: Array, torch: Any) -> Any:
    """A tensor with an array's values."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Every module of a model in the mode of inference, and each in its own again afterwards."""
    modes = [(module, module.training) for module in model.modules()] if hasattr(model, "modules") else []
    try:
        if hasattr(model, "eval"):
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def export_module(
    forward: Any,
    model: Any,
    tensors: Sequence[Any],
    names: Sequence[str],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    opset: int | None,
    what: str,
) -> Any:
    """The graph of a module.

    Args:
        forward: calls the model with a flat list of tensors.
        model: the module whose weights are meant.
        tensors: the example.
        axes: input name to its variable axes and their names.
    Raises:
        ExportError: it cannot be made; ``operator`` and ``where`` say why, where the exporter does.
        MissingExtraError: onnxscript is not installed.
    """
    import torch

    try:
        import onnxscript  # noqa: F401 - the exporter needs it
    except ImportError as error:
        raise MissingExtraError("onnxscript", "train", "exporting a PyTorch module") from error

    class Flat(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
        """The model as a function of flat tensors to flat tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *flat: Any) -> Any:
            return _flat(forward(flat)).leaves

    # One example row would become a constant of 1 in the graph.
    example = [_at_least_two(tensor, axes.get(name, {})) for tensor, name in zip(tensors, names, strict=True)]
    shapes = {"flat": tuple(dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in names)}
    # The exporter puts recurrent layers into a loop, by a kernel that it registers for a moment. What was looked up
    # before, in another export, would be taken instead and write the layer out for one length (PyTorch 2.13).
    for packet in (torch.ops.aten.lstm, torch.ops.aten.gru):
        for overload in packet.overloads():
            getattr(getattr(packet, overload), "_dispatch_cache", {}).clear()
    with inference(model), torch.no_grad():
        flat = Flat()
        flat.training = False
        try:
            # The module itself and not a program of it: for modules the exporter knows how recurrent layers are kept.
            made = torch.onnx.export(
                flat, tuple(example), None, dynamo=True, dynamic_shapes=shapes, input_names=list(names),
                output_names=list(outputs), opset_version=opset or OPSET, verbose=False, external_data=False,
            )  # fmt: skip
        except Exception as error:
            if type(error).__name__ == "TorchExportError":
                raise _not_captured(error, names, what) from error
            try:
                program = torch.export.export(flat, tuple(example), dynamic_shapes=shapes, strict=False)
            except Exception:  # it only says where the operator stands
                program = None
            raise _not_converted(error, program, what) from error
        _unbounded(made.exported_program, flat, dict(zip(names, example, strict=True)), axes, what)
        proto = made.model_proto
    strip(proto)
    return proto


def _unbounded(
    program: Any, flat: Any, example: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]], what: str
) -> None:
    """Refuse a program that holds up to some length only, where the module takes longer ones: of
    ``a if len(x) > 50 else b`` it has the side of the example, and ONNX would take that for every length."""
    import torch

    inputs = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    for name, value in zip(example, inputs, strict=False):
        for axis, symbol in axes.get(name, {}).items():
            size = getattr(getattr(value.shape[axis], "node", None), "expr", None)
            allowed = program.range_constraints.get(size)
            if allowed is None or not getattr(allowed.upper, "is_Integer", False) or allowed.upper > _LONGEST:
                continue
            longer = dict(example)
            for other, named in axes.items():
                for place in (place for place, called in named.items() if called == symbol):
                    tensor = longer[other]
                    indices = [index % tensor.shape[place] for index in range(int(allowed.upper) + 1)]
                    longer[other] = tensor.index_select(place, tensor.new_tensor(indices, dtype=torch.int64))
            taken = False
            with suppress(Exception):  # it takes no more itself, as with a table of positions
                flat(*longer.values())
                taken = True
            if taken:
                raise ExportError(
                    f"{what} computes something else where axis {axis} of '{name}' is longer than {allowed.upper}, and "
                    f"the graph would not; take the condition on the length out of it"
                )


def _at_least_two(tensor: Any, named: Mapping[int, str]) -> Any:
    for axis in named:
        if tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, dim=axis)
    return tensor


def strip(proto: Any) -> None:
    """Take the exporter's notes out of a graph: paths and lines of the sources on this machine are nobody's business,
    and change the bytes of the same model."""
    proto.ClearField("metadata_props")
    graphs = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        graph.ClearField("metadata_props")
        for field in ("input", "output", "value_info"):
            for value in getattr(graph, field):
                if hasattr(value, "ClearField"):
                    value.ClearField("metadata_props")
        for node in graph.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
            for attribute in node.attribute:
                graphs.extend([attribute.g] if attribute.HasField("g") else [])
                graphs.extend(attribute.graphs)


def _not_captured(error: Exception, names: Sequence[str], what: str) -> ExportError:
    """`torch.export` could not follow the module."""
    text = _ANSI.sub("", str(error))
    where = _user_line(error)
    found = re.search(r"\['flat'\]\[(\d+)\]\.size\(\)\[(\d+)\].*?constant \((\d+)\)", text, re.DOTALL)
    place, axis, length = found.groups() if found else ("", "", "")
    if not found:
        found = re.search(r"static shape of (\d+) for dimension inputs\['flat'\]\[(\d+)\]\.shape\[(\d+)\]", text)
        length, place, axis = found.groups() if found else ("", "", "")
    if found and int(place) < len(names):
        return ExportError(
            f"{what} computes with axis {axis} of '{names[int(place)]}' as with the number {length} that it is in the "
            f"example{f' ({where})' if where else ''}, so that the graph would be right for that length only; "
            + ("take it from x.shape where it is used" if axis == "0" else "leave that axis out of dynamic, or take it "
               "from x.shape where it is used"),
            where=where,
        )  # fmt: skip
    return ExportError(
        f"{what} cannot be followed by torch.export{f' ({where})' if where else ''}: {_said(text)}", where=where
    )


def _said(text: str) -> str:
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    # The exporter's own preamble names steps and links, and the cause comes after it.
    lines = [line for line in lines if not _PREAMBLE.search(line)] or lines
    telling = [line for line in lines if "static shape" in line or "specialized" in line or "Could not" in line]
    return (telling or lines or ["no reason is given"])[0][:300]


def _not_converted(error: Exception, program: Any, what: str) -> ExportError:
    """An operator of the captured program has no form in ONNX."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(texts)
    operator = None
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text)
    if found:
        operator = found[1]
    node_name = re.search(r"Error when translating node %(\w+)", text)
    where = None
    if node_name:
        nodes = list(program.graph.nodes) if program is not None else []
        # The exporter takes some operators apart first: linalg_svd becomes _linalg_svd.
        base = (operator or "").rpartition(".")[2].strip("_")
        node = next((n for n in nodes if n.name == node_name[1]), None) or next(
            (n for n in nodes if n.op == "call_function" and base and base in str(n.target)), None
        )
        if node is not None:
            where = _place_of(node)
            operator = operator or str(node.target)
    if operator:
        return ExportError(
            f"{what} uses the operator {operator}, which has no form in ONNX{f' ({where})' if where else ''}; "
            f"write that step with other operators, or leave it out of the exported module",
            operator=operator, where=where,
        )  # fmt: skip
    return ExportError(f"{what} cannot be turned into ONNX: {first_line(error)}", where=where)


def _place_of(node: Any) -> str | None:
    """Layer and line of a node of a captured program."""
    layers = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    layer = layers[-1].removeprefix("model").removeprefix(".") if layers else ""
    lines = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.*)', node.meta.get("stack_trace") or "")
    parts = [f"layer {layer}"] if layer else []
    if lines:
        file, line, function, code = lines[-1]
        parts.append(f"{PurePath(file).name}, line {line}, in {function}: {code.strip()}")
    return ", ".join(parts) or None


def _user_line(error: BaseException | None) -> str | None:
    """The last line of the user's own code in a traceback: outside of installed packages and of this one."""
    found = None
    while error is not None and found is None:
        trace = error.__traceback__
        while trace is not None:
            file = trace.tb_frame.f_code.co_filename
            if not _FOREIGN.search(file):
                found = f"{PurePath(file).name}, line {trace.tb_lineno}, in {trace.tb_frame.f_code.co_name}"
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return found


def precision_of(model: Any) -> str:
    """The least precise type of a module's weights and buffers."""
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in [*model.parameters(), *model.buffers()]}
    return next((kind for kind in ("bfloat16", "float16") if kind in kinds), "float32")


def digest_of(model: Any) -> str:
    """SHA-256 of a module's structure and weights."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in sorted(model.state_dict().items()):
        if hasattr(value, "detach"):
            array = to_numpy(value, name)
            digest.update(f"\0{name}\0{array.dtype}\0{array.shape}\0".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return f"sha256:{digest.hexdigest()}"
