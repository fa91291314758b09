"""A loaded model version: checked arrays in, arrays out, and every way in which the runtime fails made one of ours."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...core.backend import Profile, RunHandle
from ...core.errors import DeadlineExceededError, ModelExecutionError, RunTooLargeError
from ...core.tensors import DTYPES, Arrays, Signature, TensorSpec
from . import memory
from .sample import Sample
from .signature import Layout

_BFLOAT16: Final = 16
"""TensorProto.DataType.BFLOAT16."""

_SHRINK_FLOOR_BYTES: Final = 1 << 20
"""Inputs of this size are usual for any model: they do not grow the arena by an amount that anyone would miss."""
_SHRINK_RATIO: Final = 4.0
"""How much larger than usual a run's inputs are when its memory is given back after it."""
_USUAL_WEIGHT: Final = 1 / 16


@dataclass(frozen=True, slots=True)
class Choice:
    """How a session is set up; what the trial of a first opening decides."""

    intra_op_threads: int = 1
    disabled_optimizers: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"disabled_optimizers={','.join(self.disabled_optimizers)}"] if self.disabled_optimizers else []
        if self.intra_op_threads != 1:
            parts.append(f"intra_op_threads={self.intra_op_threads}")
        return " ".join(parts) or "default"


class OnnxSession:
    """One ``InferenceSession``, shared by every run of a model version.

    Attributes:
        signature: what callers see.
        profile: what was measured; set once, before the session is handed out.
        choice: how it was set up.
        sample: inputs on which it runs, where some were found; set like the profile.
    """

    sample: Sample | None = None

    def __init__(self, session: Any, name: str, layout: Layout, choice: Choice = Choice()) -> None:
        self.choice = choice
        self._ort = session
        # What ``InferenceSession.run`` adds to the compiled session is a check of the inputs' names, which
        # ``Signature.check`` has done, and of ownership, which concerns OrtValues: 1.5 µs of a run of 5.
        self._run_plain = getattr(session, "_sess", session).run
        self._name = name
        self._reshapes = layout.reshapes
        self._named_row_inputs = layout.row_inputs
        self.settle(layout.signature)
        self.profile = Profile()
        self._bf16_inputs = frozenset(s.name for s in layout.signature.inputs if s.datatype == "BF16")
        self._bf16_outputs = frozenset(s.name for s in layout.signature.outputs if s.datatype == "BF16")
        self._plain = not (self._reshapes or self._bf16_inputs or self._bf16_outputs)
        self._usual_nbytes = 0.0

    def settle(self, signature: Signature) -> None:
        """Set the signature, once it is known whether axis 0 is a batch axis. Before the session is handed out."""
        self.signature = signature
        names = frozenset(spec.name for spec in signature.inputs)
        self._row_inputs = names if signature.batched else self._named_row_inputs

    def run(self, inputs: Arrays, outputs: Sequence[str], handle: RunHandle | None = None) -> list[NDArray[Any]]:
        """Run the model once; see ``core.backend.Session``. Other threads run meanwhile, Python code included."""
        nbytes = 0
        for name, array in inputs.items():
            size = array.nbytes
            nbytes += size
            if not size and name in self._row_inputs and array.shape[0] == 0:
                # The answer is known, and some kernels divide by the number of rows, which ends the process.
                return [self._empty(self.signature.output(wanted), inputs) for wanted in outputs]
        options = None
        if handle is not None or nbytes > _SHRINK_FLOOR_BYTES or self._usual_nbytes > _SHRINK_FLOOR_BYTES:
            options = self._run_options(nbytes, handle)
        try:
            if self._plain:
                found: list[NDArray[Any]] = self._run_plain(outputs, inputs, options)
                return found
            return self._run_mapped(inputs, outputs, options)
        except Exception as error:
            if handle is not None and handle.terminated:
                raise DeadlineExceededError(f"the run of model '{self._name}' was ended before it was done") from None
            text = explain(error)
            if isinstance(error, MemoryError) or _TOO_LARGE.search(text):
                raise RunTooLargeError(
                    f"model '{self._name}' takes more memory for this request than it may have: {text}; ask for less "
                    "at once"
                ) from error
            raise ModelExecutionError(f"model '{self._name}' failed: {text}") from error
        finally:
            if handle is not None:
                handle.bind(None)

    def close(self) -> None:
        """Drop the runtime's session and give its memory back to the system. Idempotent; never during a run."""
        if self._ort is not None:
            self._ort = self._run_plain = None
            memory.trim()

    def _run_options(self, nbytes: int, handle: RunHandle | None) -> Any:
        options = None
        if handle is not None:
            if handle.terminated:
                raise DeadlineExceededError(f"the run of model '{self._name}' was ended before it began")
            # One per run: options that were terminated once stay so.
            options = ort.RunOptions()
            handle.bind(partial(setattr, options, "terminate", True))
        # The arena never shrinks by itself: one batch of 32 for a ResNet-50 kept 185 MB for good. Shrinking costs such
        # a run 4 %, so it is done after unusual ones only. Two threads may lose an update here; it is an estimate.
        usual = self._usual_nbytes
        if nbytes > max(usual, _SHRINK_FLOOR_BYTES) * _SHRINK_RATIO:
            options = options or ort.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._usual_nbytes = usual + (nbytes - usual) * _USUAL_WEIGHT
        return options

    def _run_mapped(self, inputs: Arrays, outputs: Sequence[str], options: Any) -> list[NDArray[Any]]:
        """A run with tensors that the runtime wants in another shape, or cannot take or give as numpy arrays."""
        reshapes = self._reshapes
        feed: dict[str, Any] = {}
        for name, array in inputs.items():
            if name in reshapes:
                array = array.reshape(reshapes[name].to_model(array.shape))
            if name in self._bf16_inputs:
                # The value borrows the array's memory, which ``inputs`` keeps for as long as the run takes.
                bits = array if array.flags.c_contiguous else array.copy()
                feed[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16), bits
            else:
                feed[name] = array
        if self._bf16_outputs.isdisjoint(outputs):
            plain = {name: value[0] if isinstance(value, tuple) else value for name, value in feed.items()}
            found = self._ort.run(outputs, plain, options)
        else:
            found = self._run_bound(feed, outputs, options)
        return [
            array.reshape(reshapes[name].to_wire(array.shape)) if name in reshapes else array
            for name, array in zip(outputs, found, strict=True)
        ]

    def _run_bound(self, feed: dict[str, Any], outputs: Sequence[str], options: Any) -> list[NDArray[Any]]:
        binding = self._ort.io_binding()
        for name, value in feed.items():
            if isinstance(value, tuple):
                binding.bind_ortvalue_input(name, value[0])
            else:
                binding.bind_cpu_input(name, np.asarray(value, order="C"))
        for name in outputs:
            binding.bind_output(name)
        self._ort.run_with_iobinding(binding, options)
        values = zip(outputs, binding.get_outputs(), strict=True)
        return [_bits(value) if name in self._bf16_outputs else value.numpy() for name, value in values]

    def _empty(self, spec: TensorSpec, inputs: Arrays) -> NDArray[Any]:
        """The output of an empty batch: other variable axes have the length of an input's axis of the same name."""
        lengths: dict[str | None, int] = {}
        for name, array in inputs.items():
            lengths.update(zip(self.signature.input(name).axes, array.shape, strict=False))
        lengths.pop(None, None)
        axes = spec.axes or (None,) * len(spec.shape)
        tail = [lengths.get(axis, 0) if dim == -1 else dim for dim, axis in zip(spec.shape, axes, strict=True)]
        return np.empty((0, *tail[1:]), DTYPES[spec.datatype])


