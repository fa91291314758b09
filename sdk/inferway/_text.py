"""Text in, text out: bodies of the routes under ``/v1``, and what their answers mean. Pure, shared by both clients.

Results are plain values of the SDK's own, not the contract's pydantic models: a streamed answer is hundreds of small
events, and reading one must cost next to nothing. Members that this version does not know are kept in ``raw``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

from ._core import Call, Reply, json_call, load_json, path_of
from ._errors import APIResponseValidationError, ConfigurationError, InvalidInputError, MalformedAnswer
from ._options import OPTION_NAMES, RequestOptions

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Messages: TypeAlias = "str | Sequence[Mapping[str, Any] | ChatMessage]"
"""Messages of a conversation, oldest first; a plain text is one message of the user's."""
_JSON_TYPES: Final = ("object", "array", "string", "number", "integer", "boolean", "null")


class GenerationParameters(RequestOptions, total=False):
    """How an answer is drawn. What is left out, or None, is the model's own default.

    Keys:
        max_tokens: of the answer.
        temperature: 0 takes the likeliest token each time.
        top_p, top_k, min_p: which tokens are drawn from.
        repetition_penalty, presence_penalty, frequency_penalty: against saying the same again.
        seed: the same seed, request and model version give the same answer.
        stop: texts at which the answer ends; they are no part of it.
        n: answers.
        logit_bias: token id to what is added to its logit.
        guided_json, guided_regex, guided_choice, guided_grammar: a JSON schema, a regular expression, texts, or a Lark
            grammar that the answer follows.
        priority: which waiting request gets the next place; 1 is first, and one that says nothing last.
        extra_body: further members of the request, for servers that know more.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    n: int | None
    logit_bias: Mapping[int | str, float] | None
    guided_json: Mapping[str, Any] | str | None
    guided_regex: str | None
    guided_choice: Sequence[str] | None
    guided_grammar: str | None
    priority: int | None
    user: str | None
    extra_body: Mapping[str, Any] | None


class ChatParameters(GenerationParameters, total=False):
    """`GenerationParameters`, and those that only a chat has.

    Keys:
        logprobs, top_logprobs: tell how likely each token was, and so many others in its place.
        parallel_tool_calls: False for one tool call at most.
        chat_template_kwargs: variables of the model's chat template.
    """

    max_completion_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None
    parallel_tool_calls: bool | None
    chat_template_kwargs: Mapping[str, Any] | None


class CompletionParameters(GenerationParameters, total=False):
    """`GenerationParameters`, and those that only a completion has.

    Keys:
        logprobs: tell how likely each token was, and so many others in its place.
        echo: begin the answer with the prompt.
    """

    logprobs: int | None
    echo: bool | None


# --- results -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. ``cached_tokens`` are those of the prompt that the model knew already."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model asks for.

    Attributes:
        id: what the answer to the call is sent under, as ``tool_call_id``.
        arguments: JSON, as the model wrote it.
    """

    id: str
    name: str
    arguments: str
    _tool: Any = field(default=None, repr=False, compare=False)

    @property
    def parsed(self) -> Any:
        """The arguments: an instance of the pydantic model that the tool was given as, else the decoded JSON.

        Raises:
            APIResponseValidationError: the model wrote something else.
        """
        return _parsed(self.arguments, self._tool, f"the arguments of the tool call {self.name}")

    def to_dict(self) -> dict[str, Any]:
        """As it is sent back in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of a conversation. Those of answers can be put into the next request as they are."""

    role: str
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    refusal: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it is sent back."""
        made: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            made["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        if self.refusal is not None:
            made["refusal"] = self.refusal
        return made


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One of the answers to a request.

    Attributes:
        finish_reason: ``stop``, ``length`` (cut at ``max_tokens``) or ``tool_calls``; None in the partial result of a
            stream that was cut.
        logprobs: one mapping for each token, where they were asked for.
    """

    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """An answer of a language model.

    Attributes:
        model: name of the model that answered.
        choices: one, or as many as ``n`` asked for.
        usage: tokens; None where the server did not say.
        raw: the answer's body as it came; of a stream its last event.
    """

    id: str
    model: str
    created: int
    choices: tuple[ChatChoice, ...]
    usage: Usage | None = None
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)
    _format: Any = field(default=None, repr=False, compare=False)

    @property
    def message(self) -> ChatMessage:
        """The first answer's message."""
        return self.choices[0].message if self.choices else ChatMessage("assistant", None)

    @property
    def text(self) -> str:
        """The first answer's text; empty where it is only tool calls."""
        return self.message.content or ""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first answer's tool calls."""
        return self.message.tool_calls

    @property
    def finish_reason(self) -> str | None:
        """Why the first answer ended, see `ChatChoice`."""
        return self.choices[0].finish_reason if self.choices else None

    @property
    def parsed(self) -> Any:
        """The first answer as what ``response_format`` asked for: an instance of the pydantic model, or decoded JSON.

        None where no format was asked for, or where the answer is tool calls alone.

        Raises:
            APIResponseValidationError: the text is not of that form, for example because it was cut at ``max_tokens``.
        """
        if self._format is None or self.message.content is None:
            return None
        return _parsed(self.message.content, self._format, "the answer", self.finish_reason)


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One of the continuations of a prompt; ``finish_reason`` as in `ChatChoice`."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A continuation of a prompt. Attributes as in `ChatCompletion`."""

    id: str
    model: str
    created: int
    choices: tuple[CompletionChoice, ...]
    usage: Usage | None = None
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    @property
    def text(self) -> str:
        """The first continuation."""
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> str | None:
        """Why the first continuation ended, see `ChatChoice`."""
        return self.choices[0].finish_reason if self.choices else None


# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """The next piece of an answer's text.

    Attributes:
        choice: which answer; 0 unless ``n`` asked for several.
    """

    text: str
    choice: int = 0
    type: Literal["content"] = "content"


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The next piece of a tool call.

    Attributes:
        index: which call of the answer.
        id, name: of the call, known from its first piece on.
        arguments: the next piece of its JSON.
    """

    index: int
    id: str
    name: str
    arguments: str
    choice: int = 0
    type: Literal["tool_call"] = "tool_call"


@dataclass(frozen=True, slots=True)
class Finish:
    """An answer is complete; ``reason`` as in `ChatChoice.finish_reason`."""

    reason: str
    choice: int = 0
    type: Literal["finish"] = "finish"


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Tokens of the whole request; the last event of a stream."""

    usage: Usage
    type: Literal["usage"] = "usage"


StreamEvent: TypeAlias = ContentDelta | ToolCallDelta | Finish | UsageReport


# --- formats and tools -------------------------------------------------------------------------------------------


def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _parsed(text: str, kind: Any, what: str, finish_reason: str | None = "stop") -> Any:
    try:
        return json.loads(text) if kind is None or kind is dict else _adapter(kind).validate_json(text)
    except (ValueError, RecursionError) as error:
        cut = "; it was cut at max_tokens" if finish_reason == "length" else ""
        raise APIResponseValidationError(f"{what} is not of the form that was asked for{cut}: {error}", body=text[:1024]
                                         ) from error  # fmt: skip


def _closed(schema: Any) -> Any:
    """A schema whose objects have no members but those it names, unless it says otherwise.

    A pydantic model passes over members that it does not know; a language model that may write them might never end.
    """
    if isinstance(schema, list):
        return [_closed(item) for item in cast(list[object], schema)]
    if not isinstance(schema, dict):
        return schema
    made = {name: _closed(value) for name, value in cast(dict[str, Any], schema).items()}
    if "properties" in made and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def _schema_of(kind: Any, what: str) -> dict[str, Any]:
    from pydantic import PydanticSchemaGenerationError
    from pydantic.errors import PydanticInvalidForJsonSchema

    try:
        return cast(dict[str, Any], _closed(_adapter(kind).json_schema()))
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema) as error:
        raise ConfigurationError(f"{what} has no JSON schema: {error}") from error


def response_format_of(value: object) -> tuple[dict[str, Any] | None, Any]:
    """``response_format`` as it is sent, and what answers are read as: None for text, ``dict`` for plain JSON.

    Args:
        value: a pydantic model or any other type that pydantic knows, a JSON schema, the wire's own form, or ``json``.
    """
    if value is None or value == "text":
        return None, None
    if value in ("json", "json_object"):
        return {"type": "json_object"}, dict
    if isinstance(value, Mapping):
        given = dict(cast(Mapping[str, Any], value))
        kind = given.get("type")
        if isinstance(kind, str) and kind not in _JSON_TYPES:
            return given, dict if kind.startswith("json") else None
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given, "strict": True}}, dict
    if isinstance(value, str):
        raise ConfigurationError(f"response_format expects a type, a JSON schema or 'json', got {value!r:.80}")
    name = getattr(value, "__name__", "answer")
    schema = _schema_of(value, "response_format")
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}, value


def tools_of(tools: Iterable[Any] | None) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
    """Tools as they are sent, and the types among them by name.

    A tool is a pydantic model, whose name and docstring tell the language model what it is for; a mapping with ``name``
    and ``parameters``; or the wire's own form.
    """
    if tools is None:
        return None, {}
    sent: list[dict[str, Any]] = []
    kinds: dict[str, Any] = {}
    for tool in tools:
        if isinstance(tool, Mapping):
            given = dict(cast(Mapping[str, Any], tool))
            sent.append(given if "function" in given else {"type": "function", "function": given})
            continue
        if not isinstance(tool, type):
            raise ConfigurationError(f"a tool is a pydantic model or a mapping, got {type(tool).__name__}")
        schema = _schema_of(tool, f"the tool {tool.__name__}")
        function: dict[str, Any] = {"name": tool.__name__, "parameters": schema}
        about = schema.pop("description", None) or tool.__doc__
        if about:
            function["description"] = about
        sent.append({"type": "function", "function": function})
        kinds[tool.__name__] = tool
    return sent, kinds


def tool_choice_of(choice: object) -> Any:
    """``auto``, ``none``, ``required``, or a tool by its name or type."""
    if choice is None or isinstance(choice, Mapping) or choice in ("auto", "none", "required"):
        return cast(object, choice)
    name = choice if isinstance(choice, str) else getattr(choice, "__name__", None)
    if not isinstance(name, str):
        raise ConfigurationError(f"tool_choice expects auto, none, required or a tool, got {type(choice).__name__}")
    return {"type": "function", "function": {"name": name}}


# --- requests ----------------------------------------------------------------------------------------------------


def split(parameters: Mapping[str, Any], known: frozenset[str]) -> tuple[dict[str, Any], RequestOptions]:
    """Keyword arguments as members of a body and options of the request.

    Raises:
        TypeError: a name that is neither.
    """
    body: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in parameters.items():
        if name in OPTION_NAMES:
            options[name] = value
        elif name not in known:
            raise TypeError(
                f"unexpected keyword argument: {name}; a member that only this server knows goes into extra_body"
            )
        elif value is not None and name != "extra_body":
            body[name] = _plain(name, value)
    body.update(parameters.get("extra_body") or {})
    return body, cast(RequestOptions, options)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        mapping = cast(Mapping[object, object], value)
        return {str(key): item for key, item in mapping.items()} if name == "logit_bias" else dict(mapping)
    return list(cast(Iterable[Any], value)) if isinstance(value, list | tuple | set | frozenset) else value


CHAT_NAMES: Final = frozenset(ChatParameters.__annotations__) - OPTION_NAMES
COMPLETION_NAMES: Final = frozenset(CompletionParameters.__annotations__) - OPTION_NAMES


def checked_model(model: object) -> str:
    """A model's name as ``/v1`` takes it: ``NAME``, ``NAME@ALIAS``, ``NAME:ADAPTER``. Raises ConfigurationError."""
    if not isinstance(model, str) or not model:
        raise ConfigurationError(f"expected a model's name as text, got {model!r:.80}")
    return model


