"""PyTorch modules to ONNX, held against the modules' own outputs."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inferway
from inferway import BuildError, ConfigurationError, ExportError, ExportMismatchError, to_onnx

torch = pytest.importorskip("torch")
nn = torch.nn
torch.set_num_threads(1)
pytestmark = pytest.mark.torch


class Computes(nn.Module):  # type: ignore[name-defined, misc]  # torch is not followed
    """A module that is one function of its input."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class Reader(nn.Module):  # type: ignore[name-defined, misc]  # torch is not followed
    """Tokens and a mask to vectors and a label; the mask may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, ids: Any, mask: Any = None) -> Any:
        found = self.table(ids)
        if mask is not None:
            found = found * mask[..., None]
        return {"pooled": found.mean(1), "all": found, "top": found.sum((1, 2)) > 0}


class Recurrent(nn.Module):  # type: ignore[name-defined, misc]  # torch is not followed
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.out = nn.Linear(5, 2)

    def forward(self, steps: Any) -> Any:
        return self.out(self.lstm(steps)[0][:, -1])


def test_a_network_in_training_mode_is_exported_for_inference_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2))
    net[4].eval()
    net[1].requires_grad_(False)
    images = torch.rand(2, 1, 8, 8)
    before = [module.training for module in net.modules()], [p.requires_grad for p in net.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    filters = list(warnings.filters)
    monkeypatch.chdir(tmp_path)
    made = to_onnx(net, images)
    assert ([module.training for module in net.modules()], [p.requires_grad for p in net.parameters()]) == before
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # type: ignore[index]
    assert warnings.filters == filters
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    many = torch.rand(7, 1, 8, 8)
    with torch.no_grad():
        expected = net.eval()(many).numpy()
    np.testing.assert_allclose(made.run(many)["y"], expected, atol=1e-5)
    assert [str(spec) for spec in made.inputs] == ["input: FP32 [-1, 1, 8, 8]"]
    assert [str(spec) for spec in made.outputs] == ["y: FP32 [-1, 2]"]
    assert made.verification is not None
    assert sorted(case.shapes["input"][0] for case in made.verification.cases) == [1, 2, 3, 33]
    assert b"site-packages" not in made.to_bytes()
    assert str(Path(__file__).name).encode() not in made.to_bytes()


def test_several_inputs_and_outputs_keep_their_names_and_types() -> None:
    reader = Reader()
    ids, mask = torch.randint(0, 20, (2, 7)), torch.ones(2, 7)
    dynamic = {"ids": {1: "time"}, "mask": {1: "time"}}
    made = to_onnx(reader, {"ids": ids, "mask": mask}, dynamic=dynamic)
    assert list(map(str, made.inputs)) == ["ids: INT64 [-1, -1]", "mask: FP32 [-1, -1]"]
    assert list(map(str, made.outputs)) == ["pooled: FP32 [-1, 4]", "all: FP32 [-1, -1, 4]", "top: BOOL [-1]"]
    ids, mask = torch.randint(0, 20, (5, 11)), torch.rand(5, 11)
    got = made.run({"ids": ids, "mask": mask})
    expected = reader(ids, mask)
    np.testing.assert_allclose(got["pooled"], expected["pooled"].detach().numpy(), atol=1e-5)
    assert (got["top"] == expected["top"].numpy()).all()
    alone = to_onnx(reader, ids, output_names=["a", "b", "c"], input_names=["tokens"])
    assert [spec.name for spec in (*alone.inputs, *alone.outputs)] == ["tokens", "a", "b", "c"]


@pytest.mark.slow
def test_a_recurrent_layer_takes_any_number_of_steps_also_after_another_export() -> None:
    net = Recurrent()
    fixed = to_onnx(net, torch.rand(3, 6, 3))
    assert str(fixed.inputs[0]) == "steps: FP32 [-1, 6, 3]"
    made = to_onnx(net, torch.rand(3, 6, 3), dynamic={"steps": {1: "time"}})
    longer = torch.rand(2, 13, 3)
    np.testing.assert_allclose(made.run(longer)["y"], net(longer).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "datatype"),
    [(torch.float64, "FP64"), (torch.float16, "FP16")],
    ids=["double", "half"],
)
def test_the_precision_of_a_module_is_kept(dtype: Any, datatype: str) -> None:
    net = nn.Linear(4, 3).to(dtype)
    made = to_onnx(net, torch.rand(3, 4).to(dtype))
    assert (made.inputs[0].datatype, made.outputs[0].datatype) == (datatype, datatype)


def test_numpy_rows_of_float64_are_what_the_weights_are() -> None:
    assert to_onnx(nn.Linear(4, 3), np.random.rand(3, 4)).inputs[0].datatype == "FP32"


def test_what_onnx_runtime_cannot_compute_in_bfloat16_is_said() -> None:
    with pytest.raises(
        ExportError, match=r"uses the operator Gemm.*bfloat16 on CPUs: export the model in float32"
    ) as got:
        to_onnx(nn.Linear(4, 3).bfloat16(), torch.rand(3, 4).bfloat16())
    assert got.value.operator == "Gemm"


def test_an_axis_that_is_a_number_for_the_module_is_refused_with_its_name() -> None:
    with pytest.raises(ExportError, match="axis 0 of 'x' as with the number 3 that it is in the example"):
        to_onnx(Computes(lambda x: x.reshape(3, -1) * 2 if x.shape[0] == 3 else x), torch.rand(3, 4))


def test_an_operator_without_a_form_in_onnx_is_named_with_its_line() -> None:
    with pytest.raises(ExportError, match=r"uses the operator prims.zeta, which has no form in ONNX") as got:
        to_onnx(Computes(lambda x: torch.special.zeta(x + 2, x + 1)), torch.rand(3, 4))
    assert got.value.operator == "prims.zeta"
    assert got.value.where is not None
    assert Path(__file__).name in got.value.where


def test_a_branch_on_values_is_refused_with_its_line() -> None:
    with pytest.raises(ExportError, match=r"cannot be followed by torch.export \(test_export_torch.py, line \d+"):
        to_onnx(Computes(lambda x: x if x.sum() > 0 else -x), torch.rand(3, 4))


def test_a_branch_on_a_length_that_no_case_has_is_refused() -> None:
    with pytest.raises(ExportError, match=r"something else where axis 0 of 'x' is longer than 50"):
        to_onnx(Computes(lambda x: x * 2 if x.shape[0] > 50 else x * 3), torch.rand(3, 4))


def test_a_table_of_positions_bounds_a_length_without_a_refusal() -> None:
    positions = torch.rand(1, 60, 4)
    made = to_onnx(Computes(lambda x: x + positions[:, : x.shape[1]]), torch.rand(3, 7, 4), dynamic={"x": {1: "time"}})
    rows = torch.rand(2, 60, 4)
    np.testing.assert_allclose(made.run(rows)["y"], rows + positions, rtol=1e-6)


def test_a_module_of_torch_jit_is_refused_and_an_example_is_left_as_it_was() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        jitted = torch.jit.trace(torch.nn.Linear(4, 2), torch.rand(3, 4))
    with pytest.raises(ExportError, match=r"made by torch.jit, .*export the module that it was made of"):
        to_onnx(jitted, torch.rand(3, 4))
    example = torch.rand(3, 4)
    kept = example.clone()
    to_onnx(Computes(lambda x: x.add_(1)), example)
    assert torch.equal(example, kept)


def test_a_graph_that_computes_something_else_is_refused_with_the_numbers() -> None:
    with pytest.raises(ExportMismatchError, match=r"output 'y' differs by .* for inputs of 'x' \[3, 4\]") as got:
        to_onnx(Computes(lambda x: x + torch.rand_like(x)), torch.rand(3, 4))
    error = got.value
    assert (error.output, error.shapes) == ("y", {"x": (3, 4)})
    assert error.max_difference > error.tolerance > 0


@pytest.mark.parametrize(
    ("example", "error", "words"),
    [
        (None, ConfigurationError, r"with an example of its inputs: to_onnx\(module, example\)"),
        (["a", "b"], ConfigurationError, "input 'input' of a PyTorch module expects numbers, got text"),
        (np.ones((3, 5)), BuildError, "cannot be run on the example: mat1 and mat2 shapes cannot be multiplied"),
    ],
    ids=["none", "text", "shape"],
)
def test_a_wrong_example_is_refused_in_words(example: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        to_onnx(nn.Linear(4, 3), example)


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ({"y": {1: "time"}}, "dynamic names 'y', and the inputs are 'input'"),
        ({"input": [2]}, r"axis 2 of 'input', whose example has shape \[3, 4\]: expected axes from 0 to 1"),
    ],
    ids=["name", "axis"],
)
def test_an_axis_that_is_not_there_is_refused(dynamic: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        to_onnx(nn.Linear(4, 3), torch.rand(3, 4), dynamic=dynamic)


def test_the_digest_is_of_structure_and_weights() -> None:
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    one, again, other = (to_onnx(net, torch.rand(2, 4)).source_digest for net in (first, first, second))
    assert one == again != other
    assert one.startswith("sha256:")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(inferway.UnknownFrameworkError, match=r"expected a model of Keras.*got builtins.object"):
        to_onnx(object(), np.ones(3))
    with pytest.raises(inferway.UnknownFrameworkError, match="give an object of the class"):
        to_onnx(nn.Linear, np.ones(3))
