"""OpenAI-compatible servers that lie, behind a gateway: callers get typed errors, and nobody else notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from inferway import Inferway, StreamInterruptedError
from live import LiveGateway, run_gateway
from scripted import Answer, ScriptedServer, Seen, as_json

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]


def sse(*events: object, end: bool = True) -> bytes:
    body = b"".join(b"data: %b\n\n" % (e if isinstance(e, bytes) else json.dumps(e).encode()) for e in events)
    return body + (b"data: [DONE]\n\n" if end else b"")


def chunk(content: str, reason: str | None = None) -> dict[str, Any]:
    return {"model": "theirs", "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": reason}]}


def stream_of(body: bytes, drip: bytes | None = None) -> Answer:
    return Answer(200, body, {"Content-Type": "text/event-stream"}, drip=drip)


def answer_well(seen: Seen) -> Answer:
    """As a server that was asked for text; the version's model decides who it is."""
    if seen.method == "GET":
        return as_json({"object": "list", "data": []})
    if seen.json["stream"]:
        return stream_of(sse(chunk("good"), chunk("", "stop")))
    message = {"role": "assistant", "content": "good"}
    return as_json({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


@dataclass
class Front:
    gateway: LiveGateway
    server: ScriptedServer
    openai: openai.OpenAI
    client: Inferway


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    root = tmp_path_factory.mktemp("front")
    server = ScriptedServer()
    (root / "upstreams.toml").write_text(
        f'[[upstreams]]\nname = "liar"\nprotocol = "openai"\nendpoints = [{{ url = "{server.url}/v1" }}]\n'
        'timeout_s = 5\nhealth_path = ""\nbreaker_failures = 1000\n'
    )
    for name in ("lies", "well"):
        folder = root / "models" / name / "1"
        folder.mkdir(parents=True)
        (folder / "remote.toml").write_text(f'upstream = "liar"\nmodel = "{name}"\noperation = "chat"\n')
    server.otherwise = answer_well
    with run_gateway(root / "models", root / "state", "--upstreams", str(root / "upstreams.toml")) as gateway:
        key = gateway.make_key("infer", "read")
        with (
            openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as theirs,
            Inferway(gateway.url, api_key=key) as client,
        ):
            yield Front(gateway, server, theirs, client)
    server.stop()


LIES: dict[str, Answer] = {
    "garbage": stream_of(sse(chunk("a"), b"<html>")),
    "ends-early": stream_of(sse(chunk("a"), end=False)),
    "length": Answer(
        raw=b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99999\r\n\r\n"
        + sse(chunk("a"), end=False)
    ),
    "an-endless-line": stream_of(sse(chunk("a"), end=False) + b"data: ", drip=b"x" * (1 << 18)),
    "an-error-of-its-own": stream_of(
        sse(chunk("a"), {"error": {"message": "secret 10.0.0.1", "type": "server_error"}})
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_in_a_stream_is_a_typed_error_within_it(front: Front, name: str) -> None:
    lie = LIES[name]
    front.server.otherwise = lambda seen: lie if b'"lies"' in seen.body else answer_well(seen)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: [front.client.chat.create("Hi", model="well").text for _ in range(20)])
        got = []
        stream = front.openai.chat.completions.create(model="lies", messages=HELLO, stream=True)
        assert stream.response.headers["inferway-upstream-attempts"] == "1"
        with pytest.raises(openai.APIError) as caught:
            got += [part.choices[0].delta.content for part in stream]
        with (
            front.client.chat.create("Hi", model="lies", stream=True) as ours,
            pytest.raises(StreamInterruptedError) as told,
        ):
            ours.get_final()
        assert other.result() == ["good"] * 20
    assert caught.value.code == told.value.code == "upstream_failed"
    assert told.value.partial.text == "a"
    assert "10.0.0.1" not in caught.value.message
    assert front.openai.chat.completions.create(model="well", messages=HELLO).choices[0].message.content == "good"


def test_an_alias_falls_back_to_a_version_whose_upstream_answers(front: Front, tmp_path: Path) -> None:
    front.server.otherwise = answer_well
    with Inferway(front.gateway.url, api_key=front.gateway.admin_key) as admin:
        for name in ("well", "fails"):
            package = tmp_path / name
            package.mkdir()
            (package / "remote.toml").write_text(f'upstream = "liar"\nmodel = "{name}"\noperation = "chat"\n')
            admin.models.deploy(package, name="both", alias=None)
    failure = as_json({"error": {"message": "no"}}, 500)
    front.server.otherwise = lambda seen: failure if b'"fails"' in seen.body else answer_well(seen)
    body = {"weights": {"2": 100}, "fallback": [1]}
    status, answer, _ = front.gateway.call("PUT", "/api/v1/models/both/aliases/live", body)
    assert status == 200, answer
    raw = front.openai.chat.completions.with_raw_response.create(model="both@live", messages=HELLO)
    assert raw.parse().choices[0].message.content == "good"
    assert (raw.headers["inferway-fallback"], raw.headers["inferway-model-version"]) == ("2", "1")
    stream = front.openai.chat.completions.create(model="both@live", messages=HELLO, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == "good"
    assert stream.response.headers["inferway-model-version"] == "1"
    with pytest.raises(openai.InternalServerError) as caught:
        front.openai.chat.completions.create(model="both/versions/2", messages=HELLO)
    assert caught.value.code == "upstream_failed"
