"""API keys: their text, who they stand for, and how they are checked without the database."""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import hashlib
import hmac
import logging
import math
import pickle
import re
import secrets
import string
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway_contract import names
from inferway_gateway.core import keys as module
from inferway_gateway.core.errors import (
    ConflictError,
    InvalidParameterError,
    KeyNotFoundError,
    StoreUnavailableError,
    UnauthenticatedError,
)
from inferway_gateway.core.keys import (
    ANONYMOUS,
    ApiKey,
    Authenticator,
    Clock,
    KeyRecord,
    KeyService,
    NewKey,
    Peppers,
    Principal,
    checksum,
    public_id,
    redact,
)
from inferway_gateway.store.database import KeyDatabase

BASE62 = string.digits + string.ascii_letters
PEPPERS = Peppers({1: bytes(range(32))})
START = datetime(2026, 11, 23, 12, tzinfo=UTC)


class FakeTime:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.monotonic_s = 1000.0
        self.wall_s = START.timestamp()

    @property
    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.monotonic_s, wall=lambda: self.wall_s)

    def pass_(self, seconds: float) -> None:
        self.monotonic_s += seconds
        self.wall_s += seconds


class FakeStore:
    """Records in memory. Counts what is asked, can be down, and can hold its answers back."""

    def __init__(self) -> None:
        self.records: dict[str, KeyRecord] = {}
        self.reads: list[list[str]] = []
        self.touched: list[dict[str, datetime]] = []
        self.down = False
        self.defect: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def fetch(self, key_ids: Sequence[str]) -> Mapping[str, KeyRecord]:
        self.reads.append(list(key_ids))
        found = {key_id: self.records[key_id] for key_id in key_ids if key_id in self.records}
        await self._answer()
        return found

    async def touch(self, used: Mapping[str, datetime]) -> None:
        await self._answer()
        self.touched.append(dict(used))

    async def _answer(self) -> None:
        await self.open.wait()
        if self.defect is not None:
            raise self.defect
        if self.down:
            raise StoreUnavailableError("down")

    def add(self, **changes: Any) -> bytes:
        """Store a new key and give its text."""
        key = ApiKey.generate("live")
        text = key.reveal().encode()
        record = KeyRecord(
            id=key.id,
            name="a caller",
            environment="live",
            scopes=frozenset({"infer"}),
            models=("*",),
            digest=hmac.digest(bytes(range(32)), text, "sha256"),
            pepper_version=1,
            created_at=START,
        )
        self.records[key.id] = dataclasses.replace(record, **changes)
        return text

    def change(self, key: bytes, **changes: Any) -> None:
        key_id = id_of(key)
        self.records[key_id] = dataclasses.replace(self.records[key_id], **changes)


def id_of(key: bytes) -> str:
    key_id = public_id(key)
    assert key_id is not None
    return key_id


def with_checksum(body: str) -> bytes:
    return body.encode() + checksum(body.encode())


def other_secret(key: bytes) -> bytes:
    """A well-formed key with the id of another, which differs from it in the last character of the secret only."""
    body = key[:-6].decode()
    return with_checksum(body[:-1] + ("a" if body[-1] != "a" else "b"))


def unknown_key() -> bytes:
    return ApiKey.generate("live").reveal().encode()


@pytest.fixture
def time_() -> FakeTime:
    return FakeTime()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def authenticator(store: FakeStore, time_: FakeTime) -> Authenticator:
    """Trusts a record for 4 s and reads it ahead after 1 s; through an outage for 60 s, trying once a second."""
    return Authenticator(store, PEPPERS, time_.clock, ttl_s=4.0, grace_s=60.0, retry_s=1.0)


async def refused(authenticator: Authenticator, key: bytes | str) -> str:
    assert authenticator.authenticate_cached(key) is None
    with pytest.raises(UnauthenticatedError) as caught:
        await authenticator.authenticate(key)
    return caught.value.message