def messages_of(messages: Messages) -> list[dict[str, Any]]:
    """Messages as they are sent. Raises InvalidInputError for what is none; the gateway checks the rest."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    made: list[dict[str, Any]] = []
    if isinstance(messages, Mapping) or not isinstance(messages, Iterable):
        raise InvalidInputError(f"expected a list of messages or a text, got {type(messages).__name__}")
    for index, message in enumerate(messages):
        if isinstance(message, ChatMessage):
            made.append(message.to_dict())
        elif isinstance(message, Mapping):
            made.append(dict(message))
        else:
            raise InvalidInputError(
                f"messages[{index}] expects a mapping with role and content, got {type(message).__name__}"
            )
    return made


class ChatRequest:
    """One chat: its call, and how its answers are read."""

    __slots__ = ("call", "format", "options", "tools")

    def __init__(
        self,
        messages: Messages,
        model: str,
        stream: bool,
        response_format: object,
        tools: Iterable[Any] | None,
        tool_choice: object,
        parameters: Mapping[str, Any],
    ) -> None:
        more, self.options = split(parameters, CHAT_NAMES)
        sent_format, self.format = response_format_of(response_format)
        sent_tools, self.tools = tools_of(tools)
        asked = {"response_format": sent_format, "tools": sent_tools, "tool_choice": tool_choice_of(tool_choice)}
        body = {
            "model": checked_model(model),
            "messages": messages_of(messages),
            **{name: value for name, value in asked.items() if value is not None},
            **_streamed(stream),
            **more,
        }
        self.call: Call[ChatCompletion] = post("chat/completions", body, self.read, stream)

    def read(self, reply: Reply) -> ChatCompletion:
        """A whole answer."""
        body = body_of(reply)
        return ChatCompletion(
            id=text_of(body, "id", ""),
            model=text_of(body, "model", ""),
            created=whole_of(body, "created", 0),
            choices=tuple(
                ChatChoice(
                    index=whole_of(choice, "index", at),
                    message=self._message(object_of(choice, "message")),
                    finish_reason=text_of(choice, "finish_reason"),
                    logprobs=_logprobs(choice),
                )
                for at, choice in enumerate(objects_of(body, "choices"))
            ),
            usage=usage_of(body),
            raw=body,
            _format=self.format,
        )

    def _message(self, message: dict[str, Any]) -> ChatMessage:
        calls: list[ToolCall] = []
        for call in objects_of(message, "tool_calls", optional=True):
            function = object_of(call, "function")
            name = text_of(function, "name", "")
            arguments = text_of(function, "arguments", "")
            calls.append(ToolCall(text_of(call, "id", ""), name, arguments, self.tools.get(name)))
        return ChatMessage(
            role=text_of(message, "role", "assistant"),
            content=text_of(message, "content"),
            tool_calls=tuple(calls),
            refusal=text_of(message, "refusal"),
        )

    def gather(self) -> Gathering:
        """What collects the events of a stream."""
        return Gathering(self.format, self.tools)


class CompletionRequest:
    """One completion: its call, and how its answers are read."""

    __slots__ = ("call", "options")

    def __init__(self, prompt: object, model: str, stream: bool, parameters: Mapping[str, Any]) -> None:
        more, self.options = split(parameters, COMPLETION_NAMES)
        body = {"model": checked_model(model), "prompt": prompt, **_streamed(stream), **more}
        self.call: Call[Completion] = post("completions", body, self.read, stream)

    def read(self, reply: Reply) -> Completion:
        """A whole answer."""
        body = body_of(reply)
        return Completion(
            id=text_of(body, "id", ""),
            model=text_of(body, "model", ""),
            created=whole_of(body, "created", 0),
            choices=tuple(
                CompletionChoice(
                    index=whole_of(choice, "index", at),
                    text=text_of(choice, "text", ""),
                    finish_reason=text_of(choice, "finish_reason"),
                    logprobs=cast("dict[str, Any] | None", choice.get("logprobs")),
                )
                for at, choice in enumerate(objects_of(body, "choices"))
            ),
            usage=usage_of(body),
            raw=body,
        )

    def gather(self) -> CompletionGathering:
        """What collects the events of a stream."""
        return CompletionGathering()


def _streamed(stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}


def post(path: str, body: Mapping[str, Any], read: Any, stream: bool = False) -> Call[Any]:
    """A call of a route under ``/v1``. Raises InvalidInputError where the body cannot be written as JSON."""
    try:
        call = json_call("POST", path_of("v1", *path.split("/")), read, body)
        if stream:
            call.body_headers += (("Accept", "text/event-stream"),)
        return call
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"the request cannot be written as JSON: {error}") from error


# --- reading -----------------------------------------------------------------------------------------------------


def body_of(reply: Reply) -> dict[str, Any]:
    """An answer's body as an object; it and the next four raise `MalformedAnswer`."""
    found = load_json(reply.body)
    if not isinstance(found, dict):
        raise MalformedAnswer(f"expected a JSON object, got {type(found).__name__}")
    return cast(dict[str, Any], found)


