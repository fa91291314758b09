"""Chains of versions that fail in every way: who is asked, who answers, and what is counted of whom."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferway_gateway.core import errors
from inferway_gateway.core.batcher import Answer, InferenceRequest
from inferway_gateway.core.catalog import AliasRecord, AliasSpec
from inferway_gateway.core.errors import GatewayError
from inferway_gateway.core.keys import ANONYMOUS
from inferway_gateway.core.model_config import ModelConfig
from inferway_gateway.core.routing import FALLBACK_CODES, Router
from inferway_gateway.core.served import ServedVersion
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.tensors import Signature, TensorSpec
from inferway_gateway.http.infer import infer

ERRORS: dict[str, type[GatewayError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, GatewayError) and kind is not GatewayError
}
OUTCOMES = [
    "answers",
    "misfit",
    "not loaded",
    *sorted(FALLBACK_CODES),
    "queue_full",
    "deadline_exceeded",
    "shutting_down",
    "store_unavailable",
]
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}).encode()


@dataclass
class Version:
    """An executor that does what it is told."""

    outcome: str
    ran: int = 0
    inline: bool = True
    row_exact: bool = True

    @property
    def signature(self) -> Signature:
        width = 3 if self.outcome == "misfit" else 2
        return Signature((TensorSpec("x", "FP32", (-1, width)),), (TensorSpec("y", "FP32", (-1, 1)),), True)

    def run_inline(self, request: InferenceRequest) -> Answer | None:
        self.ran += 1
        if self.outcome in ERRORS:
            raise ERRORS[self.outcome](f"{self.outcome}!")
        return Answer([np.zeros((1, 1), np.float32)], 0, 0, 0, 0, 1)

    async def infer(self, request: InferenceRequest) -> Answer:
        raise AssertionError("every run here is short")

    async def drain(self, timeout_s: float) -> int:
        return 0

    async def close(self) -> bool:
        return True


class Models:
    """A registry of one model, ``m``."""

    def __init__(self, outcomes: Sequence[str]) -> None:
        self.versions = {i: Version(outcome) for i, outcome in enumerate(outcomes, 1)}
        self.served = {
            i: ServedVersion("m", i, ModelConfig(), None, version, ModelStats())
            for i, version in self.versions.items()
            if version.outcome != "not loaded"
        }

    def get(self, name: str, version: int | None = None) -> ServedVersion:
        assert name == "m"
        assert version is not None
        if version not in self.versions:
            raise errors.VersionNotFoundError("gone")
        if version not in self.served:
            raise errors.ModelNotReadyError("not loaded")
        return self.served[version]

    async def acquire(self, name: str, version: int | None = None, *, deadline: float | None = None) -> ServedVersion:
        return self.get(name, version)


@dataclass
class Result:
    models: Models
    router: Router
    error: GatewayError | None = None
    headers: dict[bytes, bytes] = field(default_factory=dict)
    error_headers: tuple[tuple[bytes, bytes], ...] = ()
    bodies: int = 0


def ask(outcomes: Sequence[str], fallback: Sequence[int] | None = None, body: bytes = BODY) -> Result:
    """One request by an alias for version 1, with the others as its fallbacks."""
    chain = tuple(fallback) if fallback is not None else tuple(range(2, len(outcomes) + 1))
    router = Router(lambda: 0)
    spec = AliasSpec({1: 100}, fallback=chain)
    router.update([AliasRecord("m", "stable", spec, None, 1, datetime(2026, 3, 1, tzinfo=UTC), "k")])
    result = Result(Models(outcomes), router)
    settings = SimpleNamespace(body_limit_bytes=1 << 20, json_limit_bytes=1 << 20)
    scope: dict[str, Any] = {
        "type": "http",
        "headers": [],
        "request_id": b"r",
        "response_headers": (),
        "state": {"registry": result.models, "router": router, "settings": settings},
    }

    async def receive() -> dict[str, Any]:
        result.bodies += 1
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            names = [name for name, _ in message["headers"]]
            assert len(set(names)) == len(names)
            result.headers = dict(message["headers"])

    async def call() -> None:
        try:
            await infer(scope, receive, send, name="m", version=None, principal=ANONYMOUS, started=perf_counter())
        except GatewayError as error:
            result.error = error
            result.error_headers = tuple(scope["response_headers"])

    asyncio.run(call())
    return result


def expected(outcomes: Sequence[str]) -> tuple[int | None, list[int]]:
    """Which version answers, and which ones run, by the rules in words of the module's own."""
    crashes = 0
    ran: list[int] = []
    for version, outcome in enumerate(outcomes, 1):
        if outcome == "answers":
            return version, [*ran, version]
        if outcome not in ("misfit", "not loaded"):
            ran.append(version)
        if version == 1 and outcome not in FALLBACK_CODES | {"not loaded"}:
            return None, ran
        crashes += outcome == "worker_crashed"
        if crashes == 2 or outcome == "deadline_exceeded":
            return None, ran
    return None, ran


