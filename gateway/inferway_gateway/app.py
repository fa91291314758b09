"""The composition root: settings in, application out."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Final, TypedDict

from starlette.applications import Starlette

from .backends.isolation import ChosenIsolation
from .backends.language.backend import LanguageBackend, admit_language, weigh_language
from .backends.language.executor import LanguageExecutor
from .backends.onnx import OnnxBackend
from .backends.onnx.admission import EXTENSIONS_DOMAINS, admit
from .backends.remote import RemoteBackend
from .backends.text import read_package
from .backends.worker import BackendOptions, SessionLimits, WorkerBackend, WorkerLimits, WorkerSession
from .backends.worker.sandbox import capabilities
from .core.backend import Artifact
from .core.budget import MemoryBudget, machine_bytes
from .core.catalog import LANGUAGE_FILE, EventKind, VersionRecord
from .core.deployments import Deployer, Follower, process_id
from .core.encoding import TextEncoder, TextStats
from .core.errors import GatewayError, StoreUnavailableError
from .core.execution import Executor
from .core.generation import GenerationStats
from .core.guard import TrafficWatch, watch_traffic
from .core.keys import Authenticator, KeyService
from .core.limits import RateLimits
from .core.managed import ManagedVersions
from .core.opening import VersionOpener
from .core.pipeline import PipelineExecutor
from .core.registry import Registry
from .core.routing import Router
from .core.runners import RunnerPool
from .core.served import ServedVersion
from .core.shadow import Shadows
from .core.stats import Histogram, ModelStats
from .core.step_models import ServedSteps
from .core.upstream import UpstreamSpec
from .front.hub import Hub
from .http import routes_aliases, routes_blobs, routes_docs, routes_keys, routes_models, routes_oip
from .http.alias_metrics import AliasMetrics
from .http.application import GatewayApplication, InferRoute
from .http.budget_metrics import BudgetMetrics
from .http.elsewhere_metrics import Elsewhere
from .http.generation_metrics import GenerationMetrics
from .http.logs import access_log
from .http.metrics import Metrics
from .http.openai import chat, encoders
from .http.openai import models as openai_models
from .http.openai.templates import TemplateRenderer
from .http.routing import ApiRoute, refuse_foreign_pages
from .http.text_metrics import TextMetrics
from .http.worker_metrics import WorkerMetrics, Workers
from .settings import Settings, environment_variable
from .store.blobs import BlobStore, StorageLimits
from .store.catalog import SqlCatalog, open_catalog
from .store.database import open_keys
from .store.elsewhere import ENSEMBLE_FILE, PIPELINE_FILE, REMOTE_FILE
from .store.history import HistoryLimits, keep_short
from .store.repository import ModelRepository
from .store.sql import cause_in_words
from .store.state import StateError
from .store.storage import open_storage
from .store.upstreams import read_upstreams
from .store.version_checks import VersionChecks
from .store.version_config import read_artifact, read_ensemble, read_pipeline, read_remote
from .store.versions import VersionDirectories

logger = logging.getLogger("inferway")

READ: Final = frozenset({"read"})
INFER: Final = frozenset({"infer"})
INFER_OR_READ: Final = frozenset({"infer", "read"})
DEPLOY: Final = frozenset({"deploy"})
ADMIN: Final = frozenset({"admin"})
MEMORY_SHARE: Final = 0.8
"""Of the machine's memory: what deployed models may hold where the settings say nothing."""


_EVENTS_WAITING: Final = 1024
_LOADS_ON_DEMAND: Final = 2
_WORKER_EVENTS: Final[dict[str, EventKind]] = {
    "worker_crashed": "worker_crashed",
    "breaker_opened": "breaker_opened",
    "breaker_closed": "breaker_closed",
}


class ExposureError(Exception):
    """The gateway would be open to other machines; the message says what to do."""


class State(TypedDict):
    """What the lifespan gives to every request."""

    settings: Settings
    registry: Registry
    router: Router
    shadows: Shadows
    watch: TrafficWatch
    authenticator: Authenticator | None
    rate_limits: RateLimits | None
    keys: KeyService
    catalog: SqlCatalog
    managed: ManagedVersions
    follower: Follower
    deployer: Deployer
    blobs: BlobStore
    versions: VersionDirectories
    metrics: Metrics
    access_log: Callable[..., None] | None
    started_at: int
    templates: TemplateRenderer


