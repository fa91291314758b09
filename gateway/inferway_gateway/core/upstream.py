"""Servers elsewhere that answer for model versions of kind "remote": what the operator says of them, what is counted.

An upstream is defined by the operator alone. What is deployed can name one and never an address, so nobody can send
the secret of an upstream, or a request from inside the network, to a place of his choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

Protocol = Literal["oip", "openai"]
Operation = Literal["infer", "embeddings", "chat", "completions"]
"""What a remote version asks for: ``infer`` of an ``oip`` upstream, one of the others of an ``openai`` one."""


class Secret:
    """What opens an upstream. Shows itself to nobody who does not ask for ``value``."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Secret(****)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """One server of an upstream.

    Attributes:
        url: scheme, host, port and a path in front of the protocol's, without a slash at the end.
        weight: its share of the requests, relative to the others'.
        label: what metrics and logs call it: host and port.
    """

    url: str
    label: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class UpstreamSpec:
    """An upstream as its operator defines it.

    Attributes:
        secret: sent as ``secret_header: secret_scheme secret`` to the endpoints and nowhere else.
        models: patterns of the models' names, as the upstream calls them, that versions may use.
        ca_file: certificates that the endpoints' are checked against; None takes the system's.
        timeout_s: for one attempt, from sending to the whole answer; of one that is streamed, to its first piece, and
            from each piece to the next. A caller's deadline that is nearer counts instead.
        connect_timeout_s: for making a connection.
        pool_size: connections open at once, to all endpoints together.
        attempts: the most that are made for one request, the first included.
        retry_ratio: retries may be that share of the requests, 0 to 1.
        retry_floor_per_s: and so many a second besides, for an upstream of few requests, which then may get more than
            that share of them again.
        breaker_failures: consecutive failures of an endpoint that keep a version's requests away from it.
        breaker_open_s: for how long at first; doubles up to ``breaker_max_open_s`` with each trial that fails.
        max_retry_after_s: the longest time for which an endpoint that says Retry-After is left alone.
        max_response_bytes: the largest answer that is read.
        max_in_flight: requests of one version that are sent at once.
        max_queued: requests of one version that may wait for that.
        health_path: asked at each endpoint every ``health_interval_s``; empty asks nothing.
        binary: send tensors as binary data; None: where the upstream's metadata offers that.
    """

    name: str
    protocol: Protocol
    endpoints: tuple[EndpointSpec, ...]
    secret: Secret | None = None
    secret_header: str = "Authorization"  # noqa: S105  # where it goes, not what it is
    secret_scheme: str = "Bearer"  # noqa: S105
    models: tuple[str, ...] = ("*",)
    ca_file: str | None = None
    timeout_s: float = 30.0
    connect_timeout_s: float = 2.0
    pool_size: int = 100
    attempts: int = 3
    retry_ratio: float = 0.1
    retry_floor_per_s: float = 0.0
    breaker_failures: int = 5
    breaker_open_s: float = 1.0
    breaker_max_open_s: float = 30.0
    max_retry_after_s: float = 30.0
    max_response_bytes: int = 128 * 1024 * 1024
    max_in_flight: int = 64
    max_queued: int = 1024
    health_path: str = ""
    health_interval_s: float = 5.0
    health_timeout_s: float = 2.0
    binary: bool | None = None

    def allows(self, model: str) -> bool:
        """Whether versions may use the model that the upstream calls so."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)


@dataclass(frozen=True, slots=True)
class RemoteSpec:
    """What ``remote.toml`` says: which model of which upstream a version is.

    Attributes:
        version: the upstream's version; None leaves it to the upstream.
        batched: axis 0 of every tensor counts rows; None derives it as for a graph.
        dimensions: length of an embedding where it is known.
        parameters: sent with each request to an OpenAI-compatible upstream, such as ``temperature``, where the caller
            does not say them.
    """

    upstream: str
    model: str
    version: str | None = None
    operation: Operation = "infer"
    batched: bool | None = None
    dimensions: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


def has_dots(name: str) -> bool:
    """Whether a name that stands in a path could be taken for a way up in it, or for none."""
    return any(part in (".", "..") for part in name.replace("\\", "/").split("/"))


CALL_OUTCOMES: Final = ("ok", "refused", "overloaded", "failed", "timeout", "broken", "cancelled")
"""How a call of an endpoint ended. ok: with what was asked for; refused: it says that the request is wrong;
overloaded: 429 or 503; failed: another status, or an answer that the protocol does not have; timeout; broken: no
connection, or it ended before the answer did; cancelled: the caller left."""


@dataclass(slots=True)
class EndpointStats:
    """What is counted of one endpoint. ``outstanding``, ``healthy`` and ``open_breakers`` are gauges."""

    label: str
    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CALL_OUTCOMES, 0))
    outstanding: int = 0
    healthy: bool = True
    open_breakers: int = 0
    """Versions whose breaker keeps them from this endpoint."""


@dataclass(slots=True)
class UpstreamStats:
    """What is counted of one upstream."""

    name: str
    endpoints: list[EndpointStats] = field(default_factory=list)
    requests: int = 0
    """Requests that led to at least one call."""
    retries: int = 0
    budget_exhausted: int = 0
    """Failures that were not tried again because the retry budget was spent."""
    probes_failed: int = 0
