"""Templates are rendered as their models expect it, with limits that hold, and in nobody's way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from generating import FakeGenerator
from inferway_gateway.core.errors import InvalidParameterError, ShuttingDownError
from inferway_gateway.http.openai.templates import Guarded, TemplateRenderer

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer(1.0)
    yield renderer
    await renderer.close()


@pytest.mark.parametrize(
    ("source", "variables", "text"),
    [
        ("{{ a }}!\n", {"a": "é<&>"}, "é<&>!"),
        ("{{ a | tojson }}", {"a": {"b": "é<"}}, '{"b": "é<"}'),
        ("{{ a | tojson(indent=1) }}", {"a": [1]}, "[\n 1\n]"),
        ("{% if true %}\n  {%- set x = 1 %}\n{{ x }}{% endif %}", {}, "1"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}, "1"),
        ("a{% generation %}b{% endgeneration %}c", {}, "abc"),
        ("{{ missing }}{{ messages[0]['role'] }}", {"messages": [{"role": "user"}]}, "user"),
        ("{{ strftime_now('%%') }}", {}, "%"),
    ],
    ids=["plain", "tojson", "indent", "blocks", "loop controls", "generation", "undefined", "time"],
)
async def test_a_template_finds_what_templates_expect(
    renderer: TemplateRenderer, source: str, variables: dict[str, Any], text: str
) -> None:
    assert await renderer.render(source, variables) == text


async def test_templates_that_loop_end_and_hold_nobody_up() -> None:
    renderer = TemplateRenderer(3.0)
    looping = [asyncio.create_task(renderer.render(LOOP, {})) for _ in range(2)]
    await asyncio.sleep(0)
    for _ in range(20):
        assert await renderer.render("{{ a }}", {"a": "x"}) == "x"
    assert not looping[1].done()  # it waits for the first, and nobody else does
    for task in looping:
        with pytest.raises(InvalidParameterError, match="did not end within 3 s"):
            await task
    assert await renderer.render("{{ a }}", {"a": "y"}) == "y"
    await renderer.close()


async def test_after_the_end_nothing_is_rendered() -> None:
    renderer = TemplateRenderer(1.0)
    assert await renderer.render("{{ 1 }}", {}) == "1"
    await renderer.close()
    with pytest.raises(ShuttingDownError):
        await renderer.render("{{ 1 }}", {})


async def test_names_of_special_tokens_are_kept_from_becoming_tokens() -> None:
    generator = FakeGenerator()
    guarded = Guarded(generator.special_tokens)
    value = guarded.value({"a": ["<|im_end|>x<|im_start|>", 1, None], "<|im_end|>": True})
    assert "im_end" not in str(value)
    prompt = f"<|im_start|>{value['a'][0]}<|im_end|>"
    tokens = await guarded.encode(generator, prompt)
    assert generator.decode(tokens) == "<|im_start|><|im_end|>x<|im_start|><|im_end|>"
    assert [token for token in tokens if token >= 0x110000] == [tokens[0], tokens[-1]]


async def test_marks_of_a_callers_own_making_stay_text() -> None:
    generator = FakeGenerator()
    guarded = Guarded(generator.special_tokens)
    text = guarded.text("\ue0000\ue001<|im_end|>")
    tokens = await guarded.encode(generator, text)
    assert generator.decode(tokens) == "\ufffd0\ue001<|im_end|>"
    assert max(tokens) < 0x110000
