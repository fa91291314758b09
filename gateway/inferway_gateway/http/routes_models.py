"""The routes of deployed models, below ``/api/v1``: models, versions, deployments and events.

What a key's patterns do not match does not exist for it, in the same words. For routes with ``{model}`` in their path
the route itself sees to that; lists are filtered here, and a deployment of a foreign model is not found.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from inferway_contract import models as contract
from inferway_contract.names import (
    DEPLOY_BODY_LIMIT_BYTES,
    DEPLOYMENT_WAIT_MAX_S,
    LIST_DEFAULT_LIMIT,
    LIST_MAX_LIMIT,
)

from ..core.catalog import (
    AliasRecord,
    DeploymentRecord,
    Event,
    FileRef,
    Isolation,
    Snapshot,
    Step,
    VersionRecord,
    VersionSpec,
)
from ..core.deployments import Deployer, Follower
from ..core.errors import (
    BlobNotFoundError,
    ConflictError,
    DeploymentNotFoundError,
    InvalidParameterError,
    ModelNotFoundError,
    ModelRejectedError,
    PermissionDeniedError,
    StoreUnavailableError,
)
from ..core.keys import Principal
from ..core.managed import ManagedVersions
from ..core.registry import Registry
from ..settings import Settings
from ..store.blobs import BlobStore
from ..store.catalog import NO_DEPLOYMENT, SqlCatalog
from ..store.elsewhere import MAX_PIPELINE_BYTES, PIPELINE_FILE, parse_pipeline
from ..store.repository import NAME_PATTERN
from ..store.triton_config import ConfigError
from ..store.version_config import check_options, kind_of
from ..store.versions import check_files
from . import key_bodies
from .routes_aliases import alias_body, caller
from .routes_keys import json_object
from .routes_oip import parse_version

_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_SECONDS: Final = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,9})?")
_MAX_NESTING: Final = 32
_MAX_MEMBERS_BYTES: Final = 64 * 1024


# ---------------------------------------------------------------------------------------------------- models, versions


async def list_models(request: Request) -> Response:
    """Every model that the key sees, the folder's and those that were deployed."""
    snapshot = await _snapshot(request)
    names = {record.model for record in snapshot.versions} | set(_registry(request).names())
    principal = _principal(request)
    found = [_model(request, name, snapshot) for name in sorted(names) if principal.sees(name)]
    return _json(contract.CatalogModelList(models=found))


async def get_model(request: Request) -> Response:
    return _json(_model(request, request.path_params["model"], await _snapshot(request)))


async def delete_model(request: Request) -> Response:
    """Delete every version and alias of a model."""
    name = request.path_params["model"]
    _check_own(request, name)
    await _catalog(request).delete_model(name, by=caller(request))
    await _follow(request)
    return Response(status_code=204)


async def get_version(request: Request) -> Response:
    name, version = _version_of(request)
    registry = _registry(request)
    if registry.in_folder(name):
        return _json(_folder_version(registry, name, version))
    return _json(_version(request, await _catalog(request).version(name, version)))


async def change_version(request: Request) -> Response:
    """Change what is beside a version's content."""
    name, version = _version_of(request)
    _check_own(request, name)
    body = key_bodies.read(contract.VersionChange, await json_object(request, DEPLOY_BODY_LIMIT_BYTES))
    _check_size("metadata", body.metadata or {})
    record = await _catalog(request).change_version(
        name, version, by=caller(request), labels=body.labels, metadata=body.metadata, pinned=body.pinned
    )
    await _follow(request)
    return _json(_version(request, record))


async def delete_version(request: Request) -> Response:
    name, version = _version_of(request)
    _check_own(request, name)
    await _catalog(request).delete_version(name, version, by=caller(request))
    await _follow(request)
    return Response(status_code=204)


# ---------------------------------------------------------------------------------------------------- deployments