@settings(deadline=None)
@given(outcomes=st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=5))
def test_the_first_of_the_chain_that_can_answers(outcomes: list[str]) -> None:
    result = ask(outcomes)
    answering, running = expected(outcomes)
    # A version that says it is going is asked for its successor once; here that is itself.
    assert [v for v, version in result.models.versions.items() if version.ran] == running
    assert all(version.ran <= 1 for version in result.models.versions.values())
    stats = result.router.plans["m"].routes[1].stats
    assert stats.requests == 1
    if answering is not None:
        assert result.error is None
        assert result.headers[b"inferway-model-version"] == b"%d" % answering
        assert result.headers.get(b"inferway-fallback") == (None if answering == 1 else b"1")
        assert stats.fallbacks == (answering != 1)
        assert sum(stats.failures.values()) == (answering != 1)
        served = result.models.served[answering].stats
        assert (served.success.count, served.fail.count) == (1, 0)
    else:
        code = {"misfit": "invalid_tensor", "not loaded": "model_not_ready"}.get(outcomes[0], outcomes[0])
        assert result.error is not None
        assert result.error.code == code
        assert stats.failures == {code: 1}
        assert stats.fallbacks == 0
        named = (b"inferway-model-version", b"1") in result.error_headers
        assert named == (outcomes[0] != "not loaded")
    for version, served_version in result.models.served.items():
        if version != answering:
            # What a caller's request does not fit is no failure of a fallback.
            counted = served_version.stats.fail.count
            assert counted == (version in running or (version == 1 and outcomes[0] == "misfit"))


def test_a_version_that_is_gone_is_no_error_of_the_callers() -> None:
    result = ask(["answers", "answers"], fallback=[9, 2])
    assert result.headers[b"inferway-model-version"] == b"1"
    gone = ask(["not loaded"], fallback=[9])
    assert gone.error is not None
    assert gone.error.code == "model_not_ready"


@pytest.mark.parametrize("body", [b"nonsense", b"{}", b""])
def test_a_body_that_nobody_can_read_is_refused_by_the_first(body: bytes) -> None:
    result = ask(["answers", "answers"], body=body)
    assert result.error is not None
    assert result.error.code == "malformed_request"
    assert not any(version.ran for version in result.models.versions.values())
    held_back = ask(["not loaded", "answers"], body=body)
    assert held_back.error is not None
    assert held_back.error.code == "model_not_ready"


def test_a_body_that_does_not_arrive_is_asked_for_once() -> None:
    for outcomes in (["answers", "answers"], ["not loaded", "answers", "answers"]):
        result = ask(outcomes, body=b"x" * ((1 << 20) + 1))
        assert result.error is not None
        assert result.error.code == "payload_too_large"
        assert result.bodies == 1
        assert not any(version.ran for version in result.models.versions.values())
