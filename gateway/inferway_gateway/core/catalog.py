"""What lasts of deployed models: versions, aliases, deployments, events, blobs.

Values, and the protocol of the store that keeps them, which ``store/catalog.py`` implements over SQL.

A version is immutable: its files, by digest, and its configuration make its ``manifest digest``, and the same content
deployed twice is the same version. What may change about it lies beside it: labels, pinning, aliases. Every change of
the catalog is one transaction that also writes its event and raises ``revision``, which other gateways on the same
database look at to follow.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, Protocol

Kind = Literal["onnx", "language", "remote", "pipeline"]
LANGUAGE_FILE: Final = "genai_config.json"
"""What a model that writes text is recognised by; it names the ONNX file."""
Isolation = Literal["worker", "inprocess"]

DEFAULT_ALIAS: Final = "stable"
"""A bare model name means this alias, where the model has it, and else its highest version."""


@dataclass(frozen=True, slots=True)
class FileRef:
    """One file of a version.

    Attributes:
        path: relative, with ``/``, as the model's own files name each other: ``model.onnx``, ``weights/a.bin``.
        digest: SHA-256 of the content, 64 lower-case hexadecimal digits.
        size: in bytes.
    """

    path: str
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a version was measured to need, in bytes.

    Attributes:
        resident_bytes: proportional set size of its worker after warm-up (resident memory in-process).
        peak_bytes: the most it had at its largest declared batch; what the memory budget counts.
    """

    resident_bytes: int
    peak_bytes: int

    def __add__(self, other: Footprint) -> Footprint:
        """Of two that belong together, such as a model and its tokenizer: either may be at its most at any time."""
        return Footprint(self.resident_bytes + other.resident_bytes, self.peak_bytes + other.peak_bytes)


@dataclass(frozen=True, slots=True)
class VersionSpec:
    """What a deployment asks for; validated.

    Attributes:
        version: None takes the next number.
        config: the members of ``inferway.toml``, as JSON.
        isolation: None takes the gateway's default for deployed models.
        alias: moved to the new version when it is ready; None moves none.
        pinned: never unloaded to make room.
    """

    model: str
    kind: Kind
    files: tuple[FileRef, ...]
    version: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    isolation: Isolation | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    alias: str | None = DEFAULT_ALIAS
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version that was deployed."""

    model: str
    version: int
    kind: Kind
    digest: str
    """Of the manifest: files, kind, configuration and isolation."""
    files: tuple[FileRef, ...]
    config: Mapping[str, Any]
    isolation: Isolation
    labels: Mapping[str, str]
    metadata: Mapping[str, Any]
    pinned: bool
    footprint: Footprint | None
    created_at: datetime
    created_by: str
    """Key id."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version that gets a copy of some requests; its answers are compared and thrown away.

    Attributes:
        share: of the requests, 0 to 1.
        rtol, atol: outputs differ where ``|a - b| > atol + rtol * |b|``, ``b`` being the answer that was given.
    """

    version: int
    share: float = 1.0
    rtol: float = 1e-3
    atol: float = 1e-5


@dataclass(frozen=True, slots=True)
class Guard:
    """When the lesser targets of an alias go back to no traffic.

    Compared over ``window_s`` seconds between each lesser target and the one with the largest weight, once both have
    had ``min_requests``.

    Attributes:
        max_error_rate: how much the share of failed requests may exceed that of the largest target, 0 to 1.
        max_p95_ratio: how many times its 95th percentile of latency may be that of the largest target.
    """

    window_s: float = 60.0
    min_requests: int = 50
    max_error_rate: float = 0.02
    max_p95_ratio: float = 2.0


@dataclass(frozen=True, slots=True)
class AliasSpec:
    """Where an alias points.

    Attributes:
        weights: version to its share of the traffic, in percent; they sum to 100.
        sticky: ``none``: each request for itself; ``key``: by API key; ``header:NAME``: by the value of that header,
            and by key where it is missing.
        fallback: versions that answer, in this order, when the chosen one cannot.
    """

    weights: Mapping[int, float]
    sticky: str = "none"
    shadow: Shadow | None = None
    fallback: tuple[int, ...] = ()
    guard: Guard | None = None


@dataclass(frozen=True, slots=True)
class AliasRecord:
    model: str
    alias: str
    spec: AliasSpec
    previous: AliasSpec | None
    """What it was before the last change; a roll back swaps the two."""
    revision: int
    """Raised with each change of this alias; a change may be made conditional on it."""
    updated_at: datetime
    updated_by: str


class Step(enum.StrEnum):
    """Where a deployment is, in order."""

    RECEIVED = "received"
    CHECKED = "checked"
    ADMITTED = "admitted"
    LOADED = "loaded"
    WARMED = "warmed"
    COMPARED = "compared"
    READY = "ready"


DeploymentState = Literal["running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """One attempt to bring a version into service.

    Attributes:
        version: reserved when the deployment is created; that of the existing version where the content is the same.
        step: the last one that is done.
        error_code, error_message: why it failed, and at which step that was.
        reused: the same content was deployed before, and this deployment made no new version.
        owner: the gateway process that carries it out; another one takes it for interrupted when that is gone.
    """

    id: str
    spec: VersionSpec
    version: int
    digest: str
    state: DeploymentState
    step: Step | None
    failed_step: Step | None
    error_code: str | None
    error_message: str | None
    reused: bool
    cancel_requested: bool
    owner: str
    created_at: datetime
    created_by: str
    updated_at: datetime


EventKind = Literal[
    "deployment_started", "deployment_succeeded", "deployment_failed", "deployment_cancelled",
    "alias_set", "alias_deleted", "rolled_back", "auto_rolled_back",
    "version_deleted", "version_changed", "worker_crashed", "breaker_opened", "breaker_closed",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """Who did what, when. ``by`` is a key id, ``gateway`` for what the gateway did by itself, or ``anonymous``."""

    id: int
    at: datetime
    kind: EventKind
    model: str
    version: int | None
    alias: str | None
    by: str
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """A file's content that is stored whole.

    Attributes:
        created_by: who brought it first.
        copy: tells this stored copy from an earlier one of the same content that is being removed; part of the name
            under which it is stored, so that nobody ever removes a file that a row has come to mean again.
    """

    digest: str
    size: int
    created_at: datetime
    created_by: str
    copy: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The catalog at one revision."""

    revision: int
    versions: tuple[VersionRecord, ...]
    aliases: tuple[AliasRecord, ...]


