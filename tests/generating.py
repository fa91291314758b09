"""A gateway's routes for text over generators that say what a test has them say, on a real socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

import httpx
from starlette.applications import Starlette

from inferway_gateway.app import routes
from inferway_gateway.core.errors import GatewayError, ModelNotFoundError, VersionNotFoundError
from inferway_gateway.core.generation import (
    ChatTemplate,
    ChosenLogprob,
    Delta,
    GenerationDefaults,
    GenerationRequest,
    GenerationStats,
    TokenLogprob,
    Usage,
)
from inferway_gateway.core.model_config import ModelConfig
from inferway_gateway.core.routing import Router
from inferway_gateway.core.served import ServedVersion
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.http.application import GatewayApplication
from inferway_gateway.http.metrics import Metrics
from inferway_gateway.http.openai.templates import TemplateRenderer
from inferway_gateway.server.policy import DrainPolicy
from inferway_gateway.server.serve import serve
from inferway_gateway.settings import Settings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")
FIRST_SPECIAL = 0x110000
WAIT_S = 20.0


class FakeGenerator:
    """Answers with the pieces it was given. A token is a character of the prompt, or a special one.

    Args:
        pieces: of every answer; an error among them is raised in its turn.
        finish: how answers end.
        before: awaited before each piece.
    Attributes:
        asked: what was asked, in order.
        left: answers that were closed before their end.
    """

    def __init__(
        self,
        pieces: Sequence[str | GatewayError] = ("Hel", "lo", "!"),
        *,
        finish: str = "stop",
        before: Callable[[int], Any] | None = None,
        template: ChatTemplate | None = None,
        context_length: int = 4096,
        adapters: Sequence[str] = (),
    ) -> None:
        self.pieces = pieces
        self.finish = finish
        self.before = before
        self.template = template or ChatTemplate(CHATML, approved=True)
        self.context_length = context_length
        self.vocabulary_size = FIRST_SPECIAL + len(SPECIAL)
        self.special_tokens = SPECIAL
        self.begin: Sequence[int] = ()
        self.adapters = adapters
        self.defaults = GenerationDefaults()
        self.stats = GenerationStats()
        self.asked: list[GenerationRequest] = []
        self.left = 0
        self.open = 0

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        tokens: list[int] = []
        at = 0
        while at < len(text):
            name = next((s for s in SPECIAL if special and text.startswith(s, at)), None)
            tokens.append(ord(text[at]) if name is None else FIRST_SPECIAL + SPECIAL.index(name))
            at += 1 if name is None else len(name)
        return tokens

    async def encode_all(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        return [await self.encode(text, special=special) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(SPECIAL[t - FIRST_SPECIAL] if t >= FIRST_SPECIAL else chr(t) for t in tokens)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta]:
        self.asked.append(request)
        self.open += 1
        done = False
        try:
            for index, piece in enumerate(self.pieces):
                if self.before is not None:
                    await self.before(index)
                if isinstance(piece, GatewayError):
                    done = True
                    raise piece
                last = index == len(self.pieces) - 1
                tokens = tuple(map(ord, piece))
                usage = Usage(len(request.prompt), len(self.pieces)) if last else None
                done = last
                logprobs = () if request.logprobs is None else (_logprob(piece, request.logprobs),)
                yield Delta(piece, tokens, logprobs, cast(Any, self.finish) if last else None, usage)
        finally:
            self.open -= 1
            self.left += not done


def _logprob(text: str, top: int) -> ChosenLogprob:
    def one(value: float) -> TokenLogprob:
        return TokenLogprob(1, text, text.encode(), value)

    return ChosenLogprob(one(-0.5), tuple(one(-0.5 - i) for i in range(top)))


class FakeRegistry:
    """Versions that are all loaded: name to version to what answers."""

    def __init__(self, versions: Mapping[str, Mapping[int, Any]]) -> None:
        self._served = {
            name: {
                version: ServedVersion(name, version, ModelConfig(), None, cast(Any, None), ModelStats(), text=text)
                for version, text in numbered.items()
            }
            for name, numbered in versions.items()
        }

    def get(self, name: str, version: int | None = None) -> ServedVersion:
        found = self._served.get(name)
        if found is None:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        if version is not None and version not in found:
            raise VersionNotFoundError(f"Request for unknown model: '{name}' version {version} is not found")
        return found[version or max(found)]

    def names(self) -> list[str]:
        return sorted(self._served)

    def versions(self, name: str) -> list[int]:
        self.get(name)
        return sorted(self._served[name])

    def state(self, name: str, version: int) -> tuple[str, str]:
        self.get(name, version)
        return "READY", ""

    def known_versions(self, name: str) -> list[int]:
        return self.versions(name)


@asynccontextmanager
async def serving(
    versions: Mapping[str, Any],
    *,
    router: Router | None = None,
    render_limit_s: float = 5.0,
    end: asyncio.Event | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway's routes over generators, by model name or by name and version.

    Args:
        end: tells the gateway to end; it waits a second for answers that go on.
    """
    numbered = {name: v if isinstance(v, Mapping) else {1: v} for name, v in versions.items()}
    registry = FakeRegistry(numbered)
    renderer = TemplateRenderer(render_limit_s)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[Any]:
        yield {
            "settings": Settings(auth=False),
            "registry": registry,
            "router": router or Router(),
            "authenticator": None,
            "metrics": Metrics(lambda: (), app.edge_stats),
            "access_log": None,
            "rate_limits": None,
            "started_at": int(time.time()),
            "templates": renderer,
        }
        await renderer.close()

    app = GatewayApplication(routes(), lifespan)
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    drain = DrainPolicy(delay_s=0, idle_grace_s=0, timeout_s=1)
    running = asyncio.create_task(serve(cast(Any, app), ready=ready.set_result, drain=drain))

    async def told() -> None:
        if end is not None:
            await end.wait()
            running.cancel()

    telling = asyncio.create_task(told())
    try:
        async with asyncio.timeout(WAIT_S):
            port = await ready
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
            yield client
    finally:
        telling.cancel()
        if not running.cancelling():  # the second time it does not wait
            running.cancel()
        await asyncio.wait((running, telling))


async def events(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> list[Any]:
    """The data of all events of a stream, parsed where they are JSON."""
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    found = [line.removeprefix("data: ") for line in lines]
    return [one if one == "[DONE]" else json.loads(one) for one in found]


async def tokens_of(generator: FakeGenerator, request: GenerationRequest) -> list[Delta]:
    async with aclosing(generator.generate(request)) as deltas:
        return [delta async for delta in deltas]
