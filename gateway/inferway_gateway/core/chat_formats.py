"""Well-known formats of conversations, to be chosen by name where a model brings no template, or none that is approved.

A template that comes with a model is somebody's program; these are the gateway's own, so that nobody has to approve of
them. They say what the models were taught, no more: no system message that nobody wrote, no date, no words for tools,
which are told to the model in a system message instead (``http/openai/asking.py``).

Sources, read in November 2026: ChatML as OpenAI published it and Qwen's, SmolLM's and Hermes' cards show it; Meta's
"Model Cards and Prompt Formats" for Llama 2 and 3; Mistral's cookbook "Tokenization", which tells its three ways of
spacing apart; Google's "Gemma formatting and system instructions"; the cards of Phi-3-mini and of Zephyr-7B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a conversation is written down.

    Attributes:
        source: a Jinja template over ``messages``, ``add_generation_prompt``, ``bos_token`` and ``eos_token``.
        ends: names of tokens that end an answer, where the tokenizer has them.
    """

    source: str
    ends: tuple[str, ...]


def _begin(token: str) -> str:
    return f"{{{{ bos_token | default('{token}') }}}}"


_END: Final = "{{ eos_token | default('</s>') }}"


def _roles(begin: str, message: str, opening: str) -> str:
    """Every message is written in the same way, with its role."""
    asked = f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    return f"{begin}{{% for m in messages %}}{message}{{% endfor %}}{asked}"


def _turns(
    begin: str,
    user: tuple[str, str],
    assistant: tuple[str, str],
    opening: str = "",
    system: tuple[str, str] = ("", "\\n\\n"),
) -> str:
    """There are two roles: what a system message says stands in front of the user's next message, within its turn.

    Args:
        user, assistant, system: what is put before and after a message.
    """
    told = f"{{% set said.system = said.system + '{system[0]}' + m.content | trim + '{system[1]}' %}}"
    return (
        f"{begin}{{% set said = namespace(system='') %}}{{% for m in messages %}}"
        f"{{% if m.role == 'system' %}}{told}"
        f"{{% elif m.role == 'assistant' %}}{assistant[0]}{{{{ m.content | trim }}}}{assistant[1]}"
        f"{{% else %}}{user[0]}{{{{ said.system }}}}{{{{ m.content | trim }}}}{user[1]}{{% set said.system = '' %}}"
        f"{{% endif %}}{{% endfor %}}"
        f"{{% if said.system %}}{user[0]}{{{{ said.system | trim }}}}{user[1]}{{% endif %}}"
        f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )


FORMATS: Final[Mapping[str, ChatFormat]] = MappingProxyType(
    {
        "chatml": ChatFormat(
            _roles(
                "",
                "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
                "<|im_start|>assistant\n",
            ),
            ("<|im_end|>",),
        ),
        "gemma": ChatFormat(
            _turns(
                _begin("<bos>"),
                ("<start_of_turn>user\n", "<end_of_turn>\n"),
                ("<start_of_turn>model\n", "<end_of_turn>\n"),
                "<start_of_turn>model\n",
            ),
            ("<end_of_turn>",),
        ),
        "llama2": ChatFormat(
            _turns(
                "",
                (f"{_begin('<s>')}[INST] ", " [/INST]"),
                (" ", f" {_END}"),
                system=("<<SYS>>\\n", "\\n<</SYS>>\\n\\n"),
            ),
            ("</s>",),
        ),
        "llama3": ChatFormat(
            _roles(
                _begin("<|begin_of_text|>"),
                # Results of tools come from "ipython" since Llama 3.1.
                "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
                "{{ m.content | trim }}<|eot_id|>",
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            ("<|eot_id|>", "<|eom_id|>"),
        ),
        # Of Mistral-7B-Instruct v0.1 and v0.2 and of Mixtral-8x7B.
        "mistral-v1": ChatFormat(
            _turns(_begin("<s>"), (" [INST] ", " [/INST]"), (" ", _END)),
            ("</s>",),
        ),
        # Of Mistral-7B-Instruct v0.3, Mixtral-8x22B and their contemporaries.
        "mistral-v3": ChatFormat(
            _turns(_begin("<s>"), ("[INST] ", "[/INST]"), (" ", _END)),
            ("</s>",),
        ),
        # With the tokenizer Tekken: Nemo, Ministral.
        "mistral-tekken": ChatFormat(
            _turns(_begin("<s>"), ("[INST]", "[/INST]"), ("", _END)),
            ("</s>",),
        ),
        "phi3": ChatFormat(
            _roles(
                "",
                "<|{{ 'user' if m.role == 'tool' else m.role }}|>\n{{ m.content }}<|end|>\n",
                "<|assistant|>\n",
            ),
            ("<|end|>", "<|endoftext|>"),
        ),
        "zephyr": ChatFormat(
            _roles(
                "",
                f"<|{{{{ 'user' if m.role == 'tool' else m.role }}}}|>\n{{{{ m.content }}}}{_END}\n",
                "<|assistant|>\n",
            ),
            ("</s>",),
        ),
    }
)
"""Name to format."""