class Catalog(Protocol):
    """The store of the catalog.

    Every method may raise ``StoreUnavailableError``. Each write is one transaction, with its event, and lasts when the
    call returns. Writes happen one after the other, in the order of their events' ids; those that change what
    ``snapshot`` gives, or the state of a deployment, raise ``revision``.
    """

    async def revision(self) -> int:
        """Cheap: asked several times a second."""
        ...

    async def snapshot(self) -> Snapshot: ...

    async def begin_deployment(self, spec: VersionSpec, *, digest: str, isolation: Isolation, by: str, owner: str
                               ) -> DeploymentRecord:  # fmt: skip
        """Reserve a version number and record the deployment as running.

        Where a version of the same model has this digest, the record has ``reused`` and its number; it still runs, so
        that the alias is moved and readiness is seen to. A number belongs to one content for good: after a version was
        deleted, nothing else gets its number.

        Raises:
            ConflictError: the wanted number belongs to other content, or a deployment that runs has reserved it, or one
                that runs makes a version of the same content.
            BlobNotFoundError: a file's blob is not stored whole.
            InvalidParameterError: a file's blob has another size.
        """
        ...

    async def advance_deployment(self, deployment_id: str, step: Step) -> DeploymentRecord:
        """Record that a step is done, unless the deployment has ended; the record says whether it runs."""
        ...

    async def keep_deployments(self, owner: str) -> list[DeploymentRecord]:
        """Record that a gateway process is there, and give the deployments that it carries out, oldest first."""
        ...

    async def running_deployments(self) -> list[DeploymentRecord]:
        """Those that run, oldest first."""
        ...

    async def unkept_deployments(self, older_than: datetime) -> list[DeploymentRecord]:
        """Those that run and whose owner has not been there since: to be ended as interrupted."""
        ...

    async def commit_deployment(self, deployment_id: str, footprint: Footprint | None, alias: AliasSpec | None
                                ) -> VersionRecord:  # fmt: skip
        """In one transaction: the version exists, its alias points at it, the deployment has succeeded.

        Where the version was there already, labels and metadata that the deployment has take the place of its own, and
        it is pinned where the deployment says so; what the deployment does not say stays.

        Raises:
            ConflictError: the deployment does not run any more, or its end was asked for.
            VersionNotFoundError: a version that ``alias`` names does not exist.
        """
        ...

    async def end_deployment(self, deployment_id: str, *, code: str, message: str, step: Step | None,
                             cancelled: bool = False) -> DeploymentRecord:  # fmt: skip
        """Record a failure; its reserved number is free again. Does nothing to a deployment that has ended."""
        ...

    async def request_cancel(self, deployment_id: str, by: str) -> DeploymentRecord:
        """Ask for the end of a deployment that may run in another process. Does nothing to one that has ended."""
        ...

    async def deployment(self, deployment_id: str) -> DeploymentRecord:
        """Raises DeploymentNotFoundError."""
        ...

    async def deployments(self, model: str | None = None, limit: int = 100) -> list[DeploymentRecord]:
        """Youngest first."""
        ...

    async def version(self, model: str, version: int) -> VersionRecord:
        """Raises VersionNotFoundError."""
        ...

    async def alias(self, model: str, alias: str) -> AliasRecord:
        """Raises AliasNotFoundError."""
        ...

    async def set_alias(self, model: str, alias: str, spec: AliasSpec, *, by: str, kind: EventKind = "alias_set",
                        expected_revision: int | None = None, detail: Mapping[str, Any] | None = None,
                        checked: bool = False) -> AliasRecord:  # fmt: skip
        """Point an alias. Where it is so already, nothing is written, and what it was before stays as it was.

        Args:
            expected_revision: 0 means that there is no such alias yet; None: whatever it is.
            detail: for the event, beside what the alias is and was; its member ``version`` is the event's.
            checked: the caller knows that the versions are there. So it is for a model of the folder, whose versions
                are not in the catalog.
        Raises:
            ModelNotFoundError: the model has no version at all.
            VersionNotFoundError: a version that it names does not exist.
            ConflictError: the alias is not at ``expected_revision``.
        """
        ...

    async def delete_alias(self, model: str, alias: str, *, by: str) -> None:
        """Raises AliasNotFoundError."""
        ...

    async def change_version(self, model: str, version: int, *, by: str, labels: Mapping[str, str] | None = None,
                             metadata: Mapping[str, Any] | None = None, pinned: bool | None = None
                             ) -> VersionRecord:  # fmt: skip
        """Change what is beside the version's content; None leaves it. Raises VersionNotFoundError."""
        ...

    async def delete_version(self, model: str, version: int, *, by: str) -> None:
        """Delete a version.

        Raises:
            VersionNotFoundError
            ConflictError: an alias, as target, shadow or fallback, names it, or a deployment of it runs.
        """
        ...

    async def delete_model(self, model: str, *, by: str) -> None:
        """Delete every version and alias. Raises ModelNotFoundError; ConflictError while a deployment runs."""
        ...

    async def add_event(self, kind: EventKind, model: str, *, version: int | None = None, alias: str | None = None,
                        by: str, detail: Mapping[str, Any] | None = None) -> None: ...  # fmt: skip

    async def events(self, model: str | None = None, *, before: int | None = None, limit: int = 100) -> list[Event]:
        """Youngest first."""
        ...

    async def add_blob(self, digest: str, size: int, *, by: str, copy: str = "", limit_bytes: int | None = None,
                       limit_per_key_bytes: int | None = None) -> BlobRecord:  # fmt: skip
        """Record a blob that is stored whole, and that ``by`` has shown to have it. Idempotent.

        Returns:
            The record that counts. Where its ``copy`` is another, the content was there already and the caller's copy
            is one too many.
        Raises:
            QuotaExceededError: with it the gateway, or the key, would keep more bytes than its limit.
        """
        ...

    async def want_blobs(self, digests: Sequence[str]) -> None:
        """Have these not taken for old: somebody is about to deploy them."""
        ...

    async def blob(self, digest: str) -> BlobRecord | None: ...

    async def blobs(self, digests: Sequence[str] | None = None) -> list[BlobRecord]:
        """Those of these digests that are stored; None: all. In order of digest."""
        ...

    async def has_shown(self, digest: str, by: str) -> bool:
        """Whether that key has uploaded this content itself: knowing a digest is not having the content."""
        ...

    async def shown(self, digests: Sequence[str], by: str) -> set[str]:
        """Those of these digests whose content that key has uploaded itself."""
        ...

    async def models_with(self, digests: Sequence[str]) -> Mapping[str, frozenset[str]]:
        """Digest to the names of the models that have it in a version."""
        ...

    async def stored_bytes(self, by: str | None = None) -> int:
        """Sum of the sizes of blobs, of all or of those that one key has uploaded."""
        ...

    async def unreferenced_blobs(self, older_than: datetime) -> list[BlobRecord]:
        """Blobs that no version and no running deployment names, and nobody has wanted since."""
        ...

    async def forget_blobs(self, digests: Sequence[str], older_than: datetime) -> list[BlobRecord]:
        """Delete the records of those that are still so; returns them. Their files are removed after this."""
        ...
