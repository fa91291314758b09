"""Each well-known format writes what its makers publish, in the sandbox in which templates are rendered."""

from __future__ import annotations

from typing import Any

import pytest

from inferway_gateway.core.chat_formats import FORMATS
from inferway_gateway.http.openai.template_child import Renderer

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Hello"}
TALK = [SYSTEM, ASKED, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Bye"}]

PUBLISHED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    ),
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Hi! </s><s>[INST] Bye [/INST]",
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral-v1": "<s> [INST] Be brief.\n\nHello [/INST] Hi!</s> [INST] Bye [/INST]",
    "mistral-v3": "<s>[INST] Be brief.\n\nHello[/INST] Hi!</s>[INST] Bye[/INST]",
    "mistral-tekken": "<s>[INST]Be brief.\n\nHello[/INST]Hi!</s>[INST]Bye[/INST]",
    "phi3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi!<|end|>\n<|user|>\nBye<|end|>\n"
        "<|assistant|>\n"
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHello</s>\n<|assistant|>\nHi!</s>\n<|user|>\nBye</s>\n<|assistant|>\n"
    ),
}


def rendered(name: str, messages: list[Any], **variables: str) -> str:
    asked = {"messages": messages, "add_generation_prompt": True, **variables}
    answer = Renderer().respond({"source": FORMATS[name].source, "variables": asked, "limit": 10_000})
    assert "error" not in answer, answer
    text: str = answer["text"]
    return text


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_conversation_is_written_as_its_makers_do(name: str) -> None:
    assert rendered(name, TALK) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_nothing_is_said_that_nobody_wrote(name: str) -> None:
    text = rendered(name, [ASKED])
    assert "system" not in text.lower()
    assert "<<SYS>>" not in text
    assert text.count("Hello") == 1


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_message_is_lost_whatever_its_role_and_place(name: str) -> None:
    messages = [ASKED, {"role": "tool", "content": "18 degrees"}, {"role": "system", "content": "Last word."}]
    text = rendered(name, messages)
    places = [text.index(message["content"]) for message in messages]
    assert places == sorted(places)


def test_the_models_own_tokens_go_before_the_usual_ones() -> None:
    assert rendered("llama2", TALK, bos_token="<B>", eos_token="<E>").startswith("<B>[INST] <<SYS>>")
    assert rendered("zephyr", [ASKED], eos_token="<E>") == "<|user|>\nHello<E>\n<|assistant|>\n"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_what_ends_an_answer_is_in_the_conversation(name: str) -> None:
    assert any(end in PUBLISHED[name] for end in FORMATS[name].ends)
