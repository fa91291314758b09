"""The page of the contract: complete, without scripts, and under a policy that it keeps itself."""

from __future__ import annotations

import base64
import copy
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import orjson
import pytest
from starlette.requests import Request

from inferway_contract import document
from inferway_gateway.http.reference import render
from inferway_gateway.http.routes_docs import docs_page, openapi_json

CONTRACT = document.load()
REQUEST = Request({"type": "http", "method": "GET", "path": "/docs", "headers": []})
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What the page holds: ids, links, tags and its text; complains of tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return render(CONTRACT)[0]


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_operation_and_schema_has_its_place(page: Page) -> None:
    operations = {o["operationId"] for item in CONTRACT["paths"].values() for k, o in item.items() if k != "parameters"}
    schemas = {f"schema-{name}" for name in CONTRACT["components"]["schemas"]}
    assert operations | schemas <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    for path in CONTRACT["paths"]:
        assert path in page.text


def test_every_link_leads_somewhere(page: Page) -> None:
    outside = {link for link in page.links if not link.startswith("#")}
    assert outside == {"openapi.json", "https://github.com/kserve/open-inference-protocol"}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_nothing_is_loaded_or_run(page: Page) -> None:
    assert not page.tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    assert not page.attributes & {"src", "style", "srcset"}
    assert not {name for name in page.attributes if name.startswith("on")}


def test_the_policy_allows_this_style_and_nothing_else(html: str) -> None:
    _, policy = render(CONTRACT)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_text_of_the_document_cannot_become_markup() -> None:
    hostile: dict[str, Any] = copy.deepcopy(CONTRACT)
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    hostile["info"]["title"] = hostile["info"]["description"] = attack
    hostile["paths"]["/v2"]["get"]["summary"] = hostile["paths"]["/v2"]["get"]["description"] = attack
    hostile["components"]["schemas"]["ModelName"]["pattern"] = attack
    hostile["components"]["schemas"]["ServerLive"]["properties"][attack] = {"type": "string", "description": attack}
    page = Page(render(hostile)[0])
    assert not page.tags & {"script", "img"}
    assert page.text.count("<script>alert(1)</script>") >= 6


def test_the_scopes_of_an_operation_are_shown(html: str) -> None:
    def scopes(operation: str) -> str:
        article = re.search(rf'<article id="{operation}">.*?<span class="scopes">(.*?)</span>', html, re.DOTALL)
        assert article is not None
        return re.sub(r"<[^>]+>", "", article[1])

    assert scopes("serverLive") == "public"
    assert scopes("serverMetadata") == "scope infer or read"
    assert scopes("createKey") == "scope admin"
    assert scopes("getOwnKey") == "any valid key"


def test_the_commands_send_bodies_that_fit_their_schema(html: str) -> None:
    commands = re.findall(r"<pre>(curl .*?)</pre>", html, re.DOTALL)
    assert len(commands) == sum(len(item) - ("parameters" in item) for item in CONTRACT["paths"].values())
    bodies = [re.search(r"-d &#39;(.*)&#39;", command) for command in commands]
    sent = [orjson.loads(found[1].replace("&#34;", '"')) for found in bodies if found is not None]
    assert {"name": "web shop", "scopes": ["infer"], "models": ["minilm*", "add_sub"]} in sent
    assert all("{" not in command.splitlines()[0] for command in commands)


async def test_the_contract_is_served_as_it_is() -> None:
    response = await openapi_json(REQUEST)
    assert response.media_type == "application/json"
    assert orjson.loads(response.body) == CONTRACT


async def test_the_page_is_served_with_its_policy() -> None:
    response = await docs_page(REQUEST)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"] == render(CONTRACT)[1]
    assert response.headers["referrer-policy"] == "no-referrer"
    assert bytes(response.body).decode() == render(CONTRACT)[0]
