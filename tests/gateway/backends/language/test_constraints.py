"""Answers that have to fit a grammar, and grammars that cannot be used."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import llguidance
import pytest

from inferway_gateway.backends.language.generator import Generator
from inferway_gateway.backends.language.opening import open_engine
from inferway_gateway.backends.language.package import read_package
from inferway_gateway.core.errors import ShuttingDownError, UnsupportedOperationError
from inferway_gateway.core.generation import Constraint, GenerationParameterError, Sampling
from inferway_gateway.core.model_config import GenerationOptions

from .builder_graphs import VOCABULARY, Layout, write_model
from .conftest import PROMPT, OpenModel, ask

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "maximum": 120, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}},
    "additionalProperties": False,
}


@pytest.mark.parametrize("model", ["tiny-llm", "smollm2"])
async def test_answers_are_sentences_of_the_language(open_language: OpenModel, model: str) -> None:
    generator = await open_language(model)
    schema, regex, choice = await asyncio.gather(
        ask(generator, PROMPT, 120, constraint=Constraint("json_schema", json.dumps(PERSON))),
        ask(generator, PROMPT, 20, constraint=Constraint("regex", r"[0-9]{3}-[a-f]{2}")),
        ask(generator, PROMPT, 20, constraint=Constraint("choice", '["Paris", "Rome \\"eternal\\"", "北京"]')),
    )
    found = json.loads(schema.text)
    assert set(found) == {"name", "age"}
    assert 0 <= found["age"] <= 120
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", regex.text)
    assert choice.text in {"Paris", 'Rome "eternal"', "北京"}
    assert {whole.last.finish_reason for whole in (schema, regex, choice)} == {"stop"}


async def test_sampled_answers_fit_too_and_a_grammar_of_ones_own_can_be_given(tiny: Generator) -> None:
    drawn = Sampling(temperature=2.0, seed=3)
    whole = await ask(tiny, PROMPT, 10, sampling=drawn, constraint=Constraint("lark", 'start: "a" ("b" | "c")+ "d"'))
    assert re.fullmatch("a[bc]+d?", whole.text)
    objects = await ask(tiny, PROMPT, 60, sampling=drawn, constraint=Constraint("json_object"))
    assert objects.text.startswith("{")


@pytest.mark.parametrize(
    ("constraint", "param"),
    [
        (Constraint("regex", "(a"), "guided_regex"),
        (Constraint("regex", "((a{1,1000}){1,1000}){1,1000}"), "guided_regex"),
        (Constraint("lark", "nothing at all"), "guided_grammar"),
        (Constraint("lark", "start: missing"), "guided_grammar"),
        (Constraint("choice", "[]"), "guided_choice"),
        (Constraint("choice", '"Paris"'), "guided_choice"),
        (Constraint("choice", json.dumps(["x"] * 1001)), "guided_choice"),
        (Constraint("json_schema", "{"), "response_format"),
        (Constraint("json_schema", "7"), "response_format"),
        (Constraint("json_schema", "false"), "response_format"),
        (Constraint("json_schema", '{"type": "nothing"}'), "response_format"),
        (Constraint("json_schema", '{"allOf": [{"type": "string"}, {"type": "integer"}]}'), "response_format"),
        (Constraint("json_schema", '{"$ref": "#"}'), "response_format"),
        (Constraint("json_schema", '{"type": "array", "minItems": 1, "items": {"$ref": "#"}}'), "response_format"),
        (
            Constraint("json_schema", '{"type":"object","properties":{"a":{"$ref":"#"}},"required":["a"]}'),
            "response_format",
        ),
        (Constraint("json_schema", '{"$ref": "https://example.com/schema.json"}'), "response_format"),
        (Constraint("json_schema", '{"a":' * 5000 + "1" + "}" * 5000), "response_format"),
        (Constraint("json_schema", '{"items":' * 100 + "{}" + "}" * 100), "response_format"),
        (Constraint("json_schema", json.dumps({"enum": ["x" * 100_000]})), "response_format"),
    ],
    ids=lambda value: value.text[:40] if isinstance(value, Constraint) else None,
)
async def test_a_grammar_that_cannot_be_used_is_refused_by_its_name(
    tiny: Generator, constraint: Constraint, param: str
) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(GenerationParameterError) as caught:
            await ask(tiny, constraint=constraint)
    assert caught.value.param == param
    assert tiny.stats.running == 0


async def test_a_schema_may_refer_to_itself_where_that_has_an_end(tiny: Generator) -> None:
    whole = await ask(tiny, PROMPT, 40, constraint=Constraint("json_schema", json.dumps(TREE)))
    assert whole.text.lstrip().startswith("{")


def _chain(link: str, count: int, first: str, last: str) -> str:
    return first + "".join(link.format(i, i + 1) for i in range(count)) + last.format(count)


@pytest.mark.parametrize(
    "constraint",
    [
        # The compiler's stack: a run of rules, and a run of members, each no more than the next one's name.
        Constraint("lark", _chain("a{}: a{}\n", 3000, "start: a0\n", 'a{}: "a"')),
        Constraint("lark", _chain('a{}: a{} "x"\n', 3000, "start: a0\n", 'a{}: "a"')),
        Constraint(
            "json_schema",
            _chain(
                '"d{}":{{"properties":{{"a":{{"$ref":"#/$defs/d{}"}}}}}},',
                900,
                '{"$defs":{',
                '"d{}":{{}}}},"$ref":"#/$defs/d0"}}',
            ),
        ),
        # Its memory, and its time.
        Constraint("regex", r"\p{L}*" * 8000),
        Constraint("regex", "a?" * 20_000),
        Constraint("json_schema", '{"type": "integer", "multipleOf": 999983}'),
        Constraint("regex", "\ud800"),
        Constraint("lark", 'start: "\udfff"'),
    ],
    ids=["rules", "left rules", "references", "memory", "options", "multiples", "surrogate", "other surrogate"],
)
async def test_a_grammar_that_would_end_the_process_is_refused_and_no_answer_is_disturbed(
    tiny: Generator, constraint: Constraint
) -> None:
    alone = await ask(tiny, PROMPT, 40)
    beside = asyncio.create_task(ask(tiny, PROMPT, 40))
    async with asyncio.timeout(30):
        with pytest.raises(GenerationParameterError) as caught:
            await ask(tiny, constraint=constraint, key_id="other")
    assert caught.value.param in {"guided_regex", "guided_grammar", "response_format"}
    assert (await beside).tokens == alone.tokens
    assert (await ask(tiny, PROMPT, 20, constraint=Constraint("regex", "[0-9]{3}"))).text.isdigit()


async def test_a_key_with_many_slow_grammars_has_one_in_line(tiny: Generator) -> None:
    slow = [
        asyncio.create_task(ask(tiny, constraint=Constraint("regex", r"\p{L}*" * (7000 + i)), key_id="slow"))
        for i in range(8)
    ]
    await ask(tiny, PROMPT, 20, constraint=Constraint("regex", "[0-9]{3}"), key_id="quick")
    assert sum(task.done() for task in slow) <= 2
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_a_model_that_is_unloaded_leaves_no_process_of_grammars(open_language: OpenModel) -> None:
    generator = await open_language()
    await ask(generator, PROMPT, 20, constraint=Constraint("regex", "[0-9]{3}"))
    child = generator._trial._child
    assert child is not None
    await generator.close()
    assert child._process.returncode is not None
    with pytest.raises(ShuttingDownError):
        await generator._trial.check(Constraint("regex", "[a-z]"), "")


async def test_a_model_whose_tokenizer_no_grammar_fits_answers_without_one(
    open_language: OpenModel, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m", Layout())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "decoder": None}))
    generator = await open_language(folder)
    with pytest.raises(UnsupportedOperationError, match="tokenizer"):
        await ask(generator, (5, 6), constraint=Constraint("json_object"))
    assert (await ask(generator, (5, 6), 4, ignore_end=True)).last.finish_reason == "length"


def test_the_tokenizer_is_read_when_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "m", Layout())
    read: list[int] = []
    original = llguidance.LLTokenizer

    def counted(*args: Any, **members: Any) -> Any:
        read.append(members["n_vocab"])
        return original(*args, **members)

    monkeypatch.setattr(llguidance, "LLTokenizer", counted)
    options = GenerationOptions(kv_cache_bytes=1 << 20)
    opened = open_engine(read_package(folder, options), options, 1, lambda report: None)
    assert read == [VOCABULARY]
    opened.engine.start()
    opened.engine.close()
