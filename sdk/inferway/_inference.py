"""An inference on the wire: a call from prepared arrays, a result from the answer.

The JSON part of a request is padded with spaces to a multiple of 16 bytes, so that the tensors after it are aligned in
the receiver's buffer and need no copy to be used. JSON allows blanks at its end.

Source: Open Inference Protocol v2, "Inference Request JSON Object"; Triton's binary tensor data extension.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias, cast

import numpy as np

from ._core import Call, HeaderMap, Reply, load_json
from ._errors import InvalidInputError, MalformedAnswer
from ._inputs import Prepared
from ._signature import ModelMetadata
from ._tensors import Array, Layout, frames, json_data, layout_of, quoted_names, read_outputs, shape_text

Outputs: TypeAlias = "Sequence[str] | Mapping[str, Mapping[str, Any]] | None"
"""Names of the outputs that are wanted, or a mapping of name to the protocol's parameters for it, such as
``{"scores": {"classification": 3}}``; None for all."""

Reader: TypeAlias = Callable[[Reply], "InferenceResult"]

JOIN_BELOW_BYTES: Final = 256 * 1024
"""Shorter bodies are joined, longer ones sent piece by piece: two writes cost more than copying this much."""

_KEEP_HEADS: Final = 256
_KEEP_BYTES: Final = 2048
"""JSON parts are remembered, up to so many and of such a length: a program sends the same shapes again and again, and
the JSON part of an answer is the same to the byte each time, so that a look-up replaces decoding and checking it (9 µs
of 13 for a small model, November 2026)."""


class Head(NamedTuple):
    """The JSON part of an answer, checked."""

    model_name: str
    model_version: str | None
    id: str | None
    parameters: Mapping[str, Any]
    layout: Layout


_heads: Final[dict[bytes, Head]] = {}
"""JSON part of an answer to what it says; only where every output is binary."""


class InferenceResult(Mapping[str, Array]):
    """What a model answered: output name to numpy array, and what is known of the call.

    Arrays are writable. They share the memory of the answer: keeping one of them keeps all, ``copy()`` does not.
    ``FP16`` comes as ``float16``, ``BF16`` as ``float32`` (exact), ``BYTES`` as an object array of ``str``.

    A result of a model with one output can stand for it: ``numpy.asarray(result)``.

    Attributes:
        outputs: output name to array, in the model's order.
    """

    __slots__ = ("_head", "_reply", "outputs")

    outputs: dict[str, Array]

    def __init__(self, head: Head, outputs: dict[str, Array], reply: Reply) -> None:
        self.outputs = outputs
        self._head = head
        self._reply = reply

    @property
    def datatypes(self) -> dict[str, str]:
        """Output name to wire datatype."""
        return {slot.name: slot.datatype for slot in self._head.layout.slots}

    @property
    def model_name(self) -> str:
        """What answered."""
        return self._head.model_name

    @property
    def model_version(self) -> str | None:
        """The version that answered, as text; None for a server without versions."""
        return self._head.model_version

    @property
    def id(self) -> str | None:
        """The ``id`` that the request had."""
        return self._head.id

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Parameters of the answer."""
        return self._head.parameters

    @property
    def request_id(self) -> str | None:
        """The id under which the gateway's log knows the request."""
        return self._reply.request_id

    @property
    def attempts(self) -> int:
        """How often the call was sent."""
        return self._reply.attempts

    @property
    def elapsed(self) -> float:
        """Seconds from the call to the result, retries included."""
        return self._reply.elapsed

    def __getitem__(self, name: str) -> Array:
        try:
            return self.outputs[name]
        except KeyError:
            raise KeyError(f"no output '{name}', there is {quoted_names(self.outputs)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    # Comparing arrays gives arrays, so a mapping's equality has no meaning here.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @property
    def output(self) -> Array:
        """The one output of a model that has one.

        Raises:
            ValueError: there are several; choose one by its name.
        """
        if len(self.outputs) != 1:
            raise ValueError(f"the result has {len(self.outputs)} outputs, choose one: {quoted_names(self.outputs)}")
        return next(iter(self.outputs.values()))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.output, dtype=dtype, copy=copy)

    @property
    def headers(self) -> HeaderMap:
        """Headers of the answer."""
        return self._reply.headers

    @property
    def timing(self) -> dict[str, float]:
        """Stage of the gateway's work to its milliseconds: parse, queue, assemble, run, serialise (``Server-Timing``).

        Empty for a server that does not tell. Source: W3C, "Server Timing".
        """
        return server_timing(self.headers.get("server-timing", ""))

    def __repr__(self) -> str:
        datatypes = self.datatypes
        shown = ", ".join(
            f"{name}: {datatypes[name]} {shape_text(array.shape)}" for name, array in self.outputs.items()
        )
        version = f" version {self.model_version}" if self.model_version else ""
        return f"<InferenceResult of {self.model_name}{version}: {shown}>"

    def _repr_html_(self) -> str:
        datatypes = self.datatypes
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{datatypes[name]}</td><td>{shape_text(array.shape)}</td>"
            f"<td><code>{html.escape(_preview(array))}</code></td></tr>"
            for name, array in self.outputs.items()
        )
        timing = ", ".join(f"{html.escape(stage)} {ms:.3g} ms" for stage, ms in self.timing.items())
        version = f" version {html.escape(self.model_version)}" if self.model_version else ""
        return (
            f"<table><caption>{html.escape(self.model_name)}{version}, {self.elapsed * 1000:.3g} ms"
            f"{f' ({timing})' if timing else ''}</caption>"
            f"<tr><th>output</th><th>datatype</th><th>shape</th><th>values</th></tr>{rows}</table>"
        )


