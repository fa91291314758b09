"""The life of deployed versions, on a real gateway and by plain HTTP."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import models
from deploying import LIMIT_S, begin, deploy, digest_of, golden, infer, upload, watch
from live import LiveGateway, run_gateway

STEPS = ["received", "checked", "admitted", "loaded", "warmed", "compared", "ready"]


def plus(increment: float) -> bytes:
    return models.add_one(increment=increment)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway with one model in its folder, ``placed``, and room for what tests deploy."""
    root = tmp_path_factory.mktemp("lifecycle")
    repository = models.write_repository(root / "models", {"placed": plus(100)})
    with run_gateway(repository, root / "state") as running:
        yield running


def kinds(gateway: LiveGateway, model: str) -> list[str]:
    status, answer, _ = gateway.call("GET", f"/api/v1/models/{model}/events")
    assert status == 200, answer
    return [event["kind"] for event in answer["events"]]


def test_a_model_is_deployed_by_plain_http_and_answers(deployed: LiveGateway) -> None:
    status, answer = begin(deployed, "plain", {"model.onnx": plus(1)}, labels={"team": "growth"})
    assert status == 202
    assert (answer["version"], answer["state"], answer["alias"], answer["reused"]) == (1, "running", "stable", False)
    ended, seen = watch(deployed, answer)
    assert ended["state"] == "succeeded", ended
    assert seen == [step for step in STEPS if step in seen]  # two may pass between two looks
    assert seen[-1] == "ready"
    assert infer(deployed, "plain") == (200, 2.0, "1")
    assert infer(deployed, "plain@stable") == (200, 2.0, "1")
    assert infer(deployed, "plain/versions/1") == (200, 2.0, "1")
    model = deployed.call("GET", "/api/v1/models/plain")[1]
    assert (model["source"], len(model["versions"]), len(model["aliases"])) == ("catalog", 1, 1)
    version = deployed.call("GET", "/api/v1/models/plain/versions/1")[1]
    assert (version["state"], version["kind"], version["labels"]) == ("READY", "onnx", {"team": "growth"})
    assert version["files"] == [{"path": "model.onnx", "digest": digest_of(plus(1)), "size": len(plus(1))}]
    assert "plain" in deployed.call("GET", "/v2/models")[1]["models"]
    index = deployed.call("POST", "/v2/repository/index", b"")[1]
    assert {"name": "plain", "version": "1", "state": "READY", "reason": ""} in index
    assert kinds(deployed, "plain") == ["alias_set", "deployment_succeeded", "deployment_started"]


def test_the_same_content_is_the_same_version(deployed: LiveGateway) -> None:
    deploy(deployed, "same", plus(1))
    deploy(deployed, "same", plus(2))
    assert infer(deployed, "same") == (200, 3.0, "2")
    again = deploy(deployed, "same", plus(1))
    assert (again["version"], again["reused"]) == (1, True)
    assert infer(deployed, "same") == (200, 2.0, "1")
    assert len(deployed.call("GET", "/api/v1/models/same")[1]["versions"]) == 2


def broken_cases() -> Iterator[Any]:
    bad = models.corrupt()
    one = [1.0] * 16
    wrong = golden(one, [2.0] * 15 + [2.5])
    cases: dict[str, tuple[dict[str, bytes], str, str, str]] = {
        "truncated": ({"model.onnx": bad["truncated"]}, "admitted", "model_rejected", ""),
        "html": ({"model.onnx": bad["html"]}, "admitted", "model_rejected", ""),
        "operator of another domain": ({"model.onnx": bad["no_such_operator"]}, "admitted", "model_rejected", ""),
        "missing data file": ({"model.onnx": bad["missing_data"]}, "admitted", "model_rejected", "model.onnx.data"),
        "unknown operator": (
            {
                "model.onnx": models.model(
                    [models.node("Mull", ["x"], ["y"])],
                    [models.value("x", models.F32, ["n", 4])],
                    [models.value("y", models.F32, ["n", 4])],
                )
            },
            "admitted",
            "model_rejected",
            "operator ai.onnx::Mull: does not exist in this gateway's ONNX Runtime",
        ),
        "unknown opset": ({"model.onnx": future_opset()}, "admitted", "model_rejected", "opset"),
        "bad option": (
            {"model.onnx": plus(3), "inferway.toml": b"speed = 1"},
            "admitted",
            "model_rejected",
            "inferway.toml: speed is not known",
        ),
        "broken golden file": ({"model.onnx": plus(3), "golden.json": b"{"}, "admitted", "model_rejected", "no JSON"),
        "golden mismatch": (
            {"model.onnx": plus(1), "golden.json": wrong},
            "compared",
            "golden_mismatch",
            "output 'y' differs in 1 of 16 elements, at most by 0.5 at [0, 15]",
        ),
    }
    for name, case in cases.items():
        yield pytest.param(*case, id=name)