def routes() -> list[ApiRoute]:
    """Every route of the gateway with the scopes that open it. The contract lists the same, a test compares."""
    oip = routes_oip
    model = "/v2/models/{model}"
    version = model + "/versions/{version}"
    repository = "/v2/repository"
    named = repository + "/{repository}"
    keys = "/api/v1/keys"
    blob = "/api/v1/blobs/{digest}"
    own = frozenset({"self"})
    models = "/api/v1/models"
    deployed = models + "/{model}"
    numbered = deployed + "/versions/{version}"
    deployments = "/api/v1/deployments"
    aliases = deployed + "/aliases"
    alias = aliases + "/{alias}"
    return [
        ApiRoute("/v2/health/live", oip.live, "GET", public=True),
        ApiRoute("/v2/health/ready", oip.ready, "GET", public=True),
        ApiRoute("/v2", oip.server_metadata, "GET", scopes=INFER_OR_READ),
        ApiRoute("/v2/models", oip.model_names, "GET", scopes=INFER_OR_READ),
        ApiRoute("/v2/models/stats", oip.all_stats, "GET", scopes=READ),
        *(
            route
            for base in (model, version)
            for route in (
                ApiRoute(base, oip.model_metadata, "GET", scopes=INFER_OR_READ),
                ApiRoute(base + "/ready", oip.model_ready, "GET", scopes=INFER_OR_READ),
                ApiRoute(base + "/config", oip.model_config, "GET", scopes=READ),
                ApiRoute(base + "/stats", oip.model_stats, "GET", scopes=READ),
                InferRoute(base + "/infer"),
            )
        ),
        ApiRoute(repository + "/index", oip.repository_index, "POST", scopes=READ),
        ApiRoute(repository + "/models/{model}/load", oip.repository_load, "POST", scopes=DEPLOY),
        ApiRoute(repository + "/models/{model}/unload", oip.repository_unload, "POST", scopes=DEPLOY),
        ApiRoute(named + "/index", oip.named_repository, "POST", scopes=READ),
        ApiRoute(named + "/models/{model}/load", oip.named_repository, "POST", scopes=DEPLOY),
        ApiRoute(named + "/models/{model}/unload", oip.named_repository, "POST", scopes=DEPLOY),
        ApiRoute(models, routes_models.list_models, "GET", scopes=READ | DEPLOY),
        ApiRoute(deployed, routes_models.get_model, "GET", scopes=READ | DEPLOY),
        ApiRoute(deployed, routes_models.delete_model, "DELETE", scopes=DEPLOY),
        ApiRoute(deployed + "/events", routes_models.model_events, "GET", scopes=READ | DEPLOY),
        ApiRoute(deployed + "/versions", routes_models.create_version, "POST", scopes=DEPLOY),
        ApiRoute(numbered, routes_models.get_version, "GET", scopes=READ | DEPLOY),
        ApiRoute(numbered, routes_models.change_version, "PATCH", scopes=DEPLOY),
        ApiRoute(numbered, routes_models.delete_version, "DELETE", scopes=DEPLOY),
        ApiRoute(deployments, routes_models.list_deployments, "GET", scopes=READ | DEPLOY),
        ApiRoute(deployments + "/{deployment_id}", routes_models.get_deployment, "GET", scopes=READ | DEPLOY),
        ApiRoute(deployments + "/{deployment_id}/cancel", routes_models.cancel_deployment, "POST", scopes=DEPLOY),
        ApiRoute("/api/v1/events", routes_models.all_events, "GET", scopes=READ | DEPLOY),
        ApiRoute(aliases, routes_aliases.list_aliases, "GET", scopes=READ | DEPLOY),
        ApiRoute(alias, routes_aliases.get_alias, "GET", scopes=READ | DEPLOY),
        ApiRoute(alias, routes_aliases.set_alias, "PUT", scopes=DEPLOY),
        ApiRoute(alias, routes_aliases.delete_alias, "DELETE", scopes=DEPLOY),
        ApiRoute(alias + "/rollback", routes_aliases.roll_back, "POST", scopes=DEPLOY),
        ApiRoute(blob, routes_blobs.get_blob, "GET", scopes=DEPLOY),
        ApiRoute(blob, routes_blobs.put_blob, "PUT", scopes=DEPLOY),
        ApiRoute("/api/v1/registry/gc", routes_blobs.collect_garbage, "POST", scopes=ADMIN),
        ApiRoute("/api/v1/registry/check", routes_blobs.check_registry, "GET", scopes=ADMIN),
        ApiRoute("/v1/chat/completions", chat.chat_completions, "POST", scopes=INFER),
        ApiRoute("/v1/completions", chat.completions, "POST", scopes=INFER),
        ApiRoute("/v1/embeddings", encoders.embeddings, "POST", scopes=INFER),
        ApiRoute("/v1/rerank", encoders.rerank, "POST", scopes=INFER),
        ApiRoute("/v1/classify", encoders.classify, "POST", scopes=INFER),
        ApiRoute("/v1/models", openai_models.list_models, "GET", scopes=INFER_OR_READ),
        ApiRoute("/v1/models/{id:path}", openai_models.get_model, "GET", scopes=INFER_OR_READ),
        ApiRoute("/metrics", oip.metrics, "GET", scopes=READ),
        ApiRoute("/openapi.json", routes_docs.openapi_json, "GET", basic=True),
        ApiRoute("/docs", routes_docs.docs_page, "GET", basic=True),
        ApiRoute(keys, routes_keys.list_keys, "GET", scopes=ADMIN),
        ApiRoute(keys, routes_keys.create_key, "POST", scopes=ADMIN),
        ApiRoute(keys + "/self", routes_keys.get_self, "GET"),
        ApiRoute(keys + "/{key_id}", routes_keys.get_key, "GET", scopes=ADMIN, besides=own),
        ApiRoute(keys + "/{key_id}", routes_keys.revoke_key, "DELETE", scopes=ADMIN, besides=own),
        ApiRoute(keys + "/{key_id}/rotate", routes_keys.rotate_key, "POST", scopes=ADMIN),
    ]