def object_of(owner: dict[str, Any], name: str) -> dict[str, Any]:
    """A member that is an object."""
    found = owner.get(name)
    if not isinstance(found, dict):
        raise MalformedAnswer(f"expected '{name}' to be an object, got {type(found).__name__}")
    return cast(dict[str, Any], found)


def objects_of(owner: dict[str, Any], name: str, *, optional: bool = False) -> list[dict[str, Any]]:
    """A member that is a list of objects."""
    found: object = owner.get(name)
    kind = type(found).__name__
    if found is None and optional:
        return []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in cast(list[object], found)):
        raise MalformedAnswer(f"expected '{name}' to be a list of objects, got {kind}")
    return cast(list[dict[str, Any]], found)


def text_of(owner: dict[str, Any], name: str, default: Any = None) -> Any:
    """A member that is a text; ``default`` where it is missing or null."""
    found = owner.get(name)
    if found is None:
        return default
    if not isinstance(found, str):
        raise MalformedAnswer(f"expected '{name}' to be a text, got {type(found).__name__}")
    return found


def whole_of(owner: dict[str, Any], name: str, default: int) -> int:
    """A member that is a whole number; ``default`` where it is missing or null."""
    found = owner.get(name)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise MalformedAnswer(f"expected '{name}' to be a whole number, got {type(found).__name__}")
    return int(found)