def _bits(value: Any) -> NDArray[np.uint16]:
    """The bits of a BF16 value, which numpy has no dtype for. Copied, because the value's memory goes with it."""
    shape = tuple(value.shape())
    count = value.tensor_size_in_bytes() // 2
    if count == 0:
        return np.empty(shape, np.uint16)
    borrowed = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return np.frombuffer(borrowed, np.uint16).copy().reshape(shape)


_TOO_LARGE: Final = re.compile(
    r"failed to allocate memory|bad_?alloc|out of memory|is smaller than requested bytes"
    r"|tensor storage size overflowed|^\w+: integer overflow$",
    re.IGNORECASE,
)
"""What the runtime says where memory is refused, or where a shape has more elements than can be counted. Source:
onnxruntime/core/framework/bfc_arena.cc, tensor.cc and core/common/safeint.h, and its CUDA allocator."""
_STATUS: Final = re.compile(r"^(?:Error in execution: )?(?:\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : )+")
_NODE: Final = re.compile(r"Non-zero status code returned while running (\S+) node\. Name:'[^']*' Status Message: ")
_SOURCE: Final = re.compile(r"\S*/[^\s:]+:\d+ (?:[^()]*\([^()]*\)(?: const)? )?")
_CALL: Final = re.compile(r"\b\w+\.(?:cc|cpp|h|cu):\d+ \w+ ")
_PATH: Final = re.compile(r"(?<![\w.])/(?:[\w.+ -]+/)+[\w.+-]*")
_LOADING: Final = re.compile(r"Load model (?:from )?\S.*? failed[:.] ?")
_MAX_EXPLANATION: Final = 300


def explain(error: BaseException) -> str:
    """What the runtime says, for a caller: one line, without status numbers, source positions or paths."""
    text = " ".join(str(error).split())
    while text != (text := _STATUS.sub("", text)):
        pass
    text = _LOADING.sub("", text)
    text = _NODE.sub(lambda match: f"{match[1]}: ", text)
    text = _STATUS.sub("", _CALL.sub("", _SOURCE.sub("", text))).strip()
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    text = _PATH.sub("…", text) or type(error).__name__
    return text if len(text) <= _MAX_EXPLANATION else text[: _MAX_EXPLANATION - 1] + "…"
