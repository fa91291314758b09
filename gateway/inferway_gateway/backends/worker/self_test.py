"""Whether the sandbox holds: every forbidden act is really tried, each in a throw-away child that was locked in.

    python -m inferway_gateway.backends.worker.self_test [--unconfined]

prints what came of each as JSON, and fails where something did not come out as it should. With ``--unconfined`` the
children do as they like, which shows that the acts are real ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .sandbox import MIB, REFUSALS, Limits, SandboxError, confine

ACTS: Final = (
    "read outside", "write", "socket", "exec", "ptrace", "fork", "mount", "bpf", "io_uring", "signal to parent",
    "open other model", "env secret",
)  # fmt: skip
"""What no confined process can do: bar S16 of the security plan."""

NEEDS: Final = ("read own model", "thread", "memfd")
"""What it still can."""

_MARK: Final = "INFERWAY_SANDBOX_CANARY"


def self_test(*, confined: bool = True) -> dict[str, bool]:
    """Really try each of ``ACTS`` and ``NEEDS``, every one in a throw-away child that was confined first.

    Forks, so it belongs where no other thread runs, such as a process of its own. Takes some 5 ms an act.

    Args:
        confined: False lets the children do as they like, which shows that the acts are real ones: what is then denied
            is denied by the system already, for want of privileges or by its settings.
    Returns:
        Act to whether it was denied; need to whether it was met. All true is as it should be.
    """
    with tempfile.TemporaryDirectory(prefix="inferway-sandbox-") as name:
        folder = Path(name)
        for model in ("own", "other"):
            (folder / model).mkdir()
            (folder / model / "model.onnx").write_bytes(b"weights")
        before = os.environ.get(_MARK)
        os.environ[_MARK] = "canary"
        try:
            acts = _acts(folder, os.getpid())
            done = {act: _try(acts[act], folder / "own", confined) for act in (*ACTS, *NEEDS)}
        finally:
            if before is None:
                del os.environ[_MARK]
    return {act: done[act] == ("denied" if act in ACTS else "done") for act in done}


def _try(act: Callable[[], None], own: Path, confined: bool) -> str:
    """``denied``, ``done``, or what else came of an act in a child of its own."""
    incoming, outgoing = os.pipe()
    child = os.fork()
    if child:
        os.close(outgoing)
        with os.fdopen(incoming, "rb") as stream:
            said = stream.read().decode()
        os.waitpid(child, 0)
        # A program that took the child's place closed the pipe and says nothing.
        return said or "done"
    verdict = "did not run"
    try:
        if confined:
            directory = os.open(own, os.O_RDONLY | os.O_DIRECTORY)
            confine([directory], Limits(cpu_s=5, file_bytes=None))
            os.close(directory)
        try:
            act()
            verdict = "done"
        except OSError as error:
            verdict = "denied" if error.errno in REFUSALS else f"failed: {error}"
        except _Denied:
            verdict = "denied"
        except RuntimeError as error:
            verdict = f"failed: {error}"
    except SandboxError as error:
        verdict = f"not confined: {error}"
    finally:
        # Nothing of the parent's may run here: no handlers, no buffers.
        os.write(outgoing, verdict.encode())
        os._exit(0)


class _Denied(Exception):
    """There was nothing to find."""


def _acts(folder: Path, parent: int) -> dict[str, Callable[[], None]]:
    x86 = os.uname().machine == "x86_64"
    library = ctypes.CDLL(None, use_errno=True)

    def checked(number: int, *arguments: Any) -> int:
        ctypes.set_errno(0)
        wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
        result: int = library.syscall(ctypes.c_long(number), *wide)
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    def read_outside() -> None:
        Path(os.__file__).read_bytes()

    def write() -> None:
        (folder / "own" / "planted").write_bytes(b"")

    def open_socket() -> None:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()

    def execute() -> None:
        os.execv(sys.executable, [sys.executable, "-S", "-E", "-c", ""])  # noqa: S606  # what is to be denied

    def trace() -> None:
        checked(101 if x86 else 117, 0, 0, None, None)  # PTRACE_TRACEME

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    def mount() -> None:
        # In a namespace of its own, so that it works without privileges and nobody else sees it.
        with contextlib.suppress(OSError):
            checked(272 if x86 else 97, 0x10000000 | 0x00020000)
        checked(165 if x86 else 40, b"none", os.fsencode(folder / "other"), b"tmpfs", 0, None)

    def load_bpf() -> None:
        attributes = (ctypes.c_uint32 * 32)(2, 4, 4, 1)  # an array map of one number
        os.close(checked(321 if x86 else 280, 0, ctypes.byref(attributes), ctypes.sizeof(attributes)))

    def set_up_ring() -> None:
        parameters = (ctypes.c_uint32 * 30)()
        os.close(checked(425, 1, ctypes.byref(parameters)))

    def signal_parent() -> None:
        os.kill(parent, signal.SIGURG)  # which nobody minds

    def open_other() -> None:
        (folder / "other" / "model.onnx").read_bytes()

    def find_secret() -> None:
        get = ctypes.CDLL(None).getenv
        get.restype = ctypes.c_char_p
        found = os.environ.get(_MARK) or get(_MARK.encode())
        for place in ("self", str(parent)):
            with contextlib.suppress(OSError):
                found = found or (_MARK.encode() in Path(f"/proc/{place}/environ").read_bytes())
        if not found:
            raise _Denied

    def read_own() -> None:
        if (folder / "own" / "model.onnx").read_bytes() != b"weights":
            raise RuntimeError("read something else")

    def start_thread() -> None:
        ran = threading.Event()
        thread = threading.Thread(target=ran.set)
        thread.start()
        thread.join(5)
        if not ran.is_set():
            raise RuntimeError("the thread did not run")

    def share_memory() -> None:
        fd = os.memfd_create("inferway-self-test")
        os.ftruncate(fd, MIB)
        with mmap.mmap(fd, MIB) as memory:
            memory[:4] = b"here"
        os.close(fd)

    acts = (
        read_outside, write, open_socket, execute, trace, fork, mount, load_bpf, set_up_ring, signal_parent, open_other,
        find_secret, read_own, start_thread, share_memory,
    )  # fmt: skip
    return dict(zip((*ACTS, *NEEDS), acts, strict=True))


if __name__ == "__main__":
    outcome = self_test(confined="--unconfined" not in sys.argv[1:])
    print(json.dumps(outcome))
    sys.exit(0 if all(outcome.values()) else 1)
