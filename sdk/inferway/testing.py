"""A gateway inside the process, for the tests of programs that use the SDK. No server, no port, no waiting.

    from inferway.testing import MockGateway

    gateway = MockGateway()

    @gateway.model("double", inputs={"x": ("FP32", [-1, 2])}, outputs={"y": ("FP32", [-1, 2])})
    def double(inputs):
        return {"y": inputs["x"] * 2}

    with gateway.client() as client:
        assert client.model("double").predict([[1, 2]]).tolist() == [[2, 4]]

It speaks the contract for inference, metadata and health, so that everything between a program and the wire is the real
SDK: checks, casts, binary tensors, errors, retries. `MockGateway.fail` makes the next requests fail the way a gateway's
would, and `MockGateway.calls` tells what was asked.

Models can be deployed to it too. Nothing is loaded: the function that a test has defined for the name answers for every
version, and `MockGateway.deployed` has what was sent. `MockGateway.fail_deployment` makes the next one fail.

Language models and embedding models are functions too:

    @gateway.chat("smol")
    def smol(messages):
        return f"You said: {messages[-1]['content']}"

    assert client.chat.create("Hi", model="smol").text == "You said: Hi"
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar, cast
from urllib.parse import unquote

import httpx
import numpy as np

from inferway_contract import codes
from inferway_contract.names import Step

from ._client import AsyncInferway, Inferway
from ._core import load_json
from ._errors import InvalidInputError, MalformedAnswer
from ._inputs import fit
from ._mock_lifecycle import LifecycleRefusal, MockLifecycle
from ._mock_lifecycle import MockDeployment as MockDeployment
from ._mock_text import ChatFunction, EmbedFunction, MockText, TextRefusal, error_object
from ._onnx import NotOnnx, read_facts
from ._options import Clock
from ._signature import ModelMetadata, TensorSpec
from ._tensors import Array, cast_to, frames, json_data, layout_of, quoted_names, read_outputs

Function: TypeAlias = Callable[[dict[str, Array]], Mapping[str, Any] | Any]
Tensors: TypeAlias = Mapping[str, tuple[str, Sequence[int]]]
F = TypeVar("F", bound=Function)
C = TypeVar("C", bound=ChatFunction)
E = TypeVar("E", bound=EmbedFunction)


@dataclass(frozen=True, slots=True)
class MockCall:
    """One request that reached the mock.

    Attributes:
        method, path, headers: of the HTTP request; header names in lower case.
        model, version: of an inference, else None.
        inputs: an inference's arrays; BF16 as float32, BYTES as ``str``.
        parameters, id: of an inference.
        body: of a request under ``/v1``, decoded.
        status_code: what was answered.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    status_code: int
    model: str | None = None
    version: str | None = None
    inputs: Mapping[str, Array] = field(default_factory=dict[str, Array])
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    id: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class _Model:
    metadata: ModelMetadata
    function: Function | None


@dataclass(frozen=True, slots=True)
class _Failure:
    status_code: int
    code: str
    message: str
    retry_after: str | None
    should_retry: bool | None
    param: str | None = None


