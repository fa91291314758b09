"""Tools: what a model is told of them, what holds its answer to a call, and how calls are found in its text.

Models write calls in a few ways, and all of them have JSON at heart: ``<tool_call>{"name": …, "arguments": {…}}
</tool_call>`` (Hermes, Qwen, SmolLM), ``[TOOL_CALLS] [{…}]`` (Mistral), or the JSON alone, with ``parameters`` in
place of ``arguments`` (Llama). A template that knows tools says which way its model was taught; one that does not is
given the first. Where a call is demanded, the answer is held to a JSON array of calls whose arguments fit their
schemas.

``CallParser`` takes the text as it comes. Once the name is known, the arguments' own text is passed on piece by piece.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final, Literal

from inferway_contract import models as contract

from ...core.errors import InvalidParameterError
from ...core.generation import Constraint

_MARKERS: Final = ("<tool_call>", "[TOOL_CALLS]")
_ENDS: Final = ("</tool_call>",)
_HEAD: Final = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_MAY_BE_HEAD: Final = 4096
"""Characters within which a call's name and the beginning of its arguments are looked for; then the call is read as a
whole."""
_MOST_CALL_CHARACTERS: Final = 1 << 20
MAX_SCHEMA_BYTES: Final = 64 * 1024
"""Of all tools' parameters together, where an answer is held to them."""
MAX_DEPTH: Final = 64
"""Of JSON that a template or a grammar gets to see: what walks through it does so recursively."""
_NO_ARGUMENTS: Final[dict[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}

_LITERAL: Final = frozenset({"const", "enum", "default", "examples", "required"})
"""Members of a schema that hold values, and no schemas."""
_NAMED: Final = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
"""Members of a schema that hold schemas by names of somebody's choice."""

Choice = Literal["none", "auto", "forced"]


@dataclass(frozen=True, slots=True)
class Tools:
    """What a chat may call.

    Attributes:
        offered: as the template is told, without those that may not be called.
        choice: forced: the answer is calls and nothing else.
        single: at most one call.
    """

    offered: tuple[dict[str, Any], ...]
    names: frozenset[str]
    choice: Choice
    single: bool

    def constraint(self) -> Constraint | None:
        """What the answer is held to, where a call is demanded."""
        if self.choice != "forced":
            return None
        definitions: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        left = MAX_SCHEMA_BYTES
        for index, tool in enumerate(self.offered):
            parameters = tool["function"].get("parameters")
            left -= len(json.dumps(parameters))
            if left < 0:
                raise InvalidParameterError(
                    f"tools: expected parameters of at most {MAX_SCHEMA_BYTES} bytes in all where a call is demanded",
                    "tools",
                )
            arguments, refers = _moved(_schema(parameters), f"#/$defs/{index}")
            if refers:  # it goes where its references find it
                definitions[str(index)] = arguments
                arguments = {"$ref": f"#/$defs/{index}"}
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": tool["function"]["name"]}, "arguments": arguments},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
        schema: dict[str, Any] = {
            "type": "array",
            "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
            "minItems": 1,
            "maxItems": 1 if self.single else 16,
        }
        if definitions:
            schema["$defs"] = definitions
        # Space between members says nothing, and a model that begins with it may not end.
        schema["x-guidance"] = {"whitespace_flexible": False}
        return Constraint("json_schema", json.dumps(schema))


def read_tools(body: contract.ChatCompletionRequest) -> Tools:
    """What a request says of tools.

    Raises:
        InvalidParameterError: it demands a call and offers no tool, names one that is not there, or one name twice.
    """
    tools = body.tools or []
    names = [tool.function.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            param = f"tools[{index}].function.name"
            raise InvalidParameterError(f"{param}: expected each name once, got '{name}' twice", param)
        if depth(tools[index].function.parameters) > MAX_DEPTH:
            param = f"tools[{index}].function.parameters"
            raise InvalidParameterError(f"{param}: expected at most {MAX_DEPTH} levels", param)
    wanted = body.tool_choice
    single = body.parallel_tool_calls is False
    choice: Choice = "auto" if tools else "none"
    if isinstance(wanted, contract.NamedToolChoice):
        if wanted.function.name not in names:
            param = "tool_choice.function.name"
            raise InvalidParameterError(f"{param}: expected the name of one of the tools", param)
        tools = [tools[names.index(wanted.function.name)]]
        choice, single = "forced", True
    elif wanted == "required":
        if not tools:
            raise InvalidParameterError("tool_choice: 'required' needs tools", "tool_choice")
        choice = "forced"
    elif wanted == "none":
        choice, tools = "none", []
    offered = tuple(_plain(tool) for tool in tools)
    return Tools(offered, frozenset(tool["function"]["name"] for tool in offered), choice, single)


def depth(value: Any) -> int:
    """Levels of JSON inside of one another."""
    levels, inner = 0, [value]
    while inner := [one for one in inner if isinstance(one, dict | list)]:
        levels += 1
        inner = [deep for one in inner for deep in (one.values() if isinstance(one, dict) else one)]
    return levels


def _plain(tool: contract.FunctionTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name, "description": tool.function.description or ""}
    function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    if not parameters or (parameters.get("type") in (None, "object") and not parameters.get("properties")):
        return dict(parameters) if parameters and len(parameters) > 2 else dict(_NO_ARGUMENTS)
    schema: dict[str, Any] = _closed({"type": "object", **parameters})
    return schema


def _closed(node: Any) -> Any:
    """A schema whose objects have the members that it names and no others: a function has no use for an argument that
    nobody wrote down, and a small model has no end of ideas."""
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    closed: dict[str, Any] = {}
    for name, member in node.items():
        if name in _NAMED and isinstance(member, dict):
            closed[name] = {key: _closed(schema) for key, schema in member.items()}
        else:
            closed[name] = member if name in _LITERAL else _closed(member)
    if isinstance(closed.get("properties"), dict) and closed.get("type", "object") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def _moved(node: Any, base: str) -> tuple[Any, bool]:
    """A schema whose references are good where it no longer is the root, and whether it has any.

    Args:
        base: what the schema is called in the new root, such as ``#/$defs/0``.
    """
    refers = False

    def move(node: Any) -> Any:
        nonlocal refers
        if isinstance(node, list):
            return [move(item) for item in node]
        if not isinstance(node, dict):
            return node
        moved = {name: member if name in _LITERAL else move(member) for name, member in node.items()}
        target = node.get("$ref")
        if isinstance(target, str) and target.startswith("#"):
            refers = True
            moved["$ref"] = base + target[1:]
        return moved

    return move(node), refers


def instructions(tools: Tools) -> str:
    """What a model is told of its tools where its template has no words for them."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools.offered)
    if tools.choice == "forced":
        how = 'Answer with a JSON array of calls and nothing else: [{"name": NAME, "arguments": {…}}]'
    else:
        how = 'To call one, write <tool_call>{"name": NAME, "arguments": {…}}</tool_call> for each call.'
    return f"You can call these functions, described as JSON schemas:\n{listed}\n{how}"


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of a call. ``id`` and ``name`` are set in its first."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


def call_id() -> str:
    return "call_" + secrets.token_hex(12)


class CallParser:
    """Finds calls in a text that comes in pieces.

    Args:
        names: of the functions that there are; what calls another stays text.
        forced: the text is a JSON array of calls, so that nothing else needs to be looked for.
    """

    def __init__(self, names: Collection[str], *, forced: bool) -> None:
        self._names = names
        self._forced = forced
        self._held = ""
        self._state: Literal["start", "text", "calls", "arguments", "rest"] = "calls" if forced else "start"
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._began = ""  # what is given back as text where no call follows
        self._spoke = False  # there was text since the last call
        self._found = False  # there was a call since it was last looked for
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """The next piece of text; gives what of it, and of what was held back, is content, and pieces of calls."""
        self._held += text
        return self._work(over=False)

    def finish(self) -> tuple[str, list[CallPiece]]:
        """What was held back, now that no more comes."""
        content, pieces = self._work(over=True)
        rest, self._held = self._began + self._held, ""
        if self._state in ("arguments", "rest") or self._forced or (self.calls and not rest.strip()):
            rest = ""
        return content + rest, pieces

    def _work(self, *, over: bool) -> tuple[str, list[CallPiece]]:
        content: list[str] = []
        pieces: list[CallPiece] = []
        while self._held and self._step(content, pieces, over=over):
            pass
        return "".join(content), pieces

    def _step(self, content: list[str], pieces: list[CallPiece], *, over: bool) -> bool:
        """Do one thing; False where more text is needed."""
        if self._state == "start":
            return self._start(over=over)
        if self._state == "text":
            return self._text(content, over=over)
        if self._state == "arguments":
            return self._arguments(pieces)
        if self._state == "rest":
            return self._rest()
        return self._call(content, pieces, over=over)

    def _start(self, *, over: bool) -> bool:
        bare = self._held.lstrip()
        if not bare:
            return False
        if bare[0] in "{[" and not any(marker.startswith(bare[: len(marker)]) for marker in _MARKERS):
            self._state = "calls"
        elif not over and any(marker.startswith(bare) and marker != bare for marker in _MARKERS):
            return False
        else:
            self._state = "text"
        return True

    def _text(self, content: list[str], *, over: bool) -> bool:
        held = self._held
        found = [(at, marker) for marker in _MARKERS if (at := held.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            said = held[:at] if self._spoke or held[:at].strip() else ""
            content.append(said)
            self._began, self._held = held[len(said) : at] + marker, held[at + len(marker) :]
            self._state, self._found = "calls", False
            return True
        keep = 0
        if not over:
            for marker in _MARKERS:
                for length in range(min(len(marker) - 1, len(held)), keep, -1):
                    if held.endswith(marker[:length]):
                        keep = length
                        break
        if not self._spoke and not held[: len(held) - keep].strip():
            return False  # space before a call, or between two, is none of the answer
        self._spoke = True
        content.append(held[: len(held) - keep])
        self._held = held[len(held) - keep :]
        return False

    def _call(self, content: list[str], pieces: list[CallPiece], *, over: bool) -> bool:
        """Look for the beginning of a call, where nothing but JSON, and what stands between calls, may be."""
        held = self._held
        at = 0
        while at < len(held) and held[at] in " \t\r\n[,":
            at += 1
        if at == len(held):
            return False
        if held[at] != "{":
            return self._between(held, at, content, over=over)
        head = _HEAD.match(held, at)
        if head is not None and self._known(head[1]):
            pieces.append(self._begin(json.loads(head[1])))
            self._held = held[head.end() :]
            self._depth, self._quoted, self._escaped = 0, False, False
            self._state = "arguments"
            return True
        end = _end_of(held, at)
        if end is None:
            if not over and len(held) < _MOST_CALL_CHARACTERS and self._may_be_call(held[at:]):
                return False
            return self._no_call(content)
        return self._whole(held, at, end, content, pieces)

    def _may_be_call(self, text: str) -> bool:
        """Whether an object that has begun may be a call; its first member says so."""
        squeezed = re.sub(r"\s+", "", text[:_MAY_BE_HEAD])
        return any(
            squeezed.startswith(f'{{"{word}":') or f'{{"{word}":'.startswith(squeezed)
            for word in ("name", "arguments", "parameters", "function", "type", "id")
        )

    def _whole(self, held: str, at: int, end: int, content: list[str], pieces: list[CallPiece]) -> bool:
        """A call whose members come in another order, read as a whole."""
        try:
            call = json.loads(held[at:end])
        except ValueError:
            return self._no_call(content)
        function = call.get("function")
        if not isinstance(function, dict):
            function = call
        name = function.get("name", call.get("function"))
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = _object(arguments)
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return self._no_call(content)
        begun = self._begin(name)
        pieces.append(CallPiece(begun.index, json.dumps(arguments, ensure_ascii=False), begun.id, name))
        self._held = held[end:]
        return True

    def _no_call(self, content: list[str]) -> bool:
        """It was text after all: what looked like the beginning of a call is let pass."""
        if self._forced:
            self._held = ""
            return False
        self._spoke = True
        content.append(self._began + self._held[:1])
        self._began, self._held = "", self._held[1:]
        self._state = "text"
        return True

    def _between(self, held: str, at: int, content: list[str], *, over: bool) -> bool:
        rest = held[at:]
        if not self._found and not self._forced:  # brackets around nothing are an answer like any other
            return self._no_call(content)
        for end in _ENDS:
            if rest.startswith(end):
                self._held, self._began = rest[len(end) :], ""
                self._state = "text"
                return True
            if not over and end.startswith(rest):
                return False
        if rest[0] == "]":
            self._held, self._began = rest[1:], ""
            self._state = "text" if not self._forced else "rest"
            return True
        return self._no_call(content)

    def _known(self, quoted: str) -> bool:
        try:
            return json.loads(quoted) in self._names
        except ValueError:
            return False

    def _begin(self, name: str) -> CallPiece:
        self._began, self._spoke, self._found = "", False, True
        piece = CallPiece(self.calls, "", call_id(), name)
        self.calls += 1
        return piece

    def _arguments(self, pieces: list[CallPiece]) -> bool:
        """Pass the arguments' text on, up to the brace that ends it."""
        for at, character in enumerate(self._held):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    pieces.append(CallPiece(self.calls - 1, self._held[: at + 1]))
                    self._held = self._held[at + 1 :]
                    self._state = "rest"
                    return True
        pieces.append(CallPiece(self.calls - 1, self._held))
        self._held = ""
        return False

    def _rest(self) -> bool:
        """Skip to the brace that ends the call."""
        at = self._held.find("}")
        if at < 0:
            self._held = ""
            return False
        self._held = self._held[at + 1 :]
        self._state = "calls"
        return True


def _end_of(text: str, start: int) -> int | None:
    """Where the object that begins at ``start`` ends; None where it does not yet."""
    depth, quoted, escaped = 0, False, False
    for at in range(start, len(text)):
        character = text[at]
        if quoted:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                quoted = False
        elif character == '"':
            quoted = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if not depth:
                return at + 1
    return None


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
