"""ONNX to smaller ONNX: what ONNX Runtime's quantiser does, told what is worth quantising.

Integers of 8 bits hold a tensor as ``scale * (q - zero)``. Where scales of activations come from decides everything:
*static* takes them from calibration rows, once; *dynamic* from each run's values, all rows together, so that a row's
result depends on its company. Weights always have a scale for each channel.

A transformer's activations have a few channels that are a hundred times as large as the rest, and one scale for all of
them leaves nothing for the others. `equalise` moves that factor into the weights: ``x @ w = (x / s) @ (s * w)``, with
``s_j = max|x_j|^a / max|w_j|^(1-a)``.

Sources: ONNX Runtime's documentation, "Quantize ONNX models"; for `equalise` Xiao et al., "SmoothQuant" (2023), eq. 4.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from ..._tensors import cast_to
from ..quiet import undisturbed
from ..runtime import onnx_module, open_session, ort
from .data import Array, Rows

Calibration = Literal["minmax", "entropy", "percentile"]
CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose", "ConvInteger", "QLinearConv"})
_QUANTISED: Final = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulNBits", "MatMulInteger"}
)
_PRODUCTS: Final = frozenset({"MatMul", "Gemm"})
_HISTOGRAM_ROWS: Final = 128
"""Entropy and percentile keep every value of every calibration row in memory until the end."""
_BATCH: Final = 32
_BLOCK: Final = {4: 32, 8: 128}
"""Weights that share a scale, by bits: with fewer bits each block has to fit more closely."""
_EQUALISE: Final = 0.8
"""The exponent ``a``. MiniLM's embeddings: cosine 0.989 without, 0.9974 at 0.7, 0.9979 at 0.8 and at 0.9 (2026-11)."""
_LARGEST_SHIFT: Final = 1e3
_TABLE_BYTES: Final = 1 << 20
_LARGEST: Final = {"fp16": 65504.0, "bf16": 3.38e38}
_WORTH_BYTES: Final = 1024
"""Initialisers that are shorter stay as they are: shapes, scalars, biases."""


@dataclass(frozen=True)
class Facts:
    """What of a graph decides which techniques are worth a try.

    Attributes:
        operators: types in use, in the main graph and below it.
        weighted: names of the MatMul and Gemm nodes that multiply with a constant matrix.
        lookups: of the Gather nodes that take rows of a large constant table, such as embeddings of words.
        weight_share: how much of the constants' bytes these matrices are.
        float_bytes: of FP32 constants.
        quantised: it has quantised operators already.
        double: its products are of FP64, which nothing here quantises.
        transformer: it normalises layers, has a softmax between products, and is mostly matrices.
    """

    operators: frozenset[str]
    weighted: tuple[str, ...]
    lookups: tuple[str, ...]
    weight_share: float
    float_bytes: int
    quantised: bool
    double: bool

    @property
    def convolutional(self) -> bool:
        return bool(self.operators & CONVOLUTIONS)

    @property
    def transformer(self) -> bool:
        normalises = (
            bool(self.operators & {"LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"})
            or {"ReduceMean", "Sqrt"} <= self.operators
        )
        return normalises and "Softmax" in self.operators and "MatMul" in self.operators and bool(self.weighted)


def read_graph(proto: Any) -> Facts:
    """Look through a ``ModelProto``."""
    operators = {node.op_type for node in _nodes(proto.graph)}
    constants = {t.name: t for t in proto.graph.initializer if t.data_type == onnx_module().TensorProto.FLOAT}
    doubles = {t.name for t in proto.graph.initializer if t.data_type == onnx_module().TensorProto.DOUBLE}
    sizes = {name: 4 * int(np.prod(t.dims, dtype=np.int64)) for name, t in constants.items()}
    named = named_nodes(proto)
    weighted = [n for n in named if n.op_type in _PRODUCTS and n.input[1] in constants and n.input[0] not in constants]
    matrices = {node.input[1] for node in weighted if len(constants[node.input[1]].dims) == 2}
    total = sum(sizes.values())
    return Facts(
        frozenset(operators),
        tuple(node.name for node in weighted if node.input[1] in matrices),
        tuple(n.name for n in named if n.op_type == "Gather" and sizes.get(n.input[0], 0) >= _TABLE_BYTES),
        sum(sizes[name] for name in matrices) / total if total else 0.0,
        total,
        bool(operators & _QUANTISED),
        any(n.op_type in _PRODUCTS and not doubles.isdisjoint(n.input) for n in named),
    )


def named_nodes(proto: Any) -> list[Any]:
    """The main graph's nodes, each with a name of its own from now on."""
    taken: set[str] = set()
    for number, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}_"
        taken.add(node.name)
    return list(proto.graph.node)


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _nodes(inner)


def copied(proto: Any) -> Any:
    """A ``ModelProto`` of its own."""
    fresh = onnx_module().ModelProto()
    fresh.CopyFrom(proto)
    return fresh