class _Refused(Exception):
    """A way out of a handler, never seen outside."""

    def __init__(self, status_code: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code


async def _no_sleep(_: float) -> None:
    return None


def no_wait() -> Clock:
    """A clock whose delays take no time, so that retries in tests do not wait."""
    return Clock(sleep=lambda _: None, sleep_async=_no_sleep)


class MockGateway:
    """A gateway inside the process.

    Attributes:
        calls: every request that reached it, oldest first.
        is_ready: what the ready probe answers.
    """

    def __init__(self, *, api_key: str | None = None) -> None:
        """
        Args:
            api_key: requests without this key are answered 401, as a gateway would; None lets everybody in.
        """
        self.calls: list[MockCall] = []
        self.is_ready = True
        self._api_key = api_key
        self._models: dict[tuple[str, str], _Model] = {}
        self._failures: deque[_Failure | Exception] = deque()
        self._text = MockText()
        self._lifecycle = MockLifecycle(lambda name: [int(version) for known, version in self._models if known == name])

    @property
    def deployed(self) -> list[MockDeployment]:
        """Every version that was deployed, oldest first, with its files."""
        return list(self._lifecycle.deployed)

    def fail_deployment(
        self, *, step: Step = "admitted", code: str = "model_rejected", message: str = "made to fail by a test"
    ) -> None:
        """Let the next deployment fail.

        Args:
            step: at which it fails, such as ``compared``.
            code: of the contract, such as ``golden_mismatch``.
            message: the reason.
        """
        self._lifecycle.failures.append((step, code, message))

    def model(
        self, name: str, *, inputs: Tensors, outputs: Tensors, version: str | int = "1", optional: Sequence[str] = ()
    ) -> Callable[[F], F]:
        """Decorates the function that answers for a model.

        The function gets input name to array, checked against ``inputs``, and gives output name to array, or the array
        of the only output. What it raises is answered as ``model_failed``.

        Args:
            name: the model's name.
            inputs, outputs: tensor name to datatype and shape; -1 is a variable dimension.
            version: a whole number; the highest answers requests without one.
            optional: inputs that a request may leave out.
        """

        def keep(function: F) -> F:
            metadata = ModelMetadata(
                name=name,
                versions=(str(version),),
                platform="mock",
                inputs=tuple(
                    TensorSpec(tensor, datatype, tuple(shape), optional=tensor in optional)
                    for tensor, (datatype, shape) in inputs.items()
                ),
                outputs=tuple(TensorSpec(tensor, kind, tuple(shape)) for tensor, (kind, shape) in outputs.items()),
            )
            self._models[(name, str(version))] = _Model(metadata, function)
            return function

        return keep

    def chat(self, name: str) -> Callable[[C], C]:
        """Decorates the function that answers for a language model, in chats and completions.

        The function gets the messages and gives a text; or its pieces, as a stream sends them; or a message as a
        mapping, which may have ``tool_calls``. What it raises is answered as ``model_failed``: once pieces have come,
        inside the stream.

        Args:
            name: the model's name.
        """

        def keep(function: C) -> C:
            self._text.chats[name] = function
            return function

        return keep

    def embeddings(self, name: str) -> Callable[[E], E]:
        """Decorates the function that answers for an embedding model: a list of texts to ``[n, d]`` numbers.

        Args:
            name: the model's name.
        """

        def keep(function: E) -> E:
            self._text.embedders[name] = function
            return function

        return keep

    def cut_stream(self, *, pieces: int = 1) -> None:
        """Let the next streamed answer break off after so many pieces of its text."""
        self._text.cuts.append(pieces)

    def fail(
        self,
        *,
        code: str = "queue_full",
        status_code: int | None = None,
        message: str = "made to fail by a test",
        retry_after: float | str | None = None,
        should_retry: bool | None = None,
        times: int = 1,
    ) -> None:
        """Answer the next requests with an error, then go on as before.

        Args:
            code: of the contract, such as ``queue_full``; it decides status and whether trying again can help.
            status_code: another status than the code's.
            message: the error's text.
            retry_after: content of ``Retry-After``.
            should_retry: content of ``X-Should-Retry``; None for what the contract says of the code.
            times: how many requests fail.
        """
        known = codes.ERRORS.get(code)
        failure = _Failure(
            status_code=status_code or (known.status if known else 500),
            code=code,
            message=message,
            retry_after=None if retry_after is None else str(retry_after),
            should_retry=known.retryable if should_retry is None and known else should_retry,
        )
        self._failures.extend([failure] * times)

    def disconnect(self, *, times: int = 1) -> None:
        """Break the connection of the next requests before they are answered."""
        self._failures.extend([httpx.RemoteProtocolError("made to fail by a test")] * times)

    def client(self, **arguments: Any) -> Inferway:
        """A synchronous client of this gateway. Its retries do not wait unless it is given a ``clock``.

        Args:
            arguments: of `Inferway`, except ``base_url`` and ``http_client``.
        """
        arguments.setdefault("clock", no_wait())
        arguments.setdefault("api_key", self._api_key)
        return Inferway("https://mock", http_client=httpx.Client(transport=self.transport), **arguments)

    def async_client(self, **arguments: Any) -> AsyncInferway:
        """An asynchronous client of this gateway. Its retries do not wait unless it is given a ``clock``.

        Args:
            arguments: of `AsyncInferway`, except ``base_url`` and ``http_client``.
        """
        arguments.setdefault("clock", no_wait())
        arguments.setdefault("api_key", self._api_key)
        return AsyncInferway("https://mock", http_client=httpx.AsyncClient(transport=self.transport), **arguments)

    @property
    def transport(self) -> httpx.MockTransport:
        """An httpx transport that ends in this gateway, for clients made by hand."""
        return httpx.MockTransport(self._handle)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        seen: dict[str, Any] = {}
        try:
            if self._failures:
                failure = self._failures.popleft()
                if isinstance(failure, Exception):
                    self._remember(request, 0, seen)
                    raise failure
                response = self._failed(request, failure)
            else:
                response = self._answer(request, seen)
        except (_Refused, LifecycleRefusal, TextRefusal) as refused:
            param = refused.param if isinstance(refused, TextRefusal) else None
            failure = _Failure(refused.status_code, refused.code, str(refused), None, False, param)
            response = self._failed(request, failure)
        self._remember(request, response.status_code, seen)
        response.headers["X-Request-Id"] = request.headers.get("x-request-id", "mock")
        return response

    def _remember(self, request: httpx.Request, status_code: int, seen: dict[str, Any]) -> None:
        self.calls.append(MockCall(request.method, request.url.path, dict(request.headers), status_code, **seen))

    def _failed(self, request: httpx.Request, failure: _Failure) -> httpx.Response:
        request_id = request.headers.get("x-request-id", "mock")
        headers = {} if failure.retry_after is None else {"Retry-After": failure.retry_after}
        if failure.should_retry is not None:
            headers["X-Should-Retry"] = "true" if failure.should_retry else "false"
        body: dict[str, Any] = {"error": failure.message, "code": failure.code, "request_id": request_id}
        if request.url.path.startswith("/v1/"):
            body["error"] = error_object(failure.code, failure.message, failure.param)
        return httpx.Response(failure.status_code, json=body, headers=headers)

    def _answer(self, request: httpx.Request, seen: dict[str, Any]) -> httpx.Response:
        segments = [unquote(part) for part in request.url.raw_path.decode("ascii").split("?")[0].strip("/").split("/")]
        if segments[:2] == ["v2", "health"]:
            if segments[2:] == ["live"]:
                return httpx.Response(200, json={"live": True})
            if segments[2:] == ["ready"]:
                return httpx.Response(200 if self.is_ready else 503, json={"live": True, "ready": self.is_ready})
        expected = None if self._api_key is None else f"Bearer {self._api_key}"
        if expected is not None and request.headers.get("authorization") != expected:
            raise _Refused(401, "unauthenticated", "expected a valid API key")
        if segments == ["v2"]:
            return httpx.Response(200, json={"name": "mock", "version": "0", "extensions": ["binary_tensor_data"]})
        if segments[:2] == ["v2", "models"]:
            return self._of_models(request, segments[2:], seen)
        if segments[:1] == ["v1"]:
            content = request.read()
            asked: dict[str, Any] = json.loads(content) if content else {}
            seen.update(body=asked, model=asked.get("model"))
            kind, answer = self._text.answer(request.method, "/".join(segments[1:]), asked)
            return httpx.Response(200, content=answer, headers={"Content-Type": kind})
        if segments[:2] == ["api", "v1"]:
            status, body = self._lifecycle.answer(
                request.method, segments[2:], dict(request.url.params), request.headers, request.read()
            )
            return httpx.Response(status) if body is None else httpx.Response(status, json=body)
        raise _Refused(404, "not_found", f"the mock gateway has no {request.method} {request.url.path}")

    def _of_models(self, request: httpx.Request, segments: list[str], seen: dict[str, Any]) -> httpx.Response:
        if not segments:
            names = {name for name, _ in self._models} | self._lifecycle.names()
            return httpx.Response(200, json={"models": sorted(names)})
        name, _, alias = segments[0].partition("@")
        rest = segments[1:]
        wanted: str | None = None
        if rest[:1] == ["versions"] and len(rest) > 1:
            wanted, rest = rest[1], rest[2:]
        else:
            pointed = self._lifecycle.resolve(name, alias or None)
            wanted = None if pointed is None else str(pointed)
        model = self._found(name, wanted)
        numbers = {int(version) for known, version in self._models if known == name}
        versions = [str(version) for version in sorted(numbers.union(self._lifecycle.versions(name)))]
        if request.method == "GET" and not rest:
            return httpx.Response(200, json=_described(model.metadata, versions))
        if request.method == "GET" and rest == ["ready"]:
            return httpx.Response(200, json={"name": name, "ready": True})
        if request.method == "POST" and rest == ["infer"]:
            seen.update(model=name, version=model.metadata.versions[0])
            return _inferred(model, request, seen)
        raise _Refused(404, "not_found", f"the mock gateway has no {request.method} {request.url.path}")

    def _found(self, name: str, version: str | None) -> _Model:
        versions = {known: model for (owner, known), model in self._models.items() if owner == name}
        deployed = {str(number): number for number in self._lifecycle.versions(name)}
        if not versions and not deployed:
            raise _Refused(404, "model_not_found", f"Request for unknown model: '{name}' is not found")
        wanted = max({*versions, *deployed}, key=int) if version is None else version
        if wanted in versions:
            return versions[wanted]
        if wanted not in deployed:
            raise _Refused(404, "version_not_found", f"'{name}' version {wanted} is not found")
        if versions:
            nearest = versions[max(versions, key=int)]
            return _Model(replace(nearest.metadata, versions=(wanted,)), nearest.function)
        return _Model(_signature(name, wanted, self._lifecycle.model_file(name, deployed[wanted])), None)


def _signature(name: str, version: str, file: bytes | None) -> ModelMetadata:
    """What the file of a deployed version says that it takes; nothing where it cannot be read."""
    known: ModelMetadata | None = None
    with contextlib.suppress(NotOnnx):
        known = None if file is None else read_facts(file).signature
    inputs, outputs = ((), ()) if known is None else (known.inputs, known.outputs)
    return ModelMetadata(name=name, versions=(version,), platform="mock", inputs=inputs, outputs=outputs)


def _described(metadata: ModelMetadata, versions: list[str]) -> dict[str, Any]:
    def tensors(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape), "optional": spec.optional}
            for spec in specs
        ]

    return {
        "name": metadata.name,
        "versions": versions,
        "platform": metadata.platform,
        "inputs": tensors(metadata.inputs),
        "outputs": tensors(metadata.outputs),
        "properties": {},
    }


