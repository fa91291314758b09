"""Calls of the control routes: what is sent and how the answer is read. Pure, shared by both clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from urllib.parse import urlencode

from inferway_contract import names

from ._core import Call, Reply, json_call, load_json, model_path, path_of
from ._errors import ConfigurationError
from ._signature import ModelMetadata, read_metadata

if TYPE_CHECKING:
    from inferway_contract.models import Alias, CatalogModel, Deployment, EventList, ModelVersion

Weights: TypeAlias = "int | Mapping[int, float]"
"""A version that gets all requests, or versions with their percents, which sum to 100."""


def plain(what: str, members: Mapping[str, Any] | None) -> dict[str, Any]:
    """A mapping as JSON has it; the numbers and arrays of numpy, such as a score that was measured, as numbers.

    Raises:
        ConfigurationError: it holds something else. Said here, it is said before a model is sent.
    """
    try:
        text = json.dumps(dict(members or {}), default=_plain_value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{what} can hold what JSON has, and numpy's numbers: {error}") from error
    return cast(dict[str, Any], json.loads(text))


def _plain_value(value: object) -> object:
    listed: Callable[[], object] | None = getattr(value, "tolist", None)
    if listed is None:
        raise TypeError(f"{value!r:.100} is of type {type(value).__name__}")
    return listed()


def reader(name: str, member: str | None = None, *, many: bool = False) -> Callable[[Reply], Any]:
    """A function that reads an answer as the contract's model of that name, or a member of it."""

    def read(reply: Reply) -> Any:
        # Imported when first needed: pydantic takes longer to import than the rest of the SDK.
        from ._answers import read_as

        found = read_as(name, load_json(reply.body), many=many)
        return found if member is None else getattr(found, member)

    return read


def nothing(_: Reply) -> None:
    """Reads an answer that says nothing."""
    return


def metadata_call(model: str, version: str | int | None) -> Call[ModelMetadata]:
    """The call that learns a model's signature."""
    return json_call("GET", model_path(model, version), lambda reply: read_metadata(load_json(reply.body)))


# --- paths -------------------------------------------------------------------------------------------------------


def blob_path(digest: str) -> str:
    return path_of("api", "v1", "blobs", digest)


def checked_name(model: object) -> str:
    """A model's bare name. Raises ConfigurationError."""
    if not isinstance(model, str) or not names.MODEL_NAME_PATTERN.fullmatch(model):
        hint = ""
        if isinstance(model, str) and "@" in model:
            hint = "; an alias has no place here, give the model's name alone"
        raise ConfigurationError(
            f"expected a model's name, 1 to 128 letters, digits and ._- with a letter or digit first, got "
            f"{model!r:.80}{hint}"
        )
    return model


def checked_alias(alias: object) -> str:
    """An alias. Raises ConfigurationError."""
    if not isinstance(alias, str) or not names.ALIAS_PATTERN.fullmatch(alias):
        raise ConfigurationError(f"expected an alias, 1 to 63 of a-z, 0-9 and - with a letter first, got {alias!r:.80}")
    return alias


def checked_version(version: object) -> int:
    """A version's number. Raises ConfigurationError."""
    number = int(version) if isinstance(version, str) and names.VERSION_PATTERN.fullmatch(version) else version
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= names.MAX_VERSION:
        raise ConfigurationError(f"expected a version, a whole number from 1, got {version!r:.80}")
    return number


def models_path(model: object, *rest: str) -> str:
    return path_of("api", "v1", "models", checked_name(model), *rest)


def version_path(model: object, version: object) -> str:
    return models_path(model, "versions", str(checked_version(version)))


def alias_path(model: object, alias: object, *operation: str) -> str:
    return models_path(model, "aliases", checked_alias(alias), *operation)


def deployment_path(deployment_id: object, *operation: str) -> str:
    if not isinstance(deployment_id, str) or not names.DEPLOYMENT_ID_PATTERN.fullmatch(deployment_id):
        raise ConfigurationError(f"expected a deployment's id as text, got {deployment_id!r:.80}")
    return path_of("api", "v1", "deployments", deployment_id, *operation)


def _with(path: str, **query: object) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


# --- models and versions -----------------------------------------------------------------------------------------


def describe_call(model: str) -> Call[CatalogModel]:
    return json_call("GET", models_path(model), reader("CatalogModel"))


def versions_call(model: str) -> Call[list[ModelVersion]]:
    read = reader("CatalogModel", "versions")
    return json_call("GET", models_path(model), lambda reply: sorted(read(reply), key=lambda found: found.version))


