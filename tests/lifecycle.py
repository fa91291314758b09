"""For tests of the SDK and the command line: the lifecycle routes of a gateway, in memory, over a scripted server."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from scripted import Answer, ScriptedServer, Seen, as_json

AT = "2026-11-23T12:00:00Z"
STEPS = ["received", "checked", "admitted", "loaded", "warmed", "compared", "ready"]


@dataclass
class FakeDeployment:
    """A deployment whose looks are ``script``, one after the other; the last one stays."""

    record: dict[str, Any]
    script: list[dict[str, Any]] = field(default_factory=list)


class FakeLifecycle:
    """Blobs, versions and deployments, as the contract has them; nothing is loaded.

    Attributes:
        blobs, partial: digest to content.
        created: bodies of the versions that were asked for.
        looks: what each new deployment looks like, look by look, as changes to its record.
        refuse: answers to give to the next uploads instead of taking them.
    """

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.blobs: dict[str, bytes] = {}
        self.partial: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.deployments: dict[str, FakeDeployment] = {}
        self.looks: list[dict[str, Any]] = [{"step": step} for step in STEPS[:-1]]
        self.looks.append({"step": "ready", "state": "succeeded"})
        self.refuse: list[Answer] = []
        self.lose_blobs = threading.Event()
        server.otherwise = self.answer
        server.cut_short = self._cut

    def answer(self, seen: Seen) -> Answer:
        parts = urlsplit(seen.path)
        segments = parts.path.strip("/").split("/")[2:]
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        match seen.method, segments:
            case "GET", ["blobs", digest]:
                return self._status(digest)
            case "PUT", ["blobs", digest]:
                return self.refuse.pop(0) if self.refuse else self._put(digest, seen)
            case "POST", ["models", name, "versions"]:
                return self._create(name, seen.json)
            case "GET", ["deployments", key] if key in self.deployments:
                return self._look(self.deployments[key], query)
            case "POST", ["deployments", key, "cancel"] if key in self.deployments:
                found = self.deployments[key]
                found.script = [{"state": "cancelled"}]
                return as_json(found.record)
            case "GET", ["models", name, "versions", version]:
                return as_json(version_record(name, int(version)))
        return problem(404, "deployment_not_found" if segments[0] == "deployments" else "not_found")

    def keep(self, path: Path) -> None:
        """Have a file's content already."""
        data = path.read_bytes()
        self.blobs[hashlib.sha256(data).hexdigest()] = data

    def puts(self) -> list[Seen]:
        return [seen for seen in self.server.seen if seen.method == "PUT"]

    def _status(self, digest: str) -> Answer:
        if digest in self.blobs:
            size = len(self.blobs[digest])
            return as_json({"digest": digest, "size": size, "received": size, "complete": True})
        if digest in self.partial:
            received = len(self.partial[digest])
            return as_json({"digest": digest, "size": None, "received": received, "complete": False})
        return problem(404, "blob_not_found")

    def _cut(self, seen: Seen) -> None:
        digest = seen.path.rsplit("/", 1)[1]
        self.partial[digest] = self.partial.get(digest, b"")[: int(seen.headers.get("upload-offset", "0"))] + seen.body

    def _put(self, digest: str, seen: Seen) -> Answer:
        before = self.partial.get(digest, b"")
        offset = int(seen.headers.get("upload-offset", "0"))
        if offset != len(before) and offset:
            return problem(409, "upload_conflict", received=len(before))
        whole = before[:offset] + seen.body
        if len(whole) != int(seen.headers["upload-length"]) or hashlib.sha256(whole).hexdigest() != digest:
            self.partial.pop(digest, None)
            return problem(400, "digest_mismatch")
        self.blobs[digest] = whole
        self.partial.pop(digest, None)
        return as_json({"digest": digest, "size": len(whole), "received": len(whole), "complete": True}, 201)

    def _create(self, name: str, body: dict[str, Any]) -> Answer:
        if self.lose_blobs.is_set():
            self.lose_blobs.clear()
            self.blobs.clear()
        for file in body["files"]:
            if file["digest"] not in self.blobs:
                return problem(404, "blob_not_found", f"there is no blob for {file['path']}")
        self.created.append(body)
        key = f"d{len(self.created)}"
        record = {
            "id": key, "model": name, "version": body.get("version", len(self.created)), "digest": "a" * 64,
            "state": "running", "step": None, "failed_step": None, "error": None, "reused": False,
            "alias": body["alias"], "created_at": AT, "created_by": "key", "updated_at": AT,
        }  # fmt: skip
        self.deployments[key] = FakeDeployment(record, list(self.looks))
        return as_json(record, 202)

    def _look(self, found: FakeDeployment, query: dict[str, str]) -> Answer:
        if found.script and "wait" in query:
            found.record = {**found.record, **found.script.pop(0)}
        return as_json(found.record)


def version_record(name: str, version: int, **changes: Any) -> dict[str, Any]:
    return {
        "model": name, "version": version, "kind": "onnx", "digest": "a" * 64, "files": [], "config": {},
        "isolation": "worker", "labels": {}, "metadata": {}, "pinned": False, "footprint": None, "state": "READY",
        "reason": "", "created_at": AT, "created_by": "key", **changes,
    }  # fmt: skip


def alias_record(name: str, alias: str, weights: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "model": name, "alias": alias, "weights": weights, "sticky": "none", "shadow": None, "fallback": [],
        "guard": None, "previous": None, "revision": 1, "updated_at": AT, "updated_by": "key", "traffic": {}, **changes,
    }  # fmt: skip


def event_record(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": number, "at": AT, "kind": "alias_set", "model": "churn", "version": None, "alias": "stable", "by": "key",
        "detail": {}, **changes,
    }  # fmt: skip


def problem(
    status: int, code: str, message: str = "no", headers: dict[str, str] | None = None, **members: Any
) -> Answer:
    body = {
        "type": f"urn:inferway:error:{code}", "title": "no", "status": status, "detail": message, "code": code,
        "request_id": "from-gateway", **members,
    }  # fmt: skip
    return Answer(status, json.dumps(body).encode(), {"Content-Type": "application/problem+json", **(headers or {})})