def _inferred(model: _Model, request: httpx.Request, seen: dict[str, Any]) -> httpx.Response:
    body = request.read()
    announced = request.headers.get("inference-header-content-length")
    start = len(body) if announced is None else int(announced)
    try:
        head = cast(dict[str, Any], load_json(body[:start]))
        # A request's inputs are written as an answer's outputs are.
        layout = layout_of(head.get("inputs"))
        inputs = read_outputs(layout, body, start)
        for slot in layout.slots:
            spec = model.metadata.by_name.get(slot.name)
            if spec is not None and spec.datatype != slot.datatype:
                raise InvalidInputError(f"input '{slot.name}' expects {spec.datatype}, got {slot.datatype}")
        fit(model.metadata, inputs)
    except (MalformedAnswer, InvalidInputError) as error:
        raise _Refused(400, "invalid_tensor", str(error)) from error
    parameters: dict[str, Any] = head.get("parameters") or {}
    seen.update(inputs=inputs, parameters=parameters, id=head.get("id"))
    if model.function is None:
        name = model.metadata.name
        raise _Refused(
            503, "model_not_ready", f"the mock loads no models; define what answers: @gateway.model({name!r}, …)"
        )
    try:
        given = model.function(dict(inputs))
    except Exception as error:
        raise _Refused(500, "model_failed", f"{type(error).__name__}: {error}") from error
    return _encoded(model.metadata, head, given, parameters.get("binary_data_output") is True)


