"""Models as the usual builder lays them out: each writes what a plain loop writes, or is refused with the reason."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from inferway_gateway.backends.language import engine, runtime
from inferway_gateway.core.errors import ContextLengthError, ModelLoadError

from .builder_graphs import Layout, graph, plainly, write_model
from .conftest import OpenModel, ask

PROMPT = (5, 17, 40, 63, 101, 22, 9, 8, 7, 210, 33)
TOKENS = 16

LAYOUTS = {
    "open axis": Layout(),
    "axis with a length": Layout(axis=16),
    "half precision": Layout(half=True),
    "three products": Layout(packed=False),
    "three products with bias": Layout(packed=False, biased=True),
    "bias": Layout(biased=True),
    "pruned head": Layout(pruned=True),
    "hidden states": Layout(hidden=True),
    "local window": Layout(window=6),
    "soft cap": Layout(softcap=5.0),
    "tied embedding": Layout(tied=True),
    "two tables": Layout(branch=40),
}


@pytest.mark.parametrize("name", LAYOUTS)
async def test_what_the_builder_writes_is_run_as_a_plain_loop_runs_it(
    open_language: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(engine, "PIECE_TOKENS", 4)  # prompts are read in pieces
    folder = write_model(tmp_path / "m", LAYOUTS[name])
    expected = plainly(folder, PROMPT, TOKENS)
    assert len(set(expected)) > TOKENS // 4  # the model says something
    generator = await open_language(folder)
    alone = await ask(generator, PROMPT, TOKENS, ignore_end=True)
    assert alone.tokens == expected
    others = [ask(generator, PROMPT[:n], TOKENS, ignore_end=True) for n in (2, 5, len(PROMPT))]
    assert [whole.tokens for whole in await asyncio.gather(*others)][-1] == expected


async def test_a_model_of_two_tables_is_held_to_the_length_of_the_first(
    open_language: OpenModel, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m", Layout(branch=20))
    generator = await open_language(folder)
    assert generator.context_length == 20
    with pytest.raises(ContextLengthError, match="at most 20 tokens"):
        await ask(generator, PROMPT, TOKENS)


def _without_embedding(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "inputs_embeds"


@pytest.mark.parametrize(
    ("layout", "how", "reason"),
    [
        (Layout(rotary=16), lambda model: None, "cannot be run: .*cos_cache"),
        (Layout(axis=8), lambda model: None, "expected .*16"),
        (Layout(), _without_embedding, "built with its embedding"),
        (Layout(hidden=True), lambda model: model.graph.output.pop(0), "built with its head"),
    ],
    ids=["a run that fails", "another width", "no embedding", "no head"],
)
async def test_what_no_run_can_do_is_refused_when_it_is_loaded(
    open_language: OpenModel, tmp_path: Path, layout: Layout, how: Any, reason: str
) -> None:
    folder = write_model(tmp_path / "m", layout)
    model = graph(layout)
    how(model)
    if how is _without_embedding:
        next(node for node in model.graph.node if "input_ids" in node.input).input[1] = "inputs_embeds"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelLoadError, match=reason):
        await open_language(folder)


async def test_a_graph_without_end_is_refused_when_it_is_loaded(
    open_language: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_TRY_LIMIT_S", 0.05)
    folder = write_model(tmp_path / "m", Layout())
    model = graph(Layout())
    model.graph.node.extend(_endless())
    logits = next(node for node in model.graph.node if "logits" in node.output)
    logits.output[0] = "some"
    model.graph.node.append(helper.make_node("Add", ["some", "never"], ["logits"]))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    async with asyncio.timeout(60):
        with pytest.raises(ModelLoadError, match=r"cannot be run: .* tokens took"):
            await open_language(folder)


def _endless() -> list[onnx.NodeProto]:
    """Nodes that never give their number."""
    number = helper.make_tensor("", TensorProto.FLOAT, [], [0.0])
    truth = helper.make_tensor("", TensorProto.BOOL, [], [True])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["goes_on"]),
            helper.make_node("Mul", ["number", "number"], ["next_number"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("number", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_number", TensorProto.FLOAT, []),
        ],
    )
    return [
        helper.make_node("Constant", [], ["nothing"], value=number),
        helper.make_node("Constant", [], ["true"], value=truth),
        helper.make_node("Loop", ["", "true", "nothing"], ["never"], body=body),
    ]
