"""The mock gateway that users test their programs with."""

from __future__ import annotations

from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest

import inferway
import models
from inferway.testing import MockGateway
from scripted import Side


@pytest.fixture
def gateway() -> MockGateway:
    made = MockGateway(api_key="test-key-123")

    @made.model("double", inputs={"x": ("FP32", [-1, 2])}, outputs={"y": ("FP32", [-1, 2])})
    def double(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"] * 2}

    @made.model(
        "many",
        inputs={"s": ("BYTES", [-1]), "h": ("FP16", [-1]), "b": ("BF16", [-1])},
        outputs={"s": ("BYTES", [-1]), "h": ("FP16", [-1]), "b": ("BF16", [-1]), "n": ("INT64", [])},
        optional=["h", "b"],
    )
    def many(inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "n": len(inputs)}

    return made


class Mocked(Side):
    def of(self, gateway: MockGateway, **arguments: Any) -> Any:
        made = gateway.client(**arguments) if self.kind == "sync" else gateway.async_client(**arguments)
        self._made.append(made)
        return made


@pytest.fixture(params=["sync", "async"])
async def mocked(request: pytest.FixtureRequest) -> Any:
    made = Mocked(request.param)
    yield made
    await made.end()


async def test_a_model_is_a_function(mocked: Mocked, gateway: MockGateway) -> None:
    client = mocked.of(gateway)
    assert (await mocked(lambda: client.model("double").predict([[1, 2]]))).tolist() == [[2, 4]]
    call = gateway.calls[-1]
    assert (call.model, call.version, call.status_code, call.method) == ("double", "1", 200, "POST")
    assert call.inputs["x"].tolist() == [[1, 2]]
    assert call.headers["authorization"] == "Bearer test-key-123"
    assert await mocked(lambda: client.models.list()) == ["double", "many"]
    assert await mocked(lambda: client.models.ready("double")) is True
    assert await mocked(lambda: client.health.live()) is True
    assert (await mocked(lambda: client.server())).name == "mock"


async def test_every_kind_of_tensor_goes_through(mocked: Mocked, gateway: MockGateway) -> None:
    client = mocked.of(gateway)
    inputs = {"s": ["a\x00", "é"], "h": [0.5], "b": [1.5, float("nan")]}
    result = await mocked(lambda: client.infer("many", inputs, id="i", parameters={"p": 1}))
    assert result["s"].tolist() == ["a\x00", "é"]
    assert result["h"].dtype == np.float16
    assert result["b"].tolist()[0] == 1.5
    assert result["n"].tolist() == 3
    assert (result.id, gateway.calls[-1].id, gateway.calls[-1].parameters["p"]) == ("i", "i", 1)
    some = await mocked(lambda: client.infer("many", ["a"], outputs=["n", "s"]))
    assert list(some) == ["n", "s"]
    plain = await mocked(lambda: client.infer("many", ["a"], binary=False))
    assert plain["s"].tolist() == ["a"]


async def test_the_highest_version_answers_unless_one_is_named(mocked: Mocked, gateway: MockGateway) -> None:
    gateway.model("v", inputs={"x": ("INT8", [-1])}, outputs={"y": ("INT8", [-1])}, version=9)(lambda inputs: [9])
    gateway.model("v", inputs={"x": ("INT8", [-1])}, outputs={"y": ("INT8", [-1])}, version=10)(lambda inputs: [10])
    client = mocked.of(gateway)
    assert (await mocked(lambda: client.infer("v", [1]))).model_version == "10"
    assert (await mocked(lambda: client.infer("v", [1], version=9)))["y"].tolist() == [9]
    assert (await mocked(lambda: client.model("v").signature())).versions == ("9", "10")


async def test_mistakes_are_answered_as_a_gateway_would(mocked: Mocked, gateway: MockGateway) -> None:
    client = mocked.of(gateway)
    with pytest.raises(inferway.ModelNotFoundError):
        await mocked(lambda: client.infer("nobody", [1]))
    with pytest.raises(inferway.VersionNotFoundError):
        await mocked(lambda: client.infer("double", [1, 2], version=7))
    with pytest.raises(inferway.InvalidInputError):
        await mocked(lambda: client.infer("double", [1, 2, 3]))
    with pytest.raises(inferway.NotFoundError):
        await mocked(lambda: client.keys.self())
    with pytest.raises(inferway.AuthenticationError):
        await mocked(lambda: client.with_options(api_key="wrong-key").models.list())
    gateway.model("bad", inputs={"x": ("INT8", [-1])}, outputs={"y": ("INT8", [-1])})(lambda inputs: 1 / 0)
    with pytest.raises(inferway.ModelFailedError, match="ZeroDivisionError"):
        await mocked(lambda: client.infer("bad", [1]))
    gateway.model("odd", inputs={"x": ("INT8", [-1])}, outputs={"y": ("INT8", [-1])})(lambda inputs: [1000])
    with pytest.raises(inferway.ModelFailedError, match="output 'y' expects INT8"):
        await mocked(lambda: client.infer("odd", [1]))


async def test_failures_come_when_they_are_asked_for(mocked: Mocked, gateway: MockGateway) -> None:
    client = mocked.of(gateway)
    gateway.fail(times=2)
    result = await mocked(lambda: client.infer("double", [1, 2], request_id="r"))
    assert (result.attempts, result.request_id) == (1, "r"), "the failures were met by asking for the signature"
    gateway.fail(retry_after=1)
    gateway.disconnect()
    assert (await mocked(lambda: client.infer("double", [1, 2]))).attempts == 3
    gateway.fail(code="internal", message="on purpose")
    with pytest.raises(inferway.InternalServerError, match="on purpose") as caught:
        await mocked(lambda: client.infer("double", [1, 2]))
    assert caught.value.attempts == 1
    gateway.fail(code="internal", should_retry=True)
    assert (await mocked(lambda: client.infer("double", [1, 2]))).attempts == 2
    gateway.fail(code="made_up", status_code=418)
    with pytest.raises(inferway.APIStatusError) as other:
        await mocked(lambda: client.infer("double", [1, 2]))
    assert (other.value.status_code, other.value.code) == (418, "made_up")
    assert [call.status_code for call in gateway.calls].count(0) == 1, "the broken connection"
    gateway.is_ready = False
    assert await mocked(lambda: client.health.ready()) is False


def test_an_http_client_made_by_hand_may_end_in_it(gateway: MockGateway) -> None:
    with httpx.Client(transport=gateway.transport, base_url="https://mock") as client:
        refused = client.post("/v2/models/double/infer", json={"inputs": 5})
        assert refused.status_code == 401
        headers = {"Authorization": "Bearer test-key-123"}
        for body in ({"inputs": 5}, {"inputs": [{"name": "x", "datatype": "INT8", "shape": [1, 2], "data": [1, 2]}]}):
            answer = client.post("/v2/models/double/infer", json=body, headers=headers)
            assert answer.status_code == 400
            assert set(answer.json()) == {"error", "code", "request_id"}
        unknown = {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}],
            "outputs": [{"name": "q"}],
        }
        assert client.post("/v2/models/double/infer", json=unknown, headers=headers).status_code == 400
        assert client.get("/v2/models/double/nothing", headers=headers).status_code == 404