def _asks_binary(output: dict[str, Any]) -> bool:
    parameters: dict[str, Any] = output.get("parameters") or {}
    return parameters.get("binary_data") is True


def _encoded(metadata: ModelMetadata, head: dict[str, Any], given: Any, all_binary: bool) -> httpx.Response:
    specs = {spec.name: spec for spec in metadata.outputs}
    named: dict[str, Any] = (
        dict(cast(Mapping[str, Any], given)) if isinstance(given, Mapping) else {metadata.outputs[0].name: given}
    )
    listed: list[dict[str, Any]] = head.get("outputs") or []
    wanted: dict[str, bool] = {item["name"]: _asks_binary(item) for item in listed}
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, binary in (wanted or dict.fromkeys(named, all_binary)).items():
        if name not in specs or name not in named:
            raise _Refused(
                400, "invalid_tensor", f"unexpected inference output '{name}', expected {quoted_names(specs)}"
            )
        datatype = specs[name].datatype
        try:
            array = cast_to(np.asarray(named[name]), datatype, f"output '{name}'")
        except InvalidInputError as error:
            raise _Refused(500, "model_failed", str(error)) from error
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary or datatype in ("FP16", "BF16"):
            tail.append(frames(array) if datatype == "BYTES" else array.tobytes())
            output["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            output["data"] = json.loads(json_data(array, datatype, name))
        outputs.append(output)
    answer = {"model_name": metadata.name, "model_version": metadata.versions[0], "outputs": outputs}
    if head.get("id") is not None:
        answer["id"] = head["id"]
    text = json.dumps(answer).encode()
    headers = {"Content-Type": "application/octet-stream" if tail else "application/json"}
    if tail:
        headers["Inference-Header-Content-Length"] = str(len(text))
    return httpx.Response(200, content=text + b"".join(tail), headers=headers)
