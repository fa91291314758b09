"""``inferway keys``: make, list, revoke and rotate keys on the database itself.

It needs no running gateway and no key, only access to the state directory, which is how the first key is made. What a
program would read goes to stdout (a new key stands there alone); words for people go to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from inferway_contract import models as contract
from inferway_contract.names import ENVIRONMENTS, KEY_DEFAULT_OVERLAP_S, KEY_LIST_MAX_LIMIT, SCOPES

from .core.errors import GatewayError, InvalidParameterError, StoreUnavailableError
from .core.keys import KeyRecord, KeyService, public_id
from .http import key_bodies
from .settings import Settings
from .store.database import open_keys
from .store.sql import cause_in_words
from .store.state import StateError

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_NEVER: Final = "never"


def add_parser(commands: Any) -> None:
    """Add ``keys`` to the sub-commands of a parser (what ``ArgumentParser.add_subparsers`` gave)."""
    keys = commands.add_parser(
        "keys",
        help="make, list, revoke and rotate API keys",
        description="Make, list, revoke and rotate API keys, on the database itself: no gateway has to run.",
    )
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")

    create = _action(actions, "create", _create, "make a key and print it on stdout, this once")
    create.add_argument("--name", required=True, help="what the key is for, for people to read")
    create.add_argument(
        "--scopes", required=True, nargs="+", action="extend", metavar="SCOPE", help=f"some of {', '.join(SCOPES)}"
    )
    create.add_argument(
        "--models",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="names of the models it may see, with * and ? (default: all)",
    )
    create.add_argument(
        "--expires-in",
        type=_lifetime,
        metavar="TIME",
        help="such as 12h or 30d, or never (default: 90d with admin, else never)",
    )
    create.add_argument(
        "--environment", choices=ENVIRONMENTS, default="live", help="the word in the key (default live; adm with admin)"
    )

    _action(actions, "list", _list, "list keys, newest first")

    revoke = _action(actions, "revoke", _revoke, "end a key for good")
    revoke.add_argument("key_id", metavar="KEY_ID", help="the id of the key, or the leaked key itself")

    rotate = _action(actions, "rotate", _rotate, "make a key's successor and print it on stdout, this once")
    rotate.add_argument("key_id", metavar="KEY_ID", help="the id of the key to replace")
    rotate.add_argument(
        "--overlap",
        type=_seconds,
        default=KEY_DEFAULT_OVERLAP_S,
        metavar="TIME",
        help="how long the old key still works, such as 30m or 7d; 0s ends it now (default 1d)",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status: 0 done, 1 failed, 2 wrong arguments."""
    # What the store would log of a failure is in the one line that the operator gets anyway.
    logging.getLogger("inferway.store").addHandler(logging.NullHandler())
    chosen = {"state_dir": args.state_dir, "database_url": args.database_url}
    try:
        settings = Settings(**{name: value for name, value in chosen.items() if value is not None})
        asyncio.run(_with_service(settings, args))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        return _failed("; ".join(f"setting {problem['loc'][0]}: {problem['msg']}" for problem in problems), 2)
    except InvalidParameterError as error:
        return _failed(error.message, 2)
    except StoreUnavailableError as error:
        return _failed(f"cannot use the key database: {cause_in_words(error)}", 1)
    except (GatewayError, StateError) as error:
        return _failed(str(error), 1)
    return 0


async def _with_service(settings: Settings, args: argparse.Namespace) -> None:
    pepper = settings.key_pepper.get_secret_value() if settings.key_pepper is not None else None
    async with open_keys(
        database_url=settings.database(), state_dir=settings.state_dir, pepper=pepper, ttl_s=settings.key_cache_ttl_s
    ) as keys:
        act: Callable[[KeyService, argparse.Namespace, Settings], Awaitable[None]] = args.act
        await act(keys.service, args, settings)


