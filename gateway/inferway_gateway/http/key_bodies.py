"""Bodies that are asked for, and those about keys: the contract's models on one side, the core's records on the other.
Used by routes and CLI."""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import formatdate
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from inferway_contract import models as contract
from inferway_contract.names import SCOPES

from ..core.errors import InvalidParameterError
from ..core.keys import KeyRecord, NewKey, Principal, redact

_Body = TypeVar("_Body", bound=BaseModel)
_SHOWN_PROBLEMS: Final = 3
_SHOWN_CHARACTERS: Final = 64
_FILE_PATH: Final = (
    "expected a relative path such as 'model.onnx' or 'weights/a.bin': up to 512 ASCII letters, digits, spaces and "
    "._+@=,:- in parts with '/' between them, of which none is '..' and each begins with a letter, a digit or '_'"
)
_PATTERNS: Final[Mapping[str, str]] = {
    contract.FILE_PATH: _FILE_PATH,
    contract.DIGEST: "expected a SHA-256 digest, 64 of 0-9 and a-f",
    contract.ALIAS: "expected an alias such as 'stable': 1 to 63 of a-z, 0-9 and -, a letter first",
    contract.LABEL: "expected a label's name, 1 to 63 letters, digits and ._/-, a letter or digit first",
}
"""Patterns of the contract in words, for which nobody has to read a pattern."""
_SAFE_TO_SHOW: Final = frozenset({contract.FILE_PATH, contract.ALIAS, contract.LABEL})


def read(body: type[_Body], members: Mapping[str, Any]) -> _Body:
    """A body of the contract.

    Raises:
        InvalidParameterError: names the first members that do not fit, what is expected of them, and of their values
            only those that are names.
    """
    try:
        return body.model_validate(members)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    shown = [f"{_place(problem['loc'])}{_words(body, problem)}" for problem in problems[:_SHOWN_PROBLEMS]]
    more = len(problems) - len(shown)
    raise InvalidParameterError("; ".join(shown) + (f"; and {more} more" if more else ""))


def _words(body: type[BaseModel], problem: ErrorDetails) -> str:
    """What is wrong with a member, and what would not be."""
    pattern = str(problem.get("ctx", {}).get("pattern"))
    if problem["type"] == "string_pattern_mismatch" and pattern in _PATTERNS:
        text = str(problem["input"])
        shown = redact(text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "...")
        return f": {_PATTERNS[pattern]}" + (f", got {shown!a}" if pattern in _SAFE_TO_SHOW else "")
    if problem["type"] == "extra_forbidden":
        known = f", expected one of {', '.join(body.model_fields)}" if len(problem["loc"]) == 1 else ""
        return f" is not known{known}"
    return f": {problem['msg']}"


def lifetime(body: contract.KeyCreate) -> float | Literal["never"] | None:
    """Life in seconds as ``KeyService.create`` takes it: "never" where the member is null, None where it is absent."""
    if "expires_in_s" not in body.model_fields_set:
        return None
    return "never" if body.expires_in_s is None else body.expires_in_s


def record(record: KeyRecord) -> contract.KeyRecord:
    return contract.KeyRecord.model_validate(_members(record))


def created(new: NewKey) -> contract.KeyCreated:
    """Holds the key itself."""
    return contract.KeyCreated.model_validate(_members(new.record) | {"key": new.key.reveal()})


def rotated(new: NewKey) -> contract.KeyRotated:
    """Holds the new key itself."""
    assert new.replaced is not None
    members = _members(new.record) | {"key": new.key.reveal(), "replaced": _members(new.replaced)}
    return contract.KeyRotated.model_validate(members)


def deprecation(principal: Principal) -> tuple[tuple[bytes, bytes], ...]:
    """Headers for an answer to a key that was rotated: since when another is to be used, and when this one ends.

    Source: RFC 9745, section 2 (``Deprecation``); RFC 8594, section 3 (``Sunset``).
    """
    if principal.rotated_at is None or principal.expires_at is None:
        return ()
    return (
        (b"deprecation", b"@%d" % principal.rotated_at),
        (b"sunset", formatdate(principal.expires_at, usegmt=True).encode("ascii")),
    )


def _members(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "environment": record.environment,
        "scopes": [scope for scope in SCOPES if scope in record.scopes],
        "models": list(record.models),
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "last_used_at": record.last_used_at,
        "revoked_at": record.revoked_at,
        "replaced_by": record.replaced_by,
    }


def _place(location: tuple[int | str, ...]) -> str:
    # An unknown member's name is the caller's text: cut, and without a key that stands in the wrong place.
    text = redact(".".join(map(str, location)))
    return f"'{text[:_SHOWN_CHARACTERS]}'"
