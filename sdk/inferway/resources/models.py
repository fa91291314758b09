"""``client.models``: which models there are, what they take, how they do, and loading and unloading them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias, Unpack, cast

from .._core import Call, Reply, json_call, load_json, model_path, path_of
from .._engine import AsyncEngine, SyncEngine
from .._errors import ConfigurationError, MalformedAnswer
from .._options import RequestOptions
from .._signature import ModelMetadata, read_metadata

if TYPE_CHECKING:
    from inferway_contract.models import ModelConfig, ModelStat, RepositoryIndexEntry

Names: TypeAlias = list[str]
ModelStats: TypeAlias = "list[ModelStat]"
Index: TypeAlias = "list[RepositoryIndexEntry]"

_NOT_READY: Final = frozenset({503})


def reader(name: str, member: str | None = None, *, many: bool = False) -> Callable[[Reply], Any]:
    """A function that reads an answer as the contract's model of that name, or a member of it."""

    def read(reply: Reply) -> Any:
        # Imported when first needed: pydantic takes longer to import than the rest of the SDK.
        from .._answers import read_as

        found = read_as(name, load_json(reply.body), many=many)
        return found if member is None else getattr(found, member)

    return read


def _read_names(reply: Reply) -> Names:
    members = load_json(reply.body)
    listed = cast(dict[str, object], members).get("models") if isinstance(members, dict) else None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in cast(list[object], listed)):
        raise MalformedAnswer("expected {'models': [names]}")
    return cast(list[str], listed)


def _nothing(_: Reply) -> None:
    return None


def _ready(reply: Reply) -> bool:
    return reply.status_code == 200


def metadata_call(model: str, version: str | int | None) -> Call[ModelMetadata]:
    """The call that learns a model's signature."""
    return json_call("GET", model_path(model, version), lambda reply: read_metadata(load_json(reply.body)))


def _list() -> Call[Names]:
    return json_call("GET", path_of("v2", "models"), _read_names)


def _config(model: str, version: str | int | None) -> Call[ModelConfig]:
    return json_call("GET", model_path(model, version, "config"), reader("ModelConfig"))


def _stats(model: str | None, version: str | int | None) -> Call[ModelStats]:
    if model is None:
        if version is not None:
            raise ConfigurationError("stats of a version expects the model's name too")
        return json_call("GET", path_of("v2", "models", "stats"), reader("ModelStats", "model_stats"))
    return json_call("GET", model_path(model, version, "stats"), reader("ModelStats", "model_stats"))


def _is_ready(model: str, version: str | int | None) -> Call[bool]:
    return json_call("GET", model_path(model, version, "ready"), _ready, statuses=_NOT_READY)


def _index(ready: bool) -> Call[Index]:
    return json_call("POST", path_of("v2", "repository", "index"), reader("RepositoryIndexEntry", many=True),
                     {"ready": ready})  # fmt: skip


def _load(model: str, config: Mapping[str, Any] | None, files: Mapping[str, bytes] | None) -> Call[None]:
    if files and config is None:
        raise ConfigurationError("load with files expects a config too")
    parameters: dict[str, str] = {}
    if config is not None:
        parameters["config"] = json.dumps(config)
    for name, content in (files or {}).items():
        parameters[f"file:{name}"] = base64.b64encode(content).decode("ascii")
    body = {"parameters": parameters} if parameters else None
    return json_call("POST", _repository_path(model, "load"), _nothing, body)


def _unload(model: str) -> Call[None]:
    return json_call("POST", _repository_path(model, "unload"), _nothing)


def _repository_path(model: str, operation: str) -> str:
    model_path(model, None)
    return path_of("v2", "repository", "models", model, operation)


