"""The SDK as its users write it. Never run: mypy and pyright check it, each in its strict mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

from inferway import (
    APIStatusError,
    APITimeoutError,
    AsyncDeployment,
    AsyncInferway,
    AsyncModelHandle,
    AsyncTextStream,
    ChatCompletion,
    ClassifyResult,
    Completion,
    ContentDelta,
    DeployEvent,
    Deployment,
    DeploymentFailedError,
    EmbeddingResult,
    Finish,
    InferenceResult,
    Inferway,
    InferwayError,
    ModelHandle,
    ModelMetadata,
    QueueFullError,
    RawResponse,
    RequestEvent,
    RerankResult,
    RetryEvent,
    RetryPolicy,
    StreamInterruptedError,
    TextStream,
    Timeout,
    ToolCallDelta,
    UsageReport,
)
from inferway.testing import MockDeployment, MockGateway
from inferway_contract.models import (
    Alias,
    CatalogModel,
    Event,
    KeyCreated,
    KeyRecord,
    ModelStat,
    ModelVersion,
    RepositoryIndexEntry,
)


def before(event: RequestEvent) -> dict[str, str]:
    return {"traceparent": event.request_id}


async def waiting(event: RetryEvent) -> None:
    print(event.error, event.delay_s)


def synchronous() -> None:
    with Inferway("http://h", api_key=lambda: "key", timeout=5, retry=RetryPolicy(attempts=2)) as client:
        assert_type(client, Inferway)
        result = client.infer("m", {"x": [1, 2]}, outputs=["y"], timeout=Timeout(total=3), headers={"A": "b"})
        assert_type(result, InferenceResult)
        assert_type(result["y"], NDArray[Any])
        assert_type(result.output, NDArray[Any])
        assert_type(result.timing, dict[str, float])
        for name, array in result.items():
            assert_type(name, str)
            assert_type(array, NDArray[Any])
        handle = client.model("m", version=1)
        assert_type(handle, ModelHandle)
        assert_type(handle(np.zeros(3)), InferenceResult)
        assert_type(handle.predict([1]), NDArray[Any] | dict[str, NDArray[Any]])
        assert_type(handle.signature(), ModelMetadata)
        for one in handle.map([[1], [2]], concurrency=4):
            assert_type(one, InferenceResult)
        for either in handle.map([[1], [2]], on_error="return"):
            assert_type(either, InferenceResult | InferwayError)
        assert_type(client.models.list(), list[str])
        assert_type(client.models.get("m"), ModelMetadata)
        assert_type(client.models.index(), list[RepositoryIndexEntry])
        assert_type(client.models.stats(), list[ModelStat])
        assert_type(client.models.ready("m"), bool)
        assert_type(client.keys.create("n", ["infer", "read"], expires_in_s=60), KeyCreated)
        for key in client.keys.list(page_size=10):
            assert_type(key, KeyRecord)
        assert_type(client.health.ready(), bool)
        client.health.wait_until_ready(timeout=3)
        raw = client.with_raw_response.infer("m", [1], version=1)
        assert_type(raw, RawResponse[InferenceResult])
        assert_type(raw.parse(), InferenceResult)
        assert_type(client.with_raw_response.models.list(timeout=1), RawResponse[list[str]])
        assert_type(client.with_options(timeout=None, on_request=before), Inferway)


def lifecycle(client: Inferway) -> None:
    def told(event: DeployEvent) -> None:
        assert_type(event.file, str | None)

    golden = [({"x": np.zeros(3)}, {"y": [1.0]})]
    deployment = client.models.deploy(
        "model.onnx", name="m", alias=None, labels={"a": "b"}, golden=golden, isolation="worker", batching=False,
        progress=told, timeout=None,
    )  # fmt: skip
    assert_type(deployment, Deployment)
    assert_type(deployment.version, int)
    assert_type(deployment.version_record, ModelVersion | None)
    assert_type(deployment.handle, ModelHandle)
    for step in deployment.watch():
        assert_type(step, str)
    assert_type(deployment.wait(5).cancel().refresh(), Deployment)
    client.models.deploy(b"", name="m")
    client.models.deploy(Path("folder"), name="m", golden=Path("golden.json"))
    assert_type(client.models.deployments("m"), list[Deployment])
    assert_type(client.models.describe("m"), CatalogModel)
    assert_type(client.models.catalog(), list[CatalogModel])
    assert_type(client.models.versions("m"), list[ModelVersion])
    assert_type(client.models.set_alias("m", "stable", {3: 95, 4: 5}, sticky="key", fallback=[2], guard=True), Alias)
    assert_type(client.models.rollback("m"), Alias)
    for event in client.models.events("m"):
        assert_type(event, Event)
    assert_type(client.with_raw_response.models.describe("m"), RawResponse[CatalogModel])
    try:
        deployment.wait()
    except DeploymentFailedError as error:
        assert_type(error.step, str | None)
        assert_type(error.code, str)


def errors(client: Inferway) -> None:
    try:
        client.infer("m", [1])
    except QueueFullError as error:
        assert_type(error.status_code, int)
        assert_type(error.retry_after, float | None)
    except APITimeoutError as error:
        assert_type(error.attempts, int)
        assert_type(error.status_code, int | None)
    except APIStatusError as error:
        assert_type(error.code, str | None)
        assert_type(error.headers["a"], str)


async def key() -> str:
    return "key"


async def asynchronous() -> None:
    async with AsyncInferway(api_key=key, on_retry=waiting) as client:
        assert_type(client, AsyncInferway)
        result = await client.infer("m", {"x": [1, 2]}, timeout=None)
        assert_type(result, InferenceResult)
        handle = client.model("m")
        assert_type(handle, AsyncModelHandle)
        assert_type(await handle([1]), InferenceResult)
        assert_type(await handle.signature(), ModelMetadata)
        async for one in handle.map([[1], [2]]):
            assert_type(one, InferenceResult)
        async for either in handle.map([[1]], on_error="return"):
            assert_type(either, InferenceResult | InferwayError)
        assert_type(await client.models.list(), list[str])
        async for record in client.keys.list():
            assert_type(record, KeyRecord)
        deployment = await client.models.deploy("model.onnx", name="m", wait=False)
        assert_type(deployment, AsyncDeployment)
        async for step in deployment.watch():
            assert_type(step, str)
        assert_type(await deployment.wait(), AsyncDeployment)
        async for event in client.models.events():
            assert_type(event, Event)
        raw = await client.with_raw_response.models.get("m")
        assert_type(raw, RawResponse[ModelMetadata])
        assert_type((await client.with_raw_response.health.ready()).parse(), bool)


def texts(client: Inferway) -> None:
    answer = client.chat.create("Hi", model="m", temperature=0, max_tokens=5, timeout=3)
    assert_type(answer, ChatCompletion)
    assert_type(answer.text, str)
    assert_type(answer.finish_reason, str | None)
    try:
        with client.chat.create([{"role": "user", "content": "Hi"}, answer.message], model="m", stream=True) as stream:
            assert_type(stream, TextStream[ChatCompletion])
            for event in stream:
                assert_type(event, ContentDelta | ToolCallDelta | Finish | UsageReport)
            for text in stream.text_stream:
                assert_type(text, str)
            assert_type(stream.get_final(), ChatCompletion)
    except StreamInterruptedError as error:
        assert_type(error.param, str | None)
    either = client.chat.create("Hi", model="m", stream=bool(answer))
    assert_type(either, ChatCompletion | TextStream[ChatCompletion])
    assert_type(client.completions.create([1, 2], model="m", logprobs=3), Completion)
    assert_type(client.completions.create("a", model="m", stream=True), TextStream[Completion])
    assert_type(client.embed(["a"], model="m"), NDArray[np.float32])
    assert_type(client.embeddings.create("a", model="m"), EmbeddingResult)
    assert_type(client.rerank("q", ["a"], model="m"), RerankResult)
    assert_type(client.classify(["a"], model="m"), ClassifyResult)


async def texts_async(client: AsyncInferway) -> None:
    assert_type(await client.chat.create("Hi", model="m"), ChatCompletion)
    async with await client.chat.create("Hi", model="m", stream=True) as stream:
        assert_type(stream, AsyncTextStream[ChatCompletion])
        async for event in stream:
            assert_type(event, ContentDelta | ToolCallDelta | Finish | UsageReport)
        async for text in stream.text_stream:
            assert_type(text, str)
        assert_type(await stream.get_final(), ChatCompletion)
    assert_type(await client.embed(["a"], model="m"), NDArray[np.float32])


def own_tests() -> None:
    gateway = MockGateway(api_key="k")

    @gateway.model("m", inputs={"x": ("FP32", [-1])}, outputs={"y": ("FP32", [-1])})
    def double(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {"y": inputs["x"] * 2}

    assert_type(double({"x": np.zeros(1)}), dict[str, NDArray[Any]])
    assert_type(gateway.deployed, list[MockDeployment])
    gateway.fail_deployment(step="compared")
    with gateway.client() as client:
        assert_type(client, Inferway)


def mistakes(client: Inferway) -> None:
    # Each line would pass if the SDK's types were looser than they are; an ignore that is not needed is an error.
    client.infer("m", [1], time_out=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.infer("m", [1], timeout="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    client.infer(5, [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    client.keys.create("n", ["fly"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    client.models.deploy("m.onnx")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.models.deploy("m.onnx", name="m", isolation="none")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    client.with_raw_response.models.get()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.chat.create("Hi")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    client.chat.create("Hi", model="m", temprature=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    client.model("m").map([1], on_error="hide")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