@contextlib.contextmanager
def _workshop() -> Iterator[Path]:
    """A folder for what the quantiser can only write to files; what it logs is about files that nobody sees."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with undisturbed(), tempfile.TemporaryDirectory(prefix="inferway-") as folder:
            yield Path(folder)
    finally:
        logging.disable(before)


def _loaded(path: Path) -> Any:
    found = onnx_module().load(str(path))
    # What the quantiser says of itself is no fact about the model.
    kept = [entry for entry in found.metadata_props if not entry.key.startswith(("onnx.", "onnx_", "onnxruntime."))]
    del found.metadata_props[:]
    found.metadata_props.extend(kept)
    return found


def graph_optimised(proto: Any) -> Any:
    """The graph as ONNX Runtime rewrites it when it loads it: constants folded, operators fused.

    Only rewritings that every processor understands; layouts of one processor are left to the moment of loading.
    """
    with _workshop() as folder:
        runtime = ort()
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(folder / "model.onnx")
        options.log_severity_level = 4
        runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return _loaded(folder / "model.onnx")


def prepared(proto: Any) -> Any:
    """Shapes inferred and constants folded, as the static quantiser wants it; the same where that fails."""
    from onnxruntime.quantization import quant_pre_process

    with _workshop() as folder:
        with contextlib.suppress(Exception):
            # Symbolic inference of shapes takes ten times as long and tells the quantiser nothing that it uses.
            # A file, because of a message it would put the weights elsewhere and then miss them.
            source = folder / "source.onnx"
            source.write_bytes(proto.SerializeToString())
            quant_pre_process(str(source), str(folder / "model.onnx"), skip_symbolic_shape=True)
            return _with_flat_biases(_loaded(folder / "model.onnx"))
        return _with_flat_biases(copied(proto))


def _with_flat_biases(proto: Any) -> Any:
    """Biases of shape ``[n]`` in place of ``[1, n]``, which means the same and which the quantiser cannot take."""
    biases = {node.input[2] for node in proto.graph.node if node.op_type == "Gemm" and len(node.input) > 2}
    others = {n for node in proto.graph.node for i, n in enumerate(node.input) if node.op_type != "Gemm" or i != 2}
    for tensor in proto.graph.initializer:
        if tensor.name in biases - others and len(tensor.dims) == 2 and tensor.dims[0] == 1:
            del tensor.dims[0]
    return proto


class _Reader:
    """Calibration rows as the quantiser asks for them."""

    def __init__(self, rows: Rows) -> None:
        self._batches = list(rows.batches(_BATCH))
        if len(self._batches) > 1 and len(next(iter(self._batches[-1].values()))) < _BATCH:
            # Values of all batches are joined, which some methods can do only where they are of one length.
            self._batches.pop()
        self._next = iter(self._batches)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._next, None)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next = iter(self._batches[start_index:end_index])


def static_int8(proto: Any, facts: Facts, rows: Rows, method: Calibration) -> Any:
    """Weights and activations of 8 bits, scales from calibration rows.

    Args:
        proto: as `prepared` gave it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    ways = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    if method != "minmax" and rows.count > _HISTOGRAM_ROWS:
        rows = rows.take(np.arange(_HISTOGRAM_ROWS))
    only: dict[str, Any] = {}
    if facts.transformer:
        # Products of two activations and everything between gain nothing and lose the most.
        ready = read_graph(proto)
        only = {
            "nodes_to_quantize": [*ready.weighted, *ready.lookups],
            "op_types_to_quantize": [*sorted(_PRODUCTS), "Gather"],
            # A product's result goes on as it is: rounding it as well cost MiniLM six of seven parts of its loss.
            "extra_options": {"OpTypesToExcludeOutputQuantization": sorted(_PRODUCTS)},
        }
    with _workshop() as folder:
        quantize_static(
            copied(proto), str(folder / "model.onnx"), _Reader(rows), quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=_saturates(), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            calibrate_method=ways[method], **only,
        )  # fmt: skip
        return _loaded(folder / "model.onnx")


def dynamic_int8(proto: Any) -> Any:
    """Weights of 8 bits, activations quantised in each run."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _workshop() as folder:
        quantize_dynamic(
            copied(proto), str(folder / "model.onnx"), per_channel=True, reduce_range=_saturates(),
            weight_type=QuantType.QInt8,
        )  # fmt: skip
        return _loaded(folder / "model.onnx")


def block_weights(proto: Any, bits: int) -> Any:
    """Matrices of 4 or 8 bits with a scale for each block of a column; activations stay FP32."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    with _workshop():
        plain = ONNXModel(copied(proto))
        plain.replace_gemm_with_matmul()
        # Accuracy level 4: products are computed in integers of 8 bits, with a scale for each block of a row.
        quantizer = MatMulNBitsQuantizer(
            plain.model, bits=bits, block_size=_BLOCK[bits], is_symmetric=bits == 8, accuracy_level=4
        )
        quantizer.process()
        found = copied(quantizer.model.model)
    if not any(node.op_type == "MatMulNBits" for node in found.graph.node):
        raise ValueError("no matrix of it could be put into blocks")
    return found


