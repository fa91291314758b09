"""Triton's own HTTP client, unchanged, in both of its forms, against a gateway in another process."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import AsyncIterator
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from numpy.typing import NDArray
from tritonclient.http import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from inferway_contract.names import EXTENSIONS
from live import LiveGateway
from models import corrupt, write_repository

DTYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
ONE = np.arange(16, dtype=np.int32).reshape(1, 16)
TWO = np.full((1, 16), 3, np.int32)


def authorised(gateway: LiveGateway) -> dict[str, str]:
    return {"Authorization": f"Bearer {gateway.admin_key}"}


class Client:
    """Both clients behind one shape: every call is awaited, whether it was synchronous or not."""

    def __init__(self, client: Any, headers: dict[str, str]) -> None:
        self._client = client
        self._headers = headers

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.setdefault("headers", self._headers)
            result = method(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result

        return call


@pytest.fixture(params=["sync", "asyncio"])
async def client(request: pytest.FixtureRequest, gateway: LiveGateway) -> AsyncIterator[Client]:
    if request.param == "sync":
        with tritonclient.http.InferenceServerClient(gateway.url.removeprefix("http://")) as sync:
            yield Client(sync, authorised(gateway))
    else:
        async with tritonclient.http.aio.InferenceServerClient(gateway.url.removeprefix("http://")) as asynchronous:
            yield Client(asynchronous, authorised(gateway))


def tensor(name: str, value: NDArray[Any], datatype: str, *, binary: bool) -> InferInput:
    made = InferInput(name, list(value.shape), datatype)
    made.set_data_from_numpy(value, binary_data=binary)
    return made


def pair(*, binary: bool = True, one: NDArray[Any] = ONE, two: NDArray[Any] = TWO) -> list[InferInput]:
    return [tensor("INPUT0", one, "INT32", binary=binary), tensor("INPUT1", two, "INT32", binary=binary)]


# ---- health, metadata, configuration, statistics


async def test_the_server_and_its_models_are_live_and_ready(client: Client) -> None:
    assert await client.is_server_live() is True
    assert await client.is_server_ready() is True
    assert await client.is_model_ready("simple") is True
    assert await client.is_model_ready("simple", "2") is True
    assert await client.is_model_ready("simple", "3") is False
    assert await client.is_model_ready("no_such_model") is False


async def test_the_server_metadata_names_the_extensions(client: Client) -> None:
    metadata = await client.get_server_metadata()
    assert metadata["name"] == "inferway"
    assert set(metadata["extensions"]) == set(EXTENSIONS)


async def test_the_model_metadata_is_the_signature(client: Client) -> None:
    for version in ("", "1"):
        metadata = await client.get_model_metadata("simple", version)
        assert metadata["name"] == "simple"
        assert metadata["versions"] == ["1", "2"]
        assert metadata["platform"] == "onnxruntime_onnx"
        assert metadata["inputs"] == [
            {"name": "INPUT0", "datatype": "INT32", "shape": [-1, 16]},
            {"name": "INPUT1", "datatype": "INT32", "shape": [-1, 16]},
        ]
        assert [o["name"] for o in metadata["outputs"]] == ["OUTPUT0", "OUTPUT1"]


async def test_the_model_configuration_is_tritons(client: Client) -> None:
    config = await client.get_model_config("simple")
    assert config["name"] == "simple"
    assert config["max_batch_size"] > 0
    assert config["input"][0]["data_type"] == "TYPE_INT32"
    assert config["input"][0]["dims"] == [16]
    assert config["version_policy"] == {"all": {}}


async def test_the_statistics_count_rows_and_runs(client: Client) -> None:
    before = (await client.get_inference_statistics("simple", "2"))["model_stats"][0]
    three = np.repeat(ONE, 3, axis=0)
    await client.infer("simple", pair(one=three, two=three), model_version="2")
    after = (await client.get_inference_statistics("simple", "2"))["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] - before["execution_count"] == 1
    assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == 1
    everything = (await client.get_inference_statistics())["model_stats"]
    assert {"simple", "classifier", "strings"} <= {s["name"] for s in everything}


# ---- the repository


async def test_the_repository_index_lists_every_model(client: Client) -> None:
    index = await client.get_model_repository_index()
    states = {(m["name"], m["version"]): m["state"] for m in index}
    assert states["simple", "1"] == states["simple", "2"] == "READY"


async def test_a_model_is_unloaded_and_loaded_again(client: Client) -> None:
    await client.unload_model("scalar")
    assert await client.is_model_ready("scalar") is False
    await client.load_model("scalar")
    assert await client.is_model_ready("scalar") is True


async def test_a_model_that_cannot_be_loaded_says_why(client: Client, gateway: LiveGateway) -> None:
    write_repository(gateway.repository, {"broken": corrupt()["html"]})
    try:
        with pytest.raises(InferenceServerException, match="failed to load 'broken'") as caught:
            await client.load_model("broken")
        assert caught.value.status() == "400"
        index = await client.get_model_repository_index()
        (entry,) = [m for m in index if m["name"] == "broken"]
        assert entry["state"] == "UNAVAILABLE"
        assert entry["reason"]
        assert await client.is_model_ready("broken") is False
        await client.unload_model("broken")
    finally:
        shutil.rmtree(gateway.repository / "broken")


# ---- inference


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
async def test_json_and_binary_tensors_mix(client: Client, binary_in: bool, binary_out: bool) -> None:
    inputs = [tensor("INPUT0", ONE, "INT32", binary=True), tensor("INPUT1", TWO, "INT32", binary=binary_in)]
    outputs = [
        InferRequestedOutput("OUTPUT1", binary_data=binary_out),
        InferRequestedOutput("OUTPUT0", binary_data=not binary_out),
    ]
    result = await client.infer("simple", inputs, outputs=outputs, request_id="mine")
    response = result.get_response()
    assert response["id"] == "mine"
    assert response["model_version"] == "2"
    assert [o["name"] for o in response["outputs"]] == ["OUTPUT1", "OUTPUT0"]
    assert ("data" in response["outputs"][0]) is not binary_out
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), ONE + TWO)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), ONE - TWO)


async def test_only_the_requested_output_comes(client: Client) -> None:
    result = await client.infer("simple", pair(), outputs=[InferRequestedOutput("OUTPUT1")])
    assert result.as_numpy("OUTPUT0") is None
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), ONE - TWO)


async def test_a_version_is_picked(client: Client) -> None:
    result = await client.infer("simple", pair(), model_version="1")
    assert result.get_response()["model_version"] == "1"


async def test_priority_timeout_and_own_parameters_are_taken(client: Client) -> None:
    result = await client.infer(
        "simple", pair(), priority=1, timeout=5_000_000, parameters={"tag": "a", "share": 0.5, "dry": True}
    )
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), ONE + TWO)


@pytest.mark.parametrize("binary", [True, False])
async def test_every_datatype_comes_back_as_it_was(client: Client, binary: bool) -> None:
    random = np.random.default_rng(5)
    inputs: list[InferInput] = []
    sent: dict[str, NDArray[Any]] = {}
    for datatype, dtype in DTYPES.items():
        raw = random.integers(0, 2 if datatype == "BOOL" else 100, (2, 3))
        value: NDArray[Any] = raw.astype(dtype)
        sent[datatype.lower()] = value
        # FP16 has no JSON form, in Triton neither.
        inputs.append(tensor(datatype.lower(), value, datatype, binary=binary or datatype == "FP16"))
    sent["bytes"] = np.array([[b"", b"a\0b", "\u00e9".encode()], [b"x" * 300, b'"\\', b"\0"]], object)
    inputs.append(tensor("bytes", sent["bytes"], "BYTES", binary=binary))
    outputs = [InferRequestedOutput(n + "_out", binary_data=binary or n == "fp16") for n in sent]
    result = await client.infer("all_types", inputs, outputs=outputs)
    for name, value in sent.items():
        got = result.as_numpy(name + "_out")
        if name == "bytes" and not binary:
            got = np.array([v.encode() if isinstance(v, str) else v for v in got.ravel()], object).reshape(got.shape)
        np.testing.assert_array_equal(got, value)
        assert name == "bytes" or got.dtype == value.dtype


async def test_bf16_travels_in_binary(client: Client) -> None:
    value = np.array([[1.0, -2.5, 0.0, 3.0e38]], ml_dtypes.bfloat16)
    result = await client.infer("bf16", [tensor("x", value, "BF16", binary=True)])
    assert result.get_output("y")["datatype"] == "BF16"
    np.testing.assert_array_equal(result.as_numpy("y").astype(np.float32), value.astype(np.float32))


async def test_nan_and_infinities_survive_json(client: Client) -> None:
    value = np.array([[np.nan, np.inf, -np.inf, 1.5]], np.float32)
    weights = tensor("x", value[:, :4], "FP32", binary=False)
    scalars = [
        tensor("x", np.array(np.inf, np.float32), "FP32", binary=False),
        tensor("y", np.array(-np.inf, np.float32), "FP32", binary=False),
    ]
    result = await client.infer("scalar", scalars, outputs=[InferRequestedOutput("z", binary_data=False)])
    assert result.as_numpy("z").shape == ()
    assert np.isnan(result.as_numpy("z"))
    result = await client.infer("classifier", [weights], outputs=[InferRequestedOutput("probabilities", False)])
    assert np.isnan(result.as_numpy("probabilities")).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
async def test_tensors_without_elements_keep_their_shape(client: Client, shape: tuple[int, int]) -> None:
    value = np.empty(shape, object)
    result = await client.infer("strings", [tensor("x", value, "BYTES", binary=True)])
    assert result.as_numpy("y").shape == shape


@pytest.mark.parametrize("request_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_coding", [None, "gzip", "deflate"])
async def test_bodies_are_compressed_both_ways(
    client: Client, request_coding: str | None, response_coding: str | None
) -> None:
    result = await client.infer(
        "simple",
        pair(),
        request_compression_algorithm=request_coding,
        response_compression_algorithm=response_coding,
    )
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), ONE + TWO)


async def test_classification_names_the_best_classes(client: Client) -> None:
    rows = np.array([[1, 0, 0, 0], [0, 0, 2, 0]], np.float32)
    for binary in (True, False):
        outputs = [InferRequestedOutput("probabilities", binary_data=binary, class_count=2)]
        result = await client.infer("classifier", [tensor("x", rows, "FP32", binary=True)], outputs=outputs)
        got = [[v.decode() if isinstance(v, bytes) else v for v in row] for row in result.as_numpy("probabilities")]
        assert [row[0].split(":")[1:] for row in got] == [["0", "cat"], ["2", "fox"]]
        assert all(len(row) == 2 for row in got)
        share = float(got[0][0].split(":")[0])
        assert share == pytest.approx(np.exp(4) / (np.exp(4) + 2), abs=1e-5)


# The client in asyncio hands aiohttp the whole body as bytes, which aiohttp finds unwise.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
async def test_a_large_tensor_goes_both_ways(client: Client) -> None:
    value = np.random.default_rng(0).integers(-1000, 1000, (65_536, 16)).astype(np.int32)
    result = await client.infer("simple", pair(one=value, two=value), outputs=[InferRequestedOutput("OUTPUT0")])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), 2 * value)


def test_the_synchronous_client_sends_many_at_once(gateway: LiveGateway) -> None:
    with tritonclient.http.InferenceServerClient(gateway.url.removeprefix("http://"), concurrency=8) as client:
        sent = [ONE + i for i in range(32)]
        pending = [client.async_infer("simple", pair(one=one), headers=authorised(gateway)) for one in sent]
        for one, answer in zip(sent, pending, strict=True):
            np.testing.assert_array_equal(answer.get_result().as_numpy("OUTPUT0"), one + TWO)


def test_a_body_made_by_the_client_alone_is_understood(gateway: LiveGateway) -> None:
    body, length = tritonclient.http.InferenceServerClient.generate_request_body(pair())
    headers = {**authorised(gateway), "Inference-Header-Content-Length": str(length)}
    answer = httpx.post(f"{gateway.url}/v2/models/simple/infer", content=body, headers=headers)
    result = tritonclient.http.InferenceServerClient.parse_response_body(
        answer.content, header_length=int(answer.headers["Inference-Header-Content-Length"])
    )
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), ONE - TWO)


# ---- errors


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        await call
    # The client's __str__ fails on an error that is no plain string.
    assert caught.value.message() in str(caught.value)
    return caught.value.status(), caught.value.message()


async def test_errors_have_a_status_and_one_sentence(client: Client) -> None:
    status, words = await refused(client.infer("no_such_model", pair()))
    assert (status, words) == ("404", "Request for unknown model: 'no_such_model' is not found")
    status, words = await refused(client.infer("simple", pair(), model_version="9"))
    assert status == "404"
    assert "9" in words
    status, words = await refused(client.infer("simple", pair()[:1]))
    assert status == "400"
    assert "expected 2 inputs but got 1 inputs" in words
    status, words = await refused(client.infer("simple", pair(one=ONE[:, :15])))
    assert status == "400"
    assert "INPUT0" in words
    status, words = await refused(client.infer("simple", pair(), outputs=[InferRequestedOutput("OUTPUT9")]))
    assert status == "400"
    assert "OUTPUT9" in words
    twice = [InferRequestedOutput("OUTPUT0"), InferRequestedOutput("OUTPUT0")]
    status, words = await refused(client.infer("simple", pair(), outputs=twice))
    assert status == "400"
    status, words = await refused(
        client.infer("strings", [tensor("x", np.array([[b"\xff"]], object), "BYTES", binary=True)])
    )
    assert status == "400"
    assert "UTF-8" in words


async def test_keys_and_scopes_are_enforced(client: Client, gateway: LiveGateway) -> None:
    status, _ = await refused(client.infer("simple", pair(), headers={}))
    assert status == "401"
    wrong = {"X-API-Key": "ifw_live_" + "0" * 12 + "_" + "1" * 49}
    assert (await refused(client.get_model_metadata("simple", headers=wrong)))[0] == "401"
    limited = {"X-API-Key": gateway.make_key("infer", models=["strings"])}
    assert (await refused(client.unload_model("strings", headers=limited)))[0] == "403"
    assert (await refused(client.get_model_metadata("simple", headers=limited)))[0] == "404"
    assert (await client.get_model_metadata("strings", headers=limited))["name"] == "strings"
