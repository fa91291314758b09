"""The command line: arguments to settings, settings to a running gateway.

``inferway serve`` and ``inferway keys`` need the extra ``[gateway]``; without it they say so and how to get it.
``inferway deploy``, ``inferway models`` and ``inferway chat`` are a client's commands and work without it, as does
``inferway optimize``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from . import __version__, cli_chat, cli_models, cli_optimize

if TYPE_CHECKING:
    from .front.hub import Hub
    from .http.application import GatewayApplication

_OPERATORS: Final = frozenset({"serve", "keys", "registry"})
"""Commands that work on the gateway's own state."""


def _parser() -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(prog="inferway", description="Serve ONNX models, deploy them, say who may call.")
    parser.add_argument("--version", action="version", version=f"inferway {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve models",
        description="Serve every model of a directory laid out as NAME/VERSION/model.onnx, and those that are deployed "
        "through the API. "
        "Each option can also be set in the environment, as INFERWAY_ and its name in capitals (--no-auth is "
        "INFERWAY_AUTH=false, --load-model is INFERWAY_LOAD_MODELS). Limits and timeouts are set there alone; "
        "docs/settings.md has them all.",
    )
    serve.add_argument("model_dir", type=Path, nargs="?", metavar="DIR", help="the model repository, if there is one")
    serve.add_argument(
        "--upstreams", type=Path, metavar="FILE", help="TOML file of servers elsewhere that models may be on"
    )
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on, 0 for a free one (default 8080)")
    serve.add_argument("--no-auth", dest="auth", action="store_false", default=None, help="ask for no API key")
    serve.add_argument(
        "--insecure", action="store_true", default=None, help="allow other machines to connect without API keys"
    )
    serve.add_argument(
        "--workers", type=int, help="processes that listen; more than one share one copy of the models (default 1)"
    )
    serve.add_argument("--server-name", help="name in the server's metadata (default inferway)")
    serve.add_argument(
        "--model-control",
        choices=("none", "explicit", "poll"),
        help="none: load all at start; explicit: load on request; poll: follow the directory (default none)",
    )
    serve.add_argument(
        "--load-model",
        dest="load_models",
        action="append",
        metavar="NAME",
        help="explicit: load this one at start; may be repeated",
    )
    serve.add_argument("--poll-interval-s", type=float, help="seconds between two looks at the directory (default 5)")
    serve.add_argument(
        "--strict-readiness",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="ready only when every model is (default yes)",
    )
    serve.add_argument(
        "--state-dir", type=Path, help="directory of the database and the pepper (default ~/.local/state/inferway)"
    )
    serve.add_argument("--database-url", help="SQLAlchemy URL, for example postgresql+psycopg://user@host/db")
    serve.add_argument(
        "--requests-per-minute", type=int, help="inference requests that each key may make in a minute (default: any)"
    )
    serve.add_argument("--cpus", type=int, help="runner threads (default: processors this process may use)")
    serve.add_argument(
        "--providers", help="execution providers by preference, comma separated (default CPUExecutionProvider)"
    )
    serve.add_argument(
        "--trial-budget-s",
        type=float,
        help="seconds for trying ONNX Runtime options on each model, 0: none (default 1)",
    )
    serve.add_argument("--access-log", action="store_true", default=None, help="write a record for each request")
    serve.add_argument(
        "--log-format", choices=("auto", "json", "text"), help="default auto: text on a terminal, else JSON"
    )
    serve.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), help="least severe record written (default info)"
    )
    serve.set_defaults(run=_serve)
    return parser, commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed, 2 wrong arguments or a missing extra."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser()
    cli_models.add_parser(commands)
    cli_chat.add_parser(commands)
    cli_optimize.add_parser(commands)
    if not arguments or arguments[0] not in cli_models.COMMANDS | cli_chat.COMMANDS | cli_optimize.COMMANDS:
        # A client's commands wait for none of this, and work where the gateway's extra is not installed.
        missing = _add_operators(commands)
        if missing is not None and arguments and arguments[0] in _OPERATORS:
            return _fail(f"this needs the gateway ({missing} is not installed): pip install 'inferway[gateway]'", 2)
    args = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130


