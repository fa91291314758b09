"""Calls are found in a text however it is cut, and what is none stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferway_contract import models as contract
from inferway_gateway.core.errors import InvalidParameterError
from inferway_gateway.http.openai.tools import CallParser, read_tools

QUOTED = '{"x": "}\\"<tool_call>"}'
TEXTS: list[tuple[str, bool, str, list[tuple[str, Any]]]] = [
    ('hello {"a":1} world', False, 'hello {"a":1} world', []),
    ('{"a": 1}', False, '{"a": 1}', []),
    ("[1,2,3]", False, "[1,2,3]", []),
    ("a < b", False, "a < b", []),
    ("  hi", False, "  hi", []),
    ("", False, "", []),
    ("<tool", False, "<tool", []),
    ("<tool_call>oops", False, "<tool_call>oops", []),
    ('{"name": "Bob", "arguments": {}}', False, '{"name": "Bob", "arguments": {}}', []),
    ('{"name": "f", "argum', False, '{"name": "f", "argum', []),
    ('{"name": "f", "parameters": {"a": 1}}', False, "", [("f", {"a": 1})]),
    (
        f'<tool_call>\n{{"name": "f", "arguments": {QUOTED}}}\n</tool_call>\n'
        '<tool_call>{"arguments": {"y":[1]}, "name":"g"}</tool_call>',
        False,
        "",
        [("f", json.loads(QUOTED)), ("g", {"y": [1]})],
    ),
    ('Sure! <tool_call>{"name": "f", "arguments": {}}</tool_call> done', False, "Sure!  done", [("f", {})]),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', False, "", [("f", {"a": 1})]),
    ('{"type":"function","function":{"name":"f","arguments":"{\\"q\\":1}"}}', False, "", [("f", {"q": 1})]),
    (
        '[{"name":"f","arguments":{"a":{"b":1}}},{"name":"g","arguments":{}}]',
        True,
        "",
        [("f", {"a": {"b": 1}}), ("g", {})],
    ),
]


def parse(text: str, forced: bool, cuts: list[int]) -> tuple[str, list[tuple[str, Any]]]:
    parser = CallParser({"f", "g"}, forced=forced)
    content, names, arguments = "", [], []
    ends = [*sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    found = [parser.push(text[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    for said, pieces in [*found, parser.finish()]:
        content += said
        for piece in pieces:
            if piece.name is not None:
                assert piece.id is not None
                names.append(piece.name)
                arguments.append("")
            arguments[piece.index] += piece.arguments
    return content, [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


@pytest.mark.parametrize(("text", "forced", "content", "calls"), TEXTS, ids=[t[0][:30] for t in TEXTS])
@settings(deadline=None)
@given(data=st.data())
def test_a_text_means_the_same_however_it_is_cut(
    text: str, forced: bool, content: str, calls: list[tuple[str, Any]], data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, max(1, len(text)))))
    assert parse(text, forced, cuts) == (content, calls)
    assert parse(text, forced, list(range(len(text)))) == (content, calls)


PARTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    '{"name": "f", "arguments": {',
    '"f"',
    *'<tool_call>/{}[]",: \\n',
]


@settings(max_examples=1000)
@given(st.lists(st.sampled_from(PARTS), max_size=30).map("".join), st.lists(st.integers(0, 200)))
def test_no_text_is_lost_where_nothing_is_called(text: str, cuts: list[int]) -> None:
    parser = CallParser({"no such function"}, forced=False)
    ends = [*sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    said = "".join(parser.push(text[a:b])[0] for a, b in zip([0, *ends], ends, strict=False))
    said += parser.finish()[0]
    assert said == text
    assert not parser.calls


@pytest.mark.parametrize(
    "text", ["[]", " [ ] is empty", "<tool_call></tool_call>", "[TOOL_CALLS] []", "\n<tool_call>[]"]
)
def test_brackets_around_nothing_are_said(text: str) -> None:
    for cuts in ([], list(range(len(text)))):
        assert parse(text, False, cuts) == (text, [])


def request(**members: Any) -> contract.ChatCompletionRequest:
    return contract.ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user"}], **members})


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_arguments_of_a_demanded_call_are_those_that_are_named() -> None:
    inner = {"type": "object", "properties": {"properties": {"type": "string"}}, "default": {"properties": {}}}
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/definitions/I"}}, "definitions": {"I": inner}}
    tools = read_tools(request(tools=[tool("f", parameters), tool("g")], tool_choice="required"))
    constraint = tools.constraint()
    assert constraint is not None
    schema = json.loads(constraint.text)
    first, second = (call["properties"]["arguments"] for call in schema["items"]["anyOf"])
    assert first == {"$ref": "#/$defs/0"}
    first = schema["$defs"]["0"]
    assert first["properties"]["a"] == {"$ref": "#/$defs/0/definitions/I"}
    assert first["additionalProperties"] is False
    assert second == {"type": "object", "properties": {}, "additionalProperties": False}
    assert first["definitions"]["I"] == {**inner, "additionalProperties": False}


def test_definitions_of_one_name_in_two_tools_are_not_mixed_up() -> None:
    def parameters(kind: str) -> dict[str, Any]:
        return {"type": "object", "properties": {"a": {"$ref": "#/$defs/I"}}, "$defs": {"I": {"type": kind}}}

    tools = read_tools(
        request(tools=[tool("f", parameters("string")), tool("g", parameters("integer"))], tool_choice="required")
    )
    constraint = tools.constraint()
    assert constraint is not None
    schema = json.loads(constraint.text)
    first, second = schema["$defs"]["0"], schema["$defs"]["1"]
    assert (first["properties"]["a"], first["$defs"]["I"]) == ({"$ref": "#/$defs/0/$defs/I"}, {"type": "string"})
    assert (second["properties"]["a"], second["$defs"]["I"]) == ({"$ref": "#/$defs/1/$defs/I"}, {"type": "integer"})


def test_demanded_calls_of_large_schemas_are_refused_before_they_are_walked_through() -> None:
    large = {"type": "object", "$defs": {f"d{i}": {"type": "string"} for i in range(3000)}}
    tools = read_tools(request(tools=[tool(f"f{i}", large) for i in range(128)], tool_choice="required"))
    with pytest.raises(InvalidParameterError, match="at most 65536 bytes") as bad:
        tools.constraint()
    assert bad.value.param == "tools"


@pytest.mark.parametrize("parameters", [{"$defs": 5}, {"$defs": [1], "properties": 5}, {"definitions": None}])
def test_definitions_that_are_none_are_left_to_the_compiler(parameters: dict[str, Any]) -> None:
    constraint = read_tools(request(tools=[tool("f", {"type": "object", **parameters})], tool_choice="required"))
    assert constraint.constraint() is not None


@pytest.mark.parametrize(
    ("members", "choice", "names"),
    [
        ({}, "none", set()),
        ({"tools": [tool("f")]}, "auto", {"f"}),
        ({"tools": [tool("f")], "tool_choice": "none"}, "none", set()),
        ({"tools": [tool("f"), tool("g")], "tool_choice": "required"}, "forced", {"f", "g"}),
        ({"tools": [tool("f"), tool("g")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "forced", {"g"}),
    ],
    ids=["no tools", "auto", "none", "required", "named"],
)  # fmt: skip
def test_a_choice_of_tools(members: dict[str, Any], choice: str, names: set[str]) -> None:
    tools = read_tools(request(**members))
    assert tools.choice == choice
    assert set(tools.names) == names


def test_a_tool_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidParameterError) as bad:
        read_tools(request(tools=[tool("f")], tool_choice={"type": "function", "function": {"name": "g"}}))
    assert bad.value.param == "tool_choice.function.name"
