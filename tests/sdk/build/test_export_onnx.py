"""ONNX that is there already, `OnnxModel` itself, large models, and what is not installed."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import inferway
import models
from inferway import ConfigurationError, to_onnx
from inferway.build import runtime

FLOWERS, KINDS = load_iris(return_X_y=True)


@pytest.fixture(scope="module")
def flowers() -> Any:
    return to_onnx(LogisticRegression(max_iter=500).fit(FLOWERS, KINDS), FLOWERS)


@pytest.mark.parametrize("form", ["path", "text", "bytes", "proto"])
def test_onnx_is_taken_as_it_is_in_every_form(form: str, tmp_path: Path) -> None:
    data = models.add_one()
    (tmp_path / "m.onnx").write_bytes(data)
    given = {
        "path": tmp_path / "m.onnx", "text": str(tmp_path / "m.onnx"), "bytes": data,
        "proto": onnx.load_from_string(data),
    }[form]  # fmt: skip
    made = to_onnx(given, np.zeros((2, 16), np.float32))
    assert (made.framework, made.verification, made.to_bytes()) == ("onnx", None, data)
    [(inputs, outputs)] = made.examples
    assert (next(iter(outputs.values())) == next(iter(inputs.values())) + 1).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"no model", "the bytes cannot be read as an ONNX model"),
        (Path("nowhere.onnx"), r"expected nowhere.onnx to be an .onnx file, and there is none"),
        (Path(), "it is a folder; give the file in it"),
        (onnx.ModelProto(), "has no graph"),
    ],
    ids=["bytes", "nowhere", "folder", "empty"],
)
def test_what_is_no_onnx_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        to_onnx(given)


def test_arguments_of_an_export_do_not_go_with_onnx() -> None:
    with pytest.raises(ConfigurationError, match="this one is ONNX already"):
        to_onnx(models.add_one(), dynamic={"x": [1]})


def test_a_model_shows_what_it_is_on_a_terminal_and_in_a_notebook(flowers: Any) -> None:
    text = repr(flowers)
    assert text.splitlines()[:2] == ["OnnxModel", "  from     sklearn"]
    assert "in       x: FP64 [-1, 4]" in text
    assert "classes  3: 0, 1, 2" in text
    assert "verified agrees within" in text
    page = flowers._repr_html_()
    assert page.startswith("<table>")
    assert "probabilities: FP64 [-1, 3]" in page


def test_a_model_runs_here_and_travels_and_is_saved(flowers: Any, tmp_path: Path) -> None:
    labels = flowers.predict(FLOWERS, outputs=["label"])
    assert (labels == KINDS).mean() > 0.9
    assert set(flowers.predict(FLOWERS[0])) == {"label", "probabilities"}
    with pytest.raises(inferway.InvalidInputError, match=r"input 'x' expects shape \[-1, 4\]"):
        flowers.predict(np.zeros((2, 3)))
    again = pickle.loads(pickle.dumps(flowers))
    assert (again.predict(FLOWERS, outputs=["label"]) == labels).all()
    saved = flowers.save(tmp_path / "made" / "iris.onnx")
    assert saved.read_bytes() == flowers.to_bytes()


def test_a_model_that_is_too_long_for_one_file_keeps_its_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = onnx.numpy_helper.from_array(np.arange(4000, dtype=np.float32).reshape(4, 1000), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["batch", 4])],
        [onnx.helper.make_tensor_value_info("y", 1, ["batch", 1000])], [weights],
    )  # fmt: skip
    made = to_onnx(onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)]))
    before = made.to_bytes()
    # As if a message could have 1 MiB and 15,000 bytes.
    monkeypatch.setattr(runtime, "MESSAGE_LIMIT_BYTES", (1 << 20) + 15_000)
    path = made.save(tmp_path / "large.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert path.stat().st_size < 1000
    x = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(made.predict(x), x @ np.arange(4000, dtype=np.float32).reshape(4, 1000))
    assert to_onnx(path).to_bytes() == made.to_bytes() == before


@pytest.mark.parametrize(
    ("blocked", "extra", "code"),
    [
        ("onnx", "export", "from sklearn.linear_model import Ridge; model = Ridge().fit([[1.0]], [1.0])"),
        ("onnxruntime", "export", "from sklearn.linear_model import Ridge; model = Ridge().fit([[1.0]], [1.0])"),
        ("skl2onnx", "export", "from sklearn.linear_model import Ridge; model = Ridge().fit([[1.0]], [1.0])"),
        ("onnxmltools", "export", "import lightgbm as l; model = l.LGBMRegressor(verbose=-1).fit([[1.0]]*9, [1.0]*9)"),
        ("onnxscript", "train", "import torch; model = torch.nn.Linear(1, 1)"),
    ],
    ids=["onnx", "onnxruntime", "skl2onnx", "onnxmltools", "onnxscript"],
)
def test_what_is_not_installed_is_named_with_the_pip_install(blocked: str, extra: str, code: str) -> None:
    script = f"""
        import sys, inferway
        {code}
        for name in [name for name in sys.modules if name.partition(".")[0] == {blocked!r}]:
            del sys.modules[name]
        sys.modules[{blocked!r}] = None
        try:
            inferway.to_onnx(model, [[1.0], [2.0]])
        except inferway.MissingExtraError as error:
            print(error.package, error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{blocked} ")
    assert f"needs {blocked}, which is not installed: pip install 'inferway[{extra}]'" in done.stdout


def test_naming_the_exporter_imports_no_framework() -> None:
    code = "import sys\nfrom inferway import OnnxModel, package, to_onnx\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "keras", "tensorflow", "sklearn", "skl2onnx", "onnx", "onnxruntime", "xgboost", "lightgbm",
             "catboost", "pandas", "pydantic", "httpx"}  # fmt: skip
    assert not heavy & set(loaded)
