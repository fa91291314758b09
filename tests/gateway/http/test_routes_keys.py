"""The routes of keys, as a caller meets them: in process, over a real SQLite database, on a clock moved by hand."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from inferway_contract import models as contract
from inferway_gateway.app import routes
from inferway_gateway.core.keys import ANONYMOUS, ApiKey, Authenticator, Clock, KeyService, NewKey, Peppers
from inferway_gateway.http import routes_keys
from inferway_gateway.http.application import GatewayApplication
from inferway_gateway.http.key_bodies import deprecation
from inferway_gateway.store.database import KeyDatabase

START = datetime(2026, 11, 23, 12, tzinfo=UTC)
KEYS = "/api/v1/keys"
PEPPERS = Peppers({1: bytes(range(32))})


class CountedDatabase(KeyDatabase):
    """The real one, which counts its reads."""

    reads = 0

    async def fetch(self, key_ids: Any) -> Any:
        self.reads += 1
        return await super().fetch(key_ids)


@dataclass
class Wall:
    """The wall clock."""

    unix_s: float = START.timestamp()


@dataclass
class Gateway:
    http: httpx.AsyncClient
    service: KeyService
    admin: NewKey
    database: CountedDatabase
    state: dict[str, Any]
    wall: Wall

    async def call(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, **options: Any
    ) -> httpx.Response:
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key or self.admin.key.reveal()}"} | options.pop("headers", {})
        return await self.http.request(method, path, content=content, headers=headers, **options)


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    wall = Wall()
    clock = Clock(wall=lambda: wall.unix_s)
    database = await CountedDatabase.open(f"sqlite:///{tmp_path}/keys.db", PEPPERS, timeout_s=20)
    async with Authenticator(database, PEPPERS, clock) as authenticator:
        service = KeyService(database, PEPPERS, authenticator, clock)
        state: dict[str, Any] = {
            "authenticator": authenticator,
            "keys": service,
            "metrics": SimpleNamespace(http_request=lambda route, status: None),
            "access_log": None,
            "rate_limits": None,
        }
        application = GatewayApplication([route for route in routes() if route.path.startswith(KEYS)], None)

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = state
            await application(scope, receive, send)

        transport = httpx.ASGITransport(with_state)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            admin = await service.create(name="admin", scopes=["admin"])
            yield Gateway(http, service, admin, database, state, wall)
    await database.close()


def problem(response: httpx.Response, status: int, code: str) -> str:
    """The words of an error, which has the form of RFC 9457."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = contract.Problem.model_validate_json(response.content)
    assert (body.status, body.code, body.type) == (status, code, f"urn:inferway:error:{code}")
    return body.detail


