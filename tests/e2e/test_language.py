"""A language model from the folder and one that was deployed, each by one line."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from inferway import AsyncInferway, BadRequestError, Inferway, NotFoundError
from live import LiveGateway, run_gateway

MODEL = Path(__file__).parents[2] / ".cache" / "inferway-models" / "tiny-llm"
PROMPT = np.array(["The capital of France is"], object)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    if not MODEL.is_dir():
        pytest.skip("examples/models/make_models.py --only tiny-llm makes the model")
    root = tmp_path_factory.mktemp("language")
    (root / "models" / "placed").mkdir(parents=True)
    (root / "models" / "placed" / "1").symlink_to(root / "models" / ".tiny", target_is_directory=True)
    (root / "models" / ".tiny").mkdir()
    for file in MODEL.iterdir():
        (root / "models" / ".tiny" / file.name).write_bytes(file.read_bytes())
    (root / "models" / "placed" / "inferway.toml").write_text("[generation]\nmax_tokens = 5\nmax_sequences = 2\n")
    with run_gateway(root / "models", root / "state") as running:
        yield running


@pytest.fixture(scope="module")
def key(server: LiveGateway) -> str:
    return server.make_key("infer", "read", "deploy")


def test_a_model_of_the_folder_and_the_same_deployed_write_the_same(server: LiveGateway, key: str) -> None:
    with Inferway(server.url, api_key=key) as client:
        placed = client.infer("placed", {"text_input": PROMPT})
        deployment = client.models.deploy(MODEL, name="deployed", config={"generation": {"max_tokens": 5}})
        assert deployment.state == "succeeded"
        assert client.models.version("deployed", 1).kind == "language"
        deployed = client.infer("deployed", {"text_input": PROMPT, "max_tokens": np.array([5])})
        assert placed["text_output"].tolist() == deployed["text_output"].tolist()
        with pytest.raises(BadRequestError, match="max_tokens"):
            client.infer("deployed", {"text_input": PROMPT, "max_tokens": np.array([-1])})
        with pytest.raises(NotFoundError):
            client.infer("missing", {"text_input": PROMPT})


def test_a_deployed_model_chats_in_a_well_known_format_that_its_package_names(server: LiveGateway, key: str) -> None:
    with Inferway(server.url, api_key=key) as client:
        with pytest.raises(BadRequestError, match="chatml, gemma"):
            client.models.deploy(MODEL, name="formal", config={"generation": {"template": "mine"}})
        client.models.deploy(MODEL, name="formal")
        with pytest.raises(BadRequestError, match=r"INFERWAY_APPROVE_TEMPLATES.*chatml"):
            client.chat.create("Hello", model="formal")
        client.models.deploy(MODEL, name="formal", config={"generation": {"template": "chatml"}})
        answer = client.chat.create("Hello", model="formal", max_tokens=3, temperature=0)
        assert answer.usage is not None
        # <|im_start|> user \n Hello <|im_end|> \n <|im_start|> ass istant \n
        assert answer.usage.prompt_tokens == 10
        client.models.delete("formal")


def test_a_decoder_without_the_builders_file_says_what_it_lacks(server: LiveGateway, key: str, tmp_path: Path) -> None:
    # As transformers and optimum save it: everything but genai_config.json.
    folder = shutil.copytree(MODEL, tmp_path / "saved", ignore=shutil.ignore_patterns("genai_config.json"))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    with Inferway(server.url, api_key=key) as client:
        client.models.deploy(folder, name="saved")
        for ask in (client.chat.create, client.completions.create):
            with pytest.raises(BadRequestError, match=r"without genai_config\.json.*model builder") as caught:
                ask("Hello", model="saved")
            assert caught.value.param == "model"
        client.models.delete("saved")


async def test_callers_that_leave_do_not_keep_others_waiting(server: LiveGateway, key: str) -> None:
    async with AsyncInferway(server.url, api_key=key) as client:
        long = {"text_input": PROMPT, "max_tokens": np.array([2000])}
        left = [asyncio.create_task(client.infer("placed", long)) for _ in range(6)]
        await asyncio.sleep(0)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        async with asyncio.timeout(20):
            answer = await client.infer("placed", {"text_input": PROMPT})
        assert answer["text_output"].shape == (1,)
