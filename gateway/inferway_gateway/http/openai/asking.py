"""Requests for text to what a language model is asked: sampling, constraints, prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from inferway_contract import models as contract

from ...core.errors import ContextLengthError, InvalidParameterError
from ...core.generation import Constraint, GenerationRequest, Sampling, TextGenerator, check_characters
from .templates import Guarded, TemplateRenderer
from .tools import MAX_DEPTH, Tools, depth, instructions

_MOST_CHOICES: Final = 128
"""Answers of one request for completions, over all its prompts."""
_SEEDS: Final = 1 << 64
_RESERVED: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
"""Variables of templates that are not the caller's to set."""
_KNOWN: Final = 'a well-known one, such as template = "chatml" under [generation] in inferway.toml'
_CONSTRAINT_PARAMS: Final = frozenset(
    {None, "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar"}
)


def read_sampling(body: contract.GenerationOptions, defaults: Sampling) -> Sampling:
    """What a request says, and the model's own defaults where it says nothing."""
    said: dict[str, Any] = {
        name: value
        for name in (
            "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        )
        if (value := getattr(body, name)) is not None
    }  # fmt: skip
    if body.top_k is not None:
        said["top_k"] = max(0, body.top_k)
    if body.seed is not None:
        said["seed"] = body.seed % _SEEDS
    if body.logit_bias:
        said["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return replace(defaults, **said) if said else defaults


def read_constraint(body: contract.GenerationOptions) -> tuple[Constraint | None, str | None]:
    """What the answer is held to, and the member of the request that says so.

    Raises:
        InvalidParameterError: several do, or one is incomplete.
    """
    found: list[tuple[Constraint, str]] = []
    form = body.response_format
    if form is not None and form.type == "json_object":
        found.append((Constraint("json_object"), "response_format"))
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise InvalidParameterError("response_format.json_schema: field required", "response_format.json_schema")
        schema = form.json_schema.schema_
        kind = Constraint("json_object") if schema is None else Constraint("json_schema", json.dumps(schema))
        found.append((kind, "response_format.json_schema.schema"))
    if body.guided_json is not None:
        text = body.guided_json if isinstance(body.guided_json, str) else json.dumps(body.guided_json)
        found.append((Constraint("json_schema", text), "guided_json"))
    if body.guided_regex is not None:
        found.append((Constraint("regex", body.guided_regex), "guided_regex"))
    if body.guided_choice is not None:
        found.append((Constraint("choice", json.dumps(body.guided_choice)), "guided_choice"))
    if body.guided_grammar is not None:
        found.append((Constraint("lark", body.guided_grammar), "guided_grammar"))
    if len(found) > 1:
        raise InvalidParameterError(
            f"{found[1][1]}: expected at most one, beside it there is '{found[0][1]}'", found[1][1]
        )
    return found[0] if found else (None, None)


def read_stop(body: contract.GenerationOptions) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def told(error: InvalidParameterError, *, constraint: str | None, most: str, prompt: str) -> InvalidParameterError:
    """An error of a model about what it was asked, in the words of the request.

    Args:
        constraint: the member that held the answer to a language.
        most: the member that says how long the answer may get.
        prompt: the member that the prompt came from.
    """
    param = error.param
    if constraint is not None and param in _CONSTRAINT_PARAMS:
        param = constraint
    elif param in ("messages", "prompt"):
        param = prompt
    elif param == "max_tokens":
        param = most
    message = error.message
    if param is not None and not isinstance(error, ContextLengthError) and not message.startswith(param):
        message = f"{param}: {message}"
    return type(error)(message, param)


# --- prompts of chats --------------------------------------------------------------------------------------------


def read_messages(messages: Sequence[contract.ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content is text, and arguments of calls are JSON values.

    Raises:
        InvalidParameterError: a message has no content, or content that is no text.
    """
    read = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        content = _content(message, where)
        if content is None and not (message.role == "assistant" and message.tool_calls):
            raise InvalidParameterError(f"{where}.content: expected a text", f"{where}.content")
        entry: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": content or "",
        }
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        if message.tool_calls and message.role == "assistant":
            entry["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
        read.append(entry)
    return read


def _content(message: contract.ChatMessage, where: str) -> str | None:
    content = message.content
    if content is None or isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        place = f"{where}.content[{index}]"
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "refusal"):
            raise InvalidParameterError(
                f"{place}: expected a part of type 'text', got '{part.type[:40]}'; the model reads text alone", place
            )
        if text is None:
            raise InvalidParameterError(f"{place}.{part.type}: expected a text", f"{place}.{part.type}")
        texts.append(text)
    return "".join(texts)


def _call(call: contract.ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # neither NaN nor half a surrogate pair
    except (ValueError, RecursionError):
        param = f"{where}.function.arguments"
        raise InvalidParameterError(f"{param}: expected JSON", param) from None
    if depth(arguments) > MAX_DEPTH:
        param = f"{where}.function.arguments"
        raise InvalidParameterError(f"{param}: expected at most {MAX_DEPTH} levels", param)
    return {
        "id": call.id or "",
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


async def chat_prompt(
    generator: TextGenerator,
    renderer: TemplateRenderer,
    name: str,
    body: contract.ChatCompletionRequest,
    messages: Sequence[dict[str, Any]],
    tools: Tools,
) -> tuple[int, ...]:
    """Token ids of a conversation.

    Raises:
        InvalidParameterError: the model has no template that may be used, or the template refuses or fails.
    """
    template = generator.template
    if template is None:
        raise InvalidParameterError(
            f"expected a model with a chat template, '{name}' has none: save chat_template.jinja beside it, or name "
            f"{_KNOWN}; /v1/completions takes its prompts as they are",
            "model",
        )
    if not template.approved:
        raise InvalidParameterError(
            f"the chat template of '{name}' was not approved: an operator does so with the setting "
            f"INFERWAY_APPROVE_TEMPLATES (approve_templates), or the model's package names {_KNOWN}; /v1/completions "
            "takes prompts as they are",
            "model",
        )
    # Before anything walks through them: a name of a special token grows by twenty characters on its way.
    check_characters(sum(len(message["content"]) for message in messages), generator.context_length)
    if depth(body.chat_template_kwargs) > MAX_DEPTH:
        param = "chat_template_kwargs"
        raise InvalidParameterError(f"{param}: expected at most {MAX_DEPTH} levels", param)
    native = "tools" in template.source
    if not native:
        messages = _in_words(messages, tools)
    guarded = Guarded(generator.special_tokens)
    more = {k: guarded.value(v) for k, v in (body.chat_template_kwargs or {}).items() if k not in _RESERVED}
    variables = {
        **more,
        **template.variables,
        "messages": guarded.value(list(messages)),
        "tools": guarded.value(list(tools.offered)) if native and tools.offered else None,
        "documents": None,
        "add_generation_prompt": True,
    }
    prompt = await renderer.render(template.source, variables)
    return tuple(await guarded.encode(generator, prompt))


def _in_words(messages: Sequence[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    """Messages for a template that knows nothing of tools: they are described, and calls are written out."""
    said = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls:
            texts = [f"<tool_call>{json.dumps(call['function'], ensure_ascii=False)}</tool_call>" for call in calls]
            message = {**message, "content": "\n".join([t for t in (message["content"],) if t] + texts)}
            del message["tool_calls"]
        said.append(message)
    if tools.offered:
        words = instructions(tools)
        if said and said[0]["role"] == "system":
            said[0] = {**said[0], "content": f"{said[0]['content']}\n\n{words}"}
        else:
            said.insert(0, {"role": "system", "content": words})
    return said


# --- prompts of completions --------------------------------------------------------------------------------------


async def plain_prompts(
    generator: TextGenerator, body: contract.CompletionRequest
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Token ids of each prompt, and its text where it is to be repeated.

    Raises:
        InvalidParameterError: too many answers are asked for, or a prompt is empty.
    """
    given = body.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    if len(prompts) * (body.n or 1) > _MOST_CHOICES:
        raise InvalidParameterError(f"prompt: expected at most {_MOST_CHOICES} answers in all", "prompt")
    tokens, texts = [], []
    for index, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        if isinstance(prompt, str):
            ids = await generator.encode(prompt)  # a caller may have applied a template of its own
            begin = list(generator.begin)
            if ids[: len(begin)] != begin:
                ids = begin + ids
            text = prompt
        else:
            ids = prompt
            if max(ids) >= generator.vocabulary_size:
                raise InvalidParameterError(
                    f"{where}: expected token ids from 0 to {generator.vocabulary_size - 1}", where
                )
            text = generator.decode(ids) if body.echo else ""
        if not ids:
            raise InvalidParameterError(f"{where}: expected at least one token", where)
        tokens.append(tuple(ids))
        texts.append(text)
    return tokens, texts


def each_choice(request: GenerationRequest, prompts: Sequence[tuple[int, ...]], n: int) -> list[GenerationRequest]:
    """One request for each answer. With a seed, each answer to a prompt has its own."""
    asked = []
    for prompt in prompts:
        for index in range(n):
            sampling = request.sampling
            if index and sampling.seed is not None:
                sampling = replace(sampling, seed=(sampling.seed + index) % _SEEDS)
            asked.append(replace(request, prompt=prompt, sampling=sampling))
    return asked
