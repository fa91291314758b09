"""Answers as the contract's models, without what would keep an old client from a new gateway."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from inferway._answers import lenient, read_as
from inferway._errors import MalformedAnswer
from inferway_contract import models

ANSWERS = [
    value
    for value in vars(models).values()
    if isinstance(value, type) and issubclass(value, models.Answer) and value is not models.Answer
]


@pytest.mark.parametrize("model", ANSWERS)
def test_a_lenient_answer_is_the_contracts_own(model: type[BaseModel]) -> None:
    made = lenient(model)
    assert issubclass(made, model)
    assert lenient(model) is made
    assert list(made.model_fields) == list(model.model_fields)
    for name, field in made.model_fields.items():
        assert field.is_required() == model.model_fields[name].is_required()
        assert field.repr == model.model_fields[name].repr


def test_closed_sets_patterns_and_bounds_are_lifted() -> None:
    entry = read_as("RepositoryIndexEntry", {"name": "a/b c", "version": "v1", "state": "DREAMING", "reason": ""})
    assert isinstance(entry, models.RepositoryIndexEntry)
    assert (entry.name, entry.version, entry.state) == ("a/b c", "v1", "DREAMING")
    ready = read_as("ServerReady", {"live": False, "ready": True, "since": 1})
    assert (ready.live, ready.model_extra) == (False, {"since": 1})


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("RepositoryIndexEntry", {"name": "m", "version": "1", "state": "READY"}, "reason"),
        ("RepositoryIndexEntry", {"name": 5, "state": "READY", "reason": ""}, "name"),
        ("ModelStats", {"model_stats": [{"name": "m"}]}, "model_stats.0.version"),
        ("ServerMetadata", [], "the body"),
        ("ServerMetadata", None, "the body"),
    ],
)
def test_what_code_relies_on_must_be_there(name: str, value: Any, place: str) -> None:
    with pytest.raises(MalformedAnswer, match=f"^{place} is not as the contract's {name} has it"):
        read_as(name, value)


def test_a_refusal_does_not_repeat_what_came() -> None:
    with pytest.raises(MalformedAnswer) as caught:
        read_as("KeyCreated", {"key": 5, "id": "sixteen-secrets"})
    assert "sixteen" not in str(caught.value)


def test_a_list_of_answers_is_read_as_one() -> None:
    entry = {"name": "m", "version": "1", "state": "READY", "reason": ""}
    assert [one.name for one in read_as("RepositoryIndexEntry", [entry] * 2, many=True)] == ["m", "m"]
    with pytest.raises(MalformedAnswer, match=r"^1\.name"):
        read_as("RepositoryIndexEntry", [entry, {**entry, "name": None}], many=True)
