"""Models as the usual builder lays them out: each writes what a plain loop writes, or is refused with the reason."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import onnx
import pytest

from inferway_gateway.backends.language import engine
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