def create_app(settings: Settings, hub: Hub | None = None) -> GatewayApplication:
    """The gateway as an ASGI application. Nothing is opened before its lifespan begins.

    Args:
        settings: validated.
        hub: takes the requests of front processes, where there are some.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[State]:
        try:
            async with opened() as state:
                yield state
        except (ExposureError, StateError) as error:
            app.startup_problem = str(error)
            raise
        except StoreUnavailableError as error:
            app.startup_problem = f"cannot use the key database: {cause_in_words(error)}"
            raise

    @asynccontextmanager
    async def opened() -> AsyncIterator[State]:
        # Opened in the order in which they lean on each other, closed in reverse: the registry drains its models
        # before the threads that run them end.
        async with AsyncExitStack() as stack:
            runners = await stack.enter_async_context(RunnerPool(settings.cpus))
            backend = OnnxBackend(
                settings.providers,
                cpus=settings.cpus,
                inline_threshold_s=settings.inline_threshold_s,
                trial_budget_s=settings.trial_budget_s,
                measure_budget_s=settings.measure_budget_s,
            )

            workers = stack.enter_context(_workers(settings))

            async def place(record: VersionRecord) -> Path:
                return await storage.versions.materialise(record)

            async def build_remote(name: str, version: int, folder: Path, stats: ModelStats) -> Executor:
                spec = await asyncio.to_thread(read_remote, folder)
                return await remote.open(name, version, spec, stats)

            async def build_pipeline(name: str, version: int, folder: Path, stats: ModelStats) -> Executor:
                spec = await asyncio.to_thread(read_pipeline, folder)
                return await PipelineExecutor.open(name, version, spec, steps, stats)

            async def build_ensemble(name: str, version: int, folder: Path, stats: ModelStats) -> Executor:
                spec = await asyncio.to_thread(read_ensemble, folder)
                return await PipelineExecutor.open(name, version, spec, steps, stats)

            async def open_remote(record: VersionRecord, folder: Path, stats: ModelStats) -> Executor:
                return await build_remote(record.model, record.version, folder, stats)

            async def open_pipeline(record: VersionRecord, folder: Path, stats: ModelStats) -> Executor:
                return await build_pipeline(record.model, record.version, folder, stats)

            async def open_language(record: VersionRecord, folder: Path, stats: ModelStats) -> Executor:
                artifact = await asyncio.to_thread(read_artifact, record, folder)
                config = replace(artifact.config, isolation=record.isolation)
                approved = _matches(record.model, settings.approve_templates)
                return await language.open(replace(artifact, config=config), stats, approved=approved)

            async def build_language(artifact: Artifact, stats: ModelStats) -> Executor:
                return await language.open(artifact, stats, approved=True)

            language = LanguageBackend(
                settings.cpus,
                workers.forks,
                load_timeout_s=settings.worker_load_timeout_s,
                breaker_failures=settings.worker_breaker_failures,
            )
            upstreams: tuple[UpstreamSpec, ...] = ()
            if settings.upstreams is not None:
                upstreams = await asyncio.to_thread(read_upstreams, settings.upstreams, environment_variable)
            remote = await stack.enter_async_context(RemoteBackend(upstreams))
            opener = VersionOpener(
                place,
                partial(_describe, settings),
                {"inprocess": backend, "worker": workers},
                {"remote": open_remote, "pipeline": open_pipeline, "language": open_language},
                weigh=_weigh,
                # Deployments that take their time must not keep what is asked for from being loaded.
                threads=settings.parallel_deployments + _LOADS_ON_DEMAND,
                read_text=partial(read_package, isolated=True),
            )
            await stack.enter_async_context(opener)
            managed = ManagedVersions(
                opener,
                runners,
                MemoryBudget(settings.memory_budget_bytes or int(machine_bytes() * MEMORY_SHARE)),
                run_timeout_s=settings.run_timeout_s,
                drain_timeout_s=settings.drain_timeout_s,
                load_wait_s=settings.load_wait_s,
            )
            registry = Registry(
                None if settings.model_dir is None else ModelRepository(settings.model_dir),
                ChosenIsolation(backend, workers),
                runners,
                control=settings.model_control,
                load_models=settings.load_models,
                poll_interval_s=settings.poll_interval_s,
                run_timeout_s=settings.run_timeout_s,
                drain_timeout_s=settings.drain_timeout_s,
                strict_readiness=settings.strict_readiness,
                managed=managed,
                builders={REMOTE_FILE: build_remote, PIPELINE_FILE: build_pipeline, ENSEMBLE_FILE: build_ensemble},
                read_text=read_package,
                language=build_language,
            )
            stack.push_async_callback(registry.close)

            async def find(name: str, version: int, deadline: float) -> ServedVersion:
                # A copy that nobody waits for takes no room from what answers.
                return await registry.acquire(name, version, deadline=deadline, evict=False)

            router = Router()
            steps = ServedSteps(router, registry, managed)
            shadows = await stack.enter_async_context(Shadows(find))

            def stats_of(name: str, version: int) -> ModelStats | None:
                try:
                    return registry.get(name, version).stats
                except GatewayError:
                    return None

            watch = TrafficWatch(router, stats_of)
            pepper = settings.key_pepper
            keys = await stack.enter_async_context(
                open_keys(
                    database_url=settings.database(),
                    state_dir=settings.state_dir,
                    pepper=pepper.get_secret_value() if pepper is not None else None,
                    ttl_s=settings.key_cache_ttl_s,
                )
            )
            catalog = await stack.enter_async_context(open_catalog(database_url=settings.database()))
            limits = StorageLimits(
                upload_bytes=settings.upload_limit_bytes,
                total_bytes=settings.storage_limit_bytes,
                per_key_bytes=settings.storage_limit_per_key_bytes,
                grace_s=settings.blob_grace_s,
            )
            storage = await stack.enter_async_context(
                open_storage(
                    state_dir=settings.state_dir,
                    catalog=catalog,
                    limits=limits,
                    blob_store=settings.blob_store,
                    cache_bytes=settings.blob_cache_bytes,
                )
            )
            tidying = asyncio.create_task(storage.keep_tidy(), name="inferway-storage")
            stack.push_async_callback(_end, tidying)
            kept = HistoryLimits(settings.history_s, settings.history_per_model)
            forgetting = asyncio.create_task(keep_short(catalog, kept), name="inferway-history")
            stack.push_async_callback(_end, forgetting)
            await _check_exposure(settings, keys.service)
            templates = TemplateRenderer()
            stack.push_async_callback(templates.close)
            metrics = Metrics(
                lambda: ((s.name, s.version, s.stats, s.problem() is None) for s in registry.served()), app.edge_stats
            )
            metrics.add(BudgetMetrics(managed.budget))
            metrics.add(Elsewhere(remote.stats, lambda: _pipelines(registry)))
            metrics.add(AliasMetrics(router.aliases))
            metrics.add(TextMetrics(lambda: _encoders(registry)))
            metrics.add(GenerationMetrics(lambda: _generators(registry)))
            metrics.add(WorkerMetrics(lambda: _processes(registry), capabilities().missing))
            workers.on_event = language.on_event = await stack.enter_async_context(_worker_events(catalog))
            app.begin_drain = registry.begin_drain
            loading = asyncio.create_task(registry.run(), name="inferway-registry")
            stack.push_async_callback(_end, loading)
            checks = VersionChecks(storage.blobs, storage.versions, partial(_admit, settings.extensions_models))
            follower = Follower(catalog, managed, router, remove=checks.remove)
            owner = process_id()
            deployer = Deployer(
                catalog,
                managed,
                checks,
                follower.follow,
                owner=owner,
                parallel=settings.parallel_deployments,
                per_key=settings.deployments_per_key,
                limit_s=settings.deployment_timeout_s,
            )
            stack.push_async_callback(deployer.close)
            await deployer.end_interrupted()
            for name, work in (("inferway-catalog", follower.run()), ("inferway-deployments", deployer.run())):
                stack.push_async_callback(_end, asyncio.create_task(work, name=name))
            watching = asyncio.create_task(watch_traffic(watch, catalog, router), name="inferway-guard")
            stack.push_async_callback(_end, watching)
            if hub is not None:
                await stack.enter_async_context(
                    hub.opened(
                        registry=registry,
                        router=router,
                        metrics=metrics,
                        edge_stats=app.edge_stats,
                        authenticator=keys.authenticator,
                    )
                )
            yield State(
                settings=settings,
                registry=registry,
                router=router,
                shadows=shadows,
                watch=watch,
                authenticator=keys.authenticator if settings.auth else None,
                rate_limits=RateLimits(settings.requests_per_minute) if settings.requests_per_minute else None,
                keys=keys.service,
                catalog=catalog,
                managed=managed,
                follower=follower,
                deployer=deployer,
                blobs=storage.blobs,
                versions=storage.versions,
                metrics=metrics,
                access_log=access_log() if settings.access_log else None,
                started_at=int(time.time()),
                templates=templates,
            )

    app = GatewayApplication(routes(), lifespan)
    if not settings.auth:
        app.guard = partial(refuse_foreign_pages, any_host=settings.insecure)
    return app


def _pipelines(registry: Registry) -> Iterator[tuple[str, int, Mapping[str, Histogram]]]:
    for served in registry.served():
        if isinstance(served.batcher, PipelineExecutor):
            yield served.name, served.version, served.batcher.step_seconds


def _encoders(registry: Registry) -> Iterator[tuple[str, int, TextStats]]:
    for served in registry.served():
        if isinstance(served.text, TextEncoder):
            yield served.name, served.version, served.text.stats


def _generators(registry: Registry) -> Iterator[tuple[str, int, GenerationStats]]:
    for served in registry.served():
        if served.text is not None and not isinstance(served.text, TextEncoder):
            yield served.name, served.version, served.text.stats


def _workers(settings: Settings) -> WorkerBackend:
    return WorkerBackend(
        BackendOptions(
            settings.providers,
            inline_threshold_s=settings.inline_threshold_s,
            trial_budget_s=settings.trial_budget_s,
            measure_budget_s=settings.measure_budget_s,
        ),
        cpus=settings.cpus,
        limits=WorkerLimits(
            load_timeout_s=settings.worker_load_timeout_s,
            load_bytes=settings.worker_load_memory_bytes,
            session=SessionLimits(
                breaker_failures=settings.worker_breaker_failures,
                respawns_per_minute=settings.worker_respawns_per_minute,
                answer_limit_bytes=settings.worker_answer_limit_bytes,
            ),
        ),
    )


def _processes(registry: Registry) -> Iterator[tuple[str, int, Workers]]:
    for served in registry.served():
        if isinstance(served.session, WorkerSession):
            yield served.name, served.version, served.session
        elif isinstance(served.batcher, LanguageExecutor) and served.batcher.workers is not None:
            yield served.name, served.version, served.batcher.workers


@asynccontextmanager
async def _worker_events(catalog: SqlCatalog) -> AsyncIterator[Callable[[str, Artifact, str], None]]:
    """Keep what happens to workers: gives what they call, on any thread, when something does."""
    loop = asyncio.get_running_loop()
    happened: asyncio.Queue[tuple[EventKind, Artifact, str]] = asyncio.Queue(_EVENTS_WAITING)

    def put(kind: EventKind, artifact: Artifact, detail: str) -> None:
        if not happened.full():  # the log has them all
            happened.put_nowait((kind, artifact, detail))

    def tell(kind: str, artifact: Artifact, detail: str) -> None:
        known = _WORKER_EVENTS.get(kind)
        if known is not None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(put, known, artifact, detail)

    async def keep() -> None:
        while True:
            kind, artifact, detail = await happened.get()
            try:
                await catalog.add_event(
                    kind, artifact.name, version=artifact.version, by="gateway", detail={"reason": detail}
                )
            except GatewayError as error:
                logger.warning("an event could not be kept: %s", error.message)

    keeping = asyncio.create_task(keep(), name="inferway-worker-events")
    try:
        yield tell
    finally:
        await _end(keeping)


def _admit(extensions_models: Collection[str], artifact: Artifact, files: Collection[str]) -> None:
    if artifact.path.name == LANGUAGE_FILE:
        admit_language(artifact.path, files=files)
        return
    domains = EXTENSIONS_DOMAINS if _matches(artifact.name, extensions_models) else ()
    admit(artifact.path, allowed_domains=domains, files=files)


def _weigh(record: VersionRecord, folder: Path) -> int:
    """What a version takes beyond its files: weights of 16 bits, because processors compute in 32; the same weights
    again in each further process; keys and values of a language model."""
    try:
        artifact = read_artifact(record, folder)
        if record.kind == "language":
            return weigh_language(artifact)
        half_bytes = admit(artifact.path, allowed_domains=EXTENSIONS_DOMAINS).half_bytes
        others = (artifact.config.instances or 1) - 1
        # A model of one row maps its weights where they are large, and then they are in memory once.
        mapped = artifact.config.max_batch_size == 1 or record.isolation != "worker"
        return half_bytes + (0 if mapped else others * (sum(file.size for file in record.files) + half_bytes))
    except GatewayError:
        return 0  # it was let in before, and is not judged again here


def _describe(settings: Settings, record: VersionRecord, folder: Path) -> Artifact:
    """The version's model. Whether it may use other operators is not for its own configuration to say, nor how much of
    the machine it may keep busy, and for how long."""
    artifact = read_artifact(record, folder)
    config = artifact.config
    threads = config.session.intra_op_threads
    session = replace(
        config.session,
        extensions=_matches(record.model, settings.extensions_models),
        intra_op_threads=threads and min(threads, settings.cpus or len(os.sched_getaffinity(0))),
    )
    run_timeout_s = config.run_timeout_s
    if run_timeout_s is not None:
        run_timeout_s = min(run_timeout_s, max(settings.run_timeout_s, settings.run_timeout_limit_s))
    return replace(artifact, config=replace(config, session=session, run_timeout_s=run_timeout_s))


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


async def _check_exposure(settings: Settings, keys: KeyService) -> None:
    """Refuse to be reachable by others without anything that holds them off.

    Raises:
        ExposureError: the address is not loopback, no key could open anything, or authentication is off.
    """
    has_keys = await keys.any_usable()
    if settings.loopback:
        if settings.auth and not has_keys:
            logger.warning("no API key exists yet: 'inferway keys create --name NAME --scopes infer read' makes one")
        return
    problem = None
    if not settings.auth:
        problem = "authentication is off"
    elif not has_keys:
        problem = "there is no API key"
    if problem is None:
        return
    if not settings.insecure:
        raise ExposureError(
            f"refusing to listen on {settings.host}, which other machines may reach: {problem}. "
            "Make a key with 'inferway keys create', or say --insecure"
        )
    logger.warning("INSECURE: listening on %s, which other machines may reach, and %s", settings.host, problem)


async def _end(task: asyncio.Task[None]) -> None:
    """Stop the registry's task; an error of its own is logged, for by now nobody else would see it."""
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
    except Exception:
        logger.exception("loading the model repository failed")
