"""Every route of the gateway is in the contract and the other way round, and both name the same scopes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from inferway_contract import document
from inferway_gateway.app import routes

CONTRACT = document.load()
DOCUMENTED: dict[tuple[str, str], Any] = {
    (method.upper(), path): operation
    for path, item in CONTRACT["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
}
# Starlette says of a parameter that it takes slashes; OpenAPI has no word for that.
ROUTES = {(method, route.path.replace(":path}", "}")): route for route in routes() for method in route.methods}
BOTH = sorted(DOCUMENTED.keys() & ROUTES.keys())


def test_every_route_is_in_the_contract() -> None:
    assert ROUTES.keys() - DOCUMENTED.keys() == set()


def test_every_operation_of_the_contract_has_a_route() -> None:
    assert DOCUMENTED.keys() - ROUTES.keys() == set()


def test_no_route_hides_behind_another() -> None:
    listed = [(method, re.sub(r"{\w+}", "{}", route.path)) for route in routes() for method in route.methods]
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(("method", "path"), BOTH)
def test_a_route_asks_for_the_scopes_that_the_contract_names(method: str, path: str) -> None:
    operation, route = DOCUMENTED[method, path], ROUTES[method, path]
    assert route.public is (operation.get("security") == [])
    assert route.scopes == frozenset(operation.get("x-required-scopes", ()))


@pytest.mark.parametrize(("method", "path"), BOTH)
def test_a_route_takes_basic_where_the_contract_says_so(method: str, path: str) -> None:
    schemes = {name for entry in DOCUMENTED[method, path].get("security", CONTRACT["security"]) for name in entry}
    assert ROUTES[method, path].basic is ("basic" in schemes)
