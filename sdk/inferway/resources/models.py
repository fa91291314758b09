"""``client.models``: which models there are, what they take, how they do, and their life from deploying to deleting."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, Unpack, cast

from .._calls import (
    Weights,
    alias_call,
    aliases_call,
    catalog_call,
    delete_alias_call,
    delete_call,
    deployment_call,
    deployments_call,
    describe_call,
    events_call,
    metadata_call,
    nothing,
    reader,
    rollback_call,
    set_alias_call,
    update_call,
    version_call,
    versions_call,
)
from .._core import Call, Reply, json_call, load_json, model_path, path_of
from .._engine import AsyncEngine, SyncEngine
from .._errors import APIResponseValidationError, ConfigurationError, MalformedAnswer
from .._golden import Golden
from .._options import RequestOptions
from .._package import ModelSource
from .._progress import Progress
from .._signature import ModelMetadata
from ..explain.explanation import Explanation
from ..explain.remote import MASK, Question, Task, explain_async, explain_sync
from .deployments import AsyncDeployment, Deployment, Job, deploy, deploy_async

if TYPE_CHECKING:
    from inferway_contract.models import (
        Alias,
        CatalogModel,
        Event,
        EventList,
        ModelConfig,
        ModelStat,
        ModelVersion,
        RepositoryIndexEntry,
    )
    from inferway_contract.names import Isolation

Names: TypeAlias = list[str]
ModelStats: TypeAlias = "list[ModelStat]"
Index: TypeAlias = "list[RepositoryIndexEntry]"
Catalog: TypeAlias = "list[CatalogModel]"
Versions: TypeAlias = "list[ModelVersion]"
Aliases: TypeAlias = "list[Alias]"
Deployments: TypeAlias = list[Deployment]
AsyncDeployments: TypeAlias = list[AsyncDeployment]

_NOT_READY: Final = frozenset({503})


def _read_names(reply: Reply) -> Names:
    members = load_json(reply.body)
    listed = cast(dict[str, object], members).get("models") if isinstance(members, dict) else None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in cast(list[object], listed)):
        raise MalformedAnswer("expected {'models': [names]}")
    return cast(list[str], listed)


def _ready(reply: Reply) -> bool:
    return reply.status_code == 200


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
    return json_call("POST", _repository_path(model, "load"), nothing, body)


def _unload(model: str) -> Call[None]:
    return json_call("POST", _repository_path(model, "unload"), nothing)


def _repository_path(model: str, operation: str) -> str:
    model_path(model, None)
    return path_of("v2", "repository", "models", model, operation)


def _older(page: EventList, before: int | None) -> int | None:
    """Where the page after this one begins; None after the last. A gateway that turns in circles is not followed."""
    if not page.has_more or not page.events:
        return None
    last = page.events[-1].id
    if before is not None and last >= before:
        raise APIResponseValidationError("the list of events does not end: a page begins where the one before it did")
    return last


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

    def deploy(
        self,
        model: ModelSource,
        *,
        name: str,
        version: int | None = None,
        alias: str | None = "stable",
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        batching: bool | Mapping[str, Any] | None = None,
        instances: int | None = None,
        isolation: Isolation | None = None,
        config: Mapping[str, Any] | None = None,
        pinned: bool = False,
        golden: Golden | None = None,
        wait: bool = True,
        progress: Progress = None,
        **options: Unpack[RequestOptions],
    ) -> Deployment:
        """Put a model up: send it, have it checked, loaded and warmed, and point an alias at it. Needs the scope
        ``deploy``.

        Files are sent by their digest: one that the gateway has is not sent again, and one whose sending was cut goes
        on where it was, in this call or in a later one within a day. The same content under the same name is the same
        version. Until everything has succeeded, what served before serves.

        Args:
            model: a path of an ``.onnx`` file, which brings the files along that hold its weights; a folder, of which
                every file goes along but hidden ones; the bytes of a model; an ``onnx.ModelProto`` of any size.
            name: the model's name.
            version: its number; None for the next one.
            alias: points at the version once it is ready; None moves none, so that ``NAME/versions/N`` alone calls it.
            labels: short texts to find it by.
            metadata: anything that JSON has, kept with the version.
            batching: False never puts requests together, True does even where rows depend on each other; a mapping is
                the table ``[batching]`` of ``inferway.toml``.
            instances: copies of the model that run at once.
            isolation: ``worker``, a process of its own, or ``inprocess``, where the operator allows that; None for the
                gateway's choice.
            config: the members of ``inferway.toml``; they are put over those of a file of that name.
            pinned: never unloaded to make room for others.
            golden: pairs of inputs and the outputs that they must give, each as `infer` takes inputs, or the path of a
                ``golden.json``; the gateway runs them before the version may serve.
            wait: come back when the version is in service, with ``version_record``; else as soon as the gateway began.
            progress: a function that is told each `DeployEvent`, True for a bar, False for nothing; None shows a bar on
                a terminal and in a notebook.
            options: see `RequestOptions`; ``timeout`` covers everything, an hour unless given.
        Raises:
            ConfigurationError: the model or an argument cannot be used; nothing was sent.
            InvalidInputError: a golden example does not fit the model's signature; nothing was sent.
            DeploymentFailedError: with ``wait``; it says at which step and why.
            ConflictError: the version's number belongs to other content, or the name to the operator's repository.
            QuotaExceededError, InsufficientStorageError, PayloadTooLargeError: the gateway does not take the files.
            APITimeoutError: the time is over; a deployment that has begun goes on, and the error's note has its id.
            APIError: any other failure.
        """
        job = Job(self._engine, name, version, alias, labels, metadata, batching, instances, isolation, config, pinned,
                  golden, progress, options)  # fmt: skip
        return deploy(self._engine, job, model, wait)

    def explain(
        self,
        model: str,
        x: object,
        background: object = None,
        *,
        version: str | int | None = None,
        output: str | None = None,
        task: Task | None = None,
        reference: object = None,
        feature_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        segments: object = None,
        mask: str = MASK,
        permutations: int | None = None,
        chunk_rows: int = 256,
        concurrency: int = 8,
        seed: int = 0,
        progress: Callable[[int, int], object] | bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> Explanation:
        """What predictions of a model rest on: Shapley values, by asking the model many times.

        For ``f`` parts of an input and ``b`` rows of background, up to ``permutations * (2 f + 1) * b`` rows are asked
        for each row of ``x``, many requests at once, which the gateway puts together in batches. Where the version is
        left open, the one that answers first is asked to the end. Needs ``pip install 'inferway[explain]'``.

        Args:
            x: rows of numbers ``(rows, features)``; a data frame or a mapping of columns; images, ``(rows, …)`` of two
                or three axes more; or a text.
            background: typical rows that stand in for what is not known, such as 10 to 100 of the training data; 2 to
                10 are enough for wide inputs. For images a value or an image, the mean colour where it is left out.
            output: the output that is explained; may be left out where only one is floating point.
            task: of a text: ``classify`` explains the score of each label, ``embed`` the similarity to ``reference``.
                What the model is for, where it is left out.
            reference: a text or a vector; the text itself where it is left out: which words carry its meaning.
            feature_names: of the columns of an array.
            output_names: such as the classes.
            segments: for images, whole numbers of the image's height and width that say which places belong together;
                squares, about eight along each axis, where they are left out.
            mask: stands for a word that is taken away.
            permutations: orders in which parts become known, drawn at random; 10 where it is left out, fewer for more
                than 250 parts. More make `Explanation.standard_error` smaller.
            chunk_rows: rows of one request, at most; fewer where they would be larger than 4 MiB.
            concurrency: requests at once.
            seed: of the orders.
            progress: True shows a bar, None where somebody looks; or a function that is told the rows that were asked
                and those that there are at most.
            options: of each request.
        Raises:
            MissingExtraError: shap is not installed.
            InvalidInputError: ``x`` or ``background`` do not fit the model or each other.
            ConfigurationError: an argument cannot be used.
        """
        question = Question(
            model=model, x=x, background=background, version=version, output=output, task=task, reference=reference,
            feature_names=feature_names, output_names=output_names, segments=segments, mask=mask,
            permutations=permutations, chunk_rows=chunk_rows, concurrency=concurrency, seed=seed, progress=progress,
        )  # fmt: skip
        return explain_sync(question, self._engine, options)

    def deployment(self, deployment_id: str, **options: Unpack[RequestOptions]) -> Deployment:
        """A deployment by its id, to watch, await or cancel it.

        Raises:
            DeploymentNotFoundError: there is none that this key may see.
        """
        return Deployment(self._engine, self._engine.send(deployment_call(deployment_id), options))

    def deployments(
        self, model: str | None = None, *, limit: int | None = None, **options: Unpack[RequestOptions]
    ) -> Deployments:
        """Deployments, youngest first.

        Args:
            model: only those of this name.
            limit: at most so many; 100 when left out.
        """
        found = self._engine.send(deployments_call(model, limit), options)
        return [Deployment(self._engine, record) for record in found]

    def describe(self, model: str, **options: Unpack[RequestOptions]) -> CatalogModel:
        """Everything about a model: where it comes from, its versions with their states, its aliases.

        Raises:
            ModelNotFoundError: there is none that this key may see.
        """
        return self._engine.send(describe_call(model), options)

    def catalog(self, **options: Unpack[RequestOptions]) -> Catalog:
        """Every model as `describe` has it, also those of which no version answers now."""
        return self._engine.send(catalog_call(), options)

    def versions(self, model: str, **options: Unpack[RequestOptions]) -> Versions:
        """A model's versions, oldest first, with their states.

        Raises:
            ModelNotFoundError: there is none that this key may see.
        """
        return self._engine.send(versions_call(model), options)

    def version(self, model: str, version: int, **options: Unpack[RequestOptions]) -> ModelVersion:
        """One version: files, configuration, labels, memory, state.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return self._engine.send(version_call(model, version), options)

    def update(
        self,
        model: str,
        version: int,
        *,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        pinned: bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> ModelVersion:
        """Change what is beside a version's content; what is None stays. Needs the scope ``deploy``.

        Args:
            labels, metadata: in the place of all that it had.
            pinned: whether it is never unloaded to make room.
        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return self._engine.send(update_call(model, version, labels, metadata, pinned), options)

    def delete(self, model: str, version: int | None = None, **options: Unpack[RequestOptions]) -> None:
        """Delete a version, or a model with all its versions and aliases. Needs the scope ``deploy``.

        Args:
            version: None for the model.
        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
            ConflictError: an alias names the version, or a deployment of the model runs.
        """
        self._engine.send(delete_call(model, version), options)
        self._engine.signatures.forget(model)

    def aliases(self, model: str, **options: Unpack[RequestOptions]) -> Aliases:
        """A model's aliases, with where they point and what passed through them.

        Raises:
            ModelNotFoundError: there is none that this key may see.
        """
        return self._engine.send(aliases_call(model), options)

    def alias(self, model: str, alias: str, **options: Unpack[RequestOptions]) -> Alias:
        """One alias.

        Raises:
            ModelNotFoundError, AliasNotFoundError: there is none that this key may see.
        """
        return self._engine.send(alias_call(model, alias), options)

    def set_alias(
        self,
        model: str,
        alias: str,
        target: Weights,
        *,
        sticky: str = "none",
        shadow: int | Mapping[str, Any] | None = None,
        fallback: Sequence[int] | int = (),
        guard: Mapping[str, Any] | bool | None = None,
        expected_revision: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> Alias:
        """Point an alias, in the place of all that it was; it is made where there is none. Needs the scope ``deploy``.

        Args:
            target: a version, or versions with their percents of the requests: ``{3: 95, 4: 5}``.
            sticky: who keeps to one version: ``none``, ``key`` for each API key, ``header:X-User`` for each value of
                that header.
            shadow: a version that gets copies of requests, its answers compared and thrown away; or a mapping with
                ``version``, ``share`` (0 to 1), ``rtol`` and ``atol``.
            fallback: versions that answer, in this order, where the chosen one cannot.
            guard: True, or a mapping of ``window_s``, ``min_requests``, ``max_error_rate`` and ``max_p95_ratio``: a
                lesser target that does worse than that goes back to no requests by itself.
            expected_revision: refuse where somebody has changed it since.
        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
            ConflictError: it is not at ``expected_revision``.
            ConfigurationError: the percents do not sum to 100, or a value cannot be one.
        """
        call = set_alias_call(model, alias, target, sticky, shadow, fallback, guard, expected_revision)
        found = self._engine.send(call, options)
        self._engine.signatures.forget(model)
        return found

    def delete_alias(self, model: str, alias: str, **options: Unpack[RequestOptions]) -> None:
        """Take an alias away. Needs the scope ``deploy``.

        Raises:
            ModelNotFoundError, AliasNotFoundError: there is none that this key may see.
        """
        self._engine.send(delete_alias_call(model, alias), options)
        self._engine.signatures.forget(model)

    def rollback(self, model: str, alias: str = "stable", **options: Unpack[RequestOptions]) -> Alias:
        """Point an alias where it pointed before its last change. Needs the scope ``deploy``.

        Doing it twice is where it was at first. Not tried again when an attempt may have arrived, since that would undo
        it.

        Raises:
            ModelNotFoundError, AliasNotFoundError: there is none that this key may see.
            ConflictError: it has pointed nowhere else yet.
        """
        found = self._engine.send(rollback_call(model, alias), options)
        self._engine.signatures.forget(model)
        return found

    def events(
        self, model: str | None = None, *, page_size: int | None = None, **options: Unpack[RequestOptions]
    ) -> Iterator[Event]:
        """Who did what, when, youngest first; pages are fetched while the iteration goes on.

        Args:
            model: only those of this name; None for all that this key may see.
            page_size: events for each request, at most 1000; None for the gateway's choice.
        """
        before: int | None = None
        while True:
            page = self._engine.send(events_call(model, before, page_size), options)
            yield from page.events
            before = _older(page, before)
            if before is None:
                return


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

    async def deploy(
        self,
        model: ModelSource,
        *,
        name: str,
        version: int | None = None,
        alias: str | None = "stable",
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        batching: bool | Mapping[str, Any] | None = None,
        instances: int | None = None,
        isolation: Isolation | None = None,
        config: Mapping[str, Any] | None = None,
        pinned: bool = False,
        golden: Golden | None = None,
        wait: bool = True,
        progress: Progress = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncDeployment:
        """Put a model up: send it, have it checked, loaded and warmed, and point an alias at it. Needs the scope
        ``deploy``.

        Files are sent by their digest: one that the gateway has is not sent again, and one whose sending was cut goes
        on where it was, in this call or in a later one within a day. The same content under the same name is the same
        version. Until everything has succeeded, what served before serves.

        Args:
            model: a path of an ``.onnx`` file, which brings the files along that hold its weights; a folder, of which
                every file goes along but hidden ones; the bytes of a model; an ``onnx.ModelProto`` of any size.
            name: the model's name.
            version: its number; None for the next one.
            alias: points at the version once it is ready; None moves none, so that ``NAME/versions/N`` alone calls it.
            labels: short texts to find it by.
            metadata: anything that JSON has, kept with the version.
            batching: False never puts requests together, True does even where rows depend on each other; a mapping is
                the table ``[batching]`` of ``inferway.toml``.
            instances: copies of the model that run at once.
            isolation: ``worker``, a process of its own, or ``inprocess``, where the operator allows that; None for the
                gateway's choice.
            config: the members of ``inferway.toml``; they are put over those of a file of that name.
            pinned: never unloaded to make room for others.
            golden: pairs of inputs and the outputs that they must give, each as `infer` takes inputs, or the path of a
                ``golden.json``; the gateway runs them before the version may serve.
            wait: come back when the version is in service, with ``version_record``; else as soon as the gateway began.
            progress: a function that is told each `DeployEvent`, True for a bar, False for nothing; None shows a bar on
                a terminal and in a notebook.
            options: see `RequestOptions`; ``timeout`` covers everything, an hour unless given.
        Raises:
            ConfigurationError: the model or an argument cannot be used; nothing was sent.
            InvalidInputError: a golden example does not fit the model's signature; nothing was sent.
            DeploymentFailedError: with ``wait``; it says at which step and why.
            ConflictError: the version's number belongs to other content, or the name to the operator's repository.
            QuotaExceededError, InsufficientStorageError, PayloadTooLargeError: the gateway does not take the files.
            APITimeoutError: the time is over; a deployment that has begun goes on, and the error's note has its id.
            APIError: any other failure.
        """
        job = Job(self._engine, name, version, alias, labels, metadata, batching, instances, isolation, config, pinned,
                  golden, progress, options)  # fmt: skip
        return await deploy_async(self._engine, job, model, wait)

    async def explain(
        self,
        model: str,
        x: object,
        background: object = None,
        *,
        version: str | int | None = None,
        output: str | None = None,
        task: Task | None = None,
        reference: object = None,
        feature_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        segments: object = None,
        mask: str = MASK,
        permutations: int | None = None,
        chunk_rows: int = 256,
        concurrency: int = 8,
        seed: int = 0,
        progress: Callable[[int, int], object] | bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> Explanation:
        """What predictions of a model rest on: Shapley values, by asking the model many times.

        For ``f`` parts of an input and ``b`` rows of background, up to ``permutations * (2 f + 1) * b`` rows are asked
        for each row of ``x``, many requests at once, which the gateway puts together in batches. Where the version is
        left open, the one that answers first is asked to the end. Needs ``pip install 'inferway[explain]'``.

        Args:
            x: rows of numbers ``(rows, features)``; a data frame or a mapping of columns; images, ``(rows, …)`` of two
                or three axes more; or a text.
            background: typical rows that stand in for what is not known, such as 10 to 100 of the training data; 2 to
                10 are enough for wide inputs. For images a value or an image, the mean colour where it is left out.
            output: the output that is explained; may be left out where only one is floating point.
            task: of a text: ``classify`` explains the score of each label, ``embed`` the similarity to ``reference``.
                What the model is for, where it is left out.
            reference: a text or a vector; the text itself where it is left out: which words carry its meaning.
            feature_names: of the columns of an array.
            output_names: such as the classes.
            segments: for images, whole numbers of the image's height and width that say which places belong together;
                squares, about eight along each axis, where they are left out.
            mask: stands for a word that is taken away.
            permutations: orders in which parts become known, drawn at random; 10 where it is left out, fewer for more
                than 250 parts. More make `Explanation.standard_error` smaller.
            chunk_rows: rows of one request, at most; fewer where they would be larger than 4 MiB.
            concurrency: requests at once.
            seed: of the orders.
            progress: True shows a bar, None where somebody looks; or a function that is told the rows that were asked
                and those that there are at most.
            options: of each request.
        Raises:
            MissingExtraError: shap is not installed.
            InvalidInputError: ``x`` or ``background`` do not fit the model or each other.
            ConfigurationError: an argument cannot be used.
        """
        question = Question(
            model=model, x=x, background=background, version=version, output=output, task=task, reference=reference,
            feature_names=feature_names, output_names=output_names, segments=segments, mask=mask,
            permutations=permutations, chunk_rows=chunk_rows, concurrency=concurrency, seed=seed, progress=progress,
        )  # fmt: skip
        return await explain_async(question, self._engine, options)

    async def deployment(self, deployment_id: str, **options: Unpack[RequestOptions]) -> AsyncDeployment:
        """A deployment by its id, to watch, await or cancel it.

        Raises:
            DeploymentNotFoundError: there is none that this key may see.
        """
        return AsyncDeployment(self._engine, await self._engine.send(deployment_call(deployment_id), options))

    async def deployments(
        self, model: str | None = None, *, limit: int | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncDeployments:
        """Deployments, youngest first.

        Args:
            model: only those of this name.
            limit: at most so many; 100 when left out.
        """
        found = await self._engine.send(deployments_call(model, limit), options)
        return [AsyncDeployment(self._engine, record) for record in found]

    async def describe(self, model: str, **options: Unpack[RequestOptions]) -> CatalogModel:
        """Everything about a model: where it comes from, its versions with their states, its aliases.

        Raises:
            ModelNotFoundError: there is none that this key may see.
        """
        return await self._engine.send(describe_call(model), options)

    async def catalog(self, **options: Unpack[RequestOptions]) -> Catalog:
        """Every model as `describe` has it, also those of which no version answers now."""
        return await self._engine.send(catalog_call(), options)

    async def versions(self, model: str, **options: Unpack[RequestOptions]) -> Versions:
        """A model's versions, oldest first, with their states.

        Raises:
            ModelNotFoundError: there is none that this key may see.
        """
        return await self._engine.send(versions_call(model), options)

    async def version(self, model: str, version: int, **options: Unpack[RequestOptions]) -> ModelVersion:
        """One version: files, configuration, labels, memory, state.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return await self._engine.send(version_call(model, version), options)

    async def update(
        self,
        model: str,
        version: int,
        *,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        pinned: bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> ModelVersion:
        """Change what is beside a version's content; what is None stays. Needs the scope ``deploy``.

        Args:
            labels, metadata: in the place of all that it had.
            pinned: whether it is never unloaded to make room.
        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
        """
        return await self._engine.send(update_call(model, version, labels, metadata, pinned), options)

    async def delete(self, model: str, version: int | None = None, **options: Unpack[RequestOptions]) -> None:
        """Delete a version, or a model with all its versions and aliases. Needs the scope ``deploy``.

        Args:
            version: None for the model.
        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
            ConflictError: an alias names the version, or a deployment of the model runs.
        """
        await self._engine.send(delete_call(model, version), options)
        self._engine.signatures.forget(model)

    async def aliases(self, model: str, **options: Unpack[RequestOptions]) -> Aliases:
        """A model's aliases, with where they point and what passed through them.

        Raises:
            ModelNotFoundError: there is none that this key may see.
        """
        return await self._engine.send(aliases_call(model), options)

    async def alias(self, model: str, alias: str, **options: Unpack[RequestOptions]) -> Alias:
        """One alias.

        Raises:
            ModelNotFoundError, AliasNotFoundError: there is none that this key may see.
        """
        return await self._engine.send(alias_call(model, alias), options)

    async def set_alias(
        self,
        model: str,
        alias: str,
        target: Weights,
        *,
        sticky: str = "none",
        shadow: int | Mapping[str, Any] | None = None,
        fallback: Sequence[int] | int = (),
        guard: Mapping[str, Any] | bool | None = None,
        expected_revision: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> Alias:
        """Point an alias, in the place of all that it was; it is made where there is none. Needs the scope ``deploy``.

        Args:
            target: a version, or versions with their percents of the requests: ``{3: 95, 4: 5}``.
            sticky: who keeps to one version: ``none``, ``key`` for each API key, ``header:X-User`` for each value of
                that header.
            shadow: a version that gets copies of requests, its answers compared and thrown away; or a mapping with
                ``version``, ``share`` (0 to 1), ``rtol`` and ``atol``.
            fallback: versions that answer, in this order, where the chosen one cannot.
            guard: True, or a mapping of ``window_s``, ``min_requests``, ``max_error_rate`` and ``max_p95_ratio``: a
                lesser target that does worse than that goes back to no requests by itself.
            expected_revision: refuse where somebody has changed it since.
        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none that this key may see.
            ConflictError: it is not at ``expected_revision``.
            ConfigurationError: the percents do not sum to 100, or a value cannot be one.
        """
        call = set_alias_call(model, alias, target, sticky, shadow, fallback, guard, expected_revision)
        found = await self._engine.send(call, options)
        self._engine.signatures.forget(model)
        return found

    async def delete_alias(self, model: str, alias: str, **options: Unpack[RequestOptions]) -> None:
        """Take an alias away. Needs the scope ``deploy``.

        Raises:
            ModelNotFoundError, AliasNotFoundError: there is none that this key may see.
        """
        await self._engine.send(delete_alias_call(model, alias), options)
        self._engine.signatures.forget(model)

    async def rollback(self, model: str, alias: str = "stable", **options: Unpack[RequestOptions]) -> Alias:
        """Point an alias where it pointed before its last change. Needs the scope ``deploy``.

        Doing it twice is where it was at first. Not tried again when an attempt may have arrived, since that would undo
        it.

        Raises:
            ModelNotFoundError, AliasNotFoundError: there is none that this key may see.
            ConflictError: it has pointed nowhere else yet.
        """
        found = await self._engine.send(rollback_call(model, alias), options)
        self._engine.signatures.forget(model)
        return found

    async def events(
        self, model: str | None = None, *, page_size: int | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncIterator[Event]:
        """Who did what, when, youngest first; pages are fetched while the iteration goes on.

        Args:
            model: only those of this name; None for all that this key may see.
            page_size: events for each request, at most 1000; None for the gateway's choice.
        """
        before: int | None = None
        while True:
            page = await self._engine.send(events_call(model, before, page_size), options)
            for event in page.events:
                yield event
            before = _older(page, before)
            if before is None:
                return