# --- the life of models ------------------------------------------------------------------------------------------


def add(amount: float) -> bytes:
    return models.add_one(size=2, increment=amount)


async def test_a_model_is_deployed_to_the_mock(mocked: Mocked, gateway: MockGateway) -> None:
    client = mocked.of(gateway)
    deployment = await mocked(
        lambda: client.models.deploy(add(1), name="churn", labels={"a": "b"}, golden=[([[1, 2]], [[2, 3]])])
    )
    assert (deployment.state, deployment.version, deployment.version_record.labels) == ("succeeded", 1, {"a": "b"})
    [sent] = gateway.deployed
    assert (sent.model, sent.version, sent.alias, sent.labels) == ("churn", 1, "stable", {"a": "b"})
    assert sent.files["model.onnx"] == add(1)
    assert set(sent.files) == {"model.onnx", "golden.json"}
    again = await mocked(lambda: client.models.deploy(add(1), name="churn", golden=[([[1, 2]], [[2, 3]])]))
    assert (again.version, again.reused, len(gateway.deployed)) == (1, True, 1)
    # Its signature is known; what it answers is for the test to say.
    assert (await mocked(lambda: client.models.get("churn"))).inputs[0].name == "x"
    with pytest.raises(inferway.ModelNotReadyError, match="define what answers"):
        await mocked(lambda: client.infer("churn", [[1, 2]]))


