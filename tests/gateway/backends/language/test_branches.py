"""Branches in language models' graphs: those between two tables of positions are understood, others refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from inferway_gateway.backends.language.branches import first_table_length
from inferway_gateway.core.errors import ModelLoadError

from .builder_graphs import Layout, graph


def _branch_of_ids(model: onnx.ModelProto) -> None:
    """A branch that depends on the ids, which no answer may notice of another."""
    flags = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("yes", "no")]
    sides = [
        helper.make_graph([helper.make_node("Constant", [], [f.name], value=_flag())], f.name, [], [f]) for f in flags
    ]
    nodes = [
        helper.make_node("Size", ["input_ids"], ["ids_size"]),
        helper.make_node("Cast", ["ids_size"], ["ids_any"], to=TensorProto.BOOL),
        helper.make_node("If", ["ids_any"], ["ids_flag"], then_branch=sides[0], else_branch=sides[1]),
    ]
    model.graph.node.extend(nodes)


def _flag() -> onnx.TensorProto:
    return helper.make_tensor("flag", TensorProto.BOOL, [], [True])


def test_branches_over_anything_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for layout in (Layout(), Layout(branch=40)):
        model = graph(layout)
        _branch_of_ids(model)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ModelLoadError, match="branches"):
            first_table_length(path)
    path.write_bytes(b"\x3a\xff")
    with pytest.raises(ModelLoadError, match="branches"):
        first_table_length(path)


@pytest.mark.parametrize("form", ["initializer", "numbers", "node"])
def test_the_length_is_found_however_it_is_written(tmp_path: Path, form: str) -> None:
    model = graph(Layout(branch=4096))
    asked = next(node for node in model.graph.node if node.op_type == "Greater")
    constant = next(node for node in model.graph.node if asked.input[1] in node.output)
    if form != "node":
        number: Any = helper.make_tensor(asked.input[1], TensorProto.INT64, [], [4096])
        if form == "initializer":
            number = helper.make_tensor(asked.input[1], TensorProto.INT64, [], (4096).to_bytes(8, "little"), raw=True)
        model.graph.node.remove(constant)
        model.graph.initializer.append(number)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert first_table_length(path) == 4096
