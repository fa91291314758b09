"""``inferway deploy`` and ``inferway models``: the life of a model, from anywhere, over HTTP.

They are a client's commands: they go through the SDK to a gateway that runs, and need neither its extra nor its disk.
Tables and words go to stdout, or JSON with ``--json``; how far something is, and what went wrong, goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from inferway import Deployment, Inferway
    from inferway_contract.models import Alias, CatalogModel, Event

COMMANDS: Final = frozenset({"deploy", "models"})
"""Commands that need no gateway on this machine."""

_CONNECTION: Final = (
    "The gateway's address is --url, or INFERWAY_BASE_URL, or http://127.0.0.1:8080; the API key is in "
    "INFERWAY_API_KEY or in the file of --api-key-file."
)
_LOOK_AGAIN_S: Final = 0.5
_SCOPES: Final = "Deploying and changing needs the scope deploy, looking the scope read."


def add_parser(commands: Any) -> None:
    """Add ``deploy`` and ``models`` to the sub-commands of a parser (what ``ArgumentParser.add_subparsers`` gave)."""
    _add_deploy(commands)
    models = commands.add_parser(
        "models",
        help="look after models on a gateway: versions, aliases, roll back, history",
        description=f"Look after the models of a gateway. {_CONNECTION} {_SCOPES}",
    )
    actions = models.add_subparsers(dest="action", required=True, metavar="ACTION")

    _action(actions, "list", _list, "list models with their versions and aliases")

    show = _action(actions, "show", _show, "show one model: versions, aliases, what passed through them")
    show.add_argument("name", metavar="NAME")

    versions = _action(actions, "versions", _versions, "list a model's versions")
    versions.add_argument("name", metavar="NAME")

    alias = actions.add_parser("alias", help="list, set and delete aliases", description="List, set, delete aliases.")
    aliases = alias.add_subparsers(dest="alias_action", required=True, metavar="ACTION")
    listed = _action(aliases, "list", _alias_list, "list a model's aliases")
    listed.add_argument("name", metavar="NAME")
    _add_alias_set(aliases)
    deleted = _action(aliases, "delete", _alias_delete, "take an alias away")
    deleted.add_argument("name", metavar="NAME")
    deleted.add_argument("alias", metavar="ALIAS")

    promote = _action(actions, "promote", _promote, "make a version the one that an alias points at, alone")
    promote.add_argument("name", metavar="NAME")
    promote.add_argument(
        "version", nargs="?", type=_positive, metavar="VERSION", help="left out: what the alias of --from points at"
    )
    promote.add_argument("--from", dest="source", default="canary", metavar="ALIAS", help="default canary")
    promote.add_argument("--alias", default="stable", help="which one is moved (default stable)")

    back = _action(actions, "rollback", _rollback, "point an alias where it pointed before its last change")
    back.add_argument("name", metavar="NAME")
    back.add_argument("--alias", default="stable", help="which one (default stable)")

    history = _action(actions, "history", _history, "list who did what, when, youngest first")
    history.add_argument("name", nargs="?", metavar="NAME", help="of one model (default: of all)")
    history.add_argument("--limit", type=_positive, default=50, metavar="N", help="events at most (default 50)")

    delete = _action(actions, "delete", _delete, "delete a version, or a model with all its versions")
    delete.add_argument("name", metavar="NAME")
    delete.add_argument("version", nargs="?", type=_positive, metavar="VERSION", help="left out: the whole model")
    delete.add_argument("--yes", action="store_true", help="do not ask")

    pin = _action(actions, "pin", _pin, "keep a version in memory, whoever else needs room")
    pin.add_argument("name", metavar="NAME")
    pin.add_argument("version", type=_positive, metavar="VERSION")
    pin.add_argument("--off", action="store_true", help="let it leave again")

    wait = _action(actions, "wait", _wait_ready, "wait until the gateway is ready, and a model on it")
    wait.add_argument("name", nargs="?", metavar="NAME", help="of a model (default: the gateway alone)")
    wait.add_argument("version", nargs="?", type=_positive, metavar="VERSION", help="left out: any of its versions")
    wait.add_argument("--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="at most (default 60)")

    running = _action(actions, "deployments", _deployments, "list deployments, youngest first")
    running.add_argument("name", nargs="?", metavar="NAME", help="of one model (default: of all)")
    running.add_argument("--limit", type=_positive, default=20, metavar="N", help="at most so many (default 20)")

    watch = _action(actions, "watch", _watch, "wait for a deployment to end")
    watch.add_argument("deployment", metavar="ID")
    watch.add_argument("--timeout", type=_seconds, default=3600.0, metavar="SECONDS", help="at most (default 3600)")

    cancel = _action(actions, "cancel", _cancel, "give a deployment up; what served before goes on serving")
    cancel.add_argument("deployment", metavar="ID")


def _add_deploy(commands: Any) -> None:
    deploy = _action(
        commands,
        "deploy",
        _deploy,
        "put a model on a gateway: send it, have it checked, loaded and warmed, point an alias at it",
    )
    deploy.description = (
        "Put a model on a gateway. PATH is an .onnx file, which brings the files of its weights along, or a folder. "
        "What the gateway has already is not sent again, and a sending that broke off goes on where it was. "
        f"{_CONNECTION} {_SCOPES}"
    )
    deploy.add_argument("path", type=Path, metavar="PATH", help="an .onnx file or a folder")
    deploy.add_argument("--name", required=True, help="the model's name on the gateway")
    deploy.add_argument("--version", type=_positive, metavar="N", help="its number (default: the next one)")
    alias = deploy.add_mutually_exclusive_group()
    alias.add_argument("--alias", default="stable", help="points at the version once it is ready (default stable)")
    alias.add_argument("--no-alias", dest="alias", action="store_const", const=None, help="move no alias")
    deploy.add_argument(
        "--label", dest="labels", type=_label, action="append", default=[], metavar="KEY=VALUE",
        help="a short text to find it by; may be repeated",
    )  # fmt: skip
    deploy.add_argument("--metadata", type=Path, metavar="FILE", help="JSON or TOML to keep with it, such as scores")
    deploy.add_argument("--instances", type=_positive, metavar="N", help="processes that run it (default 1)")
    deploy.add_argument("--config", type=Path, metavar="FILE", help="TOML as in inferway.toml, or the same as JSON")
    deploy.add_argument("--golden", type=Path, metavar="FILE", help="golden.json: inputs, and outputs to compare")
    deploy.add_argument("--isolation", choices=("worker", "inprocess"), help="default: what the gateway chooses")
    deploy.add_argument("--pinned", action="store_true", help="keep it in memory, whoever else needs room")
    deploy.add_argument("--no-wait", dest="wait", action="store_false", help="come back as soon as the gateway began")
    deploy.add_argument("--timeout", type=_seconds, default=3600.0, metavar="SECONDS", help="for all (default 3600)")
    deploy.add_argument("--quiet", action="store_true", help="show no progress")


def _add_alias_set(aliases: Any) -> None:
    chosen = _action(aliases, "set", _alias_set, "point an alias at a version, or at several by percents")
    chosen.add_argument("name", metavar="NAME", help="of the model")
    chosen.add_argument("alias", metavar="ALIAS", help="such as stable, which the bare name means, or canary")
    chosen.add_argument(
        "targets", nargs="+", type=_target, metavar="TARGET", help="a version, such as 3; or shares, such as 3=95 4=5"
    )
    chosen.add_argument(
        "--sticky", default="none", help="who keeps to one version: none, key, or header:NAME (default none)"
    )
    chosen.add_argument(
        "--shadow", type=_shadow, metavar="VERSION[=SHARE]", help="gets copies of requests, a share of 0 to 1 of them"
    )
    chosen.add_argument(
        "--fallback", type=_positive, action="append", default=[], metavar="VERSION",
        help="answers where the chosen one cannot; may be repeated, in order",
    )  # fmt: skip
    chosen.add_argument(
        "--guard", action="store_true", help="take a lesser target back by itself when it does worse than the main one"
    )
    chosen.add_argument(
        "--expected-revision", type=int, metavar="N", help="refuse where somebody has changed the alias since"
    )


def _action(actions: Any, name: str, act: Callable[..., None], words: str) -> argparse.ArgumentParser:
    return add_client_command(actions, name, act, words, _SCOPES)


def add_client_command(
    actions: Any, name: str, act: Callable[..., None], words: str, scopes: str
) -> argparse.ArgumentParser:
    """Add a command that goes through the SDK.

    Args:
        act: called with a client and the arguments; what it raises of the SDK becomes words and a status.
        words: what it does.
        scopes: a sentence about the scopes that the key needs.
    """
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=words, description=f"{words[0].upper()}{words[1:]}. {_CONNECTION} {scopes}"
    )
    parser.add_argument("--url", help="of the gateway (default INFERWAY_BASE_URL, else http://127.0.0.1:8080)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds the API key, else INFERWAY_API_KEY")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.set_defaults(run=run, act=act)
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    import inferway

    try:
        key = None if args.api_key_file is None else args.api_key_file.read_text().strip()
        with inferway.Inferway(args.url, api_key=key) as client:
            act: Callable[[Inferway, argparse.Namespace], None] = args.act
            act(client, args)
            sys.stdout.flush()
    except KeyboardInterrupt:
        kept = "; what was sent is kept for a day, and the same command goes on from there"
        return _failed(f"interrupted{kept if args.command == 'deploy' else ''}", 130)
    except _Ended as error:
        return _failed(str(error), error.status)
    except BrokenPipeError:
        # Whoever read the table has seen enough, such as `head`; the interpreter must not try to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except WrongArguments as error:
        return _failed(str(error), 2)
    except (inferway.ConfigurationError, inferway.InvalidInputError) as error:
        return _failed(str(error), 2)
    except inferway.AuthenticationError as error:
        make = "inferway keys create --name me --scopes deploy read infer"
        return _failed(f"{error.message}; put a key into INFERWAY_API_KEY, such as one of: {make}", 1)
    except inferway.APIConnectionError as error:
        hint = "" if error.sent else "; is a gateway running there? --url or INFERWAY_BASE_URL names another"
        return _failed(f"{error}{hint}{_notes(error)}", 1)
    except inferway.ModelNotFoundError as error:
        return _failed(f"{error}{_notes(error)}; 'inferway models list' shows what there is", 1)
    except inferway.InferwayError as error:
        return _failed(f"{error}{_notes(error)}", 1)
    except OSError as error:
        return _failed(f"{error.filename or ''}: {error.strerror or error}", 2)
    return 0


class WrongArguments(Exception):
    """Arguments that argparse could not know to be wrong."""


class _Ended(Exception):
    """A wait is over before what was waited for."""

    def __init__(self, words: str, status: int) -> None:
        super().__init__(words)
        self.status = status


# --- deploying ---------------------------------------------------------------------------------------------------


def _deploy(client: Inferway, args: argparse.Namespace) -> None:
    begun = time.monotonic()
    deployment = client.models.deploy(
        args.path,
        name=args.name,
        version=args.version,
        alias=args.alias,
        labels=dict(args.labels),
        metadata=None if args.metadata is None else _table_of(args.metadata, "what is kept with the version"),
        instances=args.instances,
        config=None if args.config is None else _table_of(args.config, "options, as inferway.toml does"),
        golden=args.golden,
        isolation=args.isolation,
        pinned=args.pinned,
        wait=False,
        progress=False if args.quiet or args.json else None,
        timeout=args.timeout,
    )
    if args.wait:
        _wait(deployment, max(1.0, args.timeout - (time.monotonic() - begun)))
    _say_deployment(deployment, args)


def _watch(client: Inferway, args: argparse.Namespace) -> None:
    deployment = client.models.deployment(args.deployment)
    _wait(deployment, args.timeout)
    _say_deployment(deployment, args)


def _wait_ready(client: Inferway, args: argparse.Namespace) -> None:
    """Wait for a gateway, or for a model. What is not there yet may come: the gateway starts, the model is deployed. A
    version that was unloaded to make room counts as ready, for its next request loads it."""
    import inferway

    end = time.monotonic() + args.timeout
    if args.name is None:
        try:
            client.health.wait_until_ready(args.timeout)
        except inferway.APITimeoutError as error:
            raise _Ended(f"the gateway was not ready within {args.timeout:g} s: {error}", 1) from error
        _say(args, "The gateway is ready.")
        return
    what = args.name if args.version is None else f"{args.name} version {args.version}"
    while True:
        try:
            found = client.models.describe(args.name).versions
            found = [one for one in found if args.version in (None, one.version)]
            why = "; ".join(f"version {one.version} is {one.state} {one.reason}".rstrip() for one in found)
        except (inferway.APIConnectionError, inferway.ModelNotFoundError) as error:
            found, why = [], str(error)
        ready = [one for one in found if one.state in ("READY", "UNLOADED")]
        if ready:
            break
        left = end - time.monotonic()
        if left <= 0:
            raise _Ended(f"{what} was not ready within {args.timeout:g} s: {why or 'there is no such version'}", 1)
        time.sleep(min(_LOOK_AGAIN_S, left))
    if args.json:
        _print_json(ready)
    else:
        print(f"{what} is ready: " + ", ".join(f"version {one.version} is {one.state}" for one in ready) + ".")


def _cancel(client: Inferway, args: argparse.Namespace) -> None:
    deployment = client.models.deployment(args.deployment).cancel()
    _say_deployment(deployment, args)


def _wait(deployment: Deployment, timeout: float) -> None:
    """Wait for a deployment. What ends the wait and not the deployment says how to go on from here."""
    import inferway

    goes_on = (
        f"deployment {deployment.id} goes on: 'inferway models watch {deployment.id}' waits for it, "
        f"'inferway models cancel {deployment.id}' ends it"
    )
    try:
        deployment.wait(timeout)
    except KeyboardInterrupt:
        raise _Ended(f"interrupted; {goes_on}", 130) from None
    except inferway.APITimeoutError as error:
        raise _Ended(f"the time is over; {goes_on}", 1) from error
    except inferway.APIError as error:
        raise _Ended(f"{error}; if it can, {goes_on}", 1) from error


def _say_deployment(deployment: Deployment, args: argparse.Namespace) -> None:
    version = f"{deployment.model} version {deployment.version}"
    if args.json:
        _print_json(deployment.record)
    elif deployment.state == "succeeded":
        named = f", and {deployment.model}@{deployment.alias} points at it" if deployment.alias else ""
        again = " It has this content since an earlier deployment." if deployment.reused else ""
        print(f"{version} is ready{named}.{again}")
    elif deployment.state == "running":
        print(f"Deployment {deployment.id} of {version} is under way: inferway models watch {deployment.id}")
    else:
        print(f"Deployment {deployment.id} of {version} is {deployment.state}.")


def _table_of(path: Path, what: str) -> dict[str, Any]:
    """A table of TOML, or an object of JSON by the file's name."""
    text = path.read_text()
    try:
        found: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise WrongArguments(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise WrongArguments(f"expected {path} to hold a table of {what}")
    return found


def _deployments(client: Inferway, args: argparse.Namespace) -> None:
    found = client.models.deployments(args.name, limit=args.limit)
    if args.json:
        _print_json([deployment.record for deployment in found])
        return
    rows = [
        (
            deployment.id,
            deployment.model,
            str(deployment.version),
            deployment.state,
            deployment.failed_step or deployment.step or "-",
            _moment(deployment.created_at),
            deployment.error.message if deployment.error else "",
        )
        for deployment in found
    ]
    _table(("ID", "MODEL", "VERSION", "STATE", "STEP", "SINCE", "WHY"), rows, "There was no deployment yet.")


# --- looking -----------------------------------------------------------------------------------------------------


def _list(client: Inferway, args: argparse.Namespace) -> None:
    found = client.models.catalog()
    if args.json:
        _print_json(found)
        return
    rows = [
        (
            model.name,
            model.source,
            ", ".join(f"{version.version} {version.state}" for version in model.versions) or "-",
            "; ".join(f"{alias.alias} -> {_weights(alias.weights)}" for alias in model.aliases) or "-",
        )
        for model in found
    ]
    _table(("NAME", "FROM", "VERSIONS", "ALIASES"), rows, "There is no model yet: inferway deploy FILE --name NAME")


def _show(client: Inferway, args: argparse.Namespace) -> None:
    model = client.models.describe(args.name)
    if args.json:
        _print_json(model)
        return
    print(f"{model.name}, from the {model.source}")
    _version_table(model)
    if model.aliases:
        print()
        _alias_table(model.aliases)


def _versions(client: Inferway, args: argparse.Namespace) -> None:
    if args.json:
        _print_json(client.models.versions(args.name))
        return
    _version_table(client.models.describe(args.name))


def _version_table(model: CatalogModel) -> None:
    rows = [
        (
            str(version.version),
            version.state + (" pinned" if version.pinned else ""),
            version.kind,
            version.isolation,
            _size(version.footprint.peak_bytes) if version.footprint else "-",
            _moment(version.created_at),
            version.created_by or "-",
            ", ".join(f"{key}={value}" for key, value in version.labels.items()) or "-",
            version.reason,
        )
        for version in sorted(model.versions, key=lambda version: version.version)
    ]
    header = ("VERSION", "STATE", "KIND", "RUNS IN", "MEMORY", "SINCE", "BY", "LABELS", "WHY")
    _table(header, rows, "It has no version.")


def _alias_list(client: Inferway, args: argparse.Namespace) -> None:
    found = client.models.aliases(args.name)
    if args.json:
        _print_json(found)
        return
    _alias_table(found)


def _alias_table(aliases: Sequence[Alias]) -> None:
    rows = [
        (
            alias.alias,
            _weights(alias.weights),
            alias.sticky,
            str(alias.shadow.version) if alias.shadow else "-",
            ", ".join(map(str, alias.fallback)) or "-",
            "yes" if alias.guard else "-",
            _weights(alias.previous.weights) if alias.previous else "-",
            str(alias.revision),
            "; ".join(f"{version}: {seen.requests} requests, {seen.errors} errors"
                      for version, seen in sorted(alias.traffic.items())) or "-",
        )
        for alias in aliases
    ]  # fmt: skip
    header = ("ALIAS", "VERSIONS", "STICKY", "SHADOW", "FALLBACK", "GUARD", "BEFORE", "REVISION", "SEEN")
    _table(header, rows, "It has no alias.")


def _history(client: Inferway, args: argparse.Namespace) -> None:
    found = list(islice(client.models.events(args.name, page_size=min(args.limit, 1000)), args.limit))
    if args.json:
        _print_json(found)
        return
    rows = [(_moment(event.at), event.kind, _subject(event), event.by, _detail(event.detail)) for event in found]
    _table(("WHEN", "WHAT", "MODEL", "BY", "DETAIL"), rows, "Nothing has happened yet.")


def _subject(event: Event) -> str:
    alias = f"@{event.alias}" if event.alias else ""
    version = f" version {event.version}" if event.version is not None else ""
    return f"{event.model}{alias}{version}"


def _detail(detail: Mapping[str, Any]) -> str:
    """An event's detail in a few words; ``--json`` has all of it."""
    told = dict(detail)
    words: list[str] = []
    deployment = told.pop("deployment", None)
    if isinstance(deployment, str):
        words.append(f"deployment {deployment[:4]}…" + (" reused" if told.pop("reused", False) else ""))
    step, message = told.pop("step", None), told.pop("message", None)
    if step or message:
        words.append(f"at {step}: {message}" if step and message else str(message or f"at {step}"))
        told.pop("code", None)
    text = told.pop("text", None)
    if text:
        # Whatever else is there are the numbers that it is made of.
        return ", ".join([*words, str(text)])
    spec = told.pop("spec", None)
    if isinstance(spec, Mapping):
        words += _pointed(spec)
    changed = told.pop("changed", None)
    if isinstance(changed, list):
        words.append(f"changed {', '.join(map(str, changed))}")
    digest = told.pop("digest", None)
    if isinstance(digest, str) and not words:
        words.append(f"content {digest[:8]}…")
    reason = told.pop("reason", None)
    if isinstance(reason, str):
        words.append(reason)
    words += [f"{key} {value}" for key, value in told.items() if isinstance(value, str | int | float)
              and not isinstance(value, bool)]  # fmt: skip
    return ", ".join(words)


def _pointed(spec: Mapping[str, Any]) -> list[str]:
    """Where an alias points: ``-> version 3 (95 %), version 4 (5 %)``."""
    weights = spec.get("weights")
    if not isinstance(weights, Mapping):
        return []
    ordered = sorted(weights.items(), key=lambda pair: (-pair[1], int(pair[0])))
    words = ["-> " + ", ".join(f"version {version} ({share:g} %)" for version, share in ordered)]
    if spec.get("sticky") not in (None, "none"):
        words.append(f"sticky by {spec['sticky']}")
    if isinstance(spec.get("shadow"), Mapping):
        words.append(f"shadow version {spec['shadow'].get('version')}")
    if spec.get("fallback"):
        words.append(f"fallback {', '.join(map(str, spec['fallback']))}")
    if spec.get("guard"):
        words.append("guarded")
    return ["; ".join(words)]


# --- changing ----------------------------------------------------------------------------------------------------


def _alias_set(client: Inferway, args: argparse.Namespace) -> None:
    shares = [share for _, share in args.targets]
    if len(args.targets) == 1 and shares[0] is None:
        target: Any = args.targets[0][0]
    elif None in shares or len({version for version, _ in args.targets}) < len(shares):
        raise WrongArguments("expected one version, such as 3, or shares of several, each once, such as 3=95 4=5")
    else:
        target = dict(args.targets)
    alias = client.models.set_alias(
        args.name,
        args.alias,
        target,
        sticky=args.sticky,
        shadow=args.shadow,
        fallback=args.fallback,
        guard=args.guard or None,
        expected_revision=args.expected_revision,
    )
    _say_alias(alias, args)


def _alias_delete(client: Inferway, args: argparse.Namespace) -> None:
    client.models.delete_alias(args.name, args.alias)
    _say(args, f"{args.name}@{args.alias} is gone.")


def _promote(client: Inferway, args: argparse.Namespace) -> None:
    """Point an alias at one version, unless somebody moves it meanwhile. Whom users stick to, and who answers where it
    cannot, stays; shares, shadow and guard were for the way there."""
    aliases = {alias.alias: alias for alias in client.models.aliases(args.name)}
    version = args.version
    if version is None:
        source = aliases.get(args.source)
        named = [int(number) for number, share in source.weights.items() if share > 0] if source else []
        if len(named) != 1:
            found = f"points at {_weights(source.weights)}" if source else "is not there"
            raise WrongArguments(
                f"expected an alias '{args.source}' of {args.name} that points at one version, it {found}; "
                f"name the version: inferway models promote {args.name} VERSION"
            )
        version = named[0]
    now = aliases.get(args.alias)
    if now is None:
        alias = client.models.set_alias(args.name, args.alias, version)
    else:
        alias = client.models.set_alias(
            args.name,
            args.alias,
            version,
            sticky=now.sticky,
            fallback=[other for other in now.fallback if other != version],
            expected_revision=now.revision,
        )
    _say_alias(alias, args)


def _rollback(client: Inferway, args: argparse.Namespace) -> None:
    _say_alias(client.models.rollback(args.name, args.alias), args)


def _say_alias(alias: Alias, args: argparse.Namespace) -> None:
    before = f"; before it was {_weights(alias.previous.weights)}" if alias.previous else ""
    if args.json:
        _print_json(alias)
    else:
        print(f"{alias.model}@{alias.alias} points at {_weights(alias.weights)}{before}.")


def _delete(client: Inferway, args: argparse.Namespace) -> None:
    what = args.name if args.version is None else f"{args.name} version {args.version}"
    if not args.yes:
        if not sys.stdin.isatty():
            raise WrongArguments(f"nobody is there to ask whether {what} is to be deleted; say so with --yes")
        more = " with all its versions and aliases" if args.version is None else ""
        print(f"Delete {what}{more}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            _say(args, "Nothing was deleted.")
            return
    client.models.delete(args.name, args.version)
    _say(args, f"{what} is deleted.")


def _pin(client: Inferway, args: argparse.Namespace) -> None:
    version = client.models.update(args.name, args.version, pinned=not args.off)
    words = "stays in memory" if version.pinned else "may leave the memory when others need room"
    if args.json:
        _print_json(version)
    else:
        print(f"{version.model} version {version.version} {words}.")


# --- reading arguments -------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected seconds, such as 600, got {text!r}")


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, value


def _target(text: str) -> tuple[int, float | None]:
    version, equals, share = text.partition("=")
    if not equals:
        return _positive(version), None
    with suppress(ValueError):
        if 0 <= float(share) <= 100:
            return _positive(version), float(share)
    raise argparse.ArgumentTypeError(f"expected VERSION=PERCENT, such as 4=5, got {text!r}")


def _shadow(text: str) -> dict[str, Any]:
    version, equals, share = text.partition("=")
    if not equals:
        return {"version": _positive(version)}
    with suppress(ValueError):
        if 0 <= float(share) <= 1:
            return {"version": _positive(version), "share": float(share)}
    raise argparse.ArgumentTypeError(f"expected VERSION or VERSION=SHARE with a share of 0 to 1, got {text!r}")


# --- saying ------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> None:
    if not rows:
        print(nothing, file=sys.stderr)
        return
    # A column that is empty in every row says nothing.
    kept = [index for index, _ in enumerate(header) if any(row[index] not in ("", "-") for row in rows)]
    lines = [tuple(row[index] for index in kept) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _weights(weights: Mapping[str, float]) -> str:
    if len(weights) == 1:
        return f"version {next(iter(weights))}"
    ordered: Iterable[tuple[str, float]] = sorted(weights.items(), key=lambda pair: (-pair[1], int(pair[0])))
    return ", ".join(f"version {version} with {share:g} %" for version, share in ordered)


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def _moment(moment: datetime | None) -> str:
    return "-" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _print_json(found: Any) -> None:
    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if hasattr(value, "model_dump") else value

    print(json.dumps([plain(one) for one in found] if isinstance(found, list) else plain(found)))


def _say(args: argparse.Namespace, words: str) -> None:
    print(words, file=sys.stderr if args.json else sys.stdout)


def _notes(error: BaseException) -> str:
    return "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))


def _failed(words: str, status: int) -> int:
    print(f"inferway: {words}", file=sys.stderr)
    return status