async def create_version(request: Request) -> Response:
    """Begin a deployment; it goes on after the answer."""
    name = request.path_params["model"]
    body = key_bodies.read(contract.VersionCreate, await json_object(request, DEPLOY_BODY_LIMIT_BYTES))
    if NAME_PATTERN.fullmatch(name) is None:
        raise InvalidParameterError(
            "expected a model name in the path, 1 to 128 ASCII letters, digits and ._- with a letter or digit first, "
            f"got {name[:80]!a}"
        )
    registry = _registry(request)
    if registry.in_folder(name):
        raise ConflictError(
            f"expected a name that the model repository does not have, '{name}' lies there; deploy under another name"
        )
    files = tuple(FileRef(file.path, file.digest, file.size) for file in body.files)
    check_files(files)
    _check_size("config", body.config)
    _check_size("metadata", body.metadata)
    check_options(body.config)
    spec = VersionSpec(
        model=name,
        kind=kind_of([file.path for file in files]),
        files=tuple(sorted(files, key=lambda file: file.path)),
        version=body.version,
        config=body.config,
        isolation=body.isolation,
        labels=body.labels,
        metadata=body.metadata,
        alias=body.alias,
        pinned=body.pinned,
    )
    isolation = _isolation(_settings(request), body.isolation)
    await _check_blobs(request, files)
    if spec.kind == "pipeline":
        await _check_steps(request, files)
    record = await _deployer(request).submit(spec, isolation=isolation, by=caller(request))
    answer = _json(_deployment(record), 202)
    answer.headers["location"] = f"/api/v1/deployments/{record.id}"
    return answer


def _blobs(request: Request) -> BlobStore:
    blobs: BlobStore = request.scope["state"]["blobs"]
    return blobs


def _isolation(settings: Settings, wanted: Isolation | None) -> Isolation:
    isolation = wanted or settings.isolation
    if wanted == "inprocess" and not settings.allow_inprocess:
        raise PermissionDeniedError(
            "expected isolation 'worker': this gateway runs no deployed model in its own process, unless its operator "
            "sets allow_inprocess"
        )
    return isolation


async def _check_blobs(request: Request, files: Iterable[FileRef]) -> None:
    """See that the key may use the contents: it has uploaded them, or a version of a model that it sees has them.

    Raises:
        BlobNotFoundError: in the same words for one that is not stored.
    """
    catalog = _catalog(request)
    principal = _principal(request)
    files = list(files)
    digests = sorted({file.digest for file in files})
    await catalog.want_blobs(digests)
    stored = {blob.digest: blob for blob in await catalog.blobs(digests)}
    usable = await catalog.shown(digests, caller(request))
    rest = [digest for digest in digests if digest not in usable]
    if rest:
        holders = await catalog.models_with(rest)
        usable |= {digest for digest in rest if any(map(principal.sees, holders.get(digest, ())))}
    for file in files:
        if file.digest not in stored or file.digest not in usable:
            raise BlobNotFoundError(
                f"expected the content of '{file.path}' to be uploaded before: there is no blob {file.digest} that "
                f"this key may use; send it with PUT /api/v1/blobs/{file.digest}"
            )


async def _check_steps(request: Request, files: Iterable[FileRef]) -> None:
    """See that the key may use the models of a pipeline's steps: what answers a pipeline is not asked again.

    Raises:
        ModelRejectedError: the pipeline cannot be read, or has a step of a model that the key does not see, in the same
            words as for one that does not exist.
    """
    (digest,) = [file.digest for file in files if file.path == PIPELINE_FILE]
    path = await _blobs(request).open_local(digest)
    try:
        with await asyncio.to_thread(path.open, "rb") as stream:
            text = (await asyncio.to_thread(stream.read, MAX_PIPELINE_BYTES + 1)).decode()
        pipeline = await asyncio.to_thread(parse_pipeline, text)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ModelRejectedError(f"{PIPELINE_FILE}: {error}") from None
    for step in pipeline.steps:
        if not _principal(request).sees(step.target.model):
            raise ModelRejectedError(f"step '{step.name}' needs {step.target}: there is none such")


async def list_deployments(request: Request) -> Response:
    limit = _limit(request)
    model = request.query_params.get("model")
    principal = _principal(request)
    if model is not None and not principal.sees(model):
        return _json(contract.DeploymentList(deployments=[]))
    found = await _catalog(request).deployments(model, limit, sees=principal.sees)
    return _json(contract.DeploymentList(deployments=[_deployment(record) for record in found]))


