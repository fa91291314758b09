"""The catalog of deployed models, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import pytest

from inferway_gateway.core.catalog import (
    AliasSpec,
    Catalog,
    DeploymentRecord,
    Event,
    FileRef,
    Footprint,
    Guard,
    Shadow,
    Step,
    VersionRecord,
    VersionSpec,
)
from inferway_gateway.core.errors import (
    AliasNotFoundError,
    BlobNotFoundError,
    ConflictError,
    DeploymentNotFoundError,
    GatewayError,
    InvalidParameterError,
    ModelNotFoundError,
    QuotaExceededError,
    VersionNotFoundError,
)
from inferway_gateway.store.catalog import Forgotten, SqlCatalog, open_catalog

NOW = datetime(2026, 11, 23, 12, 0, 0, 123456, tzinfo=UTC)
KEY = "a1B2c3D4e5F6"
WEIGHTS = sha256(b"weights").hexdigest()
GRAPH = sha256(b"graph").hexdigest()


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def catalog(database_url: str, clock: Clock) -> AsyncIterator[SqlCatalog]:
    """An empty one with two blobs."""
    opened = await SqlCatalog.open(database_url, timeout_s=20, now=clock)
    try:
        await opened.add_blob(WEIGHTS, 70, by=KEY)
        await opened.add_blob(GRAPH, 5, by=KEY)
        yield opened
    finally:
        await opened.close()


def spec(model: str = "churn", **changes: Any) -> VersionSpec:
    files = (FileRef("model.onnx", GRAPH, 5), FileRef("weights/a.bin", WEIGHTS, 70))
    return replace(VersionSpec(model=model, kind="onnx", files=files), **changes)


def content(word: object) -> str:
    return sha256(repr(word).encode()).hexdigest()


async def begin(catalog: Catalog, word: object = "first", wanted: VersionSpec | None = None) -> DeploymentRecord:
    return await catalog.begin_deployment(
        wanted or spec(), digest=content(word), isolation="worker", by=KEY, owner="gateway-1"
    )


async def deploy(catalog: Catalog, word: object = "first", wanted: VersionSpec | None = None) -> VersionRecord:
    record = await begin(catalog, word, wanted)
    alias = AliasSpec({record.version: 100.0}) if record.spec.alias is not None else None
    return await catalog.commit_deployment(record.id, Footprint(100, 200), alias)


async def kinds(catalog: Catalog, model: str | None = None) -> list[str]:
    return [event.kind for event in reversed(await catalog.events(model))]


class TestTheSameContentAgain:
    async def test_what_is_said_anew_takes_its_place_and_the_rest_stays(self, catalog: SqlCatalog) -> None:
        await deploy(catalog, wanted=spec(labels={"team": "a"}, metadata={"accuracy": 0.9}, pinned=True))
        silent = await deploy(catalog)
        assert (silent.labels, silent.metadata, silent.pinned) == ({"team": "a"}, {"accuracy": 0.9}, True)
        assert "version_changed" not in await kinds(catalog)
        revision = await catalog.revision()
        anew = await deploy(catalog, wanted=spec(labels={"team": "b", "run": "7"}))
        assert (anew.version, anew.labels, anew.metadata, anew.pinned) == (
            1, {"team": "b", "run": "7"}, {"accuracy": 0.9}, True,
        )  # fmt: skip
        assert await catalog.version("churn", 1) == anew
        assert await catalog.revision() > revision, "every gateway takes it in"
        [changed] = [event for event in await catalog.events() if event.kind == "version_changed"]
        assert (changed.version, changed.by, changed.detail) == (1, KEY, {"changed": ["labels"]})

    async def test_a_version_can_be_pinned_so_and_given_metadata(self, catalog: SqlCatalog) -> None:
        await deploy(catalog)
        anew = await deploy(catalog, wanted=spec(metadata={"accuracy": 0.95}, pinned=True))
        assert (anew.metadata, anew.pinned) == ({"accuracy": 0.95}, True)
        assert (await catalog.events())[0].kind in ("version_changed", "deployment_succeeded")
        [changed] = [event for event in await catalog.events() if event.kind == "version_changed"]
        assert changed.detail == {"changed": ["metadata", "pinned"]}


class TestHistory:
    async def test_what_is_old_is_forgotten_and_what_is_stays(self, catalog: SqlCatalog, clock: Clock) -> None:
        first = await deploy(catalog)
        failed = await begin(catalog, "second")
        await catalog.end_deployment(failed.id, code="model_rejected", message="no", step=Step.ADMITTED)
        running = await begin(catalog, "third")
        clock.now += timedelta(days=10)
        await catalog.set_alias("churn", "canary", AliasSpec({1: 100.0}), by=KEY)
        revision, snapshot = await catalog.revision(), await catalog.snapshot()

        assert await catalog.forget_history(clock.now - timedelta(days=11), 100) == Forgotten(0, 0)
        assert await catalog.forget_history(clock.now - timedelta(days=9), 100) == Forgotten(6, 2)

        assert await kinds(catalog) == ["alias_set"]
        assert [record.id for record in await catalog.deployments()] == [running.id]
        assert (await catalog.snapshot()).versions == (first,)
        assert await catalog.snapshot() == snapshot
        assert await catalog.revision() == revision, "nobody has to follow"
        with pytest.raises(DeploymentNotFoundError):
            await catalog.deployment(failed.id)

    async def test_each_model_keeps_its_youngest(self, catalog: SqlCatalog) -> None:
        for model, count in (("busy", 7), ("quiet", 2)):
            for number in range(count):
                made = await begin(catalog, (model, number), spec(model))
                await catalog.end_deployment(made.id, code="model_rejected", message=str(number), step=None)
        running = [await begin(catalog, ("busy", "runs", number), spec("busy")) for number in range(4)]

        assert await catalog.forget_history(NOW - timedelta(days=1), 3) == Forgotten(18 - 3 + 1, 4)

        busy, quiet = await catalog.deployments("busy"), await catalog.deployments("quiet")
        assert [record.id for record in busy[:4]] == [record.id for record in reversed(running)]
        assert [record.error_message for record in busy[4:]] == ["6", "5", "4"]
        assert [record.error_message for record in quiet] == ["1", "0"]
        assert await kinds(catalog, "busy") == ["deployment_started"] * 3
        assert await kinds(catalog, "quiet") == ["deployment_failed", "deployment_started", "deployment_failed"]
        assert await catalog.forget_history(NOW - timedelta(days=1), 3) == Forgotten(0, 0)

    async def test_more_than_one_transaction_takes_are_forgotten_whoever_else_writes(
        self, catalog: SqlCatalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("inferway_gateway.store.catalog._FORGET", 4)
        for number in range(30):
            await catalog.add_event("worker_crashed", "churn", version=number, by="gateway")
        forgotten, again, _ = await asyncio.gather(
            catalog.forget_history(NOW, 5), catalog.forget_history(NOW, 5), deploy(catalog)
        )
        assert forgotten.events + again.events in (25, 26, 27, 28)
        assert await catalog.forget_history(NOW, 5) == Forgotten(28 - forgotten.events - again.events, 0)
        events = await catalog.events()
        assert len(events) == 5
        newest = events[0].id
        await catalog.forget_history(NOW + timedelta(days=1), 1)
        assert await catalog.events() == []
        await catalog.add_event("worker_crashed", "churn", by="gateway")
        assert (await catalog.events())[0].id > newest, "an id is never given twice"


class TestDeployments:
    async def test_make_a_version_an_alias_and_their_events_at_once(self, catalog: SqlCatalog) -> None:
        before = await catalog.revision()
        wanted = spec(
            config={"batching": {"max_batch": 8}}, labels={"team": "é"}, metadata={"accuracy": 0.93}, pinned=True
        )
        running = await begin(catalog, wanted=wanted)
        assert (running.state, running.version, running.step, running.reused) == ("running", 1, None, False)
        assert running.spec == wanted
        assert (await catalog.snapshot()).versions == ()
        done = await catalog.advance_deployment(running.id, Step.LOADED)
        assert done.step is Step.LOADED
        version = await catalog.commit_deployment(running.id, Footprint(100, 200), AliasSpec({1: 100.0}))
        assert version == VersionRecord(
            model="churn",
            version=1,
            kind="onnx",
            digest=content("first"),
            files=wanted.files,
            config=wanted.config,
            isolation="worker",
            labels=wanted.labels,
            metadata=wanted.metadata,
            pinned=True,
            footprint=Footprint(100, 200),
            created_at=NOW,
            created_by=KEY,
        )
        snapshot = await catalog.snapshot()
        assert snapshot.versions == (version,)
        [alias] = snapshot.aliases
        assert (alias.model, alias.alias, alias.spec, alias.previous) == (
            "churn",
            "stable",
            AliasSpec({1: 100.0}),
            None,
        )
        assert snapshot.revision == await catalog.revision() > before
        ended = await catalog.deployment(running.id)
        assert (ended.state, ended.step) == ("succeeded", Step.READY)
        assert await kinds(catalog) == ["deployment_started", "deployment_succeeded", "alias_set"]
        assert {event.by for event in await catalog.events()} == {KEY}

    async def test_outlive_the_process(self, catalog: SqlCatalog, database_url: str) -> None:
        await deploy(catalog)
        async with open_catalog(database_url=database_url) as other:
            assert await other.snapshot() == await catalog.snapshot()

    async def test_of_the_same_content_make_one_version(self, catalog: SqlCatalog) -> None:
        first = await deploy(catalog)
        await deploy(catalog, "second")
        again = await begin(catalog)
        assert (again.version, again.reused) == (1, True)
        assert await catalog.commit_deployment(again.id, None, AliasSpec({1: 100.0})) == first
        assert len((await catalog.snapshot()).versions) == 2
        alias = await catalog.alias("churn", "stable")
        assert (alias.spec, alias.previous) == (AliasSpec({1: 100.0}), AliasSpec({2: 100.0}))

    async def test_of_what_serves_already_leave_the_way_back_as_it_was(self, catalog: SqlCatalog) -> None:
        await deploy(catalog)
        await deploy(catalog, "second")
        before = await catalog.alias("churn", "stable")
        await deploy(catalog, "second")
        assert await catalog.alias("churn", "stable") == before
        assert before.previous == AliasSpec({1: 100.0})

    async def test_that_run_keep_their_number_from_others(self, catalog: SqlCatalog) -> None:
        first = await begin(catalog)
        second = await begin(catalog, "second")
        assert (first.version, second.version) == (1, 2)
        with pytest.raises(ConflictError, match=first.id):
            await begin(catalog, "third", spec(version=1))
        with pytest.raises(ConflictError, match=second.id):
            await begin(catalog, "second")
        ended = await catalog.end_deployment(first.id, code="model_rejected", message="no", step=Step.ADMITTED)
        assert (ended.state, ended.failed_step, ended.error_code) == ("failed", Step.ADMITTED, "model_rejected")
        assert (await begin(catalog, "third", spec(version=1))).version == 1

    async def test_take_a_number_that_was_asked_for(self, catalog: SqlCatalog) -> None:
        assert (await deploy(catalog, "seventh", spec(version=7))).version == 7
        assert (await deploy(catalog, "third", spec(version=3))).version == 3
        assert (await deploy(catalog, "next")).version == 8
        with pytest.raises(ConflictError, match="versions do not change"):
            await begin(catalog, "other", spec(version=7))
        with pytest.raises(ConflictError, match="that of version 7"):
            await begin(catalog, "seventh", spec(version=9))
        assert (await begin(catalog, "seventh", spec(version=7))).reused
        for version in (0, 2**31):
            with pytest.raises(InvalidParameterError):
                await begin(catalog, "other", spec(version=version))

    async def test_never_give_a_deleted_number_to_other_content(self, catalog: SqlCatalog) -> None:
        await deploy(catalog)
        await deploy(catalog, "second")
        await catalog.delete_model("churn", by=KEY)
        assert (await deploy(catalog, "third")).version == 3
        with pytest.raises(ConflictError, match="never used"):
            await begin(catalog, "fourth", spec(version=2))
        assert (await deploy(catalog, "second", spec(version=2))).version == 2

    async def test_need_every_blob_with_its_size(self, catalog: SqlCatalog) -> None:
        missing = content("missing")
        with pytest.raises(BlobNotFoundError, match=rf"{missing} for 'b\.bin'"):
            await begin(catalog, wanted=spec(files=(FileRef("b.bin", missing, 1),)))
        with pytest.raises(InvalidParameterError, match=r"'b\.bin'.*70, got 71"):
            await begin(catalog, wanted=spec(files=(FileRef("b.bin", WEIGHTS, 71),)))
        assert await catalog.events() == []
        assert await catalog.deployments() == []

    async def test_that_ended_stay_as_they_are(self, catalog: SqlCatalog) -> None:
        running = await begin(catalog)
        failed = await catalog.end_deployment(running.id, code="model_rejected", message="no", step=None)
        assert await catalog.end_deployment(running.id, code="other", message="x", step=None, cancelled=True) == failed
        assert await catalog.request_cancel(running.id, "other") == failed
        assert await catalog.advance_deployment(running.id, Step.READY) == failed
        with pytest.raises(ConflictError, match="failed"):
            await catalog.commit_deployment(running.id, None, None)
        assert (await catalog.snapshot()).versions == ()
        assert await kinds(catalog) == ["deployment_started", "deployment_failed"]

    async def test_whose_end_was_asked_for_do_not_succeed(self, catalog: SqlCatalog) -> None:
        running = await begin(catalog)
        asked = await catalog.request_cancel(running.id, "another")
        assert (asked.state, asked.cancel_requested) == ("running", True)
        with pytest.raises(ConflictError, match="asked for"):
            await catalog.commit_deployment(running.id, None, None)
        ended = await catalog.end_deployment(running.id, code="cancelled", message="", step=None, cancelled=True)
        assert ended.state == "cancelled"
        assert (await catalog.events())[0].by == "another"

    async def test_of_a_process_that_is_gone_are_found(self, catalog: SqlCatalog, clock: Clock) -> None:
        first = await begin(catalog)
        second = await begin(catalog, "second")
        clock.now += timedelta(seconds=20)
        await catalog.advance_deployment(second.id, Step.RECEIVED)
        found = await catalog.unkept_deployments(clock.now - timedelta(seconds=10))
        assert [record.id for record in found] == [first.id]
        assert [record.id for record in await catalog.running_deployments()] == [first.id, second.id]
        kept = await catalog.keep_deployments("gateway-1")
        assert [record.id for record in kept] == [first.id, second.id]
        assert await catalog.keep_deployments("gateway-2") == []
        assert await catalog.unkept_deployments(clock.now - timedelta(seconds=10)) == []

    async def test_are_listed_youngest_first(self, catalog: SqlCatalog) -> None:
        made = [await begin(catalog, word, spec(f"m{word % 2}")) for word in range(5)]
        assert [record.id for record in await catalog.deployments()] == [record.id for record in reversed(made)]
        assert [record.id for record in await catalog.deployments("m1")] == [made[3].id, made[1].id]
        assert [record.id for record in await catalog.deployments(limit=2)] == [made[4].id, made[3].id]

    async def test_and_events_of_others_do_not_hide_ones_own(self, catalog: SqlCatalog) -> None:
        mine = await begin(catalog, "mine", spec("a1"))
        others = [await begin(catalog, word, spec(f"b{word % 2}")) for word in range(6)]
        sees: dict[str, Callable[[str], bool]] = {"mine": lambda name: name.startswith("a"), "none": lambda name: False}
        found = await catalog.deployments(limit=2, sees=sees["mine"])
        assert [record.id for record in found] == [mine.id]
        assert [event.model for event in await catalog.events(limit=2, sees=sees["mine"])] == ["a1"]
        assert await catalog.deployments(sees=sees["none"]) == []
        assert await catalog.events(sees=sees["none"]) == []
        found = await catalog.deployments(limit=1, sees=lambda name: True)
        assert [record.id for record in found] == [others[-1].id]
        last = (await catalog.events(limit=1, sees=lambda name: name == "b1"))[0]
        earlier = await catalog.events(limit=1, before=last.id, sees=lambda name: name == "b1")
        assert [event.model for event in earlier] == ["b1"]
        assert earlier[0].id < last.id

    async def test_with_an_alias_that_names_no_version_make_nothing(self, catalog: SqlCatalog) -> None:
        running = await begin(catalog)
        with pytest.raises(VersionNotFoundError):
            await catalog.commit_deployment(running.id, None, AliasSpec({1: 50.0, 2: 50.0}))
        assert (await catalog.snapshot()).versions == ()
        assert (await catalog.deployment(running.id)).state == "running"

    async def test_that_do_not_exist_are_said_so(self, catalog: SqlCatalog) -> None:
        work: list[Callable[[], Awaitable[object]]] = [
            lambda: catalog.deployment("no"),
            lambda: catalog.advance_deployment("no", Step.READY),
            lambda: catalog.commit_deployment("no", None, None),
            lambda: catalog.end_deployment("no", code="internal", message="", step=None),
            lambda: catalog.request_cancel("no", KEY),
        ]
        for call in work:
            with pytest.raises(DeploymentNotFoundError):
                await call()


class TestAliases:
    FULL = AliasSpec({1: 95.0, 2: 5.0}, "header:X-User", Shadow(2, 0.5, 1e-2, 1e-4), (1,), Guard(30.0, 10, 0.1, 3.0))

    async def test_come_back_as_they_went_in(self, catalog: SqlCatalog) -> None:
        await deploy(catalog)
        await deploy(catalog, "second")
        made = await catalog.set_alias("churn", "canary", self.FULL, by="another", detail={"why": "because"})
        assert (made.spec, made.previous, made.updated_at, made.updated_by) == (self.FULL, None, NOW, "another")
        assert await catalog.alias("churn", "canary") == made
        event = (await catalog.events())[0]
        assert (event.kind, event.alias, event.by, event.detail["why"]) == ("alias_set", "canary", "another", "because")

    async def test_remember_what_they_were_before(self, catalog: SqlCatalog) -> None:
        for word in range(3):
            await deploy(catalog, word)
        alias = await catalog.alias("churn", "stable")
        assert (alias.spec.weights, alias.previous) == ({3: 100.0}, AliasSpec({2: 100.0}))
        assert alias.previous is not None
        back = await catalog.set_alias(
            "churn", "stable", alias.previous, by=KEY, kind="rolled_back", expected_revision=alias.revision
        )
        assert (back.spec, back.previous) == (alias.previous, alias.spec)
        assert (await catalog.events())[0].kind == "rolled_back"

    async def test_change_only_at_the_revision_that_was_seen(self, catalog: SqlCatalog) -> None:
        await deploy(catalog, wanted=spec(alias=None))
        first = await catalog.set_alias("churn", "a", AliasSpec({1: 100.0}), by=KEY, expected_revision=0)
        for seen in (0, first.revision - 1, first.revision + 1):
            with pytest.raises(ConflictError, match="revision"):
                await catalog.set_alias("churn", "a", self.FULL, by=KEY, expected_revision=seen)
        await catalog.delete_alias("churn", "a", by=KEY)
        second = await catalog.set_alias("churn", "a", AliasSpec({1: 100.0}), by=KEY)
        assert second.revision > first.revision, "one that was deleted and made again is another"

    async def test_that_are_set_to_what_they_are_write_nothing(self, catalog: SqlCatalog) -> None:
        await deploy(catalog)
        before = await catalog.events()
        alias = await catalog.alias("churn", "stable")
        assert await catalog.set_alias("churn", "stable", alias.spec, by="another") == alias
        assert await catalog.events() == before

    @pytest.mark.parametrize(
        "wrong",
        [AliasSpec({9: 100.0}), AliasSpec({1: 100.0}, shadow=Shadow(9)), AliasSpec({1: 100.0}, fallback=(9,))],
        ids=["target", "shadow", "fallback"],
    )
    async def test_name_versions_that_exist(self, catalog: SqlCatalog, wrong: AliasSpec) -> None:
        await deploy(catalog)
        with pytest.raises(VersionNotFoundError, match="version 9"):
            await catalog.set_alias("churn", "canary", wrong, by=KEY)
        with pytest.raises(ModelNotFoundError):
            await catalog.set_alias("nobody", "canary", wrong, by=KEY)
        with pytest.raises(AliasNotFoundError):
            await catalog.alias("churn", "canary")
        with pytest.raises(AliasNotFoundError):
            await catalog.delete_alias("churn", "canary", by=KEY)


class TestVersions:
    @pytest.mark.parametrize(
        "alias",
        [
            AliasSpec({2: 60.0, 1: 40.0}),
            AliasSpec({2: 100.0}, shadow=Shadow(1)),
            AliasSpec({2: 100.0}, fallback=(1,)),
        ],
        ids=["target", "shadow", "fallback"],
    )
    async def test_that_an_alias_names_stay(self, catalog: SqlCatalog, alias: AliasSpec) -> None:
        await deploy(catalog)
        await deploy(catalog, "second")
        await catalog.set_alias("churn", "canary", alias, by=KEY)
        with pytest.raises(ConflictError, match="'canary' does; point that alias at another version, or delete"):
            await catalog.delete_version("churn", 1, by=KEY)
        await catalog.delete_alias("churn", "canary", by=KEY)
        await catalog.delete_version("churn", 1, by=KEY)
        with pytest.raises(VersionNotFoundError):
            await catalog.version("churn", 1)
        with pytest.raises(VersionNotFoundError):
            await catalog.delete_version("churn", 1, by=KEY)
        previous = (await catalog.alias("churn", "stable")).previous
        assert previous is not None
        with pytest.raises(VersionNotFoundError):
            await catalog.set_alias("churn", "stable", previous, by=KEY, kind="rolled_back")

    async def test_that_are_being_deployed_again_stay(self, catalog: SqlCatalog) -> None:
        await deploy(catalog, wanted=spec(alias=None))
        running = await begin(catalog)
        for delete in (catalog.delete_version("churn", 1, by=KEY), catalog.delete_model("churn", by=KEY)):
            with pytest.raises(ConflictError, match=running.id):
                await delete

    async def test_change_in_nothing_but_what_is_beside_them(self, catalog: SqlCatalog) -> None:
        version = await deploy(catalog)
        changed = await catalog.change_version("churn", 1, by=KEY, labels={"a": "b"}, pinned=True)
        assert changed == replace(version, labels={"a": "b"}, pinned=True)
        assert await catalog.change_version("churn", 1, by=KEY, metadata={}) == changed
        with pytest.raises(VersionNotFoundError):
            await catalog.change_version("churn", 2, by=KEY, pinned=True)

    async def test_go_with_their_model(self, catalog: SqlCatalog) -> None:
        await deploy(catalog)
        await deploy(catalog, "second")
        kept = await deploy(catalog, wanted=spec("other"))
        await catalog.delete_model("churn", by="another")
        snapshot = await catalog.snapshot()
        assert snapshot.versions == (kept,)
        assert [alias.model for alias in snapshot.aliases] == ["other"]
        assert (await kinds(catalog, "churn"))[-3:] == ["alias_deleted", "version_deleted", "version_deleted"]
        with pytest.raises(ModelNotFoundError):
            await catalog.delete_model("churn", by=KEY)


class TestEvents:
    async def test_are_paged_youngest_first(self, catalog: SqlCatalog) -> None:
        for number in range(5):
            await catalog.add_event("worker_crashed", f"m{number % 2}", version=number, by="gateway", detail={"n": 1})
        first = await catalog.events(limit=2)
        assert [event.version for event in first] == [4, 3]
        rest = await catalog.events(before=first[-1].id)
        assert [event.version for event in rest] == [2, 1, 0]
        assert [event.version for event in await catalog.events("m1")] == [3, 1]
        assert first[0] == Event(first[0].id, NOW, "worker_crashed", "m0", 4, None, "gateway", {"n": 1})


class TestBlobs:
    async def test_belong_to_whoever_has_shown_them(self, catalog: SqlCatalog) -> None:
        assert await catalog.has_shown(WEIGHTS, KEY)
        assert not await catalog.has_shown(WEIGHTS, "another")
        record = await catalog.add_blob(WEIGHTS, 70, by="another", copy="c0ffee")
        assert (record.copy, record.created_by) == ("", KEY), "the first copy counts"
        assert await catalog.shown([WEIGHTS, GRAPH, content("x")], "another") == {WEIGHTS}
        assert await catalog.stored_bytes() == 75
        assert await catalog.stored_bytes(KEY) == 75
        assert await catalog.stored_bytes("another") == 70
        assert await catalog.stored_bytes("nobody") == 0

    async def test_are_found_by_the_models_that_have_them(self, catalog: SqlCatalog) -> None:
        await deploy(catalog)
        await deploy(catalog, wanted=spec("other", files=(FileRef("model.onnx", GRAPH, 5),)))
        found = await catalog.models_with([WEIGHTS, GRAPH, content("x")])
        assert found == {WEIGHTS: {"churn"}, GRAPH: {"churn", "other"}}
        many = [content(number) for number in range(1200)]
        assert [blob.digest for blob in await catalog.blobs([*many, GRAPH])] == [GRAPH]
        assert [blob.digest for blob in await catalog.blobs()] == sorted([GRAPH, WEIGHTS])

    async def test_keep_within_the_quota_whoever_comes_at_once(self, catalog: SqlCatalog) -> None:
        digests = [content(number) for number in range(8)]
        found = await asyncio.gather(
            *(catalog.add_blob(digest, 10, by=KEY, limit_bytes=105) for digest in digests), return_exceptions=True
        )
        assert sum(isinstance(one, QuotaExceededError) for one in found) == 5
        assert await catalog.stored_bytes() == 105
        with pytest.raises(QuotaExceededError, match="at most 20 bytes of files for this key"):
            await catalog.add_blob(WEIGHTS, 70, by="another", limit_per_key_bytes=20)
        assert not await catalog.has_shown(WEIGHTS, "another")
        await catalog.add_blob(WEIGHTS, 70, by=KEY, limit_bytes=1, limit_per_key_bytes=1)  # adds nothing

    async def test_go_when_nothing_names_them_and_nobody_wants_them(self, catalog: SqlCatalog, clock: Clock) -> None:
        old, young, running, used = (content(word) for word in ("old", "young", "running", "used"))
        for digest in (old, young, running, used):
            await catalog.add_blob(digest, 1, by=KEY)
        await deploy(catalog, wanted=spec(files=(FileRef("a", used, 1), FileRef("b", GRAPH, 5))))
        begun = await begin(catalog, "running", spec("other", files=(FileRef("a", running, 1),)))
        clock.now += timedelta(hours=2)
        await catalog.want_blobs([young])
        older = clock.now - timedelta(hours=1)
        unreferenced = [blob.digest for blob in await catalog.unreferenced_blobs(older)]
        assert unreferenced == sorted([old, WEIGHTS])
        gone = await catalog.forget_blobs([old, young, running, used], older)
        assert [blob.digest for blob in gone] == [old]
        assert await catalog.blob(old) is None
        assert not await catalog.has_shown(old, KEY)
        await catalog.end_deployment(begun.id, code="internal", message="", step=None)
        assert running in [blob.digest for blob in await catalog.unreferenced_blobs(older)]

    async def test_are_not_collected_under_a_deployment_that_begins(self, catalog: SqlCatalog, clock: Clock) -> None:
        later = clock.now + timedelta(hours=1)
        for number in range(20):
            digest = content(number)
            await catalog.add_blob(digest, 1, by=KEY)
            wanted = spec(f"m{number}", files=(FileRef("a", digest, 1),))
            begun, gone = await asyncio.gather(
                begin(catalog, number, wanted), catalog.forget_blobs([digest], later), return_exceptions=True
            )
            assert not isinstance(gone, BaseException)
            stored = await catalog.blob(digest) is not None
            assert stored is not bool(gone)
            assert stored is isinstance(begun, DeploymentRecord)


@dataclass
class Model:
    """What the history says a model is."""

    versions: dict[int, str] = field(default_factory=dict)
    retired: dict[int, str] = field(default_factory=dict)
    running: dict[str, tuple[int, bool]] = field(default_factory=dict)
    stable: dict[str, float] | None = None

    def apply(self, event: Event) -> None:
        """Take an event; AssertionError where it contradicts what came before."""
        number, detail = event.version, event.detail
        match event.kind:
            case "deployment_started":
                assert number is not None
                assert detail["reused"] is (number in self.versions)
                assert detail["reused"] or all(number != taken for taken, _ in self.running.values())
                self.running[detail["deployment"]] = (number, detail["reused"])
            case "deployment_succeeded":
                version, reused = self.running.pop(detail["deployment"])
                assert version == number
                if reused:
                    assert self.versions[version] == detail["digest"]
                else:
                    assert version not in self.versions
                    assert self.retired.get(version, detail["digest"]) == detail["digest"]
                    assert detail["digest"] not in self.versions.values()
                    self.versions[version] = detail["digest"]
            case "deployment_failed" | "deployment_cancelled":
                del self.running[detail["deployment"]]
            case "alias_set" | "rolled_back":
                previous = detail["previous"]
                assert (None if previous is None else previous["weights"]) == self.stable
                self.stable = detail["spec"]["weights"]
                assert {int(version) for version in self.stable} <= set(self.versions)
            case "alias_deleted":
                assert self.stable is not None
                self.stable = None
            case "version_deleted":
                assert number is not None
                assert self.stable is None or str(number) not in self.stable
                assert all(number != taken for taken, _ in self.running.values())
                self.retired[number] = self.versions.pop(number)
            case other:
                raise AssertionError(other)


async def act(catalog: SqlCatalog, rng: random.Random, acknowledged: list[str]) -> None:
    """One thing that somebody may do to the model. What was acknowledged is noted by the id of its deployment."""
    what = rng.randrange(10)
    if what < 5:
        word = rng.randrange(6)
        record = await begin(catalog, word, spec(version=rng.choice([None, None, None, rng.randrange(1, 6)])))
        await asyncio.sleep(0)
        if rng.random() < 0.2:
            await catalog.end_deployment(record.id, code="internal", message="", step=None)
            return
        if rng.random() < 0.2:
            await catalog.request_cancel(record.id, KEY)
        try:
            await catalog.commit_deployment(record.id, None, AliasSpec({record.version: 100.0}))
            acknowledged.append(record.id)
        except GatewayError:
            await catalog.end_deployment(record.id, code="cancelled", message="", step=None, cancelled=True)
    elif what < 7:
        alias = await catalog.alias("churn", "stable")
        if alias.previous is not None:
            await catalog.set_alias(
                "churn", "stable", alias.previous, by=KEY, kind="rolled_back", expected_revision=alias.revision
            )
    elif what < 9:
        await catalog.delete_version("churn", rng.randrange(1, 6), by=KEY)
    else:
        await catalog.delete_model("churn", by=KEY)


@pytest.mark.parametrize("seed", range(6))
async def test_actors_of_several_processes_make_one_history(database_url: str, seed: int) -> None:
    """Deploying, rolling back and deleting one name at once: the events are a history that could have happened one by
    one, in the order of their ids, and what it leads to is what is there."""
    async with AsyncExitStack() as stack:
        catalogs = [
            await stack.enter_async_context(open_catalog(database_url=database_url, timeout_s=30)) for _ in range(2)
        ]
        for digest, size in ((WEIGHTS, 70), (GRAPH, 5)):
            await catalogs[0].add_blob(digest, size, by=KEY)
        acknowledged: list[str] = []
        revisions: list[int] = []

        async def actor(number: int) -> None:
            rng = random.Random(f"{seed} {number}")
            for _ in range(6):
                with suppress(ConflictError, VersionNotFoundError, ModelNotFoundError, AliasNotFoundError):
                    await act(catalogs[number % 2], rng, acknowledged)
                revisions.append(await catalogs[number % 2].revision())

        async with asyncio.timeout(60):
            await asyncio.gather(*map(actor, range(8)))
        model = Model()
        events = list(reversed(await catalogs[0].events(limit=10_000)))
        for event in events:
            model.apply(event)
        snapshot = await catalogs[1].snapshot()
        assert {record.version: record.digest for record in snapshot.versions} == model.versions
        assert [dict(alias.spec.weights) for alias in snapshot.aliases] == (
            [] if model.stable is None else [{int(version): weight for version, weight in model.stable.items()}]
        )
        assert model.running == {}
        succeeded = [event.detail["deployment"] for event in events if event.kind == "deployment_succeeded"]
        assert sorted(succeeded) == sorted(acknowledged)
        assert snapshot.revision >= max(revisions)