def _add_operators(commands: Any) -> str | None:
    """Add the commands that work on the gateway's own state; what is missing where its extra is not installed."""
    try:
        with _quick_to_interrupt():
            from . import cli_keys, cli_registry
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("inferway_gateway", "inferway_contract"):
            raise
        return error.name or "a library"
    cli_keys.add_parser(commands)
    cli_registry.add_parser(commands)
    return None


def _serve(args: argparse.Namespace) -> int:
    with _quick_to_interrupt():
        from pydantic import ValidationError

        from .app import create_app
        from .core.registry import LOADER_THREAD
        from .front.processes import FrontsError, edge_limits, longest_body, run_fronts
        from .http.application import is_inference
        from .http.logs import announce, configure_logging
        from .server.policy import DrainPolicy
        from .server.serve import run
        from .settings import Settings

    chosen = {name: value for name, value in vars(args).items() if value is not None and name in Settings.model_fields}
    try:
        settings = Settings(**chosen)
    except ValidationError as error:
        return _fail("; ".join(f"{_option(e['loc'], chosen)}: {_reason(e)}" for e in error.errors()), 2)
    if settings.model_dir is not None and not settings.model_dir.is_dir():
        return _fail(f"expected {settings.model_dir} to be a directory of models, and there is none", 2)
    configure_logging(settings.log_format, settings.log_level)
    # A runner thread whose run has ended waits for the interpreter while the event loop is busy: 0.5 to 0.6 ms at the
    # default of 5 ms, 0.16 to 0.37 ms like this (2 processors, November 2026), and the loop does no less.
    sys.setswitchinterval(2e-4)

    def ready(port: int) -> None:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        announce(f"Inferway listens on http://{host}:{port}")

    made: list[GatewayApplication] = []

    def make(hub: Hub | None = None) -> GatewayApplication:
        made.append(create_app(settings, hub))
        return made[0]

    try:
        if settings.workers > 1:
            run_fronts(make, settings, ready=ready)
        else:
            app = make()
            run(
                cast(Any, app),
                host=settings.host,
                port=settings.port,
                limits=edge_limits(settings),
                drain=DrainPolicy(delay_s=settings.drain_delay_s, timeout_s=settings.drain_timeout_s),
                on_drain=app.begin_drain,
                stats=app.edge_stats,
                fast=is_inference,
                at_once=app.answer_at_once,
                streamed=longest_body(settings),
                ready=ready,
            )
    except FrontsError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"could not listen on {settings.host} port {settings.port}: {error.strerror or error}", 1)
    except SystemExit:
        problem = made[0].startup_problem if made else None
        return _fail(problem, 1) if problem is not None else 1
    for thread in threading.enumerate():
        if thread.name.startswith(LOADER_THREAD):
            thread.join(0.5)
            if thread.is_alive():
                # It loads a model, which nothing can stop, and the interpreter would wait for however long it takes.
                logging.shutdown()
                os._exit(0)
    return 0


@contextlib.contextmanager
def _quick_to_interrupt() -> Iterator[None]:
    """Let Ctrl+C end the process on the spot, while it imports and nothing is open.

    As an exception it would end in a traceback from the depth of some library, or be taken for a failed import there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _option(location: Sequence[int | str], chosen: Collection[str]) -> str:
    """What the operator calls a setting: the option where it was given as one, else the variable."""
    if not location:
        return "settings"
    name = str(location[0])
    if name not in chosen:
        return f"INFERWAY_{name.upper()}"
    return {"model_dir": "DIR", "load_models": "--load-model"}.get(name, "--" + name.replace("_", "-"))


def _reason(error: Mapping[str, Any]) -> str:
    words: str = error["msg"]
    return words.removeprefix("Value error, ")


def _fail(words: str, status: int) -> int:
    print(f"inferway: {words}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
