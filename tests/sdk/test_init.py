"""The package itself: what importing it costs, and what it names."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import inferway

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "pydantic", "httpx", "httpcore", "aiohttp", "tenacity", "pandas", "inferway_contract", "onnx",
         "onnxruntime", "torch", "keras", "tensorflow", "sklearn", "skl2onnx", "ray", "shap")  # fmt: skip


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_else() -> None:
    code = """
import sys
before = set(sys.modules)
import inferway
new = set(sys.modules) - before
print(len(new), *sorted(new))
"""
    count, *names = run(code).split()
    assert not set(HEAVY) & {name.split(".")[0] for name in names}
    # The package and what typing brings where nobody has imported it yet. Counted, because time depends on the machine.
    assert int(count) < 30, names


def test_importing_the_package_is_fast() -> None:
    code = """
import time
best = 9.0
import sys
started = time.perf_counter()
import inferway
print(time.perf_counter() - started)
"""
    assert min(float(run(code)) for _ in range(5)) <= 0.06


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("from inferway import Timeout, APIError", ("numpy", "pydantic", "httpx", "aiohttp", "tenacity")),
        ("from inferway import Inferway; Inferway('http://h').close()", ("pydantic", "aiohttp", "tenacity")),
        ("from inferway import AsyncInferway; AsyncInferway('http://h')", ("pydantic", "tenacity")),
    ],
)
def test_a_name_imports_no_more_than_it_needs(code: str, absent: tuple[str, ...]) -> None:
    loaded = run(f"import sys\n{code}\nprint(*sys.modules)").split()
    assert not set(absent) & set(loaded)


def test_an_inference_needs_neither_pydantic_nor_tenacity() -> None:
    code = """
import sys
from inferway.testing import MockGateway
gateway = MockGateway()
gateway.model("m", inputs={"x": ("FP32", [-1])}, outputs={"y": ("FP32", [-1])})(lambda inputs: inputs["x"])
with gateway.client() as client:
    client.infer("m", [1])
print(*sys.modules)
"""
    assert not {"pydantic", "tenacity", "aiohttp"} & set(run(code).split())


def test_every_public_name_is_there_and_declared_to_type_checkers() -> None:
    source = (ROOT / "sdk/inferway/__init__.py").read_text()
    checking = next(
        node for node in ast.parse(source).body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    )
    declared = {
        alias.name: statement.module
        for statement in checking.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert set(declared) == set(inferway.__all__)
    assert len(inferway.__all__) == len(set(inferway.__all__))
    for name, module in declared.items():
        value = getattr(inferway, name)
        error = isinstance(value, type) and issubclass(value, inferway.InferwayError)
        home = "inferway" if error else f"inferway.{module}"
        assert getattr(value, "__module__", home) == home or name in ("NOT_GIVEN", "__version__")
        assert getattr(inferway, name) is value
    assert set(inferway.__all__) <= set(dir(inferway))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'inferway' has no attribute 'Infraway'"):
        _ = inferway.Infraway


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert inferway.__version__ == project["project"]["version"]


def test_only_the_transports_know_httpx() -> None:
    for path in (ROOT / "sdk/inferway").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any(name.split(".")[0] in ("httpx", "httpcore", "aiohttp", "httpx_aiohttp") for name in names):
                assert path.name in ("_transport.py", "_transport_aio.py", "testing.py"), path
            if any(name.split(".")[0] == "tenacity" for name in names):
                assert path.name == "_retry.py", path
