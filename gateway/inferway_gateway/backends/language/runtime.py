"""The model's graph, run a step at a time with its keys and values bound where they lie.

Rules of GroupQueryAttention on the CPU, found by measuring and kept here:

- Past and present bound to the same memory are written in place; the memory may be longer than what is in it.
- ``attention_mask``, padded on the right, gives each row its own length and position.
- More than one token on top of a past goes with one row only, so prompts are read alone.
- A run with no row kills the process.
- One token goes through another kernel than several do, and with int4 weights its results differ in more than the last
  bits. So a prompt is never read in a piece of one token, and a known prefix leaves at least two to read.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...core.errors import DeadlineExceededError, ModelExecutionError, ModelLoadError
from ..onnx.admission import AdmissionReport
from ..onnx.backend import prepare_process
from .branches import first_table_length
from .kv import Array, KvLayout, KvTensor, Slab
from .package import Package

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
_LAST: Final = np.array([-1], np.int64)
_TRIED: Final = 4
"""Tokens of the prompt with which a graph is tried out."""
_TRY_LIMIT_S: Final = 60.0
_FOR_CPU: Final = "build it with onnxruntime-genai's model builder for the CPU (-e cpu, and -p int4, int8 or fp32)"


class Runtime:
    """One session, run by a thread that writes answers and one that reads prompts, at the same time.

    Args:
        report: of the graph's structure, as admission read it.
        threads: inside one run.
    Attributes:
        context_length: tokens that the graph reads right; at most those that the package promises.
    Raises:
        ModelLoadError: the runtime refuses the model, or its graph is none that the engine knows how to run.
    """

    def __init__(self, package: Package, report: AdmissionReport, *, threads: int = 1) -> None:
        if "GroupQueryAttention" not in report.operators:
            raise ModelLoadError(
                "its attention is no GroupQueryAttention, the only one whose keys and values can be kept in place: "
                f"{_FOR_CPU}"
            )
        most = first_table_length(package.model) if "If" in report.operators else package.context_length
        self.context_length: Final = min(package.context_length, most)
        prepare_process()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # A step is hundreds of short pieces: threads that sleep between two of them take a third longer (2 threads on 2
        # cpus: 154 tokens/s, 215 with spinning, at the same processor time a token). Between two runs they sleep.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 4
        try:
            self._session = ort.InferenceSession(
                str(package.model), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            hint = f": {_FOR_CPU}" if "NOT_IMPLEMENTED" in str(error) else ""
            raise ModelLoadError(_said(error) + hint) from None
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        optional = {value.name: value for value in self._session.get_overridable_initializers()}
        self.layout: Final = _find_layout(package, inputs, outputs)
        names, said = package.inputs, package.outputs
        self._ids, self._mask = names["input_ids"], names["attention_mask"]
        self._logits = said["logits"]
        self._positions = names.get("position_ids", "position_ids")
        if self._positions not in inputs:
            self._positions = ""
        self._from = "logits_from" if "logits_from" in optional or "logits_from" in inputs else ""
        self._check(package, inputs, outputs)
        self.vocabulary_size: Final = package.vocabulary_size
        self._logits_dtype = _DTYPES[outputs[self._logits].type]
        self.adapters: Final = _read_adapters(package, optional | inputs)
        self._plans: dict[tuple[int, bool], Any] = {}
        self._stacks: dict[tuple[str | None, ...], dict[str, Array]] = {}
        self._try_out()

    def _try_out(self) -> None:
        """Run the graph as prompts are read, in two pieces, and as answers are written, so that what no run can do is
        found before anybody asks for one: the runtime looks at many things in a run only."""
        stop = ort.RunOptions()
        limit = threading.Timer(_TRY_LIMIT_S, setattr, (stop, "terminate", True))  # a graph may be a loop without end
        limit.daemon = True
        limit.start()
        try:
            arrays = [np.zeros_like(array) for array in self.layout.allocate(_TRIED)]
            tokens = np.zeros(_TRIED, np.int64)
            self.read(arrays, tokens[:2], 0, None, stop)
            row = self.read(arrays, tokens[2:], 2, None, stop)
            slab = Slab(self.layout, 2, _TRIED + 1)
            for slot in range(2):
                slab.put(slot, arrays, _TRIED)
            self.write(slab, tokens[:2], np.full(2, _TRIED), (None, None), stop)
        except DeadlineExceededError:
            raise ModelLoadError(f"its graph cannot be run: {_TRIED} tokens took {_TRY_LIMIT_S:g} s") from None
        except ModelExecutionError as error:
            hint = f" {_FOR_CPU[0].upper()}{_FOR_CPU[1:]}." if "CUDA" in error.message else ""
            raise ModelLoadError(f"its graph cannot be run: {error.message}{hint}") from None
        finally:
            limit.cancel()
            self._plans.clear()
        if row.shape != (self.vocabulary_size,):
            raise ModelLoadError(f"the graph gives {row.size} logits for a token, expected {self.vocabulary_size}")

    def _check(self, package: Package, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        known = {self._ids, self._mask, self._positions, self._from, *(tensor.past for tensor in self.layout.tensors)}
        for name in (self._ids, self._mask):
            if name not in inputs or inputs[name].type != "tensor(int64)":
                raise ModelLoadError(
                    f"the graph has no input '{name}' of int64, as one has that was built with its embedding"
                )
        unknown = sorted(name for name in inputs if name not in known and not name.startswith("lora."))
        if unknown:
            raise ModelLoadError(f"the graph has inputs that the engine does not know: {', '.join(unknown)[:300]}")
        logits = outputs.get(self._logits)
        if logits is None or logits.type not in _DTYPES:
            raise ModelLoadError(
                f"the graph has no output '{self._logits}' of floating point, as one has that was built with its head"
            )
        if len(logits.shape) != 3 or logits.shape[2] != package.vocabulary_size:
            raise ModelLoadError(
                f"the graph's logits have the shape {logits.shape}, expected [batch, tokens, {package.vocabulary_size}]"
            )

    def write(
        self,
        slab: Slab,
        tokens: NDArray[np.int64],
        lengths: NDArray[np.int64],
        adapters: Sequence[str | None],
        stop: Any = None,
    ) -> NDArray[np.float32]:
        """One token more for each of the first ``len(tokens)`` slots.

        Args:
            tokens: the last ones of each answer.
            lengths: what is in each slot already.
            stop: run options, by which another thread ends the run.
        Returns:
            Logits ``(slots, vocabulary)``, the caller's to change.
        Raises:
            ModelExecutionError: the runtime failed.
        """
        rows = len(tokens)
        assert rows > 0, "a run with no row kills the process"
        # A binding cannot forget an input, so runs with adapters have bindings of their own.
        stack = self._stack(tuple(adapters))
        binding = self._plans.get((rows, bool(stack)))
        if binding is None:
            binding = self._plans[rows, bool(stack)] = self._session.io_binding()
            self._bind_cache(binding, [array[:rows] for array in slab.arrays])
        total = lengths + 1
        mask = (np.arange(int(total.max())) < total[:, None]).astype(np.int64)
        ids = np.ascontiguousarray(tokens[:, None])
        logits = np.empty((rows, 1, self.vocabulary_size), self._logits_dtype)
        _bind(binding, self._ids, ids)
        _bind(binding, self._mask, mask)
        if self._positions:
            positions = np.ascontiguousarray(lengths[:, None])
            _bind(binding, self._positions, positions)
        _bind_output(binding, self._logits, logits)
        for name, array in stack.items():
            _bind(binding, name, array)
        try:
            self._session.run_with_iobinding(binding, stop)
        except Exception as error:
            if stop is not None and stop.terminate:
                raise ModelExecutionError("a run of the model took too long and was ended") from None
            raise ModelExecutionError(_said(error)) from None
        found: NDArray[np.float32] = logits[:, 0].astype(np.float32, copy=False)
        return found

    def read(
        self, arrays: Sequence[Array], tokens: NDArray[np.int64], known: int, adapter: str | None, stop: Any
    ) -> NDArray[np.float32]:
        """Read the next piece of a prompt.

        Args:
            arrays: ``(heads, prompt, width)`` each, of which the first ``known`` tokens are there.
            tokens: of the piece: two at least, but for a prompt of one.
            stop: run options, by which another thread ends the run.
        Returns:
            Logits of the last token, ``(vocabulary,)``.
        Raises:
            DeadlineExceededError: the run was ended.
            ModelExecutionError: the runtime failed.
        """
        binding = self._session.io_binding()
        self._bind_cache(binding, [array[None] for array in arrays])
        count = len(tokens)
        ids = np.ascontiguousarray(tokens[None])
        mask = np.ones((1, known + count), np.int64)
        _bind(binding, self._ids, ids)
        _bind(binding, self._mask, mask)
        positions = np.arange(known, known + count, dtype=np.int64)[None]
        if self._positions:
            _bind(binding, self._positions, positions)
        if self._from:
            _bind(binding, self._from, _LAST)
        stack = self._stack((adapter,))
        for name, array in stack.items():
            _bind(binding, name, array)
        binding.bind_output(self._logits, "cpu")
        try:
            self._session.run_with_iobinding(binding, stop)
        except Exception as error:
            if stop.terminate:
                raise DeadlineExceededError("reading the prompt was ended") from None
            raise ModelExecutionError(_said(error)) from None
        logits = binding.get_outputs()[-1]  # in the order in which they were bound
        row: NDArray[np.float32] = logits.numpy()[0, -1].astype(np.float32)
        return row

    def _bind_cache(self, binding: Any, arrays: Sequence[Array]) -> None:
        for tensor, array in zip(self.layout.tensors, arrays, strict=True):
            _bind(binding, tensor.past, array)
            _bind_output(binding, tensor.present, array)

    def _stack(self, names: tuple[str | None, ...]) -> dict[str, Array]:
        """What to bind for rows with these adapters, those without any getting zeros; nothing where none has one."""
        if not any(names):
            return {}
        found = self._stacks.get(names)
        if found is None:
            if len(self._stacks) >= 8:
                self._stacks.clear()
            shapes = next(iter(self.adapters.values()))
            found = self._stacks[names] = {
                part: np.concatenate([self.adapters[name][part] if name else np.zeros_like(shape) for name in names])
                for part, shape in shapes.items()
            }
        return found


def _said(error: Exception) -> str:
    """What the runtime says of its failure, without the words around it."""
    text = str(error).strip().partition("\n")[0]
    return text.rpartition("Status Message: ")[2][:500]


def _bind(binding: Any, name: str, array: Array) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: Array) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _open(axes: Sequence[Any]) -> Sequence[Any]:
    """Those of the axes that have a name, or nothing, in place of a length."""
    return [axis for axis in axes if not isinstance(axis, int)]


def _find_layout(package: Package, inputs: dict[str, Any], outputs: dict[str, Any]) -> KvLayout:
    tensors = []
    types = set()
    for layer in range(package.layers):
        for part in ("key", "value"):
            past = package.inputs[f"past_{part}_names"].replace("%d", str(layer))
            present = package.outputs[f"present_{part}_names"].replace("%d", str(layer))
            if past not in inputs or present not in outputs:
                raise ModelLoadError(
                    f"the graph has no '{past}' that becomes '{present}': all layers of a model have to keep keys and "
                    "values"
                )
            shape = inputs[past].shape
            # The builder leaves the last axis open, as it may be packed; the first run shows what it has to be.
            if (
                len(shape) != 4
                or shape[1] != package.kv_heads
                or shape[3] not in (package.head_size, *_open(shape[3:]))
            ):
                raise ModelLoadError(
                    f"'{past}' has the shape {shape}, expected [batch, {package.kv_heads}, tokens, {package.head_size}]"
                )
            types.add(inputs[past].type)
            tensors.append(KvTensor(past, present, package.kv_heads, package.head_size))
    if len(types) != 1 or not types <= set(_DTYPES):
        raise ModelLoadError(f"keys and values are {', '.join(sorted(types))}, expected float or float16")
    return KvLayout(tuple(tensors), _DTYPES[types.pop()])


def _read_adapters(package: Package, inputs: dict[str, Any]) -> dict[str, dict[str, Array]]:
    """The adapters' arrays, all brought to one rank with zeros, so that any of them go into one batch."""
    found: dict[str, dict[str, Array]] = {}
    for name, path in package.adapters.items():
        try:
            raw = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
            arrays = {part: np.array(value.numpy()) for part, value in raw.items()}
        except Exception as error:
            raise ModelLoadError(f"adapter '{name}': {str(error).strip().partition(chr(10))[0][:300]}") from None
        for part, array in arrays.items():
            if part not in inputs:
                raise ModelLoadError(f"adapter '{name}': the graph has no input '{part}'")
            if array.ndim != 3 or array.shape[0] != 1 or len(inputs[part].shape) != 3:
                raise ModelLoadError(
                    f"adapter '{name}': '{part}' has the shape {list(array.shape)}, expected one row in front, so that "
                    "answers with different adapters go into one batch"
                )
            if array.dtype != np.float32 or max(array.shape[1:]) > 1 << 20:
                raise ModelLoadError(f"adapter '{name}': '{part}' has to be float32")
            for said, size in zip(inputs[part].shape[1:], array.shape[1:], strict=True):
                if isinstance(said, int) and said != size:
                    raise ModelLoadError(f"adapter '{name}': '{part}' does not fit the graph")
        found[name] = arrays
    parts = {part for arrays in found.values() for part in arrays}
    shapes = {
        part: tuple(max(arrays[part].shape[axis] for arrays in found.values() if part in arrays) for axis in range(3))
        for part in parts
    }
    whole: dict[str, dict[str, Array]] = {}
    for name, arrays in found.items():
        whole[name] = {}
        for part, shape in sorted(shapes.items()):
            target = np.zeros(shape, np.float32)
            if part in arrays:
                array = arrays[part]
                target[:, : array.shape[1], : array.shape[2]] = array
            whole[name][part] = target
    return whole
