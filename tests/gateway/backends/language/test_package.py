"""What is read of a model's folder, and what is refused with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import models
from inferway_gateway.backends.language.package import read_package
from inferway_gateway.core.chat_formats import FORMATS
from inferway_gateway.core.errors import ModelLoadError
from inferway_gateway.core.model_config import GenerationOptions

from .conftest import OpenModel, ask, folder_of

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(folder_of("tiny-llm"), copy)
    return copy


def change(folder: Path, name: str, how: Change) -> None:
    members = json.loads((folder / name).read_text())
    how(members)
    (folder / name).write_text(json.dumps(members))


def test_a_folder_of_the_builder_is_read_as_it_is() -> None:
    package = read_package(folder_of("tiny-llm"), GenerationOptions())
    assert (package.context_length, package.vocabulary_size, package.ends) == (2048, 49152, (2,))
    assert (package.layers, package.kv_heads, package.head_size) == (2, 2, 16)
    assert package.template is not None
    assert package.variables["eos_token"] == "<|im_end|>"
    assert package.defaults.sampling.temperature == 0
    assert package.defaults.max_tokens == 1024


def test_defaults_come_from_the_search_options_and_the_configuration_over_them(folder: Path) -> None:
    change(folder, "genai_config.json", lambda m: m["search"].update(do_sample=True, temperature=0.7, top_p=0.9))
    sampling = read_package(folder, GenerationOptions()).defaults.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, 50)
    said = read_package(folder, GenerationOptions(temperature=0.2, top_k=5, max_tokens=7)).defaults
    assert (said.sampling.temperature, said.sampling.top_k, said.max_tokens) == (0.2, 5, 7)


def test_a_template_may_be_in_the_tokenizers_configuration(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", lambda m: m.update(chat_template="hello"))
    assert read_package(folder, GenerationOptions()).template == "hello"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    change(folder, "tokenizer_config.json", lambda m: m.update(chat_template=several))
    assert read_package(folder, GenerationOptions()).template == "yes"


async def test_a_well_known_format_needs_no_template_and_no_approval(open_language: OpenModel, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 'of a stranger' }}")
    change(folder, "genai_config.json", lambda m: m["model"].update(eos_token_id=0))
    package = read_package(folder, GenerationOptions(template="chatml"))
    assert package.template == FORMATS["chatml"].source
    assert package.ends == (0, 2)  # what ends a message of the format ends an answer
    generator = await open_language(folder, approved=False, template="chatml")
    assert generator.template is not None
    assert (generator.template.source, generator.template.approved) == (FORMATS["chatml"].source, True)
    own = await open_language(folder, approved=False)
    assert own.template is not None
    assert not own.template.approved


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("genai_config.json", lambda m: m.pop("model"), "no table 'model'"),
        ("genai_config.json", lambda m: m["model"].update(vision={}), "vision"),
        ("genai_config.json", lambda m: m["model"]["decoder"].update(pipeline=[]), "pipeline"),
        ("genai_config.json", lambda m: m["model"]["decoder"].update(sliding_window={"size": 1}), "sliding window"),
        ("genai_config.json", lambda m: m["model"]["decoder"].update(filename="../model.onnx"), "not in the folder"),
        ("genai_config.json", lambda m: m["model"].update(eos_token_id=70_000), "eos_token_id"),
        ("genai_config.json", lambda m: m["model"].update(context_length="long"), "context_length"),
        ("genai_config.json", lambda m: m["model"].update(vocab_size=5), "eos_token_id|logits"),
        ("genai_config.json", lambda m: m["model"]["decoder"].update(num_hidden_layers=3), "past_key_values.2.key"),
        ("genai_config.json", lambda m: m["model"]["decoder"].update(num_key_value_heads=4), "expected"),
        ("genai_config.json", lambda m: m["model"]["decoder"]["inputs"].update(input_ids="tokens"), "tokens"),
        ("genai_config.json", lambda m: m["model"]["decoder"]["inputs"].update(past_key_names="past"), "%d"),
        ("genai_config.json", lambda m: m["search"].update(do_sample=True, temperature="hot"), "temperature"),
        ("tokenizer.json", lambda m: m.pop("model"), "tokenizer.json"),
        ("tokenizer.json", lambda m: m.update(model=7), "tokenizer.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_what_cannot_be_run_is_refused_with_the_reason(
    open_language: OpenModel, folder: Path, name: str, how: Change, reason: str
) -> None:
    change(folder, name, how)
    with pytest.raises(ModelLoadError, match=reason):
        await open_language(folder)


@pytest.mark.parametrize("name", ["genai_config.json", "tokenizer.json", "model.onnx"])
async def test_a_missing_or_broken_file_is_named(open_language: OpenModel, folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\xff nothing")
    with pytest.raises(ModelLoadError):
        await open_language(folder)
    (folder / name).unlink()
    with pytest.raises(ModelLoadError, match=r"missing|not in the folder"):
        await open_language(folder)


async def test_a_graph_with_another_attention_is_refused(open_language: OpenModel, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(models.add_one())
    with pytest.raises(ModelLoadError, match="GroupQueryAttention"):
        await open_language(folder)


async def test_positions_are_given_to_a_graph_that_asks_for_them(open_language: OpenModel, folder: Path) -> None:
    """Other builders' graphs have ``position_ids``; here they are added to logits times zero."""
    expected = await ask(await open_language(folder), max_tokens=4)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    graph = proto.graph
    graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["batch", "tokens"]))
    graph.input.sort(key=lambda value: value.name == "logits_from")
    first = next(node for node in graph.node if "input_ids" in node.input)
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int64), "nothing"))
    first.input[list(first.input).index("input_ids")] = "ids"
    graph.node.insert(0, onnx.helper.make_node("Mul", ["position_ids", "nothing"], ["no_positions"]))
    graph.node.insert(1, onnx.helper.make_node("Add", ["input_ids", "no_positions"], ["ids"]))
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    found = await ask(await open_language(folder), max_tokens=4)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("part", ["lora.0.o.A", "unknown"])
async def test_an_adapter_that_does_not_fit_is_refused(open_language: OpenModel, folder: Path, part: str) -> None:
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({part: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 64, 2), np.float32))})
    file.export_adapter(str(folder / "mine.onnx_adapter"))
    with pytest.raises(ModelLoadError, match="adapter 'mine': the graph has no input"):
        await open_language(folder)


async def test_what_a_tokenizer_puts_in_front_of_texts_is_known(open_language: OpenModel, folder: Path) -> None:
    assert (await open_language(folder)).begin == ()
    begins = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    change(folder, "tokenizer.json", lambda m: m.update(post_processor=begins))
    generator = await open_language(folder)
    assert generator.begin == (1,)
    assert await generator.encode("a") == [81]


async def test_a_tokenizer_of_millions_of_lists_is_not_parsed(open_language: OpenModel, folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"x": [' + "[]," * 2_100_000 + "[]]}")
    with pytest.raises(ModelLoadError, match="more than 4000000 values"):
        await open_language(folder)


async def test_files_of_many_values_and_names_of_many_letters_are_refused(
    open_language: OpenModel, folder: Path
) -> None:
    change(folder, "genai_config.json", lambda config: config["model"]["decoder"].update(filename="a" * 5000))
    with pytest.raises(ModelLoadError, match="not in the folder"):
        await open_language(folder)
    (folder / "genai_config.json").write_text("[" + "[]," * 150_000 + "[]]")
    with pytest.raises(ModelLoadError, match="more than 200000 values"):
        await open_language(folder)
