"""KServe's own REST client, unchanged, against a gateway in another process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

if TYPE_CHECKING:
    from conftest import Gateway

ONE = np.arange(16, dtype=np.int32).reshape(1, 16)
TWO = np.full((1, 16), 3, np.int32)


@pytest.fixture
async def client(served: Gateway) -> AsyncIterator[InferenceRESTClient]:
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=0)) as made:
        yield made


def request(*, binary: bool, wanted: list[RequestedOutput] | None = None) -> InferRequest:
    inputs = []
    for name, value in (("INPUT0", ONE), ("INPUT1", TWO)):
        made = InferInput(name, list(value.shape), "INT32")
        made.set_data_from_numpy(value, binary_data=binary)
        inputs.append(made)
    return InferRequest("add_sub", inputs, request_id="mine", request_outputs=wanted)


async def test_the_server_is_live_and_ready(client: InferenceRESTClient, served: Gateway) -> None:
    assert await client.is_server_live(served.url) is True
    assert await client.is_server_ready(served.url) is True


async def test_a_model_is_ready_or_not(client: InferenceRESTClient, served: Gateway) -> None:
    assert await client.is_model_ready(served.url, "add_sub", headers=served.headers) is True
    assert await client.is_model_ready(served.url, "broken", headers=served.headers) is False
    assert await client.is_model_ready(served.url, "no_such_model", headers=served.headers) is False


@pytest.mark.parametrize("binary", [True, False])
async def test_it_infers(client: InferenceRESTClient, served: Gateway, binary: bool) -> None:
    result = await client.infer(served.url, request(binary=binary), "add_sub", headers=dict(served.headers))
    assert result.id == "mine"
    assert result.model_name == "add_sub"
    assert result.model_version == "2"
    named = {output.name: output for output in result.outputs}
    np.testing.assert_array_equal(named["OUTPUT0"].as_numpy(), ONE + TWO)
    np.testing.assert_array_equal(named["OUTPUT1"].as_numpy(), ONE - TWO)


@pytest.mark.parametrize("binary", [True, False])
async def test_it_gets_the_output_it_asks_for(client: InferenceRESTClient, served: Gateway, binary: bool) -> None:
    wanted = [RequestedOutput("OUTPUT1", {"binary_data": binary})]
    asked = request(binary=True, wanted=wanted)
    result = await client.infer(served.url, asked, "add_sub", headers=dict(served.headers))
    assert [output.name for output in result.outputs] == ["OUTPUT1"]
    np.testing.assert_array_equal(result.outputs[0].as_numpy(), ONE - TWO)


async def test_text_goes_there_and_back(client: InferenceRESTClient, served: Gateway) -> None:
    value = np.array([["caf\u00e9", "", "a\0b"]], object)
    made = InferInput("x", list(value.shape), "BYTES")
    made.set_data_from_numpy(value, binary_data=False)
    result = await client.infer(served.url, InferRequest("text", [made]), "text", headers=dict(served.headers))
    assert result.outputs[0].as_numpy().tolist() == value.tolist()


async def test_an_error_keeps_its_words(client: InferenceRESTClient, served: Gateway) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="Request for unknown model: 'nothing' is not found") as caught:
        await client.infer(served.url, request(binary=True), "nothing", headers=dict(served.headers))
    assert caught.value.response.status_code == 404
    with pytest.raises(httpx.HTTPStatusError, match="expected an API key"):
        await client.infer(served.url, request(binary=False), "add_sub")
