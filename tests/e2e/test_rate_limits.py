"""A key that asks too much is told to wait, by every protocol, and clients wait."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import openai
import pytest

import inferway
import models
from inferway import Inferway, RetryPolicy
from live import LiveGateway, run_gateway

ROW = np.zeros((1, 16), np.float32)
BODY = {"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [0.0] * 16}]}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """Each key has one request every ten seconds here."""
    root = tmp_path_factory.mktemp("rates")
    models.write_repository(root / "models", {"one": models.add_one()})
    with run_gateway(root / "models", root / "state", "--requests-per-minute", "6") as running:
        yield running


def test_every_inference_route_counts_and_no_other_does(live: LiveGateway) -> None:
    key = live.make_key("infer", "read")
    for _ in range(5):
        assert live.call("GET", "/v2/models/one", key=key)[0] == 200
        assert live.call("GET", "/v1/models", key=key)[0] == 200
    assert live.call("POST", "/v2/models/one/infer", BODY, key=key)[0] == 200
    status, answer, headers = live.call("POST", "/v2/models/one/versions/1/infer", BODY, key=key)
    assert status == 429
    assert answer["code"] == "rate_limited"
    assert "at most 6 requests a minute" in answer["error"]
    assert 1 <= int(headers["Retry-After"]) <= 10
    assert headers["X-Should-Retry"] == "true"
    status, answer, headers = live.call("POST", "/v1/embeddings", {"model": "one", "input": "a"}, key=key)
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (429, "rate_limit_error", "rate_limited")
    # Another key has its own, and this one may go on asking what there is.
    assert live.call("POST", "/v2/models/one/infer", BODY, key=live.make_key("infer"))[0] == 200
    assert live.call("GET", "/v2/models/one", key=key)[0] == 200


def test_the_openai_package_raises_its_own_class(live: LiveGateway) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.make_key("infer"), max_retries=0)
    # A request counts though it fails: that costs work too.
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="one", input="a")
    with pytest.raises(openai.RateLimitError) as caught:
        client.embeddings.create(model="one", input="a")
    assert caught.value.code == "rate_limited"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 10


def test_our_client_raises_its_own_class_and_waits_as_long_as_it_was_told(live: LiveGateway) -> None:
    key = live.make_key("infer", "read")
    with Inferway(live.url, api_key=key, retry=RetryPolicy(attempts=1)) as client:
        client.infer("one", ROW)
        with pytest.raises(inferway.RateLimitError, match="at most 6 requests a minute") as caught:
            client.infer("one", ROW)
    assert caught.value.code == "rate_limited"
    assert caught.value.retry_after is not None
    delays: list[float] = []
    with Inferway(live.url, api_key=key, on_retry=lambda event: delays.append(event.delay_s)) as patient:
        assert patient.infer("one", ROW)["y"].sum() == 16
    assert delays
    assert delays[0] >= caught.value.retry_after - 1
