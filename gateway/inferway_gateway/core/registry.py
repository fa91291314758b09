"""Which model versions are in memory, in which state, and how they come and go.

One lock per model orders its loads and unloads; a request never takes one. A version is swapped in with one assignment,
after it is ready, and its predecessor drains after it is out of reach: so a request finds either the whole old or the
whole new one. Loading happens on a thread of its own, one model at a time, so that what is measured at load is not
disturbed by the next load.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from .backend import Artifact, Backend, Session
from .batcher import Batcher
from .catalog import LANGUAGE_FILE
from .encoding import TextEncoder, TextReader
from .errors import (
    ConflictError,
    GatewayError,
    ModelLoadError,
    ModelNotFoundError,
    ModelNotReadyError,
    VersionNotFoundError,
)
from .execution import Executor, speaking
from .generation import TextGenerator
from .managed import ManagedVersions
from .model_config import ModelConfig
from .relay import TextRelay
from .runners import RunnerPool
from .served import IndexEntry as IndexEntry
from .served import ModelEntry, ModelTable
from .served import ServedVersion as ServedVersion
from .served import State as State
from .stats import ModelStats

logger = logging.getLogger("inferway.models")

LOADER_THREAD: Final = "inferway-load"
"""What the names of threads that load models begin with."""
_LOAD_GRACE_S: Final = 1.0
"""How long the end waits for a look at the repository, or a quick load, that is under way."""

_LEAN_RETRY_S: Final = (1.0, 30.0)
"""A version that leans on others and could not be loaded is tried again after that long, at first and at most."""

ModelControl = Literal["none", "explicit", "poll"]


class RepositoryModel(Protocol):
    """One model of a repository, as far as the registry needs it."""

    @property
    def name(self) -> str: ...
    @property
    def versions(self) -> Mapping[int, Path]: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def error(self) -> str | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def version_fingerprints(self) -> Mapping[int, str]: ...
    def artifact(self, version: int, /) -> Artifact: ...


class Repository(Protocol):
    """Model files on disk. Every method blocks."""

    def scan(self) -> Mapping[str, RepositoryModel]: ...
    def served_versions(self, model: Any, /) -> tuple[int, ...]: ...
    def with_config(self, model: Any, config: dict[str, Any], /) -> RepositoryModel: ...


class Builder(Protocol):
    """Makes the executor of a version of the folder that is no model: a pipeline, or one on servers elsewhere."""

    async def __call__(self, name: str, version: int, folder: Path, stats: ModelStats, /) -> Executor:
        """``folder`` holds the file. Raises ``GatewayError`` with a message for the operator."""
        ...


class LanguageBuilder(Protocol):
    """Makes the executor of a language model of the folder."""

    async def __call__(self, artifact: Artifact, stats: ModelStats, /) -> Executor:
        """Raises ``GatewayError`` with a message for the operator."""
        ...


class Registry:
    """Model name to versions to sessions.

    Args:
        repository: the operator's folder of models; None where there is none.
        backend: opens them.
        runners: the threads that they run on.
        control: ``none`` and ``explicit`` as in the settings; ``poll`` follows the directory every ``poll_interval_s``.
        run_timeout_s: the longest run of a model whose configuration says nothing.
        drain_timeout_s: how long an unloaded version may still answer what it had taken.
        managed: the catalog's versions, which stand beside the folder's. A name that both have is the folder's.
        builders: name of the file that stands for a model, to what makes its executor. What it leans on may come later
            than it does, so a version that could not be made is tried again.
        read_text: reads what makes a text encoder of a model; None: there are none.
        language: opens language models; None: there are none.
    """

    def __init__(
        self,
        repository: Repository | None,
        backend: Backend,
        runners: RunnerPool,
        *,
        control: ModelControl = "none",
        load_models: tuple[str, ...] = (),
        poll_interval_s: float = 5.0,
        run_timeout_s: float = 30.0,
        drain_timeout_s: float = 30.0,
        strict_readiness: bool = True,
        managed: ManagedVersions | None = None,
        builders: Mapping[str, Builder] | None = None,
        read_text: TextReader | None = None,
        language: LanguageBuilder | None = None,
    ) -> None:
        self._read_text = read_text
        self._language = language
        self._repository = repository
        self._backend = backend
        self._runners = runners
        self._control = control
        self._load_models = load_models
        self._poll_interval_s = poll_interval_s
        self._run_timeout_s = run_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._strict_readiness = strict_readiness
        self._managed = managed
        self._builders = builders or {}
        self._waiting: set[str] = set()
        """Models that lean on others and could not be loaded."""
        self._models: ModelTable = {} if managed is None else managed.table
        self._loader = ThreadPoolExecutor(1, thread_name_prefix=LOADER_THREAD)
        self._work: set[Future[Any]] = set()
        self._abandoned = False
        self._started = False
        self._draining = False

    # ------------------------------------------------------------------ what requests ask

    def get(self, name: str, version: int | None = None) -> ServedVersion:
        """The version that answers a request, the highest one where none is named.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none such.
            ModelNotReadyError: it exists and is not loaded.
        """
        model = self._models.get(name)
        if model is None:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        if version is None:
            if model.latest is not None:
                return model.latest
            raise ModelNotReadyError(f"Request for unready model: '{name}' {_why(model)}")
        served = model.ready.get(version)
        if served is not None:
            return served
        if version not in model.states:
            raise VersionNotFoundError(f"Request for unknown model: '{name}' version {version} is not found")
        state, reason = model.states[version]
        raise ModelNotReadyError(
            f"Request for unready model: '{name}' version {version} is {state.lower()}"
            + (f", {reason}" if reason else "")
        )

    async def acquire(
        self, name: str, version: int | None = None, *, deadline: float | None = None, evict: bool = True
    ) -> ServedVersion:
        """``get`` for a request that may wait: a version of the catalog that is not loaded is loaded for it.

        Args:
            deadline: moment on the loop's clock after which nobody wants it.
            evict: whether others may leave memory for it.
        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none such.
            ModelNotReadyError: it could not be loaded, or not in time; says when to come back.
            MemoryExceededError: it needs more memory than there is.
            DeadlineExceededError: the deadline passed before it was loaded.
        """
        try:
            return self.get(name, version)
        except ModelNotReadyError:
            if self._managed is None or self._draining or not self.is_managed(name):
                raise
        return await self._managed.acquire(name, version, deadline=deadline, evict=evict)

    def is_managed(self, name: str) -> bool:
        """Whether the model of that name is the catalog's."""
        model = self._models.get(name)
        return model is not None and model.managed

    def in_folder(self, name: str) -> bool:
        """Whether the folder has a model of that name, so that none can be deployed under it."""
        model = self._models.get(name)
        return model is not None and not model.managed

    def versions(self, name: str) -> list[int]:
        """The ready versions of a model, ascending; ``ModelNotFoundError`` where it does not exist."""
        model = self._models.get(name)
        if model is None:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        return sorted(model.ready)

    def known_versions(self, name: str) -> list[int]:
        """Every version of a model, loaded or not, ascending; ``ModelNotFoundError`` where it does not exist."""
        model = self._models.get(name)
        if model is None:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        return sorted(model.states)

    def state(self, name: str, version: int) -> tuple[State, str]:
        """How a version is, and why.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none such.
        """
        if version not in self.known_versions(name):
            raise VersionNotFoundError(f"Request for unknown model: '{name}' version {version} is not found")
        return self._models[name].states[version]

    def names(self) -> list[str]:
        return sorted(self._models)

    def served(self) -> Iterator[ServedVersion]:
        """Every loaded version, by name and version."""
        for name in sorted(self._models):
            ready = self._models[name].ready
            for version in sorted(ready):
                yield ready[version]

    def index(self) -> list[IndexEntry]:
        """Every model of the repository with the state of each of its versions."""
        entries = []
        for name in sorted(self._models):
            model = self._models[name]
            if not model.states:
                reason = model.problem or ("" if model.wanted else "unloaded")
                entries.append(IndexEntry(name, "", "UNAVAILABLE" if reason else "UNKNOWN", reason))
            entries += [IndexEntry(name, str(v), *_state(model, v)) for v in sorted(model.states)]
        return entries

    @property
    def ready(self) -> bool:
        """Whether traffic should be sent here: started, not draining, and every wanted model is ready.

        A model that was, and goes on with what it has while something newer is loaded or could not be, still is: else
        one bad file would take every gateway that follows the directory out of service at once.
        """
        if not self._started or self._draining or not (self._managed is None or self._managed.settled):
            return False
        return not self._strict_readiness or all(m.settled or not m.wanted for m in self._models.values())

    @property
    def explicit(self) -> bool:
        return self._control == "explicit"

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        """Load what is to be there from the start, then follow the directory where that is wanted. Ends when it is
        cancelled, or, without polling, when the first load is done."""
        only = self._load_models if self._control == "explicit" else None
        while True:
            done = await self._try_sync(only, first=not self._started)
            if done and not self._started:
                self._started = True
                logger.info("%d model versions of the folder are ready", sum(len(m.ready) for m in self._own()))
            if done and self._control != "poll":
                break
            # Also after a first failure: the folder may be mounted a moment later than we start.
            await asyncio.sleep(self._poll_interval_s)
        pause_s = _LEAN_RETRY_S[0]
        while self._waiting:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LEAN_RETRY_S[1])
            with suppress(OSError):  # then the next look may be luckier
                found = await self._scan()
                await self._apply_leaning(sorted(self._waiting & found.keys()), found)

    async def load(self, name: str, config: dict[str, Any] | None = None) -> None:
        """Load a model by an operator's word, or reload what changed of it; the old serves until the new is ready.

        Args:
            config: in Triton's JSON form, takes the place of the model's own ``config.pbtxt``.
        Raises:
            ConflictError: the gateway does not take such words.
            ModelLoadError: with ``failed to load '<name>'`` and why; what served before serves on.
        """
        self._check_explicit(name)
        try:
            found = (await self._scan()).get(name)
        except OSError as error:
            logger.error("could not read the model repository: %s", error.strerror)
            raise ModelLoadError(f"failed to load '{name}': the model repository cannot be read") from error
        if found is None:
            raise ModelLoadError(f"failed to load '{name}': no such model in the repository")
        if config is not None:
            assert self._repository is not None  # something was found in it
            try:
                found = await self._in_loader(self._repository.with_config, found, config)
            except ValueError as error:
                raise ModelLoadError(_load_message(name, None, str(error))) from None
        model = self._entry(name)
        model.wanted = True
        problems = await self._apply(model, found)
        if problems:
            raise ModelLoadError(problems[-1])

    async def unload(self, name: str) -> None:
        """Take a model out of service at once; what it has in flight is answered. Idempotent.

        Raises:
            ConflictError: the gateway does not take such words.
            ModelNotFoundError: no such model.
        """
        self._check_explicit(name)
        model = self._models.get(name)
        if model is None:
            raise ModelNotFoundError(f"failed to unload '{name}': no such model")
        model.wanted = False
        async with model.lock:
            await self._retire_all(model, "unloaded")
        with suppress(OSError):  # then nobody knows, and it stays
            if name not in await self._scan():
                self._drop(model)

    def begin_drain(self) -> None:
        """From now on not ready, so that balancers look elsewhere; requests are still answered."""
        self._draining = True

    async def close(self) -> None:
        """Unload everything. Waits for what is in flight, ``drain_timeout_s`` at most.

        A load under way cannot be stopped and is not waited for; its thread lives on until it is done.
        """
        self._draining = True
        try:
            if work := [asyncio.wrap_future(future) for future in self._work]:
                _, late = await asyncio.wait(work, timeout=_LOAD_GRACE_S)
                self._abandoned = bool(late)
                for future in late:
                    future.cancel()  # the loop may be gone when the thread is done
            await asyncio.gather(*(self._retire_all(m, "shutting down") for m in self._own()))
            if self._managed is not None:
                await self._managed.close()
        finally:
            self._loader.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ how

    def _check_explicit(self, name: str) -> None:
        if self.is_managed(name):
            raise ConflictError(f"'{name}' was deployed: its versions are loaded when they are asked for")
        if self._control == "poll":
            raise ConflictError("explicit model load / unload is not allowed if polling is enabled")
        if self._control == "none":
            raise ConflictError("explicit model load / unload is not allowed, expected model control mode 'explicit'")

    def _own(self) -> list[ModelEntry]:
        """The folder's models."""
        return [model for model in self._models.values() if not model.managed]

    def _entry(self, name: str, *, wanted: bool = True) -> ModelEntry:
        """The entry of a model that the folder has. One of the catalog gives way to it."""
        model = self._models.get(name)
        if model is None or model.managed:
            deployed = model is not None
            model = self._models[name] = ModelEntry(name, wanted=wanted)
            if deployed and self._managed is not None:
                logger.warning("the folder has a model '%s', which hides the one that was deployed", name)
                self._managed.hide(name)
        return model

    def _drop(self, model: ModelEntry) -> None:
        """Forget a model that the folder has no more."""
        if self._models.get(model.name) is model:
            del self._models[model.name]
            if self._managed is not None:
                self._managed.reveal(model.name)

    async def _scan(self) -> Mapping[str, RepositoryModel]:
        found: Mapping[str, RepositoryModel] = {}
        if self._repository is not None:
            found = await self._in_loader(self._repository.scan)
        return found

    async def _in_loader(self, call: Any, *args: Any) -> Any:
        work = self._loader.submit(call, *args)
        self._work.add(work)
        work.add_done_callback(self._work.discard)
        return await asyncio.wrap_future(work)

    async def _try_sync(self, only: tuple[str, ...] | None, *, first: bool = False) -> bool:
        """``_sync``; False: it failed and the log says why, for nobody awaits ``run`` while the gateway serves."""
        try:
            await self._sync(only, first=first)
        except OSError as error:
            logger.error("could not read the model repository: %s", error.strerror)
        except Exception:
            logger.exception("bringing the models in line with the repository failed")
        else:
            return True
        return False

    async def _sync(self, only: tuple[str, ...] | None, *, first: bool = False) -> None:
        """Bring what is loaded in line with the repository."""
        found = await self._scan()
        if first:
            for name in sorted(found):
                # An operator's word may have come before this.
                self._entry(name, wanted=only is None or name in only)
            for name in only or ():
                if name not in found:
                    logger.error("asked to load '%s' at start: no such model in the repository", name)
        leaning: list[str] = []
        for name in sorted(found):
            model = self._entry(name)
            if model.wanted and (first or name in self._waiting or model.fingerprint != found[name].fingerprint):
                if any(path.name in self._builders for path in found[name].versions.values()):
                    leaning.append(name)
                else:
                    await self._apply(model, found[name])
        await self._apply_leaning(leaning, found)
        for model in [model for model in self._own() if model.name not in found]:
            self._drop(model)  # first: while it answers what it has taken, nobody is told that it is there
            async with model.lock:
                await self._retire_all(model, "removed from the repository")

    async def _apply_leaning(self, names: list[str], found: Mapping[str, RepositoryModel]) -> None:
        """Load what leans on other models, after those; what leans on such a one comes a round later."""
        while names:
            failed = [
                name for name in names if self._entry(name).wanted and await self._apply(self._entry(name), found[name])
            ]
            if len(failed) == len(names):
                break
            names = failed
        self._waiting = set(names)

    async def _apply(self, model: ModelEntry, found: RepositoryModel) -> list[str]:
        """Load every version that is to be served, then retire those that are not. Returns what went wrong."""
        async with model.lock:
            model.fingerprint = found.fingerprint
            model.problem = None
            problems: list[str] = []
            assert self._repository is not None  # something was found in it
            wanted = self._repository.served_versions(found)
            if found.error is not None or not wanted:
                model.problem = _load_message(model.name, None, found.error or "no version to serve")
                logger.error("%s", model.problem)
                for version in model.states:
                    model.states[version] = _failed(model.problem, serves=version in model.ready)
                return [model.problem]
            for version in wanted:
                if version not in model.ready:
                    model.states[version] = ("LOADING", "")
            for version in wanted:
                if model.loaded.get(version) != found.version_fingerprints.get(version):
                    problem = await self._load_version(model, found, version)
                    if problem is not None:
                        problems.append(problem)
                else:  # an earlier reload may have failed, and what it was to load is gone again
                    model.states[version] = ("READY", "")
            if problems and model.ready:
                return problems  # what served before serves on
            model.settled = not problems
            for version in [v for v in model.states if v not in wanted]:
                await self._retire(model, version)
                model.states.pop(version, None)
            return problems

    async def _load_version(self, model: ModelEntry, found: RepositoryModel, version: int) -> str | None:
        """Load one version and swap it in. Returns why that failed; what served before then serves on."""
        session: Session | None = None
        executor: Executor
        text: TextEncoder | TextGenerator | TextRelay | None = None
        config = found.config
        try:
            artifact = found.artifact(version)
            stats = model.ready[version].stats if version in model.ready else ModelStats()
            builder = self._builders.get(artifact.path.name)
            if self._language is not None and artifact.path.name == LANGUAGE_FILE:
                executor = await self._language(artifact, stats)
                text = speaking(executor)
                config = replace(config, platform="inferway_language")
            elif builder is not None:
                executor = await builder(model.name, version, artifact.path.parent, stats)
                text = speaking(executor)
            else:
                session = await self._in_loader(self._backend.open, artifact)
                package = None
                if self._read_text is not None:
                    package = await self._in_loader(self._read_text, artifact, session.signature)
                    config = config if package is None else package.config
                executor = Batcher(
                    session,
                    config,
                    stats,
                    self._runners,
                    run_timeout_s=self._run_timeout_s,
                    name=f"'{model.name}' version {version}",
                )
                text = None if package is None else TextEncoder(executor, package.spec, package.tokenizer)
        except Exception as error:
            if session is not None:
                await self._in_loader(session.close)
            if isinstance(error, GatewayError):
                reason = error.message
                if not isinstance(error, ModelLoadError):
                    reason = _load_message(model.name, version, reason)
            else:
                logger.exception("loading '%s' version %d failed unexpectedly", model.name, version)
                reason = _load_message(model.name, version, "internal error, see the gateway's log")
            logger.error("%s", reason)
            model.states[version] = _failed(reason, serves=version in model.ready)
            return reason
        old = model.ready.get(version)
        if session is None and config.platform == "onnxruntime_onnx":
            config = replace(config, platform=f"inferway_{artifact.path.stem}")
        served = ServedVersion(model.name, version, config, session, executor, stats, text=text)
        model.ready[version] = served
        model.states[version] = ("READY", "")
        model.loaded[version] = found.version_fingerprints[version]
        model.choose_latest()
        profile = served.profile
        how = "inline" if profile.inline_max_elements else "on runner threads"
        if session is None:
            logger.info("'%s' version %d is ready (by %s)", model.name, version, artifact.path.name)
        else:
            logger.info(
                "'%s' version %d is ready in %.2f s (%s, %s)",
                model.name,
                version,
                profile.load_s,
                profile.row_exactness,
                how,
            )
        if old is not None:
            await self._dispose(old)
        return None

    async def _retire(self, model: ModelEntry, version: int) -> None:
        served = model.ready.pop(version, None)
        model.loaded.pop(version, None)
        model.choose_latest()
        if served is not None:
            model.states[version] = ("UNLOADING", "")
            await self._dispose(served)

    async def _retire_all(self, model: ModelEntry, reason: str) -> None:
        model.settled = False
        for version in list(model.states):
            await self._retire(model, version)
            model.states[version] = ("UNAVAILABLE", reason)

    async def _dispose(self, served: ServedVersion) -> None:
        given_up = await served.batcher.drain(self._drain_timeout_s)
        if given_up:
            logger.warning("gave up on %d requests of '%s' version %d", given_up, served.name, served.version)
        if not await served.batcher.close():
            # A run that ignores its end still reads the session's memory: better to keep it than to crash.
            logger.error("'%s' version %d has a run that does not end, its memory is kept", served.name, served.version)
            return
        if self._abandoned:  # it would wait behind a load, and the memory goes back with the process anyway
            return
        if served.session is not None:
            await self._in_loader(served.session.close)
        logger.info("'%s' version %d is unloaded", served.name, served.version)


def _state(model: ModelEntry, version: int) -> tuple[State, str]:
    """A version's state. One that is loaded is none the readier for it where what it leans on is not."""
    served = model.ready.get(version)
    problem = served.problem() if served is not None else None
    return model.states[version] if problem is None else ("UNAVAILABLE", problem)


def _why(model: ModelEntry) -> str:
    if model.problem:
        return f"has no ready version: {model.problem}"
    if not model.wanted:
        return "is unloaded"
    reasons = [f"version {v} is {s.lower()}" + (f", {r}" if r else "") for v, (s, r) in sorted(model.states.items())]
    return "has no ready version" + (": " + "; ".join(reasons) if reasons else "")


def _failed(reason: str, *, serves: bool) -> tuple[State, str]:
    """State of a version whose last load failed; one that was there before serves on, and says so."""
    return ("READY", f"last reload failed: {reason}") if serves else ("UNAVAILABLE", reason)


def _load_message(name: str, version: int | None, reason: str) -> str:
    return f"failed to load '{name}'" + (f" version {version}" if version is not None else "") + f": {reason}"
