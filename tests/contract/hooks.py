"""What Schemathesis is told beyond the contract: an upload that is a model, and deployments of it.

A body and the digest of it in the path are two things to a generator, and a digest in a body is one of a content that
nobody has. So every other upload is a model's, whole, under its own digest, and every other deployment is of that one:
the links of the contract lead on from there to versions, aliases and their ends.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import schemathesis
from schemathesis import Case, GenerationMode, HookContext

_MODEL = Path("model.onnx").read_bytes()
_DIGEST = hashlib.sha256(_MODEL).hexdigest()
_TURNS = itertools.count()


def with_a_model(context: HookContext, case: Case[Any]) -> Case[Any]:
    label = case.operation.label
    if label not in ("PUT /api/v1/blobs/{digest}", "POST /api/v1/models/{model}/versions"):
        return case
    meta: Any = case.meta
    if (meta is not None and meta.generation.mode is GenerationMode.NEGATIVE) or next(_TURNS) % 2:
        return case
    if label.startswith("POST"):
        case.body = {"files": [{"path": "model.onnx", "digest": _DIGEST, "size": len(_MODEL)}]}
        return case
    case.body = _MODEL
    case.path_parameters = {"digest": _DIGEST}
    for name in ("Upload-Offset", "Upload-Length"):
        if case.headers:
            case.headers.pop(name, None)
    return case


schemathesis.hook("map_case")(with_a_model)