def future_opset() -> bytes:
    return models.model(
        [models.node("Identity", ["x"], ["y"])],
        [models.value("x", models.F32, ["batch", 4])],
        [models.value("y", models.F32, ["batch", 4])],
        domains={"ai.onnx.ml": 999},
    )


@pytest.mark.parametrize(("files", "step", "code", "words"), list(broken_cases()))
def test_a_failed_deployment_says_where_and_why_and_the_old_version_serves_on(
    deployed: LiveGateway, files: dict[str, bytes], step: str, code: str, words: str
) -> None:
    if deployed.call("GET", "/api/v1/models/steady")[0] == 404:
        deploy(deployed, "steady", plus(1))
    status, answer = begin(deployed, "steady", files)
    assert status == 202, answer
    ended, _ = watch(deployed, answer)
    assert (ended["state"], ended["failed_step"], ended["error"]["code"]) == ("failed", step, code), ended
    assert words in ended["error"]["message"]
    assert infer(deployed, "steady") == (200, 2.0, "1")
    assert [v["version"] for v in deployed.call("GET", "/api/v1/models/steady")[1]["versions"]] == [1]
    assert not list((deployed.state_dir / "versions" / "steady").glob(f"{ended['version']}-*"))
    assert kinds(deployed, "steady")[0] == "deployment_failed"


def test_a_first_version_that_fails_leaves_no_model(deployed: LiveGateway) -> None:
    status, answer = begin(deployed, "stillborn", {"model.onnx": b"no model"})
    assert status == 202
    assert watch(deployed, answer)[0]["state"] == "failed"
    assert deployed.call("GET", "/api/v1/models/stillborn")[0] == 404
    assert infer(deployed, "stillborn")[0] == 404
    assert "stillborn" not in deployed.call("GET", "/v2/models")[1]["models"]


def test_golden_examples_that_agree_let_a_version_in(deployed: LiveGateway) -> None:
    files = {"model.onnx": plus(1), "golden.json": golden([1.0] * 16, [2.0] * 16)}
    assert deploy(deployed, "golden", files)["step"] == "ready"


def test_a_digest_that_nobody_sent_is_told_with_its_path(deployed: LiveGateway) -> None:
    body = {"files": [{"path": "model.onnx", "digest": "0" * 64, "size": 10}]}
    status, answer, _ = deployed.call("POST", "/api/v1/models/unsent/versions", body)
    assert (status, answer["code"]) == (404, "blob_not_found")
    assert "model.onnx" in answer["detail"]
    assert "0" * 64 in answer["detail"]
    sent = upload(deployed, plus(77))
    body = {"files": [{"path": "model.onnx", "digest": sent["digest"], "size": 1}]}
    status, answer, _ = deployed.call("POST", "/api/v1/models/unsent/versions", body)
    assert status == 400, answer


def test_bytes_that_do_not_have_their_digest_are_refused(deployed: LiveGateway) -> None:
    status, answer, _ = deployed.call("PUT", f"/api/v1/blobs/{digest_of(b'one')}", b"two")
    assert (status, answer["code"]) == (400, "digest_mismatch")


@pytest.mark.parametrize(
    ("members", "status", "code", "words"),
    [
        ({"files": []}, 400, "invalid_parameter", "files"),
        ({"config": {"speed": 1}}, 400, "invalid_parameter", "'config': speed is not known"),
        ({"isolation": "inprocess"}, 403, "permission_denied", "allow_inprocess"),
        ({"isolation": "none"}, 400, "invalid_parameter", "isolation"),
        ({"alias": "Stable"}, 400, "invalid_parameter", "'alias': expected an alias such as 'stable'"),
        ({"labels": {"a b": "c"}}, 400, "invalid_parameter", "expected a label's name, 1 to 63 letters, digits"),
        ({"lables": {}}, 400, "invalid_parameter", "'lables' is not known, expected one of files, version, config"),
        ({"version": 0}, 400, "invalid_parameter", "version"),
        ({"config": {"batching": {"max_batch_size": 8}}}, 400, "invalid_parameter", "did you mean max_batch_size?"),
    ],
    ids=["no files", "option", "inprocess", "isolation", "alias", "label", "unknown member", "version", "batch size"],
)
def test_a_request_that_cannot_be_is_refused_at_once(
    deployed: LiveGateway, members: dict[str, Any], status: int, code: str, words: str
) -> None:
    sent = upload(deployed, plus(1))
    body = {"files": [{"path": "model.onnx", **sent}], **members}
    got, answer, _ = deployed.call("POST", "/api/v1/models/refused/versions", body)
    assert (got, answer["code"]) == (status, code), answer
    assert words in answer["detail"]
    assert deployed.call("GET", "/api/v1/deployments?model=refused")[1] == {"deployments": []}


