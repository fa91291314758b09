"""``inferway registry``, as an operator types it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from inferway_gateway.__main__ import main
from inferway_gateway.core.catalog import AliasSpec, FileRef, VersionSpec
from inferway_gateway.store.blobs import StorageLimits
from inferway_gateway.store.catalog import SqlCatalog, open_catalog
from inferway_gateway.store.storage import Storage, open_storage

KEY = "a1B2c3D4e5F6"
CONTENT = b"a graph"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Shell:
    """Runs the command in this process and keeps what it wrote."""

    def __init__(self, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state = state
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        try:
            status = main(["registry", *arguments, "--state-dir", str(self.state)])
        except SystemExit as end:  # argparse's way to refuse arguments
            status = end.code if isinstance(end.code, int) else 1
        self.out, self.err = self._capsys.readouterr()
        return status

    def using(self, work: Callable[[SqlCatalog, Storage], Awaitable[None]]) -> None:
        async def opened() -> None:
            async with (
                open_catalog(database_url=f"sqlite:///{self.state}/inferway.db") as catalog,
                open_storage(state_dir=self.state, catalog=catalog, limits=StorageLimits()) as storage,
            ):
                await work(catalog, storage)

        asyncio.run(opened())

    def blob(self) -> Path:
        [path] = self.state.glob("blobs/sha256/*/*")
        return path


async def put(storage: Storage, content: bytes) -> None:
    async def once() -> AsyncIterator[bytes]:
        yield content

    await storage.blobs.put_stream(hashlib.sha256(content).hexdigest(), once(), by=KEY)


async def deploy(catalog: SqlCatalog, storage: Storage) -> None:
    await put(storage, CONTENT)
    spec = VersionSpec("churn", "onnx", (FileRef("model.onnx", DIGEST, len(CONTENT)),))
    running = await catalog.begin_deployment(spec, digest="0" * 64, isolation="worker", by=KEY, owner="g")
    version = await catalog.commit_deployment(running.id, None, AliasSpec({1: 100.0}))
    await storage.versions.materialise(version)


@pytest.fixture
def registry(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """One version, deployed."""
    for name in [name for name in os.environ if name.startswith("INFERWAY_")]:
        monkeypatch.delenv(name)
    shell = Shell(tmp_path / "state", capsys)
    shell.using(deploy)
    return shell


class TestCheck:
    def test_finds_nothing_where_all_is_well(self, registry: Shell) -> None:
        assert registry("check") == 0
        assert registry.out == ""
        assert registry.err == "Checked 1 file and 1 version: no problems.\n"
        assert registry("check", "--json", "--quiet") == 0
        assert json.loads(registry.out) == {"files": 1, "versions": 1, "problems": []}
        assert registry.err == ""

    def test_finds_a_file_with_other_bytes_of_the_same_length(self, registry: Shell) -> None:
        path = registry.blob()
        path.chmod(0o600)
        path.write_bytes(b"A graph")
        assert registry("check") == 1
        assert DIGEST in registry.out
        assert "from a backup" in registry.out
        assert "1 problem." in registry.err

    def test_finds_a_file_that_is_missing(self, registry: Shell) -> None:
        registry.blob().unlink()
        assert registry("check", "--json") == 1
        assert [problem["kind"] for problem in json.loads(registry.out)["problems"]] == ["missing"]

    def test_finds_a_version_directory_that_lacks_a_file(self, registry: Shell) -> None:
        [path] = registry.state.glob("versions/churn/*/model.onnx")
        path.parent.chmod(0o700)
        path.unlink()
        assert registry("check") == 1
        assert "'churn' version 1" in registry.out
        assert "restart the gateway" in registry.out

    def test_finds_a_version_whose_blob_was_lost(self, registry: Shell) -> None:
        with sqlite3.connect(registry.state / "inferway.db") as database:
            database.execute("DELETE FROM inferway_blobs")
        database.close()
        assert registry("check") == 1
        assert "deploy it again" in registry.out

    def test_takes_leftovers_for_no_problem(self, registry: Shell) -> None:
        registry.blob().with_name("0" * 64).write_bytes(b"half")
        directory = registry.state / "versions" / "churn" / ("9-" + "0" * 16)
        directory.mkdir()
        assert registry("check") == 0
        assert registry.out.count("note: ") == 2
        assert "'inferway registry gc' removes it" in registry.out


class TestCollecting:
    def test_removes_what_nothing_names_and_nothing_else(self, registry: Shell) -> None:
        registry.using(lambda _, storage: put(storage, b"of no version"))
        assert registry("gc") == 0
        assert "no files that no version has" in registry.err
        assert registry("gc", "--grace-s", "0", "--json") == 0
        assert json.loads(registry.out)["blobs"] == 1
        assert "Removed 1 file that no version has" in registry.err
        assert registry.blob().name.startswith(DIGEST)
        assert registry("check") == 0

    def test_removes_directories_of_deleted_versions(self, registry: Shell) -> None:
        registry.using(lambda catalog, _: catalog.delete_model("churn", by=KEY))
        assert registry("gc", "--grace-s", "0") == 0
        assert "1 version directory" in registry.err
        assert list(registry.state.glob("versions/*")) + list(registry.state.glob("blobs/sha256/*/*")) == []

    def test_forgets_history_beyond_its_limits(self, registry: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        async def fail(catalog: SqlCatalog, _: Storage) -> None:
            spec = VersionSpec("churn", "onnx", (FileRef("model.onnx", DIGEST, len(CONTENT)),))
            for number in range(4):
                run = await catalog.begin_deployment(
                    spec, digest=f"{number + 1}" * 64, isolation="worker", by=KEY, owner="g"
                )
                await catalog.end_deployment(run.id, code="model_rejected", message="no", step=None)

        registry.using(fail)
        assert registry("gc") == 0
        assert "Forgot no old events and no old deployments." in registry.err
        monkeypatch.setenv("INFERWAY_HISTORY_PER_MODEL", "2")
        assert registry("gc", "--json") == 0
        gone = json.loads(registry.out)
        assert (gone["events"], gone["deployments"]) == (3 + 8 - 2, 5 - 2)
        assert "Forgot 9 old events and 3 old deployments." in registry.err
        assert registry("check") == 0
        monkeypatch.setenv("INFERWAY_HISTORY_S", "1e300")
        assert registry("gc") == 2

    @pytest.mark.parametrize("grace", ["x", "-1", "nan"])
    def test_takes_a_number_of_seconds(self, registry: Shell, grace: str) -> None:
        assert registry("gc", "--grace-s", grace) == 2


@pytest.mark.parametrize("action", ["check", "gc"])
def test_a_state_directory_without_a_registry_is_not_made_one(tmp_path: Path, registry: Shell, action: str) -> None:
    registry.state = tmp_path / "elsewhere"
    assert registry(action) == 1
    assert "elsewhere" in registry.err
    assert not registry.state.exists()


def test_a_database_that_cannot_be_used_is_told_in_its_own_words(registry: Shell) -> None:
    (registry.state / "inferway.db").write_bytes(b"no database" * 1000)
    assert registry("check") == 1
    assert registry.err.endswith("cannot use the registry: DatabaseError: file is not a database\n")


def test_an_object_store_is_named_by_a_url(registry: Shell) -> None:
    assert registry("check", "--blob-store", "ftp://somewhere") == 1
    assert "s3://bucket/prefix" in registry.err