class TestCreate:
    async def test_shows_the_key_once_with_its_record(self, gateway: Gateway) -> None:
        body = {
            "name": "web shop",
            "scopes": ["read", "infer"],
            "models": ["minilm*"],
            "environment": "test",
            "expires_in_s": 3600,
        }
        response = await gateway.call("POST", KEYS, body)
        assert response.status_code == 201
        assert response.headers["cache-control"] == "no-store"
        made = contract.KeyCreated.model_validate_json(response.content)
        assert made.key.startswith(f"ifw_test_{made.id}_")
        assert (made.name, made.scopes, made.models) == ("web shop", ["infer", "read"], ["minilm*"])
        assert (made.created_at, made.expires_at) == (START, START + timedelta(hours=1))
        assert response.json()["created_at"] == "2026-11-23T12:00:00Z"
        record = await gateway.call("GET", f"{KEYS}/{made.id}")
        assert record.json() == {name: value for name, value in response.json().items() if name != "key"}
        own = await gateway.call("GET", f"{KEYS}/self", key=made.key)
        assert own.json() == record.json()

    @pytest.mark.parametrize(
        ("scopes", "asked", "days"),
        [
            (["infer"], {}, None),
            (["admin"], {}, 90),
            (["admin"], {"expires_in_s": None}, None),
            (["admin"], {"expires_in_s": 86_400}, 1),
        ],
    )
    async def test_gives_admin_keys_90_days_unless_told(
        self, gateway: Gateway, scopes: list[str], asked: dict[str, Any], days: int | None
    ) -> None:
        body = {"name": "a", "scopes": scopes} | asked
        made = contract.KeyCreated.model_validate_json((await gateway.call("POST", KEYS, body)).content)
        assert made.expires_at == (None if days is None else START + timedelta(days=days))

    @pytest.mark.parametrize(
        ("body", "member"),
        [
            ({}, "name"),
            ({"name": "", "scopes": ["infer"]}, "name"),
            ({"name": "a\nb", "scopes": ["infer"]}, "name"),
            ({"name": "a" * 129, "scopes": ["infer"]}, "name"),
            ({"name": 1, "scopes": ["infer"]}, "name"),
            ({"name": "a"}, "scopes"),
            ({"name": "a", "scopes": []}, "scopes"),
            ({"name": "a", "scopes": "infer"}, "scopes"),
            ({"name": "a", "scopes": ["root"]}, "scopes.0"),
            ({"name": "a", "scopes": ["infer", "infer"]}, "scopes"),
            ({"name": "a", "scopes": ["infer"], "models": []}, "models"),
            ({"name": "a", "scopes": ["infer"], "models": ["a/b"]}, "models.0"),
            ({"name": "a", "scopes": ["infer"], "models": ["a"] * 65}, "models"),
            ({"name": "a", "scopes": ["infer"], "environment": "prod"}, "environment"),
            ({"name": "a", "scopes": ["infer"], "expires_in_s": 0}, "expires_in_s"),
            ({"name": "a", "scopes": ["infer"], "expires_in_s": 1.5}, "expires_in_s"),
            ({"name": "a", "scopes": ["infer"], "expires_in_s": True}, "expires_in_s"),
            ({"name": "a", "scopes": ["infer"], "expires_in_s": 10**12}, "expires_in_s"),
            # What only the gateway may say.
            ({"name": "a", "scopes": ["infer"], "id": "x" * 12}, "id"),
            ({"name": "a", "scopes": ["infer"], "key": "mine"}, "key"),
            ({"name": "a", "scopes": ["infer"], "created_by": "x" * 12}, "created_by"),
            ({"name": "a", "scopes": ["infer"], "digest": ""}, "digest"),
        ],
    )
    async def test_names_the_member_that_does_not_fit(self, gateway: Gateway, body: Any, member: str) -> None:
        words = problem(await gateway.call("POST", KEYS, body), 400, "invalid_parameter")
        assert f"'{member}'" in words
        assert len(contract.KeyList.model_validate_json((await gateway.call("GET", KEYS)).content).data) == 1

    async def test_repeats_no_value_and_no_key_that_came_in_the_wrong_place(self, gateway: Gateway) -> None:
        stray = ApiKey.generate("live").reveal()
        body = {
            "name": "a",
            "scopes": ["canary"],
            stray: 1,
            "x" * 500: 1,
            "models": ["canary/"],
            "expires_in_s": "canary",
        }
        words = problem(await gateway.call("POST", KEYS, body), 400, "invalid_parameter")
        assert "canary" not in words
        assert stray[-49:] not in words
        assert "x" * 65 not in words
        assert "and 2 more" in words

    @pytest.mark.parametrize(
        "content",
        [
            b"{",
            b"nonsense",
            b"[]",
            b'"text"',
            b"null",
            b"\xff",
            b'{"name": "\\ud800", "scopes": ["infer"]}',
            b"[" * 5000,
        ],
    )
    async def test_refuses_what_is_no_json_object(self, gateway: Gateway, content: bytes) -> None:
        problem(await gateway.call("POST", KEYS, content), 400, "malformed_request")

    async def test_refuses_a_body_that_is_too_long_as_it_is_or_unpacked(self, gateway: Gateway) -> None:
        long = json.dumps({"name": "a", "scopes": ["infer"], "pad": "x" * routes_keys.BODY_LIMIT_BYTES}).encode()
        problem(await gateway.call("POST", KEYS, long), 413, "payload_too_large")
        packed = {"Content-Encoding": "gzip"}
        problem(await gateway.call("POST", KEYS, gzip.compress(long), headers=packed), 413, "payload_too_large")

    async def test_takes_compressed_bodies_and_no_other_encoding(self, gateway: Gateway) -> None:
        body = json.dumps({"name": "a", "scopes": ["infer"]}).encode()
        packed = await gateway.call("POST", KEYS, gzip.compress(body), headers={"Content-Encoding": "gzip"})
        assert packed.status_code == 201
        strange = await gateway.call("POST", KEYS, body, headers={"Content-Encoding": "br"})
        problem(strange, 501, "unsupported_encoding")

    async def test_makes_no_second_key_for_a_repeated_request(self, gateway: Gateway) -> None:
        body, once = {"name": "a", "scopes": ["infer"]}, {"Idempotency-Key": "4f1c"}
        first = (await gateway.call("POST", KEYS, body, headers=once)).json()
        words = problem(await gateway.call("POST", KEYS, body, headers=once), 409, "conflict")
        assert first["id"] in words
        assert first["key"] not in words
        assert (await gateway.call("POST", KEYS, body, headers={"Idempotency-Key": "4f1d"})).status_code == 201

    async def test_remembers_who_asked(self, gateway: Gateway) -> None:
        made = (await gateway.call("POST", KEYS, {"name": "a", "scopes": ["infer"]})).json()
        assert (await gateway.service.get(made["id"])).created_by == gateway.admin.key.id


