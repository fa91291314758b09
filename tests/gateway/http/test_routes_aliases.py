"""Aliases on a live gateway: set, read, rolled back; and what requests by them are answered with."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

import models
from inferway_gateway.store.catalog import open_catalog
from live import LiveGateway, run_gateway
from models import ModelFiles

LIMIT_S = 20.0
ALL = "version_policy { all {} }"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """Model ``m``: 1 adds one, 2 is the same and fails on negative numbers, 3 cannot be loaded, 4 takes other shapes,
    5 adds a little more than one."""
    root = tmp_path_factory.mktemp("aliases")
    versions = {
        1: models.add_one(4),
        2: models.fails_on_negative(4),
        3: next(iter(models.corrupt().values())),
        4: models.add_one(8),
        5: models.add_one(4, 1.5),
    }
    slow = {1: models.endless(4), 2: models.endless(4)}
    repository = models.write_repository(
        root / "models",
        {"m": ModelFiles(versions, config=ALL), "other": models.add_one(4), "stuck": ModelFiles(slow, config=ALL)},
    )
    environment = {"INFERWAY_STRICT_READINESS": "false", "INFERWAY_RUN_TIMEOUT_S": "5"}
    with run_gateway(repository, root / "state", environment=environment, wait=False) as running:
        until(lambda: running.call("GET", "/v2/models/m/versions/5/ready")[0] == 200)
        until(lambda: running.call("GET", "/v2/models/stuck/versions/2/ready")[0] == 200)
        yield running


@pytest.fixture(autouse=True)
def no_aliases(served: LiveGateway) -> Iterator[None]:
    yield
    for model in ("m", "stuck", "other"):
        for alias in served.call("GET", f"/api/v1/models/{model}/aliases")[1]["aliases"]:
            assert served.call("DELETE", f"/api/v1/models/{model}/aliases/{alias['alias']}")[0] == 204


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def put(gateway: LiveGateway, body: Any, *, alias: str = "stable", model: str = "m", status: int = 200) -> Any:
    got, answer, _ = gateway.call("PUT", f"/api/v1/models/{model}/aliases/{alias}", body)
    assert got == status, answer
    return answer


def get(gateway: LiveGateway, alias: str = "stable", model: str = "m") -> Any:
    status, answer, _ = gateway.call("GET", f"/api/v1/models/{model}/aliases/{alias}")
    assert status == 200, answer
    return answer


def body(*row: float) -> bytes:
    return json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, len(row)], "data": list(row)}]}
    ).encode()


ROW = body(1, 2, 3, 4)
NEGATIVE = body(-1, 2, 3, 4)


def infer(
    gateway: LiveGateway,
    target: str = "m",
    data: bytes = ROW,
    *,
    headers: Mapping[str, str] | None = None,
    short: bool = True,
    key: str | None = None,
) -> tuple[int, Any, http.client.HTTPMessage]:
    """One request for inference.

    Args:
        short: as programs send it, which is answered at once; else with a header that makes it go the long way.
    """
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    try:
        connection.putrequest("POST", f"/v2/models/{target}/infer", skip_accept_encoding=True)
        sent = {
            "Authorization": f"Bearer {key or gateway.admin_key}",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }
        if not short:
            sent["Accept-Encoding"] = "identity"
        for name, value in sent.items():
            connection.putheader(name, value)
        connection.endheaders(data)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


both_ways = pytest.mark.parametrize("short", [True, False], ids=["at once", "the long way"])


# ------------------------------------------------------------------ requests


@both_ways
def test_every_answer_names_the_version_that_gave_it(served: LiveGateway, short: bool) -> None:
    for _ in range(2):  # the first request of a version is never answered at once
        for target, version in (("m", "5"), ("m/versions/1", "1"), ("other", "1")):
            status, answer, headers = infer(served, target, short=short)
            assert (status, answer["model_version"], headers.get("Inferway-Model-Version")) == (200, version, version)
            assert headers.get("Inferway-Fallback") is None
    status, _, headers = infer(served, "m/versions/2", NEGATIVE, short=short)
    assert (status, headers.get("Inferway-Model-Version")) == (500, "2")
    status, _, headers = infer(served, "m/versions/2", b"{}", short=short)
    assert (status, headers.get("Inferway-Model-Version")) == (400, "2")


@both_ways
def test_names_lead_to_the_versions_that_aliases_name(served: LiveGateway, short: bool) -> None:
    put(served, {"version": 1})
    put(served, {"version": 2}, alias="canary")
    for target, version in (
        ("m", "1"),
        ("m@stable", "1"),
        ("m@canary", "2"),
        ("m%40canary", "2"),
        ("m/versions/5", "5"),
    ):
        status, answer, headers = infer(served, target, short=short)
        assert (status, headers.get("Inferway-Model-Version"), answer["model_name"]) == (200, version, "m"), target
    for target, code in (
        ("m@nobody", "alias_not_found"),
        ("m@Stable", "model_not_found"),
        ("m@stable/versions/1", "version_not_found"),
    ):
        status, answer, _ = infer(served, target, short=short)
        assert (status, answer["code"]) == (404, code)


def test_the_other_routes_of_a_model_know_aliases_too(served: LiveGateway) -> None:
    put(served, {"weights": {"1": 40, "2": 60}})
    put(served, {"version": 4}, alias="canary")
    for suffix in ("", "/config", "/stats", "/ready"):
        for target in ("m@stable", "m@canary"):
            status, answer, _ = served.call("GET", f"/v2/models/{target}{suffix}")
            assert status == 200, answer
        assert served.call("GET", f"/v2/models/m@nobody{suffix}")[1]["code"] == "alias_not_found"
        assert served.call("GET", f"/v2/models/m@canary/versions/4{suffix}")[1]["code"] == "version_not_found"
    shapes = {t: served.call("GET", f"/v2/models/{t}")[1]["inputs"][0]["shape"][1] for t in ("m@stable", "m@canary")}
    assert shapes == {"m@stable": 4, "m@canary": 8}
    assert served.call("GET", "/v2/models/m")[1]["properties"]["version"] == "2"


def test_a_keys_patterns_are_held_against_the_bare_name(served: LiveGateway) -> None:
    put(served, {"version": 1})
    mine, foreign = served.make_key("infer", models=["m"]), served.make_key("infer", models=["oth*"])
    for _ in range(2):
        for target in ("m", "m@stable"):
            assert infer(served, target, key=mine)[0] == 200
            status, answer, _ = infer(served, target, key=foreign)
            assert (status, answer["code"]) == (404, "model_not_found")
        assert served.call("GET", "/v2/models/m@stable/ready", key=foreign)[0] == 404
        assert served.call("GET", "/v2/models/m@stable/ready", key=mine)[0] == 200


def test_shares_are_kept_whichever_way_requests_are_answered(served: LiveGateway) -> None:
    put(served, {"weights": {"1": 75, "5": 25}})
    counts = Counter(infer(served, short=i % 3 != 0)[2]["Inferway-Model-Version"] for i in range(80))
    assert abs(counts["5"] - 20) <= 4
    traffic = get(served)["traffic"]
    assert {v: t["requests"] for v, t in traffic.items()} == {"1": counts["1"], "5": counts["5"]}


def test_one_user_sees_one_version_while_the_canary_grows(served: LiveGateway) -> None:
    users = [f"user{i}" for i in range(60)]

    def versions(short: bool) -> dict[str, str]:
        return {u: infer(served, headers={"X-User": u}, short=short)[2]["Inferway-Model-Version"] for u in users}

    put(served, {"weights": {"1": 80, "5": 20}, "sticky": "header:X-User"})
    few = versions(True)
    assert few == versions(False)
    assert set(few.values()) == {"1", "5"}
    put(served, {"weights": {"1": 40, "5": 60}, "sticky": "header:X-User"})
    more = versions(True)
    assert all(more[user] == "5" for user, version in few.items() if version == "5")
    assert Counter(more.values())["5"] > Counter(few.values())["5"]


# ------------------------------------------------------------------ fallback


@both_ways
def test_a_fallback_answers_where_the_version_fails_and_one_that_does_not_fit_is_passed_over(
    served: LiveGateway, short: bool
) -> None:
    put(served, {"version": 2, "fallback": [4, 3, 1]})
    for _ in range(2):
        status, answer, headers = infer(served, data=NEGATIVE, short=short)
        assert (status, answer["model_version"]) == (200, "1")
        assert answer["outputs"][0]["data"] == [0, 3, 4, 5]
        assert headers.get_all("Inferway-Model-Version") == ["1"]
        assert headers.get("Inferway-Fallback") == "2"
        status, _, headers = infer(served, short=short)
        assert (status, headers.get("Inferway-Model-Version"), headers.get("Inferway-Fallback")) == (200, "2", None)
    assert get(served)["traffic"]["2"] | {"p95_ms": None} == {
        "requests": 4, "errors": 2, "fallbacks": 2, "p95_ms": None,
        "compared": 0, "differed": 0, "failed": 0, "dropped": 0, "largest_difference": 0,
    }  # fmt: skip


@both_ways
def test_a_fallback_answers_for_a_version_that_is_not_loaded(served: LiveGateway, short: bool) -> None:
    put(served, {"version": 3, "fallback": [1]})
    status, _, headers = infer(served, short=short)
    assert (status, headers.get("Inferway-Model-Version"), headers.get("Inferway-Fallback")) == (200, "1", "3")


@both_ways
def test_the_callers_own_error_is_not_asked_about_twice(served: LiveGateway, short: bool) -> None:
    put(served, {"version": 2, "fallback": [4, 1]})
    status, answer, headers = infer(served, data=body(*range(8)), short=short)
    assert (status, answer["code"], headers.get("Inferway-Model-Version")) == (400, "invalid_tensor", "2")
    traffic = get(served)["traffic"]["2"]
    assert (traffic["requests"], traffic["errors"], traffic["fallbacks"]) == (1, 0, 0)


@both_ways
def test_where_all_fail_the_answer_tells_of_the_version_that_was_chosen(served: LiveGateway, short: bool) -> None:
    put(served, {"version": 2, "fallback": [4, 3]})
    status, answer, headers = infer(served, data=NEGATIVE, short=short)
    assert (status, answer["code"], headers.get("Inferway-Model-Version")) == (500, "model_failed", "2")
    put(served, {"version": 3, "fallback": [4]})
    status, answer, headers = infer(served, short=short)
    assert (status, answer["code"], headers.get("Inferway-Model-Version")) == (503, "model_not_ready", None)


def test_no_fallback_begins_after_the_callers_time(served: LiveGateway) -> None:
    put(served, {"version": 1, "fallback": [2]}, model="stuck")
    began = time.monotonic()
    status, answer, _ = infer(served, "stuck", headers={"Inferway-Timeout-Ms": "150"})
    assert (status, answer["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - began < 3


def test_a_fallback_answers_compressed_and_binary_requests_too(served: LiveGateway) -> None:
    put(served, {"version": 2, "fallback": [1]})
    head = json.dumps(
        {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}],
            "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
        }
    ).encode()
    binary = bytes.fromhex("000080bf") + bytes(12)
    status, answer, headers = infer(
        served, data=head + binary, headers={"Inference-Header-Content-Length": str(len(head))}
    )
    assert (status, headers.get("Inferway-Fallback")) == (200, "2")
    assert answer["outputs"][0]["data"] == [0, 1, 1, 1]


# ------------------------------------------------------------------ shadow


def test_a_shadow_is_compared_after_the_answer_and_never_answers(served: LiveGateway) -> None:
    put(served, {"version": 1, "shadow": {"version": 5, "rtol": 0, "atol": 0.25}})
    for i in range(10):
        status, answer, _ = infer(served, short=i % 2 == 0)
        assert (status, answer["model_version"]) == (200, "1")
    until(lambda: get(served)["traffic"]["5"]["compared"] == 10)
    shadow = get(served)["traffic"]["5"]
    assert (shadow["requests"], shadow["differed"], shadow["largest_difference"]) == (0, 10, 0.5)
    put(served, {"version": 1, "shadow": {"version": 4}})
    assert infer(served)[0] == 200
    until(lambda: get(served)["traffic"]["4"]["failed"] == 1)


# ------------------------------------------------------------------ the routes


def test_an_alias_is_set_read_listed_rolled_back_and_deleted(served: LiveGateway) -> None:
    first = put(served, {"version": 1})
    assert first["weights"] == {"1": 100}
    assert first["previous"] is None
    wanted = {
        "weights": {"1": 95, "5": 5},
        "sticky": "header:X-User",
        "shadow": {"version": 4, "share": 0.5, "rtol": 0.1, "atol": 0.2},
        "fallback": [2],
        "guard": {"window_s": 30, "min_requests": 10, "max_error_rate": 0.1, "max_p95_ratio": 3},
    }
    second = put(served, {**wanted, "expected_revision": first["revision"]})
    assert {name: second[name] for name in wanted} == wanted
    assert second["previous"]["weights"] == {"1": 100}
    assert second["revision"] > first["revision"]
    assert get(served) | {"traffic": None} == second | {"traffic": None}
    put(served, {"version": 2}, alias="canary")
    listed = served.call("GET", "/api/v1/models/m/aliases")[1]["aliases"]
    assert [alias["alias"] for alias in listed] == ["canary", "stable"]
    status, back, _ = served.call("POST", "/api/v1/models/m/aliases/stable/rollback")
    assert (status, back["weights"], back["previous"]["weights"]) == (200, {"1": 100}, wanted["weights"])
    assert infer(served)[2]["Inferway-Model-Version"] == "1"
    status, again, _ = served.call("POST", "/api/v1/models/m/aliases/stable/rollback")
    assert {name: again[name] for name in wanted} == wanted
    assert served.call("DELETE", "/api/v1/models/m/aliases/stable")[0] == 204
    assert infer(served)[2]["Inferway-Model-Version"] == "5"
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/rollback")):
        status, answer, _ = served.call(method, "/api/v1/models/m/aliases/stable" + path)
        assert (status, answer["code"]) == (404, "alias_not_found")


async def test_what_was_done_with_an_alias_is_kept_with_who_did_it(served: LiveGateway) -> None:
    key = served.make_key("deploy")
    for method, path, content in (
        ("PUT", "", {"version": 1}),
        ("PUT", "", {"version": 2}),
        ("POST", "/rollback", None),
        ("DELETE", "", None),
    ):
        assert served.call(method, f"/api/v1/models/m/aliases/told{path}", content, key=key)[0] in (200, 204)
    async with open_catalog(database_url=f"sqlite:///{served.state_dir / 'inferway.db'}") as catalog:
        events = [event for event in await catalog.events("m") if event.alias == "told"]
    assert [(e.kind, e.version) for e in events] == [
        ("alias_deleted", None),
        ("rolled_back", 1),
        ("alias_set", 2),
        ("alias_set", 1),
    ]
    assert {event.by for event in events} == {key.split("_")[2]}


def test_a_change_that_expects_another_revision_changes_nothing(served: LiveGateway) -> None:
    first = put(served, {"version": 1, "expected_revision": 0})
    answer = put(served, {"version": 2, "expected_revision": first["revision"] + 1}, status=409)
    assert answer["code"] == "conflict"
    assert put(served, {"version": 2, "expected_revision": 0}, status=409)["code"] == "conflict"
    assert get(served)["weights"] == {"1": 100}


def test_an_alias_that_never_was_anything_else_cannot_be_rolled_back(served: LiveGateway) -> None:
    put(served, {"version": 1})
    status, answer, _ = served.call("POST", "/api/v1/models/m/aliases/stable/rollback")
    assert (status, answer["code"]) == (409, "conflict")
    assert "never was anything else" in answer["detail"]


@pytest.mark.parametrize(
    ("content", "status", "code", "says"),
    [
        ({}, 400, "invalid_parameter", "got neither"),
        ({"version": 1, "weights": {"1": 100}}, 400, "invalid_parameter", "got both"),
        ({"weights": {"1": 95, "2": 4}}, 400, "invalid_parameter", "raise one of them by 1"),
        ({"weights": {"one": 100}}, 400, "invalid_parameter", "weights"),
        ({"weights": {"1": "many"}}, 400, "invalid_parameter", "weights"),
        ({"version": 1, "sticky": "header:"}, 400, "invalid_parameter", "sticky"),
        ({"version": 1, "shadow": {"version": 1}}, 400, "invalid_parameter", "another version than 1"),
        ({"version": 1, "fallback": [1]}, 400, "invalid_parameter", "other versions than 1"),
        ({"version": 1, "guard": {"window_s": 0}}, 400, "invalid_parameter", "guard.window_s"),
        ({"version": 9}, 404, "version_not_found", "can name 1, 2, 3, 4, 5; deploy version 9 first"),
        ({"version": 1, "fallback": [9]}, 404, "version_not_found", "no version 9"),
        ({"version": 1, "surprise": 1}, 400, "invalid_parameter", "surprise"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_what_an_alias_cannot_be_is_refused(
    served: LiveGateway, content: Any, status: int, code: str, says: str
) -> None:
    answer = put(served, content, status=status)
    assert answer["code"] == code
    assert says in answer["detail"]
    assert served.call("GET", "/api/v1/models/m/aliases")[1] == {"aliases": []}


def test_models_and_aliases_that_do_not_exist_are_not_found(served: LiveGateway) -> None:
    assert put(served, {"version": 1}, model="nobody", status=404)["code"] == "model_not_found"
    assert put(served, {"version": 1}, alias="Stable", status=400)["code"] == "invalid_parameter"
    for method, path in (("GET", ""), ("GET", "/stable"), ("DELETE", "/stable"), ("POST", "/stable/rollback")):
        status, answer, _ = served.call(method, "/api/v1/models/nobody/aliases" + path)
        assert (status, answer["code"]) == (404, "model_not_found")


def test_a_key_changes_no_aliases_of_models_that_it_does_not_see(served: LiveGateway) -> None:
    key = served.make_key("deploy", models=["other"])
    put(served, {"version": 1})
    for method, path, content in (
        ("GET", "", None),
        ("GET", "/stable", None),
        ("PUT", "/stable", {"version": 2}),
        ("DELETE", "/stable", None),
        ("POST", "/stable/rollback", None),
    ):
        status, answer, _ = served.call(method, f"/api/v1/models/m/aliases{path}", content, key=key)
        assert (status, answer["code"]) == (404, "model_not_found")
    assert get(served)["weights"] == {"1": 100}
