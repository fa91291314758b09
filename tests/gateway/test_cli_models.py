"""``inferway deploy`` and ``inferway models``: what they ask a gateway, what they say, how they end."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import models
from inferway_gateway import cli_models
from inferway_gateway.__main__ import main
from lifecycle import FakeLifecycle, alias_record, event_record, problem, version_record
from scripted import Answer, ScriptedServer, as_json

OPERATORS = ("sqlalchemy", "pydantic_settings", "starlette", "uvicorn", "onnxruntime", "alembic", "orjson", "uvloop")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    made = ScriptedServer()
    monkeypatch.setenv("INFERWAY_BASE_URL", made.url)
    monkeypatch.setenv("INFERWAY_API_KEY", "key-1234567890")
    yield made
    made.stop()


@pytest.fixture
def gateway(server: ScriptedServer) -> FakeLifecycle:
    return FakeLifecycle(server)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "net.onnx"
    path.write_bytes(models.add_one())
    return str(path)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(arguments)
        except SystemExit as error:
            status = int(str(error.code))
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def model_record(name: str = "churn") -> dict[str, Any]:
    footprint = {"resident_bytes": 2**20, "peak_bytes": 3 * 2**20}
    return {
        "name": name,
        "source": "catalog",
        "versions": [
            version_record(name, 4, state="FAILED", reason="no room"),
            version_record(name, 3, pinned=True, labels={"team": "growth"}, footprint=footprint),
        ],
        "aliases": [
            alias_record(
                name, "stable", {"3": 95.0, "4": 5.0}, fallback=[2],
                previous={"weights": {"3": 100.0}, "sticky": "none", "shadow": None, "fallback": [], "guard": None},
                traffic={
                    "3": {
                        "requests": 10, "errors": 1, "fallbacks": 0, "p95_ms": 2.0, "compared": 0, "differed": 0,
                        "failed": 0, "dropped": 0, "largest_difference": 0.0,
                    }
                },
            )
        ],
    }  # fmt: skip


# --- deploying ---------------------------------------------------------------------------------------------------


def test_a_model_is_deployed_and_the_way_there_is_quiet_without_a_terminal(
    said: Any, gateway: FakeLifecycle, model: str
) -> None:
    assert said("deploy", model, "--name", "churn") == (
        0, "churn version 1 is ready, and churn@stable points at it.\n", "",
    )  # fmt: skip
    assert gateway.server.seen[0].headers["authorization"] == "Bearer key-1234567890"


def test_options_become_what_the_gateway_is_asked(
    said: Any, gateway: FakeLifecycle, model: str, tmp_path: Path
) -> None:
    (tmp_path / "options.toml").write_text("run_timeout_s = 2.0\n[batching]\nenabled = false\n")
    (tmp_path / "scores.json").write_text('{"auc": 0.9}')
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [0.0] * 16}
    (tmp_path / "golden.json").write_text(json.dumps({"examples": [{"inputs": [tensor], "outputs": [tensor]}]}))
    status, out, _ = said(
        "deploy", model, "--name", "churn", "--version", "7", "--no-alias", "--label", "team=growth",
        "--label", "a=b=c", "--config", str(tmp_path / "options.toml"), "--golden", str(tmp_path / "golden.json"),
        "--isolation", "inprocess", "--pinned", "--metadata", str(tmp_path / "scores.json"), "--instances", "2",
    )  # fmt: skip
    assert (status, out) == (0, "churn version 7 is ready.\n")
    [body] = gateway.created
    assert [file["path"] for file in body.pop("files")] == ["golden.json", "model.onnx"]
    assert body == {
        "alias": None, "labels": {"team": "growth", "a": "b=c"}, "metadata": {"auc": 0.9}, "version": 7, "pinned": True,
        "config": {"run_timeout_s": 2.0, "batching": {"enabled": False}, "instances": 2}, "isolation": "inprocess",
    }  # fmt: skip


def test_a_configuration_may_be_json(said: Any, gateway: FakeLifecycle, model: str, tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text('{"run_timeout_s": 2.0}')
    assert said("deploy", model, "--name", "churn", "--config", str(tmp_path / "options.json"))[0] == 0
    assert gateway.created[0]["config"] == {"run_timeout_s": 2.0}


@pytest.mark.parametrize("text", ["not toml", "x ="])
def test_a_configuration_that_cannot_be_read_is_named(
    said: Any, gateway: FakeLifecycle, model: str, tmp_path: Path, text: str
) -> None:
    (tmp_path / "options.toml").write_text(text)
    status, _, err = said("deploy", model, "--name", "churn", "--config", str(tmp_path / "options.toml"))
    assert status == 2
    assert "options.toml cannot be read" in err
    (tmp_path / "list.json").write_text("[]")
    assert said("deploy", model, "--name", "churn", "--config", str(tmp_path / "list.json"))[0] == 2
    assert said("deploy", model, "--name", "churn", "--config", str(tmp_path / "none"))[0] == 2
    assert gateway.server.seen == []


def test_with_json_a_program_reads_the_deployment(said: Any, gateway: FakeLifecycle, model: str) -> None:
    status, out, err = said("deploy", model, "--name", "churn", "--json")
    assert (status, err) == (0, "")
    assert (json.loads(out)["id"], json.loads(out)["state"]) == ("d1", "succeeded")


def test_without_waiting_it_says_how_to_watch(said: Any, gateway: FakeLifecycle, model: str) -> None:
    status, out, _ = said("deploy", model, "--name", "churn", "--no-wait")
    assert (status, out) == (0, "Deployment d1 of churn version 1 is under way: inferway models watch d1\n")
    assert said("models", "watch", "d1") == (0, "churn version 1 is ready, and churn@stable points at it.\n", "")


def test_a_version_that_was_there_is_said_to_be(said: Any, gateway: FakeLifecycle, model: str) -> None:
    gateway.looks = [{"state": "succeeded", "step": "ready", "reused": True}]
    assert "It has this content since an earlier deployment." in said("deploy", model, "--name", "churn")[1]


def test_a_failure_is_told_with_step_and_reason(said: Any, gateway: FakeLifecycle, model: str) -> None:
    failure = {"code": "model_rejected", "message": "opset 99 is not known, 24 is the highest"}
    gateway.looks = [{"state": "failed", "failed_step": "admitted", "error": failure}]
    assert said("deploy", model, "--name", "churn") == (
        1,
        "",
        "inferway: deployment d1 of churn failed at the step 'admitted': opset 99 is not known, 24 is the highest "
        "(model_rejected)\n",
    )
    status, out, _ = said("models", "deployments", "churn")
    assert status in (0, 1)
    assert "Traceback" not in out


def test_a_wait_that_takes_too_long_says_how_to_go_on(said: Any, gateway: FakeLifecycle, model: str) -> None:
    gateway.looks = []
    assert said("deploy", model, "--name", "churn", "--no-wait")[0] == 0
    status, _, err = said("models", "watch", "d1", "--timeout", "0.5")
    assert status == 1
    assert "the time is over; deployment d1 goes on: 'inferway models watch d1' waits for it" in err


def test_a_deployment_is_cancelled(said: Any, gateway: FakeLifecycle, model: str) -> None:
    said("deploy", model, "--name", "churn", "--no-wait")
    assert said("models", "cancel", "d1")[0] == 0
    status, _, err = said("models", "watch", "d1")
    assert (status, err) == (1, "inferway: deployment d1 of churn was cancelled\n")


@pytest.mark.parametrize("during", ["uploading", "waiting"])
def test_ctrl_c_says_what_stays(gateway: FakeLifecycle, model: str, during: str) -> None:
    server = gateway.server
    answer = server.otherwise

    def otherwise(seen: Any) -> Answer:
        stuck = seen.method == "PUT" if during == "uploading" else "wait=" in seen.path
        return Answer(hang=True) if stuck else answer(seen)

    server.otherwise = otherwise
    process = subprocess.Popen(
        [sys.executable, "-m", "inferway_gateway", "deploy", model, "--name", "churn"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.hanging.wait(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    if during == "uploading":
        assert err == (
            "inferway: interrupted; what was sent is kept for a day, and the same command goes on from there\n"
        )
    else:
        assert err == (
            "inferway: interrupted; deployment d1 goes on: 'inferway models watch d1' waits for it, "
            "'inferway models cancel d1' ends it\n"
        )


# --- looking -----------------------------------------------------------------------------------------------------


def test_models_are_listed(said: Any, server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_json({"models": [model_record()]})
    assert said("models", "list") == (
        0,
        "NAME   FROM     VERSIONS           ALIASES\n"
        "churn  catalog  4 FAILED, 3 READY  stable -> version 3 with 95 %, version 4 with 5 %\n",
        "",
    )
    assert json.loads(said("models", "list", "--json")[1])[0]["name"] == "churn"
    server.otherwise = lambda _: as_json({"models": []})
    assert said("models", "list") == (0, "", "There is no model yet: inferway deploy FILE --name NAME\n")


def test_a_model_is_shown_with_its_versions_and_aliases(said: Any, server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_json(model_record())
    status, out, _ = said("models", "show", "churn")
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "churn, from the catalog"
    assert lines[1].split() == ["VERSION", "STATE", "KIND", "RUNS", "IN", "MEMORY", "SINCE", "BY", "LABELS", "WHY"]
    assert lines[2].startswith("3        READY pinned  onnx  worker   3 MiB")
    assert lines[3].endswith("no room")
    assert "3: 10 requests, 1 errors" in lines[6]
    assert json.loads(said("models", "show", "churn", "--json")[1])["source"] == "catalog"
    assert "growth" in said("models", "versions", "churn")[1]
    assert [version["version"] for version in json.loads(said("models", "versions", "churn", "--json")[1])] == [3, 4]


def test_aliases_are_listed(said: Any, server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_json({"aliases": model_record()["aliases"]})
    assert "version 3 with 95 %, version 4 with 5 %" in said("models", "alias", "list", "churn")[1]
    assert json.loads(said("models", "alias", "list", "churn", "--json")[1])[0]["alias"] == "stable"


POINTED: dict[str, Any] = {"weights": {"4": 5.0, "3": 95.0}, "sticky": "key", "shadow": {"version": 5, "share": 0.1},
           "fallback": [2, 1], "guard": {"window_s": 60.0}}  # fmt: skip
PLAIN: dict[str, Any] = {"weights": {"1": 100.0}, "sticky": "none", "shadow": None, "fallback": [], "guard": None}


def test_the_history_says_who_did_what_when(said: Any, server: ScriptedServer) -> None:
    events = [
        event_record(2, kind="rolled_back", detail={"spec": PLAIN, "previous": POINTED}),
        event_record(1, version=3, alias=None, kind="deployment_succeeded"),
    ]
    server.otherwise = lambda _: as_json({"events": events, "has_more": True})
    status, out, _ = said("models", "history", "churn", "--limit", "2")
    assert status == 0
    assert (
        out.splitlines()[1] == "2026-11-23 12:00:00Z  rolled_back           churn@stable     key  -> version 1 (100 %)"
    )
    assert "churn version 3" in out.splitlines()[2]
    assert server.seen[0].path == "/api/v1/models/churn/events?limit=2"
    whole = json.loads(said("models", "history", "--limit", "1", "--json")[1])
    assert [event["detail"] for event in whole] == [{"spec": PLAIN, "previous": POINTED}]


@pytest.mark.parametrize(
    ("detail", "words"),
    [
        ({"spec": PLAIN, "previous": None}, "-> version 1 (100 %)"),
        ({"spec": POINTED},
         "-> version 3 (95 %), version 4 (5 %); sticky by key; shadow version 5; fallback 2, 1; guarded"),
        ({"deployment": "a423bc99", "reused": True, "digest": "ab"}, "deployment a423… reused"),
        ({"deployment": "a423bc99", "reused": False, "digest": "ab"}, "deployment a423…"),
        ({"deployment": "a423bc99", "step": "loaded", "code": "model_load_failed", "message": "no such operator"},
         "deployment a423…, at loaded: no such operator"),
        ({"deployment": "a423bc99", "step": None, "code": "x", "message": "it was cancelled"},
         "deployment a423…, it was cancelled"),
        ({"deployment": "a423bc99", "step": "loaded", "message": None}, "deployment a423…, at loaded"),
        ({"spec": PLAIN, "version": 3, "reason": "errors", "text": "version 3 failed 5 of 9 requests"},
         "version 3 failed 5 of 9 requests"),
        ({"changed": ["labels", "pinned"]}, "changed labels, pinned"),
        ({"digest": "0123456789abcdef"}, "content 01234567…"),
        ({"reason": "signal 9"}, "signal 9"),
        ({"spec": {"weights": None}, "later": {"a": 1}, "count": 3, "flag": True}, "count 3"),
    ],
)  # fmt: skip
def test_what_happened_is_told_in_a_few_words(
    said: Any, server: ScriptedServer, detail: dict[str, Any], words: str
) -> None:
    record = event_record(1, detail=detail)
    server.otherwise = lambda _: as_json({"events": [record], "has_more": False})
    _, out, _ = said("models", "history", "churn")
    # The column is the last one.
    assert out.splitlines()[1].split(record["by"] + "  ", 1)[1] == words


def test_deployments_are_listed(said: Any, gateway: FakeLifecycle, server: ScriptedServer, model: str) -> None:
    said("deploy", model, "--name", "churn")
    record = gateway.deployments["d1"].record
    server.otherwise = lambda _: as_json({"deployments": [record]})
    status, out, _ = said("models", "deployments")
    assert status == 0
    assert out.splitlines()[1].split()[:5] == ["d1", "churn", "1", "succeeded", "ready"]
    assert json.loads(said("models", "deployments", "--json")[1])[0]["id"] == "d1"


# --- changing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (["3"], {"version": 3, "sticky": "none", "fallback": []}),
        (["3=95", "4=5"], {"weights": {"3": 95.0, "4": 5.0}, "sticky": "none", "fallback": []}),
        (
            ["3", "--sticky", "key", "--shadow", "5=0.1", "--fallback", "2", "--fallback", "1", "--guard",
             "--expected-revision", "7"],
            {"version": 3, "sticky": "key", "shadow": {"version": 5, "share": 0.1}, "fallback": [2, 1], "guard": {},
             "expected_revision": 7},
        ),
        (["3", "--shadow", "5"], {"version": 3, "sticky": "none", "shadow": {"version": 5}, "fallback": []}),
    ],
)  # fmt: skip
def test_an_alias_is_set(said: Any, server: ScriptedServer, arguments: list[str], body: dict[str, Any]) -> None:
    server.otherwise = lambda _: as_json(model_record()["aliases"][0])
    status, out, _ = said("models", "alias", "set", "churn", "stable", *arguments)
    assert (status, out) == (
        0, "churn@stable points at version 3 with 95 %, version 4 with 5 %; before it was version 3.\n",
    )  # fmt: skip
    assert server.seen[0].json == body


@pytest.mark.parametrize(
    "arguments",
    [
        ["alias", "set", "churn", "stable", "3", "4"],
        ["alias", "set", "churn", "stable", "3=95", "4"],
        ["alias", "set", "churn", "stable", "3=50", "3=50"],
        ["alias", "set", "churn", "stable", "3=95", "4=4"],
        ["alias", "set", "churn", "stable", "3=x"],
        ["alias", "set", "churn", "stable", "x"],
        ["alias", "set", "churn", "stable", "3", "--shadow", "4=2"],
        ["alias", "set", "churn"],
        ["pin", "churn", "0"],
        ["watch", "d1", "--timeout", "0"],
        ["delete", "churn"],
        ["show", "a b"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_told_before_anything_is_asked(
    said: Any, server: ScriptedServer, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status, _, err = said("models", *arguments)
    assert status == 2
    assert "inferway" in err
    assert server.seen == []


def test_an_alias_is_rolled_back_and_deleted(said: Any, server: ScriptedServer) -> None:
    server.otherwise = lambda seen: (
        Answer(204) if seen.method == "DELETE" else as_json(alias_record("churn", "canary", {"2": 100.0}))
    )
    assert said("models", "rollback", "churn", "--alias", "canary")[1] == "churn@canary points at version 2.\n"
    assert json.loads(said("models", "rollback", "churn", "--alias", "canary", "--json")[1])["alias"] == "canary"
    assert said("models", "alias", "delete", "churn", "canary") == (0, "churn@canary is gone.\n", "")
    assert [seen.path for seen in server.seen][::2] == [
        "/api/v1/models/churn/aliases/canary/rollback", "/api/v1/models/churn/aliases/canary",
    ]  # fmt: skip


def aliases_of(*records: dict[str, Any]) -> Answer:
    return as_json({"aliases": list(records)})


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        ([], {"version": 4, "sticky": "key", "fallback": [2], "expected_revision": 1}),
        (["2"], {"version": 2, "sticky": "key", "fallback": [], "expected_revision": 1}),
        (["--alias", "live"], {"version": 4, "sticky": "none", "fallback": []}),
        (["--from", "stable", "--alias", "live"], {"version": 3, "sticky": "none", "fallback": []}),
    ],
    ids=["canary", "version", "new-alias", "other-source"],
)
def test_a_version_is_promoted(said: Any, server: ScriptedServer, arguments: list[str], body: dict[str, Any]) -> None:
    """Alone, and only where nobody has moved the alias meanwhile."""
    stable = alias_record("churn", "stable", {"3": 100.0}, sticky="key", fallback=[2], guard=None)
    canary = alias_record("churn", "canary", {"4": 100.0, "3": 0.0})
    server.otherwise = lambda seen: (
        as_json(alias_record("churn", "stable", {"4": 100.0})) if seen.method == "PUT" else aliases_of(stable, canary)
    )
    assert said("models", "promote", "churn", *arguments)[:2] == (0, "churn@stable points at version 4.\n")
    assert server.seen[-1].json == body


@pytest.mark.parametrize("weights", [None, {"3": 50.0, "4": 50.0}], ids=["none", "two"])
def test_what_to_promote_has_to_be_one_version(
    said: Any, server: ScriptedServer, weights: dict[str, float] | None
) -> None:
    server.otherwise = lambda _: aliases_of(*([] if weights is None else [alias_record("churn", "canary", weights)]))
    status, out, err = said("models", "promote", "churn")
    assert (status, out) == (2, "")
    assert "inferway models promote churn VERSION" in err
    assert [seen.method for seen in server.seen] == ["GET"]


def test_a_script_waits_until_a_model_is_ready(
    said: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_models, "_LOOK_AGAIN_S", 0.01)
    loading = {**model_record(), "versions": [version_record("churn", 3, state="LOADING")]}
    answers = iter([problem(404, "model_not_found", "no such model"), as_json(loading)])
    server.otherwise = lambda _: next(answers, as_json(model_record()))
    assert said("models", "wait", "churn") == (0, "churn is ready: version 3 is READY.\n", "")
    assert len(server.seen) == 3
    assert json.loads(said("models", "wait", "churn", "--json")[1])[0]["version"] == 3


def test_a_wait_for_a_model_says_in_the_end_why_it_is_not_ready(
    said: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_models, "_LOOK_AGAIN_S", 0.01)
    server.otherwise = lambda _: as_json(model_record())
    status, _, err = said("models", "wait", "churn", "4", "--timeout", "0.05")
    assert (status, err) == (
        1, "inferway: churn version 4 was not ready within 0.05 s: version 4 is FAILED no room\n"
    )  # fmt: skip
    assert "there is no such version" in said("models", "wait", "churn", "9", "--timeout", "0.05")[2]
    server.otherwise = lambda _: problem(404, "model_not_found", "no such model")
    assert "no such model" in said("models", "wait", "churn", "--timeout", "0.05")[2]


def test_a_script_waits_until_the_gateway_is_ready(said: Any, server: ScriptedServer) -> None:
    starting = iter([as_json({"live": True, "ready": False}, status=503)])
    server.otherwise = lambda _: next(starting, as_json({"live": True, "ready": True}))
    assert said("models", "wait") == (0, "The gateway is ready.\n", "")
    assert len(server.seen) == 2
    server.otherwise = lambda _: as_json({"live": True, "ready": False}, status=503)
    status, _, err = said("models", "wait", "--timeout", "0.1")
    assert status == 1
    assert "the gateway was not ready within 0.1 s" in err


def test_a_model_that_is_not_there_is_told_where_to_look(said: Any, server: ScriptedServer) -> None:
    server.otherwise = lambda _: problem(404, "model_not_found", "no such model")
    status, _, err = said("models", "show", "chrun")
    assert status == 1
    assert err.endswith("'inferway models list' shows what there is\n")


def test_a_version_is_pinned_and_let_go(said: Any, server: ScriptedServer) -> None:
    server.otherwise = lambda seen: as_json(version_record("churn", 3, **seen.json))
    assert said("models", "pin", "churn", "3")[1] == "churn version 3 stays in memory.\n"
    assert said("models", "pin", "churn", "3", "--off")[1] == (
        "churn version 3 may leave the memory when others need room.\n"
    )
    assert json.loads(said("models", "pin", "churn", "3", "--json")[1])["pinned"] is True


class Person(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "deleted"), [("y\n", True), ("no\n", False), ("\n", False)])
def test_deleting_asks_first(
    said: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, answer: str, deleted: bool
) -> None:
    server.otherwise = lambda _: Answer(204)
    monkeypatch.setattr(sys, "stdin", Person(answer))
    status, out, err = said("models", "delete", "churn")
    assert (status, err) == (0, "Delete churn with all its versions and aliases? [y/N] ")
    assert out == ("churn is deleted.\n" if deleted else "Nothing was deleted.\n")
    assert len(server.seen) == deleted


def test_deleting_with_yes_asks_nobody(said: Any, server: ScriptedServer) -> None:
    server.otherwise = lambda _: Answer(204)
    assert said("models", "delete", "churn", "3", "--yes") == (0, "churn version 3 is deleted.\n", "")
    assert server.seen[0].path == "/api/v1/models/churn/versions/3"


# --- where the gateway is, and who asks ---------------------------------------------------------------------------


def test_options_come_before_the_environment(said: Any, server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("other-key-12345\n")
    server.otherwise = lambda _: as_json({"models": []})
    os.environ["INFERWAY_BASE_URL"] = "http://127.0.0.1:9"
    assert said("models", "list", "--url", server.url, "--api-key-file", str(tmp_path / "key"))[0] == 0
    assert server.seen[0].headers["authorization"] == "Bearer other-key-12345"
    status, _, err = said("models", "list", "--api-key-file", str(tmp_path / "none"))
    assert (status, "No such file" in err) == (2, True)


def test_a_gateway_that_is_not_there_is_told_to_a_newcomer(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    status, _, err = said("models", "list", "--url", "http://127.0.0.1:9")
    assert status == 1
    assert "could not connect to http://127.0.0.1:9" in err
    assert "is a gateway running there?" in err


def test_a_missing_key_is_told_to_a_newcomer(said: Any, server: ScriptedServer) -> None:
    server.otherwise = lambda _: problem(401, "unauthenticated", "expected an API key")
    status, _, err = said("models", "list")
    assert status == 1
    assert "inferway keys create --name me --scopes deploy read infer" in err


def test_what_the_gateway_refuses_is_told_in_its_words(said: Any, server: ScriptedServer) -> None:
    server.otherwise = lambda _: problem(409, "conflict", "alias 'stable' names version 3; point it elsewhere first")
    status, _, err = said("models", "delete", "churn", "3", "--yes")
    assert status == 1
    assert err.startswith("inferway: alias 'stable' names version 3; point it elsewhere first (409 conflict")


def test_a_reader_that_has_seen_enough_ends_it_quietly(server: ScriptedServer) -> None:
    events = [event_record(number, detail={"x": "y" * 500}) for number in range(1000, 0, -1)]
    server.otherwise = lambda _: as_json({"events": events, "has_more": False})
    command = f"{sys.executable} -m inferway_gateway models history --limit 1000 | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


BARE = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPERATORS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from inferway_gateway import cli_models
from inferway_gateway.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_clients_commands_work_without_the_gateways_extra(gateway: FakeLifecycle, model: str) -> None:
    done = bare("deploy", model, "--name", "churn")
    assert (done.returncode, done.stdout) == (0, "churn version 1 is ready, and churn@stable points at it.\n"), (
        done.stderr
    )
    assert "deploy" in bare("--help").stdout


@pytest.mark.parametrize("arguments", [["serve", "models"], ["keys", "list"], ["keys", "--help"]], ids=" ".join)
def test_an_operators_commands_say_what_is_missing(arguments: list[str]) -> None:
    done = bare(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("inferway: this needs the gateway (")
    assert "pip install 'inferway[gateway]'" in done.stderr