class TestList:
    async def test_gives_pages_newest_first(self, gateway: Gateway) -> None:
        for i in range(4):
            gateway.wall.unix_s += 1
            await gateway.call("POST", KEYS, {"name": f"n{i}", "scopes": ["infer"]})
        first = contract.KeyList.model_validate_json((await gateway.call("GET", f"{KEYS}?limit=3")).content)
        assert len(first.data) == 3
        assert first.next_cursor is not None
        rest = await gateway.call("GET", KEYS, params={"limit": 3, "cursor": first.next_cursor})
        second = contract.KeyList.model_validate_json(rest.content)
        assert second.next_cursor is None
        names = [record.name for record in (*first.data, *second.data)]
        assert sorted(names) == ["admin", "n0", "n1", "n2", "n3"]

    async def test_holds_no_key_and_no_hash(self, gateway: Gateway) -> None:
        text = (await gateway.call("GET", KEYS)).text
        assert gateway.admin.key.reveal()[-49:] not in text
        assert gateway.admin.record.digest.hex() not in text
        assert set(json.loads(text)["data"][0]) == set(contract.KeyRecord.model_fields)

    @pytest.mark.parametrize(
        "query", ["limit=0", "limit=201", "limit=x", "limit=-1", "limit=1e2", "limit=", "limit=\u0661"]
    )
    async def test_refuses_a_limit_out_of_range(self, gateway: Gateway, query: str) -> None:
        assert "limit" in problem(await gateway.call("GET", f"{KEYS}?{query}"), 400, "invalid_parameter")

    @pytest.mark.parametrize("cursor", ["", "x", "é", "AAAA", "'--", "\0"])
    async def test_refuses_a_cursor_of_its_own_making(self, gateway: Gateway, cursor: str) -> None:
        response = await gateway.call("GET", KEYS, params={"cursor": cursor})
        assert "cursor" in problem(response, 400, "invalid_parameter")


