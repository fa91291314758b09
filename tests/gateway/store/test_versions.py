"""Versions laid out in directories."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from inferway_gateway.core.catalog import AliasSpec, FileRef, VersionRecord, VersionSpec
from inferway_gateway.core.errors import BlobNotFoundError, InsufficientStorageError, InvalidParameterError
from inferway_gateway.store import versions
from inferway_gateway.store.blobs import StorageLimits
from inferway_gateway.store.catalog import SqlCatalog, open_catalog
from inferway_gateway.store.storage import Storage, open_storage
from inferway_gateway.store.versions import MAX_DEPTH, MAX_FILES, VersionDirectories, check_files

KEY = "a1B2c3D4e5F6"
CONTENTS = {"model.onnx": b"graph", "weights/deep/a.bin": b"weights" * 1000, "weights/b.bin": b"weights" * 1000}


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def refs(contents: dict[str, bytes]) -> tuple[FileRef, ...]:
    return tuple(FileRef(path, digest_of(content), len(content)) for path, content in contents.items())


class Place:
    def __init__(self, root: Path, catalog: SqlCatalog, storage: Storage) -> None:
        self.root = root
        self.catalog = catalog
        self.storage = storage
        self.versions = storage.versions

    async def deploy(self, model: str = "m", contents: dict[str, bytes] = CONTENTS) -> VersionRecord:
        for content in contents.values():

            async def once(content: bytes = content) -> AsyncIterator[bytes]:
                yield content

            await self.storage.blobs.put_stream(digest_of(content), once(), by=KEY)
        spec = VersionSpec(model, "onnx", refs(contents))
        digest = digest_of(repr(spec).encode())
        running = await self.catalog.begin_deployment(spec, digest=digest, isolation="worker", by=KEY, owner="g")
        return await self.catalog.commit_deployment(running.id, None, AliasSpec({running.version: 100.0}))

    def directories(self) -> list[str]:
        return sorted(f"{path.parent.name}/{path.name}" for path in (self.root / "versions").glob("*/*"))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    root = tmp_path / "state"
    async with (
        open_catalog(database_url=f"sqlite:///{root}/inferway.db") as catalog,
        open_storage(state_dir=root, catalog=catalog, limits=StorageLimits()) as storage,
    ):
        yield Place(root, catalog, storage)


class TestPaths:
    @pytest.mark.parametrize(
        "path",
        [
            "model.onnx",
            "weights/a.bin",
            "ä/日本.bin",
            "a..b/c...",
            ".hidden/x",
            "a b/c,d;e=f",
            "/".join("abcdefghijklmnop"),
            "x" * 255,
        ],
    )
    def test_that_can_be_laid_out_pass(self, path: str) -> None:
        check_files([FileRef(path, "0" * 64, 1)])

    @pytest.mark.parametrize(
        "path",
        [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/../b",
            "a/..",
            ".",
            "./a",
            "a/./b",
            "a//b",
            "a/",
            "a\\b",
            "..\\x",
            "C:/x",
            "c:x",
            "a\0b",
            "a\nb",
            "a\x7fb",
            "a\u202eb",
            "\ud800",
            "x" * 256,
            "/".join(["a"] * (MAX_DEPTH + 1)),
            "/".join(["x" * 200] * 3),
        ],
        ids=ascii,
    )
    def test_that_cannot_are_refused(self, path: str) -> None:
        with pytest.raises(InvalidParameterError) as caught:
            check_files([FileRef(path, "0" * 64, 1)])
        caught.value.message.encode("ascii")

    @pytest.mark.parametrize(
        "paths",
        [
            ("a", "a"),
            ("a", "A"),
            ("stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE"),
            ("\N{LATIN SMALL LETTER E WITH ACUTE}", "e\N{COMBINING ACUTE ACCENT}"),
            ("a", "a/b"),
            ("x/Y", "X/y/z"),
            ("a/b/c", "a/b"),
        ],
        ids=ascii,
    )
    def test_that_get_into_each_others_way_are_refused(self, paths: tuple[str, str]) -> None:
        for first, second in (paths, paths[::-1]):
            with pytest.raises(InvalidParameterError, match=r"once|both"):
                check_files([FileRef(first, "0" * 64, 1), FileRef(second, "1" * 64, 1)])

    def test_are_some_and_not_too_many(self) -> None:
        check_files([FileRef(f"f{number}", "0" * 64, 1) for number in range(MAX_FILES)])
        for count in (0, MAX_FILES + 1):
            with pytest.raises(InvalidParameterError, match=f"got {count}"):
                check_files([FileRef(f"f{number}", "0" * 64, 1) for number in range(count)])


class TestLayingOut:
    async def test_links_the_contents_read_only(self, place: Place) -> None:
        version = await place.deploy()
        directory = await place.versions.materialise(version)
        assert {
            str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
        } == CONTENTS
        for path in (directory, *directory.rglob("*")):
            assert stat.S_IMODE(path.lstat().st_mode) == (0o500 if path.is_dir() else 0o400)
            assert not path.is_symlink()
        same = [directory / "weights/deep/a.bin", directory / "weights/b.bin"]
        blob = await place.storage.blobs.open_local(digest_of(CONTENTS["weights/b.bin"]))
        assert len({path.stat().st_ino for path in (*same, blob)}) == 1

    async def test_versions_with_the_same_weights_have_them_once(self, place: Place) -> None:
        first = await place.versions.materialise(await place.deploy())
        second = await place.versions.materialise(await place.deploy(contents=CONTENTS | {"model.onnx": b"other"}))
        assert first != second
        assert (first / "weights/b.bin").stat().st_ino == (second / "weights/b.bin").stat().st_ino

    async def test_again_is_as_good_as_once_and_mends_what_is_missing(self, place: Place) -> None:
        version = await place.deploy()
        directory = await place.versions.materialise(version)
        inode = directory.stat().st_ino
        assert await place.versions.materialise(version) == directory
        assert directory.stat().st_ino == inode
        (directory / "weights").chmod(0o700)
        (directory / "weights/b.bin").unlink()
        [problem] = await place.versions.check()
        assert (problem.kind, problem.subject) == ("version", "m/1")
        await place.versions.materialise(version)
        assert (directory / "weights/b.bin").read_bytes() == CONTENTS["weights/b.bin"]
        assert place.directories() == [f"m/{directory.name}"]
        assert await place.versions.check() == []

    async def test_at_once_makes_one(self, place: Place) -> None:
        version = await place.deploy()
        found = await asyncio.gather(*(place.versions.materialise(version) for _ in range(8)))
        assert len(set(found)) == 1
        assert place.directories() == [f"m/{found[0].name}"]

    async def test_leaves_alone_what_somebody_else_has_made_meanwhile(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version = await place.deploy()
        first = await place.versions.materialise(version)
        made = first.stat().st_ino
        real = versions._is_whole
        looks: list[Path] = []

        def late(directory: Path, files: Sequence[FileRef]) -> bool:
            looks.append(directory)
            return len(looks) > 1 and real(directory, files)

        monkeypatch.setattr(versions, "_is_whole", late)
        assert await place.versions.materialise(version) == first
        assert first.stat().st_ino == made
        assert place.directories() == [f"m/{first.name}"]

    async def test_copies_where_nothing_can_be_linked(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        def link(*_: Any, **__: Any) -> None:
            raise OSError(errno.EXDEV, "another device")

        monkeypatch.setattr(os, "link", link)
        directory = await place.versions.materialise(await place.deploy())
        assert (directory / "weights/b.bin").read_bytes() == CONTENTS["weights/b.bin"]
        assert stat.S_IMODE((directory / "weights/b.bin").stat().st_mode) == 0o400

    async def test_on_a_full_disk_leaves_nothing(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        version = await place.deploy()
        real = os.link
        calls = []

        def link(*arguments: Any, **options: Any) -> None:
            calls.append(arguments)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "no space")
            real(*arguments, **options)

        monkeypatch.setattr(os, "link", link)
        with pytest.raises(InsufficientStorageError):
            await place.versions.materialise(version)
        assert place.directories() == []

    async def test_needs_the_contents_and_good_names(self, place: Place) -> None:
        version = await place.deploy()
        missing = replace(version, version=2, digest="f" * 64, files=(FileRef("a", "0" * 64, 1),))
        with pytest.raises(BlobNotFoundError):
            await place.versions.materialise(missing)
        with pytest.raises(InvalidParameterError):
            await place.versions.materialise(replace(version, files=(replace(version.files[0], path="../x"),)))
        with pytest.raises(InvalidParameterError):
            await place.versions.materialise(replace(version, model="../x"))
        assert place.directories() == []

    async def test_never_follows_a_link_that_somebody_put_there(self, place: Place, tmp_path: Path) -> None:
        version = await place.deploy()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for path, content in CONTENTS.items():
            (elsewhere / path).parent.mkdir(parents=True, exist_ok=True)
            (elsewhere / path).write_bytes(content)
        target = place.versions.path(version)
        target.parent.mkdir()
        target.symlink_to(elsewhere)
        directory = await place.versions.materialise(version)
        assert not directory.is_symlink()
        assert (elsewhere / "model.onnx").read_bytes() == b"graph"


class TestSweeping:
    async def test_takes_directories_of_versions_that_are_gone(self, place: Place) -> None:
        kept, gone = await place.deploy("kept"), await place.deploy("gone")
        for version in (kept, gone):
            await place.versions.materialise(version)
        await place.catalog.delete_model("gone", by=KEY)
        [problem] = await place.storage.check()
        assert (problem.kind, problem.harmless) == ("orphan", True)
        with (place.versions.path(gone) / "model.onnx").open("rb") as held:
            assert (await place.storage.collect()).directories == 1
            assert held.read() == b"graph", "who has it open keeps it"
        assert place.directories() == [f"kept/{place.versions.path(kept).name}"]
        assert not place.versions.path(gone).parent.exists()
        assert await place.storage.check() == []

    async def test_leaves_those_of_deployments_that_run(self, place: Place) -> None:
        version = await place.deploy()
        spec = VersionSpec("m", "onnx", version.files)
        running = await place.catalog.begin_deployment(spec, digest="f" * 64, isolation="worker", by=KEY, owner="g")
        record = replace(version, version=running.version, digest=running.digest)
        await place.versions.materialise(record)
        assert await place.versions.sweep() == 0
        assert await place.versions.check() == []
        await place.catalog.end_deployment(running.id, code="internal", message="", step=None)
        assert await place.versions.sweep() == 1

    async def test_takes_what_an_interrupted_process_left(self, place: Place) -> None:
        version = await place.deploy()
        await place.versions.materialise(version)
        for name, age_s in ((".new-old", 7200), (".new-young", 0)):
            path = place.root / "versions" / "m" / name
            path.mkdir()
            (path / "x").write_bytes(b"half")
            os.utime(path, (time.time() - age_s,) * 2)
        assert await place.versions.sweep() == 1
        assert place.directories() == ["m/.new-young", f"m/{place.versions.path(version).name}"]

    async def test_removes_one_at_a_word(self, place: Place) -> None:
        version = await place.deploy()
        await place.versions.materialise(version)
        await place.versions.remove(version)
        await place.versions.remove(version)
        assert place.directories() == []


def test_the_name_of_a_directory_tells_contents_apart(tmp_path: Path) -> None:
    """A number may come to mean other content where a deployment failed; the directory must not."""
    record = VersionRecord(
        "m", 1, "onnx", "a" * 64, (), {}, "worker", {}, {}, False, None, datetime(2026, 1, 1, tzinfo=UTC), KEY
    )
    directories = VersionDirectories(tmp_path, *([None] * 3))  # type: ignore[arg-type]  # names need none of them
    assert directories.path(record) != directories.path(replace(record, digest="b" * 64))