@pytest.mark.parametrize(
    "path",
    ["../model.onnx", "/etc/passwd", "a\\b", "", "a//b", ".hidden", "gewichte/ü.bin", "a/../b"],
    ids=["out", "absolute", "backslash", "empty", "empty part", "hidden", "not ASCII", "inner"],
)
def test_a_path_that_cannot_be_a_files_is_shown_with_its_place_and_what_may_be(
    deployed: LiveGateway, path: str
) -> None:
    sent = upload(deployed, plus(1))
    body = {"files": [{"path": "model.onnx", **sent}, {"path": path, **sent}]}
    status, answer, _ = deployed.call("POST", "/api/v1/models/paths/versions", body)
    assert (status, answer["code"]) == (400, "invalid_parameter")
    assert "'files.1.path': expected a relative path such as 'model.onnx' or 'weights/a.bin'" in answer["detail"]
    assert f"got {path!a}" in answer["detail"]
    assert "[A-Za-z" not in answer["detail"]


@pytest.mark.parametrize("name", ["-x", "a b", "x" * 129, "ü"])
def test_a_name_outside_the_pattern_is_refused(deployed: LiveGateway, name: str) -> None:
    body = {"files": [{"path": "model.onnx", **upload(deployed, plus(1))}]}
    status, answer, _ = deployed.call("POST", f"/api/v1/models/{quote(name)}/versions", body)
    assert (status, answer["code"]) == (400, "invalid_parameter"), answer
    assert "expected a model name" in answer["detail"]
    assert "1 to 128" in answer["detail"]


def test_a_name_that_the_folder_has_is_the_operators(deployed: LiveGateway) -> None:
    status, answer = begin(deployed, "placed", {"model.onnx": plus(1)})
    assert (status, answer["code"]) == (409, "conflict")
    assert infer(deployed, "placed") == (200, 101.0, "1")
    model = deployed.call("GET", "/api/v1/models/placed")[1]
    assert (model["source"], [v["version"] for v in model["versions"]]) == ("repository", [1])
    for method, path in (("DELETE", ""), ("DELETE", "/versions/1"), ("PATCH", "/versions/1")):
        assert deployed.call(method, f"/api/v1/models/placed{path}", {})[0] == 409


def test_a_number_belongs_to_one_content(deployed: LiveGateway) -> None:
    assert deploy(deployed, "numbered", plus(1), version=7)["version"] == 7
    status, answer = begin(deployed, "numbered", {"model.onnx": plus(2)}, version=7)
    assert (status, answer["code"]) == (409, "conflict")
    assert deploy(deployed, "numbered", plus(2))["version"] == 8


def test_two_deployments_of_one_name_at_once_both_end_well(deployed: LiveGateway) -> None:
    bodies = {i: {"files": [{"path": "model.onnx", **upload(deployed, plus(i))}]} for i in (1, 2, 3)}
    path = "/api/v1/models/twice/versions"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        begun = list(pool.map(lambda i: deployed.call("POST", path, bodies[i]), (1, 2, 1, 3)))
    assert [status for status, _, _ in begun] == [202] * 4, begun
    ended = [watch(deployed, answer)[0] for _, answer, _ in begun]
    assert [one["state"] for one in ended] == ["succeeded"] * 4, ended
    assert ended[0]["version"] == ended[2]["version"]
    assert len({one["version"] for one in ended}) == 3
    last = deployed.call("GET", "/api/v1/deployments?model=twice&limit=1")[1]["deployments"][0]
    assert infer(deployed, "twice")[2] == str(last["version"])


