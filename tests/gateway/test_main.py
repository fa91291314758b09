"""``inferway serve``: what it says to an operator before it serves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import models
from inferway_gateway.__main__ import main
from live import run_gateway


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["serve", *arguments]) == 2
    return capsys.readouterr().err


def test_a_value_that_cannot_be_is_told_under_the_name_it_was_given_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--port: " in refused(capsys, str(tmp_path), "--port", "70000")
    monkeypatch.setenv("INFERWAY_BODY_LIMIT_BYTES", "-1")
    assert "INFERWAY_BODY_LIMIT_BYTES: " in refused(capsys, str(tmp_path))


@pytest.mark.parametrize("name", ["DRAIN_DELAY_S", "RUN_TIMEOUT_S", "KEY_CACHE_TTL_S", "HEADER_TIMEOUT_S"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_no_time_is_endless(
    name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"INFERWAY_{name}", value)
    assert f"INFERWAY_{name}: Input should be" in refused(capsys, str(tmp_path))


def test_a_state_directory_that_a_url_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = refused(capsys, str(tmp_path), "--state-dir", str(tmp_path / "what?"))
    assert words == "inferway: --state-dir: expected a directory without '?' in its path\n"


def test_a_missing_directory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected" in refused(capsys, str(tmp_path / "none"))


@pytest.mark.parametrize("command", ["serve", "keys"])
def test_a_database_that_cannot_be_used_is_told_in_its_own_words(tmp_path: Path, command: str) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "inferway.db").write_bytes(b"this is no database, whatever its name may be")
    (state / "inferway.db").chmod(0o600)
    arguments = ["serve", str(tmp_path), "--port", "0"] if command == "serve" else ["keys", "list"]
    done = subprocess.run(
        [sys.executable, "-m", "inferway_gateway", *arguments, "--state-dir", str(state)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.endswith("cannot use the key database: DatabaseError: file is not a database")
    if command == "keys":
        assert done.stderr.count("not a database") == 1


def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "pydantic_settings.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from inferway_gateway.__main__ import main; main([])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_json_log_is_json_from_its_first_line_to_its_last(tmp_path: Path) -> None:
    models.write_repository(tmp_path / "models", {"a": models.add_one()})
    with run_gateway(tmp_path / "models", tmp_path / "state", "--log-format", "json", "--log-level", "warning") as live:
        pass
    assert [json.loads(line)["message"] for line in live.log] == [f"Inferway listens on {live.url}"]