def catalog_call() -> Call[list[CatalogModel]]:
    return json_call("GET", path_of("api", "v1", "models"), reader("CatalogModelList", "models"))


def version_call(model: str, version: int) -> Call[ModelVersion]:
    return json_call("GET", version_path(model, version), reader("ModelVersion"))


def update_call(
    model: str,
    version: int,
    labels: Mapping[str, str] | None,
    metadata: Mapping[str, Any] | None,
    pinned: bool | None,
) -> Call[ModelVersion]:
    body: dict[str, Any] = {}
    if labels is not None:
        body["labels"] = plain("labels", labels)
    if metadata is not None:
        body["metadata"] = plain("metadata", metadata)
    if pinned is not None:
        body["pinned"] = pinned
    if not body:
        raise ConfigurationError("expected something to change: labels, metadata or pinned")
    return json_call("PATCH", version_path(model, version), reader("ModelVersion"), body)


def delete_call(model: str, version: int | None) -> Call[None]:
    path = models_path(model) if version is None else version_path(model, version)
    return json_call("DELETE", path, nothing)


# --- deployments -------------------------------------------------------------------------------------------------


def create_call(model: str, body: Mapping[str, Any]) -> Call[Deployment]:
    """Not repeatable: the second could find the first under way, which is a conflict."""
    return json_call("POST", models_path(model, "versions"), reader("Deployment"), body, repeatable=False)


def deployment_call(deployment_id: str, wait_s: int | None = None, step: str | None = None) -> Call[Deployment]:
    return json_call("GET", _with(deployment_path(deployment_id), wait=wait_s, step=step), reader("Deployment"))


def deployments_call(model: str | None, limit: int | None) -> Call[list[Deployment]]:
    path = path_of("api", "v1", "deployments")
    given = None if model is None else checked_name(model)
    return json_call("GET", _with(path, model=given, limit=limit), reader("DeploymentList", "deployments"))


def cancel_call(deployment_id: str) -> Call[Deployment]:
    return json_call("POST", deployment_path(deployment_id, "cancel"), reader("Deployment"))


# --- aliases -----------------------------------------------------------------------------------------------------


def aliases_call(model: str) -> Call[list[Alias]]:
    return json_call("GET", models_path(model, "aliases"), reader("AliasList", "aliases"))


def alias_call(model: str, alias: str) -> Call[Alias]:
    return json_call("GET", alias_path(model, alias), reader("Alias"))


def set_alias_call(
    model: str,
    alias: str,
    target: Weights,
    sticky: str,
    shadow: int | Mapping[str, Any] | None,
    fallback: Any,
    guard: Mapping[str, Any] | bool | None,
    expected_revision: int | None,
) -> Call[Alias]:
    body: dict[str, Any] = {"sticky": sticky}
    if isinstance(target, Mapping):
        body["weights"] = {str(checked_version(version)): share for version, share in target.items()}
        total = sum(body["weights"].values())
        if abs(total - 100) > 1e-6:
            raise ConfigurationError(f"the weights of an alias are percents and sum to 100, got {total:g}")
    else:
        body["version"] = checked_version(target)
    if shadow is not None:
        body["shadow"] = dict(shadow) if isinstance(shadow, Mapping) else {"version": checked_version(shadow)}
    if isinstance(fallback, int):
        fallback = [fallback]
    body["fallback"] = [checked_version(version) for version in fallback]
    if guard is not None and guard is not False:
        body["guard"] = dict(guard) if isinstance(guard, Mapping) else {}
    if expected_revision is not None:
        body["expected_revision"] = expected_revision
    # Setting it twice is setting it once, unless the revision must be the one before.
    return json_call("PUT", alias_path(model, alias), reader("Alias"), body, repeatable=expected_revision is None)


def delete_alias_call(model: str, alias: str) -> Call[None]:
    return json_call("DELETE", alias_path(model, alias), nothing)


def rollback_call(model: str, alias: str) -> Call[Alias]:
    """Not repeatable: a roll back of a roll back is where one was before."""
    return json_call("POST", alias_path(model, alias, "rollback"), reader("Alias"), repeatable=False)


# --- events ------------------------------------------------------------------------------------------------------


def events_call(model: str | None, before: int | None, limit: int | None) -> Call[EventList]:
    path = path_of("api", "v1", "events") if model is None else models_path(model, "events")
    return json_call("GET", _with(path, before=before, limit=limit), reader("EventList"))
