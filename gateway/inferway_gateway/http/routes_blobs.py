"""The routes of contents by digest, below ``/api/v1/blobs``, and those that look after all of them.

Knowing a digest is not having the content: a blob exists for a key that has uploaded it, or that sees a model with a
version of it. To everybody else it is not there, in the same words as for one that nobody has.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from inferway_contract import models as contract
from inferway_contract.names import UPLOAD_LENGTH, UPLOAD_OFFSET

from ..core.errors import (
    BlobNotFoundError,
    CancelledByCallerError,
    InvalidParameterError,
    UnsupportedEncodingError,
)
from ..core.keys import Principal
from ..store.blobs import DIGEST_PATTERN, BlobState, BlobStore
from ..store.catalog import SqlCatalog
from ..store.storage import Storage
from .routes_aliases import caller

_BYTES: Final = re.compile(r"[0-9]{1,18}")
BLOBS_PATH: Final = "/api/v1/blobs/"


def is_upload(scope: Mapping[str, Any]) -> bool:
    """Whether a request is for the route that takes contents in pieces, of whatever length."""
    path: str = scope["path"]
    return path.startswith(BLOBS_PATH)


async def get_blob(request: Request) -> Response:
    """How much of a content is here, for this key. Asking keeps it from being collected for a while."""
    digest = _digest(request)
    catalog: SqlCatalog = request.scope["state"]["catalog"]
    blobs: BlobStore = request.scope["state"]["blobs"]
    blob = await catalog.blob(digest)
    if blob is not None and await _may_use(request, catalog, digest):
        await catalog.want_blobs([digest])
        return _json(BlobState(digest, blob.size, blob.size, True), 200)
    partial = await blobs.partial(digest, caller(request))
    if partial is None:
        raise BlobNotFoundError(f"there is no blob {digest} that this key may use; send it with PUT")
    return _json(partial, 200)


async def put_blob(request: Request) -> Response:
    """Take a content, or the rest of it. What a cut connection has brought stays."""
    digest = _digest(request)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedEncodingError("expected the bytes as they are, without Content-Encoding: the digest is theirs")
    blobs: BlobStore = request.scope["state"]["blobs"]
    length = request.headers.get("content-length")
    state = await blobs.put_stream(
        digest,
        _pieces(request.receive),
        by=caller(request),
        offset=_number(request, UPLOAD_OFFSET) or 0,
        total=_number(request, UPLOAD_LENGTH),
        length=None if length is None else int(length),
    )
    return _json(state, 201 if state.complete else 202)


async def collect_garbage(request: Request) -> Response:
    swept = await _storage(request).collect()
    found = swept.collected
    return _body(
        contract.GarbageReport(
            removed=found.blobs + found.orphans + found.uploads,
            freed_bytes=found.blob_bytes + found.orphan_bytes + found.upload_bytes,
        )
    )


async def check_registry(request: Request) -> Response:
    """Read every content and hold it against its digest."""
    catalog: SqlCatalog = request.scope["state"]["catalog"]
    blobs: BlobStore = request.scope["state"]["blobs"]
    problems = await blobs.check()
    versions: dict[str, set[str]] = {}
    for record in (await catalog.snapshot()).versions:
        for file in record.files:
            versions.setdefault(file.digest, set()).add(f"{record.model}/{record.version}")
    return _body(
        contract.RegistryReport(
            checked=len(await catalog.blobs()),
            ok=all(problem.harmless for problem in problems),
            problems=[
                contract.RegistryProblem(
                    digest=problem.subject,
                    problem=problem.kind,
                    versions=sorted(versions.get(problem.subject, ())),
                )
                for problem in problems
            ],
        )
    )


async def _may_use(request: Request, catalog: SqlCatalog, digest: str) -> bool:
    if await catalog.has_shown(digest, caller(request)):
        return True
    principal: Principal = request.scope["principal"]
    return any(map(principal.sees, (await catalog.models_with([digest])).get(digest, ())))


async def _pieces(receive: Receive) -> AsyncIterator[bytes | memoryview]:
    """The body as it comes.

    Raises:
        CancelledByCallerError: it broke off.
    """
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CancelledByCallerError("the caller went away while its upload was read")
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _digest(request: Request) -> str:
    digest: str = request.path_params["digest"]
    if not DIGEST_PATTERN.fullmatch(digest):
        raise InvalidParameterError("expected a SHA-256 digest in the path, as 64 lower-case hexadecimal digits")
    return digest


def _number(request: Request, header: str) -> int | None:
    text = request.headers.get(header)
    if text is None:
        return None
    if not _BYTES.fullmatch(text):
        raise InvalidParameterError(f"expected {header} to be a whole number of bytes")
    return int(text)


def _storage(request: Request) -> Storage:
    state: dict[str, Any] = request.scope["state"]
    return Storage(state["blobs"], state["versions"])


def _json(state: BlobState, status: int) -> Response:
    body = contract.BlobStatus(digest=state.digest, size=state.size, received=state.received, complete=state.complete)
    return _body(body, status)


def _body(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")
