"""``inferway registry``: check what is kept of deployed models, and collect what nothing needs any more.

It works on the state directory and the database themselves, with the settings that the gateway has; a gateway may run
meanwhile. What was found goes to stdout; words for people go to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .core.errors import GatewayError, StoreUnavailableError
from .settings import Settings
from .store.blobs import StorageLimits
from .store.catalog import SqlCatalog, open_catalog
from .store.history import HistoryLimits, forget_history
from .store.sql import cause_in_words
from .store.state import StateError
from .store.storage import Storage, open_storage

_Act = Callable[[argparse.Namespace, Settings, SqlCatalog, Storage], Awaitable[int]]


def add_parser(commands: Any) -> None:
    """Add ``registry`` to the sub-commands of a parser (what ``ArgumentParser.add_subparsers`` gave)."""
    registry = commands.add_parser(
        "registry",
        help="check and clean up what is kept of deployed models",
        description="Check and clean up what is kept of deployed models, on the state directory and the database "
        "themselves: no gateway has to run, and one may.",
    )
    actions = registry.add_subparsers(dest="action", required=True, metavar="ACTION")
    _action(actions, "check", _check, "hold every stored file against its digest, and list what is wrong")
    collect = _action(actions, "gc", _collect, "remove files that no model version has, and history beyond its limits")
    collect.add_argument(
        "--grace-s",
        type=_seconds,
        metavar="SECONDS",
        help="keep files that are younger, for a deployment that is about to begin (default 3600)",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status: 0 all is well, 1 it is not or failed, 2 wrong arguments."""
    # What the store would log of a failure is in the one line that the operator gets anyway.
    logging.getLogger("inferway.store").addHandler(logging.NullHandler())
    names = ("state_dir", "database_url", "blob_store")
    try:
        settings = Settings(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
        if settings.database_url is None and not (settings.state_dir / "inferway.db").is_file():
            return _failed(f"expected a state directory with a database, '{settings.state_dir}' has none", 1)
        return asyncio.run(_with_storage(settings, args))
    except ValidationError as error:
        return _failed("; ".join(str(found["msg"]) for found in error.errors()), 2)
    except StoreUnavailableError as error:
        return _failed(f"cannot use the registry: {cause_in_words(error)}", 1)
    except (GatewayError, StateError) as error:
        return _failed(str(error), 1)
    except OSError as error:
        return _failed(f"cannot use the state directory: {error.strerror or error}", 1)


async def _with_storage(settings: Settings, args: argparse.Namespace) -> int:
    limits = StorageLimits(grace_s=settings.blob_grace_s)
    async with (
        open_catalog(database_url=settings.database(), timeout_s=60.0) as catalog,
        open_storage(
            state_dir=settings.state_dir,
            catalog=catalog,
            limits=limits,
            blob_store=settings.blob_store,
            cache_bytes=settings.blob_cache_bytes,
        ) as storage,
    ):
        act: _Act = args.act
        return await act(args, settings, catalog, storage)


async def _check(args: argparse.Namespace, _: Settings, catalog: SqlCatalog, storage: Storage) -> int:
    problems = await storage.check()
    blobs = await catalog.blobs()
    versions = (await catalog.snapshot()).versions
    bad = sum(not problem.harmless for problem in problems)
    if args.json:
        found = [asdict(problem) for problem in problems]
        print(json.dumps({"files": len(blobs), "versions": len(versions), "problems": found}))
    else:
        for problem in problems:
            print(f"{'note' if problem.harmless else 'PROBLEM'}: {problem.words}")
    _say(
        args, f"Checked {_count(len(blobs), 'file')} and {_count(len(versions), 'version')}: {_count(bad, 'problem')}."
    )
    return 1 if bad else 0


async def _collect(args: argparse.Namespace, settings: Settings, catalog: SqlCatalog, storage: Storage) -> int:
    swept = await storage.collect(args.grace_s)
    forgotten = await forget_history(catalog, HistoryLimits(settings.history_s, settings.history_per_model))
    found = swept.collected
    freed = found.blob_bytes + found.orphan_bytes + found.upload_bytes
    if args.json:
        print(json.dumps({**asdict(found), "directories": swept.directories, **forgotten._asdict()}))
    _say(
        args,
        f"Removed {_count(found.blobs, 'file')} that no version has, {_count(found.orphans, 'leftover file')}, "
        f"{_count(found.uploads, 'upload')} that nobody continued and "
        f"{_count(swept.directories, 'version directory')}: {freed} bytes. Forgot "
        f"{_count(forgotten.events, 'old event')} and {_count(forgotten.deployments, 'old deployment')}.",
    )
    return 0


def _action(actions: Any, name: str, act: Callable[..., Awaitable[int]], words: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=words, description=f"{words[0].upper()}{words[1:]}."
    )
    parser.add_argument("--state-dir", type=Path, help="directory of the database and the files")
    parser.add_argument("--database-url", help="SQLAlchemy URL, for example postgresql://user@host/database")
    parser.add_argument("--blob-store", metavar="URL", help="object store, for example s3://bucket/prefix")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no words for people on stderr")
    parser.set_defaults(run=run, act=act)
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e9:
        raise argparse.ArgumentTypeError("expected a number of seconds from 0 on")
    return seconds


def _count(number: int, what: str) -> str:
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number or 'no'} {what if number == 1 else plural}"


def _say(args: argparse.Namespace, words: str) -> None:
    if not args.quiet:
        print(words, file=sys.stderr)


def _failed(words: str, status: int) -> int:
    print(f"inferway registry: {words}", file=sys.stderr)
    return status
