"""A live gateway's answers hold what the contract names and nothing that it does not: members, headers, statuses."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from inferway_contract import codes, document, models, names
from live import LiveGateway
from models import add_one

CONTRACT = document.load()
SIMPLE = {
    "inputs": [
        {"name": name, "datatype": "INT32", "shape": [1, 16], "data": list(range(16))} for name in ("INPUT0", "INPUT1")
    ]
}
CHAT = {"model": "simple", "messages": [{"role": "user", "content": "Hi"}]}
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
    ("GET", "/v1/models", None, 200, models.OpenAIModelList, "/v1/models"),
    ("GET", "/v1/models/simple", None, 200, models.OpenAIModel, "/v1/models/{id}"),
    ("GET", "/v1/models/simple/versions/2", None, 200, models.OpenAIModel, "/v1/models/{id}"),
    ("GET", "/v1/models/some/where/else", None, 404, models.OpenAIError, "/v1/models/{id}"),
    ("POST", "/v1/chat/completions", {}, 400, models.OpenAIError, "/v1/chat/completions"),
    ("POST", "/v1/chat/completions", CHAT, 400, models.OpenAIError, "/v1/chat/completions"),
    ("POST", "/v1/chat/completions", {**CHAT, "model": "nobody"}, 404, models.OpenAIError, "/v1/chat/completions"),
    ("POST", "/v1/completions", {"model": "simple", "prompt": "x"}, 400, models.OpenAIError, "/v1/completions"),
    ("POST", "/v1/embeddings", {"model": "simple", "input": "x"}, 400, models.OpenAIError, "/v1/embeddings"),
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


# ---- the life of a deployed model, each answer held against the contract


BLOB, MODEL = "/api/v1/blobs/{digest}", "/api/v1/models/{model}"
VERSIONS, VERSION = MODEL + "/versions", MODEL + "/versions/{version}"
ALIASES, ALIAS = MODEL + "/aliases", MODEL + "/aliases/{alias}"
DEPLOYMENT = "/api/v1/deployments/{deployment_id}"


def said(
    gateway: LiveGateway,
    method: str,
    template: str,
    status: int,
    shape: type[BaseModel] | None,
    body: Any = None,
    /,
    *,
    query: str = "",
    key: str = "",
    headers: Mapping[str, str] | None = None,
    **parameters: object,
) -> Any:
    """The body of an answer that is as the contract describes it, in its members, headers and status."""
    path = template.format(**parameters) + query
    got, answer, fields = gateway.call(method, path, body, key=key, headers=headers)
    assert got == status, answer
    named = {name.lower() for name in described(template, method, status)["headers"]}
    if status == 204:
        assert {name.lower() for name in fields} <= GENERAL | named
    else:
        check_headers(template, method, status, fields)
    for name, header in described(template, method, status)["headers"].items():
        if "$ref" in header:
            header = CONTRACT["components"]["headers"][header["$ref"].rpartition("/")[2]]
        assert name in fields or not header.get("required"), name
    if shape is not None:
        assert list(unnamed(shape.model_validate(answer))) == []
    return answer


def upload(gateway: LiveGateway, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    said(gateway, "PUT", BLOB, 201, models.BlobStatus, content, digest=digest)
    return {"path": "model.onnx", "digest": digest, "size": len(content)}


def ended(gateway: LiveGateway, deployment: dict[str, Any]) -> dict[str, Any]:
    """Wait by long polls until a deployment has ended."""
    end = time.monotonic() + 60
    while deployment["state"] == "running":
        assert time.monotonic() < end
        query = "?wait=10" + (f"&step={deployment['step']}" if deployment["step"] else "")
        where: dict[str, Any] = {"deployment_id": deployment["id"]}
        deployment = said(gateway, "GET", DEPLOYMENT, 200, models.Deployment, query=query, **where)
    return deployment


def deploy(gateway: LiveGateway, name: str, content: bytes, **body: Any) -> dict[str, Any]:
    request = {"files": [upload(gateway, content)], **body}
    return ended(gateway, said(gateway, "POST", VERSIONS, 202, models.Deployment, request, model=name))


@pytest.fixture(scope="module")
def churn(gateway: LiveGateway) -> Iterator[str]:
    """A model that was deployed in two versions; ``stable`` points at the first."""
    name = "contract_churn"
    first = deploy(gateway, name, add_one(4), labels={"team": "growth"}, metadata={"accuracy": 0.93})
    assert (first["state"], first["version"], first["reused"]) == ("succeeded", 1, False), first
    second = deploy(gateway, name, add_one(4, 2.0), alias=None)
    assert (second["state"], second["version"]) == ("succeeded", 2), second
    yield name
    gateway.call("DELETE", MODEL.format(model=name))


ONE_ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0] * 4}]}
INFER = "/v2/models/{model}/infer"


def test_an_upload_in_pieces_is_as_the_contract_describes_it(gateway: LiveGateway) -> None:
    content = b"in pieces " * 100
    where: dict[str, Any] = {"digest": hashlib.sha256(content).hexdigest()}
    length = {"Upload-Length": str(len(content))}
    said(gateway, "GET", BLOB, 404, models.Problem, **where)
    part = said(gateway, "PUT", BLOB, 202, models.BlobStatus, content[:300], headers=length, **where)
    assert part == {"digest": where["digest"], "size": 1000, "received": 300, "complete": False}
    assert said(gateway, "GET", BLOB, 200, models.BlobStatus, **where)["received"] == 300
    wrong = {"Upload-Offset": "200", **length}
    answer = said(gateway, "PUT", BLOB, 409, models.UploadConflict, content[200:], headers=wrong, **where)
    assert (answer["code"], answer["received"]) == ("upload_conflict", 300)
    right = {"Upload-Offset": "300", **length}
    whole = said(gateway, "PUT", BLOB, 201, models.BlobStatus, content[300:], headers=right, **where)
    assert whole["complete"] is True
    answer = said(gateway, "PUT", BLOB, 400, models.Problem, b"other", digest="0" * 64)
    assert answer["code"] == "digest_mismatch"
    assert said(gateway, "GET", BLOB, 400, models.Problem, digest="0" * 63)["code"] == "invalid_parameter"
    other = gateway.make_key("deploy")
    assert said(gateway, "GET", BLOB, 404, models.Problem, key=other, **where)["code"] == "blob_not_found"


def test_a_deployed_model_is_listed_as_the_contract_describes_it(gateway: LiveGateway, churn: str) -> None:
    listed = said(gateway, "GET", "/api/v1/models", 200, models.CatalogModelList)["models"]
    assert {m["source"] for m in listed} == {"catalog", "repository"}
    one = said(gateway, "GET", MODEL, 200, models.CatalogModel, model=churn)
    assert one in listed or one["name"] in {m["name"] for m in listed}
    assert [v["version"] for v in one["versions"]] == [1, 2]
    assert [a["alias"] for a in one["aliases"]] == ["stable"]
    version = said(gateway, "GET", VERSION, 200, models.ModelVersion, model=churn, version=1)
    assert (version["labels"], version["metadata"], version["kind"]) == ({"team": "growth"}, {"accuracy": 0.93}, "onnx")
    folder = said(gateway, "GET", VERSION, 200, models.ModelVersion, model="simple", version=1)
    assert (folder["digest"], folder["created_at"], folder["files"]) == (None, None, [])
    change = {"labels": {"stage": "canary"}, "pinned": True}
    changed = said(gateway, "PATCH", VERSION, 200, models.ModelVersion, change, model=churn, version=2)
    assert (changed["labels"], changed["pinned"]) == ({"stage": "canary"}, True)
    said(gateway, "PATCH", VERSION, 400, models.Problem, {"files": []}, model=churn, version=2)
    said(gateway, "PATCH", VERSION, 404, models.Problem, {"pinned": True}, model=churn, version=9)
    said(gateway, "GET", VERSION, 404, models.Problem, model=churn, version=9)
    said(gateway, "GET", MODEL, 404, models.Problem, model="nobody")


def test_the_same_content_is_the_same_version(gateway: LiveGateway, churn: str) -> None:
    again = deploy(gateway, churn, add_one(4), labels={"team": "other"})
    assert (again["state"], again["version"], again["reused"]) == ("succeeded", 1, True)


def test_aliases_are_as_the_contract_describes_them(gateway: LiveGateway, churn: str) -> None:
    canary: dict[str, Any] = {"model": churn, "alias": "canary"}
    body: dict[str, Any] = {
        "weights": {"1": 95, "2": 5}, "sticky": "header:X-User", "guard": {"max_error_rate": 0.5},
        "shadow": None, "fallback": [], "expected_revision": 0,
    }  # fmt: skip
    made = said(gateway, "PUT", ALIAS, 200, models.Alias, body, **canary)
    assert (made["weights"], made["previous"], made["guard"]["min_requests"]) == ({"1": 95.0, "2": 5.0}, None, 50)
    assert said(gateway, "PUT", ALIAS, 409, models.Problem, body, **canary)["code"] == "conflict"
    moved = said(
        gateway, "PUT", ALIAS, 200, models.Alias, {"version": 2, "expected_revision": made["revision"]}, **canary
    )
    assert moved["previous"]["weights"] == {"1": 95.0, "2": 5.0}
    status, _, fields = gateway.call("POST", f"/v2/models/{churn}@canary/infer", ONE_ROW)
    assert (status, fields["Inferway-Model-Version"]) == (200, "2")
    check_headers(INFER, "POST", 200, fields)
    assert gateway.call("GET", f"/v2/models/{churn}@canary/ready")[0] == 200
    shown = said(gateway, "GET", ALIAS, 200, models.Alias, **canary)
    assert shown["traffic"]["2"]["requests"] >= 1
    assert said(gateway, "DELETE", VERSION, 409, models.Problem, model=churn, version=2)["code"] == "conflict"
    back = said(gateway, "POST", ALIAS + "/rollback", 200, models.Alias, **canary)
    assert back["weights"] == {"1": 95.0, "2": 5.0}
    assert [a["alias"] for a in said(gateway, "GET", ALIASES, 200, models.AliasList, model=churn)["aliases"]] == [
        "canary",
        "stable",
    ]
    for wrong in ({}, {"version": 1, "weights": {"1": 100}}, {"weights": {"1": 50}}, {"versions": 1}):
        said(gateway, "PUT", ALIAS, 400, models.Problem, wrong, **canary)
    missing = said(gateway, "PUT", ALIAS, 404, models.Problem, {"version": 9}, **canary)
    assert missing["code"] == "version_not_found"
    said(gateway, "DELETE", ALIAS, 204, None, **canary)
    assert said(gateway, "GET", ALIAS, 404, models.Problem, **canary)["code"] == "alias_not_found"
    assert said(gateway, "POST", ALIAS + "/rollback", 404, models.Problem, **canary)["code"] == "alias_not_found"
    status, answer, _ = gateway.call("POST", f"/v2/models/{churn}@canary/infer", ONE_ROW)
    assert (status, answer["code"]) == (404, "alias_not_found")
    status, answer, _ = gateway.call("POST", f"/v2/models/{churn}@stable/versions/1/infer", ONE_ROW)
    assert (status, answer["code"]) == (404, "version_not_found")


def test_events_and_deployments_are_as_the_contract_describes_them(gateway: LiveGateway, churn: str) -> None:
    events = "/api/v1/events"
    first = said(gateway, "GET", MODEL + "/events", 200, models.EventList, query="?limit=2", model=churn)
    assert first["has_more"] is True
    assert len(first["events"]) == 2
    query = f"?limit=1000&before={first['events'][-1]['id']}&model={churn}"
    rest = said(gateway, "GET", events, 200, models.EventList, query=query)
    assert rest["has_more"] is False
    kinds = {event["kind"] for event in (*first["events"], *rest["events"])}
    assert {"deployment_started", "deployment_succeeded"} <= kinds
    said(gateway, "GET", events, 400, models.Problem, query="?limit=0")
    said(gateway, "GET", events, 400, models.Problem, query="?before=x")
    said(gateway, "GET", MODEL + "/events", 404, models.Problem, model="nobody")
    listed = said(gateway, "GET", "/api/v1/deployments", 200, models.DeploymentList, query=f"?model={churn}")
    assert {d["model"] for d in listed["deployments"]} == {churn}
    one: dict[str, Any] = {"deployment_id": listed["deployments"][0]["id"]}
    assert said(gateway, "POST", DEPLOYMENT + "/cancel", 200, models.Deployment, **one)["state"] == "succeeded"
    said(gateway, "GET", DEPLOYMENT, 404, models.Problem, deployment_id="nothing")
    said(gateway, "GET", DEPLOYMENT, 400, models.Problem, query="?wait=31", **one)
    said(gateway, "GET", DEPLOYMENT, 400, models.Problem, query="?step=done", **one)


def test_a_deployment_that_fails_says_where_and_why(gateway: LiveGateway) -> None:
    name = "contract_broken"
    failed = deploy(gateway, name, b"no model")
    assert failed["state"] == "failed"
    assert failed["failed_step"] in get_args(names.Step)
    assert failed["error"]["code"] in codes.ERRORS
    assert failed["error"]["message"]
    assert gateway.call("POST", f"/v2/models/{name}/infer", ONE_ROW)[0] == 404


def test_a_deployment_is_refused_as_the_contract_describes_it(gateway: LiveGateway, churn: str) -> None:
    missing = {"files": [{"path": "model.onnx", "digest": "1" * 64, "size": 1}]}
    answer = said(gateway, "POST", VERSIONS, 404, models.Problem, missing, model=churn)
    assert answer["code"] == "blob_not_found"
    assert "1" * 64 in answer["detail"]
    assert "model.onnx" in answer["detail"]
    there = {"files": [upload(gateway, add_one(4))]}
    assert said(gateway, "POST", VERSIONS, 409, models.Problem, there, model="simple")["code"] == "conflict"
    inprocess = {**there, "isolation": "inprocess"}
    answer = said(gateway, "POST", VERSIONS, 403, models.Problem, inprocess, model=churn)
    assert answer["code"] == "permission_denied"
    said(gateway, "POST", VERSIONS, 400, models.Problem, {"files": []}, model=churn)
    said(gateway, "POST", VERSIONS, 400, models.Problem, {**there, "wait": True}, model=churn)
    said(gateway, "POST", VERSIONS, 403, models.Problem, there, model=churn, key=gateway.make_key("read"))


def test_the_registry_is_looked_after_as_the_contract_describes_it(gateway: LiveGateway, churn: str) -> None:
    report = said(gateway, "GET", "/api/v1/registry/check", 200, models.RegistryReport)
    assert report["ok"] is True
    assert report["checked"] >= 2
    said(gateway, "POST", "/api/v1/registry/gc", 200, models.GarbageReport)
    said(gateway, "POST", "/api/v1/registry/gc", 403, models.Problem, key=gateway.make_key("deploy"))
    said(gateway, "GET", VERSION, 200, models.ModelVersion, model=churn, version=1)


def test_a_deleted_model_is_gone_and_its_events_stay(gateway: LiveGateway) -> None:
    name = "contract_gone"
    assert deploy(gateway, name, add_one(4, 7.0))["state"] == "succeeded"
    assert gateway.call("POST", f"/v2/models/{name}/infer", ONE_ROW)[0] == 200
    said(gateway, "DELETE", MODEL, 204, None, model=name)
    said(gateway, "GET", MODEL, 404, models.Problem, model=name)
    said(gateway, "DELETE", MODEL, 404, models.Problem, model=name)
    assert gateway.call("POST", f"/v2/models/{name}/infer", ONE_ROW)[0] == 404
    said(gateway, "GET", MODEL + "/events", 200, models.EventList, model=name)
    assert said(gateway, "DELETE", MODEL, 409, models.Problem, model="simple")["code"] == "conflict"
