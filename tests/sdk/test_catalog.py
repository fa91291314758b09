"""Versions, aliases and events of ``client.models``: what is asked, and what is made of the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import inferway
from lifecycle import alias_record, event_record, problem, version_record
from scripted import Answer, ScriptedServer, Side, as_json


@pytest.fixture
def client(side: Side, server: ScriptedServer) -> Any:
    return side.client(server.url, retry=None)


def model_record(name: str = "churn", *versions: int) -> dict[str, Any]:
    return {
        "name": name,
        "source": "catalog",
        "versions": [version_record(name, version) for version in versions],
        "aliases": [alias_record(name, "stable", {"1": 100})],
    }


ASKED: dict[str, tuple[Callable[[Any], Any], str, Any, Any]] = {
    "describe": (lambda c: c.models.describe("churn"), "GET /models/churn", None, model_record("churn", 1)),
    "versions": (lambda c: c.models.versions("churn"), "GET /models/churn", None, model_record("churn", 1)),
    "catalog": (lambda c: c.models.catalog(), "GET /models", None, {"models": [model_record()]}),
    "version": (
        lambda c: c.models.version("churn", 3),
        "GET /models/churn/versions/3",
        None,
        version_record("churn", 3),
    ),
    "update": (
        lambda c: c.models.update("churn", 3, labels={"a": "b"}, pinned=False),
        "PATCH /models/churn/versions/3",
        {"labels": {"a": "b"}, "pinned": False},
        version_record("churn", 3),
    ),
    "metadata": (
        lambda c: c.models.update("churn", 3, metadata={}),
        "PATCH /models/churn/versions/3",
        {"metadata": {}},
        version_record("churn", 3),
    ),
    "delete_version": (lambda c: c.models.delete("churn", 3), "DELETE /models/churn/versions/3", None, None),
    "delete_model": (lambda c: c.models.delete("churn"), "DELETE /models/churn", None, None),
    "deployments": (
        lambda c: c.models.deployments("churn", limit=5),
        "GET /deployments?model=churn&limit=5",
        None,
        {"deployments": []},
    ),
    "aliases": (lambda c: c.models.aliases("churn"), "GET /models/churn/aliases", None, {"aliases": []}),
    "alias": (
        lambda c: c.models.alias("churn", "canary"),
        "GET /models/churn/aliases/canary",
        None,
        alias_record("churn", "canary", {"2": 100}),
    ),
    "set_one": (
        lambda c: c.models.set_alias("churn", "stable", 3),
        "PUT /models/churn/aliases/stable",
        {"version": 3, "sticky": "none", "fallback": []},
        alias_record("churn", "stable", {"3": 100}),
    ),
    "set_weights": (
        lambda c: c.models.set_alias(
            "churn", "stable", {3: 95, 4: 5}, sticky="header:X-User", shadow=5, fallback=[2, 1], guard=True,
            expected_revision=7,
        ),
        "PUT /models/churn/aliases/stable",
        {
            "weights": {"3": 95, "4": 5}, "sticky": "header:X-User", "shadow": {"version": 5}, "fallback": [2, 1],
            "guard": {}, "expected_revision": 7,
        },
        alias_record("churn", "stable", {"3": 95, "4": 5}),
    ),
    "set_bounds": (
        lambda c: c.models.set_alias(
            "churn", "stable", {"3": 100}, shadow={"version": 5, "share": 0.1}, fallback=2, guard={"window_s": 30}
        ),
        "PUT /models/churn/aliases/stable",
        {
            "weights": {"3": 100}, "sticky": "none", "shadow": {"version": 5, "share": 0.1}, "fallback": [2],
            "guard": {"window_s": 30},
        },
        alias_record("churn", "stable", {"3": 100}),
    ),
    "delete_alias": (
        lambda c: c.models.delete_alias("churn", "canary"),
        "DELETE /models/churn/aliases/canary",
        None,
        None,
    ),
    "rollback": (
        lambda c: c.models.rollback("churn"),
        "POST /models/churn/aliases/stable/rollback",
        None,
        alias_record("churn", "stable", {"2": 100}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
async def test_a_method_asks_for_what_it_says(side: Side, client: Any, server: ScriptedServer, name: str) -> None:
    act, wanted, body, answer = ASKED[name]
    server.script = [Answer(204) if answer is None else as_json(answer)]
    await side(lambda: act(client))
    [seen] = server.seen
    assert f"{seen.method} {seen.path.removeprefix('/api/v1')}" == wanted
    assert (seen.json if seen.body else None) == body


async def test_answers_are_frozen_and_typed(side: Side, client: Any, server: ScriptedServer) -> None:
    server.script = [as_json(model_record("churn", 10, 9)), as_json(model_record("churn", 10, 9))]
    described = await side(lambda: client.models.describe("churn"))
    assert (described.source, described.aliases[0].weights) == ("catalog", {"1": 100})
    with pytest.raises(ValueError, match="frozen"):
        described.name = "other"
    assert [version.version for version in await side(lambda: client.models.versions("churn"))] == [9, 10]


@pytest.mark.parametrize(
    "act",
    [
        lambda models: models.set_alias("churn", "stable", {3: 95, 4: 4}),
        lambda models: models.set_alias("churn", "stable", {}),
        lambda models: models.set_alias("churn", "stable", {0: 100}),
        lambda models: models.set_alias("churn", "stable", 3, fallback=["x"]),
        lambda models: models.set_alias("churn", "No", 3),
        lambda models: models.update("churn", 3),
        lambda models: models.version("churn", 0),
        lambda models: models.version("a/b", 1),
        lambda models: models.delete("churn@stable"),
        lambda models: models.deployments("a b"),
    ],
)  # fmt: skip
async def test_what_cannot_be_is_refused_before_it_is_sent(
    side: Side, client: Any, server: ScriptedServer, act: Callable[[Any], Any]
) -> None:
    with pytest.raises(inferway.ConfigurationError):
        await side(lambda: act(client.models))
    assert server.seen == []


async def test_a_conflict_over_an_alias_is_raised(side: Side, client: Any, server: ScriptedServer) -> None:
    server.script = [problem(409, "conflict", "the alias is at revision 8, not 7")]
    with pytest.raises(inferway.ConflictError, match="at revision 8"):
        await side(lambda: client.models.set_alias("churn", "stable", 3, expected_revision=7))


@pytest.mark.parametrize(
    "act",
    [lambda m: m.rollback("churn"), lambda m: m.set_alias("churn", "stable", 3, expected_revision=1)],
    ids=["rollback", "conditional"],
)
async def test_what_must_not_happen_twice_is_not_sent_twice(
    side: Side, server: ScriptedServer, act: Callable[[Any], Any]
) -> None:
    client = side.client(server.url)
    server.script = [Answer(raw=b"")]
    with pytest.raises(inferway.APIConnectionError):
        await side(lambda: act(client.models))
    assert len(server.seen) == 1


async def test_events_are_fetched_page_by_page(side: Side, client: Any, server: ScriptedServer) -> None:
    server.script = [
        as_json({"events": [event_record(9), event_record(8)], "has_more": True}),
        as_json({"events": [event_record(7, kind="a_new_kind")], "has_more": False}),
    ]
    events = await side.all(client.models.events("churn", page_size=2))
    assert [event.id for event in events] == [9, 8, 7]
    assert events[-1].kind == "a_new_kind"
    assert [seen.path for seen in server.seen] == [
        "/api/v1/models/churn/events?limit=2",
        "/api/v1/models/churn/events?before=8&limit=2",
    ]


async def test_events_of_all_models(side: Side, client: Any, server: ScriptedServer) -> None:
    server.script = [as_json({"events": [], "has_more": True})]
    assert await side.all(client.models.events()) == []
    assert server.seen[0].path == "/api/v1/events"


async def test_a_list_of_events_that_turns_in_circles_is_left(side: Side, client: Any, server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_json({"events": [event_record(9)], "has_more": True})
    with pytest.raises(inferway.APIResponseValidationError, match="does not end"):
        await side.all(client.models.events("churn"))


async def test_a_model_is_called_by_its_alias(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    result = await side(lambda: client.infer("simple@canary", [[1, 2]]))
    assert result.model_version == "1"
    await side(lambda: client.models.get("simple@canary"))
    assert [seen.path for seen in server.seen] == [
        "/v2/models/simple@canary", "/v2/models/simple@canary/infer", "/v2/models/simple@canary",
    ]  # fmt: skip


async def test_changing_an_alias_forgets_what_it_meant(side: Side, client: Any, server: ScriptedServer) -> None:
    for act, answer in (
        (lambda: client.models.set_alias("churn", "stable", 3), as_json(alias_record("churn", "stable", {"3": 100}))),
        (lambda: client.models.rollback("churn"), as_json(alias_record("churn", "stable", {"2": 100}))),
        (lambda: client.models.delete_alias("churn", "stable"), Answer(204)),
        (lambda: client.models.delete("churn", 3), Answer(204)),
    ):
        client._engine.signatures.keep(("churn", None), object(), 0.0)
        server.script = [answer]
        await side(act)
        assert not client._engine.signatures