async def test_a_function_answers_for_every_version_of_its_name(mocked: Mocked, gateway: MockGateway) -> None:
    client = mocked.of(gateway)
    deployment = await mocked(lambda: client.models.deploy(add(1), name="double", alias="canary"))
    assert deployment.version == 2
    assert (await mocked(lambda: client.infer("double@canary", [[1, 2]]))).model_version == "2"
    assert (await mocked(lambda: client.infer("double", [[1, 2]], version=1))).model_version == "1"
    assert (await mocked(lambda: deployment.handle.predict([[1, 2]]))).tolist() == [[2, 4]]
    with pytest.raises(inferway.AliasNotFoundError):
        await mocked(lambda: client.infer("double@beta", [[1, 2]]))
    with pytest.raises(inferway.VersionNotFoundError):
        await mocked(lambda: client.infer("double", [[1, 2]], version=9))


async def test_a_deployment_is_made_to_fail(mocked: Mocked, gateway: MockGateway) -> None:
    client = mocked.of(gateway)
    gateway.fail_deployment(step="compared", code="golden_mismatch", message="differs")
    with pytest.raises(inferway.DeploymentFailedError) as raised:
        await mocked(lambda: client.models.deploy(add(1), name="churn"))
    assert (raised.value.step, raised.value.code, raised.value.message) == ("compared", "golden_mismatch", "differs")
    assert raised.value.deployment.step == "warmed"
    assert gateway.deployed == []
    with pytest.raises(inferway.ModelNotFoundError):
        await mocked(lambda: client.models.describe("churn"))
    [record] = await mocked(lambda: client.models.deployments("churn"))
    assert (await mocked(lambda: client.models.deployment(record.id))).state == "failed"


async def test_aliases_versions_and_events_live_in_the_mock(mocked: Mocked, gateway: MockGateway) -> None:
    client = mocked.of(gateway)
    for amount in (1, 2):
        await mocked(partial(client.models.deploy, add(amount), name="churn"))
    with pytest.raises(inferway.ConflictError):
        await mocked(lambda: client.models.delete("churn", 2))
    alias = await mocked(lambda: client.models.set_alias("churn", "stable", {1: 95, 2: 5}, guard=True, shadow=2))
    assert (alias.revision, alias.guard.min_requests, alias.shadow.share) == (3, 50, 1.0)
    assert (await mocked(lambda: client.models.get("churn"))).name == "churn"
    with pytest.raises(inferway.ConflictError):
        await mocked(lambda: client.models.set_alias("churn", "stable", 1, expected_revision=1))
    assert (await mocked(lambda: client.models.rollback("churn"))).weights == {"2": 100}
    await mocked(lambda: client.models.set_alias("churn", "beta", 1))
    with pytest.raises(inferway.ConflictError):
        await mocked(lambda: client.models.rollback("churn", "beta"))
    assert (await mocked(lambda: client.models.alias("churn", "beta"))).weights == {"1": 100}
    await mocked(lambda: client.models.delete_alias("churn", "beta"))
    assert len(await mocked(lambda: client.models.aliases("churn"))) == 1
    assert (await mocked(lambda: client.models.update("churn", 1, pinned=True))).pinned
    await mocked(lambda: client.models.delete("churn", 1))
    with pytest.raises(inferway.VersionNotFoundError):
        await mocked(lambda: client.models.version("churn", 1))
    kinds = [event.kind for event in await mocked.all(client.models.events("churn", page_size=2))]
    assert kinds[:3] == ["version_deleted", "alias_deleted", "alias_set"]
    assert len(kinds) == len(await mocked.all(client.models.events()))
    assert [model.name for model in await mocked(lambda: client.models.catalog())] == ["churn"]
    await mocked(lambda: client.models.delete("churn"))
    assert await mocked(lambda: client.models.catalog()) == []
    with pytest.raises(inferway.ModelNotFoundError):
        await mocked(lambda: client.models.set_alias("churn", "stable", 1))


async def test_the_mock_knows_no_other_routes_of_the_gateway(mocked: Mocked, gateway: MockGateway) -> None:
    client = mocked.of(gateway)
    with pytest.raises(inferway.NotFoundError):
        await mocked(lambda: client.keys.self())
