"""The floor: an ASGI application that reads a request body and answers, with nothing in between.

``app`` answers with the bytes of the file that REPLY names: the gateway's own answer to the same request. ``mirror``
gives the request's body back in the chunks in which it came, ``joined`` as one piece; both are ways to echo a large
body, and the benchmark takes the faster one. ``replay`` gives the answers that REPLIES names, recorded before.
"""

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

REPLY = Path(os.environ["REPLY"]).read_bytes() if "REPLY" in os.environ else b"{}"
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(REPLY)).encode())],
}
BODY = {"type": "http.response.body", "body": REPLY}


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send(START)
    await send(BODY)


async def mirror(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    parts = await read(receive)
    await send(start(sum(map(len, parts))))
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def joined(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    body = b"".join(await read(receive))
    await send(start(len(body)))
    await send({"type": "http.response.body", "body": body})


async def read(receive: Receive) -> list[bytes]:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return parts


def start(size: int) -> dict[str, Any]:
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(size).encode())]
    return {"type": "http.response.start", "status": 200, "headers": headers}


REPLIES: dict[str, dict[str, Any]] = {}
if "REPLIES" in os.environ:
    for route, recorded in json.loads(Path(os.environ["REPLIES"]).read_text()).items():
        headers = [(name.encode(), value.encode()) for name, value in recorded["headers"].items()]
        begin = {"type": "http.response.start", "status": recorded["status"], "headers": headers}
        REPLIES[route] = {
            "start": begin,
            "body": {"type": "http.response.body", "body": bytes.fromhex(recorded["body"])},
        }


async def replay(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """What a gateway answered before, by method and path."""
    await read(receive)
    found = REPLIES.get(f"{scope['method']} {scope['path']}", {"start": {**START, "status": 404}, "body": BODY})
    await send(found["start"])
    await send(found["body"])
