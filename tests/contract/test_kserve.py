"""KServe's own REST client, unchanged, against a gateway in another process."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig  # type: ignore[import-untyped]  # no types
from kserve.protocol.infer_type import RequestedOutput  # type: ignore[import-untyped]  # no types

from live import LiveGateway

ONE = np.arange(16, dtype=np.int32).reshape(1, 16)
TWO = np.full((1, 16), 3, np.int32)


def authorised(gateway: LiveGateway) -> dict[str, str]:
    return {"Authorization": f"Bearer {gateway.admin_key}"}


@pytest.fixture
async def client() -> AsyncIterator[InferenceRESTClient]:
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=0)) as made:
        yield made


def request(*, binary: bool, wanted: list[RequestedOutput] | None = None) -> InferRequest:
    inputs = []
    for name, value in (("INPUT0", ONE), ("INPUT1", TWO)):
        made = InferInput(name, list(value.shape), "INT32")
        made.set_data_from_numpy(value, binary_data=binary)
        inputs.append(made)
    return InferRequest("simple", inputs, request_id="mine", request_outputs=wanted)


async def test_the_server_is_live_and_ready(client: InferenceRESTClient, gateway: LiveGateway) -> None:
    assert await client.is_server_live(gateway.url) is True
    assert await client.is_server_ready(gateway.url) is True


async def test_a_model_is_ready_or_not(client: InferenceRESTClient, gateway: LiveGateway) -> None:
    assert await client.is_model_ready(gateway.url, "simple", headers=authorised(gateway)) is True
    gateway.call("POST", "/v2/repository/models/add_one/unload")
    try:
        assert await client.is_model_ready(gateway.url, "add_one", headers=authorised(gateway)) is False
    finally:
        gateway.call("POST", "/v2/repository/models/add_one/load")
    assert await client.is_model_ready(gateway.url, "add_one", headers=authorised(gateway)) is True
    assert await client.is_model_ready(gateway.url, "no_such_model", headers=authorised(gateway)) is False


@pytest.mark.parametrize("binary", [True, False])
async def test_it_infers(client: InferenceRESTClient, gateway: LiveGateway, binary: bool) -> None:
    result = await client.infer(gateway.url, request(binary=binary), "simple", headers=authorised(gateway))
    assert result.id == "mine"
    assert result.model_name == "simple"
    named = {output.name: output for output in result.outputs}
    np.testing.assert_array_equal(named["OUTPUT0"].as_numpy(), ONE + TWO)
    np.testing.assert_array_equal(named["OUTPUT1"].as_numpy(), ONE - TWO)


@pytest.mark.parametrize("binary", [True, False])
async def test_it_gets_the_output_it_asks_for(client: InferenceRESTClient, gateway: LiveGateway, binary: bool) -> None:
    wanted = [RequestedOutput("OUTPUT1", {"binary_data": binary})]
    asked = request(binary=True, wanted=wanted)
    result = await client.infer(gateway.url, asked, "simple", headers=authorised(gateway))
    assert [output.name for output in result.outputs] == ["OUTPUT1"]
    np.testing.assert_array_equal(result.outputs[0].as_numpy(), ONE - TWO)


async def test_text_goes_there_and_back(client: InferenceRESTClient, gateway: LiveGateway) -> None:
    value = np.array([["caf\u00e9", "", "a\0b"]], object)
    made = InferInput("x", list(value.shape), "BYTES")
    made.set_data_from_numpy(value, binary_data=False)
    result = await client.infer(gateway.url, InferRequest("strings", [made]), "strings", headers=authorised(gateway))
    assert result.outputs[0].as_numpy().tolist() == value.tolist()


async def test_an_error_keeps_its_words(client: InferenceRESTClient, gateway: LiveGateway) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="Request for unknown model: 'nothing' is not found") as caught:
        await client.infer(gateway.url, request(binary=True), "nothing", headers=authorised(gateway))
    assert caught.value.response.status_code == 404
    with pytest.raises(httpx.HTTPStatusError, match="expected an API key"):
        await client.infer(gateway.url, request(binary=False), "simple")