class TestFormat:
    @pytest.mark.parametrize("environment", ["live", "test", "adm"])
    def test_generated_keys_have_the_form_of_the_contract(self, environment: Any) -> None:
        for _ in range(200):
            key = ApiKey.generate(environment)
            match = names.KEY_PATTERN.fullmatch(key.reveal())
            assert match is not None
            assert match[1] == environment
            assert match[2] == key.id == public_id(key.reveal())
            assert names.KEY_IN_TEXT_PATTERN.search(f"key={key.reveal()}, and on")

    def test_generated_keys_differ_and_use_the_whole_alphabet(self) -> None:
        keys = [ApiKey.generate("live") for _ in range(5000)]
        assert len({key.id for key in keys}) == len({key.reveal()[22:65] for key in keys}) == 5000
        for place in (*range(9, 21), *range(22, 65)):
            assert {key.reveal()[place] for key in keys} == set(BASE62)

    def test_secret_has_256_bits(self) -> None:
        assert module._SECRET_LENGTH * math.log2(len(BASE62)) >= 256

    @given(st.text(st.sampled_from(BASE62 + "_"), max_size=80))
    def test_checksum_is_that_of_the_contract(self, text: str) -> None:
        assert checksum(text.encode()).decode() == names.key_checksum(text)

    def test_every_edit_of_one_character_is_noticed(self) -> None:
        key = ApiKey.generate("live").reveal()
        printable = [chr(code) for code in range(32, 127)]
        edits = {key[:i] + c + key[i + 1 :] for i in range(len(key)) for c in printable}
        edits |= {key[:i] + c + key[i:] for i in range(len(key) + 1) for c in printable}
        edits |= {key[:i] + key[i + 1 :] for i in range(len(key))}
        edits |= {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
        edits.remove(key)
        assert len(edits) > 10_000
        assert [edit for edit in edits if public_id(edit) is not None] == []

    @given(
        st.text(st.sampled_from(BASE62), min_size=12, max_size=12),
        st.text(st.sampled_from(BASE62), min_size=43, max_size=43),
        st.integers(9, 64),
        st.sampled_from(BASE62),
    )
    def test_any_key_is_read_and_any_of_its_misprints_is_not(self, key_id: str, secret: str, at: int, c: str) -> None:
        key = with_checksum(f"ifw_live_{key_id}_{secret}").decode()
        assert public_id(key) == public_id(key.encode()) == key_id
        edit = key[:at] + c + key[at + 1 :]
        assert (public_id(edit) is None) is (edit != key)

    @given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
    def test_any_other_text_is_none(self, text: bytes | str) -> None:
        assert public_id(text) is None

    @pytest.mark.parametrize("space", [" ", "\n", "\r\n", "\0", "\u2003"])
    def test_space_around_a_key_is_not_part_of_it(self, space: str) -> None:
        key = ApiKey.generate("test").reveal()
        assert public_id(key + space) is None
        assert public_id(space + key) is None

    def test_digits_of_other_scripts_are_not_taken(self) -> None:
        key = with_checksum("ifw_live_" + "0" * 12 + "_" + "0" * 43).decode()
        assert public_id(key) == "0" * 12
        assert public_id(key.replace("0", "\u0660")) is None


class TestApiKey:
    def test_shows_its_public_part_only(self) -> None:
        key = ApiKey.generate("live")
        new = NewKey(_record(key), key)
        assert repr(key) == str(key) == f"{key}" == f"ifw_live_{key.id}_***"
        assert key.reveal()[22:] not in repr(new)
        assert "digest" not in repr(new)

    @pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_is_not_copied_by_accident(self, take: Callable[[object], object]) -> None:
        with pytest.raises(TypeError):
            take(ApiKey.generate("live"))

    def test_refuses_what_is_no_key_without_quoting_it(self) -> None:
        with pytest.raises(ValueError, match="expected an API key") as caught:
            ApiKey("ifw_live_hunter2")
        assert "hunter2" not in str(caught.value)

    @given(st.text(), st.sampled_from(["live", "test", "adm"]), st.text(), st.integers(1, 49))
    def test_redact_leaves_no_secret_in_a_text(self, before: str, environment: Any, after: str, cut: int) -> None:
        key = ApiKey.generate(environment).reveal()
        secret = key[-49:]
        assert secret not in redact(before + key + after)
        # A key that a log line cut short shows nothing of its secret either.
        assert redact("Bearer " + key[: len(key) - 49 + cut]) == f"Bearer {key[:-49]}***"

    @given(st.text())
    def test_redact_leaves_other_texts_alone(self, text: str) -> None:
        assert redact(text) == text


class TestPeppers:
    @given(st.dictionaries(st.integers(1, 9999), st.binary(min_size=32, max_size=64), min_size=1, max_size=4))
    def test_read_what_they_write(self, versions: dict[int, bytes]) -> None:
        peppers = Peppers(versions)
        again = Peppers.parse(f" {peppers.format()}\n")
        assert again.checks() == peppers.checks()
        assert again.current == peppers.current == max(versions)

    @pytest.mark.parametrize(
        "text",
        [
            "00ff" * 16,
            "00FF" * 16,
            "AP8A/wD/AP8A/wD/AP8A/wD/AP8A/wD/AP8A/wD/AP8=",
            "AP8A/wD/AP8A/wD/AP8A/wD/AP8A/wD/AP8A/wD/AP8",
            "AP8A_wD_AP8A_wD_AP8A_wD_AP8A_wD_AP8A_wD_AP8",
            "1:" + "00ff" * 16,
        ],
    )
    def test_are_read_in_hex_and_base64(self, text: str) -> None:
        assert Peppers.parse(text).checks() == Peppers({1: b"\x00\xff" * 16}).checks()

    @pytest.mark.parametrize(
        "text",
        [
            "", " ", ",", "1:", "1:00", "ab" * 31, "0:" + "ab" * 32, "-1:" + "ab" * 32, "x:" + "ab" * 32,
            ":" + "ab" * 32, "1:" + "ab" * 32 + ",1:" + "cd" * 32, "ab" * 32 + "," + "cd" * 32, "12345:" + "ab" * 32,
            "*" * 64, "ü" * 64,
            "ab" * 32 + "x", "\u0661:" + "ab" * 32,
        ],
    )  # fmt: skip
    def test_of_another_form_are_refused_without_quoting_them(self, text: str) -> None:
        with pytest.raises(ValueError, match="pepper") as caught:
            Peppers.parse(text)
        assert "ab" * 4 not in str(caught.value)
        assert caught.value.__cause__ is None

    def test_need_one(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            Peppers({})

    def test_digest_is_hmac_sha256_by_version(self) -> None:
        peppers = Peppers({1: b"a" * 32, 3: b"b" * 32})
        assert peppers.current == 3
        assert peppers.digest(1, b"key") == hmac.new(b"a" * 32, b"key", "sha256").digest()
        assert peppers.digest(3, b"key") == hmac.new(b"b" * 32, b"key", "sha256").digest()
        assert peppers.digest(2, b"key") is None

    def test_show_their_versions_only(self) -> None:
        pepper = secrets.token_bytes(32)
        shown = repr(Peppers({1: pepper, 2: b"b" * 32}))
        assert shown == "Peppers(versions=[1, 2])"
        with pytest.raises(TypeError):
            pickle.dumps(Peppers({1: pepper}))

    def test_generated_ones_differ(self) -> None:
        assert Peppers.generate().checks() != Peppers.generate().checks()


class TestPrincipal:
    @pytest.mark.parametrize(
        ("scopes", "accepted", "allowed"),
        [
            ({"infer"}, {"infer"}, True),
            ({"infer"}, {"infer", "read"}, True),
            ({"read"}, {"infer"}, False),
            ({"infer", "read", "deploy"}, {"admin"}, False),
            ({"admin"}, {"infer"}, True),
            ({"admin"}, {"deploy"}, True),
            ({"infer"}, set(), True),
            (set(), {"infer"}, False),
            (set(), set(), True),
        ],
    )
    def test_may_what_one_of_its_scopes_opens(self, scopes: set[str], accepted: set[str], allowed: bool) -> None:
        principal = Principal("k", "n", frozenset(scopes), ("*",))
        assert principal.may(frozenset(accepted)) is allowed

    @pytest.mark.parametrize(
        ("models", "model", "seen"),
        [
            (("*",), "anything", True),
            (("digits",), "digits", True),
            (("digits",), "digits2", False),
            (("digits",), "Digits", False),
            (("mini*",), "minilm", True),
            (("mini*",), "amini", False),
            (("a", "b?"), "b1", True),
            (("a", "b?"), "b", False),
            (("a", "*"), "anything", True),
            (("v[0-9]",), "v3", True),
            (("v[!0-9]",), "v3", False),
            (("a.c",), "abc", False),
            (("a",), "a\n", False),
            ((), "a", False),
        ],
    )
    def test_sees_models_by_pattern(self, models: tuple[str, ...], model: str, seen: bool) -> None:
        assert Principal("k", "n", frozenset(), models).sees(model) is seen

    @given(st.lists(st.from_regex(names.MODEL_GLOB_PATTERN, fullmatch=True), min_size=1, max_size=5), st.text())
    def test_takes_every_pattern_that_the_contract_allows(self, models: list[str], model: str) -> None:
        Principal("k", "n", frozenset(), tuple(models)).sees(model)

    def test_matches_hostile_patterns_in_time(self) -> None:
        principal = Principal("k", "n", frozenset(), ("*a" * 60 + "b",))
        assert not principal.sees("a" * 128)

    def test_anonymous_may_and_sees_everything(self) -> None:
        assert all(ANONYMOUS.may(frozenset({scope})) for scope in names.SCOPES)
        assert ANONYMOUS.sees("anything")
        assert ANONYMOUS.key_id == ""

    def test_scopes_are_those_of_the_contract(self) -> None:
        assert frozenset(names.SCOPES) == module.SCOPES


class TestAuthenticating:
    async def test_a_good_key_gives_its_principal_then_from_memory(
        self, store: FakeStore, authenticator: Authenticator
    ) -> None:
        key = store.add(scopes=frozenset({"read"}), models=("a*",), expires_at=START + timedelta(days=1))
        assert authenticator.authenticate_cached(key) is None
        principal = await authenticator.authenticate(key)
        assert principal == Principal(
            id_of(key), "a caller", frozenset({"read"}), ("a*",), (START + timedelta(days=1)).timestamp()
        )
        assert authenticator.authenticate_cached(key) is principal
        assert authenticator.authenticate_cached(key.decode()) is principal
        assert await authenticator.authenticate(key.decode()) is principal
        assert store.reads == [[id_of(key)]]

    async def test_a_rotated_key_carries_when(self, store: FakeStore, authenticator: Authenticator) -> None:
        key = store.add(rotated_at=START, replaced_by="s" * 12, expires_at=START + timedelta(hours=1))
        assert (await authenticator.authenticate(key)).rotated_at == START.timestamp()

    async def test_all_bad_keys_get_the_same_answer(self, store: FakeStore, authenticator: Authenticator) -> None:
        key = store.add()
        bad = [
            b"",
            b"junk",
            key[:-1],
            unknown_key(),
            other_secret(key),
            store.add(revoked_at=START),
            store.add(expires_at=START),
            store.add(pepper_version=7),
        ]
        assert len({await refused(authenticator, each) for each in bad}) == 1

    async def test_junk_never_reaches_the_store(self, store: FakeStore, authenticator: Authenticator) -> None:
        key = store.add()
        for junk in (
            key[:-1],
            key + b"x",
            key.upper(),
            b"x" * 100_000,
            "é" * 71,
            key.decode() + "\ud800",
            b"\xff" * 71,
        ):
            await refused(authenticator, junk)
        assert store.reads == []

    def test_a_text_longer_than_any_key_is_not_even_hashed(
        self, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def never(*_: object, **__: object) -> None:
            raise AssertionError("hashed")

        monkeypatch.setattr(hashlib, "blake2b", never)
        assert authenticator.authenticate_cached(b"x" * 72) is None
        with pytest.raises(AssertionError, match="hashed"):
            authenticator.authenticate_cached(b"x" * 71)

    async def test_a_wrong_secret_asks_the_store_once(self, store: FakeStore, authenticator: Authenticator) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        for _ in range(5):
            await refused(authenticator, other_secret(key))
        assert len(store.reads) == 1
        assert authenticator.authenticate_cached(key) is not None

    async def test_the_right_secret_under_another_word_is_refused(
        self, store: FakeStore, authenticator: Authenticator
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        await refused(authenticator, with_checksum(key[:-6].decode().replace("ifw_live_", "ifw_test_")))

    async def test_an_unknown_id_asks_the_store_once_in_its_time(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = unknown_key()
        for _ in range(5):
            await refused(authenticator, key)
        assert len(store.reads) == 1
        time_.pass_(4)
        await refused(authenticator, key)
        assert len(store.reads) == 2

    @pytest.mark.parametrize("known", [True, False])
    async def test_a_read_that_takes_longer_than_the_ttl_is_enough(self, time_: FakeTime, known: bool) -> None:
        class Slow(FakeStore):
            async def _answer(self) -> None:
                assert len(self.reads) == 1
                time_.pass_(5)

        slow = Slow()
        authenticator = Authenticator(slow, PEPPERS, time_.clock, ttl_s=4)
        if known:
            key = slow.add()
            assert (await authenticator.authenticate(key)).key_id == id_of(key)
        else:
            await refused(authenticator, unknown_key())
        assert len(slow.reads) == 1

    async def test_a_pepper_that_is_missing_is_told_once(
        self, store: FakeStore, authenticator: Authenticator, caplog: pytest.LogCaptureFixture
    ) -> None:
        key = store.add(pepper_version=7)
        for _ in range(3):
            await refused(authenticator, other_secret(key))
        assert [record.getMessage() for record in caplog.records] == [
            f"key {id_of(key)} was made with pepper version 7, which is not configured"
        ]

    async def test_many_who_wait_for_one_key_share_a_read(self, store: FakeStore, authenticator: Authenticator) -> None:
        key = store.add()
        store.open.clear()
        waiting = [asyncio.create_task(authenticator.authenticate(key)) for _ in range(20)]
        await _until(lambda: store.reads != [])
        store.open.set()
        assert len({id(principal) for principal in await asyncio.gather(*waiting)}) == 1
        assert len(store.reads) == 1

    async def test_one_who_goes_away_leaves_the_read_to_the_others(
        self, store: FakeStore, authenticator: Authenticator
    ) -> None:
        key = store.add()
        store.open.clear()
        first = asyncio.create_task(authenticator.authenticate(key))
        await _until(lambda: store.reads != [])
        second = asyncio.create_task(authenticator.authenticate(key))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        store.open.set()
        assert (await second).key_id == id_of(key)
        assert len(store.reads) == 1

    async def test_too_many_new_ids_at_once_are_an_answer(self, store: FakeStore, time_: FakeTime) -> None:
        authenticator = Authenticator(store, PEPPERS, time_.clock, max_reads=2)
        known = store.add()
        await authenticator.authenticate(known)
        store.open.clear()
        waiting = [asyncio.create_task(authenticator.authenticate(unknown_key())) for _ in range(2)]
        await _until(lambda: len(store.reads) == 3)
        with pytest.raises(StoreUnavailableError):
            await authenticator.authenticate(store.add())
        assert authenticator.authenticate_cached(known) is not None
        store.open.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, UnauthenticatedError) for result in results)

    async def test_a_defect_of_the_store_is_passed_on_and_does_not_stick(
        self, store: FakeStore, authenticator: Authenticator
    ) -> None:
        key = store.add()
        store.defect = LookupError("a defect")
        with pytest.raises(LookupError):
            await authenticator.authenticate(key)
        store.defect = None
        await authenticator.authenticate(key)

    async def test_wrong_keys_of_all_kinds_take_the_same_steps(
        self, store: FakeStore, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Time is no measure on a shared machine; the steps that depend on the secret are."""
        key, strange = store.add(), unknown_key()
        await authenticator.authenticate(key)
        with pytest.raises(UnauthenticatedError):
            await authenticator.authenticate(strange)
        steps: list[str] = []

        def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                steps.append(name)
                return function(*args, **kwargs)

            return call

        monkeypatch.setattr(hmac, "compare_digest", watched("compare", hmac.compare_digest))
        monkeypatch.setattr(hmac, "digest", watched("hmac", hmac.digest))
        monkeypatch.setattr(hashlib, "blake2b", watched("blake2b", hashlib.blake2b))
        taken = []
        for wrong in (strange, other_secret(key), with_checksum(key[:22].decode() + "0" * 43)):
            steps.clear()
            await refused(authenticator, wrong)
            taken.append(list(steps))
        assert taken == [["blake2b", "compare", "hmac", "compare"]] * 3

    async def test_a_pepper_that_is_not_here_is_the_operators_to_know(
        self, store: FakeStore, authenticator: Authenticator, caplog: pytest.LogCaptureFixture
    ) -> None:
        key = store.add(pepper_version=7)
        await refused(authenticator, key)
        assert "version 7" in caplog.text
        assert id_of(key) in caplog.text

    async def test_keys_of_an_older_pepper_work(self, store: FakeStore, time_: FakeTime) -> None:
        key = store.add()
        newer = Authenticator(store, Peppers({1: bytes(range(32)), 2: b"n" * 32}), time_.clock)
        assert (await newer.authenticate(key)).key_id == id_of(key)

    async def test_memory_is_bounded_and_the_oldest_goes(self, store: FakeStore, time_: FakeTime) -> None:
        authenticator = Authenticator(store, PEPPERS, time_.clock, capacity=3)
        known = [store.add() for _ in range(5)]
        for key in known:
            await authenticator.authenticate(key)
            await refused(authenticator, unknown_key())
        assert [authenticator.authenticate_cached(key) is not None for key in known] == [False, False, True, True, True]
        assert len(authenticator._entries) == len(authenticator._unknown) == 3
        # What the evicted were last used for is not lost with them.
        await authenticator.flush()
        assert store.touched[0].keys() == {id_of(key) for key in known}

    async def test_memory_holds_no_secret(self, store: FakeStore, authenticator: Authenticator) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        authenticator.authenticate_cached(key)
        secret = key[-49:]
        seen: set[int] = set()
        stack: list[object] = [
            authenticator._entries,
            authenticator._unknown,
            authenticator._due,
            authenticator._flights,
        ]
        while stack:
            value = stack.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, str | bytes):
                assert secret not in (value.encode() if isinstance(value, str) else value)
            elif isinstance(value, dict):
                stack += [*value.keys(), *value.values()]
            elif isinstance(value, set | frozenset | tuple | list):
                stack += value
            else:
                slots = getattr(type(value), "__slots__", ())
                stack += [getattr(value, slot) for slot in slots if hasattr(value, slot)]
        assert len(seen) > 10
        assert secret.decode() not in repr(authenticator._entries)


class TestForgetting:
    async def test_a_revocation_in_this_process_acts_at_once(
        self, store: FakeStore, authenticator: Authenticator
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        store.change(key, revoked_at=START)
        authenticator.forget(id_of(key))
        await refused(authenticator, key)

    async def test_a_read_that_began_before_does_not_count(
        self, store: FakeStore, authenticator: Authenticator
    ) -> None:
        key = store.add()
        store.open.clear()
        waiting = asyncio.create_task(authenticator.authenticate(key))
        await _until(lambda: len(store.reads) == 1)
        # The read has its (old) answer and is on its way back with it.
        store.change(key, revoked_at=START)
        authenticator.forget(id_of(key))
        store.open.set()
        with pytest.raises(UnauthenticatedError):
            await waiting
        assert len(store.reads) == 2
        await refused(authenticator, key)

    async def test_a_newer_read_is_not_disturbed_by_an_older_one(
        self, store: FakeStore, authenticator: Authenticator
    ) -> None:
        key = store.add()
        store.open.clear()
        old = asyncio.create_task(authenticator.authenticate(key))
        await _until(lambda: len(store.reads) == 1)
        authenticator.forget(id_of(key))
        new = asyncio.create_task(authenticator.authenticate(key))
        await _until(lambda: len(store.reads) == 2)
        store.open.set()
        assert (await old).key_id == (await new).key_id == id_of(key)

    async def test_an_unknown_id_or_any_text_does_no_harm(self, authenticator: Authenticator) -> None:
        authenticator.forget("x" * 12)
        authenticator.forget("é")

    async def test_an_unknown_id_is_asked_for_again(self, store: FakeStore, authenticator: Authenticator) -> None:
        key = store.add()
        record = store.records.pop(id_of(key))
        await refused(authenticator, key)
        store.records[record.id] = record
        authenticator.forget(record.id)
        assert (await authenticator.authenticate(key)).key_id == record.id

    async def test_keeps_when_the_key_was_last_used(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        authenticator.forget(id_of(key))
        await authenticator.flush()
        assert store.touched == [{id_of(key): START}]


class TestTime:
    async def test_a_record_is_trusted_for_its_time_from_the_start_of_its_read(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        store.open.clear()
        waiting = asyncio.create_task(authenticator.authenticate(key))
        await _until(lambda: store.reads != [])
        time_.pass_(1.5)  # the read takes that long
        store.open.set()
        await waiting
        store.change(key, revoked_at=START)
        time_.pass_(2.4)
        assert authenticator.authenticate_cached(key) is not None
        time_.pass_(0.2)
        await refused(authenticator, key)

    async def test_a_key_in_use_is_read_ahead_and_never_waits(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        for _ in range(40):
            time_.pass_(0.5)
            assert authenticator.authenticate_cached(key) is not None
            await authenticator.refresh()
        assert len(store.reads) == 1 + 20  # one a second, however often it is used

    async def test_a_key_in_use_that_was_revoked_elsewhere_stops_at_the_next_reading(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        store.change(key, revoked_at=START)
        time_.pass_(1)
        assert authenticator.authenticate_cached(key) is not None
        await authenticator.refresh()
        await refused(authenticator, key)

    async def test_a_key_in_use_that_was_deleted_elsewhere_stops_at_the_next_reading(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        del store.records[id_of(key)]
        time_.pass_(1)
        authenticator.authenticate_cached(key)
        await authenticator.refresh()
        await refused(authenticator, key)
        assert len(store.reads) == 2

    async def test_keys_in_use_are_read_together(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        known = [store.add() for _ in range(501)]
        for key in known:
            await authenticator.authenticate(key)
        store.reads.clear()
        time_.pass_(1)
        for key in known:
            authenticator.authenticate_cached(key)
        await authenticator.refresh()
        assert [len(read) for read in store.reads] == [500, 1]

    async def test_keys_not_in_use_are_not_read(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        used, forgotten = store.add(), store.add()
        for key in (used, forgotten):
            await authenticator.authenticate(key)
        time_.pass_(1)
        authenticator.authenticate_cached(used)
        authenticator.authenticate_cached(forgotten)
        authenticator.forget(id_of(forgotten))
        store.reads.clear()
        await authenticator.refresh()
        await authenticator.refresh()
        assert store.reads == [[id_of(used)]]

    async def test_a_key_that_is_being_read_is_not_read_twice(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        time_.pass_(1)
        authenticator.authenticate_cached(key)
        store.open.clear()
        first = asyncio.create_task(authenticator.refresh())
        await _until(lambda: len(store.reads) == 2)
        authenticator.authenticate_cached(key)
        await authenticator.refresh()
        store.open.set()
        await first
        assert len(store.reads) == 2

    async def test_another_digest_for_an_id_ends_the_old_secret(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        store.change(key, digest=secrets.token_bytes(32))
        time_.pass_(1)
        authenticator.authenticate_cached(key)
        await authenticator.refresh()
        await refused(authenticator, key)

    async def test_expiry_is_a_moment_of_the_wall_clock(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add(expires_at=START + timedelta(seconds=2))
        await authenticator.authenticate(key)
        time_.wall_s += 1.999
        assert authenticator.authenticate_cached(key) is not None
        time_.wall_s += 0.001
        await refused(authenticator, key)
        assert len(store.reads) == 1

    @pytest.mark.parametrize("jump", [3600, -3600, 86_400, -86_400])
    async def test_a_jump_of_the_wall_clock_refuses_no_lasting_key(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime, jump: float
    ) -> None:
        keys = [store.add(), store.add(expires_at=START + timedelta(days=30))]
        for key in keys:
            await authenticator.authenticate(key)
        time_.wall_s += jump
        assert all(authenticator.authenticate_cached(key) is not None for key in keys)
        time_.monotonic_s += 5
        for key in keys:
            await authenticator.authenticate(key)


class TestOutage:
    async def test_leaves_keys_in_use_working_without_a_wait_for_the_grace(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        store.down = True
        for _ in range(118):
            time_.pass_(0.5)
            assert authenticator.authenticate_cached(key) is not None
            await authenticator.refresh()
        assert len(store.reads) <= 60  # tried about once a second, not at each use
        time_.pass_(1.5)
        await self._refused_for_now(authenticator, key)

    async def test_leaves_keys_working_that_were_not_in_use(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        store.down = True
        time_.pass_(30)
        assert authenticator.authenticate_cached(key) is None
        assert (await authenticator.authenticate(key)).key_id == id_of(key)
        time_.pass_(40)
        await self._refused_for_now(authenticator, key)

    async def test_that_another_key_met_is_not_met_again(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        store.down = True
        time_.pass_(30)
        await self._refused_for_now(authenticator, store.add())
        assert (await authenticator.authenticate(key)).key_id == id_of(key)
        assert len(store.reads) == 2

    async def test_is_said_for_other_keys_and_does_not_ask_each_time(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        store.down = True
        for _ in range(5):
            await self._refused_for_now(authenticator, store.add())
        assert len(store.reads) == 1
        time_.pass_(1)
        await self._refused_for_now(authenticator, store.add())
        assert len(store.reads) == 2

    async def test_does_not_let_wrong_secrets_or_expired_keys_in(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add(expires_at=START + timedelta(seconds=20))
        await authenticator.authenticate(key)
        store.down = True
        time_.pass_(10)
        await authenticator.authenticate(key)
        await refused(authenticator, other_secret(key))
        time_.pass_(10)
        await refused(authenticator, key)

    async def test_does_not_bring_a_forgotten_key_back(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        store.down = True
        authenticator.forget(id_of(key))
        await self._refused_for_now(authenticator, key)

    async def test_ends_when_the_store_answers(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        store.down = True
        await self._refused_for_now(authenticator, key)
        store.down = False
        time_.pass_(1)
        assert (await authenticator.authenticate(key)).key_id == id_of(key)
        assert (await authenticator.authenticate(store.add())).name == "a caller"

    async def test_keeps_when_keys_were_used_for_later(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key = store.add()
        await authenticator.authenticate(key)
        store.down = True
        await authenticator.flush()
        assert store.touched == []
        store.down = False
        await authenticator.flush()
        await authenticator.flush()
        assert store.touched == [{id_of(key): START}]

    @staticmethod
    async def _refused_for_now(authenticator: Authenticator, key: bytes) -> None:
        assert authenticator.authenticate_cached(key) is None
        with pytest.raises(StoreUnavailableError) as caught:
            await authenticator.authenticate(key)
        assert caught.value.retry_after_s == 1.0


class TestLastUsed:
    async def test_is_written_once_for_many_uses(
        self, store: FakeStore, authenticator: Authenticator, time_: FakeTime
    ) -> None:
        key, idle = store.add(), store.add()
        await authenticator.authenticate(key)
        with pytest.raises(UnauthenticatedError):
            await authenticator.authenticate(other_secret(idle))
        for _ in range(3):
            time_.pass_(1)
            authenticator.authenticate_cached(key)
        await authenticator.flush()
        await authenticator.flush()
        assert store.touched == [{id_of(key): START + timedelta(seconds=3)}]

    async def test_of_an_evicted_key_is_the_later_of_two(self, store: FakeStore, time_: FakeTime) -> None:
        authenticator = Authenticator(store, PEPPERS, time_.clock, capacity=1)
        a, b = store.add(), store.add()
        await authenticator.authenticate(a)
        await authenticator.authenticate(b)
        time_.pass_(1)
        store.open.clear()
        flushing = asyncio.create_task(authenticator.flush())
        await asyncio.sleep(0)
        store.open.set()
        time_.pass_(1)
        await authenticator.authenticate(a)  # used again, and b evicted, while the write is under way
        await authenticator.authenticate(b)
        await flushing
        await authenticator.flush()
        written = [
            {key_id: (moment - START).seconds for key_id, moment in touched.items()} for touched in store.touched
        ]
        assert written == [{id_of(a): 0, id_of(b): 0}, {id_of(a): 2, id_of(b): 2}]

    async def test_is_written_in_parts(self, store: FakeStore, authenticator: Authenticator) -> None:
        for _ in range(501):
            await authenticator.authenticate(store.add())
        await authenticator.flush()
        assert sorted(map(len, store.touched)) == [1, 500]


class TestOwnTasks:
    @pytest.mark.looptime
    async def test_read_busy_keys_ahead_and_write_their_use_once_a_minute(self, store: FakeStore) -> None:
        loop = asyncio.get_running_loop()
        clock = Clock(monotonic=loop.time, wall=lambda: START.timestamp() + loop.time())
        key = store.add()
        async with Authenticator(store, PEPPERS, clock, ttl_s=4.0, touch_s=60.0) as authenticator:
            await authenticator.authenticate(key)
            for _ in range(1500):  # two and a half minutes
                await asyncio.sleep(0.1)
                assert authenticator.authenticate_cached(key) is not None
            assert 100 < len(store.reads) < 151
            assert len(store.touched) == 2
        assert len(store.touched) == 3  # the rest, at the end

    @pytest.mark.looptime
    async def test_survive_a_defect_and_say_so(self, store: FakeStore, caplog: pytest.LogCaptureFixture) -> None:
        loop = asyncio.get_running_loop()
        key = store.add()
        async with Authenticator(store, PEPPERS, Clock(monotonic=loop.time), ttl_s=4.0) as authenticator:
            await authenticator.authenticate(key)
            await asyncio.sleep(1)
            authenticator.authenticate_cached(key)
            store.defect = LookupError("a defect")
            await asyncio.sleep(0.5)
            assert "a defect" in caplog.text
            store.defect = None
            authenticator.authenticate_cached(key)
            await asyncio.sleep(0.5)
            assert len(store.reads) == 3

    async def test_end_with_it_and_wait_for_reads_under_way(self, store: FakeStore) -> None:
        key = store.add()
        before = asyncio.all_tasks()
        authenticator = Authenticator(store, PEPPERS)
        async with authenticator:
            store.open.clear()
            waiting = asyncio.create_task(authenticator.authenticate(key))
            await _until(lambda: store.reads != [])
            asyncio.get_running_loop().call_soon(store.open.set)
        assert (await waiting).key_id == id_of(key)
        assert asyncio.all_tasks() == before


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[KeyDatabase]:
    opened = await KeyDatabase.open(f"sqlite:///{tmp_path}/keys.db", PEPPERS, timeout_s=20)
    try:
        yield opened
    finally:
        await opened.close()


@dataclasses.dataclass
class Managed:
    service: KeyService
    authenticator: Authenticator
    time: FakeTime
    database: KeyDatabase


@pytest.fixture
async def managed(database: KeyDatabase, time_: FakeTime) -> AsyncIterator[Managed]:
    async with Authenticator(database, PEPPERS, time_.clock) as authenticator:
        yield Managed(KeyService(database, PEPPERS, authenticator, time_.clock), authenticator, time_, database)


class TestCreating:
    async def test_makes_a_key_that_works(self, managed: Managed) -> None:
        new = await managed.service.create(
            name="web shop", scopes=["read", "infer"], models=["a*", "b"], environment="test", created_by="c" * 12
        )
        principal = await managed.authenticator.authenticate(new.key.reveal())
        assert principal == Principal(new.key.id, "web shop", frozenset({"infer", "read"}), ("a*", "b"))
        assert new.record == await managed.service.get(new.key.id)
        assert new.key.reveal().startswith("ifw_test_")
        assert new.record.created_by == "c" * 12
        assert new.replaced is None

    @pytest.mark.parametrize(
        ("scopes", "asked", "days"),
        [
            (["infer"], None, None),
            (["infer", "read", "deploy"], None, None),
            (["admin"], None, 90),
            (["admin", "infer"], None, 90),
            (["admin"], "never", None),
            (["infer"], "never", None),
            (["infer"], 86_400, 1),
            (["admin"], 86_400, 1),
        ],
    )
    async def test_gives_admin_keys_90_days_unless_told(
        self, managed: Managed, scopes: list[str], asked: Any, days: int | None
    ) -> None:
        new = await managed.service.create(name="a", scopes=scopes, expires_in_s=asked)
        assert new.record.expires_at == (None if days is None else START + timedelta(days=days))

    async def test_marks_admin_keys_in_their_text(self, managed: Managed) -> None:
        new = await managed.service.create(name="a", scopes=["infer", "admin"])
        assert re.match(r"ifw_adm_", new.key.reveal())
        assert new.record.environment == "adm"

    @pytest.mark.parametrize(
        "wrong",
        [
            {"scopes": []},
            {"scopes": ["infre"]},
            {"scopes": ["infer", "root"]},
            {"models": []},
            {"expires_in_s": 0},
            {"expires_in_s": -1},
            {"expires_in_s": math.nan},
            {"expires_in_s": math.inf},
            {"expires_in_s": module.MAX_LIFETIME_S + 1},
        ],
    )
    async def test_refuses_what_makes_no_sense(self, managed: Managed, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidParameterError, match="expected"):
            await managed.service.create(**{"name": "a", "scopes": ["infer"]} | wrong)
        assert await managed.service.page() == ([], None)

    async def test_does_not_make_a_second_key_for_the_same_request(self, managed: Managed) -> None:
        service, ask = managed.service, {"name": "a", "scopes": ["infer"], "idempotency_key": "once"}
        first = await service.create(**ask, created_by="a" * 12)  # type: ignore[arg-type]  # a dict of several types
        with pytest.raises(ConflictError, match=first.key.id):
            await service.create(**ask, created_by="a" * 12)  # type: ignore[arg-type]  # a dict of several types
        # Another caller's word, and the same word a day later, are other requests.
        await service.create(**ask, created_by="b" * 12)  # type: ignore[arg-type]  # a dict of several types
        await service.create(**ask)  # type: ignore[arg-type]  # a dict of several types
        managed.time.pass_(86_400)
        await service.create(**ask, created_by="a" * 12)  # type: ignore[arg-type]  # a dict of several types
        assert len((await service.page())[0]) == 4

    async def test_uses_the_newest_pepper(self, database: KeyDatabase) -> None:
        peppers = Peppers({1: bytes(range(32)), 2: b"n" * 32})
        new = await KeyService(database, peppers).create(name="a", scopes=["infer"])
        assert new.record.pepper_version == 2
        assert new.record.digest == hmac.digest(b"n" * 32, new.key.reveal().encode(), "sha256")

    async def test_logs_ids_and_no_secret(self, managed: Managed, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        new = await managed.service.create(name="a", scopes=["infer"])
        rotated = await managed.service.rotate(new.key.id)
        await managed.service.revoke(rotated.key.id, by=new.key.id)
        with pytest.raises(UnauthenticatedError):
            await managed.authenticator.authenticate(rotated.key.reveal())
        for key in (new.key, rotated.key):
            assert key.id in caplog.text
            assert key.reveal()[-49:] not in caplog.text
            assert key.reveal()[-49:] not in repr((new, rotated, managed))


class TestState:
    @pytest.mark.parametrize(
        ("changes", "state"),
        [
            ({}, "active"),
            ({"expires_at": START + timedelta(microseconds=1)}, "active"),
            ({"expires_at": START}, "expired"),
            ({"revoked_at": START}, "revoked"),
            ({"revoked_at": START, "expires_at": START}, "revoked"),
            ({"rotated_at": START, "replaced_by": "s" * 12, "expires_at": START + timedelta(days=1)}, "active"),
        ],
    )
    def test_of_a_record_at_a_moment(self, changes: dict[str, Any], state: str) -> None:
        assert dataclasses.replace(_record(ApiKey.generate("live")), **changes).state(START) == state


class TestLooking:
    async def test_pages_lead_to_every_key_newest_first(self, managed: Managed) -> None:
        made = []
        for i in range(7):
            managed.time.pass_(i % 2)
            made.append((await managed.service.create(name=str(i), scopes=["infer"])).record)
        seen: list[KeyRecord] = []
        cursor: str | None = None
        sizes = []
        while True:
            page, cursor = await managed.service.page(limit=3, cursor=cursor)
            sizes.append(len(page))
            seen += page
            if cursor is None:
                break
            assert len(cursor) <= names.KEY_CURSOR_MAX_LENGTH
        assert sizes == [3, 3, 1]
        assert seen == sorted(made, key=lambda record: (record.created_at, record.id), reverse=True)

    async def test_a_last_page_that_is_full_is_the_last(self, managed: Managed) -> None:
        await managed.service.create(name="a", scopes=["infer"])
        assert (await managed.service.page(limit=1))[1] is None

    @given(st.one_of(st.text(max_size=130), st.binary(max_size=90).map(lambda raw: _cursor_of(raw))))
    def test_another_cursor_is_refused(self, cursor: str) -> None:
        with pytest.raises(InvalidParameterError):
            module._position(cursor)

    @pytest.mark.parametrize(
        "text",
        [
            "2026-11-23T12:00:00 " + "a" * 12,  # no zone
            "2026-11-23T12:00:00+01:00 " + "a" * 12,
            "2026-11-23T12:00:00+00:00 short",
            "2026-11-23T12:00:00+00:00 " + "a" * 11 + "\0",
            "2026-11-23T12:00:00+00:00",
            "soon " + "a" * 12,
        ],
    )
    async def test_a_cursor_of_our_form_with_other_content_is_refused(self, managed: Managed, text: str) -> None:
        with pytest.raises(InvalidParameterError):
            await managed.service.page(cursor=_cursor_of(text.encode()))

    @pytest.mark.parametrize(
        "key_id", ["", "x" * 12, "x" * 13, "../etc/passwd", "a" * 11 + "\0", "é" * 12, "' OR 1=1 --"]
    )
    async def test_an_unknown_id_is_not_found_whatever_it_is(self, managed: Managed, key_id: str) -> None:
        for act in (managed.service.get, managed.service.revoke, managed.service.rotate):
            with pytest.raises(KeyNotFoundError) as caught:
                await act(key_id)
            assert not key_id or key_id not in caught.value.message

    async def test_any_usable_tells_whether_a_key_opens_anything(self, managed: Managed) -> None:
        assert not await managed.service.any_usable()
        new = await managed.service.create(name="a", scopes=["infer"], expires_in_s=10)
        assert await managed.service.any_usable()
        managed.time.pass_(10)
        assert not await managed.service.any_usable()
        new = await managed.service.create(name="a", scopes=["infer"])
        await managed.service.revoke(new.key.id)
        assert not await managed.service.any_usable()


class TestEnding:
    async def test_revoking_acts_at_once_and_once(self, managed: Managed) -> None:
        new = await managed.service.create(name="a", scopes=["infer"])
        key = new.key.reveal().encode()
        await managed.authenticator.authenticate(key)
        record = await managed.service.revoke(new.key.id)
        assert record.revoked_at == START
        await refused(managed.authenticator, key)
        managed.time.pass_(5)
        assert await managed.service.revoke(new.key.id) == await managed.service.get(new.key.id)
        assert (await managed.service.get(new.key.id)).revoked_at == START

    async def test_revoking_that_got_no_answer_still_forgets_the_key(self, store: FakeStore, time_: FakeTime) -> None:
        class Silent(FakeStore):
            async def revoke(self, key_id: str, now: datetime) -> KeyRecord:
                raise StoreUnavailableError("down")

        silent = Silent()
        key = silent.add()
        authenticator = Authenticator(silent, PEPPERS, time_.clock)
        await authenticator.authenticate(key)
        service = KeyService(silent, PEPPERS, authenticator, time_.clock)  # type: ignore[arg-type]  # what is used is there
        with pytest.raises(StoreUnavailableError):
            await service.revoke(id_of(key))
        assert authenticator.authenticate_cached(key) is None

    async def test_without_an_authenticator_others_learn_of_it_in_their_time(self, managed: Managed) -> None:
        elsewhere = KeyService(managed.database, PEPPERS, clock=managed.time.clock)
        new = await elsewhere.create(name="a", scopes=["infer"])
        key = new.key.reveal().encode()
        await managed.authenticator.authenticate(key)
        await elsewhere.revoke(new.key.id)
        managed.time.pass_(3.9)
        assert managed.authenticator.authenticate_cached(key) is not None
        managed.time.pass_(0.1)
        await refused(managed.authenticator, key)


class TestRotating:
    async def test_lets_both_work_until_the_overlap_ends(self, managed: Managed) -> None:
        old = await managed.service.create(name="a", scopes=["infer"], models=["m*"], environment="test")
        await managed.authenticator.authenticate(old.key.reveal())
        new = await managed.service.rotate(old.key.id, overlap_s=100)
        assert new.replaced == await managed.service.get(old.key.id)
        assert new.replaced.replaced_by == new.key.id
        for _ in range(99):
            managed.time.pass_(1)
            for made in (old, new):
                assert (await managed.authenticator.authenticate(made.key.reveal())).name == "a"
        principal = await managed.authenticator.authenticate(old.key.reveal())
        assert (principal.rotated_at, principal.expires_at) == (START.timestamp(), START.timestamp() + 100)
        managed.time.pass_(1)
        await refused(managed.authenticator, old.key.reveal())
        principal = await managed.authenticator.authenticate(new.key.reveal())
        assert principal == Principal(new.key.id, "a", frozenset({"infer"}), ("m*",))
        assert new.key.reveal().startswith("ifw_test_")

    async def test_without_overlap_ends_the_old_key_now(self, managed: Managed) -> None:
        old = await managed.service.create(name="a", scopes=["infer"])
        await managed.authenticator.authenticate(old.key.reveal())
        await managed.service.rotate(old.key.id, overlap_s=0)
        await refused(managed.authenticator, old.key.reveal())

    async def test_gives_the_successor_the_same_length_of_life(self, managed: Managed) -> None:
        old = await managed.service.create(name="a", scopes=["admin"])
        managed.time.pass_(10 * 86_400)
        new = await managed.service.rotate(old.key.id)
        assert new.record.expires_at == START + timedelta(days=100)
        assert new.replaced is not None
        assert new.replaced.expires_at == START + timedelta(days=11)

    async def test_twice_is_refused_and_names_the_successor(self, managed: Managed) -> None:
        old = await managed.service.create(name="a", scopes=["infer"])
        new = await managed.service.rotate(old.key.id)
        with pytest.raises(ConflictError, match=new.key.id):
            await managed.service.rotate(old.key.id)
        await managed.service.rotate(new.key.id)

    @pytest.mark.parametrize("overlap_s", [-1, math.nan, math.inf, module.MAX_OVERLAP_S + 1])
    async def test_with_an_overlap_out_of_range_is_refused(self, managed: Managed, overlap_s: float) -> None:
        old = await managed.service.create(name="a", scopes=["infer"])
        with pytest.raises(InvalidParameterError, match="overlap"):
            await managed.service.rotate(old.key.id, overlap_s=overlap_s)

    def test_limits_are_those_of_the_contract(self) -> None:
        assert module.ADMIN_LIFETIME_S == names.KEY_ADMIN_EXPIRES_IN_S
        assert module.MAX_LIFETIME_S == names.KEY_MAX_EXPIRES_IN_S
        assert module.MAX_OVERLAP_S == names.KEY_MAX_OVERLAP_S
        assert module.DEFAULT_OVERLAP_S == names.KEY_DEFAULT_OVERLAP_S


def _record(key: ApiKey) -> KeyRecord:
    return KeyRecord(
        id=key.id,
        name="n",
        environment="live",
        scopes=frozenset({"infer"}),
        models=("*",),
        digest=b"d" * 32,
        pepper_version=1,
        created_at=START,
    )


def _cursor_of(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


async def _until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until a condition holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)
