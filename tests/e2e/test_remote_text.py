"""A language model on another gateway, asked through this one: OpenAI's package and our client, whole and in pieces."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from inferway import Inferway
from live import LiveGateway, run_gateway

MADE = Path(__file__).parents[2] / ".cache" / "inferway-models"
LIMIT_S = 60.0

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass
class Pair:
    """A gateway, and the one behind it that has the models."""

    front: LiveGateway
    back: LiveGateway
    client: Inferway
    openai: openai.OpenAI


def write_remote(repository: Path, name: str, text: str, version: int = 1) -> None:
    folder = repository / name / str(version)
    folder.mkdir(parents=True)
    (folder / "remote.toml").write_text(text)


def run_pair(root: Path, model: str) -> Iterator[Pair]:
    shutil.copytree(MADE / model, root / "back" / "small" / "1")
    (root / "front").mkdir()
    with run_gateway(root / "back", root / "back-state") as back:
        secret = root / "secret"
        secret.write_text(back.make_key("infer", models=["small"]))
        secret.chmod(0o600)
        (root / "upstreams.toml").write_text(
            f'[[upstreams]]\nname = "llm"\nprotocol = "openai"\nendpoints = [{{ url = "{back.url}/v1" }}]\n'
            'secret = { file = "secret" }\ntimeout_s = 60\n'
        )
        toml = 'upstream = "llm"\nmodel = "small"\noperation = "chat"\n'
        write_remote(root / "front", "far", toml)
        write_remote(root / "front", "short", toml + "[parameters]\nmax_tokens = 2\n")
        write_remote(root / "front", "gone", toml.replace("small", "missing"))
        with run_gateway(root / "front", root / "state", "--upstreams", str(root / "upstreams.toml")) as front:
            key = front.make_key("infer", "read")
            with (
                Inferway(front.url, api_key=key) as client,
                openai.OpenAI(base_url=f"{front.url}/v1", api_key=key, max_retries=0) as theirs,
            ):
                yield Pair(front, back, client, theirs)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield from run_pair(tmp_path_factory.mktemp("pair"), "smollm2")


def metric(gateway: LiveGateway, name: str, model: str) -> float:
    status, text, _ = gateway.call("GET", "/metrics")
    assert status == 200
    found = re.search(rf'^inferway_generation_{name}{{model="{model}",version="1"}} (\S+)$', str(text), re.M)
    assert found is not None, name
    return float(found[1])


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_both_clients_get_what_the_other_gateway_says(pair: Pair) -> None:
    with openai.OpenAI(base_url=f"{pair.back.url}/v1", api_key=pair.back.admin_key) as direct:
        near = direct.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "Say hello."}], max_tokens=12, temperature=0
        )
    raw = pair.openai.chat.completions.with_raw_response.create(
        model="far", messages=[{"role": "user", "content": "Say hello."}], max_tokens=12, temperature=0
    )
    far = raw.parse()
    assert far.choices[0].message == near.choices[0].message
    assert (far.model, far.usage, far.choices[0].finish_reason) == ("far", near.usage, near.choices[0].finish_reason)
    assert raw.headers["inferway-upstream-attempts"] == "1"
    assert raw.headers["inferway-model-version"] == "1"
    ours = pair.client.chat.create("Say hello.", model="far", max_tokens=12, temperature=0)
    assert ours.text == near.choices[0].message.content
    assert ours.model == "far"
