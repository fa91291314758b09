"""`/openapi.json` and `/docs`: the contract as it is and as a page to read, from files of this installation."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import NamedTuple

import orjson
from starlette.requests import Request
from starlette.responses import Response

from inferway_contract import document

from .reference import render


class _Rendered(NamedTuple):
    contract: bytes
    page: bytes
    policy: str


@cache
def _rendered() -> _Rendered:
    # Both at once, at the first request for either: reading the YAML takes 50 ms and is most of the work.
    contract = document.load()
    page, policy = render(contract)
    return _Rendered(orjson.dumps(contract), page.encode(), policy)


async def openapi_json(_: Request) -> Response:
    """The contract in JSON."""
    rendered = await asyncio.to_thread(_rendered)
    return Response(rendered.contract, media_type="application/json")


async def docs_page(_: Request) -> Response:
    """The contract as HTML, which loads nothing: its policy forbids scripts, images, fonts and frames altogether."""
    rendered = await asyncio.to_thread(_rendered)
    return Response(
        rendered.page,
        media_type="text/html",
        headers={"Content-Security-Policy": rendered.policy, "Referrer-Policy": "no-referrer"},
    )