def stored_half(proto: Any, kind: Literal["fp16", "bf16"]) -> Any:
    """FP32 constants stored in 16 bits and widened when the model is loaded; it computes in FP32 as before.

    Raises:
        ValueError: a constant is too large for FP16, or none is long enough.
    """
    onnx = onnx_module()
    fresh = copied(proto)
    graph = fresh.graph
    inputs = {value.name for value in graph.input}
    casts = []
    target = onnx.TensorProto.FLOAT16 if kind == "fp16" else onnx.TensorProto.BFLOAT16
    for number, tensor in enumerate(list(graph.initializer)):
        if tensor.data_type != onnx.TensorProto.FLOAT or tensor.name in inputs:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.nbytes < _WORTH_BYTES:
            continue
        if np.abs(values).max(initial=0) > _LARGEST[kind]:
            raise ValueError(f"the constant '{tensor.name}' has numbers that are too large for {kind}")
        half = cast_to(values, kind.upper(), f"the constant '{tensor.name}'")
        name = f"{tensor.name}_{kind}"
        casts.append(
            onnx.helper.make_node("Cast", [name], [tensor.name], name=f"{name}_{number}", to=onnx.TensorProto.FLOAT)
        )
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.raw_data = name, target, np.ascontiguousarray(half).tobytes()
        tensor.dims.extend(values.shape)
    if not casts:
        raise ValueError("it has no FP32 constants worth storing in 16 bits")
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return fresh


def equalise(proto: Any, facts: Facts, rows: Rows) -> Any:
    """Move the size of an activation's channels into the weights that it is multiplied with; computes the same.

    Args:
        proto: with the nodes that ``facts`` names.
        rows: whose activations say how large channels are.
    Raises:
        ValueError: there is no product whose matrix is its own.
    """
    onnx = onnx_module()
    fresh = copied(proto)
    graph = fresh.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    products = [
        node for node in graph.node
        if node.name in facts.weighted and uses[node.input[1]] == 1 and _plain(node)
    ]  # fmt: skip
    if not products:
        raise ValueError("its products share their matrices, so nothing can be moved into them")
    largest = _largest(fresh, sorted({node.input[0] for node in products}), rows)
    nodes: list[Any] = []
    pending = {id(node): node for node in products}
    for number, node in enumerate(list(graph.node)):
        if id(node) in pending:
            weight = constants[node.input[1]]
            values = onnx.numpy_helper.to_array(weight)
            down = _is_transposed(node)
            columns = np.abs(values).max(axis=0 if down else 1)
            scale = _scales(largest[node.input[0]], columns)
            weight.CopyFrom(
                onnx.numpy_helper.from_array(
                    np.ascontiguousarray(values * (scale[None, :] if down else scale[:, None])), weight.name
                )
            )
            factor, scaled = f"{node.input[0]}_equaliser_{number}", f"{node.input[0]}_equal_{number}"
            graph.initializer.append(onnx.numpy_helper.from_array((1 / scale).astype(np.float32), factor))
            nodes.append(onnx.helper.make_node("Mul", [node.input[0], factor], [scaled], name=f"Equalise_{number}_"))
            node.input[0] = scaled
        nodes.append(copied_node(node))
    del graph.node[:]
    graph.node.extend(nodes)
    return fresh


def copied_node(node: Any) -> Any:
    fresh = onnx_module().NodeProto()
    fresh.CopyFrom(node)
    return fresh


def _plain(node: Any) -> bool:
    """Whether a product is ``x @ w`` or ``x @ w.T``, with a factor or a bias at most."""
    return not any(attribute.name == "transA" and attribute.i for attribute in node.attribute)


def _is_transposed(node: Any) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _scales(activations: Array, weights: Array) -> Array:
    floor = np.float32(1e-5)
    scale = np.maximum(activations, floor) ** _EQUALISE / np.maximum(weights, floor) ** (1 - _EQUALISE)
    # A channel that calibration rows never excite has no size to tell; it must not blow the weights up.
    scale = np.where(activations <= floor, 1, scale)
    scale = np.clip(scale / np.exp(np.mean(np.log(scale))), 1 / _LARGEST_SHIFT, _LARGEST_SHIFT)
    return np.asarray(scale, np.float32)


def _largest(proto: Any, names: Sequence[str], rows: Rows) -> Mapping[str, Array]:
    """The largest absolute value of each channel of these values."""
    onnx = onnx_module()
    probe = copied(proto)
    present = {value.name for value in probe.graph.output}
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in present)
    session = open_session(probe, threads=1)
    found: dict[str, Array] = {}
    for batch in rows.batches(_BATCH):
        for name, values in zip(names, session.run(list(names), batch), strict=True):
            seen = np.abs(values.reshape(-1, values.shape[-1])).max(axis=0)
            found[name] = np.maximum(found[name], seen) if name in found else seen
    return found


@functools.cache
def _saturates() -> bool:
    """Whether sums of 8-bit products overflow 16 bits here: x86 without the dot-product instructions.

    Source: ONNX Runtime's documentation, "When and why do I need to try U8U8?".
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    with contextlib.suppress(OSError):
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    return False
