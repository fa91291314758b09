"""A live gateway's answers hold what the contract names and nothing that it does not: members, headers, statuses."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import BaseModel

from inferway_contract import codes, document, models, names
from live import LiveGateway

CONTRACT = document.load()
SIMPLE = {
    "inputs": [
        {"name": name, "datatype": "INT32", "shape": [1, 16], "data": list(range(16))} for name in ("INPUT0", "INPUT1")
    ]
}
# What HTTP itself or every answer of the gateway has.
GENERAL = {
    "date", "content-type", "content-length", "connection", "vary", "x-content-type-options", "cache-control",
    "referrer-policy",
}  # fmt: skip

CALLS: list[tuple[str, str, Any, int, type[BaseModel] | None, str]] = [
    ("GET", "/v2/health/live", None, 200, models.ServerLive, "/v2/health/live"),
    ("GET", "/v2/health/ready", None, 200, models.ServerReady, "/v2/health/ready"),
    ("GET", "/v2", None, 200, models.ServerMetadata, "/v2"),
    ("GET", "/v2/models", None, 200, models.ModelList, "/v2/models"),
    ("GET", "/v2/models/stats", None, 200, models.ModelStats, "/v2/models/stats"),
    ("GET", "/v2/models/simple", None, 200, models.ModelMetadata, "/v2/models/{model}"),
    ("GET", "/v2/models/optional", None, 200, models.ModelMetadata, "/v2/models/{model}"),
    ("GET", "/v2/models/simple/versions/1", None, 200, models.ModelMetadata, "/v2/models/{model}/versions/{version}"),
    ("GET", "/v2/models/simple/ready", None, 200, models.ModelReady, "/v2/models/{model}/ready"),
    ("GET", "/v2/models/simple/stats", None, 200, models.ModelStats, "/v2/models/{model}/stats"),
    ("GET", "/v2/models/simple/config", None, 200, models.ModelConfig, "/v2/models/{model}/config"),
    ("GET", "/v2/models/classifier/config", None, 200, models.ModelConfig, "/v2/models/{model}/config"),
    ("GET", "/v2/models/all_types/config", None, 200, models.ModelConfig, "/v2/models/{model}/config"),
    ("POST", "/v2/models/simple/infer", SIMPLE, 200, models.InferenceResponse, "/v2/models/{model}/infer"),
    ("POST", "/v2/models/simple/infer", {"id": "a", **SIMPLE}, 200, models.InferenceResponse,
     "/v2/models/{model}/infer"),
    ("POST", "/v2/repository/index", {"ready": True}, 200, None, "/v2/repository/index"),
    ("POST", "/v2/repository/models/add_one/load", {}, 200, models.LoadResult, "/v2/repository/models/{model}/load"),
    ("POST", "/v2/repository/main/index", None, 501, models.Error, "/v2/repository/{repository}/index"),
    ("GET", "/v2/models/nothing", None, 404, models.Error, "/v2/models/{model}"),
    ("GET", "/v2/models/simple/versions/9", None, 404, models.Error, "/v2/models/{model}/versions/{version}"),
    ("POST", "/v2/models/simple/infer", {"inputs": []}, 400, models.Error, "/v2/models/{model}/infer"),
    ("GET", "/metrics", None, 200, None, "/metrics"),
    ("GET", "/docs", None, 200, None, "/docs"),
    ("GET", "/openapi.json", None, 200, None, "/openapi.json"),
    ("GET", "/api/v1/keys", None, 200, models.KeyList, "/api/v1/keys"),
    ("GET", "/api/v1/keys/self", None, 200, models.KeyRecord, "/api/v1/keys/self"),
    ("GET", "/api/v1/keys/000000000000", None, 404, models.Problem, "/api/v1/keys/{key_id}"),
    ("GET", "/api/v1/keys?limit=0", None, 400, models.Problem, "/api/v1/keys"),
    ("POST", "/api/v1/keys", {"name": "k", "scopes": ["infer"]}, 201, models.KeyCreated, "/api/v1/keys"),
    ("POST", "/api/v1/keys", {"name": "k"}, 400, models.Problem, "/api/v1/keys"),
]  # fmt: skip


def unnamed(value: Any, path: str = "") -> Iterator[str]:
    """Members of a parsed body that its model does not name."""
    if isinstance(value, BaseModel):
        yield from (f"{path}.{name}" for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from unnamed(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from unnamed(item, path + "[]")


def described(path: str, method: str, status: int) -> Mapping[str, Any]:
    response: dict[str, Any] = CONTRACT["paths"][path][method.lower()]["responses"][str(status)]
    if "$ref" in response:
        response = CONTRACT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    return response


def check_headers(path: str, method: str, status: int, headers: Mapping[str, str]) -> None:
    response = described(path, method, status)
    named = {name.lower() for name in response["headers"]}
    assert {name.lower() for name in headers} <= GENERAL | named
    media_type = headers["content-type"].partition(";")[0]
    assert media_type in response["content"]


@pytest.mark.parametrize(("method", "path", "body", "status", "model", "template"), CALLS)
def test_an_answer_is_as_the_contract_describes_it(
    gateway: LiveGateway, method: str, path: str, body: Any, status: int, model: type[BaseModel] | None, template: str
) -> None:
    got, answer, headers = gateway.call(method, path, body)
    assert got == status, answer
    check_headers(template, method, status, headers)
    if model is not None:
        # The configuration shows all of Triton's members; the contract describes those that this gateway acts on.
        parsed = model.model_validate(answer)
        assert list(unnamed(parsed.inferway if isinstance(parsed, models.ModelConfig) else parsed)) == []
    elif path == "/v2/repository/index":
        for entry in answer:
            assert list(unnamed(models.RepositoryIndexEntry.model_validate(entry))) == []


@pytest.mark.parametrize(
    "path", ["/v2", "/metrics", "/docs", "/openapi.json", "/api/v1/keys", "/nothing", "/v2/nothing"]
)
def test_without_a_key_there_is_401_or_nothing(gateway: LiveGateway, path: str) -> None:
    status, answer, headers = gateway.call("GET", path, key=None)
    if "nothing" in path:
        assert (status, answer["code"]) == (404, "not_found")
        return
    assert (status, answer["code"]) == (401, "unauthenticated")
    schemes = {value.partition(" ")[0] for value in headers.get_all("WWW-Authenticate")}  # type: ignore[attr-defined]
    assert schemes == ({"Bearer", "Basic"} if path in ("/docs", "/openapi.json") else {"Bearer"})


def test_a_browser_opens_the_page_with_the_key_as_password(gateway: LiveGateway) -> None:
    word = base64.b64encode(f"anyone:{gateway.admin_key}".encode()).decode()
    status, page, headers = gateway.call("GET", "/docs", key=None, headers={"Authorization": f"Basic {word}"})
    assert status == 200
    assert page.startswith("<!doctype html>")
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    status, _, _ = gateway.call("GET", "/v2", key=None, headers={"Authorization": f"Basic {word}"})
    assert status == 401


def test_the_contract_is_served_as_it_is(gateway: LiveGateway) -> None:
    assert gateway.call("GET", "/openapi.json")[1] == CONTRACT


@pytest.mark.parametrize("given", ["mine-1", "a.b:c_d", "x" * 128])
def test_a_request_id_that_fits_comes_back(gateway: LiveGateway, given: str) -> None:
    _, answer, headers = gateway.call("GET", "/v2/models/nothing", headers={"X-Request-Id": given})
    assert headers["X-Request-Id"] == given
    assert answer["request_id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a/b"])
def test_a_request_id_that_does_not_fit_is_replaced(gateway: LiveGateway, given: str) -> None:
    _, answer, headers = gateway.call("GET", "/v2/models/nothing", headers={"X-Request-Id": given})
    assert headers["X-Request-Id"] == answer["request_id"] != given
    assert names.REQUEST_ID_PATTERN.fullmatch(answer["request_id"])


def test_a_problem_has_the_title_and_type_of_its_code(gateway: LiveGateway) -> None:
    status, answer, _ = gateway.call("GET", "/api/v1/keys/000000000000")
    assert answer["type"] == codes.problem_type("key_not_found")
    assert answer["title"] == codes.ERRORS["key_not_found"].title
    assert answer["status"] == status == codes.ERRORS["key_not_found"].status


def test_the_answer_to_a_rotated_key_says_so(gateway: LiveGateway) -> None:
    key = gateway.make_key("read")
    _, record, headers = gateway.call("GET", "/api/v1/keys/self", key=key)
    assert "Deprecation" not in headers
    status, rotated, headers = gateway.call("POST", f"/api/v1/keys/{record['id']}/rotate", {"overlap_s": 60})
    assert status == 201
    check_headers("/api/v1/keys/{key_id}/rotate", "POST", 201, headers)
    assert list(unnamed(models.KeyRotated.model_validate(rotated))) == []
    assert rotated["replaced"]["id"] == record["id"]
    assert rotated["replaced"]["replaced_by"] == rotated["id"]
    status, _, headers = gateway.call("GET", "/api/v1/keys/self", key=key)
    assert status == 200
    assert headers["Deprecation"].startswith("@")
    assert "GMT" in headers["Sunset"]
    check_headers("/api/v1/keys/self", "GET", 200, headers)


def test_a_model_that_is_not_loaded_answers_no_in_both_words(gateway: LiveGateway) -> None:
    gateway.call("POST", "/v2/repository/models/add_one/unload")
    try:
        status, answer, headers = gateway.call("GET", "/v2/models/add_one/ready")
        assert status == 503
        check_headers("/v2/models/{model}/ready", "GET", 503, headers)
        assert list(unnamed(models.ModelNotReady.model_validate(answer))) == []
        assert answer["ready"] is False
        assert answer["code"] == "model_not_ready"
        assert headers["X-Should-Retry"] == "true"
        assert int(headers["Retry-After"]) >= 1
    finally:
        gateway.call("POST", "/v2/repository/models/add_one/load")
