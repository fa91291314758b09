"""Values about the model versions in memory, shared by what loads them from the folder and from the catalog."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

from .backend import Profile, Session
from .batcher import Batcher
from .encoding import TextEncoder
from .execution import Dependent, Executor
from .generation import TextGenerator
from .model_config import ModelConfig
from .relay import TextRelay
from .stats import ModelStats

State = Literal["UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING"]


@dataclass(slots=True, eq=False)
class ServedVersion:
    """A model version that is loaded.

    Attributes:
        session: what stands behind the executor and is closed after it; None for a remote model and a pipeline.
        batcher: what answers its requests: a batcher over the session, or another executor.
        wire: whatever the HTTP side keeps beside the version, so that it goes with it.
        text: what answers for it under ``/v1``, where it is a text model.
    """

    name: str
    version: int
    config: ModelConfig
    session: Session | None
    batcher: Executor
    stats: ModelStats
    wire: Any = None
    text: TextGenerator | TextEncoder | TextRelay | None = None

    @property
    def profile(self) -> Profile:
        """What was measured of the session; the profile of nothing where there is none."""
        return self.session.profile if self.session is not None else Profile()

    def problem(self) -> str | None:
        """Why it cannot answer although it is loaded, in words; None where it can."""
        return self.batcher.problem() if isinstance(self.batcher, Dependent) else None

    @property
    def busy(self) -> bool:
        """Whether requests are in flight. None are, between two events, of those that run on the event loop."""
        if isinstance(self.batcher, Batcher):
            return self.batcher.in_flight > 0
        return self.stats.queued_requests > 0 or self.stats.running > 0


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the repository index. ``version`` is empty where a model has none."""

    name: str
    version: str
    state: State
    reason: str


@dataclass(slots=True, eq=False)
class ModelEntry:
    """One model name: what of it is loaded, and how each of its versions is.

    Attributes:
        ready: the loaded versions.
        states: each version that there is, with its state and why.
        latest: what answers where no version is named: None where that one is not loaded.
        managed: its versions are the catalog's; else the folder's.
    """

    name: str
    managed: bool = False
    ready: dict[int, ServedVersion] = field(default_factory=dict)
    states: dict[int, tuple[State, str]] = field(default_factory=dict)
    latest: ServedVersion | None = None
    problem: str | None = None
    fingerprint: str | None = None
    loaded: dict[int, str] = field(default_factory=dict)
    """Version to the fingerprint of the files that it was loaded from."""
    wanted: bool = True
    settled: bool = False
    """Every version that was asked for has been ready at one time, and since then it never was without one."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def choose_latest(self) -> None:
        """Set ``latest`` anew. Of the catalog's versions the highest answers, loaded or not: another must not answer
        in its place because it left memory. Of the folder's the highest that is loaded does."""
        if self.managed:
            self.latest = self.ready.get(max(self.states)) if self.states else None
        else:
            self.latest = self.ready[max(self.ready)] if self.ready else None


ModelTable = dict[str, ModelEntry]
"""Every model by name, whatever it comes from: what a request looks at."""
