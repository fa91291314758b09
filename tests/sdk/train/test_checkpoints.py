"""Checkpoints: whole or not there, in folders and object stores."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from inferway import ConfigurationError
from inferway.train.checkpoints import MAGIC, Checkpoints, CheckpointWarning

ARRAYS = {
    "parameters": np.arange(1000, dtype=np.float32),
    "worker/0/count": np.array(7),
    "none": np.zeros((0, 3), np.float32),
    "matrix": np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
}
FACTS = {"history": {"loss": [0.1, 1 / 3]}, "best": None}


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:012d}.ckpt"


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "made" / "here")
    assert checkpoints.load() is None
    checkpoints.save(12, ARRAYS, FACTS)
    saved = checkpoints.load()
    assert saved is not None
    assert saved.step == 12
    assert saved.facts == FACTS
    assert list(saved.arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        got = saved.arrays[name]
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert np.array_equal(got, array)
        assert got.flags.writeable


@given(
    array=arrays_of.arrays(
        st.sampled_from([np.dtype(kind) for kind in ("f4", "f8", "i4", "u1", "?", "c8", ">f4")]),
        arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0),
    )
)
def test_arrays_come_back_to_the_bit(tmp_path_factory: pytest.TempPathFactory, array: Any) -> None:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("kept"))
    checkpoints.save(1, {"a": array, "b": array}, {})
    saved = checkpoints.load()
    assert saved is not None
    assert saved.arrays["b"].tobytes() == array.tobytes()
    assert saved.arrays["b"].dtype == array.dtype


def test_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        checkpoints.save(step, ARRAYS, {})
    (tmp_path / "notes.txt").write_text("not one of ours")
    checkpoints.save(20, ARRAYS, {})
    assert checkpoints.steps() == [15, 20]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes.txt",
        path_of(tmp_path, 15).name,
        path_of(tmp_path, 20).name,
    ]


def cut(content: bytes) -> bytes:
    return content[:-1]


def emptied(content: bytes) -> bytes:
    return b""


def flipped_in_the_body(content: bytes) -> bytes:
    return content[:-3000] + bytes([content[-3000] ^ 1]) + content[-2999:]


def flipped_in_the_head(content: bytes) -> bytes:
    at = len(MAGIC) + 32 + 8 + 5
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def replaced(content: bytes) -> bytes:
    return b"\x80\x04" + content


@pytest.mark.parametrize("damage", [cut, emptied, flipped_in_the_body, flipped_in_the_head, replaced])
def test_of_a_broken_one_the_one_before_is_taken_and_said(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10):
        checkpoints.save(step, ARRAYS, {})
    path_of(tmp_path, 10).write_bytes(damage(path_of(tmp_path, 10).read_bytes()))
    with pytest.warns(CheckpointWarning, match=r"step 10 .* is broken \(.*\); going on from step 5"):
        saved = checkpoints.load()
    assert saved is not None
    assert saved.step == 5


def test_one_under_another_name_is_not_taken_for_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, ARRAYS, {})
    path_of(tmp_path, 5).rename(path_of(tmp_path, 6))
    with pytest.warns(CheckpointWarning, match=r"it is of step 5\); there is none before it: starting anew"):
        assert checkpoints.load() is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, ARRAYS, {})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(10, ARRAYS, {})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [path_of(tmp_path, 5).name]


def test_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'names' cannot be kept: its dtype is object"):
        Checkpoints(tmp_path).save(1, {"names": np.array(["a", 1], object)}, {})


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="at least 1 checkpoint has to be kept, not 0"):
        Checkpoints(tmp_path, keep=0)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """``host:port`` of an object store."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < limit
                assert process.poll() is None
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_they_are_kept_in_an_object_store(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = pytest.importorskip("pyarrow.fs")
    for variable, value in (("AWS_ACCESS_KEY_ID", "somebody"), ("AWS_SECRET_ACCESS_KEY", "something")):
        monkeypatch.setenv(variable, value)
    urllib.request.urlopen(urllib.request.Request(f"http://{s3}/bucket", method="PUT"), timeout=10).close()
    url = f"s3://bucket/trainings/one?scheme=http&endpoint_override={s3}&region=us-east-1"
    checkpoints = Checkpoints(url, keep=2)
    assert checkpoints.load() is None
    for step in (5, 10, 15):
        checkpoints.save(step, ARRAYS, FACTS)
    assert Checkpoints(url).steps() == [10, 15]
    files, _ = fs.FileSystem.from_uri(url)
    name = f"bucket/trainings/one/{path_of(Path(), 15).name}"
    with files.open_input_file(name) as stream:
        content = stream.read()
    with files.open_output_stream(name) as stream:
        stream.write(cut(content))
    with pytest.warns(CheckpointWarning, match="step 15 .* going on from step 10") as warned:
        saved = checkpoints.load()
    assert saved is not None
    assert saved.step == 10
    assert saved.facts == FACTS
    assert saved.arrays["parameters"].tobytes() == ARRAYS["parameters"].tobytes()
    # What a URL is given besides may be a secret.
    assert "endpoint_override" not in str(warned[0].message)


def test_another_kind_of_url_is_refused() -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(ConfigurationError, match="no file system is known for the checkpoints' ftp://host/kept"):
        Checkpoints("ftp://host/kept?password=hidden")