def usage_of(body: dict[str, Any]) -> Usage | None:
    """The tokens that an answer tells of; None where it does not."""
    if body.get("usage") is None:
        return None
    usage = object_of(body, "usage")
    prompt, completion = whole_of(usage, "prompt_tokens", 0), whole_of(usage, "completion_tokens", 0)
    details = usage.get("prompt_tokens_details")
    cached = whole_of(cast(dict[str, Any], details), "cached_tokens", 0) if isinstance(details, dict) else 0
    return Usage(prompt, completion, whole_of(usage, "total_tokens", prompt + completion), cached)


def _logprobs(choice: dict[str, Any]) -> tuple[Mapping[str, Any], ...]:
    found = choice.get("logprobs")
    return tuple(objects_of(cast(dict[str, Any], found), "content", optional=True)) if isinstance(found, dict) else ()


def error_of(event: dict[str, Any]) -> dict[str, Any] | None:
    """What an error event inside a stream says; None for any other event."""
    found = event.get("error")
    if found is None:
        return None
    return cast(dict[str, Any], found) if isinstance(found, dict) else {"message": str(found)}


# --- streams -----------------------------------------------------------------------------------------------------


class _Call:
    """A tool call while it comes in."""

    __slots__ = ("arguments", "id", "name")

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.arguments: list[str] = []


class _Answer:
    """One answer while it comes in."""

    __slots__ = ("calls", "finish_reason", "logprobs", "refusal", "role", "text")

    def __init__(self) -> None:
        self.role = "assistant"
        self.text: list[str] = []
        self.refusal: list[str] = []
        self.calls: dict[int, _Call] = {}
        self.logprobs: list[Mapping[str, Any]] = []
        self.finish_reason: str | None = None