class TestOne:
    @pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("POST", "/rotate")])
    @pytest.mark.parametrize("key_id", ["0" * 12, "short", "%00" * 12, "%2e%2e", "é"])
    async def test_unknown_ids_are_not_found(self, gateway: Gateway, method: str, path: str, key_id: str) -> None:
        problem(await gateway.call(method, f"{KEYS}/{key_id}{path}"), 404, "key_not_found")

    async def test_revoking_acts_on_the_next_request_and_may_be_repeated(self, gateway: Gateway) -> None:
        made = (await gateway.call("POST", KEYS, {"name": "a", "scopes": ["infer"]})).json()
        assert (await gateway.call("GET", f"{KEYS}/self", key=made["key"])).status_code == 200
        gateway.wall.unix_s += 1
        first = await gateway.call("DELETE", f"{KEYS}/{made['id']}")
        assert first.status_code == 200
        revoked_at = contract.KeyRecord.model_validate_json(first.content).revoked_at
        problem(await gateway.call("GET", f"{KEYS}/self", key=made["key"]), 401, "unauthenticated")
        gateway.wall.unix_s += 1
        again = await gateway.call("DELETE", f"{KEYS}/{made['id']}")
        assert contract.KeyRecord.model_validate_json(again.content).revoked_at == revoked_at

    async def test_a_key_may_revoke_itself(self, gateway: Gateway) -> None:
        assert (await gateway.call("DELETE", f"{KEYS}/{gateway.admin.key.id}")).status_code == 200
        problem(await gateway.call("GET", KEYS), 401, "unauthenticated")

    async def test_self_is_not_there_without_authentication(self, gateway: Gateway) -> None:
        gateway.state["authenticator"] = None
        problem(await gateway.call("GET", f"{KEYS}/self"), 404, "key_not_found")
        made = (await gateway.call("POST", KEYS, {"name": "a", "scopes": ["infer"]})).json()
        assert (await gateway.service.get(made["id"])).created_by is None


class TestRotate:
    async def test_shows_the_successor_and_the_end_of_the_old_key(self, gateway: Gateway) -> None:
        old = (await gateway.call("POST", KEYS, {"name": "a", "scopes": ["infer"], "models": ["m*"]})).json()
        response = await gateway.call("POST", f"{KEYS}/{old['id']}/rotate", {"overlap_s": 60})
        assert response.status_code == 201
        new = contract.KeyRotated.model_validate_json(response.content)
        assert (new.name, new.scopes, new.models, new.replaced_by) == ("a", ["infer"], ["m*"], None)
        assert (new.replaced.id, new.replaced.replaced_by) == (old["id"], new.id)
        assert new.replaced.expires_at == START + timedelta(seconds=60)
        assert old["key"][-49:] not in response.text

    async def test_tells_callers_of_the_old_key_until_it_ends(self, gateway: Gateway) -> None:
        old = (await gateway.call("POST", KEYS, {"name": "a", "scopes": ["infer"]})).json()
        before = await gateway.call("GET", f"{KEYS}/self", key=old["key"])
        assert not {"deprecation", "sunset"} & set(before.headers)
        gateway.wall.unix_s += 10
        new = (await gateway.call("POST", f"{KEYS}/{old['id']}/rotate", {"overlap_s": 60})).json()
        told = await gateway.call("GET", f"{KEYS}/self", key=old["key"])
        assert told.headers["deprecation"] == f"@{START.timestamp() + 10:.0f}"
        assert parsedate_to_datetime(told.headers["sunset"]) == START + timedelta(seconds=70)
        refused = await gateway.call("GET", KEYS, key=old["key"])
        assert refused.status_code == 403
        assert not {"deprecation", "sunset"} & set((await gateway.call("GET", f"{KEYS}/self", key=new["key"])).headers)
        gateway.wall.unix_s += 60
        problem(await gateway.call("GET", f"{KEYS}/self", key=old["key"]), 401, "unauthenticated")
        assert (await gateway.call("GET", f"{KEYS}/self", key=new["key"])).status_code == 200

    def test_has_nothing_to_tell_callers_of_other_keys(self) -> None:
        assert deprecation(ANONYMOUS) == ()

    async def test_needs_no_body_and_then_overlaps_for_a_day(self, gateway: Gateway) -> None:
        response = await gateway.call("POST", f"{KEYS}/{gateway.admin.key.id}/rotate")
        assert contract.KeyRotated.model_validate_json(response.content).replaced.expires_at == START + timedelta(
            days=1
        )

    async def test_twice_is_a_conflict_that_names_the_successor(self, gateway: Gateway) -> None:
        path = f"{KEYS}/{gateway.admin.key.id}/rotate"
        new = (await gateway.call("POST", path)).json()
        assert new["id"] in problem(await gateway.call("POST", path), 409, "conflict")

    @pytest.mark.parametrize("body", [{"overlap_s": -1}, {"overlap_s": 2_592_001}, {"overlap_s": "1"}, {"overlap": 1}])
    async def test_refuses_another_body(self, gateway: Gateway, body: Any) -> None:
        response = await gateway.call("POST", f"{KEYS}/{gateway.admin.key.id}/rotate", body)
        problem(response, 400, "invalid_parameter")

    async def test_under_load_loses_no_call(self, gateway: Gateway) -> None:
        """A caller that goes over to the new key at any moment of the overlap never meets a 401."""
        old = (await gateway.call("POST", KEYS, {"name": "a", "scopes": ["infer"]})).json()
        current = {"key": old["key"]}
        statuses: list[int] = []
        done = asyncio.Event()

        async def caller() -> None:
            while not done.is_set():
                statuses.append((await gateway.call("GET", f"{KEYS}/self", key=current["key"])).status_code)

        async with asyncio.timeout(30), asyncio.TaskGroup() as callers:
            for _ in range(8):
                callers.create_task(caller())
            for _ in range(5):
                new = (await gateway.call("POST", f"{KEYS}/{current['key'].split('_')[2]}/rotate")).json()
                for _ in range(20):
                    await asyncio.sleep(0)
                current["key"] = new["key"]
            done.set()
        assert len(statuses) > 20
        assert set(statuses) == {200}