async def get_deployment(request: Request) -> Response:
    """A deployment; with ``wait`` as soon as there is news of it."""
    deployment_id = request.path_params["deployment_id"]
    record = await _found_deployment(request)
    wait_s = _wait_s(request.query_params.get("wait", "0"))
    step = _step(request.query_params.get("step"))
    if wait_s and record.state == "running" and record.step == step:
        record = await _deployer(request).wait(deployment_id, step, wait_s)
    return _json(_deployment(record))


def _wait_s(text: str) -> float:
    if not _SECONDS.fullmatch(text) or float(text) > DEPLOYMENT_WAIT_MAX_S:
        raise InvalidParameterError(
            f"expected 'wait' to be a number of seconds from 0 to {DEPLOYMENT_WAIT_MAX_S}, got '{text[:40]}'"
        )
    return float(text)


def _step(given: str | None) -> Step | None:
    """The step that the caller has seen; None where it has seen none."""
    if given is None:
        return None
    try:
        return Step(given)
    except ValueError:
        steps = ", ".join(Step)
        raise InvalidParameterError(f"expected 'step' to be one of {steps}, got '{given[:40]}'") from None


async def cancel_deployment(request: Request) -> Response:
    """Ask for the end of a deployment. One that has ended stays as it is."""
    record = await _found_deployment(request)
    return _json(_deployment(await _deployer(request).cancel(record.id, by=caller(request))))


async def _found_deployment(request: Request) -> DeploymentRecord:
    record = await _deployer(request).get(request.path_params["deployment_id"])
    if not _principal(request).sees(record.spec.model):
        raise DeploymentNotFoundError(NO_DEPLOYMENT)
    return record


# ---------------------------------------------------------------------------------------------------- events


async def model_events(request: Request) -> Response:
    """What happened to one model, also after it was deleted."""
    name = request.path_params["model"]
    answer = await _events(request, name)
    if not answer.events and not _registry(request).in_folder(name):
        snapshot = await _catalog(request).snapshot()
        if not any(record.model == name for record in snapshot.versions) and not await _catalog(request).events(
            name, limit=1
        ):
            raise _no_model(name)
    return _json(answer)


async def all_events(request: Request) -> Response:
    model = request.query_params.get("model")
    if model is not None and not _principal(request).sees(model):
        return _json(contract.EventList(events=[], has_more=False))
    return _json(await _events(request, model))


async def _events(request: Request, model: str | None) -> contract.EventList:
    limit = _limit(request)
    text = request.query_params.get("before")
    if text is not None and (not _NUMBER.fullmatch(text) or int(text) < 1):
        raise InvalidParameterError(f"expected 'before' to be the id of an event, got '{text[:40]}'")
    before = None if text is None else int(text)
    sees = _principal(request).sees
    found = await _catalog(request).events(model, before=before, limit=limit + 1, sees=sees)
    return contract.EventList(events=[_event(event) for event in found[:limit]], has_more=len(found) > limit)


# ---------------------------------------------------------------------------------------------------- bodies


def _model(request: Request, name: str, snapshot: Snapshot) -> contract.CatalogModel:
    registry = _registry(request)
    aliases = [record for record in snapshot.aliases if record.model == name]
    if registry.in_folder(name):
        return contract.CatalogModel(
            name=name,
            source="repository",
            versions=[_folder_version(registry, name, version) for version in registry.known_versions(name)],
            aliases=_aliases(request, aliases),
        )
    records = [record for record in snapshot.versions if record.model == name]
    if not records:
        raise _no_model(name)
    return contract.CatalogModel(
        name=name,
        source="catalog",
        versions=[_version(request, record) for record in records],
        aliases=_aliases(request, aliases),
    )


def _aliases(request: Request, records: Iterable[AliasRecord]) -> list[contract.Alias]:
    return [alias_body(request.scope["state"], record) for record in records]


def _version(request: Request, record: VersionRecord) -> contract.ModelVersion:
    managed: ManagedVersions = request.scope["state"]["managed"]
    state, reason = managed.status(record.model, record.version)
    footprint = record.footprint or managed.footprint(record.model, record.version)
    return contract.ModelVersion(
        model=record.model,
        version=record.version,
        kind=record.kind,
        digest=record.digest,
        files=[contract.VersionFile(path=f.path, digest=f.digest, size=f.size) for f in record.files],
        config=dict(record.config),
        isolation=record.isolation,
        labels=dict(record.labels),
        metadata=dict(record.metadata),
        pinned=record.pinned,
        footprint=None
        if footprint is None
        else contract.Footprint(resident_bytes=footprint.resident_bytes, peak_bytes=footprint.peak_bytes),
        state=state,
        reason=reason,
        created_at=record.created_at,
        created_by=record.created_by,
    )


