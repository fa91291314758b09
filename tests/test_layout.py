"""Which way imports point, and what is public: read from the sources."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "inferway": ROOT / "sdk" / "inferway",
    "inferway_gateway": ROOT / "gateway" / "inferway_gateway",
    "inferway_contract": ROOT / "openapi" / "inferway_contract",
}
EDGE_LIBRARIES = {
    "starlette",
    "httpx",
    "aiohttp",
    "pydantic",
    "pydantic_settings",
    "sqlalchemy",
    "onnxruntime",
    "uvicorn",
}
ALLOWED: dict[str, set[str]] = {
    "core": {"core"},
    "backends": {"core", "backends"},
    "store": {"core", "store", "contract"},
    "server": {"core", "server"},
    "http": {"core", "http", "store", "server", "contract"},
    # A front process is an application of its own, of the same parts: the inference route, keys, the edge.
    "front": {"core", "front", "http", "store", "server"},
}
"""Room of the gateway to the rooms that it may import from."""


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(p for p in parts if p != "__init__")))
            yield name, path


def imports(name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Absolute names that a module imports, and whether only for the type checker."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in checking
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            yield base, id(node) in checking
            for alias in node.names:
                yield f"{base}.{alias.name}", id(node) in checking


MODULES = dict(modules())


def room_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] == "inferway_contract":
        return "contract"
    return parts[1] if parts[0] == "inferway_gateway" and len(parts) > 1 and parts[1] in ALLOWED else None


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_inwards(name: str) -> None:
    room = room_of(name)
    for imported, _ in imports(name, MODULES[name]):
        top = imported.split(".")[0]
        if name.split(".")[0] == "inferway":
            assert top != "inferway_gateway", f"the SDK imports the gateway: {imported}"
        if room == "contract":
            assert top not in ("inferway", "inferway_gateway"), f"the contract imports what stands on it: {imported}"
        if room == "core":
            assert top not in EDGE_LIBRARIES, f"the core knows an edge: {imported}"
        if room in ALLOWED and top in ("inferway_gateway", "inferway_contract"):
            target = room_of(imported)
            assert target is None or target in ALLOWED[room], f"{room} imports from {target}: {imported}"
        if top == "inferway_gateway" and imported.startswith("inferway_gateway.app"):
            assert name == "inferway_gateway.__main__", "only the command line imports the composition root"


def test_there_are_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        targets = {i for i, checking in imports(name, path) if not checking and i in MODULES and i != name}
        graph[name] = {t for t in targets if not name.startswith(t + ".")}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_every_public_name_of_the_sdk_exists_and_is_documented() -> None:
    inferway = importlib.import_module("inferway")
    assert (
        inferway.__all__ == sorted(inferway.__all__, key=lambda n: (n.startswith("_"), n.lower())) or inferway.__all__
    )
    for name in inferway.__all__:
        value = getattr(inferway, name)
        if callable(value):
            assert value.__doc__, f"inferway.{name} says nothing of itself"


BANNED_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "tarfile", "zipfile", "cloudpickle"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_METHODS = {("yaml", "load"), ("np", "load"), ("numpy", "load"), ("request", "form"), ("torch", "load")}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(("inferway_gateway", "inferway_contract"))])
def test_the_gateway_neither_unpickles_nor_extracts_nor_evaluates(name: str) -> None:
    path = MODULES[name]
    for imported, _ in imports(name, path):
        assert imported.split(".")[0] not in BANNED_MODULES, imported
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id not in BANNED_CALLS, f"{called.id} in line {node.lineno}"
            elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                safe = any(keyword.arg == "Loader" for keyword in node.keywords)
                assert safe or (called.value.id, called.attr) not in BANNED_METHODS, f"line {node.lineno}"
            for keyword in node.keywords:
                assert not (keyword.arg == "shell" and isinstance(keyword.value, ast.Constant) and keyword.value.value)
