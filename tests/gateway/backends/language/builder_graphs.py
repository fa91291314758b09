"""Tiny language models in the ways in which onnxruntime-genai's model builder (0.18) lays its graphs out.

Each option is a difference that was found between the builder's outputs for Llama, Qwen, Gemma, Phi and others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY: Final = 260
_WIDTH, _HEADS, _KV_HEADS, _HEAD, _LAYERS, _CONTEXT = 32, 4, 2, 16, 2, 512
_MS: Final = "com.microsoft"


@dataclass(frozen=True)
class Layout:
    """
    Attributes:
        axis: of the width of keys and values: its name, where the graph leaves it open, or its length.
        half: numbers of 16 bits, keys and values among them.
        packed: one product for queries, keys and values.
        biased: these have a bias.
        pruned: logits of the last position only.
        hidden: the last layer's output is an output too.
        window: of local attention, over keys and values that are all kept.
        softcap: of the attention's weights.
        branch: tokens beyond which another table of positions is taken (LongRoPE).
        tied: the head's weights are the embedding's.
        rotary: how many pairs of a head are turned; more than half of its width cannot be run.
    """

    axis: str | int = "kv_cache_dim"
    half: bool = False
    packed: bool = True
    biased: bool = False
    pruned: bool = False
    hidden: bool = False
    window: int = -1
    softcap: float = 0.0
    branch: int = 0
    tied: bool = False
    rotary: int = _HEAD // 2


class _Graph:
    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.dtype = np.dtype(np.float16 if layout.half else np.float32)
        self.kind = TensorProto.FLOAT16 if layout.half else TensorProto.FLOAT
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(11)
        self._count = 0

    def const(self, value: NDArray[Any], name: str = "") -> str:
        name = name or f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def random(self, *shape: int, scale: float = 0.4) -> str:
        return self.const((self._rng.standard_normal(shape) * scale).astype(self.dtype))

    def op(self, kind: str, *inputs: str, out: list[str] | None = None, domain: str = "", **attributes: Any) -> str:
        self._count += 1
        names = out or [f"v{self._count}"]
        self.nodes.append(helper.make_node(kind, inputs, names, f"n{self._count}", domain=domain, **attributes))
        return names[0]

    def linear(self, x: str, inner: int, outer: int) -> str:
        y = self.op("MatMul", x, self.random(inner, outer))
        return self.op("Add", y, self.random(outer)) if self.layout.biased else y


def _tables(layout: Layout, dtype: np.dtype[Any], slower: float) -> tuple[NDArray[Any], NDArray[Any]]:
    angles = np.outer(np.arange(_CONTEXT), 100.0 ** (-np.arange(layout.rotary) / layout.rotary) / slower)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def _rotary(g: _Graph, total: str) -> tuple[str, str]:
    layout = g.layout
    if not layout.branch:
        cos, sin = _tables(layout, g.dtype, 1.0)
        return g.const(cos, "cos_cache"), g.const(sin, "sin_cache")
    branches = []
    for name, slower in (("large", 4.0), ("small", 1.0)):
        arrays = _tables(layout, g.dtype, slower)
        outputs = [f"{name}_cos", f"{name}_sin"]
        nodes = [
            helper.make_node("Constant", [], [out], value=numpy_helper.from_array(array, out))
            for out, array in zip(outputs, arrays, strict=True)
        ]
        values = [helper.make_tensor_value_info(out, g.kind, arrays[0].shape) for out in outputs]
        branches.append(helper.make_graph(nodes, name, [], values))
    most = g.op("Constant", value=numpy_helper.from_array(np.array(layout.branch, np.int64)))
    asked = g.op("Greater", total, most)
    g.op("If", asked, out=["cos_cache", "sin_cache"], then_branch=branches[0], else_branch=branches[1])
    return "cos_cache", "sin_cache"


def graph(layout: Layout) -> onnx.ModelProto:
    g = _Graph(layout)
    lengths = g.op("Sub", g.op("ReduceSum", "attention_mask", g.const(np.array([1]), "one")), "one")
    total = g.op("Gather", g.op("Shape", "attention_mask"), g.const(np.array(1)))
    cos, sin = _rotary(g, total)
    lengths, total = g.op("Cast", lengths, to=TensorProto.INT32), g.op("Cast", total, to=TensorProto.INT32)
    table = g.random(VOCABULARY, _WIDTH, scale=1.0)
    x = g.op("Gather", table, "input_ids")
    for layer in range(_LAYERS):
        cache = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        h = g.op("LayerNormalization", x, g.const(np.ones(_WIDTH, g.dtype)), axis=-1)
        sizes = (_HEADS * _HEAD, _KV_HEADS * _HEAD, _KV_HEADS * _HEAD)
        projections = (
            [g.linear(h, _WIDTH, sum(sizes)), "", ""] if layout.packed else [g.linear(h, _WIDTH, n) for n in sizes]
        )
        attended = g.op(
            "GroupQueryAttention", *projections, *cache, lengths, total, cos, sin,
            out=[f"attended{layer}", f"present.{layer}.key", f"present.{layer}.value"], domain=_MS, num_heads=_HEADS,
            kv_num_heads=_KV_HEADS, scale=_HEAD**-0.5, local_window_size=layout.window, softcap=layout.softcap,
            do_rotary=1, rotary_interleaved=0,
        )  # fmt: skip
        x = g.op("Add", x, g.linear(attended, _HEADS * _HEAD, _WIDTH))
        wide = g.linear(g.op("LayerNormalization", x, g.const(np.ones(_WIDTH, g.dtype)), axis=-1), _WIDTH, 2 * _WIDTH)
        x = g.op("Add", x, g.linear(g.op("Mul", wide, g.op("Sigmoid", wide)), 2 * _WIDTH, _WIDTH))
    x = g.op("LayerNormalization", x, g.const(np.ones(_WIDTH, g.dtype)), out=["hidden_states"], axis=-1)
    if layout.pruned:
        last = g.op("Gather", x, g.const(np.array(-1)), axis=1)
        x = g.op("Unsqueeze", last, "one")
    head = g.op("Transpose", table, perm=[1, 0]) if layout.tied else g.random(_WIDTH, VOCABULARY)
    g.op("MatMul", x, head, out=["logits"])

    def value(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, list(shape))

    inputs = [
        value("input_ids", TensorProto.INT64, "batch_size", "sequence_length"),
        value("attention_mask", TensorProto.INT64, "batch_size", "total_sequence_length"),
    ]
    outputs = [value("logits", g.kind, "batch_size", 1 if layout.pruned else "sequence_length", VOCABULARY)]
    if layout.hidden:
        outputs.append(value("hidden_states", g.kind, "batch_size", "sequence_length", _WIDTH))
    for part in ("key", "value"):  # the builder lists all keys before all values
        for layer in range(_LAYERS):
            shape = ("batch_size", _KV_HEADS, "{}_sequence_length", layout.axis)
            for names, values in ((("past_key_values", "past"), inputs), (("present", "total"), outputs)):
                sized = [s.format(names[1]) if isinstance(s, str) else s for s in shape]
                values.append(value(f"{names[0]}.{layer}.{part}", g.kind, *sized))
    made = helper.make_graph(g.nodes, "built", inputs, outputs, g.weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MS, 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def write_model(folder: Path, layout: Layout) -> Path:
    """A folder as the builder leaves it."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(graph(layout).SerializeToString())
    names = {"past": "past_key_values", "present": "present"}
    inputs, outputs = (
        {f"{kind}_{part}_names": f"{names[kind]}.%d.{part}" for part in ("key", "value")} for kind in names
    )
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": _HEAD,
        "hidden_size": _WIDTH,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **inputs},
        "outputs": {"logits": "logits", **outputs},
        "num_attention_heads": _HEADS,
        "num_hidden_layers": _LAYERS,
        "num_key_value_heads": _KV_HEADS,
    }
    model = {
        "bos_token_id": 0, "context_length": _CONTEXT, "decoder": decoder, "eos_token_id": [1, 2], "pad_token_id": 1,
        "type": "llama", "vocab_size": VOCABULARY,
    }  # fmt: skip
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {"do_sample": False}}))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: token for token, word in enumerate(("<s>", "</s>", "<end>", *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def plainly(folder: Path, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What a loop over the session writes that knows nothing but the graph: the likeliest tokens, one at a time."""
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    past: dict[str, NDArray[Any]] = {
        value.name: np.zeros((1, _KV_HEADS, 0, _HEAD), types[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    tokens, new = list(prompt), list(prompt)
    for _ in range(count):
        ids, mask = np.array([new], np.int64), np.ones((1, len(tokens)), np.int64)
        found = dict(zip(names, session.run(None, {"input_ids": ids, "attention_mask": mask, **past}), strict=True))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        new = [int(found["logits"][0, -1].argmax())]
        tokens += new
    return tuple(tokens[len(prompt) :])