def _folder_version(registry: Registry, name: str, version: int) -> contract.ModelVersion:
    """A version of the operator's folder, of whose content and history the gateway keeps nothing."""
    known, reason = registry.state(name, version)
    state: str = known
    if known in ("UNAVAILABLE", "UNKNOWN"):
        # The protocol has one word for what failed and for what was never asked for.
        state = "FAILED" if reason.startswith("failed") else "UNLOADED"
    return contract.ModelVersion(
        model=name,
        version=version,
        kind="onnx",
        digest=None,
        files=[],
        config={},
        isolation="inprocess",
        labels={},
        metadata={},
        pinned=True,
        footprint=None,
        state=state,
        reason=reason,
        created_at=None,
        created_by=None,
    )


def _deployment(record: DeploymentRecord) -> contract.Deployment:
    error = None
    if record.error_code is not None:
        error = contract.DeploymentFailure(code=record.error_code, message=record.error_message or "")
    return contract.Deployment(
        id=record.id,
        model=record.spec.model,
        version=record.version,
        digest=record.digest,
        state=record.state,
        step=record.step,
        failed_step=record.failed_step,
        error=error,
        reused=record.reused,
        alias=record.spec.alias,
        created_at=record.created_at,
        created_by=record.created_by,
        updated_at=record.updated_at,
    )


def _event(event: Event) -> contract.Event:
    return contract.Event(
        id=event.id,
        at=event.at,
        kind=event.kind,
        model=event.model,
        version=event.version,
        alias=event.alias,
        by=event.by,
        detail=dict(event.detail),
    )


# ---------------------------------------------------------------------------------------------------- what is asked


def _check_size(name: str, members: Mapping[str, Any]) -> None:
    """Bound what is kept of a version beside its files: every gateway has that of every version in its memory."""
    level: list[Any] = [members]
    for _ in range(_MAX_NESTING):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise InvalidParameterError(f"expected '{name}' to be nested at most {_MAX_NESTING} deep")
    size = len(json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
    if size > _MAX_MEMBERS_BYTES:
        raise InvalidParameterError(
            f"expected '{name}' to take at most {_MAX_MEMBERS_BYTES} bytes of JSON, got {size}; larger things can be "
            "files of the version"
        )


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(LIST_DEFAULT_LIMIT))
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= LIST_MAX_LIMIT:
        raise InvalidParameterError(f"expected 'limit' to be a whole number from 1 to {LIST_MAX_LIMIT}")
    return int(text)


def _version_of(request: Request) -> tuple[str, int]:
    name = request.path_params["model"]
    version = parse_version(request.path_params["version"])
    assert version is not None  # the path has one
    return name, version


def _check_own(request: Request, name: str) -> None:
    """Refuse to change what is the operator's."""
    if _registry(request).in_folder(name):
        raise ConflictError(f"'{name}' lies in the model repository, where only its operator changes it")


async def _follow(request: Request) -> None:
    """Bring this gateway in line with what was just written; the others follow by themselves."""
    follower: Follower = request.scope["state"]["follower"]
    try:
        await follower.follow()
    except StoreUnavailableError:
        return  # what was written lasts, and is seen when the database answers again


async def _snapshot(request: Request) -> Snapshot:
    return await _catalog(request).snapshot()


def _no_model(name: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"Request for unknown model: '{name}' is not found")


def _catalog(request: Request) -> SqlCatalog:
    catalog: SqlCatalog = request.scope["state"]["catalog"]
    return catalog


def _registry(request: Request) -> Registry:
    registry: Registry = request.scope["state"]["registry"]
    return registry


def _deployer(request: Request) -> Deployer:
    deployer: Deployer = request.scope["state"]["deployer"]
    return deployer


def _settings(request: Request) -> Settings:
    settings: Settings = request.scope["state"]["settings"]
    return settings


def _principal(request: Request) -> Principal:
    principal: Principal = request.scope["principal"]
    return principal


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")