def test_a_version_without_an_alias_is_reached_by_its_number_alone(deployed: LiveGateway) -> None:
    deploy(deployed, "quiet", plus(1))
    deploy(deployed, "quiet", plus(2), alias=None)
    assert infer(deployed, "quiet") == (200, 2.0, "1")
    assert infer(deployed, "quiet/versions/2") == (200, 3.0, "2")
    deploy(deployed, "quiet", plus(3), alias="canary")
    assert infer(deployed, "quiet@canary") == (200, 4.0, "3")


def test_what_an_alias_names_cannot_be_deleted_and_the_rest_can(deployed: LiveGateway) -> None:
    deploy(deployed, "kept", plus(1))
    deploy(deployed, "kept", plus(2))
    status, answer, _ = deployed.call("DELETE", "/api/v1/models/kept/versions/2")
    assert (status, answer["code"]) == (409, "conflict")
    assert "stable" in answer["detail"]
    assert deployed.call("DELETE", "/api/v1/models/kept/versions/1")[0] == 204
    assert infer(deployed, "kept/versions/1")[0] == 404
    assert infer(deployed, "kept") == (200, 3.0, "2")
    assert deployed.call("DELETE", "/api/v1/models/kept/versions/1")[0] == 404
    assert deployed.call("DELETE", "/api/v1/models/kept")[0] == 204
    assert infer(deployed, "kept")[0] == 404
    assert "kept" not in deployed.call("GET", "/v2/models")[1]["models"]
    assert not list((deployed.state_dir / "versions").glob("kept/*"))
    assert kinds(deployed, "kept")[:2].count("version_deleted") >= 1


def test_what_is_beside_the_content_can_be_changed(deployed: LiveGateway) -> None:
    deploy(deployed, "labelled", plus(1))
    path = "/api/v1/models/labelled/versions/1"
    status, answer, _ = deployed.call("PATCH", path, {"labels": {"a": "b"}, "pinned": True})
    assert (status, answer["labels"], answer["pinned"]) == (200, {"a": "b"}, True)
    assert deployed.call("GET", path)[1]["metadata"] == {}
    assert deployed.call("PATCH", path, {"digest": "0"})[0] == 400
    assert deployed.call("PATCH", "/api/v1/models/labelled/versions/9", {})[0] == 404
    assert kinds(deployed, "labelled")[0] == "version_changed"


def test_the_configuration_of_the_request_goes_over_that_of_the_files(deployed: LiveGateway) -> None:
    files = {"model.onnx": plus(1), "inferway.toml": b"max_batch_size = 4\n[batching]\nmax_queue_rows = 7\n"}
    deploy(deployed, "configured", files, config={"max_batch_size": 2})
    shown = deployed.call("GET", "/v2/models/configured/config")[1]
    assert shown["max_batch_size"] == 2


def test_a_key_deploys_and_sees_within_its_patterns_only(deployed: LiveGateway) -> None:
    key = deployed.make_key("deploy", "read", models=["mine-*"])
    status, answer = begin(deployed, "mine-a", {"model.onnx": plus(5)}, key=key)
    assert status == 202
    assert watch(deployed, answer, key=key)[0]["state"] == "succeeded"
    deploy(deployed, "other", plus(6))
    foreign = deployed.call("GET", "/api/v1/deployments?model=other")[1]["deployments"][0]["id"]
    for path in ("/api/v1/models/other", "/api/v1/models/other/versions/1", "/api/v1/models/other/events"):
        hidden = deployed.call("GET", path, key=key)
        unknown = deployed.call("GET", path.replace("other", "nobody"), key=key)
        assert (hidden[0], hidden[1]["code"]) == (unknown[0], unknown[1]["code"]) == (404, "model_not_found")
        assert hidden[1]["detail"].replace("other", "nobody") == unknown[1]["detail"]
    hidden = deployed.call("GET", f"/api/v1/deployments/{foreign}", key=key)
    unknown = deployed.call("GET", "/api/v1/deployments/nothing", key=key)
    assert (hidden[0], hidden[1]["detail"]) == (unknown[0], unknown[1]["detail"])
    assert hidden[0] == 404
    assert deployed.call("POST", f"/api/v1/deployments/{foreign}/cancel", key=key)[0] == 404
    assert {m["name"] for m in deployed.call("GET", "/api/v1/models", key=key)[1]["models"]} == {"mine-a"}
    seen = deployed.call("GET", "/api/v1/deployments", key=key)[1]["deployments"]
    assert {d["model"] for d in seen} == {"mine-a"}
    events = deployed.call("GET", "/api/v1/events", key=key)[1]["events"]
    assert {e["model"] for e in events} == {"mine-a"}
    assert {e["by"] for e in events} == {key.split("_")[2]}
    # It knows the digest of another's content, and has not shown that it has it.
    body = {"files": [{"path": "model.onnx", "digest": digest_of(plus(6)), "size": len(plus(6))}]}
    status, answer, _ = deployed.call("POST", "/api/v1/models/mine-b/versions", body, key=key)
    assert (status, answer["code"]) == (404, "blob_not_found")


