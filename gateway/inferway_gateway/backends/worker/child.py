"""The worker: a process that locks itself in, opens one model and runs it on one thread for each lane.

It is forked with nothing but a socket to the gateway. The main thread reads that socket: it opens the model, starts
lanes, ends runs early, and ends the process when the gateway closes it. A lane's thread waits in one system call for
the next run, so a run costs no hop inside the process.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.random  # numpy imports it when it is first used, which is too late once files are out of reach
from numpy.typing import NDArray

from ...core.backend import Artifact, RunHandle
from ...core.errors import DeadlineExceededError, GatewayError, ModelLoadError, RunTooLargeError
from ...core.model_config import ModelConfig, WarmupInput
from ...core.tensors import DTYPES
from ..language.child import speak
from ..onnx import extensions
from ..onnx.backend import OnnxBackend, prepare_process
from ..onnx.session import Choice, OnnxSession
from . import messages
from .arena import Arena, aligned
from .description import Decided, Order, Report, read_order, write_report
from .messages import Placed
from .sandbox import Limits, SandboxError, confine, probe
from .strings import pack_strings, unpack_strings

_PLANS: Final = 64
"""Messages whose parse is remembered, per lane."""
_OPEN_FILES: Final = 1024


def prepare() -> None:
    """What every worker needs and the fork server does once, besides importing this module."""
    logging.raiseExceptions = False
    logging.getLogger().addHandler(logging.NullHandler())  # a worker has nowhere to write to
    numpy.random.default_rng(0).random()
    prepare_process()


class Worker:
    """One worker process, from its fork to its end.

    Args:
        control: the gateway's socket for everything but runs.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._session: OnnxSession | None = None
        self._backend: OnnxBackend | None = None
        self._lanes: dict[int, LaneServer] = {}
        self._declared_rows: int | None = None
        self._hooks = False

    def serve(self) -> int:
        """Do what the gateway says until it closes the socket; returns the exit code."""
        while True:
            message, fds = messages.receive(self._control)
            if not message:
                return 0
            kind = message[0]
            if kind == messages.SPEAK:
                return speak(self._control, fds)
            if kind == messages.LOAD:
                self._load(messages.NUMBER_MESSAGE.unpack(message)[1], fds)
            elif kind == messages.LANE:
                assert self._session is not None
                number = messages.NUMBER_MESSAGE.unpack(message)[1]
                lane = LaneServer(self._session, socket.socket(fileno=fds[0]), self._hooks)
                self._lanes[number] = lane
                threading.Thread(target=lane.serve, name=f"lane-{number}", daemon=True).start()
            elif kind == messages.TERMINATE:
                _, number, run = messages.TERMINATE_MESSAGE.unpack(message)
                if number in self._lanes:
                    self._lanes[number].terminate(run)
            elif kind == messages.WARM:
                assert self._backend is not None
                assert self._session is not None
                rows = self._backend.run_largest(self._session, self._declared_rows)
                self._control.send(messages.NUMBER_MESSAGE.pack(messages.WARMED, rows))

    def _load(self, size: int, fds: list[int]) -> None:
        paper = Arena.attach(fds[0])
        order = read_order(paper.memory[:size].tobytes())
        try:
            report = self._open(order, fds[1:])
        except ModelLoadError as error:
            self._control.send(messages.pack_error(messages.MODEL_FAILED, error.message))
            return
        except SandboxError as error:
            self._control.send(messages.pack_error(messages.DEFECT, f"the sandbox could not be put on: {error}"))
            return
        raw = write_report(report)
        if len(raw) > paper.size:
            text = f"its signature takes {len(raw)} bytes, at most {paper.size} are read"
            self._control.send(messages.pack_error(messages.MODEL_FAILED, text))
            return
        paper.memory[: len(raw)] = np.frombuffer(raw, np.uint8)
        self._control.send(messages.NUMBER_MESSAGE.pack(messages.LOADED, len(raw)))

    def _open(self, order: Order, fds: list[int]) -> Report:
        layers: tuple[str, ...] = ()
        missing: dict[str, str] = {}
        if order.config.session.extensions:
            extensions.load()
        limits = Limits(order.address_space_bytes, open_files=_OPEN_FILES)
        if order.confine:
            held = confine(fds, limits, keep=[self._control.fileno(), *fds])
            layers, missing = held.held, dict(held.missing)
            if "seccomp" in layers and "landlock" in layers and (open_still := probe()):
                raise SandboxError(f"still possible: {', '.join(open_still)}")
        elif order.address_space_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (order.address_space_bytes, order.address_space_bytes))
        self._hooks = order.test_hooks
        self._declared_rows = order.config.max_batch_size or None
        path = Path(f"/proc/self/fd/{fds[0]}") / order.file if order.file else Path(f"/proc/self/fd/{fds[0]}")
        config = _with_files(order.config, dict(zip(order.files, fds[1:], strict=True)))
        artifact = Artifact(order.name, order.version, path, config)
        options = order.backend
        self._backend = OnnxBackend(
            options.providers,
            options.cpus,
            inline_threshold_s=options.inline_threshold_s,
            trial_budget_s=options.trial_budget_s,
            measure_budget_s=options.measure_budget_s,
            run_limit_s=options.run_limit_s,
            trial_max_bytes=options.trial_max_bytes,
        )
        decided = order.decided
        if decided is None:
            session = self._backend.open(artifact)
        else:
            choice = Choice(decided.intra_op_threads, decided.disabled_optimizers)
            session = self._backend.reopen(artifact, choice, batched=decided.batched, max_rows=decided.max_rows)
        self._session = session
        choice, signature = session.choice, session.signature
        return Report(
            signature,
            session.profile,
            Decided(choice.intra_op_threads, choice.disabled_optimizers, signature.batched, signature.max_rows),
            layers,
            missing,
        )


