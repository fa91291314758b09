"""Who may do what: every cell of route and scope, on a live gateway.

The table is written here a second time, by hand, so that a route which loses its guard does not lose its test with it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

import pytest

from inferway_gateway.app import routes
from live import LiveGateway

SCOPES = ("infer", "read", "deploy", "admin")
PUBLIC = {("GET", "/v2/health/live"), ("GET", "/v2/health/ready")}
INFER_READ_ADMIN = {"infer", "read", "admin"}
READ_ADMIN = {"read", "admin"}
DEPLOY_ADMIN = {"deploy", "admin"}
READ_DEPLOY_ADMIN = {"read", "deploy", "admin"}
ANY = set(SCOPES)
OPENED_BY: dict[tuple[str, str], set[str]] = {
    ("GET", "/v2"): INFER_READ_ADMIN,
    ("GET", "/v2/models"): INFER_READ_ADMIN,
    ("GET", "/v2/models/stats"): READ_ADMIN,
    ("GET", "/v2/models/{model}"): INFER_READ_ADMIN,
    ("GET", "/v2/models/{model}/ready"): INFER_READ_ADMIN,
    ("GET", "/v2/models/{model}/config"): READ_ADMIN,
    ("GET", "/v2/models/{model}/stats"): READ_ADMIN,
    ("POST", "/v2/models/{model}/infer"): {"infer", "admin"},
    ("GET", "/v2/models/{model}/versions/{version}"): INFER_READ_ADMIN,
    ("GET", "/v2/models/{model}/versions/{version}/ready"): INFER_READ_ADMIN,
    ("GET", "/v2/models/{model}/versions/{version}/config"): READ_ADMIN,
    ("GET", "/v2/models/{model}/versions/{version}/stats"): READ_ADMIN,
    ("POST", "/v2/models/{model}/versions/{version}/infer"): {"infer", "admin"},
    ("POST", "/v2/repository/index"): READ_ADMIN,
    ("POST", "/v2/repository/models/{model}/load"): DEPLOY_ADMIN,
    ("POST", "/v2/repository/models/{model}/unload"): DEPLOY_ADMIN,
    ("POST", "/v2/repository/{repository}/index"): READ_ADMIN,
    ("POST", "/v2/repository/{repository}/models/{model}/load"): DEPLOY_ADMIN,
    ("POST", "/v2/repository/{repository}/models/{model}/unload"): DEPLOY_ADMIN,
    ("GET", "/api/v1/models"): READ_DEPLOY_ADMIN,
    ("GET", "/api/v1/models/{model}"): READ_DEPLOY_ADMIN,
    ("DELETE", "/api/v1/models/{model}"): DEPLOY_ADMIN,
    ("GET", "/api/v1/models/{model}/events"): READ_DEPLOY_ADMIN,
    ("POST", "/api/v1/models/{model}/versions"): DEPLOY_ADMIN,
    ("GET", "/api/v1/models/{model}/versions/{version}"): READ_DEPLOY_ADMIN,
    ("PATCH", "/api/v1/models/{model}/versions/{version}"): DEPLOY_ADMIN,
    ("DELETE", "/api/v1/models/{model}/versions/{version}"): DEPLOY_ADMIN,
    ("GET", "/api/v1/deployments"): READ_DEPLOY_ADMIN,
    ("GET", "/api/v1/deployments/{deployment_id}"): READ_DEPLOY_ADMIN,
    ("POST", "/api/v1/deployments/{deployment_id}/cancel"): DEPLOY_ADMIN,
    ("GET", "/api/v1/events"): READ_DEPLOY_ADMIN,
    ("GET", "/api/v1/models/{model}/aliases"): READ_DEPLOY_ADMIN,
    ("GET", "/api/v1/models/{model}/aliases/{alias}"): READ_DEPLOY_ADMIN,
    ("PUT", "/api/v1/models/{model}/aliases/{alias}"): DEPLOY_ADMIN,
    ("DELETE", "/api/v1/models/{model}/aliases/{alias}"): DEPLOY_ADMIN,
    ("POST", "/api/v1/models/{model}/aliases/{alias}/rollback"): DEPLOY_ADMIN,
    ("GET", "/api/v1/blobs/{digest}"): DEPLOY_ADMIN,
    ("PUT", "/api/v1/blobs/{digest}"): DEPLOY_ADMIN,
    ("POST", "/api/v1/registry/gc"): {"admin"},
    ("GET", "/api/v1/registry/check"): {"admin"},
    ("POST", "/v1/chat/completions"): {"infer", "admin"},
    ("POST", "/v1/completions"): {"infer", "admin"},
    ("POST", "/v1/embeddings"): {"infer", "admin"},
    ("POST", "/v1/rerank"): {"infer", "admin"},
    ("POST", "/v1/classify"): {"infer", "admin"},
    ("GET", "/v1/models"): INFER_READ_ADMIN,
    ("GET", "/v1/models/{id:path}"): INFER_READ_ADMIN,
    ("GET", "/metrics"): READ_ADMIN,
    ("GET", "/openapi.json"): ANY,
    ("GET", "/docs"): ANY,
    ("GET", "/api/v1/keys"): {"admin"},
    ("POST", "/api/v1/keys"): {"admin"},
    ("GET", "/api/v1/keys/self"): ANY,
    ("GET", "/api/v1/keys/{key_id}"): {"admin"},
    ("DELETE", "/api/v1/keys/{key_id}"): {"admin"},
    ("POST", "/api/v1/keys/{key_id}/rotate"): {"admin"},
}


def path_of(template: str) -> str:
    """A path whose objects do not exist, so that nothing is changed by who may change it."""
    for name, value in (
        ("model", "nobody"),
        ("version", "9"),
        ("repository", "other"),
        ("key_id", "000000000000"),
        ("alias", "stable"),
        ("digest", "0" * 64),
        ("id:path", "nobody/at/all"),
    ):
        template = template.replace("{" + name + "}", value)
    return template


@pytest.fixture(scope="module")
def keys(gateway: LiveGateway) -> Iterator[dict[str, str]]:
    made = {scope: gateway.make_key(scope, name=f"scope {scope}") for scope in SCOPES}
    yield made
    for key in made.values():
        gateway.call("DELETE", f"/api/v1/keys/{key.split('_')[2]}")


def test_the_table_names_every_route_and_no_other() -> None:
    assert {(next(iter(r.methods)), r.path) for r in routes()} == set(OPENED_BY) | PUBLIC


@pytest.mark.parametrize(("method", "path"), sorted(OPENED_BY), ids=" ".join)
def test_each_scope_opens_what_it_should_and_nothing_else(
    gateway: LiveGateway, keys: dict[str, str], method: str, path: str
) -> None:
    for scope in SCOPES:
        body = b"{}" if method == "POST" else None
        status, answer, _ = gateway.call(method, path_of(path), body, key=keys[scope])
        opened = scope in OPENED_BY[method, path]
        assert (status != 403) is opened, (scope, status, answer)
        assert status != 401
        if not opened:
            assert answer["code"] == "permission_denied"


@pytest.mark.parametrize(("method", "path"), sorted(OPENED_BY), ids=" ".join)
def test_no_route_is_open_without_a_good_key(gateway: LiveGateway, method: str, path: str) -> None:
    body = b"{}" if method == "POST" else None
    bodies = set()
    for key in (None, "wrong", "ifw_live_000000000000_" + "0" * 49):
        status, answer, headers = gateway.call(method, path_of(path), body, key=key)
        assert status == 401
        assert answer["code"] == "unauthenticated"
        assert headers["WWW-Authenticate"].startswith("Bearer")
        bodies.add(answer.get("detail") or answer.get("error"))
    assert len(bodies) <= 2  # none given, and none good: never why


@pytest.mark.parametrize(("method", "path"), sorted(PUBLIC), ids=" ".join)
def test_the_health_routes_are_open(gateway: LiveGateway, method: str, path: str) -> None:
    assert gateway.call(method, path, key=None)[0] == 200


@pytest.mark.parametrize(
    "path", ["/v2/models/{}", "/v2/models/{}/ready", "/v2/models/{}/config", "/v2/models/{}/stats"]
)
def test_a_model_outside_a_keys_patterns_looks_like_none(gateway: LiveGateway, path: str) -> None:
    key = gateway.make_key("infer", "read", models=["add_*"])
    foreign = gateway.call("GET", path.format("simple"), key=key)
    unknown = gateway.call("GET", path.format("nobody"), key=key)
    assert foreign[0] == unknown[0] == 404
    for answer in (foreign[1], unknown[1]):
        answer.pop("request_id")
    assert str(foreign[1]).replace("simple", "nobody") == str(unknown[1])
    assert gateway.call("GET", path.format("add_one"), key=key)[0] == 200


def test_a_key_infers_and_lists_within_its_patterns_only(gateway: LiveGateway) -> None:
    key = gateway.make_key("infer", "read", models=["add_*"])
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}
    assert gateway.call("POST", "/v2/models/add_one/infer", body, key=key)[0] == 200
    status, answer, _ = gateway.call("POST", "/v2/models/simple/infer", body, key=key)
    assert (status, answer["code"]) == (404, "model_not_found")
    assert gateway.call("GET", "/v2/models", key=key)[1] == {"models": ["add_one"]}
    assert {e["name"] for e in gateway.call("POST", "/v2/repository/index", b"", key=key)[1]} == {"add_one"}
    assert {s["name"] for s in gateway.call("GET", "/v2/models/stats", key=key)[1]["model_stats"]} == {"add_one"}
    assert set(re.findall(r'model="([^"]*)"', gateway.call("GET", "/metrics", key=key)[1])) == {"add_one"}
    assert 'model="simple"' in gateway.call("GET", "/metrics")[1]


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_a_browser_opens_the_documentation_with_the_key_as_password(gateway: LiveGateway, path: str) -> None:
    word = base64.b64encode(f"me:{gateway.admin_key}".encode()).decode()
    status, _, headers = gateway.call("GET", path, key=None, headers={"Authorization": f"Basic {word}"})
    assert status == 200
    assert "key" not in headers.get("Set-Cookie", "")
    status, _, headers = gateway.call("GET", path, key=None)
    assert status == 401
    assert "Basic" in " ".join(headers.get_all("WWW-Authenticate"))  # type: ignore[attr-defined]  # an email.message


def test_basic_opens_nothing_but_the_documentation(gateway: LiveGateway) -> None:
    word = base64.b64encode(f"me:{gateway.admin_key}".encode()).decode()
    for path in ("/v2", "/v2/models/simple", "/metrics", "/api/v1/keys"):
        assert gateway.call("GET", path, key=None, headers={"Authorization": f"Basic {word}"})[0] == 401


def test_both_key_headers_work(gateway: LiveGateway) -> None:
    assert gateway.call("GET", "/v2", key=None, headers={"X-API-Key": gateway.admin_key})[0] == 200
    assert gateway.call("GET", "/v2", key=None, headers={"authorization": f"bearer {gateway.admin_key}"})[0] == 200