def test_lists_are_read_in_parts(deployed: LiveGateway) -> None:
    for increment in (1, 2):
        deploy(deployed, "paged", plus(increment))
    first = deployed.call("GET", "/api/v1/events?model=paged&limit=4")[1]
    assert (len(first["events"]), first["has_more"]) == (4, True)
    before = first["events"][-1]["id"]
    rest = deployed.call("GET", f"/api/v1/models/paged/events?before={before}")[1]
    assert (len(rest["events"]), rest["has_more"]) == (2, False)
    for path in (
        "/api/v1/events?limit=0",
        "/api/v1/events?limit=1001",
        "/api/v1/events?before=x",
        "/api/v1/deployments?limit=a",
    ):
        assert deployed.call("GET", path)[0] == 400, path
    found = deployed.call("GET", "/api/v1/deployments?model=paged&limit=1")[1]["deployments"]
    assert [one["version"] for one in found] == [2]
    path = f"/api/v1/deployments/{found[0]['id']}"
    for query in ("?wait=31", "?wait=-1", "?wait=x", "?step=done"):
        assert deployed.call("GET", path + query)[0] == 400, query
    assert deployed.call("POST", path + "/cancel")[1]["state"] == "succeeded"


def test_external_data_comes_as_a_file_of_the_version(deployed: LiveGateway) -> None:
    model, weights = models.external_data(16, "weights.bin")
    deploy(deployed, "external", {"model.onnx": model, "weights.bin": weights})
    assert infer(deployed, "external", value=3.0) == (200, 3.0, "1")


def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with run_gateway(tmp_path / "models", tmp_path / "state") as gateway:
        for increment in (1, 2):
            deploy(gateway, "lasting", plus(increment))
        deploy(gateway, "lasting", plus(3), alias="canary")
        before = gateway.call("GET", "/api/v1/models/lasting")[1]
        events = gateway.call("GET", "/api/v1/events")[1]
    with run_gateway(tmp_path / "models", tmp_path / "state") as gateway:
        after = gateway.call("GET", "/api/v1/models/lasting")[1]
        assert infer(gateway, "lasting") == (200, 3.0, "2")
        assert infer(gateway, "lasting@canary") == (200, 4.0, "3")
        assert infer(gateway, "lasting/versions/1") == (200, 2.0, "1")  # loaded when it is asked for
        assert gateway.call("GET", "/api/v1/events")[1] == events
        for was, now in zip(before["versions"], after["versions"], strict=True):
            now["state"], now["reason"] = was["state"], was["reason"]
            assert now == was
        assert [a["weights"] for a in after["aliases"]] == [a["weights"] for a in before["aliases"]]