def _with_files(config: ModelConfig, files: dict[str, int]) -> ModelConfig:
    """The configuration with the descriptors that were handed over in the place of paths that cannot be opened."""

    def found(given: WarmupInput) -> WarmupInput:
        return replace(given, file=f"/proc/self/fd/{files[given.file]}") if given.file in files else given

    warmup = tuple(replace(w, inputs=tuple(found(given) for given in w.inputs)) for w in config.warmup)
    return replace(config, warmup=warmup)


class LaneServer:
    """Runs what comes over one lane, one at a time, on its own thread."""

    def __init__(self, session: OnnxSession, sock: socket.socket, hooks: bool) -> None:
        self._session = session
        self._socket = sock
        self._inputs: Arena | None = None
        self._outputs: Arena | None = None
        self._specs = session.signature.inputs
        self._names = session.signature.output_names
        self._packet = messages.packet_bytes(max(len(self._specs), len(self._names), 16))
        self._plans: dict[bytes, _Plan] = {}
        self._layouts: dict[Any, tuple[list[NDArray[Any]], bytes]] = {}
        self._lock = threading.Lock()
        self._runs = 0
        self._ended_early = 0
        """The run that was last asked to end: the word may come before its run, over another socket."""
        self._handle: RunHandle | None = None
        self._hooks = hooks

    def terminate(self, run: int) -> None:
        """End that run if it goes on. From the main thread."""
        with self._lock:
            self._ended_early = run
            handle = self._handle if self._runs == run else None
        if handle is not None:
            handle.terminate()

    def serve(self) -> None:
        while True:
            message, fds = messages.receive(self._socket, self._packet)
            if not message:
                return
            kind = message[0]
            if kind == messages.RUN:
                self._socket.send(self._run(message))
            elif kind == messages.INPUTS:
                self._plans.clear()
                self._inputs = Arena.attach(fds[0])
            elif kind == messages.OUTPUTS:
                self._layouts.clear()
                self._outputs = Arena.attach(fds[0])

    def _run(self, message: bytes) -> bytes:
        handle = RunHandle()
        with self._lock:
            self._runs += 1
            self._handle = handle
            handle.terminated = self._ended_early == self._runs
        try:
            inputs, strings, names = self._plans.get(message) or self._parse(message)
            if strings:
                inputs = inputs | {name: unpack_strings(raw.tobytes(), shape) for name, raw, shape in strings}
            if self._hooks:
                _obey(inputs)
            arrays = self._session.run(inputs, names, handle)
            return self._answer(arrays)
        except DeadlineExceededError:
            return messages.pack_error(messages.TERMINATED, "")
        except RunTooLargeError as error:
            return messages.pack_error(messages.TOO_LARGE, error.message)
        except GatewayError as error:
            return messages.pack_error(messages.MODEL_FAILED, error.message)
        except MemoryError:
            return messages.pack_error(messages.TOO_LARGE, "there is not enough memory for this request")
        except Exception as error:
            return messages.pack_error(messages.DEFECT, type(error).__name__)
        finally:
            with self._lock:
                self._handle = None

    def _parse(self, message: bytes) -> _Plan:
        placed, wanted = messages.unpack_run(message)
        inputs: dict[str, NDArray[Any]] = {}
        strings: list[tuple[str, NDArray[np.uint8], tuple[int, ...]]] = []
        arena = self._inputs
        assert arena is not None
        for one in placed:
            spec = self._specs[one.index]
            if spec.datatype == "BYTES":
                strings.append((spec.name, arena.memory[one.offset : one.offset + one.nbytes], one.shape))
            else:
                inputs[spec.name] = arena.view(one.offset, DTYPES[spec.datatype], one.shape)
        plan = inputs, strings, tuple(self._names[index] for index in wanted)
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        self._plans[message] = plan
        return plan

    def _answer(self, arrays: list[NDArray[Any]]) -> bytes:
        """Copy the outputs into the arena and say where they are."""
        shapes = tuple(array.shape for array in arrays)
        if any(array.dtype == object for array in arrays):
            arrays = [np.frombuffer(pack_strings(a), np.uint8) if a.dtype == object else a for a in arrays]
            views, answer = self._layout(arrays, shapes)
        else:
            # The outputs' types are the signature's, but which outputs were asked for may change.
            key = shapes, tuple(array.dtype for array in arrays)
            found = self._layouts.get(key)
            if found is None:
                if len(self._layouts) >= _PLANS:
                    self._layouts.clear()
                found = self._layout(arrays, shapes)
                self._layouts[key] = found
            views, answer = found
        for view, array in zip(views, arrays, strict=True):
            np.copyto(view, array)
        return answer

    def _layout(
        self, arrays: Sequence[NDArray[Any]], shapes: Sequence[tuple[int, ...]]
    ) -> tuple[list[NDArray[Any]], bytes]:
        placed = []
        at = 0
        for index, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
            placed.append(Placed(index, at, array.nbytes, shape))
            at = aligned(at + array.nbytes)
        if self._outputs is None or at > self._outputs.size:
            self._grow(at)
        arena = self._outputs
        assert arena is not None
        views = [arena.view(one.offset, a.dtype, a.shape) for one, a in zip(placed, arrays, strict=True)]
        return views, messages.pack_done(placed)

    def _grow(self, size: int) -> None:
        """Ask for a larger arena. Only the gateway makes them, so it decides how much an answer may take."""
        self._socket.send(messages.NUMBER_MESSAGE.pack(messages.NEED, size))
        message, fds = messages.receive(self._socket, self._packet)
        if not message:
            os._exit(0)
        if message[0] != messages.OUTPUTS:
            raise RunTooLargeError(messages.clean_text(message[1:]))
        self._layouts.clear()
        self._outputs = None
        self._outputs = Arena.attach(fds[0])


_Plan = tuple[dict[str, NDArray[Any]], list[tuple[str, NDArray[np.uint8], tuple[int, ...]]], tuple[str, ...]]
"""Inputs that lie in the arena as they are, strings by name, bytes and shape, and the outputs' names."""


CRASH_VALUE: Final = 1.2345678e35
"""The first element of an FP32 input that has a worker with test hooks end itself with SIGSEGV."""


def _obey(inputs: dict[str, NDArray[Any]]) -> None:
    for array in inputs.values():
        if array.dtype == np.float32 and array.size and bool((array == np.float32(CRASH_VALUE)).any()):
            ctypes.string_at(0)
