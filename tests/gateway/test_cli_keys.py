"""``inferway keys``, as an operator types it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from inferway_contract import models as contract
from inferway_contract.names import KEY_PATTERN
from inferway_gateway.__main__ import main
from inferway_gateway.core.errors import UnauthenticatedError
from inferway_gateway.core.keys import ApiKey, Principal
from inferway_gateway.store.database import open_keys


class Shell:
    """Runs the command in this process and keeps what it wrote."""

    def __init__(self, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state = state
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        try:
            status = main(["keys", *arguments, "--state-dir", str(self.state)])
        except SystemExit as end:  # argparse's way to refuse arguments
            status = end.code if isinstance(end.code, int) else 1
        self.out, self.err = self._capsys.readouterr()
        return status

    def create(self, *arguments: str) -> str:
        assert self("create", "--name", "a", *arguments) == 0, self.err
        return self.out.strip()

    def authenticate(self, key: str) -> Principal:
        async def work() -> Principal:
            async with open_keys(database_url=f"sqlite:///{self.state}/inferway.db", state_dir=self.state) as keys:
                return await keys.authenticator.authenticate(key)

        return asyncio.run(work())


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    for name in [name for name in os.environ if name.startswith("INFERWAY_")]:
        monkeypatch.delenv(name)
    return Shell(tmp_path / "state", capsys)


def id_of(key: str) -> str:
    match = KEY_PATTERN.fullmatch(key)
    assert match is not None, key
    return match[2]


class TestCreate:
    def test_prints_the_key_alone_on_stdout_and_words_on_stderr(self, keys: Shell) -> None:
        assert keys("create", "--name", "web shop", "--scopes", "infer", "read", "--models", "iris*", "b") == 0
        assert keys.out.count("\n") == 1
        key = keys.out.strip()
        assert keys.authenticate(key) == Principal(id_of(key), "web shop", frozenset({"infer", "read"}), ("iris*", "b"))
        for word in (id_of(key), "web shop", "infer, read", "iris*, b", "no end", "shown this once"):
            assert word in keys.err
        assert key[-49:] not in keys.err

    def test_takes_commas_as_well_as_spaces(self, keys: Shell) -> None:
        principal = keys.authenticate(
            keys.create("--scopes", "infer,read", "--scopes", "deploy", "--models", "a,b", "c")
        )
        assert principal.scopes == {"infer", "read", "deploy"}
        assert principal.models == ("a", "b", "c")

    def test_prints_a_record_as_the_routes_do_with_json(self, keys: Shell) -> None:
        made = contract.KeyCreated.model_validate_json(keys.create("--scopes", "infer", "--json", "--quiet"))
        assert keys.authenticate(made.key).key_id == made.id
        assert keys.err == ""

    @pytest.mark.parametrize(
        ("arguments", "life"),
        [
            (["--scopes", "infer"], None),
            (["--scopes", "admin"], timedelta(days=90)),
            (["--scopes", "admin", "--expires-in", "never"], None),
            (["--scopes", "infer", "--expires-in", "never"], None),
            (["--scopes", "infer", "--expires-in", "45s"], timedelta(seconds=45)),
            (["--scopes", "infer", "--expires-in", "30m"], timedelta(minutes=30)),
            (["--scopes", "infer", "--expires-in", "12h"], timedelta(hours=12)),
            (["--scopes", "infer", "--expires-in", "7d"], timedelta(days=7)),
        ],
    )
    def test_gives_the_life_that_was_asked_for(self, keys: Shell, arguments: list[str], life: timedelta | None) -> None:
        made = contract.KeyCreated.model_validate_json(keys.create(*arguments, "--json"))
        assert made.expires_at == (None if life is None else made.created_at + life)

    @pytest.mark.parametrize(
        ("arguments", "word"),
        [
            (["create", "--scopes", "infer"], "--name"),
            (["create", "--name", "a"], "--scopes"),
            (["create", "--name", "a", "--scopes", "infre"], "'infer', 'read', 'deploy' or 'admin'"),
            (["create", "--name", "a", "--scopes", ","], "scopes"),
            (["create", "--name", "", "--scopes", "infer"], "name"),
            (["create", "--name", "a\x1b[2J", "--scopes", "infer"], "name"),
            (["create", "--name", "a\udcff", "--scopes", "infer"], "name"),
            (["create", "--name", "a", "--scopes", "infer", "--models", "a/b"], "models"),
            (["create", "--name", "a", "--scopes", "infer", "--expires-in", "3 weeks"], "such as 45s, 30m, 12h or 7d"),
            (["create", "--name", "a", "--scopes", "infer", "--expires-in", "0s"], "expires_in_s"),
            (["create", "--name", "a", "--scopes", "infer", "--expires-in", "9999d"], "expires_in_s"),
            (["create", "--name", "a", "--scopes", "infer", "--environment", "prod"], "environment"),
            (["rotate", "000000000000", "--overlap", "31d"], "overlap"),
            (["destroy"], "destroy"),
        ],
    )
    def test_wrong_arguments_are_named_and_make_nothing(self, keys: Shell, arguments: list[str], word: str) -> None:
        assert keys(*arguments) == 2
        assert word in keys.err
        assert "Traceback" not in keys.err
        assert keys.out == ""
        assert keys("list", "--json") == 0
        assert json.loads(keys.out) == []


class TestList:
    def test_shows_every_key_and_its_state(self, keys: Shell) -> None:
        live, revoked, old = (keys.create("--scopes", "infer") for _ in range(3))
        keys("revoke", id_of(revoked))
        keys("rotate", id_of(old), "--overlap", "1d")
        new = keys.out.strip()
        assert keys("list") == 0
        heading, *rows = keys.out.splitlines()
        assert heading.split()[:3] == ["ID", "NAME", "SCOPES"]
        states = {row.split()[0]: row.split()[4] for row in rows}
        expected = {live: "active", revoked: "revoked", old: "replaced", new: "active"}
        assert states == {id_of(key): state for key, state in expected.items()}
        assert not any(key[-49:] in keys.out for key in expected)

    def test_shows_more_than_a_page(self, keys: Shell) -> None:
        async def make() -> None:
            async with open_keys(database_url=f"sqlite:///{keys.state}/inferway.db", state_dir=keys.state) as opened:
                for i in range(201):
                    await opened.service.create(name=str(i), scopes=["infer"])

        asyncio.run(make())
        assert keys("list", "--json") == 0
        records = [contract.KeyRecord.model_validate(record) for record in json.loads(keys.out)]
        assert {record.name for record in records} == {str(i) for i in range(201)}

    def test_says_how_to_make_the_first_key(self, keys: Shell) -> None:
        assert keys("list") == 0
        assert keys.out == ""
        assert "inferway keys create" in keys.err


class TestRevoke:
    @pytest.mark.parametrize("whole", [False, True])
    def test_ends_a_key_by_its_id_or_by_the_leaked_key_itself(self, keys: Shell, whole: bool) -> None:
        key = keys.create("--scopes", "infer")
        assert keys("revoke", key if whole else id_of(key)) == 0
        assert "is revoked" in keys.err
        assert keys.out == ""
        with pytest.raises(UnauthenticatedError):
            keys.authenticate(key)
        assert keys("revoke", id_of(key), "--json") == 0
        assert contract.KeyRecord.model_validate_json(keys.out).revoked_at is not None

    @pytest.mark.parametrize(
        "key_id",
        ["000000000000", "nonsense", ApiKey.generate("live").reveal()],
        ids=["unknown", "nonsense", "a key that was never made"],
    )
    @pytest.mark.parametrize("action", ["revoke", "rotate"])
    def test_an_unknown_id_fails_in_words_without_the_text(self, keys: Shell, action: str, key_id: str) -> None:
        assert keys(action, key_id) == 1
        assert "expected the id of an API key" in keys.err
        assert key_id not in keys.err


class TestRotate:
    def test_prints_the_successor_and_lets_both_work(self, keys: Shell) -> None:
        old = keys.create("--scopes", "infer", "--models", "m*")
        assert keys("rotate", id_of(old), "--overlap", "30m") == 0
        new = keys.out.strip()
        assert keys.authenticate(new).models == ("m*",)
        assert keys.authenticate(old).rotated_at is not None
        assert id_of(old) in keys.err
        assert keys("rotate", id_of(old)) == 1
        assert id_of(new) in keys.err

    def test_with_json_prints_both_records(self, keys: Shell) -> None:
        old = keys.create("--scopes", "infer")
        assert keys("rotate", id_of(old), "--overlap", "0s", "--json", "--quiet") == 0
        made = contract.KeyRotated.model_validate_json(keys.out)
        assert made.replaced.id == id_of(old)
        assert made.replaced.expires_at == made.created_at
        assert keys.err == ""
        with pytest.raises(UnauthenticatedError):
            keys.authenticate(old)


class TestState:
    @pytest.mark.parametrize(
        ("name", "value", "word"),
        [
            ("INFERWAY_KEY_PEPPER", "hunter2", "key_pepper"),
            ("INFERWAY_DATABASE_URL", "mysql://me:hunter2@localhost/db", "database URL"),
            ("INFERWAY_PORT", "hunter2", "port"),
        ],
    )
    def test_settings_that_cannot_be_used_are_named_without_their_value(
        self, keys: Shell, monkeypatch: pytest.MonkeyPatch, name: str, value: str, word: str
    ) -> None:
        monkeypatch.setenv(name, value)
        assert keys("list") in (1, 2)
        assert word in keys.err
        assert "hunter2" not in keys.err

    def test_a_database_that_does_not_answer_is_said_with_its_own_words(
        self, keys: Shell, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        assert keys("list", "--database-url", "postgresql://me:hunter2@127.0.0.1:1/db") == 1
        assert "cannot use the key database" in keys.err
        assert "refused" in keys.err
        assert "hunter2" not in keys.err + caplog.text

    def test_a_pepper_in_the_environment_takes_the_place_of_the_file(
        self, keys: Shell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INFERWAY_KEY_PEPPER", "ab" * 32)
        keys.create("--scopes", "infer")
        assert not (keys.state / "pepper").exists()
        monkeypatch.setenv("INFERWAY_KEY_PEPPER", "cd" * 32)
        assert keys("list") == 1
        assert "not the one that the stored keys were made with" in keys.err

    def test_needs_nothing_but_the_command(self, keys: Shell, tmp_path: Path) -> None:
        """In a process of its own, with the state directory from the environment and warnings as errors."""
        environment: dict[str, Any] = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "xdg")}
        command = [sys.executable, "-W", "error", "-m", "inferway_gateway", "keys"]
        made = subprocess.run(
            [*command, "create", "--name", "me", "--scopes", "admin", "--quiet"],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert made.stderr == ""
        listed = subprocess.run(
            [*command, "list", "--json"], env=environment, capture_output=True, text=True, check=True
        )
        (record,) = json.loads(listed.stdout)
        assert record["id"] == id_of(made.stdout.strip())
        assert datetime.fromisoformat(record["created_at"]).tzinfo is not None
        assert sorted(file.name for file in (tmp_path / "xdg" / "inferway").iterdir()) == ["inferway.db", "pepper"]
