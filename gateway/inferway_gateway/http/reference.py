"""The contract as a page to read: HTML without scripts, rendered from the OpenAPI document alone.

Chosen over a viewer in JavaScript: the ones that come in Python packages without a web framework behind them have not
followed their upstream since 2024 or weigh some 5 MB, all of them want inline styles, and none shows the scopes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

METHODS: Final = ("get", "post", "put", "patch", "delete")
_MARKDOWN: Final = MarkdownIt("commonmark", {"html": False}).enable("table")
_HEADING: Final = re.compile(r"<(/?)h2>")
_NESTING: Final = 6
_EVERYWHERE: Final = frozenset({"X-Request-Id", "Deprecation", "Sunset"})
"""Headers of nearly every answer, which the introduction describes once."""
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Member:
    """One row of a table of members, parameters or headers. ``path`` is dotted, ``[]`` stands for an array's items."""

    path: str
    kind: Markup
    required: bool
    text: Markup
    where: str = ""


@dataclass(frozen=True, slots=True)
class Body:
    """What a request or a response may hold in one media type."""

    media_type: str
    kind: Markup
    text: Markup
    members: tuple[Member, ...]
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    status: str
    text: Markup
    headers: tuple[Member, ...]
    bodies: tuple[Body, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """A method on a path, with everything of it resolved.

    Attributes:
        scopes: any one of them opens it; empty takes any valid key; None is public.
        curl: a command that calls it.
    """

    id: str
    method: str
    path: str
    summary: str
    text: Markup
    scopes: tuple[str, ...] | None
    parameters: tuple[Member, ...]
    body_required: bool
    bodies: tuple[Body, ...]
    answers: tuple[Answer, ...]
    errors: tuple[Answer, ...]
    curl: str


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    text: Markup
    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class SchemaView:
    name: str
    kind: Markup
    text: Markup
    members: tuple[Member, ...]


def render(document: Json) -> tuple[str, str]:
    """The page, and the Content-Security-Policy under which it works.

    Args:
        document: an OpenAPI 3.1 document whose references all point into itself.
    """
    environment = Environment(
        loader=PackageLoader(__package__.rpartition(".")[0], "http"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = environment.get_template("reference.css").render()
    page = environment.get_template("reference.html.jinja").render(
        info=document["info"],
        introduction=_prose(document["info"].get("description", "")),
        groups=tuple(_groups(document)),
        schemas=tuple(_schemas(document)),
        style=Markup(style),  # noqa: S704 - a file of this package
    )
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _groups(document: Json) -> Iterator[Group]:
    for tag in document["tags"]:
        operations = tuple(
            _operation(document, path, method, item, item[method])
            for path, item in document["paths"].items()
            for method in METHODS
            if method in item and tag["name"] in item[method]["tags"]
        )
        yield Group(tag["name"], _line(tag.get("description", "")), operations)


def _operation(document: Json, path: str, method: str, item: Json, node: Json) -> Operation:
    parameters = [_resolve(document, p) for p in (*item.get("parameters", ()), *node.get("parameters", ()))]
    request = _resolve(document, node.get("requestBody", {}))
    bodies = tuple(_bodies(document, request))
    answers = [_answer(document, status, response) for status, response in node["responses"].items()]
    return Operation(
        id=node["operationId"],
        method=method.upper(),
        path=path,
        summary=node["summary"],
        text=_prose(node.get("description", "")),
        scopes=None if node.get("security") == [] else tuple(node.get("x-required-scopes", ())),
        parameters=tuple(
            Member(
                p["name"],
                _kind(document, p["schema"]),
                p.get("required", False),
                _line(p.get("description", "")),
                p["in"],
            )
            for p in parameters
            if p["name"] not in _EVERYWHERE
        ),
        body_required=request.get("required", False),
        bodies=bodies,
        answers=tuple(a for a in answers if a.status[0] == "2"),
        errors=tuple(a for a in answers if a.status[0] != "2"),
        curl=_curl(method, path, parameters, bodies, public=node.get("security") == []),
    )


def _answer(document: Json, status: str, node: Json) -> Answer:
    response = _resolve(document, node)
    headers = tuple(
        Member(name, _kind(document, h["schema"]), h.get("required", False), _line(h.get("description", "")))
        for name, h in ((n, _resolve(document, h)) for n, h in response.get("headers", {}).items())
        if name not in _EVERYWHERE
    )
    return Answer(status, _line(response["description"]), headers, tuple(_bodies(document, response)))


def _bodies(document: Json, node: Json) -> Iterator[Body]:
    for media_type, content in node.get("content", {}).items():
        schema = content.get("schema", {})
        examples = [
            (name.replace("_", " ") if "summary" not in e else e["summary"], _pretty(e["value"]))
            for name, e in content.get("examples", {}).items()
        ]
        if "example" in content:
            examples.append(("", _pretty(content["example"])))
        # A schema with a name has its own entry at the end of the page; only nameless ones are spelt out here.
        members = () if "$ref" in schema else tuple(_members(document, schema))
        text = "" if "$ref" in schema else schema.get("description", "")
        yield Body(media_type, _kind(document, schema), _line(text), members, tuple(examples))


def _schemas(document: Json) -> Iterator[SchemaView]:
    for name, schema in document["components"]["schemas"].items():
        shown = {k: v for k, v in schema.items() if k != "description"}
        kind = _kind(document, shown)
        yield SchemaView(name, kind, _line(schema.get("description", "")), tuple(_members(document, schema)))


def _members(document: Json, schema: Json, prefix: str = "", depth: int = 0) -> Iterator[Member]:
    """The members of an object, and of the nameless objects inside it."""
    if depth > _NESTING:
        return
    required = schema.get("required", ())
    for name, node in schema.get("properties", {}).items():
        path = f"{prefix}{name}"
        yield Member(path, _kind(document, node), name in required, _line(node.get("description", "")))
        inner = node
        while "items" in inner and isinstance(inner["items"], Mapping):
            inner = inner["items"]
            path += "[]"
        if "properties" in inner:
            yield from _members(document, inner, path + ".", depth + 1)


def _kind(document: Json, schema: Json) -> Markup:
    """A schema in a few words, with links to schemas that have a name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return Markup('<a href="#schema-{0}">{0}</a>').format(name)
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    if alternatives:
        return Markup(" or ").join(_kind(document, s) for s in alternatives)
    extended = [_kind(document, s) for s in schema.get("allOf", ())]
    if extended:
        own = [_word("and more members")] if "properties" in schema else []
        return Markup(", ").join([*extended, *own, *_bounds(schema)])
    if schema.get("format") == "binary":
        return _word("raw bytes" + (f", at most {schema['maxLength']}" if "maxLength" in schema else ""))
    if "const" in schema:
        return Markup("<code>{}</code>").format(json.dumps(schema["const"]))
    if "enum" in schema:
        return Markup(" ").join(Markup("<code>{}</code>").format(v) for v in schema["enum"])
    types = schema.get("type", "anything")
    names = [types] if isinstance(types, str) else list(types)
    if "array" in names and schema.get("items") and len(names) <= 2:
        inner = Markup("array of {}").format(_kind(document, schema["items"]))
        parts = [inner, *(_word(n) for n in names if n != "array")]
    else:
        parts = [_word(n) for n in names]
    return Markup(", ").join([Markup(" or ").join(parts), *_bounds(schema)])


def _bounds(schema: Json) -> Iterator[Markup]:
    if "format" in schema:
        yield _word(schema["format"])
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        yield _word(f"{low} to {high}")
    elif low is not None:
        yield _word(f"at least {low}")
    for least, most, unit in (("minLength", "maxLength", "characters"), ("minItems", "maxItems", "items")):
        if least in schema and most in schema:
            yield _word(f"{schema[least]} to {schema[most]} {unit}")
        elif most in schema:
            yield _word(f"at most {schema[most]} {unit}")
        elif least in schema:
            yield _word("not empty")
    if schema.get("uniqueItems"):
        yield _word("each once")
    if schema.get("maxProperties") == 0:
        yield _word("empty")
    if "pattern" in schema:
        yield Markup("<code>{}</code>").format(schema["pattern"])
    if "default" in schema:
        yield Markup("default <code>{}</code>").format(json.dumps(schema["default"]))


def _curl(method: str, path: str, parameters: list[Json], bodies: tuple[Body, ...], *, public: bool) -> str:
    for parameter in parameters:
        if parameter["in"] == "path":
            name = parameter["name"]
            path = path.replace("{" + name + "}", str(parameter.get("example", name.upper())))
    lines = ["curl" + ("" if method in ("get", "post") and (method == "get" or bodies) else f" -X {method.upper()}")]
    lines[0] += f" $INFERWAY_BASE_URL{path}"
    if not public:
        lines.append('-H "Authorization: Bearer $INFERWAY_API_KEY"')
    for body in bodies:
        if body.examples:
            lines.append(f"-d '{json.dumps(json.loads(body.examples[0][1]), separators=(',', ':'))}'")
            break
    return " \\\n  ".join(lines)


def _resolve(document: Json, node: Json) -> Json:
    while "$ref" in node:
        found: Json = document
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


_SCALARS: Final = re.compile(r"\[[^\[\]{}]*\]")


def _pretty(value: Any) -> str:
    """JSON over several lines, in which arrays of plain values stay on one; text as it is."""
    if isinstance(value, str):
        return value
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return _SCALARS.sub(lambda m: " ".join(m.group().split()).replace("[ ", "[").replace(" ]", "]"), text)


def _word(text: str) -> Markup:
    return escape(text)


def _line(text: str) -> Markup:
    return Markup(_MARKDOWN.renderInline(" ".join(text.split())))  # noqa: S704 - Markdown with HTML switched off


def _prose(text: str) -> Markup:
    return Markup(_HEADING.sub(r"<\1h3>", _MARKDOWN.render(text)))  # noqa: S704 - Markdown with HTML switched off
