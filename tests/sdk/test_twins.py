"""The synchronous and the asynchronous client are the same but for waiting."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from inferway import (
    AsyncInferway,
    AsyncModelHandle,
    AsyncTextStream,
    Inferway,
    ModelHandle,
    TextStream,
    _client,
    _raw,
)
from inferway.resources import chat, completions, deployments, embeddings, health, keys, models

TWINS: list[tuple[type[Any], type[Any]]] = [
    (Inferway, AsyncInferway),
    (ModelHandle, AsyncModelHandle),
    (models.Models, models.AsyncModels),
    (deployments.Deployment, deployments.AsyncDeployment),
    (keys.Keys, keys.AsyncKeys),
    (health.Health, health.AsyncHealth),
    (chat.Chat, chat.AsyncChat),
    (completions.Completions, completions.AsyncCompletions),
    (embeddings.Embeddings, embeddings.AsyncEmbeddings),
    (TextStream, AsyncTextStream),
    (_client.InferwayWithRawResponse, _client.AsyncInferwayWithRawResponse),
    (_raw.RawModels, _raw.AsyncRawModels),
    (_raw.RawKeys, _raw.AsyncRawKeys),
    (_raw.RawHealth, _raw.AsyncRawHealth),
    (_raw.RawChat, _raw.AsyncRawChat),
    (_raw.RawCompletions, _raw.AsyncRawCompletions),
    (_raw.RawEmbeddings, _raw.AsyncRawEmbeddings),
]
SAME_IN_BOTH = {"model", "with_options"}
"""Methods that neither client waits for."""
ALLOWED = [
    # Words that must differ: how a thing is named, closed or iterated in the one world and in the other.
    (r"\b(Async|Sync)(?=[A-Z])", ""),
    (r"\bAsyncApiKey\b", "ApiKey"),
    (r"__a(enter|exit)__", r"__\1__"),
    (r"Iterable\[object\] \| Iterable\[object\]", "Iterable[object]"),
    (r", from an iterable or an asynchronous one; or one\s+array", "; or one array"),
    (r"each in a (thread|task) of its own", "each in a thread or task of its own"),
    (r"`await (deployment\.handle\.predict)", r"`\1"),
    (r"interrupting `wait` with Ctrl\+C|cancelling `wait`", "ending `wait`"),
    (r"Interrupting it with Ctrl\+C leaves|Cancelling it leaves", "Ending it leaves"),
    (r"(waits for|cancels) those that are running", "ends those that are running"),
    (r"safe to use from several threads|usable on any event loop", "usable by many"),
    (r"Safe to use from several threads and after a fork: a child process makes connections of its own\.|"
     r"Usable on any number of event loops, one after the other or at once, and after a fork\.", "Usable by many."),
    (r", and so does a loop that ends", ""),
    (r"``async with`` block", "``with`` block"),
]  # fmt: skip


def same(text: str | None) -> str:
    """A text without what may differ, in one line."""
    found = " ".join((text or "").split())
    for pattern, replacement in ALLOWED:
        found = re.sub(pattern, replacement, found)
    return " ".join(found.split())


def public(owner: type[Any]) -> dict[str, Any]:
    special = {"__init__", "__call__", "__enter__", "__exit__", "__aenter__", "__aexit__", "__repr__"}
    return {
        re.sub(r"^__a(enter|exit)__$", r"__\1__", name): value
        for name, value in vars(owner).items()
        if not name.startswith("_") or name in special
    }


PAIRS = [(sync, asynchronous, name) for sync, asynchronous in TWINS for name in public(sync)]


@pytest.mark.parametrize(("sync", "asynchronous"), TWINS)
def test_twins_have_the_same_names_and_documentation(sync: type[Any], asynchronous: type[Any]) -> None:
    assert list(public(sync)) == list(public(asynchronous))
    assert same(sync.__doc__) == same(asynchronous.__doc__)


def signature_of(value: Any) -> str:
    text = str(inspect.signature(value))
    # What is awaited, and what is iterated, may be written in either way.
    return same(re.sub(r"Async(?=Iter|Api|HTTP)", "", text))


@pytest.mark.parametrize(("sync", "asynchronous", "name"), PAIRS, ids=[f"{s.__name__}.{n}" for s, _, n in PAIRS])
def test_twins_have_the_same_methods(sync: type[Any], asynchronous: type[Any], name: str) -> None:
    one, other = public(sync)[name], public(asynchronous)[name]
    if isinstance(one, property):
        one, other = one.fget, other.fget
    assert same(one.__doc__) == same(other.__doc__)
    if callable(one):
        assert signature_of(one) == signature_of(other)
        waits = inspect.iscoroutinefunction(other) or inspect.isasyncgenfunction(other)
        special = {"__init__", "__repr__", "base_url", "with_raw_response", "map", "headers", "handle", "text_stream"}
        assert waits or name in SAME_IN_BOTH | special, f"{asynchronous.__name__}.{name} does not wait"


def test_every_public_method_is_documented() -> None:
    for sync, _ in TWINS:
        for name, value in public(sync).items():
            if callable(value) and name not in ("__enter__", "__exit__", "__repr__"):
                documented = value.__doc__ or name == "__init__"
                assert documented, f"{sync.__name__}.{name}"


def test_every_method_of_the_api_has_its_raw_form() -> None:
    for plain, raw in (
        (models.Models, _raw.RawModels),
        (keys.Keys, _raw.RawKeys),
        (health.Health, _raw.RawHealth),
        (chat.Chat, _raw.RawChat),
        (completions.Completions, _raw.RawCompletions),
        (embeddings.Embeddings, _raw.RawEmbeddings),
    ):
        wanted = {name for name in public(plain) if not name.startswith("__")}
        # Neither a list that fetches pages nor what takes several calls is one answer; a deployment goes on asking.
        several = {"wait_until_ready", "deploy", "deployment", "events", "explain"}
        assert wanted - several - ({"list"} if plain is keys.Keys else set()) == {
            name for name in public(raw) if not name.startswith("__")
        }