class _Gathering:
    """Head and answers of a stream, as far as they have come."""

    def __init__(self) -> None:
        self.answers: dict[int, _Answer] = {}
        self.usage: Usage | None = None
        self._last: dict[str, Any] = {}
        self._head = ("", "", 0)

    @property
    def complete(self) -> bool:
        """Every answer that has begun has ended."""
        return bool(self.answers) and all(answer.finish_reason for answer in self.answers.values())

    def add(self, chunk: dict[str, Any]) -> Iterator[StreamEvent]:
        """Take a chunk in, and tell what is new in it."""
        if not self._last:
            self._head = (text_of(chunk, "id", ""), text_of(chunk, "model", ""), whole_of(chunk, "created", 0))
        self._last = chunk
        for at, choice in enumerate(objects_of(chunk, "choices", optional=True)):
            index = whole_of(choice, "index", at)
            answer = self.answers.get(index)
            if answer is None:
                answer = self.answers[index] = _Answer()
            yield from self._choice(answer, choice, index)
            answer.logprobs.extend(_logprobs(choice))
            reason = text_of(choice, "finish_reason")
            if reason is not None and answer.finish_reason is None:
                answer.finish_reason = reason
                yield Finish(reason, index)
        usage = usage_of(chunk)
        if usage is not None:
            self.usage = usage
            if not chunk.get("choices"):
                yield UsageReport(usage)

    def _choice(self, answer: _Answer, choice: dict[str, Any], index: int) -> Iterator[StreamEvent]:
        raise NotImplementedError


class Gathering(_Gathering):
    """Collects the chunks of a streamed chat."""

    def __init__(self, kind: Any, tools: dict[str, Any]) -> None:
        super().__init__()
        self._format = kind
        self._tools = tools

    def _choice(self, answer: _Answer, choice: dict[str, Any], index: int) -> Iterator[StreamEvent]:
        if choice.get("delta") is None:
            return
        delta = object_of(choice, "delta")
        answer.role = text_of(delta, "role", answer.role)
        text = text_of(delta, "content", "")
        if text:
            answer.text.append(text)
            yield ContentDelta(text, index)
        refusal = text_of(delta, "refusal", "")
        if refusal:
            answer.refusal.append(refusal)
        for at, piece in enumerate(objects_of(delta, "tool_calls", optional=True)):
            number = whole_of(piece, "index", at)
            call = answer.calls.setdefault(number, _Call())
            call.id = text_of(piece, "id", "") or call.id
            arguments = ""
            if piece.get("function") is not None:
                function = object_of(piece, "function")
                call.name = text_of(function, "name", "") or call.name
                arguments = text_of(function, "arguments", "")
                call.arguments.append(arguments)
            yield ToolCallDelta(number, call.id, call.name, arguments, index)

    def snapshot(self) -> ChatCompletion:
        """The answer as far as it has come."""
        key, model, created = self._head
        return ChatCompletion(
            id=key,
            model=model,
            created=created,
            choices=tuple(self._made(index, answer) for index, answer in sorted(self.answers.items())),
            usage=self.usage,
            raw=self._last,
            _format=self._format,
        )

    def _made(self, index: int, answer: _Answer) -> ChatChoice:
        calls = tuple(
            ToolCall(call.id, call.name, "".join(call.arguments), self._tools.get(call.name))
            for _, call in sorted(answer.calls.items())
        )
        content = "".join(answer.text) if answer.text or not calls else None
        message = ChatMessage(answer.role, content, calls, "".join(answer.refusal) or None)
        return ChatChoice(index, message, answer.finish_reason, tuple(answer.logprobs))


class CompletionGathering(_Gathering):
    """Collects the chunks of a streamed completion."""

    def _choice(self, answer: _Answer, choice: dict[str, Any], index: int) -> Iterator[StreamEvent]:
        if isinstance(choice.get("logprobs"), dict):
            answer.logprobs.append(object_of(choice, "logprobs"))
        text = text_of(choice, "text", "")
        if text:
            answer.text.append(text)
            yield ContentDelta(text, index)

    def snapshot(self) -> Completion:
        """The continuation as far as it has come."""
        key, model, created = self._head
        return Completion(
            id=key,
            model=model,
            created=created,
            choices=tuple(
                CompletionChoice(index, "".join(answer.text), answer.finish_reason, _joined(answer.logprobs))
                for index, answer in sorted(self.answers.items())
            ),
            usage=self.usage,
            raw=self._last,
        )


def _joined(parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Log probabilities of a streamed completion, whose lists come in pieces; None: there are none."""
    if not parts:
        return None
    names = {name: None for part in parts for name in part}  # in their order
    return {name: [item for part in parts for item in cast("list[Any]", part.get(name) or [])] for name in names}
