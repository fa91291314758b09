from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from inferway_gateway.backends.language.backend import LanguageBackend
from inferway_gateway.backends.language.executor import LanguageExecutor
from inferway_gateway.backends.language.generator import Generator
from inferway_gateway.backends.worker.forks import ForkServer
from inferway_gateway.core.backend import Artifact
from inferway_gateway.core.generation import ChosenLogprob, Delta, GenerationRequest, Sampling
from inferway_gateway.core.model_config import GenerationOptions, ModelConfig
from inferway_gateway.core.stats import ModelStats

MODELS = Path(__file__).parents[4] / ".cache" / "inferway-models"
PROMPT = "The capital of France is"
GREEDY = Sampling(temperature=0)

OpenModel = Callable[..., Awaitable[Any]]


def folder_of(name: str) -> Path:
    folder = MODELS / name
    if not (folder / "genai_config.json").is_file():
        pytest.skip(f"examples/models/make_models.py --only {name} makes the model")
    return folder


@pytest.fixture
async def open_language() -> AsyncIterator[OpenModel]:
    """Open a model by its folder, or its name; options are those of ``[generation]``."""
    async with AsyncExitStack() as stack:

        async def open_one(model: str | Path = "tiny-llm", approved: bool = True, **options: Any) -> Generator:
            folder = folder_of(model) if isinstance(model, str) else model
            config = ModelConfig(generation=GenerationOptions(**options))
            artifact = Artifact("m", 1, folder / "genai_config.json", config)
            executor = await LanguageBackend(cpus=2).open(artifact, ModelStats(), approved=approved)
            stack.push_async_callback(executor.close)
            return executor.generator

        yield open_one


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture
async def open_isolated(forks: ForkServer) -> AsyncIterator[OpenModel]:
    """As ``open_language``, in a process of its own. Gives the executor."""
    async with AsyncExitStack() as stack:

        async def open_one(
            model: str | Path = "tiny-llm", events: list[str] | None = None, confine: bool = True, **options: Any
        ) -> LanguageExecutor:
            folder = folder_of(model) if isinstance(model, str) else model
            config = ModelConfig(generation=GenerationOptions(**options), isolation="worker")
            backend = LanguageBackend(2, forks, confine=confine)
            if events is not None:
                backend.on_event = lambda kind, artifact, detail: events.append(kind)
            executor = await backend.open(Artifact("m", 1, folder / "genai_config.json", config), ModelStats())
            stack.push_async_callback(executor.close)
            return executor

        yield open_one


@pytest.fixture
async def tiny(open_language: OpenModel) -> Generator:
    generator: Generator = await open_language()
    return generator


@dataclass
class Whole:
    """An answer that is complete."""

    deltas: list[Delta]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for delta in self.deltas for token in delta.tokens)

    @property
    def logprobs(self) -> tuple[ChosenLogprob, ...]:
        return tuple(one for delta in self.deltas for one in delta.logprobs)

    @property
    def last(self) -> Delta:
        return self.deltas[-1]


async def ask(
    generator: Generator, prompt: str | tuple[int, ...] = PROMPT, max_tokens: int = 12, **members: Any
) -> Whole:
    ids = tuple(await generator.encode(prompt)) if isinstance(prompt, str) else prompt
    members.setdefault("sampling", GREEDY)
    async with asyncio.timeout(60):
        stream = generator.generate(GenerationRequest(ids, max_tokens, **members))
        return Whole([delta async for delta in stream])


async def read(stream: AsyncGenerator[Delta], count: int) -> list[Delta]:
    """The first deltas of a stream, which is then left."""
    found = []
    async with asyncio.timeout(60), aclosing(stream):
        async for delta in stream:
            found.append(delta)
            if len(found) == count:
                break
    return found


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.002)