def _preview(array: Array) -> str:
    return np.array2string(array, threshold=6, edgeitems=2, precision=4, separator=", ").replace("\n", "")[:200]


def server_timing(header: str) -> dict[str, float]:
    """Metric name to duration in milliseconds; metrics without a readable ``dur`` are left out."""
    found: dict[str, float] = {}
    for metric in header.split(","):
        name, *parameters = (part.strip() for part in metric.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip().lower() == "dur":
                try:
                    found[name] = float(value.strip().strip('"'))
                except ValueError:
                    continue
    return found


def known_call(path: str, model: ModelMetadata, inputs: object) -> Call[InferenceResult] | None:
    """The call for arrays of the same names, dtypes and shapes as those of an earlier `infer_call` without options.

    Those have been held against the signature already, and their JSON part has been written. None for anything else.
    """
    if type(inputs) is not dict:
        return None
    arrays = cast(dict[object, object], inputs)
    key: list[object] = []
    for name, value in arrays.items():
        if type(value) is not np.ndarray or not value.flags.c_contiguous:
            return None
        key += (name, value.dtype, value.shape)
    known = model.heads.get(tuple(key))
    if known is None:
        return None
    head, headers = known
    return Call("POST", path, read_result, b"".join([head, *cast(Any, arrays.values())]), headers)


def infer_call(
    path: str,
    model: ModelMetadata,
    prepared: Prepared,
    *,
    outputs: Outputs,
    id: str | None,
    parameters: Mapping[str, Any] | None,
    priority: int | None,
    binary: bool,
) -> Call[InferenceResult]:
    """The call for one inference.

    Args:
        path: of the model's ``infer`` operation.
        model: its metadata, to check the names of outputs.
        prepared: the inputs as `_inputs.fit` gives them.
        outputs, id, parameters, priority, binary: see ``Inferway.infer``.
    Raises:
        InvalidInputError: an output is unknown, a parameter has no JSON form, or a tensor has none and must have one.
    """
    if not binary:
        return _json_call(path, model, prepared, outputs, id, parameters, priority)
    usual = outputs is None and id is None and parameters is None and priority is None
    heads: list[str] = []
    data: list[Any] = []
    size = 0
    for spec, array in prepared:
        if spec.datatype == "BYTES":
            # The length of text is not in its shape.
            usual = False
            framed = frames(array)
            count = len(framed)
            data.append(framed)
        else:
            count = array.nbytes
            data.append(array)
        size += count
        heads.append(f'{spec.lead}{list(array.shape)},"parameters":{{"binary_data_size":{count}}}}}')
    tail, read = _tail(model, outputs, id, parameters, priority, True)
    head = f'{{"inputs":[{",".join(heads)}]{tail}'.encode()
    head = head.ljust(-(-len(head) // 16) * 16)
    headers = (
        ("Content-Type", "application/octet-stream"),
        ("Inference-Header-Content-Length", str(len(head))),
        ("Content-Length", str(len(head) + size)),
    )
    if usual and size < JOIN_BELOW_BYTES and len(head) <= _KEEP_BYTES:
        key: list[object] = []
        for spec, array in prepared:
            key += (spec.name, array.dtype, array.shape)
        _keep(model.heads, tuple(key), (head, headers))
    if size < JOIN_BELOW_BYTES:
        return Call("POST", path, read, b"".join([head, *data]), headers)
    return Call("POST", path, read, (head, *[_bytes_of(piece) for piece in data]), headers)


def _json_call(
    path: str,
    model: ModelMetadata,
    prepared: Prepared,
    outputs: Outputs,
    id: str | None,
    parameters: Mapping[str, Any] | None,
    priority: int | None,
) -> Call[InferenceResult]:
    heads = [
        f'{spec.lead}{list(array.shape)},"data":{json_data(array, spec.datatype, spec.name)}}}'
        for spec, array in prepared
    ]
    tail, read = _tail(model, outputs, id, parameters, priority, False)
    body = f'{{"inputs":[{",".join(heads)}]{tail}'.encode()
    headers = (("Content-Type", "application/json"), ("Content-Length", str(len(body))))
    return Call("POST", path, read, body if len(body) < JOIN_BELOW_BYTES else (body,), headers)


def _keep(cache: dict[Any, Any], key: object, value: object) -> None:
    if len(cache) >= _KEEP_HEADS:
        cache.clear()
    cache[key] = value


def _bytes_of(piece: Array | bytes) -> bytes | memoryview:
    """A view of an array's memory as bytes; ``memoryview.cast`` would refuse arrays without elements."""
    return piece if isinstance(piece, bytes) else memoryview(cast(Any, piece.reshape(-1).view(np.uint8)))


def _tail(
    model: ModelMetadata,
    outputs: Outputs,
    id: str | None,
    parameters: Mapping[str, Any] | None,
    priority: int | None,
    binary: bool,
) -> tuple[str, Reader]:
    """What follows the inputs, and what reads the answer."""
    members: dict[str, Any] = {}
    given = dict(parameters or {})
    if priority is not None:
        given["priority"] = priority
    read: Reader = read_result
    if outputs is None:
        if binary:
            given.setdefault("binary_data_output", True)
    else:
        if isinstance(outputs, str):
            raise InvalidInputError(f"outputs expects a list of names, got the text {outputs!r:.80}")
        known = [spec.name for spec in model.outputs]
        listed: list[dict[str, Any]] = []
        for name in outputs:
            if known and name not in known:
                raise InvalidInputError(f"'{name}' is no output of {model.name}, expected {quoted_names(known)}")
            more = dict(outputs[name]) if isinstance(outputs, Mapping) else {}
            # A listed output is JSON unless it says otherwise, whatever the request's parameters say.
            listed.append({"name": name, "parameters": {"binary_data": binary, **more}})
        wanted = tuple(outputs)
        members["outputs"] = listed

        def read_wanted(reply: Reply) -> InferenceResult:
            return read_result(reply, wanted)

        read = read_wanted

    if given:
        members["parameters"] = given
    if id is not None:
        members["id"] = id
    if not members:
        return "}", read
    try:
        return "," + json.dumps(members, separators=(",", ":"))[1:], read
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"parameters expects text, numbers and booleans: {error}") from error


def read_result(reply: Reply, wanted: tuple[str, ...] = ()) -> InferenceResult:
    """An answer to an inference.

    Raises:
        MalformedAnswer: it does not follow the protocol, or lacks an output that was asked for.
    """
    body = reply.body
    announced = reply.header(b"inference-header-content-length")
    if announced is None:
        start = len(body)
        head = _head(load_json(body))
    else:
        if not announced.isdigit() or len(announced) > 18 or int(announced) > len(body):
            raise MalformedAnswer(f"the JSON part is announced as {announced[:40]!r} of {len(body)} bytes")
        start = int(announced)
        if start <= _KEEP_BYTES:
            text = bytes(body[:start])
            known = _heads.get(text)
            if known is None:
                known = _head(load_json(text))
                if known.layout.binary:
                    _keep(_heads, text, known)
            head = known
        else:
            head = _head(load_json(memoryview(body)[:start]))
    outputs = read_outputs(head.layout, body, start)
    for name in wanted:
        if name not in outputs:
            raise MalformedAnswer(f"output '{name}' was asked for and is not there")
    return InferenceResult(head, outputs, reply)


def _head(decoded: object) -> Head:
    if type(decoded) is not dict:
        raise MalformedAnswer(f"expected an inference response as a JSON object, got {type(decoded).__name__}")
    members = cast(dict[str, Any], decoded)
    version, given, parameters = members.get("model_version"), members.get("id"), members.get("parameters")
    return Head(
        model_name=str(members.get("model_name", "")),
        model_version=None if version is None else str(version),
        id=None if given is None else str(given),
        parameters=cast(dict[str, Any], parameters) if isinstance(parameters, dict) else {},
        layout=layout_of(members.get("outputs")),
    )
