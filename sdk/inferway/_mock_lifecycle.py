"""The life of models in `testing.MockGateway`: contents, versions, deployments, aliases, events, all in memory.

It answers as a gateway would and loads nothing: a deployment that is not made to fail has gone through every step by
the time it is first looked at. Plain values in and out; `testing` does the HTTP.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, get_args

from inferway_contract.names import Step

_BEGINNING: Final = datetime(2026, 1, 1, tzinfo=UTC)
_STEPS: Final[tuple[str, ...]] = get_args(Step)


class LifecycleRefusal(Exception):
    """An error to answer with."""

    def __init__(self, status_code: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code


@dataclass(frozen=True, slots=True)
class MockDeployment:
    """A version that was deployed to the mock.

    Attributes:
        files: path to content.
        alias: that was moved to it; None where none was.
        config, labels, metadata, isolation, pinned: as they were asked for.
    """

    model: str
    version: int
    alias: str | None
    files: Mapping[str, bytes]
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    isolation: str = "worker"
    pinned: bool = False


class MockLifecycle:
    """What the mock knows of deployed models.

    Attributes:
        deployed: every version that was put up, in order; the same content twice is there once.
        failures: (step, code, message) of the next deployments.
        placed: gives the versions that a test has defined functions for, by model.
    """

    def __init__(self, placed: Callable[[str], list[int]]) -> None:
        self.deployed: list[MockDeployment] = []
        self.failures: deque[tuple[str, str, str]] = deque()
        self.placed = placed
        self._blobs: dict[str, bytes] = {}
        self._versions: dict[str, dict[int, dict[str, Any]]] = {}
        self._aliases: dict[str, dict[str, dict[str, Any]]] = {}
        self._deployments: dict[str, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._count = 0

    # --- what inference asks ---

    def names(self) -> set[str]:
        """Models with a version."""
        return {name for name, versions in self._versions.items() if versions}

    def resolve(self, name: str, alias: str | None) -> int | None:
        """The version that a name or an alias means; None where that is the highest one."""
        aliases = self._aliases.get(name, {})
        if alias is None:
            found = aliases.get("stable")
            if found is None:
                return None
        elif alias in aliases:
            found = aliases[alias]
        else:
            raise LifecycleRefusal(404, "alias_not_found", f"'{name}' has no alias '{alias}'")
        weights: dict[str, float] = found["weights"]
        # One answer to the same question, whatever the shares: a test must not depend on chance.
        return int(max(weights, key=lambda version: (weights[version], -int(version))))

    def model_file(self, name: str, version: int) -> bytes | None:
        """The ONNX file of a deployed version."""
        for deployment in self.deployed:
            if (deployment.model, deployment.version) == (name, version):
                return next((data for path, data in deployment.files.items() if path.endswith(".onnx")), None)
        return None

    def versions(self, name: str) -> list[int]:
        """Numbers of a model's deployed versions."""
        return sorted(self._versions.get(name, {}))

    # --- routes ---

    def answer(
        self, method: str, segments: list[str], query: Mapping[str, str], headers: Mapping[str, str], body: bytes
    ) -> tuple[int, Any]:
        """Answer a request below ``/api/v1``: the status and what goes into the body as JSON, None for nothing.

        Raises:
            LifecycleRefusal: the answer is an error.
        """
        match method, segments:
            case "GET", ["blobs", digest]:
                return 200, self._blob(digest)
            case "PUT", ["blobs", digest]:
                return self._put(digest, headers, body)
            case "GET", ["models"]:
                return 200, {"models": [self._model(name) for name in sorted(self.names())]}
            case "GET", ["models", name]:
                return 200, self._model(name)
            case "DELETE", ["models", name]:
                return self._delete(name)
            case "POST", ["models", name, "versions"]:
                return 202, self._create(name, json.loads(body))
            case "GET", ["models", name, "versions", version]:
                return 200, self._version(name, version)
            case "PATCH", ["models", name, "versions", version]:
                self._version(name, version).update(json.loads(body))
                return 200, self._version(name, version)
            case "DELETE", ["models", name, "versions", version]:
                return self._delete_version(name, version)
            case "GET", ["models", name, "aliases"]:
                return 200, {"aliases": list(self._aliases.get(name, {}).values())}
            case _, ["models", name, "aliases", alias, *operation]:
                return self._of_alias(method, name, alias, operation, body)
            case "GET", ["models", name, "events"]:
                return 200, self._page(query, name)
            case "GET", ["events"]:
                return 200, self._page(query, None)
            case "GET", ["deployments"]:
                wanted = query.get("model")
                found = [record for record in self._deployments.values() if wanted in (None, record["model"])]
                return 200, {"deployments": found[::-1][: int(query.get("limit", "100"))]}
            case "GET", ["deployments", key]:
                return 200, self._deployment(key)
            case "POST", ["deployments", key, "cancel"]:
                return 200, self._deployment(key)
            case _:
                path = "/".join(["/api/v1", *segments])
                raise LifecycleRefusal(404, "not_found", f"the mock gateway has no {method} {path}")

    def _blob(self, digest: str) -> dict[str, Any]:
        if digest not in self._blobs:
            raise LifecycleRefusal(404, "blob_not_found", f"there is no content with the digest {digest}")
        size = len(self._blobs[digest])
        return {"digest": digest, "size": size, "received": size, "complete": True}

    def _put(self, digest: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        if headers.get("upload-offset", "0") != "0" or hashlib.sha256(body).hexdigest() != digest:
            raise LifecycleRefusal(400, "digest_mismatch", f"the content does not have the digest {digest}")
        self._blobs[digest] = body
        return 201, self._blob(digest)

    def _model(self, name: str) -> dict[str, Any]:
        versions = self._versions.get(name)
        if not versions:
            raise LifecycleRefusal(404, "model_not_found", f"there is no deployed model '{name}'")
        aliases = list(self._aliases.get(name, {}).values())
        return {"name": name, "source": "catalog", "versions": list(versions.values()), "aliases": aliases}

    def _version(self, name: str, version: str | int) -> dict[str, Any]:
        self._model(name)
        versions = self._versions[name]
        if not str(version).isdigit() or int(version) not in versions:
            raise LifecycleRefusal(404, "version_not_found", f"'{name}' has no version {version}")
        return versions[int(version)]

    def _create(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        for file in asked["files"]:
            self._blob(file["digest"])
        content = json.dumps([asked["files"], asked["config"], asked.get("isolation")], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()
        versions = self._versions.setdefault(name, {})
        same = next((number for number, known in versions.items() if known["digest"] == digest), None)
        number = asked.get("version") or same or max([0, *versions, *self.placed(name)]) + 1
        if number in versions and versions[number]["digest"] != digest:
            raise LifecycleRefusal(409, "conflict", f"'{name}' version {number} has other content")
        failure = self.failures.popleft() if self.failures else None
        self._count += 1
        moment = self._now()
        record: dict[str, Any] = {
            "id": f"mock{self._count:08d}", "model": name, "version": number, "digest": digest,
            "state": "succeeded", "step": "ready", "failed_step": None, "error": None, "reused": same is not None,
            "alias": asked["alias"], "created_at": moment, "created_by": "mock", "updated_at": moment,
        }  # fmt: skip
        self._deployments[record["id"]] = record
        if failure is not None:
            step, code, message = failure
            at = _STEPS.index(step)
            record.update(
                state="failed", step=_STEPS[at - 1] if at else None, failed_step=step,
                error={"code": code, "message": message},
            )  # fmt: skip
            self._happened("deployment_failed", name, number, None, {"step": step, "code": code})
            return record
        if same is None:
            self._keep(name, number, digest, asked, moment)
        self._happened("deployment_succeeded", name, number, asked["alias"], {})
        if asked["alias"] is not None:
            self._point(name, asked["alias"], {"weights": {str(number): 100.0}}, "alias_set")
        return record

    def _keep(self, name: str, number: int, digest: str, asked: dict[str, Any], moment: str) -> None:
        shared = {member: asked[member] for member in ("config", "labels", "metadata", "pinned")}
        isolation = asked.get("isolation") or "worker"
        self._versions[name][number] = {
            "model": name, "version": number, "kind": "onnx", "digest": digest, "files": asked["files"], **shared,
            "isolation": isolation, "footprint": None, "state": "READY", "reason": "", "created_at": moment,
            "created_by": "mock",
        }  # fmt: skip
        files = {file["path"]: self._blobs[file["digest"]] for file in asked["files"]}
        self.deployed.append(MockDeployment(name, number, asked["alias"], files, isolation=isolation, **shared))

    def _deployment(self, key: str) -> dict[str, Any]:
        if key not in self._deployments:
            raise LifecycleRefusal(404, "deployment_not_found", f"there is no deployment {key}")
        return self._deployments[key]

    def _delete_version(self, name: str, version: str) -> tuple[int, Any]:
        self._version(name, version)
        for alias, record in self._aliases.get(name, {}).items():
            if version in record["weights"] or int(version) in record["fallback"]:
                raise LifecycleRefusal(409, "conflict", f"the alias '{alias}' names version {version}")
        del self._versions[name][int(version)]
        self._happened("version_deleted", name, int(version), None, {})
        return 204, None

    def _delete(self, name: str) -> tuple[int, Any]:
        self._model(name)
        del self._versions[name]
        self._aliases.pop(name, None)
        return 204, None

    def _of_alias(self, method: str, name: str, alias: str, operation: list[str], body: bytes) -> tuple[int, Any]:
        self._model(name)
        if method == "PUT" and not operation:
            return 200, self._set_alias(name, alias, json.loads(body))
        found = self._aliases.get(name, {}).get(alias)
        if found is None:
            raise LifecycleRefusal(404, "alias_not_found", f"'{name}' has no alias '{alias}'")
        if method == "GET" and not operation:
            return 200, found
        if method == "DELETE" and not operation:
            del self._aliases[name][alias]
            self._happened("alias_deleted", name, None, alias, {})
            return 204, None
        if (method, operation) == ("POST", ["rollback"]):
            if found["previous"] is None:
                raise LifecycleRefusal(409, "conflict", f"the alias '{alias}' has pointed nowhere else yet")
            return 200, self._point(name, alias, found["previous"], "rolled_back")
        raise LifecycleRefusal(405, "method_not_allowed", f"{method} is not for an alias")

    def _set_alias(self, name: str, alias: str, asked: dict[str, Any]) -> dict[str, Any]:
        version, expected = asked.pop("version", None), asked.pop("expected_revision", None)
        if version is not None:
            asked["weights"] = {str(version): 100.0}
        for number in [*asked["weights"], *asked["fallback"]]:
            self._version(name, number)
        revision = self._aliases.get(name, {}).get(alias, {}).get("revision", 0)
        if expected not in (None, revision):
            raise LifecycleRefusal(409, "conflict", f"the alias '{alias}' is at revision {revision}, not {expected}")
        return self._point(name, alias, asked, "alias_set")

    def _point(self, name: str, alias: str, target: Mapping[str, Any], kind: str) -> dict[str, Any]:
        before = self._aliases.setdefault(name, {}).get(alias)
        members = ("weights", "sticky", "shadow", "fallback", "guard")
        shadow, guard = target.get("shadow"), target.get("guard")
        record: dict[str, Any] = {
            "model": name,
            "alias": alias,
            "weights": target["weights"],
            "sticky": target.get("sticky", "none"),
            "shadow": None if shadow is None else {"share": 1.0, "rtol": 1e-3, "atol": 1e-5, **shadow},
            "fallback": target.get("fallback", []),
            "guard": None
            if guard is None
            else {"window_s": 60.0, "min_requests": 50, "max_error_rate": 0.02, "max_p95_ratio": 2.0, **guard},
            "previous": None if before is None else {member: before[member] for member in members},
            "revision": 1 if before is None else before["revision"] + 1,
            "updated_at": self._now(),
            "updated_by": "mock",
            "traffic": {},
        }
        self._aliases[name][alias] = record
        only = int(next(iter(record["weights"]))) if len(record["weights"]) == 1 else None
        self._happened(kind, name, only, alias, {})
        return record

    def _happened(self, kind: str, name: str, version: int | None, alias: str | None, detail: dict[str, Any]) -> None:
        self._events.append({
            "id": len(self._events) + 1, "at": self._now(), "kind": kind, "model": name, "version": version,
            "alias": alias, "by": "mock", "detail": detail,
        })  # fmt: skip

    def _page(self, query: Mapping[str, str], name: str | None) -> dict[str, Any]:
        before, limit = int(query.get("before", len(self._events) + 1)), int(query.get("limit", "100"))
        found = [event for event in self._events[::-1] if event["id"] < before and name in (None, event["model"])]
        return {"events": found[:limit], "has_more": len(found) > limit}

    def _now(self) -> str:
        # A second for each thing that has happened: tests see the same moments every time.
        return (_BEGINNING + timedelta(seconds=len(self._events))).isoformat()
