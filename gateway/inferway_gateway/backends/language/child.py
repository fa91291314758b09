"""An engine in a process of its own, locked in like every worker before it looks at its model."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ...core.errors import GatewayError
from ...core.model_config import GenerationOptions
from ..worker.sandbox import Limits, SandboxError, confine, probe
from . import frames
from .engine import Engine
from .opening import open_engine
from .orders import Report, read_order, write_report
from .package import read_package

_OPEN_FILES: Final = 256


def speak(control: socket.socket, fds: Sequence[int]) -> int:
    """Serve until the gateway closes the stream; gives the exit code.

    Args:
        control: the socket that every worker has; nothing more comes over it.
        fds: the stream of frames, and the folder of the model.
    """
    with socket.socket(fileno=fds[0]) as stream:
        order = frames.receive(stream)
        if order is None:
            return 0
        try:
            engine, answer = _open(control, stream, fds, json.loads(order))
        except GatewayError as error:
            stream.sendall(frames.pack(json.dumps({"error": error.message}).encode()))
            return 0
        except SandboxError as error:
            said = f"the sandbox could not be put on: {error}"
            stream.sendall(frames.pack(json.dumps({"error": said}).encode()))
            return 0
        stream.sendall(frames.pack(json.dumps(answer).encode()))
        engine.start()
        while (frame := frames.receive(stream)) is not None:
            if frame[:1] == frames.ORDER:
                engine.submit(read_order(frame[1:]))
            elif frame[:1] == frames.CANCEL:
                engine.cancel(frames.NUMBER.unpack(frame[1:])[0])
    return 0


def _open(
    control: socket.socket, stream: socket.socket, fds: Sequence[int], order: dict[str, Any]
) -> tuple[Engine, dict[str, Any]]:
    with contextlib.suppress(ImportError):  # once locked in, nothing can be imported
        importlib.import_module("llguidance.numpy")
    layers: tuple[str, ...] = ()
    missing: dict[str, str] = {}
    address_space = order["address_space_bytes"]
    if order["confine"]:
        limits = Limits(address_space, open_files=_OPEN_FILES)
        held = confine(fds[1:], limits, keep=[control.fileno(), stream.fileno(), *fds])
        layers, missing = held.held, dict(held.missing)
        if "seccomp" in layers and "landlock" in layers and (open_still := probe()):
            raise SandboxError(f"still possible: {', '.join(open_still)}")
    else:
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    def emit(report: Report) -> None:
        try:
            stream.sendall(frames.pack(write_report(report)))
        except OSError:
            os._exit(0)  # the gateway is gone

    options = GenerationOptions(**order["options"])
    package = read_package(Path(f"/proc/self/fd/{fds[1]}"), options)
    opened = open_engine(package, options, order["threads"], emit, on_defect=lambda: os._exit(70))
    answer = {"context_length": opened.engine.context_length, "layers": layers, "missing": missing}
    return opened.engine, answer