class Models:
    """The models of a gateway. Every method also takes `RequestOptions` and may raise `APIError`."""

    def __init__(self, engine: SyncEngine) -> None:
        self._engine = engine

    def list(self, **options: Unpack[RequestOptions]) -> Names:
        """Names of the models that are served and that this key may see, in alphabetical order."""
        return self._engine.send(_list(), options)

    def get(self, model: str, version: str | int | None = None, **options: Unpack[RequestOptions]) -> ModelMetadata:
        """A model's signature: inputs, outputs, versions.

        Args:
            model: its name.
            version: one version; None for the one that answers requests without a version.
        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return self._engine.send(metadata_call(model, version), options)

    def config(self, model: str, version: str | int | None = None, **options: Unpack[RequestOptions]) -> ModelConfig:
        """Triton's ModelConfig of a model, with what was measured when it was loaded. Needs the scope ``read``.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return self._engine.send(_config(model, version), options)

    def stats(
        self, model: str | None = None, version: str | int | None = None, **options: Unpack[RequestOptions]
    ) -> ModelStats:
        """Counters of one model's versions, or of all models. Times are nanoseconds. Needs the scope ``read``.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return self._engine.send(_stats(model, version), options)

    def ready(self, model: str, version: str | int | None = None, **options: Unpack[RequestOptions]) -> bool:
        """Whether a model answers now.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return self._engine.send(_is_ready(model, version), options)

    def index(self, *, ready: bool = False, **options: Unpack[RequestOptions]) -> Index:
        """Every version in the repository with its state and, where it failed, the reason. Needs the scope ``read``.

        Args:
            ready: only versions that answer now.
        """
        return self._engine.send(_index(ready), options)

    def load(
        self,
        model: str,
        *,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        **options: Unpack[RequestOptions],
    ) -> None:
        """Load or reload a model; returns when it answers. Needs the scope ``deploy``.

        Args:
            model: its name in the repository.
            config: a ModelConfig to use instead of the one in the repository.
            files: content by path, such as ``1/model.onnx``, to use instead of the files in the repository.
        Raises:
            ModelLoadError: it cannot be loaded; what was loaded before goes on serving.
            ConfigurationError: files without a config.
        """
        return self._engine.send(_load(model, config, files), options)

    def unload(self, model: str, **options: Unpack[RequestOptions]) -> None:
        """Stop serving a model once its running requests are answered. Needs the scope ``deploy``."""
        return self._engine.send(_unload(model), options)


class AsyncModels:
    """The models of a gateway. Every method also takes `RequestOptions` and may raise `APIError`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def list(self, **options: Unpack[RequestOptions]) -> Names:
        """Names of the models that are served and that this key may see, in alphabetical order."""
        return await self._engine.send(_list(), options)

    async def get(
        self, model: str, version: str | int | None = None, **options: Unpack[RequestOptions]
    ) -> ModelMetadata:
        """A model's signature: inputs, outputs, versions.

        Args:
            model: its name.
            version: one version; None for the one that answers requests without a version.
        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return await self._engine.send(metadata_call(model, version), options)

    async def config(
        self, model: str, version: str | int | None = None, **options: Unpack[RequestOptions]
    ) -> ModelConfig:
        """Triton's ModelConfig of a model, with what was measured when it was loaded. Needs the scope ``read``.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return await self._engine.send(_config(model, version), options)

    async def stats(
        self, model: str | None = None, version: str | int | None = None, **options: Unpack[RequestOptions]
    ) -> ModelStats:
        """Counters of one model's versions, or of all models. Times are nanoseconds. Needs the scope ``read``.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return await self._engine.send(_stats(model, version), options)

    async def ready(self, model: str, version: str | int | None = None, **options: Unpack[RequestOptions]) -> bool:
        """Whether a model answers now.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return await self._engine.send(_is_ready(model, version), options)

    async def index(self, *, ready: bool = False, **options: Unpack[RequestOptions]) -> Index:
        """Every version in the repository with its state and, where it failed, the reason. Needs the scope ``read``.

        Args:
            ready: only versions that answer now.
        """
        return await self._engine.send(_index(ready), options)

    async def load(
        self,
        model: str,
        *,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        **options: Unpack[RequestOptions],
    ) -> None:
        """Load or reload a model; returns when it answers. Needs the scope ``deploy``.

        Args:
            model: its name in the repository.
            config: a ModelConfig to use instead of the one in the repository.
            files: content by path, such as ``1/model.onnx``, to use instead of the files in the repository.
        Raises:
            ModelLoadError: it cannot be loaded; what was loaded before goes on serving.
            ConfigurationError: files without a config.
        """
        return await self._engine.send(_load(model, config, files), options)

    async def unload(self, model: str, **options: Unpack[RequestOptions]) -> None:
        """Stop serving a model once its running requests are answered. Needs the scope ``deploy``."""
        return await self._engine.send(_unload(model), options)