async def _create(service: KeyService, args: argparse.Namespace, _: Settings) -> None:
    members: dict[str, Any] = {
        "name": args.name,
        "scopes": list(_split(args.scopes)),
        "models": list(_split(args.models or ["*"])),
        "environment": args.environment,
    }
    if args.expires_in is not None:
        members["expires_in_s"] = None if args.expires_in == _NEVER else args.expires_in
    body = key_bodies.read(contract.KeyCreate, members)
    new = await service.create(
        name=body.name,
        scopes=body.scopes,
        models=body.models,
        environment=body.environment,
        expires_in_s=key_bodies.lifetime(body),
    )
    record = new.record
    _say(args, f"Key {record.id} for {record.name!r}: {_rights(record)}; {_ending(record)}. It is shown this once.")
    print(key_bodies.created(new).model_dump_json() if args.json else new.key.reveal())


async def _list(service: KeyService, args: argparse.Namespace, _: Settings) -> None:
    records: list[KeyRecord] = []
    cursor: str | None = None
    while True:
        page, cursor = await service.page(limit=KEY_LIST_MAX_LIMIT, cursor=cursor)
        records += page
        if cursor is None:
            break
    if args.json:
        print(json.dumps([key_bodies.record(record).model_dump(mode="json") for record in records]))
    elif records:
        now = datetime.now(UTC)
        rows: list[tuple[str, ...]] = [("ID", "NAME", "SCOPES", "MODELS", "STATE", "EXPIRES", "LAST USED")]
        rows += [_row(record, now) for record in records]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    else:
        _say(args, "There is no key yet. Make one: inferway keys create --name me --scopes admin")


async def _revoke(service: KeyService, args: argparse.Namespace, settings: Settings) -> None:
    # A whole key is taken as well: it is what one has in hand after a leak.
    record = await service.revoke(public_id(args.key_id) or args.key_id)
    _say(args, f"Key {record.id} for {record.name!r} is revoked. {_seen_within(settings)}")
    if args.json:
        print(key_bodies.record(record).model_dump_json())


async def _rotate(service: KeyService, args: argparse.Namespace, settings: Settings) -> None:
    body = key_bodies.read(contract.KeyRotate, {"overlap_s": args.overlap})
    new = await service.rotate(args.key_id, overlap_s=body.overlap_s)
    rotated = key_bodies.rotated(new)
    end = _moment(rotated.replaced.expires_at)
    _say(
        args,
        f"Key {rotated.id} for {rotated.name!r} replaces {rotated.replaced.id}, which ends {end}. "
        f"{_seen_within(settings)} The new key is shown this once.",
    )
    print(rotated.model_dump_json() if args.json else new.key.reveal())


def _action(actions: Any, name: str, act: Callable[..., Awaitable[None]], words: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=words, description=f"{words[0].upper()}{words[1:]}."
    )
    parser.add_argument("--state-dir", type=Path, help="directory of the database and the pepper")
    parser.add_argument("--database-url", help="SQLAlchemy URL, for example postgresql://user@host/database")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no words for people on stderr")
    parser.set_defaults(run=run, act=act)
    return parser


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,10})([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError("expected a whole number with a unit, such as 45s, 30m, 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


def _lifetime(text: str) -> int | str:
    return _NEVER if text == _NEVER else _seconds(text)


def _split(values: Sequence[str]) -> Iterator[str]:
    """Words given one by one or with commas between them."""
    for value in values:
        yield from (word for part in value.split(",") if (word := part.strip()))


def _row(record: KeyRecord, now: datetime) -> tuple[str, ...]:
    state = record.state(now)
    return (
        record.id,
        record.name,
        ",".join(key_bodies.record(record).scopes),
        ",".join(record.models),
        "replaced" if state == "active" and record.replaced_by is not None else state,
        _moment(record.expires_at),
        _moment(record.last_used_at),
    )


def _rights(record: KeyRecord) -> str:
    models = "all models" if "*" in record.models else f"models {', '.join(record.models)}"
    return f"{', '.join(key_bodies.record(record).scopes)} on {models}"


def _ending(record: KeyRecord) -> str:
    return "no end" if record.expires_at is None else f"ends {_moment(record.expires_at)}"


def _moment(moment: datetime | None) -> str:
    return "-" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _seen_within(settings: Settings) -> str:
    return f"Running gateways see it within {settings.key_cache_ttl_s:g} s."


def _say(args: argparse.Namespace, words: str) -> None:
    if not args.quiet:
        print(words, file=sys.stderr)


def _failed(words: str, status: int) -> int:
    print(f"inferway keys: {words}", file=sys.stderr)
    return status