def test_a_deployment_whose_gateway_was_killed_is_ended_as_interrupted(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    slow = {"INFERWAY_PARALLEL_DEPLOYMENTS": "1"}
    with run_gateway(tmp_path / "models", tmp_path / "state", environment=slow) as gateway:
        deploy(gateway, "cut", plus(1))
        big = models.matmul(1024, 4096)
        # No alias moves to one that is quick enough to end before the kill.
        configs = [{"max_batch_size": 64 + i} for i in range(4)]
        begun = [begin(gateway, "cut", {"model.onnx": big}, config=config, alias=None)[1] for config in configs]
        gateway.process.kill()
        gateway.process.wait()
    with run_gateway(tmp_path / "models", tmp_path / "state") as gateway:
        assert infer(gateway, "cut")[0] == 200
        for one in begun:
            ended, _ = watch(gateway, one)
            assert ended["state"] in ("succeeded", "failed")
            assert ended["state"] == "succeeded" or ended["error"]["code"] == "interrupted", ended
        assert watch(gateway, begun[-1])[0]["error"]["code"] == "interrupted"
        again = deploy(gateway, "cut", big, config={"max_batch_size": 67})
        assert infer(gateway, "cut/versions/1") == (200, 2.0, "1")
        assert again["state"] == "succeeded"


def test_versions_share_the_memory_budget(tmp_path: Path) -> None:
    """Room for two of three: the least recently used leaves, and comes back when it is asked for."""
    (tmp_path / "models").mkdir()
    size = len(models.matmul(256, 1024))
    budget = {"INFERWAY_MEMORY_BUDGET_BYTES": str(int(2.5 * size)), "INFERWAY_ISOLATION": "inprocess"}
    with run_gateway(tmp_path / "models", tmp_path / "state", environment=budget) as gateway:
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 256], "data": [1.0] * 256}]}

        def states() -> dict[str, str]:
            listed = gateway.call("GET", "/api/v1/models")[1]["models"]
            return {model["name"]: model["versions"][0]["state"] for model in listed}

        for seed, name in enumerate("abc"):
            deploy(gateway, name, models.matmul(256, 1024, seed))
            assert gateway.call("POST", f"/v2/models/{name}/infer", body)[0] == 200
        assert states() == {"a": "UNLOADED", "b": "READY", "c": "READY"}
        assert gateway.call("POST", "/v2/models/a/infer", body)[0] == 200
        assert states() == {"a": "READY", "b": "UNLOADED", "c": "READY"}
        status, answer = begin(gateway, "huge", {"model.onnx": models.matmul(1024, 1024)})
        assert status == 202
        ended, _ = watch(gateway, answer)
        assert (ended["state"], ended["failed_step"], ended["error"]["code"]) == ("failed", "loaded", "memory_exceeded")
        assert budget["INFERWAY_MEMORY_BUDGET_BYTES"] in ended["error"]["message"]
        assert gateway.call("PATCH", "/api/v1/models/c/versions/1", {"pinned": True})[0] == 200
        for name in "ba":
            assert gateway.call("POST", f"/v2/models/{name}/infer", body)[0] == 200
        assert states()["c"] == "READY"


def test_swaps_under_load_lose_no_request_and_mix_no_versions(deployed: LiveGateway) -> None:
    """R18 in small; bench_lifecycle.py has it in full size."""
    increments = {str(version): float(version) for version in (1, 2)}
    for version in (1, 2):
        deploy(deployed, "swapped", plus(version))
    stop = threading.Event()
    answers: list[tuple[int, Any, str | None]] = []

    def ask() -> None:
        while not stop.is_set():
            answers.append(infer(deployed, "swapped"))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        for swap in range(30):
            weights = {str(swap % 2 + 1): 100}
            status, answer, _ = deployed.call("PUT", "/api/v1/models/swapped/aliases/stable", {"weights": weights})
            assert status == 200, answer
            wanted = str(swap % 2 + 1)
            # What was answered before the swap was acknowledged may be either's; what is asked after it is not.
            assert infer(deployed, "swapped")[2] == wanted
            if swap in (10, 20):
                assert deploy(deployed, "swapped", plus(increments[wanted]))["reused"]
            time.sleep(0)
    finally:
        stop.set()
        for asker in askers:
            asker.join(30)
    assert len(answers) > 30
    for status, got, answered_by in answers:
        assert status == 200, got
        assert answered_by is not None
        assert got == 1.0 + increments[answered_by]


def test_a_gateway_forgets_history_beyond_its_limits_and_serves_what_is_deployed(tmp_path: Path) -> None:
    folder, state = tmp_path / "models", tmp_path / "state"
    folder.mkdir()
    with run_gateway(folder, state) as gateway:
        deploy(gateway, "kept", plus(1))
        for version in (1, 2):
            status, answer = begin(gateway, "kept", {"model.onnx": b"no model %d" % version})
            assert status == 202
            watch(gateway, answer)
        assert len(kinds(gateway, "kept")) == 7
    with run_gateway(folder, state, environment={"INFERWAY_HISTORY_PER_MODEL": "1"}) as gateway:
        end = time.monotonic() + LIMIT_S
        while len(gateway.call("GET", "/api/v1/deployments?model=kept")[1]["deployments"]) > 1:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert kinds(gateway, "kept") == ["deployment_failed"]
        assert infer(gateway, "kept") == (200, 2.0, "1")
        version = gateway.call("GET", "/api/v1/models/kept/versions/1")[1]
        assert version["created_by"]