class TestTrouble:
    async def test_a_database_that_does_not_answer_is_503_with_retry_after(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await gateway.call("GET", f"{KEYS}/self")
        monkeypatch.setattr(gateway.database, "_timeout_s", 0.0)
        for method, path, body in (("GET", KEYS, None), ("POST", KEYS, {"name": "a", "scopes": ["infer"]})):
            response = await gateway.call(method, path, body)
            problem(response, 503, "store_unavailable")
            assert response.headers["retry-after"] == "1"
            assert response.headers["x-should-retry"] == "true"

    async def test_junk_keys_read_nothing_from_the_database(self, gateway: Gateway) -> None:
        key = gateway.admin.key.reveal()
        before = gateway.database.reads
        for junk in ("x", key[:-1], key + "0", key.swapcase(), "ifw_live_" + "0" * 62, "A" * 10_000):
            for header in ({"Authorization": f"Bearer {junk}"}, {"Authorization": "", "X-API-Key": junk}):
                problem(await gateway.call("GET", KEYS, headers=header), 401, "unauthenticated")
        assert gateway.database.reads == before

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
    @given(
        st.sampled_from([b"authorization", b"x-api-key"]),
        st.sampled_from([b"", b"Bearer ", b"bearer  ", b"Basic ", b"Bearer ifw_live_"]),
        st.binary(max_size=300),
    )
    async def test_hostile_headers_are_refused_and_nothing_else(
        self, gateway: Gateway, name: bytes, prefix: bytes, value: bytes
    ) -> None:
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": KEYS,
            "raw_path": KEYS.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name, prefix + value)],
            "state": gateway.state,
        }
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        transport = gateway.http._transport
        assert isinstance(transport, httpx.ASGITransport)
        await transport.app(scope, receive, send)
        assert sent[0]["status"] == 401
