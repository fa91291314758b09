"""What a confined process cannot do, tried for real in processes of their own, and what it still can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from inferway_gateway.backends.worker import sandbox
from models import matmul

pytestmark = pytest.mark.skipif(bool(sandbox.capabilities().missing), reason="this kernel lacks layers of the sandbox")

PRELUDE = """
import json, os, sys, threading
import numpy as np
import numpy.random
import onnxruntime as ort
from pathlib import Path
from inferway_gateway.backends.worker.sandbox import *
from inferway_gateway.backends.worker import sandbox

def tell(**said):
    os.write(1, json.dumps(said).encode())

def opened(path):
    return os.open(path, os.O_RDONLY)
"""


def in_child(script: str, *arguments: Path, environment: dict[str, str] | None = None) -> Any:
    """What a fresh process tells that has done ``script`` in a fork of it, so that only one thread was there."""
    # The runtime's threads are not in a fork, and its destructors would wait for them.
    forked = """
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    exec(sys.argv[1])
except BaseException as error:
    os.write(2, repr(error).encode())
    os._exit(1)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + forked, textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        env={**os.environ, **(environment or {})},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of models; the first is whose worker it is."""
    folders = tmp_path / "own", tmp_path / "other"
    for folder in folders:
        folder.mkdir()
        (folder / "model.onnx").write_bytes(matmul())
    return folders


def test_the_probe_at_the_start_of_a_worker_tells_confined_from_not() -> None:
    told = in_child(
        "before = probe(); layers = confine([]); tell(before=before, after=probe(), missing=layers.missing)"
    )
    assert {"socket", "execve", "ptrace", "clone", "mount", "read outside", "no_new_privs"} <= set(told["before"])
    assert told["after"] == []
    assert told["missing"] == {}


def test_a_confined_process_loads_and_runs_its_model_with_threads(models: tuple[Path, Path]) -> None:
    told = in_child(
        """
        confine([opened(sys.argv[2])])
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        session = ort.InferenceSession(sys.argv[2] + "/model.onnx", options)
        found = []
        def run():
            found.append(session.run(None, {"x": np.ones((3, 64), np.float32)})[0])
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        tell(shapes=[list(y.shape) for y in found], equal=all(np.array_equal(y, found[0]) for y in found))
        """,
        models[0],
    )
    assert told == {"shapes": [[3, 32]] * 4, "equal": True}


def test_the_runtime_opens_no_other_model_and_no_link_to_one(models: tuple[Path, Path]) -> None:
    own, other = models
    (own / "link.onnx").symlink_to(other / "model.onnx")
    told = in_child(
        """
        confine([opened(sys.argv[2])])
        refused = []
        for path in (sys.argv[2] + "/link.onnx", sys.argv[3] + "/model.onnx"):
            try:
                ort.InferenceSession(path)
            except Exception as error:
                refused.append(type(error).__name__)
        tell(refused=len(refused), listed=os.listdir(sys.argv[2]))
        """,
        own,
        other,
    )
    assert told["refused"] == 2
    assert sorted(told["listed"]) == ["link.onnx", "model.onnx"]


def test_too_much_memory_is_an_error_and_not_the_end() -> None:
    told = in_child(
        """
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        confine([], Limits(address_space_bytes=size + 256 * MIB))
        try:
            np.ones(1 << 30)
            refused = False
        except MemoryError:
            refused = True
        tell(refused=refused, still=float(np.ones(1 << 20).sum()))
        """
    )
    assert told == {"refused": True, "still": float(1 << 20)}


def test_shared_memory_that_was_handed_over_can_be_written_and_none_can_grow() -> None:
    told = in_child(
        """
        import mmap
        fd = os.memfd_create("tensors")
        os.ftruncate(fd, MIB)
        confine([])
        memory = mmap.mmap(fd, MIB)
        memory[:5] = b"hello"
        try:
            os.ftruncate(fd, 2 * MIB)
            grew = True
        except OSError:
            grew = False
        tell(said=memory[:5].decode(), grew=grew)
        """
    )
    assert told == {"said": "hello", "grew": False}


def test_no_variable_is_left_for_the_model_or_for_others_to_read() -> None:
    told = in_child(
        """
        kept = confine([], keep_environment=["KEPT"]) and dict(os.environ)
        tell(kept=kept)
        """,
        environment={"INFERWAY_DATABASE_URL": "postgresql://secret", "KEPT": "1"},
    )
    assert told == {"kept": {"KEPT": "1"}}


def test_what_the_kernel_shows_of_the_environment_is_wiped() -> None:
    told = in_child(
        """
        shown = opened("/proc/self/environ")
        before = os.pread(shown, 1 << 20, 0)
        confine([])
        after = os.pread(shown, 1 << 20, 0)
        tell(before=b"secret-of-mine" in before, after=after.strip(b"\\0").decode())
        """,
        environment={"CANARY": "secret-of-mine"},
    )
    assert told == {"before": True, "after": ""}


def test_descriptors_that_are_not_kept_are_closed() -> None:
    told = in_child(
        """
        a, b = os.pipe(); c, d = os.pipe()
        confine([], keep=[b, c])
        open_still = []
        for fd in (a, b, c, d):
            try:
                os.fstat(fd)
                open_still.append(fd)
            except OSError:
                pass
        tell(kept=open_still == [b, c])
        """
    )
    assert told == {"kept": True}


def test_threads_that_were_there_before_are_said_to_be_free_of_landlock() -> None:
    told = in_child(
        """
        stop = threading.Event()
        threading.Thread(target=stop.wait, daemon=True).start()
        layers = confine([])
        tell(held=layers.held, missing=dict(layers.missing))
        stop.set()
        """
    )
    assert "1 threads" in told["missing"]["landlock"]
    assert "seccomp" in told["held"]


def test_a_kernel_without_layers_is_said_to_lack_them_and_no_harm_is_done() -> None:
    told = in_child(
        """
        sandbox.capabilities = lambda: sandbox.Capabilities("riscv64", 0, False, True)
        layers = confine([])
        tell(held=layers.held, missing=sorted(layers.missing), lacks=len(sandbox.capabilities().missing),
             reads=Path(os.__file__).is_file())
        """
    )
    assert told["missing"] == ["landlock", "seccomp"]
    assert {"environment", "rlimits", "no_new_privs"} <= set(told["held"])
    assert told["lacks"] == 2
    assert told["reads"]


def test_limits_that_are_there_are_never_raised() -> None:
    told = in_child(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        confine([], Limits(open_files=1000, cpu_s=60, processes=None))
        tell(files=resource.getrlimit(resource.RLIMIT_NOFILE), core=resource.getrlimit(resource.RLIMIT_CORE),
             cpu=resource.getrlimit(resource.RLIMIT_CPU))
        """
    )
    assert told == {"files": [100, 100], "core": [0, 0], "cpu": [60, 60]}
